"""The keypoint detector and evaluate.py pose: places in closed form, a perfect detector, files."""
import json

import numpy as np
import pytest
import torch
from test_evaluate import stage_2

import checkpoint
import data
import evaluate
import metrics.condition
import metrics.pose
import plots
from dataset.figures import Figures
from formats import detections
from keypoints import JOINTS, flip, heatmaps
from ldm import SAMPLING
from metrics import keypoint_detector

RNG = np.random.default_rng(0)
J = len(JOINTS)


def poses_of(n: int) -> np.ndarray:
    return np.concatenate([RNG.uniform(0.1, 0.9, (n, J, 2)), np.ones((n, J, 1))], axis=2)


def trained_on(figures: Figures, steps: int) -> keypoint_detector.KeypointDetector:
    batches = data.batches(figures, keypoint_detector.BATCH, 0, 0, steps, augment=True)
    return keypoint_detector.train_detector(((x, poses) for x, poses, _ in batches), steps, 64)


def are_equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))


# --------------------------------------------------------------------------------- the detector

def test_the_place_of_a_gaussian_is_its_centre_and_of_two_the_likelier_counts():
    poses = torch.from_numpy(poses_of(50))
    found = keypoint_detector.peaks(heatmaps(poses, 32, 0.025).clamp(min=1e-12).log())
    assert (found - poses[..., :2]).abs().max() < 0.1 / 32              # a tenth of a cell
    pose = torch.tensor([[[0.2, 0.3, 1.0], [0.8, 0.7, 1.0]]])
    one, other = heatmaps(pose, 32, 0.025)[0]
    both = (0.6 * one + 0.4 * other).clamp(min=1e-12).log()[None, None]
    assert torch.allclose(keypoint_detector.peaks(both)[0, 0], pose[0, 0, :2], atol=0.005)


def test_the_loss_in_closed_form():
    poses = torch.from_numpy(poses_of(3)).float()
    flat = keypoint_detector.detector_loss(torch.zeros(3, J, 16, 16), poses)
    assert flat.item() == pytest.approx(np.log(256))                    # any q against 1/256
    wanted = heatmaps(poses, 16, keypoint_detector.SIGMA)
    wanted = wanted / wanted.sum((2, 3), keepdim=True)
    entropy = -(wanted * wanted.clamp(min=1e-30).log()).sum((2, 3)).mean()
    loss = keypoint_detector.detector_loss(wanted.clamp(min=1e-30).log(), poses)
    assert loss.item() == pytest.approx(entropy.item(), rel=1e-4)


def test_joints_that_nobody_can_see_teach_nothing():
    poses, logits = torch.from_numpy(poses_of(2)).float(), torch.randn(2, J, 16, 16)
    poses[:, 3:] = 0
    alone = keypoint_detector.detector_loss(logits, poses)
    for place in (1.2, 0.5, 1), (0.5, -0.1, 1), (0.5, 0.5, 0):
        poses[:, 5] = torch.tensor(place)
        assert keypoint_detector.detector_loss(logits, poses) == alone
    poses[:, :, 2] = 0
    assert keypoint_detector.detector_loss(logits, poses) == 0


def test_an_image_has_the_same_pose_in_any_batch_and_its_mirror_image_the_mirrored_one():
    reader = keypoint_detector.KeypointDetector(64).eval()
    images = RNG.integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    together, features = metrics.pose.read_all(reader, images)
    alone, its_features = metrics.pose.read_all(reader, images[3:4])
    np.testing.assert_allclose(together[3], alone[0], atol=1e-5)
    assert torch.allclose(features[3], its_features[0], atol=1e-5)
    assert together.shape == (5, J, 3) and (together[..., 2] == 1).all()
    mirrored, _ = metrics.pose.read_all(reader, images[:, :, ::-1].copy())
    np.testing.assert_allclose(flip(mirrored), together, atol=1e-4)


def test_training_learns_repeats_itself_and_moves_no_generator(monkeypatch):
    monkeypatch.setattr(keypoint_detector, "BATCH", 8)
    figures = Figures(4, 64)
    images, poses = (np.stack(part) for part in zip(*(figures[i] for i in range(4)), strict=True))
    torch.manual_seed(5)
    learnt, again = (trained_on(figures, steps=25) for _ in range(2))
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.rand(1) == after and are_equal(learnt, again)
    assert not learnt.training and not any(p.requires_grad for p in learnt.parameters())
    losses = [keypoint_detector.detector_loss(reader.train()(data.to_tensor(images))[0],
                                              torch.from_numpy(poses)).item()
              for reader in (learnt, trained_on(figures, steps=0))]
    assert losses[0] < losses[1] - 1


def test_a_share_of_the_images_is_degraded_and_keeps_its_colours():
    x = torch.stack([data.to_tensor(Figures(1, 64)[0][0])] * 100)
    generator = torch.Generator().manual_seed(0)
    degraded = keypoint_detector.degraded
    assert torch.equal(degraded(x, 0.0, generator), x)
    assert torch.equal(degraded(x, 0.3, generator)[30:], x[30:])
    y = torch.cat([degraded(x, 0.3, generator)[:30] for _ in range(10)]) - x[0]
    assert (y.mean((0, 2, 3)).abs() < 0.02).all()                       # no colour is favoured
    strength = y.pow(2).mean((1, 2, 3)).sqrt()          # stage 1 leaves an error of 0.09 of figures
    assert 0.05 < strength.min() < 0.12 and 0.17 < strength.max() < 0.4


@pytest.mark.slow
def test_it_learns_to_find_joints_in_images_it_has_not_seen(monkeypatch):
    """Measured: 0.60 and 0.10."""
    monkeypatch.setattr(keypoint_detector, "BATCH", 16)
    reader, held_out = trained_on(Figures(4000, 64), steps=100), Figures(64, 64, seed=1)
    images, asked = (np.stack(part) for part in zip(*(held_out[i] for i in range(64)), strict=True))
    read, _ = metrics.pose.read_all(reader, images)
    wrong = asked[metrics.condition.derangement(64, 0)]
    assert metrics.pose.fidelity(read, asked)["pck@0.1"] > 0.5
    assert metrics.pose.fidelity(read, wrong)["pck@0.1"] < 0.2


def test_fidelity_by_hand():
    asked = poses_of(4)
    asked[:, 0, :2], asked[:, 1, :2] = (0, 0), (0.6, 0.8)       # the box's diagonal is at least 1
    asked[:, 2:, :2] = asked[:, 2:, :2] * 0.5
    read = asked.copy()
    read[[0, 1, 2], 4, 0] += [0.09, 0.15, 0.25]
    rows = metrics.pose.fidelity(read, asked)
    assert rows["joints"]["ear_right"] == 0.5 and rows["pck@0.1"] == pytest.approx(1 - 0.5 / J)
    assert rows["pck@0.2"] == pytest.approx(1 - 0.25 / J) and 0.9 < rows["oks"] < 1
    asked[3, 0, :2] = read[3, 0, :2] = (-0.6, -0.8)     # outside: only the person's box counts it
    read[3, 4, 0] += 0.19
    before = metrics.pose.fidelity(read, asked)
    assert before["joints"]["ear_right"] == 0.5
    read[3, 0, :2] = 0.9
    assert metrics.pose.fidelity(read, asked) == before and before["joints"]["nose"] == 1


# --------------------------------------------------------------------------- a saved detector

def test_a_detector_is_saved_and_trained_again_for_other_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(keypoint_detector, "BATCH", 4)
    steps, train = [], keypoint_detector.train_detector
    monkeypatch.setattr(keypoint_detector, "train_detector",
                        lambda batches, n, *rest: steps.append(n) or train(batches, n, *rest))
    few, more = Figures(4, 64), Figures(5, 64)
    reader = evaluate.find_detector("figures:4", few, steps=1)
    again = evaluate.find_detector("figures:4", few, steps=1)
    assert steps == [1] and are_equal(reader, again) and not again.training
    evaluate.find_detector("figures:4", more, steps=1)                  # other images
    evaluate.find_detector("figures:4", more, steps=2)
    assert steps == [1, 1, 2] and len(list((tmp_path / "runs").iterdir())) == 2


def test_the_bundled_detector_is_for_any_number_of_figures_and_nothing_else(
        tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(keypoint_detector, "train_detector",
                        lambda *args: keypoint_detector.KeypointDetector(64).eval())
    steps = keypoint_detector.STEPS
    for spec, size, n in (("figures:3", 64, steps), ("mine", 64, steps), ("figures:3", 32, steps),
                          ("figures:3", 64, 2)):
        evaluate.find_detector(spec, Figures(3, size), steps=n)
        bundled = (spec, size, n) == ("figures:3", 64, steps)
        assert ("bundled" in capsys.readouterr().out) == bundled
    assert len(list((tmp_path / "runs").iterdir())) == 3


# --------------------------------------------------------------------------------- the command

@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The file of a tiny stage 2 for 12 figures of 16 pixels."""
    path = tmp_path_factory.mktemp("tiny") / "ldm.pt"
    checkpoint.save(path, stage_2(n=12))
    return path


@pytest.fixture
def pose(tiny, tmp_path, monkeypatch):
    """Runs evaluate.py pose in an empty folder: pose(flags...) -> exit status."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate.find_detector, "__defaults__", ("cpu", 1))
    first = ["pose", "--ckpt", str(tiny), "--steps", "2", "--limit", "6"]
    return lambda *flags: evaluate.main([*first, *flags])


def report() -> dict:
    with open("o/pose.json") as file:
        return json.load(file)


def asked() -> list[dict]:
    """The annotations of poses.json."""
    with open("o/poses.json") as file:
        return json.load(file)["annotations"]


def test_pose_end_to_end_and_with_a_perfect_detector(pose, monkeypatch, capsys):
    draw, given = evaluate.sample.draw_images, []
    monkeypatch.setattr(evaluate.sample, "draw_images",
                        lambda *a, **k: given.append((a, draw(*a, **k))) or given[-1][1])
    assert pose("--out", "o", "--seed", "7") == 0
    printed, own = capsys.readouterr().out, report()
    rows = own["rows"]
    assert rows.keys() == {"samples", "decoded", "real", "shuffled"}
    assert set(rows["real"]["joints"]) == set(JOINTS)
    assert "6 held-out poses of figures:12" in printed and "The ceiling is low" in printed
    assert f"{rows['samples']['pck@0.1']:.3f}" in printed
    assert rows["samples"]["frechet"] > 0 and "frechet" not in rows["real"]
    assert own["images"] == 6 and own["guidance"] == SAMPLING["eps"][0]
    (((_, poses, seeds, _), samples),) = given
    assert seeds == [7, 8, 9, 10, 11, 12]                               # one per image
    back, images, _ = detections.read_images(evaluate.Path("o"))
    assert np.allclose(back, poses, atol=1e-6) and np.array_equal(images[:6], samples)
    real = [Figures(12, 16, seed=1)[i][0] for i in data.evenly(12, 6)]
    assert np.array_equal(images[6:], real)

    assert pose("--out", "o", "--detected", "o/poses.json") == 0        # what was asked for
    printed, rows = capsys.readouterr().out, report()["rows"]
    for name in ("samples", "real"):
        assert rows[name]["pck@0.1"] == 1 and rows[name]["oks"] == pytest.approx(1)
    assert 0 < rows["shuffled"]["pck@0.1"] < 0.6 and own["rows"]["samples"]["pck@0.1"] < 0.6
    assert "1.00 of the ceiling 1.000" in printed and "The ceiling is low" not in printed
    assert len(given) == 1                                              # the model is not needed


def openpose(annotation: dict) -> dict:
    """A COCO annotation of ours as a person of OpenPose's 18 joints."""
    joints, flat = np.array(annotation["keypoints"]).reshape(17, 3), np.zeros((18, 3))
    for ours, theirs in enumerate([0, 15, 14, 17, 16, 5, 2, 6, 3, 7, 4, 11, 8, 12, 9, 13, 10]):
        flat[theirs] = [*joints[ours, :2], 0.9]
    return {"pose_keypoints_2d": flat.ravel().tolist()}


def test_a_folder_of_files_and_images_in_which_nobody_was_found(pose, tmp_path, capsys):
    assert pose("--out", "o") == 0
    found, people = tmp_path / "found", asked()
    found.mkdir()

    def score() -> float:
        capsys.readouterr()
        assert pose("--out", "o", "--detected", "found") == 0
        assert "the ceiling is unknown" in capsys.readouterr().out
        rows = report()["rows"]
        assert set(rows) == {"samples", "shuffled"}
        return rows["samples"]["pck@0.1"]

    for i in (2, 1, 0):                                         # of 6 samples, and of no real image
        text = json.dumps({"people": [openpose(people[i])]})
        (found / f"take2_{i:06d}_keypoints.json").write_text(text)
    assert score() == pytest.approx(0.5, abs=0.05)
    (found / "000003_keypoints.json").write_text(json.dumps({"version": 1.1, "people": []}))
    (found / "000004.json").write_text("[]")                    # what detectors leave for nobody
    flat = np.array(people[5]["keypoints"]).reshape(17, 3) / [16, 16, 1]
    numbers = " ".join(f"{v:.6f}" for v in flat.ravel())
    (found / "000005.txt").write_text(f"0 0.5 0.5 1 1 {numbers}\n")     # YOLO
    assert score() == pytest.approx(4 / 6, abs=0.06)
    (found / "000001.json").write_text("{}")                    # not a pose file
    assert pose("--out", "o", "--detected", "found") == 2


def test_a_detectors_answer_that_cannot_be_used_is_one_sentence(pose, tmp_path, capsys):
    assert pose("--out", "o") == 0
    (tmp_path / "empty").mkdir()
    told = json.loads((tmp_path / "o/poses.json").read_text())
    for image in told["images"]:
        image["file_name"] = f"photo{image['id'] + 1000}.png"
    (tmp_path / "other.json").write_text(json.dumps(told))
    (tmp_path / "unnamed.json").write_text(json.dumps({"people": [openpose(asked()[0])]}))
    for file, words in (("empty", "no pose"), ("other.json", "no pose"),
                        ("unnamed.json", "does not name its images")):
        capsys.readouterr()
        assert pose("--out", "o", "--detected", file) == 2
        assert words in capsys.readouterr().err
    (tmp_path / "o/images/000007.png").unlink()               # as an interruption leaves them
    assert pose("--out", "o", "--detected", "o/poses.json") == 2
    assert "first run the command without --detected" in capsys.readouterr().err


def test_earlier_images_are_replaced_and_those_of_somebody_else_left_alone(
        pose, tmp_path, monkeypatch, capsys):
    assert pose("--out", "o") == 0 and pose("--out", "o", "--limit", "4") == 0
    assert len(list((tmp_path / "o/images").iterdir())) == 8
    (tmp_path / "o/poses.json").unlink()
    monkeypatch.setattr(evaluate, "draw_held_out", None)        # before any work
    assert pose("--out", "o") == 2
    assert "other images in o/images" in capsys.readouterr().err
    assert len(list((tmp_path / "o/images").iterdir())) == 8


def test_the_page_shows_the_best_first_and_the_worst_last(tmp_path, monkeypatch):
    n, order = plots.EXTREMES, RNG.permutation(12)              # order[0] has the best score
    scores, poses = np.full(13, np.nan), poses_of(13)           # the last has none
    scores[order] = np.linspace(1, 0, 12)
    images = np.arange(13, dtype=np.uint8)[:, None, None, None] * np.ones((16, 16, 3), np.uint8)
    seen = []
    monkeypatch.setattr(plots, "save_grid", lambda path, *rest: seen.append(rest))
    plots.extremes_figure(tmp_path / "x.png", poses, images, poses, images, scores, "")
    ((rows, columns, _, captions, _),) = seen
    for row in (rows[1], rows[3]):
        assert [cell[0, 0, 0] for cell in row] == [*order[:n], *order[-n:]]
    assert columns == ["best"] * n + ["worst"] * n and captions[2][-1] == "OKS 0.00"


def test_what_cannot_be_measured_is_one_sentence(pose, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    checkpoint.save(tmp_path / "plain.pt", stage_2(n=12, knows_null=False))
    for flags, words in ((["--size", "20"], "--size is 20"), (["--steps", "101"], "steps is 101"),
                         (["--out", "file/o"], "file/o"),
                         (["--data", "figures:1"], "at least 2"),
                         (["--ckpt", "plain.pt", "--guidance", "2"], "--guidance is 2")):
        capsys.readouterr()
        assert pose(*flags) == 2
        error, = [line for line in capsys.readouterr().err.splitlines() if "evaluate.py:" in line]
        assert words in error
    assert pose("--ckpt", "plain.pt") == 0                      # without null: no guidance
    assert "eta 0, guidance 1" in capsys.readouterr().out
