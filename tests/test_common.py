"""How common a pose is: extras.density against loops, invariances and planted densities."""
import numpy as np
import pytest

import extras.density
import keypoints as K
from dataset.figures import Figures
from extras.density import ONE_SIDED, PoseDensity

FIGURES = np.stack([Figures(700, 16).source(i)[1] for i in range(700)]).astype(np.float64)
TRAIN, HELD_OUT = FIGURES[:500], FIGURES[500:]


def hide(poses: np.ndarray, share: float, seed: int = 0) -> np.ndarray:
    """Copies in which each joint is missing with that probability."""
    gone = np.random.default_rng(seed).random(poses.shape[:2]) < share
    return np.where(gone[..., None], 0.0, poses)


def moved(poses: np.ndarray, scale: float = 1.0, by: tuple[float, float] = (0, 0),
          turn: float = 0) -> np.ndarray:
    """Poses scaled, turned by so many degrees about the corner, and moved."""
    c, s = np.cos(np.radians(turn)), np.sin(np.radians(turn))
    out = poses.copy()
    xy = scale * poses[..., :2] @ np.array([[c, s], [-s, c]]) + by
    out[..., :2] = xy * (poses[..., 2:] > 0)
    return out


def slow_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The definition, joint by joint, for two poses [17, 3]."""
    shared = [j for j in range(17) if a[j, 2] > 0 and b[j, 2] > 0]
    one_sided = sum((a[j, 2] > 0) != (b[j, 2] > 0) for j in range(17))

    def shape(pose):
        xy = pose[shared, :2] - pose[shared, :2].mean(axis=0)
        return xy / np.sqrt(np.mean(np.sum(xy ** 2, axis=1)))
    far = np.sum((shape(a) - shape(b)) ** 2) if len(shared) > 1 else 0.0
    return np.sqrt((far + ONE_SIDED ** 2 * one_sided) / (len(shared) + one_sided))


def slow_kth(pose: np.ndarray, others: np.ndarray, k: int) -> float:
    return sorted(slow_distance(pose, other) for p in others for other in (p, K.flip(p)))[k - 1]


def clusters(sizes: list[int], spreads: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Poses [sum, 17, 3] scattered about random ones, every third mirrored, and their clusters."""
    rng, n = np.random.default_rng(0), len(sizes)
    centres = np.concatenate([rng.uniform(0.1, 0.9, (n, 17, 2)), np.ones((n, 17, 1))], axis=-1)
    which = rng.permutation(np.repeat(np.arange(n), sizes))
    poses = centres[which]
    poses[..., :2] += rng.normal(0, 1, (len(which), 17, 2)) * np.array(spreads)[which, None, None]
    poses[::3] = K.flip(poses[::3])
    return poses, which


# -------------------------------------------------------------------------------------- distances

@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_distances_equal_loops_over_joints(missing, monkeypatch):
    train, given = hide(TRAIN[:40], missing, 1), hide(HELD_OUT[:6], missing, 2)
    density = PoseDensity(train, k=3)
    wanted = [slow_kth(pose, train, 3) for pose in given]
    np.testing.assert_allclose(density.distance(given), wanted, atol=1e-3)
    wanted = [slow_kth(pose, np.delete(train, i, 0), 3) for i, pose in enumerate(train)]
    np.testing.assert_allclose(density.own, wanted, atol=1e-3)
    monkeypatch.setattr(extras.density, "ROWS", 7)                  # the same in other portions
    np.testing.assert_allclose(PoseDensity(train, k=3).own, density.own, atol=1e-5)


def test_place_and_size_do_not_count_but_turning_does():
    density, given = PoseDensity(TRAIN), hide(HELD_OUT[:20], 0.1)
    wanted = density.distance(given)
    np.testing.assert_allclose(density.distance(moved(given, 0.3, (5, -2))), wanted, atol=1e-3)
    np.testing.assert_allclose(density.distance(K.flip(given)), wanted, atol=1e-3)
    assert (density.distance(moved(given, turn=90)) > wanted + 0.1).all()
    assert (density.distance(moved(given, turn=180)) > 0.8).all()


def test_a_single_joint_and_nothing_in_common():
    point, other, both, none = np.zeros((4, 1, 17, 3))
    point[0, 3], other[0, 9] = (0.2, 0.7, 1), (0.5, 0.1, 1)
    both[0, [3, 4]] = (0.9, 0.9, 1)                                 # two joints in one place
    density = PoseDensity(point, k=1)
    assert density.distance(point)[0] == 0 and density.own.tolist() == [0]
    assert density.distance(other)[0] == density.distance(none)[0] == pytest.approx(ONE_SIDED)
    assert density.distance(both)[0] == pytest.approx(ONE_SIDED / np.sqrt(2))
    for pose in (point, other, both, none):
        for poses in (point, other, both, TRAIN[:20]):
            np.testing.assert_allclose(PoseDensity(poses).typical(pose, 0.7), pose, atol=1e-9)


# ------------------------------------------------------------------------------------ how unusual

def test_held_out_poses_are_spread_evenly_over_the_training_poses():
    unusual = PoseDensity(TRAIN).unusual(HELD_OUT)
    assert abs(unusual.mean() - 0.5) < 0.06                         # one sigma is 0.02
    shares = [0.1, 0.25, 0.5, 0.75, 0.9]
    np.testing.assert_allclose(np.quantile(unusual, shares), shares, atol=0.1)


def test_an_absurd_pose_is_unusual_and_a_planted_one_is_not(capsys):
    density, absurd = PoseDensity(TRAIN), TRAIN[:20].copy()
    absurd[..., :2] = np.random.default_rng(0).uniform(0.1, 0.9, absurd[..., :2].shape)
    planted = TRAIN[density.own.argmin()][None]
    assert (density.unusual(absurd) == 1).all() and (density.unusual(planted) == 0).all()
    counted = [(density.own < d).mean() for d in density.distance(HELD_OUT)]
    np.testing.assert_allclose(density.unusual(HELD_OUT), counted)
    given, after = np.array([0.3, 0.979]), np.array([0.2, 0.4])
    extras.density.note_unusual(["usual", "rare"], given, after, 0.5, given)
    assert capsys.readouterr().out == (
        "rare: unusual pose: rarer than 97 % of the training poses; 40 % with --typical 0.5\n")


# ----------------------------------------------------------------------------------------- common

def test_the_common_poses_are_one_of_each_cluster_the_densest_first():
    crowded, which = clusters([40, 150, 80], [0.02, 0.005, 0.01])
    xy = np.random.default_rng(9).uniform(0.1, 0.9, (30, 17, 2))
    lonely = np.concatenate([xy, np.ones((30, 17, 1))], axis=-1)
    density = PoseDensity(np.concatenate([lonely, crowded]))
    chosen = density.common(3)
    assert (chosen >= 30).all() and which[chosen - 30].tolist() == [1, 2, 0]
    assert (np.diff(density.own[chosen]) >= 0).all()


def test_density_peaks_against_loops():
    density = PoseDensity(hide(TRAIN[:60], 0.1), k=3)
    score = []
    for i, pose in enumerate(density.poses):
        denser = [density.poses[j] for j in range(60) if (density.own[j], j) < (density.own[i], i)]
        away = [slow_distance(pose, q) for other in denser for q in (other, K.flip(other))]
        score.append(min(away, default=np.inf) / density.own[i])
    score = np.array(score)
    for n in (1, 5, 12):                # equal scores may be chosen either way
        chosen = density.common(n)
        assert len(set(chosen.tolist())) == n and (np.diff(density.own[chosen]) >= 0).all()
        np.testing.assert_allclose(np.sort(score[chosen]), np.sort(score)[-n:], rtol=1e-2)


# ---------------------------------------------------------------------------------------- typical

def test_typical_brings_poses_nearer_and_keeps_place_size_and_joints():
    density, amounts = PoseDensity(TRAIN), [0, 0.25, 0.5, 0.75, 1]
    given = hide(moved(HELD_OUT[:60], 0.7, (0.1, 0.2)), 0.05)
    noise = np.random.default_rng(0).normal(0, 0.02, given[..., :2].shape)
    given[..., :2] += noise * given[..., 2:]
    results = [density.typical(given, amount) for amount in amounts]
    assert results[0].tobytes() == given.tobytes()
    mean = [density.distance(poses).mean() for poses in results]
    assert (np.diff(mean) < 0).all() and mean[-1] < 0.75 * mean[0]
    assert density.unusual(results[-1]).mean() < 0.35
    for poses in results[1:]:
        assert (poses[..., 2] == given[..., 2]).all() and (poses[given[..., 2] == 0] == 0).all()
        for a, b in zip(poses, given, strict=True):
            a, b = a[a[:, 2] > 0, :2], b[b[:, 2] > 0, :2]
            np.testing.assert_allclose(a.mean(axis=0), b.mean(axis=0))
            np.testing.assert_allclose((a.std(axis=0) ** 2).sum(), (b.std(axis=0) ** 2).sum())


def test_the_middle_of_a_cluster_is_its_centre():
    poses, _ = clusters([64], [0.01])
    density, shapes = PoseDensity(poses, k=40), extras.density._shapes
    unmirrored = [pose if i % 3 else K.flip(pose) for i, pose in enumerate(poses)]
    truth = shapes(np.mean([shapes(pose) for pose in unmirrored], axis=0))
    far = moved(poses[1:2], 0.4, (0.2, 0.1))
    far[..., :2] += np.random.default_rng(1).normal(0, 0.01, far[..., :2].shape)
    middle = shapes(density.typical(far, 1.0))[0]
    assert np.abs(middle - truth).max() < 0.25 * np.abs(shapes(far)[0] - truth).max()


def test_a_joint_that_no_neighbour_has_keeps_its_place():
    poses = np.repeat(TRAIN[:1], 12, axis=0)
    poses[:, 9] = 0
    given = TRAIN[:1].copy()
    given[0, 9] = 0.9, 0.2, 1
    np.testing.assert_allclose(PoseDensity(poses).typical(given, 1.0), given, atol=1e-6)


# ------------------------------------------------------------------------------------- small sets

@pytest.mark.parametrize("n", [1, 2, 9])
def test_a_few_poses_are_enough(n):
    density = PoseDensity(TRAIN[:n])
    assert sorted(density.common(n).tolist()) == list(range(n))
    assert ((0 <= density.unusual(HELD_OUT[:9])) & (density.unusual(HELD_OUT[:9]) <= 1)).all()
    assert np.isfinite(density.typical(HELD_OUT[:9], 0.5)).all() and np.isfinite(density.own).all()
    with pytest.raises(ValueError, match=f"{n + 1}, .* only {n} training poses"):
        density.common(n + 1)


def test_poses_without_a_visible_joint_are_left_out_and_equal_ones_are_one_kind():
    poses = [TRAIN[:3], np.zeros((2, 17, 3)), np.repeat(TRAIN[3:4], 20, axis=0)]
    density = PoseDensity(np.concatenate(poses))
    assert len(density.poses) == len(density.own) == 23
    chosen = density.common(4)
    assert chosen[0] >= 3 and sorted(chosen)[:3] == [0, 1, 2]
    np.testing.assert_allclose(density.typical(TRAIN[3:4], 1.0), TRAIN[3:4], atol=1e-3)
