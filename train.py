"""Train either stage: pictures -> autoencoder (--stage vq), then pictures + poses -> diffusion model (--stage ldm).

    python train.py --stage vq                      the toy preset on procedural figures, into runs/vq
    python train.py --stage ldm                     the same for stage 2, with runs/vq/last.pt, into runs/ldm
    python train.py --stage vq --data DIR --preset small --out runs/mine-vq
    python train.py --preset danbooru --dry-run     what would be trained, without training

The same command again resumes; --fresh starts over. Step k is a function of (seed, k), so a resumed run equals the
uninterrupted one. A run folder holds config.json, log.jsonl, last.pt, best.pt, samples/ and curves.png, with
--keep-every step-*.pt, and while it is trained into a file called lock.
"""
from __future__ import annotations

import argparse
import bisect
import copy
import io
import itertools
import json
import math
import multiprocessing
import os
import signal
import socket
import stat
import statistics
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, redirect_stderr, suppress
from dataclasses import MISSING, asdict, astuple, dataclass, field, fields, is_dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoint
import data
import dataset.latents
import formats.lpips
import metrics.condition
import metrics.images
import metrics.overfit
import plots
from diffusion import Diffusion, ddim, guided, per_image_noise
from formats import compvis
from keypoints import ConditionConfig, draw
from ldm import LDM
from metrics.overfit import read_log
from unet import UNetConfig
from vq import LPIPS, PatchDiscriminator, VQConfig, VQLoss, VQLossConfig, VQModel

MEASURE_STEPS = 40              # steps, at most, whose rate decides the length of a --minutes run
FEW_STEPS, FEW_WARMUPS = 100, 3         # a --minutes run of less is said to be short
RESERVE = 0.05                  # share of --minutes left for checkpoints and a machine that gets slower
SAVE_SECONDS = 120              # between checkpoints; an evaluation saves too
INTERRUPTED = 130               # exit status after Ctrl-C, so that a script does not go on to the next stage
LOST = 3                        # exit status where another process of the run is gone
LOG_EVERY = 20                  # steps between lines of log.jsonl
EVALS, MOST_EVALS = 6, 100      # evaluations a run, least and most; between them as many as take
EVAL_SHARE = 0.05               # of its time
EVAL_PICTURES = 512             # held-out pictures an evaluation of stage 1 looks at, at most
EVAL_LATENTS = 256, 2048        # and of stage 2, and as many training ones, in a short run and in a long one, at most
EVAL_PASSES = 6                 # held-out ones under three conditions and with raw weights, training ones with both
PREVIEWS = 8                    # pictures in a preview
PREVIEW_STEPS = 25              # of DDIM
ENCODED = 16                    # pictures encoded at once for the cache: always, so that a filling goes on where it was
POSES_KEPT = 4096               # in a checkpoint of stage 2, 0.4 MB: sample.py says by them how usual a pose is
NO_SAY = 1e-30                  # the adversary's factor while --minutes measures: it takes its time and has no say
SAME_SIGNAL = 1.0               # seconds in which another is the first, passed on by a shell that hangs up or torchrun
STAGE_1 = "runs/vq/last.pt"     # the checkpoint that stage 2 takes where --vq does not say
TOLERATED = 10                  # steps in a row without a finite loss that are skipped; then the run stops
# What may differ from the resumed run (of stage 1 the hash of its weights decides, not the path), with --accept-data
# too, and what the run finds out by itself.
HARMLESS = {"minutes", "measured", "workers", "device", "compile", "out", "vq", "lpips", "keep_every", "accept_data",
            "micro_batch", "checkpointing", "patience"}
OF_DATA = {"data", "val", "pictures", "data_hash"}
FOUND = {"pictures", "data_hash", "vq_hash"}
REHEARSED = 8                   # steps, at most, by which memory and time of a run are forecast
MOST_REHEARSED = 20             # seconds; a step that takes longer is done twice
MARGIN = 0.92                   # share of the memory given with --fit that is planned for: allocators leave holes
LEAST_MICRO_BATCH = 8           # below it a GPU idles, and checkpointing is the cheaper way to save memory
PATIENCE = timedelta(hours=24)  # that ranks wait for each other, as while one encodes all pictures; under gloo a dead
                                #   one is noticed at once all the same, under nccl torchrun ends the others in 30 s


# ------------------------------------------------------------------------------------------------ the recipes

@dataclass(frozen=True)
class Recipe:
    """How one stage is trained; the learning rate is the one used, whatever the batch size."""
    batch_size: int
    lr: float
    minutes: float | None = None                    # the default length, or
    steps: int | None = None
    lr_final: float = 1.0                           # share of lr left at the end of a cosine; 1.0 is constant
    warmup: int = 50                                # steps of linear warm-up
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    free: float = 0.0                               # stage 1: share of the run before the codebook is switched on
    draw_codes: bool = True                         # from encoder outputs, dead ones again; False: the reference
    loss: VQLossConfig = VQLossConfig()             # stage 1: L1 and codebook alone, unless it says more
    p_drop: float = 0.1                             # stage 2: share of poses dropped, for guidance
    ema_decay: float = 0.9999                       # stage 2: with warm-up min(d, (1 + n) / (10 + n))


@dataclass(frozen=True)
class Preset:
    size: int                                       # side of the pictures, pixels
    vq_config: VQConfig
    unet: dict                                      # the fields of UNetConfig that the latent and the doors leave open
    cond: ConditionConfig
    vq: Recipe
    ldm: Recipe
    normalise: bool = True                          # latents to mean 0 and std 1 a channel, from the cache
    schedule: dict = field(default_factory=lambda: {"timesteps": 1000, "linear_start": 0.0015, "linear_end": 0.0195})


# Small autoencoders are norm-free with branches that start at zero: GroupNorm costs them 4 dB (the picture's absolute
# colour is lost). Their codes follow by moving average, after a time without quantisation.
NORM_FREE = {"norm_groups": 0, "zero_init": True, "ema_codebook": True}
# Large ones are trained as VQGANs: with LPIPS, and with a discriminator once the reconstruction has settled. Small ones
# are not: in minutes the discriminator takes 5 dB and gives nothing back (benchmarks/RESULTS.md).
VQGAN = VQLossConfig(perceptual=1.0, disc_weight=0.75, disc_start=0.1, disc_ramp=0.05, disc_cap=100.0)
# The pose enters by maps: of seven ways the one that steers best at equal time (benchmarks/RESULTS.md).
MAPS = ("maps",)


def _unet(ch: int, mult: tuple[int, ...], attn: tuple[int, ...], heads: int, blocks: int = 2) -> dict:
    return {"model_channels": ch, "channel_mult": mult, "attention_resolutions": attn, "num_heads": heads,
            "num_res_blocks": blocks}


# fmt: off
PRESETS = {
    "toy": Preset(64, VQConfig(ch=32, ch_mult=(1, 2, 2), n_embed=2048, resolution=64, **NORM_FREE),
        _unet(64, (1, 2, 2), (2, 4), 4, blocks=1), ConditionConfig(MAPS, 64),
        vq=Recipe(8, 1e-3, minutes=9.5, lr_final=0.03, free=0.15),
        ldm=Recipe(32, 4e-4, minutes=24.0, lr_final=0.05, warmup=100)),
    "small": Preset(128, VQConfig(ch=32, n_embed=4096, resolution=128, **NORM_FREE),
        _unet(64, (1, 2, 3, 4), (4, 8), 4), ConditionConfig(MAPS, 64),
        vq=Recipe(4, 5e-4, minutes=60, lr_final=0.03, free=0.15, warmup=100),        # 1e-3 diverges at 128 pixels
        ldm=Recipe(16, 4e-4, minutes=240, lr_final=0.05, warmup=100)),
    # ours at the seed's size: its networks, but codes drawn from encoder outputs that follow by moving average (the
    # best of six ways, benchmarks/RESULTS.md), poses by maps, normalised latents
    "base": Preset(256, VQConfig(ema_codebook=True),
        _unet(160, (1, 2, 3, 4), (2, 4, 8), 8), ConditionConfig(MAPS, 256),
        vq=Recipe(4, 1e-4, steps=180_000, lr_final=0.1, free=0.01, warmup=1000, loss=VQGAN),
        ldm=Recipe(32, 1e-4, steps=225_000, lr_final=0.1, warmup=1000)),
    # the seed's own: taming's objective and codebook start, batch 32 at 2e-6 a sample, one raw-id token, no condition
    # dropout, latents as they come; but ours mirrors pictures, clips gradients and has beta on the right term
    "danbooru": Preset(256, VQConfig(),
        _unet(160, (1, 2, 3, 4), (8, 4, 2), 8), compvis.PUBLISHED["danbooru"].cond,
        vq=Recipe(4, 1.8e-5, steps=180_000, warmup=1, betas=(0.5, 0.9), draw_codes=False,
                  loss=VQLossConfig(perceptual=1.0, disc_weight=0.8, disc_start=10_000)),
        ldm=Recipe(32, 6.4e-5, steps=225_000, warmup=1, betas=(0.9, 0.999), weight_decay=0.01, p_drop=0.0),
        normalise=False),
    # the autoencoders of f8 and f16 have as many parameters as that of f4 (54, 56 and 55 million)
    "f8": Preset(256, VQConfig(ch_mult=(1, 2, 3, 3), z_channels=4, embed_dim=4, n_embed=16384, attn_resolutions=(32,),
                               ema_codebook=True),
        _unet(160, (1, 2, 3, 4), (1, 2, 4), 8), ConditionConfig(MAPS, 256),
        vq=Recipe(4, 1e-4, steps=180_000, lr_final=0.1, free=0.01, warmup=1000, loss=VQGAN),
        ldm=Recipe(32, 1e-4, steps=225_000, lr_final=0.1, warmup=1000)),
    "f16": Preset(256, VQConfig(ch_mult=(1, 1, 2, 3, 3), z_channels=8, embed_dim=8, n_embed=16384,
                                attn_resolutions=(16,), ema_codebook=True),
        _unet(160, (1, 2, 4), (1, 2, 4), 8), ConditionConfig(MAPS, 256),
        vq=Recipe(4, 1e-4, steps=180_000, lr_final=0.1, free=0.01, warmup=1000, loss=VQGAN),
        ldm=Recipe(32, 1e-4, steps=225_000, lr_final=0.1, warmup=1000)),
}
# fmt: on


@dataclass(frozen=True)
class Config:
    """One run, everything resolved: what config.json holds."""
    stage: str
    preset: str
    data: str
    val: str | None
    out: str
    vq: str | None                                  # stage 2: the checkpoint of stage 1
    seed: int
    device: str
    amp: str                                        # bf16, fp16 or off
    compile: bool
    workers: int
    micro_batch: int | None                         # pictures in a network at once, in each rank; None: all of them
    checkpointing: bool                             # activations are computed again in backward, not kept
    size: int
    minutes: float | None
    steps: int | None                               # None until --minutes has been turned into steps
    recipe: Recipe
    vq_config: VQConfig
    unet_config: UNetConfig | None
    cond_config: ConditionConfig | None
    schedule: dict | None
    normalise: bool
    pictures: int | None = None                     # found by the run itself: how many train
    vq_hash: str | None = None                      # stage 2: of the weights in `vq`
    measured: int | None = None                     # --minutes: how many steps were needed to fix `steps`
    lpips: tuple[str, ...] = ()                     # stage 1: files with the weights of LPIPS
    keep_every: int | None = None                   # steps between checkpoints that stay
    data_hash: str | None = None                    # found by the run itself, of all pictures and poses
    accept_data: bool = False                       # resume though the pictures have changed
    patience: int | None = None                     # stage 2: evaluations of overfitting in a row that end the run


def make_config(args: argparse.Namespace) -> Config:
    """Preset + flags -> Config; ValueError for what cannot be."""
    if args.preset not in PRESETS:
        raise ValueError(f"there is no preset {args.preset!r}; the presets are {', '.join(PRESETS)}")
    preset = PRESETS[args.preset]
    recipe = getattr(preset, args.stage)
    recipe = replace(recipe, **given(batch_size=args.batch_size, lr=args.lr))
    if args.stage == "vq":
        recipe = replace(recipe, loss=make_loss(recipe.loss, args))
    steps, minutes = args.steps, args.minutes
    if steps is None and minutes is None:
        steps, minutes = recipe.steps, recipe.minutes
    if not 0 <= args.seed < 2 ** 63:
        raise ValueError(f"--seed is {args.seed}; it must be a whole number from 0 to 2^63 - 1")
    if (args.workers or 0) < 0:
        raise ValueError(f"--workers is {args.workers}; it must be 0 or more")
    for name, value in (("--steps", steps), ("--minutes", minutes), ("--batch-size", recipe.batch_size),
                        ("--lr", recipe.lr), ("--micro-batch", args.micro_batch), ("--keep-every", args.keep_every),
                        ("--patience", args.patience)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}; it must be a positive number")
    device, out = checkpoint.find_device(args.device), args.out or f"runs/{args.stage}"
    data.check_out(out, args.data, args.val)
    latent, cond = preset.vq_config.embed_dim, preset.cond
    if args.condition:
        cond = replace(cond, doors=tuple(args.condition.split("+")))
    ldm = args.stage == "ldm"
    return Config(
        stage=args.stage, preset=args.preset, data=args.data, val=args.val, out=out,
        vq=(args.vq or STAGE_1) if ldm else None, seed=args.seed, device=device, amp=find_amp(args.amp, device),
        compile=args.compile, workers=args.workers if args.workers is not None else data.find_workers(device),
        micro_batch=args.micro_batch, checkpointing=args.checkpointing, size=preset.size,
        minutes=None if steps else minutes, steps=steps, recipe=recipe, vq_config=preset.vq_config,
        unet_config=UNetConfig(in_channels=latent + cond.map_channels, out_channels=latent,
                               context_dim=cond.context_dim, **preset.unet) if ldm else None,
        cond_config=cond if ldm else None, schedule=preset.schedule if ldm else None, normalise=preset.normalise,
        lpips=tuple(args.lpips_weights or ()), keep_every=args.keep_every,
        accept_data=args.accept_data, patience=args.patience)


def make_loss(loss: VQLossConfig, args: argparse.Namespace) -> VQLossConfig:
    """The objective of stage 1: the preset's and the flags."""
    if args.disc_weight and not loss.disc_weight:           # when it comes in, and how softly, as where it is usual
        loss = replace(VQGAN, perceptual=loss.perceptual)
    loss = replace(loss, **given(perceptual=args.perceptual, disc_weight=args.disc_weight, disc_start=args.disc_start))
    if args.disc_start is not None and not loss.disc_weight:
        raise ValueError(f"--disc-start is {args.disc_start:g}, but preset {args.preset} has no discriminator; add "
                         "--disc-weight 0.75 to have one")
    if (args.lpips_weights or args.download_lpips) and not loss.perceptual:
        flag = "--lpips-weights" if args.lpips_weights else "--download-lpips"
        raise ValueError(f"{flag} is given, but the perceptual loss is off in preset {args.preset}; add --perceptual 1 "
                         "to have it")
    return loss


def given(**flags: object) -> dict:
    """The flags that were given."""
    return {name: value for name, value in flags.items() if value is not None}


def find_amp(amp: str, device: str) -> str:
    """auto -> bf16 where the hardware computes in it, fp16 on an older GPU, else off."""
    cuda = device.startswith("cuda")
    if amp == "fp16" and not cuda:
        raise ValueError("--amp fp16 needs a CUDA GPU, for its GradScaler; use --amp bf16 or off")
    if amp != "auto":
        return amp
    return "bf16" if checkpoint.has_bf16(device) else "fp16" if cuda else "off"


def at_once(c: Config) -> int:
    """Pictures in a network at once, in this rank; measuring keeps to it too, so it needs no more memory."""
    share = c.recipe.batch_size // world()
    return min(c.micro_batch or share, share)


def set_up(device: str) -> None:
    """What holds for a whole process that trains on a GPU."""
    if device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")          # TF32: what autocast leaves in float32 needs no more
        torch.backends.cudnn.benchmark = True               # pictures are all of one size


def autocast(c: Config) -> AbstractContextManager:
    return checkpoint.autocast(c.amp, c.device)


def lr_at(step: int, c: Config) -> float:
    """Linear warm-up, then a cosine from lr to lr_final * lr: a function of the step (c.steps counts after warm-up)."""
    r = c.recipe
    if step < r.warmup or c.steps is None:
        return r.lr * min(1.0, (step + 1) / r.warmup)
    progress = (step - r.warmup) / max(1, c.steps - r.warmup)
    return r.lr * (r.lr_final + (1 - r.lr_final) * 0.5 * (1 + math.cos(math.pi * progress)))


def seed_step(seed: int, step: int) -> None:
    """Everything random in step k (noise, timesteps, dropout, restarts) comes from torch's generator, seeded here."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0] >> 1))


def descend(loss: Tensor, params: list[Tensor], opt: torch.optim.Optimizer, scaler: torch.amp.GradScaler, run: Run,
            step: int) -> Tensor | None:
    """Clip and optimiser step, after the backward pass of `loss`. Returns the gradient's norm, or None where nothing
    moved: loss or gradient was not finite. In fp16 an infinite gradient is how the GradScaler finds its scale, so that
    is not held against the run until the scale is so small that overflow is no excuse.
    """
    scaler.unscale_(opt)
    grad_norm = nn.utils.clip_grad_norm_(params, 1.0)
    # The one time in a step that the CPU waits for a GPU: the price of skipping steps that are not finite.
    loss_, norm = torch.stack([loss.detach(), grad_norm]).tolist()
    fine, finite = run.usable("loss", loss_, step), math.isfinite(norm)
    if fine and finite:
        scaler.step(opt)
    scaler.update()
    if fine and not finite and (not scaler.is_enabled() or scaler.get_scale() < 1):
        run.usable("gradient norm", norm, step)
    return grad_norm if fine and finite else None


def set_lr(lr: float, *optimizers: torch.optim.Optimizer) -> None:
    for opt in optimizers:
        for group in opt.param_groups:
            group["lr"] = lr


class EMA:
    """Moving average of parameters with decay min(d, (1 + n) / (10 + n)) at update n = 1, 2, ..."""

    def __init__(self, model: nn.Module, average: nn.Module, decay: float):
        self.decay = decay
        pairs = [(p, a) for p, a in zip(model.parameters(), average.parameters(), strict=True) if p.requires_grad]
        self.params, self.average = zip(*pairs, strict=True)

    @torch.no_grad()
    def update(self, n: int) -> None:
        d = min(self.decay, (1 + n) / (10 + n))
        torch._foreach_lerp_(self.average, self.params, 1 - d)


# ------------------------------------------------------------------------------------------- several processes

# torchrun starts `world` of these processes, numbered by rank, one a GPU. Each makes the same random draws for the
# whole batch of a step and works on its slice, so that a step does not depend on how many they are. Rank 0 alone
# evaluates and writes files; the others wait for it in the next step.

def join_ranks(c: Config) -> Config:
    """Joins the processes that torchrun has started, if it did; c on the device of this one, a GPU of its own."""
    n = int(os.environ.get("WORLD_SIZE", 1))
    if n == 1:
        return c
    if c.recipe.batch_size % n:
        raise ValueError(f"a batch of {c.recipe.batch_size} cannot be shared by {n} processes; give a --batch-size "
                         f"that {n} divides")
    if c.device.startswith("cuda:"):
        raise ValueError(f"--device is {c.device}, but torchrun started {n} processes, which cannot share one GPU; "
                         "leave --device out")
    if c.device == "cuda":
        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", n)), torch.cuda.device_count()
        if here > gpus:
            raise ValueError(f"torchrun started {here} processes, but there are {gpus} GPUs; give --nproc-per-node "
                             f"{gpus}")
        c = replace(c, device=checkpoint.find_device(f"cuda:{os.environ['LOCAL_RANK']}"))
        torch.cuda.set_device(c.device)
    dist.init_process_group("nccl" if c.device.startswith("cuda") else "gloo", timeout=PATIENCE)
    return c


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def parallel(net: nn.Module, find_unused: bool = False) -> nn.Module:
    """`net`, with its gradients averaged over the ranks in backward where there are several."""
    if world() == 1:
        return net
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)      # torch 2.13 has another word for it, which 2.11 lacks
        return DistributedDataParallel(net, broadcast_buffers=False, find_unused_parameters=find_unused)


class Pass(nn.Module):
    """function(*args), which uses the parameters of `module`, as a forward pass: what `parallel` can take."""

    def __init__(self, module: nn.Module, function: Callable):
        super().__init__()
        self.module, self.function = module, function

    def forward(self, *args: object) -> object:
        return self.function(*args)


def gathered(x: Tensor) -> Tensor:
    """x [B, ...] of all ranks [world B, ...], in their order."""
    if world() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def averaged_over_ranks(x: Tensor) -> Tensor:
    if world() > 1:
        dist.all_reduce(x)
        x /= world()
    return x


def broken_list() -> str:
    """Name of this rank's list of unusable pictures, in the run folder."""
    return f"broken-{rank()}.txt" if rank() else "broken.txt"


def say(text: str) -> None:
    """One voice for all ranks."""
    if rank() == 0:
        print(text)


def any_rank(flag: bool, device: str) -> bool:
    """True in every rank where it is in one."""
    return bool(averaged_over_ranks(torch.tensor(float(flag), device=device)) > 0)


def micro_batches(n: int, c: Config, net: nn.Module) -> Iterator[slice]:
    """Slices of n pictures, each as many as the network takes at once; their gradients add up to those of all n. The
    ranks exchange gradients in the backward pass of the last slice only."""
    size = at_once(c)
    for i in range(0, n, size):
        with ExitStack() as stack:
            if i + size < n and isinstance(net, DistributedDataParallel):
                stack.enter_context(net.no_sync())
            yield slice(i, min(i + size, n))


# ------------------------------------------------------------------------------------------- the run's folder

class Run:
    """The run folder and the clock: resuming, log.jsonl, checkpoints, the number of steps. Knows no model.

    Files are written in the order log.jsonl, step-*.pt, best.pt, last.pt, pictures: what comes before last.pt a resumed
    run makes again, what comes after it it makes up for. So a kill costs the time since last.pt, and nothing else.
    """

    def __init__(self, c: Config, fresh: bool):
        self.began = time.monotonic()
        self.c, self.dir, self.resumed = c, Path(c.out), None
        self.last, self.best_path, self.log_path = self.dir / "last.pt", self.dir / "best.pt", self.dir / "log.jsonl"
        if rank() == 0:
            (self.dir / "samples").mkdir(parents=True, exist_ok=True)
            for path in self.ours(".partial"):          # of a process that was killed while it wrote
                path.unlink()
        self.fresh, self.measuring, self.said = fresh, [], ""
        if self.last.exists():
            self._look_at_last()
        self.start = self.resumed["step"] if self.resumed else 0
        self.best = self.resumed["train"]["best"] if self.resumed else None
        self.skipped = self.resumed["train"]["skipped"] if self.resumed else 0
        self.overflows = self.resumed["train"].get("overflows", 0) if self.resumed else 0
        self.in_a_row, self.skipped_at, self.saved_at = 0, -1, time.monotonic()
        self.saved_step = self.start or None        # of last.pt
        self.stopping = False                       # was this process told to stop?
        self.alarm = None                           # what --patience has run out over, in words
        self.training, self.trained = 0.0, 0        # seconds and steps since the last line of the log, in this process

    def ours(self, end: str = "") -> list[Path]:
        """The files of a run that are in the folder, with `end` at their names; samples/ has its pictures besides."""
        names = "last.pt", "best.pt", "log.jsonl", "config.json", "curves.png", "step-" + "[0-9]" * 7 + ".pt"
        return [path for name in names for path in self.dir.glob(name + end)]

    def _look_at_last(self) -> None:
        """Sets `resumed` to what last.pt holds, unless --fresh; ValueError where it is not to be touched."""
        try:
            found = checkpoint.load(self.last, self.c.stage, "give another --out")
        except checkpoint.WrongStage:
            raise
        except ValueError as e:
            if self.fresh:
                return
            raise ValueError(f"{e}; --fresh starts over") from None
        if not self.fresh:
            if "train" not in found:
                raise ValueError(f"{self.last} holds no training state (a copy of best.pt?) and cannot be resumed; "
                                 "--fresh starts over")
            self._check_same(found["config"])
            self.resumed = found

    def begin(self, measure: Callable[[int], tuple[dict, float, str]], payload: Callable[[], dict], eval_forwards: int,
              panels: Panels) -> None:
        """Called once, right before the first step: only now, when nothing can go wrong any more, is --fresh obeyed.

        `measure(step)` evaluates: figures, the score that decides about best.pt (higher is better), a line to print; it
        leaves in `preview` what draws into a path. `eval_forwards` pictures go forward in it. `payload()` is what a
        checkpoint holds; `panels` are of plot_curves.
        """
        self.measure, self.payload, self.eval_forwards, self.panels = measure, payload, eval_forwards, panels
        if rank() > 0:
            self.resumed = None
            return
        if self.fresh:
            for path in (*self.ours(), *(self.dir / "samples").glob("[0-9]" * 7 + ".png")):
                path.unlink()
        self.resumed = None                         # restored by now: gigabytes for a large model
        evaluate_again = self.start > 0 and self.due(self.start - 1) and not is_picture(self.picture(self.start))
        self._cut_log(evaluate_again)
        self._write_config()
        if evaluate_again:
            score = self.evaluate(self.start - 1)
            self.save(self.start, self.payload(), score)
            self.draw(self.start)
        self.saved_at = self.left = time.monotonic()

    def _check_same(self, old: dict) -> None:
        """A resumed run must be the one that was begun; its length stays what it was."""
        old, new = completed(old, self.c), plain(self.c)
        if self.c.steps is None:
            new["steps"] = old["steps"]
        for key in new:
            unknown = key in FOUND and old.get(key) is None     # to the older version that began it
            if new[key] != old.get(key) and key not in HARMLESS and not unknown and not (
                    key in OF_DATA and self.c.accept_data):
                if key == "vq_hash":
                    raise ValueError(f"{self.dir} holds a run in the latents of another autoencoder than {self.c.vq} "
                                     "is now, because stage 1 was trained since or --vq names another one; give "
                                     "another --out, or --fresh")
                name, was, now = differing(key, old.get(key), new[key])
                raise ValueError(f"{self.dir} holds a run with {name} = {was}, but this command has {name} = {now}; "
                                 + ("go on with the pictures as they are now by --accept-data, or " if key in OF_DATA
                                    else "repeat the old command to resume it, or ")
                                 + "give another --out, or --fresh")
        if self.c.minutes not in (None, old["minutes"]):
            say(f"{self.dir} keeps its length of {old['steps']} steps; --fresh makes it {self.c.minutes:g} minutes")
        self.c = replace(self.c, steps=old["steps"], minutes=old["minutes"], measured=old["measured"])

    def _cut_log(self, evaluate_again: bool) -> None:
        """Steps after the checkpoint will be made, and logged, again; so may be the evaluation of its own step."""
        if self.log_path.exists():
            first = (self.start - evaluate_again, evaluate_again)       # rows (step, is it an evaluation?) from here
            kept = [r for r in read_log(self.log_path) if (r["step"], any(k.startswith("val_") for k in r)) < first]
            with self.writing(self.log_path), checkpoint.replacing(self.log_path) as f:
                f.write("".join(json.dumps(r) + "\n" for r in kept).encode())

    def _write_config(self) -> None:
        path = self.dir / "config.json"
        with self.writing(path), checkpoint.replacing(path) as f:
            f.write(json.dumps(plain(self.c), indent=1).encode())

    @contextmanager
    def writing(self, path: Path) -> Iterator[None]:
        """A disk that is full, or a folder that is gone, ends the run in one sentence that says what is left."""
        try:
            yield
        except OSError as e:
            raise OSError(f"cannot write {path} ({e.strerror or e}), so the run stops; {self.what_is_saved()}; "
                          "mend that and give the same command again") from None

    def what_is_saved(self) -> str:
        return "no checkpoint was made yet" if self.saved_step is None else (
            f"{self.last} holds the last good checkpoint, of step {self.saved_step}")

    def after_step(self, step: int, numbers: dict[str, Tensor | int], bar: tqdm, stopped: list[int]) -> bool:
        """The clock, the bar, the log, evaluation, checkpoint; does the run end here?

        `numbers` are what the log says of the step, none of one that was skipped.
        """
        self.clock(step)
        self.stopping = bool(stopped)                   # once for all: a signal from here on counts in the next step
        if world() > 1:
            self.stopping = any_rank(self.stopping, self.c.device)          # all ranks stop after the same step
        if rank() == 0:
            self.housekeep(step, numbers, bar)
        return step + 1 == self.c.steps or self.stopping or self.out_of_patience(step)

    def out_of_patience(self, step: int) -> bool:
        """Has the evaluation after this step, which rank 0 alone makes, used up --patience?"""
        return self.c.patience is not None and self.due(step) and any_rank(self.alarm is not None, self.c.device)

    def housekeep(self, step: int, numbers: dict[str, Tensor | int], bar: tqdm) -> None:
        self.training, self.trained = self.training + time.monotonic() - self.left, self.trained + 1
        bar.total = self.c.steps
        bar.update()
        last, bad, score = step + 1 == self.c.steps, self.skipped_at == step, None
        self.overflows += not numbers and not bad           # of fp16, forgiven by descend
        if step % LOG_EVERY == 0 or last:
            values = {name: float(value) for name, value in numbers.items()}
            if self.trained >= LOG_EVERY:                   # of fewer steps a rate says little
                values["img_s"] = self.trained * self.c.recipe.batch_size / self.training
            self.training, self.trained = 0.0, 0
            bar.set_postfix(loss=values.get("loss"), refresh=False)
            self.log(step, **values, lr=lr_at(step, self.c), **({"skipped": self.skipped} if self.skipped else {}),
                     **({"overflows": self.overflows} if self.overflows else {}))
        if self.due(step) and (last or not self.stopping):      # who is told to stop saves; the resumed run evaluates
            score = self.evaluate(step)
        # Weights that make one loss after another not a number may be ruined: the checkpoint before them stays.
        if (score is not None or self.save_due(step) or (self.stopping and self.c.steps)) and not (
                bad and self.in_a_row > last):
            self.save(step + 1, self.payload(), score)
        if score is not None:
            bar.write(f"step {step + 1:6d}  {self.said}")
            self.draw(step + 1)
        self.left = time.monotonic()                        # what was done here since the step is no training

    def evaluate(self, step: int) -> float:
        """The score after this step; the log has the figures."""
        result, score, self.said = self.measure(step + 1)
        self.log(step, **{f"val_{name}": value for name, value in result.items()})
        return score

    def picture(self, step: int) -> Path:
        return self.dir / "samples" / f"{step:07d}.png"

    def draw(self, step: int) -> None:
        """The pictures of an evaluation, once its checkpoint is safe; `preview` comes from measure."""
        with self.writing(self.dir / "curves.png"):
            plot_curves(self, self.panels)
        with self.writing(self.picture(step)):
            self.preview(self.picture(step))

    def clock(self, step: int) -> None:
        """Called after each step; after the first few of a --minutes run fixes its number of steps.

        A step costs three times the forward pass of its batch.
        """
        if self.c.steps is not None:
            return
        if self.c.device.startswith("cuda"):
            torch.cuda.synchronize(self.c.device)
        now = torch.tensor([time.monotonic(), self.began], dtype=torch.float64, device=self.c.device)
        if world() > 1:
            dist.broadcast(now, 0)                      # one clock for all, or they would disagree on the length
        now, began = now.tolist()
        self.measuring.append(now)
        n, budget, gone = len(self.measuring), self.c.minutes * 60, now - began
        measuring = self.measuring[-1] - self.measuring[0]
        if n >= MEASURE_STEPS or (n >= 3 and measuring > budget / 8):       # not 40 times where a step takes a minute
            rate = statistics.median(np.diff(self.measuring[n // 4:]))
            left = (budget * (1 - RESERVE) - gone) / rate                                    # in steps
            done = step + 1

            def costs(more: int) -> float:                      # in steps, evaluations that are still to come included
                between = self.between(done + more)
                return more + max(1, (done + more) // between - done // between) * self.eval_steps()
            more = bisect.bisect_right(range(1, max(2, int(left) + 1)), left, key=costs)    # as many as fit
            self.c = replace(self.c, steps=done + max(1, more), measured=done)
            if self.c.steps < max(FEW_STEPS, FEW_WARMUPS * self.c.recipe.warmup):
                spent = f"after {(gone - measuring) / 60:.1f} minutes of preparation"
                say(f"{self.c.minutes:g} minutes are {self.c.steps} steps of {rate:.2g} s and evaluations, {spent}, "
                    "too few to learn much; give more --minutes, or --steps, which counts on no speed" + (
                        "" if os.environ.get("OMP_NUM_THREADS") else "; where other programs use the cores, "
                        "OMP_NUM_THREADS=1 makes steps faster"))
            if rank() == 0:
                self._write_config()

    def usable(self, name: str, value: float, step: int) -> bool:
        """Is it finite? Counts the steps where it is not; ValueError at the tenth in a row."""
        if math.isfinite(value):
            return True
        self.in_a_row = self.in_a_row + 1 if self.skipped_at == step - 1 else 1
        self.skipped, self.skipped_at = self.skipped + 1, step
        if self.in_a_row >= TOLERATED:
            raise self.diverged(f"the {name} was not finite in {TOLERATED} steps in a row and is {value} at "
                                f"step {step}")
        return False

    def diverged(self, what: str) -> ValueError:
        return ValueError(f"{what}, so the run stops; {self.what_is_saved()}; start anew, in another --out "
                          "or with --fresh, with a lower --lr, or with --amp off")

    def log(self, step: int, **values: float) -> None:
        with self.writing(self.log_path), open(self.log_path, "a") as f:
            f.write(json.dumps({"step": step, **values}) + "\n")

    def eval_steps(self) -> float:
        """How many steps take as long as an evaluation."""
        return self.eval_forwards / (3 * self.c.recipe.batch_size)

    def evaluations(self, steps: float) -> int:
        """How many evaluations a run of so many steps has."""
        return max(EVALS, min(MOST_EVALS, int(EVAL_SHARE * steps / self.eval_steps())))

    def between(self, steps: int) -> int:
        """How many steps a run of so many takes from one evaluation to the next."""
        return max(1, steps // self.evaluations(steps))

    def due(self, step: int) -> bool:
        """Is an evaluation due after this step?"""
        if (n := self.c.steps) is None:
            return False
        between = self.between(n)
        return step + 1 == n or (step + 1) % between == 0 and n - step > between // 2

    def save_due(self, step: int) -> bool:
        """Is a checkpoint due after this step, evaluation or not?"""
        return self.c.steps is not None and (self.is_kept(step + 1) or time.monotonic() - self.saved_at >= SAVE_SECONDS)

    def is_kept(self, step: int) -> bool:
        return self.c.keep_every is not None and step % self.c.keep_every == 0

    def save(self, step: int, payload: dict, score: float | None = None) -> None:
        """last.pt; before it best.pt, where `score` (higher is better) is the best so far, and step-*.pt every so many.

        These two lack the training state: they are for sampling. ValueError where the weights are no numbers.
        """
        if name := checkpoint.not_finite(payload):
            raise self.diverged(f"{name} is not finite after step {step - 1}")
        better = score is not None and math.isfinite(score) and (self.best is None or score > self.best)
        best = score if better else self.best
        payload = payload | {"format": checkpoint.FORMAT, "step": step, "config": plain(self.c)}
        model = {k: v for k, v in payload.items() if k != "train"}
        payload["train"] = payload["train"] | {"best": best, "skipped": self.skipped, "overflows": self.overflows}
        with self.writing(self.log_path), open(self.log_path, "a") as f:
            os.fsync(f.fileno())            # a power cut must not leave a checkpoint whose steps were never logged
        for path, wanted, content in ((self.dir / f"step-{step:07d}.pt", self.is_kept(step), model),
                                      (self.best_path, better, model), (self.last, True, payload)):
            if wanted:              # last.pt last: it says that the others are there
                with self.writing(path):
                    checkpoint.save(path, content)
        self.best, self.saved_step, self.saved_at = best, step, time.monotonic()

    def finish(self, step: int) -> bool:
        """Says how the run ended; is it complete?"""
        if self.stopping and step != self.c.steps:
            say(f"{self.dir}: stopped at step {step} of {self.c.steps}; the same command again goes on from there"
                if self.c.steps else f"{self.dir}: stopped before its first checkpoint; nothing is lost but a moment")
            return False
        if step != self.c.steps:
            say(f"{self.dir}: out of patience at step {step} of {self.c.steps}; {self.go_on()}")
        minutes = (time.monotonic() - self.began) / 60
        say(f"{self.dir}: {self.said}\n{minutes:.1f} minutes, peak memory {peak_memory(self.c.device):.2f} GiB; "
            f"see {self.dir}/curves.png and {self.dir}/samples/")
        return True

    def go_on(self) -> str:
        return (f"{self.best_path} is the model to take; without --patience {self.c.patience} the same command goes on "
                "to the end")

    def is_complete(self) -> bool:
        """Nothing left to do? Says so."""
        complete = self.c.steps is not None and self.start >= self.c.steps
        if complete:
            say(f"{self.dir} is complete at step {self.start}, the length it was started with; --fresh starts it over, "
                "longer where --minutes or --steps say so")
        elif self.start and self.c.patience and self.log_path.exists() and (alarm := metrics.overfit.overfitting(
                [r for r in read_log(self.log_path) if r["step"] < self.start], self.c.patience)):
            say(f"{self.dir} is out of patience at step {self.start}: {alarm}; {self.go_on()}")
            return True
        elif self.start:
            say(f"{self.dir} goes on at step {self.start}" + (f" of {self.c.steps}" if self.c.steps else ""))
        return complete


def is_picture(path: Path) -> bool:
    """Is there a picture, whole?"""
    try:
        data.read_picture(path)
    except data.DataError:
        return False
    return True


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """`folder`, made where it is lacking, for this process alone; ValueError names the process that has it.

    The kernel's lock on the file `lock` counts, not the file: it goes with its process, however that ends. So what a
    kill -9 leaves behind is in nobody's way, whoever has that process's number by now.
    """
    path, owner = folder / "lock", None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while owner is None:
            f = open(path, "a+b")
            if not take(f):
                f.seek(0)
                owner = f.read().decode() or "another process"
            elif path.exists() and os.path.samestat(os.fstat(f.fileno()), path.stat()):
                break
            f.close()                               # else its holder has removed it since: take the next one
    except OSError as e:
        raise ValueError(f"--out {folder} cannot be written ({e.strerror}); choose another folder") from None
    if owner:
        raise ValueError(f"{folder} is being trained into by {owner}; wait for it or stop it, or give another --out")
    try:
        with suppress(OSError):                     # of a full disk: it is locked all the same
            f.truncate(0)
            f.write(f"process {os.getpid()} on {socket.gethostname()} since {time.ctime()}".encode())
            f.flush()
        yield
    finally:
        with suppress(OSError):                     # Windows removes no open file
            path.unlink()
        with suppress(OSError):                     # of a full disk, or where there are files in it
            f.close()
            folder.rmdir()


def take(f: BinaryIO) -> bool:
    """Locks an open file until it is closed or its process ends; False where another process has it."""
    try:
        import fcntl
        lock = partial(fcntl.lockf, f, fcntl.LOCK_EX | fcntl.LOCK_NB)       # not flock, which forked processes share
    except ImportError:                             # Windows, where others cannot read the bytes that are locked
        import msvcrt
        f.seek(1 << 20)
        lock = partial(msvcrt.locking, f.fileno(), msvcrt.LK_NBLCK, 1)
    try:
        lock()
    except (BlockingIOError, PermissionError):
        return False
    except OSError as e:
        print(f"{f.name} cannot be locked here ({e.strerror}), so a second run into its folder would not be noticed")
    return True


def differing(name: str, a: object, b: object) -> tuple[str, object, object]:
    """The first place where two values differ, however deeply nested, and what stands there."""
    while isinstance(a, dict) and isinstance(b, dict):
        key = next(k for k in [*b, *a] if a.get(k) != b.get(k))
        name, a, b = f"{name}.{key}", a.get(key), b.get(key)
    return name, a, b


def plain(c: object) -> dict:
    """A Config, or what stands in one -> nested dicts and lists as JSON gives them back."""
    return json.loads(json.dumps(c, default=asdict))


def completed(old: dict, like: object) -> dict:
    """The plain config of an older version, where what that did not know yet stands at its default."""
    made = dict(old)
    for f in fields(like):
        value = getattr(like, f.name)
        if f.name not in old and f.default is not MISSING:
            made[f.name] = plain(f.default)
        elif is_dataclass(value) and isinstance(old.get(f.name), dict):
            made[f.name] = completed(old[f.name], value)
    return made


def peak_memory(device: str) -> float:
    """GiB: of the GPU where it trains there, else of this process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    try:                        # Linux; what getrusage has includes the process that started this one
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 2 ** 20
    except (OSError, IndexError):
        pass
    try:
        import resource
    except ImportError:         # Windows
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 30 if sys.platform == "darwin" else 2 ** 20)


STOPPING = [number for name in ("SIGINT", "SIGTERM", "SIGHUP") if (number := getattr(signal, name, None))]


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Ctrl-C, SIGTERM (a machine that is taken away) and SIGHUP (a terminal that was closed) fill the list that is
    yielded, so a step is never cut in two; a second one does cut. What is ignored, as SIGHUP under nohup, stays so.
    """
    caught: list[int] = []
    since: list[float] = []

    def handler(number: int, _frame: object) -> None:
        if since:
            if time.monotonic() - since[0] > SAME_SIGNAL:   # a second one, of any kind
                raise KeyboardInterrupt
            return
        since.append(time.monotonic())
        caught.append(number)
        if number == getattr(signal, "SIGHUP", None):       # nobody listens; a failing print must not cost the rest
            leave_terminal()
        with suppress(OSError):                             # print is not safe here
            os.write(2, b"\nstopping after this step and saving; once more stops at once\n")

    old = {number: signal.signal(number, handler) for number in STOPPING if signal.getsignal(number) != signal.SIG_IGN}
    if hasattr(os, "register_at_fork"):     # signals come to all processes of a group: those that load pictures stay,
        kept_out = [number for number in STOPPING if number != signal.SIGTERM]      # but can be ended
        os.register_at_fork(after_in_child=lambda: old and signal.pthread_sigmask(signal.SIG_BLOCK, kept_out))
    try:
        yield caught
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)
        old.clear()                                         # and with it the hook for processes


def leave_terminal() -> None:
    """What is said from now on goes nowhere, unless it goes into a file."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        with suppress(OSError):
            if not stat.S_ISREG(os.fstat(stream).st_mode):
                os.dup2(nowhere, stream)
    os.close(nowhere)


def steps_bar(run: Run) -> tqdm:
    return tqdm(initial=run.start, total=run.c.steps, desc=run.c.stage, unit="step", dynamic_ncols=True, mininterval=1,
                disable=rank() > 0)


Panels = dict[str, dict[str, str] | Callable]       # by title: {label: key of the log}, or what draws (axes, rows)
PANELS_ACROSS = 4
MEAN_OF = 15                    # lines of the log: one batch is noisy
WIDE = 20                       # the largest over the smallest value: then the axis is logarithmic


def plot_curves(run: Run, panels: Panels) -> None:
    """curves.png: the panels over the steps of the run so far, its last sentence above."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows, down = read_log(run.log_path), math.ceil(len(panels) / PANELS_ACROSS)
    height = 3.2 * down + 0.6           # inches; the margins are fixed, for to find them takes longer than to draw
    fig, axes = plt.subplots(down, PANELS_ACROSS, figsize=(4.4 * PANELS_ACROSS, height), squeeze=False)
    fig.subplots_adjust(0.035, 0.35 / height, 0.985, 1 - 0.9 / height, wspace=0.17, hspace=0.3)
    fig.suptitle(f"{run.dir}, step {rows[-1]['step'] + 1}: {run.said}", fontsize=10)
    for ax, (title, panel) in zip(axes.flat, panels.items(), strict=False):
        (panel if callable(panel) else lambda ax, rows, panel=panel: plot_lines(ax, rows, panel))(ax, rows)
        ax.set_title(title, fontsize=10)
        ax.set_xlim(0, rows[-1]["step"] + 1)
        ax.tick_params(labelsize=8)
        ax.locator_params("x", nbins=5)
    for ax in axes.flat[len(panels):]:
        ax.axis("off")
    with checkpoint.replacing(run.dir / "curves.png") as f:
        fig.savefig(f, format="png", dpi=100)
    plt.close(fig)


def plot_lines(ax: object, rows: list[dict], keys: dict[str, str]) -> None:
    """The values of `keys`, {label: key}, into `ax`; of many a mean too."""
    every = []
    for label, key in keys.items():
        points = [(r["step"] + 1, r[key]) for r in rows if math.isfinite(r.get(key, math.nan))]
        if not points:
            continue
        steps, values = (np.array(column) for column in zip(*points, strict=True))
        every += values.tolist()
        few = len(points) < 2 * MEAN_OF or key.startswith("val_") or key == "lr"
        line, = ax.plot(steps, values, label=label, marker="." if len(points) < 2 * MEAN_OF else None,
                        alpha=1 if few else 0.25)
        if not few:
            mean = np.convolve(values, np.ones(MEAN_OF) / MEAN_OF, mode="valid")
            ax.plot(steps[MEAN_OF // 2:MEAN_OF // 2 + len(mean)], mean, color=line.get_color())
    ax.grid(alpha=0.3)
    if not every:
        ax.text(0.5, 0.5, "no value yet", ha="center", va="center", transform=ax.transAxes, color="gray")
    elif min(every) > 0 and max(every) > WIDE * min(every):
        ax.set_yscale("log")
    if len(ax.lines) and len(keys) > 1:
        ax.legend(fontsize=8)


SHARED_PANELS: Panels = {"gradient norm": {"": "grad_norm"}, "learning rate": {"": "lr"},
                         "pictures a second, training alone": {"": "img_s"}}


# --------------------------------------------------------------------------------------------------- stage 1

def train_vq(c: Config, fresh: bool = False, kind: type[Run] = Run) -> bool:
    """Trains the autoencoder of config c; True when it is complete, False when it was stopped."""
    train, val = data.open_data(c.data, c.size, c.val, remember=c.workers == 0)
    run = kind(replace(c, pictures=len(train), data_hash=data.data_hash(train, c.val and val)), fresh)
    if run.is_complete():
        return True
    device, r = torch.device(c.device), c.recipe
    lpips = lpips_of(c)                             # before the seed: what is drawn does not depend on it
    torch.manual_seed(c.seed)
    model = VQModel(c.vq_config).to(device, memory_format=torch.channels_last)
    model.checkpointing = c.checkpointing
    objective = VQLoss(r.loss, lpips).to(device, memory_format=torch.channels_last)
    params, last_layer, disc = [p for p in model.parameters() if p.requires_grad], model.decoder.conv_out.weight, None
    opt = torch.optim.AdamW(params, lr=r.lr, betas=r.betas, weight_decay=r.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=c.amp == "fp16")
    optimizers = {"optimizer": opt}
    if r.loss.disc_weight:
        disc, no_scaler = objective.disc, torch.amp.GradScaler(enabled=False)       # it is all float32
        disc_params = list(disc.parameters())
        disc_opt = torch.optim.AdamW(disc_params, lr=r.lr, betas=r.betas, weight_decay=r.weight_decay, fused=True)
        optimizers["disc_optimizer"] = disc_opt
    if run.resumed:
        state = run.resumed["train"]
        checkpoint.fill(model, run.resumed["vq"], str(run.last))
        model.quantize.usage.copy_(state["usage"])
        scaler.load_state_dict(state["scaler"])
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(state[name])
        if disc is not None:
            checkpoint.fill(disc, state["disc"], f"{run.last}: disc")
    if c.compile:                   # but for the last layer, whose gradient the adaptive weight takes out of turn
        model.encoder.compile()
        model.decoder.features = torch.compile(model.decoder.features)

    def reconstruct(x: Tensor, quantized: bool) -> tuple[Tensor, Tensor | float, Tensor, Tensor]:
        """h before the codes, codebook loss, indices, x_hat; not `quantized`, the codes are looked up for the clock."""
        h = model.encode(x)
        z_q, codebook_loss, indices = model.quantize(h)
        return h, codebook_loss if quantized else 0.0, indices, model.decode_raw(z_q if quantized else h)

    # Codes get no gradient before they are drawn, and must not be waited for.
    net = parallel(Pass(model, reconstruct), find_unused=r.draw_codes and not c.vq_config.ema_codebook)
    judge = parallel(Pass(disc, objective.discriminator)) if disc is not None else None

    def payload() -> dict:
        state = {name: optimizer.state_dict() for name, optimizer in optimizers.items()}
        state |= {"scaler": scaler.state_dict(), "usage": model.quantize.usage}
        return {"stage": "vq", "vq": model.state_dict(), "vq_config": asdict(c.vq_config),
                "train": state | ({} if disc is None else {"disc": disc.state_dict()})}

    def train_step(step: int, x: Tensor) -> dict[str, Tensor | int]:
        """One step on this rank's pictures x. A function, so that a skipped step's tensors are gone before the next."""
        first = quantize_from(run.c)
        if step == first and r.draw_codes:
            with torch.no_grad(), autocast(c):
                h = torch.cat([model.encode(x[i]) for i in micro_batches(len(x), c, model)])
            model.quantize.init_codes(gathered(h.float()))
        factor = objective.disc_factor(step, run.c.steps)
        if disc is not None and run.c.steps is None:                # timed, and without a say
            factor = max(factor, NO_SAY)
        opt.zero_grad(set_to_none=True)
        numbers, made = Sums(), []
        for i in micro_batches(len(x), c, net):
            with autocast(c):
                h, codebook_loss, indices, x_hat = net(x[i], step >= first)
            loss, parts = objective.generator(x[i], x_hat, codebook_loss, last_layer, factor)
            share = len(x[i]) / len(x)
            scaler.scale(share * loss).backward()
            numbers.add(share, parts | {"loss": loss})
            made.append((h.detach(), indices, x_hat.detach()))
        h, indices, x_hat = map(torch.cat, zip(*made, strict=True))
        grad_norm = descend(averaged_over_ranks(numbers["loss"]), params, opt, scaler, run, step)
        if grad_norm is None:
            return {}
        if step >= first:
            numbers["restarts"] = model.quantize.update(gathered(h), gathered(indices), restart=r.draw_codes)
            if world() > 1:         # sums on a GPU come in any order: a code must not drift apart by their last bits
                dist.broadcast(model.quantize.embedding.weight.data, 0)
        if factor > 0:
            disc_opt.zero_grad(set_to_none=True)
            for i in micro_batches(len(x), c, judge):
                loss, logits = judge(x[i], x_hat[i])
                share = len(x[i]) / len(x)
                (share * loss).backward()
                numbers.add(share, logits | {"d_loss": loss})
            descend(averaged_over_ranks(numbers["d_loss"]), disc_params, disc_opt, no_scaler, run, step)
        return numbers | {"grad_norm": grad_norm}

    def measure(step: int) -> tuple[dict, float, str]:
        result = metrics.images.reconstruction(
            model, (x for x, _ in data.in_order(val, at_once(c), EVAL_PICTURES)), device, lambda: autocast(c))
        run.preview = lambda path: preview_vq(model, val, path, c, result)
        return result, result["psnr"], (
            f"held-out PSNR {result['psnr']:.2f} dB, averaging over boxes has {result['psnr_box']:.2f}"
            + ("" if result["psnr"] > result["psnr_box"] else ": WORSE than that, train longer")
            + f"; codes used {result['codes_used']:.1%} of {c.vq_config.n_embed}, perplexity "
            f"{result['perplexity']:.0f}")

    panels: Panels = {"loss of the batch": {"": "loss"}, "PSNR, dB": {"held-out": "val_psnr", "boxes": "val_psnr_box"},
                      "codes used, share": {"": "val_codes_used"}, "perplexity of the codes": {"": "val_perplexity"}}
    if disc is not None:
        panels |= {"discriminator, logits": {"real": "logits_real", "reconstructed": "logits_fake"},
                   "adaptive weight": {"": "d_weight"}}
    panels |= SHARED_PANELS
    data.remember_all(train)
    run.begin(measure, payload, min(len(val), EVAL_PICTURES), panels)
    with stop_signals() as stopped, data.naming_broken(run.dir / broken_list(), train, val), steps_bar(run) as bar:
        stop = run.c.steps or sys.maxsize
        batches = data.batches(train, r.batch_size, c.seed, run.start, stop, c.workers, augment=True, device=device,
                               rank=rank(), world=world())
        for step, (x, _, _) in enumerate(batches, run.start):
            seed_step(c.seed, step)
            set_lr(lr_at(step, run.c), *optimizers.values())
            numbers = train_step(step, x)
            if run.after_step(step, numbers, bar, stopped):
                break
    return run.finish(step + 1)


class Sums(dict):
    """Weighted sums of what the micro-batches of a step say."""

    def add(self, share: float, numbers: dict[str, Tensor]) -> None:
        for name, value in numbers.items():
            self[name] = self.get(name, 0.0) + share * value.detach()


def lpips_of(c: Config) -> LPIPS | None:
    """The perceptual distance of config c; ValueError where it wants one and has no weights."""
    if not c.recipe.loss.perceptual:
        return None
    if not c.lpips:
        raise ValueError(f"preset {c.preset} trains with the perceptual loss LPIPS, whose VGG16 needs weights: give "
                         "them with --lpips-weights FILE [FILE], fetch them with --download-lpips (528 MB), or go "
                         "without: --perceptual off")
    return formats.lpips.load_lpips(c.lpips)


def quantize_from(c: Config) -> int:
    """The step of stage 1 that draws the codebook; a --minutes run cannot know it before its length is known."""
    if not c.recipe.draw_codes:
        return 0
    return sys.maxsize if c.steps is None else max(int(c.recipe.free * c.steps), c.measured or 0)


@torch.no_grad()
def preview_vq(model: VQModel, val: data.Pictures, path: Path, c: Config, result: dict) -> None:
    """A labelled picture of original | box | reconstruction | error for the first held-out pictures."""
    x = next(data.in_order(val, PREVIEWS, PREVIEWS))[0].to(c.device)
    model.eval()
    with autocast(c):
        x_hat = model(x)[0].float().clamp(-1, 1)
    model.train()
    box = metrics.images.box_baseline(x, c.vq_config.factor)
    error = (x_hat - x).abs().mean(1, keepdim=True).expand_as(x) * 2 - 1
    rows = [[data.to_uint8(b[i]) for b in (x, box, x_hat, error)] for i in range(len(x))]
    plots.save_grid(path, rows, columns=["original", f"{c.vq_config.factor}x box", "reconstruction", "error"],
                    title=f"{path.stem}: {result['psnr']:.2f} dB, box {result['psnr_box']:.2f} dB")


# --------------------------------------------------------------------------------------------------- stage 2

LDM_PANELS: Panels = {
    "eps loss": {"batch": "loss", "held-out": "val_raw", "training": "val_train_raw", "held-out, EMA": "val_right",
                 "training, EMA": "val_train"},
    "held-out eps loss, EMA": {"right pose": "val_right", "shuffled": "val_shuffled", "none": "val_null"},
    "gap by timestep: held-out above training, EMA":
        lambda ax, rows: plots.draw_bins(ax, rows, metrics.overfit.gaps),
    "by timestep: held-out above its best, EMA":
        lambda ax, rows: plots.draw_bins(ax, rows, metrics.overfit.risen),
    "shuffled / right": {"": "val_ratio"}, **SHARED_PANELS}


def train_ldm(c: Config, fresh: bool = False, kind: type[Run] = Run) -> bool:
    """Trains the diffusion model of config c in the latents of c.vq; True when complete, False when stopped."""
    stage1 = checkpoint.load_vq(c.vq, say=say)
    vq = checkpoint.build_vq(stage1, c.vq).to(c.device)
    check_latents(c, vq.config, stage1["config"]["size"])
    train, val = data.open_data(c.data, c.size, c.val, remember=False)     # each picture is looked at once
    c = replace(c, vq_config=vq.config, pictures=len(train), data_hash=data.data_hash(train, c.val and val),
                vq_hash=checkpoint.hash_of(stage1["vq"]))
    run = kind(c, fresh)
    if run.is_complete():
        return True
    c = run.c                       # a resumed run keeps its length, by which held-out pictures are chosen
    device, r = torch.device(c.device), c.recipe

    def encode(x: Tensor) -> Tensor:
        with torch.no_grad(), autocast(c):
            return vq.encode(x.to(device)).float()

    with data.naming_broken(run.dir / broken_list(), train, val):
        cache = dataset.latents.LatentCache(run.dir, f"{c.vq_hash} {c.amp}", train, encode, ENCODED, device, c.workers)
        held_out = list(data.in_order(val, at_once(c), eval_latents(c)))
    if sum(len(x) for x, _ in held_out) < 2:
        raise ValueError(f"{c.data} leaves fewer than 2 usable pictures to validate on: add pictures, or give a set of "
                         "its own with --val")
    C = vq.config.embed_dim
    mean, std = (cache.mean, cache.std) if c.normalise else (torch.zeros(C, 1, 1), torch.ones(C, 1, 1))
    if run.resumed:         # pictures may have been mended since: what is trained goes on in the space it knows
        mean, std = run.resumed["mean"], run.resumed["std"]

    torch.manual_seed(c.seed)
    ldm = LDM(vq, c.unet_config, c.cond_config, mean, std, c.schedule, knows_null=r.p_drop > 0)
    ldm = ldm.to(device, memory_format=torch.channels_last)
    averaged = copy.deepcopy(ldm).eval().requires_grad_(False)          # of use in rank 0 alone, as is the EMA
    averaged.vq = vq                                        # frozen: one copy serves both
    params = [p for p in ldm.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(params, lr=r.lr, betas=r.betas, weight_decay=r.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=c.amp == "fp16")
    if run.resumed:
        for model, state in ((averaged, run.resumed), (ldm, run.resumed["train"])):
            checkpoint.fill(model.unet, state["unet"], f"{run.last}: unet")
            checkpoint.fill(model.cond, state["cond"], f"{run.last}: cond")
        opt.load_state_dict(run.resumed["train"]["optimizer"])
        scaler.load_state_dict(run.resumed["train"]["scaler"])
    ema = EMA(ldm, averaged, r.ema_decay)
    diffusion = Diffusion(**c.schedule)
    ldm.unet.checkpointing = c.checkpointing
    if c.compile:
        ldm.unet.compile()
    net = parallel(ldm)
    mean, std = ldm.mean, ldm.std

    previewed = next(data.in_order(val, PREVIEWS, PREVIEWS))
    z_val = torch.cat([(encode(x) - mean) / std for x, _ in held_out])
    pose_val = torch.cat([pose for _, pose in held_out]).to(device)
    h, pose_train = cache.rows(2 * data.evenly(len(cache) // 2, len(z_val)))        # not mirrored, like held-out ones
    z_train, pose_train = (h.to(device) - mean) / std, pose_train.to(device)
    watch = metrics.overfit.Watch(diffusion, z_val, z_train)
    if run.resumed:
        watch.load(run.resumed["train"].get("watch", {}))

    poses = poses_kept(cache)

    def payload() -> dict:
        return checkpoint.ldm_payload(averaged) | {"poses": poses, "train": {
            "unet": ldm.unet.state_dict(), "cond": ldm.cond.state_dict(), "optimizer": opt.state_dict(),
            "scaler": scaler.state_dict(), "watch": watch.best}}

    def train_step(step: int, h: Tensor, pose: Tensor) -> dict[str, Tensor]:
        """One step on this rank's latents h under poses: the mean loss of the whole batch goes down."""
        z, pose = (h.to(device) - mean) / std, pose.to(device)
        B, mine = r.batch_size, data.share(r.batch_size, rank(), world())    # drawn for all ranks: none repeats another
        t = torch.randint(diffusion.timesteps, (B,), device=device)[mine]
        noise = torch.randn(B, *z.shape[1:], device=device)[mine]
        drop = (torch.rand(B, device=device) < r.p_drop)[mine]
        opt.zero_grad(set_to_none=True)
        numbers = Sums()
        for i in micro_batches(len(z), c, net):
            with autocast(c):
                loss = diffusion.loss(net, z[i], pose[i], t=t[i], noise=noise[i], drop=drop[i]).mean()
            share = len(z[i]) / len(z)
            scaler.scale(share * loss).backward()
            numbers.add(share, {"loss": loss})
        grad_norm = descend(averaged_over_ranks(numbers["loss"]), params, opt, scaler, run, step)
        if rank() == 0:
            ema.update(step + 1)
        return {} if grad_norm is None else numbers | {"grad_norm": grad_norm}

    def measure(step: int) -> tuple[dict, float, str]:
        how = {"batch_size": at_once(c), "autocast": lambda: autocast(c)}
        each = metrics.condition.condition_each(averaged, diffusion, z_val, pose_val, null=ldm.knows_null, **how)
        seen = metrics.condition.loss_each(averaged, diffusion, z_train, pose_train, **how)
        ldm.unet.eval()
        raw, raw_seen = (metrics.condition.loss_each(ldm, diffusion, z, pose, **how)
                         for z, pose in ((z_val, pose_val), (z_train, pose_train)))
        ldm.unet.train()
        result = metrics.condition.condition_means(each) | {
            "shuffled_se": metrics.overfit.standard_error(each["shuffled"] - each["right"]),
            **watch.means("right", each["right"], 0), **watch.means("train", seen, 1), **watch.means("raw", raw, 0),
            **watch.means("train_raw", raw_seen, 1), **watch.rises(each["right"], seen)}
        rows = [row for row in read_log(run.log_path) if row["step"] < step - 1]
        rows.append({"step": step - 1} | {f"val_{name}": value for name, value in result.items()})
        warning = metrics.overfit.overfitting(rows, c.patience or metrics.overfit.ROW_OF)
        run.alarm = warning if c.patience else None
        run.preview = lambda path: preview_ldm(averaged, diffusion, previewed, path, c, result)
        return result, -result["right"], (
            f"held-out eps loss {result['right']:.4f} under the right poses, {result['shuffled']:.4f} shuffled"
            + (f", {result['null']:.4f} without" if ldm.knows_null else "")
            + f": ratio {result['ratio']:.3f}; {result['train']:.4f} on training pictures"
            + (f"\n{warning}" if warning else ""))

    # An evaluation: losses; guided samples.
    run.begin(measure, payload, eval_passes(c) * len(z_val) + 2 * PREVIEWS * PREVIEW_STEPS, LDM_PANELS)
    with stop_signals() as stopped, steps_bar(run) as bar:
        for step in itertools.count(run.start):
            seed_step(c.seed, step)
            set_lr(lr_at(step, run.c), opt)
            numbers = train_step(
                step, *dataset.latents.latent_batch(cache, r.batch_size, c.seed, step, rank(), world()))
            if run.after_step(step, numbers, bar, stopped):
                break
    return run.finish(step + 1)


def eval_passes(c: Config) -> int:
    """How often a latent goes forward in an evaluation; without a pose it means something to who was trained so."""
    return EVAL_PASSES - (c.recipe.p_drop == 0)


def eval_latents(c: Config) -> int:
    """Held-out latents an evaluation looks at: in a long run more, for what they cost is little there."""
    least, most = EVAL_LATENTS
    spare = 0 if c.minutes else EVAL_SHARE * c.steps * 3 * c.recipe.batch_size / (eval_passes(c) * MOST_EVALS)
    return max(least, min(most, int(spare)))


def poses_kept(cache: dataset.latents.LatentCache) -> Tensor:
    """Poses of training pictures that have a visible joint, float16 [N, 17, 3]: all, or POSES_KEPT spread evenly."""
    poses = cache.poses[:len(cache):2]                      # mapped; the odd rows are their mirror images
    seen = np.flatnonzero((poses[..., 2] > 0).any(axis=1))
    return torch.from_numpy(poses[seen[data.evenly(len(seen), POSES_KEPT)]]).half()


def check_latents(c: Config, theirs: VQConfig, size: int | None) -> None:
    """ValueError where the autoencoder of stage 1 is not of the preset's kind; `size`, where known, of its pictures."""
    def fits(size_: int, ours: VQConfig) -> bool:
        return size in (None, size_) and (ours.factor, ours.embed_dim) == (theirs.factor, theirs.embed_dim)

    if not fits(c.size, c.vq_config):
        others = [name for name, p in PRESETS.items() if fits(p.size, p.vq_config)]
        raise ValueError(f"{c.vq} is an f{theirs.factor} autoencoder with {theirs.embed_dim} latent channels"
                         + (f" for pictures of {size} pixels" if size else "")
                         + f", but preset {c.preset} has f{c.vq_config.factor}, {c.vq_config.embed_dim} and {c.size}; "
                         + (f"preset {' or '.join(others)} fits it" if others else "no preset fits it")
                         + f", or train stage 1 with --preset {c.preset} too")


@torch.no_grad()
def preview_ldm(ldm: LDM, diffusion: Diffusion, batch: tuple[Tensor, Tensor], path: Path, c: Config,
                result: dict) -> None:
    """A labelled picture: for held-out poses the real picture's reconstruction | the skeleton | a sample."""
    x, pose = (t.to(c.device) for t in batch)
    with autocast(c):
        z = ldm.encode(x)
        x_hat = ldm.decode(z).float()
        x_T, noise_fn = per_image_noise(list(range(len(x))), z.shape[1:])
        *_, last = ddim(diffusion, guided(ldm, pose, ldm.guidance), x_T.to(c.device), PREVIEW_STEPS, ldm.eta, noise_fn)
        sample = ldm.decode(last.x).float()
    rows = [[data.to_uint8(x_hat[i]), draw(pose[i].cpu(), c.size), data.to_uint8(sample[i])] for i in range(len(x))]
    plots.save_grid(path, [list(row) for row in zip(*rows, strict=True)], labels=["reconstruction of the real picture",
                    "pose asked for", f"sample, DDIM {PREVIEW_STEPS}, eta {ldm.eta:g}, guidance {ldm.guidance:g}"],
                    title=f"{path.stem}: held-out loss {result['right']:.4f}, shuffled / right {result['ratio']:.3f}")


# ------------------------------------------------------------------------------ memory and time, before they are spent

class Rehearsal(Run):
    """A run that ends after a few steps and leaves nothing: how long a step takes, the first ones left out."""

    def after_step(self, step: int, numbers: dict[str, Tensor | int], bar: tqdm, stopped: list[int]) -> bool:
        if self.c.device.startswith("cuda"):
            torch.cuda.synchronize(self.c.device)
        self.measuring.append(time.monotonic())
        return len(self.measuring) == REHEARSED or (
            len(self.measuring) > 1 and self.measuring[-1] - self.began > MOST_REHEARSED)

    def finish(self, step: int) -> bool:
        (self.dir / "rehearsed.json").write_text(json.dumps(statistics.median(np.diff(self.measuring))))
        return True


@dataclass(frozen=True)
class Forecast:
    memory: float                                   # GiB at its peak
    seconds: float                                  # a step on the pictures that are in the network at once


def rehearse(c: Config, pictures: int) -> Forecast:
    """What a few steps on so many figures take, in a process of its own: one that runs out of memory takes only itself
    along, and one that came before leaves nothing in the peak."""
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), end_with_parent) as executor:
        try:
            return executor.submit(_rehearse, c, pictures).result()
        except RuntimeError as e:
            if not isinstance(e, BrokenProcessPool) and not checkpoint.out_of_memory(e):
                raise
            return Forecast(math.inf, math.inf)


def end_with_parent() -> None:
    """Called in a process of rehearse: its parent may be killed, and then it would wait for more to do for ever."""
    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=wait, daemon=True).start()


def _rehearse(c: Config, pictures: int) -> Forecast:
    """The real training of c, but on a few figures, with stand-ins for what it loads.

    A step has two micro-batches: at the end of the second's forward pass gradients, optimiser and activations are all
    there, so that memory grows as a straight line in the pictures, from the first on.
    """
    set_up(c.device)
    with tempfile.TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):
        recipe = replace(c.recipe, batch_size=2 * pictures, loss=replace(c.recipe.loss, disc_start=0.0, disc_ramp=0.0))
        trial = replace(c, data=f"figures:{2 * pictures}", val=None, out=f"{folder}/run", steps=REHEARSED + 1,
                        minutes=None, micro_batch=pictures, workers=0, recipe=recipe)
        stand_in = Path(folder) / "stand-in.pt"
        if c.stage == "vq" and c.recipe.loss.perceptual:
            torch.save(LPIPS().state_dict(), stand_in)
            trial = replace(trial, lpips=(str(stand_in),))
        if c.stage == "ldm":
            vq = VQModel(c.vq_config)
            checkpoint.save(stand_in, {"format": checkpoint.FORMAT, "stage": "vq", "step": 0, "config": plain(c),
                                       "vq": vq.state_dict(), "vq_config": asdict(c.vq_config)})
            trial = replace(trial, vq=str(stand_in))
        TRAIN[c.stage](trial, True, Rehearsal)
        return Forecast(peak_memory(c.device), json.loads((Path(trial.out) / "rehearsed.json").read_text()) / 2)


def forecast(c: Config) -> tuple[Forecast, int]:
    """Peak memory, and time of a step on all pictures that are in the network at once; and how many were rehearsed.

    Where all of them would take too long, as many as do not, and memory and time grow from two to them along lines.
    """
    wanted = at_once(c)
    n = min(2, wanted)
    few = rehearse(c, n)
    many_n = min(wanted, max(n, int(n * MOST_REHEARSED / (REHEARSED * few.seconds))) if few.seconds else wanted)
    many = rehearse(c, many_n) if many_n > n else few
    if many_n == wanted or few.memory == math.inf:
        return many, many_n
    if many_n == n or many.memory == math.inf:
        few, n, many, many_n = rehearse(c, 1), 1, few, n
    share = (wanted - n) / (many_n - n)
    return Forecast(*(a + (b - a) * share for a, b in zip(astuple(few), astuple(many), strict=True))), many_n


def fit(c: Config, gib: float) -> Config:
    """c with as large a micro-batch as stays within `gib` of memory, and checkpointing where it is small without."""
    data.open_data(c.data, c.size, c.val)           # a wrong folder is said before minutes are spent
    batch, found = c.recipe.batch_size, {}
    for checkpointing in (False, True):
        tried = replace(c, checkpointing=checkpointing)
        one, two = rehearse(tried, 1), rehearse(tried, 2)
        slope = max(two.memory - one.memory, 1e-3)
        most = 0 if one.memory > MARGIN * gib else math.floor((MARGIN * gib - one.memory) / slope) + 1
        found[checkpointing] = max(0, min(batch, most))
        if found[checkpointing] >= min(batch, LEAST_MICRO_BATCH):
            break
    checkpointing = max(found, key=lambda k: (found[k], not k))
    if not found[checkpointing]:
        needed = f"{one.memory:.1f}" if one.memory < math.inf else "more than this machine has"
        raise ValueError(f"--fit is {gib:g} GiB, but preset {c.preset} needs {needed} with one picture at a time and "
                         "--checkpointing; give more, or take a smaller preset")
    parts = math.ceil(batch / found[checkpointing])                             # of equal size, as far as that goes
    c = replace(c, micro_batch=math.ceil(batch / parts), checkpointing=checkpointing)
    print(f"--fit {gib:g}: --micro-batch {c.micro_batch}" + (" --checkpointing" if checkpointing else ""))
    return c


def describe_forecast(c: Config) -> str:
    """One line on memory and time of the run c."""
    train, _ = data.open_data(c.data, c.size, c.val)
    f, rehearsed = forecast(c)
    if f.memory == math.inf:
        return (f"forecast for {c.device}: a step on {rehearsed} pictures at once does not fit its memory; try "
                "--micro-batch 1, --checkpointing, or a smaller preset")
    n, step = len(train), f.seconds * c.recipe.batch_size / at_once(c)
    each = np.asarray(train.source(0)[0]).nbytes if c.stage == "vq" else 4 * math.prod(
        (c.vq_config.embed_dim, c.size // c.vq_config.factor, c.size // c.vq_config.factor))
    on_cpu = c.device == "cpu" and c.workers == 0           # then pictures, or pages of the cache, are in it too
    held = min(n * each, data.REMEMBER_BYTES) / 2 ** 30 if on_cpu else 0
    steps = c.steps or int(60 * c.minutes / step)
    return (f"forecast for {c.device}, from {REHEARSED} steps on {rehearsed} figures: {f.memory + held:.2f} GiB at its "
            f"peak, {step:.3g} s a step, {c.recipe.batch_size / step:.3g} pictures/s, "
            f"{duration(n / c.recipe.batch_size * step)} an epoch of {n} pictures, {duration(steps * step)} for "
            f"{steps} steps")


def duration(seconds: float) -> str:
    """5400 -> "1.5 hours"."""
    for unit, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.0f} s"


# ------------------------------------------------------------------------------------------------- command line

TRAIN = {"vq": train_vq, "ldm": train_ldm}


def dry_run(c: Config) -> None:
    """Prints what would be trained: the resolved recipe, the parameter counts, then memory and time."""
    r, f = c.recipe, c.vq_config.factor
    with torch.device("meta"):
        parts = {"encoder": VQModel(c.vq_config).encoder, "decoder": VQModel(c.vq_config).decoder}
        if c.stage == "vq" and r.loss.disc_weight:
            parts["discriminator"] = PatchDiscriminator()
        if c.stage == "ldm":
            dummy = torch.zeros(c.vq_config.embed_dim, 1, 1)
            ldm = LDM(VQModel(c.vq_config), c.unet_config, c.cond_config, dummy, dummy, c.schedule, True)
            parts |= {"UNet": ldm.unet, "pose encoder": ldm.cond}
    length = f"{c.steps} steps" if c.steps else f"{c.minutes:g} minutes (the step rate decides how many steps)"
    print(f"stage {c.stage}, preset {c.preset}: {c.size}x{c.size} pictures, f{f} latents "
          f"{c.size // f}x{c.size // f}x{c.vq_config.embed_dim}, {c.vq_config.n_embed} codes")
    print(f"recipe: batch {r.batch_size}, lr {r.lr:g}, {length}, seed {c.seed}, {c.device}, amp {c.amp}")
    if c.stage == "vq":
        o = r.loss
        start = f"{o.disc_start:.0%} of the run" if 0 < o.disc_start < 1 else f"step {o.disc_start:g}"
        print("objective: L1 + codebook" + (f" + {o.perceptual:g} LPIPS" if o.perceptual else "")
              + (f" + {o.disc_weight:g} (adaptive weight, at most {o.disc_cap:g}) discriminator from {start}"
                 if o.disc_weight else ""))
    if c.stage == "ldm":
        print(f"diffusion: {c.schedule['timesteps']} steps, pose by {' and '.join(c.cond_config.doors)}, condition "
              f"dropout {r.p_drop:g}")
    for name, module in parts.items():
        print(f"{name:13s}{sum(p.numel() for p in module.parameters()):>13,d} parameters")
    for key, value in plain(c).items():
        print(f"  {key:12s} {value}")
    print(describe_forecast(c), flush=True)


def number_from_0(text: str, lacks: str = "not a number from 0 up") -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is {lacks}")
    return value


def off_or_weight(text: str) -> float:
    """off -> 0, else a weight of a loss term."""
    return 0.0 if text == "off" else number_from_0(text, "neither off nor a number from 0 up")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="train.py --stage {vq,ldm} [--flags; --help explains them]")
    add = parser.add_argument
    add("--stage", choices=("vq", "ldm"), help="1: the autoencoder, 2: the diffusion model (--dry-run takes both)")
    add("--preset", default="toy", help=f"one of {', '.join(PRESETS)} (default %(default)s)")
    add("--data", default="figures", help="figures[:N], a folder with images/ and keypoints/, a list file, or COCO")
    add("--val", help="held-out pictures, in the same forms (default: a tenth of the groups of --data)")
    add("--out", help="run folder (default runs/vq or runs/ldm)")
    add("--vq", help=f"stage 2: the checkpoint of stage 1 (default {STAGE_1})")
    add("--steps", type=int, help="length of the run, in steps")
    add("--minutes", type=float, help="length of the run, in minutes on this machine")
    add("--batch-size", type=int)
    add("--lr", type=float, help="the learning rate used, whatever the batch size")
    add("--condition", choices=("maps", "tokens", "tokens+maps"),
        help="stage 2: how the pose enters; tokens go through cross-attention (default: the preset's)")
    add("--perceptual", type=off_or_weight, metavar="off|WEIGHT", help="stage 1: of LPIPS (default: the preset's)")
    add("--lpips-weights", nargs="+", metavar="FILE", help="stage 1: torchvision's VGG16 and the lin weights of "
        "LPIPS, or one file with both, such as a taming .ckpt")
    add("--download-lpips", action="store_true", help="stage 1: fetch those weights (528 MB) once, checked by hash")
    add("--disc-weight", type=off_or_weight, metavar="off|WEIGHT", help="stage 1: of the adversarial loss")
    add("--disc-start", type=number_from_0, metavar="STEP", help="stage 1: when the discriminator comes "
        "in; below 1: share of the run")
    add("--seed", type=int, default=0)
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="mixed precision")
    add("--compile", action="store_true", help="torch.compile the networks")
    add("--micro-batch", type=int, metavar="N", help="pictures in a network at once; the gradients of a batch's parts "
        "add up to those of the batch (default: the whole batch)")
    add("--checkpointing", action="store_true", help="compute activations again in backward instead of keeping them: "
        "less memory, a third more arithmetic")
    add("--fit", type=float, metavar="GIB", help="choose --micro-batch and --checkpointing for so much memory")
    add("--workers", type=int, help="processes that load pictures (default: 0 on a CPU)")
    add("--keep-every", type=int, metavar="STEPS", help="keep the model of each so many steps, as step-*.pt, to sample "
        "from (default: the last and the best alone)")
    add("--patience", type=int, metavar="K", help="stage 2: end the run once the validation loss has risen for K "
        "evaluations in a row, for certain, in any bin of timesteps (default: say so after "
        f"{metrics.overfit.ROW_OF} and go on)")
    add("--dry-run", action="store_true", help="print the resolved recipe, parameter counts, and a "
        "forecast of memory and time; train nothing")
    add("--accept-data", action="store_true", help="resume although the pictures are not those of before")
    add("--fresh", action="store_true", help="start over instead of resuming")
    args = parser.parse_args(argv)
    if args.stage is None and not args.dry_run:
        parser.error("--stage vq or --stage ldm is needed")
    if args.steps and args.minutes:
        parser.error("--steps and --minutes exclude each other")
    if args.fit is not None and not 0 < args.fit < math.inf:
        parser.error(f"--fit is {args.fit:g}; it must be a positive number of GiB")
    if args.fit and (args.micro_batch or args.checkpointing):
        parser.error("--fit chooses --micro-batch and --checkpointing itself; leave those out")
    of_stage_1 = given(perceptual=args.perceptual, disc_weight=args.disc_weight, disc_start=args.disc_start,
                       lpips_weights=args.lpips_weights, download_lpips=args.download_lpips or None)
    of_stage_2 = given(vq=args.vq, condition=args.condition, patience=args.patience)
    for stage, other, flags in (("ldm", 1, of_stage_1), ("vq", 2, of_stage_2)):
        if args.stage == stage and flags:
            name = next(iter(flags)).replace("_", "-")
            parser.error(f"--{name} is of stage {other}; leave it out with --stage {stage}")
    if args.lpips_weights and args.download_lpips:
        parser.error("--lpips-weights and --download-lpips exclude each other")
    return args


def complain(text: str) -> None:
    """A sentence to stderr. Of several processes each tells what happened to it, but a wrong command all have."""
    if dist.is_initialized():
        print(f"train.py, rank {rank()} of {world()}: {text}", file=sys.stderr)
    elif os.environ.get("RANK", "0") == "0":
        print(f"train.py: {text}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        if args.dry_run:
            for stage in [args.stage] if args.stage else ["vq", "ldm"]:
                c = make_config(argparse.Namespace(**vars(args) | {"stage": stage}))
                dry_run(fit(c, args.fit) if args.fit else c)
            return 0
        c = make_config(args)
        if args.download_lpips:
            c = replace(c, lpips=tuple(map(str, formats.lpips.download_lpips())))
        if args.fit and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("--fit rehearses in one process; run it once without torchrun and give torchrun the "
                             "--micro-batch and --checkpointing that it chooses")
        c = join_ranks(c)
        set_up(c.device)
        with locked(Path(c.out)) if rank() == 0 else nullcontext():
            if world() > 1:
                dist.barrier()                              # nobody begins before rank 0 has the folder
            c = fit(c, args.fit) if args.fit else c
            complete = TRAIN[c.stage](c, args.fresh)
    except (ValueError, OSError) as e:
        complain(str(e))
        return 2
    except RuntimeError as e:
        if checkpoint.out_of_memory(e):
            complain(f"the memory of {c.device} is too small for {at_once(c)} pictures at once; give a smaller "
                     "--micro-batch, --checkpointing, or let --fit GIB choose both")
            return 2
        if args.compile and type(e).__module__.startswith("torch._"):           # of _dynamo or _inductor
            complain(f"torch.compile cannot compile this here ({type(e).__name__}); leave --compile out")
            return 2
        if not (isinstance(e, dist.DistError) or world() > 1 and "gloo" in str(e)):     # gloo's are RuntimeErrors
            raise
        complain(f"another rank is gone ({str(e).strip().splitlines()[0][:100]}); the same command again goes on from "
                 f"{c.out}/last.pt, where there is one")
        return LOST
    except KeyboardInterrupt:
        complain("interrupted; the same command again goes on from the last checkpoint")
        return INTERRUPTED
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0 if complete else INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
