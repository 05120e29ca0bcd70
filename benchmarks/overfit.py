"""Does the verdict of `evaluate.py overfit` hold where the answer is known? Three planted runs.

    python benchmarks/overfit.py few --vq assets/toy.pt --out DIR       200 figures: "memorising"
    python benchmarks/overfit.py many --vq assets/toy.pt --out DIR      20,000 figures: "good"
    python benchmarks/overfit.py shuffled --vq assets/toy.pt --out DIR  poses permuted: "ignored"

Each trains the toy UNet in DIR/CASE, which a second call resumes, and then prints the verdict
beside the one that was planted; its exit status is 1 where they differ.
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
from keypoints import JOINTS  # noqa: E402
from metrics.condition import derangement  # noqa: E402

# figures, steps, batch size, learning rate, what the verdict must say
CASES = {
    "few": (200, 20_000, 8, 1.5e-3, {"verdict": "memorising"}),
    "many": (20_000, 6000, 32, 4e-4, {"verdict": "good", "pose": "followed"}),
    "shuffled": (2_000, 600, 16, 8e-4, {"pose": "ignored"}),
}
KEPT = 8                        # checkpoints for the film strip


def write(folder: Path, ds: data.ImageDataset, pose_of: list[int]) -> str:
    """A folder of the images of ds, image i with the pose of image pose_of[i]."""
    poses = folder / "keypoints"
    if not (poses / f"{len(pose_of) - 1}.json").exists():
        poses.mkdir(parents=True, exist_ok=True)
        for i, j in enumerate(pose_of):
            plots.save_image(folder / "images" / f"{i}.png", ds.source(i)[0])
            joints = (512 * ds.source(j)[1][:, 1::-1]).tolist()         # [row, column] of 512
            (poses / f"{i}.json").write_text(json.dumps(dict(zip(JOINTS, joints, strict=True))))
    return str(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--vq", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--figures", type=int, help="other than the case's own number of them")
    parser.add_argument("--steps", type=int, help="likewise")
    args = parser.parse_args()
    figures, steps, batch, lr, wanted = CASES[args.case]
    figures, steps = args.figures or figures, args.steps or steps
    run, spec = Path(args.out, args.case), f"figures:{figures}"
    pictures = ["--data", spec]
    if args.case == "shuffled":
        ours, held_out = data.open_data(spec, train.PRESETS["toy"].size)
        pictures = ["--data", write(run / "shuffled", ours, derangement(figures, 0).tolist()),
                    "--val", write(run / "held-out", held_out, list(range(len(held_out))))]
    code = train.main(["--stage", "ldm", "--vq", args.vq, *pictures, "--steps", str(steps),
                       "--batch-size", str(batch), "--lr", str(lr),
                       "--keep-every", str(max(1, steps // KEPT)), "--out", str(run)])
    code = code or evaluate.main(["overfit", "--run", str(run)])
    if code:
        return code
    found = json.loads((run / "overfit.json").read_text())
    for key, value in wanted.items():
        print(f"{key}: planted {value}, found {found[key]}")
    return int(any(found[key] != value for key, value in wanted.items()))


if __name__ == "__main__":
    sys.exit(main())
