"""Train either stage: images -> autoencoder (--stage vq), then images and poses -> diffusion model
(--stage ldm).

    python train.py --stage vq                  the toy preset on procedural figures, into runs/vq
    python train.py --stage ldm                 stage 2 in the latents of runs/vq/last.pt
    python train.py --stage vq --data DIR --preset small --out runs/mine-vq
    python train.py --preset danbooru --dry-run what would be trained, without training

Rerun the same command to resume; --fresh starts over. Step k is a function of (seed, k), so a
resumed run equals the uninterrupted one. A run folder holds config.json, log.jsonl, last.pt,
best.pt, samples/ and curves.png.
"""
from __future__ import annotations

from engine import startup  # before all others: it checks the versions

# isort: split
import argparse
import copy
import json
import math
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

import checkpoint
import data
import plots
from checkpoint import number, plural
from dataset.images import WORKER_DIED, naming_broken, worker_died
from dataset.latents import LatentCache, latent_batch, poses_kept
from diffusion import Diffusion, dpm_solver, guided, per_image_noise
from engine import distributed
from engine.cpu import use_fast_norms
from engine.distributed import any_rank, gathered, micro_batches, parallel, print0, rank, world
from engine.gpu import make_scaler, peak_memory, set_up_gpu
from engine.length import fix_length, is_complete, resumed_length
from engine.muon import Muon
from engine.process import locked, stop_signals
from engine.run import RunDir, check_same_run, read_log
from keypoints import ConditionConfig
from ldm import LDM
from metrics.images import box_baseline, reconstruction
from metrics.keypoint_detector import FEATURE_WIDTHS, DetectorDistance, KeypointDetector
from metrics.lpips import LPIPS
from metrics.overfit import ROW_OF, OverfitMonitor, overfitting
from unet import NO_LABEL, UNetConfig
from vq import PatchDiscriminator, VQConfig, VQLoss, VQLossConfig, VQModel

FEATURES = Path(__file__).parent / "assets/features.pt"     # of DetectorDistance
STAGE_1 = "runs/vq/last.pt"     # the checkpoint that stage 2 takes by default
INTERRUPTED, LOST = 130, 3      # exit status after Ctrl-C, and where another rank is gone
CLIP = 1.0                      # the largest gradient norm
MAX_BAD_STEPS = 50              # in a row without a finite gradient; fp16 may start with 20
MEASURED = 6                    # steps by which the speed of a run is measured
PREVIEWS, PREVIEW_STEPS = 8, 10         # images in a preview, steps of DPM-Solver++
ENCODED = 16                    # images encoded at once for the cache; fixed, so filling can resume


# ------------------------------------------------------------------------------ recipes

@dataclass(frozen=True)
class Recipe:
    """How one stage is trained; the learning rate is the one used, whatever the batch size."""
    batch_size: int
    lr: float
    steps: int
    lr_final: float = 1.0               # share of lr left at the end of a cosine; 1.0 is constant
    warmup: int = 50                    # steps of linear warm-up
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    eval_images: int = 512              # held-out images in an evaluation, at most
    quantize_start: float = 0.0         # stage 1: share of the run before the codebook is used
    data_init_codes: bool = True        # stage 1: codes from encoder outputs, dead codes restarted
    loss: VQLossConfig = VQLossConfig()         # stage 1
    p_drop: float = 0.1                 # stage 2: share of poses dropped, for guidance
    lambda_spread: float = 0.0          # stage 2: timesteps as in draw_timesteps; 0: uniform
    ema_decay: float = 0.9999           # stage 2: with warm-up min(d, (1 + n) / (10 + n))
    muon: float = 0.0                   # stage 2: Muon's lr over lr; 0: AdamW for everything


SCHEDULE = {"timesteps": 1000, "linear_start": 0.0015, "linear_end": 0.0195}    # latent diffusion's


@dataclass(frozen=True)
class Preset:
    size: int                           # side of the images, pixels
    vq_config: VQConfig
    unet: dict                          # fields of UNetConfig that the others do not determine
    cond: ConditionConfig
    vq: Recipe
    ldm: Recipe
    normalise: bool = True              # latents to mean 0 and std 1 a channel
    schedule: dict = field(default_factory=lambda: SCHEDULE)


# Small autoencoders have no norms, as the bundled models: steps are 1.4 times as fast, though in
# the same time GroupNorm is as good or better (benchmarks/RESULTS.md). Their residual branches
# start at zero. Their codes follow a moving average, after a time without quantisation.
NORM_FREE = {"norm_groups": 0, "zero_init": True, "ema_codebook": True}
# Large ones are trained as VQGANs: with LPIPS, and with a discriminator once the reconstruction has
# settled. In runs of minutes it lowers PSNR without a benefit (benchmarks/RESULTS.md).
VQGAN = VQLossConfig(perceptual=1.0, disc_weight=0.75, disc_start=0.1, disc_ramp=0.05,
                     disc_cap=100.0)
# Maps gave the best pose fidelity of five conditionings at equal steps (benchmarks/RESULTS.md).
MAPS = ("maps",)


def _unet(ch: int, mult: tuple[int, ...], attn: tuple[int, ...], heads: int,
          blocks: int = 2) -> dict:
    return {"model_channels": ch, "channel_mult": mult, "attention_resolutions": attn,
            "num_heads": heads, "num_res_blocks": blocks}


BIG_VQ = Recipe(4, 1e-4, steps=180_000, lr_final=0.1, quantize_start=0.01, warmup=1000, loss=VQGAN)
BIG_LDM = Recipe(32, 1e-4, steps=225_000, lr_final=0.1, warmup=1000)

# fmt: off
PRESETS = {
    # Both stages in minutes on a CPU: a shortcut around the autoencoder, v-prediction and Muon make
    # it learn several times faster, and a perceptual distance keeps limbs and hands
    # (benchmarks/RESULTS.md).
    "toy": Preset(
        64, VQConfig(ch=16, ch_mult=(1, 2, 4), embed_dim=4, z_channels=4, n_embed=4096,
                     resolution=64, shortcut=True, **NORM_FREE),
        _unet(64, (1, 2, 2), (2, 4), 4, blocks=1), ConditionConfig(MAPS, 64, hidden=True),
        vq=Recipe(8, 1e-3, steps=500, lr_final=0.03, quantize_start=0.15, eval_images=128,
                  loss=VQLossConfig(detector=0.2)),
        ldm=Recipe(32, 5e-4, steps=900, lr_final=0.05, muon=2.5, lambda_spread=1.4,
                   eval_images=96),
        schedule=SCHEDULE | {"prediction": "v"}),
    # As `toy`, at twice the side; hours on two cores. lr 1e-3 diverges at 128 pixels.
    "small": Preset(
        128, VQConfig(ch=16, ch_mult=(1, 2, 4), embed_dim=4, z_channels=4, n_embed=8192,
                      resolution=128, shortcut=True, **NORM_FREE),
        _unet(64, (1, 2, 2, 2), (4, 8), 4, blocks=1), ConditionConfig(MAPS, 64, hidden=True),
        vq=Recipe(4, 5e-4, steps=5000, lr_final=0.03, quantize_start=0.15, warmup=100),
        ldm=Recipe(32, 5e-4, steps=8000, lr_final=0.05, muon=2.5, lambda_spread=1.4),
        schedule=SCHEDULE | {"prediction": "v"}),
    # The networks of the original blog post, but codes from encoder outputs that follow a moving
    # average (the best of six ways, benchmarks/RESULTS.md), pose maps, normalised latents.
    "base": Preset(
        256, VQConfig(ema_codebook=True), _unet(160, (1, 2, 3, 4), (2, 4, 8), 8),
        ConditionConfig(MAPS, 256, hidden=True), vq=BIG_VQ, ldm=BIG_LDM),
    # The blog post's own recipe: taming's objective and codebook init, batch 32 at 2e-6 a sample,
    # one token of raw ids, no condition dropout, latents as they are. Mirrored images, clipped
    # gradients and beta on the right term are ours.
    "danbooru": Preset(
        256, VQConfig(), _unet(160, (1, 2, 3, 4), (8, 4, 2), 8),
        ConditionConfig(("seed",), seed_dim=32),
        vq=Recipe(4, 1.8e-5, steps=180_000, warmup=1, betas=(0.5, 0.9), data_init_codes=False,
                  loss=VQLossConfig(perceptual=1.0, disc_weight=0.8, disc_start=10_000)),
        ldm=Recipe(32, 6.4e-5, steps=225_000, warmup=1, betas=(0.9, 0.999), weight_decay=0.01,
                   p_drop=0.0),
        normalise=False),
    # As `base` with more compression, by autoencoders of about the same size (54 to 56 million).
    "f8": Preset(
        256, VQConfig(ch_mult=(1, 2, 3, 3), z_channels=4, embed_dim=4, n_embed=16384,
                      attn_resolutions=(32,), ema_codebook=True),
        _unet(160, (1, 2, 3, 4), (1, 2, 4), 8), ConditionConfig(MAPS, 256, hidden=True),
        vq=BIG_VQ, ldm=BIG_LDM),
    "f16": Preset(
        256, VQConfig(ch_mult=(1, 1, 2, 3, 3), z_channels=8, embed_dim=8, n_embed=16384,
                      attn_resolutions=(16,), ema_codebook=True),
        _unet(160, (1, 2, 4), (1, 2, 4), 8), ConditionConfig(MAPS, 256, hidden=True),
        vq=BIG_VQ, ldm=BIG_LDM),
}
# fmt: on


@dataclass(frozen=True)
class Config:
    """One run, everything resolved: the content of config.json."""
    stage: str
    preset: str
    data: str
    val: str | None
    trim_bars: bool
    labels: str | None                  # where labels come from, see data.open_data
    out: str
    vq: str | None                      # stage 2: the checkpoint of stage 1
    init: str | None                    # a checkpoint to start from
    seed: int
    device: str
    amp: str                            # bf16, fp16 or off
    compile: bool
    workers: int
    micro_batch: int | None             # images in a network at once, in each rank; None: all
    checkpointing: bool                 # gradient checkpointing
    size: int
    minutes: float | None               # the length asked for; `steps` follows from it
    steps: int | None
    eval_every: int | None
    keep_every: int | None
    patience: int | None                # stage 2: evaluations of overfitting that end the run
    recipe: Recipe
    vq_config: VQConfig
    unet_config: UNetConfig | None
    cond_config: ConditionConfig | None
    schedule: dict | None
    normalise: bool
    lpips: tuple[str, ...]              # stage 1: files with the weights of LPIPS
    images: int | None = None           # found by the run itself: how many it trains on
    data_hash: str | None = None        # of all images, poses and labels
    label_names: tuple[str, ...] = ()   # stage 2: by number, as in the checkpoint
    vq_hash: str | None = None          # stage 2: of the weights in `vq`


def make_config(args: argparse.Namespace) -> Config:
    """Preset + flags -> Config; ValueError for what does not fit together."""
    preset, ldm = PRESETS[args.preset], args.stage == "ldm"
    recipe = replace(getattr(preset, args.stage), **given(batch_size=args.batch_size, lr=args.lr))
    if not ldm:
        recipe = replace(recipe, loss=make_loss(recipe.loss, args))
    out, cond = args.out or f"runs/{args.stage}", preset.cond
    if args.condition:
        cond = replace(cond, conditioning=tuple(args.condition.split("+")))
    device = checkpoint.find_device(args.device)
    data.check_out(out, args.data, args.val)
    if args.init:
        if Path(args.init).resolve().parent == Path(out).resolve():
            raise ValueError(f"--init is {args.init}, in the run folder itself; give another --out")
        recipe = replace(recipe, quantize_start=0.0)        # its codebook already fits its encoder
    # A field with the name of a flag has its value.
    flags = {name: value for name, value in vars(args).items() if name in Config.__annotations__}
    return Config(**flags | {
        "out": out, "vq": (args.vq or args.init or STAGE_1) if ldm else None,
        "device": device, "amp": checkpoint.find_amp(args.amp, device),
        "workers": data.find_workers(device) if args.workers is None else args.workers,
        "steps": args.steps or (None if args.minutes else recipe.steps),
        "size": preset.size, "recipe": recipe, "vq_config": preset.vq_config,
        "unet_config": unet_for(preset.vq_config, cond, UNetConfig(**preset.unet)) if ldm else None,
        "cond_config": cond if ldm else None, "schedule": preset.schedule if ldm else None,
        "normalise": preset.normalise, "lpips": tuple(args.lpips_weights or ())})


def unet_for(vq: VQConfig, cond: ConditionConfig, unet: UNetConfig) -> UNetConfig:
    """`unet` with the channels of the latents and of the conditioning."""
    return replace(unet, in_channels=vq.embed_dim + cond.map_channels, out_channels=vq.embed_dim,
                   context_dim=cond.context_dim)


def make_loss(loss: VQLossConfig, args: argparse.Namespace) -> VQLossConfig:
    """The objective of stage 1: the preset's, changed by the flags."""
    if args.disc_weight and not loss.disc_weight:
        loss = replace(VQGAN, perceptual=loss.perceptual, detector=loss.detector)
    if data.is_folder(args.data):       # the detector has learned figures only
        loss = replace(loss, detector=0.0)
    loss = replace(loss, **given(perceptual=args.perceptual, disc_weight=args.disc_weight,
                                 disc_start=args.disc_start))
    if args.disc_start is not None and not loss.disc_weight:
        raise ValueError(f"--disc-start is {args.disc_start:g}, but this run has no discriminator; "
                         "add --disc-weight 0.75 to have one")
    if (args.lpips_weights or args.download_lpips) and not loss.perceptual:
        raise ValueError("weights of LPIPS are given, but this run has no perceptual loss; add "
                         "--perceptual 1 to have one")
    return loss


def given(**flags: object) -> dict:
    """The flags that were given."""
    return {name: value for name, value in flags.items() if value is not None}


def plain(c: Config) -> dict:
    """A Config as JSON gives it back: nested dicts and lists."""
    return json.loads(json.dumps(c, default=asdict))


# ------------------------------------------------------------------------------ optimisation

def seed_everything(seed: int, step: int) -> None:
    """Everything random in step k (noise, timesteps, dropout, restarts) comes from torch's
    generator, seeded here."""
    mixed = np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(mixed >> 1))


def lr_at(step: int, c: Config) -> float:
    """Linear warm-up, then a cosine from lr to lr_final * lr."""
    r = c.recipe
    if step < r.warmup:
        return r.lr * (step + 1) / r.warmup
    progress = (step - r.warmup) / max(1, c.steps - r.warmup)
    return r.lr * (r.lr_final + (1 - r.lr_final) * 0.5 * (1 + math.cos(math.pi * progress)))


def set_lr(lr: float, *optimizers: torch.optim.Optimizer) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)


def adamw(params: list[Tensor], r: Recipe) -> torch.optim.AdamW:
    return torch.optim.AdamW(params, lr=r.lr, betas=r.betas, weight_decay=r.weight_decay,
                             fused=True)


def ldm_optimizer(ldm: LDM, r: Recipe) -> torch.optim.Optimizer:
    """AdamW, or Muon for the matrices between the first and the last layer."""
    params = {name: p for name, p in ldm.named_parameters() if p.requires_grad}
    if not r.muon:
        return adamw(list(params.values()), r)
    ends = "unet.input_blocks.0.", "unet.out.", "unet.label_emb."
    matrices = {name for name, p in params.items() if p.ndim > 1 and not name.startswith(ends)}
    others = [p for name, p in params.items() if name not in matrices]
    return Muon([params[name] for name in params if name in matrices], adamw(others, r), r.muon)


class EMA:
    """Moving average of parameters, decay min(d, (1 + n) / (10 + n)) at update n = 1, 2, ..."""

    def __init__(self, model: nn.Module, average: nn.Module, decay: float):
        self.decay = decay
        pairs = zip(model.parameters(), average.parameters(), strict=True)
        self.params, self.average = zip(*((p, a) for p, a in pairs if p.requires_grad), strict=True)

    @torch.no_grad()
    def update(self, n: int) -> None:
        d = min(self.decay, (1 + n) / (10 + n))
        torch._foreach_lerp_(self.average, self.params, 1 - d)


def prepare(model: nn.Module, c: Config) -> nn.Module:
    """The model on its device, in channels_last memory format."""
    if c.device == "cpu" and c.amp == "bf16":
        use_fast_norms(model)
    return model.to(c.device, memory_format=torch.channels_last)


def autocast(c: Config) -> AbstractContextManager:
    return checkpoint.autocast(c.amp, c.device)


def in_network(c: Config) -> int:
    """Images in a network at once, in this rank; evaluations use it too and need no more memory."""
    share = c.recipe.batch_size // world()
    return min(c.micro_batch or share, share)


def accumulate(sums: dict[str, Tensor], share: float, **terms: Tensor) -> None:
    """Adds a micro-batch's share of the terms of a loss."""
    for name, value in terms.items():
        sums[name] = sums.get(name, 0.0) + share * value.detach()


def tell_start(path: str, step: int, new: list[str]) -> None:
    """One line about --init: which tensors start fresh."""
    print0(f"Starting from {checkpoint.dated(path, step)}; "
           + (f"fresh: {data.shorten(new)}." if new else "all weights fit."))


# ------------------------------------------------------------------------------ stage 1

def train_vq(c: Config, run: RunDir, train: data.ImageDataset, val: data.ImageDataset,
             distances: dict[str, nn.Module]) -> int:
    """Trains the autoencoder; returns the steps made, fewer than c.steps where it was stopped."""
    r, device = c.recipe, torch.device(c.device)
    torch.manual_seed(c.seed)
    model = prepare(VQModel(c.vq_config), c)
    objective = VQLoss(r.loss, **distances).to(device, memory_format=torch.channels_last)
    disc, codebook, last_layer = objective.disc, model.quantize, model.decoder.conv_out.weight
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer, scaler = adamw(params, r), make_scaler(c.amp, c.device)
    optimizers, saved = [optimizer], {"optimizer": optimizer, "scaler": scaler}
    data_init_codes = r.data_init_codes
    if c.init and not run.resumed and not run.dry:
        init = checkpoint.load_vq(c.init, say=print0)
        new = checkpoint.take(model, init["vq"], c.init)
        data_init_codes &= any(name.startswith("quantize.") for name in new)
        tell_start(c.init, init["step"], new)
    if disc is not None:
        disc_optimizer = adamw(list(disc.parameters()), r)
        optimizers.append(disc_optimizer)
        saved |= {"disc": disc, "disc_optimizer": disc_optimizer}
    if run.resumed:
        checkpoint.fill(model, run.resumed["vq"], str(run.last))
        checkpoint.restore(saved, run.resumed["train"], run.last)
        codebook.usage.copy_(run.resumed["train"]["usage"])
    model.checkpointing = c.checkpointing
    if c.compile:       # not the last layer: the adaptive weight takes its gradient separately
        model.encoder.compile()
        model.decoder.features = torch.compile(model.decoder.features)
    net = parallel(model, model.reconstruct)
    judge = None if disc is None else parallel(disc, objective.discriminator)
    quantize_start = int(r.quantize_start * c.steps)
    bad_steps = torch.zeros((), device=device)

    run.begin(plain(c))
    batches = data.batches(train, r.batch_size, c.seed, run.start, c.steps, c.workers, augment=True,
                           device=device, rank=rank(), world=world())
    with stop_signals() as stopped, run.bar() as bar:
        for step in bar:
            seed_everything(c.seed, step)
            set_lr(lr_at(step, c), *optimizers)
            x, _, _ = next(batches)                                         # [B, 3, H, W]
            quantize = step >= quantize_start
            if step == quantize_start and data_init_codes:
                codebook.init_codes(gathered(encode_all(model, x, c)))
            disc_factor = objective.disc_factor(step, c.steps)
            numbers, made = {}, []
            for part, share in micro_batches(len(x), in_network(c), net):
                with autocast(c):
                    h, codebook_loss, indices, x_hat = net(x[part], quantize)
                loss, terms = objective.generator(x[part], x_hat, codebook_loss, last_layer,
                                                  disc_factor)
                scaler.scale(loss * share).backward()
                accumulate(numbers, share, loss=loss, **terms)
                made.append((h.detach(), indices, x_hat.detach()))
            scaler.unscale_(optimizer)
            grad_norm = clip_grad_norm_(params, CLIP)
            scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
            h, indices, x_hat = map(torch.cat, zip(*made, strict=True))
            if quantize:
                numbers["restarts"] = codebook.update(gathered(h), gathered(indices),
                                                      restart=r.data_init_codes)
                if world() > 1:     # GPU sums vary in order: codes would differ by rank
                    dist.broadcast(codebook.embedding.weight.data, 0)
            if disc_factor > 0:
                for part, share in micro_batches(len(x), in_network(c), judge):
                    loss, logits = judge(x[part], x_hat[part])
                    scaler.scale(loss * share).backward()
                    accumulate(numbers, share, d_loss=loss, **logits)
                scaler.unscale_(disc_optimizer)
                clip_grad_norm_(disc.parameters(), CLIP)
                scaler.step(disc_optimizer)
                disc_optimizer.zero_grad(set_to_none=True)
            scaler.update()

            bad_steps = (bad_steps + 1) * ~grad_norm.isfinite()
            if run.log_due(step):
                log_step(run, bar, step, c, bad_steps, numbers | {"grad_norm": grad_norm})
            stop = run.stop_due(step, stopped.is_set(), device)
            if rank() == 0 and (run.save_due(step) or stop):
                score = None
                if run.eval_due(step) and (not stop or step + 1 == c.steps):    # stopped: no eval
                    score = evaluate_vq(run, bar, step, c, model, val)
                training = checkpoint.state_of(saved) | {"usage": codebook.usage}
                run.save(step, {"stage": "vq", "vq": model.state_dict(),
                                "vq_config": asdict(c.vq_config), "train": training}, score)
            if stop:
                break
        run.stopped = any_rank(stopped.is_set(), device)
    return step + 1


@torch.no_grad()
def encode_all(model: VQModel, x: Tensor, c: Config) -> Tensor:
    """h [B, C, h, w] of the whole batch, from which the codes are drawn."""
    with autocast(c):
        return torch.cat([model.encode(part) for part in x.split(in_network(c))]).float()


def log_step(run: RunDir, bar: tqdm, step: int, c: Config, bad_steps: Tensor,
             numbers: dict[str, Tensor]) -> None:
    """One line of the log. Reading the values waits for the GPU."""
    values = {name: torch.as_tensor(value, dtype=torch.float32, device=c.device)
              for name, value in numbers.items()}
    values = {name: float(distributed.mean_over_ranks(value)) for name, value in values.items()}
    if bad_steps >= MAX_BAD_STEPS:
        raise run.diverged(f"the gradient has not been finite for {int(bad_steps)} steps, the last "
                           f"one step {step}")
    if rank() == 0:
        skipped = {"skipped": int(bad_steps)} if bad_steps else {}
        run.log(step, **values, **run.images_per_second(step, c.recipe.batch_size),
                lr=lr_at(step, c), **skipped)
        bar.set_postfix(loss=values["loss"], refresh=False)


@torch.no_grad()
def evaluate_vq(run: RunDir, bar: tqdm, step: int, c: Config, model: VQModel,
                val: data.ImageDataset) -> float:
    """Reconstruction of held-out images: log, preview, curves. Returns the score: the PSNR."""
    began, f = time.monotonic(), c.vq_config.factor
    bar.set_description(f"{run.title}, evaluating")
    val = data.spread(val, c.recipe.eval_images)
    batches = (x for x, *_ in data.in_order(val, in_network(c)))
    result = reconstruction(model, batches, c.device, partial(autocast, c))
    said = (f"held-out PSNR {result['psnr']:.2f} dB (averaging over boxes: "
            f"{result['psnr_box']:.2f}); codes used {result['codes_used']:.1%} of "
            f"{c.vq_config.n_embed}, perplexity {result['perplexity']:.0f}")
    x = next(data.in_order(data.spread(val, PREVIEWS), PREVIEWS))[0].to(c.device)
    model.eval()
    with autocast(c):
        x_hat = model(x)[0].float().clamp(-1, 1)
    model.train()
    shown = map(data.to_uint8, (x, box_baseline(x, f), x_hat))
    with run.writing(run.picture(step)):
        plots.vq_preview(run.picture(step), *shown, f, result)
    report(run, bar, step, said, result, began,
           plots.VQ_PANELS | (plots.DISC_PANELS if c.recipe.loss.disc_weight else {}))
    return result["psnr"]


def report(run: RunDir, bar: tqdm, step: int, said: str, result: dict, began: float,
           panels: plots.Panels) -> None:
    """An evaluation into curves.png, log.jsonl and the terminal."""
    row = {f"val_{name}": value for name, value in result.items()}
    if not run.dry:
        with run.writing(run.dir / "curves.png"):
            rows = [*read_log(run.log_path), {"step": step} | row]
            plots.plot_curves(run.dir / "curves.png", rows, panels | plots.SHARED_PANELS,
                              f"{run.dir}, step {step + 1}: {said}")
        bar.write(f"step {step + 1:6d}  {said}")
    run.log(step, **row, eval_s=time.monotonic() - began)
    bar.set_description(run.title)


def load_distances(c: Config, lpips: LPIPS | None = None) -> dict[str, nn.Module]:
    """The perceptual distances of config c, by the names of VQLoss; `lpips` where one is at hand.
    ValueError where it is needed and its weights are missing."""
    distances: dict[str, nn.Module] = {}
    if c.recipe.loss.detector:
        distances["detector"] = DetectorDistance(KeypointDetector(c.size, FEATURE_WIDTHS))
        checkpoint.fill(distances["detector"], checkpoint.read(FEATURES), str(FEATURES))
    if c.recipe.loss.perceptual:
        if not (lpips or c.lpips):
            raise ValueError(f"preset {c.preset} trains with the perceptual loss LPIPS, which "
                             "needs weights: give them with --lpips-weights FILE [FILE], fetch "
                             "them with --download-lpips (528 MB), or train without: "
                             "--perceptual off")
        from formats.lpips import load_lpips
        distances["lpips"] = lpips or load_lpips(c.lpips)
    return distances


# ------------------------------------------------------------------------------ stage 2

def train_ldm(c: Config, run: RunDir, vq: VQModel, cache: LatentCache,
              val: data.ImageDataset) -> int:
    """Trains the diffusion model in the latents of `vq`; returns the steps made."""
    r, device, C = c.recipe, torch.device(c.device), c.vq_config.embed_dim
    mean, std = ((cache.mean, cache.std) if c.normalise else
                 (torch.zeros(C, 1, 1), torch.ones(C, 1, 1)))
    if run.resumed:         # images may have been repaired since; the latent space stays the same
        mean, std = run.resumed["mean"], run.resumed["std"]
    init = None
    if c.init and not run.resumed and not run.dry:
        init = checkpoint.load(c.init, "ldm", preset=c.preset)
        if checkpoint.hash_of(init["vq"]) == c.vq_hash:         # the same latent space
            mean, std = init["mean"], init["std"]
    torch.manual_seed(c.seed)
    ldm = prepare(LDM(vq, c.unet_config, c.cond_config, mean, std, c.schedule,
                      supports_guidance=r.p_drop > 0), c)
    if init:
        new = checkpoint.take_ldm(ldm, init, c.init, c.label_names)
        tell_start(c.init, init["step"], new)
        init = None                                         # gigabytes for a large model
    average = copy.deepcopy(ldm).eval().requires_grad_(False)
    average.vq = vq                                         # frozen: one copy is enough
    params = [p for p in ldm.parameters() if p.requires_grad]
    optimizer, scaler = ldm_optimizer(ldm, r), make_scaler(c.amp, c.device)
    diffusion, ema = Diffusion(**c.schedule), EMA(ldm, average, r.ema_decay)
    val = data.spread(val, r.eval_images)
    monitor = make_monitor(c, average, diffusion, cache, val)
    shown = next(data.in_order(data.spread(val, PREVIEWS), PREVIEWS))       # in each preview
    saved = {"unet": ldm.unet, "cond": ldm.cond, "optimizer": optimizer, "scaler": scaler,
             "watch": monitor}                                  # its losses of the best evaluation
    if run.resumed:
        checkpoint.restore({"unet": average.unet, "cond": average.cond}, run.resumed, run.last)
        checkpoint.restore(saved, run.resumed["train"], run.last)
    ldm.unet.checkpointing = c.checkpointing
    if c.compile:
        ldm.unet.compile()
    kept = poses_kept(cache.poses[:len(cache):2], cache.labels[:len(cache):2])
    net = parallel(ldm)
    mean, std = ldm.mean, ldm.std                           # on the device
    B, mine = r.batch_size, data.share(r.batch_size, rank(), world())
    bad_steps = torch.zeros((), device=device)

    run.begin(plain(c))
    with stop_signals() as stopped, run.bar() as bar:
        for step in bar:
            seed_everything(c.seed, step)
            set_lr(lr_at(step, c), optimizer)
            # h of the autoencoder, not normalised; of images as they are and mirrored.
            h, pose, label = latent_batch(cache, B, c.seed, step, rank(), world())
            z = (h.to(device) - mean) / std                                 # [B, C, h, w]
            pose, label = pose.to(device), label.to(device)                 # [B, 17, 3], [B]
            # Drawn for all ranks, so that no rank repeats another's noise.
            t = diffusion.draw_timesteps(B, r.lambda_spread, device)[mine]
            noise = torch.randn(B, *z.shape[1:], device=device)[mine]
            drop = (torch.rand(B, device=device) < r.p_drop)[mine]
            if c.label_names:
                pose, label = drop_one(pose, label, torch.rand(B, device=device)[mine], r.p_drop)
            numbers = {}
            for part, share in micro_batches(len(z), in_network(c), net):
                with autocast(c):
                    loss = diffusion.loss(partial(net, label=label[part]), z[part], pose[part],
                                          t=t[part], noise=noise[part], drop=drop[part]).mean()
                scaler.scale(loss * share).backward()
                accumulate(numbers, share, loss=loss)
            scaler.unscale_(optimizer)
            grad_norm = clip_grad_norm_(params, CLIP)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            ema.update(step + 1)

            alarm = None
            bad_steps = (bad_steps + 1) * ~grad_norm.isfinite()
            if run.log_due(step):
                log_step(run, bar, step, c, bad_steps, numbers | {"grad_norm": grad_norm})
            stop = run.stop_due(step, stopped.is_set(), device)
            if rank() == 0 and (run.save_due(step) or stop):
                score = None
                if run.eval_due(step) and (not stop or step + 1 == c.steps):    # stopped: no eval
                    score, alarm = evaluate_ldm(run, bar, step, c, monitor, average, ldm, shown)
                payload = checkpoint.ldm_payload(average) | kept
                run.save(step, payload | {"train": checkpoint.state_of(saved)}, score)
            if c.patience and run.eval_due(step):
                stop = stop or any_rank(alarm is not None, device)
            if stop:
                break
        run.stopped = any_rank(stopped.is_set(), device)
    return step + 1


def drop_one(pose: Tensor, label: Tensor, u: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Poses [B, 17, 3] and labels [B] by u [B] in 0..1: a share p of the samples loses the
    pose, another share p the label. Sampling may then use either alone."""
    return pose * (u >= p)[:, None, None], label.masked_fill(u > 1 - p, NO_LABEL)


def make_monitor(c: Config, average: LDM, diffusion: Diffusion, cache: LatentCache,
                 val: data.ImageDataset) -> OverfitMonitor:
    """The monitor of held-out latents, beside as many training latents."""
    with torch.no_grad(), autocast(c):
        found = [(average.encode(x.to(c.device)), pose, label) for x, pose, label in
                 data.in_order(val, in_network(c))]
    if sum(len(z) for z, _, _ in found) < 2:
        raise ValueError(f"{c.data} leaves fewer than 2 usable images to validate on; add "
                         "images, or give validation images with --val")
    held_out = [torch.cat(each).to(c.device) for each in zip(*found, strict=True)]
    rows = 2 * data.evenly(len(cache) // 2, len(held_out[0]))       # even: not mirrored
    h, pose = cache.rows(rows)
    trained = [(h.to(c.device) - average.mean) / average.std, pose.to(c.device),
               cache.labels[rows].to(c.device)]
    return OverfitMonitor(diffusion, held_out, trained)


def evaluate_ldm(run: RunDir, bar: tqdm, step: int, c: Config, monitor: OverfitMonitor,
                 average: LDM, ldm: LDM, shown: tuple[Tensor, ...]) -> tuple[float, str | None]:
    """Losses on fixed noise: log, curves, preview of the batch `shown`. Returns best.pt's score,
    and a warning where it overfits."""
    began = time.monotonic()
    bar.set_description(f"{run.title}, evaluating")
    ldm.unet.eval()
    result = monitor.measure(average, ldm, average.supports_guidance, in_network(c),
                             partial(autocast, c))
    ldm.unet.train()
    row = {"step": step} | {f"val_{name}": value for name, value in result.items()}
    warning = overfitting([*read_log(run.log_path), row], c.patience or ROW_OF)
    said = (f"held-out eps loss {result['right']:.4f} under the right pose, "
            f"{result['shuffled']:.4f} under a shuffled one: ratio {result['ratio']:.3f}; "
            f"{result['train']:.4f} on training images" + (f"\n{warning}" if warning else ""))
    with run.writing(run.picture(step)):
        preview_ldm(run.picture(step), average, monitor.diffusion, shown, c, result)
    report(run, bar, step, said, result, began, plots.LDM_PANELS)
    return -result["right"], warning


@torch.no_grad()
def preview_ldm(path: Path, ldm: LDM, diffusion: Diffusion, batch: tuple[Tensor, ...], c: Config,
                result: dict) -> None:
    """Draws reconstruction, pose and sample of a batch of held-out images."""
    x, pose, label = (t.to(c.device) for t in batch)
    with autocast(c):
        z = ldm.encode(x)
        x_hat = ldm.decode(z).float()
        x_T, noise_fn = per_image_noise(list(range(len(x))), z.shape[1:])
        model, rows = ldm.of_rows(pose, label)
        eps_fn = guided(diffusion.eps_model(model), rows, ldm.guidance)
        *_, last = dpm_solver(diffusion, eps_fn, x_T.to(c.device), PREVIEW_STEPS, ldm.eta, noise_fn)
        sample = ldm.decode(last.x).float()
    names = [c.label_names[i] if i >= 0 else "" for i in label] if c.label_names else []
    how = f"DPM-Solver++ {PREVIEW_STEPS}, eta {ldm.eta:g}, guidance {ldm.guidance:g}"
    plots.ldm_preview(path, data.to_uint8(x_hat), pose.cpu().numpy(), data.to_uint8(sample), names,
                      how, result)


# ------------------------------------------------------------------------------ a run

def run_stage(c: Config, fresh: bool, accept_data: bool) -> bool:
    """Opens what the stage needs, resumes or begins its run, trains. True when it is complete."""
    began, vq, used = time.monotonic(), None, ""
    if c.stage == "ldm":
        stage_1 = checkpoint.load_vq(c.vq, say=print0)
        used = f", latents of {checkpoint.dated(c.vq, stage_1['step'])}"
        vq = prepare(checkpoint.build_vq(stage_1, c.vq), c)
        size, theirs, f = stage_1["config"]["size"], vq.config.factor, c.vq_config.factor
        if (theirs, size or c.size) != (f, c.size):         # a published one does not say its size
            raise ValueError(f"{c.vq} is an f{theirs} autoencoder for {size or 'any'} pixels, but "
                             f"preset {c.preset} has f{f} and {c.size}; train both stages with the "
                             "same --preset")
        c = replace(c, vq_config=vq.config, vq_hash=checkpoint.hash_of(stage_1["vq"]),
                    unet_config=unet_for(vq.config, c.cond_config, c.unet_config))
    train, val = data.open_data(c.data, c.size, c.val,
                                c.stage == "vq" and c.workers == 0, c.trim_bars, c.labels,
                                poseless=c.stage == "vq")
    c = replace(c, images=len(train), data_hash=data.data_hash(train, c.val and val),
                labels=train.label_by)
    if c.stage == "ldm" and train.label_names:
        print0(f"Labels {data.describe_labels(train)}.")
        c = replace(c, label_names=tuple(train.label_names), unet_config=replace(
            c.unet_config, num_classes=len(train.label_names)))
    run = RunDir(c.out, c.stage, fresh)
    if run.resumed:
        c = resumed_config(c, run.resumed["config"], accept_data)
    elif c.init and c.stage == "ldm":           # its weights predict by its schedule
        c = replace(c, schedule=checkpoint.load(c.init, "ldm", preset=c.preset)["schedule"])
    if is_complete(run, run.start, c.steps, c.patience, overfitting):
        return True
    announce(c, run, len(val), used)

    broken = run.dir / (f"broken-{rank()}.txt" if rank() else "broken.txt")
    with naming_broken(broken, train, val):
        if c.stage == "vq":
            loop, needs = train_vq, (train, val, load_distances(c))
        else:
            loop, needs = train_ldm, (vq, open_latents(c, run.dir, vq, train), val)
        if c.steps is None or c.eval_every is None:
            step_s, eval_s, build_s = measure_speed(c, loop, needs)
            spent = distributed.from_rank_0(time.monotonic() - began)
            spent += build_s                                # the loop builds its networks again
            c = replace(c, **fix_length(c.minutes, c.steps, c.eval_every, spent, step_s, eval_s))
        step = loop(c, run, *needs)
    print0(f"{plural(step - run.start, 'step')} in {(time.monotonic() - began) / 60:.1f} minutes"
           f"{peak_memory(c.device)}.")
    if is_complete(run, step, c.steps, c.patience, overfitting):
        return True
    print0(f"{run.dir}: stopped at step {step} of {c.steps}; rerun the same command to resume")
    return False


def open_latents(c: Config, folder: Path, vq: VQModel, train: data.ImageDataset) -> LatentCache:
    def encode(x: Tensor) -> Tensor:
        with torch.no_grad(), autocast(c):
            return vq.encode(x.to(c.device)).float()

    if rank() > 0:
        distributed.barrier()                   # rank 0 fills the cache, the others open it
    key = f"{c.vq_hash} {c.amp}"
    cache = LatentCache(folder, key, train, encode, ENCODED, c.device, c.workers)
    if rank() == 0:
        distributed.barrier()
    return cache


def resumed_config(c: Config, old: dict, accept_data: bool) -> Config:
    """c with the length of the run that it resumes; ValueError where it is another run."""
    if c.cond_config and "hidden" not in old["cond_config"]:    # a run from before hidden joints
        c = replace(c, cond_config=replace(c.cond_config, hidden=False))
    if c.stage == "ldm" and c.init:             # the run has taken it from there
        c = replace(c, schedule=old["schedule"])
    new = plain(c)
    check_same_run(old, new, accept_data)
    return replace(c, **resumed_length(old, new))


def measure_speed(c: Config, loop: Callable[..., int], needs: tuple) -> tuple[float, float, float]:
    """Seconds of a training step, of an evaluation, and of building the networks, from a few steps
    in a temporary folder."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        loss = replace(c.recipe.loss, disc_start=0.0, disc_ramp=0.0)    # discriminator from step 0
        steps = max(MEASURED, 3 * c.workers)                            # more than are prefetched
        short = replace(c, steps=steps, eval_every=steps, keep_every=None,
                        patience=None, recipe=replace(c.recipe, quantize_start=0.0, loss=loss))
        run = RunDir(folder, c.stage, dry=True)
        loop(short, run, *needs)
        if run.stopped:
            raise KeyboardInterrupt
        rows = read_log(run.log_path)
    if rank() == 0:
        step_s, eval_s = c.recipe.batch_size / rows[-2]["img_s"], rows[-1]["eval_s"]
        build_s = time.monotonic() - began - steps * step_s - eval_s
    return distributed.from_rank_0((step_s, eval_s, build_s) if rank() == 0 else None)


def announce(c: Config, run: RunDir, held_out: int, used: str) -> None:
    """One line that says what runs."""
    if run.start:
        print0(f"Resuming {run.last} at step {run.start} of {c.steps}.")
    length = plural(c.steps, "step") if c.steps else plural(c.minutes, "minute")
    millions = count_parameters(c)["vq" if c.stage == "vq" else "unet"] / 1e6
    precision = "float32" if c.amp == "off" else c.amp
    print0(f"Stage {c.stage}, preset {c.preset}, on {c.device} in {precision}: {millions:.1f} M "
           f"parameters, {plural(c.images, 'image')} of {c.size}x{c.size} for training, {held_out} "
           f"held out ({c.data}), {length} of {plural(c.recipe.batch_size, 'image')}{used}, into "
           f"{c.out}.")


# ------------------------------------------------------------------------------ command line

def count_parameters(c: Config) -> dict[str, int]:
    """By network; built without memory."""
    with torch.device("meta"):
        vq, zeros = VQModel(c.vq_config), torch.zeros(c.vq_config.embed_dim, 1, 1)
        networks = {"vq": vq, "encoder": vq.encoder, "decoder": vq.decoder}
        if c.stage == "vq" and c.recipe.loss.disc_weight:
            networks["discriminator"] = PatchDiscriminator()
        if c.stage == "ldm":
            ldm = LDM(vq, c.unet_config, c.cond_config, zeros, zeros, c.schedule, True)
            networks |= {"unet": ldm.unet, "pose encoder": ldm.cond}
    return {name: sum(p.numel() for p in net.parameters()) for name, net in networks.items()}


def dry_run(c: Config) -> None:
    """Prints recipe and parameter counts; on a GPU also time and memory of a few real steps."""
    f, side = c.vq_config.factor, c.size // c.vq_config.factor
    print(f"stage {c.stage}, preset {c.preset}: {c.size}x{c.size} images, f{f} latents "
          f"{side}x{side}x{c.vq_config.embed_dim}, {c.vq_config.n_embed} codes")
    for name, n in count_parameters(c).items():
        print(f"{name:13s}{n:>13,d} parameters")
    for key, value in plain(c).items():
        print(f"  {key:12s} {value}")
    if c.device.startswith("cuda"):
        set_up_gpu(c.device)
        step_s = measure_figures(c)
        print(f"{step_s:.3g} s a step, {c.recipe.batch_size / step_s:.3g} images/s"
              f"{peak_memory(c.device)}")


def measure_figures(c: Config) -> float:
    """Seconds of a step on procedural figures, which every machine has."""
    train, val = data.open_data(f"figures:{2 * c.recipe.batch_size}", c.size, None)
    if c.stage == "vq":
        distances = load_distances(c, LPIPS())              # its weights do not matter here
        return measure_speed(c, train_vq, (train, val, distances))[0]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:     # Windows: mapped
        vq = prepare(VQModel(c.vq_config).eval().requires_grad_(False), c)
        cache = open_latents(c, Path(folder), vq, train)
        return measure_speed(c, train_ldm, (vq, cache, val))[0]


def off_or_weight(text: str) -> float:
    """off -> 0, else the weight of a loss term."""
    return 0.0 if text == "off" else number(float, 0)(text)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="train.py --stage {vq,ldm} [--flags; --help explains them]")
    positive, whole = number(float, 1e-9), number(int, 1)
    add = parser.add_argument_group("what is trained").add_argument
    add("--stage", choices=("vq", "ldm"),
        help="vq: the autoencoder; ldm: the diffusion model; --dry-run takes both")
    add("--preset", choices=PRESETS, default="toy",
        help="networks, image size and recipe (default %(default)s)")
    add("--condition", choices=("maps", "tokens", "tokens+maps"),
        help="stage 2: how the pose enters the network (default: the preset's)")
    add("--vq", metavar="CKPT",
        help=f"stage 2: stage 1's checkpoint (default: --init's, or {STAGE_1})")
    add("--init", metavar="CKPT", help="checkpoint to start from, where its weights fit")
    add("--seed", type=number(int, 0), default=0, help="of everything random (default 0)")
    add("--dry-run", action="store_true",
        help="print recipe and parameter counts, on a GPU also memory and time")

    add = parser.add_argument_group("dataset").add_argument
    add("--data", default="figures", metavar="DATA",
        help="a folder with images/ and keypoints/, a list, COCO, or (default) figures[:N]")
    add("--val", metavar="DATA", help="held-out images (default: a tenth of --data, by groups)")
    add("--labels", metavar="BY",
        help="a column of metadata.csv (default: label, if there is one), folders, or off")
    add("--trim-bars", action="store_true", help="cut letterbox bars off")

    add = parser.add_argument_group("run").add_argument
    add("--out", metavar="DIR", help="run folder (default runs/vq or runs/ldm)")
    add("--fresh", action="store_true", help="start over instead of resuming")
    add("--accept-data", action="store_true", help="resume although the images have changed")
    add("--steps", type=whole, metavar="N", help="length of the run (default: the preset's)")
    add("--minutes", type=positive, metavar="M", help="length of the run, instead of --steps")
    add("--eval-every", type=whole, metavar="STEPS",
        help="steps between evaluations (default: they take 5 %% of the time)")
    add("--keep-every", type=whole, metavar="STEPS",
        help="keep every such step as step-*.pt (default: only best.pt, last.pt)")
    add("--patience", type=whole, metavar="K",
        help=f"stage 2: stop after K evaluations of overfitting (default: warn after {ROW_OF})")

    add = parser.add_argument_group("optimisation (defaults: the preset's)").add_argument
    add("--batch-size", type=whole, metavar="N", help="images in a step")
    add("--lr", type=positive, help="the learning rate used, whatever the batch size")
    add("--perceptual", type=off_or_weight, metavar="WEIGHT",
        help="stage 1: weight of LPIPS, or off")
    add("--lpips-weights", nargs="+", metavar="FILE",
        help="stage 1: VGG16 and the lin weights of LPIPS, in one or two files")
    add("--download-lpips", action="store_true",
        help="stage 1: fetch those weights once (528 MB, checked by hash)")
    add("--disc-weight", type=off_or_weight, metavar="WEIGHT",
        help="stage 1: weight of the adversarial loss, or off")
    add("--disc-start", type=number(float, 0), metavar="STEP",
        help="stage 1: when the discriminator starts; below 1: share of the run")

    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto",
        help="mixed precision (default: bf16 where the hardware has it)")
    add("--compile", action="store_true", help="torch.compile the networks")
    add("--workers", type=number(int, 0), metavar="N",
        help="processes that load images (default: 0 on a CPU)")
    add("--micro-batch", type=whole, metavar="N",
        help="images in the network at once; their gradients add up to the batch's")
    add("--checkpointing", action="store_true",
        help="gradient checkpointing: less memory, a third more arithmetic")
    args = parser.parse_args(argv)
    if args.stage is None and not args.dry_run:
        parser.error("--stage vq or --stage ldm is needed")
    if args.steps and args.minutes:
        parser.error("--steps and --minutes exclude each other")
    of_stage_1 = given(perceptual=args.perceptual, disc_weight=args.disc_weight,
                       disc_start=args.disc_start, lpips_weights=args.lpips_weights,
                       download_lpips=args.download_lpips or None)
    of_stage_2 = given(vq=args.vq, condition=args.condition, patience=args.patience)
    for stage, other, flags in (("ldm", 1, of_stage_1), ("vq", 2, of_stage_2)):
        if args.stage == stage and flags:
            name = next(iter(flags)).replace("_", "-")
            parser.error(f"--{name} belongs to stage {other}; leave it out with --stage {stage}")
    return args


def main(argv: list[str] | None = None) -> int:
    args, c, status = parse_args(argv), None, 2
    try:
        if args.dry_run:
            for stage in [args.stage] if args.stage else ["vq", "ldm"]:
                dry_run(make_config(argparse.Namespace(**vars(args) | {"stage": stage})))
            return 0
        c = make_config(args)
        if args.download_lpips:
            from formats import lpips
            c = replace(c, lpips=tuple(map(str, lpips.download_lpips())))
        c = replace(c, device=distributed.join(c.device, c.recipe.batch_size))
        set_up_gpu(c.device)
        with locked(Path(c.out)) if rank() == 0 else nullcontext():
            distributed.barrier()                           # rank 0 has the folder first
            complete = run_stage(c, fresh=args.fresh, accept_data=args.accept_data)
    except (ValueError, OSError) as e:
        said = str(e)
    except RuntimeError as e:
        if c and checkpoint.out_of_memory(e):
            n = in_network(c)
            said = (f"the memory of {c.device} is too small for {n} images at once; add "
                    f"--micro-batch {max(1, n // 2)} or --checkpointing and rerun")
        elif args.compile and type(e).__module__.startswith("torch._"):     # _dynamo or _inductor
            said = f"torch.compile fails here ({type(e).__name__}); leave --compile out"
        elif worker_died(e):
            said = WORKER_DIED
        elif distributed.lost_rank(e):
            said, status = (f"another rank is gone ({str(e).strip().splitlines()[0][:100]}); rerun "
                            "the same command to resume"), LOST
        else:
            raise
    except KeyboardInterrupt:
        said = "interrupted; rerun the same command to resume from the last checkpoint"
        status = INTERRUPTED
    else:
        if dist.is_initialized():
            dist.destroy_process_group()
        return 0 if complete else INTERRUPTED
    distributed.complain("train.py", said)
    return status


if __name__ == "__main__":
    startup.run(main)
