"""Poses: 17 body joints, how they are moved and drawn, and how they condition the UNet.

A pose is a float array [17, 3] = (x, y, visible): x right, y down, in units of the image, so that
0..1 is inside; values outside are kept. visible is 1, or HIDDEN for a joint that something covers;
a missing joint is (0, 0, 0). "Left" is the person's own left. The pose conditions the UNet in two
ways: `PoseEncoder` makes 17 tokens of it for cross-attention, `heatmaps` makes 17 Gaussian maps
that are concatenated to the noisy latent. `PoseCondition` is either or both. "The seed" is the
original blog post's code.

Letters in shape comments: B batch, J = 17 joints, D token width, F frequencies, h w sides of a map.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

JOINTS = ("nose", "eye_left", "eye_right", "ear_left", "ear_right", "shoulder_left",
          "shoulder_right", "elbow_left", "elbow_right", "wrist_left", "wrist_right", "hip_left",
          "hip_right", "knee_left", "knee_right", "ankle_left", "ankle_right")
# MIRROR[j] is the joint that j becomes in a mirror.
MIRROR = [0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15]
LIMBS = ((0, 1), (0, 2), (1, 3), (2, 4), (5, 6), (5, 7), (7, 9), (6, 8), (8, 10),
         (5, 11), (6, 12), (11, 12), (11, 13), (13, 15), (12, 14), (14, 16))
HIDDEN = 0.5                                        # COCO's v = 1: the place is known, not seen
SEED_CANVAS = 512                                   # the seed's files are [row, col] on 512 x 512
# Of each joint, [17, 3]: warm for the person's left, cool for the right, green for the nose.
COLORS = np.array([(120.0, 210.0, 120.0), *[(255.0, 138.0, 60.0), (64.0, 150.0, 255.0)] * 8])
GROUND = np.array((24.0, 26.0, 34.0))               # of a skeleton without an image


class PoseError(ValueError):
    """A pose file that cannot be used; the message names the file, the place and what to do."""


# ------------------------------------------------------------------------------- moving and drawing

def flip(pose: np.ndarray | Tensor) -> np.ndarray | Tensor:
    """Poses [..., 17, 3] of the mirrored images: x becomes 1 - x, left and right change names."""
    out = pose[..., MIRROR, :]                                          # a copy, not a view
    out[..., 0] = (1 - out[..., 0]) * (out[..., 2] > 0)                 # missing stays (0, 0, 0)
    return out


def crop(pose: np.ndarray | Tensor, box: Sequence[float]) -> np.ndarray | Tensor:
    """Poses [..., 17, 3] in units of a part of their images, `box` = (x0, y0, x1, y1) in 0..1."""
    x0, y0, x1, y1 = box
    out = pose + 0
    out[..., 0] = (out[..., 0] - x0) / (x1 - x0) * (out[..., 2] > 0)
    out[..., 1] = (out[..., 1] - y0) / (y1 - y0) * (out[..., 2] > 0)
    return out


def fit(pose: np.ndarray, size: tuple[float, float], how: str) -> np.ndarray:
    """The pose [17, 3] of an image of this (width, height), undistorted on a square image.

    "letterbox" puts the whole image into the square. "crop" cuts out a square of the short side, as
    near to the person as the image allows; joints outside it are then outside 0..1.
    """
    span = {"letterbox": max, "crop": min}[how](size) / np.array(size)  # the square, in images
    start, seen = (1 - span) / 2, pose[pose[:, 2] > 0, :2]
    if how == "crop" and len(seen):
        start = np.clip((seen.min(axis=0) + seen.max(axis=0) - span) / 2, 0, 1 - span)
    return crop(pose, (*start, *(start + span)))


def on_canvas(pose: np.ndarray | Tensor) -> np.ndarray | Tensor:
    """bool [..., 17] of poses [..., 17, 3]: not missing, and inside the image."""
    return (pose[..., 2] > 0) & (pose[..., :2] >= 0).all(-1) & (pose[..., :2] <= 1).all(-1)


def draw(pose: np.ndarray | Tensor, size: int, image: np.ndarray | None = None) -> np.ndarray:
    """The skeleton, uint8 [size, size, 3], on a dark ground or over `image` (uint8 [H, W, 3]).

    Limbs are antialiased capsules, so they are smooth at 64 pixels and mirror exactly. Hidden
    joints are hollow.
    """
    pose = np.asarray(pose, dtype=np.float64)
    if image is None:
        canvas = np.full((size, size, 3), GROUND)
    else:
        resized = Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)
        canvas = np.asarray(resized, dtype=np.float64)
    xy, seen = pose[:, :2] * size, pose[:, 2] > 0
    thick = max(size / 90, 0.7)                                         # half the width of a limb
    dots = [(j, j) for j in range(len(JOINTS))]
    holes = [(j, j) for j in range(len(JOINTS)) if pose[j, 2] == HIDDEN]
    dark = np.tile(GROUND, (len(JOINTS), 1))
    for layer, radius, colors in ((LIMBS, thick, COLORS), (dots, 1.5 * thick, COLORS),
                                  (holes, 0.9 * thick, dark)):
        # Within a layer colours mix by coverage, so that the order of the limbs does not matter.
        paint, weight = np.zeros((size, size, 3)), np.zeros((size, size, 1))
        bare = np.ones((size, size, 1))
        for a, b in layer:
            if seen[a] and seen[b]:
                window, alpha = _capsule(size, xy[a], xy[b], radius)
                paint[window] += alpha * (colors[a] + colors[b]) / 2
                weight[window] += alpha
                bare[window] *= 1 - alpha
        canvas = canvas * bare + paint / np.maximum(weight, 1e-9) * (1 - bare)
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8)


def _capsule(size: int, a: np.ndarray, b: np.ndarray,
             radius: float) -> tuple[tuple[slice, slice], np.ndarray]:
    """The window of rows and columns that a capsule around the segment a-b (pixels) touches in a
    size x size image, and its coverage [h, w, 1] there, antialiased over one pixel."""
    x0, y0 = np.clip(np.floor(np.minimum(a, b) - radius - 1), 0, size).astype(int)
    x1, y1 = np.clip(np.ceil(np.maximum(a, b) + radius + 1), 0, size).astype(int)
    p = np.stack(np.meshgrid(np.arange(x0, x1) + 0.5, np.arange(y0, y1) + 0.5), axis=-1)
    along = np.clip(((p - a) @ (b - a)) / max(float((b - a) @ (b - a)), 1e-9), 0, 1)[..., None]
    distance = np.linalg.norm(p - a - along * (b - a), axis=-1, keepdims=True)
    return (slice(y0, y1), slice(x0, x1)), np.clip(radius + 0.5 - distance, 0, 1)


# -------------------------------------------------------------------------------- the seed's tokens

def tokenize(pose: np.ndarray | Tensor, dim: int) -> Tensor:
    """Cell ids [..., 17] int64 of poses [..., 17, 3] on a dim x dim grid: col + row * dim.

    As in the seed: x // (512 / dim), but at dim 512 rounded to the pixel, half to even; coordinates
    outside are clamped to the border cells. A missing joint gets the id of its (0, 0).
    """
    xy = torch.as_tensor(pose)[..., :2] * SEED_CANVAS
    cell = (xy.round() if dim == SEED_CANVAS else
            torch.div(xy, SEED_CANVAS / dim, rounding_mode="floor"))
    col, row = cell.clamp(0, dim - 1).long().unbind(-1)
    return col + row * dim


def seed_context(poses: np.ndarray | Tensor, dim: int = 32) -> Tensor:
    """The seed's condition, float32 [B, 1, 17]: one token of 17 raw ids, with row and col swapped.

    Its code takes kps[name][0], which is the row, for x, so an id is row + col * dim. Published
    checkpoints were trained this way. With one token the softmax is over one key: the same vector
    is added at every pixel.
    """
    poses = torch.as_tensor(poses)
    return tokenize(poses[..., [1, 0, 2]], dim).float()[:, None, :]     # [B, 1, J]


# ------------------------------------------------------------------------------------- conditioning

class PoseEncoder(nn.Module):
    """Pose [B, 17, 3] -> context [B, 17, D]: a token per joint, joint embedding + position.

    The position enters as Fourier features, sin and cos of 2^k pi x for k < n_freqs, which resolve
    a hundredth of the image. A missing joint has a learned vector instead of its position; with
    `hidden`, a learned vector is added for hidden joints. Where `drop` is true, 17 learned null
    tokens replace the pose (classifier-free guidance, arXiv:2207.12598).
    """

    def __init__(self, dim: int, n_freqs: int = 8, hidden: bool = False):
        super().__init__()
        self.register_buffer("freqs", math.pi * 2.0 ** torch.arange(n_freqs), persistent=False)
        self.joint = nn.Parameter(torch.randn(len(JOINTS), dim))
        self.missing = nn.Parameter(torch.randn(dim))
        self.null = nn.Parameter(torch.randn(len(JOINTS), dim))
        self.position = nn.Sequential(nn.Linear(4 * n_freqs, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.hidden = nn.Parameter(torch.randn(dim)) if hidden else None

    def forward(self, pose: Tensor, drop: Tensor | None = None) -> Tensor:
        # The features repeat with period 2; the clamp keeps x within one period.
        angle = pose[..., :2, None].clamp(-0.49, 1.49) * self.freqs                 # [B, J, 2, F]
        features = torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(2)         # [B, J, 4F]
        position = torch.where(pose[..., 2:] > 0, self.position(features), self.missing)
        tokens = self.joint + position                                              # [B, J, D]
        if self.hidden is not None:
            tokens = tokens + self.hidden * (pose[..., 2:] == HIDDEN)
        return tokens if drop is None else torch.where(drop[:, None, None], self.null, tokens)


def heatmaps(pose: Tensor, size: int | tuple[int, int], sigma: float = 0.04,
             hidden: bool = False) -> Tensor:
    """Gaussian maps [B, 17, h, w] of poses [B, 17, 3]; sigma as a share of the side. A map is 0 for
    a missing joint and, with `hidden`, negative for a hidden one.

    A cell has the value of the Gaussian at its centre, so the place within a cell is kept.
    """
    h, w = (size, size) if isinstance(size, int) else size
    xs = (torch.arange(w, device=pose.device, dtype=pose.dtype) + 0.5) / w
    ys = (torch.arange(h, device=pose.device, dtype=pose.dtype) + 0.5) / h
    gx = torch.exp(-((xs - pose[..., :1]) ** 2) / (2 * sigma ** 2))                 # [B, J, w]
    gy = torch.exp(-((ys - pose[..., 1:2]) ** 2) / (2 * sigma ** 2))                # [B, J, h]
    sign = (pose[..., 2] > 0).to(pose.dtype)                                        # [B, J]
    if hidden:
        sign = torch.where(pose[..., 2] == HIDDEN, -sign, sign)
    return gy[..., :, None] * gx[..., None, :] * sign[..., None, None]              # [B, J, h, w]


@dataclass(frozen=True)
class ConditionConfig:
    """How the pose conditions the UNet. ValueError for a wrong `conditioning`."""

    conditioning: tuple[str, ...] = ("tokens", "maps")  # "tokens", "maps" or both; or "seed" alone
    dim: int = 64                                   # D
    sigma: float = 0.04                             # of a Gaussian map, in images
    seed_dim: int = 32                              # cells per side of the seed's grid
    hidden: bool = False                            # hidden joints differ from visible ones

    def __post_init__(self) -> None:
        object.__setattr__(self, "conditioning", tuple(self.conditioning))  # JSON: no tuples
        if set(self.conditioning) not in ({"tokens"}, {"maps"}, {"tokens", "maps"}, {"seed"}):
            raise ValueError(f"the conditioning is {self.conditioning}; allowed are tokens, maps, "
                             "both of them, or seed alone")

    @property
    def context_dim(self) -> int | None:
        """Width of the context for cross-attention; None without cross-attention."""
        if self.conditioning == ("seed",):
            return len(JOINTS)
        return self.dim if "tokens" in self.conditioning else None

    @property
    def map_channels(self) -> int:
        """Channels that are concatenated to the noisy latent."""
        return len(JOINTS) if "maps" in self.conditioning else 0


class PoseCondition(nn.Module):
    """Pose [B, 17, 3] -> context [B, N, D] or None and maps [B, 17, h, w] or None, for the UNet."""

    def __init__(self, config: ConditionConfig):
        super().__init__()
        self.config = config
        self.encoder = (PoseEncoder(config.dim, hidden=config.hidden)
                        if "tokens" in config.conditioning else None)

    def forward(self, pose: Tensor, size: tuple[int, int],
                drop: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        """`size` is that of the latent; `drop` [B] bool marks samples with the null condition."""
        c, context, maps = self.config, None, None
        if c.conditioning == ("seed",):
            context = seed_context(pose, c.seed_dim)
            if drop is not None:                                        # the null condition is zero
                context = context * ~drop[:, None, None]
        if self.encoder is not None:
            context = self.encoder(pose.float(), drop)
        if "maps" in c.conditioning:
            maps = heatmaps(pose.float(), size, c.sigma, c.hidden)
            if drop is not None:
                maps = maps * ~drop[:, None, None, None]
        return context, maps
