"""What cached latents save: steps of stage 2 at the seed's sizes, on latents from the cache and on encoded pictures.

    python benchmarks/cached.py --batch 2 [--turns 5] [--device cuda --batch 32]

Both ways train the same UNet (preset danbooru) on the same figures of 256 pixels; they take turns, and a step is all of
it: reading, for one way encoding, forward, backward, optimiser. Times are medians.
"""
from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
import data  # noqa: E402
import dataset.latents  # noqa: E402
import train  # noqa: E402
from benchmarks.speed import in_turns  # noqa: E402
from dataset.figures import Figures  # noqa: E402
from diffusion import Diffusion  # noqa: E402
from unet import UNet  # noqa: E402
from vq import VQModel  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--pictures", type=int, default=16, help="in the cache (default %(default)s)")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    c = train.make_config(train.parse_args(["--stage", "ldm", "--preset", "danbooru", "--device", args.device]))
    device = torch.device(c.device)
    vq = VQModel(c.vq_config).to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    unet = UNet(c.unet_config).to(device, memory_format=torch.channels_last)
    opt = torch.optim.AdamW(unet.parameters(), lr=c.recipe.lr, fused=True)
    diffusion, context = Diffusion(**c.schedule), torch.rand(args.batch, 1, c.unet_config.context_dim, device=device)
    train.set_up(c.device)
    figures = data.InMemory(Figures(args.pictures, c.size))
    loaded = data.batches(figures, args.batch, 0, 0, sys.maxsize, c.workers, augment=True, device=device)

    def encode(x: Tensor) -> Tensor:
        with torch.no_grad(), train.autocast(c):
            return vq.encode(x.to(device)).float()

    def step(h: Tensor) -> None:
        opt.zero_grad(set_to_none=True)
        with train.autocast(c):
            loss = diffusion.loss(lambda x, t, pose, drop: unet(x, t, pose), h.to(device), context, 0.0).mean()
        loss.backward()
        opt.step()

    with tempfile.TemporaryDirectory() as folder:
        cache = dataset.latents.LatentCache(folder, "benchmark", figures, encode, args.batch, device)
        steps = iter(range(sys.maxsize))
        times = in_turns({"cached": lambda: step(dataset.latents.latent_batch(cache, args.batch, 0, next(steps))[0]),
                          "encoded": lambda: step(encode(next(loaded)[0]))}, args.turns, c.device)
    cached, encoded = (statistics.median(times[name]) for name in ("cached", "encoded"))
    print(f"batch {args.batch}, {c.device}, amp {c.amp}, {torch.get_num_threads()} threads, torch {torch.__version__}: "
          f"{cached:.3f} s a step on cached latents, {encoded:.3f} s on encoded pictures, {encoded / cached:.2f} times")
    return 0


if __name__ == "__main__":
    sys.exit(main())
