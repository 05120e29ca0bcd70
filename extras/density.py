"""How common a pose is among those that a model was trained on: poses [N, 17, 3] in, distances and typical poses out.

Letters in shape comments: N, A, B numbers of poses, J = 17 joints, k neighbours.
"""
from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from keypoints import JOINTS, flip

# Two poses are compared by the joints that both have, each time moved and scaled so that these joints have their centre
# at 0 and centroid size 1, which is their RMS distance to the centre (Kendall 1984). Nothing is turned: lying is not
# standing. The centre and size of a whole pose would not do: the nearest to half a person would be those who crouch.

NEIGHBOURS = 8                  # the last of them tells the density: fewer follow chance, more hide what is rare
ONE_SIDED = 0.7                 # body sizes that a joint of only one pose counts; two random figures are 0.7 apart
POINT = 0.01                    # body sizes; joints nearer together are a point without shape, annotators scatter more
SHIFTS = 5                      # steps of mean shift; measured, further ones change nothing
TINY = 1e-9                     # instead of a size of 0, where it divides
ROWS = 64                       # poses compared with all others at a time: what a core's cache holds


def _shapes(poses: np.ndarray) -> np.ndarray:
    """Poses [..., 17, 3] with the centre of their visible joints at 0 and centroid size 1; missing joints are zeros."""
    seen = (poses[..., 2:] > 0).astype(np.float64)
    centre, size = _frame(poses, seen)
    return np.concatenate([(poses[..., :2] - centre) / np.maximum(size, TINY) * seen, seen], axis=-1)


def _frame(poses: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centre [..., 1, 2] and centroid size [..., 1, 1] of the joints that are `seen`, 0 or 1 [..., 17, 1]."""
    count = np.maximum(seen.sum(axis=-2, keepdims=True), 1)
    centre = (poses[..., :2] * seen).sum(axis=-2, keepdims=True) / count
    square = (((poses[..., :2] - centre) * seen) ** 2).sum(axis=(-2, -1), keepdims=True) / count
    return centre, np.sqrt(square)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Distances [A, B], in body sizes, of the shapes [A, 17, 3] and [B, 17, 3]: all pairs by products of matrices."""
    seen_a, seen_b, xy_a, xy_b = a[..., 2], b[..., 2], a[..., :2], b[..., :2]
    shared, joints = seen_a @ seen_b.T, seen_a.sum(-1)[:, None] + seen_b.sum(-1)        # in both; of both [A, B]
    # Over the shared joints: sums of coordinates, then squares and products about the centre.
    ax, ay = (xy_a[..., i] @ seen_b.T for i in (0, 1))
    bx, by = (seen_a @ xy_b[..., i].T for i in (0, 1))
    per = 1 / shared.clamp(min=1)
    square_a = (xy_a.square().sum(-1) @ seen_b.T - (ax * ax + ay * ay) * per).clamp_(min=0) + POINT ** 2
    square_b = (seen_a @ xy_b.square().sum(-1).T - (bx * bx + by * by) * per).clamp_(min=0) + POINT ** 2
    product = xy_a.flatten(1) @ xy_b.flatten(1).T - (ax * bx + ay * by) * per + POINT ** 2
    alike = product * (square_a * square_b).rsqrt_()                                    # 1: the same, -1: upside down
    one_sided = joints - 2 * shared
    squares = 2 * shared * (1 - alike) + ONE_SIDED ** 2 * one_sided
    return (squares.clamp_(min=0) / (shared + one_sided).clamp_(min=1)).sqrt_()


class PoseDensity:
    """Where poses lie densely, by the distance to the k-th nearest: how usual is one, which are the most common?

    Each pose counts with its mirror image, as in training. All distances are in body sizes. For N = 4096 it takes a
    second of one core.
    """

    def __init__(
        self,
        poses: np.ndarray,              # [N, 17, 3] (x, y, visible); those without a visible joint are left out
        k: int = NEIGHBOURS,            # at most, where there are fewer poses
    ):
        poses = np.asarray(poses, dtype=np.float64)
        if poses.shape[1:] != (len(JOINTS), 3) or not np.isfinite(poses).all() or not (poses[..., 2] > 0).any():
            raise ValueError(f"poses {list(poses.shape)} have no density: [N, 17, 3] finite numbers with a visible "
                             "joint are needed")
        self.poses = poses[(poses[..., 2] > 0).any(axis=1)]
        n = len(self.poses)
        self.k = max(1, min(k, 2 * (n - 1)))
        self.shapes = _shapes(np.concatenate([self.poses, flip(self.poses)]))           # [2N, J, 3]
        self._fast = torch.from_numpy(self.shapes).float()
        self.own = np.zeros(n)          # [N] the distance of each, to the others and their mirror images
        for i in range(0, n if n > 1 else 0, ROWS):
            d = _distances(self._fast[i:min(i + ROWS, n)], self._fast)
            row = torch.arange(len(d))
            d[row, i + row] = d[row, n + i + row] = torch.inf
            self.own[i:i + len(d)] = d.topk(self.k, largest=False).values[:, -1].numpy()

    def _nearest(self, poses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Distances [B, k], ascending, of poses [B, 17, 3] to their neighbours, and these as rows of `shapes`."""
        near = [_distances(some, self._fast).topk(self.k, largest=False)
                for some in torch.from_numpy(_shapes(poses)).float().split(ROWS)]
        return torch.cat([n.values for n in near]).double().numpy(), torch.cat([n.indices for n in near]).numpy()

    def distance(self, poses: np.ndarray) -> np.ndarray:
        """[B] to the k-th nearest training pose, of poses [B, 17, 3]."""
        return self._nearest(poses)[0][:, -1]

    def unusual(self, poses: np.ndarray) -> np.ndarray:
        """[B] in 0..1: the share of the training poses that have their neighbours nearer than poses [B, 17, 3] do."""
        return np.searchsorted(np.sort(self.own), self.distance(poses)) / len(self.own)

    def common(self, n: int) -> np.ndarray:
        """The rows [n] of `poses` that are the most common kinds of pose, the densest first.

        Density peaks (Rodriguez and Laio 2014): where the next denser pose is many times as far as the neighbours are.
        A pose and its mirror image are one kind. ValueError where there are fewer than n poses.
        """
        count = len(self.poses)
        if not 1 <= n <= count:
            raise ValueError(f"{n} common poses are asked for; the model knows 1 to {count}")
        order = np.argsort(self.own, kind="stable")                                     # the densest first
        ranked = self._fast.unflatten(0, (2, count))[:, order]                          # [2, N, J, 3]
        away = np.zeros(count)          # from the nearest denser pose or its mirror image
        for i in range(0, count, ROWS):
            end = min(i + ROWS, count)
            d = _distances(ranked[0, i:end], ranked[:, :end].flatten(0, 1)).unflatten(1, (2, end)).amin(dim=1)
            not_denser = torch.arange(end) >= torch.arange(i, end)[:, None]
            away[i:end] = d.masked_fill_(not_denser, torch.inf).amin(dim=1).numpy()
        away[0] = np.inf                                                                # the densest of all is a peak
        peaks = np.argsort(-away / np.maximum(self.own[order], POINT), kind="stable")[:n]
        return order[np.sort(peaks)]

    def typical(self, poses: np.ndarray, amount: float) -> np.ndarray:
        """Poses [B, 17, 3] pulled toward their neighbourhood: `amount` 0 leaves them as they are, 1 is its middle.

        The middle is found by mean shift (Fukunaga and Hostetler 1975) among the k nearest. Centre and size of each
        pose, and which joints are visible, stay; a joint that no neighbour has keeps its place beside the others.
        """
        if not 0 <= amount <= 1:
            raise ValueError(f"amount is {amount}; it must be between 0 and 1")
        return np.stack([self._pulled(pose, amount) for pose in poses])

    def _pulled(self, pose: np.ndarray, amount: float) -> np.ndarray:
        if amount == 0:
            return pose.copy()
        given = middle = _shapes(pose)
        for _ in range(SHIFTS):
            middle = self._shifted(middle)
        between = given + amount * (middle - given)
        centre, size = _frame(pose, given[:, 2:])
        xy = _shapes(between)[:, :2] * size + centre            # shapes anew: the mean of two is smaller than they are
        return np.concatenate([xy * given[:, 2:], pose[:, 2:]], axis=1)

    def _shifted(self, shape: np.ndarray) -> np.ndarray:
        """One step of mean shift: the mean of the neighbours, each laid onto `shape` [17, 3] by their shared joints."""
        (d,), (rows,) = self._nearest(shape[None])
        near = self.shapes[rows]
        shared = near[..., 2:] * shape[:, 2:]                                           # [k, J, 1]
        (centre, size), (centre_here, size_here) = _frame(near, shared), _frame(shape, shared)
        laid = (near[..., :2] - centre) / np.maximum(size, TINY) * size_here + centre_here
        weight = shared * np.exp(-(d / max(d[-1], POINT)) ** 2 / 2)[:, None, None]
        total = weight.sum(axis=0)
        mean = np.where(total > 0, (weight * laid).sum(axis=0) / np.where(total > 0, total, 1), shape[:, :2])
        return _shapes(np.concatenate([mean, shape[:, 2:]], axis=1))
