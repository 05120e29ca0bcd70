"""Does the verdict of `evaluate.py overfit` hold where the answer is known? Three planted runs of the toy UNet.

    python benchmarks/overfit.py few --vq assets/toy.pt --out DIR           200 figures, 800 epochs: "memorising"
    python benchmarks/overfit.py many --vq assets/toy.pt --out DIR          20,000 figures, ten epochs: "good"
    python benchmarks/overfit.py shuffled --vq assets/toy.pt --out DIR      poses permuted in training: "ignored"

Each trains in DIR/CASE, which a second call resumes, and then prints the verdict beside the one that was planted; its
exit status is 1 where they differ.
"""
from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import data  # noqa: E402
import evaluate  # noqa: E402
import metrics.condition  # noqa: E402
import train  # noqa: E402

# figures, steps, batch size, learning rate, what the verdict must say
CASES = {
    "few": (200, 20_000, 8, 1.5e-3, {"verdict": "memorising"}),
    "many": (20_000, 6000, 32, 4e-4, {"verdict": "good", "pose": "heeded"}),
    "shuffled": (2_000, 600, 16, 8e-4, {"pose": "ignored"}),
}
KEPT = 8                        # checkpoints for the film strip


class Shuffled(data.Part):
    """ds with the poses of other pictures: there is nothing to learn from them."""

    def __init__(self, ds: data.Pictures):
        super().__init__(ds, range(len(ds)))
        self.wrong = metrics.condition.derangement(len(ds), 0)

    def source(self, i: int):
        return self.ds.source(i)[0], self.ds.source(int(self.wrong[i]))[1]

    def fingerprint(self) -> str:
        return f"shuffled-{self.ds.fingerprint()}"


def shuffle_training_poses() -> None:
    """From now on, in this process, whoever opens a dataset gets it with shuffled training poses."""
    honest = data.open_data

    def open_data(*args, **how):
        ours, held_out = honest(*args, **how)
        return Shuffled(ours), held_out
    data.open_data = open_data


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--vq", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--figures", type=int, help="other than the case's own number of them")
    parser.add_argument("--steps", type=int, help="likewise")
    args = parser.parse_args()
    figures, steps, batch, lr, wanted = CASES[args.case]
    figures, steps, run = args.figures or figures, args.steps or steps, str(Path(args.out, args.case))
    if args.case == "shuffled":
        shuffle_training_poses()
    code = train.main(["--stage", "ldm", "--vq", args.vq, "--data", f"figures:{figures}", "--steps", str(steps),
                       "--batch-size", str(batch), "--lr", str(lr), "--keep-every", str(steps // KEPT), "--out", run])
    code = code or evaluate.main(["overfit", "--run", run])
    if code:
        return code
    found = json.loads(Path(run, "overfit.json").read_text())
    for key, value in wanted.items():
        print(f"{key}: planted {value}, found {found[key]}")
    return int(any(found[key] != value for key, value in wanted.items()))


if __name__ == "__main__":
    sys.exit(main())
