# ruff: noqa: F811    (pytest hands fixtures in by the names under which they are imported)
"""What a run survives: kills and signals, full disks, changed commands, two runs at once.

    PYTHONPATH=. python tests/test_safety.py 20 0       kills each stage 20 times, by seed 0
"""
import collections
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from test_data import folder, write_pair
from test_train import (  # noqa: F401
    Killed,
    as_micro,
    command,
    die_after,
    micro,
    one_sentence,
    same,
    trained,
    untimed,
)

import checkpoint
import engine.run
import plots
import train
from engine.process import locked, stop_signals
from engine.run import MAY_DIFFER, OF_DATA, RunDir, read_log

ROOT = Path(__file__).parent.parent
ENV = os.environ | {"PYTHONPATH": str(ROOT)}
PATIENCE = 600                  # seconds for a process, before it counts as hung
PLOT_CURVES = plots.plot_curves             # which the fixture micro replaces


def of(stage: str, out: Path, trained: Path, *flags: str, steps: int = 4) -> list[str]:
    return command(stage, out, "--steps", str(steps), "--vq", str(trained / "vq/last.pt"), *flags)


def whole_runs(tmp_path_factory, trained: Path, steps: int) -> dict[str, Path]:
    """The folder of an uninterrupted run of each stage that logs every step."""
    with pytest.MonkeyPatch.context() as patch:
        as_micro(patch)
        patch.setattr(engine.run, "LOG_EVERY", 1)
        out = {stage: tmp_path_factory.mktemp("whole") / stage for stage in ("vq", "ldm")}
        for stage, run in out.items():
            assert train.main(of(stage, run, trained, steps=steps)) == 0
    return out


@pytest.fixture(scope="module")
def whole(trained, tmp_path_factory) -> dict[str, Path]:
    return whole_runs(tmp_path_factory, trained, 4)


@pytest.fixture(scope="module")
def long(trained, tmp_path_factory) -> dict[str, Path]:
    """Long enough to be stopped."""
    return whole_runs(tmp_path_factory, trained, 40)


@pytest.fixture(autouse=True)
def log_every_step(monkeypatch):
    monkeypatch.setattr(engine.run, "LOG_EVERY", 1)


def same_runs(one: Path, other: Path, stage: str) -> None:
    """Weights, training state, logs, kept checkpoints and previews, bit for bit."""
    names = sorted(p.name for p in one.glob("*.pt"))
    assert names == sorted(p.name for p in other.glob("*.pt"))
    for name in names:
        payloads = [checkpoint.load(run / name, stage) for run in (one, other)]
        for payload in payloads:
            del payload["config"]["workers"]
        same(*payloads)
    assert untimed(one / "log.jsonl") == untimed(other / "log.jsonl")
    images = [{p.name: p.read_bytes() for p in (run / "samples").iterdir()} for run in (one, other)]
    assert images[0] == images[1] and not [*other.glob("*.partial")]


# --------------------------------------------------------------------------------------- full disks

class SmallDisk:
    """No file may grow beyond a limit."""

    def __init__(self):
        self.limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(self, room: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, self.limits[1]))

    def free(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.limits)


@pytest.fixture
def disk() -> Iterator[SmallDisk]:
    disk = SmallDisk()
    yield disk
    disk.free()


def test_a_full_disk_leaves_the_old_checkpoint(disk, tmp_path):
    path, big = tmp_path / "c.pt", {"x": torch.zeros(500_000)}
    checkpoint.save(path, {"x": torch.ones(3)})
    for room in (0, 1000, 300_000, 1_999_000):                          # 1.91 MiB are needed
        disk.fill(room)
        with pytest.raises(OSError, match="File too large") as e:
            checkpoint.save(path, big)
        disk.free()
        assert e.value.filename == str(path) and os.listdir(tmp_path) == ["c.pt"]
        assert torch.load(path, weights_only=True)["x"].sum() == 3
    checkpoint.save(path, big)
    assert len(torch.load(path, weights_only=True)["x"]) == 500_000


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """A power cut between any two of these calls leaves the old file or the new one."""
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (
        calls.append(("fsync", os.readlink(f"/proc/self/fd/{fd}"))), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (
        calls.append(("replace", str(a))), replace(a, b)))
    checkpoint.save(tmp_path / "c.pt", {"x": torch.ones(3)})
    partial = str(tmp_path / "c.pt.partial")
    assert calls == [("fsync", partial), ("replace", partial), ("fsync", str(tmp_path))]


# What cannot be written: before which call the disk fills up, the room left, the step that is kept.
MOMENTS = {
    "log.jsonl of a step": (RunDir, "log", 0, 2),
    "samples/0000003.png": (plots, "save_grid", 0, 2),
    "t.pt": (RunDir, "save", 20_000, 2),
}


@pytest.mark.parametrize("stage, what", [
    *(("vq", what) for what in MOMENTS), ("ldm", "t.pt")])
def test_a_disk_that_fills_up_is_one_sentence_and_the_run_resumes_once_there_is_room(
        trained, whole, disk, tmp_path, monkeypatch, capsys, stage, what):
    run = tmp_path / "run"
    flags = of(stage, run, trained)
    monkeypatch.setattr(plots, "plot_curves", PLOT_CURVES)
    with monkeypatch.context() as m, pytest.raises(Killed):
        die_after(m, 2)
        train.main(flags)
    owner, name, room, kept = MOMENTS[what]
    with monkeypatch.context() as m:
        call = getattr(owner, name)
        m.setattr(owner, name, lambda *args, **values: (disk.fill(room), call(*args, **values))[1])
        code = train.main(flags)
    disk.free()
    error = capsys.readouterr().err.splitlines()[-1]
    assert code == 2 and error.startswith(f"train.py: cannot write {run}/") and "resume" in error
    assert f"{what.split()[0]} (File too large)" in error and "Traceback" not in error
    assert f"{run}/last.pt holds the checkpoint of step {kept}" in error
    assert checkpoint.load(run / "last.pt", stage)["step"] == kept
    assert train.main(flags) == 0
    same_runs(whole[stage], run, stage)


@pytest.mark.parametrize("stage", ["vq", "ldm"])
def test_checkpoints_that_stay(trained, whole, tmp_path, stage):
    run = tmp_path / "run"
    assert train.main(of(stage, run, trained, "--keep-every", "2")) == 0
    kept = sorted(p.name for p in run.glob("step-*.pt"))
    assert kept == ["step-0000002.pt", "step-0000004.pt"]
    first, last = (checkpoint.load(run / name, stage) for name in kept)
    part = "vq" if stage == "vq" else "unet"
    assert first["step"] == 2 and "train" not in first
    same(last[part], checkpoint.load(whole[stage] / "last.pt", stage)[part])
    with pytest.raises(AssertionError):
        same(first[part], last[part])
    if stage == "ldm":
        checkpoint.load_ldm(run / kept[0])                      # one file is enough to sample
    assert train.main(of(stage, run, trained, "--fresh")) == 0
    assert not [*run.glob("step-*.pt")]


@pytest.mark.parametrize("stage", ["vq", "ldm"])
def test_weights_that_are_not_finite_never_replace_finite_ones(
        trained, tmp_path, monkeypatch, capsys, stage):
    """Though every loss was finite: one code that no image uses is enough."""
    save = RunDir.save

    def spoil(run, step, payload, score):
        if step == 2:
            weights = payload["vq" if stage == "vq" else "unet"]
            next(reversed(weights.values())).data.view(-1)[-1] = float("nan")
        save(run, step, payload, score)
    monkeypatch.setattr(RunDir, "save", spoil)
    assert train.main(of(stage, tmp_path / "run", trained)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "is not finite after step 2" in error and "holds the checkpoint of step 2" in error
    for name in ("last.pt", "best.pt"):
        assert checkpoint.not_finite(checkpoint.load(tmp_path / "run" / name, stage)) is None


def test_what_is_not_finite_is_named():
    fine = {"a": torch.ones(3), "b": {"c": torch.ones(2), "d": 1.0, "e": [1]}, "n": torch.arange(3)}
    assert checkpoint.not_finite(fine) is None
    for bad in (float("nan"), float("inf")):
        assert checkpoint.not_finite(fine | {"b": {"x": torch.tensor([1, bad])}}) == "b.x"


# ------------------------------------------------------------------------------------------ kill -9

# What a process was in when it died: the last mark that it left in its pipe. Capitals are ends.
MARKS = {"s": (train, "seed_everything"), "e": (train, "reconstruction"),
         "w": (checkpoint, "save"), "l": (RunDir, "log")}
MARKS_LDM = MARKS | {"e": (train, "evaluate_ldm")}
PHASES = {"": "starting", "S": "training", "e": "evaluating", "w": "writing a checkpoint"}


def fork(stage: str, flags: list[str], said: Path) -> tuple[int, int]:
    """train.main in a process that need not import torch; its pid, and a pipe with its marks."""
    marks, into = os.pipe()
    if pid := os.fork():
        os.close(into)
        return pid, marks
    code = 99
    try:
        os.close(marks)
        sys.stdout = sys.stderr = open(said, "a")
        engine.run.LOG_EVERY, engine.run.SAVE_SECONDS = 1, 0.05
        for mark, (owner, name) in (MARKS if stage == "vq" else MARKS_LDM).items():
            setattr(owner, name, marked(getattr(owner, name), mark, into))
        code = train.main(flags)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def marked(call: Callable, mark: str, into: int) -> Callable:
    """`call`, whose beginning and end are written into the pipe."""
    def marking(*args, **values):
        os.write(into, mark.encode())
        result = call(*args, **values)
        os.write(into, mark.upper().encode())
        return result
    return marking


def finish(pid: int, marks: int, said: Path) -> dict[str, float]:
    """Follows a run to its end; how long it was in each phase on average."""
    spent, last, now = collections.defaultdict(list), "", time.monotonic()
    while mark := os.read(marks, 1).decode():
        spent[last].append(time.monotonic() - now)
        last, now = mark, time.monotonic()
    os.close(marks)
    assert os.waitpid(pid, 0)[1] == 0, said.read_text()
    return {phase: float(np.mean(seconds)) for phase, seconds in spent.items()}


def kill_runs(stage: str, kills: int, rng: random.Random, root: Path) -> dict[str, int]:
    """Kills a run `kills` times and in every phase; it must end as if it had not been killed.

    One that ended before it was killed must be equal too, and begins anew. Returns deaths by phase.
    """
    steps, died, too_late, said = 40 + 6 * kills, collections.Counter(), 0, root / "said.txt"
    whole, cut = root / f"whole-{stage}", root / f"cut-{stage}"

    def flags(run: Path) -> list[str]:
        every = ["--keep-every", "7", "--eval-every", str(steps // 4)]
        return of(stage, run, root, *every, steps=steps)
    spent = finish(*fork(stage, flags(whole), said), said)
    while sum(died.values()) < kills or not set(PHASES.values()) <= died.keys():
        pid, marks = fork(stage, flags(cut), said)
        missing = [phase for phase, name in PHASES.items() if name not in died]
        phase, seen = rng.choice(missing or [*PHASES]), ""
        nth = 1 if phase == "e" else rng.randint(1, 2)
        while phase and seen.count(phase) < nth and (mark := os.read(marks, 1).decode()):
            seen += mark
        time.sleep(rng.uniform(0, spent[phase]))
        os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        seen += os.read(marks, 1 << 16).decode()
        os.close(marks)
        if status == signal.SIGKILL:
            died[PHASES.get(seen[-1:], "between these")] += 1
            continue
        too_late += 1
        assert status == 0 and too_late < 20, f"{said.read_text()}\n{died}"
        same_runs(whole, cut, stage)
        shutil.rmtree(cut)
    finish(*fork(stage, flags(cut), said), said)
    same_runs(whole, cut, stage)
    return dict(died)


@pytest.mark.slow
def test_kills_at_random_moments_of_every_phase_cost_nothing_but_time():
    argv = [sys.executable, __file__, "10", "0"]
    killing = subprocess.run(argv, env=ENV, capture_output=True, text=True)
    assert killing.returncode == 0, killing.stdout + killing.stderr
    lines = [line.split(" ", 1) for line in killing.stdout.splitlines()]
    assert [stage for stage, _ in lines] == ["vq", "ldm"]
    assert all(set(PHASES.values()) <= json.loads(died).keys() for _, died in lines)


def main(words: list[str]) -> int:
    """KILLS SEED, or the flags of a train.py that knows the preset micro and waits at step 20."""
    with pytest.MonkeyPatch.context() as patch:
        as_micro(patch)
        if not words[0].isdecimal():
            engine.run.LOG_EVERY = 1
            wait_at_a_step(patch, os.environ.get("HOLD"))
            return train.main(words)
        torch.set_num_threads(1)            # threads do not survive a fork
        rng = random.Random(int(words[1]))
        with tempfile.TemporaryDirectory() as root:
            root, said = Path(root), Path(root) / "said.txt"
            finish(*fork("vq", command("vq", root / "vq", "--steps", "8"), said), said)
            for stage in ("vq", "ldm"):
                print(stage, json.dumps(kill_runs(stage, int(words[0]), rng, root)), flush=True)
    return 0


# --------------------------------------------------------------------- signals, to real processes

def wait_at_a_step(patch: pytest.MonkeyPatch, until: str | None) -> None:
    """Step 20 begins once that file exists: else the run might end before the test reaches it."""
    seed_everything, patience = train.seed_everything, time.monotonic() + PATIENCE

    def wait_then_seed(seed: int, step: int) -> None:
        while until and step == 20 and not os.path.exists(until):
            assert time.monotonic() < patience, f"nobody made {until}"
            time.sleep(0.01)
        seed_everything(seed, step)
    patch.setattr(train, "seed_everything", wait_then_seed)


def start(flags: list[str], hold: Path | str = "") -> subprocess.Popen:
    """A run in a process of its own, which waits at step 20 for the file `hold`."""
    return subprocess.Popen([sys.executable, __file__, *flags], env=ENV | {"HOLD": str(hold)},
                            text=True, start_new_session=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def wait_for_step(run: Path, step: int, process: subprocess.Popen) -> None:
    patience = time.monotonic() + PATIENCE
    while max([-1, *(r["step"] for r in read_log(run / "log.jsonl"))]) < step:
        assert process.poll() is None and time.monotonic() < patience
        time.sleep(0.01)


@pytest.mark.parametrize("stage, number, workers", [
    ("vq", "SIGINT", 2), ("ldm", "SIGTERM", 0), ("vq", "SIGHUP", 2)])
def test_a_signal_to_all_processes_of_a_run_saves_and_says_how_to_resume(
        trained, long, tmp_path, stage, number, workers):
    run = tmp_path / "run"
    flags = of(stage, run, trained, "--workers", str(workers), steps=40)
    process = start(flags, hold=tmp_path / "go")
    wait_for_step(run, 2, process)
    os.killpg(process.pid, getattr(signal, number))
    (tmp_path / "go").touch()
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == train.INTERRUPTED, out + err
    step = checkpoint.load(run / "last.pt", stage)["step"]
    assert 3 <= step < 40 and f"{run}: stopped at step {step} of 40; rerun the same command" in out
    assert err.count("stopping after this step") == 1 and "Traceback" not in err
    assert train.main([*flags, "--workers", "0"]) == 0
    same_runs(long[stage], run, stage)


def test_a_second_ctrl_c_stops_at_once_and_an_ignored_signal_stays_ignored(capfd):
    with stop_signals() as stopped:
        for _ in range(2):                                      # torchrun and shells repeat it
            os.kill(os.getpid(), signal.SIGTERM)
        assert stopped.is_set()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)       # as nohup does
    try:
        with stop_signals() as stopped:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stopped.is_set()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# ---------------------------------------------------------------------------------- another command

def leaves(value: object, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every field, however deeply it stands in another: recipe.lr, vq_config.ch, ..."""
    if isinstance(value, dict) and value:
        for key in value:
            yield from leaves(value[key], (*path, key))
    else:
        yield path


def changed(config: dict, path: tuple[str, ...]) -> tuple[dict, object, object]:
    """`config` with another value there; that value, and the one that it replaces."""
    config = json.loads(json.dumps(config))
    place = config
    for key in path[:-1]:
        place = place[key]
    old = place[path[-1]]
    new = (not old if isinstance(old, bool) else 7 if old is None else
           old + 1 if isinstance(old, int | float) else
           f"{old}-other" if isinstance(old, str) else [*old, 5])
    place[path[-1]] = new
    return config, new, old


@pytest.mark.parametrize("stage", ["vq", "ldm"])
def test_every_field_of_a_resumed_run_may_differ_or_is_refused_with_both_values(stage):
    c = train.replace(train.make_config(train.parse_args(
        ["--stage", stage, "--steps", "9", "--device", "cpu", "--data", "mine"])),
        images=100, data_hash="0123", vq_hash="4567")
    names = {f.name for f in fields(train.Config)}
    assert MAY_DIFFER | OF_DATA <= names and not MAY_DIFFER & OF_DATA
    for path in leaves(train.plain(c)):
        old, was, now = changed(train.plain(c), path)
        if path[0] in MAY_DIFFER:
            train.resumed_config(c, old, accept_data=False)
            continue
        with pytest.raises(ValueError) as e:
            train.resumed_config(c, old, accept_data=False)
        name = ".".join(path)
        assert ("used another autoencoder" if name == "vq_hash" else
                f"a run with {name} = {was}, but this command has {name} = {now}; ") in str(e.value)
        assert "--fresh" in str(e.value) and "\n" not in str(e.value)
        if path[0] in OF_DATA:
            assert "--accept-data" in str(e.value)
            train.resumed_config(c, old, accept_data=True)
        else:
            with pytest.raises(ValueError):
                train.resumed_config(c, old, accept_data=True)


@pytest.mark.parametrize("stage", ["vq", "ldm"])
def test_images_that_changed_under_the_same_name_are_noticed(
        trained, tmp_path, monkeypatch, capsys, stage):
    root, val = folder(tmp_path / "set", 30), folder(tmp_path / "val", 12)
    flags = of(stage, tmp_path / "run", trained, "--data", str(root), "--val", str(val))
    with monkeypatch.context() as m, pytest.raises(Killed):
        die_after(m, 3)
        train.main(flags)
    capsys.readouterr()
    for part_of in (root, val):
        image = sorted((part_of / "images").iterdir())[5]
        before, times = image.read_bytes(), image.stat()
        image.write_bytes(before + b" ")
        one_sentence(capsys, train.main(flags), "data_hash", "--accept-data")
        image.write_bytes(before)
        os.utime(image, ns=(times.st_atime_ns, times.st_mtime_ns))
    write_pair(root, "clip9_000", 99)
    one_sentence(capsys, train.main(flags), "images = 30", "images = 31", "--accept-data")
    assert train.main([*flags, "--accept-data"]) == 0
    assert checkpoint.load(tmp_path / "run/last.pt", stage)["config"]["images"] == 31


# --------------------------------------------------------- other files, other runs, lost images

def test_a_run_removes_no_file_but_its_own(tmp_path):
    run = tmp_path / "run"
    foreign = ["movie.mkv.partial", "mine.pt.partial", "step-by-step.pt", "samples/my_photo.jpg",
               "samples/2.png", "samples/album/0000001.png"]
    ours = ["step-0000009.pt", "samples/0000009.png"]
    partial = [f"{name}.partial" for name in ("last.pt", "log.jsonl", "step-0000009.pt")]
    for name in (*foreign, *ours, *partial):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("x")
    for more, left in (([], [*foreign, *ours]), (["--fresh"], foreign)):
        assert train.main(command("vq", run, "--steps", "1", *more)) == 0
        assert [name for name in (*foreign, *ours, *partial) if (run / name).exists()] == left


def test_a_run_is_not_begun_among_the_images(tmp_path, capsys):
    """Else its own curves.png is an image without a pose when it resumes."""
    root = folder(tmp_path / "mine", 20)
    before = sorted(root.rglob("*"))
    for out, flag in ("images", "--val"), ("images/run", "--data"):
        argv = command("vq", root / out, flag, str(root))
        one_sentence(capsys, train.main(argv), f"--out {root / out} lies among")
        assert sorted(root.rglob("*")) == before


def test_the_second_run_into_a_folder_is_refused_until_the_first_is_killed(tmp_path, capsys):
    run = tmp_path / "run"
    flags = command("vq", run, "--steps", "100000", "--workers", "1")
    first = start(flags)
    try:
        wait_for_step(run, 2, first)
        for more in ([], ["--fresh"]):
            before = (run / "config.json").read_bytes()
            one_sentence(capsys, train.main([*flags, *more]), str(run),
                         f"process {first.pid} on {socket.gethostname()}")
            assert (run / "config.json").read_bytes() == before and first.poll() is None
        first.kill()                # and not its worker, which lives on for a moment
        first.wait()
        assert f"process {first.pid}" in (run / "lock").read_text()
        assert train.main(command("vq", run, "--steps", "1", "--fresh")) == 0
    finally:
        first.kill()
        first.communicate()
    assert (run / "lock").exists()      # removed, it would be locked by one and made anew by the next


def test_where_nothing_can_be_locked_the_run_trains(tmp_path, monkeypatch):
    import fcntl

    def no_locks(*_):
        raise OSError(37, "No locks available")
    monkeypatch.setattr(fcntl, "lockf", no_locks)
    with locked(tmp_path / "run"):
        assert f"process {os.getpid()} on" in (tmp_path / "run/lock").read_text()


def test_images_that_vanish_end_the_run_in_a_sentence_and_it_resumes_once_they_are_back(
        trained, tmp_path, monkeypatch, capsys):
    root, save = folder(tmp_path / "set", 40), RunDir.save
    more = ["--data", str(root), "--batch-size", "2"]
    assert train.main(of("vq", tmp_path / "whole", trained, *more)) == 0

    def take_away(run, step, *args) -> None:
        save(run, step, *args)
        if step == 1:
            (root / "images").rename(tmp_path / "away")
    flags = of("vq", tmp_path / "run", trained, *more)
    with monkeypatch.context() as m:
        m.setattr(RunDir, "save", take_away)
        assert train.main(flags) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error and "there is no such file" in error.splitlines()[-1]
    assert checkpoint.load(tmp_path / "run/last.pt", "vq")["step"] == 2
    (tmp_path / "away").rename(root / "images")
    assert train.main(flags) == 0
    same_runs(tmp_path / "whole", tmp_path / "run", "vq")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
