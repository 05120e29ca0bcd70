"""Images for people: grids, animations, curves and report pages.

Arrays, rows of a log and callables in, image files out. Pages have fixed margins: automatic layout
is slower than the plot.
"""
from __future__ import annotations

import io
import math
import os
import textwrap
from collections.abc import Callable
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from keypoints import JOINTS, LIMBS, draw, on_canvas
from metrics import overfit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

    from dataset.check import Checked, Suspect

# ------------------------------------------------------------------------------------------- grids

GAP = 8                         # pixels between the images of a grid
LABEL_WIDTH = 150               # pixels of the text left of a row, at most


def save_grid(
    path: str | Path | None,                # None: only returns the page
    rows: list[list[np.ndarray | None]],    # uint8 [H, W, 3] each; None leaves the place empty
    columns: list[str] = (),                # a heading over each column
    labels: list[str] = (),                 # a label left of each row
    captions: list[list[str]] = (),         # a line under each image
    title: str = "",
    scale: int | None = None,               # integer enlargement; None: to about 150 pixels
    words: dict[str, str] | None = None,    # see save_image
) -> Image.Image:
    """Images in rows on white, with words around them."""
    cells = [cell for row in rows for cell in row if cell is not None]
    H, W = (max((cell.shape[axis] for cell in cells), default=1) for axis in (0, 1))
    scale = scale or grid_scale(max(H, W))
    H, W, across = H * scale, W * scale, max(map(len, rows), default=1)
    big, small = load_fonts("".join([title, *columns, *labels, *chain(*captions)]), 17, 13)

    labels = [wrapped(text, LABEL_WIDTH, small) for text in labels]
    columns = [wrapped(text, W, small) for text in columns]
    captions = [[wrapped(text, W, small) for text in line] for line in captions]
    captions += [[]] * (len(rows) - len(captions))
    left = max((extent(text, small)[0] + GAP for text in labels), default=0)
    full = left + across * (W + GAP) - GAP
    title = wrapped(title, full, big)

    head = text_height([title], big)
    top = head + text_height(columns, small)
    below = [text_height(line, small) for line in captions]
    page_size = full + 4 * GAP, top + sum(below) + len(rows) * (H + GAP) + 3 * GAP
    page = Image.new("RGB", page_size, "white")
    pen = ImageDraw.Draw(page)
    x0, y = 2 * GAP + left, 2 * GAP
    pen.multiline_text((2 * GAP, y), title, "black", big)
    for c, text in enumerate(columns):
        at = x0 + c * (W + GAP) + W / 2, y + head
        pen.multiline_text(at, text, "black", small, anchor="ma", align="center")
    y += top
    for r, row in enumerate(rows):
        if r < len(labels):
            at = x0 - GAP, y + H / 2
            pen.multiline_text(at, labels[r], "black", small, anchor="rm", align="right")
        for c, cell in enumerate(row):
            x = x0 + c * (W + GAP)
            if cell is not None:
                page.paste(Image.fromarray(enlarged(cell, scale)), (x, y))
            if c < len(captions[r]):
                at, text = (x + W / 2, y + H + 3), captions[r][c]
                pen.multiline_text(at, text, "dimgray", small, anchor="ma", align="center")
        y += H + GAP + below[r]
    if path is not None:
        save_image(path, page, words)
    return page


def show_grid(rows: list[list[np.ndarray | None]], scale: int = 2, **how: object) -> object:
    """`save_grid` for a notebook, as the last value of a cell: a JPEG, a third of the bytes."""
    from IPython import display  # only notebooks need it

    file = io.BytesIO()
    save_grid(None, rows, scale=scale, **how).save(file, "JPEG", quality=80)
    return display.Image(file.getvalue(), format="jpeg")


def load_fonts(text: str, *sizes: int) -> list[ImageFont.FreeTypeFont]:
    """PIL's own font if it has the characters of a text, else one of `font_file`."""
    return [ImageFont.load_default(size) if text.isascii() else
            ImageFont.truetype(font_file(text), size) for size in sizes]


@lru_cache
def font_file(text: str) -> str:
    """The font of this machine, DejaVu Sans of matplotlib among them, that has most of the
    characters of a text; of several, DejaVu Sans or else an upright regular one."""
    from matplotlib import font_manager
    fonts = [font for font in font_manager.fontManager.ttflist if os.path.exists(font.fname)
             and "lastresort" not in font.name.replace(" ", "").lower()]    # it has boxes for all
    fonts.sort(key=lambda font: (font.name != "DejaVu Sans", font.style != "normal",
                                 str(font.weight) not in ("400", "normal"), font.fname))
    return max(dict.fromkeys(font.fname for font in fonts),
               key=lambda file: sum(has_glyph(file, c) for c in set(text)))


def has_glyph(file: str, character: str) -> bool:
    from matplotlib import font_manager
    return character.isspace() or font_manager.get_font(file).get_char_index(ord(character)) > 0


def drawable(text: str, file: str) -> str:
    """A text with ? for what a font lacks."""
    return "".join(c if has_glyph(file, c) else "?" for c in text)


def extent(text: str, font: ImageFont.FreeTypeFont) -> tuple[int, int]:
    """Width and height of drawn text in pixels."""
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    _, _, right, bottom = ruler.multiline_textbbox((0, 0), text, font)
    return int(right), int(bottom)


def text_height(texts: list[str], font: ImageFont.FreeTypeFont) -> int:
    """Pixels that a line of texts takes, with a gap below; 0 if all are empty."""
    return max((extent(text, font)[1] + GAP for text in texts if text), default=0)


def wrapped(text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    """The text in lines of at most `width` pixels; a longer word is cut."""
    text = text if text.isascii() else drawable(text, font.path)
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
        while len(lines[-1]) > 1 and font.getlength(lines[-1]) > width:
            lines[-1] = lines[-1].removesuffix("…")[:-1] + "…"
    return "\n".join(lines)


def grid_scale(side: int) -> int:
    """How often a grid repeats each pixel of an image of this side."""
    return max(1, 160 // side)


def enlarged(image: np.ndarray, scale: int) -> np.ndarray:
    """Each pixel of [H, W, 3] repeated `scale` times along both axes."""
    return np.repeat(np.repeat(image, scale, 0), scale, 1)


def save_image(path: str | Path, image: Image.Image | np.ndarray,
               words: dict[str, str] | None = None) -> None:
    """Writes an image; a PNG carries `words` (keyword -> text), other formats carry none."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    image.save(path, pnginfo=png_words(words or {}))        # other formats ignore it


def png_words(words: dict[str, str]) -> PngInfo:
    """What a PNG carries: keyword -> text.

    tEXt, not the compressed kind: PIL refuses to read back more than a mebibyte of that.
    """
    info = PngInfo()
    for keyword, text in words.items():
        info.add_text(keyword, text.encode(errors="backslashreplace").decode())
    return info


def save_animation(path: str | Path, frames: list[np.ndarray], fps: float) -> None:
    """Frames uint8 [H, W, 3] as an endless .gif (256 colours a frame) or .webp (lossless).

    A GIF counts in hundredths of a second: each frame ends at the one nearest to its time, so that
    no delay adds up.
    """
    scale = grid_scale(frames[0].shape[0])
    images = [Image.fromarray(enlarged(frame, scale)) for frame in frames]
    ends = [10 * round(100 * (i + 1) / fps) for i in range(len(images))]        # milliseconds
    durations = np.diff([0, *ends]).tolist()
    images[0].save(path, save_all=True, append_images=images[1:], loop=0, duration=durations,
                   lossless=True)                                       # a GIF ignores the last


# ---------------------------------------------------------------------------------- pages of panels

Panels = dict[str, dict[str, str] | Callable]   # title: {label: key of the log} or draw(axes, rows)
PANELS_ACROSS = 4
MEAN_OF = 15                    # rows of the log in a moving mean: one batch is noisy
WIDE = 20                       # largest / smallest value from which an axis is logarithmic
LEAST_COLOUR = 0.05             # the strongest colour is at least this share: noise looks pale
# By the first word of a label, the same in every panel.
COLOURS = {"held-out": "tab:blue", "training": "tab:orange", "right": "tab:blue",
           "shuffled": "tab:red", "none": "tab:gray", "boxes": "tab:gray"}


def plot_curves(path: Path, rows: list[dict], panels: Panels, title: str) -> None:
    """The panels over the steps of a run so far, from the rows of its log."""
    partly = path.with_name(f"{path.name}.partial")         # a kill must not leave half an image
    panels_page(title, {name: partial(draw_panel, rows=rows, panel=panel)
                        for name, panel in panels.items()}).save(partly, "PNG")
    os.replace(partly, path)


def panels_page(title: str, panels: dict[str, Callable[[Axes], None]],
                across: int = PANELS_ACROSS) -> Image.Image:
    """Panels {heading: what draws into axes} under a title of one or more lines."""
    from matplotlib.figure import Figure  # slow to import; without pyplot nothing is global
    from matplotlib.font_manager import FontProperties
    from matplotlib.text import Text
    down, head = math.ceil(len(panels) / across), 0.7 + 0.18 * title.count("\n")    # head: inches
    height = head + 3.4 * down
    fig = Figure(figsize=(4.4 * across, height), dpi=100)
    axes = fig.subplots(down, across, squeeze=False)
    fig.subplots_adjust(0.15 / across, 0.5 / height, 1 - 0.06 / across, 1 - head / height,
                        wspace=0.22, hspace=0.4)
    for i, line in enumerate(title.split("\n")):
        fig.text(0.01, 1 - (0.1 + 0.18 * i) / height, line, va="top", parse_math=False,
                 fontsize=10, weight="normal" if i else "bold")
    for ax in axes.flat[len(panels):]:
        ax.axis("off")
    for ax, (name, panel) in zip(axes.flat, panels.items(), strict=False):
        panel(ax)
        ax.set_title(textwrap.fill(name, 52), fontsize=10)
        ax.tick_params(labelsize=8)
        for text in ax.xaxis.label, ax.yaxis.label, ax.yaxis.get_offset_text():
            text.set_size(8)
    for text in fig.findobj(Text):
        if not text.get_text().isascii():
            font = font_file(text.get_text())
            text.set_text(drawable(text.get_text(), font))
            text.set_font_properties(FontProperties(fname=font, size=text.get_fontsize()))
    file = io.BytesIO()
    fig.savefig(file, format="png")
    return Image.open(file).convert("RGB")


def draw_panel(ax: Axes, rows: list[dict], panel: dict[str, str] | Callable) -> None:
    """One of `Panels`."""
    if callable(panel):
        panel(ax, rows)
    else:
        draw_lines(ax, rows, panel)
    ax.set(xlim=(0, 1.02 * (rows[-1]["step"] + 1)), xlabel="step")
    ax.locator_params("x", nbins=5, integer=True)
    ax.xaxis.set_major_formatter("{x:,.0f}")


def draw_lines(ax: Axes, rows: list[dict], keys: dict[str, str]) -> None:
    """The values of `keys`, {label: key of the log}, and a moving mean where there are many."""
    every = []
    for label, key in keys.items():
        points = [(r["step"] + 1, r[key]) for r in rows if math.isfinite(r.get(key, math.nan))]
        if not points:
            continue
        steps, values = (np.array(column) for column in zip(*points, strict=True))
        every += values.tolist()
        few = len(points) < 2 * MEAN_OF
        smooth = few or key.startswith("val_") or key == "lr"
        line, = ax.plot(steps, values, label=label, marker="." if few else None,
                        alpha=1 if smooth else 0.25, ls=":" if label.endswith("raw") else "-",
                        color=COLOURS.get(label.replace(",", "").split(" ")[0]))
        if not smooth:
            mean = np.convolve(values, np.ones(MEAN_OF) / MEAN_OF, mode="valid")
            ax.plot(steps[MEAN_OF // 2:][:len(mean)], mean, color=line.get_color())
    ax.grid(alpha=0.3)
    if not every:
        say_empty(ax)
    elif min(every) > 0 and max(every) > WIDE * np.quantile(every, 0.05):
        ax.set_yscale("log", subs=[])
        ax.yaxis.get_major_locator().set_params(subs=(1, 3))
        ax.yaxis.set_major_formatter("{x:g}")
    else:
        ax.ticklabel_format(axis="y", scilimits=(-3, 4))
    if len(ax.lines) and len(keys) > 1:
        ax.legend(fontsize=8)


def say_empty(ax: Axes, why: str = "no value") -> None:
    ax.text(0.5, 0.5, why, ha="center", transform=ax.transAxes, color="gray")


def draw_bins(ax: Axes, rows: list[dict], share: Callable[[dict], dict[str, float]]) -> None:
    """A heat map of `share` over steps and timesteps; a dot marks what has surely risen."""
    found = overfit.evaluations(rows)
    keys = overfit.bin_keys(found[-1]) if found else []
    steps = np.array([row["step"] + 1 for row in found])
    values = 100 * np.array([[share(row).get(key, math.nan) for row in found] for key in keys])
    if not np.isfinite(values).any():
        return say_empty(ax, "too few images for bins" if found else "no value")
    first = np.array([int(key[2:]) for key in keys])                # timestep of each bin
    width = first[-1] / max(1, len(keys) - 1)
    x = np.concatenate([[0], (steps[:-1] + steps[1:]) / 2, steps[-1:]])
    most = max(100 * LEAST_COLOUR, np.nanmax(np.abs(values), initial=0))
    mesh = ax.pcolormesh(x, [*first, first[-1] + width], values, cmap="RdBu_r",
                         vmin=-most, vmax=most)
    for centre, row in zip((x[:-1] + x[1:]) / 2, found, strict=True):
        high = [t for t, key in zip(first, keys, strict=True) if overfit.has_risen(row, key)]
        ax.plot([centre] * len(high), np.array(high) + width / 2, "k.", markersize=4)
    ax.set(ylim=(0, None), ylabel="timestep t")
    ax.figure.colorbar(mesh, ax=ax, format="%+g %%", pad=0.02).ax.tick_params(labelsize=8)


draw_gaps = partial(draw_bins, share=overfit.gaps)      # the held-out above the training loss
draw_rises = partial(draw_bins, share=overfit.risen)    # the held-out loss above its best


def stacked(parts: list[Image.Image]) -> Image.Image:
    """Images below one another on white."""
    page = Image.new("RGB", (max(p.width for p in parts), sum(p.height for p in parts)), "white")
    top = 0
    for part in parts:
        page.paste(part, (0, top))
        top += part.height
    return page


# ------------------------------------------------------- samples/STEP.png and curves.png of a run

VQ_PANELS: Panels = {
    "loss of the batch": {"": "loss"},
    "PSNR, dB": {"held-out": "val_psnr", "boxes": "val_psnr_box"},
    "codes used, share": {"": "val_codes_used"}, "perplexity of the codes": {"": "val_perplexity"}}
DISC_PANELS: Panels = {
    "discriminator, logits": {"real": "logits_real", "reconstructed": "logits_fake"},
    "adaptive weight": {"": "d_weight"}}
SHARED_PANELS: Panels = {
    "gradient norm": {"": "grad_norm"}, "learning rate": {"": "lr"},
    "images a second, training alone": {"": "img_s"}}
LDM_PANELS: Panels = {
    "loss of the batch": {"": "loss"},
    "eps loss, EMA and raw weights": {"held-out": "val_right", "training": "val_train",
                                      "held-out, raw": "val_raw", "training, raw": "val_train_raw"},
    "held-out eps loss, EMA": {"right pose": "val_right", "shuffled": "val_shuffled",
                               "none": "val_null"},
    "by timestep: held-out above training, EMA": draw_gaps,
    "by timestep: held-out above its best, EMA": draw_rises,
    "shuffled / right": {"": "val_ratio"}}


def vq_preview(path: Path, originals: np.ndarray, boxes: np.ndarray, reconstructions: np.ndarray,
               factor: int, result: dict) -> None:
    """Images uint8 [N, H, W, 3], a row for each: original | boxes | reconstruction | error."""
    rows = [[x, box, x_hat, error_map(x_hat, x)] for x, box, x_hat in
            zip(originals, boxes, reconstructions, strict=True)]
    save_grid(path, rows, ["original", f"boxes of {factor} x {factor}", "reconstruction",
                           f"error, white from {ERROR_WHITE:.0%}"], title=(
        f"step {int(path.stem)}: {result['psnr']:.2f} dB, boxes {result['psnr_box']:.2f} dB"))


def ldm_preview(path: Path, reconstructions: np.ndarray, poses: np.ndarray, samples: np.ndarray,
                names: list[str], how: str, result: dict) -> None:
    """Images uint8 [N, H, W, 3], a column for each of the poses [N, 17, 3]."""
    skeletons = [draw(pose, samples.shape[1]) for pose in poses]
    save_grid(path, [reconstructions, skeletons, samples], names,
              ["reconstruction of the real image", "pose asked for", f"sample, {how}"],
              title=f"step {int(path.stem)}: held-out loss {result['right']:.4f}, shuffled / right "
                    f"{result['ratio']:.3f}")


# ------------------------------------------------------------- pose.png: the best and worst samples

EXTREMES = 5                    # of the best samples, and of the worst


def extremes_figure(path: Path, asked: np.ndarray, samples: np.ndarray, read: np.ndarray,
                    real: np.ndarray, scores: np.ndarray, title: str) -> None:
    """The best and the worst samples by OKS: pose asked for, sample, pose found in it, real image.

    Poses asked and read [N, 17, 3], images uint8 [N, S, S, 3], scores [N].
    """
    side, order = samples.shape[1], [i for i in np.argsort(-scores) if np.isfinite(scores[i])]
    n = min(EXTREMES, len(order) // 2)
    shown = [*order[:n], *order[len(order) - n:]]
    rows = [[draw(asked[i], side) for i in shown], [samples[i] for i in shown],
            [draw(read[i], side, samples[i]) for i in shown], [real[i] for i in shown]]
    save_grid(path, rows, ["best"] * n + ["worst"] * n,
              ["pose asked for", "sample", "pose found in it", "real image of that pose"],
              [[], [], [f"OKS {scores[i]:.2f}" for i in shown]], title)


# ------------------------------------------------- recon.png: images, reconstructions, eyes, hands

PAGE_WIDTH = 2300               # pixels, unless the tiles would become smaller than the least
TILES = 96, 256                 # least and greatest side of a tile, pixels
ERROR_WHITE = 0.25              # mean absolute error, of 0..1, shown as white, on every page
CROP_LEAST = 1 / 8              # side of an enlarged part, as a share of the image's
FACE, HANDS = JOINTS[:5], (("wrist_left", "elbow_left"), ("wrist_right", "elbow_right"))
Box = tuple[int, int, int, int]     # x0, y0, x1, y1 in pixels


def recon_figure(
    path: str | Path,
    originals: np.ndarray,                      # uint8 [N, S, S, 3]
    reconstructions: dict[str, np.ndarray],     # the same by name of the model
    poses: np.ndarray,                          # [N, 17, 3]: where eyes and hands are
    labels: list[str],                          # of each row
    names: list[str],                           # of each image
    title: str,
) -> None:
    """A row per image: original, reconstructions and error maps, then eyes and a hand enlarged."""
    n, S = originals.shape[:2]
    parts = {"": [(0, 0, S, S)] * n, "eyes, ": [eyes_box(pose, S) for pose in poses],
             "hand, ": [hand_box(pose, S) for pose in poses]}
    parts = {part: boxes for part, boxes in parts.items() if any(boxes)}
    across = len(parts) * (1 + len(reconstructions)) + len(reconstructions)
    side = int(np.clip(PAGE_WIDTH // across - GAP, *TILES))
    columns: dict[str, list[np.ndarray | None]] = {}
    words: dict[str, list[str]] = {"original": names}           # below the images of a column
    for part, boxes in parts.items():
        for name, images in {"original": originals, **reconstructions}.items():
            columns[f"{part}{name}"] = [enlarged_part(x, box, side)
                                        for x, box in zip(images, boxes, strict=True)]
            if not part and name in reconstructions:
                pairs = list(zip(images, originals, strict=True))
                words[name] = [decibels(x_hat, x) for x_hat, x in pairs]
                columns[f"{name}: error"] = [enlarged_part(error_map(x_hat, x), (0, 0, S, S), side)
                                             for x_hat, x in pairs]
    captions = [[words[name][i] if name in words else "" for name in columns] for i in range(n)]
    save_grid(path, list(zip(*columns.values(), strict=True)), list(columns), labels, captions,
              title, scale=1)


def square(centre: np.ndarray, side: float, size: int) -> Box:
    """The square around `centre` (x, y) of that `side`, both on 0..1, moved inside the image."""
    pixels = min(size, max(round(max(side, CROP_LEAST) * size), 8))
    x0, y0 = (int(np.clip(round(v * size - pixels / 2), 0, size - pixels)) for v in centre)
    return x0, y0, x0 + pixels, y0 + pixels


def eyes_box(pose: np.ndarray, size: int) -> Box | None:
    """Around the face of a pose [17, 3]; None if neither an eye nor the nose is inside."""
    joints = dict(zip(JOINTS, pose, strict=True))
    seen = {name: joints[name][:2] for name in FACE if on_canvas(joints[name])}
    if not {"nose", "eye_left", "eye_right"} & seen.keys():
        return None
    eyes = [seen[name] for name in ("eye_left", "eye_right") if name in seen] or [seen["nose"]]
    face = np.ptp(np.stack(list(seen.values())), axis=0)
    return square(np.mean(eyes, axis=0), 1.6 * face.max(), size)


def hand_box(pose: np.ndarray, size: int) -> Box | None:
    """Around a hand: beyond a wrist inside the image, away from the elbow if that is known."""
    for wrist, elbow in HANDS:
        w, e = pose[JOINTS.index(wrist)], pose[JOINTS.index(elbow)]
        if on_canvas(w):
            arm = (w - e)[:2] if e[2] > 0 else np.zeros(2)
            return square(w[:2] + 0.25 * arm, 0.9 * np.hypot(*arm), size)
    return None


def enlarged_part(image: np.ndarray, box: Box | None, side: int) -> np.ndarray | None:
    """The box of an image, uint8 [side, side, 3]; None without a box."""
    if box is None:
        return None
    how = Image.Resampling.BICUBIC if box[2] - box[0] < side else Image.Resampling.BOX
    return np.asarray(Image.fromarray(image).resize((side, side), how, box))


def decibels(x_hat: np.ndarray, x: np.ndarray) -> str:
    """The PSNR of uint8 images in words."""
    mse = np.square((x_hat.astype(float) - x) / 255).mean()
    return f"{-10 * math.log10(max(mse, 1e-12)):.1f} dB"


def error_map(x_hat: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The absolute difference of uint8 images: black, red, yellow, white from ERROR_WHITE on."""
    error = np.abs(x_hat.astype(float) - x).mean(-1, keepdims=True) / 255 / ERROR_WHITE
    return (255 * (3 * error - np.arange(3)).clip(0, 1)).round().astype(np.uint8)


# --------------------------------------------------------------- overfit.png: a run and its samples

NEAR_SHOWN = 8                  # samples of each kind beside their nearest training images
GOLDEN = 0.618                  # multiples of it, modulo 1, spread evenly however many they are


def overfit_figure(
    path: Path,
    decode: Callable[[Tensor], list[np.ndarray]],       # latents [N, C, h, w] -> uint8 [H, W, 3]
    trained: Callable[[np.ndarray], Tensor],            # rows [N] -> training latents
    rows: list[dict],                                   # of the log
    found: dict,                                        # the verdict
    near: dict[str, overfit.Near],                      # by kind of samples
    poses: dict[str, Tensor],                           # [N, 17, 3] by kind of samples
    strip: dict[int, list[np.ndarray]],                 # by step, a sample of each kind
) -> None:
    """The verdict, samples beside their nearest training images, one seed over the checkpoints."""
    limit, tiles, labels, captions = found["numbers"]["limit"], [], [], []
    for name in poses:
        shown = np.argsort(near[name].distances)[:NEAR_SHOWN]
        distances, at = near[name].distances[shown], near[name].rows[shown]
        tiles += [decode(near[name].z[shown]), decode(trained(at))]
        labels += [f"samples of {name}, nearest to a training image first", "that training image"]
        captions += [[f"{d:.2f}" + (" COPY" if d < limit else "") for d in distances],
                     ["mirrored" if row % 2 else "" for row in at]]
    grid = save_grid(None, tiles, labels=labels, captions=captions,
                     title="Root mean square distance in latent space; "
                     f"{overfit.COPY_PERCENTILE:g} % of held-out images are below {limit:.2f}")
    size = tiles[0][0].shape[0]
    films = [[draw(poses[name][0].numpy(), size), *(images[i] for images in strip.values())]
             for i, name in enumerate(poses)]
    film = save_grid(None, films, ["pose", *(f"step {step:,}" for step in strip)],
                     [f"one of the {name}" for name in poses],
                     title="One seed over the checkpoints")
    distances = {name: part.distances for name, part in near.items()}
    stacked([verdict_page(rows, found, distances), grid, film]).save(path)


def verdict_page(rows: list[dict], found: dict, distances: dict[str, np.ndarray]) -> Image.Image:
    """The verdict over the losses, their heat maps by timestep, and the distances."""
    panels = {"eps loss, EMA": {"held-out": "val_right", "training": "val_train"},
              "by timestep: held-out above training loss": draw_gaps,
              "by timestep: held-out above its best; dots: significant": draw_rises}
    drawn = {name: partial(draw_panel, rows=rows, panel=panel) for name, panel in panels.items()}
    drawn["distance to the nearest training image; left of the line: copies"] = partial(
        draw_distances, distances=distances, limit=found["numbers"]["limit"])
    reasons = [line for reason in found["reasons"] for line in textwrap.wrap(f"- {reason}", 180)]
    return panels_page("\n".join([overfit.headline(found), *reasons]), drawn)


def draw_distances(ax: Axes, distances: dict[str, np.ndarray], limit: float) -> None:
    """A point for each image, in a strip for each kind: as clear of 8 images as of 512."""
    for row, (name, d) in enumerate(distances.items()):
        scatter = (np.arange(len(d)) * GOLDEN % 1 - 0.4) * 0.7      # so that few points overlap
        line, = ax.plot(d, row + scatter, ".", alpha=0.6, markersize=5)
        label = "held-out images" if name == overfit.HELD_OUT else f"samples of {name}"
        ax.text(0.02, row - 0.4, f"{len(d)} {label}", color=line.get_color(), fontsize=8,
                va="center", transform=ax.get_yaxis_transform())
    ax.axvline(limit, color="black", linestyle="--")
    ax.set(xlim=(0, None), ylim=(len(distances) - 0.5, -0.6), yticks=[],
           xlabel="root mean square distance of the latents")


# ------------------------------------------------------------------- overview.png: a dataset check

ACROSS = 6                      # images in a row
DENSITY = 10_000                # skeletons in the density: more would look the same


def draw_overview(path: Path, checked: Checked, suspects: list[Suspect], shown: list[Suspect],
                  report: dict, framed: Callable[[int], np.ndarray]) -> None:
    """Where the joints are, which are missing; ordinary images; the suspects `shown`.

    `framed` gives image i with its skeleton, uint8 [S, S, 3].
    """
    sound = np.flatnonzero(checked.rows["sound"])
    title = [f"{shortened(report['root'], 80)}: {len(sound)} images, {len(suspects)} "
             f"suspect{'s' * (len(suspects) != 1)}",
             *(shortened(sentence, 150) for sentence in report["verdicts"].values())]
    panels = panels_page("\n".join(title), {
        "where people are": partial(draw_density, poses=checked.rows["pose"][sound]),
        "images with a joint missing (grey) or outside (red)": partial(
            draw_joints, joints=report["joints"]),
    }, across=2)
    ordinary = np.setdiff1d(sound, [s.index for s in suspects if s.index is not None])
    few = min(len(ordinary), ACROSS)
    ordinary = ordinary[np.linspace(0, len(ordinary) - 1, few).round().astype(int)]
    rows, labels = [[framed(i) for i in ordinary]], ["ordinary images"]
    captions = [[shortened(Path(checked.files[i]).name, 60) for i in ordinary]]
    for first in range(0, len(shown), ACROSS):
        some = shown[first:first + ACROSS]
        rows.append([framed(suspect.index) for suspect in some])
        captions.append([shortened(f"{s.kind}: {s.why} ({Path(s.file).name})", 200) for s in some])
        labels.append("suspects")
    stacked([panels, save_grid(None, rows, labels=labels, captions=captions)]).save(path, "PNG")


def draw_joints(ax: Axes, joints: dict[str, dict[str, int]]) -> None:
    """How often each joint is missing and outside, as bars."""
    names = [name.replace("_", " ") for name in JOINTS]
    missing, outside = ([j[key] for j in joints.values()] for key in ("missing", "outside"))
    ax.barh(names, missing, color="silver")
    ax.barh(names, outside, left=missing, color="indianred")
    ax.set(xlim=(0, max(1, *np.add(missing, outside))), xlabel="images")
    ax.locator_params("x", nbins=5, integer=True)
    ax.invert_yaxis()


def shortened(text: str, most: int) -> str:
    """At most so many characters of a text: its beginning and its end."""
    return text if len(text) <= most else f"{text[:most // 2 - 2]}...{text[-most // 2 + 2:]}"


def draw_density(ax: Axes, poses: np.ndarray) -> None:
    """A histogram of points along the limbs of poses [N, 17, 3]; the image's border in white."""
    poses = poses[::max(1, math.ceil(len(poses) / DENSITY))]
    seen = poses[..., 2] > 0
    along, counts = np.linspace(0, 1, 24)[:, None], np.zeros((96, 96))
    for a, b in LIMBS:
        ends = poses[seen[:, a] & seen[:, b]][:, [a, b], None, :2]                  # [n, 2, 1, 2]
        x, y = (ends[:, 0] * (1 - along) + ends[:, 1] * along).reshape(-1, 2).T
        counts += np.histogram2d(y, x, bins=96, range=((-0.1, 1.1), (-0.1, 1.1)))[0]
    ax.imshow(np.sqrt(counts), cmap="magma", extent=(-0.1, 1.1, 1.1, -0.1))
    ax.plot((0, 1, 1, 0, 0), (0, 0, 1, 1, 0), color="white", lw=0.8)
    ax.set(xticks=(0, 0.5, 1), yticks=(0, 0.5, 1), xlabel="x, of the image's width",
           ylabel="y, of its height")
