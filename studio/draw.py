"""Sampling for the page: a pose in, steps and images out, and where poses come from."""
from __future__ import annotations

import base64
import io
import json
import shlex
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

import checkpoint
import keypoints
import plots
import sample
from extras.density import PoseDensity
from formats import pose_files
from ldm import LDM
from studio.label import checked
from studio.server import Call, Refused

EXAMPLES = Path(__file__).parent.parent / "examples/poses"
COMMON = 8                      # typical training poses that the page offers
MOST = 16                       # images at once
UNKNOWN = 1000                  # pixels, for a file in pixels that does not say the image's size
LIMITS = {"n": (int, 1, MOST), "seed": (int, 0, 2 ** 31), "steps": (int, 1, 1000),
          "guidance": (float, 0, 20)}


class Model(NamedTuple):
    number: int                 # of the file
    ldm: LDM
    size: int                   # pixels a side of the images
    labels: list[str]
    density: PoseDensity | None
    hash: str


class Draw:
    """ValueError for a checkpoint that cannot be used."""

    def __init__(self, files: list[str], device: str = "auto"):
        self.files, self.device = files, checkpoint.find_device(device)
        self.model: Model | None = None
        self.loading, self.drawing, self.newest = threading.RLock(), threading.Lock(), 0
        self.load(0)

    def calls(self) -> dict[str, Call]:
        return {"GET checkpoint": self.about, "GET poses": self.poses, "POST read": self.read,
                "POST unusual": self.unusual, "POST draw": self.draw}

    def end(self) -> None:
        """Ends the sampling after its current step."""
        self.newest += 1
        if self.drawing.acquire(timeout=10):
            self.drawing.release()

    def load(self, k: int) -> Model:
        """The k-th checkpoint; the last one used stays in memory."""
        with self.loading:
            if k >= len(self.files):
                raise Refused(404, f"there is no checkpoint {k}; reload the page")
            if self.model is None or self.model.number != k:
                ldm, payload = checkpoint.load_ldm(self.files[k], self.device)
                trained = checkpoint.training_poses(payload, self.files[k])
                self.model = Model(k, ldm, payload["config"]["size"],
                                   checkpoint.label_names(payload, self.files[k]),
                                   None if trained is None else PoseDensity(trained),
                                   checkpoint.hash_of(ldm.state_dict()))
            return self.model

    def about(self, k: int, _: object) -> dict:
        """The labels, image size and default settings of a checkpoint."""
        model = self.load(k)
        how = sample.settings(model.ldm)
        return {"files": self.files, "labels": model.labels, "size": model.size,
                "steps": how["steps"], "guidance": how["guidance"],
                "guided": model.ldm.supports_guidance}

    # -------------------------------------------------------------------------------------- poses

    def poses(self, k: int, _: object) -> dict:
        """The example poses, and the most common ones that checkpoint k was trained on."""
        files, density = sorted(EXAMPLES.glob("*.json")), self.load(k).density
        found = [(file.stem, pose_files.load_poses(file).poses[0]) for file in files]
        if density is not None:
            some = density.common(min(COMMON, len(density.poses)))
            found += [(f"common {i + 1}", density.poses[row]) for i, row in enumerate(some)]
        return {"poses": [[name, pose.tolist()] for name, pose in found]}

    def read(self, _: int, body: bytes) -> dict:
        """The poses of a dropped file of any format, each fitted to the square canvas."""
        with tempfile.TemporaryDirectory() as at:
            path = Path(at) / "the dropped file"
            path.write_bytes(body)
            try:
                try:
                    found, boxed = pose_files.load_poses(path), False
                except pose_files.SizeNeeded:
                    found, boxed = pose_files.load_poses(path, canvas=(UNKNOWN, UNKNOWN)), True
            except keypoints.PoseError as error:
                raise Refused(400, str(error).replace(f"{at}/", "")) from None
        poses = [in_middle(pose) if boxed else pose_files.fitted(found, i, "letterbox")
                 for i, pose in enumerate(found.poses[:COMMON])]
        note = "; its image has no size in the file, so the pose was put into the middle"
        return {"poses": [[name, pose.tolist()] for name, pose in
                          zip(found.pictures, poses, strict=False)],
                "text": found.taken_for + note * boxed}

    def unusual(self, k: int, body: dict) -> dict:
        """The share of the training poses that are more common than this one, or None."""
        pose, density = checked(body.get("pose")), self.load(k).density
        known = density is not None and pose[:, 2].any()
        return {"unusual": float(density.unusual(pose[None])[0]) if known else None}

    # ----------------------------------------------------------------------------------- sampling

    def draw(self, k: int, body: dict) -> Iterator[dict]:
        """Lines {"step", "of"} while it samples, at last {"pictures": [[data URL, command]]}. A
        newer request ends it after the current step."""
        pose, (n, seed, steps, guidance) = checked(body.get("pose")), numbers(body)
        self.newest += 1
        return self.lines(k, self.newest, pose, n, seed, steps, guidance, body.get("label"))

    @torch.no_grad()
    def lines(self, k: int, mine: int, pose: np.ndarray, n: int, seed: int, steps: int,
              guidance: float, label: str | None) -> Iterator[dict]:
        with self.drawing:
            model = self.load(k)
            if label and label not in model.labels:
                raise ValueError(f"the label is {label!r}; {self.files[k]} knows "
                                 f"{', '.join(model.labels) or 'none'}")
            guidance = guidance if model.ldm.supports_guidance else 1.0
            how = sample.settings(model.ldm, steps=steps, guidance=guidance)
            total = len(sample.visited(model.ldm, how["sampler"], steps))
            labels = torch.tensor([model.labels.index(label)] * n) if label else None
            poses = torch.from_numpy(pose)[None].repeat(n, 1, 1)
            seeds = [seed + j for j in range(n)]
            for i, step in enumerate(sample.sample(model.ldm, poses, seeds, model.size,
                                                   labels=labels, **how)):
                latents = step.x
                yield {"step": i + 1, "of": total}
                if mine != self.newest:
                    return
            pictures, joints = [], dict(zip(keypoints.JOINTS, pose.tolist(), strict=True))
            for j, image in enumerate(sample.decode(model.ldm, latents)):
                command = shlex.join(["python", "sample.py", "pose.json", "--ckpt", self.files[k],
                                      "-n", "1", "--seed", str(seed + j), "--steps", str(steps),
                                      "--guidance", f"{guidance:g}",
                                      *(["--label", label] if label else [])])
                words = {"command": command, "checkpoint": model.hash, "settings": json.dumps(
                    how | {"seed": seed + j, "ckpt": self.files[k], "labels": [label] * bool(label),
                           "torch": torch.__version__}),
                    "pose.json": json.dumps(joints)}
                pictures.append([as_png(image, words), command])
            yield {"pictures": pictures}


def numbers(body: dict) -> list:
    """n, seed, steps and guidance; Refused with a sentence for what is out of bounds."""
    found = []
    for name, (kind, low, high) in LIMITS.items():
        try:
            value = kind(body[name])
        except (KeyError, TypeError, ValueError):
            value = None
        if value is None or not low <= value <= high:
            raise Refused(400, f"{name} is {body.get(name)!r}; allowed are numbers from {low} to "
                               f"{high}")
        found.append(value)
    return found


def in_middle(pose: np.ndarray) -> np.ndarray:
    """A pose [17, 3] scaled to four fifths of the canvas, in its middle."""
    seen = pose[:, 2] > 0
    low, high = pose[seen, :2].min(0), pose[seen, :2].max(0)
    pose[seen, :2] = (pose[seen, :2] - (low + high) / 2) * 0.8 / max((high - low).max(), 1e-9) + 0.5
    return pose


def as_png(image: np.ndarray, words: dict[str, str]) -> str:
    """A data URL of an image uint8 [S, S, 3] with these words in it."""
    Image.fromarray(image).save(file := io.BytesIO(), "png", pnginfo=plots.png_words(words))
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
