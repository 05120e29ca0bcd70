"""f4, f8 or f16? Autoencoders of like size trained for equal time on images of 128 pixels.

    python benchmarks/factors.py --data FOLDER --seconds 1000 --out DIR
    python evaluate.py recon --data FOLDER --out DIR \
        --vq DIR/f4/last.pt DIR/f8/last.pt DIR/f16/last.pt

The networks are those of the presets base, f8 and f16 at a quarter of their width and without
norms, with the recipe of the small preset: 3.5, 3.4 and 3.5 million parameters. Each trains for as
many steps as fit into --seconds at its quickest; the three are timed in turns. The results stand in
benchmarks/RESULTS.md.
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import train  # noqa: E402
from benchmarks.timing import in_turns  # noqa: E402
from vq import VQConfig, VQModel  # noqa: E402

CH, K = 32, 4096
PRESET_OF = {"f4": "base", "f8": "f8", "f16": "f16"}
TURNS = 12


def config_of(name: str) -> VQConfig:
    preset = train.PRESETS[PRESET_OF[name]]
    return replace(preset.vq_config, ch=CH, n_embed=K, **train.NORM_FREE)


def stepper(name: str, c: train.Config) -> Callable[[], None]:
    """A function that computes the gradient of one batch."""
    model = VQModel(config_of(name)).to(c.device, memory_format=torch.channels_last)
    x = torch.rand(c.recipe.batch_size, 3, c.size, c.size, device=c.device) * 2 - 1

    def step() -> None:
        with train.autocast(c):
            x_hat, codebook_loss, _ = model(x)
        ((x_hat - x).abs().mean() + codebook_loss).backward()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--seconds", type=float, default=1000,
                        help="of training for each (default %(default)g)")
    parser.add_argument("--out", required=True, help="folder for the runs")
    args = parser.parse_args()
    configs = {name: train.make_config(train.parse_args([
        "--stage", "vq", "--preset", "small", "--data", args.data, "--out",
        str(Path(args.out, name))])) for name in PRESET_OF}
    times = in_turns({name: stepper(name, c) for name, c in configs.items()}, TURNS,
                     configs["f4"].device)
    for name, c in configs.items():
        steps = max(1, round(args.seconds / min(times[name])))
        print(f"{name}: {min(times[name]):.3f} s a step, {steps} steps", flush=True)
        c = replace(c, vq_config=config_of(name), steps=steps)
        train.run_stage(c, fresh=False, accept_data=False)


if __name__ == "__main__":
    main()
