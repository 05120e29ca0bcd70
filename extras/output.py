"""What sample.py writes: a sheet of all images, single PNGs, and latents."""
from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch import Tensor

import data
import plots
from diffusion import Step
from extras.plan import Plan
from keypoints import draw

SHEET_ACROSS, SHEET_MOST = 8, 48    # frames side by side and in all on a contact sheet


def grid_of(plan: Plan, images: list[np.ndarray], given: np.ndarray | None) -> dict[str, list]:
    """A row for each pose: skeleton (before and after a pull), given image, samples. Arguments of
    plots.save_grid."""
    seeds = [plan.called(i, f"seed {seed}") for i, seed in enumerate(plan.seeds[:plan.n])]
    rows, columns = plan.rows(images), ["pose", *seeds]
    if given is not None:
        rows = [[skeleton, given, *samples] for skeleton, *samples in rows]
        columns.insert(1, "given")
    if plan.before is not None:
        rows = [[draw(pose, len(images[0])), *row]
                for pose, row in zip(plan.before, rows, strict=True)]
        columns[:1] = ["pose as given", "pose drawn"]
    return {"rows": rows, "labels": plan.names, "columns": columns, "captions": plan.notes}


def film_of(plan: Plan, steps: list[Step], decode: Callable[[Tensor], list[np.ndarray]],
            given: np.ndarray | None) -> dict[str, list]:
    """Two rows for each image: x_t after some steps, and the x0 predicted in them. As grid_of."""
    x, x0 = [decode(step.x) for step in steps], [decode(step.x0) for step in steps]
    rows, labels = [], []
    for i, seed in enumerate(plan.seeds):
        p = i // plan.n
        rows += [[draw(plan.poses[p], len(x[0][i])), *(images[i] for images in x)],
                 [given, *(images[i] for images in x0)]]
        labels += [f"{plan.names[p]}, {plan.called(i % plan.n, f'seed {seed}')}: x_t",
                   "x0 predicted"]
    columns = ["pose", *(f"step {step.i + 1}, t = {step.t}" for step in steps)]
    return {"rows": rows, "labels": labels, "columns": columns}


def sheet_of(plan: Plan, images: list[np.ndarray], given: np.ndarray | None) -> dict[str, list]:
    """A contact sheet: skeletons side by side, the samples below. Arguments of plots.save_grid.

    `images` and `given`, the image to start from, are uint8 [S, S, 3].
    """
    rows, labels, captions = [], [], []
    frames = [[*row, name] for row, name in zip(plan.rows(images), plan.names, strict=True)]
    frames = [frames[p] for p in data.evenly(len(frames), SHEET_MOST)]
    if given is not None:
        frames.insert(0, [None, given, *[None] * (plan.n - 1), "given"])
    for first in range(0, len(frames), SHEET_ACROSS):
        *lines, names = zip(*frames[first:first + SHEET_ACROSS], strict=True)
        rows += [list(line) for line in lines]
        labels += ["pose", *(plan.called(i, f"sample {i + 1}") for i in range(plan.n))]
        captions += [[] for _ in range(plan.n)] + [list(names)]
    return {"rows": rows, "labels": labels, "captions": captions}


def outputs(args: argparse.Namespace) -> tuple[Path, Path | None]:
    """The files of the sheet and of the animation, if there is one. Makes the folders.

    ValueError for a file that is also an input, and for a folder that cannot be made.
    """
    sheet, animation = Path(args.out), None
    if args.motion or args.morph:
        animation = sheet.with_suffix(".webp" if sheet.suffix.lower() == ".webp" else ".gif")
        sheet = sheet.with_suffix(".png")
    inputs = [*args.poses, args.ckpt, args.init, args.inpaint, args.mask, args.noise_from]
    read = {Path(path).resolve() for path in inputs if path}
    for path in filter(None, (sheet, animation, args.save_latents)):
        if Path(path).resolve() in read:
            raise ValueError(f"{path} is an input and would be overwritten; name another output")
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    if args.separate:
        Path(args.separate).mkdir(parents=True, exist_ok=True)
    return sheet, animation


def save_separate(folder: str, plan: Plan, images: list[np.ndarray], words: dict[str, str]) -> None:
    """Each image as a PNG of its own, without labels."""
    for i, (image, seed) in enumerate(zip(images, plan.seeds, strict=True)):
        name = re.sub(r"[^\w.-]+", "-", plan.called(i % plan.n, plan.names[i // plan.n]))[:80]
        path = Path(folder) / f"{i + 1:04d}-{name}.png"
        plots.save_image(path, image, words | {"seed": str(seed)})


def save_latents(path: str, z: Tensor, plan: Plan) -> None:
    """An .npz of plain arrays: latents float32 [B, C, h, w], poses [B, 17, 3] and seeds [B].

    The noise lies at share [B] of the way to that of seeds_toward [B], which only a morph has. With
    --label also the labels [B].
    """
    pairs = [seed if isinstance(seed, tuple) else (seed, seed, 0.0) for seed in plan.seeds]
    a, b, share = (np.array(column) for column in zip(*pairs, strict=True))
    labels = {"labels": np.array(plan.labels * len(plan.poses))} if plan.labels else {}
    with open(path, "wb") as file:                          # savez would add .npz to a name
        np.savez(file, latents=z.numpy(), poses=plan.poses.repeat(plan.n, axis=0), seeds=a,
                 seeds_toward=b, share=share, **labels)
