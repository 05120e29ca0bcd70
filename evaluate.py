"""Measures: how well stage 1 reconstructs and uses its codes, and how much stage 2 listens to the pose.

    python evaluate.py recon --data DIR --vq A.pt B.ckpt --out DIR      is this autoencoder good enough for my pictures?
    python evaluate.py condition --ckpt runs/ldm/last.pt --data DIR     eps loss under right, shuffled and no pose
    python evaluate.py pose --ckpt runs/ldm/last.pt --data DIR --out DIR    are the people drawn in the pose asked for?
    python evaluate.py overfit --run runs/ldm                           underfit, good or memorising, and since when?

recon lays any number of autoencoders, ours or published, side by side on the same pictures: L1, PSNR, SSIM, LPIPS and
rFID, the codes in use, and with --against the codes that other pictures use. All measures take pictures [B, 3, H, W] in
[-1, 1]; PSNR and SSIM are of pictures on 0..1 and means over pictures. train.py calls the same functions on its
validation set. pose draws held-out poses and finds the joints in what was drawn, by a small network that learnt it from
the person's own pictures in minutes, or by any detector outside. overfit reads the log of a run of stage 2, looks for
the training pictures nearest to its samples, and draws one seed with each checkpoint that was kept.

Letters: B batch, H W picture, K codes, D features, J = 17 joints, n cells a side of a joint's map.
"""
from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

# Before torch is imported: idle threads soon sleep instead of spinning, so the cores can be shared.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import checkpoint
import data
import dataset.latents
import formats.lpips
import sample
from diffusion import Diffusion
from engine.run import read_log
from formats import compvis
from formats.pose_files import NobodyFound, Poses, load_poses
from keypoints import JOINTS
from ldm import LDM
from metrics.codebook import code_counts, code_overlap
from metrics.condition import condition_losses
from metrics.images import SSIM_WINDOW, Features, Measure, Shortlist, compare, inception, l1, psnr, ssim
from metrics.keypoint_detector import find_reader
from metrics.overfit import (
    HELD_OUT,
    Near,
    headline,
    verdict,
)
from metrics.pose import Drawn, assess, judge
from plots import ERROR_WHITE, extremes_figure, overfit_figure, recon_figure
from vq import VQModel

BATCH = 8                           # one layer of the published autoencoders is 34 MB for a picture of 256 pixels
FRECHET_PICTURES = 2048             # with fewer pictures than Inception features the covariance is singular
DEFAULT_SIZE = 256                  # of pictures, where no checkpoint knows its own: the published ones'
SHOWN = 3                           # typical pictures, and as many of the worst
JUDGE = 0.9                         # PCK@0.1 of the reader on real pictures; below, it is no good judge of drawn ones


# ------------------------------------------------------------------------------------------- the pose in samples

FIDELITY = {"pck@0.1": ("PCK@0.1", "higher", ".3f"), "pck@0.2": ("PCK@0.2", "higher", ".3f"),
            "oks": ("OKS", "higher", ".3f"), "frechet": ("Frechet distance", "reader's features", ".3f")}
PICTURES, POSES_ASKED = "pictures", "poses.json"        # in --out, for a detector outside
NAMING = "coco", "coco-results", "alphapose"            # formats that name the pictures; the others count frames,
OWN_COUNT = "mmpose",                                   # of which these have a count of their own


def draw_held_out(
    ldm: LDM,
    held_out: data.Pictures,
    seed: int = 0,
    about: dict | None = None,
    interval: tuple[int, int] | None = None,    # timesteps with guidance; None: all
    **how: object,                              # of sample.settings, which says what is usual
) -> Drawn:
    """A sample for the pose of each held-out picture, the i-th with seed `seed` + i."""
    with passing(held_out, "reading pictures") as bar:
        pairs = [(data.to_uint8(x), pose) for x, pose, _ in bar]
    if sum(len(x) for x, _ in pairs) < 2:
        raise ValueError("there are fewer than 2 usable held-out pictures, and shuffled poses need two")
    poses = torch.cat([pose for _, pose in pairs])
    samples = sample.draw_pictures(
        ldm, poses, [seed + i for i in range(len(poses))], held_out.size, interval=interval,
        **sample.settings(ldm, **how))
    return Drawn(poses.double().numpy(), np.stack(samples), np.concatenate([x for x, _ in pairs]), about or {})


def round_trip(ldm: LDM, images: np.ndarray) -> np.ndarray:
    """Pictures uint8 [N, H, W, 3] through stage 1 and back: what a perfect stage 2 would draw."""
    device, out = ldm.mean.device, []
    with torch.no_grad():
        for i in range(0, len(images), BATCH):
            out.append(data.to_uint8(ldm.vq(data.to_tensor(images[i:i + BATCH]).to(device))[0].float()))
    return np.concatenate(out)


def earlier_pictures(out: Path) -> list[Path]:
    """The pictures that an earlier `write_pictures` left in `out`; ValueError where others are in their place."""
    there = sorted((out / PICTURES).glob("[0-9]" * 6 + ".png"))
    try:
        found = json.loads((out / POSES_ASKED).read_text())
        names = {image["file_name"] for image in found["images"] if found["info"]["checkpoint"]}
    except FileNotFoundError:
        names = set()
    except (OSError, ValueError, KeyError, TypeError):
        names, there = set(), [out / POSES_ASKED, *there]
    if there and not names:
        raise ValueError(f"{there[0]} would be written over, and evaluate.py did not write it; name another folder "
                         "with --out")
    return [path for path in there if path.name in names]


def write_pictures(out: Path, drawn: Drawn) -> None:
    """`out`/pictures/000000.png ...: first the samples, then the real ones; poses.json says in COCO's words what was
    asked for, so that a detector can be run on them and --detected read its answer."""
    earlier, side, pictures = earlier_pictures(out), drawn.samples.shape[1], [*drawn.samples, *drawn.real]
    data.make_folder(out / PICTURES, f"--out {out}")
    images = [{"id": i, "file_name": f"{i:06d}.png", "width": side, "height": side} for i in range(len(pictures))]
    write_json(out / POSES_ASKED, {"info": drawn.about | {"unfinished": True}, "images": images})
    annotations = []
    for path in earlier:                                    # perhaps there were more
        path.unlink()
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(out / PICTURES / images[i]["file_name"])
        pose = drawn.asked[i % len(drawn.asked)]
        flat = [v for x, y, seen in pose for v in (x * side, y * side, 2 * int(seen > 0))]
        seen = pose[pose[:, 2] > 0, :2] * side
        box = [*seen.min(0), *np.ptp(seen, axis=0)] if len(seen) else [0.0, 0.0, 0.0, 0.0]
        annotations.append({"id": i, "image_id": i, "category_id": 1, "keypoints": flat, "iscrowd": 0, "bbox": box,
                            "area": box[2] * box[3], "num_keypoints": len(seen)})
    categories = [{"id": 1, "name": "person", "keypoints": list(JOINTS)}]
    write_json(out / POSES_ASKED, {"info": drawn.about, "images": images, "annotations": annotations,
                                   "categories": categories})


def write_json(path: Path, what: dict) -> None:
    with checkpoint.replacing(path) as file:
        file.write(json.dumps(what).encode())


def read_pictures(out: Path, about: dict) -> Drawn:
    """What write_pictures wrote; ValueError where there is nothing, or of another checkpoint or other flags."""
    first = f"run this command without --detected first, then a detector on {out / PICTURES}"
    try:
        found = json.loads((out / POSES_ASKED).read_text())
        info = dict(found["info"])
        if info.get("unfinished"):
            raise ValueError("the command that drew them was interrupted")
        pictures = np.stack([np.asarray(data.read_picture(out / PICTURES / f"{i:06d}.png"))
                             for i in range(len(found["annotations"]))])
        asked = np.array([a["keypoints"] for a in found["annotations"]], dtype=np.float64).reshape(-1, len(JOINTS), 3)
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ValueError(f"--out {out} holds no pictures that were drawn for a detector ({e}); {first}") from None
    for key in (about | info).keys():
        if (theirs := info.get(key)) != (ours := about.get(key)):
            raise ValueError(f"the pictures in {out} were drawn with {key} = {theirs}, but this command has {ours}; "
                             f"{first}")
    n = len(asked) // 2
    asked = asked[:n] / [pictures.shape[2], pictures.shape[1], 2]
    return Drawn(asked, pictures[:n], pictures[n:], about)


def last_number(name: str) -> int | None:
    digits = re.findall(r"\d+", name)
    return int(digits[-1]) if digits else None


def picture_numbers(path: str | Path, poses: Poses, n: int) -> list[int | None]:
    """Which of the 2 n pictures of write_pictures each pose of the file `path` is in: by name, or by frames counted.

    load_poses counts from 1, as some tools do, others from 0. That is told by frame 0, else by the last one, for it is
    that of all pictures or of the samples: where nobody is seen, a file may have no frame.
    """
    numbers, counts = ([last_number(Path(name).stem) for name in names] for names in (poses.pictures, poses.frames))
    if poses.format in NAMING:
        return numbers
    instead = "give a folder of files, one a picture and named like it"
    if len(counts) == 1:
        raise ValueError(f"--detected {path}: {poses.taken_for}, of one picture, and it does not say which; {instead}")
    if None in counts:
        raise ValueError(f"--detected {path}: the frame {poses.frames[counts.index(None)]!r} has no number that says "
                         f"which picture it is; {instead}")
    if 0 in counts:
        return numbers
    if poses.format in OWN_COUNT and max(counts) not in (n, 2 * n):
        raise ValueError(f"--detected {path}: of {2 * n} pictures it has the frames {min(counts)} to {max(counts)}, "
                         f"which may be counted from 0 or from 1; {instead}")
    return [number - 1 for number in numbers]


def read_detected(path: str | Path, drawn: Drawn) -> dict[str, np.ndarray]:
    """An external detector's poses in the pictures of write_pictures: "samples", and "real" where it saw those too.

    `path` is a folder of files of any format in pose_files.FORMATS, one a picture, or one file of all: a picture is
    told by the last number in its name or id; frames that a file only counts are the pictures in their order. A picture
    in which nobody was found has no visible joint.
    """
    n, side, folder = len(drawn.asked), drawn.samples.shape[1], Path(path).is_dir()
    files = sorted(file for file in Path(path).iterdir() if file.suffix in (".json", ".txt")) if folder else [path]
    if not files:
        raise ValueError(f"--detected {path}: no .json or .txt file in it")
    nobody = np.zeros((len(JOINTS), 3))
    found, numbers = np.stack([nobody] * 2 * n), set()      # numbers of the pictures that the detector saw
    for file in files:
        try:
            poses = load_poses(file, canvas=(side, side))
        except NobodyFound:
            if not folder:
                raise
            poses = None
        people = [nobody] if poses is None else poses.poses
        for i, pose in zip([last_number(Path(file).stem)] if folder else picture_numbers(path, poses, n), people,
                           strict=False):
            if i is not None and 0 <= i < 2 * n:
                found[i] = pose
                numbers.add(i)
    if not any(i < n for i in numbers):
        raise ValueError(f"--detected {path}: none of its pictures is one of 000000 to {n - 1:06d}, the samples")
    return {"samples": found[:n]} | ({"real": found[n:]} if any(i >= n for i in numbers) else {})


# ------------------------------------------------------------------------------------------------- command line

# name in the figures: heading, what it is in, how it is written
COLUMNS = {"l1": ("L1", "of 2, lower", ".4f"), "psnr": ("PSNR", "dB, higher", ".2f"), "ssim": ("SSIM", "higher", ".4f"),
           "lpips": ("LPIPS", "lower", ".4f"), "rfid": ("rFID", "lower", ".2f"),
           "codes_used": ("codes used", "of all", ".1%"), "perplexity": ("perplexity", "codes", ".1f"),
           "n_embed": ("codebook", "codes", "d")}
OVERLAP = {"both": ("in both", "codes", "d"), "only_ours": ("only in A", "codes", "d"),
           "only_theirs": ("only in B", "codes", "d"), "common": ("A and B", "of A or B", ".1%"),
           "ours_known": ("uses in A", "of B's codes", ".1%"), "theirs_known": ("uses in B", "of A's codes", ".1%"),
           "histogram": ("same share", "sum min p", ".1%")}


def table(rows: dict[str, dict], columns: dict[str, tuple[str, str, str]]) -> str:
    """Aligned text: a row for each of `rows`, those columns that any row has; what a row lacks stays empty."""
    keys = [key for key in columns if any(key in row for row in rows.values())]
    lines = [["", *(columns[key][line] for key in keys)] for line in (0, 1)]
    lines += [[name, *(format(row[key], columns[key][2]) if key in row else "" for key in keys)]
              for name, row in rows.items()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
                     for line in lines)


def names_of(paths: list[str]) -> list[str]:
    """The shortest ends of the paths that tell them apart: last.pt alone, or a/last.pt and b/last.pt."""
    parts = [Path(path).resolve().parts for path in paths]
    for path, own in zip(paths, parts, strict=True):
        if parts.count(own) > 1:
            raise ValueError(f"--vq names {path} twice; once is enough")
    longest = max(map(len, parts))
    return ["/".join(own[-next(n for n in range(1, longest + 1) if sum(p[-n:] == own[-n:] for p in parts) == 1):])
            for own in parts]


def picture_limit(text: str) -> int:
    """A number of pictures; 0 or all means every one."""
    if text in ("0", "all"):
        return sys.maxsize
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of pictures, at least 2, nor all")
    return int(text)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="evaluate.py {recon,condition,pose,overfit} [--flags; COMMAND "
                                     "--help explains them]")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{recon,condition,pose,overfit}")
    recon = commands.add_parser("recon", help="compare autoencoders on pictures")
    condition = commands.add_parser("condition", help="measure whether stage 2 listens to the pose")
    pose = commands.add_parser("pose", help="measure whether samples show the pose asked for")
    overfit = commands.add_parser("overfit", help="tell whether a run of stage 2 is underfit, good or memorising")
    recon.add_argument("--vq", dest="ckpt", nargs="+", default=["runs/vq/last.pt"], metavar="FILE",
                       help="checkpoints of stage 1 or 2, ours or CompVis' (default runs/vq/last.pt)")
    for sub in (condition, pose):
        sub.add_argument("--ckpt", default="runs/ldm/last.pt", metavar="FILE", help="default %(default)s")
        sub.add_argument("--preset", metavar="NAME", help="what the tensors of a published CompVis checkpoint do not "
                         f"tell: {', '.join(compvis.PUBLISHED)}; ours need none")
    for sub in (recon, condition, pose):
        sub.add_argument("--data", help="as for train.py; its held-out part counts (default: as in training)")
        sub.add_argument("--val", help="held-out pictures, as for train.py (default: a tenth of the groups of --data)")
        sub.add_argument("--size", type=int, metavar="PIXELS",
                         help=f"side of the pictures (default: the first checkpoint's own, else {DEFAULT_SIZE})")
        sub.add_argument("--limit", type=picture_limit, default=256 if sub is pose else 512, metavar="N",
                         help="pictures at most, spread evenly; 0 or all: every one (default %(default)s)")
        sub.add_argument("--no-ema", action="store_true", help="raw weights where the moving average is the default")
        sub.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    recon.add_argument("--all", action="store_true", help="all pictures of --data, also those without keypoints: right "
                       "for data that no checkpoint was trained on, and a folder of nothing but pictures counts whole")
    recon.add_argument("--against", metavar="DATA", help="other pictures, all of them up to --limit: which codes do "
                       "they use that --data does not, and the reverse?")
    recon.add_argument("--lpips-weights", nargs="+", metavar="FILE", help="vgg16 and the linear weights; adds LPIPS")
    recon.add_argument("--rfid", action="store_true",
                       help="adds rFID: needs pip install pytorch-fid; fetches Inception's weights once")
    recon.add_argument("--out", metavar="DIR", help="writes recon.json and recon.png there; not among the pictures")
    pose.add_argument("--out", metavar="DIR", help="writes pose.json and pose.png there, and all pictures with the "
                      "poses asked for, to run another detector on; not among the pictures of --data")
    pose.add_argument("--detected", metavar="FILE", help="what a detector found in the pictures of an earlier --out, "
                      "in place of the reader: a pose file of any format, or a folder of one a picture")
    overfit.add_argument("--run", default="runs/ldm", metavar="DIR", help="run folder of stage 2 (default %(default)s)")
    overfit.add_argument("--out", metavar="DIR", help="writes overfit.json and overfit.png there (default: the run's)")
    overfit.add_argument("-n", type=int, default=16, help="samples under training poses, and as many under held-out "
                         "ones (default %(default)s)")
    overfit.add_argument("--limit", type=picture_limit, default=512, metavar="N", help="held-out pictures, at most, "
                         "that tell how near to a training picture is usual (default %(default)s)")
    overfit.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    for sub in (pose, overfit):
        sub.add_argument("--sampler", choices=("ddim", "dpm_solver"), help="default as in sample.py")
        sub.add_argument("--steps", type=int, help="default as in sample.py")
        sub.add_argument("--eta", type=float, help="noise that each step adds, 0 to 1 (default as in sample.py)")
        sub.add_argument("--guidance", type=float, metavar="W", help="default as in sample.py")
        sub.set_defaults(spacing=None)                              # the sampler's own, or the model's
        sub.add_argument("--seed", type=int, default=0, help="the i-th sample has seed --seed + i")
    args = parser.parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    return args


def resolve(args: argparse.Namespace, configs: list[dict]) -> tuple[str, str | None, int]:
    """(data, val, size) from the flags, else from the first training configuration that knows them."""
    known = {"data": None, "size": None, "val": None}
    for key in ("data", "size"):
        if config := next((c for c in configs if c.get(key)), None):
            known |= {key: config[key]} | ({"val": config.get("val")} if key == "data" else {})
    if not (args.data or known["data"]):
        raise ValueError("no checkpoint says what it was trained on; name the pictures with --data")
    spec, val = (args.data, args.val) if args.data else (known["data"], args.val or known["val"])
    return spec, val, args.size or known["size"] or DEFAULT_SIZE


def open_pictures(args: argparse.Namespace, spec: str, val: str | None, size: int) -> tuple[data.Pictures, str]:
    """What `recon` measures on, and how to call it."""
    plain = data.is_folder(spec) and not data.has_keypoints(spec)
    if args.all or plain:
        if args.val:
            raise ValueError(f"--val {args.val}: all pictures of {spec} count; leave it out, or name it as --data")
        return data.open_all(spec, size, poseless=True), f"all of {spec}"
    return data.open_data(spec, size, val, remember=False)[1], f"all of {val}" if val else f"held out of {spec}"


def check_size(size: int, multiple: int, least: int = 1) -> None:
    least = max(least, multiple)
    if size < least or size % multiple:
        raise ValueError(f"--size is {size}; this needs a multiple of {multiple} pixels, at least {least}")


def make_out(out: str | None, *roots: str | None) -> None:
    """Makes the folder --out, if one is wanted and it does not lie among the pictures of `roots`."""
    if out:
        data.check_out(out, *roots)
        data.make_folder(out, f"--out {out}")


def passing(ds: data.Pictures, what: str) -> tqdm:
    """The batches of data.numbered with a bar; use it in `with`, so that no error is printed behind the bar."""
    return tqdm(data.numbered(ds, BATCH), total=-(-len(ds) // BATCH), desc=what, unit="batch", dynamic_ncols=True)


@dataclass(frozen=True)
class Job:
    """What `recon` is to do, once everything that a person can get wrong is known to be right."""
    names: list[str]                    # of the models, as short as they can be
    payloads: list[dict]
    models: list[VQModel]
    device: str
    spec: str                           # the pictures, as --data names them
    called: str                         # and in words
    ds: data.Pictures
    other: data.Pictures | None         # of --against
    measures: dict[str, Measure]
    features: Features | None           # for rFID


def prepare(args: argparse.Namespace) -> Job:
    """Opens all that `recon` needs, and makes the folder --out; ValueError or OSError before any work is done."""
    device, names = checkpoint.find_device(args.device), names_of(args.ckpt)
    payloads = [checkpoint.load_vq(path, not args.no_ema) for path in args.ckpt]
    models = [checkpoint.build_vq(payload, path).to(device) for payload, path in zip(payloads, args.ckpt, strict=True)]
    for path, model in zip(args.ckpt, models, strict=True):
        if (channels := (model.config.in_channels, model.config.out_ch)) != (3, 3):
            raise ValueError(f"{path} takes {channels[0]} and gives {channels[1]} channels; pictures have 3")
    spec, val, size = resolve(args, [payload["config"] for payload in payloads])
    check_size(size, math.lcm(*(model.config.factor for model in models)), SSIM_WINDOW)
    ds, called = open_pictures(args, spec, val, size)
    other = data.open_all(args.against, size, poseless=True) if args.against else None
    make_out(args.out, spec, val, args.against)
    measures: dict[str, Measure] = {"l1": l1, "psnr": psnr, "ssim": ssim}
    if args.lpips_weights:
        measures["lpips"] = formats.lpips.load_lpips(args.lpips_weights).to(device)
    return Job(names, payloads, models, device, spec, called, data.spread(ds, args.limit),
               data.spread(other, args.limit) if other is not None else None, measures,
               inception(device) if args.rfid else None)


def notes(job: Job, n: int) -> list[str]:
    """What is not measured, and how it would be; what is to be read with care, of `n` pictures."""
    out = []
    if "lpips" not in job.measures:
        out.append("LPIPS is not measured: --lpips-weights FILE [FILE] adds it")
    if job.features is None and importlib.util.find_spec("pytorch_fid") is None:
        out.append("rFID is not measured: pip install pytorch-fid, then --rfid")
    elif job.features is None:
        out.append("rFID is not measured: --rfid adds it (fetches Inception's weights once)")
    elif n < FRECHET_PICTURES:
        out.append(f"rFID of {n} pictures is too high and compares only with rFID of as many")
    return out


def without_nan(value: object) -> object:
    """For JSON, which has no NaN and no infinity: None instead, in dictionaries and lists too."""
    if isinstance(value, dict):
        return {key: without_nan(part) for key, part in value.items()}
    if isinstance(value, list):
        return [without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def report_of(args: argparse.Namespace, job: Job, n: int, rows: dict[str, dict], boxes: dict[str, dict]) -> dict:
    """recon.json: the table's `rows` of the models and `boxes`, means over `n` pictures, and where they come from."""
    own = zip(job.names, args.ckpt, job.payloads, job.models, strict=True)
    return {"command": shlex.join(["python", "evaluate.py", *args.argv]), "data": job.spec, "which": job.called,
            "pictures": n, "size": job.ds.size, "device": job.device, "torch": torch.__version__,
            "checkpoints": [{"name": name, "file": path, "hash": checkpoint.hash_of(payload["vq"]),
                             "step": payload["step"], "factor": model.config.factor, **without_nan(rows[name])}
                            for name, path, payload, model in own],
            "baselines": [{"name": name, **without_nan(row)} for name, row in boxes.items()]}


def recon(args: argparse.Namespace) -> None:
    """Prints the table and writes recon.json and recon.png."""
    job = prepare(args)
    with passing(job.ds, "reconstructing") as bar:
        found = compare(job.models, ((x, indices) for x, _, indices in bar), job.measures, job.features, SHOWN,
                        job.device)
    n, called = found.tallies[0].n, job.called
    rows = {name: tally.result(found.originals) | {"n_embed": model.config.n_embed}
            for name, tally, model in zip(job.names, found.tallies, job.models, strict=True)}
    boxes = {f"boxes of {factor} x {factor}": tally.result(found.originals) for factor, tally in found.boxes.items()}
    about = f"{n} pictures, {called}, {job.ds.size} x {job.ds.size} pixels"
    print(f"{about}\n\n{table(rows | boxes, COLUMNS)}\n")
    report = report_of(args, job, n, rows, boxes)
    if job.other is not None:
        with passing(job.other, "other codes") as bar:
            theirs, m = code_counts(job.models, (x for x, _, _ in bar), job.device)
        shared = {name: code_overlap(tally.counts, count)
                  for name, tally, count in zip(job.names, found.tallies, theirs, strict=True)}
        print(f"Codes used, A: {n} pictures, {called}; B: {m} of {args.against}\n\n{table(shared, OVERLAP)}\n")
        report["against"] = {"data": args.against, "pictures": m, "overlap": shared}
    for note in notes(job, n):
        print(note)
    if args.out:
        write_recon(Path(args.out), job, found.shortlist, report, about)


def write_recon(out: Path, job: Job, shortlist: Shortlist, report: dict, about: str) -> None:
    """recon.json, the report with the names of the pictures on show, and recon.png."""
    shown = [("typical", index) for index in shortlist.typical()] + [("worst", index) for index in shortlist.worst()]
    report = report | {word: [job.ds.name(index) for w, index in shown if w == word] for word, _ in shown}
    (out / "recon.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    recon_figure(out / "recon.png", job.models, job.names, job.ds, shown,
                 f"{about}: around the median PSNR of {job.names[0]}, and the worst. Errors: black 0, white "
                 f"{ERROR_WHITE:.0%} of the range and more", job.device)
    print(f"wrote {out}/recon.json and recon.png")


def condition(args: argparse.Namespace) -> None:
    """Prints the eps loss under right, shuffled and, where the model knows it, no pose, in float32."""
    ldm, _, spec, val, size = open_ldm(args)
    device = ldm.mean.device
    held_out = data.spread(data.open_data(spec, size, val, remember=False)[1], args.limit)
    with torch.no_grad(), passing(held_out, "encoding") as bar:
        pairs = [(ldm.encode(x.to(device)), pose) for x, pose, _ in bar]
    if not pairs:
        raise ValueError(f"{spec} has no usable held-out picture")
    z, poses = (torch.cat(part).to(device) for part in zip(*pairs, strict=True))
    losses = condition_losses(ldm, Diffusion(**ldm.schedule), z, poses, BATCH, null=ldm.knows_null)
    for name, value in losses.items():
        print(f"{name:12s} {value:.4f}")
    if not ldm.knows_null:
        print("no loss without a pose: this model was trained without dropping poses")


def open_ldm(args: argparse.Namespace) -> tuple[LDM, int, str, str | None, int]:
    """The model of --ckpt, its training step, and (data, val, size) as `resolve`, for pictures that its UNet can take.

    Prints what a published file was taken for. The payload is gone: the optimiser's state is twice the model's size.
    """
    ldm, payload = checkpoint.load_ldm(args.ckpt, checkpoint.find_device(args.device), preset=args.preset,
                                       ema=not args.no_ema)
    if "source" in payload:
        print(compvis.describe(payload, args.ckpt))
    spec, val, size = resolve(args, [payload["config"]])
    check_size(size, ldm.vq.config.factor * 2 ** (len(ldm.unet.config.channel_mult) - 1))
    return ldm, payload["step"], spec, val, size


def check_pose_args(args: argparse.Namespace, ldm: LDM) -> None:
    """Fills in what the model samples with where nobody says; ValueError for what cannot be."""
    sample.ask_model(args, ldm)
    if not (math.isfinite(args.guidance) and 0 <= args.eta <= 1 and 1 <= args.steps <= ldm.schedule["timesteps"]
            and 0 <= args.seed < sample.MOST_SEEDS // 2):
        raise ValueError(f"--guidance is {args.guidance}, --eta {args.eta}, --steps {args.steps}, --seed {args.seed}; "
                         f"they must be finite, 0 to 1, 1 to {ldm.schedule['timesteps']}, and 0 or more but below 2^31")


def pose(args: argparse.Namespace) -> None:
    """Draws held-out poses, reads the joints in the samples, prints the table and writes pose.json and pose.png."""
    ldm, step, spec, val, size = open_ldm(args)
    check_pose_args(args, ldm)
    make_out(args.out, spec, val)
    if args.detected and not args.out:
        raise ValueError("--detected tells what was found in pictures that an earlier run wrote to --out; name that "
                         "folder with --out")
    if args.out and not args.detected:
        earlier_pictures(Path(args.out))                    # before anything is drawn: is the place free?
    train, held_out = data.open_data(spec, size, val)
    held_out = data.spread(held_out, args.limit)
    about = {"checkpoint": checkpoint.hash_of(ldm.unet.state_dict()), "data": spec, "val": val, "size": size,
             "pictures": len(held_out), **sample.settings_of(args), "seed": args.seed}
    if args.detected:
        drawn = read_pictures(Path(args.out), about)
        detected = read_detected(args.detected, drawn)
        rows, read = judge(drawn, detected), detected["samples"]
    else:
        reader = find_reader(spec, train, str(ldm.mean.device))
        drawn = draw_held_out(ldm, held_out, args.seed, about, **sample.settings_of(args))
        rows, read = assess(reader, drawn, decoded=round_trip(ldm, drawn.real))
    called = (f"{len(drawn.asked)} held-out poses of {spec}, {args.ckpt} step {step}, "
              f"{sample.SAMPLERS[args.sampler]} {args.steps} steps, eta {args.eta:g}, guidance {args.guidance:g}")
    print(f"{called}\n")
    print("\n".join(describe_pose(rows, args.detected or "the pose reader")))
    if args.out:
        out = Path(args.out)
        if not args.detected:
            write_pictures(out, drawn)
        report = {"command": shlex.join(["python", "evaluate.py", *args.argv]),
                  "read_by": args.detected or "pose reader", **about, "rows": without_nan(rows)}
        (out / "pose.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
        extremes_figure(out / "pose.png", drawn, read, f"{called}: PCK@0.1 {rows['samples']['pck@0.1']:.3f}"
                        + (f", real pictures {rows['real']['pck@0.1']:.3f}" if "real" in rows else ""))
        print(f"\nwrote {out}/pose.json, pose.png" + ("" if args.detected else f", {PICTURES}/ and {POSES_ASKED}"))


ROW_NAMES = {"samples": "samples", "decoded": "real pictures through stage 1", "real": "real pictures (the ceiling)",
             "shuffled": "samples, other poses (the floor)"}


def describe_pose(rows: dict[str, dict], reader: str) -> Iterator[str]:
    """The tables and the verdict in words."""
    names = [name for name in ROW_NAMES if name in rows]
    yield table({ROW_NAMES[name]: rows[name] for name in names}, FIDELITY)
    yield ""
    columns = {name: (name, "PCK@0.1", ".3f") for name in names}
    yield table({joint.replace("_", " "): {name: rows[name]["joints"][joint] for name in names} for joint in JOINTS},
                columns)
    yield ""
    got, floor = (rows[name]["pck@0.1"] for name in ("samples", "shuffled"))
    if "real" not in rows:
        yield f"{reader} says nothing about the real pictures, so there is no ceiling; the floor is {floor:.3f}"
        return
    ceiling = rows["real"]["pck@0.1"]
    yield (f"PCK@0.1 of samples is {got:.3f}, {got / max(ceiling, 1e-9):.2f} of the ceiling {ceiling:.3f}; floor "
           f"{floor:.3f}")
    if ceiling < JUDGE:
        yield (f"the ceiling is low: {reader} finds only {ceiling:.0%} of the joints of real pictures, so its verdict "
               "on samples is weak; more pictures make a better reader, and --detected takes another one")


CHUNK = 1024                        # rows of the cache compared at once: 50 MB where latents are 64x64x3
FILM = 8                            # checkpoints in the film strip, at most


@torch.no_grad()
def nearest(ldm: LDM, cache: dataset.latents.LatentCache, parts: dict[str, Tensor]) -> dict[str, Near]:
    """The nearest training latent of each latent z [N, C, h, w] of `parts`, in one pass over all of the cache."""
    z, device = torch.cat(list(parts.values())).flatten(1), ldm.mean.device                     # [Q, D]
    least, rows = torch.full((len(z),), math.inf, device=device), torch.zeros(len(z), dtype=torch.long, device=device)
    for first in tqdm(range(0, len(cache), CHUNK), "comparing latents", unit="chunk", dynamic_ncols=True):
        x = training_latents(ldm, cache, np.arange(first, min(first + CHUNK, len(cache)))).flatten(1)       # [R, D]
        found, at = (x.square().sum(1) - 2 * z @ x.T).min(1)                # + |z|^2, which is the same for all x
        closer = found < least
        least, rows = torch.where(closer, found, least), torch.where(closer, first + at, rows)
    rows = rows.cpu().numpy()
    apart = z - training_latents(ldm, cache, rows).flatten(1)               # anew: nothing cancels here
    distances = apart.square().mean(1).sqrt().cpu().numpy()
    ends = np.cumsum([len(part) for part in parts.values()])[:-1]
    return {name: Near(part, r, d) for (name, part), r, d in zip(parts.items(), np.split(rows, ends),
                                                                 np.split(distances, ends), strict=True)}


def training_latents(ldm: LDM, cache: dataset.latents.LatentCache, rows: np.ndarray) -> Tensor:
    """Latents z [N, C, h, w] of those rows, as diffusion works on them."""
    return (cache.rows(rows)[0].to(ldm.mean.device) - ldm.mean) / ldm.std


def draw_latents(ldm: LDM, poses: Tensor, size: int, args: argparse.Namespace) -> Tensor:
    """A sample z [N, C, h, w] for each pose [N, 17, 3], the i-th with seed args.seed + i."""
    seeds = list(range(args.seed, args.seed + len(poses)))
    last, = sample.denoise(ldm, poses, seeds, size, **sample.settings_of(args))
    return last.x.to(ldm.mean.device)


def film(run: Path, poses: Tensor, size: int, args: argparse.Namespace) -> dict[int, list[np.ndarray]]:
    """By the step of a checkpoint a picture for each pose [N, 17, 3], the i-th with seed args.seed + i: of every
    checkpoint in the run folder, or of FILM evenly among them."""
    paths = {}
    for path in (*run.glob("step-*.pt"), run / "best.pt", run / "last.pt"):
        if path.exists():
            step = last_number(path.stem)
            paths[checkpoint.load(path, "ldm")["step"] if step is None else step] = path
    steps, out = sorted(paths), {}
    for step in tqdm([steps[i] for i in data.evenly(len(steps), FILM)], "film strip", unit="checkpoint"):
        ldm, _ = checkpoint.load_ldm(paths[step], args.device)
        out[step] = sample.decode(ldm, draw_latents(ldm, poses, size, args))
    return out


def open_run(args: argparse.Namespace) -> tuple[LDM, dict, list[dict]]:
    """The model of the run folder's last checkpoint, its configuration, and the rows of the log up to there."""
    run, args.device = Path(args.run), checkpoint.find_device(args.device)
    args.ckpt = str(run / "last.pt")
    ldm, payload = checkpoint.load_ldm(args.ckpt, args.device)
    if not (run / "log.jsonl").exists():
        raise ValueError(f"--run {run} has no log.jsonl, which tells how training went; name a whole run folder")
    if args.n < 1:
        raise ValueError(f"-n is {args.n}; it must be 1 or more")
    check_pose_args(args, ldm)
    return ldm, payload["config"], [row for row in read_log(run / "log.jsonl") if row["step"] < payload["step"]]


def overfit(args: argparse.Namespace) -> None:
    """Prints the verdict on a run of stage 2 and writes overfit.json and overfit.png."""
    ldm, config, rows = open_run(args)
    verdict(rows)                                                           # has the log what is needed?
    size, device, run, out = config["size"], ldm.mean.device, Path(args.run), Path(args.out or args.run)
    make_out(str(out), config["data"], config["val"])
    train, held_out = data.open_data(config["data"], size, config["val"], remember=False)
    if config.get("data_hash") not in (None, data.data_hash(train, config["val"] and held_out)):
        raise ValueError(f"the pictures of {config['data']} are not those that {run} was trained on, so they cannot "
                         "tell what it has learnt by heart; bring those back")

    @torch.no_grad()
    def encode(x: Tensor) -> Tensor:
        with checkpoint.autocast(config["amp"], device):                    # as train.py encoded the others
            return ldm.vq.encode(x.to(device)).float()
    cache = dataset.latents.LatentCache(run, f"{config['vq_hash']} {config['amp']}", train, encode, BATCH, device)
    pairs = list(data.in_order(held_out, BATCH, args.limit))
    theirs = torch.cat([pose for _, pose in pairs])
    poses = {"training poses": cache.rows(2 * data.evenly(len(cache) // 2, args.n))[1],
             "held-out poses": theirs[data.evenly(len(theirs), args.n)]}
    parts = {HELD_OUT: torch.cat([(encode(x) - ldm.mean) / ldm.std for x, _ in pairs])}
    for name in poses:
        parts[name] = draw_latents(ldm, poses[name], size, args)
    near = nearest(ldm, cache, parts)
    found = verdict(rows, {name: part.distances.tolist() for name, part in near.items()})
    strip = film(run, torch.stack([poses[name][0] for name in poses]), size, args)
    print(f"{run} at step {found['numbers']['step']:,}: {headline(found)}")
    for reason in found["reasons"]:
        print(f"- {reason}")
    samples = {name: [{"distance": float(d), "nearest": int(row) // 2, "mirrored": bool(row % 2)}
                      for d, row in zip(near[name].distances, near[name].rows, strict=True)] for name in poses}
    report = {"command": shlex.join(["python", "evaluate.py", *args.argv]), "run": str(run), **without_nan(found),
              "samples": samples, **sample.settings_of(args), "seed": args.seed}
    (out / "overfit.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    overfit_figure(out / "overfit.png", partial(sample.decode, ldm), partial(training_latents, ldm, cache), rows, found,
                   near, poses, strip)
    print(f"wrote {out}/overfit.json and overfit.png")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        {"recon": recon, "condition": condition, "pose": pose, "overfit": overfit}[args.command](args)
    except (ValueError, OSError) as e:
        print(f"evaluate.py: {e}", file=sys.stderr)
        return 2
    except RuntimeError as e:
        if not checkpoint.out_of_memory(e):
            raise
        print(f"evaluate.py: the memory of {checkpoint.find_device(args.device)} is too small for this; give a smaller "
              "--size, or --device cpu", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("evaluate.py: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
