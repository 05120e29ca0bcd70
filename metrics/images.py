"""How alike pictures and their reconstructions are: pictures [B, 3, H, W] in [-1, 1] in, numbers out.

L1, PSNR, SSIM and whatever else is given as a callable, of each picture [B]; the Frechet distance of two sets; one pass
over all pictures that keeps running sums, and a shortlist of those to look at.

Letters: B batch, H W picture, K codes, D features.
"""
from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from metrics.codebook import code_use, count_codes
from vq import VQModel

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5   # of the Gaussian window, and the constants K1 and K2: Wang et al. 2004
SSIM_K1, SSIM_K2 = 0.01, 0.03
Measure = Callable[[Tensor, Tensor], Tensor]                # (x_hat, x), each [B, 3, H, W] in [-1, 1] -> [B]
Features = Callable[[Tensor], Tensor]                       # pictures [B, 3, H, W] in [-1, 1] -> [B, D]


# ------------------------------------------------------------------------------------------ measures of pictures

def l1(x_hat: Tensor, x: Tensor) -> Tensor:
    """Mean absolute difference of each picture, [B], of values in [-1, 1]."""
    return (x_hat.clamp(-1, 1) - x).abs().mean(dim=(1, 2, 3))


def psnr(x_hat: Tensor, x: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each picture, [B], for x_hat and x [B, 3, H, W] in [-1, 1]."""
    mse = ((x_hat.clamp(-1, 1) - x) / 2).square().mean(dim=(1, 2, 3))
    return -10 * torch.log10(mse.clamp(min=1e-12))


def ssim(x_hat: Tensor, x: Tensor) -> Tensor:
    """Structural similarity of each picture, [B]; 1 where both are the same (Wang et al. 2004, eq. 13).

    Per channel, over the places where the Gaussian window lies inside the picture, weighed variances: the numbers of
    scikit-image with gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.
    """
    at = torch.arange(SSIM_WINDOW, device=x.device, dtype=torch.float64) - SSIM_WINDOW // 2
    g = torch.exp(-at ** 2 / (2 * SSIM_SIGMA ** 2))
    g = g / g.sum()
    C = x.shape[1]
    across = g.view(1, 1, 1, -1).expand(C, 1, 1, -1)
    down = g.view(1, 1, -1, 1).expand(C, 1, -1, 1)

    def mean(p: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(p, across, groups=C), down, groups=C)
    # In float64: a variance is the difference of two nearly equal numbers where the picture is flat.
    a, b = (x_hat.double().clamp(-1, 1) + 1) / 2, (x.double() + 1) / 2
    m_a, m_b = mean(a), mean(b)
    v_a, v_b, v_ab = mean(a * a) - m_a ** 2, mean(b * b) - m_b ** 2, mean(a * b) - m_a * m_b
    c1, c2 = SSIM_K1 ** 2, SSIM_K2 ** 2
    s = (2 * m_a * m_b + c1) * (2 * v_ab + c2) / ((m_a ** 2 + m_b ** 2 + c1) * (v_a + v_b + c2))
    return s.mean(dim=(1, 2, 3)).float()


def box_baseline(x: Tensor, factor: int) -> Tensor:
    """x [B, 3, H, W] averaged over factor x factor boxes and blown up again: what an autoencoder has to beat."""
    return F.interpolate(F.avg_pool2d(x, factor), scale_factor=float(factor), mode="nearest")


# --------------------------------------------------------------------------------- measures of a set of pictures

class Moments:
    """Mean [D] and covariance [D, D] of features, from running sums in float64."""

    def __init__(self):
        self.n, self.total, self.outer = 0, 0.0, 0.0

    def add(self, features: Tensor) -> None:
        """features [B, D]"""
        f = features.double()
        self.n, self.total, self.outer = self.n + len(f), self.total + f.sum(0), self.outer + f.T @ f

    def result(self) -> tuple[Tensor, Tensor]:
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 pictures, but there is {self.n}")
        mean = self.total / self.n
        return mean, (self.outer - self.n * torch.outer(mean, mean)) / (self.n - 1)


def frechet(a: Moments, b: Moments) -> float:
    """Squared Frechet distance of the Gaussians with these moments (arXiv:1706.08500 eq. 6): FID of Inception features.

    |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)). The last trace is the sum of the square roots of the eigenvalues
    of C_a^(1/2) C_b C_a^(1/2), which is symmetric where C_a C_b is not. NaN where a feature is not finite.
    """
    (m_a, c_a), (m_b, c_b) = a.result(), b.result()
    if not (c_a.isfinite().all() and c_b.isfinite().all()):     # on which eigh would raise
        return math.nan
    values, vectors = torch.linalg.eigh(c_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ c_b @ root).clamp(min=0).sqrt().sum()
    return ((m_a - m_b).square().sum() + c_a.trace() + c_b.trace() - 2 * cross).clamp(min=0).item()


# ----------------------------------------------------------------------------------------- one pass over pictures

class Tally:
    """Running figures of one kind of reconstruction; its memory does not grow with the pictures."""

    def __init__(
        self,
        measures: dict[str, Measure],
        n_embed: int = 0,                       # codes to count
        features: Features | None = None,       # whose moments over the reconstructions rFID needs
    ):
        self.measures, self.sums, self.n = measures, dict.fromkeys(measures, 0.0), 0
        self.counts = torch.zeros(n_embed, dtype=torch.long)        # uses of each code
        self.features, self.moments = features, Moments()

    def add(self, x_hat: Tensor, x: Tensor, indices: Tensor | None = None) -> dict[str, Tensor]:
        """Counts reconstructions x_hat of x [B, 3, H, W] and their codes [B, h, w]; gives each picture's values [B]."""
        values = {name: measure(x_hat, x) for name, measure in self.measures.items()}
        for name, value in values.items():
            self.sums[name] += value.sum().item()
        if indices is not None:
            self.counts += count_codes(indices, len(self.counts))
        if self.features is not None:
            self.moments.add(self.features(x_hat))
        self.n += len(x)
        return values

    def result(self, originals: Moments | None = None) -> dict[str, float]:
        """Means, code use, and with the `originals`' features the Frechet distance to them, "rfid"."""
        if self.n == 0:
            raise ValueError("there are no pictures to evaluate on")
        out = {k: v / self.n for k, v in self.sums.items()} | (code_use(self.counts) if len(self.counts) else {})
        return out | ({"rfid": frechet(originals, self.moments)} if originals is not None else {})


@torch.no_grad()
def reconstruction(model: VQModel, images: Iterable[Tensor], device: str | torch.device = "cpu",
                   autocast: Callable[[], AbstractContextManager] = nullcontext) -> dict[str, float]:
    """Means over all pictures, each batch [B, 3, H, W] in [-1, 1]; usage and perplexity count every code of the set.

    psnr is of the quantised reconstruction, psnr_box of `box_baseline`; perplexity is exp of the entropy of the
    codes, K at most.
    """
    was_training = model.training
    model.eval()
    tally, box = Tally({"psnr": psnr, "l1": l1}, model.config.n_embed), Tally({"psnr": psnr})
    for x in images:
        x = x.to(device)
        with autocast():
            x_hat, _, indices = model(x)
        tally.add(x_hat.float(), x, indices)
        box.add(box_baseline(x, model.config.factor), x)
    model.train(was_training)
    return tally.result() | {"psnr_box": box.result()["psnr"], "pictures": tally.n}


class Shortlist:
    """Which pictures to show: the worst of all, and some around the median, chosen in memory that does not grow.

    A heap keeps the `n` lowest values, a reservoir (Vitter 1985, algorithm R, seeded) a fair draw of all others too.
    NaN, which has no order, counts as the lowest: a picture that broke the model is the first to look at.
    """
    RESERVOIR = 1024

    def __init__(self, n: int, seed: int = 0):
        self.n, self.seen, self.heap, self.reservoir = n, 0, [], []
        self.rng = random.Random(seed)

    def add(self, value: float, index: int) -> None:
        value = -math.inf if math.isnan(value) else value
        heapq.heappush(self.heap, (-value, index))          # the best of the worst lies on top, and leaves
        if len(self.heap) > self.n:
            heapq.heappop(self.heap)
        self.seen += 1
        if len(self.reservoir) < self.RESERVOIR:
            self.reservoir.append((value, index))
        elif (place := self.rng.randrange(self.seen)) < self.RESERVOIR:
            self.reservoir[place] = value, index

    def worst(self) -> list[int]:
        """Indices, the worst first."""
        return [index for _, index in sorted(self.heap, reverse=True)]

    def typical(self) -> list[int]:
        """Indices of the n values about the median that are not among the worst, from low to high."""
        worst = set(self.worst())
        rest = sorted(self.reservoir)
        middle = (len(rest) - 1) / 2
        nearest = sorted((abs(rank - middle), rank) for rank, (_, index) in enumerate(rest) if index not in worst)
        return [rest[rank][1] for rank in sorted(rank for _, rank in nearest[:self.n])]


@dataclass
class Comparison:
    """What `compare` found."""
    tallies: list[Tally]                # of each model
    boxes: dict[int, Tally]             # of `box_baseline`, by its factor
    originals: Moments | None           # of the pictures' own features
    shortlist: Shortlist                # by the first model's psnr


@torch.no_grad()
def compare(models: list[VQModel], batches: Iterable[tuple[Tensor, Tensor]], measures: dict[str, Measure],
            features: Features | None = None, show: int = 3, device: str | torch.device = "cpu") -> Comparison:
    """Every model on the same batches (pictures [B, 3, H, W] in [-1, 1], indices [B]), in one pass.

    `measures` have psnr among them; the shortlist holds 2 * `show` pictures.
    """
    found = Comparison([Tally(measures, model.config.n_embed, features) for model in models],
                       {f: Tally(measures, 0, features) for f in sorted({model.config.factor for model in models})},
                       Moments() if features is not None else None, Shortlist(show))
    for x, indices in batches:
        x = x.to(device)
        if features is not None:
            found.originals.add(features(x))
        for i, (model, tally) in enumerate(zip(models, found.tallies, strict=True)):
            x_hat, _, codes = model(x)
            values = tally.add(x_hat.float().clamp(-1, 1), x, codes)
            if i == 0:
                for value, index in zip(values["psnr"].tolist(), indices.tolist(), strict=True):
                    found.shortlist.add(value, index)
        for factor, tally in found.boxes.items():
            tally.add(box_baseline(x, factor), x)
    return found


def inception(device: str | torch.device) -> Features:
    """FID's features, D = 2048; ValueError without pytorch-fid, or where Inception's weights cannot be had."""
    try:
        from pytorch_fid.inception import InceptionV3
        model = InceptionV3([InceptionV3.BLOCK_INDEX_BY_DIM[2048]])
    except ImportError as e:
        raise ValueError(f"--rfid needs pytorch-fid ({e}): pip install pytorch-fid, or leave --rfid out") from None
    except OSError as e:                        # URLError is one
        raise ValueError(f"--rfid: Inception's weights cannot be fetched ({e}); leave --rfid out, or run it once with "
                         "a network") from None
    model = model.eval().requires_grad_(False).to(device)
    return lambda x: model((x + 1) / 2)[0].flatten(1)
