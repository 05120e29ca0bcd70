"""Do images and latents come as fast as a GPU takes them? Images/s and rows of latents/s.

    python benchmarks/loader.py --data DIR --workers 2
    python benchmarks/loader.py --images 4 --latents 200 --steps 3        a quick try

Images of --data, enlarged and with a camera's grain, become JPEGs of 512 x 512 and 1200 x 900; they
are decoded, cropped, mirrored and brought to 256 x 256. The floor is PIL's decoding alone, in one
process. Latents are filled from noise; "first" is each row's first reading, from the disk, "again"
from the page cache, and the floor is numpy's copy of the same rows without checksums. Needs 3 GB in
--tmp.
"""
from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import data  # noqa: E402
from benchmarks.tables import write  # noqa: E402
from dataset.images import read_image  # noqa: E402
from dataset.latents import LatentCache, latent_batch  # noqa: E402

SIDE, BATCH = 256, 32
LATENTS = {"64 x 64 x 3": (3, 64, 64), "16 x 16 x 4": (4, 16, 16)}


class Jpegs(data.ImageDataset):
    """The files of a folder; their pose has no visible joint."""
    size = SIDE

    def __init__(self, files: list[Path]):
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def source(self, i: int) -> tuple[Image.Image, np.ndarray]:
        return read_image(self.files[i], at_least=2 * SIDE), data.NO_POSE


class Blank(data.ImageDataset):
    """n images that cost nothing: what is measured are the latents."""
    size, seed = 8, 0

    def __init__(self, n: int):
        self.n = n

    def __len__(self) -> int:
        return self.n

    def source(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros((8, 8, 3), np.uint8), data.NO_POSE


def rate(batches: Iterable, of: int) -> float:
    """How many of `of` a batch come a second; the first batch, for which processes start, does not
    count."""
    batches = iter(batches)
    next(batches)
    start = time.perf_counter()
    n = sum(1 for _ in batches)
    return n * of / (time.perf_counter() - start)


def jpegs(spec: str, folder: Path, size: tuple[int, int], n: int, workers: int,
          steps: int) -> dict[str, float]:
    ds, rng, files = data.open_all(spec, SIDE), np.random.default_rng(0), []
    for i in data.evenly(len(ds), n):
        image, _ = ds.source(i)
        image = image if isinstance(image, Image.Image) else Image.fromarray(image)
        grain = rng.normal(0, 8, (*size[::-1], 1))
        pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC)) + grain
        files.append(folder / f"{size[0]}-{i}.jpg")
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(files[-1], quality=90)
    stored = [file.read_bytes() for file in files]
    floor = rate((Image.open(io.BytesIO(stored[k % len(stored)])).load()
                  for k in range(4 * len(stored))), 1)
    got = {w: rate(data.batches(Jpegs(files), BATCH, 0, 0, steps, w, augment=True), BATCH)
           for w in (0, workers)}
    return {"kB": float(np.mean([len(s) for s in stored])) / 1000, "without": got[0],
            "with": got[workers], "alone": floor}


def latents(name: str, shape: tuple[int, int, int], folder: Path, n: int,
            steps: int) -> dict[str, float]:
    start = time.perf_counter()
    cache = LatentCache(folder / name, "noise", Blank(n), lambda x: torch.randn(len(x), *shape))
    took, steps = time.perf_counter() - start, min(steps, n // BATCH)
    row = cache.latents[0].nbytes
    if hasattr(os, "posix_fadvise"):
        with open(cache.files[0], "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    first, again = (rate((latent_batch(cache, BATCH, 0, k) for k in range(steps)), BATCH)
                    for _ in range(2))
    wanted = [2 * data.step_indices(n, BATCH, 0, k) for k in range(steps)]
    floor = max(rate((torch.from_numpy(cache.latents[rows]).float() for rows in wanted), BATCH)
                for _ in range(2))
    return {"kB": row / 1000, "first": first, "again": again, "alone": floor,
            "filled": len(cache) / took}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="figures:64",
                        help="as of train.py; the images that become JPEGs")
    parser.add_argument("--images", type=int, default=64, help="how many JPEGs of each size (64)")
    parser.add_argument("--latents", type=int, default=20_000,
                        help="how many images' latents (20000)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40,
                        help="batches of 32 images; ten times as many of latents")
    parser.add_argument("--tmp", help="where the files go, and are removed from")
    parser.add_argument("--out", help="a .json for benchmarks/tables.py")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=args.tmp) as tmp:
        images = {f"{w} x {h}": jpegs(args.data, Path(tmp), (w, h), args.images, args.workers,
                                      args.steps) for w, h in ((512, 512), (1200, 900))}
        rows = {"images": images, "latents": {
            name: latents(name, shape, Path(tmp), args.latents, 10 * args.steps)
            for name, shape in LATENTS.items()}}
    print(json.dumps(rows, indent=1))
    if args.out:
        write(args.out, rows)


if __name__ == "__main__":
    main()
