"""How well poses found in images fit those asked for: poses [N, 17, 3] in; PCK and OKS out.

Letters: N poses, J = 17 joints, S side in pixels.
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from keypoints import JOINTS, on_canvas
from metrics.condition import SHUFFLE_SEED, derangement
from metrics.images import frechet
from metrics.keypoint_detector import BATCH, KeypointDetector

# Standard deviation of annotators per joint, as a fraction of the person's size: COCO's constants
# (cocoapi, pycocotools/cocoeval.py), kappa of OKS.
SIGMAS = np.array([.26, .25, .25, .35, .35, .79, .79, .72, .72, .62, .62,
                   1.07, 1.07, .87, .87, .89, .89]) / 10


def _box(pose: np.ndarray) -> tuple[float, float]:
    """Width and height of the box around the visible joints of a pose [J, 3]."""
    xy = pose[pose[:, 2] > 0, :2]
    return tuple(np.ptp(xy, axis=0)) if len(xy) else (0.0, 0.0)


def pck(predicted: np.ndarray, true: np.ndarray, fraction: float = 0.1,
        counted: np.ndarray | None = None) -> np.ndarray:
    """Share of correct keypoints [J]: within `fraction` of the true person's box diagonal.

    `predicted` and `true` are [N, J, 3]; `counted`, bool [N, J], says which joints count (None:
    those visible in `true`). A joint not visible in `predicted` is wrong; one that never counts
    gives NaN; a person of a single joint has no size and does not count. After Yang and Ramanan
    (2013).
    """
    counted = true[..., 2] > 0 if counted is None else counted
    counted = counted & np.array([any(_box(pose)) for pose in true])[:, None]
    right = within(predicted, true, fraction)
    with np.errstate(invalid="ignore"):
        return (right & counted).sum(0) / np.where(counted.sum(0), counted.sum(0), np.nan)


def within(predicted: np.ndarray, true: np.ndarray, fraction: float = 0.1) -> np.ndarray:
    """bool [N, J]: the joints that `pck` calls correct, whether they count or not."""
    diagonal = np.array([np.hypot(*_box(pose)) for pose in true])[:, None]
    distance = np.linalg.norm(predicted[..., :2] - true[..., :2], axis=-1)              # [N, J]
    return (distance <= fraction * diagonal) & (predicted[..., 2] > 0)


def oks(predicted: np.ndarray, true: np.ndarray, counted: np.ndarray | None = None) -> np.ndarray:
    """Object keypoint similarity [N] of poses [N, J, 3] (cocodataset.org/#keypoints-eval).

    The mean over the joints `counted` (as in pck) of exp(-d^2 / (2 s^2 k^2)), with k = 2 SIGMAS and
    s^2 the area of the true person's box; NaN where no joint counts or the box has no area.
    """
    out = np.full(len(true), np.nan)
    for i, (p, t) in enumerate(zip(predicted, true, strict=True)):
        seen = t[:, 2] > 0 if counted is None else counted[i]
        area = float(np.prod(_box(t)))
        if seen.any() and area > 0:
            d2 = ((p[:, :2] - t[:, :2]) ** 2).sum(-1)
            similarity = np.exp(-d2 / (2 * area * (2 * SIGMAS) ** 2)) * (p[:, 2] > 0)
            out[i] = similarity[seen].mean()
    return out


def fidelity(read: np.ndarray, asked: np.ndarray) -> dict:
    """How well poses read [N, J, 3] fit those asked for: PCK, OKS, and PCK@0.1 per joint.

    Joints asked for outside the image cannot be seen and do not count.
    """
    counted = on_canvas(asked)
    joints = pck(read, asked, 0.1, counted)
    return {"pck@0.1": float(np.nanmean(joints)),
            "pck@0.2": float(np.nanmean(pck(read, asked, 0.2, counted))),
            "oks": float(np.nanmean(oks(read, asked, counted))),
            "joints": dict(zip(JOINTS, joints.tolist(), strict=True))}


def read_all(reader: KeypointDetector, images: np.ndarray) -> tuple[np.ndarray, torch.Tensor]:
    """The poses [N, J, 3] in images uint8 [N, S, S, 3], and the features [N, D] of the images."""
    parts = [reader.read(part.movedim(-1, 1).float() / 127.5 - 1)
             for part in torch.from_numpy(images).split(BATCH)]
    poses, features = zip(*parts, strict=True)
    return np.concatenate(poses), torch.cat(features)


@dataclass(frozen=True)
class Drawn:
    """Held-out poses, what the model drew for them, and the images they were taken from."""
    asked: np.ndarray               # [N, J, 3]
    samples: np.ndarray             # uint8 [N, S, S, 3]
    real: np.ndarray                # uint8 [N, S, S, 3]
    labels: np.ndarray | None = None        # [N] the labels asked for, -1 for none


def judge(asked: np.ndarray, read: dict[str, np.ndarray]) -> dict[str, dict]:
    """`fidelity` of each kind of image in `read`; "shuffled" is of samples to other images' poses.

    `read` has the poses [N, J, 3] found in "samples" and perhaps in "decoded" and "real" images.
    """
    rows = {name: fidelity(poses, asked) for name, poses in read.items()}
    wrong = asked[derangement(len(asked), SHUFFLE_SEED)]
    return rows | {"shuffled": fidelity(read["samples"], wrong)}


def assess(reader: KeypointDetector, drawn: Drawn,
           **more: np.ndarray) -> tuple[dict[str, dict], np.ndarray]:
    """The rows of `judge` with Frechet distances to the real images, and the poses in the samples.

    `more` are other kinds of images, uint8 [N, S, S, 3] by name. The distance is in this detector's
    features: compare it only with distances of the same detector and as many images.
    """
    kinds = {"samples": drawn.samples, **more, "real": drawn.real}
    found = {name: read_all(reader, images) for name, images in kinds.items()}
    rows = judge(drawn.asked, {name: poses for name, (poses, _) in found.items()})
    for name in kinds.keys() - {"real"}:
        rows[name]["frechet"] = frechet(found["real"][1], found[name][1])
    if drawn.labels is not None and reader.classify is not None:
        for name in kinds:
            rows[name]["label"] = label_accuracy(reader, found[name][1], drawn.labels)
        wrong = drawn.labels[derangement(len(drawn.labels), SHUFFLE_SEED)]
        rows["shuffled"]["label"] = label_accuracy(reader, found["samples"][1], wrong)
    return rows, found["samples"][0]


@torch.no_grad()
def label_accuracy(reader: KeypointDetector, features: torch.Tensor, labels: np.ndarray) -> float:
    """The share of images with features [N, D] whose label [N] the detector finds; NaN for none."""
    read = reader.classify(features.to(reader.classify.weight.device)).argmax(1).cpu().numpy()
    return float((read == labels)[labels >= 0].mean()) if (labels >= 0).any() else math.nan


def by_label(reader: KeypointDetector, drawn: Drawn, names: list[str],
             read: np.ndarray) -> dict[str, dict]:
    """Rows of a table: PCK and label accuracy of the samples of each label that was asked for.

    `read` [N, J, 3] are the poses found in the samples.
    """
    rows, (_, features) = {}, read_all(reader, drawn.samples)
    for label in np.unique(drawn.labels[drawn.labels >= 0]):
        of = drawn.labels == label
        rows[names[label]] = {"images": int(of.sum()),
                              "pck@0.1": fidelity(read[of], drawn.asked[of])["pck@0.1"],
                              "label": label_accuracy(reader, features[of], drawn.labels[of])}
    return rows
