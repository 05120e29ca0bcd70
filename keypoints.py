"""Poses: 17 body joints in and out of files, and the two doors by which they enter the UNet.

A pose is a float array [17, 3] = (x, y, visible): x right, y down, normalised to the image, so that [0, 1] is
inside; values outside are kept, not clamped; visible is 0 or 1 and a missing joint is (0, 0, 0). "Left" is the
person's own left. Door 1 is cross-attention: `PoseEncoder` turns a pose into 17 context tokens. Door 2 is
concatenation: `heatmaps` turns it into 17 Gaussian maps beside the noisy latent. `PoseCondition` holds both.

Letters in shape comments: B batch, J = 17 joints, D token width, h, w height and width of a map.
"""
from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

JOINTS = ("nose", "eye_left", "eye_right", "ear_left", "ear_right", "shoulder_left", "shoulder_right",
          "elbow_left", "elbow_right", "wrist_left", "wrist_right", "hip_left", "hip_right",
          "knee_left", "knee_right", "ankle_left", "ankle_right")
MIRROR = [JOINTS.index(name.replace("left", "LEFT").replace("right", "left").replace("LEFT", "right"))
          for name in JOINTS]                               # MIRROR[j] is the joint that j becomes in a mirror
LIMBS = ((0, 1), (0, 2), (1, 3), (2, 4), (5, 6), (5, 7), (7, 9), (6, 8), (8, 10),
         (5, 11), (6, 12), (11, 12), (11, 13), (13, 15), (12, 14), (14, 16))
# How far annotators scatter around each joint, as a fraction of the person's size: COCO's published constants
# (cocoapi, pycocotools/cocoeval.py), the kappa of OKS.
SIGMAS = np.array([.26, .25, .25, .35, .35, .79, .79, .72, .72, .62, .62, 1.07, 1.07, .87, .87, .89, .89]) / 10
SEED_CANVAS = 512                                           # the seed's files are [row, col] on 512 x 512
LEFT_COLOR, RIGHT_COLOR, MIDDLE_COLOR = (255, 138, 60), (64, 150, 255), (120, 210, 120)


class PoseError(ValueError):
    """A pose file that cannot be used; the message names the file, the place and what to do."""


# ---------------------------------------------------------------------------------------------- reading files

def read_json(path: str | Path) -> object:
    """The parsed file, or a PoseError with one sentence saying why there is none."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PoseError(f"pose file {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as e:
        raise PoseError(f"pose file {path} cannot be read: {e}") from None
    except (ValueError, RecursionError) as e:               # also an integer of 5,000 digits
        raise PoseError(f"pose file {path} is not valid JSON ({e}); export it again") from None


def _numbers(value: object, lengths: tuple[int, ...], where: str) -> list[float]:
    """`value` as finite floats, their count being one of `lengths`; PoseError names the place otherwise."""
    if not isinstance(value, list) or len(value) not in lengths or not all(
            isinstance(v, int | float) and not isinstance(v, bool) for v in value):
        wanted = " or ".join(str(n) for n in lengths)
        raise PoseError(f"{where} is {str(value)[:60]}; {wanted} numbers are needed")
    try:
        floats = [float(v) for v in value]                  # an int of 400 digits does not fit a float
    except OverflowError:
        floats = [math.inf]
    if not all(math.isfinite(v) for v in floats):
        raise PoseError(f"{where} is {str(value)[:60]}; NaN and infinity are not coordinates, mend or remove it")
    return floats


def _pose_of_names(joints: dict, path: str | Path) -> np.ndarray:
    """{"nose": [row, col], ...} on 512 (the seed) or {"nose": [x, y, visible], ...} on 0..1 (ours) -> [17, 3]."""
    missing = [name for name in JOINTS if name not in joints]
    if missing:
        raise PoseError(f"{path}: joint {', '.join(missing)} is not there; all 17 joints are needed "
                        "(give a joint nobody can see as [0, 0, 0])")
    rows = [_numbers(joints[name], (2, 3), f"{path}: joint {name}") for name in JOINTS]
    if len({len(row) for row in rows}) != 1:
        raise PoseError(f"{path}: some joints have 2 numbers (the seed's [row, col] on 512) and some 3 "
                        "([x, y, visible] on 0..1); use one kind")
    if len(rows[0]) == 3:
        return _clean(np.array(rows))
    # The seed stores the row first: y is rows[.][0]. Division by 512 is exact, so nothing is lost.
    return np.array([(col / SEED_CANVAS, row / SEED_CANVAS, 1.0) for row, col in rows])


def _clean(pose: np.ndarray) -> np.ndarray:
    """visible > 0 becomes 1, and a missing joint (0, 0, 0) whatever filler it carried."""
    visible = pose[:, 2] > 0
    return np.where(visible[:, None], np.column_stack([pose[:, :2], np.ones(len(JOINTS))]), 0.0)


def read_seed(path: str | Path) -> np.ndarray:
    """The pose [17, 3] float64 of a file in the seed's layout, {"nose": [row, col], ...} on a 512 canvas.

    float64, because the seed's cell ids are floors of these numbers: 175.99999999999997 must not become 176. (Datasets
    hold float32, so in training such a joint may fall one cell further; sampling keeps float64.)
    """
    data = read_json(path)
    if not isinstance(data, dict):
        raise PoseError(f'{path} holds a {type(data).__name__}; the seed\'s layout is {{"nose": [row, col], ...}}')
    return _pose_of_names(data, path)


def read_coco(path: str | Path) -> dict[str, list[np.ndarray]]:
    """COCO person keypoints: file name -> poses [17, 3] float64, normalised by that image's width and height.

    Crowd regions and persons without any labelled joint are left out (an image may keep an empty list).
    """
    data = read_json(path)
    if not isinstance(data, dict) or not all(isinstance(data.get(k), list) for k in ("images", "annotations")):
        raise PoseError(f'{path} is not a COCO annotation file: it needs the lists "images" and "annotations"')
    sizes, poses = {}, {}
    for i, image in enumerate(data["images"]):
        where = f"{path}: images[{i}]"
        if not isinstance(image, dict) or not isinstance(image.get("file_name"), str):
            raise PoseError(f"{where} has no file_name")
        if not isinstance(image.get("id"), int | str):
            raise PoseError(f"{where}: id is {str(image.get('id'))[:60]}; a number or a string is needed")
        width, height = _numbers([image.get("width"), image.get("height")], (2,), f"{where}: [width, height]")
        if width <= 0 or height <= 0:
            raise PoseError(f"{where}: width {width:g} and height {height:g} must be positive")
        sizes[image.get("id")] = image["file_name"], width, height
        poses[image["file_name"]] = []
    for i, person in enumerate(data["annotations"]):
        where = f"{path}: annotations[{i}]"
        if not isinstance(person, dict):
            raise PoseError(f"{where} is not an object")
        if person.get("iscrowd") or not person.get("num_keypoints", 1) or "keypoints" not in person:
            continue
        if not isinstance(person.get("image_id"), int | str) or person["image_id"] not in sizes:
            raise PoseError(f"{where}: image_id {person.get('image_id')} is not among the images")
        name, width, height = sizes[person["image_id"]]
        flat = np.array(_numbers(person["keypoints"], (3 * len(JOINTS),), f"{where}: keypoints"))
        pose = _clean(flat.reshape(-1, 3) / (width, height, 1.0))
        if pose[:, 2].any():
            poses[name].append(pose)
    return poses


def load_poses(path: str | Path) -> list[np.ndarray]:
    """All poses [17, 3] float64 of a file, told by its content: the seed's [row, col] on 512, COCO annotations,
    or ours: {"nose": [x, y, visible], ...}, or a list of 17 rows [x, y, visible], on 0..1."""
    data = read_json(path)
    if isinstance(data, dict) and "annotations" in data:
        poses = [pose for persons in read_coco(path).values() for pose in persons]
        if not poses:
            raise PoseError(f"{path} has no person with keypoints")
        return poses
    if isinstance(data, dict) and any(name in data for name in JOINTS):
        return [_pose_of_names(data, path)]
    if isinstance(data, list) and len(data) == len(JOINTS):
        rows = [_numbers(row, (3,), f"{path}: row {i} ({JOINTS[i]})") for i, row in enumerate(data)]
        return [_clean(np.array(rows))]
    raise PoseError(f'{path} is no pose file known here; known are {{"nose": [row, col], ...}} on 512 (the seed\'s), '
                    'COCO annotations, {"nose": [x, y, visible], ...} and a list of 17 rows [x, y, visible] on 0..1')


# ----------------------------------------------------------------------------------------- moving and drawing

def flip(pose: np.ndarray | Tensor) -> np.ndarray | Tensor:
    """The pose [..., 17, 3] of the mirrored picture: x -> 1 - x, and left and right change names."""
    out = pose[..., MIRROR, :]                                                          # a copy, not a view
    out[..., 0] = (1 - out[..., 0]) * out[..., 2]                                       # missing stays (0, 0, 0)
    return out


def crop(pose: np.ndarray | Tensor, box: Sequence[float]) -> np.ndarray | Tensor:
    """The pose [..., 17, 3] seen from the part `box` = (x0, y0, x1, y1), in 0..1, of its picture."""
    x0, y0, x1, y1 = box
    out = pose + 0
    out[..., 0] = (out[..., 0] - x0) / (x1 - x0) * out[..., 2]
    out[..., 1] = (out[..., 1] - y0) / (y1 - y0) * out[..., 2]
    return out


def side_colors() -> np.ndarray:
    """[17, 3] uint8: the person's left warm, the right cool, so that a swap of sides is seen at a glance."""
    return np.array([LEFT_COLOR if name.endswith("left") else RIGHT_COLOR if name.endswith("right") else MIDDLE_COLOR
                     for name in JOINTS], dtype=np.uint8)


def draw(pose: np.ndarray | Tensor, size: int, image: np.ndarray | None = None,
         colors: np.ndarray | None = None) -> np.ndarray:
    """The skeleton as a picture, uint8 [size, size, 3], on dark ground or over `image` (uint8 [H, W, 3]).

    Limbs are capsules drawn by distance to the segment, so they are smooth at 64 pixels and mirror exactly.
    """
    pose = np.asarray(pose, dtype=np.float64)
    colors = side_colors() if colors is None else colors
    if image is None:
        canvas = np.full((size, size, 3), (24.0, 26.0, 34.0))
    else:
        canvas = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC), dtype=np.float64)
    xy, seen = pose[:, :2] * size, pose[:, 2] > 0
    thick = max(size / 90, 0.7)                                                         # half width of a limb
    for layer, radius in ((LIMBS, thick), ([(j, j) for j in range(len(JOINTS))], 1.5 * thick)):
        # Within a layer colours mix by coverage, so that the order of the limbs (left before right) leaves no trace.
        paint, weight, bare = np.zeros((size, size, 3)), np.zeros((size, size, 1)), np.ones((size, size, 1))
        for a, b in layer:
            if seen[a] and seen[b]:
                window, alpha = _capsule(size, xy[a], xy[b], radius)
                paint[window] += alpha * (colors[a].astype(np.float64) + colors[b]) / 2
                weight[window] += alpha
                bare[window] *= 1 - alpha
        canvas = canvas * bare + paint / np.maximum(weight, 1e-9) * (1 - bare)
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8)


def _capsule(size: int, a: np.ndarray, b: np.ndarray, radius: float) -> tuple[tuple[slice, slice], np.ndarray]:
    """Where a capsule around the segment a-b (pixels) lies in a size x size picture: the window of rows and
    columns it touches and its coverage [h, w, 1] there, antialiased over one pixel."""
    x0, y0 = np.clip(np.floor(np.minimum(a, b) - radius - 1), 0, size).astype(int)
    x1, y1 = np.clip(np.ceil(np.maximum(a, b) + radius + 1), 0, size).astype(int)
    p = np.stack(np.meshgrid(np.arange(x0, x1) + 0.5, np.arange(y0, y1) + 0.5), axis=-1)        # pixel centres
    along = np.clip(((p - a) @ (b - a)) / max(float((b - a) @ (b - a)), 1e-9), 0, 1)[..., None]
    distance = np.linalg.norm(p - a - along * (b - a), axis=-1, keepdims=True)
    return (slice(y0, y1), slice(x0, x1)), np.clip(radius + 0.5 - distance, 0, 1)


# ------------------------------------------------------------------------------------------ the seed's tokens

def tokenize(pose: np.ndarray | Tensor, dim: int) -> Tensor:
    """Cell ids [..., 17] int64 of poses [..., 17, 3] on a dim x dim grid: col + row * dim, as in the seed.

    The seed floors onto the grid (x // (512 / dim)) except at dim 512, where it rounds to the pixel, half to
    even; coordinates outside are clamped into the border cells. A missing joint gets the id of its (0, 0).
    """
    xy = torch.as_tensor(pose)[..., :2] * SEED_CANVAS
    cell = xy.round() if dim == SEED_CANVAS else torch.floor(xy / (SEED_CANVAS / dim))
    col, row = cell.clamp(0, dim - 1).long().unbind(-1)
    return col + row * dim


def detokenize(ids: Tensor, dim: int) -> Tensor:
    """Cell centres [..., 2] = (x, y) in 0..1 of ids [...]; at dim 512 the cells are centred on whole pixels."""
    cell = torch.stack([ids % dim, ids // dim], dim=-1).double()
    return cell / dim if dim == SEED_CANVAS else (cell + 0.5) / dim


def seed_context(poses: np.ndarray | Tensor, dim: int = 32) -> Tensor:
    """The seed's condition, float32 [B, 1, 17]: one token made of 17 raw ids, the row taken for x.

    Its code reads kps[name][0], which is the row, as x, so an id is row + col * dim. Published checkpoints were
    trained that way. One token means softmax over one key: the same vector is added at every pixel.
    """
    poses = torch.as_tensor(poses)
    return tokenize(poses[..., [1, 0, 2]], dim).float()[:, None, :]                     # [B, 1, J]


# -------------------------------------------------------------------------------------- the two doors, learned

class PoseEncoder(nn.Module):
    """Pose [B, 17, 3] -> context [B, 17, D]: one token a joint, joint embedding + position.

    The position enters as Fourier features (sin and cos of 2^k pi x, k < n_freqs), which keep a hundredth of the
    picture apart. A missing joint has a learned vector in place of its position; where `drop` is true the whole
    pose is replaced by 17 learned null tokens (classifier-free guidance, arXiv:2207.12598).
    """

    def __init__(self, dim: int, n_freqs: int = 8):
        super().__init__()
        self.register_buffer("freqs", math.pi * 2.0 ** torch.arange(n_freqs), persistent=False)
        self.joint = nn.Parameter(torch.randn(len(JOINTS), dim))
        self.missing = nn.Parameter(torch.randn(dim))
        self.null = nn.Parameter(torch.randn(len(JOINTS), dim))
        self.position = nn.Sequential(nn.Linear(4 * n_freqs, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, pose: Tensor, drop: Tensor | None = None) -> Tensor:
        angle = pose[..., :2, None] * self.freqs                                        # [B, J, 2, F]
        features = torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(2)             # [B, J, 4F]
        visible = pose[..., 2:] > 0
        tokens = self.joint + torch.where(visible, self.position(features), self.missing)       # [B, J, D]
        return tokens if drop is None else torch.where(drop[:, None, None], self.null, tokens)


def heatmaps(pose: Tensor, size: int | tuple[int, int], sigma: float = 0.04) -> Tensor:
    """17 Gaussian maps [B, 17, h, w] of poses [B, 17, 3]; sigma in units of the picture, a missing joint is 0.

    The value at a cell is that of the Gaussian at the cell's centre, so the joint's place within a cell is kept.
    """
    h, w = (size, size) if isinstance(size, int) else size
    xs = (torch.arange(w, device=pose.device, dtype=pose.dtype) + 0.5) / w
    ys = (torch.arange(h, device=pose.device, dtype=pose.dtype) + 0.5) / h
    gx = torch.exp(-((xs - pose[..., :1]) ** 2) / (2 * sigma ** 2))                     # [B, J, w]
    gy = torch.exp(-((ys - pose[..., 1:2]) ** 2) / (2 * sigma ** 2))                    # [B, J, h]
    return gy[..., :, None] * gx[..., None, :] * (pose[..., 2:, None] > 0)              # [B, J, h, w]


@dataclass(frozen=True)
class ConditionConfig:
    doors: tuple[str, ...] = ("tokens", "maps")     # any of: tokens, maps; or ("seed",) alone, the faithful one
    dim: int = 64                                   # width D of a context token
    sigma: float = 0.04                             # of a Gaussian map, in pictures
    seed_dim: int = 32                              # cells a side of the seed's grid

    def __post_init__(self):
        if self.doors != ("seed",) and (not self.doors or not set(self.doors) <= {"tokens", "maps"}):
            raise ValueError(f"condition doors {self.doors}: the pose would reach nothing; "
                             'allowed are "tokens", "maps", both, or "seed" alone')

    @property
    def context_dim(self) -> int | None:
        """Width of the context the UNet sees, None where nothing comes by cross-attention."""
        return len(JOINTS) if self.doors == ("seed",) else self.dim if "tokens" in self.doors else None

    @property
    def map_channels(self) -> int:
        """Channels beside the noisy latent."""
        return len(JOINTS) if "maps" in self.doors else 0


class PoseCondition(nn.Module):
    """Pose [B, 17, 3] -> (context [B, N, D] or None, maps [B, 17, h, w] or None): what the UNet is given."""

    def __init__(self, config: ConditionConfig):
        super().__init__()
        self.config = config
        self.encoder = PoseEncoder(config.dim) if "tokens" in config.doors else None

    def forward(self, pose: Tensor, size: tuple[int, int],
                drop: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        """`size` is that of the latent, `drop` [B] bool marks the samples that get the null condition."""
        c, context, maps = self.config, None, None
        if c.doors == ("seed",):
            context = seed_context(pose, c.seed_dim)
            if drop is not None:                                                        # all zeros: no pose
                context = context * ~drop[:, None, None]
        if self.encoder is not None:
            context = self.encoder(pose.float(), drop)
        if "maps" in c.doors:
            maps = heatmaps(pose.float(), size, c.sigma)
            if drop is not None:
                maps = maps * ~drop[:, None, None, None]
        return context, maps


# ------------------------------------------------------------------------------------------------ measuring

def _box(pose: np.ndarray) -> tuple[float, float]:
    """Width and height of the box around the visible joints of one pose [17, 3]."""
    xy = pose[pose[:, 2] > 0, :2]
    return tuple(np.ptp(xy, axis=0)) if len(xy) else (0.0, 0.0)


def pck(predicted: np.ndarray, true: np.ndarray, fraction: float = 0.1) -> np.ndarray:
    """Per-joint share of correct keypoints, [17]: within `fraction` of the true person's box diagonal.

    Both are [B, 17, 3]; only joints visible in `true` count, a joint not visible in `predicted` is wrong, and a
    joint never visible gives NaN. Percentage of correct keypoints after Yang and Ramanan (2013), box normalised.
    """
    diagonal = np.array([np.hypot(*_box(p)) for p in true])[:, None]
    distance = np.linalg.norm(predicted[..., :2] - true[..., :2], axis=-1)              # [B, J]
    right = (distance <= fraction * diagonal) & (predicted[..., 2] > 0)
    counted = true[..., 2] > 0
    with np.errstate(invalid="ignore"):
        return (right & counted).sum(0) / np.where(counted.sum(0), counted.sum(0), np.nan)


def oks(predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Object keypoint similarity [B] of poses [B, 17, 3]: mean of exp(-d^2 / (2 s^2 k^2)) over joints visible in
    `true`, k = 2 SIGMAS and s^2 the area of the box around the joints (cocodataset.org/#keypoints-eval)."""
    out = np.full(len(true), np.nan)
    for b, (p, t) in enumerate(zip(predicted, true, strict=True)):
        seen = t[:, 2] > 0
        if seen.any():
            d2 = ((p[:, :2] - t[:, :2]) ** 2).sum(-1)
            area = max(float(np.prod(_box(t))), 1e-12)
            similarity = np.exp(-d2 / (2 * area * (2 * SIGMAS) ** 2)) * (p[:, 2] > 0)
            out[b] = similarity[seen].mean()
    return out
