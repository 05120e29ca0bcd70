"""Images and poses in, batches out: images float [B, 3, S, S] in [-1, 1], poses float [B, 17, 3].

PoseFolder reads a person's own images, which dataset/folder.py finds; dataset/figures.py draws
people for those who have none. What crops, scales or mirrors an image moves its joints too.
`python data.py DIR` checks a dataset and reports on it (dataset/check.py).

Letters: N images, B batch, S side in pixels.
"""

from engine import startup  # before all others: it checks the versions

# isort: split
import hashlib
import math
import os
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import keypoints
from dataset.images import DataError, fetch, note_broken, read_image, upright_size

ZOOM = (0.8, 1.0)               # side of a training crop, as a share of the image's short side
NO_POSE = np.zeros((len(keypoints.JOINTS), 3))              # every joint missing
NO_LABEL = -1                   # of an image without a label; unet.py's null label
BROKEN_LIMIT = 0.01             # share of images that may be broken before a run ends
HELD_OUT, HELD_OUT_MOST = 0.1, 0.2          # share of the images that are held out, in whole groups
HELD_OUT_LEAST, FEWEST_IMAGES = 2, 4        # stage 2 shuffles the poses of held-out images
FEW_GROUPS = 20                 # of so few, the groups that are not trained on are named
FIGURES_TRAIN, FIGURES_VAL = 2_000, 512     # procedural figures, where --data gives no number
FIGURES_VERSION = 1             # raise it when a figure's pixels change, so that caches are renewed
REMEMBER_BYTES = 2 << 30        # RAM for decoded images
ORDER_STREAM, AUGMENT_STREAM, MIRROR_STREAM = 1, 2, 3       # first word of a seed: streams differ


# ---------------------------------------------------------------------------------------- pixels

def to_tensor(image: np.ndarray) -> torch.Tensor:
    """uint8 [H, W, 3] or [B, H, W, 3] -> float32 [3, H, W] or [B, 3, H, W] in [-1, 1]."""
    planes = torch.as_tensor(image).movedim(-1, -3).contiguous()    # bytes: a quarter of the work
    return planes.float().div_(127.5).sub_(1)


def to_uint8(x: torch.Tensor) -> np.ndarray:
    """[3, H, W] or [B, 3, H, W] in [-1, 1] -> uint8 [H, W, 3] or [B, H, W, 3], clipped."""
    x = x.detach().float().clamp(-1, 1).add(1).mul(127.5).round()
    return x.to(torch.uint8).movedim(-3, -1).contiguous().cpu().numpy()


def crop_resize(
    image: Image.Image | np.ndarray,            # any size
    pose: np.ndarray,                           # [17, 3], normalised to that image
    size: int,                                  # side of the square that comes out
    rng: np.random.Generator | None = None,     # draws a crop and mirrors half of the time; None:
                                                # a crop of the whole short side, in the centre or
                                                # around a person who would not be inside
    zoom: tuple[float, float] = ZOOM,           # range of a drawn crop's side, as a share of the
                                                # short side; no crop has to be enlarged for it
) -> tuple[np.ndarray, np.ndarray]:
    """Crops, resizes and mirrors: the one place where an image and its pose change geometry.

    Returns uint8 [size, size, 3] and float32 [17, 3]; joints outside the crop stay outside [0, 1].
    """
    if not isinstance(image, Image.Image):
        image = Image.fromarray(image)
    W, H = image.size
    side, at, mirror = min(W, H), None, False
    if rng is not None:
        scale, *at, coin = rng.random(4)
        least = max(zoom[0], min(zoom[1], size / side))     # a smaller crop would be enlarged
        side = max(1, round(side * (least + (zoom[1] - least) * scale)))
        mirror = coin < 0.5
    x0, y0, x1, y1 = place_square(image.size, pose, side, at)
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=(x0, y0, x1, y1))
    pose = keypoints.crop(pose, (x0 / W, y0 / H, x1 / W, y1 / H))
    if mirror:
        image, pose = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), keypoints.flip(pose)
    return np.array(image), pose.astype(np.float32)


def place_square(
    size: tuple[int, int],                      # (width, height) of the image
    pose: np.ndarray,                           # [17, 3], normalised to it
    side: int,                                  # of the square
    at: Sequence[float] | None = None,          # in 0..1, where in the range of places it lies;
                                                # None: in its middle
) -> tuple[int, int, int, int]:
    """The box (x0, y0, x1, y1) of a square in an image, in whole pixels: a crop that needs no
    scaling is then an exact copy.

    It may lie anywhere along the short side. Along the long side it must hold the person, or as
    many joints as fit; with `at` None it is the centre crop if the person is inside that.
    """
    joints, short, corner = pose[keypoints.on_canvas(pose), :2] * size, min(size), []
    for axis, (length, places) in enumerate(zip(size, joints.T, strict=True)):
        low, high, centre = 0, length - side, (length - short + 1) // 2
        x, share = np.sort(places), 0.5 if at is None else at[axis]
        if len(x) and length > short and (
                at is not None or x[0] < centre or x[-1] > centre + short):
            counts = np.searchsorted(x, x + side, "right") - np.arange(len(x))  # from x to x + side
            first = counts.argmax()
            last = first + counts[first] - 1
            ends = math.ceil(x[last] - side), math.floor(x[first])
            low, high = (min(max(end, 0), length - side) for end in sorted(ends))
        corner.append(low + min(int(share * (high - low + 1)), high - low))
    x0, y0 = corner
    return x0, y0, x0 + side, y0 + side


# -------------------------------------------------------------------------------------- datasets

class ImageDataset(Dataset):
    """The interface of a dataset. A subclass has `size`, len and source(i); the other defaults are
    right for generated images."""
    size: int                       # side of the square that ds[i] is
    seed: int = 0
    broken: dict[str, str] = {}     # file known to be unusable -> why, a sentence with a file in it
    most_broken = math.inf          # with more broken images than this the run ends
    skipped: Sequence[str] = ()     # files of images without a person
    label_by: str | None = None     # what labels the images: "folders", a column of metadata.csv
    label_names: Sequence[str] = ()         # the labels, by number

    def source(self, i: int) -> tuple[Image.Image | np.ndarray, np.ndarray]:
        """The whole image i, before any crop, and its pose [17, 3]."""
        raise NotImplementedError

    def name(self, i: int) -> str:
        """The file of image i, or "figure i" for a generated image."""
        return f"figure {i}"

    def groups(self) -> list[str]:
        """The group of each image: split() keeps a group together."""
        return [self.name(i) for i in range(len(self))]

    def label_ids(self) -> np.ndarray:
        """The label of each image [N], its number in `label_names`, or NO_LABEL."""
        return np.full(len(self), NO_LABEL)

    def fingerprint(self) -> str:
        """Hex digest; datasets with different images or poses have different digests."""
        words = type(self).__name__, FIGURES_VERSION, len(self), self.size, self.seed
        return hashlib.sha256(repr(words).encode()).hexdigest()

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Image i in centre geometry: uint8 [size, size, 3], float32 [17, 3]."""
        return crop_resize(*self.source(i), self.size)


class PoseFolder(ImageDataset):
    """A person's own images. `root` is one of
    - a folder with images/ and keypoints/: images/a/b.png goes with keypoints/a/b.json, in any
      format of formats/pose_files.py; or with YOLO's labels/: labels/a/b.txt;
    - a text file that lists such images, one a line, absolute or relative to the file;
    - a folder with images (in images/ or in itself) and COCO json files (in itself, annotations/ or
      coco/), or one json: the largest person is taken, `skipped` names the images without one;
    - with `poseless`, also any folder of images; those without keypoints have NO_POSE.

    Images are opened on access only, except to read a size that a COCO json lacks; ds[i] raises
    DataError if the image is damaged.
    """

    def __init__(
        self,
        root: str | Path,
        size: int,                          # side of the square images that come out
        poseless: bool = False,             # take images without keypoints too, for stage 1
        limit: float = BROKEN_LIMIT,        # share of images that may be broken
        trim_bars: bool = False,            # cut letterbox bars off each image as it is read
        labels: str | None = None,          # what is on an image: see folder.find_labels
    ):
        from dataset import folder
        self.size, self.trim_bars = size, trim_bars
        self.paths: list[str] = []                      # of image i
        self.labels: list[str | np.ndarray] = []        # its keypoint file, or its pose [17, 3]
        self.sizes: list[tuple[float, float] | None] = []   # (width, height) that a COCO json says
        self.broken, self.skipped = {}, []
        self.root, labelled = folder.find(Path(root), poseless)
        for path, label, why, size in labelled:
            if label is None and not why and not poseless:
                self.skipped.append(path)
            elif not os.path.exists(path):
                self.broken[path] = f"{path}: there is no such file"
            elif label is None and not poseless:
                self.broken[path] = f"{path}: {why}"
            else:
                self.paths.append(path)
                self.labels.append(NO_POSE if label is None else label)
                self.sizes.append(size)
        self.names = [os.path.relpath(p, self.root).replace(os.sep, "/") for p in self.paths]
        total = len(self.paths) + len(self.broken)
        if not total:
            raise DataError(f"{root}: no image{'' if poseless else ' with a pose'} in it")
        self.most_broken = limit * total
        note_broken(self, {})
        table = folder.read_table(self.root, self.names)
        self.group_of, self.metadata = folder.find_groups(self.names, table)
        self.label_by, self.label_of = folder.find_labels(self.root, self.names, table, labels)
        self.label_names = sorted(set(self.label_of) - {""})

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, i: int) -> str:
        return self.paths[i]

    def label(self, i: int) -> tuple[np.ndarray, tuple[float, float] | None]:
        """The pose [17, 3], normalised to the whole image i, and the (width, height) that the label
        says the image has."""
        if not isinstance(self.labels[i], str):
            return self.labels[i], self.sizes[i]
        from formats import pose_files
        try:
            found = pose_files.read_one(self.labels[i], lambda: upright_size(self.paths[i]))
        except keypoints.PoseError as error:
            raise DataError(str(error)) from error
        # The seed's 512 x 512 are a unit, whatever the shape of the image.
        return found.poses[0], None if found.format == "seed" else found.sizes[0]

    def pose(self, i: int) -> np.ndarray:
        """[17, 3], normalised to the whole image."""
        return self.label(i)[0]

    def whole(self, i: int, at_least: int | None = None) -> tuple[Image.Image, np.ndarray]:
        """Image i as read_image reads it, and its pose."""
        return read_image(self.paths[i], at_least), self.pose(i)

    def source(self, i: int) -> tuple[Image.Image, np.ndarray]:
        if self.trim_bars:          # detected at full size, as in dataset/check.py
            from dataset.bars import cut_bars
            return cut_bars(*self.whole(i))
        return self.whole(i, at_least=2 * self.size)

    def groups(self) -> list[str]:
        return self.group_of

    def label_ids(self) -> np.ndarray:
        number = {name: i for i, name in enumerate(self.label_names)}
        return np.array([number.get(name, NO_LABEL) for name in self.label_of])

    def fingerprint(self) -> str:
        """Changes with the images, their poses, the size and trim_bars; of files it looks at sizes
        and times alone."""
        kind = f"PoseFolder {self.size}" + " trim_bars" * self.trim_bars
        digest = hashlib.sha256(kind.encode())
        for name, path, label in zip(self.names, self.paths, self.labels, strict=True):
            digest.update(name.encode("utf-8", "surrogateescape"))
            for file in (path, label):
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
        self.label_by, self.label_names = ds.label_by, ds.label_names

    def __len__(self) -> int:
        return len(self.indices)

    def source(self, i: int) -> tuple[Image.Image | np.ndarray, np.ndarray]:
        return self.ds.source(self.indices[i])

    def name(self, i: int) -> str:
        return self.ds.name(self.indices[i])

    def groups(self) -> list[str]:
        groups = self.ds.groups()
        return [groups[i] for i in self.indices]

    def label_ids(self) -> np.ndarray:
        return self.ds.label_ids()[self.indices]

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


def split(ds: ImageDataset) -> tuple[Part, Part]:
    """(training, validation): a tenth of the images and at least 2, by group, never by frame:
    neighbouring frames of a clip would leak. DataError where there are fewer than 4 images.

    Groups are taken in the order of their names' crc32: the split is the same on every machine, and
    a growing dataset keeps nearly all of it. A group that would hold out more than a fifth of the
    images is trained on. Where the other groups make up less than half a tenth, images are held out
    one by one, never all of a group. Each label is split on its own, so that all are trained on.
    """
    n, groups = len(ds), ds.groups()
    if n < FEWEST_IMAGES:
        raise DataError(f"{n} images are too few to train on some and hold out {HELD_OUT_LEAST}; "
                        f"give at least {FEWEST_IMAGES}, or others with --val")
    held = []
    labels = gathered_by(ds.label_ids().tolist(), range(n))
    for some in labels.values():
        least = HELD_OUT_LEAST if len(labels) == 1 else 0
        wanted, members = max(least, HELD_OUT * len(some)), gathered_by(groups, some)
        whole = whole_groups(members, wanted, max(wanted, HELD_OUT_MOST * len(some)))
        if len(whole) < max(least, wanted / 2) and wanted >= 1:
            whole = one_by_one(ds, members, wanted)
        held += whole
    if len(labels) > 1 and len(held) < max(HELD_OUT_LEAST, HELD_OUT * n / 2):
        # Most labels have less than ten images: hold out single ones, never a label's first.
        ids = ds.label_ids()
        order = sorted(range(n), key=lambda i: hash_of_name(Path(ds.name(i)).stem))
        spare = [i for k, i in enumerate(order) if ids[i] in ids[order[:k]]]
        held = spare[:max(HELD_OUT_LEAST, int(HELD_OUT * n))]
    if len(labels) > 1 and len(held) < HELD_OUT_LEAST:
        raise DataError(f"most of the {len(labels)} labels have one image, which training needs, "
                        f"so fewer than {HELD_OUT_LEAST} can be held out; give others with --val, "
                        "or --labels off")
    members, left_out = gathered_by(groups, range(n)), gathered_by(groups, sorted(held))
    if torn := [group for group in left_out if len(left_out[group]) < len(members[group])]:
        print(f"note: by their names, images form few series ({shorten(torn)}), so single images "
              "are held out. That is right for separate images. For the frames of one clip the "
              "held-out loss is too low: name groups in metadata.csv, or give --val",
              file=sys.stderr)
    elif len(members) < FEW_GROUPS and any(len(m) > 1 for m in members.values()):
        print(f"warning: all images of {shorten(left_out)} are held out, none is trained on; if "
              "you need them, give other images with --val", file=sys.stderr)
    return Part(ds, sorted(set(range(n)) - set(held))), Part(ds, sorted(held))


def gathered_by(keys: Sequence, indices: Iterable[int]) -> dict[object, list[int]]:
    """The indices that have the same key, in their order."""
    members = {}
    for i in indices:
        members.setdefault(keys[i], []).append(i)
    return members


def hash_of_name(name: str) -> int:
    return zlib.crc32(name.encode(errors="surrogateescape"))


def whole_groups(members: dict[str, list[int]], wanted: float, most: float) -> list[int]:
    """Images to hold out, in whole groups: at least `wanted` where that is possible with `most`."""
    held = []
    for group in sorted(members, key=hash_of_name):
        if len(held) < wanted and len(held) + len(members[group]) <= most:
            held += members[group]
    return held


def one_by_one(ds: ImageDataset, members: dict[str, list[int]], wanted: float) -> list[int]:
    """About `wanted` images to hold out, of each group the same share, never all of it."""
    n, held = sum(map(len, members.values())), []
    for some in members.values():
        some = sorted(some, key=lambda i: hash_of_name(Path(ds.name(i)).stem))
        held += some[:min(math.ceil(wanted * len(some) / n), len(some) - 1)]
    return held


def shorten(names: Iterable[str], most: int = 3) -> str:
    """The first of some names and how many more there are."""
    names = list(names)
    return ", ".join(names[:most]) + f" and {len(names) - most} more" * (len(names) > most)


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
                 zoom: tuple | None = None,             # of random crops; None: centre crops
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
        return crop_resize(*self.ds.source(i), self.ds.size, rng, self.zoom)


def load(steps: Steps, ks: range, workers: int, device: str | torch.device) -> Iterator:
    """(images, poses, indices) as of `batches`, of the steps ks, made by `workers` processes (0: by
    this one); this process counts the broken images."""
    pin = torch.device(device).type == "cuda"
    # A generator of its own: DataLoader would otherwise draw from the global one.
    loader = DataLoader(steps, batch_size=None, sampler=ks, num_workers=workers, pin_memory=pin,
                        generator=torch.Generator())
    for images, poses, indices, broken in fetch(loader):
        note_broken(steps.ds, broken)
        images, poses = (each.to(device, non_blocking=pin) for each in (images, poses))
        yield to_tensor(images), poses, indices     # only bytes cross processes and the bus


def find_workers(device: str | torch.device) -> int:
    """Processes that load for a training on `device`; on a CPU the training needs all cores."""
    return min(8, os.cpu_count() or 1) if torch.device(device).type == "cuda" else 0


def share(batch_size: int, rank: int, world: int) -> slice:
    """The part of a batch that process `rank` of `world` takes."""
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
    """(images [B/world, 3, S, S] in [-1, 1], poses [B/world, 17, 3], indices [B/world]).

    Step k depends on (seed, k) alone: order, crop and mirror are drawn from it. So a resumed run
    repeats the uninterrupted one, and the shares of all ranks make up the batch of one process.
    DataError once more than 1 % of the images turn out broken.
    """
    steps = Steps(ds, batch_size, seed, zoom if augment else None, share(batch_size, rank, world))
    return load(steps, range(start, stop), workers, device)


def evenly(n: int, limit: int) -> np.ndarray:
    """At most `limit` of the numbers 0..n-1, ascending, evenly spread from first to last."""
    return np.linspace(0, n - 1, min(n, limit)).round().astype(int)


def spread(ds: ImageDataset, limit: int) -> ImageDataset:
    """At most `limit` images of ds, spread evenly over it."""
    return ds if limit >= len(ds) else Part(ds, evenly(len(ds), limit).tolist())


def in_order(
    ds: ImageDataset, batch_size: int,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Batches (images [B, 3, S, S] in [-1, 1], poses [B, 17, 3], labels [B]) of ds in order,
    without the broken ones."""
    steps, labels = range(-(-len(ds) // batch_size)), torch.from_numpy(ds.label_ids())
    for images, poses, indices in load(Steps(ds, batch_size), steps, 0, "cpu"):
        if len(images):
            yield images, poses, labels[indices]


# ------------------------------------------------------------------------------- what --data means

def is_folder(spec: str) -> bool:
    """Whether --data names a person's own images, not procedural figures."""
    return spec != "figures" and not spec.startswith("figures:")


def is_plain(spec: str) -> bool:
    """Whether --data names a folder of images without any poses."""
    from dataset.folder import has_keypoints
    return is_folder(spec) and os.path.isdir(spec) and not has_keypoints(spec)


def open_all(
    spec: str, size: int, poseless: bool = False, trim_bars: bool = False, seed: int = 0,
    labels: str | None = None,
) -> ImageDataset:
    """Every image that `spec` names: figures, figures:N (of this seed), or what PoseFolder takes.
    """
    if is_folder(spec):
        return PoseFolder(spec, size, poseless, trim_bars=trim_bars, labels=labels)
    if labels not in (None, "off"):
        raise DataError(f"--labels is {labels}, but {spec} has no labels; leave it out")
    from dataset.figures import Figures
    count = spec.partition(":")[2] or str(FIGURES_TRAIN)
    if not count.isdecimal() or int(count) < 1:
        raise DataError(f"--data is {spec}; give a number of images, such as figures:10000")
    return Figures(int(count), size, seed)


def open_data(
    spec: str,                      # of --data: figures, figures:N, or what PoseFolder takes
    size: int,
    val: str | None = None,         # of --val, in the same forms; None: a tenth of the groups, or
                                    # other figures
    remember: bool = True,          # keep decoded training images in RAM
    trim_bars: bool = False,        # cut letterbox bars off; figures have none
    labels: str | None = None,      # of --labels: what is on each image, see folder.find_labels
    label_names: Sequence[str] | None = None,   # number the labels as these; None: found in `spec`
    poseless: bool = False,         # take folders of nothing but images too, for stage 1
) -> tuple[ImageDataset, ImageDataset]:
    """(training images, held-out images); DataError where a flag or a file is wrong."""
    train = open_all(spec, size, poseless and is_plain(spec), trim_bars, labels=labels)
    if label_names is not None:
        train.label_names = label_names
    if not val and is_folder(spec):
        train, held_out = split(train)
    else:
        val = val or f"figures:{min(len(train), FIGURES_VAL)}"
        held_out = open_all(val, size, poseless and is_plain(val), trim_bars, seed=1,
                            labels=labels if is_folder(val) else None)
        held_out.label_names = train.label_names            # unknown labels count as none
    return (InMemory(train) if remember else train), held_out


def data_hash(train: ImageDataset, val: ImageDataset | None = None) -> str:
    """Changes with the images, poses and labels; a copy with other file times has another hash.
    `val` is given where --val names files of its own."""
    words = [ds.fingerprint()[:16] for ds in filter(None, (train, val))]
    if train.label_names:
        words.append(hashlib.sha256(train.label_ids().tobytes()).hexdigest()[:16])
    return "+".join(words)


def describe_labels(ds: ImageDataset) -> str:
    """How many images have which label, the most frequent first; "" without labels."""
    if not ds.label_names:
        return ""
    counts = Counter(ds.label_ids().tolist())
    without = counts.pop(NO_LABEL, 0)
    names = [f"{ds.label_names[i]} {n}" for i, n in counts.most_common()]
    return f"by {ds.label_by}: {shorten(names, 5)}; {without} of {len(ds)} images have none"


def check_out(out: str | Path, *specs: str | None) -> None:
    """DataError if --out lies among the images of `specs` (as of --data), where what is written
    would become part of the dataset."""
    from dataset.folder import images_of
    for root in (Path(spec) for spec in specs if spec and is_folder(spec)):
        if Path(out).resolve().is_relative_to(images_of(root).resolve()):
            raise DataError(f"--out {out} lies among the images of {root}; name another folder")


def main(argv: list[str] | None = None) -> int:
    """Checks the dataset that the command line names; returns the exit status."""
    from dataset import check
    return check.main(argv)


if __name__ == "__main__":
    startup.run(main)
