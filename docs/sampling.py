"""Draws the images of docs/sampling.md: the commands above an image draw it, one below the other.

    python docs/sampling.py                  all images
    python docs/sampling.py guidance init    these

Writes images/NAME.png, or the .gif of a series. Variables like $P keep their value down the page.
"""
from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

DOCS = Path(__file__).parent
ROOT = DOCS.parent
COLOURS = 256                   # of a PNG: enough for these images, and a third of the bytes
BLOCK = r"```bash\n(.*?)```\s*!\[[^\]]*\]\((images/\S+)\)"

sys.path.insert(0, str(ROOT))
import plots  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    names, variables = parser.parse_args().names, dict(os.environ)
    for block, target in re.findall(BLOCK, (DOCS / "sampling.md").read_text(), re.S):
        lines = [line.split(" #")[0].strip() for line in block.splitlines()]
        variables |= dict(line.split("=", 1) for line in lines if re.match(r"\w+=", line))
        commands = [line for line in lines if line.startswith("python sample.py")]
        if not names or Path(target).stem in names:
            draw(commands, DOCS / target, variables)


def draw(commands: list[str], target: Path, variables: dict[str, str]) -> None:
    """Runs commands and puts their sheets, or the .gif of the only one, into `target`."""
    with tempfile.TemporaryDirectory() as folder:
        sheets = [f"{folder}/{i}{target.suffix}" for i in range(len(commands))]
        for command, sheet in zip(commands, sheets, strict=True):
            line = f"{command} --out {shlex.quote(sheet)}".replace("python", sys.executable, 1)
            subprocess.run(["bash", "-c", line], cwd=ROOT, env=variables, check=True)
        if target.suffix == ".gif":
            target.write_bytes(Path(sheets[0]).read_bytes())
        else:
            page = plots.stacked([Image.open(sheet).convert("RGB") for sheet in sheets])
            page.quantize(COLOURS, dither=Image.Dither.NONE).save(target, optimize=True)
    print(f"{target.relative_to(ROOT)}: {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
