"""How should a codebook start, move and get gradients? Six ways at equal steps, toy autoencoder.

    python benchmarks/codebooks.py --data figures --steps 1500 --out DIR
    python benchmarks/codebooks.py --data FOLDER --steps 1500 --out DIR --variants ema simvq

Prints a table of held-out PSNR, codes used and perplexity. The ways that lost live here, not in
vq.py. A variant whose run is complete in DIR is not trained again. The results stand in
benchmarks/RESULTS.md.
"""
from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import train  # noqa: E402
import vq  # noqa: E402
from engine.run import read_log  # noqa: E402


class NoRestarts(vq.VectorQuantizer):
    """Dead codes stay dead."""

    def update(self, h: Tensor, indices: Tensor, restart: bool = True) -> int:
        return super().update(h, indices, restart=False)


class RotationTrick(vq.VectorQuantizer):
    """The gradient is turned by the rotation, and scaled by the factor, that take h to its code
    (arXiv:2410.06424)."""

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, loss, indices = super().forward(h)
        h, q = h.float(), q.detach()
        e_unit, q_unit = F.normalize(h.detach(), dim=1), F.normalize(q, dim=1)
        r = F.normalize(e_unit + q_unit, dim=1)
        scale = q.norm(dim=1, keepdim=True) / h.detach().norm(dim=1, keepdim=True).clamp(min=1e-6)

        def dot(a: Tensor, b: Tensor) -> Tensor:
            return (a * b).sum(1, keepdim=True)

        return scale * (h - 2 * r * dot(r, h) + 2 * q_unit * dot(e_unit, h)), loss, indices


class Projected(nn.Module):
    """Stands in for nn.Embedding: frozen random codes under one learned affine map."""

    def __init__(self, n_embed: int, embed_dim: int):
        super().__init__()
        self.register_buffer("frozen", torch.randn(n_embed, embed_dim))
        self.linear = nn.Linear(embed_dim, embed_dim)

    @property
    def weight(self) -> Tensor:
        return self.linear(self.frozen)

    def forward(self, indices: Tensor) -> Tensor:
        return F.embedding(indices, self.weight)


class SimVQ(vq.VectorQuantizer):
    """All codes move together (arXiv:2411.02038); the map starts at the mean and covariance of the
    encoder outputs."""

    def __init__(self, n_embed: int, embed_dim: int, ema: bool = False):
        super().__init__(n_embed, embed_dim)
        self.embedding = Projected(n_embed, embed_dim)

    @torch.no_grad()
    def init_codes(self, h: Tensor) -> None:
        flat = h.float().permute(0, 2, 3, 1).flatten(0, 2)
        covariance = flat.T.cov() + 1e-6 * torch.eye(flat.shape[1])
        self.embedding.linear.weight.copy_(torch.linalg.cholesky(covariance))
        self.embedding.linear.bias.copy_(flat.mean(0))

    def update(self, h: Tensor, indices: Tensor, restart: bool = True) -> int:
        return 0


# name: (what it is, class, EMA codebook, codes drawn from encoder outputs after a time without
# quantisation)
VARIANTS = {
    "reference": ("U(-1/K, 1/K), gradient", vq.VectorQuantizer, False, False),
    "data-init": ("drawn from encoder outputs, gradient", NoRestarts, False, True),
    "restarts": ("drawn, gradient, dead codes restarted", vq.VectorQuantizer, False, True),
    "ema": ("drawn, moving average, restarted", vq.VectorQuantizer, True, True),
    "rotation": ("as ema, gradient by the rotation trick", RotationTrick, True, True),
    "simvq": ("frozen codes under a learned affine map", SimVQ, False, True),
}


def run(name: str, args: argparse.Namespace) -> dict:
    """The last evaluation of one variant."""
    _, quantizer, ema, drawn = VARIANTS[name]
    out = Path(args.out) / name
    c = train.make_config(train.parse_args([
        "--stage", "vq", "--data", args.data, "--steps", str(args.steps), "--out", str(out),
        "--seed", str(args.seed)]))
    recipe = replace(c.recipe, data_init_codes=drawn,
                     quantize_start=c.recipe.quantize_start if drawn else 0.0)
    c = replace(c, recipe=recipe, vq_config=replace(c.vq_config, ema_codebook=ema))
    original, vq.VectorQuantizer = vq.VectorQuantizer, quantizer    # of the model run_stage makes
    try:
        train.run_stage(c, fresh=False, accept_data=False)
    finally:
        vq.VectorQuantizer = original
    return [row for row in read_log(out / "log.jsonl") if "val_psnr" in row][-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="figures")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True, help="folder for the runs")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    args = parser.parse_args()
    rows = {name: run(name, args) for name in args.variants}
    print(f"{args.data}, {args.steps} steps, seed {args.seed}\n"
          "| variant | what | PSNR, dB | codes used | perplexity |\n|---|---|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {VARIANTS[name][0]} | {row['val_psnr']:.2f} "
              f"| {row['val_codes_used']:.1%} | {row['val_perplexity']:.0f} |")


if __name__ == "__main__":
    main()
