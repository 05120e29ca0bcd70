"""Held-out poses drawn after more and more steps of stage 2, for the README.

    python docs/steps.py --run DIR      writes docs/images/steps.png

DIR is a run of stage 2 with the checkpoints step-*.pt that --keep-every leaves.
"""
import argparse
import json
import re
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import checkpoint  # noqa: E402
import data  # noqa: E402
import evaluate  # noqa: E402
import plots  # noqa: E402
from keypoints import draw  # noqa: E402

STEPS = 10, 100, 1000, 8000
SHOWN = (0, 2, 4)               # of five held-out images

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    args = parser.parse_args()
    c = json.loads((args.run / "config.json").read_text())
    _, val = data.open_data(c["data"], c["size"], c["val"], labels=c["labels"])
    kept = {int(re.sub(r"\D", "", path.stem)): path for path in args.run.glob("step-*.pt")}
    some = data.Part(val, data.evenly(len(val), 5)[list(SHOWN)].tolist())
    columns, names = [], []
    for step in STEPS:
        ldm, _ = checkpoint.load_ldm(str(kept[step]))
        drawn = evaluate.draw_held_out(ldm, some)
        columns.append(drawn.samples)
        names.append(f"{step:,} steps")
    skeletons = [draw(pose, c["size"]) for pose in drawn.asked]
    page = plots.save_grid(None, list(zip(skeletons, *columns, drawn.real, strict=True)),
                           columns=["pose", *names, "real image"], scale=1)
    page.quantize(256, dither=Image.Dither.NONE).save(ROOT / "docs/images/steps.png", optimize=True)
