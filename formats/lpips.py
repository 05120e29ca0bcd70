"""Weights of LPIPS: files of torchvision, the lpips package or taming in, a frozen LPIPS out."""
from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import torch

from checkpoint import fill, read
from formats.compvis import tensors_of
from metrics.lpips import LPIPS


@dataclass(frozen=True)
class Download:
    name: str                           # in the cache folder
    url: str
    sha256: str
    what: str                           # the tensors it has


LPIPS_FILES = (
    Download("vgg16-397923af.pth", "https://download.pytorch.org/models/vgg16-397923af.pth",
             "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
             "the convolutions of VGG16"),
    Download("lpips-v0.1-vgg.pth", "https://raw.githubusercontent.com/richzhang/"
             "PerceptualSimilarity/master/lpips/weights/v0.1/vgg.pth",
             "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
             "the weights lin0 to lin4"),
)
SLICE_ENDS = (3, 8, 15, 22, 29)         # last layers of vgg16().features in net.slice1 to slice5


def lpips_name(name: str) -> str:
    """A tensor's name in torchvision, the lpips package or a taming .ckpt -> that in LPIPS."""
    name = name.removeprefix("loss.perceptual_loss.")
    first, _, rest = name.partition(".")
    if first == "lins":
        return f"lin{rest}"
    layer, _, kind = rest.partition(".")
    if first == "features" and layer.isdigit() and int(layer) <= SLICE_ENDS[-1]:
        depth = next(k for k, end in enumerate(SLICE_ENDS, 1) if int(layer) <= end)
        return f"net.slice{depth}.{layer}.{kind}"
    return name


def load_lpips(paths: Sequence[str | Path]) -> LPIPS:
    """LPIPS with the weights of all the files together, frozen, in eval mode.

    The files: torchvision's vgg16 and the lpips package's v0.1/vgg.pth (which `download_lpips`
    fetches), or one with all weights, a state dict of the lpips package or a taming .ckpt.
    ValueError, in one sentence, for missing weights.
    """
    model, given = LPIPS(), {}
    own = model.state_dict()
    for path in map(Path, paths):
        if not path.is_file():
            raise ValueError(f"there is no file {path} with weights of LPIPS")
        state, _ = tensors_of(read(path), path)
        found = {new: v for name, v in state.items() if (new := lpips_name(name)) in own}
        if not found:
            raise ValueError(f"{path} has no tensor of LPIPS; its first is {next(iter(state))}")
        given |= found
    given = {name: v for name, v in own.items() if name.startswith("scaling_layer.")} | given
    if missing := [name for name in own if name not in given]:
        needed = [f"{file.what} ({file.url} has them)"
                  for file, prefix in zip(LPIPS_FILES, ("net.", "lin"), strict=True)
                  if any(name.startswith(prefix) for name in missing)]
        raise ValueError(f"LPIPS lacks {len(missing)} tensors in {' and '.join(map(str, paths))}, "
                         f"first {missing[0]}: it still needs {' and '.join(needed)}")
    fill(model, given, f"LPIPS from {' and '.join(map(str, paths))}")
    return model.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def download_lpips(folder: str | Path | None = None) -> list[Path]:
    """The files that `load_lpips` needs, 528 MB, fetched once into `folder` (default: torch's own).

    ValueError, in one sentence, without a network or where a file has another hash.
    """
    folder = Path(folder) if folder else Path(torch.hub.get_dir()) / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    for file in LPIPS_FILES:
        path = folder / file.name
        if path.is_file() and sha256_of(path) == file.sha256:
            continue
        try:
            torch.hub.download_url_to_file(file.url, str(path), hash_prefix=file.sha256)
        except (OSError, HTTPException, RuntimeError) as e:     # RuntimeError: another hash
            raise ValueError(f"{file.url} cannot be downloaded into {folder} "
                             f"({e or type(e).__name__}); download it yourself and give its path"
                             ) from None
    return [folder / file.name for file in LPIPS_FILES]


def sha256_of(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
