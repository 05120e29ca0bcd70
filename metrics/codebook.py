"""Which codes of the autoencoder pictures use: counts [K] in, shares, perplexity and overlaps out."""
from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from vq import VQModel


def code_use(counts: Tensor) -> dict[str, float]:
    """Of the uses [K] of each code: the share of codes used at all, and exp of the entropy, K at most."""
    p = counts.double() / counts.sum()
    return {"codes_used": (counts > 0).double().mean().item(),
            "perplexity": torch.exp(-(p * p.clamp(min=1e-12).log()).sum()).item()}


def code_overlap(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    """How far two sets of pictures use the same codes, from the uses [K] of each code in one and in the other.

    common is |A and B| / |A or B| over codes; ours_known is the share of our uses that fall on codes which they use at
    all, theirs_known the reverse; histogram is sum min(p_A, p_B), 1 where every code has the same share in both.
    """
    a, b = ours > 0, theirs > 0
    p_a, p_b = ours.double() / ours.sum(), theirs.double() / theirs.sum()
    return {"both": (a & b).sum().item(), "only_ours": (a & ~b).sum().item(), "only_theirs": (b & ~a).sum().item(),
            "common": ((a & b).sum() / (a | b).sum()).item(),
            "ours_known": p_a[b].sum().item(), "theirs_known": p_b[a].sum().item(),
            "histogram": torch.minimum(p_a, p_b).sum().item()}


def count_codes(indices: Tensor, n_embed: int) -> Tensor:
    """Uses [K] of each code among indices of any shape, on the CPU."""
    return torch.bincount(indices.flatten().cpu(), minlength=n_embed)


@torch.no_grad()
def code_counts(models: list[VQModel], images: Iterable[Tensor],
                device: str | torch.device = "cpu") -> tuple[list[Tensor], int]:
    """Uses [K] of each code of each model over all pictures, and how many pictures that were."""
    counts, n = [torch.zeros(model.config.n_embed, dtype=torch.long) for model in models], 0
    for x in images:
        n += len(x)
        for model, count in zip(models, counts, strict=True):
            count += count_codes(model.quantize(model.encode(x.to(device)))[2], len(count))
    return counts, n
