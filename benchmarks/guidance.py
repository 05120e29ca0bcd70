"""How much guidance? PCK, OKS and Frechet distance of samples over w.

    python benchmarks/guidance.py --ckpt runs/ldm/last.pt --images 256 --out guidance.json

Draws the same held-out poses from the same noise at each w and prints a table. The Frechet distance
is in the features of the keypoint detector, to the held-out images: comparable within one table.
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import checkpoint  # noqa: E402
import data  # noqa: E402
import evaluate  # noqa: E402
import metrics.pose  # noqa: E402
from benchmarks.tables import write  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", default="runs/ldm/last.pt")
    parser.add_argument("--weights", type=float, nargs="+", default=[1, 1.5, 2, 3, 4, 5, 6])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--out", help="a .json for benchmarks/tables.py")
    args = parser.parse_args()
    ldm, payload = checkpoint.load_ldm(args.ckpt)
    c = payload["config"]
    train_part, held_out = data.open_data(c["data"], c["size"], c["val"])
    held_out = data.spread(held_out, args.images)
    reader = evaluate.find_detector(c["data"], train_part)
    rows: dict[str, dict] = {}
    for w in args.weights:
        drawn = evaluate.draw_held_out(ldm, held_out, guidance=w)
        found, _ = metrics.pose.assess(reader, drawn)
        rows[f"{w:g}"] = row = found["samples"]
        print(f"w {w:g}", {key: round(row[key], 3) for key in row if key in evaluate.FIDELITY},
              flush=True)
    print(f"{evaluate.table(rows, evaluate.FIDELITY)}\n"
          f"ceiling: PCK@0.1 {found['real']['pck@0.1']:.3f}")
    if args.out:
        write(args.out, rows | {"real images": found["real"]})


if __name__ == "__main__":
    main()
