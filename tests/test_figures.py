"""Procedural figures: the same image whoever asks, and joints that lie on the body drawn."""
import numpy as np
import pytest

import dataset.figures
from dataset.figures import Figures
from keypoints import HIDDEN, LIMBS


def test_an_image_depends_on_seed_and_number_alone():
    forward, backward = Figures(20, 64, seed=3), Figures(1000, 64, seed=3)
    later = {i: backward[i] for i in reversed(range(20))}
    for i in range(20):
        image, pose = forward[i]
        assert np.array_equal(image, later[i][0]) and np.array_equal(pose, later[i][1])
    assert not np.array_equal(Figures(1, 64, seed=4)[0][0], forward[0][0])
    assert len({forward[i][0].tobytes() for i in range(20)}) == 20


def test_the_size_changes_nothing_but_the_size():
    small, large = Figures(10, 32), Figures(10, 128)
    for i in range(10):
        (image, pose), (image4, pose4) = small[i], large[i]
        np.testing.assert_allclose(pose, pose4, atol=1e-6)
        assert image.shape == (32, 32, 3) and image4.shape == (128, 128, 3)
        shrunk = image4.reshape(32, 4, 32, 4, 3).mean((1, 3))
        assert np.abs(shrunk - image).mean() < 4        # of 255: edges fall on other pixels


def test_joints_and_limbs_lie_on_the_body(monkeypatch):
    """At a joint inside the frame the image must differ from the backdrop without the person."""
    on, of = 0, 0
    for i in range(60):
        image, pose = Figures(i + 1, 128)[i]
        with monkeypatch.context() as patch:
            patch.setattr(dataset.figures._Figure, "draw", lambda self: None)
            bare = Figures(i + 1, 128)[i][0]
        body = np.abs(image.astype(int) - bare).sum(-1) > 0
        for a, b in LIMBS[4:] + tuple((j, j) for j in range(17)):
            for share in (0.0, 0.25, 0.5, 0.75):
                x, y = ((1 - share) * pose[a, :2] + share * pose[b, :2]) * 128
                if 0 <= x < 128 and 0 <= y < 128:
                    on, of = on + body[int(y), int(x)], of + 1
        assert 0.03 < body.mean() < 0.75
    assert on / of > 0.97, f"{on} of {of}"


def test_left_is_the_persons_own():
    """The left shoulder is right of the other in the image if the person faces us, else left."""
    figures = Figures(200)
    yaw = np.array([figures._draw(i).pose.yaw for i in range(200)])
    left = np.array([pose[5, 0] > pose[6, 0] for _, pose in map(figures.source, range(200))])
    facing, away = np.abs(yaw) < 60, np.abs(yaw) > 120
    assert facing.sum() > 60 and left[facing].mean() > 0.95
    assert away.sum() > 10 and left[away].mean() < 0.05


@pytest.mark.parametrize("part, joints", [("draw_face", (0, 1, 2)), ("draw_limb", (9, 10))])
def test_a_hidden_joint_is_where_its_own_part_is_not_seen(part, joints, monkeypatch):
    """The pixel of a joint is the same without the part that it belongs to, if it is hidden."""
    n, seen, drawn = 400, [], []
    whole = [Figures(n, 128)[i] for i in range(n)]
    monkeypatch.setattr(dataset.figures._Figure, part, lambda self, *how: None)
    for i, (image, pose) in enumerate(whole):
        bare = Figures(n, 128)[i][0]
        for j in joints:
            x, y = (pose[j, :2] * 128).astype(int)
            if 0 <= x < 128 and 0 <= y < 128:
                seen.append(pose[j, 2] == 1)
                drawn.append((image[y, x] != bare[y, x]).any())
    seen, drawn = np.array(seen), np.array(drawn)
    assert (~seen).sum() >= 8 and (drawn[~seen]).mean() < 0.2 < 0.8 < drawn[seen].mean()


def test_poses_are_varied_finite_and_mostly_inside():
    poses = np.stack([Figures(300)[i][1] for i in range(300)])
    assert np.isfinite(poses).all() and set(np.unique(poses[..., 2])) == {HIDDEN, 1}
    inside = ((poses[..., :2] > 0) & (poses[..., :2] < 1)).all(-1)
    assert 0.95 < inside.mean() < 1                     # a few close-ups leave the frame
    assert 0.4 < np.median(np.ptp(poses[..., 1], axis=1)) < 0.9
    wrists_up = (poses[:, 9, 1] < poses[:, 5, 1]).mean()
    assert 0.1 < wrists_up < 0.7


@pytest.mark.parametrize("i", [-1, 5])
def test_asking_outside_is_an_error(i):
    with pytest.raises(IndexError, match="there are 5"):
        Figures(5)[i]
