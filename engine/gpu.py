"""TF32, peak memory, and the scaler that skips bad steps without waiting for a GPU."""
from __future__ import annotations

import math

import torch


def set_up_gpu(device: str) -> None:
    if device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")      # TF32 where autocast keeps float32
        torch.backends.cudnn.benchmark = True           # all images have one size
        torch.cuda.reset_peak_memory_stats(device)


def make_scaler(amp: str, device: str) -> torch.amp.GradScaler:
    """Skips steps whose gradient is not finite, without waiting for the GPU. In fp16 it also scales
    the loss, so that small gradients do not vanish; elsewhere the scale stays 1."""
    device = torch.device(device).type
    if amp == "fp16":
        return torch.amp.GradScaler(device)
    return torch.amp.GradScaler(device, init_scale=1.0, growth_interval=2 ** 30,
                                backoff_factor=math.nextafter(1.0, 0.0))    # 1 in float32


def peak_memory(device: str) -> str:
    if not device.startswith("cuda"):
        return ""
    return f", {torch.cuda.max_memory_allocated(device) / 2 ** 30:.1f} GiB at its peak"
