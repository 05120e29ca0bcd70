"""Draws the two stages with the files that are them: docs/diagram-light.svg and diagram-dark.svg.

    python docs/diagram.py
"""
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt  # noqa: E402

INK = {"light": "#1f2328", "dark": "#e6edf3"}
FILL = {"light": {"net": "#dbe9ff", "thing": "#f3f4f6", "frozen": "#e7e9ec"},
        "dark": {"net": "#1f3a5f", "thing": "#22272e", "frozen": "#2d333b"}}
# (x, y), what it is, its file, kind
BOXES = {
    "image": ((0.6, 3), "image x\n3 x H x W", "data.py", "thing"),
    "encoder": ((2.6, 3), "encoder", "vq.py", "net"),
    "codes": ((4.6, 3), "codes\nH/4 x W/4", "vq.py", "thing"),
    "decoder": ((6.6, 3), "decoder", "vq.py", "net"),
    "again": ((8.6, 3), "the image\nagain", "", "thing"),
    "latent": ((0.6, 1), "latent z\nof an image", "ldm.py", "thing"),
    "noise": ((2.6, 1), "+ noise of\ntimestep t", "diffusion.py", "thing"),
    "unet": ((4.6, 1), "UNet predicts\nthe noise", "unet.py", "net"),
    "sampler": ((6.6, 1), "sampler:\nnoise to latent", "diffusion.py", "net"),
    "drawn": ((8.6, 1), "decoder:\nnew image", "sample.py", "frozen"),
    "pose": ((4.6, -0.65), "pose: 17 joints\nas 17 maps", "keypoints.py", "thing"),
}
ARROWS = [("image", "encoder"), ("encoder", "codes"), ("codes", "decoder"), ("decoder", "again"),
          ("latent", "noise"), ("noise", "unet"), ("unet", "sampler"), ("sampler", "drawn"),
          ("pose", "unet")]
WIDTH, HEIGHT = 1.5, 0.8
TITLES = [((-0.15, 3.95), "Stage 1: train.py --stage vq learns to compress images"),
          ((-0.15, 1.95), "Stage 2: train.py --stage ldm learns to draw latents in a pose")]


def draw(theme: str) -> plt.Figure:
    fig, ax = plt.subplots(figsize=(9.6, 5.2))
    ink = INK[theme]
    for (x, y), words, file, kind in BOXES.values():
        ax.add_patch(plt.Rectangle((x - WIDTH / 2, y - HEIGHT / 2), WIDTH, HEIGHT, ec=ink, lw=1,
                                   fc=FILL[theme][kind], joinstyle="round"))
        ax.text(x, y, words, ha="center", va="center", color=ink, size=10)
        ax.text(x, y - HEIGHT / 2 - 0.06, file, ha="center", va="top", color=ink, size=9,
                family="monospace", alpha=0.75)
    for a, b in ARROWS:
        (x0, y0), (x1, y1) = BOXES[a][0], BOXES[b][0]
        across = x0 != x1
        start = (x0 + WIDTH / 2, y0) if across else (x0, y0 + HEIGHT / 2)
        end = (x1 - WIDTH / 2, y1) if across else (x1, y1 - HEIGHT / 2 - 0.24)
        ax.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": ink, "lw": 1.2})
    for at, words in TITLES:
        ax.text(*at, words, color=ink, size=11, weight="bold", va="center")
    ax.set(xlim=(-0.2, 9.45), ylim=(-1.5, 4.2))
    ax.axis("off")
    return fig


if __name__ == "__main__":
    plt.rcParams |= {"svg.hashsalt": "diagram",     # the same file from the same drawing
                     "svg.fonttype": "none"}        # text as text: a tenth of the bytes
    for theme in INK:
        path = Path(__file__).parent / f"diagram-{theme}.svg"
        draw(theme).savefig(path, transparent=True, bbox_inches="tight", metadata={"Date": None})
        print(f"wrote {path}")
