"""Pose files in, images out: for each pose a row with its skeleton and n samples.

    python sample.py examples/poses/*.json
    python sample.py mine.json --ckpt runs/mine/last.pt -n 4 --steps 100 --guidance 3
    python sample.py --common 9                                     the most common training poses
    python sample.py mine.json --retarget                           with training proportions
    python sample.py mine.json --label Knight --label Mage          or --label all
    python sample.py mine.json --inpaint image.png --mask mask.png  redraw the white region
    python sample.py --morph standing.json jumping.json             from pose to pose; also a GIF

In Python:

    from extras.plan import read_poses
    ldm, payload = checkpoint.load_ldm("assets/toy.pt")
    poses, names = read_poses(["mine.json"])
    images = draw_images(ldm, torch.from_numpy(np.stack(poses)), seeds=[0],
                         size=payload["config"]["size"], **settings(ldm))

The format of a pose file is detected from its content (docs/pose-formats.md lists them). Each image
or frame in the file gives one pose, that of its largest person. Image i of a row has seed
--seed + i and depends on nothing else; only its rounding depends on the others in the batch.
extras/ reads the poses to draw, starts from an image and writes the files.

Letters: P poses, n images per pose, B = P n images, S side of an image, C h w shape of a latent.
"""
from __future__ import annotations

from engine import startup  # before all others: it checks the versions

# isort: split
import argparse
import json
import math
import re
import shlex
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import checkpoint
import data
import plots
from checkpoint import number
from diffusion import (
    Diffusion,
    Seed,
    Step,
    ddim,
    ddpm,
    dpm_solver,
    guided,
    per_image_noise,
    timesteps_of,
)
from engine.cpu import use_fast_norms
from extras.editing import inpaint, read_given, start_from
from extras.output import film_of, grid_of, outputs, save_latents, save_separate, sheet_of
from extras.plan import DEFAULT_FRAMES, labels_of, plan_of
from formats import compvis
from formats.pose_files import FORMATS, MIN_CONFIDENCE
from ldm import LDM, SAMPLING

BATCH = 16                      # images in the network at once
SAMPLERS = {"ddim": "DDIM", "dpm_solver": "DPM-Solver++(2M)", "ddpm": "DDPM"}
DEFAULT_SAMPLER, DDIM_STEPS = "dpm_solver", 50
DEFAULT_CKPT = "runs/ldm/last.pt"
BUNDLED_CKPT = Path(__file__).parent / "assets/toy.pt"          # used while DEFAULT_CKPT is missing
FILM = 8                        # steps that --film shows
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif")


# --------------------------------------------------------------------------------- poses to images

def settings(ldm: LDM, sampler: str | None = None, steps: int | None = None,
             eta: float | None = None, guidance: float | None = None) -> dict[str, object]:
    """These arguments of `sample`, with the model's defaults in place of None."""
    sampler = sampler or (DEFAULT_SAMPLER if ldm.spacing == "even" else "ddim")
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler is {sampler!r}; it must be one of {', '.join(SAMPLERS)}")
    its_steps = {"dpm_solver": ldm.steps, "ddim": DDIM_STEPS, "ddpm": None}     # None: all
    return {
        "sampler": sampler,
        "steps": its_steps[sampler] if steps is None else steps,
        "eta": ldm.eta if eta is None else eta,
        "guidance": ldm.guidance if guidance is None else guidance,
    }


def spacing_of(ldm: LDM, sampler: str) -> str:
    """How a sampler spreads its timesteps, see `timesteps_of`: each where it was measured best."""
    return "lambda" if sampler == "dpm_solver" else ldm.spacing


def visited(ldm: LDM, sampler: str, steps: int) -> np.ndarray:
    """The timesteps that a sampler visits, ascending: `steps`, or more with "uniform" spacing."""
    diffusion = Diffusion(**ldm.schedule)
    if sampler == "ddpm":
        return np.arange(diffusion.timesteps)
    return timesteps_of(diffusion.alphas_bar.numpy(), steps, spacing_of(ldm, sampler))


def sample(
    ldm: LDM,
    poses: Tensor,                              # [B, 17, 3]
    seeds: list[Seed],                          # [B]
    size: int,                                  # S
    sampler: str,                               # this and the next three: see `settings`
    steps: int,
    eta: float,
    guidance: float,
    labels: Tensor | None = None,               # [B] numbers of labels; None: without
    noise: Tensor | None = None,                # [1, C, h, w] replaces the noise of the seeds
    given: Tensor | None = None,                # [1, C, h, w] an image's latent, for skip and known
    skip: int = 0,                              # noisy steps left out: starts at `given` plus noise
    known: Tensor | None = None,                # bool [1, 1, h, w]: where `given` is kept
    rounds: int = 1,                            # of each step with `known`, see extras/editing.py
) -> Iterator[Step]:
    """Denoises one latent for each pose and yields every step; the last step's x is the sample."""
    diffusion = Diffusion(**ldm.schedule)
    side = size // ldm.vq.config.factor
    shape = (ldm.vq.config.embed_dim, side, side)
    device = ldm.mean.device
    x_T, noise_fn = per_image_noise(seeds, shape)                           # [B, C, h, w]
    x_T = x_T.to(device) if noise is None else noise.expand_as(x_T)
    if skip:
        t = visited(ldm, sampler, steps)[-1 - skip]
        x_T = diffusion.q_sample(given, torch.tensor([t]), x_T)

    labels = None if labels is None else labels.to(device)
    model, rows = ldm.of_rows(poses.to(device), labels)
    eps_fn = guided(diffusion.eps_model(model), rows, guidance)
    if known is not None:
        eps_fn = inpaint(diffusion, eps_fn, given, known)

    if sampler == "ddpm":
        return ddpm(diffusion, eps_fn, x_T, noise_fn, skip)
    jumps = {"ddim": partial(ddim, rounds=rounds), "dpm_solver": dpm_solver}[sampler]
    return jumps(diffusion, eps_fn, x_T, steps, eta, noise_fn, spacing_of(ldm, sampler), skip)


@torch.no_grad()
def denoise(ldm: LDM, poses: Tensor, seeds: list[Seed], size: int, film: int = 1,
            labels: Tensor | None = None, **how: object) -> list[Step]:
    """Runs `sample` in batches with a progress bar; `how` are its other arguments.

    Returns the last step, or `film` steps from the first to the last. Each has the latents of all
    images [B, C, h, w], on the CPU.
    """
    total = len(visited(ldm, how["sampler"], how["steps"])) - how.get("skip", 0)
    total *= how.get("rounds", 1)
    kept = {total - 1} if film == 1 else set(data.evenly(total, film).tolist())
    batches = []
    with tqdm(total=total * math.ceil(len(poses) / BATCH), desc="sampling", unit="step",
              dynamic_ncols=True) as bar:
        for b in range(0, len(poses), BATCH):
            part = slice(b, b + BATCH)
            batches.append([])
            asked = None if labels is None else labels[part]
            steps = sample(ldm, poses[part], seeds[part], size, labels=asked, **how)
            for k, step in enumerate(steps):
                if k in kept:
                    batches[-1].append(step._replace(x=step.x.cpu(), x0=step.x0.cpu()))
                bar.update()
    return [steps[0]._replace(x=torch.cat([step.x for step in steps]),
                              x0=torch.cat([step.x0 for step in steps]))
            for steps in zip(*batches, strict=True)]


@torch.no_grad()
def decode(ldm: LDM, z: Tensor) -> list[np.ndarray]:
    """Latents [B, C, h, w] -> images uint8 [S, S, 3], in batches."""
    return [image for part in z.split(BATCH)
            for image in data.to_uint8(ldm.decode(part.to(ldm.mean.device)))]


def draw_images(ldm: LDM, poses: Tensor, seeds: list[Seed], size: int,
                **how: object) -> list[np.ndarray]:
    """An image uint8 [S, S, 3] for each pose [B, 17, 3] and seed; `how` as in `sample`."""
    return decode(ldm, denoise(ldm, poses, seeds, size, **how)[-1].x)


# --------------------------------------------------------------------------------- the command line

def canvas(text: str) -> tuple[int, int]:
    """An argparse type: "768x512" -> (768, 512), width and height."""
    match = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text} is not a size; write it as in 768x512")
    return int(match[1]), int(match[2])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="sample.py {POSE.json ... | --common N} [--flags; --help explains them]")
    group = parser.add_argument_group("poses")
    add = group.add_argument
    add("poses", nargs="*", metavar="POSE", help="pose files of any tool, see docs/pose-formats.md")
    add("--format", choices=FORMATS, metavar="NAME",
        help="of the pose files, where detection fails; docs/pose-formats.md has the names")
    add("--person", type=number(int, 1), metavar="K",
        help="the K-th person of each image (default: the largest)")
    add("--frames", type=number(int, 1), metavar="N",
        help=f"poses of a file, or frames of a series (default {DEFAULT_FRAMES}; --motion: all)")
    add("--canvas", type=canvas, metavar="WxH", help="image size, where a pose file lacks it")
    add("--min-confidence", type=number(float, 0), default=MIN_CONFIDENCE, metavar="C",
        help="joints below it count as missing (default %(default)s)")
    add("--fit", choices=("letterbox", "crop"), default="letterbox",
        help="how a pose becomes square: with bars (default) or cropped")
    add = group.add_mutually_exclusive_group().add_argument
    add("--common", type=number(int, 1), metavar="N",
        help="no pose files: the N most common training poses")
    add("--typical", type=number(float, 0, 1), default=0.0, metavar="A",
        help="move poses toward the training poses: 0 not at all, 1 to their middle")
    add = group.add_argument
    add("--retarget", action="store_true",
        help="give poses the limb lengths of the training poses, or of the label's")
    add("--label", action="append", metavar="NAME",
        help="what to draw, repeated or all; needs no pose file")

    add = parser.add_argument_group("model").add_argument
    add("--ckpt", metavar="FILE", help=f"default {DEFAULT_CKPT}, else the bundled toy model")
    add("--preset", metavar="NAME",
        help=f"of a published checkpoint: {', '.join(compvis.PUBLISHED)}")
    add("--no-ema", action="store_true", help="raw weights instead of their EMA")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--amp", choices=checkpoint.AMP, default="off",
        help="precision of the UNet; bf16 is faster where the hardware has it")

    add = parser.add_argument_group("sampling").add_argument
    add("-n", type=number(int, 1), metavar="N",
        help="images per pose and label (default 2; 1 in a series or of several labels)")
    add("--seed", type=number(int, 0), default=0, help="of a pose's first image (default 0)")
    add("--sampler", choices=SAMPLERS,
        help=f"default {DEFAULT_SAMPLER}; ddim with --inpaint, --noise-from and published models")
    add("--steps", type=number(int, 1), metavar="N",
        help=f"default {SAMPLING['v'][2]} for a v model, {SAMPLING['eps'][2]} for an eps model, "
        f"{DDIM_STEPS} with ddim")
    add("--eta", type=number(float, 0, 1),
        help="new noise in each step, 0 to 1 (default: by what the model predicts)")
    add("--guidance", type=number(float, -100, 100), metavar="W",
        help="1: as trained, more: more of pose and label (default: by what the model predicts)")

    group = parser.add_argument_group("start from an image (its central square)")
    add = group.add_mutually_exclusive_group().add_argument
    add("--init", metavar="IMAGE", help="add noise to this image and denoise it in the pose")
    add("--inpaint", metavar="IMAGE", help="redraw a region of this image and keep the rest")
    add("--noise-from", metavar="IMAGE",
        help="start from the noise that DDIM inversion finds for this image")
    add = group.add_argument
    add("--strength", type=number(float, 0, 1), default=0.6, metavar="S",
        help="noise for --init: 0 keeps the image, 1 ignores it (default %(default)s)")
    add("--mask", metavar="IMAGE", help="for --inpaint, of the same size: white is redrawn")

    group = parser.add_argument_group("series")
    add = group.add_mutually_exclusive_group().add_argument
    add("--morph", action="store_true", help="from each pose and seed to the next; also a .gif")
    add("--motion", action="store_true",
        help="the poses, or the files of a folder, are frames; also a .gif or .webp")
    add("--film", action="store_true", help=f"show {FILM} of the steps: x_t and the predicted x0")
    group.add_argument("--fps", type=number(float, 1, 50), default=12.0, metavar="N",
                       help="frames a second of the .gif (default %(default)g)")

    add = parser.add_argument_group("output").add_argument
    add("--out", metavar="FILE", default="samples.png",
        help="sheet of all images (default %(default)s)")
    add("--separate", metavar="DIR", help="also each image as a PNG of its own")
    add("--save-latents", metavar="FILE", help="also latents, poses and seeds as an .npz")

    args = parser.parse_intermixed_args(argv)
    if args.poses and args.common or not (args.poses or args.common or args.label):
        parser.error("give either pose files or --common N, such as --common 9")
    if bool(args.inpaint) != bool(args.mask):
        parser.error("--inpaint IMAGE and --mask IMAGE go together; white in the mask is redrawn")
    if Path(args.out).suffix.lower() not in SUFFIXES:
        parser.error(f"--out is {args.out}; the name must end in {', '.join(SUFFIXES)}")
    if args.n is None:
        several = args.label and (len(args.label) > 1 or args.label == ["all"])
        series = args.motion or args.morph or args.film
        args.n = 1 if series or args.noise_from or several else 2
    if args.inpaint or args.noise_from:         # rounds and inversion exist for ddim only
        args.sampler = "ddim"
    if args.noise_from:                         # inversion is exact only without new noise
        args.eta = 0.0
    if args.sampler == "ddpm" and args.steps:
        parser.error(f"--steps is {args.steps}, but --sampler ddpm takes all timesteps; use "
                     "--sampler ddim --eta 1 for fewer")
    return args


def settings_of(args: argparse.Namespace) -> dict[str, object]:
    """The sampler, steps, eta and guidance of a command."""
    return {key: getattr(args, key) for key in ("sampler", "steps", "eta", "guidance")}


def ask_model(args: argparse.Namespace, ldm: LDM) -> None:
    """Fills in what the command leaves open to the model's defaults.

    ValueError for --guidance if the model has no null condition.
    """
    vars(args).update(settings(ldm, **settings_of(args)))
    if args.guidance != 1 and not ldm.supports_guidance:
        raise ValueError(f"--guidance is {args.guidance:g}, but {args.ckpt} was trained without "
                         "dropping poses, so only 1 has a meaning; leave --guidance out")


def load(args: argparse.Namespace) -> tuple[LDM, dict]:
    """The model and its payload. Prints which checkpoint and device are used."""
    args.device = checkpoint.find_device(args.device)
    bundled, here = args.ckpt is None and not Path(DEFAULT_CKPT).exists(), Path.cwd()
    if bundled:
        toy = BUNDLED_CKPT.relative_to(here) if BUNDLED_CKPT.is_relative_to(here) else BUNDLED_CKPT
        args.ckpt = str(toy)
    args.ckpt = args.ckpt or DEFAULT_CKPT
    ldm, payload = checkpoint.load_ldm(args.ckpt, args.device, args.preset, ema=not args.no_ema)
    which = (f"the bundled toy model {args.ckpt} (no {DEFAULT_CKPT} found)" if bundled else
             checkpoint.dated(args.ckpt, payload["step"]))
    print(f"Using {which} on {args.device}.")
    if "source" in payload:
        print(compvis.describe(payload, args.ckpt))
    return ldm, payload


def run(args: argparse.Namespace, command: str) -> str:
    """Loads, plans, draws and writes; returns the line to print at the end."""
    ldm, payload = load(args)
    ask_model(args, ldm)
    sheet, animation = outputs(args)
    size = payload["config"]["size"]
    asked = labels_of(args, ldm, payload)
    plan, given = plan_of(args, payload, asked.values()), read_given(args, ldm, size)
    plan = plan.for_labels(list(asked)) if asked else plan
    options = settings_of(args)
    rest = {"seed": args.seed, "ckpt": args.ckpt, "amp": args.amp, "torch": torch.__version__}
    rest |= {"labels": list(asked)} if asked else {}
    words = {"command": command, "settings": json.dumps(options | rest),
             "checkpoint": checkpoint.hash_of(ldm.state_dict())}        # before --amp rounds it
    ldm.unet.to(checkpoint.AMP[args.amp])
    use_fast_norms(ldm.unet)                # in bf16 on a CPU, sampling takes 0.7 of the time

    began = time.monotonic()
    poses = torch.from_numpy(plan.poses).repeat_interleave(plan.n, dim=0)               # [B, 17, 3]
    labels = [asked[name] for name in plan.labels] * len(plan.poses)
    labels = torch.tensor(labels) if labels else None                                   # [B]
    start = start_from(given, args, ldm, visited(ldm, args.sampler, args.steps), poses[:1],
                       labels) if given else {}
    film = FILM if args.film else 1
    steps = denoise(ldm, poses, plan.seeds, size, film, labels, **options, **start)
    images = decode(ldm, steps[-1].x)
    if args.inpaint:        # the decoder mixes cells, so the kept pixels are pasted back
        images = [np.where(given.hole[..., None], image, given.image) for image in images]

    shown = given.shown() if given else None
    grid = (film_of(plan, steps, partial(decode, ldm), shown) if args.film else
            sheet_of(plan, images, shown) if animation else grid_of(plan, images, shown))
    title = f"{SAMPLERS[args.sampler]}, {steps[-1].n} steps, guidance {args.guidance:g}, "
    title += f"strength {args.strength:g}, " if args.init else ""
    title += f"typical {args.typical:g}, " if args.typical else ""
    title += f"{args.ckpt} step {payload['step']}"
    plots.save_grid(sheet, **grid, title=title, words=words)
    if animation:
        frames = [np.concatenate(row, axis=1) for row in plan.rows(images)]
        plots.save_animation(animation, frames, args.fps)
    if args.separate:
        save_separate(args.separate, plan, images, words)
    if args.save_latents:
        save_latents(args.save_latents, steps[-1].x, plan)
    written = filter(None, (sheet, animation, args.separate, args.save_latents))
    return (f"{' and '.join(map(str, written))}: {checkpoint.plural(len(images), 'image')} in "
            f"{time.monotonic() - began:.1f} s")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        print(run(args, shlex.join(["sample.py", *(sys.argv[1:] if argv is None else argv)])))
        return 0
    except (ValueError, OSError) as e:
        message, code = e, 2
    except RuntimeError as e:
        if not checkpoint.out_of_memory(e):
            raise
        message, code = (f"the memory of {args.device} is too small; draw fewer images at a time, "
                         "or use --device cpu"), 2
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    print(f"sample.py: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    startup.run(main)
