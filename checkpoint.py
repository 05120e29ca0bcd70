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
import http.client
import io
import math
import os
import pickle
import pickletools
import sys
import urllib.request
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from keypoints import JOINTS, ConditionConfig, PoseCondition
from ldm import LDM
from unet import UNetConfig
from vq import LPIPS, VQConfig, VQModel

FORMAT = 1
NEEDED = {"vq": {"stage", "step", "config", "vq", "vq_config"}}
NEEDED["ldm"] = NEEDED["vq"] | {"unet", "unet_config", "cond", "cond_config", "mean", "std", "schedule", "knows_null"}
HOW_TO_MAKE = {"vq": "python train.py --stage vq", "ldm": "python train.py --stage ldm"}


# What --amp computes in.
AMP = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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


PARTS = {"vq": ("vq",), "ldm": ("vq", "unet", "cond")}
SIZES = range(8, 4097)                  # of pictures, pixels
SCHEDULE = {"timesteps": int, "linear_start": float, "linear_end": float}
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
    yield "schedule", schedule, isinstance(schedule, dict) and (
        {k: type(v) for k, v in schedule.items()} == SCHEDULE and schedule["timesteps"] <= MOST_TIMESTEPS), (
        f"a dict of at most {MOST_TIMESTEPS} timesteps, linear_start and linear_end")


def is_array(value: object) -> bool:
    """Is it a tensor of a kind that networks have, in memory?"""
    return (isinstance(value, Tensor) and value.layout is torch.strided and value.device.type == "cpu"
            and value.dtype in STORAGES.values())


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
        say(describe(payload, path))
    return {key: payload[key] for key in VQ_PART if key in payload}


def read(path: str | Path) -> object:
    """What stands in a file, on the CPU; nothing in it is run. ValueError in one sentence for what cannot be read.

    A file that holds objects of foreign classes is read as {"state_dict": name -> tensor, "global_step": k} alone.
    """
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


# -------------------------------------------------------------------------------- reading objects without running them

# A Lightning file is a zip: data.pkl is a pickle in which tensors are references to records data/0, data/1, ... What a
# pickle can do is call the globals it names and set attributes of what it gets. Here every global becomes one of the
# four classes below, on which nothing that a pickle does has any effect outside the object that is being made.

class Refused(ValueError):
    """The reason, in a clause, why a file is not read."""


class Inert:
    """Any object of a foreign class: takes all that a pickle does to an object, and keeps nothing."""

    __slots__ = ()

    def __new__(cls, *ignored: object, **named: object) -> object:
        return object.__new__(cls)

    def __init__(self, *ignored: object, **named: object):
        pass

    def __setstate__(self, *ignored: object) -> None:       # also what a pickle calls on the class itself
        pass

    append = extend = add = __setitem__ = __setstate__


class InertDict(dict):
    """collections.OrderedDict, whose attributes (a state dict's _metadata) are not wanted."""

    __slots__ = ()
    __setstate__ = Inert.__setstate__


class Later(Inert):
    """A tensor that is read once it is known to be wanted: the optimiser's, twice the model's size, never are."""

    __slots__ = ("storage", "offset", "size", "stride")

    def __init__(self, storage: object, offset: int, size: tuple, stride: tuple, *ignored: object):
        self.storage, self.offset, self.size, self.stride = storage, offset, size, stride


class SameTensor(Inert):
    """A call that returns its first argument: nn.Parameter of a tensor."""

    __slots__ = ()

    def __new__(cls, tensor: object, *ignored: object) -> object:
        return tensor


STORAGES = {"FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
            "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
            "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
            "BoolStorage": torch.bool}
KNOWN = {("collections", "OrderedDict"): InertDict, ("torch._utils", "_rebuild_tensor"): Later,
         ("torch._utils", "_rebuild_tensor_v2"): Later, ("torch._utils", "_rebuild_parameter"): SameTensor,
         **{("torch", name): dtype for name, dtype in STORAGES.items()}}
# Seen in Lightning checkpoints. All of it becomes Inert, so this list does not make reading safe: it says what is worth
# opening, and a file with anything else in it deserves a look before it is used.
PACKAGES = {"pytorch_lightning", "lightning", "lightning_fabric", "lightning_utilities", "torchmetrics", "omegaconf",
            "ldm", "taming", "main", "__main__", "typing", "pathlib", "numpy", "torch"}
BUILTINS = {"bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "object", "set",
            "slice", "str", "tuple", "long", "unicode"}     # torch pickles int and str under their Python 2 names
PLAIN = {"builtins": BUILTINS, "__builtin__": BUILTINS, "collections": {"Counter", "defaultdict"},
         "_codecs": {"encode"}, "copyreg": {"_reconstructor"}, "copy_reg": {"_reconstructor"},
         "argparse": {"Namespace"}, "datetime": {"date", "datetime", "timedelta"}}


MOST_NESTED = 100                       # tuples within tuples; torch.save's own are two deep


class DeafUnpickler(pickle.Unpickler):
    """Runs nothing: globals are looked up in the tables above and never imported."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) in KNOWN:
            return KNOWN[module, name]
        if "." not in name and (name in PLAIN.get(module, ()) or module.split(".")[0] in PACKAGES):
            return Inert
        raise Refused(f"it wants to use {module}.{name}, which has no place in a checkpoint, so it was not opened "
                      "any further")

    def persistent_load(self, pid: tuple) -> tuple[str, object]:
        kind, dtype, key, _, _ = pid                                    # location and length follow
        if kind != "storage":
            raise Refused(f"it refers to a {kind!r} outside itself")
        return key, dtype


def check_archive(path: Path) -> None:
    """Refused for a zip that torch.save did not make, or that would take more memory than the file has bytes."""
    with zipfile.ZipFile(path) as archive:
        records, names = archive.infolist(), archive.namelist()
        root = records[0].filename.split("/")[0]
        if f"{root}/constants.pkl" in names:
            raise Refused("it is a TorchScript archive, which is a program, not a checkpoint")
        # torch.save stores without compression, so a file cannot hold more bytes than it has.
        if any(r.compress_type != zipfile.ZIP_STORED for r in records) or (
                sum(r.file_size for r in records) > path.stat().st_size):
            raise Refused("its records are compressed or overlap, which torch.save never does")
        if f"{root}/byteorder" in names and archive.read(f"{root}/byteorder") != b"little":
            raise Refused("it was saved on a big-endian machine")
        pickled = archive.read(f"{root}/data.pkl")
    nested = 0
    for op, arg, _ in pickletools.genops(pickled):                      # also finds lengths beyond the end
        if op.name in ("PUT", "LONG_BINPUT") and arg > len(pickled):
            raise Refused("its pickle asks for more memory than it can fill")
        if op.name == "GLOBAL" and arg.endswith(" bytearray"):          # bytearray(10 ** 11), which torch would make
            raise Refused("it makes a bytearray, which has no place in a checkpoint")
        if not op.name.endswith("PUT") and op.name != "MEMOIZE":
            nested = nested + 1 if op.name.startswith("TUPLE") else 0
        if nested > MOST_NESTED:                                        # hashing such a tuple overflows C's stack
            raise Refused("its pickle nests tuples without end")


def read_foreign(path: Path) -> dict:
    """{"state_dict": name -> tensor, "global_step": k} of a zip that `check_archive` passed, whatever else is in it."""
    with zipfile.ZipFile(path) as archive:
        root = archive.infolist()[0].filename.split("/")[0]
        found = DeafUnpickler(io.BytesIO(archive.read(f"{root}/data.pkl"))).load()
        if not isinstance(found, dict):
            raise Refused("it holds no dict")
        wanted = found.get("state_dict", found)
        stored: dict[str, bytearray] = {}           # by record: tensors may share a storage

        def tensor(later: object) -> Tensor:
            if not isinstance(later, Later) or not isinstance(later.storage[1], torch.dtype):
                raise Refused("its state_dict holds more than tensors")
            key, dtype = str(later.storage[0]), later.storage[1]
            if key not in stored:
                stored[key] = bytearray(archive.read(f"{root}/data/{key}"))
            flat = torch.frombuffer(stored[key], dtype=dtype) if stored[key] else torch.empty(0, dtype=dtype)
            return flat.as_strided(later.size, later.stride, later.offset)      # checks that it lies in the storage

        return {"state_dict": {name: tensor(later) for name, later in wanted.items()},
                "global_step": found.get("global_step")}


# --------------------------------------------------------------------------------------- published CompVis checkpoints

@dataclass(frozen=True)
class Published:
    """What the tensors of a stage-2 file do not tell."""

    size: int                           # of the pictures, in pixels
    num_heads: int
    cond: ConditionConfig


PUBLISHED = {"danbooru": Published(size=256, num_heads=8, cond=ConditionConfig(("seed",), seed_dim=32))}
UNET, FIRST_STAGE, SHADOW = "model.diffusion_model.", "first_stage_model.", "model_ema."
SCHEDULE_BUFFERS = {"betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod",
                    "sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod",
                    "sqrt_recipm1_alphas_cumprod", "posterior_variance", "posterior_log_variance_clipped",
                    "posterior_mean_coef1", "posterior_mean_coef2", "lvlb_weights"}
NOT_NETWORK = {"stage 1": {"colorize"}, "stage 2": SCHEDULE_BUFFERS | {"scale_factor", "logvar"}}
FLOAT32_ACCURACY = 1e-6                 # relative; a schedule made of float32 ends differs by 2e-7 from the original


def published(found: object, path: Path, stage: str, advice: str | None, preset: str | None, ema: bool) -> dict:
    """The payload that `load` gives of what `read` found in a CompVis file."""
    state, step = tensors_of(found, path)
    full = any(name.startswith(UNET) for name in state)
    if not full and "encoder.conv_in.weight" not in state:
        raise ValueError(f"{path} is no checkpoint: neither of this project in format {FORMAT}, nor of CompVis, for it "
                         f"has no {UNET}* and no encoder.conv_in.weight")
    if stage == "ldm" and not full:
        raise WrongStage(f"{path} is a CompVis checkpoint of stage 1, but one of stage ldm is needed; "
                         + (advice or f"make it with: {HOW_TO_MAKE['ldm']} --vq {path}"))
    payload = {"format": FORMAT, "stage": stage, "step": step, "source": "CompVis",
               "config": {"size": None, "data": None, "val": None, "preset": preset}}
    # Stage 2 was trained on the raw weights of its first stage, so these are the right ones whatever `ema` says.
    vq, weights = first_stage(part(state, FIRST_STAGE) if full else state, path, ema and not full)
    if stage == "vq":
        return payload | vq | {"weights": weights}
    learned = next((name for name in state if name.startswith("cond_stage_model.")), None)
    if learned:
        raise ValueError(f"{path} has a learned condition encoder ({learned}); only raw keypoint ids are supported")
    unet = part(state, UNET)
    config = unet_config(unet, path)
    weights = "EMA" if ema and ema_into(unet, state, "diffusion_model.", path) else "raw"
    known = (UNET, FIRST_STAGE, SHADOW)         # whatever else there is goes to the UNet, where `fill` reports it
    unet |= {k: v for k, v in state.items() if not k.startswith(known) and k not in NOT_NETWORK["stage 2"]}
    preset_found = find_preset(preset, config, 2 ** (len(vq["vq_config"]["ch_mult"]) - 1), path)
    scale = state.get("scale_factor", torch.ones(())).double()
    if scale.numel() != 1 or not 0 < scale.item() < math.inf:
        raise ValueError(f"{path} has the scale_factor {scale.tolist()}; it must be one positive number")
    C = vq["vq_config"]["embed_dim"]
    return payload | vq | {
        "config": payload["config"] | {"size": preset_found.size}, "weights": weights,
        "unet": unet, "unet_config": config | {"num_heads": preset_found.num_heads},
        "cond": PoseCondition(preset_found.cond).state_dict(), "cond_config": asdict(preset_found.cond),
        "mean": torch.zeros(C, 1, 1), "std": torch.full((C, 1, 1), 1 / scale.item()),
        "schedule": schedule_of(state, path), "knows_null": False}


def tensors_of(found: object, path: Path) -> tuple[dict[str, Tensor], int]:
    """The state dict, bare or under "state_dict", and the training step, 0 where the file does not say."""
    state = found.get("state_dict", found) if isinstance(found, dict) else None
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{path} is no checkpoint: it holds no state dict")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
            raise ValueError(f"{path} is no checkpoint: {name!r} in its state dict is not a plain tensor")
    check_bytes(state, path)
    step = found.get("global_step") if state is not found else None
    return state, step if type(step) is int else 0


def check_bytes(state: dict[str, Tensor], path: Path) -> None:
    """ValueError where tensors are larger than the file: expanded out of one number, or all sharing one storage."""
    held = path.stat().st_size
    for name, tensor in state.items():
        held -= tensor.numel() * tensor.element_size()
        if held < 0:
            raise ValueError(f"{path} does not hold as many numbers as its tensors say; {name} has shape "
                             f"{tuple(tensor.shape)}")


def part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """What stands under `prefix`, which is cut off the names."""
    return {name[len(prefix):]: tensor for name, tensor in state.items() if name.startswith(prefix)}


def ema_into(own: dict[str, Tensor], state: dict[str, Tensor], lead: str, path: Path) -> bool:
    """Replace the tensors of `own` by their EMA copies in `state`; False where the file has none.

    CompVis keeps the copy of a.b.c as model_ema.abc, with `lead` before the name. A copy of nothing in `own` is added
    under its own name, for `fill` to report.
    """
    shadow = {k: v for k, v in part(state, SHADOW).items()
              if k not in ("decay", "num_updates") and not k.startswith("loss")}
    if not shadow:
        return False
    flat = {(lead + name).replace(".", ""): name for name in own}
    if lacking := [name for name in flat if name not in shadow]:
        raise ValueError(f"{path} has EMA weights, but not of {flat[lacking[0]]}; --no-ema takes the raw ones")
    own |= {flat.get(name, SHADOW + name): tensor for name, tensor in shadow.items()}
    return True


def shape(state: dict[str, Tensor], name: str, ndim: int, path: Path) -> tuple[int, ...]:
    """The shape of a tensor that sizes are read off."""
    if name not in state:
        raise ValueError(f"{path} lacks {name}, so it is not of an architecture of CompVis that this project has")
    found = tuple(state[name].shape)
    if len(found) != ndim or min(found) < 1:
        raise ValueError(f"{path}: {name} has shape {found}; it must have {ndim} dimensions")
    return found


def count(state: dict[str, Tensor], prefix: str) -> int:
    """How many children 0, 1, 2, ... the state dict has under `prefix`."""
    children = {name[len(prefix):].split(".")[0] for name in state if name.startswith(prefix)}
    return next(i for i in range(len(children) + 1) if str(i) not in children)


def multiples(widths: list[int], unit: int, path: Path) -> tuple[int, ...]:
    if any(width % unit for width in widths):
        raise ValueError(f"{path} has levels of {widths} channels, which are not multiples of the first width {unit}")
    return tuple(width // unit for width in widths)


def first_stage(state: dict[str, Tensor], path: Path, ema: bool) -> tuple[dict, str]:
    """{"vq", "vq_config"} of the tensors of a VQGAN, and whether they are its "EMA" or "raw" weights."""
    vq = {k: v for k, v in state.items() if not k.startswith(("loss.", SHADOW)) and k not in NOT_NETWORK["stage 1"]}
    if not vq:
        raise ValueError(f"{path} holds a UNet without its first stage ({FIRST_STAGE}*), so it cannot make pictures")
    if "quantize.embed.weight" in vq:
        raise ValueError(f"{path} has a Gumbel quantizer (quantize.embed.weight); only nearest-code ones are supported")
    if not any(name.startswith("quantize.") for name in vq):
        raise ValueError(f"{path} has a first stage without a codebook (no quantize.*), a KL autoencoder; "
                         "only VQ ones are supported")
    if "encoder.norm_out.weight" not in vq:
        raise ValueError(f"{path} has an autoencoder without norms, which CompVis never made; if this project "
                         "trained it, give the file that train.py wrote")
    ch, in_channels = shape(vq, "encoder.conv_in.weight", 4, path)[:2]
    levels = range(max(1, count(vq, "encoder.down.")))
    widths = [shape(vq, f"encoder.down.{i}.block.0.conv1.weight", 4, path)[0] for i in levels]
    n_embed, embed_dim = shape(vq, "quantize.embedding.weight", 2, path)
    resolution = VQConfig.resolution                # attn_resolutions mean nothing but relative to one
    config = VQConfig(
        in_channels=in_channels, out_ch=shape(vq, "decoder.conv_out.weight", 4, path)[0], ch=ch,
        ch_mult=multiples(widths, ch, path), num_res_blocks=count(vq, "encoder.down.0.block."),
        z_channels=shape(vq, "encoder.conv_out.weight", 4, path)[0], embed_dim=embed_dim, n_embed=n_embed,
        attn_resolutions=tuple(resolution // 2 ** i for i in levels if count(vq, f"encoder.down.{i}.attn.")))
    weights = "EMA" if ema and ema_into(vq, state, "", path) else "raw"
    return {"vq": vq, "vq_config": asdict(config)}, weights


def unet_config(unet: dict[str, Tensor], path: Path) -> dict:
    """The fields of UNetConfig that the tensors tell, which is all but num_heads."""
    M, in_channels = shape(unet, "input_blocks.0.0.weight", 4, path)[:2]
    widths, blocks, attends = [0], [0], [False]                         # of each level
    for i in range(1, count(unet, "input_blocks.")):
        if f"input_blocks.{i}.0.op.weight" in unet:                     # a Downsample: the next level begins
            widths, blocks, attends = [*widths, 0], [*blocks, 0], [*attends, False]
        else:
            widths[-1] = shape(unet, f"input_blocks.{i}.0.in_layers.2.weight", 4, path)[0]
            blocks[-1] += 1
            attends[-1] |= f"input_blocks.{i}.1.norm.weight" in unet
    context_dim = shape(unet, "middle_block.1.transformer_blocks.0.attn2.to_k.weight", 2, path)[1]
    joints = ConditionConfig(("seed",)).context_dim
    if context_dim != joints:
        raise ValueError(f"{path} has a UNet whose context is {context_dim} wide; a pose is one token of {joints} ids")
    return {"in_channels": in_channels, "out_channels": shape(unet, "out.2.weight", 4, path)[0], "model_channels": M,
            "num_res_blocks": blocks[0], "channel_mult": multiples(widths, M, path), "context_dim": context_dim,
            "attention_resolutions": tuple(2 ** i for i in reversed(range(len(widths))) if attends[i]),
            "transformer_depth": count(unet, "middle_block.1.transformer_blocks.")}


def find_preset(name: str | None, config: dict, factor: int, path: Path) -> Published:
    """The preset of that name; ValueError, with the presets that fit, where there is none or it does not fit."""
    mults, fitting = config["channel_mult"], []
    attending = {config["model_channels"] * m for i, m in enumerate(mults)
                 if 2 ** i in config["attention_resolutions"] or i == len(mults) - 1}
    for candidate, p in PUBLISHED.items():
        if (all(width % p.num_heads == 0 for width in attending) and p.cond.context_dim == config["context_dim"]
                and p.size % (factor * 2 ** (len(mults) - 1)) == 0):
            fitting.append(candidate)
    if name in fitting:
        return PUBLISHED[name]
    if name is None:
        advice = f"give --preset {' or '.join(fitting)}" if fitting else "and no preset fits it"
        raise ValueError(f"{path} is a CompVis checkpoint, whose tensors tell neither num_heads nor the size of its "
                         f"pictures; {advice}")
    what = "does not fit" if name in PUBLISHED else "is not one for published checkpoints like"
    others = f"preset {' or '.join(fitting)} fits it" if fitting else f"none of {', '.join(PUBLISHED)} fits it"
    raise ValueError(f"preset {name} {what} {path}; {others}")


def schedule_of(state: dict[str, Tensor], path: Path) -> dict:
    """The arguments of diffusion.Diffusion, read off the buffer betas [T]."""
    T, = shape(state, "betas", 1, path)
    betas = state["betas"].double()
    # The shortest decimal that is the same float32: 0.0015 rather than 0.001500000013.
    start, end = (float(str(np.float32(beta.item()))) for beta in (betas[0], betas[-1]))
    wanted = torch.linspace(max(start, 0) ** 0.5, max(end, 0) ** 0.5, T, dtype=torch.float64) ** 2
    if T < 2 or not 0 < start <= end < 1 or not torch.allclose(betas, wanted, rtol=FLOAT32_ACCURACY, atol=0):
        raise ValueError(f"{path} has a noise schedule of {T} steps from {start} to {end} that is not linear in "
                         "sqrt(beta); no other one is supported")
    return {"timesteps": T, "linear_start": start, "linear_end": end}


def describe(payload: dict, path: str | Path) -> str:
    """One line on what a published file was taken for."""
    vq = config_of(VQConfig, payload, "vq_config", str(path))
    said = f"VQ-f{vq.factor} {vq.ch} wide x {vq.ch_mult}, {vq.n_embed} codes of {vq.embed_dim}"
    if payload["stage"] == "ldm":
        unet = config_of(UNetConfig, payload, "unet_config", str(path))
        said = (f"UNet {unet.model_channels} wide x {unet.channel_mult}, attention at {unet.attention_resolutions}, "
                f"{unet.num_heads} heads (preset {payload['config']['preset']}), {said}, "
                f"{payload['schedule']['timesteps']} timesteps")
    return (f"{path}: a CompVis checkpoint of stage {payload['stage']}, step {payload['step']}, "
            f"{payload['weights']} weights: {said}")


# ---------------------------------------------------------------------------------------------------- weights of LPIPS

@dataclass(frozen=True)
class Download:
    name: str                           # in the cache folder
    url: str
    sha256: str
    what: str                           # the tensors it has


LPIPS_FILES = (
    Download("vgg16-397923af.pth", "https://download.pytorch.org/models/vgg16-397923af.pth",
             "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0", "the convolutions of VGG16"),
    Download("lpips-v0.1-vgg.pth",
             "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/vgg.pth",
             "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868", "the weights lin0 to lin4"),
)
SLICE_ENDS = (3, 8, 15, 22, 29)         # the last layer of torchvision's vgg16().features in net.slice1 ... net.slice5
IN_CKPT = "loss.perceptual_loss."
TIMEOUT = 30                            # seconds without a byte
CHUNK = 2 ** 20                         # bytes read at once


def lpips_name(name: str) -> str:
    """A tensor's name in torchvision, the lpips package or a taming .ckpt -> its name in vq.LPIPS."""
    name = name.removeprefix(IN_CKPT)
    first, _, rest = name.partition(".")
    index, _, kind = rest.partition(".")
    if first == "features" and index.isdigit() and int(index) <= SLICE_ENDS[-1]:
        depth = next(k for k, end in enumerate(SLICE_ENDS, 1) if int(index) <= end)
        return f"net.slice{depth}.{index}.{kind}"
    return f"lin{rest}" if first == "lins" else name


def load_lpips(paths: Sequence[str | Path]) -> LPIPS:
    """The perceptual distance with the weights that stand in the files together, frozen, in eval mode.

    The files: torchvision's vgg16 and the lpips package's v0.1/vgg.pth (what `download_lpips` gets), or one with all of
    it, a state dict of the lpips package or a taming .ckpt. ValueError in one sentence for whatever lacks.
    """
    model, given = LPIPS(), {}
    own = model.state_dict()
    for path in map(Path, paths):
        if not path.is_file():
            raise ValueError(f"there is no file {path} with weights of LPIPS")
        state, _ = tensors_of(read(path), path)
        found = {new: tensor for name, tensor in state.items() if (new := lpips_name(name)) in own}
        if not found:
            raise ValueError(f"{path} has no tensor of LPIPS; its first is {next(iter(state))}")
        given |= found
    said = " and ".join(map(str, paths))
    constants = {name: tensor for name, tensor in own.items() if name.startswith("scaling_layer.")}
    lacking = [name for name in own if name not in given and name not in constants]
    if lacking:
        convolutions, linear = LPIPS_FILES
        needed = [f"{file.what} ({file.url} has them)" for file, starts in ((convolutions, "net."), (linear, "lin"))
                  if any(name.startswith(starts) for name in lacking)]
        raise ValueError(f"LPIPS lacks {len(lacking)} tensors in {said or 'no file'}, first {lacking[0]}: it still "
                         f"needs {' and '.join(needed)}")
    fill(model, constants | given, f"LPIPS from {said}")
    return model.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def download_lpips(folder: str | Path | None = None) -> list[Path]:
    """The files that `load_lpips` needs, 528 MB, fetched once into `folder` (default: torch's own cache).

    ValueError in one sentence where there is no network or a file is not the one whose hash is known.
    """
    folder = Path(folder) if folder else Path(torch.hub.get_dir()) / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    for file in LPIPS_FILES:
        path = folder / file.name
        if not path.is_file() or sha256_of(path) != file.sha256:
            fetch(file, path)
    return [folder / file.name for file in LPIPS_FILES]


def sha256_of(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def fetch(file: Download, path: Path) -> None:
    """Download one file; `path` appears only once the bytes are the right ones."""
    partial = path.with_name(path.name + ".partial")
    try:
        with urllib.request.urlopen(file.url, timeout=TIMEOUT) as answer, open(partial, "wb") as f, tqdm(
                total=int(answer.headers.get("Content-Length") or 0) or None, desc=file.name, unit="B",
                unit_scale=True, dynamic_ncols=True) as bar:
            while chunk := answer.read(CHUNK):
                f.write(chunk)
                bar.update(len(chunk))
        if (found := sha256_of(partial)) != file.sha256:
            raise ValueError(f"{file.url} has the SHA-256 {found[:16]}..., but {file.sha256[:16]}... was expected, so "
                             "the download was deleted; it was cut short or is another file")
        os.replace(partial, path)
    except (OSError, http.client.HTTPException) as e:       # URLError is an OSError
        raise ValueError(f"{file.url} cannot be downloaded into {path.parent} ({e or type(e).__name__}); fetch it by "
                         "other means and give its path") from None
    finally:
        partial.unlink(missing_ok=True)


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
