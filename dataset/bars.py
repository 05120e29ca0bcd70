"""Letterbox bars: an image in, the box between its bars out."""

import numpy as np
from PIL import Image

import keypoints

NOISE = 16                      # levels that a bar's pixel may be off its colour: JPEG rings
STRAY = 0.02                    # share of a bar's line that may be further off
EDGE = 0.8                      # share of the line behind a bar that is; 0.7 on grey backgrounds
LEAST = 0.01                    # share of the side; narrower bars do no harm


def cut_bars(image: Image.Image, pose: np.ndarray) -> tuple[Image.Image, np.ndarray]:
    """The image without its letterbox bars, and its pose [17, 3] normalised to what is left."""
    W, H = image.size
    x0, y0, x1, y1 = find_bars(np.asarray(image))
    return image.crop((x0, y0, x1, y1)), keypoints.crop(pose, (x0 / W, y0 / H, x1 / W, y1 / H))


def find_bars(pixels: np.ndarray) -> tuple[int, int, int, int]:
    """uint8 [H, W, 3] -> (x0, y0, x1, y1) between the letterbox bars; the whole image without any.

    Bars are of one colour, come in pairs of similar width and end in a straight line: right behind
    it nearly all pixels differ. A flat background ends where somebody stands, at no straight line.
    """
    H, W = pixels.shape[:2]
    for outermost in (pixels[0], pixels[:, 0]):         # one of the two is part of a bar
        colour = np.median(outermost, axis=0).astype(np.uint8)
        if differs(outermost, colour).mean() <= STRAY:
            break
    else:
        return 0, 0, W, H
    ink = differs(pixels, colour)                                                  # [H, W]
    (x0, x1), (y0, y1) = (between_bars(ink.mean(axis) > STRAY) for axis in (0, 1))
    part = ink[y0:y1, x0:x1]
    edges = [blurred_lines(lines, n) if at not in (0, n) else 0 for lines, at, n in (
        (part.T, x0, W), (part, y0, H), (part.T[::-1], x1, W), (part[::-1], y1, H))]
    if None in edges:
        return 0, 0, W, H
    return x0 + edges[0], y0 + edges[1], x1 - edges[2], y1 - edges[3]


def differs(pixels: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """bool [...]: which of the pixels uint8 [..., 3] are not of a bar's colour."""
    apart = np.maximum(pixels, colour) - np.minimum(pixels, colour)
    r, g, b = np.moveaxis(apart, -1, 0)
    return np.maximum(np.maximum(r, g), b) > NOISE              # five times faster than max(-1)


def between_bars(content: np.ndarray) -> tuple[int, int]:
    """bool [n], whether a line has content -> the lines between two bars; (0, n) without bars."""
    n, lines = len(content), np.flatnonzero(content)
    thin, thick = sorted((lines[0], n - 1 - lines[-1])) if len(lines) else (0, 0)
    if thin < max(LEAST * n, 2) or thick > 2 * thin:
        return 0, n
    return int(lines[0]), int(lines[-1]) + 1


def blurred_lines(lines: np.ndarray, n: int) -> int | None:
    """How many of the lines inside a bar scaling and JPEG have blurred; None at no bar's edge."""
    full = lines[:min(1 + n // 32, 9)].mean(1) >= EDGE
    return int(full.argmax()) if full.any() else None
