"""How many images of a new character are enough? Fine-tuning a model of others, and from nothing.

    python benchmarks/few_images.py --data COCO.json --by character --new Mage --out DIR

COCO.json lies in a folder beside images/ and a metadata.csv with the columns `--by` and animation.
Every fourth animation is held out of everything. Trains the toy preset on the images without the
new character (the base). Then, for 20, 60 and 200 of hers, in up to 10 minutes: stage 2 from the
base on her images alone; both stages from the base; stage 2 at a fifth of the learning rate; stage
2 from the base on her images among all others; and both stages from nothing in up to 8 times as
long. Each run ends once the held-out loss rises, and its best model counts. Lengths are in steps,
at the speed of two quiet cores (RESULTS.md). Draws the held-out poses of the new character. A
detector taught on all characters judges: PCK@0.1, Frechet distance, label accuracy. `evaluate.py
overfit` counts copies. Writes DIR/few_images.json and a picture of some runs, few_images.png.
Rerun the same command to resume.
"""
from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import tables  # noqa: E402

import checkpoint  # noqa: E402
import data  # noqa: E402
import evaluate  # noqa: E402
import plots  # noqa: E402
from metrics.overfit import best_step, evaluations, streaks  # noqa: E402
from metrics.pose import assess  # noqa: E402

FEW, SIZE = (20, 60, 200), 64
BASE = 3000, 2500                       # steps of both stages
TUNED = 1300, 25                        # steps of stage 2: 10 minutes; between evaluations
FROM_NOTHING = 4000, 8700               # steps of both stages: 12 and 68 minutes
SLOW = 1e-4                             # learning rate; the preset has 5e-4
TUNED_VQ = 500, 2e-4                    # steps of stage 1, a minute, and learning rate (1e-3)
SHOWN = (("base", 20), ("base-both", 20), ("base-both", 60), ("base-both", 200), ("nothing", 20),
         ("nothing", 200))              # in the picture
COLUMNS = 8


def run(script: str, *flags: object) -> None:
    subprocess.run([sys.executable, str(ROOT / script), *map(str, flags)], check=True)


def subset(coco: Path, keep: list[dict], out: Path) -> Path:
    """A dataset of the rows `keep` of metadata.csv, with their images and poses."""
    if out.exists():
        return out
    (out / "images").mkdir(parents=True)
    names = {Path(row["file"]).name for row in keep}
    doc = json.loads(coco.read_text())
    doc["images"] = [i for i in doc["images"] if Path(i["file_name"]).name in names]
    ids = {i["id"] for i in doc["images"]}
    doc["annotations"] = [a for a in doc["annotations"] if a["image_id"] in ids]
    for name in names:
        shutil.copy(coco.parent.parent / "images" / name, out / "images")
    (out / "poses.json").write_text(json.dumps(doc))
    with open(out / "metadata.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, keep[0].keys())
        writer.writeheader()
        writer.writerows(keep)
    return out


def measure(folder: Path, val: Path, judge: Path, args: argparse.Namespace) -> dict:
    """Samples of best.pt, judged; and what the log of the run says."""
    payload = checkpoint.load(folder / "best.pt", "ldm")
    ldm = checkpoint.build_ldm(payload, str(folder))
    names = checkpoint.label_names(payload, str(folder))
    train, _ = data.open_data(str(judge / "poses.json"), SIZE, str(val / "poses.json"),
                              labels=args.by)
    detector = evaluate.find_detector(str(judge / "poses.json"), train)
    _, held_out = data.open_data(str(val / "poses.json"), SIZE, str(val / "poses.json"),
                                 labels=args.by, label_names=names)
    drawn = evaluate.draw_held_out(ldm, held_out, args.seed)
    drawn.labels[:] = list(train.label_names).index(args.new)
    rows, _ = assess(detector, drawn, decoded=evaluate.reconstruct(ldm.vq, drawn.real))
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    overfit = json.loads((folder / "overfit.json").read_text())
    return {"rows": rows, "best": best_step(log), "steps": evaluations(log)[-1]["step"] + 1,
            "risen": first_rise(log), "copies": overfit["numbers"]["copies"]}


def recorded(told: Path) -> dict:
    """The rows so far, of other seeds too."""
    return json.loads(told.read_text()) if told.exists() else {}


def first_rise(log: list[dict]) -> int | None:
    """The step at which the held-out loss has surely risen, in any bin of timesteps."""
    found = evaluations(log)
    return next((row["step"] + 1 for i, row in enumerate(found) if streaks(found[:i + 1])), None)


def picture(args: argparse.Namespace) -> None:
    """Some held-out poses as the best model of each run draws them, beside the real images."""
    rows, labels = [], []
    for start, n in SHOWN:
        folder = args.out / f"{start}-{n}-seed{args.seed}"
        payload = checkpoint.load(folder / "best.pt", "ldm")
        ldm = checkpoint.build_ldm(payload, str(folder))
        held_out = str(args.out / "new-val/poses.json")
        _, val = data.open_data(held_out, SIZE, held_out, labels=args.by,
                                label_names=checkpoint.label_names(payload, str(folder)))
        drawn = evaluate.draw_held_out(ldm, data.spread(val, COLUMNS), args.seed)
        rows.append(list(drawn.samples))
        labels.append(f"{tables.STARTS[start]}, {n} images")
    plots.save_grid(args.out / "few_images.png", [list(drawn.real), *rows],
                    labels=["real image", *labels], scale=1)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="COCO json beside images/")
    parser.add_argument("--by", required=True, help="column of the labels")
    parser.add_argument("--new", required=True, help="the label that the base never sees")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0, help="(default 0)")
    args = parser.parse_args(argv)
    with open(args.data.parent.parent / "metadata.csv", newline="") as f:
        known = {Path(i["file_name"]).name for i in json.loads(args.data.read_text())["images"]}
        rows = [row for row in csv.DictReader(f) if Path(row["file"]).name in known]
    held = set(sorted({row["animation"] for row in rows})[::4])
    seen = [row for row in rows if row["animation"] not in held]
    new = [row for row in seen if row[args.by] == args.new]
    others = [row for row in rows if row[args.by] != args.new]

    def place(name: str, keep: list[dict]) -> Path:
        return subset(args.data, keep, args.out / name)

    judge = place("judge", seen)
    val = place("new-val", [row for row in rows if row not in seen and row[args.by] == args.new])
    base = place("base", [row for row in others if row["animation"] not in held])
    base_val = place("base-val", [row for row in others if row["animation"] in held])

    def train(stage: str, images: Path, val: Path, out: Path, *flags: object) -> None:
        if not (out / "done").exists():
            run("train.py", "--stage", stage, "--data", images / "poses.json", "--val",
                val / "poses.json", "--labels", args.by, "--out", out, "--seed", args.seed, *flags)
            (out / "done").touch()

    base_vq, base_ldm = args.out / "base-vq", args.out / "base-ldm"
    train("vq", base, base_val, base_vq, "--steps", BASE[0])
    train("ldm", base, base_val, base_ldm, "--vq", base_vq / "last.pt", "--steps",
          BASE[1])
    told = args.out / "few_images.json"
    for start in ("base", "base-both", "nothing", "base-slow", "base-among"):
        for n in FEW:
            at = np.linspace(0, len(new) - 1, n).round().astype(int)
            few = [new[i] for i in at]
            images, out = place(f"new-{n}", few), args.out / f"{start}-{n}-seed{args.seed}"
            vq = base_vq
            if start == "base-both":
                vq = args.out / f"both-vq-{n}-seed{args.seed}"
                train("vq", images, val, vq, "--init", base_vq / "last.pt", "--steps", TUNED_VQ[0],
                      "--lr", TUNED_VQ[1])
            if start == "nothing":
                vq = args.out / f"vq-{n}-seed{args.seed}"
                train("vq", images, val, vq, "--steps", FROM_NOTHING[0])
                train("ldm", images, val, out, "--vq", vq / "last.pt", "--steps",
                      FROM_NOTHING[1], "--patience", 3)
            else:
                if start == "base-among":
                    images = place(f"among-{n}", [row for row in seen if row[args.by] != args.new
                                                  or row in few])
                train("ldm", images, val, out, "--init", base_ldm / "best.pt", "--vq",
                      vq / "last.pt", "--steps", TUNED[0], "--eval-every", TUNED[1],
                      "--patience", 3, *(("--lr", SLOW) if start == "base-slow" else ()))
            if not (out / "overfit.json").exists():
                run("evaluate.py", "overfit", "--run", out)
            if out.name in recorded(told):
                continue
            found = measure(out, val, judge, args)
            report = recorded(told)
            report[out.name] = found                # beside the rows of other runs and seeds
            drawn, real = found["rows"]["samples"], found["rows"]["real"]
            print(f"{out.name}: PCK@0.1 {drawn['pck@0.1']:.3f} of {real['pck@0.1']:.3f}, "
                  f"Frechet {drawn['frechet']:.3f}, label {drawn['label']:.3f}; best step "
                  f"{found['best']} of {found['steps']}, risen {found['risen']}, copies "
                  f"{found['copies']}", flush=True)
            told.write_text(json.dumps(report, indent=1))
    picture(args)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
