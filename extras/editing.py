"""Editing: an image and --init, --inpaint or --noise-from in, arguments of sample.sample out.

`inpaint` keeps a part of x0 as given (RePaint, arXiv:2201.09865): there eps follows from DDPM (4),
    eps = (x_t - sqrt(alpha_bar_t) x0) / sqrt(1 - alpha_bar_t)
The rest of the image sees only a noisy version of that part. RePaint therefore repeats each step in
several rounds, with noise added back in between; `rounds` of diffusion.ddim does.
`invert` finds the noise from which DDIM samples a given x0: it solves DDIM (12) with eta = 0 for
x_t. With a = sqrt(alpha_bar_s / alpha_bar_t)
    x_t = (x_s - (sqrt(1 - alpha_bar_s) - a sqrt(1 - alpha_bar_t)) eps(x_t, t)) / a
a fixed point, because eps is evaluated at the x_t that is sought (arXiv:2309.04907).
"""
from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

import data
from dataset.images import read_image
from diffusion import Diffusion, EpsFn, Step, ddim_table, guided
from ldm import LDM

# Rounds of RePaint. Measured on a Gaussian: with 1 the new region ignores half of what the rest
# implies.
REPAINT = 3
OUTLINE = (255, 0, 160)         # colour of the line around the inpainted region


def inpaint(diffusion: Diffusion, eps_fn: EpsFn, x0: Tensor, known: Tensor) -> EpsFn:
    """eps_fn for inpainting with any sampler: where `known` (bool, like x or broadcast) is true, x0
    stays as given."""

    def inpaint_eps_fn(x: Tensor, t: Tensor) -> Tensor:
        return torch.where(known, diffusion.predict_eps(x, t, x0), eps_fn(x, t).float())

    return inpaint_eps_fn


@torch.no_grad()
def invert(
    diffusion: Diffusion,
    eps_fn: EpsFn,
    x0: Tensor,                         # [B, ...]
    steps: int,                         # S
    spacing: str = "even",
    iterations: int = 3,                # of the fixed point, each one evaluation of eps_fn
) -> Iterator[Step]:
    """`ddim` with eta 0 backwards: the x of the last step is the noise from which it samples x0."""
    timesteps, alpha_bar, alpha_bar_prev, _ = ddim_table(diffusion, steps, 0.0, spacing)
    x, n = x0.float(), len(timesteps)
    for j in range(n):
        ts = torch.full((x.shape[0],), int(timesteps[j]), device=x.device)                  # [B]
        a = (alpha_bar_prev[j] / alpha_bar[j]) ** 0.5
        x_s = x
        for _ in range(iterations):
            eps = eps_fn(x, ts).float()
            x = (x_s - ((1 - alpha_bar_prev[j]) ** 0.5 - a * (1 - alpha_bar[j]) ** 0.5) * eps) / a
        yield Step(j, n, int(timesteps[j]), x, diffusion.predict_x0(x, ts, eps))


class Given(NamedTuple):
    """The image of --init, --inpaint or --noise-from, encoded, and decoded again."""
    z: Tensor                       # [1, C, h, w] its latent
    image: np.ndarray               # uint8 [S, S, 3] the decoded latent
    hole: np.ndarray | None         # bool [S, S] the region to inpaint

    def shown(self) -> np.ndarray:
        """uint8 [S, S, 3]: the image, with a line of one pixel around the hole."""
        if self.hole is None:
            return self.image
        hole = torch.from_numpy(self.hole)[None].float()
        around = F.max_pool2d(hole, 3, 1, 1)[0].bool().numpy() & ~self.hole
        return np.where(around[..., None], np.uint8(OUTLINE), self.image)


@torch.no_grad()
def read_given(args: argparse.Namespace, ldm: LDM, size: int) -> Given | None:
    """The image to start from, and its mask, cropped to the central square; None without one."""
    path = args.init or args.inpaint or args.noise_from
    if path is None:
        return None
    image, hole = read_image(path), None
    square, _ = data.crop_resize(image, data.NO_POSE, size)
    z = ldm.encode(data.to_tensor(square)[None].to(ldm.mean.device))
    if args.inpaint:
        mask = read_image(args.mask, ground="black")        # white strokes may be on transparency
        if mask.size != image.size:
            raise ValueError(f"the mask {args.mask} is {mask.width} x {mask.height}, but {path} is "
                             f"{image.width} x {image.height}; the sizes must be equal")
        hole = data.crop_resize(mask, data.NO_POSE, size)[0].mean(axis=-1) >= 128
        if not hole.any():
            raise ValueError(f"the mask {args.mask} has no white pixels; white marks the region to "
                             "inpaint")
    return Given(z, data.to_uint8(ldm.decode(z))[0], hole)


def start_from(given: Given, args: argparse.Namespace, ldm: LDM, timesteps: np.ndarray,
               pose: Tensor, labels: Tensor | None = None) -> dict[str, object]:
    """The arguments of sample.sample that make it start from `given`; `timesteps` are those that
    its sampler visits.

    --noise-from inverts without a pose. A model trained without dropout cannot, so it inverts with
    `pose` [1, 17, 3] and the first of `labels`.
    """
    if args.init:       # a share of T, so that it adds the same noise with every spacing
        skip = int((timesteps >= args.strength * ldm.schedule["timesteps"]).sum())
        return {"given": given.z, "skip": min(skip, len(timesteps) - 1)}
    if args.inpaint:    # a cell of the latent is redrawn if any of its pixels is in the hole
        hole = torch.from_numpy(given.hole)[None, None].float()             # [1, 1, S, S]
        known = F.max_pool2d(hole, ldm.vq.config.factor) == 0               # [1, 1, h, w]
        return {"given": given.z, "known": known.to(given.z.device), "rounds": REPAINT}
    diffusion, w = Diffusion(**ldm.schedule), 0.0 if ldm.supports_guidance else 1.0
    model = partial(ldm, label=None if labels is None else labels[:1].to(given.z.device))
    eps_fn = guided(diffusion.eps_model(model), pose.to(given.z.device), w)
    steps = invert(diffusion, eps_fn, given.z, args.steps, ldm.spacing)
    *_, last = tqdm(steps, desc="inverting", unit="step", total=len(timesteps))
    return {"noise": last.x}
