"""Label the images of a folder, or draw from a dragged skeleton, on a page in the browser.

    python -m studio mine                       label the images in mine/
    python -m studio --ckpt runs/ldm/last.pt    draw with a model of stage 2
    python -m studio mine --ckpt assets/toy.pt  both
"""
from __future__ import annotations

from engine import startup  # before all others: it checks the versions

# isort: split
import argparse
import os
import sys
import threading
import webbrowser
from contextlib import ExitStack
from pathlib import Path

import keypoints
from checkpoint import number
from engine.process import locked
from extras.proportions import PARENTS
from formats import compvis
from studio.draw import Draw
from studio.label import Label
from studio.server import Call, Studio


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m studio", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", nargs="?", type=Path, metavar="FOLDER",
        help="images to label, with or without keypoints; labels go to FOLDER/keypoints")
    add("--ckpt", metavar="FILE", help="checkpoint of stage 2 to draw with")
    add("--preset", metavar="NAME",
        help=f"of a published CompVis checkpoint: {', '.join(compvis.PUBLISHED)}")
    add("--device", default="auto", help="to draw on: auto, cpu, cuda, cuda:N")
    add("--port", type=number(int, 0, 65535), default=0, help="(default: any free one)")
    add("--no-browser", action="store_true", help="only print the URL")
    args = parser.parse_args(argv)
    if not args.folder and not args.ckpt:
        parser.error("give a FOLDER to label, or --ckpt FILE to draw with, such as assets/toy.pt")
    if args.preset and not args.ckpt:
        parser.error("--preset belongs to a published --ckpt")
    return args


def calls_of(label: Label | None, draw: Draw | None) -> dict[str, Call]:
    """The calls of the modes that there are, and what the page has to know of a skeleton."""
    about = {"label": bool(label), "draw": bool(draw), "joints": keypoints.JOINTS,
             "limbs": keypoints.LIMBS, "mirror": keypoints.MIRROR, "parents": PARENTS,
             "colors": keypoints.COLORS.tolist()}
    return {"GET about": lambda *_: about, **(label.calls() if label else {}),
            **(draw.calls() if draw else {})}


def main(argv: list[str] | None = None) -> int:
    args, label, draw = parse_args(argv), None, None
    try:
        with ExitStack() as stack:
            if args.folder:
                label = Label(args.folder)
                stack.enter_context(locked(label.place, "is being labelled", "use that page, or "
                                           "stop it with Ctrl-C"))
                stack.callback(label.end)
            if args.ckpt:
                draw = Draw(args.ckpt, args.preset, args.device)
                stack.callback(draw.end)
            server = stack.enter_context(Studio(calls_of(label, draw), args.port))
            print(f"{server.url}\nOpen this page in a browser; Ctrl-C ends it.", flush=True)
            if not args.no_browser:
                threading.Thread(target=webbrowser.open, args=(server.url,), daemon=True).start()
            server.serve_forever()
    except (ValueError, OSError) as error:
        print(f"studio: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("studio: stopped; everything is saved", file=sys.stderr, flush=True)
        os._exit(0)         # a request that is still in torch would abort a slower way out
    return 0


if __name__ == "__main__":
    startup.run(main)
