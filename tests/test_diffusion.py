"""diffusion.py against closed forms on Gaussian data, and the reference's numbers."""
import copy
import functools
import json

import numpy as np
import pytest
import torch
from conftest import golden_weights, relative_error
from torch import Tensor

import sample
from diffusion import (
    Diffusion,
    ddim,
    ddim_table,
    ddpm,
    dpm_solver,
    guided,
    log_snr,
    per_image_noise,
    slerp,
    timesteps_of,
)
from extras.plan import read_poses
from keypoints import JOINTS, ConditionConfig
from ldm import LDM
from unet import UNet, UNetConfig
from vq import VQConfig, VQModel

S_DATA = 0.5      # standard deviation of the Gaussian data
X0_ATOL = 5e-5    # predicting x0 at T divides float32's rounding by sqrt(alpha_bar) = 0.01


@pytest.fixture(scope="module")
def diffusion() -> Diffusion:
    return Diffusion()


@pytest.fixture(scope="module")
def tiny_model(golden_config):
    """The golden UNet as an eps_model(x, t, cond, drop); its null condition is all zeros."""
    fields = {name: value for name, value in golden_config["unet"].items()
              if name in UNetConfig.__dataclass_fields__}
    unet = golden_weights("model.diffusion_model.", UNet(UNetConfig(**fields)))
    return lambda x, t, cond, drop: unet(x, t, cond.masked_fill(drop[:, None, None], 0))


def exact_eps(diffusion: Diffusion, s: float):
    """The best possible eps for data N(0, s^2), with ab = alpha_bar:
    E[eps | x_t] = sqrt(1 - ab) x_t / (ab s^2 + 1 - ab)."""
    def eps_fn(x: Tensor, t: Tensor) -> Tensor:
        alpha_bar = diffusion.alphas_bar[t].view(-1, *[1] * (x.ndim - 1))
        return ((1 - alpha_bar).sqrt() / (alpha_bar * s**2 + 1 - alpha_bar)).float() * x
    return eps_fn


def last(steps) -> Tensor:
    *_, step = steps
    return step.x


# ---- schedule

def test_schedule_is_linear_in_sqrt_beta(diffusion):
    root = np.linspace(0.0015**0.5, 0.0195**0.5, 1000)
    np.testing.assert_allclose(diffusion.betas, root**2, rtol=1e-12)
    alphas_bar = np.exp(np.log1p(-root**2).cumsum())
    np.testing.assert_allclose(diffusion.alphas_bar, alphas_bar, rtol=1e-12)


@pytest.mark.parametrize("ours, theirs", [
    ("betas", "betas"), ("alphas_bar", "alphas_cumprod"),
    ("posterior_variance", "posterior_variance"), ("posterior_x0_coef", "posterior_mean_coef1"),
    ("posterior_x_t_coef", "posterior_mean_coef2"),
])
def test_schedule_equals_the_reference(diffusion, golden, ours, theirs):
    np.testing.assert_allclose(getattr(diffusion, ours), golden[f"schedule/{theirs}"], rtol=3e-7)


def test_q_sample_and_predict_x0_are_inverse_and_equal_the_reference(diffusion, golden):
    x0, t, noise = golden["loss/x0"], golden["loss/t"], golden["loss/noise"]
    x_t = diffusion.q_sample(x0, t, noise)
    assert relative_error(x_t, golden["loss/x_t"]) < 1e-6
    assert relative_error(diffusion.predict_x0(x_t, t, noise), x0) < 1e-5


def test_posterior_equals_the_reference(diffusion, golden):
    given = golden["loss/x0"], golden["loss/x_t"], golden["loss/t"]
    mean, log_variance = diffusion.posterior(*given)
    assert relative_error(mean, golden["ddpm/posterior_mean"]) < 1e-6
    wanted = golden["ddpm/posterior_log_variance"]
    torch.testing.assert_close(log_variance, wanted, rtol=1e-6, atol=0)


def test_variational_bound_of_the_reference_is_the_distance_of_our_posteriors(
        diffusion, tiny_model, golden):
    """Its loss/vlb is KL(q(x_{t-1} | x_t, x0) || q(x_{t-1} | x_t, x0_hat)): equal variances."""
    x0, x_t, t = golden["loss/x0"], golden["loss/x_t"], golden["loss/t"]
    with torch.no_grad():
        eps = tiny_model(x_t, t, golden["unet/context"], torch.zeros(2, dtype=torch.bool))
    mean, log_variance = diffusion.posterior(x0, x_t, t)
    mean_hat, _ = diffusion.posterior(diffusion.predict_x0(x_t, t, eps), x_t, t)
    kl = (mean - mean_hat).square() / (2 * log_variance.exp())
    assert kl.mean().item() == pytest.approx(golden["loss/vlb"].item(), rel=1e-4)
    weights = diffusion.betas**2 / (2 * diffusion.posterior_variance * (1 - diffusion.betas)
                                    * (1 - diffusion.alphas_bar))
    np.testing.assert_allclose(weights[1:], golden["schedule/lvlb_weights"][1:], rtol=1e-5)


def test_posterior_equals_bayes_rule(diffusion):
    """q(x_{t-1} | x_t, x0) is the product of N(x_{t-1}; sqrt(ab') x0, 1 - ab') and
    N(x_t; sqrt(1 - beta) x_{t-1}, beta), up to a factor."""
    x0, x_t = torch.tensor([[0.3]]), torch.tensor([[-1.1]])
    for t in (1, 500, 999):
        ab, beta = diffusion.alphas_bar[t - 1].item(), diffusion.betas[t].item()
        precision = 1 / (1 - ab) + (1 - beta) / beta
        mean = (ab**0.5 * 0.3 / (1 - ab) + (1 - beta) ** 0.5 * -1.1 / beta) / precision
        got, log_variance = diffusion.posterior(x0, x_t, torch.tensor([t]))
        assert got.item() == pytest.approx(mean, rel=1e-5)
        assert log_variance.exp().item() == pytest.approx(1 / precision, rel=1e-5)
    mean, log_variance = diffusion.posterior(x0, x_t, torch.tensor([0]))    # its variance is 0
    assert mean.item() == pytest.approx(0.3) and log_variance.isfinite().all()


# ---- loss

def test_loss_equals_the_reference(diffusion, golden, tiny_model):
    given = [golden[key] for key in ("loss/x0", "unet/context", "loss/t", "loss/noise")]
    with torch.no_grad():
        loss = diffusion.loss(tiny_model, *given, torch.zeros(2, dtype=torch.bool))
    assert loss.shape == (2,)
    assert loss.mean().item() == pytest.approx(golden["loss/eps_mse"].item(), rel=1e-5)


def test_loss_is_per_sample_and_float32_under_autocast(diffusion):
    x0, noise, cond = torch.zeros(3, 2, 4, 4), torch.ones(3, 2, 4, 4), torch.rand(3, 17, 3)
    t, drop = torch.tensor([0, 7, 999]), torch.tensor([True, False, True])

    def model(x, t_, cond_, drop_):
        assert torch.equal(t_, t) and torch.equal(cond_, cond) and torch.equal(drop_, drop)
        return (torch.tensor([1.0, 2, 4])[:, None, None, None] * torch.ones_like(x)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = diffusion.loss(model, x0, cond, t, noise, drop)
    assert loss.dtype == torch.float32 and loss.tolist() == [0, 1, 9]


def test_the_exact_eps_reaches_the_least_possible_loss(diffusion):
    """For data N(0, s^2) the loss cannot fall below ab s^2 / (ab s^2 + 1 - ab)."""
    torch.manual_seed(0)
    eps_fn, none = exact_eps(diffusion, S_DATA), torch.zeros(64)
    for t in (50, 300, 900):
        signal = diffusion.alphas_bar[t].item() * S_DATA**2
        x0, noise = S_DATA * torch.randn(64, 4096), torch.randn(64, 4096)
        loss = diffusion.loss(lambda x, t, c, drop: eps_fn(x, t), x0, none,
                              torch.full((64,), t), noise, none)
        least = signal / (signal + 1 - diffusion.alphas_bar[t].item())
        assert loss.mean().item() == pytest.approx(least, rel=0.02)


def test_v_prediction_says_the_same_as_eps():
    """Back to eps and to x0 by identities that are not in the code."""
    torch.manual_seed(0)
    d, t = Diffusion(prediction="v"), torch.tensor([0, 400, 999])
    x0, noise = torch.randn(2, 3, 4, 5).unbind()
    x_t, v = d.q_sample(x0, t, noise), d.target(x0, t, noise)
    a = d.alphas_bar[t].sqrt().float()[:, None, None]
    torch.testing.assert_close(a * x_t - (1 - a * a).sqrt() * v, x0, rtol=1e-4, atol=1e-4)
    eps = d.eps_model(lambda x, t, cond, drop: v)(x_t, t, None, None)
    torch.testing.assert_close(eps, noise, rtol=1e-4, atol=1e-4)
    off = d.loss(lambda x, t, cond, drop: v + 2, x0, None, t, noise, t < 0)
    torch.testing.assert_close(off, torch.full((3,), 4.0))


def test_timesteps_are_uniform_or_normal_in_lambda(diffusion):
    torch.manual_seed(0)
    t = diffusion.draw_timesteps(40_000)
    assert (t.min(), t.max()) == (0, 999) and t.float().std().item() == pytest.approx(
        1000 / 12 ** 0.5, rel=0.01)
    lambda_ = log_snr(diffusion.alphas_bar.numpy())[diffusion.draw_timesteps(40_000, 0.8)]
    assert lambda_.mean() == pytest.approx(0, abs=0.02)
    assert lambda_.std() == pytest.approx(0.8, rel=0.02)
    ends = diffusion.draw_timesteps(1000, 50.0)                 # nearly all beyond the schedule
    assert ((ends == 0) | (ends == 999)).float().mean() > 0.9


# ---- timesteps and tables

ALPHAS_BAR = Diffusion().alphas_bar.numpy()


def test_even_spacing_gives_every_number_of_steps():
    for steps in range(1, 1001):
        timesteps = timesteps_of(ALPHAS_BAR, steps)
        assert len(timesteps) == steps and timesteps[-1] == 999
        assert (np.diff(timesteps) > 0).all()
        if steps > 1:
            assert timesteps[0] == 0 and np.ptp(np.diff(timesteps)) <= 1


def test_uniform_spacing_fails_where_the_reference_does():
    overruns = 0
    for steps in range(1, 1001):
        try:
            timesteps_of(ALPHAS_BAR, steps, "uniform")
        except ValueError:
            overruns += 1
    assert overruns == 599
    assert len(timesteps_of(ALPHAS_BAR, 350, "uniform")) == 500


def test_lambda_spacing_gives_every_number_of_steps_as_evenly_as_integers_allow():
    lambda_ = log_snr(ALPHAS_BAR)
    np.testing.assert_allclose(np.exp(2 * lambda_), ALPHAS_BAR / (1 - ALPHAS_BAR))
    one = -np.diff(lambda_)                                         # of each timestep
    for steps in (1, 2, 3, 5, 10, 20, 50, 100, 333, 999, 1000):
        timesteps = timesteps_of(ALPHAS_BAR, steps, "lambda")
        assert len(timesteps) == steps and timesteps[-1] == 999
        assert steps == 1 or timesteps[0] == 0
        assert (np.diff(timesteps) > 0).all()
        h = (lambda_[0] - lambda_[-1]) / max(steps - 1, 1)
        for t, dt in zip(timesteps[1:], np.diff(timesteps), strict=True):
            assert dt == 1 or lambda_[t - dt] - lambda_[t] < h + one[t - 1] + one[t - dt]


@pytest.mark.parametrize("eta", [0, 1])
@pytest.mark.parametrize("steps", [50, 200, 500])
def test_ddim_tables_equal_the_reference(diffusion, golden, steps, eta):
    timesteps, alpha_bar, alpha_bar_prev, sigma = ddim_table(diffusion, steps, eta, "uniform")
    assert timesteps.tolist() == golden[f"ddim/S{steps}_timesteps"].tolist()
    np.testing.assert_allclose(alpha_bar, golden[f"ddim/S{steps}_alphas"], rtol=3e-7)
    np.testing.assert_allclose(alpha_bar_prev, golden[f"ddim/S{steps}_alphas_prev"], rtol=3e-7)
    np.testing.assert_allclose(sigma, golden[f"ddim/S{steps}_eta{eta}_sigmas"], rtol=1e-4)


# ---- samplers

@pytest.mark.parametrize("key, steps, w", [
    ("eta0_steps10", 10, 1), ("eta0_steps20", 20, 1), ("eta0_steps10_cfg3", 10, 3),
])
def test_ddim_trajectories_equal_the_reference(diffusion, golden, tiny_model, key, steps, w):
    eps_fn = guided(tiny_model, golden["unet/context"], w)
    run = list(ddim(diffusion, eps_fn, golden["ddim/x_T"], steps, spacing="uniform"))
    assert [step.t for step in run] == golden[f"ddim/timesteps{steps}"].tolist()[::-1]
    assert relative_error(run[-1].x, golden[f"ddim/{key}"]) < 1e-4


@pytest.mark.parametrize("steps", [1, 7, 333])
def test_ddim_on_gaussian_data_is_the_known_linear_map(diffusion, steps):
    """With the exact eps each step multiplies x by
    (sqrt(ab' ab) s^2 + sqrt((1 - ab')(1 - ab))) / (ab s^2 + 1 - ab)."""
    timesteps = [round(i * 999 / (steps - 1)) for i in range(steps)] if steps > 1 else [999]
    ab, v = ALPHAS_BAR[timesteps], S_DATA**2
    ab_prev = np.array([1.0, *ab[:-1]])
    factors = (np.sqrt(ab_prev * ab) * v + np.sqrt((1 - ab_prev) * (1 - ab))) / (ab * v + 1 - ab)
    x_T = torch.tensor([[1.0, -0.5]])
    x = last(ddim(diffusion, exact_eps(diffusion, S_DATA), x_T, steps))
    torch.testing.assert_close(x, float(factors.prod()) * x_T, rtol=1e-4, atol=X0_ATOL)


def fine_schedule(s: float, steps: int, order: int) -> float:
    """The relative error of a sampler on N(0, s^2), where rounding to timesteps does not matter."""
    diffusion = Diffusion(200_000, 0.0015 / 200, 0.0195 / 200)
    first, last_ = diffusion.alphas_bar[0].item(), diffusion.alphas_bar[-1].item()
    v_0, v_T = (ab * s**2 + 1 - ab for ab in (first, last_))
    # The flow keeps quantiles down to t = 0, and the last step is the posterior mean there.
    wanted = (v_0 / v_T) ** 0.5 * first**0.5 * s**2 / v_0
    sampler = ddim if order == 1 else dpm_solver
    eps_fn, x_T = exact_eps(diffusion, s), torch.ones(1, 1)
    return abs(last(sampler(diffusion, eps_fn, x_T, steps, spacing="lambda")).item() / wanted - 1)


@pytest.mark.parametrize("s", [0.5, 2.0])
@pytest.mark.parametrize("order", [1, 2])
def test_the_error_falls_with_the_order_of_the_sampler(s, order):
    """Twice the steps halve the error of DDIM and quarter that of DPM-Solver++(2M)."""
    errors = np.array([fine_schedule(s, steps, order) for steps in (40, 80, 160)])
    measured = np.log2(errors[:-1] / errors[1:])
    assert np.abs(measured - order).max() < 0.15, (errors, measured)


def toy_eps(x: Tensor, t: Tensor) -> Tensor:
    """An eps that is not linear in x, so that the order of steps shows."""
    return x.tanh() + 0.1 * x + 0.2 * (t.view(-1, *[1] * (x.ndim - 1)) / 100).sin()


@pytest.mark.parametrize("spacing", ["lambda", "even"])
@pytest.mark.parametrize("steps", [1, 2, 3, 17])
def test_dpm_solver_is_algorithm_2_of_its_paper(diffusion, steps, spacing):
    """x_i = sigma_i / sigma_{i-1} x_{i-1} - alpha_i (exp(-h_i) - 1) D_i with r = h_{i-1} / h_i and
    D_i = (1 + 1 / 2r) x0_{i-1} - 1 / 2r x0_{i-2}."""
    timesteps = ddim_table(diffusion, steps, 0, spacing)[0][::-1].copy()
    x = x_T = torch.tensor([[1.0, -0.5]], dtype=torch.float64)
    x0s, lambdas, sigmas = [], [], []
    for i, t in enumerate(timesteps):
        ab = diffusion.alphas_bar[t].item()
        alpha, sigma = ab**0.5, (1 - ab) ** 0.5
        lambdas.append(np.log(alpha / sigma))
        sigmas.append(sigma)
        if i:
            h, D = lambdas[i] - lambdas[i - 1], x0s[-1]
            if i > 1:
                r = (lambdas[i - 1] - lambdas[i - 2]) / h
                D = (1 + 1 / (2 * r)) * x0s[-1] - 1 / (2 * r) * x0s[-2]
            x = sigma / sigmas[i - 1] * x - alpha * (np.exp(-h) - 1) * D
        x0s.append((x - sigma * toy_eps(x, torch.tensor([t]))) / alpha)
    got = list(dpm_solver(diffusion, toy_eps, x_T.float(), steps, spacing=spacing))
    assert [step.t for step in got] == timesteps.tolist()
    for step, x0 in zip(got, x0s, strict=True):
        assert relative_error(step.x0, x0) < 1e-4
    assert torch.equal(got[-1].x, got[-1].x0)


@pytest.mark.parametrize("s", [0.5, 2.0])
@pytest.mark.parametrize("sampler, how", [
    (ddpm, ()), (ddim, (500, 1.0)), (ddim, (500, 0.5)), (dpm_solver, (100, 1.0)),
    (dpm_solver, (100, 0.5))])
def test_samples_have_the_variance_of_the_data(diffusion, sampler, how, s):
    g = torch.Generator().manual_seed(1)
    x_T = torch.randn(1, 20_000, generator=g)

    def noise_fn(i: int, x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=g)
    x = last(sampler(diffusion, exact_eps(diffusion, s), x_T, *how, noise_fn))
    # Monte-Carlo error: 1 / sqrt(2 n) = 0.5 %; the rest is the size of the steps.
    assert x.std().item() == pytest.approx(s, rel=0.025)


def test_ddim_with_all_steps_and_eta_1_is_ddpm():
    diffusion = Diffusion(100, 0.015, 0.195)
    x_T, noise_fn = per_image_noise([3, 4], (2, 4))
    eps_fn = exact_eps(diffusion, S_DATA)
    a = ddpm(diffusion, eps_fn, x_T, noise_fn)
    b = ddim(diffusion, eps_fn, x_T, 100, 1.0, noise_fn)
    for p, q in zip(a, b, strict=True):
        assert (p.i, p.n, p.t) == (q.i, q.n, q.t)
        torch.testing.assert_close(p.x, q.x, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("sampler", [ddim, dpm_solver])
@pytest.mark.parametrize("steps", [1, 2, 350])
def test_steps_count_and_end_at_the_predicted_x0(diffusion, steps, sampler):
    run = list(sampler(diffusion, exact_eps(diffusion, S_DATA), torch.ones(1, 3), steps))
    assert [(step.i, step.n) for step in run] == [(i, steps) for i in range(steps)]
    assert run[0].t == 999 and torch.equal(run[-1].x, run[-1].x0)


def test_samplers_run_in_float32_without_gradients():
    weight, x_T, d = torch.ones(1, requires_grad=True), torch.ones(1, 3).bfloat16(), Diffusion(4)

    def eps_fn(x: Tensor, t: Tensor) -> Tensor:
        return (x * weight).bfloat16()
    for sampler in (ddim(d, eps_fn, x_T, 3), dpm_solver(d, eps_fn, x_T, 4),
                    ddpm(d, eps_fn, x_T, lambda i, x: x)):
        for step in sampler:
            assert step.x.dtype == step.x0.dtype == torch.float32 and not step.x.requires_grad
    assert torch.is_grad_enabled()


# ---- guidance

class Counting:
    """An eps_model linear in its condition that counts its calls; the null condition is -3."""

    def __init__(self):
        self.batches = []

    def __call__(self, x, t, cond, drop):
        self.batches.append(len(x))
        assert len(x) == len(t) == len(cond) == len(drop)
        return x * torch.where(drop, -3.0, cond)[:, None] + t[:, None]


@pytest.mark.parametrize("w, batch", [(0, 2), (1, 2), (3.5, 4), (-1.0, 4)])
def test_guidance_is_linear_and_calls_the_network_once(w, batch):
    model, cond = Counting(), torch.tensor([5.0, 7.0])
    x, t = torch.randn(2, 3), torch.tensor([11, 12])
    eps = guided(model, cond, w)(x, t)
    eps_null, eps_cond = x * -3 + t[:, None], x * cond[:, None] + t[:, None]
    torch.testing.assert_close(eps, (1 - w) * eps_null + w * eps_cond)
    assert model.batches == [batch]


# ---- seeds

@pytest.mark.parametrize("sampler", [ddim, dpm_solver])
def test_an_image_depends_on_its_own_seed_alone(diffusion, sampler):
    seeds = [5, 6, 0, 2**31, 6]

    def draw(seeds):
        x_T, noise_fn = per_image_noise(seeds, (3, 4, 4))
        return last(sampler(diffusion, exact_eps(diffusion, S_DATA), x_T, 10, 1.0, noise_fn))

    together = draw(seeds)
    for i, seed in enumerate(seeds):
        assert torch.equal(draw([seed])[0], together[i])
    assert torch.equal(together[1], together[4]) and not torch.equal(together[0], together[1])


def test_noise_is_normal_and_new_in_every_step():
    x_T, noise_fn = per_image_noise([0, 1], (20_000,))
    draws = torch.cat([x_T, *(noise_fn(i, x_T) for i in range(4))])         # [10, n]
    correlation = torch.corrcoef(draws) - torch.eye(10)
    assert correlation.abs().max() < 5 / 20_000**0.5
    assert (draws.var(1) - 1).abs().max() < 5 * (2 / 20_000) ** 0.5
    assert torch.equal(noise_fn(2, x_T), noise_fn(2, x_T))


# ---- a whole model

@functools.cache
def random_ldm(*conditioning: str) -> LDM:
    """A small model, read-only, whose every weight counts: no layer is zero."""
    torch.manual_seed(0)
    cond = ConditionConfig(conditioning, dim=16)
    config = UNetConfig(
        in_channels=3 + cond.map_channels, model_channels=32, num_res_blocks=1,
        channel_mult=(1, 2), attention_resolutions=(2,), num_heads=2, context_dim=cond.context_dim)
    vq = VQModel(VQConfig(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, n_embed=32, resolution=32))
    ldm = LDM(vq, config, cond, torch.zeros(3, 1, 1), torch.ones(3, 1, 1), {"timesteps": 1000},
              supports_guidance=True)
    with torch.no_grad():
        for parameter in ldm.unet.parameters():
            parameter.copy_(torch.randn(parameter.shape) / max(parameter[0].numel(), 10) ** 0.5)
    return ldm.eval().requires_grad_(False)


def random_poses(n: int) -> Tensor:
    poses = torch.rand(n, len(JOINTS), 3, generator=torch.Generator().manual_seed(0))
    poses[..., 2] = (poses[..., 2] > 0.2).float()
    return poses * poses[..., 2:]


CONDITIONINGS = [("maps",), ("tokens",), ("tokens", "maps"), ("seed",)]


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_a_model_of_rows_is_the_model(conditioning):
    ldm, poses, x = random_ldm(*conditioning), random_poses(3), torch.randn(3, 3, 8, 8)
    of_rows = ldm.of_rows(poses, None)
    for w, t in ((0, 900), (1, 100), (3, 900)):
        ts = torch.full((3,), t)
        wanted = guided(ldm, poses, w)(x, ts)
        assert relative_error(guided(*of_rows, w)(x, ts), wanted) < 1e-5
        if w:                                               # the pose counts
            other = guided(ldm, poses[[1, 2, 0]], w)(x, ts)
            assert relative_error(other, wanted) > 1e-3


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_a_network_in_half_precision_draws_nearly_the_same_from_float32_latents(conditioning):
    ldm, poses = copy.deepcopy(random_ldm(*conditioning)), random_poses(2)
    x, ts = torch.randn(2, 3, 8, 8), torch.full((2,), 300)
    wanted = guided(ldm, poses, 3)(x, ts)
    ldm.unet.to(torch.bfloat16)
    for cond in ((ldm, poses), ldm.of_rows(poses, None)):
        eps_fn = guided(*cond, 3)                           # guidance triples the rounding
        assert 1e-4 < relative_error(eps_fn(x, ts), wanted) < 6e-2
    assert last(ddim(Diffusion(), eps_fn, x, 2)).dtype == torch.float32


# float32: the same sums in another order. bf16 keeps 8 bits, and a random network amplifies.
@pytest.mark.parametrize("dtype, tolerance, sampler, eta", [
    (torch.float32, 1e-5, "ddim", 1.0), (torch.bfloat16, 5e-2, "dpm_solver", 0.0)])
def test_an_image_is_the_same_alone_and_among_eight(dtype, tolerance, sampler, eta):
    ldm, poses = random_ldm("tokens", "maps"), random_poses(8)

    def draw(which: list[int]) -> Tensor:
        how = sample.settings(ldm, sampler, 5, eta, 3.0)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return last(sample.sample(ldm, poses[which], [10 + i for i in which], 32, **how))

    together = draw(list(range(8)))
    for i in (0, 7):
        assert relative_error(draw([i])[0], together[i]) < tolerance
    assert relative_error(together[0], together[1]) > 0.3


def test_the_flags_reach_the_sampler(tmp_path, monkeypatch):
    """Each changes the latents as the function behind it does."""
    ldm, pose, seen = copy.deepcopy(random_ldm("maps")), tmp_path / "pose.json", []
    pose.write_text(json.dumps({"people": [{"pose_keypoints_2d": [0.5, 0.5, 1.0] * 18}]}))
    payload = {"config": {"size": 32}, "step": 0}
    monkeypatch.setattr(sample.checkpoint, "load_ldm", lambda *ignored, **more: (ldm, payload))
    monkeypatch.setattr(ldm, "decode", lambda z: seen.append(z) or torch.zeros(len(z), 3, 32, 32))
    command = [str(pose), "-n", "1", "--steps", "4", "--out", str(tmp_path / "x.png"),
               "--device", "cpu", "--eta", "0", "--sampler"]
    poses = torch.from_numpy(np.stack(read_poses([pose])[0])).float()
    how = sample.settings(ldm, "ddim", 4, eta=0.0)
    for flags, wanted in [
        (["dpm_solver"], {"sampler": "dpm_solver"}),
        (["ddim", "--guidance", "1.5"], {"guidance": 1.5}),
        (["ddim", "--eta", "0.5"], {"eta": 0.5}),
    ]:
        assert sample.main([*command, *flags]) == 0
        wanted = last(sample.sample(ldm, poses, [0], 32, **how | wanted))
        assert torch.equal(seen.pop(), wanted), flags


def test_what_is_zero_makes_no_nan():
    zero = torch.zeros(1, 3)
    assert slerp(zero, torch.ones(1, 3), 0.25).tolist() == [[0.25] * 3]


def test_errors_say_what_is_allowed(diffusion):
    x, eps_fn = torch.ones(1, 3), exact_eps(diffusion, S_DATA)
    for make, message in [
        (lambda: next(ddim(diffusion, eps_fn, x, 1001)), "steps is 1001.*1 to 1000"),
        (lambda: next(ddim(diffusion, eps_fn, x, 10, 1.5, lambda i, x: x)), "eta is 1.5"),
        (lambda: timesteps_of(ALPHAS_BAR, 999, "uniform"), "timestep 1000 of 0 to 999"),
        (lambda: next(ddim(diffusion, eps_fn, x, 10, spacing="karras")), "'karras'.*'lambda'"),
        (lambda: sample.settings(random_ldm("maps"), "euler"), "'euler'.*ddim"),
        (lambda: Diffusion(prediction="x0"), "'x0'"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()
