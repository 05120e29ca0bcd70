"""The model of stage 2: a frozen autoencoder, latent statistics, pose conditioning and the UNet.

Images [B, 3, H, W] <-> latents z [B, C, h, w]; noisy latents, timesteps, poses [B, 17, 3] and
labels [B] -> what the UNet predicts. Training, sampling and measuring all use this module.
"""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from keypoints import ConditionConfig, PoseCondition
from unet import NO_LABEL, UNet, UNetConfig
from vq import VQModel

# Sampling defaults by what the network predicts: guidance w, eta, steps of DPM-Solver++. A young
# eps model predicts x0 badly at the noisiest steps (t > 850): deterministic sampling carries that
# error to the end, fresh noise removes it (benchmarks/RESULTS.md, "How many steps?").
SAMPLING = {"eps": (3.0, 1.0, 20), "v": (2.0, 0.5, 6)}


class LDM(nn.Module):
    """Diffusion works on z = (h - mean) / std, per channel; mean and std [C, 1, 1] come from the
    latent cache.

    `schedule` are the arguments of diffusion.Diffusion. `supports_guidance`: poses were dropped in
    training, so guidance is meaningful. `spacing` of DDIM's timesteps is the reference's for
    published models. To sample in half precision: `ldm.unet.to(torch.bfloat16)`; latents stay
    float32.
    """
    spacing = "even"

    def __init__(self, vq: VQModel, unet_config: UNetConfig, cond_config: ConditionConfig,
                 mean: Tensor, std: Tensor, schedule: dict, supports_guidance: bool):
        super().__init__()
        wanted = (vq.config.embed_dim + cond_config.map_channels, vq.config.embed_dim,
                  cond_config.context_dim)
        found = unet_config.in_channels, unet_config.out_channels, unet_config.context_dim
        if found != wanted:         # a wrong context_dim would mean that no pose reaches the UNet
            raise ValueError(f"the UNet has (in_channels, out_channels, context_dim) = {found}; "
                             f"autoencoder and pose conditioning need {wanted}")
        self.vq, self.schedule, self.supports_guidance = vq, schedule, supports_guidance
        # Defaults of sampling; without dropped poses no guidance and no noise, as in the reference.
        w, eta, self.steps = SAMPLING[schedule.get("prediction", "eps")]
        self.guidance, self.eta = (w, eta) if supports_guidance else (1.0, 0.0)
        self.unet, self.cond = UNet(unet_config), PoseCondition(cond_config)
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, x: Tensor, t: Tensor, pose: Tensor, drop: Tensor | None = None,
                label: Tensor | None = None) -> Tensor:
        """The prediction (eps or v) for noisy latents x [B, C, h, w] at t [B] under poses
        [B, 17, 3] and labels [B], or NO_LABEL; where `drop` [B] is true, under the null condition:
        neither pose nor label."""
        if label is not None and drop is not None:
            label = label.masked_fill(drop, NO_LABEL)
        context, maps = self.cond(pose, x.shape[2:], drop)              # [B, N, D], [B, K, h, w]
        context = context if context is None else context.to(self.dtype)
        return self.unet(x.to(self.dtype), t, context, maps, label)

    def of_rows(self, pose: Tensor, label: Tensor | None) -> tuple[Callable[..., Tensor], Tensor]:
        """(model, rows) for diffusion.guided, whose condition is one tensor: rows [B] of poses
        [B, 17, 3] and labels [B] in place of both."""
        def model(x: Tensor, t: Tensor, row: Tensor, drop: Tensor) -> Tensor:
            return self(x, t, pose[row], drop, None if label is None else label[row])

        return model, torch.arange(len(pose), device=pose.device)

    @property
    def dtype(self) -> torch.dtype:
        """What the UNet computes in."""
        return next(self.unet.parameters()).dtype

    def encode(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] -> z [B, C, h, w]."""
        return (self.vq.encode(images).float() - self.mean) / self.std

    def decode(self, z: Tensor) -> Tensor:
        """z [B, C, h, w] -> images [B, 3, H, W], quantised on the way."""
        return self.vq.decode(z * self.std + self.mean)
