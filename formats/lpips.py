"""The weights of LPIPS: files of torchvision, the lpips package or a taming .ckpt in, a frozen vq.LPIPS out."""
from __future__ import annotations

import hashlib
import http.client
import os
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoint import fill, read
from formats.compvis import tensors_of
from vq import LPIPS


@dataclass(frozen=True)
class Download:
    name: str                           # in the cache folder
    url: str
    sha256: str
    what: str                           # the tensors it has


LPIPS_FILES = (
    Download("vgg16-397923af.pth", "https://download.pytorch.org/models/vgg16-397923af.pth",
             "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0", "the convolutions of VGG16"),
    Download("lpips-v0.1-vgg.pth",
             "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/vgg.pth",
             "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868", "the weights lin0 to lin4"),
)
SLICE_ENDS = (3, 8, 15, 22, 29)         # the last layer of torchvision's vgg16().features in net.slice1 ... net.slice5
IN_CKPT = "loss.perceptual_loss."
TIMEOUT = 30                            # seconds without a byte
CHUNK = 2 ** 20                         # bytes read at once


def lpips_name(name: str) -> str:
    """A tensor's name in torchvision, the lpips package or a taming .ckpt -> its name in vq.LPIPS."""
    name = name.removeprefix(IN_CKPT)
    first, _, rest = name.partition(".")
    index, _, kind = rest.partition(".")
    if first == "features" and index.isdigit() and int(index) <= SLICE_ENDS[-1]:
        depth = next(k for k, end in enumerate(SLICE_ENDS, 1) if int(index) <= end)
        return f"net.slice{depth}.{index}.{kind}"
    return f"lin{rest}" if first == "lins" else name


def load_lpips(paths: Sequence[str | Path]) -> LPIPS:
    """The perceptual distance with the weights that stand in the files together, frozen, in eval mode.

    The files: torchvision's vgg16 and the lpips package's v0.1/vgg.pth (what `download_lpips` gets), or one with all of
    it, a state dict of the lpips package or a taming .ckpt. ValueError in one sentence for whatever lacks.
    """
    model, given = LPIPS(), {}
    own = model.state_dict()
    for path in map(Path, paths):
        if not path.is_file():
            raise ValueError(f"there is no file {path} with weights of LPIPS")
        state, _ = tensors_of(read(path), path)
        found = {new: tensor for name, tensor in state.items() if (new := lpips_name(name)) in own}
        if not found:
            raise ValueError(f"{path} has no tensor of LPIPS; its first is {next(iter(state))}")
        given |= found
    said = " and ".join(map(str, paths))
    constants = {name: tensor for name, tensor in own.items() if name.startswith("scaling_layer.")}
    lacking = [name for name in own if name not in given and name not in constants]
    if lacking:
        convolutions, linear = LPIPS_FILES
        needed = [f"{file.what} ({file.url} has them)" for file, starts in ((convolutions, "net."), (linear, "lin"))
                  if any(name.startswith(starts) for name in lacking)]
        raise ValueError(f"LPIPS lacks {len(lacking)} tensors in {said or 'no file'}, first {lacking[0]}: it still "
                         f"needs {' and '.join(needed)}")
    fill(model, constants | given, f"LPIPS from {said}")
    return model.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def download_lpips(folder: str | Path | None = None) -> list[Path]:
    """The files that `load_lpips` needs, 528 MB, fetched once into `folder` (default: torch's own cache).

    ValueError in one sentence where there is no network or a file is not the one whose hash is known.
    """
    folder = Path(folder) if folder else Path(torch.hub.get_dir()) / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    for file in LPIPS_FILES:
        path = folder / file.name
        if not path.is_file() or sha256_of(path) != file.sha256:
            fetch(file, path)
    return [folder / file.name for file in LPIPS_FILES]


def sha256_of(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def fetch(file: Download, path: Path) -> None:
    """Download one file; `path` appears only once the bytes are the right ones."""
    partial = path.with_name(path.name + ".partial")
    try:
        with urllib.request.urlopen(file.url, timeout=TIMEOUT) as answer, open(partial, "wb") as f, tqdm(
                total=int(answer.headers.get("Content-Length") or 0) or None, desc=file.name, unit="B",
                unit_scale=True, dynamic_ncols=True) as bar:
            while chunk := answer.read(CHUNK):
                f.write(chunk)
                bar.update(len(chunk))
        if (found := sha256_of(partial)) != file.sha256:
            raise ValueError(f"{file.url} has the SHA-256 {found[:16]}..., but {file.sha256[:16]}... was expected, so "
                             "the download was deleted; it was cut short or is another file")
        os.replace(partial, path)
    except (OSError, http.client.HTTPException) as e:       # URLError is an OSError
        raise ValueError(f"{file.url} cannot be downloaded into {path.parent} ({e or type(e).__name__}); fetch it by "
                         "other means and give its path") from None
    finally:
        partial.unlink(missing_ok=True)
