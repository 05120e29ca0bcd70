"""The images of a folder and their labels: read in any format, saved as keypoints/NAME.json.

A label is in one of four states, which its file names first: "todo"; "proposed" by the detector;
"corrected", which is any unfinished work of a person; "done", as are all labels of other tools.
Readers of datasets skip the first three.
"""
from __future__ import annotations

import io
import json
import math
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

import checkpoint
import data
import keypoints
from dataset import check, folder
from dataset.images import DataError, read_image, upright_size
from formats import pose_files
from studio import propose
from studio.server import Call, Refused, sentence

UNTOUCHED = "todo", "proposed"              # the states in which a new proposal may replace a label
STATES = *UNTOUCHED, "corrected", "done"
SHOWN, THUMB = 2048, 112        # most pixels per side of an image on the page, and of a thumbnail
LOSSLESS = 1024                 # up to this side images are sent as PNG: pixel art has no blur
DECODERS = 2                    # images decoded at once, so that large scans do not add up
BLOCKS = 50                     # of proposals, neighbours in the folder


class Label:
    """ValueError for a folder without images or with labels that cannot be read."""

    def __init__(self, root: Path):
        found = {os.path.normpath(one.path): one for one in folder.find(root, poseless=True)[1]}
        self.root, self.images = root, folder.find_images(folder.images_of(root))
        told = [found.get(os.path.normpath(image)) for image in self.images]
        self.told = [one and one.label for one in told]         # what other tools say
        places = [folder.base_of(image) or (str(root), os.path.splitext(
            os.path.relpath(image, root))[0]) for image in self.images]
        self.own = [Path(base, "keypoints", f"{rest}.json") for base, rest in places]
        self.place = Path(places[0][0], folder.STUDIO)
        self.states = [self.read_state(i) for i in range(len(self.images))]
        self.saving, self.decoding = threading.Lock(), threading.Semaphore(DECODERS)
        self.stop, self.thread, self.progress = threading.Event(), None, {"text": ""}

    def calls(self) -> dict[str, Call]:
        return {"GET images": self.list, "GET pose": self.pose, "POST pose": self.save,
                "GET image": lambda i, _: self.encoded(i, SHOWN),
                "GET thumb": lambda i, _: self.encoded(i, THUMB),
                "GET suspects": self.suspects, "POST propose": self.propose,
                "GET progress": lambda *_: self.progress | {"training": self.is_training()}}

    # ------------------------------------------------------------------------------------- images

    def list(self, *_: object) -> dict:
        """Each image as [name, state, confidence, rank]; see `ranks`."""
        return {"folder": str(self.root), "labels": str(self.own[0].parent),
                "images": [[os.path.relpath(image, self.root), *state, rank] for image, state, rank
                           in zip(self.images, self.states, self.ranks(), strict=True)]}

    def ranks(self) -> list[int]:
        """The order in which a person should label. To do: every prefix is spread evenly over the
        folder, so that the first ones differ most. Proposed: the least certain first, but of
        neighbours in the folder, which look alike, one at a time."""
        bits = max(1, (len(self.images) - 1).bit_length())
        ranks = [int(f"{i:0{bits}b}"[::-1], 2) for i in range(len(self.images))]
        proposed = [i for i, (state, _) in enumerate(self.states) if state == "proposed"]
        size, turns = max(1, math.ceil(len(proposed) / BLOCKS)), {}
        for k in range(0, len(proposed), size):
            block = sorted(proposed[k:k + size], key=lambda i: self.states[i][1])
            turns |= {i: (turn, self.states[i][1]) for turn, i in enumerate(block)}
        for rank, i in enumerate(sorted(turns, key=turns.get)):
            ranks[i] = rank
        return ranks

    def path(self, i: int) -> str:
        if i >= len(self.images):
            raise Refused(404, f"there is no image {i}; reload the page")
        return self.images[i]

    def encoded(self, i: int, most: int) -> tuple[str, bytes]:
        """Image i upright and reduced to `most` pixels a side, as PNG or JPEG."""
        with self.decoding:
            image = read_image(self.path(i), at_least=most)
            image.thumbnail((most, most), Image.Resampling.BICUBIC, reducing_gap=3)
            kind = "png" if THUMB < max(image.size) <= LOSSLESS else "jpeg"
            image.save(file := io.BytesIO(), kind, quality=85)
        return f"image/{kind}", file.getvalue()

    # ------------------------------------------------------------------------------------- labels

    def read_state(self, i: int) -> tuple[str, float]:
        """The state of image i and the confidence of its proposal."""
        if self.own[i].exists():
            return folder.state_of(str(self.own[i]))
        return ("todo", 0.0) if self.told[i] is None else ("done", 1.0)

    def version(self, i: int) -> str:
        """Changes whenever the file of image i does."""
        with suppress(FileNotFoundError):
            stat = self.own[i].stat()
            return f"{stat.st_mtime_ns} {stat.st_size}"
        return ""

    def pose(self, i: int, _: object = None) -> dict:
        """The label of image i, and why it or the image cannot be read, if so."""
        image, size, pose, problem = self.path(i), (1, 1), data.NO_POSE, ""
        with self.saving:
            version = self.version(i)
            label = str(self.own[i]) if version else self.told[i]
            try:
                size = upright_size(image)
                if isinstance(label, str):
                    pose = pose_files.read_one(label, lambda: size).poses[0]
                elif label is not None:
                    pose = label
            except pose_files.NobodyFound:
                pass
            except ValueError as error:                 # the page says it and goes on
                problem = str(error)
            self.states[i] = self.read_state(i)         # another program may have changed it
        return {"pose": pose.tolist(), "state": self.states[i][0], "version": version,
                "size": size, "problem": problem}

    def save(self, i: int, body: dict) -> dict:
        """Saves a pose and its state; refuses where the file is not the one that was loaded."""
        pose, state = checked(body.get("pose")), body.get("state")
        if state not in STATES:
            raise Refused(400, f"the state is {state!r}; allowed are {', '.join(STATES)}")
        upright_size(self.path(i))                      # an image that is gone keeps its label
        with self.saving:
            # What a person does always replaces a proposal, also a new one.
            if body.get("version") != self.version(i) and self.read_state(i)[0] not in UNTOUCHED:
                raise Refused(409, f"{self.own[i].name} was changed elsewhere since this page "
                                   "loaded it; press R to load it again")
            self.write(i, pose, state, 1.0)
            return {"version": self.version(i)}

    def write(self, i: int, pose: np.ndarray, state: str, confidence: float) -> None:
        """Writes keypoints/NAME.json; the first time, another tool's file is kept in .studio."""
        file = self.own[i]
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists() and not folder.STATE.match(file.read_bytes()[:100]):
            kept = self.place / "replaced" / file.name
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, kept)
        rows = [f'"{name}": {json.dumps(row)}' for name, row in
                zip(keypoints.JOINTS, pose.tolist(), strict=True)]
        head = f'"state": "{state}", "confidence": {confidence:.4f}'
        text = "{" + ",\n ".join([head, *rows]) + "}\n"
        nobody = state == "done" and not pose[:, 2].any()
        with checkpoint.replacing(file) as out:         # [] is what detectors write for nobody
            out.write(b"[]\n" if nobody else text.encode())
        self.states[i] = state, confidence

    def suspects(self, *_: object) -> dict:
        """{number: sentence} of what the dataset check finds in the images that are done."""
        try:
            seen = check.gather([data.PoseFolder(self.root, propose.SIDE, limit=1)], 0)
        except DataError:
            return {"suspects": {}}                     # nothing is done yet
        found = check.odd_poses(seen)[0] + check.copies(seen) + check.misshapen(seen)
        why = {os.path.normpath(one.file): one.why for one in found}
        why |= {os.path.normpath(file): text for file, text in seen.broken.items()}
        return {"suspects": {i: why[file] for i, image in enumerate(self.images)
                             if (file := os.path.normpath(image)) in why}}

    # ---------------------------------------------------------------------------------- proposals

    def is_training(self) -> bool:
        return self.thread is not None and self.thread.is_alive()

    def propose(self, _: int, body: dict) -> dict:
        """Starts the detector in the background; stops it with {"stop": true}."""
        if body.get("stop"):
            self.end()
        elif not self.is_training():
            done = [i for i, (state, _) in enumerate(self.states) if state == "done"]
            if len(done) < propose.LEAST:
                raise Refused(400, f"{checkpoint.plural(len(done), 'image')} done; the detector "
                              f"learns from {propose.LEAST}, so label "
                              f"{propose.LEAST - len(done)} more")
            self.stop.clear()
            self.progress = {"text": "reading", "share": 0, "done": len(done)}
            self.thread = threading.Thread(target=self.work, args=(done,), daemon=True)
            self.thread.start()
        return {}

    def end(self) -> None:
        """Ends the training after its current step; what it has learned is saved."""
        self.stop.set()
        if self.is_training():
            self.thread.join(10)

    def work(self, done: list[int]) -> None:
        try:
            text = self.learn_and_propose(done)
        except Exception as error:                      # of a thread: the page has to say it
            text = f"proposing failed: {sentence(error)}"
        self.progress |= {"text": text}

    def learn_and_propose(self, done: list[int]) -> str:
        """Learns from the images done, then writes a proposal for each of the others that nobody
        has touched. Returns a sentence."""
        images, poses = [], []
        for i, image, size in self.squares(done):
            pose = np.array(self.pose(i)["pose"])
            if pose[:, 2].any():
                images.append(image)
                poses.append(keypoints.fit(pose, size, "letterbox"))
        learner, made = propose.Learner(self.place / "detector.pt"), 0
        for share in learner.learn(np.stack(images), np.stack(poses), self.stop.is_set):
            self.progress |= {"text": f"learning from {len(images)} images", "share": share}
        wanted = [i for i, (state, _) in enumerate(self.states) if state in UNTOUCHED]
        for k in range(0, len(wanted), propose.BATCH):
            if self.stop.is_set():
                return f"stopped at {self.progress['share']:.0%}; Propose goes on from there"
            self.progress |= {"text": f"proposing for {len(wanted)} images",
                              "share": k / len(wanted)}
            read = list(self.squares(wanted[k:k + propose.BATCH]))
            if not read:
                continue
            found = propose.propose(learner.detector, np.stack([image for _, image, _ in read]))
            for (i, _, size), pose, confidence in zip(read, *found, strict=True):
                with self.saving:
                    if self.read_state(i)[0] in UNTOUCHED:
                        pose = propose.from_square(pose, size)
                        self.write(i, pose, "proposed", confidence)
                        made += 1
        return f"{checkpoint.plural(made, 'proposal')}, the least certain first"

    def squares(self, numbers: list[int]) -> Iterator[tuple[int, np.ndarray, tuple[int, int]]]:
        """(i, image, size) as propose.read_square, without images that are gone or broken."""
        for i in numbers:
            with suppress(DataError):
                yield i, *propose.read_square(self.images[i])


def checked(pose: object) -> np.ndarray:
    """A pose [17, 3] from the page; Refused with a sentence for anything else."""
    with suppress(TypeError, ValueError):
        pose = np.array(pose, dtype=np.float64)
        if (pose.shape == data.NO_POSE.shape and np.isfinite(pose).all()
                and np.isin(pose[:, 2], (0, keypoints.HIDDEN, 1)).all()):
            return pose * (pose[:, 2:] > 0)
    raise Refused(400, "a pose is 17 joints [x, y, visible], visible 0, 0.5 or 1")
