"""The latent cache of stage 2: images and an encoder in; latents and poses on disk, batches out.

Image i has two rows in the cache: row 2i is the plain image, row 2i + 1 its mirror image.
A batch takes one of the two rows of each of its images, at random.

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
from dataset.images import DataError, note_broken

CACHE_VERSION = 3               # raise it when files or poses change: old caches then stay closed
RECORD_EVERY = 32               # batches between two records: a kill costs no more
FLOAT16_MAX = 65504.0
POSES_KEPT = 4096               # in a checkpoint, 0.4 MB: sample.py rates poses by them


class LatentCache:
    """Each image and its mirror image, encoded once in centre geometry; stage 2 then encodes none.

    `latents` float16 [2N, C, h, w] and `poses` float32 [2N, 17, 3] are files, mapped and not
    loaded. Broken images have no rows. The files are named after `key` and the dataset's
    fingerprint, so another model or other images have other files. `labels` [2N] are in no file:
    they may change without any image.

    While they are written, the json beside them ends in .tmp and counts the batches on disk. After
    a kill, filling resumes there and ends with the same bytes. Only one process may fill a cache.
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
            found = file.stat().st_size if file.exists() else 0
            if found != size:
                raise DataError(f"{file}: {found:,} bytes long instead of "
                                f"{size:,}; delete {self.json}, then rerun the same command")
        self.n, (C, h, w) = about["rows"], about["shape"]
        shapes = (self.n, C, h, w), (self.n, *data.NO_POSE.shape)
        self.latents = np.asarray(np.memmap(self.files[0], "f2", "r", shape=shapes[0]))
        self.poses = np.asarray(np.memmap(self.files[1], "f4", "r", shape=shapes[1]))
        self.labels = torch.full((self.n,), data.NO_LABEL)
        if ds.label_names:
            sound = [i for i in range(len(ds)) if ds.name(i) not in about["broken"]]
            if 2 * len(sound) != self.n:
                raise DataError(f"{self.json}: {self.n:,} rows for {len(sound):,} images; "
                                "delete it, then rerun the same command")
            self.labels = torch.from_numpy(ds.label_ids()[sound].repeat(2))
        mean, squares = (np.array(about[k]) / (self.n * h * w) for k in ("sum", "squares"))
        std = np.sqrt(np.maximum(squares - mean ** 2, 1e-12))       # of a dead channel not 0
        self.mean = torch.tensor(mean, dtype=torch.float32).view(C, 1, 1)
        self.std = torch.tensor(std, dtype=torch.float32).view(C, 1, 1)

    def _fill(self, ds: data.ImageDataset, encode: Callable, batch_size: int,
              device: str | torch.device, workers: int) -> None:
        """Appends the rows of all batches that are not on record, then renames the record."""
        record = Path(f"{self.json}.tmp")
        about = json.loads(record.read_text()) if record.exists() else {}
        whole = about.get("batch_size") == batch_size and all(
            file.exists() and file.stat().st_size >= size
            for file, size in zip(self.files, file_sizes(about), strict=True))
        if not whole:                                   # start over; sums are by channel
            about = {"batch_size": batch_size, "batches": 0, "broken": {}, "rows": 0, "shape": [],
                     "sum": 0.0, "squares": 0.0}
        note_broken(ds, about["broken"])
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
                    if len(images):                     # not every image of the batch is broken
                        h, pose = make_rows(images, pose.cpu().numpy(), encode)
                        latents.write(h)
                        poses.write(pose)
                        about["rows"] += len(h)
                        about["shape"] = h.shape[1:]
                        h = h.astype(np.float64)
                        about["sum"] = (about["sum"] + h.sum((0, 2, 3))).tolist()
                        about["squares"] = (about["squares"] + (h ** 2).sum((0, 2, 3))).tolist()
                    about["batches"] += 1
                    about["broken"] = ds.broken
                    if about["batches"] % RECORD_EVERY == 0 or about["batches"] == ks.stop:
                        write_record(record, about, latents, poses)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise DataError(f"{self.files[0]}: the disk is full; make room, then rerun the "
                            "same command to resume") from error
        os.replace(record, self.json)

    def __len__(self) -> int:
        """Rows: two for each image."""
        return self.n

    def rows(self, idx: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents float32 [B, C, h, w] as encoded, not normalised, and poses [B, 17, 3]."""
        return torch.from_numpy(self.latents[idx]).float(), torch.from_numpy(self.poses[idx])


def poses_kept(poses: np.ndarray, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """For a checkpoint: "poses" with a visible joint, float16, all or POSES_KEPT spread evenly over
    poses [N, 17, 3], and where labels [N] has some, their "pose_labels"."""
    seen = np.flatnonzero((poses[..., 2] > 0).any(axis=1))
    seen = seen[data.evenly(len(seen), POSES_KEPT)]
    kept = {"poses": torch.from_numpy(poses[seen]).half()}
    return kept | ({"pose_labels": labels[seen]} if (labels != data.NO_LABEL).any() else {})


def file_sizes(about: dict) -> tuple[int, int]:
    """Bytes of the latents and of the poses that a record counts."""
    return about["rows"] * 2 * math.prod(about["shape"]), about["rows"] * 4 * data.NO_POSE.size


def make_rows(x: torch.Tensor, pose: np.ndarray, encode: Callable) -> tuple[np.ndarray, np.ndarray]:
    """Images [B, 3, S, S], poses [B, 17, 3] -> latents float16 [2B, C, h, w], poses [2B, 17, 3]:
    those of image i in row 2i, those of its mirror image in row 2i + 1."""
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents [B, C, h, w], poses [B, 17, 3] and labels [B] of step k, a function of (seed, k).

    Every image comes once an epoch: half of the time row 2i, the plain image, else row 2i + 1, its
    mirror image. `rank` of `world` processes gets its share of the batch.
    """
    images = data.step_indices(len(cache) // 2, batch_size, seed, k)
    mirror = np.random.default_rng((data.MIRROR_STREAM, seed, k)).integers(0, 2, batch_size)
    rows = (2 * images + mirror)[data.share(batch_size, rank, world)]
    return *cache.rows(rows), cache.labels[rows]
