"""--retarget: the directions of one body with the limb lengths of another, by closed form."""
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import sample
from extras.density import note_unusual
from extras.proportions import PARENTS, limbs_of, retarget, with_middles
from keypoints import MIRROR, flip

ENDS, STARTS = list(PARENTS), list(PARENTS.values())
TORSO, FEET = ENDS.index(17), [15, 16]
RNG = np.random.default_rng(0)


def lengths(scale: float) -> dict[int, float]:
    """Of each limb, the same on both sides; those of other scales have other proportions."""
    one_side = {17: 0.2, 5: 0.08, 11: 0.05, 0: 0.1, 7: 0.12, 13: 0.15, 1: 0.02, 3: 0.03}
    one_side |= {9: 0.1, 15: 0.14}
    of = {joint: length * (1 if joint == 17 else scale) for joint, length in one_side.items()}
    return of | {MIRROR[joint]: length for joint, length in of.items() if joint < 17}


def body(of: dict[int, float], n: int) -> np.ndarray:
    """n poses [17, 3] whose limbs have these lengths and random directions."""
    poses = np.ones((n, 17, 3))
    for pose in poses:
        angle = {joint: RNG.uniform(0, 2 * np.pi) for joint in PARENTS}
        angle |= {6: angle[5] + np.pi, 12: angle[11] + np.pi}       # the neck is in the middle
        at = {18: RNG.uniform(0.3, 0.7, 2)}
        for joint, parent in PARENTS.items():
            at[joint] = at[parent] + of[joint] * np.array([np.cos(angle[joint]),
                                                           np.sin(angle[joint])])
        pose[:, :2] = [at[joint] for joint in range(17)]
    return poses


def limbs(poses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    length, direction, _ = limbs_of(with_middles(poses), ENDS, STARTS)
    return length, direction


def test_an_own_pose_comes_back_unchanged_mirrored_or_not():
    own = RNG.uniform(0.1, 0.9, (50, 17, 3))
    own[..., 2] = RNG.random((50, 17)) > 0.2
    own[..., :2] *= own[..., 2:]
    assert np.abs(retarget(own, own) - own).max() < 1e-12
    assert np.abs(retarget(flip(own), own) - flip(own)).max() < 1e-12


def test_angles_are_kept_lengths_are_the_others_and_feet_stay_on_the_ground():
    person, chibi = body(lengths(1.0), 30), body(lengths(0.4), 40)
    moved = retarget(person, chibi)
    (old, angles), (new, kept) = limbs(person), limbs(moved)
    assert np.abs(angles - kept).max() < 1e-12
    assert np.abs(new[:, TORSO] - old[:, TORSO]).max() < 1e-12
    wanted = np.array([lengths(0.4)[joint] for joint in ENDS]) / lengths(0.4)[17]
    assert np.abs(new / new[:, [TORSO]] - wanted).max() < 1e-12
    assert np.allclose(moved[:, FEET, 1].max(1), person[:, FEET, 1].max(1))
    assert np.abs(retarget(moved, person) - person).max() < 1e-9                # and back again


def test_missing_joints_stay_missing_and_a_pose_without_torso_stays_as_it_is():
    person, chibi = body(lengths(1.0), 5), body(lengths(0.4), 40)
    person[:, [5, 7, 15, 16]] = 0                               # an arm's start, and both feet
    person[:, 8, 2] = 0.5
    moved = retarget(person, chibi)
    assert np.isfinite(moved).all() and (moved[..., 2] == person[..., 2]).all()
    assert not moved[:, [5, 7, 15, 16]].any()
    hips = with_middles(person)[:, 18, :2]
    assert np.allclose(with_middles(moved)[:, 18, :2], hips)
    person[:, [11, 12]] = 0
    assert (retarget(person, chibi) == person).all()


def test_the_poses_of_a_label_are_told_apart(tmp_path):
    path = tmp_path / "c.pt"
    path.write_bytes(bytes(10_000))
    poses = torch.rand(6, 17, 3)
    payload = {"poses": poses, "pose_labels": torch.tensor([0, 1, 1, -1, 2, 0])}
    for labels, rows in (([], range(6)), ([1], [1, 2]), ([0, 2], [0, 4, 5]), ([7], range(6))):
        found = checkpoint.training_poses(payload, path, labels)
        assert (found == poses[list(rows)].numpy()).all()
    with pytest.raises(ValueError, match="is damaged"):
        checkpoint.training_poses(payload | {"pose_labels": torch.zeros(5)}, path)


def test_the_note_suggests_it_where_it_helps(capsys):
    note_unusual(["a", "b", "c"], np.array([0.9, 0.95, 0.5]), np.array([0.9, 0.95, 0.5]), 0.0,
                 np.array([0.3, 0.9, 0.1]))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "30 % with --retarget" in lines[0] and "--typical" in lines[1]


def test_sample_draws_the_retargeted_pose_beside_the_given_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    drawn, denoise, grids, grid_of = [], sample.denoise, [], sample.grid_of
    monkeypatch.setattr(sample, "grid_of", lambda *args: grids.append(grid_of(*args)) or grids[-1])
    monkeypatch.setattr(sample, "denoise", lambda ldm, poses, *args, **how:
                        drawn.append(poses) or denoise(ldm, poses, *args, **how))
    root = Path(__file__).parent.parent
    flags = [str(root / "examples/poses/waving.json"), "--ckpt", str(root / "assets/toy.pt"), "-n",
             "1", "--steps", "1", "--save-latents", "z.npz"]
    assert sample.main(flags) == 0 and sample.main([*flags, "--retarget"]) == 0
    _, payload = checkpoint.load_ldm(root / "assets/toy.pt")
    trained = checkpoint.training_poses(payload, root / "assets/toy.pt")
    assert np.array_equal(drawn[1].numpy(), retarget(drawn[0].numpy(), trained))
    assert not np.array_equal(*(poses.numpy() for poses in drawn))
    plain, moved = grids
    assert plain["columns"] == ["pose", "seed 0"]
    assert moved["columns"] == ["pose as given", "pose drawn", "seed 0"]
    before, after = moved["rows"][0][:2]
    assert np.array_equal(before, plain["rows"][0][0]) and not np.array_equal(before, after)
    assert plain["captions"] == [["common pose"]] and moved["captions"][0][0] == "common pose"
