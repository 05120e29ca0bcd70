"""The training engine: micro-batches, checkpointing, several processes, forecasts."""
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_train import MICRO, as_micro, command, trained  # noqa: F401  (trained is a fixture)

import train
import unet
import vq
from vq import VQConfig, VQLossConfig

ROOT = Path(__file__).parent.parent
PATIENCE = 600                      # seconds for a process, before it counts as hung


@pytest.fixture(autouse=True)
def presets(monkeypatch):
    as_micro(monkeypatch)
    monkeypatch.setitem(train.PRESETS, "micro_plain", train.replace(
        MICRO, vq_config=VQConfig(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, n_embed=32, resolution=32)))
    monkeypatch.setattr(unet, "zero", lambda module: module)        # or the first gradient reaches the last layer only
    monkeypatch.setattr(vq, "zero_", lambda module, config: module)


@pytest.fixture
def stage_one(trained) -> str:  # noqa: F811
    """A checkpoint of stage 1, for stage 2 to work on."""
    return str(trained / "vq/last.pt")


def gradients(monkeypatch, argv: list[str], steps: int = 1) -> list[dict[str, torch.Tensor]]:
    """Of every parameter at each optimiser step of a run, before clipping."""
    found, descend = [], train.descend

    def watch(loss, params, opt, scaler, run, step):
        found.append({i: p.grad.clone() for i, p in enumerate(params) if p.grad is not None} | {"loss": loss.clone()})
        return descend(loss, params, opt, scaler, run, step)
    with monkeypatch.context() as m:
        m.setattr(train, "descend", watch)
        assert train.main([*argv, "--steps", str(steps)]) == 0
    return found


def error(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest difference between two sets of gradients, in units of the largest gradient."""
    assert a.keys() == b.keys() and sum(v.abs().max() > 0 for v in a.values()) > 0.9 * len(a)
    scale = max(v.abs().max() for k, v in a.items() if k != "loss")
    return max(((a[k] - b[k]).abs().max() / (1 if k == "loss" else scale)).item() for k in a)


# ------------------------------------------------------------------------------- micro-batches and checkpointing

@pytest.mark.parametrize("stage, preset", [("vq", "micro"), ("vq", "micro_plain"), ("ldm", "micro")])
def test_the_gradients_of_micro_batches_add_up_to_those_of_the_batch(stage_one, tmp_path, monkeypatch, stage, preset):
    """Parts of one, of two, and of three and one: the last are weighed by how many they are."""
    flags = ["--vq", stage_one, "--amp", "off"]
    whole, = gradients(monkeypatch, command(stage, tmp_path / "whole", *flags, preset=preset))
    for size in 1, 2, 3:
        argv = command(stage, tmp_path / str(size), *flags, "--micro-batch", str(size), preset=preset)
        parts, = gradients(monkeypatch, argv)
        assert error(whole, parts) < 1e-4


def test_the_codebook_sees_the_whole_batch_whatever_the_micro_batch(tmp_path):
    codes = []
    for size in "4", "1":
        assert train.main(command("vq", tmp_path / size, "--amp", "off", "--micro-batch", size, "--steps", "3")) == 0
        state = train.checkpoint.load(tmp_path / size / "last.pt", "vq")
        codes.append((state["vq"]["quantize.embedding.weight"], state["train"]["usage"]))
    assert torch.allclose(*(c for c, _ in codes), atol=1e-4) and torch.allclose(*(u for _, u in codes), atol=1e-4)


@pytest.mark.parametrize("stage, preset", [("vq", "micro"), ("vq", "micro_plain"), ("ldm", "micro")])
def test_checkpointing_changes_no_gradient_under_autocast(stage_one, tmp_path, monkeypatch, stage, preset):
    flags = ["--vq", stage_one, "--amp", "bf16"]
    without, = gradients(monkeypatch, command(stage, tmp_path / "without", *flags, preset=preset))
    used, honest = [], torch.utils.checkpoint.checkpoint

    def count(*args, **kwargs):
        used.append(1)
        return honest(*args, **kwargs)
    monkeypatch.setattr("unet.checkpoint" if stage == "ldm" else "vq.checkpoint", count)
    argv = command(stage, tmp_path / "with", *flags, "--checkpointing", preset=preset)
    assert error(without, gradients(monkeypatch, argv)[0]) < 1e-3 and used


def test_the_adversary_works_with_checkpointing_and_micro_batches(tmp_path, monkeypatch):
    """Two backward passes through one graph, for the adaptive weight, are what checkpoints could break."""
    gan = train.replace(MICRO, vq=train.replace(MICRO.vq, loss=VQLossConfig(disc_weight=1.0)))
    monkeypatch.setitem(train.PRESETS, "micro_gan", gan)
    found = [gradients(monkeypatch, command("vq", tmp_path / name, "--amp", "off", *flags, preset="micro_gan"))
             for name, flags in (("a", []), ("b", ["--checkpointing"]))]
    assert len(found[0]) == len(found[1]) == 2                          # the autoencoder, the discriminator
    assert all(error(a, b) < 1e-4 for a, b in zip(*found, strict=True))
    assert train.main(command("vq", tmp_path / "c", "--micro-batch", "2", "--steps", "3", preset="micro_gan")) == 0
    rows = train.read_log(tmp_path / "c/log.jsonl")
    assert all(name in rows[-2] for name in ("g", "d_weight", "d_loss", "logits_real", "logits_fake"))


# ------------------------------------------------------------------------------------------- several processes

WORKER = f"""
import os, sys, time
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import torch
torch.set_num_threads(1)
import pytest, train, test_train, unet, vq
test_train.as_micro(pytest.MonkeyPatch())
unet.zero, vq.zero_ = lambda module: module, lambda module, config: module
gan = train.VQLossConfig(disc_weight=1.0)
train.PRESETS["micro_gan"] = train.replace(test_train.MICRO, vq=train.replace(test_train.MICRO.vq, loss=gan))
folder, argv = sys.argv[1], sys.argv[2:]
hold = os.environ.get("HOLD")                       # a file: before step 20 the run waits for it
descend = train.descend
def watch(loss, params, opt, scaler, run, step):
    while hold and step == 20 and not os.path.exists(hold):
        time.sleep(0.01)
    if folder != "-":
        found = {{i: p.grad for i, p in enumerate(params)}} | {{"loss": loss}}
        torch.save(found, f"{{folder}}/{{train.rank()}}-{{step}}.pt")
    return descend(loss, params, opt, scaler, run, step)
train.descend = watch
sys.exit(train.main(argv))
"""


def start_ranks(world: int, argv: list[str], folder: Path | str = "-", **more: str) -> list[subprocess.Popen]:
    """What torchrun does: `world` processes that know of each other by their environment, to which `more` is added."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    known = os.environ | {"WORLD_SIZE": str(world), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)} | more
    return [subprocess.Popen([sys.executable, "-c", WORKER, str(folder), *argv], text=True, stderr=subprocess.PIPE,
                             stdout=subprocess.PIPE, env=known | {"RANK": str(r), "LOCAL_RANK": str(r)})
            for r in range(world)]


def ends(processes: list[subprocess.Popen]) -> tuple[list[int], list[str], list[str]]:
    """Exit codes, what they printed, and what they printed to stderr; kills what has hung."""
    until, out, err = time.monotonic() + PATIENCE, [], []
    for p in processes:
        try:
            o, e = p.communicate(timeout=max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            p.kill()
            o, e = p.communicate()
        out.append(o), err.append(e)
    return [p.returncode for p in processes], out, err


def wait_for_lines(log: Path, n: int, ranks: list[subprocess.Popen]) -> None:
    until = time.monotonic() + PATIENCE
    while not log.exists() or log.read_text().count("\n") < n:
        assert time.monotonic() < until and ranks[0].poll() is None
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["vq", "ldm"])
def test_two_processes_have_the_gradient_of_one_with_the_joined_batch(stage_one, tmp_path, monkeypatch, stage):
    flags = ["--vq", stage_one, "--amp", "off", "--micro-batch", "1"]
    one = gradients(monkeypatch, command(stage, tmp_path / "one", *flags), steps=3)
    (tmp_path / "found").mkdir()
    argv = [*command(stage, tmp_path / "two", *flags), "--steps", "3"]
    codes, _, err = ends(start_ranks(2, argv, tmp_path / "found"))
    assert codes == [0, 0], err
    for step in range(3):       # later steps compare weights and, in stage 1, the codes that both ranks have moved
        two = [torch.load(tmp_path / f"found/{r}-{step}.pt") for r in range(2)]
        assert error(*two) == 0
        assert error(one[step], two[0]) < (1e-4 if step == 0 else 1e-3)
    if stage == "vq":           # counted and moved by what both ranks saw
        one_, two_ = (train.checkpoint.load(tmp_path / name / "last.pt", "vq") for name in ("one", "two"))
        assert torch.allclose(one_["train"]["usage"], two_["train"]["usage"], atol=1e-4)
        weight = "quantize.embedding.weight"
        assert torch.allclose(one_["vq"][weight], two_["vq"][weight], atol=1e-3)
    rows = [train.read_log(tmp_path / name / "log.jsonl") for name in ("one", "two")]
    assert [r["step"] for r in rows[0]] == [r["step"] for r in rows[1]]         # rank 0 alone writes, once
    assert not [line for line in err[1].splitlines() if "vq:" in line or "ldm:" in line]


@pytest.mark.slow
def test_the_adversary_too_is_the_same_in_two_processes(tmp_path):
    (tmp_path / "found").mkdir()
    argv = [*command("vq", tmp_path / "run", "--amp", "off", preset="micro_gan"), "--steps", "3"]
    codes, _, err = ends(start_ranks(2, argv, tmp_path / "found"))
    assert codes == [0, 0], err
    for step in range(3):                           # what was saved last of a step is the discriminator's
        assert error(*(torch.load(tmp_path / f"found/{r}-{step}.pt") for r in range(2))) == 0


@pytest.mark.slow
def test_a_run_of_two_processes_stops_together_and_one_goes_on(tmp_path):
    """SIGTERM reaches the ranks at different moments; both must stop after the same step."""
    argv = [*command("vq", tmp_path / "run", "--amp", "off"), "--steps", "40"]
    ranks = start_ranks(2, argv, HOLD=str(tmp_path / "go"))     # or it may have ended before the signal comes
    log = tmp_path / "run/log.jsonl"
    wait_for_lines(log, 2, ranks)
    ranks[1].send_signal(signal.SIGTERM)            # to one alone: the other must hear of it
    (tmp_path / "go").touch()
    codes, out, err = ends(ranks)
    assert codes == [train.INTERRUPTED] * 2, err
    assert "the same command again goes on" in out[0] and not out[1].strip()
    step = train.checkpoint.load(tmp_path / "run/last.pt", "vq")["step"]
    assert 0 < step < 40
    assert train.main(argv) == 0                    # one process, the same batch
    steps = [r["step"] for r in train.read_log(log) if "lr" in r]
    assert steps == sorted(set(steps)) and steps[-1] == 39


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_others_with_a_sentence(tmp_path, victim):
    ranks = start_ranks(2, [*command("vq", tmp_path / "run", "--amp", "off"), "--steps", "100000"])
    wait_for_lines(tmp_path / "run/log.jsonl", 2, ranks)
    ranks[victim].kill()
    codes, _, err = ends(ranks)
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == train.LOST     # by itself, not as hung
    last = err[1 - victim].strip().splitlines()[-1]
    assert f"rank {1 - victim} of 2" in last and "another rank is gone" in last and "goes on from" in last
    assert "Traceback" not in err[1 - victim]


@pytest.mark.parametrize("flags, words", [(["--batch-size", "3"], "batch of 3 cannot be shared by 2"),
                                          (["--device", "cuda:0"], "cannot share one GPU"),
                                          (["--device", "cuda"], "there are 0 GPUs"),
                                          (["--fit", "8"], "--fit rehearses")])
def test_what_several_processes_cannot_do_is_said_once(tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.setattr(train.dist, "init_process_group", lambda *a, **k: pytest.fail("too late"))
    monkeypatch.setattr(train.checkpoint, "find_device", lambda name: "cpu" if name == "auto" else name)
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = []
    for r in "0", "1":
        monkeypatch.setenv("RANK", r), monkeypatch.setenv("LOCAL_RANK", r)
        assert train.main(["--stage", "vq", "--preset", "micro", "--out", str(tmp_path / "run"), *flags]) == 2
        said.append(capsys.readouterr().err.strip())
    assert words in said[0] and "\n" not in said[0] and said[1] == ""


# ------------------------------------------------------------------------------------------------- forecasts

def test_fit_takes_the_largest_micro_batch_that_stays_within(tmp_path, monkeypatch):
    def rehearse(c, pictures):
        return train.Forecast(2.0 + (0.25 if c.checkpointing else 1.0) * pictures, 1.0)
    monkeypatch.setattr(train, "rehearse", rehearse)
    monkeypatch.setattr(train, "MARGIN", 1.0)
    c = train.make_config(train.parse_args(command("ldm", tmp_path, "--batch-size", "32")))
    chosen = {}
    for gib in (40, 34, 33.9, 18, 12, 10, 9.9, 4.1, 2.25):
        fitted = train.fit(c, gib)
        chosen[gib] = fitted.micro_batch, fitted.checkpointing
        assert rehearse(fitted, fitted.micro_batch).memory <= gib
        assert fitted.recipe == c.recipe                    # what is trained stays the same
    assert chosen == {40: (32, False), 34: (32, False), 33.9: (16, False), 18: (16, False), 12: (8, False),
                      10: (8, False), 9.9: (16, True), 4.1: (8, True), 2.25: (1, True)}
    with pytest.raises(ValueError, match="--fit is 2.2 GiB, but preset micro needs 2.2 with one"):
        train.fit(c, 2.2)


def test_fit_where_two_pictures_are_too_many_for_the_machine(tmp_path, monkeypatch):
    one = [20.0]
    monkeypatch.setattr(train, "rehearse", lambda c, pictures: train.Forecast((*one, math.inf)[pictures - 1], 1.0))
    c = train.make_config(train.parse_args(command("ldm", tmp_path)))
    assert train.fit(c, 40).micro_batch == 1
    with pytest.raises(ValueError, match="--fit is 1 GiB, but preset micro needs 20.0 with one"):
        train.fit(c, 1)
    one[:] = [math.inf]
    with pytest.raises(ValueError, match="needs more than this machine has with one"):
        train.fit(c, 40)


def test_a_forecast_draws_on_straight_lines_where_the_whole_would_take_too_long(tmp_path, monkeypatch):
    """A step of n pictures takes 3 + 5 n seconds: with patience for all of them, for 17, or for two only."""
    asked = []

    def rehearse(c, pictures):
        asked.append(pictures)
        return train.Forecast(2.0 + pictures, 3.0 + 5 * pictures)
    monkeypatch.setattr(train, "rehearse", rehearse)
    c = train.make_config(train.parse_args(command("ldm", tmp_path, "--batch-size", "32")))
    for patience, wanted in ((1e6, [2, 32]), (8.5 * train.REHEARSED * 13, [2, 17]), (1, [2, 1])):
        monkeypatch.setattr(train, "MOST_REHEARSED", patience)
        asked.clear()
        assert train.forecast(c) == (train.Forecast(34.0, 163.0), max(wanted)) and asked == wanted


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["vq", "ldm"])
def test_a_forecast_is_what_is_then_measured(stage_one, tmp_path, stage):
    """Of memory, within 30 %; the time hangs on the machine and on what else it does, so it is only there."""
    argv = command(stage, tmp_path / "run", "--vq", stage_one, "--steps", "3", "--batch-size", "256")
    argv[argv.index("figures:12")] = "figures:64"
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    found = []
    for flags in [["--dry-run"], []]:
        done = subprocess.run([sys.executable, "-c", WORKER, "-", *argv, *flags], text=True, capture_output=True,
                              env=env)
        assert done.returncode == 0, done.stderr
        found.append(done.stdout)
    forecast = float(re.search(r"([\d.]+) GiB at its peak", found[0])[1])
    measured = float(re.search(r"peak memory ([\d.]+) GiB", found[1])[1])
    assert abs(forecast / measured - 1) < 0.3, (forecast, measured)
    assert float(re.search(r"([\d.e-]+) s a step", found[0])[1]) > 0
    assert json.loads((tmp_path / "run/config.json").read_text())["steps"] == 3         # the dry run left nothing else
