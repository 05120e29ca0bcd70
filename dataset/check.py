"""The check of a dataset, `python data.py DIR`: report.json, suspects.txt and overview.png.

an image -> its row of RECORD, in worker processes -> finders, each over all rows -> Suspects,
verdicts and numbers -> files

A suspect is something to look at, not an error: handstands exist, and people seen from behind. The
limits are set so that clean data (figures, game renders, photos) has next to none.
"""

import argparse
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import data
import keypoints
from data import ImageDataset, PoseFolder
from dataset.bars import find_bars
from dataset.folder import keypoint_file
from dataset.images import SUFFIXES, DataError, fetch, opened, orientation, read_image
from plots import draw_overview

THUMB = 16                      # side of the thumbnails by which copies are found
RECORD = np.dtype([             # what is kept of an image
    ("sound", "?"),
    ("size", "i4", 2),                          # width, height
    ("told", "f4", 2),                          # the same as the label says; 0: it does not
    ("inner", "i4", 4),                         # x0, y0, x1, y1 of what lies between bars
    ("thumb", "u1", (THUMB, THUMB)),            # grey
    ("pose", "f4", (len(keypoints.JOINTS), 3)),
])
CHUNK = 16                      # images that a worker process hands over at a time
SAME = 2.0                      # grey levels, root mean square: an image saved again as JPEG or in
                                # another size stays below it, frames of game renders start at 2.95
ROWS = 256                      # thumbnails that are compared with all others at a time
LEAST_LIMBS = 4                 # fewer limbs do not tell a person's size
LONG_LIMB = 2.2                 # times its usual length: figures reach 1.90, game renders 1.55
SHOW_LIMB = 50                  # people who show a limb, before its usual length is known
TINY = 2                        # pixels, of a person whose joints are perhaps in 0..1
OUT_OF_DOUBT = 0.5              # of a usual width: less may be a body seen from the side
FEWEST = 10                     # people, before anything is said about all of them
FACING_LEAST = 0.35             # share who face the viewer; figures 0.7, game renders 0.85
CORNER = 0.55                   # share of both sides; some joints of a dataset are beyond it
BEYOND = 0.65                   # the median person is never further right and further down
MIDDLE_X, MIDDLE_Y = (0.44, 0.56), (0.47, 0.65)     # where the median person stands
UNITS = {100: "percent", 1000: "thousandths"}       # that labels have instead of pixels
CENTRE_LINES = {f"{name}s": [keypoints.JOINTS.index(f"{name}_{side}") for side in ("left", "right")]
                for name in ("eye", "ear", "shoulder", "hip")}
SHOWN = 12                      # suspects in the overview
MEMORISED = 100, 250            # passes over the images after which the held-out loss rises: 96 to
                                # 200 in fine-tuning, 220 to 440 else; of 20 to 200 images
BATCH = 32                      # images in a step of stage 2, of all presets
KINDS = {                       # of suspects, the worst first
    "broken": "cannot be used",
    "orphan": "keypoint files without an image, or images that no COCO json names",
    "leak": "held-out images that are also in the training set",
    "size": "images of another shape than their label says",
    "point": "poses with joints in one point",
    "outside": "poses mostly outside their image",
    "limb": "poses with a limb far too long",
    "axes": "poses whose rows and columns look exchanged",
    "sides": "poses whose left and right contradict each other",
    "head down": "poses with the hips above the shoulders",
    "copy": "images that the training set has already",
    "bars": "images with letterbox bars; train.py --trim-bars cuts them off",
}


class Suspect(NamedTuple):
    """Something to look at."""
    kind: str                   # one of KINDS
    score: float                # the higher the worse, within its kind
    file: str
    why: str                    # one sentence
    index: int | None = None    # of the image, if it can be shown


class Checked(NamedTuple):
    """What the finders look at: the N images of all datasets."""
    datasets: list[ImageDataset]        # that of --val after the other
    files: list[str]                    # of image i
    held: np.ndarray                    # bool [N]: not trained on
    rows: np.ndarray                    # RECORD [N]
    broken: dict[str, str]              # file -> why


# --------------------------------------------------------------------------------- a single image

def whole(ds: ImageDataset, i: int) -> tuple[Image.Image, np.ndarray]:
    """Image i with all its pixels, a large JPEG too, and its pose."""
    if isinstance(ds, PoseFolder):
        return ds.whole(i)
    image, pose = ds.source(i)
    return Image.fromarray(image), pose


class Records(Dataset):
    """Item i: (RECORD of image i, why it is broken or None)."""

    def __init__(self, ds: ImageDataset):
        self.ds = ds

    def __len__(self) -> int:
        return len(self.ds)

    def __getitem__(self, i: int) -> tuple[np.ndarray, str | None]:
        row = np.zeros((), RECORD)
        try:
            if isinstance(self.ds, PoseFolder):
                image, (row["pose"], told) = read_image(self.ds.name(i)), self.ds.label(i)
                row["told"] = told or 0
            else:
                image, row["pose"] = whole(self.ds, i)
        except DataError as error:
            return row, str(error)
        row["sound"], row["size"], row["inner"] = True, image.size, find_bars(np.asarray(image))
        row["thumb"] = image.convert("L").resize((THUMB, THUMB), Image.Resampling.BOX)
        return row, None


def gather(datasets: list[ImageDataset], workers: int) -> Checked:
    """Looks at every image once; the result is the same for any number of processes."""
    files, rows, broken, train = [], [], {}, datasets[0]
    total = sum(map(len, datasets))
    with tqdm(total=total, desc="checking", unit="img", dynamic_ncols=True, disable=None) as bar:
        for ds in datasets:
            files += [ds.name(i) for i in range(len(ds))]
            broken |= ds.broken
            loader = DataLoader(Records(ds), CHUNK, num_workers=workers, collate_fn=list,
                                generator=torch.Generator())
            for part in fetch(loader):
                for row, why in part:
                    if why:
                        broken[files[len(rows)]] = why
                    rows.append(row)
                bar.update(len(part))
    held = np.arange(len(files)) >= len(train)
    return Checked(datasets, files, held, np.array(rows, RECORD), broken)


# ----------------------------------------------------------------------------------------- copies

def find_copies(thumbs: np.ndarray, held: np.ndarray) -> np.ndarray:
    """uint8 [N, 16, 16], bool [N] -> int [N]: of each image the first other training image that it
    looks like, mirrored or not, N where there is none; a training image has only earlier ones.

    An image saved again, as JPEG or in another size, is a copy; one cropped by a hundredth is not.
    Two images whose thumbnails are SAME apart are no further apart in mean brightness, so each is
    compared only with those of like brightness.
    """
    N, level = len(thumbs), thumbs.mean((1, 2))
    order = np.argsort(level, kind="stable")
    x, mirrored = ((t.reshape(N, THUMB ** 2).astype(np.float32) - 128)[order]   # exact below 2^24
                   for t in (thumbs, thumbs[..., ::-1]))
    first, level, squares = np.full(N, N), level[order], (x ** 2).sum(1)
    for start in range(0, N, ROWS):
        rows = slice(start, start + ROWS)
        low, high = np.searchsorted(level, (level[rows][0] - SAME, level[rows][-1] + SAME))
        some = np.arange(low, high)[~held[order[low:high]]]
        earlier = (order[some] < order[rows, None]) | held[order[rows], None]
        for other in (x, mirrored):
            apart = squares[rows, None] + squares[some] - 2 * x[rows] @ other[some].T
            near = earlier & (apart <= SAME ** 2 * THUMB ** 2)
            nearest = np.where(near, order[some], N).min(1, initial=N)
            first[order[rows]] = np.minimum(first[order[rows]], nearest)
    return first


def copies(checked: Checked) -> list[Suspect]:
    """Images that occur twice: across training and validation, where they leak, and in training."""
    numbers = np.flatnonzero(checked.rows["sound"])
    thumbs, held = checked.rows["thumb"][numbers].astype(float), checked.held[numbers]
    first = find_copies(checked.rows["thumb"][numbers], held)
    doubles = np.flatnonzero(first < len(numbers))
    times = np.bincount(first[doubles[~held[doubles]]], minlength=len(numbers)) + 1
    found = []
    for i, j in zip(doubles.tolist(), first[doubles].tolist(), strict=True):
        mirrored = ((thumbs[i] - thumbs[j]) ** 2).mean() > SAME ** 2
        other = f"{checked.files[numbers[j]]}{', mirrored' if mirrored else ''}"
        kind, why = (("leak", f"held out, but the same image as {other}, which is trained on")
                     if held[i] else ("copy", f"the same image as {other} ({times[j]} of it)"))
        found.append(Suspect(kind, int(times[j]), checked.files[numbers[i]], why, int(numbers[i])))
    return found


# ------------------------------------------------------------------------------------------ poses

class Bodies(NamedTuple):
    """N poses in units of their own size, so that children, close-ups and chibis compare; NaN where
    joints are missing."""
    limbs: np.ndarray           # [N, 16] length of each of keypoints.LIMBS over its usual length
    torso: np.ndarray           # [N, 2] from the shoulders to the hips, in pixels
    facing: np.ndarray          # [N, 4] of CENTRE_LINES: 1 as wide as usual, < 0 seen from behind


def _quantile(x: np.ndarray, q: float, axis: int) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)             # a slice of nothing but NaN
        return np.nanquantile(x, q, axis=axis) if x.size else np.full(x.shape[1 - axis], np.nan)


def _positive(x: np.ndarray) -> np.ndarray:
    """x, NaN where nothing can be divided by it."""
    return np.where(x > 0, x, np.nan)


def measure(rows: np.ndarray) -> Bodies:
    """RECORD [N] -> Bodies. Foreshortening only shortens, so the longer limbs tell the size."""
    pose = rows["pose"].astype(np.float64)
    xy = np.where(pose[..., 2:] > 0, pose[..., :2] * rows["size"][:, None], np.nan)     # [N, 17, 2]
    a, b = np.array(keypoints.LIMBS).T
    length = np.linalg.norm(xy[:, a] - xy[:, b], axis=-1)                               # [N, 16]
    size = _positive(_quantile(length, 0.75, 1))                    # a first guess
    usual = _positive(_quantile(length / size[:, None], 0.5, 0))
    size = _positive(_quantile(length / usual, 0.75, 1))
    size[np.isfinite(length).sum(1) < LEAST_LIMBS] = np.nan
    hips, shoulders = (xy[:, CENTRE_LINES[name]].mean(1) for name in ("hips", "shoulders"))
    torso = hips - shoulders
    neck = shoulders - xy[:, keypoints.JOINTS.index("nose")]        # where the hips are missing
    down = np.where(np.isnan(torso), neck, torso)
    down = down / _positive(np.linalg.norm(down, axis=1, keepdims=True))
    wide = np.stack([xy[:, left] - xy[:, right] for left, right in CENTRE_LINES.values()], 1)
    facing = wide[..., 0] * down[:, None, 1] - wide[..., 1] * down[:, None, 0]          # [N, 4]
    facing = facing / size[:, None]
    return Bodies(length / size[:, None] / usual, torso,
                  facing / _positive(_quantile(np.abs(facing), 0.5, 0)))


def odd_poses(checked: Checked) -> tuple[list[Suspect], dict[str, str], dict]:
    """(suspects, verdicts on the whole dataset, numbers) about the poses."""
    numbers = np.flatnonzero(checked.rows["sound"])
    rows = checked.rows[numbers]
    body, found = measure(rows), []

    def suspect(kind: str, scores: np.ndarray, least: float, why: Callable[[int], str]) -> None:
        """Those whose score is above `least`."""
        with np.errstate(invalid="ignore"):
            for i in np.flatnonzero(scores > least).tolist():
                found.append(Suspect(kind, float(scores[i]), checked.files[numbers[i]], why(i),
                                     int(numbers[i])))

    seen = rows["pose"][..., 2] > 0                                                     # [N, 17]
    outside = seen & ~keypoints.on_canvas(rows["pose"])
    suspect("outside", outside.sum(1) / np.maximum(seen.sum(1), 1), 0.5,
            lambda i: f"{outside[i].sum()} of {seen[i].sum()} joints lie outside the image")
    xy = rows["pose"][..., :2]
    together = ((xy[:, :, None] == xy[:, None]).all(-1) & seen[:, None]).sum(-1) * seen
    pixels, unseen = xy * rows["size"][:, None], ~seen[..., None]
    span = np.where(unseen, -np.inf, pixels).max(1) - np.where(unseen, np.inf, pixels).min(1)
    tiny = span.max(1) < TINY
    suspect("point", np.where(tiny, seen.sum(1), together.max(1)), 2,
            lambda i: f"{together[i].max()} joints lie in one point" if not tiny[i] else
            f"all joints lie within {TINY} pixels; perhaps they are in 0..1, or in another unit")
    limbs = np.nan_to_num(body.limbs) * (np.isfinite(body.limbs).sum(0) >= SHOW_LIMB)
    suspect("limb", limbs.max(1), LONG_LIMB,
            lambda i: "{} to {} is {:.1f} times as long as usual for a person of this size".format(
                *(keypoints.JOINTS[j] for j in keypoints.LIMBS[limbs[i].argmax()]),
                limbs[i].max()))
    verdicts, about = judge(body)
    dx, dy, facing = *body.torso.T, _quantile(body.facing, 0.5, 1)
    if "axes" in verdicts:
        suspect("axes", dy / (np.abs(dx) + 1e-9), 2,
                lambda i: "it stands upright, unlike most of this dataset")
    else:
        # Exchanged axes lay a person down, the head to the left, and mirror it. People really lie
        # both ways: where not many more lie this way, only those seen from behind are suspects.
        left, right = (sign * dx > 2 * np.abs(dy) for sign in (1, -1))
        many = left.sum() > 3 * (right.sum() + 1)
        suspect("axes", left * np.where(many, 1.0, -np.nan_to_num(facing)), OUT_OF_DOUBT,
                lambda i: "it lies with the head to the left; with rows and columns exchanged it "
                          "would stand")
        if "upright" not in verdicts:
            suspect("head down", -dy / (np.abs(dx) + 1e-9), 0.5,
                    lambda i: "the hips are above the shoulders")
    sides = np.nan_to_num(body.facing)
    suspect("sides", np.minimum(sides.max(1), -sides.min(1)), OUT_OF_DOUBT,
            lambda i: "by the {} it faces the viewer, by the {} it looks away".format(
                *(list(CENTRE_LINES)[j] for j in (sides[i].argmax(), sides[i].argmin()))))
    about["joints"] = {
        name: {"missing": int((~seen[:, j]).sum()), "outside": int(outside[:, j].sum())}
        for j, name in enumerate(keypoints.JOINTS)}
    return found, verdicts, about


def judge(body: Bodies) -> tuple[dict[str, str], dict]:
    """What is wrong with most poses, {"axes", "upright" or "sides": sentence}, and the shares that
    this rests on."""
    torso, verdicts = body.torso[np.isfinite(body.torso).all(1)], {}
    facing = _quantile(body.facing, 0.5, 1)
    facing = facing[np.abs(np.nan_to_num(facing)) > OUT_OF_DOUBT]
    dx, dy = torso.T
    lying, down, toward = (float(x.mean()) if len(x) else None
                           for x in (np.abs(dx) > np.abs(dy), dy < 0, facing > 0))
    if len(torso) >= FEWEST and lying > 0.5:
        verdicts["axes"] = (
            f"rows and columns look exchanged: from shoulders to hips, {lying:.0%} of {len(torso)} "
            f"people lie, {(dx > 0).mean():.0%} of all with the head to the left")
    elif len(torso) >= FEWEST and down > 0.5:
        verdicts["upright"] = (
            f"up and down look exchanged: {down:.0%} of {len(torso)} people have the hips above "
            "the shoulders; y counts from the top")
    if len(facing) >= FEWEST:
        likely = 1 - toward if verdicts else toward         # both exchanges mirror people
        if likely < FACING_LEAST:
            verdicts["sides"] = (
                f"left and right look exchanged: only {likely:.0%} of {len(facing)} people face "
                "the viewer, if left is the person's own")
    return verdicts, {"torsos": len(torso), "torsos_lying": lying, "torsos_head_down": down,
                      "facing_the_viewer": toward}


# --------------------------------------------------------------------------------- files and bars

def orphans(datasets: dict[str, ImageDataset]) -> list[Suspect]:
    """Of {root: dataset}: keypoint files without an image, and images beside those of a COCO json
    that no json names. A list is a choice, so it has none."""
    found, folders = [], {root: ds for root, ds in datasets.items() if isinstance(ds, PoseFolder)}
    named = {os.path.abspath(path) for ds in folders.values()
             for path in (*ds.paths, *ds.broken, *ds.skipped)}
    for root, ds in folders.items():
        if Path(root, "keypoints").is_dir():
            known = {keypoint_file(path) for path in (*ds.paths, *ds.broken, *ds.skipped)}
            why = "there is no image of this name in images/"
            found += [Suspect("orphan", 0, str(file), why)
                      for file in Path(root, "keypoints").rglob("[!.]*.json")
                      if str(file) not in known]
        elif ds.labels and not isinstance(ds.labels[0], str):           # COCO
            found += [Suspect("orphan", 0, str(file), "no COCO json names it")
                      for folder in {Path(path).parent for path in ds.paths}
                      for file in folder.iterdir()
                      if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
                      and os.path.abspath(file) not in named]
    return found


def misshapen(checked: Checked) -> list[Suspect]:
    """Images of another shape than their label says: turned, cropped or distorted, so that the
    joints may be elsewhere. The same shape in another size is fine: joints are in 0..1."""
    found = []
    for i in np.flatnonzero(checked.rows["sound"] & checked.rows["told"].all(1)).tolist():
        (W, H), (w, h) = checked.rows["size"][i].tolist(), checked.rows["told"][i].tolist()
        off = abs(W * h - H * w) / max(W, H, w, h)          # in pixels, of the smaller one
        if off > 1:
            with opened(checked.files[i]) as image:
                turned = orientation(image)
            why = f"its label is for {w:g} x {h:g} pixels, the upright image has {W} x {H}"
            found.append(Suspect("size", off, checked.files[i], why + (
                f"; EXIF orientation {turned} turns it, and the "
                "label must be for the upright image" if turned > 1 else
                "; give the image that was labelled"), i))
    return found


def wrong_unit(checked: Checked) -> dict[str, str]:
    """{"unit": sentence} where the joints of all images look as if they were not in the unit of the
    size that the label gives: people then stand in a corner, by x and by y."""
    rows = checked.rows[checked.rows["sound"] & (checked.rows["pose"][..., 2] > 0).any(1)]
    if len(rows) < FEWEST:
        return {}
    size = np.where(rows["told"] > 0, rows["told"], rows["size"])[:, None]              # [N, 1, 2]
    xy = np.where(rows["pose"][..., 2:] > 0, rows["pose"][..., :2], np.nan)             # [N, 17, 2]
    least, most = (_quantile(xy.reshape(-1, 2), q, 0) for q in (0.02, 0.98))
    centres = (np.nanmin(xy, 1) + np.nanmax(xy, 1))[:, None] / 2                        # [N, 1, 2]

    def in_the_middle(centres: np.ndarray) -> np.ndarray:
        x, y = np.median(centres, axis=(0, 1))
        return np.array([MIDDLE_X[0] < x < MIDDLE_X[1], MIDDLE_Y[0] < y < MIDDLE_Y[1]])

    for unit, name in UNITS.items():
        if (not in_the_middle(centres).any() and in_the_middle(centres * size / unit).all()
                and (_quantile((xy * size).reshape(-1, 2), 0.98, 0) < 1.1 * unit).all()):
            return {"unit": f"the joints look like {name} of the image's sides instead of pixels: "
                            "only then people stand in the middle of their images; convert them"}
    if (most < CORNER).all() or (np.median(centres, axis=(0, 1)) > BEYOND).all():
        return {"unit": f"nearly all joints have x in {least[0]:.2f}..{most[0]:.2f} and y in "
                        f"{least[1]:.2f}..{most[1]:.2f}, where 0..1 is the image: they look as if "
                        "they were in another unit than its width and height; convert them"}
    return {}


def barred(checked: Checked) -> list[Suspect]:
    """Images with letterbox bars; the score is the share of the image that they take."""
    found = []
    for i in np.flatnonzero(checked.rows["sound"]).tolist():
        (W, H), (x0, y0, x1, y1) = (checked.rows[key][i].tolist() for key in ("size", "inner"))
        if (x0, y0, x1, y1) != (0, 0, W, H):
            widths = {"left": x0, "right": W - x1, "top": y0, "bottom": H - y1}
            bars = ", ".join(f"{n} at the {side}" for side, n in widths.items() if n)
            found.append(Suspect("bars", 1 - (x1 - x0) * (y1 - y0) / (W * H), checked.files[i],
                                 f"of {W} x {H} pixels, {bars} are of one colour", i))
    return found


# ----------------------------------------------------------------------------------------- report

def framed(checked: Checked, i: int, side: int) -> np.ndarray:
    """The whole image i with its skeleton on a square: uint8 [side, side, 3]."""
    train = checked.datasets[0]
    ds, i = (train, i) if i < len(train) else (checked.datasets[1], i - len(train))
    image, pose = whole(ds, i)
    square = ImageOps.pad(image, (side, side), Image.Resampling.BICUBIC, color="white")
    return keypoints.draw(keypoints.fit(pose, image.size, "letterbox"), side, np.asarray(square))


def worst(suspects: list[Suspect]) -> list[Suspect]:
    """At most SHOWN of sorted suspects, as many of each kind, the worst first."""
    images = [suspect for suspect in suspects if suspect.index is not None]
    each = SHOWN // max(1, len({suspect.kind for suspect in images}))
    return [suspect for kind in KINDS for suspect in [s for s in images if s.kind == kind][:each]]


def cut_off(rows: np.ndarray) -> dict[str, int]:
    """How many people, and how many of their joints, are not inside the square around them."""
    lost = []
    for pose, size in zip(rows["pose"], rows["size"], strict=True):
        box = data.place_square(size.tolist(), pose, size.min()) / np.tile(size, 2)
        inside = keypoints.on_canvas(keypoints.crop(pose, box))
        lost.append(int((keypoints.on_canvas(pose) & ~inside).sum()))
    return {"people": sum(n > 0 for n in lost), "joints": sum(lost)}


def make_report(root: str, checked: Checked, suspects: list[Suspect], verdicts: dict,
                about: dict) -> dict:
    """Everything that is said of a dataset, in the types of JSON."""
    sound, datasets = checked.rows["sound"], checked.datasets
    size = checked.rows["size"][sound]
    oblong = size[:, 0] != size[:, 1]
    short = np.sort(size.min(1))
    step = np.floor(2 * np.log2(short) + 1e-9).astype(int)          # powers of sqrt 2: 64, 91, 128
    train, groups = datasets[0], datasets[0].groups()
    held_out_of = list(dict.fromkeys(
        group for group, held in zip(groups, checked.held, strict=False) if held))
    short_side = {"histogram": {}}
    if len(short):
        short_side = {"min": int(short[0]), "median": int(short[len(short) // 2]),
                      "max": int(short[-1]),
                      "histogram": {f"{2 ** (k / 2):.0f}+": int((step == k).sum())
                                    for k in range(step[0], step[-1] + 1)}}
    return {
        "root": root, "verdicts": verdicts,
        "images": {"found": sum(len(ds) + len(ds.broken) for ds in datasets),
                   "sound": int(sound.sum()), "broken": len(checked.broken),
                   "without_a_person": sum(len(ds.skipped) for ds in datasets),
                   "held_out": int((checked.held & sound).sum()),
                   "not_square": int(oblong.sum())},
        "short_side": short_side, "groups": len(set(groups)), "held_out_of": held_out_of,
        "metadata": train.metadata if isinstance(train, PoseFolder) else "",
        "labels": data.describe_labels(train),
        "cut_off": cut_off(checked.rows[sound][oblong]), **about,
        "suspects": [{"kind": s.kind, "file": s.file, "why": s.why, "score": round(s.score, 4)}
                     for s in suspects],
    }


def describe(report: dict) -> Iterator[str]:
    """The lines that are printed."""
    told, short = report["images"], report["short_side"]
    n, joints = told["sound"], report["joints"].values()

    def percent(count: int, of: int) -> str:
        return f"{count} ({count / max(of, 1):.1%})"

    yield (f"images      {told['found']} with a pose, {n} sound, {told['broken']} broken, "
           f"{told['without_a_person']} more without a person or not labelled yet")
    if n:
        yield (f"short side  {short['min']} min, {short['median']} median, {short['max']} max "
               f"pixels; {told['not_square']} not square")
        missing, outside = (sum(joint[key] for joint in joints) for key in ("missing", "outside"))
        yield (f"joints      {n * len(joints)}, {percent(missing, n * len(joints))} missing, "
               f"{percent(outside, n * len(joints))} outside the image")
        if told["not_square"]:
            cut = report["cut_off"]
            yield (f"crops       {percent(cut['people'], n)} people do not fit into the square "
                   f"around them, {cut['joints']} joints are cut off")
        of = f", of {data.shorten(report['held_out_of'])}" if report["held_out_of"] else ""
        yield (f"groups      {report['groups']}; {n - told['held_out']} images to train on, "
               f"{percent(told['held_out'], n)} held out{of}")
        soon, late = (passes * (n - told["held_out"]) // BATCH for passes in MEMORISED)
        yield (f"memorising  an estimate: the held-out loss rises after about step {soon:,} of "
               f"stage 2 with --init, {late:,} from nothing; --patience 3 ends a run there")
        if report["metadata"]:
            yield f"metadata    {report['metadata']}"
        if report["labels"]:
            yield f"labels      {report['labels']}"
        people = {"torsos_lying": "lie", "torsos_head_down": "are head down",
                  "facing_the_viewer": "face the viewer"}
        yield "people      " + ", ".join(f"{report[key]:.1%} {what}" for key, what in people.items()
                                         if report[key] is not None)
    for kind, what in KINDS.items():
        suspects = [s for s in report["suspects"] if s["kind"] == kind]
        if suspects:
            of = told["found"] if kind == "broken" else n
            many = len(suspects) if kind == "orphan" else percent(len(suspects), of)
            yield f"{kind:<12}{many} {what}"
        for s in suspects[:3]:
            yield "  " + (s["why"] if s["file"] in s["why"] else f"{s['file']}: {s['why']}")
    for verdict in report["verdicts"].values():
        yield f"VERDICT     {verdict}"
    if not report["verdicts"]:
        odd = len({s["file"] for s in report["suspects"]})
        yield (f"{percent(odd, told['found'])} need a look; overview.png shows the worst." if odd
               else "No issues found.")


# ---------------------------------------------------------------------------------------- command

def check(args: argparse.Namespace) -> int:
    """Writes the files, prints what there is to say; returns the exit status."""
    datasets = {root: PoseFolder(root, args.size, limit=1) if data.is_folder(root) else
                data.open_all(root, args.size) for root in (args.root, args.val) if root}
    data.check_out(args.out, *datasets)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    checked = gather(list(datasets.values()), args.workers)
    train, few = datasets[args.root], {}
    if not args.val and isinstance(train, PoseFolder):
        try:
            checked.held[data.split(train)[1].indices] = True
        except DataError as error:
            few = {"few": str(error)}
    usable = (checked.held & checked.rows["sound"]).sum()
    if isinstance(train, PoseFolder) and not few and usable < data.HELD_OUT_LEAST:
        few = {"few": f"{usable} held-out images can be used and stage 2 needs "
                      f"{data.HELD_OUT_LEAST}; add images, or give others with --val"}
    odd, verdicts, about = odd_poses(checked)
    verdicts = few | wrong_unit(checked) | verdicts
    suspects = [Suspect("broken", 0, file, why) for file, why in checked.broken.items()]
    suspects += orphans(datasets) + copies(checked) + misshapen(checked) + odd + barred(checked)
    suspects.sort(key=lambda s: (list(KINDS).index(s.kind), -s.score, s.file))
    report = make_report(args.root, checked, suspects, verdicts, about)
    draw_overview(out / "overview.png", checked, suspects, worst(suspects), report,
                  lambda i: framed(checked, i, args.size))
    (out / "report.json").write_text(json.dumps(report, indent=1, allow_nan=False))
    lines = ["\t".join(re.sub(r"\s", " ", word) for word in (s.file, s.kind, s.why)) + "\n"
             for s in suspects]
    (out / "suspects.txt").write_text("".join(lines), "utf-8", "surrogateescape")
    lines = [*describe(report), f"wrote {out}/report.json, {out}/suspects.txt ({len(suspects)} "
                                f"lines), {out}/overview.png"]
    print("\n".join(lines))
    if len(checked.broken) > data.BROKEN_LIMIT * report["images"]["found"]:
        print(f"{args.root}: more than {data.BROKEN_LIMIT:.0%} of the images are broken, so "
              "training would stop; take them out", file=sys.stderr)
        return 2
    return 0


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="data.py",
                                     description="Checks a dataset and reports on it.")
    add = parser.add_argument
    add("root", help="folder, list of images or COCO json; or figures:N")
    add("--out", default="check", metavar="DIR",
        help="where report.json, suspects.txt and overview.png go (default: check)")
    add("--val", metavar="DIR", help="your own held-out images, to find those that are in both")
    add("--workers", type=int, default=min(8, os.cpu_count() or 1),
        help="processes (default: one a core)")
    add("--size", type=int, default=256, help="side of the images in the overview (default: 256)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Checks what the command line names; returns the exit status."""
    try:
        return check(parse_args(argv))
    except (ValueError, OSError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("data.py: interrupted", file=sys.stderr)
        return 130
