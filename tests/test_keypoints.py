"""keypoints.py against brute force, symmetry and the seed's arithmetic."""
import numpy as np
import pytest
import torch

import keypoints as K
import metrics.pose
from keypoints import JOINTS

RNG = np.random.default_rng(0)


def random_pose(missing: int = 0) -> np.ndarray:
    pose = np.column_stack([RNG.uniform(0.1, 0.9, (17, 2)), np.ones(17)])
    pose[RNG.permutation(17)[:missing]] = 0
    return pose


# ----------------------------------------------------------------------------- geometry and drawing

def test_mirror_swaps_the_sides_and_is_its_own_inverse():
    for j, name in enumerate(JOINTS):
        side, other = ("left", "right") if name.endswith("left") else ("right", "left")
        assert JOINTS[K.MIRROR[j]] == name.replace(side, other)
    pose = random_pose(missing=4)
    np.testing.assert_allclose(K.flip(K.flip(pose)), pose, atol=1e-15)
    assert K.flip(pose)[5, 0] == pytest.approx((1 - pose[6, 0]) * pose[6, 2])
    assert (K.flip(pose)[K.flip(pose)[:, 2] == 0] == 0).all()
    np.testing.assert_array_equal(K.flip(torch.from_numpy(pose)).numpy(), K.flip(pose))


@pytest.mark.parametrize("size", [64, 65, 200])
def test_flip_of_the_drawing_is_the_drawing_of_the_flip(size, monkeypatch):
    pose = random_pose(missing=2)
    mirrored = K.draw(pose, size)[:, ::-1].astype(int)
    assert np.abs(mirrored - K.draw(K.flip(pose), size)).max() > 50             # sides do differ
    monkeypatch.setattr(K, "COLORS", K.COLORS[K.MIRROR])        # a mirror keeps an arm's colour
    assert np.abs(mirrored - K.draw(K.flip(pose), size)).max() <= 1             # rounding of x.5


def test_drawing_puts_each_joint_where_it_is():
    for j in range(17):
        pose = np.zeros((17, 3))
        pose[j] = 0.25, 0.75, 1
        lit = (K.draw(pose, 64).astype(int) - K.draw(np.zeros((17, 3)), 64)).any(-1)
        rows, cols = np.nonzero(lit)
        assert abs(cols.mean() + 0.5 - 16) < 0.5 and abs(rows.mean() + 0.5 - 48) < 0.5


def test_a_hidden_joint_keeps_its_place_and_is_drawn_hollow():
    pose = random_pose(missing=2)
    hidden = pose * [1, 1, K.HIDDEN]
    for move in (K.flip, lambda p: K.crop(p, (0.2, 0.1, 0.7, 0.5))):
        np.testing.assert_array_equal(move(hidden), move(pose) * [1, 1, K.HIDDEN])
    np.testing.assert_array_equal(K.on_canvas(hidden), K.on_canvas(pose))
    one = np.zeros((17, 3))
    one[5] = 0.5, 0.5, K.HIDDEN
    ring = (K.draw(one, 201).astype(int) - K.draw(np.zeros((17, 3)), 201)).any(-1)
    assert not ring[100, 100] and ring[100, 97] and ring[100, 103]


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


def test_fit_keeps_shapes_undistorted_by_hand():
    """A square of 100 pixels in an image of 400 x 200 is square after either fit, at this place."""
    pose = np.zeros((17, 3))
    corners = ((250, 50), (350, 50), (250, 150), (350, 150))
    pose[[5, 6, 11, 12]] = [(x / 400, y / 200, 1) for x, y in corners]
    letterbox, cut = K.fit(pose, (400, 200), "letterbox"), K.fit(pose, (400, 200), "crop")
    bars, left = 100, 200       # letterbox adds bars, crop begins at x 200
    np.testing.assert_allclose(letterbox[[5, 12], :2] * 400, [[250, 50 + bars], [350, 150 + bars]])
    np.testing.assert_allclose(cut[[5, 12], :2] * 200, [[250 - left, 50], [350 - left, 150]])
    tall = K.fit(pose[:, [1, 0, 2]], (200, 400), "letterbox")
    np.testing.assert_allclose(tall[[5, 12], :2], letterbox[[5, 12]][:, [1, 0]])
    for fitted in (letterbox, cut, tall):
        width, height = np.ptp(fitted[[5, 6, 11, 12], :2], axis=0)
        assert width == pytest.approx(height)
        assert (fitted[0] == 0).all() and fitted[:, 2].sum() == 4


def test_crop_stays_in_the_image_and_squares_stay_as_they_are():
    pose = np.zeros((17, 3))
    pose[0] = 0.99, 0.5, 1                                                  # near the right edge
    assert K.fit(pose, (400, 200), "crop")[0, 0] == pytest.approx((396 - 200) / 200)
    pose = np.column_stack([RNG.uniform(-0.2, 1.2, (17, 2)), np.ones(17)])
    for how in ("letterbox", "crop"):
        np.testing.assert_array_equal(K.fit(pose, (512, 512), how), pose)   # exactly: seed's tokens


# ------------------------------------------------------------------------------------------- tokens

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


def test_the_seeds_context_takes_the_row_for_x():
    xy = RNG.uniform(-20, 540, (17, 2))
    context = K.seed_context(np.column_stack([xy / 512, np.ones(17)])[None], 32)
    assert context.shape == (1, 1, 17) and context.dtype == torch.float32
    assert context[0, 0].tolist() == [seed_token(row, col, 32) for col, row in xy]


@pytest.mark.parametrize("dim", [16, 32, 512])
def test_the_centre_of_every_cell_has_its_number(dim):
    """At 512 a cell is a whole pixel."""
    ids = torch.arange(dim * dim)
    cell = torch.stack([ids % dim, ids // dim, torch.ones_like(ids)], dim=-1).double()
    poses = torch.cat([(cell[:, :2] + (0.5 if dim < 512 else 0)) / dim, cell[:, 2:]], dim=-1)
    assert torch.equal(K.tokenize(poses, dim), ids)


# ------------------------------------------------------------------------------------- conditioning

def test_heatmaps_are_the_gaussian_at_the_cell_centres():
    pose = torch.from_numpy(random_pose(missing=2)).float()[None]
    pose[0, 9] = torch.tensor([0.3, 0.6, 1])
    maps = K.heatmaps(pose, (6, 8), sigma=0.1)
    for j in range(17):
        for row in range(6):
            for col in range(8):
                x, y, v = pose[0, j].tolist()
                d2 = ((col + 0.5) / 8 - x) ** 2 + ((row + 0.5) / 6 - y) ** 2
                expected = v * np.exp(-d2 / (2 * 0.1 ** 2))
                assert maps[0, j, row, col].item() == pytest.approx(expected, abs=1e-5)
    pose[0, 9, 2] = K.HIDDEN
    assert torch.equal(K.heatmaps(pose, (6, 8), sigma=0.1), maps)
    maps[0, 9] *= -1
    assert torch.equal(K.heatmaps(pose, (6, 8), sigma=0.1, hidden=True), maps)


def test_pose_encoder_reads_place_joint_missing_and_null():
    torch.manual_seed(0)
    encoder = K.PoseEncoder(32)
    pose = torch.from_numpy(random_pose()).float()[None]
    tokens = encoder(pose)
    assert tokens.shape == (1, 17, 32)
    moved = pose.clone()
    moved[0, 9, 0] += 0.05
    changed = (encoder(moved) != tokens).any(-1)[0]
    assert changed.tolist() == [j == 9 for j in range(17)]                  # one token per joint
    gone = pose.clone()
    gone[0, 9] = 0
    torch.testing.assert_close(encoder(gone)[0, 9], encoder.joint[9] + encoder.missing)
    covered = K.PoseEncoder(32, hidden=True)
    covered.load_state_dict(encoder.state_dict(), strict=False)
    gone[0, 9] = pose[0, 9]
    gone[0, 9, 2] = K.HIDDEN
    assert torch.equal(encoder(gone), tokens) and torch.equal(covered(pose), tokens)
    torch.testing.assert_close(covered(gone)[0, 9] - tokens[0, 9], covered.hidden)
    dropped = encoder(pose.repeat(2, 1, 1), torch.tensor([True, False]))
    assert torch.equal(dropped[0], encoder.null) and torch.equal(dropped[1], tokens[0])


@pytest.mark.parametrize("conditioning", [("tokens",), ("maps",), ("tokens", "maps"), ("seed",)])
def test_each_conditioning_depends_on_the_pose_unless_it_is_dropped(conditioning):
    condition = K.PoseCondition(K.ConditionConfig(conditioning, dim=32))
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


@pytest.mark.parametrize("wrong", [(), ("smoke",), ("seed", "maps")])
def test_a_wrong_condition_is_refused_with_its_value(wrong):
    with pytest.raises(ValueError) as e:
        K.ConditionConfig(wrong)
    assert str(wrong) in str(e.value)
    assert K.ConditionConfig(["seed"]) == K.ConditionConfig(("seed",))      # as JSON gives it


def test_tokens_tell_left_from_right_however_far_outside():
    pose = torch.ones(1, 17, 3)
    pose[..., :2] = 0.5
    far = [pose.clone() for _ in range(2)]
    far[0][..., 0], far[1][..., 0] = -0.4, 1.6                  # 2 apart: a whole period
    encoder = K.PoseEncoder(8)
    assert (encoder(far[0]) - encoder(far[1])).abs().max() > 0.05


# ----------------------------------------------------------------------------------------- measures

def test_pck_and_oks_against_hand_counts():
    true = np.zeros((1, 17, 3))
    true[0, [5, 16]] = [[0.0, 0.0, 1], [0.3, 0.4, 1]]           # diagonal 0.5, area 0.12
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
    shoulder = np.exp(-0.049 ** 2 / (2 * 0.12 * (2 * 0.079) ** 2))
    assert metrics.pose.oks(near, true)[0] == pytest.approx((1 + shoulder) / 2)
    assert metrics.pose.oks(true, true)[0] == 1 and metrics.pose.oks(unseen, true)[0] == 0.5
    lone = np.zeros((1, 17, 3))
    lone[0, 5] = 0.5, 0.5, 1                                                # one joint has no size
    off = lone + [1e-6, 0, 0]
    assert np.isnan(metrics.pose.oks(off, lone)[0]) and np.isnan(metrics.pose.pck(off, lone)).all()
    both = metrics.pose.pck(np.concatenate([near, off]), np.concatenate([true, lone]))
    assert both[[5, 16]].tolist() == [1, 1]
