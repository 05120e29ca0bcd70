"""An image file in, an upright RGB image out; DataError for a file that cannot be read whole."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from dataset.faults import DataError

SUFFIXES = {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".pjpeg", ".pjp", ".webp", ".bmp", ".gif",
            ".tif", ".tiff"}
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")     # no EPS: PIL would start Ghostscript


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
        raise DataError(f"{path}: not a readable image ({error}); replace or remove it"
                        ) from error


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
