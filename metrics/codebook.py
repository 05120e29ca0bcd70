"""Which codes a set of images uses: counts [K] of each code in; shares, perplexity, overlap out."""
from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vq import VQModel


def code_use(counts: Tensor) -> dict[str, float]:
    """The share of codes in use and the perplexity, exp(entropy) and at most K, of counts [K]."""
    p = counts.double() / counts.sum()
    entropy = -(p * p.clamp(min=1e-12).log()).sum()
    return {"codes_used": (counts > 0).double().mean().item(), "perplexity": entropy.exp().item()}


def code_overlap(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    """How far two sets of images use the same codes, from the counts [K] of each.

    common      |A and B| / |A or B| over the codes in use
    ours_known  share of our uses that fall on codes which they use too; theirs_known is the reverse
    histogram   sum of min(p_A, p_B): 1 where every code has the same share in both sets
    """
    a, b = ours > 0, theirs > 0
    p_a, p_b = ours.double() / ours.sum(), theirs.double() / theirs.sum()
    out = {"both": (a & b).sum(), "only_ours": (a & ~b).sum(), "only_theirs": (b & ~a).sum(),
           "common": (a & b).sum() / (a | b).sum(), "ours_known": p_a[b].sum(),
           "theirs_known": p_b[a].sum(), "histogram": torch.minimum(p_a, p_b).sum()}
    return {name: value.item() for name, value in out.items()}


def count_codes(indices: Tensor, n_embed: int) -> Tensor:
    """Counts [K], on the CPU, of each code among indices of any shape."""
    return torch.bincount(indices.flatten().cpu(), minlength=n_embed)


@torch.no_grad()
def code_counts(models: list[VQModel], batches: Iterable[Tensor],
                device: str | torch.device = "cpu") -> tuple[list[Tensor], int]:
    """Counts [K] of each model's codes over all images [B, 3, H, W], and the number of images."""
    counts = [torch.zeros(model.config.n_embed, dtype=torch.long) for model in models]
    n = 0
    for x in batches:
        n += len(x)
        for model, count in zip(models, counts, strict=True):
            _, _, indices = model.quantize(model.encode(x.to(device)))
            count += count_codes(indices, len(count))
    return counts, n
