# ruff: noqa: F811    (pytest hands fixtures in by the names under which they are imported)
"""What a run survives: real signals to real processes, full disks, drift, two runs at once, pictures that vanish.

    PYTHONPATH=. python tests/test_safety.py 20 0       kills each stage 20 times or more, at random moments (seed 0)
"""
import collections
import contextlib
import functools
import json
import os
import pty
import random
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from test_data import folder, write_pair
from test_train import Killed, as_micro, micro, one_sentence, same, trained  # noqa: F401
from test_train import command as command_of

import checkpoint
import plots
import train

ROOT = Path(__file__).parent.parent
ENV = os.environ | {"PYTHONPATH": str(ROOT)}
PATIENCE = 600                  # seconds for a process, before it counts as hung
STEPS = 4                       # of a run here; EVALS makes an evaluation and a checkpoint of each
PLOT_CURVES = train.plot_curves             # which the fixture micro replaces


def command(stage: str, out: Path, trained: Path, *flags: str) -> list[str]:
    return command_of(stage, out, "--steps", str(STEPS), "--vq", str(trained / "vq/last.pt"), *flags)


@pytest.fixture(scope="module")
def whole(trained, tmp_path_factory) -> dict[str, Path]:
    """The folder of an uninterrupted run of each stage."""
    out = {stage: tmp_path_factory.mktemp("whole") / stage for stage in ("vq", "ldm")}
    with pytest.MonkeyPatch.context() as patch:
        as_micro(patch)
        for stage, folder in out.items():
            assert train.main(command(stage, folder, trained)) == 0
    return out


def same_runs(one: Path, other: Path, stage: str) -> None:
    """Weights, training state, logs, kept checkpoints and pictures: bit for bit."""
    names = sorted(p.name for p in one.glob("*.pt"))
    assert names == sorted(p.name for p in other.glob("*.pt"))
    for name in names:
        payloads = [checkpoint.load(run / name, stage) for run in (one, other)]
        for payload in payloads:
            del payload["config"]["workers"]
        same(*payloads)
    logs = [[{k: v for k, v in row.items() if k != "img_s"} for row in train.read_log(run / "log.jsonl")]
            for run in (one, other)]                # pictures a second are of the machine, not of the run
    assert logs[0] == logs[1]
    pictures = [{p.name: p.read_bytes() for p in (run / "samples").iterdir()} for run in (one, other)]
    last = f"{checkpoint.load(one / 'last.pt', stage)['step']:07d}.png"     # a kill after the last checkpoint costs it
    assert pictures[0] | pictures[1] == pictures[0] and pictures[0].keys() - pictures[1].keys() <= {last}
    assert not [*other.glob("*.partial")]


# --------------------------------------------------------------------------------------------------- full disks

class SmallDisk:
    """A folder on a disk of its own, or, where mounting is not permitted, under a limit of the size of files."""

    def __init__(self, path: Path, kind: str):
        self.path, self.kind, self.limits = path, kind, resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(self, but: int = 0) -> None:
        """From now on there is room for `but` bytes more, or in no file for more than so many."""
        if self.kind == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (but, self.limits[1]))
            return
        with open(self.path / "ballast", "ab", buffering=0) as f:
            free = os.statvfs(self.path)
            f.write(bytes(free.f_bavail * free.f_frsize - but))

    def free(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.limits)
        (self.path / "ballast").unlink(missing_ok=True)


@pytest.fixture
def small_disk(request, tmp_path) -> Iterator[SmallDisk]:
    path = tmp_path / "small"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(path)]
    kind = getattr(request, "param", None) or (
        "limit" if os.getuid() or subprocess.run(mount, capture_output=True).returncode else "disk")
    disk = SmallDisk(path, kind)
    yield disk
    disk.free()
    if kind == "disk":
        subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.mark.parametrize("small_disk", [None, "limit"], indirect=True)
def test_a_full_disk_leaves_the_old_checkpoint_and_says_so(small_disk):
    path, big = small_disk.path / "c.pt", {"x": torch.zeros(500_000)}
    checkpoint.save(path, {"x": torch.ones(3)})
    for room in (0, 1000, 300_000, 1_999_000):                          # 1.91 MiB are needed
        small_disk.fill(but=room)
        with pytest.raises(OSError) as e:
            checkpoint.save(path, big)
        assert e.value.strerror in ("No space left on device", "File too large") and e.value.filename == str(path)
        small_disk.free()
        assert os.listdir(small_disk.path) == ["c.pt"]                  # nor is half a file in the way
        assert torch.load(path, weights_only=True)["x"].sum() == 3
    checkpoint.save(path, big)
    assert len(torch.load(path, weights_only=True)["x"]) == 500_000


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name_and_the_name_is_too(tmp_path, monkeypatch):
    """A power cut between any two of these calls leaves the old file or the new one."""
    calls = []
    for name in ("fsync", "replace"):
        call = getattr(os, name)
        monkeypatch.setattr(os, name, lambda what, *more, name=name, call=call: (
            calls.append((name, os.readlink(f"/proc/self/fd/{what}") if name == "fsync" else str(what))),
            call(what, *more))[1])
    checkpoint.save(tmp_path / "c.pt", {"x": torch.ones(3)})
    partial = str(tmp_path / "c.pt.partial")
    assert calls == [("fsync", partial), ("replace", partial), ("fsync", str(tmp_path))]


# what cannot be written: before which call the disk fills up, the room left, the step that is kept
MOMENTS = {
    "config.json": (train.Run, "_write_config", 0, 2),
    "log.jsonl": (train.Run, "log", 0, 2),
    "t.pt": (train.Run, "save", 20_000, 2),
    "curves.png": (train, "plot_curves", 0, 3),
    "samples/0000003.png": (plots, "save_grid", 0, 3),
}


def stop_after_drawing(run: train.Run, step: int) -> None:
    draw(run, step)
    if step == 2:
        raise Killed


draw = train.Run.draw


@pytest.mark.parametrize("stage, what", [*(("vq", what) for what in MOMENTS), ("ldm", "t.pt"),
                                         ("ldm", "samples/0000003.png")])
def test_a_disk_that_fills_up_is_one_sentence_and_the_run_goes_on_once_there_is_room(
        trained, whole, small_disk, monkeypatch, capsys, stage, what):
    run = small_disk.path / "run"
    flags = command(stage, run, trained)
    if what == "curves.png":
        monkeypatch.setattr(train, "plot_curves", PLOT_CURVES)
    with monkeypatch.context() as m, pytest.raises(Killed):
        m.setattr(train.Run, "draw", stop_after_drawing)
        train.main(flags)
    owner, name, room, kept = MOMENTS[what]
    with monkeypatch.context() as m:
        call = getattr(owner, name)

        def fill_first(*args, **values):
            with open(run / "log.jsonl", "ab") as f:            # up to a whole page, or there is room in its last one
                f.write(b"\n" * (-f.tell() % 4096))
            small_disk.fill(room)
            return call(*args, **values)
        m.setattr(owner, name, fill_first)
        code = train.main(flags)
    small_disk.free()
    error = capsys.readouterr().err.splitlines()[-1]
    assert code == 2 and error.startswith(f"train.py: cannot write {run}/") and "Traceback" not in error
    reason = "No space left on device" if small_disk.kind == "disk" else "File too large"
    assert f"{what} ({reason})" in error and f"{run}/last.pt holds the last good checkpoint, of step {kept}" in error
    assert checkpoint.load(run / "last.pt", stage)["step"] == kept
    assert train.main(flags) == 0
    same_runs(whole[stage], run, stage)


@pytest.mark.parametrize("stage", ["vq", "ldm"])
def test_checkpoints_that_stay(trained, whole, tmp_path, stage):
    assert train.main(command(stage, tmp_path / "run", trained, "--keep-every", "2")) == 0
    kept = sorted(p.name for p in (tmp_path / "run").glob("step-*.pt"))
    assert kept == ["step-0000002.pt", "step-0000004.pt"]
    first, last = (checkpoint.load(tmp_path / "run" / name, stage) for name in (kept[0], kept[-1]))
    whole_run, part = checkpoint.load(whole[stage] / "last.pt", stage), "vq" if stage == "vq" else "unet"
    assert first["step"] == 2 and "train" not in first
    same(last[part], whole_run[part])                           # and it changes nothing else
    with pytest.raises(AssertionError):
        same(first[part], last[part])
    if stage == "ldm":
        checkpoint.load_ldm(tmp_path / "run" / kept[0])         # one file is enough to sample
    assert train.main(command(stage, tmp_path / "run", trained, "--fresh")) == 0
    assert not [*(tmp_path / "run").glob("step-*.pt")]


@pytest.mark.parametrize("stage", ["vq", "ldm"])
def test_weights_that_are_no_numbers_never_replace_those_that_are(trained, tmp_path, monkeypatch, capsys, stage):
    """Though every loss was finite: one code that no picture uses is enough."""
    save = train.Run.save

    def spoil(run, step, payload, score):
        if step == 3:
            weights = payload["vq" if stage == "vq" else "unet"]
            next(reversed(weights.values())).data.view(-1)[-1] = float("nan")
        save(run, step, payload, score)
    monkeypatch.setattr(train.Run, "save", spoil)
    assert train.main(command(stage, tmp_path / "run", trained)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "is not finite after step 2" in error and "last.pt holds the last good checkpoint, of step 2" in error
    for name in ("last.pt", "best.pt"):
        assert checkpoint.not_finite(checkpoint.load(tmp_path / "run" / name, stage)) is None


def test_what_is_not_finite_is_named():
    fine = {"a": torch.ones(3), "b": {"c": torch.ones(2), "d": 1.0, "e": [1]}, "n": torch.arange(3)}
    assert checkpoint.not_finite(fine) is None
    for bad in (float("nan"), float("inf")):
        assert checkpoint.not_finite(fine | {"b": {"c": torch.ones(2), "x": torch.tensor([1, bad])}}) == "b.x"


# ----------------------------------------------------------------------------------------------------------- kill -9

# What a process was in when it died: the last mark that it left in its pipe.
MARKS = {"s": (train.Run, "after_step"), "e": (train.Run, "evaluate"), "w": (checkpoint, "save"),
         "d": (train.Run, "draw")}
PHASES = {"": "starting", "S": "training", "e": "evaluating", "w": "writing a checkpoint", "d": "drawing"}


def fork(flags: list[str], steps: int, said: Path) -> tuple[int, int]:
    """train.main in a process of its own that needs no second to import torch; its pid, and a pipe with its marks."""
    marks, into = os.pipe()
    if pid := os.fork():
        os.close(into)
        return pid, marks
    code = 99
    try:
        os.close(marks)
        sys.stdout = sys.stderr = open(said, "a")
        train.LOG_EVERY, train.SAVE_SECONDS, train.EVALS = 1, 0.05, steps // 4
        train.plot_curves = write_curves
        for mark, (owner, name) in MARKS.items():
            setattr(owner, name, marked(getattr(owner, name), mark, into))
        code = train.main(flags)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def write_curves(run: train.Run, panels: train.Panels) -> None:
    """As plot_curves writes them; to draw them would take longer than all the rest of a run."""
    with checkpoint.replacing(run.dir / "curves.png") as f:
        f.write(run.log_path.read_bytes())


def marked(call: Callable, mark: str, into: int) -> Callable:
    """`call`, whose beginning and end are written into the pipe."""
    def marking(*args, **values):
        os.write(into, mark.encode())
        result = call(*args, **values)
        os.write(into, mark.upper().encode())
        return result
    return marking


def times(marks: int) -> dict[str, float]:
    """How long a run, followed to its end, was in each phase on average."""
    spent, last, now = collections.defaultdict(list), "", time.monotonic()
    while mark := os.read(marks, 1).decode():
        spent[last].append(time.monotonic() - now)
        last, now = mark, time.monotonic()
    return {phase: float(np.mean(seconds)) for phase, seconds in spent.items()}


def kill_runs(stage: str, kills: int, rng: random.Random, root: Path) -> dict[str, int]:
    """Kills a run `kills` times, and again until it has died in every phase; sees that it ends as if it had not been.
    One that ended before it was killed, for this machine was busy, must have ended so too, and is begun anew.
    Returns how often it died in which phase."""
    steps, died, torn, said = 40 + 6 * kills, collections.Counter(), 0, root / "said.txt"
    too_late = 0

    def flags(name: str) -> list[str]:
        return command_of(stage, root / name, "--steps", str(steps), "--keep-every", "7",
                          "--vq", str(root / "vq/last.pt"))

    pid, marks = fork(flags(f"whole-{stage}"), steps, said)
    spent = times(marks)
    assert os.waitpid(pid, 0)[1] == 0, said.read_text()
    while sum(died.values()) < kills or not set(PHASES.values()) <= died.keys():
        pid, marks = fork(flags(f"cut-{stage}"), steps, said)
        missing = [phase for phase, name in PHASES.items() if name not in died]
        phase, nth, seen = rng.choice(missing or [*PHASES, "w"]), rng.randint(1, 2), ""
        nth = 1 if phase in "ed" else nth
        while seen.count(phase) < nth and phase and (mark := os.read(marks, 1).decode()):
            seen += mark
        time.sleep(rng.uniform(0, spent[phase]))
        os.kill(pid, signal.SIGKILL)
        if (status := os.waitpid(pid, 0)[1]) != signal.SIGKILL:
            too_late += 1
            assert status == 0 and too_late < 20, f"{said.read_text()}\n{died}"
            os.close(marks)
            same_runs(root / f"whole-{stage}", root / f"cut-{stage}", stage)
            shutil.rmtree(root / f"cut-{stage}")
            continue
        seen += os.read(marks, 1 << 16).decode()
        os.close(marks)
        died[PHASES.get(seen[-1:], "between these")] += 1
        torn += seen[-1:] == "w" and any((root / f"cut-{stage}").glob("*.pt.partial"))
    pid, marks = fork(flags(f"cut-{stage}"), steps, said)
    times(marks)
    assert os.waitpid(pid, 0)[1] == 0, said.read_text()
    same_runs(root / f"whole-{stage}", root / f"cut-{stage}", stage)
    return dict(died) | {"half a checkpoint was left behind": torn}


@pytest.mark.slow
def test_kills_at_random_moments_of_every_phase_lose_nothing_but_time():
    killing = subprocess.run([sys.executable, __file__, "6", "0"], env=ENV, capture_output=True, text=True)
    assert killing.returncode == 0, killing.stdout + killing.stderr
    for line in killing.stdout.splitlines():
        died = json.loads(line.partition(" ")[2])
        assert set(PHASES.values()) <= died.keys()
    assert [line.split()[0] for line in killing.stdout.splitlines()] == ["vq", "ldm"]


def main(words: list[str]) -> int:
    """KILLS SEED, or the flags of a train.py that knows the preset micro, logs every step and may be held at one."""
    with pytest.MonkeyPatch.context() as patch:
        as_micro(patch)
        if not words[0].isdecimal():
            train.LOG_EVERY = 1
            wait_at_a_step(patch, os.environ.get("HOLD"))
            return train.main(words)
        torch.set_num_threads(1)            # threads do not survive a fork
        import matplotlib.pyplot  # noqa: F401  (once for all processes)
        rng = random.Random(int(words[1]))
        with tempfile.TemporaryDirectory() as root:
            pid, marks = fork(command_of("vq", Path(root) / "vq", "--steps", "8"), 8, Path(root) / "said.txt")
            times(marks), os.waitpid(pid, 0)
            for stage in ("vq", "ldm"):
                print(stage, json.dumps(kill_runs(stage, int(words[0]), rng, Path(root))), flush=True)
    return 0


# ------------------------------------------------------------------------------------- signals, to real processes

@pytest.fixture(scope="module")
def long(trained, tmp_path_factory) -> dict[str, Path]:
    """The folder of an uninterrupted run of each stage that is long enough to be stopped, and logs every step."""
    out = {stage: tmp_path_factory.mktemp("long") / stage for stage in ("vq", "ldm")}
    with pytest.MonkeyPatch.context() as patch:
        as_micro(patch)
        patch.setattr(train, "LOG_EVERY", 1)
        for stage, run in out.items():
            assert train.main(long_command(stage, run, trained)) == 0
    return out


def long_command(stage: str, out: Path, trained: Path, *flags: str) -> list[str]:
    return command_of(stage, out, "--steps", "40", "--vq", str(trained / "vq/last.pt"), *flags)


def wait_at_a_step(patch: pytest.MonkeyPatch, until: str | None) -> None:
    """Step 20 of a run begins once that file exists, so that the run has not ended before a test has got to it."""
    seed_step, patience = train.seed_step, time.monotonic() + PATIENCE

    def wait_then_seed(seed: int, step: int) -> None:
        while until and step == 20 and not os.path.exists(until):
            assert time.monotonic() < patience, f"nobody made {until}"
            time.sleep(0.01)
        seed_step(seed, step)
    patch.setattr(train, "seed_step", wait_then_seed)


def start(flags: list[str], hold: Path | str = "") -> subprocess.Popen:
    """A run in a process of its own, which waits at step 20 for the file `hold`."""
    return subprocess.Popen([sys.executable, __file__, *flags], env=ENV | {"HOLD": str(hold)}, text=True,
                            start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for_step(run: Path, step: int, is_alive: Callable[[], bool]) -> None:
    log, patience = run / "log.jsonl", time.monotonic() + PATIENCE
    while not log.exists() or max([-1, *(r["step"] for r in train.read_log(log))]) < step:
        assert is_alive() and time.monotonic() < patience
        time.sleep(0.01)


def goes_on_as_if_nothing_had_been(flags: list[str], run: Path, long: Path, stage: str, monkeypatch) -> None:
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    assert train.main(flags) == 0
    same_runs(long, run, stage)


@pytest.mark.parametrize("stage, number, workers", [("vq", "SIGINT", 0), ("ldm", "SIGTERM", 0), ("vq", "SIGINT", 2),
                                                    ("vq", "SIGTERM", 2)])
def test_a_signal_to_all_processes_of_a_run_saves_and_says_how_to_go_on(
        trained, long, tmp_path, monkeypatch, stage, number, workers):
    run = tmp_path / "run"
    flags = long_command(stage, run, trained, "--workers", str(workers))
    process = start(flags, hold=tmp_path / "go")
    wait_for_step(run, 2, lambda: process.poll() is None)
    os.killpg(process.pid, getattr(signal, number))
    (tmp_path / "go").touch()
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == train.INTERRUPTED, out + err
    step = checkpoint.load(run / "last.pt", stage)["step"]
    assert 3 <= step < 40 and f"{run}: stopped at step {step} of 40; the same command again goes on" in out
    assert err.count("stopping after this step and saving") == 1 and "Traceback" not in err
    assert not (run / "lock").exists()
    goes_on_as_if_nothing_had_been([*flags, "--workers", "0"], run, long[stage], stage, monkeypatch)


def test_a_terminal_that_is_closed_costs_nothing(trained, long, tmp_path, monkeypatch):
    """The kernel's own SIGHUP, another one from the shell, and then every word to the terminal is an error."""
    run = tmp_path / "run"
    flags = long_command("vq", run, trained)
    pid, terminal = pty.fork()
    if not pid:
        os.execvpe("bash", ["bash", "--norc", "-ic", shlex.join([sys.executable, __file__, *flags]) + "; true"],
                   ENV | {"HOLD": str(tmp_path / "go")})
    os.set_blocking(terminal, False)

    def reading() -> bool:
        with contextlib.suppress(BlockingIOError):
            os.read(terminal, 1 << 16)
        return os.waitpid(pid, os.WNOHANG) == (0, 0)
    wait_for_step(run, 2, reading)
    os.close(terminal)
    os.waitpid(pid, 0)
    (tmp_path / "go").touch()
    patience = time.monotonic() + PATIENCE
    while (run / "lock").exists() and time.monotonic() < patience:          # the last thing that it removes
        time.sleep(0.01)
    assert not (run / "lock").exists()
    assert 3 <= checkpoint.load(run / "last.pt", "vq")["step"] < 40
    goes_on_as_if_nothing_had_been(flags, run, long["vq"], "vq", monkeypatch)


def test_a_second_signal_cuts_and_what_nohup_ignores_stays_ignored(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with train.stop_signals() as stopped:
        for _ in range(2):                                      # at once: torchrun and shells pass on what we have
            os.kill(os.getpid(), signal.SIGTERM)
        assert stopped == [signal.SIGTERM]
        now[0] = 2.0
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        monkeypatch.undo()
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with train.stop_signals() as stopped:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stopped
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_who_is_told_to_stop_saves_before_the_evaluation_that_is_due(trained, whole, tmp_path, monkeypatch):
    """It may take minutes, of which a machine that is taken away has none; the resumed run makes up for it."""
    run, measured, after_step = tmp_path / "run", [], train.Run.after_step
    flags = command("vq", run, trained)
    honest = train.Run.evaluate

    def stop(run, step, numbers, bar, stopped):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return after_step(run, step, numbers, bar, stopped)
    with monkeypatch.context() as m:
        m.setattr(train.Run, "after_step", stop)
        m.setattr(train.Run, "evaluate", lambda run, step: measured.append(step) or honest(run, step))
        assert train.main(flags) == train.INTERRUPTED
    assert measured == [0, 1] and checkpoint.load(run / "last.pt", "vq")["step"] == 3
    assert train.main(flags) == 0
    same_runs(whole["vq"], run, "vq")


# ------------------------------------------------------------------------------------------------ another command

CONFIGS = {stage: train.replace(
    train.make_config(train.parse_args(["--stage", stage, "--steps", "9", "--device", "cpu", "--data", "mine"])),
    pictures=100, data_hash="0123", vq_hash="4567") for stage in ("vq", "ldm")}


def leaves(value: object, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every field, however deeply it stands in another: recipe.lr, vq_config.ch, ..."""
    if isinstance(value, dict) and value:
        for key in value:
            yield from leaves(value[key], (*path, key))
    else:
        yield path


def changed(config: dict, path: tuple[str, ...]) -> tuple[dict, object]:
    """`config` with another value there, or without it; the value."""
    config = json.loads(json.dumps(config))
    place = config
    for key in path[:-1]:
        place = place[key]
    old = place[path[-1]]
    new = (not old if isinstance(old, bool) else 7 if old is None else old + 1 if isinstance(old, int | float) else
           f"{old}-other" if isinstance(old, str) else [*old, 5])
    place[path[-1]] = new
    return config, new


def begun(run: Path, stage: str, config: dict) -> Path:
    """A folder in which a run with that config has been begun, as far as resuming looks before it builds the model."""
    run.mkdir()
    checkpoint.save(run / "last.pt", {name: {} for name in checkpoint.NEEDED["ldm"]} | {
        "format": 1, "stage": stage, "step": 3, "config": config, "train": {"best": None, "skipped": 0},
        "mean": torch.zeros(3, 1, 1), "std": torch.ones(3, 1, 1), "knows_null": True,
        "schedule": {"timesteps": 9, "linear_start": 0.1, "linear_end": 0.2}})
    return run


@pytest.mark.parametrize("stage, path", [
    (stage, path) for stage, c in CONFIGS.items() for path in leaves(train.plain(c)) if path != ("stage",)
], ids=lambda x: x if isinstance(x, str) else ".".join(x))
def test_every_field_is_harmless_or_refused_with_both_values(tmp_path, stage, path):
    c = train.replace(CONFIGS[stage], out=str(tmp_path / "run"))
    config, was = changed(train.plain(c), path)
    now = train.plain(c)
    for key in path:
        now = now[key]
    begun(tmp_path / "run", stage, config)
    if path[0] in train.HARMLESS:
        assert train.Run(c, False).start == 3
        return
    with pytest.raises(ValueError) as e:
        train.Run(c, False)
    name = ".".join(path)
    said = ("in the latents of another autoencoder" if name == "vq_hash" else
            f"a run with {name} = {was}, but this command has {name} = {now}; ")
    assert said in str(e.value)
    assert "--fresh" in str(e.value) and "\n" not in str(e.value)
    accepting = train.replace(c, accept_data=True)
    if path[0] in train.OF_DATA:
        assert "--accept-data" in str(e.value) and train.Run(accepting, False).start == 3
    else:
        with pytest.raises(ValueError):
            train.Run(accepting, False)


def test_the_lists_of_fields_name_fields():
    names = {f.name for f in fields(train.Config)}
    assert train.HARMLESS | train.OF_DATA | train.FOUND <= names and not train.HARMLESS & train.OF_DATA


def test_a_run_of_an_older_version_goes_on_with_what_that_did_not_know_at_its_default(tmp_path):
    c = train.replace(CONFIGS["vq"], out=str(tmp_path / "a"))
    old = train.plain(c)
    for name in ("data_hash", "pictures", "vq_hash", "keep_every", "accept_data", "lpips"):
        del old[name]
    del old["recipe"]["p_drop"], old["recipe"]["loss"]["disc_cap"], old["vq_config"]["dropout"]
    begun(tmp_path / "a", "vq", old)
    assert train.Run(c, False).start == 3
    del old["vq_config"]["ema_codebook"]                        # which was not there, so it was not used
    begun(tmp_path / "b", "vq", old)
    with pytest.raises(ValueError, match="vq_config.ema_codebook = False, but this command has .* = True"):
        train.Run(train.replace(c, out=str(tmp_path / "b")), False)


@pytest.mark.parametrize("stage", ["vq", "ldm"])
def test_pictures_that_changed_under_the_same_name_are_noticed(trained, tmp_path, monkeypatch, capsys, stage):
    root, val = folder(tmp_path / "set", 30), folder(tmp_path / "val", 12)
    flags = command(stage, tmp_path / "run", trained, "--data", str(root), "--val", str(val))
    with monkeypatch.context() as m, pytest.raises(Killed):
        m.setattr(train.Run, "draw", stop_after_drawing)
        train.main(flags)
    capsys.readouterr()
    for part_of in (root, val):
        picture = sorted((part_of / "images").iterdir())[5]
        before, times = picture.read_bytes(), picture.stat()
        picture.write_bytes(before + b" ")
        one_sentence(capsys, train.main(flags), "data_hash", "--accept-data")
        picture.write_bytes(before)
        os.utime(picture, ns=(times.st_atime_ns, times.st_mtime_ns))
    write_pair(root, "clip9_000", 99)
    one_sentence(capsys, train.main(flags), "pictures = 30", "pictures = 31", "--accept-data")
    assert train.main([*flags, "--accept-data"]) == 0
    assert checkpoint.load(tmp_path / "run/last.pt", stage)["config"]["pictures"] == 31


def test_a_resumed_run_is_judged_on_the_held_out_pictures_it_was_judged_on(trained, tmp_path, monkeypatch):
    """A longer run looks at more of them, and the command that resumes may leave the length out."""
    for name, value in {"EVAL_LATENTS": (2, 4), "EVAL_SHARE": 1.0, "SAVE_SECONDS": 0}.items():
        monkeypatch.setattr(train, name, value)
    forwards, begin, save = [], train.Run.begin, train.Run.save

    def beginning(run, measure, payload, eval_forwards, panels):
        forwards.append(eval_forwards)
        begin(run, measure, payload, eval_forwards, panels)

    def save_then_die(run, *args):
        save(run, *args)
        raise Killed
    monkeypatch.setattr(train.Run, "begin", beginning)
    monkeypatch.setattr(train.Run, "save", save_then_die)
    flags = command_of("ldm", tmp_path / "run", "--vq", str(trained / "vq/last.pt"))
    for length in (["--steps", "200"], []):
        with pytest.raises(Killed):
            train.main([*flags, *length])
    assert forwards[0] == forwards[1] == train.EVAL_PASSES * 4 + 2 * train.PREVIEWS * train.PREVIEW_STEPS


# ------------------------------------------------------------------------------------------------ files of others

def test_a_run_removes_no_file_but_its_own(trained, tmp_path):
    run = tmp_path / "run"
    foreign = ["movie.mkv.partial", "mine.pt.partial", "step-by-step.pt", "samples/my_photo.jpg", "samples/2.png",
               "samples/album/0000001.png"]
    ours = ["step-0000009.pt", "samples/0000009.png"]
    partial = [f"{name}.partial" for name in ("last.pt", "best.pt", "log.jsonl", "config.json", "step-0000009.pt")]
    for name in (*foreign, *ours, *partial):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("x")
    for more, left in (([], [*foreign, *ours]), (["--fresh"], foreign)):
        assert train.main(command_of("vq", run, "--steps", "1", *more)) == 0
        assert [name for name in (*foreign, *ours, *partial) if (run / name).exists()] == left


@pytest.mark.parametrize("out", [".", "images", "images/run"])
def test_a_run_is_not_begun_among_the_pictures(trained, tmp_path, capsys, out):
    """Else its own curves.png is a picture without a pose when the same command goes on with it."""
    root = folder(tmp_path / "mine", 20)
    before = sorted(root.rglob("*"))
    for where in (["--data", str(root)], ["--val", str(root)]):
        one_sentence(capsys, train.main(command_of("vq", root / out, *where)), f"--out {root / out} lies among")
        assert sorted(root.rglob("*")) == before


# --------------------------------------------------------------------------------------------- two runs into a folder

def test_the_second_run_into_a_folder_is_refused_until_the_first_is_killed(trained, tmp_path, capsys):
    run = tmp_path / "run"
    flags = command_of("vq", run, "--steps", "100000", "--workers", "1")
    first = start(flags)
    try:
        wait_for_step(run, 2, lambda: first.poll() is None)
        for more in ([], ["--fresh"]):
            before = (run / "config.json").read_bytes()
            one_sentence(capsys, train.main([*flags, *more]), str(run),
                         f"process {first.pid} on {socket.gethostname()}")
            assert (run / "config.json").read_bytes() == before and first.poll() is None
        first.kill()                # and not the process that loads its pictures, which lives on for a moment
        first.wait()
        assert f"process {first.pid}" in (run / "lock").read_text()
        assert train.main(command_of("vq", run, "--steps", "1", "--fresh")) == 0
    finally:
        first.kill()
        first.communicate()
    assert not (run / "lock").exists()


def test_a_lock_whose_number_another_program_has_by_now_is_in_nobodys_way(trained, tmp_path):
    run, other = tmp_path / "run", subprocess.Popen(["sleep", str(PATIENCE)])
    run.mkdir()
    (run / "lock").write_text(f"process {other.pid} on {socket.gethostname()} since yesterday")
    try:
        with train.locked(run):
            assert f"process {os.getpid()} on" in (run / "lock").read_text()
    finally:
        other.kill(), other.wait()
    assert not run.exists()                                     # nothing was in it


def test_a_lock_that_its_holder_removes_while_we_wait_for_it_is_not_taken(tmp_path, monkeypatch):
    """Else the next one locks a new file of that name, and there are two."""
    taken, take = [], train.take

    def slow(f):
        if not taken:
            (tmp_path / "lock").unlink()
        taken.append(take(f))
        return taken[-1]
    monkeypatch.setattr(train, "take", slow)
    with train.locked(tmp_path):
        assert (tmp_path / "lock").read_text().startswith("process") and taken == [True, True]


def test_windows_locks_by_its_own_call(tmp_path, monkeypatch):
    calls, held = [], []

    def locking(handle: int, mode: int, size: int) -> None:
        calls.append((os.lseek(handle, 0, os.SEEK_CUR), mode, size))
        if held:
            raise PermissionError(13, "Permission denied")
    monkeypatch.setitem(sys.modules, "fcntl", None)             # import fcntl raises ImportError
    monkeypatch.setitem(sys.modules, "msvcrt", types.SimpleNamespace(locking=locking, LK_NBLCK=2))
    with train.locked(tmp_path / "run"):
        text = (tmp_path / "run/lock").read_text()
        held.append(1)
        with pytest.raises(ValueError, match=f"is being trained into by process {os.getpid()} on"), \
                train.locked(tmp_path / "run"):
            pass
        assert (tmp_path / "run/lock").read_text() == text
    assert calls == [(1 << 20, 2, 1)] * 2 and calls[0][0] > len(text)


def test_where_nothing_can_be_locked_it_is_said_and_trained(tmp_path, monkeypatch, capsys):
    import fcntl

    def no_locks(*_):
        raise OSError(37, "No locks available")
    monkeypatch.setattr(fcntl, "lockf", no_locks)
    with train.locked(tmp_path / "run"):
        assert "lock cannot be locked here (No locks available)" in capsys.readouterr().out


# ------------------------------------------------------------------------------------- pictures that go while it trains

def test_pictures_that_vanish_end_the_run_in_a_sentence_and_it_goes_on_once_they_are_back(
        trained, tmp_path, monkeypatch, capsys):
    root = folder(tmp_path / "set", 40)
    flags = [*command("vq", tmp_path / "whole", trained, "--data", str(root)), "--batch-size", "2"]
    assert train.main(flags) == 0
    flags[flags.index("--out") + 1] = str(tmp_path / "run")

    def take_away(run: train.Run, step: int) -> None:
        draw(run, step)
        if step == 2:
            (root / "images").rename(tmp_path / "away")
    with monkeypatch.context() as m:
        m.setattr(train.Run, "draw", take_away)
        assert train.main(flags) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error and error.splitlines()[-1].startswith("train.py: ")
    assert "there is no such file" in error.splitlines()[-1]
    assert checkpoint.load(tmp_path / "run/last.pt", "vq")["step"] == 2
    (tmp_path / "away").rename(root / "images")
    assert train.main(flags) == 0
    same_runs(tmp_path / "whole", tmp_path / "run", "vq")


def test_a_process_for_pictures_that_dies_is_replaced(trained, long, tmp_path):
    run = tmp_path / "run"
    process = start(long_command("vq", run, trained, "--workers", "1"), hold=tmp_path / "go")
    while not (run / "samples/0000006.png").exists():
        assert process.poll() is None
        time.sleep(0.01)
    worker, = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(worker), signal.SIGKILL)
    (tmp_path / "go").touch()
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0 and "Traceback" not in err, out + err
    assert "new ones go on from batch" in err
    same_runs(long["vq"], run, "vq")


@pytest.mark.slow
def test_a_dry_run_that_is_ended_leaves_no_process(tmp_path):
    """Its rehearsal has one of its own, which would wait for more to do as long as the machine runs."""
    flags = ["--stage", "vq", "--data", "figures:4", "--batch-size", "1", "--device", "cpu", "--dry-run"]
    dry = subprocess.Popen([sys.executable, "train.py", *flags], cwd=ROOT, stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL, env=os.environ | {"TMPDIR": str(tmp_path)})

    def command_line(pid: str) -> str:                          # empty once it has ended
        with contextlib.suppress(OSError):
            return Path(f"/proc/{pid}/cmdline").read_text()
        return ""
    while not [*tmp_path.glob("*/run/samples")]:                # it is under way
        assert dry.poll() is None
        time.sleep(0.01)
    children = Path(f"/proc/{dry.pid}/task/{dry.pid}/children").read_text().split()
    worker, = (pid for pid in children if "spawn_main" in command_line(pid))
    dry.terminate()
    dry.wait()
    patience = time.monotonic() + PATIENCE
    while (left := command_line(worker)) and time.monotonic() < patience:
        time.sleep(0.1)
    if left:
        os.kill(int(worker), signal.SIGKILL)
    assert not left


# --------------------------------------------------------------------------------------------------- half precision

@pytest.mark.slow
@pytest.mark.parametrize("stage", ["vq", "ldm"])
def test_120_steps_in_half_precision_track_float32(tmp_path, monkeypatch, stage):
    """In fp16 from a scale at which the first gradients overflow: they are skipped, and counted."""
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    monkeypatch.setattr(train, "EVALS", 1)
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=2.0 ** 20))
    means = {}
    if stage == "ldm":
        assert train.main(command_of("vq", tmp_path / "vq", "--steps", "100", "--amp", "off")) == 0
    for amp in ("off", "bf16", "fp16"):
        flags = command_of(stage, tmp_path / amp, "--steps", "120", "--batch-size", "8", "--amp", "off",
                           "--vq", str(tmp_path / "vq/last.pt"))
        c = train.replace(train.make_config(train.parse_args(flags)), amp=amp)      # the flag refuses fp16 on a CPU
        assert {"vq": train.train_vq, "ldm": train.train_ldm}[stage](c)
        steps = [r for r in train.read_log(tmp_path / amp / "log.jsonl") if "lr" in r]
        skipped = sum("loss" not in r for r in steps)
        state = checkpoint.load(tmp_path / amp / "last.pt", stage)["train"]
        assert skipped == state["overflows"] == steps[-1].get("overflows", 0) and state["skipped"] == 0
        assert (skipped > 0) == (amp == "fp16")
        means[amp] = np.mean([r["loss"] for r in steps[-50:] if "loss" in r])
    assert means["bf16"] != means["off"] != means["fp16"]       # or they were not used at all
    assert means["bf16"] == pytest.approx(means["off"], rel=0.03)
    assert means["fp16"] == pytest.approx(means["off"], rel=0.03)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
