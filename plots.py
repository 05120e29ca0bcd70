"""Pictures for people: grids, animations, curves and report pages. Arrays and rows of a log in, image files out."""
from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

import data
from keypoints import JOINTS, LIMBS, draw, on_canvas
from metrics.images import psnr
from metrics.overfit import (
    BINS,
    COPY_PERCENTILE,
    HELD_OUT,
    Near,
    bin_keys,
    evaluations,
    gaps,
    has_risen,
    headline,
    risen,
)
from metrics.pose import Drawn, oks
from vq import VQModel

if TYPE_CHECKING:                   # the check of a dataset draws its overview here
    from dataset.check import Checked, Suspect

# -------------------------------------------------------------------------------------------------------- grids

def save_grid(
    path: str | Path,
    rows: list[list[np.ndarray | None]],    # uint8 [H, W, 3] each; None leaves the place empty
    columns: list[str] = (),                # a heading over each column
    labels: list[str] = (),                 # a label left of each row
    captions: list[list[str]] = (),         # a line under each picture
    title: str = "",
    scale: int | None = None,               # whole-number enlargement; None: small pictures grow to about 150 pixels
    words: dict[str, str] | None = None,    # see save_picture
) -> Image.Image:
    """Pictures in rows on white, with words. Writes `path` and returns the picture."""
    cells = [cell for row in rows for cell in row if cell is not None]
    H, W = (max((cell.shape[axis] for cell in cells), default=1) for axis in (0, 1))
    scale = scale or grid_scale(max(H, W))
    H, W, across, gap = H * scale, W * scale, max(map(len, rows), default=1), 8
    big, font = ImageFont.load_default(17), ImageFont.load_default(13)
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))

    def wrap(text: str, width: int, font) -> str:
        lines = [""]
        for word in text.split():
            longer = f"{lines[-1]} {word}".strip()
            lines[-1:] = [longer] if ruler.textlength(longer, font) <= width or not lines[-1] else [lines[-1], word]
        for i, line in enumerate(lines):
            while len(line) > 1 and ruler.textlength(lines[i], font) > width:
                line = line[:-1]
                lines[i] = f"{line}…"
        return "\n".join(lines)

    def height(texts, font) -> int:
        return max((int(ruler.multiline_textbbox((0, 0), t, font)[3]) + gap for t in texts if t), default=0)

    labels = [wrap(text, 150, font) for text in labels]
    columns = [wrap(text, W, font) for text in columns]
    captions = [[wrap(text, W, font) for text in line] for line in captions]
    left = max((int(ruler.multiline_textbbox((0, 0), t, font)[2]) + gap for t in labels if t), default=0)
    full = left + across * (W + gap) - gap
    title = wrap(title, full, big)
    below = [height(captions[r], font) if r < len(captions) else 0 for r in range(len(rows))]
    head = height([title], big)
    top = head + height(columns, font)
    page = Image.new("RGB", (full + 4 * gap, top + sum(below) + len(rows) * (H + gap) - gap + 4 * gap), "white")
    draw = ImageDraw.Draw(page)
    x0, y = 2 * gap + left, 2 * gap
    draw.multiline_text((2 * gap, y), title, "black", big)
    for c, text in enumerate(columns):
        draw.multiline_text((x0 + c * (W + gap) + W / 2, y + head), text, "black", font, anchor="ma", align="center")
    y += top
    for r, row in enumerate(rows):
        if r < len(labels):
            draw.multiline_text((x0 - gap, y + H / 2), labels[r], "black", font, anchor="rm", align="right")
        for c, cell in enumerate(row):
            x = x0 + c * (W + gap)
            if cell is not None:
                page.paste(Image.fromarray(np.repeat(np.repeat(cell, scale, 0), scale, 1)), (x, y))
            if r < len(captions) and c < len(captions[r]):
                at = x + W / 2, y + H + 3
                draw.multiline_text(at, captions[r][c], "dimgray", font, anchor="ma", align="center")
        y += H + gap + below[r]
    save_picture(path, page, words)
    return page


def grid_scale(side: int) -> int:
    """How often each pixel of a picture of this side is repeated where people look at it."""
    return max(1, 160 // side)


def save_picture(path: str | Path, picture: Image.Image | np.ndarray, words: dict[str, str] | None = None) -> None:
    """Writes a picture, and in a PNG these words (keyword -> ASCII text) besides; other formats carry none.

    tEXt, not the compressed kind: of that PIL refuses to read back more than a mebibyte.
    """
    picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    info = PngInfo()
    for keyword, text in (words or {}).items():
        info.add_text(keyword, text)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, **({"pnginfo": info} if Path(path).suffix.lower() == ".png" else {}))


def save_animation(path: str | Path, frames: list[np.ndarray], fps: float) -> None:
    """Frames uint8 [H, W, 3] as an endless .gif (256 colours a frame) or .webp (exact), enlarged as in a grid.

    A GIF counts in hundredths of a second: each frame ends at the one nearest to its time, so that none is gained.
    """
    scale = grid_scale(frames[0].shape[0])
    images = [Image.fromarray(np.repeat(np.repeat(frame, scale, 0), scale, 1)) for frame in frames]
    ends = [10 * round(100 * (i + 1) / fps) for i in range(len(images))]                # milliseconds
    images[0].save(path, save_all=True, append_images=images[1:], loop=0, duration=np.diff([0, *ends]).tolist(),
                   lossless=True)                                               # which means nothing to a GIF


# -------------------------------------------------------------------------------- losses by steps and timesteps

LEAST_COLOUR = 0.05                 # the share that has the strongest colour, at least: noise is to look pale


def draw_bins(ax: object, rows: list[dict], share: Callable[[dict], dict[str, float]]) -> None:
    """A heat map of `share`, over steps and timesteps, into matplotlib's `ax`; a dot marks what `has_risen`."""
    found = [row for row in evaluations(rows) if bin_keys(row)]
    if not found:
        ax.text(0.5, 0.5, "no evaluation yet", ha="center", va="center", transform=ax.transAxes, color="gray")
        return
    keys = bin_keys(found[-1])
    values = np.array([[share(row).get(key, math.nan) for row in found] for key in keys])      # [bins, evaluations]
    steps = np.array([row["step"] + 1 for row in found])
    edges = np.concatenate([[0], (steps[:-1] + steps[1:]) / 2, steps[-1:]]).astype(float)
    first = [int(key[2:]) for key in keys]
    most = max(LEAST_COLOUR, np.nanmax(np.abs(values), initial=0))
    mesh = ax.pcolormesh(edges, [*first, first[-1] + (first[-1] / max(1, len(keys) - 1))], 100 * values, cmap="RdBu_r",
                         vmin=-100 * most, vmax=100 * most)
    for x, row in zip((edges[:-1] + edges[1:]) / 2, found, strict=True):
        high = [t for t, key in zip(first, keys, strict=True) if has_risen(row, key)]
        ax.plot([x] * len(high), np.array(high) + first[-1] / max(1, len(keys) - 1) / 2, "k.", markersize=4)
    ax.set(ylim=(0, None), ylabel="t")
    ax.figure.colorbar(mesh, ax=ax, format="%+g %%", pad=0.02).ax.tick_params(labelsize=8)


# ------------------------------------------------------------------------------- the best and the worst samples

EXTREMES = 5                        # pictures of the best and as many of the worst


def extremes_figure(path: Path, drawn: Drawn, read: np.ndarray, title: str) -> None:
    """The best and the worst samples by OKS: skeleton asked for, sample, skeleton read in it, the real picture."""
    side, scores = drawn.samples.shape[1], oks(read, drawn.asked, on_canvas(drawn.asked))
    order = [i for i in np.argsort(scores)[::-1] if np.isfinite(scores[i])]
    n = min(EXTREMES, len(order) // 2)
    rows, captions = [[] for _ in range(4)], [[] for _ in range(4)]
    for i in (*order[:n], *order[-n:]):
        cells = (draw(drawn.asked[i], side), drawn.samples[i], draw(read[i], side, drawn.samples[i]), drawn.real[i])
        for row, caption, cell, words in zip(rows, captions, cells, ("", "", f"OKS {scores[i]:.2f}", ""), strict=True):
            row.append(cell)
            caption.append(words)
    save_grid(path, rows, ["best"] * n + ["worst"] * n, ["pose asked for", "sample", "pose read in it",
              "real picture of that pose"], captions, title)


# ----------------------------------------------------------------------------------------- the picture of recon

PAGE_WIDTH = 2300                   # pixels, if the tiles do not become smaller than
TILES = 96, 256                     # sides of a tile, least and most
ERROR_WHITE = 0.25                  # mean absolute error, of 0..1, that is white; fixed, so that figures compare
CROP_LEAST = 1 / 8                  # side of a zoomed part, of the picture's
FACE, HANDS = JOINTS[:5], (("wrist_left", "elbow_left"), ("wrist_right", "elbow_right"))
Box = tuple[int, int, int, int]     # x0, y0, x1, y1 in pixels


def square(centre: np.ndarray, side: float, size: int) -> Box:
    """The square about `centre` (x, y on 0..1) with that side (of 1), moved into a picture of `size` pixels."""
    pixels = min(size, max(round(max(side, CROP_LEAST) * size), 8))
    x0, y0 = (int(np.clip(round(v * size - pixels / 2), 0, size - pixels)) for v in centre)
    return x0, y0, x0 + pixels, y0 + pixels


def eyes_box(pose: np.ndarray, size: int) -> Box | None:
    """Where the face is, by its joints of a pose [17, 3] that lie inside; None where neither eye nor nose does."""
    seen = {name: pose[JOINTS.index(name), :2] for name in FACE if on_canvas(pose[JOINTS.index(name)])}
    if not {"nose", "eye_left", "eye_right"} & seen.keys():
        return None
    points = np.stack(list(seen.values()))
    eyes = [seen[name] for name in ("eye_left", "eye_right") if name in seen] or [seen["nose"]]
    return square(np.mean(eyes, axis=0), 1.6 * np.ptp(points, axis=0).max(), size)


def hand_box(pose: np.ndarray, size: int) -> Box | None:
    """Where a hand is: beyond a wrist inside the picture, away from the elbow where that is known."""
    for wrist, elbow in HANDS:
        w, e = pose[JOINTS.index(wrist)], pose[JOINTS.index(elbow)]
        if on_canvas(w):
            arm = (w - e)[:2] if e[2] > 0 else np.zeros(2)
            return square(w[:2] + 0.25 * arm, 0.9 * np.hypot(*arm), size)
    return None


def error_map(x_hat: np.ndarray, x: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] pictures -> their absolute difference, black, red, yellow, white at ERROR_WHITE and above."""
    error = np.abs(x_hat.astype(float) - x).mean(-1, keepdims=True) / 255 / ERROR_WHITE
    return (255 * (3 * error - np.arange(3)).clip(0, 1)).round().astype(np.uint8)


@torch.no_grad()
def recon_figure(path: str | Path, models: list[VQModel], names: list[str], ds: data.Pictures,
                 shown: list[tuple[str, int]], title: str, device: str | torch.device = "cpu") -> None:
    """A row for each of `shown`, (word, index in ds): original, reconstructions and error maps, then face and hand."""
    rows = [([], []) for _ in shown]                                # tiles and captions
    pictures = [ds[index] for _, index in shown]
    x = data.to_tensor(np.stack([image for image, _ in pictures]))
    x_hats = [data.to_uint8(torch.cat([model(part.to(device))[0] for part in x.split(1)])) for model in models]
    parts = [("", [(0, 0, ds.size, ds.size)] * len(shown))]         # what is zoomed, and where in each picture
    parts += [("eyes", [eyes_box(pose, ds.size) for _, pose in pictures]),
              ("hand", [hand_box(pose, ds.size) for _, pose in pictures])]
    parts = [(word, boxes) for word, boxes in parts if any(boxes)]
    columns = ["original"] + [word for name in names for word in (name, f"{name}: error")]
    columns += [f"{word}, {name}" for word, _ in parts[1:] for name in ("original", *names)]
    least, most = TILES
    tile = int(np.clip(PAGE_WIDTH // len(columns) - 8, least, most))

    def add(row: int, image: np.ndarray | None, caption: str = "") -> None:
        if image is not None:
            how = Image.Resampling.BICUBIC if image.shape[0] < tile else Image.Resampling.BOX
            image = np.asarray(Image.fromarray(image).resize((tile, tile), how))
        rows[row][0].append(image)
        rows[row][1].append(caption)

    for row, (image, _) in enumerate(pictures):
        for word, boxes in parts:
            if boxes[row] is None:
                for _ in range(1 + len(models)):
                    add(row, None)
                continue
            x0, y0, x1, y1 = boxes[row]
            part = image[y0:y1, x0:x1]
            add(row, part, "" if word else Path(ds.name(shown[row][1])).stem)
            for x_hat in x_hats:
                part_hat = x_hat[row][y0:y1, x0:x1]
                dB = psnr(data.to_tensor(part_hat)[None], data.to_tensor(part)[None]).item()
                add(row, part_hat, f"{dB:.1f} dB")
                if not word:
                    add(row, error_map(part_hat, part))
    save_grid(path, [tiles for tiles, _ in rows], columns, [word for word, _ in shown],
              [captions for _, captions in rows], title, scale=1)


# --------------------------------------------------------------------------------------- the picture of overfit

PAGE_LEAST = 1400                   # pixels wide
NEAR_SHOWN = 8                      # samples of each kind beside their nearest training pictures, the nearest first


def overfit_figure(path: Path, decode: Callable[[Tensor], list[np.ndarray]], trained: Callable[[np.ndarray], Tensor],
                   rows: list[dict], found: dict, near: dict[str, Near], poses: dict[str, Tensor],
                   strip: dict[int, list[np.ndarray]]) -> None:
    """One page: verdict and curves, samples beside their nearest training pictures, one seed through checkpoints.

    `decode` makes pictures uint8 [H, W, 3] of latents [N, C, h, w]; `trained` gives the latents of rows [N] of a cache.
    """
    limit, tiles, labels, captions = found["numbers"]["limit"], [], [], []
    for name in poses:
        shown = np.argsort(near[name].distances)[:NEAR_SHOWN]
        distances, at = near[name].distances[shown], near[name].rows[shown]
        tiles += [decode(near[name].z[shown]), decode(trained(at))]
        labels += [f"samples under {name}, those nearest to a training picture first", "that training picture"]
        captions += [[f"{d:.2f}" + (" COPY" if d < limit else "") for d in distances],
                     ["mirrored" if row % 2 else "" for row in at]]
    grid = save_grid(path, tiles, labels=labels, captions=captions, title="Root mean square distance in latent "
                     f"space; {COPY_PERCENTILE:g} % of held-out pictures are nearer than {limit:.2f}")
    size = tiles[0][0].shape[0]
    strips = [[draw(poses[name][0].numpy(), size), *(strip[step][i] for step in strip)] for i, name in enumerate(poses)]
    filmed = save_grid(path, strips, ["pose", *(f"step {step:,}" for step in strip)],
                       [f"one of the {name}" for name in poses], title="One seed through the checkpoints")
    width = max(PAGE_LEAST, grid.width, filmed.width)
    parts = [curves_figure(rows, found, {name: n.distances for name, n in near.items()}, width), grid, filmed]
    page = Image.new("RGB", (width, sum(part.height for part in parts)), "white")
    top = 0
    for part in parts:
        page.paste(part, (0, top))
        top += part.height
    page.save(path)


def curves_figure(rows: list[dict], found: dict, distances: dict[str, np.ndarray], width: int) -> Image.Image:
    """The verdict over curves and heat maps, a small curve for each bin, and how distances lie; `width` pixels wide."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    found_at, keys = evaluations(rows), bin_keys(evaluations(rows)[-1])
    steps = [row["step"] + 1 for row in found_at]
    lines = [line for reason in found["reasons"] for line in textwrap.wrap(f"- {reason}", width // 8)]
    heights = 0.5 + 0.18 * len(lines), 3.2, 3.6, 2.6                        # inches
    fig = plt.figure(figsize=(width / 100, sum(heights)), dpi=100, layout="constrained")
    head, top, middle, bottom = fig.subfigures(4, 1, height_ratios=heights)
    head.text(0.01, 1 - 0.05 / heights[0], headline(found), va="top", fontsize=14, weight="bold")
    head.text(0.01, 1 - 0.4 / heights[0], "\n".join(lines), va="top", fontsize=10)

    def curves(ax: object, key: str, title: str) -> None:
        for name, words, colour in (("right", "held-out", "C1"), ("train", "training", "C0")):
            ax.plot(steps, [row.get(f"val_{name}{key}", math.nan) for row in found_at], colour, marker=".", label=words)
        ax.axvline(found["best"], color="gray", linestyle=":")
        ax.set_title(title, fontsize=10)
        ax.tick_params(labelsize=7)
        ax.grid(alpha=0.3)
    axes = top.subplots(1, 3)
    curves(axes[0], "", "eps loss, EMA; dotted: best.pt")
    axes[0].legend(fontsize=8)
    draw_bins(axes[1], rows, gaps)
    draw_bins(axes[2], rows, risen)
    axes[1].set_title("gap by timestep: held-out above training loss", fontsize=10)
    axes[2].set_title("by timestep: held-out loss above its best; dots: for certain", fontsize=10)
    small = middle.subplots(2, math.ceil(BINS / 2))
    for ax in small.flat[len(keys):]:
        ax.axis("off")
    for ax, key in zip(small.flat, keys, strict=False):
        curves(ax, key, f"t from {int(key[2:])}")
    ax = bottom.subplots()
    edges = np.linspace(0, 1.02 * max(max(d) for d in distances.values()), 60)
    for name, d in distances.items():
        what = "pictures held out" if name == HELD_OUT else f"samples under {name}"
        ax.hist(d, edges, density=True, alpha=0.5, label=f"{len(d)} {what}")
    ax.axvline(found["numbers"]["limit"], color="black", linestyle="--")
    ax.set_title("distance to the nearest training picture; left of the line: copies", fontsize=10)
    ax.legend(fontsize=8)
    file = io.BytesIO()
    fig.savefig(file, format="png")
    plt.close(fig)
    return Image.open(file).convert("RGB")


# ------------------------------------------------------------------------------------ the overview of a dataset

ACROSS = 6                      # pictures in one row of the overview
DENSITY = 10_000                # skeletons in it: more would look the same


def draw_overview(path: Path, checked: Checked, suspects: list[Suspect], shown: list[Suspect], report: dict, side: int,
                  framed: Callable[[int], np.ndarray]) -> None:
    """One picture: where the joints are, what is missing, the sizes; ordinary pictures; the worst suspects, `shown`.

    `framed` gives picture i with its skeleton, uint8 [side, side, 3].
    """
    from matplotlib.figure import Figure  # without pyplot nothing is global, and no window can open

    rows = checked.rows[checked.rows["sound"]]
    ordinary = np.flatnonzero(checked.rows["sound"])[data.evenly(len(rows), ACROSS)]
    cells = [(i, Path(checked.files[i]).name, "dimgray") for i in ordinary]
    cells += [(None, "", "")] * (-len(cells) % ACROSS)
    cells += [(s.index, f"{s.kind}: {s.why}\n{Path(s.file).name}", "firebrick") for s in shown]
    lines = max(1, -(-len(cells) // ACROSS))
    page = Figure(figsize=(16, 5.2 + 3.5 * lines), layout="constrained")
    top, below = page.subfigures(2, 1, height_ratios=(5.2, 3.5 * lines))
    verdicts = "".join(f"\n{_plain(sentence, 150)}" for sentence in report["verdicts"].values())
    top.suptitle(f"{_plain(report['root'], 80)}: {len(rows)} pictures, {len(suspects)} suspects{verdicts}",
                 color="firebrick" if report["verdicts"] else "black", parse_math=False)
    where, joints, sizes = top.subplots(1, 3)
    _draw_density(where, rows["pose"])
    names, lacking = [name.replace("_", " ") for name in JOINTS], list(report["joints"].values())
    missing, outside = ([joint[key] for joint in lacking] for key in ("missing", "outside"))
    if not any(missing + outside):
        joints.text(0.5, 0.5, "none is missing, none outside the picture", ha="center", transform=joints.transAxes)
    joints.barh(names, missing, color="silver")
    joints.barh(names, outside, left=missing, color="indianred")
    joints.set(title="joints missing (grey) and outside (red)", xlim=(0, max(1, *np.add(missing, outside))),
               xlabel="pictures")
    joints.invert_yaxis()
    short = report["short_side"]["histogram"]
    sizes.bar(list(short), list(short.values()), color="steelblue")
    sizes.set(title="short side", xlabel="pixels", ylabel="pictures", xlim=(-1, max(2, len(short))))
    axes = below.subplots(lines, ACROSS, squeeze=False).ravel()
    for ax in axes:
        ax.axis("off")
    for ax, (i, words, colour) in zip(axes, cells, strict=False):
        if i is not None:
            ax.imshow(framed(i), interpolation="nearest" if side < 200 else None)
            text = "\n".join(line for part in words.split("\n") for line in textwrap.wrap(_plain(part, 150), 38))
            ax.set_title(text, fontsize=9, color=colour, parse_math=False, y=0, va="top", pad=-4)
    page.savefig(path, format="png", dpi=80)


def _plain(text: str, most: int) -> str:
    """What every font has, and not too long."""
    text = text.encode("ascii", "replace").decode()
    return text if len(text) <= most else f"{text[:most // 2 - 2]}...{text[-most // 2 + 2:]}"


def _draw_density(ax, poses: np.ndarray) -> None:
    """Skeletons [N, 17, 3] as a 2-D histogram of points along their limbs, the picture's border drawn in."""
    poses = poses[data.evenly(len(poses), DENSITY)]
    seen = poses[..., 2] > 0
    along, counts = np.linspace(0, 1, 24)[:, None], np.zeros((96, 96))
    for a, b in LIMBS:
        ends = poses[seen[:, a] & seen[:, b]][:, [a, b], None, :2]                                      # [n, 2, 1, 2]
        x, y = (ends[:, 0] * (1 - along) + ends[:, 1] * along).reshape(-1, 2).T
        counts += np.histogram2d(y, x, bins=96, range=((-0.1, 1.1), (-0.1, 1.1)))[0]
    ax.imshow(np.sqrt(counts), cmap="magma", extent=(-0.1, 1.1, 1.1, -0.1), interpolation="bilinear")
    ax.plot((0, 1, 1, 0, 0), (0, 0, 1, 1, 0), color="white", lw=0.8)
    ax.set(title="where people are", xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
