"""Checkpoints: what is in a file, how it is saved safely, and how a model is built from it.

    python checkpoint.py runs/ldm/last.pt mine.pt       a small file to share, in half precision

A file holds tensors and primitives only and is loaded with weights_only=True, so opening it runs no
code. Published CompVis files (.ckpt of PyTorch Lightning) also name foreign classes;
formats/compvis.py imports none of them and converts the file to the same payload.

    {"format": 1, "stage": "vq" | "ldm", "step": k, "config": {...}, "vq": state dict,
     "vq_config": {...}, "train": {...}, and for ldm: "unet", "unet_config", "cond", "cond_config",
     "mean", "std", "schedule", "knows_null", and "poses", which older files lack; with labels
     also "pose_labels" [N], and their names in "config"}

"unet" and "cond" are the EMA weights; "train" has the raw weights, the optimiser and what else a
resumed run needs. A stage-2 file contains its frozen VQ, the latent statistics and up to 4096
training poses (float16 [N, 17, 3]): one file is enough to sample. The payload of a published file
also has "source": "CompVis" and "weights": "EMA" | "raw", and no "train".
"""
from __future__ import annotations

from engine import startup  # before all others: it checks the versions

# isort: split
import argparse
import hashlib
import math
import os
import pickle
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from keypoints import ConditionConfig
from ldm import LDM
from unet import UNetConfig
from vq import VQConfig, VQModel

FORMAT = 1
NEEDED = {"vq": {"stage", "step", "config", "vq", "vq_config"}}
NEEDED["ldm"] = NEEDED["vq"] | {"unet", "unet_config", "cond", "cond_config", "mean", "std",
                                "schedule", "knows_null"}
HOW_TO_MAKE = {"vq": "python train.py --stage vq", "ldm": "python train.py --stage ldm"}
VQ_PART = ("config", "step", "vq", "vq_config", "source", "weights")
AMP = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}     # --amp
ASSETS = Path(__file__).resolve().parent / "assets"
AGES = (86400, "day"), (3600, "hour"), (60, "minute"), (1, "second")
SIZES = range(8, 4097)              # of images, pixels


class WrongStage(ValueError):
    """A valid checkpoint of the other stage."""


# ----------------------------------------------------------------------------- device and precision

def find_device(name: str) -> str:
    """auto -> cuda where there is one, else cpu; ValueError for a device that is not there."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    found = ["cpu", "cuda", *gpus] if gpus else ["cpu"]
    if name == "auto":
        return "cuda" if gpus else "cpu"
    if name not in found:
        raise ValueError(f"--device is {name}; use auto or what torch finds: {', '.join(found)}")
    return name


def has_bf16(device: str) -> bool:
    """Does the hardware compute in bf16? Emulated bf16 is slower than float32."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()     # private


def find_amp(amp: str, device: str) -> str:
    """auto -> bf16 where the hardware computes in it, fp16 on an older GPU, else off."""
    cuda = device.startswith("cuda")
    if amp == "fp16" and not cuda:
        raise ValueError("--amp fp16 needs a CUDA GPU; use --amp bf16 or off")
    if amp != "auto":
        return amp
    return "bf16" if has_bf16(device) else "fp16" if cuda else "off"


def autocast(amp: str, device: str | torch.device) -> AbstractContextManager:
    """torch.autocast on a device, in the precision that AMP gives for the name."""
    return torch.autocast(torch.device(device).type, dtype=AMP[amp], enabled=amp != "off")


def out_of_memory(e: RuntimeError) -> bool:
    """Did memory run out? torch has an exception class for a GPU's memory, but not for a CPU's."""
    return isinstance(e, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(e)


# ------------------------------------------------------------------------------------------- saving

@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write under a temporary name; it gets its name once it is complete and on the disk.

    Through a kill or a power cut `path` is always the old file or the new one. An OSError (disk
    full, folder not writable) leaves the old file.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
        with suppress(OSError):     # so that the name survives a power cut; not on Windows
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except OSError as e:            # a failed write does not name its file
        raise OSError(e.errno, e.strerror or str(e), str(path)) from None
    finally:
        with suppress(OSError):     # the disk itself may have failed
            partial.unlink(missing_ok=True)


def save(path: str | Path, payload: dict) -> None:
    """Write `payload` with `replacing`; OSError as there."""
    with replacing(path) as f:
        try:
            torch.save(payload, f)
        except RuntimeError as e:   # torch's zip writer hides "disk full" behind its own error
            if isinstance(e.__context__, OSError):
                raise e.__context__ from None
            raise


# ------------------------------------------------------------------------------------------ loading

def load(path: str | Path, stage: str, advice: str | None = None, preset: str | None = None,
         ema: bool = True) -> dict:
    """The payload of a checkpoint of `stage` ("vq" or "ldm") on the CPU; ValueError otherwise.

    Opens our files and published CompVis files. A published stage-2 file needs a `preset` of
    PUBLISHED; for stage "vq" its first stage is returned. `ema` False puts the raw weights where
    the payload has the EMA weights. `advice` replaces the end of the WrongStage message.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no checkpoint {path}; name a file such as runs/ldm/last.pt, or "
                         f"make one with: {HOW_TO_MAKE[stage]} (and your --data and --preset)")
    payload = read(path)
    if not isinstance(payload, dict) or "format" not in payload:
        from formats.compvis import published
        return published(payload, path, stage, advice, preset, ema)
    if payload["format"] != FORMAT:
        raise ValueError(f"{path} has format {payload['format']}; this version loads {FORMAT}")
    if (found := payload.get("stage")) != stage:
        del payload                 # else the exception's traceback would keep it in memory
        raise WrongStage(f"{path} is a checkpoint of stage {found}, but stage {stage} is needed; "
                         + (advice or f"make it with: {HOW_TO_MAKE[stage]}"))
    if missing := NEEDED[stage] - payload.keys():
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}; it was made by an older "
                         "version, so train again")
    if stage == "ldm" and not ema:
        if "train" not in payload:
            raise ValueError(f"{path} holds the EMA weights only; for the raw weights, use the "
                             "last.pt of its run")
        payload |= {name: payload["train"][name] for name in ("unet", "cond")}
    config, states = payload["config"], [payload.get(name, {}) for name in ("vq", "unet", "cond")]
    if not (isinstance(config, dict) and config.get("size") in SIZES and all(
            isinstance(state, dict) and all(isinstance(v, Tensor) for v in state.values())
            for state in states)):
        raise ValueError(f"{path} is damaged: its config or its weights are not what they should "
                         "be; use another checkpoint")
    for state in states:
        check_bytes(state, path)
    return payload


def load_vq(path: str | Path, ema: bool = True, say: Callable[[str], None] = print) -> dict:
    """The autoencoder's part of a stage-1 checkpoint, or of a stage-2 one: no UNet, no optimiser.

    `say` gets one line about a published file. `ema` is about a published first stage; that of a
    stage-2 file has no EMA.
    """
    try:
        payload = load(path, "vq", ema=ema)
    except WrongStage:
        payload = load(path, "ldm")
    if "source" in payload:
        from formats.compvis import describe
        say(describe(payload, path))
    return {key: payload[key] for key in VQ_PART if key in payload}


def read(path: str | Path) -> object:
    """The content of a file, on the CPU, without running any code; ValueError if it cannot be read.

    A zip file that is refused for its foreign classes is read with `compvis.Inert` for each.
    """
    from formats.compvis import Refused, check_archive, load_inert
    path = Path(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")         # the one sentence below replaces torch's pages
        try:
            with open(path, "rb") as file:
                zipped = file.read(4) == b"PK\x03\x04"
            if zipped:
                check_archive(path)
            try:
                return torch.load(path, map_location="cpu", weights_only=True)
            except pickle.UnpicklingError:      # it names foreign classes
                if not zipped:
                    raise
                return load_inert(path)
        except Refused as e:
            raise ValueError(f"refusing to load {path}: {e}") from None
        except Exception as e:                  # torch, pickle and zipfile raise a dozen classes
            raise ValueError(f"{path} cannot be read as a checkpoint: it is empty, cut short, "
                             "another kind of file, or holds more than tensors and plain values "
                             f"({type(e).__name__})") from None


def check_bytes(state: dict[str, Tensor], path: Path) -> None:
    """ValueError for tensors larger than the file, such as one number expanded to terabytes."""
    left = path.stat().st_size
    for name, tensor in state.items():
        left -= tensor.numel() * tensor.element_size()
        if left < 0:
            raise ValueError(f"{path} does not hold as many numbers as its tensors say; {name} has "
                             f"shape {tuple(tensor.shape)}")


# ------------------------------------------------------------------------------ models and payloads

def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], float]:
    """An argparse type: a number of that kind from low to high."""
    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            bounds = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
            raise argparse.ArgumentTypeError(f"{text} is given, but it must be {bounds}")
        return value
    parse.__name__ = kind.__name__                          # argparse then says: invalid int value
    return parse


def plural(n: float, what: str) -> str:
    """1, "image" -> "1 image"; 2000, "image" -> "2,000 images"."""
    return f"{n:,g} {what}" + ("" if n == 1 else "s")


def dated(path: str | Path, step: int) -> str:
    """A checkpoint by name, step and age: "runs/vq/last.pt (step 600, 3 minutes old)". A bundled
    one has no age: its file is as old as the clone."""
    if Path(path).resolve().parent == ASSETS:
        return f"{path} (step {step:,})"
    age = max(0.0, time.time() - Path(path).stat().st_mtime)
    seconds, unit = next(((n, unit) for n, unit in AGES if age >= n), AGES[-1])
    return f"{path} (step {step:,}, {plural(int(age / seconds), unit)} old)"


def hash_of(state: dict[str, Tensor]) -> str:
    """16 hex digits that change whenever a name, shape, dtype or value in a state dict does."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def not_finite(value: object, name: str = "") -> str | None:
    """The name of the first tensor in nested dicts that holds a NaN or an infinity."""
    if isinstance(value, dict):
        inside = (not_finite(v, f"{name}.{k}" if name else str(k)) for k, v in value.items())
        return next(filter(None, inside), None)
    return name if isinstance(value, Tensor) and not torch.isfinite(value).all() else None


def fill(model: nn.Module, state: dict[str, Tensor], what: str) -> None:
    """load_state_dict(strict=True) with a short error message."""
    check_fits(model, state, what)
    model.load_state_dict(state, strict=True)


def state_of(parts: dict) -> dict:
    """The training state of named parts: modules, optimisers, a scaler, a monitor."""
    return {name: part.state_dict() for name, part in parts.items()}


def restore(parts: dict, state: dict, where: Path) -> None:
    """Puts `state_of` back; ValueError where a network of the file has other shapes."""
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            fill(part, state[name], f"{where}: {name}")
        else:
            part.load_state_dict(state[name])


def take(model: nn.Module, state: dict[str, Tensor], path: str | Path) -> list[str]:
    """Copies what fits of a state dict into `model`. Returns the names of its tensors that start
    fresh, with both shapes where the file has another; ValueError where nothing fits."""
    own = model.state_dict()
    fits = {name: state[name] for name in own
            if name in state and state[name].shape == own[name].shape}
    if not fits:
        raise ValueError(f"nothing in {path} fits this network; give a checkpoint of the same "
                         "preset")
    if name := not_finite(fits):
        raise ValueError(f"{path} has values in {name} that are not finite; use another checkpoint")
    model.load_state_dict(fits, strict=False)
    return [f"{name} (there {list(state[name].shape)}, here {list(own[name].shape)})"
            if name in state else name for name in own if name not in fits]


def take_ldm(ldm: LDM, payload: dict, path: str | Path, names: Collection[str]) -> list[str]:
    """`take` of a stage-2 payload, with the labels by their names. Returns what starts fresh."""
    state = {f"{part}.{name}": tensor for part in ("unet", "cond")
             for name, tensor in payload[part].items()}
    known, rows = label_names(payload, path), state.pop("unet.label_emb.weight", None)
    new = []
    if names:
        emb = ldm.unet.label_emb.weight.detach().clone()
        for i, name in enumerate(names):
            if name in known and rows.shape[1] == emb.shape[1]:
                emb[i] = rows[known.index(name)]
            else:
                new.append(f"label {name}")
        state["unet.label_emb.weight"] = emb
    return take(nn.ModuleDict({"unet": ldm.unet, "cond": ldm.cond}), state, path) + new


def check_fits(model: nn.Module, state: dict[str, Tensor], what: str) -> None:
    """ValueError that names the first keys that differ, with both shapes."""
    own = model.state_dict()
    wrong = [f"{k}: file {tuple(state[k].shape) if k in state else 'lacks it'}, "
             f"model {tuple(own[k].shape) if k in own else 'lacks it'}"
             for k in [*own, *(k for k in state if k not in own)]
             if k not in own or k not in state or own[k].shape != state[k].shape]
    if wrong:
        raise ValueError(f"{what} does not fit its configuration in {plural(len(wrong), 'place')}, "
                         f"first {'; '.join(wrong[:3])}")


def build(make: Callable[[], nn.Module], state: dict[str, Tensor], what: str) -> nn.Module:
    """make() with the weights `state`.

    The model is first made on the meta device, without memory: a small file that claims to be a
    wide or deep network is refused before anything is allocated.
    """
    left = 2 * len(state)

    def count(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError("it is much deeper than the weights in the file")

    with torch.device("meta"), register_module_parameter_registration_hook(count):
        try:
            empty = make()
        except (ValueError, TypeError, RuntimeError) as e:
            reason = str(e).splitlines()[0]
            raise ValueError(f"{what} describes a network that cannot be made: {reason}") from None
        check_fits(empty, state, what)
    if name := not_finite(state):
        raise ValueError(f"{what} has values in {name} that are not finite; use another checkpoint")
    model = make()
    model.load_state_dict(state, strict=True)
    return model


OLD_NAMES = {"doors": "conditioning"}       # of fields, in older files of format 1
DROPPED = {"beta"}                          # fields of older files; nothing ever set another value


def config_of(kind: type, payload: dict, name: str, what: str) -> object:
    """payload[name] as a configuration of class `kind`."""
    try:
        fields = {OLD_NAMES.get(key, key): value for key, value in dict(payload[name]).items()
                  if key not in DROPPED}
        return kind(**fields)
    except (TypeError, ValueError) as e:
        raise ValueError(f"{what} has a {name} that this version does not know: {e}") from None


def build_vq(payload: dict, what: str) -> VQModel:
    """The autoencoder of a payload of either stage, frozen and in eval mode."""
    config = config_of(VQConfig, payload, "vq_config", what)
    model = build(lambda: VQModel(config), payload["vq"], what)
    return model.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def build_ldm(payload: dict, what: str, device: str | torch.device = "cpu") -> LDM:
    """The model of a stage-2 payload, frozen, in eval mode, on `device`."""
    vq = config_of(VQConfig, payload, "vq_config", what)
    unet = config_of(UNetConfig, payload, "unet_config", what)
    cond = config_of(ConditionConfig, payload, "cond_config", what)
    mean, std = payload["mean"], payload["std"]
    weights = {f"{part}.{name}": tensor for part in ("vq", "unet", "cond")
               for name, tensor in payload[part].items()} | {"mean": mean, "std": std}
    ldm = build(lambda: LDM(VQModel(vq), unet, cond, mean, std, payload["schedule"],
                            payload["knows_null"]), weights, what)
    return ldm.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)


def load_ldm(path: str | Path, device: str | torch.device = "cpu", preset: str | None = None,
             ema: bool = True) -> tuple[LDM, dict]:
    """The model of a stage-2 checkpoint on `device`, and its payload; arguments as in `load`."""
    payload = load(path, "ldm", preset=preset, ema=ema)
    ldm = build_ldm(payload, str(path), device)
    if "source" in payload:
        ldm.spacing = "uniform"
    return ldm, payload


def ldm_payload(ldm: LDM) -> dict:
    """The model part of a stage-2 checkpoint."""
    return {"stage": "ldm", "vq": ldm.vq.state_dict(), "vq_config": asdict(ldm.vq.config),
            "unet": ldm.unet.state_dict(), "unet_config": asdict(ldm.unet.config),
            "cond": ldm.cond.state_dict(), "cond_config": asdict(ldm.cond.config),
            "mean": ldm.mean, "std": ldm.std, "schedule": ldm.schedule,
            "knows_null": ldm.supports_guidance}


def slim(payload: dict) -> dict:
    """What sampling needs of one of our stage-2 payloads, with the networks in half precision.

    The latent statistics stay in float32. ValueError for weights beyond 65504, the largest half.
    """
    small = {name: value for name, value in payload.items() if name != "train"}
    for part in ("vq", "unet", "cond"):
        small[part] = {name: tensor.half() if tensor.is_floating_point() else tensor
                       for name, tensor in payload[part].items()}
        if name := not_finite(small[part], part):
            raise ValueError(f"{name} holds numbers beyond 65504, the largest of half precision")
    return small


def label_names(payload: dict, path: str | Path) -> list[str]:
    """What the labels of a stage-2 payload are called, by number; [] without labels."""
    names = payload["config"].get("label_names", [])
    rows = payload.get("unet", {}).get("label_emb.weight", ())
    if len(names) != len(rows) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path} is damaged: it does not name its labels; use another checkpoint")
    return list(names)


def training_poses(payload: dict, path: str | Path,
                   labels: Collection[int] = ()) -> np.ndarray | None:
    """Poses [N, 17, 3] float32 from the training set of a stage-2 payload, evenly spread over it;
    those of `labels` alone, where the file has some.

    None where the file has none: published files and older ones of ours.
    """
    poses = payload.get("poses")
    if poses is None:
        return None
    damaged = ValueError(f"{path} is damaged: its training poses are not finite [N, 17, 3]; use "
                         "another checkpoint")
    if not isinstance(poses, Tensor) or poses.shape[1:] != (17, 3):
        raise damaged
    check_bytes({"poses": poses}, Path(path))
    theirs = payload.get("pose_labels", torch.full(poses.shape[:1], -1))
    if not poses.isfinite().all() or not isinstance(theirs, Tensor) or (
            theirs.shape != poses.shape[:1]):
        raise damaged
    of = torch.isin(theirs, torch.tensor(list(labels), dtype=theirs.dtype))
    poses = poses[of] if of.any() else poses
    return poses.float().numpy() if (poses[..., 2] > 0).any() else None


# -------------------------------------------------------------------------------------- the command

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Make a small file of a stage-2 checkpoint, to "
                                     "share it: EMA weights in half precision, no training state.")
    parser.add_argument("ckpt", metavar="CKPT", help="such as runs/ldm/last.pt")
    parser.add_argument("out", metavar="OUT", help="the file to write")
    parser.add_argument("--preset", help="of a published CompVis checkpoint, as in sample.py")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        payload = load(args.ckpt, "ldm", preset=args.preset)
        if Path(args.out).resolve() == Path(args.ckpt).resolve():
            raise ValueError(f"OUT is {args.out}, the checkpoint itself; give another file")
        save(args.out, slim(payload))
    except (ValueError, OSError) as e:
        print(f"checkpoint.py: {e}", file=sys.stderr)
        return 2
    print(f"{args.out}: {Path(args.out).stat().st_size / 1e6:.1f} MB, step {payload['step']}")
    return 0


if __name__ == "__main__":
    startup.run(main)
