"""How close reconstructions are to their images: images [B, 3, H, W] in [-1, 1] in, numbers out.

Per image: L1, PSNR, SSIM and any other callable. Per set: the Frechet distance. `compare` measures
several autoencoders in one pass over the images.

Letters: B batch, N images in all, H W sides, K codes, D features.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from metrics.codebook import code_use, count_codes

if TYPE_CHECKING:
    from vq import VQModel

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5   # pixels: the Gaussian window of Wang et al. 2004
SSIM_K1, SSIM_K2 = 0.01, 0.03       # their constants
Measure = Callable[[Tensor, Tensor], Tensor]    # (x_hat, x), each [B, 3, H, W] in [-1, 1] -> [B]
Features = Callable[[Tensor], Tensor]           # images [B, 3, H, W] in [-1, 1] -> [B, D]


# --------------------------------------------------------------------------- measures of each image

def l1(x_hat: Tensor, x: Tensor) -> Tensor:
    """Mean absolute difference [B] of values in [-1, 1]."""
    return (x_hat.clamp(-1, 1) - x).abs().mean(dim=(1, 2, 3))


def psnr(x_hat: Tensor, x: Tensor) -> Tensor:
    """Peak signal-to-noise ratio [B] in dB, of images on 0..1."""
    mse = ((x_hat.clamp(-1, 1) - x) / 2).square().mean(dim=(1, 2, 3))
    return -10 * torch.log10(mse.clamp(min=1e-12))


def ssim(x_hat: Tensor, x: Tensor) -> Tensor:
    """Structural similarity [B] of images on 0..1; 1 for equal images (Wang et al. 2004, eq. 13).

    Per channel, where the window lies inside the image: scikit-image's number with
    gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.
    """
    offset = torch.arange(SSIM_WINDOW, device=x.device, dtype=torch.float64) - SSIM_WINDOW // 2
    window = torch.exp(-offset ** 2 / (2 * SSIM_SIGMA ** 2))
    window = window / window.sum()
    C = x.shape[1]
    across = window.view(1, 1, 1, -1).expand(C, 1, 1, -1)
    down = window.view(1, 1, -1, 1).expand(C, 1, -1, 1)

    def mean(p: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(p, across, groups=C), down, groups=C)

    # In float64: in a flat region the variance is the difference of two nearly equal numbers.
    a, b = (x_hat.double().clamp(-1, 1) + 1) / 2, (x.double() + 1) / 2
    m_a, m_b = mean(a), mean(b)
    v_a, v_b, v_ab = mean(a * a) - m_a ** 2, mean(b * b) - m_b ** 2, mean(a * b) - m_a * m_b
    c1, c2 = SSIM_K1 ** 2, SSIM_K2 ** 2
    s = (2 * m_a * m_b + c1) * (2 * v_ab + c2) / ((m_a ** 2 + m_b ** 2 + c1) * (v_a + v_b + c2))
    return s.mean(dim=(1, 2, 3)).float()


def box_baseline(x: Tensor, factor: int) -> Tensor:
    """x averaged over factor x factor boxes and enlarged again: what an autoencoder has to beat."""
    return F.interpolate(F.avg_pool2d(x, factor), scale_factor=float(factor), mode="nearest")


# -------------------------------------------------------------------------------- measures of a set

def frechet(a: Tensor, b: Tensor) -> float:
    """Squared Frechet distance of Gaussians fitted to features [N, D] and [M, D]; of Inception FID.

    |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), arXiv:1706.08500 eq. 6. The last trace is the
    sum of the square roots of the eigenvalues of C_a^(1/2) C_b C_a^(1/2), which is symmetric. NaN
    where a feature is not finite, and of a single image.
    """
    a, b = a.double(), b.double()
    c_a, c_b = torch.cov(a.T), torch.cov(b.T)
    if not (c_a.isfinite().all() and c_b.isfinite().all()):     # eigh would raise
        return math.nan
    values, vectors = torch.linalg.eigh(c_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ c_b @ root).clamp(min=0).sqrt().sum()
    means = (a.mean(0) - b.mean(0)).square().sum()
    return (means + c_a.trace() + c_b.trace() - 2 * cross).clamp(min=0).item()


def inception(device: str | torch.device) -> Features:
    """The features of FID, D = 2048; ValueError without pytorch-fid or Inception's weights."""
    try:
        from pytorch_fid.inception import InceptionV3
        model = InceptionV3([InceptionV3.BLOCK_INDEX_BY_DIM[2048]])
    except (ImportError, OSError) as e:         # OSError: the weights cannot be downloaded
        raise ValueError("--rfid needs the package pytorch-fid and Inception's weights, which it "
                         f"downloads once ({e}); run pip install pytorch-fid, allow it the network "
                         "the first time, or leave out --rfid") from None
    model = model.eval().requires_grad_(False).to(device)
    return lambda x: model((x + 1) / 2)[0].flatten(1)


# ------------------------------------------------------------------------- one pass over the images

class Tally:
    """The scores of one kind of reconstruction, its code counts and its features."""

    def __init__(
        self,
        measures: dict[str, Measure],
        n_embed: int = 0,                       # codes to count; 0: none
        features: Features | None = None,       # for rFID
    ):
        self.measures, self.extract = measures, features
        self.scores: dict[str, list[float]] = {name: [] for name in measures}   # of each image
        self.counts = torch.zeros(n_embed, dtype=torch.long)
        self.features: list[Tensor] = []        # [B, D] of each batch

    def add(self, x_hat: Tensor, x: Tensor, indices: Tensor | None = None) -> None:
        """Reconstructions x_hat of x, and their codes [B, h, w]."""
        for name, measure in self.measures.items():
            self.scores[name] += measure(x_hat, x).tolist()
        if indices is not None:
            self.counts += count_codes(indices, len(self.counts))
        if self.extract is not None:
            self.features.append(self.extract(x_hat).cpu())

    def result(self, originals: list[Tensor] = ()) -> dict[str, float]:
        """Means over the images, code use, and "rfid" against the features of the `originals`."""
        out = {name: float(np.mean(scores)) for name, scores in self.scores.items()}
        if len(self.counts):
            out |= code_use(self.counts)
        if originals:
            out["rfid"] = frechet(torch.cat(originals), torch.cat(self.features))
        return out


class Comparison(NamedTuple):
    """What `compare` measured."""
    tallies: list[Tally]                # of each model
    boxes: dict[int, Tally]             # of the box baseline, by factor
    originals: list[Tensor]             # features [B, D] of the images themselves, for rFID


@torch.no_grad()
def compare(
    models: list[VQModel],
    batches: Iterable[Tensor],                      # images [B, 3, H, W]
    measures: dict[str, Measure],
    features: Features | None = None,               # for rFID
    device: str | torch.device = "cpu",
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> Comparison:
    """Every model, and the box baseline of its factor, on the same images in one pass."""
    tallies = [Tally(measures, model.config.n_embed, features) for model in models]
    boxes = {factor: Tally(measures, features=features)
             for factor in sorted({model.config.factor for model in models})}
    originals = []
    for x in batches:
        x = x.to(device)
        if features is not None:
            originals.append(features(x).cpu())
        for model, tally in zip(models, tallies, strict=True):
            with autocast():
                x_hat, _, codes = model(x)
            tally.add(x_hat.float().clamp(-1, 1), x, codes)
        for factor, tally in boxes.items():
            tally.add(box_baseline(x, factor), x)
    return Comparison(tallies, boxes, originals)


@torch.no_grad()
def reconstruction(
    model: VQModel, batches: Iterable[Tensor], device: str | torch.device = "cpu",
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> dict[str, float]:
    """Mean psnr and l1 over all images, psnr_box of the box baseline, code use of the whole set."""
    was_training = model.training
    model.eval()
    found = compare([model], batches, {"psnr": psnr, "l1": l1}, None, device, autocast)
    model.train(was_training)
    tally, box = found.tallies[0], found.boxes[model.config.factor]
    return tally.result() | {"psnr_box": box.result()["psnr"],
                             "images": len(tally.scores["psnr"])}


def typical_and_worst(scores: list[float], n: int) -> tuple[list[int], list[int]]:
    """Places of the n scores around the median, and of the n lowest, which are none of those.

    NaN counts as the lowest: an image that broke the model is the first to look at.
    """
    order = np.argsort(np.nan_to_num(scores, nan=-np.inf), kind="stable")
    first = max(n, (len(order) - n) // 2)
    return order[first:first + n].tolist(), order[:n].tolist()
