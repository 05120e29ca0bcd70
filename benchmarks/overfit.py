"""Does the verdict of `evaluate.py overfit` hold where the answer is known? Planted runs.

    python benchmarks/overfit.py few early shuffled --vq assets/toy.pt --runs DIR --out FILE.json

Each case trains the toy preset in DIR/CASE, which a second call resumes; then the verdict stands
beside the one that was planted. The exit status is 1 where they differ.
"""
from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import data  # noqa: E402
import evaluate  # noqa: E402
import plots  # noqa: E402
import train  # noqa: E402
from benchmarks.tables import write  # noqa: E402
from keypoints import JOINTS  # noqa: E402
from metrics.condition import derangement  # noqa: E402

# what it is, figures, steps, what the verdict must say
CASES = {
    "few": ("60 figures", 60, 1000, {"verdict": "memorising"}),
    "early": ("2,000 figures, stopped early", 2000, 100, {"verdict": "underfit"}),
    "shuffled": ("2,000 figures with poses of other images", 2000, 300, {"pose": "ignored"}),
}


def save_folder(folder: Path, ds: data.ImageDataset, pose_of: list[int]) -> str:
    """A folder of the images of ds, image i with the pose of image pose_of[i]."""
    poses = folder / "keypoints"
    if not (poses / f"{len(pose_of) - 1}.json").exists():
        poses.mkdir(parents=True, exist_ok=True)
        for i, j in enumerate(pose_of):
            plots.save_image(folder / "images" / f"{i}.png", ds.source(i)[0])
            joints = (512 * ds.source(j)[1][:, 1::-1]).tolist()         # [row, column] of 512
            (poses / f"{i}.json").write_text(json.dumps(dict(zip(JOINTS, joints, strict=True))))
    return str(folder)


def planted(case: str, args: argparse.Namespace) -> dict:
    """Trains a case; returns what was planted and what was found."""
    what, figures, steps, wanted = CASES[case]
    run, spec = Path(args.runs, case), f"figures:{figures}"
    images = ["--data", spec]
    if case == "shuffled":
        ours, held_out = data.open_data(spec, train.PRESETS["toy"].size)
        order = derangement(figures, 0).tolist()
        images = ["--data", save_folder(run / "shuffled", ours, order),
                  "--val", save_folder(run / "held-out", held_out, list(range(len(held_out))))]
    if (train.main(["--stage", "ldm", "--vq", args.vq, *images, "--steps", str(steps), "--out",
                    str(run)]) or evaluate.main(["overfit", "--run", str(run)])):
        raise SystemExit(1)
    found = json.loads((run / "overfit.json").read_text())
    numbers = found["numbers"]
    return {"what": what, "steps": steps, "wanted": wanted,
            "found": {key: found[key] for key in ("verdict", "pose", "since", "best")},
            "loss": numbers["loss"], "training": numbers["training"], "ratio": numbers["ratio"],
            "copies": sum(c["copies"] for c in numbers["copies"].values()),
            "samples": sum(c["of"] for c in numbers["copies"].values())}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", choices=CASES, nargs="+")
    parser.add_argument("--vq", default="assets/toy.pt", help="(default %(default)s)")
    parser.add_argument("--runs", required=True, help="folder for the runs")
    parser.add_argument("--out", help="a .json for benchmarks/tables.py")
    args = parser.parse_args()
    rows = {case: planted(case, args) for case in args.cases}
    for case, row in rows.items():
        print(case, row)
    if args.out:
        write(args.out, rows)
    return int(any(row["found"][key] != value for row in rows.values()
                   for key, value in row["wanted"].items()))


if __name__ == "__main__":
    sys.exit(main())
