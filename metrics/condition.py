"""How much stage 2 listens to the pose: latents [N, C, h, w] and poses [N, 17, 3] in, eps losses [N] out."""
from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

from diffusion import Diffusion

SHUFFLE_SEED = 1234                 # of the fixed noise and the fixed wrong poses: one number, so runs compare


def derangement(n: int, seed: int) -> np.ndarray:
    """A permutation of range(n) that leaves nothing in its place (n >= 2)."""
    order = np.random.default_rng(seed).permutation(n)
    wrong = np.empty(n, dtype=np.int64)
    wrong[order] = np.roll(order, 1)                        # each element gets its neighbour in a random ring
    return wrong


@torch.no_grad()
def loss_each(model: Callable[..., Tensor], diffusion: Diffusion, z: Tensor, poses: Tensor, batch_size: int = 64,
              null: bool = False, autocast: Callable[[], AbstractContextManager] = nullcontext) -> Tensor:
    """The eps loss [N], float64 on the CPU, of each latent z [N, C, h, w] under poses [N, 17, 3], or none where `null`.

    In eps whatever `model` predicts, so that 1 is always the loss of predicting nothing and runs compare.
    Latent i has the timestep and the noise that `fixed_noise` gives it, so that runs and steps compare.
    """
    t, noise = fixed_noise(diffusion, z)
    losses, eps_model = [], diffusion.eps_model(model)
    for i in range(0, len(z), batch_size):
        s = slice(i, i + batch_size)
        drop = torch.full((len(z[s]),), null, device=z.device)
        with autocast():
            eps = eps_model(diffusion.q_sample(z[s], t[s], noise[s]), t[s], poses[s], drop)
        losses.append((eps.float() - noise[s]).square().flatten(1).mean(1))
    return torch.cat(losses).double().cpu()


def fixed_noise(diffusion: Diffusion, z: Tensor) -> tuple[Tensor, Tensor]:
    """Timesteps [N], spread evenly over the schedule, and noise like z [N, C, h, w]: the same in every call."""
    generator = torch.Generator().manual_seed(SHUFFLE_SEED)
    noise = torch.randn(z.shape, generator=generator).to(z.device)
    # Spread by a random order: neighbouring pictures (frames of one film) should not share a timestep.
    t = torch.linspace(0, diffusion.timesteps - 1, len(z)).round().long()
    return t[torch.randperm(len(z), generator=generator)].to(z.device), noise


def condition_each(eps_model: Callable[..., Tensor], diffusion: Diffusion, z: Tensor, poses: Tensor,
                   batch_size: int = 64, null: bool = True,
                   autocast: Callable[[], AbstractContextManager] = nullcontext) -> dict[str, Tensor]:
    """`loss_each` [N] of latents z [N, C, h, w] under their own poses [N, 17, 3], "right", under other pictures',
    "shuffled", and under none, "null"; all three see the same noise. `null` False leaves out the loss under no pose,
    which means nothing for a model that never saw one.
    """
    if len(z) < 2:
        raise ValueError(f"shuffled poses need at least 2 pictures, but there is {len(z)}")
    wrong = poses[torch.as_tensor(derangement(len(z), SHUFFLE_SEED), device=poses.device)]
    kinds = {"right": (poses, False), "shuffled": (wrong, False)} | ({"null": (poses, True)} if null else {})
    return {name: loss_each(eps_model, diffusion, z, p, batch_size, dropped, autocast)
            for name, (p, dropped) in kinds.items()}


def condition_losses(*args: object, **how: object) -> dict[str, float]:
    """The means of `condition_each`, and shuffled / right, "ratio", which is 1 where the model ignores the pose."""
    return condition_means(condition_each(*args, **how))


def condition_means(each: dict[str, Tensor]) -> dict[str, float]:
    out = {name: losses.mean().item() for name, losses in each.items()}
    return out | {"ratio": out["shuffled"] / out["right"]}
