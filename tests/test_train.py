"""train.py, checkpoint.py, sample.py and evaluate.py: exact resume, honest files, plain errors."""
import functools
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import folder

import checkpoint
import data
import engine.run
import evaluate
import extras.density
import formats.lpips
import metrics.condition
import metrics.images
import plots
import sample
import train
from dataset import latents
from dataset.figures import Figures
from diffusion import Diffusion
from engine import length
from engine.gpu import make_scaler
from engine.muon import MUON_RMS, NS_COEFFICIENTS, NS_STEPS, Muon, orthogonalised
from engine.run import RunDir, read_log
from extras.plan import read_poses
from keypoints import ConditionConfig, PoseCondition
from ldm import LDM
from metrics.lpips import LPIPS
from vq import VQConfig, VQLossConfig, VQModel

ROOT = Path(__file__).parent.parent
RECIPE = train.Recipe(4, 1e-3, steps=4, lr_final=0.1, warmup=2, quantize_start=0.2, eval_images=12)
MICRO = train.Preset(
    32, VQConfig(ch=8, ch_mult=(1, 1, 2), num_res_blocks=1, n_embed=32, resolution=32,
                 **train.NORM_FREE),
    {"model_channels": 32, "channel_mult": (1,), "attention_resolutions": (1,), "num_heads": 2,
     "num_res_blocks": 1},
    ConditionConfig(("tokens", "maps"), 16), vq=RECIPE, ldm=RECIPE)
PLAIN = VQConfig(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, n_embed=32, resolution=32, dropout=0.1)
GAN = VQLossConfig(disc_weight=1.0, disc_start=2, disc_ramp=2)
PRESETS = {
    "micro": MICRO,
    "micro_plain": train.replace(MICRO, vq_config=PLAIN),   # as published: norms, gradient codebook
    "micro_gan": train.replace(MICRO, vq=train.replace(RECIPE, loss=GAN)),
    "micro_toy": train.replace(                             # what only the toy preset uses
        MICRO, vq_config=train.replace(MICRO.vq_config, shortcut=True),
        ldm=train.replace(RECIPE, muon=2.5), schedule=train.SCHEDULE | {"prediction": "v"})}


def as_micro(patch: pytest.MonkeyPatch) -> None:
    """The presets of the tests, previews of two images, no curves; also for other processes."""
    for name, preset in PRESETS.items():
        patch.setitem(train.PRESETS, name, preset)
    patch.setattr(train, "PREVIEWS", 2)
    patch.setattr(train, "PREVIEW_STEPS", 2)
    patch.setattr(plots, "plot_curves", lambda *args: None)


@pytest.fixture(autouse=True)
def micro(monkeypatch):
    as_micro(monkeypatch)


def command(stage: str, out: Path, *flags: str, preset: str = "micro") -> list[str]:
    """Evaluates six times unless `flags` say otherwise. Stage 1 ignores --vq."""
    if stage == "vq" and "--vq" in flags:
        at = flags.index("--vq")
        flags = flags[:at] + flags[at + 2:]
    steps = int(flags[flags.index("--steps") + 1]) if "--steps" in flags else RECIPE.steps
    return ["--stage", stage, "--preset", preset, "--data", "figures:12", "--out", str(out),
            "--device", "cpu", "--eval-every", str(max(1, steps // 6)), *flags]


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Read-only: a folder with vq/last.pt and ldm/last.pt of the micro preset, with curves."""
    return train_micro(tmp_path_factory.getbasetemp() / "trained")


@functools.cache                        # pytest makes a fixture anew in each module that imports it
def train_micro(root: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train.PRESETS, "micro", MICRO)
        patch.setattr(train, "PREVIEW_STEPS", 2)
        assert train.main(command("vq", root / "vq", "--steps", "4")) == 0
        vq = ["--vq", str(root / "vq/last.pt")]
        assert train.main(command("ldm", root / "ldm", "--steps", "4", *vq)) == 0
    return root


def same(a: object, b: object, where: str = "") -> None:
    """Bit for bit, whatever is nested in what."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            if key != "out":
                same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), f"{where} differs by {(a.double() - b.double()).abs().max()}"
    else:
        assert a == b, f"{where}: {a} and {b}"


def untimed(log: Path) -> list[dict]:
    """The rows of a log without what depends on the machine's speed."""
    return [{k: v for k, v in row.items() if k not in ("img_s", "eval_s")} for row in read_log(log)]


class Killed(Exception):
    """Stands for kill -9: nothing of the process survives it."""


def die_after(patch: pytest.MonkeyPatch, step: int) -> None:
    """The run is killed right after it has saved the checkpoint of this step."""
    save = RunDir.save

    def save_then_die(run, k, *args):
        save(run, k, *args)
        if k + 1 == step and not run.dry:
            raise Killed
    patch.setattr(RunDir, "save", save_then_die)


def one_sentence(capsys, code: int, *words: str) -> None:
    captured = capsys.readouterr()
    assert code == 2 and "Traceback" not in captured.err
    message = captured.err.strip().splitlines()
    assert len(message) == 1, captured.err
    for word in words:
        assert word in message[0], message[0]


# ------------------------------------------------------------------------------------ exact resume

@pytest.mark.parametrize("stage, preset", [
    ("vq", "micro"), ("vq", "micro_plain"), ("vq", "micro_gan"), ("ldm", "micro"),
    ("ldm", "micro_toy")])
def test_six_steps_equal_three_and_resume_and_three(trained, tmp_path, monkeypatch, stage, preset):
    flags = ["--steps", "6", "--eval-every", "3", "--vq", str(trained / "vq/last.pt")]
    assert train.main(command(stage, tmp_path / "whole", *flags, preset=preset)) == 0
    with monkeypatch.context() as m:
        die_after(m, 3)
        with pytest.raises(Killed):
            train.main(command(stage, tmp_path / "cut", *flags, preset=preset))
    torch.manual_seed(99)                               # a new process has another generator
    cut = checkpoint.load(tmp_path / "cut/last.pt", stage)
    assert cut["step"] == 3
    assert stage == "ldm" or (cut["train"]["usage"] != 1).any()     # what a wrong resume would lose
    assert ("disc_optimizer" in cut["train"]) == (preset == "micro_gan")
    muon = any("average" in state for state in cut["train"]["optimizer"]["state"].values())
    assert muon == (stage == "ldm" and preset == "micro_toy")
    assert train.main(command(stage, tmp_path / "cut", *flags, preset=preset)) == 0
    same(*(checkpoint.load(tmp_path / run / "last.pt", stage) for run in ("whole", "cut")))
    logs = [untimed(tmp_path / run / "log.jsonl") for run in ("whole", "cut")]
    assert logs[0] == logs[1]
    assert [r["step"] for r in logs[0] if "val_psnr" in r or "val_right" in r] == [2, 5]
    images = sorted(p.name for p in (tmp_path / "cut/samples").iterdir())
    assert images == ["0000003.png", "0000006.png"]


def test_ctrl_c_finishes_the_step_saves_and_says_how_to_resume(tmp_path, monkeypatch, capsys):
    seed_everything = train.seed_everything

    def press_ctrl_c(seed: int, step: int) -> None:
        seed_everything(seed, step)
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)
    flags = command("vq", tmp_path / "cut", "--steps", "6", "--eval-every", "6")
    with monkeypatch.context() as m:
        m.setattr(train, "seed_everything", press_ctrl_c)
        assert train.main(flags) == train.INTERRUPTED
    assert "stopped at step 2 of 6; rerun the same command" in capsys.readouterr().out
    assert train.main(flags) == 0
    assert train.main(command("vq", tmp_path / "whole", "--steps", "6", "--eval-every", "6")) == 0
    same(*(checkpoint.load(tmp_path / run / "last.pt", "vq") for run in ("whole", "cut")))


def test_stage_two_does_not_resume_in_another_latent_space(trained, tmp_path, capsys):
    vq = command("vq", tmp_path / "vq", "--steps", "1", "--seed", "5")
    assert train.main(vq) == 0
    capsys.readouterr()
    ldm = command("ldm", trained / "ldm", "--steps", "4", "--vq", str(tmp_path / "vq/last.pt"))
    one_sentence(capsys, train.main(ldm), "another autoencoder than")


def test_fresh_deletes_nothing_before_the_run_begins(trained, tmp_path):
    before = sorted(p.name for p in (trained / "vq").iterdir())
    for flags in (command("vq", trained / "vq", "--fresh", "--data", "nowhere"),
                  command("ldm", trained / "vq", "--fresh", "--vq", str(trained / "vq/last.pt"))):
        assert train.main(flags) == 2
    assert sorted(p.name for p in (trained / "vq").iterdir()) == before
    root = folder(tmp_path / "set", 20)
    flags = command("ldm", tmp_path / "run", "--steps", "2", "--data", str(root),
                    "--vq", str(trained / "vq/last.pt"))
    assert train.main(flags) == 0
    for image in sorted((root / "images").iterdir())[:3]:
        image.write_bytes(b"damaged")
    before = (tmp_path / "run/last.pt").read_bytes()
    assert train.main([*flags, "--fresh"]) == 2
    assert (tmp_path / "run/last.pt").read_bytes() == before


def test_fresh_replaces_a_damaged_checkpoint(tmp_path, capsys):
    flags = command("vq", tmp_path / "run", "--steps", "2")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/last.pt").write_bytes(b"damaged")
    one_sentence(capsys, train.main(flags), "last.pt", "--fresh")
    assert train.main([*flags, "--fresh"]) == 0
    checkpoint.save(tmp_path / "run/last.pt", checkpoint.load(tmp_path / "run/best.pt", "vq"))
    capsys.readouterr()
    one_sentence(capsys, train.main(flags), "no training state", "--fresh")


def test_a_finished_run_is_left_alone_and_another_command_refused(trained, tmp_path, capsys):
    flags, last = command("vq", trained / "vq", "--steps", "4"), trained / "vq/last.pt"
    before = last.read_bytes()
    assert train.main(flags) == 0 and last.read_bytes() == before
    assert "complete at step 4" in capsys.readouterr().out
    assert train.main(command("vq", trained / "vq", "--steps", "9")) == 0
    assert "keeps its length of 4 steps" in capsys.readouterr().out
    one_sentence(capsys, train.main([*flags, "--lr", "0.5"]), "0.5", "0.001")
    assert train.main(command("vq", tmp_path / "run", "--steps", "2")) == 0
    assert train.main(command("vq", tmp_path / "run", "--steps", "3", "--fresh")) == 0
    assert checkpoint.load(tmp_path / "run/last.pt", "vq")["step"] == 3


# ------------------------------------------------------------------------------ the length of a run

def fixed(c: train.Config, *seconds: float) -> train.Config:
    """`c` with the length that follows from these seconds."""
    return train.replace(c, **length.fix_length(c.minutes, c.steps, c.eval_every, *seconds))


def evaluations(c: train.Config, folder: Path) -> int:
    run = RunDir(folder, c.stage)
    run.steps, run.eval_every = c.steps, c.eval_every
    return sum(map(run.eval_due, range(c.steps)))


@pytest.mark.parametrize("minutes, spent, step_s, eval_s", [
    (2, 30, 0.1, 2), (5, 60, 0.02, 4), (600, 300, 0.5, 40), (1, 5, 0.4, 0.01), (1, 50, 0.07, 8),
    (12, 100, 1.3, 0.5)])
@pytest.mark.parametrize("every", [None, "7"])
def test_a_run_of_minutes_ends_in_time(tmp_path, minutes, spent, step_s, eval_s, every):
    """On a machine of steady speed, and with evaluations that take a twentieth of it or one."""
    flags = ["--stage", "vq", "--minutes", str(minutes)]
    flags += ["--eval-every", every] if every else []
    c = fixed(train.make_config(train.parse_args(flags)), spent, step_s, eval_s)
    evals = evaluations(c, tmp_path)
    total = spent + c.steps * step_s + evals * eval_s
    assert 60 * minutes - 0.07 * (60 * minutes - spent) - 3 * eval_s < total < 60 * minutes + eval_s
    assert every or evals == 1 or evals * eval_s <= length.EVAL_SHARE * (total - spent)
    assert every or evals <= length.MAX_EVALS


def test_a_run_of_steps_evaluates_as_often_as_its_time_pays_for(tmp_path):
    for steps, wanted in (1, 1), (150, 75), (1000, 100), (50_000, 100):
        c = train.make_config(train.parse_args(["--stage", "vq", "--steps", str(steps)]))
        c = fixed(c, 100.0, 1.0, 1e-3)
        assert c.steps == steps and evaluations(c, tmp_path) == wanted
    assert fixed(train.replace(c, eval_every=None), 0, 1.0, 5000.0).eval_every == steps


def test_minutes_become_steps_that_a_resumed_run_keeps(tmp_path, monkeypatch, capsys):
    """By a clock that goes on by 200 ms whenever it is looked at, so a few times a step."""
    looks = itertools.count()
    monkeypatch.setattr(train.time, "monotonic", lambda: 0.2 * next(looks))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    flags = command("vq", tmp_path / "run", "--minutes", "0.1", "--eval-every", "7")
    with monkeypatch.context() as m, pytest.raises(Killed):
        die_after(m, 7)
        train.main(flags)
    assert not [*tmp_path.glob("tmp*")]                         # the measuring run left nothing
    steps = json.loads((tmp_path / "run/config.json").read_text())["steps"]
    assert f"{steps} steps" in capsys.readouterr().out and 8 < steps < 60
    monkeypatch.setattr(train, "measure_speed", None)
    assert train.main(flags) == 0
    assert checkpoint.load(tmp_path / "run/last.pt", "vq")["step"] == steps


@pytest.mark.parametrize("stage", ["vq", "ldm"])
def test_the_measuring_run_changes_nothing_and_does_all_that_will_take_time(
        trained, tmp_path, monkeypatch, stage):
    flags = ["--vq", str(trained / "vq/last.pt"), "--steps", "3"]
    argv = command(stage, tmp_path / "measured", *flags, preset="micro_gan")
    argv.remove("--eval-every"), argv.remove("1")
    found, log_step = [], train.log_step
    with monkeypatch.context() as m:
        m.setattr(train, "log_step", lambda run, *args: (found.append((run.dry, args)),
                                                         log_step(run, *args)))
        m.setattr(tempfile, "tempdir", str(tmp_path))
        assert train.main(argv) == 0
    assert [dry for dry, _ in found] == [True, True, False, False]
    assert stage == "ldm" or "d_loss" in found[0][1][-1]
    every = json.loads((tmp_path / "measured/config.json").read_text())["eval_every"]
    flags += ["--eval-every", str(every)]
    assert train.main(command(stage, tmp_path / "plain", *flags, preset="micro_gan")) == 0
    same(*(checkpoint.load(tmp_path / run / "last.pt", stage) for run in ("measured", "plain")))
    assert not [*tmp_path.glob("tmp*")]


def test_ctrl_c_while_the_speed_is_measured_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    log_step = train.log_step
    monkeypatch.setattr(train, "log_step", lambda *args: (os.kill(os.getpid(), signal.SIGINT),
                                                          log_step(*args)))
    assert train.main(command("vq", tmp_path / "run", "--minutes", "1")) == train.INTERRUPTED
    assert "rerun the same command" in capsys.readouterr().err
    assert not [*tmp_path.glob("tmp*")] and [p.name for p in (tmp_path / "run").iterdir()] == ["lock"]


@pytest.mark.parametrize("amp", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_both_stages_learn(tmp_path, monkeypatch, amp):
    """In fp16 too, which the flag refuses on a CPU."""
    monkeypatch.setattr(checkpoint, "find_amp", lambda name, device: amp)
    drawn, loss = [], Diffusion.loss
    monkeypatch.setattr(Diffusion, "loss", lambda d, model, x0, cond, t, noise, drop: (
        drawn.append((t, noise, drop)), loss(d, model, x0, cond, t, noise, drop))[1])
    monkeypatch.setattr(engine.run, "LOG_EVERY", 1)
    flags = ["--steps", "24", "--eval-every", "24", "--lr", "4e-3",
             "--vq", str(tmp_path / "vq/last.pt")]
    for stage in "vq", "ldm":
        assert train.main(command(stage, tmp_path / stage, *flags)) == 0
        losses = [r["loss"] for r in read_log(tmp_path / stage / "log.jsonl") if "loss" in r]
        assert np.mean(losses[-4:]) < 0.9 * np.mean(losses[:4]), losses
    t, noise, drop = (torch.cat(each) for each in zip(*drawn, strict=True))
    n = len(t)                          # by the laws of the paper, all within 5 sigma
    assert n == 4 * 24 and abs(t.double().mean() - 499.5) < 5 * 289 / n ** 0.5
    assert abs(noise.mean()) < 5 / noise.numel() ** 0.5 and abs(noise.std() - 1) < 0.05
    assert abs(drop.double().mean() - RECIPE.p_drop) < 5 * 0.3 / n ** 0.5
    raw = checkpoint.load(tmp_path / "ldm/last.pt", "ldm")["train"]
    torch.manual_seed(0)                # figures miss no joint, so this alone has no gradient
    fresh = PoseCondition(MICRO.cond).state_dict()
    assert {name for name in fresh if (raw["cond"][name] == fresh[name]).all()} <= {
        "encoder.missing"}


def test_the_best_checkpoint_has_the_best_finite_score(tmp_path, monkeypatch):
    scores, honest = iter([math.nan, 2.0, math.inf, 1.0]), train.reconstruction
    monkeypatch.setattr(train, "reconstruction",
                        lambda *args: honest(*args) | {"psnr": next(scores)})
    flags = ["--steps", "4", "--eval-every", "1"]
    assert train.main(command("vq", tmp_path / "run", *flags)) == 0
    assert checkpoint.load(tmp_path / "run/best.pt", "vq")["step"] == 2
    assert checkpoint.load(tmp_path / "run/last.pt", "vq")["train"]["best"] == 2.0


# -------------------------------------------------------------------- gradients that are not finite

def spoil(monkeypatch, kind: str, steps: range | set[int]) -> None:
    """One entry of the gradient of one parameter of the optimiser `kind` is inf at these steps."""
    now, seed_everything, optimizer = [-1], train.seed_everything, getattr(train, kind)

    def remember_step(seed: int, step: int) -> None:
        now[0] = step
        seed_everything(seed, step)

    def hook(grad: torch.Tensor) -> torch.Tensor:
        if now[0] in steps:
            grad = grad.clone()
            grad.view(-1)[-1] = math.inf
        return grad

    def make(params, *args, **kwargs):
        params[-1].register_hook(hook)
        return optimizer(params, *args, **kwargs)
    monkeypatch.setattr(train, "seed_everything", remember_step)
    monkeypatch.setattr(train, kind, make)


@pytest.mark.parametrize("stage, preset, kind", [
    ("vq", "micro_plain", "adamw"), ("ldm", "micro", "adamw"), ("ldm", "micro_toy", "adamw"),
    ("ldm", "micro_toy", "Muon")])
def test_a_gradient_that_is_not_finite_moves_no_weight(
        trained, tmp_path, monkeypatch, stage, preset, kind):
    vq = trained / "vq/last.pt"
    flags = ["--vq", str(vq), "--steps", "8", "--eval-every", "8", "--amp", "off"]
    monkeypatch.setattr(engine.run, "LOG_EVERY", 1)
    monkeypatch.setattr(engine.run, "SAVE_SECONDS", 0)
    spoil(monkeypatch, kind, {3, 4, 6})
    states, save = {}, RunDir.save

    def watch(run, step, payload, score):
        weights = payload["vq"] if stage == "vq" else payload["train"]["unet"]
        states[step + 1] = train.copy.deepcopy(dict(weights))
        states[step + 1].pop("quantize.embedding.weight", None)     # dead codes restart
        save(run, step, payload, score)
    monkeypatch.setattr(RunDir, "save", watch)
    assert train.main(command(stage, tmp_path / "run", *flags, preset=preset)) == 0
    same(states[3], states[5])
    same(states[6], states[7])
    for a, b in (2, 3), (5, 6), (7, 8):
        with pytest.raises(AssertionError):
            same(states[a], states[b])
    rows = [r for r in read_log(tmp_path / "run/log.jsonl") if "lr" in r]
    assert [r.get("skipped") for r in rows] == [None, None, None, 1, 2, None, 1, None]
    assert checkpoint.load(tmp_path / "run/last.pt", stage)["train"]["scaler"]["scale"] == 1


@pytest.mark.parametrize("stage", ["vq", "ldm"])
def test_many_in_a_row_end_the_run_and_the_checkpoint_before_stays(
        trained, tmp_path, monkeypatch, capsys, stage):
    monkeypatch.setattr(train, "MAX_BAD_STEPS", 5)
    monkeypatch.setattr(engine.run, "LOG_EVERY", 4)
    spoil(monkeypatch, "adamw", {1, 2, 4, *range(9, 40)})
    flags = ["--vq", str(trained / "vq/last.pt"), "--steps", "40", "--eval-every", "8"]
    assert train.main(command(stage, tmp_path / "run", *flags)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "not been finite for 8 steps, the last one step 16" in error and "--lr" in error
    assert checkpoint.load(tmp_path / "run/last.pt", stage)["step"] in (8, 16)


def test_in_fp16_a_skipped_step_halves_the_scale():
    """On the CPU, by hand: the flag refuses fp16 there."""
    c = train.make_config(train.parse_args(["--stage", "vq", "--device", "cpu"]))
    p = torch.nn.Parameter(torch.ones(3))
    for amp, scales in ("fp16", [2 ** 15, 2 ** 14, 2 ** 14]), ("bf16", [1, 1, 1]):
        scaler, optimizer = make_scaler(amp, "cpu"), train.adamw([p], c.recipe)
        for grad, wanted in zip([math.inf, math.nan, 1.0], scales, strict=True):
            before = p.detach().clone()
            scaler.scale((p * grad).sum()).backward()
            scaler.step(optimizer), scaler.update(), optimizer.zero_grad()
            assert scaler.get_scale() == wanted and torch.equal(p, before) == (grad != 1)


def test_a_step_that_is_not_logged_does_not_wait_for_the_gpu(trained, tmp_path, monkeypatch):
    """Whatever asks a tensor for its value would."""
    now, waits, seed_everything = [-1], [], train.seed_everything
    monkeypatch.setattr(train, "seed_everything",
                        lambda seed, step: (now.append(step), seed_everything(seed, step)))
    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        call = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name,
                            lambda x, call=call: waits.append(now[-1]) or call(x))
    flags = ["--steps", "9", "--eval-every", "9", "--vq", str(trained / "vq/last.pt")]
    assert train.main(command("ldm", tmp_path / "run", *flags, preset="micro_toy")) == 0
    assert {0, 8} == set(waits) - {-1}


def test_too_little_memory_is_one_sentence(tmp_path, capsys, monkeypatch):
    """torch raises a plain RuntimeError for it on a CPU; others are not taken for it."""
    flags = command("vq", tmp_path / "run", "--steps", "1")
    monkeypatch.setattr(train, "train_vq", lambda *args: torch.empty(2 ** 60))
    words = "the memory of cpu is too small for 4 images", "--micro-batch 2"
    one_sentence(capsys, train.main(flags), *words)
    monkeypatch.setattr(train, "train_vq", lambda *args: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError):
        train.main(flags)


# ----------------------------------------------------------------------------------- the optimisers

def test_orthogonalised_keeps_singular_vectors_and_makes_all_singular_values_about_1():
    torch.manual_seed(0)
    for shape in (16, 16), (8, 72), (72, 8):
        G = torch.randn(*shape, dtype=torch.float64)
        U, S, V = torch.linalg.svd(G, full_matrices=False)
        found = U.mT @ orthogonalised(G) @ V.mT
        assert 0.6 < found.diagonal().min() and found.diagonal().max() < 1.3
        assert (found - found.diagonal().diag()).abs().max() < 1e-6
        X, (a, b, c) = G / (G.norm() + 1e-7), NS_COEFFICIENTS     # as its author has it
        for _ in range(NS_STEPS):
            A = X @ X.mT
            X = a * X + (b * A + c * A @ A) @ X
        torch.testing.assert_close(orthogonalised(G), X, rtol=1e-8, atol=1e-8)


def test_muon_moves_all_directions_of_a_matrix_equally_far():
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(16, 8, 3, 3))
    p.grad, idle = torch.randn_like(p), torch.nn.Parameter(torch.ones(2, 2))
    adamw = train.adamw([torch.nn.Parameter(torch.ones(1))], train.Recipe(1, 0.1, 1))
    Muon([p, idle], adamw).step()
    step = -p.detach().flatten(1)                                   # [16, 72]
    assert step.square().mean().sqrt().item() == pytest.approx(0.1 * MUON_RMS, rel=0.2)
    S = torch.linalg.svdvals(step)
    assert S.max() < 2 * S.min() and torch.equal(idle, torch.ones(2, 2))
    S = torch.linalg.svdvals(p.grad.flatten(1))
    assert S.max() > 2 * S.min()


def test_ema_equals_the_reference(golden):
    model, average = (torch.nn.Linear(1, 1, bias=False) for _ in range(2))
    shape = golden["ema/w0"].shape
    model.weight.data, average.weight.data = golden["ema/w0"].clone(), golden["ema/w0"].clone()
    ema = train.EMA(model, average, 0.9999)
    for n, w in enumerate(golden["ema/weights"]):
        model.weight.data.copy_(w.view(shape))
        ema.update(n + 1)
    wanted = golden["ema/shadow20"].view(shape)
    torch.testing.assert_close(average.weight.data, wanted, rtol=1e-5, atol=1e-6)


def test_the_learning_rate_is_the_one_typed(tmp_path):
    flags = command("vq", tmp_path, "--steps", "100", "--lr", "0.01")
    c = train.make_config(train.parse_args(flags))
    found = [train.lr_at(step, c) for step in (0, 1, 51, 100)]
    assert found == pytest.approx([0.005, 0.01, 0.01 * (0.1 + 0.9 * 0.5), 0.001])
    p = torch.nn.Parameter(torch.ones(2, 2))
    muon = Muon([p], train.adamw([torch.nn.Parameter(torch.ones(2))], c.recipe), lr_scale=2.5)
    train.set_lr(0.01, train.adamw([p], c.recipe), muon)
    assert [group["lr"] for group in muon.param_groups] == [0.025, 0.01]


# ----------------------------------------------------------------------- the VQGAN objective, flags

def test_the_perceptual_and_the_adversarial_loss_are_trained_on_and_logged(tmp_path, monkeypatch):
    torch.manual_seed(0)
    lpips, paths = LPIPS(), []
    monkeypatch.setattr(formats.lpips, "load_lpips", lambda files: paths.extend(files) or lpips)
    monkeypatch.setattr(engine.run, "LOG_EVERY", 1)
    flags = ["--steps", "5", "--perceptual", "1", "--lpips-weights", "a.pth", "b.pth",
             "--disc-weight", "0.5", "--disc-start", "0.4"]
    assert train.main(command("vq", tmp_path / "run", *flags)) == 0
    assert paths == ["a.pth", "b.pth"]
    rows = [r for r in read_log(tmp_path / "run/log.jsonl") if "lr" in r]
    assert all({"l1", "lpips"} <= r.keys() for r in rows)
    found = [("d_weight" in r, "logits_real" in r) for r in rows]
    assert found == [(False, False)] * 2 + [(True, True)] * 3
    state = checkpoint.load(tmp_path / "run/last.pt", "vq")["train"]
    assert state["disc_optimizer"]["param_groups"][0]["lr"] == rows[-1]["lr"]
    assert not any("lpips" in k or "perceptual" in k for k in state)


@pytest.mark.parametrize("flags, words", [
    (["--preset", "base"], ["--lpips-weights", "--download-lpips", "--perceptual off"]),
    (["--disc-start", "5"], ["--disc-start is 5", "--disc-weight 0.75"]),
    (["--lpips-weights", "x.pth"], ["LPIPS", "--perceptual 1"]),
    (["--perceptual", "none"], ["none"]),
    (["--vq", "a.pt"], ["--vq belongs to stage 2"]),
    (["--stage", "ldm", "--disc-weight", "1"], ["--disc-weight belongs to stage 1"]),
    (["--minutes", "1"], ["--steps and --minutes"]), (["--data", "nowhere"], ["nowhere"]),
    (["--data", "figures:many"], ["figures:many"]), (["--lr", "nan"], ["--lr", "nan"]),
    (["--val", "somewhere"], ["somewhere"]), (["--amp", "fp16"], ["fp16", "bf16"]),
    (["--out", f"{__file__}/run"], ["test_train.py/run", "choose another folder"]),
    pytest.param(["--device", "cuda"], ["cuda", "cpu"],
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")),
])
def test_a_wrong_flag_is_one_sentence(tmp_path, capsys, flags, words):
    """The last of two equal flags counts."""
    try:
        assert train.main([*command("vq", tmp_path / "run", "--steps", "1"), *flags]) == 2
    except SystemExit as e:
        assert e.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error and all(word in error.splitlines()[-1] for word in words), error


def test_what_flags_make_of_a_preset():
    def config(*flags: str) -> train.Config:
        return train.make_config(train.parse_args(["--stage", "vq", *flags]))
    assert config("--disc-weight", "0.5").recipe.loss == train.replace(
        train.VQGAN, perceptual=0.0, detector=0.2, disc_weight=0.5)       # comes in as softly as elsewhere
    assert not config("--preset", "base", "--perceptual", "off").recipe.loss.perceptual
    faithful = config("--preset", "danbooru").recipe
    assert faithful.loss == VQLossConfig(perceptual=1.0, disc_weight=0.8, disc_start=10_000)
    assert not faithful.data_init_codes


@pytest.mark.parametrize("preset, condition, context, concat", [
    ("toy", None, None, 17), ("toy", "tokens", 64, 0), ("base", "tokens+maps", 256, 17),
    ("danbooru", None, 17, 0)])
def test_how_the_pose_enters_can_be_chosen(preset, condition, context, concat):
    flags = ["--stage", "ldm", "--preset", preset]
    flags += ["--condition", condition] if condition else []
    unet = train.make_config(train.parse_args(flags)).unet_config
    assert unet.context_dim == context and unet.in_channels == (4 if preset == "toy" else 3) + concat


def test_a_context_width_that_differs_is_refused():
    unet = train.UNetConfig(in_channels=3, model_channels=32, channel_mult=(1,), num_heads=2,
                            attention_resolutions=(1,), context_dim=None)
    with pytest.raises(ValueError, match="context_dim"):
        LDM(VQModel(MICRO.vq_config), unet, ConditionConfig(("seed",)), torch.zeros(3, 1, 1),
            torch.ones(3, 1, 1), {}, True)


def test_dry_run_prints_the_recipe(capsys):
    assert train.main(["--preset", "danbooru", "--device", "cpu", "--dry-run"]) == 0
    out = capsys.readouterr().out
    for word in ("206,194,243", "22,337,411", "32,960,771", "'batch_size': 32", "'lr': 6.4e-05",
                 "'timesteps': 1000", "256x256", "f4", "64x64x3"):
        assert word in out, word


def test_a_published_stage_one_is_trained_on_and_its_result_is_one_file(tmp_path, capsys):
    """--vq takes a taming .ckpt, whose image size nobody knows."""
    torch.manual_seed(0)
    state = VQModel(PLAIN).state_dict()
    more = {"loss.discriminator.main.0.bias": torch.zeros(64)}
    torch.save({"state_dict": state | more}, tmp_path / "vq.ckpt")
    flags = ["--steps", "2", "--vq", str(tmp_path / "vq.ckpt")]
    assert train.main(command("ldm", tmp_path / "ldm", *flags, preset="micro_plain")) == 0
    made = checkpoint.load(tmp_path / "ldm/last.pt", "ldm")
    same(dict(made["vq"]), dict(state))
    assert made["vq_config"]["ch"] == 32 and made["config"]["size"] == 32
    assert train.main(command("ldm", tmp_path / "other", *flags, preset="f8")) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "f4 autoencoder" in error


def test_stage_two_takes_a_stage_one_that_fits_or_names_what_would(trained, tmp_path, capsys):
    def flags(out: str, vq: Path, **more: str) -> list[str]:
        return command("ldm", tmp_path / out, "--steps", "1", "--vq", str(vq), **more)
    one_sentence(capsys, train.main(flags("a", tmp_path / "no.pt")), "no.pt", "train.py --stage vq")
    another = trained / "ldm/last.pt"                           # which carries its first stage
    assert train.main(flags("b", another)) == 0
    same(*(dict(checkpoint.load(p, "ldm")["vq"]) for p in (another, tmp_path / "b/last.pt")))
    capsys.readouterr()
    for preset, words in ("f8", ["f4 autoencoder", "the same --preset"]), ("toy", ["32 pixels", "64"]):
        one_sentence(capsys, train.main(flags("c", trained / "vq/last.pt", preset=preset)), *words)


def test_images_that_cannot_be_used(tmp_path, capsys):
    root = folder(tmp_path / "few", 20)
    (root / "keypoints/clip1_003.json").unlink()
    code = train.main(command("vq", tmp_path / "a", "--data", str(root)))
    one_sentence(capsys, code, "clip1_003")
    root = folder(tmp_path / "cut", 20)
    image = min((root / "images").iterdir())
    image.write_bytes(image.read_bytes()[:60])
    code = train.main(command("vq", tmp_path / "b", "--steps", "40", "--data", str(root)))
    error = capsys.readouterr().err
    assert code == 2 and "Traceback" not in error and image.name in error.splitlines()[-1]
    assert image.name in (tmp_path / "b/broken.txt").read_text()


def test_without_fcntl_and_posix_signals_both_stages_train(tmp_path):
    """As on Windows; in a process of its own, which has not imported anything yet."""
    hide = ("import os, signal, sys\nsys.modules['fcntl'] = None\n"
            "for name in ('SIGHUP', 'SIGUSR1', 'SIGALRM', 'SIGKILL', 'setitimer'):\n"
            "    delattr(signal, name)\n"
            "for name in ('fork', 'posix_fadvise', 'getuid'):\n    delattr(os, name)\n"
            f"sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
            "import json, pytest, train, test_train\n"
            "test_train.as_micro(pytest.MonkeyPatch())\n"
            "sys.exit(max(map(train.main, json.loads(sys.argv[1]))))")
    flags = ["--steps", "2", "--vq", str(tmp_path / "vq/last.pt")]
    argv = [command(stage, tmp_path / stage, *flags) for stage in ("vq", "ldm")]
    done = subprocess.run([sys.executable, "-c", hide, json.dumps(argv)], capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    for stage in "vq", "ldm":
        assert checkpoint.load(tmp_path / stage / "last.pt", stage)["step"] == 2


# -------------------------------------------------------------------------------------- checkpoints

def test_a_damaged_checkpoint_is_one_sentence(trained, tmp_path):
    whole = (trained / "vq/last.pt").read_bytes()
    weight = checkpoint.load(trained / "vq/last.pt", "vq")["vq"]["quantize.embedding.weight"]
    at = whole.index(weight.numpy().tobytes())
    flipped = whole[:at] + bytes([whole[at] ^ 64]) + whole[at + 1:]     # torch checks no sum
    torch.save({"weights": torch.ones(1)}, tmp_path / "foreign.pt")
    foreign = (tmp_path / "foreign.pt").read_bytes()
    half = whole[:len(whole) // 2]
    for content in (half, flipped, foreign, b"", b"hello", b".", b"R", b"\x80\x02}"):
        (tmp_path / "bad.pt").write_bytes(content)
        with pytest.raises(ValueError, match="bad.pt") as e:
            checkpoint.load(tmp_path / "bad.pt", "vq")
        assert "\n" not in str(e.value)


def test_a_state_that_does_not_fit_names_keys_and_both_shapes():
    state = VQModel(MICRO.vq_config).state_dict()
    state["quantize.embedding.weight"] = torch.zeros(7, 3)
    del state["quant_conv.bias"]
    with pytest.raises(ValueError) as e:
        checkpoint.fill(VQModel(MICRO.vq_config), state, "x.pt")
    for word in ("x.pt", "quantize.embedding.weight", "(7, 3)", "(32, 3)", "quant_conv.bias"):
        assert word in str(e.value)


def test_the_hash_sees_every_value():
    state = VQModel(MICRO.vq_config).state_dict()
    before = checkpoint.hash_of(state)
    assert before == checkpoint.hash_of({k: v.clone() for k, v in reversed(state.items())})
    state["quant_conv.bias"][0] += 1e-6
    assert checkpoint.hash_of(state) != before


# ----------------------------------------------------------------------------------------- sampling

POSES = sorted(str(p) for p in (ROOT / "examples/poses").glob("*.json"))


def rewritten(trained, tmp_path, **changes) -> str:
    """The trained stage 2 with other entries; None removes one."""
    payload = torch.load(trained / "ldm/last.pt", weights_only=True) | changes
    payload = {key: value for key, value in payload.items() if value is not None}
    checkpoint.save(tmp_path / "other.pt", payload)
    return str(tmp_path / "other.pt")


def spy_on_poses(monkeypatch) -> list[torch.Tensor]:
    """What is drawn from now on: poses [B, 17, 3], a tensor for each call."""
    drawn, denoise = [], sample.denoise
    monkeypatch.setattr(sample, "denoise", lambda ldm, poses, *args, **how:
                        drawn.append(poses) or denoise(ldm, poses, *args, **how))
    return drawn


def test_a_checkpoint_carries_training_poses_spread_over_all(trained, monkeypatch):
    wanted = np.stack([Figures(12, 32).source(i)[1] for i in range(12)])
    for name in ("last.pt", "best.pt"):
        _, payload = checkpoint.load_ldm(path := trained / "ldm" / name)
        assert payload["poses"].dtype == torch.float16
        np.testing.assert_allclose(checkpoint.training_poses(payload, path), wanted, atol=1 / 2048)
    poses = np.ones((13, 17, 3), np.float32)
    poses[:, 0, 0] = np.arange(13)
    poses[2, :, 2] = 0                                          # image 2 has no visible joint
    labels = torch.full((13,), -1)
    for wanted in [0, 1, *range(3, 13)], [0, 5, 8, 12]:
        assert latents.poses_kept(poses, labels)["poses"][:, 0, 0].tolist() == wanted
        monkeypatch.setattr(latents, "POSES_KEPT", 4)


def test_an_unusual_pose_gets_a_note(trained, tmp_path, capsys, monkeypatch):
    """Planted: the model was trained on standing.json, and random joints are far from it."""
    standing, absurd = str(ROOT / "examples/poses/standing.json"), str(tmp_path / "absurd.json")
    drawn = spy_on_poses(monkeypatch)
    (pose,), _ = read_poses([standing])
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.01, (50, 17, 3)) * [1, 1, 0]
    poses = torch.from_numpy(np.repeat(pose[None], 50, axis=0) + noise).half()
    joints = [[*xy, 1] for xy in rng.uniform(0.1, 0.9, (17, 2)).tolist()]
    Path(absurd).write_text(json.dumps(joints))
    flags = ["--ckpt", rewritten(trained, tmp_path, poses=poses), "-n", "1", "--steps", "1",
             "--out", str(tmp_path / "x.png")]
    capsys.readouterr()
    assert sample.main([standing, absurd, *flags]) == 0
    out = capsys.readouterr().out
    assert "absurd: unusual pose: rarer than 100 % of the training poses; --typical 0.5" in out
    assert "standing: unusual" not in out
    assert sample.main([absurd, *flags, "--typical", "1"]) == 0
    assert "0 % with --typical 1" in capsys.readouterr().out
    (_, given), (pulled,) = drawn
    density = extras.density.PoseDensity(poses.double().numpy())
    wanted = density.typical(given[None].numpy(), 1.0)[0]
    np.testing.assert_allclose(pulled, wanted, atol=1e-6)


def test_common_poses_need_no_file(trained, tmp_path, monkeypatch, capsys):
    drawn, ckpt = spy_on_poses(monkeypatch), str(trained / "ldm/last.pt")
    out = tmp_path / "common.png"
    argv = ["--common", "3", "--ckpt", ckpt, "-n", "2", "--steps", "1", "--out", str(out)]
    assert sample.main(argv) == 0
    poses = checkpoint.training_poses(checkpoint.load(ckpt, "ldm"), ckpt)
    density = extras.density.PoseDensity(poses)
    assert len(set(density.common(3))) == 3
    np.testing.assert_array_equal(drawn[0][::2], density.poses[density.common(3)])
    assert "6 images" in capsys.readouterr().out and Image.open(out).size[1] > 3 * 100
    code = sample.main(["--common", "13", "--ckpt", ckpt])
    one_sentence(capsys, code, "--common is 13", "12 training poses")


def test_a_checkpoint_without_poses_samples_all_the_same(trained, tmp_path, monkeypatch, capsys):
    flags = ["--ckpt", rewritten(trained, tmp_path, poses=None), "-n", "1", "--steps", "1",
             "--out", str(tmp_path / "x.png")]
    drawn = spy_on_poses(monkeypatch)
    assert sample.main([POSES[0], *flags]) == 0
    assert "unusual" not in capsys.readouterr().out
    (pose,), _ = read_poses(POSES[:1])
    np.testing.assert_array_equal(drawn[0][0], pose)
    assert sample.main([POSES[0], "--ckpt", str(trained / "ldm/last.pt"), *flags[2:]]) == 0
    assert torch.equal(*drawn)                                  # --typical 0 changes no bit
    capsys.readouterr()
    one_sentence(capsys, sample.main(["--common", "2", *flags]), "--common", "train.py --stage ldm")
    code, captured = sample.main([POSES[0], "--typical", "0.5", *flags]), capsys.readouterr()
    assert code == 2 and "--typical" in captured.err and "train.py --stage ldm" in captured.err
    for none in (torch.zeros(0, 17, 3).half(), torch.zeros(5, 17, 3).half()):
        assert checkpoint.training_poses({"poses": none}, tmp_path / "other.pt") is None


@pytest.mark.parametrize("argv, words", [
    (["none.json"], ["none.json"]),
    ([POSES[0], "--ckpt", "none.pt"], ["none.pt", "python train.py --stage ldm"]),
    ([POSES[0], "--steps", "1001"], ["1001", "1000"]),
    ([POSES[0], "--out", "/proc/none/x.png"], ["/proc/none"]),
])
def test_sampling_mistakes_are_one_sentence(trained, tmp_path, monkeypatch, capsys, argv, words):
    monkeypatch.chdir(tmp_path)
    code = sample.main(["--ckpt", str(trained / "ldm/last.pt"), *argv])
    error = capsys.readouterr().err
    last = error.splitlines()[-1]
    assert code == 2 and "Traceback" not in error and last.startswith("sample.py: ")
    assert all(word in last for word in words), error


def test_guidance_needs_a_model_trained_with_dropout(trained, tmp_path, monkeypatch, capsys):
    kept = train.replace(MICRO, ldm=train.replace(RECIPE, p_drop=0.0))
    monkeypatch.setitem(train.PRESETS, "micro", kept)
    vq = ["--vq", str(trained / "vq/last.pt")]
    assert train.main(command("ldm", tmp_path / "ldm", "--steps", "1", *vq)) == 0
    assert "val_null" not in read_log(tmp_path / "ldm/log.jsonl")[-1]   # it would mean nothing
    ldm, _ = checkpoint.load_ldm(tmp_path / "ldm/last.pt")
    assert (ldm.guidance, ldm.eta) == (1, 0)
    flags = [POSES[0], "--ckpt", str(tmp_path / "ldm/last.pt"), "--steps", "2",
             "--out", str(tmp_path / "x.png")]
    assert sample.main([*flags, "-n", "1"]) == 0
    capsys.readouterr()
    one_sentence(capsys, sample.main([*flags, "--guidance", "3"]), "--guidance", "dropping poses")


# ----------------------------------------------------------------------------------------- measures

def test_psnr_is_the_closed_form():
    x, psnr = torch.zeros(1, 3, 4, 4), metrics.images.psnr
    assert psnr(x + 0.2, x).item() == pytest.approx(20.0, abs=1e-4)     # an error of 0.1 on 0..1
    assert psnr(x + 5, x + 1).item() == pytest.approx(120, abs=1e-3)    # clamped first


def test_reconstruction_counts_the_codes_of_the_whole_set():
    torch.manual_seed(0)
    model, psnr = VQModel(MICRO.vq_config), metrics.images.psnr
    x = torch.rand(10, 3, 32, 32) * 2 - 1
    model.quantize.init_codes(model.encode(x))
    result = metrics.images.reconstruction(model, [x[:4], x[4:]])
    x_hat, _, indices = model(x)
    p = np.bincount(indices.flatten().numpy(), minlength=32) / indices.numel()
    assert result["codes_used"] == (p > 0).mean() and result["images"] == 10
    entropy = -(p[p > 0] * np.log(p[p > 0])).sum()
    assert result["perplexity"] == pytest.approx(np.exp(entropy), rel=1e-4)
    assert result["psnr"] == pytest.approx(psnr(x_hat, x).mean().item(), rel=1e-4)
    box = x.view(10, 3, 8, 4, 8, 4).mean((3, 5)).repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert result["psnr_box"] == pytest.approx(psnr(box, x).mean().item(), rel=1e-4)


def test_a_derangement_moves_everything():
    for n in (2, 3, 50):
        order = metrics.condition.derangement(n, 0)
        assert sorted(order) == list(range(n)) and (order != np.arange(n)).all()


def test_the_condition_ratio_is_one_without_the_pose_and_above_with_it():
    """A model that reads x0 off the pose is right under the right pose alone."""
    diffusion, measure = Diffusion(), metrics.condition.condition_losses
    torch.manual_seed(0)
    poses = torch.rand(40, 17, 3)
    z = poses[:, :1, :1, None].expand(-1, 3, 4, 4).clone()

    def reading(x_t, t, pose, drop):
        x0 = torch.where(drop[:, None, None, None], torch.tensor(0.5), pose[:, :1, :1, None])
        a = diffusion.alphas_bar[t].float()[:, None, None, None]
        return (x_t - a.sqrt() * x0) / (1 - a).sqrt()
    result = measure(lambda x_t, *_: torch.zeros_like(x_t), diffusion, z, poses, batch_size=16)
    assert result["ratio"] == 1 and result["null"] == result["right"]
    result = measure(reading, diffusion, z, poses, batch_size=16)
    assert result["right"] < 1e-6 < 1e-4 < result["null"] < result["shuffled"]


def test_the_commands_repeat_what_training_measured(trained, tmp_path, capsys):
    """On the data they were trained with; training measures in bf16."""
    argv = ["recon", "--vq", str(trained / "vq/last.pt"), "--out", str(tmp_path)]
    assert evaluate.main(argv) == 0
    found, = json.loads((tmp_path / "recon.json").read_text())["checkpoints"]
    logged = read_log(trained / "vq/log.jsonl")[-1]
    assert found["psnr"] == pytest.approx(logged["val_psnr"], rel=2e-2)
    assert found["l1"] == pytest.approx(logged["val_l1"], rel=2e-2)
    capsys.readouterr()
    assert evaluate.main(["condition", "--ckpt", str(trained / "ldm/last.pt")]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    ratio = next(float(words[1]) for words in lines if words[0] == "ratio")
    assert ratio == pytest.approx(read_log(trained / "ldm/log.jsonl")[-1]["val_ratio"], rel=2e-2)


def test_figures_for_training_and_validation_differ():
    ours, held_out = data.open_data("figures:6", 32)
    assert not any(np.array_equal(ours[i][0], held_out[j][0]) for i in range(6) for j in range(6))
