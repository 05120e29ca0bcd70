"""Published CompVis checkpoints in, the payload that checkpoint.py knows out; no code in them runs.

A .ckpt of PyTorch Lightning is a pickle that names classes of other packages. It is read with all
of these replaced by a dummy class, so nothing is imported. Sizes are read off tensor shapes.
"""
from __future__ import annotations

import builtins
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from checkpoint import FORMAT, HOW_TO_MAKE, WrongStage, check_bytes
from keypoints import ConditionConfig, PoseCondition
from unet import UNetConfig
from vq import VQConfig

# ----------------------------------------------------------- Lightning files, without their classes

# What Lightning checkpoints name besides tensors and classes of builtins. None of it is imported,
# so loading would be safe without this list; a file that names anything else is suspicious.
PACKAGES = {"pytorch_lightning", "lightning", "lightning_fabric", "lightning_utilities", "ldm",
            "torchmetrics", "omegaconf", "taming", "main", "__main__", "typing", "pathlib", "numpy",
            "torch", "collections", "argparse", "datetime", "_codecs", "copyreg", "copy_reg"}
TENSORS = {"_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter"}     # of torch._utils
PYTHON_2 = {"long", "unicode", "xrange"}   # int, str and range in pickles of protocol 2
MOST_NESTED = 100                       # tuples in tuples; torch.save's own are two deep


class Refused(ValueError):
    """A file that is not opened any further; the message is the reason."""


class Inert:
    """Stands in for every foreign class; takes any arguments, state and members, keeps nothing."""

    def __new__(cls, *ignored: object, **also_ignored: object) -> Inert:
        return object.__new__(cls)

    def ignore(self, *ignored: object) -> None:
        pass

    __setstate__ = __setitem__ = append = extend = add = ignore


class InertUnpickler(pickle.Unpickler):
    """Makes tensors, plain values and Inert, and imports nothing."""

    def find_class(self, module: str, name: str) -> object:
        if module == "torch._utils" and name in TENSORS:
            function = getattr(torch._utils, name)
            return lambda *args: function(*args)    # of the function, a pickle could set attributes
        if module == "collections" and name == "OrderedDict":
            return OrderedDict
        known = module in ("builtins", "__builtin__") and (
            name in PYTHON_2 or isinstance(vars(builtins).get(name), type))
        if not known and module.split(".")[0] not in PACKAGES:
            raise Refused(f"the file references {module}.{name}")
        return Inert


def load_inert(path: Path) -> object:
    """The content of a zip file of torch.save, with Inert in place of every foreign class."""
    return torch.load(path, map_location="cpu", weights_only=False,
                      pickle_module=SimpleNamespace(__name__="inert", Unpickler=InertUnpickler))


def check_archive(path: Path) -> None:
    """Refused for a zip file that is damaged, or that torch.load would open in more memory than its
    size. Other files than those of torch.save raise what zipfile and pickletools raise."""
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        # torch.save does not compress, so the records together are no larger than the file.
        if sum(record.file_size for record in records) > path.stat().st_size:
            raise Refused("its records are compressed or overlap")
        if damaged := archive.testzip():                    # torch does not check the checksums
            raise Refused(f"the checksum of {damaged} in it is wrong; use another checkpoint")
        pickled = archive.read(f"{records[0].filename.split('/')[0]}/data.pkl")
    nested = 0
    for op, arg, _ in pickletools.genops(pickled):
        if op.name == "GLOBAL" and arg.endswith(" bytearray"):
            raise Refused("bytearray(10 ** 11) would fill the memory")  # which torch calls
        if op.name.endswith("PUT"):
            if arg > len(pickled):                          # pickle makes a table of that size
                raise Refused("its pickle has a place in the memo beyond its length")
        elif op.name != "MEMOIZE":
            nested = nested + 1 if op.name.startswith("TUPLE") else 0
        if nested > MOST_NESTED:                            # hashing it overflows the stack of C
            raise Refused("its pickle nests tuples without end")


# -------------------------------------------------------------------- published CompVis checkpoints

@dataclass(frozen=True)
class Published:
    """What the tensors of a stage-2 file do not tell."""

    size: int                           # of the images, in pixels
    num_heads: int
    cond: ConditionConfig


PUBLISHED = {"danbooru": Published(256, num_heads=8, cond=ConditionConfig(("seed",), seed_dim=32))}
UNET, FIRST_STAGE, SHADOW = "model.diffusion_model.", "first_stage_model.", "model_ema."
NOT_UNET = {"betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod",
            "sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod",
            "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
            "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2",
            "lvlb_weights", "scale_factor", "logvar"}
FLOAT32_ACCURACY = 1e-6                 # relative; betas from float32 ends are off by 2e-7


def published(found: object, path: Path, stage: str, advice: str | None, preset: str | None,
              ema: bool) -> dict:
    """The payload that `checkpoint.load` returns, from what `checkpoint.read` found in a file."""
    state, step = tensors_of(found, path)
    full = any(name.startswith(UNET) for name in state)
    if not full and "encoder.conv_in.weight" not in state:
        raise ValueError(f"{path} is neither a checkpoint of train.py nor of CompVis: it has no "
                         f"\"format\", no {UNET}* and no encoder.conv_in.weight")
    if stage == "ldm" and not full:
        raise WrongStage(f"{path} is a CompVis checkpoint of stage 1, but stage ldm is needed; "
                         + (advice or f"make it with: {HOW_TO_MAKE['ldm']} --vq {path}"))
    payload = {"format": FORMAT, "stage": stage, "step": step, "source": "CompVis",
               "config": {"size": None, "data": None, "val": None, "preset": preset}}
    # Stage 2 was trained on the raw weights of its first stage, so `ema` does not concern these.
    vq, weights = first_stage(part(state, FIRST_STAGE) if full else state, path, ema and not full)
    if stage == "vq":
        return payload | vq | {"weights": weights}

    if learned := [name for name in state if name.startswith("cond_stage_model.")]:
        raise ValueError(f"{path} has a learned condition encoder ({learned[0]}); only raw "
                         "keypoint ids are supported")
    unet = part(state, UNET)
    config = unet_config(unet, path)
    weights = "EMA" if ema and ema_into(unet, state, "diffusion_model.", path) else "raw"
    # Anything unknown is added to the UNet's tensors, so that strict loading reports it.
    known = (UNET, FIRST_STAGE, SHADOW)
    unet |= {k: v for k, v in state.items() if not k.startswith(known) and k not in NOT_UNET}
    chosen = find_preset(preset, config, 2 ** (len(vq["vq_config"]["ch_mult"]) - 1), path)
    C = vq["vq_config"]["embed_dim"]
    std = float(1 / state.get("scale_factor", torch.ones(())).double())
    return payload | vq | {
        "config": payload["config"] | {"size": chosen.size}, "weights": weights,
        "unet": unet, "unet_config": config | {"num_heads": chosen.num_heads},
        "cond": PoseCondition(chosen.cond).state_dict(), "cond_config": asdict(chosen.cond),
        "mean": torch.zeros(C, 1, 1), "std": torch.full((C, 1, 1), std),
        "schedule": schedule_of(state, path), "knows_null": False}


def tensors_of(found: object, path: Path) -> tuple[dict[str, Tensor], int]:
    """The state dict, bare or under "state_dict", and the training step, 0 if the file has none."""
    state = found.get("state_dict", found) if isinstance(found, dict) else None
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{path} is not a checkpoint: it holds no state dict")
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
            raise ValueError(f"{path} is not a checkpoint: {name!r} in its state dict is not a "
                             "plain tensor")
    check_bytes(state, path)
    step = found.get("global_step") if state is not found else None
    return state, step if isinstance(step, int) else 0


def part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, by the rest of their names."""
    return {name[len(prefix):]: v for name, v in state.items() if name.startswith(prefix)}


def ema_into(own: dict[str, Tensor], state: dict[str, Tensor], lead: str, path: Path) -> bool:
    """Replace the tensors of `own` by their EMA copies in `state`; False if the file has none.

    CompVis names the copy of a.b.c model_ema.abc, with `lead` before a. A copy of nothing in `own`
    is added under its own name, so that strict loading reports it.
    """
    shadow = {k: v for k, v in part(state, SHADOW).items()
              if k not in ("decay", "num_updates") and not k.startswith("loss")}
    if not shadow:
        return False
    flat = {(lead + name).replace(".", ""): name for name in own}
    if missing := [own_name for name, own_name in flat.items() if name not in shadow]:
        raise ValueError(f"{path} has EMA weights, but none of {missing[0]}; --no-ema uses the raw "
                         "weights")
    own |= {flat.get(name, SHADOW + name): tensor for name, tensor in shadow.items()}
    return True


def shape(state: dict[str, Tensor], name: str, ndim: int, path: Path) -> tuple[int, ...]:
    """The shape of a tensor that sizes are read off."""
    if name not in state or state[name].ndim != ndim:
        found = f"with shape {tuple(state[name].shape)}" if name in state else "missing"
        raise ValueError(f"{path} is of an architecture that is not supported: {name} is {found}, "
                         f"but {ndim} dimensions are needed")
    return tuple(state[name].shape)


def count(state: dict[str, Tensor], prefix: str) -> int:
    """How many children 0, 1, 2, ... the state dict has under `prefix`."""
    children = {name[len(prefix):].split(".")[0] for name in state if name.startswith(prefix)}
    return next(i for i in range(len(children) + 1) if str(i) not in children)


def first_stage(state: dict[str, Tensor], path: Path, ema: bool) -> tuple[dict, str]:
    """{"vq", "vq_config"} from the tensors of a VQGAN, and whether they are "EMA" or "raw"."""
    vq = {name: v for name, v in state.items()
          if not name.startswith(("loss.", SHADOW)) and name != "colorize"}
    if "quantize.embedding.weight" not in vq:
        raise ValueError(f"{path} has no codebook quantize.embedding.weight; only full checkpoints "
                         "with a nearest-neighbour VQ autoencoder are supported, no KL or Gumbel")
    ch, in_channels = shape(vq, "encoder.conv_in.weight", 4, path)[:2]
    levels = range(max(1, count(vq, "encoder.down.")))
    widths = [shape(vq, f"encoder.down.{i}.block.0.conv1.weight", 4, path)[0] for i in levels]
    n_embed, embed_dim = shape(vq, "quantize.embedding.weight", 2, path)
    resolution = VQConfig.resolution    # only the ratio to it gives attn_resolutions a meaning
    config = VQConfig(
        in_channels=in_channels, out_ch=shape(vq, "decoder.conv_out.weight", 4, path)[0], ch=ch,
        ch_mult=tuple(width // ch for width in widths),
        num_res_blocks=count(vq, "encoder.down.0.block."),
        z_channels=shape(vq, "encoder.conv_out.weight", 4, path)[0],
        embed_dim=embed_dim, n_embed=n_embed,
        attn_resolutions=tuple(resolution // 2 ** i for i in levels
                               if count(vq, f"encoder.down.{i}.attn.")))
    weights = "EMA" if ema and ema_into(vq, state, "", path) else "raw"
    return {"vq": vq, "vq_config": asdict(config)}, weights


def unet_config(unet: dict[str, Tensor], path: Path) -> dict:
    """The fields of UNetConfig that the tensors tell: all but num_heads."""
    M, in_channels = shape(unet, "input_blocks.0.0.weight", 4, path)[:2]
    widths, blocks, attends = [0], [0], [False]                         # of each level
    for i in range(1, count(unet, "input_blocks.")):
        if f"input_blocks.{i}.0.op.weight" in unet:                     # Downsample: the next level
            widths, blocks, attends = [*widths, 0], [*blocks, 0], [*attends, False]
        else:
            widths[-1] = shape(unet, f"input_blocks.{i}.0.in_layers.2.weight", 4, path)[0]
            blocks[-1] += 1
            attends[-1] |= f"input_blocks.{i}.1.norm.weight" in unet
    to_k = "middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    return {"in_channels": in_channels, "out_channels": shape(unet, "out.2.weight", 4, path)[0],
            "model_channels": M, "num_res_blocks": blocks[0],
            "channel_mult": tuple(width // M for width in widths),
            "attention_resolutions": tuple(2 ** i for i in reversed(range(len(widths)))
                                           if attends[i]),
            "context_dim": shape(unet, to_k, 2, path)[1],
            "transformer_depth": count(unet, "middle_block.1.transformer_blocks.")}


def find_preset(name: str | None, config: dict, factor: int, path: Path) -> Published:
    """The preset of that name; ValueError with the presets that fit if it does not."""
    mults, attended = config["channel_mult"], config["attention_resolutions"]
    widths = [config["model_channels"] * mult for i, mult in enumerate(mults)
              if 2 ** i in attended or i == len(mults) - 1]
    fitting = [candidate for candidate, p in PUBLISHED.items()
               if all(width % p.num_heads == 0 for width in widths)
               and p.cond.context_dim == config["context_dim"]
               and p.size % (factor * 2 ** (len(mults) - 1)) == 0]
    if name not in fitting:
        raise ValueError(f"{path} is a CompVis checkpoint, whose tensors do not tell num_heads and "
                         f"the size of its images; --preset is {name}; presets that fit a context "
                         f"of width {config['context_dim']} and levels of {widths} channels: "
                         f"{', '.join(fitting) or 'none'}")
    return PUBLISHED[name]


def schedule_of(state: dict[str, Tensor], path: Path) -> dict:
    """The arguments of diffusion.Diffusion, read off the buffer betas [T]."""
    T, = shape(state, "betas", 1, path)
    betas = state["betas"].double()
    # The shortest decimal with the same float32: 0.0015, not 0.001500000013.
    start, end = (float(str(np.float32(beta.item()))) for beta in (betas[0], betas[-1]))
    expected = torch.linspace(start ** 0.5, end ** 0.5, T, dtype=torch.float64) ** 2
    if not torch.allclose(betas, expected, rtol=FLOAT32_ACCURACY, atol=0):
        raise ValueError(f"{path} has a noise schedule of {T} steps from {start} to {end} that is "
                         "not linear in sqrt(beta); no other schedule is supported")
    return {"timesteps": T, "linear_start": start, "linear_end": end}


def describe(payload: dict, path: str | Path) -> str:
    """One line on what was read from a published file."""
    vq = VQConfig(**payload["vq_config"])
    networks = f"VQ-f{vq.factor} with {vq.n_embed} codes"
    if payload["stage"] == "ldm":
        unet = UNetConfig(**payload["unet_config"])
        networks = f"UNet {unet.model_channels} wide x {unet.channel_mult}, {networks}"
    return (f"{path}: a CompVis checkpoint of stage {payload['stage']}, step {payload['step']}, "
            f"{payload['weights']} weights: {networks}")
