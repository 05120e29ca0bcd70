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


def guidance() -> str:
    """The table of guidance.json."""
    report = read("guidance")
    keys = "pck@0.1", "pck@0.2", "oks", "frechet"
    return made_by(report) + markdown(
        ["w", "PCK@0.1", "PCK@0.2", "OKS", "Fréchet"],
        [["real images" if w == "real" else w.removeprefix("w "),
          *(f"{row[key]:.3f}" if key in row else "" for key in keys)]
         for w, row in report["rows"].items()])


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


def drawn() -> str:
    """What each sampler draws: the second table of convergence.json."""
    return markdown(["", "PCK@0.1", "PCK@0.2", "OKS", "Fréchet"], [
        [name, *(f"{row[key]:.3f}" for key in ("pck@0.1", "pck@0.2", "oks", "frechet"))]
        for name, row in read("convergence")["rows"]["drawn"].items()])


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


TABLES: dict[str, Callable[[], str]] = {
    "characters": lambda: pose("characters"), "toy": lambda: pose("toy"), "few images": few_images,
    "guidance": guidance, "typical": typical, "labelling": labelling,
    "distances": distances, "drawn": drawn}


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
