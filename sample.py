"""Draw pictures in poses of your choice: for each pose file a row, the skeleton and then n samples.

    python sample.py examples/poses/*.json
    python sample.py mine.json --ckpt runs/mine/last.pt -n 4 --steps 100 --guidance 3 --out mine.png
    python sample.py mine.json --typical 0.5        pulled halfway toward the poses that the model was trained on
    python sample.py --common 9                     no pose file: the nine most common kinds of those
    python sample.py wide.json --canvas 1920x1080 --person 2 --fit crop
    python sample.py mine.json --ckpt model.ckpt --preset danbooru --steps 500 --eta 0    a published CompVis checkpoint

A pose file (COCO, OpenPose, MediaPipe, YOLO, ...: README.md lists them) is told by its content, whatever its name;
each picture or frame in it gives one pose, that of its largest person.
Picture i of a row has seed --seed + i and depends on nothing else: not on the other poses, nor on how many there are.
"""
from __future__ import annotations

import argparse
import math
import re
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import checkpoint
import data
from diffusion import Diffusion, Step, ddim, ddim_table, ddpm, dpm_solver, guided, per_image_noise
from keypoints import FORMATS, MIN_CONFIDENCE, PoseDensity, draw, fit, load_poses

BATCH = 16                      # pictures in the network at once
DEFAULT_STEPS = 50              # of DDIM
SAMPLERS = {"ddim": "DDIM", "dpm_solver": "DPM-Solver++(2M)", "ddpm": "DDPM"}
DEFAULT_FRAMES = 8              # of a file that holds a video or a whole dataset
VERY_UNUSUAL = 0.99             # further out than this share of the training poses: --typical is suggested


def sample(ldm: checkpoint.LDM, poses: Tensor, seeds: list[int], size: int, sampler: str = "ddim",
           steps: int = DEFAULT_STEPS, eta: float = 0.0, guidance: float = 1.0,
           spacing: str = "even", interval: tuple[int, int] | None = None, rescale: float = 0.0) -> Iterator[Step]:
    """Denoises one latent a pose, [B, 17, 3] with seeds [B], for pictures of size x size; yields every step.

    The last step's x [B, C, h, w] is the sample: `ldm.decode` makes the pictures [B, 3, size, size] of it.
    """
    diffusion = Diffusion(**ldm.schedule)
    shape = (ldm.vq.config.embed_dim, size // ldm.vq.config.factor, size // ldm.vq.config.factor)
    device = ldm.mean.device
    x_T, noise_fn = per_image_noise(seeds, shape)
    eps_fn = guided(*ldm.prepared(poses.to(device), shape[1:]), guidance, interval, rescale)
    if sampler == "ddpm":
        return ddpm(diffusion, eps_fn, x_T.to(device), noise_fn)
    solver = {"ddim": ddim, "dpm_solver": dpm_solver}[sampler]
    return solver(diffusion, eps_fn, x_T.to(device), steps, eta, noise_fn, spacing)


def how_many_steps(ldm: checkpoint.LDM, sampler: str, steps: int, spacing: str) -> int:
    """Uniform spacing may take more steps than asked for (500 for 350), as the reference does; ddpm takes all."""
    diffusion = Diffusion(**ldm.schedule)
    return diffusion.timesteps if sampler == "ddpm" else len(ddim_table(diffusion, steps, spacing=spacing)[0])


@torch.no_grad()
def draw_pictures(ldm: checkpoint.LDM, poses: Tensor, seeds: list[int], size: int, **how: object) -> list[np.ndarray]:
    """Pictures uint8 [size, size, 3], one for each pose [B, 17, 3] and seed, in batches, with a progress bar."""
    total = how_many_steps(ldm, how["sampler"], how["steps"], how["spacing"])
    pictures: list[np.ndarray] = []
    with tqdm(total=total * math.ceil(len(poses) / BATCH), desc="sampling", unit="step", dynamic_ncols=True) as bar:
        for i in range(0, len(poses), BATCH):
            z = None
            for step in sample(ldm, poses[i:i + BATCH], seeds[i:i + BATCH], size, **how):
                z = step.x
                bar.update()
            pictures += list(data.to_uint8(ldm.decode(z).float().cpu()))
    return pictures


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
        for i in taken:
            size = found.sizes[i] or (1, 1)                 # nothing said, nothing to correct
            poses.append(fit(found.poses[i], size, fit_how))
            names.append(Path(path).stem + (f" {found.pictures[i]}" if len(found.poses) > 1 else ""))
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


def canvas(text: str) -> tuple[int, int]:
    """"768x512" -> (768, 512): width, height."""
    match = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text} is not a size; width x height in pixels is needed, as in 768x512")
    return int(match[1]), int(match[2])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="sample.py {POSE.json ... | --common N} [--flags; --help explains them]")
    add = parser.add_argument
    add("poses", nargs="*", metavar="POSE", help="pose files of any format below, told by their content")
    add("--common", type=int, metavar="N", help="instead of pose files: the N most common kinds of pose that the model "
        "was trained on")
    add("--typical", type=float, default=0.0, metavar="A", help="pull each pose toward the training poses it is "
        "nearest to: 0 leaves it as given (the default), 1 goes all the way to their middle")
    add("--format", choices=FORMATS, metavar="NAME",
        help=f"read them as this, whatever they look like: {', '.join(FORMATS)}")
    add("--person", type=int, metavar="K", help="the K-th person of each picture, from 1, in the file's order, those "
        "without a joint left out (default: the largest)")
    add("--frames", type=int, default=DEFAULT_FRAMES, metavar="N", help="of a file of more pictures or frames, draw N, "
        "evenly from the first to the last (default %(default)s)")
    add("--canvas", type=canvas, metavar="WxH", help="size of the posed picture, where a file does not say it")
    add("--min-confidence", type=float, default=MIN_CONFIDENCE, metavar="C",
        help="below it a joint counts as missing (default %(default)s)")
    add("--fit", choices=("letterbox", "crop"), default="letterbox", help="a pose from a picture that is not square: "
        "all of it with bars (the default), or the square of its short side, around the person; never squeezed")
    add("--ckpt", default="runs/ldm/last.pt", metavar="FILE", help="checkpoint of stage 2 (default %(default)s)")
    add("--preset", metavar="NAME", help="what the tensors of a published CompVis checkpoint do not tell: "
        f"{', '.join(checkpoint.PUBLISHED)}; ours need none")
    add("--no-ema", action="store_true", help="the raw weights instead of their moving average")
    add("-n", type=int, default=2, help="pictures a pose (default %(default)s)")
    add("--sampler", choices=SAMPLERS, default="ddim", help="dpm_solver is DPM-Solver++(2M), which needs the fewest "
        "steps (default %(default)s)")
    add("--steps", type=int, help=f"1 to 1000 (default {DEFAULT_STEPS}; ddpm takes all)")
    add("--eta", type=float, help="noise that each step adds, 0 to 1 (default "
        f"{checkpoint.DEFAULT_ETA:g}, or 0 for a model that was trained without dropping poses)")
    add("--spacing", choices=("even", "lambda", "uniform"), help="of the timesteps: even in t, even in the logarithm "
        "of signal to noise, or the reference's, which not all --steps allow (default even, lambda for dpm_solver, "
        "uniform for a published checkpoint)")
    add("--guidance", type=float, metavar="W", help="1: as trained, 0: without the pose, above 1: more of the pose "
        f"(default {checkpoint.DEFAULT_GUIDANCE:g}, or 1 for a model that was trained without dropping poses)")
    add("--interval", type=int, nargs=2, metavar=("LO", "HI"), help="guide at the timesteps LO to HI alone, of 0, the "
        "cleanest, to 999 (default all)")
    add("--rescale", type=float, default=0.0, metavar="PHI", help="0 to 1: takes back how much larger "
        "guidance makes eps, which is glaring pictures where W is large (default %(default)g: nothing)")
    add("--seed", type=int, default=0)
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    add("--out", default="samples.png", metavar="FILE", help="the picture to write (default %(default)s)")
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> None:
    """ValueError, in one sentence, for a value that cannot be."""
    if not args.poses and args.common is None:
        raise ValueError("there is nothing to draw; name pose files, or let --common 9 take the poses that the model "
                         "knows best")
    if args.poses and args.common is not None:
        raise ValueError(f"--common takes poses from the checkpoint, so {args.poses[0]} would not be drawn; leave one "
                         "of them out")
    if args.common is not None and args.common < 1:
        raise ValueError(f"--common is {args.common}; it must be at least 1")
    if not 0 <= args.typical <= 1:
        raise ValueError(f"--typical is {args.typical:g}; it must be between 0, the pose as given, and 1")
    if args.common is not None and args.typical:
        raise ValueError("--typical pulls poses that you give, and those of --common are typical already; leave one of "
                         "them out")
    if args.n < 1:
        raise ValueError(f"-n is {args.n}; it must be at least 1")
    if args.frames < 1 or args.person is not None and args.person < 1:
        raise ValueError(f"--frames is {args.frames} and --person {args.person}; both count from 1")
    if not 0 <= args.min_confidence < math.inf:
        raise ValueError(f"--min-confidence is {args.min_confidence}; it must be a number from 0, mostly to 1")
    if not 0 <= args.seed < 2 ** 63:
        raise ValueError(f"--seed is {args.seed}; it must be a whole number from 0 to 2^63 - 1")
    if args.sampler == "ddpm" and (args.steps, args.eta, args.spacing) != (None, None, None):
        raise ValueError("--sampler ddpm takes all steps and its own noise; leave --steps, --eta and --spacing out, or "
                         "use ddim or dpm_solver")
    if args.interval is not None and not 0 <= args.interval[0] <= args.interval[1]:
        raise ValueError(f"--interval is {args.interval[0]} to {args.interval[1]}; the first must be 0 or more and not "
                         "above the second")
    if not 0 <= args.rescale <= 1:
        raise ValueError(f"--rescale is {args.rescale:g}; it must be between 0 and 1")
    args.steps = DEFAULT_STEPS if args.steps is None else args.steps
    if args.guidance is not None and not math.isfinite(args.guidance):
        raise ValueError(f"--guidance is {args.guidance}; it must be a finite number")
    if Path(args.out).suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ValueError(f"--out is {args.out}; its name must end in .png, .jpg or .webp")
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)       # before the pictures are drawn, not after
    args.device = checkpoint.find_device(args.device)


def ask_model(args: argparse.Namespace, ldm: checkpoint.LDM) -> None:
    """Sets --guidance, --eta and --spacing to what the model wants, where nobody says; ValueError where it cannot be
    guided."""
    args.spacing = args.spacing or ("lambda" if getattr(args, "sampler", "ddim") == "dpm_solver" else ldm.spacing)
    args.guidance = ldm.guidance if args.guidance is None else args.guidance
    args.eta = ldm.eta if args.eta is None else args.eta
    if args.guidance != 1 and not ldm.knows_null:
        raise ValueError(f"--guidance is {args.guidance:g}, but {args.ckpt} was trained without dropping poses, so it "
                         "has no picture of no pose; leave --guidance out")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        check_args(args)
        poses, names = read_poses(args.poses, args.fit, args.frames, format=args.format, person=args.person,
                                  canvas=args.canvas, min_confidence=args.min_confidence)
        ldm, payload = checkpoint.load_ldm(args.ckpt, args.device, args.preset, ema=not args.no_ema)
        if "source" in payload:
            print(checkpoint.describe(payload, args.ckpt))
        needed_by = "--common" if args.common else "--typical" if args.typical else None
        density = density_of(payload, args.ckpt, needed_by)
        if args.common:
            poses, names = most_common(args.common, density)
        elif density:
            poses, names = pull(np.stack(poses), names, density, args.typical)
        size, began = payload["config"]["size"], time.monotonic()
        ask_model(args, ldm)
        every = torch.from_numpy(np.stack(poses)).repeat_interleave(args.n, dim=0)      # [P n, 17, 3]
        seeds = [args.seed + i for i in range(args.n)] * len(poses)
        pictures = draw_pictures(ldm, every, seeds, size, sampler=args.sampler, steps=args.steps, eta=args.eta,
                                 guidance=args.guidance, spacing=args.spacing, interval=args.interval,
                                 rescale=args.rescale)
        rows = [[draw(pose, size), *pictures[p * args.n:(p + 1) * args.n]] for p, pose in enumerate(poses)]
        steps = how_many_steps(ldm, args.sampler, args.steps, args.spacing)
        how = SAMPLERS[args.sampler]
        if args.sampler != "ddpm":
            how += f" {steps} steps {args.spacing}, eta {args.eta:g}"
        data.save_grid(args.out, rows, columns=["pose", *(f"seed {args.seed + i}" for i in range(args.n))],
                       labels=names, title=f"{how}, guidance {args.guidance:g}, {args.ckpt} step {payload['step']}")
    except (ValueError, OSError) as e:
        print(f"sample.py: {e}", file=sys.stderr)
        return 2
    print(f"{args.out}: {len(pictures)} pictures in {time.monotonic() - began:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
