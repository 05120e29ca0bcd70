"""Pose files of thirteen tools in; poses [17, 3] = (x, y, visible), 0..1 of their own image, out.

    content -> format (guess_format) -> every Person in the file's own unit (the format's reader)
    -> confidence, unit, canvas (_place) -> one pose per image (load_poses)

The content of a file decides its format, not its name. A file that cannot be used is a PoseError:
one sentence that names the file, the place in it and what to do.
"""
from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from keypoints import JOINTS, SEED_CANVAS, PoseError, fit


class NobodyFound(PoseError):
    """A valid pose file without the person asked for, or without anyone."""


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
    picture: str | float = 1                    # which image or frame of the file
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


# --------------------------------------------------------------------------- from a file to values

def read_content(path: str | Path) -> object:
    """The parsed file: JSON, MediaPipe's protobuf text, or the words of each line (YOLO)."""
    try:
        raw = Path(path).read_bytes()
        text = raw.decode(json.detect_encoding(raw))        # a Windows shell writes UTF-16
    except UnicodeDecodeError:
        raise PoseError(f"{path} is not a text file; expected .json or .txt") from None
    except OSError as e:
        raise PoseError(f"pose file {path} cannot be read: {e.strerror}") from None
    if text.lstrip()[:1] in ("{", "["):
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as e:           # also an integer of 5,000 digits
            raise PoseError(f"pose file {path} is not valid JSON ({e}); export it again") from None
    if "landmark" in text:
        return _parse_landmarks(text)
    return [line.split() for line in text.splitlines()]


def _parse_landmarks(text: str) -> dict[str, list]:
    """`landmarks { landmark { x: .5 y: .4 } ... }` -> {"landmarks": [[{"x": ".5", "y": ".4"}]]}."""
    found: dict[str, list] = {}
    groups = re.split(r"\b((?:world_)?landmarks)\s*\{", "landmarks {" + text)
    for group, body in zip(groups[1::2], groups[2::2], strict=True):
        points = [dict(re.findall(r"\b(x|y|visibility)\s*:\s*([^\s{}]+)", point))
                  for point in re.split(r"\blandmark\s*\{", body)[1:]]
        if points:
            found.setdefault(group, []).append(points)
    return found


@dataclass(frozen=True)
class Node:
    """A value of a parsed file with its place, so that a refusal can name it."""
    value: object
    where: str                                  # "p.json: people[0].keypoints"; "p.json: " is all

    def refusal(self, why: str) -> PoseError:
        return PoseError(f"{self.where.rstrip()} {why}")

    def get(self, key: str, default: object = None) -> object:
        """The value of a member of an object."""
        if not isinstance(self.value, dict):
            raise self.refusal(f"is {SHORT.repr(self.value)}; an object is needed")
        return self.value.get(key, default)

    def __getitem__(self, key: str) -> Node:
        """The member of an object; None where it has none."""
        dot = "" if self.where.endswith(": ") else "."
        return Node(self.get(key), f"{self.where}{dot}{key}")

    def id(self, key: str, default: int = 0) -> str | float:
        """The name or number under this key."""
        value = self.get(key)
        return value if isinstance(value, str | int | float) else default

    def items(self) -> list[Node]:
        if not isinstance(self.value, list):
            raise self.refusal(f"is {SHORT.repr(self.value)}; a list is needed")
        return [Node(item, f"{self.where}[{i}]") for i, item in enumerate(self.value)]

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

    def joints(self, *counts: int) -> np.ndarray:
        """[x, y, c, x, y, c, ...] of a tool with one of these numbers of joints -> our [17, 3]."""
        rows = self.numbers(*(3 * n for n in counts)).reshape(-1, 3)
        return rows[ORDERS[len(rows)]]

    def size(self, prefix: str = "") -> tuple[float, float] | None:
        """(width, height) in pixels; None if the object gives neither."""
        sides = [self.get(f"{prefix}width"), self.get(f"{prefix}height")]
        if sides == [None, None]:
            return None
        w, h = Node(sides, f"{self.where} [{prefix}width, {prefix}height]").numbers(2).tolist()
        if min(w, h) < 1 or max(w, h) > MAX_SIDE:
            raise self.refusal(f"has width {w:g} and height {h:g}; 1 to {MAX_SIDE} are allowed")
        return w, h


# -------------------------------------------------------------------------------- joints by name

def joint_of(name: object) -> int | None:
    """Our number of left_eye, eye_left, leftEye or LEFT_EYE; None if COCO has no such joint."""
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+|\d+", name) if isinstance(name, str) else ()
    return JOINT_OF_WORDS.get(frozenset(word.lower() for word in words))


def order_of(names: Node) -> list[int]:
    """Where our 17 joints are in a tool's own list of names; -1: nowhere.

    17 joints need not be COCO's: PoseTrack18 has no eyes, Human3.6M is another skeleton. So a list
    with names that are not ours is refused unless it has all of ours.
    """
    ours = [joint_of(name.value) for name in names.items()]
    missing = [name for j, name in enumerate(JOINTS) if j not in ours]
    others = [name for name, j in zip(names.value, ours, strict=True) if j is None]
    if missing and others:
        raise names.refusal(f"names other joints than COCO's 17: no {', '.join(missing)}, but "
                            f"{SHORT.repr(others)}; another skeleton cannot be converted")
    return [ours.index(j) if j in ours else -1 for j in range(len(JOINTS))]


def in_order(rows: list[np.ndarray] | np.ndarray, order: list[int]) -> np.ndarray:
    """A tool's rows (x, y, c) -> our [17, 3]; a joint at -1 is missing."""
    return np.vstack([*rows, np.zeros(3)])[order]


# ------------------------------------------------------------------------------------------ readers
#
# parsed file -> every Person in it, in the file's order

def _rows_by_name(node: Node, n: int) -> np.ndarray:
    """{"nose": [n numbers], ...} -> [17, n]."""
    if missing := [name for name in JOINTS if node.get(name) is None]:
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


def _coco_images(file: Node) -> dict[str | float, Node]:
    images = {image.id("id"): image for image in file["images"].items()}
    for image in images.values():
        if not isinstance(image.get("file_name"), str):
            raise image.refusal("has no file_name")
    return images


def _coco_people(file: Node) -> Iterator[tuple[Node, Node, int, list[int]]]:
    """Each annotation with joints, its image, how many joints it has and our order in them."""
    images, orders = _coco_images(file), {}
    for category in file["categories"].items() if file.get("categories") else []:
        if category.get("keypoints"):
            order = order_of(category["keypoints"])
            orders[category.id("id")] = len(category.get("keypoints")), order
    for annotation in file["annotations"].items():
        if (annotation.get("iscrowd") or not annotation.get("num_keypoints", 1)
                or annotation.get("keypoints") is None):
            continue
        image = annotation.id("image_id")
        if image not in images:
            raise annotation.refusal(f"has image_id {SHORT.repr(image)}, which is not among the "
                                     "images")
        yield annotation, images[image], *orders.get(annotation.id("category_id"), (17, ORDERS[17]))


def _coco_person(annotation: Node, image: Node, n: int, order: list[int]) -> Person:
    rows = annotation["keypoints"].numbers(3 * n).reshape(n, 3)
    return Person(annotation, in_order(rows, order), image.get("file_name"), image.size())


def _detections(file: Node) -> Iterator[Person]:
    """[{"keypoints": 17 x (x, y, c), "image_id": ...}]: COCO results, AlphaPose, openpifpaf."""
    for person in file.items():
        if person.get("keypoints") is None:
            raise person.refusal("has no keypoints: a box alone is not a pose; run a pose model on "
                                 "these detections")
        yield Person(person, person["keypoints"].joints(17), person.id("image_id", 1))


def _yolo(file: Node) -> Iterator[Person]:
    """A line per person: class, box (4), 17 x (x, y, v) and perhaps score and track; or no v."""
    for i, row in enumerate(file.items()):
        if row.value:
            line = Node(row.value, f"{file.where}line {i + 1}")
            numbers = line.numbers(39, 56, 57, 58)
            joints = numbers[5:56].reshape(17, -1)                              # [17, 3] or [17, 2]
            seen = joints[:, 2:] if len(numbers) > 39 else joints.any(axis=1, keepdims=True)
            yield Person(line, np.hstack([joints[:, :2], seen]))


def _openpose(file: Node) -> Iterator[Person]:
    """{"people": [{"pose_keypoints_2d": 18 or 25 x (x, y, c)}]}, or a list of these, one an image.

    ComfyUI and ControlNet add the size of the image.
    """
    for f, frame in enumerate([file] if isinstance(file.value, dict) else file.items()):
        for person in frame["people"].items():                  # null or []: a face or hands only
            key = "pose_keypoints_2d" if person.get("pose_keypoints_2d") else "pose_keypoints"
            if person.get(key):
                yield Person(person, person[key].joints(18, 25), f + 1, frame.size("canvas_"))
            elif person.get("pose_keypoints_3d"):
                raise person.refusal(f"has only pose_keypoints_3d: {NO_DEPTH}")


def _mmpose(file: Node) -> Iterator[Person]:
    """A list of instances or of frames {"frame_id", "instances"}; or that list as "instance_info",
    with the names of the joints in "meta_info"."""
    n, order = 17, ORDERS[17]
    if isinstance(file.value, dict):
        if _has(file.get("meta_info"), "keypoint_id2name"):
            names = file["meta_info"]["keypoint_id2name"]
            if isinstance(names.value, dict):                   # {"0": "nose", "1": ...}
                names = Node(list(names.value.values()), names.where)
            n, order = len(names.items()), order_of(names)
        file = file["instance_info"]
    for item in file.items():
        frame = item.id("frame_id", 1)
        if item.get("instances") == []:                         # the frame counts, without people
            yield Person(item, np.zeros((len(JOINTS), 3)), frame)
        for person in item["instances"].items() if "instances" in item.value else [item]:
            yield Person(person, in_order(_mmpose_rows(person, n), order), frame)


def _mmpose_rows(person: Node, n: int) -> np.ndarray:
    """{"keypoints": n x [x, y], "keypoint_scores": n x c} -> [n, 3]."""
    keypoints = person["keypoints"]
    rows = [row.numbers(2, 3) for row in keypoints.items()]
    if any(len(row) == 3 for row in rows):
        raise keypoints.refusal(f"has [x, y, z]: {NO_DEPTH}")
    if len(rows) != n:
        raise keypoints.refusal(f"has {len(rows)} joints; {n} are needed")
    scored = person.get("keypoint_scores") is not None
    return np.column_stack([rows, person["keypoint_scores"].numbers(n) if scored else np.ones(n)])


def _mediapipe(file: Node, picture: int | None = None) -> Iterator[Person]:
    """33 landmarks {x, y, z, visibility} or [x, y, z]: alone, a list of frames, or under a key."""
    data = file.value
    if isinstance(data, dict):
        key = next((key for key in LANDMARKS if key in data), None)
        if key is None:
            raise file.refusal(f"has no pose landmarks, only {SHORT.repr(list(data))}: {NO_METRES}")
        yield from _mediapipe(file[key], picture or 1)
    elif isinstance(data, list) and data and (_has(data[0], "x") or len(_shape(data)) == 2):
        yield Person(file, _landmarks(file), picture or 1)
    else:
        for i, item in enumerate(file.items()):
            yield from _mediapipe(item, picture or i + 1)


def _landmarks(points: Node) -> np.ndarray:
    """33 points -> [17, 3]. Fewer points and points in metres are refused."""
    if len(points.value) != 33:
        raise points.refusal(f"has {len(points.value)} landmarks; all 33 are needed, because the "
                             "place in the list is a landmark's name: export the hidden ones too")
    joints = np.array([_point(point) for point in points.items()])[ORDERS[33]]
    hips = joints[[JOINTS.index("hip_left"), JOINTS.index("hip_right")], :2]
    if np.abs(hips.mean(axis=0)).max() < AT_ORIGIN:
        raise points.refusal(f"has its origin between the hips: {NO_METRES}")
    return joints


def _point(point: Node) -> np.ndarray:
    """(x, y, c) of {x, y, score or visibility} or [x, y, z, visibility]; c is 1 where it is absent.

    PoseNet has x and y under position.
    """
    if isinstance(p := point.value, list):
        xyc = [*p[:2], *(p[3:4] or [1])]
    else:
        at = point["position"] if point.get("position") else point
        xyc = [at.get("x"), at.get("y"), point.get("score", point.get("visibility", 1))]
    return Node(xyc, point.where).numbers(3)


def _tfjs(file: Node) -> Iterator[Person]:
    """Named points: of one person, of a list of people {"keypoints": ...}, or of a list of frames,
    each of one person or of several."""
    alone = isinstance(file.value, dict) or _are_named(file.value)
    for f, frame in enumerate([file] if alone else file.items()):
        several = isinstance(frame.value, list) and frame.value and not _are_named(frame.value)
        picture = 1 if _has(frame.value, "keypoints") else f + 1    # a list of people, not frames
        for person in frame.items() if several else [frame]:
            yield Person(person, _named_points(person), picture)


def _named_points(person: Node) -> np.ndarray:
    """{name: {x, y}} or [{name or part, x, y, score}] -> [17, 3]; joints without a name in it are
    missing."""
    if _has(person.value, "keypoints"):
        person = person["keypoints"]
    if isinstance(person.value, dict):
        names, points = list(person.value), [person[name] for name in person.value]
    else:
        points = person.items()
        names = [point.get("name", point.get("part")) for point in points]
    order = order_of(Node(names, person.where))
    return in_order([_point(point) for point in points], order)


# ------------------------------------------------------------------------------------------ formats

class Format(NamedTuple):
    about: str                                                  # its name in messages
    unit: str | None                                            # None: the numbers decide
    read: Callable[[Node], Iterator[Person]]


FORMATS = {
    "coco": Format("COCO annotations", "pixels", _coco),
    "openpose": Format("OpenPose (or ComfyUI, ControlNet)", None, _openpose),
    "mmpose": Format("MMPose predictions", "pixels", _mmpose),
    "tfjs": Format("named points (tfjs MoveNet, PoseNet)", None, _tfjs),
    "mediapipe": Format("MediaPipe landmarks", "images", _mediapipe),
    "coco-results": Format("COCO results (or AlphaPose)", "pixels", _detections),
    "openpifpaf": Format("openpifpaf", "pixels", _detections),
    "ours": Format("our own [x, y, visible]", "images", _ours),
    "seed": Format("the seed's [row, col]", "pixels", _seed),
    "blazepose": Format("BlazePose rows [x, y, z] (tfjs)", None, _mediapipe),
    "yolo": Format("YOLO-pose lines", "images", _yolo),
}


def guess_format(data: object) -> str | None:
    """The name in FORMATS of a parsed file, by its content; None if it is none of them."""
    first, shape = _first(data), _shape(data)
    if isinstance(first, str):                                  # the words of a text file
        return "yolo" if first[:1].isdigit() else None
    if not isinstance(first, dict):
        return ("ours" if shape == (17, 3) else
                "blazepose" if shape[-2:] in ((33, 3), (33, 4)) else None)
    if _has(data, "annotations"):
        return "coco"
    if "people" in first:
        return "openpose"
    if ("instance_info" in first or "keypoint_scores" in first
            or _has(first, "frame_id", "instances")):
        return "mmpose"
    by_joint = [value for name, value in first.items() if joint_of(name) is not None]
    if (_are_named([first]) or any(isinstance(value, dict) for value in by_joint)
            or isinstance(_first(first.get("keypoints")), dict)):
        return "tfjs"
    if _has(first, "x", "y") or any("andmark" in key for key in first):
        return "mediapipe"
    if "image_id" in first:
        return "coco-results"
    if "keypoints" in first:
        return "openpifpaf"
    widths = [len(value) for value in by_joint if isinstance(value, list)]
    return None if not widths else "ours" if max(widths) > 2 else "seed"


def _first(data: object) -> object:
    """The first thing in nested lists that is neither a list nor null."""
    while isinstance(data, list):
        data = next((item for item in data if item not in ([], None)), None)
    return data


def _shape(data: object) -> tuple[int, ...]:
    """The lengths of nested lists of numbers, by the first of each; () for anything else."""
    shape = []
    while isinstance(data, list) and data:
        shape.append(len(data))
        data = data[0]
    return tuple(shape) if isinstance(data, int | float) else ()


def _has(value: object, *keys: str) -> bool:
    return isinstance(value, dict) and all(key in value for key in keys)


def _are_named(points: object) -> bool:
    return (isinstance(points, list) and len(points) > 0
            and (_has(points[0], "name") or _has(points[0], "part")))


# ----------------------------------------------------------------------------- from people to poses

def _known(person: Person, min_confidence: float = MIN_CONFIDENCE) -> Person:
    """The person with joints (x, y, visible), a missing one (0, 0, 0).

    Confidence alone decides: a missing joint may be (0, 0), (0, -3) or any filler.
    """
    xy, c = person.joints[:, :2], person.joints[:, 2:]
    visible = (c > 0) & (c >= min_confidence)
    return person._replace(joints=np.hstack([np.where(visible, xy, 0), visible]))


def _place(person: Person, pixels: bool, canvas: tuple[float, float] | None = None) -> np.ndarray:
    """The pose [17, 3] of a person of `_known` in 0..1."""
    size = (person.size or canvas) if pixels else (1, 1)
    if size is None:
        raise person.node.refusal("is in pixels, but its image has no width and height in the "
                                  "file; give them, for example --canvas 768x512")
    pose = person.joints / (*size, 1)
    if (far := np.abs(pose).max(axis=1) > FAR).any():
        j, (w, h) = int(far.argmax()), size
        x, y, _ = person.joints[j]
        raise person.node.refusal(f"has {JOINTS[j]} at ({x:g}, {y:g}), far outside an image of "
                                  f"{w:g} x {h:g}; check the unit and the image size")
    return pose


def largest(poses: list[np.ndarray]) -> np.ndarray | None:
    """The pose with the largest box around its joints, then with the most joints; None if there is
    no joint at all."""
    def box_and_joints(pose: np.ndarray) -> tuple[float, int]:
        seen = pose[pose[:, 2] > 0, :2]
        return float(np.prod(np.ptp(seen, axis=0))), len(seen)
    return max((pose for pose in poses if pose[:, 2].any()), key=box_and_joints, default=None)


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
    if _first(data) is None:                    # what detectors write for an image without people
        raise NobodyFound(f"{path}: nobody was found in this image, the file is empty")
    format = format or guess_format(data)
    if format not in FORMATS:
        raise PoseError(f"{path} is not a known pose file; known formats are {', '.join(FORMATS)}")
    kind = FORMATS[format]
    people = [_known(p, min_confidence) for p in kind.read(Node(data, f"{path}: "))]

    # Where a format allows two units, the largest number in the file decides, as in the tools.
    reach = max((np.abs(p.joints[:, :2]).max() for p in people), default=0)
    pixels = kind.unit == "pixels" or kind.unit is None and reach > PIXELS_ABOVE
    images: dict[str | float, list[np.ndarray]] = {}
    for p in people:
        if p.joints[:, 2].any():
            images.setdefault(p.picture, []).append(_place(p, pixels, canvas))
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


def _called(name: str | float) -> str:
    """The name of an image in messages: the end of a path, where the file name is."""
    return "".join(c if c.isprintable() else "?" for c in str(name)[-60:])


def read_seed(path: str | Path) -> np.ndarray:
    """The pose [17, 3] float64 of a file in the seed's layout, {"nose": [row, col], ...} on 512.

    float64, because the seed's cell ids are floors of these numbers: 175.99999999999997 must not
    become 176, and dividing by 512 is exact. (Datasets hold float32, so in training such a joint
    may fall into the next cell.)
    """
    (person,) = _seed(Node(read_content(path), f"{path}: "))
    return _place(person, pixels=True)


def read_coco(path: str | Path, content: object = None
              ) -> tuple[dict[str, list[np.ndarray]], dict[str, str]]:
    """COCO person keypoints: {file name: poses [17, 3] float64 in 0..1}, and {file name: reason} of
    the images with a person that cannot be used. `content` is the parsed file, if it is at hand.

    Crowd regions and people without a labelled joint are left out, so a list may be empty.
    """
    file = Node(content or read_content(path), f"{path}: ")
    poses: dict[str, list] = {image.get("file_name"): [] for image in _coco_images(file).values()}
    refused: dict[str, str] = {}
    for annotation, image, *joints in _coco_people(file):
        name = image.get("file_name")
        try:
            pose = _place(_known(_coco_person(annotation, image, *joints)), pixels=True)
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
