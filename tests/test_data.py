"""data.py against truths: dots found in the picture where the pose says, brute-force counts, numpy's own statistics."""

import json
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image

import data
import keypoints
import plots
from data import DataError, InMemory, Part, PoseFolder, batches, split, to_square
from dataset.figures import Figures
from dataset.latents import LatentCache, latent_batch


def some_pose(seed: int) -> np.ndarray:
    """Seventeen joints at positions of their own, none missing."""
    xy = np.random.default_rng(seed).uniform(0.1, 0.9, (17, 2))
    return np.column_stack([xy, np.ones(17)]).astype(np.float32)


def write_pair(root, name: str, seed: int = 0, size=(12, 12)) -> None:
    """root/images/NAME.png of noise and root/keypoints/NAME.json in the seed's layout."""
    image, pose_file = root / "images" / f"{name}.png", root / "keypoints" / f"{name}.json"
    image.parent.mkdir(parents=True, exist_ok=True), pose_file.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(image)
    rows = {j: [float(y) * 512, float(x) * 512] for j, (x, y, _) in zip(keypoints.JOINTS, some_pose(seed), strict=True)}
    pose_file.write_text(json.dumps(rows))


def folder(root, n: int, size=(12, 12)):
    for i in range(n):
        write_pair(root, f"clip{i // 10}_{i % 10:03d}", i, size)
    return root


def write_coco(path, images: dict, folder_of_images=None) -> None:
    """images: name -> (width, height, list of [17,3] poses in pixels with v = 0, 1, 2)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    listed, people = [], []
    for i, (name, (width, height, poses)) in enumerate(images.items()):
        listed.append({"id": i, "file_name": name, "width": width, "height": height})
        for pose in poses:
            people.append({"id": len(people), "image_id": i, "category_id": 1, "iscrowd": 0, "bbox": [0, 0, 1, 1],
                           "num_keypoints": int((pose[:, 2] > 0).sum()), "keypoints": pose.reshape(-1).tolist()})
        if folder_of_images:
            folder_of_images.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (width, height), "gray").save(folder_of_images / name)
    path.write_text(json.dumps({"images": listed, "annotations": people, "categories": []}))


class Numbered(data.Pictures):
    """n pictures whose every pixel says which one it is."""

    def __init__(self, n, size=4):
        self.n, self.size, self.seed = n, size, 0

    def __len__(self):
        return self.n

    def source(self, i):
        return np.full((self.size, self.size, 3), i, np.uint8), some_pose(i)


# ---------------------------------------------------------------------------------------------- pixels

def test_every_byte_survives_the_way_to_a_tensor_and_back():
    image = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    x = data.to_tensor(image)
    assert x.shape == (3, 16, 16) and x.min() == -1 and x.max() == 1
    assert x[1, 0, 5].item() == pytest.approx(5 / 127.5 - 1)
    assert (data.to_uint8(x) == image).all()
    assert (data.to_uint8(torch.stack([x, x]))[1] == image).all()
    assert data.to_uint8(torch.full((3, 1, 1), 7.0)).max() == 255


@pytest.mark.parametrize("mode, value, expected", [
    ("RGBA", (200, 0, 0, 0), (255, 255, 255)),          # transparent: white, whatever hides below
    ("RGBA", (200, 0, 0, 255), (200, 0, 0)),
    ("LA", (10, 0), (255, 255, 255)),
    ("L", 77, (77, 77, 77)),
    ("1", 1, (255, 255, 255)),
    ("I;16", 257 * 100, (100, 100, 100)),               # PIL's convert() would clip this to 255
])
def test_modes_become_rgb(tmp_path, mode, value, expected):
    Image.new(mode, (5, 5), value).save(tmp_path / "a.png")
    assert data.read_picture(tmp_path / "a.png").getpixel((2, 2)) == expected


def test_palette_with_a_transparent_colour(tmp_path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 9, 9, 9])
    image.putpixel((0, 0), 0)
    image.save(tmp_path / "a.png", transparency=1)
    picture = data.read_picture(tmp_path / "a.png")
    assert picture.getpixel((3, 3)) == (255, 255, 255) and picture.getpixel((0, 0)) == (0, 0, 0)


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (60, 40), "black")
    image.paste("white", (0, 0, 60, 10))                # the stored top ...
    exif = Image.Exif()
    exif[0x0112] = 6                                    # ... which a viewer turns a quarter clockwise: to the right
    image.save(tmp_path / "a.png", exif=exif)
    upright = data.read_picture(tmp_path / "a.png")
    assert upright.size == (40, 60)
    assert upright.getpixel((38, 50)) == (255, 255, 255) and upright.getpixel((2, 50)) == (0, 0, 0)


def test_truncated_picture_is_an_error_not_half_a_picture(tmp_path):
    for suffix in ("png", "jpg"):
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        whole = tmp_path / f"a.{suffix}"
        Image.fromarray(noise).save(whole)
        whole.write_bytes(whole.read_bytes()[:-len(whole.read_bytes()) // 2])
        with pytest.raises(DataError, match=rf"a\.{suffix}.*cannot be read as a picture"):
            data.read_picture(whole)
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(DataError, match="empty.png"):
        data.read_picture(tmp_path / "empty.png")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path, make):
    make(tmp_path / "x.png")
    with pytest.raises(DataError, match=r"x\.png: a picture is a file, and this is none"):
        data.read_picture(tmp_path / "x.png")


def test_huge_picture_is_refused(tmp_path, monkeypatch):
    Image.new("L", (30, 30)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 800)         # PIL warns above 800 and raises above 1600
    with pytest.raises(DataError, match="more than 800 pixels"):
        data.read_picture(tmp_path / "a.png")


# -------------------------------------------------------------------------------------------- geometry

def dotted(joint: int, W: int, H: int, pose: np.ndarray) -> Image.Image:
    """Black, with a bright smooth dot exactly at a joint; pixel centres lie at half numbers."""
    sigma = min(W, H) / 60
    x, y = np.meshgrid(np.arange(W) + 0.5, np.arange(H) + 0.5)
    bump = np.exp(-((x - pose[joint, 0] * W) ** 2 + (y - pose[joint, 1] * H) ** 2) / (2 * sigma ** 2))
    return Image.fromarray((255 * bump).round().astype(np.uint8)).convert("RGB")


def centroid(image: np.ndarray) -> np.ndarray:
    grey = image[..., 0].astype(float)
    grey[grey < 20] = 0                                 # the ripple of the resampling filter
    y, x = np.mgrid[:image.shape[0], :image.shape[1]] + 0.5
    return np.array([(x * grey).sum(), (y * grey).sum()]) / grey.sum()


@pytest.mark.parametrize("W, H, size", [(400, 400, 128), (500, 320, 128), (320, 500, 96), (100, 100, 160)])
def test_picture_and_pose_move_together(W, H, size):
    checked = {False: 0, True: 0}
    for seed in range(80):
        joint, pose, random = seed % 17, some_pose(seed), seed % 4 > 0
        picture = dotted(joint, W, H, pose)
        rngs = [np.random.default_rng(seed) if random else None for _ in range(2)]      # the same draw twice
        zoom = (0.6, 1.0) if random else (1, 1)
        _, plain = to_square(picture, pose, size, rngs[0], zoom)
        image, moved = to_square(picture, pose, size, rngs[1], zoom, flip=True)
        assert image.shape == (size, size, 3) and moved.dtype == np.float32
        mirrored = not np.allclose(moved, plain)
        now = keypoints.MIRROR[joint] if mirrored else joint        # a mirror gives the dot to the other side's joint
        if (np.abs(moved[now, :2] - 0.5) < 0.42).all():             # the whole dot is inside
            assert np.abs(moved[now, :2] * size - centroid(image)).max() < 0.5, seed
            checked[mirrored] += 1
    assert min(checked.values()) >= 10


def test_same_draw_with_and_without_flip_is_the_mirror_image():
    image, pose = dotted(3, 300, 200, some_pose(1)), some_pose(1)
    plain, mirrored = (to_square(image, pose, 64, flip=flip) for flip in (False, True))
    assert (mirrored[0] == plain[0][:, ::-1]).all()
    left, right = keypoints.JOINTS.index("wrist_left"), keypoints.JOINTS.index("wrist_right")
    assert mirrored[1][left, 0] == pytest.approx(1 - plain[1][right, 0])
    assert mirrored[1][left, 1] == plain[1][right, 1]


def test_a_crop_that_needs_no_scaling_copies_pixels_and_keeps_joints_outside():
    image = np.random.default_rng(0).integers(0, 256, (20, 60, 3), dtype=np.uint8)
    pose = some_pose(0)
    pose[0], pose[1] = (0.95, 0.5, 1), (0, 0, 0)
    out, moved = to_square(image, pose, 20)
    assert (out == image[:, 20:40]).all()
    assert moved[0] == pytest.approx([(0.95 - 1 / 3) * 3, 0.5, 1]) and (moved[1] == 0).all()


# -------------------------------------------------------------------------------------------- PoseFolder

def test_seed_layout_swaps_only_the_folder_called_images(tmp_path):
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
    write_pair(tmp_path / "set", "b", 1), write_pair(tmp_path / "set", "a", 2), write_pair(tmp_path / "set", "c", 3)
    lines = ["# mine", "images/b.png", "", str(tmp_path / "set" / "images" / "a.png")]
    (tmp_path / "set" / "train.txt").write_text("\n".join(lines) + "\n")
    ds = PoseFolder(tmp_path / "set" / "train.txt", 12)
    assert [os.path.basename(name) for name in ds.names] == ["b.png", "a.png"]      # in the list's order
    assert np.abs(ds[1][1] - some_pose(2)).max() < 1e-6
    (tmp_path / "set" / "bad.txt").write_text("../set/images/b.png\n")
    with pytest.raises(DataError, match="climbs out"):
        PoseFolder(tmp_path / "set" / "bad.txt", 12)


@pytest.mark.parametrize("where", ["images/../coco.json", "annotations/person_keypoints.json", "coco/k.json"])
def test_coco_takes_the_largest_person_that_has_joints(tmp_path, where):
    pixels = some_pose(4) * (80, 40, 2)
    small = pixels * (0.2, 0.2, 1)
    nobody, dot = np.zeros((17, 3)), np.zeros((17, 3))
    dot[3] = 70, 30, 2
    images = {"b.png": (80, 40, [small, nobody, pixels, dot]), "empty.png": (8, 8, [nobody]), "none.png": (8, 8, [])}
    path = tmp_path / where
    write_coco(path, images, tmp_path / "images")
    for root in (tmp_path, path):
        ds = PoseFolder(root, 40)
        assert ds.names == ["images/b.png"] and len(ds.skipped) == 2
        assert np.abs(ds.pose(0) - some_pose(4)).max() < 1e-6
        assert np.abs(ds[0][1][:, 0] - (some_pose(4)[:, 0] * 80 - 20) / 40).max() < 1e-5     # centre crop of 40


def spoil_coco(path, **changes) -> None:
    """Changes fields of the first image and the first annotation; None takes one away."""
    told = json.loads(path.read_text())
    for holder in (told["images"][0], told["annotations"][0]):
        for key in holder.keys() & changes.keys():
            holder[key] = changes[key]
            if changes[key] is None:
                del holder[key]
    path.write_text(json.dumps(told))


@pytest.mark.parametrize("changes, why", [
    ({"keypoints": [9999, 5, 2] * 17}, r"annotations\[0\] has nose at \(9999, 5\), far outside a picture of 20 x 20"),
    ({"keypoints": [1, 2, 3]}, r"annotations\[0\].keypoints has 3 values; 51 numbers are needed"),
    ({"category_id": [1]}, r"annotations\[0\].category_id is \[1\]; a number or a string"),
    ({"width": None, "height": None}, r"images\[0\] has no width and height; a dataset needs them$"),
])
def test_one_bad_coco_annotation_is_one_broken_picture(tmp_path, changes, why):
    some = {f"{i:03d}.png": (20, 20, [some_pose(i) * (20, 20, 2)]) for i in range(120)}
    write_coco(tmp_path / "k.json", some, tmp_path)
    spoil_coco(tmp_path / "k.json", **changes)
    ds = PoseFolder(tmp_path, 20)
    assert len(ds) == 119 and ds.total == 120 and list(ds.broken) == [str(tmp_path / "000.png")]
    assert re.search(why, ds.broken[str(tmp_path / "000.png")])
    write_coco(tmp_path / "k.json", dict(list(some.items())[:90]))
    spoil_coco(tmp_path / "k.json", **changes)
    with pytest.raises(DataError, match=f"1 of 90 pictures cannot be used.*{why}"):
        PoseFolder(tmp_path, 20)


def test_pictures_beside_the_coco_json(tmp_path):
    write_coco(tmp_path / "k.json", {"a.png": (20, 20, [some_pose(0) * (20, 20, 2)])}, tmp_path)
    assert PoseFolder(tmp_path, 20).names == ["a.png"]
    write_coco(tmp_path / "other.json", {"a.png": (20, 20, [])})
    with pytest.raises(DataError, match="2 json files"):
        PoseFolder(tmp_path, 20)


def test_coco_of_which_the_first_pictures_are_gone_is_found_by_the_others(tmp_path):
    some = {f"{i:03d}.png": (9, 9, [some_pose(i) * (9, 9, 2)]) for i in range(300)}
    write_coco(tmp_path / "k.json", some, tmp_path / "images")
    for name in list(some)[:120]:
        (tmp_path / "images" / name).unlink()
    ds = PoseFolder(tmp_path, 9, limit=1)
    assert len(ds) == 180 and len(ds.broken) == 120 and ds.root == tmp_path
    os.rename(tmp_path / "images", tmp_path / "away")
    with pytest.raises(DataError, match=r"not in .*images nor beside it \(none of 100 looked for\)"):
        PoseFolder(tmp_path, 9)


@pytest.mark.parametrize("text", [
    '{"a.png": "three images: []"}', '{"checkpoints": [], "worst": ["a.png"]}', '["images", "annotations"]', "",
    '{"image": "a.png"}\n{"image": "b.png"}\n', '[{"images": [], "annotations": []}]', '{"images": [1, 2]}',
    '{"images": 3, "annotations": 4}'])
def test_a_json_of_something_else_leaves_a_folder_of_plain_pictures(tmp_path, text):
    for name in "ab":
        Image.new("RGB", (9, 9)).save(tmp_path / f"{name}.png")
    (tmp_path / "captions.json").write_text(text)
    (tmp_path / "folder.json").mkdir()
    assert not data.has_keypoints(tmp_path)
    ds = PoseFolder(tmp_path, 9, poseless=True)
    assert ds.names == ["a.png", "b.png"] and not ds[0][1].any()
    with pytest.raises(DataError, match="captions.json:? is|not valid JSON"):     # to train on, it must be COCO
        PoseFolder(tmp_path, 9)


def test_coco_among_other_json_files_is_found(tmp_path):
    write_coco(tmp_path / "k.json", {"a.png": (20, 20, [some_pose(0) * (20, 20, 2)])}, tmp_path)
    (tmp_path / "recon.json").write_text('{"worst": ["a.png"]}')
    for poseless in (False, True):
        ds = PoseFolder(tmp_path, 20, poseless)
        assert ds.names == ["a.png"] and ds[0][1][:, 2].all()
    text = (tmp_path / "k.json").read_text()
    (tmp_path / "k.json").write_text(text[:-20])        # its poses are not dropped without a word
    with pytest.raises(DataError, match="k.json is not valid JSON"):
        PoseFolder(tmp_path, 20, poseless=True)
    with pytest.raises(DataError, match="gone.json: cannot be read"):
        data.is_coco(tmp_path / "gone.json")


def test_which_folders_lie_among_the_pictures(tmp_path):
    pairs, plain = folder(tmp_path / "pairs", 2), tmp_path / "plain"
    (plain / "images").mkdir(parents=True)
    (plain / "list.txt").write_text("images/a.png")
    (tmp_path / "link").symlink_to(plain)
    for path, root, wanted in ((pairs, pairs, True), (pairs / "images/x", pairs, True), (pairs / "x", pairs, False),
                               (plain, plain, True), (plain / "x/y", plain, True), (tmp_path / "link/x", plain, True),
                               (plain / "images/../x", tmp_path / "link", True), (tmp_path, plain, False),
                               (tmp_path / "plain2", plain, False), (plain, plain / "list.txt", False)):
        assert data.is_among_pictures(path, root) == wanted, (path, root)


def test_both_readers_agree(tmp_path):
    n, images = 12, {}
    for i in range(n):
        write_pair(tmp_path, f"p{i}", i, size=(90, 60))
        images[f"p{i}.png"] = 90, 60, [np.round(some_pose(i) * (90, 60, 2), 2)]     # COCO files round to 0.01
    write_coco(tmp_path / "coco" / "person_keypoints.json", images)
    seed, coco = PoseFolder(tmp_path, 60), PoseFolder(tmp_path / "coco" / "person_keypoints.json", 60)
    assert len(seed) == n and seed.names == coco.names
    for i in range(n):
        (image, pose), (image_2, pose_2) = seed[i], coco[i]
        assert (image == image_2).all() and np.abs(pose - pose_2).max() * 60 < 0.01


@pytest.mark.parametrize("name", ["../x.png", "/etc/x.png", "a/../../x.png", "..\\x.png", "C:\\x.png"])
def test_coco_names_cannot_leave_the_folder(tmp_path, name):
    write_coco(tmp_path / "set" / "k.json", {name: (9, 9, [some_pose(0) * (9, 9, 2)])})
    Image.new("RGB", (9, 9)).save(tmp_path / "x.png")
    with pytest.raises(DataError, match="leads out of the dataset's folder"):
        PoseFolder(tmp_path / "set", 9)


def test_errors_name_the_file(tmp_path):
    with pytest.raises(DataError, match="nowhere: there is no such"):
        PoseFolder(tmp_path / "nowhere", 8)
    with pytest.raises(DataError, match="neither a picture nor a pose"):
        PoseFolder(tmp_path, 8)
    (tmp_path / "keypoints").mkdir()
    with pytest.raises(DataError, match="images: there is no such folder"):
        PoseFolder(tmp_path, 8)
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match="images: no pictures in it"):
        PoseFolder(tmp_path, 8)
    Image.new("RGB", (9, 9)).save(tmp_path / "images" / "lonely.png")
    with pytest.raises(DataError, match=r"lonely.png: its keypoints .*lonely.json are missing"):
        PoseFolder(tmp_path, 8)


@pytest.mark.parametrize("spoil, reason", [
    (lambda rows: rows.pop("nose"), "nose"),
    (lambda rows: rows.update(knee_left=[float("nan"), 3.0]), "knee_left"),
])
def test_pose_that_cannot_be_used(tmp_path, spoil, reason):
    write_pair(tmp_path, "x")
    path = tmp_path / "keypoints" / "x.json"
    rows = json.loads(path.read_text())
    spoil(rows)
    path.write_text(json.dumps(rows))
    with pytest.raises(DataError, match=rf"x\.json.*{reason}"):
        PoseFolder(tmp_path, 8)[0]


# ------------------------------------------------------------------------------------------- broken pictures

@pytest.mark.parametrize("workers", [0, 2])
def test_one_broken_picture_of_300_is_named_and_replaced(tmp_path, workers):
    folder(tmp_path, 300)
    ds = PoseFolder(tmp_path, 12)
    bad = ds.paths[7]
    open(bad, "wb").write(b"not a picture")
    with pytest.raises(DataError):
        ds[7]
    with data.naming_broken(tmp_path / "broken.txt", Part(ds, range(300)), ds):
        seen = [i for *_, idx in batches(ds, 25, seed=0, start=0, stop=12, workers=workers) for i in idx.tolist()]
    assert len(seen) == 300 and sorted(seen) == sorted([*range(7), 8, *range(8, 300)])     # the next one stands in
    assert list(ds.broken) == [bad] and "cannot be read" in ds.broken[bad]
    lines = (tmp_path / "broken.txt").read_text().splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"{bad}\t")


def test_a_few_broken_pictures_of_100_stop_the_loader(tmp_path):
    ds = PoseFolder(folder(tmp_path, 100), 12)
    for i in range(5):
        open(ds.paths[i], "wb").write(b"not a picture")
    with pytest.raises(DataError, match=r"2 of 100 pictures cannot be used, more than 1%; the first is .*\.png"):
        for _ in batches(split(ds)[0], 1, seed=0, start=0, stop=100):
            pass


def test_missing_keypoints_count_when_the_folder_is_read(tmp_path):
    folder(tmp_path, 200)
    files = sorted((tmp_path / "keypoints").iterdir())
    files[3].unlink(), files[8].unlink()
    ds = PoseFolder(tmp_path, 12)
    assert len(ds) == 198 and len(ds.broken) == 2
    files[9].unlink()
    with pytest.raises(DataError, match="3 of 200"):
        PoseFolder(tmp_path, 12)


# ------------------------------------------------------------------------------------------------ split

def test_split_keeps_clips_whole_and_does_not_depend_on_order(tmp_path):
    ds = PoseFolder(folder(tmp_path, 120), 12)
    train, val = split(ds, 0.1)
    groups = [set(part.groups()) for part in (train, val)]
    assert groups[0] | groups[1] == {f"clip{i}" for i in range(12)} and not groups[0] & groups[1]
    assert len(val) == 20 and sorted(train.indices + val.indices) == list(range(120))
    shuffled = np.random.default_rng(0).permutation(120).tolist()
    assert set(split(Part(ds, shuffled), 0.1)[1].groups()) == groups[1]
    assert len(split(ds, 0.0)[1]) == 10 and len(split(ds, 1.0)[0]) == 10        # never none, never all


def test_groups_come_from_metadata_before_names(tmp_path):
    folder(tmp_path, 20)
    names = PoseFolder(tmp_path, 12).names
    lines = [f"{name},{'odd' if i % 2 else 'even'}" for i, name in enumerate(names)]
    (tmp_path / "metadata.csv").write_text("\n".join(["file,animation", *lines]))
    assert PoseFolder(tmp_path, 12).groups() == ["even", "odd"] * 10


def test_one_clip_alone_splits_by_picture(tmp_path):
    for i in range(10):
        write_pair(tmp_path, f"frame_{i}")
    train, val = split(PoseFolder(tmp_path, 12))
    assert len(val) == 1 and len(train) == 9
    with pytest.raises(DataError, match="cannot be split"):
        split(Part(PoseFolder(tmp_path, 12), [0]))


def test_what_lies_around_a_dataset_tells_the_same_of_each_picture(tmp_path):
    for ds, name in ((PoseFolder(folder(tmp_path, 3), 12), ".*clip0_002.png"), (Figures(3, 12), "figure 2")):
        around = InMemory(Part(InMemory(ds), [2, 0]))
        assert re.fullmatch(name, around.name(0)) and around.name(1) == ds.name(0) and around.base is ds
        assert around.groups() == [ds.groups()[i] for i in (2, 0)]
        assert around.fingerprint() == Part(ds, [2, 0]).fingerprint() != ds.fingerprint() == InMemory(ds).fingerprint()
        assert (around[0][0] == ds[2][0]).all() and (around.source(1)[0] == np.asarray(ds.source(0)[0])).all()


def test_caches_of_figures_are_found_by_later_versions_too():
    figures = Figures(10, 32, seed=5)
    assert figures.fingerprint()[:16] == "8a851cf292cb06fb"
    assert Part(figures, [3, 1]).fingerprint()[:16] == "4bbd6effb013b1a7"


# ---------------------------------------------------------------------------------------------- batches

@pytest.mark.parametrize("n, batch_size", [(10, 4), (3, 8), (12, 4)])
def test_every_picture_appears_once_an_epoch(n, batch_size):
    row = np.concatenate([data.step_indices(n, batch_size, 3, k) for k in range(30)])
    epochs = row[:len(row) // n * n].reshape(-1, n)
    assert (np.sort(epochs, 1) == np.arange(n)).all()
    assert len({tuple(epoch) for epoch in epochs.tolist()}) > 1
    assert (row != np.concatenate([data.step_indices(n, batch_size, 4, k) for k in range(30)])).any()


def test_step_k_is_a_function_of_seed_and_k(tmp_path):
    ds = PoseFolder(folder(tmp_path, 10, size=(30, 24)), 16)
    whole, resumed, twice = (list(batches(wrapped, 4, seed=1, start=start, stop=8, workers=workers, augment=True))
                             for wrapped, start, workers in ((ds, 0, 0), (ds, 5, 0), (InMemory(ds), 0, 2)))
    assert len(resumed) == 3 and len(whole) == len(twice) == 8
    for a, b in [*zip(whole[5:], resumed, strict=True), *zip(whole, twice, strict=True)]:
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    other = next(batches(ds, 4, seed=2, start=0, stop=1, augment=True))
    assert not torch.equal(other[0], whole[0][0])


def test_batches_hold_the_pictures_they_name_and_leave_the_global_generator_alone():
    ds, before = Numbered(9), torch.get_rng_state()
    for images, poses, indices in batches(ds, 4, seed=0, start=0, stop=5):
        assert images.shape == (4, 3, 4, 4) and images.dtype == poses.dtype == torch.float32
        assert torch.equal(((images[:, 0, 0, 0] + 1) * 127.5).round().long(), indices)
        assert np.allclose(poses, np.stack([some_pose(i) for i in indices.tolist()]))
    assert torch.equal(torch.get_rng_state(), before)


def test_augmentation_mirrors_half_and_crops_within_the_zoom():
    ds = Numbered(1, size=8)
    ds.source = lambda i: (np.zeros((40, 40, 3), np.uint8), some_pose(0))       # larger than it is shown
    poses = torch.cat([p for _, p, _ in batches(ds, 50, seed=0, start=0, stop=20, augment=True, zoom=(0.5, 1))])
    plain, mirrored = some_pose(0), keypoints.flip(some_pose(0))

    def width(pose):    # distance of two joints, which grows as the crop's side shrinks
        return pose[..., 5, 0] - pose[..., 9, 0]
    turned = torch.sign(width(poses)) == np.sign(width(mirrored))
    assert np.sign(width(plain)) != np.sign(width(mirrored)), "choose another pose: this one cannot tell"
    assert 0.44 < turned.float().mean() < 0.56
    growth = torch.where(turned, width(poses) / width(mirrored), width(poses) / width(plain))
    assert 1 <= growth.min() + 1e-5 and growth.max() <= 2 + 1e-5 and growth.max() > 1.9


def test_a_small_picture_is_not_cropped_to_be_blown_up_again():
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    for seed in range(20):
        image, pose = to_square(picture, some_pose(1), 16, np.random.default_rng(seed), (0.5, 1.0))
        assert np.array_equal(image, picture) and np.allclose(pose, some_pose(1))
        image, pose = to_square(picture, some_pose(1), 12, np.random.default_rng(seed), (0.5, 1.0))
        grown = np.ptp(pose[:, 0]) / np.ptp(some_pose(1)[:, 0])
        assert 1 <= grown + 1e-5 and grown <= 16 / 12 + 1e-5


class Dies(Numbered):
    def source(self, i):
        os._exit(1)


@pytest.fixture
def watchful(monkeypatch):
    """torch looks every 5 seconds whether its processes live; now more often."""
    look = torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data
    monkeypatch.setattr(look, "__defaults__", (0.2,))


@pytest.mark.usefixtures("watchful")
def test_a_worker_that_dies_is_a_sentence():
    with pytest.raises(DataError, match="loads pictures died.*fewer workers"):
        next(batches(Dies(4), 2, seed=0, start=0, stop=2, workers=1))


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


# -------------------------------------------------------------------------------------------- latent cache

class Encoder:
    """Not symmetric, so that the latents of a mirror image are not mirrored latents; counts its calls."""

    def __init__(self):
        torch.manual_seed(0)
        self.conv, self.calls = torch.nn.Conv2d(3, 5, 4, stride=4), 0

    def __call__(self, x):
        self.calls += 1
        return self.conv(x)


def test_rows_are_the_pictures_and_their_mirror_images(tmp_path):
    ds, encode = PoseFolder(folder(tmp_path / "set", 11, size=(20, 16)), 16), Encoder()
    cache = LatentCache(tmp_path / "cache", "key", ds, encode, batch_size=4)
    assert len(cache) == 22 and cache.latents.dtype == np.float16
    latents, poses = cache.rows(torch.arange(22))
    for i in range(11):
        for row, flip in ((2 * i, False), (2 * i + 1, True)):
            image, pose = to_square(*ds.source(i), 16, flip=flip)
            with torch.no_grad():
                truth = encode(data.to_tensor(image)[None])[0].half().float()
            assert torch.allclose(latents[row], truth, atol=2e-3) and np.allclose(poses[row], pose, atol=1e-6)
    stored = np.array(cache.latents, np.float64)
    assert cache.mean.shape == cache.std.shape == (5, 1, 1)
    assert np.allclose(cache.mean.ravel(), stored.mean((0, 2, 3)), atol=1e-6)
    assert np.allclose(cache.std.ravel(), stored.std((0, 2, 3)), atol=1e-6)


def test_a_cache_is_used_only_for_its_own_model_and_pictures(tmp_path):
    ds, encode = PoseFolder(folder(tmp_path / "set", 6, size=(16, 16)), 16), Encoder()

    def cache(key="a", ds=ds):
        before = encode.calls
        LatentCache(tmp_path / "cache", key, ds, encode)
        return encode.calls > before
    assert cache() and not cache()                              # made once
    (tmp_path / "cache" / "latents-of-mine.npy").write_text("keep")
    assert cache(ds=Part(ds, [0, 1])) and not cache()           # train and validation lie side by side
    assert cache("b") and cache()                               # another model: made anew, the old one removed
    assert (tmp_path / "cache" / "latents-of-mine.npy").exists()
    assert len(list((tmp_path / "cache").iterdir())) == 5
    os.utime(ds.paths[2], ns=(1, 1))
    assert cache() and not cache()                              # a picture was touched
    assert cache(ds=PoseFolder(tmp_path / "set", 12))           # another size


@pytest.mark.parametrize("which", [".h.f16", ".pose.f32", ".crc.u32", ".json"])
@pytest.mark.parametrize("damage", ["cut", "grown", "gone"])
def test_half_a_cache_is_made_anew(tmp_path, which, damage):
    ds, encode = Numbered(5, size=8), Encoder()
    good = LatentCache(tmp_path, "a", ds, encode).rows([0, 3, 9])
    [file] = [f for f in tmp_path.iterdir() if f.name.endswith(which)]
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-9] if damage == "cut" else file.read_bytes() + b"123456789")
    before = encode.calls
    again = LatentCache(tmp_path, "a", ds, encode).rows([0, 3, 9])
    assert encode.calls > before
    assert all(torch.equal(a, b) for a, b in zip(good, again, strict=True))


def test_interrupted_filling_leaves_no_cache(tmp_path):
    def fails(x):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        LatentCache(tmp_path, "a", Numbered(5, size=8), fails)
    assert not [f for f in tmp_path.iterdir() if f.name.endswith((".json", ".lock"))]
    assert len(LatentCache(tmp_path, "a", Numbered(5, size=8), Encoder())) == 10
    assert not [f for f in tmp_path.iterdir() if f.name.endswith(".tmp")]


def test_broken_pictures_have_no_rows(tmp_path):
    ds = PoseFolder(folder(tmp_path / "set", 200), 12)
    open(ds.paths[50], "wb").write(b"")
    cache = LatentCache(tmp_path / "cache", "a", ds, Encoder(), batch_size=16)
    assert len(cache) == 398 and list(ds.broken) == [ds.paths[50]]
    assert np.allclose(cache.rows([100])[1][0], ds[51][1])      # picture 51 stands where 50 would have been
    stored = np.array(cache.latents[:398], np.float64)
    assert np.allclose(cache.mean.ravel(), stored.mean((0, 2, 3)), atol=1e-6)
    assert len(LatentCache(tmp_path / "cache", "a", ds, Encoder())) == 398


def test_latents_that_overflow_are_refused(tmp_path):
    for bad in (1e6, float("nan")):
        with pytest.raises(ValueError, match="do not fit float16"):
            LatentCache(tmp_path, "a", Numbered(5), lambda x, bad=bad: x * 0 + bad)


def test_latent_batches_take_each_picture_once_an_epoch_and_mirror_half(tmp_path):
    cache = LatentCache(tmp_path, "a", Numbered(40), lambda x: x)
    which = [torch.cat([((z[:, 0, 0, 0] + 1) * 127.5).round().long() for z, _ in
                        (latent_batch(cache, 8, seed, k) for k in range(50))]) for seed in (0, 0, 1)]
    assert torch.equal(which[0], which[1]) and not torch.equal(which[0], which[2])
    assert (which[0].view(10, 40).sort(1).values == torch.arange(40)).all()
    poses = torch.cat([latent_batch(cache, 8, 0, k)[1] for k in range(50)])
    mirrored = [not np.allclose(pose, some_pose(int(i))) for pose, i in zip(poses, which[0], strict=True)]
    assert 0.4 < np.mean(mirrored) < 0.6


# ---------------------------------------------------------------------------------------------- grid, command

def test_grid_shows_the_pictures_enlarged_and_words_beside_them(tmp_path):
    rng = np.random.default_rng(0)
    red, noise = np.full((40, 40, 3), (255, 0, 0), np.uint8), rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
    page = plots.save_grid(tmp_path / "new" / "a.png", [[red, noise], [noise, None]], columns=["one", "two"],
                           labels=["first", "second"], captions=[["a" * 99, ""], ["", ""]], title="Title")
    read = np.asarray(Image.open(tmp_path / "new" / "a.png"))
    assert (read == np.asarray(page)).all()
    assert ((read == (255, 0, 0)).all(-1)).sum() == 160 * 160           # 40 pixels at x4, nothing drawn over them
    big = noise.repeat(4, 0).repeat(4, 1)
    windows = [(y, x) for y in range(read.shape[0] - 159) for x in range(read.shape[1] - 159)
               if (read[y, x] == big[0, 0]).all() and (read[y + 159, x + 159] == big[-1, -1]).all()
               and (read[y:y + 160, x:x + 160] == big).all()]
    assert len(windows) == 2
    assert (read[[0, -1]] == 255).all() and (read[:, [0, -1]] == 255).all()     # all words are inside the margins


def test_grid_of_fewer_captions_than_rows_and_of_no_picture_at_all(tmp_path):
    picture = np.zeros((160, 160, 3), np.uint8)
    both, one = (plots.save_grid(tmp_path / "a.png", [[picture], [picture]], captions=captions)
                 for captions in ([["low"], []], [["low"]]))
    assert np.array_equal(both, one)
    for rows in ([], [[]], [[None]], [[None, None], [None]]):
        assert min(plots.save_grid(tmp_path / "a.png", rows, columns=["one"], title="Title").size) > 0


def test_command_answers_a_mistake_with_one_sentence(tmp_path, capsys):
    assert data.main([str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert "nowhere" in err and err.count("\n") == 1
