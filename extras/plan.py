"""What sample.py draws: its flags and pose files in; poses, their names and images' seeds out."""
from __future__ import annotations

import argparse
import math
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple
from unicodedata import normalize

import numpy as np

import checkpoint
import data
from dataset.images import SUFFIXES
from diffusion import Seed
from extras.density import PoseDensity, in_words, note_unusual
from extras.proportions import retarget
from formats.pose_files import NobodyFound, fitted, load_poses, name_of
from keypoints import draw
from ldm import LDM

DEFAULT_FRAMES = 8              # of a file with many images, and of --morph
LONGEST_GAP = 25                # missing frames that are filled in, about a second


class Plan(NamedTuple):
    """What to draw: n images for each pose."""
    poses: np.ndarray               # [P, 17, 3] float64
    names: list[str]                # [P]
    seeds: list[Seed]               # [P n]
    n: int
    labels: list[str] = []          # [n] of each image of a pose; [] without labels
    before: np.ndarray | None = None    # [P, 17, 3] before --retarget and --typical
    notes: list[list[str]] = []     # [P] what is said under the skeletons

    def for_labels(self, labels: list[str]) -> Plan:
        """The same images once for each of these labels, side by side."""
        rows = [self.seeds[i:i + self.n] for i in range(0, len(self.seeds), self.n)]
        return self._replace(seeds=[seed for row in rows for seed in row * len(labels)],
                             n=self.n * len(labels),
                             labels=[label for label in labels for _ in range(self.n)])

    def called(self, i: int, what: object) -> str:
        """`what` after the label of the i-th image of a pose, where it has one."""
        return f"{self.labels[i]}, {what}" if self.labels else str(what)

    def rows(self, images: list[np.ndarray]) -> list[list[np.ndarray]]:
        """A row for each pose: its skeleton and its samples, all uint8 [S, S, 3]."""
        return [[draw(pose, len(images[0])), *images[p * self.n:(p + 1) * self.n]]
                for p, pose in enumerate(self.poses)]


def read_poses(paths: Iterable[str], fit_how: str = "letterbox", frames: int = DEFAULT_FRAMES,
               **how: object) -> tuple[list[np.ndarray], list[str]]:
    """The poses [17, 3] of all files, fitted to the square image, and a name for each.

    A file of more than `frames` images gives that many poses, evenly spread; `how` goes to
    load_poses. Prints the format of each file. PoseError for a file without a usable pose.
    """
    poses, names = [], []
    for path in paths:
        found = load_poses(path, **how)
        taken = data.evenly(len(found.poses), frames)
        fewer = f", {len(taken)} of them drawn" if len(taken) < len(found.poses) else ""
        print(f"{path}: {found.taken_for}{fewer}")
        poses += [fitted(found, i, fit_how) for i in taken]
        names += [name_of(found.pictures[i], found.poses, path) for i in taken]
    return poses, names


# --------------------------------------------------------------------------------------- a motion

def read_motion(paths: list[str], fit_how: str = "letterbox", frames: int | None = None,
                **how: object) -> tuple[list[np.ndarray], list[str]]:
    """The poses [17, 3] of all frames in files and folders, and a name for each.

    A folder holds one file per frame, in the natural order of their names. A frame without a person
    is interpolated. At most `frames` frames are taken, evenly spread; `how` goes to load_poses.
    ValueError for fewer than two frames with a person.
    """
    files = []
    for path in map(Path, paths):
        files += frame_files(path) if path.is_dir() else [path]
    poses, names, taken_for = [], [], ""                    # None for a frame without a person
    for file in files:
        try:
            found = load_poses(file, **how)
        except NobodyFound:
            poses.append(None)
            names.append(file.stem)
            continue
        taken_for = taken_for or found.taken_for
        index = {picture: i for i, picture in enumerate(found.pictures)}
        for frame in sorted(found.frames, key=natural):
            poses.append(fitted(found, index[frame], fit_how) if frame in index else None)
            names.append(name_of(frame, found.frames, file))
    seen, where = sum(pose is not None for pose in poses), ", ".join(paths)
    if seen < 2:
        raise ValueError(f"--motion needs two or more frames with a person; {where} has {seen}")
    poses, names = fill_gaps(frame_numbers(names), poses, names)
    taken = data.evenly(len(poses), frames or len(poses))
    filled = f" and {len(poses) - seen} interpolated" if len(poses) > seen else ""
    fewer = f", {len(taken)} of them drawn" if len(taken) < len(poses) else ""
    print(f"{where}: {taken_for}; {seen} frames{filled}{fewer}")
    return [poses[i] for i in taken], [names[i] for i in taken]


def natural(name: str) -> list[int | str]:
    """A sort key that puts frame2 before frame10."""
    return [int(part) if part.isdecimal() else part.lower() for part in re.split(r"(\d+)", name)]


def frame_files(folder: Path) -> list[Path]:
    """The pose files in a folder in natural order: all files but images and hidden ones."""
    files = [file for file in folder.iterdir()
             if file.is_file() and not file.name.startswith(".")
             and file.suffix.lower() not in SUFFIXES]
    return sorted(files, key=lambda file: natural(file.name))


def frame_numbers(names: list[str]) -> list[int]:
    """The number of each frame, from 0: the last number in its name, divided by the stride.

    Frames are just counted if their names differ in more than numbers, or the numbers do not rise.
    """
    numbers = [[int(n) for n in re.findall(r"\d+", name)][-1:] for name in names]
    gaps = [b[0] - a[0] for a, b in zip(numbers[:-1], numbers[1:], strict=True) if a and b]
    same_words = len({re.sub(r"\d+", "", name) for name in names}) == 1
    if not same_words or len(gaps) < len(names) - 1 or min(gaps) < 1:
        return list(range(len(names)))
    return [(n - numbers[0][0]) // math.gcd(*gaps) for n, in numbers]


def fill_gaps(numbers: list[int], poses: list[np.ndarray | None],
              names: list[str]) -> tuple[list[np.ndarray], list[str]]:
    """A pose for every frame from the first one with a person to the last.

    A gap longer than LONGEST_GAP frames is left out: the motion jumps there.
    """
    there = [i for i, pose in enumerate(poses) if pose is not None]
    filled, called = [poses[there[0]]], [names[there[0]]]
    for i, j in zip(there[:-1], there[1:], strict=True):
        gap = numbers[j] - numbers[i]
        for k in range(1, gap if gap - 1 <= LONGEST_GAP else 1):
            filled.append(between(poses[i], poses[j], k / gap))
            called.append(f"{names[i]} + {k}")
        filled.append(poses[j])
        called.append(names[j])
    return filled, called


# --------------------------------------------------------------------------------------- a morph

def between(a: np.ndarray, b: np.ndarray, share: float) -> np.ndarray:
    """The pose [17, 3] at `share` of the way from a to b; on the way, the joints that both have."""
    if share in (0, 1):
        return b if share else a
    seen = (a[:, 2:] > 0) & (b[:, 2:] > 0)
    xy = ((1 - share) * a + share * b)[:, :2]
    return np.concatenate([xy, (b if share > 0.5 else a)[:, 2:]], axis=1) * seen


def morph(poses: np.ndarray, names: list[str], frames: int, seed: int,
          n: int) -> tuple[np.ndarray, list[str], list[Seed]]:
    """`frames` poses on the way through all of [P, 17, 3], their names, and their seeds [frames n].

    The i-th image of a pose goes through the seeds from seed + i P to seed + i P + P - 1.
    """
    P = len(poses)
    if P < 2:
        raise ValueError(f"--morph needs two or more poses; there is only {names[0]}")
    way, called, seeds = [], [], []
    for at in np.linspace(0, P - 1, frames).tolist():
        k = min(int(at), P - 2)                             # between poses k and k + 1
        share = at - k
        way.append(between(poses[k], poses[k + 1], share))
        called.append(names[k + round(share)] if share in (0, 1) else
                      f"{share:.0%} to {names[k + 1]}")
        for i in range(n):
            a, b = seed + i * P + k, seed + i * P + k + 1
            seeds.append((a, b, share) if 0 < share < 1 else b if share else a)
    return np.stack(way), called, seeds


# ------------------------------------------------------------------------------ what is asked for

def plan_of(args: argparse.Namespace, payload: dict, labels: Collection[int] = ()) -> Plan:
    """The poses to draw, from files or from the checkpoint, and the seeds of their images. `labels`
    are those asked for, whose proportions --retarget takes."""
    trained = checkpoint.training_poses(payload, args.ckpt)
    if trained is None and (args.common or args.typical or args.retarget):
        raise ValueError("--common, --typical and --retarget need training poses, which "
                         f"{args.ckpt} does not have; train stage 2 with: "
                         f"{checkpoint.HOW_TO_MAKE['ldm']}")
    density = None if trained is None else PoseDensity(trained)
    frames = args.frames or DEFAULT_FRAMES
    how = {"format": args.format, "person": args.person, "canvas": args.canvas,
           "min_confidence": args.min_confidence}
    if args.common:
        poses = density.poses[density.common(args.common)]
        names = [f"common {i + 1}" for i in range(args.common)]
    elif args.motion:
        poses, names = read_motion(args.poses, args.fit, args.frames, **how)
    elif not args.poses:                    # --label alone
        poses, names = [data.NO_POSE], ["no pose"]
    else:
        per_file = DEFAULT_FRAMES if args.morph else frames
        poses, names = read_poses(args.poses, args.fit, per_file, **how)
    poses = np.stack(poses)                 # float64: the seed's cell ids are floors of these
    before, notes = None, []
    if density and args.poses:
        other = poses
        if args.retarget or not args.motion:    # for 100 frames this takes a second
            other = retarget(poses, checkpoint.training_poses(payload, args.ckpt, labels))
        asked, given = poses, other if args.retarget else poses
        poses = density.typical(given, args.typical)
        if not args.motion:                 # a motion has too many
            was, of_other, now = (density.unusual(each) for each in (asked, other, poses))
            note_unusual(names, of_other if args.retarget else was, now, args.typical, of_other)
            moved = args.retarget or args.typical
            before = asked if moved else None
            notes = [[in_words(share) for share in shares]
                     for shares in (zip(was, now, strict=True) if moved else zip(now))]
    if args.morph:
        return Plan(*morph(poses, names, frames, args.seed, args.n), args.n)
    return Plan(poses, names, [args.seed + i for i in range(args.n)] * len(poses), args.n,
                before=before, notes=notes)


def labels_of(args: argparse.Namespace, ldm: LDM, payload: dict) -> dict[str, int]:
    """The labels that --label asks for, by name; ValueError for one that the model lacks."""
    known = checkpoint.label_names(payload, args.ckpt)
    if args.label and not known:
        raise ValueError(f"--label is {args.label[0]}, but {args.ckpt} was trained without labels; "
                         "leave --label out, or train with --labels")
    if not args.poses and not args.common and not ldm.supports_guidance:
        raise ValueError(f"{args.ckpt} was trained without dropping poses, so it cannot draw by "
                         "label alone; give a pose, such as --common 1")
    asked = [normalize("NFC", name) for name in args.label or ()]
    if "all" in asked and "all" not in known:
        asked = known
    for name in asked:
        if name not in known:
            raise ValueError(f"--label is {name!r}; {args.ckpt} knows "
                             f"{', '.join(map(repr, known))}, and all for each of them")
    return {name: known.index(name) for name in asked}
