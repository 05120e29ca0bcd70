"""Loading and the latent cache against real faults: processes are killed, files are cut, a disk fills up."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import Numbered, centroid, dotted, folder, some_pose, watchful  # noqa: F401  (watchful is a fixture)

import data
import dataset.latents
from data import DataError, InMemory, PoseFolder, batches, to_square
from dataset.latents import LatentCache, latent_batch

PATIENCE = 600                      # seconds for a process, before it counts as hung

# ------------------------------------------------------------------------------------------- reduced JPEGs

TURNS = {1: (), 3: (Image.Transpose.ROTATE_180,), 6: (Image.Transpose.ROTATE_90,), 8: (Image.Transpose.ROTATE_270,)}


@pytest.mark.parametrize("W, H", [(1000, 1000), (1001, 1003), (1025, 1999), (2003, 1537)])
@pytest.mark.parametrize("orientation", TURNS)
def test_joints_stay_on_their_pixels_in_a_jpeg_that_is_decoded_reduced(tmp_path, W, H, orientation):
    checked, exif, file = 0, Image.Exif(), tmp_path / "a.jpg"
    exif[0x0112] = orientation
    for seed in range(6):
        joint, pose = seed % 17, some_pose(seed)
        picture = dotted(joint, W, H, pose)
        for turn in TURNS[orientation]:                     # as it is stored; a viewer turns it back
            picture = picture.transpose(turn)
        picture.save(file, "JPEG", quality=95, exif=exif)
        reduced = data.read_picture(file, at_least=128)
        assert 128 <= min(reduced.size) < 256 and abs(reduced.width * H / W - reduced.height) < 2
        image, moved = to_square(reduced, pose, 64)
        if (np.abs(moved[joint, :2] - 0.5) < 0.42).all():
            assert np.abs(moved[joint, :2] * 64 - centroid(image)).max() < 0.08     # without care 0.4 pixels
            checked += 1
    assert checked >= 3


def test_a_jpeg_that_is_decoded_reduced_looks_as_if_it_had_been_decoded_whole(tmp_path):
    rng, file = np.random.default_rng(0), tmp_path / "a.jpg"
    coarse = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).resize((1024, 1024), Image.BICUBIC)
    grain = rng.normal(0, 8, (1024, 1024, 3))               # of a camera
    Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    whole = to_square(data.read_picture(file), some_pose(0), 128)[0].astype(int)
    reduced = data.read_picture(file, at_least=256)
    error = np.abs(to_square(reduced, some_pose(0), 128)[0] - whole)
    assert reduced.size == (256, 256) and error.mean() < 0.6 and error.max() <= 8       # of 255


# --------------------------------------------------------------------------------------- several processes

def test_the_shares_of_all_ranks_are_the_batch_of_one_process(tmp_path):
    ds = PoseFolder(folder(tmp_path, 200, size=(30, 24)), 16)
    bad = data.step_indices(200, 12, 5, 3)[7]
    Path(ds.paths[bad]).write_bytes(b"not a picture")           # one of them needs another
    for world, workers in ((2, 0), (3, 2), (4, 0)):
        how = {"seed": 5, "start": 1, "stop": 6, "augment": True}
        shares = [list(batches(ds, 12, **how, rank=r, world=world, workers=workers)) for r in range(world)]
        for whole, *parts in zip(batches(ds, 12, **how), *shares, strict=True):
            assert [len(x) for x, _, _ in parts] == [12 // world] * world
            for one, several in zip(whole, zip(*parts, strict=True), strict=True):
                assert torch.equal(one, torch.cat(several))
    with pytest.raises(DataError, match="12 cannot be shared out among 5 processes"):
        next(batches(ds, 12, seed=0, start=0, stop=1, rank=0, world=5))


def test_the_shares_of_all_ranks_are_the_latent_batch_of_one_process(tmp_path):
    cache = LatentCache(tmp_path, "a", Numbered(40), lambda x: x)
    for k in range(8):
        shares = [latent_batch(cache, 12, 1, k, rank, 3) for rank in range(3)]
        for one, several in zip(latent_batch(cache, 12, 1, k), zip(*shares, strict=True), strict=True):
            assert several[0].shape[0] == 4 and torch.equal(one, torch.cat(several))
    with pytest.raises(DataError, match="12 cannot be shared out among 5"):
        latent_batch(cache, 12, 1, 0, 0, 5)


# ------------------------------------------------------------------------------- faults while a run is loading

@pytest.mark.usefixtures("watchful")
@pytest.mark.parametrize("pause", [0.5, 0])         # at once, it is a torn connection that is found, not the dead
def test_the_run_goes_on_where_a_worker_was_killed_and_says_so(capsys, pause):
    ds, how = Numbered(50, size=8), {"seed": 3, "start": 2, "stop": 30, "augment": True}
    seen = []
    for k, batch in enumerate(batches(ds, 4, **how, workers=2)):
        seen.append(batch)
        if k == 5:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
            time.sleep(pause)                   # the training step, which must not be interrupted by that
    for one, other in zip(batches(ds, 4, **how), seen, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert re.search(r"died.*go on from batch \d+", capsys.readouterr().err)


@pytest.mark.parametrize("workers", [0, 2])
def test_pictures_that_vanish_or_are_cut_while_it_runs_are_named_and_left_out(tmp_path, capsys, workers):
    ds = PoseFolder(folder(tmp_path, 300), 12)
    sound = [data.to_tensor(ds[i][0]) for i in range(300)]
    gone, cut = (int(data.step_indices(300, 10, 0, k)[0]) for k in (25, 28))
    for k, (images, _, indices) in enumerate(batches(ds, 10, seed=0, start=0, stop=60, workers=workers)):   # 2 epochs
        assert torch.equal(images, torch.stack([sound[i] for i in indices.tolist()])) and len(images) == 10
        if k == 4:
            os.unlink(ds.paths[gone])
            os.truncate(ds.paths[cut], os.path.getsize(ds.paths[cut]) // 2)
    assert set(ds.broken) == {ds.paths[gone], ds.paths[cut]}
    told = capsys.readouterr().err
    assert all(told.count(f"left out: {ds.paths[i]}: {why}") == 1
               for i, why in ((gone, "there is no such file"), (cut, "cannot be read as a picture")))


def test_a_batch_is_full_however_many_pictures_in_a_row_are_gone(tmp_path):
    ds = PoseFolder(folder(tmp_path, 700), 12)
    for i in range(100, 107):                   # 7 of 700 are allowed, all 7 in the 200 that train
        os.unlink(ds.paths[i])
    part = data.Part(ds, list(range(200)))
    assert [len(images) for images, *_ in batches(part, 10, seed=0, start=0, stop=20)] == [10] * 20
    assert len(ds.broken) == 7


def test_a_folder_that_goes_away_stops_the_run(tmp_path):
    ds = PoseFolder(folder(tmp_path / "set", 200), 12)
    with pytest.raises(DataError, match="of 200 pictures cannot be used, more than 1%; the first is .*no such file"):
        for k, (images, *_) in enumerate(batches(ds, 10, seed=0, start=0, stop=30)):
            assert len(images) == 10            # never less than a batch
            if k == 2:
                os.rename(tmp_path / "set" / "images", tmp_path / "away")


def test_of_a_lost_folder_only_so_many_pictures_are_sought_as_may_be_lost(tmp_path, monkeypatch, capsys):
    ds, sought, read = PoseFolder(folder(tmp_path / "set", 400), 12), [], data.read_picture
    monkeypatch.setattr(data, "read_picture", lambda path, **how: sought.append(path) or read(path, **how))
    os.rename(tmp_path / "set" / "images", tmp_path / "away")
    with pytest.raises(DataError, match="5 of 400 pictures cannot be used, more than 1%; the first is .*no such file"):
        next(batches(ds, 32, seed=0, start=0, stop=1))
    assert len(sought) == 5 and "left out" not in capsys.readouterr().err


def test_a_picture_found_broken_is_not_tried_again_for_the_same_batch(tmp_path, monkeypatch):
    ds, sought, read = PoseFolder(folder(tmp_path, 400), 12), [], data.read_picture
    for i in range(3):
        os.unlink(ds.paths[i])
    monkeypatch.setattr(data, "read_picture", lambda path, **how: sought.append(path) or read(path, **how))
    [(images, *_)] = batches(data.Part(ds, [0, 1, 2, 3]), 4, seed=0, start=0, stop=1)
    assert len(images) == 4 and sorted(map(ds.paths.index, sought)) == [0, 1, 2, 3, 3, 3, 3]


# ----------------------------------------------------------------------------------------------- the cache

def pictures(root: Path) -> PoseFolder:
    """203 pictures of which the 10th, and one towards the end, cannot be read."""
    if not root.exists():
        ds = PoseFolder(folder(root, 203), 12)
        for i in (10, 190):
            Path(ds.paths[i]).write_bytes(b"not a picture")
    return PoseFolder(root, 12)


def fill(root: str, cache: str, key: str = "a", hold: str = "", at_most: int = 10 ** 9) -> LatentCache:
    """A cache of those pictures, with a record after each batch of 4. After 13 batches, of two calls each, the encoder
    waits for the file `hold`: so what others do meanwhile may take them as long as it likes."""
    calls = 0

    def encode(x):
        nonlocal calls
        calls += 1
        assert calls <= at_most, "it started over"
        until = time.monotonic() + PATIENCE
        while hold and calls > 2 * 13 and not os.path.exists(hold):
            assert time.monotonic() < until, "nobody let it go on, nor was it killed"
            time.sleep(0.01)
        return x[:, :, ::3, 1::3] * 1.7 - 0.3
    dataset.latents.RECORD_SECONDS = 0
    made = LatentCache(cache, key, pictures(Path(root)), encode, batch_size=4)
    print(f"{calls} calls")
    return made


def start(*args) -> subprocess.Popen:
    """fill(*args) as another process."""
    here = Path(__file__).parent
    return subprocess.Popen([sys.executable, "-c", f"import test_loader; test_loader.fill(*{args!r})"], cwd=here,
                            env=os.environ | {"PYTHONPATH": f"{here.parent}:{here}"}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def batches_on_record(cache: Path) -> int:
    found = list(cache.glob("*.json.tmp"))
    return json.loads(found[0].read_text())["batches"] if found else 0


def wait_for(condition, process: subprocess.Popen) -> None:
    until = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until, "it never came to that"
        time.sleep(0.05)


def never(cache: Path) -> str:
    """A file that nobody makes."""
    return f"{cache}-never"


def contents(cache: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in cache.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[str, dict[str, bytes]]:
    """The folder of pictures, and the bytes of an uninterrupted cache of them."""
    folder = tmp_path_factory.mktemp("whole")
    assert len(fill(str(folder / "set"), str(folder / "cache"))) == 2 * 201
    wanted = contents(folder / "cache")
    assert len(wanted) == 4
    return str(folder / "set"), wanted


def test_a_killed_filling_goes_on_to_the_same_bytes(tmp_path, whole):
    root, wanted = whole
    process = start(root, str(tmp_path), "a", never(tmp_path))
    wait_for(lambda: batches_on_record(tmp_path) >= 12, process)
    process.kill()
    process.wait()
    done = batches_on_record(tmp_path)
    assert 12 <= done < 51 and not list(tmp_path.glob("*.json"))
    for file in tmp_path.glob("*.*32"):                         # what was written but is not on record
        with open(file, "ab") as f:
            f.write(b"half a row")
    again = fill(root, str(tmp_path), at_most=2 * (51 - done))  # two calls a batch
    assert contents(tmp_path) == wanted and len(again) == 402


def test_of_two_processes_one_fills_and_when_it_is_killed_the_other_goes_on(tmp_path, whole):
    root, wanted = whole
    first = start(root, str(tmp_path), "a", never(tmp_path))        # it does not end before it is killed
    wait_for(lambda: batches_on_record(tmp_path) >= 1, first)
    second = start(root, str(tmp_path))
    assert "another run is filling this cache; waiting" in second.stderr.readline()
    other_model = start(root, str(tmp_path), "b")       # which clears away what is of other models, but not this
    assert other_model.wait() == 0 and batches_on_record(tmp_path) >= 1
    first.kill()
    first.wait()
    done = batches_on_record(tmp_path)
    told, _ = second.communicate()
    assert second.returncode == 0 and 0 < int(told.split()[0]) <= 2 * (51 - done) < 100
    assert contents(tmp_path) == wanted                 # and what the other model left is gone


def test_who_waited_for_a_cache_takes_it_as_it_is(tmp_path, whole):
    root, wanted = whole
    go = tmp_path.with_name(f"{tmp_path.name}-go")
    first = start(root, str(tmp_path), "a", str(go))        # the others, once they started, have to wait
    wait_for(lambda: batches_on_record(tmp_path) >= 1, first)
    others = [start(root, str(tmp_path)) for _ in range(2)]
    assert all("waiting for it" in other.stderr.readline() for other in others)
    go.touch()
    told = [process.communicate()[0] for process in (first, *others)]
    assert told == ["102 calls\n", "0 calls\n", "0 calls\n"] and contents(tmp_path) == wanted


def test_never_are_two_alone(tmp_path):
    inside, most, entered = 0, 0, 0

    def enter() -> None:
        nonlocal inside, most, entered
        for _ in range(40):
            with dataset.latents.alone(tmp_path / "lock"):
                inside += 1
                most, entered = max(most, inside), entered + 1
                time.sleep(1e-4)
                inside -= 1
    threads = [threading.Thread(target=enter) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, entered) == (1, 240) and not (tmp_path / "lock").exists()


def test_a_lock_that_a_kill_left_behind_locks_nothing(tmp_path, whole):
    root, wanted = whole
    [stem] = {name.split(".")[0] for name in wanted}
    (tmp_path / f"{stem}.lock").write_text("")
    fill(root, str(tmp_path))
    assert contents(tmp_path) == wanted


def test_the_broken_pictures_before_a_kill_are_known_after_it(tmp_path):
    ds = pictures(tmp_path / "set")

    def encode(x, calls=[]):        # noqa: B006
        calls.append(0)
        if len(calls) == 31:
            raise KeyboardInterrupt
        return x
    before, dataset.latents.RECORD_SECONDS = dataset.latents.RECORD_SECONDS, 0
    try:
        with pytest.raises(KeyboardInterrupt):
            LatentCache(tmp_path / "cache", "a", ds, encode, batch_size=4)
        ds = pictures(tmp_path / "set")
        LatentCache(tmp_path / "cache", "a", ds, encode, batch_size=4)
    finally:
        dataset.latents.RECORD_SECONDS = before
    assert list(ds.broken) == [ds.paths[10], ds.paths[190]]


def test_garbage_in_the_middle_is_never_trained_on(tmp_path, whole):
    root, wanted = whole
    for end, row in ((".h.f16", 137), (".crc.u32", 137), (".pose.f32", 20)):
        for name, content in wanted.items():
            (tmp_path / name).write_bytes(content)
        cache = fill(root, str(tmp_path))
        [file] = tmp_path.glob(f"*{end}")
        with open(file, "r+b") as f:                    # in place: the cache has it mapped
            f.seek(row * file.stat().st_size // 402 + 1)
            f.write(b"\x07")
        rows = np.arange(402)
        cache.rows(rows[rows != row])                   # the others are as they were
        with pytest.raises(DataError, match=rf"latents-.*\.h\.f16: it has another row {row} than was written"):
            cache.rows([3, row])
        fill(root, str(tmp_path))
        assert contents(tmp_path) == wanted             # the same command made it anew


@pytest.mark.parametrize("end", [".pose.f32", ".crc.u32"])
def test_garbage_in_the_small_files_is_seen_when_they_are_opened(tmp_path, whole, capsys, end):
    root, wanted = whole
    for name, content in wanted.items():
        spoilt = content[:99] + b"\x07" + content[100:] if name.endswith(end) else content
        (tmp_path / name).write_bytes(spoilt)
    fill(root, str(tmp_path))
    assert contents(tmp_path) == wanted and re.search(r"json: .*damaged; it is made anew", capsys.readouterr().err)


@pytest.mark.parametrize("end", [".pose.f32", ".crc.u32", ".h.f16"])
def test_what_is_no_sound_cache_is_left_closed(tmp_path, whole, end):
    for name, content in whole[1].items():
        (tmp_path / name).write_bytes(content[:99] if name.endswith(end) else content)
    cache = LatentCache.__new__(LatentCache)
    *cache.files, cache.json = (next(tmp_path.glob(f"*{e}")) for e in (*LatentCache.ARRAYS, ".json"))
    assert not cache._open() and len(cache.mapped) == 3 and all(file.closed for file in cache.mapped)
    for name, content in whole[1].items():
        (tmp_path / name).write_bytes(content)
    assert cache._open() and not any(file.closed for file in cache.mapped)


CUT = """
import glob, os, sys, test_loader
cache = test_loader.fill(*sys.argv[1:])
cache.rows([0, 401])
[file] = glob.glob(sys.argv[2] + "/*.h.f16")
os.truncate(file, 4096)
try:
    cache.rows([401])
except ValueError as error:
    print(error)
"""


def test_a_cache_that_is_cut_under_a_run_is_a_sentence_and_not_a_bus_error(tmp_path, whole):
    here = Path(__file__).parent
    told = subprocess.run([sys.executable, "-c", CUT, whole[0], tmp_path], cwd=here, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": f"{here.parent}:{here}"})
    assert told.returncode == 0, told
    assert re.search(r"latents-.*\.h\.f16: it has another length than was written", told.stdout)


@pytest.fixture
def small_disk(tmp_path) -> Path:
    """A disk of 4 MB."""
    where = tmp_path / "disk"
    where.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", where]).returncode:
        pytest.skip("mounting a small disk takes root")
    yield where
    subprocess.run(["umount", "-l", where], check=True)


def test_a_disk_that_fills_up_while_the_cache_is_written(tmp_path, small_disk):
    ds, calls, hog = Numbered(100, size=64), [], small_disk / "hog"         # 2.5 MB of latents

    def encode(x):
        calls.append(len(x))
        if len(calls) == 10:                                    # after the look at the free space
            hog.write_bytes(bytes(shutil.disk_usage(small_disk).free))
        return x[..., ::2, ::2].clone()
    wanted = LatentCache(tmp_path / "sound", "a", ds, lambda x: x[..., ::2, ::2], batch_size=4)
    before, dataset.latents.RECORD_SECONDS = dataset.latents.RECORD_SECONDS, 0
    try:
        with pytest.raises(DataError, match="h.f16: the disk is full; make room"):
            LatentCache(small_disk / "cache", "a", ds, encode, batch_size=4)
        hog.unlink()
        done = sum(calls) // 2
        cache = LatentCache(small_disk / "cache", "a", ds, encode, batch_size=4)
    finally:
        dataset.latents.RECORD_SECONDS = before
    assert sum(calls) // 2 <= 100 + done - 12 and contents(tmp_path / "sound") == contents(small_disk / "cache")
    assert torch.equal(cache.mean, wanted.mean) and torch.equal(cache.std, wanted.std)
    del cache


def test_latents_that_can_have_no_room_are_refused_at_once(small_disk):
    with pytest.raises(DataError, match=r"the latents need 4\.6 GiB and 0\.0 are free"):
        LatentCache(small_disk, "a", Numbered(100_000, size=64), lambda x: x)


def test_a_picture_that_vanished_since_it_was_listed_has_no_rows(tmp_path):
    ds = PoseFolder(folder(tmp_path / "set", 150), 12)
    os.unlink(ds.paths[7])
    cache = LatentCache(tmp_path / "cache", "a", ds, lambda x: x)
    assert len(cache) == 298 and list(ds.broken) == [ds.paths[7]]
    assert np.allclose(cache.rows([14])[1][0], ds[8][1])


def test_poses_are_mapped_and_rows_are_copies(tmp_path):
    cache = LatentCache(tmp_path, "a", Numbered(9), lambda x: x)
    for array in (cache.latents, cache.poses):
        assert isinstance(array.base, np.memmap) and not array.flags.writeable
    latents, poses = cache.rows([0, 1])
    latents += 1
    poses += 1
    assert not torch.equal(latents, cache.rows([0, 1])[0]) and not torch.equal(poses, cache.rows([0, 1])[1])


def test_one_memory_serves_all_ranks_alike():
    ds = InMemory(Numbered(10))
    parts = [next(batches(ds, 4, seed=0, start=0, stop=1, rank=r, world=2))[2] for r in (0, 1)]
    assert torch.cat(parts).tolist() == data.step_indices(10, 4, 0, 0).tolist()
