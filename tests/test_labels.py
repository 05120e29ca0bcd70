"""Labels: where they are read, how they are split, what they add to the network, how one asks."""
import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import folder, write_pair
from test_train import (  # noqa: F401
    Killed,
    as_micro,
    command,
    die_after,
    micro,
    one_sentence,
    same,
    untimed,
)

import checkpoint
import data
import evaluate
import sample
import train
from data import PoseFolder
from dataset.images import DataError
from dataset.latents import LatentCache
from ldm import LDM
from metrics import keypoint_detector
from unet import NO_LABEL, UNet, UNetConfig

# GroupNorm has 32 groups: of 32 channels it would remove what is added to each.
SMALL = {"model_channels": 64, "channel_mult": (1,), "attention_resolutions": (1,), "num_heads": 2,
         "num_res_blocks": 1}
COMMA, JAPANESE = "Mage, the old one", "騎士"


def table(root: Path, labels: dict[str, str], column: str = "label") -> Path:
    """metadata.csv with a row for each image that has a label."""
    rows = [f'{name},"{label}"' for name, label in labels.items()]
    (root / "metadata.csv").write_text("\n".join([f"file,{column}", *rows]), "utf-8")
    return root


def labelled(root: Path, n: int, names: list[str]) -> Path:
    """n images; every other one has a label, in turn."""
    names_of = {f"clip{i // 10}_{i % 10:03d}.png": names[i // 2 % len(names)]
                for i in range(0, n, 2)}
    return table(folder(root, n, (32, 32)), names_of)


# ------------------------------------------------------------------------------------- the network

def wake(unet: UNet) -> None:
    """Weights in place of the zeros with which the branches of a new network end."""
    for parameter in unet.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)


def test_a_label_is_a_shift_of_the_timestep_embedding_and_the_null_label_is_none():
    torch.manual_seed(0)
    config = UNetConfig(in_channels=4, out_channels=3, context_dim=None, num_classes=5, **SMALL)
    unet = UNet(config)
    wake(unet)
    plain = UNet(UNetConfig(in_channels=4, out_channels=3, context_dim=None, **SMALL))
    rest = {k: v for k, v in unet.state_dict().items() if k != "label_emb.weight"}
    assert unet.label_emb.weight.shape == (5, 4 * 64)           # the reference's name and shape
    plain.load_state_dict(rest, strict=True)
    x, t = torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999])
    none = torch.full((3,), NO_LABEL)
    assert torch.equal(unet(x, t), plain(x, t)) and torch.equal(unet(x, t, label=none), plain(x, t))
    shifted = copy.deepcopy(plain)
    with torch.no_grad():
        shifted.time_embed[2].bias += unet.label_emb.weight[3]
    asked = unet(x, t, label=torch.tensor([3, 3, NO_LABEL]))
    assert torch.allclose(asked[:2], shifted(x, t)[:2], atol=1e-5)
    assert torch.allclose(asked[2], plain(x, t)[2], atol=1e-5)
    assert not torch.allclose(asked[:2], plain(x, t)[:2], atol=1e-2)


def test_the_null_condition_drops_pose_and_label_and_a_sampler_sees_the_same_model():
    torch.manual_seed(0)
    preset = train.PRESETS["micro"]
    config = train.unet_for(preset.vq_config, preset.cond, UNetConfig(**SMALL, num_classes=3))
    ldm = LDM(train.VQModel(preset.vq_config), config, preset.cond, torch.zeros(3, 1, 1),
              torch.ones(3, 1, 1), train.SCHEDULE, True)
    wake(ldm.unet)
    x, t, pose = torch.randn(4, 3, 8, 8), torch.full((4,), 300), torch.rand(4, 17, 3).round()
    label, drop = torch.tensor([0, 1, 2, NO_LABEL]), torch.tensor([True, False, False, False])
    model, rows = ldm.of_rows(pose, label)
    out = ldm(x, t, pose, drop, label)
    assert torch.allclose(model(x, t, rows, drop), out, atol=1e-5)
    null = ldm(x, t, torch.rand_like(pose), torch.ones(4, dtype=torch.bool), label.flip(0))
    assert torch.allclose(out[0], null[0], atol=1e-5)
    assert not torch.allclose(out[1], ldm(x, t, pose)[1], atol=1e-3)
    assert torch.equal(out[3], ldm(x, t, pose)[3])


def test_pose_and_label_are_dropped_alone():
    u, pose = torch.linspace(0, 1, 1001)[:-1], torch.ones(1000, 17, 3)
    pose, label = train.drop_one(pose, torch.arange(1000), u, 0.1)
    none, unlabelled = (pose == 0).all((1, 2)), label == NO_LABEL
    assert none.sum() == 100 and unlabelled.sum() == 99 and not (none & unlabelled).any()


# --------------------------------------------------------------------------------------- the files

def test_labels_are_read_from_a_column_or_from_folders(tmp_path, capsys):
    root = labelled(tmp_path / "a", 20, [COMMA, JAPANESE])
    ds = PoseFolder(root, 12)
    assert ds.label_by == "label" and ds.label_names == sorted([COMMA, JAPANESE])
    assert ds.label_ids()[:6].tolist() == [0, NO_LABEL, 1, NO_LABEL, 0, NO_LABEL]
    assert data.describe_labels(ds) == (f"by label: {COMMA} 5, {JAPANESE} 5; 10 of 20 "
                                        "images have none")
    assert not PoseFolder(root, 12, labels="off").label_names
    table(root, {"clip0_003.png": "Knight"}, "Character")
    assert PoseFolder(root, 12).label_by is None
    assert PoseFolder(root, 12, labels="character").label_ids().tolist().index(0) == 3
    for i in range(300):
        write_pair(tmp_path / "b", f"{i:03d}/a", i)
    ds = PoseFolder(tmp_path / "b", 12, labels="folders")
    assert len(ds.label_names) == 300 and ds.label_ids().tolist() == list(range(300))
    assert not capsys.readouterr().err


def test_labels_that_match_nothing_are_told_with_counts(tmp_path, capsys):
    root = table(folder(tmp_path, 6), {"x.png": "a", "y.png": "b"})
    assert not PoseFolder(root, 12).label_names
    assert "0 of 2 rows of metadata.csv match an image" in capsys.readouterr().err
    for by, words in (("label", "0 of 2 rows"), ("kind", "has the columns file, label"),
                      ("folders", "all 6 images lie directly in it")):
        with pytest.raises(DataError, match=words):
            PoseFolder(root, 12, labels=by)
    with pytest.raises(DataError, match="figures has no labels"):
        data.open_data("figures", 12, labels="kind")


def test_every_label_is_trained_on_and_whole_groups_of_each_are_held_out(tmp_path):
    for i in range(120):
        write_pair(tmp_path, f"{'ab'[i % 2]}/clip{i // 10}_{i % 10:03d}", i)
    write_pair(tmp_path, "alone/1", 0)
    write_pair(tmp_path, "second/1", 0)
    train_part, val = data.open_data(str(tmp_path), 12, labels="folders")
    assert set(train_part.label_ids()) == {0, 1, 2, 3} and len(val) == 20
    assert {name: int((val.label_ids() == i).sum()) for i, name in enumerate(val.label_names)} == {
        "a": 10, "alone": 0, "b": 10, "second": 0}
    assert not set(train_part.groups()) & set(val.groups())
    table(tmp_path, {"a/clip0_000.png": "x"})                       # names of labels given from outside
    known = data.open_data(str(tmp_path), 12, label_names=["w", "x"])[0]
    assert sorted(set(known.label_ids())) == [NO_LABEL, 1]


def test_many_small_labels_and_labels_of_one_image(tmp_path):
    for i in range(60):
        write_pair(tmp_path / "few", f"{i // 3}/{i}", i)
    train_part, val = data.open_data(str(tmp_path / "few"), 12, labels="folders")
    assert len(set(train_part.label_ids())) == 20 and len(val) == 6
    for i in range(5):
        write_pair(tmp_path / "one", f"{i}/{i}", i)
    with pytest.raises(DataError, match="5 labels have one image"):
        data.open_data(str(tmp_path / "one"), 12, labels="folders")


def test_the_latent_cache_knows_the_labels_of_its_rows_and_labels_may_change(tmp_path):
    names = {f"clip0_{i:03d}.png": f"{i % 3}" for i in range(10)}
    root = table(folder(tmp_path / "set", 10), names)
    (root / "images/clip0_004.png").write_bytes(b"damaged")
    ds = PoseFolder(root, 12, limit=1)
    cache = LatentCache(tmp_path / "cache", "a", ds, lambda x: x, batch_size=4)
    wanted = [i % 3 for i in range(10) if i != 4]
    assert cache.labels.tolist() == np.repeat(wanted, 2).tolist()
    table(root, {name: "x" for name in list(names)[:2]})            # other labels, the same files
    files = sorted((tmp_path / "cache").iterdir())
    cache = LatentCache(tmp_path / "cache", "a", PoseFolder(root, 12, limit=1), None, 4)
    assert cache.labels.tolist() == [0] * 4 + [NO_LABEL] * 14
    assert sorted((tmp_path / "cache").iterdir()) == files
    cache.json.write_text(cache.json.read_text().replace("clip0_004", "clip0_x"))
    with pytest.raises(DataError, match="18 rows for 10 images; delete it"):
        LatentCache(tmp_path / "cache", "a", PoseFolder(root, 12, limit=1), None, 4)


# -------------------------------------------------------------------------------------- the commands

@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of stage 2 on images of which half have labels; data beside it in set/."""
    root = tmp_path_factory.mktemp("labels")
    labelled(root / "set", 40, [COMMA, JAPANESE])
    with pytest.MonkeyPatch.context() as patch:
        as_micro(patch)
        vq = command("vq", root / "vq", "--steps", "2", "--data", str(root / "set"))
        assert train.main(vq) == 0 and train.main(ldm(root, "ldm")) == 0
    return root / "ldm"


def ldm(root: Path, out: str, *flags: str) -> list[str]:
    return command("ldm", root / out, "--steps", "4", "--eval-every", "2", "--vq",
                   str(root / "vq/last.pt"), "--data", str(root / "set"), *flags)


def test_a_labelled_run_resumes_bit_for_bit_and_keeps_its_labels(run, tmp_path, monkeypatch, capsys):
    root = run.parent
    with monkeypatch.context() as m, pytest.raises(Killed):
        die_after(m, 2)
        train.main(ldm(root, "cut"))
    assert train.main(ldm(root, "cut")) == 0
    same(*(checkpoint.load(root / each / "last.pt", "ldm") for each in ("ldm", "cut")))
    assert untimed(run / "log.jsonl") == untimed(root / "cut/log.jsonl")
    model, payload = checkpoint.load_ldm(run / "last.pt")
    assert checkpoint.label_names(payload, run) == sorted([COMMA, JAPANESE])
    assert len(payload["pose_labels"]) == len(payload["poses"])
    assert model.unet.label_emb.weight.shape[0] == 2
    capsys.readouterr()
    assert train.main(ldm(root, "cut", "--labels", "off")) == 2
    assert "labels = label, but this command has labels = None" in capsys.readouterr().err
    assert train.main(ldm(root, "off", "--labels", "off", "--steps", "2")) == 0
    payload = checkpoint.load(root / "off/last.pt", "ldm")
    assert "label_emb.weight" not in payload["unet"] and "pose_labels" not in payload
    assert payload["train"]["optimizer"]["param_groups"][0]["params"]


def test_sample_draws_a_column_for_each_label(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    drawn, denoise = [], sample.denoise
    monkeypatch.setattr(sample, "denoise", lambda ldm, poses, seeds, size, film, labels, **how:
                        drawn.append((poses, labels)) or denoise(ldm, poses, seeds, size, film,
                                                                 labels, **how))
    on = ["--ckpt", str(run / "last.pt"), "--steps", "2", "--save-latents", "z.npz"]
    assert sample.main(["--common", "2", "--label", "all", *on]) == 0
    assert drawn[-1][1].tolist() == [0, 1, 0, 1]
    with np.load("z.npz") as z:
        assert z["labels"].tolist() == sorted([COMMA, JAPANESE]) * 2
        assert z["seeds"].tolist() == [0] * 4
    assert sample.main(["--label", JAPANESE, "-n", "1", *on]) == 0          # by label alone
    poses, labels = drawn[-1]
    assert labels.tolist() == [1] and not poses.any()
    assert JAPANESE in Image.open("samples.png").text["command"]
    assert sample.main(["--common", "1", *on]) == 0 and drawn[-1][1] is None
    assert sample.main(["--common", "2", "--morph", "--frames", "2", "--label", "all", *on]) == 0
    capsys.readouterr()
    one_sentence(capsys, sample.main(["--label", "Rogue", *on]), "'Rogue'", repr(COMMA))
    toy = ["--ckpt", str(Path(__file__).parent.parent / "assets/toy.pt")]
    one_sentence(capsys, sample.main(["--label", "Rogue", *toy]), "without labels")



def test_evaluations_know_the_labels(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate.find_detector, "__defaults__", ("cpu", 1))
    ckpt = ["--ckpt", str(run / "last.pt"), "--limit", "4"]
    assert evaluate.main(["pose", *ckpt, "--steps", "2", "--out", "fidelity"]) == 0
    out = capsys.readouterr().out
    assert "label" in out and JAPANESE in out
    assert evaluate.main(["condition", *ckpt]) == 0
    assert evaluate.main(["overfit", "--run", str(run), "--out", "o", "-n", "2", "--steps", "2"]) == 0


def test_the_detector_learns_the_labels_of_the_images_that_have_one():
    """Planted: label 0 is dark, 1 is bright; a third of the images have none."""
    torch.manual_seed(0)
    shade = torch.tensor([-0.8, 0.8, 0.0])

    def batch() -> tuple[torch.Tensor, ...]:
        kind = torch.randint(3, (12,))
        return (shade[kind].view(-1, 1, 1, 1) + 0.1 * torch.randn(12, 3, 32, 32),
                torch.rand(12, 17, 3).ceil(), torch.where(kind == 2, NO_LABEL, kind))
    detector = keypoint_detector.train_detector((batch() for _ in range(40)), 40, 32, num_classes=2)
    x, _, labels = batch()
    found = detector.classify(detector(x)[1]).argmax(1)
    assert (found == labels)[labels >= 0].all()
    logits, none = torch.randn(4, 3), torch.full((4,), NO_LABEL)
    assert keypoint_detector.label_loss(logits, none) == 0
    assert keypoint_detector.label_loss(torch.zeros(4, 3), torch.tensor([0, 2, -1, -1])) == (
        pytest.approx(np.log(3)))
