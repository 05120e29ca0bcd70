"""Loading and the latent cache against faults: processes are killed, files cut, disks full."""

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import Numbered, centroid, dotted, folder, some_pose

import data
import dataset.latents
import keypoints
from data import InMemory, Part, PoseFolder, batches, crop_resize
from dataset.images import WORKER_DIED, DataError, read_image
from dataset.latents import LatentCache, latent_batch

PATIENCE = 600                      # seconds for a process, before it counts as hung

# --------------------------------------------------------------------------------- reduced JPEGs

TURNS = {1: (), 3: (Image.Transpose.ROTATE_180,), 6: (Image.Transpose.ROTATE_90,),
         8: (Image.Transpose.ROTATE_270,)}


@pytest.mark.parametrize("W, H", [(1001, 1003), (1025, 1999)])
@pytest.mark.parametrize("orientation", TURNS)
def test_joints_stay_on_their_pixels_in_a_reduced_jpeg(tmp_path, W, H, orientation):
    checked, exif, file = 0, Image.Exif(), tmp_path / "a.jpg"
    exif[0x0112] = orientation
    for seed in range(4):
        joint, pose = seed % 17, some_pose(seed)
        image = dotted(joint, W, H, pose)
        for turn in TURNS[orientation]:                     # as it is stored
            image = image.transpose(turn)
        image.save(file, "JPEG", quality=95, exif=exif)
        reduced = read_image(file, at_least=128)
        assert 128 <= min(reduced.size) < 256
        assert abs(reduced.width * H / W - reduced.height) < 2
        square, moved = crop_resize(reduced, pose, 64)
        if (np.abs(moved[joint, :2] - 0.5) < 0.42).all():
            apart = np.abs(moved[joint, :2] * 64 - centroid(square)).max()
            assert apart < 0.08                             # unstretched 0.4 pixels
            checked += 1
    assert checked >= 2


def test_a_reduced_jpeg_looks_like_the_whole_one(tmp_path):
    rng, file = np.random.default_rng(0), tmp_path / "a.jpg"
    coarse = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
    grainy = np.asarray(coarse.resize((1024, 1024), Image.BICUBIC)) + rng.normal(
        0, 8, (1024, 1024, 3))
    Image.fromarray(grainy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    reduced = read_image(file, at_least=256)
    whole, small = (crop_resize(image, some_pose(0), 128)[0].astype(int)
                    for image in (read_image(file), reduced))
    error = np.abs(whole - small)
    assert reduced.size == (256, 256) and error.mean() < 0.6 and error.max() <= 8       # of 255


# ----------------------------------------------------------------------------- several processes

def test_the_shares_of_all_ranks_are_the_batch_of_one_process(tmp_path):
    ds = PoseFolder(folder(tmp_path, 200, size=(30, 24)), 16)
    bad = data.step_indices(200, 12, 5, 3)[7]
    Path(ds.paths[bad]).write_bytes(b"not an image")            # one of them needs another
    how = {"seed": 5, "start": 1, "stop": 6, "augment": True}
    for some, world, workers in ((ds, 2, 0), (ds, 3, 2), (InMemory(ds), 4, 0)):
        shares = [list(batches(some, 12, **how, rank=r, world=world, workers=workers))
                  for r in range(world)]
        for whole, *parts in zip(batches(ds, 12, **how), *shares, strict=True):
            assert [len(x) for x, _, _ in parts] == [12 // world] * world
            for one, several in zip(whole, zip(*parts, strict=True), strict=True):
                assert torch.equal(one, torch.cat(several))


def test_the_shares_of_all_ranks_are_the_latent_batch_of_one_process(tmp_path):
    cache = LatentCache(tmp_path, "a", Numbered(40), lambda x: x)
    for k in range(8):
        shares = [latent_batch(cache, 12, 1, k, rank, 3) for rank in range(3)]
        for one, several in zip(latent_batch(cache, 12, 1, k), zip(*shares, strict=True),
                                strict=True):
            assert several[0].shape[0] == 4 and torch.equal(one, torch.cat(several))


KILLED = """
import multiprocessing, os, signal, sys, time, torch
sys.path[:0] = ["tests", "."]
import train
from data import batches
from test_loader import Numbered
look = torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data
look.__defaults__ = (0.2,)                                          # seconds between looks, else 5

def run(*_, **__):
    for k, _ in enumerate(batches(Numbered(50, size=8), 4, 3, 2, 300, workers=2)):
        if k == 5:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
            time.sleep({pause})                                     # the training step

train.run_stage = run
sys.exit(train.main(["--stage", "vq", "--out", {out!r}]))
"""


@pytest.mark.parametrize("pause", [0.5, 0])     # torch raises in the pause, or in the loader
def test_a_worker_that_is_killed_ends_the_run_with_one_sentence(tmp_path, pause):
    """In a process of its own: torch raises from a signal handler, which may leave a lock held."""
    script = KILLED.format(pause=pause, out=str(tmp_path / "run"))
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent.parent, text=True,
                          capture_output=True)
    assert done.returncode, done.stderr     # 2; 1 where torch's handler raises once more at the end
    assert f"train.py: {WORKER_DIED}\n" in done.stderr        # torch's own cleanup may follow


@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_vanish_or_are_cut_while_it_runs_are_named_and_left_out(
        tmp_path, capsys, workers):
    ds = PoseFolder(folder(tmp_path, 300), 12)
    sound = [data.to_tensor(ds[i][0]) for i in range(300)]
    gone, cut = (int(data.step_indices(300, 10, 0, k)[0]) for k in (25, 28))
    for k, (images, _, indices) in enumerate(
            batches(ds, 10, seed=0, start=0, stop=60, workers=workers)):        # two epochs
        assert torch.equal(images, torch.stack([sound[i] for i in indices.tolist()]))
        assert len(images) == 10
        if k == 4:
            os.unlink(ds.paths[gone])
            os.truncate(ds.paths[cut], os.path.getsize(ds.paths[cut]) // 2)
    assert set(ds.broken) == {ds.paths[gone], ds.paths[cut]}
    told = capsys.readouterr().err
    for i, why in ((gone, "there is no such file"), (cut, "not a readable image")):
        assert told.count(f"left out: {ds.paths[i]}: {why}") == 1


def test_a_batch_is_full_however_many_images_in_a_row_are_gone(tmp_path, monkeypatch):
    ds, sought, read = PoseFolder(folder(tmp_path, 700), 12), [], read_image
    for i in range(100, 107):                   # 7 of 700 are allowed, all 7 in the 200 that train
        os.unlink(ds.paths[i])
    monkeypatch.setattr(data, "read_image",
                        lambda path, *how: sought.append(path) or read(path, *how))
    for images, *_ in batches(Part(ds, range(200)), 200, seed=0, start=0, stop=1):
        assert len(images) == 200
    assert len(ds.broken) == 7
    assert all(sought.count(ds.paths[i]) == 1 for i in range(100, 107))         # not tried again


def test_a_folder_that_goes_away_ends_the_run_soon(tmp_path, monkeypatch, capsys):
    ds, sought, read = PoseFolder(folder(tmp_path / "set", 400), 12), [], read_image
    steps = batches(ds, 32, seed=0, start=0, stop=30)
    next(steps)
    monkeypatch.setattr(data, "read_image",
                        lambda path, *how: sought.append(path) or read(path, *how))
    os.rename(tmp_path / "set" / "images", tmp_path / "away")
    with pytest.raises(DataError, match="5 images cannot be used.*there is no such file"):
        next(steps)
    assert len(sought) == 5 and "left out" not in capsys.readouterr().err


# ------------------------------------------------------------------------------------- the cache

class Encoder:
    """Not symmetric, so that the latents of a mirror image are not mirrored latents."""

    def __init__(self):
        torch.manual_seed(0)
        self.conv, self.calls = torch.nn.Conv2d(3, 5, 4, stride=4), 0

    def __call__(self, x):
        self.calls += 1
        return self.conv(x)


def test_rows_are_the_images_and_their_mirror_images(tmp_path):
    ds, encode = PoseFolder(folder(tmp_path / "set", 11, size=(20, 16)), 16), Encoder()
    cache = LatentCache(tmp_path / "cache", "key", ds, encode, batch_size=4)
    assert len(cache) == 22 and cache.latents.dtype == np.float16
    for array in (cache.latents, cache.poses):
        assert isinstance(array.base, np.memmap) and not array.flags.writeable
    latents, poses = cache.rows(torch.arange(22))
    for i in range(11):
        for row, flip in ((2 * i, False), (2 * i + 1, True)):
            image, pose = ds[i]
            if flip:
                image, pose = image[:, ::-1].copy(), keypoints.flip(pose)
            with torch.no_grad():
                truth = encode(data.to_tensor(image)[None])[0].half().float()
            assert torch.allclose(latents[row], truth, atol=2e-3)
            assert np.allclose(poses[row], pose, atol=1e-6)
    stored = np.array(cache.latents, np.float64)
    assert cache.mean.shape == cache.std.shape == (5, 1, 1)
    assert np.allclose(cache.mean.ravel(), stored.mean((0, 2, 3)), atol=1e-6)
    assert np.allclose(cache.std.ravel(), stored.std((0, 2, 3)), atol=1e-6)


def test_a_cache_is_used_only_for_its_own_model_and_images(tmp_path):
    ds, encode = PoseFolder(folder(tmp_path / "set", 6, size=(16, 16)), 16), Encoder()

    def is_encoded(key="a", ds=ds):
        before = encode.calls
        LatentCache(tmp_path / "cache", key, ds, encode)
        return encode.calls > before
    assert is_encoded() and not is_encoded()
    (tmp_path / "cache" / "latents-of-mine.npy").write_text("keep")
    assert is_encoded(ds=Part(ds, [0, 1])) and not is_encoded()         # both lie side by side
    assert is_encoded("b") and is_encoded()                     # another model: the old one goes
    assert (tmp_path / "cache" / "latents-of-mine.npy").exists()
    assert len(list((tmp_path / "cache").iterdir())) == 4
    os.utime(ds.paths[2], ns=(1, 1))
    assert is_encoded() and not is_encoded()                            # an image was touched
    assert is_encoded(ds=PoseFolder(tmp_path / "set", 12))              # another size


@pytest.mark.parametrize("end", [".h.f16", ".pose.f32"])
@pytest.mark.parametrize("damage", [lambda content: content[:-9], lambda content: content + b"123"])
def test_a_file_of_the_wrong_length_is_refused(tmp_path, end, damage):
    LatentCache(tmp_path, "a", Numbered(5, size=8), Encoder())
    [file] = tmp_path.glob(f"*{end}")
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DataError, match=rf"{file.name}: [\d,]+ bytes long instead of") as error:
        LatentCache(tmp_path, "a", Numbered(5, size=8), Encoder())
    [json_file] = tmp_path.glob("*.json")
    assert str(json_file) in str(error.value)
    json_file.unlink()                                                  # what the sentence asks for
    assert len(LatentCache(tmp_path, "a", Numbered(5, size=8), Encoder())) == 10


def test_broken_images_have_no_rows(tmp_path):
    ds = PoseFolder(folder(tmp_path / "set", 200), 12)
    open(ds.paths[50], "wb").write(b"")
    os.unlink(ds.paths[7])                                              # since it was listed
    cache = LatentCache(tmp_path / "cache", "a", ds, Encoder(), batch_size=16)
    assert len(cache) == 396 and list(ds.broken) == [ds.paths[7], ds.paths[50]]
    assert np.allclose(cache.rows([14])[1][0], ds[8][1])
    assert np.allclose(cache.rows([98])[1][0], ds[51][1])
    stored = np.array(cache.latents, np.float64)
    assert np.allclose(cache.mean.ravel(), stored.mean((0, 2, 3)), atol=1e-6)


def test_latents_that_overflow_are_refused(tmp_path):
    for bad in (1e6, float("nan")):
        with pytest.raises(ValueError, match="do not fit float16"):
            LatentCache(tmp_path, "a", Numbered(5), lambda x, bad=bad: x * 0 + bad)


def test_latent_batches_take_each_image_once_an_epoch_and_mirror_half(tmp_path):
    cache = LatentCache(tmp_path, "a", Numbered(40), lambda x: x)
    which = [torch.cat([((z[:, 0, 0, 0] + 1) * 127.5).round().long() for z, _, _ in
                        (latent_batch(cache, 8, seed, k) for k in range(50))])
             for seed in (0, 0, 1)]
    assert torch.equal(which[0], which[1]) and not torch.equal(which[0], which[2])
    assert (which[0].view(10, 40).sort(1).values == torch.arange(40)).all()
    poses = torch.cat([latent_batch(cache, 8, 0, k)[1] for k in range(50)])
    mirrored = [not np.allclose(pose, some_pose(int(i)))
                for pose, i in zip(poses, which[0], strict=True)]
    assert 0.4 < np.mean(mirrored) < 0.6


def broken_two(root: Path) -> PoseFolder:
    """203 images of which the 10th, and one towards the end, cannot be read."""
    if not root.exists():
        ds = PoseFolder(folder(root, 203), 12)
        for i in (10, 190):
            Path(ds.paths[i]).write_bytes(b"not an image")
    return PoseFolder(root, 12)


def fill(root: str, cache: str, hold: str = "", every: int = 1) -> LatentCache:
    """A cache of those images, recorded after each batch of 4. After 13 batches, of two calls each,
    the encoder waits for the file `hold`, so that a kill comes in time."""
    calls = 0

    def encode(x):
        nonlocal calls
        calls += 1
        until = time.monotonic() + PATIENCE
        while hold and calls > 2 * 13 and not os.path.exists(hold):
            assert time.monotonic() < until, "it was not killed"
            time.sleep(0.01)
        return x[:, :, ::3, 1::3] * 1.7 - 0.3
    dataset.latents.RECORD_EVERY = every
    ds = broken_two(Path(root))
    made = LatentCache(cache, "a", ds, encode, batch_size=4)
    made.calls, made.broken = calls, list(ds.broken)
    return made


def contents(cache: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in cache.iterdir()}


def test_a_killed_filling_resumes_to_the_same_bytes(tmp_path, monkeypatch):
    every = 5
    monkeypatch.setattr(dataset.latents, "RECORD_EVERY", every)
    root, here = str(tmp_path / "set"), Path(__file__).parent
    whole, cache = fill(root, str(tmp_path / "whole"), every=every), tmp_path / "cache"
    call = f"import test_loader; test_loader.fill({root!r}, {str(cache)!r}, '/nowhere', {every})"
    process = subprocess.Popen([sys.executable, "-c", call], cwd=here,
                               env=os.environ | {"PYTHONPATH": f"{here.parent}:{here}"})
    done, until = 0, time.monotonic() + PATIENCE
    while done < 13 // every * every:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
        for record in cache.glob("*.json.tmp"):
            done = json.loads(record.read_text())["batches"]
    process.kill()
    process.wait()
    assert not list(cache.glob("*.json"))
    for file in (*cache.glob("*.f16"), *cache.glob("*.f32")):   # what was written, but not recorded
        file.write_bytes(file.read_bytes() + b"half a row")
    again = fill(root, str(cache), every=every)
    assert again.calls == 2 * (51 - done) and whole.calls == 2 * 51
    assert contents(cache) == contents(tmp_path / "whole")
    assert torch.equal(again.mean, whole.mean) and torch.equal(again.std, whole.std)
    assert again.broken == whole.broken and len(again.broken) == 2      # one before the kill


def test_a_full_disk_is_one_sentence_and_the_rerun_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset.latents, "RECORD_EVERY", 1)
    ds, calls = Numbered(100), []

    def encode(x):
        calls.append(len(x))
        if len(calls) == 10:
            raise OSError(errno.ENOSPC, "No space left on device")      # as a write does
        return x.clone()
    LatentCache(tmp_path / "sound", "a", ds, lambda x: x, batch_size=4)
    with pytest.raises(DataError, match="h.f16: the disk is full; make room"):
        LatentCache(tmp_path / "cache", "a", ds, encode, batch_size=4)
    LatentCache(tmp_path / "cache", "a", ds, encode, batch_size=4)
    assert len(calls) == 10 + 2 * (25 - 4)                      # the first four batches stayed
    assert contents(tmp_path / "sound") == contents(tmp_path / "cache")
