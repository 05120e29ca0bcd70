"""The training engine: micro-batches, gradient checkpointing, several processes."""
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from test_train import as_micro, command, trained  # noqa: F401  (trained is a fixture)

import checkpoint
import train
import unet
import vq
from engine.run import read_log

ROOT = Path(__file__).parent.parent
PATIENCE = 600                      # seconds for a process, before it counts as hung


def without_zeros(patch: pytest.MonkeyPatch) -> None:
    """No layer starts at zero, or the first gradient would reach the last layer only."""
    patch.setattr(unet, "zero", lambda module: module)
    patch.setattr(vq, "zero_", lambda module: module)


@pytest.fixture(autouse=True)
def presets(monkeypatch):
    as_micro(monkeypatch)
    plain = train.PRESETS["micro_plain"]
    vq_config = train.replace(plain.vq_config, dropout=0.0)         # micro-batches draw other masks
    monkeypatch.setitem(train.PRESETS, "micro_plain", train.replace(plain, vq_config=vq_config))
    without_zeros(monkeypatch)


@pytest.fixture
def stage_one(trained) -> str:  # noqa: F811
    return str(trained / "vq/last.pt")


Gradients = dict[int, torch.Tensor]


def watch_gradients(patch: pytest.MonkeyPatch) -> list[Gradients]:
    """A list that gets those of every parameter, each time that a run clips them."""
    found, clip = [], train.clip_grad_norm_

    def watch(params: Iterable[torch.Tensor], largest: float) -> torch.Tensor:
        params = list(params)
        found.append({i: p.grad.clone() for i, p in enumerate(params) if p.grad is not None})
        return clip(params, largest)
    patch.setattr(train, "clip_grad_norm_", watch)
    return found


def gradients(monkeypatch, argv: list[str], steps: int = 1) -> list[Gradients]:
    with monkeypatch.context() as m:
        found = watch_gradients(m)
        assert train.main([*argv, "--steps", str(steps)]) == 0
    return found


def error(a: Gradients, b: Gradients) -> float:
    """The largest difference, in units of the largest gradient."""
    assert a.keys() == b.keys() and sum(v.abs().max() > 0 for v in a.values()) > 0.9 * len(a)
    return max((a[k] - b[k]).abs().max().item() for k in a) / max(v.abs().max().item()
                                                                 for v in a.values())


# ------------------------------------------------------------------ micro-batches and checkpointing

STAGES = [("vq", "micro"), ("vq", "micro_plain"), ("ldm", "micro")]


@pytest.mark.parametrize("stage, preset", STAGES)
def test_the_gradients_of_micro_batches_add_up(stage_one, tmp_path, monkeypatch, stage, preset):
    """Parts of one, and of three and one: each counts by how many images it has."""
    def run(name: str, *flags: str) -> Gradients:
        flags = ["--vq", stage_one, "--amp", "off", *flags]
        argv = command(stage, tmp_path / name, *flags, preset=preset)
        return gradients(monkeypatch, argv)[0]
    whole = run("whole")
    assert all(error(whole, run(n, "--micro-batch", n)) < 1e-4 for n in "13")


def test_the_codebook_sees_the_whole_batch_whatever_the_micro_batch(tmp_path):
    codes = []
    for size in "4", "1":
        flags = ["--amp", "off", "--micro-batch", size, "--steps", "3"]
        assert train.main(command("vq", tmp_path / size, *flags)) == 0
        state = checkpoint.load(tmp_path / size / "last.pt", "vq")
        codes.append((state["vq"]["quantize.embedding.weight"], state["train"]["usage"]))
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*codes, strict=True))


@pytest.mark.parametrize("stage, preset", STAGES)
def test_checkpointing_changes_no_gradient_under_autocast(
        stage_one, tmp_path, monkeypatch, stage, preset):
    used, honest = [], torch.utils.checkpoint.checkpoint
    monkeypatch.setattr("unet.checkpoint" if stage == "ldm" else "vq.checkpoint",
                        lambda *args, **kwargs: (used.append(1), honest(*args, **kwargs))[1])

    def run(name: str, *flags: str) -> Gradients:
        flags = ["--vq", stage_one, "--amp", "bf16", *flags]
        argv = command(stage, tmp_path / name, *flags, preset=preset)
        return gradients(monkeypatch, argv)[0]
    without = run("without")
    assert not used and error(without, run("with", "--checkpointing")) < 1e-3 and used


def test_the_adversary_works_with_checkpointing_and_micro_batches(tmp_path, monkeypatch):
    """Checkpoints could break the adaptive weight's two backward passes through one graph."""
    def run(name: str, *flags: str) -> list[Gradients]:
        argv = command("vq", tmp_path / name, "--amp", "off", "--disc-start", "0", *flags,
                       preset="micro_gan")
        return gradients(monkeypatch, argv)
    plain, other = run("a"), run("b", "--checkpointing")
    assert len(plain) == len(other) == 2                        # the autoencoder, the discriminator
    assert all(error(a, b) < 1e-4 for a, b in zip(plain, other, strict=True))
    run("c", "--micro-batch", "2")
    row = read_log(tmp_path / "c/log.jsonl")[0]
    assert {"g", "d_weight", "d_loss", "logits_real", "logits_fake"} <= row.keys()


# -------------------------------------------------------------------------------- several processes

WORKER = f"""
import os, sys, time
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import torch
torch.set_num_threads(1)
import pytest, train, test_train, test_engine, engine.run
patch = pytest.MonkeyPatch()
test_train.as_micro(patch)
test_engine.without_zeros(patch)
engine.run.LOG_EVERY = 5
folder, argv = sys.argv[1], sys.argv[2:]
hold = os.environ.get("HOLD")                       # a file: before step 10 the run waits for it
if alarm := os.environ.get("ALARM"):
    train.overfitting = lambda rows, row_of: alarm if rows[-1]["step"] >= 2 else None
seed_everything = train.seed_everything
def seed(seed, step):
    while hold and step == 10 and not os.path.exists(hold):
        time.sleep(0.01)
    seed_everything(seed, step)
train.seed_everything, found = seed, test_engine.watch_gradients(patch)
code = train.main(argv)
if folder != "-":
    torch.save(found, f"{{folder}}/{{os.environ['RANK']}}.pt")
sys.exit(code)
"""


Ranks = list[subprocess.Popen]


def start_ranks(n: int, argv: list[str], folder: Path | str = "-", **more: str) -> Ranks:
    """What torchrun does: processes that know of each other by their environment."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    env = os.environ | more | {
        "WORLD_SIZE": str(n), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    return [subprocess.Popen([sys.executable, "-c", WORKER, str(folder), *argv], text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             env=env | {"RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(n)]


def ends(processes: Ranks) -> tuple[list[int], list[str], list[str]]:
    """Exit codes, stdout and stderr; kills what has hung."""
    until, said = time.monotonic() + PATIENCE, []
    for p in processes:
        try:
            said.append(p.communicate(timeout=max(0.1, until - time.monotonic())))
        except subprocess.TimeoutExpired:
            p.kill()
            said.append(p.communicate())
    return [p.returncode for p in processes], [o for o, _ in said], [e for _, e in said]


def wait_for_lines(log: Path, n: int, ranks: Ranks) -> None:
    until = time.monotonic() + PATIENCE
    while not log.exists() or log.read_text().count("\n") < n:
        assert time.monotonic() < until and ranks[0].poll() is None
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["vq", "ldm"])
def test_two_processes_have_the_gradients_of_one(stage_one, tmp_path, monkeypatch, stage):
    flags = ["--vq", stage_one, "--amp", "off", "--micro-batch", "1", "--eval-every", "3"]
    argv = command(stage, tmp_path / "one", *flags, preset="micro_gan")
    one = gradients(monkeypatch, argv, steps=3)
    argv = [*command(stage, tmp_path / "two", *flags, preset="micro_gan"), "--steps", "3"]
    codes, _, err = ends(start_ranks(2, argv, tmp_path))
    assert codes == [0, 0], err
    two = [torch.load(tmp_path / f"{r}.pt") for r in range(2)]
    assert len(one) == (4 if stage == "vq" else 3)      # the discriminator's in step 2
    for n, (alone, *ranks) in enumerate(zip(one, *two, strict=True)):
        assert error(*ranks) == 0
        # In later steps weights have moved, and codes that both ranks count.
        assert error(alone, ranks[0]) < (1e-4 if n == 0 else 1e-3)
    if stage == "vq":
        found = [checkpoint.load(tmp_path / name / "last.pt", "vq") for name in ("one", "two")]
        usage = [state["train"]["usage"] for state in found]
        codes = [state["vq"]["quantize.embedding.weight"] for state in found]
        assert torch.allclose(*usage, atol=1e-4) and torch.allclose(*codes, atol=1e-3)
    rows = [read_log(tmp_path / name / "log.jsonl") for name in ("one", "two")]
    assert {r["step"] for r in rows[0]} == {r["step"] for r in rows[1]}
    assert len(rows[1]) == len(rows[0])                 # rank 0 alone writes


@pytest.mark.slow
def test_two_processes_stop_together_and_one_resumes(tmp_path):
    """SIGTERM reaches the ranks at different moments, here only one of them."""
    argv = command("vq", tmp_path / "run", "--amp", "off", "--steps", "16", "--eval-every", "16")
    ranks = start_ranks(2, argv, HOLD=str(tmp_path / "go"))     # or it may have ended by then
    log = tmp_path / "run/log.jsonl"
    wait_for_lines(log, 2, ranks)
    ranks[1].send_signal(signal.SIGTERM)
    (tmp_path / "go").touch()
    codes, out, err = ends(ranks)
    assert codes == [train.INTERRUPTED] * 2, err
    assert "rerun the same command to resume" in out[0] and not out[1].strip()
    assert 0 < checkpoint.load(tmp_path / "run/last.pt", "vq")["step"] < 16
    assert train.main(argv) == 0                                # the same batch, in one process
    steps = [r["step"] for r in read_log(log) if "lr" in r]
    assert steps == sorted(set(steps)) and steps[-1] == 15


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_others_with_a_sentence(tmp_path, victim):
    argv = command("vq", tmp_path / "run", "--amp", "off", "--steps", "100000")
    ranks = start_ranks(2, argv)
    wait_for_lines(tmp_path / "run/log.jsonl", 2, ranks)
    ranks[victim].kill()
    codes, _, err = ends(ranks)
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == train.LOST     # not as hung
    last = err[1 - victim].strip().splitlines()[-1]
    assert f"rank {1 - victim} of 2" in last and "another rank is gone" in last and "resume" in last
    assert "Traceback" not in err[1 - victim]


@pytest.mark.slow
def test_two_processes_measure_one_speed_and_both_run_out_of_patience(stage_one, tmp_path):
    """Rank 0 alone evaluates; the other must not wait for it in the next step."""
    argv = command("ldm", tmp_path / "run", "--vq", stage_one, "--eval-every", "1",
                   "--minutes", "5", "--patience", "1")
    codes, out, err = ends(start_ranks(2, argv, ALARM="it overfits"))
    assert codes == [0, 0], err
    assert "out of patience at step 3 of" in out[0] and not out[1].strip()


@pytest.mark.parametrize("flags, words", [
    (["--batch-size", "3"], "batch of 3 cannot be shared by 2"),
    (["--device", "cuda:0", "--amp", "off"], "2 processes for --device cuda:0 on 0 GPUs"),
    (["--device", "cuda", "--amp", "off"], "2 processes for --device cuda on 0 GPUs")])
def test_what_several_processes_cannot_do_is_said_once(tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.setattr(train.dist, "init_process_group", lambda *a, **k: pytest.fail("too late"))
    monkeypatch.setattr(checkpoint, "find_device", lambda name: "cpu" if name == "auto" else name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = []
    for r in "01":
        monkeypatch.setenv("RANK", r), monkeypatch.setenv("LOCAL_RANK", r)
        argv = ["--stage", "vq", "--preset", "micro", "--out", str(tmp_path / "run"), *flags]
        assert train.main(argv) == 2
        said.append(capsys.readouterr().err.strip())
    assert words in said[0] and "\n" not in said[0] and said[1] == ""
