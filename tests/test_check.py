"""python data.py DIR: each fault is planted among clean figures, and exactly it has to be found."""

import csv
import io
import json
import os
import shutil
import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw

import data
import dataset.check
import keypoints
import plots
from data import PoseFolder
from dataset.figures import Figures
from formats import pose_files

N, SIDE = 60, 64


def rows_of(pose: np.ndarray) -> dict:
    return {name: [float(y) * 512, float(x) * 512] for name, (x, y, _) in zip(keypoints.JOINTS, pose, strict=True)}


def save_pair(root, name: str, image, pose: np.ndarray) -> None:
    for path in (root / f"images/{name}", root / f"keypoints/{name}"):
        path.parent.mkdir(parents=True, exist_ok=True)
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(root / f"images/{name}", quality=90)
    (root / f"keypoints/{name}").with_suffix(".json").write_text(json.dumps(rows_of(pose)))


@pytest.fixture(scope="module")
def figures():
    """Pictures and poses. The first ten clearly face the viewer: of people seen from the side, nothing is said."""
    ds = Figures(N + 20, SIDE, seed=7)
    all_of_them = [ds.source(i) for i in range(N + 20)]
    frontal = [i for i, (_, p) in enumerate(all_of_them) if p[5, 0] - p[6, 0] > 0.12 and p[1, 0] - p[2, 0] > 0.03][:10]
    assert len(frontal) == 10
    return [all_of_them[i] for i in frontal + [i for i in range(N + 20) if i not in frontal]][:N]


@pytest.fixture
def clean(figures, tmp_path):
    """A folder of figures in the seed's layout, clip0_000.png to clip5_009.png."""
    for i, (image, pose) in enumerate(figures):
        save_pair(tmp_path / "set", f"clip{i // 10}_{i % 10:03d}.png", image, pose)
    return tmp_path / "set"


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch):
    """overview.png takes most of the time of a check; it is drawn where a test asks for `drawn`: once for every kind of
    dataset that draws something of its own, or could break the drawing."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(dataset.check, "draw_overview", lambda path, *_: path.touch())


@pytest.fixture
def drawn():
    pass


def run(root, *flags: str, out=None, status=0, workers=0) -> dict:
    out = out or root.parent / "out"
    assert data.main([str(root), "--out", str(out), "--workers", str(workers), "--size", "64", *flags]) == status
    return json.loads((out / "report.json").read_text(), parse_constant=pytest.fail)      # NaN is no JSON


def suspects(report: dict) -> set[tuple[str, str]]:
    """(kind, name of the file)"""
    return {(s["kind"], s["file"].rsplit("/", 1)[-1]) for s in report["suspects"]}


def rewrite(root, name: str, change) -> None:
    """Passes the pose of a picture through `change`."""
    file = root / "keypoints" / f"{name}.json"
    file.write_text(json.dumps(rows_of(change(pose_files.read_seed(file)))))


def exchange(pose: np.ndarray) -> np.ndarray:
    return pose[:, [1, 0, 2]]


def swap_sides(*parts: str):
    """left <-> right of the joints whose names start so."""
    order = [keypoints.MIRROR[j] if name.startswith(parts) else j for j, name in enumerate(keypoints.JOINTS)]
    return lambda pose: pose[order]


# ------------------------------------------------------------------------------------------- clean data

@pytest.mark.usefixtures("drawn")
def test_clean_figures_have_next_to_no_suspects_and_no_verdict(tmp_path, capsys):
    assert data.main(["figures:200", "--size", "64", "--workers", "0", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert not report["verdicts"] and len(report["suspects"]) <= 2
    assert report["pictures"]["sound"] == 200 and report["torsos"] > 190


def test_few_clean_figures_have_no_suspects(tmp_path, capsys):
    assert data.main(["figures:16", "--workers", "0", "--out", str(tmp_path)]) == 0
    assert not json.loads((tmp_path / "report.json").read_text())["suspects"]


@pytest.mark.parametrize("showing, named", [(50, {"0.png"}), (49, set())])
def test_a_limb_is_too_long_only_where_many_show_it(figures, showing, named):
    rows = np.zeros(N, dataset.check.RECORD)
    rows["sound"], rows["size"], rows["pose"] = True, SIDE, [pose for _, pose in figures]
    rows["pose"][0, 9, :2] += (0.6, 0.5)                    # the left wrist
    rows["pose"][showing:, 9] = 0
    names, held = [f"{i}.png" for i in range(N)], np.zeros(N, bool)
    found, _, _ = dataset.check.odd_poses(dataset.check.Checked(None, None, names, held, rows, {}))
    assert {s.file for s in found if s.kind == "limb"} == named


@pytest.mark.usefixtures("drawn")
def test_a_clean_folder_is_said_to_be_well(clean, capsys):
    report = run(clean)
    out = capsys.readouterr().out
    assert "all is well" in out and "60 sound, 0 broken" in out and "64 median" in out
    assert out.splitlines()[-1].startswith("wrote ") and "suspects.txt (0 lines)" in out
    assert report["pictures"] == {"found": N, "sound": N, "broken": 0, "without_a_person": 0, "held_out": 10,
                                  "not_square": 0}
    assert report["short_side"]["histogram"] == {"64+": N} and report["groups"] == 6
    page = np.asarray(Image.open(clean.parent / "out" / "overview.png").convert("RGB"))
    assert page.shape[1] > 1000 and page.std() > 20
    assert sorted(p.name for p in (clean.parent / "out").iterdir()) == ["overview.png", "report.json", "suspects.txt"]


# ------------------------------------------------------------------------------------------- planted faults

def break_some(root):
    """Everything that can be wrong with single pictures."""
    rewrite(root, "clip0_001", lambda pose: np.where(np.arange(17)[:, None] == 9, pose + (0.6, 0.5, 0), pose))
    rewrite(root, "clip0_002", exchange)
    rewrite(root, "clip0_003", swap_sides("hip", "knee", "ankle"))
    rewrite(root, "clip0_004", lambda pose: pose * (1, -1, 1) + (0, 1.1, 0))
    rewrite(root, "clip0_005", lambda pose: np.where(np.arange(17)[:, None] > 13, (0, 0, 1), pose))
    rewrite(root, "clip0_006", lambda pose: pose + (0.7, 0.0, 0))
    (root / "images/clip0_007.png").write_bytes(b"not a picture")
    (root / "keypoints/clip0_008.json").write_text('{"nose": [1, 2]}')
    (root / "images/clip0_009.png").unlink()
    (root / "keypoints/clip1_000.json").unlink()
    return {("limb", "clip0_001.png"), ("axes", "clip0_002.png"), ("sides", "clip0_003.png"),
            ("head down", "clip0_004.png"), ("point", "clip0_005.png"), ("outside", "clip0_006.png"),
            ("broken", "clip0_007.png"), ("broken", "clip0_008.png"), ("orphan", "clip0_009.json"),
            ("broken", "clip1_000.png")}


@pytest.mark.usefixtures("drawn")
def test_each_fault_is_found_and_nothing_else(clean, capsys):
    planted = break_some(clean)
    report = run(clean, status=2)
    # Three joints in one point leave limbs behind that are too long; nothing but the planted pictures may appear.
    found = suspects(report)
    assert planted <= found and {name for _, name in found} == {name for _, name in planted}
    assert found - planted <= {("limb", "clip0_005.png")}
    assert not report["verdicts"]
    printed = capsys.readouterr()
    assert "broken      3 (5.1%) cannot be used" in printed.out and "training would stop" in printed.err
    assert "59 with a pose file, 56 sound, 3 broken" in printed.out
    lines = [line.split("\t") for line in (clean.parent / "out/suspects.txt").read_text().splitlines()]
    assert [line[1] for line in lines] == sorted((line[1] for line in lines), key=list(dataset.check.KINDS).index)
    assert len(lines) == len(report["suspects"]) and all(len(line) == 3 and line[2] for line in lines)


def test_any_number_of_workers_gives_the_same_report(clean):
    break_some(clean)
    one, two = (run(clean, status=2, workers=workers, out=clean.parent / f"out{workers}") for workers in (0, 2))
    assert one == two
    read = [(clean.parent / f"out{workers}/suspects.txt").read_bytes() for workers in (0, 2)]
    assert read[0] == read[1]


def test_outside_joints_are_counted_by_name(clean):
    rewrite(clean, "clip2_000", lambda pose: np.where(np.arange(17)[:, None] == 16, (0.5, 1.2, 1), pose))
    before = run(clean)["joints"]["ankle_right"]["outside"]
    rewrite(clean, "clip2_001", lambda pose: np.where(np.arange(17)[:, None] == 16, (0.5, 1.3, 1), pose))
    assert run(clean)["joints"]["ankle_right"] == {"missing": 0, "outside": before + 1}


@pytest.mark.parametrize("parts", [("shoulder", "elbow", "wrist"), ("eye", "ear"), ("hip", "knee", "ankle")])
def test_sides_swapped_in_a_part_of_the_body(clean, parts):
    names = [f"clip0_{i:03d}" for i in range(6)]
    for name in names:
        rewrite(clean, name, swap_sides(*parts))
    assert suspects(run(clean)) == {("sides", f"{name}.png") for name in names}


def test_rows_and_columns_of_a_part_of_the_dataset(clean, figures):
    away = [i for i, (_, pose) in enumerate(figures) if pose[5, 0] < pose[6, 0] - 0.1 and pose[1, 0] < pose[2, 0]][:4]
    names = [f"clip{i // 10}_{i % 10:03d}" for i in [*range(8), *away]]
    for name in names:
        rewrite(clean, name, exchange)
    report = run(clean)                         # so many lie to the left that those seen from behind count as well
    assert len(names) == 12 and not report["verdicts"] and suspects(report) == {("axes", f"{n}.png") for n in names}


def test_people_who_lie_either_way_are_no_suspects(clean, figures):
    away = [i for i, (_, pose) in enumerate(figures) if pose[5, 0] < pose[6, 0] - 0.1 and pose[1, 0] < pose[2, 0]][:6]
    for i in range(6):
        for k, turn in ((i, lambda pose: np.stack([pose[:, 1], 1 - pose[:, 0], pose[:, 2]], 1)),
                        (i + 20, lambda pose: np.stack([1 - pose[:, 1], pose[:, 0], pose[:, 2]], 1))):
            if k not in away:
                rewrite(clean, f"clip{k // 10}_{k % 10:03d}", turn)
    report = run(clean)
    assert not report["suspects"] and report["torsos_lying"] > 0.1


def test_verdict_on_rows_and_columns(clean, capsys):
    names = [f"clip{i // 10}_{i % 10:03d}" for i in range(N)]
    for name in names[2:]:
        rewrite(clean, name, exchange)
    report = run(clean)
    assert list(report["verdicts"]) == ["axes"] and "rows and columns look exchanged" in report["verdicts"]["axes"]
    assert {s for s in suspects(report) if s[0] == "axes"} == {("axes", f"{name}.png") for name in names[:2]}
    assert "LOOK        rows and columns" in capsys.readouterr().out


def test_verdict_on_left_and_right(clean):
    for i in range(N):
        rewrite(clean, f"clip{i // 10}_{i % 10:03d}", swap_sides("eye", "ear", *keypoints.JOINTS[5:]))
    report = run(clean)
    assert list(report["verdicts"]) == ["sides"] and "left and right look" in report["verdicts"]["sides"]
    assert not report["suspects"] and report["facing_the_viewer"] < 0.35


@pytest.mark.usefixtures("drawn")
def test_verdict_on_rows_and_columns_and_left_and_right(clean):
    for i in range(N):
        rewrite(clean, f"clip{i // 10}_{i % 10:03d}",
                lambda pose: exchange(swap_sides("eye", "ear", *keypoints.JOINTS[5:])(pose)))
    assert list(run(clean)["verdicts"]) == ["axes", "sides"]


def test_verdict_on_up_and_down(clean):
    for i in range(N):
        rewrite(clean, f"clip{i // 10}_{i % 10:03d}", lambda pose: pose * (1, -1, 1) + (0, 1, 0))
    report = run(clean)
    assert list(report["verdicts"]) == ["upright"]
    assert not report["suspects"]


@pytest.mark.usefixtures("drawn")
def test_missing_joints_are_no_fault(figures, tmp_path):
    people, images = [], []
    for i, (image, pose) in enumerate(figures):
        pose = pose.copy()
        pose[np.random.default_rng(i).random(17) < 0.3] = 0
        images.append({"id": i, "file_name": f"a{i}.png", "width": SIDE, "height": SIDE})
        people.append({"id": i, "image_id": i, "keypoints": (pose * (SIDE, SIDE, 2)).ravel().tolist()})
        (tmp_path / "set/images").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / f"set/images/a{i}.png")
    (tmp_path / "set/k.json").write_text(json.dumps({"images": images, "annotations": people}))
    report = run(tmp_path / "set")
    assert not report["verdicts"] and not report["suspects"]
    missing = sum(joint["missing"] for joint in report["joints"].values())
    assert missing == sum(p["keypoints"][2::3].count(0) for p in people) > 200


@pytest.mark.parametrize("pose", [np.zeros((17, 3)) + (0.5, 0.5, 1), np.linspace(0.1, 0.9, 17)[:, None] * (1, 0, 0)
                                  + (0, 0.5, 1)], ids=["one point", "one line"])
@pytest.mark.filterwarnings("error")
@pytest.mark.usefixtures("drawn")
def test_poses_that_are_none_break_nothing(figures, tmp_path, pose, capfd):
    for i in range(12):
        save_pair(tmp_path / "set", f"a{i}.png", figures[i][0], pose)
    kinds = {kind for kind, _ in suspects(run(tmp_path / "set"))}
    assert kinds == ({"point"} if pose[0, 0] == 0.5 else set()) and not capfd.readouterr().err


def test_half_length_portraits_are_judged_by_their_neck(figures, tmp_path):
    """No hips in sight: the shoulders of two of them are swapped, which their eyes contradict."""
    images, people = [], []
    for i, (image, pose) in enumerate(figures[:30]):
        pose = (swap_sides("shoulder", "elbow", "wrist")(pose) if i in (4, 6) else pose) * (SIDE, SIDE, 2)
        pose[11:] = 0
        save_pair(tmp_path / "set", f"a{i}.png", image, pose)
        images.append({"id": i, "file_name": f"a{i}.png", "width": SIDE, "height": SIDE})
        people.append({"id": i, "image_id": i, "keypoints": pose.ravel().tolist()})
    shutil.rmtree(tmp_path / "set/keypoints")
    (tmp_path / "set/k.json").write_text(json.dumps({"images": images, "annotations": people}))
    report = run(tmp_path / "set")
    assert suspects(report) == {("sides", "a4.png"), ("sides", "a6.png")}
    assert report["torsos"] == 0 and report["torsos_lying"] is None and not report["verdicts"]


@pytest.mark.usefixtures("drawn")
def test_of_few_people_nothing_is_said_in_general(figures, tmp_path):
    for i, (image, pose) in enumerate(figures[:6]):
        save_pair(tmp_path / "set", f"a{i}.png", image, swap_sides("eye", "ear", *keypoints.JOINTS[5:])(pose))
    report = run(tmp_path / "set")
    assert not report["verdicts"] and report["facing_the_viewer"] == 0


@pytest.mark.usefixtures("drawn")
def test_nothing_but_broken_pictures_is_a_report_too(tmp_path, capsys):
    (tmp_path / "set/images").mkdir(parents=True), (tmp_path / "set/keypoints").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "set/images/a.png")
    (tmp_path / "set/keypoints/b.json").write_text("{}")
    report = run(tmp_path / "set", status=2)
    assert suspects(report) == {("broken", "a.png"), ("orphan", "b.json")} and report["pictures"]["sound"] == 0


# ------------------------------------------------------------------------------------------- the same twice

def copied(image: np.ndarray, how: str) -> Image.Image:
    picture = Image.fromarray(image)
    if how == "mirrored":
        return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return picture.resize((96, 96), Image.Resampling.BICUBIC) if how == "enlarged" else picture


@pytest.mark.parametrize("how", ["same", "mirrored", "jpeg", "enlarged"])
def test_a_held_out_copy_leaks_and_a_trained_one_counts(clean, figures, how, capsys):
    held = data.split(PoseFolder(clean, SIDE))[1].groups()[0]
    trained, other = [f"clip{i}" for i in range(6) if f"clip{i}" != held][:2]
    image, pose = figures[10 * int(trained[-1])]                            # the picture TRAINED_000
    for group in (held, other):
        save_pair(clean, f"{group}_900.{'jpg' if how == 'jpeg' else 'png'}", copied(image, how), pose)
    report = run(clean)
    end = "jpg" if how == "jpeg" else "png"
    kept, extra = sorted([f"{trained}_000.png", f"{other}_900.{end}"])      # of those trained on, the first is kept
    assert {(k, n) for k, n in suspects(report) if k in ("leak", "copy")} == {("leak", f"{held}_900.{end}"),
                                                                              ("copy", extra)}
    [why] = [s["why"] for s in report["suspects"] if s["kind"] == "leak"]
    assert kept in why and ("mirrored" in why) == (how == "mirrored" and kept == f"{trained}_000.png")


@pytest.mark.usefixtures("drawn")
def test_a_set_of_ones_own_to_validate_on(clean, figures, tmp_path):
    save_pair(tmp_path / "val", "x.png", *Figures(1, SIDE, seed=99).source(0))
    save_pair(tmp_path / "val", "y.png", *figures[33])
    report = run(clean, "--val", str(tmp_path / "val"))
    assert suspects(report) == {("leak", "y.png")} and report["pictures"]["held_out"] == 2
    assert "clip3_003.png" in report["suspects"][0]["why"]
    (tmp_path / "val/images/y.png").unlink()
    assert suspects(run(clean, "--val", str(tmp_path / "val"))) == {("orphan", "y.json")}


def test_pictures_that_no_json_names_are_orphans(figures, tmp_path):
    for i in range(4):
        save_pair(tmp_path / "set", f"a{i}.png", *figures[i])
    shutil.rmtree(tmp_path / "set/keypoints")
    for name, pictures in (("train", (0, 1)), ("val", (2,))):           # nobody is in picture 1
        people = [{"image_id": i, "keypoints": (figures[i][1] * (SIDE, SIDE, 2)).ravel().tolist()} for i in (0, 2)]
        (tmp_path / f"set/{name}.json").write_text(json.dumps({
            "images": [{"id": i, "file_name": f"a{i}.png", "width": SIDE, "height": SIDE} for i in pictures],
            "annotations": [person for person in people if person["image_id"] in pictures]}))
    report = run(tmp_path / "set/train.json", "--val", str(tmp_path / "set/val.json"))
    assert suspects(report) == {("orphan", "a3.png")} and report["pictures"]["without_a_person"] == 1


def test_each_copy_is_named_with_a_picture_that_it_looks_like(figures, tmp_path):
    """A fade: each frame looks like the one before it, the last not at all like the first."""
    texture = np.random.default_rng(0).integers(60, 150, (8, 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    for i in range(12):
        save_pair(tmp_path / ("set" if i < 6 else "val"), f"f{i}.png", texture + np.uint8(2 * i), figures[i][1])
    found = run(tmp_path / "set", "--val", str(tmp_path / "val"))["suspects"]
    copies = {(s["kind"], s["file"].rsplit("/", 1)[-1]): s["why"] for s in found if s["kind"] in ("leak", "copy")}
    assert set(copies) == {("leak", "f6.png")} | {("copy", f"f{i}.png") for i in range(1, 6)}
    assert all(f"f{int(name[1]) - 1}.png" in why for (_, name), why in copies.items())
    assert "(2 of it)" in copies["copy", "f5.png"]


def test_figures_in_other_poses_on_one_flat_ground_are_not_copies(figures, tmp_path):
    for i, (_, pose) in enumerate(figures[:40]):
        save_pair(tmp_path / "set", f"a{i}.png", keypoints.draw(pose, 128), pose)
    assert not run(tmp_path / "set")["suspects"]


def brute_force(hashes: np.ndarray, thumbs: np.ndarray) -> np.ndarray:
    """What find_copies has to find, by comparing all with all."""
    root = np.arange(len(hashes))
    for i in range(len(hashes)):
        for j in range(i):
            for code, thumb in ((hashes[j, 0], thumbs[j]), (hashes[j, 1], thumbs[j][:, ::-1])):
                apart = np.abs(thumbs[i].astype(int) - thumb)
                if (bin(int(hashes[i, 0]) ^ int(code)).count("1") <= 3 and apart.max() <= 12 and apart.mean() <= 2):
                    root[root == root[i]] = min(root[i], root[j])
                    root[root == root[j]] = min(root[i], root[j])
    return root


def noisy_copies(rng, pictures: int, n: int):
    """Hashes [n,2] and thumbnails of n noisy copies of some pictures, half of them mirrored."""
    base = rng.integers(0, 256, (pictures, 8, 8), dtype=np.uint8).repeat(2, 1).repeat(2, 2).astype(int)
    thumbs = base[rng.integers(0, pictures, n)]
    thumbs = np.where(rng.random((n, 1, 1)) < 0.5, thumbs[:, :, ::-1], thumbs)
    thumbs = (thumbs + rng.integers(-1, 2, thumbs.shape)).clip(0, 255).astype(np.uint8)
    hashes = [dataset.check.difference_hash(Image.fromarray(t).resize((288, 288), Image.Resampling.BOX))
              for t in thumbs]
    return np.array(hashes, np.uint64), thumbs


def test_the_search_finds_what_brute_force_finds():
    hashes, thumbs = noisy_copies(np.random.default_rng(0), 60, 150)
    # Every distance from 0 to 5 bits, in any part of the hash.
    for i in range(60):
        bits = np.random.default_rng(i).choice(64, i % 6, replace=False)
        hashes[i] = hashes[i] ^ np.bitwise_or.reduce(np.uint64(1) << bits.astype(np.uint64), initial=np.uint64(0))
    found, wanted = dataset.check.find_copies(hashes, thumbs), brute_force(hashes, thumbs)
    assert (found == wanted).all() and 40 < len(np.unique(found)) < 120


def test_copies_are_found_among_different_pictures_of_one_hash_and_brightness():
    rng, zero = np.random.default_rng(0), np.zeros((100, 2), np.uint64)
    thumbs = rng.permuted(np.linspace(20, 230, 256).astype(np.uint8).reshape(1, 256).repeat(60, 0), axis=1)
    thumbs = np.concatenate([thumbs, thumbs[:40] ^ 1]).reshape(100, 16, 16)     # the same, one grey level off
    assert (dataset.check.find_copies(zero, thumbs) == [*range(60), *range(40)]).all()


def test_a_small_change_makes_another_picture():
    thumbs = np.random.default_rng(0).integers(0, 200, (1, 16, 16), dtype=np.uint8).repeat(3, 0)
    thumbs[1, 7, 7] += 10                                                       # noise
    thumbs[2, 7, 7:9] += 40                                                     # a hand
    assert dataset.check.find_copies(np.zeros((3, 2), np.uint64), thumbs).tolist() == [0, 0, 2]


def test_thousands_of_equal_pictures_are_one_group():
    thumbs = np.random.default_rng(0).integers(99, 101, (20_000, 16, 16), dtype=np.uint8)
    thumbs[5000:] = thumbs[0]
    assert not dataset.check.find_copies(np.zeros((len(thumbs), 2), np.uint64), thumbs).any()


def test_small_subjects_on_one_flat_ground_are_soon_told_apart(monkeypatch):
    rng, thumbs, compared = np.random.default_rng(0), np.full((400, 16, 16), 200, np.uint8), []
    for thumb, x, y in zip(thumbs, *rng.integers(0, 15, (2, 400)), strict=True):
        thumb[y:y + 2, x] = rng.integers(20, 180)
    look_alike = dataset.check._look_alike
    monkeypatch.setattr(dataset.check, "_look_alike", lambda a, *more: compared.append(len(a)) or look_alike(a, *more))
    zero = np.zeros((400, 2), np.uint64)
    assert (dataset.check.find_copies(zero, thumbs) == brute_force(zero, thumbs)).all()
    assert sum(compared) < 4000                                         # of 80,000 pairs


def test_the_search_has_a_bar_and_ends_where_brightness_differs(monkeypatch):
    class Bar:
        n = calls = 0

        def __init__(self, total, **_):
            bars.append(self)
            self.total = total

        def update(self, n=1):
            self.n, self.calls = self.n + n, self.calls + 1

        def close(self):
            assert self.n == self.total
    bars = []
    monkeypatch.setattr(dataset.check, "tqdm", Bar)
    thumbs = np.arange(0, 240, 3, dtype=np.uint8)[:, None, None].repeat(16, 1).repeat(16, 2)
    assert (dataset.check.find_copies(np.zeros((80, 2), np.uint64), thumbs) == np.arange(80)).all()
    assert bars[0].n == dataset.check.BANDS * dataset.check.WINDOW and bars[0].calls <= 2 * dataset.check.BANDS


# ------------------------------------------------------------------------------------------------- bars

def with_bars(image: np.ndarray, left=0, right=0, top=0, bottom=0, colour=(0, 0, 0)) -> np.ndarray:
    H, W = image.shape[:2]
    page = np.full((H + top + bottom, W + left + right, 3), colour, np.uint8)
    page[top:top + H, left:left + W] = image
    return page


BARS = [dict(top=9, bottom=9), dict(left=7, right=8), dict(top=12, bottom=10, colour=(255, 255, 255)),
        dict(left=6, right=6, top=6, bottom=6, colour=(90, 30, 40)), dict(top=40, bottom=40)]


@pytest.mark.parametrize("bars", BARS, ids=str)
@pytest.mark.parametrize("quality", [None, 85], ids=["png", "jpeg"])
def test_bars_are_found_to_the_pixel(figures, bars, quality, tmp_path):
    found = []
    for image, _ in figures[:6]:
        image = np.array(Image.fromarray(image).resize((256, 200), Image.Resampling.BICUBIC))
        whole = with_bars(image, **bars)
        wanted = (bars.get("left", 0), bars.get("top", 0), bars.get("left", 0) + 256, bars.get("top", 0) + 200)
        if quality:
            Image.fromarray(whole).save(tmp_path / "a.jpg", quality=quality)
            whole = np.array(Image.open(tmp_path / "a.jpg"))
        box = dataset.check.find_bars(whole)
        found.append(box != (0, 0, *whole.shape[1::-1]))
        assert not found[-1] or np.abs(np.subtract(box, wanted)).max() <= (2 if quality else 0)
    # White bars around a pale wall, of nearly the same colour, may be overlooked.
    assert all(found) or bars.get("colour") == (255, 255, 255) and sum(found) >= 4


def cut_out(kind: str, seed: int) -> np.ndarray:
    """Something on a flat background, nearly as large as the picture."""
    rng = np.random.default_rng(seed)
    page = Image.new("RGB", (256, 256), tuple(rng.integers(0, 256, 3).tolist()))
    pen = ImageDraw.Draw(page)
    ink = tuple(rng.integers(0, 256, 3).tolist())
    x0, y0, x1, y1 = (rng.uniform((0.05, 0.05, 0.75, 0.75), (0.25, 0.25, 0.95, 0.95)) * 256).tolist()
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
        image = cut_out(kind, seed)
        assert dataset.check.find_bars(image) == (0, 0, 256, 256), seed


def test_neither_figures_nor_plain_pictures_have_bars(figures):
    for image in [image for image, _ in figures] + [np.full((40, 60, 3), 7, np.uint8)]:
        assert dataset.check.find_bars(image) == (0, 0, *image.shape[1::-1])


def test_bars_on_one_side_only_are_part_of_the_picture(figures):
    for bars in (dict(top=9), dict(left=20, right=3)):
        whole = with_bars(figures[0][0], **bars)
        assert dataset.check.find_bars(whole) == (0, 0, *whole.shape[1::-1])


# ------------------------------------------------------------------------------------------------- trim

def dot_at(root, i: int, joint: int) -> np.ndarray:
    """The middle of the magenta dot in picture i of a folder, in pixels, and where the joint says it is."""
    ds = PoseFolder(root, SIDE)
    image, pose = np.asarray(data.read_picture(ds.paths[i])).astype(int), ds.pose(i)
    y, x = np.nonzero(np.abs(image - (255, 0, 255)).max(-1) < 60)
    return np.array([[x.mean() + 0.5, y.mean() + 0.5], pose[joint, :2] * image.shape[1::-1]])


def barred_set(root, figures, n=8, name="a{}.png"):
    """Every other picture has bars, and a dot of 5 x 5 pixels around each left wrist."""
    joint = keypoints.JOINTS.index("wrist_left")
    for i, (_, pose) in enumerate(figures[:n]):
        rng = np.random.default_rng(i)
        image, pose = rng.integers(80, 180, (90, 120, 3), dtype=np.uint8), pose.astype(np.float64)
        bars = dict(zip(("left", "right", "top", "bottom"), ((0, 0, 13, 11), (9, 9, 0, 0))[i // 2 % 2], strict=True))
        bars = bars if i % 2 else dict.fromkeys(bars, 0)
        x, y = 10 + 9 * i, 15 + 6 * i
        image[y - 2:y + 3, x - 2:x + 3] = 255, 0, 255
        image = with_bars(image, **bars)
        H, W = image.shape[:2]
        pose[joint] = (x + 0.5 + bars["left"]) / W, (y + 0.5 + bars["top"]) / H, 1
        save_pair(root, name.format(i), image, pose)
    return joint


def test_trimmed_pictures_keep_their_joints_where_they_were(figures, tmp_path, capsys):
    joint = barred_set(tmp_path / "set", figures)
    (tmp_path / "set/metadata.csv").write_text("file,clip\nimages/a0.png,one\n")
    report = run(tmp_path / "set", "--trim", str(tmp_path / "new"))
    assert {s for s in suspects(report) if s[0] == "bars"} == {("bars", f"a{i}.png") for i in (1, 3, 5, 7)}
    for i in range(8):
        before, after = (dot_at(tmp_path / where, i, joint) for where in ("set", "new"))
        assert np.abs(before[0] - before[1]).max() < 1e-9 and np.abs(after[0] - after[1]).max() < 1e-9
        assert Image.open(tmp_path / f"new/images/a{i}.png").size == (120, 90)
        for part in (f"images/a{i}.png", f"keypoints/a{i}.json"):
            same = (tmp_path / "set" / part).read_bytes() == (tmp_path / "new" / part).read_bytes()
            assert same == (i % 2 == 0)
    with open(tmp_path / "new/metadata.csv", newline="") as file:
        assert list(csv.reader(file))[1] == ["images/a0.png", "one"]
    assert not {s for s in suspects(run(tmp_path / "new")) if s[0] == "bars"}
    assert not (tmp_path / "new.partial").exists() and "4 of them trimmed" in capsys.readouterr().out


def test_what_cannot_be_read_is_left_out_of_the_copy(figures, tmp_path, capsys):
    barred_set(tmp_path / "set", figures)
    (tmp_path / "set/images/a5.png").write_bytes(b"not a picture")
    run(tmp_path / "set", "--trim", str(tmp_path / "new"), status=2)
    assert PoseFolder(tmp_path / "new", SIDE).names == [f"images/a{i}.png" for i in (0, 1, 2, 3, 4, 6, 7)]
    assert "7 sound pictures, 3 of them trimmed" in capsys.readouterr().out


def test_a_trimmed_jpeg(figures, tmp_path):
    joint = barred_set(tmp_path / "set", figures, name="b/a{}.jpg")
    run(tmp_path / "set", "--trim", str(tmp_path / "new"))
    for i in range(8):
        after = dot_at(tmp_path / "new", i, joint)
        assert np.abs(after[0] - after[1]).max() < 1.5
        assert Image.open(tmp_path / f"new/images/b/a{i}.jpg").format == "JPEG"


def coco_of(root, figures) -> int:
    """The barred set as COCO: two people in each picture, the smaller one first, then a thing and an odd crowd."""
    joint = barred_set(root, figures)
    images, people = [], []
    for i, path in enumerate(sorted((root / "images").iterdir())):
        W, H = Image.open(path).size
        pose = pose_files.read_seed(root / "keypoints" / f"{path.stem}.json") * (W, H, 2)
        pose[3] = 0
        images.append({"id": 10 + i, "file_name": path.name, "width": W, "height": H})
        small = pose * (0.5, 0.5, 1)
        for person in (small, pose):
            people.append({"id": len(people), "image_id": 10 + i, "iscrowd": 0, "category_id": 1, "bbox": [0, 0, W, H],
                           "segmentation": [person[5:8, :2].ravel().tolist()], "keypoints": person.ravel().tolist()})
        people.append({"image_id": 10 + i, "category_id": 2, "bbox": [0, 0, W, H], "area": W * H / 2})
        people.append({"image_id": 10 + i, "iscrowd": 1, "keypoints": None, "bbox": None, "segmentation": [["x"]],
                       "area": 7})
    shutil.rmtree(root / "keypoints")
    (root / "annotations").mkdir()
    (root / "annotations/person_keypoints.json").write_text(json.dumps(
        {"info": {"x": 1}, "images": images, "annotations": people}))
    return joint


def test_a_bad_coco_annotation_is_reported_and_left_out_of_the_copy(figures, tmp_path, capsys):
    coco_of(tmp_path / "set", figures)
    file = tmp_path / "set/annotations/person_keypoints.json"
    told = json.loads(file.read_text())
    told["annotations"][0]["keypoints"][12] = 99999             # of a0.png
    file.write_text(json.dumps(told))
    report = run(tmp_path / "set", "--trim", str(tmp_path / "new"), status=2)
    assert {s for s in suspects(report) if s[0] in ("broken", "orphan")} == {("broken", "a0.png")}
    assert "broken      1 (12.5%) cannot be used" in capsys.readouterr().out
    assert PoseFolder(tmp_path / "new", SIDE).names == [f"images/a{i}.png" for i in range(1, 8)]


@pytest.mark.usefixtures("drawn")
def test_coco_is_checked_and_trimmed(figures, tmp_path):
    joint = coco_of(tmp_path / "set", figures)
    report = run(tmp_path / "set", "--trim", str(tmp_path / "new"))
    assert {s for s in suspects(report) if s[0] == "bars"} == {("bars", f"a{i}.png") for i in (1, 3, 5, 7)}
    told = json.loads((tmp_path / "new/annotations/person_keypoints.json").read_text())
    assert told["info"] == {"x": 1} and len(told["annotations"]) == 32
    assert all((image["width"], image["height"]) == (120, 90) for image in told["images"])
    for i in range(8):
        after = dot_at(tmp_path / "new", i, joint)
        assert np.abs(after[0] - after[1]).max() < 1e-9
        assert not PoseFolder(tmp_path / "new", SIDE).pose(i)[3].any()
    had = json.loads((tmp_path / "set/annotations/person_keypoints.json").read_text())["annotations"]
    for k, (old, new) in enumerate(zip(had, told["annotations"], strict=True)):
        if k % 4 == 2:                                                  # a thing has no joints
            assert new == old | {"bbox": [0, 0, 120, 90], "area": 120 * 90 / 2}
            continue
        if k % 4 == 3:                                                  # what cannot be moved is left out
            assert new == (old if k // 4 % 2 == 0 else {"image_id": old["image_id"], "iscrowd": 1})
            continue
        shift = np.subtract(old["keypoints"], new["keypoints"]).reshape(17, 3)[4]
        assert np.allclose(np.subtract(old["segmentation"], new["segmentation"])[0].reshape(3, 2), shift[:2])
        assert new["bbox"] == [0, 0, 120, 90] and new["keypoints"][9:12] == [0, 0, 0]


def test_a_copy_that_cannot_be_opened_never_gets_its_name(figures, tmp_path, monkeypatch, capsys):
    def write(ds, kept, cut, made):
        (made / "k.json").write_text('{"images": [], "annotations": []}')
        return made / "k.json"
    coco_of(tmp_path / "set", figures)
    monkeypatch.setattr(dataset.check, "_cut_coco", write)
    run(tmp_path / "set", "--trim", str(tmp_path / "new"), status=2)
    assert "k.json" in capsys.readouterr().err and not list(tmp_path.glob("new*"))


def test_two_pictures_with_one_keypoint_file_need_the_same_bars(figures, tmp_path, capsys):
    noise = np.random.default_rng(0).integers(80, 180, (64, 64, 3), dtype=np.uint8)
    save_pair(tmp_path / "set", "a.png", with_bars(noise, top=9, bottom=9), figures[0][1])
    save_pair(tmp_path / "set", "a.jpg", noise, figures[0][1])
    run(tmp_path / "set", "--trim", str(tmp_path / "new"), status=2)
    err = capsys.readouterr().err
    assert "a.png" in err and "a.jpg" in err and "one keypoint file" in err and not list(tmp_path.glob("new*"))
    save_pair(tmp_path / "set", "a.png", noise, figures[0][1])
    run(tmp_path / "set", "--trim", str(tmp_path / "new"))
    assert len(PoseFolder(tmp_path / "new", SIDE)) == 2


@pytest.mark.parametrize("target", ["x/new", "y/images/new"])
def test_a_list_among_the_pictures_is_trimmed(figures, tmp_path, target):
    joint = barred_set(tmp_path / "set", figures, 4)
    barred_set(tmp_path / "set", figures, 2, name="p/q{}.png")
    names = ["a0.png", "a1.png", "a3.png", f"{tmp_path}/set/images/p/q1.png"]
    (tmp_path / "set/images/p/l.txt").write_text("".join(f"{tmp_path}/set/images/{n}\n" for n in names[:3]) + "q1.png")
    (tmp_path / "set/images/l.txt").write_text("\n".join(names))
    for where, wanted in (("set/images/l.txt", "p/q1.png"), ("set/images/p/l.txt", "q1.png")):
        run(tmp_path / where, "--trim", str(tmp_path / target))
        copy = PoseFolder(tmp_path / target / "l.txt", SIDE)
        assert copy.names == [f"images/{name}" for name in (*names[:3], wanted)]
        for i in range(4):
            after = dot_at(tmp_path / target / "l.txt", i, joint)
            assert np.abs(after[0] - after[1]).max() < 1e-9
        assert len(list((tmp_path / target).rglob("*.json"))) == 4
        assert len(list((tmp_path / target.split("/")[0]).rglob("*.json"))) == 4
        shutil.rmtree(tmp_path / target)


def test_a_list_may_name_a_picture_twice(figures, tmp_path):
    barred_set(tmp_path / "set", figures, 4)
    (tmp_path / "set/l.txt").write_text("images/a1.png\nimages/a0.png\n./images/a1.png\n")
    run(tmp_path / "set/l.txt", "--trim", str(tmp_path / "new"))
    assert PoseFolder(tmp_path / "new/l.txt", SIDE).names == [f"images/a{i}.png" for i in (1, 0, 1)]


def test_of_no_sound_picture_there_is_no_copy(figures, tmp_path, capsys):
    barred_set(tmp_path / "set", figures, 1)
    (tmp_path / "set/images/a0.png").write_bytes(b"not a picture")
    run(tmp_path / "set", "--trim", str(tmp_path / "new"), status=2)
    assert "no picture is sound" in capsys.readouterr().err and not list(tmp_path.glob("new*"))


def test_a_list_is_checked_and_trimmed(figures, tmp_path):
    joint = barred_set(tmp_path / "elsewhere", figures)
    barred_set(tmp_path / "set/of", figures, 2, name="z{}.png")
    names = [f"{tmp_path}/elsewhere/images/a{i}.png" for i in (5, 3, 2)] + ["of/images/z1.png", "of/images/z0.png"]
    (tmp_path / "set/train.txt").write_text("\n".join(names))
    (tmp_path / "set/of/keypoints/nobody.json").write_text("{}")            # a list is a choice: no orphans
    report = run(tmp_path / "set/train.txt", "--trim", str(tmp_path / "new"))
    assert {s for s in suspects(report) if s[0] in ("bars", "orphan")} == {("bars", n) for n in
                                                                          ("a5.png", "a3.png", "z1.png")}
    assert PoseFolder(tmp_path / "new/train.txt", SIDE).names == ["images/a5.png", "images/a3.png", "images/a2.png",
                                                                  "of/images/z1.png", "of/images/z0.png"]
    for i in range(5):
        after = dot_at(tmp_path / "new/train.txt", i, joint)
        assert np.abs(after[0] - after[1]).max() < 1e-9


def test_two_pictures_of_one_name_have_no_room_in_a_copy(figures, tmp_path, capsys):
    for part in "pq":
        barred_set(tmp_path / part, figures, 1)
    (tmp_path / "set").mkdir()
    (tmp_path / "set/l.txt").write_text("".join(f"{tmp_path}/{part}/images/a0.png\n" for part in "pq"))
    assert data.main([str(tmp_path / "set/l.txt"), "--workers", "0", "--out", str(tmp_path / "out"),
                      "--trim", str(tmp_path / "new")]) == 2
    assert "no room for it" in capsys.readouterr().err and not list(tmp_path.glob("new*"))


# ---------------------------------------------------------------------------------------------- the command

@pytest.mark.parametrize("flags, words", [
    (["--out", "SET/images"], "among the pictures"), (["--out", "SET/images/new"], "among the pictures"),
    (["--trim", "SET/new"], "is inside"), (["--trim", "SET"], "is inside"), (["--trim", "FULL"], "is there already"),
    (["--trim", "FULL/x"], "is there already"), (["--workers", "-1"], "--workers -1: at least 0"),
    (["--size", "0"], "--size 0"), (["--val", "NOWHERE"], "NOWHERE: there is no such"),
    (["--out", "NEW/x", "--trim", "NEW"], "is inside --trim"), (["--trim", "PART"], "PART.partial: that is there"),
    (["--out", "FULL/x"], "/full/x: FULL/x is a file; name"),
    (["--out", "FULL/x/y"], "FULL/x/y: FULL/x is a file"), (["--trim", "FULL/x/y"], "full/x: that is there already"),
    (["--val", "SET", "--out", "SET/images"], "among")])
def test_a_wrong_flag_is_one_sentence(clean, tmp_path, flags, words, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").write_text("mine")
    (tmp_path / "PART.partial/x").mkdir(parents=True)
    flags = [f.replace("SET", str(clean)).replace("FULL", str(tmp_path / "full")) for f in flags]
    words = words.replace("FULL", str(tmp_path / "full"))
    flags = [f.replace("NEW", str(tmp_path / "new")).replace("PART", str(tmp_path / "PART")) for f in flags]
    before = sorted(tmp_path.rglob("*"))
    assert data.main([str(clean), *(() if "--out" in flags else ("--out", str(tmp_path / "out"))), *flags]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1 and err.startswith("data.py: ")
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "full/x").read_text() == "mine"


def test_figures_take_no_other_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert data.main(["figures", "--trim", "new"]) == 2 and data.main(["figures:0"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 2 and "--trim" in err and not list(tmp_path.iterdir())
    assert "data.py: figures:0: after figures: comes a number" in err


@pytest.mark.parametrize("where", ["find_bars", "draw_overview", "_cut_picture"])
@pytest.mark.usefixtures("drawn")
def test_an_interruption_is_one_sentence_and_leaves_no_half_file(clean, tmp_path, monkeypatch, capsys, where):
    def interrupt(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(dataset.check, where, interrupt)
    assert data.main([str(clean), "--workers", "0", "--out", str(tmp_path / "out"), "--size", "64",
                      "--trim", str(tmp_path / "new")]) == 130
    assert capsys.readouterr().err.count("\n") == 1 and not list(tmp_path.glob("new*"))
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == (set() if where != "_cut_picture" else {"report.json", "suspects.txt", "overview.png"})


@pytest.mark.usefixtures("drawn")
def test_odd_file_names_are_printed_written_and_drawn(clean, capsys):
    name = "$x_{$ \t日本 \udcff.png"
    shutil.move(clean / "images/clip0_001.png", clean / "images" / name)
    shutil.move(clean / "keypoints/clip0_001.json", clean / "keypoints" / name.replace(".png", ".json"))
    rewrite(clean, name[:-4], lambda pose: pose + (0.7, 0, 0))
    assert suspects(run(clean)) == {("outside", name)}
    line = (clean.parent / "out/suspects.txt").read_text("utf-8", "surrogateescape")
    assert line.count("\t") == 2 and line.count("\n") == 1 and "日本 \udcff.png" in line


@pytest.mark.usefixtures("drawn")
def test_what_the_terminal_cannot_write_keeps_no_file_back(clean, monkeypatch):
    for part in ("images/clip0_001.png", "keypoints/clip0_001.json"):
        shutil.move(clean / part, clean / part.replace("clip0_001", "日本"))
    rewrite(clean, "日本", lambda pose: pose + (0.7, 0, 0))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    assert suspects(run(clean)) == {("outside", "日本.png")}
    assert b"images/??.png: " in sys.stdout.buffer.getvalue()


def test_nobody_has_to_read_what_is_printed(figures, tmp_path, monkeypatch, capsys):
    barred_set(tmp_path / "set", figures, 4)
    reader, writer = os.pipe()
    os.close(reader)
    with monkeypatch.context() as patch, open(writer, "w") as out:      # closing it complains of what was not written
        patch.setattr(sys, "stdout", out)
        run(tmp_path / "set", "--trim", str(tmp_path / "new"))
    assert len(PoseFolder(tmp_path / "new", SIDE)) == 4 and not capsys.readouterr().err


@pytest.mark.usefixtures("drawn")
def test_ordinary_pictures_are_taken_evenly(clean, monkeypatch):
    shown, framed = [], dataset.check.framed
    monkeypatch.setattr(dataset.check, "framed", lambda checked, i, side: shown.append(i) or framed(checked, i, side))
    run(clean)
    assert shown == data.evenly(N, plots.ACROSS).tolist()
