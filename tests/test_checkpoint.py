"""Published checkpoints and LPIPS weights against golden numbers; hostile and damaged files."""
import collections
import functools
import hashlib
import io
import json
import operator
import os
import pickle
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN, golden_weights, relative_error
from torch import Tensor

import checkpoint
import formats.lpips
import sample
import train
from diffusion import Diffusion, ddim
from formats import compvis
from formats.compvis import PUBLISHED, Published
from keypoints import ConditionConfig
from metrics.lpips import LPIPS
from unet import UNet, UNetConfig
from vq import VQConfig, VQModel

ROOT = Path(__file__).parent.parent
SEED = ConditionConfig(("seed",), seed_dim=32)
RAW_SCALE = 1.25                # raw weights are the EMA weights times this, so that a mix-up shows


@pytest.fixture(autouse=True)
def tiny_preset(monkeypatch):
    """The golden networks have 4 heads, and their latents are 8 x 8."""
    monkeypatch.setitem(PUBLISHED, "tiny", Published(size=32, num_heads=4, cond=SEED))


@pytest.fixture(scope="module")
def networks(golden_config) -> tuple[UNet, VQModel]:
    unet, vq = golden_config["unet"], golden_config["vq"]
    dd = {k: tuple(v) if isinstance(v, list) else v for k, v in vq["ddconfig"].items()
          if k != "double_z"}
    vq = VQModel(VQConfig(**dd, embed_dim=vq["embed_dim"], n_embed=vq["n_embed"]))
    unet = UNet(UNetConfig(**{k: unet[k] for k in UNetConfig.__dataclass_fields__ if k in unet}))
    return golden_weights("model.diffusion_model.", unet), golden_weights("first_stage_model.", vq)


def full(networks: tuple[UNet, VQModel], ema: bool = True) -> dict[str, Tensor]:
    """A stage-2 state dict as CompVis saves it; the golden weights are the EMA or the only ones."""
    unet, vq = networks
    scale = RAW_SCALE if ema else 1.0
    state = {"betas": Diffusion().betas.float(), "alphas_cumprod": Diffusion().alphas_bar.float(),
             "scale_factor": torch.tensor(1.0), "logvar": torch.zeros(1000)}
    state |= {f"model.diffusion_model.{k}": v * scale for k, v in unet.state_dict().items()}
    state |= {f"first_stage_model.{k}": v for k, v in vq.state_dict().items()}
    if ema:
        state |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
        state |= {"model_ema.diffusion_model" + k.replace(".", ""): v
                  for k, v in unet.state_dict().items()}
    return state


def lightning(state: dict[str, Tensor], **more: object) -> dict:
    return {"epoch": 3, "global_step": 1234, "pytorch-lightning_version": "1.4.2",
            "state_dict": state, **more}


@pytest.fixture
def ckpt(tmp_path, networks) -> Path:
    torch.save(lightning(full(networks)), tmp_path / "model.ckpt")
    return tmp_path / "model.ckpt"


def refusal(path: Path, stage: str = "ldm", preset: str | None = "tiny",
            kind: type = ValueError) -> str:
    """The one sentence with which a file is refused."""
    with pytest.raises(kind) as e:
        checkpoint.build_ldm(checkpoint.load(path, stage, preset=preset), str(path))
    assert "\n" not in str(e.value) and path.name in str(e.value)
    return str(e.value)


# ---- what is read from a published file

def test_sizes_are_read_off_the_tensors(ckpt, networks):
    payload = checkpoint.load(ckpt, "ldm", preset="tiny")
    unet, vq = networks
    assert UNetConfig(**payload["unet_config"]) == unet.config
    # There is no attention in this VQ, so its resolution has no meaning and is the default.
    assert VQConfig(**payload["vq_config"]) == VQConfig(**{**vars(vq.config), "resolution": 256})
    assert payload["schedule"] == {"timesteps": 1000, "linear_start": 0.0015, "linear_end": 0.0195}
    assert payload["step"] == 1234 and payload["source"] == "CompVis"
    assert payload["weights"] == "EMA" and payload["knows_null"] is False
    assert payload["config"] == {"size": 32, "data": None, "val": None, "preset": "tiny"}
    assert ConditionConfig(**payload["cond_config"]) == SEED
    ldm, _ = checkpoint.load_ldm(ckpt, preset="tiny")
    assert (ldm.guidance, ldm.eta, ldm.spacing) == (1.0, 0.0, "uniform")
    said = compvis.describe(payload, ckpt)
    assert "\n" not in said
    assert all(word in said for word in ("model.ckpt", "ldm", "EMA", "1234", "(1, 2)", "64 codes"))


def test_what_tensors_do_not_tell_is_what_the_preset_trains_with():
    told, preset = PUBLISHED["danbooru"], train.PRESETS["danbooru"]
    assert told == Published(preset.size, preset.unet["num_heads"], preset.cond)


def listed(name: str) -> dict[str, Tensor]:
    """The tensors of a key list of a real file, on the meta device."""
    return {k: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
            for k, (shape, dtype) in json.loads((GOLDEN / name).read_text()).items()}


def test_the_published_key_lists_give_the_default_configs(tmp_path):
    """The key list of the 256 x 256 recipe gives the defaults, which are that recipe."""
    path = tmp_path / "danbooru.ckpt"
    path.touch()
    os.truncate(path, 4 * 2 ** 30)                  # a sparse file of the real one's size
    state = listed("danbooru_keypoints_ldm_state_dict.json") | {"betas": Diffusion().betas.float()}
    payload = compvis.published({"state_dict": state}, path, "ldm", None, "danbooru", True)
    assert UNetConfig(**payload["unet_config"]) == UNetConfig()
    assert VQConfig(**payload["vq_config"]) == VQConfig()
    assert payload["weights"] == "EMA" and payload["config"]["size"] == 256
    with torch.device("meta"):
        own = {"unet": UNet(UNetConfig()).state_dict(), "vq": VQModel(VQConfig()).state_dict()}
    for name in own:
        assert {k: v.shape for k, v in payload[name].items()} == {
            k: v.shape for k, v in own[name].items()}
    state = listed("danbooru_vq_f4_state_dict.json")
    payload = compvis.published(state, path, "vq", None, None, True)
    assert VQConfig(**payload["vq_config"]) == VQConfig() and payload["weights"] == "raw"
    assert payload["vq"].keys() == own["vq"].keys() and payload["config"]["size"] is None


@pytest.mark.parametrize("config", [
    VQConfig(ch=32, ch_mult=(1, 2, 2, 4), num_res_blocks=2, z_channels=4, embed_dim=6, n_embed=50,
             in_channels=1, out_ch=2, attn_resolutions=(64, 32)),
    VQConfig(ch=64, ch_mult=(1,), num_res_blocks=1, n_embed=16, attn_resolutions=(256,)),
    UNetConfig(model_channels=32, channel_mult=(1, 2, 2), num_res_blocks=1,
               attention_resolutions=(4, 1)),
    UNetConfig(4, 5, model_channels=64, channel_mult=(2, 1), num_res_blocks=3,
               attention_resolutions=(), transformer_depth=3),
    UNetConfig(model_channels=32, channel_mult=(1,), attention_resolutions=(1,))])
def test_any_configuration_is_read_back_from_its_tensors(config):
    with torch.device("meta"):
        state = (UNet if isinstance(config, UNetConfig) else VQModel)(config).state_dict()
    if isinstance(config, UNetConfig):
        assert UNetConfig(**compvis.unet_config(state, Path("x")), num_heads=8) == config
    else:
        found, _ = compvis.first_stage(state, Path("x"), True)
        assert VQConfig(**found["vq_config"]) == config


# ---- what a published file draws

@pytest.mark.parametrize("ema, steps", [(True, 10), (True, 20), (False, 10)])
def test_sampling_equals_the_reference(tmp_path, networks, golden, ema, steps):
    """Golden trajectories; the golden context is not a pose, so it goes to the UNet directly."""
    torch.save(lightning(full(networks, ema)), tmp_path / "m.ckpt")
    ldm, _ = checkpoint.load_ldm(tmp_path / "m.ckpt", preset="tiny")

    def eps_fn(x, t):
        return ldm.unet(x, t, golden["unet/context"])
    *_, last = ddim(Diffusion(**ldm.schedule), eps_fn, golden["ddim/x_T"], steps, spacing="uniform")
    assert relative_error(last.x, golden[f"ddim/eta0_steps{steps}"]) < 1e-4


def test_the_first_stage_equals_the_reference(ckpt, golden):
    ldm, _ = checkpoint.load_ldm(ckpt, preset="tiny")
    vq = checkpoint.build_vq(checkpoint.load(ckpt, "vq"), "x")
    for model in (ldm, vq):
        assert relative_error(model.encode(golden["vq/image"]), golden["vq/prequant"]) < 1e-4
        assert relative_error(model.decode(golden["vq/prequant"]), golden["vq/decode"]) < 1e-4


def test_raw_weights_on_demand(ckpt, networks):
    expected = networks[0].state_dict()["out.2.weight"]
    for ema, factor in ((True, 1.0), (False, RAW_SCALE)):
        ldm, payload = checkpoint.load_ldm(ckpt, preset="tiny", ema=ema)
        assert torch.equal(ldm.unet.state_dict()["out.2.weight"], expected * factor)
        assert payload["weights"] == ("EMA" if ema else "raw")


def test_scale_factor_multiplies_the_latent(tmp_path, networks, golden):
    torch.save(full(networks) | {"scale_factor": torch.tensor(0.25)}, tmp_path / "bare.ckpt")
    ldm, payload = checkpoint.load_ldm(tmp_path / "bare.ckpt", preset="tiny")
    assert payload["step"] == 0
    assert relative_error(ldm.encode(golden["vq/image"]), 0.25 * golden["vq/prequant"]) < 1e-4
    assert relative_error(ldm.decode(0.25 * golden["vq/prequant"]), golden["vq/decode"]) < 1e-4


def test_the_pose_arrives_as_the_seeds_ids(ckpt):
    """row + col * 32 on the 32 x 32 grid, one token of 17 numbers."""
    ldm, _ = checkpoint.load_ldm(ckpt, preset="tiny")
    pose = torch.from_numpy(np.random.default_rng(0).uniform(0, 1, (2, 17, 3)))
    seen = []
    ldm.cond.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    next(sample.sample(ldm, pose, [0, 1], 32, **sample.settings(ldm, steps=1)))
    col, row = (pose[..., 0] * 32).floor(), (pose[..., 1] * 32).floor()
    context = seen[0][-2:]                      # the null condition, where it is asked, is first
    assert context.shape == (2, 1, 17) and torch.equal(context[:, 0].double(), col * 32 + row)
    null, _ = ldm.cond(pose, (8, 8), torch.ones(2, dtype=torch.bool))
    assert null.shape == (2, 1, 17) and not null.any()


@pytest.mark.parametrize("flags, weights", [([], "EMA weights"), (["--no-ema"], "raw weights")])
def test_sample_py_draws_from_a_published_file(ckpt, tmp_path, capsys, monkeypatch, flags, weights):
    seen = {}
    original = sample.ddim

    def spy(diffusion, eps_fn, x_T, steps, eta, noise_fn, spacing, *more, **how):
        seen.update(eta=eta, spacing=spacing)
        return original(diffusion, eps_fn, x_T, steps, eta, noise_fn, spacing, *more, **how)
    monkeypatch.setattr(sample, "ddim", spy)
    pose, out = str(ROOT / "examples/poses/waving.json"), tmp_path / "s.png"
    assert sample.main([pose, "--ckpt", str(ckpt), "--preset", "tiny", "-n", "1", "--out", str(out),
                        "--device", "cpu", "--steps", "10", *flags]) == 0
    assert out.exists() and seen == {"eta": 0.0, "spacing": "uniform"}
    assert weights in capsys.readouterr().out


# ---- stage-1 files

def test_both_kinds_of_first_stage(tmp_path, networks, golden):
    vq = networks[1].state_dict()
    taming = vq | {"loss.discriminator.main.3.num_batches_tracked": torch.tensor(5),
                   "loss.perceptual_loss.x": torch.ones(1)}
    latent = {k: v * RAW_SCALE for k, v in vq.items()} | {"model_ema.decay": torch.tensor(0.9)}
    latent |= {"model_ema." + k.replace(".", ""): v for k, v in vq.items()}
    for name, state, weights in (("taming", taming, "raw"), ("latent", latent, "EMA")):
        path = tmp_path / f"{name}.ckpt"
        torch.save(lightning(state), path)
        payload = checkpoint.load(path, "vq")
        model = checkpoint.build_vq(payload, name)
        assert relative_error(model.decode(golden["vq/prequant"]), golden["vq/decode"]) < 1e-4
        assert payload["weights"] == weights and payload["step"] == 1234
        assert "stage 1" in refusal(path, "ldm", kind=checkpoint.WrongStage)
    raw = checkpoint.load(tmp_path / "latent.ckpt", "vq", ema=False)
    assert torch.equal(raw["vq"]["quant_conv.bias"], vq["quant_conv.bias"] * RAW_SCALE)


def test_the_first_stage_of_stage_2_ignores_its_own_ema(tmp_path, networks):
    """Stage 2 was trained on what the raw first stage encodes."""
    vq = networks[1].state_dict()
    state = full(networks) | {"first_stage_model.model_ema." + k.replace(".", ""): v * 2
                              for k, v in vq.items()}
    torch.save(state, tmp_path / "m.ckpt")
    found = checkpoint.load(tmp_path / "m.ckpt", "vq")["vq"]
    assert torch.equal(found["quant_conv.bias"], vq["quant_conv.bias"])


# ---- our own files

def test_raw_weights_of_our_own_files(tmp_path, ckpt):
    payload = checkpoint.load(ckpt, "ldm", preset="tiny")
    payload["config"]["preset"] = "toy"
    raw = {k: v + 1 for k, v in payload["unet"].items()}
    checkpoint.save(tmp_path / "last.pt", payload | {"train": {"unet": raw, "cond": {}}})
    checkpoint.save(tmp_path / "best.pt", payload)
    for ema, wanted in ((True, payload["unet"]), (False, raw)):
        ldm, _ = checkpoint.load_ldm(tmp_path / "last.pt", preset="toy", ema=ema)
        assert torch.equal(ldm.unet.state_dict()["out.2.bias"], wanted["out.2.bias"])
    with pytest.raises(ValueError, match=r"best.pt holds the EMA weights only; .*last.pt"):
        checkpoint.load(tmp_path / "best.pt", "ldm", ema=False)


def test_a_slim_file_is_the_same_model_in_half_precision(tmp_path, ckpt, capsys):
    payload = checkpoint.load(ckpt, "ldm", preset="tiny")
    big = {k: v for k, v in payload.items() if k not in ("source", "weights")} | {     # as if ours
        "train": {"unet": payload["unet"]}, "poses": torch.rand(5, 17, 3).half(),
        "mean": payload["mean"] + 0.1}
    was, now = tmp_path / "last.pt", tmp_path / "small.pt"
    checkpoint.save(was, big)
    assert checkpoint.main([str(was), str(now)]) == 0
    assert "small.pt: " in capsys.readouterr().out
    weights = sum(v.numel() for part in ("unet", "vq") for v in big[part].values())
    assert 2 * weights < now.stat().st_size < 2.3 * weights and was.stat().st_size > 4 * weights
    (whole, _), (half, small) = (checkpoint.load_ldm(path) for path in (was, now))
    assert "train" not in small and torch.equal(small["poses"], big["poses"])
    assert torch.equal(half.mean, whole.mean)
    for (name, a), b in zip(whole.state_dict().items(), half.state_dict().values(), strict=True):
        assert b.dtype == torch.float32 and (a - b).abs().max() <= a.abs().max() / 1024, name
    with pytest.raises(ValueError, match="vq.quant_conv.bias holds numbers beyond 65504"):
        checkpoint.slim(big | {"vq": big["vq"] | {"quant_conv.bias": torch.full((3,), 1e5)}})
    assert checkpoint.main([str(ckpt), str(now), "--preset", "tiny"]) == 0      # a published file
    assert checkpoint.load_ldm(now)[0].spacing == "uniform"
    for argv, words in (([str(ckpt), "x.pt"], "--preset"), ([str(was), str(was)], "another file"),
                        ([str(tmp_path / "none.pt"), "x.pt"], "there is no checkpoint")):
        assert checkpoint.main(argv) == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize("poses, words", [
    (torch.ones(1).half().expand(10 ** 12, 17, 3), "does not hold as many numbers.* poses"),
    (torch.full((2, 17, 3), torch.nan).half(), "is damaged"),
    (torch.ones(4, 16, 3).half(), "is damaged"), ([1, 2], "is damaged")])
def test_damaged_training_poses_are_one_sentence(tmp_path, poses, words):
    torch.save({"poses": poses}, tmp_path / "m.pt")
    with pytest.raises(ValueError, match=f"m.pt {words}"):
        checkpoint.training_poses(checkpoint.read(tmp_path / "m.pt"), tmp_path / "m.pt")


def test_a_hash_is_what_it_always_was():
    """Caches of latents are found by it."""
    state = {"b": torch.arange(6.0).view(2, 3), "a": torch.tensor([1, 2]),
             "half": torch.ones(3).half()}
    assert checkpoint.hash_of(state) == "a5b67ea0308d9af3"


@pytest.mark.parametrize("name", ["tpu", "cuda:99"])
def test_a_device_that_is_not_there_is_one_sentence(name):
    assert checkpoint.find_device("cpu") == "cpu"
    with pytest.raises(ValueError, match=f"--device is .*{name}.*use"):
        checkpoint.find_device(name)


@pytest.mark.parametrize("where, value, words", [
    ("vq_config.colour", "red", "vq_config that this version does not know"),
    ("vq_config.ch", 0, "does not fit its configuration"),
    ("vq_config.n_embed", 100, "quantize.embedding.weight: file (4096, 4), model (100, 4)"),
    ("vq_config.ch", 2 ** 20, "does not fit its configuration"),                # terabytes
    ("unet_config.num_res_blocks", 10 ** 9, "deeper than the weights"),
    ("unet_config.transformer_depth", 10 ** 9, "deeper than the weights"),
    ("vq.quant_conv.bias", torch.ones(1).expand(10 ** 9), "does not hold as many numbers"),
    ("vq.quant_conv.bias", torch.full((4,), torch.nan), "vq.quant_conv.bias that are not finite"),
    ("std", torch.full((4, 1, 1), torch.inf), "std that are not finite"),
    ("schedule", None, "lacks schedule"), ("format", 2, "has format 2"),
    ("stage", "vq", "of stage vq, but stage ldm")])
def test_a_damaged_or_hostile_file_of_ours_is_one_sentence(tmp_path, where, value, words):
    name, _, key = where.partition(".")
    payload = torch.load(ROOT / "assets/toy.pt", weights_only=True)
    payload[name] = {**payload[name], key: value} if key else value
    torch.save({k: v for k, v in payload.items() if v is not None}, tmp_path / "m.pt")
    assert words in refusal(tmp_path / "m.pt", preset=None)


# ---- presets and files of other architectures

def test_presets_that_do_not_fit_name_those_that_do(ckpt, monkeypatch):
    monkeypatch.setitem(PUBLISHED, "odd", Published(size=32, num_heads=5, cond=SEED))
    for preset in (None, "toy", "odd"):
        said = refusal(ckpt, preset=preset)
        assert f"--preset is {preset}; " in said and said.endswith(": danbooru, tiny")
    for name in ("danbooru", "tiny"):
        monkeypatch.delitem(PUBLISHED, name)
    assert refusal(ckpt, preset="odd").endswith(": none")


TO_K = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"


@pytest.mark.parametrize("removed, added, words", [
    ("first_stage_model.quantize.", {}, "no codebook"),
    (None, {"first_stage_model.quantize.embed.weight": torch.zeros(4, 3)},
     "quantize.embed.weight: file (4, 3), model lacks"),
    (None, {"cond_stage_model.transformer.weight": torch.zeros(3)}, "learned condition"),
    (None, {TO_K: torch.zeros(64, 77)}, "width 77"),
    ("first_stage_model.", {}, "no codebook"),
    (None, {"betas": torch.linspace(0.0015, 0.0195, 1000)}, "linear in sqrt"),
    ("betas", {}, "betas is missing"),
    (None, {"scale_factor": torch.tensor(float("nan"))}, "std that are not finite"),
    ("model_ema.diffusion_modelout2bias", {}, "out.2.bias"),
    (None, {"control_model.x": torch.zeros(3)}, "control_model.x: file (3,), model lacks"),
    ("model.diffusion_model.out.0.bias", {"model.diffusion_model.out.0.weight": torch.zeros(48)},
     "out.0.weight: file (48,), model (32,); unet.out.0.bias: file lacks it"),
    (None, {f"{compvis.UNET}out.2.bias": torch.ones(1).expand(10 ** 12)}, "as many numbers"),
    (None, {f"loss.{i}": torch.ones(1).expand(10 ** 5) for i in range(100)}, "as many numbers"),
])
def test_other_architectures_are_one_sentence(tmp_path, networks, removed, added, words):
    state = full(networks, ema=removed is not None and removed.startswith("model_ema"))
    state = {k: v for k, v in state.items() if not (removed and k.startswith(removed))} | added
    torch.save(lightning(state), tmp_path / "m.ckpt")
    assert words in refusal(tmp_path / "m.ckpt")


@pytest.mark.parametrize("found", [
    {"weights": torch.ones(1)}, {}, [1], {"state_dict": {"encoder.conv_in.weight": 3}},
    {"state_dict": {}}, {"encoder.conv_in.weight": torch.ones(0)},
    {"model.diffusion_model.x": torch.ones(1)}])
def test_a_file_that_is_no_checkpoint(tmp_path, found):
    torch.save(found, tmp_path / "m.ckpt")
    refusal(tmp_path / "m.ckpt", "vq")


# ---- files with objects in them

@pytest.fixture
def foreign_classes():
    """Modules that exist while a file is written and are gone when it is read: name -> module."""
    made = {}
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", "omegaconf",
                 "omegaconf.dictconfig"):
        made[name] = sys.modules[name] = types.ModuleType(name)

    def define(module: str, name: str, *bases: type) -> type:
        cls = type(name, bases, {"__module__": module})
        setattr(made[module], name, cls)
        return cls
    yield define
    forget_foreign_classes()


def forget_foreign_classes() -> None:
    for name in [n for n in sys.modules if n.split(".")[0] in ("pytorch_lightning", "omegaconf")]:
        del sys.modules[name]


@pytest.mark.parametrize("protocol", [2, 4, pickle.HIGHEST_PROTOCOL])
def test_foreign_objects_are_passed_over(tmp_path, networks, golden, foreign_classes, protocol):
    callback = foreign_classes("pytorch_lightning.callbacks", "ModelCheckpoint")
    thing = foreign_classes("omegaconf.dictconfig", "DictConfig")()
    thing.content = {"a": [1, 2], "path": Path("x"), "itself": thing}
    mapping = foreign_classes("omegaconf.dictconfig", "Mapping", dict)(a=1, b=thing)
    sequence = foreign_classes("omegaconf.dictconfig", "Sequence", list)([1, mapping])
    state = collections.OrderedDict(full(networks))
    state._metadata = {"": {"version": 1}}
    state["betas"] = torch.nn.Parameter(state["betas"], requires_grad=False)
    others = [np.arange(3), np.float64(1), {1, 2}, torch.float32, torch.Size([1]), int, str, dict,
              collections.defaultdict(dict, {1: {2: 3}}), frozenset([1]),
              collections.Counter("ab"), mapping, sequence]
    torch.save(lightning(state, callbacks={callback: {"best": thing}}, hyper_parameters=thing,
                         others=others), tmp_path / "m.ckpt", pickle_protocol=protocol)
    forget_foreign_classes()
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "m.ckpt", weights_only=True)
    payload = checkpoint.load(tmp_path / "m.ckpt", "ldm", preset="tiny")
    assert payload["step"] == 1234 and "omegaconf" not in sys.modules
    assert "omegaconf" not in str(torch.serialization.get_safe_globals())   # nothing stays allowed
    ldm = checkpoint.build_ldm(payload, "x")
    with torch.no_grad():
        out = ldm.unet(golden["unet/x"], golden["unet/t"], golden["unet/context"])
    assert relative_error(out, golden["unet/out"]) < 1e-4


def rewritten(path: Path, change: dict[str, bytes], compress: int = zipfile.ZIP_STORED) -> Path:
    """A file of torch.save with other bytes in some records, by the ends of their names."""
    torch.save({"format": 1, "x": torch.zeros(10 ** 5)}, path)
    with zipfile.ZipFile(path) as plain:
        records = {name: plain.read(name) for name in plain.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            new = next((v for end, v in change.items() if name.endswith(end)), content)
            archive.writestr(name, new, compress if "/data/" in name else zipfile.ZIP_STORED)
    return path


class Call:
    """Pickles as a call."""

    def __init__(self, function: object, *arguments: object):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("where", ["top", "in a foreign object", "in the state dict", "legacy"])
@pytest.mark.parametrize("kind", ["os.system", "eval", "open", "partial", "attrgetter"])
def test_nothing_in_a_file_is_run(tmp_path, foreign_classes, kind, where):
    owned, path = tmp_path / "owned", tmp_path / "m.ckpt"
    evil = {"os.system": Call(os.system, f"touch {owned}"),
            "eval": Call(eval, f"open({str(owned)!r}, 'w')"),
            "open": Call(io.open, str(owned), "w"),
            "partial": Call(functools.partial(os.system, f"touch {owned}")),
            "attrgetter": operator.attrgetter("system")}[kind]
    found = {"top": evil, "legacy": evil, "in the state dict": lightning({"x": evil})}.get(where)
    if found is None:
        found = lightning({}, x=foreign_classes("omegaconf.dictconfig", "DictConfig")())
        found["x"].content = {"deep": [evil]}
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        if where == "legacy":
            torch.save(found, path, pickle_protocol=protocol, _use_new_zipfile_serialization=False)
        else:
            rewritten(path, {"data.pkl": pickle.dumps(found, protocol)})
        said = refusal(path)
        assert "the file references" in said or where == "legacy"
        assert not owned.exists()
        if kind != "attrgetter":
            torch.load(path, weights_only=False)        # the file does hold a call that works
            assert owned.exists()
            owned.unlink()


@pytest.mark.parametrize("pickled, words", [
    (b"\x80\x02ctorch\nos.system\nX\x04\x00\x00\x00true\x85R.", "no state dict"),
    (b"\x80\x02c__builtin__\nset.__or__\n.", "set.__or__"),
    (b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00true\x85R.", "posix.system"),
    (b"\x80\x02(cos\nsystem\nX\x04\x00\x00\x00trueo.", "os.system"),           # OBJ
    (b"\x80\x02(X\x04\x00\x00\x00trueios\nsystem\n.", "os.system"),           # INST
    (b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.", "posix.system"),
    (b"\x80\x02\x8a\x01\x01r\xff\xff\xff\x7f.", "in the memo"),         # place 2^31 of the memo
    (b"\x80\x02X\xff\xff\xff\x7fa.", "cannot be read"),                     # a string of 2 GB
    (b"\x80\x02X\x01\x00\x00\x00xQ.", "cannot be read"),                    # an unknown reference
    (b"\x80\x02\x82\x01.", "cannot be read"),                               # the copyreg registry
    (b"\x80\x02c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R.", "bytearray"),     # 2 GB
    (b"\x80\x02}(N" + b"\x85" * 3_000_000 + b"K\x01u.", "nests tuples"),    # overflows C's stack
], ids=lambda value: repr(value)[:60])
def test_crafted_pickles_are_refused(tmp_path, pickled, words):
    assert words in refusal(rewritten(tmp_path / "m.ckpt", {"data.pkl": pickled}))


@pytest.mark.parametrize("name", [b"torch._utils\n_rebuild_tensor_v2", b"omegaconf\nX"])
@pytest.mark.parametrize("state", [b"}X\x04\x00\x00\x00evilK\x01s",
                                   b"N}X\x08\x00\x00\x00__call__K\x01s\x86"])
def test_a_pickle_cannot_change_the_classes_it_names(tmp_path, name, state):
    """BUILD sets attributes; on a class or a function these would outlive the file."""
    things = (compvis.Inert, torch._utils._rebuild_tensor_v2)
    before = [dict(vars(thing)) for thing in things]
    pickled = b"\x80\x02c" + name + b"\n" + state + b"b."
    refusal(rewritten(tmp_path / "m.ckpt", {"data.pkl": pickled}))
    assert [dict(vars(thing)) for thing in things] == before


def test_compressed_records_are_refused(tmp_path):
    """torch.load alone opens such a file in a thousand times its size."""
    path = rewritten(tmp_path / "m.pt", {}, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 10 ** 4
    assert len(torch.load(path, weights_only=True)["x"]) == 10 ** 5
    assert "records are compressed or overlap" in refusal(path, "vq")


def test_records_that_overlap_are_refused(tmp_path):
    """Each of fifty entries may point at the same bytes."""
    path = rewritten(tmp_path / "m.ckpt", {})
    with zipfile.ZipFile(path, "a") as archive:
        first = max(archive.infolist(), key=lambda record: record.file_size)
        for i in range(50):
            twin = zipfile.ZipInfo(f"archive/data/{i + 1}")
            twin.header_offset, twin.file_size, twin.CRC = (
                first.header_offset, first.file_size, first.CRC)
            twin.compress_size = first.compress_size
            archive.filelist.append(twin)
        archive._didModify = True
    assert "records are compressed or overlap" in refusal(path)


def test_a_program_is_refused(tmp_path):
    """As torch.jit saves it, with compressed records, and with plain ones."""
    program, plain = tmp_path / "program.pt", tmp_path / "plain.pt"
    torch.jit.script(torch.nn.ReLU()).save(str(program))
    with zipfile.ZipFile(program) as source, zipfile.ZipFile(plain, "w") as archive:
        for name in source.namelist():
            archive.writestr(name, source.read(name))
    assert all("cannot be read" in refusal(path) for path in (program, plain))


def test_truncated_files_are_one_sentence(tmp_path, networks, foreign_classes):
    thing = foreign_classes("omegaconf.dictconfig", "DictConfig")()
    torch.save(lightning(full(networks), x=thing), tmp_path / "whole.ckpt")
    forget_foreign_classes()
    whole = (tmp_path / "whole.ckpt").read_bytes()
    bad = tmp_path / "m.ckpt"
    for share in (0, 1e-5, 0.01, 0.5, 0.99, 0.99999):
        bad.write_bytes(whole[:int(share * len(whole))])
        assert "cut short" in refusal(bad)
    bad.write_bytes(whole[:-10 ** 5] + b"x" + whole[-10 ** 5 + 1:])
    assert "checksum" in refusal(bad)


# ---- LPIPS

def lpips_state() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {k: v if k.startswith("scaling") else torch.rand(v.shape, generator=g) * 0.02
            for k, v in LPIPS().state_dict().items()}


def test_lpips_weights_in_every_naming(tmp_path):
    """torchvision's and lpips' files, a whole lpips state dict and a taming .ckpt are the same."""
    state = lpips_state()
    vgg = {"features." + k.split(".", 2)[2]: v for k, v in state.items() if k.startswith("net.")}
    assert {"features.0.weight", "features.2.bias", "features.28.bias"} <= vgg.keys()
    linear = {k: v for k, v in state.items() if k.startswith("lin")}
    torch.save(vgg | {"classifier.0.weight": torch.ones(2)}, tmp_path / "vgg16.pth",
               _use_new_zipfile_serialization=False)
    torch.save(linear, tmp_path / "lin.pth")
    torch.save({"lins." + k[3:]: v for k, v in linear.items()}, tmp_path / "lins.pth")
    torch.save(state | {"lins." + k[3:]: v for k, v in linear.items()}, tmp_path / "whole.pth")
    torch.save(lightning({"loss.perceptual_loss." + k: v for k, v in state.items()} | {
        "encoder.conv_in.weight": torch.ones(1)}), tmp_path / "taming.ckpt")
    for names in (["vgg16.pth", "lin.pth"], ["lins.pth", "vgg16.pth"], ["whole.pth"],
                  ["taming.ckpt"]):
        model = formats.lpips.load_lpips([tmp_path / name for name in names])
        got = model.state_dict()
        assert not model.training and not any(p.requires_grad for p in model.parameters())
        assert got.keys() == state.keys()
        assert all(torch.equal(got[k], state[k]) for k in state), names


def test_missing_weights_of_lpips_are_named(tmp_path):
    state = lpips_state()
    for prefix in ("net", "lin"):
        some = {k: v for k, v in state.items() if k.startswith(prefix)}
        torch.save(some, tmp_path / f"{prefix}.pth")
    torch.save({"features.0.weight": torch.ones(64, 3, 11, 11)}, tmp_path / "alexnet.pth")
    torch.save({"features.x.weight": torch.ones(1)}, tmp_path / "other.pth")
    for files, words in (
            (["net.pth"], ["lacks 5", "lin0.model.1.weight", "v0.1/vgg.pth"]),
            (["lin.pth"], ["lacks 26", "net.slice1.0.weight", "vgg16-397923af.pth"]),
            (["net.pth", "lin.pth", "alexnet.pth"], ["(64, 3, 11, 11)", "(64, 3, 3, 3)"]),
            (["other.pth"], ["other.pth has no tensor of LPIPS"]), (["absent.pth"], ["no file"])):
        with pytest.raises(ValueError) as e:
            formats.lpips.load_lpips([tmp_path / name for name in files])
        said = str(e.value)
        assert "\n" not in said and all(word in said for word in words), said


@pytest.fixture
def downloads(tmp_path, monkeypatch):
    """Two small files behind file: URLs in place of the real ones."""
    contents = (b"convolutions" * 100, b"linear")
    files = []
    for i, content in enumerate(contents):
        (tmp_path / f"source{i}").write_bytes(content)
        files.append(formats.lpips.Download(f"file{i}.pth", (tmp_path / f"source{i}").as_uri(),
                                            hashlib.sha256(content).hexdigest(), "x"))
    monkeypatch.setattr(formats.lpips, "LPIPS_FILES", tuple(files))
    return contents


def test_a_download_happens_once(tmp_path, downloads, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    paths = formats.lpips.download_lpips()
    assert paths[0].parent == tmp_path / "hub/checkpoints"
    assert [p.read_bytes() for p in paths] == list(downloads)
    paths[1].write_bytes(b"damaged")
    (tmp_path / "source0").unlink()                         # only the damaged one is fetched again
    assert [p.read_bytes() for p in formats.lpips.download_lpips()] == list(downloads)


@pytest.mark.parametrize("mistake", ["content", "absent", "refused"])
def test_a_failed_download_is_one_sentence_and_leaves_nothing(tmp_path, downloads, monkeypatch,
                                                              mistake):
    if mistake == "content":
        (tmp_path / "source0").write_bytes(b"another file")
    elif mistake == "absent":
        (tmp_path / "source0").unlink()
    else:
        first, second = formats.lpips.LPIPS_FILES
        refused = formats.lpips.Download(first.name, "http://127.0.0.1:9/x", first.sha256, "x")
        monkeypatch.setattr(formats.lpips, "LPIPS_FILES", (refused, second))
    with pytest.raises(ValueError, match="cannot be downloaded") as e:
        formats.lpips.download_lpips(tmp_path / "cache")
    assert "\n" not in str(e.value) and os.listdir(tmp_path / "cache") == []
