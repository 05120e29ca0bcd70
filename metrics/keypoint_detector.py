"""A small network that finds the joints in pictures, learnt from the person's own: pictures in, poses [B, 17, 3] out.

Letters: B batch, D features, J = 17 joints, n cells a side of a joint's map.
"""
from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import checkpoint
import data
from dataset.figures import Figures
from keypoints import JOINTS, MIRROR, heatmaps, on_canvas

READER_VERSION = 2                  # raise it when what a reader learns changes: cached ones are then made anew
READER_SIDES = 64, 128              # pixels a side that it looks at: the second where pictures have more than the first
READER_WIDTHS = 32, 64, 128, 192    # channels at 1/2, 1/4, 1/8 and 1/16 of that
READER_BATCH, READER_STEPS, READER_LR, READER_WARMUP = 32, 2450, 4e-3, 50
READER_SIGMA = 0.025                # of the Gaussian that a joint's map is to be, in pictures
# What it learns to look through, in a share of the pictures, first and last:
READER_SHARE = 0.5, 0.2
READER_BLUR, READER_BLOTCH = (0.35, 0.8), (1 / 16, 1 / 4)       # down to so much of the side; blotches across
READER_NOISE = 0.15                 # most noise and blotches, pictures being in [-1, 1]
READER_WINDOW = 3                   # cells about the highest whose mean is the joint's place
SHIPPED_READER = Path(__file__).parent.parent / "assets/pose-reader.pt"     # of figures of 64 pixels, in half precision
SHIPPED_FIGURES = 10_000         # how many it learnt from


class ReaderBlock(nn.Module):
    """[B, in, h, w] -> [B, out, h/stride, w/stride]: two convolutions beside a shortcut (arXiv:1512.03385)."""

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


class PoseReader(nn.Module):
    """Pictures [B, 3, H, W] in [-1, 1] -> a map for each joint [B, J, n, n], before softmax, and features [B, D].

    One hourglass (arXiv:1603.06937): down to 1/16 of `side`, and up again with what was there on the way. n is half of
    `side`; the features, D = 192, are the mean over the lowest level.
    """

    def __init__(self, side: int):
        super().__init__()
        self.side, first, steps = side, READER_WIDTHS[0], list(zip(READER_WIDTHS, READER_WIDTHS[1:], strict=False))
        self.stem = nn.Sequential(nn.Conv2d(3, first, 5, 2, 2, bias=False), nn.BatchNorm2d(first), nn.ReLU())
        self.down = nn.ModuleList([ReaderBlock(first, first)] + [
            nn.Sequential(ReaderBlock(a, b, stride=2), ReaderBlock(b, b)) for a, b in steps])
        self.narrow = nn.ModuleList([nn.Conv2d(b, a, 1) for a, b in steps])
        self.up = nn.ModuleList([ReaderBlock(a, a) for a, _ in steps])
        self.head = nn.Conv2d(first, len(JOINTS), 1)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.shape[-2:] != (self.side, self.side):
            x = F.interpolate(x, (self.side, self.side), mode="bilinear", antialias=True)
        h, passed = self.stem(x.contiguous(memory_format=torch.channels_last)), []
        for down in self.down:
            h = down(h)
            passed.append(h)
        features = h.float().mean((2, 3))                                               # [B, D]
        for i in reversed(range(len(self.up))):
            h = self.up[i](passed[i] + F.interpolate(self.narrow[i](h), scale_factor=2.0, mode="bilinear"))
        return self.head(h).float(), features

    @torch.no_grad()
    def read(self, x: Tensor) -> tuple[np.ndarray, Tensor]:
        """The poses [B, J, 3] in pictures x, every joint visible, and the features [B, D].

        The mirror image is asked too, and the mean of both answers taken: 7 % of the errors are gone.
        """
        x = x.to(self.head.weight.device)
        (logits, features), (mirrored, _) = self(x), self(x.flip(-1))
        xy = peaks((logits + mirrored[:, MIRROR].flip(-1)) / 2).cpu().numpy().astype(np.float64)
        return np.concatenate([xy, np.ones((*xy.shape[:2], 1))], axis=2), features.cpu()


def peaks(logits: Tensor) -> Tensor:
    """The place [B, J, 2] = (x, y), in 0..1, of each map [B, J, n, n]: its mean within READER_WINDOW of the top cell.

    The mean over the whole map would lie between both hands where it is not clear which is which.
    """
    n = logits.shape[-1]
    p = logits.flatten(2).softmax(-1)                                                   # [B, J, n^2]
    cell, top = torch.arange(n, device=p.device), p.argmax(-1)
    near_x, near_y = ((cell - at[..., None]).abs() <= READER_WINDOW for at in (top % n, top // n))      # [B, J, n]
    p = p.unflatten(2, (n, n)) * near_y[..., :, None] * near_x[..., None, :]
    p = p / p.sum((2, 3), keepdim=True)
    centres = (cell + 0.5) / n
    return torch.stack([(p.sum(2) * centres).sum(-1), (p.sum(3) * centres).sum(-1)], dim=-1)


def reader_loss(logits: Tensor, poses: Tensor) -> Tensor:
    """Cross entropy of the maps [B, J, n, n] and Gaussians about those joints of poses [B, J, 3] that are on canvas."""
    counted = on_canvas(poses)                                                          # [B, J]
    wanted = heatmaps(poses, logits.shape[-1], READER_SIGMA).flatten(2)
    wanted = wanted / wanted.sum(-1, keepdim=True).clamp(min=1e-9)
    loss = -(wanted * logits.flatten(2).log_softmax(-1)).sum(-1)
    return (loss * counted).sum() / counted.sum().clamp(min=1)


def degraded(x: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Pictures [B, 3, S, S], the first `share` of them as an autoencoder might leave them: soft, with noise, and
    blotches of colour.

    A reader of sharp pictures alone finds half of the joints in reconstructions in which a person sees them all.
    """
    S, y = x.shape[-1], x[:round(share * len(x))]
    if not len(y):
        return x
    low, blotch = (int(torch.randint(round(a * S), round(b * S) + 1, (), generator=generator))
                   for a, b in (READER_BLUR, READER_BLOTCH))
    soft = F.interpolate(F.interpolate(y, (low, low), mode="area"), (S, S), mode="bilinear")
    spots = torch.randn(len(y), 3, blotch, blotch, generator=generator)
    spots = F.interpolate(spots, (S, S), mode="bilinear") + torch.randn(y.shape, generator=generator)
    amount = READER_NOISE * torch.rand(len(y), 1, 1, 1, generator=generator)
    return torch.cat([soft + (amount * spots).to(x.device), x[len(y):]])


def reader_side(pictures: data.Pictures) -> int:
    return READER_SIDES[pictures.size > READER_SIDES[0]]


def train_reader(pictures: data.Pictures, device: str = "cpu", steps: int = READER_STEPS) -> PoseReader:
    """A PoseReader of these pictures and their poses, mirrored ones too; three minutes of two cores for toy figures."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        reader = PoseReader(reader_side(pictures))
    reader = reader.to(device)
    opt = torch.optim.AdamW(reader.parameters(), lr=READER_LR, betas=(0.9, 0.99), fused=True)
    batches = data.batches(pictures, READER_BATCH, 0, 0, steps, data.find_workers(device), augment=True,
                           zoom=(1.0, 1.0), device=device)
    bf16, generator, (first, last) = checkpoint.has_bf16(device), torch.Generator().manual_seed(0), READER_SHARE
    with tqdm(batches, "learning to read poses", steps, unit="step", dynamic_ncols=True, mininterval=1) as bar:
        for step, (x, poses, _) in enumerate(bar):
            for group in opt.param_groups:                          # warm-up, then a cosine to nothing
                group["lr"] = READER_LR * min((step + 1) / READER_WARMUP, 0.5 + 0.5 * math.cos(math.pi * step / steps))
            with checkpoint.autocast("bf16" if bf16 else "off", device):
                logits, _ = reader(degraded(x, first + (last - first) * step / steps, generator))
            loss = reader_loss(logits, poses)
            opt.zero_grad(set_to_none=True)
            loss.backward()
            opt.step()
            if step % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
    return reader.eval().requires_grad_(False)


def reader_path(spec: str, about: dict) -> Path:
    """Where the reader `about` --data `spec` is kept: beside the dataset, or in runs/ where nothing can be written."""
    name, runs = f"pose-reader-{about['side']}-{about['pictures'][:8]}.pt", Path("runs")
    if not data.is_folder(spec):
        return runs / f"{spec.replace(':', '-')}-{name}"
    root = Path(spec)
    folder, name = (root, name) if root.is_dir() else (root.parent, f"{root.stem}-{name}")
    return folder / name if os.access(folder, os.W_OK) else runs / f"{root.stem}-{name}"


def find_reader(spec: str, pictures: data.Pictures, device: str = "cpu",
                steps: int = READER_STEPS) -> PoseReader:
    """The reader of the training `pictures` of --data `spec`: the cached one if it learnt from just these, or new; of
    toy figures the one that ships."""
    side = reader_side(pictures)
    about = {"version": READER_VERSION, "pictures": pictures.fingerprint(), "side": side, "steps": steps}
    path = reader_path(spec, about)
    if path.is_file() and (reader := kept_reader(path, about)):
        print(f"pose reader {path}, trained before")
        return reader.to(device)
    if not data.is_folder(spec):
        first = Figures(SHIPPED_FIGURES, pictures.size, seed=0)         # who learnt from these reads any number
        if reader := kept_reader(SHIPPED_READER, about | {"pictures": first.fingerprint()}):
            print(f"pose reader {os.path.relpath(SHIPPED_READER)}, which ships")
            return reader.to(device)
    reader = train_reader(pictures, device, steps)
    if checkpoint.not_finite(reader.state_dict()):
        raise ValueError("the pose reader's weights are no numbers any more: learning to read these pictures failed; "
                         "look at them with data.py, or let a detector outside find the joints, with --detected")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.save(path, {"about": about, "reader": reader.state_dict()})
        print(f"pose reader kept in {path}")
    except OSError as e:                                    # it can judge all the same
        print(f"the pose reader is not kept, so the next command trains it again: {e}")
    return reader


def kept_reader(path: Path, about: dict) -> PoseReader | None:
    """The reader in the file `path` if it is the one `about`; None for whatever else that is, it came with the data."""
    try:
        found = checkpoint.read(path)
        reader = checkpoint.build(lambda: PoseReader(about["side"]), found["reader"], str(path))
        if found["about"] != about or checkpoint.not_finite(reader.state_dict()):
            return None
        return reader.eval().requires_grad_(False)
    except Exception:                                       # a dozen unrelated types
        return None
