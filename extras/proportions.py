"""Proportions: poses of one body in; the same poses with the limb lengths of another body out.

A limb leads from a joint's parent to the joint. Its direction stays; its length becomes that of the
training poses, relative to the torso. Images show limbs foreshortened, so one length for each limb
would be wrong: the lengths are those of the training poses whose limbs point most alike, weighted
by inverse distance (Shepard 1968, local as of Franke and Nielson 1980). A training pose therefore
comes back as it is.

Letters: N training poses, each with its mirror image; L limbs of a pose.
"""
from __future__ import annotations

import numpy as np

from keypoints import flip

NECK, PELVIS = 17, 18           # the middle of the shoulders, and of the hips
SHOULDERS, HIPS, ANKLES = (5, 6), (11, 12), (15, 16)
# Parent of each point, parents first.
PARENTS = {NECK: PELVIS, 5: NECK, 6: NECK, 11: PELVIS, 12: PELVIS, 7: 5, 8: 6, 9: 7, 10: 8, 13: 11,
           14: 12, 15: 13, 16: 14, 0: NECK, 1: 0, 2: 0, 3: 1, 4: 2}
NEIGHBOURS = 8                  # training poses whose lengths are mixed
ONE_SIDED = 1.0                 # square of what a limb counts that a training pose lacks
TINY = 1e-9                     # avoids dividing by 0


def retarget(poses: np.ndarray, trained: np.ndarray) -> np.ndarray:
    """Poses [P, 17, 3] with the proportions of the training poses [N, 17, 3].

    The torso keeps its length and its lowest foot its height. A pose without shoulders or hips has
    no torso and stays as it is.
    """
    trained = with_middles(np.concatenate([trained, flip(trained)]).astype(np.float64))
    trained = trained[(trained[:, [NECK, PELVIS], 2] > 0).all(axis=1)]              # [N, 19, 3]
    return np.stack([_retargeted(pose, trained) for pose in poses]) if len(trained) else poses


def with_middles(poses: np.ndarray) -> np.ndarray:
    """Poses [..., 17, 3] -> [..., 19, 3] with NECK and PELVIS; where one of two joints is missing,
    the other one is the middle."""
    middles = []
    for pair in (SHOULDERS, HIPS):
        seen = poses[..., pair, 2:] > 0                                             # [..., 2, 1]
        xy = (poses[..., pair, :2] * seen).sum(axis=-2) / np.maximum(seen.sum(axis=-2), 1)
        middles.append(np.concatenate([xy, seen.any(axis=-2)], axis=-1))
    return np.concatenate([poses, np.stack(middles, axis=-2)], axis=-2)


def limbs_of(points: np.ndarray, ends: list[int],
             starts: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lengths [..., L], directions [..., L, 2], and which limbs there are [..., L], of points
    [..., 19, 3]. A shoulder or hip alone is its own middle: that is no limb."""
    vectors = points[..., ends, :2] - points[..., starts, :2]
    length = np.hypot(vectors[..., 0], vectors[..., 1])
    there = (points[..., ends, 2] > 0) & (points[..., starts, 2] > 0) & (length > TINY)
    return length, vectors / np.maximum(length, TINY)[..., None], there


def _retargeted(pose: np.ndarray, trained: np.ndarray) -> np.ndarray:
    points = with_middles(pose.astype(np.float64))
    if not (points[[NECK, PELVIS], 2] > 0).all():
        return pose
    ends, starts = [], []
    for point, parent in PARENTS.items():
        if points[point, 2] > 0:
            while not points[parent, 2] > 0:                # a missing joint is skipped
                parent = PARENTS[parent]
            ends.append(point)
            starts.append(parent)
    length, direction, there = limbs_of(points, ends, starts)
    lengths, directions, seen = limbs_of(trained, ends, starts)                     # [N, L]
    if not there[0]:
        return pose
    squares = np.where(seen, ((directions - direction) ** 2).sum(-1), ONE_SIDED)
    d = np.maximum(np.sqrt((squares * there).sum(1) / there.sum()), TINY)           # [N]
    radius = np.sort(d)[min(NEIGHBOURS, len(d) - 1)] * (1 + TINY) + TINY
    weight = (np.maximum(radius - d, 0) / (radius * d))[:, None] ** 2 * seen        # [N, L]
    mean, torso = (weight * lengths).sum(0), (weight * lengths[:, :1]).sum(0)       # [L]
    known = there & (torso > 0)
    length = np.where(known, length[0] * mean / np.where(known, torso, 1), length)

    moved = points.copy()
    for point, parent, vector in zip(ends, starts, length[:, None] * direction, strict=True):
        moved[point, :2] = moved[parent, :2] + vector
    feet = [joint for joint in ANKLES if points[joint, 2] > 0]
    if feet:
        moved[:, 1] += points[feet, 1].max() - moved[feet, 1].max()
    return np.where(pose[:, 2:] > 0, moved[:len(pose)], pose)
