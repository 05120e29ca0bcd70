"""Published CompVis checkpoints in, the payload that checkpoint.py knows out; no code in them is run.

A .ckpt of PyTorch Lightning is a pickle that names foreign classes. It is read with all classes replaced by dummies, so
only tensors and the training step come out; sizes are read off the tensors' shapes.
"""
from __future__ import annotations

import io
import math
import pickle
import pickletools
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from checkpoint import FORMAT, HOW_TO_MAKE, STORAGES, WrongStage, check_bytes, config_of
from keypoints import ConditionConfig, PoseCondition
from unet import UNetConfig
from vq import VQConfig

# -------------------------------------------------------------------------------- reading objects without running them
#
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
