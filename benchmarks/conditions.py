"""Which condition steers best? Seven at equal time, on the toy UNet over one autoencoder.

    python benchmarks/conditions.py --vq runs/vq/last.pt --steps 1100 --seeds 0 1 --out DIR
    python benchmarks/conditions.py --vq VQ --data FOLDER --steps 1100 --seeds 0 --out DIR \
        --variants maps tokens+maps

--steps is what the variant `tokens+maps` gets; the others get what they can do in the same time,
from step times taken in turns. Prints the table that stands in benchmarks/RESULTS.md: the eps loss
under right, shuffled and no poses, then PCK and OKS of samples, by the keypoint detector. The
conditions that lost live here, not in keypoints.py. A run that is complete in DIR is not trained
again, so two of these commands with different --seeds may share a folder.
"""
from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import checkpoint  # noqa: E402
import data  # noqa: E402
import evaluate  # noqa: E402
import keypoints  # noqa: E402
import ldm as ldm_file  # noqa: E402
import metrics.pose  # noqa: E402
import train  # noqa: E402
from benchmarks.timing import medians  # noqa: E402
from diffusion import Diffusion  # noqa: E402
from engine.run import read_log  # noqa: E402
from keypoints import ConditionConfig  # noqa: E402
from ldm import LDM  # noqa: E402

CELLS = 32                      # a side of the grid, that of the original blog post
WAVES = 4                       # frequencies of a pixel's own place, pi, 2 pi, ...
TURNS = 15                      # of timing


class CellEncoder(keypoints.PoseEncoder):
    """One token a joint like its parent, but the position enters as the learned embedding of its
    cell of the grid."""

    def __init__(self, dim: int, n_freqs: int = 8):
        super().__init__(dim, n_freqs)
        self.position = nn.Embedding(CELLS ** 2, dim)

    def forward(self, pose: Tensor, drop: Tensor | None = None) -> Tensor:
        position = self.position(keypoints.tokenize(pose, CELLS))               # [B, J, D]
        tokens = self.joint + torch.where(pose[..., 2:] > 0, position, self.missing)
        return tokens if drop is None else torch.where(drop[:, None, None], self.null, tokens)


class LoudEncoder(keypoints.PoseEncoder):
    """One token a joint like its parent, but the position is as loud as the joint's name from the
    first step on."""

    def __init__(self, dim: int, n_freqs: int = 8):
        super().__init__(dim, n_freqs)
        self.position = nn.Sequential(*self.position, nn.LayerNorm(dim))


class PlacedCondition(keypoints.PoseCondition):
    """Gives the UNet, beside its parent's condition, waves [B, 4 WAVES, h, w] that tell each pixel
    where it is.

    Without them a query of the cross-attention knows its place only by what convolutions carry in
    from the border.
    """

    def forward(self, pose: Tensor, size: tuple[int, int],
                drop: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        context, maps = super().forward(pose, size, drop)
        freqs, waves = math.pi * 2.0 ** torch.arange(WAVES, device=pose.device), []
        for axis in (1, 0):                                                     # x, then y
            place = (torch.arange(size[axis], device=pose.device) + 0.5) / size[axis]
            angle = place * freqs[:, None]
            wave = torch.cat([angle.sin(), angle.cos()])                        # [2 WAVES, w or h]
            waves.append(wave.unsqueeze(1 if axis else 2).expand(-1, *size))
        waves = torch.cat(waves).expand(len(pose), -1, -1, -1)
        return context, waves if maps is None else torch.cat([maps, waves], dim=1)


# name: conditioning, encoder of the tokens, does a pixel know its place
VARIANTS = {
    "seed": (("seed",), keypoints.PoseEncoder, False),
    "cells": (("tokens",), CellEncoder, False),
    "tokens": (("tokens",), keypoints.PoseEncoder, False),          # Fourier features of x and y
    "placed tokens": (("tokens",), LoudEncoder, True),
    "maps": (("maps",), keypoints.PoseEncoder, False),
    "tokens+maps": (("tokens", "maps"), keypoints.PoseEncoder, False),
    "placed tokens+maps": (("tokens", "maps"), LoudEncoder, True),
}


@contextmanager
def variant(name: str) -> Iterator[None]:
    """Inside the block models are made with this condition, those of checkpoints too."""
    _, encoder, placed = VARIANTS[name]
    own = keypoints.PoseEncoder, ldm_file.PoseCondition, ConditionConfig.map_channels
    keypoints.PoseEncoder = encoder
    if placed:
        ldm_file.PoseCondition = PlacedCondition
        ConditionConfig.map_channels = property(lambda config: own[2].fget(config) + 4 * WAVES)
    try:
        yield
    finally:
        keypoints.PoseEncoder, ldm_file.PoseCondition, ConditionConfig.map_channels = own


def config(args: argparse.Namespace, name: str, seed: int, steps: int) -> train.Config:
    """Inside `variant(name)`."""
    c = train.make_config(train.parse_args([
        "--stage", "ldm", "--vq", args.vq, "--data", args.data, "--steps", str(steps),
        "--seed", str(seed), "--out", str(Path(args.out, f"{name}-{seed}"))]))
    cond, latent = replace(c.cond_config, conditioning=VARIANTS[name][0]), c.vq_config.embed_dim
    return replace(c, cond_config=cond, unet_config=replace(
        c.unet_config, in_channels=latent + cond.map_channels, context_dim=cond.context_dim))


def step_times(args: argparse.Namespace) -> dict[str, float]:
    """Seconds of a training step of each variant: the median, taken in turns."""
    steps, vq = {}, checkpoint.build_vq(checkpoint.load_vq(args.vq), args.vq)
    C = vq.config.embed_dim
    for name in VARIANTS:
        with variant(name):
            c = config(args, name, 0, 1)
            side = c.size // vq.config.factor
            ldm = LDM(vq, c.unet_config, c.cond_config, torch.zeros(C, 1, 1),
                      torch.ones(C, 1, 1), c.schedule, True)
        ldm = ldm.to(memory_format=torch.channels_last)
        steps[name] = stepper(ldm, c, torch.randn(c.recipe.batch_size, C, side, side))
    return medians(steps, TURNS)


def stepper(ldm: LDM, c: train.Config, z: Tensor) -> Callable[[], None]:
    """A function that makes one training step of `ldm` on latents z."""
    pose, noise = torch.rand(len(z), len(keypoints.JOINTS), 3), torch.randn_like(z)
    optimizer, diffusion = train.ldm_optimizer(ldm, c.recipe), Diffusion(**c.schedule)
    t, drop = torch.randint(diffusion.timesteps, (len(z),)), torch.rand(len(z)) < c.recipe.p_drop

    def step() -> None:
        with train.autocast(c):
            loss = diffusion.loss(ldm, z, pose, t, noise, drop).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def share_latents(out: Path, run: Path) -> None:
    """All runs are over the same latents: a copy is quicker than encoding thousands of images
    again."""
    run.mkdir(parents=True, exist_ok=True)
    for file in [p for p in out.glob("*/latents-*") if p.parent != run and p.suffix != ".tmp"]:
        if not (run / file.name).exists():
            shutil.copy(file, run / file.name)


def figures_of(args: argparse.Namespace, name: str, seed: int) -> dict:
    """One row of the table: losses from the run's log, the rest from samples of its last
    checkpoint."""
    run = Path(args.out, f"{name}-{seed}")
    with variant(name):
        ldm, payload = checkpoint.load_ldm(run / "last.pt")
    train_part, held_out = data.open_data(args.data, payload["config"]["size"])
    reader = evaluate.find_detector(args.data, train_part)
    drawn = evaluate.draw_held_out(ldm, data.spread(held_out, args.images), sampler="ddim",
                                   steps=args.sampling_steps)
    found, _ = metrics.pose.assess(reader, drawn)
    losses = [row for row in read_log(run / "log.jsonl") if "val_right" in row][-1]
    samples = found["samples"]
    return {"steps": losses["step"] + 1, "right": losses["val_right"],
            "shuffled": losses["val_shuffled"], "null": losses["val_null"],
            "ratio": losses["val_ratio"], "floor": found["shuffled"]["pck@0.1"],
            "ceiling": found["real"]["pck@0.1"],
            **{key: samples[key] for key in evaluate.FIDELITY if key in samples}}


COLUMNS = {"steps": ("steps", "", "d"), "right": ("eps loss", "right", ".4f"),
           "shuffled": ("eps loss", "shuffled", ".4f"), "null": ("eps loss", "null", ".4f"),
           "ratio": ("shuffled", "/ right", ".3f"), **evaluate.FIDELITY,
           "floor": ("floor", "PCK@0.1", ".3f"), "ceiling": ("ceiling", "PCK@0.1", ".3f")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vq", required=True)
    parser.add_argument("--data", default="figures")
    parser.add_argument("--steps", type=int, default=1100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--images", type=int, default=128, help="samples a run")
    parser.add_argument("--sampling-steps", type=int, default=50)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "step_times.json").exists():
        (out / "step_times.json").write_text(json.dumps(step_times(args), indent=1))
    seconds = json.loads((out / "step_times.json").read_text())
    print({name: round(value, 3) for name, value in seconds.items()})
    for seed in args.seeds:
        for name in args.variants:
            with variant(name):
                steps = round(args.steps * seconds["tokens+maps"] / seconds[name])
                c = config(args, name, seed, max(1, steps))
                share_latents(out, Path(c.out))
                print(f"{name}, seed {seed}: {c.steps} steps", flush=True)
                train.run_stage(c, fresh=False, accept_data=False)
    rows = {f"{name}, seed {seed}": figures_of(args, name, seed)
            for name in args.variants for seed in args.seeds}
    print(evaluate.table(rows, COLUMNS))


if __name__ == "__main__":
    main()
