"""Does a run of stage 2 overfit? Losses of its evaluations and rows of its log in, a verdict out.

Held-out and training latents keep their noise and timesteps through a run, so two evaluations are
compared latent by latent, and the standard error is that of the difference, not of either loss.

Letters: N held-out latents, M training latents, C h w their shape.
"""
from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from metrics.condition import condition_each, condition_means, fixed_noise, loss_each

if TYPE_CHECKING:
    from diffusion import Diffusion

BINS = 10                       # of timesteps, of equal width
LEAST_IN_BIN = 8                # latents: with fewer the standard error is worthless
# Student's t with 24 degrees of freedom (25 latents per bin) exceeds 4 in 3 of 10,000 cases. With
# 11 places to look at in each of up to 100 evaluations, 3 would be exceeded by chance. The rise
# must also hold for ROW_OF evaluations, and the gap to the training loss must have grown as surely.
SIGNIFICANT = 4.0               # standard errors
RISEN = 0.01                    # of the loss: a smaller rise does no harm, however certain
ROW_OF = 3                      # evaluations in a row before a rise is reported
HEEDED = 1.02                   # shuffled / right: the seed's token, blind to places, has 1.016
UNLEARNT = 0.5                  # of the loss of predicting eps = 0, which is 1
STILL_FALLING = 0.05            # of the loss in the last quarter: more, and longer training pays
WIDENED = 0.1                   # of the loss, gained by training images on held-out ones
COPY_PERCENTILE = 1.0           # of held-out images' distances to their nearest training image
CHANCE = 1e-3                   # copies that chance gives more often than this are no evidence
HELD_OUT = "held out"           # the key of the held-out images among the distances


# --------------------------------------------------------------------------------- during training

class OverfitMonitor:
    """Compares the held-out and training losses of a run with those of its best evaluation.

    Over all timesteps (key "") and in bins (keys "_t000", "_t100", ...), each with its own best.
    """

    def __init__(self, diffusion: Diffusion, val: Sequence[Tensor], train: Sequence[Tensor]):
        """Latents z [N, C, h, w] and, for `measure`, poses [N, 17, 3] and labels [N]."""
        self.diffusion, self.val, self.train = diffusion, val, train
        self.members = {"": (torch.arange(len(val[0])), torch.arange(len(train[0])))}
        bins = [fixed_noise(diffusion, z)[0].cpu() * BINS // diffusion.timesteps
                for z, *_ in (val, train)]
        for b in range(BINS):
            first = math.ceil(b * diffusion.timesteps / BINS)
            self.members[f"_t{first:03d}"] = tuple((of == b).nonzero()[:, 0] for of in bins)
        self.best: dict[str, dict[str, Tensor]] = {}    # key: "val" and "train" losses of its best

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        return self.best

    def load_state_dict(self, best: dict[str, dict[str, Tensor]]) -> None:
        """A checkpoint's state; ignored if it is of another number of latents."""
        sizes = {key: [len(part) for part in members] for key, members in self.members.items()}
        if all(sizes.get(key) == [len(b["val"]), len(b["train"])] for key, b in best.items()):
            self.best = best

    def measure(self, average: Callable[..., Tensor], raw: Callable[..., Tensor], null: bool,
                batch_size: int,
                autocast: Callable[[], AbstractContextManager]) -> dict[str, float]:
        """For the log: eps losses on fixed noise, of the EMA model with the right pose, a shuffled
        one and, with `null`, none, and on training latents; of the raw model on both."""
        def losses(model: Callable, z: Tensor, poses: Tensor, labels: Tensor) -> Tensor:
            return loss_each(model, self.diffusion, z, poses, batch_size, False, autocast, labels)

        z, poses, labels = self.val
        each = condition_each(average, self.diffusion, z, poses, batch_size, null, autocast,
                              labels)
        right, train = each["right"], losses(average, *self.train)
        return condition_means(each) | {
            "shuffled_se": standard_error(each["shuffled"] - right),
            **self.means("right", right, 0), **self.means("train", train, 1),
            **self.means("raw", losses(raw, *self.val), 0),
            **self.means("train_raw", losses(raw, *self.train), 1), **self.rises(right, train)}

    def means(self, name: str, losses: Tensor, part: int) -> dict[str, float]:
        """For the log: means by bin of losses [N] of held-out (part 0) or training latents (1)."""
        return {f"{name}{key}": losses[members[part]].mean().item()
                for key, members in self.members.items() if len(members[part])}

    def rises(self, val: Tensor, train: Tensor) -> dict[str, float]:
        """For the log: how losses [N] and [M] compare with the best evaluation; standard errors.

        "rise" is the held-out loss above its best; "grown" is the rise less that of the training
        loss: how much the gap has grown. Bins with too few or infinite losses are left out.
        """
        out = {}
        for key, (of_val, of_train) in self.members.items():
            v, u = val[of_val], train[of_train]
            finite = v.isfinite().all() and u.isfinite().all()
            if min(len(v), len(u)) < LEAST_IN_BIN or not finite:
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


# ----------------------------------------------------------------------------------- rows of a log

def evaluations(rows: list[dict]) -> list[dict]:
    """The rows of a stage-2 log that are evaluations."""
    return [row for row in rows if "val_right" in row]


def best_step(rows: list[dict]) -> int:
    """The step of best.pt: where the held-out loss was lowest."""
    return 1 + min(evaluations(rows), key=lambda row: row["val_right"])["step"]


def bin_keys(row: dict) -> list[str]:
    """"_t000", "_t100", ... of an evaluation."""
    return [name.removeprefix("val_right") for name in row if name.startswith("val_right_t")]


def gaps(row: dict) -> dict[str, float]:
    """By bin, the held-out less the training loss, as a share of the held-out loss."""
    return {key: 1 - row.get(f"val_train{key}", math.nan) / row[f"val_right{key}"]
            for key in bin_keys(row)}


def risen(row: dict) -> dict[str, float]:
    """By bin, how far the held-out loss is above its best, as a share of it."""
    return {key: row.get(f"val_rise{key}", math.nan) / row[f"val_right{key}"]
            for key in bin_keys(row)}


def has_risen(row: dict, key: str) -> bool:
    """Is the held-out loss of a bin surely above its best, and did the training loss not follow?"""
    rise, loss = row.get(f"val_rise{key}", 0.0), row[f"val_right{key}"]
    return (rise > RISEN * loss and rise > SIGNIFICANT * row[f"val_rise_se{key}"]
            and row[f"val_grown{key}"] > SIGNIFICANT * row[f"val_grown_se{key}"])


def in_a_row(flags: Iterable[bool]) -> int:
    """How many are true before the first that is not."""
    return sum(1 for _ in itertools.takewhile(bool, flags))


def streaks(rows: list[dict]) -> dict[str, int]:
    """For how many evaluations in a row, up to the last, each bin `has_risen`; without zeros."""
    found = evaluations(rows)
    keys = ["", *bin_keys(found[-1])] if found else []
    counts = {key: in_a_row(has_risen(row, key) for row in reversed(found)) for key in keys}
    return {key: n for key, n in counts.items() if n}


def overfitting(rows: list[dict], row_of: int = ROW_OF) -> str | None:
    """A warning if held-out losses have risen for `row_of` evaluations in a row, else None."""
    rising = {key: n for key, n in streaks(rows).items() if n >= row_of}
    if not rising:
        return None
    bins = [str(int(key[2:])) for key in bin_keys(evaluations(rows)[-1]) if key in rising]
    where = f"in the bins from t = {', '.join(bins)}" if bins else "over all timesteps"
    return (f"The held-out loss has risen for {max(rising.values())} evaluations {where}: the "
            f"model is memorising training images. The best step was {best_step(rows):,}.")


# ----------------------------------------------------------------------- copies of training images

@dataclass(frozen=True)
class Near:
    """Latents, and the nearest training latent to each."""
    z: Tensor                       # [N, C, h, w]
    rows: np.ndarray                # [N] of the training latents: odd ones are mirror images
    distances: np.ndarray           # [N] root mean square over channels and places


@torch.no_grad()
def nearest(parts: dict[str, Tensor], trained: Callable[[np.ndarray], Tensor], n: int,
            chunk: int = 1024) -> dict[str, Near]:
    """The nearest of `n` training latents to each latent z [N, C, h, w] of `parts`, in one pass.

    `trained` gives the latents [R, C, h, w] of rows [R]; `chunk` rows are compared at once, 50 MB
    for latents of 64x64x3.
    """
    z = torch.cat(list(parts.values())).flatten(1)                                      # [Q, D]
    least = torch.full((len(z),), math.inf, device=z.device)
    rows = torch.zeros(len(z), dtype=torch.long, device=z.device)
    for first in tqdm(range(0, n, chunk), "comparing latents", unit="chunk", dynamic_ncols=True):
        x = trained(np.arange(first, min(first + chunk, n))).flatten(1)                 # [R, D]
        distance, at = (x.square().sum(1) - 2 * z @ x.T).min(1)     # + |z|^2, the same for all x
        closer = distance < least
        least, rows = torch.where(closer, distance, least), torch.where(closer, first + at, rows)
    rows = rows.cpu().numpy()
    # Again, as |z - x|^2: in the form above large terms cancel.
    distances = (z - trained(rows).flatten(1)).square().mean(1).sqrt().cpu().numpy()
    ends = np.cumsum([len(part) for part in parts.values()])[:-1]
    return {name: Near(part, r, d) for (name, part), r, d in zip(
        parts.items(), np.split(rows, ends), np.split(distances, ends), strict=True)}


def copies(distances: dict[str, list[float]]) -> tuple[float, dict[str, dict]]:
    """Which samples are copies, from the distances to the nearest training image.

    `distances` has those of held-out images, under HELD_OUT, and of samples, by name. Returns the
    limit, COPY_PERCENTILE of the held-out distances, and by name: "copies", the samples nearer than
    that, "of" how many, "chance", how probable as many are by chance, and "far", the samples
    farther than 100 - COPY_PERCENTILE of the held-out images.
    """
    held_out, out = np.array(distances[HELD_OUT]), {}
    limit, farthest = np.percentile(held_out, [COPY_PERCENTILE, 100 - COPY_PERCENTILE]).tolist()
    for name in distances.keys() - {HELD_OUT}:
        found = np.array(distances[name])
        near, n = int((found < limit).sum()), len(found)
        out[name] = {"copies": near, "of": n, "far": int((found > farthest).sum()),
                     "chance": chance_of(near, n, int((held_out < limit).sum()), len(held_out))}
    return limit, out


def chance_of(near: int, n: int, below: int, of: int) -> float:
    """The probability that at least `near` of n values precede all of `of` others but `below`.

    If all are of one kind, every order is equally likely, and the first near + below values are a
    hypergeometric draw.
    """
    first = near + below
    ways = (math.comb(n, j) * math.comb(of, first - j) for j in range(near, min(n, first) + 1))
    return sum(ways) / math.comb(n + of, first)


# ------------------------------------------------------------------------------------- the verdict

POSE = {"followed": "the model follows the pose", "ignored": "the model ignores the pose",
        "unclear": "too few held-out images to tell whether the model follows the pose"}
HELD_OUT_SHARE = f"{100 - COPY_PERCENTILE:g} % of held-out images"


def verdict(rows: list[dict], distances: dict[str, list[float]] | None = None) -> dict:
    """Is a run of stage 2 underfit, good or memorising? From its log, and distances as in `copies`.

    "verdict"; "since", the step since which losses show memorising, or None; "best", the step of
    best.pt; "pose", a key of POSE; "reasons", sentences; "numbers". ValueError if the log has
    no evaluation.
    """
    found = evaluations(rows)
    if not found:
        raise ValueError("the log has no evaluation yet; train longer")
    last, steps = found[-1], found[-1]["step"] + 1
    loss, training = last["val_right"], last["val_train"]
    fell, risen_for, warning = recent_fall(found), streaks(rows), overfitting(rows)
    gap, ahead = widened(found), 0
    if fell is not None and fell < STILL_FALLING:           # no harm while the held-out loss falls
        ahead = in_a_row(share > WIDENED for share in reversed(gap))
    limit, copied = copies(distances) if distances else (None, {})

    reasons = []
    if warning:
        reasons.append(f"{warning} The held-out loss is {loss:.4f} now, the training loss "
                       f"{training:.4f}.")
    if ahead:
        reasons.append(
            f"Relative to the held-out loss, the training loss has fallen by {gap[-1]:.0%} since "
            f"the first evaluation, to {training:.4f}. The held-out loss, {loss:.4f}, no longer "
            "falls: what the model still learns helps on training images only.")
    for name, c in sorted(copied.items()):
        if c["copies"] and c["chance"] < CHANCE:
            reasons.append(f"{c['copies']} of {c['of']} samples of {name} are nearer to a training "
                           f"image than {HELD_OUT_SHARE}. The probability of as many by chance is "
                           f"{c['chance']:.0e}.")
    word = "memorising"
    if not reasons:
        word, reason = underfit_or_good(loss, training, fell, steps, copied)
        reasons = [reason]
    sure = last["val_shuffled"] - loss > SIGNIFICANT * last["val_shuffled_se"]
    pose = ("ignored" if last["val_ratio"] < HEEDED else "followed" if sure else "unclear")
    reasons.append(f"Shuffled poses have {last['val_ratio']:.3f} times the loss of right poses: "
                   f"{POSE[pose]}.")
    since = max(risen_for.values()) if warning else ahead
    return {"verdict": word, "since": found[-since]["step"] + 1 if since else None,
            "best": best_step(rows), "pose": pose,
            "reasons": reasons,
            "numbers": {"step": steps, "loss": loss, "training": training, "fell": fell,
                        "ratio": last["val_ratio"], "risen_for": risen_for, "widened": gap[-1],
                        "limit": limit, "copies": copied}}


def recent_fall(found: list[dict]) -> float | None:
    """By what share the held-out loss fell in the last quarter of the steps; None if too young."""
    steps, losses = [row["step"] + 1 for row in found], [row["val_right"] for row in found]
    if steps[0] > 0.75 * steps[-1]:
        return None
    return 1 - losses[-1] / np.interp(0.75 * steps[-1], steps, losses).item()


def widened(found: list[dict]) -> list[float]:
    """By evaluation, by what share training / held-out loss is below that of the first evaluation.

    Relative to the first, a difference in difficulty between the two sets of images cancels.
    """
    shares = [row["val_train"] / row["val_right"] for row in found]
    return [1 - share / shares[0] for share in shares]


def underfit_or_good(loss: float, training: float, fell: float | None, steps: int,
                     copied: dict[str, dict]) -> tuple[str, str]:
    """Which of the two a run is that does not memorise, and why."""
    so_far = f"The held-out loss is {loss:.4f}"
    if fell is not None:
        so_far += f"; it fell by {fell:.1%} in the last quarter of the {steps:,} steps"
    far, drawn, near = (sum(c[key] for c in copied.values()) for key in ("far", "of", "copies"))
    if not loss < UNLEARNT:
        return "underfit", f"{so_far}. Predicting eps = 0 has loss 1."
    if fell is None:
        return "underfit", f"{so_far}. It is too early to tell if it still falls; train longer."
    if not fell < STILL_FALLING:
        return "underfit", f"{so_far}. It still falls; train longer."
    if far > drawn / 2:
        return "underfit", (f"{far} of {drawn} samples are farther from every training image than "
                            f"{HELD_OUT_SHARE}: they do not look like images of this dataset yet; "
                            f"train longer. {so_far}.")
    copies_found = (f" Samples nearer to a training image than {HELD_OUT_SHARE}: {near} of "
                    f"{drawn}, no more than chance gives." if drawn else "")
    return "good", (f"{so_far}. The training loss is {training:.4f}. The held-out loss rises in no "
                    f"bin of timesteps, so more steps would do no harm.{copies_found}")


def headline(found: dict) -> str:
    """A `verdict` in a few words."""
    since = f" since step {found['since']:,}" if found["since"] else ""
    return (f"{found['verdict'].upper()}{since}; the best step was {found['best']:,}; "
            f"{POSE[found['pose']]}")
