"""Diffusion: latents x0 [B, C, h, w] in, a training loss out; Gaussian noise in, samples out.

Sources: DDPM arXiv:2006.11239, DDIM arXiv:2010.02502, DPM-Solver++ arXiv:2211.01095, guidance
(CFG) arXiv:2207.12598, v-prediction arXiv:2202.00512.

Forward process. beta_t grows from linear_start to linear_end, linearly in its square root;
alpha_bar_t = prod_{s <= t} (1 - beta_s).
    x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps,    eps ~ N(0, I)        DDPM (4)

Training. A network predicts eps from x_t, t and the pose; the loss is the squared error.
    loss = || eps - eps_theta(x_t, t, pose) ||^2                                    DDPM (14)
With prediction "v" it predicts v instead. Where x_t is nearly all noise, eps says almost nothing
about x0, but v is nearly -x0:
    v   = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x0                          v-prediction
    eps = sqrt(alpha_bar_t) v + sqrt(1 - alpha_bar_t) x_t
For a share p_drop of the samples the null condition replaces the pose, so that one network learns
both eps(x_t, t, pose) and eps(x_t, t, null).

Sampling. Every sampler turns eps into an estimate of x0, and steps to an earlier time.
    x0 = (x_t - sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_bar_t)                      DDPM (15)
`ddpm` draws x_{t-1} from the posterior q(x_{t-1} | x_t, x0), a Gaussian, through all T steps:
    mean = sqrt(alpha_bar_{t-1}) beta_t / (1 - alpha_bar_t) x0
           + sqrt(1 - beta_t) (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t) x_t         DDPM (7)
    variance = beta_t (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t)                     DDPM (7)
`ddim` jumps from t to any earlier s; eta = 0 is deterministic, eta = 1 over all T steps is `ddpm`:
    x_s = sqrt(alpha_bar_s) x0 + sqrt(1 - alpha_bar_s - sigma^2) eps + sigma noise  DDIM (12)
    sigma = eta sqrt((1 - alpha_bar_s) / (1 - alpha_bar_t)) sqrt(1 - alpha_bar_t / alpha_bar_s)
                                                                                    DDIM (16)
`dpm_solver` is DPM-Solver++(2M). Between two steps x0 changes too, about linearly in
lambda = log(alpha_bar / (1 - alpha_bar)) / 2. A step over h = lambda_s - lambda_t is therefore a
DDIM step in which D, an estimate of x0 in the middle of the step, replaces x0. D extrapolates from
this x0 and the one before it, h_before earlier:
    D = x0 + h / (2 h_before) (x0 - x0_before)                                      algorithm 2

Guidance. eps = eps_null + w (eps_pose - eps_null); w = 1 is the conditional model, w = 0 the
unconditional one. (CFG (6) counts differently: its w is ours minus 1.)

Variations. A sampler can skip its first steps and start from x_t of a given x0 (SDEdit,
arXiv:2108.01073). For inpainting (RePaint, arXiv:2201.09865; extras/editing.py) it can repeat each
step in several rounds, with noise added back in between:
    x_t = sqrt(alpha_bar_t / alpha_bar_s) x_s + sqrt(1 - alpha_bar_t / alpha_bar_s) noise
`slerp` interpolates between two noises on the sphere that both lie on (arXiv:1609.04468):
    sin((1 - share) angle) / sin(angle) a + sin(share angle) / sin(angle) b

t counts from 0 here, from 1 in the papers: alpha_bar[0] = 1 - beta[0], and the time before t = 0
has alpha_bar = 1. No sampler clips x0: latents have no bounds.
"""

# B batch, C channels, h w latent height and width, T timesteps of the schedule, S sampler steps

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Model = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]      # (x, t [B], cond [B, ...], drop)
EpsFn = Callable[[Tensor, Tensor], Tensor]                      # (x, t [B]) -> eps
NoiseFn = Callable[[int, Tensor], Tensor]                       # (step i, x) -> noise like x


class Diffusion:
    """The noise schedule, its precomputed tables and the training loss. Has no parameters."""

    def __init__(self, timesteps: int = 1000, linear_start: float = 0.0015,
                 linear_end: float = 0.0195, prediction: str = "eps"):
        if (prediction not in ("eps", "v") or not 2 <= timesteps <= 1_000_000
                or not 0 < linear_start <= linear_end < 1):         # from a damaged checkpoint
            raise ValueError(f"timesteps {timesteps}, beta {linear_start} to {linear_end}, "
                             f"prediction {prediction!r}; allowed are 2 to 1,000,000 timesteps, "
                             "0 < start <= end < 1, and eps or v")
        self.timesteps, self.prediction = timesteps, prediction
        # float64: 1 - alpha_bar loses its digits in float32 where alpha_bar is near 1
        self.betas = torch.linspace(                                                        # [T]
            linear_start ** 0.5, linear_end ** 0.5, timesteps, dtype=torch.float64) ** 2
        self.alphas_bar = torch.cumprod(1 - self.betas, dim=0)
        self.alphas_bar_prev = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_bar[:-1]])
        self.sqrt_alphas_bar = self.alphas_bar.sqrt()
        self.sqrt_one_minus_alphas_bar = (1 - self.alphas_bar).sqrt()
        # DDPM (7)
        noise_var, noise_var_prev = 1 - self.alphas_bar, 1 - self.alphas_bar_prev
        self.posterior_x0_coef = self.alphas_bar_prev.sqrt() * self.betas / noise_var
        self.posterior_x_t_coef = (1 - self.betas).sqrt() * noise_var_prev / noise_var
        self.posterior_variance = self.betas * noise_var_prev / noise_var
        # log(0) is -inf, so t = 0 uses the value of t = 1; the last step adds no noise.
        self.posterior_log_variance = self.posterior_variance[[1, *range(1, timesteps)]].log()
        self.rising_lambda = torch.from_numpy(log_snr(self.alphas_bar.numpy())).flip(0)
        self._moved: dict[tuple[str, torch.device], Tensor] = {}

    def _table(self, name: str, device: torch.device) -> Tensor:
        """Table `name` [T] in float32 on a device."""
        key = (name, device)
        if key not in self._moved:          # copied once per device, not in every step
            self._moved[key] = getattr(self, name).to(torch.float32).to(device)
        return self._moved[key]

    def _at(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """Table `name` at t, float32 [B, 1, ...] ready to broadcast over `like` [B, ...]."""
        return self._table(name, like.device)[t.to(like.device)].view(-1, *[1] * (like.ndim - 1))

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """DDPM (4): x_t, float32, of x0 [B, ...] at t [B] with the given noise."""
        return (self._at("sqrt_alphas_bar", t, x0) * x0
                + self._at("sqrt_one_minus_alphas_bar", t, x0) * noise)

    def predict_x0(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """DDPM (15), (4) solved for x0."""
        noise = self._at("sqrt_one_minus_alphas_bar", t, x_t) * eps
        return (x_t - noise) / self._at("sqrt_alphas_bar", t, x_t)

    def predict_eps(self, x_t: Tensor, t: Tensor, x0: Tensor) -> Tensor:
        """(4) solved for eps."""
        signal = self._at("sqrt_alphas_bar", t, x_t) * x0
        return (x_t - signal) / self._at("sqrt_one_minus_alphas_bar", t, x_t)

    def posterior(self, x0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """DDPM (7): mean [B, ...] and log variance [B, 1, ...] of q(x_{t-1} | x_t, x0)."""
        mean = (self._at("posterior_x0_coef", t, x_t) * x0
                + self._at("posterior_x_t_coef", t, x_t) * x_t)
        return mean, self._at("posterior_log_variance", t, x_t)

    def draw_timesteps(self, n: int, spread: float = 0.0,
                       device: torch.device | str = "cpu") -> Tensor:
        """Random timesteps [n] for training: uniform, or such that lambda is N(0, spread^2)."""
        if not spread:
            return torch.randint(self.timesteps, (n,), device=device)
        drawn = spread * torch.randn(n, device=device)
        at = torch.searchsorted(self._table("rising_lambda", drawn.device), drawn)
        return (self.timesteps - at).clamp(0, self.timesteps - 1)

    def target(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What the network learns to predict, float32 [B, ...]: eps or v."""
        if self.prediction == "eps":
            return noise.float()
        return (self._at("sqrt_alphas_bar", t, x0) * noise
                - self._at("sqrt_one_minus_alphas_bar", t, x0) * x0)

    def eps_model(self, model: Model) -> Model:
        """A model that predicts this schedule's target -> a model that predicts eps."""
        if self.prediction == "eps":
            return model

        def from_v(x: Tensor, t: Tensor, cond: Tensor, drop: Tensor) -> Tensor:
            v = model(x, t, cond, drop).float()
            return (self._at("sqrt_alphas_bar", t, x) * v
                    + self._at("sqrt_one_minus_alphas_bar", t, x) * x)

        return from_v

    def loss(
        self,
        model: Model,                   # called once: model(x_t, t, cond, drop) -> eps or v
        x0: Tensor,                     # [B, ...]
        cond: Tensor,                   # [B, ...] the poses, passed through
        t: Tensor,                      # [B] in 0 to T - 1, see draw_timesteps
        noise: Tensor,                  # like x0, N(0, I)
        drop: Tensor,                   # [B] bool, where the null condition replaces the pose
    ) -> Tensor:
        """DDPM (14): mean squared error of each sample, [B], in float32 also under autocast."""
        predicted = model(self.q_sample(x0, t, noise), t, cond, drop)
        error = predicted.float() - self.target(x0, t, noise)
        return error.square().flatten(1).mean(1)                                            # [B]


# ------------------------------------------------------------------------------ guidance

def guided(eps_model: Model, cond: Tensor, w: float) -> EpsFn:
    """Classifier-free guidance under cond [B, ...]: eps = eps_null + w (eps_cond - eps_null).

    w = 1 and w = 0 cost one evaluation of B samples, any other w one of 2 B.
    """

    def eps_fn(x: Tensor, t: Tensor) -> Tensor:
        shown = torch.zeros(x.shape[0], dtype=torch.bool, device=x.device)  # [B], the `drop` of all
        if w == 1:
            return eps_model(x, t, cond, shown)
        if w == 0:
            return eps_model(x, t, cond, ~shown)
        both = eps_model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([cond, cond]),
                         torch.cat([~shown, shown]))
        eps_null, eps_cond = both.float().chunk(2)                                      # [B, ...]
        return eps_null + w * (eps_cond - eps_null)

    return eps_fn


# ------------------------------------------------------------------------------ samplers

class Step(NamedTuple):
    """What a sampler yields; the x of the last one is the sample."""

    i: int          # this is step i of n, from 0
    n: int
    t: int          # the timestep at which the network was evaluated
    x: Tensor       # the new, less noisy x, float32 [B, ...]
    x0: Tensor      # the prediction of x0 at t


@torch.no_grad()
def ddpm(diffusion: Diffusion, eps_fn: EpsFn, x_T: Tensor, noise_fn: NoiseFn,
         skip: int = 0) -> Iterator[Step]:
    """Ancestral sampling through all T timesteps (DDPM algorithm 2); `skip` as in `ddim`."""
    T = diffusion.timesteps
    x = x_T.float()
    for i in range(skip, T):
        t = T - 1 - i
        ts = torch.full((x.shape[0],), t, device=x.device)                                  # [B]
        x0 = diffusion.predict_x0(x, ts, eps_fn(x, ts).float())
        x, log_variance = diffusion.posterior(x0, x, ts)
        if t > 0:                                           # after the last step x is x0 itself
            x = x + (0.5 * log_variance).exp() * noise_fn(i, x)
        yield Step(i, T, t, x, x0)


@torch.no_grad()
def ddim(
    diffusion: Diffusion,
    eps_fn: EpsFn,
    x_T: Tensor,                        # [B, ...]
    steps: int,                         # S
    eta: float = 0.0,                   # 0 deterministic, 1 as noisy as DDPM
    noise_fn: NoiseFn | None = None,    # needed where eta > 0 or rounds > 1
    spacing: str = "even",              # of the timesteps, see timesteps_of
    skip: int = 0,                      # steps left out at the noisy end; x_T is x at the next t
    rounds: int = 1,                    # RePaint: how many times each step is made
    order: int = 1,                     # 2: `dpm_solver`, which has no rounds
) -> Iterator[Step]:
    """DDIM (12) over S of the T timesteps, each `rounds` evaluations of the network. With `order` 2
    x0 is extrapolated as in DPM-Solver++."""
    timesteps, alpha_bar, alpha_bar_prev, sigma = ddim_table(diffusion, steps, eta, spacing)
    lambda_ = log_snr(alpha_bar)
    x, n, x0_before = x_T.float(), len(timesteps), None
    for k in range(skip * rounds, n * rounds):
        i, j = k // rounds, n - 1 - k // rounds             # j indexes the tables, noisy end last
        if k % rounds:
            kept = alpha_bar[j] / alpha_bar_prev[j]
            x = kept ** 0.5 * x + (1 - kept) ** 0.5 * noise_fn(n * rounds + k, x)
        ts = torch.full((x.shape[0],), int(timesteps[j]), device=x.device)                  # [B]
        eps = eps_fn(x, ts).float()
        x0 = D = (x - (1 - alpha_bar[j]) ** 0.5 * eps) / alpha_bar[j] ** 0.5
        if order == 2 and x0_before is not None and j > 0:
            h, h_before = lambda_[j - 1] - lambda_[j], lambda_[j] - lambda_[j + 1]
            D = x0 + h / (2 * h_before) * (x0 - x0_before)
            eps = (x - alpha_bar[j] ** 0.5 * D) / (1 - alpha_bar[j]) ** 0.5     # the eps of D
        x = alpha_bar_prev[j] ** 0.5 * D + (1 - alpha_bar_prev[j] - sigma[j] ** 2) ** 0.5 * eps
        if sigma[j] > 0:
            x = x + sigma[j] * noise_fn(k, x)
        x0_before = x0
        yield Step(i, n, int(timesteps[j]), x, x0)


def dpm_solver(diffusion: Diffusion, eps_fn: EpsFn, x_T: Tensor, steps: int, eta: float = 0.0,
               noise_fn: NoiseFn | None = None, spacing: str = "lambda",
               skip: int = 0) -> Iterator[Step]:
    """DPM-Solver++(2M), arXiv:2211.01095 algorithm 2: error O(1 / S^2) where DDIM's is O(1 / S).
    Arguments as in `ddim`; with eta 1 it is the paper's SDE-DPM-Solver++(2M).

    The first step has no previous x0 and the last ends at lambda = infinity: both are DDIM steps.
    There are no RePaint rounds: the extrapolation would amplify the noise that they add back.
    """
    return ddim(diffusion, eps_fn, x_T, steps, eta, noise_fn, spacing, skip, order=2)


def log_snr(alpha_bar: np.ndarray) -> np.ndarray:
    """lambda = log(sqrt(alpha_bar) / sqrt(1 - alpha_bar)), half the log signal-to-noise ratio."""
    return 0.5 * np.log(alpha_bar / (1 - alpha_bar))


def timesteps_of(alphas_bar: np.ndarray, steps: int, spacing: str = "even") -> np.ndarray:
    """The timesteps [S] of a schedule alphas_bar [T] that a sampler visits, ascending.

    "even": exactly `steps`, evenly spread in t, always with T - 1, where sampling starts.
    "lambda": evenly in lambda, always with T - 1, none twice.
    "uniform": the reference's stride T // steps plus 1; use it only to reproduce the reference. It
    can make more steps than asked for (350 of 1000 makes 500). 599 of the 1000 values of `steps`
    give a timestep above T - 1, which is a ValueError.
    """
    T = len(alphas_bar)
    if not 1 <= steps <= T:
        raise ValueError(f"steps is {steps}; it must be 1 to {T}, the timesteps of the schedule")
    if spacing == "even":
        # from T - 1 down, so that a single step is the noisiest one
        return np.linspace(T - 1, 0, steps).round().astype(np.int64)[::-1].copy()
    if spacing == "lambda":
        lambda_ = log_snr(alphas_bar)                                                       # [T]
        wanted = np.linspace(lambda_[-1], lambda_[0], steps)[::-1]
        timesteps = np.interp(-wanted, -lambda_, np.arange(T)).round().astype(np.int64)
        i = np.arange(steps)        # near t = 0 several round to one timestep: make them differ
        return np.minimum(np.maximum.accumulate(timesteps - i) + i, T - steps + i)
    if spacing != "uniform":
        raise ValueError(f"spacing is {spacing!r}; it must be 'even', 'lambda' or 'uniform'")
    timesteps = np.arange(0, T, T // steps) + 1
    if timesteps[-1] > T - 1:
        raise ValueError(f"steps is {steps}; 'uniform' spacing then needs timestep {timesteps[-1]} "
                         f"of 0 to {T - 1}; use spacing 'even'")
    return timesteps


def ddim_table(diffusion: Diffusion, steps: int, eta: float = 0.0,
               spacing: str = "even") -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(timesteps, alpha_bar, alpha_bar_prev, sigma), [S] each, float64, ascending in time."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; it must lie in [0, 1]")
    alpha_bar = diffusion.alphas_bar.numpy()
    timesteps = timesteps_of(alpha_bar, steps, spacing)
    alpha_bar = alpha_bar[timesteps]
    # Our last step ends at x0. The reference's ends at t = 0, with that step's noise in the sample.
    first = diffusion.alphas_bar[0].item() if spacing == "uniform" else 1.0
    alpha_bar_prev = np.concatenate([[first], alpha_bar[:-1]])
    sigma = (eta * np.sqrt((1 - alpha_bar_prev) / (1 - alpha_bar))                  # DDIM (16)
             * np.sqrt(1 - alpha_bar / alpha_bar_prev))
    return timesteps, alpha_bar, alpha_bar_prev, sigma


# ------------------------------------------------------------------------------ noise

Seed = int | tuple[int, int, float]     # (a, b, share): the noise between those of seeds a and b
MOST_SEEDS = 2 ** 32                    # SeedSequence takes 32-bit words


def per_image_noise(seeds: list[Seed], shape: tuple[int, ...]) -> tuple[Tensor, NoiseFn]:
    """x_T [B, *shape] and a noise_fn in which image i depends only on seeds[i], not on B or the
    device. The noise of a step is a function of (seed, step)."""

    def normal(seed: Seed, step: int, shape: tuple[int, ...]) -> Tensor:
        if isinstance(seed, tuple):
            a, b, share = seed
            return slerp(normal(a, step, shape), normal(b, step, shape), share)
        mixed = np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0]
        return torch.randn(shape, generator=torch.Generator().manual_seed(int(mixed)))

    def noise_fn(i: int, x: Tensor) -> Tensor:
        return torch.stack([normal(seed, i + 1, x.shape[1:]) for seed in seeds]).to(x.device)

    return torch.stack([normal(seed, 0, shape) for seed in seeds]), noise_fn


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """From a (share 0, exactly) to b (share 1, exactly) on the sphere around 0. Two independent
    N(0, I) stay N(0, I); linear interpolation would reduce the norm."""
    cosine = (a * b).sum().double() / (a.norm().double() * b.norm().double())
    angle = cosine.clamp(-1, 1).acos().item()
    if not np.sin(angle) >= 1e-6:               # parallel or opposite; NaN where one is 0
        return (1 - share) * a + share * b
    # Divided first: at share 0 and 1 the factors are then exactly 1 and 0.
    return (np.sin((1 - share) * angle) / np.sin(angle) * a
            + np.sin(share * angle) / np.sin(angle) * b)
