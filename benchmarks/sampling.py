"""How fast is sampling beside diffusers'? Networks of the same size, the same pictures, steps and guidance, in turns.

    python benchmarks/sampling.py                       both works below
    python benchmarks/sampling.py toy --turns 5         20 guided steps of 8 pictures of the toy preset
    python benchmarks/sampling.py danbooru              one guided step of one picture of the danbooru preset

Ours is what sample.py does up to the decoder. diffusers' is the loop of its pipelines: latents doubled, scaled, the
UNet, guidance, scheduler.step (DPMSolverMultistepScheduler and DDIMScheduler), with prompt and maps made beforehand;
its UNet2DConditionModel has as many parameters as ours. float32 is as shipped; bf16 is `--amp bf16` for ours, weights
and latents in bf16 for diffusers', which is its own way. Random weights: they cost what trained ones do. Times are
medians; what is compared takes turns, so that a machine which gets slower does so for all. Needs diffusers beside the
rest.
"""
from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import sample  # noqa: E402
import train  # noqa: E402
from benchmarks.speed import in_turns  # noqa: E402
from diffusion import per_image_noise  # noqa: E402
from ldm import LDM  # noqa: E402
from unet import UNet  # noqa: E402
from vq import VQModel  # noqa: E402

WORKS = {"toy": (8, 20), "danbooru": (1, 1)}            # preset: pictures, steps
GUIDANCE = 3.0
SCHEDULE = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("works", nargs="*", metavar="WORK", help=f"{' or '.join(WORKS)} (default: both)")
    parser.add_argument("--turns", type=int, default=3, help="(default %(default)s)")
    args = parser.parse_args()
    if unknown := [work for work in args.works if work not in WORKS]:
        parser.error(f"{unknown[0]} is no work; there are {' and '.join(WORKS)}")
    if args.turns < 1:
        parser.error(f"--turns is {args.turns}; it must be at least 1")
    try:
        import diffusers
    except ImportError:
        parser.error("this compares with diffusers, which is not installed; pip install diffusers")
    print(f"torch {torch.__version__}, diffusers {diffusers.__version__}, {torch.get_num_threads()} threads")
    for work in args.works or WORKS:
        compare(work, args.turns)


@torch.no_grad()
def compare(work: str, turns: int) -> None:
    """Prints a table: seconds of each case and how many times slower than ours in bf16 it is."""
    pictures, steps = WORKS[work]
    side, poses = config_of(work).size, torch.rand(pictures, 17, 3).ceil() * torch.rand(pictures, 17, 3)
    cases: dict[str, Callable[[], object]] = {}
    for name, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16)):
        ldm = random_ldm(work)
        ldm.unet.to(dtype)
        unet = peer(ldm.unet, side // ldm.vq.config.factor).to(dtype)
        for sampler, spacing in (("dpm_solver", "lambda"), ("ddim", "even")):
            cases[f"ours, {sampler}, {name}"] = ours(ldm, poses, side, sampler, spacing, steps)
            cases[f"diffusers, {sampler}, {name}"] = theirs(unet, ldm, poses, sampler, steps, dtype)
    times = {name: statistics.median(took) for name, took in in_turns(cases, turns, "cpu").items()}
    fastest = times["ours, dpm_solver, bf16"]
    print(f"\n{work}: {steps} guided steps, batch {pictures}, latents {side // ldm.vq.config.factor} a side\n"
          "| case | s | over ours in bf16 |\n|---|---|---|")
    for name, took in times.items():
        print(f"| {name} | {took:.3f} | {took / fastest:.2f} |")


def config_of(preset: str) -> train.Config:
    return train.make_config(train.parse_args(["--stage", "ldm", "--preset", preset, "--device", "cpu"]))


def random_ldm(preset: str) -> LDM:
    c = config_of(preset)
    dummy = torch.zeros(c.vq_config.embed_dim, 1, 1)
    ldm = LDM(VQModel(c.vq_config), c.unet_config, c.cond_config, dummy, dummy, c.schedule, knows_null=True)
    return ldm.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def ours(ldm: LDM, poses: Tensor, side: int, sampler: str, spacing: str, steps: int) -> Callable[[], object]:
    def draw() -> None:
        for _ in sample.sample(ldm, poses, list(range(len(poses))), side, sampler=sampler, steps=steps, eta=0.0,
                               guidance=GUIDANCE, spacing=spacing):
            pass

    return draw


def peer(ours: UNet, side: int) -> nn.Module:
    """diffusers' UNet of the same layout and size; its attention_head_dim is the number of heads."""
    import diffusers
    c = ours.config
    attends = [2 ** level in c.attention_resolutions for level in range(len(c.channel_mult))]
    unet = diffusers.UNet2DConditionModel(
        sample_size=side, in_channels=c.in_channels, out_channels=c.out_channels, layers_per_block=c.num_res_blocks,
        block_out_channels=[c.model_channels * m for m in c.channel_mult], attention_head_dim=c.num_heads,
        down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        cross_attention_dim=c.context_dim or 1)
    if c.context_dim is None:                           # diffusers knows no U without cross-attention: it is taken out
        for block in unet.modules():
            if hasattr(block, "attn2"):
                block.attn2 = block.norm2 = None
    sizes = [sum(p.numel() for p in model.parameters()) for model in (ours, unet)]
    assert sizes[0] == sizes[1], f"ours has {sizes[0]} parameters, diffusers' {sizes[1]}"
    return unet.eval().requires_grad_(False)


def theirs(unet: nn.Module, ldm: LDM, poses: Tensor, sampler: str, steps: int,
           dtype: torch.dtype) -> Callable[[], object]:
    import diffusers
    h = unet.config.sample_size
    drop = torch.arange(2 * len(poses)) < len(poses)
    prompt, maps = (y if y is None else y.to(dtype) for y in ldm.cond(poses.repeat(2, 1, 1), (h, h), drop))
    kind = diffusers.DDIMScheduler if sampler == "ddim" else diffusers.DPMSolverMultistepScheduler
    more = {"clip_sample": False} if sampler == "ddim" else {}

    def draw() -> None:
        scheduler = kind(**SCHEDULE, **more)
        scheduler.set_timesteps(steps)
        x = per_image_noise(list(range(len(poses))), (ldm.unet.config.out_channels, h, h))[0].to(dtype)
        for t in scheduler.timesteps:
            both = scheduler.scale_model_input(torch.cat([x, x]), t)
            if maps is not None:
                both = torch.cat([both, maps], dim=1)
            eps_null, eps_cond = unet(both, t, encoder_hidden_states=prompt, return_dict=False)[0].chunk(2)
            x = scheduler.step(eps_null + GUIDANCE * (eps_cond - eps_null), t, x, return_dict=False)[0]

    return draw


if __name__ == "__main__":
    main()
