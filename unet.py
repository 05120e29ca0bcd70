"""The denoiser: noisy latent x_t [B, C, h, w], timestep t [B] and pose tokens [B, N, D] in, predicted noise eps out.

A U of residual blocks. At the downsampling factors in `attention_resolutions`, and always in the middle, a
SpatialTransformer follows each block: every pixel attends to every pixel, then to the N tokens of the pose. A second
door for the pose is `concat` [B, K, h, w]: maps laid beside the latent as extra input channels. What cross-attention
makes of the tokens does not depend on x_t or t: a sampler computes it once, with `UNet.keys_values`, for all its steps.

This is the network of latent diffusion (Rombach et al., arXiv:2112.10752, appendix E.2). Submodules carry the names of
CompVis `openaimodel.UNetModel`, so its published weights load with strict=True and no renaming table.
"""

# B batch, C channels, h w latent height and width, L = h w pixels as tokens, N context tokens, D context width,
# K concatenated maps, M model_channels, E = 4 M embedding width, n heads, d = C / n width of a head

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

KeysValues = list[tuple[Tensor, Tensor]]    # (k, v), each [B, n, N, d], of every cross-attention, in the order of the U

NORM_GROUPS = 32        # Wu & He, arXiv:1803.08494, and every model of this family since
SMALL_MAP = 1024        # pixels below which PyTorch's bf16 GroupNorm on a CPU is slow in channels_last
HALF = torch.bfloat16, torch.float16
NORM_AT_ONCE = 2 ** 20  # entries in a part of GroupNorm's backward pass on a CPU: 4 MiB in float32
MAX_PERIOD = 10_000     # slowest wave of the timestep embedding, arXiv:1706.03762 section 3.5
EMBED_MULT = 4          # E / M
MANY_KEYS = 1024        # from which on bf16 attention on a CPU is faster than float32: 90 against 125 ms there
FF_MULT = 4             # hidden width of the feed-forward over its input


@dataclass(frozen=True)
class UNetConfig:
    """The defaults are the danbooru pose recipe: 206,194,243 parameters. A wrong value is a ValueError."""

    in_channels: int = 3                                # latent channels + K
    out_channels: int = 3                               # latent channels
    model_channels: int = 160                           # M, the width at full resolution
    num_res_blocks: int = 2                             # per level on the way down; one more on the way up
    attention_resolutions: tuple[int, ...] = (8, 4, 2)  # downsampling factors (not sizes) that get attention
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)        # width of each level over M; its length is the depth of the U
    num_heads: int = 8                                  # n, at every level
    context_dim: int | None = 17                        # D; None: no cross-attention, self-attention alone
    transformer_depth: int = 1                          # transformer blocks in one SpatialTransformer
    dropout: float = 0.0                                # in the residual blocks

    def __post_init__(self) -> None:
        # JSON knows no tuples; a config that was saved must equal the one that is loaded.
        for name in ("attention_resolutions", "channel_mult"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.channel_mult:
            raise ValueError("channel_mult is empty; give one multiplier per level, for example (1, 2, 3, 4)")
        positive = ("in_channels", "out_channels", "model_channels", "num_res_blocks", "num_heads", "transformer_depth")
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.context_dim is not None and self.context_dim < 1:
            raise ValueError(f"context_dim is {self.context_dim}; it must be at least 1, or None for no context")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must lie in [0, 1)")
        factors = [2 ** level for level in range(len(self.channel_mult))]
        for factor in self.attention_resolutions:
            if factor not in factors:
                raise ValueError(f"attention_resolutions has {factor}; this U of {len(factors)} levels has {factors}")
        if self.model_channels % NORM_GROUPS:
            raise ValueError(f"model_channels is {self.model_channels}; it must be a multiple of {NORM_GROUPS}, "
                             "the groups of GroupNorm")
        for factor, mult in zip(factors, self.channel_mult, strict=True):
            C = self.model_channels * mult
            if C < 1 or C % NORM_GROUPS:
                raise ValueError(f"channel_mult {mult} makes {C} channels; they must be a positive multiple of "
                                 f"{NORM_GROUPS}, the groups of GroupNorm")
            attends = factor in self.attention_resolutions or factor == factors[-1]
            if attends and C % self.num_heads:
                raise ValueError(f"num_heads is {self.num_heads}; it must divide the {C} channels at factor {factor}")


class FastGroupNorm(torch.autograd.Function):
    """GroupNorm of a channels_last bf16 tensor on a CPU, its backward pass through float32.

    PyTorch's own is slow in bf16 where a group has few channels: backward 6.5 ms at 4x160x64x64, against 2.2 ms this
    way, a few samples at a time so that they stay in the cache; and forward where a map has less than 1024 pixels,
    3.7 ms at 16x64x16x16, against 0.3 in the other layout, the way there and back included.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        B, C, h, w = x.shape
        x = x.contiguous(memory_format=torch.channels_last)
        fast = x.contiguous() if h * w < SMALL_MAP else x
        y, mean, rstd = torch.native_group_norm(fast, weight, bias, B, C, h * w, groups, eps)
        ctx.save_for_backward(x, mean, rstd, weight)
        ctx.groups = groups
        return y.contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, weight = ctx.saved_tensors
        C, L = x.shape[1], x.shape[2] * x.shape[3]
        dy = dy.contiguous(memory_format=torch.channels_last)               # two layouts make wrong numbers
        dx, dweight, dbias = torch.empty_like(x), torch.zeros(C), torch.zeros(C)
        parts = (y.split(max(1, NORM_AT_ONCE // (C * L))) for y in (dx, dy, x, mean, rstd))
        for out, dy_, x_, mean_, rstd_ in zip(*parts, strict=True):
            dx_, dw_, db_ = torch.ops.aten.native_group_norm_backward(
                dy_.float(), x_.float(), mean_.float(), rstd_.float(), weight.float(), len(x_), C, L, ctx.groups,
                (True, True, True))
            out.copy_(dx_)
            dweight += dw_
            dbias += db_
        return dx, dweight, dbias, None, None


class GroupNorm(nn.GroupNorm):
    """GroupNorm of a channels_last tensor, channels_last out."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or x.dtype not in HALF:
            return super().forward(x)
        return FastGroupNorm.apply(x, self.weight, self.bias, self.num_groups, self.eps)


def zero(module: nn.Module) -> nn.Module:
    """The last layer of a residual branch starts at zero, so that a new network starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """t [B] -> [B, dim] float32: cosines, then sines, of t at dim/2 geometric frequencies (dim is even)."""
    freqs = torch.exp(-math.log(MAX_PERIOD) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    phase = t.float()[:, None] * freqs                                       # [B, dim/2]
    return torch.cat([phase.cos(), phase.sin()], dim=1)                      # [B, dim]


class ResBlock(nn.Module):
    """x [B, C_in, h, w], emb [B, E] -> [B, C_out, h, w]: two 3x3 convolutions, the timestep added between them."""

    def __init__(self, in_channels: int, emb_dim: int, out_channels: int, dropout: float):
        super().__init__()
        self.in_layers = nn.Sequential(
            GroupNorm(NORM_GROUPS, in_channels), nn.SiLU(), nn.Conv2d(in_channels, out_channels, 3, padding=1),
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_dim, out_channels))
        self.out_layers = nn.Sequential(
            GroupNorm(NORM_GROUPS, out_channels), nn.SiLU(), nn.Dropout(dropout),
            zero(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        same = in_channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x)                                                # [B, C_out, h, w]
        h = h + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Downsample(nn.Module):
    """[B, C, h, w] -> [B, C, h/2, w/2]"""

    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """[B, C, h, w] -> [B, C, 2h, 2w]"""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [B, n, L, d], k and v [B, n, N, d] -> [B, n, L, d]: softmax(q k^T / sqrt(d)) v."""
    if q.device.type != "cpu" or q.dtype not in HALF or k.shape[2] >= MANY_KEYS:
        return F.scaled_dot_product_attention(q, k, v)
    # Measured on a CPU: the bf16 kernel takes 2 to 8 times as long as float32 with 1 to 64 keys, no less with 256.
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(q.dtype)


class Attention(nn.Module):
    """x [B, L, C] asks, k and v of a context [B, N, D] answer -> [B, L, C]: n heads of `attend` (arXiv:1706.03762).

    With N = 1 the softmax is 1 whatever q and k are: every pixel gets the same vector. A pose wants a token per joint.
    """

    def __init__(self, channels: int, context_dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_dim, channels, bias=False)
        self.to_v = nn.Linear(context_dim, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))           # a Sequential for the name to_out.0

    def heads(self, y: Tensor) -> Tensor:
        return y.unflatten(2, (self.num_heads, -1)).transpose(1, 2)          # [B, L, C] -> [B, n, L, d]

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """context [B, N, D] -> k and v, [B, n, N, d] each."""
        return self.heads(self.to_k(context)), self.heads(self.to_v(context))

    def forward(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = attend(self.heads(self.to_q(x)), k, v)                           # [B, n, L, d]
        return self.to_out(y.transpose(1, 2).flatten(2))                     # [B, L, C]


class GEGLU(nn.Module):
    """[B, L, C] -> [B, L, hidden]: one half of a projection gates the other (arXiv:2002.05202)."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(channels, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """[B, L, C] -> [B, L, C]"""

    def __init__(self, channels: int):
        super().__init__()
        hidden = FF_MULT * channels
        # The Identity stands where the reference has a dropout of 0, so that the last layer is net.2.
        self.net = nn.Sequential(GEGLU(channels, hidden), nn.Identity(), nn.Linear(hidden, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """x [B, L, C], the pose's keys and values -> [B, L, C]: pixels to pixels, to pose, each alone; residual each."""

    def __init__(self, channels: int, context_dim: int | None, num_heads: int):
        super().__init__()
        self.attn1 = Attention(channels, channels, num_heads)
        self.norm1 = nn.LayerNorm(channels)
        self.attn2 = None if context_dim is None else Attention(channels, context_dim, num_heads)
        self.norm2 = None if context_dim is None else nn.LayerNorm(channels)
        self.ff = FeedForward(channels)
        self.norm3 = nn.LayerNorm(channels)
        self.number = 0                                                      # its place in KeysValues, set by the UNet

    def forward(self, x: Tensor, pose: KeysValues) -> Tensor:
        y = self.norm1(x)
        x = x + self.attn1(y, *self.attn1.keys_values(y))
        if self.attn2 is not None:
            x = x + self.attn2(self.norm2(x), *pose[self.number])
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """x [B, C, h, w], the pose's keys and values -> [B, C, h, w]: x plus transformer blocks over pixels as tokens."""

    def __init__(self, channels: int, context_dim: int | None, num_heads: int, depth: int):
        super().__init__()
        self.norm = GroupNorm(NORM_GROUPS, channels, eps=1e-6)               # the reference's eps, here only
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, context_dim, num_heads) for _ in range(depth))
        self.proj_out = zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor, pose: KeysValues) -> Tensor:
        y = self.proj_in(self.norm(x))                                       # [B, C, h, w]
        # Both moves are free views of a channels_last tensor, forward and backward.
        y = y.permute(0, 2, 3, 1).flatten(1, 2)                              # [B, L, C]
        for block in self.transformer_blocks:
            y = block(y, pose)
        y = y.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)                  # [B, C, h, w]
        return x + self.proj_out(y)


class Stage(nn.Sequential):
    """A step of the U: hands the timestep to its ResBlocks and the pose to its SpatialTransformers."""

    def forward(self, x: Tensor, emb: Tensor, pose: KeysValues, skip: Tensor | None = None) -> Tensor:
        if skip is not None:                                                 # here, or checkpoints would keep copies
            x = torch.cat([x, skip], dim=1)
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, pose)
            else:
                x = layer(x)
        return x


class UNet(nn.Module):
    """eps = UNet(config)(x, t, context, concat). Call .to(memory_format=torch.channels_last) once for speed.

    With `checkpointing` set, training keeps what flows between the Stages alone and computes the inside of each again
    in the backward pass (arXiv:1604.06174): a third more time for a fraction of the memory, and the same numbers.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        self.checkpointing = False
        M, E = config.model_channels, EMBED_MULT * config.model_channels
        levels = len(config.channel_mult)

        def res(in_channels: int, out_channels: int) -> ResBlock:
            return ResBlock(in_channels, E, out_channels, config.dropout)

        def transformer(channels: int) -> SpatialTransformer:
            return SpatialTransformer(channels, config.context_dim, config.num_heads, config.transformer_depth)

        self.time_embed = nn.Sequential(nn.Linear(M, E), nn.SiLU(), nn.Linear(E, E))

        C = M
        self.input_blocks = nn.ModuleList([Stage(nn.Conv2d(config.in_channels, M, 3, padding=1))])
        skips = [M]                                                          # widths, pushed going down
        for level, mult in enumerate(config.channel_mult):
            attends = 2 ** level in config.attention_resolutions
            for _ in range(config.num_res_blocks):
                layers = [res(C, mult * M)]
                C = mult * M
                if attends:
                    layers.append(transformer(C))
                self.input_blocks.append(Stage(*layers))
                skips.append(C)
            if level < levels - 1:
                self.input_blocks.append(Stage(Downsample(C)))
                skips.append(C)

        self.middle_block = Stage(res(C, C), transformer(C), res(C, C))

        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(config.channel_mult))):
            attends = 2 ** level in config.attention_resolutions
            for i in range(config.num_res_blocks + 1):                       # one more: the Downsample's skip
                layers = [res(C + skips.pop(), mult * M)]                    # popped going up
                C = mult * M
                if attends:
                    layers.append(transformer(C))
                if level and i == config.num_res_blocks:
                    layers.append(Upsample(C))
                self.output_blocks.append(Stage(*layers))
        assert not skips, f"{len(skips)} skips left over"

        self.out = nn.Sequential(
            GroupNorm(NORM_GROUPS, C), nn.SiLU(), zero(nn.Conv2d(C, config.out_channels, 3, padding=1)))
        # In the order in which forward comes by; in a plain list, for each has its name already.
        self.transformers = [module for module in self.modules() if isinstance(module, TransformerBlock)]
        for number, block in enumerate(self.transformers):
            block.number = number

    def keys_values(self, context: Tensor | None) -> KeysValues:
        """What every cross-attention makes of context [B, N, D]; forward takes it in place of context: equal result.

        Empty for a UNet without cross-attention, whose context is None. ValueError for a wrong shape.
        """
        self._check_context(context)
        return [] if context is None else [block.attn2.keys_values(context) for block in self.transformers]

    def forward(self, x: Tensor, t: Tensor, context: Tensor | KeysValues | None = None,
                concat: Tensor | None = None) -> Tensor:
        """x [B, C, h, w], t [B] integers, context [B, N, D], concat [B, K, h, w] -> eps [B, out, h, w].

        context may be what `keys_values` made of it. ValueError when a shape does not fit the config, or h or w does
        not halve evenly at every level.
        """
        self._check(x, t, concat)
        pose = context if isinstance(context, list) else self.keys_values(context)
        self._check_pose(pose, B=x.shape[0])
        if concat is not None:
            x = torch.cat([x, concat.to(x.dtype)], dim=1)                    # [B, in_channels, h, w]
        # Everything after this line stays channels_last: bf16 convolutions are up to 15 times slower without.
        h = x.contiguous(memory_format=torch.channels_last)
        emb = self.time_embed(timestep_embedding(t, self.config.model_channels).to(x.dtype))  # [B, E]
        skips = []
        for block in self.input_blocks:
            h = self._run(block, h, emb, pose)
            skips.append(h)
        h = self._run(self.middle_block, h, emb, pose)
        for block in self.output_blocks:
            h = self._run(block, h, emb, pose, skips.pop())
        return self.out(h)

    def _run(self, stage: Stage, *args: Tensor | KeysValues) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(stage, *args, use_reentrant=False)
        return stage(*args)

    def _check(self, x: Tensor, t: Tensor, concat: Tensor | None) -> None:
        if x.ndim != 4:
            raise ValueError(f"x has shape {list(x.shape)}; it must be [B, C, h, w]")
        B, C, h, w = x.shape
        multiple = 2 ** (len(self.config.channel_mult) - 1)
        if h % multiple or w % multiple:
            raise ValueError(f"x is {h} x {w} pixels; both must be multiples of {multiple}, "
                             f"for this U halves them {len(self.config.channel_mult) - 1} times")
        if t.shape != (B,):
            raise ValueError(f"t has shape {list(t.shape)}; it must be [{B}], one timestep for each sample of x")
        if concat is not None and (concat.ndim != 4 or concat.shape[0] != B or concat.shape[2:] != x.shape[2:]):
            raise ValueError(f"concat has shape {list(concat.shape)}; it must be [{B}, K, {h}, {w}] as x is")
        K = 0 if concat is None else concat.shape[1]
        if C + K != self.config.in_channels:
            raise ValueError(f"x has {C} channels and concat {K}, {C + K} together; "
                             f"this UNet takes in_channels = {self.config.in_channels}")

    def _check_context(self, context: Tensor | None) -> None:
        D = self.config.context_dim
        if D is None:
            if context is not None:
                raise ValueError(f"context of shape {list(context.shape)} was given, but context_dim is None: "
                                 "this UNet has no cross-attention and takes none")
        elif context is None:
            raise ValueError(f"context is missing; this UNet has context_dim = {D} and needs [B, N, {D}]")
        elif context.ndim != 3 or context.shape[2] != D:
            raise ValueError(f"context has shape {list(context.shape)}; it must be [B, N, {D}], "
                             f"for this UNet has context_dim = {D}")

    def _check_pose(self, pose: KeysValues, B: int) -> None:
        layers = 0 if self.config.context_dim is None else len(self.transformers)
        if len(pose) != layers:
            raise ValueError(f"context has keys and values of {len(pose)} cross-attentions; this UNet has {layers}")
        if pose and pose[0][0].shape[0] != B:
            raise ValueError(f"context has {pose[0][0].shape[0]} samples and x has {B}; they must have equally many")
