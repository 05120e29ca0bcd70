"""The latent cache of stage 2: images and an encoder in; latents and poses on disk, batches out.

Letters: N images, B batch, C latent channels, h w latent sides.
"""

import errno
import hashlib
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import keypoints

CACHE_VERSION = 2               # raise it when the files change, so that old caches are not opened
RECORD_EVERY = 32               # batches between two records: a kill costs no more
FLOAT16_MAX = 65504.0


class LatentCache:
    """Every image and its mirror image as the encoder sees them: stage 2 then encodes nothing.

    Row 2i is image i in centre geometry, row 2i+1 its mirror image with left and right joints
    swapped; broken images have no rows. On disk, mapped and not loaded: `latents` float16
    [2N, C, h, w] and `poses` float32 [2N, 17, 3]. The files are named after `key` and the dataset's
    fingerprint, so another model or other images have other files.

    While it is filled, the json beside them ends in .tmp and counts the batches on disk. After a
    kill, filling resumes there and ends with the same bytes. Only one process may fill it.
    """

    def __init__(
        self,
        folder: str | Path,
        key: str,                           # identifies the encoder, such as a hash of its weights
        ds: data.ImageDataset,
        encode: Callable,                   # images [B, 3, S, S] in [-1, 1] -> h [B, C, h, w]
        batch_size: int = 32,
        device: str | torch.device = "cpu",
        workers: int = 0,
    ):
        model = hashlib.sha256(f"{CACHE_VERSION} {key}".encode()).hexdigest()[:12]
        stem = Path(folder) / f"latents-{model}-{ds.fingerprint()[:16]}"
        self.files = [Path(f"{stem}.h.f16"), Path(f"{stem}.pose.f32")]
        self.json = Path(f"{stem}.json")
        if not self.json.exists():
            stem.parent.mkdir(parents=True, exist_ok=True)
            self._fill(ds, encode, batch_size, device, workers)
            for file in stem.parent.glob("latents-*"):              # of other models
                if re.match(rf"latents-(?!{model})[0-9a-f]{{12}}-[0-9a-f]{{16}}\.", file.name):
                    file.unlink()
        about = json.loads(self.json.read_text())
        for file, size in zip(self.files, file_sizes(about), strict=True):
            if file.stat().st_size != size:
                raise data.DataError(f"{file}: {file.stat().st_size:,} bytes long instead of "
                                     f"{size:,}; delete {self.json}, then rerun the same command")
        self.n, (C, h, w) = about["rows"], about["shape"]
        self.latents, self.poses = (
            np.asarray(np.memmap(file, dtype, "r", shape=(self.n, *shape))) for file, dtype, shape
            in zip(self.files, ("f2", "f4"), ((C, h, w), data.NO_POSE.shape), strict=True))
        mean, squares = (np.array(about[k]) / (self.n * h * w) for k in ("sum", "squares"))
        std = np.sqrt(np.maximum(squares - mean ** 2, 1e-12))       # of a dead channel not 0
        self.mean = torch.tensor(mean, dtype=torch.float32).view(C, 1, 1)
        self.std = torch.tensor(std, dtype=torch.float32).view(C, 1, 1)

    def _fill(self, ds: data.ImageDataset, encode: Callable, batch_size: int,
              device: str | torch.device, workers: int) -> None:
        """Appends the rows of all batches that are not on record, then renames the record."""
        record = Path(f"{self.json}.tmp")
        about = json.loads(record.read_text()) if record.exists() else {}
        if about.get("batch_size") != batch_size:       # sums and squares are by channel
            about = {"batch_size": batch_size, "batches": 0, "broken": {}, "rows": 0, "shape": [],
                     "sum": 0.0, "squares": 0.0}
        data.note_broken(ds, about["broken"])
        ks = range(about["batches"], -(-len(ds) // batch_size))
        batches = tqdm(data.load(data.Steps(ds, batch_size), ks, workers, device),
                       "encoding images", ks.stop, initial=ks.start, unit="batch",
                       dynamic_ncols=True, mininterval=1)
        mode = "r+b" if about["rows"] else "wb"
        try:
            with open(self.files[0], mode) as latents, open(self.files[1], mode) as poses, batches:
                for file, size in zip((latents, poses), file_sizes(about), strict=True):
                    file.truncate(size)                 # what was written after the record
                    file.seek(size)
                for images, pose, _ in batches:
                    if len(images):
                        h, pose = make_rows(data.to_tensor(images), pose.cpu().numpy(), encode)
                        latents.write(h), poses.write(pose)
                        about["rows"], about["shape"] = about["rows"] + len(h), h.shape[1:]
                        h = h.astype(np.float64)
                        about["sum"] = (about["sum"] + h.sum((0, 2, 3))).tolist()
                        about["squares"] = (about["squares"] + (h ** 2).sum((0, 2, 3))).tolist()
                    about["batches"], about["broken"] = about["batches"] + 1, ds.broken
                    if about["batches"] % RECORD_EVERY == 0 or about["batches"] == ks.stop:
                        write_record(record, about, latents, poses)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise data.DataError(f"{self.files[0]}: the disk is full; make room, then rerun the "
                                 "same command to resume") from error
        os.replace(record, self.json)

    def __len__(self) -> int:
        """Rows: two an image."""
        return self.n

    def rows(self, idx: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents float32 [B, C, h, w] as encoded, not normalised, and poses [B, 17, 3]."""
        idx = np.asarray(idx)
        return torch.from_numpy(self.latents[idx]).float(), torch.from_numpy(self.poses[idx])


def file_sizes(about: dict) -> tuple[int, int]:
    """Of the latents and the poses, bytes."""
    return about["rows"] * 2 * math.prod(about["shape"]), about["rows"] * 4 * data.NO_POSE.size


def make_rows(x: torch.Tensor, pose: np.ndarray, encode: Callable) -> tuple[np.ndarray, np.ndarray]:
    """Images [B, 3, S, S] and poses [B, 17, 3] -> latents float16 [2B, C, h, w], poses float32
    [2B, 17, 3], each followed by that of its mirror image."""
    with torch.no_grad():
        h = torch.stack([encode(x), encode(x.flip(-1))], 1).flatten(0, 1).float().cpu()
    if not h.abs().max() <= FLOAT16_MAX:
        raise ValueError(f"latents up to {h.abs().max()} do not fit float16; is the autoencoder "
                         "trained?")
    pose = np.stack([pose, keypoints.flip(pose)], 1).reshape(-1, *data.NO_POSE.shape)
    return h.half().contiguous().numpy(), pose.astype(np.float32)


def write_record(path: Path, about: dict, *files) -> None:
    """Replaces the record once the rows that it counts are on the disk."""
    new = Path(f"{path}.new")
    with open(new, "w") as record:
        json.dump(about, record)
        for file in (*files, record):
            file.flush()
            os.fsync(file.fileno())
    os.replace(new, path)


def latent_batch(
    cache: LatentCache, batch_size: int, seed: int, k: int, rank: int = 0, world: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Step k's latents and poses, a function of (seed, k): every image once an epoch, mirrored half
    of the time. Of `world` processes that share the batch, `rank` takes its part (see batches)."""
    mirror = np.random.default_rng((data.MIRROR_STREAM, seed, k)).integers(0, 2, batch_size)
    rows = 2 * data.step_indices(len(cache) // 2, batch_size, seed, k) + mirror
    return cache.rows(rows[data.share(batch_size, rank, world)])
