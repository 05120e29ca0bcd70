"""Several processes, one GPU each, started by torchrun; in a single process all of it does nothing.

Each rank makes the same random draws for the whole batch and works on its slice, so a step does not
depend on the number of ranks. Rank 0 alone evaluates and writes files; the others wait for it in
the next step.
"""
from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

# How long ranks wait for each other, for example while one encodes the dataset. gloo notices a dead
# rank at once; with nccl torchrun ends the others within 30 s.
TIMEOUT = timedelta(hours=24)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def print0(text: str) -> None:
    """Prints once, whatever the number of ranks."""
    if rank() == 0:
        print(text, flush=True)


def complain(command: str, text: str) -> None:
    """A sentence to stderr. Each rank reports its own error; a wrong command is reported once."""
    if dist.is_initialized():
        print(f"{command}, rank {rank()} of {world()}: {text}", file=sys.stderr)
    elif os.environ.get("RANK", "0") == "0":
        print(f"{command}: {text}", file=sys.stderr)


def join(device: str, batch_size: int) -> str:
    """Joins the processes that torchrun started, if any; returns the device of this rank.
    ValueError where the batch or the GPUs cannot be shared."""
    n = int(os.environ.get("WORLD_SIZE", 1))
    if n == 1:
        return device
    if batch_size % n:
        raise ValueError(f"a batch of {batch_size} cannot be shared by {n} processes; give a "
                         f"--batch-size that {n} divides")
    if device.startswith("cuda"):
        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", n)), torch.cuda.device_count()
        if device != "cuda" or here > gpus:
            raise ValueError(f"torchrun started {here} processes for --device {device} on {gpus} "
                             "GPUs; each needs a GPU of its own: leave --device out and give "
                             f"--nproc-per-node {gpus}")
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=TIMEOUT)
    return device


def lost_rank(e: RuntimeError) -> bool:
    """Does this error mean that another rank is gone? gloo raises plain RuntimeErrors."""
    return isinstance(e, dist.DistError) or (world() > 1 and "gloo" in str(e))


class Forward(nn.Module):
    """function(*args), which uses the parameters of `module`, as a module that `parallel` wraps."""

    def __init__(self, module: nn.Module, function: Callable):
        super().__init__()
        self.module, self.function = module, function

    def forward(self, *args: object) -> object:
        return self.function(*args)


def parallel(net: nn.Module, function: Callable | None = None) -> nn.Module:
    """`net`, or a function that uses it, with gradients that are averaged over the ranks."""
    net = Forward(net, function) if function else net
    if world() == 1:
        return net
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)      # torch 2.13 deprecates what 2.11 needs
        return DistributedDataParallel(net, broadcast_buffers=False)


def gathered(x: Tensor) -> Tensor:
    """x [B, ...] of all ranks, in their order: [world B, ...]."""
    if world() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def mean_over_ranks(x: Tensor) -> Tensor:
    if world() > 1:
        dist.all_reduce(x)
        x = x / world()
    return x


def any_rank(flag: bool, device: str | torch.device) -> bool:
    """True in every rank where it is true in one."""
    if world() == 1:
        return flag
    return bool(mean_over_ranks(torch.tensor(float(flag), device=device)) > 0)


def from_rank_0(value: object) -> object:
    """A plain value, as rank 0 has it."""
    box = [value]
    if world() > 1:
        dist.broadcast_object_list(box)
    return box[0]


def barrier() -> None:
    if world() > 1:
        dist.barrier()


def micro_batches(n: int, size: int, net: nn.Module) -> Iterator[tuple[slice, float]]:
    """(slice, share) of n samples, at most `size` in each; losses times their shares add up to the
    loss of all n. The ranks exchange gradients in the backward pass of the last slice only."""
    for i in range(0, n, size):
        part = slice(i, min(i + size, n))
        exchange = part.stop == n or not isinstance(net, DistributedDataParallel)
        with nullcontext() if exchange else net.no_sync():
            yield part, (part.stop - part.start) / n
