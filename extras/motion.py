"""Series of poses: pose files that are frames in, one pose a frame out; and what lies between two poses."""
from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

import data
from diffusion import Seed
from formats.pose_files import NobodyFound, Poses, fitted, load_poses, name_of
from keypoints import PoseError

LONGEST_GAP = 25                # frames without anybody that are filled in, about a second


class Plan(NamedTuple):
    """What is drawn: for each pose n pictures."""
    poses: np.ndarray               # [P, 17, 3] float64: the seed's cell ids are floors of these very numbers
    names: list[str]                # [P]
    seeds: list[Seed]               # [P n]
    n: int
    only: int | None = None         # the one of these pictures that is wanted, from 0


def read_motion(paths: Iterable[str], fit_how: str = "letterbox", frames: int | None = None,
                **how: object) -> tuple[list[np.ndarray], list[str]]:
    """The frames of a motion as `read_poses` gives poses: all of all files, those of a folder in the natural order of
    their names. A frame in which nobody was found lies between its neighbours; of more than `frames` so many are taken.
    """
    files = [file for path in paths for file in (frame_files(Path(path)) if Path(path).is_dir() else [Path(path)])]
    poses, names, taken_for = [], [], ""                    # None for a frame without anybody
    for file in files:
        found = load_frames(file, **how)
        if found is None:
            poses.append(None)
            names.append(file.stem)
            continue
        taken_for = taken_for or found.taken_for
        place = {picture: i for i, picture in enumerate(found.pictures)}
        for frame in sorted(found.frames, key=natural):
            poses.append(fitted(found, place[frame], fit_how) if frame in place else None)
            names.append(name_of(frame, found.frames, file))
    seen, where = sum(pose is not None for pose in poses), ", ".join(paths)
    if seen < 2:
        raise ValueError(f"--motion needs at least two frames with somebody in them, and {where} has {seen}")
    poses, names = fill_gaps(frame_numbers(names), poses, names)
    taken = data.evenly(len(poses), frames or len(poses))
    print(f"{where}: {taken_for}; {seen} frames"
          + (f" and {len(poses) - seen} without anybody, filled in from their neighbours" if len(poses) > seen else "")
          + (f", {len(taken)} of them drawn" if len(taken) < len(poses) else ""))
    return [poses[i] for i in taken], [names[i] for i in taken]


def natural(name: str) -> list:
    """A key that sorts frame2 before frame10."""
    return [int(part) if part.isdecimal() else part.lower() for part in re.split(r"(\d+)", name)]


def frame_files(folder: Path) -> list[Path]:
    """The pose files in a folder, in natural order: all but pictures and what is hidden."""
    files = sorted((file for file in folder.iterdir() if file.is_file() and not file.name.startswith(".")
                    and file.suffix.lower() not in data.SUFFIXES), key=lambda file: natural(file.name))
    if not files:
        raise ValueError(f"{folder} has no pose files in it; --motion takes a folder of one file a frame, or a file of "
                         "several frames")
    return files


def load_frames(file: Path, **how: object) -> Poses | None:
    """load_poses; None where nobody was found, or fewer than the --person asked for."""
    try:
        return load_poses(file, **how)
    except NobodyFound:
        return None
    except PoseError:
        if how.get("person") in (None, 1):
            raise
        load_frames(file, **how | {"person": 1})            # raises for a file that nobody can be read from
        return None


def frame_numbers(names: list[str]) -> list[int]:
    """Which frame each is, from 0: by the last number in names that differ in numbers alone and rise, in its stride."""
    numbers = [[int(n) for n in re.findall(r"\d+", name)][-1:] for name in names]
    gaps = [b[0] - a[0] for a, b in zip(numbers[:-1], numbers[1:], strict=True) if a and b]
    if len({re.sub(r"\d+", "", name) for name in names}) > 1 or len(gaps) < len(names) - 1 or min(gaps) < 1:
        return list(range(len(names)))
    return [(n - numbers[0][0]) // math.gcd(*gaps) for n, in numbers]


def fill_gaps(numbers: list[int], poses: list[np.ndarray | None],
              names: list[str]) -> tuple[list[np.ndarray], list[str]]:
    """A pose for every frame from the first with one to the last; over gaps longer than LONGEST_GAP it jumps."""
    there = [i for i, pose in enumerate(poses) if pose is not None]
    filled, called = [poses[there[0]]], [names[there[0]]]
    for i, j in zip(there[:-1], there[1:], strict=True):
        gap = numbers[j] - numbers[i]
        for k in range(1, gap) if gap - 1 <= LONGEST_GAP else ():
            filled.append(between(poses[i], poses[j], k / gap))
            called.append(f"{names[i]} + {k}")
        filled.append(poses[j])
        called.append(names[j])
    return filled, called


def between(a: np.ndarray, b: np.ndarray, share: float) -> np.ndarray:
    """The pose [17, 3] so far on the way from a to b, joint by joint; in between, only joints that both have."""
    if share in (0, 1):
        return b if share else a
    seen = (a[:, 2:] > 0) & (b[:, 2:] > 0)
    return np.concatenate([((1 - share) * a + share * b)[:, :2], np.ones((len(a), 1))], axis=1) * seen


def morph(poses: np.ndarray, names: list[str], frames: int, seed: int, n: int) -> Plan:
    """`frames` poses on the way through all of [P, 17, 3], and the noise of each on the way through P seeds."""
    P = len(poses)
    plan = Plan([], [], [], n)
    for at in np.linspace(0, P - 1, frames).tolist():
        k = min(int(at), P - 2)
        share = at - k
        plan.poses.append(between(poses[k], poses[k + 1], share))
        plan.names.append(names[k + round(share)] if share in (0, 1) else f"{share:.0%} to {names[k + 1]}")
        for i in range(n):
            a, b = seed + i * P + k, seed + i * P + k + 1
            plan.seeds.append((a, b, share) if 0 < share < 1 else b if share else a)
    return plan._replace(poses=np.stack(plan.poses))
