"""The latent cache of stage 2: pictures and an encoder in, rows of latents and poses on disk, and batches of them, out.

Letters: N pictures, B batch, C latent channels, h w latent sides.
"""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from tqdm import tqdm

import keypoints
from data import MIRROR_STREAM, NO_POSE, DataError, Pictures, Steps, load, note_broken, share, step_indices, to_tensor

CACHE_VERSION = 2               # raise it when the files of a latent cache change: they are then made anew
RECORD_SECONDS = 10             # of filling a latent cache that a kill may cost
FLOAT16_MAX = 65504.0


@contextmanager
def alone(path: Path, wait: bool = True) -> Iterator[bool]:
    """True inside the block, where no other process is at the same time; `path` is a file that exists meanwhile.

    Waits for that, or yields False at once. The lock is the kernel's and ends with the process that has it, so a file
    that a kill left behind locks nothing.
    """
    try:
        import fcntl
    except ImportError:                             # Windows: two runs that fill one cache are not kept apart
        yield True
        return
    while True:
        file = open(path, "a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                file.close()
                yield False
                return
            print(f"{path}: another run is filling this cache; waiting for it", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:        # else who had it has taken it away: it keeps out nobody any more
            break
        file.close()
    try:
        yield True
    finally:
        path.unlink(missing_ok=True)
        fcntl.flock(file, fcntl.LOCK_UN)            # by name: worker processes have the file open too
        file.close()


class LatentCache:
    """Every picture and its mirror image as the encoder sees them, on disk: stage 2 then decodes and encodes nothing.

    Row 2i is picture i in centre geometry, row 2i+1 its mirror image with left and right joints swapped; broken
    pictures have no rows. Three bare arrays, mapped and not loaded: `latents` float16 [2N, C, h, w], `poses` float32
    [2N, 17, 3] and `crc` uint32 [2N], by which rows() knows damage; and a json. The files are named after `key` and the
    dataset's fingerprint, so latents of another model or other pictures are never taken.

    While it is filled the json has .tmp at its end and tells what is safely on disk: after a kill, filling goes on from
    there, to the same bytes. Of several processes that want the same cache one fills it and the others wait.
    """

    ARRAYS = {".h.f16": np.float16, ".pose.f32": np.float32, ".crc.u32": np.uint32}

    def __init__(
        self,
        folder: str | Path,
        key: str,                           # whatever identifies the encoder, such as a hash of its weights
        ds: Pictures,
        encode: Callable,                   # images [B, 3, S, S] in [-1, 1] -> h [B, C, h, w]
        batch_size: int = 32,
        device: str | torch.device = "cpu",
        workers: int = 0,
    ):
        folder, words = Path(folder), f"{CACHE_VERSION} {key}"
        model = hashlib.sha256(words.encode()).hexdigest()[:12]
        stem = folder / f"latents-{model}-{ds.fingerprint()[:16]}"
        *self.files, self.json, self.record, lock = (
            Path(f"{stem}{end}") for end in (*self.ARRAYS, ".json", ".json.tmp", ".lock"))
        if self._open():
            return
        folder.mkdir(parents=True, exist_ok=True)
        with alone(lock):
            if not self._open():                # another process may have filled it by now
                self._fill(ds, encode, batch_size, device, workers)
                if not self._open():
                    raise DataError(f"{self.json}: what was just written cannot be read back; is the disk sound?")
        remove_other_caches(folder, model)

    def _open(self) -> bool:
        """Maps the files; False where they are not whole. Latents may be many gigabytes: rows() will look at them."""
        with ExitStack() as opened:
            try:
                about = json.loads(self.json.read_text())
                self.n, (_, h, w) = about["rows"], about["shape"]
                self.mapped = [opened.enter_context(open(file, "rb")) for file in self.files]
                self.sizes = _file_sizes(about)
                if self._is_cut() or [_crc_of(file) for file in self.mapped[1:]] != about["crc"]:
                    return False
                self.latents, self.poses, self.crc = (
                    np.asarray(np.memmap(file, dtype, "r", shape=(self.n, *shape)))
                    for file, dtype, shape in zip(self.mapped, self.ARRAYS.values(), _row_shapes(about), strict=True))
                mean, squares = (np.array(about[k]) / (self.n * h * w) for k in ("sum", "squares"))
                std = np.sqrt(np.maximum(squares - mean ** 2, 1e-12))           # a dead channel must not divide by 0
                self.mean, self.std = (torch.tensor(x, dtype=torch.float32).view(-1, 1, 1) for x in (mean, std))
            except (OSError, ValueError, KeyError, TypeError):
                return False
            opened.pop_all()                        # of a sound cache they stay open
        return True

    def _is_cut(self) -> bool:
        return [os.fstat(file.fileno()).st_size for file in self.mapped] != self.sizes

    def _begin(self, batch_size: int) -> dict:
        """What the json holds: of the rows that an earlier process has left, or of none. No other byte is kept."""
        try:
            about = json.loads(self.record.read_text())
            sizes = _file_sizes(about)
            if about["batch_size"] == batch_size and all(
                    file.stat().st_size >= size for file, size in zip(self.files, sizes, strict=True)):
                for file, size in zip(self.files, sizes, strict=True):
                    os.truncate(file, size)
                return about
        except (OSError, ValueError, KeyError, TypeError):
            pass
        for file in (self.json, self.record, *self.files):      # not cut to nothing: some process may have them mapped
            file.unlink(missing_ok=True)
        return {"batch_size": batch_size, "batches": 0,         # of pictures looked at
                "rows": 0, "shape": None,                       # on disk; [C, h, w] of each
                "sum": 0.0, "squares": 0.0,                     # of the latents, by channel
                "crc": [0, 0],                                  # CRC-32 of the other two files
                "broken": {}}                                   # picture: reason

    def _fill(self, ds, encode, batch_size, device, workers) -> None:
        """Appends the rows of the pictures that were not yet looked at, then gives the json its name."""
        if self.json.exists():
            print(f"{self.json}: the files of this cache are damaged; it is made anew", file=sys.stderr)
        about, saved = self._begin(batch_size), time.monotonic()
        note_broken(ds, about["broken"])
        ks = range(about["batches"], -(-len(ds) // batch_size))
        try:
            with ExitStack() as stack:
                files = [stack.enter_context(open(file, "ab")) for file in self.files]
                bar = stack.enter_context(tqdm(total=len(ds), initial=min(len(ds), ks.start * batch_size), unit="img",
                                               desc="encoding latents", dynamic_ncols=True, mininterval=1))
                for images, pose, _ in load(Steps(ds, batch_size), ks, workers, device):
                    if len(images):
                        self._append(files, about, to_tensor(images), pose.cpu().numpy(), encode, len(ds))
                    about["batches"] += 1
                    about["broken"] = ds.base.broken
                    bar.update(min(len(ds), about["batches"] * batch_size) - bar.n)
                    if time.monotonic() - saved > RECORD_SECONDS:
                        self._save(files, about)
                        saved = time.monotonic()
                self._save(files, about)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise DataError(f"{self.files[0]}: the disk is full; make room, and the same command goes on where it "
                            "stopped") from error
        if not about["rows"]:
            raise DataError("no picture to encode")
        os.replace(self.record, self.json)

    def _append(self, files: list, about: dict, x: torch.Tensor, pose: np.ndarray, encode: Callable, n: int) -> None:
        """Writes the rows of pictures x [B, 3, S, S], of n in all, and counts them in `about`."""
        with torch.no_grad():
            h = torch.stack([encode(x), encode(x.flip(-1))], 1).flatten(0, 1).float().cpu()     # [2B, C, h, w]
        if not h.abs().max() <= FLOAT16_MAX:
            raise ValueError(f"latents up to {h.abs().max()} do not fit float16; is the autoencoder trained?")
        if about["shape"] is None:
            about["shape"] = list(h.shape[1:])
            need, free = 2 * n * _file_sizes(about | {"rows": 1})[0], shutil.disk_usage(self.json.parent).free
            if need > free:
                raise DataError(f"{self.json.parent}: the latents need {need / 2**30:.1f} GiB and "
                                f"{free / 2**30:.1f} are free")
        h = h.half().contiguous().numpy()                   # an encoder may leave its channels last
        pose = np.stack([pose, keypoints.flip(pose)], 1).reshape(-1, *NO_POSE.shape).astype(np.float32)
        crc = np.array([_crc_of_row(*row) for row in zip(h, pose, strict=True)], np.uint32)
        for file, part in zip(files, (h, pose, crc), strict=True):
            file.write(part)
        about["rows"] += len(h)
        about["sum"] = (about["sum"] + h.sum((0, 2, 3), dtype=np.float64)).tolist()
        about["squares"] = (about["squares"] + np.square(h, dtype=np.float64).sum((0, 2, 3))).tolist()
        about["crc"] = [zlib.crc32(part, before) for part, before in zip((pose, crc), about["crc"], strict=True)]

    def _save(self, files: list, about: dict) -> None:
        """The rows first, then the word that they are there."""
        new = self.record.with_suffix(".new")
        with open(new, "w") as record:
            json.dump(about, record)
            for file in (*files, record):
                file.flush()
                os.fsync(file.fileno())
        os.replace(new, self.record)

    def __len__(self) -> int:
        """Rows: two a picture."""
        return self.n

    def rows(self, idx) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents float32 [B, C, h, w] as the encoder gave them (not normalised), and poses [B, 17, 3], of rows [B].

        DataError where they are not what was written: the cache is then given up, and made anew the next time.
        """
        idx = np.asarray(idx)
        if self._is_cut():              # to read what is mapped but not there would kill the process without a word
            raise self._damage("another length")
        if hasattr(os, "posix_fadvise"):        # asks the disk for all of them at once, and for nothing around them
            size = self.latents[0].nbytes
            for i in idx.tolist():
                os.posix_fadvise(self.mapped[0].fileno(), i * size, size, os.POSIX_FADV_WILLNEED)
        latents, poses = self.latents[idx], self.poses[idx]
        for i, latent, pose, crc in zip(idx.tolist(), latents, poses, self.crc[idx].tolist(), strict=True):
            if _crc_of_row(latent, pose) != crc:
                raise self._damage(f"another row {i}")
        return torch.from_numpy(latents).float(), torch.from_numpy(poses)

    def _damage(self, what: str) -> DataError:
        self.json.unlink(missing_ok=True)
        return DataError(f"{self.files[0]}: it has {what} than was written, so the disk or another program has damaged "
                         "it; the same command makes it anew and goes on")


def _row_shapes(about: dict) -> list[tuple[int, ...]]:
    """Of one row in each file of a cache."""
    return [tuple(about["shape"]), NO_POSE.shape, ()]


def _file_sizes(about: dict) -> list[int]:
    """Of each file of a cache, bytes."""
    return [about["rows"] * math.prod(shape) * np.dtype(dtype).itemsize
            for shape, dtype in zip(_row_shapes(about), LatentCache.ARRAYS.values(), strict=True)]


def _crc_of_row(latent: np.ndarray, pose: np.ndarray) -> int:
    return zlib.crc32(pose, zlib.crc32(latent))


def _crc_of(file: BinaryIO) -> int:
    """Of all its bytes, few of them in memory at a time."""
    crc = 0
    while some := file.read(1 << 20):
        crc = zlib.crc32(some, crc)
    return crc


def remove_other_caches(folder: Path, model: str) -> None:
    """Deletes the caches of models other than `model`, but not one that another process is filling."""
    others = {}
    for file in folder.iterdir():
        match = re.fullmatch(r"(latents-([0-9a-f]{12})-[0-9a-f]{16})\.(h|pose|crc|json|lock)[.a-z0-9]*", file.name)
        if match and match[2] != model:
            others.setdefault(f"{match[1]}.lock", []).append(file)
    for lock, files in others.items():
        with alone(folder / lock, wait=False) as free:
            for file in files:
                if free and file.name != lock:
                    file.unlink(missing_ok=True)


def latent_batch(
    cache: LatentCache, batch_size: int, seed: int, k: int, rank: int = 0, world: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Step k's latents and poses, a function of (seed, k): every picture once an epoch, mirrored every other time.
    Of `world` processes that share a batch each takes its part of it (see batches)."""
    mirror = np.random.default_rng((MIRROR_STREAM, seed, k)).integers(0, 2, batch_size)
    rows = 2 * step_indices(len(cache) // 2, batch_size, seed, k) + mirror
    return cache.rows(rows[share(batch_size, rank, world)])
