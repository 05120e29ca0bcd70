"""How far stage 2 follows the pose: latents [N, C, h, w] and poses [N, 17, 3] in, eps losses out.

Letters: N latents, C h w their shape.
"""
from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffusion import Diffusion

SHUFFLE_SEED = 1234                 # fixes the noise and the shuffled poses, so that runs compare


def derangement(n: int, seed: int) -> np.ndarray:
    """A permutation of range(n), n >= 2, without a fixed point."""
    ring = np.random.default_rng(seed).permutation(n)
    wrong = np.empty(n, dtype=np.int64)
    wrong[ring] = np.roll(ring, 1)              # each gets its neighbour in a random ring
    return wrong


def fixed_noise(diffusion: Diffusion, z: Tensor) -> tuple[Tensor, Tensor]:
    """Timesteps [N], evenly spread over the schedule, and noise like z: the same in every call."""
    generator = torch.Generator().manual_seed(SHUFFLE_SEED)
    noise = torch.randn(z.shape, generator=generator).to(z.device)
    # In random order: neighbouring images (frames of one film) should not share a timestep.
    t = torch.linspace(0, diffusion.timesteps - 1, len(z)).round().long()
    return t[torch.randperm(len(z), generator=generator)].to(z.device), noise


@torch.no_grad()
def loss_each(model: Callable[..., Tensor], diffusion: Diffusion, z: Tensor, poses: Tensor,
              batch_size: int = 64, null: bool = False,
              autocast: Callable[[], AbstractContextManager] = nullcontext,
              labels: Tensor | None = None) -> Tensor:
    """The eps loss [N], float64 on the CPU, of each latent z with its pose, and its label [N] where
    there are labels; `null` drops them all.

    Latent i always gets the timestep and noise of `fixed_noise`, so that steps and runs compare.
    The loss is in eps whatever `model` predicts: predicting eps = 0 always has loss 1.
    """
    t, noise = fixed_noise(diffusion, z)
    losses = []
    for i in range(0, len(z), batch_size):
        s = slice(i, i + batch_size)
        drop = torch.full((len(z[s]),), null, device=z.device)
        eps_model = diffusion.eps_model(
            model if labels is None else partial(model, label=labels[s]))
        with autocast():
            eps = eps_model(diffusion.q_sample(z[s], t[s], noise[s]), t[s], poses[s], drop)
        losses.append((eps.float() - noise[s]).square().flatten(1).mean(1))
    return torch.cat(losses).double().cpu()


def condition_each(
    model: Callable[..., Tensor], diffusion: Diffusion, z: Tensor, poses: Tensor,
    batch_size: int = 64,
    null: bool = True,              # False: leave "null" out, for models trained without dropout
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    labels: Tensor | None = None,   # [N], never shuffled
) -> dict[str, Tensor]:
    """`loss_each` [N] with the "right" poses, "shuffled" ones of other latents, "null" for none."""
    if len(z) < 2:
        raise ValueError(f"shuffling poses needs at least 2 images; got {len(z)}")
    wrong = poses[torch.as_tensor(derangement(len(z), SHUFFLE_SEED), device=poses.device)]
    conditions = {"right": (poses, False), "shuffled": (wrong, False)}
    if null:
        conditions["null"] = poses, True
    return {name: loss_each(model, diffusion, z, pose, batch_size, dropped, autocast, labels)
            for name, (pose, dropped) in conditions.items()}


def condition_means(each: dict[str, Tensor]) -> dict[str, float]:
    """The means of `condition_each`; "ratio" is shuffled / right: 1 if the model ignores poses."""
    out = {name: losses.mean().item() for name, losses in each.items()}
    return out | {"ratio": out["shuffled"] / out["right"]}


def condition_losses(*args: object, **how: object) -> dict[str, float]:
    """`condition_means` of `condition_each` of the same arguments."""
    return condition_means(condition_each(*args, **how))
