"""Measures: how well stage 1 reconstructs and uses its codes, and how much stage 2 listens to the pose.

    python evaluate.py recon --vq runs/vq/last.pt --data DIR            PSNR, L1, code usage, perplexity
    python evaluate.py condition --ckpt runs/ldm/last.pt --data DIR     eps loss under right, shuffled and no pose

train.py calls the same functions on its validation set. PSNR is of pictures on 0..1, the mean over pictures.
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import checkpoint
import data
from diffusion import Diffusion
from vq import VQModel

SHUFFLE_SEED = 1234                 # of the fixed noise and the fixed wrong poses: one number, so runs compare


def psnr(x_hat: Tensor, x: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each picture, [B], for x_hat and x [B, 3, H, W] in [-1, 1]."""
    mse = ((x_hat.clamp(-1, 1) - x) / 2).square().mean(dim=(1, 2, 3))
    return -10 * torch.log10(mse.clamp(min=1e-12))


def box_baseline(x: Tensor, factor: int) -> Tensor:
    """x [B, 3, H, W] averaged over factor x factor boxes and blown up again: what an autoencoder has to beat."""
    return F.interpolate(F.avg_pool2d(x, factor), scale_factor=float(factor), mode="nearest")


@torch.no_grad()
def reconstruction(model: VQModel, images: Iterable[Tensor], device: str | torch.device = "cpu",
                   autocast: Callable[[], AbstractContextManager] = nullcontext) -> dict[str, float]:
    """Means over all pictures, each batch [B, 3, H, W] in [-1, 1]; usage and perplexity count every code of the set.

    psnr is of the quantised reconstruction, psnr_box of `box_baseline`; perplexity is exp of the entropy of the
    codes, K at most.
    """
    was_training = model.training
    model.eval()
    counts = torch.zeros(model.config.n_embed, dtype=torch.long)
    sums = {"psnr": 0.0, "psnr_box": 0.0, "l1": 0.0}
    n = 0
    for x in images:
        x = x.to(device)
        with autocast():
            x_hat, _, indices = model(x)
        x_hat = x_hat.float().clamp(-1, 1)
        sums["psnr"] += psnr(x_hat, x).sum().item()
        sums["psnr_box"] += psnr(box_baseline(x, model.config.factor), x).sum().item()
        sums["l1"] += (x_hat - x).abs().mean(dim=(1, 2, 3)).sum().item()
        counts += torch.bincount(indices.flatten().cpu(), minlength=len(counts))
        n += len(x)
    model.train(was_training)
    if n == 0:
        raise ValueError("there are no pictures to evaluate on")
    p = counts.double() / counts.sum()
    perplexity = torch.exp(-(p * p.clamp(min=1e-12).log()).sum()).item()
    return {k: v / n for k, v in sums.items()} | {"codes_used": (counts > 0).double().mean().item(),
                                                  "perplexity": perplexity, "pictures": n}


def derangement(n: int, seed: int) -> np.ndarray:
    """A permutation of range(n) that leaves nothing in its place (n >= 2)."""
    order = np.random.default_rng(seed).permutation(n)
    wrong = np.empty(n, dtype=np.int64)
    wrong[order] = np.roll(order, 1)                        # each element gets its neighbour in a random ring
    return wrong


@torch.no_grad()
def condition_losses(eps_model: Callable[..., Tensor], diffusion: Diffusion, z: Tensor, poses: Tensor,
                     batch_size: int = 64,
                     autocast: Callable[[], AbstractContextManager] = nullcontext) -> dict[str, float]:
    """The eps loss on latents z [N, C, h, w] under their own poses [N, 17, 3], under other pictures' and under none.

    The noise is fixed and timestep i of N is spread evenly over the schedule, so that runs and steps compare; all
    three see the same. shuffled / right is 1 where the model ignores the pose.
    """
    if len(z) < 2:
        raise ValueError(f"shuffled poses need at least 2 pictures, but there is {len(z)}")
    generator = torch.Generator().manual_seed(SHUFFLE_SEED)
    noise = torch.randn(z.shape, generator=generator).to(z.device)
    # Spread by a random order: neighbouring pictures (frames of one film) should not share a timestep.
    t = torch.linspace(0, diffusion.timesteps - 1, len(z)).round().long()
    t = t[torch.randperm(len(z), generator=generator)].to(z.device)
    wrong = poses[torch.as_tensor(derangement(len(z), SHUFFLE_SEED), device=poses.device)]
    out = {}
    for name, p, dropped in (("right", poses, False), ("shuffled", wrong, False), ("null", poses, True)):
        total = 0.0
        for i in range(0, len(z), batch_size):
            s = slice(i, i + batch_size)
            drop = torch.full((len(z[s]),), dropped, device=z.device)
            with autocast():
                loss = diffusion.loss(eps_model, z[s], p[s], t=t[s], noise=noise[s], drop=drop)
            total += loss.double().sum().item()
        out[name] = total / len(z)
    return out | {"ratio": out["shuffled"] / out["right"]}


# ------------------------------------------------------------------------------------------------- command line

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="evaluate.py {recon,condition} [--flags; --help explains them]")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{recon,condition}")
    for name, flag, default in (("recon", "--vq", "runs/vq/last.pt"), ("condition", "--ckpt", "runs/ldm/last.pt")):
        sub = commands.add_parser(name)
        sub.add_argument(flag, dest="ckpt", default=default, metavar="FILE", help="default %(default)s")
        sub.add_argument("--data", help="as for train.py; its held-out part counts (default: as in training)")
        sub.add_argument("--val", help="held-out pictures, as for train.py (default: a tenth of the groups of --data)")
        sub.add_argument("--limit", type=int, default=512, help="pictures at most, spread evenly (default %(default)s)")
        sub.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    args = parser.parse_args(argv)
    if args.limit < 2:
        parser.error(f"--limit is {args.limit}; at least 2 pictures are needed")
    return args


def measure(args: argparse.Namespace) -> dict[str, float]:
    """The measures of one command, in float32."""
    stage, device = {"recon": "vq", "condition": "ldm"}[args.command], checkpoint.find_device(args.device)
    payload = checkpoint.load(args.ckpt, stage)
    c = payload["config"]
    spec, val = (args.data, args.val) if args.data else (c["data"], args.val or c["val"])
    held_out = data.open_data(spec, c["size"], val, remember=False)[1]
    batches = tqdm(data.in_order(held_out, 32, args.limit), desc=args.command, unit="batch", dynamic_ncols=True)
    if stage == "vq":
        model = checkpoint.build_vq(payload, args.ckpt).to(device)
        return reconstruction(model, (x for x, _ in batches), device)
    ldm = checkpoint.build_ldm(payload, args.ckpt, device)
    with torch.no_grad():
        pairs = [(ldm.encode(x.to(device)), pose) for x, pose in batches]
    if not pairs:
        raise ValueError(f"{spec} has no usable held-out picture")
    z, poses = (torch.cat(part).to(device) for part in zip(*pairs, strict=True))
    return condition_losses(ldm, Diffusion(**ldm.schedule), z, poses)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        result = measure(args)
    except (ValueError, OSError) as e:
        print(f"evaluate.py: {e}", file=sys.stderr)
        return 2
    for name, value in result.items():
        print(f"{name:12s} {value:.4f}" if isinstance(value, float) else f"{name:12s} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
