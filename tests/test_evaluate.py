"""evaluate.py: each measure against a closed form, brute force or scikit-image, and the recon command end to end."""
import json
import math
import weakref
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint
import data
import evaluate
from keypoints import JOINTS
from vq import VQConfig, VQModel

TINY = VQConfig(ch=8, n_embed=32, resolution=16, norm_groups=0, zero_init=True)
PICTURES = 24


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two tiny autoencoders a/last.pt and b/last.pt, as train.py writes them."""
    root = tmp_path_factory.mktemp("models")
    x = torch.stack([data.to_tensor(data.Figures(8, 16)[i][0]) for i in range(8)])
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        model = VQModel(TINY).eval()
        model.quantize.init_codes(model.encode(x))
        (root / name).mkdir()
        checkpoint.save(root / name / "last.pt", {
            "format": checkpoint.FORMAT, "stage": "vq", "step": 3, "vq": model.state_dict(), "vq_config": asdict(TINY),
            "config": {"size": 16, "data": f"figures:{PICTURES}", "val": None}})
    return root


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
        assert evaluate.ssim(as_batch(y), as_batch(x)).item() == pytest.approx(wanted, abs=1e-6)


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
    assert evaluate.ssim(as_batch(x), as_batch(y)).item() == pytest.approx(np.mean(values), abs=1e-6)


def test_ssim_of_equal_and_of_flat_pictures():
    x = as_batch(formula_picture())
    assert evaluate.ssim(x, x).item() == 1
    a, b = torch.full((1, 3, 16, 16), -0.2), torch.full((1, 3, 16, 16), 0.4)            # 0.4 and 0.7 on 0..1
    assert evaluate.ssim(a, b).item() == pytest.approx((2 * 0.4 * 0.7 + 1e-4) / (0.4 ** 2 + 0.7 ** 2 + 1e-4), abs=1e-6)


# --------------------------------------------------------------------------------- measures of a set of pictures

def test_code_use_in_closed_form():
    assert evaluate.code_use(torch.tensor([5, 5, 0, 5, 5])) == {"codes_used": 0.8, "perplexity": pytest.approx(4)}
    assert evaluate.code_use(torch.tensor([9, 0, 0]))["perplexity"] == pytest.approx(1)


def test_overlap_by_hand():
    ours, theirs = torch.tensor([6, 2, 2, 0, 0]), torch.tensor([1, 0, 1, 2, 0])
    wanted = {"both": 2, "only_ours": 1, "only_theirs": 1, "common": 0.5, "ours_known": 0.8, "theirs_known": 0.5,
              "histogram": 0.25 + 0.2}
    assert evaluate.code_overlap(ours, theirs) == pytest.approx(wanted)
    swapped = evaluate.code_overlap(theirs, ours)
    assert (swapped["ours_known"], swapped["theirs_known"]) == (pytest.approx(0.5), pytest.approx(0.8))
    assert evaluate.code_overlap(ours, 3 * ours)["histogram"] == pytest.approx(1)


def moments(mean, cov) -> evaluate.Moments:
    """Moments of points that have exactly this mean and covariance."""
    rng = np.random.default_rng(0)
    z = rng.standard_normal((50, len(mean)))
    z -= z.mean(0)
    z = z @ np.linalg.inv(np.linalg.cholesky(np.cov(z.T)).T)                            # covariance 1
    points = torch.from_numpy(z @ np.linalg.cholesky(np.asarray(cov, float)).T + mean)
    m = evaluate.Moments()
    for part in points.split(7):
        m.add(part)
    return m


def test_moments_are_numpys():
    points = np.random.default_rng(0).standard_normal((50, 4)) * [1, 2, 3, 4] + 5
    m = evaluate.Moments()
    for part in torch.from_numpy(points).split(13):
        m.add(part)
    mean, cov = m.result()
    np.testing.assert_allclose(mean, points.mean(0), rtol=1e-12)
    np.testing.assert_allclose(cov, np.cov(points.T), rtol=1e-9, atol=1e-12)


def test_the_frechet_distance_in_closed_form():
    # Covariances that commute: |m|^2 + sum (sqrt(a) - sqrt(b))^2 over their eigenvalues.
    a, b = moments([0, 0, 1], np.diag([1, 4, 9])), moments([1, 0, 3], np.diag([4, 4, 1]))
    assert evaluate.frechet(a, b) == pytest.approx(1 + 4 + 1 + 0 + 4, rel=1e-8)
    assert evaluate.frechet(a, a) == pytest.approx(0, abs=1e-9)
    # Two dimensions: tr (AB)^(1/2) = sqrt(tr AB + 2 sqrt(det AB)), and these two do not commute.
    A, B = np.array([[2, 1], [1, 3]]), np.array([[5, -2], [-2, 1]])
    root = math.sqrt(np.trace(A @ B) + 2 * math.sqrt(np.linalg.det(A @ B)))
    assert evaluate.frechet(moments([0, 0], A), moments([0, 0], B)) == pytest.approx(5 + 6 - 2 * root, rel=1e-8)


# ----------------------------------------------------------------------------------------- one pass over pictures

def test_the_shortlist_keeps_the_worst_and_some_about_the_median():
    values = np.random.default_rng(0).permutation(10_001)
    shortlist = evaluate.Shortlist(4)
    for index, value in enumerate(values):
        shortlist.add(float(value), index)
    assert values[shortlist.worst()].tolist() == [0, 1, 2, 3]
    assert len(shortlist.reservoir) == shortlist.RESERVOIR and len(shortlist.heap) == 4
    typical = values[shortlist.typical()]
    assert len(typical) == 4 and abs(typical - 5000).max() < 600        # 4 standard errors of a median of 1024
    assert abs(np.mean([i for _, i in shortlist.reservoir]) - 5000) < 400               # early and late ones alike


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
        results, _, tallies, _ = evaluate.compare([model], batches(n), {"psnr": evaluate.psnr}, features)
        peaks.append(max(most))
        assert tallies[0].n == 2 * n and results[0].keys() == {"psnr", "codes_used", "perplexity", "rfid"}
    assert peaks[0] == peaks[1] <= 3                # a batch, its reconstruction, and the batch that is being made


def test_zooms_lie_on_the_joints():
    pose = np.zeros((17, 3), np.float32)
    assert evaluate.eyes_box(pose, 100) is None and evaluate.hand_box(pose, 100) is None
    for name, xy in {"eye_left": (0.6, 0.2), "eye_right": (0.4, 0.2), "wrist_right": (0.99, 0.5)}.items():
        pose[JOINTS.index(name)] = *xy, 1
    x0, y0, x1, y1 = evaluate.eyes_box(pose, 100)
    assert x0 < 40 and x1 > 60 and (y0, y1) == (4, 36) and x1 - x0 == y1 - y0
    x0, y0, x1, y1 = evaluate.hand_box(pose, 100)
    assert x1 == 100 and y0 < 50 < y1                                                   # moved into the picture
    pose[JOINTS.index("wrist_right"), 0] = 1.2
    assert evaluate.hand_box(pose, 100) is None


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
        values = evaluate.psnr(x_hat, x)
        assert own["psnr"] == pytest.approx(values.mean().item(), rel=1e-4)
        assert own["l1"] == pytest.approx((x_hat.clamp(-1, 1) - x).abs().mean().item(), rel=1e-4)
        assert own["ssim"] == pytest.approx(evaluate.ssim(x_hat, x).mean().item(), rel=1e-4)
        assert own["codes_used"] == pytest.approx((p > 0).mean()) and own["hash"] == checkpoint.hash_of(payload["vq"])
        if path == a:
            ranks = values.argsort().tolist()
            middle = (PICTURES - 1) / 2
            about = sorted(sorted(range(PICTURES), key=lambda rank: (abs(rank - middle), rank))[:evaluate.SHOWN])
            assert report["worst"] == [f"figure {i}" for i in ranks[:evaluate.SHOWN]]
            assert report["typical"] == [f"figure {ranks[rank]}" for rank in about]
    assert report["pictures"] == PICTURES and report["size"] == 16
    assert report["command"].startswith("python evaluate.py recon --vq")
    assert [box["name"] for box in report["baselines"]] == ["boxes of 4 x 4"]
    assert report["against"]["pictures"] == 6 and 0 < report["against"]["overlap"]["a/last.pt"]["histogram"] <= 1

    rows = [line for line in printed.splitlines() if line.startswith(("a/last.pt", "b/last.pt", "boxes"))]
    assert len(rows) == 5 and f"{report['checkpoints'][0]['psnr']:.2f}" in rows[0].split()
    assert len({len(row) for row in rows[:2]}) == 1 and "dB, higher" in printed
    assert "--lpips-weights" in printed and "--rfid" in printed
    page = Image.open(tmp_path / "out/recon.png")
    assert 1000 < page.width <= 2500 and page.height > 2 * evaluate.SHOWN * evaluate.TILES[0]


def test_lpips_where_weights_are_given(files, monkeypatch, capsys):
    class Distance(torch.nn.Module):
        def forward(self, x, y):
            return torch.full((len(x),), 0.125)
    monkeypatch.setattr(checkpoint, "load_lpips", lambda paths: Distance() if paths == ["v", "w"] else None)
    assert evaluate.main(["recon", "--vq", str(files / "a/last.pt"), "--lpips-weights", "v", "w", "--limit", "4"]) == 0
    printed = capsys.readouterr().out
    assert "0.1250" in printed and "4 pictures" in printed


def test_pictures_without_keypoints_count(files, tmp_path, capsys):
    ds = data.Figures(3, 20)
    for i in range(3):
        Image.fromarray(ds[i][0]).save(tmp_path / f"{i}.png")
    flags = ["recon", "--vq", str(files / "a/last.pt"), "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    assert evaluate.main(flags) == 0
    assert "3 pictures, all of" in capsys.readouterr().out


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
