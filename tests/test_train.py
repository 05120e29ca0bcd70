"""train.py, checkpoint.py, sample.py and evaluate.py: exact resume, honest files, one sentence for each mistake."""
import functools
import itertools
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import folder

import checkpoint
import data
import evaluate
import extras.density
import formats.lpips
import metrics.condition
import metrics.images
import plots
import sample
import train
from dataset.figures import Figures
from diffusion import Diffusion
from keypoints import ConditionConfig
from ldm import LDM
from unet import UNet
from vq import LPIPS, VQConfig, VQLoss, VQLossConfig, VQModel

ROOT = Path(__file__).parent.parent
MICRO = train.Preset(
    32, VQConfig(ch=8, ch_mult=(1, 1, 2), num_res_blocks=1, n_embed=32, resolution=32, **train.NORM_FREE),
    {"model_channels": 32, "channel_mult": (1,), "attention_resolutions": (1,), "num_heads": 2, "num_res_blocks": 1},
    ConditionConfig(("tokens", "maps"), 16),
    vq=train.Recipe(4, 1e-3, minutes=1, lr_final=0.1, warmup=2, free=0.2),
    ldm=train.Recipe(4, 1e-3, minutes=1, lr_final=0.1, warmup=2))


PRESETS = {
    "micro": MICRO,
    "micro_plain": train.replace(                                       # the reference's way: norms, gradient codebook
        MICRO, vq_config=VQConfig(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, n_embed=32, resolution=32, dropout=0.1)),
    "micro_gan": train.replace(
        MICRO, vq=train.replace(MICRO.vq, loss=VQLossConfig(disc_weight=1.0, disc_start=2, disc_ramp=2)))}


def as_micro(patch: pytest.MonkeyPatch) -> None:
    """The presets of the tests, and evaluations that cost no more than a step: EVALS of them, however long the run, of
    four pictures, previews of two, no curves. For whoever runs train.main: a test, a fixture of a module, a process."""
    for name, preset in PRESETS.items():
        patch.setitem(train.PRESETS, name, preset)
    for name, value in {"EVAL_SHARE": 0, "EVAL_PICTURES": 4, "EVAL_LATENTS": (4, 4), "PREVIEWS": 2,
                        "PREVIEW_STEPS": 2}.items():
        patch.setattr(train, name, value)
    patch.setattr(train, "plot_curves", lambda run, panels: None)


@pytest.fixture(autouse=True)
def micro(monkeypatch):
    as_micro(monkeypatch)
    monkeypatch.setattr(train, "rehearse", lambda c, pictures: train.Forecast(1.0, 1.0))     # real in test_engine.py


def command(stage: str, out: Path, *flags: str, preset: str = "micro") -> list[str]:
    """Of `flags` for both stages --vq is left out where it means nothing."""
    if stage == "vq" and "--vq" in flags:
        at = flags.index("--vq")
        flags = flags[:at] + flags[at + 2:]
    return ["--stage", stage, "--preset", preset, "--data", "figures:12", "--out", str(out), "--device", "cpu", *flags]


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with vq/last.pt and ldm/last.pt of the micro preset: evaluated on all pictures, with curves. To be read
    only, for all modules share it."""
    return train_micro(tmp_path_factory.getbasetemp() / "trained")


@functools.cache                        # pytest makes a fixture anew in each module that imports it
def train_micro(root: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train.PRESETS, "micro", MICRO)
        patch.setattr(train, "PREVIEW_STEPS", 2)
        assert train.main(command("vq", root / "vq", "--steps", "4")) == 0
        assert train.main(command("ldm", root / "ldm", "--steps", "4", "--vq", str(root / "vq/last.pt"))) == 0
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


class Killed(Exception):
    """Stands for kill -9 right after a checkpoint: nothing of the process survives it."""


# -------------------------------------------------------------------------------------------------- exact resume

@pytest.mark.parametrize("stage, preset", [("vq", "micro"), ("vq", "micro_plain"), ("vq", "micro_gan"),
                                           ("ldm", "micro"), ("ldm", "micro_plain")])
def test_six_steps_equal_three_and_resume_and_three(tmp_path, monkeypatch, stage, preset):
    flags = ["--steps", "6"]
    if stage == "ldm":
        assert train.main(command("vq", tmp_path / "vq", "--steps", "2", preset=preset)) == 0
        flags += ["--vq", str(tmp_path / "vq/last.pt")]
    assert train.main(command(stage, tmp_path / "whole", *flags, preset=preset)) == 0

    save = train.Run.save

    def save_then_die(run, step, *args):
        save(run, step, *args)
        if step == 3:
            raise Killed
    with monkeypatch.context() as m:
        m.setattr(train.Run, "save", save_then_die)
        with pytest.raises(Killed):
            train.main(command(stage, tmp_path / "cut", *flags, preset=preset))
    torch.manual_seed(99)                                       # a new process has another generator state
    cut = checkpoint.load(tmp_path / "cut/last.pt", stage)
    assert cut["step"] == 3
    assert stage == "ldm" or (cut["train"]["usage"] != 1).any()       # the codebook's own state is there to be lost
    assert ("disc_optimizer" in cut["train"]) == (preset == "micro_gan")
    assert train.main(command(stage, tmp_path / "cut", *flags, preset=preset)) == 0
    whole, cut = (checkpoint.load(tmp_path / run / "last.pt", stage) for run in ("whole", "cut"))
    assert whole["step"] == cut["step"] == 6
    same(whole, cut)
    logs = [train.read_log(tmp_path / run / "log.jsonl") for run in ("whole", "cut")]
    assert logs[0] == logs[1] and len(logs[0]) >= 6
    assert [p.name for p in sorted((tmp_path / "cut/samples").iterdir())] == [f"{k:07d}.png" for k in range(1, 7)]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["vq", "ldm"])
def test_a_real_kill_9_loses_nothing_but_time(tmp_path, stage):
    """The toy preset in a process of its own, killed between two of its checkpoints."""
    vq = tmp_path / "vq/last.pt"
    figures = ["--data", "figures:4", "--batch-size", "2"]      # 4 are evaluated on, in that process as in this one
    if stage == "ldm":
        assert train.main(["--stage", "vq", *figures, "--steps", "1", "--out", str(vq.parent)]) == 0
    flags = ["--stage", stage, *figures, "--steps", "4", "--device", "cpu"]
    flags += ["--vq", str(vq)] if stage == "ldm" else []
    assert train.main([*flags, "--out", str(tmp_path / "whole")]) == 0
    process = subprocess.Popen([sys.executable, "train.py", *flags, "--out", str(tmp_path / "cut")], cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    last = tmp_path / "cut/last.pt"
    while not last.exists() and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert 1 <= checkpoint.load(last, stage)["step"] < 4
    assert train.main([*flags, "--out", str(tmp_path / "cut")]) == 0
    same(checkpoint.load(tmp_path / "whole/last.pt", stage), checkpoint.load(last, stage))


def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def press_ctrl_c(*args):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return clip(*args)
    flags = command("vq", tmp_path / "cut", "--steps", "6")
    with monkeypatch.context() as m:
        m.setattr(torch.nn.utils, "clip_grad_norm_", press_ctrl_c)
        assert train.main(flags) == train.INTERRUPTED
    assert "stopped at step 2 of 6" in capsys.readouterr().out
    assert train.main(flags) == 0
    assert train.main(command("vq", tmp_path / "whole", "--steps", "6")) == 0
    same(*(checkpoint.load(tmp_path / run / "last.pt", "vq") for run in ("whole", "cut")))


def ticking(monkeypatch) -> None:
    """A clock that goes alike on any machine: on by 50 ms whenever it is looked at, a few times a step."""
    looks = itertools.count()
    monkeypatch.setattr(train.time, "monotonic", lambda: 0.05 * next(looks))


def test_minutes_become_steps_that_a_resumed_run_keeps(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "MEASURE_STEPS", 4)
    ticking(monkeypatch)
    flags = command("vq", tmp_path / "run", "--minutes", "0.1")
    save = train.Run.save

    def save_then_die(run, *args):
        save(run, *args)
        raise Killed
    with monkeypatch.context() as m:
        m.setattr(train.Run, "save", save_then_die)
        with pytest.raises(Killed):
            train.main(flags)
    steps = json.loads((tmp_path / "run/config.json").read_text())["steps"]
    assert steps > checkpoint.load(tmp_path / "run/last.pt", "vq")["step"] >= 4
    monkeypatch.setattr(train, "MEASURE_STEPS", 2)                              # would measure anew, if it did
    assert train.main(flags) == 0
    assert json.loads((tmp_path / "run/config.json").read_text())["steps"] == steps
    assert checkpoint.load(tmp_path / "run/last.pt", "vq")["step"] == steps


def test_the_codebook_of_a_minutes_run_is_drawn_however_short_it_is(tmp_path):
    c = train.make_config(train.parse_args(command("vq", tmp_path, "--minutes", "1")))
    assert train.quantize_from(c) == sys.maxsize
    assert train.quantize_from(train.replace(c, steps=60, measured=40)) == 40
    assert train.quantize_from(train.replace(c, steps=600, measured=40)) == 120
    assert train.quantize_from(train.replace(c, steps=6, minutes=None)) == 1


def test_ctrl_c_while_the_rate_is_measured_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train.Run, "clock", lambda run, *_: os.kill(os.getpid(), signal.SIGINT))
    assert train.main(command("vq", tmp_path / "run", "--minutes", "1")) == train.INTERRUPTED
    assert "before its first checkpoint" in capsys.readouterr().out and not (tmp_path / "run/last.pt").exists()


def test_stage_two_does_not_go_on_in_another_latent_space(tmp_path, capsys):
    vq, ldm = command("vq", tmp_path / "vq", "--steps", "2"), command("ldm", tmp_path / "ldm", "--steps", "2")
    ldm += ["--vq", str(tmp_path / "vq/last.pt")]
    assert train.main(vq) == 0 and train.main(ldm) == 0
    assert train.main([*vq, "--seed", "5", "--fresh"]) == 0
    capsys.readouterr()
    assert (tmp_path / "vq/last.pt").exists()
    assert train.main(ldm) == 2 and "another autoencoder than" in capsys.readouterr().err


def test_fresh_with_a_mistake_deletes_nothing(trained, tmp_path, capsys):
    before = sorted(p.name for p in (trained / "vq").iterdir())
    for flags in (command("vq", trained / "vq", "--fresh", "--data", "nowhere"),
                  command("ldm", trained / "vq", "--fresh", "--vq", str(trained / "vq/last.pt"))):
        assert train.main(flags) == 2
    assert sorted(p.name for p in (trained / "vq").iterdir()) == before
    root = folder(tmp_path / "set", 20)
    flags = command("ldm", tmp_path / "run", "--steps", "2", "--vq", str(trained / "vq/last.pt"), "--data", str(root))
    assert train.main(flags) == 0
    for picture in sorted((root / "images").iterdir())[:3]:
        picture.write_bytes(b"damaged")
    before = (tmp_path / "run/last.pt").read_bytes()
    assert train.main([*flags, "--fresh"]) == 2 and (tmp_path / "run/last.pt").read_bytes() == before


def test_fresh_replaces_a_damaged_checkpoint(tmp_path, capsys):
    flags = command("vq", tmp_path / "run", "--steps", "2")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/last.pt").write_bytes(b"damaged")
    one_sentence(capsys, train.main(flags), "last.pt", "--fresh")
    assert train.main([*flags, "--fresh"]) == 0
    checkpoint.save(tmp_path / "run/last.pt", checkpoint.load(tmp_path / "run/best.pt", "vq"))
    capsys.readouterr()
    one_sentence(capsys, train.main(flags), "no training state", "--fresh")


def test_slow_steps_are_not_measured_forty_times(tmp_path, monkeypatch):
    c = train.make_config(train.parse_args(command("vq", tmp_path / "run", "--minutes", "1")))
    run = train.Run(c, fresh=False)
    run.began, run.eval_forwards, now = 0.0, 3, [0.0]
    monkeypatch.setattr(train.time, "monotonic", lambda: now[0])
    for step in range(3):
        now[0] += 6.0                                               # 6 s a step: 18 s are over a quarter of a minute
        run.clock(step)
    assert run.c.measured == 3 and run.c.steps == 3 + 5      # (57 - 18) / 6 = 6.5, less 6 evaluations of 3 / 12 step


def test_a_length_of_another_kind_is_not_ignored(trained, capsys):
    assert train.main(command("vq", trained / "vq", "--steps", "9")) == 2
    error = capsys.readouterr().err
    assert "steps = 4" in error and "steps = 9" in error


def test_a_finished_run_is_left_alone_and_fresh_starts_over(trained, tmp_path, capsys):
    flags = command("vq", trained / "vq", "--steps", "4")
    before = (trained / "vq/last.pt").read_bytes()
    assert train.main(flags) == 0
    assert "complete at step 4" in capsys.readouterr().out and (trained / "vq/last.pt").read_bytes() == before
    assert train.main(command("vq", tmp_path / "run", "--steps", "2")) == 0
    assert train.main(command("vq", tmp_path / "run", "--steps", "3", "--fresh")) == 0
    assert checkpoint.load(tmp_path / "run/last.pt", "vq")["step"] == 3


def test_another_command_does_not_resume_this_run(trained, capsys):
    assert train.main(command("vq", trained / "vq", "--steps", "4", "--lr", "0.5")) == 2
    error = capsys.readouterr().err
    assert "0.5" in error and "0.001" in error and error.count("\n") == 1


# ---------------------------------------------------------------------------------------------- what the run leaves

def test_the_run_folder_is_complete(trained):
    for stage in ("vq", "ldm"):
        run = trained / stage
        assert json.loads((run / "config.json").read_text())["steps"] == 4
        assert Image.open(run / "curves.png").size[0] > 500 and Image.open(run / "samples/0000004.png").size[0] > 300
        rows = train.read_log(run / "log.jsonl")
        assert any("val_psnr" in r or "val_ratio" in r for r in rows)
        assert all(math.isfinite(r.get("loss", 0)) for r in rows)
        assert (run / "best.pt").exists()


def test_stage_one_learns_and_stage_two_lets_the_pose_in(tmp_path):
    assert train.main(command("vq", tmp_path / "vq", "--steps", "60")) == 0
    losses = [r["loss"] for r in train.read_log(tmp_path / "vq/log.jsonl") if "loss" in r]
    assert losses[-1] < 0.8 * losses[0]
    assert train.main(command("ldm", tmp_path / "ldm", "--steps", "40", "--vq", str(tmp_path / "vq/last.pt"))) == 0
    losses = [r["loss"] for r in train.read_log(tmp_path / "ldm/log.jsonl") if "loss" in r]
    assert losses[-1] < 0.95 * losses[0]
    raw = checkpoint.load(tmp_path / "ldm/last.pt", "ldm")["train"]
    vq = checkpoint.build_vq(checkpoint.load(tmp_path / "vq/last.pt", "vq"), "vq")
    c = train.make_config(train.parse_args(command("ldm", tmp_path / "x")))
    torch.manual_seed(0)                                        # as the run began
    fresh = LDM(vq, c.unet_config, c.cond_config, torch.zeros(3, 1, 1), torch.ones(3, 1, 1), {}, True)
    assert torch.equal(raw["cond"]["encoder.missing"], fresh.cond.encoder.missing)      # figures miss no joint
    for name, start in fresh.cond.state_dict().items():         # every part of the pose encoder has been trained
        assert not torch.equal(raw["cond"][name], start) or name == "encoder.missing", name


# ------------------------------------------------------------------------------------------ losses that go wrong

def poison(monkeypatch, stage: str, steps: set[int], what: str) -> None:
    """Make the training loss, or only its gradient, not a number at these steps."""
    now, seed_step = [-1], train.seed_step

    def remember_step(seed: int, step: int) -> None:
        now[0] = step
        seed_step(seed, step)

    def spoil(loss: torch.Tensor) -> torch.Tensor:
        if now[0] in steps and torch.is_grad_enabled():
            loss = loss * (math.nan if what == "loss" else 1.0)
            loss.register_hook(lambda grad: grad * math.nan)
        return loss

    monkeypatch.setattr(train, "seed_step", remember_step)
    owner, name = (VQLoss, "generator") if stage == "vq" else (Diffusion, "loss")
    healthy = getattr(owner, name)

    def sick(*args, **kwargs):
        out = healthy(*args, **kwargs)
        return (spoil(out[0]), out[1]) if stage == "vq" else spoil(out)
    monkeypatch.setattr(owner, name, sick)


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
@pytest.mark.parametrize("stage, preset", [("vq", "micro_gan"), ("ldm", "micro")])
def test_a_loss_that_is_not_finite_is_skipped_and_counted(trained, tmp_path, monkeypatch, stage, preset, what):
    flags = ["--vq", str(trained / "vq/last.pt"), "--steps", "8", "--amp", "off"]
    poison(monkeypatch, stage, {3, 4, 6}, what)
    states, after_step = {}, train.Run.after_step

    def watch(run, step, *args):
        states[step + 1] = train.copy.deepcopy(run.payload()["vq"] if stage == "vq" else run.payload()["train"]["unet"])
        return after_step(run, step, *args)
    monkeypatch.setattr(train.Run, "after_step", watch)
    assert train.main(command(stage, tmp_path / "run", *flags, preset=preset)) == 0
    same(states[3], states[5])                                  # nothing moved in steps 3 and 4, nor in step 6
    same(states[6], states[7])
    with pytest.raises(AssertionError):
        same(states[5], states[6])
    rows = train.read_log(tmp_path / "run/log.jsonl")
    assert [r.get("skipped") for r in rows if "lr" in r][-1] == 3
    assert all(math.isfinite(v) for r in rows for v in r.values())
    assert checkpoint.load(tmp_path / "run/last.pt", stage)["train"]["skipped"] == 3


@pytest.mark.parametrize("stage", ["vq", "ldm"])
def test_ten_in_a_row_stop_the_run_and_the_last_good_checkpoint_stays(trained, tmp_path, monkeypatch, capsys, stage):
    flags = ["--vq", str(trained / "vq/last.pt"), "--steps", "40", "--amp", "off"]
    monkeypatch.setattr(train, "EVALS", 10)                     # a checkpoint each 4 steps
    poison(monkeypatch, stage, set(range(8, 40)) | {2, 3, 5}, "loss")
    seed_step = train.seed_step

    def ruin(seed: int, step: int) -> None:         # as a diverging run does: the weights go first
        seed_step(seed, step)
        if step == 8:
            for module in list(networks):
                for p in module.parameters():
                    p.data.fill_(1e30)
    monkeypatch.setattr(train, "seed_step", ruin)
    networks, owner = weakref.WeakSet(), VQModel if stage == "vq" else UNet
    init = owner.__init__
    monkeypatch.setattr(owner, "__init__", lambda self, *args: (init(self, *args), networks.add(self))[0])
    assert train.main(command(stage, tmp_path / "run", *flags)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "not finite in 10 steps in a row" in error and "at step 17" in error and "last good checkpoint" in error
    assert "Traceback" not in error
    kept = checkpoint.load(tmp_path / "run/last.pt", stage)
    assert kept["step"] == 8
    weights = kept["vq"] if stage == "vq" else kept["train"]["unet"]
    assert all(v.abs().max() < 1e6 for v in weights.values())
    best = checkpoint.load(tmp_path / "run/best.pt", stage)
    assert all(v.abs().max() < 1e6 for v in best["vq" if stage == "vq" else "unet"].values())


def test_a_cpu_without_memory_is_one_sentence(tmp_path, capsys, monkeypatch):
    """torch's own error, which is a plain RuntimeError there; others are not taken for it."""
    def full(c, fresh):
        torch.empty(2 ** 60)
    monkeypatch.setitem(train.TRAIN, "vq", full)
    one_sentence(capsys, train.main(command("vq", tmp_path / "run")), "the memory of cpu is too small for 4 pictures")
    monkeypatch.setitem(train.TRAIN, "vq", lambda c, fresh: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError):
        train.main(command("vq", tmp_path / "run"))


def test_an_evaluation_that_is_not_a_number_is_never_the_best(tmp_path, monkeypatch):
    scores = iter([math.nan, 2.0, math.inf, 1.0])
    honest = metrics.images.reconstruction
    monkeypatch.setattr(metrics.images, "reconstruction", lambda *a, **k: honest(*a, **k) | {"psnr": next(scores)})
    assert train.main(command("vq", tmp_path / "run", "--steps", "4")) == 0
    assert checkpoint.load(tmp_path / "run/best.pt", "vq")["step"] == 2
    assert checkpoint.load(tmp_path / "run/last.pt", "vq")["train"]["best"] == 2.0


class Counter:
    """What descend needs of a Run."""
    def __init__(self):
        self.bad = 0

    def usable(self, name: str, value: float, step: int) -> bool:
        self.bad += not math.isfinite(value)
        return math.isfinite(value)


def test_a_step_waits_for_the_gpu_once(monkeypatch):
    waits, p = [], torch.nn.Parameter(torch.ones(3))
    for name in ("item", "tolist"):
        call = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda x, call=call: waits.append(x.shape) or call(x))
    (loss := p.sum()).backward()
    norm = train.descend(loss, [p], torch.optim.SGD([p], lr=0.1), torch.amp.GradScaler(enabled=False), Counter(), 0)
    assert norm is not None and waits == [(2,)]


def test_in_fp16_an_overflow_is_forgiven_until_the_scale_is_no_excuse():
    p = torch.nn.Parameter(torch.ones(3))
    opt, scaler, run = torch.optim.SGD([p], lr=0.1), torch.amp.GradScaler("cpu", init_scale=4.0), Counter()

    def loss(healthy: bool) -> torch.Tensor:
        out = p.sum()
        if not healthy:
            out.register_hook(lambda grad: grad * math.inf)
        return out

    def descend(healthy: bool, step: int) -> torch.Tensor | None:
        opt.zero_grad()
        scaler.scale(value := loss(healthy)).backward()
        return train.descend(value, [p], opt, scaler, run, step)

    counted = []
    for step in range(5):
        assert descend(False, step) is None
        counted.append(run.bad)
    assert counted == [0, 0, 1, 2, 3]               # scales 2, 1, then 1/2, ...
    assert torch.equal(p.data, torch.ones(3))
    assert descend(True, 5) is not None and (p.data < 1).all()


def test_a_skipped_step_frees_its_graph_before_the_next(tmp_path, monkeypatch):
    """Else a GPU that is full at every step runs out of memory at the first skipped one."""
    poison(monkeypatch, "vq", {2}, "loss")
    alive, at_start, encode = weakref.WeakSet(), [], VQModel.encode

    def watch(self, x):
        if torch.is_grad_enabled():
            at_start.append(len(alive))
        h = encode(self, x)
        if torch.is_grad_enabled():
            alive.add(h)
        return h
    monkeypatch.setattr(VQModel, "encode", watch)
    assert train.main(command("vq", tmp_path / "run", "--steps", "5", "--amp", "off", preset="micro_gan")) == 0
    assert at_start == [0] * 5


# -------------------------------------------------------------------------------------------- the VQGAN objective

def test_a_preset_that_wants_lpips_says_how_to_get_it_or_do_without(tmp_path, capsys):
    argv = ["--stage", "vq", "--preset", "base", "--data", "figures:4", "--out", str(tmp_path), "--steps", "1"]
    assert train.main(argv) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    for word in ("--lpips-weights", "--download-lpips", "--perceptual off"):
        assert word in error
    assert not train.make_config(train.parse_args([*argv, "--perceptual", "off"])).recipe.loss.perceptual


def test_the_perceptual_and_the_adversarial_loss_are_trained_on_and_logged(tmp_path, monkeypatch):
    torch.manual_seed(0)
    lpips, paths = LPIPS(), []
    monkeypatch.setattr(formats.lpips, "load_lpips", lambda files: paths.extend(files) or lpips, raising=False)
    flags = ["--steps", "5", "--perceptual", "1", "--lpips-weights", "a.pth", "b.pth", "--disc-weight", "0.5",
             "--disc-start", "0.4"]
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    assert train.main(command("vq", tmp_path / "run", *flags)) == 0
    assert paths == ["a.pth", "b.pth"]
    rows = [r for r in train.read_log(tmp_path / "run/log.jsonl") if "lr" in r]
    assert all({"l1", "lpips"} <= r.keys() for r in rows)
    assert [("d_weight" in r, "logits_real" in r) for r in rows] == [(False, False)] * 2 + [(True, True)] * 3
    groups = checkpoint.load(tmp_path / "run/last.pt", "vq")["train"]["disc_optimizer"]["param_groups"]
    assert groups[0]["lr"] == rows[-1]["lr"]
    assert sum(p.numel() for p in lpips.parameters()) > 14e6 and not any("lpips" in k or "perceptual" in k
               for k in checkpoint.load(tmp_path / "run/last.pt", "vq")["train"])


@pytest.mark.parametrize("flags, words", [
    (["--disc-start", "5"], ["--disc-start is 5", "--disc-weight 0.75"]),
    (["--lpips-weights", "x.pth"], ["--lpips-weights", "--perceptual 1"]),
    (["--download-lpips"], ["--download-lpips is given", "--perceptual 1"]),
    (["--perceptual", "1", "--lpips-weights", "x.pth", "--download-lpips"], ["exclude each other"]),
    (["--disc-weight", "1", "--disc-start", "-5"], ["'-5'"]), (["--disc-start", "nan"], ["'nan'"]),
    (["--disc-weight", "1", "--disc-start", "off"], ["--disc-start", "'off' is not a number from 0 up"]),
    (["--perceptual", "none"], ["'none' is neither off nor a number from 0 up"]),
])
def test_flags_of_a_loss_that_is_off_say_how_to_switch_it_on(tmp_path, capsys, flags, words):
    try:
        assert train.main(command("vq", tmp_path, *flags)) == 2
    except SystemExit as e:
        assert e.code == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words) and "Traceback" not in error


@pytest.mark.parametrize("flag, value", [("--vq", "nonexist.pt"), ("--condition", "tokens"), ("--patience", "3")])
def test_flags_of_stage_two_are_not_ignored_in_stage_one(capsys, flag, value):
    with pytest.raises(SystemExit):
        train.main(["--stage", "vq", flag, value])
    assert f"{flag} is of stage 2" in capsys.readouterr().err


def test_flags_of_stage_one_are_not_ignored_in_stage_two(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.main(command("ldm", tmp_path, "--disc-weight", "1"))
    assert "--disc-weight is of stage 1" in capsys.readouterr().err
    assert train.main(["--preset", "base", "--dry-run", "--disc-start", "0.2", "--lpips-weights", "x.pth"]) == 0
    assert "discriminator from 20% of the run" in capsys.readouterr().out


def test_a_discriminator_that_was_asked_for_comes_in_as_softly_as_where_it_is_usual():
    loss = train.make_config(train.parse_args(["--stage", "vq", "--disc-weight", "0.5"])).recipe.loss
    assert loss == train.replace(train.VQGAN, perceptual=0.0, disc_weight=0.5)


def test_while_minutes_are_measured_the_adversary_takes_its_time_and_changes_nothing(tmp_path, monkeypatch):
    """Its extra passes are in the measured rate; the gradients are those without it, bit for bit."""
    monkeypatch.setattr(train, "MEASURE_STEPS", 3)
    ticking(monkeypatch)
    factors, generator = [], VQLoss.generator

    def watch(self, x, x_hat, codebook_loss, last_layer, factor):
        total, parts = generator(self, x, x_hat, codebook_loss, last_layer, factor)
        factors.append(factor)
        if factor == train.NO_SAY:
            without, _ = generator(self, x, x_hat, codebook_loss, last_layer, 0.0)
            grads = [torch.autograd.grad(loss, last_layer, retain_graph=True)[0] for loss in (total, without)]
            assert torch.equal(total, without) and torch.equal(*grads)
        return total, parts
    monkeypatch.setattr(VQLoss, "generator", watch)
    flags = ["--minutes", "0.05", "--disc-weight", "1", "--disc-start", "0.99"]
    assert train.main(command("vq", tmp_path / "run", *flags)) == 0
    assert factors[:3] == [train.NO_SAY] * 3 and factors[3] == 0


def test_the_faithful_preset_has_the_reference_objective_and_start_of_the_codes():
    recipe = train.PRESETS["danbooru"].vq
    assert recipe.loss == VQLossConfig(perceptual=1.0, disc_weight=0.8, disc_start=10_000) and not recipe.draw_codes


def test_a_published_stage_one_is_trained_on_and_the_full_file_is_too(tmp_path, capsys):
    """--vq takes a taming .ckpt, whose picture size nobody knows; what is trained on it samples from one file."""
    torch.manual_seed(0)
    state = VQModel(train.PRESETS["micro_plain"].vq_config).state_dict()
    torch.save({"state_dict": state | {"loss.discriminator.main.0.bias": torch.zeros(64)}}, tmp_path / "vq.ckpt")
    flags = ["--steps", "2", "--vq", str(tmp_path / "vq.ckpt")]
    assert train.main(command("ldm", tmp_path / "ldm", *flags, preset="micro_plain")) == 0
    made = checkpoint.load(tmp_path / "ldm/last.pt", "ldm")
    same(dict(made["vq"]), dict(state))
    assert made["vq_config"]["ch"] == 32 and made["config"]["size"] == 32
    assert train.main(command("ldm", tmp_path / "other", *flags, preset="f8")) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "f4 autoencoder with 3 latent channels, but preset f8" in error and "danbooru" in error


def test_an_autoencoder_of_another_kind_names_the_presets_that_fit(trained, tmp_path, capsys):
    argv = ["--stage", "ldm", "--preset", "f8", "--vq", str(trained / "vq/last.pt"), "--out", str(tmp_path)]
    assert train.main(argv) == 2
    error = capsys.readouterr().err.strip()
    assert "f4 autoencoder with 3 latent channels for pictures of 32 pixels" in error and "preset micro or " in error
    with pytest.raises(ValueError, match="preset toy or small or base or danbooru"):       # size unknown
        train.check_latents(train.make_config(train.parse_args(argv)), VQConfig(), None)


def test_ema_equals_the_reference(golden):
    model, average = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    shape = golden["ema/w0"].shape
    model.weight.data, average.weight.data = golden["ema/w0"].clone(), golden["ema/w0"].clone()
    ema = train.EMA(model, average, 0.9999)
    for n, w in enumerate(golden["ema/weights"]):
        model.weight.data.copy_(w.view(shape))
        ema.update(n + 1)
    torch.testing.assert_close(average.weight.data, golden["ema/shadow20"].view(shape), rtol=1e-5, atol=1e-6)


def test_the_learning_rate_is_the_one_typed_and_does_not_need_the_length_while_warming_up(tmp_path):
    c = train.make_config(train.parse_args(command("vq", tmp_path, "--steps", "100", "--lr", "0.01")))
    assert train.lr_at(1, c) == train.lr_at(1, train.replace(c, steps=None)) == 0.01
    assert train.lr_at(0, c) == 0.005
    assert train.lr_at(51, c) == pytest.approx(0.01 * (0.1 + 0.9 * 0.5))
    assert train.lr_at(100, c) == pytest.approx(0.001)


def test_dry_run_prints_the_recipe_of_the_seed(capsys):
    assert train.main(["--preset", "danbooru", "--dry-run"]) == 0
    out = capsys.readouterr().out
    for word in ("206,194,243", "22,337,411", "32,960,771", "batch 32", "lr 6.4e-05", "1000 steps", "256x256", "f4",
                 "64x64x3"):
        assert word in out, word


# --------------------------------------------------------------------------------------------------- checkpoints

class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_no_code_runs_from_a_checkpoint(tmp_path):
    torch.save({"format": 1, "stage": "vq", "x": Malicious(tmp_path / "owned")}, tmp_path / "torch.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Malicious(tmp_path / "owned")))
    for name in ("torch.pt", "plain.pt"):
        with pytest.raises(ValueError, match=name):
            checkpoint.load(tmp_path / name, "vq")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("content", ["cut", "text", "empty", "foreign"])
def test_a_damaged_checkpoint_is_one_sentence(trained, tmp_path, content):
    whole = (trained / "vq/last.pt").read_bytes()
    bad = tmp_path / "bad.pt"
    bad.write_bytes({"cut": whole[:len(whole) // 2], "text": b"hello", "empty": b"", "foreign": b""}[content])
    if content == "foreign":
        torch.save({"weights": torch.ones(1)}, bad)
    with pytest.raises(ValueError) as e:
        checkpoint.load(bad, "vq")
    assert "bad.pt" in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("start", [b"a text", b".", b"R", b"K", b"\x80\x02}"])
def test_any_other_file_is_one_sentence(tmp_path, start):
    (tmp_path / "bad.pt").write_bytes(start)
    with pytest.raises(ValueError, match="bad.pt cannot be read as a checkpoint"):
        checkpoint.load(tmp_path / "bad.pt", "vq")


def test_a_checkpoint_with_a_wrong_byte_is_not_trusted(trained, tmp_path):
    """torch opens it without a word: the byte is a weight's."""
    whole = (trained / "vq/last.pt").read_bytes()
    weight = torch.load(trained / "vq/last.pt", weights_only=True)["vq"]["quantize.embedding.weight"]
    at = whole.index(weight.numpy().tobytes())
    path = tmp_path / "last.pt"
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 64]) + whole[at + 1:])
    torch.load(path, weights_only=True)
    with pytest.raises(ValueError, match="is damaged: the checksum of"):
        checkpoint.load(path, "vq")


def test_a_state_that_does_not_fit_names_keys_and_both_shapes():
    state = VQModel(MICRO.vq_config).state_dict()
    state["quantize.embedding.weight"] = torch.zeros(7, 3)
    del state["quant_conv.bias"]
    with pytest.raises(ValueError) as e:
        checkpoint.fill(VQModel(MICRO.vq_config), state, "x.pt")
    for word in ("x.pt", "quantize.embedding.weight", "(7, 3)", "(32, 3)", "quant_conv.bias", "lacks it"):
        assert word in str(e.value)


def test_the_hash_sees_every_value():
    state = VQModel(MICRO.vq_config).state_dict()
    before = checkpoint.hash_of(state)
    assert before == checkpoint.hash_of({k: v.clone() for k, v in reversed(state.items())})
    state["quant_conv.bias"][0] += 1e-6
    assert checkpoint.hash_of(state) != before


@pytest.mark.parametrize("preset, condition, context, concat", [
    ("toy", None, None, 17), ("toy", "tokens", 64, 0), ("base", "tokens+maps", 256, 17), ("danbooru", None, 17, 0),
])
def test_how_the_pose_enters_can_be_chosen(preset, condition, context, concat):
    flags = ["--stage", "ldm", "--preset", preset] + (["--condition", condition] if condition else [])
    c = train.make_config(train.parse_args(flags))
    assert "+".join(c.cond_config.doors) == (condition or ("seed" if preset == "danbooru" else "maps"))
    assert c.unet_config.context_dim == context and c.unet_config.in_channels == 3 + concat


def test_a_context_width_that_differs_is_refused():
    unet = train.UNetConfig(in_channels=3, model_channels=32, channel_mult=(1,), attention_resolutions=(1,),
                            num_heads=2, context_dim=None)
    with pytest.raises(ValueError, match="would not reach the UNet"):
        LDM(VQModel(MICRO.vq_config), unet, ConditionConfig(("seed",)), torch.zeros(3, 1, 1),
            torch.ones(3, 1, 1), {}, True)


# ------------------------------------------------------------------------------------------------------- mistakes

def one_sentence(capsys, code: int, *words: str) -> None:
    captured = capsys.readouterr()
    assert code == 2 and "Traceback" not in captured.err
    message = captured.err.strip().splitlines()
    assert len(message) == 1, captured.err
    for word in words:
        assert word in message[0], message[0]


@pytest.mark.parametrize("flags, words", [
    (["--data", "nowhere"], ["nowhere"]),
    (["--data", "figures:many"], ["figures:many"]),
    (["--preset", "huge"], ["huge", "toy"]),
    (["--steps", "-3"], ["--steps", "-3"]),
    (["--minutes", "0"], ["--minutes", "0"]),
    (["--lr", "nan"], ["--lr", "nan"]),
    (["--batch-size", "0"], ["--batch-size", "0"]),
    (["--device", "tpu"], ["tpu", "cuda"]),
    (["--amp", "fp16"], ["fp16", "bf16"]), (["--seed", "-1"], ["--seed", "-1"]),
    (["--seed", str(2 ** 64)], ["--seed"]), (["--workers", "-1"], ["--workers"]),
    (["--val", "somewhere"], ["--val", "somewhere"]),
    pytest.param(["--device", "cuda"], ["cuda", "no CUDA GPU"],
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")),
])
def test_a_wrong_value_is_one_sentence(tmp_path, capsys, flags, words):
    # the last of two equal flags counts
    one_sentence(capsys, train.main([*command("vq", tmp_path / "run"), *flags]), *words)


def test_an_unwritable_folder_is_one_sentence(tmp_path, capsys):
    (tmp_path / "file").touch()
    one_sentence(capsys, train.main(command("vq", tmp_path / "file/run")), "file/run", "--out")


def test_stage_two_without_stage_one_with_that_of_another_stage_two_and_with_one_of_another_size(
        trained, tmp_path, capsys):
    one_sentence(capsys, train.main(command("ldm", tmp_path / "a", "--vq", str(tmp_path / "no.pt"))),
                 "no.pt", "train.py --stage vq")
    another = trained / "ldm/last.pt"
    assert train.main(command("ldm", tmp_path / "b", "--vq", str(another), "--steps", "1")) == 0
    same(*(dict(checkpoint.load(path, "ldm")["vq"]) for path in (another, tmp_path / "b/last.pt")))
    capsys.readouterr()
    toy = ["--stage", "ldm", "--data", "figures:4", "--steps", "1", "--out", str(tmp_path / "c"),
           "--vq", str(trained / "vq/last.pt")]
    one_sentence(capsys, train.main(toy), "32 pixels", "64")


def test_pictures_that_cannot_be_used(tmp_path, capsys):
    root = folder(tmp_path / "few", 20)
    (root / "keypoints/clip1_003.json").unlink()
    one_sentence(capsys, train.main([*command("vq", tmp_path / "a"), "--data", str(root)]), "clip1_003")
    root = folder(tmp_path / "cut", 20)
    picture = next(p for p in sorted((root / "images").iterdir()))
    picture.write_bytes(picture.read_bytes()[:60])
    code = train.main([*command("vq", tmp_path / "b", "--steps", "40"), "--data", str(root)])
    error = capsys.readouterr().err
    assert code == 2 and "Traceback" not in error and picture.name in error.splitlines()[-1]
    assert picture.name in (tmp_path / "b/broken.txt").read_text()


@pytest.mark.parametrize("argv", [["--stage", "vq", "--smoke"], ["--stage", "three"], [],
                                  ["--stage", "vq", "--steps", "3", "--minutes", "1"]])
def test_an_unknown_flag_ends_with_what_is_allowed(capsys, argv):
    with pytest.raises(SystemExit) as e:
        train.main(argv)
    assert e.value.code == 2 and "Traceback" not in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- sampling

POSES = sorted(str(p) for p in (ROOT / "examples/poses").glob("*.json"))


def test_sampling_a_row_for_each_pose(trained, tmp_path, capsys):
    out = tmp_path / "grid.png"
    assert sample.main([*POSES[:3], "--ckpt", str(trained / "ldm/last.pt"), "-n", "2", "--steps", "3",
                        "--out", str(out)]) == 0
    assert "6 pictures" in capsys.readouterr().out and Image.open(out).size[1] > 3 * 100


def rewritten(trained, tmp_path, **changes) -> str:
    """The trained stage 2 with other entries; None removes one."""
    payload = torch.load(trained / "ldm/last.pt", weights_only=True) | changes
    checkpoint.save(tmp_path / "other.pt", {key: value for key, value in payload.items() if value is not None})
    return str(tmp_path / "other.pt")


def spy_on_poses(monkeypatch) -> list[torch.Tensor]:
    """What is drawn from now on: poses [B, 17, 3], a tensor for each call."""
    drawn, denoise = [], sample.denoise
    monkeypatch.setattr(sample, "denoise",
                        lambda ldm, poses, *args, **how: drawn.append(poses) or denoise(ldm, poses, *args, **how))
    return drawn


def test_a_checkpoint_carries_training_poses_spread_over_all(trained, monkeypatch):
    wanted = np.stack([Figures(12, 32).source(i)[1] for i in range(12)])
    for name in ("last.pt", "best.pt"):
        _, payload = checkpoint.load_ldm(path := trained / "ldm" / name)
        assert payload["poses"].dtype == torch.float16
        np.testing.assert_allclose(checkpoint.training_poses(payload, path), wanted, atol=1 / 2048)
    cache = type("Cache", (), {"poses": np.ones((30, 17, 3), np.float32), "__len__": lambda self: 26})()
    cache.poses[:, 0, 0] = np.arange(30)                            # the last four rows were never filled
    cache.poses[4, :, 2] = 0                                        # picture 2 has no visible joint
    assert train.poses_kept(cache)[:, 0, 0].tolist() == [0, 2, *range(6, 26, 2)]
    monkeypatch.setattr(train, "POSES_KEPT", 4)
    assert train.poses_kept(cache)[:, 0, 0].tolist() == [0, 10, 16, 24]


def test_every_pose_is_told_how_unusual_it_is(trained, tmp_path, capsys, monkeypatch):
    """Planted: standing.json is what the model was trained on, a pose of random joints is far from everything."""
    standing, drawn = str(ROOT / "examples/poses/standing.json"), spy_on_poses(monkeypatch)
    (pose,), _ = sample.read_poses([standing])
    rng = np.random.default_rng(0)
    poses = torch.from_numpy(np.repeat(pose[None], 50, axis=0) + rng.normal(0, 0.01, (50, 17, 3)) * [1, 1, 0]).half()
    (tmp_path / "absurd.json").write_text(json.dumps([[*xy, 1] for xy in rng.uniform(0.1, 0.9, (17, 2)).tolist()]))
    flags = ["--ckpt", rewritten(trained, tmp_path, poses=poses), "-n", "1", "--steps", "1",
             "--out", str(tmp_path / "x.png")]
    capsys.readouterr()
    labels, save_grid = [], plots.save_grid
    monkeypatch.setattr(plots, "save_grid",
                        lambda *args, **how: labels.extend(how["labels"]) or save_grid(*args, **how))
    assert sample.main([standing, str(tmp_path / "absurd.json"), *flags]) == 0
    out = capsys.readouterr().out.splitlines()
    assert "standing: further out than 0 % of the training poses" in out
    assert ("absurd: further out than 100 % of the training poses; --typical 0.5 pulls it halfway to its nearest ones"
            in out)
    assert labels == ["standing, further out than 0 %", "absurd, further out than 100 %"]

    assert sample.main([str(tmp_path / "absurd.json"), *flags, "--typical", "1"]) == 0
    assert "absurd: further out than 100 % of the training poses; with --typical 1 than 0 %" in capsys.readouterr().out
    (_, given), (pulled,) = drawn
    density = extras.density.PoseDensity(poses.double().numpy())
    np.testing.assert_allclose(pulled, density.typical(given[None].numpy(), 1.0)[0], atol=1e-6)
    assert labels[2:] == ["absurd, further out than 0 %"]


def test_common_poses_need_no_file(trained, tmp_path, monkeypatch, capsys):
    drawn, ckpt = spy_on_poses(monkeypatch), str(trained / "ldm/last.pt")
    out = tmp_path / "common.png"
    assert sample.main(["--common", "3", "--ckpt", ckpt, "-n", "2", "--steps", "1", "--out", str(out)]) == 0
    density = extras.density.PoseDensity(checkpoint.training_poses(checkpoint.load(ckpt, "ldm"), ckpt))
    assert len(set(density.common(3))) == 3
    np.testing.assert_array_equal(drawn[0][::2], density.poses[density.common(3)])
    assert "6 pictures" in capsys.readouterr().out and Image.open(out).size[1] > 3 * 100
    one_sentence(capsys, sample.main(["--common", "13", "--ckpt", ckpt]), "13 common poses", "1 to 12")


def test_a_checkpoint_without_poses_samples_as_before_and_says_what_to_do(trained, tmp_path, monkeypatch, capsys):
    flags = ["--ckpt", rewritten(trained, tmp_path, poses=None), "-n", "1", "--steps", "1",
             "--out", str(tmp_path / "x.png")]
    drawn = spy_on_poses(monkeypatch)
    assert sample.main([POSES[0], *flags]) == 0
    assert "further out" not in capsys.readouterr().out
    (pose,), _ = sample.read_poses(POSES[:1])
    np.testing.assert_array_equal(drawn[0][0], pose)
    assert sample.main([POSES[0], "--ckpt", str(trained / "ldm/last.pt"), *flags[2:]]) == 0
    assert torch.equal(*drawn)                                      # --typical 0 changes no bit
    capsys.readouterr()
    one_sentence(capsys, sample.main(["--common", "2", *flags]), "--common", "other.pt", "train.py --stage ldm")
    code, captured = sample.main([POSES[0], "--typical", "0.5", *flags]), capsys.readouterr()
    assert code == 2 and "--typical" in captured.err and "train.py --stage ldm" in captured.err
    for none in (torch.zeros(0, 17, 3).half(), torch.zeros(5, 17, 3).half()):
        assert checkpoint.training_poses({"poses": none}, tmp_path / "other.pt") is None


@pytest.mark.parametrize("poses, words", [
    (torch.ones(4, 17, 3), ["float32 [4, 17, 3]", "float16 [N, 17, 3]"]),
    (torch.ones(4, 16, 3).half(), ["[4, 16, 3]"]), (torch.ones(()).half(), ["[]"]), ([1, 2], ["list"]),
    (torch.ones(2, 17, 3).half().to_sparse(), ["float16 [N, 17, 3]"]),
    (torch.full((2, 17, 3), torch.nan).half(), ["not finite"]),
    (torch.ones(1).half().expand(10 ** 9, 17, 3), ["does not hold as many numbers", "poses"]),
])
def test_damaged_poses_in_a_checkpoint_are_one_sentence(trained, tmp_path, capsys, poses, words):
    ckpt = rewritten(trained, tmp_path, poses=poses)
    one_sentence(capsys, sample.main(["--common", "2", "--ckpt", ckpt, "--out", str(tmp_path / "x.png")]),
                 "other.pt", *words)


@pytest.mark.parametrize("argv, words", [
    ([], ["pose files", "--common"]), ([POSES[0], "--common", "3"], ["--common", POSES[0]]),
    (["--common", "0"], ["--common is 0"]), ([POSES[0], "--typical", "1.5"], ["--typical is 1.5"]),
    ([POSES[0], "--typical", "nan"], ["--typical is nan"]), (["--common", "2", "--typical", "0.5"], ["--typical"]),
])
def test_poses_that_nobody_or_two_ask_for_are_one_sentence(trained, tmp_path, capsys, argv, words):
    flags = ["--ckpt", str(trained / "ldm/last.pt"), "--out", str(tmp_path / "x.png")]
    one_sentence(capsys, sample.main([*argv, *flags]), *words)


def test_a_picture_depends_on_its_seed_and_pose_alone(trained):
    ldm, _ = checkpoint.load_ldm(trained / "ldm/last.pt")
    poses = torch.from_numpy(np.stack(sample.read_poses(POSES[:4])[0])).float()

    def run(which, seeds):
        *_, last = sample.sample(ldm, poses[which], seeds, 32, **sample.settings(ldm, "ddim", 4, eta=0.5))
        return last.x
    together = run([0, 1, 2, 3], [5, 6, 7, 5])
    torch.testing.assert_close(together[2:3], run([2], [7]), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together[0], together[3])          # same seed, other pose
    assert not torch.allclose(run([0], [6]), together[:1])       # other seed, same pose
    assert torch.equal(run([0], [5]), run([0], [5]))


@pytest.mark.parametrize("flags, words", [
    (["--ckpt", "none.pt"], ["none.pt", "python train.py --stage ldm"]),
    (["-n", "0"], ["-n", "0"]), (["--steps", "0"], ["steps", "0", "1000"]), (["--steps", "1001"], ["1001", "1000"]),
    (["--eta", "2"], ["eta", "2"]),
    (["--sampler", "ddpm"], ["--steps", "ddim"]), (["--guidance", "nan"], ["--guidance", "nan"]),
    (["--seed", "-1"], ["--seed"]),
    (["--out", "x.txt"], ["x.txt", ".png"]), (["--out", "/proc/none/x.png"], ["/proc/none"]),
    (["--device", "tpu"], ["tpu", "cuda"]),
])
def test_sampling_mistakes_are_one_sentence(trained, tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.chdir(tmp_path)
    code = sample.main([POSES[0], "--ckpt", str(trained / "ldm/last.pt"), "--steps", "2", *flags])
    error = capsys.readouterr().err
    assert code == 2 and "Traceback" not in error and error.splitlines()[-1].startswith("sample.py: ")
    for word in words:
        assert word in error.splitlines()[-1], error


def test_guidance_needs_a_model_that_knows_no_pose(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(train.PRESETS, "micro", train.replace(MICRO, ldm=train.replace(MICRO.ldm, p_drop=0.0)))
    forwards, begin = [], train.Run.begin
    monkeypatch.setattr(train.Run, "begin", lambda run, *args: forwards.append(args[2]) or begin(run, *args))
    assert train.main(command("ldm", tmp_path / "ldm", "--steps", "1", "--vq", str(trained / "vq/last.pt"))) == 0
    assert "without" not in capsys.readouterr().out             # its loss under no pose would mean nothing
    assert "val_null" not in train.read_log(tmp_path / "ldm/log.jsonl")[-1]
    assert forwards == [(train.EVAL_PASSES - 1) * 4 + 2 * train.PREVIEWS * train.PREVIEW_STEPS]
    ldm, _ = checkpoint.load_ldm(tmp_path / "ldm/last.pt")
    assert (ldm.guidance, ldm.eta) == (1, 0)
    flags = [POSES[0], "--ckpt", str(tmp_path / "ldm/last.pt"), "--steps", "2", "--out", str(tmp_path / "x.png")]
    assert sample.main([*flags, "-n", "1"]) == 0
    capsys.readouterr()
    one_sentence(capsys, sample.main([*flags, "--guidance", "3"]), "--guidance", "without dropping poses")


def test_ddpm_takes_all_steps(trained, tmp_path, monkeypatch):
    steps, schedule = [], {"timesteps": 60, "linear_start": 0.0015, "linear_end": 0.0195}
    monkeypatch.setattr(sample.tqdm, "update", lambda bar, n=1: steps.append(n))
    assert sample.main([POSES[0], "--ckpt", rewritten(trained, tmp_path, schedule=schedule), "-n", "1", "--sampler",
                        "ddpm", "--out", str(tmp_path / "x.png")]) == 0
    assert len(steps) == 60


def test_a_pose_file_that_is_not_there(trained, capsys):
    one_sentence(capsys, sample.main(["none.json", "--ckpt", str(trained / "ldm/last.pt")]), "none.json")


# ------------------------------------------------------------------------------------------------------- measures

def test_psnr_is_the_closed_form():
    x = torch.zeros(1, 3, 4, 4)
    assert metrics.images.psnr(x + 0.2, x).item() == pytest.approx(20.0, abs=1e-4)            # an error of 0.1 on 0..1
    assert metrics.images.psnr(x + 5, x + 1).item() == pytest.approx(120, abs=1e-3)           # clamped first


def test_reconstruction_counts_the_codes_of_the_whole_set():
    torch.manual_seed(0)
    model = VQModel(MICRO.vq_config)
    x = torch.rand(10, 3, 32, 32) * 2 - 1
    model.quantize.init_codes(model.encode(x))
    result = metrics.images.reconstruction(model, [x[:4], x[4:]])
    x_hat, _, indices = model(x)
    p = np.bincount(indices.flatten().numpy(), minlength=32) / indices.numel()
    assert result["codes_used"] == (p > 0).mean() and result["pictures"] == 10
    assert result["perplexity"] == pytest.approx(np.exp(-(p[p > 0] * np.log(p[p > 0])).sum()), rel=1e-4)
    assert result["psnr"] == pytest.approx(metrics.images.psnr(x_hat, x).mean().item(), rel=1e-4)
    box = x.view(10, 3, 8, 4, 8, 4).mean((3, 5)).repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert result["psnr_box"] == pytest.approx(metrics.images.psnr(box, x).mean().item(), rel=1e-4)


def test_a_derangement_moves_everything():
    for n in (2, 3, 50):
        order = metrics.condition.derangement(n, 0)
        assert sorted(order) == list(range(n)) and (order != np.arange(n)).all()


def test_the_condition_ratio_is_one_without_the_pose_and_above_with_it():
    """A model that knows x0 from the pose alone is right with the right pose and wrong with a shuffled one."""
    diffusion = Diffusion()
    torch.manual_seed(0)
    poses = torch.rand(40, 17, 3)
    z = poses[:, :1, :1, None].expand(-1, 3, 4, 4).clone()

    def deaf(x_t, t, pose, drop):
        return torch.zeros_like(x_t)

    def listening(x_t, t, pose, drop):
        x0 = torch.where(drop[:, None, None, None], torch.tensor(0.5), pose[:, :1, :1, None])
        a = diffusion.alphas_bar[t].float()[:, None, None, None]
        return (x_t - a.sqrt() * x0) / (1 - a).sqrt()
    result = metrics.condition.condition_losses(deaf, diffusion, z, poses, batch_size=16)
    assert result["ratio"] == 1 and result["null"] == result["right"]
    result = metrics.condition.condition_losses(listening, diffusion, z, poses, batch_size=16)
    assert result["right"] < 1e-6 < 1e-4 < result["null"] < result["shuffled"]


def test_the_commands_repeat_what_training_measured(trained, tmp_path, capsys):
    """On the data they were trained with, where nothing else is said; training measures in bf16."""
    assert evaluate.main(["recon", "--vq", str(trained / "vq/last.pt"), "--out", str(tmp_path)]) == 0
    found, = json.loads((tmp_path / "recon.json").read_text())["checkpoints"]
    logged = train.read_log(trained / "vq/log.jsonl")[-1]
    assert found["psnr"] == pytest.approx(logged["val_psnr"], rel=2e-2)
    assert found["l1"] == pytest.approx(logged["val_l1"], rel=2e-2)
    capsys.readouterr()
    assert evaluate.main(["condition", "--ckpt", str(trained / "ldm/last.pt")]) == 0
    printed = {line.split()[0]: float(line.split()[1]) for line in capsys.readouterr().out.splitlines()}
    assert printed["ratio"] == pytest.approx(train.read_log(trained / "ldm/log.jsonl")[-1]["val_ratio"], rel=2e-2)


def test_figures_for_training_and_validation_differ():
    ours, held_out = data.open_data("figures:6", 32)
    assert not any(np.array_equal(ours[i][0], held_out[j][0]) for i in range(6) for j in range(6))
