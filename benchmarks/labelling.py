"""How many images must be labelled by hand? Labels are hidden and given back as a person would.

    python benchmarks/labelling.py --data DIR --out DIR [--seed S]        a dataset with keypoints
    python benchmarks/labelling.py --data figures:1000 --out DIR
    python benchmarks/labelling.py --data DIR --drawings DIR --out DIR    also reads other drawings

Copies the images into OUT, without labels, and starts the server of `python -m studio` on it. The
first 20 labels are those the page asks for first, spread over the folder; then rounds: the
detector learns, proposes, and the images that the page then shows first, the least certain, get
their labels. After each round: PCK@0.1 of the proposals that are left, over all labelled joints;
the share of images in which every joint is right, so that Enter accepts them; the mean number of
joints to drag in the others; seconds and CPU seconds of learning, then of proposing.

The seed says with which image the folder begins, so which ones are asked for, and of the figures
which ones they are. Adds rows to benchmarks/results/labelling.json. `--labels 20 50`, and then
`--labels 100 200` with the same OUT, measures in two parts.
"""
from __future__ import annotations

import argparse
import json
import re
import sys
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import checkpoint  # noqa: E402
import data  # noqa: E402
from dataset.images import upright_size  # noqa: E402
from keypoints import JOINTS  # noqa: E402
from metrics.keypoint_detector import KeypointDetector  # noqa: E402
from metrics.pose import within  # noqa: E402
from studio import propose  # noqa: E402
from studio.label import Label  # noqa: E402
from studio.server import Studio  # noqa: E402

RESULTS = ROOT / "benchmarks/results/labelling.json"
ROUNDS = 20, 50, 100, 200
HANDS = {"wrist": "hand", "ankle": "foot"}              # what Animated Drawings calls them


def right(found: np.ndarray, poses: np.ndarray,
          aspect: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """bool [N, 17]: joints within a tenth of the person's diagonal, and which joints there are.
    `aspect` [N, 2] are the sides of the images."""
    there, sides = poses[..., 2] > 0, np.insert(aspect, 2, 1, axis=1)[:, None]
    return within(found * sides, poses * sides) & there, there


def rounded(value: float) -> float:
    return round(float(value), 3)


def read_drawings(folder: Path) -> list[tuple[str, np.ndarray]]:
    """(image, pose [17, 3]) of each drawing of a human in Animated Drawings' char_cfg.yaml."""
    found = []
    for config in sorted(folder.glob("*/char_cfg.yaml")):
        image, pose = config.parent / "texture.png", np.zeros((len(JOINTS), 3))
        places = {name: (float(x), float(y)) for x, y, name in re.findall(
            r"loc:\s*- (\S+)\s*- (\S+)\s*name: (\S+)", config.read_text())}
        for j, joint in enumerate(JOINTS):
            part, _, side = joint.partition("_")
            name = f"{side}_{HANDS.get(part, part)}"
            if name in places:
                pose[j] = *(places[name] / np.array(upright_size(image))), 1
        if (pose[5:, 2] > 0).all():
            found.append((str(image), pose))
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="as for train.py")
    parser.add_argument("--labels", type=int, nargs="+", default=ROUNDS, help="after each round")
    parser.add_argument("--drawings", type=Path, help="Animated Drawings, to read as well")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    ds, mine = data.open_all(args.data, 128, seed=args.seed), args.out
    first, poses, sizes = np.random.default_rng(args.seed).integers(len(ds)), [], []
    mine.mkdir(parents=True, exist_ok=True)
    for k, i in enumerate(np.roll(np.arange(len(ds)), first)):
        image, pose = ds.source(i)
        image = image if isinstance(image, Image.Image) else Image.fromarray(image)
        if not (file := mine / f"{k:05d}.png").exists():
            image.save(file)
        poses.append(pose)
        sizes.append(image.size)
    poses, sizes = np.stack(poses), np.array(sizes, float)
    label = Label(mine)
    label.place.mkdir(exist_ok=True)
    server = Studio(label.calls())
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def ask(path: str, body: dict | None = None) -> dict:
        request = urllib.request.Request(f"{server.url}api/{path}", body and json.dumps(
            body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def by_rank() -> list[int]:
        """The images that are not done, in the page's order."""
        found = [(rank, i) for i, (_, state, _, rank) in enumerate(ask("images")["images"])
                 if state != "done"]
        return [i for _, i in sorted(found)]

    todo = by_rank()
    for wanted in args.labels:
        for i in todo[:wanted - (len(ds) - len(todo))]:
            ask(f"pose/{i}", {"pose": poses[i].tolist(), "state": "done",
                              "version": ask(f"pose/{i}")["version"]})
        todo = by_rank()
        clock = [(time.monotonic(), time.process_time())]
        ask("propose", {"stop": False})
        while (now := ask("progress"))["training"]:
            if now["text"].startswith("proposing") and len(clock) == 1:
                clock.append((time.monotonic(), time.process_time()))
            time.sleep(0.5)
        clock.append((time.monotonic(), time.process_time()))
        told = [ask(f"pose/{i}") for i in todo]
        ok, there = right(np.array([one["pose"] for one in told]), poses[todo], sizes[todo])
        wrong = (there & ~ok).sum(1)
        row = {"labels": wanted, "pck": rounded(ok[there].mean()),
               "accepted": rounded((wrong == 0).mean()),
               "drags": rounded(wrong[wrong > 0].mean()) if wrong.any() else 0.0,
               "learning": [rounded(b - a) for a, b in zip(*clock[:2], strict=True)],
               "proposing": [rounded(b - a) for a, b in zip(*clock[1:], strict=True)]}
        if args.drawings:
            detector = KeypointDetector(propose.SIDE, num_classes=3 * len(JOINTS))
            detector.load_state_dict(checkpoint.read(label.place / "detector.pt")["detector"])
            seen = [(*propose.read_square(image), pose)
                    for image, pose in read_drawings(args.drawings)]
            found, _ = propose.propose(detector, np.stack([image for image, _, _ in seen]))
            ok, there = right(np.stack([propose.from_square(pose, size) for pose, (_, size, _)
                                        in zip(found, seen, strict=True)]),
                              np.stack([pose for _, _, pose in seen]),
                              np.array([size for _, size, _ in seen], float))
            row["drawings"] = rounded(ok[there].mean())
        print(json.dumps(row), flush=True)
        results = json.loads(RESULTS.read_text())       # again: another seed may have written
        run = results.setdefault(f"{Path(args.data).name} seed {args.seed}", {
            "images": len(ds), "threads": torch.get_num_threads(), "rows": []})
        run["rows"] = [*(old for old in run["rows"] if old["labels"] != wanted), row]
        RESULTS.write_text(json.dumps(results, indent=1))
        todo = by_rank()


if __name__ == "__main__":
    main()
