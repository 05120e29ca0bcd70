"""The moment a run of stage 2 overfits: losses of its evaluations, and rows of its log, in; a verdict in words out."""
from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffusion import Diffusion
from metrics.condition import fixed_noise

# Training and held-out latents keep their noise and timesteps through a run. So two evaluations of it are compared
# latent by latent, and what their difference is worth is told by its own standard error, not by that of either loss.

BINS = 10                           # of timesteps, of equal width
LEAST_IN_BIN = 8                    # latents; of fewer a standard error says nothing, and the bin stays without a say
# Student's t with 24 degrees of freedom, those of 25 latents a bin, is beyond 4 in 3 of 10,000 cases: with 11 places to
# look at in each of up to 100 evaluations 3 would be beaten by chance. That it holds ROW_OF times and of the gap too
# is asked for besides.
SIGNIFICANT = 4.0                   # standard errors
RISEN = 0.01                        # of the loss: less is no harm, however certain
ROW_OF = 3                          # evaluations in a row, before anything is said
HEEDED = 1.02                       # shuffled / right: the seed's token, which cannot place a joint, reaches 1.016
UNLEARNT = 0.5                      # of the loss of predicting nothing, which is 1, for the noise is N(0, I)
STILL_FALLING = 0.05                # of the loss, in the last quarter of the steps: more, and twice the steps would pay
WIDENED = 0.1                       # of the loss, that training pictures gained on held-out ones: more is no accident
COPY_PERCENTILE = 1.0               # of the distances of held-out pictures to their nearest training picture
CHANCE = 1e-3                       # copies are evidence where so many come by chance in less than this share of cases


class Watch:
    """Held-out and training losses of one run, against those at the evaluation where the held-out ones were lowest.

    Over all timesteps, key "", and in bins of them, keys "_t000", "_t100", ...: each has its own best evaluation.
    """

    def __init__(self, diffusion: Diffusion, val: Tensor, train: Tensor):
        """val [N, C, h, w] and train [M, C, h, w] are the latents whose losses will come."""
        self.members = {"": (torch.arange(len(val)), torch.arange(len(train)))}
        val_bin, train_bin = (fixed_noise(diffusion, z)[0].cpu() * BINS // diffusion.timesteps for z in (val, train))
        for b in range(BINS):
            first = math.ceil(b * diffusion.timesteps / BINS)
            self.members[f"_t{first:03d}"] = (val_bin == b).nonzero()[:, 0], (train_bin == b).nonzero()[:, 0]
        self.best: dict[str, dict[str, Tensor]] = {}        # key: "val" and "train" losses of its best evaluation

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        return self.best

    def load_state_dict(self, best: dict[str, dict[str, Tensor]]) -> None:
        """`best` of a checkpoint, where it is of as many latents; else the watch begins anew."""
        if all(key in self.members and [len(b["val"]), len(b["train"])] == [len(of) for of in self.members[key]]
               for key, b in best.items()):
            self.best = best

    def means(self, name: str, losses: Tensor, part: int) -> dict[str, float]:
        """Of losses [N] of the held-out latents, `part` 0, or of the training ones, 1: figures for the log."""
        return {f"{name}{key}": losses[of[part]].mean().item() for key, of in self.members.items() if len(of[part])}

    def rises(self, val: Tensor, train: Tensor) -> dict[str, float]:
        """Losses [N] and [M] of an evaluation -> figures for the log, of each key where that can be said:
        "rise", held-out loss above its best, "grown", the same less what the training loss did meanwhile: how much the
        gap between them has grown; and the standard errors of both."""
        out = {}
        for key, (of_val, of_train) in self.members.items():
            v, u = val[of_val], train[of_train]
            if min(len(v), len(u)) < LEAST_IN_BIN or not (v.isfinite().all() and u.isfinite().all()):
                continue
            if key not in self.best or v.mean() < self.best[key]["val"].mean():
                self.best[key] = {"val": v, "train": u}
            rise, moved = v - self.best[key]["val"], u - self.best[key]["train"]
            out |= {f"rise{key}": rise.mean().item(), f"rise_se{key}": standard_error(rise),
                    f"grown{key}": (rise.mean() - moved.mean()).item(),
                    f"grown_se{key}": math.hypot(standard_error(rise), standard_error(moved))}
        return out


def standard_error(x: Tensor) -> float:
    """Of the mean of x [N]."""
    return (x.std() / math.sqrt(len(x))).item()


def evaluations(rows: list[dict]) -> list[dict]:
    """Those rows of a log of stage 2 that are evaluations."""
    return [row for row in rows if "val_right" in row]


def has_risen(row: dict, key: str) -> bool:
    """Is the held-out loss of `key` for certain above its best, and not because all losses are?"""
    rise, loss = row.get(f"val_rise{key}", 0.0), row[f"val_right{key}"]
    return (rise > RISEN * loss and rise > SIGNIFICANT * row[f"val_rise_se{key}"]
            and row[f"val_grown{key}"] > SIGNIFICANT * row[f"val_grown_se{key}"])


def bin_keys(row: dict) -> list[str]:
    """"_t000", "_t100", ... of an evaluation."""
    return sorted((name[9:] for name in row if re.fullmatch(r"val_right_t\d+", name)), key=lambda key: int(key[2:]))


def in_a_row(flags: Iterable[bool]) -> int:
    """How many are true before the first that is not."""
    return sum(1 for _ in itertools.takewhile(bool, flags))


def streaks(rows: list[dict]) -> dict[str, int]:
    """For how many evaluations in a row, up to the last one, `has_risen` holds, of each key for which it does."""
    found, out = evaluations(rows), {}
    for key in ["", *bin_keys(found[-1])] if found else []:
        n = in_a_row(has_risen(row, key) for row in reversed(found))
        if n:
            out[key] = n
    return out


def best_step(rows: list[dict]) -> int:
    """After how many steps the held-out loss was lowest: the step of best.pt."""
    return 1 + min((row for row in evaluations(rows)), key=lambda row: row["val_right"])["step"]


# what the network decides in the first, the middle and the last third of the timesteps
MEMORISED = "the last steps' details", "shapes", "whole pictures, from their first outlines on,"


def overfitting(rows: list[dict], row_of: int = ROW_OF) -> str | None:
    """In words, since when and where held-out losses rise, from the rows of a log; None unless they have for `row_of`
    evaluations in a row."""
    risen = {key: n for key, n in streaks(rows).items() if n >= row_of}
    if not risen:
        return None
    keys = bin_keys(evaluations(rows)[-1])
    places = [i for i, key in enumerate(keys) if key in risen]
    thirds = sorted({3 * i // len(keys) for i in places})
    what = " and ".join(MEMORISED[third] for third in thirds) or "training pictures"
    return (f"validation loss has risen for {max(risen.values())} evaluations {in_bins(keys, places)}: {what} are "
            f"being memorised; best was step {best_step(rows):,}")


def in_bins(keys: list[str], places: list[int]) -> str:
    """The bins with the numbers `places` among all `keys`, in words: "in bins t<300", "in bins 100<=t<300, t>=900"."""
    if len(places) in (0, len(keys)):
        return "in all bins" if places else "over all timesteps"
    words, first = [], [key[2:].lstrip("0") or "0" for key in keys]
    for run in np.split(places, np.flatnonzero(np.diff(places) > 1) + 1):
        low, high = run[0], run[-1] + 1
        words.append(f"t<{first[high]}" if low == 0 else f"t>={first[low]}" if high == len(keys)
                     else f"{first[low]}<=t<{first[high]}")
    return f"in bin{'s' * (len(places) > 1)} {', '.join(words)}"


def gaps(row: dict) -> dict[str, float]:
    """The held-out less the training loss of an evaluation, as a share of the held-out one, by the keys of its bins."""
    return {key: 1 - row.get(f"val_train{key}", math.nan) / row[f"val_right{key}"] for key in bin_keys(row)}


def widened(rows: list[dict]) -> list[float]:
    """At each evaluation, by what share training pictures have come to be cheaper, held against held-out ones, than at
    the first: what the two sets of pictures differ in by themselves falls out."""
    shares = [row.get("val_train", math.nan) / row["val_right"] for row in evaluations(rows)]
    first = next(filter(math.isfinite, shares), math.nan)       # a run of before had no training losses
    return [1 - share / first for share in shares]


def risen(row: dict) -> dict[str, float]:
    """How far the held-out loss of an evaluation is above its best, as a share of it, by the keys of its bins."""
    return {key: row.get(f"val_rise{key}", math.nan) / row[f"val_right{key}"] for key in bin_keys(row)}


HELD_OUT = "held out"


def copies(distances: dict[str, list[float]]) -> tuple[float, dict[str, dict]]:
    """Which samples are copies, by the distances to the nearest training picture: of held-out pictures, under HELD_OUT,
    and of kinds of samples, by their names.

    The limit, COPY_PERCENTILE of the first; and of each kind how many are nearer than that, "copies", "of" how many,
    how often chance makes as many, "chance", and how many lie further away than all but COPY_PERCENTILE, "far".
    """
    held_out, out = np.array(distances[HELD_OUT]), {}
    limit, furthest = (float(np.percentile(held_out, share)) for share in (COPY_PERCENTILE, 100 - COPY_PERCENTILE))
    for name in distances.keys() - {HELD_OUT}:
        found = np.array(distances[name])
        near, n = int((found < limit).sum()), len(found)
        chance = chance_of(near, n, int((held_out < limit).sum()), len(held_out))
        out[name] = {"copies": near, "of": n, "chance": chance, "far": int((found > furthest).sum())}
    return limit, out


def chance_of(near: int, n: int, below: int, of: int) -> float:
    """How often at least `near` of n values come before the one of `of` others that has `below` of its own before it,
    if all are of one kind: any order is then as likely, and the first near + below are a hypergeometric draw."""
    first = near + below
    ways = (math.comb(n, j) * math.comb(of, first - j) for j in range(near, min(n, first) + 1))
    return sum(ways) / math.comb(n + of, first)


def verdict(rows: list[dict], distances: dict[str, list[float]] | None = None) -> dict:
    """Is a run of stage 2 underfit, good or memorising? From the rows of its log, and `distances` as `copies` has them.

    "verdict"; "since", the step from which on held-out losses rise, or else training ones run ahead, if so; "best", the
    step of best.pt; "pose", heeded or ignored; "reasons" in words, and the "numbers" behind them. ValueError for a log
    that does not tell.
    """
    found = evaluations(rows)
    if not found or "val_train" not in found[-1]:
        raise ValueError("the log has no evaluation that tells held-out from training loss: the run is too young, or "
                         "older than this measure; train it on, or anew with --fresh")
    last, warning, risen_for = found[-1], overfitting(rows), streaks(rows)
    steps, loss = last["step"] + 1, last["val_right"]
    early = found[0]["step"] + 1 <= 0.75 * steps                # or there is nothing to compare with
    fell = 1 - loss / np.interp(0.75 * steps, [row["step"] + 1 for row in found],
                                [row["val_right"] for row in found]).item() if early else None
    gap, ahead = widened(rows), 0                               # for how many evaluations training has been ahead
    if early and fell < STILL_FALLING:                          # while held-out losses fall, no harm is done
        ahead = in_a_row(share > WIDENED for share in reversed(gap))
    limit, copied = copies(distances) if distances else (None, {})
    heeded = last["val_ratio"] >= HEEDED and last["val_shuffled"] - loss > SIGNIFICANT * last["val_shuffled_se"]
    numbers = {"step": steps, "evaluations": len(found), "loss": loss, "training": last["val_train"], "fell": fell,
               "ratio": last["val_ratio"], "risen_for": risen_for, "widened": gap[-1], "limit": limit, "copies": copied,
               "rise": {key: share for key, share in risen(last).items() if math.isfinite(share)}}
    reasons = [f"{warning}; it is {loss:.4f} now, and {last['val_train']:.4f} on training pictures"] if warning else []
    if ahead:
        reasons.append(f"the loss of training pictures has run ahead by {gap[-1]:.0%} since the first evaluation, to "
                       f"{last['val_train']:.4f}, while that of held-out ones, {loss:.4f}, no longer falls: what is "
                       "learnt now holds for the training pictures alone")
    reasons += [f"{c['copies']} of {c['of']} samples under {name} are nearer to a training picture than "
                f"{100 - COPY_PERCENTILE:g} % of held-out pictures are (by chance: {c['chance']:.0e})"
                for name, c in sorted(copied.items()) if c["copies"] and c["chance"] < CHANCE]
    still = f"held-out loss is {loss:.4f}" + (
        f" after a fall of {fell:.1%} over the last quarter of the {steps:,} steps" if early else "")
    far, drawn = (sum(c[key] for c in copied.values()) for key in ("far", "of"))
    if reasons:
        word = "memorising"
    elif not loss < UNLEARNT:
        word, reasons = "underfit", [f"{still}; predicting nothing has 1"]
    elif not early:
        word, reasons = "underfit", [f"{still}, and there is no evaluation from which to tell whether it still falls; "
                                     "train longer"]
    elif not fell < STILL_FALLING:
        word, reasons = "underfit", [f"{still}; it still falls, so train longer"]
    elif far > drawn / 2:
        word, reasons = "underfit", [f"{far} of {drawn} samples lie further from any training picture than "
                                     f"{100 - COPY_PERCENTILE:g} % of held-out pictures do: they do not look like such "
                                     f"pictures yet, so train longer; {still}"]
    else:
        word, reasons = "good", [f"{still}; it is {last['val_train']:.4f} on training pictures, and rises in no bin of "
                                 "timesteps: nothing speaks against more steps but their time"]
        if drawn:
            near = sum(c["copies"] for c in copied.values())
            reasons.append(f"of {drawn} samples {near or 'none'} {'are' if near > 1 else 'is'} nearer to a training "
                           f"picture than {100 - COPY_PERCENTILE:g} % of held-out pictures are"
                           + (": no more than chance makes" if near else ""))
    reasons.append(f"shuffled poses have {last['val_ratio']:.3f} times the loss of right ones: the pose is "
                   + ("heeded" if heeded else "ignored"))
    since = max(risen_for.values()) if warning else ahead
    return {"verdict": word, "since": found[-since]["step"] + 1 if since else None,
            "best": best_step(rows), "pose": "heeded" if heeded else "ignored", "reasons": reasons, "numbers": numbers}


@dataclass(frozen=True)
class Near:
    """Latents z [N, C, h, w], and of each the nearest row of the training latents and how far that is."""
    z: Tensor
    rows: np.ndarray                # [N] of the cache: odd ones are mirror images
    distances: np.ndarray           # [N] root mean square over channels and places


def headline(found: dict) -> str:
    """What `verdict` found, in a few words."""
    return (found["verdict"].upper() + (f" since step {found['since']:,}" if found["since"] else "")
            + f"; best was step {found['best']:,}; the pose is " + found["pose"])
