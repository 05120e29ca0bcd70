"""Published CompVis checkpoints and LPIPS weights: what is read out of them, against golden numbers, what is not."""
import builtins
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
from unet import UNet, UNetConfig
from vq import LPIPS, VQConfig, VQModel

ROOT = Path(__file__).parent.parent
SEED = ConditionConfig(("seed",), seed_dim=32)
RAW_SCALE = 1.25                # raw weights are the EMA weights times this, so that a mix-up shows
SMALL_VQ = VQConfig(ch=8, n_embed=32, resolution=16, norm_groups=0)


@pytest.fixture(autouse=True)
def tiny_preset(monkeypatch):
    """The golden networks have 4 heads, and their latents are 8 x 8."""
    monkeypatch.setitem(PUBLISHED, "tiny", Published(size=32, num_heads=4, cond=SEED))


@pytest.fixture(scope="module")
def networks(golden_config) -> tuple[UNet, VQModel]:
    unet = golden_config["unet"]
    vq = golden_config["vq"]
    dd = {k: tuple(v) if isinstance(v, list) else v for k, v in vq["ddconfig"].items() if k != "double_z"}
    config = VQConfig(**dd, embed_dim=vq["embed_dim"], n_embed=vq["n_embed"])
    unet = UNet(UNetConfig(**{k: unet[k] for k in UNetConfig.__dataclass_fields__ if k in unet}))
    return golden_weights("model.diffusion_model.", unet), golden_weights("first_stage_model.", VQModel(config))


def full(networks: tuple[UNet, VQModel], ema: bool = True) -> dict[str, Tensor]:
    """A stage-2 state dict as CompVis saves it; the golden weights are its EMA copy, or its only ones."""
    unet, vq = networks
    scale = RAW_SCALE if ema else 1.0
    state = {"betas": Diffusion().betas.float(), "alphas_cumprod": Diffusion().alphas_bar.float(),
             "scale_factor": torch.tensor(1.0), "logvar": torch.zeros(1000)}
    state |= {f"model.diffusion_model.{k}": v * scale for k, v in unet.state_dict().items()}
    state |= {f"first_stage_model.{k}": v for k, v in vq.state_dict().items()}
    if ema:
        state |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7, dtype=torch.int32)}
        state |= {"model_ema.diffusion_model" + k.replace(".", ""): v for k, v in unet.state_dict().items()}
    return state


def lightning(state: dict[str, Tensor], **more: object) -> dict:
    return {"epoch": 3, "global_step": 1234, "pytorch-lightning_version": "1.4.2", "state_dict": state, **more}


@pytest.fixture
def ckpt(tmp_path, networks) -> Path:
    torch.save(lightning(full(networks)), tmp_path / "model.ckpt")
    return tmp_path / "model.ckpt"


def refusal(path: Path, stage: str = "ldm", preset: str | None = "tiny", kind: type = ValueError) -> str:
    """The one sentence with which a file is refused."""
    with pytest.raises(kind) as e:
        checkpoint.build_ldm(checkpoint.load(path, stage, preset=preset), str(path))
    assert "\n" not in str(e.value) and path.name in str(e.value)
    return str(e.value)


# ---- what a published file says

def test_sizes_are_read_off_the_tensors(ckpt, networks):
    payload = checkpoint.load(ckpt, "ldm", preset="tiny")
    unet, vq = networks
    assert UNetConfig(**payload["unet_config"]) == unet.config
    # attn_resolutions and resolution mean something only together: there is no attention here
    assert VQConfig(**payload["vq_config"]) == checkpoint.VQConfig(**{**vars(vq.config), "resolution": 256})
    assert payload["schedule"] == {"timesteps": 1000, "linear_start": 0.0015, "linear_end": 0.0195}
    assert (payload["step"], payload["source"], payload["weights"], payload["knows_null"]) == (1234, "CompVis", "EMA",
                                                                                               False)
    assert payload["config"] == {"size": 32, "data": None, "val": None, "preset": "tiny"}
    assert payload["cond_config"]["doors"] == ("seed",) and payload["cond_config"]["seed_dim"] == 32
    ldm, _ = checkpoint.load_ldm(ckpt, preset="tiny")
    assert (ldm.guidance, ldm.eta) == (1.0, 0.0)
    said = compvis.describe(payload, ckpt)
    assert "\n" not in said and all(word in said for word in ("model.ckpt", "ldm", "EMA", "1234", "(1, 2)", "64 codes"))


def listed(name: str) -> dict[str, Tensor]:
    """The tensors of a key list of a real file, on the meta device."""
    entries = json.loads((GOLDEN / name).read_text())
    return {k: torch.empty(shape, dtype=getattr(torch, dtype), device="meta") for k, (shape, dtype) in entries.items()}


def test_what_tensors_do_not_tell_is_what_the_preset_trains_with():
    for name, told in PUBLISHED.items():
        if name != "tiny":                          # the fixture's
            preset = train.PRESETS[name]
            assert (told.size, told.num_heads, told.cond) == (preset.size, preset.unet["num_heads"], preset.cond)


def test_the_published_key_lists_give_the_default_configs(tmp_path):
    """The key list of the 256 x 256 recipe gives UNetConfig() and VQConfig(), which are that recipe."""
    path = tmp_path / "danbooru.ckpt"
    path.touch()
    os.truncate(path, 4 * 2 ** 30)                  # as large as the real one says it is, without taking the space
    state = listed("danbooru_keypoints_ldm_state_dict.json") | {"betas": Diffusion().betas.float()}
    payload = compvis.published({"state_dict": state}, path, "ldm", None, "danbooru", True)
    assert UNetConfig(**payload["unet_config"]) == UNetConfig() and VQConfig(**payload["vq_config"]) == VQConfig()
    assert payload["weights"] == "EMA" and payload["config"]["size"] == 256
    with torch.device("meta"):
        own = {"unet": UNet(UNetConfig()).state_dict(), "vq": VQModel(VQConfig()).state_dict()}
    for name in own:
        assert {k: v.shape for k, v in payload[name].items()} == {k: v.shape for k, v in own[name].items()}
    stage1 = compvis.published(listed("danbooru_vq_f4_state_dict.json"), path, "vq", None, None, True)
    assert VQConfig(**stage1["vq_config"]) == VQConfig() and stage1["weights"] == "raw"
    assert stage1["vq"].keys() == own["vq"].keys() and stage1["config"]["size"] is None


@pytest.mark.parametrize("config", [
    VQConfig(ch=32, ch_mult=(1, 2, 2, 4), num_res_blocks=2, z_channels=4, embed_dim=6, n_embed=50, in_channels=1,
             out_ch=2, attn_resolutions=(64, 32)),
    VQConfig(ch=64, ch_mult=(1,), num_res_blocks=1, n_embed=16, attn_resolutions=(256,))])
def test_any_first_stage_is_read_back(config):
    state = VQModel(config).state_dict()
    assert VQConfig(**compvis.first_stage(state, Path("x"), True)[0]["vq_config"]) == config


@pytest.mark.parametrize("config", [
    UNetConfig(model_channels=32, channel_mult=(1, 2, 2), num_res_blocks=1, attention_resolutions=(4, 1)),
    UNetConfig(4, 5, model_channels=64, channel_mult=(2, 1), num_res_blocks=3, attention_resolutions=(),
               transformer_depth=3),
    UNetConfig(model_channels=32, channel_mult=(1,), num_res_blocks=2, attention_resolutions=(1,))])
def test_any_unet_is_read_back(config):
    with torch.device("meta"):
        state = UNet(config).state_dict()
    assert UNetConfig(**compvis.unet_config(state, Path("x")), num_heads=8) == config


# ---- what a published file draws

@pytest.mark.parametrize("ema, steps", [(True, 10), (True, 20), (False, 10)])
def test_sampling_equals_the_reference(tmp_path, networks, golden, ema, steps):
    """Golden trajectories through the loaded model; the golden context is not a pose, so it goes to the UNet itself."""
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
    name = "out.2.weight"
    wanted = networks[0].state_dict()[name]
    for ema, factor in ((True, 1.0), (False, RAW_SCALE)):
        ldm, payload = checkpoint.load_ldm(ckpt, preset="tiny", ema=ema)
        assert torch.equal(ldm.unet.state_dict()[name], wanted * factor)
        assert payload["weights"] == ("EMA" if ema else "raw")


def test_scale_factor_divides_the_latent(tmp_path, networks, golden):
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
    null, context = seen[0][:1], seen[0][1:]
    assert context.shape == (2, 1, 17) and torch.equal(context[:, 0].double(), col * 32 + row) and not null.any()


@pytest.mark.parametrize("flags, words", [
    (["--steps", "10"], "uniform"), (["--steps", "10", "--spacing", "even", "--no-ema"], "even")])
def test_sample_py_draws_from_a_published_file(ckpt, tmp_path, capsys, monkeypatch, flags, words):
    seen = {}
    original = sample.ddim

    def spy(diffusion, eps_fn, x_T, steps, eta, noise_fn, spacing):
        seen.update(eta=eta, spacing=spacing)
        return original(diffusion, eps_fn, x_T, steps, eta, noise_fn, spacing)
    monkeypatch.setattr(sample, "ddim", spy)
    pose = str(sorted((ROOT / "examples/poses").glob("*.json"))[0])
    command = [pose, "--ckpt", str(ckpt), "--preset", "tiny", "-n", "1", "--out", str(tmp_path / "s.png"),
               "--device", "cpu", *flags]
    assert sample.main(command) == 0 and (tmp_path / "s.png").exists()
    assert seen == {"eta": 0.0, "spacing": words}
    assert ("raw weights" if "--no-ema" in flags else "EMA weights") in capsys.readouterr().out


def test_uniform_spacing_that_cannot_be_is_one_sentence(ckpt, tmp_path, capsys):
    pose = str(sorted((ROOT / "examples/poses").glob("*.json"))[0])
    assert sample.main([pose, "--ckpt", str(ckpt), "--preset", "tiny", "--steps", "3", "--device", "cpu",
                        "--out", str(tmp_path / "s.png")]) == 2
    assert "spacing" in capsys.readouterr().err and not (tmp_path / "s.png").exists()


# ---- stage-1 files

def test_both_kinds_of_first_stage(tmp_path, networks, golden):
    vq = networks[1].state_dict()
    taming = {k: v.clone() for k, v in vq.items()} | {
        "loss.discriminator.main.3.num_batches_tracked": torch.tensor(5), "loss.perceptual_loss.x": torch.ones(1)}
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
    state = full(networks) | {"first_stage_model.model_ema." + k.replace(".", ""): v * 2 for k, v in vq.items()}
    torch.save(state, tmp_path / "m.ckpt")
    assert torch.equal(checkpoint.load(tmp_path / "m.ckpt", "vq")["vq"]["quant_conv.bias"], vq["quant_conv.bias"])


# ---- our own files

def test_raw_weights_of_our_own_files(tmp_path, ckpt):
    payload = checkpoint.load(ckpt, "ldm", preset="tiny")
    raw = {k: v + 1 for k, v in payload["unet"].items()}
    payload["config"]["preset"] = "toy"
    checkpoint.save(tmp_path / "last.pt", payload | {"train": {"unet": raw, "cond": {}}})
    checkpoint.save(tmp_path / "best.pt", payload)
    name = "out.2.bias"
    for ema, wanted in ((True, payload["unet"]), (False, raw)):
        ldm, _ = checkpoint.load_ldm(tmp_path / "last.pt", preset="toy", ema=ema)
        assert torch.equal(ldm.unet.state_dict()[name], wanted[name])
    with pytest.raises(ValueError, match=r"best.pt holds the EMA weights only; .*last.pt"):
        checkpoint.load(tmp_path / "best.pt", "ldm", ema=False)
    with pytest.raises(ValueError, match="--preset is danbooru, but .*best.pt was trained with preset toy"):
        checkpoint.load(tmp_path / "best.pt", "ldm", preset="danbooru")


def test_a_slim_file_is_the_same_model_in_half_precision(tmp_path, ckpt, capsys):
    payload = checkpoint.load(ckpt, "ldm", preset="tiny")
    ours = {k: v for k, v in payload.items() if k not in ("source", "weights")}     # as if we had trained it
    big = ours | {"train": {"unet": payload["unet"]}, "poses": torch.rand(5, 17, 3).half(),
                  "mean": payload["mean"] + 0.1}
    checkpoint.save(tmp_path / "last.pt", big)
    assert checkpoint.main([str(tmp_path / "last.pt"), str(tmp_path / "small.pt")]) == 0
    assert "small.pt: " in capsys.readouterr().out
    was, now = (tmp_path / name for name in ("last.pt", "small.pt"))
    weights = sum(v.numel() for part in ("unet", "vq") for v in big[part].values())
    assert 2 * weights < now.stat().st_size < 2.3 * weights and was.stat().st_size > 4 * weights
    (full, _), (half, small) = (checkpoint.load_ldm(path) for path in (was, now))
    assert "train" not in small and torch.equal(small["poses"], big["poses"]) and torch.equal(half.mean, full.mean)
    for (name, a), b in zip(full.state_dict().items(), half.state_dict().values(), strict=True):
        assert b.dtype == torch.float32 and (a - b).abs().max() <= a.abs().max() / 1024, name
    with pytest.raises(ValueError, match="conv_in.bias holds numbers beyond 65504"):
        checkpoint.slim(big | {"vq": big["vq"] | {"encoder.conv_in.bias": torch.full((8,), 1e5)}})
    for argv, words in (([str(ckpt), "x.pt"], "preset"), ([str(was), str(was)], "another file"),
                        ([str(tmp_path / "none.pt"), "x.pt"], "there is no checkpoint")):
        assert checkpoint.main(argv) == 2 and words in capsys.readouterr().err


# ---- presets

def test_presets_that_do_not_fit_name_those_that_do(ckpt, monkeypatch):
    monkeypatch.setitem(PUBLISHED, "odd", Published(size=32, num_heads=5, cond=SEED))
    assert "give --preset danbooru or tiny" in refusal(ckpt, preset=None)
    assert "num_heads" in refusal(ckpt, preset=None) and "size" in refusal(ckpt, preset=None)
    for wrong in ("toy", "odd"):
        said = refusal(ckpt, preset=wrong)
        assert f"preset {wrong}" in said and said.endswith("preset danbooru or tiny fits it")
    for name in ("danbooru", "tiny"):
        monkeypatch.delitem(PUBLISHED, name)
    assert "none of odd fits it" in refusal(ckpt, preset="odd")


# ---- files of other architectures

def other(change: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    if change == "kl":
        return {k: v for k, v in state.items() if ".quantize." not in k}
    if change == "unet alone":
        return {k: v for k, v in state.items() if not k.startswith("first_stage_model.")}
    if change == "no betas":
        return {k: v for k, v in state.items() if k != "betas"}
    if change == "wide context":
        key = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
        return state | {key: torch.zeros(64, 77)}
    if change == "half an ema":
        return {k: v for k, v in state.items() if k != "model_ema.diffusion_modelout2bias"}
    return state | {"gumbel": {"first_stage_model.quantize.embed.weight": torch.zeros(4, 3)},
                    "text": {"cond_stage_model.transformer.weight": torch.zeros(3)},
                    "betas": {"betas": torch.linspace(0.0015, 0.0195, 1000)},
                    "scale": {"scale_factor": torch.tensor(float("nan"))},
                    "control": {"control_model.x": torch.zeros(3)}}[change]


@pytest.mark.parametrize("change, words", [
    ("kl", "KL autoencoder"), ("gumbel", "Gumbel"), ("text", "learned condition"), ("wide context", "77"),
    ("unet alone", "without its first stage"), ("betas", "linear in sqrt"), ("no betas", "betas"),
    ("scale", "scale_factor"), ("half an ema", "out.2.bias"), ("control", "control_model.x: file (3,), model lacks")])
def test_other_architectures_are_one_sentence(tmp_path, networks, change, words):
    torch.save(lightning(other(change, full(networks))), tmp_path / "m.ckpt")
    assert words in refusal(tmp_path / "m.ckpt")


def test_a_tensor_that_does_not_fit_is_named_with_both_shapes(tmp_path, networks):
    state = full(networks, ema=False)
    state["model.diffusion_model.middle_block.0.in_layers.0.weight"] = torch.zeros(48)
    del state["model.diffusion_model.out.0.bias"]
    torch.save(state, tmp_path / "m.ckpt")
    said = refusal(tmp_path / "m.ckpt")
    for words in ("middle_block.0.in_layers.0.weight: file (48,), model (64,)", "out.0.bias: file lacks it"):
        assert words in said


@pytest.mark.parametrize("found", [
    {"weights": torch.ones(1)}, {}, [1], {"state_dict": {"encoder.conv_in.weight": 3}}, {"state_dict": {}},
    {"encoder.conv_in.weight": torch.ones(1).expand(10 ** 6, 10 ** 6, 3, 3)}, {"encoder.conv_in.weight": torch.ones(0)},
    {"model.diffusion_model.x": torch.ones(1)}])
def test_a_file_that_is_no_checkpoint(tmp_path, found):
    torch.save(found, tmp_path / "m.ckpt")
    refusal(tmp_path / "m.ckpt", "vq")


# ---- files with objects in them

def test_a_tensor_expanded_out_of_one_number_is_refused(tmp_path, networks):
    """A file of a few bytes may not become terabytes when the model it describes is made."""
    state = full(networks) | {f"{compvis.UNET}out.2.bias": torch.ones(1).expand(10 ** 12)}
    torch.save({"state_dict": state}, tmp_path / "bomb.ckpt")
    said = refusal(tmp_path / "bomb.ckpt")
    assert "does not hold as many numbers as its tensors say; model.diffusion_model.out.2.bias" in said


def test_many_tensors_out_of_one_storage_are_refused(tmp_path, networks):
    one = torch.ones(10 ** 5)
    torch.save({"state_dict": full(networks) | {f"loss.{i}": one[:] for i in range(100)}}, tmp_path / "bomb.ckpt")
    assert "does not hold as many numbers" in refusal(tmp_path / "bomb.ckpt")


NAN = torch.full((3, 1, 1), torch.nan)


@pytest.mark.parametrize("where, value, words", [
    ("vq_config.ch", 2 ** 20, "does not fit its configuration"),               # terabytes, were it made
    ("vq_config.ch", 32.5, "no network can be made"), ("vq_config.ch", 2 ** 40, "no network can be made"),
    ("vq_config.colour", "red", "vq_config that this version does not know"),
    ("vq_config.ch_mult", 3, "vq_config that this version does not know"),
    ("vq_config.ch_mult", [1] * 100_000, "for vq_config.ch_mult, but at most 8"),
    ("vq_config.ch", torch.tensor(32), "torch.int64 [] for vq_config.ch"),
    ("vq_config.embed_dim", torch.ones(2), "for vq_config.embed_dim"), ("vq_config", [1], "list [1] for vq_config"),
    ("unet_config.num_res_blocks", 3_000_000, "for unet_config.num_res_blocks, but at most 64"),
    ("unet_config.transformer_depth", 10 ** 9, "for unet_config.transformer_depth, but at most 16"),
    ("vq.quant_conv.bias", torch.ones(1).expand(10 ** 9), "does not hold as many numbers"),
    ("vq.quant_conv.bias", NAN[:, 0, 0], "vq.quant_conv.bias that are not finite"),
    ("vq.quant_conv.bias", torch.ones(3).to_sparse(), "for vq.quant_conv.bias, but a plain tensor"),
    ("vq.quant_conv.bias", torch.ones(3, device="meta"), "for vq.quant_conv.bias, but a plain tensor"),
    ("vq.quant_conv.bias", 3, "int 3 for vq.quant_conv.bias"), ("vq", [1], "list [1] for vq"),
    ("unet", None, "NoneType None for unet"), ("stage", torch.ones(2), "no checkpoint of this project"),
    ("config", [1], "list [1] for config"), ("config", {}, "NoneType None for config.size"),
    ("config.size", "64", "str '64' for config.size"), ("config.size", 0, "int 0 for config.size, but 8 to 4096"),
    ("mean", 0.5, "float 0.5 for mean"), ("mean", torch.zeros(5, 1, 1), "torch.float32 [5, 1, 1] for mean"),
    ("std", NAN, "std that are not finite"), ("step", "3", "str '3' for step"),
    ("schedule", [1], "list [1] for schedule"), ("schedule", {"bogus": 1}, "for schedule, but a dict of"),
    ("schedule.timesteps", 10 ** 9, "at most 10000 timesteps"), ("schedule.linear_end", "1", "for schedule"),
    ("format", torch.ones(2), "no checkpoint of this project"),
    ("knows_null", torch.ones(2), "torch.float32 [2] for knows_null"),
])
def test_our_own_files_may_not_claim_to_be_giants_or_hold_anything_else(tmp_path, where, value, words):
    name, _, key = where.partition(".")
    payload = torch.load(ROOT / "assets/toy.pt", weights_only=True)
    payload[name] = {**payload[name], key: value} if key else value
    torch.save(payload, tmp_path / "m.pt")
    assert words in refusal(tmp_path / "m.pt", preset=None)


@pytest.fixture
def foreign_classes():
    """Modules that exist while a file is written and are gone when it is read: name -> module."""
    made = {}
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", "omegaconf", "omegaconf.dictconfig"):
        made[name] = sys.modules[name] = types.ModuleType(name)

    def define(module: str, name: str, *bases: type) -> type:
        cls = type(name, bases, {"__module__": module})
        setattr(made[module], name, cls)
        return cls
    yield define
    for name in made:
        sys.modules.pop(name, None)


def forget_foreign_classes() -> None:
    for name in [n for n in sys.modules if n.split(".")[0] in ("pytorch_lightning", "omegaconf")]:
        del sys.modules[name]


def test_foreign_objects_are_passed_over(tmp_path, networks, golden, foreign_classes):
    callback = foreign_classes("pytorch_lightning.callbacks", "ModelCheckpoint")
    config = foreign_classes("omegaconf.dictconfig", "DictConfig")
    attributes = foreign_classes("omegaconf", "AttributeDict", dict)
    items = foreign_classes("omegaconf", "ListConfig", list)
    thing = config()
    thing.content = {"a": attributes(b=items([1, 2])), "path": Path("x"), "itself": thing}
    state = collections.OrderedDict(full(networks))
    state._metadata = {"": {"version": 1}}
    state["betas"] = torch.nn.Parameter(state["betas"], requires_grad=False)
    torch.save(lightning(state, callbacks={callback: {"best": thing}}, hyper_parameters=thing,
                         more=[np.arange(3), np.float64(1), {1, 2}, torch.float32, torch.Size([1]), int, str, dict,
                               collections.defaultdict(list, a=[1])]), tmp_path / "m.ckpt")
    forget_foreign_classes()
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "m.ckpt", weights_only=True)
    payload = checkpoint.load(tmp_path / "m.ckpt", "ldm", preset="tiny")
    assert payload["step"] == 1234 and "omegaconf" not in sys.modules
    ldm = checkpoint.build_ldm(payload, "x")
    with torch.no_grad():
        out = ldm.unet(golden["unet/x"], golden["unet/t"], golden["unet/context"])
    assert relative_error(out, golden["unet/out"]) < 1e-4


def test_every_type_and_view_of_tensor_is_read_as_torch_reads_it(tmp_path, foreign_classes):
    base = torch.arange(24.0).view(4, 6)
    state = {str(dtype): base.to(dtype) for dtype in checkpoint.STORAGES.values()}
    state |= {"view": base[1:, ::2], "transposed": base.T, "scalar": torch.tensor(7), "empty": torch.ones(0, 3)}
    thing = foreign_classes("omegaconf.dictconfig", "DictConfig")()
    torch.save({"state_dict": state, "x": thing}, tmp_path / "m.ckpt")
    forget_foreign_classes()
    found = checkpoint.read(str(tmp_path / "m.ckpt"))                     # a str will do
    assert found["state_dict"].keys() == state.keys()
    for name, tensor in state.items():
        got = found["state_dict"][name]
        assert got.dtype == tensor.dtype and torch.equal(got, tensor), name


class Call:
    """Pickles as a call."""

    def __init__(self, function: object, *arguments: object):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def attack(kind: str, touch: str) -> object:
    return {"os.system": Call(os.system, f"touch {touch}"),
            "eval": Call(builtins.eval, f"open({touch!r}, 'w')"),
            "open": Call(io.open, touch, "w"),
            "partial": functools.partial(os.system, f"touch {touch}"),
            "attrgetter": operator.attrgetter("system")}[kind]


@pytest.mark.parametrize("kind, words", [
    ("os.system", "system"), ("eval", "eval"), ("open", "open"), ("partial", "partial"), ("attrgetter", "attrgetter")])
@pytest.mark.parametrize("where", ["top", "in a foreign object", "in the state dict", "legacy"])
def test_nothing_in_a_file_is_run(tmp_path, networks, foreign_classes, kind, words, where):
    thing = foreign_classes("omegaconf.dictconfig", "DictConfig")()
    evil = attack(kind, str(tmp_path / "owned"))
    found = lightning(full(networks))
    if where == "in a foreign object":
        thing.content = {"deep": [evil]}
        found["hyper_parameters"] = thing
    elif where == "in the state dict":
        found["state_dict"]["x"] = evil
    else:
        found["callbacks"] = evil
    torch.save(found, tmp_path / "m.ckpt", _use_new_zipfile_serialization=where != "legacy")
    forget_foreign_classes()
    said = refusal(tmp_path / "m.ckpt")
    assert words in said or where == "legacy"
    assert not (tmp_path / "owned").exists()


def crafted(path: Path, pickled: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
    return path


@pytest.mark.parametrize("pickled, words", [
    (b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93\x8c\x04true\x85R.", "torch.os.system"),       # a dotted name
    (b"\x80\x04\x8c\x08builtins\x8c\x0aset.__or__\x93.", "set.__or__"),
    (b"\x80\x02cposix\nsystem\n(X\x04\x00\x00\x00truetR.", "posix.system"),
    (b"\x80\x02(cos\nsystem\nX\x04\x00\x00\x00trueo.", "os.system"),                            # OBJ
    (b"\x80\x02(X\x04\x00\x00\x00trueios\nsystem\n.", "os.system"),                             # INST
    (b"\x80\x02\x8a\x01\x01r\xff\xff\xff\x7f.", "memory"),                                      # 2^31 memo places
    (b"\x80\x02X\xff\xff\xff\x7fa.", "cannot be read"),                                         # a string of 2 GB
    (b"\x80\x02X\x01\x00\x00\x00xQ.", "cannot be read"),                                        # an unknown reference
    (b"\x80\x02\x82\x01.", "cannot be read"),                                                   # the copyreg registry
    (b"\x80\x02c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R.", "bytearray"),                # 2 GB, as torch makes it
    (b"\x80\x02}(N" + b"\x85" * 3_000_000 + b"K\x01u.", "nests tuples"),                      # overflows C's stack
])
def test_crafted_pickles_are_refused(tmp_path, pickled, words):
    assert words in refusal(crafted(tmp_path / "m.ckpt", pickled))


@pytest.mark.parametrize("target", [b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n",
                                    b"comegaconf\nX\n", b"ctorch._utils\n_rebuild_parameter\n",
                                    b"ctorch\nFloatStorage\n"])
@pytest.mark.parametrize("state", [b"}X\x04\x00\x00\x00evilK\x01s", b"N}X\x08\x00\x00\x00__call__K\x01s\x86"])
def test_a_pickle_cannot_change_the_classes_it_names(tmp_path, target, state):
    """BUILD sets attributes, and on a class those would outlive the file."""
    classes = (compvis.Inert, compvis.InertDict, compvis.Later, compvis.SameTensor)
    before = [dict(vars(cls)) for cls in classes]
    refusal(crafted(tmp_path / "m.ckpt", b"\x80\x02" + target + state + b"b."))
    assert [dict(vars(cls)) for cls in classes] == before


def test_compressed_records_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "m.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02comegaconf\nX\n." + bytes(10 ** 6))
    assert "compressed" in refusal(tmp_path / "m.ckpt")


def test_records_are_not_inflated_by_torch_either(tmp_path):
    """torch.load alone opens such a file and makes a thousand times its size of it."""
    torch.save({"format": 1, "x": torch.zeros(10 ** 6)}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / "m.pt", "w") as bomb:
        for name in plain.namelist():
            bomb.writestr(name, plain.read(name), zipfile.ZIP_DEFLATED if "/data/" in name else zipfile.ZIP_STORED)
    assert len(torch.load(tmp_path / "m.pt", weights_only=True)["x"]) == 10 ** 6
    assert "compressed" in refusal(tmp_path / "m.pt", "vq")


def test_records_that_overlap_are_refused(tmp_path):
    """Each of a thousand entries may point at the same bytes."""
    path = crafted(tmp_path / "m.ckpt", b"\x80\x02}." + bytes(1000))
    with zipfile.ZipFile(path, "a") as archive:
        for i in range(50):
            twin = zipfile.ZipInfo(f"archive/data/{i}")
            first = archive.infolist()[0]
            twin.header_offset, twin.file_size, twin.CRC = first.header_offset, first.file_size, first.CRC
            twin.compress_size = first.compress_size
            archive.filelist.append(twin)
        archive._didModify = True
    assert "overlap" in refusal(path)


def test_another_byte_order_is_refused(tmp_path):
    with zipfile.ZipFile(crafted(tmp_path / "m.ckpt", b"\x80\x02}."), "a") as archive:
        archive.writestr("archive/byteorder", "big")
    assert "big-endian" in refusal(tmp_path / "m.ckpt")


def test_a_program_is_refused(tmp_path):
    torch.jit.script(torch.nn.ReLU()).save(str(tmp_path / "m.ckpt"))
    assert "TorchScript" in refusal(tmp_path / "m.ckpt")


@pytest.mark.parametrize("foreign", [True, False])
def test_truncated_files_are_one_sentence(tmp_path, networks, foreign_classes, foreign):
    thing = foreign_classes("omegaconf.dictconfig", "DictConfig")()
    torch.save(lightning(full(networks), x=thing if foreign else None), tmp_path / "whole.ckpt")
    forget_foreign_classes()
    whole = (tmp_path / "whole.ckpt").read_bytes()
    bad = tmp_path / "m.ckpt"
    for share in (0, 1e-5, 0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999, 0.99999):
        bad.write_bytes(whole[:int(share * len(whole))])
        assert ("cut short" if bad.stat().st_size else "is empty") in refusal(bad)


# ---- LPIPS

def lpips_state() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {k: v if k.startswith("scaling") else torch.rand(v.shape, generator=g) * 0.02
            for k, v in LPIPS().state_dict().items()}


def test_lpips_weights_in_every_naming(tmp_path):
    """torchvision + lpips' linear weights, a whole lpips state dict, and a taming .ckpt give the same network."""
    state = lpips_state()
    vgg = {"features." + k.split(".", 2)[2]: v for k, v in state.items() if k.startswith("net.")}
    assert {"features.0.weight", "features.2.bias", "features.28.bias"} <= vgg.keys() and len(vgg) == 26
    linear = {k: v for k, v in state.items() if k.startswith("lin")}
    torch.save(vgg | {"classifier.0.weight": torch.ones(2)}, tmp_path / "vgg16.pth",
               _use_new_zipfile_serialization=False)
    torch.save(linear, tmp_path / "lin.pth")
    torch.save({"lins." + k[3:]: v for k, v in linear.items()}, tmp_path / "lins.pth")
    torch.save(state | {"lins." + k[3:]: v for k, v in linear.items()}, tmp_path / "whole.pth")
    torch.save(lightning({"loss.perceptual_loss." + k: v for k, v in state.items()} | {
        "encoder.conv_in.weight": torch.ones(1)}), tmp_path / "taming.ckpt")
    for names in (["vgg16.pth", "lin.pth"], ["lins.pth", "vgg16.pth"], ["whole.pth"], ["taming.ckpt"]):
        model = formats.lpips.load_lpips([tmp_path / name for name in names])
        got = model.state_dict()
        assert not model.training and not any(p.requires_grad for p in model.parameters())
        assert got.keys() == state.keys() and all(torch.equal(got[k], state[k]) for k in state), names


def test_the_distance_of_loaded_weights_equals_the_reference(tmp_path, golden):
    model = golden_weights("loss.perceptual_loss.", LPIPS())
    torch.save({f"loss.perceptual_loss.{k}": v for k, v in model.state_dict().items()}, tmp_path / "m.ckpt")
    loaded = formats.lpips.load_lpips([tmp_path / "m.ckpt"])
    with torch.no_grad():
        distance = loaded(golden["gan/image"], golden["gan/reconstruction"])
    assert relative_error(distance, golden["lpips/distance"]) < 1e-4


def test_what_lpips_lacks_is_said(tmp_path):
    state = lpips_state()
    torch.save({k: v for k, v in state.items() if k.startswith("net.")}, tmp_path / "net.pth")
    torch.save({k: v for k, v in state.items() if k.startswith("lin")}, tmp_path / "lin.pth")
    torch.save({"features.0.weight": torch.ones(64, 3, 11, 11)}, tmp_path / "alexnet.pth")
    torch.save({"x": torch.ones(1)}, tmp_path / "other.pth")
    for files, words in (
            (["net.pth"], ["lacks 5", "lin0.model.1.weight", "v0.1/vgg.pth"]),
            (["lin.pth"], ["lacks 26", "net.slice1.0.weight", "vgg16-397923af.pth"]), ([], ["no file"]),
            (["net.pth", "lin.pth", "alexnet.pth"], ["(64, 3, 11, 11)", "(64, 3, 3, 3)"]),
            (["other.pth"], ["other.pth has no tensor of LPIPS"]), (["absent.pth"], ["there is no file"])):
        with pytest.raises(ValueError) as e:
            formats.lpips.load_lpips([tmp_path / name for name in files])
        assert "\n" not in str(e.value) and all(word in str(e.value) for word in words), str(e.value)


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
    (tmp_path / "source0").unlink()                             # only the damaged one is fetched again
    assert [p.read_bytes() for p in formats.lpips.download_lpips()] == list(downloads)
    (tmp_path / "source1").unlink()
    assert formats.lpips.download_lpips() == paths


@pytest.mark.parametrize("mistake, words", [("content", "SHA-256"), ("absent", "cannot be downloaded"),
                                            ("refused", "cannot be downloaded")])
def test_a_failed_download_is_one_sentence_and_leaves_nothing(tmp_path, downloads, monkeypatch, mistake, words):
    if mistake == "content":
        (tmp_path / "source0").write_bytes(b"another file")
    elif mistake == "absent":
        (tmp_path / "source0").unlink()
    else:
        first, second = formats.lpips.LPIPS_FILES
        refused = formats.lpips.Download(first.name, "http://127.0.0.1:9/x", first.sha256, "x")
        monkeypatch.setattr(formats.lpips, "LPIPS_FILES", (refused, second))
    with pytest.raises(ValueError, match=words) as e:
        formats.lpips.download_lpips(tmp_path / "cache")
    assert "\n" not in str(e.value) and os.listdir(tmp_path / "cache") == []
