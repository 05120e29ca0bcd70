"""A small network that finds the joints in images: images in, poses [B, 17, 3] and features out.

It is trained in minutes on the images and poses of a dataset, without any download. metrics/pose.py
measures with it whether samples show the pose they were asked for.

Letters: B batch, D features, J = 17 joints, S side in pixels, n cells per side of a joint's map.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from keypoints import JOINTS, MIRROR, heatmaps, on_canvas

VERSION = 2                     # raise it when training changes: saved detectors are replaced
SIDES = 64, 128                 # input pixels; the second for images larger than the first
WIDTHS = 32, 64, 128, 192       # channels at 1/2, 1/4, 1/8 and 1/16 of that
FEATURE_WIDTHS = 24, 48, 96, 160        # of the detector behind assets/features.pt
BATCH, STEPS, LR, WARMUP = 32, 2450, 4e-3, 50
SIGMA = 0.025                   # of the Gaussian around a joint in the target map, in image sides
WINDOW = 3                      # cells around the highest whose mean is the joint's place
# A share of each batch is degraded, the first share at the first step, the second at the last.
DEGRADED = 0.5, 0.2
BLUR, BLOTCH = (0.35, 0.8), (1 / 16, 1 / 4)     # reduced resolution; cells of colour blotches
NOISE = 0.15                    # maximum of noise and blotches, for images in [-1, 1]


class DetectorBlock(nn.Module):
    """[B, in, h, w] -> [B, out, h/stride, w/stride]: a residual block (arXiv:1512.03385)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        same = in_channels == out_channels and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.relu(self.norm1(self.conv1(x))))
        return F.relu(self.shortcut(x) + self.norm2(y))


class KeypointDetector(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] -> logits of a map per joint [B, J, n, n], features [B, D].

    One hourglass (arXiv:1603.06937): down to 1/16 of `side` and up again with skip connections.
    n is half of `side`; the features, D = 192, are the mean over the lowest level. With labels
    `classify` makes logits [B, num_classes] of them.
    """

    def __init__(self, side: int, widths: tuple[int, ...] = WIDTHS, num_classes: int = 0):
        super().__init__()
        self.side, first = side, widths[0]
        levels = list(zip(widths, widths[1:], strict=False))
        conv = nn.Conv2d(3, first, 5, stride=2, padding=2, bias=False)
        self.stem = nn.Sequential(conv, nn.BatchNorm2d(first), nn.ReLU())
        self.down = nn.ModuleList([DetectorBlock(first, first)] + [
            nn.Sequential(DetectorBlock(a, b, stride=2), DetectorBlock(b, b)) for a, b in levels])
        self.narrow = nn.ModuleList([nn.Conv2d(b, a, 1) for a, b in levels])
        self.up = nn.ModuleList([DetectorBlock(a, a) for a, _ in levels])
        self.head = nn.Conv2d(first, len(JOINTS), 1)
        self.classify = nn.Linear(widths[-1], num_classes) if num_classes else None
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.shape[-2:] != (self.side, self.side):
            x = F.interpolate(x, (self.side, self.side), mode="bilinear", antialias=True)
        h, skips = self.stem(x.contiguous(memory_format=torch.channels_last)), []
        for down in self.down:
            h = down(h)
            skips.append(h)
        features = h.float().mean((2, 3))                                               # [B, D]
        for i in reversed(range(len(self.up))):
            up = F.interpolate(self.narrow[i](h), scale_factor=2.0, mode="bilinear")
            h = self.up[i](skips[i] + up)
        return self.head(h).float(), features

    def averaged(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [B, J, n, n], the mean over x and its mirror image, which removes 7 % of the
        errors; and the features [B, D] of both."""
        (logits, features), (mirrored, of_mirrored) = self(x), self(x.flip(-1))
        return (logits + mirrored[:, MIRROR].flip(-1)) / 2, features, of_mirrored

    @torch.no_grad()
    def read(self, x: Tensor) -> tuple[np.ndarray, Tensor]:
        """Poses [B, J, 3] in images x, every joint visible, and features [B, D]."""
        logits, features, _ = self.averaged(x.to(self.head.weight.device))
        xy = peaks(logits).double().cpu().numpy()
        return np.concatenate([xy, np.ones((*xy.shape[:2], 1))], axis=2), features.cpu()


class DetectorDistance(nn.Module):
    """A perceptual distance for small images: x, y [B, 3, H, W] in [-1, 1] -> [B].

    LPIPS (arXiv:1801.03924) with the first layers of a KeypointDetector in place of VGG16: features
    of unit length, squared differences, mean over pixels and depths. L1 alone blurs the limbs and
    hands by which a detector finds joints (benchmarks/RESULTS.md). The measures of metrics/pose.py
    use another detector, of another seed and other widths.
    """

    def __init__(self, detector: KeypointDetector, depth: int = 3):
        super().__init__()
        self.layers = nn.ModuleList([detector.stem, *detector.down[:depth]])

    def features(self, x: Tensor) -> list[Tensor]:
        """Maps [B, C, h, w] after each layer, of unit length along C."""
        maps = []
        for layer in self.layers:
            x = layer(x)
            maps.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-3))
        return maps

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        pairs = zip(self.features(x), self.features(y), strict=True)
        return torch.stack([(a - b).square().sum(1).mean((1, 2)) for a, b in pairs]).mean(0)


def peaks(logits: Tensor) -> Tensor:
    """The place [B, J, 2] = (x, y) on 0..1 of each map [B, J, n, n]: the mean around its peak.

    The mean of the whole map would lie between both hands where either could be meant.
    """
    n = logits.shape[-1]
    p = logits.flatten(2).softmax(-1)                                           # [B, J, n^2]
    cell, top = torch.arange(n, device=p.device), p.argmax(-1)
    near_x = (cell - top[..., None] % n).abs() <= WINDOW                        # [B, J, n]
    near_y = (cell - top[..., None] // n).abs() <= WINDOW
    p = p.unflatten(2, (n, n)) * near_y[..., :, None] * near_x[..., None, :]
    p = p / p.sum((2, 3), keepdim=True)
    centres = (cell + 0.5) / n
    return torch.stack([(p.sum(2) * centres).sum(-1), (p.sum(3) * centres).sum(-1)], dim=-1)


# ----------------------------------------------------------------------------------------- training

def detector_side(size: int) -> int:
    """The input side of a detector for images of `size` pixels."""
    return SIDES[size > SIDES[0]]


def detector_loss(logits: Tensor, poses: Tensor) -> Tensor:
    """Cross entropy of maps [B, J, n, n] to Gaussians at the joints of poses that are inside."""
    counted = on_canvas(poses)                                                  # [B, J]
    wanted = heatmaps(poses, logits.shape[-1], SIGMA).flatten(2)
    wanted = wanted / wanted.sum(-1, keepdim=True).clamp(min=1e-9)
    loss = -(wanted * logits.flatten(2).log_softmax(-1)).sum(-1)
    return (loss * counted).sum() / counted.sum().clamp(min=1)


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of logits [B, num_classes] to the labels [B] of the images that have one."""
    loss = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
    return loss / (labels >= 0).sum().clamp(min=1)


def degraded(x: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Images [B, 3, S, S], the first `share` of them blurred, with noise and blotches of colour.

    A detector trained on sharp images alone finds half of the joints in reconstructions in which a
    person sees them all.
    """
    S, y = x.shape[-1], x[:round(share * len(x))]
    if not len(y):
        return x
    low, blotch = (int(torch.randint(round(a * S), round(b * S) + 1, (), generator=generator))
                   for a, b in (BLUR, BLOTCH))
    soft = F.interpolate(F.interpolate(y, (low, low), mode="area"), (S, S), mode="bilinear")
    spots = torch.randn(len(y), 3, blotch, blotch, generator=generator)
    spots = F.interpolate(spots, (S, S), mode="bilinear")
    spots = spots + torch.randn(y.shape, generator=generator)
    amount = NOISE * torch.rand(len(y), 1, 1, 1, generator=generator)
    return torch.cat([soft + (amount * spots).to(x.device), x[len(y):]])


def train_detector(
    batches: Iterable[tuple[Tensor, ...]],          # images [B, 3, S, S], poses [B, J, 3]; with
                                                    # num_classes also labels [B], -1 for none
    steps: int,                                     # how many batches come
    side: int,
    device: str | torch.device = "cpu",
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    num_classes: int = 0,
) -> KeypointDetector:
    """A detector, in eval mode; STEPS batches of figures take 3 minutes on two cores."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        detector = KeypointDetector(side, num_classes=num_classes)
    detector = detector.to(device)
    optimizer = torch.optim.AdamW(detector.parameters(), lr=LR, betas=(0.9, 0.99), fused=True)
    generator, (first, last) = torch.Generator().manual_seed(0), DEGRADED
    what = "training the keypoint detector"
    with tqdm(batches, what, steps, unit="step", dynamic_ncols=True, mininterval=1) as bar:
        for step, (x, poses, *labels) in enumerate(bar):
            cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
            optimizer.param_groups[0]["lr"] = LR * min((step + 1) / WARMUP, cosine)
            with autocast():
                share = first + (last - first) * step / steps
                logits, features = detector(degraded(x, share, generator))
            loss = detector_loss(logits, poses)
            if num_classes:
                loss = loss + label_loss(detector.classify(features), labels[0].to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if step % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
    return detector.eval().requires_grad_(False)
