"""How common a pose is among the training poses: poses in, distances and typical poses out.

Two poses are compared by the joints that both have. Each pose is moved and scaled so that these
joints have their centre at 0 and centroid size 1, which is their RMS distance to the centre
(Kendall 1984). Nothing is rotated: lying is not standing. Centre and size of the whole pose would
be wrong here: the nearest pose to half a person would be a crouching one.

Letters: N, A, B numbers of poses, J = 17 joints, k neighbours.
"""
from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from keypoints import flip

NEIGHBOURS = 8                  # distance to the 8th is the density: fewer are noisy, more blur it
ONE_SIDED = 0.7                 # what a joint of only one pose counts; random figures are 0.7 apart
POINT = 0.01                    # joints nearer together have no shape; annotators scatter more
SHIFTS = 5                      # steps of mean shift; measured: more change nothing
TINY = 1e-9                     # avoids dividing by 0
ROWS = 64                       # poses compared at a time, to fit into a core's cache
UNUSUAL = 0.8                   # a pose rarer than this share of the training poses gets a note
HELPS = 0.1                     # --retarget is suggested where it lowers that share by this


def note_unusual(names: list[str], given: np.ndarray, moved: np.ndarray, typical: float,
                 retargeted: np.ndarray) -> None:
    """Prints a line for each unusual pose: its `unusual` [P] as given, moved by --typical, and what
    --retarget would make of it."""
    for name, before, after, other in zip(names, given, moved, retargeted, strict=True):
        if before > UNUSUAL:
            advice = (f"{percent(after)} with --typical {typical:g}" if typical else
                      f"{percent(other)} with --retarget, which gives it their proportions"
                      if other <= before - HELPS else "--typical 0.5 moves it halfway toward them")
            print(f"{name}: unusual pose: rarer than {percent(before)} of the training poses; "
                  + advice)


def in_words(share: float) -> str:
    """"unusual pose" for a share above UNUSUAL, else "common pose"."""
    return "unusual pose" if share > UNUSUAL else "common pose"


def percent(share: float) -> str:
    """0.979 -> "97 %". Rounds down, so that 100 % means all."""
    return f"{math.floor(100 * share + 1e-9)} %"            # 0.29 * 100 is a little less than 29


class PoseDensity:
    """How dense the training poses are around a pose: the distance to its k-th nearest neighbour.

    Each training pose counts with its mirror image, as in training. Distances are in body sizes.
    Takes a second on one core for N = 4096.
    """

    def __init__(
        self,
        poses: np.ndarray,              # [N, 17, 3]; poses without a visible joint are dropped
        k: int = NEIGHBOURS,            # fewer if there are fewer poses
    ):
        self.poses = poses[(poses[..., 2] > 0).any(axis=1)].astype(np.float64)
        n = len(self.poses)
        self.k = max(1, min(k, 2 * (n - 1)))
        self.shapes = _shapes(np.concatenate([self.poses, flip(self.poses)]))           # [2N, J, 3]
        self._shapes32 = torch.from_numpy(self.shapes).float()
        self.own = np.zeros(n)          # [N] the distance of each training pose to the others
        for i in range(0, n if n > 1 else 0, ROWS):
            d = _distances(self._shapes32[i:min(i + ROWS, n)], self._shapes32)
            row = torch.arange(len(d))
            d[row, i + row] = d[row, n + i + row] = torch.inf       # not to itself
            self.own[i:i + len(d)] = d.topk(self.k, largest=False).values[:, -1].numpy()

    def _nearest(self, poses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest of poses [B, 17, 3]: distances [B, k], ascending, and rows of `shapes`."""
        near = [_distances(part, self._shapes32).topk(self.k, largest=False)
                for part in torch.from_numpy(_shapes(poses)).float().split(ROWS)]
        distances = torch.cat([n.values for n in near]).double().numpy()
        return distances, torch.cat([n.indices for n in near]).numpy()

    def distance(self, poses: np.ndarray) -> np.ndarray:
        """[B] the distance of poses [B, 17, 3] to the k-th nearest training pose."""
        return self._nearest(poses)[0][:, -1]

    def unusual(self, poses: np.ndarray) -> np.ndarray:
        """[B] in 0..1: the share of the training poses that lie denser than each pose."""
        return np.searchsorted(np.sort(self.own), self.distance(poses)) / len(self.own)

    def common(self, n: int) -> np.ndarray:
        """The rows [n] of `poses` that are the most common kinds of pose, the densest first.

        These are density peaks (Rodriguez and Laio 2014): poses whose nearest denser pose is many
        times as far away as their neighbours. A pose and its mirror image are one kind.
        ValueError for more than N.
        """
        count = len(self.poses)
        if n > count:
            raise ValueError(f"--common is {n}, but the checkpoint has only {count} training poses")
        order = np.argsort(self.own, kind="stable")                             # the densest first
        ranked = self._shapes32.unflatten(0, (2, count))[:, order]              # [2, N, J, 3]
        away = np.zeros(count)          # to the nearest denser pose or its mirror image
        for i in range(0, count, ROWS):
            end = min(i + ROWS, count)
            d = _distances(ranked[0, i:end], ranked[:, :end].flatten(0, 1))     # [B, 2 end]
            d = d.unflatten(1, (2, end)).amin(dim=1)                            # [B, end]
            not_denser = torch.arange(end) >= torch.arange(i, end)[:, None]
            away[i:end] = d.masked_fill_(not_denser, torch.inf).amin(dim=1).numpy()
        away[0] = np.inf                                                        # the densest pose
        peaks = np.argsort(-away / np.maximum(self.own[order], POINT), kind="stable")[:n]
        return order[np.sort(peaks)]

    def typical(self, poses: np.ndarray, amount: float) -> np.ndarray:
        """Poses [B, 17, 3] moved toward their neighbours: 0 not at all, 1 to their middle.

        The middle is found by mean shift (Fukunaga and Hostetler 1975). Centre, size and visible
        joints of each pose stay as they are. A joint that no neighbour has keeps its place.
        """
        moved = poses.copy()
        for pose in moved if amount else ():
            given = middle = _shapes(pose)
            for _ in range(SHIFTS):
                middle = self._shifted(middle)
            between = given + amount * (middle - given)
            centre, size = _frame(pose, given[:, 2:])
            xy = _shapes(between)[:, :2] * size + centre    # the mean of two shapes is smaller
            pose[:, :2] = xy * given[:, 2:]
        return moved

    def _shifted(self, shape: np.ndarray) -> np.ndarray:
        """One step of mean shift for a shape [17, 3]: the weighted mean of its neighbours.

        Each neighbour is first fitted to the shape by their shared joints.
        """
        (d,), (rows,) = self._nearest(shape[None])
        near = self.shapes[rows]                                                # [k, J, 3]
        shared = near[..., 2:] * shape[:, 2:]                                   # [k, J, 1]
        (centre, size), (to_centre, to_size) = _frame(near, shared), _frame(shape, shared)
        fitted = (near[..., :2] - centre) / np.maximum(size, TINY) * to_size + to_centre
        weight = shared * np.exp(-(d / max(d[-1], POINT)) ** 2 / 2)[:, None, None]
        total = weight.sum(axis=0)                                              # [J, 1]
        mean = (weight * fitted).sum(axis=0) / np.where(total > 0, total, 1)
        xy = np.where(total > 0, mean, shape[:, :2])
        return _shapes(np.concatenate([xy, shape[:, 2:]], axis=1))


def _frame(poses: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centre [..., 1, 2] and centroid size [..., 1, 1] of the joints with `seen` [..., 17, 1]."""
    count = np.maximum(seen.sum(axis=-2, keepdims=True), 1)
    centre = (poses[..., :2] * seen).sum(axis=-2, keepdims=True) / count
    square = (((poses[..., :2] - centre) * seen) ** 2).sum(axis=(-2, -1), keepdims=True) / count
    return centre, np.sqrt(square)


def _shapes(poses: np.ndarray) -> np.ndarray:
    """Poses [..., 17, 3] with centre 0 and centroid size 1; missing joints become zeros."""
    seen = (poses[..., 2:] > 0).astype(np.float64)
    centre, size = _frame(poses, seen)
    xy = (poses[..., :2] - centre) / np.maximum(size, TINY) * seen
    return np.concatenate([xy, seen], axis=-1)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Distances [A, B] between the shapes [A, 17, 3] and [B, 17, 3], by products of matrices."""
    seen_a, seen_b, xy_a, xy_b = a[..., 2], b[..., 2], a[..., :2], b[..., :2]
    shared = seen_a @ seen_b.T                                          # [A, B] joints in both
    joints = seen_a.sum(-1)[:, None] + seen_b.sum(-1)
    # Sums over the shared joints; then squares and products about their centre.
    ax, ay = (xy_a[..., i] @ seen_b.T for i in (0, 1))
    bx, by = (seen_a @ xy_b[..., i].T for i in (0, 1))
    per = 1 / shared.clamp(min=1)
    square_a = xy_a.square().sum(-1) @ seen_b.T - (ax * ax + ay * ay) * per
    square_b = seen_a @ xy_b.square().sum(-1).T - (bx * bx + by * by) * per
    product = xy_a.flatten(1) @ xy_b.flatten(1).T - (ax * bx + ay * by) * per + POINT ** 2
    sizes = (square_a.clamp_(min=0) + POINT ** 2) * (square_b.clamp_(min=0) + POINT ** 2)
    cosine = product * sizes.rsqrt_()                       # 1: the same shape, -1: upside down
    one_sided = joints - 2 * shared
    squares = 2 * shared * (1 - cosine) + ONE_SIDED ** 2 * one_sided
    return (squares.clamp_(min=0) / (shared + one_sided).clamp_(min=1)).sqrt_()
