"""data.py against truths: dots found where the pose says, brute-force counts, golden hashes."""

import json
import os
import re
from unicodedata import normalize

import numpy as np
import pytest
import torch
from PIL import Image

import data
import keypoints
import plots
from data import InMemory, Part, PoseFolder, batches, crop_resize, split
from dataset.figures import Figures
from dataset.folder import find_groups, has_keypoints, read_table
from dataset.images import DataError, naming_broken, read_image


def some_pose(seed: int) -> np.ndarray:
    """Seventeen joints at positions of their own, none missing."""
    xy = np.random.default_rng(seed).uniform(0.1, 0.9, (17, 2))
    return np.column_stack([xy, np.ones(17)]).astype(np.float32)


def noise(W: int, H: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (H, W, 3), dtype=np.uint8))


def rows_of(pose: np.ndarray) -> dict:
    """A pose in the seed's layout."""
    return {name: [float(y) * 512, float(x) * 512]
            for name, (x, y, _) in zip(keypoints.JOINTS, pose, strict=True)}


def save_pair(root, name: str, image: Image.Image | np.ndarray, pose: np.ndarray) -> None:
    """root/images/NAME and its pose in root/keypoints."""
    file, label = root / "images" / name, (root / "keypoints" / name).with_suffix(".json")
    for path in (file, label):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(image)).save(file, quality=90)
    label.write_text(json.dumps(rows_of(pose)))


def write_pair(root, name: str, seed: int = 0, size=(12, 12)) -> None:
    """An image of noise, NAME.png, and its pose."""
    save_pair(root, f"{name}.png", noise(*size, seed), some_pose(seed))


def folder(root, n: int, size=(12, 12)):
    for i in range(n):
        write_pair(root, f"clip{i // 10}_{i % 10:03d}", i, size)
    return root


def write_coco(path, images: dict, folder_of_images=None) -> None:
    """images: name -> (width, height, list of [17, 3] poses in pixels with v = 0, 1, 2)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    listed, people = [], []
    for i, (name, (width, height, poses)) in enumerate(images.items()):
        listed.append({"id": i, "file_name": name, "width": width, "height": height})
        for pose in poses:
            people.append({"id": len(people), "image_id": i, "category_id": 1, "iscrowd": 0,
                           "keypoints": pose.reshape(-1).tolist()})
        if folder_of_images:
            folder_of_images.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (width, height), "gray").save(folder_of_images / name)
    path.write_text(json.dumps({"images": listed, "annotations": people, "categories": []}))


class Numbered(data.ImageDataset):
    """n images; every pixel says which one it is."""

    def __init__(self, n, size=4):
        self.n, self.size, self.seed = n, size, 0

    def __len__(self):
        return self.n

    def source(self, i):
        return np.full((self.size, self.size, 3), i, np.uint8), some_pose(i)


# ---------------------------------------------------------------------------------------- pixels

def test_every_byte_survives_the_way_to_a_tensor_and_back():
    image = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    x = data.to_tensor(image)
    assert x.shape == (3, 16, 16) and x.min() == -1 and x.max() == 1
    assert x[1, 0, 5].item() == pytest.approx(5 / 127.5 - 1)
    assert (data.to_uint8(torch.stack([x, x]))[1] == image).all()
    assert data.to_uint8(torch.full((3, 1, 1), 7.0)).max() == 255


@pytest.mark.parametrize("mode, value, expected", [
    ("RGBA", (200, 0, 0, 0), (255, 255, 255)),          # transparent: white, whatever lies below
    ("RGBA", (200, 0, 0, 255), (200, 0, 0)),
    ("LA", (10, 0), (255, 255, 255)),
    ("L", 77, (77, 77, 77)),
    ("1", 1, (255, 255, 255)),
    ("I;16", 257 * 100, (100, 100, 100)),               # PIL's convert() would clip this to 255
])
def test_modes_become_rgb(tmp_path, mode, value, expected):
    Image.new(mode, (5, 5), value).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").getpixel((2, 2)) == expected


def test_palette_with_a_transparent_colour(tmp_path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 9, 9, 9])
    image.putpixel((0, 0), 0)
    image.save(tmp_path / "a.png", transparency=1)
    read = read_image(tmp_path / "a.png")
    assert read.getpixel((3, 3)) == (255, 255, 255) and read.getpixel((0, 0)) == (0, 0, 0)


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (60, 40), "black")
    image.paste("white", (0, 0, 60, 10))            # the stored top ...
    exif = Image.Exif()
    exif[0x0112] = 6                                # ... which a viewer turns to the right
    image.save(tmp_path / "a.png", exif=exif)
    upright = read_image(tmp_path / "a.png")
    assert upright.size == (40, 60)
    assert upright.getpixel((38, 50)) == (255, 255, 255) and upright.getpixel((2, 50)) == (0, 0, 0)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("left", [0, 0.5])
def test_a_truncated_file_is_an_error_not_half_an_image(tmp_path, suffix, left):
    path = tmp_path / f"a.{suffix}"
    noise(64, 64).save(path)
    path.write_bytes(path.read_bytes()[:int(left * path.stat().st_size)])
    with pytest.raises(DataError, match=rf"a\.{suffix}: not a readable image"):
        read_image(path)


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    Image.new("L", (30, 30)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 800)         # PIL warns above, raises above 1600
    with pytest.raises(DataError, match="a.png: more than 800 pixels"):
        read_image(tmp_path / "a.png")


# -------------------------------------------------------------------------------------- geometry

def dotted(joint: int, W: int, H: int, pose: np.ndarray) -> Image.Image:
    """Black, with a bright smooth dot exactly at a joint; pixel centres lie at half numbers."""
    sigma = min(W, H) / 60
    x, y = np.meshgrid(np.arange(W) + 0.5, np.arange(H) + 0.5)
    square = (x - pose[joint, 0] * W) ** 2 + (y - pose[joint, 1] * H) ** 2
    bump = np.exp(-square / (2 * sigma ** 2))
    return Image.fromarray((255 * bump).round().astype(np.uint8)).convert("RGB")


def centroid(image: np.ndarray) -> np.ndarray:
    grey = image[..., 0].astype(float)
    grey[grey < 20] = 0                                 # the ripple of the resampling filter
    y, x = np.mgrid[:image.shape[0], :image.shape[1]] + 0.5
    return np.array([(x * grey).sum(), (y * grey).sum()]) / grey.sum()


@pytest.mark.parametrize("W, H, size", [
    (400, 400, 128), (500, 320, 128), (320, 500, 96), (100, 100, 160)])
def test_image_and_pose_move_together(W, H, size):
    checked = {False: 0, True: 0}
    for seed in range(80):
        joint, pose, rng = seed % 17, some_pose(seed), None
        if seed % 4:
            rng = np.random.default_rng(seed)
        square, moved = crop_resize(dotted(joint, W, H, pose), pose, size, rng, (0.6, 1.0))
        assert square.shape == (size, size, 3) and moved.dtype == np.float32
        nose = [p[0, 0] > p[5:7, 0].mean() for p in (pose, moved)]      # right of the shoulders?
        mirrored = nose[0] != nose[1]
        now = keypoints.MIRROR[joint] if mirrored else joint    # the other side's joint
        if (np.abs(moved[now, :2] - 0.5) < 0.42).all():         # the whole dot is inside
            assert np.abs(moved[now, :2] * size - centroid(square)).max() < 0.5, seed
            checked[mirrored] += 1
    assert min(checked.values()) >= 5


def test_a_crop_that_needs_no_scaling_copies_pixels_and_keeps_joints_outside():
    image, pose = np.asarray(noise(60, 20)), some_pose(0) / (3, 1, 1) + (1 / 3, 0, 0)
    pose[0], pose[1] = (1.2, 0.5, 1), (0, 0, 0)
    out, moved = crop_resize(image, pose, 20)
    assert (out == image[:, 20:40]).all()
    assert moved[0] == pytest.approx([(1.2 - 1 / 3) * 3, 0.5, 1]) and (moved[1] == 0).all()


@pytest.mark.parametrize("W, H", [(300, 100), (100, 300), (160, 100), (101, 250)])
def test_crops_follow_the_person(W, H):
    """Along the side that is cut, every drawn crop holds all joints of a person who fits, and so
    does the held-out crop, which is never empty."""
    rng, image, followed = np.random.default_rng(0), np.zeros((H, W, 3), np.uint8), 0
    for seed in range(60):
        pose = some_pose(seed)
        pose[:, :2] = rng.random(2) + (pose[:, :2] - 0.5) * rng.uniform(0.05, 1, 2)
        seen = pose[keypoints.on_canvas(pose), :2]
        low, high = (np.array([W, H]) - 100) // 2, (np.array([W, H]) + 100) // 2
        inside = not len(seen) or ((seen * (W, H) >= low) & (seen * (W, H) <= high + 1)).all()
        fits = len(seen) and (np.ptp(seen * (W, H), axis=0) < 78).all()
        for augment in (None, seed):
            drawn = None if augment is None else np.random.default_rng(augment)
            moved = crop_resize(image, pose, 50, drawn)[1]
            within, on = np.abs(moved[:, int(H > W)] - 0.5) < 0.5 + 1e-6, keypoints.on_canvas(pose)
            if fits and (drawn or not inside):                  # perhaps mirrored
                assert within[on].all() or augment is not None and within[on[keypoints.MIRROR]].all()
            assert augment is not None or keypoints.on_canvas(moved).any() or not len(seen)
        followed += bool(fits and not inside)
    assert followed >= 10


def test_centre_crops_of_centred_people_and_crops_of_square_images_are_those_of_version_1():
    rng = np.random.default_rng(3)
    for W, H in ((90, 30), (30, 90), (40, 40)):
        pose = some_pose(1)
        pose[:, :2] = 0.5 + (pose[:, :2] - 0.5) * 30 / np.array([W, H])
        for side in range(20, 31):
            at = rng.random(2) if W == H else (0.5, 0.5)
            x0, y0, *_ = data.place_square((W, H), pose, side, at if W == H else None)
            assert (x0, y0) == (min(int(at[0] * (W - side + 1)), W - side),
                                min(int(at[1] * (H - side + 1)), H - side))


def test_of_a_person_who_does_not_fit_the_square_holds_most_joints():
    pose = np.zeros((17, 3))
    pose[:4] = [(0.05, 0.5, 1), (0.8, 0.5, 1), (0.9, 0.5, 1), (0.95, 0.5, 1)]
    for at in (0, 0.5, 1):
        x0, _, x1, _ = data.place_square((400, 100), pose, 100, (at, at))
        assert x0 <= 320 and x1 >= 380


def test_a_small_image_is_not_cropped_to_be_enlarged_again():
    image = np.asarray(noise(16, 16))
    for seed in range(20):
        out, pose = crop_resize(image, some_pose(1), 16, np.random.default_rng(seed), (0.5, 1.0))
        if pose[5, 0] != some_pose(1)[5, 0]:                    # mirrored
            out, pose = out[:, ::-1], keypoints.flip(pose)
        assert np.array_equal(out, image) and np.allclose(pose, some_pose(1))
        _, pose = crop_resize(image, some_pose(1), 12, np.random.default_rng(seed), (0.5, 1.0))
        grown = np.ptp(pose[:, 0]) / np.ptp(some_pose(1)[:, 0])
        assert 1 <= grown + 1e-5 and grown <= 16 / 12 + 1e-5


@pytest.mark.parametrize("name, tolerance", [("a.png", 0), ("a.jpg", 1)])
def test_trim_bars_cuts_the_image_and_moves_the_joints(tmp_path, name, tolerance):
    joint, pose, inner = 9, some_pose(3), noise(600, 400)
    x, y = 200, 120
    inner.paste((255, 0, 255), (x - 8, y - 8, x + 8, y + 8))
    image = Image.new("RGB", (600, 520))
    image.paste(inner, (0, 70))                             # 70 black rows above, 50 below
    pose[joint] = x / 600, (y + 70) / 520, 1
    save_pair(tmp_path, name, image, pose)
    plain, trimmed = (PoseFolder(tmp_path, 64, trim_bars=trim) for trim in (False, True))
    cut, moved = trimmed.source(0)
    assert np.abs(np.subtract(cut.size, (600, 400))).max() <= 2 * tolerance
    assert np.abs(moved[joint, :2] * cut.size - (x, y)).max() <= tolerance + 1e-3
    if not tolerance:
        assert np.array_equal(cut, inner)
        assert np.allclose(moved * (600, 400, 1), pose * (600, 520, 1) - (0, 70, 0), atol=1e-4)
    assert (np.asarray(plain.source(0)[0])[0] < 9).all()    # the default keeps them
    assert plain.fingerprint() != trimmed.fingerprint()
    train, val = data.open_data(str(tmp_path), 64, val=str(tmp_path), trim_bars=True)
    assert train.fingerprint() == val.fingerprint() == trimmed.fingerprint()


# ------------------------------------------------------------------------------------ PoseFolder

def test_seed_layout_swaps_only_the_last_folder_called_images(tmp_path):
    root = tmp_path / "images" / "my_images_dir"
    write_pair(root, "x", 5)
    write_pair(root, "a/b.c", 6)
    Image.new("RGB", (12, 12)).save(root / "images" / "a" / ".hidden.png")
    ds = PoseFolder(root, 12)
    assert ds.names == ["images/a/b.c.png", "images/x.png"]
    for i, seed in ((0, 6), (1, 5)):
        image, pose = ds[i]
        assert (image == np.asarray(Image.open(ds.paths[i]))).all()
        assert np.abs(pose - some_pose(seed)).max() < 1e-6


def test_list_file(tmp_path):
    for seed, name in enumerate("abc"):
        write_pair(tmp_path / "set", name, seed)
    lines = ["# mine", "images/b.png", "", str(tmp_path / "set/images/a.png")]
    (tmp_path / "set/train.txt").write_text("\n".join(lines) + "\n")
    ds = PoseFolder(tmp_path / "set/train.txt", 12)
    assert ds.names == ["images/b.png", "images/a.png"]                 # in the list's order
    assert np.abs(ds[1][1] - some_pose(0)).max() < 1e-6
    (tmp_path / "data.yaml").write_text("path: .\ntrain: images/train\n")
    with pytest.raises(DataError, match="'path: .' is not the name of a file"):
        PoseFolder(tmp_path / "data.yaml", 12)
    (tmp_path / "set/bad.txt").write_text("../set/images/b.png\n")
    with pytest.raises(DataError, match="leads out of the list's folder"):
        PoseFolder(tmp_path / "set/bad.txt", 12)


def test_a_list_in_utf16_with_comments_backslashes_and_a_name_that_begins_with_a_hash(tmp_path):
    root = tmp_path / "images"
    for name in ("#1", "a/b"):
        write_pair(tmp_path, name)
    path = root / "list.txt"
    path.write_text("# a comment\r\n#1.png\r\na\\b.png\r\n", encoding="utf-16")
    assert PoseFolder(path, 8).paths == [str(root / "#1.png"), str(root / "a/b.png")]


def linked(path, target) -> None:
    try:
        path.symlink_to(target, target_is_directory=True)
    except OSError:
        pytest.skip("no right to make links")


def test_linked_folders_are_followed_and_loops_are_not(tmp_path):
    root, images = folder(tmp_path / "mine", 2), tmp_path / "mine/images"
    write_pair(root, "set/x")
    (images / "set").rename(tmp_path / "elsewhere")
    linked(images / "set", "../../elsewhere")
    for path, target in ((images / "loop", "."), (images / "up", "../.."),
                         (tmp_path / "elsewhere/back", images), (images / "z", "set")):
        linked(path, target)
    assert PoseFolder(root, 8).names == [
        "images/clip0_000.png", "images/clip0_001.png", "images/set/x.png"]


@pytest.mark.parametrize("here, there", [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_name_matches_a_file_in_the_other_unicode_form(tmp_path, here, there):
    """macOS stores \u00e9 as e and an accent, most other programs write one character."""
    here, there = normalize(here, "\u00e9t\u00e9/caf\u00e9"), normalize(there, "\u00e9t\u00e9/caf\u00e9")
    write_pair(tmp_path, here)
    label = tmp_path / f"keypoints/{there}.json"
    label.parent.mkdir()
    old = tmp_path / f"keypoints/{here}.json"
    old.rename(label)
    old.parent.rmdir()
    ds = PoseFolder(tmp_path, 8)
    assert (ds.labels, ds.broken) == ([str(label)], {})

    image = tmp_path / f"images/{here}.png"
    (tmp_path / "list.txt").write_text(f"images/{there}.png", encoding="utf-8")
    assert PoseFolder(tmp_path / "list.txt", 8).paths == [str(image)]

    pose = np.full((17, 3), 2.0)
    write_coco(tmp_path / "coco.json", {f"{there}.png".replace("/", "\\"): (12, 12, [pose])})
    assert PoseFolder(tmp_path / "coco.json", 8).paths == [str(image)]


@pytest.mark.parametrize("suffix", [".jfif", ".JPE"])
def test_other_names_of_jpeg_are_read(tmp_path, suffix):
    write_pair(tmp_path, "a")
    noise(12, 12).save(tmp_path / f"images/a{suffix}", "JPEG")
    (tmp_path / "images/a.png").unlink()
    assert PoseFolder(tmp_path, 8)[0][0].shape == (8, 8, 3)


@pytest.mark.parametrize("where", ["coco.json", "annotations/person_keypoints.json", "coco/k.json"])
def test_coco_takes_the_largest_person_that_has_joints(tmp_path, where):
    pixels = some_pose(4) * (80, 40, 2)
    small = pixels * (0.2, 0.2, 1)
    nobody, dot = np.zeros((17, 3)), np.zeros((17, 3))
    dot[3] = 70, 30, 2
    images = {"b.png": (80, 40, [small, nobody, pixels, dot]), "empty.png": (8, 8, [nobody]),
              "none.png": (8, 8, [])}
    path = tmp_path / where
    write_coco(path, images, tmp_path / "images")
    for root in (tmp_path, path):
        ds = PoseFolder(root, 40)
        assert ds.names == ["images/b.png"] and len(ds.skipped) == 2
        assert np.abs(ds.pose(0) - some_pose(4)).max() < 1e-6 and ds.label(0)[1] == (80, 40)


@pytest.mark.parametrize("size", [{}, {"width": 0, "height": 0}], ids=str)
def test_coco_without_sizes_takes_those_of_the_upright_images(tmp_path, size):
    exif = Image.Exif()
    exif[0x0112] = 6
    write_coco(tmp_path / "k.json", {"a.jpg": (40, 60, [some_pose(0) * (40, 60, 2)])})
    Image.new("RGB", (60, 40)).save(tmp_path / "a.jpg", exif=exif)
    told = json.loads((tmp_path / "k.json").read_text())
    told["images"] = [{"id": 0, "file_name": "a.jpg"} | size]
    (tmp_path / "k.json").write_text(json.dumps(told))
    ds = PoseFolder(tmp_path, 20)
    assert np.abs(ds.pose(0) - some_pose(0)).max() < 1e-6 and ds.label(0)[1] is None
    (tmp_path / "a.jpg").write_bytes(b"not an image")
    with pytest.raises(DataError, match="1 images cannot be used.*a.jpg: not a readable image"):
        PoseFolder(tmp_path, 20)                        # one broken image, which is more than 1 %


def test_coco_in_0_to_1_is_read_as_such(tmp_path):
    write_coco(tmp_path / "k.json", {"a.png": (40, 60, [some_pose(0) * (1, 1, 2)])}, tmp_path)
    assert np.abs(PoseFolder(tmp_path, 20).pose(0) - some_pose(0)).max() < 1e-6


def test_a_coco_id_of_two_images_is_refused(tmp_path):
    write_coco(tmp_path / "k.json", {name: (9, 9, [some_pose(0) * (9, 9, 2)])
                                     for name in ("a.png", "b.png")}, tmp_path)
    told = json.loads((tmp_path / "k.json").read_text())
    told["images"][1]["id"] = 0
    (tmp_path / "k.json").write_text(json.dumps(told))
    with pytest.raises(keypoints.PoseError, match="id 0 .*b.png.*a.png"):
        PoseFolder(tmp_path, 9)


@pytest.mark.parametrize("label, told", [
    ({"people": [{"pose_keypoints_2d": np.column_stack([some_pose(1)[:, :2] * (60, 40), np.ones(17)])
                  [[0] * 18].reshape(-1).tolist()}], "canvas_width": 60, "canvas_height": 40},
     (60, 40)),
    (some_pose(1)[[0] * 17].tolist(), None)], ids=["openpose", "ours"])
def test_a_keypoint_file_may_have_any_format(tmp_path, label, told):
    write_pair(tmp_path, "a", size=(30, 20))
    (tmp_path / "keypoints/a.json").write_text(json.dumps(label))
    pose, size = PoseFolder(tmp_path, 20).label(0)
    assert np.abs(pose[:, :2] - some_pose(1)[0, :2]).max() < 1e-6 and size == told


@pytest.mark.parametrize("changes, why", [
    ({"keypoints": [9999, 5, 2] * 17}, r"nose at \(9999, 5\)"),
])
def test_one_bad_coco_annotation_is_one_broken_image(tmp_path, changes, why):
    some = {f"{i:03d}.png": (20, 20, [some_pose(i) * (20, 20, 2)]) for i in range(120)}
    for n in (120, 90):
        write_coco(tmp_path / "k.json", dict(list(some.items())[:n]), tmp_path)
        told = json.loads((tmp_path / "k.json").read_text())
        for holder in (told["images"][0], told["annotations"][0]):
            holder.update({key: changes[key] for key in holder.keys() & changes.keys()})
        (tmp_path / "k.json").write_text(json.dumps(told))
        if n == 120:
            ds = PoseFolder(tmp_path, 20)
            assert len(ds) == 119 and list(ds.broken) == [str(tmp_path / "000.png")]
            assert re.search(why, ds.broken[str(tmp_path / "000.png")])
    with pytest.raises(DataError, match=f"1 images cannot be used.*{why}"):
        PoseFolder(tmp_path, 20)


def test_coco_of_which_many_images_are_gone_is_found_by_the_others(tmp_path):
    some = {f"{i:03d}.png": (9, 9, [some_pose(i) * (9, 9, 2)]) for i in range(300)}
    write_coco(tmp_path / "k.json", some, tmp_path / "images")
    for name in list(some)[:120]:
        (tmp_path / "images" / name).unlink()
    ds = PoseFolder(tmp_path, 9, limit=1)
    assert len(ds) == 180 and len(ds.broken) == 120 and ds.root == tmp_path
    os.rename(tmp_path / "images", tmp_path / "data")           # as FiftyOne calls it
    assert len(PoseFolder(tmp_path, 9, limit=1)) == 180
    os.rename(tmp_path / "data", tmp_path / "away")
    with pytest.raises(DataError, match=r"such as '000.png', is in .*images or beside it"):
        PoseFolder(tmp_path, 9)


@pytest.mark.parametrize("text", [
    '{"a.png": "three images: []"}', '["images", "annotations"]', '{"images": [1, 2]}',
    '[{"images": [], "annotations": []}]'])
def test_a_json_of_something_else_leaves_a_folder_of_plain_images(tmp_path, text):
    for name in "ab":
        Image.new("RGB", (9, 9)).save(tmp_path / f"{name}.png")
    (tmp_path / "captions.json").write_text(text)
    assert not has_keypoints(tmp_path)
    ds = PoseFolder(tmp_path, 9, poseless=True)
    assert ds.names == ["a.png", "b.png"] and not ds[0][1].any()
    with pytest.raises(DataError, match="there are no keypoints; label"):
        PoseFolder(tmp_path, 9)


def test_coco_among_other_json_files_is_found(tmp_path):
    write_coco(tmp_path / "k.json", {"a.png": (20, 20, [some_pose(0) * (20, 20, 2)])}, tmp_path)
    (tmp_path / "recon.json").write_text('{"worst": ["a.png"]}')
    for poseless in (False, True):
        ds = PoseFolder(tmp_path, 20, poseless)
        assert ds.names == ["a.png"] and ds[0][1][:, 2].all() and has_keypoints(tmp_path)
    small = some_pose(0) * (2, 2, 2)
    write_coco(tmp_path / "other.json", {"b.png": (20, 20, [some_pose(2) * (20, 20, 2)]),
                                         "a.png": (20, 20, [small])}, tmp_path)
    ds = PoseFolder(tmp_path, 20)                       # of both, each with ids of its own
    assert ds.names == ["a.png", "b.png"]
    for i, seed in ((0, 0), (1, 2)):
        assert np.abs(ds.pose(i) - some_pose(seed)).max() < 1e-6
    (tmp_path / "other.json").write_text((tmp_path / "k.json").read_text()[:-20])
    with pytest.raises(ValueError, match="other.json is not valid JSON"):
        PoseFolder(tmp_path, 20, poseless=True)


@pytest.mark.parametrize("name", ["../x.png", "/etc/x.png", "a/../../x.png", "..\\x.png",
                                  "C:\\x.png"])
def test_coco_names_cannot_leave_the_folder(tmp_path, name):
    write_coco(tmp_path / "set" / "k.json", {name: (9, 9, [some_pose(0) * (9, 9, 2)])})
    Image.new("RGB", (9, 9)).save(tmp_path / "x.png")
    with pytest.raises(DataError, match="leads out of the dataset"):
        PoseFolder(tmp_path / "set", 9)


def test_out_is_refused_among_the_images(tmp_path):
    pairs, plain = folder(tmp_path / "pairs", 2), tmp_path / "plain"
    plain.mkdir()
    (plain / "list.txt").write_text("images/a.png")
    (tmp_path / "link").symlink_to(plain)
    for out, root, refused in (
            (pairs / "images", pairs, True), (pairs / "images/x", pairs, True),
            (pairs / "x", pairs, False), (plain, plain, True), (plain / "x/y", plain, True),
            (tmp_path / "link/x", plain, True), (plain / "y/../x", tmp_path / "link", True),
            (tmp_path, plain, False), (tmp_path / "plain2", plain, False),
            (plain, plain / "list.txt", False)):
        if refused:
            with pytest.raises(DataError, match=f"--out {out} lies among the images of {root}"):
                data.check_out(out, None, str(root))
        else:
            data.check_out(out, str(root), "figures")


def test_errors_name_the_file(tmp_path):
    (tmp_path / "set/keypoints").mkdir(parents=True)
    with pytest.raises(DataError, match="nowhere: there is no such"):
        PoseFolder(tmp_path / "nowhere", 8)
    with pytest.raises(DataError, match="there are no keypoints; label"):
        PoseFolder(tmp_path, 8)
    with pytest.raises(DataError, match="set: no images in it"):
        PoseFolder(tmp_path / "set", 8)
    (tmp_path / "set/images").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "set/images/lonely.png")
    with pytest.raises(DataError, match=r"lonely.png: its keypoints .*lonely.json are missing"):
        PoseFolder(tmp_path / "set", 8)


def test_a_pose_file_that_cannot_be_used_is_named(tmp_path):
    write_pair(tmp_path, "x")
    path = tmp_path / "keypoints/x.json"
    rows = json.loads(path.read_text())
    for broken in ({k: v for k, v in rows.items() if k != "nose"}, rows | {"nose": [0, None]}):
        path.write_text(json.dumps(broken))
        with pytest.raises(DataError, match=r"x\.json.*nose"):
            PoseFolder(tmp_path, 8)[0]


def test_fingerprints_do_not_change_between_versions(tmp_path):
    """A run resumes, and a latent cache is found, only while they stay."""
    for name in ("images/clip_1.png", "keypoints/clip_1.json", "images/clip_2.png",
                 "keypoints/clip_2.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * 10)
        os.utime(tmp_path / name, ns=(1, 123456789))
    pose = np.column_stack([5.0 * np.arange(17) + 1, 3.0 * np.arange(17) + 2, np.full(17, 2)])
    write_coco(tmp_path / "k.json", {"images/clip_1.png": (100, 80, [pose])})
    ds, figures = PoseFolder(tmp_path, 64), Figures(10, 32, seed=5)
    for some, start in ((ds, "3e2cee63b066c7ab"), (Part(ds, [1]), "e086c00ec6723b7c"),
                        (PoseFolder(tmp_path / "k.json", 64), "6c7876eae09b0711"),
                        (figures, "8a851cf292cb06fb"), (Part(figures, [3, 1]), "4bbd6effb013b1a7")):
        assert some.fingerprint()[:16] == start
    for change in (lambda: os.utime(tmp_path / "images/clip_1.png", ns=(1, 2)),
                   lambda: (tmp_path / "keypoints/clip_2.json").write_bytes(b"xx"),
                   lambda: (tmp_path / "images/clip_2.png").rename(tmp_path / "images/clip.png")):
        before = PoseFolder(tmp_path, 64, limit=1).fingerprint()
        change()
        assert PoseFolder(tmp_path, 64, limit=1).fingerprint() != before


# ---------------------------------------------------------------------------------- broken images

@pytest.mark.parametrize("workers", [0, 2])
def test_one_broken_image_of_300_is_named_and_replaced(tmp_path, workers):
    ds = PoseFolder(folder(tmp_path, 300), 12)
    bad = ds.paths[7]
    open(bad, "wb").write(b"not an image")
    for _ in range(2):                                              # a resumed run adds no line
        with naming_broken(tmp_path / "broken.txt", Part(ds, range(300)), ds):
            seen = [i for *_, indices in batches(ds, 25, seed=0, start=0, stop=12, workers=workers)
                    for i in indices.tolist()]
        assert sorted(seen) == sorted([*range(7), 8, *range(8, 300)])       # the next one
        assert list(ds.broken) == [bad]
        [line] = (tmp_path / "broken.txt").read_text().splitlines()
        assert line.startswith(f"{bad}\t")


def test_more_than_one_percent_of_broken_images_ends_the_run(tmp_path):
    ds = PoseFolder(folder(tmp_path, 100), 12)
    for i in range(5):
        open(ds.paths[i], "wb").write(b"not an image")
    with pytest.raises(DataError, match=r"2 images cannot be used, and at most 1 .*\.png"):
        for _ in batches(split(ds)[0], 1, seed=0, start=0, stop=100):
            pass


def test_missing_keypoints_count_when_the_folder_is_read(tmp_path):
    files = sorted((folder(tmp_path, 200) / "keypoints").iterdir())
    files[3].unlink(), files[8].unlink()
    ds = PoseFolder(tmp_path, 12)
    assert len(ds) == 198 and len(ds.broken) == 2
    files[9].unlink()
    with pytest.raises(DataError, match="3 images cannot be used"):
        PoseFolder(tmp_path, 12)


# ----------------------------------------------------------------------------------------- split

def test_split_keeps_clips_whole_and_does_not_depend_on_order(tmp_path):
    ds = PoseFolder(folder(tmp_path, 120), 12)
    train, val = split(ds)
    groups = [set(part.groups()) for part in (train, val)]
    assert groups[0] | groups[1] == {f"clip{i}" for i in range(12)} and not groups[0] & groups[1]
    assert len(val) == 20 and sorted(train.indices + val.indices) == list(range(120))
    shuffled = np.random.default_rng(0).permutation(120).tolist()
    assert set(split(Part(ds, shuffled))[1].groups()) == groups[1]
    for large, small in ((0, 10), (10, 0)):                 # more than half is trained on
        part = Part(ds, [*range(large, large + 10), small, small + 1])
        assert set(split(part)[1].groups()) == {ds.groups()[small]}


def test_groups_come_from_metadata_before_names(tmp_path):
    names = PoseFolder(folder(tmp_path, 20), 12).names
    lines = [f"{name},{'odd' if i % 2 else 'even'}" for i, name in enumerate(names)]
    (tmp_path / "metadata.csv").write_text("\n".join(["file,animation", *lines]))
    assert PoseFolder(tmp_path, 12).groups() == ["even", "odd"] * 10
    (tmp_path / "metadata.csv").write_text("")
    assert PoseFolder(tmp_path, 12).groups() == [f"clip{i // 10}" for i in range(20)]


@pytest.mark.parametrize("row", ["a/{}.png,{}", "./images/a/{}.png,{}", "a\\{}.png,{}",
                                 "a/{}.png;{}", "A/{}.PNG\t{}", "/home/me/set/images/a/{}.png,{}",
                                 "C:\\set\\images\\a\\{}.png,{}", '"a/{}", {}'])
@pytest.mark.parametrize("header", ["file,group", "Group,File_Name", " FILENAME , Video "])
@pytest.mark.parametrize("coding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
def test_rows_of_metadata_match_whatever_wrote_them(tmp_path, row, header, coding):
    separator = next((c for c in ";\t" if c in row), ",")
    columns = header.replace(",", separator)
    if header.startswith("Group"):
        row = separator.join(row.rsplit(separator, 1)[::-1])
    names = ["images/a/x1.png", "images/a/x2.png", "images/b/x1.png"]
    cells = [("x1", "caf\u00e9"), ("x2", "two")]
    if header.startswith("Group"):
        cells = [cell[::-1] for cell in cells]
    lines = [columns, *(row.format(*cell) for cell in cells), ""]
    (tmp_path / "metadata.csv").write_text("\r\n".join(lines), coding)
    groups, metadata = find_groups(names, read_table(tmp_path, names))
    assert groups == ["caf\u00e9", "two", "b/x"] and metadata.startswith("2 of 2 rows")


def test_rows_of_metadata_that_match_two_images_or_none_are_told(tmp_path):
    (tmp_path / "metadata.csv").write_text("file,group\nx1.png,one\ny7.png,two\nz.png,three\n")
    names = ["images/a/x1.png", "images/b/x1.png", "images/b/y7.png"]
    groups, metadata = find_groups(names, read_table(tmp_path, names))
    assert groups == ["a/x", "b/x", "two"]
    assert metadata == "1 of 3 rows of metadata.csv match an image, 2 of 3 images have no row"
    (tmp_path / "metadata.csv").write_text("file,kind\ny7.png,one\n")
    assert "no column for groups" in find_groups(names, read_table(tmp_path, names))[1]
    (tmp_path / "metadata.csv").write_text("who,group\nx1.png,one\n")
    assert "has the columns who, group" in find_groups(names, read_table(tmp_path, names))[1]


def test_one_clip_alone_splits_by_image_with_a_warning(tmp_path, capsys):
    for i in range(10):
        write_pair(tmp_path, f"frame_{i}")
    train, val = split(PoseFolder(tmp_path, 12))
    assert len(val) == 2 and len(train) == 8
    assert "single images are" in capsys.readouterr().err
    with pytest.raises(DataError, match="3 images are too few"):
        split(Part(PoseFolder(tmp_path, 12), [0, 1, 2]))


@pytest.mark.parametrize("sizes, held", [
    ((20, 20), 4), ((4, 4), 2), ((50, 50, 4), 11), ((2, 2), 2), ((3, 1), 2), ((30, 1, 1), 2)], ids=str)
def test_of_few_large_groups_each_is_trained_on(tmp_path, sizes, held, capsys):
    for name, size in zip("abc", sizes, strict=False):
        for i in range(size):
            write_pair(tmp_path, f"{name}/{i:04d}")
    train, val = split(PoseFolder(tmp_path, 12))
    assert abs(len(val) - held) <= 1 and len(val) >= 2
    told = capsys.readouterr().err
    for group in set(val.groups()) - set(train.groups()):
        assert re.search(rf"all images of .*\b{group}\b.* held out", told) or len(sizes) == 3


def test_parts_and_memories_tell_of_each_image_what_the_dataset_tells(tmp_path):
    for ds in (PoseFolder(folder(tmp_path, 3), 12), Figures(3, 12)):
        around = InMemory(Part(InMemory(ds), [2, 0]))
        assert [around.name(0), around.name(1)] == [ds.name(2), ds.name(0)]
        assert around.groups() == [ds.groups()[i] for i in (2, 0)]
        assert around.fingerprint() == Part(ds, [2, 0]).fingerprint() != ds.fingerprint()
        assert InMemory(ds).fingerprint() == ds.fingerprint() and around.broken is ds.broken
        assert (around[0][0] == ds[2][0]).all()


def test_memory_holds_no_more_than_its_budget():
    class Counted(Numbered):
        reads = 0

        def source(self, i):
            self.reads += 1
            return super().source(i)
    ds = Counted(10)
    kept = InMemory(ds, budget=6 * 4 * 4 * 3)
    first, second = ([kept[i][0].copy() for i in range(10)] for _ in range(2))
    assert ds.reads == 10 + 4 and (np.stack(first) == np.stack(second)).all()


def test_held_out_images_are_given_in_any_form(tmp_path):
    folder(tmp_path, 20)
    for val, n in (("figures:7", 7), (str(tmp_path), 20)):
        for spec in (str(tmp_path), "figures:9"):
            train, held_out = data.open_data(spec, 12, val)
            assert (len(train), len(held_out)) == (20 if spec != "figures:9" else 9, n)
    train, held_out = data.open_data("figures:5", 12, "figures:5")
    assert not any((train[i][0] == held_out[i][0]).all() for i in range(5))     # other figures


# --------------------------------------------------------------------------------------- batches

@pytest.mark.parametrize("n, batch_size", [(10, 4), (3, 8), (12, 4)])
def test_every_image_appears_once_an_epoch(n, batch_size):
    row, other = (np.concatenate([data.step_indices(n, batch_size, seed, k) for k in range(30)])
                  for seed in (3, 4))
    epochs = row[:len(row) // n * n].reshape(-1, n)
    assert (np.sort(epochs, 1) == np.arange(n)).all()
    assert len({tuple(epoch) for epoch in epochs.tolist()}) > 1 and (row != other).any()


def test_step_k_is_a_function_of_seed_and_k(tmp_path):
    ds = PoseFolder(folder(tmp_path, 10, size=(30, 24)), 16)
    whole, resumed, twice = (
        list(batches(some, 4, seed=1, start=start, stop=8, workers=workers, augment=True))
        for some, start, workers in ((ds, 0, 0), (ds, 5, 0), (InMemory(ds), 0, 2)))
    assert len(resumed) == 3 and len(whole) == len(twice) == 8
    for a, b in [*zip(whole[5:], resumed, strict=True), *zip(whole, twice, strict=True)]:
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    other = next(batches(ds, 4, seed=2, start=0, stop=1, augment=True))
    assert not torch.equal(other[0], whole[0][0])


def test_batches_hold_the_images_they_name_and_leave_the_global_generator_alone():
    ds, before = Numbered(9), torch.get_rng_state()
    for images, poses, indices in batches(ds, 4, seed=0, start=0, stop=5):
        assert images.shape == (4, 3, 4, 4) and images.dtype == poses.dtype == torch.float32
        assert torch.equal(((images[:, 0, 0, 0] + 1) * 127.5).round().long(), indices)
        assert np.allclose(poses, np.stack([some_pose(i) for i in indices.tolist()]))
    assert torch.equal(torch.get_rng_state(), before)


def test_augmentation_mirrors_half_and_crops_within_the_zoom():
    ds = Numbered(1, size=8)
    ds.source = lambda i: (np.zeros((40, 40, 3), np.uint8), some_pose(0))   # larger than shown
    poses = torch.cat([pose for _, pose, _ in batches(ds, 50, seed=0, start=0, stop=20,
                                                      augment=True, zoom=(0.5, 1))])

    def width(pose):        # distance of two joints, which grows as the crop's side shrinks
        return pose[..., 5, 0] - pose[..., 9, 0]
    plain, mirrored = width(some_pose(0)), width(keypoints.flip(some_pose(0)))
    assert np.sign(plain) != np.sign(mirrored), "choose another pose: this one cannot tell"
    turned = torch.sign(width(poses)) == np.sign(mirrored)
    assert 0.44 < turned.float().mean() < 0.56
    growth = torch.where(turned, width(poses) / mirrored, width(poses) / plain)
    assert 1 <= growth.min() + 1e-5 and growth.max() <= 2 + 1e-5 and growth.max() > 1.9


# -------------------------------------------------------------------------------------------- grid

def test_grid_shows_the_images_enlarged_and_words_beside_them(tmp_path):
    red, texture = np.full((40, 40, 3), (255, 0, 0), np.uint8), np.asarray(noise(40, 40))
    page = plots.save_grid(
        tmp_path / "new" / "a.png", [[red, texture], [texture, None]], columns=["one", "two"],
        labels=["first", "second"], captions=[["a" * 99, ""], ["", ""]], title="Title")
    read = np.asarray(Image.open(tmp_path / "new" / "a.png"))
    assert (read == np.asarray(page)).all()
    assert ((read == (255, 0, 0)).all(-1)).sum() == 160 * 160       # x4, nothing drawn over them
    big = texture.repeat(4, 0).repeat(4, 1)
    windows = [(y, x) for y in range(read.shape[0] - 159) for x in range(read.shape[1] - 159)
               if (read[y, x] == big[0, 0]).all() and (read[y + 159, x + 159] == big[-1, -1]).all()
               and (read[y:y + 160, x:x + 160] == big).all()]
    assert len(windows) == 2
    assert (read[[0, -1]] == 255).all() and (read[:, [0, -1]] == 255).all()     # within the margins


def test_grid_of_fewer_captions_than_rows_and_of_no_image_at_all(tmp_path):
    image = np.zeros((160, 160, 3), np.uint8)
    both, one = (plots.save_grid(tmp_path / "a.png", [[image], [image]], captions=captions)
                 for captions in ([["low"], []], [["low"]]))
    assert np.array_equal(both, one)
    for rows in ([], [[]], [[None]], [[None, None], [None]]):
        page = plots.save_grid(tmp_path / "a.png", rows, columns=["one"], title="Title")
        assert min(page.size) > 0
