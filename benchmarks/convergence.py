"""How many steps? The distance of each sampler from its limit; its worth in pose and image.

    python benchmarks/convergence.py --ckpt runs/ldm/last.pt --out DIR --images 128
    python benchmarks/convergence.py --out DIR --images 4 --steps 2 --limit 8     a quick try

Distance: the same x_T through S steps and through very many, root mean square of the difference of
the latents, with the default guidance. A sampler that adds noise has no such limit, for its noise
differs with S.
Quality: PCK@0.1 and the Frechet distance of held-out poses at equal calls of the network, as in
benchmarks/guidance.py. Writes convergence.png and convergence.json.
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import tables  # noqa: E402

import checkpoint  # noqa: E402
import data  # noqa: E402
import evaluate  # noqa: E402
import metrics.pose  # noqa: E402
import sample  # noqa: E402
from diffusion import Diffusion, EpsFn, ddim, dpm_solver, guided, per_image_noise  # noqa: E402
from ldm import LDM  # noqa: E402

STEPS = 3, 6, 12, 25, 50, 100, 250
SOLVERS = {"ddim, even in t": (ddim, "even"), "ddim, even in lambda": (ddim, "lambda"),
           "dpm_solver, even in t": (dpm_solver, "even"),
           "dpm_solver, even in lambda": (dpm_solver, "lambda")}
DRAWN_BY = {"ddim, eta 1": ("ddim", 1.0), "ddim, eta 0": ("ddim", 0.0),
            "dpm_solver, eta 0": ("dpm_solver", 0.0),
            "dpm_solver, eta 0.5": ("dpm_solver", 0.5), "dpm_solver, eta 1": ("dpm_solver", 1.0)}
DISTANCE_IMAGES = 4
KEYS = "pck@0.1", "pck@0.2", "oks", "frechet"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", default="runs/ldm/last.pt")
    parser.add_argument("--images", type=int, default=128,
                        help="held-out poses to draw (default %(default)s)")
    parser.add_argument("--steps", type=int, nargs="+", default=[6, 12, 25],
                        help="to draw them with")
    parser.add_argument("--limit", type=int, default=500, metavar="STEPS",
                        help="that count as very many (default %(default)s)")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    ldm, payload = checkpoint.load_ldm(args.ckpt)
    c = payload["config"]
    train_part, held_out = data.open_data(c["data"], c["size"], c["val"])
    poses = torch.cat([
        pose for _, pose, _ in data.in_order(data.spread(held_out, args.images), 64)])
    poses, side = poses[:DISTANCE_IMAGES], c["size"] // ldm.vq.config.factor

    eps_fn = guided(Diffusion(**ldm.schedule).eps_model(ldm), poses, ldm.guidance)
    x_T, _ = per_image_noise(list(range(len(poses))), (ldm.vq.config.embed_dim, side, side))
    far = {name: distances(*solver, eps_fn, x_T, args.limit) for name, solver in SOLVERS.items()}
    for name, row in far.items():
        print(name, {S: round(d, 4) for S, d in row.items()}, flush=True)
    reader = evaluate.find_detector(c["data"], train_part)
    drawn: dict[str, dict] = {}
    for name, how in DRAWN_BY.items():
        for S in args.steps:
            row = quality(ldm, reader, held_out, args.images, S, *how)
            drawn[f"{name}, {S} steps"] = row
            print(f"{name}, {S} steps", {key: round(row[key], 3) for key in KEYS},
                  flush=True)
    print(f"ceiling: PCK@0.1 {row['ceiling']:.3f}")
    plot(far, drawn, args.steps, out / "convergence.png")
    kept = {name: {key: float(row[key]) for key in KEYS} for name, row in drawn.items()}
    tables.write(str(out / "convergence.json"), {"distance": far, "drawn": kept})


def distances(solver: Callable, spacing: str, eps_fn: EpsFn, x_T: Tensor,
              limit: int) -> dict[int, float]:
    """The RMS distance of S steps from `limit` steps, from the same x_T, by S."""
    diffusion = Diffusion()

    def drawn(S: int) -> Tensor:
        *_, last = solver(diffusion, eps_fn, x_T, S, spacing=spacing)
        return last.x

    wanted = drawn(limit)
    return {S: (drawn(S) - wanted).square().mean().sqrt().item() for S in STEPS if S < limit}


def quality(ldm: LDM, reader: nn.Module, held_out: data.ImageDataset, n: int, S: int,
            sampler: str, eta: float) -> dict:
    """Pose fidelity and Frechet distance of n held-out poses, each from the same x_T whatever the
    sampler."""
    images, poses, _ = zip(*data.in_order(data.spread(held_out, n), 64), strict=True)
    poses, real = torch.cat(poses), np.concatenate([data.to_uint8(x) for x in images])
    samples = sample.draw_images(ldm, poses, list(range(len(poses))), held_out.size,
                                 sampler=sampler, steps=S, eta=eta, guidance=ldm.guidance)
    drawn = metrics.pose.Drawn(poses.double().numpy(), np.stack(samples), real)
    found, _ = metrics.pose.assess(reader, drawn)
    return found["samples"] | {"ceiling": found["real"]["pck@0.1"]}


def plot(far: dict[str, dict], drawn: dict[str, dict], steps: list[int], path: Path) -> None:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, 3, figsize=(14, 4), constrained_layout=True)
    for name, row in far.items():
        axes[0].loglog(list(row), list(row.values()), marker="o", label=name,
                       ls="-" if "lambda" in name else ":",
                       color="tab:blue" if "ddim" in name else "tab:orange")
    axes[0].set(title="distance from its own limit", ylabel="RMS, of latents of variance 1")
    for ax, key in zip(axes[1:], ("pck@0.1", "frechet"), strict=True):
        for name in DRAWN_BY:
            ax.plot(steps, [drawn[f"{name}, {S} steps"][key] for S in steps], marker="o",
                    label=name, color="tab:blue" if "ddim" in name else "tab:orange",
                    ls={"1": "--", "5": ":", "0": "-"}[name[-1]])
        title, unit, _ = evaluate.FIDELITY[key]
        ax.set(title=f"{title} ({unit})", xscale="log", xticks=steps, xticklabels=steps)
        ax.minorticks_off()
    for ax in axes.flat:
        ax.set_xlabel("steps, each one call of the network")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    fig.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
