"""One picture of each notebook for the README, from its committed outputs.

    python docs/thumbnails.py       writes docs/images/notebook-00.png to notebook-05.png
"""
import base64
import io
import json
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parent.parent
SHOWN = -1, 4, 1, 3, 2, 4           # of the notebook's images
SIZE = 400, 240                     # the largest, in pixels


def images(notebook: Path) -> list[Image.Image]:
    outputs = (output["data"] for cell in json.loads(notebook.read_text())["cells"]
               for output in cell.get("outputs", ()) if "data" in output)
    return [Image.open(io.BytesIO(base64.b64decode("".join(data[kind])))).convert("RGB")
            for data in outputs for kind in ("image/png", "image/jpeg") if kind in data]


if __name__ == "__main__":
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    for notebook, index in zip(notebooks, SHOWN, strict=True):
        image = images(notebook)[index]
        image.thumbnail(SIZE)
        image.quantize(64).save(ROOT / f"docs/images/notebook-{notebook.stem[:2]}.png")
