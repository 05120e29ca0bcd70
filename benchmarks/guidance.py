"""How much guidance? PCK, OKS and Frechet distance of samples over w, with and without interval.

    python benchmarks/guidance.py --ckpt runs/ldm/last.pt --out DIR --pictures 256

Draws the same held-out poses from the same noise at each w, prints a table, writes guidance.png.
The Frechet distance is in the features of the pose reader, to the held-out images: comparable
within one table only. The results, and the default that was taken from them, stand in
benchmarks/RESULTS.md.
"""
from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import checkpoint  # noqa: E402
import data  # noqa: E402
import evaluate  # noqa: E402
import metrics.pose  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", default="runs/ldm/last.pt")
    parser.add_argument("--weights", type=float, nargs="+", default=[1, 1.5, 2, 3, 4, 5, 6])
    parser.add_argument("--interval", type=int, nargs=2, default=[200, 800],
                        help="timesteps with guidance")
    parser.add_argument("--pictures", type=int, default=256)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    ldm, payload = checkpoint.load_ldm(args.ckpt)
    c, model = payload["config"], checkpoint.hash_of(ldm.unet.state_dict())[:8]
    train_part, held_out = data.open_data(c["data"], c["size"], c["val"])
    held_out = data.spread(held_out, args.pictures)
    reader = evaluate.find_detector(c["data"], train_part)
    rows: dict[str, dict] = {}
    for w in args.weights:
        for interval in (None, tuple(args.interval)) if w != 1 else (None,):
            name = f"w {w:g}" + (f", t {interval[0]} to {interval[1]}" if interval else "")
            which = "-".join(map(str, interval or ["all"]))
            kept = out / f"{model}-{w:g}-{which}-{args.pictures}-{args.steps}.json"
            if not kept.exists():
                drawn = evaluate.draw_held_out(ldm, held_out, interval=interval, sampler="ddim",
                                               steps=args.steps, guidance=w)
                found, _ = metrics.pose.assess(reader, drawn)
                more = {"w": w, "interval": interval, "ceiling": found["real"]["pck@0.1"]}
                kept.write_text(json.dumps(found["samples"] | more))
            rows[name] = json.loads(kept.read_text())
            print(name, {key: round(rows[name][key], 3) for key in evaluate.FIDELITY}, flush=True)
    print(f"{evaluate.table(rows, evaluate.FIDELITY)}\n"
          f"ceiling: PCK@0.1 {rows[name]['ceiling']:.3f}")
    plot(list(rows.values()), out / "guidance.png")


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, 3, figsize=(13, 3.8), constrained_layout=True)
    for ax, key in zip(axes, ("pck@0.1", "oks", "frechet"), strict=True):
        for label, inside in (("at every step", False), ("in an interval", True)):
            points = [(row["w"], row[key]) for row in rows
                      if row["w"] == 1 or bool(row["interval"]) == inside]
            ax.plot(*zip(*points, strict=True), marker="o", label=f"guidance {label}")
        name, unit, _ = evaluate.FIDELITY[key]
        ax.set(title=f"{name} ({unit})", xlabel="guidance w")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    fig.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
