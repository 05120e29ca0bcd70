"""Checkpoints: what stands in a file, how it is saved so that a crash cannot spoil it, and models out of files.

A file holds tensors and primitives only and is read with weights_only=True, so opening it runs no code.

    {"format": 1, "stage": "vq" | "ldm", "step": k, "config": {...}, "vq": state dict, "vq_config": {...},
     "train": {...}, and for ldm: "unet", "unet_config", "cond", "cond_config", "mean", "std",
     "schedule", "knows_null"}

"unet" and "cond" are the EMA weights; the raw weights, the optimiser and whatever else a resumed run needs stand
under "train". The ldm file carries its frozen VQ and the latent statistics: one file is enough to sample.
"""
from __future__ import annotations

import hashlib
import os
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from keypoints import ConditionConfig, PoseCondition
from unet import UNet, UNetConfig
from vq import VQConfig, VQModel

FORMAT = 1
# How to sample where nobody says. eta 1, because a model trained for minutes predicts x0 worse than its mean at the
# noisiest steps (t > 850), and DDIM with eta 0 carries that error to the end while fresh noise washes it out.
DEFAULT_GUIDANCE, DEFAULT_ETA = 2.0, 1.0
NEEDED = {"vq": {"stage", "step", "config", "vq", "vq_config"}}
NEEDED["ldm"] = NEEDED["vq"] | {"unet", "unet_config", "cond", "cond_config", "mean", "std", "schedule", "knows_null"}
HOW_TO_MAKE = {"vq": "python train.py --stage vq", "ldm": "python train.py --stage ldm"}


class WrongStage(ValueError):
    """A sound checkpoint, but of the other stage."""


def find_device(name: str) -> str:
    """auto -> cuda where there is one; ValueError for a device that is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError:
        raise ValueError(f"--device is {name!r}; use auto, cpu, cuda or cuda:N") from None
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"--device is {name!r}; use auto, cpu, cuda or cuda:N")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: torch sees no CUDA GPU on this machine; use --device cpu or leave it out")
    if kind == "cuda" and (torch.device(name).index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: there are only {torch.cuda.device_count()} GPUs, counted from cuda:0")
    return name


def save(path: str | Path, payload: dict) -> None:
    """Write `payload` so that `path` is at every moment either the old file or the whole new one.

    OSError (full disk, unwritable folder) leaves the old file as it was.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as f:
            torch.save(payload, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except RuntimeError as e:           # torch's zip writer reports a full disk this way
        raise OSError(f"cannot write {path}: {e}") from None
    finally:
        partial.unlink(missing_ok=True)


def load(path: str | Path, stage: str, advice: str | None = None) -> dict:
    """The payload of a checkpoint of `stage` ("vq" or "ldm"), on the CPU; ValueError in one sentence otherwise."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no checkpoint {path}; make one with: {HOW_TO_MAKE[stage]}")
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:              # torch's unpickler raises a dozen unrelated types on a foreign file
        raise ValueError(f"{path} cannot be read as a checkpoint: it is cut short, or another kind of file, or holds "
                         f"more than tensors and plain values ({type(e).__name__})") from None
    if not isinstance(payload, dict) or payload.get("format") != FORMAT or not NEEDED["vq"] <= payload.keys():
        raise ValueError(f"{path} is no checkpoint of this project in format {FORMAT}")
    if payload["stage"] != stage:
        raise WrongStage(f"{path} is a checkpoint of stage {payload['stage']}, but one of stage {stage} is needed; "
                         + (advice or f"make it with: {HOW_TO_MAKE[stage]}"))
    if lacking := NEEDED[stage] - payload.keys():
        raise ValueError(f"{path} lacks {', '.join(sorted(lacking))}, so an older version made it; train it again")
    return payload


def hash_of(state: dict[str, Tensor]) -> str:
    """16 hex digits that change whenever a name, shape, type or value in a state dict does."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def fill(model: nn.Module, state: dict[str, Tensor], what: str) -> None:
    """load_state_dict(strict=True), with an error that names the first differing keys and both shapes."""
    own = model.state_dict()
    wrong = [f"{k}: file {tuple(state[k].shape) if k in state else 'lacks it'}, "
             f"model {tuple(own[k].shape) if k in own else 'lacks it'}"
             for k in [*own, *(k for k in state if k not in own)]
             if k not in own or k not in state or own[k].shape != state[k].shape]
    if wrong:
        raise ValueError(f"{what} does not fit its configuration in {len(wrong)} places, first {'; '.join(wrong[:3])}")
    model.load_state_dict(state, strict=True)


def build_vq(payload: dict, what: str) -> VQModel:
    """The autoencoder of a payload of either stage, frozen and in eval mode."""
    model = VQModel(VQConfig(**_tuples(payload["vq_config"])))
    fill(model, payload["vq"], what)
    return model.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def _tuples(config: dict) -> dict:
    """Lists, as JSON gives them, become the tuples that frozen configs hold."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}


class LDM(nn.Module):
    """Stage 2 as one module: frozen VQ, latent statistics, pose condition and UNet.

    z = (h - mean) / std is what diffusion works on, per channel; mean and std [C, 1, 1] come from the latent cache.
    `schedule` are the arguments of diffusion.Diffusion. `knows_null`: poses were dropped in training, so guidance means
    something.
    """

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
        context, maps = self.cond(pose, x.shape[2:], drop)
        return self.unet(x, t, context, maps)

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


def ldm_payload(ldm: LDM) -> dict:
    """The model part of a stage-2 checkpoint."""
    return {"stage": "ldm", "vq": ldm.vq.state_dict(), "vq_config": asdict(ldm.vq.config),
            "unet": ldm.unet.state_dict(), "unet_config": asdict(ldm.unet.config),
            "cond": ldm.cond.state_dict(), "cond_config": asdict(ldm.cond.config),
            "mean": ldm.mean, "std": ldm.std, "schedule": ldm.schedule, "knows_null": ldm.knows_null}


def build_ldm(payload: dict, what: str, device: str | torch.device = "cpu") -> LDM:
    """The model of a stage-2 payload with its EMA weights, frozen, in eval mode, on `device`."""
    ldm = LDM(build_vq(payload, f"{what}: vq"), UNetConfig(**_tuples(payload["unet_config"])),
              ConditionConfig(**_tuples(payload["cond_config"])), payload["mean"], payload["std"], payload["schedule"],
              payload["knows_null"])
    fill(ldm.unet, payload["unet"], f"{what}: unet")
    fill(ldm.cond, payload["cond"], f"{what}: cond")
    return ldm.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)


def load_ldm(path: str | Path, device: str | torch.device = "cpu") -> tuple[LDM, dict]:
    """The model of a stage-2 checkpoint on `device`, and the payload it came from."""
    payload = load(path, "ldm")
    return build_ldm(payload, str(path), device), payload
