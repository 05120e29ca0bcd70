"""The pose reader and evaluate.py pose: places in closed form, a perfect detector, what is cached, what is refused."""
import json
import os
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint
import data
import evaluate
import metrics.condition
import metrics.pose
import plots
from dataset.figures import Figures
from formats.pose_files import load_poses
from keypoints import JOINTS, ConditionConfig, PoseCondition, flip, heatmaps
from ldm import DEFAULT_GUIDANCE
from metrics import keypoint_detector
from unet import UNet, UNetConfig
from vq import VQConfig, VQModel

RNG = np.random.default_rng(0)
J = len(JOINTS)


def poses_of(n: int) -> np.ndarray:
    return np.concatenate([RNG.uniform(0.1, 0.9, (n, J, 2)), np.ones((n, J, 1))], axis=2)


def are_equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# ------------------------------------------------------------------------------------------------- the reader

def test_the_place_of_a_gaussian_is_its_centre():
    poses = torch.from_numpy(poses_of(50))
    found = keypoint_detector.peaks(heatmaps(poses, 32, 0.025).clamp(min=1e-12).log())
    assert (found - poses[..., :2]).abs().max() < 0.1 / 32                  # a tenth of a cell


def test_of_two_places_the_likelier_counts_and_not_their_mean():
    pose = torch.tensor([[[0.2, 0.3, 1.0], [0.8, 0.7, 1.0]]])
    one, other = heatmaps(pose, 32, 0.025)[0]
    found = keypoint_detector.peaks((0.6 * one + 0.4 * other).clamp(min=1e-12).log()[None, None])
    assert torch.allclose(found[0, 0], pose[0, 0, :2], atol=0.005)


def test_the_loss_in_closed_form():
    poses = torch.from_numpy(poses_of(3)).float()
    flat = torch.zeros(3, J, 16, 16)
    assert keypoint_detector.reader_loss(flat, poses).item() == pytest.approx(np.log(256))       # any q against 1/256
    wanted = heatmaps(poses, 16, keypoint_detector.READER_SIGMA)
    wanted = wanted / wanted.sum((2, 3), keepdim=True)
    entropy = -(wanted * wanted.clamp(min=1e-30).log()).sum((2, 3)).mean()
    loss = keypoint_detector.reader_loss(wanted.clamp(min=1e-30).log(), poses)
    assert loss.item() == pytest.approx(entropy.item(), rel=1e-4)


@pytest.mark.parametrize("place", [(1.2, 0.5, 1), (0.5, -0.1, 1), (0.5, 0.5, 0)])
def test_joints_that_nobody_can_see_teach_nothing(place):
    poses, logits = torch.from_numpy(poses_of(2)).float(), torch.randn(2, J, 16, 16)
    poses[:, 3:] = 0
    alone = keypoint_detector.reader_loss(logits, poses)
    poses[:, 5] = torch.tensor(place)
    assert keypoint_detector.reader_loss(logits, poses) == alone
    poses[:, :, 2] = 0
    assert keypoint_detector.reader_loss(logits, poses) == 0


def test_a_picture_is_read_alike_in_any_batch():
    reader = keypoint_detector.PoseReader(64).eval()
    images = RNG.integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    together, moments = metrics.pose.read_all(reader, images)
    alone, _ = metrics.pose.read_all(reader, images[3:4])
    np.testing.assert_allclose(together[3], alone[0], atol=1e-5)
    assert moments.n == 5 and together.shape == (5, J, 3) and (together[..., 2] == 1).all()


def test_training_learns():
    pictures = [Figures(4, 64)[i] for i in range(4)]
    x, poses = (torch.from_numpy(np.stack(part)) for part in zip(*pictures, strict=True))
    reader = keypoint_detector.train_reader(Figures(4, 64), steps=25)
    fresh = keypoint_detector.train_reader(Figures(4, 64), steps=0)
    learnt, before = (keypoint_detector.reader_loss(r.train()(data.to_tensor(x.numpy()))[0], poses)
                      for r in (reader, fresh))
    assert learnt < before - 1


def test_training_moves_no_generator_and_repeats_itself():
    pictures = Figures(32, 64)
    torch.manual_seed(5)
    first = keypoint_detector.train_reader(pictures, steps=3)
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.rand(1) == after
    second = keypoint_detector.train_reader(pictures, steps=3)
    assert are_equal(first, second)
    assert not first.training and not any(p.requires_grad for p in first.parameters())


def test_a_share_of_the_pictures_is_degraded_and_keeps_its_colours():
    x = torch.stack([data.to_tensor(Figures(1, 64)[0][0])] * 100)
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(keypoint_detector.degraded(x, 0.0, generator), x)
    y = torch.cat([keypoint_detector.degraded(x, 0.3, generator)[:30] for _ in range(10)]) - x[0]
    assert torch.equal(keypoint_detector.degraded(x, 0.3, generator)[30:], x[30:]) and (y != 0).flatten(1).any(1).all()
    assert (y.mean((0, 2, 3)).abs() < 0.02).all()                           # no colour is favoured
    strength = y.pow(2).mean((1, 2, 3)).sqrt()
    assert 0.05 < strength.min() < 0.12 and 0.17 < strength.max() < 0.4     # stage 1 leaves 0.09 of toy figures


def test_a_picture_and_its_mirror_image_have_mirrored_poses():
    reader = keypoint_detector.PoseReader(64).eval()
    x = torch.rand(3, 3, 64, 64) * 2 - 1
    (pose, _), (mirrored, _) = reader.read(x), reader.read(x.flip(-1))
    np.testing.assert_allclose(flip(mirrored), pose, atol=1e-4)


@pytest.mark.slow
def test_it_learns_to_read_pictures_it_has_not_seen():
    reader = keypoint_detector.train_reader(Figures(4000, 64), steps=150)
    held_out = [Figures(64, 64, seed=1)[i] for i in range(64)]
    read, _ = metrics.pose.read_all(reader, np.stack([image for image, _ in held_out]))
    asked = np.stack([pose for _, pose in held_out])
    assert metrics.pose.fidelity(read, asked)["pck@0.1"] > 0.6
    assert metrics.pose.fidelity(read, asked[metrics.condition.derangement(64, 0)])["pck@0.1"] < 0.3


def test_the_reader_is_cached_beside_the_dataset_and_made_anew_for_other_pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trained = []
    train = keypoint_detector.train_reader
    monkeypatch.setattr(keypoint_detector, "train_reader", lambda *args: trained.append(args[0]) or train(*args))
    few, more = Figures(4, 64), Figures(5, 64)
    reader = keypoint_detector.find_reader("figures:4", few, steps=1)
    again = keypoint_detector.find_reader("figures:4", few, steps=1)
    path, = (tmp_path / "runs").glob("figures-4-pose-reader-64-*.pt")
    assert trained == [few]
    assert are_equal(reader, again)
    assert not again.training
    keypoint_detector.find_reader("figures:4", more, steps=1)                        # the same name, other pictures
    keypoint_detector.find_reader("figures:4", more, steps=2)
    assert trained == [few, more, more] and len(list((tmp_path / "runs").iterdir())) == 2


def test_the_reader_that_ships_reads_any_number_of_figures_and_nothing_else(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(keypoint_detector, "SHIPPED_FIGURES", 6)
    torch.manual_seed(0)
    reader = keypoint_detector.PoseReader(64).eval()
    about = {"version": keypoint_detector.READER_VERSION, "side": 64, "steps": 1,
             "pictures": Figures(6, 64, seed=0).fingerprint()}
    checkpoint.save(tmp_path / "shipped.pt", {"about": about, "reader": {
        name: value.half() if value.is_floating_point() else value for name, value in reader.state_dict().items()}})
    monkeypatch.setattr(keypoint_detector, "SHIPPED_READER", tmp_path / "shipped.pt")
    monkeypatch.setattr(keypoint_detector, "train_reader", lambda pictures, *args: reader)
    found = keypoint_detector.find_reader("figures:3", Figures(3, 64), steps=1)
    assert "shipped.pt, which ships" in capsys.readouterr().out and not (tmp_path / "runs").exists()
    for name, value in reader.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, rtol=1e-3, atol=1e-6)
    for spec, pictures, steps in (("mine", Figures(3, 64), 1), ("figures:3", Figures(3, 32), 1),
                                  ("figures:3", Figures(3, 64), 2)):           # other ones are taught
        keypoint_detector.find_reader(spec, pictures, steps=steps)
        assert "which ships" not in capsys.readouterr().out


def test_whatever_lies_where_the_reader_is_kept_a_good_one_takes_its_place(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pictures = Figures(2, 64)
    reader = keypoint_detector.find_reader("figures:2", pictures, steps=0)
    path, = (tmp_path / "runs").iterdir()
    good = checkpoint.read(path)
    broken = {name: value * float("nan") if value.is_floating_point() else value
              for name, value in good["reader"].items()}
    for found in (torch.zeros(3), {"about": torch.zeros(3), "reader": good["reader"]}, {"about": good["about"]},
                  good | {"reader": [1]}, good | {"reader": broken}, good | {"reader": {"a": "b"}}):
        checkpoint.save(path, found)
        assert are_equal(keypoint_detector.find_reader("figures:2", pictures, steps=0), reader), found
        assert are_equal(keypoint_detector.kept_reader(path, good["about"]), reader)
    path.write_bytes(path.read_bytes()[:500])
    assert keypoint_detector.kept_reader(path, good["about"]) is None
    path.unlink()
    path.mkdir()                                                            # cannot be written: it judges all the same
    capsys.readouterr()
    assert are_equal(keypoint_detector.find_reader("figures:2", pictures, steps=0), reader)
    assert "is not kept" in capsys.readouterr().out
    monkeypatch.setattr(keypoint_detector, "READER_LR", 1e38)
    with pytest.raises(ValueError, match="no numbers any more"):
        keypoint_detector.find_reader("figures:2", pictures, steps=2)


def test_where_the_reader_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/people.json").touch()
    about = {"side": 64, "pictures": "0123456789abcdef"}
    assert str(keypoint_detector.reader_path("mine", about)) == "mine/pose-reader-64-01234567.pt"
    large = keypoint_detector.reader_path("mine/people.json", about | {"side": 128})
    assert str(large) == "mine/people-pose-reader-128-01234567.pt"
    assert str(keypoint_detector.reader_path("figures", about)) == "runs/figures-pose-reader-64-01234567.pt"
    monkeypatch.setattr(os, "access", lambda path, mode: False)             # root may write anywhere
    assert str(keypoint_detector.reader_path("mine", about)) == "runs/mine-pose-reader-64-01234567.pt"


def test_fidelity_by_hand():
    asked = poses_of(4)
    asked[:, 0, :2], asked[:, 1, :2] = (0, 0), (0.6, 0.8)                   # the box's diagonal is 1, at least
    asked[:, 2:, :2] = asked[:, 2:, :2] * 0.5
    read = asked.copy()
    read[0, 4, 0] += 0.09
    read[1, 4, 0] += 0.15
    read[2, 4, 0] += 0.25
    rows = metrics.pose.fidelity(read, asked)
    assert rows["joints"]["ear_right"] == 0.5 and rows["pck@0.1"] == pytest.approx(1 - 0.5 / J)
    assert rows["pck@0.2"] == pytest.approx(1 - 0.25 / J) and 0.9 < rows["oks"] < 1
    asked[3, 0, :2] = read[3, 0, :2] = (-0.6, -0.8)     # outside: does not count itself, but the box is its person's
    read[3, 4, 0] += 0.19
    before = metrics.pose.fidelity(read, asked)
    assert before["joints"]["ear_right"] == 0.5
    read[3, 0, :2] = 0.9
    assert metrics.pose.fidelity(read, asked) == before and before["joints"]["nose"] == 1


# ------------------------------------------------------------------------------------------------ the command

@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a tiny stage 2 in ldm.pt, of 12 figures of 16 pixels."""
    root = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    vq = VQModel(VQConfig(ch=8, n_embed=32, resolution=16, norm_groups=0, zero_init=True)).eval()
    cond = ConditionConfig(("tokens", "maps"), 8)
    unet = UNetConfig(in_channels=3 + cond.map_channels, model_channels=32, num_res_blocks=1, channel_mult=(1, 2),
                      attention_resolutions=(2,), num_heads=4, context_dim=8)
    checkpoint.save(root / "ldm.pt", {
        "format": checkpoint.FORMAT, "stage": "ldm", "step": 3,
        "config": {"size": 16, "data": "figures:12", "val": None},
        "vq": vq.state_dict(), "vq_config": asdict(vq.config), "unet": UNet(unet).state_dict(),
        "unet_config": asdict(unet), "cond": PoseCondition(cond).state_dict(), "cond_config": asdict(cond),
        "mean": torch.zeros(3, 1, 1), "std": torch.ones(3, 1, 1), "knows_null": True,
        "schedule": {"timesteps": 100, "linear_start": 0.0015, "linear_end": 0.0195}})
    return root


@pytest.fixture
def pose(tiny, tmp_path, monkeypatch):
    """Runs evaluate.py pose in an empty folder: pose(flags...) -> exit status."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(keypoint_detector.find_reader, "__defaults__", ("cpu", 1))
    first = ["pose", "--ckpt", str(tiny / "ldm.pt"), "--steps", "2", "--limit", "6"]
    return lambda *flags: evaluate.main([*first, *flags])


def test_pose_end_to_end(pose, tmp_path, capsys):
    assert pose("--out", "o") == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "o/pose.json").read_text())
    rows = report["rows"]
    assert set(rows) == {"samples", "decoded", "real", "shuffled"} and set(rows["real"]["joints"]) == set(JOINTS)
    assert "6 held-out poses of figures:12" in printed and "the ceiling is low" in printed
    assert f"{rows['samples']['pck@0.1']:.3f}" in printed and "wrist right" in printed
    assert rows["samples"]["frechet"] > 0 and "frechet" not in rows["real"]
    assert report["pictures"] == 6 and report["guidance"] == DEFAULT_GUIDANCE
    assert len(list((tmp_path / "o/pictures").glob("*.png"))) == 12 and (tmp_path / "o/pose.png").stat().st_size > 1000


def test_a_perfect_detector_has_a_perfect_score(pose, tmp_path, capsys):
    assert pose("--out", "o") == 0
    own = json.loads((tmp_path / "o/pose.json").read_text())["rows"]
    capsys.readouterr()
    assert pose("--out", "o", "--detected", "o/poses.json") == 0            # what was asked for, as COCO annotations
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / "o/pose.json").read_text())["rows"]
    for name in ("samples", "real"):
        assert rows[name]["pck@0.1"] == 1 and rows[name]["oks"] == pytest.approx(1)
    assert 0 < rows["shuffled"]["pck@0.1"] < 0.6 and own["samples"]["pck@0.1"] < 0.6
    assert "1.00 of the ceiling 1.000" in printed and "the ceiling is low" not in printed


def openpose(annotation: dict) -> dict:
    """A COCO annotation of ours as a person of OpenPose's 18 joints."""
    joints, flat = np.array(annotation["keypoints"]).reshape(17, 3), np.zeros((18, 3))
    for ours, theirs in enumerate([0, 15, 14, 17, 16, 5, 2, 6, 3, 7, 4, 11, 8, 12, 9, 13, 10]):
        flat[theirs] = [*joints[ours, :2], 0.9]
    return {"pose_keypoints_2d": flat.ravel().tolist()}


def test_a_folder_of_files_and_pictures_in_which_nobody_was_found(pose, tmp_path, capsys):
    assert pose("--out", "o") == 0
    found = tmp_path / "nobody"                                             # a word in messages, too
    found.mkdir()
    asked = json.loads((tmp_path / "o/poses.json").read_text())["annotations"]

    def score() -> float:
        capsys.readouterr()
        assert pose("--out", "o", "--detected", "nobody") == 0
        assert "there is no ceiling" in capsys.readouterr().out
        rows = json.loads((tmp_path / "o/pose.json").read_text())["rows"]
        assert set(rows) == {"samples", "shuffled"}
        return rows["samples"]["pck@0.1"]

    for i in (2, 1, 0):                                                     # of 6 samples, and of no real picture
        (found / f"{i:06d}_keypoints.json").write_text(json.dumps({"people": [openpose(asked[i])]}))
        if i == 2:
            assert score() == pytest.approx(1 / 6, abs=0.03)                # a single file is a folder all the same
    (found / "000003_keypoints.json").write_text(json.dumps({"version": 1.1, "people": []}))
    (found / "000004.json").write_text("[]")                                # what detectors leave where nobody is
    assert score() == pytest.approx(0.5, abs=0.05)
    flat = np.array(asked[5]["keypoints"]).reshape(17, 3) / [16, 16, 1]
    (found / "000005.txt").write_text("0 0.5 0.5 1 1 " + " ".join(f"{v:.6f}" for v in flat.ravel()) + "\n")     # YOLO
    assert score() == pytest.approx(4 / 6, abs=0.06)
    (found / "000001_keypoints.json").write_text("{}")                      # no pose file is no picture without people
    assert pose("--out", "o", "--detected", "nobody") == 2


def test_frames_that_a_file_only_counts_are_the_pictures_in_order(pose, tmp_path, capsys):
    assert pose("--out", "o") == 0
    asked = json.loads((tmp_path / "o/poses.json").read_text())["annotations"]
    frames = [{"people": [openpose(person)], "canvas_width": 16, "canvas_height": 16} for person in asked]
    frames[2]["people"] = []
    (tmp_path / "comfy.json").write_text(json.dumps(frames))
    assert pose("--out", "o", "--detected", "comfy.json") == 0
    rows = json.loads((tmp_path / "o/pose.json").read_text())["rows"]
    assert rows["samples"]["pck@0.1"] == pytest.approx(5 / 6, abs=0.03) and rows["real"]["pck@0.1"] == 1
    body = np.array([person["keypoints"] for person in asked]).reshape(-1, 17, 3)[..., :2].tolist()
    frames = [{"frame_id": i, "instances": [{"keypoints": body[i], "keypoint_scores": [1] * 17}] if i else []}
              for i in range(12)]
    (tmp_path / "mmpose.json").write_text(json.dumps(frames))               # from 0, and nobody is seen in frame 0
    assert pose("--out", "o", "--detected", "mmpose.json") == 0
    rows = json.loads((tmp_path / "o/pose.json").read_text())["rows"]
    assert rows["samples"]["pck@0.1"] == pytest.approx(5 / 6, abs=0.03) and rows["real"]["pck@0.1"] == 1
    (tmp_path / "one.json").write_text(json.dumps(frames[1:2]))
    capsys.readouterr()
    assert pose("--out", "o", "--detected", "one.json") == 2
    assert "it does not say which" in capsys.readouterr().err


BODY = {"keypoints": [[3.0 + j, 12.0 - j / 2] for j in range(len(JOINTS))], "keypoint_scores": [0.9] * len(JOINTS)}


@pytest.mark.parametrize("ids, empty, numbers", [
    (range(1, 7), [], [0, 1, 2, 3, 4, 5]), (range(6), [], [0, 1, 2, 3, 4, 5]),
    (range(6), [0], [1, 2, 3, 4, 5]), (range(1, 7), [1, 2, 6], [2, 3, 4]),                  # nobody, but it is listed
    (["f000", "f001", "f002"], ["f000"], [1, 2]), ([2, 3, 6], [], [1, 2, 5]), (["f1", "f3"], [], [0, 2]),
    (range(1, 6), [], "1 to 5, which may be counted from 0 or from 1"), ([2, 4], [], "2 to 4"),     # not listed: which?
    (["fa", "fb"], [], "the frame 'fa' has no number"), ([1, "fb"], ["fb"], "the frame 'fb' has no number"),
    ([4], [], "of one picture, and it does not say which"),
])
@pytest.mark.parametrize("bare", [False, True])
def test_frames_count_from_one_or_from_nought(tmp_path, ids, empty, numbers, bare):
    frames = [{"frame_id": i, "instances": [] if i in empty else [BODY]} for i in ids]
    (tmp_path / "m.json").write_text(json.dumps(frames if bare else {"instance_info": frames}))
    poses = load_poses(tmp_path / "m.json", canvas=(16, 16))
    if isinstance(numbers, list):
        assert evaluate.picture_numbers("m.json", poses, 3) == numbers
    else:
        with pytest.raises(ValueError, match=f"--detected m.json: .*{numbers}.*; give a folder"):
            evaluate.picture_numbers("m.json", poses, 3)


def test_frames_that_we_count_and_names_of_pictures(tmp_path):
    tfjs = [[], [], BODY["keypoints"], [], BODY["keypoints"], []]
    tfjs = [[{"name": name, "x": x, "y": y} for name, (x, y) in zip(JOINTS, body, strict=False)] for body in tfjs]
    names = [{"image_id": f"{'long/' * 20}{i:06d}.png", "keypoints": [5, 5, 1] * 17, "score": 1} for i in (7, 2)]
    for content, numbers in ((tfjs, [2, 4]), (names, [7, 2])):
        (tmp_path / "p.json").write_text(json.dumps(content))
        assert evaluate.picture_numbers("p.json", load_poses(tmp_path / "p.json", canvas=(16, 16)), 5) == numbers


def test_each_picture_has_a_seed_of_its_own_and_what_is_read_back_is_what_was_drawn(pose, tiny, tmp_path, monkeypatch):
    draw, given, drawn = evaluate.sample.draw_pictures, [], []
    monkeypatch.setattr(evaluate.sample, "draw_pictures", lambda *a, **k: given.append(a[2]) or draw(*a, **k))
    write = evaluate.write_pictures
    monkeypatch.setattr(evaluate, "write_pictures", lambda out, what: drawn.append(what) or write(out, what))
    assert pose("--out", "o", "--seed", "7") == 0
    assert given == [[7, 8, 9, 10, 11, 12]]
    back = evaluate.read_pictures(tmp_path / "o", json.loads((tmp_path / "o/poses.json").read_text())["info"])
    assert np.allclose(back.asked, drawn[0].asked) and set(back.asked[..., 2].ravel()) <= {0.0, 1.0}
    assert np.array_equal(back.samples, drawn[0].samples) and np.array_equal(back.real, drawn[0].real)


def test_the_picture_shows_the_best_first_and_the_worst_last(tmp_path, monkeypatch):
    asked, n = poses_of(1).repeat(12, axis=0), plots.EXTREMES
    read = asked.copy()
    order = RNG.permutation(12)                             # order[0] is read best
    for rank, i in enumerate(order):
        read[i, :, 0] += 0.02 * rank
    pictures = np.arange(12, dtype=np.uint8)[:, None, None, None] * np.ones((1, 16, 16, 3), np.uint8)
    seen = []
    monkeypatch.setattr(plots, "save_grid", lambda path, rows, columns, *_: seen.append((rows, columns)))
    plots.extremes_figure(tmp_path / "x.png", metrics.pose.Drawn(asked, pictures, pictures, {}), read, "")
    (rows, columns), = seen
    assert [cell[0, 0, 0] for cell in rows[1]] == [*order[:n], *order[-n:]] and columns == ["best"] * n + ["worst"] * n
    assert [cell[0, 0, 0] for cell in rows[3]] == [*order[:n], *order[-n:]]


def test_pictures_that_an_interrupted_run_left_are_not_taken_for_another_runs(pose, tmp_path, capsys, monkeypatch):
    assert pose("--out", "o") == 0
    asked = (tmp_path / "o/poses.json").read_text()
    changed = json.loads(asked)
    for info in ([1], "words", None, {}, changed["info"] | {"more": 1}):
        (tmp_path / "o/poses.json").write_text(json.dumps(changed | {"info": info}))
        capsys.readouterr()
        assert pose("--out", "o", "--detected", "o/poses.json") == 2
        assert "without --detected first" in capsys.readouterr().err
    assert pose("--out", "o", "--limit", "4") == 0
    assert len(list((tmp_path / "o/pictures").iterdir())) == 8              # not the twelve of before
    save = Image.Image.save

    def fails(self, path, *args, **how):
        if str(path).endswith("000002.png"):
            raise KeyboardInterrupt
        save(self, path, *args, **how)

    with monkeypatch.context() as m:
        m.setattr(Image.Image, "save", fails)
        pose("--out", "o", "--limit", "4", "--seed", "1")
    assert pose("--out", "o", "--limit", "4", "--detected", "o/poses.json") == 2
    assert "interrupted" in capsys.readouterr().err
    assert pose("--out", "o", "--limit", "4", "--seed", "1") == 0          # its place is ours to use again


@pytest.mark.parametrize("name, words", [("poses.json", "{}"), ("poses.json", "no json"), ("pictures/000500.png", "")])
def test_pictures_and_poses_of_somebody_else_are_left_alone(pose, tmp_path, capsys, monkeypatch, name, words):
    (tmp_path / "o/pictures").mkdir(parents=True)
    (tmp_path / "o" / name).write_text(words)
    monkeypatch.setattr(evaluate, "draw_held_out", None)                    # not even asked for
    assert pose("--out", "o") == 2
    said = capsys.readouterr().err
    assert f"o/{name}" in said and "--out" in said and said.count("\n") == 1
    assert (tmp_path / "o" / name).read_text() == words


@pytest.mark.parametrize("flags, words", [
    (["--guidance", "nan"], ["--guidance is nan"]), (["--eta", "2"], ["--eta 2"]), (["--steps", "0"], ["--steps 0"]),
    (["--seed", "-1"], ["--seed -1"]), (["--size", "12"], ["--size is 12"]), (["--detected", "x.json"], ["--out"]),
    (["--detected", "x.json", "--out", "o"], ["without --detected first"]), (["--data", "nowhere"], ["nowhere"]),
    (["--data", "figures:1"], ["fewer than 2"]),
])
def test_a_mistake_is_one_sentence(pose, capsys, flags, words):
    assert pose(*flags) == 2
    lines = capsys.readouterr().err.strip().replace("\r", "\n").splitlines()
    error = [line for line in lines if "evaluate.py:" in line]
    assert len(error) == 1 and all(word in error[0] for word in words), error


@pytest.mark.parametrize("out", ["file", "file/o", "o"])
def test_out_where_a_file_lies_is_one_sentence(pose, tmp_path, capsys, out):
    for file in ("file", "o/pictures"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("mine")
    assert pose("--out", out) == 2
    file = "o/pictures" if out == "o" else "file"
    assert f"evaluate.py: --out {out}: {file} is a file; name another folder\n" in capsys.readouterr().err


def test_what_was_detected_elsewhere_is_refused(pose, tmp_path, capsys):
    assert pose("--out", "o") == 0
    (tmp_path / "empty").mkdir()
    data_ = json.loads((tmp_path / "o/poses.json").read_text())
    for i, image in enumerate(data_["images"]):
        image["file_name"] = f"photo{i + 1000}.png"
    (tmp_path / "other.json").write_text(json.dumps(data_))
    for flags, words in ((["--detected", "empty"], "no .json"), (["--detected", "other.json"], "none of its pictures"),
                         (["--detected", "none.json"], "none.json"),
                         (["--detected", "o/poses.json", "--seed", "1"], "seed = 0")):
        capsys.readouterr()
        assert pose("--out", "o", *flags) == 2
        assert words in capsys.readouterr().err


def test_a_model_without_null_is_not_guided(pose, tiny, tmp_path, capsys):
    payload = checkpoint.load(tiny / "ldm.pt", "ldm")
    checkpoint.save(tmp_path / "deaf.pt", payload | {"knows_null": False})
    assert pose("--ckpt", "deaf.pt", "--guidance", "2") == 2
    assert "trained without dropping poses" in capsys.readouterr().err
    assert pose("--ckpt", "deaf.pt") == 0
    assert "eta 0, guidance 1" in capsys.readouterr().out
