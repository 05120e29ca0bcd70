# ruff: noqa: F811    (pytest hands fixtures in by the names under which they are imported)
"""What a run survives, with real signals to real processes, real full disks and files that really vanish."""
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_train import MICRO, Killed, micro, same, trained  # noqa: F401  (two are fixtures)
from test_train import command as command_of

import checkpoint
import data
import train

STEPS = 6                       # of a run here; EVALS makes an evaluation and a checkpoint of each


def command(stage: str, out: Path, trained: Path, *flags: str) -> list[str]:
    return command_of(stage, out, "--steps", str(STEPS), "--vq", str(trained / "vq/last.pt"), *flags)


@pytest.fixture(scope="module")
def whole(trained, tmp_path_factory) -> dict[str, Path]:
    """The folder of an uninterrupted run of each stage."""
    out = {stage: tmp_path_factory.mktemp("whole") / stage for stage in ("vq", "ldm")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train.PRESETS, "micro", MICRO)
        patch.setattr(train, "PREVIEW_STEPS", 2)
        for stage, folder in out.items():
            assert train.main(command(stage, folder, trained)) == 0
    return out


def same_runs(one: Path, other: Path, stage: str) -> None:
    """Weights, training state, logs, kept checkpoints and pictures: bit for bit."""
    names = sorted(p.name for p in one.glob("*.pt"))
    assert names == sorted(p.name for p in other.glob("*.pt"))
    for name in names:
        same(*(checkpoint.load(run / name, stage) for run in (one, other)))
    assert train.read_log(one / "log.jsonl") == train.read_log(other / "log.jsonl")
    pictures = [{p.name: p.read_bytes() for p in (run / "samples").iterdir()} for run in (one, other)]
    assert pictures[0] == pictures[1]
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


@pytest.fixture(params=["disk", "limit"])
def small_disk(request, tmp_path) -> Iterator[SmallDisk]:
    path = tmp_path / "small"
    path.mkdir()
    disk = SmallDisk(path, request.param)
    if request.param == "disk" and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(path)],
                                                  capture_output=True).returncode:
        pytest.skip("mounting is not permitted here; the limit stands in")
    yield disk
    disk.free()
    if request.param == "disk":
        subprocess.run(["umount", "-l", str(path)], check=True)


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


MOMENTS = {                     # what cannot be written: before which call the disk is full, room left, step that is kept
    "config.json": (train.Run, "_write_config", 0, 2),
    "log.jsonl": (train.Run, "log", 0, 2),
    "t.pt": (train.Run, "save", 20_000, 2),
    "curves.png": (train, "plot_curves", 0, 3),
    "samples/0000003.png": (data, "save_grid", 0, 3),
}


def stop_after_drawing(run: train.Run, step: int) -> None:
    draw(run, step)
    if step == 2:
        raise Killed


draw = train.Run.draw


@pytest.mark.parametrize("stage", ["vq", "ldm"])
@pytest.mark.parametrize("what", MOMENTS)
def test_a_disk_that_fills_up_is_one_sentence_and_the_run_goes_on_once_there_is_room(
        trained, whole, small_disk, monkeypatch, capsys, stage, what):
    run = small_disk.path / "run"
    flags = command(stage, run, trained)
    with monkeypatch.context() as m, pytest.raises(Killed):
        m.setattr(train.Run, "draw", stop_after_drawing)
        train.main(flags)
    owner, name, room, kept = MOMENTS[what]
    with monkeypatch.context() as m:
        call = getattr(owner, name)
        m.setattr(owner, name, lambda *args, **values: (small_disk.fill(room), call(*args, **values))[1])
        code = train.main(flags)
    small_disk.free()
    error = capsys.readouterr().err.splitlines()[-1]
    assert code == 2 and error.startswith(f"train.py: cannot write {run}/") and "Traceback" not in error
    reason = "No space left on device" if small_disk.kind == "disk" else "File too large"
    assert f"{what} ({reason})" in error and f"{run}/last.pt holds the last good checkpoint, of step {kept}" in error
    assert checkpoint.load(run / "last.pt", stage)["step"] == kept
    assert train.main(flags) == 0
    same_runs(whole[stage], run, stage)
