"""Pictures and poses in, batches out: images float [B, 3, S, S] in [-1, 1], poses float [B, 17, 3] = (x, y, visible).

PoseFolder reads a person's own pictures, Figures draws people so that nothing has to be downloaded, LatentCache
keeps what the autoencoder makes of them. Whatever crops, scales or flips a picture moves its joints too (upstream's
random crops left them where they were). `python data.py DIR` checks a dataset and reports on it.

Letters: N pictures, B batch, S side in pixels, C latent channels, h w latent sides.
"""

import argparse
import csv
import errno
import hashlib
import json
import math
import mmap
import os
import random
import re
import shutil
import signal
import sys
import textwrap
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import keypoints

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")     # not EPS, for which PIL would start another program
ZOOM = (0.8, 1.0)               # side of a training crop, as a share of the picture's short side
NO_POSE = np.zeros((len(keypoints.JOINTS), 3))      # every joint missing
BROKEN_LIMIT = 0.01             # share of pictures that may be unusable before we stop
LOOKED_FOR = 100                # pictures of a COCO json, to find the folder that they are in
FIGURES_VERSION = 1             # raise it when a figure's pixels change: cached latents are then made anew
REMEMBER_BYTES = 2 << 30        # of decoded pictures in RAM
CACHE_VERSION = 2               # raise it when the files of a latent cache change: they are then made anew
RECORD_SECONDS = 10             # of filling a latent cache that a kill may cost
FLOAT16_MAX = 65504.0
ORDER_STREAM, AUGMENT_STREAM, MIRROR_STREAM = 1, 2, 3      # first word of a random seed, so that they never coincide


class DataError(ValueError):
    """Something about a person's data: one sentence that names the file and says what to do."""


# ---------------------------------------------------------------------------------------------- pixels

def to_tensor(image: np.ndarray) -> torch.Tensor:
    """uint8 [H, W, 3] or [B, H, W, 3] -> float32 [3, H, W] or [B, 3, H, W] in [-1, 1]."""
    planes = torch.as_tensor(image).movedim(-1, -3).contiguous()    # while they are bytes: four times less to move
    return planes.float().div_(127.5).sub_(1)


def to_uint8(x: torch.Tensor) -> np.ndarray:
    """[3, H, W] or [B, 3, H, W] in [-1, 1] -> uint8 [H, W, 3] or [B, H, W, 3]; values outside are clipped."""
    x = x.detach().float().clamp(-1, 1).add(1).mul(127.5).round()
    return x.to(torch.uint8).movedim(-3, -1).contiguous().cpu().numpy()


def read_picture(path: str | Path, at_least: int | None = None) -> Image.Image:
    """A file -> upright RGB picture, transparency laid on white; a JPEG may come reduced, not below `at_least` pixels.

    Raises DataError for whatever cannot be read whole: half a picture would be learnt as it is.
    """
    if os.path.exists(path) and not os.path.isfile(path):               # to open a pipe would wait for its other end
        raise DataError(f"{path}: a picture is a file, and this is none; replace it or take it out")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                # Decodes a large JPEG at 1/2, 1/4 or 1/8. A side that this does not divide ends within the last pixel;
                # stretched over it, or joints, which count in whole sides, would move by up to half a pixel.
                _, extent = (at_least and image.draft(None, (at_least, at_least))) or (None, None)
                image.load()
                if extent and extent[2:] != image.size:
                    image = image.resize(image.size, Image.Resampling.BICUBIC, box=extent)
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


def to_square(
    image: Image.Image | np.ndarray,            # any size
    pose: np.ndarray,                           # [17, 3], normalised to that picture
    size: int,                                  # side of the square that comes out
    rng: np.random.Generator | None = None,     # None: the centre crop of the whole short side
    zoom: tuple[float, float] = (1.0, 1.0),     # range of the crop's side as a share of the short side, but not so
                                                # small that it would be blown up; needs rng
    flip: bool = False,                         # with rng: mirror every other one; without: mirror
) -> tuple[np.ndarray, np.ndarray]:
    """Crop, resize, mirror: the one place where a picture changes its geometry, and its pose with it.

    Returns uint8 [size, size, 3] and float32 [17, 3]; joints that the crop leaves outside keep values outside [0, 1].
    """
    if not isinstance(image, Image.Image):
        image = Image.fromarray(np.asarray(image))
    W, H = image.size
    side, across, down, mirror = min(W, H), 0.5, 0.5, flip
    if rng is not None:
        scale, across, down, coin = rng.random(4)
        least = max(zoom[0], min(zoom[1], size / side))         # a small picture is not cropped to be blown up again
        side = max(1, round(side * (least + (zoom[1] - least) * scale)))
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
    """What the rest of this file asks of a dataset. `size`, `len` and source(i) each has of its own; all else is here
    as it is for pictures that are drawn, not read: none is broken, and those of one class, number, size and seed are
    the same."""
    size: int                       # side of the square that ds[i] is
    seed: int = 0
    limit = 1.0                     # share of pictures that may be broken
    broken: dict[str, str] = {}     # file known to be unusable -> why
    unlisted: int = 0               # how many of them len() does not count
    skipped: Sequence[str] = ()     # files of pictures without a person

    def source(self, i: int) -> tuple[Image.Image | np.ndarray, np.ndarray]:
        """The whole picture i, before any crop, and its pose [17, 3]."""
        raise NotImplementedError

    @property
    def base(self) -> "Pictures":
        """What the parts and memories around it are made of."""
        return self

    @property
    def total(self) -> int:
        """How many pictures there are, broken ones too."""
        return len(self) + self.unlisted

    def name(self, i: int) -> str:
        """The file of picture i, or the word figure and its number."""
        return f"figure {i}"

    def groups(self) -> list[str]:
        """Of each picture the group: two of one group are never told apart into training and validation."""
        return [self.name(i) for i in range(len(self))]

    def fingerprint(self) -> str:
        """Hex digest that is equal only where the pictures and poses are."""
        words = type(self).__name__, FIGURES_VERSION, len(self), self.size, self.seed
        return hashlib.sha256(repr(words).encode()).hexdigest()

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Picture i in centre geometry: uint8 [size, size, 3], float32 [17, 3]."""
        return to_square(*self.source(i), self.size)


class PoseFolder(Pictures):
    """A person's own pictures. `root` is one of
    - a folder with images/ and keypoints/: images/a/b.png goes with keypoints/a/b.json, the seed's files;
    - a text file that lists pictures, one a line, absolute or relative to it; their keypoints are found the same way;
    - a folder with pictures (in images/ or in itself) and one COCO json (in itself, annotations/ or coco/), or the
      json itself: the largest person that has a joint is taken, `skipped` names the pictures without one;
    - with `poseless`, also any folder of pictures, whatever json that is not COCO lies in it; a picture without
      keypoints then has a pose without visible joints.

    No picture is opened before it is asked for: ds[i] then raises DataError if it is damaged. `broken` maps each
    file known to be unusable to the reason; more than 1 % of them is an error. names[i] is relative to the root.
    """

    def __init__(
        self,
        root: str | Path,
        size: int,                          # side of the square pictures that come out
        poseless: bool = False,             # take pictures without keypoints too, to measure stage 1 on them
        limit: float = BROKEN_LIMIT,        # share of pictures that may be broken; 1: all, and a check goes on
    ):
        self.size, self.poseless, self.limit, self.broken, self.skipped = size, poseless, limit, {}, []
        self.coco: tuple[Path, Path] | None = None      # the json and the folder its names start from, if it is COCO
        self.list: Path | None = None                   # the list, if it is one
        self.paths: list[str] = []          # picture i
        self.poses: list = []               # its keypoint file, or its pose [17, 3]
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
        elif poseless and not has_keypoints(root):
            self.root = root
            self._pair(find_pictures(root))
        else:
            self._read_coco(find_coco(root), [root])
        self.names = [os.path.relpath(p, self.root).replace(os.sep, "/") for p in self.paths]
        self.unlisted = len(self.broken)
        self.note({})
        if not self.total:
            raise DataError(f"{root}: no picture{'' if poseless else ' with a pose'} in it")

    def _pair(self, images: list[str]) -> None:
        """Finds each picture's keypoint file from one listing a folder, however many pictures there are."""
        listed = lister()
        for path in images:
            folder, name = os.path.split(path)
            partner, wanted = keypoint_folder(folder), os.path.splitext(name)[0] + ".json"
            if name not in listed(folder):
                self.broken[path] = "there is no such file"
            elif self.poseless and (partner is None or wanted not in listed(partner)):
                self.paths.append(path)
                self.poses.append(NO_POSE)
            elif partner is None:
                self.broken[path] = "no folder on its path is called images, so its keypoints cannot be found"
            elif wanted not in listed(partner):
                self.broken[path] = f"its keypoints {os.path.join(partner, wanted)} are missing"
            else:
                self.paths.append(path)
                self.poses.append(os.path.join(partner, wanted))

    def _read_list(self, path: Path) -> None:
        self.root, self.list = path.parent, path
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
        from formats import pose_files
        try:
            people, refused = pose_files.read_coco(path)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from error
        except keypoints.PoseError as error:
            raise DataError(str(error)) from error
        for name in people:
            if leaves_folder(name):
                raise DataError(f"{path}: file_name '{name}' leads out of the dataset's folder; use plain names")
        split_name = path.stem.split("_")[-1]       # person_keypoints_val2017.json goes with val2017/
        folders = [d / sub for d in near for sub in ("images", split_name, f"images/{split_name}", ".")]
        names = list(people)
        some = [names[i] for i in evenly(len(names), LOOKED_FOR)]
        folder = next((d for d in folders if any((d / name).is_file() for name in some)), None)
        if folder is None:
            raise DataError(f"{path}: its pictures are not in {folders[0]} nor beside it (none of {len(some)} looked "
                            "for); put them there")
        self.root, self.coco = folder.parent if folder.name == "images" else folder, (path, folder)
        listed = lister()
        for name, poses in sorted(people.items()):
            pose, image = pose_files.largest(poses), os.path.join(folder, name)
            pose = NO_POSE if pose is None and self.poseless else pose
            if name in refused:
                self.broken[image] = refused[name]
            elif pose is None:
                self.skipped.append(image)
            elif os.path.basename(image) not in listed(os.path.dirname(image)):
                self.broken[image] = "there is no such file"
            else:
                self.paths.append(image)
                self.poses.append(pose)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, i: int) -> str:
        return self.paths[i]

    def pose(self, i: int) -> np.ndarray:
        """[17, 3], normalised to the whole picture."""
        if not isinstance(self.poses[i], str):
            return self.poses[i]
        from formats import pose_files
        try:
            return pose_files.read_seed(self.poses[i])
        except (keypoints.PoseError, OSError) as error:
            text = str(error)
            raise DataError(text if self.poses[i] in text else f"{self.poses[i]}: {text}") from error

    def source(self, i: int) -> tuple[Image.Image, np.ndarray]:
        """A large JPEG comes reduced; DataError where the picture or its keypoints cannot be used."""
        return read_picture(self.paths[i], at_least=2 * self.size), self.pose(i)

    def note(self, broken: dict[str, str]) -> None:
        """Adds what a loader found broken; raises DataError once that is more than 1 % of all."""
        self.broken.update(broken)
        if len(self.broken) > self.limit * self.total:
            path, reason = next(iter(self.broken.items()))
            where = "" if path in reason else f"{path}: "
            raise DataError(f"{self.root}: {len(self.broken)} of {self.total} pictures cannot be used, "
                            f"more than {self.limit:.0%}; the first is {where}{reason}")

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
                if not isinstance(file, str):
                    digest.update(file.tobytes())
                elif os.path.exists(file):              # else it has gone since it was listed, and will count as broken
                    stat = os.stat(file)
                    digest.update(f"|{stat.st_size} {stat.st_mtime_ns}".encode())
        return digest.hexdigest()


class Part(Pictures):
    """The pictures `indices` of ds, in that order."""

    def __init__(self, ds: Pictures, indices: Iterable[int]):
        self.ds, self.indices, self.size = ds, list(indices), ds.size

    @property
    def base(self) -> Pictures:
        return self.ds.base

    def __len__(self) -> int:
        return len(self.indices)

    def source(self, i: int) -> tuple[Image.Image | np.ndarray, np.ndarray]:
        return self.ds.source(self.indices[i])

    def name(self, i: int) -> str:
        return self.ds.name(self.indices[i])

    def groups(self) -> list[str]:
        groups = self.ds.groups()
        return [groups[i] for i in self.indices]

    def fingerprint(self) -> str:
        return hashlib.sha256(f"Part {self.ds.fingerprint()} {self.indices}".encode()).hexdigest()


class InMemory(Part):
    """All of ds, each decoded or drawn picture remembered until `budget` bytes are full. One memory a process: for
    loading without workers. Changes no pixel."""

    def __init__(self, ds: Pictures, budget: int = REMEMBER_BYTES):
        super().__init__(ds, range(len(ds)))
        self.free, self.memory = budget, {}

    def source(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        if i not in self.memory:
            image, pose = super().source(i)
            image = np.asarray(image)
            if image.nbytes > self.free:
                return image, pose
            self.free -= image.nbytes
            self.memory[i] = image, pose
        return self.memory[i]

    def fingerprint(self) -> str:
        return self.ds.fingerprint()


def note_broken(ds: Pictures, broken: dict[str, str]) -> None:
    """Counts, and names on the terminal, those of `broken` that are new."""
    ds = ds.base
    new = {file: reason for file, reason in broken.items() if file not in ds.broken}
    if new:
        ds.note(new)
    for file, reason in new.items():
        tqdm.write(f"left out: {reason if file in reason else f'{file}: {reason}'}", file=sys.stderr)


@contextmanager
def naming_broken(path: str | Path, *datasets: Pictures) -> Iterator[None]:
    """However the block ends, the file `path` then names the pictures found unusable in it, if there are any."""
    try:
        yield
    finally:
        lines = {f"{name}\t{reason}": None for ds in datasets for name, reason in ds.base.broken.items()}
        if lines:
            how = {"encoding": "utf-8", "errors": "surrogateescape"}            # file names may be any bytes
            before = Path(path).read_text(**how).splitlines() if Path(path).exists() else []
            lines = dict.fromkeys(before) | lines
            Path(path).write_text("".join(line + "\n" for line in lines), **how)
            print(f"{len(lines)} unusable pictures were left out; {path} names them", file=sys.stderr)


def split(ds: Pictures, fraction: float = 0.1) -> tuple[Part, Part]:
    """(train, validation) by group, never by frame: neighbouring frames of a clip would leak.

    Groups are taken in the order of their names' crc32, so the split is the same on every machine, and a dataset
    that grows keeps nearly all of it. A group with more than half of the pictures always trains.
    """
    names, members = ds.groups(), {}
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


def lister() -> Callable[[str], set[str]]:
    """Folder -> the names in it, none if there is no such folder; each is looked at once."""
    return lru_cache(None)(lambda folder: set(os.listdir(folder)) if os.path.isdir(folder) else set())


def find_pictures(folder: Path) -> list[str]:
    """The pictures in a folder and those below it, by name; DataError where there are none."""
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder; pictures go there")
    found = sorted(os.path.join(at, name) for at, _, names in os.walk(folder) for name in names
                   if os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith("."))
    if not found:
        raise DataError(f"{folder}: no pictures in it ({' '.join(sorted(SUFFIXES))})")
    return found


def json_files(root: Path, pattern: str = "*.json") -> list[Path]:
    """Where the COCO json of a folder may be."""
    return sorted(p for d in (root, root / "annotations", root / "coco") for p in d.glob(pattern) if p.is_file())


COCO_LISTS = [re.compile(rb'"%s"\s*:\s*\[' % name) for name in (b"images", b"annotations")]


def is_coco(path: Path) -> bool:
    """Is a json an object with the lists "images" and "annotations"? Captions, settings and reports are not.

    Told by its bytes, which are not parsed: a file of any size costs no memory, and a COCO json that was cut short is
    still one, for its reader to complain of. DataError where it cannot be opened.
    """
    try:
        if path.stat().st_size == 0:                # which cannot be mapped
            return False
        with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as found:
            return bool(re.match(rb"(\xef\xbb\xbf)?\s*\{", found)) and all(p.search(found) for p in COCO_LISTS)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def has_pictures(root: Path) -> bool:
    """Is there a picture right in `root` or in its images/?"""
    return any(p.suffix.lower() in SUFFIXES for folder in (root, root / "images") if folder.is_dir()
               for p in folder.iterdir())


def has_keypoints(root: str | Path) -> bool:
    """Is `root` something that PoseFolder takes, rather than a folder of nothing but pictures?"""
    root = Path(root)
    return not root.is_dir() or (root / "keypoints").is_dir() or any(map(is_coco, json_files(root)))


def data_hash(train: Pictures, val: Pictures | None = None) -> str:
    """Changes when a picture or pose does; a copy with other file times counts as another. `val` are held-out pictures
    that --val names: others are split from the same ones."""
    return "+".join(ds.fingerprint()[:16] for ds in filter(None, (train, val)))


def is_among_pictures(path: str | Path, root: str | Path) -> bool:
    """Might PoseFolder(root) take a picture that somebody writes into the folder `path` for one of its own?"""
    path, root = Path(path).resolve(), Path(root)
    if not root.is_dir():                           # a list, a COCO json: only what they name counts
        return False
    pictures = root / "images" if (root / "images").is_dir() and has_keypoints(root) else root
    return path == root.resolve() or path.is_relative_to(pictures.resolve())


def check_out(out: str | Path, *specs: str | None) -> None:
    """DataError where the folder --out lies among the pictures that `specs` name, as --data does."""
    for spec in filter(None, specs):
        if is_folder(spec) and is_among_pictures(out, spec):
            raise DataError(f"--out {out} lies among the pictures of {spec}, where what is written there would count "
                            "as one of them; name another folder")


def find_coco(root: Path) -> Path:
    """The COCO json of a folder; person_keypoints*.json goes before any other json, and their content decides."""
    for pattern in ("*person_keypoints*.json", "*.json"):
        found = json_files(root, pattern)
        if len(found) > 1:
            found = [path for path in found if is_coco(path)]
        if len(found) == 1:
            return found[0]
        if found:
            raise DataError(f"{root}: {len(found)} json files, {found[0].name}, {found[1].name}, ...; name one of them")
    raise DataError(f"{root} has pictures without poses: put them into {root}/images and their keypoints into "
                    f"{root}/keypoints, or a COCO json beside them" if has_pictures(root) else
                    f"{root}: there is neither a picture nor a pose in it")


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
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            column = next((c for c in ("group", "animation", "clip", "video") if c in (rows.fieldnames or [])), None)
            if column is None or "file" not in rows.fieldnames:
                return {}
            return {row["file"]: row[column] for row in rows}
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a table ({error}); mend it or take it away") from error


# -------------------------------------------------------------------------------------------- figures

# Little people with exact joints: colours, a person, a pose, the posed skeleton in 3D, its drawing, the place.
# Axes: x right, y down, z towards the viewer; a body unit is the standing height; angles are in degrees.

SUPERSAMPLE = 4                 # drawn so many times larger, then averaged down
Colour = tuple[int, int, int]
Vec = tuple[float, float, float]
Mat = tuple[Vec, Vec, Vec]


def _hex(codes: str) -> list[Colour]:
    return [tuple(bytes.fromhex(code)) for code in codes.split()]


SKINS = _hex("ffe0c7 f9cfae f0b98d e0a070 c98352 a9673d 8a5030 6b3d26 542f20")
HAIRS = _hex("2a2228 3d2a24 5b3a29 8a5532 b9763a e3b65c f0d79a c4532d 8d2f3f 9a9aa6 e9e4de 4a5fa8 c76b98")
# Backdrops are pale and clothes strong, so that a limb parts from what is behind it even at 64 x 64.
# One row: sky, far shape, near shape, ground | tops | bottoms (dark or denim) | accents for shoes and hats.
PALETTES = [[_hex(codes) for codes in row] for row in (
    ("cdeaf2 b5dccb 9ccfae bfe0a8", "e8564a f2b134 fff4e0 3a7ca5", "2f4858 4a5d7e 6b4a3a", "d1495b fff4e0 2f4858"),
    ("fde6cf f7c9a9 eeb08d f5dcb0", "2a9d8f e76f51 264653 fffaf0", "264653 5a4a6a 3d5a80", "e76f51 8d3b2e 264653"),
    ("e3dff5 c9c1ea b2a7df d8cdea", "f28482 5f4bb6 ffd166 fffdf7", "3a3266 5d576b 2d3047", "ffd166 f28482 2d3047"),
    ("d9f0e6 b4ddcf 93c9b9 e8e3c0", "ee6c4d 1f7a8c f4d35e f9f7f0", "293241 3d5a80 704d3c", "ee6c4d f9f7f0 293241"),
    ("ffe3e6 f9c6cd f2adb8 fbe9d7", "457b9d d62839 1d3557 fff8f0", "1d3557 5c4b51 44608a", "d62839 fff8f0 3c2a3e"),
    ("fbf3d9 f0dfae e3cd8f e9dcc0", "588157 bc4749 3a5a40 386fa4", "344e41 6b4226 4b5a75", "bc4749 f2e8cf 3b2c24"),
    ("dbe7f7 bccfe9 a3bbdd eef3f8", "d1495b edae49 00798c 30638e", "2e4057 66545e 4f3b4f", "edae49 d1495b 243447"),
    ("2f3a62 3d4a78 4a5a8a 56688f", "ff9f68 ffe08a f4f1ff e4688a", "8f7fc4 c8553d 7fb7be", "ffe08a ff9f68 f4f1ff"),
)]
WHITE, INK, ROSE = (255, 255, 255), (44, 34, 48), (240, 104, 112)
EDGE = 0.64                     # outlines are this much darker than what they surround


def _shade(colour: Colour, light: float) -> Colour:
    return (int(colour[0] * light), int(colour[1] * light), int(colour[2] * light))


def _mix(a: Colour, b: Colour, t: float) -> Colour:
    return _shade(_lerp(a, b, t), 1)


HAIR_STYLES = ("short", "short", "bob", "long", "ponytail", "pigtails", "bun", "afro", "curly", "bald")
EARS_COVERED, ONE_MASS = ("bob", "long", "afro", "curly"), ("afro", "curly")


class _Person:
    """Proportions in body units, looks as colours and the names of styles."""

    def __init__(self, rng: random.Random, palette: list[list[Colour]]):
        (_, _, near, _), tops, bottoms, accents = palette
        self.crate = _mix(near, (120, 80, 50), 0.45)                            # the box to sit on
        self.head = rng.uniform(0.118, 0.178)                                   # radius: 0.18 a chibi, 0.12 grown up
        body = 1 - 2 * self.head
        self.torso, self.leg = 0.40 * body, 0.29 * body                         # hips to neck; thigh, and shank
        self.skirt = rng.random() < 0.28
        motifs = ("plain", "stripes", "stripes", "badge", "jacket", "plain" if self.skirt else "overalls")
        self.motif, self.skin, self.bottom = rng.choice(motifs), rng.choice(SKINS), rng.choice(bottoms)
        if self.motif == "overalls":
            tops = [_mix(colour, WHITE, 0.45) for colour in tops]
        apart = [top for top in tops if sum(abs(x - y) for x, y in zip(top, self.skin, strict=True)) > 110]
        self.top = rng.choice(apart or tops)                                    # cloth that shows against the skin
        if self.skirt and rng.random() < 0.55:
            self.bottom = self.top                                              # a dress
        elif self.skirt:
            self.bottom = rng.choice([colour for colour in tops if colour != self.top])
        self.style = rng.choice(HAIR_STYLES)
        self.hat = rng.choice(("cap", "beanie", "sunhat")) if self.style != "afro" and rng.random() < 0.2 else ""
        self.arm = rng.uniform(0.225, 0.245) * body                             # upper arm, and forearm
        self.shoulder = rng.uniform(0.125, 0.16) * body                         # half the width between the joints
        self.hip = rng.uniform(0.07, 0.085) * body                              # the same
        self.girth = rng.uniform(0.9, 1.22) * body                              # multiplies every thickness
        self.hair, self.fringe = rng.choice(HAIRS), rng.choice(HAIRLINES)
        beards = 15 if self.style in ("short", "bald") else 0
        self.face = rng.choices(("plain", "glasses", "beard"), (70, 15, beards))[0]
        # How much of the limb is covered: 0 none, 1 to the elbow or knee, 2 to the wrist or ankle.
        self.sleeve = 2.0 if self.motif == "jacket" else rng.choice((0.0, 0.6, 0.6, 2.0, 2.0))
        self.trouser = rng.choice((0.0, 0.0, 2.0) if self.skirt else (0.75, 1.3, 2.0, 2.0, 2.0))
        self.belt, self.scarf = rng.random() < 0.3, rng.random() < 0.15
        self.shoe, self.accent = rng.choice(accents), rng.choice(accents)


# Arm: flexion (0 hangs, 90 forward, 180 up), abduction (90 sideways), turn (forearm bends: 0 forward,
# 90 inward, -90 outward), elbow. Leg: the same with the knee, which bends backward; turn 90 brings the foot inward.
ARM_LIMITS = ((-50, 170), (-5, 172), (-90, 90), (0, 145))
LEG_LIMITS = ((-35, 118), (-6, 60), (-25, 85), (0, 150))
STAND, HANG, UP = (0, 5, 0, 3), (4, 12, 10, 14), (0, 163, -30, 12)
# name: left arm, right arm, left leg, right leg, (lean forward, roll sideways), lift off the ground
ARCHETYPES = {
    "stand":    (HANG, HANG, STAND, STAND, (0, 0), 0.0),
    "wave":     (HANG, (0, 105, -85, 75), STAND, STAND, (0, 3), 0.0),
    "walk":     ((36, 8, 5, 25), (-32, 8, 5, 22), (-22, 2, 0, 24), (30, 2, 0, 6), (4, 0), 0.0),
    "run":      ((62, 10, 20, 95), (-46, 12, 10, 92), (-24, 2, 0, 82), (66, 3, 0, 66), (16, 0), 0.04),
    "star":     ((0, 128, -10, 8), (0, 128, -10, 8), (0, 32, 0, 8), (0, 32, 0, 8), (0, 0), 0.12),
    "leap":     ((30, 120, -20, 15), (-20, 95, 0, 15), (-32, 4, 0, 60), (72, 6, 0, 18), (8, 0), 0.13),
    "tuck":     (UP, UP, (78, 16, 0, 105), (70, 16, 0, 112), (8, 0), 0.16),
    "dance":    ((0, 150, -60, 45), (0, 52, 80, 95), STAND, (45, 38, 45, 95), (0, 8), 0.0),
    "twirl":    ((60, 110, 30, 40), (20, 70, 60, 50), (0, 4, 0, 6), (-12, 22, 0, 55), (-4, -8), 0.0),
    "box":      ((28, 8, 20, 40), (24, 10, 20, 45), (86, 8, 0, 86), (84, 8, 0, 80), (2, 0), 0.0),
    "floor":    ((-30, 22, 0, 6), (-28, 24, 0, 8), (86, 12, 0, 6), (98, 10, 0, 55), (-12, 0), 0.0),
    "lotus":    ((40, 22, 10, 30), (40, 22, 10, 30), (84, 48, 76, 118), (84, 48, 70, 112), (3, 0), 0.0),
    "heels":    ((34, 6, 15, 38), (34, 6, 15, 38), (72, 8, 0, 145), (72, 8, 0, 145), (4, 0), 0.0),
    "kneel":    ((42, 6, 30, 52), HANG, (86, 6, 0, 88), (2, 4, 0, 92), (5, 0), 0.0),
    "crouch":   ((62, 10, 10, 30), (60, 12, 10, 42), (108, 22, 0, 128), (104, 22, 0, 126), (24, 0), 0.0),
    "cheer":    (UP, UP, (0, 9, 0, 3), (0, 9, 0, 3), (-4, 0), 0.0),
    "point":    (HANG, (86, 8, 0, 4), STAND, (8, 6, 0, 6), (2, 0), 0.0),
    "show":     ((-10, 46, 75, 98), (0, 92, 0, 6), (0, 8, 0, 3), (0, 8, 0, 3), (0, 4), 0.0),
    "tee":      ((0, 89, 0, 2), (0, 89, 0, 2), STAND, STAND, (0, 0), 0.0),
    "kick":     ((40, 42, 10, 25), (-35, 45, 0, 20), STAND, (78, 6, 0, 12), (-12, 0), 0.0),
    "hips":     ((-12, 46, 75, 98), (-12, 46, 75, 98), (0, 10, 0, 3), (0, 10, 0, 3), (0, 0), 0.0),
    "tilt":     ((0, 158, -20, 20), (-10, 44, 75, 96), (0, 12, 0, 2), (0, 12, 0, 14), (0, 20), 0.0),
    "think":    ((24, 4, 80, 92), (52, 8, 40, 132), STAND, STAND, (3, 0), 0.0),
    "tree":     ((0, 166, 10, 30), (0, 166, 10, 30), STAND, (52, 50, 80, 122), (0, 0), 0.0),
    "swallow":  ((10, 92, 0, 4), (10, 92, 0, 4), (8, 2, 0, 10), (-35, 4, 0, 10), (42, 0), 0.0),
    "muscle":   ((0, 90, -88, 105), (0, 90, -88, 105), (0, 12, 0, 3), (0, 12, 0, 3), (0, 0), 0.0),
    "bow":      ((-20, 12, 0, 10), (40, 6, 60, 80), STAND, STAND, (38, 0), 0.0),
    "lunge":    ((95, 20, 0, 6), (-40, 20, 0, 20), (62, 6, 0, 66), (-26, 4, 0, 12), (6, 0), 0.0),
}
YAWS = (0, 0, 0, 0, 0, 38, -38, 38, -38, 65, -65, 88, -88, 88, -88, 145, -145, 180)
RANDOM_POSES = 0.34             # share of pictures with limbs drawn from the whole human range
CLOSE_UPS = 0.05                # share of pictures cropped so that joints leave the frame


class _Pose:
    """Angles in degrees; arms and legs are (left, right) rows in the terms of ARM_LIMITS and LEG_LIMITS."""

    def __init__(self, rng: random.Random):
        name = rng.choice(tuple(ARCHETYPES))
        *limbs, (lean, roll), self.lift = ARCHETYPES[name]                      # lift in body units
        self.box, jitter = name == "box", 6                                     # box: sits on one
        if rng.random() < RANDOM_POSES:
            self.box, jitter = False, 0
            limbs = [(rng.uniform(-45, 110), rng.uniform(0, 150), rng.uniform(-80, 80), rng.triangular(0, 140, 20))
                     for _ in "LR"]
            limbs += [(rng.triangular(-35, 100, 0), rng.triangular(0, 50, 5), rng.uniform(-20, 30),
                       rng.triangular(0, 130, 5)) for _ in "LR"]
            lean, roll, self.lift = rng.gauss(4, 12), rng.gauss(0, 9), rng.choice((0.0, 0.0, 0.1))
        if rng.random() < 0.5:
            limbs, roll = [limbs[k] for k in (1, 0, 3, 2)], -roll
        limbs = [[min(hi, max(lo, rng.gauss(angle, jitter))) for angle, (lo, hi) in zip(limb, limits, strict=True)]
                 for limb, limits in zip(limbs, (ARM_LIMITS, ARM_LIMITS, LEG_LIMITS, LEG_LIMITS), strict=True)]
        self.arms, self.legs = limbs[:2], limbs[2:]
        self.yaw = rng.choice(YAWS) + rng.gauss(0, 7)                           # 0 faces the viewer, 90 right, 180 away
        self.lean, self.roll = rng.gauss(lean, 2.5), rng.gauss(roll, 2)
        self.head = (rng.gauss(0, 12), rng.gauss(-0.5 * lean, 6), rng.gauss(-0.4 * roll, 6))    # yaw, pitch down, roll


def _rotation(axis: str, degrees: float) -> Mat:
    """About x: takes down towards the viewer; about y: the viewer's direction to the right; z: down to the right."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return {"x": ((1, 0, 0), (0, c, -s), (0, s, c)), "y": ((c, 0, s), (0, 1, 0), (-s, 0, c)),
            "z": ((c, s, 0), (-s, c, 0), (0, 0, 1))}[axis]


def _apply(m: Mat, v: Vec, origin: Vec = (0.0, 0.0, 0.0), scale: float = 1.0) -> Vec:
    """origin + scale * m v"""
    (a, b, c), (d, e, f), (g, h, i) = m
    (x, y, z), (ox, oy, oz) = v, origin
    return (ox + (a * x + b * y + c * z) * scale, oy + (d * x + e * y + f * z) * scale,
            oz + (g * x + h * y + i * z) * scale)


def _matmul(*matrices: Mat) -> Mat:
    *others, product = matrices
    for m in reversed(others):
        product = tuple(zip(*[_apply(m, column) for column in zip(*product, strict=True)], strict=True))
    return product


def _lerp(a: Vec, b: Vec, t: float) -> Vec:
    return (a[0] + (b[0] - a[0]) * t, a[1] + (b[1] - a[1]) * t, a[2] + (b[2] - a[2]) * t)


SIDES = ("left", "right")
FACE = {"nose": (0.0, 0.24, 0.97), "eye_left": (0.40, 0.04, 0.82), "eye_right": (-0.40, 0.04, 0.82),
        "ear_left": (0.98, 0.12, -0.06), "ear_right": (-0.98, 0.12, -0.06)}     # from the head's middle, in its radii
# Joints from the body outwards, their radii in girths, and what is added to the depth, in body units.
LIMB_PARTS = {"arm": (("shoulder", "elbow", "wrist"), (0.05, 0.043, 0.035), 0.02),
              "leg": (("hip", "knee", "ankle"), (0.073, 0.056, 0.042), -0.09)}  # hems hang over standing legs


def _limb(frame: Mat, root: Vec, length: float, angles: list[float], side: int, bend: int, toe: float = 0) -> list[Vec]:
    """Root, middle and end joint, and the toe so far from it; side is +1 left, -1 right; bend +1 elbow, -1 knee."""
    flexion, abduction, turn, fold = angles
    frame = _matmul(frame, _rotation("x", flexion), _rotation("z", side * abduction))
    turn, fold = math.radians(turn), math.radians(fold)
    sin_turn, cos_turn, sin_fold, cos_fold = math.sin(turn), math.cos(turn), math.sin(fold), math.cos(fold)
    middle = _apply(frame, (0, length, 0), root)
    end = _apply(frame, (-side * sin_turn * sin_fold, cos_fold, bend * cos_turn * sin_fold), middle, length)
    toes = (-side * sin_turn * cos_fold * bend, -bend * sin_fold, cos_turn * cos_fold)
    return [root, middle, end, _apply(frame, toes, end, toe)]


def _skeleton(person: _Person, pose: _Pose) -> tuple[dict[str, Vec], Mat, Mat, Mat]:
    """Points in body units from the pelvis, and the matrices that turn head, chest and hips."""
    yaw = _rotation("y", pose.yaw)
    chest = _matmul(yaw, _rotation("z", pose.roll), _rotation("x", -pose.lean))
    turn, nod, tilt = pose.head
    head = _matmul(chest, _rotation("y", turn), _rotation("z", tilt), _rotation("x", -nod))
    points = {"pelvis": (0.0, 0.0, 0.0), "neck": _apply(chest, (0, -person.torso, 0))}
    points["head"] = _apply(head, (0, -0.93 * person.head, 0.04 * person.head), points["neck"])
    points |= {name: _apply(head, offset, points["head"], person.head) for name, offset in FACE.items()}
    for side, sign, arm, leg in zip(SIDES, (1, -1), pose.arms, pose.legs, strict=True):
        shoulder = _apply(chest, (sign * person.shoulder, -0.86 * person.torso, 0))
        hip = _apply(yaw, (sign * person.hip, 0, 0))
        joints = _limb(chest, shoulder, person.arm, arm, sign, 1)[:3]
        joints += _limb(yaw, hip, person.leg, leg, sign, -1, 0.12 * person.girth)
        names = (*LIMB_PARTS["arm"][0], *LIMB_PARTS["leg"][0], "toe")
        points |= {f"{name}_{side}": point for name, point in zip(names, joints, strict=True)}
    return points, head, chest, yaw


def _circle(start: int, stop: int, step: int) -> list[tuple[float, float]]:
    return [(math.cos(math.radians(t)), math.sin(math.radians(t))) for t in range(start, stop, step)]


def _edge(polar: Callable[[int], float]) -> list[Vec]:
    """Closed line [24] on a unit sphere round z: its angle from z, by the angle clockwise from the top (-180..165)."""
    angles = [math.radians(polar((t + 180) % 360 - 180)) for t in range(0, 360, 15)]
    return [(math.sin(a) * s, math.sin(a) * -c, math.cos(a)) for a, (c, s) in zip(angles, CIRCLE, strict=True)]


ARC, RING, CIRCLE = _circle(-90, 91, 30), _circle(0, 360, 30), _circle(0, 360, 15)
HAIRLINES = [_edge(lambda t, fringe=fringe: fringe(t) if abs(t) <= 60 else 56 + 32 * min(1.0, (abs(t) - 60) / 50))
             for fringe in (lambda t: 40, lambda t: 36 + 9 * (t // 15 % 2), lambda t: 50 - 0.28 * t,
                            lambda t: 58 - 0.3 * abs(t), lambda t: 44 + 0.3 * t)]
HAT, BEARD = _edge(lambda t: 88), _edge(lambda t: 62 if abs(t) > 40 else 40)
BRIMS = {"cap": (0.8, 0.8, 0.75), "sunhat": (1.75, 0.0, 0.8)}       # radius and shift forward in head radii, shade
# Hair that hangs off the head: circles (x, y, z, radius) in head radii; one is a ball, two a capsule, more a blob.
TRESSES = {
    "long": [[(-0.62, 0, -0.4, 0.5), (0.62, 0, -0.4, 0.5), (-0.72, 1.55, -0.4, 0.28), (0.72, 1.55, -0.4, 0.28)]],
    "bob": [[(-0.78, 0, -0.2, 0.4), (0.78, 0, -0.2, 0.4), (-0.78, 0.62, -0.15, 0.4), (0.78, 0.62, -0.15, 0.4)]],
    "ponytail": [[(0, -0.5, -0.95, 0.26), (0, 0.9, -1.55, 0.2)]],
    "pigtails": [[(0.95 * x, 0, -0.25, 0.24), (1.4 * x, 0.95, -0.3, 0.17)] for x in (-1, 1)],
    "bun": [[(0, -1.08, -0.35, 0.42)]],
    "afro": [[(0, -0.2, -0.2, 1.36)]],
    "curly": [[(0.98 * c, 0.98 * s + 0.05, -0.15, 0.36)]
              for c, s in ((math.cos(t), math.sin(t)) for t in (math.radians(-200 + 220 * k / 9) for k in range(10)))],
}
EYE_SHOWS, EAR_SHOWS = 0.06, -0.35      # from so many head radii in front of its middle on; the nose goes with the eyes


class _Canvas:
    """Draws outlined shapes."""

    def __init__(self, pixels: int):
        self.image = Image.new("RGB", (pixels, pixels))
        self.pen, self.line = ImageDraw.Draw(self.image), 1.0                   # line: width of the outlines

    def polygon(self, points: list, colour: Colour) -> None:
        if len(points) > 2:
            self.pen.polygon([p[:2] for p in points], fill=colour)

    def disc(self, p: Vec, rx: float, colour: Colour, ry: float | None = None) -> None:
        ry = rx if ry is None else ry
        self.pen.ellipse((p[0] - rx, p[1] - ry, p[0] + rx, p[1] + ry), fill=colour)

    def ball(self, p: Vec, r: float, colour: Colour) -> None:
        self.disc(p, r + self.line, _shade(colour, EDGE))
        self.disc(p, r, colour)

    def shape(self, points: list, outline: list, colour: Colour) -> None:
        self.pen.line(outline, fill=_shade(colour, EDGE), width=round(2 * self.line))
        self.pen.polygon(points, fill=colour)

    def capsule(self, a: Vec, b: Vec, ra: float, rb: float, colour: Colour) -> None:
        """Tapered limb; the outline leaves out the start, where the limb grows out of its parent."""
        dx, dy = b[0] - a[0], b[1] - a[1]
        length = math.hypot(dx, dy) or 1.0
        bx, by, ax, ay = rb * dx / length, rb * dy / length, ra * dx / length, ra * dy / length
        points = [(b[0] + c * bx - s * by, b[1] + c * by + s * bx) for c, s in ARC]
        points += [(a[0] - c * ax + s * ay, a[1] - c * ay - s * ax) for c, s in ARC]
        self.shape(points, points[-1:] + points[:len(ARC) + 1], colour)

    def blob(self, circles: list[tuple[Vec, float]], colour: Colour) -> None:
        """Convex hull of circles (centre, radius), by the monotone chain."""
        points = sorted([(p[0] + r * c, p[1] + r * s) for p, r in circles for c, s in RING])
        hull = []
        for order in (points, points[::-1]):
            chain = []
            for x, y in order:
                while len(chain) > 1:
                    (ax, ay), (bx, by) = chain[-2:]
                    if (bx - ax) * (y - ay) - (by - ay) * (x - ax) > 0:
                        break
                    chain.pop()
                chain.append((x, y))
            hull += chain[:-1]
        self.shape(hull, hull + hull[:1], colour)


class _Figure(_Canvas):
    """A posed person as the camera sees it: pixels of the big canvas, z towards the viewer in pixels too."""

    def __init__(self, rng: random.Random, palette: list[list[Colour]], pixels: int):
        """Tilts the camera a little down, so that depth shows, and fits the figure into the frame."""
        super().__init__(pixels)
        self.person, self.pose = person, pose = _Person(rng, palette), _Pose(rng)
        points, head, chest, yaw = _skeleton(person, pose)
        self.ground = max(p[1] for p in points.values()) + 0.05 * person.girth + pose.lift     # body units, untilted
        points["shadow"] = (0.0, self.ground, 0.0)
        camera = _rotation("x", -rng.uniform(6, 17))
        self.head, self.chest, self.view = _matmul(camera, head), _matmul(camera, chest), _matmul(camera, yaw)
        points = {name: _apply(camera, p) for name, p in points.items()}
        reach = [(p, 1.25 * person.head if name == "head" else 0.07 * person.girth) for name, p in points.items()]
        (x0, x1), (y0, y1) = ((min(p[k] - r for p, r in reach), max(p[k] + r for p, r in reach)) for k in (0, 1))
        scale = min(rng.uniform(0.7, 0.95) / (y1 - y0), 0.95 / (x1 - x0), 1.12)
        if rng.random() < CLOSE_UPS:
            scale *= rng.uniform(1.4, 1.9)
            left, top = 0.5 - scale * (x0 + x1) / 2, rng.uniform(0.03, 0.1) - scale * y0
        else:
            left = rng.uniform(0.02, 0.98 - scale * (x1 - x0)) - scale * x0
            top = 1 - scale * y1 - rng.uniform(0.02, max(0.02, min(0.16, 0.97 - scale * (y1 - y0))))
        scale, left, top = scale * pixels, left * pixels, top * pixels
        self.scale, self.girth, self.radius = scale, person.girth * scale, person.head * scale
        self.line = 0.011 * scale
        # keypoints.JOINTS, and head, neck, pelvis, toe_left, toe_right, shadow
        self.points = {name: (left + scale * x, top + scale * y, scale * z) for name, (x, y, z) in points.items()}

    def limb(self, kind: str, side: str) -> list[Vec]:
        return [self.points[f"{name}_{side}"] for name in LIMB_PARTS[kind][0]]

    def on_head(self, x: float, y: float, z: float) -> Vec:
        """Place given in head radii from its middle, along its own axes."""
        return _apply(self.head, (x, y, z), self.points["head"], self.radius)

    def facing(self, p: Vec) -> float:
        """How far p lies in front of the middle of the head, in head radii."""
        return (p[2] - self.points["head"][2]) / self.radius

    def cap(self, centre: Vec, radius: float, tilt: float, edge: list[Vec]) -> list[tuple[float, float]]:
        """Visible part of a cap of a sphere: its axis is tilt degrees below the nose, edge its border."""
        m = _matmul(self.head, _rotation("x", -tilt))
        rim = [_apply(m, v) for v in edge]
        first = 1 + max((k for k, p in enumerate(rim) if p[2] < 0), default=-1)
        seen = [p for p in rim[first:] + rim[:first] if p[2] >= 0]
        if m[2][2] < -0.85 or not seen:
            return []
        if len(seen) < len(rim):        # close along the outline of the sphere, on the side where the axis points
            start, end, axis = (math.atan2(y, x) for x, y in (seen[-1][:2], seen[0][:2], (m[0][2], m[1][2])))
            turn = (end - start) % math.tau
            if (axis - start) % math.tau > turn:
                turn -= math.tau
            seen += [(math.cos(start + turn * t / 12), math.sin(start + turn * t / 12), 0.0) for t in range(13)]
        return [(centre[0] + radius * x, centre[1] + radius * y) for x, y, _ in seen]

    def draw(self) -> None:
        """Draws the parts from far to near."""
        head_z, unit, style = self.points["head"][2], self.scale, self.person.style
        depth = {"torso": 0.0, "head": head_z + 0.4 * self.radius}
        if style in TRESSES:            # in front of the trunk when the back shows, else behind it
            depth["tresses"] = head_z - (0.5 if style in ("bun", "pigtails") else 1) * self.radius * self.head[2][2]
        for kind, side in ((kind, side) for kind in LIMB_PARTS for side in SIDES):
            a, b, c = self.limb(kind, side)
            depth[f"{kind}_{side}"] = (a[2] + 2 * b[2] + c[2]) / 4 + LIMB_PARTS[kind][2] * unit
        if self.person.skirt:
            depth["skirt"] = max(depth["leg_left"], depth["leg_right"]) + 0.001 * unit
        if self.pose.box:
            depth["box"] = -0.08 * unit
        for part in sorted(depth, key=depth.get):
            kind, *side = part.split("_")
            if kind in LIMB_PARTS:
                is_far = depth[part] < -0.05 * unit and abs(self.chest[2][2]) < 0.75
                self.draw_limb(kind, *side, 0.88 if is_far else 1.0)
            else:
                getattr(self, f"draw_{kind}")()

    def draw_limb(self, kind: str, side: str, light: float) -> None:
        """Two tapered capsules and a hand or shoe, the farther first; cloth reaches `cover` segments down the limb."""
        person, g = self.person, self.girth
        (a, b, c), (ra, rb, rc) = self.limb(kind, side), (r * g for r in LIMB_PARTS[kind][1])
        skin = _shade(person.skin, light)
        if kind == "arm":
            cloth, cover, hand = _shade(person.top, light * 0.95), person.sleeve, _lerp(b, c, 1.16)
            end_first, draw_end = hand[2] < b[2], partial(self.ball, hand, 0.043 * g, skin)
        else:
            cloth, cover, toe = _shade(person.bottom, light), person.trouser, self.points[f"toe_{side}"]
            if person.skirt:
                cloth = _mix(cloth, WHITE, 0.55)                                # tights
            heel, shoe = _lerp(c, toe, -0.12), _shade(person.shoe, light)
            end_first, draw_end = toe[2] < c[2], partial(self.capsule, heel, toe, 0.05 * g, 0.043 * g, shoe)
        if end_first:
            draw_end()
        segments = [(a, b, ra, rb, cover), (b, c, rb, rc, cover - 1)]
        for start, end, r0, r1, covered in segments[::-1] if c[2] < a[2] - 0.5 * ra else segments:
            if covered < 1:
                self.capsule(start, end, r0, r1, skin)
            if covered > 0:
                t = min(covered, 1.0)
                self.capsule(start, _lerp(start, end, t), 1.12 * r0, 1.14 * (r0 + (r1 - r0) * t), cloth)
        if not end_first:
            draw_end()

    def draw_skirt(self) -> None:
        circles = [(_lerp(self.points["pelvis"], self.points["neck"], 0.3), 0.07 * self.girth)]
        for hip, knee, _ in (self.limb("leg", side) for side in SIDES):
            circles += [(hip, 0.085 * self.girth), (_lerp(hip, knee, 0.48), 0.1 * self.girth)]
        self.blob(circles, self.person.bottom)

    def draw_torso(self) -> None:
        person, g, pelvis, neck = self.person, self.girth, self.points["pelvis"], self.points["neck"]
        hips, shoulders = ([self.points[f"{name}_{side}"] for side in SIDES] for name in ("hip", "shoulder"))
        self.capsule(self.points["head"], neck, 0.055 * g, 0.06 * g, _shade(person.skin, 0.88))
        if not person.skirt:
            self.blob([(hip, 0.078 * g) for hip in hips], person.bottom)
        lower = [(_lerp(hip, _lerp(pelvis, neck, 0.1), 0.45), 0.078 * g) for hip in hips]
        upper = [(shoulder, 0.056 * g) for shoulder in shoulders]
        self.blob(upper + lower, person.top)

        spine = math.hypot(neck[0] - pelvis[0], neck[1] - pelvis[1]) or 1.0
        ux, uy = -(neck[1] - pelvis[1]) / spine, (neck[0] - pelvis[0]) / spine  # across the spine, in the picture
        low, high = (abs((a[0] - b[0]) * ux + (a[1] - b[1]) * uy) / 2 + r - self.line * 0.3
                     for (a, r), (b, _) in (lower, upper))                      # half widths

        def band(t0: float, t1: float, colour: Colour) -> None:
            """Stripe square to the spine, from height t0 to t1 (0 pelvis, 1 neck)."""
            corners = []
            for t, sign in ((t0, -1), (t0, 1), (t1, 1), (t1, -1)):
                (x, y, _), w = _lerp(pelvis, neck, t), sign * (low + (high - low) * min(1.0, t / 0.86))
                corners.append((x + w * ux, y + w * uy))
            self.polygon(corners, colour)

        def at(t: float, x: float) -> Vec:
            """Place on the front of the trunk: height t, x across in half widths."""
            offset = (0.95 * x * person.shoulder * self.scale, 0, 0.1 * g * math.sqrt(1 - x * x))
            return _apply(self.chest, offset, _lerp(pelvis, neck, t))

        front = self.chest[2][2]                                                # 1 faces the viewer, -1 shows the back
        if person.motif == "stripes":
            pale = _mix(person.top, WHITE, 0.7) if sum(person.top) < 600 else person.accent
            for t in (0.2, 0.44, 0.68):
                band(t, t + 0.11, pale)
        elif person.motif == "jacket" and front > 0.4:
            shirt = _mix(person.accent, WHITE, 0.75)
            self.polygon([at(0.92, -0.4), at(0.92, 0.4), at(0.04, 0.22), at(0.04, -0.22)], shirt)
        elif person.motif == "overalls":
            band(0.02, 0.3, person.bottom)
            for x in (-0.5, 0.5):
                self.pen.line([at(0.3, x)[:2], at(0.93, x)[:2]], fill=person.bottom, width=int(0.05 * g) + 1)
            if front > 0.4:
                self.polygon([at(0.7, -0.55), at(0.7, 0.55), at(0.1, 0.6), at(0.1, -0.6)], person.bottom)
                self.disc(at(0.47, 0.0), 0.035 * g, person.accent)
        elif person.motif == "badge" and front > 0.5:
            self.disc(at(0.55, 0.0), 0.062 * g, WHITE)
            self.disc(at(0.55, 0.0), 0.042 * g, person.accent)
        if person.belt:
            band(0.06, 0.15, _shade(person.accent, 0.8))
        if person.scarf:
            self.capsule(at(0.93, -0.5), at(0.93, 0.5), 0.05 * g, 0.05 * g, person.accent)

    def draw_tresses(self) -> None:
        colour = _shade(self.person.hair, 1 if self.person.style in ONE_MASS else 0.9)
        for spots in TRESSES[self.person.style]:
            circles = [(self.on_head(x, y, z), r * self.radius) for x, y, z, r in spots]
            if len(circles) > 2:
                self.blob(circles, colour)
            elif len(circles) == 2:
                (a, ra), (b, rb) = circles
                self.capsule(a, b, ra, rb, colour)
            else:
                self.ball(*circles[0], colour)

    def draw_head(self) -> None:
        person, r, head = self.person, self.radius, self.points["head"]
        self.ball(head, r, person.skin)
        if person.style != "bald":
            draw = self.disc if person.style in ONE_MASS else self.ball         # no outline within the mass
            draw(self.on_head(0, -0.07, -0.03), 1.04 * r, person.hair)
            shine = self.on_head(-0.3, -0.78, 0.2)
            if self.facing(shine) > 0:
                self.disc(shine, 0.22 * r, _mix(person.hair, WHITE, 0.22), 0.1 * r)
            self.polygon(self.cap(head, r, 12, person.fringe), person.skin)
        for ear in (self.points["ear_left"], self.points["ear_right"]):
            if person.style not in EARS_COVERED and self.facing(ear) > EAR_SHOWS:
                self.disc(ear, 0.2 * r, _shade(person.skin, 0.8))
                self.disc(ear, 0.15 * r, person.skin)
        self.draw_face()
        if person.hat:
            self.draw_hat()

    def draw_face(self) -> None:
        skin, r = self.person.skin, self.radius
        for x in (-0.58, 0.58):
            cheek = self.on_head(x, 0.38, math.sqrt(1 - x * x - 0.38 * 0.38))
            if self.facing(cheek) > 0.25:
                self.disc(cheek, 0.17 * r * max(0.5, self.facing(cheek)), _mix(skin, ROSE, 0.34), 0.13 * r)
        if self.person.face == "beard":
            self.polygon(self.cap(self.points["head"], 1.01 * r, 62, BEARD), self.person.hair)
        x, y, _ = mouth = self.on_head(0.0, 0.55, math.sqrt(1 - 0.55 * 0.55))
        if self.facing(mouth) > 0.1:
            w, lips = 0.26 * r * self.facing(mouth) + 0.05 * r, _mix(skin, (120, 20, 40), 0.72)
            self.pen.chord((x - w, y - 0.2 * r, x + w, y + 0.14 * r), 12, 168, fill=lips)
        if self.facing(self.points["nose"]) > EYE_SHOWS:
            self.disc(self.points["nose"], 0.085 * r, _mix(skin, (150, 50, 40), 0.36), 0.07 * r)
        for eye in (self.points["eye_left"], self.points["eye_right"]):
            if self.facing(eye) > EYE_SHOWS:
                w = 0.125 * r * (0.55 + 0.45 * self.facing(eye))
                if self.person.face == "glasses":
                    self.disc(eye, 2.3 * w, self.person.accent, 0.27 * r)
                    self.disc(eye, 1.75 * w, _mix(skin, WHITE, 0.55), 0.2 * r)
                elif sum(skin) < 400:
                    self.disc(eye, 1.35 * w, WHITE, 0.21 * r)                   # ink alone would drown in a dark face
                self.disc(eye, w, INK, 0.17 * r)
                self.disc((eye[0] + 0.25 * w, eye[1] - 0.07 * r, 0), 0.4 * w, WHITE)

    def draw_hat(self) -> None:
        r, colour, hat = self.radius, self.person.accent, self.person.hat
        crown = self.on_head(0, -0.42, -0.06)
        shapes = [(self.cap(crown, 1.1 * r, -90, HAT), colour)]
        if hat in BRIMS:
            grow, forward, light = BRIMS[hat]
            brim = [_apply(self.head, (grow * s, 0, forward + grow * c), crown, r)[:2] for c, s in RING]
            under_dome = hat == "sunhat" or self.head[2][2] < 0                 # a visor seen from behind
            shapes.insert(0 if under_dome else 1, (brim, _shade(colour, light)))
        for points, fill in shapes:
            self.polygon(points, fill)
        if hat == "beanie":
            self.disc(_apply(self.head, (0, -1.15, 0), crown, r), 0.26 * r, WHITE)

    def draw_box(self) -> None:
        """The crate under a sitting figure, from its hips to the ground."""
        lid, base = ([_apply(self.view, (x, y, z), self.points["pelvis"], self.scale)
                      for x, z in ((-0.17, -0.204), (0.17, -0.204), (0.17, 0.102), (-0.17, 0.102))]
                     for y in (0.075 * self.person.girth, self.ground))
        self.blob([(p, 1.0) for p in lid + base], _shade(self.person.crate, 0.82))
        self.polygon(lid, self.person.crate)


def _draw_backdrop(canvas: _Canvas, rng: random.Random, palette: list[list[Colour]], floor: float) -> None:
    """A quiet place: sky or wall down to floor (y in [0, 1]), and the ground below it."""
    (sky, far, near, ground), *_ = palette
    pen, s = canvas.pen, canvas.image.width

    def rect(x0: float, y0: float, x1: float, y1: float, colour: Colour, draw: Callable = pen.rectangle) -> None:
        draw((x0 * s, y0 * s, x1 * s, y1 * s), fill=colour)

    def disc(x: float, y: float, r: float, colour: Colour, ry: float | None = None) -> None:
        rect(x - r, y - (ry or r), x + r, y + (ry or r), colour, pen.ellipse)

    kind = rng.choice(("hills", "hills", "trees", "sea", "room", "room", "halo", "dots", "stripes"))
    u = [rng.random() for _ in range(12)]
    pale = _mix(sky, WHITE, 0.45)
    rect(0, 0, 1, 1, sky)
    if kind in ("hills", "trees", "sea"):
        for k in range(1, 4):                                                   # the sky pales towards the horizon
            rect(0, floor * k / 4, 1, 1, _mix(sky, WHITE, 0.13 * k))
        disc(u[0], 0.08 + 0.16 * u[1], 0.06 + 0.04 * u[2], _mix((255, 214, 120), sky, 0.25))
        for x, y in ((u[3], u[4]), (u[5], u[6])):
            for dx, r in ((-0.06, 0.03), (0.0, 0.045), (0.06, 0.032)):
                disc(x * 1.1 - 0.05 + dx, 0.08 + 0.3 * y * floor, r * 1.3, pale, r)
    if kind == "hills":
        disc(u[7] * 0.5, floor + 0.2, 0.5, far, 0.2 + 0.2 * u[8])
        disc(0.6 + u[9] * 0.5, floor + 0.15, 0.45, near, 0.2 + 0.14 * u[10])
    elif kind == "trees":
        disc(0.5, floor + 0.1, 0.9, far, 0.2)
        for k in range(4):
            x, h = k * 0.3 + 0.18 * u[7 + k], 0.2 + 0.16 * u[(3 + k) % 12]
            leaves = _mix(near, far, 0.3 * (k % 2))
            rect(x - 0.012, floor - 0.1, x + 0.012, floor + 0.01, _shade(near, 0.72))
            if u[11] < 0.5:
                fir = ((x - 0.1, floor - 0.05), (x, floor - 0.1 - h), (x + 0.1, floor - 0.05))
                pen.polygon([(x * s, y * s) for x, y in fir], fill=leaves)
            else:
                disc(x, floor - 0.05 - 0.5 * h, 0.085, leaves, 0.45 * h + 0.03)
    elif kind == "sea":
        rect(0, floor - 0.14, 1, 1, near)
        for k in range(3):
            x, y = u[7 + k], floor - 0.11 + 0.035 * k
            rect(x - 0.1, y, x + 0.1, y + 0.01, _mix(near, WHITE, 0.5))
    elif kind == "room":
        if u[0] < 0.6:                                                          # a window, or two pictures
            x = 0.08 + 0.5 * u[1]
            rect(x - 0.02, 0.1, x + 0.3, 0.1 + 0.6 * floor - 0.1, pale)
            rect(x, 0.12, x + 0.13, 0.6 * floor - 0.02, far)
            rect(x + 0.15, 0.12, x + 0.28, 0.6 * floor - 0.02, far)
        else:
            for k in range(2):
                x, y = 0.08 + 0.5 * k + 0.2 * u[2 + k], 0.12 + 0.15 * u[4 + k]
                rect(x, y, x + 0.18, y + 0.22, near)
                rect(x + 0.02, y + 0.02, x + 0.16, y + 0.2, pale)
        rect(0, floor - 0.03, 1, floor, pale)
    elif kind == "halo":
        disc(0.4 + 0.2 * u[0], floor - 0.4, 0.36 + 0.08 * u[1], far)
    elif kind == "dots":
        for k in range(30):
            disc((k % 6 + 0.5 * (k // 6 % 2)) / 5.5, (k // 6 + 0.4) / 5, 0.022, far)
    else:
        for k in range(5):
            rect(k / 5 + 0.04, 0, k / 5 + 0.1, 1, _mix(sky, far, 0.6))
    rect(0, floor, 1, 1.01, ground)
    rect(0, floor, 1, floor + 0.012, _mix(ground, near, 0.5))


class Figures(Pictures):
    """n pictures of little people; picture i depends on (seed, i) only, whatever the size and the order of access."""

    def __init__(self, n: int, size: int = 64, seed: int = 0):
        self.n, self.size, self.seed = n, size, seed

    def __len__(self) -> int:
        return self.n

    def source(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Image uint8 [S, S, 3] RGB; pose float32 [17, 3] of (x, y, 1) in JOINTS order, [0, 1] inside the frame."""
        if not 0 <= i < self.n:
            raise IndexError(f"figure {i}: there are {self.n}, numbered from 0")
        figure, pixels = self._draw(i), SUPERSAMPLE * self.size
        joints = [figure.points[name] for name in keypoints.JOINTS]
        pose = np.array([(x / pixels, y / pixels, 1) for x, y, _ in joints], np.float32)
        return np.array(figure.image.reduce(SUPERSAMPLE)), pose

    def _draw(self, i: int) -> _Figure:
        rng, pixels = random.Random(f"{self.seed}/{i}"), SUPERSAMPLE * self.size
        palette = rng.choice(PALETTES)
        figure = _Figure(rng, palette, pixels)
        shadow = figure.points["shadow"]
        _draw_backdrop(figure, rng, palette, min(0.97, max(0.45, shadow[1] / pixels - rng.uniform(0.03, 0.2))))
        for wide, dark in ((0.3, 0.92), (0.22, 0.82)):
            w = wide * figure.scale
            figure.disc(shadow, w * (1 - figure.pose.lift), _shade(palette[0][3], dark), 0.24 * w)
        figure.draw()
        return figure


# --------------------------------------------------------------------------------------------- batches

@lru_cache(maxsize=8)
def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """The numbers 0..n-1 in the order of this epoch."""
    return np.random.default_rng((ORDER_STREAM, seed, epoch)).permutation(n)


def step_indices(n: int, batch_size: int, seed: int, k: int) -> np.ndarray:
    """Indices [B] of step k: position p = k B + j of an endless row of shuffled epochs, a function of (seed, k)."""
    positions = k * batch_size + np.arange(batch_size)
    return np.array([permutation(n, seed, int(p // n))[p % n] for p in positions])


class Steps(Dataset):
    """Step k as one item: a DataLoader over range(start, stop) then has no state to save.

    With a seed: shuffled epochs, a broken picture gives way to the next one. Without: pictures in order, broken ones
    dropped. An item is (images uint8 [B, S, S, 3], poses [B, 17, 3], indices [B], {file: reason} of the broken).
    """

    def __init__(self, ds: Pictures, batch_size: int, seed: int | None = None, zoom: tuple | None = None,
                 places: slice = slice(None)):          # of the batch: those that this process makes
        self.ds, self.batch_size, self.seed, self.zoom, self.places = ds, batch_size, seed, zoom, places

    def __getitem__(self, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, str]]:
        n, images, poses, indices, broken = len(self.ds), [], [], [], {}
        if self.seed is None:
            wanted, tries = range(k * self.batch_size, min(n, (k + 1) * self.batch_size)), 1
        else:
            wanted, tries = step_indices(n, self.batch_size, self.seed, k).tolist(), n
        most = self.ds.base.limit * self.ds.base.total
        for j, first in list(enumerate(wanted))[self.places]:
            for i in ((first + shift) % n for shift in range(tries)):
                if len(broken) > most:          # note_broken will stop the run
                    break
                if self.ds.name(i) in broken:
                    continue
                try:
                    image, pose = self._load(i, k, j)
                except DataError as error:
                    broken[self.ds.name(i)] = str(error)
                    continue
                images.append(image), poses.append(pose), indices.append(i)
                break
        S = self.ds.size
        images = np.array(images, np.uint8).reshape(-1, S, S, 3)
        poses = np.array(poses, np.float32).reshape(-1, *NO_POSE.shape)
        return torch.from_numpy(images), torch.from_numpy(poses), torch.tensor(indices), broken

    def _load(self, i: int, k: int, j: int) -> tuple[np.ndarray, np.ndarray]:
        if self.zoom is None:
            return self.ds[i]
        rng = np.random.default_rng((AUGMENT_STREAM, self.seed, k, j))
        return to_square(*self.ds.source(i), self.ds.size, rng, self.zoom, flip=True)


SIGCHLD = getattr(signal, "SIGCHLD", None)          # Windows has none


class WorkerDied(DataError):
    """A process that loads pictures is gone."""


def fetch(loader: DataLoader) -> Iterator:
    """The loader's items; a worker process that dies is a WorkerDied."""
    before = signal.getsignal(SIGCHLD) if SIGCHLD else None
    items = iter(loader)
    # At a worker's death torch's handler raises wherever this process just is, in the middle of a training step most
    # often. Without it, next() finds out within seconds.
    if SIGCHLD and signal.getsignal(SIGCHLD) is not before:
        signal.signal(SIGCHLD, before)
    while True:
        try:
            item = next(items, None)
        except (RuntimeError, ConnectionError, EOFError) as error:      # the last two where it died handing over
            if isinstance(error, RuntimeError) and not re.match("DataLoader worker|Pin memory thread", str(error)):
                raise
            raise WorkerDied("a process that loads pictures died, most often for want of memory or of /dev/shm; "
                             f"try fewer workers, or none ({(str(error) or repr(error)).splitlines()[0]})") from error
        if item is None:
            return
        yield item


def load(steps: Steps, ks: range, workers: int, device: str | torch.device) -> Iterator:
    """The items of steps, made by `workers` processes (0: by this one), broken pictures counted in this process.

    Should one of them die, new ones go on at the step that is due; DataError where they die before they make it.
    """
    pin = torch.device(device).type == "cuda"
    done = 0
    while True:
        begun = done
        # A generator of its own: DataLoader would otherwise draw from, and so move, the global one.
        loader = DataLoader(steps, batch_size=None, sampler=ks[done:], num_workers=workers, pin_memory=pin,
                            generator=torch.Generator())
        try:
            for images, poses, indices, broken in fetch(loader):
                note_broken(steps.ds, broken)
                done += 1
                yield images.to(device, non_blocking=pin), poses.to(device, non_blocking=pin), indices
            return
        except WorkerDied as error:
            if done == begun:
                raise
            tqdm.write(f"{error}; new ones go on from batch {ks[done]}", file=sys.stderr)


def find_workers(device: str | torch.device) -> int:
    """How many processes load for a training on `device`: on a CPU it needs all cores itself, and small datasets are
    remembered in RAM after one epoch."""
    return min(8, os.cpu_count() or 1) if torch.device(device).type == "cuda" else 0


def share(batch_size: int, rank: int, world: int) -> slice:
    """The places in a batch of `batch_size` that process `rank` of `world` takes: one run after the other."""
    if batch_size % world:
        raise DataError(f"a batch of {batch_size} cannot be shared out among {world} processes; give a --batch-size "
                        f"that {world} divides")
    return slice(rank * batch_size // world, (rank + 1) * batch_size // world)


def batches(
    ds: Pictures,
    batch_size: int,
    seed: int,
    start: int,                         # the first step; the steps before it cost nothing
    stop: int,                          # one past the last
    workers: int = 0,                   # processes that load; the batches are the same for any number
    augment: bool = False,              # random crop and mirror, else the centre crop
    zoom: tuple[float, float] = ZOOM,   # range of the random crop; never so far that the crop would be blown up
    device: str | torch.device = "cpu",
    rank: int = 0,                      # of several processes that share each batch, this one
    world: int = 1,                     # how many they are; it divides batch_size, which is that of all together
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yields (images [B/world, 3, S, S] in [-1, 1], poses [B/world, 17, 3], indices [B/world]) for steps start..stop-1.

    Step k depends on (seed, k) alone: order, crop and mirror are drawn from it, so a resumed run repeats the
    uninterrupted one, and the shares of all ranks together are the batch that one process would make. Raises DataError
    once more than 1 % of the pictures turn out broken.
    """
    steps = Steps(ds, batch_size, seed, zoom if augment else None, share(batch_size, rank, world))
    for images, poses, indices in load(steps, range(start, stop), workers, device):
        yield to_tensor(images), poses, indices     # bytes cross the processes and the bus, floats are made here


# ------------------------------------------------------------------------------------- what --data means

FIGURES_TRAIN, FIGURES_VAL = 10_000, 512            # how many procedural figures, where the person does not say


def is_folder(spec: str) -> bool:
    """Is --data a person's own pictures, rather than procedural figures?"""
    return spec != "figures" and not spec.startswith("figures:")


def open_all(spec: str, size: int, poseless: bool = False) -> Pictures:
    """Every picture that `spec` names: figures, figures:N, or what PoseFolder takes."""
    if is_folder(spec):
        return PoseFolder(spec, size, poseless)
    count = spec.partition(":")[2] or str(FIGURES_TRAIN)
    if not count.isdecimal() or int(count) < 1:
        raise DataError(f"{spec}: after figures: comes a number of pictures, such as figures:10000")
    return Figures(int(count), size, seed=0)


def open_data(spec: str, size: int, val: str | None = None, remember: bool = True) -> tuple[Pictures, Pictures]:
    """(training pictures, held-out pictures) for the flags --data and --val.

    `spec` is figures, figures:N, or what PoseFolder takes; held out are other figures, `val`, or a tenth of the groups.
    `remember` keeps decoded training pictures in RAM. ValueError says in one sentence what is wrong.
    """
    train = open_all(spec, size)
    if not is_folder(spec):
        if val:
            raise DataError(f"--val {val}: procedural figures have held-out figures of their own; leave --val out")
        held_out = Figures(min(len(train), FIGURES_VAL), size, seed=1)
    elif val:
        held_out = PoseFolder(val, size)
    else:
        train, held_out = split(train)
    return (InMemory(train) if remember else train), held_out


def remember_all(ds: Pictures) -> None:
    """Draws all figures of an InMemory now, with a bar, so that no training step waits for them."""
    if isinstance(ds, InMemory) and isinstance(ds.ds, Figures):
        fit = min(len(ds), ds.free // (3 * ds.size ** 2))
        for i in tqdm(range(fit), desc="drawing figures", unit="img", dynamic_ncols=True):
            ds.source(i)


def evenly(n: int, limit: int) -> np.ndarray:
    """At most `limit` of the numbers 0..n-1, ascending, from the first to the last, evenly spread."""
    return np.linspace(0, n - 1, min(n, limit)).round().astype(int)


def spread(ds: Pictures, limit: int) -> Pictures:
    """At most `limit` pictures of ds, evenly over it."""
    return ds if limit >= len(ds) else Part(ds, evenly(len(ds), limit).tolist())


def numbered(ds: Pictures, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Batches (images [B, 3, S, S] in [-1, 1], poses [B, 17, 3], indices [B]) of all sound pictures, in order."""
    for images, poses, indices in load(Steps(ds, batch_size), range(-(-len(ds) // batch_size)), 0, "cpu"):
        if len(images):
            yield to_tensor(images), poses, indices


def in_order(ds: Pictures, batch_size: int, limit: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches (images [B, 3, S, S] in [-1, 1], poses [B, 17, 3]) of at most `limit` pictures, spread evenly over ds."""
    for images, poses, _ in numbered(spread(ds, limit), batch_size):
        yield images, poses


# --------------------------------------------------------------------------------------------- latents

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


# ----------------------------------------------------------------------------------------------- check

# a picture -> its row of RECORD, in worker processes -> finders, each over all rows -> Suspects and numbers -> files
#
# A suspect is something to look at, not an error: handstands exist, and people seen from behind. Limits are set so that
# clean data (the figures, game renders, photos) has next to none.

THUMB = 16                      # side of the thumbnail by which two pictures are found to be the same
RECORD = np.dtype([             # what is kept of a picture, half a kilobyte
    ("sound", "?"),
    ("size", "i4", 2),                          # width, height
    ("inner", "i4", 4),                         # x0, y0, x1, y1 of what lies between letterbox bars
    ("hash", "u8", 2),                          # of the picture and of its mirror image
    ("thumb", "u1", (THUMB, THUMB)),            # grey
    ("pose", "f4", (len(keypoints.JOINTS), 3)),
])
CHUNK = 16                      # pictures a worker process does at a time
BAR_NOISE = 16                  # a channel may be so far from the bar's colour: JPEG rings
BAR_STRAY = 0.02                # this share of a line of a bar may be further, or it is no bar
BAR_EDGE = 0.8                  # this share of the line behind a bar is further; of game renders on grey, below 0.7
BAR_LEAST = 0.01                # narrower bars, as a share of the side, do no harm
HASH_STEP = 2                   # grey levels: less is noise, not a gradient
HASH_BITS = 3                   # two pictures that are the same differ in so many of 64 bits at most
BANDS = HASH_BITS + 1           # so at least one of so many parts of the hash is equal
WINDOW = 256                    # pictures with one part in common: each is compared with so many of like brightness
SAME_CELL, SAME_MEAN = 12, 2    # grey levels between the thumbnails of one picture saved twice: at most, on average
LEAST_LIMBS = 4                 # joints of fewer limbs tell nothing about a person's size
LONG_LIMB = 2.2                 # times its usual length: figures reach 1.90, game renders 1.55
SHOW_LIMB = 50                  # people who do, before any is too long; of 16 figures 1 set in 12 had a false one
OUT_OF_DOUBT = 0.5              # of a usual width: less may be a body seen from the side
FEWEST = 10                     # people, before anything is said about all of them
FACING_LEAST = 0.35             # the share of people who face the viewer; figures 0.7, game renders 0.85
CENTRE_LINES = {f"{name}s": [keypoints.JOINTS.index(f"{name}_{side}") for side in SIDES]
                for name in ("eye", "ear", "shoulder", "hip")}
KINDS = {                       # worst first: what is printed of each
    "broken": "cannot be used",
    "orphan": "keypoint files without a picture, or pictures that no COCO json names",
    "leak": "held-out pictures are also in the training set",
    "point": "poses whose joints lie in one point",
    "outside": "poses mostly outside their picture",
    "limb": "poses with a limb far too long",
    "axes": "poses in which row and column look exchanged",
    "sides": "poses whose left and right contradict each other",
    "head down": "poses with the hips above the shoulders",
    "copy": "pictures that the training set has already",
    "bars": "pictures with letterbox bars; --trim NEWDIR cuts them off",
}
SHOWN, ACROSS = 12, 6           # suspects in the overview, pictures in one of its rows
DENSITY = 10_000                # skeletons in it: more would look the same


class Suspect(NamedTuple):
    """Something to look at."""
    kind: str                   # one of KINDS
    score: float                # the higher the worse, within its kind
    file: str
    why: str                    # one sentence
    index: int | None = None    # of the picture, if it can be shown


class Checked(NamedTuple):
    """All that the finders look at: the datasets, and what their pictures told."""
    train: Pictures
    val: Pictures | None        # the folder given with --val, its pictures numbered after those of train
    files: list[str]            # picture i
    held: np.ndarray            # bool [N]: not trained on
    rows: np.ndarray            # RECORD [N]
    broken: dict[str, str]      # file -> why


# What is taken from one picture.

def find_bars(pixels: np.ndarray) -> tuple[int, int, int, int]:
    """uint8 [H, W, 3] -> (x0, y0, x1, y1) between the letterbox bars, the whole picture where it has none.

    Bars are of one colour, come in pairs of about the same width and end in a straight line: right behind it, nearly
    all pixels differ. A flat background ends where somebody stands, one pixel here and another there.
    """
    H, W = pixels.shape[:2]
    for outermost in (pixels[0], pixels[:, 0]):         # one of the two is part of a bar, if there are any
        colour = np.median(outermost, axis=0).astype(np.uint8)
        if _differs(outermost, colour).mean() <= BAR_STRAY:
            break
    else:
        return 0, 0, W, H
    ink = _differs(pixels, colour)                                                  # [H, W]
    (x0, x1), (y0, y1) = (_pair_of_bars(ink.mean(axis) > BAR_STRAY) for axis in (0, 1))
    part = ink[y0:y1, x0:x1]
    edges = [_sharp_edge(lines, n) if at not in (0, n) else 0 for lines, at, n in (
        (part.T, x0, W), (part, y0, H), (part.T[::-1], x1, W), (part[::-1], y1, H))]
    return (0, 0, W, H) if None in edges else (x0 + edges[0], y0 + edges[1], x1 - edges[2], y1 - edges[3])


def _differs(pixels: np.ndarray, colour: np.ndarray) -> np.ndarray:
    apart = np.maximum(pixels, colour) - np.minimum(pixels, colour)
    return np.maximum(np.maximum(apart[..., 0], apart[..., 1]), apart[..., 2]) > BAR_NOISE          # 5 x as .max(-1)


def _pair_of_bars(content: np.ndarray) -> tuple[int, int]:
    """bool [n], is there something in a line? -> first and one past the last between two bars; (0, n) without them."""
    n, lines = len(content), np.flatnonzero(content)
    thin, thick = sorted((lines[0], n - 1 - lines[-1])) if len(lines) else (0, 0)
    if thin < max(BAR_LEAST * n, 2) or thick > 2 * thin:
        return 0, n
    return int(lines[0]), int(lines[-1]) + 1


def _sharp_edge(lines: np.ndarray, n: int) -> int | None:
    """How many of the lines inside a bar belong to its edge, soft after scaling and JPEG; None where it is no edge."""
    full = lines[:min(1 + n // 32, 9)].mean(1) >= BAR_EDGE
    return int(full.argmax()) if full.any() else None


def difference_hash(grey: Image.Image) -> tuple[int, int]:
    """64 bits of a grey picture and 64 of its mirror image: is each of 8 x 9 cells darker than its right neighbour?

    (Neal Krawetz's dHash, hackerfactor.com 2013, with a least step so that flat places do not give random bits.)
    """
    cells = np.asarray(grey.resize((9, 8), Image.Resampling.BOX), np.int16)
    bits = [side[:, 1:] > side[:, :-1] + HASH_STEP for side in (cells, cells[:, ::-1])]
    return tuple(int.from_bytes(np.packbits(b).tobytes(), "little") for b in bits)


class Examination(Dataset):
    """Item k: RECORD [CHUNK] of the pictures from k CHUNK on, and {number: why} of those that cannot be used."""

    def __init__(self, ds: Pictures):
        self.ds = ds

    def __len__(self) -> int:
        return -(-len(self.ds) // CHUNK)

    def __getitem__(self, k: int) -> tuple[np.ndarray, dict[int, str]]:
        numbers = range(k * CHUNK, min(len(self.ds), (k + 1) * CHUNK))
        rows, broken = np.zeros(len(numbers), RECORD), {}
        for row, i in zip(rows, numbers, strict=True):
            try:
                image, row["pose"] = whole(self.ds, i)
            except DataError as error:
                broken[i] = str(error)
                continue
            grey = image.convert("L")
            row["sound"], row["size"], row["inner"] = True, image.size, find_bars(np.asarray(image))
            row["hash"], row["thumb"] = difference_hash(grey), grey.resize((THUMB, THUMB), Image.Resampling.BOX)
        return rows, broken


def whole(ds: Pictures, i: int) -> tuple[Image.Image, np.ndarray]:
    """Picture i with all its pixels, a large JPEG too, and its pose."""
    if isinstance(ds, PoseFolder):
        return read_picture(ds.paths[i]), ds.pose(i)
    image, pose = ds.source(i)
    return Image.fromarray(image), pose


def _unchanged(item):
    return item


def examine(ds: Pictures, workers: int) -> tuple[np.ndarray, dict[int, str]]:
    """RECORD [N] of ds, the same for any number of processes, and {number: why} of the pictures that are broken."""
    loader = DataLoader(Examination(ds), batch_size=None, num_workers=workers, collate_fn=_unchanged,
                        generator=torch.Generator())
    rows, broken, done = np.zeros(len(ds), RECORD), {}, 0
    with tqdm(total=len(ds), desc="checking", unit="img", dynamic_ncols=True, disable=None) as bar:
        for some, why in fetch(loader):
            rows[done:done + len(some)] = some
            broken |= why
            done += len(some)
            bar.update(len(some))
    return rows, broken


# The same picture twice.

def find_copies(hashes: np.ndarray, thumbs: np.ndarray) -> np.ndarray:
    """uint64 [N, 2], uint8 [N, 16, 16] -> int [N]: the first picture of i's group, in which each has a copy.

    A group may be a chain: the last frame of a fade is in the group of the first and looks nothing like it. The hash
    is cut into BANDS parts; copies agree in one at least. Pictures are sorted by a part and by brightness, and each is
    compared with the next WINDOW that have the part in common: near-linear, however many there are. Only where more
    than WINDOW different pictures share a part (flat backgrounds) can a copy be overlooked. A picture saved again, as
    JPEG or in another size, is a copy; one that was cropped or moved by a hundredth is not.
    """
    N = len(hashes)
    if not N:
        return np.arange(0)
    thumbs = thumbs.reshape(N, -1)
    exact = np.concatenate([hashes.view(np.uint8).reshape(N, -1), thumbs], 1)
    _, first, where = np.unique(exact.view(f"V{exact.shape[1]}").ravel(), return_index=True, return_inverse=True)
    keep = np.sort(first)                                           # one of each: thousands of equal ones cost nothing
    M, root = len(keep), np.arange(len(keep))
    code, level = hashes[keep].T.ravel(), thumbs[keep].mean(1)      # [2M]: the pictures, then their mirror images
    cells = thumbs[keep].reshape(M, THUMB, THUMB)
    cells = np.concatenate([cells, cells[..., ::-1]])
    ends = np.concatenate([f(axis=k) for f in (cells.min, cells.max) for k in (1, 2)], 1)   # apart no more than cells
    bits = np.unpackbits(code[:, None].view(np.uint8), axis=1)      # [2M, 64]
    bar = tqdm(total=BANDS * WINDOW, desc="comparing", unit="lag", dynamic_ncols=True, disable=None, delay=1)
    for band in range(BANDS):                                       # every 4th bit: a part sees all of the picture
        part = np.packbits(bits[:, band::BANDS], axis=1).view(np.uint16).ravel()
        order = np.lexsort((np.concatenate([level, level]), part))
        part, bright, at = part[order], level[order % M], np.arange(2 * M)
        for step in range(1, WINDOW + 1):
            at = at[:np.searchsorted(at, 2 * M - step)]
            at = at[part[at] == part[at + step]]
            at = at[bright[at + step] - bright[at] <= SAME_MEAN]    # ascending: what is further away differs more
            if not len(at):
                break
            bar.update()
            a, b = order[at], order[at + step]
            near = np.bitwise_count(code[a] ^ code[b]) <= HASH_BITS
            near &= (a < M) | (b < M)
            near[near] = root[a[near] % M] != root[b[near] % M]
            p, q = ends[a[near]], ends[b[near]]
            near[near] = (np.maximum(p, q) - np.minimum(p, q)).max(1) <= SAME_CELL
            a, b = a[near], b[near]
            for s in range(0, len(a), 4096):
                i, j = a[s:s + 4096], b[s:s + 4096]
                same = _look_alike(thumbs[keep[i % M]], thumbs[keep[j % M]], (i < M) != (j < M))
                _join(root, i[same] % M, j[same] % M)
        bar.update((band + 1) * WINDOW - bar.n)
    bar.close()
    return keep[root[np.searchsorted(keep, first)]][where.ravel()]


def _look_alike(a: np.ndarray, b: np.ndarray, mirrored: np.ndarray) -> np.ndarray:
    """bool [n] of thumbnails uint8 [n, 256]: is a the same picture as b, or as its mirror image where `mirrored`?"""
    b = b.reshape(-1, THUMB, THUMB)
    b = np.where(mirrored[:, None, None], b[..., ::-1], b).reshape(a.shape)
    apart = np.maximum(a, b) - np.minimum(a, b)
    return (apart.max(1) <= SAME_CELL) & (apart.mean(1) <= SAME_MEAN)


def _join(root: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
    """Makes the groups of a[j] and b[j] one, for all j; root[i] is the smallest number of i's group."""
    while (root[a] != root[b]).any():
        low, high = np.minimum(root[a], root[b]), np.maximum(root[a], root[b])
        np.minimum.at(root, high, low)
        while (root[root] != root).any():
            root[:] = root[root]


def copies(checked: Checked) -> list[Suspect]:
    """Pictures that are there twice: across training and validation, where they leak, and among those trained on.

    Each is named with the first picture of its group that it looks like itself, sought among WINDOW of like brightness.
    """
    numbers = np.flatnonzero(checked.rows["sound"])
    rows, held = checked.rows[numbers], checked.held[numbers]
    thumbs, root = rows["thumb"].reshape(len(rows), THUMB ** 2), find_copies(rows["hash"], rows["thumb"])
    members: dict[int, list[int]] = {}
    sizes, level = np.bincount(root, minlength=len(root)), thumbs.mean(1)
    for i in np.flatnonzero(sizes[root] > 1).tolist():
        members.setdefault(int(root[i]), []).append(i)
    same: dict[int, tuple[int, bool]] = {}              # picture -> one that is trained on, mirrored?
    for group in members.values():
        trained = np.array([i for i in group if not held[i]], int)
        bright = trained[np.argsort(level[trained], kind="stable")]
        starts = np.maximum(np.searchsorted(level[bright], level[group]) - WINDOW // 2, 0)
        for i, at in zip(group, starts.tolist(), strict=True):
            for others in (trained[:1], np.sort(bright[at:at + WINDOW])):           # nearly always the first will do
                others = others[(others < i) | held[i]]
                plain, mirrored = (_look_alike(thumbs[[i] * len(others)], thumbs[others], np.full(len(others), m))
                                   for m in (False, True))
                if (plain | mirrored).any():
                    k = (plain | mirrored).argmax()
                    same[i] = int(others[k]), not plain[k]
                    break
    times = np.bincount([j for i, (j, _) in same.items() if not held[i]], minlength=len(rows)) + 1
    found = []
    for i, (j, mirrored) in same.items():
        other = f"{checked.files[numbers[j]]}{', mirrored' if mirrored else ''}"
        kind, why = (("leak", f"held out, but the same picture as {other}, which is trained on") if held[i]
                     else ("copy", f"the same picture as {other} ({times[j]} of it)"))
        found.append(Suspect(kind, int(times[j]), checked.files[numbers[i]], why, int(numbers[i])))
    return found


# What is implausible about a pose.

class Bodies(NamedTuple):
    """N poses in the person's own size, so that children, close-ups and chibis compare; NaN: joints are missing."""
    limbs: np.ndarray           # [N, 16] length of each of keypoints.LIMBS over its usual length
    torso: np.ndarray           # [N, 2] from the shoulders to the hips, in pixels
    facing: np.ndarray          # [N, 4] of CENTRE_LINES: signed width, 1 as wide as usual, negative seen from behind


def _quantile(x: np.ndarray, q: float, axis: int) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)             # a slice that is all NaN is NaN
        return np.nanquantile(x, q, axis=axis) if x.size else np.full(x.shape[1 - axis], np.nan)


def measure(rows: np.ndarray) -> Bodies:
    """RECORD [N] -> Bodies. Foreshortening only ever shortens, so a person is as large as the longer limbs say."""
    pose = rows["pose"].astype(np.float64)
    xy = np.where(pose[..., 2:] > 0, pose[..., :2] * rows["size"][:, None], np.nan)                 # [N, 17, 2] pixels
    a, b = np.array(keypoints.LIMBS).T
    length = np.linalg.norm(xy[:, a] - xy[:, b], axis=-1)                                           # [N, 16]
    size = _positive(_quantile(length, 0.75, 1))                    # a first guess, by the long limbs
    usual = _positive(_quantile(length / size[:, None], 0.5, 0))
    size = _positive(_quantile(length / usual, 0.75, 1))
    size[np.isfinite(length).sum(1) < LEAST_LIMBS] = np.nan
    hips, shoulders = (xy[:, CENTRE_LINES[name]].mean(1) for name in ("hips", "shoulders"))
    torso = hips - shoulders
    neck = shoulders - xy[:, keypoints.JOINTS.index("nose")]        # where the hips are out of the picture
    down = np.where(np.isnan(torso), neck, torso)
    down = down / _positive(np.linalg.norm(down, axis=1, keepdims=True))
    wide = np.stack([xy[:, left] - xy[:, right] for left, right in CENTRE_LINES.values()], 1)       # [N, 4, 2]
    facing = (wide[..., 0] * down[:, None, 1] - wide[..., 1] * down[:, None, 0]) / size[:, None]
    return Bodies(length / size[:, None] / usual, torso, facing / _positive(_quantile(np.abs(facing), 0.5, 0)))


def _positive(x: np.ndarray) -> np.ndarray:
    """x, with NaN for what nothing can be divided by."""
    return np.where(x > 0, x, np.nan)


def odd_poses(checked: Checked) -> tuple[list[Suspect], dict[str, str], dict]:
    """(suspects, verdicts on the whole dataset, numbers) about the poses."""
    numbers = np.flatnonzero(checked.rows["sound"])
    rows = checked.rows[numbers]
    body, found = measure(rows), []

    def suspect(kind: str, scores: np.ndarray, least: float, why: Callable[[int], str]) -> None:
        """Those whose score is above `least`."""
        with np.errstate(invalid="ignore"):
            for i in np.flatnonzero(scores > least).tolist():
                found.append(Suspect(kind, float(scores[i]), checked.files[numbers[i]], why(i), int(numbers[i])))

    seen, outside = visible(rows["pose"])
    suspect("outside", outside.sum(1) / np.maximum(seen.sum(1), 1), 0.5,
            lambda i: f"{outside[i].sum()} of {seen[i].sum()} joints lie outside the picture")
    together = ((rows["pose"][:, :, None, :2] == rows["pose"][:, None, :, :2]).all(-1) & seen[:, None]).sum(-1) * seen
    suspect("point", together.max(1, initial=0), 2,
            lambda i: f"{together[i].max()} joints lie in one point, "
                      f"({', '.join(f'{x:.2f}' for x in rows['pose'][i, together[i].argmax(), :2])}) of the picture")
    limbs = np.nan_to_num(body.limbs) * (np.isfinite(body.limbs).sum(0) >= SHOW_LIMB)
    suspect("limb", limbs.max(1, initial=0), LONG_LIMB,
            lambda i: "from {} to {} it is {:.1f} times as far as usual for a person of this size".format(
                *(keypoints.JOINTS[j] for j in keypoints.LIMBS[limbs[i].argmax()]), limbs[i].max()))
    verdicts, about = judge(body)
    dx, dy, facing = *body.torso.T, _quantile(body.facing, 0.5, 1)
    if "axes" in verdicts:
        suspect("axes", dy / (np.abs(dx) + 1e-9), 2, lambda i: "it stands upright, unlike most of this dataset")
    else:
        # The exchange lays a person down, the head to the left, and mirrors it. People who really lie do so both ways,
        # so only where many more lie this way are those suspects, too, that would not face the viewer.
        left, right = (sign * dx > 2 * np.abs(dy) for sign in (1, -1))
        many = left.sum() > 3 * (right.sum() + 1)
        suspect("axes", left * np.where(many, 1.0, -np.nan_to_num(facing)), OUT_OF_DOUBT,
                lambda i: "it lies with the head to the left, and would stand with row and column exchanged")
        if "upright" not in verdicts:
            suspect("head down", -dy / (np.abs(dx) + 1e-9), 0.5, lambda i: "the hips are above the shoulders")
    sides = np.nan_to_num(body.facing)
    suspect("sides", np.minimum(sides.max(1, initial=0), -sides.min(1, initial=0)), OUT_OF_DOUBT,
            lambda i: "by the {} it faces the viewer, by the {} it looks away".format(
                *(list(CENTRE_LINES)[j] for j in (sides[i].argmax(), sides[i].argmin()))))
    about["joints"] = {name: {"missing": int((~seen[:, j]).sum()), "outside": int(outside[:, j].sum())}
                       for j, name in enumerate(keypoints.JOINTS)}
    return found, verdicts, about


def visible(poses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[N, 17, 3] -> bool [N, 17] twice: the joints that are not missing, and those of them outside the picture."""
    seen = poses[..., 2] > 0
    return seen, seen & ~keypoints.on_canvas(poses)


def judge(body: Bodies) -> tuple[dict[str, str], dict]:
    """What is wrong with most poses, as {"axes", "upright" or "sides": sentence}, and the shares that this rests on."""
    torso, verdicts = body.torso[np.isfinite(body.torso).all(1)], {}
    facing = _quantile(body.facing, 0.5, 1)
    facing = facing[np.abs(np.nan_to_num(facing)) > OUT_OF_DOUBT]
    dx, dy = torso.T
    lying, down, toward = (float(x.mean()) if len(x) else None for x in (np.abs(dx) > np.abs(dy), dy < 0, facing > 0))
    if len(torso) >= FEWEST and lying > 0.5:
        verdicts["axes"] = (f"rows and columns look exchanged: from shoulders to hips, {lying:.0%} of {len(torso)} "
                            f"people lie rather than stand, {(dx > 0).mean():.0%} with the head to the left")
    elif len(torso) >= FEWEST and down > 0.5:
        verdicts["upright"] = (f"up and down look exchanged: {down:.0%} of {len(torso)} people have the hips above the "
                               "shoulders; y is measured from the top")
    if len(facing) >= FEWEST and (likely := 1 - toward if verdicts else toward) < FACING_LEAST:    # those mirror, too
        verdicts["sides"] = (f"left and right look exchanged: only {likely:.0%} of {len(facing)} people face the "
                             "viewer, if left is the person's own")
    return verdicts, {"torsos": len(torso), "torsos_lying": lying, "torsos_head_down": down,
                      "turned_to_a_side": len(facing), "facing_the_viewer": toward}


# Files without a partner, and what cannot be used.

def orphans(*datasets: Pictures | None) -> list[Suspect]:
    """Keypoint files without a picture in images/, and pictures beside those of a COCO json that none of them names."""
    folders, found = [ds for ds in datasets if isinstance(ds, PoseFolder)], []
    named = {os.path.abspath(path) for ds in folders for path in (*ds.paths, *ds.broken, *ds.skipped)}
    for ds in folders:
        if ds.coco:
            why = f"it lies among the pictures of {ds.coco[0]}, which does not name it"
            beside = {os.path.dirname(path) for path in ds.paths}
            found += [Suspect("orphan", 0, os.path.join(at, name), why) for at in beside for name in os.listdir(at)
                      if os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith(".")
                      and os.path.abspath(os.path.join(at, name)) not in named]
        elif not ds.list:
            known = {os.path.splitext(os.path.relpath(path, ds.root / "images"))[0] for path in (*ds.paths, *ds.broken)}
            files = [os.path.relpath(os.path.join(at, name), ds.root / "keypoints")
                     for at, _, names in os.walk(ds.root / "keypoints") for name in names
                     if name.endswith(".json") and not name.startswith(".")]
            found += [Suspect("orphan", 0, str(ds.root / "keypoints" / file), "no picture of this name lies in images/")
                      for file in files if os.path.splitext(file)[0] not in known]
    return found


def barred(checked: Checked) -> list[Suspect]:
    """Pictures with letterbox bars, those that lose the most to them being the worst."""
    found = []
    for i in np.flatnonzero(checked.rows["sound"]).tolist():
        (W, H), (x0, y0, x1, y1) = (checked.rows[key][i].tolist() for key in ("size", "inner"))
        if (x0, y0, x1, y1) != (0, 0, W, H):
            sides = [f"{n} at the {side}" for n, side in ((x0, "left"), (W - x1, "right"), (y0, "top"),
                                                          (H - y1, "bottom")) if n]
            found.append(Suspect("bars", 1 - (x1 - x0) * (y1 - y0) / (W * H), checked.files[i],
                                 f"of {W} x {H} pixels, {', '.join(sides)} are of one colour", i))
    return found


# A copy without bars.

def trim(checked: Checked, target: Path) -> int:
    """Writes the sound pictures of checked.train into the new folder `target`, bars cut off picture and pose alike.

    The same layout under the same names, metadata.csv too; a picture without bars and its keypoint file are copied
    byte for byte. Returns how many were cut. Nothing is left behind where it is interrupted.
    """
    ds, made, cut, shared = checked.train, Path(f"{target}.partial"), {}, {}
    make_folder(made, f"--trim {target}")
    try:
        kept = np.flatnonzero(checked.rows["sound"][:len(ds)]).tolist()
        if not kept:
            raise DataError(f"--trim {target}: no picture is sound, so there is nothing to copy")
        lists = {}                                      # picture, and its name in the copy
        for i in tqdm(kept, desc="copying", unit="img", dynamic_ncols=True, disable=None):
            if ds.names[i] in lists:                    # a list may name a picture twice
                continue
            lists[ds.names[i]] = name = _name_in_copy(ds, i)
            image = made / name
            if leaves_folder(name) or image.exists():
                raise DataError(f"{ds.paths[i]}: there is no room for it in {target}, where {name} is another picture")
            image.parent.mkdir(parents=True, exist_ok=True)
            box = _cut_picture(ds.paths[i], image, checked.rows[i])
            if box:
                cut[ds.paths[i]] = box
            if isinstance(ds.poses[i], str):
                pose = made / keypoint_folder(os.path.dirname(name)) / f"{image.stem}.json"
                other, *before = shared.setdefault(pose, (ds.paths[i], ds.poses[i], box))
                if before != [ds.poses[i], box]:
                    raise DataError(f"{other} and {ds.paths[i]} would have one keypoint file in {target}, but not the "
                                    f"same pose or bars; rename one of them and its keypoints")
                pose.parent.mkdir(parents=True, exist_ok=True)
                _cut_seed_pose(ds.poses[i], pose, box)
        copy = made
        if ds.coco:
            copy = _cut_coco(ds, {ds.paths[i] for i in kept}, cut, made)
        elif ds.list:
            copy = made / ds.list.name
            copy.write_text("".join(f"{lists[ds.names[i]]}\n" for i in kept), "utf-8", "surrogateescape")
        if len(PoseFolder(copy, ds.size, limit=0)) != len(kept):        # or its own sentence
            raise DataError(f"--trim {target}: the copy does not have the {len(kept)} pictures that it should have")
        if (ds.root / "metadata.csv").is_file():
            shutil.copyfile(ds.root / "metadata.csv", made / "metadata.csv")
        if target.exists():
            target.rmdir()                              # it is empty
        made.rename(target)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return len(cut)


def _name_in_copy(ds: PoseFolder, i: int) -> str:
    """Where picture i goes: its name, or below images/ if that leaves the folder or has no keypoint folder."""
    name = ds.names[i]
    if leaves_folder(name) or isinstance(ds.poses[i], str) and not keypoint_folder(os.path.dirname(name)):
        return "images/" + re.sub(r"^(.*/)?images/|^(\.\./)+", "", name)
    return name


def _cut_picture(path: str, to: Path, row: np.ndarray) -> tuple[float, ...] | None:
    """Copies a picture, without its bars if it has any; returns the part that is left, (x0, y0, x1, y1) in 0..1."""
    (W, H), inner = row["size"].tolist(), tuple(row["inner"].tolist())
    if inner == (0, 0, W, H):
        shutil.copyfile(path, to)
        return None
    best = {"quality": 95, "subsampling": 0} if to.suffix.lower() in (".jpg", ".jpeg") else {"lossless": True}
    read_picture(path).crop(inner).save(to, **best)
    return inner[0] / W, inner[1] / H, inner[2] / W, inner[3] / H


def _cut_seed_pose(path: str, to: Path, box: tuple[float, ...] | None) -> None:
    """Copies a keypoint file; [row, col] are then those of the part `box` of the picture."""
    if not box:
        shutil.copyfile(path, to)
        return
    from formats import pose_files
    pose = keypoints.crop(pose_files.read_seed(path), box)[:, 1::-1] * keypoints.SEED_CANVAS        # [17, 2] row, col
    joints = dict(zip(keypoints.JOINTS, pose.tolist(), strict=True))
    to.write_text(json.dumps(pose_files.read_json(path) | joints))


def _cut_coco(ds: PoseFolder, kept: set[str], cut: dict[str, tuple[float, ...]], made: Path) -> Path:
    """Writes the COCO json of the pictures kept, and returns where."""
    path, folder = ds.coco
    from formats import pose_files
    told = pose_files.read_json(path, limit=None)
    files = {image["id"]: os.path.join(folder, image["file_name"]) for image in told["images"]}
    told["images"] = [image for image in told["images"] if files[image["id"]] in kept]
    told["annotations"] = [person for person in told["annotations"] if files.get(person.get("image_id")) in kept]
    edges = {}
    for image in told["images"]:
        if box := cut.get(files[image["id"]]):
            W, H = image["width"], image["height"]
            x0, y0, x1, y1 = edges[image["id"]] = box[0] * W, box[1] * H, box[2] * W, box[3] * H
            image["width"], image["height"] = round(x1 - x0), round(y1 - y0)
    for person in told["annotations"]:
        if person["image_id"] in edges:
            _cut_annotation(person, *edges[person["image_id"]])
    to = made / (path.relative_to(ds.root) if path.is_relative_to(ds.root) else path.name)
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(json.dumps(told))
    return to


def _cut_annotation(told: dict, x0: float, y0: float, x1: float, y1: float) -> None:
    """Moves an annotation into the part of its picture that is left; what cannot be moved is left out."""
    def joints(flat):
        return [value for x, y, v in zip(*(flat[k::3] for k in range(3)), strict=True)
                for value in ((x - x0, y - y0, v) if v else (0, 0, 0))]

    def box(xywh):
        x, y, w, h = xywh
        left, top = max(x, x0), max(y, y0)
        return [left - x0, top - y0, max(0, min(x + w, x1) - left), max(0, min(y + h, y1) - top)]

    def outlines(polygons):                             # not run lengths, which are those of the whole picture
        return [[value - (x0, y0)[k % 2] for k, value in enumerate(polygon)] for polygon in polygons]

    def area(pixels):                                   # as much of it as of the box
        return pixels * math.prod(told["bbox"][2:]) / math.prod(whole[2:])

    whole = told.get("bbox")
    for key, move in {"keypoints": joints, "bbox": box, "segmentation": outlines, "area": area}.items():
        try:
            if key in told:
                told[key] = move(told[key])
        except (TypeError, ValueError, LookupError, ArithmeticError):       # these fields nobody has looked at before
            del told[key]


# What is written and printed.

def framed(checked: Checked, i: int, side: int) -> np.ndarray:
    """Picture i of the datasets on a square, nothing cut off, its skeleton drawn over: uint8 [side, side, 3]."""
    n = len(checked.train)
    ds, i = (checked.train, i) if i < n else (checked.val, i - n)
    image, pose = whole(ds, i)
    return keypoints.draw(keypoints.fit(pose, image.size, "letterbox"), side,
                          np.asarray(ImageOps.pad(image, (side, side), Image.Resampling.BICUBIC, color="white")))


def worst(suspects: list[Suspect]) -> list[Suspect]:
    """At most SHOWN that can be shown: the worst of each kind, then the second worst, ..., in the order of KINDS."""
    rank: dict[str, int] = {}
    turns = []
    for suspect in suspects:
        if suspect.index is not None:
            rank[suspect.kind] = rank.get(suspect.kind, -1) + 1
            turns.append((rank[suspect.kind], suspect))
    turns = sorted(turns, key=lambda turn: turn[0])[:SHOWN]         # stable
    return sorted((suspect for _, suspect in turns), key=lambda suspect: list(KINDS).index(suspect.kind))


def draw_overview(path: Path, checked: Checked, suspects: list[Suspect], report: dict, side: int) -> None:
    """One picture: where the joints are, what is missing, the sizes; ordinary pictures; the worst suspects."""
    from matplotlib.figure import Figure  # without pyplot nothing is global, and no window can open

    rows = checked.rows[checked.rows["sound"]]
    ordinary = np.flatnonzero(checked.rows["sound"])[evenly(len(rows), ACROSS)]
    shown = worst(suspects)
    cells = [(i, Path(checked.files[i]).name, "dimgray") for i in ordinary]
    cells += [(None, "", "")] * (-len(cells) % ACROSS)
    cells += [(s.index, f"{s.kind}: {s.why}\n{Path(s.file).name}", "firebrick") for s in shown]
    lines = max(1, -(-len(cells) // ACROSS))
    page = Figure(figsize=(16, 5.2 + 3.5 * lines), layout="constrained")
    top, below = page.subfigures(2, 1, height_ratios=(5.2, 3.5 * lines))
    verdicts = "".join(f"\n{_plain(sentence, 150)}" for sentence in report["verdicts"].values())
    top.suptitle(f"{_plain(report['root'], 80)}: {len(rows)} pictures, {len(suspects)} suspects{verdicts}",
                 color="firebrick" if report["verdicts"] else "black", parse_math=False)
    where, joints, sizes = top.subplots(1, 3)
    _draw_density(where, rows["pose"])
    names, lacking = [name.replace("_", " ") for name in keypoints.JOINTS], list(report["joints"].values())
    missing, outside = ([joint[key] for joint in lacking] for key in ("missing", "outside"))
    if not any(missing + outside):
        joints.text(0.5, 0.5, "none is missing, none outside the picture", ha="center", transform=joints.transAxes)
    joints.barh(names, missing, color="silver")
    joints.barh(names, outside, left=missing, color="indianred")
    joints.set(title="joints missing (grey) and outside (red)", xlim=(0, max(1, *np.add(missing, outside))),
               xlabel="pictures")
    joints.invert_yaxis()
    short = report["short_side"]["histogram"]
    sizes.bar(list(short), list(short.values()), color="steelblue")
    sizes.set(title="short side", xlabel="pixels", ylabel="pictures", xlim=(-1, max(2, len(short))))
    axes = below.subplots(lines, ACROSS, squeeze=False).ravel()
    for ax in axes:
        ax.axis("off")
    for ax, (i, words, colour) in zip(axes, cells, strict=False):
        if i is not None:
            ax.imshow(framed(checked, i, side), interpolation="nearest" if side < 200 else None)
            text = "\n".join(line for part in words.split("\n") for line in textwrap.wrap(_plain(part, 150), 38))
            ax.set_title(text, fontsize=9, color=colour, parse_math=False, y=0, va="top", pad=-4)
    page.savefig(path, format="png", dpi=80)


def _plain(text: str, most: int) -> str:
    """What every font has, and not too long."""
    text = text.encode("ascii", "replace").decode()
    return text if len(text) <= most else f"{text[:most // 2 - 2]}...{text[-most // 2 + 2:]}"


def _draw_density(ax, poses: np.ndarray) -> None:
    """Skeletons [N, 17, 3] as a 2-D histogram of points along their limbs, the picture's border drawn in."""
    poses = poses[evenly(len(poses), DENSITY)]
    seen, _ = visible(poses)
    along, counts = np.linspace(0, 1, 24)[:, None], np.zeros((96, 96))
    for a, b in keypoints.LIMBS:
        ends = poses[seen[:, a] & seen[:, b]][:, [a, b], None, :2]                                      # [n, 2, 1, 2]
        x, y = (ends[:, 0] * (1 - along) + ends[:, 1] * along).reshape(-1, 2).T
        counts += np.histogram2d(y, x, bins=96, range=((-0.1, 1.1), (-0.1, 1.1)))[0]
    ax.imshow(np.sqrt(counts), cmap="magma", extent=(-0.1, 1.1, 1.1, -0.1), interpolation="bilinear")
    ax.plot((0, 1, 1, 0, 0), (0, 0, 1, 1, 0), color="white", lw=0.8)
    ax.set(title="where people are", xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))


def make_report(root: str, checked: Checked, suspects: list[Suspect], verdicts: dict, about: dict) -> dict:
    """Everything that is said of a dataset, in the types of JSON."""
    sound, both = checked.rows["sound"], [ds for ds in (checked.train, checked.val) if ds is not None]
    size = checked.rows["size"][sound]
    short = np.sort(size.min(1)) if len(size) else np.zeros(0, int)
    # Steps of a square root of 2: 64, 91, 128, 181, ...
    step = np.floor(2 * np.log2(np.maximum(short, 1)) + 1e-9).astype(int)
    histogram = {f"{2 ** (k / 2):.0f}+": int((step == k).sum()) for k in range(step.min(), step.max() + 1)} \
        if len(short) else {}
    return {
        "root": root, "verdicts": verdicts,
        "pictures": {"found": sum(ds.total for ds in both),
                     "sound": int(sound.sum()), "broken": len(checked.broken),
                     "without_a_person": sum(len(ds.skipped) for ds in both),
                     "held_out": int((checked.held & sound).sum()),
                     "not_square": int((size[:, 0] != size[:, 1]).sum())},
        "short_side": {"min": int(short[0]), "median": int(short[len(short) // 2]), "max": int(short[-1]),
                       "histogram": histogram} if len(short) else {"histogram": {}},
        **about,
        "suspects_by_kind": {kind: sum(s.kind == kind for s in suspects) for kind in KINDS},
        "suspects": [{"kind": s.kind, "file": s.file, "why": s.why, "score": round(s.score, 4)} for s in suspects],
    }


def describe(report: dict) -> Iterator[str]:
    """The lines that are printed."""
    told, short, counts = report["pictures"], report["short_side"], report["suspects_by_kind"]
    n, joints = told["sound"], report["joints"].values()

    def percent(count: int, of: int) -> str:
        return f"{count} ({count / max(of, 1):.1%})"

    more = f", {told['without_a_person']} more without a person" if told["without_a_person"] else ""
    yield f"pictures    {told['found']} with a pose file, {n} sound, {told['broken']} broken{more}"
    if n:
        yield (f"short side  {short['min']} min, {short['median']} median, {short['max']} max pixels; "
               f"{told['not_square']} not square")
        missing, outside = (sum(joint[key] for joint in joints) for key in ("missing", "outside"))
        yield (f"joints      {n * len(joints)}, {percent(missing, n * len(joints))} missing, "
               f"{percent(outside, n * len(joints))} outside the picture")
        yield f"groups      {report['groups']}; {n - told['held_out']} to train on, {told['held_out']} held out"
        people = {"torsos_lying": "lie", "torsos_head_down": "are head down", "facing_the_viewer": "face the viewer"}
        yield "people      " + ", ".join(f"{report[key]:.1%} {what}" for key, what in people.items()
                                         if report[key] is not None)
    for kind, what in KINDS.items():
        if counts[kind]:
            yield f"{kind:<12}{percent(counts[kind], told['found'] if kind == 'broken' else n)} {what}"
            for suspect in [s for s in report["suspects"] if s["kind"] == kind][:3]:
                why = suspect["why"]
                yield f"  {why if suspect['file'] in why else '{}: {}'.format(suspect['file'], why)}"
    for sentence in report["verdicts"].values():
        yield f"LOOK        {sentence}"
    if not report["verdicts"]:
        odd = len({suspect["file"] for suspect in report["suspects"]})
        yield (f"{percent(odd, told['found'])} are to be looked at, in overview.png; nothing else was found" if odd else
               "all is well: nothing to look at was found")


def write_files(out: Path, checked: Checked, suspects: list[Suspect], report: dict, side: int) -> None:
    """report.json, suspects.txt and overview.png, each whole or not at all."""
    report_file, list_file, picture = (out / f"{name}.tmp" for name in ("report.json", "suspects.txt", "overview.png"))
    try:
        draw_overview(picture, checked, suspects, report, side)
        report_file.write_text(json.dumps(report, indent=1, allow_nan=False))
        lines = ("\t".join(re.sub(r"\s", " ", word) for word in (s.file, s.kind, s.why)) for s in suspects)
        list_file.write_text("".join(f"{line}\n" for line in lines), "utf-8", "surrogateescape")
        for file in (report_file, list_file, picture):
            file.replace(file.with_suffix(""))
    finally:
        for file in (report_file, list_file, picture):
            file.unlink(missing_ok=True)


def open_checked(args: argparse.Namespace) -> tuple[Pictures, Pictures | None]:
    """The datasets of the command line, or a sentence about what is wrong with a flag before any work is done."""
    for flag, value, least in (("--workers", args.workers, 0), ("--size", args.size, 8)):
        if value < least:
            raise DataError(f"{flag} {value}: at least {least} is needed")
    if not is_folder(args.root):
        if args.val or args.trim:
            raise DataError("figures have no bars and held-out figures of their own; leave --val and --trim out")
        return open_all(args.root, args.size), None
    out, roots = Path(args.out), [Path(root) for root in (args.root, args.val) if root]
    train, *val = (PoseFolder(root, args.size, limit=1) for root in roots)
    check_out(out, args.root, args.val)
    if args.trim:
        target = Path(args.trim)
        inside = [root for root in (*roots, train.root) if target.resolve().is_relative_to(root.resolve())]
        if inside:
            raise DataError(f"--trim {target}: that is inside {inside[0]}; name a folder elsewhere")
        if out.resolve().is_relative_to(target.resolve()):
            raise DataError(f"--out {out}: that is inside --trim {target}; name a folder elsewhere")
        for path in (target, Path(f"{target}.partial"), *filter(os.path.isfile, target.parents)):
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                raise DataError(f"--trim {path}: that is there already; name a new folder, nothing is overwritten")
    return train, val[0] if val else None


def gather(train: Pictures, val: Pictures | None, workers: int) -> Checked:
    """Looks at every picture of both once."""
    files, parts, broken = [], [], {}
    for ds in (train, val):
        if ds is not None:
            rows, why = examine(ds, workers)
            names = [ds.name(i) for i in range(len(ds))]
            broken |= ds.broken | {names[i]: reason for i, reason in why.items()}
            files += names
            parts.append(rows)
    held = np.arange(len(files)) >= len(train)
    if val is None and isinstance(train, PoseFolder) and len(set(train.groups())) > 1:
        held[split(train)[1].indices] = True
    return Checked(train, val, files, held, np.concatenate(parts), broken)


def make_folder(folder: str | Path, flag: str) -> Path:
    """Makes a folder, and those it lies in, for what `flag` ("--out DIR") wants written; DataError where it cannot."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        file = next((path for path in (folder, *folder.parents) if os.path.isfile(path)), None)
        why = f"{file} is a file" if file else f"{folder} cannot be made ({error.strerror})"
        raise DataError(f"{flag}: {why}; name another folder") from None
    return folder


def say(text: str) -> None:
    """Prints what the terminal has letters for: file names may be any bytes. Nobody has to read on (`| head -1`)."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, "replace").decode(encoding), flush=True)
    except BrokenPipeError:                             # nor does Python, as it ends, have anything to complain of
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def check(args: argparse.Namespace) -> int:
    """Writes the files, prints what there is to say, makes the copy without bars; returns the exit status."""
    train, val = open_checked(args)
    out = make_folder(args.out, f"--out {args.out}")
    checked = gather(train, val, args.workers)
    odd, verdicts, about = odd_poses(checked)
    suspects = [Suspect("broken", 0, file, why) for file, why in checked.broken.items()]
    suspects += orphans(train, val) + copies(checked) + odd + barred(checked)
    suspects.sort(key=lambda s: (list(KINDS).index(s.kind), -s.score, s.file))
    about["groups"] = len(set(train.groups()))
    report = make_report(args.root, checked, suspects, verdicts, about)
    write_files(out, checked, suspects, report, args.size)
    say("\n".join(describe(report)))
    if args.trim:
        cut = trim(checked, Path(args.trim))
        say(f"wrote {args.trim}, a copy of the {checked.rows['sound'].sum()} sound pictures, {cut} of them trimmed")
    say(f"wrote {out}/report.json, {out}/suspects.txt ({len(suspects)} lines), {out}/overview.png")
    if len(checked.broken) > BROKEN_LIMIT * report["pictures"]["found"]:
        print(f"{args.root}: more than {BROKEN_LIMIT:.0%} broken, training would stop; take those out", file=sys.stderr)
        return 2
    return 0


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="data.py", description="Checks a dataset and reports on it.")
    parser.add_argument("root", help="folder, list of pictures or COCO json; or figures:N")
    parser.add_argument("--out", default="check", metavar="DIR",
                        help="where report.json, suspects.txt and overview.png go (check)")
    parser.add_argument("--val", metavar="DIR", help="your own held-out set, for pictures that are in both")
    parser.add_argument("--trim", metavar="NEWDIR", help="write a copy of the dataset without letterbox bars there")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes (one a core)")
    parser.add_argument("--size", type=int, default=256, help="side of the pictures in the overview (256)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Checks what the command line names; returns the exit status, after one sentence where something is wrong."""
    args = parse_args(argv)
    try:
        return check(args)
    except (ValueError, OSError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("data.py: interrupted; no half file is left behind", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
