"""f4, f8 or f16? The seed's experiment: autoencoders of like size trained for equal time on pictures of 128 pixels.

    python benchmarks/factors.py --data FOLDER --seconds 1000 --out DIR
    python evaluate.py recon --data FOLDER --vq DIR/f4/last.pt DIR/f8/last.pt DIR/f16/last.pt --out DIR

The networks are those of the presets base, f8 and f16 at a quarter of their width and without norms, with the recipe
of the small preset: 3.5, 3.4 and 3.5 million parameters. A shared machine's clock is no equal time, so the steps of all
three are timed first, in turns, and each gets as many steps as its quickest one fits into --seconds. The results stand
in benchmarks/RESULTS.md.
"""
from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import train  # noqa: E402
from vq import VQConfig, VQModel  # noqa: E402

CH, K = 32, 4096
PRESET_OF = {"f4": "base", "f8": "f8", "f16": "f16"}
TURNS = 12


def config_of(name: str) -> VQConfig:
    return replace(train.PRESETS[PRESET_OF[name]].vq_config, ch=CH, n_embed=K, **train.NORM_FREE)


def step_seconds(c: train.Config) -> dict[str, float]:
    """The quickest of TURNS steps of each network, timed in turns."""
    models = {name: VQModel(config_of(name)).to(c.device, memory_format=torch.channels_last) for name in PRESET_OF}
    x = torch.rand(c.recipe.batch_size, 3, c.size, c.size, device=c.device) * 2 - 1
    best = dict.fromkeys(models, float("inf"))
    for _ in range(TURNS):
        for name, model in models.items():
            began = time.monotonic()
            with train.autocast(c):
                x_hat, codebook_loss, _ = model(x)
            ((x_hat - x).abs().mean() + codebook_loss).backward()
            if c.device.startswith("cuda"):
                torch.cuda.synchronize()
            best[name] = min(best[name], time.monotonic() - began)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--seconds", type=float, default=1000, help="of training for each (default %(default)g)")
    parser.add_argument("--out", required=True, help="folder for the runs")
    parser.add_argument("--factors", nargs="+", choices=PRESET_OF, default=list(PRESET_OF))
    args = parser.parse_args()
    seconds = None
    for name in args.factors:
        out = Path(args.out) / name
        flags = {"--stage": "vq", "--preset": "small", "--data": args.data, "--steps": 1, "--out": out}
        c = train.make_config(train.parse_args([str(word) for pair in flags.items() for word in pair]))
        seconds = seconds or step_seconds(c)
        steps = round(args.seconds / seconds[name])
        print(f"{name}: {seconds[name]:.3f} s a step, {steps} steps", flush=True)
        train.train_vq(replace(c, vq_config=config_of(name), steps=steps))


if __name__ == "__main__":
    main()
