"""What does --typical buy? PCK of samples and the distance to the training poses, over the pull.

    python benchmarks/typical.py --ckpt runs/ldm/last.pt --images 128 --out typical.json

Held-out poses as they are, and with every joint moved by Gaussian noise (--noise, in image sides),
are pulled by 0 to 1. "asked" is PCK@0.1 of samples to the pulled pose that the model was given,
"wanted" that to the pose before the pull.
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import checkpoint  # noqa: E402
import data  # noqa: E402
import evaluate  # noqa: E402
import sample  # noqa: E402
from benchmarks.tables import write  # noqa: E402
from extras.density import PoseDensity  # noqa: E402
from metrics.pose import fidelity, read_all  # noqa: E402

COLUMNS = {"distance": ("distance", "body sizes", ".3f"), "unusual": ("further out", "than", ".1%"),
           "asked": ("PCK@0.1", "asked", ".3f"), "wanted": ("PCK@0.1", "wanted", ".3f"),
           "oks": ("OKS", "asked", ".3f")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", default="runs/ldm/last.pt")
    parser.add_argument("--amounts", type=float, nargs="+", default=[0, 0.25, 0.5, 0.75, 1])
    parser.add_argument("--noise", type=float, default=0.05)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--out", help="a .json for benchmarks/tables.py")
    args = parser.parse_args()
    ldm, payload = checkpoint.load_ldm(args.ckpt)
    c = payload["config"]
    train_part, held_out = data.open_data(c["data"], c["size"], c["val"])
    reader = evaluate.find_detector(c["data"], train_part)
    density = PoseDensity(checkpoint.training_poses(payload, args.ckpt))
    poses = torch.cat([
        pose for _, pose, _ in data.in_order(data.spread(held_out, args.images), 64)])
    poses = poses.double().numpy()
    noise = np.random.default_rng(0).normal(0, args.noise, poses.shape) * (poses[..., 2:] > 0)
    rows = {}
    for kind, given in (("held out", poses), (f"noise {args.noise:g}", poses + [1, 1, 0] * noise)):
        for amount in args.amounts:
            asked = density.typical(given, amount)
            images = sample.draw_images(
                ldm, torch.from_numpy(asked), list(range(len(asked))), c["size"],
                **sample.settings(ldm))
            read, _ = read_all(reader, np.stack(images))
            found = fidelity(read, asked)
            rows[f"{kind}, typical {amount:g}"] = {
                "distance": float(density.distance(asked).mean()),
                "unusual": float(density.unusual(asked).mean()), "asked": found["pck@0.1"],
                "wanted": fidelity(read, given)["pck@0.1"], "oks": found["oks"]}
    print(evaluate.table(rows, COLUMNS))
    if args.out:
        write(args.out, rows)


if __name__ == "__main__":
    main()
