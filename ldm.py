"""The model of stage 2 as one module: poses and noisy latents in, eps out; pictures to latents and back.

Frozen VQ, latent statistics, pose condition and UNet. Whatever trains, samples or measures holds one of these.

Letters: B batch, C latent channels, h w latent sides, H W sides of the picture.
"""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from keypoints import ConditionConfig, PoseCondition
from unet import UNet, UNetConfig
from vq import VQModel

# How to sample where nobody says. eta 1, because a model trained for minutes predicts x0 worse than its mean at the
# noisiest steps (t > 850), and DDIM with eta 0 carries that error to the end while fresh noise washes it out; w = 3,
# because the Frechet distance of benchmarks/guidance.py is least there (more only buys pose for variety).
DEFAULT_GUIDANCE, DEFAULT_ETA = 3.0, 1.0


class LDM(nn.Module):
    """Stage 2 as one module: frozen VQ, latent statistics, pose condition and UNet.

    z = (h - mean) / std is what diffusion works on, per channel; mean and std [C, 1, 1] come from the latent cache.
    `schedule` are the arguments of diffusion.Diffusion. `knows_null`: poses were dropped in training, so guidance means
    something. `spacing` of DDIM's timesteps is the reference's for models that come from there. To sample in half
    precision, where the hardware computes in it, `ldm.unet.to(torch.bfloat16)`; the latents stay float32.
    """
    spacing = "even"

    def __init__(self, vq: VQModel, unet_config: UNetConfig, cond_config: ConditionConfig, mean: Tensor, std: Tensor,
                 schedule: dict, knows_null: bool):
        super().__init__()
        if unet_config.context_dim != cond_config.context_dim:
            raise ValueError(f"the UNet's context_dim is {unet_config.context_dim} but the condition gives "
                             f"{cond_config.context_dim}: the pose would not reach the UNet by cross-attention")
        wanted = vq.config.embed_dim + cond_config.map_channels
        if unet_config.in_channels != wanted or unet_config.out_channels != vq.config.embed_dim:
            raise ValueError(f"the UNet takes {unet_config.in_channels} and gives {unet_config.out_channels} channels; "
                             f"latent and pose maps make it {wanted} and {vq.config.embed_dim}")
        self.vq, self.schedule, self.knows_null = vq, schedule, knows_null
        self.unet, self.cond = UNet(unet_config), PoseCondition(cond_config)
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, x: Tensor, t: Tensor, pose: Tensor, drop: Tensor | None = None) -> Tensor:
        """eps for noisy latents x [B, C, h, w] at t [B] under poses [B, 17, 3]; `drop` [B] marks null conditions."""
        return self.unet(x.to(self.dtype), t, *self._condition(pose, x.shape[2:], drop))

    def _condition(self, pose: Tensor, size: tuple[int, int], drop: Tensor | None) -> tuple[Tensor | None, ...]:
        """Context and maps, as the UNet takes them."""
        context, maps = self.cond(pose, size, drop)
        return context if context is None else context.to(self.dtype), maps

    @torch.no_grad()
    def prepared(self, pose: Tensor, size: tuple[int, int]) -> tuple[Callable[..., Tensor], Tensor]:
        """The model under poses [B, 17, 3] that stay, and their numbers [B], to call it with in place of the poses.

        `guided(*ldm.prepared(pose, size), w)` equals `guided(ldm, pose, w)` for latents of `size` = (h, w), but maps,
        tokens and the keys and values of cross-attention are computed here, once for all steps.
        """
        row = torch.arange(len(pose) + 1, device=pose.device)
        context, maps = self._condition(torch.cat([pose[:1], pose]), size, row == 0)        # row 0 is the null one
        keys_values = self.unet.keys_values(context)

        def eps_model(x: Tensor, t: Tensor, number: Tensor, drop: Tensor) -> Tensor:
            at = (number + 1) * ~drop                                               # [B] rows
            return self.unet(x.to(self.dtype), t, [(k[at], v[at]) for k, v in keys_values],
                             None if maps is None else maps[at])

        return eps_model, row[:-1]

    @property
    def dtype(self) -> torch.dtype:
        """What the UNet computes in."""
        return next(self.unet.parameters()).dtype

    @property
    def guidance(self) -> float:
        """The guidance to sample with where nobody says: without a null condition only w = 1 means anything."""
        return DEFAULT_GUIDANCE if self.knows_null else 1.0

    @property
    def eta(self) -> float:
        """The noise of DDIM where nobody says; 0, the reference's, for models trained the reference's way."""
        return DEFAULT_ETA if self.knows_null else 0.0

    def encode(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] -> z [B, C, h, w]."""
        return (self.vq.encode(images).float() - self.mean) / self.std

    def decode(self, z: Tensor) -> Tensor:
        """z [B, C, h, w] -> images [B, 3, H, W]; quantises on the way."""
        return self.vq.decode(z * self.std + self.mean)
