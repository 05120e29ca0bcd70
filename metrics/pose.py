"""How well poses found in pictures fit those asked for: poses [B, 17, 3] in, PCK, OKS and tables of them out.

Letters: B batch, J = 17 joints.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

import data
from keypoints import JOINTS, on_canvas
from metrics.condition import SHUFFLE_SEED, derangement
from metrics.images import Moments, frechet
from metrics.keypoint_detector import READER_BATCH, PoseReader

# How far annotators scatter around each joint, as a fraction of the person's size: COCO's published constants
# (cocoapi, pycocotools/cocoeval.py), the kappa of OKS.
SIGMAS = np.array([.26, .25, .25, .35, .35, .79, .79, .72, .72, .62, .62, 1.07, 1.07, .87, .87, .89, .89]) / 10


def _box(pose: np.ndarray) -> tuple[float, float]:
    """Width and height of the box around the visible joints of one pose [17, 3]."""
    xy = pose[pose[:, 2] > 0, :2]
    return tuple(np.ptp(xy, axis=0)) if len(xy) else (0.0, 0.0)


def pck(predicted: np.ndarray, true: np.ndarray, fraction: float = 0.1,
        counted: np.ndarray | None = None) -> np.ndarray:
    """Per-joint share of correct keypoints, [17]: within `fraction` of the true person's box diagonal.

    Both are [B, 17, 3]; the joints `counted`, bool [B, 17], count (None: those visible in `true`), a joint not visible
    in `predicted` is wrong, and a joint that never counts gives NaN. A person of one joint has no size to measure by
    and does not count. Percentage of correct keypoints after Yang and Ramanan (2013), box normalised.
    """
    diagonal = np.array([np.hypot(*_box(p)) for p in true])[:, None]
    distance = np.linalg.norm(predicted[..., :2] - true[..., :2], axis=-1)              # [B, J]
    right = (distance <= fraction * diagonal) & (predicted[..., 2] > 0)
    counted = (true[..., 2] > 0 if counted is None else counted) & (diagonal > 0)
    with np.errstate(invalid="ignore"):
        return (right & counted).sum(0) / np.where(counted.sum(0), counted.sum(0), np.nan)


def oks(predicted: np.ndarray, true: np.ndarray, counted: np.ndarray | None = None) -> np.ndarray:
    """Object keypoint similarity [B] of poses [B, 17, 3]: mean of exp(-d^2 / (2 s^2 k^2)) over the joints `counted`
    (as in pck), k = 2 SIGMAS and s^2 the area of the box around the joints (cocodataset.org/#keypoints-eval); NaN where
    none counts or that box has no area."""
    out = np.full(len(true), np.nan)
    for b, (p, t) in enumerate(zip(predicted, true, strict=True)):
        seen = t[:, 2] > 0 if counted is None else counted[b]
        area = float(np.prod(_box(t)))
        if seen.any() and area > 0:
            d2 = ((p[:, :2] - t[:, :2]) ** 2).sum(-1)
            similarity = np.exp(-d2 / (2 * area * (2 * SIGMAS) ** 2)) * (p[:, 2] > 0)
            out[b] = similarity[seen].mean()
    return out


def fidelity(read: np.ndarray, asked: np.ndarray) -> dict:
    """How well poses read [B, J, 3] fit those asked for: pck@0.1, pck@0.2, oks, and of each joint its PCK@0.1.

    Joints that were asked for outside the picture do not count, for nobody can see them.
    """
    counted = on_canvas(asked)
    joints = pck(read, asked, 0.1, counted)
    return {"pck@0.1": float(np.nanmean(joints)), "pck@0.2": float(np.nanmean(pck(read, asked, 0.2, counted))),
            "oks": float(np.nanmean(oks(read, asked, counted))),
            "joints": dict(zip(JOINTS, joints.tolist(), strict=True))}


def read_all(reader: PoseReader, images: np.ndarray) -> tuple[np.ndarray, Moments]:
    """The poses [N, J, 3] in pictures uint8 [N, H, W, 3], and the moments of their features."""
    moments, poses = Moments(), []
    for i in range(0, len(images), READER_BATCH):
        pose, features = reader.read(data.to_tensor(images[i:i + READER_BATCH]))
        moments.add(features)
        poses.append(pose)
    return np.concatenate(poses), moments


@dataclass(frozen=True)
class Drawn:
    """Held-out poses, what the model drew for them, and the pictures that they were taken from."""
    asked: np.ndarray               # [N, J, 3]
    samples: np.ndarray             # uint8 [N, S, S, 3]
    real: np.ndarray                # uint8 [N, S, S, 3]
    about: dict                     # what they depend on; another checkpoint or seed makes others


def judge(drawn: Drawn, read: dict[str, np.ndarray]) -> dict[str, dict]:
    """The rows of the table: `fidelity` of each kind of picture in `read`, and of the samples to other pictures' poses.

    `read` are the poses [N, J, 3] found in "samples" and perhaps in "decoded" and "real" pictures.
    """
    rows = {name: fidelity(poses, drawn.asked) for name, poses in read.items()}
    return rows | {"shuffled": fidelity(read["samples"], drawn.asked[derangement(len(drawn.asked), SHUFFLE_SEED)])}


def assess(reader: PoseReader, drawn: Drawn, **more: np.ndarray) -> tuple[dict[str, dict], np.ndarray]:
    """The rows of `judge` with Frechet distances to the real pictures, and the poses [N, J, 3] read in the samples.

    `more` are other kinds of picture, uint8 [N, S, S, 3] by name. A distance is in this reader's features: it compares
    with those of the same reader and of as many pictures.
    """
    kinds = {"samples": drawn.samples, **more, "real": drawn.real}
    found = {name: read_all(reader, images) for name, images in kinds.items()}
    rows = judge(drawn, {name: poses for name, (poses, _) in found.items()})
    for name in kinds.keys() - {"real"}:
        rows[name]["frechet"] = frechet(found["real"][1], found[name][1])
    return rows, found["samples"][0]
