"""Pose files as each tool writes them, their traps, and thousands of damaged files."""
import json
import random

import numpy as np
import pytest
from PIL import ExifTags, Image

import keypoints as K
from data import PoseFolder
from dataset.check import main
from dataset.folder import has_keypoints
from dataset.images import DataError
from extras.plan import read_poses
from formats import pose_files
from formats.pose_files import FORMATS
from keypoints import HIDDEN, JOINTS, PoseError

W, H = 640, 480
XY = {name: (40.0 + 32 * j, 470.0 - 25 * j) for j, name in enumerate(JOINTS)}  # no two alike
MISSING = "wrist_left"
# The tools' orders by the names in their documentation, which the tables of indices must match.
# The first letter is the person's own side.
OPENPOSE_18 = ("Nose Neck RSho RElb RWri LSho LElb LWri RHip RKnee RAnk LHip LKnee LAnk REye LEye "
               "REar LEar").split()
OPENPOSE_25 = ("Nose Neck RSho RElb RWri LSho LElb LWri MidHip RHip RKnee RAnk LHip LKnee LAnk "
               "REye LEye REar LEar LBigToe LSmallToe LHeel RBigToe RSmallToe RHeel").split()
MEDIAPIPE = ("nose left_eye_inner left_eye left_eye_outer right_eye_inner right_eye "
             "right_eye_outer left_ear right_ear mouth_left mouth_right left_shoulder "
             "right_shoulder left_elbow right_elbow left_wrist right_wrist left_pinky right_pinky "
             "left_index right_index left_thumb right_thumb left_hip right_hip left_knee "
             "right_knee left_ankle right_ankle left_heel right_heel left_foot_index "
             "right_foot_index").split()
COCO = ("nose left_eye right_eye left_ear right_ear left_shoulder right_shoulder left_elbow "
        "right_elbow left_wrist right_wrist left_hip right_hip left_knee right_knee left_ankle "
        "right_ankle").split()
CROWDPOSE = [*COCO[5:], "top_head", "neck"]
AIC = [*COCO[5:][1::2], *COCO[5:][::2], "head_top", "neck"]
MPII = [*COCO[5:], "pelvis", "thorax", "upper_neck", "head_top"]
POSETRACK = [COCO[0], "head_bottom", "head_top", *COCO[3:]]
H36M = ("root right_hip right_knee right_foot left_hip left_knee left_foot spine thorax neck_base "
        "head left_shoulder left_elbow left_wrist right_shoulder right_elbow right_wrist").split()
SPELLED = [name.replace("left_", "L_").replace("right_", "right-") for name in COCO]
WHOLE = [*COCO, *(f"face-{i}" for i in range(116))]                     # 133
PARTS = {"Nose": "nose", "Eye": "eye", "Ear": "ear", "Sho": "shoulder", "Elb": "elbow",
         "Wri": "wrist", "Hip": "hip", "Knee": "knee", "Ank": "ankle"}


def ours(name: str) -> str:
    """LSho, left_shoulder -> shoulder_left; anything else stays."""
    if name[1:] in PARTS and name[0] in "LR":
        return f"{PARTS[name[1:]]}_{'left' if name[0] == 'L' else 'right'}"
    side, _, part = name.partition("_")
    return f"{part}_{side}" if side in ("left", "right") else name.lower()


def points(order: list[str], missing: tuple = (0, 0, 0), c: float = 0.9, scale: tuple = (1, 1),
           move: int = 0) -> list:
    """[[x, y, c], ...] in a tool's order; other joints have numbers that must not appear."""
    at = {name: [(x + move) / scale[0], y / scale[1], c] for name, (x, y) in XY.items()}
    at[MISSING] = list(missing)
    return [at.get(ours(name), [7 / scale[0], 9 / scale[1], c]) for name in order]


def flat(*args, **kwargs) -> list:
    return [number for point in points(*args, **kwargs) for number in point]


def named(order: list[str], *keys: str, **how) -> list:
    return [dict(zip(keys, [name, *point], strict=False))
            for name, point in zip(order, points(order, **how), strict=True)]


def openpose(order: list[str], key: str = "pose_keypoints_2d", **how) -> dict:
    return {"people": [{"person_id": [-1], key: flat(order, **how), "face_keypoints_2d": None,
                        "hand_left_keypoints_2d": [-1 / W, -1 / H, 1] * 21,
                        "pose_keypoints_3d": []}]}


def coco(names: list[str] = COCO, **person) -> dict:
    return {"images": [{"id": 5, "file_name": "a.jpg", "width": W, "height": H}],
            "annotations": [{"image_id": 5, "category_id": 1, "iscrowd": 0, "num_keypoints": 16,
                             "bbox": [0, 0, 9, 9], "keypoints": flat(names, c=2)} | person],
            "categories": [{"id": 1, "name": "person", "keypoints": names}]}


def mediapipe(**how) -> list[dict]:
    return [{"x": x, "y": y, "z": -0.1, "visibility": v}
            for x, y, v in points(MEDIAPIPE, missing=(0.5, 0.5, 0.02), scale=(W, H), **how)]


def protobuf(landmarks: list[dict]) -> str:
    body = "".join("  landmark {\n" + "".join(f"    {k}: {v!r}\n" for k, v in p.items()) + "  }\n"
                   for p in landmarks)
    return "# proto-message: LandmarksDetectionResult\nlandmarks {\n" + body + "}\n"


def yolo(*tail: float, **how) -> str:
    numbers = [0, 0.5, 0.5, 0.4, 0.8, *flat(COCO, scale=(W, H), **how), *tail]
    return " ".join(f"{v:.9g}" for v in numbers) + "\n"


CANVAS = {"canvas_width": W, "canvas_height": H}
LOW = (99, 99, 0.1)
SCORES = {"keypoint_scores": [v[2] for v in points(COCO, LOW)]}
XYS = [v[:2] for v in points(COCO, LOW)]
SCORED = named(COCO, "name", "x", "y", "score", missing=LOW)
NAMES = {str(i): name for i, name in enumerate(["neck", *COCO[::-1]])}
LABEL_STUDIO = [
    {"type": "keypointlabels", "original_width": W, "original_height": H,
     "value": {"x": 100 * x / W, "y": 100 * y / H, "width": 0.3, "keypointlabels": [name]}}
    for name, (x, y, c) in zip(COCO, points(COCO), strict=True) if c]
# case -> (the format it must be taken for, the file's content)
FILES = {
    "seed": ("seed", {name: [y * 512 / H, x * 512 / W] for name, (x, y) in XY.items()}),
    "ours, by name": ("ours", {n: [x / W, y / H, int(n != MISSING)] for n, (x, y) in XY.items()}),
    "ours, rows": ("ours", points(COCO, scale=(W, H))),
    "COCO annotations": ("coco", coco()),
    "COCO annotations in another order": ("coco", coco(["neck", *COCO[::-1]])),
    "COCO results, filler": ("coco-results", [
        {"image_id": 785, "keypoints": flat(COCO, (20.2, 191, 0)), "score": .9}]),
    "AlphaPose": ("coco-results", [
        {"image_id": "1.jpg", "keypoints": flat(COCO, (99, 99, 0.04), 1.07), "score": 3.0}]),
    "openpifpaf": ("openpifpaf", [
        {"keypoints": flat(COCO, (0, -3, 0)), "bbox": [1, 2, 3, 4], "score": .8}]),
    "YOLO": ("yolo", yolo()),
    "YOLO, score and track": ("yolo", "\n" + yolo(0.93, 4)),
    "YOLO without visibility": ("yolo", " ".join(map(str, [0, .5, .5, .4, .8, *(
        n for x, y, _ in points(COCO, scale=(W, H)) for n in (x, y))]))),
    "OpenPose BODY_25": ("openpose", {"version": 1.3} | openpose(OPENPOSE_25)),
    "OpenPose COCO-18": ("openpose", {"version": 1.1} | openpose(OPENPOSE_18)),
    "OpenPose v1.0": ("openpose", {"version": 1.0} | openpose(OPENPOSE_18, "pose_keypoints")),
    "ComfyUI": ("openpose", [openpose(OPENPOSE_18, c=1) | CANVAS]),
    "ControlNet": ("openpose", openpose(OPENPOSE_18, c=1, scale=(W, H)) | CANVAS),
    "MMPose": ("mmpose", [{"keypoints": XYS, "bbox": [[0, 0, 9, 9]], "bbox_score": 1.0} | SCORES]),
    "MMPose, names in another order": ("mmpose", {
        "meta_info": {"keypoint_id2name": NAMES}, "instance_info": [
            {"frame_id": 1, "instances": [{
                "keypoints": [[0, 0], *XYS[::-1]],
                "keypoint_scores": [1, *SCORES["keypoint_scores"][::-1]]}]}]}),
    "MMPose, frames of a video": ("mmpose", [
        {"frame_id": 0, "instances": []},
        {"frame_id": 1, "instances": [{"keypoints": XYS} | SCORES]}]),
    "MediaPipe": ("mediapipe", {"pose_landmarks": [mediapipe()],
                                "pose_world_landmarks": [[{"x": 0, "y": 0, "z": 0}]]}),
    "MediaPipe, bare": ("mediapipe", mediapipe()),
    "MediaPipe, protobuf text": ("mediapipe", protobuf(mediapipe())),
    "BlazePose rows": ("blazepose", [points(MEDIAPIPE, (*XY[MISSING], -100), -100)]),
    "MoveNet": ("tfjs", [{p["name"]: {"x": p["x"], "y": p["y"]}
                          for p in named(COCO, "name", "x", "y") if ours(p["name"]) != MISSING}]),
    "MoveNet, detector": ("tfjs", [{"score": .8, "keypoints": SCORED}]),
    "MoveNet, one frame": ("tfjs", SCORED),
    "MoveNet, null": ("tfjs", [{p["name"]: {"x": p["x"], "y": p["y"]} for p in named(
        COCO, "name", "x", "y", missing=(None, float("nan"), 1))}]),
    "MoveNet, frames": ("tfjs", [[], SCORED]),
    "names as L_eye and right-eye": ("tfjs", [dict(p, name=name) for name, p in
                                              zip(SPELLED, SCORED, strict=True)]),
    "COCO annotations, names 1 to 17": ("coco", coco() | {"categories": [
        {"id": 1, "keypoints": [str(j + 1) for j in range(17)]}]}),
    "COCO annotations, more names than numbers": ("coco", coco() | {"categories": [
        {"id": 1, "keypoints": WHOLE[:21]}]}),
    "COCO annotations, more numbers than names": ("coco", coco(keypoints=flat(WHOLE[:26], c=2))),
    "COCO annotations, ids as strings": ("coco", coco(
        ["neck", *COCO[::-1]], image_id="5", category_id="1")),
    "COCO annotations, a list a joint": ("coco", coco(keypoints=points(COCO, c=2))),
    "AlphaPose, Halpe-136": ("coco-results", [
        {"image_id": "1.jpg", "keypoints": flat([*WHOLE, "a", "b", "c"], LOW), "score": 3.0}]),
    "AlphaPose, cmu in one file": ("openpose", {"1.jpg": {"version": "AlphaPose v0.3", "bodies": [
        {"joints": flat(OPENPOSE_18)}]}}),
    "AlphaPose, open in one file": ("openpose", {"1.jpg": {"version": "AlphaPose v0.3", "people": [
        {"pose_keypoints_2d": flat(OPENPOSE_18)}]}}),
    "an editor": ("openpose", {"width": W, "height": H, "keypoints": [
        None if c == 0 else [x, y] for x, y, c in points(OPENPOSE_18)]}),
    "an editor's people": ("openpose", openpose(OPENPOSE_18) | {"width": W, "height": H}),
    "NaN and null": ("openpose", {"people": [{"pose_keypoints_2d": flat(
        OPENPOSE_25, (float("nan"), float("nan"), None))}]}),
    "MMPose, whole body": ("mmpose", [[{
        "keypoints": [v[:2] for v in points(WHOLE, LOW)],
        "keypoint_scores": [v[2] for v in points(WHOLE, LOW)]}]]),
    "ViTPose": ("mmpose", [[{"keypoints": XYS, "scores": SCORES["keypoint_scores"],
                             "labels": [*range(17)], "bbox": [1, 2, 3, 4]}]]),
    "ViTPose, with a threshold": ("mmpose", [{
        "keypoints": [v for v in XYS[::-1] if v != [99, 99]], "scores": [0.9] * 16,
        "labels": [j for j in range(16, -1, -1) if JOINTS[j] != MISSING], "bbox": [1, 2, 3, 4]}]),
    "Ultralytics": ("ultralytics", [{"name": "person", "class": 0, "keypoints": {
        key: [v[i] for v in points(COCO, LOW)] for i, key in enumerate(("x", "y", "visible"))}}]),
    "Ultralytics, normalised, without confidence": ("ultralytics", [{"keypoints": {
        "x": [v[0] for v in points(COCO, scale=(W, H))],
        "y": [v[1] for v in points(COCO, scale=(W, H))]}}]),
    "LabelMe": ("labelme", {"version": "5.2.1", "imageWidth": W, "imageHeight": H, "shapes": [
        {"label": "person", "points": [[0, 0], [9, 9]], "shape_type": "rectangle"},
        *({"label": name, "points": [[x, y]], "group_id": 1, "shape_type": "point"}
          for name, (x, y, c) in zip(["neck", *COCO], points(["neck", *COCO]), strict=True) if c)]}),
    "Label Studio": ("label-studio", [{"id": 7, "data": {"img": "/data/1.jpg"}, "annotations": [
        {"was_cancelled": True, "result": []}, {"result": LABEL_STUDIO}]},
        {"id": 8, "data": {"img": "/data/2.jpg"}, "annotations": []}][::-1]),
    "Label Studio, JSON-MIN": ("label-studio", [{"img": "/data/1.jpg", "id": 7, "kp-1": [
        {"original_width": W, "original_height": H} | p["value"] for p in LABEL_STUDIO]}]),
    "PoseNet": ("tfjs", {"score": .9, "keypoints": [
        {"part": name.split("_")[0] + "".join(w.title() for w in name.split("_")[1:]),
         "position": {"x": x, "y": y}, "score": c}
        for name, (x, y, c) in zip(COCO, points(COCO, LOW), strict=True)]}),
}
UNMARKED = ("seed", "BlazePose rows")                           # they cannot mark a missing joint
SIZED = ("seed", "ComfyUI", "ControlNet", "an editor", "an editor's people", "LabelMe",
         "Ultralytics, normalised, without confidence",
         *(case for case in FILES if case.startswith("COCO annotations")))


def write(path, content) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def refusal(path, content, **how) -> str:
    """The sentence with which a file is refused; it names the file."""
    file = write(path / "refused.json", content)
    with pytest.raises(PoseError) as e:
        pose_files.load_poses(file, **how)
    assert "refused.json" in str(e.value) and "\n" not in str(e.value)
    return str(e.value)


# --------------------------------------------------------------------------- every tool, one person

def test_every_format_has_a_file():
    assert {format for format, _ in FILES.values()} == set(FORMATS)


@pytest.mark.parametrize("case", FILES)
def test_the_same_person_comes_out_of_every_tools_file(tmp_path, case):
    """The orders of joints are those that the tools' documentation prints."""
    format, content = FILES[case]
    file = write(tmp_path / "misleading_name.dat", content)
    found = pose_files.load_poses(file, canvas=(W, H))
    (pose,) = found.poses
    truth = np.array([(x / W, y / H, 1.0) for x, y in XY.values()])
    if case not in UNMARKED:
        truth[JOINTS.index(MISSING)] = 0
    np.testing.assert_allclose(pose, truth, atol=1e-7)
    assert found.format == format and found.taken_for.startswith(FORMATS[format].about)
    assert "1 person" in found.taken_for
    assert found.sizes == [(512, 512) if case == "seed" else (W, H)]
    if case in SIZED or FORMATS[format].unit == "images":
        pose_files.load_poses(file)
    else:
        assert "--canvas" in refusal(tmp_path, content)


def test_format_overrides_the_guess(tmp_path):
    file = write(tmp_path / "p.json", FILES["openpifpaf"][1])
    assert pose_files.load_poses(file, "coco-results", canvas=(W, H)).format == "coco-results"
    assert "an object is needed" in refusal(tmp_path, FILES["openpifpaf"][1], format="coco")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_encodings_of_a_windows_shell(tmp_path, encoding):
    for case in ("ControlNet", "YOLO", "MediaPipe, protobuf text"):
        content = FILES[case][1]
        content = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / "p.txt").write_text(content, encoding=encoding)
        assert len(pose_files.load_poses(tmp_path / "p.txt").poses) == 1


@pytest.mark.parametrize("case", FILES)
def test_a_keypoint_file_of_any_format_labels_an_image(tmp_path, case):
    """An image without a size in its file gives its own, upright: here it is stored turned."""
    yolo = FILES[case][0] == "yolo"
    image = tmp_path / "images" / "a.jpg"
    label = tmp_path / ("labels/a.txt" if yolo else "keypoints/a.json")
    image.parent.mkdir()
    label.parent.mkdir()
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (H, W)).save(image, exif=turned)
    write(label, FILES[case][1])
    ds = PoseFolder(tmp_path, 32)
    if "frames" in case:
        with pytest.raises(DataError, match="must have one"):
            ds.pose(0)
        return
    truth = pose_files.load_poses(label, canvas=(W, H)).poses[0]
    np.testing.assert_array_equal(ds.pose(0), truth)
    assert has_keypoints(tmp_path)


def test_images_in_which_nobody_is_are_skipped(tmp_path, capsys):
    for kind, suffix, some, nobody in (
            ("keypoints", "_keypoints.json", json.dumps(openpose(OPENPOSE_18) | CANVAS),
             ['{"version": 1.3, "people": []}', "[]"]),
            ("labels", ".txt", yolo(), ["", None, "0 .5 .5 .9 .9" + " 0.000000" * 51])):
        root = tmp_path / kind
        for i, text in enumerate([some, *nobody]):
            (root / "images" / "train").mkdir(parents=True, exist_ok=True)
            (root / kind / "train").mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (W, H)).save(root / "images" / "train" / f"{i}.png")
            if text is not None:
                (root / kind / "train" / f"{i}{suffix}").write_text(text)
        for path in (root, root / "images" / "train"):
            ds = PoseFolder(path, 32)
            assert has_keypoints(path) and ds.paths == [str(root / "images" / "train" / "0.png")]
        assert len(ds.skipped) == len(nobody)
        assert not ds.broken and ds[0][1][:, 2].any()
        main([str(root), "--out", str(tmp_path / "out"), "--workers", "0"])
        assert "orphan" not in capsys.readouterr().out


def test_an_export_of_several_datasets_names_them(tmp_path):
    for part in ("train", "valid"):
        (tmp_path / part).mkdir()
        write(tmp_path / part / "_annotations.coco.json", coco())
    with pytest.raises(DataError, match="give .*train or .*valid"):
        PoseFolder(tmp_path, 32)


# ---------------------------------------------------------------------------------- the traps

def test_trap_1_one_schema_two_units(tmp_path):
    """Pixels or 0..1 under the same keys; a joint just outside does not make 0..1 into pixels."""
    pixels = pose_files.load_poses(write(tmp_path / "a.json", openpose(OPENPOSE_18) | CANVAS))
    ratios = openpose(OPENPOSE_18, scale=(W, H)) | CANVAS
    ratios["people"][0]["pose_keypoints_2d"][:2] = [1.04, -0.02]                        # the nose
    normalised = pose_files.load_poses(write(tmp_path / "b.json", ratios))
    np.testing.assert_allclose(pixels.poses[0][1:], normalised.poses[0][1:])
    assert normalised.poses[0][0].tolist() == [1.04, -0.02, 1]
    assert "in pixels" in pixels.taken_for and "in 0..1" in normalised.taken_for


@pytest.mark.parametrize("content, words", [
    (coco(H36M), ["nose", "root", "categories[0].keypoints"]),
    (coco(["a", "b", *COCO[2:], *COCO[:2]], keypoints=flat(COCO)), ["51 values for 19 names"]),
    (coco(CROWDPOSE[::-1], keypoints=flat(COCO)), ["51 values for 14 names"]),
    ([{"horn": {"x": 1, "y": 2}, "tail": {"x": 1, "y": 2}}], ["not a known"]),
    ({"shapes": [{"label": "cat", "points": [[1, 2]], "shape_type": "point"}]}, ["cat", "shapes"]),
    ({"shapes": [{"label": "nose", "points": [[1, 2]]}] * 2}, ["nose twice", "group"]),
    ({"meta_info": {"keypoint_id2name": H36M}, "instance_info": []}, ["nose", "keypoint_id2name"]),
    ([{"name": "person", "class": 0, "box": {"x1": 1}}], ["[0] has no keypoints", "a box alone"]),
    ([{"keypoints": [[1, 2]] * 5, "keypoint_scores": [1] * 5}], ["5 joints"]),
    ([{"keypoints": [[1, 2, 3]] * 17, "keypoint_scores": [1] * 17}], ["3-D", "[0].keypoints"]),
    ({"people": [{"pose_keypoints_3d": [1.0] * 72}]}, ["3-D"])], ids=str)
def test_trap_2_seventeen_joints_need_not_be_cocos(tmp_path, content, words):
    sentence = refusal(tmp_path, content)
    assert all(word in sentence for word in words), sentence


@pytest.mark.parametrize("names", [CROWDPOSE, AIC, MPII, POSETRACK, CROWDPOSE[:12]])
def test_trap_2_another_skeleton_with_our_body_is_read_by_name(tmp_path, names):
    mmpose = {"meta_info": {"keypoint_id2name": names}, "instance_info": [{"instances": [
        {"keypoints": [v[:2] for v in points(names, LOW)],
         "keypoint_scores": [v[2] for v in points(names, LOW)]}]}]}
    for content in (coco(names), mmpose):
        file = write(tmp_path / "p.json", content)
        (pose,) = pose_files.load_poses(file, canvas=(W, H)).poses
        here = [ours(name) for name in names if ours(name) != MISSING]
        truth = [(x / W, y / H, 1) if name in here else (0, 0, 0) for name, (x, y) in XY.items()]
        np.testing.assert_allclose(pose, truth, atol=1e-7)


def test_trap_3_confidence_decides_what_is_missing(tmp_path):
    content = [{"image_id": "a.jpg", "keypoints": flat(COCO, (99, 99, 0.29), c=0.3), "score": 1}]
    content[0]["keypoints"][:3] = [0, 0, 0.9]                               # visible, at the corner
    file = write(tmp_path / "p.json", content)
    pose = pose_files.load_poses(file, canvas=(W, H)).poses[0]
    assert pose[0].tolist() == [0, 0, 1] and pose[9].tolist() == [0, 0, 0]
    assert pose[:, 2].sum() == 16
    low = pose_files.load_poses(file, canvas=(W, H), min_confidence=0.2).poses[0]
    assert low[9].tolist() == [99 / W, 99 / H, 1]
    assert pose_files.load_poses(file, canvas=(W, H), min_confidence=0.5).poses[0][:, 2].sum() == 1
    coco_file = write(tmp_path / "c.json", coco(keypoints=[5, 5, 1] * 16 + [0, 0, 0]))
    hidden = pose_files.load_poses(coco_file, min_confidence=0).poses[0]    # no 2: only a flag
    assert hidden[:, 2].tolist() == [1] * 16 + [0]


def test_hidden_joints_come_from_coco_and_from_our_own_files(tmp_path):
    told = coco(keypoints=[5, 5, 2] * 10 + [6, 6, 1] * 6 + [0, 0, 0])
    file = write(tmp_path / "c.json", told)
    wanted = [1] * 10 + [HIDDEN] * 6 + [0]
    assert pose_files.load_poses(file).poses[0][:, 2].tolist() == wanted
    assert pose_files.read_coco(file)[0]["a.jpg"][0][:, 2].tolist() == wanted
    rows = dict(zip(JOINTS, [[0.1, 0.2, v] for v in wanted], strict=True))
    own = write(tmp_path / "o.json", rows)
    assert pose_files.load_poses(own).poses[0][:, 2].tolist() == wanted
    rows["nose"][2] = 0.9                                           # confidences
    own = write(tmp_path / "o.json", rows)
    assert pose_files.load_poses(own).poses[0][:, 2].tolist() == [1] * 16 + [0]


def test_trap_5_coco_has_crowds_empty_persons_and_boxes(tmp_path):
    data = coco()
    person = data["annotations"][0]
    data["annotations"] = [
        person | {"iscrowd": 1, "keypoints": [9] * 51}, person | {"num_keypoints": 0},
        {"image_id": 5, "bbox": [1, 2, 3, 4]}, person, person | {"keypoints": [0] * 51}]
    file = write(tmp_path / "p.json", data)
    found = pose_files.load_poses(file)
    assert found.taken_for.endswith("1 person") and found.pictures == ["a.jpg"]
    poses, refused, _ = pose_files.read_coco(file)
    assert not refused and len(poses["a.jpg"]) == 1
    np.testing.assert_array_equal(poses["a.jpg"][0], found.poses[0])
    boxes = [{"bbox": [277.1, 45.6, 225, 333.5], "category_id": 1, "image_id": 785, "score": 0.99}]
    assert "no keypoints" in refusal(tmp_path, boxes) and "[0]" in refusal(tmp_path, boxes)


@pytest.mark.parametrize("bad, reason", [
    ({"image_id": 6}, "image_id 6, which is not among the images"), ({"image_id": None}, "None"),
    ({"keypoints": [1, 2, 2] * 16}, "48 values"), ({"keypoints": "x"}, "'x'"),
    ({"keypoints": [1e9, 1, 2] * 17}, "far outside"), ({"category_id": 2}, "root")], ids=str)
def test_one_bad_annotation_is_counted_and_left_out(tmp_path, capsys, bad, reason):
    data = coco()
    person = data["annotations"][0]
    data["annotations"] = [person | bad, person]
    data["categories"] += [{"id": 2, "keypoints": H36M}, {"id": 3, "keypoints": []}]
    file = write(tmp_path / "p.json", data)
    found = pose_files.load_poses(file)
    assert "1 person; 1 of 2 annotations" in found.taken_for and reason in found.taken_for
    poses, refused, _ = pose_files.read_coco(file)
    assert not refused and len(poses["a.jpg"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "1 of 2 annotations" in said and reason in said
    data["annotations"].pop()
    assert reason in refusal(tmp_path, data)
    poses, refused, _ = pose_files.read_coco(write(tmp_path / "p.json", data))
    assert poses == {"a.jpg": []} and list(refused) == ["a.jpg"] * ("image_id" not in bad)


@pytest.mark.parametrize("how, people", [
    ({"keypoints": []}, 0), ({"keypoints": None}, 0), ({"keypoints": [0] * 51}, 0),
    ({"num_keypoints": None}, 1), ({"num_keypoints": "0"}, 0), ({"iscrowd": "1"}, 0),
    ({"iscrowd": "0"}, 1), ({"iscrowd": None}, 1)], ids=str)
def test_what_an_annotation_leaves_out_is_no_error(tmp_path, capsys, how, people):
    poses, refused, _ = pose_files.read_coco(write(tmp_path / "p.json", coco(**how)))
    assert len(poses["a.jpg"]) == people and not refused and not capsys.readouterr().err


def test_trap_4_nobody_somebody_several(tmp_path):
    big, small = openpose(OPENPOSE_18)["people"], openpose(OPENPOSE_18)["people"]
    small[0]["pose_keypoints_2d"] = [v if i % 3 == 2 else v / 4
                                     for i, v in enumerate(small[0]["pose_keypoints_2d"])]
    nobody = {"pose_keypoints_2d": None, "face_keypoints_2d": None, "hand_left_keypoints_2d": None}
    file = write(tmp_path / "p.json", {"people": [nobody, *small, *big]} | CANVAS)
    spread = {k: np.ptp(pose_files.load_poses(file, person=k).poses[0][:, 0])
              for k in (None, 1, 2)}
    assert spread[None] == spread[2] == pytest.approx(4 * spread[1], rel=0.2)
    assert "2 people" in pose_files.load_poses(file).taken_for
    assert "no person 3" in refusal(tmp_path, {"people": [*small, *big]} | CANVAS, person=3)
    for empty in ({"people": []}, {"people": [nobody]}, [{"people": []} | CANVAS],
                  {"landmarks": []}):
        assert "nobody" in refusal(tmp_path, empty)


def test_trap_6_landmarks_in_metres_or_only_the_visible_ones(tmp_path):
    hips = [(p["x"], p["y"]) for name, p in zip(MEDIAPIPE, mediapipe(), strict=True)
            if name.endswith("_hip")]
    x0, y0 = np.mean(hips, axis=0).tolist()
    metres = [p | {"x": p["x"] - x0, "y": p["y"] - y0} for p in mediapipe()]
    for content in (metres, [metres], {"landmarks": [metres]}, protobuf(metres),
                    {"pose_world_landmarks": [mediapipe()]},
                    protobuf(mediapipe()).replace("landmarks {", "world_landmarks {")):
        assert "metres" in refusal(tmp_path, content)
    visible = [p for p in mediapipe() if p["visibility"] > 0.5]
    assert f"{len(visible)} landmarks; all 33" in refusal(tmp_path, visible)


def test_trap_7_the_seeds_row_is_x_for_its_condition_and_y_for_the_drawing(tmp_path):
    """Row 100, column 400: drawn at x = 400 of 512; the token is row + col * 32 in cells of 16."""
    file = write(tmp_path / "p.json", {name: [100.0, 400.0] for name in JOINTS})
    (pose,) = pose_files.load_poses(file).poses
    assert pose[0].tolist() == [400 / 512, 100 / 512, 1]
    assert K.seed_context(pose[None], 32)[0, 0].tolist() == [100 // 16 + (400 // 16) * 32] * 17
    rows, cols = np.nonzero((K.draw(pose, 512) != K.draw(np.zeros((17, 3)), 512)).any(-1))
    assert abs(cols.mean() - 400) < 1 and abs(rows.mean() - 100) < 1
    poses, _ = read_poses([file])                                # and not changed by fitting
    np.testing.assert_array_equal(poses[0], pose)


# ------------------------------------------------------------------------- frames, units, sentences

def test_frames_and_pictures_give_one_pose_each_and_sample_draws_some(tmp_path, capsys):
    video = [{n: {"x": x + 10 * f, "y": y} for n, (x, y, _) in zip(COCO, points(COCO), strict=True)}
             for f in range(20)]
    file = write(tmp_path / "video.json", video)
    found = pose_files.load_poses(file, canvas=(W, W))
    assert "20 people in 20 images" in found.taken_for and found.pictures[:3] == ["1", "2", "3"]
    np.testing.assert_allclose([pose[0, 0] * W for pose in found.poses],
                               [XY["nose"][0] + 10 * f for f in range(20)])
    poses, names = read_poses([file], frames=3, canvas=(W, W))
    assert names == ["video 1", "video 11", "video 20"]
    assert poses[2][0, 0] * W == pytest.approx(XY["nose"][0] + 190)
    assert "3 of them drawn" in capsys.readouterr().out
    results = [{"image_id": i, "keypoints": flat(COCO, move=i), "score": 1} for i in (7, 7, 9)]
    found = pose_files.load_poses(write(tmp_path / "r.json", results), person=2, canvas=(W, H))
    assert found.pictures == ["7"] and len(found.poses) == 1            # 9 has one person only


def test_the_files_own_size_counts_before_the_flag(tmp_path):
    found = pose_files.load_poses(write(tmp_path / "p.json", coco()), canvas=(10, 10))
    assert found.sizes == [(W, H)]


def test_another_unit_or_another_images_size_is_refused(tmp_path):
    assert "nose at (40, 470)" in refusal(tmp_path, points(COCO))       # pixels where 0..1 belongs
    assert "image of 30 x 20" in refusal(tmp_path, FILES["openpifpaf"][1], canvas=(30, 20))


SEED = dict.fromkeys(JOINTS, [1, 2])


@pytest.mark.parametrize("content, words", [
    ("", ["nobody was found"]), ("[]", ["nobody was found"]), ("hello\n", ["not a known pose file"]),
    ("0 1 2\n", ["line 1", "3 values"]), (yolo() + yolo() + "0 x\n", ["line 3", "2 values"]),
    ("[" * 5000, ["valid JSON"]), ("{not json", ["valid JSON"]),
    (openpose(OPENPOSE_18) | {"canvas_width": -7, "canvas_height": 5}, ["width -7"]),
    (openpose(OPENPOSE_18) | {"canvas_width": 1e308, "canvas_height": 5}, ["width 1e+308"]),
    ({"people": [{"pose_keypoints_2d": [1.0] * 53}]}, ["people[0].pose_keypoints_2d", "53", "54"]),
    ([{"image_id": 1, "keypoints": flat(COCO)[:-1] + [float("nan")]}], ["[0].keypoints", "NaN"]),
    (coco(image_id=6), ["annotations[0]", "not among the images"]),
    ({"instance_info": [{"instances": 3}]}, ["instance_info[0].instances", "a list"]),
    ({"nose": [1, 2]}, ["eye_left"]), (SEED | {"nose": [1, "a"]}, ["nose is [1, 'a']"]),
    (SEED | {"nose": [1, 10 ** 400]}, ["nose"]), (SEED | {"nose": [1, 2, 1]}, ["3 numbers"]),
], ids=lambda value: str(value)[:40])
def test_a_refusal_names_the_place(tmp_path, content, words):
    sentence = refusal(tmp_path, content, canvas=(W, H))
    assert all(word in sentence for word in words), sentence


def test_what_is_no_text_file_is_refused(tmp_path):
    (tmp_path / "image.json").write_bytes(b"\x89PNG\r\n\xff\xff")
    for path, word in ((tmp_path, "cannot be read"), (tmp_path / "none.json", "No such file"),
                       (tmp_path / "image.json", "is not a text file")):
        with pytest.raises(PoseError, match=word):
            pose_files.load_poses(path)


# ------------------------------------------------------------------------------------ damaged files

TOKENS = ["null", "[]", "{}", '"x"', "1e999", "-1", "true", "NaN", "Infinity", "9" * 400,
          "9" * 5000, "1e308", "[[", "}", '"\\ud800"', "{", "0", ":", "\n", "landmark {", "\ufeff",
          "[" * 2000, '{"a":' * 500, "1e-320", ","]


def values_replaced(rng: random.Random, value: object, chance: float) -> object:
    """The JSON value with some of its parts replaced, dropped, doubled or nested."""
    if rng.random() < chance:
        return rng.choice([None, [], {}, "x", "nose", -1, True, float("nan"), float("inf"),
                           10 ** 400, 1e308, -1e308, 0, 1e-320, [value], [[value]] * 2,
                           {"people": value}, {"keypoints": value}, {"x": 1}, "\ud800",
                           [value] * 17])
    if isinstance(value, dict):
        return {k: values_replaced(rng, v, chance) for k, v in value.items()
                if rng.random() > chance / 3}
    if isinstance(value, list):
        return [values_replaced(rng, v, chance) for v in value if rng.random() > chance / 9]
    return value


def damaged(rng: random.Random) -> bytes:
    """One file, in one of seven ways."""
    content = rng.choice(list(FILES.values()))[1]
    kind = rng.randrange(7)
    if kind < 2 and not isinstance(content, str):
        return json.dumps(values_replaced(rng, content, rng.choice([0.003, 0.01, 0.05]))).encode()
    text = content if isinstance(content, str) else json.dumps(content)
    if kind < 4:                                                    # tokens put in
        for _ in range(rng.randint(1, 3)):
            i = rng.randrange(len(text) + 1)
            text = text[:i] + rng.choice(TOKENS) + text[i + rng.randint(0, 6):]
    encodings = ["utf-8", "utf-16", "utf-32", "utf-8-sig"] if kind == 4 else ["utf-8"]
    raw = bytearray(text.encode(rng.choice(encodings)))
    if kind == 5:                                                   # bytes flipped
        for _ in range(rng.randint(1, 8)):
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    elif kind == 6:                                                 # cut off
        del raw[rng.randrange(len(raw)):]
    return bytes(raw)


def test_damaged_files_give_poses_or_a_sentence(tmp_path):
    rng, file, refused = random.Random(2), tmp_path / "damaged.json", 0
    for _ in range(2_500):
        file.write_bytes(damaged(rng))
        how = {"format": rng.choice(list(FORMATS)) if rng.random() < 0.2 else None,
               "canvas": rng.choice([None, *[(W, H)] * 4]),
               "person": rng.choice([2, *[None] * 9])}
        try:
            found = pose_files.load_poses(file, **how)
        except PoseError as e:
            refused += 1
            assert str(file) in str(e) and "\n" not in str(e) and len(str(e)) < 700
            continue
        assert len(found.poses) == len(found.sizes) == len(found.pictures) > 0
        for pose, size in zip(found.poses, found.sizes, strict=True):
            assert pose.shape == (17, 3) and (np.abs(pose) <= pose_files.FAR).all()
            assert set(pose[:, 2]) <= {0, 1} and pose[:, 2].any()
            assert (pose[pose[:, 2] == 0] == 0).all()
            assert np.isfinite(K.fit(pose, size or (1, 1), "crop")).all()
    assert 500 < refused < 2_375
