"""What sample.py draws: its flags and pose files in; poses, their names and images' seeds out."""
from __future__ import annotations

import argparse
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, NamedTuple
from unicodedata import normalize

import numpy as np

import checkpoint
import data
from diffusion import Seed
from extras.density import PoseDensity, in_words, note_unusual
from extras.motion import morph, read_motion
from extras.proportions import retarget
from formats.pose_files import fitted, load_poses, name_of
from keypoints import draw

if TYPE_CHECKING:
    from ldm import LDM

DEFAULT_FRAMES = 8              # of a file with many images, and of --morph


class Plan(NamedTuple):
    """What to draw: n images for each pose."""
    poses: np.ndarray               # [P, 17, 3] float64
    names: list[str]                # [P]
    seeds: list[Seed]               # [P n]
    n: int
    labels: list[str] = []          # [n] of each image of a pose; [] without labels
    before: np.ndarray | None = None    # [P, 17, 3] before --retarget and --typical
    notes: list[list[str]] = []     # [P] what is said under the skeletons

    def for_labels(self, labels: list[str]) -> Plan:
        """The same images once for each of these labels, side by side."""
        rows = [self.seeds[i:i + self.n] for i in range(0, len(self.seeds), self.n)]
        return self._replace(seeds=[seed for row in rows for seed in row * len(labels)],
                             n=self.n * len(labels),
                             labels=[label for label in labels for _ in range(self.n)])

    def called(self, i: int, what: object) -> str:
        """`what` after the label of the i-th image of a pose, where it has one."""
        return f"{self.labels[i]}, {what}" if self.labels else str(what)

    def rows(self, images: list[np.ndarray]) -> list[list[np.ndarray]]:
        """A row for each pose: its skeleton and its samples, all uint8 [S, S, 3]."""
        return [[draw(pose, len(images[0])), *images[p * self.n:(p + 1) * self.n]]
                for p, pose in enumerate(self.poses)]


def read_poses(paths: Iterable[str], fit_how: str = "letterbox", frames: int = DEFAULT_FRAMES,
               **how: object) -> tuple[list[np.ndarray], list[str]]:
    """The poses [17, 3] of all files, fitted to the square image, and a name for each.

    A file of more than `frames` images gives that many poses, evenly spread; `how` goes to
    load_poses. Prints the format of each file. PoseError for a file without a usable pose.
    """
    poses, names = [], []
    for path in paths:
        found = load_poses(path, **how)
        taken = data.evenly(len(found.poses), frames)
        fewer = f", {len(taken)} of them drawn" if len(taken) < len(found.poses) else ""
        print(f"{path}: {found.taken_for}{fewer}")
        poses += [fitted(found, i, fit_how) for i in taken]
        names += [name_of(found.pictures[i], found.poses, path) for i in taken]
    return poses, names


def plan_of(args: argparse.Namespace, payload: dict, labels: Collection[int] = ()) -> Plan:
    """The poses to draw, from files or from the checkpoint, and the seeds of their images. `labels`
    are those asked for, whose proportions --retarget takes."""
    trained = checkpoint.training_poses(payload, args.ckpt)
    if trained is None and (args.common or args.typical or args.retarget):
        raise ValueError("--common, --typical and --retarget need training poses, which "
                         f"{args.ckpt} does not have; train stage 2 with: "
                         f"{checkpoint.HOW_TO_MAKE['ldm']}")
    density = None if trained is None else PoseDensity(trained)
    frames = args.frames or DEFAULT_FRAMES
    how = {"format": args.format, "person": args.person, "canvas": args.canvas,
           "min_confidence": args.min_confidence}
    if args.common:
        poses = density.poses[density.common(args.common)]
        names = [f"common {i + 1}" for i in range(args.common)]
    elif args.motion:
        poses, names = read_motion(args.poses, args.fit, args.frames, **how)
    elif not args.poses:                    # --label alone
        poses, names = [data.NO_POSE], ["no pose"]
    else:
        per_file = DEFAULT_FRAMES if args.morph else frames
        poses, names = read_poses(args.poses, args.fit, per_file, **how)
    poses = np.stack(poses)                 # float64: the seed's cell ids are floors of these
    before, notes = None, []
    if density and args.poses:
        asked = other = poses
        if args.retarget or not args.motion:    # for 100 frames this takes a second
            other = retarget(poses, checkpoint.training_poses(payload, args.ckpt, labels))
        given = other if args.retarget else poses
        poses = density.typical(given, args.typical)
        if not args.motion:                 # a motion has too many
            was, of_other, now = (density.unusual(each) for each in (asked, other, poses))
            note_unusual(names, of_other if args.retarget else was, now, args.typical, of_other)
            moved = args.retarget or args.typical
            before = asked if moved else None
            notes = [[in_words(share) for share in shares]
                     for shares in (zip(was, now, strict=True) if moved else zip(now))]
    if args.morph:
        return Plan(*morph(poses, names, frames, args.seed, args.n), args.n)
    return Plan(poses, names, [args.seed + i for i in range(args.n)] * len(poses), args.n,
                before=before, notes=notes)


def labels_of(args: argparse.Namespace, ldm: LDM, payload: dict) -> dict[str, int]:
    """The labels that --label asks for, by name; ValueError for one that the model lacks."""
    known = checkpoint.label_names(payload, args.ckpt)
    if args.label and not known:
        raise ValueError(f"--label is {args.label[0]}, but {args.ckpt} was trained without labels; "
                         "leave --label out, or train with --labels")
    if not args.poses and not args.common and not ldm.supports_guidance:
        raise ValueError(f"{args.ckpt} was trained without dropping poses, so it cannot draw by "
                         "label alone; give a pose, such as --common 1")
    asked = [normalize("NFC", name) for name in args.label or ()]
    if "all" in asked and "all" not in known:
        asked = known
    for name in asked:
        if name not in known:
            raise ValueError(f"--label is {name!r}; {args.ckpt} knows "
                             f"{', '.join(map(repr, known))}, and all for each of them")
    return {name: known.index(name) for name in asked}
