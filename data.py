"""Images and poses in, batches out: images float [B, 3, S, S] in [-1, 1], poses float [B, 17, 3].

PoseFolder reads a person's own images; dataset/figures.py draws people for those who have none.
What crops, scales or mirrors an image moves its joints too. `python data.py DIR` checks a dataset
and reports on it (dataset/check.py).

Letters: N images, B batch, S side in pixels.
"""

import csv
import hashlib
import math
import os
import re
import sys
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path, PurePosixPath, PureWindowsPath

# This must precede `import torch`: idle OpenMP threads soon sleep instead of busy-waiting.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import keypoints

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")     # no EPS: PIL would start Ghostscript
ZOOM = (0.8, 1.0)               # side of a training crop, as a share of the image's short side
NO_POSE = np.zeros((len(keypoints.JOINTS), 3))              # every joint missing
BROKEN_LIMIT = 0.01             # share of images that may be broken before a run ends
FIGURES_TRAIN, FIGURES_VAL = 2_000, 512     # procedural figures, where --data gives no number
FIGURES_VERSION = 1             # raise it when a figure's pixels change, so that caches are renewed
REMEMBER_BYTES = 2 << 30        # RAM for decoded images
ORDER_STREAM, AUGMENT_STREAM, MIRROR_STREAM = 1, 2, 3       # first word of a seed: streams differ
WORKER_DIED = ("a process that loads images died, most often for lack of memory or of /dev/shm; "
               "rerun the same command with fewer --workers, or 0, to resume")


class DataError(ValueError):
    """A fault in a person's data: one sentence that names the file and says what to do."""


# ---------------------------------------------------------------------------------------- pixels

def to_tensor(image: np.ndarray) -> torch.Tensor:
    """uint8 [H, W, 3] or [B, H, W, 3] -> float32 [3, H, W] or [B, 3, H, W] in [-1, 1]."""
    planes = torch.as_tensor(image).movedim(-1, -3).contiguous()    # bytes: a quarter of the work
    return planes.float().div_(127.5).sub_(1)


def to_uint8(x: torch.Tensor) -> np.ndarray:
    """[3, H, W] or [B, 3, H, W] in [-1, 1] -> uint8 [H, W, 3] or [B, H, W, 3], clipped."""
    x = x.detach().float().clamp(-1, 1).add(1).mul(127.5).round()
    return x.to(torch.uint8).movedim(-3, -1).contiguous().cpu().numpy()


def read_image(path: str | Path, at_least: int | None = None, ground: str = "white") -> Image.Image:
    """A file as an upright RGB image, transparency laid on the colour `ground`.

    With `at_least`, a large JPEG is decoded at a reduced size of at least that many pixels a side.
    DataError for a file that cannot be read whole, so no truncated image is used in training.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                # draft() decodes at 1/2, 1/4 or 1/8. Where this does not divide a side, the content
                # ends within the last pixel; unless it is stretched over it, joints would be off by
                # up to half a pixel.
                _, extent = (at_least and image.draft(None, (at_least, at_least))) or (None, None)
                image.load()
                if extent and extent[2:] != image.size:
                    image = image.resize(image.size, Image.Resampling.BICUBIC, box=extent)
                image = ImageOps.exif_transpose(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(f"{path}: more than {Image.MAX_IMAGE_PIXELS:,} pixels; make it smaller or "
                        "take it out") from None
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file") from None
    except Exception as error:      # PIL's decoders raise a dozen unrelated types on damaged files
        raise DataError(f"{path}: not a readable image ({error}); replace it or take it out"
                        ) from error
    if image.mode == "F":
        raise DataError(f"{path}: floating point pixels are not supported; save the image with 8 "
                        "or 16 bits")
    if image.mode.startswith("I"):      # 16-bit grey; PIL's own convert() would clip at 255
        grey = (np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, ground), image).convert("RGB")
    return image.convert("RGB")


def cut_bars(image: Image.Image, pose: np.ndarray) -> tuple[Image.Image, np.ndarray]:
    """The image without its letterbox bars, and its pose [17, 3] normalised to what is left."""
    from dataset.check import find_bars
    W, H = image.size
    x0, y0, x1, y1 = find_bars(np.asarray(image))
    return image.crop((x0, y0, x1, y1)), keypoints.crop(pose, (x0 / W, y0 / H, x1 / W, y1 / H))


def crop_resize(
    image: Image.Image | np.ndarray,            # any size
    pose: np.ndarray,                           # [17, 3], normalised to that image
    size: int,                                  # side of the square that comes out
    rng: np.random.Generator | None = None,     # None: the centre crop of the whole short side
    zoom: tuple[float, float] = (1.0, 1.0),     # with rng: range of the crop's side, as a share of
                                                # the short side; no crop has to be enlarged for it
    flip: bool = False,                         # with rng: mirror half of the time; without: always
) -> tuple[np.ndarray, np.ndarray]:
    """Crops, resizes and mirrors: the one place where an image and its pose change geometry.

    Returns uint8 [size, size, 3] and float32 [17, 3]; joints outside the crop stay outside [0, 1].
    """
    if not isinstance(image, Image.Image):
        image = Image.fromarray(np.asarray(image))
    W, H = image.size
    side, across, down, mirror = min(W, H), 0.5, 0.5, flip
    if rng is not None:
        scale, across, down, coin = rng.random(4)
        least = max(zoom[0], min(zoom[1], size / side))     # a smaller crop would be enlarged
        side = max(1, round(side * (least + (zoom[1] - least) * scale)))
        mirror = flip and coin < 0.5
    # Whole pixels: a crop that needs no scaling is then an exact copy.
    x0 = min(int(across * (W - side + 1)), W - side)
    y0 = min(int(down * (H - side + 1)), H - side)
    x1, y1 = x0 + side, y0 + side
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=(x0, y0, x1, y1))
    pose = keypoints.crop(np.asarray(pose), (x0 / W, y0 / H, x1 / W, y1 / H))
    if mirror:
        image, pose = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), keypoints.flip(pose)
    return np.array(image), np.asarray(pose, np.float32)


# -------------------------------------------------------------------------------------- datasets

class ImageDataset(Dataset):
    """What a loader needs of a dataset. A subclass has `size`, len and source(i); the other
    defaults are right for images that are drawn, not read."""
    size: int                       # side of the square that ds[i] is
    seed: int = 0
    broken: dict[str, str] = {}     # file known to be unusable -> why, a sentence with a file in it
    most_broken = math.inf          # at most so many
    skipped: Sequence[str] = ()     # files of images without a person

    def source(self, i: int) -> tuple[Image.Image | np.ndarray, np.ndarray]:
        """The whole image i, before any crop, and its pose [17, 3]."""
        raise NotImplementedError

    def name(self, i: int) -> str:
        """The file of image i; the word figure and its number where there is none."""
        return f"figure {i}"

    def groups(self) -> list[str]:
        """The group of each image: split() keeps a group together."""
        return [self.name(i) for i in range(len(self))]

    def fingerprint(self) -> str:
        """Hex digest that is equal only where the images and poses are."""
        words = type(self).__name__, FIGURES_VERSION, len(self), self.size, self.seed
        return hashlib.sha256(repr(words).encode()).hexdigest()

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Image i in centre geometry: uint8 [size, size, 3], float32 [17, 3]."""
        return crop_resize(*self.source(i), self.size)


class PoseFolder(ImageDataset):
    """A person's own images. `root` is one of
    - a folder with images/ and keypoints/: images/a/b.png goes with keypoints/a/b.json, the seed's;
    - a text file that lists such images, one a line, absolute or relative to the file;
    - a folder with images (in images/ or in itself) and one COCO json (in itself, annotations/ or
      coco/), or the json: the largest person is taken, `skipped` names the images without one;
    - with `poseless`, also any folder of images; those without keypoints have NO_POSE.

    No image is opened before it is asked for; ds[i] then raises DataError if it is damaged.
    """

    def __init__(
        self,
        root: str | Path,
        size: int,                          # side of the square images that come out
        poseless: bool = False,             # take images without keypoints too, to measure stage 1
        limit: float = BROKEN_LIMIT,        # share of images that may be broken
        trim_bars: bool = False,            # cut letterbox bars off each image as it is read
    ):
        self.size, self.poseless, self.trim_bars = size, poseless, trim_bars
        self.paths: list[str] = []                      # of image i
        self.poses: list[str | np.ndarray] = []         # its keypoint file, or its pose [17, 3]
        self.broken, self.skipped = {}, []
        root = Path(root)
        if not root.exists():
            raise DataError(f"{root}: there is no such file or folder")
        if root.is_file() and root.suffix.lower() == ".json":
            self._read_coco(root, None, [root.parent, root.parent.parent])
        elif root.is_file():
            self._pair(root.parent, read_list(root))
        elif (root / "keypoints").is_dir():
            self._pair(root, find_images(root / "images"))
        elif found := find_coco(root):
            self._read_coco(*found, [root])
        elif poseless:
            self._pair(root, find_images(root))
        else:
            raise DataError(f"{root}: no keypoints in it; put images into {root}/images and their "
                            f"poses into {root}/keypoints, or one COCO json into {root}")
        self.names = [os.path.relpath(p, self.root).replace(os.sep, "/") for p in self.paths]
        total = len(self.paths) + len(self.broken)
        if not total:
            raise DataError(f"{root}: no image{'' if poseless else ' with a pose'} in it")
        self.most_broken = limit * total
        note_broken(self, {})

    def _pair(self, root: Path, images: list[str]) -> None:
        """Finds the keypoint file of each image."""
        self.root = root
        for path in images:
            pose = keypoint_file(path)
            found = pose is not None and os.path.isfile(pose)
            if not os.path.exists(path):
                self.broken[path] = f"{path}: there is no such file"
            elif found or self.poseless:
                self.paths.append(path)
                self.poses.append(pose if found else NO_POSE)
            else:
                self.broken[path] = f"{path}: its keypoints {pose} are missing" if pose else \
                    f"{path}: not below a folder called images, so it has no keypoint file"

    def _read_coco(self, path: Path, content: dict | None, near: list[Path]) -> None:
        """Reads a COCO json, parsed already where `content` is given; the images are in one of the
        folders `near` or right below it."""
        from formats import pose_files
        people, refused = pose_files.read_coco(path, content)
        if bad := next(filter(leaves_folder, people), None):
            raise DataError(f"{path}: file_name '{bad}' leads out of the dataset; use plain names")
        part = path.stem.split("_")[-1]                 # person_keypoints_val2017.json: val2017/
        folders = [at / sub for at in near for sub in ("images", part, f"images/{part}", ".")]
        folder = next((at for at in folders if any((at / name).is_file() for name in people)), None)
        if folder is None:
            raise DataError(f"{path}: none of its images is in {folders[0]} or beside it")
        self.root = folder.parent if folder.name == "images" else folder
        for name in sorted(people):
            image, pose = os.path.join(folder, name), pose_files.largest(people[name])
            if name in refused:
                self.broken[image] = f"{image}: {refused[name]}"
            elif pose is None and not self.poseless:
                self.skipped.append(image)
            elif not os.path.exists(image):
                self.broken[image] = f"{image}: there is no such file"
            else:
                self.paths.append(image)
                self.poses.append(NO_POSE if pose is None else pose)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, i: int) -> str:
        return self.paths[i]

    def pose(self, i: int) -> np.ndarray:
        """[17, 3], normalised to the whole image."""
        if not isinstance(self.poses[i], str):
            return self.poses[i]
        from formats import pose_files
        try:
            return pose_files.read_seed(self.poses[i])
        except keypoints.PoseError as error:
            raise DataError(str(error)) from error

    def source(self, i: int) -> tuple[Image.Image, np.ndarray]:
        if self.trim_bars:          # found among all pixels, as the check finds them
            return cut_bars(read_image(self.paths[i]), self.pose(i))
        return read_image(self.paths[i], at_least=2 * self.size), self.pose(i)

    def groups(self) -> list[str]:
        """The clip of each image: metadata.csv's, else the name without its frame number."""
        told = read_groups(self.root / "metadata.csv")
        stems = [PurePosixPath(name.rpartition("images/")[2]).with_suffix("").as_posix()
                 for name in self.names]
        groups = [told.get(name) or re.sub(r"[-_ ./]*\d+$", "", stem) or stem
                  for name, stem in zip(self.names, stems, strict=True)]
        return groups if len(set(groups)) > 1 else stems

    def fingerprint(self) -> str:
        """Changes with the images, their poses, the size and trim_bars; of files it looks at sizes
        and times alone."""
        kind = f"PoseFolder {self.size}" + " trim_bars" * self.trim_bars
        digest = hashlib.sha256(kind.encode())
        for name, path, pose in zip(self.names, self.paths, self.poses, strict=True):
            digest.update(name.encode("utf-8", "surrogateescape"))
            for file in (path, pose):
                if not isinstance(file, str):
                    digest.update(file.tobytes())
                elif os.path.exists(file):          # it may have vanished since it was listed
                    stat = os.stat(file)
                    digest.update(f"|{stat.st_size} {stat.st_mtime_ns}".encode())
        return digest.hexdigest()


class Part(ImageDataset):
    """The images `indices` of ds, in that order."""

    def __init__(self, ds: ImageDataset, indices: Iterable[int]):
        self.ds, self.indices, self.size = ds, list(indices), ds.size
        self.broken, self.most_broken = ds.broken, ds.most_broken       # one dict for all parts

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
    """All of ds; images stay in RAM once decoded or drawn, until `budget` bytes are full. For
    loading without workers, each of which would have a memory of its own."""

    def __init__(self, ds: ImageDataset, budget: int = REMEMBER_BYTES):
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


def note_broken(ds: ImageDataset, broken: dict[str, str]) -> None:
    """Adds the broken images {file: reason} to ds.broken and prints those that are new; DataError
    once there are more than ds.most_broken."""
    new = {file: reason for file, reason in broken.items() if file not in ds.broken}
    ds.broken.update(new)
    if len(ds.broken) > ds.most_broken:
        most = math.floor(ds.most_broken)
        raise DataError(f"{len(ds.broken)} images cannot be used, and at most {most} may be "
                        f"broken; the first is {next(iter(ds.broken.values()))}")
    for reason in new.values():
        tqdm.write(f"left out: {reason}", file=sys.stderr)


@contextmanager
def naming_broken(path: str | Path, *datasets: ImageDataset) -> Iterator[None]:
    """However the block ends, the file `path` then names the broken images, if there are any."""
    try:
        yield
    finally:
        lines = [f"{file}\t{reason}" for ds in datasets for file, reason in ds.broken.items()]
        if lines:
            how = {"encoding": "utf-8", "errors": "surrogateescape"}    # names may be any bytes
            before = Path(path).read_text(**how).splitlines() if Path(path).exists() else []
            lines = dict.fromkeys(before + lines)
            Path(path).write_text("".join(f"{line}\n" for line in lines), **how)
            print(f"{len(lines)} broken images were left out; {path} names them", file=sys.stderr)


def split(ds: ImageDataset, fraction: float = 0.1) -> tuple[Part, Part]:
    """(training, validation) by group, never by frame: neighbouring frames of a clip would leak.

    Groups are taken in the order of their names' crc32: the split is the same on every machine, and
    a growing dataset keeps nearly all of it. A group of more than half of the images is trained on.
    """
    names, members = ds.groups(), {}
    for i, name in enumerate(names):
        members.setdefault(name, []).append(i)
    if len(members) < 2:
        raise DataError("all images are of one group, so none can be held out; name groups in "
                        "metadata.csv, or give other images with --val")
    held = []
    for _, name in sorted((zlib.crc32(name.encode("utf-8", "surrogateescape")), name)
                          for name in members):
        n = len(members[name])
        if len(held) >= max(1, fraction * len(names)):
            break
        if 2 * n <= len(names) and len(held) + n < len(names):
            held += members[name]
    return Part(ds, sorted(set(range(len(names))) - set(held))), Part(ds, sorted(held))


# ----------------------------------------------------------------------------- files and folders

def find_images(folder: Path) -> list[str]:
    """The image files in a folder and below it, by name."""
    found = sorted(os.path.join(at, name) for at, _, names in os.walk(folder) for name in names
                   if os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith("."))
    if not found:
        raise DataError(f"{folder}: no images in it ({' '.join(sorted(SUFFIXES))})")
    return found


def read_list(path: Path) -> list[str]:
    """The images that a text file lists."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError:
        raise DataError(f"{path}: not a text file; give a folder, a list of images or a COCO json"
                        ) from None
    lines = [line for line in lines if line and not line.startswith("#")]
    for line in lines:
        if not os.path.isabs(line) and leaves_folder(line):
            raise DataError(f"{path}: '{line}' leads out of the list's folder; write it whole")
    return [os.path.join(path.parent, line) for line in lines]


def find_coco(root: Path) -> tuple[Path, dict] | None:
    """The COCO json of a folder and its content, or None. A json is COCO if it has images and
    annotations; person_keypoints*.json goes before any other."""
    from formats import pose_files
    for pattern in ("*person_keypoints*.json", "*.json"):
        files = sorted(p for at in (root, root / "annotations", root / "coco")
                       for p in at.glob(pattern) if p.is_file())
        found = []
        for path in files:
            text = path.read_bytes()
            if b'"images"' in text and b'"annotations"' in text:        # else it need not be parsed
                content = pose_files.read_content(path)
                if isinstance(content, dict) and {"images", "annotations"} <= content.keys():
                    found.append((path, content))
        if len(found) > 1:
            raise DataError(f"{root}: {len(found)} COCO files, {found[0][0].name}, "
                            f"{found[1][0].name}, ...; name one of them")
        if found:
            return found[0]
    return None


def has_keypoints(root: str | Path) -> bool:
    """Whether `root` is a dataset with poses, not a folder of nothing but images."""
    root = Path(root)
    return not root.is_dir() or (root / "keypoints").is_dir() or find_coco(root) is not None


def keypoint_file(image: str) -> str | None:
    """Of a/images/b/c.png a/keypoints/b/c.json, by the last folder called images."""
    *folders, name = Path(image).parts
    if "images" not in folders:
        return None
    folders[len(folders) - 1 - folders[::-1].index("images")] = "keypoints"
    return os.path.join(*folders, os.path.splitext(name)[0] + ".json")


def leaves_folder(name: str) -> bool:
    """Whether a name from a data file is absolute or climbs, on any system."""
    return (PurePosixPath(name).is_absolute() or bool(PureWindowsPath(name).anchor)
            or ".." in re.split(r"[/\\]", name))


def read_groups(path: Path) -> dict[str, str]:
    """metadata.csv -> {file: group}; empty if there is no such file or no such column."""
    if not path.is_file():
        return {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            names = rows.fieldnames or ()
            column = next((c for c in ("group", "animation", "clip", "video") if c in names), None)
            return {row["file"]: row[column] for row in rows if column and "file" in names}
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a csv table ({error}); fix it or take it out") from error


def data_hash(train: ImageDataset, val: ImageDataset | None = None) -> str:
    """Changes with the images and poses; a copy with other file times has another hash. `val` is
    given where --val names files of its own."""
    return "+".join(ds.fingerprint()[:16] for ds in filter(None, (train, val)))


def check_out(out: str | Path, *specs: str | None) -> None:
    """DataError if --out lies among the images of `specs` (as of --data), where what is written
    would become part of the dataset."""
    for spec in specs:
        if spec and is_folder(spec) and Path(spec).is_dir():        # other specs name each image
            here, root = Path(out).resolve(), Path(spec).resolve()
            apart = (root / "images").is_dir() and has_keypoints(root)
            if here == root or here.is_relative_to(root / "images" if apart else root):
                raise DataError(f"--out {out} lies among the images of {spec}; name another folder")


def make_folder(folder: str | Path, flag: str) -> Path:
    """Makes the folder that `flag` ("--out DIR") names, and its parents."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        file = next((path for path in (folder, *folder.parents) if path.is_file()), None)
        why = f"{file} is a file" if file else f"{folder} cannot be made ({error.strerror})"
        raise DataError(f"{flag}: {why}; name another folder") from None
    return folder


# --------------------------------------------------------------------------------------- batches

@lru_cache(maxsize=8)
def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """The numbers 0..n-1 in the order of this epoch."""
    return np.random.default_rng((ORDER_STREAM, seed, epoch)).permutation(n)


def step_indices(n: int, batch_size: int, seed: int, k: int) -> np.ndarray:
    """Indices [B] of step k: positions kB..kB+B-1 in an endless row of shuffled epochs."""
    positions = k * batch_size + np.arange(batch_size)
    return np.array([permutation(n, seed, int(p // n))[p % n] for p in positions])


class Steps(Dataset):
    """Step k as one item, so that a DataLoader over range(start, stop) has no state to save.

    With a seed: shuffled epochs; the next image replaces a broken one. Without: images in order,
    broken ones left out. An item is (images uint8 [B, S, S, 3], poses [B, 17, 3], indices [B],
    {file: reason} of the broken).
    """

    def __init__(self, ds: ImageDataset, batch_size: int, seed: int | None = None,
                 zoom: tuple | None = None,             # of crop_resize; None: centre crops
                 places: slice = slice(None)):          # the part of the batch to make
        self.ds, self.batch_size, self.seed = ds, batch_size, seed
        self.zoom, self.places = zoom, places

    def __getitem__(self, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict]:
        n, S, items, broken = len(self.ds), self.ds.size, [], {}
        if self.seed is None:
            wanted, tries = range(k * self.batch_size, min(n, (k + 1) * self.batch_size)), 1
        else:
            wanted, tries = step_indices(n, self.batch_size, self.seed, k).tolist(), n
        for j, first in list(enumerate(wanted))[self.places]:
            for i in (p % n for p in range(first, first + tries)):
                if len(broken) > self.ds.most_broken:   # note_broken will end the run
                    break
                if self.ds.name(i) in broken:
                    continue
                try:
                    items.append((*self._load(i, k, j), i))
                    break
                except DataError as error:
                    broken[self.ds.name(i)] = str(error)
        images = np.array([image for image, _, _ in items], np.uint8).reshape(-1, S, S, 3)
        poses = np.array([pose for _, pose, _ in items], np.float32).reshape(-1, *NO_POSE.shape)
        indices = torch.tensor([i for _, _, i in items])
        return torch.from_numpy(images), torch.from_numpy(poses), indices, broken

    def _load(self, i: int, k: int, j: int) -> tuple[np.ndarray, np.ndarray]:
        if self.zoom is None:
            return self.ds[i]
        rng = np.random.default_rng((AUGMENT_STREAM, self.seed, k, j))
        return crop_resize(*self.ds.source(i), self.ds.size, rng, self.zoom, flip=True)


def worker_died(error: BaseException) -> bool:
    """Whether an error says that a process of a DataLoader is gone. torch raises it wherever the
    main process is, most often in the middle of a training step."""
    return isinstance(error, (ConnectionError, EOFError)) or str(error).startswith(
        ("DataLoader worker", "Pin memory thread"))


def fetch(loader: DataLoader) -> Iterator:
    """The loader's items; DataError if one of its processes dies."""
    try:
        yield from loader
    except (RuntimeError, ConnectionError, EOFError) as error:
        if worker_died(error):
            raise DataError(WORKER_DIED) from error
        raise


def load(steps: Steps, ks: range, workers: int, device: str | torch.device) -> Iterator:
    """(images, poses, indices) of the steps ks, made by `workers` processes (0: by this one); this
    process counts the broken images."""
    pin = torch.device(device).type == "cuda"
    # A generator of its own: DataLoader would otherwise draw from the global one.
    loader = DataLoader(steps, batch_size=None, sampler=ks, num_workers=workers, pin_memory=pin,
                        generator=torch.Generator())
    for images, poses, indices, broken in fetch(loader):
        note_broken(steps.ds, broken)
        yield images.to(device, non_blocking=pin), poses.to(device, non_blocking=pin), indices


def find_workers(device: str | torch.device) -> int:
    """Processes that load for a training on `device`; on a CPU the training needs all cores."""
    return min(8, os.cpu_count() or 1) if torch.device(device).type == "cuda" else 0


def share(batch_size: int, rank: int, world: int) -> slice:
    """The part of a batch that process `rank` of `world` takes."""
    if batch_size % world:
        raise DataError(f"a batch of {batch_size} cannot be shared by {world} processes; give a "
                        f"--batch-size that {world} divides")
    return slice(rank * batch_size // world, (rank + 1) * batch_size // world)


def batches(
    ds: ImageDataset,
    batch_size: int,                    # of all processes together
    seed: int,
    start: int,                         # the first step; the steps before it cost nothing
    stop: int,                          # one past the last
    workers: int = 0,                   # processes that load; the batches do not depend on it
    augment: bool = False,              # random crop and mirror, else the centre crop
    zoom: tuple[float, float] = ZOOM,   # range of the random crop
    device: str | torch.device = "cpu",
    rank: int = 0,                      # of several processes that share each batch, this one
    world: int = 1,                     # how many they are
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yields (images [B/world, 3, S, S] in [-1, 1], poses [B/world, 17, 3], indices [B/world]).

    Step k depends on (seed, k) alone: order, crop and mirror are drawn from it. So a resumed run
    repeats the uninterrupted one, and the shares of all ranks make up the batch of one process.
    DataError once more than 1 % of the images turn out broken.
    """
    steps = Steps(ds, batch_size, seed, zoom if augment else None, share(batch_size, rank, world))
    for images, poses, indices in load(steps, range(start, stop), workers, device):
        yield to_tensor(images), poses, indices     # only bytes cross processes and the bus


def evenly(n: int, limit: int) -> np.ndarray:
    """At most `limit` of the numbers 0..n-1, ascending, evenly spread from first to last."""
    return np.linspace(0, n - 1, min(n, limit)).round().astype(int)


def spread(ds: ImageDataset, limit: int) -> ImageDataset:
    """At most `limit` images of ds, spread evenly over it."""
    return ds if limit >= len(ds) else Part(ds, evenly(len(ds), limit).tolist())


def numbered(
    ds: ImageDataset, batch_size: int,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Batches (images [B, 3, S, S] in [-1, 1], poses [B, 17, 3], indices [B]) of ds in order,
    without the broken ones."""
    steps = range(-(-len(ds) // batch_size))
    for images, poses, indices in load(Steps(ds, batch_size), steps, 0, "cpu"):
        if len(images):
            yield to_tensor(images), poses, indices


def in_order(
    ds: ImageDataset, batch_size: int, limit: int,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The images and poses of `numbered`, of at most `limit` images spread evenly over ds."""
    for images, poses, _ in numbered(spread(ds, limit), batch_size):
        yield images, poses


# ------------------------------------------------------------------------------- what --data means

def is_folder(spec: str) -> bool:
    """Whether --data names a person's own images, not procedural figures."""
    return spec != "figures" and not spec.startswith("figures:")


def open_all(spec: str, size: int, poseless: bool = False, trim_bars: bool = False) -> ImageDataset:
    """Every image that `spec` names: figures, figures:N, or what PoseFolder takes."""
    if is_folder(spec):
        return PoseFolder(spec, size, poseless, trim_bars=trim_bars)
    from dataset.figures import Figures
    count = spec.partition(":")[2] or str(FIGURES_TRAIN)
    if not count.isdecimal() or int(count) < 1:
        raise DataError(f"{spec}: after figures: comes a number of images, such as figures:10000")
    return Figures(int(count), size, seed=0)


def open_data(
    spec: str,                      # of --data: figures, figures:N, or what PoseFolder takes
    size: int,
    val: str | None = None,         # of --val; None: a tenth of the groups, or other figures
    remember: bool = True,          # keep decoded training images in RAM
    trim_bars: bool = False,        # cut letterbox bars off; figures have none
) -> tuple[ImageDataset, ImageDataset]:
    """(training images, held-out images); DataError where a flag or a file is wrong."""
    train = open_all(spec, size, trim_bars=trim_bars)
    if not is_folder(spec):
        from dataset.figures import Figures
        if val:
            raise DataError(f"--val {val}: figures have held-out figures; leave --val out")
        held_out = Figures(min(len(train), FIGURES_VAL), size, seed=1)
    elif val:
        held_out = PoseFolder(val, size, trim_bars=trim_bars)
    else:
        train, held_out = split(train)
    return (InMemory(train) if remember else train), held_out


def main(argv: list[str] | None = None) -> int:
    """Checks the dataset that the command line names; returns the exit status."""
    from dataset import check
    return check.main(argv)


if __name__ == "__main__":
    sys.exit(main())
