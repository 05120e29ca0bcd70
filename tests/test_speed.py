"""Speed and memory: checkpointing changes no number, and the benchmark measures what it says."""
import importlib.util
import itertools
import sys
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
    """A network in training mode with all weights drawn, and a loss of it on fixed inputs."""
    g = torch.Generator().manual_seed(0)
    if name == "unet":
        model = golden_weights("model.diffusion_model.", unet.UNet(UNET))
        x, t = torch.randn(2, 3, 16, 16, generator=g), torch.randint(1000, (2,), generator=g)
        context = torch.randn(2, 17, 16, generator=g)
        return model.train(), lambda: model(x, t, context).float().square().mean()
    model = golden_weights("first_stage_model.", vq.VQModel(VQ))
    x = torch.rand(2, 3, 32, 32, generator=g) * 2 - 1
    return model.train(), lambda: (model(x)[0] - x).abs().mean() + model.encode(x).abs().mean()


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", ["unet", "vq"])
def test_checkpointing_changes_no_number_and_keeps_less(name, bf16):
    """With dropout, whose masks must repeat; nor may the next random number change."""
    found = []
    for checkpointing in False, True:
        model, loss = network(name)
        model.checkpointing, kept = checkpointing, {}

        def keep(y: Tensor, kept=kept) -> Tensor:
            kept[y.untyped_storage().data_ptr()] = y.untyped_storage().nbytes()
            return y
        torch.manual_seed(7)
        with (torch.autocast("cpu", torch.bfloat16, enabled=bf16),
              torch.autograd.graph.saved_tensors_hooks(keep, lambda y: y)):
            value = loss()
        weights = (kept.get(p.untyped_storage().data_ptr(), 0) for p in model.parameters())
        n = sum(kept.values()) - sum(weights)
        value.backward()
        grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((value.detach(), torch.rand(()), grads, n))
    (value, drawn, grad, kept), (value_, drawn_, grad_, kept_) = found
    assert value == value_ and drawn == drawn_ and kept_ < 0.4 * kept
    assert grad.abs().max() > 0 and relative_error(grad_, grad) < 1e-3


@pytest.mark.parametrize("module", [unet, vq])
def test_without_gradients_nothing_is_checkpointed(module, monkeypatch):
    model, loss = network(module.__name__)
    calls = []
    monkeypatch.setattr(module, "checkpoint",
                        lambda f, *args, use_reentrant: calls.append(f) or f(*args))
    loss()
    model.checkpointing = True
    with torch.no_grad():
        loss()
    assert not calls
    loss()
    assert len(calls) >= 7


# ---------------------------------------------------------------------------------- the benchmark

@pytest.fixture
def speed(monkeypatch) -> ModuleType:
    """benchmarks/speed.py with networks that take no time."""
    path = Path(__file__).parent.parent / "benchmarks" / "speed.py"
    spec = importlib.util.spec_from_file_location("speed", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, value in (("UNET", UNET), ("VQ", VQ), ("LATENT", 16), ("PICTURE", 32)):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module, "ceiling", lambda device, dtype: {"matmul": 1e9})
    return module


@pytest.mark.parametrize("work", ["unet", "vq", "sample"])
def test_the_benchmark_divides_work_by_time(speed, work, monkeypatch, capsys):
    """By planted seconds: a table has too few digits where a machine is fast."""
    cases = ["ours/eager/float32", "ours/channels_last/bf16", "ours/checkpointing/bf16"]
    took = [0.8, 0.2, 1.6]
    clock = itertools.cycle(took)
    monkeypatch.setattr(speed, "seconds", lambda step, device: (step(), next(clock))[1])
    argv = [work, "--batch", "1", "--turns", "1", "--device", "cpu", "--cases", *cases]
    assert speed.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split("|")[1:-1] for line in lines if line.startswith("| ours")]
    assert [row[0].strip() for row in rows] == cases
    assert [(float(row[1]), float(row[2])) for row in rows] == [(0.8, 1), (0.2, 4), (1.6, 0.5)]
    count = speed.flops(work, "ours", "cpu")
    for (*_, amount, rate, share), s in zip(rows, took, strict=True):
        assert float(amount) == pytest.approx(count / 1e9, abs=0.5)
        assert float(rate) == pytest.approx(count / s / 1e9, abs=0.5)
        assert float(share.strip()[:-1]) == pytest.approx(100 * count / s / 1e9, abs=0.5)


def test_a_step_costs_three_forward_passes(speed):
    """A guided sampling step is two of them."""
    forward = speed.flops("sample", "ours", "cpu") / 2
    assert speed.flops("unet", "ours", "cpu") == pytest.approx(3 * forward, rel=0.02)


def test_cases_take_turns(speed):
    order = []
    works = {name: lambda name=name: order.append(name) for name in "ab"}
    times = speed.in_turns(works, 3, "cpu")
    assert "".join(order) == "abababab" and [len(times[name]) for name in "ab"] == [3, 3]


def test_mistakes_are_one_sentence(speed, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        speed.main(["unet", "--device", "cpu", "--cases", "ours/channels_last/fp16"])
    assert "fp16; on cpu there are" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert speed.main(["vq", "--device", "cpu", "--cases", "diffusers/eager/float32"]) == 2
    assert "pip install diffusers" in capsys.readouterr().err
