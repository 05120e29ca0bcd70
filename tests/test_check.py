"""python data.py DIR: faults are planted among clean figures, and exactly they have to be found."""

import io
import json
import re
import shutil
import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw
from test_data import rows_of, save_pair, write_coco

import data
import dataset.check
import keypoints
import plots
import train
from data import PoseFolder
from dataset.bars import find_bars
from dataset.figures import Figures
from formats import pose_files

N, SIDE = 60, 64


def save_coco(root, pairs) -> None:
    """root/images/aI.png of (image, pose) pairs, and root/k.json."""
    write_coco(root / "k.json", {f"a{i}.png": (SIDE, SIDE, [pose * (SIDE, SIDE, 2)])
                                 for i, (_, pose) in enumerate(pairs)}, root / "images")
    for i, (image, _) in enumerate(pairs):
        Image.fromarray(image).save(root / f"images/a{i}.png")


@pytest.fixture(scope="module")
def figures():
    """Images and poses. The first ten clearly face the viewer: the check says nothing of the sides
    of people seen from the side."""
    ds = Figures(N + 20, SIDE, seed=7)
    pairs = [ds.source(i) for i in range(N + 20)]
    frontal = [i for i, (_, p) in enumerate(pairs)
               if p[5, 0] - p[6, 0] > 0.12 and p[1, 0] - p[2, 0] > 0.03][:10]
    assert len(frontal) == 10
    return [pairs[i] for i in frontal + [i for i in range(N + 20) if i not in frontal]][:N]


@pytest.fixture
def clean(figures, tmp_path):
    """A folder of figures in the seed's layout, clip0_000.png to clip5_009.png."""
    for i, (image, pose) in enumerate(figures):
        save_pair(tmp_path / "set", f"clip{i // 10}_{i % 10:03d}.png", image, pose)
    return tmp_path / "set"


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch):
    """overview.png takes most of the time of a check; it is drawn where a test asks for `drawn`."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(dataset.check, "draw_overview", lambda path, *_: path.touch())


@pytest.fixture
def drawn():
    pass


def run(root, *flags: str, out=None, status=0, workers=0) -> dict:
    out = out or root.parent / "out"
    assert data.main([str(root), "--out", str(out), "--workers", str(workers), "--size", "64",
                      *flags]) == status
    return json.loads((out / "report.json").read_text(), parse_constant=pytest.fail)    # no NaN


def suspects(report: dict) -> set[tuple[str, str]]:
    """(kind, name of the file)"""
    return {(s["kind"], s["file"].rsplit("/", 1)[-1]) for s in report["suspects"]}


def names(count: int = N) -> list[str]:
    return [f"clip{i // 10}_{i % 10:03d}" for i in range(count)]


def rewrite(root, name: str, change) -> None:
    """Passes the pose of an image through `change`."""
    file = root / "keypoints" / f"{name}.json"
    file.write_text(json.dumps(rows_of(change(pose_files.load_poses(file).poses[0]))))


def exchange(pose: np.ndarray) -> np.ndarray:
    return pose[:, [1, 0, 2]]


def swap_sides(*parts: str):
    """left <-> right of the joints whose names start so."""
    order = [keypoints.MIRROR[j] if name.startswith(parts) else j
             for j, name in enumerate(keypoints.JOINTS)]
    return lambda pose: pose[order]


ALL_SIDES = swap_sides("eye", "ear", *keypoints.JOINTS[5:])


# ------------------------------------------------------------------------------------ clean data

@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize("count, most", [(200, 2), (16, 0)])
def test_clean_figures_have_next_to_no_suspects_and_no_verdict(tmp_path, count, most):
    assert data.main([f"figures:{count}", "--size", "64", "--workers", "0", "--out",
                      str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert not report["verdicts"] and len(report["suspects"]) <= most
    assert report["images"]["sound"] == count and report["torsos"] >= 0.95 * count


@pytest.mark.usefixtures("drawn")
def test_a_clean_folder_has_no_issues(clean, capsys):
    report = run(clean)
    out = capsys.readouterr().out
    assert "No issues found." in out and "60 sound, 0 broken" in out and "64 median" in out
    assert "suspects.txt (0 lines)" in out.splitlines()[-1]
    assert "about step 156 of stage 2 with --init, 390 from nothing" in out    # 100, 250 times 50 / 32
    assert {p.ldm.batch_size for p in train.PRESETS.values()} == {dataset.check.BATCH}
    assert report["images"] == {"found": N, "sound": N, "broken": 0, "without_a_person": 0,
                                "held_out": 10, "not_square": 0}
    assert report["short_side"]["histogram"] == {"64+": N} and report["groups"] == 6
    page = np.asarray(Image.open(clean.parent / "out" / "overview.png").convert("RGB"))
    assert page.shape[1] > 500 and page.std() > 20
    assert sorted(file.name for file in (clean.parent / "out").iterdir()) == [
        "overview.png", "report.json", "suspects.txt"]


@pytest.mark.parametrize("showing, named", [(50, {"0.png"}), (49, set())])
def test_a_limb_is_too_long_only_where_many_show_it(figures, showing, named):
    rows = np.zeros(N, dataset.check.RECORD)
    rows["sound"], rows["size"], rows["pose"] = True, SIDE, [pose for _, pose in figures]
    rows["pose"][0, 9, :2] += (0.6, 0.5)                    # the left wrist
    rows["pose"][showing:, 9] = 0
    files = [f"{i}.png" for i in range(N)]
    checked = dataset.check.Checked([], files, np.zeros(N, bool), rows, {})
    found, _, _ = dataset.check.odd_poses(checked)
    assert {s.file for s in found if s.kind == "limb"} == named


# -------------------------------------------------------------------------------- planted faults

def break_some(root) -> set[tuple[str, str]]:
    """Everything that can be wrong with single images."""
    def moved(*joints, to=None, by=(0, 0, 0)):
        at = np.isin(np.arange(17), joints)[:, None]
        return lambda pose: np.where(at, pose + by if to is None else to, pose)
    rewrite(root, "clip0_001", moved(9, by=(0.6, 0.5, 0)))
    rewrite(root, "clip0_002", exchange)
    rewrite(root, "clip0_003", swap_sides("hip", "knee", "ankle"))
    rewrite(root, "clip0_004", lambda pose: pose * (1, -1, 1) + (0, 1.1, 0))
    rewrite(root, "clip0_005", moved(14, 15, 16, to=(0, 0, 1)))
    rewrite(root, "clip0_006", lambda pose: pose + (0.7, 0.0, 0))
    (root / "images/clip0_007.png").write_bytes(b"not an image")
    (root / "keypoints/clip0_008.json").write_text('{"nose": [1, 2]}')
    (root / "images/clip0_009.png").unlink()
    (root / "keypoints/clip1_000.json").unlink()
    return {("limb", "clip0_001.png"), ("axes", "clip0_002.png"), ("sides", "clip0_003.png"),
            ("head down", "clip0_004.png"), ("point", "clip0_005.png"),
            ("outside", "clip0_006.png"), ("broken", "clip0_007.png"),
            ("broken", "clip0_008.png"), ("orphan", "clip0_009.json"), ("broken", "clip1_000.png")}


@pytest.mark.usefixtures("drawn")
def test_each_fault_is_found_and_nothing_else(clean, capsys):
    planted = break_some(clean)
    report = run(clean, status=2)
    found = suspects(report)                # three joints in one point leave long limbs behind
    assert planted <= found and found - planted <= {("limb", "clip0_005.png")}
    assert not report["verdicts"]
    printed = capsys.readouterr()
    assert "broken      3 (5.1%) cannot be used" in printed.out
    assert "59 with a pose, 56 sound, 3 broken" in printed.out and "would stop" in printed.err
    text = (clean.parent / "out/suspects.txt").read_text()
    lines = [line.split("\t") for line in text.splitlines()]
    kinds = [line[1] for line in lines]
    assert kinds == sorted(kinds, key=list(dataset.check.KINDS).index)
    assert len(lines) == len(report["suspects"])
    assert all(len(line) == 3 and line[2] for line in lines)
    one, two = (run(clean, status=2, workers=2, out=clean.parent / "other"), report)
    assert one == two and (clean.parent / "other/suspects.txt").read_text() == text


@pytest.mark.parametrize("parts", [("shoulder", "elbow", "wrist"), ("eye", "ear"),
                                   ("hip", "knee", "ankle")])
def test_sides_swapped_in_a_part_of_the_body(clean, parts):
    for name in names(6):
        rewrite(clean, name, swap_sides(*parts))
    assert suspects(run(clean)) == {("sides", f"{name}.png") for name in names(6)}


def seen_from_behind(figures) -> list[int]:
    return [i for i, (_, pose) in enumerate(figures)
            if pose[5, 0] < pose[6, 0] - 0.1 and pose[1, 0] < pose[2, 0]]


def test_rows_and_columns_of_a_part_of_the_dataset(clean, figures):
    some = [names()[i] for i in [*range(8), *seen_from_behind(figures)[:4]]]
    for name in some:
        rewrite(clean, name, exchange)
    report = run(clean)     # so many lie to the left that those seen from behind are suspects too
    assert len(some) == 12 and not report["verdicts"]
    assert suspects(report) == {("axes", f"{name}.png") for name in some}


def test_people_who_lie_either_way_are_no_suspects(clean, figures):
    away = seen_from_behind(figures)[:6]
    for i in range(6):
        for k, turn in (
                (i, lambda pose: np.stack([pose[:, 1], 1 - pose[:, 0], pose[:, 2]], 1)),
                (i + 20, lambda pose: np.stack([1 - pose[:, 1], pose[:, 0], pose[:, 2]], 1))):
            if k not in away:
                rewrite(clean, names()[k], turn)
    report = run(clean)
    assert not report["suspects"] and report["torsos_lying"] > 0.1


def test_verdict_on_rows_and_columns(clean, capsys):
    for name in names()[2:]:
        rewrite(clean, name, exchange)
    report = run(clean)
    assert list(report["verdicts"]) == ["axes"]
    assert {s for s in suspects(report) if s[0] == "axes"} == {
        ("axes", f"{name}.png") for name in names(2)}                   # those that are right
    assert "VERDICT     rows and columns look exchanged" in capsys.readouterr().out


def test_verdict_on_up_and_down(clean):
    for name in names():
        rewrite(clean, name, lambda pose: pose * (1, -1, 1) + (0, 1, 0))
    report = run(clean)
    assert list(report["verdicts"]) == ["upright"] and not report["suspects"]


@pytest.mark.usefixtures("drawn")
def test_verdict_on_left_and_right(clean):
    for name in names():
        rewrite(clean, name, ALL_SIDES)
    report = run(clean)
    assert list(report["verdicts"]) == ["sides"] and not report["suspects"]
    assert report["facing_the_viewer"] < 0.35
    for name in names():
        rewrite(clean, name, exchange)
    assert list(run(clean)["verdicts"]) == ["axes", "sides"]


@pytest.mark.usefixtures("drawn")
def test_missing_joints_are_no_fault(figures, tmp_path):
    missing = [np.random.default_rng(i).random(17) < 0.3 for i in range(N)]
    save_coco(tmp_path / "set", [(image, np.where(gone[:, None], 0, pose))
                                 for (image, pose), gone in zip(figures, missing, strict=True)])
    report = run(tmp_path / "set")
    assert not report["verdicts"] and not report["suspects"]
    assert sum(joint["missing"] for joint in report["joints"].values()) == np.sum(missing)


@pytest.mark.parametrize("pose, kinds", [
    (np.zeros((17, 3)) + (0.5, 0.5, 1), {"point"}),
    (np.linspace(0.1, 0.9, 17)[:, None] * (1, 0, 0) + (0, 0.5, 1), set())], ids=["point", "line"])
@pytest.mark.filterwarnings("error")
@pytest.mark.usefixtures("drawn")
def test_poses_that_are_none_break_nothing(figures, tmp_path, pose, kinds, capfd):
    for i in range(12):
        save_pair(tmp_path / "set", f"{'abcdefghijkl'[i]}.png", figures[i][0], pose)
    assert {kind for kind, _ in suspects(run(tmp_path / "set"))} == kinds
    assert not capfd.readouterr().err


def test_half_length_portraits_are_judged_by_their_neck(figures, tmp_path):
    """No hips in sight: the shoulders of two of them are swapped, which their eyes contradict."""
    poses = [swap_sides("shoulder", "elbow", "wrist")(pose) if i in (4, 6) else pose
             for i, (_, pose) in enumerate(figures[:30])]
    above = np.arange(17)[:, None] < 11
    save_coco(tmp_path / "set", [(image, np.where(above, pose, 0)) for (image, _), pose
                                 in zip(figures, poses, strict=False)])
    report = run(tmp_path / "set")
    assert suspects(report) == {("sides", "a4.png"), ("sides", "a6.png")}
    assert report["torsos"] == 0 and report["torsos_lying"] is None and not report["verdicts"]


@pytest.mark.usefixtures("drawn")
def test_of_few_people_nothing_is_said_in_general(figures, tmp_path):
    for i, (image, pose) in enumerate(figures[:6]):
        save_pair(tmp_path / "set", f"a{i}.png", image, ALL_SIDES(pose))
    report = run(tmp_path / "set")
    assert not report["verdicts"] and report["facing_the_viewer"] == 0


@pytest.mark.usefixtures("drawn")
def test_nothing_but_broken_images_is_a_report_too(tmp_path):
    (tmp_path / "set/images").mkdir(parents=True), (tmp_path / "set/keypoints").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "set/images/a.png")
    (tmp_path / "set/keypoints/b.json").write_text("{}")
    report = run(tmp_path / "set", status=2)
    assert suspects(report) == {("broken", "a.png"), ("orphan", "b.json")}
    assert report["images"]["sound"] == 0


def test_images_that_no_json_names_are_orphans(figures, tmp_path):
    save_coco(tmp_path / "set", figures[:4])
    told = json.loads((tmp_path / "set/k.json").read_text())
    (tmp_path / "set/k.json").unlink()
    for name, some in (("train", (0, 1)), ("val", (2,))):           # image 1 shows nobody
        (tmp_path / f"set/{name}.json").write_text(json.dumps({
            "images": [told["images"][i] for i in some],
            "annotations": [told["annotations"][i] for i in some if i != 1]}))
    report = run(tmp_path / "set/train.json", "--val", str(tmp_path / "set/val.json"))
    assert suspects(report) == {("orphan", "a3.png")}
    assert report["images"]["without_a_person"] == 1


def test_a_list_has_no_orphans(clean):
    (clean / "train.txt").write_text("images/clip0_000.png\nimages/clip1_000.png\n")
    assert not run(clean / "train.txt")["suspects"]


# ---------------------------------------------------------------------------------------- copies

def copied(image: np.ndarray, how: str) -> Image.Image:
    image = Image.fromarray(image)
    if how == "mirrored":
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image.resize((96, 96), Image.Resampling.BICUBIC) if how == "enlarged" else image


@pytest.mark.parametrize("how", ["same", "mirrored", "jpeg", "enlarged"])
def test_a_held_out_copy_leaks_and_a_trained_one_counts(clean, figures, how):
    held = data.split(PoseFolder(clean, SIDE))[1].groups()[0]
    trained, other = [f"clip{i}" for i in range(6) if f"clip{i}" != held][:2]
    image, pose = figures[10 * int(trained[-1])]                        # of TRAINED_000
    end = "jpg" if how == "jpeg" else "png"
    for group in (held, other):
        save_pair(clean, f"{group}_900.{end}", copied(image, how), pose)
    report = run(clean)
    kept, extra = sorted([f"{trained}_000.png", f"{other}_900.{end}"])  # the first is kept
    assert {(k, n) for k, n in suspects(report) if k in ("leak", "copy")} == {
        ("leak", f"{held}_900.{end}"), ("copy", extra)}
    [why] = [s["why"] for s in report["suspects"] if s["kind"] == "leak"]
    assert kept in why
    assert ("mirrored" in why) == (how == "mirrored" and kept == f"{trained}_000.png")


@pytest.mark.usefixtures("drawn")
def test_a_set_of_ones_own_to_validate_on(clean, figures, tmp_path):
    save_pair(tmp_path / "val", "x.png", *Figures(1, SIDE, seed=99).source(0))
    save_pair(tmp_path / "val", "y.png", *figures[33])
    report = run(clean, "--val", str(tmp_path / "val"))
    assert suspects(report) == {("leak", "y.png")} and report["images"]["held_out"] == 2
    assert "clip3_003.png" in report["suspects"][0]["why"]


def test_each_copy_is_named_with_an_image_that_it_looks_like(figures, tmp_path):
    """A fade: each frame looks like the one before it, the last not at all like the first."""
    texture = np.random.default_rng(0).integers(60, 150, (8, 8, 3), dtype=np.uint8)
    texture = texture.repeat(8, 0).repeat(8, 1)
    for i in range(12):
        save_pair(tmp_path / ("set" if i < 6 else "val"), f"f{i}.png", texture + np.uint8(2 * i),
                  figures[i][1])
    found = run(tmp_path / "set", "--val", str(tmp_path / "val"))["suspects"]
    why = {(s["kind"], s["file"].rsplit("/", 1)[-1]): s["why"] for s in found
           if s["kind"] in ("leak", "copy")}
    assert set(why) == {("leak", "f6.png")} | {("copy", f"f{i}.png") for i in range(1, 6)}
    assert all(f"f{int(name[1]) - 1}.png" in text for (_, name), text in why.items())
    assert "(2 of it)" in why["copy", "f5.png"]


def test_figures_in_other_poses_on_one_flat_ground_are_not_copies(figures, tmp_path):
    for i, (_, pose) in enumerate(figures[:40]):
        save_pair(tmp_path / "set", f"a{i}.png", keypoints.draw(pose, 128), pose)
    assert not run(tmp_path / "set")["suspects"]


def test_the_search_finds_what_brute_force_finds(monkeypatch):
    monkeypatch.setattr(dataset.check, "ROWS", 32)
    rng = np.random.default_rng(0)
    base = rng.integers(0, 256, (60, 16, 16), dtype=np.uint8)
    thumbs = base[rng.integers(0, 60, 150)]
    thumbs = np.where(rng.random((150, 1, 1)) < 0.5, thumbs[:, :, ::-1], thumbs).astype(int)
    spread = rng.integers(0, 5, (150, 1, 1))                            # above and below SAME
    thumbs = (thumbs + rng.integers(-spread, spread + 1, thumbs.shape)).clip(0, 255)
    thumbs[140:] = thumbs[130:140]
    held = rng.random(150) < 0.3
    wanted = np.full(150, 150)
    for i in range(150):
        for j in range(150):
            apart = min(((thumbs[i] - other) ** 2).mean() for other in (thumbs[j],
                                                                        thumbs[j][:, ::-1]))
            if apart <= dataset.check.SAME ** 2 and not held[j] and (j < i or held[i]):
                wanted[i] = min(wanted[i], j)
    found = dataset.check.find_copies(thumbs.astype(np.uint8), held)
    assert (found == wanted).all() and 40 < (found < 150).sum() < 140
    assert len(dataset.check.find_copies(np.zeros((0, 16, 16), np.uint8), np.zeros(0, bool))) == 0


# ------------------------------------------------------------------------------------------ bars

def with_bars(image: np.ndarray, left=0, right=0, top=0, bottom=0, colour=(0, 0, 0)) -> np.ndarray:
    H, W = image.shape[:2]
    page = np.full((H + top + bottom, W + left + right, 3), colour, np.uint8)
    page[top:top + H, left:left + W] = image
    return page


@pytest.mark.parametrize("bars", [
    dict(top=9, bottom=9), dict(left=7, right=8),
    dict(top=12, bottom=10, colour=(255, 255, 255)),
    dict(left=6, right=6, top=6, bottom=6, colour=(90, 30, 40)), dict(top=40, bottom=40)], ids=str)
@pytest.mark.parametrize("quality", [None, 85], ids=["png", "jpeg"])
def test_bars_are_found_to_the_pixel(figures, bars, quality, tmp_path):
    found = []
    for image, _ in figures[:6]:
        image = np.array(Image.fromarray(image).resize((256, 200), Image.Resampling.BICUBIC))
        whole, left, top = with_bars(image, **bars), bars.get("left", 0), bars.get("top", 0)
        if quality:
            Image.fromarray(whole).save(tmp_path / "a.jpg", quality=quality)
            whole = np.array(Image.open(tmp_path / "a.jpg"))
        box = find_bars(whole)
        found.append(box != (0, 0, *whole.shape[1::-1]))
        apart = np.abs(np.subtract(box, (left, top, left + 256, top + 200))).max()
        assert not found[-1] or apart <= (2 if quality else 0)
    # White bars around a pale wall of nearly the same colour may be overlooked.
    assert all(found) or bars.get("colour") == (255, 255, 255) and sum(found) >= 4


def cut_out(kind: str, seed: int) -> np.ndarray:
    """Something on a flat background, nearly as large as the image."""
    rng = np.random.default_rng(seed)
    page = Image.new("RGB", (256, 256), tuple(rng.integers(0, 256, 3).tolist()))
    pen, ink = ImageDraw.Draw(page), tuple(rng.integers(0, 256, 3).tolist())
    low, high = (0.05, 0.05, 0.75, 0.75), (0.25, 0.25, 0.95, 0.95)
    x0, y0, x1, y1 = (rng.uniform(low, high) * 256).tolist()
    if kind == "disc":
        pen.ellipse((x0, y0, x1, y1), fill=ink)
    elif kind == "robe":
        pen.polygon([(128, y0), (150, y0), (x1, y1), (x0, y1), (110, y0)], fill=ink)
    elif kind == "rounded":
        pen.rounded_rectangle((x0, y0, x1, y1), 50, fill=ink)
    else:
        return keypoints.draw(Figures(60, 64).source(seed)[1], 256)
    return np.array(page)


@pytest.mark.parametrize("kind", ["disc", "robe", "rounded", "skeleton"])
def test_a_flat_background_is_no_bar(kind):
    for seed in range(25):
        assert find_bars(cut_out(kind, seed)) == (0, 0, 256, 256), seed


def test_images_without_two_like_bars_are_left_whole(figures):
    images = [image for image, _ in figures] + [np.full((40, 60, 3), 7, np.uint8)]
    images += [with_bars(images[0], top=9), with_bars(images[0], left=20, right=3)]
    for image in images:
        assert find_bars(image) == (0, 0, *image.shape[1::-1])


def test_the_check_counts_bars_and_names_the_flag_that_cuts_them(clean, figures, capsys):
    image, pose = figures[5]
    save_pair(clean, "clip9_000.png", with_bars(image, top=9, bottom=9), pose)
    report = run(clean)
    [found] = [s for s in report["suspects"] if s["kind"] == "bars"]
    assert found["file"].endswith("clip9_000.png")
    assert "9 at the top, 9 at the bottom" in found["why"]
    assert "--trim-bars" in capsys.readouterr().out


# ---------------------------------------------------------------------------------- the command

@pytest.mark.parametrize("flags, words", [
    (["--out", "SET/images/new"], "among the images"),
    (["--val", "SET", "--out", "SET/images"], "among the images"),
    (["--val", "NOWHERE"], "NOWHERE: there is no such"),
    (["--out", "FILE/y"], "FILE"), (["--workers", "-1"], "num_workers")])
def test_a_wrong_flag_is_one_sentence(clean, tmp_path, flags, words, capsys):
    (tmp_path / "file").write_text("mine")
    flags = [f.replace("SET", str(clean)).replace("FILE", str(tmp_path / "file")) for f in flags]
    out = () if "--out" in flags else ("--out", str(tmp_path / "out"))
    assert data.main([str(clean), *out, *flags]) == 2
    err = capsys.readouterr().err
    assert words.replace("FILE", str(tmp_path / "file")) in err
    assert err.count("\n") == 1 and err.startswith("data.py: ")
    assert (tmp_path / "file").read_text() == "mine" and not list(clean.glob("images/new*"))


def test_figures_need_a_number(tmp_path, capsys):
    assert data.main(["figures:0", "--out", str(tmp_path / "out")]) == 2
    assert "data.py: --data is figures:0; give a number of images" in capsys.readouterr().err


@pytest.mark.usefixtures("drawn")
def test_odd_file_names_are_printed_written_and_drawn(clean, monkeypatch):
    name = "$x_{$ \t日本 \udcff.png"
    shutil.move(clean / "images/clip0_001.png", clean / "images" / name)
    shutil.move(clean / "keypoints/clip0_001.json",
                clean / "keypoints" / name.replace(".png", ".json"))
    rewrite(clean, name[:-4], lambda pose: pose + (0.7, 0, 0))
    stdout = io.TextIOWrapper(io.BytesIO(), "ascii", errors="backslashreplace")     # startup.run's
    monkeypatch.setattr(sys, "stdout", stdout)
    assert suspects(run(clean)) == {("outside", name)}
    sys.stdout.flush()
    assert rb"\u65e5\u672c \udcff.png: " in sys.stdout.buffer.getvalue()
    line = (clean.parent / "out/suspects.txt").read_text("utf-8", "surrogateescape")
    assert line.count("\t") == 2 and line.count("\n") == 1 and "日本 \udcff.png" in line


def test_the_overview_shows_as_many_suspects_of_each_kind():
    some = [dataset.check.Suspect(kind, -i, f"{kind}{i}", "", None if kind == "broken" else i)
            for kind in ("broken", "outside", "limb") for i in range(20)]
    shown = [suspect.file for suspect in dataset.check.worst(some)]
    assert shown == [f"{kind}{i}" for kind in ("outside", "limb") for i in range(6)]


# ----------------------------------------------------------------------- the label and the image

def in_pixels(root, figures, unit=SIDE, size=(SIDE, SIDE)) -> None:
    """A COCO dataset whose joints count `unit` a side and whose json gives this size."""
    save_coco(root, figures)
    write_coco(root / "k.json", {f"a{i}.png": (*size, [pose * (unit, unit, 2)])
                                 for i, (_, pose) in enumerate(figures)})


@pytest.mark.parametrize("size, orientation, odd", [
    ((96, 128), 1, False), ((48, 64), 1, False), ((192, 256), 1, False),
    ((128, 96), 6, True), ((128, 96), 1, True), ((96, 96), 1, True), ((96, 110), 1, True)])
def test_an_image_of_another_shape_than_its_label_says_is_named(tmp_path, size, orientation, odd):
    exif, pose = Image.Exif(), Figures(1, SIDE).source(0)[1]
    exif[0x0112] = orientation
    stored = (128, 96) if orientation == 6 else (96, 128)
    write_coco(tmp_path / "set/k.json", {"a.jpg": (*size, [pose * (*size, 2)])})
    Image.new("RGB", stored, "gray").save(tmp_path / "set/a.jpg", exif=exif)
    found = [s for s in run(tmp_path / "set")["suspects"] if s["kind"] == "size"]
    assert len(found) == odd
    for suspect in found:
        assert f"{size[0]} x {size[1]}" in suspect["why"] and "96 x 128" in suspect["why"]
        assert ("EXIF" in suspect["why"]) == (orientation == 6)


@pytest.mark.parametrize("unit, words", [
    (SIDE, None), (1, None), (SIDE / 2, "another unit"), (2 * SIDE, "another unit"),
    (512, "another unit"), (100, "unit|percent")])
def test_joints_in_another_unit_are_a_verdict(figures, tmp_path, unit, words):
    in_pixels(tmp_path / "set", figures[:30], unit)
    verdicts = run(tmp_path / "set")["verdicts"]
    assert re.search(words, verdicts["unit"]) if words else "unit" not in verdicts


def test_joints_of_some_images_in_0_to_1_are_suspects_and_the_overview_shows_which_are_not(
        figures, tmp_path, monkeypatch):
    drawn, shown = plots.draw_overview, []
    monkeypatch.setattr(dataset.check, "draw_overview", lambda *args: drawn(
        *args[:-1], lambda i: shown.append(i) or np.zeros((8, 8, 3), np.uint8)))
    save_coco(tmp_path / "set", figures[:9])
    write_coco(tmp_path / "set/k.json", {
        f"a{i}.png": (SIDE, SIDE, [pose * ((1, 1, 2) if i % 3 == 0 else (SIDE, SIDE, 2))])
        for i, (_, pose) in enumerate(figures[:9])})
    assert suspects(run(tmp_path / "set")) == {("point", f"a{i}.png") for i in (0, 3, 6)}
    assert shown[:6] == [1, 2, 4, 5, 7, 8] and sorted(shown[6:]) == [0, 3, 6]


def test_the_check_says_what_is_held_out_and_how_many_rows_of_metadata_match(clean, capsys):
    (clean / "metadata.csv").write_text("file;Clip\nclip0_000.png;one\nnone.png;two\n")
    report = run(clean)
    assert "1 of 2 rows of metadata.csv match an image, 59 of 60" in capsys.readouterr().out
    assert report["held_out_of"] and set(report["held_out_of"]) < {f"clip{i}" for i in range(6)}


def test_too_few_images_to_hold_some_out_are_a_verdict(figures, tmp_path):
    save_coco(tmp_path / "set", figures[:3])
    assert "3 images are too few" in run(tmp_path / "set")["verdicts"]["few"]


def test_percent_in_images_of_little_more_than_100_pixels_is_a_verdict(figures, tmp_path):
    in_pixels(tmp_path / "set", figures, 100, size=(128, 128))
    assert "percent" in run(tmp_path / "set")["verdicts"]["unit"]
    in_pixels(tmp_path / "other", figures, 128, size=(128, 128))
    assert "unit" not in run(tmp_path / "other")["verdicts"]
