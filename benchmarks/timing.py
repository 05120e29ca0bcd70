"""Times what is compared in turns, so that a machine which gets slower does so for all."""
from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

Work = Callable[[], object]


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def seconds(work: Work, device: str = "cpu") -> float:
    synchronize(device)
    began = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - began


def in_turns(works: dict[str, Work], turns: int, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of each work, `turns` times, all of them once before any again; one more round warms
    up."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(turns + 1):
        for name, work in works.items():
            took = seconds(work, device)
            if turn:
                times[name].append(took)
    return times


def medians(works: dict[str, Work], turns: int, device: str = "cpu") -> dict[str, float]:
    """The median seconds of each work, timed in turns."""
    return {name: statistics.median(took) for name, took in in_turns(works, turns, device).items()}
