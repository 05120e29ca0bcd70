"""Checkpoints: what stands in a file, how it is saved so that a crash cannot spoil it, and models out of files.

    python checkpoint.py runs/ldm/last.pt mine.pt       to give away: what sampling needs, in half precision

A file holds tensors and primitives only and is read with weights_only=True, so opening it runs no code. Published
CompVis files (.ckpt of PyTorch Lightning) hold objects besides; they are opened with all classes replaced by dummies,
and become the same payload, so that nothing else has to know about them.

    {"format": 1, "stage": "vq" | "ldm", "step": k, "config": {...}, "vq": state dict, "vq_config": {...},
     "train": {...}, and for ldm: "unet", "unet_config", "cond", "cond_config", "mean", "std",
     "schedule", "knows_null", and "poses", which older files lack}

"unet" and "cond" are the EMA weights; the raw weights, the optimiser and whatever else a resumed run needs stand
under "train". The ldm file carries its frozen VQ, the latent statistics and poses it was trained on (float16
[N, 17, 3]): one file is enough to sample. The payload of a published file has "source": "CompVis" and "weights":
"EMA" | "raw" besides, and no "train".
"""
from __future__ import annotations

import argparse
import hashlib
import os
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

# Before torch is imported: idle threads soon sleep instead of spinning, so the cores can be shared.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import torch
from torch import Tensor, nn

from keypoints import JOINTS, ConditionConfig
from ldm import LDM
from unet import UNetConfig
from vq import VQConfig, VQModel

FORMAT = 1
NEEDED = {"vq": {"stage", "step", "config", "vq", "vq_config"}}
NEEDED["ldm"] = NEEDED["vq"] | {"unet", "unet_config", "cond", "cond_config", "mean", "std", "schedule", "knows_null"}
HOW_TO_MAKE = {"vq": "python train.py --stage vq", "ldm": "python train.py --stage ldm"}


# What --amp computes in.
AMP = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


AGES = (86400, "day"), (3600, "hour"), (60, "minute"), (1, "second")


class WrongStage(ValueError):
    """A sound checkpoint, but of the other stage."""


def find_device(name: str) -> str:
    """auto -> cuda where there is one; ValueError for a device that is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError:
        raise ValueError(f"--device is {name!r}; use auto, cpu, cuda or cuda:N") from None
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"--device is {name!r}; use auto, cpu, cuda or cuda:N")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: torch sees no CUDA GPU on this machine; use --device cpu or leave it out")
    if kind == "cuda" and (torch.device(name).index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: there are only {torch.cuda.device_count()} GPUs, counted from cuda:0")
    return name


def has_bf16(device: str) -> bool:
    """Does the hardware compute in bf16? Emulated it is slower than float32."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()     # private, hence the guard


def autocast(amp: str, device: str | torch.device) -> AbstractContextManager:
    """torch's autocast on a device, in the precision of a name in AMP."""
    return torch.autocast(torch.device(device).type, dtype=AMP[amp], enabled=amp != "off")


def out_of_memory(e: RuntimeError) -> bool:
    """Is it that? torch has a class for a GPU's memory, but not for a CPU's."""
    return isinstance(e, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(e)


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write, under another name until it is whole and on the disk: `path` is at every moment, through a kill
    or a power cut, either the old file or the new one. OSError (full disk, unwritable folder) leaves the old one.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    except OSError as e:
        raise OSError(e.errno, e.strerror or str(e), str(path)) from None       # a failed write knows no name
    finally:
        with suppress(OSError):                     # of a disk that has failed altogether
            partial.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Makes a rename in it last through a power cut; Windows and some network file systems can sync no folder."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def save(path: str | Path, payload: dict) -> None:
    """Write `payload` so that `path` is at every moment either the old file or the whole new one; OSError as above."""
    with replacing(path) as f:
        try:
            torch.save(payload, f)
        except RuntimeError as e:       # torch's zip writer hides that the disk is full behind a sum that is wrong
            if isinstance(e.__context__, OSError):
                raise e.__context__ from None
            raise


def load(path: str | Path, stage: str, advice: str | None = None, preset: str | None = None, ema: bool = True) -> dict:
    """The payload of a checkpoint of `stage` ("vq" or "ldm"), on the CPU; ValueError in one sentence otherwise.

    Ours, or a published CompVis one, which needs a `preset` of PUBLISHED for stage 2; stage "vq" of a full stage-2
    CompVis file is its first stage. `ema` False puts the raw weights where the payload has the EMA weights. `advice`
    ends the sentence of a WrongStage.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the checkpoint in it, such as {path / 'last.pt'}")
    if not path.is_file():
        raise ValueError(f"there is no checkpoint {path}; name yours, or make one with: {HOW_TO_MAKE[stage]} (and your "
                         "--data and --preset)")
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty, 0 bytes; make a checkpoint with: {HOW_TO_MAKE[stage]}")
    payload = read(path)
    if damaged := zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():     # torch checks no checksum
        raise ValueError(f"{path} is damaged: the checksum of {damaged} in it is wrong; take another checkpoint")
    if not isinstance(payload, dict) or "format" not in payload:
        from formats.compvis import published
        return published(payload, path, stage, advice, preset, ema)
    if (type(payload["format"]), payload["format"]) != (int, FORMAT) or not NEEDED["vq"] <= payload.keys() or (
            type(payload["stage"]) is not str):
        raise ValueError(f"{path} is no checkpoint of this project in format {FORMAT}")
    if payload["stage"] != stage:
        raise WrongStage(f"{path} is a checkpoint of stage {payload['stage']}, but one of stage {stage} is needed; "
                         + (advice or f"make it with: {HOW_TO_MAKE[stage]}"))
    if lacking := NEEDED[stage] - payload.keys():
        raise ValueError(f"{path} lacks {', '.join(sorted(lacking))}, so an older version made it; train it again")
    if stage == "ldm" and not ema:
        raw = payload.get("train")
        if not isinstance(raw, dict) or not {"unet", "cond"} <= raw.keys():
            raise ValueError(f"{path} holds the EMA weights only; for the raw ones take the last.pt of its folder")
        payload |= {name: raw[name] for name in ("unet", "cond")}
    check_form(payload, stage, path)
    made_with = payload["config"].get("preset")
    if preset not in (None, made_with):
        raise ValueError(f"--preset is {preset}, but {path} was trained with preset {made_with} and needs no --preset")
    return payload


STORAGES = {"FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
            "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
            "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
            "BoolStorage": torch.bool}
PARTS = {"vq": ("vq",), "ldm": ("vq", "unet", "cond")}
SIZES = range(8, 4097)                  # of pictures, pixels
SCHEDULE = {"timesteps": int, "linear_start": float, "linear_end": float}      # and "prediction", which files may lack
MOST_TIMESTEPS = 10_000
MOST = {"ch_mult": 8, "channel_mult": 8, "num_res_blocks": 64, "transformer_depth": 16}     # levels, blocks, depth


def check_form(payload: dict, stage: str, path: Path) -> None:
    """ValueError where a payload of ours holds other kinds of values than the top of this file says, or numbers that
    are none. What the configurations mean is left to their classes."""
    for name, value, sound, wanted in demands(payload, stage):
        if not sound:
            said = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else (
                f"{type(value).__name__} {value!r:.60}")
            raise ValueError(f"{path} has {said} for {name}, but {wanted} is needed; it is damaged, take another "
                             "checkpoint")
    statistics = {name: payload[name] for name in ("mean", "std") if stage == "ldm"}
    tensors = {name: payload[name] for name in PARTS[stage]} | {"statistics": statistics}
    for state in tensors.values():
        check_bytes(state, path)
    if name := not_finite(tensors):
        raise ValueError(f"{path} has numbers in {name} that are not finite; it is damaged, take another checkpoint")


def demands(payload: dict, stage: str) -> Iterator[tuple[str, object, bool, str]]:
    """What check_form asks of each value: its name, it, is it sound, and what is. The first that is not ends it."""
    for name in ("config", *PARTS[stage], *(f"{part}_config" for part in PARTS[stage])):
        value = payload[name]
        yield name, value, isinstance(value, dict) and all(isinstance(key, str) for key in value), "a dict by names"
    for name in PARTS[stage]:
        for key, value in payload[name].items():
            yield f"{name}.{key}", value, is_array(value), "a plain tensor"
        for key, value in payload[f"{name}_config"].items():
            values = value if isinstance(value, list | tuple) else [value]
            sound = all(isinstance(v, int | float | str | None) for v in values)
            yield f"{name}_config.{key}", value, sound, "a plain value"
            if key in MOST:
                n = value if isinstance(value, int) else len(values)
                yield f"{name}_config.{key}", value, n <= MOST[key], f"at most {MOST[key]}"
    size, step = payload["config"].get("size"), payload["step"]
    yield "config.size", size, type(size) is int and size in SIZES, f"{SIZES[0]} to {SIZES[-1]} pixels"
    yield "step", step, type(step) is int, "a whole number"
    if stage == "vq":
        return
    shape_ = payload["vq_config"].get("embed_dim", VQConfig.embed_dim), 1, 1
    for name in ("mean", "std"):
        yield name, payload[name], is_array(payload[name]) and payload[name].shape == shape_, f"a tensor {list(shape_)}"
    null, schedule = payload["knows_null"], payload["schedule"]
    yield "knows_null", null, type(null) is bool, "True or False"
    yield "schedule", schedule, isinstance(schedule, dict) and schedule.get("prediction", "eps") in ("eps", "v") and (
        {k: type(v) for k, v in schedule.items() if k != "prediction"} == SCHEDULE
        and schedule["timesteps"] <= MOST_TIMESTEPS), (
        f"a dict of at most {MOST_TIMESTEPS} timesteps, linear_start and linear_end")


def is_array(value: object) -> bool:
    """Is it a tensor of a kind that networks have, in memory?"""
    return (isinstance(value, Tensor) and value.layout is torch.strided and value.device.type == "cpu"
            and value.dtype in STORAGES.values())


def check_bytes(state: dict[str, Tensor], path: Path) -> None:
    """ValueError where tensors are larger than the file: expanded out of one number, or all sharing one storage."""
    held = path.stat().st_size
    for name, tensor in state.items():
        held -= tensor.numel() * tensor.element_size()
        if held < 0:
            raise ValueError(f"{path} does not hold as many numbers as its tensors say; {name} has shape "
                             f"{tuple(tensor.shape)}")


def not_finite(value: object, name: str = "") -> str | None:
    """The name of the first tensor in nested dicts that holds a nan or an infinity."""
    if isinstance(value, dict):
        return next(filter(None, (not_finite(v, f"{name}.{k}" if name else str(k)) for k, v in value.items())), None)
    return name if isinstance(value, Tensor) and not torch.isfinite(value).all() else None


VQ_PART = ("config", "step", "vq", "vq_config", "source", "weights")


def load_vq(path: str | Path, ema: bool = True, say: Callable[[str], None] = print) -> dict:
    """The autoencoder's part of a stage-1 checkpoint, or of the stage-2 one that carries its first stage.

    Only VQ_PART, so that no UNet and no optimiser stays in memory. Says what a published file was taken for.
    """
    try:
        payload = load(path, "vq", ema=ema)
    except WrongStage:
        payload = None          # loaded below: here the exception still holds all that was read
    if payload is None:
        payload = load(path, "ldm", ema=True)       # False is about the UNet; its first stage has no EMA
    if "source" in payload:
        from formats.compvis import describe
        say(describe(payload, path))
    return {key: payload[key] for key in VQ_PART if key in payload}


def read(path: str | Path) -> object:
    """What stands in a file, on the CPU; nothing in it is run. ValueError in one sentence for what cannot be read.

    A file that holds objects of foreign classes is read as {"state_dict": name -> tensor, "global_step": k} alone.
    """
    from formats.compvis import Refused, check_archive, read_foreign
    path = Path(path)
    try:
        if zipfile.is_zipfile(path):
            check_archive(path)         # before torch: its weights_only runs no code, but it inflates what is deflated
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")     # what torch says at length becomes one sentence here
                return torch.load(path, map_location="cpu", weights_only=True)
        except Exception:               # torch's unpickler raises a dozen unrelated types on a foreign file
            return read_foreign(path)
    except Refused as e:
        raise ValueError(f"{path} cannot be read as a checkpoint: {e}") from None
    except Exception as e:              # and so do pickle and zipfile
        raise ValueError(f"{path} cannot be read as a checkpoint: it is cut short, or another kind of file, or holds "
                         f"more than tensors and plain values ({type(e).__name__})") from None


# --------------------------------------------------------------------------------------------- models out of a payload

def plural(n: float, what: str) -> str:
    """1, "image" -> "1 image"; 2000, "image" -> "2,000 images"."""
    return f"{n:,g} {what}" + ("" if n == 1 else "s")


def dated(path: str | Path, step: int) -> str:
    """A checkpoint by name, step and age: "runs/vq/last.pt (step 600, 3 minutes old)"."""
    age = max(0.0, time.time() - Path(path).stat().st_mtime)
    seconds, unit = next(((n, unit) for n, unit in AGES if age >= n), AGES[-1])
    return f"{path} (step {step:,}, {plural(int(age / seconds), unit)} old)"


def hash_of(state: dict[str, Tensor]) -> str:
    """16 hex digits that change whenever a name, shape, type or value in a state dict does."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def fill(model: nn.Module, state: dict[str, Tensor], what: str) -> None:
    """load_state_dict(strict=True), with an error that names the first differing keys and both shapes."""
    check_fits(model, state, what)
    model.load_state_dict(state, strict=True)


def check_fits(model: nn.Module, state: dict[str, Tensor], what: str) -> None:
    """ValueError that names the first differing keys and both shapes."""
    own = model.state_dict()
    wrong = [f"{k}: file {tuple(state[k].shape) if k in state else 'lacks it'}, "
             f"model {tuple(own[k].shape) if k in own else 'lacks it'}"
             for k in [*own, *(k for k in state if k not in own)]
             if k not in own or k not in state or own[k].shape != state[k].shape]
    if wrong:
        raise ValueError(f"{what} does not fit its configuration in {len(wrong)} places, first {'; '.join(wrong[:3])}")


def build(make: Callable[[], nn.Module], state: dict[str, Tensor], what: str) -> nn.Module:
    """make() with the weights of `state`. Made first without memory, so that a few bytes that say they are a giant
    network end in a sentence.
    """
    with torch.device("meta"):
        try:
            empty = make()
        except (ValueError, TypeError, RuntimeError, OverflowError) as e:       # torch raises all of them
            reason = str(e).splitlines()[0]
            raise ValueError(f"{what} has a configuration of which no network can be made: {reason}") from None
        check_fits(empty, state, what)
    model = make()
    model.load_state_dict(state, strict=True)
    return model


def config_of(kind: type, payload: dict, name: str, what: str) -> object:
    """payload[name] as a configuration of that class."""
    try:
        return kind(**payload[name])
    except TypeError as e:
        raise ValueError(f"{what} has a {name} that this version does not know: {e}") from None


def build_vq(payload: dict, what: str) -> VQModel:
    """The autoencoder of a payload of either stage, frozen and in eval mode."""
    config = config_of(VQConfig, payload, "vq_config", what)
    model = build(lambda: VQModel(config), payload["vq"], what)
    return model.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def ldm_payload(ldm: LDM) -> dict:
    """The model part of a stage-2 checkpoint."""
    return {"stage": "ldm", "vq": ldm.vq.state_dict(), "vq_config": asdict(ldm.vq.config),
            "unet": ldm.unet.state_dict(), "unet_config": asdict(ldm.unet.config),
            "cond": ldm.cond.state_dict(), "cond_config": asdict(ldm.cond.config),
            "mean": ldm.mean, "std": ldm.std, "schedule": ldm.schedule, "knows_null": ldm.knows_null}


def build_ldm(payload: dict, what: str, device: str | torch.device = "cpu") -> LDM:
    """The model of a stage-2 payload with its EMA weights, frozen, in eval mode, on `device`."""
    vq, unet, cond = (config_of(kind, payload, name, what) for kind, name in (
        (VQConfig, "vq_config"), (UNetConfig, "unet_config"), (ConditionConfig, "cond_config")))
    mean, std = payload["mean"], payload["std"]
    weights = {f"{part_of}.{name}": tensor for part_of in ("vq", "unet", "cond")
               for name, tensor in payload[part_of].items()} | {"mean": mean, "std": std}
    ldm = build(lambda: LDM(VQModel(vq), unet, cond, mean, std, payload["schedule"], payload["knows_null"]), weights,
                what)
    return ldm.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)


def load_ldm(path: str | Path, device: str | torch.device = "cpu", preset: str | None = None,
             ema: bool = True) -> tuple[LDM, dict]:
    """The model of a stage-2 checkpoint on `device`, and the payload it came from; `preset` and `ema` as in `load`."""
    payload = load(path, "ldm", preset=preset, ema=ema)
    ldm = build_ldm(payload, str(path), device)
    if "source" in payload:
        ldm.spacing = "uniform"
    return ldm, payload


def slim(payload: dict) -> dict:
    """A stage-2 payload of ours with what sampling needs and no more, networks in half precision, to give away.

    The latent statistics stay in float32. Loading puts the halves into float32 networks. ValueError for weights beyond
    what half precision can hold, 65504.
    """
    halves = {}
    for network in ("vq", "unet", "cond"):
        halves[network] = {name: tensor.half() if tensor.is_floating_point() else tensor
                           for name, tensor in payload[network].items()}
        for name, tensor in halves[network].items():
            if not tensor.isfinite().all():
                raise ValueError(f"{network}.{name} holds numbers beyond 65504, which half precision cannot")
    return {name: value for name, value in payload.items() if name != "train"} | halves


def training_poses(payload: dict, path: str | Path) -> np.ndarray | None:
    """Poses [N, 17, 3] float32 of pictures that the model of a stage-2 payload was trained on, spread over all of them.

    None where the file has none: published files, and ours from before they were kept. ValueError where what it has
    under "poses" is something else.
    """
    poses = payload.get("poses")
    if poses is None:
        return None
    shape_of = f"{poses.dtype} {list(poses.shape)}" if isinstance(poses, Tensor) else type(poses).__name__
    if not isinstance(poses, Tensor) or poses.layout is not torch.strided or poses.dtype != torch.float16 or (
            poses.ndim != 3 or poses.shape[1:] != (len(JOINTS), 3)):
        raise ValueError(f"{path} has {shape_of} for poses; float16 [N, {len(JOINTS)}, 3] is needed")
    check_bytes({"poses": poses}, Path(path))
    if not poses.isfinite().all():
        raise ValueError(f"{path} has poses that are not finite numbers; the file is damaged, train it again")
    return poses.detach().float().numpy() if (poses[..., 2] > 0).any() else None


# --------------------------------------------------------------------------------------------------------- the command

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Make a small file of a checkpoint of stage 2, to give away: EMA "
                                     "weights in half precision, without what resuming needs.")
    parser.add_argument("ckpt", metavar="CKPT", help="such as runs/ldm/last.pt")
    parser.add_argument("out", metavar="OUT", help="the file to write")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        payload = load(args.ckpt, "ldm")
        if "source" in payload:
            raise ValueError(f"{args.ckpt} is a published file; only ours are made smaller")
        if Path(args.out).is_dir() or Path(args.out).resolve() == Path(args.ckpt).resolve():
            raise ValueError(f"OUT is {args.out}; give the name of another file")
        save(args.out, slim(payload))
    except (ValueError, OSError) as e:
        print(f"checkpoint.py: {e}", file=sys.stderr)
        return 2
    print(f"{args.out}: {Path(args.out).stat().st_size / 1e6:.1f} MB, step {payload['step']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
