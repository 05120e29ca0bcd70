"""How good is a run after how many minutes? Every step-*.pt of a run folder, measured.

    python benchmarks/progress.py --run runs/ldm --vq-run runs/vq --out FILE.json

Each checkpoint of `train.py --keep-every` draws the same held-out poses. The minutes are those of
training and evaluating in the logs of both stages.
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
from benchmarks.tables import write  # noqa: E402
from engine.run import read_log  # noqa: E402
from metrics.pose import assess  # noqa: E402


def minutes(run: Path, last: int) -> float:
    """Of a run until step `last`: the speed in its log stands for the steps since the line before.
    """
    batch = json.loads((run / "config.json").read_text())["recipe"]["batch_size"]
    seconds, before = 0.0, 0
    for row in read_log(run / "log.jsonl"):
        if row["step"] < last:
            if "img_s" in row:
                seconds += (row["step"] - before) * batch / row["img_s"]
                before = row["step"]
            seconds += row.get("eval_s", 0.0)
    return seconds / 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="run folder of stage 2")
    parser.add_argument("--vq-run", type=Path, required=True, help="run folder of its stage 1")
    parser.add_argument("--data", help="where the images of the run are now (default: as trained)")
    parser.add_argument("--images", type=int, default=256, help="(default %(default)s)")
    parser.add_argument("--out", required=True, help="a .json for benchmarks/tables.py")
    args = parser.parse_args()
    c = json.loads((args.run / "config.json").read_text())
    spec = args.data or c["data"]
    train, held_out = data.open_data(spec, c["size"], labels=evaluate.labels_flag(c))
    held_out = data.spread(held_out, args.images)
    detector = evaluate.find_detector(spec, train)
    stage_1, rows = minutes(args.vq_run, sys.maxsize), {}
    for path in sorted(args.run.glob("step-*.pt")):
        step = int(path.stem.removeprefix("step-"))
        found, _ = assess(detector, evaluate.draw_held_out(checkpoint.load_ldm(path)[0], held_out))
        rows[str(step)] = row = {
            "minutes": stage_1 + minutes(args.run, step), "ceiling": found["real"]["pck@0.1"],
            **{key: found["samples"][key] for key in evaluate.FIDELITY if key in found["samples"]}}
        print(step, row, flush=True)
    write(args.out, rows)


if __name__ == "__main__":
    main()
