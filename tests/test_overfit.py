# ruff: noqa: F811    (pytest hands fixtures in by the names under which they are imported)
"""The measure of overfitting: losses, copies and runs whose truth was planted."""
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_train import (  # noqa: F401
    as_micro,
    command,
    micro,
    one_sentence,
    same,
    trained,
    untimed,
)

import checkpoint
import data
import engine.run
import evaluate
import plots
import train
from diffusion import Diffusion
from engine.run import read_log
from metrics import condition, overfit

N, EVALS, EVERY = 256, 20, 1000             # latents, evaluations of a run, steps between them
DIFFUSION, LATENTS = Diffusion(), torch.zeros(N, 1, 1, 1)
PLOT_CURVES = plots.plot_curves             # which the fixture micro replaces
BIN = condition.fixed_noise(DIFFUSION, LATENTS)[0] * 10 // 1000         # of each latent


def planted(val, train, wander: float = 0.0, evals: int = EVALS) -> list[dict]:
    """The log of a run in which the mean loss at evaluation k in bin b is val(k, b), train(k, b).

    Each latent has a difficulty of its own; its loss wanders around it by that share.
    """
    g = torch.Generator().manual_seed(0)
    watch = overfit.OverfitMonitor(DIFFUSION, [LATENTS], [LATENTS])
    hard = [0.5 + torch.rand(N, generator=g, dtype=torch.float64) for _ in range(2)]
    rows = []
    for k in range(evals):
        v, u = (torch.tensor([curve(k, int(b)) for b in BIN], dtype=torch.float64) * h
                * (1 + wander * torch.randn(N, generator=g, dtype=torch.float64))
                for curve, h in zip((val, train), hard, strict=True))
        means = condition.condition_means({"right": v, "shuffled": 1.3 * v, "null": 1.1 * v})
        figures = (means | {"shuffled_se": 0.001} | watch.means("right", v, 0)
                   | watch.means("train", u, 1) | watch.rises(v, u))
        figures = {f"val_{name}": value for name, value in figures.items()}
        last = EVERY * (k + 1) - 1
        rows += [{"step": last - 19, "loss": 0.1}, {"step": last} | figures]
    return rows


def falling(k: int, b: int) -> float:
    """Levels off at 0.05."""
    return 0.05 + 0.2 * math.exp(-k / 3)


def steep(k: int, b: int) -> float:
    return 0.3 * 0.97 ** k


def rising(after: int, bins: set[int], by: float = 0.02):
    """As `falling`, but after so many evaluations up by that share at each, in those bins."""
    return lambda k, b: (falling(min(k, after), b) * (1 + by * (k - after))
                         if b in bins and k > after else falling(k, b))


# -------------------------------------------------------------------------------------- the verdict

def test_a_run_that_levels_off_is_good():
    rows = planted(falling, falling, wander=0.02)
    found = overfit.verdict(rows)
    assert (found["verdict"], found["since"], found["pose"]) == ("good", None, "followed")
    assert overfit.overfitting(rows) is None
    last, then = (rows[2 * k + 1]["val_right"] for k in (19, 14))      # evaluations 20 and 15
    assert found["numbers"]["loss"] == last
    assert found["numbers"]["fell"] == pytest.approx(1 - last / then)
    fell = overfit.verdict(rows[:2 * 18])["numbers"]["fell"]      # 13,500 lies between two
    middle = (rows[2 * 12 + 1]["val_right"] + rows[2 * 13 + 1]["val_right"]) / 2
    assert fell == pytest.approx(1 - rows[2 * 17 + 1]["val_right"] / middle, abs=1e-6)


def test_a_rise_in_three_bins_is_found_at_its_third_evaluation_and_said_plainly():
    """In bins t<300 after the 12th evaluation, by 2 % each time, while training losses fall."""
    rows = planted(rising(11, {0, 1, 2}), lambda k, b: falling(k, b) * 0.99 ** k, wander=0.01)
    alarms = [overfit.overfitting(rows[:2 * k]) is not None for k in range(1, EVALS + 1)]
    assert alarms == [False] * 14 + [True] * 6
    found = overfit.verdict(rows)
    assert found["verdict"] == "memorising" and found["numbers"]["risen_for"]["_t100"] == 8
    assert found["since"] == 13 * EVERY                     # right after the best of these bins
    best = min(range(EVALS), key=lambda k: rows[2 * k + 1]["val_right"])
    assert found["best"] == (best + 1) * EVERY              # of all bins, most of which still fall
    said = overfit.overfitting(rows[:2 * 15])
    assert "risen for 3 evaluations in the bins from t = 0, 100, 200: the model is memorising" in said
    assert f"The best step was {overfit.best_step(rows[:2 * 15]):,}." in said


def test_training_losses_that_run_ahead_of_flat_held_out_ones_are_memorising():
    """The two sets differ in difficulty from the start, which is no sign; the gap grows."""
    def ahead(k: int, b: int) -> float:
        return 0.7 * falling(k, b) * (1 if k < 10 else 0.98 ** (k - 9))
    rows = planted(falling, ahead, wander=0.01)
    assert overfit.overfitting(rows) is None                            # nothing rises
    found = overfit.verdict(rows)
    assert (found["verdict"], found["since"]) == ("memorising", 16 * EVERY)     # 0.98^6 < 0.9
    assert found["numbers"]["widened"] == pytest.approx(1 - 0.98 ** 10, abs=0.01)
    assert overfit.verdict(planted(falling, lambda k, b: 0.7 * falling(k, b)))["verdict"] == "good"
    both = planted(steep, lambda k, b: 0.3 * 0.95 ** k, wander=0.01)    # both learn, one more
    assert overfit.verdict(both)["verdict"] == "underfit"


@pytest.mark.parametrize("val, evals", [(steep, EVALS), (lambda k, b: 1.0, EVALS), (falling, 1)])
def test_a_run_that_falls_or_has_learnt_nothing_or_has_just_begun_is_underfit(val, evals):
    assert overfit.verdict(planted(val, val, evals=evals))["verdict"] == "underfit"


def test_losses_that_all_rise_and_a_rise_that_is_over_are_no_memorising():
    """A learning rate too high, say: training images fare no better."""
    every = rising(8, set(range(10)), 0.05)
    rows = planted(every, every, wander=0.02)
    assert overfit.overfitting(rows) is None and overfit.verdict(rows)["verdict"] != "memorising"
    rows = planted(lambda k, b: falling(k, b) * (2 if 5 <= k < 10 else 1), falling)
    assert overfit.overfitting(rows[:20]) and overfit.overfitting(rows) is None


def test_the_pose_is_ignored_where_the_ratio_is_small_and_unclear_within_its_error():
    rows = planted(falling, falling)
    assert overfit.verdict(rows)["pose"] == "followed"
    for change, pose in (({"val_ratio": 1.015}, "ignored"), ({"val_shuffled_se": 0.01}, "unclear")):
        found = overfit.verdict([*rows[:-1], rows[-1] | change])
        assert found["pose"] == pose and overfit.POSE[pose] in overfit.headline(found)


def test_a_verdict_is_valid_json_and_needs_an_evaluation():
    found = overfit.verdict(planted(falling, falling)) | {"more": [math.nan, {"deep": math.inf}]}
    json.dumps(evaluate.without_nan(found), allow_nan=False)
    with pytest.raises(ValueError, match="no evaluation"):
        overfit.verdict([{"step": 9, "loss": 0.1}])


# -------------------------------------------------------------------------------------- the monitor

def test_each_bin_is_compared_with_its_own_best_latent_by_latent():
    watch = overfit.OverfitMonitor(DIFFUSION, [LATENTS], [LATENTS])
    g = torch.Generator().manual_seed(1)
    losses = torch.rand(6, 2, N, generator=g, dtype=torch.float64)
    for k, (v, u) in enumerate(losses):
        figures = watch.rises(v, u)
        for b in range(10):
            mine = losses[:k + 1, :, BIN == b]
            best = mine[:, 0].mean(1).argmin()
            rise, moved = mine[k, 0] - mine[best, 0], mine[k, 1] - mine[best, 1]
            n = len(rise)
            wanted = {"rise": rise.mean(), "rise_se": np.std(rise.numpy(), ddof=1) / n ** 0.5,
                      "grown": rise.mean() - moved.mean(),
                      "grown_se": ((rise.var() + moved.var()) / n).sqrt()}
            for name, value in wanted.items():
                assert figures[f"{name}_t{100 * b:03d}"] == pytest.approx(float(value))
    again = overfit.OverfitMonitor(DIFFUSION, [LATENTS], [LATENTS])
    again.load_state_dict(watch.state_dict())
    assert again.rises(*losses[3]) == watch.rises(*losses[3])
    other = overfit.OverfitMonitor(DIFFUSION, [LATENTS[:100]], [LATENTS])
    other.load_state_dict(watch.state_dict())                           # of other latents
    assert other.best == {}


def test_few_latents_and_losses_that_are_not_finite_do_not_count():
    watch = overfit.OverfitMonitor(DIFFUSION, [LATENTS[:30]], [LATENTS[:30]])        # three a bin
    found = watch.rises(torch.rand(30), torch.rand(30))
    assert set(found) == {"rise", "rise_se", "grown", "grown_se"}
    assert watch.rises(torch.full((30,), math.nan), torch.rand(30)) == {}
    assert all(bool(v["val"].isfinite().all()) for v in watch.best.values())


def test_the_loss_of_each_latent_depends_on_nothing_but_itself():
    """Not on the batch size; and it is that of the definition."""
    z, poses = torch.randn(20, 3, 4, 4), torch.rand(20, 17, 3)

    def model(x, t, pose, drop):
        seen = pose[:, 0, 0, None, None, None] * ~drop[:, None, None, None]
        return x * (t / 1000)[:, None, None, None] + seen
    t, noise = condition.fixed_noise(DIFFUSION, z)
    a = DIFFUSION.alphas_bar[t].float()[:, None, None, None]
    eps = model(a.sqrt() * z + (1 - a).sqrt() * noise, t, poses, torch.zeros(20, dtype=torch.bool))
    wanted = (eps - noise).square().mean((1, 2, 3)).double()
    for size in 1, 7, 20:
        found = condition.loss_each(model, DIFFUSION, z, poses, size)
        assert torch.allclose(found, wanted, rtol=1e-5)
    null = condition.loss_each(model, DIFFUSION, z, poses, null=True)
    assert not torch.allclose(null, wanted, rtol=1e-2)


# ------------------------------------------------------------------------------------------- copies

def test_chance_counts_all_orders():
    n, of = 3, 4
    orders = list(itertools.combinations(range(n + of), n))     # places of the samples among all
    for below, near in itertools.product(range(of), range(n + 1)):
        hits = 0
        for places in orders:
            others = [i for i in range(n + of) if i not in places]
            hits += sum(place < others[below] for place in places) >= near
        assert overfit.chance_of(near, n, below, of) == pytest.approx(hits / len(orders))


def test_copies_are_nearer_than_the_first_percentile_of_held_out_images():
    rng = np.random.default_rng(0)
    held_out = 1 + rng.random(200)
    near, far, usual = [0.1] * 16, [2.5] * 16, (1 + rng.random(16)).tolist()

    def judge(ours: list[float], others: list[float]) -> dict:
        return overfit.verdict(planted(falling, falling), {
            overfit.HELD_OUT: held_out.tolist(), "training poses": ours, "held-out poses": others})
    told = judge(near[:5] + [1.5] * 11, usual)
    assert (told["verdict"], told["since"]) == ("memorising", None)
    limit, copies = told["numbers"]["limit"], told["numbers"]["copies"]
    assert limit == np.percentile(held_out, 1) and copies["training poses"]["copies"] == 5
    assert copies["held-out poses"]["copies"] == sum(d < limit for d in usual)
    assert "5 of 16 samples of training poses are nearer" in told["reasons"][0]
    assert judge(usual, usual)["verdict"] == "good"
    told = judge(far, usual)                                    # half look like no such image
    assert told["verdict"] == "good" and told["numbers"]["copies"]["training poses"]["far"] == 16
    assert judge(far, [*usual[1:], 2.5])["verdict"] == "underfit"
    assert judge(near, far)["verdict"] == "memorising"


def test_the_nearest_training_image_is_that_of_brute_force():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, 4, 4, generator=g)
    parts = {"a": torch.randn(5, 3, 4, 4, generator=g), "b": x[[11, 39]] + 0.01}
    found = overfit.nearest(parts, lambda rows: x[rows], 40, chunk=7)   # the last is not full
    for name, z in parts.items():
        apart = (z[:, None] - x[None]).square().mean((2, 3, 4)).sqrt().numpy()      # [N, 40]
        assert np.allclose(found[name].distances, apart.min(1), rtol=1e-5)
        assert np.allclose(apart[range(len(z)), found[name].rows], apart.min(1), rtol=1e-5)
    assert found["b"].rows.tolist() == [11, 39]


# ------------------------------------------------------------------------------------ in a real run

def run_of(trained: Path, out: Path, *flags: str) -> list[str]:
    return command("ldm", out, "--vq", str(trained / "vq/last.pt"), "--steps", "6", *flags)


def test_images_a_second_are_those_of_training_alone(trained, tmp_path, monkeypatch):
    """By a clock of our own: a step takes 0.02 s, an evaluation 0.5, all else nothing."""
    now = [0.0]
    monkeypatch.setattr(train.time, "monotonic", lambda: now[0])

    def takes(owner, name: str, seconds: float) -> None:
        honest = getattr(owner, name)

        def slow(*args, **values):
            now[0] += seconds
            return honest(*args, **values)
        monkeypatch.setattr(owner, name, slow)
    takes(train, "seed_everything", 0.02), takes(overfit, "condition_each", 0.5)
    monkeypatch.setattr(engine.run, "LOG_EVERY", 5)
    argv = run_of(trained, tmp_path / "run", "--steps", "20", "--eval-every", "12")
    assert train.main(argv) == 0
    rows = read_log(tmp_path / "run/log.jsonl")
    rates = {r["step"]: r["img_s"] for r in rows if "img_s" in r}
    assert rates == pytest.approx({5: 4 / 0.02, 10: 4 / 0.02, 19: 4 / 0.02})    # 15 follows on 11
    assert [r["eval_s"] for r in rows if "eval_s" in r] == pytest.approx([0.5, 0.5])


def test_a_run_measures_raw_and_averaged_weights_on_training_and_held_out_latents(trained):
    rows = overfit.evaluations(read_log(trained / "ldm/log.jsonl"))
    assert [r["step"] for r in rows] == [0, 1, 2, 3]
    for name in "right", "train", "raw", "train_raw":
        bins = [rows[-1][f"val_{name}{key}"] for key in overfit.bin_keys(rows[-1])]
        assert len(bins) == 10 and f"val_{name}" in rows[-1]
    ldm, _ = checkpoint.load_ldm(trained / "ldm/last.pt")
    ours, held_out = data.open_data("figures:12", 32)
    for ds, name in (held_out, "right"), (ours, "train"):
        (x, pose, _), = data.in_order(data.spread(ds, 12), 12)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            losses = condition.loss_each(ldm, Diffusion(**ldm.schedule), ldm.encode(x), pose)
        assert rows[-1][f"val_{name}"] == pytest.approx(losses.mean().item(), rel=2e-2)
    assert rows[-1]["val_raw"] != rows[-1]["val_right"] != rows[-1]["val_train"]


def alarm_after(monkeypatch, steps: int) -> None:
    """The rule sees overfitting in every log that has an evaluation after so many steps."""
    def overfitting(rows, row_of=overfit.ROW_OF):
        late = any(r["step"] + 1 >= steps for r in overfit.evaluations(rows))
        return "it overfits" if late and row_of < 9 else None
    monkeypatch.setattr(train, "overfitting", overfitting)


def test_patience_ends_the_run_and_the_same_command_leaves_it_so(
        trained, tmp_path, monkeypatch, capsys):
    argv, last = run_of(trained, tmp_path / "run"), tmp_path / "run/last.pt"
    alarm_after(monkeypatch, 3)
    assert train.main([*argv, "--patience", "2"]) == 0
    out = capsys.readouterr().out
    assert "it overfits" in out and "out of patience at step 3 of 6" in out
    assert "without --patience 2" in out and (tmp_path / "run/best.pt").exists()
    before = last.read_bytes()
    assert train.main([*argv, "--patience", "2"]) == 0 and last.read_bytes() == before
    assert "out of patience at step 3 of 6: it overfits" in capsys.readouterr().out
    assert train.main([*argv, "--patience", "9"]) == 0          # more of it, or none: on to the end
    monkeypatch.undo()
    as_micro(monkeypatch)
    assert train.main(run_of(trained, tmp_path / "whole")) == 0
    found = [checkpoint.load(tmp_path / run / "last.pt", "ldm") for run in ("run", "whole")]
    for payload in found:
        payload["config"]["patience"] = None
    same(*found)
    assert untimed(tmp_path / "run/log.jsonl") == untimed(tmp_path / "whole/log.jsonl")


def test_without_patience_a_run_says_so_and_goes_on(trained, tmp_path, monkeypatch, capsys):
    alarm_after(monkeypatch, 1)
    assert train.main(run_of(trained, tmp_path / "run", "--steps", "2")) == 0
    assert "it overfits" in capsys.readouterr().out
    assert checkpoint.load(tmp_path / "run/last.pt", "ldm")["step"] == 2


# ----------------------------------------------------------------------------- curves, evaluate.py

@pytest.mark.parametrize("rows", [1, 40])
def test_the_curves_have_every_figure_of_few_points_and_of_many(tmp_path, monkeypatch, rows):
    import matplotlib.figure
    kept = []

    class Figure(matplotlib.figure.Figure):
        def savefig(self, *args, **how):
            kept.append(self)
            super().savefig(*args, **how)
    log = [r | {"lr": 1e-4, "grad_norm": 1.0, "img_s": 30.0 + i} if "loss" in r else r
           for i, r in enumerate(planted(rising(5, {0}), falling)[:rows])]
    panels = plots.LDM_PANELS | plots.SHARED_PANELS
    monkeypatch.setattr(matplotlib.figure, "Figure", Figure)
    PLOT_CURVES(tmp_path / "curves.png", log, panels, "it learns")
    axes = {ax.get_title(): ax for ax in kept[0].axes if ax.get_title()}
    assert set(axes) == set(panels) and Image.open(tmp_path / "curves.png").width > 1000
    line = axes["images a second, training alone"].lines[0]
    assert line.get_ydata().tolist() == [r["img_s"] for r in log if "img_s" in r]
    assert line.get_xdata().tolist() == [r["step"] + 1 for r in log if "img_s" in r]
    maps = [axes[title].collections for title in axes if "timestep" in title]
    evals = [r for r in log if "val_right" in r]
    assert [len(found) for found in maps] == [bool(evals)] * 2
    if evals:
        keys = overfit.bin_keys(evals[0])
        risen = np.array([[overfit.risen(r)[key] for r in evals] for key in keys])
        assert np.allclose(maps[1][0].get_array().reshape(risen.shape), 100 * risen)
        dots = axes["by timestep: held-out above its best, EMA"].lines
        marked = sum(overfit.has_risen(r, key) for r in evals for key in keys)
        assert sum(len(line.get_xdata()) for line in dots) == marked


def overfit_of(trained: Path, out: Path, *flags: str) -> list[str]:
    return ["overfit", "--run", str(trained / "ldm"), "--out", str(out), "-n", "2", "--steps", "2",
            *flags]


def test_overfit_says_and_draws_what_it_found(trained, tmp_path, monkeypatch, capsys):
    before = sorted(p.name for p in (trained / "ldm").iterdir())
    assert evaluate.main(overfit_of(trained, tmp_path)) == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "overfit.json").read_text())
    assert found["verdict"].upper() in out and all(reason in out for reason in found["reasons"])
    assert [len(found["samples"][f"{kind} poses"]) for kind in ("training", "held-out")] == [2, 2]
    assert Image.open(tmp_path / "overfit.png").height > 1000
    monkeypatch.setattr(data, "FIGURES_VERSION", "of people drawn in another way")
    one_sentence(capsys, evaluate.main(overfit_of(trained, tmp_path)), "figures:12",
                 f"are not those that {trained / 'ldm'} was trained on")
    assert sorted(p.name for p in (trained / "ldm").iterdir()) == before    # one cache serves all


def test_overfit_finds_a_planted_copy_and_its_mirror_image(trained, tmp_path, monkeypatch):
    """Samples are replaced by training latents, as from a network that has memorised them."""
    def copying(ldm, poses, labels, size, args):
        cache, = (Path(args.run).glob("latents-*.h.f16"))
        h = np.fromfile(cache, np.float16).reshape(-1, 3, 8, 8).astype(np.float32)
        return ((torch.from_numpy(h[[5, 8]]) - ldm.mean) / ldm.std) + 0.001
    monkeypatch.setattr(evaluate, "draw_latents", copying)
    assert evaluate.main(overfit_of(trained, tmp_path)) == 0
    found = json.loads((tmp_path / "overfit.json").read_text())
    for name in "training poses", "held-out poses":
        samples = found["samples"][name]
        assert [(s["nearest"], s["mirrored"]) for s in samples] == [(2, True), (4, False)]
        assert all(s["distance"] < 0.01 for s in samples)
        assert found["numbers"]["copies"][name]["copies"] == 2


def test_overfit_wants_a_run_of_stage_two_with_its_log(trained, tmp_path, capsys):
    (tmp_path / "last.pt").write_bytes((trained / "ldm/last.pt").read_bytes())
    for flags, words in ((["--run", "nowhere"], "nowhere"),
                         (["--run", str(trained / "vq")], "stage"),
                         (["--run", str(tmp_path)], "the log has no evaluation")):
        one_sentence(capsys, evaluate.main(overfit_of(trained, tmp_path, *flags)), words)
