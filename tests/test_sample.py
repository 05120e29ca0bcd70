"""sample.py: tricks against closed forms on Gaussian data and identities on a small model."""
import json
import math
import os
import shlex
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from test_diffusion import exact_eps
from test_train import MICRO, ROOT, as_micro, command

import checkpoint
import data
import plots
import sample
import train
from dataset.figures import Figures
from diffusion import Diffusion, ddim, ddim_table, ddpm, dpm_solver, log_snr, per_image_noise, slerp
from extras import editing
from extras.editing import inpaint, invert
from extras.plan import LONGEST_GAP, frame_numbers, morph, plan_of, read_motion, read_poses
from formats.pose_files import fitted, load_poses
from keypoints import draw
from unet import UNet
from vq import VQModel

WAVING, KICKING = (str(ROOT / f"examples/poses/{name}.json") for name in ("waving", "kicking"))
SPREAD = 0.5            # standard deviation of the Gaussian data


# -------------------------------------------------------------------------------- the mathematics

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
        eps_fn = exact_eps(diffusion, SPREAD)
        if sampler == "ddpm":
            return list(ddpm(diffusion, eps_fn, x, noise_fn, skip))
        return list(ddim(diffusion, eps_fn, x, 20, 0.7, noise_fn, skip=skip))
    whole = run(x_T, 0)
    tail = run(whole[6].x, 7)
    assert [(step.i, step.t) for step in tail] == [(step.i, step.t) for step in whole[7:]]
    assert all(torch.equal(a.x, b.x) for a, b in zip(tail, whole[7:], strict=True))


@pytest.mark.parametrize("sampler, steps, spacing",
                         [(ddim, 500, "even"), (dpm_solver, 50, "lambda")])
def test_an_image_to_start_from_keeps_the_share_of_the_closed_form(sampler, steps, spacing):
    """Data N(0, s^2): the flow from t to 0 multiplies by s / sqrt(v), v = ab s^2 + 1 - ab.

    So sqrt(ab) s / sqrt(v) of x0 remains, and sqrt(1 - ab) s / sqrt(v) of the noise.
    """
    diffusion = Diffusion()
    timesteps, alpha_bar, *_ = ddim_table(diffusion, steps, 0, spacing)
    for skip in (steps // 5, steps // 2, steps * 4 // 5):
        t, ab = int(timesteps[-1 - skip]), alpha_bar[-1 - skip]
        v = ab * SPREAD ** 2 + 1 - ab
        x0, noise = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        x_t = diffusion.q_sample(x0, torch.tensor([t]), noise)
        eps_fn = exact_eps(diffusion, SPREAD)
        got = last(sampler(diffusion, eps_fn, x_t, steps, spacing=spacing, skip=skip))[0]
        wanted = torch.tensor([ab ** 0.5, (1 - ab) ** 0.5]) * SPREAD / v ** 0.5
        torch.testing.assert_close(got.double(), wanted.double(), rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("how", ["ddim 0", "ddim 1", "ddpm", "dpm_solver 0", "dpm_solver 1"])
def test_the_kept_part_comes_out_as_given_and_the_rest_as_without(diffusion, how):
    """The pixels of this data are independent, so the rest must be that of a plain run."""
    x_T, noise_fn = per_image_noise([1, 2], (1, 4, 4))
    x0, known = torch.randn(1, 1, 4, 4), torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    known[..., :2] = True
    eps_fn = exact_eps(diffusion, SPREAD)

    def run(eps_fn):
        if how == "ddpm":
            return list(ddpm(diffusion, eps_fn, x_T, noise_fn))
        sampler = ddim if how.startswith("ddim") else dpm_solver
        return list(sampler(diffusion, eps_fn, x_T, 50, float(how[-1]), noise_fn))
    kept, plain = run(inpaint(diffusion, eps_fn, x0, known)), run(eps_fn)
    wanted = x0.expand(2, 1, 4, 4)[..., :2]
    torch.testing.assert_close(kept[-1].x[..., :2], wanted, atol=1e-5, rtol=0)
    assert torch.equal(kept[-1].x[..., 2:], plain[-1].x[..., 2:])
    if how.endswith(" 0"):                # on the way it is x0 with the same noise, as in (4)
        noise = diffusion.predict_eps(x_T, torch.full((2,), 999), x0)
        for step, after in zip(kept[:-1], kept[1:], strict=True):
            noisy = diffusion.q_sample(x0, torch.full((2,), after.t), noise)
            torch.testing.assert_close(step.x[..., :2], noisy[..., :2], atol=1e-4, rtol=0)


def test_more_rounds_of_repaint_fit_the_rest_to_the_kept_part(diffusion):
    """Two pixels of variance 1 and covariance rho: given a, the other's mean is rho a.

    Everything is linear, so the mean of the samples is the sample without noise.
    """
    rho = 0.8
    covariance = torch.tensor([[1, rho], [rho, 1]], dtype=torch.float64)

    def eps_fn(x, t):
        ab = diffusion.alphas_bar[int(t[0])]
        inverse = torch.linalg.inv(ab * covariance + (1 - ab) * torch.eye(2))
        return x @ ((1 - ab).sqrt() * inverse).float().T
    x0, known, off = torch.tensor([[1.0, 0.0]]), torch.tensor([[True, False]]), []
    for rounds in (1, 2, 5, 20):
        x = last(ddim(diffusion, inpaint(diffusion, eps_fn, x0, known), torch.zeros(1, 2), 50, 1.0,
                      lambda i, x: torch.zeros_like(x), rounds=rounds))
        off.append(rho - x[0, 1].item())
    assert off == sorted(off, reverse=True) and off[0] > 0.25 and abs(off[-1]) < 0.05, off


def test_dpm_solver_that_starts_midway_extrapolates_from_the_second_step_on(diffusion):
    """The new x tells which D was used: with eta 0, x_s = sqrt(ab_s) D + sqrt(1 - ab_s) eps(D)."""
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


def test_the_noise_of_every_round_is_new(diffusion):
    seen, eps_fn = [], exact_eps(diffusion, SPREAD)
    list(ddim(diffusion, eps_fn, torch.zeros(1, 2), 4, 1.0,
              lambda i, x: seen.append(i) or torch.zeros_like(x), rounds=3))
    assert len(seen) == len(set(seen)) == 4 * 3 - 3 + 4 * 2        # the last step adds none


@pytest.mark.parametrize("spacing", ["even", "uniform"])
def test_inversion_is_the_closed_form_and_ddim_undoes_it(diffusion, spacing):
    """eps = c_t x, so a step multiplies by a + (sqrt(1 - ab_s) - a sqrt(1 - ab)) c_t."""
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
        wanted = 3 * torch.tensor([math.cos(angle), math.sin(angle), 0])
        torch.testing.assert_close(slerp(a, b, share), wanted)
    a, b = torch.randn(2, 3, 8, 8)
    b *= a.norm() / b.norm()
    for share in (0.1, 0.5, 0.7):
        assert slerp(a, b, share).norm().item() == pytest.approx(a.norm().item(), rel=1e-5)
    assert torch.equal(slerp(a, b, 0.0), a) and torch.equal(slerp(a, b, 1.0), b)
    torch.testing.assert_close(slerp(a, a, 0.3), a)


def test_noise_between_two_seeds_starts_and_ends_at_theirs_in_every_step():
    seeds = [5, (5, 6, 0.0), (5, 6, 1.0), (5, 6, 0.5), 6]
    x_T, noise_fn = per_image_noise(seeds, (3, 4, 4))
    for x in (x_T, noise_fn(0, x_T), noise_fn(7, x_T)):
        assert torch.equal(x[0], x[1]) and torch.equal(x[2], x[4])
        assert torch.equal(x[3], slerp(x[0], x[4], 0.5))
        assert not torch.allclose(x[3], x[0], atol=0.1)


# ------------------------------------------------------------------------------------- the images

@pytest.fixture(scope="module")
def ckpt(tmp_path_factory) -> str:
    """A model of 32 pixels whose stage 2 was trained for seconds.

    Its stage 1 is random, with codes from its own outputs and a decoder of high contrast: trained
    for seconds it would draw one colour.
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
        flags = ["--steps", "60", "--vq", str(root / "vq/last.pt")]
        assert train.main(command("ldm", root / "ldm", *flags)) == 0
    return str(root / "ldm/last.pt")


@pytest.fixture
def figure(tmp_path) -> str:
    Image.fromarray(np.asarray(Figures(3, 32).source(1)[0])).save(tmp_path / "figure.png")
    return str(tmp_path / "figure.png")


@pytest.fixture
def go(ckpt, tmp_path, monkeypatch, capsys):
    """Runs sample.py in tmp_path -> the images of --separate, uint8 [B, 32, 32, 3]."""
    monkeypatch.chdir(tmp_path)

    def run(*flags: str, steps: str | None = "6") -> np.ndarray:
        shutil.rmtree("each", ignore_errors=True)
        how = ["--ckpt", ckpt, "--device", "cpu", "--separate", "each"]
        how += ["--steps", steps] if steps else []
        assert sample.main([*how, *flags]) == 0, capsys.readouterr().err
        return np.stack([np.asarray(Image.open(file)) for file in sorted(Path("each").iterdir())])
    return run


def open_given(ldm, *flags: str, size: int = 32) -> tuple:
    """The parsed command and the image it starts from."""
    args = sample.parse_args([WAVING, *flags])
    return args, editing.read_given(args, ldm, size)


@pytest.mark.parametrize("sampler", ["ddim", "dpm_solver", "ddpm"])
def test_init_goes_from_the_image_to_plain_sampling(go, ckpt, figure, sampler):
    """Distances of latents, in RMS: of images in 8 bits they round away."""
    payload = torch.load(ckpt, weights_only=True)
    payload["schedule"]["timesteps"] = 40                   # all of them are ddpm's steps
    checkpoint.save("short.pt", payload)
    flags = [WAVING, "-n", "1", "--sampler", sampler, "--save-latents", "z.npz"]
    flags += ["--ckpt", "short.pt"] if sampler == "ddpm" else ["--steps", "20"]
    z = open_given(checkpoint.load_ldm(ckpt)[0], "--init", figure)[1].z.numpy()

    def far(strength):
        go(*flags, "--init", figure, "--strength", strength, steps=None)
        return np.sqrt(np.square(np.load("z.npz")["latents"] - z).mean())
    distances = [far(s) for s in ("0", "0.2", "0.8", "1")]
    from_the_image = np.load("z.npz")["latents"]
    go(*flags, steps=None)
    assert np.array_equal(from_the_image, np.load("z.npz")["latents"])
    assert distances[0] < 0.1 < distances[1] < distances[2] / 2 < distances[3] / 4, distances


@pytest.mark.parametrize("spacing, sampler",
                         [("even", "ddim"), ("lambda", "dpm_solver"), ("uniform", "ddim")])
def test_strength_is_the_first_timestep_in_any_spacing(ckpt, figure, spacing, sampler):
    """And the noise added to the image is that of this timestep."""
    ldm, _ = checkpoint.load_ldm(ckpt)
    ldm.spacing = "uniform" if spacing == "uniform" else "even"
    T, diffusion = ldm.schedule["timesteps"], Diffusion(**ldm.schedule)
    poses = torch.zeros(2, 17, 3)
    how = sample.settings(ldm, sampler, 20, 0.0, 1.0)
    for strength in (0.2, 0.6, 0.9):
        args, given = open_given(ldm, "--init", figure, "--strength", f"{strength}",
                                 "--steps=20", "--sampler", sampler)
        start = editing.start_from(given, args, ldm, sample.visited(ldm, sampler, 20), poses[:1])
        timesteps = ddim_table(diffusion, 20, 0, spacing)[0][::-1]
        skip = start["skip"]
        assert timesteps[skip] < strength * T <= timesteps[skip - 1]
    got = list(sample.sample(ldm, poses, [3, 4], 32, **how, **start))
    assert [step.t for step in got] == timesteps[skip:].tolist()
    noise, t = per_image_noise([3, 4], (3, 8, 8))[0], torch.tensor([timesteps[skip]])
    x_t = diffusion.q_sample(given.z, t, noise)
    x0 = diffusion.predict_x0(x_t, t, ldm(x_t, t.expand(2), poses))
    torch.testing.assert_close(got[0].x0, x0)


@pytest.mark.parametrize("rounds", [1, 3])
def test_inpainting_changes_nothing_outside_its_mask(go, ckpt, figure, monkeypatch, rounds):
    monkeypatch.setattr(editing, "REPAINT", rounds)
    mask = np.zeros((32, 32), np.uint8)
    mask[5:18, 9:20] = 255
    Image.fromarray(mask).save("mask.png")
    ldm, _ = checkpoint.load_ldm(ckpt)
    with torch.no_grad():                               # the image through stage 1 and back
        x_hat, *_ = ldm.vq(data.to_tensor(np.array(Image.open(figure)))[None])
    given = data.to_uint8(x_hat)[0]
    images = go(WAVING, KICKING, "--inpaint", figure, "--mask", "mask.png",
                "--save-latents", "z.npz", "-n", "2")
    latents = torch.from_numpy(np.load("z.npz")["latents"])
    decoded = sample.decode(ldm, latents)
    for image, whole in zip(images, decoded, strict=True):
        assert np.array_equal(image[mask == 0], given[mask == 0])
        assert np.array_equal(image[mask > 0], whole[mask > 0])
        assert (whole[mask > 0] != given[mask > 0]).any()
    assert (np.stack(decoded)[:, mask == 0] != given[mask == 0]).any()      # latents are not enough


@pytest.mark.parametrize("ground", ["black", (0, 0, 0, 0), (255, 255, 255, 0)])
def test_a_cell_is_redrawn_if_any_of_its_pixels_is_white(ckpt, figure, tmp_path, ground):
    """And the outline is one pixel wide, around the hole. The ground may be transparent."""
    ldm, _ = checkpoint.load_ldm(ckpt)
    mask = Image.new("RGBA", (32, 32), ground)
    mask.putpixel((14, 9), (255, 255, 255, 255))
    mask.save(tmp_path / "mask.png")
    args, given = open_given(ldm, "--inpaint", figure, "--mask", str(tmp_path / "mask.png"))
    start = editing.start_from(given, args, ldm, np.arange(50), torch.zeros(1, 17, 3))
    assert (~start["known"]).nonzero().tolist() == [[0, 0, 2, 3]]
    pink = (given.shown() == editing.OUTLINE).all(axis=-1)
    around = {(y, x) for y in (8, 9, 10) for x in (13, 14, 15)} - {(9, 14)}
    assert {tuple(at) for at in np.argwhere(pink).tolist()} == around
    assert np.array_equal(given.shown()[~pink], given.image[~pink])


def test_the_noise_of_an_image_reproduces_it(go, ckpt, figure, capsys, monkeypatch):
    """The latent to 2 % in 50 steps: that is how far three iterations go with this model."""
    ldm, _ = checkpoint.load_ldm(ckpt)
    z = open_given(ldm, "--noise-from", figure)[1].z

    def error(*flags: str) -> float:
        images = go(WAVING, "--noise-from", figure, "--save-latents", "z.npz", *flags, steps="50")
        assert len(images) == 1
        back = torch.from_numpy(np.load("z.npz")["latents"])
        return ((back - z).square().mean() / z.square().mean()).sqrt().item()
    assert error("--guidance", "0") < 0.02 < error("--guidance", "3")
    checkpoint.save("bound.pt", torch.load(ckpt, weights_only=True) | {"knows_null": False})
    assert error("--ckpt", "bound.pt") < 0.02               # without a null pose: under this pose
    capsys.readouterr()
    monkeypatch.setattr(sample.LDM, "spacing", "uniform")
    go(WAVING, "--noise-from", figure)                                  # 6 steps asked for become 7
    ends = capsys.readouterr().err.split("sampling", 1)                 # a bar may end twice
    assert all("7/7" in bar and "8/" not in bar for bar in ends)


def test_a_morph_ends_at_the_plain_samples(go):
    a, b = go("--morph", WAVING, KICKING, "--frames", "2", "--seed", "7")
    plain = go(WAVING, KICKING, "-n", "2", "--seed", "7")          # rows of seeds 7 and 8
    np.testing.assert_allclose(a.astype(int), plain[0], atol=1)    # batches of 2 and 4 may differ
    np.testing.assert_allclose(b.astype(int), plain[3], atol=1)
    many = go("--morph", WAVING, KICKING, "--frames", "9", "--seed", "7")
    np.testing.assert_allclose(many[[0, -1]].astype(int), [a, b], atol=1)
    steps = np.abs(np.diff(many.astype(float), axis=0)).mean(axis=(1, 2, 3))
    assert steps.max() < np.abs(a.astype(float) - b).mean()         # no jump is the whole way


def test_poses_are_interpolated_joint_by_joint():
    poses, _ = read_poses([WAVING, KICKING])
    a, b = (pose.copy() for pose in poses)
    a[3], b[5] = 0, 0
    way, names, seeds = morph(np.stack([a, b]), ["a", "b"], 5, seed=3, n=1)
    assert np.array_equal(way[0], a) and np.array_equal(way[4], b)
    both = [j for j in range(17) if j not in (3, 5)]
    np.testing.assert_allclose(way[1][both, :2], 0.75 * a[both, :2] + 0.25 * b[both, :2])
    assert (way[1:4, [3, 5]] == 0).all() and (way[1:4, both, 2] == 1).all()
    assert seeds == [3, (3, 4, 0.25), (3, 4, 0.5), (3, 4, 0.75), 4]
    assert names == ["a", "25% to b", "50% to b", "75% to b", "b"]
    way, _, seeds = morph(np.stack([a, b, a]), ["a", "b", "c"], 5, seed=0, n=2)
    assert np.array_equal(way[2], b) and np.array_equal(way[4], a)
    assert seeds == [0, 3, (0, 1, 0.5), (3, 4, 0.5), 1, 4, (1, 2, 0.5), (4, 5, 0.5), 2, 5]


# --------------------------------------------------------------------------------------- a motion

def walk(folder: Path, frames: dict[int, float | None]) -> Path:
    """A folder of pose files with every joint at x; None is a frame without a person."""
    folder.mkdir()
    for number, x in frames.items():
        joints = [] if x is None else [[x, 0.1 + j / 20, 1] for j in range(17)]
        (folder / f"frame{number}.json").write_text(json.dumps(joints))
    return folder


def xs(poses: list[np.ndarray]) -> list[float]:
    return [round(float(pose[0, 0]), 6) for pose in poses]


def test_frames_come_in_natural_order_and_gaps_are_interpolated(tmp_path, capsys):
    folder = walk(tmp_path / "walk",
                  {0: None, 1: 0.1, 2: 0.2, 3: None, 10: 0.9, 4: 0.4, 9: None, 11: None})
    (folder / ".hidden").write_text("x")
    (folder / "frame1.png").write_text("the image of it")
    poses, names = read_motion([str(folder)])
    # 3 is empty, 5 to 8 have no file, 9 is empty: from 4 to 10 it is 0.5 / 6 a frame
    between = [round(0.4 + k * 0.5 / 6, 6) for k in range(1, 6)]
    assert xs(poses) == [0.1, 0.2, 0.3, 0.4, *between, 0.9]
    assert names[0] == "frame1" and names[-1] == "frame10"
    assert "4 frames and 6 interpolated" in capsys.readouterr().out
    assert xs(read_motion([str(folder)], frames=2)[0]) == [0.1, 0.9]


@pytest.mark.parametrize("numbers, wanted", [
    (["f3", "f4", "f6"], [0, 1, 3]), (["f0", "f5", "f15"], [0, 1, 3]),
    (["007_points", "009_points"], [0, 1]), (["run2", "jump7"], [0, 1]), (["b", "a"], [0, 1]),
    (["f4", "f3"], [0, 1]), (["f1", "f1"], [0, 1]), (["clip1 3", "clip1 4", "clip1 7"], [0, 1, 4])])
def test_frames_are_counted_by_the_number_in_their_names(numbers, wanted):
    assert frame_numbers(numbers) == wanted


def test_a_long_gap_is_left_out(tmp_path):
    gap = LONGEST_GAP
    frames = {1: 0.1, 2: 0.2, 3 + gap: 0.3, 4 + 2 * gap + 1: 0.4}
    poses, _ = read_motion([str(walk(tmp_path / "walk", frames))])
    assert len(poses) == 4 + gap and xs(poses)[-2:] == [0.3, 0.4]


def test_frames_of_one_file_and_a_person_who_is_not_in_every_frame(tmp_path):
    def people(*x):
        return [{"keypoints": [v for j in range(17) for v in (64 * at, 4 + j, 2)], "category_id": 1,
                 "image_id": frame} for frame, at in x]

    def read(path: Path, **how) -> list[float]:
        return xs(read_motion([str(path)], canvas=(64, 64), **how)[0])
    frames = people((1, 0.1), (3, 0.3), (12, 0.9), (11, 0.8), (5, 0.5))
    (tmp_path / "all.json").write_text(json.dumps(frames))
    between = [0.55, 0.6, 0.65, 0.7, 0.75]
    assert read(tmp_path / "all.json") == [0.1, 0.2, 0.3, 0.4, 0.5, *between, 0.8, 0.9]
    named = [{"keypoints": [64 * at, 9, 2] * 17 if at else [0] * 51, "image_id": f"{name}.png",
              "category_id": 1} for name, at in (("c", 0.4), ("a", 0.2), ("b", None))]
    (tmp_path / "named.json").write_text(json.dumps(named))         # no numbers, but b is a frame
    assert read(tmp_path / "named.json") == [0.2, 0.3, 0.4]
    (tmp_path / "two").mkdir()
    for i, who in enumerate([(0.1, 0.5), (0.1,), (0.1, 0.7)]):
        (tmp_path / f"two/{i}.json").write_text(json.dumps(people(*((i, at) for at in who))))
    assert read(tmp_path / "two", person=2) == [0.5, 0.6, 0.7]


def test_a_motion_has_one_noise_and_becomes_a_sheet_and_an_animation(go, tmp_path):
    folder = walk(tmp_path / "walk", {1: 0.3, 2: 0.4, 3: None, 4: 0.6})
    drawn = go("--motion", "walk", "--fps", "7", "--seed", "3", "--out", "walk.webp")
    assert len(drawn) == 4 and Image.open("walk.png").size[0] > 4 * 32
    with Image.open("walk.webp") as animation:
        frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(animation)]
    poses, _ = read_motion([str(folder)])
    for frame, image, pose in zip(frames, drawn, poses, strict=True):
        assert np.array_equal(frame[::5, ::5], np.concatenate([draw(pose, 32), image], axis=1))
    json.dump(poses[0].tolist(), open("first.json", "w"))
    json.dump(poses[3].tolist(), open("last.json", "w"))
    first, final = go("first.json", "last.json", "-n", "1", "--seed", "3")      # seed 3 for both
    np.testing.assert_allclose(drawn[[0, 3]].astype(int), [first, final], atol=1)


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_an_animation_keeps_time(tmp_path, suffix):
    frames, ends, greys = [np.full((8, 8, 3), 9 * i, np.uint8) for i in range(25)], [], []
    plots.save_animation(tmp_path / f"a{suffix}", frames, fps=12)
    with Image.open(tmp_path / f"a{suffix}") as moving:
        assert moving.n_frames == 25 and moving.info["loop"] == 0 and moving.size == (160, 160)
        for i in range(25):
            moving.seek(i)
            greys.append(np.asarray(moving.convert("L")).mean())    # this also loads the duration
            ends.append(moving.info["duration"])
    assert np.abs(np.cumsum(ends) - 1000 * np.arange(1, 26) / 12).max() <= 5
    np.testing.assert_allclose(greys, [9 * i for i in range(25)], atol=1)


# -------------------------------------------------------------------------------- what is written

@pytest.mark.parametrize("flags, spacing, wanted", [
    ([], "even", ("dpm_solver", 20, "lambda")), ([], "uniform", ("ddim", 50, "uniform")),
    (["--sampler", "ddim"], "even", ("ddim", 50, "even")),
    (["--steps", "7"], "even", ("dpm_solver", 7, "lambda")),
    (["--inpaint", "x", "--mask", "y", "--sampler", "ddpm"], "even", ("ddim", 50, "even"))])
def test_the_sampler_and_its_steps_by_default(ckpt, flags, spacing, wanted):
    """The spacing is that of the model: uniform is the reference's, for published files."""
    ldm, _ = checkpoint.load_ldm(ckpt)
    ldm.spacing = spacing
    args = sample.parse_args([WAVING, *flags])
    sample.ask_model(args, ldm)
    assert (args.sampler, args.steps, sample.spacing_of(ldm, args.sampler)) == wanted


def test_the_flags_for_pose_files_reach_the_reader(tmp_path):
    people = [{"keypoints": [v for j in range(17) for v in (x + j, 9 + j, 0.4 + j % 2)],
               "image_id": 1, "category_id": 1} for x in (10, 60)]
    (tmp_path / "two.json").write_text(json.dumps(people))
    flags = "--person 2 --canvas 128x64 --fit crop --min-confidence 0.5 --format coco-results"
    args = sample.parse_args([str(tmp_path / "two.json"), *flags.split()])
    pose, = plan_of(args, payload={}).poses
    found = load_poses(tmp_path / "two.json", "coco-results", 2, (128, 64), 0.5)
    assert np.array_equal(pose, fitted(found, 0, "crop")) and pose[:, 2].sum() == 8


def test_the_python_of_the_docstring_draws_what_the_command_draws(go, ckpt):
    ldm, payload = checkpoint.load_ldm(ckpt)
    poses, names = read_poses([KICKING])
    how = sample.settings(ldm, steps=6)
    images = sample.draw_images(ldm, torch.from_numpy(np.stack(poses)), seeds=[4],
                                  size=payload["config"]["size"], **how)
    assert names == ["kicking"] and np.array_equal(images, go(KICKING, "-n", "1", "--seed", "4"))


def test_half_precision_is_only_in_the_network(go, monkeypatch):
    seen, forward = [], UNet.forward
    monkeypatch.setattr(UNet, "forward", lambda unet, x, *args: seen.append(x.dtype) or
                        forward(unet, x, *args))
    go(WAVING, "--seed", "3", "--save-latents", "a.npz")
    go(WAVING, "--seed", "3", "--save-latents", "b.npz", "--amp", "bf16")
    assert set(seen) == {torch.float32, torch.bfloat16}
    a, b = np.load("a.npz")["latents"], np.load("b.npz")["latents"]
    assert b.dtype == np.float32 and 0 < np.abs(a - b).mean() < 0.05 * np.abs(a).mean()


def test_a_film_ends_at_the_sample_and_begins_at_noise(go, figure, monkeypatch):
    films, film_of = [], sample.film_of
    monkeypatch.setattr(sample, "film_of", lambda *args: films.append(film_of(*args)) or films[-1])
    images = go(WAVING, KICKING, "-n", "2", "--film", steps="20")
    film, = films
    assert np.array_equal(images, go(WAVING, KICKING, "-n", "2", steps="20"))
    assert len(film["rows"]) == 2 * len(images) and film["columns"][1] == "step 1, t = 999"
    assert film["columns"][-1] == "step 20, t = 0" and len(film["columns"]) == 1 + sample.FILM
    for i, image in enumerate(images):
        x, x0 = film["rows"][2 * i][1:], film["rows"][2 * i + 1][1:]
        assert np.array_equal(x[-1], image) and np.array_equal(x0[-1], image)
        far = [[np.abs(cell.astype(float) - image).mean() for cell in row] for row in (x, x0)]
        assert far[0][0] > far[0][4] > far[0][-1] and far[1][4] > 0
    go(WAVING, "--init", figure, "--strength", "0", "--film")
    assert films[-1]["columns"] == ["pose", "step 6, t = 0"]


def test_latents_are_plain_arrays_that_decode_to_the_images(go, ckpt):
    flags = ["--frames", "3", "--seed", "4", "--save-latents", "d/z.npz"]
    drawn = go("--morph", WAVING, KICKING, *flags)
    with np.load("d/z.npz", allow_pickle=False) as arrays:
        assert arrays["seeds"].tolist() == [4, 4, 5] and arrays["share"].tolist() == [0, 0.5, 0]
        assert arrays["seeds_toward"].tolist() == [4, 5, 5] and arrays["poses"].shape == (3, 17, 3)
        latents = torch.from_numpy(arrays["latents"])
        assert np.array_equal(sample.decode(checkpoint.load_ldm(ckpt)[0], latents), drawn)
    go(WAVING, "-n", "3", "--seed", "4", "--save-latents", "z.npz")
    with np.load("z.npz", allow_pickle=False) as arrays:
        assert arrays["seeds"].tolist() == [4, 5, 6] and not arrays["share"].any()


@pytest.mark.parametrize("flags", [["-n", "3", "--eta", "0.5"], ["--morph", "--frames", "5"],
                                   ["--init", "figure.png", "--film"]])
def test_a_png_has_the_command_that_draws_it_again(go, ckpt, figure, flags):
    go(WAVING, KICKING, *flags, "--seed", "2")
    with Image.open("samples.png") as image:
        first, words = np.asarray(image.convert("RGB")), image.info
    Path("samples.png").unlink()
    script, *argv = shlex.split(words["command"])
    assert script == "sample.py" and sample.main(argv) == 0
    assert np.array_equal(first, np.asarray(Image.open("samples.png").convert("RGB")))
    ldm, _ = checkpoint.load_ldm(ckpt)
    assert words["checkpoint"] == checkpoint.hash_of(ldm.state_dict())
    assert json.loads(words["settings"])["steps"] == 6
    with Image.open("each/0001-waving.png") as image:
        assert image.info["seed"] == "2" and image.info["command"] == words["command"]


def test_the_first_line_names_the_checkpoint(go, ckpt, tmp_path, monkeypatch, capsys):
    def first_line(*flags: str) -> str:
        capsys.readouterr()
        assert sample.main([WAVING, "-n", "1", "--steps", "1", "--device", "cpu", *flags]) == 0
        return capsys.readouterr().out.splitlines()[0]
    bundled = tmp_path / "bundled.pt"
    checkpoint.save(bundled, checkpoint.slim(checkpoint.load(ckpt, "ldm")))
    os.utime(bundled, (time.time() - 3.5 * 3600,) * 2)
    monkeypatch.setattr(sample, "BUNDLED_CKPT", bundled)
    assert first_line() == "Using the bundled toy model bundled.pt (no runs/ldm/last.pt found) on cpu."
    assert first_line("--ckpt", "bundled.pt") == "Using bundled.pt (step 60, 3 hours old) on cpu."
    Path("runs/ldm").mkdir(parents=True)
    shutil.copy(ckpt, "runs/ldm/last.pt")
    assert first_line().startswith("Using runs/ldm/last.pt (step 60, ")


# --------------------------------------------------------------------------------------- mistakes

def one_sentence(capsys, argv: list[str], *expected: str, code: int = 2) -> None:
    capsys.readouterr()
    assert sample.main(argv) == code
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("sample.py: ") and all(word in captured.err for word in expected)


@pytest.mark.parametrize("flags, words", [
    ([], ["pose files", "--common"]), (["p.json", "--common", "3"], ["pose files", "--common"]),
    (["--common", "3", "--typical", "0.5"], ["--common", "--typical"]),
    (["p.json", "--init", "a", "--inpaint", "b", "--mask", "c"], ["--init", "--inpaint"]),
    (["p.json", "--inpaint", "a.png"], ["--mask"]),
    (["p.json", "--init", "a.png", "--mask", "b.png"], ["--mask", "--inpaint"]),
    (["p.json", "--sampler", "ddpm", "--steps", "20"], ["--steps", "20", "ddpm"]),
    (["p.json", "--out", "x.txt"], ["x.txt", ".png"]),
    (["p.json", "-n", "0"], ["-n", "0", "at least 1"]),
    (["p.json", "--guidance", "nan"], ["--guidance", "nan"]),
    (["p.json", "--canvas", "640"], ["--canvas", "640", "768x512"]),
])
def test_a_wrong_flag_is_one_sentence_with_its_value(capsys, flags, words):
    with pytest.raises(SystemExit) as e:
        sample.parse_args(flags)
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert e.value.code == 2 and all(word in sentence for word in words), sentence


@pytest.mark.parametrize("flags, words", [
    (["--init", "none.png"], ["none.png"]), (["--init", WAVING], ["waving"]),
    (["--inpaint", "figure.png", "--mask", "wide.png"], ["64 x 32", "32 x 32"]),
    (["--inpaint", "figure.png", "--mask", "black.png"], ["black.png", "no white"]),
    (["--morph"], ["--morph", "waving"]), (["--motion"], ["--motion", "two"]),
    (["--separate", "figure.png"], ["figure.png"]),
    (["--init", "figure.png", "--out", "./figure.png"], ["figure.png", "overwritten"]),
    (["--morph", KICKING, "--init", "old.gif", "--out", "old.png"], ["old.gif", "overwritten"]),
])
def test_a_mistake_is_one_sentence_before_the_drawing(go, ckpt, figure, monkeypatch, capsys, flags,
                                                      words):
    Image.new("L", (64, 32), 255).save("wide.png")
    Image.new("L", (32, 32)).save("black.png")
    Image.new("L", (32, 32)).save("old.gif")

    def never(*args, **how):
        raise AssertionError("something was drawn")
    monkeypatch.setattr(sample, "denoise", never)
    one_sentence(capsys, [WAVING, "--ckpt", ckpt, *flags], *words)


def test_too_little_memory_and_ctrl_c_are_one_sentence(go, ckpt, monkeypatch, capsys):
    argv = [WAVING, "--ckpt", ckpt, "--device", "cpu"]
    monkeypatch.setattr(sample, "denoise", lambda *args, **how: torch.empty(1 << 60))
    one_sentence(capsys, argv, "memory of cpu", "fewer")

    def interrupted(*args, **how):
        raise KeyboardInterrupt
    monkeypatch.setattr(sample, "denoise", interrupted)
    one_sentence(capsys, argv, "interrupted", code=130)


def test_poses_may_stand_on_both_sides_of_a_flag():
    args = sample.parse_args(["a.json", "--morph", "b.json", "--frames", "3", "c.json"])
    assert args.poses == ["a.json", "b.json", "c.json"]
