"""The check of a dataset, `python data.py DIR`: pictures and poses in, report.json, suspects.txt and overview.png out.

a picture -> its row of RECORD, in worker processes -> finders, each over all rows -> Suspects and numbers -> files

A suspect is something to look at, not an error: handstands exist, and people seen from behind. Limits are set so that
clean data (the figures, game renders, photos) has next to none.
"""

import argparse
import json
import math
import os
import re
import shutil
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

import keypoints
from data import (
    BROKEN_LIMIT,
    SUFFIXES,
    DataError,
    Pictures,
    PoseFolder,
    check_out,
    fetch,
    is_folder,
    keypoint_folder,
    leaves_folder,
    make_folder,
    open_all,
    read_picture,
    split,
)
from dataset.figures import SIDES
from formats import pose_files
from plots import draw_overview

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
SHOWN = 12                      # suspects in the overview


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
    pose = keypoints.crop(pose_files.read_seed(path), box)[:, 1::-1] * keypoints.SEED_CANVAS        # [17, 2] row, col
    joints = dict(zip(keypoints.JOINTS, pose.tolist(), strict=True))
    to.write_text(json.dumps(pose_files.read_json(path) | joints))


def _cut_coco(ds: PoseFolder, kept: set[str], cut: dict[str, tuple[float, ...]], made: Path) -> Path:
    """Writes the COCO json of the pictures kept, and returns where."""
    path, folder = ds.coco
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
        draw_overview(picture, checked, suspects, worst(suspects), report, side, lambda i: framed(checked, i, side))
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
