"""Measuring: how well stage 1 reconstructs, and whether stage 2 follows the pose or memorises.

    python evaluate.py recon --data DIR --vq A.pt B.ckpt --out DIR    compare autoencoders
    python evaluate.py condition --ckpt runs/ldm/last.pt --data DIR   eps loss by kind of pose
    python evaluate.py pose --ckpt runs/ldm/last.pt --out DIR         do samples show their pose?
    python evaluate.py overfit --run runs/ldm                         underfit, good or memorising?

docs/evaluation.md explains what each one prints and draws.
"""
from __future__ import annotations

from engine import startup  # before all others: it checks the versions

# isort: split
import argparse
import itertools
import json
import math
import re
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import checkpoint
import data
import formats.lpips
import sample
from checkpoint import number
from dataset import folder
from dataset.figures import Figures
from dataset.latents import LatentCache
from diffusion import MOST_SEEDS, Diffusion
from engine.run import read_log
from formats import compvis, detections
from keypoints import on_canvas
from ldm import LDM
from metrics import keypoint_detector
from metrics.codebook import code_counts, code_overlap
from metrics.condition import condition_losses
from metrics.images import compare, inception, l1, psnr, ssim, typical_and_worst
from metrics.keypoint_detector import KeypointDetector
from metrics.overfit import HELD_OUT, headline, nearest, verdict
from metrics.pose import Drawn, assess, by_label, judge, oks
from plots import ERROR_WHITE, extremes_figure, overfit_figure, recon_figure
from vq import VQModel

BATCH = 8                       # a layer of a published autoencoder takes 34 MB per image
DEFAULT_SIZE = 256              # of images, if no checkpoint says its own
Columns = dict[str, tuple[str, str, str]]       # of a table, by key: heading, unit, format

# ------------------------------------------------------------------------------------------- recon

SHOWN = 3                       # typical images in recon.png, and as many of the worst
FRECHET_IMAGES = 2048           # with fewer images than Inception features rFID is biased
COLUMNS: Columns = {
    "l1": ("L1", "of 2, lower", ".4f"), "psnr": ("PSNR", "dB, higher", ".2f"),
    "ssim": ("SSIM", "higher", ".4f"), "lpips": ("LPIPS", "lower", ".4f"),
    "rfid": ("rFID", "lower", ".2f"), "codes_used": ("codes used", "of all", ".1%"),
    "perplexity": ("perplexity", "codes", ".1f"), "n_embed": ("codebook", "codes", "d")}
OVERLAP: Columns = {
    "both": ("in both", "codes", "d"), "only_ours": ("only in A", "codes", "d"),
    "only_theirs": ("only in B", "codes", "d"), "common": ("A and B", "of A or B", ".1%"),
    "ours_known": ("uses in A", "of B's codes", ".1%"),
    "theirs_known": ("uses in B", "of A's codes", ".1%"),
    "histogram": ("same share", "sum min p", ".1%")}


def recon(args: argparse.Namespace) -> None:
    """Prints the table of autoencoders; writes recon.json and recon.png."""
    device, names = checkpoint.find_device(args.device), short_names(args.vq)
    payloads = [checkpoint.load_vq(path, not args.no_ema) for path in args.vq]
    models = [checkpoint.build_vq(payload, path).to(device)
              for payload, path in zip(payloads, args.vq, strict=True)]
    ask_configs(args, [payload["config"] for payload in payloads],
                math.lcm(*(model.config.factor for model in models)))
    if data.is_plain(args.data) and not args.trained_on:
        images, which = data.open_all(args.data, args.size, True, args.trim_bars), args.data
    else:
        _, images = data.open_data(args.data, args.size, args.val, False, args.trim_bars,
                                   args.labels, poseless=True)
        which = args.val or f"held out of {args.data}"
    images = data.spread(images, args.limit)
    other = data.open_all(args.against, args.size, True, args.trim_bars) if args.against else None
    make_out(args.out, args.data, args.val, args.against)
    measures = {"l1": l1, "psnr": psnr, "ssim": ssim}
    if args.lpips_weights:
        measures["lpips"] = formats.lpips.load_lpips(args.lpips_weights).to(device)
    features = inception(device) if args.rfid else None

    with progress(images, "reconstructing") as bar:
        found = compare(models, (x for x, _, _ in bar), measures, features, device)
    n = len(found.tallies[0].scores["psnr"])
    rows = {name: tally.result(found.originals) | {"n_embed": model.config.n_embed}
            for name, tally, model in zip(names, found.tallies, models, strict=True)}
    boxes = {f"boxes of {factor} x {factor}": tally.result(found.originals)
             for factor, tally in found.boxes.items()}
    title = f"{n} images, {which}, {args.size} x {args.size} pixels"
    print(f"{title}\n\n{table(rows | boxes, COLUMNS)}\n")
    if args.rfid and n < FRECHET_IMAGES:
        print(f"rFID of {n} images is biased upwards; compare it only with rFID of as many images.")

    report = {"dataset": which, "images": n, "size": args.size,
              "baselines": [{"name": name, **row} for name, row in boxes.items()],
              "checkpoints": []}
    for name, path, payload in zip(names, args.vq, payloads, strict=True):
        report["checkpoints"].append({"name": name, "file": path, "step": payload["step"],
                                      "hash": checkpoint.hash_of(payload["vq"]), **rows[name]})
    if other is not None:
        with progress(data.spread(other, args.limit), "codes of --against") as bar:
            theirs, m = code_counts(models, (x for x, _, _ in bar), device)
        overlap = {name: code_overlap(tally.counts, counts)
                   for name, tally, counts in zip(names, found.tallies, theirs, strict=True)}
        print(f"Codes in use. A: {n} images, {which}; B: {m} of {args.against}\n\n"
              f"{table(overlap, OVERLAP)}\n")
        report["against"] = {"data": args.against, "images": m, "overlap": overlap}
    if args.out:
        title += (f": around the median PSNR of {names[0]}, and the worst. Errors: black is 0, "
                  f"white {ERROR_WHITE:.0%} of the range and more")
        shown = draw_recon(Path(args.out) / "recon.png", dict(zip(names, models, strict=True)),
                           images, found.tallies[0].scores["psnr"], title)
        write_report(Path(args.out) / "recon.json", args, report | shown)
        print(f"wrote {args.out}/recon.json and recon.png")


def short_names(paths: list[str]) -> list[str]:
    """The shortest ends of the paths that differ: last.pt alone, or a/last.pt and b/last.pt."""
    parts = [Path(path).resolve().parts for path in paths]
    k = next(k for k in itertools.count(1) if len({p[-k:] for p in parts}) == len(set(parts)))
    return ["/".join(p[-k:]) for p in parts]


def draw_recon(path: Path, models: dict[str, VQModel], images: data.ImageDataset,
               scores: list[float], title: str) -> dict[str, list[str]]:
    """Draws typical images and the worst by `scores`; returns their names."""
    sound = [i for i in range(len(images)) if images.name(i) not in images.broken]
    typical, worst = ([sound[k] for k in places] for places in typical_and_worst(scores, SHOWN))
    pairs = [images[i] for i in typical + worst]
    originals, poses = (np.stack(part) for part in zip(*pairs, strict=True))
    names = [images.name(i) for i in typical + worst]
    labels = ["typical"] * len(typical) + ["worst"] * len(worst)
    recon_figure(path, originals, {name: reconstruct(vq, originals) for name, vq in models.items()},
                 poses, labels, [Path(name).stem for name in names], title)
    return {"typical": names[:len(typical)], "worst": names[len(typical):]}


@torch.no_grad()
def reconstruct(vq: VQModel, images: np.ndarray) -> np.ndarray:
    """Images uint8 [N, H, W, 3] through an autoencoder."""
    device = next(vq.parameters()).device
    return np.concatenate([data.to_uint8(vq(x.to(device))[0].float())
                           for x in data.to_tensor(images).split(BATCH)])


# --------------------------------------------------------------------------------------- condition

def condition(args: argparse.Namespace) -> None:
    """Prints the eps loss with right, shuffled and no poses, in float32, and shuffled / right."""
    ldm, payload = open_ldm(args)
    device = ldm.mean.device
    _, held_out = data.open_data(args.data, args.size, args.val, False, args.trim_bars, args.labels,
                                 checkpoint.label_names(payload, args.ckpt))
    held_out = data.spread(held_out, args.limit)
    with torch.no_grad(), progress(held_out, "encoding") as bar:
        found = [(ldm.encode(x.to(device)), pose, label) for x, pose, label in bar]
    z, poses, labels = (torch.cat(part).to(device) for part in zip(*found, strict=True))
    losses = condition_losses(ldm, Diffusion(**ldm.schedule), z, poses, BATCH,
                              null=ldm.supports_guidance, labels=labels)
    for name, value in losses.items():
        print(f"{name:12s} {value:.4f}")
    if not ldm.supports_guidance:
        print("There is no loss without a pose: training did not drop poses.")


def open_ldm(args: argparse.Namespace) -> tuple[LDM, dict]:
    """The model of --ckpt and its payload; `ask_configs`, and prints what is measured."""
    device = checkpoint.find_device(args.device)
    ldm, payload = checkpoint.load_ldm(args.ckpt, device, preset=args.preset, ema=not args.no_ema)
    ask_configs(args, [payload["config"]],
                ldm.vq.config.factor * 2 ** (len(ldm.unet.config.channel_mult) - 1))
    print(f"{checkpoint.dated(args.ckpt, payload['step'])}, device {device}, dataset {args.data}")
    if "source" in payload:
        print(compvis.describe(payload, args.ckpt))
    return ldm, payload


# -------------------------------------------------------------------------------------------- pose

GOOD_DETECTOR = 0.9             # PCK@0.1 on real images; below it says little about samples
FIDELITY: Columns = {
    "pck@0.1": ("PCK@0.1", "higher", ".3f"), "pck@0.2": ("PCK@0.2", "higher", ".3f"),
    "oks": ("OKS", "higher", ".3f"), "label": ("label", "share right", ".3f"),
    "frechet": ("Frechet distance", "detector's features", ".3f")}
LABELS: Columns = {"images": ("samples", "", "d"), "pck@0.1": FIDELITY["pck@0.1"],
                   "label": FIDELITY["label"]}
ROW_NAMES = {"samples": "samples", "decoded": "real images through stage 1",
             "real": "real images (the ceiling)", "shuffled": "samples, other poses (the floor)"}


def pose(args: argparse.Namespace) -> None:
    """Prints how well samples show the poses asked for; writes pose.json, pose.png and images."""
    out, by = Path(args.out) if args.out else None, args.detected or "the keypoint detector"
    if args.detected:               # in the images of an earlier run: its model is not needed
        asked, images, about = detections.read_images(out)
        n = len(asked)
        drawn = Drawn(asked, images[:n], images[n:])
        found = detections.read_found(args.detected, len(images), images.shape[1])
        poses = np.stack([found.get(i, data.NO_POSE) for i in range(len(images))])
        kinds = {"samples": poses[:n]}
        if max(found) >= n:         # it has looked at the real images too
            kinds["real"] = poses[n:]
        rows, read = judge(asked, kinds), kinds["samples"]
    else:
        drawn, rows, read, about = draw_and_read(args, out)
    title = about["title"]
    named = {name: rows[key] for key, name in ROW_NAMES.items() if key in rows}
    print(f"{title}\n\n{table(named, FIDELITY)}\n\n{what_it_means(rows, by)}")
    if about.get("labels"):
        print(f"\n{table(about['labels'], LABELS)}")
    if out:
        write_report(out / "pose.json", args, {"read_by": by, **about, "rows": rows})
        scores = oks(read, drawn.asked, on_canvas(drawn.asked))
        extremes_figure(out / "pose.png", drawn.asked, drawn.samples, read, drawn.real, scores,
                        f"{title}: PCK@0.1 {rows['samples']['pck@0.1']:.3f}")
        print(f"\nwrote {out}/pose.json and pose.png")


def draw_and_read(args: argparse.Namespace,
                  out: Path | None) -> tuple[Drawn, dict, np.ndarray, dict]:
    """Samples of held-out poses, the rows of the table, the poses found in the samples, and what
    the samples depend on."""
    ldm, payload = open_ldm(args)
    names = checkpoint.label_names(payload, args.ckpt)
    sample.ask_model(args, ldm)
    make_out(args.out, args.data, args.val)
    if out:
        detections.earlier_images(out)                      # before the work: are they ours?
    train, held_out = data.open_data(args.data, args.size, args.val, True, args.trim_bars,
                                     args.labels, names)
    held_out = data.spread(held_out, args.limit)
    how = sample.settings_of(args)
    about = {"checkpoint": checkpoint.hash_of(ldm.unet.state_dict()), "data": args.data,
             "val": args.val, "size": args.size, "images": len(held_out), **how,
             "seed": args.seed,
             "title": f"{len(held_out)} held-out poses of {args.data}, {args.ckpt} step "
             f"{payload['step']}, {sample.SAMPLERS[args.sampler]} {args.steps} steps, "
             f"eta {args.eta:g}, guidance {args.guidance:g}"}
    drawn = draw_held_out(ldm, held_out, args.seed, **how)
    if out:
        detections.write_images(out, drawn.asked, np.concatenate([drawn.samples, drawn.real]),
                                about)
        print(f"wrote {out}/{detections.IMAGES}/ and {detections.POSES}")
    detector = find_detector(args.data, train, str(ldm.mean.device))
    rows, read = assess(detector, drawn, decoded=reconstruct(ldm.vq, drawn.real))
    if names:
        about["labels"] = by_label(detector, drawn, names, read)
    return drawn, rows, read, about


def what_it_means(rows: dict[str, dict], detector: str) -> str:
    """The samples' PCK@0.1 between its floor and its ceiling, in sentences."""
    if "real" not in rows:
        return f"{detector} has no poses of the real images, so the ceiling is unknown."
    ours, ceiling, floor = (rows[name]["pck@0.1"] for name in ("samples", "real", "shuffled"))
    said = (f"PCK@0.1 of samples is {ours:.3f}, {ours / max(ceiling, 1e-9):.2f} of the ceiling "
            f"{ceiling:.3f}; the floor is {floor:.3f}.")
    if ceiling < GOOD_DETECTOR:
        said += (f"\nThe ceiling is low: {detector} finds only {ceiling:.0%} of the joints in real "
                 "images, so it says little about samples. More training images make a better "
                 "detector, and --detected takes another one.")
    return said


def draw_held_out(
    ldm: LDM,
    held_out: data.ImageDataset,
    seed: int = 0,
    **how: object,                  # of sample.settings, which has the defaults
) -> Drawn:
    """A sample for the pose of each held-out image, the i-th with seed `seed` + i."""
    with progress(held_out, "reading images") as bar:
        found = [(data.to_uint8(x), pose, label) for x, pose, label in bar]
    if sum(len(x) for x, _, _ in found) < 2:
        raise ValueError("shuffling poses needs at least 2 held-out images; add images")
    real, poses, labels = (np.concatenate(part) for part in zip(*found, strict=True))
    samples = sample.draw_images(ldm, torch.from_numpy(poses), [seed + i for i in range(len(real))],
                                 held_out.size, labels=torch.from_numpy(labels),
                                 **sample.settings(ldm, **how))
    return Drawn(poses.astype(np.float64), np.stack(samples), real, labels)


BUNDLED = Path(__file__).parent / "assets/pose-reader.pt"   # for 64 pixels, in half precision
BUNDLED_FIGURES = 10_000        # that it was trained on


def find_detector(spec: str, train: data.ImageDataset, device: str = "cpu",
                  steps: int = keypoint_detector.STEPS) -> KeypointDetector:
    """The detector of the training images of --data `spec`: saved before, bundled, or trained now.

    The bundled one is for figures, any number of them.
    """
    side = keypoint_detector.detector_side(train.size)
    about = {"version": keypoint_detector.VERSION, "pictures": train.fingerprint(), "side": side,
             "steps": steps}
    names, ids = list(train.label_names), torch.from_numpy(train.label_ids())
    if names:
        about |= {"labels": names, "label_ids": checkpoint.hash_of({"ids": ids})}
    name = re.sub(r"\W", "-", Path(spec).stem)
    path = Path("runs") / f"{name}-pose-reader-{side}-{about['pictures'][:8]}.pt"
    known = [("saved", path, about)]
    if not data.is_folder(spec):
        figures = Figures(BUNDLED_FIGURES, train.size, seed=0)
        known.append(("bundled", BUNDLED, about | {"pictures": figures.fingerprint()}))
    for which, file, wanted in known:
        found = checkpoint.read(file) if file.exists() else {}
        if found.get("about") == wanted:
            print(f"Using the {which} keypoint detector {file}.")
            detector = checkpoint.build(partial(KeypointDetector, side, num_classes=len(names)),
                                        found["reader"], str(file))
            return detector.eval().requires_grad_(False).to(device)
    batches = data.batches(train, keypoint_detector.BATCH, 0, 0, steps, data.find_workers(device),
                           augment=True, zoom=(1.0, 1.0), device=device)
    amp = "bf16" if checkpoint.has_bf16(device) else "off"
    detector = keypoint_detector.train_detector(
        ((x, poses, ids[i]) for x, poses, i in batches), steps, side, device,
        partial(checkpoint.autocast, amp, device), len(names))
    path.parent.mkdir(exist_ok=True)
    checkpoint.save(path, {"about": about, "reader": detector.state_dict()})
    print(f"Saved the keypoint detector to {path}.")
    return detector


# ----------------------------------------------------------------------------------------- overfit

FILM = 6                        # step-*.pt in the strip of one seed, beside best.pt and last.pt


def overfit(args: argparse.Namespace) -> None:
    """Prints the verdict on a run of stage 2; writes overfit.json and overfit.png."""
    ldm, config, rows = open_run(args)
    verdict(rows)                               # ValueError now, if the log has no evaluation
    run, out = Path(args.run), Path(args.out or args.run)
    size, device = config["size"], ldm.mean.device
    make_out(str(out), config["data"], config["val"])
    train, held_out = data.open_data(config["data"], size, config["val"], False,
                                     config.get("trim_bars", False), labels_flag(config))
    if config.get("data_hash") not in (None, data.data_hash(train, config["val"] and held_out)):
        raise ValueError(f"the images of {config['data']} are not those that {run} was trained on; "
                         "restore them to tell what was memorised")

    @torch.no_grad()
    def encode(x: Tensor) -> Tensor:
        with checkpoint.autocast(config["amp"], device):                    # as in training
            return ldm.vq.encode(x.to(device)).float()

    def trained(rows: np.ndarray) -> Tensor:            # latents z [N, C, h, w] of the cache
        return (cache.rows(rows)[0].to(device) - ldm.mean) / ldm.std

    cache = LatentCache(run, f"{config['vq_hash']} {config['amp']}", train, encode, BATCH, device)
    held_out = data.spread(held_out, args.limit)
    images, *found = zip(*data.in_order(held_out, BATCH), strict=True)
    theirs, their_labels = map(torch.cat, found)
    rows_shown, shown = 2 * data.evenly(len(cache) // 2, args.n), data.evenly(len(theirs), args.n)
    poses = {"training poses": cache.rows(rows_shown)[1], "held-out poses": theirs[shown]}
    labels = {"training poses": cache.labels[rows_shown], "held-out poses": their_labels[shown]}
    latents = {HELD_OUT: torch.cat([(encode(x) - ldm.mean) / ldm.std for x in images])}
    latents |= {name: draw_latents(ldm, poses[name], labels[name], size, args) for name in poses}
    near = nearest(latents, trained, len(cache))
    found = verdict(rows, {name: part.distances.tolist() for name, part in near.items()})
    print(f"{run} at step {found['numbers']['step']:,}: {headline(found)}")
    for reason in found["reasons"]:
        print(f"- {reason}")
    samples = {name: [{"distance": float(d), "nearest": int(row) // 2, "mirrored": bool(row % 2)}
                      for d, row in zip(near[name].distances, near[name].rows, strict=True)]
               for name in poses}
    write_report(out / "overfit.json", args, {"run": str(run), **found, "samples": samples,
                                              **sample.settings_of(args), "seed": args.seed})
    first = [torch.stack([each[name][0] for name in poses]) for each in (poses, labels)]
    strip = film(run, *first, size, args)
    overfit_figure(out / "overfit.png", partial(sample.decode, ldm), trained, rows, found, near,
                   poses, strip)
    print(f"wrote {out}/overfit.json and overfit.png")


def open_run(args: argparse.Namespace) -> tuple[LDM, dict, list[dict]]:
    """The model of --run's last.pt, its configuration, and the rows of the log up to its step."""
    run, args.device = Path(args.run), checkpoint.find_device(args.device)
    args.ckpt = str(run / "last.pt")
    ldm, payload = checkpoint.load_ldm(args.ckpt, args.device)
    sample.ask_model(args, ldm)
    rows = [row for row in read_log(run / "log.jsonl") if row["step"] < payload["step"]]
    return ldm, payload["config"], rows


def draw_latents(ldm: LDM, poses: Tensor, labels: Tensor, size: int,
                 args: argparse.Namespace) -> Tensor:
    """A sample z [N, C, h, w] of each pose [N, 17, 3] and label [N], the i-th with seed --seed + i.
    """
    seeds = [args.seed + i for i in range(len(poses))]
    last, = sample.denoise(ldm, poses, seeds, size, labels=labels, **sample.settings_of(args))
    return last.x.to(ldm.mean.device)


def film(run: Path, poses: Tensor, labels: Tensor, size: int,
         args: argparse.Namespace) -> dict[int, list[np.ndarray]]:
    """By step, a sample of each pose [N, 17, 3] and label [N] with the checkpoints of a run folder.
    """
    kept = sorted(run.glob("step-*.pt"))
    paths = [kept[i] for i in data.evenly(len(kept), FILM)]
    paths += [path for path in (run / "best.pt", run / "last.pt") if path.exists()]
    out = {}
    for path in tqdm(paths, "one seed over the checkpoints", unit="checkpoint", dynamic_ncols=True):
        ldm, payload = checkpoint.load_ldm(path, args.device)
        out[payload["step"]] = sample.decode(ldm, draw_latents(ldm, poses, labels, size, args))
    return dict(sorted(out.items()))


# ---------------------------------------------------------------------------------- what they share

def labels_flag(config: dict) -> str | None:
    """--labels as the run of this config had it."""
    by = config.get("labels") or "off"
    return None if by == folder.LABEL_COLUMN else by            # it is read by itself


def ask_configs(args: argparse.Namespace, configs: list[dict], multiple: int) -> None:
    """Sets --data, --val and --size, where they are not given, to those of the first training
    configuration that has them, and args.labels and args.trim_bars by it. ValueError for a size
    that is no multiple of `multiple`."""
    args.trim_bars = any(config.get("trim_bars") for config in configs)     # as they were trained
    known = next((config for config in configs if config.get("data")), None)
    if not args.data:
        if known is None:
            raise ValueError("the checkpoint does not say what it was trained on; name it with "
                             "--data")
        args.data, args.val = known["data"], args.val or known.get("val")
    args.trained_on = known is not None and args.data == known["data"]
    args.labels = labels_flag(known) if args.trained_on else None
    sizes = [args.size, *(config.get("size") for config in configs), DEFAULT_SIZE]
    args.size = next(filter(None, sizes))
    if args.size % multiple:
        raise ValueError(f"--size is {args.size}; this model needs a multiple of {multiple} pixels")


def make_out(out: str | None, *roots: str | None) -> None:
    """Makes the folder --out, if given; ValueError if it lies among the images of `roots`."""
    if out:
        data.check_out(out, *roots)
        Path(out).mkdir(parents=True, exist_ok=True)


def progress(ds: data.ImageDataset, what: str) -> tqdm:
    """The batches of data.in_order with a bar; use it in `with`, so that an error ends the bar."""
    return tqdm(data.in_order(ds, BATCH), total=math.ceil(len(ds) / BATCH), desc=what, unit="batch",
                dynamic_ncols=True)


def table(rows: dict[str, dict], columns: Columns) -> str:
    """Aligned text: a line for each of `rows`, those columns that any row has."""
    keys = [key for key in columns if any(key in row for row in rows.values())]
    lines = [["", *(columns[key][i] for key in keys)] for i in (0, 1)]
    lines += [[name, *(format(row[key], columns[key][2]) if key in row else "" for key in keys)]
              for name, row in rows.items()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]).rstrip()
                     for first, *rest in lines)


def write_report(path: Path, args: argparse.Namespace, report: dict) -> None:
    """Writes the command and a report, NaN and infinity as null, whole or not at all."""
    report = {"command": shlex.join(["python", "evaluate.py", *args.argv])} | report
    with checkpoint.replacing(path) as file:
        file.write(json.dumps(without_nan(report), indent=1, allow_nan=False).encode())


def without_nan(value: object) -> object:
    if isinstance(value, dict):
        return {key: without_nan(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ------------------------------------------------------------------------------------ command line

def limit(text: str) -> int:
    """An argparse type: a number of images, at least 2, or "all"."""
    return sys.maxsize if text == "all" else number(int, 2)(text)


COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], None], str]] = {
    "recon": (recon, "compare autoencoders: L1, PSNR, SSIM, LPIPS, rFID and codes in use"),
    "condition": (condition, "the eps loss with the right pose, a shuffled pose and none"),
    "pose": (pose, "sample held-out poses and find the joints in the samples"),
    "overfit": (overfit, "tell whether a run of stage 2 is underfit, good or memorising")}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=f"evaluate.py {{{','.join(COMMANDS)}}} [--flags; COMMAND --help explains them]")
    commands = parser.add_subparsers(dest="command", required=True)
    recon, condition, pose, overfit = subs = [
        commands.add_parser(name, help=does, usage=f"evaluate.py {name} [--flags]",
                            description=does[0].upper() + does[1:] + ".")
        for name, (_, does) in COMMANDS.items()]
    what, output, images = ([sub.add_argument_group(title).add_argument for sub in subs]
                            for title in ("what is measured", "output", "images"))

    what[0]("--vq", nargs="+", default=["runs/vq/last.pt"], metavar="FILE",
            help="checkpoints of either stage, ours or CompVis' (default runs/vq/last.pt)")
    what[0]("--lpips-weights", nargs="+", metavar="FILE",
            help="also LPIPS, with these weights of VGG16 and lin layers")
    what[0]("--rfid", action="store_true",
            help="also rFID; needs pytorch-fid, downloads Inception's weights once")
    for add in what[1:3]:
        add("--ckpt", default="runs/ldm/last.pt", metavar="FILE", help="default %(default)s")
        add("--preset", metavar="NAME",
            help=f"of a published checkpoint: {', '.join(compvis.PUBLISHED)}")
    for add in what[:3]:
        add("--no-ema", action="store_true", help="raw weights instead of their EMA")
    what[2]("--detected", metavar="PATH",
            help="joints that another detector found in the images of an earlier --out")
    what[3]("--run", default="runs/ldm", metavar="DIR", help="of stage 2 (default %(default)s)")
    for add in what:
        add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    for add, files in zip(output, ("recon.json and recon.png", None, "pose.json, pose.png and "
                                   "images/", "overfit.json and overfit.png (default: --run)"),
                          strict=True):
        if files:
            add("--out", metavar="DIR", help=f"folder for {files}")

    for add in images[:3]:
        add("--data", metavar="DATA",
            help="as for train.py; its held-out part is used (default: as in training)")
        add("--val", metavar="DATA", help="held-out images, as for train.py")
        add("--size", type=number(int, 16, 4096), metavar="PIXELS",
            help=f"image side (default: the checkpoint's, else {DEFAULT_SIZE})")
    images[0]("--against", metavar="DATA", help="other images: which codes do only they use?")
    for add, most in zip(images, (512, 512, 256, 512), strict=True):
        add("--limit", type=limit, default=most, metavar="N",
            help="held-out images, spread evenly, or all (default %(default)s)")
    images[3]("-n", type=number(int, 1, 4096), default=16, metavar="N",
              help="samples of training poses, and as many of held-out ones (default 16)")

    for sub in (pose, overfit):
        add = sub.add_argument_group("sampling (defaults as in sample.py)").add_argument
        add("--sampler", choices=("ddim", "dpm_solver"), help="what solves the reverse process")
        add("--steps", type=number(int, 1, 10_000), metavar="N", help="of the sampler")
        add("--eta", type=number(float, 0, 1), help="new noise in each step, 0 to 1")
        add("--guidance", type=number(float, -100, 100), metavar="W", help="1 is as trained")
        add("--seed", type=number(int, 0, MOST_SEEDS // 2), default=0,
            help="the i-th sample has seed --seed + i (default 0)")
    args = parser.parse_args(argv)
    if args.command == "pose" and args.detected and not args.out:
        pose.error("--detected needs --out, the folder of the images that the detector saw")
    args.argv = sys.argv[1:] if argv is None else argv
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        COMMANDS[args.command][0](args)
        return 0
    except (ValueError, OSError) as e:
        message, code = e, 2
    except RuntimeError as e:
        if not checkpoint.out_of_memory(e):
            raise
        message, code = "out of memory; use a smaller --size, or --device cpu", 2
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    print(f"evaluate.py: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    startup.run(main)
