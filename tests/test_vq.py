"""vq.py against the reference's golden numbers, brute force and finite reasoning."""
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, golden_weights, relative_error

import data
import train
import vq
from dataset.figures import Figures
from metrics.keypoint_detector import DetectorDistance, KeypointDetector
from metrics.lpips import LPIPS
from vq import VectorQuantizer, VQConfig, VQModel

TINY = VQConfig(ch=32, num_res_blocks=1, n_embed=64, resolution=32)     # golden/tiny_f4/config.json
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
        close(model.decode_raw(model.quantize.lookup(indices)), golden["vq/decode"])
        close(model(golden["vq/image"])[0], golden["vq/decode"])


@pytest.mark.parametrize("config", [TINY, TOY])
def test_a_new_autoencoder_with_a_shortcut_scales_down_and_up(config):
    torch.manual_seed(0)
    model, x = VQModel(replace(config, shortcut=True)), torch.randn(2, 3, 32, 16)
    x_hat = model.reconstruct(x, quantize=False)[-1]
    assert torch.equal(x_hat, F.interpolate(F.avg_pool2d(x, 4), scale_factor=4, mode="bicubic"))
    x_hat.square().mean().backward()
    assert model.decoder.conv_out.weight.grad.abs().max() > 0   # and it can learn what is missing


def test_codebook_loss_gradients_put_beta_on_the_commitment_term(golden):
    quantizer = golden_weights("first_stage_model.quantize.", VectorQuantizer(64, 3))
    h = golden["vq/prequant"].clone().requires_grad_()
    loss = quantizer(h)[1]
    loss.backward()
    close(loss.detach(), golden["vq/codebook_loss"])
    close(loss.detach(), golden["vq/codebook_loss_legacy"])     # only its gradients differ
    close(h.grad, golden["vq/grad_prequant_fixed"])
    close(quantizer.embedding.weight.grad, golden["vq/grad_codebook_fixed"])


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
    """The reference's start reaches 72 of 8192 codes; drawn codes are all used."""
    torch.manual_seed(0)
    h = torch.randn(8, 3, 16, 16)
    quantizer = VectorQuantizer(2048, 3)
    assert len(quantizer(h)[2].unique()) < 200
    quantizer.init_codes(h)
    assert len(quantizer(h)[2].unique()) > 2040         # float32 may confuse near twins
    flat, codes = h.permute(0, 2, 3, 1).flatten(0, 2), quantizer.embedding.weight
    assert (codes[:, None] == flat).all(-1).any(1).all()
    few = VectorQuantizer(64, 3)
    few.init_codes(h[:1, :, :4, :4])                                    # 16 vectors for 64 codes
    assert len(few.embedding.weight.unique(dim=0)) == 64


def test_ema_codes_become_the_means_of_what_they_code():
    """With fixed vectors the moving average converges to the k-means centre, whatever the start."""
    torch.manual_seed(0)
    quantizer = VectorQuantizer(2, 2, ema=True)
    quantizer.embedding.weight.data.copy_(torch.tensor([[-3.0, 0.0], [3.0, 0.5]]))
    h = torch.randn(1, 2, 8, 8) * 0.1
    h[:, 0, :, :4] -= 2
    h[:, 0, :, 4:] += 2
    for _ in range(600):
        quantizer.update(h, quantizer(h)[2])
    centres = torch.stack([h[0, :, :, :4].mean((1, 2)), h[0, :, :, 4:].mean((1, 2))])
    torch.testing.assert_close(quantizer.embedding.weight.data, centres, atol=1e-4, rtol=0)


@pytest.mark.parametrize("ema", [False, True])
def test_dead_codes_are_restarted_and_live_ones_are_not(ema):
    torch.manual_seed(0)
    quantizer = VectorQuantizer(16, 3, ema=ema)
    h = torch.randn(1, 3, 32, 32)
    quantizer.init_codes(h)
    quantizer.embedding.weight.data[:4] = 1000.0                        # never the nearest
    before = quantizer.embedding.weight.data.clone()
    restarted = sum(quantizer.update(h, quantizer(h)[2]) for _ in range(200))
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


def test_a_config_survives_json_and_attention_is_never_dropped_silently():
    assert VQConfig(ch_mult=[1, 2, 4]) == VQConfig() and VQConfig(ch_mult=(1, 2)).factor == 2
    with pytest.raises(ValueError, match=r"attn_resolutions is \(7,\); .*\[256, 128, 64\]"):
        VQConfig(attn_resolutions=(7,))


def test_a_moving_average_leaves_a_code_that_nobody_uses_where_it_is():
    quantizer = VectorQuantizer(2, 3, ema=True)
    quantizer.embedding.weight.data = torch.tensor([[0.0, 0, 0], [50, 50, 50]])
    h = torch.randn(1, 3, 4, 4)
    for _ in range(600):
        quantizer.update(h, quantizer(h)[2], restart=False)
    wanted = torch.stack([h.mean((0, 2, 3)), torch.full((3,), 50.0)])
    torch.testing.assert_close(quantizer.embedding.weight, wanted)


# ---- the objective

@pytest.fixture(scope="module")
def lpips() -> LPIPS:
    return golden_weights("loss.perceptual_loss.", LPIPS())


def test_loss_modules_have_the_names_and_shapes_of_the_published_checkpoint(lpips):
    loss = vq.VQLoss(vq.VQLossConfig(perceptual=1, disc_weight=0.75), lpips)
    published = json.loads((GOLDEN / "danbooru_vq_f4_state_dict.json").read_text())
    wanted = {k: shape for k, (shape, _) in published.items() if k.startswith("loss.")}
    assert wanted == {"loss." + k.replace("disc.main", "discriminator.main"): list(v.shape)
                      for k, v in loss.state_dict().items()}


def test_lpips_equals_the_reference_and_is_a_distance(lpips, golden):
    x, y = golden["gan/image"], golden["gan/reconstruction"]
    with torch.no_grad():
        close(lpips(x, y), golden["lpips/distance"])
        close(lpips(y, x), lpips(x, y))
        assert lpips(x, x).abs().max() == 0


def test_one_generator_and_one_discriminator_step_equal_the_reference(lpips, golden):
    """gan/reconstruction is a convolution of gan/features with gan/last_layer."""
    loss = vq.VQLoss(vq.VQLossConfig(perceptual=1, disc_weight=0.75), lpips)
    golden_weights("loss.discriminator.", loss.disc).train()
    last_layer = golden["gan/last_layer"].clone().requires_grad_()
    x, x_hat = golden["gan/image"], F.conv2d(golden["gan/features"], last_layer, padding=1)
    close(x_hat.detach(), golden["gan/reconstruction"])
    total, parts = loss.generator(x, x_hat, torch.tensor(0.1), last_layer, 1.0)
    close(total.detach(), golden["gan/gen_total_loss"])
    close(parts["lpips"], golden["gan/gen_p_loss"])
    nll = parts["l1"] + parts["lpips"]
    close(nll, golden["gan/gen_nll_loss"])
    close(nll, golden["gan/gen_rec_loss"])                      # one number by two names there
    close(total.detach() - parts["d_weight"] * parts["g"] - nll, golden["gan/gen_quant_loss"])
    assert loss.disc_factor(0, 1000) == golden["gan/gen_disc_factor"]
    close(parts["g"], golden["gan/gen_g_loss"])
    close(parts["d_weight"], golden["gan/gen_d_weight"])
    d_loss, logits = loss.discriminator(x, x_hat)
    close(d_loss.detach(), golden["gan/disc_disc_loss"])
    close(logits["logits_real"], golden["gan/disc_logits_real"])
    close(logits["logits_fake"], golden["gan/disc_logits_fake"])


def adversarial(**config) -> tuple[vq.VQLoss, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, last layer, x, x_hat made by that layer)"""
    torch.manual_seed(0)
    loss = vq.VQLoss(vq.VQLossConfig(disc_weight=1, **config))
    last_layer = (0.1 * torch.randn(3, 3, 3, 3)).requires_grad_()
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    return loss, last_layer, x, F.conv2d(torch.randn(2, 3, 64, 64), last_layer, padding=1)


def test_the_two_players_leave_no_gradient_on_each_other():
    loss, last_layer, x, x_hat = adversarial()
    total, _ = loss.generator(x, x_hat, 0.0, last_layer, 1.0)
    total.backward(retain_graph=True)
    assert last_layer.grad.abs().max() > 0
    assert all(p.grad is None for p in loss.disc.parameters())
    before = last_layer.grad.clone()
    loss.discriminator(x, x_hat)[0].backward()
    assert torch.equal(last_layer.grad, before)
    assert all(p.grad is not None for p in loss.disc.parameters())


def test_the_adaptive_weight_makes_both_gradients_equally_long_and_is_capped():
    loss, last_layer, x, x_hat = adversarial()
    _, parts = loss.generator(x, x_hat, 0.0, last_layer, 1.0)
    nll_grad = torch.autograd.grad((x - x_hat).abs().mean(), last_layer, retain_graph=True)[0]
    g_grad = torch.autograd.grad(-loss.disc(x_hat).mean(), last_layer)[0]
    torch.testing.assert_close(parts["d_weight"], nll_grad.norm() / (g_grad.norm() + 1e-4))
    assert parts["d_weight"] > 0.1
    capped, last_layer, x, x_hat = adversarial(disc_cap=0.1)
    _, parts = capped.generator(x, x_hat, 0.0, last_layer, 1.0)
    assert parts["d_weight"] == pytest.approx(0.1)


def test_before_its_start_the_discriminator_costs_nothing(monkeypatch):
    loss, last_layer, x, x_hat = adversarial()
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: pytest.fail("a backward pass"))
    monkeypatch.setattr(loss.disc, "forward", lambda x: pytest.fail("a forward pass"))
    total, parts = loss.generator(x, x_hat, torch.tensor(0.5), last_layer, 0.0)
    torch.testing.assert_close(total, parts["l1"] + 0.5)
    assert set(parts) == {"l1"}


@pytest.mark.parametrize("start, ramp, steps, at", [
    (100, 0, 9000, {99: 0, 100: 1}),
    (100, 50, 9000, {99: 0, 100: 0.02, 124: 0.5, 149: 1, 5000: 1}),
    (0.25, 0.1, 1000, {249: 0, 250: 0.01, 299: 0.5, 349: 1}),
    (0, 0, 9000, {0: 1}),
])
def test_the_discriminator_starts_at_a_step_or_a_share_and_ramps_up(start, ramp, steps, at):
    loss = vq.VQLoss(vq.VQLossConfig(disc_weight=1, disc_start=start, disc_ramp=ramp))
    assert {step: loss.disc_factor(step, steps) for step in at} == pytest.approx(at)
    assert vq.VQLoss(vq.VQLossConfig(disc_start=start)).disc_factor(8999, steps) == 0   # none


def test_losses_and_adaptive_weight_are_float32_under_autocast():
    """The same numbers with autocast on; in bf16 they would differ in the third digit."""
    torch.manual_seed(0)
    model = VQModel(VQConfig(ch=8, n_embed=32, resolution=16, norm_groups=0))
    loss, x = vq.VQLoss(vq.VQLossConfig(disc_weight=1)), torch.rand(2, 3, 64, 64) * 2 - 1
    features = model.decoder.features(torch.randn(2, 3, 16, 16)).detach()
    model.decoder.features = lambda z, checkpointing: features
    got = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            x_hat = model.decoder(None)
            total, parts = loss.generator(x, x_hat, 0.0, model.decoder.conv_out.weight, 1.0)
        assert x_hat.dtype == total.dtype == torch.float32
        got.append(torch.stack([parts["d_weight"], total.detach()]))
    torch.testing.assert_close(*got, rtol=1e-6, atol=0)


def test_the_discriminator_and_lpips_compute_in_float32_under_autocast(lpips):
    loss, last_layer, x, x_hat = adversarial(perceptual=1.0)
    loss.perceptual_loss, seen = lpips, []
    for module in (loss.disc.main[0], lpips.net.slice1[0]):
        module.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss.generator(x, x_hat, 0.0, last_layer, 1.0)
        loss.discriminator(x, x_hat)
    assert len(seen) == 5 and set(seen) == {torch.float32}


def test_codes_are_drawn_from_what_is_finite():
    """One NaN among the encoder outputs would become the code that is nearest to everything."""
    torch.manual_seed(0)
    h = torch.randn(1, 3, 8, 8)
    h[0, 1, 2, 3] = math.nan
    for K in (64, 128):                                 # as many codes as vectors, and more
        quantizer = VectorQuantizer(K, 3)
        quantizer.init_codes(h)
        codes = quantizer.embedding.weight
        assert codes.isfinite().all() and codes.abs().max() > 1
    quantizer.init_codes(torch.full_like(h, math.nan))
    assert quantizer.embedding.weight.isfinite().all()


def test_every_golden_number_is_looked_at():
    """Some are reached through their parts: total losses, tables by formatted names."""
    tests = "".join(path.read_text() for path in (GOLDEN.parent).glob("test_*.py"))
    with np.load(GOLDEN / "tiny_f4" / "tensors.npz") as arrays:
        keys = set(arrays.files)
    formatted = "schedule/", "ddim/", "vq/grad_", "unet/out"
    assert [k for k in sorted(keys) if not k.startswith(formatted) and f'"{k}"' not in tests] == []


def test_the_detector_distance_is_its_formula_and_the_shipped_features_see_more_than_l1():
    torch.manual_seed(0)
    detector = KeypointDetector(64, (4, 8, 8, 8)).eval()
    distance, (x, y) = DetectorDistance(detector, 1), torch.rand(2, 3, 3, 64, 64) * 2 - 1
    wanted = torch.zeros(3)
    a, b = detector.stem(x), detector.stem(y)
    for p, q in (a, b), (detector.down[0](a), detector.down[0](b)):
        unit = [m / (m.norm(dim=1, keepdim=True) + 1e-3) for m in (p, q)]
        wanted += (unit[0] - unit[1]).square().sum(1).mean((1, 2)) / 2
    torch.testing.assert_close(distance(x, y), wanted)

    c = train.make_config(train.parse_args(["--stage", "vq"]))
    shipped = train.load_distances(c)["detector"].eval()
    x = data.to_tensor(np.stack([Figures(8, 64)[i][0] for i in range(8)]))
    blurred = F.interpolate(F.avg_pool2d(x, 4), scale_factor=4, mode="bicubic")
    darker = x - (x - blurred).abs().mean((1, 2, 3), keepdim=True)      # as far in L1
    assert (shipped(x, x) == 0).all() and (shipped(x, blurred) > 2 * shipped(x, darker)).all()
