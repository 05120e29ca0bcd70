"""Image files: a path in, an upright RGB image out; and what is done about broken images, and about
processes that die while they load them."""
from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import ExifTags, Image, ImageOps
from torch.utils.data import DataLoader
from tqdm import tqdm

if TYPE_CHECKING:
    from data import ImageDataset

SUFFIXES = {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".pjpeg", ".pjp", ".webp", ".bmp", ".gif",
            ".tif", ".tiff"}
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")     # no EPS: PIL would start Ghostscript
WORKER_DIED = ("a process that loads images died, usually because memory or /dev/shm ran out; "
               "rerun the same command with fewer --workers, or 0, to resume")


class DataError(ValueError):
    """A fault in a person's data: one sentence that names the file and says what to do."""


@contextmanager
def opened(path: str | Path) -> Iterator[Image.Image]:
    """An image file whose header PIL has read. DataError if the header or, in the block, the pixels
    cannot be read, or if there are more pixels than PIL's limit (a decompression bomb)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                yield image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(f"{path}: more than {Image.MAX_IMAGE_PIXELS:,} pixels; resize or "
                        "remove it") from None
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file") from None
    except Exception as error:      # PIL's decoders raise a dozen unrelated types on damaged files
        raise DataError(f"{path}: not a readable image ({error}); replace or remove it") from error


def read_image(path: str | Path, at_least: int | None = None, ground: str = "white") -> Image.Image:
    """A file as an upright RGB image, transparency laid on the colour `ground`.

    With `at_least`, a large JPEG is decoded at a reduced size of at least that many pixels a side.
    DataError for a file that cannot be read whole, so no truncated image is used in training.
    """
    with opened(path) as image:
        # draft() decodes at 1/2, 1/4 or 1/8. Where this does not divide a side, the image ends
        # inside the last pixel. It is stretched to the full size, or joints would be off by up to
        # half a pixel.
        _, extent = (at_least and image.draft(None, (at_least, at_least))) or (None, None)
        image.load()
        if extent and extent[2:] != image.size:
            image = image.resize(image.size, Image.Resampling.BICUBIC, box=extent)
        image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise DataError(f"{path}: floating point pixels are not supported; save the image with 8 "
                        "or 16 bits")
    if image.mode.startswith("I"):      # 16-bit grey; PIL's own convert() would clip at 255
        grey = (np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, ground), image).convert("RGB")
    return image.convert("RGB")


def upright_size(path: str | Path) -> tuple[int, int]:
    """(width, height) of an image file as it is shown; only its header is read."""
    with opened(path) as image:
        return image.size[::-1] if orientation(image) >= 5 else image.size


def orientation(image: Image.Image) -> int:
    """How EXIF says the image is turned: 1 as it is, 5 to 8 with width and height exchanged."""
    return image.getexif().get(ExifTags.Base.Orientation, 1)


def note_broken(ds: ImageDataset, broken: dict[str, str]) -> None:
    """Adds the broken images {file: reason} to ds.broken and prints those that are new; DataError
    once there are more than ds.most_broken."""
    new = {file: reason for file, reason in broken.items() if file not in ds.broken}
    ds.broken.update(new)
    if len(ds.broken) > ds.most_broken:
        most = math.floor(ds.most_broken)
        raise DataError(f"{len(ds.broken)} images cannot be used, and at most {most} may be "
                        f"broken; the first is {next(iter(ds.broken.values()))}")
    for reason in new.values():
        tqdm.write(f"left out: {reason}", file=sys.stderr)


@contextmanager
def naming_broken(path: str | Path, *datasets: ImageDataset) -> Iterator[None]:
    """Writes the broken images to `path` when the block ends, also after an error."""
    path, how = Path(path), {"encoding": "utf-8", "errors": "surrogateescape"}  # names of any bytes
    try:
        yield
    finally:
        lines = path.read_text(**how).splitlines() if path.exists() else []
        lines += [f"{file}\t{reason}" for ds in datasets for file, reason in ds.broken.items()]
        if lines := dict.fromkeys(lines):
            path.write_text("".join(f"{line}\n" for line in lines), **how)
            print(f"{len(lines)} broken images were left out; {path} names them", file=sys.stderr)


def worker_died(error: BaseException) -> bool:
    """Whether an error says that a process of a DataLoader is gone. torch raises it wherever the
    main process is, most often in the middle of a training step."""
    return isinstance(error, (ConnectionError, EOFError)) or str(error).startswith(
        ("DataLoader worker", "Pin memory thread"))


def fetch(loader: DataLoader) -> Iterator:
    """The loader's items; DataError if one of its processes dies."""
    try:
        yield from loader
    except (RuntimeError, ConnectionError, EOFError) as error:
        if worker_died(error):
            raise DataError(WORKER_DIED) from error
        raise
