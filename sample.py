"""Draw pictures in poses of your choice: for each pose file a row, the skeleton and then n samples.

    python sample.py examples/poses/*.json
    python sample.py mine.json --ckpt runs/mine/last.pt -n 4 --steps 100 --guidance 3 --out mine.png
    python sample.py mine.json --typical 0.5        pulled halfway toward the poses that the model was trained on
    python sample.py --common 9                     no pose file: the nine most common kinds of those
    python sample.py wide.json --canvas 1920x1080 --person 2 --fit crop
    python sample.py mine.json --ckpt model.ckpt --preset danbooru --steps 500 --eta 0    a published CompVis checkpoint

    python sample.py mine.json --init picture.png --strength 0.6            starts from a picture
    python sample.py mine.json --inpaint picture.png --mask hole.png        draws anew what is white in the mask
    python sample.py mine.json --noise-from picture.png                     the noise that the picture would come from
    python sample.py --morph standing.json jumping.json --frames 16         from one to the other, also as a GIF
    python sample.py --motion walk/ --fps 12 --out walk.png                 a pose file a frame; walk.png and walk.gif
    python sample.py mine.json --film                                       how the picture comes out of the noise
    python sample.py --repeat mine.png                                      the same picture again

A pose file (COCO, OpenPose, MediaPipe, YOLO, ...: README.md lists them) is told by its content, whatever its name;
each picture or frame in it gives one pose, that of its largest person.
Picture i of a row has seed --seed + i and depends on nothing else: not on the other poses, nor on how many there are
(but for the last bits of sums, which differ from one size of batch to another).
"""
from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

# Before torch is imported: idle threads soon sleep instead of spinning, which shares the cores.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

import checkpoint
import data
import plots
from diffusion import (
    MOST_SEEDS,
    Diffusion,
    Seed,
    Step,
    ddim,
    ddim_table,
    ddpm,
    dpm_solver,
    guided,
    held,
    invert,
    per_image_noise,
)
from extras.density import PoseDensity
from extras.motion import Plan, morph, read_motion
from formats import compvis
from formats.pose_files import FAR, FORMATS, MIN_CONFIDENCE, fitted, load_poses, name_of
from keypoints import draw
from ldm import DEFAULT_ETA, DEFAULT_GUIDANCE, LDM

BATCH = 16                      # pictures in the network at once
# Measured (benchmarks/convergence.py): 20 steps of DPM-Solver++ with eta 1 draw pose and picture as well as 50 of DDIM.
DEFAULT_SAMPLER = "dpm_solver"
DEFAULT_STEPS = {"ddim": 50, "dpm_solver": 20, "ddpm": 1000}            # ddpm takes all, whatever stands here
DEFAULT_FRAMES = 8              # of a file that holds a video or a whole dataset, and of --morph
DEFAULT_CKPT = "runs/ldm/last.pt"
SHIPPED = Path(__file__).parent / "assets/toy.pt"       # drawn with until there is one
DEFAULT_STRENGTH = 0.6
DEFAULT_ROUNDS = 3              # of RePaint: measured on a Gaussian, 1 leaves half of what the known part says unheard
DEFAULT_FPS = 12.0
SAMPLERS = {"ddim": "DDIM", "dpm_solver": "DPM-Solver++(2M)", "ddpm": "DDPM"}
SPACINGS = ("even", "lambda", "uniform")
VERY_UNUSUAL = 0.99             # further out than this share of the training poses: --typical is suggested
SHEET_ACROSS, SHEET_MOST = 8, 48    # frames side by side and in all on the contact sheet of a motion
FILM = 8                        # steps that --film shows
OUTLINE = (255, 0, 160)         # around what --inpaint draws anew
LONGEST_SIDE = {".webp": 16383, ".jpg": 65500, ".jpeg": 65500}      # pixels that these formats can count
RECORD = 1                      # format of what a PNG says about itself
# What a PNG repeats of the flags: their type, those of a list, or all that they can be. Poses and seeds say the rest.
REPEATED = {"sampler": tuple(SAMPLERS), "steps": int, "eta": float, "spacing": SPACINGS, "guidance": float,
            "interval": [int, int], "rescale": float, "preset": str, "no_ema": bool, "amp": tuple(checkpoint.AMP),
            "ckpt": str, "init": str, "strength": float, "inpaint": str, "mask": str, "rounds": int, "noise_from": str,
            "morph": bool, "motion": bool, "film": bool, "fps": float}
PICTURES = ("init", "inpaint", "mask", "noise_from")
MAY_GO_WITH_REPEAT = {"repeat", "ckpt", "device", "out", "separate", "save_latents", *PICTURES}


def sample(ldm: LDM, poses: Tensor, seeds: list[Seed], size: int, sampler: str, steps: int, eta: float,
           guidance: float, spacing: str, interval: tuple[int, int] | None = None, rescale: float = 0.0,
           noise: Tensor | None = None, given: Tensor | None = None, known: Tensor | None = None,
           **more: int) -> Iterator[Step]:
    """Denoises one latent a pose, [B, 17, 3] with seeds [B], for pictures of size x size; yields every step.

    `settings` has what sampler, steps, eta, guidance and spacing usually are.
    The last step's x [B, C, h, w] is the sample: `ldm.decode` makes the pictures [B, 3, size, size] of it. Sampling
    starts from `noise` [1, C, h, w], if there is any, instead of the seeds'; where `known` [1, 1, h, w] is true, the
    latent `given` [1, C, h, w] is kept. `more` are skip, which leaves steps out and starts from `given`, and rounds, as
    in ddim.
    """
    diffusion = Diffusion(**ldm.schedule)
    shape = (ldm.vq.config.embed_dim, size // ldm.vq.config.factor, size // ldm.vq.config.factor)
    device = ldm.mean.device
    x_T, noise_fn = per_image_noise(seeds, shape)
    if noise is not None:
        x_T = noise.expand(len(seeds), *shape)
    if skip := more.get("skip"):
        timesteps = visited(ldm, sampler, steps, spacing)
        if skip == len(timesteps):                          # nothing is left to do
            return iter([Step(skip, skip, 0, given.expand_as(x_T), given.expand_as(x_T))])
        x_T = diffusion.q_sample(given, torch.tensor([timesteps[-1 - skip]]), x_T.to(device))
    model, rows = ldm.prepared(poses.to(device), shape[1:])
    eps_fn = guided(diffusion.eps_model(model), rows, guidance, interval, rescale)
    if known is not None:
        eps_fn = held(diffusion, eps_fn, given, known)
    if sampler == "ddpm":
        return ddpm(diffusion, eps_fn, x_T.to(device), noise_fn, **more)
    solver = {"ddim": ddim, "dpm_solver": dpm_solver}[sampler]
    return solver(diffusion, eps_fn, x_T.to(device), steps, eta, noise_fn, spacing, **more)


def settings(ldm: LDM, sampler: str | None = None, steps: int | None = None, eta: float | None = None,
             guidance: float | None = None, spacing: str | None = None) -> dict:
    """These arguments of `sample`; for None, what the model wants."""
    sampler = sampler or (DEFAULT_SAMPLER if ldm.spacing == "even" else "ddim")     # published models know DDIM
    return {"sampler": sampler, "steps": DEFAULT_STEPS[sampler] if steps is None else steps,
            "eta": ldm.eta if eta is None else eta, "guidance": ldm.guidance if guidance is None else guidance,
            "spacing": spacing or ("lambda" if sampler == "dpm_solver" else ldm.spacing)}


def settings_of(args: argparse.Namespace) -> dict:
    """The same of a command's flags."""
    return {name: getattr(args, name) for name in ("sampler", "steps", "eta", "guidance", "spacing")}


def visited(ldm: LDM, sampler: str, steps: int, spacing: str) -> np.ndarray:
    """The timesteps that a sampler goes through, ascending; ddpm takes all."""
    diffusion = Diffusion(**ldm.schedule)
    return np.arange(diffusion.timesteps) if sampler == "ddpm" else ddim_table(diffusion, steps, 0, spacing)[0]


def how_many_steps(ldm: LDM, sampler: str, steps: int, spacing: str) -> int:
    """Uniform spacing may take more steps than asked for (500 for 350), as the reference does; ddpm takes all."""
    return len(visited(ldm, sampler, steps, spacing))


@torch.no_grad()
def denoise(ldm: LDM, poses: Tensor, seeds: list[Seed], size: int, film: int = 1,
            **how: object) -> list[Step]:
    """`film` of the steps, from the first to the last, each of all latents [B, C, h, w], on the CPU; 1 is the last.

    In batches, with a progress bar; `how` goes to `sample`.
    """
    total = how_many_steps(ldm, how["sampler"], how["steps"], how["spacing"]) - how.get("skip", 0)
    total = max(1, total * how.get("rounds", 1))                        # left out are at most all of them but the given
    wanted = {total - 1} if film == 1 else set(data.evenly(total, film).tolist())
    batches = []
    with tqdm(total=total * math.ceil(len(poses) / BATCH), desc="sampling", unit="step", dynamic_ncols=True) as bar:
        for b in range(0, len(poses), BATCH):
            kept = []
            for k, step in enumerate(sample(ldm, poses[b:b + BATCH], seeds[b:b + BATCH], size, **how)):
                if k in wanted:
                    kept.append(step._replace(x=step.x.cpu(), x0=step.x0.cpu()))
                bar.update()
            batches.append(kept)
    return [steps[0]._replace(x=torch.cat([step.x for step in steps]), x0=torch.cat([step.x0 for step in steps]))
            for steps in zip(*batches, strict=True)]


@torch.no_grad()
def decode(ldm: LDM, z: Tensor) -> list[np.ndarray]:
    """Latents [B, C, h, w], in batches -> pictures uint8 [H, W, 3]."""
    return [picture for b in range(0, len(z), BATCH)
            for picture in data.to_uint8(ldm.decode(z[b:b + BATCH].to(ldm.mean.device)).float().cpu())]


def draw_pictures(ldm: LDM, poses: Tensor, seeds: list[Seed], size: int, **how: object) -> list[np.ndarray]:
    """Pictures uint8 [size, size, 3], one for each pose [B, 17, 3] and seed; `how` as in denoise."""
    return decode(ldm, denoise(ldm, poses, seeds, size, **how)[-1].x)


# ------------------------------------------------------------------------------------------------------- poses

def read_poses(paths: Iterable[str], fit_how: str = "letterbox", frames: int = DEFAULT_FRAMES,
               **how: object) -> tuple[list[np.ndarray], list[str]]:
    """The poses [17, 3] of all files, fitted to the square picture, and a name for each; `how` goes to load_poses.

    Of a file of more than `frames` pictures so many are taken, evenly from the first to the last. Prints what each
    file was taken for.
    """
    poses, names = [], []
    for path in paths:
        found = load_poses(path, **how)
        taken = data.evenly(len(found.poses), frames)
        print(f"{path}: {found.taken_for}" + (f", {len(taken)} of them drawn" if len(taken) < len(found.poses) else ""))
        poses += [fitted(found, i, fit_how) for i in taken]
        names += [name_of(found.pictures[i], found.poses, path) for i in taken]
    return poses, names


def density_of(payload: dict, path: str, needed_by: str | None = None) -> PoseDensity | None:
    """How the training poses of a stage-2 payload lie; None where the file `path` has none.

    ValueError where it has none and the flag `needed_by` cannot do without, and for poses that are damaged.
    """
    poses = checkpoint.training_poses(payload, path)
    if poses is None and needed_by:
        raise ValueError(f"{needed_by} needs poses that the model was trained on, but {path} is a published file, or "
                         f"older than that flag, and has none; leave {needed_by} out, or train stage 2 anew with: "
                         f"{checkpoint.HOW_TO_MAKE['ldm']}")
    return None if poses is None else PoseDensity(poses)


def percent(share: float) -> str:
    """0.979 -> "97 %": 100 % are all of them, so nothing is rounded up."""
    return f"{math.floor(100 * share + 1e-9)} %"             # 0.29 * 100 is a little less than 29


def pull(poses: np.ndarray, names: list[str], density: PoseDensity, typical: float) -> tuple[np.ndarray, list[str]]:
    """The given poses [P, 17, 3] pulled toward the training poses by `typical`, and labels that say how far out each
    is then. Prints a line each, of before and after."""
    pulled = density.typical(poses, typical)
    labels = []
    for name, was, now in zip(names, density.unusual(poses), density.unusual(pulled), strict=True):
        print(f"{name}: further out than {percent(was)} of the training poses"
              + (f"; with --typical {typical:g} than {percent(now)}" if typical else
                 "; --typical 0.5 pulls it halfway to its nearest ones" if was > VERY_UNUSUAL else ""))
        labels.append(f"{name}, further out than {percent(now)}")
    return pulled, labels


def most_common(n: int, density: PoseDensity) -> tuple[np.ndarray, list[str]]:
    """The n most common kinds of training pose [n, 17, 3], and labels that say how dense it is about each."""
    chosen = density.common(n)
    shares = (density.own > density.own[chosen, None]).mean(axis=1)
    return density.poses[chosen], [f"common {i + 1}, denser than {percent(share)}" for i, share in enumerate(shares)]


def poses_of(args: argparse.Namespace) -> tuple[list[np.ndarray], list[str]]:
    """What the pose files hold."""
    how = {"format": args.format, "person": args.person, "canvas": args.canvas, "min_confidence": args.min_confidence}
    if args.motion:
        return read_motion(args.poses, args.fit, args.frames, **how)
    return read_poses(args.poses, args.fit, DEFAULT_FRAMES if args.frames is None or args.morph else args.frames, **how)


def plan_of(args: argparse.Namespace, poses: list[np.ndarray], names: list[str], payload: dict) -> Plan:
    """What is drawn, of the poses that files gave or of those in the checkpoint."""
    needed_by = "--common" if args.common else "--typical" if args.typical else None
    density = density_of(payload, args.ckpt, needed_by)
    if args.common:
        poses, names = most_common(args.common, density)
    elif density and args.motion:                           # too many to talk of each
        poses = density.typical(np.stack(poses), args.typical)
    elif density:
        poses, labels = pull(np.stack(poses), names, density, args.typical)
        names = names if args.morph else labels             # how far out the poses in between are, nobody asked
    poses = np.stack(poses).astype(np.float64)
    if args.morph and len(poses) < 2:
        raise ValueError(f"--morph goes from pose to pose, and there is only {names[0]}; give two or more")
    if args.morph:
        return morph(poses, names, args.frames or DEFAULT_FRAMES, args.seed, args.n)
    return Plan(poses, names, [args.seed + i for i in range(args.n)] * len(poses), args.n)


# ----------------------------------------------------------------------------------------- a picture to start from

class Given(NamedTuple):
    """A picture to start from, as the model sees it."""
    z: Tensor                       # [1, C, h, w] its latent
    pixels: np.ndarray              # uint8 [S, S, 3] what the autoencoder makes of it
    hole: np.ndarray | None         # bool [S, S] what --inpaint draws anew
    hash: str                       # of the pixels given, and of the mask

    def shown(self) -> np.ndarray:
        """uint8 [S, S, 3]; the hole is outlined, one pixel around it."""
        if self.hole is None:
            return self.pixels
        around = F.max_pool2d(torch.from_numpy(self.hole)[None].float(), 3, 1, 1)[0].bool().numpy() & ~self.hole
        return np.where(around[..., None], np.uint8(OUTLINE), self.pixels)


def read_pictures(args: argparse.Namespace) -> list[Image.Image]:
    """The picture of --init, --inpaint or --noise-from, and the mask; [] without. ValueError for what is no picture."""
    paths = [path for path in (args.init or args.inpaint or args.noise_from, args.mask) if path]
    for path in paths:
        if not Path(path).is_file():                        # a pipe would hang
            raise ValueError(f"{path} is a folder, where a picture is needed" if Path(path).is_dir() else
                             f"there is no picture {path}")
    images = [data.read_picture(path) for path in paths]
    if len({image.size for image in images}) > 1:
        (w, h), (mask_w, mask_h) = (image.size for image in images)
        raise ValueError(f"the mask {args.mask} is {mask_w} x {mask_h} and {args.inpaint} {w} x {h}; make them equal")
    if images and len(set(images[0].size)) > 1:
        print(f"{paths[0]}: {images[0].width} x {images[0].height}, its middle square is taken")
    return images


def encode(ldm: LDM, images: list[Image.Image], size: int) -> Given:
    """The picture, and the mask if there is one, at the model's size; a latent cell is drawn anew where any of its
    pixels is white."""
    squares = [data.to_square(image, data.NO_POSE, size)[0] for image in images]
    with torch.no_grad():
        z = ldm.encode(data.to_tensor(squares[0])[None].to(ldm.mean.device))
    hole = squares[1].mean(axis=-1) >= 128 if len(squares) > 1 else None
    if hole is not None and not hole.any():
        raise ValueError("the mask has no white in it, so nothing would be drawn anew; white is what is")
    pixels = {str(i): torch.from_numpy(square) for i, square in enumerate(squares)}
    return Given(z, decode(ldm, z)[0], hole, checkpoint.hash_of(pixels))


def start_from(ldm: LDM, given: Given, args: argparse.Namespace, pose: Tensor) -> dict[str, object]:
    """What `sample` is told about it. `pose` [1, 17, 3] is that of --noise-from where the model knows no other way."""
    if args.init:
        timesteps = visited(ldm, args.sampler, args.steps, args.spacing)    # a share of T, so as noisy in any spacing
        return {"given": given.z, "skip": int((timesteps >= args.strength * ldm.schedule["timesteps"]).sum())}
    if args.inpaint:
        cell = ldm.vq.config.factor
        hole = F.max_pool2d(torch.from_numpy(given.hole)[None, None].float(), cell) > 0     # [1, 1, h, w]
        return {"given": given.z, "known": ~hole.to(given.z.device), "rounds": args.rounds}
    diffusion = Diffusion(**ldm.schedule)
    eps_fn = guided(diffusion.eps_model(ldm), pose.to(given.z.device), 0.0 if ldm.knows_null else 1.0)
    *_, last = tqdm(invert(diffusion, eps_fn, given.z, args.steps, args.spacing),
                    desc="inverting", unit="step", total=how_many_steps(ldm, "ddim", args.steps, args.spacing))
    return {"noise": last.x}


# -------------------------------------------------------------------------------------------------- what is written

def grid_of(plan: Plan, pictures: list[np.ndarray], given: np.ndarray | None) -> dict[str, object]:
    """A row a pose: the skeleton, the picture given, the samples. Arguments of plots.save_grid, as below."""
    size, n, extra = pictures[0].shape[0], plan.n, [] if given is None else [given]
    rows = [[draw(pose, size), *extra, *pictures[p * n:(p + 1) * n]] for p, pose in enumerate(plan.poses)]
    return {"rows": rows, "labels": plan.names,
            "columns": ["pose", *["given"] * len(extra), *(f"seed {seed}" for seed in plan.seeds[:n])]}


def sheet_of(plan: Plan, pictures: list[np.ndarray], given: np.ndarray | None) -> dict[str, object]:
    """A contact sheet of a motion: lines of frames, the skeletons and below each its samples."""
    n, rows, labels, captions = plan.n, [], [], []
    frames = [[draw(plan.poses[p], pictures[0].shape[0]), *pictures[p * n:(p + 1) * n], plan.names[p]]
              for p in data.evenly(len(plan.poses), SHEET_MOST)]
    if given is not None:
        frames.insert(0, [None, given, *[None] * (n - 1), "given"])
    for first in range(0, len(frames), SHEET_ACROSS):
        *lines, names = zip(*frames[first:first + SHEET_ACROSS], strict=True)
        rows += [list(line) for line in lines]
        labels += ["pose", *(f"sample {i + 1}" for i in range(n))]
        captions += [[] for _ in range(n)] + [list(names)]
    return {"rows": rows, "labels": labels, "captions": captions}


def film_of(plan: Plan, steps: list[Step], ldm: LDM, given: np.ndarray | None) -> dict[str, object]:
    """Two rows a picture: x_t after the steps named above, and the x0 that the network predicted in them."""
    noisy, clean = (zip(*(decode(ldm, getattr(step, name)) for step in steps), strict=True) for name in ("x", "x0"))
    rows, labels = [], []
    for i, (x, x0) in enumerate(zip(noisy, clean, strict=True)):
        p = i // plan.n
        rows += [[draw(plan.poses[p], x[0].shape[0]), *x], [given, *x0]]
        labels += [f"{plan.names[p]}, seed {plan.seeds[i]}: x_t", "x0 predicted"]
    return {"rows": rows, "labels": labels, "columns": ["pose", *(f"step {s.i + 1}, t = {s.t}" for s in steps)]}


def animate(path: Path, plan: Plan, pictures: list[np.ndarray], fps: float) -> None:
    """The skeleton and beside it the samples, frame after frame."""
    n, size = plan.n, pictures[0].shape[0]
    plots.save_animation(path, [np.concatenate([draw(pose, size), *pictures[p * n:(p + 1) * n]], axis=1)
                                for p, pose in enumerate(plan.poses)], fps)


def sheet_and_animation(args: argparse.Namespace) -> tuple[Path, Path | None]:
    """--out, and the moving picture of a motion: walk.png and walk.gif, or for --out walk.webp walk.png and that."""
    out = Path(args.out)
    if not (args.motion or args.morph):
        return out, None
    if out.suffix.lower() in (".gif", ".webp"):
        return out.with_suffix(".png"), out
    return out, out.with_suffix(".gif")


def write_separate(folder: Path, plan: Plan, pictures: list[np.ndarray], record: dict, command: str) -> None:
    """Each picture at its own size in a PNG of its own, which says how to draw it again: with those beside it in the
    network, for sums differ in their last bit from one size of batch to another."""
    poses = plan.poses.repeat(plan.n, axis=0)
    for i, picture in enumerate(pictures):
        first = i - i % BATCH
        names = [plan.names[k // plan.n] for k in range(first, min(first + BATCH, len(pictures)))]
        batch = Plan(poses[first:first + BATCH], names, plan.seeds[first:first + BATCH], 1, i - first)
        name = re.sub(r"[^\w.-]+", "-", plan.names[i // plan.n].split(",")[0])[:80]
        plots.save_picture(folder / f"{i + 1:04d}-{name}.png", picture, words(record, batch, command))


def save_latents(path: str, z: Tensor, plan: Plan) -> None:
    """An .npz of arrays alone: latents float32 [B, C, h, w], poses [B, 17, 3] and seeds [B]; of a morph, which lies
    between two seeds, also the second ones and the share of the way to them."""
    pairs = [seed if isinstance(seed, tuple) else (seed, seed, 0.0) for seed in plan.seeds]
    a, b, share = (np.array(column) for column in zip(*pairs, strict=True))
    arrays = {"latents": z.numpy(), "poses": plan.poses.repeat(plan.n, axis=0), "seeds": a}
    np.savez(path, **arrays, **({"seeds_toward": b, "share": share} if share.any() else {}))


# ------------------------------------------------------------------------------------------- the same picture again

def record_of(args: argparse.Namespace, digest: str, given: Given | None) -> dict:
    """Flags and files, resolved, as a PNG says them of itself."""
    stepwise = ("steps", "eta", "spacing")
    flags = {name: value for name in REPEATED if (value := getattr(args, name)) is not None and value is not False
             and not (args.sampler == "ddpm" and name in stepwise)}
    return {"format": RECORD, "flags": flags, "checkpoint": digest, "given": given and given.hash,
            "torch": torch.__version__}


def words(record: dict, plan: Plan, command: str) -> dict[str, str]:
    """What a PNG says of itself: the command for people, the record for --repeat."""
    names = ["".join(c if c.isprintable() else "?" for c in name) for name in plan.names]
    poses = {"poses": plan.poses.tolist(), "names": names, "seeds": plan.seeds, "n": plan.n, "only": plan.only}
    return {"command": command.encode("ascii", "backslashreplace").decode(), "record": json.dumps(record | poses)}


def read_record(path: str) -> tuple[dict, Plan]:
    """What a PNG says of itself. Anybody may have written it, so it is data: nothing in it is run or written to, and
    ValueError, in one sentence, for whatever does not have the form that `words` gives it."""
    if not Path(path).is_file():
        raise ValueError(f"--repeat {path}: there is no such file")
    data.read_picture(path)                                 # what cannot be compared at the end is refused here
    try:
        with Image.open(path, formats=["PNG"]) as image:
            text = image.info.get("record")
    except Exception as e:                                  # PIL's decoders raise a dozen types on damaged files
        raise ValueError(f"--repeat {path}: cannot be read as a PNG ({e})") from None
    if not isinstance(text, str):
        raise ValueError(f"--repeat {path}: it does not say how it was drawn; PNGs that sample.py wrote do, unless "
                         "another program has saved them since")
    try:
        record = json.loads(text)
        flags, names, n, only = record["flags"], record["names"], record["n"], record["only"]
        poses = np.array(record["poses"], dtype=np.float64)
        seeds = [tuple(seed) if isinstance(seed, list) else seed for seed in record["seeds"]]
        texts = [*names, record["checkpoint"], record["torch"], record["given"] or "",
                 *(value for value in flags.values() if isinstance(value, str))]
        sound = (record["format"] == RECORD and "ckpt" in flags and all(map(is_flag, flags.items()))
                 and all(isinstance(t, str) and len(t) < 4096 and t.isprintable() for t in texts)
                 and poses.shape == (len(names), *data.NO_POSE.shape) and np.abs(poses).max() <= FAR
                 and set(np.unique(poses[..., 2])) <= {0, 1} and type(n) is int and n >= 1
                 and len(seeds) == n * len(poses) and all(map(is_seed, seeds))
                 and (only is None or type(only) is int and 0 <= only < len(seeds)))
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        sound = False
    if not sound:
        raise ValueError(f"--repeat {path}: what it says about itself is damaged, or another version wrote it")
    return record, Plan(poses, names, seeds, n, only)


def is_flag(item: tuple[str, object]) -> bool:
    """May a record say this of a flag? A path that leads to another machine is not followed."""
    name, value = item
    allowed = REPEATED.get(name, ())
    if isinstance(allowed, list):
        return isinstance(value, list) and [type(v) for v in value] == allowed
    return (value in allowed if isinstance(allowed, tuple) else type(value) is allowed) and (
        not isinstance(value, str) or not value.startswith(("//", "\\\\")))


def is_seed(seed: object) -> bool:
    whole = seed[:2] if isinstance(seed, tuple) else (seed,)
    return all(type(s) is int and 0 <= s < MOST_SEEDS for s in whole) and (
        not isinstance(seed, tuple) or len(seed) == 3 and type(seed[2]) is float and 0 < seed[2] < 1)


def recall(args: argparse.Namespace) -> tuple[dict, Plan]:
    """The record of --repeat, with its flags in `args`, where files that were moved can be named anew."""
    unsaid = vars(parse_args([]))
    for name, value in vars(args).items():
        if value != unsaid[name] and name not in MAY_GO_WITH_REPEAT:
            raise ValueError(f"--repeat takes all from {args.repeat}; leave {flag(name)} out")
    record, plan = read_record(args.repeat)
    for name in ("ckpt", *PICTURES):
        was, now = record["flags"].get(name), getattr(args, name)
        if now and not was:
            raise ValueError(f"{args.repeat} was drawn without {flag(name)}; leave it out")
        if was and not Path(now or was).is_file():
            raise ValueError(f"{args.repeat} was drawn with {flag(name)} {now or was}, which is gone; if it was moved, "
                             f"say {flag(name)} and where it is now")
    for name, value in record["flags"].items():
        if getattr(args, name) == unsaid[name]:
            setattr(args, name, value)
    if plan.only is not None:
        args.morph = args.motion = args.film = False
        args.fps = None
    args.n = plan.n
    if args.out is None:
        args.out = "again.png"
    if Path(args.out).resolve() == Path(args.repeat).resolve():
        raise ValueError(f"--out is {args.out}, the picture that --repeat reads; give another name")
    return record, plan


def check_same(args: argparse.Namespace, record: dict, digest: str, given: Given | None) -> None:
    """ValueError where the files are not those that the picture of --repeat was drawn from."""
    if digest != record["checkpoint"]:
        raise ValueError(f"{args.repeat} was drawn by a checkpoint of hash {record['checkpoint']}, {args.ckpt} has "
                         f"{digest}: another model, or trained further since; name the right one with --ckpt")
    if given and given.hash != record["given"]:
        files = " and ".join(path for path in (args.init, args.inpaint, args.noise_from, args.mask) if path)
        raise ValueError(f"{args.repeat} was drawn from other pixels than {files} has now; name the right picture")


def compare(path: str, record: dict, made: Image.Image) -> str:
    """Is it the same picture, in a sentence."""
    was, now = np.asarray(data.read_picture(path)), np.asarray(made.convert("RGB"))
    if was.shape == now.shape and (was == now).all():
        return f"the same as {path}, bit for bit"
    off = np.abs(was.astype(int) - now).max(axis=-1) if was.shape == now.shape else np.ones(1)
    return (f"not quite the same as {path}: {(off > 0).mean():.1%} of the pixels differ" +
            (f", by at most {off.max()} of 255" if was.shape == now.shape else "") +
            f"; torch was {record['torch']} and is {torch.__version__}; another machine, or another number of threads, "
            "rounds differently too")


# ----------------------------------------------------------------------------------------------------- the command

def flag(name: str) -> str:
    """no_ema -> --no-ema, as a person types it."""
    return "POSE" if name == "poses" else "-n" if name == "n" else "--" + name.replace("_", "-")


def canvas(text: str) -> tuple[int, int]:
    """"768x512" -> (768, 512): width, height."""
    match = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text} is not a size; width x height in pixels is needed, as in 768x512")
    return int(match[1]), int(match[2])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="sample.py {POSE.json ... | --common N | --repeat PNG} [--flags; --help "
                                     "explains them]")
    add = parser.add_argument_group("poses").add_argument
    add("poses", nargs="*", metavar="POSE", help="pose files of any format below, told by their content")
    add("--common", type=int, metavar="N", help="instead of pose files: the N most common kinds of pose that the model "
        "was trained on")
    add("--typical", type=float, default=0.0, metavar="A", help="pull each pose toward the training poses it is "
        "nearest to: 0 leaves it as given (the default), 1 goes all the way to their middle")
    add("--format", choices=FORMATS, metavar="NAME",
        help=f"read them as this, whatever they look like: {', '.join(FORMATS)}")
    add("--person", type=int, metavar="K", help="the K-th person of each picture, from 1, in the file's order, those "
        "without a joint left out (default: the largest)")
    add("--frames", type=int, metavar="N", help="of a file of more pictures or frames, draw N, evenly from the first "
        f"to the last (default {DEFAULT_FRAMES}; with --motion all of them); with --morph, draw N in all")
    add("--canvas", type=canvas, metavar="WxH", help="size of the posed picture, where a file does not say it")
    add("--min-confidence", type=float, default=MIN_CONFIDENCE, metavar="C",
        help="below it a joint counts as missing (default %(default)s)")
    add("--fit", choices=("letterbox", "crop"), default="letterbox", help="a pose from a picture that is not square: "
        "all of it with bars (the default), or the square of its short side, around the person; never squeezed")

    add = parser.add_argument_group("model").add_argument
    add("--ckpt", metavar="FILE", help=f"checkpoint of stage 2 (default {DEFAULT_CKPT}, or until it is "
        "there the toy model that ships)")
    add("--preset", metavar="NAME", help="what the tensors of a published CompVis checkpoint do not tell: "
        f"{', '.join(compvis.PUBLISHED)}; ours need none")
    add("--no-ema", action="store_true", help="the raw weights instead of their moving average")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    add("--amp", choices=checkpoint.AMP, default="off", help="compute the network in half precision, which is faster "
        "where the hardware does; latents stay float32 (default off)")

    add = parser.add_argument_group("sampling").add_argument
    add("-n", type=int, help="pictures a pose (default 2; 1 with --motion, --morph and --noise-from)")
    add("--seed", type=int, default=0)
    add("--sampler", choices=SAMPLERS, help="dpm_solver is DPM-Solver++(2M), which needs the fewest steps (default "
        f"{DEFAULT_SAMPLER}; ddim with --inpaint, --noise-from and published checkpoints)")
    add("--steps", type=int, help=f"1 to 1000 (default {DEFAULT_STEPS[DEFAULT_SAMPLER]}, with ddim "
        f"{DEFAULT_STEPS['ddim']}; ddpm takes all)")
    add("--eta", type=float, help="noise that each step adds, 0 to 1 (default "
        f"{DEFAULT_ETA:g}, or 0 for a model that was trained without dropping poses)")
    add("--spacing", choices=SPACINGS, help="of the timesteps: even in t, even in the logarithm of signal to noise, or "
        "the reference's, which not all --steps allow (default even, lambda for dpm_solver, uniform for a published "
        "checkpoint)")
    add("--guidance", type=float, metavar="W", help="1: as trained, 0: without the pose, above 1: more of the pose "
        f"(default {DEFAULT_GUIDANCE:g}, or 1 for a model that was trained without dropping poses)")
    add("--interval", type=int, nargs=2, metavar=("LO", "HI"), help="guide at the timesteps LO to HI alone, of 0, the "
        "cleanest, to 999 (default all)")
    add("--rescale", type=float, default=0.0, metavar="PHI", help="0 to 1: takes back how much larger "
        "guidance makes eps, which is glaring pictures where W is large (default %(default)g: nothing)")

    add = parser.add_argument_group("starting from a picture (its middle square)").add_argument
    add("--init", metavar="IMAGE", help="put noise on this picture and denoise that in the pose")
    add("--strength", type=float, metavar="S", help="how much noise for --init: 0 is the picture itself, 1 nothing of "
        f"it (default {DEFAULT_STRENGTH})")
    add("--inpaint", metavar="IMAGE", help="draw a part of this picture anew, and keep the rest")
    add("--mask", metavar="IMAGE", help="the part for --inpaint, in white on black, of the same size")
    add("--rounds", type=int, metavar="R", help="how often --inpaint makes each step: more fits the part better to the "
        f"rest, in as many times the time (default {DEFAULT_ROUNDS})")
    add("--noise-from", metavar="IMAGE", help="the noise that this picture would come from, without a pose, instead of "
        "a seed's: something of its colours in other poses (DDIM inversion; --guidance 0 gives the picture back)")

    add = parser.add_argument_group("series").add_argument
    add("--morph", action="store_true", help="from each pose to the next, joint by joint, in --frames pictures, and "
        "from one seed's noise to the next one's")
    add("--motion", action="store_true", help="the poses are frames: one seed for all; folders are taken too, and each "
        "file in them is a frame. Writes a contact sheet and, beside it, a .gif, or for --out NAME.webp that")
    add("--fps", type=float, help=f"frames a second of the moving picture, 1 to 50 (default {DEFAULT_FPS:g})")
    add("--film", action="store_true", help=f"show {FILM} of the steps: x_t, and x0 as predicted in them")

    add = parser.add_argument_group("what is written").add_argument
    add("--out", metavar="FILE", help="the picture to write, all pictures on one sheet (default samples.png)")
    add("--grid", action=argparse.BooleanOptionalAction, default=True, help="that sheet; --no-grid leaves it out, "
        "where --separate, --motion or --morph write pictures")
    add("--separate", metavar="DIR", help="each picture in a PNG of its own besides, without words or frame")
    add("--save-latents", metavar="FILE", help="latents, poses and seeds besides, as an .npz of plain arrays")
    add("--repeat", metavar="PNG", help="draw the picture of this PNG again, which says by itself how; --ckpt, --init "
        "and the like say where files are that were moved since (default --out again.png)")
    return parser.parse_intermixed_args(argv)


def check_args(args: argparse.Namespace) -> None:
    """ValueError, in one sentence, for a value that cannot be; settles what follows from the flags alone."""
    check_together(args)
    if args.n is None:
        args.n = 1 if args.motion or args.morph or args.noise_from else 2
    if args.init and args.strength is None:
        args.strength = DEFAULT_STRENGTH
    if args.inpaint and args.rounds is None:
        args.rounds = DEFAULT_ROUNDS
    if (args.motion or args.morph) and args.fps is None:
        args.fps = DEFAULT_FPS
    if args.noise_from:
        args.eta = 0.0
    for name, low, high, what in (
            ("n", 1, None, ""), ("common", 1, None, ""), ("typical", 0, 1, ", the first the pose as given"),
            ("frames", 2 if args.morph else 1, None, " with --morph" if args.morph else ""), ("person", 1, None, ""),
            ("min_confidence", 0, 1e9, ", mostly to 1"), ("seed", 0, MOST_SEEDS - 1, ""), ("rounds", 1, None, ""),
            ("strength", 0, 1, ", the picture as it is and nothing of it"), ("fps", 1, 50, ""),
            ("rescale", 0, 1, "")):
        value = getattr(args, name)
        if value is not None and not low <= value <= (math.inf if high is None else high):
            raise ValueError(f"{flag(name)} is {value}; it must be at least {low}"
                             + (f" and at most {high}" if high else "") + what)
    if args.interval is not None and not 0 <= args.interval[0] <= args.interval[1]:
        raise ValueError(f"--interval is {args.interval[0]} to {args.interval[1]}; the first must be 0 or more and not "
                         "above the second")
    if args.sampler is None and (args.inpaint or args.noise_from):
        args.sampler = "ddim"
    if args.guidance is not None and not math.isfinite(args.guidance):
        raise ValueError(f"--guidance is {args.guidance}; it must be a finite number")
    args.ckpt = args.ckpt or default_ckpt()
    args.device = checkpoint.find_device(args.device)
    if args.amp == "fp16" and args.device.startswith("cpu"):
        raise ValueError("--amp fp16 needs a CUDA GPU; use --amp bf16 or off")
    check_out(args)


def default_ckpt() -> str:
    """The model that was trained last in the default folder, or the one that ships; a line says when it is that."""
    if Path(DEFAULT_CKPT).exists() or not SHIPPED.exists():
        return DEFAULT_CKPT
    shipped = os.path.relpath(SHIPPED)
    print(f"drawing with the toy model that ships, {shipped}, for there is no {DEFAULT_CKPT} yet; --ckpt names another")
    return shipped


def check_together(args: argparse.Namespace) -> None:
    """ValueError, in one sentence, for flags that contradict one another or lack what they need."""
    if not args.poses and args.common is None and not args.repeat:
        raise ValueError("there is nothing to draw; name pose files, or let --common 9 take the poses that the model "
                         "knows best")
    if args.poses and args.common is not None:
        raise ValueError(f"--common takes poses from the checkpoint, so {args.poses[0]} would not be drawn; leave one "
                         "of them out")
    for a, b, why in (("init", "inpaint", "each says where sampling starts"),
                      ("init", "noise_from", "each says where sampling starts"),
                      ("inpaint", "noise_from", "each says where sampling starts"),
                      ("morph", "noise_from", "the noise goes from one seed's to the next one's, or is the picture's"),
                      ("morph", "motion", "the poses are ends of a way, or all of its frames"),
                      ("common", "motion", "common poses are no frames"),
                      ("common", "typical", "common poses are typical already"),
                      ("film", "motion", "a film shows the steps of a picture, a motion the last of them"),
                      ("film", "morph", "a film shows the steps of a picture, a morph the last of them"),
                      *(("common", name, "common poses come from no file")
                        for name in ("canvas", "person", "frames", "format"))):
        if getattr(args, a) and getattr(args, b):
            raise ValueError(f"{flag(a)} and {flag(b)} do not go together: {why}; leave one of them out")
    for name, wanted in (("strength", ["init"]), ("mask", ["inpaint"]), ("rounds", ["inpaint"]),
                         ("fps", ["motion", "morph"])):
        if getattr(args, name) is not None and not any(getattr(args, other) for other in wanted):
            raise ValueError(f"{flag(name)} goes with {' or '.join(map(flag, wanted))}; without, leave it out")
    if not (args.grid or args.separate or args.motion or args.morph):
        raise ValueError("--no-grid leaves the sheet out, and then there is nothing to write; add --separate DIR")
    if args.film and not args.grid:
        raise ValueError("--film is a sheet, and --no-grid leaves that out; leave one of them out")
    if args.inpaint and not args.mask:
        raise ValueError(f"--inpaint {args.inpaint} needs --mask IMAGE, of the same size and white where to draw anew")
    if args.sampler not in (None, "ddim") and (args.inpaint or args.noise_from):
        raise ValueError(f"{'--inpaint' if args.inpaint else '--noise-from'} is done with ddim, not --sampler "
                         f"{args.sampler}; leave that out")
    if args.noise_from and (args.eta or args.n not in (None, 1)):
        raise ValueError("--noise-from is one noise that nothing is added to, so there is one picture of a pose; leave "
                         "-n and --eta out")
    if args.sampler == "ddpm" and (args.steps, args.eta, args.spacing) != (None, None, None):
        raise ValueError("--sampler ddpm takes all steps and its own noise; leave --steps, --eta and --spacing out, or "
                         "use ddim or dpm_solver")


def check_out(args: argparse.Namespace) -> None:
    """Before the pictures are drawn, not after."""
    args.out = args.out or "samples.png"
    suffixes = (".png", ".jpg", ".jpeg", ".webp", *([".gif"] if args.motion or args.morph else []))
    if Path(args.out).suffix.lower() not in suffixes:
        raise ValueError(f"--out is {args.out}; its name must end in .png, .jpg or .webp")
    if args.save_latents and Path(args.save_latents).suffix != ".npz":
        raise ValueError(f"--save-latents is {args.save_latents}; its name must end in .npz")
    sheet, moving = sheet_and_animation(args)
    files = (*args.poses, args.ckpt, *(getattr(args, name) for name in PICTURES))
    read = {Path(path).resolve() for path in files if path}
    for name, path in (("out", args.grid and sheet), ("out", moving), ("save_latents", args.save_latents),
                       ("separate", args.separate and Path(args.separate) / "0001.png")):
        if path and Path(path).resolve() in read:
            raise ValueError(f"{flag(name)} is {path}, which is read here too and would be lost; give another name")
        if path:
            check_writable(Path(path), f"{flag(name)} {getattr(args, name)}")


def check_writable(path: Path, asked: str) -> None:
    """OSError or ValueError where what was `asked` for ("--out FILE") cannot be written; leaves no file, nor
    changes one that is there."""
    data.make_folder(path.parent, asked)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the name of a file in it")
    there = path.exists()
    path.open("ab").close()
    if not there:
        path.unlink()


def check_fits(path: Path, rows: int, columns: int, size: int) -> None:
    """ValueError where a sheet of so many pictures would be longer than its format can be."""
    side = 200 + max(rows, columns) * (size * plots.grid_scale(size) + 30)
    most = LONGEST_SIDE.get(path.suffix.lower(), math.inf)
    if side > most:
        raise ValueError(f"--out is {path}, but {rows} rows of {columns} would be about {side} pixels long and such a "
                         f"file can have {most}; let its name end in .png, or draw fewer at a time")


def shape_of_sheet(args: argparse.Namespace, plan: Plan, given: bool) -> tuple[int, int]:
    """Rows and columns of what grid_of, sheet_of or film_of lays out, a `given` picture included."""
    P, n = len(plan.poses), plan.n
    if args.film:
        return 2 * P * n, FILM + 1
    if args.motion or args.morph:
        return (n + 1) * math.ceil((min(P, SHEET_MOST) + given) / SHEET_ACROSS), SHEET_ACROSS
    return P, n + 1 + given


def ask_model(args: argparse.Namespace, ldm: LDM) -> None:
    """Sets --sampler, --steps, --eta, --guidance and --spacing to what the model wants, where nobody says; ValueError
    where it cannot be guided."""
    vars(args).update(settings(ldm, **settings_of(args)))
    if args.guidance != 1 and not ldm.knows_null:
        raise ValueError(f"--guidance is {args.guidance:g}, but {args.ckpt} was trained without dropping poses, so it "
                         "has no picture of no pose; leave --guidance out")


def check_guidance(args: argparse.Namespace, ldm: LDM) -> None:
    """ValueError for an --interval or --rescale that would do nothing."""
    if args.interval and args.interval[0] >= ldm.schedule["timesteps"]:
        raise ValueError(f"--interval is {args.interval[0]} to {args.interval[1]}, but timesteps end at "
                         f"{ldm.schedule['timesteps'] - 1}")
    if args.guidance in (0, 1) and (args.interval or args.rescale):
        raise ValueError(f"--interval and --rescale change guidance, but --guidance is {args.guidance:g} and changes "
                         "nothing; leave them out, or give more of it")


def title_of(args: argparse.Namespace, called: dict, steps: int, step: int) -> str:
    """How the pictures were drawn; files as they were called then (`called`), wherever --repeat finds them now."""
    how = SAMPLERS[args.sampler]
    if args.sampler != "ddpm":
        how += f" {steps} steps {args.spacing}, eta {args.eta:g}"
    start = (f", from {Path(called['init']).name} at strength {args.strength:g}" if args.init else
             f", {Path(called['inpaint']).name} drawn anew in the outline, rounds {args.rounds}" if args.inpaint else
             f", noise of {Path(called['noise_from']).name}" if args.noise_from else "")
    return f"{how}, guidance {args.guidance:g}{start}, {called['ckpt']} step {step}"


def run(args: argparse.Namespace, command: str) -> str:
    """The whole of it; returns what to say at the end."""
    record, plan = recall(args) if args.repeat else (None, None)
    check_args(args)
    images = read_pictures(args)
    poses, names = ([], []) if plan else poses_of(args)
    ldm, payload = checkpoint.load_ldm(args.ckpt, args.device, args.preset, ema=not args.no_ema)
    if "source" in payload:
        print(compvis.describe(payload, args.ckpt))
    plan = plan or plan_of(args, poses, names, payload)
    ask_model(args, ldm)
    check_guidance(args, ldm)
    size, began, (out, moving) = payload["config"]["size"], time.monotonic(), sheet_and_animation(args)
    if args.grid and plan.only is None:
        check_fits(out, *shape_of_sheet(args, plan, bool(images)), size)
    if moving:
        check_fits(moving, 1, plan.n + 1, size)
    digest, given = checkpoint.hash_of(ldm.state_dict()), encode(ldm, images, size) if images else None
    if args.repeat:
        check_same(args, record, digest, given)
    ldm.unet.to(checkpoint.AMP[args.amp])

    every = torch.from_numpy(plan.poses).repeat_interleave(plan.n, dim=0)               # [P n, 17, 3]
    start = start_from(ldm, given, args, every[:1]) if given else {}
    steps = denoise(ldm, every, plan.seeds, size, film=FILM if args.film else 1, interval=args.interval,
                    rescale=args.rescale, **settings_of(args), **start)
    pictures = decode(ldm, steps[-1].x)
    if args.inpaint:            # in pixels: a decoder looks beyond its cell, so kept latents alone keep no pixel
        pictures = [np.where(given.hole[..., None], picture, given.pixels) for picture in pictures]

    record = record or record_of(args, digest, given)
    if plan.only is not None:
        made = Image.fromarray(pictures[plan.only])
        plots.save_picture(out, made, words(record, plan, command))
    elif args.grid:
        shown = given.shown() if given else None
        grid = (film_of(plan, steps, ldm, shown) if args.film else sheet_of(plan, pictures, shown) if moving else
                grid_of(plan, pictures, shown))
        if args.noise_from and "columns" in grid and not args.film:
            grid["columns"][-1] = "from its noise"                      # and no seed's
        n_steps = how_many_steps(ldm, args.sampler, args.steps, args.spacing)
        made = plots.save_grid(out, **grid, title=title_of(args, record["flags"], n_steps, payload["step"]),
                               words=words(record, plan, command))
    if moving:
        animate(moving, plan, pictures, args.fps)
    if args.separate:
        write_separate(Path(args.separate), plan, pictures, record, command)
    if args.save_latents:
        save_latents(args.save_latents, steps[-1].x, plan)
    written = [str(path) for path in (args.grid and out, moving, args.separate, args.save_latents) if path]
    return (f"{' and '.join(written)}: {len(pictures)} pictures in {time.monotonic() - began:.1f} s"
            + (f"; {compare(args.repeat, record, made)}" if args.repeat else ""))


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        print(run(args, shlex.join(["sample.py", *(sys.argv[1:] if argv is None else argv)])))
    except (ValueError, OSError) as e:
        print(f"sample.py: {e}", file=sys.stderr)
        return 2
    except RuntimeError as e:
        if not checkpoint.out_of_memory(e):
            raise
        print(f"sample.py: the memory of {args.device} is too small for this; draw fewer at a time, or give --device "
              "cpu", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nsample.py: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
