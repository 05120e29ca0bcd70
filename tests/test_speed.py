"""Checkpointing changes no number, and benchmarks/speed.py measures what it says."""
import importlib.util
import itertools
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import golden_weights, relative_error
from torch import Tensor, nn

import unet
import vq

UNET = unet.UNetConfig(model_channels=32, num_res_blocks=1, attention_resolutions=(2,),
                       channel_mult=(1, 2, 2), num_heads=4, context_dim=16, dropout=0.2)
VQ = vq.VQConfig(ch=32, n_embed=64, resolution=32, attn_resolutions=(16,), dropout=0.2)


def network(name: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A network in training mode with all weights drawn, and its loss of the same inputs."""
    g = torch.Generator().manual_seed(0)
    if name == "unet":
        model = golden_weights("model.diffusion_model.", unet.UNet(UNET))
        x, t = torch.randn(2, 3, 16, 16, generator=g), torch.randint(1000, (2,), generator=g)
        context = torch.randn(2, 17, 16, generator=g)

        def loss() -> Tensor:
            return model(x, t, context).float().square().mean()
    else:
        model = golden_weights("first_stage_model.", vq.VQModel(VQ))
        x = torch.rand(2, 3, 32, 32, generator=g) * 2 - 1

        def loss() -> Tensor:
            return (model(x)[0] - x).abs().mean() + model.encode(x).abs().mean()
    return model.train().to(memory_format=torch.channels_last), loss


def gradients(name: str, checkpointing: bool, bf16: bool) -> tuple[Tensor, Tensor, Tensor, int]:
    """(loss, all gradients, the next random number, bytes kept for the backward pass besides the
    weights)"""
    model, loss = network(name)
    model.checkpointing = checkpointing
    kept: dict[int, int] = {}

    def keep(y: Tensor) -> Tensor:
        kept[y.untyped_storage().data_ptr()] = y.untyped_storage().nbytes()
        return y

    torch.manual_seed(7)
    watched = torch.autograd.graph.saved_tensors_hooks(keep, lambda y: y)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16), watched:
        value = loss()
    weights = (p.untyped_storage().data_ptr() for p in model.parameters())
    n = sum(kept.values()) - sum(kept.get(pointer, 0) for pointer in weights)
    value.backward()
    used = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return value.detach(), torch.cat(used), torch.rand(()), n


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", ["unet", "vq"])
def test_checkpointing_changes_no_number_and_keeps_less(name, bf16):
    """With dropout, whose masks must come again; the next draw must not depend on it either."""
    value, grad, drawn, kept = gradients(name, False, bf16)
    value_, grad_, drawn_, kept_ = gradients(name, True, bf16)
    assert value == value_ and drawn == drawn_
    assert grad.abs().max() > 0 and relative_error(grad_, grad) < 1e-3
    assert kept_ < 0.4 * kept


@pytest.mark.parametrize("module", [unet, vq])
def test_nothing_is_checkpointed_where_no_gradient_is_wanted(module, monkeypatch):
    model, loss = network(module.__name__)
    calls = []
    monkeypatch.setattr(module, "checkpoint",
                        lambda f, *args, use_reentrant: calls.append(f) or f(*args))
    loss()
    assert not calls
    model.checkpointing = True
    with torch.no_grad():
        loss()
    assert not calls
    loss()
    assert len(calls) >= 7


# ---- the benchmark

@pytest.fixture
def speed(monkeypatch) -> ModuleType:
    """benchmarks/speed.py with networks that take no time."""
    path = Path(__file__).parent.parent / "benchmarks" / "speed.py"
    spec = importlib.util.spec_from_file_location("speed", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, value in (("UNET", UNET), ("VQ", VQ), ("LATENT", 16), ("PICTURE", 32)):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module, "ceiling", lambda device, dtype: 1e9)
    return module


@pytest.mark.parametrize("work", ["unet", "vq", "sample"])
def test_the_benchmark_runs_every_work(speed, work, monkeypatch, capsys):
    """By a clock of our own: a table's digits are too few on a very fast machine."""
    cases = ["ours/eager/float32", "ours/channels_last/bf16", "ours/checkpointing/bf16"]
    took = [0.8, 0.2, 1.6]
    clock = itertools.cycle(took)
    monkeypatch.setattr("benchmarks.timing.seconds", lambda step, device: (step(), next(clock))[1])
    argv = [work, "--batch", "1", "--turns", "1", "--device", "cpu", "--cases", *cases]
    speed.main(argv)
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split("|")[1:-1] for line in lines if line.startswith("| ours")]
    assert [row[0].strip() for row in rows] == cases
    assert [(float(row[1]), float(row[2])) for row in rows] == [(0.8, 1), (0.2, 4), (1.6, 0.5)]
    count = speed.flops(work, "ours", "cpu")
    for (*_, amount, rate, share), seconds in zip(rows, took, strict=True):
        assert float(amount) == pytest.approx(count / 1e9, abs=0.5)
        assert float(rate) == pytest.approx(count / seconds / 1e9, abs=0.5)
        assert float(share.strip()[:-1]) == pytest.approx(100 * count / seconds / 1e9, abs=0.5)


def test_flops_of_a_step_are_three_times_those_of_a_forward_pass(speed):
    """A sampling step is two forward passes."""
    forward = speed.flops("sample", "ours", "cpu") / 2
    assert speed.flops("unet", "ours", "cpu") == pytest.approx(3 * forward, rel=0.02)


def test_cases_take_turns(speed):
    order = []
    works = {name: lambda name=name: order.append(name) for name in "ab"}
    times = speed.in_turns(works, 3, "cpu")
    assert "".join(order) == "abababab" and [len(times[name]) for name in "ab"] == [3, 3]


def test_an_unknown_case_is_a_sentence(speed, capsys):
    with pytest.raises(SystemExit):
        speed.main(["unet", "--device", "cpu", "--cases", "ours/channels_last/fp16"])
    assert "fp16; on cpu there are" in capsys.readouterr().err
