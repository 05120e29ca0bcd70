"""How fast is a training step, beside diffusers' and beside what this machine can do?

    python benchmarks/speed.py unet                 UNet of danbooru: forward, backward, AdamW
    python benchmarks/speed.py vq --batch 2         VQ-f4, 256 pixels: same, L1 + codebook loss
    python benchmarks/speed.py sample               one guided step, twice the batch in the network
    python benchmarks/speed.py vq --batch 1 --turns 1 --cases ours/eager/bf16         a quick try

A case is LIBRARY/MODE/DTYPE: ours or diffusers / eager, channels_last, checkpointing (ours) or
compile (these two are channels_last) / float32, bf16 or fp16 (autocast; fp16 with a GradScaler).
`--cases` names them; the first is what the others are compared with. Cases take turns; times are
medians. The utilisation is the network's own arithmetic (torch.utils.flop_counter) a second over
that of a large matmul of the same dtype in the same run. Each mode of a library has weights of its
own, 3.3 GB with the optimiser's state.

diffusers (a development extra: pip install diffusers) is needed for its cases alone. Its
UNet2DConditionModel below has the very same 206,194,243 parameters, and its VQModel the same 55
million.
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
import checkpoint  # noqa: E402
from benchmarks.tables import write  # noqa: E402
from benchmarks.timing import in_turns, medians  # noqa: E402
from engine.cpu import use_fast_norms  # noqa: E402
from unet import UNet, UNetConfig  # noqa: E402
from vq import VQConfig, VQModel  # noqa: E402

UNET, VQ = UNetConfig(), VQConfig()                 # preset danbooru
LATENT, PICTURE = 64, 256                           # sides, of latents and images
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MODES = {"ours": ("eager", "channels_last", "checkpointing", "compile"),
         "diffusers": ("eager", "channels_last", "compile")}
CPU_CASES = ["diffusers/eager/float32", "diffusers/eager/bf16", "ours/channels_last/float32",
             "ours/channels_last/bf16"]
LR = 1e-5                                           # of AdamW; any will do


def ceiling(device: str, dtype: torch.dtype, turns: int = 8) -> float:
    """FLOP/s of a large matmul: the most that this machine was seen to do."""
    n = 8192 if device.startswith("cuda") else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n ** 3 / min(in_turns({"matmul": lambda: a @ b}, turns, device)["matmul"])


# --------------------------------------------------------------------------------------- the work

def build(work: str, library: str) -> nn.Module:
    """The network of "unet", "vq" or "sample", ours or diffusers' of the same size."""
    if library == "ours":
        return VQModel(VQ) if work == "vq" else UNet(UNET)
    import diffusers
    if work != "vq":
        return diffusers_unet(UNET, LATENT)
    levels = len(VQ.ch_mult)
    return diffusers.VQModel(
        block_out_channels=[VQ.ch * m for m in VQ.ch_mult], layers_per_block=VQ.num_res_blocks,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels, latent_channels=VQ.z_channels,
        vq_embed_dim=VQ.embed_dim, num_vq_embeddings=VQ.n_embed, sample_size=PICTURE)


def diffusers_unet(c: UNetConfig, side: int) -> nn.Module:
    """diffusers' UNet of the same layout and size; its attention_head_dim is the number of
    heads."""
    import diffusers
    attends = [2 ** level in c.attention_resolutions for level in range(len(c.channel_mult))]
    unet = diffusers.UNet2DConditionModel(
        sample_size=side, in_channels=c.in_channels, out_channels=c.out_channels,
        block_out_channels=[c.model_channels * m for m in c.channel_mult],
        layers_per_block=c.num_res_blocks, attention_head_dim=c.num_heads,
        down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        cross_attention_dim=c.context_dim or 1)
    if c.context_dim is None:           # diffusers knows no UNet without cross-attention
        for block in unet.modules():
            if hasattr(block, "attn2"):
                block.attn2 = block.norm2 = None
    return unet


def inputs(work: str, batch: int, device: str) -> dict[str, Tensor]:
    """What goes into the network, the same for both libraries; a guided sampling step has every
    sample twice."""
    if work == "vq":
        return {"x": torch.rand(batch, 3, PICTURE, PICTURE, device=device) * 2 - 1}
    batch = 2 * batch if work == "sample" else batch
    return {"x": torch.randn(batch, UNET.in_channels, LATENT, LATENT, device=device),
            "t": torch.randint(1000, (batch,), device=device),
            "context": torch.rand(batch, 1, UNET.context_dim, device=device)}


def loss_of(work: str, library: str, model: nn.Module, x: Tensor, **rest: Tensor) -> Tensor:
    """Forward, to the loss that the stage trains on."""
    if work == "vq":
        x_hat, codebook_loss = (model(x)[:2] if library == "ours" else
                                model(x, return_dict=False))
        return (x_hat.float() - x).abs().mean() + codebook_loss
    return F.mse_loss(eps_of(library, model, x, **rest).float(), x)


def eps_of(library: str, model: nn.Module, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
    if library == "ours":
        return model(x, t, context)
    return model(x, t, context, return_dict=False)[0]


def flops(work: str, library: str, device: str) -> int:
    """Multiplications and additions for one image: forward and backward, or both halves of a
    guided step."""
    model, one = build(work, library).to(device), inputs(work, 1, device)
    # The counter does not know the fused attention of every device, but it knows matmuls.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        if work == "sample":
            with torch.no_grad():
                eps_of(library, model, **one)
        else:
            loss_of(work, library, model, **one).backward()
    return counter.get_total_flops()


def steps(work: str, cases: list[str], batch: int, device: str) -> dict[str, Callable[[], object]]:
    """One call of each is one step of that case."""
    data, networks, found = inputs(work, batch, device), {}, {}
    for case in cases:
        library, mode, dtype = case.split("/")
        if (library, mode) not in networks:
            torch.manual_seed(0)
            model = build(work, library).to(device)
            if library == "ours" and device == "cpu":
                use_fast_norms(model)
            if mode != "eager":
                model = model.to(memory_format=torch.channels_last)
            if mode == "checkpointing":
                model.checkpointing = True
            opt = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
            model = torch.compile(model) if mode == "compile" else model
            networks[library, mode] = model, opt
        make = sampling_step if work == "sample" else training_step
        found[case] = make(work, library, *networks[library, mode], dtype, data, device)
    return found


def training_step(work: str, library: str, model: nn.Module, opt: torch.optim.Optimizer, dtype: str,
                  data: dict[str, Tensor], device: str) -> Callable[[], object]:
    scaler = torch.amp.GradScaler(torch.device(device).type, enabled=dtype == "fp16")

    def step() -> None:
        with autocast(dtype, device):
            loss = loss_of(work, library, model, **data)
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad(set_to_none=True)

    return step


def sampling_step(work: str, library: str, model: nn.Module, opt: torch.optim.Optimizer, dtype: str,
                  data: dict[str, Tensor], device: str) -> Callable[[], object]:
    def step() -> None:
        with torch.no_grad(), autocast(dtype, device):
            eps_of(library, model, data["x"], data["t"], data["context"])

    return step


def autocast(dtype: str, device: str) -> AbstractContextManager:
    return checkpoint.autocast("off" if dtype == "float32" else dtype, device)


# ------------------------------------------------------------------------------------ the measures

def compare(args: argparse.Namespace) -> None:
    works = steps(args.work, args.cases, args.batch, args.device)
    times = medians(works, args.turns, args.device)
    libraries, _, dtypes = (dict.fromkeys(column)
                            for column in zip(*(case.split("/") for case in times), strict=True))
    most = {dtype: ceiling(args.device, DTYPES[dtype]) for dtype in dtypes}
    count = {library: args.batch * flops(args.work, library, args.device) for library in libraries}
    print(f"{args.work}, batch {args.batch}, {args.device}, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}, median of {args.turns}; matmul ceiling "
          + ", ".join(f"{dtype} {rate / 1e9:.0f} GFLOP/s" for dtype, rate in most.items()))
    print("| case | s | times as fast as the first | GFLOP | GFLOP/s | of the ceiling |\n"
          + "|---" * 6 + "|")
    rows = {}
    for case, took in times.items():
        library, _, dtype = case.split("/")
        rate = count[library] / took
        rows[case] = {"seconds": took, "gflop_s": rate / 1e9, "of_ceiling": rate / most[dtype],
                      "times": times[args.cases[0]] / took}
        print(f"| {case} | {took:.3f} | {times[args.cases[0]] / took:.2f} "
              f"| {count[library] / 1e9:.0f} | {rate / 1e9:.0f} | {rate / most[dtype]:.0%} |",
              flush=True)
    if args.out:
        write(args.out, rows)


# ------------------------------------------------------------------------------------ command line

def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("work", choices=("unet", "vq", "sample"))
    add("--batch", type=int, default=4, help="images a step (default %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    add("--turns", type=int, default=5, help="(default %(default)s)")
    add("--cases", nargs="+", metavar="CASE", help=f"default on a CPU: {' '.join(CPU_CASES)}; on a "
        "GPU every library, mode and dtype")
    add("--out", help="a .json for benchmarks/tables.py")
    args = parser.parse_args(argv)
    args.device = checkpoint.find_device(args.device)
    cuda = args.device.startswith("cuda")
    every = [f"{library}/{mode}/{dtype}" for library, modes in reversed(MODES.items())
             for dtype in DTYPES for mode in modes if cuda or dtype != "fp16"]
    args.cases = args.cases or (every if cuda else CPU_CASES)
    for case in args.cases:
        if case not in every:
            parser.error(f"--cases has {case}; on {args.device} there are {', '.join(every)}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")              # as train.py does
        torch.backends.cudnn.benchmark = True
    compare(args)


if __name__ == "__main__":
    main()
