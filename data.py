"""Pictures and poses in, batches out: image float [B,3,S,S] in [-1,1], pose float [B,17,3] = (x, y, visible) in [0,1].

PoseFolder reads a person's own pictures, Figures draws people so that nothing has to be downloaded, LatentCache
keeps what the autoencoder makes of them. Whatever crops, scales or flips a picture moves its joints too (upstream's
random crops left them where they were). `python data.py DIR` checks a dataset and reports on it.

Letters: N pictures, B batch, S side in pixels, C latent channels, h w latent sides.
"""

import argparse
import csv
import hashlib
import json
import os
import re
import shutil
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import keypoints

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
ZOOM = (0.8, 1.0)               # side of a training crop, as a share of the picture's short side
BROKEN_LIMIT = 0.01             # share of pictures that may be unusable before we stop
FIGURES_VERSION = 1             # raise it when a figure's pixels change: cached latents are then made anew
REMEMBER_BYTES = 2 << 30
CACHE_VERSION = 1
FLOAT16_MAX = 65504.0
ORDER, AUGMENT, MIRROR = 1, 2, 3    # first word of a random seed, so that the three streams never coincide


class DataError(ValueError):
    """Something about a person's data: one sentence that names the file and says what to do."""


# ---------------------------------------------------------------------------------------------- pixels

def to_tensor(image: np.ndarray) -> torch.Tensor:
    """uint8 [H,W,3] or [B,H,W,3] -> float32 [3,H,W] or [B,3,H,W] in [-1,1]."""
    planes = torch.as_tensor(image).movedim(-1, -3).contiguous()    # while they are bytes: four times less to move
    return planes.float().div_(127.5).sub_(1)


def to_uint8(x: torch.Tensor) -> np.ndarray:
    """[3,H,W] or [B,3,H,W] in [-1,1] -> uint8 [H,W,3] or [B,H,W,3]; values outside are clipped."""
    x = x.detach().float().clamp(-1, 1).add(1).mul(127.5).round()
    return x.to(torch.uint8).movedim(-3, -1).contiguous().cpu().numpy()


def read_picture(path: str | Path, at_least: int | None = None) -> Image.Image:
    """A file -> upright RGB picture, transparency laid on white; a JPEG may come reduced, not below `at_least` pixels.

    Raises DataError for whatever cannot be read whole: half a picture would be learnt as it is.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if at_least:
                    image.draft(None, (at_least, at_least))     # decodes a large JPEG at 1/2, 1/4 or 1/8
                image.load()
                image = ImageOps.exif_transpose(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        limit = f"{Image.MAX_IMAGE_PIXELS:,}"
        raise DataError(f"{path}: more than {limit} pixels; make it smaller or take it out") from None
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file") from None
    except Exception as error:      # PIL's decoders raise a dozen unrelated types on damaged files
        raise DataError(f"{path}: cannot be read as a picture ({error}); replace it or take it out") from error
    if min(image.size) == 0:
        raise DataError(f"{path}: the picture has no pixels; take it out")
    if image.mode == "F":
        raise DataError(f"{path}: floating point pixels have no agreed white; save it with 8 or 16 bits")
    if image.mode.startswith("I"):      # 16-bit grey; PIL's own convert() would clip at 255
        return Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def augment(
    image: Image.Image | np.ndarray,            # any size
    pose: np.ndarray,                           # [17,3], normalised to that picture
    size: int,                                  # side of the square that comes out
    rng: np.random.Generator | None = None,     # None: the centre crop of the whole short side
    zoom: tuple[float, float] = (1.0, 1.0),     # range of the crop's side as a share of the short side; needs rng
    flip: bool = False,                         # with rng: mirror every other one; without: mirror
) -> tuple[np.ndarray, np.ndarray]:
    """Crop, resize, mirror: the one place where a picture changes its geometry, and its pose with it.

    Returns uint8 [size,size,3] and float32 [17,3]; joints that the crop leaves outside keep their values outside [0,1].
    """
    if not isinstance(image, Image.Image):
        image = Image.fromarray(np.asarray(image))
    W, H = image.size
    side, across, down, mirror = min(W, H), 0.5, 0.5, flip
    if rng is not None:
        scale, across, down, coin = rng.random(4)
        side = max(1, round(side * (zoom[0] + (zoom[1] - zoom[0]) * scale)))
        mirror = flip and coin < 0.5
    # Whole pixels: a crop that needs no scaling is then an exact copy.
    x0, y0 = min(int(across * (W - side + 1)), W - side), min(int(down * (H - side + 1)), H - side)
    x1, y1 = x0 + side, y0 + side
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=(x0, y0, x1, y1))  # antialiased when it shrinks
    pose = keypoints.crop(np.asarray(pose), (x0 / W, y0 / H, x1 / W, y1 / H))
    if mirror:
        image, pose = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), keypoints.flip(pose)
    return np.array(image), np.asarray(pose, np.float32)


# -------------------------------------------------------------------------------------------- datasets

class Pictures(Dataset):
    """What the rest of this file asks of a dataset: `size`, `len`, and source(i) -> whole picture and its pose."""
    size: int

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Picture i in centre geometry: uint8 [size,size,3], float32 [17,3]."""
        return augment(*self.source(i), self.size)


# FIGURES GO HERE


class PoseFolder(Pictures):
    """A person's own pictures. `root` is one of
    - a folder with images/ and keypoints/: images/a/b.png goes with keypoints/a/b.json, the seed's files;
    - a text file that lists pictures, one a line, absolute or relative to it; their keypoints are found the same way;
    - a folder with pictures (in images/ or in itself) and one COCO json (in itself, annotations/ or coco/), or the
      json itself: the largest person that has a joint is taken, `skipped` counts the pictures without one.

    No picture is opened before it is asked for: ds[i] then raises DataError if it is damaged. `broken` maps each
    file known to be unusable to the reason; more than 1 % of them is an error. names[i] is relative to the root.
    """

    def __init__(
        self,
        root: str | Path,
        size: int,                          # side of the square pictures that come out
        files: list[str] | None = None,     # only these, named as in `names`
    ):
        self.size, self.broken, self.skipped = size, {}, 0
        self.paths: list[str] = []          # picture i
        self.poses: list = []               # its keypoint file, or its pose [17,3]
        root = Path(root)
        if not root.exists():
            raise DataError(f"{root}: there is no such file or folder")
        if root.is_file() and root.suffix.lower() == ".json":
            self._read_coco(root, [root.parent, root.parent.parent])
        elif root.is_file():
            self._read_list(root)
        elif (root / "keypoints").is_dir():
            self.root = root
            self._pair(find_pictures(root / "images"))
        else:
            self._read_coco(find_coco(root), [root])
        self.names = [os.path.relpath(p, self.root).replace(os.sep, "/") for p in self.paths]
        if files is not None:
            unknown = set(files) - set(self.names)
            if unknown:
                raise DataError(f"{root}: has no picture {min(unknown)}; name files as in images/a.png")
            keep = [i for i, name in enumerate(self.names) if name in set(files)]
            self.names, self.paths, self.poses = ([a[i] for i in keep] for a in (self.names, self.paths, self.poses))
        self.total = len(self.paths) + len(self.broken)
        self.note({})
        if not self.paths:
            raise DataError(f"{root}: no picture with a pose in it")

    def _pair(self, images: list[str]) -> None:
        """Finds each picture's keypoint file from one listing a folder, however many pictures there are."""
        listed = lru_cache(None)(lambda folder: set(os.listdir(folder)) if os.path.isdir(folder) else set())
        for path in images:
            folder, name = os.path.split(path)
            partner, wanted = keypoint_folder(folder), os.path.splitext(name)[0] + ".json"
            if name not in listed(folder):
                self.broken[path] = "there is no such file"
            elif partner is None:
                self.broken[path] = "no folder on its path is called images, so its keypoints cannot be found"
            elif wanted not in listed(partner):
                self.broken[path] = f"its keypoints {os.path.join(partner, wanted)} are missing"
            else:
                self.paths.append(path)
                self.poses.append(os.path.join(partner, wanted))

    def _read_list(self, path: Path) -> None:
        self.root = path.parent
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
        except UnicodeDecodeError:
            raise DataError(f"{path}: not a text file; give a folder, a list of pictures or a COCO json") from None
        lines = [line for line in lines if line and not line.startswith("#")]
        for line in lines:
            if not os.path.isabs(line) and leaves_folder(line):
                raise DataError(f"{path}: '{line}' climbs out of the list's folder; write its whole path")
        if not lines:
            raise DataError(f"{path}: lists no pictures; write one path a line")
        self._pair([os.path.join(self.root, line) for line in lines])

    def _read_coco(self, path: Path, near: list[Path]) -> None:
        try:
            people = keypoints.read_coco(path)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from error
        except keypoints.PoseError as error:
            raise DataError(str(error)) from error
        for name in people:
            if leaves_folder(name):
                raise DataError(f"{path}: file_name '{name}' leads out of the dataset's folder; use plain names")
        split_name = path.stem.split("_")[-1]       # person_keypoints_val2017.json goes with val2017/
        folders = [d / sub for d in near for sub in ("images", split_name, f"images/{split_name}", ".")]
        some = list(people)[:100]
        folder = next((d for d in folders if any((d / name).is_file() for name in some)), None)
        if folder is None:
            raise DataError(f"{path}: its pictures are not in {folders[0]} nor beside it; put them there")
        self.root = folder.parent if folder.name == "images" else folder
        listed = lru_cache(None)(lambda folder: set(os.listdir(folder)) if os.path.isdir(folder) else set())
        for name, poses in sorted(people.items()):
            pose, image = largest(poses), os.path.join(folder, name)
            if pose is None:
                self.skipped += 1
            elif os.path.basename(image) not in listed(os.path.dirname(image)):
                self.broken[image] = "there is no such file"
            else:
                self.paths.append(image)
                self.poses.append(pose)

    def __len__(self) -> int:
        return len(self.paths)

    def pose(self, i: int) -> np.ndarray:
        """[17,3], normalised to the whole picture."""
        if not isinstance(self.poses[i], str):
            return self.poses[i]
        try:
            return keypoints.read_seed(self.poses[i])
        except (keypoints.PoseError, OSError) as error:
            text = str(error)
            raise DataError(text if self.poses[i] in text else f"{self.poses[i]}: {text}") from error

    def source(self, i: int) -> tuple[Image.Image, np.ndarray]:
        return read_picture(self.paths[i], at_least=2 * self.size), self.pose(i)

    def note(self, broken: dict[str, str]) -> None:
        """Adds what a loader found broken; raises DataError once that is more than 1 % of all."""
        self.broken.update(broken)
        if len(self.broken) > BROKEN_LIMIT * self.total:
            path, reason = next(iter(self.broken.items()))
            where = "" if path in reason else f"{path}: "
            raise DataError(f"{self.root}: {len(self.broken)} of {self.total} pictures cannot be used, "
                            f"more than {BROKEN_LIMIT:.0%}; the first is {where}{reason}")

    def write_broken(self, path: str | Path) -> None:
        """A line a file: its path, a tab, the reason."""
        Path(path).write_text("".join(f"{p}\t{reason}\n" for p, reason in self.broken.items()), encoding="utf-8")

    def groups(self) -> list[str]:
        """Pictures of one clip share a group: metadata.csv's word for it, else the name without its frame number."""
        told = read_groups(self.root / "metadata.csv")
        stems = [PurePosixPath(name.rpartition("images/")[2]).with_suffix("").as_posix() for name in self.names]
        groups = [told.get(name) or re.sub(r"[-_ ./]*\d+$", "", stem) or stem
                  for name, stem in zip(self.names, stems, strict=True)]
        return groups if len(set(groups)) > 1 else stems

    def fingerprint(self) -> str:
        """Changes when a picture, a pose or the size does; reads no file, only their sizes and times."""
        digest = hashlib.sha256(f"PoseFolder {self.size}".encode())
        for name, path, pose in zip(self.names, self.paths, self.poses, strict=True):
            digest.update(name.encode("utf-8", "surrogateescape"))
            for file in (path, pose):
                if isinstance(file, str):
                    stat = os.stat(file)
                    digest.update(f"|{stat.st_size} {stat.st_mtime_ns}".encode())
                else:
                    digest.update(file.tobytes())
        return digest.hexdigest()


class Part(Pictures):
    """The pictures `indices` of ds, in that order."""

    def __init__(self, ds: Dataset, indices: list[int]):
        self.ds, self.indices, self.size = ds, list(indices), ds.size

    def __len__(self) -> int:
        return len(self.indices)

    def source(self, i: int):
        return source(self.ds, self.indices[i])

    def groups(self) -> list[str]:
        groups = group_names(self.ds)
        return [groups[i] for i in self.indices]

    def fingerprint(self) -> str:
        return hashlib.sha256(f"Part {fingerprint(self.ds)} {self.indices}".encode()).hexdigest()


class InMemory(Pictures):
    """ds, with each decoded or drawn picture remembered until `budget` bytes are full. One memory a process: for
    loading without workers. Changes no pixel."""

    def __init__(self, ds: Dataset, budget: int = REMEMBER_BYTES):
        self.ds, self.size, self.free, self.memory = ds, ds.size, budget, {}

    def __len__(self) -> int:
        return len(self.ds)

    def source(self, i: int):
        if i not in self.memory:
            image, pose = source(self.ds, i)
            image = np.asarray(image)
            if image.nbytes > self.free:
                return image, pose
            self.free -= image.nbytes
            self.memory[i] = image, pose
        return self.memory[i]

    def groups(self) -> list[str]:
        return group_names(self.ds)

    def fingerprint(self) -> str:
        return fingerprint(self.ds)


def source(ds: Dataset, i: int):
    """The whole picture i and its pose, before any crop; a dataset without such a thing gives ds[i]."""
    return ds.source(i) if hasattr(ds, "source") else ds[i]


def picture_name(ds: Dataset, i: int) -> str:
    """The file of picture i, or the word figure and its number."""
    while hasattr(ds, "ds"):
        ds, i = ds.ds, ds.indices[i] if isinstance(ds, Part) else i
    return ds.paths[i] if hasattr(ds, "paths") else f"figure {i}"


def group_names(ds: Dataset) -> list[str]:
    return ds.groups() if hasattr(ds, "groups") else [f"figure {i}" for i in range(len(ds))]


def fingerprint(ds: Dataset) -> str:
    """Hex digest that is equal only where the pictures and poses are."""
    if hasattr(ds, "fingerprint"):
        return ds.fingerprint()
    words = type(ds).__name__, FIGURES_VERSION, len(ds), ds.size, ds.seed
    return hashlib.sha256(repr(words).encode()).hexdigest()


def note_broken(ds: Dataset, broken: dict[str, str]) -> None:
    while hasattr(ds, "ds"):
        ds = ds.ds
    if broken:
        ds.note(broken)


def split(ds: Dataset, fraction: float = 0.1) -> tuple[Part, Part]:
    """(train, validation) by group, never by frame: neighbouring frames of a clip would leak.

    Groups are taken in the order of their names' crc32, so the split is the same on every machine, and a dataset
    that grows keeps nearly all of it. A group with more than half of the pictures always trains.
    """
    names, members = group_names(ds), {}
    for i, name in enumerate(names):
        members.setdefault(name, []).append(i)
    if len(members) < 2:
        raise DataError(f"{len(names)} picture(s) in {len(members)} group(s) cannot be split; two groups are needed")
    held = []
    for name in sorted(members, key=lambda name: (zlib.crc32(name.encode("utf-8", "surrogateescape")), name)):
        if len(held) >= max(1, fraction * len(names)):
            break
        if 2 * len(members[name]) <= len(names) and len(held) + len(members[name]) < len(names):
            held += members[name]
    rest = set(range(len(names))) - set(held)
    return Part(ds, sorted(rest)), Part(ds, sorted(held))


def find_pictures(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder; pictures go there")
    found = sorted(os.path.join(at, name) for at, _, names in os.walk(folder, followlinks=True) for name in names
                   if os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith("."))
    if not found:
        raise DataError(f"{folder}: no pictures in it ({' '.join(sorted(SUFFIXES))})")
    return found


def find_coco(root: Path) -> Path:
    """The COCO json of a folder; person_keypoints*.json goes before any other json."""
    for pattern in ("*person_keypoints*.json", "*.json"):
        found = sorted(p for d in (root, root / "annotations", root / "coco") for p in d.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            raise DataError(f"{root}: {len(found)} json files, {found[0].name}, {found[1].name}, ...; name one of them")
    raise DataError(f"{root}: neither a folder keypoints/ beside images/ nor a COCO json; see PoseFolder in data.py")


def largest(poses: list[np.ndarray]) -> np.ndarray | None:
    """The pose whose seen joints span the largest box, joints counting where boxes tie; None without a seen joint."""
    def span(pose):
        seen = pose[pose[:, 2] > 0, :2]
        return float(np.prod(np.ptp(seen, axis=0))), len(seen)
    return max((p for p in poses if (p[:, 2] > 0).any()), key=span, default=None)


@lru_cache(maxsize=4096)
def keypoint_folder(folder: str) -> str | None:
    """The folder with its last component called images turned into keypoints; upstream replaced the text everywhere."""
    parts = list(Path(folder).parts)
    if "images" not in parts:
        return None
    parts[len(parts) - 1 - parts[::-1].index("images")] = "keypoints"
    return str(Path(*parts))


def leaves_folder(name: str) -> bool:
    """Whether a name from a data file is absolute or climbs, on any system."""
    return PurePosixPath(name).is_absolute() or bool(PureWindowsPath(name).anchor) or ".." in re.split(r"[/\\]", name)


def read_groups(path: Path) -> dict[str, str]:
    """metadata.csv -> {file: group}; empty if there is no such file or no such column."""
    if not path.is_file():
        return {}
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        column = next((c for c in ("group", "animation", "clip", "video") if c in (rows.fieldnames or [])), None)
        if column is None or "file" not in rows.fieldnames:
            return {}
        return {row["file"]: row[column] for row in rows}


# --------------------------------------------------------------------------------------------- batches

@lru_cache(maxsize=8)
def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((ORDER, seed, epoch)).permutation(n)


def order(n: int, batch_size: int, seed: int, k: int) -> np.ndarray:
    """Indices [B] of step k: position p = k B + j of an endless row of shuffled epochs, a function of (seed, k)."""
    positions = k * batch_size + np.arange(batch_size)
    return np.array([permutation(n, seed, int(p // n))[p % n] for p in positions])


class Steps(Dataset):
    """Step k as one item: a DataLoader over range(start, stop) then has no state to save.

    With a seed: shuffled epochs, a broken picture gives way to the next one. Without: pictures in order, broken ones
    dropped. An item is (images uint8 [B,S,S,3], poses [B,17,3], indices [B], {file: reason} of the broken).
    """

    def __init__(self, ds: Dataset, batch_size: int, seed: int | None = None, zoom: tuple | None = None):
        self.ds, self.batch_size, self.seed, self.zoom = ds, batch_size, seed, zoom

    def __getitem__(self, k: int):
        n, images, poses, indices, broken = len(self.ds), [], [], [], {}
        if self.seed is None:
            wanted, tries = range(k * self.batch_size, min(n, (k + 1) * self.batch_size)), 1
        else:
            wanted, tries = order(n, self.batch_size, self.seed, k).tolist(), int(BROKEN_LIMIT * n) + 2
        for j, first in enumerate(wanted):
            for i in ((first + shift) % n for shift in range(tries)):
                try:
                    image, pose = self._load(i, k, j)
                except DataError as error:
                    broken[picture_name(self.ds, i)] = str(error)
                    continue
                images.append(image), poses.append(pose), indices.append(i)
                break
        S = self.ds.size
        return (torch.from_numpy(np.array(images, np.uint8).reshape(-1, S, S, 3)),
                torch.from_numpy(np.array(poses, np.float32).reshape(-1, 17, 3)), torch.tensor(indices), broken)

    def _load(self, i: int, k: int, j: int):
        if self.zoom is None:
            return self.ds[i]
        rng = np.random.default_rng((AUGMENT, self.seed, k, j))
        return augment(*source(self.ds, i), self.ds.size, rng, self.zoom, flip=True)


def load(steps: Steps, ks: range, workers: int, device: str | torch.device) -> Iterator:
    """The items of steps, made by `workers` processes (0: by this one), broken pictures counted in this process."""
    pin = torch.device(device).type == "cuda"
    # A generator of its own: DataLoader would otherwise draw from, and so move, the global one.
    loader = DataLoader(steps, batch_size=None, sampler=ks, num_workers=workers, pin_memory=pin,
                        generator=torch.Generator())
    items = iter(loader)
    for _ in ks:
        try:
            images, poses, indices, broken = next(items)
        except RuntimeError as error:
            if "worker" not in str(error):
                raise
            raise DataError("a process that loads pictures died, most often for want of memory or of /dev/shm; "
                            f"try fewer workers, or none ({str(error).splitlines()[0]})") from error
        note_broken(steps.ds, broken)
        yield images.to(device, non_blocking=pin), poses.to(device, non_blocking=pin), indices


def batches(
    ds: Dataset,
    batch_size: int,
    seed: int,
    start: int,                         # the first step; the steps before it cost nothing
    stop: int,                          # one past the last
    workers: int = 0,                   # processes that load; the batches are the same for any number
    augment: bool = False,              # random crop and mirror, else the centre crop
    zoom: tuple[float, float] = ZOOM,   # range of the random crop; (1, 1) leaves only the mirror of a square picture
    device: str | torch.device = "cpu",
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yields (images [B,3,S,S] in [-1,1], poses [B,17,3], indices [B]) for steps start..stop-1.

    Step k depends on (seed, k) alone: order, crop and mirror are drawn from it, so a resumed run repeats the
    uninterrupted one. Raises DataError once more than 1 % of the pictures turn out broken.
    """
    steps = Steps(ds, batch_size, seed, zoom if augment else None)
    for images, poses, indices in load(steps, range(start, stop), workers, device):
        yield to_tensor(images), poses, indices     # bytes cross the processes and the bus, floats are made here


# --------------------------------------------------------------------------------------------- latents

class LatentCache:
    """Every picture and its mirror image as the encoder sees them, on disk: stage 2 then decodes and encodes nothing.

    Row 2i is picture i in centre geometry, row 2i+1 its mirror image with left and right joints swapped. float16
    [2N,C,h,w] and float32 [2N,17,3] in two .npy files, and a json with the count and each channel's mean and std. The
    files are named after `key` and the dataset's fingerprint, so latents of another model or other pictures are never
    taken; the json is written last, so neither is half a file. Broken pictures have no rows.
    """

    def __init__(
        self,
        folder: str | Path,
        key: str,                           # whatever identifies the encoder, such as a hash of its weights
        ds: Dataset,
        encode: Callable,                   # images [B,3,S,S] in [-1,1] -> h [B,C,h,w]
        batch_size: int = 32,
        device: str | torch.device = "cpu",
        workers: int = 0,
    ):
        folder, words = Path(folder), f"{CACHE_VERSION} {key}"
        model = hashlib.sha256(words.encode()).hexdigest()[:12]
        stem = f"latents-{model}-{fingerprint(ds)[:16]}"
        self.files = [folder / f"{stem}{end}" for end in (".h.npy", ".pose.npy", ".json")]
        if not self._open():
            folder.mkdir(parents=True, exist_ok=True)
            self._fill(ds, encode, batch_size, device, workers)
            if not self._open():
                raise DataError(f"{self.files[0]}: what was just written cannot be read back; is the disk sound?")
            ours = re.compile(r"latents-([0-9a-f]{12})-[0-9a-f]{16}\.(h\.npy|pose\.npy|json)(\.tmp)?")
            for file in folder.iterdir():
                match = ours.fullmatch(file.name)
                if match and match[1] != model:
                    file.unlink(missing_ok=True)

    def _open(self) -> bool:
        latents, poses, meta = self.files
        try:
            about = json.loads(meta.read_text())
            if [latents.stat().st_size, poses.stat().st_size] != about["bytes"]:
                return False
            self.latents, self.poses = np.load(latents, mmap_mode="r"), np.load(poses)
            self.n = about["rows"]
            self.mean, self.std = (torch.tensor(about[k]).view(-1, 1, 1) for k in ("mean", "std"))
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return True

    def _fill(self, ds, encode, batch_size, device, workers) -> None:
        partial = [Path(f"{file}.tmp") for file in self.files]
        self.files[2].unlink(missing_ok=True)       # from here on the old rows, if any, do not count
        latents, done, total, squares = None, 0, 0.0, 0.0
        poses = np.lib.format.open_memmap(partial[1], "w+", np.float32, (2 * len(ds), 17, 3))
        ks = range(-(-len(ds) // batch_size))
        with tqdm(total=len(ds), desc="encoding latents", unit="img", disable=None) as bar:
            for images, pose, _ in load(Steps(ds, batch_size), ks, workers, device):
                bar.update(batch_size if bar.n + batch_size <= len(ds) else len(ds) - bar.n)
                if not len(images):
                    continue
                x = to_tensor(images)
                with torch.no_grad():
                    h = torch.stack([encode(x), encode(x.flip(-1))], 1).flatten(0, 1).float().cpu()    # [2B,C,h,w]
                if not h.abs().max() <= FLOAT16_MAX:
                    raise ValueError(f"latents up to {h.abs().max()} do not fit float16; is the autoencoder trained?")
                if latents is None:
                    latents = self._allocate(partial[0], (2 * len(ds), *h.shape[1:]))
                rows = slice(done, done + len(h))
                latents[rows] = h = h.half().numpy()
                pose = pose.cpu().numpy()
                poses[rows] = np.stack([pose, keypoints.flip(pose)], 1).reshape(-1, 17, 3)
                total = total + h.sum((0, 2, 3), dtype=np.float64)
                squares = squares + np.square(h, dtype=np.float64).sum((0, 2, 3))
                done += len(h)
        if not done:
            raise DataError("no picture to encode")
        count = done * latents.shape[2] * latents.shape[3]
        mean = total / count
        std = np.sqrt(np.maximum(squares / count - mean ** 2, 1e-12))       # a dead channel must not divide by 0
        latents.flush(), poses.flush()
        del latents, poses
        partial[2].write_text(json.dumps({
            "rows": done, "bytes": [file.stat().st_size for file in partial[:2]],
            "mean": mean.tolist(), "std": std.tolist()}))
        for file, new in zip(self.files, partial, strict=True):             # the json last
            os.replace(new, file)

    @staticmethod
    def _allocate(path: Path, shape: tuple) -> np.ndarray:
        need, free = 2 * int(np.prod(shape)), shutil.disk_usage(path.parent).free
        if need > free:         # a memory-mapped write to a full disk kills the process without a word
            raise DataError(f"{path.parent}: the latents need {need / 2**30:.1f} GiB and {free / 2**30:.1f} are free")
        return np.lib.format.open_memmap(path, "w+", np.float16, shape)

    def __len__(self) -> int:
        """Rows: two a picture."""
        return self.n

    def rows(self, idx) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents float32 [B,C,h,w] as the encoder gave them (not normalised), and poses [B,17,3]."""
        idx = np.asarray(idx)
        return torch.from_numpy(self.latents[idx]).float(), torch.from_numpy(self.poses[idx])


def latent_batch(cache: LatentCache, batch_size: int, seed: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Step k's latents and poses, a function of (seed, k): every picture once an epoch, mirrored every other time."""
    mirror = np.random.default_rng((MIRROR, seed, k)).integers(0, 2, batch_size)
    return cache.rows(2 * order(len(cache) // 2, batch_size, seed, k) + mirror)


# ----------------------------------------------------------------------------------------------- grids

def save_grid(
    path: str | Path,
    rows: list[list[np.ndarray | None]],    # uint8 [H,W,3] each; None leaves the place empty
    columns: list[str] = (),                # a heading over each column
    labels: list[str] = (),                 # a label left of each row
    captions: list[list[str]] = (),         # a line under each picture
    title: str = "",
    scale: int | None = None,               # whole-number enlargement; None: small pictures grow to about 150 pixels
) -> Image.Image:
    """Pictures in rows on white, with words. Writes `path` and returns the picture."""
    cells = [cell for row in rows for cell in row if cell is not None]
    H, W = (max(cell.shape[axis] for cell in cells) for axis in (0, 1))
    scale = scale or max(1, 160 // max(H, W))
    H, W, across, gap = H * scale, W * scale, max(len(row) for row in rows), 8
    big, font = ImageFont.load_default(17), ImageFont.load_default(13)
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))

    def wrap(text: str, width: int, font) -> str:
        lines = [""]
        for word in text.split():
            longer = f"{lines[-1]} {word}".strip()
            lines[-1:] = [longer] if ruler.textlength(longer, font) <= width or not lines[-1] else [lines[-1], word]
        for i, line in enumerate(lines):
            while len(line) > 1 and ruler.textlength(lines[i], font) > width:
                line = line[:-1]
                lines[i] = f"{line}…"
        return "\n".join(lines)

    def height(texts, font) -> int:
        return max((int(ruler.multiline_textbbox((0, 0), t, font)[3]) + gap for t in texts if t), default=0)

    labels = [wrap(text, 150, font) for text in labels]
    columns = [wrap(text, W, font) for text in columns]
    captions = [[wrap(text, W, font) for text in line] for line in captions]
    left = max((int(ruler.multiline_textbbox((0, 0), t, font)[2]) + gap for t in labels if t), default=0)
    full = left + across * (W + gap) - gap
    title = wrap(title, full, big)
    below = [height(line, font) for line in captions] or [0] * len(rows)
    head = height([title], big)
    top = head + height(columns, font)
    page = Image.new("RGB", (full + 4 * gap, top + sum(below) + len(rows) * (H + gap) - gap + 4 * gap), "white")
    draw = ImageDraw.Draw(page)
    x0, y = 2 * gap + left, 2 * gap
    draw.multiline_text((2 * gap, y), title, "black", big)
    for c, text in enumerate(columns):
        draw.multiline_text((x0 + c * (W + gap) + W / 2, y + head), text, "black", font, anchor="ma", align="center")
    y += top
    for r, row in enumerate(rows):
        if r < len(labels):
            draw.multiline_text((x0 - gap, y + H / 2), labels[r], "black", font, anchor="rm", align="right")
        for c, cell in enumerate(row):
            x = x0 + c * (W + gap)
            if cell is not None:
                page.paste(Image.fromarray(np.repeat(np.repeat(cell, scale, 0), scale, 1)), (x, y))
            if r < len(captions) and c < len(captions[r]):
                at = x + W / 2, y + H + 3
                draw.multiline_text(at, captions[r][c], "dimgray", font, anchor="ma", align="center")
        y += H + gap + below[r]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    page.save(path)
    return page


# ----------------------------------------------------------------------------------------------- check

def overview(path: str | Path, ds: Dataset, indices: list[int], title: str) -> None:
    """Pictures with their skeletons drawn over, four a row."""
    shown, words = [], []
    for i in indices:
        image, pose = ds[i]
        shown.append(keypoints.draw(pose, ds.size, image))
        words.append(Path(picture_name(ds, i)).stem)
    fours = range(0, len(shown), 4)
    save_grid(path, [shown[i:i + 4] for i in fours], captions=[words[i:i + 4] for i in fours], title=title)
    print(f"wrote {path}")


def check(args) -> int:
    if args.root == "figures" and not Path("figures").exists():
        ds = Figures(args.n, args.size or 64)       # noqa: F821
        print(f"{len(ds)} figures of {ds.size} pixels, seed {ds.seed}")
        if args.overview:
            overview(args.overview, ds, range(min(16, len(ds))), f"Figures, size {ds.size}, seed {ds.seed}")
        return 0
    ds = PoseFolder(args.root, args.size or 256)
    sizes, poses, good = [], [], []
    for i in tqdm(range(len(ds)), desc="checking", unit="img", disable=None):
        try:
            pose = ds.pose(i)
            sizes.append(read_picture(ds.paths[i]).size)
            poses.append(pose), good.append(i)
        except DataError as error:
            ds.broken[ds.paths[i]] = str(error)
    print(f"pictures    {ds.total} with a pose file, {len(good)} sound, {len(ds.broken)} broken"
          + (f", {ds.skipped} more without a person" if ds.skipped else ""))
    for path, reason in list(ds.broken.items())[:10]:
        print(f"  broken    {reason if path in reason else f'{path}: {reason}'}")
    if good:
        short, pose = sorted(min(size) for size in sizes), np.stack(poses)
        seen = pose[..., 2] > 0
        outside = seen & ((pose[..., :2] < 0) | (pose[..., :2] > 1)).any(-1)
        print(f"short side  {short[0]} min, {short[len(short) // 2]} median, {short[-1]} max pixels; "
              f"{sum(w != h for w, h in sizes)} not square")
        print(f"joints      {seen.size}, {(~seen).sum()} missing, {outside.sum()} outside the picture")
        names = group_names(ds)
        train, val = split(ds) if len(set(names)) > 1 else (ds, [])
        print(f"groups      {len(set(names))}; split by group: {len(train)} to train, {len(val)} to validate")
    if args.overview and good:
        picked = [good[i] for i in np.linspace(0, len(good) - 1, min(16, len(good))).round().astype(int)]
        overview(args.overview, ds, picked, f"{args.root}, {len(good)} pictures")
    if len(ds.broken) > BROKEN_LIMIT * ds.total:
        print(f"{args.root}: more than {BROKEN_LIMIT:.0%} broken, training would stop; take those out", file=sys.stderr)
        return 2
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="data.py", description="Checks a dataset and reports on it.")
    parser.add_argument("root", help="folder, list of pictures or COCO json (see PoseFolder), or the word figures")
    parser.add_argument("--size", type=int, help="side of the squares in the overview (256; figures 64)")
    parser.add_argument("--n", type=int, default=16, help="how many figures")
    parser.add_argument("--overview", metavar="FILE", help="write 16 pictures with their skeletons there")
    try:
        return check(parser.parse_args(argv))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
