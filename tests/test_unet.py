"""unet.py against the reference's parameters and outputs, and against definitions."""
import json
from dataclasses import replace

import pytest
import torch
from conftest import GOLDEN, golden_weights, relative_error
from torch import Tensor, nn

import unet
from diffusion import Diffusion
from engine import cpu
from unet import Attention, UNet, UNetConfig, timestep_embedding

PREFIX = "model.diffusion_model."
SMALL = UNetConfig(model_channels=32, num_res_blocks=1, attention_resolutions=(2,),
                   channel_mult=(1, 2), num_heads=4, context_dim=16)


@pytest.fixture(scope="module")
def tiny(golden_config) -> UNet:
    fields = {name: value for name, value in golden_config["unet"].items()
              if name in UNetConfig.__dataclass_fields__}
    return golden_weights(PREFIX, UNet(UNetConfig(**fields)))


def small(config: UNetConfig = SMALL) -> UNet:
    """A network with every weight drawn, the zero-initialised ones too."""
    return golden_weights(PREFIX, UNet(config))


def inputs(B: int = 2, N: int = 17) -> tuple[Tensor, Tensor, Tensor]:
    """x [B, 3, 8, 8], t [B] and a context [B, N, 16]."""
    g = torch.Generator().manual_seed(0)
    return (torch.randn(B, 3, 8, 8, generator=g), torch.randint(1000, (B,), generator=g),
            torch.randn(B, N, 16, generator=g))


# ---- the reference

def shapes(state: dict) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in state.items()}


def test_the_default_config_is_the_danbooru_recipe():
    with torch.device("meta"):
        model = UNet(UNetConfig())
    assert sum(p.numel() for p in model.parameters()) == 206_194_243
    listed = json.loads((GOLDEN / "danbooru_keypoints_ldm_state_dict.json").read_text())
    assert shapes(model.state_dict()) == {
        name[len(PREFIX):]: shape for name, (shape, _) in listed.items() if name.startswith(PREFIX)}


def test_the_tiny_network_has_the_reference_names(tiny):
    listed = json.loads((GOLDEN / "tiny_f4" / "parameters.json").read_text())
    assert shapes(tiny.state_dict()) == {
        name[len(PREFIX):]: shape for name, shape in listed.items() if name.startswith(PREFIX)}


@pytest.mark.parametrize("context, out", [("context", "out"), ("context_17tokens", "out_17tokens")])
def test_output_equals_the_reference(tiny, golden, context, out):
    with torch.no_grad():
        eps = tiny(golden["unet/x"], golden["unet/t"], golden[f"unet/{context}"])
    assert relative_error(eps, golden[f"unet/{out}"]) < 1e-4


def test_a_new_network_predicts_zero_and_its_branches_are_closed():
    """Zero-initialised last layers: the output is 0, and every residual branch adds nothing."""
    model = UNet(SMALL)
    x, t, context = inputs()
    assert model(x, t, context).abs().max() == 0
    block = model.middle_block
    h, emb = torch.randn(2, 64, 4, 4), torch.randn(2, 128)
    assert torch.equal(block(h, emb, context), h)


def test_timestep_embedding_is_cosines_then_sines():
    emb = timestep_embedding(torch.tensor([0, 7]), 6).double()
    phase = 7 * torch.tensor([1.0, 10_000 ** (-1 / 3), 10_000 ** (-2 / 3)], dtype=torch.float64)
    assert emb[0].tolist() == [1, 1, 1, 0, 0, 0]
    torch.testing.assert_close(emb[1], torch.cat([phase.cos(), phase.sin()]), atol=1e-6, rtol=0)


# ---- attention

def test_attention_equals_its_definition():
    torch.manual_seed(0)
    layer, x, context = Attention(32, 16, 4), torch.randn(2, 5, 32), torch.randn(2, 7, 16)
    q, k, v = layer.to_q(x), layer.to_k(context), layer.to_v(context)
    heads = []
    for head in range(4):
        of = slice(8 * head, 8 * head + 8)
        weights = (q[..., of] @ k[..., of].mT / 8**0.5).softmax(-1)
        heads.append(weights @ v[..., of])
    wanted = layer.to_out[0](torch.cat(heads, -1))
    torch.testing.assert_close(layer(x, context), wanted)


@pytest.mark.parametrize("keys", [1, 17, 1024])
def test_bf16_attention_is_near_float64_with_few_keys_and_with_many(keys):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 40).bfloat16().requires_grad_() for n in (1024, keys, keys))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    upstream = torch.randn(1, 2, 1024, 40).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = unet.attend(q, k, v)
    y.backward(upstream)
    wanted = (exact[0] @ exact[1].mT / 40**0.5).softmax(-1) @ exact[2]
    wanted.backward(upstream.double())
    assert y.dtype == torch.bfloat16
    assert relative_error(y, wanted) < 1e-2
    for got, x in zip((q, k, v), exact, strict=True):
        if keys > 1 or x is exact[2]:           # the scores of a single key have no gradient
            assert relative_error(got.grad, x.grad) < 1e-2


def test_every_joint_changes_the_output_and_pixels_differ():
    model, (x, t, context) = small(), inputs(B=1)
    with torch.no_grad():
        base = model(x, t, context)
        for joint in range(17):
            moved = context.clone()
            moved[:, joint] += 1
            spread = (model(x, t, moved) - base).flatten(2).std(-1).mean()
            assert spread > 1e-3 * base.std(), f"joint {joint} changes every pixel alike"


def attn2_output(N: int) -> tuple[Tensor, Tensor]:
    """The output of the middle's cross-attention [B, L, C] to N tokens; the gradient of to_q."""
    model, (x, t, context) = small(), inputs(N=N)
    attn2 = model.middle_block[1].transformer_blocks[0].attn2
    seen = []
    hook = attn2.register_forward_hook(lambda module, args, out: seen.append(out))
    model(x, t, context).square().sum().backward()
    hook.remove()
    return seen[0].detach(), attn2.to_q.weight.grad


def test_a_single_token_gives_every_pixel_the_same_vector():
    """The flaw of the reference's context [B, 1, 17]: its queries never learn. With 17 they do."""
    one, gradient = attn2_output(N=1)
    assert (one - one[:, :1]).abs().max() < 1e-5 * one.abs().max()
    assert gradient.abs().max() < 1e-5
    many, gradient = attn2_output(N=17)
    assert (many - many[:, :1]).abs().max() > 1e-2 * many.abs().max()
    assert gradient.abs().max() > 1e-3


def test_without_context_dim_there_is_no_cross_attention():
    model, (x, t, _) = small(replace(SMALL, context_dim=None)), inputs()
    names = model.state_dict().keys()
    assert any("attn1" in name for name in names)
    assert not any("attn2" in name or "norm2" in name for name in names)
    with torch.no_grad():
        assert model(x, t).std() > 0


# ---- maps and the timestep

def test_concat_is_the_last_input_channels():
    model, (x, t, context) = small(replace(SMALL, in_channels=20)), inputs()
    maps = torch.rand(2, 17, 8, 8)
    with torch.no_grad():
        eps = model(x, t, context, maps)
        assert relative_error(model(torch.cat([x, maps], 1), t, context), eps) < 1e-6
        for joint in range(17):
            moved = maps.clone()
            moved[:, joint, 2, 5] += 1
            assert (model(x, t, context, moved) - eps).abs().max() > 1e-3 * eps.std()


def test_samples_of_a_batch_are_independent():
    model, (x, t, context) = small(), inputs(B=3)
    with torch.no_grad():
        together = model(x, t, context)
        alone = torch.cat([model(x[i:i + 1], t[i:i + 1], context[i:i + 1]) for i in range(3)])
        other_t = model(x, torch.cat([t[:2], t[2:] // 2]), context)
    assert relative_error(together, alone) < 1e-5
    assert relative_error(other_t[:2], alone[:2]) < 1e-5
    assert relative_error(other_t[2:], alone[2:]) > 1e-3


# ---- layouts and precision

def gradients(model: nn.Module, *args: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    eps = model(*args)
    eps.float().square().mean().backward()
    return eps.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def test_channels_last_weights_change_nothing():
    args = inputs()
    eps, grads = gradients(small(), *args)
    eps_last, grads_last = gradients(small().to(memory_format=torch.channels_last), *args)
    assert relative_error(eps_last, eps) < 1e-5
    for name, grad in grads.items():
        assert (grads_last[name] - grad).abs().max() < 1e-4 * grad.abs().max() + 1e-7, name


def test_bf16_autocast_is_close_to_float32(tiny, golden):
    args = golden["unet/x"], golden["unet/t"], golden["unet/context_17tokens"]
    eps, grads = gradients(tiny, *args)
    with torch.autocast("cpu", torch.bfloat16):
        cpu.use_fast_norms(tiny)
        eps_bf16, grads_bf16 = gradients(tiny.to(memory_format=torch.channels_last), *args)
    # PyTorch's own GroupNorm and bf16 attention are 2.2e-2 off: a random network amplifies.
    assert relative_error(eps_bf16, eps) < 3e-2
    flat, flat_bf16 = (torch.cat([g.flatten() for g in grad.values()])
                       for grad in (grads, grads_bf16))
    assert torch.cosine_similarity(flat, flat_bf16, dim=0) > 0.999


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at_once, layout, side", [
    (2**20, torch.channels_last, 6), (1, torch.channels_last, 6),
    (2 * 64 * 36, torch.contiguous_format, 6), (2 * 64 * 32**2, torch.channels_last, 32)])
def test_group_norm_equals_pytorchs_and_keeps_the_layout(at_once, layout, side, dtype, monkeypatch):
    """In parts of all, one and two of three samples, on small maps and large; the gradient arrives
    in either layout."""
    monkeypatch.setattr(cpu, "NORM_AT_ONCE", at_once)
    torch.manual_seed(0)
    ours, plain = nn.GroupNorm(32, 64), nn.GroupNorm(32, 64)
    cpu.use_fast_norms(ours)
    nn.init.normal_(ours.weight)
    nn.init.normal_(ours.bias)
    plain.load_state_dict(ours.state_dict())
    x = (torch.randn(3, 64, side, side) + 2 * torch.randn(64, 1, 1)).to(dtype)
    a = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    b = x.float().requires_grad_()
    upstream = torch.randn(3, 64, side, side).contiguous(memory_format=layout)
    y = ours(a)
    y.backward(upstream.to(dtype))
    plain(b).backward(upstream)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert y.dtype == dtype
    assert relative_error(y, plain(b)) < tolerance
    assert relative_error(a.grad, b.grad) < tolerance
    assert relative_error(ours.weight.grad, plain.weight.grad) < tolerance
    assert relative_error(ours.bias.grad, plain.bias.grad) < tolerance
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_convolution_sees_channels_last_both_ways(dtype):
    """One NCHW tensor makes a bf16 convolution's backward many times slower."""
    model = small(replace(SMALL, channel_mult=(1, 2, 2))).to(memory_format=torch.channels_last)
    cpu.use_fast_norms(model)
    x, t, context = inputs()
    x.requires_grad_()                          # or the first convolution's hook does not run
    bad = set()

    def note(name: str, what: str, y: Tensor) -> None:
        if y.stride(1) != 1:
            bad.add((name, what))

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(lambda m, xs, name=name: note(name, "input", xs[0]))
            module.register_full_backward_pre_hook(
                lambda m, gy, name=name: note(name, "gradient", gy[0]))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = Diffusion().loss(lambda x, t, cond, drop: model(x, t, cond), x, context, t,
                                torch.randn_like(x), t < 0)
    loss.sum().backward()
    # The loss gives the last convolution an NCHW gradient; with few channels it costs nothing.
    assert bad <= {("out.2", "gradient")}


def test_a_config_survives_json_and_attention_is_never_dropped_silently():
    assert UNetConfig(**json.loads(json.dumps(SMALL.__dict__))) == SMALL
    with pytest.raises(ValueError, match=r"attention_resolutions is \(8,\).*\[1, 2\]"):
        replace(SMALL, attention_resolutions=(8,))
