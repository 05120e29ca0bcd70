"""Muon, an optimiser for matrices: orthogonalised momentum instead of Adam's division by a running
standard deviation. Jordan et al. 2024, https://kellerjordan.github.io/posts/muon.
"""
from __future__ import annotations

import torch
from torch import Tensor

# Coefficients of the quintic Newton-Schulz iteration from the Muon post; MUON_RMS is the RMS of an
# update, similar to AdamW's (arXiv:2502.16982 section 2.2).
NS_COEFFICIENTS, NS_STEPS, MUON_RMS, MOMENTUM = (3.4445, -4.7750, 2.0315), 5, 0.2, 0.95


def orthogonalised(G: Tensor) -> Tensor:
    """A matrix [n, m] -> one with its singular vectors and all singular values near 1.

    The Newton-Schulz iteration X <- (a + b XX' + c (XX')^2) X, written in terms of the small XX':
    filters are 9 times as long as wide, so this halves the arithmetic.
    """
    a, b, c = NS_COEFFICIENTS
    X = G.mT if len(G) > G.shape[1] else G                  # [n, m] with n <= m
    X = X / (X.norm() + 1e-7)
    A = X @ X.mT                                            # XX' of this iteration
    P = torch.eye(len(X), device=X.device, dtype=X.dtype)   # the product of all factors so far
    for _ in range(NS_STEPS):
        B = b * A + c * A @ A
        B.diagonal().add_(a)
        A, P = B @ A @ B, B @ P
    X = P @ X
    return X.mT if len(G) > G.shape[1] else X


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum for matrices, AdamW for the other parameters.

    All directions of a layer move equally far, also those with a small gradient. Convolution
    filters are matrices [out, rest].
    """
    _step_supports_amp_scaling = True       # GradScaler passes found_inf: no wait for the GPU

    def __init__(self, matrices: list[Tensor], adamw: torch.optim.AdamW, lr_scale: float = 1.0):
        """`adamw` holds the other parameters; `lr_scale` is the learning rate of the matrices over
        that of the others."""
        self.adamw = adamw
        groups = [{"params": matrices, "lr_scale": lr_scale}, *adamw.param_groups]
        super().__init__(groups, {"lr": adamw.defaults["lr"]})

    @torch.no_grad()
    def step(self) -> None:
        matrices, *others = self.param_groups
        found_inf = getattr(self, "found_inf", None)
        self.adamw.param_groups, self.adamw.state = others, self.state
        self.adamw.found_inf, self.adamw.grad_scale = found_inf, None
        self.adamw.step()
        moves = 1.0 if found_inf is None else 1.0 - found_inf           # 0 skips the step
        for p in matrices["params"]:
            if p.grad is None:
                continue
            if p not in self.state:
                self.state[p]["average"] = torch.zeros_like(p)
            if found_inf is not None:
                p.grad.masked_fill_(found_inf.bool(), 0.0)
            average = self.state[p]["average"].lerp_(p.grad, (1 - MOMENTUM) * moves)
            nesterov = p.grad.lerp(average, MOMENTUM).flatten(1)
            size = matrices["lr"] * MUON_RMS * max(nesterov.shape) ** 0.5
            p.sub_(orthogonalised(nesterov).view_as(p) * (size * moves))
