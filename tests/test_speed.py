"""What must not change a number: checkpointing of both networks, and the benchmark scripts run at all."""
from collections.abc import Callable

import pytest
import torch
from conftest import golden_weights, relative_error
from torch import Tensor, nn

import unet
import vq

UNET = unet.UNetConfig(model_channels=32, num_res_blocks=1, attention_resolutions=(2,), channel_mult=(1, 2, 2),
                       num_heads=4, context_dim=16, dropout=0.2)
VQ = vq.VQConfig(ch=32, num_res_blocks=2, n_embed=64, resolution=32, attn_resolutions=(16,), dropout=0.2)


def network(name: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A network in training mode with all of its weights drawn, and a loss of it; inputs are the same every time."""
    g = torch.Generator().manual_seed(0)
    if name == "unet":
        model = golden_weights("model.diffusion_model.", unet.UNet(UNET))
        x, t = torch.randn(2, 3, 16, 16, generator=g), torch.randint(1000, (2,), generator=g)
        context = torch.randn(2, 17, 16, generator=g)
        loss = lambda: model(x, t, context).float().square().mean()                     # noqa: E731
    else:
        model = golden_weights("first_stage_model.", vq.VQModel(VQ))
        x = torch.rand(2, 3, 32, 32, generator=g) * 2 - 1
        loss = lambda: sum((a - b).abs().mean() for a, b in [(model(x)[0], x), (model.encode(x), 0)])   # noqa: E731
    return model.train().to(memory_format=torch.channels_last), loss


def gradients(name: str, checkpointing: bool, bf16: bool = False) -> tuple[Tensor, Tensor, Tensor, int]:
    """(loss, all gradients, the next random number, bytes kept for the backward pass besides the weights)"""
    model, loss = network(name)
    model.checkpointing = checkpointing
    kept: dict[int, int] = {}

    def keep(y: Tensor) -> Tensor:
        kept[y.untyped_storage().data_ptr()] = y.untyped_storage().nbytes()
        return y

    torch.manual_seed(7)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16), torch.autograd.graph.saved_tensors_hooks(keep, lambda y: y):
        value = loss()
    n = sum(kept.values()) - sum(kept.get(p.untyped_storage().data_ptr(), 0) for p in model.parameters())
    value.backward()
    used = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return value.detach(), torch.cat(used), torch.rand(()), n


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", ["unet", "vq"])
def test_checkpointing_changes_no_number_and_keeps_less(name, bf16):
    """With dropout, whose masks must come again; in training what is drawn next must not depend on it either."""
    value, grad, drawn, kept = gradients(name, False, bf16)
    value_, grad_, drawn_, kept_ = gradients(name, True, bf16)
    assert value == value_ and drawn == drawn_
    assert grad.abs().max() > 0 and relative_error(grad_, grad) < 1e-3
    assert kept_ < 0.4 * kept


@pytest.mark.parametrize("module", [unet, vq])
def test_nothing_is_checkpointed_where_no_gradient_is_wanted(module, monkeypatch):
    model, loss = network(module.__name__)
    calls = []
    monkeypatch.setattr(module, "checkpoint", lambda f, *args, use_reentrant: calls.append(f) or f(*args))
    loss()
    assert not calls
    model.checkpointing = True
    with torch.no_grad():
        loss()
    assert not calls
    loss()
    assert len(calls) >= 7
