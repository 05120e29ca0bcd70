"""The tricks of sample.py: closed forms on Gaussian data, identities on a model trained for seconds, honest files."""
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from test_diffusion import exact_eps
from test_train import MICRO, ROOT, as_micro, command

import checkpoint
import data
import extras.motion
import plots
import sample
import train
from dataset.figures import Figures
from diffusion import Diffusion, ddim, ddim_table, ddpm, dpm_solver, held, invert, log_snr, per_image_noise, slerp
from unet import UNet
from vq import VQModel

WAVING, KICKING = (str(ROOT / f"examples/poses/{name}.json") for name in ("waving", "kicking"))
SPREAD = 0.5            # standard deviation of the Gaussian data


# ------------------------------------------------------------------------------------------------- the mathematics

@pytest.fixture(scope="module")
def diffusion() -> Diffusion:
    return Diffusion()


def last(steps) -> torch.Tensor:
    *_, step = steps
    return step.x


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_sampler_that_starts_midway_goes_on_as_the_whole_run_did(sampler):
    diffusion = Diffusion(50)
    x_T, noise_fn = per_image_noise([3, 4], (2, 3))

    def run(x, skip):
        if sampler == "ddpm":
            return list(ddpm(diffusion, exact_eps(diffusion, SPREAD), x, noise_fn, skip))
        return list(ddim(diffusion, exact_eps(diffusion, SPREAD), x, 20, 0.7, noise_fn, skip=skip))
    whole = run(x_T, 0)
    tail = run(whole[6].x, 7)
    assert [(step.i, step.t) for step in tail] == [(step.i, step.t) for step in whole[7:]]
    assert all(torch.equal(a.x, b.x) for a, b in zip(tail, whole[7:], strict=True))


@pytest.mark.parametrize("sampler, steps, spacing", [(ddim, 500, "even"), (dpm_solver, 50, "lambda")])
def test_starting_from_a_picture_keeps_the_share_of_it_that_the_closed_form_says(diffusion, sampler, steps, spacing):
    """Data N(0, s^2): the flow from t down multiplies by s / sqrt(v), v = alpha_bar s^2 + 1 - alpha_bar, so of x0 there
    remains sqrt(alpha_bar) s / sqrt(v) and of the noise sqrt(1 - alpha_bar) s / sqrt(v)."""
    timesteps, alpha_bar, *_ = ddim_table(diffusion, steps, 0, spacing)
    for skip in (steps // 5, steps // 2, steps * 4 // 5):
        t, ab = int(timesteps[-1 - skip]), alpha_bar[-1 - skip]
        v = ab * SPREAD ** 2 + 1 - ab
        x0, noise = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        x_t = diffusion.q_sample(x0, torch.tensor([t]), noise)
        got = last(sampler(diffusion, exact_eps(diffusion, SPREAD), x_t, steps, spacing=spacing, skip=skip))[0]
        wanted = torch.tensor([ab ** 0.5, (1 - ab) ** 0.5]) * SPREAD / v ** 0.5
        torch.testing.assert_close(got.double(), wanted.double(), rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("how", ["ddim 0", "ddim 1", "ddpm", "dpm_solver 0", "dpm_solver 1"])
def test_what_is_held_comes_out_as_given_and_the_rest_as_without(diffusion, how):
    """Pixels of this data know nothing of one another, so the part that is not held must be that of a plain run."""
    x_T, noise_fn = per_image_noise([1, 2], (1, 4, 4))
    x0, known = torch.randn(1, 1, 4, 4), torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    known[..., :2] = True
    eps_fn = exact_eps(diffusion, SPREAD)

    def run(eps_fn):
        if how == "ddpm":
            return list(ddpm(diffusion, eps_fn, x_T, noise_fn))
        sampler = ddim if how.startswith("ddim") else dpm_solver
        return list(sampler(diffusion, eps_fn, x_T, 50, float(how[-1]), noise_fn))
    kept, plain = run(held(diffusion, eps_fn, x0, known)), run(eps_fn)
    torch.testing.assert_close(kept[-1].x[..., :2], x0.expand(2, 1, 4, 4)[..., :2], atol=1e-5, rtol=0)
    assert torch.equal(kept[-1].x[..., 2:], plain[-1].x[..., 2:])
    if how.endswith(" 0"):                # on the way there it is x0 with one and the same noise, as (4) has it
        noise = diffusion.predict_eps(x_T, torch.full((2,), 999), x0)
        for step, after in zip(kept[:-1], kept[1:], strict=True):
            noisy = diffusion.q_sample(x0, torch.full((2,), after.t), noise)
            torch.testing.assert_close(step.x[..., :2], noisy[..., :2], atol=1e-4, rtol=0)


def test_rounds_of_repaint_let_the_rest_listen_to_what_is_held(diffusion):
    """Two pixels of variance 1 and covariance rho: given a, the other's mean is rho a. Everything is linear, so the
    mean of the samples is the sample without noise."""
    rho = 0.8
    covariance = torch.tensor([[1, rho], [rho, 1]], dtype=torch.float64)

    def eps_fn(x, t):
        ab = diffusion.alphas_bar[int(t[0])]
        return x @ ((1 - ab).sqrt() * torch.linalg.inv(ab * covariance + (1 - ab) * torch.eye(2))).float().T
    x0, known, off = torch.tensor([[1.0, 0.0]]), torch.tensor([[True, False]]), []
    for rounds in (1, 2, 5, 20):
        x = last(ddim(diffusion, held(diffusion, eps_fn, x0, known), torch.zeros(1, 2), 50, 1.0,
                      lambda i, x: torch.zeros_like(x), rounds=rounds))
        off.append(rho - x[0, 1].item())
    assert off == sorted(off, reverse=True) and off[0] > 0.25 and abs(off[-1]) < 0.05, off


def test_dpm_solver_that_starts_midway_draws_its_line_from_the_second_step_on(diffusion):
    """What it went to says which D it took: with eta 0, x_s = sqrt(ab_s) D + sqrt(1 - ab_s) eps(D)."""
    n, skip = 8, 2
    _, ab, ab_s, _ = ddim_table(diffusion, n, 0, "lambda")
    lambda_, x = log_snr(ab), torch.randn(1, 6)
    steps = list(dpm_solver(diffusion, exact_eps(diffusion, SPREAD), x, n, skip=skip))
    assert [step.i for step in steps] == list(range(skip, n))
    for k, step in enumerate(steps):
        j, wanted = n - 1 - step.i, step.x0
        if k > 0 and j > 0:
            h, h_before = lambda_[j - 1] - lambda_[j], lambda_[j] - lambda_[j + 1]
            wanted = step.x0 + h / (2 * h_before) * (step.x0 - steps[k - 1].x0)
        ratio = ((1 - ab_s[j]) / (1 - ab[j])) ** 0.5
        D = (step.x - ratio * x) / (ab_s[j] ** 0.5 - ratio * ab[j] ** 0.5)
        torch.testing.assert_close(D, wanted, rtol=1e-4, atol=1e-5)
        x = step.x


def test_noise_of_every_round_is_another(diffusion):
    seen = []
    list(ddim(diffusion, exact_eps(diffusion, SPREAD), torch.zeros(1, 2), 4, 1.0,
              lambda i, x: seen.append(i) or torch.zeros_like(x), rounds=3))
    assert len(seen) == len(set(seen)) == 4 * 3 - 3 + 4 * 2        # the last step adds none of its own
    with pytest.raises(ValueError, match="rounds 2"):
        next(ddim(diffusion, exact_eps(diffusion, SPREAD), torch.zeros(1, 2), 4, rounds=2))


@pytest.mark.parametrize("spacing", ["even", "uniform"])
def test_inversion_is_the_closed_form_and_ddim_undoes_it(diffusion, spacing):
    """eps = c_t x, so a step of DDIM multiplies by a + (sqrt(1 - alpha_bar_s) - a sqrt(1 - alpha_bar_t)) c_t."""
    timesteps, ab, ab_s, _ = ddim_table(diffusion, 50, 0, spacing)
    a, c = np.sqrt(ab_s / ab), np.sqrt(1 - ab) / (ab * SPREAD ** 2 + 1 - ab)
    factor = np.prod(a + (np.sqrt(1 - ab_s) - a * np.sqrt(1 - ab)) * c)
    eps_fn, z, errors = exact_eps(diffusion, SPREAD), SPREAD * torch.randn(2, 3), []
    for rounds in (1, 3, 30):
        x_T = last(invert(diffusion, eps_fn, z, 50, spacing, rounds))
        back = last(ddim(diffusion, eps_fn, x_T, 50, spacing=spacing))
        errors.append(((back - z).abs().max() / z.abs().max()).item())
    torch.testing.assert_close(x_T, (z / factor).float(), rtol=1e-4, atol=1e-5)
    assert errors[2] < 1e-4 and errors[2] < errors[1] < errors[0] / 3, errors
    assert [step.t for step in invert(diffusion, eps_fn, z, 50, spacing)] == timesteps.tolist()


def test_slerp_keeps_to_the_great_circle():
    a, b = torch.tensor([3.0, 0.0, 0.0]), torch.tensor([0.0, 3.0, 0.0])
    for share in (0.25, 0.5, 0.9):
        angle = share * math.pi / 2
        torch.testing.assert_close(slerp(a, b, share), 3 * torch.tensor([math.cos(angle), math.sin(angle), 0]))
    a, b = torch.randn(2, 3, 8, 8)
    b *= a.norm() / b.norm()
    for share in (0.1, 0.5, 0.7):
        assert slerp(a, b, share).norm().item() == pytest.approx(a.norm().item(), rel=1e-5)
    assert torch.equal(slerp(a, b, 0.0), a) and torch.equal(slerp(a, b, 1.0), b)
    torch.testing.assert_close(slerp(a, a, 0.3), a)


def test_noise_between_two_seeds_starts_and_ends_at_theirs_in_every_step():
    x_T, noise_fn = per_image_noise([5, (5, 6, 0.0), (5, 6, 1.0), (5, 6, 0.5), 6], (3, 4, 4))
    for x in (x_T, noise_fn(0, x_T), noise_fn(7, x_T)):
        assert torch.equal(x[0], x[1]) and torch.equal(x[2], x[4])
        assert torch.equal(x[3], slerp(x[0], x[4], 0.5)) and not torch.allclose(x[3], x[0], atol=0.1)
    with pytest.raises(ValueError, match="0 to 4294967295"):
        per_image_noise([(3, -1, 0.5)], (2,))


# ----------------------------------------------------------------------------------------------------- the pictures

@pytest.fixture(scope="module")
def ckpt(tmp_path_factory) -> str:
    """A model of 32 pixels whose stage 2 was trained for seconds.

    Its stage 1 is a random one with codes from its own outputs, and loud: trained for seconds it would draw one colour.
    """
    root = tmp_path_factory.mktemp("tricks")
    with pytest.MonkeyPatch.context() as patch:
        as_micro(patch)
        assert train.main(command("vq", root / "vq", "--steps", "2")) == 0
        payload = torch.load(root / "vq/last.pt", weights_only=True)
        torch.manual_seed(0)
        vq = VQModel(MICRO.vq_config).eval()
        figures = np.stack([np.asarray(Figures(16, 32).source(i)[0]) for i in range(16)])
        with torch.no_grad():
            h = vq.encode(data.to_tensor(figures)).permute(0, 2, 3, 1).reshape(-1, 3)
            vq.quantize.embedding.weight.copy_(h[torch.randperm(len(h))[:32]])
            vq.decoder.conv_out.weight.mul_(10)
        checkpoint.save(root / "vq/last.pt", payload | {"vq": vq.state_dict()})
        assert train.main(command("ldm", root / "ldm", "--steps", "150", "--vq", str(root / "vq/last.pt"))) == 0
    return str(root / "ldm/last.pt")


@pytest.fixture
def picture(tmp_path) -> str:
    Image.fromarray(np.asarray(Figures(3, 32).source(1)[0])).save(tmp_path / "figure.png")
    return str(tmp_path / "figure.png")


@pytest.fixture
def go(ckpt, tmp_path, monkeypatch, capsys):
    """Runs sample.py in tmp_path -> the pictures drawn, uint8 [B, 32, 32, 3]."""
    monkeypatch.chdir(tmp_path)

    def run(*flags: str, steps: str | None = "6") -> np.ndarray:
        drawn, written = [], []
        with monkeypatch.context() as m:
            for name in ("grid_of", "sheet_of"):
                make = getattr(sample, name)
                m.setattr(sample, name, lambda plan, pictures, given, make=make:
                          drawn.append(np.stack(pictures)) or make(plan, pictures, given))
            film = sample.film_of
            m.setattr(sample, "film_of", lambda *args: written.append(film(*args)) or written[-1])
            argv = [*flags, *([] if "--repeat" in flags else ["--ckpt", ckpt, "--steps", steps])]
            code = sample.main([*argv, "--device", "cpu"])
        assert code == 0, capsys.readouterr().err
        return (drawn or written or [None])[0]                          # nothing with --no-grid
    return run


def round_trip(ckpt: str, path: str) -> np.ndarray:
    """uint8 [32, 32, 3]: the picture through stage 1 and back."""
    ldm, _ = checkpoint.load_ldm(ckpt)
    with torch.no_grad():
        x = data.to_tensor(np.array(Image.open(path)))[None]
        return data.to_uint8(ldm.vq(x)[0])[0]


@pytest.mark.parametrize("sampler, halfway", [("ddim", ("0.2", "0.4", "0.6", "0.8")), ("dpm_solver", ("0.2", "0.8"))])
def test_init_goes_from_the_picture_to_plain_sampling(go, ckpt, picture, sampler, halfway):
    flags = [WAVING, "-n", "1", "--sampler", sampler]

    def at(strength):
        return go(*flags, "--init", picture, "--strength", strength, steps="20")[0]
    given, plain = round_trip(ckpt, picture), go(*flags, steps="20")[0]
    assert np.array_equal(at("0"), given)
    assert np.array_equal(at("1"), plain)
    far = [np.abs(at(s).astype(float) - given).mean() for s in ("0", *halfway, "1")]
    assert far == sorted(far) and far[1] > 0, far


@pytest.mark.parametrize("spacing", ["even", "lambda", "uniform"])
def test_strength_is_as_much_noise_in_any_spacing(ckpt, picture, spacing):
    ldm, _ = checkpoint.load_ldm(ckpt)
    given, T = sample.encode(ldm, [Image.open(picture)], 32), ldm.schedule["timesteps"]
    for strength in (0.2, 0.6, 0.9):
        args = sample.parse_args(["--init", picture, "--strength", f"{strength}", "--steps=20", "--spacing", spacing])
        skip = sample.start_from(ldm, given, args, torch.zeros(1, 17, 3))["skip"]
        timesteps = ddim_table(Diffusion(**ldm.schedule), 20, 0, spacing)[0][::-1]
        assert timesteps[skip] < strength * T <= timesteps[skip - 1]


@pytest.mark.parametrize("spacing", ["even", "lambda", "uniform"])
def test_init_puts_on_the_noise_of_the_first_step_that_is_made(ckpt, picture, spacing):
    ldm, _ = checkpoint.load_ldm(ckpt)
    z, diffusion, poses = torch.randn(1, 3, 8, 8), Diffusion(**ldm.schedule), torch.zeros(2, 17, 3)
    got = list(sample.sample(ldm, poses, [3, 4], 32, **sample.settings(ldm, "ddim", 20, 0.0, 1.0, spacing), given=z,
                             skip=13))
    noise, _ = per_image_noise([3, 4], (3, 8, 8))
    timesteps = ddim_table(diffusion, 20, 0, spacing)[0][::-1]
    assert [step.t for step in got] == timesteps[13:].tolist()
    x_t = diffusion.q_sample(z, torch.tensor([timesteps[13]]), noise)
    eps = ldm(x_t, torch.full((2,), timesteps[13]), poses)
    torch.testing.assert_close(got[0].x0, diffusion.predict_x0(x_t, torch.tensor([timesteps[13]]), eps))


def test_init_works_with_ddpm(go, ckpt, picture, monkeypatch):
    payload = torch.load(ckpt, weights_only=True)
    payload["schedule"]["timesteps"] = 40
    checkpoint.save("short.pt", payload)
    flags = [WAVING, "-n", "1", "--sampler", "ddpm", "--ckpt", "short.pt", "--init", picture, "--strength"]

    def at(strength):
        assert sample.main([*flags, strength, "--out", "x.png", "--separate", strength]) == 0
        (file,) = Path(strength).glob("*.png")
        return np.asarray(Image.open(file)).astype(float)
    given = round_trip(ckpt, picture)
    assert np.array_equal(at("0"), given) and 0 < np.abs(at("0.3") - given).mean() < np.abs(at("1") - given).mean()


@pytest.mark.parametrize("rounds", ["1", "3"])
def test_inpainting_changes_nothing_outside_its_mask(go, ckpt, picture, rounds):
    mask = np.zeros((32, 32), np.uint8)
    mask[5:18, 9:20] = 255
    Image.fromarray(mask).save("mask.png")
    given = round_trip(ckpt, picture)
    pictures = go(WAVING, KICKING, "--inpaint", picture, "--mask", "mask.png", "--rounds", rounds,
                  "--save-latents", "z.npz")
    latents = torch.from_numpy(np.load("z.npz")["latents"])
    decoded = sample.decode(checkpoint.load_ldm(ckpt)[0], latents)
    for drawn, whole in zip(pictures, decoded, strict=True):
        assert np.array_equal(drawn[mask == 0], given[mask == 0])
        assert np.array_equal(drawn[mask > 0], whole[mask > 0]) and (whole[mask > 0] != given[mask > 0]).any()
    assert (np.stack(decoded)[:, mask == 0] != given[mask == 0]).any()      # so latents alone would not do


def test_a_cell_is_drawn_anew_where_any_of_its_pixels_is_white_and_the_outline_is_one_pixel_around(ckpt, picture):
    ldm, _ = checkpoint.load_ldm(ckpt)
    mask = np.zeros((32, 32, 3), np.uint8)
    mask[9, 14] = 255
    given = sample.encode(ldm, [Image.open(picture), Image.fromarray(mask)], 32)
    args = sample.parse_args(["--inpaint", picture, "--mask", "m.png", "--rounds", "2"])
    how = sample.start_from(ldm, given, args, torch.zeros(1, 17, 3))
    assert how["rounds"] == 2 and (~how["known"]).nonzero().tolist() == [[0, 0, 2, 3]]
    pink = (given.shown() == sample.OUTLINE).all(axis=-1)
    around = {(y, x) for y in (8, 9, 10) for x in (13, 14, 15)} - {(9, 14)}
    assert {tuple(at) for at in np.argwhere(pink).tolist()} == around
    assert np.array_equal(given.shown()[~pink], given.pixels[~pink])


def test_the_noise_of_a_picture_gives_it_back(go, ckpt, picture):
    """The latent within 2 % at 50 steps: so far do three rounds of the fixed point take it on this model."""
    ldm, _ = checkpoint.load_ldm(ckpt)
    drawn = go(WAVING, "--noise-from", picture, "--guidance", "0", "--save-latents", "z.npz", steps="50")
    z = sample.encode(ldm, [Image.open(picture)], 32).z
    back = torch.from_numpy(np.load("z.npz")["latents"])
    assert ((back - z).square().mean() / z.square().mean()).sqrt() < 0.02
    assert len(drawn) == 1 and np.abs(drawn[0].astype(float) - round_trip(ckpt, picture)).mean() < 3
    other = go(WAVING, "--noise-from", picture, "--guidance", "3", "--save-latents", "z.npz", steps="50")
    assert not np.array_equal(other, drawn)


def test_a_model_that_knows_no_null_pose_inverts_under_the_first(go, ckpt, picture):
    checkpoint.save("bound.pt", torch.load(ckpt, weights_only=True) | {"knows_null": False})
    z = sample.encode(checkpoint.load_ldm(ckpt)[0], [Image.open(picture)], 32).z
    assert sample.main([KICKING, WAVING, "--ckpt", "bound.pt", "--noise-from", picture, "--save-latents", "z.npz",
                        "--out", "x.png"]) == 0
    back = torch.from_numpy(np.load("z.npz")["latents"])
    assert ((back[:1] - z).square().mean() / z.square().mean()).sqrt() < 0.02


def test_a_morph_ends_at_the_plain_samples(go):
    a, b = go("--morph", WAVING, KICKING, "--frames", "2", "--seed", "7")
    plain = go(WAVING, KICKING, "-n", "2", "--seed", "7")          # rows of seeds 7 and 8
    np.testing.assert_allclose(a.astype(int), plain[0], atol=1)    # batches of 2 and 4 may round otherwise
    np.testing.assert_allclose(b.astype(int), plain[3], atol=1)
    many = go("--morph", WAVING, KICKING, "--frames", "9", "--seed", "7")
    np.testing.assert_allclose(many[[0, -1]].astype(int), [a, b], atol=1)
    steps = np.abs(np.diff(many.astype(float), axis=0)).mean(axis=(1, 2, 3))
    assert steps.max() < np.abs(a.astype(float) - b).mean()         # no leap is as long as the whole way


def test_poses_are_interpolated_joint_by_joint():
    poses, _ = sample.read_poses([WAVING, KICKING])
    a, b = (pose.copy() for pose in poses)
    a[3], b[5] = 0, 0
    plan = extras.motion.morph(np.stack([a, b]), ["a", "b"], 5, seed=3, n=1)
    assert np.array_equal(plan.poses[0], a) and np.array_equal(plan.poses[4], b)
    both = [j for j in range(17) if j not in (3, 5)]
    np.testing.assert_allclose(plan.poses[1][both, :2], 0.75 * a[both, :2] + 0.25 * b[both, :2])
    assert (plan.poses[1:4, [3, 5]] == 0).all() and (plan.poses[1:4, both, 2] == 1).all()
    assert plan.seeds == [3, (3, 4, 0.25), (3, 4, 0.5), (3, 4, 0.75), 4]
    assert plan.names == ["a", "25% to b", "50% to b", "75% to b", "b"]
    way = extras.motion.morph(np.stack([a, b, a]), ["a", "b", "c"], 5, seed=0, n=2)
    assert np.array_equal(way.poses[2], b) and np.array_equal(way.poses[4], a)
    assert way.seeds == [0, 3, (0, 1, 0.5), (3, 4, 0.5), 1, 4, (1, 2, 0.5), (4, 5, 0.5), 2, 5]


# ------------------------------------------------------------------------------------------------------- a motion

def walk(folder: Path, frames: dict[int, float | None], name: str = "frame{}.json") -> Path:
    """A folder of pose files whose every joint is at x; None is a frame in which nobody was found."""
    folder.mkdir()
    for number, x in frames.items():
        joints = [] if x is None else [[x, 0.1 + j / 20, 1] for j in range(17)]
        (folder / name.format(number)).write_text(json.dumps(joints))
    return folder


def xs(poses: list[np.ndarray]) -> list[float]:
    return [round(float(pose[0, 0]), 6) for pose in poses]


def test_frames_come_in_natural_order_and_those_without_anybody_lie_between_their_neighbours(tmp_path, capsys):
    folder = walk(tmp_path / "walk", {0: None, 1: 0.1, 2: 0.2, 3: None, 10: 0.9, 4: 0.4, 9: None, 11: None})
    (folder / ".hidden").write_text("x")
    (folder / "frame1.png").write_text("the picture of it")
    poses, names = extras.motion.read_motion([str(folder)])
    # 3 was seen and empty, 5 to 8 have no file, 9 is empty: from 4 to 10 it is 0.5 / 6 a frame
    assert xs(poses) == [0.1, 0.2, 0.3, 0.4, *(round(0.4 + k * 0.5 / 6, 6) for k in range(1, 6)), 0.9]
    assert names[0] == "frame1" and names[-1] == "frame10"
    assert "4 frames and 6 without anybody, filled in" in capsys.readouterr().out
    assert xs(extras.motion.read_motion([str(folder)], frames=2)[0]) == [0.1, 0.9]


@pytest.mark.parametrize("numbers, wanted", [
    (["f3", "f4", "f6"], [0, 1, 3]), (["f0", "f5", "f15"], [0, 1, 3]), (["007_points", "009_points"], [0, 1]),
    (["run2", "jump7"], [0, 1]), (["b", "a"], [0, 1]), (["f4", "f3"], [0, 1]), (["f1", "f1"], [0, 1]),
    (["clip1 3", "clip1 4", "clip1 7"], [0, 1, 4])])
def test_frames_are_counted_by_the_number_in_their_names(numbers, wanted):
    assert extras.motion.frame_numbers(numbers) == wanted


def test_a_long_absence_is_not_invented(tmp_path):
    frames = {1: 0.1, 2: 0.2, 3 + extras.motion.LONGEST_GAP: 0.3, 4 + 2 * extras.motion.LONGEST_GAP + 1: 0.4}
    poses, _ = extras.motion.read_motion([str(walk(tmp_path / "walk", frames))])
    assert len(poses) == 4 + extras.motion.LONGEST_GAP and xs(poses)[-2:] == [0.3, 0.4]


def test_frames_of_one_file_and_a_person_who_is_not_in_every_frame(tmp_path):
    def people(*x):
        return [{"keypoints": [v for j in range(17) for v in (64 * at, 4 + j, 2)], "image_id": frame, "category_id": 1}
                for frame, at in x]
    frames = people((1, 0.1), (3, 0.3), (12, 0.9), (11, 0.8), (5, 0.5))
    (tmp_path / "all.json").write_text(json.dumps(frames))
    poses, _ = extras.motion.read_motion([str(tmp_path / "all.json")], canvas=(64, 64))
    assert xs(poses) == [0.1, 0.2, 0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.9]
    named = [{"keypoints": [64 * at, 9, 2] * 17 if at else [0] * 51, "image_id": f"{name}.png", "category_id": 1}
             for name, at in (("c", 0.4), ("a", 0.2), ("b", None))]        # no numbers, but it says that b is a frame
    (tmp_path / "named.json").write_text(json.dumps(named))
    assert xs(extras.motion.read_motion([str(tmp_path / "named.json")], canvas=(64, 64))[0]) == [0.2, 0.3, 0.4]
    folder = tmp_path / "two"
    folder.mkdir()
    for i, who in enumerate([(0.1, 0.5), (0.1,), (0.1, 0.7)]):
        (folder / f"{i}.json").write_text(json.dumps(people(*((i, at) for at in who))))
    assert xs(extras.motion.read_motion([str(folder)], canvas=(64, 64), person=2)[0]) == [0.5, 0.6, 0.7]


def test_a_motion_has_one_noise_and_becomes_a_sheet_and_a_moving_picture(go, tmp_path):
    folder = walk(tmp_path / "walk", {1: 0.3, 2: 0.4, 3: None, 4: 0.6})
    drawn = go("--motion", "walk", "--fps", "7", "--seed", "3", "--out", "walk.webp")
    assert len(drawn) == 4 and Image.open("walk.png").size[0] > 4 * 32
    with Image.open("walk.webp") as moving:
        frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(moving)]
    poses, _ = extras.motion.read_motion([str(folder)])
    for frame, picture, pose in zip(frames, drawn, poses, strict=True):
        assert np.array_equal(frame[::5, ::5], np.concatenate([sample.draw(pose, 32), picture], axis=1))
    json.dump(poses[0].tolist(), open("first.json", "w"))
    json.dump(poses[3].tolist(), open("last.json", "w"))
    first, final = go("first.json", "last.json", "-n", "1", "--seed", "3")      # the same seed 3 for both
    np.testing.assert_allclose(drawn[[0, 3]].astype(int), [first, final], atol=1)


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_a_moving_picture_keeps_time(tmp_path, suffix):
    frames, ends, greys = [np.full((8, 8, 3), 9 * i, np.uint8) for i in range(25)], [], []
    plots.save_animation(tmp_path / f"a{suffix}", frames, fps=12)
    with Image.open(tmp_path / f"a{suffix}") as moving:
        assert moving.n_frames == 25 and moving.info["loop"] == 0 and moving.size == (160, 160)
        for i in range(25):
            moving.seek(i)
            greys.append(np.asarray(moving.convert("L")).mean())            # which also loads it, and its duration
            ends.append(moving.info["duration"])
    assert np.abs(np.cumsum(ends) - 1000 * np.arange(1, 26) / 12).max() <= 5
    np.testing.assert_allclose(greys, [9 * i for i in range(25)], atol=1)


# ------------------------------------------------------------------------------------------------ what is written

@pytest.mark.parametrize("flags, sampler, steps", [
    ([], "dpm_solver", 20), (["--sampler", "ddim"], "ddim", 50), (["--sampler", "dpm_solver"], "dpm_solver", 20),
    (["--init", "x.png"], "dpm_solver", 20), (["--noise-from", "x.png"], "ddim", 50),
    (["--steps", "7"], "dpm_solver", 7), (["--inpaint", "x.png", "--mask", "y.png"], "ddim", 50),
    (["--preset", "danbooru", "--steps", "500"], "ddim", 500)])
def test_the_sampler_and_its_steps_where_nobody_says(tmp_path, monkeypatch, flags, sampler, steps):
    monkeypatch.chdir(tmp_path)
    args = sample.parse_args([WAVING, "--ckpt", "x.pt", *flags])
    sample.check_args(args)
    spacing = "uniform" if args.preset else "even"                      # the reference's, for what was published
    sample.ask_model(args, SimpleNamespace(spacing=spacing, guidance=3.0, eta=1.0, knows_null=True))
    assert (args.sampler, args.steps) == (sampler, steps)
    assert args.spacing == ("lambda" if sampler == "dpm_solver" else spacing)


def test_half_precision_is_in_the_network_alone(go, ckpt, monkeypatch):
    seen = []
    forward = UNet.forward
    monkeypatch.setattr(UNet, "forward", lambda unet, x, *args: seen.append(x.dtype) or
                        forward(unet, x, *args))
    go(WAVING, "--seed", "3", "--save-latents", "a.npz")
    go(WAVING, "--seed", "3", "--amp", "bf16", "--save-latents", "b.npz")
    assert set(seen) == {torch.float32, torch.bfloat16}
    with np.load("a.npz") as a, np.load("b.npz") as b:
        assert b["latents"].dtype == np.float32
        assert 0 < np.abs(a["latents"] - b["latents"]).mean() < 0.05 * np.abs(a["latents"]).mean()
    assert sample.main(["--repeat", "samples.png"]) == 0                     # the second, in bf16 again
    assert np.array_equal(np.asarray(Image.open("again.png")), np.asarray(Image.open("samples.png")))


def test_a_film_ends_at_the_sample_and_begins_at_noise(go):
    film, plain = go(WAVING, KICKING, "-n", "2", "--film", steps="20"), go(WAVING, KICKING, "-n", "2", steps="20")
    assert len(film["rows"]) == 2 * len(plain) and film["columns"][1] == "step 1, t = 999"
    assert film["columns"][-1] == "step 20, t = 0" and len(film["columns"]) == 1 + sample.FILM
    for i, picture in enumerate(plain):
        x, x0 = film["rows"][2 * i][1:], film["rows"][2 * i + 1][1:]
        assert np.array_equal(x[-1], picture) and np.array_equal(x0[-1], picture)
        far = [[np.abs(cell.astype(float) - picture).mean() for cell in row] for row in (x, x0)]
        assert far[0][0] > far[0][4] > far[0][-1] and far[1][4] > 0


def test_latents_are_plain_arrays_that_decode_to_the_pictures(go, ckpt):
    drawn = go("--morph", WAVING, KICKING, "--frames", "3", "--seed", "4", "--save-latents", "deep/z.npz")
    with np.load("deep/z.npz", allow_pickle=False) as arrays:
        assert arrays["seeds"].tolist() == [4, 4, 5] and arrays["seeds_toward"].tolist() == [4, 5, 5]
        assert arrays["share"].tolist() == [0, 0.5, 0] and arrays["poses"].shape == (3, 17, 3)
        assert np.array_equal(sample.decode(checkpoint.load_ldm(ckpt)[0], torch.from_numpy(arrays["latents"])), drawn)
    go(WAVING, "-n", "3", "--seed", "4", "--save-latents", "z.npz")
    with np.load("z.npz", allow_pickle=False) as arrays:
        assert set(arrays.files) == {"latents", "poses", "seeds"} and arrays["seeds"].tolist() == [4, 5, 6]


def test_separate_pictures_are_those_of_the_sheet_and_each_can_be_drawn_again(go, monkeypatch, capsys):
    monkeypatch.setattr(sample, "BATCH", 4)
    drawn = go(WAVING, KICKING, "-n", "3", "--separate", "each")
    files = sorted(Path("each").iterdir())
    assert [file.name for file in files[:4]] == ["0001-waving.png", "0002-waving.png", "0003-waving.png",
                                                 "0004-kicking.png"]
    for file, picture in zip(files, drawn, strict=True):
        assert np.array_equal(np.asarray(Image.open(file)), picture)
    for file in (files[1], files[5]):               # of the first batch and of the second, which has two
        assert sample.main(["--repeat", str(file)]) == 0
        assert "bit for bit" in capsys.readouterr().out
        assert np.array_equal(np.asarray(Image.open("again.png")), np.asarray(Image.open(file)))


def test_the_sheet_can_be_left_out_where_something_else_is_written(go, ckpt, capsys):
    go(WAVING, "-n", "2", "--separate", "each", "--no-grid")
    assert len(list(Path("each").iterdir())) == 2 and not Path("samples.png").exists()
    go("--morph", WAVING, KICKING, "--frames", "2", "--no-grid")
    assert Path("samples.gif").exists() and not Path("samples.png").exists()
    one_sentence(capsys, [WAVING, "--ckpt", ckpt, "--no-grid"], "--no-grid", "--separate")


def test_the_model_that_ships_draws_until_one_is_trained(ckpt, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shipped = tmp_path / "shipped.pt"
    checkpoint.save(shipped, checkpoint.slim(checkpoint.load(ckpt, "ldm")))
    monkeypatch.setattr(sample, "SHIPPED", shipped)
    assert sample.default_ckpt() == "shipped.pt" and "there is no runs/ldm/last.pt yet" in capsys.readouterr().out
    Path("runs/ldm").mkdir(parents=True)
    shutil.copy(ckpt, "runs/ldm/last.pt")
    assert sample.default_ckpt() == "runs/ldm/last.pt" and not capsys.readouterr().out


# ------------------------------------------------------------------------------------------- the same picture again

@pytest.mark.parametrize("flags", [
    ["-n", "3", "--seed", "11", "--eta", "0.5", "--guidance", "0"],
    ["--sampler", "dpm_solver", "--interval", "100", "900", "--rescale", "0.5"], ["--spacing", "lambda"],
    ["--init", "figure.png", "--strength", "0"],
    ["--inpaint", "figure.png", "--mask", "mask.png", "--rounds", "2"], ["--noise-from", "figure.png"],
    ["--morph", "--frames", "5"], ["--motion"], ["--film", "--no-ema"]])
def test_a_picture_is_drawn_again_bit_for_bit_without_its_pose_files(go, picture, tmp_path, capsys, flags):
    mask = np.zeros((32, 32), np.uint8)
    mask[8:20, 8:20] = 255
    Image.fromarray(mask).save("mask.png")
    for file in (WAVING, KICKING):
        shutil.copy(file, tmp_path)
    go("waving.json", "kicking.json", *flags, "--out", "first.png")
    Path("waving.json").unlink()
    Path("kicking.json").unlink()
    capsys.readouterr()
    assert sample.main(["--repeat", "first.png", "--out", "second.png"]) == 0
    assert "the same as first.png, bit for bit" in capsys.readouterr().out
    assert np.array_equal(np.asarray(Image.open("first.png")), np.asarray(Image.open("second.png")))
    assert json.loads(Image.open("first.png").info["record"]) == json.loads(Image.open("second.png").info["record"])
    assert Image.open("first.png").info["command"].startswith("sample.py waving.json kicking.json ")


def one_sentence(capsys, argv: list[str], *expected: str) -> None:
    capsys.readouterr()
    code, captured = sample.main(argv), capsys.readouterr()
    assert code == 2 and captured.err.startswith("sample.py: ") and captured.err.count("\n") == 1, captured.err
    for word in expected:
        assert word in captured.err, captured.err


def rewritten(source: str, target: str, change) -> str:
    """A PNG whose record was changed by somebody."""
    with Image.open(source) as image:
        record = json.loads(image.info["record"])
        text = change(record)
        text = text if isinstance(text, str) else json.dumps(record)
        plots.save_picture(target, image.convert("RGB"), {"record": text})
    return target


def test_repeat_needs_the_files_it_was_made_of(go, ckpt, picture, capsys):
    go(WAVING, "--init", picture, "--out", "first.png")
    payload = torch.load(ckpt, weights_only=True)
    payload["unet"] = {name: tensor + 1e-4 for name, tensor in payload["unet"].items()}
    checkpoint.save("trained_on.pt", payload)
    one_sentence(capsys, ["--repeat", "first.png", "--ckpt", "trained_on.pt"], "hash", "trained_on.pt", "--ckpt")
    one_sentence(capsys, ["--repeat", "first.png", "--ckpt", "none.pt"], "none.pt, which is gone", "--ckpt")
    rewritten("first.png", "moved.png", lambda record: record["flags"].update(ckpt="moved.pt"))
    one_sentence(capsys, ["--repeat", "moved.png"], "moved.pt, which is gone", "--ckpt")
    shutil.copy(ckpt, "renamed.pt")
    assert sample.main(["--repeat", "moved.png", "--ckpt", "renamed.pt", "--out", "a.png"]) == 0
    Path(picture).rename("elsewhere.png")
    one_sentence(capsys, ["--repeat", "first.png"], "--init", "gone")
    assert sample.main(["--repeat", "first.png", "--init", "elsewhere.png"]) == 0
    assert "bit for bit" in capsys.readouterr().out
    Image.fromarray(np.asarray(Image.open("elsewhere.png"))[:, ::-1]).save(picture)
    one_sentence(capsys, ["--repeat", "first.png"], "other pixels", "figure.png")


@pytest.mark.parametrize("change", [
    lambda r: "{", lambda r: "[]", lambda r: "[" * 100000, lambda r: "9" * 5000, lambda r: r.update(format=2),
    lambda r: r.pop("poses"), lambda r: r.update(poses=[[[9e99, 0, 1]] * 17]), lambda r: r.update(poses=[]),
    lambda r: r["poses"][0][0].__setitem__(0, math.nan), lambda r: r["poses"][0][0].__setitem__(2, 0.5),
    lambda r: r["poses"][0].pop(), lambda r: r.update(poses=[[["a", 0, 1]] * 17]), lambda r: r["seeds"].pop(),
    lambda r: r.update(seeds=[-1, 2]), lambda r: r.update(seeds=[True, 2]), lambda r: r.update(seeds=[[1, 2, 7.0], 3]),
    lambda r: r.update(seeds=["1", "2"]), lambda r: r.update(n=0), lambda r: r.update(n=True),
    lambda r: r.update(names=["\x1b[31m"]), lambda r: r.update(names=[["a"]]), lambda r: r.update(only=2),
    lambda r: r["flags"].update(steps="6"), lambda r: r["flags"].update(steps=6.0), lambda r: r["flags"].pop("ckpt"),
    lambda r: r["flags"].update(interval=[1]), lambda r: r["flags"].update(interval=[1, 2.0]),
    lambda r: r["flags"].update(interval="12"), lambda r: r["flags"].update(rescale=[0.5]),
    lambda r: r["flags"].update(sampler=["ddim"]), lambda r: r["flags"].update(sampler="evil"),
    lambda r: r["flags"].update(out="/tmp/evil.png"),
    lambda r: r["flags"].update(separate="evil"), lambda r: r["flags"].update(save_latents="evil.npz"),
    lambda r: r["flags"].update(device="cuda"), lambda r: r["flags"].update(ckpt="//server/share/x.pt"),
    lambda r: r["flags"].update(ckpt="\\\\server\\x.pt"), lambda r: r["flags"].update(ckpt="a\0b"),
    lambda r: r.update(flags=[]), lambda r: r.update(checkpoint=5), lambda r: r.update(torch="\n\n"),
])
def test_what_a_png_says_is_data_and_every_field_is_checked(go, capsys, change, tmp_path):
    go(WAVING, "--out", "first.png")
    rewritten("first.png", "bad.png", change)
    before = sorted(tmp_path.rglob("*"))
    one_sentence(capsys, ["--repeat", "bad.png", "--out", "second.png"], "bad.png", "damaged")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("change, words", [
    (lambda r: r["flags"].update(steps=10 ** 9), ["1000"]), (lambda r: r["flags"].update(eta=5.0), ["eta"]),
    (lambda r: r["flags"].update(guidance=math.inf), ["--guidance"]),
    (lambda r: r["flags"].update(interval=[5, 4]), ["--interval"]),
    (lambda r: r["flags"].update(rescale=math.nan), ["--rescale"]),
    (lambda r: r["flags"].update(morph=True), ["--film"]), (lambda r: r["flags"].update(fps=1.0), ["--fps"]),
    (lambda r: r["flags"].update(init="gone.png"), ["gone.png", "gone"]),
    (lambda r: r["flags"].update(ckpt="/dev/zero"), ["/dev/zero"]),
])
def test_values_out_of_a_png_are_checked_as_typed_ones_are(go, capsys, change, words):
    go(WAVING, "--film", "--out", "first.png")
    rewritten("first.png", "bad.png", change)
    one_sentence_at_the_end(capsys, ["--repeat", "bad.png", "--out", "second.png"], *words)
    assert not Path("second.png").exists()


def test_a_record_need_not_say_what_has_a_default(go, capsys):
    go(WAVING, "--out", "first.png")
    rewritten("first.png", "less.png", lambda r: r.update(flags={"ckpt": r["flags"]["ckpt"]}))
    assert sample.main(["--repeat", "less.png"]) == 0 and "not quite the same" in capsys.readouterr().out


def one_sentence_at_the_end(capsys, argv: list[str], *expected: str) -> None:
    """Where a progress bar stands before it."""
    capsys.readouterr()
    code, captured = sample.main(argv), capsys.readouterr()
    final = captured.err.splitlines()[-1]
    assert code == 2 and "Traceback" not in captured.err and final.startswith("sample.py: ")
    assert all(word in final for word in expected), final


def test_repeat_takes_all_from_the_file_and_only_from_such_files(go, picture, capsys):
    go(WAVING, "--out", "first.png")
    one_sentence(capsys, ["--repeat", "first.png", "--steps", "9"], "--steps")
    one_sentence(capsys, ["--repeat", "first.png", WAVING], "POSE")
    one_sentence(capsys, ["--repeat", "first.png", "--init", picture], "without --init")
    one_sentence(capsys, ["--repeat", "first.png", "--out", "./first.png"], "--out")
    one_sentence(capsys, ["--repeat", picture], "does not say how")
    one_sentence(capsys, ["--repeat", "none.png"], "none.png")
    one_sentence(capsys, ["--repeat", WAVING], "waving.json")
    Image.open("first.png").save("first.jpg")
    one_sentence(capsys, ["--repeat", "first.jpg"], "PNG")


def test_words_survive_in_a_png_and_no_other_format_is_troubled(tmp_path):
    for name in ("a.png", "a.PNG", "a.jpg", "a.webp"):
        plots.save_picture(tmp_path / name, np.zeros((4, 4, 3), np.uint8), {"record": "x" * (3 << 20)})
        text = Image.open(tmp_path / name).info.get("record")
        assert text == ("x" * (3 << 20) if name.lower().endswith("png") else None)


# -------------------------------------------------------------------------------------------------------- mistakes

@pytest.mark.parametrize("flags, words", [
    (["--init", "figure.png", "--inpaint", "figure.png"], ["--init and --inpaint"]),
    (["--init", "figure.png", "--noise-from", "figure.png"], ["--init and --noise-from"]),
    (["--morph", "--motion"], ["--morph and --motion"]), (["--film", "--motion"], ["--film and --motion"]),
    (["--morph", "--film"], ["--film and --morph"]), (["--morph", "--noise-from", "figure.png"], ["--noise-from"]),
    (["--strength", "0.5"], ["--strength", "--init"]), (["--mask", "figure.png"], ["--mask", "--inpaint"]),
    (["--rounds", "2"], ["--rounds", "--inpaint"]), (["--fps", "5"], ["--fps", "--motion"]),
    (["--inpaint", "figure.png"], ["--mask"]), (["--init", "figure.png", "--strength", "1.5"], ["--strength", "1.5"]),
    (["--init", "figure.png", "--strength", "nan"], ["--strength", "nan"]), (["--init", "none.png"], ["none.png"]),
    (["--init", "."], ["folder"]), (["--init", WAVING], ["waving.json"]),
    (["--inpaint", "figure.png", "--mask", "wide.png"], ["64 x 32", "32 x 32"]),
    (["--inpaint", "figure.png", "--mask", "black.png"], ["no white"]),
    (["--inpaint", "figure.png", "--mask", "figure.png", "--rounds", "0"], ["--rounds", "0"]),
    (["--inpaint", "figure.png", "--mask", "figure.png", "--sampler", "ddpm"], ["--inpaint", "ddim"]),
    (["--inpaint", "figure.png", "--mask", "figure.png", "--sampler", "dpm_solver"], ["--inpaint", "ddim"]),
    (["--noise-from", "figure.png", "--sampler", "dpm_solver"], ["--noise-from", "ddim"]),
    (["--noise-from", "figure.png", "-n", "2"], ["--noise-from", "-n"]),
    (["--noise-from", "figure.png", "--eta", "1"], ["--noise-from", "--eta"]),
    (["--morph"], ["--morph", "waving"]), (["--morph", "--frames", "1"], ["--frames is 1", "--morph"]),
    (["--motion"], ["--motion", "two frames"]), (["--motion", "--fps", "0"], ["--fps"]),
    (["--save-latents", "z.pt"], ["--save-latents", ".npz"]), (["--out", "x.gif"], [".png"]),
    (["--amp", "fp16"], ["--amp fp16", "CUDA"]),
    (["--out", "folder.png"], ["folder.png", "is a folder"]),
    (["--separate", "figure.png"], ["--separate figure.png", "is a file"]),
    (["--save-latents", "/proc/none/z.npz"], ["/proc/none"]), (["-n", "200", "--film", "--out", "x.webp"], ["16383"]),
    (["--common", "2", "--motion"], ["--common"]),
    (["--film", "--no-grid", "--separate", "x"], ["--film", "--no-grid"]),
    (["--amp", "fp16", "--device", "cpu:0"], ["--amp fp16", "CUDA"]),
    (["--interval", "5000", "6000"], ["--interval is 5000", "999"]),
    (["--rescale", "0.7", "--guidance", "1"], ["--rescale", "--guidance is 1"]),
    (["--interval", "300", "700", "--guidance", "0"], ["--interval", "--guidance is 0"]),
    (["-n", "140", "--out", "w.webp"], ["141 would be", "16383"]),
    (["--morph", KICKING, "--frames", "3", "-n", "400", "--out", "m.webp", "--no-grid"], ["m.webp", "16383"]),
    (["--init", "figure.png", "--out", "./figure.png"], ["--out is figure.png", "lost"]),
    (["--noise-from", "figure.png", "--out", "figure.png"], ["--out is figure.png", "lost"]),
])
def test_a_mistake_is_one_sentence_before_anything_is_drawn(go, ckpt, picture, monkeypatch, capsys, flags, words):
    Path("folder.png").mkdir()
    Image.new("L", (64, 32), 255).save("wide.png")
    Image.new("L", (32, 32)).save("black.png")

    def never(*args, **how):
        raise AssertionError("something was drawn")
    monkeypatch.setattr(sample, "denoise", never)
    one_sentence(capsys, [WAVING, "--ckpt", ckpt, *flags], *words)


@pytest.mark.parametrize("flag, value", [("--canvas", "640x480"), ("--person", "7"), ("--format", "yolo"),
                                         ("--frames", "3")])
def test_common_poses_come_from_no_file(ckpt, capsys, flag, value):
    one_sentence(capsys, ["--ckpt", ckpt, "--common", "1", flag, value], "--common", flag)


@pytest.mark.parametrize("P, n, given", [(1, 1, True), (3, 2, False), (16, 1, True), (700, 3, True)])
def test_the_shape_of_a_sheet_is_known_before_it_is_drawn(P, n, given):
    plan = extras.motion.Plan(np.zeros((P, 17, 3)), ["a"] * P, list(range(P * n)), n)
    pictures = [np.zeros((4, 4, 3), np.uint8)] * (P * n)
    for layout, motion in ((sample.grid_of, False), (sample.sheet_of, True)):
        rows = layout(plan, pictures, pictures[0] if given else None)["rows"]
        args = SimpleNamespace(film=False, motion=motion, morph=False)
        height, width = sample.shape_of_sheet(args, plan, given)
        assert len(rows) == height and max(map(len, rows)) == min(width, P + given if motion else width)


def test_too_little_memory_is_one_sentence(go, ckpt, monkeypatch, capsys):
    def full(*args, **how):
        torch.empty(1 << 60)
    monkeypatch.setattr(sample, "denoise", full)
    one_sentence(capsys, [WAVING, "--ckpt", ckpt, "--device", "cpu"], "memory of cpu", "fewer")


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT there")
def test_ctrl_c_is_one_line(ckpt, tmp_path):
    process = subprocess.Popen([sys.executable, str(ROOT / "sample.py"), WAVING, "--ckpt", ckpt, "--sampler", "ddpm",
                                "-n", "8", "--device", "cpu", "--out", str(tmp_path / "x.png")],
                               stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    said = ""
    while "step/s" not in said:
        said += process.stderr.read(1)
    process.send_signal(signal.SIGINT)
    said += process.stderr.read()
    assert process.wait(60) == 130 and "Traceback" not in said and said.endswith("sample.py: interrupted\n")
    assert not (tmp_path / "x.png").exists()


def test_a_check_of_the_place_to_write_leaves_nothing_and_spoils_nothing(tmp_path):
    (tmp_path / "old.png").write_text("old")
    for name in ("old.png", "new/new.png"):
        sample.check_writable(tmp_path / name, "--out x")
    assert (tmp_path / "old.png").read_text() == "old" and not (tmp_path / "new/new.png").exists()


def test_poses_may_stand_on_both_sides_of_a_flag():
    assert sample.parse_args(["a.json", "--morph", "b.json", "--frames", "3", "c.json"]).poses == ["a.json", "b.json",
                                                                                                    "c.json"]
