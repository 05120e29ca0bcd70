"""Pose files of thirteen tools in; poses [17, 3] = (x, y, visible), 0..1 of their own image, out.

The content of a file decides its format, not its name. A file that cannot be used is a PoseError:
one sentence that names the file, the place in it and what to do.
"""
from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from keypoints import JOINTS, SEED_CANVAS, PoseError, fit


class NobodyFound(PoseError):
    """A valid pose file without the person asked for, or without anyone."""


# content -> format (guess_format) -> every Person in the file's own unit (the format's reader)
# -> confidence, unit, canvas (_place) -> one pose per image (load_poses)

MAX_BYTES = 32 << 20            # of a pose file: thousands of frames with face and hands
MIN_CONFIDENCE = 0.3            # below it a joint counts as missing
PIXELS_ABOVE = 2.0              # where a format allows two units: no coordinate in 0..1 exceeds it
FAR = 10.0                      # image sizes; a joint further from the corner has another unit
MAX_SIDE = 1_000_000            # pixels of an image
AT_ORIGIN = 0.01                # metres: MediaPipe's world landmarks start between the hips
ORDERS = {                      # our 17 joints in lists of COCO, OpenPose (18, 25), MediaPipe (33)
    17: list(range(17)),
    18: [0, 15, 14, 17, 16, 5, 2, 6, 3, 7, 4, 11, 8, 12, 9, 13, 10],
    25: [0, 16, 15, 18, 17, 5, 2, 6, 3, 7, 4, 12, 9, 13, 10, 14, 11],
    33: [0, 2, 5, 7, 8, 11, 12, 13, 14, 15, 16, 23, 24, 25, 26, 27, 28],
}
JOINT_OF_WORDS = {frozenset(name.split("_")): j for j, name in enumerate(JOINTS)}
NO_DEPTH = "3-D coordinates have no place on an image; export the 2-D ones"
NO_METRES = "world landmarks are in metres and have no place on an image; export pose_landmarks"
LANDMARKS = ("pose_landmarks", "poseLandmarks", "landmarks", "landmark")    # MediaPipe's, in 0..1
SHORT = reprlib.Repr()                                                      # values in messages
SHORT.maxlevel = 1


class Person(NamedTuple):
    """A person as the file has them, before confidence, unit and canvas are applied."""
    node: Node                                  # their place in the file, for messages
    joints: np.ndarray                          # [17, 3] (x, y, confidence) in the file's own unit
    picture: str | int = 1                      # which image or frame of the file
    size: tuple[float, float] | None = None     # (width, height) of that image, if the file has it


@dataclass(frozen=True)
class Poses:
    """The content of a file: one pose for each image or frame with a person."""
    poses: list[np.ndarray]                     # [17, 3] float64 (x, y, visible), 0..1 of its image
    sizes: list[tuple[float, float] | None]     # (width, height) of that image; None: unknown
    pictures: list[str]                         # its name in the file: file name, id, frame number
    frames: list[str]                           # the names of all frames, also of those with no one
    format: str                                 # one of FORMATS
    taken_for: str                              # the format, the unit and how many people


# ----------------------------------------------------------------------------------- files and text

def read_text(path: str | Path, limit: int | None = MAX_BYTES) -> str:
    """A file's text, in UTF-8 or in the UTF-16 that a Windows shell writes."""
    path = Path(path)
    if not path.is_file():                                      # reading a pipe would hang
        raise PoseError(f"there is no pose file {path}" if not path.is_dir() else
                        f"pose file {path} is a folder; name the files in it")
    try:
        if limit and path.stat().st_size > limit:
            raise PoseError(f"pose file {path} has {path.stat().st_size / 2 ** 20:.0f} MiB; at "
                            f"most {limit >> 20} are read, so split it")
        raw = path.read_bytes()
        return raw.decode(json.detect_encoding(raw))
    except UnicodeDecodeError:
        raise PoseError(f"{path} is not a text file; expected .json or .txt") from None
    except OSError as e:
        raise PoseError(f"pose file {path} cannot be read: {e}") from None


def read_json(path: str | Path, limit: int | None = MAX_BYTES) -> object:
    """The parsed file; PoseError for a file that is not JSON."""
    return _parse_json(read_text(path, limit), path)


def _parse_json(text: str, path: str | Path) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:                   # also an integer of 5,000 digits
        raise PoseError(f"pose file {path} is not valid JSON ({e}); export it again") from None


def read_content(path: str | Path) -> object:
    """The parsed file: JSON, MediaPipe's protobuf text, or lines of numbers (YOLO)."""
    text = read_text(path)
    if text.lstrip()[:1] in ("{", "["):
        return _parse_json(text, path)
    if "landmark" in text:
        return _parse_landmarks(text, path)
    return [_parse_numbers(line.split(), f"{path}: line {i + 1}")
            for i, line in enumerate(text.splitlines())]


def _parse_numbers(words: list[str], where: str) -> list[float]:
    try:
        return [float(word) for word in words]
    except ValueError:
        raise PoseError(f"{where} is {SHORT.repr(' '.join(words))}; a pose file is JSON, lines of "
                        "numbers (YOLO) or landmarks with numbers (MediaPipe)") from None


def _parse_landmarks(text: str, path: str | Path) -> dict[str, list]:
    """`landmarks { landmark { x: .5 y: .4 } ... }` -> {"landmarks": [[{"x": .5, "y": .4}, ..]]}."""
    found: dict[str, list] = {"landmarks": [], "world_landmarks": []}
    group, pieces = "landmarks", re.split(r"\b(landmark|landmarks|world_landmarks)\s*\{", text)
    for tag, body in zip(pieces[1::2], pieces[2::2], strict=True):
        group = group if tag == "landmark" else tag
        if tag != "landmark" or not found[group]:
            found[group].append([])
        if tag == "landmark":
            fields = dict(re.findall(r"\b(x|y|z|visibility)\s*:\s*([^\s{}]+)", body))
            where = f"{path}: landmark {len(found[group][-1])} of {group}"
            numbers = _parse_numbers(list(fields.values()), where)
            found[group][-1].append(dict(zip(fields, numbers, strict=True)))
    return {key: people for key, people in found.items() if people}


# -------------------------------------------------------------------------------------------- nodes

@dataclass(frozen=True)
class Node:
    """A value of a parsed file with its place, so that a refusal can name it."""
    value: object
    where: str                                  # "p.json: people[0].keypoints"; "p.json: " is all

    def refusal(self, why: str) -> PoseError:
        return PoseError(f"{self.where.rstrip()} {why}")

    def __getitem__(self, key: str) -> Node:
        """The member of an object; None where it has none."""
        dot = "" if self.where.endswith(": ") else "."
        return Node(self.value.get(key), f"{self.where}{dot}{key}")

    def items(self) -> list[Node]:
        if not isinstance(self.value, list):
            raise self.refusal(f"is {SHORT.repr(self.value)}; a list is needed")
        return [Node(item, f"{self.where}[{i}]") for i, item in enumerate(self.value)]

    def objects(self) -> list[Node]:
        for node in (nodes := self.items()):
            if not isinstance(node.value, dict):
                raise node.refusal(f"is {SHORT.repr(node.value)}; an object is needed")
        return nodes

    def numbers(self, *lengths: int) -> np.ndarray:
        """The finite numbers of a list that has one of `lengths`."""
        values = self.value if isinstance(self.value, list) else []
        try:
            numbers = [float(v) for v in values]
        except (TypeError, ValueError, OverflowError):          # an integer of 400 digits
            numbers = [math.nan]
        if len(values) not in lengths or not all(map(math.isfinite, numbers)):
            found = (f"has {len(values)} values" if values and len(values) not in lengths else
                     f"is {SHORT.repr(self.value)}")
            raise self.refusal(f"{found}; {' or '.join(map(str, lengths))} numbers are needed, not "
                               "NaN or infinity")
        return np.array(numbers)

    def joints(self, n: int) -> np.ndarray:
        """[x, y, c, x, y, c, ...] of a tool with n joints -> our [17, 3]."""
        return self.numbers(3 * n).reshape(n, 3)[ORDERS[n]]

    def id(self, default: int) -> int | str:
        value = default if self.value is None else self.value
        if not isinstance(value, int | str):
            raise self.refusal(f"is {SHORT.repr(value)}; a number or a string is needed")
        return value

    def size(self, prefix: str = "") -> tuple[float, float] | None:
        """(width, height) in pixels; None if the object gives neither."""
        sides = [self.value.get(f"{prefix}width"), self.value.get(f"{prefix}height")]
        if sides == [None, None]:
            return None
        w, h = Node(sides, f"{self.where} [{prefix}width, {prefix}height]").numbers(2).tolist()
        if min(w, h) < 1 or max(w, h) > MAX_SIDE:
            raise self.refusal(f"has width {w:g} and height {h:g}; 1 to {MAX_SIDE} are allowed")
        return w, h

    def order(self) -> list[int]:
        """Where our 17 joints are in a tool's own list of names."""
        ours = [joint_of(node.value) for node in self.items()]
        self.check_names(ours, self.value)
        return [ours.index(j) for j in range(len(JOINTS))]

    def check_names(self, ours: Collection[int | None], names: list) -> None:
        """17 joints need not be COCO's: PoseTrack18 has no eyes, Human3.6M is another skeleton."""
        if missing := [name for j, name in enumerate(JOINTS) if j not in ours]:
            others = [name for name in names if joint_of(name) is None]
            raise self.refusal(f"names other joints than COCO's 17: no {', '.join(missing)}, but "
                               f"{SHORT.repr(others)}; another skeleton cannot be converted")


def joint_of(name: object) -> int | None:
    """Our number of left_eye, eye_left, leftEye or LEFT_EYE; None if COCO has no such joint."""
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+|\d+", name) if isinstance(name, str) else ()
    return JOINT_OF_WORDS.get(frozenset(word.lower() for word in words))


# ------------------------------------------------------------------------------------------ readers
#
# parsed file -> every Person in it, in the file's order

def _rows_by_name(node: Node, n: int) -> np.ndarray:
    """{"nose": [n numbers], ...} -> [17, n]."""
    if not isinstance(node.value, dict):
        raise node.refusal(f'is {SHORT.repr(node.value)}; {{"nose": [{n} numbers], ...}} is needed')
    if missing := [name for name in JOINTS if name not in node.value]:
        raise node.refusal(f"lacks the joint {', '.join(missing)}; all 17 are needed")
    return np.array([node[name].numbers(n) for name in JOINTS])


def _seed(file: Node) -> Iterator[Person]:
    """{"nose": [row, col], ...} on 512 x 512: the row comes first, so y does."""
    rows = _rows_by_name(file, 2)
    joints = np.column_stack([rows[:, 1], rows[:, 0], np.ones(len(JOINTS))])
    yield Person(file, joints, size=(SEED_CANVAS, SEED_CANVAS))


def _ours(file: Node) -> Iterator[Person]:
    """{"nose": [x, y, visible], ...} or 17 rows [x, y, visible], in 0..1."""
    if isinstance(file.value, list) and len(file.value) == len(JOINTS):
        file = Node(dict(zip(JOINTS, file.value, strict=True)), file.where)
    yield Person(file, _rows_by_name(file, 3))


def _coco(file: Node) -> Iterator[Person]:
    """COCO annotations, without crowd regions and without people that have no labelled joint."""
    for person in _coco_people(file):
        yield _coco_person(*person)


def _coco_images(file: Node) -> list[Node]:
    if not isinstance(file.value, dict) or not all(isinstance(file.value.get(key), list)
                                                   for key in ("images", "annotations")):
        raise file.refusal('is not a COCO file; it needs the lists "images" and "annotations"')
    for image in (images := file["images"].objects()):
        if not isinstance(image.value.get("file_name"), str):
            raise image.refusal("has no file_name")
    return images


def _coco_people(file: Node) -> Iterator[tuple[Node, Node, dict]]:
    """Each annotation with joints, its image, and {category id: (number of joints, our order)}."""
    images = {image["id"].id(0): image for image in _coco_images(file)}
    categories = file["categories"].objects() if file.value.get("categories") else []
    orders = {category["id"].id(0): (len(names.value), names.order()) for category in categories
              if isinstance((names := category["keypoints"]).value, list)}
    for annotation in file["annotations"].objects():
        told, image = annotation.value, annotation["image_id"].id(0)
        if told.get("iscrowd") or not told.get("num_keypoints", 1) or "keypoints" not in told:
            continue
        if image not in images:
            raise annotation.refusal(f"has image_id {SHORT.repr(image)}, which is not among the "
                                     "images")
        yield annotation, images[image], orders


def _coco_person(annotation: Node, image: Node, orders: dict) -> Person:
    n, order = orders.get(annotation["category_id"].id(0), (17, ORDERS[17]))
    joints = annotation["keypoints"].numbers(3 * n).reshape(n, 3)[order]
    return Person(annotation, joints, image.value["file_name"], image.size())


def _detections(file: Node) -> Iterator[Person]:
    """[{"keypoints": 17 x (x, y, c), "image_id": ...}]: COCO results, AlphaPose, openpifpaf."""
    for person in file.objects():
        if "keypoints" not in person.value:
            raise person.refusal("has no keypoints: a box alone is not a pose; run a pose model on "
                                 "these detections")
        yield Person(person, person["keypoints"].joints(17), person["image_id"].id(1))


def _yolo(file: Node) -> Iterator[Person]:
    """A line per person: class, box (4), 17 x (x, y, v) and perhaps score and track; or no v."""
    for i, row in enumerate(file.items()):
        if row.value:
            line = Node(row.value, f"{file.where}line {i + 1}")
            numbers = line.numbers(56, 57, 58, 39)
            joints = numbers[5:56].reshape(17, -1)                              # [17, 3] or [17, 2]
            seen = joints[:, 2:] if len(numbers) > 39 else joints.any(axis=1, keepdims=True)
            yield Person(line, np.hstack([joints[:, :2], seen]))


def _openpose(file: Node, n: int) -> Iterator[Person]:
    """{"people": [{"pose_keypoints_2d": n x (x, y, c)}]}, or a list of these, one per image."""
    for f, frame in enumerate([file] if isinstance(file.value, dict) else file.objects()):
        for person in frame["people"].objects():
            told = person.value                                 # null or []: a face or hands only
            key = "pose_keypoints_2d" if told.get("pose_keypoints_2d") else "pose_keypoints"
            if told.get(key):
                yield Person(person, person[key].joints(n), f + 1, frame.size("canvas_"))
            elif told.get("pose_keypoints_3d"):
                raise person.refusal(f"has only pose_keypoints_3d: {NO_DEPTH}")


def _mmpose(file: Node) -> Iterator[Person]:
    """A list of instances or of frames {"frame_id", "instances"}; or that list as "instance_info",
    with the names of the joints in "meta_info"."""
    n, order = 17, ORDERS[17]
    if isinstance(file.value, dict):
        if _has(file.value.get("meta_info"), "keypoint_id2name"):
            names = file["meta_info"]["keypoint_id2name"]
            if isinstance(names.value, dict):                   # {"0": "nose", "1": ...}
                names = Node(list(names.value.values()), names.where)
            n, order = len(names.items()), names.order()
        file = file["instance_info"]
    for item in file.objects():
        frame = item["frame_id"].id(1)
        if item.value.get("instances") == []:                   # the frame counts, without people
            yield Person(item, np.zeros((len(JOINTS), 3)), frame)
        for person in item["instances"].objects() if "instances" in item.value else [item]:
            yield Person(person, _mmpose_joints(person, n)[order], frame)


def _mmpose_joints(person: Node, n: int) -> np.ndarray:
    """{"keypoints": n x [x, y], "keypoint_scores": n x c} -> [n, 3]."""
    keypoints = person["keypoints"]
    rows = [row.numbers(2, 3) for row in keypoints.items()]
    if any(len(row) == 3 for row in rows):
        raise keypoints.refusal(f"has [x, y, z]: {NO_DEPTH}")
    if len(rows) != n:
        raise keypoints.refusal(f"has {len(rows)} joints; {n} are needed")
    scored = "keypoint_scores" in person.value
    return np.column_stack([rows, person["keypoint_scores"].numbers(n) if scored else np.ones(n)])


def _mediapipe(file: Node, picture: int | None = None) -> Iterator[Person]:
    """33 landmarks {x, y, z, visibility} or [x, y, z]: alone, a list of frames, or under a key."""
    data = file.value
    if isinstance(data, dict):
        key = next((key for key in LANDMARKS if key in data), None)
        if key is None:
            raise file.refusal(f"has no pose landmarks, only {SHORT.repr(list(data))}: {NO_METRES}")
        yield from _mediapipe(file[key], picture or 1)
    elif isinstance(data, list) and data and (_has(data[0], "x") or _are_numbers(data[0])):
        yield Person(file, _landmarks(file), picture or 1)
    else:
        for i, item in enumerate(file.items()):
            yield from _mediapipe(item, picture or i + 1)


def _landmarks(points: Node) -> np.ndarray:
    """33 points -> [17, 3]. Fewer points and points in metres are refused."""
    if len(points.value) != 33:
        raise points.refusal(f"has {len(points.value)} landmarks; all 33 are needed, because the "
                             "place in the list is a landmark's name: export the hidden ones too")
    rows = []
    for point in points.items():
        if isinstance(p := point.value, dict):
            point = Node([p.get("x"), p.get("y"), p.get("visibility", 1)], point.where)
        elif isinstance(p, list):
            point = Node([*p[:2], *(p[3:4] or [1])], point.where)
        rows.append(point.numbers(3))
    joints = np.array(rows)[ORDERS[33]]
    hips = joints[[JOINTS.index("hip_left"), JOINTS.index("hip_right")], :2]
    if np.abs(hips.mean(axis=0)).max() < AT_ORIGIN:
        raise points.refusal(f"has its origin between the hips: {NO_METRES}")
    return joints


def _tfjs(file: Node) -> Iterator[Person]:
    """Named points: of one person, of a list of people {"keypoints": ...}, or of a list of frames,
    each of one person or of several."""
    alone = isinstance(file.value, dict) or _are_points(file.value)
    for f, frame in enumerate([file] if alone else file.items()):
        several = isinstance(frame.value, list) and frame.value and not _are_points(frame.value)
        picture = 1 if _has(frame.value, "keypoints") else f + 1    # a list of people, not frames
        for person in frame.items() if several else [frame]:
            yield Person(person, _named_points(person), picture)


def _named_points(person: Node) -> np.ndarray:
    """{name: {x, y}} or [{name, x, y, score}] -> [17, 3]; joints that are not named are missing.

    PoseNet writes part for name, and x and y under position.
    """
    if _has(person.value, "keypoints"):
        person = Node(person.value["keypoints"], person.where)
    elif isinstance(person.value, dict):
        named = [{"name": name, **point} if isinstance(point, dict) else point
                 for name, point in person.value.items()]
        person = Node(named, person.where)
    joints, names = {}, []
    for point in person.objects():
        told, position = point.value, point.value.get("position")
        xy = position if isinstance(position, dict) else told
        names.append(told.get("name", told.get("part")))
        if (j := joint_of(names[-1])) is not None:
            row = [xy.get("x"), xy.get("y"), told.get("score", 1)]
            joints[j] = Node(row, f"{point.where} ({JOINTS[j]})").numbers(3)
    if len(joints) < len(names):                # BlazePose names 33, all of ours among them
        person.check_names(joints, names)
    return np.array([joints.get(j, (0, 0, 0)) for j in range(len(JOINTS))], dtype=np.float64)


# ------------------------------------------------------------------------------------------ formats

class Format(NamedTuple):
    about: str                                                  # its name in messages
    unit: str | None                                            # None: the numbers decide
    read: Callable[[Node], Iterator[Person]]


FORMATS = {
    "coco": Format("COCO annotations", "pixels", _coco),
    "openpose-25": Format("OpenPose BODY_25", None, partial(_openpose, n=25)),
    "comfyui": Format("ComfyUI POSE_KEYPOINT, 18 joints", None, partial(_openpose, n=18)),
    "controlnet": Format("ControlNet's OpenPose, 18 joints", None, partial(_openpose, n=18)),
    "openpose-18": Format("OpenPose COCO-18", None, partial(_openpose, n=18)),
    "mmpose": Format("MMPose predictions", "pixels", _mmpose),
    "tfjs": Format("named points (tfjs MoveNet, PoseNet)", None, _tfjs),
    "mediapipe": Format("MediaPipe landmarks", "images", _mediapipe),
    "alphapose": Format("AlphaPose", "pixels", _detections),
    "coco-results": Format("COCO results", "pixels", _detections),
    "openpifpaf": Format("openpifpaf", "pixels", _detections),
    "ours": Format("our own [x, y, visible]", "images", _ours),
    "seed": Format("the seed's [row, col]", "pixels", _seed),
    "blazepose": Format("BlazePose rows [x, y, z] (tfjs)", None, _mediapipe),
    "yolo": Format("YOLO-pose lines", "images", _yolo),
}


def guess_format(data: object) -> str | None:
    """The name in FORMATS of a parsed file, by its content; None if it is none of them."""
    first, is_list = _first(data), isinstance(data, list)
    if _has(data, "annotations"):
        return "coco"
    if _has(first, "people"):
        return ("openpose-25" if _has_body(first["people"], 25) else "comfyui" if is_list else
                "controlnet" if "canvas_width" in first else "openpose-18")
    if (_has(data, "instance_info") or _has(first, "keypoint_scores")
            or _has(first, "frame_id", "instances")):
        return "mmpose"
    if (_by_joint(first, dict) or _is_point(first)
            or _has(first, "keypoints") and isinstance(_first(first["keypoints"]), dict)):
        return "tfjs"
    if _has(first, "x", "y") or isinstance(first, dict) and any("andmark" in key for key in first):
        return "mediapipe"
    if _has(first, "keypoints") and isinstance(first.get("image_id"), str):
        return "alphapose"
    if _has(first, "image_id"):
        return "coco-results"
    if _has(first, "keypoints"):
        return "openpifpaf"
    if _by_joint(data, list, 3) or _are_rows(data, 3) and len(data) == 17:
        return "ours"
    if _by_joint(data, list):
        return "seed"
    for rows in (data, data[0]) if is_list and data else ():
        if _are_rows(rows, 3, 4) and len(rows) == 33:
            return "blazepose"
    return "yolo" if _are_rows(data, 39, 56, 57, 58) else None


def _first(data: object) -> object:
    """The first thing in nested lists that is neither a list nor null."""
    while isinstance(data, list):
        data = next((item for item in data if item not in ([], None)), None)
    return data


def _has(value: object, *keys: str) -> bool:
    return isinstance(value, dict) and all(key in value for key in keys)


def _is_point(value: object) -> bool:
    return _has(value, "name") or _has(value, "part")


def _are_points(value: object) -> bool:
    return isinstance(value, list) and len(value) > 0 and _is_point(value[0])


def _are_numbers(value: object) -> bool:
    return (isinstance(value, list) and len(value) > 0
            and all(isinstance(v, int | float) for v in value))


def _are_rows(data: object, *widths: int) -> bool:
    """A list of rows of numbers? The first row that is not empty decides."""
    row = next((row for row in data if row != []), None) if isinstance(data, list) else None
    return _are_numbers(row) and len(row) in widths


def _by_joint(data: object, kind: type, n: int = 0) -> bool:
    """An object of joints and values of this kind, some of them with n members or more?"""
    return isinstance(data, dict) and any(
        isinstance(value, kind) and len(value) >= n and joint_of(name) is not None
        for name, value in data.items())


def _has_body(people: object, n: int) -> bool:
    """Does one of OpenPose's people have a body of n joints?"""
    bodies = [body for person in (people if isinstance(people, list) else [])
              if isinstance(person, dict)
              for body in (person.get("pose_keypoints_2d"), person.get("pose_keypoints"))]
    return any(isinstance(body, list) and len(body) == 3 * n for body in bodies)


# ----------------------------------------------------------------------------- from people to poses

def _visible(person: Person, min_confidence: float) -> np.ndarray:
    """[17] bool, by confidence alone: a missing joint may be (0, 0), (0, -3) or any filler."""
    return (person.joints[:, 2] > 0) & (person.joints[:, 2] >= min_confidence)


def _place(person: Person, pixels: bool, canvas: tuple[float, float] | None = None,
           min_confidence: float = MIN_CONFIDENCE) -> np.ndarray:
    """The pose [17, 3] of a person in 0..1; missing joints are (0, 0, 0)."""
    size = person.size or canvas
    if pixels and size is None:
        raise person.node.refusal("is in pixels, and the file does not give the image size; give "
                                  "it, for example --canvas 768x512")
    visible = _visible(person, min_confidence)
    xy = np.where(visible[:, None], person.joints[:, :2], 0.0) / (size if pixels else 1.0)
    if (far := np.abs(xy).max(axis=1) > FAR).any():
        j, (w, h) = int(far.argmax()), size if pixels else (1, 1)
        x, y, _ = person.joints[j]
        raise person.node.refusal(f"has {JOINTS[j]} at ({x:g}, {y:g}), far outside an image of "
                                  f"{w:g} x {h:g}; check the unit and the image size")
    return np.column_stack([xy, visible])


def largest(poses: list[np.ndarray]) -> np.ndarray | None:
    """The pose with the largest box around its joints, then with the most joints; None if there is
    no joint at all."""
    def box_and_joints(pose: np.ndarray) -> tuple[float, int]:
        seen = pose[pose[:, 2] > 0, :2]
        return float(np.prod(np.ptp(seen, axis=0))), len(seen)
    return max((pose for pose in poses if (pose[:, 2] > 0).any()), key=box_and_joints, default=None)


def load_poses(
    path: str | Path,
    format: str | None = None,                      # a name in FORMATS; None: by the content
    person: int | None = None,                      # the k-th of each image, from 1; None: largest
    canvas: tuple[float, float] | None = None,      # (width, height), if the file does not give it
    min_confidence: float = MIN_CONFIDENCE,         # below it a joint is missing
) -> Poses:
    """The poses in a file of any format in FORMATS: one for each image or frame with a person.

    People are counted in the file's order, without those that have no joint. PoseError, one
    sentence with file and place, for a file that cannot be used.
    """
    data = read_content(path)
    if data == []:                              # what detectors write for an image without people
        raise NobodyFound(f"{path}: nobody was found in this image, the file is empty")
    format = format or guess_format(data)
    if format not in FORMATS:
        raise PoseError(f"{path} is not a known pose file; known formats are {', '.join(FORMATS)}")
    kind = FORMATS[format]
    people = list(kind.read(Node(data, f"{path}: ")))

    # Where a format allows two units, the largest number in the file decides, as in the tools.
    reach = max((np.abs(p.joints[_visible(p, min_confidence), :2]).max(initial=0) for p in people),
                default=0)
    pixels = kind.unit == "pixels" or kind.unit is None and reach > PIXELS_ABOVE
    images: dict[int | str, list[np.ndarray]] = {}
    for p in people:
        if _visible(p, min_confidence).any():
            images.setdefault(p.picture, []).append(_place(p, pixels, canvas, min_confidence))
    most = max(map(len, images.values()), default=0)
    if not most:
        raise NobodyFound(f"{path}: {kind.about}, but nobody with a joint of confidence "
                          f"{min_confidence:g} or more")
    if person is not None and not 1 <= person <= most:
        raise NobodyFound(f"{path}: {kind.about} with at most {most} in one image; there is no "
                          f"person {person}")
    picked = {name: largest(poses) if person is None else poses[person - 1]
              for name, poses in images.items() if person is None or person <= len(poses)}

    sizes, n = {p.picture: p.size or canvas for p in people}, sum(map(len, images.values()))
    taken_for = (f"{kind.about} in {'pixels' if pixels else '0..1'}, "
                 f"{n} {'person' if n == 1 else 'people'}")
    if len(images) > 1:
        taken_for += f" in {len(images)} images"
    return Poses(poses=list(picked.values()), sizes=[sizes[name] for name in picked],
                 pictures=[_called(name) for name in picked],
                 frames=[_called(name) for name in sizes], format=format, taken_for=taken_for)


def _called(name: str | int) -> str:
    """The name of an image in messages: the end of a path, where the file name is."""
    return "".join(c if c.isprintable() else "?" for c in str(name)[-60:])


def read_seed(path: str | Path) -> np.ndarray:
    """The pose [17, 3] float64 of a file in the seed's layout, {"nose": [row, col], ...} on 512.

    float64, because the seed's cell ids are floors of these numbers: 175.99999999999997 must not
    become 176, and dividing by 512 is exact. (Datasets hold float32, so in training such a joint
    may fall into the next cell.)
    """
    (person,) = _seed(Node(read_json(path), f"{path}: "))
    return _place(person, pixels=True)


def read_coco(path: str | Path, content: object = None
              ) -> tuple[dict[str, list[np.ndarray]], dict[str, str]]:
    """COCO person keypoints: {file name: poses [17, 3] float64 in 0..1}, and {file name: reason} of
    the images with a person that cannot be used. `content` is the parsed file, if it is at hand.

    Crowd regions and people without a labelled joint are left out, so a list may be empty.
    """
    file = Node(content or read_json(path, limit=None), f"{path}: ")    # COCO's own has 238 MB
    poses: dict[str, list] = {image.value["file_name"]: [] for image in _coco_images(file)}
    refused: dict[str, str] = {}
    for annotation, image, orders in _coco_people(file):
        name = image.value["file_name"]
        try:
            if image.size() is None:
                raise image.refusal("has no width and height; a dataset needs them")
            pose = _place(_coco_person(annotation, image, orders), pixels=True)
        except PoseError as error:
            refused.setdefault(name, str(error))
            continue
        if pose[:, 2].any():
            poses[name].append(pose)
    return poses, refused


def fitted(found: Poses, i: int, fit_how: str) -> np.ndarray:
    """The i-th pose on a square image; an image of unknown size counts as square."""
    return fit(found.poses[i], found.sizes[i] or (1, 1), fit_how)


def name_of(picture: str, of: list, path: str | Path) -> str:
    """The name of a file, with that of the image if the file has several."""
    return Path(path).stem + (f" {picture}" if len(of) > 1 else "")
