"""What is each choice worth? One thing changed at a time, at equal steps: the toy preset, and for
`factor` autoencoders of 128 pixels.

    python benchmarks/ablations.py codebook --seeds 0 1 --runs DIR
    python benchmarks/ablations.py autoencoder --seeds 0 1 --runs DIR
    python benchmarks/ablations.py diffusion --steps 300 --seeds 0 1 --runs DIR
    python benchmarks/ablations.py factor --data FOLDER --steps 300 --seeds 0 1 --runs DIR

Stage 1 is judged by held-out PSNR, by the codebook, and by what the keypoint detector finds in
reconstructions; stage 2 by the loss under shuffled poses and by what it finds in samples. The ways
that lost live here, not in the book. A run that is complete in DIR is not trained again. With
--out FILE the rows are written for benchmarks/tables.py.
"""
from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import checkpoint  # noqa: E402
import data  # noqa: E402
import evaluate  # noqa: E402
import keypoints  # noqa: E402
import ldm  # noqa: E402
import train  # noqa: E402
import vq  # noqa: E402
from benchmarks.tables import write  # noqa: E402
from engine.run import read_log  # noqa: E402
from keypoints import ConditionConfig  # noqa: E402
from metrics.pose import Drawn, assess  # noqa: E402
from train import Config  # noqa: E402

IMAGES = 256                    # held-out images that the detector judges
KEPT = ("val_psnr", "val_psnr_box", "val_codes_used", "val_perplexity",   # of the log
        "val_right", "val_shuffled", "val_ratio")
WAVES = 4                       # frequencies of a pixel's own place, pi, 2 pi, ...


# ------------------------------------------------------------------------ the ways that lost

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


class PlacedCondition(keypoints.PoseCondition):
    """Gives the UNet, beside its parent's condition, waves [B, 4 WAVES, h, w] that tell each pixel
    where it is: without them a query of the cross-attention knows its place only by what
    convolutions carry in from the border."""

    def forward(self, pose: Tensor, size: tuple[int, int],
                drop: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        context, _ = super().forward(pose, size, drop)
        freqs, waves = math.pi * 2.0 ** torch.arange(WAVES, device=pose.device), []
        for axis in (1, 0):                                                     # x, then y
            place = (torch.arange(size[axis], device=pose.device) + 0.5) / size[axis]
            angle = place * freqs[:, None]
            wave = torch.cat([angle.sin(), angle.cos()])                        # [2 WAVES, w or h]
            waves.append(wave.unsqueeze(1 if axis else 2).expand(-1, *size))
        return context, torch.cat(waves).expand(len(pose), -1, -1, -1)


# ------------------------------------------------------------------------ the groups

def codebook(ema: bool, drawn: bool = True) -> Callable[[Config], Config]:
    """`drawn`: codes are encoder outputs, after a time without quantisation."""
    def change(c: Config) -> Config:
        start = c.recipe.quantize_start if drawn else 0.0
        return replace(c, recipe=replace(c.recipe, data_init_codes=drawn, quantize_start=start),
                       vq_config=replace(c.vq_config, ema_codebook=ema))
    return change


def recipe(**fields: object) -> Callable[[Config], Config]:
    return lambda c: replace(c, recipe=replace(c.recipe, **fields))


def discriminator(c: Config) -> Config:
    """As `--disc-weight 0.75 --disc-start 0.5`."""
    return recipe(loss=replace(train.VQGAN, perceptual=0.0, detector=c.recipe.loss.detector,
                               disc_start=0.5))(c)


def loss(**fields: object) -> Callable[[Config], Config]:
    return lambda c: recipe(loss=replace(c.recipe.loss, **fields))(c)


def network(**fields: object) -> Callable[[Config], Config]:
    return lambda c: replace(c, vq_config=replace(c.vq_config, **fields))


def condition(*kinds: str, hidden: bool = True) -> Callable[[Config], Config]:
    def change(c: Config) -> Config:
        cond = replace(c.cond_config, conditioning=kinds, hidden=hidden)
        return replace(c, cond_config=cond,
                       unet_config=train.unet_for(c.vq_config, cond, c.unet_config))
    return change


def factor(preset: str) -> Callable[[Config], Config]:
    """The autoencoder of a preset at a quarter of its width and without norms."""
    config = replace(train.PRESETS[preset].vq_config, ch=32, n_embed=4096, **train.NORM_FREE)
    return lambda c: replace(c, vq_config=config)


QUANTIZER = vq.VectorQuantizer
# group: {row: (change of the Config, class that stands in for the book's)}
GROUPS: dict[str, dict[str, tuple[Callable[[Config], Config], type | None]]] = {
    "codebook": {
        "reference: U(-1/K, 1/K), gradient": (codebook(ema=False, drawn=False), None),
        "codes drawn from encoder outputs, gradient": (codebook(ema=False), NoRestarts),
        "+ dead codes drawn again": (codebook(ema=False), None),
        "**+ moving average in place of the gradient**": (codebook(ema=True), None),
        "the same, gradient by the rotation trick": (codebook(ema=True), RotationTrick),
        "SimVQ: frozen codes under a learned affine map": (codebook(ema=False), SimVQ),
    },
    "autoencoder": {
        "**the preset**": (recipe(), None),
        "L1 alone, no detector distance": (loss(detector=0.0), None),
        "no shortcut": (network(shortcut=False), None),
        "GroupNorm of 8 groups": (network(norm_groups=8), None),
        "GroupNorm, 350 steps: the time of the preset": (
            lambda c: replace(network(norm_groups=8)(c), steps=350), None),
        "3 channels, 2,048 codes": (network(z_channels=3, embed_dim=3, n_embed=2048), None),
        "8 channels, 8,192 codes": (network(z_channels=8, embed_dim=8, n_embed=8192), None),
        "a discriminator in the second half": (discriminator, None),
    },
    "diffusion": {
        "**the preset: maps, v, Muon, lambda normal**": (recipe(), None),
        "eps in place of v": (lambda c: replace(c, schedule=train.SCHEDULE), None),
        "AdamW in place of Muon": (recipe(muon=0.0), None),
        "timesteps uniform": (recipe(lambda_spread=0.0), None),
        "hidden joints like visible ones": (condition("maps", hidden=False), None),
        "tokens and maps": (condition("tokens", "maps"), None),
        "tokens": (condition("tokens"), None),
        "tokens, and each pixel is told its place": (condition("tokens"), PlacedCondition),
        "one token of 17 raw ids": (condition("seed", hidden=False), None),
    },
    "factor": {"f4": (factor("base"), None), "f8": (factor("f8"), None),
               "f16": (factor("f16"), None)},
}


@contextmanager
def standing_in(kind: type | None) -> Iterator[None]:
    """Inside the block models are made with this class, those of checkpoints too."""
    if kind is PlacedCondition:
        channels = property(lambda config: 4 * WAVES)
        with mock.patch.object(ldm, "PoseCondition", kind), \
             mock.patch.object(ConditionConfig, "map_channels", channels):
            yield
    else:
        with mock.patch.object(vq, "VectorQuantizer", kind or QUANTIZER):
            yield


# ------------------------------------------------------------------------ training and judging

def run(args: argparse.Namespace, name: str, seed: int) -> dict:
    """Trains one variant and judges it: a row of the table."""
    stage = "ldm" if args.group == "diffusion" else "vq"
    change, kind = GROUPS[args.group][name]
    out = Path(args.runs, f"{folder_name(name)}-{args.steps}-{seed}")
    if (out / "row.json").exists():
        return json.loads((out / "row.json").read_text())
    flags = ["--stage", stage, "--data", args.data, "--steps", str(args.steps),
             "--seed", str(seed), "--out", str(out)]
    flags += ["--labels", args.labels] if args.labels else []
    flags += ["--preset", "small"] if args.group == "factor" else []
    flags += ["--vq", args.vq] if stage == "ldm" else []
    with standing_in(kind):
        c = change(train.make_config(train.parse_args(flags)))
        train.run_stage(c, fresh=False, accept_data=False)
        rows = read_log(out / "log.jsonl")
        log = [row for row in rows if "eval_s" in row][-1]
        train_part, held_out = data.open_data(args.data, c.size, labels=args.labels)
        held_out = data.spread(held_out, IMAGES)
        if stage == "ldm":
            model, _ = checkpoint.load_ldm(out / "last.pt")
            drawn = evaluate.draw_held_out(model, held_out)
        else:
            model = checkpoint.build_vq(checkpoint.load_vq(out / "last.pt"), str(out))
            images, poses = map(np.stack, zip(*(held_out[i] for i in range(len(held_out))),
                                              strict=True))
            drawn = Drawn(poses.astype(np.float64), evaluate.reconstruct(model, images), images)
    found, _ = assess(evaluate.find_detector(args.data, train_part), drawn)
    row = {"seed": seed, "steps": log["step"] + 1, "ceiling": found["real"]["pck@0.1"],
           "img_s": statistics.median(row["img_s"] for row in rows if "img_s" in row)}
    row |= {key.removeprefix("val_"): log[key] for key in KEPT if key in log}
    row |= {key: found["samples"][key] for key in ("pck@0.1", "oks", "frechet")}
    (out / "row.json").write_text(json.dumps(row))
    return row


def folder_name(name: str) -> str:
    """A name of a folder."""
    return "-".join("".join(ch if ch.isalnum() else " " for ch in name).split())[:40]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("--data", default="figures")
    parser.add_argument("--labels", help="as for train.py; the detector learns them too")
    parser.add_argument("--vq", default="assets/toy.pt", help="of diffusion (default %(default)s)")
    parser.add_argument("--steps", type=int, default=500, help="(default %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--runs", required=True, help="folder for the runs")
    parser.add_argument("--out", help="a .json for benchmarks/tables.py")
    args = parser.parse_args()
    rows = {}
    for seed in args.seeds:
        for name in GROUPS[args.group]:
            rows[f"{name}, seed {seed}"] = row = run(args, name, seed)
            print(name, json.dumps(row), flush=True)
    if args.out:
        write(args.out, rows)


if __name__ == "__main__":
    main()
