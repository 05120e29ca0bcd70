"""How common a pose is: extras.density.PoseDensity against loops, invariances and planted densities."""
import numpy as np
import pytest

import extras.density
import keypoints as K
from dataset.figures import Figures
from extras.density import PoseDensity

FIGURES = np.stack([Figures(700, 16).source(i)[1] for i in range(700)]).astype(np.float64)
TRAIN, HELD_OUT = FIGURES[:500], FIGURES[500:]


def hide(poses: np.ndarray, share: float, seed: int = 0) -> np.ndarray:
    """Copies in which each joint is missing with that probability."""
    gone = np.random.default_rng(seed).random(poses.shape[:2]) < share
    return np.where(gone[..., None], 0.0, poses)


def moved(poses: np.ndarray, scale: float = 1.0, by: tuple[float, float] = (0, 0), turn: float = 0) -> np.ndarray:
    """Poses scaled, turned by so many degrees about the corner, and moved."""
    c, s = np.cos(np.radians(turn)), np.sin(np.radians(turn))
    out = poses.copy()
    out[..., :2] = (scale * poses[..., :2] @ np.array([[c, s], [-s, c]]) + by) * (poses[..., 2:] > 0)
    return out


def slow_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The definition, joint by joint, for two poses [17, 3]."""
    shared = [j for j in range(17) if a[j, 2] > 0 and b[j, 2] > 0]
    one_sided = sum((a[j, 2] > 0) != (b[j, 2] > 0) for j in range(17))

    def shape(pose):
        xy = pose[shared, :2] - pose[shared, :2].mean(axis=0)
        return xy / np.sqrt(np.mean(np.sum(xy ** 2, axis=1)))
    far = np.sum((shape(a) - shape(b)) ** 2) if len(shared) > 1 else 0.0
    return np.sqrt((far + extras.density.ONE_SIDED ** 2 * one_sided) / (len(shared) + one_sided))


def slow_kth(pose: np.ndarray, others: np.ndarray, k: int) -> float:
    return sorted(slow_distance(pose, other) for p in others for other in (p, K.flip(p)))[k - 1]


def clusters(sizes: list[int], spreads: list[float], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Poses [sum, 17, 3] scattered about random ones, every third mirrored, and the number of each one's cluster."""
    rng = np.random.default_rng(seed)
    centres = np.concatenate([rng.uniform(0.1, 0.9, (len(sizes), 17, 2)), np.ones((len(sizes), 17, 1))], axis=-1)
    which = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    poses = centres[which]
    poses[..., :2] += rng.normal(0, 1, (len(which), 17, 2)) * np.array(spreads)[which, None, None]
    poses[::3] = K.flip(poses[::3])
    return poses, which


def least_apart(poses: np.ndarray) -> float:
    """The least distance between two of them, mirrored or not."""
    return min(slow_distance(a, q) for i, a in enumerate(poses) for b in poses[:i] for q in (b, K.flip(b)))


# ------------------------------------------------------------------------------------------------------ distances

@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_distances_equal_loops_over_joints(missing):
    train, given = hide(TRAIN[:40], missing, 1), hide(HELD_OUT[:6], missing, 2)
    density = PoseDensity(train, k=3)
    np.testing.assert_allclose(density.distance(given), [slow_kth(p, train, 3) for p in given], atol=1e-3)
    np.testing.assert_allclose(density.own, [slow_kth(p, np.delete(train, i, 0), 3) for i, p in enumerate(train)],
                               atol=1e-3)
    for rows in (1, 7):                                             # in other portions the same
        extras.density.ROWS, kept = rows, extras.density.ROWS
        try:
            np.testing.assert_allclose(PoseDensity(train, k=3).own, density.own, atol=1e-5)
        finally:
            extras.density.ROWS = kept


def test_place_and_size_do_not_count_but_turning_does():
    density, given = PoseDensity(TRAIN), hide(HELD_OUT[:20], 0.1)
    wanted = density.distance(given)
    np.testing.assert_allclose(density.distance(moved(given, 0.3, (5, -2))), wanted, atol=1e-3)
    np.testing.assert_allclose(density.distance(K.flip(given)), wanted, atol=1e-3)          # training mirrors
    assert (density.distance(moved(given, turn=90)) > wanted + 0.1).all()
    assert (density.distance(moved(given, turn=180)) > 0.8).all()


def test_half_a_person_finds_the_whole_one():
    """Poses are compared by what both have, so the bust of a training pose lies as near as its missing joints allow."""
    busts = moved(TRAIN[:50], 0.5, (0.3, 0.2))
    busts[:, 11:] = 0
    one_sided = extras.density.ONE_SIDED * np.sqrt(6 / 17)
    np.testing.assert_allclose(PoseDensity(TRAIN, k=1).distance(busts), one_sided, atol=1e-3)


def test_a_single_joint_and_nothing_in_common():
    point, other, both, none = np.zeros((4, 1, 17, 3))
    point[0, 3], other[0, 9], none[0] = (0.2, 0.7, 1), (0.5, 0.1, 1), 0
    both[0, [3, 4]] = (0.9, 0.9, 1)                                 # two joints in one place: no shape either
    density = PoseDensity(point, k=1)
    assert density.distance(point)[0] == 0 and density.own.tolist() == [0]
    assert density.distance(other)[0] == density.distance(none)[0] == pytest.approx(extras.density.ONE_SIDED)
    assert density.distance(both)[0] == pytest.approx(extras.density.ONE_SIDED / np.sqrt(2))
    for pose in (point, other, both, none):
        for poses in (point, other, both, TRAIN[:20]):
            pulled = PoseDensity(poses).typical(pose, 0.7)
            assert np.isfinite(pulled).all() and (pulled[..., 2] == pose[..., 2]).all()
            np.testing.assert_allclose(pulled, pose, atol=1e-9)


# ------------------------------------------------------------------------------------------------------- how unusual

def test_held_out_poses_are_spread_evenly_over_the_training_poses():
    unusual = PoseDensity(TRAIN).unusual(HELD_OUT)
    assert abs(unusual.mean() - 0.5) < 0.06                         # 200 of them: one sigma is 0.02, and TRAIN's own
    np.testing.assert_allclose(np.quantile(unusual, [0.1, 0.25, 0.5, 0.75, 0.9]), [0.1, 0.25, 0.5, 0.75, 0.9], atol=0.1)


def test_an_absurd_pose_is_out_and_a_planted_one_is_in():
    density = PoseDensity(TRAIN)
    absurd = TRAIN[:20].copy()
    absurd[..., :2] = np.random.default_rng(0).uniform(0.1, 0.9, absurd[..., :2].shape)
    assert (density.unusual(absurd) == 1).all()
    assert (density.unusual(TRAIN[density.own.argmin()][None]) == 0).all()
    counted = [(density.own < d).mean() for d in density.distance(HELD_OUT)]
    np.testing.assert_allclose(density.unusual(HELD_OUT), counted)


# ------------------------------------------------------------------------------------------------------------ common

def test_the_common_poses_are_one_of_each_cluster_the_densest_first():
    crowded, which = clusters([40, 150, 80], [0.02, 0.005, 0.01])
    lonely = np.concatenate([np.random.default_rng(9).uniform(0.1, 0.9, (30, 17, 2)), np.ones((30, 17, 1))], axis=-1)
    density = PoseDensity(np.concatenate([lonely, crowded]))
    chosen = density.common(3)
    assert (chosen >= 30).all() and which[chosen - 30].tolist() == [1, 2, 0]
    assert (np.diff(density.own[chosen]) >= 0).all()
    assert (density.unusual(density.poses[chosen]) < 0.9).all()     # a tenth are the lonely ones


def test_the_common_poses_are_dense_and_apart_and_no_mirror_images():
    both = np.concatenate([TRAIN[:250], K.flip(TRAIN[:250])])       # every kind is there twice
    for poses in (TRAIN, both):
        density = PoseDensity(poses)
        chosen = density.common(9)
        assert len(set(chosen.tolist())) == 9
        assert (density.own[chosen] <= np.quantile(density.own, 0.25)).mean() > 0.6
        nine_densest = np.argsort(density.own)[:9]                  # these are neighbours of one another
        assert least_apart(density.poses[chosen]) > max(0.2, 3 * least_apart(density.poses[nine_densest]))


def test_density_peaks_against_loops():
    density = PoseDensity(hide(TRAIN[:60], 0.1), k=3)
    score = []
    for i, pose in enumerate(density.poses):
        denser = [j for j in range(60) if (density.own[j], j) < (density.own[i], i)]
        away = min((slow_distance(pose, q) for j in denser for q in (density.poses[j], K.flip(density.poses[j]))),
                   default=np.inf)
        score.append(away / density.own[i])
    score = np.array(score)
    for n in (1, 5, 12):                # of scores that are equal but for the rounding of float32, any may be chosen
        chosen = density.common(n)
        assert len(set(chosen.tolist())) == n and (np.diff(density.own[chosen]) >= 0).all()
        np.testing.assert_allclose(np.sort(score[chosen]), np.sort(score)[-n:], rtol=1e-2)


# ----------------------------------------------------------------------------------------------------------- typical

def test_the_pull_brings_poses_nearer_and_keeps_what_is_theirs():
    density, amounts = PoseDensity(TRAIN), [0, 0.25, 0.5, 0.75, 1]
    given = hide(moved(HELD_OUT[:60], 0.7, (0.1, 0.2)), 0.05)
    given[..., :2] += np.random.default_rng(0).normal(0, 0.02, given[..., :2].shape) * given[..., 2:]
    pulled = [density.typical(given, amount) for amount in amounts]
    assert pulled[0].tobytes() == given.tobytes() and pulled[0] is not given
    mean = [density.distance(poses).mean() for poses in pulled]
    assert (np.diff(mean) < 0).all() and mean[-1] < 0.75 * mean[0]
    assert density.unusual(pulled[-1]).mean() < 0.35
    for poses in pulled[1:]:
        assert (poses[..., 2] == given[..., 2]).all() and (poses[given[..., 2] == 0] == 0).all()
        for a, b in zip(poses, given, strict=True):
            a, b = a[a[:, 2] > 0, :2], b[b[:, 2] > 0, :2]
            np.testing.assert_allclose(a.mean(axis=0), b.mean(axis=0))
            np.testing.assert_allclose(a.std(axis=0) @ a.std(axis=0), b.std(axis=0) @ b.std(axis=0))


def test_the_middle_of_a_cluster_is_its_centre():
    poses, _ = clusters([64], [0.01])
    density = PoseDensity(poses, k=40)
    shapes = extras.density._shapes
    truth = shapes(np.mean([shapes(p if i % 3 else K.flip(p)) for i, p in enumerate(poses)], axis=0))
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


@pytest.mark.parametrize("amount", [-0.1, 1.1, float("nan")])
def test_an_amount_outside_is_refused(amount):
    with pytest.raises(ValueError, match="between 0 and 1"):
        PoseDensity(TRAIN[:5]).typical(HELD_OUT[:1], amount)


# -------------------------------------------------------------------------------------------------------- small sets

@pytest.mark.parametrize("n", [1, 2, 3, 5, 9])
def test_a_few_poses_are_enough(n):
    density = PoseDensity(TRAIN[:n])
    assert sorted(density.common(n).tolist()) == list(range(n))
    assert ((0 <= density.unusual(HELD_OUT[:9])) & (density.unusual(HELD_OUT[:9]) <= 1)).all()
    assert np.isfinite(density.typical(HELD_OUT[:9], 0.5)).all() and np.isfinite(density.own).all()
    for wrong in (0, -1, n + 1):
        with pytest.raises(ValueError, match=f"{wrong} common poses.* 1 to {n}"):
            density.common(wrong)


@pytest.mark.parametrize("poses", [np.zeros((0, 17, 3)), np.zeros((4, 17, 3)), np.ones((4, 16, 3)), np.ones((17, 3)),
                                   np.full((2, 17, 3), np.nan)])
def test_what_has_no_density_is_refused(poses):
    with pytest.raises(ValueError, match="have no density"):
        PoseDensity(poses)


def test_poses_without_a_visible_joint_are_left_out_and_equal_ones_are_no_trouble():
    density = PoseDensity(np.concatenate([TRAIN[:3], np.zeros((2, 17, 3)), np.repeat(TRAIN[3:4], 20, axis=0)]))
    assert len(density.poses) == len(density.own) == 23
    chosen = density.common(4)
    assert chosen[0] >= 3 and sorted(chosen)[:3] == [0, 1, 2]       # the twenty are one kind
    np.testing.assert_allclose(density.typical(TRAIN[3:4], 1.0), TRAIN[3:4], atol=1e-3)
