"""evaluate.py recon and condition: each measure against a closed form, the commands end to end."""
import json
import math
import sys
import weakref
from dataclasses import asdict
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint
import data
import evaluate
import formats.lpips
import metrics.codebook
import metrics.images
import plots
from dataset.figures import Figures
from keypoints import JOINTS, ConditionConfig, PoseCondition
from unet import UNet, UNetConfig
from vq import VQConfig, VQModel

TINY = VQConfig(ch=8, n_embed=32, resolution=16, norm_groups=0, zero_init=True)
N = 24                          # held-out figures


def stage_1(seed: int = 0, n: int = N) -> dict:
    """The payload of a tiny autoencoder of n figures, as train.py writes it."""
    torch.manual_seed(seed)
    model = VQModel(TINY).eval()
    model.quantize.init_codes(model.encode(torch.stack(
        [data.to_tensor(Figures(8, 16)[i][0]) for i in range(8)])))
    return {"format": checkpoint.FORMAT, "stage": "vq", "step": 3, "vq": model.state_dict(),
            "vq_config": asdict(TINY),
            "config": {"size": 16, "data": f"figures:{n}", "val": None, "preset": "tiny"}}


def stage_2(n: int = N, knows_null: bool = True) -> dict:
    """The payload of a tiny diffusion model on stage_1(), with EMA weights only, as in best.pt."""
    payload, cond = stage_1(n=n), ConditionConfig(("tokens", "maps"), 8)
    unet = UNetConfig(in_channels=3 + cond.map_channels, model_channels=32, num_res_blocks=1,
                      channel_mult=(1, 2), attention_resolutions=(2,), num_heads=4, context_dim=8)
    return payload | {
        "stage": "ldm", "unet": UNet(unet).state_dict(), "unet_config": asdict(unet),
        "cond": PoseCondition(cond).state_dict(), "cond_config": asdict(cond),
        "mean": torch.zeros(3, 1, 1), "std": torch.ones(3, 1, 1), "knows_null": knows_null,
        "schedule": {"timesteps": 100, "linear_start": 0.0015, "linear_end": 0.0195}}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with two tiny autoencoders, a/last.pt and b/last.pt."""
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("ab"):
        (root / name).mkdir()
        checkpoint.save(root / name / "last.pt", stage_1(seed))
    return root


def one_sentence(capsys, argv: list[str], *words: str) -> None:
    """The command ends with status 2 and one line that has these words."""
    capsys.readouterr()
    assert evaluate.main(argv) == 2
    error, = capsys.readouterr().err.strip().splitlines()[-1:]
    assert error.startswith("evaluate.py:") and all(word in error for word in words), error


# ----------------------------------------------------------------------------------------- measures

def as_batch(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(2 * image - 1).permute(2, 0, 1)[None]


def test_ssim_is_that_of_scikit_image_and_the_closed_form_of_flat_images():
    """skimage.metrics.structural_similarity of 0.26.0, with the arguments in ssim's docstring."""
    v, u = np.mgrid[:24, :24]
    x = np.stack([0.5 + 0.4 * np.sin(0.7 * u + 0.3 * v + c) for c in range(3)], -1)
    noisy = np.clip(x + 0.1 * np.random.default_rng(0).standard_normal(x.shape), 0, 1)
    for y, wanted in ((noisy, 0.9276242055502592), (x[::-1].copy(), -0.07903710702050862),
                      (0.5 * x + 0.2, 0.7921545197409507), (x, 1)):
        found = metrics.images.ssim(as_batch(y), as_batch(x)).item()
        assert found == pytest.approx(wanted, abs=1e-6)
    a, b = torch.full((1, 3, 16, 16), -0.2), torch.full((1, 3, 16, 16), 0.4)    # 0.4, 0.7 on 0..1
    wanted = (2 * 0.4 * 0.7 + 1e-4) / (0.4 ** 2 + 0.7 ** 2 + 1e-4)
    assert metrics.images.ssim(a, b).item() == pytest.approx(wanted, abs=1e-6)


def test_code_use_and_overlap_by_hand():
    even = metrics.codebook.code_use(torch.tensor([5, 5, 0, 5, 5]))
    assert even == {"codes_used": 0.8, "perplexity": pytest.approx(4)}
    assert metrics.codebook.code_use(torch.tensor([9, 0, 0]))["perplexity"] == pytest.approx(1)
    ours, theirs = torch.tensor([6, 2, 2, 0, 0]), torch.tensor([1, 0, 1, 2, 0])
    wanted = {"both": 2, "only_ours": 1, "only_theirs": 1, "common": 0.5, "ours_known": 0.8,
              "theirs_known": 0.5, "histogram": 0.25 + 0.2}
    assert metrics.codebook.code_overlap(ours, theirs) == pytest.approx(wanted)


def points(mean, cov) -> torch.Tensor:
    """Features [50, D] that have exactly this mean and covariance."""
    z = np.random.default_rng(0).standard_normal((50, len(mean)))
    z -= z.mean(0)
    z = z @ np.linalg.inv(np.linalg.cholesky(np.cov(z.T)).T)                    # covariance 1
    return torch.from_numpy(z @ np.linalg.cholesky(np.asarray(cov, float)).T + mean)


def test_the_frechet_distance_in_closed_form():
    frechet = metrics.images.frechet
    # Covariances that commute: |m|^2 + sum (sqrt(a) - sqrt(b))^2 over their eigenvalues.
    a, b = points([0, 0, 1], np.diag([1, 4, 9])), points([1, 0, 3], np.diag([4, 4, 1]))
    assert frechet(a, b) == pytest.approx(1 + 4 + 1 + 0 + 4, rel=1e-8)
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)
    # In two dimensions tr (AB)^(1/2) = sqrt(tr AB + 2 sqrt(det AB)); these do not commute.
    A, B = np.array([[2, 1], [1, 3]]), np.array([[5, -2], [-2, 1]])
    root = math.sqrt(np.trace(A @ B) + 2 * math.sqrt(np.linalg.det(A @ B)))
    found = frechet(points([0, 0], A), points([0, 0], B))
    assert found == pytest.approx(5 + 6 - 2 * root, rel=1e-8)
    assert math.isnan(frechet(points([0, 0], A), torch.tensor([[math.nan, 0], [1, 1]])))


@pytest.mark.parametrize("nans", [0, 2])
def test_typical_and_worst_images(nans):
    values = [*np.random.default_rng(0).permutation(101).astype(float), *[math.nan] * nans]
    typical, worst = metrics.images.typical_and_worst(values, 3)
    ranked = sorted(range(len(values)), key=lambda i: (not math.isnan(values[i]), values[i]))
    assert worst == ranked[:3] and typical == ranked[49 + nans // 2:52 + nans // 2]
    assert metrics.images.typical_and_worst([1.0, 3.0, 2.0, 0.0], 3) == ([1], [3, 0, 2])


def halving(x):
    """A model that gives x / 2 + 0.1."""
    return x / 2 + 0.1, 0, torch.zeros(len(x), 4, 4, dtype=torch.long)


halving.config = SimpleNamespace(n_embed=8, factor=4)


def test_rfid_compares_the_features_of_reconstructions_and_originals():
    """Linear features f become f / 2 + 0.1: |m / 2 - 0.1|^2 + tr C (1 - 1/2)^2."""
    def features(x):
        return x[:, :, ::4, ::4].flatten(1)[:, ::5]
    scale = torch.tensor([1, 0.5, 0.2]).view(3, 1, 1)
    g = torch.Generator().manual_seed(0)
    x = scale * (2 * torch.rand(40, 3, 16, 16, generator=g) - 1).square()
    psnr = {"psnr": metrics.images.psnr}
    found = metrics.images.compare([halving], x.split(8), psnr, features)
    f = features(x).double().numpy()
    wanted = ((f.mean(0) / 2 - 0.1) ** 2).sum() + np.trace(np.cov(f.T)) / 4
    assert found.tallies[0].result(found.originals)["rfid"] == pytest.approx(wanted, rel=1e-5)
    found = metrics.images.compare([halving], [x], psnr, lambda x: x.mean((2, 3)))
    box = found.boxes[4].result(found.originals)                    # boxes keep the means
    assert box["rfid"] == pytest.approx(0, abs=1e-6)


def test_memory_does_not_grow_with_the_images():
    alive, most = weakref.WeakSet(), []

    def batches():
        for k in range(40):
            x = torch.full((2, 3, 16, 16), k / 40)
            alive.add(x)
            most.append(len(alive))
            yield x

    def model(x):
        x_hat, *rest = halving(x)
        alive.add(x_hat)
        return x_hat, *rest
    model.config = halving.config
    found = metrics.images.compare([model], batches(), {"psnr": metrics.images.psnr})
    assert len(found.tallies[0].scores["psnr"]) == 80
    assert max(most) <= 3       # a batch, its reconstruction, and the batch that is being made


def test_enlarged_parts_lie_on_the_joints():
    pose = np.zeros((17, 3), np.float32)
    assert plots.eyes_box(pose, 100) is None and plots.hand_box(pose, 100) is None
    for name, xy in {"eye_left": (0.6, 0.2), "eye_right": (0.4, 0.2),
                     "wrist_right": (0.99, 0.5)}.items():
        pose[JOINTS.index(name)] = *xy, 1
    x0, y0, x1, y1 = plots.eyes_box(pose, 100)
    assert x0 < 40 and x1 > 60 and (y0, y1) == (4, 36) and x1 - x0 == y1 - y0
    x0, y0, x1, y1 = plots.hand_box(pose, 100)
    assert x1 == 100 and y0 < 50 < y1                               # moved into the image
    pose[JOINTS.index("elbow_right")] = 0.3, 0.5, 1
    pose[JOINTS.index("wrist_right"), 0] = 0.7
    x0, _, x1, _ = plots.hand_box(pose, 100)
    assert (x0 + x1) / 2 == pytest.approx(80, abs=1)                # beyond the wrist
    pose[JOINTS.index("wrist_right"), 0] = 1.2
    assert plots.hand_box(pose, 100) is None


# -------------------------------------------------------------------------------------------- recon

def test_recon_end_to_end(files, tmp_path, capsys):
    a, b = str(files / "a/last.pt"), str(files / "b/last.pt")
    out = tmp_path / "out"
    assert evaluate.main(["recon", "--vq", a, b, "--against", "figures:6", "--out", str(out)]) == 0
    printed, report = capsys.readouterr().out, json.loads((out / "recon.json").read_text())
    ds = data.open_data(f"figures:{N}", 16)[1]
    x = torch.stack([data.to_tensor(ds[i][0]) for i in range(N)])
    for path, own in zip((a, b), report["checkpoints"], strict=True):
        payload = checkpoint.load(path, "vq")
        x_hat, _, indices = checkpoint.build_vq(payload, path)(x)
        assert own["psnr"] == pytest.approx(metrics.images.psnr(x_hat, x).mean().item(), rel=1e-4)
        assert own["l1"] == pytest.approx((x_hat.clamp(-1, 1) - x).abs().mean().item(), rel=1e-4)
        assert own["ssim"] == pytest.approx(metrics.images.ssim(x_hat, x).mean().item(), rel=1e-4)
        assert own["codes_used"] == pytest.approx(len(indices.unique()) / 32)
        assert own["hash"] == checkpoint.hash_of(payload["vq"])
    assert report["images"] == N and report["command"].startswith("python evaluate.py recon --vq")
    assert [box["name"] for box in report["baselines"]] == ["boxes of 4 x 4"]
    overlap = report["against"]["overlap"]["a/last.pt"]
    assert report["against"]["images"] == 6 and 0 < overlap["histogram"] <= 1
    rows = [line for line in printed.splitlines() if line.startswith(("a/last.pt", "b/last.pt"))]
    assert len(rows) == 4 and f"{report['checkpoints'][0]['psnr']:.2f}" in rows[0].split()
    page = Image.open(out / "recon.png")
    assert 1000 < page.width <= 2500 and page.height > 2 * evaluate.SHOWN * plots.TILES[0]


def test_broken_images_do_not_count_and_shift_no_name(files, tmp_path):
    mine, out = tmp_path / "mine", tmp_path / "out"
    mine.mkdir()
    rng = np.random.default_rng(0)
    for i in range(120):        # 1 of 100 may be broken; the later, the noisier and so the worse
        noise = rng.normal(128, i / 2, (16, 16, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noise).save(mine / f"{i:03}.png")
    (mine / "040.png").write_bytes(b"no image")
    argv = ["recon", "--vq", str(files / "a/last.pt"), "--data", str(mine), "--limit", "all",
            "--against", str(mine), "--out"]
    assert evaluate.main([*argv, str(out)]) == 0
    report = json.loads((out / "recon.json").read_text())
    assert report["images"] == report["against"]["images"] == 119
    model = checkpoint.build_vq(checkpoint.load(files / "a/last.pt", "vq"), "")
    names = [mine / f"{i:03}.png" for i in range(120) if i != 40]
    x = torch.stack([data.to_tensor(np.array(Image.open(name))) for name in names])
    scores = metrics.images.psnr(model(x)[0], x).detach()
    worst = scores.argsort()[:evaluate.SHOWN]
    assert report["worst"] == [str(names[i]) for i in worst]


def test_out_among_the_images_is_refused(files, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "mine/0.png")
    out = ["--out", str(tmp_path / "mine/out")]
    for flag in ("--data", "--against"):
        one_sentence(capsys, ["recon", "--vq", str(files / "a/last.pt"), flag,
                              str(tmp_path / "mine"), *out], "name another folder")
    assert not (tmp_path / "mine/out").exists()


def test_a_model_that_gives_nan_is_reported_in_valid_json(files, tmp_path, capsys):
    payload = checkpoint.load(files / "a/last.pt", "vq")
    payload["vq"]["decoder.conv_in.bias"][:] = 3e38         # finite, but nothing made of it is
    checkpoint.save(tmp_path / "nan.pt", payload)
    argv = ["recon", "--vq", str(tmp_path / "nan.pt"), "--limit", "8", "--out", str(tmp_path)]
    assert evaluate.main(argv) == 0 and "nan" in capsys.readouterr().out
    report = json.loads((tmp_path / "recon.json").read_text(), parse_constant=pytest.fail)
    assert report["checkpoints"][0]["psnr"] is None and report["baselines"][0]["psnr"] > 0


def test_lpips_and_rfid_on_demand(files, monkeypatch, capsys):
    class Distance(torch.nn.Module):
        def forward(self, x, y):
            return torch.full((len(x),), 0.125)

    class InceptionV3(torch.nn.Module):                     # its features are means
        BLOCK_INDEX_BY_DIM, seen = {2048: 3}, []

        def __init__(self, blocks):
            super().__init__()
            assert blocks == [3]

        def forward(self, x):
            self.seen.append(x)
            return [x.mean((2, 3))[..., None, None]]
    module = ModuleType("pytorch_fid.inception")
    module.InceptionV3 = InceptionV3
    monkeypatch.setitem(sys.modules, "pytorch_fid", ModuleType("pytorch_fid"))
    monkeypatch.setitem(sys.modules, "pytorch_fid.inception", module)
    monkeypatch.setattr(formats.lpips, "load_lpips", lambda paths: Distance())
    argv = ["recon", "--vq", str(files / "a/last.pt"), "--limit", "4", "--rfid"]
    assert evaluate.main([*argv, "--lpips-weights", "v", "w"]) == 0
    printed = capsys.readouterr().out
    assert "0.1250" in printed and "rFID of 4 images is biased" in printed
    assert len(InceptionV3.seen) == 3                       # originals, reconstructions, boxes
    assert all(0 <= x.min() and x.max() <= 1 for x in InceptionV3.seen)
    monkeypatch.setitem(sys.modules, "pytorch_fid.inception", None)
    one_sentence(capsys, argv, "pip install pytorch-fid")


def test_a_published_file_and_a_stage_2_file(tmp_path, capsys):
    torch.manual_seed(0)
    weights = VQModel(VQConfig(ch=32, n_embed=32)).state_dict()
    torch.save({"state_dict": weights, "global_step": 77}, tmp_path / "vq.ckpt")
    checkpoint.save(tmp_path / "ldm.pt", stage_2() | {"source": "CompVis", "weights": "EMA"})
    flags = ["--data", "figures:4", "--size", "16", "--limit", "4"]
    for argv, words in ((["recon", "--vq", "vq.ckpt"], "stage vq, step 77"),
                        (["recon", "--vq", "ldm.pt"], "stage ldm"),
                        (["condition", "--ckpt", "ldm.pt"], "stage ldm")):
        assert evaluate.main([*argv[:2], str(tmp_path / argv[2]), *flags]) == 0
        assert f"{argv[2]}: a CompVis checkpoint of {words}" in capsys.readouterr().out


@pytest.mark.parametrize("flags, words", [
    (["--size", "18"], ["--size is 18", "multiple of 4"]), (["--against", "figures:x"], ["figures:x"]),
    (["--vq", "none.pt"], ["none.pt"])])
def test_a_mistake_is_one_sentence(files, capsys, flags, words):
    one_sentence(capsys, ["recon", "--vq", str(files / "a/last.pt"), *flags], *words)


@pytest.mark.parametrize("flags", [["recon", "--limit", "1"], ["pose", "--guidance", "nan"],
                                   ["pose", "--eta", "2"], ["overfit", "--seed", "-1"],
                                   ["pose", "--detected", "x.json"]])
def test_numbers_have_ranges(capsys, flags):
    with pytest.raises(SystemExit) as e:
        evaluate.parse_args(flags)
    assert e.value.code == 2 and flags[1] in capsys.readouterr().err


@pytest.mark.parametrize("error, status, words", [
    (torch.OutOfMemoryError("CUDA out of memory.\nMore\nlines"), 2, "out of memory"),
    (KeyboardInterrupt(), 130, "interrupted")])
def test_too_little_memory_and_an_interrupt_are_one_line(files, monkeypatch, capsys, error, status,
                                                         words):
    def fails(*_):
        raise error
    monkeypatch.setattr(evaluate, "compare", fails)
    assert evaluate.main(["recon", "--vq", str(files / "a/last.pt"), "--device", "cpu"]) == status
    assert words in capsys.readouterr().err.strip().splitlines()[-1]


# ---------------------------------------------------------------------------------------- condition

def test_condition_says_what_it_measures_and_leaves_out_a_null_that_was_not_trained(tmp_path, capsys):
    printed = []
    for knows in (False, True):
        checkpoint.save(tmp_path / "ldm.pt", stage_2(knows_null=knows))
        argv = ["condition", "--ckpt", str(tmp_path / "ldm.pt"), "--device", "cpu"]
        assert evaluate.main(argv) == 0
        first, *lines = capsys.readouterr().out.splitlines()
        assert "ldm.pt (step 3, " in first and f"device cpu, dataset figures:{N}" in first
        printed.append([line.split() for line in lines])
    assert [words[0] for words in printed[0][:-1]] == ["right", "shuffled", "ratio"]
    assert [words[0] for words in printed[1]] == ["right", "shuffled", "null", "ratio"]
    assert [words for words in printed[1] if words[0] != "null"] == printed[0][:-1]
    one_sentence(capsys, [*argv, "--size", "20"], "--size is 20", "multiple of 8")
