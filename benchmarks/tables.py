"""The tables that README.md and benchmarks/RESULTS.md take from runs.

    python benchmarks/tables.py             writes the tables into the pages
    python benchmarks/tables.py --check     exit status 1 if a page differs from the runs

A page has a table between <!-- table: NAME --> and <!-- end -->. The numbers are those of the files
in benchmarks/results/, which evaluate.py and the benchmarks write.
"""
from __future__ import annotations

import argparse
import json
import platform
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"
PAGES = ROOT / "README.md", ROOT / "assets/README.md", ROOT / "benchmarks/RESULTS.md"
STARTS = {"base": "base, stage 2", "base-both": "base, both stages",
          "base-slow": "base, stage 2, lr 1e-4", "base-among": "base, stage 2, among the others",
          "nothing": "nothing"}


def read(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def write(path: str, rows: dict[str, dict]) -> None:
    """The rows of a benchmark, with its command, the processor and the version of torch."""
    import torch  # the tables need none
    info = Path("/proc/cpuinfo")
    cpu = (re.search(r"model name\s*: (.*)", info.read_text())[1] if info.exists() else
           platform.processor())
    about = {"command": shlex.join(["python", *sys.argv]), "processor": cpu,
             "threads": torch.get_num_threads(), "torch": torch.__version__}
    Path(path).write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


def made_by(report: dict) -> str:
    threads = "1 thread" if report["threads"] == 1 else f"{report['threads']} threads"
    return (f"`{report['command']}`, {threads} of {report['processor']}, torch "
            f"{report['torch']}:\n\n")


def markdown(columns: list[str], rows: list[list[object]]) -> str:
    def line(cells: list[object]) -> str:
        return "| " + " | ".join(map(str, cells)) + " |"
    return "\n".join([line(columns), line(["---"] * len(columns)), *map(line, rows)])


def pose_row(name: str, row: dict, ceiling: float) -> list[str]:
    """A row of `evaluate.py pose`."""
    others = (f"{row[key]:.3f}" if key in row else ""
              for key in ("pck@0.2", "oks", "frechet", "label"))
    return [name, f"{row['pck@0.1']:.3f}, {row['pck@0.1'] / ceiling:.2f}", *others]


def pose(name: str) -> str:
    """The table of one pose.json."""
    report = read(name)
    rows, ceiling = report["rows"], report["rows"]["real"]["pck@0.1"]
    return markdown(["", "PCK@0.1, of the ceiling", "PCK@0.2", "OKS", "Fréchet", "label as asked"],
                    [pose_row(what, rows[key], ceiling) for key, what in (
                        ("samples", "samples"), ("decoded", "real images through stage 1"),
                        ("real", "real images: the ceiling"),
                        ("shuffled", "samples under other poses: the floor"))])


def few_images() -> str:
    """The table of few_images.json."""
    rows, order = [], list(STARTS)
    runs = {re.fullmatch(r"([\w-]+)-(\d+)-seed(\d+)", name).groups(): found
            for name, found in read("few_images").items()}
    for start, n, seed in sorted(runs, key=lambda run: (order.index(run[0]), *map(int, run[1:]))):
        found = runs[start, n, seed]
        row, of = found["rows"]["samples"], found["rows"]["real"]["pck@0.1"]
        copied = found["copies"]["held-out poses"]
        rows.append([STARTS[start], n, seed,
                     f"{found['best']} of {found['steps']}", found["risen"] or "not",
                     f"{row['pck@0.1']:.3f}, {row['pck@0.1'] / of:.2f}", f"{row['frechet']:.2f}",
                     f"{found['rows']['decoded']['frechet']:.2f}", f"{row['label']:.3f}",
                     f"{copied['copies']} of {copied['of']}"])
    return markdown(["start", "images", "seed", "best step", "loss risen at step",
                     "PCK@0.1, of the ceiling", "Fréchet", "of stage 1 alone", "label",
                     "copies in new poses, last model"], rows)


def plain(name: str, first: str, columns: dict[str, tuple[str, str]], part: str = "",
          about: bool = True) -> str:
    """The rows of NAME.json, or of a `part` of them. `columns`: heading -> (key, format); one that
    no row has is left out."""
    report = read(name)
    rows = report["rows"][part] if part else report["rows"]
    columns = {heading: (key, form) for heading, (key, form) in columns.items()
               if any(key in row for row in rows.values())}
    return (made_by(report) if about else "") + markdown([first, *columns], [
        [label, *(cell(row, *column) for column in columns.values())]
        for label, row in rows.items()])


def cell(row: dict, key: str, form: str) -> str:
    return format(row[key], form) if key in row else ""


def seeds(name: str, first: str, columns: dict[str, tuple[str, str]]) -> str:
    """As `plain`, the seeds of a row side by side."""
    report, lines = read(name), {}
    for label, row in report["rows"].items():
        lines.setdefault(label.rpartition(", seed ")[0], []).append(row)
    return made_by(report) + markdown([first, *columns], [
        [label, *(", ".join(cell(row, *column) for row in rows) for column in columns.values())]
        for label, rows in lines.items()])


def typical() -> str:
    """The table of typical.json: held-out poses beside poses with noise."""
    report, lines = read("typical"), {}
    for name, row in report["rows"].items():
        pull = name.rpartition(" ")[2]
        lines.setdefault(pull, [pull]).extend([
            f"{row['distance']:.3f}", f"{row['unusual']:.0%}", f"{row['asked']:.3f}",
            f"{row['wanted']:.3f}"])
    columns = ["distance", "rarer than", "asked", "wanted"]
    return made_by(report) + markdown(
        ["`--typical`", *(f"held out: {c}" for c in columns), *(f"noise: {c}" for c in columns)],
        list(lines.values()))


def distances() -> str:
    """How far each sampler is from its limit: the first table of convergence.json."""
    report = read("convergence")
    far = report["rows"]["distance"]
    steps = list(next(iter(far.values())))
    return made_by(report) + markdown(["S", *steps], [
        [name, *(f"{row[S]:.4f}" for S in steps)] for name, row in far.items()])


def overfit() -> str:
    """What was planted and what was found: overfit.json."""
    report = read("overfit")
    return made_by(report) + markdown(
        ["planted", "steps", "found", "pose", "since step", "best step", "held-out loss",
         "training loss", "shuffled / right", "copies"],
        [[row["what"], row["steps"], row["found"]["verdict"], row["found"]["pose"],
          row["found"]["since"] or "", row["found"]["best"], f"{row['loss']:.4f}",
          f"{row['training']:.4f}", f"{row['ratio']:.3f}", f"{row['copies']} of {row['samples']}"]
         for row in report["rows"].values()])


def domain() -> str:
    """PSNR and SSIM of two autoencoders, on the images of each: two files of `recon`."""
    reports = [read("recon-figures"), read("recon-renders")]
    names = "trained on figures", "trained on renders", "boxes of 4 x 4"
    found = [[*report["checkpoints"], *report["baselines"]] for report in reports]
    return markdown(["PSNR in dB / SSIM", "figures, held out", "renders, held out"], [
        [name, *(f"{row['psnr']:.2f} / {row['ssim']:.4f}" for row in rows)]
        for name, rows in zip(names, zip(*found, strict=True), strict=True)])


def labelling() -> str:
    """The table of labelling.json."""
    rows = []
    for name, found in read("labelling").items():
        data, _, seed = name.rpartition(" seed ")
        for row in found["rows"]:
            drags, accepted = row["drags"], row["accepted"]
            rows.append([data, seed, row["labels"], f"{row['pck']:.3f}", f"{accepted:.0%}",
                         f"{drags:.1f}", f"{1 + (1 - accepted) * drags:.1f}",
                         *(f"{row[key][0]:.0f} ({row[key][1]:.0f})"
                           for key in ("learning", "proposing")),
                         f"{row['drawings']:.2f}" if "drawings" in row else ""])
    return markdown(["images", "seed", "labels", "PCK@0.1", "accepted with one key",
                     "joints to drag in the others", "keys and drags an image",
                     "learning, s (CPU s)", "proposing, s (CPU s)", "the 4 human drawings"], rows)


PCK, OKS, FRECHET = ("pck@0.1", ".3f"), ("oks", ".3f"), ("frechet", ".3f")
POSE = {"PCK@0.1": PCK, "PCK@0.2": ("pck@0.2", ".3f"), "OKS": OKS, "Fréchet": FRECHET}
STAGE_1 = {"PSNR, dB": ("psnr", ".2f"), "codes used": ("codes_used", ".1%"),
           "perplexity": ("perplexity", ".0f"), "PCK@0.1": PCK, "Fréchet": FRECHET,
           "images/s": ("img_s", ".0f")}
STAGE_2 = {"eps loss": ("right", ".4f"), "shuffled / right": ("ratio", ".3f"), "PCK@0.1": PCK,
           "OKS": OKS, "Fréchet": FRECHET, "images/s": ("img_s", ".0f")}
PROGRESS = {"minutes": ("minutes", ".1f"), "PCK@0.1": PCK, "OKS": OKS, "label": ("label", ".3f"),
            "Fréchet": FRECHET}
SPEED = {"seconds": ("seconds", ".3f"), "times as fast as the first": ("times", ".2f"),
         "GFLOP/s": ("gflop_s", ".0f"), "of the matmul ceiling": ("of_ceiling", ".0%")}
FILES = {"kB": ("kB", ".1f"), "without workers, images/s": ("without", ",.0f"),
         "2 workers": ("with", ",.0f"), "decoding alone, one process": ("alone", ",.0f")}
LATENTS = {"kB": ("kB", ".1f"), "first reading, rows/s": ("first", ",.0f"),
           "again": ("again", ",.0f"), "copying alone": ("alone", ",.0f"),
           "filling": ("filled", ",.0f")}
TABLES: dict[str, Callable[[], str]] = {
    "characters": lambda: pose("characters"), "toy": lambda: pose("toy"), "few images": few_images,
    "guidance": lambda: plain("guidance", "w", POSE), "typical": typical, "labelling": labelling,
    "distances": distances,
    "drawn": lambda: plain("convergence", "", POSE, "drawn", about=False),
    "codebook": lambda: seeds("codebook", "way", STAGE_1),
    "autoencoder": lambda: seeds("autoencoder", "autoencoder", STAGE_1),
    "diffusion": lambda: seeds("diffusion", "stage 2", STAGE_2),
    "factor": lambda: seeds("factor", "factor", STAGE_1),
    "progress toy": lambda: plain("progress-toy", "step", PROGRESS),
    "progress characters": lambda: plain("progress-characters", "step", PROGRESS),
    "overfit": overfit, "domain": domain,
    "speed unet": lambda: plain("speed-unet", "206 M, batch 4", SPEED),
    "speed vq": lambda: plain("speed-vq", "VQ-f4, 256 pixels", SPEED),
    "sampling": lambda: plain("sampling", "", {"seconds": ("seconds", ".2f")}),
    "loader images": lambda: plain("loader", "JPEG", FILES, "images"),
    "loader latents": lambda: plain("loader", "latents", LATENTS, "latents", about=False)}


def filled(text: str) -> str:
    """A page with its tables as the runs give them."""
    return re.sub(r"(<!-- table: ([\w ]+) -->\n).*?(<!-- end -->)",
                  lambda m: f"{m[1]}{TABLES[m[2]]()}\n{m[3]}", text, flags=re.S)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    args, wrong = parser.parse_args(argv), 0
    for page in PAGES:
        old = page.read_text()
        new = filled(old)
        wrong += new != old
        if not args.check:
            page.write_text(new)
    return int(args.check and wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
