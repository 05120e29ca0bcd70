"""Sampling for the page: a pose in, steps and images out, and where poses come from."""
from __future__ import annotations

import argparse
import base64
import io
import json
import shlex
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import checkpoint
import keypoints
import plots
import sample
from checkpoint import number
from extras.density import PoseDensity, in_words, percent
from extras.plan import labels_of
from extras.proportions import retarget
from formats import pose_files
from studio.label import checked
from studio.server import Call, Refused

EXAMPLES = Path(__file__).parent.parent / "examples/poses"
COMMON = 8                      # typical training poses that the page offers
UNKNOWN = 1000                  # pixels, for a file in pixels that does not say the image's size
LIMITS = {"n": number(int, 1, 16), "seed": number(int, 0, 2 ** 31), "steps": number(int, 1, 1000),
          "guidance": number(float, 0, 20)}


class Draw:
    """ValueError for a checkpoint that cannot be used; a published one needs its `preset`."""

    def __init__(self, file: str, preset: str | None = None, device: str = "auto"):
        self.flags = ["--ckpt", file, *(["--preset", preset] if preset else [])]
        self.ldm, self.payload = checkpoint.load_ldm(file, checkpoint.find_device(device), preset)
        self.trained = checkpoint.training_poses(self.payload, file)
        self.density = None if self.trained is None else PoseDensity(self.trained)
        self.hash = checkpoint.hash_of(self.ldm.state_dict())
        self.drawing, self.newest = threading.Lock(), 0

    def calls(self) -> dict[str, Call]:
        return {"GET model": self.about, "POST read": self.read, "POST unusual": self.unusual,
                "POST draw": self.draw}

    def end(self) -> None:
        """Ends the sampling after its current step."""
        self.newest += 1
        if self.drawing.acquire(timeout=10):
            self.drawing.release()

    def about(self, *_: object) -> dict:
        """The labels and defaults of the model; its most common training poses and the examples."""
        how, file = sample.settings(self.ldm), self.flags[1]
        files = sorted(EXAMPLES.glob("*.json"))
        poses = [*zip([path.stem for path in files], self.in_proportion(
            [pose_files.load_poses(path).poses[0] for path in files]), strict=True)]
        if self.density is not None:
            some = self.density.common(min(COMMON, len(self.density.poses)))
            poses = [(f"common {i + 1}", self.density.poses[k]) for i, k in enumerate(some)] + poses
        return {"file": file, "labels": checkpoint.label_names(self.payload, file),
                "steps": how["steps"], "guidance": how["guidance"],
                "guided": self.ldm.supports_guidance,
                "poses": [[name, pose.tolist()] for name, pose in poses]}

    def in_proportion(self, poses: list[np.ndarray]) -> np.ndarray:
        """Poses [P, 17, 3] with the limb lengths of the training poses, where they are known."""
        return np.stack(poses) if self.trained is None else retarget(np.stack(poses), self.trained)

    def read(self, _: int, body: bytes) -> dict:
        """The poses of a dropped file of any format, each fitted to the square canvas."""
        with tempfile.TemporaryDirectory() as at:
            path, note = Path(at) / "the dropped file", ""
            path.write_bytes(body)
            try:
                try:
                    found = pose_files.load_poses(path)
                except pose_files.SizeNeeded:
                    found = pose_files.load_poses(path, canvas=(UNKNOWN, UNKNOWN))
                    note = "; its image has no size in the file, so the pose is in the middle"
            except keypoints.PoseError as error:
                raise Refused(400, str(error).replace(f"{at}/", "")) from None
        poses = self.in_proportion([pose_files.fitted(found, i, "letterbox")
                                    for i in range(min(COMMON, len(found.poses)))])
        for pose in poses if note else ():
            to_middle(pose)
        return {"poses": [(name, pose.tolist()) for name, pose
                          in zip(found.pictures, poses, strict=False)],
                "text": found.taken_for + note}

    def unusual(self, _: int, body: dict) -> dict:
        """How common the pose is among the training poses, in words; "" where that is not known."""
        pose = checked(body.get("pose"))
        if self.density is None or not pose[:, 2].any():
            return {"text": ""}
        share = float(self.density.unusual(pose[None])[0])
        return {"text": f"{in_words(share)}; {percent(share)} of the training poses are more "
                        "common"}

    # ----------------------------------------------------------------------------------- sampling

    def draw(self, _: int, body: dict) -> Iterator[dict]:
        """Lines {"step", "of"} while it samples, at last {"pictures": [[data URL, command]]}. A
        newer request ends it after the current step."""
        pose, asked = checked(body.get("pose")), {name: setting(body, name) for name in LIMITS}
        label, n = body.get("label"), asked.pop("n")
        commands = [["pose.json", *self.flags, "-n", "1", "--seed", str(asked["seed"] + j),
                     "--steps", str(asked["steps"]), "--guidance", f"{asked['guidance']:g}",
                     *([f"--label={label}"] if label else [])] for j in range(n)]
        args = sample.parse_args(commands[0])
        sample.ask_model(args, self.ldm)
        labels = labels_of(args, self.ldm, self.payload)
        self.newest += 1
        return self.lines(self.newest, pose, commands, args, labels)

    @torch.no_grad()
    def lines(self, mine: int, pose: np.ndarray, commands: list[list[str]],
              args: argparse.Namespace, labels: dict[str, int]) -> Iterator[dict]:
        n, how = len(commands), sample.settings_of(args)
        with self.drawing:
            total = len(sample.visited(self.ldm, how["sampler"], how["steps"]))
            steps = sample.sample(
                self.ldm, torch.from_numpy(pose)[None].repeat(n, 1, 1),
                [args.seed + j for j in range(n)], self.payload["config"]["size"],
                labels=torch.tensor([*labels.values()] * n) if labels else None, **how)
            for i, step in enumerate(steps):
                latents = step.x
                yield {"step": i + 1, "of": total}
                if mine != self.newest:
                    return
            words = {"checkpoint": self.hash,
                     "pose.json": json.dumps(dict(zip(keypoints.JOINTS, pose.tolist(),
                                                      strict=True)))}
            pictures = []
            for image, command in zip(sample.decode(self.ldm, latents), commands, strict=True):
                line = shlex.join(["python", "sample.py", *command])
                pictures.append([as_png(image, words | {"command": line}), line])
            yield {"pictures": pictures}


def setting(body: dict, name: str) -> float:
    """A number of a request; Refused with a sentence for what is out of bounds."""
    try:
        return LIMITS[name](body.get(name))
    except (argparse.ArgumentTypeError, TypeError, ValueError) as error:
        raise Refused(400, f"{name}: {error}") from None


def to_middle(pose: np.ndarray) -> None:
    """Scales a pose [17, 3] to four fifths of the canvas and moves it to its middle."""
    seen = pose[:, 2] > 0
    low, high = pose[seen, :2].min(0), pose[seen, :2].max(0)
    pose[seen, :2] = (pose[seen, :2] - (low + high) / 2) * 0.8 / max((high - low).max(), 1e-9) + 0.5


def as_png(image: np.ndarray, words: dict[str, str]) -> str:
    """A data URL of an image uint8 [S, S, 3] with these words in it."""
    Image.fromarray(image).save(file := io.BytesIO(), "png", pnginfo=plots.png_words(words))
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
