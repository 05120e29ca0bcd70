"""The denoiser of stage 2: noisy latent x_t [B, C, h, w], timestep t [B] and pose -> prediction.

The prediction is the noise eps, or v (diffusion.py). The network is a U of residual blocks: down
through halved resolutions, a middle, and up again, with skip connections across. At the
downsampling factors in `attention_resolutions` a SpatialTransformer follows each residual block,
and one is in the middle: self-attention, then cross-attention to the pose.

The pose enters in two ways: as `context` [B, N, D], tokens for cross-attention, and as `concat`
[B, K, h, w], maps concatenated to the noisy latent. A label [B], the number of a class, adds a
learned vector to the timestep embedding.

This is the network of latent diffusion (arXiv:2112.10752, appendix E.2). Submodules have the names
of CompVis `openaimodel.UNetModel`, so published state dicts load with strict=True.
"""

# B batch, C channels, h w latent height and width, L = h w pixels as tokens, N context tokens,
# D context width, K concatenated maps, M model_channels, E = 4 M embedding width, n heads,
# d = C / n width of a head

import math
from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

NORM_GROUPS = 32        # Wu & He, arXiv:1803.08494, and every model of this family since
MAX_PERIOD = 10_000     # slowest wave of the timestep embedding, arXiv:1706.03762 section 3.5
HALF = torch.bfloat16, torch.float16
NO_LABEL = -1           # adds nothing to the timestep embedding: the null label
LABEL_STD = 0.1         # std of a new label's vector, that of an untrained timestep embedding
MANY_KEYS = 1024        # from so many keys on, bf16 attention on a CPU beats float32


@dataclass(frozen=True)
class UNetConfig:
    """The defaults are the danbooru pose recipe: 206,194,243 parameters."""

    in_channels: int = 3                                # latent channels + K
    out_channels: int = 3                               # latent channels
    model_channels: int = 160                           # M, the width at full resolution
    num_res_blocks: int = 2                             # a level on the way down; one more up
    attention_resolutions: tuple[int, ...] = (8, 4, 2)  # downsampling factors, not sizes
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)        # width of each level over M
    num_heads: int = 8                                  # n, at every level
    context_dim: int | None = 17                        # D; None: no cross-attention
    transformer_depth: int = 1                          # blocks in one SpatialTransformer
    dropout: float = 0.0                                # in the residual blocks
    num_classes: int = 0                                # labels; 0: without

    def __post_init__(self) -> None:
        # JSON has no tuples; a config that was saved must equal the one that is loaded.
        for name in ("attention_resolutions", "channel_mult"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        factors = [2 ** level for level in range(len(self.channel_mult))]
        if not set(self.attention_resolutions) <= set(factors):     # else silently no attention
            raise ValueError(f"attention_resolutions is {self.attention_resolutions}; a UNet of "
                             f"{len(factors)} levels has the downsampling factors {factors}")


# ------------------------------------------------------------------------------ residual blocks

def zero(module: nn.Module) -> nn.Module:
    """The last layer of a residual branch starts at zero: a new network is the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """t [B] -> [B, dim] float32: cosines, then sines, of t at dim/2 geometric frequencies."""
    freqs = torch.exp(-math.log(MAX_PERIOD) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    phase = t.float()[:, None] * freqs                                  # [B, dim/2]
    return torch.cat([phase.cos(), phase.sin()], dim=1)                 # [B, dim]


class ResBlock(nn.Module):
    """x [B, C_in, h, w], emb [B, E] -> [B, C_out, h, w]: two 3x3 convolutions with a shortcut; the
    timestep is added between them."""

    def __init__(self, in_channels: int, emb_dim: int, out_channels: int, dropout: float):
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(NORM_GROUPS, in_channels), nn.SiLU(),
            nn.Conv2d(in_channels, out_channels, 3, padding=1),
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_dim, out_channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(NORM_GROUPS, out_channels), nn.SiLU(), nn.Dropout(dropout),
            zero(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        same = in_channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x)                                           # [B, C_out, h, w]
        h = h + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


def downsample(channels: int) -> nn.Module:
    """[B, C, h, w] -> [B, C, h/2, w/2]"""
    return nn.Sequential(OrderedDict(op=nn.Conv2d(channels, channels, 3, stride=2, padding=1)))


def upsample(channels: int) -> nn.Module:
    """[B, C, h, w] -> [B, C, 2h, 2w]"""
    return nn.Sequential(OrderedDict(nearest=nn.Upsample(scale_factor=2),
                                     conv=nn.Conv2d(channels, channels, 3, padding=1)))


# ------------------------------------------------------------------------------ attention

def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [B, n, L, d], k and v [B, n, N, d] -> [B, n, L, d]: softmax(q k^T / sqrt(d)) v."""
    if q.device.type != "cpu" or q.dtype not in HALF or k.shape[2] >= MANY_KEYS:
        return F.scaled_dot_product_attention(q, k, v)
    # On a CPU the bf16 kernel takes 2 to 8 times as long as float32 with 1 to 64 keys (measured).
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(q.dtype)


class Attention(nn.Module):
    """Multi-head attention (arXiv:1706.03762): queries from x [B, L, C], keys and values from a
    context [B, N, D] -> [B, L, C].

    With N = 1 the softmax is 1 whatever q and k are: every pixel gets the same vector. A pose
    therefore needs a token for each joint.
    """

    def __init__(self, channels: int, context_dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_dim, channels, bias=False)
        self.to_v = nn.Linear(context_dim, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))      # so its name is to_out.0

    def heads(self, y: Tensor) -> Tensor:
        return y.unflatten(2, (self.num_heads, -1)).transpose(1, 2)     # [B, L, C] -> [B, n, L, d]

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)  # [B, L or N, C]
        y = attend(self.heads(q), self.heads(k), self.heads(v))         # [B, n, L, d]
        return self.to_out(y.transpose(1, 2).flatten(2))                # [B, L, C]


class GEGLU(nn.Module):
    """[B, L, C] -> [B, L, hidden]: one half of a projection gates the other (arXiv:2002.05202)."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(channels, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


def mlp(channels: int) -> nn.Module:
    """[B, L, C] -> [B, L, C]"""
    # Identity replaces the reference's dropout of 0, so the last layer is still named net.2.
    return nn.Sequential(OrderedDict(net=nn.Sequential(
        GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels))))


class TransformerBlock(nn.Module):
    """x [B, L, C] -> [B, L, C]: pre-norm residual self-attention, cross-attention to the pose,
    MLP."""

    def __init__(self, channels: int, context_dim: int | None, num_heads: int):
        super().__init__()
        self.attn1 = Attention(channels, channels, num_heads)
        self.norm1 = nn.LayerNorm(channels)
        self.attn2 = None if context_dim is None else Attention(channels, context_dim, num_heads)
        self.norm2 = None if context_dim is None else nn.LayerNorm(channels)
        self.ff = mlp(channels)
        self.norm3 = nn.LayerNorm(channels)

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        y = self.norm1(x)
        x = x + self.attn1(y, y)
        if self.attn2 is not None:
            x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """x [B, C, h, w] -> [B, C, h, w]: transformer blocks over the pixels as tokens, residual."""

    def __init__(self, channels: int, context_dim: int | None, num_heads: int, depth: int):
        super().__init__()
        self.norm = nn.GroupNorm(NORM_GROUPS, channels, eps=1e-6)       # the reference's eps
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, context_dim, num_heads) for _ in range(depth))
        self.proj_out = zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        y = self.proj_in(self.norm(x))                                  # [B, C, h, w]
        # For a channels_last tensor both permutes are views without a copy.
        y = y.permute(0, 2, 3, 1).flatten(1, 2)                         # [B, L, C]
        for block in self.transformer_blocks:
            y = block(y, context)
        y = y.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)             # [B, C, h, w]
        return x + self.proj_out(y)


# ------------------------------------------------------------------------------ the U

class Stage(nn.Sequential):
    """One step of the U: ResBlocks get the timestep, SpatialTransformers the context."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None,
                skip: Tensor | None = None) -> Tensor:
        if skip is not None:        # here, so gradient checkpointing does not store the result
            x = torch.cat([x, skip], dim=1)
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


class UNet(nn.Module):
    """prediction = UNet(config)(x, t, context, concat, label).

    Call .to(memory_format=torch.channels_last) once for speed. With `checkpointing` (gradient
    checkpointing, arXiv:1604.06174) training stores only the inputs of each Stage and recomputes
    its activations in the backward pass: a third more time, a fraction of the memory.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        self.checkpointing = False
        M, E = config.model_channels, 4 * config.model_channels

        def res(in_channels: int, out_channels: int) -> ResBlock:
            return ResBlock(in_channels, E, out_channels, config.dropout)

        def transformer(channels: int) -> SpatialTransformer:
            return SpatialTransformer(channels, config.context_dim, config.num_heads,
                                      config.transformer_depth)

        self.time_embed = nn.Sequential(nn.Linear(M, E), nn.SiLU(), nn.Linear(E, E))
        self.label_emb = None
        if config.num_classes:
            self.label_emb = nn.Embedding(config.num_classes, E)
            nn.init.normal_(self.label_emb.weight, std=LABEL_STD)

        C = M
        self.input_blocks = nn.ModuleList([Stage(nn.Conv2d(config.in_channels, M, 3, padding=1))])
        skips = [M]                                         # widths, pushed on the way down
        for level, mult in enumerate(config.channel_mult):
            attends = 2 ** level in config.attention_resolutions
            for _ in range(config.num_res_blocks):
                layers = [res(C, mult * M)]
                C = mult * M
                if attends:
                    layers.append(transformer(C))
                self.input_blocks.append(Stage(*layers))
                skips.append(C)
            if level < len(config.channel_mult) - 1:
                self.input_blocks.append(Stage(downsample(C)))
                skips.append(C)

        self.middle_block = Stage(res(C, C), transformer(C), res(C, C))

        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(config.channel_mult))):
            attends = 2 ** level in config.attention_resolutions
            for i in range(config.num_res_blocks + 1):      # one more, for downsample's skip
                layers = [res(C + skips.pop(), mult * M)]   # popped on the way up
                C = mult * M
                if attends:
                    layers.append(transformer(C))
                if level and i == config.num_res_blocks:
                    layers.append(upsample(C))
                self.output_blocks.append(Stage(*layers))

        self.out = nn.Sequential(nn.GroupNorm(NORM_GROUPS, C), nn.SiLU(),
                                 zero(nn.Conv2d(C, config.out_channels, 3, padding=1)))

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None,
                concat: Tensor | None = None, label: Tensor | None = None) -> Tensor:
        """x [B, C, h, w], t [B] integers, context [B, N, D], concat [B, K, h, w], label [B]
        integers or NO_LABEL (None: NO_LABEL for all) -> [B, out_channels, h, w]; h and w must halve
        evenly at every level."""
        if concat is not None:
            x = torch.cat([x, concat.to(x.dtype)], dim=1)               # [B, in_channels, h, w]
        # From here on everything is channels_last: without it bf16 convolutions on a CPU are up to
        # 15 times slower.
        h = x.contiguous(memory_format=torch.channels_last)
        emb = timestep_embedding(t, self.config.model_channels)         # [B, M]
        emb = self.time_embed(emb.to(x.dtype))                          # [B, E]
        if self.label_emb is not None and label is not None:
            of_label = self.label_emb(label.clamp(min=0)) * (label > NO_LABEL)[:, None]
            emb = emb + of_label.to(emb.dtype)
        skips = []
        for block in self.input_blocks:
            h = self._run(block, h, emb, context)
            skips.append(h)
        h = self._run(self.middle_block, h, emb, context)
        for block in self.output_blocks:
            h = self._run(block, h, emb, context, skips.pop())
        return self.out(h)

    def _run(self, stage: Stage, *args: Tensor | None) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(stage, *args, use_reentrant=False)
        return stage(*args)
