"""How many minutes until the toy preset draws well? Both stages from nothing, on this machine.

    python benchmarks/speedrun.py --out DIR                             the preset's own steps
    python benchmarks/speedrun.py --out DIR --vq-steps 2500 --ldm-steps 6000 --data figures:20000

Trains stage 1, then stage 2 with a model kept at EVALUATIONS points of the run, and measures each
of them as `evaluate.py pose` does. Prints, and writes to DIR/speedrun.json, the minutes of training
until PCK@0.1 reaches 0.80 and 0.90 of the ceiling (the detector on real images) and the Frechet
distance 0.42. Minutes include stage 1 and the evaluations within training, not these measurements.
The table of records is in benchmarks/RESULTS.md.
"""
from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import train  # noqa: E402

EVALUATIONS = 6
SHARES, FRECHET = (0.8, 0.9), 0.42


def run(script: str, *flags: object) -> None:
    subprocess.run([sys.executable, str(ROOT / script), *map(str, flags)], check=True)


def measure(model: Path, out: Path, images: int) -> dict[str, float]:
    """PCK@0.1 of samples, as a share of that of real images too, and their Frechet distance."""
    run("evaluate.py", "pose", "--ckpt", model, "--limit", images, "--out", out)
    rows = json.loads((out / "pose.json").read_text())["rows"]
    drawn, decoded, real = (rows[name] for name in ("samples", "decoded", "real"))
    return {"pck": drawn["pck@0.1"], "share": drawn["pck@0.1"] / real["pck@0.1"],
            "frechet": drawn["frechet"], "decoded": decoded["pck@0.1"],
            "decoded_frechet": decoded["frechet"]}


def first_minutes(points: list[dict], reached: Callable[[dict], bool]) -> float | None:
    """Minutes until the first of the points that has `reached` a mark."""
    return next((point["minutes"] for point in points if reached(point)), None)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder that is not there yet")
    parser.add_argument("--data", default="figures", help="as for train.py (default %(default)s)")
    parser.add_argument("--vq-steps", type=int, help="of stage 1 (default: the preset's)")
    parser.add_argument("--ldm-steps", type=int, help="of stage 2 (default: the preset's)")
    parser.add_argument("--images", type=int, default=256, help="measured (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default %(default)s)")
    args = parser.parse_args(argv)
    if args.out.exists():
        parser.error(f"--out {args.out} exists; give another folder")
    vq, ldm = args.out / "vq", args.out / "ldm"
    began = time.time()
    common = "--data", args.data, "--seed", args.seed
    run("train.py", "--stage", "vq", *common, "--out", vq,
        *(("--steps", args.vq_steps) if args.vq_steps else ()))
    stage_1 = time.time() - began
    steps = args.ldm_steps or train.PRESETS["toy"].ldm.steps
    run("train.py", "--stage", "ldm", *common, "--vq", vq / "last.pt", "--out", ldm,
        "--steps", steps, "--keep-every", max(1, steps // EVALUATIONS))
    points = []
    for model in sorted(ldm.glob("step-*.pt")):
        minutes = (model.stat().st_mtime - began) / 60
        step = int(model.stem.removeprefix("step-"))
        points.append({"step": step, "minutes": minutes,
                       **measure(model, args.out / model.stem, args.images)})
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, text=True,
                            capture_output=True).stdout.strip()
    report = {"commit": commit, "torch": torch.__version__, "processor": platform.processor(),
              "threads": torch.get_num_threads(), "stage_1_minutes": stage_1 / 60, "points": points,
              **{f"minutes_to_{share:g}": first_minutes(points, lambda p, s=share: p["share"] >= s)
                 for share in SHARES},
              "minutes_to_frechet": first_minutes(points, lambda p: p["frechet"] <= FRECHET)}
    (args.out / "speedrun.json").write_text(json.dumps(report, indent=1))
    print(f"\nstage 1 took {stage_1 / 60:.1f} minutes; minutes count from its beginning\n")
    print("   step  minutes  PCK@0.1  of the ceiling  Frechet")
    for p in points:
        print(f"{p['step']:7d}  {p['minutes']:7.1f}  {p['pck']:7.3f}  {p['share']:14.2f}  "
              f"{p['frechet']:7.3f}")
    for name in ("minutes_to_0.8", "minutes_to_0.9", "minutes_to_frechet"):
        value = report[name]
        print(f"{name.replace('_', ' ')}: {'not reached' if value is None else f'{value:.1f}'}")


if __name__ == "__main__":
    main()
