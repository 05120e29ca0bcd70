"""keypoints.py against brute force, symmetry and files."""
import json

import numpy as np
import pytest
import torch

import keypoints as K
import metrics.pose
from formats import pose_files
from keypoints import JOINTS, PoseError

RNG = np.random.default_rng(0)


def random_pose(missing: int = 0) -> np.ndarray:
    pose = np.column_stack([RNG.uniform(0.1, 0.9, (17, 2)), np.ones(17)])
    pose[RNG.permutation(17)[:missing]] = 0
    return pose


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


# ------------------------------------------------------------------------------------------------------ files

def test_the_seed_file_is_row_col_on_512(tmp_path):
    joints = {name: [10.0 * j, 512.0 - j] for j, name in enumerate(JOINTS)}            # [row, col]
    pose = pose_files.read_seed(write(tmp_path / "p.json", joints))
    assert pose[3, 0] * 512 == 512 - 3 and pose[3, 1] * 512 == 30                       # x is the column
    assert (pose[:, 2] == 1).all()


def test_joints_outside_the_canvas_are_kept(tmp_path):
    joints = {name: [533.2, -4.0] for name in JOINTS}
    pose = pose_files.load_poses(write(tmp_path / "p.json", joints)).poses[0]
    assert pose[0, 1] == 533.2 / 512 and pose[0, 0] == -4 / 512


def test_coco_takes_pixels_and_skips_crowds_and_empty_persons(tmp_path):
    flat = [c for j in range(17) for c in (10.0 + j, 20.0 + j, 2)]
    flat[3:6] = [77, 88, 0]                                                             # filler on a missing joint
    data = {"images": [{"id": 5, "file_name": "a.png", "width": 100, "height": 200}],
            "annotations": [{"image_id": 5, "keypoints": flat, "num_keypoints": 16},
                            {"image_id": 5, "keypoints": flat, "num_keypoints": 16, "iscrowd": 1},
                            {"image_id": 5, "keypoints": [0] * 51, "num_keypoints": 0}]}
    found, refused = pose_files.read_coco(write(tmp_path / "c.json", data))
    poses = found["a.png"]
    assert len(poses) == 1 and not refused
    np.testing.assert_allclose(poses[0][4], [14 / 100, 24 / 200, 1])
    assert (poses[0][1] == 0).all()


def test_our_own_layouts(tmp_path):
    pose = random_pose(missing=3)
    named = {name: [float(x), float(y), int(v)] for name, (x, y, v) in zip(JOINTS, pose, strict=True)}
    np.testing.assert_array_equal(pose_files.load_poses(write(tmp_path / "a.json", named)).poses[0], pose)
    np.testing.assert_array_equal(pose_files.load_poses(write(tmp_path / "b.json", pose.tolist())).poses[0], pose)


@pytest.mark.parametrize("content, word", [
    ("{not json", "valid JSON"), ("[]", "nobody was found"), ('{"nose": [1, 2]}', "eye_left"),
    (json.dumps({n: [1, 2] for n in JOINTS} | {"nose": [1, "a"]}), "nose"),
    ('{"nose": [NaN, 2], ' + json.dumps({n: [1, 2] for n in JOINTS[1:]})[1:], "NaN"),
    (json.dumps({n: [1, 2] for n in JOINTS} | {"nose": [1, 2, 1]}), "3 numbers are needed"),
    (json.dumps({"images": [], "annotations": [{"keypoints": [0] * 51, "image_id": 1}]}), "not among the images"),
    (json.dumps({"images": [{"id": 1, "file_name": "a", "width": 0, "height": 5}], "annotations": []}), "positive"),
])
def test_a_bad_file_is_one_sentence_that_names_it(tmp_path, content, word):
    path = write(tmp_path / "bad.json", content)
    with pytest.raises(PoseError) as e:
        pose_files.load_poses(path)
    assert "bad.json" in str(e.value) and word in str(e.value) and "\n" not in str(e.value)


# ------------------------------------------------------------------------------------- geometry and drawing

def test_mirror_swaps_the_sides_and_is_its_own_inverse():
    assert [JOINTS[j] for j in K.MIRROR][5:7] == ["shoulder_right", "shoulder_left"]
    pose = random_pose(missing=4)
    np.testing.assert_allclose(K.flip(K.flip(pose)), pose, atol=1e-15)
    assert K.flip(pose)[5, 0] == pytest.approx((1 - pose[6, 0]) * pose[6, 2])
    assert (K.flip(pose)[K.flip(pose)[:, 2] == 0] == 0).all()
    np.testing.assert_array_equal(K.flip(torch.from_numpy(pose)).numpy(), K.flip(pose))


def test_flip_of_the_drawing_is_the_drawing_of_the_flip():
    for size in (64, 65, 200):
        pose = random_pose(missing=2)
        mirrored_colors = K.side_colors()[K.MIRROR]     # a mirror turns the left arm's picture, not its colour
        mirrored = K.draw(pose, size)[:, ::-1].astype(int)
        assert np.abs(mirrored - K.draw(K.flip(pose), size, colors=mirrored_colors)).max() <= 1     # rounding of x.5
        assert np.abs(mirrored - K.draw(K.flip(pose), size)).max() > 50                             # sides do differ


def test_drawing_puts_each_joint_where_it_is():
    for j in range(17):
        pose = np.zeros((17, 3))
        pose[j] = 0.25, 0.75, 1
        lit = (K.draw(pose, 64).astype(int) - K.draw(np.zeros((17, 3)), 64)).any(-1)
        rows, cols = np.nonzero(lit)
        assert abs(cols.mean() + 0.5 - 16) < 0.5 and abs(rows.mean() + 0.5 - 48) < 0.5


def test_drawing_far_outside_is_harmless():
    pose = random_pose()
    pose[:, :2] += 50
    np.testing.assert_array_equal(K.draw(pose, 32), K.draw(np.zeros((17, 3)), 32))


def test_crop_maps_the_box_to_the_unit_square():
    pose = random_pose(missing=1)
    out = K.crop(pose, (0.2, 0.1, 0.7, 0.5))
    seen = pose[:, 2] > 0
    np.testing.assert_allclose(out[seen, 0] * 0.5 + 0.2, pose[seen, 0])
    np.testing.assert_allclose(out[seen, 1] * 0.4 + 0.1, pose[seen, 1])
    assert (out[~seen] == 0).all()


# ---------------------------------------------------------------------------------------------------- tokens

def seed_token(x: float, y: float, dim: int) -> int:
    """The seed's own arithmetic, as its blog post gives it."""
    if dim != 512:
        x, y = x // (512 / dim), y // (512 / dim)
    x, y = min(max(x, 0), dim - 1), min(max(y, 0), dim - 1)
    return int(round(x)) + int(round(y) * dim)


@pytest.mark.parametrize("dim", [16, 32, 512])
def test_tokens_equal_the_seeds_arithmetic(dim):
    xy = np.concatenate([RNG.uniform(-40, 560, (400, 2)), RNG.integers(0, 513, (400, 2)),
                         [[175.99999999999997, 0.5], [511.5, 1.5], [512, 512]]])
    poses = np.column_stack([xy / 512, np.ones(len(xy))])
    assert K.tokenize(poses, dim).tolist() == [seed_token(x, y, dim) for x, y in xy]


def test_the_faithful_context_takes_the_row_for_x(tmp_path):
    joints = {name: list(RNG.uniform(-20, 540, 2)) for name in JOINTS}
    pose = pose_files.read_seed(write(tmp_path / "p.json", joints))
    context = K.seed_context(pose[None], 32)
    assert context.shape == (1, 1, 17) and context.dtype == torch.float32
    assert context[0, 0].tolist() == [seed_token(*joints[name], 32) for name in JOINTS]


@pytest.mark.parametrize("dim", [16, 32, 512])
def test_tokenize_inverts_detokenize_for_every_cell(dim):
    ids = torch.arange(dim * dim)
    centres = K.detokenize(ids, dim)
    assert torch.equal(K.tokenize(torch.cat([centres, torch.ones(len(ids), 1)], -1), dim), ids)
    if dim != 512:
        assert centres[0].tolist() == [0.5 / dim, 0.5 / dim]


# ----------------------------------------------------------------------------------------------- the two doors

def test_heatmaps_are_the_gaussian_at_the_cell_centres():
    pose = torch.from_numpy(random_pose(missing=2)).float()[None]
    maps = K.heatmaps(pose, (6, 8), sigma=0.1)
    for j in range(17):
        for row in range(6):
            for col in range(8):
                x, y, v = pose[0, j].tolist()
                d2 = ((col + 0.5) / 8 - x) ** 2 + ((row + 0.5) / 6 - y) ** 2
                assert maps[0, j, row, col].item() == pytest.approx(v * np.exp(-d2 / 0.02), abs=1e-5)


def test_pose_encoder_reads_place_joint_missing_and_null():
    torch.manual_seed(0)
    encoder = K.PoseEncoder(32)
    pose = torch.from_numpy(random_pose()).float()[None]
    tokens = encoder(pose)
    assert tokens.shape == (1, 17, 32)
    moved = pose.clone()
    moved[0, 9, 0] += 0.05
    changed = (encoder(moved) != tokens).any(-1)[0]
    assert changed.tolist() == [j == 9 for j in range(17)]                              # one token a joint
    gone = pose.clone()
    gone[0, 9] = 0
    torch.testing.assert_close(encoder(gone)[0, 9], encoder.joint[9] + encoder.missing)
    dropped = encoder(pose.repeat(2, 1, 1), torch.tensor([True, False]))
    assert torch.equal(dropped[0], encoder.null) and torch.equal(dropped[1], tokens[0])


@pytest.mark.parametrize("doors", [("tokens",), ("maps",), ("tokens", "maps"), ("seed",)])
def test_both_doors_see_the_pose_and_forget_it_when_dropped(doors):
    condition = K.PoseCondition(K.ConditionConfig(doors, dim=32))
    a, b = (torch.from_numpy(random_pose()).float()[None] for _ in range(2))
    drop = torch.tensor([True])
    for x, y, x0, y0 in zip(condition(a, (8, 8)), condition(b, (8, 8)), condition(a, (8, 8), drop),
                            condition(b, (8, 8), drop), strict=True):
        if x is not None:
            assert not torch.equal(x, y) and torch.equal(x0, y0)
    c = condition.config
    context, maps = condition(a, (8, 8))
    assert (context is None) == (c.context_dim is None) and (maps is None) == (c.map_channels == 0)
    assert context is None or context.shape[-1] == c.context_dim


@pytest.mark.parametrize("doors", [(), ("smoke",), ("seed", "maps")])
def test_a_condition_that_reaches_nothing_is_refused(doors):
    with pytest.raises(ValueError, match="the pose would reach nothing"):
        K.ConditionConfig(doors)


@pytest.mark.parametrize("wrong", [{"sigma": 0.0}, {"dim": 0}, {"seed_dim": 0}])
def test_a_condition_without_a_size_is_refused(wrong):
    with pytest.raises(ValueError, match=f"{list(wrong)[0]} .*0"):
        K.ConditionConfig(**wrong)
    assert K.ConditionConfig(["seed"]) == K.ConditionConfig(("seed",))                  # as JSON gives it


def test_tokens_tell_the_left_of_a_picture_from_the_right_however_far_out():
    pose = torch.ones(1, 17, 3)
    pose[..., :2] = 0.5
    far = [pose.clone() for _ in range(2)]
    far[0][..., 0], far[1][..., 0] = -0.4, 1.6                                          # two apart: a whole period
    encoder = K.PoseEncoder(8)
    assert (encoder(far[0]) - encoder(far[1])).abs().max() > 0.05


# ---------------------------------------------------------------------------------------------------- measures

def test_pck_and_oks_against_hand_counts():
    true = np.zeros((1, 17, 3))
    true[0, [5, 16]] = [[0.0, 0.0, 1], [0.3, 0.4, 1]]                                   # box diagonal 0.5, area 0.12
    near = true.copy()
    near[0, 5, 0] = 0.049
    far = true.copy()
    far[0, 5, 0] = 0.051
    assert metrics.pose.pck(near, true)[[5, 16]].tolist() == [1, 1]
    assert metrics.pose.pck(far, true)[[5, 16]].tolist() == [0, 1]
    assert np.isnan(metrics.pose.pck(near, true)[0])
    unseen = true.copy()
    unseen[0, 5] = 0
    assert metrics.pose.pck(unseen, true)[5] == 0
    k = 2 * 0.079                                                                       # shoulder
    assert metrics.pose.oks(near, true)[0] == pytest.approx((1 + np.exp(-0.049 ** 2 / (2 * 0.12 * k * k))) / 2)
    assert metrics.pose.oks(true, true)[0] == 1 and metrics.pose.oks(unseen, true)[0] == 0.5
    lone = np.zeros((1, 17, 3))
    lone[0, 5] = 0.5, 0.5, 1                                                            # a joint alone has no size
    off = lone + [1e-6, 0, 0]
    assert np.isnan(metrics.pose.oks(off, lone)[0]) and np.isnan(metrics.pose.pck(off, lone)).all()
    both = metrics.pose.pck(np.concatenate([near, off]), np.concatenate([true, lone]))
    assert both[[5, 16]].tolist() == [1, 1]
