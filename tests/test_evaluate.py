"""evaluate.py: each measure against a closed form, brute force or scikit-image, and the recon command end to end."""
import importlib.util
import json
import math
import sys
import weakref
from dataclasses import asdict, replace
from importlib.machinery import ModuleSpec
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
PICTURES = 24


def vq_payload(model: VQModel) -> dict:
    return {"format": checkpoint.FORMAT, "stage": "vq", "step": 3, "vq": model.state_dict(),
            "vq_config": asdict(model.config), "config": {"size": 16, "data": f"figures:{PICTURES}", "val": None}}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two tiny autoencoders a/last.pt and b/last.pt, as train.py writes them."""
    root = tmp_path_factory.mktemp("models")
    x = torch.stack([data.to_tensor(Figures(8, 16)[i][0]) for i in range(8)])
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        model = VQModel(TINY).eval()
        model.quantize.init_codes(model.encode(x))
        (root / name).mkdir()
        checkpoint.save(root / name / "last.pt", vq_payload(model))
    return root


@pytest.fixture(scope="module")
def ldm(files) -> dict:
    """The payload of a tiny stage 2 upon a/last.pt, with EMA weights alone, as train.py writes best.pt."""
    torch.manual_seed(0)
    stage_1 = checkpoint.load(files / "a/last.pt", "vq")
    unet = UNetConfig(model_channels=32, num_res_blocks=1, channel_mult=(1, 2), attention_resolutions=(2,), num_heads=4)
    cond = ConditionConfig(("seed",))
    return stage_1 | {
        "stage": "ldm", "unet": UNet(unet).state_dict(), "unet_config": asdict(unet),
        "cond": PoseCondition(cond).state_dict(), "cond_config": asdict(cond), "mean": torch.zeros(3, 1, 1),
        "std": torch.ones(3, 1, 1), "knows_null": False, "config": stage_1["config"] | {"preset": "tiny"},
        "schedule": {"timesteps": 100, "linear_start": 0.0015, "linear_end": 0.0195}}


# ------------------------------------------------------------------------------------------ measures of pictures

def formula_picture() -> np.ndarray:
    """[24, 24, 3] on 0..1"""
    v, u = np.mgrid[:24, :24]
    return np.stack([0.5 + 0.4 * np.sin(0.7 * u + 0.3 * v + c) for c in range(3)], -1)


def as_batch(picture: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(2 * picture - 1).permute(2, 0, 1)[None]


def test_ssim_is_that_of_scikit_image():
    """skimage.metrics.structural_similarity of 0.26.0, with the arguments that the docstring of ssim names."""
    x = formula_picture()
    noisy = np.clip(x + 0.1 * np.random.default_rng(0).standard_normal(x.shape), 0, 1)
    for y, wanted in ((noisy, 0.9276242055502592), (x[::-1].copy(), -0.07903710702050862),
                      (0.5 * x + 0.2, 0.7921545197409507)):
        assert metrics.images.ssim(as_batch(y), as_batch(x)).item() == pytest.approx(wanted, abs=1e-6)


def test_ssim_by_brute_force():
    rng = np.random.default_rng(1)
    x, y = rng.random((2, 13, 12, 3))
    g = np.exp(-np.arange(-5, 6) ** 2 / (2 * 1.5 ** 2))
    w = np.outer(g, g)[..., None] / np.outer(g, g).sum()
    values = []
    for i in range(3):
        for j in range(2):
            a, b = x[i:i + 11, j:j + 11], y[i:i + 11, j:j + 11]
            m_a, m_b = (w * a).sum((0, 1)), (w * b).sum((0, 1))
            v_a, v_b = (w * (a - m_a) ** 2).sum((0, 1)), (w * (b - m_b) ** 2).sum((0, 1))
            v_ab = (w * (a - m_a) * (b - m_b)).sum((0, 1))
            values.append((2 * m_a * m_b + 1e-4) * (2 * v_ab + 9e-4)
                          / ((m_a ** 2 + m_b ** 2 + 1e-4) * (v_a + v_b + 9e-4)))
    assert metrics.images.ssim(as_batch(x), as_batch(y)).item() == pytest.approx(np.mean(values), abs=1e-6)


def test_ssim_of_equal_and_of_flat_pictures():
    x = as_batch(formula_picture())
    assert metrics.images.ssim(x, x).item() == 1
    a, b = torch.full((1, 3, 16, 16), -0.2), torch.full((1, 3, 16, 16), 0.4)            # 0.4 and 0.7 on 0..1
    wanted = (2 * 0.4 * 0.7 + 1e-4) / (0.4 ** 2 + 0.7 ** 2 + 1e-4)
    assert metrics.images.ssim(a, b).item() == pytest.approx(wanted, abs=1e-6)


# --------------------------------------------------------------------------------- measures of a set of pictures

def test_code_use_in_closed_form():
    even = metrics.codebook.code_use(torch.tensor([5, 5, 0, 5, 5]))
    assert even == {"codes_used": 0.8, "perplexity": pytest.approx(4)}
    assert metrics.codebook.code_use(torch.tensor([9, 0, 0]))["perplexity"] == pytest.approx(1)


def test_overlap_by_hand():
    ours, theirs = torch.tensor([6, 2, 2, 0, 0]), torch.tensor([1, 0, 1, 2, 0])
    wanted = {"both": 2, "only_ours": 1, "only_theirs": 1, "common": 0.5, "ours_known": 0.8, "theirs_known": 0.5,
              "histogram": 0.25 + 0.2}
    assert metrics.codebook.code_overlap(ours, theirs) == pytest.approx(wanted)
    swapped = metrics.codebook.code_overlap(theirs, ours)
    assert (swapped["ours_known"], swapped["theirs_known"]) == (pytest.approx(0.5), pytest.approx(0.8))
    assert metrics.codebook.code_overlap(ours, 3 * ours)["histogram"] == pytest.approx(1)


def moments(mean, cov) -> metrics.images.Moments:
    """Moments of points that have exactly this mean and covariance."""
    rng = np.random.default_rng(0)
    z = rng.standard_normal((50, len(mean)))
    z -= z.mean(0)
    z = z @ np.linalg.inv(np.linalg.cholesky(np.cov(z.T)).T)                            # covariance 1
    points = torch.from_numpy(z @ np.linalg.cholesky(np.asarray(cov, float)).T + mean)
    m = metrics.images.Moments()
    for part in points.split(7):
        m.add(part)
    return m


def test_moments_are_numpys():
    points = np.random.default_rng(0).standard_normal((50, 4)) * [1, 2, 3, 4] + 5
    m = metrics.images.Moments()
    for part in torch.from_numpy(points).split(13):
        m.add(part)
    mean, cov = m.result()
    np.testing.assert_allclose(mean, points.mean(0), rtol=1e-12)
    np.testing.assert_allclose(cov, np.cov(points.T), rtol=1e-9, atol=1e-12)


def test_the_frechet_distance_in_closed_form():
    # Covariances that commute: |m|^2 + sum (sqrt(a) - sqrt(b))^2 over their eigenvalues.
    a, b = moments([0, 0, 1], np.diag([1, 4, 9])), moments([1, 0, 3], np.diag([4, 4, 1]))
    assert metrics.images.frechet(a, b) == pytest.approx(1 + 4 + 1 + 0 + 4, rel=1e-8)
    assert metrics.images.frechet(a, a) == pytest.approx(0, abs=1e-9)
    # Two dimensions: tr (AB)^(1/2) = sqrt(tr AB + 2 sqrt(det AB)), and these two do not commute.
    A, B = np.array([[2, 1], [1, 3]]), np.array([[5, -2], [-2, 1]])
    root = math.sqrt(np.trace(A @ B) + 2 * math.sqrt(np.linalg.det(A @ B)))
    assert metrics.images.frechet(moments([0, 0], A), moments([0, 0], B)) == pytest.approx(5 + 6 - 2 * root, rel=1e-8)


# ----------------------------------------------------------------------------------------- one pass over pictures

def test_the_shortlist_keeps_the_worst_and_some_about_the_median():
    values = np.random.default_rng(0).permutation(10_001)
    shortlist = metrics.images.Shortlist(4)
    for index, value in enumerate(values):
        shortlist.add(float(value), index)
    assert values[shortlist.worst()].tolist() == [0, 1, 2, 3]
    assert len(shortlist.reservoir) == shortlist.RESERVOIR and len(shortlist.heap) == 4
    typical = values[shortlist.typical()]
    assert len(typical) == 4 and abs(typical - 5000).max() < 600        # 4 standard errors of a median of 1024
    assert abs(np.mean([i for _, i in shortlist.reservoir]) - 5000) < 400               # early and late ones alike


@pytest.mark.parametrize("order", ["first", "last", "between"])
def test_a_nan_is_the_worst(order):
    values = [float(v) for v in np.random.default_rng(0).permutation(100)]
    at = {"first": 0, "last": 100, "between": 50}[order]
    values[at:at] = [math.nan, math.nan]
    shortlist = metrics.images.Shortlist(3)
    for index, value in enumerate(values):
        shortlist.add(value, index)
    worst = [values[index] for index in shortlist.worst()]
    assert math.isnan(worst[0]) and math.isnan(worst[1]) and worst[2] == 0
    assert all(45 < values[index] < 55 for index in shortlist.typical())


def test_rfid_compares_the_features_of_reconstructions_and_originals():
    """Features f of the pictures and f / 2 + 0.1 of the reconstructions: |m / 2 - 0.1|^2 + tr C (1 - 1/2)^2."""
    def model(x):
        return x / 2 + 0.1, 0, torch.zeros(len(x), 4, 4, dtype=torch.long)
    model.config = SimpleNamespace(n_embed=8, factor=4)
    scale = torch.tensor([1, 0.5, 0.2]).view(3, 1, 1)
    x = scale * (2 * torch.rand(40, 3, 16, 16, generator=torch.Generator().manual_seed(0)) - 1).square()
    features = lambda x: x[:, :, ::4, ::4].flatten(1)[:, ::5]                           # noqa: E731
    batches = ((x[i:i + 8], torch.arange(i, i + 8)) for i in range(0, 40, 8))
    found = metrics.images.compare([model], batches, {"psnr": metrics.images.psnr}, features)
    f = features(x).double().numpy()
    wanted = ((f.mean(0) / 2 - 0.1) ** 2).sum() + np.trace(np.cov(f.T)) / 4
    assert found.tallies[0].result(found.originals)["rfid"] == pytest.approx(wanted, rel=1e-5)
    means = lambda x: x.mean((2, 3))                                                    # noqa: E731
    found = metrics.images.compare([model], [(x, torch.arange(40))], {"psnr": metrics.images.psnr}, means)
    assert found.boxes[4].result(found.originals)["rfid"] == pytest.approx(0, abs=1e-6)     # boxes keep the means


def test_features_that_are_not_finite_have_no_distance():
    m = moments([0, 0], np.eye(2))
    broken = metrics.images.Moments()
    broken.add(torch.tensor([[math.nan, 0], [1, 1]]))
    assert math.isnan(metrics.images.frechet(m, broken)) and math.isnan(metrics.images.frechet(broken, m))


@pytest.fixture
def pytorch_fid(monkeypatch):
    """A package of that name whose network gives 2048 times the mean of what it is given, which it keeps in `seen`."""
    class InceptionV3(torch.nn.Module):
        BLOCK_INDEX_BY_DIM = {64: 0, 2048: 3}
        seen = []

        def __init__(self, blocks):
            super().__init__()
            assert blocks == [3]

        def forward(self, x):
            self.seen.append(x)
            return [x.mean((1, 2, 3)).view(-1, 1, 1, 1).expand(-1, 2048, 1, 1)]
    package, module = ModuleType("pytorch_fid"), ModuleType("pytorch_fid.inception")
    package.__spec__, module.InceptionV3 = ModuleSpec("pytorch_fid", None), InceptionV3
    monkeypatch.setitem(sys.modules, "pytorch_fid", package)
    monkeypatch.setitem(sys.modules, "pytorch_fid.inception", module)
    return InceptionV3


def test_inception_sees_pictures_on_0_to_1(pytorch_fid):
    x = torch.stack([torch.full((3, 8, 8), v) for v in (-1.0, -0.5, 1.0)])
    found = metrics.images.inception("cpu")(x)
    assert found.shape == (3, 2048) and found[:, 7].tolist() == [0, 0.25, 1]
    seen, = pytorch_fid.seen
    assert (seen.min(), seen.max()) == (0, 1)


def test_rfid_on_demand(files, pytorch_fid, capsys):
    a = str(files / "a/last.pt")
    assert evaluate.main(["recon", "--vq", a, "--rfid", "--limit", "4"]) == 0
    printed = capsys.readouterr().out
    assert "rFID" in printed.splitlines()[2] and "rFID of 4 pictures is too high" in printed
    assert len(pytorch_fid.seen) == 3                           # originals, reconstructions, boxes
    assert all(0 <= x.min() and x.max() <= 1 for x in pytorch_fid.seen)
    assert evaluate.main(["recon", "--vq", a, "--limit", "4"]) == 0
    assert "--rfid adds it (fetches" in capsys.readouterr().out


def test_rfid_without_its_package(files, monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pytorch_fid" else find_spec(name))
    monkeypatch.setitem(sys.modules, "pytorch_fid.inception", None)
    monkeypatch.setitem(sys.modules, "pytorch_fid", None)
    a = str(files / "a/last.pt")
    assert evaluate.main(["recon", "--vq", a, "--limit", "4"]) == 0
    assert "rFID is not measured: pip install pytorch-fid, then --rfid" in capsys.readouterr().out
    assert evaluate.main(["recon", "--vq", a, "--rfid"]) == 2
    error = capsys.readouterr().err.strip()
    assert "pip install pytorch-fid" in error and len(error.splitlines()) == 1


def test_inceptions_weights_that_cannot_be_fetched(pytorch_fid, monkeypatch):
    def offline(self, blocks):
        raise OSError("no network")
    monkeypatch.setattr(pytorch_fid, "__init__", offline)
    with pytest.raises(ValueError, match=r"--rfid: Inception's weights cannot be fetched \(no network\)"):
        metrics.images.inception("cpu")


def test_memory_does_not_grow_with_the_pictures():
    alive, most = weakref.WeakSet(), []

    def batches(n):
        for k in range(n):
            x = torch.full((2, 3, 16, 16), k / n)
            alive.add(x)
            most.append(len(alive))
            yield x, torch.tensor([2 * k, 2 * k + 1])

    def model(x):
        x_hat = x * 0.9
        alive.add(x_hat)
        return x_hat, 0, torch.zeros(2, 4, 4, dtype=torch.long)
    model.config = SimpleNamespace(n_embed=8, factor=4)
    features = lambda x: x.mean((2, 3))                                                 # noqa: E731
    peaks = []
    for n in (4, 40):
        most.clear()
        found = metrics.images.compare([model], batches(n), {"psnr": metrics.images.psnr}, features)
        peaks.append(max(most))
        tally = found.tallies[0]
        assert tally.n == 2 * n
        assert tally.result(found.originals).keys() == {"psnr", "codes_used", "perplexity", "rfid"}
    assert peaks[0] == peaks[1] <= 3                # a batch, its reconstruction, and the batch that is being made


def test_zooms_lie_on_the_joints():
    pose = np.zeros((17, 3), np.float32)
    assert plots.eyes_box(pose, 100) is None and plots.hand_box(pose, 100) is None
    for name, xy in {"eye_left": (0.6, 0.2), "eye_right": (0.4, 0.2), "wrist_right": (0.99, 0.5)}.items():
        pose[JOINTS.index(name)] = *xy, 1
    x0, y0, x1, y1 = plots.eyes_box(pose, 100)
    assert x0 < 40 and x1 > 60 and (y0, y1) == (4, 36) and x1 - x0 == y1 - y0
    x0, y0, x1, y1 = plots.hand_box(pose, 100)
    assert x1 == 100 and y0 < 50 < y1                                                   # moved into the picture
    pose[JOINTS.index("wrist_right"), 0] = 1.2
    assert plots.hand_box(pose, 100) is None


# ---------------------------------------------------------------------------------------------------- the command

def test_recon_end_to_end(files, tmp_path, capsys):
    a, b = str(files / "a/last.pt"), str(files / "b/last.pt")
    assert evaluate.main(["recon", "--vq", a, b, "--against", "figures:6", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "out/recon.json").read_text())

    ds = data.open_data(f"figures:{PICTURES}", 16)[1]
    x = torch.stack([data.to_tensor(ds[i][0]) for i in range(PICTURES)])
    for path, own in zip((a, b), report["checkpoints"], strict=True):
        payload = checkpoint.load(path, "vq")
        x_hat, _, indices = checkpoint.build_vq(payload, path)(x)
        p = np.bincount(indices.flatten().numpy(), minlength=32) / indices.numel()
        values = metrics.images.psnr(x_hat, x)
        assert own["psnr"] == pytest.approx(values.mean().item(), rel=1e-4)
        assert own["l1"] == pytest.approx((x_hat.clamp(-1, 1) - x).abs().mean().item(), rel=1e-4)
        assert own["ssim"] == pytest.approx(metrics.images.ssim(x_hat, x).mean().item(), rel=1e-4)
        assert own["codes_used"] == pytest.approx((p > 0).mean()) and own["hash"] == checkpoint.hash_of(payload["vq"])
        if path == a:
            ranked, middle = values.sort().values, (PICTURES - 1) / 2
            about = sorted(sorted(range(PICTURES), key=lambda rank: (abs(rank - middle), rank))[:evaluate.SHOWN])
            for name, ranks in (("worst", list(range(evaluate.SHOWN))), ("typical", about)):
                shown = [int(figure.removeprefix("figure ")) for figure in report[name]]
                assert len(set(shown)) == evaluate.SHOWN    # by their dB: between near equals rounding may decide
                torch.testing.assert_close(values[shown], ranked[ranks], rtol=1e-4, atol=0)
    assert report["pictures"] == PICTURES and report["size"] == 16
    assert report["command"].startswith("python evaluate.py recon --vq")
    assert [box["name"] for box in report["baselines"]] == ["boxes of 4 x 4"]
    assert report["against"]["pictures"] == 6 and 0 < report["against"]["overlap"]["a/last.pt"]["histogram"] <= 1

    rows = [line for line in printed.splitlines() if line.startswith(("a/last.pt", "b/last.pt", "boxes"))]
    assert len(rows) == 5 and f"{report['checkpoints'][0]['psnr']:.2f}" in rows[0].split()
    assert len({len(row) for row in rows[:2]}) == 1 and "dB, higher" in printed
    assert "--lpips-weights" in printed and "--rfid" in printed
    page = Image.open(tmp_path / "out/recon.png")
    assert 1000 < page.width <= 2500 and page.height > 2 * evaluate.SHOWN * plots.TILES[0]


def test_lpips_where_weights_are_given(files, monkeypatch, capsys):
    class Distance(torch.nn.Module):
        def forward(self, x, y):
            return torch.full((len(x),), 0.125)
    monkeypatch.setattr(formats.lpips, "load_lpips", lambda paths: Distance() if paths == ["v", "w"] else None)
    assert evaluate.main(["recon", "--vq", str(files / "a/last.pt"), "--lpips-weights", "v", "w", "--limit", "4"]) == 0
    printed = capsys.readouterr().out
    assert "0.1250" in printed and "4 pictures" in printed


def test_pictures_without_keypoints_count(files, tmp_path, capsys):
    ds = Figures(3, 20)
    (tmp_path / "mine").mkdir()
    for i in range(3):
        Image.fromarray(ds[i][0]).save(tmp_path / f"mine/{i}.png")
    (tmp_path / "mine/captions.json").write_text('{"0.png": "a person"}')
    flags = ["recon", "--vq", str(files / "a/last.pt"), "--data", str(tmp_path / "mine"), "--out"]
    assert evaluate.main([*flags, str(tmp_path / "out")]) == 0
    assert "3 pictures, all of" in capsys.readouterr().out
    for out in ("mine", "mine/out"):
        assert evaluate.main([*flags, str(tmp_path / out)]) == 2
        error = capsys.readouterr().err.strip()
        assert "name another folder" in error and len(error.splitlines()) == 1
    assert not (tmp_path / "mine/out").exists()
    assert evaluate.main(["recon", "--vq", str(files / "a/last.pt"), "--against", str(tmp_path / "mine"), "--out",
                          str(tmp_path / "mine/out")]) == 2


def test_broken_pictures_of_against_are_not_counted(files, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for i in range(100):
        Image.new("RGB", (16, 16), (2 * i, 0, 0)).save(other / f"{i:02}.png")
    (other / "40.png").write_bytes(b"no picture")
    assert evaluate.main(["recon", "--vq", str(files / "a/last.pt"), "--against", str(other), "--limit", "all",
                          "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out/recon.json").read_text())["against"]["pictures"] == 99


def test_a_model_that_gives_nan_is_reported_in_sound_json(files, tmp_path, capsys):
    payload = checkpoint.load(files / "a/last.pt", "vq")
    payload["vq"]["decoder.conv_in.bias"][:] = 3e38         # a number, but nothing that is made of it is one
    checkpoint.save(tmp_path / "nan.pt", payload)
    assert evaluate.main(["recon", "--vq", str(tmp_path / "nan.pt"), "--limit", "8", "--out", str(tmp_path)]) == 0
    assert "nan" in capsys.readouterr().out
    report = json.loads((tmp_path / "recon.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert report["checkpoints"][0]["psnr"] is None and report["baselines"][0]["psnr"] > 0


def test_batches_are_small(files, monkeypatch):
    """The published autoencoders take a gigabyte for a few pictures of 256 pixels."""
    sizes, compare = [], metrics.images.compare

    def spy(models, batches, *rest):
        return compare(models, (sizes.append(len(batch[0])) or batch for batch in batches), *rest)
    monkeypatch.setattr(evaluate, "compare", spy)
    assert evaluate.main(["recon", "--vq", str(files / "a/last.pt")]) == 0
    assert sizes == [8, 8, 8]


def test_of_a_stage_two_file_the_first_stage_alone_stays_in_memory(ldm, files, tmp_path, capsys):
    train = {"unet": {}, "cond": {}, "optimizer": torch.zeros(9)}
    checkpoint.save(tmp_path / "last.pt", ldm | {"train": train})
    checkpoint.save(tmp_path / "best.pt", ldm)
    for name in ("last.pt", "best.pt"):
        for ema in (True, False):                       # its first stage has no EMA, so neither file is refused
            payload = checkpoint.load_vq(str(tmp_path / name), ema)
            assert payload.keys() == {"config", "step", "vq", "vq_config"}
    assert checkpoint.load_vq(str(files / "a/last.pt"), True).keys() == {"config", "step", "vq", "vq_config"}
    assert evaluate.main(["recon", "--vq", str(tmp_path / "best.pt"), "--no-ema", "--limit", "4"]) == 0
    assert "CompVis" not in capsys.readouterr().out


def test_what_a_published_file_was_taken_for_is_said(ldm, tmp_path, capsys):
    torch.manual_seed(0)
    model = VQModel(VQConfig(ch=32, n_embed=32))
    torch.save({"state_dict": model.state_dict(), "global_step": 77}, tmp_path / "vq.ckpt")
    assert checkpoint.load_vq(str(tmp_path / "vq.ckpt"), True).keys() == {
        "config", "step", "vq", "vq_config", "source", "weights"}
    capsys.readouterr()
    data_flags = ["--data", "figures:4", "--size", "16", "--limit", "4"]
    assert evaluate.main(["recon", "--vq", str(tmp_path / "vq.ckpt"), *data_flags]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert "vq.ckpt: a CompVis checkpoint of stage vq, step 77, raw weights: VQ-f4 32 wide" in first
    checkpoint.save(tmp_path / "ldm.pt", ldm | {"source": "CompVis", "weights": "EMA"})
    for flags in (["recon", "--vq"], ["condition", "--ckpt"]):
        assert evaluate.main([*flags, str(tmp_path / "ldm.pt"), *data_flags]) == 0
        first = capsys.readouterr().out.splitlines()[0]
        assert "ldm.pt: a CompVis checkpoint of stage ldm" in first and "100 timesteps" in first


def test_condition_has_no_null_where_no_pose_was_dropped(ldm, tmp_path, capsys):
    printed = []
    for knows in (False, True):
        checkpoint.save(tmp_path / "ldm.pt", ldm | {"knows_null": knows})
        assert evaluate.main(["condition", "--ckpt", str(tmp_path / "ldm.pt")]) == 0
        printed.append([line.split() for line in capsys.readouterr().out.splitlines()])
    assert [words[0] for words in printed[0][:-1]] == ["right", "shuffled", "ratio"]
    assert [words[0] for words in printed[1]] == ["right", "shuffled", "null", "ratio"]
    assert [words for words in printed[1] if words[0] != "null"] == printed[0][:-1]


@pytest.mark.parametrize("size", ["12", "-8"])
def test_condition_with_a_size_that_the_unet_cannot_take(ldm, tmp_path, capsys, size):
    checkpoint.save(tmp_path / "ldm.pt", ldm)
    assert evaluate.main(["condition", "--ckpt", str(tmp_path / "ldm.pt"), "--size", size]) == 2
    error = capsys.readouterr().err.strip()
    assert f"--size is {size}" in error and "multiple of 8" in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("flags, words", [
    (["--size", "18"], ["--size is 18", "multiple of 4"]), (["--size", "8"], ["--size is 8", "11"]),
    (["--data", "nowhere"], ["nowhere"]), (["--against", "figures:x"], ["figures:x"]),
    (["--all", "--val", "there"], ["--val there"]), (["--lpips-weights", "none.pth"], ["none.pth"]),
    (["--out", "/proc/none"], ["/proc/none"]), (["--device", "tpu"], ["tpu"]),
])
def test_a_mistake_is_one_sentence(files, capsys, flags, words):
    code = evaluate.main(["recon", "--vq", str(files / "a/last.pt"), *flags])
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and len(lines) == 1 and all(word in lines[0] for word in words), lines


def test_checkpoints_that_cannot_be_compared(files, capsys):
    a = str(files / "a/last.pt")
    for paths, word in (([a, a], "twice"), ([a, "none.pt"], "none.pt")):
        assert evaluate.main(["recon", "--vq", *paths]) == 2
        error = capsys.readouterr().err.strip()
        assert word in error and len(error.splitlines()) == 1


def test_an_autoencoder_of_something_else_than_colour_pictures(tmp_path, capsys):
    checkpoint.save(tmp_path / "grey.pt", vq_payload(VQModel(replace(TINY, in_channels=1))))
    assert evaluate.main(["recon", "--vq", str(tmp_path / "grey.pt")]) == 2
    assert "grey.pt takes 1 and gives 3 channels" in capsys.readouterr().err


def test_the_limit(capsys):
    assert evaluate.picture_limit("all") == evaluate.picture_limit("0") > 10 ** 9 and evaluate.picture_limit("7") == 7
    with pytest.raises(SystemExit) as e:
        evaluate.parse_args(["recon", "--limit", "1"])
    assert e.value.code == 2 and "'1'" in capsys.readouterr().err


def test_an_interrupt_ends_with_130(files, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(evaluate, "compare", interrupted)
    assert evaluate.main(["recon", "--vq", str(files / "a/last.pt")]) == 130
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore\nlines"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to")])
def test_too_little_memory_is_one_sentence(files, monkeypatch, capsys, error):
    def full(models, batches, *_):
        next(batches)
        raise error
    monkeypatch.setattr(evaluate, "compare", full)
    assert evaluate.main(["recon", "--vq", str(files / "a/last.pt"), "--device", "cpu"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1:]       # a line of its own, after the bar
    assert error == ["evaluate.py: the memory of cpu is too small for this; give a smaller --size, or --device cpu"]
