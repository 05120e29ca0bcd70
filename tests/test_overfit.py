# ruff: noqa: F811    (pytest hands fixtures in by the names under which they are imported)
"""Does the measure of overfitting say what is so? Curves, copies and runs whose truth was planted."""
import itertools
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_train import PRESETS, as_micro, command, micro, one_sentence, same, trained  # noqa: F401  (two are fixtures)

import checkpoint
import data
import evaluate
import train
from diffusion import Diffusion
from metrics import condition, overfit

ROOT = Path(__file__).parent.parent
N, EVALS, EVERY = 256, 20, 1000             # latents, evaluations of a planted run, steps between them
DIFFUSION = Diffusion()
PLOT_CURVES = train.plot_curves             # which the fixture micro replaces
BIN = condition.fixed_noise(DIFFUSION, torch.zeros(N, 1, 1, 1))[0] * 10 // 1000        # of each latent


def planted(val, train, wander: float = 0.0, seed: int = 0, evals: int = EVALS) -> list[dict]:
    """The log of a run in which the mean loss at evaluation k in bin b is val(k, b), train(k, b): each latent has a
    difficulty of its own, and its loss wanders by that share around it."""
    g = torch.Generator().manual_seed(seed)
    watch = overfit.Watch(DIFFUSION, torch.zeros(N, 1, 1, 1), torch.zeros(N, 1, 1, 1))
    hard = [0.5 + torch.rand(N, generator=g, dtype=torch.float64) for _ in range(2)]
    rows = []
    for k in range(evals):
        v, u = (torch.tensor([curve(k, int(b)) for b in BIN], dtype=torch.float64) * h
                * (1 + wander * torch.randn(N, generator=g, dtype=torch.float64))
                for curve, h in zip((val, train), hard, strict=True))
        means = condition.condition_means({"right": v, "shuffled": 1.3 * v, "null": 1.1 * v})
        figures = (means | {"shuffled_se": 0.001}
                   | watch.means("right", v, 0) | watch.means("train", u, 1) | watch.rises(v, u))
        rows += [{"step": EVERY * (k + 1) - 20, "loss": 0.1},
                 {"step": EVERY * (k + 1) - 1} | {f"val_{name}": value for name, value in figures.items()}]
    return rows


def falling(k: int, b: int) -> float:
    """Levels off at 0.05."""
    return 0.05 + 0.2 * math.exp(-k / 3)


def rising(after: int, bins: set[int], by: float = 0.02):
    """As `falling`, but after so many evaluations up by that share of itself, in those bins, at each."""
    return lambda k, b: falling(min(k, after), b) * (1 + by * (k - after)) if b in bins and k > after else falling(k, b)


# --------------------------------------------------------------------------------------------------- the verdict

def test_one_evaluation_tells_nothing_about_falling():
    found = overfit.verdict(planted(falling, falling, evals=1))
    assert found["verdict"] == "underfit" and "no evaluation from which" in found["reasons"][0]
    assert "it still falls, so" not in found["reasons"][0]


def test_a_log_that_began_without_training_losses_makes_sound_json():
    rows = planted(falling, falling)
    del rows[1]["val_train"]
    found = overfit.verdict(rows)
    assert found["numbers"]["widened"] == pytest.approx(0, abs=0.01)
    json.dumps(evaluate.without_nan(found | {"more": [math.nan, {"deep": math.inf}]}), allow_nan=False)


def test_a_run_that_levels_off_is_good():
    rows = planted(falling, falling, wander=0.02)
    found = overfit.verdict(rows)
    assert (found["verdict"], found["since"], found["pose"]) == ("good", None, "heeded")
    assert overfit.overfitting(rows) is None
    assert found["numbers"]["loss"] == rows[-1]["val_right"] and found["numbers"]["evaluations"] == EVALS
    assert found["numbers"]["fell"] == pytest.approx(1 - rows[-1]["val_right"] / rows[2 * 14 + 1]["val_right"])
    between = overfit.verdict(rows[:2 * 18])["numbers"]["fell"]                # 13,500 is half-way between two of them
    middle = (rows[2 * 12 + 1]["val_right"] + rows[2 * 13 + 1]["val_right"]) / 2
    assert between == pytest.approx(1 - rows[2 * 17 + 1]["val_right"] / middle, abs=1e-6)


def test_a_rise_in_the_last_steps_bins_is_found_at_its_third_evaluation_and_said_plainly():
    """In bins t<300 from the 12th evaluation on, by 2 % each time, while training losses go on falling."""
    rows = planted(rising(11, {0, 1, 2}), lambda k, b: falling(k, b) * 0.99 ** k, wander=0.01)
    assert [overfit.overfitting(rows[:2 * k]) is not None for k in range(1, EVALS + 1)] == [False] * 14 + [True] * 6
    found = overfit.verdict(rows)
    assert found["verdict"] == "memorising"
    assert found["since"] == 13 * EVERY                         # the first evaluation after the best one of these bins
    best = min(range(EVALS), key=lambda k: rows[2 * k + 1]["val_right"])
    assert found["best"] == (best + 1) * EVERY                  # of all bins, most of which still fall
    assert found["numbers"]["risen_for"]["_t100"] == 8
    assert overfit.overfitting(rows[:2 * 15]) == (
        "validation loss has risen for 3 evaluations in bins t<300: the last steps' details are being memorised; best "
        f"was step {overfit.best_step(rows[:2 * 15]):,}")


def test_training_losses_that_run_ahead_of_flat_held_out_ones_are_memorising():
    """The two sets differ in difficulty from the start, which is no sign; what grows is."""
    def ahead(k: int, b: int) -> float:
        return 0.7 * falling(k, b) * (1 if k < 10 else 0.98 ** (k - 9))
    rows = planted(falling, ahead, wander=0.01)
    assert overfit.overfitting(rows) is None                               # nothing rises
    found = overfit.verdict(rows)
    assert (found["verdict"], found["since"]) == ("memorising", 16 * EVERY)     # 0.98^6 is the first below 0.9
    assert found["numbers"]["widened"] == pytest.approx(1 - 0.98 ** 10, abs=0.01)
    assert "run ahead by 18% since the first evaluation" in found["reasons"][0]
    assert overfit.verdict(planted(falling, lambda k, b: 0.7 * falling(k, b)))["verdict"] == "good"
    steep = planted(lambda k, b: 0.3 * 0.97 ** k, lambda k, b: 0.3 * 0.95 ** k, wander=0.01)
    assert overfit.verdict(steep)["verdict"] == "underfit"                 # both learn; one learns more


@pytest.mark.parametrize("bins, words", [
    ({0}, "in bin t<100: the last steps' details are being memorised"),
    ({9}, "in bin t>=900: whole pictures, from their first outlines on, are"),
    ({4, 5}, "in bins 400<=t<600: shapes are"),
    ({0, 8, 9}, "in bins t<100, t>=800: the last steps' details and whole pictures, from"),
    (set(range(10)), "in all bins: the last steps' details and shapes and whole pictures, from")])
def test_the_bins_are_named(bins, words):
    assert words in overfit.overfitting(planted(rising(5, bins, 0.05), falling))


def test_a_run_that_still_falls_is_underfit_and_so_is_one_that_learnt_nothing_or_has_just_begun():
    def steep(k: int, b: int) -> float:
        return 0.3 * 0.97 ** k
    assert overfit.verdict(planted(steep, steep, wander=0.02))["verdict"] == "underfit"
    assert overfit.verdict(planted(lambda k, b: 1.0, lambda k, b: 1.0))["verdict"] == "underfit"
    assert overfit.verdict(planted(falling, falling, evals=1))["verdict"] == "underfit"


def test_losses_that_all_rise_are_no_memorising():
    """A learning rate too high, say: training pictures fare no better."""
    rows = planted(rising(8, set(range(10)), 0.05), rising(8, set(range(10)), 0.05), wander=0.02)
    assert overfit.overfitting(rows) is None and overfit.verdict(rows)["verdict"] != "memorising"


def test_a_rise_that_is_over_is_no_memorising():
    def bump(k: int, b: int) -> float:
        return falling(k, b) * (2 if 5 <= k < 10 else 1)
    rows = planted(bump, falling)
    assert overfit.overfitting(rows[:20]) and overfit.overfitting(rows) is None


def test_the_pose_is_ignored_where_the_ratio_is_small_or_within_its_error():
    rows = planted(falling, falling)
    assert overfit.verdict(rows)["pose"] == "heeded"
    for change in ({"val_ratio": 1.015}, {"val_shuffled_se": 0.01}):
        found = overfit.verdict([*rows[:-1], rows[-1] | change])
        assert found["pose"] == "ignored" and "ignored" in found["reasons"][-1]


def test_a_log_of_older_runs_does_not_tell():
    with pytest.raises(ValueError, match="no evaluation that tells"):
        overfit.verdict([{"step": 9, "val_right": 0.1, "val_ratio": 1.2}])


# ----------------------------------------------------------------------------------------------------- the watch

def test_each_bin_is_held_against_its_own_best_latent_by_latent():
    watch = overfit.Watch(DIFFUSION, torch.zeros(N, 1, 1, 1), torch.zeros(N, 1, 1, 1))
    g = torch.Generator().manual_seed(1)
    losses = torch.rand(6, 2, N, generator=g, dtype=torch.float64)
    for k, (v, u) in enumerate(losses):
        figures = watch.rises(v, u)
        for b in range(10):
            mine = losses[:k + 1, :, BIN == b]
            best = mine[:, 0].mean(1).argmin()
            rise, moved = mine[k, 0] - mine[best, 0], mine[k, 1] - mine[best, 1]
            key, n = f"_t{100 * b:03d}", len(rise)
            assert figures[f"rise{key}"] == pytest.approx(rise.mean().item())
            assert figures[f"rise_se{key}"] == pytest.approx(np.std(rise.numpy(), ddof=1) / n ** 0.5)
            assert figures[f"grown{key}"] == pytest.approx((rise.mean() - moved.mean()).item())
            assert figures[f"grown_se{key}"] == pytest.approx(((rise.var() + moved.var()) / n).sqrt().item())
    again = overfit.Watch(DIFFUSION, torch.zeros(N, 1, 1, 1), torch.zeros(N, 1, 1, 1))
    again.load(watch.best)
    assert again.rises(*losses[3]) == watch.rises(*losses[3])
    other = overfit.Watch(DIFFUSION, torch.zeros(100, 1, 1, 1), torch.zeros(N, 1, 1, 1))
    other.load(watch.best)                                      # of other latents
    assert other.best == {}


def test_few_latents_and_losses_that_are_no_numbers_have_no_say():
    watch = overfit.Watch(DIFFUSION, torch.zeros(30, 1, 1, 1), torch.zeros(30, 1, 1, 1))       # three a bin
    assert set(watch.rises(torch.rand(30), torch.rand(30))) == {"rise", "rise_se", "grown", "grown_se"}
    assert watch.rises(torch.full((30,), math.nan), torch.rand(30)) == {}
    assert all(bool(v["val"].isfinite().all()) for v in watch.best.values())


def test_the_loss_of_each_latent_hangs_on_nothing_but_itself():
    """Not on the batch size; and its mean is that of the definition, at the timesteps that the bins are made of."""
    z, poses = torch.randn(20, 3, 4, 4), torch.rand(20, 17, 3)

    def model(x, t, pose, drop):
        return x * (t / 1000)[:, None, None, None] + pose[:, 0, 0, None, None, None] * ~drop[:, None, None, None]
    t, noise = condition.fixed_noise(DIFFUSION, z)
    a = DIFFUSION.alphas_bar[t].float()[:, None, None, None]
    eps = model(a.sqrt() * z + (1 - a).sqrt() * noise, t, poses, torch.zeros(20, dtype=torch.bool))
    wanted = (eps - noise).square().mean((1, 2, 3))
    for size in 1, 7, 20:
        assert torch.allclose(condition.loss_each(model, DIFFUSION, z, poses, size), wanted.double(), rtol=1e-5)
    assert not torch.allclose(condition.loss_each(model, DIFFUSION, z, poses, null=True), wanted.double(), rtol=1e-2)


# ----------------------------------------------------------------------------------------------------- copies

def test_chance_counts_all_orders():
    n, of = 3, 4
    orders = list(itertools.combinations(range(n + of), n))                 # places of the samples among all
    for below, near in itertools.product(range(of), range(n + 1)):
        hits = 0
        for places in orders:
            others = [i for i in range(n + of) if i not in places]
            hits += sum(place < others[below] for place in places) >= near
        assert overfit.chance_of(near, n, below, of) == pytest.approx(hits / len(orders))


def test_copies_are_nearer_than_the_first_percentile_of_held_out_pictures():
    rng = np.random.default_rng(0)
    held_out = 1 + rng.random(200)
    limit = np.percentile(held_out, 1)
    distances = {overfit.HELD_OUT: held_out.tolist(), "training poses": [0.1] * 5 + [1.5] * 11,
                 "held-out poses": (1 + rng.random(16)).tolist()}
    found_limit, found = overfit.copies(distances)
    assert found_limit == limit and found["training poses"]["copies"] == 5
    assert found["held-out poses"]["copies"] == sum(d < limit for d in distances["held-out poses"])
    told = overfit.verdict(planted(falling, falling), distances)
    assert told["verdict"] == "memorising" and told["since"] is None
    assert "5 of 16 samples under training poses are nearer" in told["reasons"][0]
    distances["training poses"] = (1 + rng.random(16)).tolist()
    assert overfit.verdict(planted(falling, falling), distances)["verdict"] == "good"
    distances["training poses"] = [2.5] * 16                    # samples that look like no picture of the kind
    assert overfit.copies(distances)[1]["training poses"]["far"] == 16
    assert overfit.verdict(planted(falling, falling), distances)["verdict"] == "good"      # half of all are
    distances["held-out poses"][0] = 2.5
    told = overfit.verdict(planted(falling, falling), distances)
    assert told["verdict"] == "underfit" and "of 32 samples lie further from any" in told["reasons"][0]
    copied = distances | {"training poses": [0.1] * 16, "held-out poses": [2.5] * 16}
    assert overfit.verdict(planted(falling, falling), copied)["verdict"] == "memorising"


class Rows:
    """A cache with those latents."""

    def __init__(self, latents: torch.Tensor):
        self.latents = latents

    def __len__(self) -> int:
        return len(self.latents)

    def rows(self, idx):
        return self.latents[torch.as_tensor(np.asarray(idx))], None


def test_the_nearest_training_picture_is_that_of_brute_force(monkeypatch):
    monkeypatch.setattr(evaluate, "CHUNK", 7)                               # the last chunk is not full
    g = torch.Generator().manual_seed(0)
    latents = 3 + 2 * torch.randn(40, 3, 4, 4, generator=g)
    ldm = SimpleNamespace(mean=torch.full((3, 1, 1), 3.0), std=torch.tensor([1.0, 2.0, 4.0])[:, None, None])
    x = (latents - ldm.mean) / ldm.std
    parts = {"a": torch.randn(5, 3, 4, 4, generator=g), "b": x[[11, 39]] + 0.01}
    found = evaluate.nearest(ldm, Rows(latents), parts)
    for name, z in parts.items():
        apart = (z[:, None] - x[None]).square().mean((2, 3, 4)).sqrt()      # [N, 40]
        nearest = apart.min(1).values.numpy()           # its distance, not its row: rounding may decide between equals
        assert np.allclose(found[name].distances, nearest, rtol=1e-5)
        assert np.allclose(apart.numpy()[range(len(z)), found[name].rows], nearest, rtol=1e-5)
    assert found["b"].rows.tolist() == [11, 39]                             # 11 and 39 are mirror images


# ----------------------------------------------------------------------------------------------- in a real run

def make_run(argv: list[str], **changes) -> train.Run:
    run = train.Run(train.replace(train.make_config(train.parse_args(argv)), **changes), fresh=False)
    run.eval_forwards = 6 * 256 + 400
    return run


@pytest.fixture
def as_shipped(monkeypatch):
    """Evaluations as often, and of as many latents, as train.py has them."""
    monkeypatch.undo()                                          # of the fixture micro
    monkeypatch.setitem(train.PRESETS, "micro", PRESETS["micro"])


@pytest.mark.usefixtures("as_shipped")
@pytest.mark.parametrize("steps", [100, 4112, 20_000, 225_000])
def test_evaluations_take_their_share_of_the_time_and_no_more(tmp_path, steps):
    run = make_run(command("ldm", tmp_path / "run", "--steps", str(steps), "--batch-size", "32"))
    due = sum(run.due(step) for step in range(steps))
    share = due * run.eval_forwards / (3 * 32 * steps)
    assert train.EVALS <= due <= train.MOST_EVALS + 1 and run.due(steps - 1)
    if due > train.EVALS + 1:
        assert share < 1.1 * train.EVAL_SHARE
    assert due == {100: 6, 4112: 10, 20_000: 49, 225_000: 100}[steps]
    long = train.eval_latents(run.c)
    assert long == {100: 256, 4112: 256, 20_000: 256, 225_000: 1800}[steps]
    assert train.eval_latents(train.replace(run.c, minutes=1.0, steps=None)) == 256


@pytest.mark.usefixtures("as_shipped")
@pytest.mark.parametrize("minutes, least", [(60, 0.97), (12, 0.97), (4, 0.9), (2, 0.7)])
def test_minutes_leave_room_for_the_evaluations(tmp_path, monkeypatch, minutes, least):
    """Steps of one second: the steps and the evaluations that are made fill the time, but for the reserve."""
    argv = command("ldm", tmp_path / "run", "--minutes", str(minutes), "--batch-size", "32")
    run, now = make_run(argv), [0.0]
    monkeypatch.setattr(train.time, "monotonic", lambda: now[0])
    run.began, run.dir, due = 0.0, tmp_path, 0
    for step in itertools.count():
        now[0] += 1.0
        run.clock(step)
        due += run.due(step)
        if step + 1 == run.c.steps:
            break
    spent = run.c.steps + due * run.eval_forwards / 96
    assert least < spent / (60 * minutes * (1 - train.RESERVE)) <= 1.01 and (due > train.EVALS or minutes < 60)


def test_pictures_a_second_are_those_of_training_alone(trained, tmp_path, monkeypatch):
    """Evaluations that take long, and previews, are not counted; steps that take long are. By a clock of our own: a
    step takes 0.02 s, an evaluation 0.5, a preview 0.3, all else nothing."""
    now = [0.0]
    monkeypatch.setattr(train.time, "monotonic", lambda: now[0])

    def takes(owner, name: str, seconds: float) -> None:
        honest = getattr(owner, name)

        def slow(*args, **values):
            now[0] += seconds
            return honest(*args, **values)
        monkeypatch.setattr(owner, name, slow)
    takes(train, "seed_step", 0.02), takes(condition, "condition_each", 0.5), takes(train, "preview_ldm", 0.3)
    monkeypatch.setattr(train, "LOG_EVERY", 5)
    monkeypatch.setattr(train, "EVALS", 10)
    argv = command("ldm", tmp_path / "run", "--vq", str(trained / "vq/last.pt"), "--steps", "20")
    assert train.main(argv) == 0
    rows = train.read_log(tmp_path / "run/log.jsonl")
    rates = [r["img_s"] for r in rows if "img_s" in r]
    assert [r["step"] for r in rows if "img_s" in r] == [5, 10, 15]             # a full count before each
    assert sum("val_right" in r for r in rows) == 10
    assert rates == pytest.approx([4 / 0.02] * 3)                               # with evaluations below 4 / 0.27


def test_a_run_measures_raw_and_averaged_weights_on_training_and_held_out_latents(trained, tmp_path):
    log = train.read_log(trained / "ldm/log.jsonl")
    rows = overfit.evaluations(log)
    assert [r["step"] for r in rows] == [0, 1, 2, 3]
    for name in "right", "train", "raw", "train_raw":
        bins = [rows[-1][f"val_{name}{key}"] for key in overfit.bin_keys(rows[-1])]
        assert len(bins) == 10 and f"val_{name}" in rows[-1]
    ldm, payload = checkpoint.load_ldm(trained / "ldm/last.pt")
    ours, held_out = data.open_data("figures:12", 32)
    losses = []
    for ds in held_out, ours:
        (x, pose), = data.in_order(ds, 12, 12)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            losses.append(condition.loss_each(ldm, Diffusion(**ldm.schedule), ldm.encode(x), pose).mean().item())
    assert rows[-1]["val_right"] == pytest.approx(losses[0], rel=2e-2)
    assert rows[-1]["val_train"] == pytest.approx(losses[1], rel=2e-2)
    assert abs(losses[0] - losses[1]) > 0.02 * losses[0] or rows[-1]["val_train"] != rows[-1]["val_right"]
    assert rows[-1]["val_raw"] != rows[-1]["val_right"]


def alarm_after(monkeypatch, steps: int) -> None:
    """The rule sees overfitting in every log that has an evaluation after so many steps."""
    def overfitting(rows, row_of=overfit.ROW_OF):
        return "it overfits" if any(r["step"] + 1 >= steps for r in overfit.evaluations(rows)) and row_of < 9 else None
    monkeypatch.setattr(overfit, "overfitting", overfitting)


def test_patience_ends_the_run_and_the_same_command_leaves_it_so(trained, tmp_path, monkeypatch, capsys):
    argv = command("ldm", tmp_path / "run", "--vq", str(trained / "vq/last.pt"), "--steps", "6")
    alarm_after(monkeypatch, 3)
    assert train.main([*argv, "--patience", "2"]) == 0
    out = capsys.readouterr().out
    assert "it overfits" in out and "out of patience at step 3 of 6" in out and "without --patience 2" in out
    last = tmp_path / "run/last.pt"
    assert checkpoint.load(last, "ldm")["step"] == 3 and (tmp_path / "run/best.pt").exists()
    before = last.read_bytes()
    assert train.main([*argv, "--patience", "2"]) == 0
    assert "out of patience at step 3: it overfits" in capsys.readouterr().out and last.read_bytes() == before
    assert train.main([*argv, "--patience", "9"]) == 0                         # more of it, or none: on to the end
    monkeypatch.undo()
    as_micro(monkeypatch)
    whole = command("ldm", tmp_path / "whole", "--vq", str(trained / "vq/last.pt"), "--steps", "6")
    assert train.main(whole) == 0
    one, other = (checkpoint.load(tmp_path / run / "last.pt", "ldm") for run in ("run", "whole"))
    for found in one, other:
        found["config"]["patience"] = None
    same(one, other)
    assert train.read_log(tmp_path / "run/log.jsonl") == train.read_log(tmp_path / "whole/log.jsonl")


def test_without_patience_a_run_says_so_and_goes_on(trained, tmp_path, monkeypatch, capsys):
    alarm_after(monkeypatch, 3)
    argv = command("ldm", tmp_path / "run", "--vq", str(trained / "vq/last.pt"), "--steps", "6")
    assert train.main(argv) == 0
    assert capsys.readouterr().out.count("it overfits") >= 1
    assert checkpoint.load(tmp_path / "run/last.pt", "ldm")["step"] == 6


def test_patience_is_of_stage_two_and_positive(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.main(command("vq", tmp_path / "run", "--patience", "3"))
    assert "--patience is of stage 2" in capsys.readouterr().err
    one_sentence(capsys, train.main(command("ldm", tmp_path / "run", "--patience", "0")), "--patience is 0")


WORKER = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import torch
torch.set_num_threads(1)
import pytest, train, test_train
from metrics import overfit
test_train.as_micro(pytest.MonkeyPatch())
overfit.overfitting = lambda rows, row_of=3: "it overfits" if rows[-1]["step"] >= 2 else None
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_of_two_processes_both_run_out_of_patience(trained, tmp_path):
    """Rank 0 alone evaluates; the other must not wait for it in the next step."""
    argv = command("ldm", tmp_path / "run", "--vq", str(trained / "vq/last.pt"), "--steps", "6", "--patience", "1")
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    known = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    ranks = [subprocess.Popen([sys.executable, "-c", WORKER, *argv], text=True, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, env=known | {"RANK": str(r), "LOCAL_RANK": str(r)})
             for r in range(2)]
    try:
        said = [p.communicate(timeout=600) for p in ranks]
    finally:
        for p in ranks:
            p.kill()
    assert [p.returncode for p in ranks] == [0, 0], said
    assert "out of patience at step 3 of 6" in said[0][0]


# ------------------------------------------------------------------------------------------------- the pictures

def drawn_panels(monkeypatch, run: train.Run, panels: train.Panels) -> dict:
    """title: its axes, of the figure that plot_curves makes."""
    import matplotlib.pyplot as plt
    kept, close = [], plt.close
    monkeypatch.setattr(plt, "close", lambda fig: kept.append(fig))
    PLOT_CURVES(run, panels)
    monkeypatch.setattr(plt, "close", close)
    found = {ax.get_title(): ax for ax in kept[0].axes if ax.get_title()}
    close(kept[0])
    return found


@pytest.mark.parametrize("rows", [1, 2, 40])
def test_the_dashboard_has_every_figure_of_few_points_and_of_many(tmp_path, monkeypatch, rows):
    run = SimpleNamespace(dir=tmp_path, log_path=tmp_path / "log.jsonl", said="it learns")
    log = planted(rising(5, {0}), falling)[:rows]
    log = [r | {"lr": 1e-4, "grad_norm": 1.0, "img_s": 30.0 + i} if "loss" in r else r for i, r in enumerate(log)]
    run.log_path.write_text("".join(json.dumps(r) + "\n" for r in log))
    panels = drawn_panels(monkeypatch, run, train.LDM_PANELS)
    assert set(panels) == set(train.LDM_PANELS)
    line = panels["pictures a second, training alone"].lines[0]
    assert line.get_ydata().tolist() == [r["img_s"] for r in log if "img_s" in r]
    assert line.get_xdata().tolist() == [r["step"] + 1 for r in log if "img_s" in r]
    maps = [panels[title].collections for title in panels if "timestep" in title]
    evals = [r for r in log if "val_right" in r]
    assert [len(found) for found in maps] == [bool(evals)] * 2
    if evals:
        risen = np.array([[overfit.risen(r)[key] for r in evals] for key in overfit.bin_keys(evals[0])])
        assert np.allclose(maps[1][0].get_array().reshape(risen.shape), 100 * risen)
        dots = sum(len(line.get_xdata()) for line in panels["by timestep: held-out above its best, EMA"].lines)
        assert dots == sum(overfit.has_risen(r, key) for r in evals for key in overfit.bin_keys(r))
    assert Image.open(tmp_path / "curves.png").width > 1000


def test_overfit_says_and_draws_what_it_found(trained, tmp_path, capsys):
    argv = ["overfit", "--run", str(trained / "ldm"), "--out", str(tmp_path), "-n", "2", "--steps", "2"]
    before = sorted(p.name for p in (trained / "ldm").iterdir())
    assert evaluate.main(argv) == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "overfit.json").read_text())
    assert found["verdict"].upper() in out and all(reason in out for reason in found["reasons"])
    assert [len(found["samples"][name]) for name in ("training poses", "held-out poses")] == [2, 2]
    assert sorted(p.name for p in (trained / "ldm").iterdir()) == before        # the cache is used, not made again
    assert Image.open(tmp_path / "overfit.png").height > 1000


def test_overfit_does_not_judge_by_pictures_that_were_not_trained_on(trained, tmp_path, monkeypatch, capsys):
    before = sorted((trained / "ldm").iterdir())
    monkeypatch.setattr(data, "FIGURES_VERSION", "of people drawn in another way")
    argv = ["overfit", "--run", str(trained / "ldm"), "--out", str(tmp_path), "-n", "2", "--steps", "2"]
    one_sentence(capsys, evaluate.main(argv), "figures:12", f"are not those that {trained / 'ldm'} was trained on")
    assert sorted((trained / "ldm").iterdir()) == before                        # nor is a cache made of them


def test_overfit_finds_a_planted_copy_and_its_mirror_image(trained, tmp_path, monkeypatch):
    """Samples are replaced by training latents, as a network would give that has learnt them by heart."""
    def copying(ldm, poses, size, args):
        cache, = (Path(args.run).glob("latents-*.h.f16"))
        h = np.fromfile(cache, np.float16).reshape(-1, 3, 8, 8).astype(np.float32)
        return ((torch.from_numpy(h[[5, 8]]) - ldm.mean) / ldm.std) + 0.001
    monkeypatch.setattr(evaluate, "draw_latents", copying)
    assert evaluate.main(["overfit", "--run", str(trained / "ldm"), "--out", str(tmp_path), "-n", "2"]) == 0
    found = json.loads((tmp_path / "overfit.json").read_text())
    for name in "training poses", "held-out poses":
        assert [(s["nearest"], s["mirrored"]) for s in found["samples"][name]] == [(2, True), (4, False)]
        assert all(s["distance"] < 0.01 for s in found["samples"][name])
        assert found["numbers"]["copies"][name]["copies"] == 2


@pytest.mark.parametrize("flags, words", [(["--run", "nowhere"], "nowhere"), (["-n", "0"], "-n is 0"),
                                          (["--eta", "7"], "--eta 7")])
def test_mistakes_are_one_sentence(trained, capsys, flags, words):
    argv = ["overfit", "--run", str(trained / "ldm"), *flags]
    assert evaluate.main(argv) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and "Traceback" not in error and error.count("\n") == 0


def test_overfit_wants_a_run_of_stage_two_with_its_log(trained, tmp_path, capsys):
    assert evaluate.main(["overfit", "--run", str(trained / "vq")]) == 2
    assert "stage" in capsys.readouterr().err
    (tmp_path / "last.pt").write_bytes((trained / "ldm/last.pt").read_bytes())
    assert evaluate.main(["overfit", "--run", str(tmp_path)]) == 2
    assert "no log.jsonl" in capsys.readouterr().err
