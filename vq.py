"""Stage 1: an image x [B, 3, H, W] in [-1, 1] <-> a grid of codes [B, H/f, W/f].

    x --encoder--> h --nearest code--> z_q --decoder--> x_hat       f = 2^(len(ch_mult) - 1)

The network is that of VQGAN (arXiv:2012.09841) as CompVis trained it, with its submodule names, so
published state dicts load with strict=True. `VQConfig()` is VQ-f4, the one the original blog post
used. Fields that the reference lacks default to its behaviour; the small presets use them.

`VQLoss` is the objective: L1 + LPIPS + codebook + a patch discriminator, with adaptive weights.
"""
from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# B batch, C channels, H, W image, h, w = H/f, W/f latent, K codes, N = B h w vectors

NORM_EPS = 1e-6                             # of the reference's GroupNorms
SHORTCUT_SCALE = 2.0                        # of the pooled image, for a latent with std 1
DISTANCES_AT_ONCE = 2 ** 24                 # entries of the distance matrix in memory: 64 MiB
USAGE_DECAY = 0.98                          # decay of each code's usage count, over about 50 steps
DEAD_BELOW = 0.1                            # a code used less than this share of the mean is dead
BETA = 0.25                                 # weight of the commitment loss


@dataclass(frozen=True)
class VQConfig:
    """The defaults are VQ-f4: 55,322,782 parameters."""

    in_channels: int = 3
    out_ch: int = 3
    ch: int = 128                           # width of the first level
    ch_mult: tuple[int, ...] = (1, 2, 4)    # width of each level over ch; f = 2^(levels - 1)
    num_res_blocks: int = 2                 # per encoder level; decoder levels have one more
    z_channels: int = 3                     # C of h as the encoder makes it
    embed_dim: int = 3                      # C of a code
    n_embed: int = 8192                     # K
    attn_resolutions: tuple[int, ...] = ()  # image sizes at which attention follows a ResBlock
    resolution: int = 256                   # the image size that attn_resolutions refer to
    dropout: float = 0.0
    # What the reference lacks. GroupNorm(32) on 32 channels removes an image's absolute colour;
    # without any norm each residual branch must start at zero.
    norm_groups: int = 32                   # 0: no norm at all
    zero_init: bool = False
    ema_codebook: bool = False              # codes follow a moving average, not a gradient
    shortcut: bool = False                  # encoder and decoder add to plain resampling

    def __post_init__(self) -> None:
        # JSON has no tuples; a config that was saved must equal the one that is loaded.
        for name in ("ch_mult", "attn_resolutions"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        sizes = [self.resolution // 2 ** i for i in range(len(self.ch_mult))]
        if not set(self.attn_resolutions) <= set(sizes):            # else no attention at all
            raise ValueError(f"VQConfig attn_resolutions is {self.attn_resolutions}; the levels "
                             f"have the sizes {sizes}")
        if self.shortcut and not self.in_channels == self.out_ch <= self.embed_dim:
            raise ValueError("VQConfig shortcut needs a latent with at least the channels of the "
                             "image")

    @property
    def factor(self) -> int:
        """f, the side of a latent cell in pixels."""
        return 2 ** (len(self.ch_mult) - 1)


# ------------------------------------------------------------------------------ building blocks

def run(module: nn.Module, x: Tensor, checkpointing: bool) -> Tensor:
    """module(x); with gradient checkpointing the backward pass recomputes its activations."""
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(module, x, use_reentrant=False)
    return module(x)


def norm(channels: int, config: VQConfig) -> nn.Module:
    if not config.norm_groups:
        return nn.Identity()
    return nn.GroupNorm(config.norm_groups, channels, eps=NORM_EPS)


def zero_(module: nn.Conv2d) -> None:
    nn.init.zeros_(module.weight)
    nn.init.zeros_(module.bias)


class ResBlock(nn.Module):
    """x [B, C_in, H, W] -> shortcut(x) + conv(silu(norm(conv(silu(norm(x)))))) [B, C_out, H, W]."""

    def __init__(self, c_in: int, c_out: int, config: VQConfig):
        super().__init__()
        self.norm1 = norm(c_in, config)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = norm(c_out, config)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if config.zero_init:
            zero_(self.conv2)
        self.nin_shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Single-head self-attention over all pixels of x [B, C, H, W], as a residual branch."""

    def __init__(self, channels: int, config: VQConfig):
        super().__init__()
        self.norm = norm(channels, config)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)
        if config.zero_init:
            zero_(self.proj_out)

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        h = self.norm(x)
        q, k, v = (f(h).permute(0, 2, 3, 1).reshape(B, 1, H * W, C)
                   for f in (self.q, self.k, self.v))
        a = F.scaled_dot_product_attention(q, k, v)                         # [B, 1, HW, C]
        return x + self.proj_out(a.reshape(B, H, W, C).permute(0, 3, 1, 2))     # channels_last


def downsample(channels: int) -> nn.Module:
    """x [B, C, H, W] -> [B, C, H/2, W/2]; padding right and below only, as in the reference."""
    return nn.Sequential(OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)),
                                     conv=nn.Conv2d(channels, channels, 3, stride=2)))


def upsample(channels: int) -> nn.Module:
    """x [B, C, H, W] -> [B, C, 2H, 2W]"""
    return nn.Sequential(OrderedDict(nearest=nn.Upsample(scale_factor=2),
                                     conv=nn.Conv2d(channels, channels, 3, padding=1)))


class Level(nn.Module):
    """One resolution: ResBlocks, each followed by attention where configured, then a resampling."""

    def __init__(self, c_in: int, c_out: int, n_blocks: int, resolution: int, config: VQConfig,
                 down: bool = False, up: bool = False):
        super().__init__()
        self.block = nn.ModuleList(
            ResBlock(c_in if i == 0 else c_out, c_out, config) for i in range(n_blocks))
        attends = resolution in config.attn_resolutions
        self.attn = nn.ModuleList(AttnBlock(c_out, config) for _ in range(n_blocks * attends))
        self.downsample = downsample(c_out) if down else nn.Identity()
        self.upsample = upsample(c_out) if up else nn.Identity()

    def forward(self, h: Tensor, checkpointing: bool) -> Tensor:
        for i, block in enumerate(self.block):
            h = run(block, h, checkpointing)
            if len(self.attn):
                h = run(self.attn[i], h, checkpointing)
        return run(self.upsample, run(self.downsample, h, checkpointing), checkpointing)


def middle(channels: int, config: VQConfig) -> nn.Sequential:
    """The lowest resolution, with attention whatever the config says."""
    return nn.Sequential(OrderedDict(
        block_1=ResBlock(channels, channels, config), attn_1=AttnBlock(channels, config),
        block_2=ResBlock(channels, channels, config)))


class Encoder(nn.Module):
    """x [B, 3, H, W] -> [B, z_channels, H/f, W/f]."""

    def __init__(self, config: VQConfig):
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        self.conv_in = nn.Conv2d(config.in_channels, config.ch, 3, padding=1)
        self.down = nn.ModuleList()
        c = config.ch
        for i, width in enumerate(widths):
            self.down.append(Level(c, width, config.num_res_blocks, config.resolution // 2 ** i,
                                   config, down=i < len(widths) - 1))
            c = width
        self.mid = middle(c, config)
        self.norm_out = norm(c, config)
        self.conv_out = nn.Conv2d(c, config.z_channels, 3, padding=1)

    def forward(self, x: Tensor, checkpointing: bool = False) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h, checkpointing)
        for block in self.mid:
            h = run(block, h, checkpointing)
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """[B, z_channels, H/f, W/f] -> x_hat [B, out_ch, H, W]."""

    def __init__(self, config: VQConfig):
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        c = widths[-1]
        self.conv_in = nn.Conv2d(config.z_channels, c, 3, padding=1)
        self.mid = middle(c, config)
        levels = []
        for i in reversed(range(len(widths))):                          # lowest resolution first
            levels.append(Level(c, widths[i], config.num_res_blocks + 1,
                                config.resolution // 2 ** i, config, up=i > 0))
            c = widths[i]
        self.up = nn.ModuleList(reversed(levels))                       # up.0 is the full size
        self.norm_out = norm(c, config)
        self.conv_out = nn.Conv2d(c, config.out_ch, 3, padding=1)

    def features(self, z: Tensor, checkpointing: bool = False) -> Tensor:
        """All but the last layer: [B, z_channels, h, w] -> [B, ch, H, W]."""
        h = self.conv_in(z)
        for block in self.mid:
            h = run(block, h, checkpointing)
        for level in reversed(self.up):
            h = level(h, checkpointing)
        return F.silu(self.norm_out(h))

    def forward(self, z: Tensor, checkpointing: bool = False) -> Tensor:
        h = self.features(z, checkpointing)
        # Float32 under autocast too: VQLoss compares gradients of this layer, which vanish in fp16.
        with torch.autocast(h.device.type, enabled=False):
            return self.conv_out(h.float())


# ------------------------------------------------------------------------------ the codebook

class VectorQuantizer(nn.Module):
    """h [B, C, h, w] -> (z_q [B, C, h, w], codebook loss, indices [B, h, w]).

    The codes are embedding.weight [K, C]. loss = |sg(h) - z_q|^2 + beta |h - sg(z_q)|^2
    (arXiv:1711.00937 eq. 3); with `ema` a moving average replaces the first term (appendix A.1).
    By default the reference multiplies the first term by beta, a known bug.
    """

    def __init__(self, n_embed: int, embed_dim: int, ema: bool = False):
        super().__init__()
        self.ema = ema
        self.embedding = nn.Embedding(n_embed, embed_dim)
        # The reference's init, with which nearly all codes are never used. Training therefore
        # calls `init_codes`, except in preset danbooru.
        nn.init.uniform_(self.embedding.weight, -1 / n_embed, 1 / n_embed)
        self.embedding.weight.requires_grad_(not ema)
        # Moving count of uses; 1 is the mean. Training state: train.py saves it.
        self.register_buffer("usage", torch.ones(n_embed), persistent=False)

    def nearest(self, h: Tensor) -> Tensor:
        """Indices [N] of the codes nearest to vectors h [N, C]; the distances come in chunks."""
        codes = self.embedding.weight.float()
        norms = codes.square().sum(1)                           # |h|^2 is the same for all K
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")           # TF32 picks wrong codes: 10 bits
        indices = [torch.addmm(norms, part, codes.T, alpha=-2).argmin(1)
                   for part in h.split(max(1, DISTANCES_AT_ONCE // len(codes)))]
        torch.set_float32_matmul_precision(precision)
        return torch.cat(indices)

    def lookup(self, indices: Tensor) -> Tensor:
        """indices [B, h, w] -> z_q [B, C, h, w]."""
        return self.embedding(indices).permute(0, 3, 1, 2)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # Distances in bf16 pick wrong codes (8 bits of mantissa, 8192 codes) and are slow.
        with torch.autocast(h.device.type, enabled=False):
            h = h.float()
            flat = h.permute(0, 2, 3, 1).flatten(0, 2)                      # [N, C]
            indices = self.nearest(flat.detach()).view(h.shape[0], *h.shape[2:])
            z_q = self.lookup(indices)
            loss = BETA * F.mse_loss(h, z_q.detach())
            if not self.ema:
                loss = loss + F.mse_loss(z_q, h.detach())
            z_q = h + (z_q - h).detach()                        # straight-through gradient
        return z_q, loss, indices

    @torch.no_grad()
    def init_codes(self, h: Tensor) -> None:
        """Data-dependent init: all codes are drawn from encoder outputs h [B, C, h, w]."""
        self.embedding.weight.copy_(self._draw(h, len(self.embedding.weight)))
        self.usage.fill_(1.0)

    @torch.no_grad()
    def update(self, h: Tensor, indices: Tensor, restart: bool = True) -> Tensor:
        """After an optimiser step: count uses, move the codes (`ema`), restart dead codes.

        h [B, C, h, w] and indices [B, h, w] are those of the step. Returns the number of restarts,
        a tensor: nothing here waits for a GPU. Draws from torch's default generator.
        """
        codes = self.embedding.weight
        flat = h.detach().float().permute(0, 2, 3, 1).flatten(0, 2)         # [N, C]
        share = len(codes) / len(flat)
        counts = share * torch.zeros_like(self.usage).index_add_(           # [K], mean 1
            0, indices.flatten(), torch.ones_like(flat[:, 0]))
        usage = USAGE_DECAY * self.usage + (1 - USAGE_DECAY) * counts
        if self.ema:                            # usage * code is the moving sum of its vectors
            sums = torch.zeros_like(codes).index_add_(0, indices.flatten(), flat)   # [K, C]
            drift = share * sums - counts[:, None] * codes      # 0 for a code that is not used
            drift.nan_to_num_(0.0, 0.0, 0.0)                    # ignore h with NaN or inf
            codes.add_((1 - USAGE_DECAY) * drift / usage.clamp(min=1e-8)[:, None])
        self.usage.copy_(usage)
        dead = (usage < DEAD_BELOW) & restart                               # [K]
        codes.copy_(torch.where(dead[:, None], self._draw(h, len(codes)), codes))
        self.usage.masked_fill_(dead, 1.0)
        return dead.sum()

    def _draw(self, h: Tensor, n: int) -> Tensor:
        """n vectors of h [B, C, h, w] -> [n, C], without replacement while there are enough."""
        flat = h.detach().float().permute(0, 2, 3, 1).flatten(0, 2)
        broken = ~flat.isfinite().all(1)        # argmin picks a NaN code for every vector
        order = (torch.rand(len(flat), device=h.device) + broken).argsort()     # broken ones last
        flat = flat.nan_to_num(0.0, 0.0, 0.0)
        picked = flat[order.repeat(-(-n // len(flat)))[:n]]
        if n > len(flat):                       # identical codes would never separate
            picked = picked + 0.01 * flat.std() * torch.randn_like(picked)
        return picked


# ------------------------------------------------------------------------------ the autoencoder

class VQModel(nn.Module):
    """The autoencoder: encode -> quantize -> decode.

    Stage 2 works on the output of `encode`, before quantisation; `decode` quantises first, which
    maps sampled latents to codes that the decoder was trained on. With `shortcut`, encoder and
    decoder start as averaging down and bicubic scaling up and learn what is missing (the idea of
    DC-AE, arXiv:2410.10733). With `checkpointing` (arXiv:1604.06174) training stores only the
    inputs of each ResBlock.
    """

    def __init__(self, config: VQConfig):
        super().__init__()
        self.config = config
        self.checkpointing = False
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = VectorQuantizer(config.n_embed, config.embed_dim, config.ema_codebook)
        self.quant_conv = nn.Conv2d(config.z_channels, config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)
        if config.shortcut:
            zero_(self.quant_conv)
            zero_(self.decoder.conv_out)

    def encode(self, x: Tensor) -> Tensor:
        """x [B, 3, H, W] in [-1, 1] -> h [B, embed_dim, H/f, W/f]; f must divide H and W."""
        f = self.config.factor
        assert x.shape[2] % f == x.shape[3] % f == 0, f"{list(x.shape)} is not a multiple of {f}"
        x = x.contiguous(memory_format=torch.channels_last)
        h = self.quant_conv(self.encoder(x, self.checkpointing))
        if self.config.shortcut:                # in the first channels; the others start at zero
            more = self.config.embed_dim - self.config.in_channels
            h = h + F.pad(SHORTCUT_SCALE * F.avg_pool2d(x, f), (0, 0, 0, 0, 0, more))
        return h

    def decode_raw(self, z: Tensor) -> Tensor:
        """z [B, embed_dim, h, w] -> x_hat [B, 3, H, W], without quantisation."""
        z = z.contiguous(memory_format=torch.channels_last)
        x_hat = self.decoder(self.post_quant_conv(z), self.checkpointing)
        if self.config.shortcut:
            image = z[:, :self.config.out_ch].float() / SHORTCUT_SCALE
            x_hat = x_hat + F.interpolate(image, mode="bicubic", scale_factor=self.config.factor)
        return x_hat

    def decode(self, h: Tensor) -> Tensor:
        """h [B, embed_dim, h, w] -> x_hat [B, 3, H, W], quantised on the way."""
        return self.decode_raw(self.quantize(h)[0])

    def reconstruct(self, x: Tensor, quantize: bool = True) -> tuple[Tensor, ...]:
        """x -> (h [B, C, h, w], codebook loss, indices [B, h, w], x_hat [B, 3, H, W]). Without
        quantize the decoder gets h itself; loss and indices are 0."""
        h = self.encode(x)
        if not quantize:
            indices = torch.zeros_like(h[:, 0], dtype=torch.long)
            return h, h.new_zeros(()), indices, self.decode_raw(h)
        z_q, loss, indices = self.quantize(h)
        return h, loss, indices, self.decode_raw(z_q)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x -> (x_hat [B, 3, H, W], codebook loss, indices [B, h, w])."""
        _, loss, indices, x_hat = self.reconstruct(x)
        return x_hat, loss, indices


# ------------------------------------------------------------------------------ the objective

class PatchDiscriminator(nn.Sequential):
    """PatchGAN (arXiv:1611.07004): images [B, 3, H, W] -> logits [B, 1, H/8 - 2, W/8 - 2].

    Each logit judges a patch of 70 x 70 pixels; above 0 means real. The submodules are under
    `main`, as in the reference.
    """

    def __init__(self):
        layers = [nn.Conv2d(3, 64, 4, 2, 1), nn.LeakyReLU(0.2)]
        for c_in, c_out, stride in (64, 128, 2), (128, 256, 2), (256, 512, 1):
            layers += [nn.Conv2d(c_in, c_out, 4, stride, 1, bias=False), nn.BatchNorm2d(c_out),
                       nn.LeakyReLU(0.2)]
        layers.append(nn.Conv2d(512, 1, 4, 1, 1))
        super().__init__(OrderedDict(main=nn.Sequential(*layers)))
        for module in self.modules():                       # DCGAN's init, as in the reference
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)


@dataclass(frozen=True)
class VQLossConfig:
    perceptual: float = 0.0     # weight of LPIPS, 1 in the reference; 0: none, needs no weights
    detector: float = 0.0       # weight of a distance in the features of a keypoint detector
    disc_weight: float = 0.0    # of the adversarial loss, times the adaptive weight; 0: none
    disc_start: float = 0.0     # step at which the discriminator starts; below 1: share of the run
    disc_ramp: float = 0.0      # steps over which its weight grows linearly; below 1: share
    disc_cap: float = 1e4       # largest adaptive weight


class VQLoss(nn.Module):
    """L1 + perceptual + codebook + adversarial hinge loss, in float32 (arXiv:2012.09841 eq. 5-7).
    Perceptual distances, LPIPS and that of a detector, are of metrics/: x, y [B, 3, H, W] -> [B].

    A step is `generator(...)`, backward, the autoencoder's optimiser step; then
    `discriminator(...)`, backward, the discriminator's. Both judge the same reconstruction; the
    reference computes a second one.
    """

    def __init__(self, config: VQLossConfig, lpips: nn.Module | None = None,
                 detector: nn.Module | None = None):
        super().__init__()
        self.config = config
        self.perceptual_loss, self.detector_loss = lpips, detector
        for distance in filter(None, (lpips, detector)):
            distance.eval().requires_grad_(False)
        self.disc = PatchDiscriminator() if config.disc_weight else None

    def disc_factor(self, step: int, steps: int) -> float:
        """Weight of the adversarial loss at a step of a run: 0 before disc_start, then up to 1."""
        start, ramp = (at if at >= 1 else at * steps
                       for at in (self.config.disc_start, self.config.disc_ramp))
        if self.disc is None or step < start:
            return 0.0
        return min(1.0, (step - start + 1) / ramp) if ramp else 1.0

    def adaptive_weight(self, nll: Tensor, g: Tensor, last_layer: Tensor) -> Tensor:
        """|grad nll| / |grad g| at the decoder's last layer, which makes both equal (eq. 7)."""
        nll_grad, g_grad = (torch.autograd.grad(loss, last_layer, retain_graph=True)[0]
                            for loss in (nll, g))
        return (nll_grad.norm() / (g_grad.norm() + 1e-4)).clamp(max=self.config.disc_cap).detach()

    def generator(self, x: Tensor, x_hat: Tensor, codebook_loss: Tensor, last_layer: Tensor,
                  disc_factor: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The autoencoder's loss for images x and reconstructions x_hat [B, 3, H, W], and its terms
        for the log. At disc_factor 0 the adversarial loss and its two extra backward passes are
        not computed."""
        c = self.config
        with torch.autocast(x.device.type, enabled=False):
            x_hat = x_hat.float()
            nll = (x - x_hat).abs().mean()
            terms = {"l1": nll}
            for name, weight, distance in (("lpips", c.perceptual, self.perceptual_loss),
                                           ("detector", c.detector, self.detector_loss)):
                if weight:
                    terms[name] = distance(x, x_hat).mean()
                    nll = nll + weight * terms[name]
            loss = nll + codebook_loss
            if disc_factor > 0:
                self.disc.requires_grad_(False)     # its gradients come from `discriminator` only
                g = -self.disc(x_hat).mean()
                d_weight = c.disc_weight * self.adaptive_weight(nll, g, last_layer)
                loss = loss + disc_factor * d_weight * g
                terms |= {"g": g, "d_weight": d_weight}
        return loss, {name: value.detach() for name, value in terms.items()}

    def discriminator(self, x: Tensor, x_hat: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The discriminator's hinge loss and its mean logits; no gradient reaches x_hat."""
        self.disc.requires_grad_(True)
        with torch.autocast(x.device.type, enabled=False):
            real, fake = self.disc(x), self.disc(x_hat.detach().float())
            loss = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
        return loss, {"logits_real": real.detach().mean(), "logits_fake": fake.detach().mean()}
