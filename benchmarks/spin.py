"""What do spinning threads cost a training step, idle and beside busy processes?

    python benchmarks/spin.py
    python benchmarks/spin.py --steps 3 --turns 1           a quick try

A step is 8 small channels_last convolutions, forward and backward, on 2 threads: the kind of step
the toy UNet makes. Each setting runs in fresh processes, beside 0, 1 and 2 processes that do
nothing but `while True: pass`; all cases take turns. Prints median milliseconds a step.
"""
from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys

SETTINGS = {"default": {}, "GOMP_SPINCOUNT=0": {"GOMP_SPINCOUNT": "0"},
            "OMP_NUM_THREADS=1": {"OMP_NUM_THREADS": "1"}}
STEPS = """
import os, statistics, sys, time, torch
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
net = torch.nn.Sequential(*(torch.nn.Conv2d(64, 64, 3, padding=1) for _ in range(8)))
net, x = (y.to(memory_format=torch.channels_last) for y in (net, torch.randn(32, 64, 16, 16)))
times = []
for _ in range(5 + int(sys.argv[1])):                       # the first 5 warm up
    began = time.perf_counter()
    net(x).square().mean().backward()
    times.append(1000 * (time.perf_counter() - began))
print(statistics.median(times[5:]))
"""


def milliseconds(setting: dict[str, str], busy: int, steps: int) -> float:
    """The median step of a fresh process, beside `busy` busy ones."""
    env = {name: value for name, value in os.environ.items() if "OMP_" not in name} | setting
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    try:
        return float(subprocess.check_output([sys.executable, "-c", STEPS, str(steps)], env=env))
    finally:
        for other in others:
            other.kill()
            other.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="of a process (%(default)s)")
    parser.add_argument("--turns", type=int, default=3, help="processes of each case (%(default)s)")
    args = parser.parse_args()
    found = {(busy, name): [] for busy in (0, 1, 2) for name in SETTINGS}
    for _ in range(args.turns):
        for (busy, name), times in found.items():
            times.append(milliseconds(SETTINGS[name], busy, args.steps))
    print("| ms a step | " + " | ".join(SETTINGS) + " |\n" + "|---" * (1 + len(SETTINGS)) + "|")
    for busy in (0, 1, 2):
        row = [f"{statistics.median(found[busy, name]):.1f}" for name in SETTINGS]
        print(f"| {busy} busy processes beside it | " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
