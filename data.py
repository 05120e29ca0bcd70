"""Pictures and poses in, batches out: images float [B, 3, S, S] in [-1, 1], poses float [B, 17, 3] = (x, y, visible).

PoseFolder reads a person's own pictures; for whoever has none, dataset/figures.py draws people. Whatever crops, scales
or flips a picture moves its joints too (upstream's random crops left them where they were). `python data.py DIR` checks
a dataset and reports on it (dataset/check.py).

Letters: N pictures, B batch, S side in pixels.
"""

import csv
import hashlib
import mmap
import os
import re
import signal
import sys
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path, PurePosixPath, PureWindowsPath

# Before torch is imported: idle threads soon sleep instead of spinning, which shares the cores.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import torch
from PIL import Image, ImageOps
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

FIGURES_TRAIN, FIGURES_VAL = 2_000, 512            # how many procedural figures, where the person does not say


def is_folder(spec: str) -> bool:
    """Is --data a person's own pictures, rather than procedural figures?"""
    return spec != "figures" and not spec.startswith("figures:")


def open_all(spec: str, size: int, poseless: bool = False) -> Pictures:
    """Every picture that `spec` names: figures, figures:N, or what PoseFolder takes."""
    if is_folder(spec):
        return PoseFolder(spec, size, poseless)
    from dataset.figures import Figures
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
        from dataset.figures import Figures
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
    from dataset.figures import Figures
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


# ----------------------------------------------------------------------------------------------- check

def main(argv: list[str] | None = None) -> int:
    """Checks the dataset that the command line names; returns the exit status."""
    from dataset import check
    return check.main(argv)


if __name__ == "__main__":
    sys.exit(main())
