"""vq.py against the reference's golden numbers, brute force and finite reasoning."""
import json

import numpy as np
import pytest
import torch
from conftest import GOLDEN, golden_weights, relative_error

import vq
from vq import VectorQuantizer, VQConfig, VQModel

TINY = VQConfig(ch=32, num_res_blocks=1, n_embed=64, resolution=32)                    # golden/tiny_f4/config.json
TOY = VQConfig(ch=8, n_embed=32, resolution=16, norm_groups=0, zero_init=True, ema_codebook=True)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    assert relative_error(a, b) <= 1e-4


def test_names_and_shapes_are_those_of_the_published_checkpoint():
    with torch.device("meta"):
        model = VQModel(VQConfig())
    published = json.loads((GOLDEN / "danbooru_vq_f4_state_dict.json").read_text())
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == {
        k: shape for k, (shape, _) in published.items() if not k.startswith("loss.")}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_encode_quantize_decode_equal_the_reference(layout, golden):
    model = VQModel(TINY).eval()
    golden_weights("first_stage_model.", model)
    model.to(memory_format=layout)
    with torch.no_grad():
        h = model.encode(golden["vq/image"])
        close(h, golden["vq/prequant"])
        z_q, loss, indices = model.quantize(h)
        assert torch.equal(indices.flatten(), golden["vq/indices"].flatten().long())
        close(z_q, golden["vq/quant"])
        close(loss, golden["vq/codebook_loss"])
        close(model.decode(h), golden["vq/decode"])
        close(model.decode_code(indices), golden["vq/decode"])
        close(model(golden["vq/image"])[0], golden["vq/decode"])


def test_codebook_loss_gradients_put_beta_on_the_commitment_term(golden):
    model = VQModel(TINY).eval()
    golden_weights("first_stage_model.", model)
    h = golden["vq/prequant"].clone().requires_grad_()
    model.quantize(h)[1].backward()
    close(h.grad, golden["vq/grad_prequant_fixed"])
    close(model.quantize.embedding.weight.grad, golden["vq/grad_codebook_fixed"])


@pytest.mark.parametrize("at_once", [1, 1000, 2 ** 24])
def test_nearest_code_equals_brute_force_in_any_chunks(monkeypatch, at_once):
    monkeypatch.setattr(vq, "DISTANCES_AT_ONCE", at_once)
    torch.manual_seed(0)
    quantizer = VectorQuantizer(50, 3)
    quantizer.embedding.weight.data.normal_()
    h = torch.randn(2, 3, 4, 5)
    z_q, _, indices = quantizer(h)
    codes = quantizer.embedding.weight.double()
    for b in range(2):
        for i in range(4):
            for j in range(5):
                k = (codes - h[b, :, i, j].double()).square().sum(1).argmin()
                assert indices[b, i, j] == k
                torch.testing.assert_close(z_q[b, :, i, j].double(), codes[k], atol=1e-6, rtol=0)


def test_the_gradient_passes_straight_through_the_codes():
    quantizer = VectorQuantizer(50, 3)
    h = torch.randn(2, 3, 4, 4, requires_grad=True)
    weight = torch.randn(2, 3, 4, 4)
    (quantizer(h)[0] * weight).sum().backward()
    assert torch.equal(h.grad, weight) and quantizer.embedding.weight.grad is None


def test_the_quantiser_is_float32_under_autocast():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(8192, 3)
    quantizer.embedding.weight.data.normal_()
    h = torch.randn(1, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        z_q, loss, indices = quantizer(h)
    assert z_q.dtype == loss.dtype == torch.float32
    assert torch.equal(indices, quantizer(h)[2])


def test_codes_drawn_from_encoder_outputs_are_encoder_outputs():
    """The reference's start reaches 72 of 8192 codes; codes drawn from the outputs are all used by them."""
    torch.manual_seed(0)
    h = torch.randn(8, 3, 16, 16)
    quantizer = VectorQuantizer(2048, 3)
    assert len(quantizer(h)[2].unique()) < 200
    quantizer.init_codes(h)
    assert len(quantizer(h)[2].unique()) > 2040         # float32 may confuse near twins
    flat = h.permute(0, 2, 3, 1).reshape(-1, 3)
    exact = torch.cdist(quantizer.embedding.weight.data, flat, compute_mode="donot_use_mm_for_euclid_dist")
    assert exact.amin(1).max() == 0
    few = VectorQuantizer(64, 3)
    few.init_codes(h[:1, :, :4, :4])                                                    # 16 vectors for 64 codes
    assert len(few.embedding.weight.unique(dim=0)) == 64


def test_ema_codes_become_the_means_of_what_they_code():
    """With fixed vectors the moving average converges to the k-means centre, whatever the start."""
    torch.manual_seed(0)
    quantizer = VectorQuantizer(2, 2, ema=True)
    quantizer.embedding.weight.data.copy_(torch.tensor([[-3.0, 0.0], [3.0, 0.5]]))
    h = torch.randn(1, 2, 8, 8) * 0.1
    h[:, 0, :, :4] -= 2
    h[:, 0, :, 4:] += 2
    for _ in range(800):
        quantizer.update(h, quantizer(h)[2])
    centres = torch.stack([h[0, :, :, :4].mean((1, 2)), h[0, :, :, 4:].mean((1, 2))])
    torch.testing.assert_close(quantizer.embedding.weight.data, centres, atol=1e-4, rtol=0)


@pytest.mark.parametrize("ema", [False, True])
def test_dead_codes_are_restarted_and_live_ones_are_not(ema):
    torch.manual_seed(0)
    quantizer = VectorQuantizer(16, 3, ema=ema)
    h = torch.randn(1, 3, 32, 32)
    quantizer.init_codes(h)
    quantizer.embedding.weight.data[:4] = 1000.0                                        # never nearest to anything
    before = quantizer.embedding.weight.data.clone()
    restarted = sum(quantizer.update(h, quantizer(h)[2]) for _ in range(400))
    assert restarted == 4
    assert quantizer.embedding.weight.data[:4].abs().max() < 10
    if not ema:
        assert torch.equal(quantizer.embedding.weight.data[4:], before[4:])
    assert len(quantizer(h)[2].unique()) == 16


def test_the_norm_free_preset_starts_as_a_nearly_linear_map():
    """Zero-initialised branches: at the start every residual block is its shortcut."""
    torch.manual_seed(0)
    model = VQModel(TOY)
    block = model.encoder.down[0].block[0]
    x = torch.randn(1, 8, 16, 16)
    assert torch.equal(block(x), x)
    assert not any("norm" in name for name in model.state_dict())
    assert model.encode(torch.randn(1, 3, 16, 24)).shape == (1, 3, 4, 6)


def test_bf16_is_within_two_percent(golden):
    torch.manual_seed(0)
    model = VQModel(TINY).eval().to(memory_format=torch.channels_last)
    golden_weights("first_stage_model.", model)
    x = golden["vq/image"]
    with torch.no_grad():
        h = model.encode(x)
        z_q = model.quantize(h)[0]
        plain = model.decode_raw(z_q)
        with torch.autocast("cpu", torch.bfloat16):
            assert (model.encode(x) - h).norm() < 2e-2 * h.norm()
            assert (model.decode_raw(z_q) - plain).norm() < 2e-2 * plain.norm()


@pytest.mark.parametrize("shape", [(1, 3, 30, 32), (1, 4, 32, 32), (3, 32, 32)])
def test_a_wrong_picture_size_is_one_sentence(shape):
    with pytest.raises(ValueError, match="multiples of 4"):
        VQModel(TOY).encode(torch.zeros(shape))


def test_a_width_that_the_norm_cannot_group_is_refused():
    with pytest.raises(ValueError, match="multiples of norm_groups"):
        VQConfig(ch=40)
    assert np.isclose(VQConfig(ch_mult=(1, 2)).factor, 2)
