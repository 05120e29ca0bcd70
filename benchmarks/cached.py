"""What cached latents save: steps of stage 2 at full size, on cached latents and encoding images.

    python benchmarks/cached.py --batch 2 [--turns 5] [--device cuda --batch 32]
    python benchmarks/cached.py --preset toy --batch 2 --turns 1        a quick try

Both ways train the same UNet on the same figures; they take turns. A step is all of it: reading,
for one way encoding, forward, backward, optimiser. Times are medians.
"""
from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
import data  # noqa: E402
import train  # noqa: E402
from benchmarks.timing import medians  # noqa: E402
from dataset.figures import Figures  # noqa: E402
from dataset.latents import LatentCache, latent_batch  # noqa: E402
from diffusion import Diffusion  # noqa: E402
from ldm import LDM  # noqa: E402
from vq import VQModel  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="danbooru", help="(default %(default)s)")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--pictures", type=int, default=16,
                        help="in the cache (default %(default)s)")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    c = train.make_config(train.parse_args(
        ["--stage", "ldm", "--preset", args.preset, "--device", args.device]))
    vq = VQModel(c.vq_config).to(c.device, memory_format=torch.channels_last)
    vq.eval().requires_grad_(False)
    C = c.vq_config.embed_dim
    ldm = LDM(vq, c.unet_config, c.cond_config, torch.zeros(C, 1, 1), torch.ones(C, 1, 1),
              c.schedule, True).to(c.device, memory_format=torch.channels_last)
    optimizer, diffusion = train.ldm_optimizer(ldm, c.recipe), Diffusion(**c.schedule)
    figures = data.InMemory(Figures(args.pictures, c.size))
    loaded = data.batches(figures, args.batch, 0, 0, sys.maxsize, c.workers, augment=True,
                          device=c.device)

    def encode(x: Tensor) -> Tensor:
        with torch.no_grad(), train.autocast(c):
            return vq.encode(x.to(c.device)).float()

    def step(h: Tensor, pose: Tensor) -> None:
        with train.autocast(c):
            loss = diffusion.loss(ldm, h.to(c.device), pose.to(c.device)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def encoded() -> None:
        x, pose, _ = next(loaded)
        step(encode(x), pose)

    with tempfile.TemporaryDirectory() as folder:
        cache = LatentCache(folder, "benchmark", figures, encode, args.batch, c.device)
        steps = iter(range(sys.maxsize))
        times = medians({"cached": lambda: step(*latent_batch(cache, args.batch, 0, next(steps))),
                         "encoded": encoded}, args.turns, c.device)
    print(f"preset {args.preset}, batch {args.batch}, {c.device}, amp {c.amp}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}: "
          f"{times['cached']:.3f} s a step on cached latents, {times['encoded']:.3f} s on encoded "
          f"images, {times['encoded'] / times['cached']:.2f} times")


if __name__ == "__main__":
    main()
