"""Everything that needs a GPU, in one command of about 8 minutes on an H200.

    python benchmarks/gpu.py --out DIR
    python benchmarks/gpu.py --out DIR --device cpu --presets toy --steps 4     a rehearsal

1. Trains both stages of each preset on procedural figures, in float32, bf16 and fp16 with
   GradScaler, and in bf16 with --compile: loss beside that of float32, images/s, peak memory.
2. Kills a run of stage 2 with SIGKILL, resumes it, and compares its last loss with that of the run
   that was left alone.
3. Times sampling with the model of the last preset.
`python benchmarks/speed.py` has the share of the measured matmul rate, case by case.

The perceptual loss is off: its weights would have to be downloaded. Writes DIR/gpu.json.
"""
from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from engine.run import read_log  # noqa: E402

MODES = {"float32": ("--amp", "off"), "bf16": ("--amp", "bf16"), "fp16": ("--amp", "fp16"),
         "bf16, compiled": ("--amp", "bf16", "--compile")}


def command(stage: str, preset: str, out: Path, args: argparse.Namespace, *more: str) -> list[str]:
    flags = ["--stage", stage, "--preset", preset, "--data", args.data, "--device", args.device,
             "--steps", str(args.steps), "--eval-every", str(args.steps), "--out", str(out), *more]
    if stage == "vq":
        flags += ["--perceptual", "off"]
    return [sys.executable, str(ROOT / "train.py"), *flags]


def train(stage: str, preset: str, out: Path, args: argparse.Namespace, *more: str) -> dict:
    """Trains, and returns what the log and the terminal say of it."""
    began = time.monotonic()
    done = subprocess.run(command(stage, preset, out, args, *more), text=True, capture_output=True)
    row = {"stage": stage, "preset": preset, "seconds": time.monotonic() - began}
    if done.returncode:
        return row | {"failed": done.stderr.strip().splitlines()[-1]}
    rows = read_log(out / "log.jsonl")
    losses = [r["loss"] for r in rows if "loss" in r]
    speeds = [r["img_s"] for r in rows if "img_s" in r]
    memory = re.search(r"([\d.]+) GiB at its peak", done.stdout)
    return row | {"losses": losses, "images_per_second": max(speeds, default=None),
                  "peak_gib": float(memory[1]) if memory else None}


def compare_modes(stage: str, preset: str, args: argparse.Namespace, vq: Path | None) -> list[dict]:
    rows, reference = [], None
    for mode, flags in MODES.items():
        if args.device == "cpu" and mode not in ("float32", "bf16"):
            continue
        out = args.out / f"{preset}-{stage}-{mode.replace(', ', '-')}"
        row = train(stage, preset, out, args, *flags, *(("--vq", str(vq)) if vq else ()))
        row["mode"] = mode
        if "losses" in row:
            reference = reference or row["losses"]
            row["off_float32"] = max(abs(a / b - 1) for a, b in
                                     zip(row["losses"], reference, strict=True))
        print(row, flush=True)
        rows.append(row)
    return rows


def kill_and_resume(preset: str, vq: Path, args: argparse.Namespace) -> dict:
    """The relative difference of the last loss between a killed and an uninterrupted run."""
    last = []
    for name in ("whole", "killed"):
        out = args.out / name
        flags = "--vq", str(vq), "--keep-every", str(max(1, args.steps // 4))
        if name == "killed":
            process = subprocess.Popen(command("ldm", preset, out, args, *flags),
                                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while not (out / "last.pt").exists() and process.poll() is None:
                time.sleep(0.05)
            process.send_signal(signal.SIGKILL)
            process.wait()
        subprocess.run(command("ldm", preset, out, args, *flags), check=True, capture_output=True)
        last.append([r["loss"] for r in read_log(out / "log.jsonl") if "loss" in r][-1])
    row = {"killed and resumed, last loss off by": abs(last[1] / last[0] - 1)}
    print(row, flush=True)
    return row


def sampling(model: Path, args: argparse.Namespace) -> dict:
    began = time.monotonic()
    subprocess.run([sys.executable, str(ROOT / "sample.py"), "--common", "4", "-n", "4", "--ckpt",
                    str(model), "--device", args.device, "--out", str(args.out / "sample.png")],
                   check=True, capture_output=True)
    row = {"16 images, with the start of Python": time.monotonic() - began}
    print(row, flush=True)
    return row


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder for the runs")
    parser.add_argument("--device", default="cuda", help="(default %(default)s)")
    parser.add_argument("--presets", nargs="+", default=["base", "danbooru"])
    parser.add_argument("--steps", type=int, default=200, help="of each run (default %(default)s)")
    parser.add_argument("--data", default="figures:512", help="(default %(default)s)")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name() if args.device.startswith("cuda") else "cpu"
    report = {"device": name, "torch": torch.__version__, "steps": args.steps, "rows": []}
    print(report, flush=True)
    for preset in args.presets:
        report["rows"] += compare_modes("vq", preset, args, None)
        vq = args.out / f"{preset}-vq-float32" / "last.pt"
        report["rows"] += compare_modes("ldm", preset, args, vq)
    report["resume"] = kill_and_resume(preset, vq, args)
    report["sampling"] = sampling(args.out / "whole" / "last.pt", args)
    (args.out / "gpu.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
