"""Series of poses: the frames of a motion out of pose files, and a morph from pose to pose."""
from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np

import data
from dataset.images import SUFFIXES
from diffusion import Seed
from formats.pose_files import NobodyFound, fitted, load_poses, name_of

LONGEST_GAP = 25                # missing frames that are filled in, about a second


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
