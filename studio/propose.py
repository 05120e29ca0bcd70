"""A detector that learns from the images done so far and proposes the joints of the others.

Whole images are padded to a square, so that an image of any shape, and a person anywhere in it,
can be read. The network is that of metrics/keypoint_detector.py, and starts from the detector of
figures in assets/. Its last layer, which is about labels there, says of each joint whether it is
missing, hidden or visible.

Letters: N images, B batch, J = 17 joints, S side in pixels, n cells per side of a joint's map.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

import checkpoint
import data
from dataset.images import read_image
from keypoints import HIDDEN, JOINTS, MIRROR
from metrics.keypoint_detector import WINDOW, KeypointDetector, detector_loss, peaks

LEAST = 20                      # images done, before there is anything to learn from
SIDE = 96                       # S
BATCH, STEPS = 32, 500          # of a round
LR, WARMUP = 2e-3, 30
TURN, SCALE, SHIFT = 0.3, 0.2, 0.06     # standard deviations: radians, log of the size, images
COLOUR = 0.25                   # of gain and offset of each colour, for images in [-1, 1]
STATES = (0.0, HIDDEN, 1.0)     # what the last layer chooses from, for each joint
STATE_WEIGHT = 0.2              # of its loss, beside that of the maps
FIGURES = Path(__file__).parent.parent / "assets/pose-reader.pt"


# ------------------------------------------------------------------------------- images in a square

def read_square(path: str) -> tuple[np.ndarray, tuple[int, int]]:
    """An image file padded to uint8 [S, S, 3], and its own (width, height); errors as
    read_image."""
    image = read_image(path, at_least=SIDE)
    return np.array(ImageOps.pad(image, (SIDE, SIDE), Image.Resampling.BICUBIC)), image.size


def from_square(pose: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The inverse of keypoints.fit(pose, size, "letterbox"): in units of the image [J, 3]."""
    span = max(size) / np.array(size)
    xy = (pose[:, :2] * span + (1 - span) / 2).clip(0, 1)
    return np.column_stack([xy * (pose[:, 2:] > 0), pose[:, 2]])


def augmented(x: Tensor, poses: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images [B, 3, S, S] in [-1, 1] and poses [B, J, 3], turned, scaled, moved, mirrored and in
    other colours, each in its own way."""
    B = len(x)
    turn, scale, *shift = (torch.randn(B, generator=rng) * s for s in (TURN, SCALE, SHIFT, SHIFT))
    mirror = torch.rand(B, generator=rng) < 0.5
    scale, sign = scale.exp(), 1 - 2 * mirror.float()
    cos, sin = turn.cos() * scale, turn.sin() * scale
    # Places in 0..1 about the middle: before = M after + shift, as grid_sample wants it.
    M = torch.stack([torch.stack([cos * sign, -sin], -1), torch.stack([sin * sign, cos], -1)], 1)
    offset = torch.stack(shift, -1)[..., None]                                      # [B, 2, 1]
    grid = F.affine_grid(torch.cat([M, 2 * offset], -1), list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    gain, add = (COLOUR * torch.randn(B, 3, 1, 1, generator=rng) for _ in range(2))
    xy = torch.linalg.solve(M, poses[..., :2].mT - 0.5 - offset).mT + 0.5
    poses = torch.cat([xy * (poses[..., 2:] > 0), poses[..., 2:]], -1)
    poses = torch.where(mirror[:, None, None], poses[:, MIRROR], poses)
    return x * (1 + gain) + add, poses


# ----------------------------------------------------------------------------- learning and reading

class Learner:
    """The detector in `file`, or that of figures, and a training that goes on where it stopped."""

    def __init__(self, file: Path):
        self.file = file
        saved = checkpoint.read(file) if file.exists() else {
            "detector": checkpoint.read(FIGURES)["reader"], "step": 0}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.detector = KeypointDetector(SIDE, num_classes=len(JOINTS) * len(STATES))
        checkpoint.take(self.detector, saved["detector"], file)
        self.optimizer = torch.optim.AdamW(self.detector.parameters(), lr=LR, betas=(0.9, 0.99))
        self.step = saved["step"] % STEPS               # all made: a new round begins
        if self.step:
            self.optimizer.load_state_dict(saved["optimizer"])

    def learn(self, images: np.ndarray, poses: np.ndarray,
              stopped: Callable[[], bool] = lambda: False) -> Iterator[float]:
        """Trains on images uint8 [N, S, S, 3] and poses [N, J, 3] in the square; yields the share
        of steps made. Saves at the end, and when `stopped`. Step k depends on k and the weights."""
        x, poses = torch.from_numpy(images), torch.from_numpy(poses).float()
        self.detector.train()
        amp = "bf16" if checkpoint.has_bf16("cpu") else "off"
        while self.step < STEPS and not stopped():
            rng = torch.Generator().manual_seed(self.step)
            some = torch.randint(len(x), (BATCH,), generator=rng)
            batch, asked = augmented(data.to_tensor(x[some]), poses[some], rng)
            cosine = 0.5 + 0.5 * math.cos(math.pi * self.step / STEPS)
            self.optimizer.param_groups[0]["lr"] = LR * min((self.step + 1) / WARMUP, cosine)
            with checkpoint.autocast(amp, "cpu"):
                logits, features = self.detector(batch)
                states = self.detector.classify(features).view(-1, len(STATES))
            wanted = (2 * asked[..., 2]).long().flatten()
            loss = detector_loss(logits, asked)
            loss = loss + STATE_WEIGHT * F.cross_entropy(states.float(), wanted)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            self.step += 1
            yield self.step / STEPS
        checkpoint.save(self.file, {"detector": self.detector.state_dict(), "step": self.step,
                                    "optimizer": self.optimizer.state_dict()})


@torch.no_grad()
def propose(detector: KeypointDetector, images: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """Poses [B, J, 3] in images uint8 [B, S, S, 3], in units of the square, and confidences [B].

    The confidence of a joint is the share of its map, softmaxed, within WINDOW cells of its place;
    that of an image is the mean over the half of its joints that are least certain.
    """
    detector.eval()
    logits, *features = detector.averaged(data.to_tensor(images))                   # [B, J, n, n]
    chosen = [detector.classify(part).view(len(part), len(JOINTS), -1).softmax(-1)
              for part in features]
    visible = np.array(STATES)[(chosen[0] + chosen[1][:, MIRROR]).argmax(-1).numpy()]
    xy, n = peaks(logits), logits.shape[-1]
    near = ((torch.arange(n) + 0.5) / n - xy[..., None]).abs() <= (WINDOW + 0.5) / n  # [B, J, 2, n]
    p = logits.flatten(2).softmax(-1).unflatten(2, (n, n))
    p = (p * near[:, :, 1, :, None] * near[:, :, 0, None, :]).sum((2, 3)).sort(-1).values
    poses = np.concatenate([xy.double().numpy(), visible[..., None]], -1)
    poses[visible == 0] = 0
    return poses, p[:, :len(JOINTS) // 2].mean(-1).tolist()
