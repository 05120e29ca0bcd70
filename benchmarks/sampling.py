"""How fast is sampling beside diffusers'? Networks of the same size, same poses and steps.

    python benchmarks/sampling.py toy --turns 5     20 guided steps of 8 images, preset toy
    python benchmarks/sampling.py danbooru          one guided step of one image, preset danbooru

Ours is what sample.py does up to the decoder. diffusers' is the loop of its pipelines: latents
doubled, scaled, the UNet, guidance, scheduler.step (DPMSolverMultistepScheduler and DDIMScheduler),
with prompt and maps made beforehand; its UNet2DConditionModel has as many parameters as ours.
float32 is as shipped; bf16 is `--amp bf16` for ours, weights and latents in bf16 for diffusers',
which is its own way. Random weights: they cost what trained ones do. Times are medians, taken in
turns. Needs diffusers beside the rest.
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import sample  # noqa: E402
import train  # noqa: E402
from benchmarks.speed import diffusers_unet  # noqa: E402
from benchmarks.tables import write  # noqa: E402
from benchmarks.timing import medians  # noqa: E402
from diffusion import per_image_noise  # noqa: E402
from engine.cpu import use_fast_norms  # noqa: E402
from ldm import LDM  # noqa: E402
from vq import VQModel  # noqa: E402

WORKS = {"toy": (8, 20), "danbooru": (1, 1)}            # preset: images, steps
GUIDANCE = 3.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=WORKS)
    parser.add_argument("--turns", type=int, default=3, help="(default %(default)s)")
    parser.add_argument("--out", help="a .json for benchmarks/tables.py")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, diffusers {diffusers.__version__}, "
          f"{torch.get_num_threads()} threads")
    times = compare(args.work, args.turns)
    if args.out:
        write(args.out, {case: {"seconds": took} for case, took in times.items()})


@torch.no_grad()
def compare(work: str, turns: int) -> dict[str, float]:
    """Seconds of each case; prints a table of them, and over those of ours in bf16."""
    images, steps = WORKS[work]
    c = train.make_config(train.parse_args(
        ["--stage", "ldm", "--preset", work, "--device", "cpu"]))
    latent = c.size // c.vq_config.factor
    poses = torch.rand(images, 17, 3).ceil() * torch.rand(images, 17, 3)
    cases: dict[str, Callable[[], object]] = {}
    for name, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16)):
        ldm = random_ldm(c)
        unet = diffusers_unet(c.unet_config, latent).eval().requires_grad_(False).to(dtype)
        sizes = [sum(p.numel() for p in model.parameters()) for model in (ldm.unet, unet)]
        assert sizes[0] == sizes[1], f"ours has {sizes[0]} parameters, diffusers' {sizes[1]}"
        ldm.unet.to(dtype)
        use_fast_norms(ldm.unet)
        for sampler in ("dpm_solver", "ddim"):
            cases[f"ours, {sampler}, {name}"] = ours(ldm, poses, c.size, sampler, steps)
            cases[f"diffusers, {sampler}, {name}"] = theirs(unet, ldm, poses, sampler, steps, dtype)
    times = medians(cases, turns)
    print(f"\n{work}: {steps} guided steps, batch {images}, latents {latent} a side\n"
          "| case | s | over ours in bf16 |\n|---|---|---|")
    for name, took in times.items():
        print(f"| {name} | {took:.3f} | {took / times['ours, dpm_solver, bf16']:.2f} |")
    return times


def random_ldm(c: train.Config) -> LDM:
    zeros = torch.zeros(c.vq_config.embed_dim, 1, 1)
    ldm = LDM(VQModel(c.vq_config), c.unet_config, c.cond_config, zeros, zeros, c.schedule, True)
    return ldm.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def ours(ldm: LDM, poses: Tensor, side: int, sampler: str, steps: int) -> Callable[[], object]:
    def draw() -> None:
        for _ in sample.sample(ldm, poses, list(range(len(poses))), side, sampler=sampler,
                               steps=steps, eta=0.0, guidance=GUIDANCE):
            pass

    return draw


def theirs(unet: nn.Module, ldm: LDM, poses: Tensor, sampler: str, steps: int,
           dtype: torch.dtype) -> Callable[[], object]:
    h = unet.config.sample_size
    drop = torch.arange(2 * len(poses)) < len(poses)
    prompt, maps = (y if y is None else y.to(dtype)
                    for y in ldm.cond(poses.repeat(2, 1, 1), (h, h), drop))
    schedule = {"beta_schedule": "scaled_linear", "num_train_timesteps": ldm.schedule["timesteps"],
                "beta_start": ldm.schedule["linear_start"], "beta_end": ldm.schedule["linear_end"],
                "prediction_type": {"eps": "epsilon", "v": "v_prediction"}[
                    ldm.schedule.get("prediction", "eps")]}
    kind = diffusers.DPMSolverMultistepScheduler
    if sampler == "ddim":
        kind, schedule = diffusers.DDIMScheduler, schedule | {"clip_sample": False}

    def draw() -> None:
        scheduler = kind(**schedule)
        scheduler.set_timesteps(steps)
        shape = ldm.unet.config.out_channels, h, h
        x = per_image_noise(list(range(len(poses))), shape)[0].to(dtype)
        for t in scheduler.timesteps:
            both = scheduler.scale_model_input(torch.cat([x, x]), t)
            if maps is not None:
                both = torch.cat([both, maps], dim=1)
            null, cond = unet(both, t, encoder_hidden_states=prompt, return_dict=False)[0].chunk(2)
            x = scheduler.step(null + GUIDANCE * (cond - null), t, x, return_dict=False)[0]

    return draw


if __name__ == "__main__":
    main()
