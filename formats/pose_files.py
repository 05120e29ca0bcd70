"""Pose files of other tools in; poses [17, 3] = (x, y, visible), 0..1 of their own image, out.

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
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from keypoints import HIDDEN, JOINTS, SEED_CANVAS, PoseError, fit


class NobodyFound(PoseError):
    """A valid pose file without the person asked for, or without anyone."""


class SizeNeeded(PoseError):
    """A pose in pixels, in a file without the size of its image."""


MIN_CONFIDENCE = 0.3            # below it a joint counts as missing
PIXELS_ABOVE = 2.0              # where a format allows two units: no coordinate in 0..1 exceeds it
FAR = 10.0                      # image sizes; a joint further from the corner has another unit
MAX_SIDE = 1_000_000            # pixels of an image
AT_ORIGIN = 0.01                # metres: MediaPipe's world landmarks start between the hips
COCO_FIRST = 17, 26, 133, 136   # joints of COCO, Halpe-26, whole-body, Halpe-136: ours come first
ORDERS = {                      # our 17 joints in lists of these, OpenPose (18, 25), MediaPipe (33)
    **dict.fromkeys(COCO_FIRST, list(range(17))),
    18: [0, 15, 14, 17, 16, 5, 2, 6, 3, 7, 4, 11, 8, 12, 9, 13, 10],
    25: [0, 16, 15, 18, 17, 5, 2, 6, 3, 7, 4, 12, 9, 13, 10, 14, 11],
    33: [0, 2, 5, 7, 8, 11, 12, 13, 14, 15, 16, 23, 24, 25, 26, 27, 28],
}
BODY = JOINTS[5:]               # what another skeleton must have; CrowdPose, AIC, MPII lack faces
SHORT_PARTS = {"shoulder": "sho", "elbow": "elb", "wrist": "wri", "knee": "kne", "ankle": "ank"}
JOINT_OF = {                    # eyeleft, lefteye, eyel, leye, lsho ...: our number
    before + after: j
    for j, (part, _, side) in enumerate(name.partition("_") for name in JOINTS)
    for word in (part, SHORT_PARTS.get(part, part)) for mark in (side, side[:1])
    for before, after in ((word, mark), (mark, word))}
SIZES = (("canvas_width", "canvas_height"), ("imageWidth", "imageHeight"),
         ("original_width", "original_height"), ("width", "height"))
SCORES = "keypoint_scores", "scores"                        # MMPose's and ViTPose's
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

    def id(self, key: str, default: str | float | None = None) -> str | float | None:
        """The name or number under this key; "7" is 7."""
        value = self.get(key)
        if isinstance(value, str) and value.isdecimal() and len(value) < 20:
            return int(value)
        return value if isinstance(value, str | int | float) else default

    def keys(self) -> list[str]:
        self.get("")
        return list(self.value)

    def values(self) -> list:
        if not isinstance(self.value, list):
            raise self.refusal(f"is {SHORT.repr(self.value)}; a list is needed")
        return self.value

    def items(self) -> list[Node]:
        return [Node(item, f"{self.where}[{i}]") for i, item in enumerate(self.values())]

    def numbers(self, *lengths: int, gaps: bool = False) -> np.ndarray:
        """The finite numbers of a list of one of `lengths`; with `gaps` also NaN, and for null."""
        values = self.value if isinstance(self.value, list) else []
        try:
            numbers = [math.nan if gaps and v is None else float(v) for v in values]
            sound = gaps or all(map(math.isfinite, numbers))
        except (TypeError, ValueError, OverflowError):          # an integer of 400 digits
            sound = False
        if len(values) not in lengths or not sound:
            found = (f"has {len(values)} values" if values and len(values) not in lengths else
                     f"is {SHORT.repr(self.value)}")
            raise self.refusal(f"{found}; {' or '.join(map(str, lengths))} numbers are needed"
                               f"{'' if gaps else ', not NaN or infinity'}")
        return np.array(numbers)

    def rows(self, *counts: int, scores: Node | None = None) -> np.ndarray:
        """[n, 3] (x, y, c) of n joints, one of `counts`: flat x, y, c; or points [x, y, c]; or
        points [x, y], perhaps with scores; or {"x": [...], "y": [...], "visible": [...]}."""
        if isinstance(self.value, dict):
            xy = np.column_stack([self[axis].numbers(*counts, gaps=True) for axis in ("x", "y")])
            scores = self["visible"]
        elif wide := max((len(v) for v in self.values() if isinstance(v, list)), default=0):
            if wide == 3 and scores is not None:
                raise self.refusal(f"has [x, y, z]: {NO_DEPTH}")
            xy = np.array([Node(item.value or [None] * wide, item.where).numbers(
                3 if wide == 3 else 2, gaps=True) for item in self.items()])
            if len(xy) not in counts:
                raise self.refusal(f"has {len(xy)} joints; {' or '.join(map(str, counts))} are "
                                   "needed")
        else:
            xy = self.numbers(*(3 * n for n in counts), gaps=True).reshape(-1, 3)
        if xy.shape[1] == 3:
            return self.xyc(xy[:, :2], xy[:, 2])
        scored = scores is not None and scores.value is not None
        return self.xyc(xy, scores.numbers(len(xy), gaps=True) if scored else None)

    def xyc(self, xy: np.ndarray, c: np.ndarray | None = None) -> np.ndarray:
        """[n, 2], [n] -> [n, 3] with (0, 0, 0) for NaN where the confidence is not above 0 either.

        Where a file has no confidence, a joint at NaN or (0, 0) is missing.
        """
        known = np.isfinite(xy).all(axis=1)
        rows = np.column_stack([xy, known & xy.any(axis=1) if c is None else c])
        rows[~known & ~(rows[:, 2] > 0)] = 0
        if not np.isfinite(rows).all():
            j = int(np.isfinite(rows).all(axis=1).argmin())
            raise self.refusal(f"has {rows[j].tolist()} for joint {j + 1}; x, y and confidence "
                               "must be numbers; NaN is allowed only where the confidence is 0")
        return rows

    def size(self) -> tuple[float, float] | None:
        """(width, height) in pixels; None if the object does not give both, or gives 0."""
        for keys in SIZES:
            if all(sides := [self.get(key) for key in keys]):
                w, h = Node(sides, f"{self.where} [{', '.join(keys)}]").numbers(2).tolist()
                if min(w, h) < 1 or max(w, h) > MAX_SIDE:
                    raise self.refusal(f"has width {w:g} and height {h:g}; 1 to {MAX_SIDE} are "
                                       "allowed")
                return w, h
        return None


# -------------------------------------------------------------------------------- joints by name

@lru_cache(maxsize=1000)
def joint_of(name: str) -> int | None:
    """Our number of left_eye, eye_left, leftEye, L-Eye or LEye; None if COCO has no such joint."""
    return JOINT_OF.get(re.sub(r"[\W_]", "", name.lower()))


def order_of(names: Node, partial: bool = False) -> list[int]:
    """Where our 17 joints are in a tool's own list of names; -1: nowhere.

    17 joints need not be COCO's, so names decide: PoseTrack18 has no eyes, Human3.6M is another
    skeleton. A list with names that are not ours must have all joints of BODY; a `partial` list,
    of the joints that were seen, any of ours. Names that only count, 1 to 17, are in COCO's order.
    """
    called = [str(name.value)[:99] for name in names.items()]
    numbers = [int(found[1]) if (found := re.fullmatch(r"\D*(\d{1,3})", name)) else -1
               for name in called]
    if sorted(numbers) in ([*range(17)], [*range(1, 18)]):
        return [numbers.index(min(numbers) + j) for j in range(17)]
    ours = [joint_of(name) for name in called]
    if twice := [JOINTS[j] for j in range(17) if ours.count(j) > 1]:
        raise names.refusal(f"names {twice[0]} twice; a person has one, and several people need a "
                            "group or an object each")
    missing = [name for j, name in enumerate(JOINTS) if j not in ours]
    others = [name for name, j in zip(called, ours, strict=True) if j is None]
    enough = len(missing) < len(JOINTS) if partial else not set(missing) & set(BODY)
    if others and not enough:
        raise names.refusal(f"names other joints than COCO's 17: no {', '.join(missing)}, but "
                            f"{SHORT.repr(others)}; another skeleton cannot be converted")
    return [ours.index(j) if j in ours else -1 for j in range(len(JOINTS))]


def in_order(rows: list[np.ndarray] | np.ndarray, order: list[int]) -> np.ndarray:
    """A tool's rows (x, y, c) -> our [17, 3]; a joint at -1 is missing."""
    return np.vstack([*rows, np.zeros(3)])[order]


def by_name(names: list, rows: list[np.ndarray], where: str) -> np.ndarray:
    """Named rows (x, y, c) of one person -> our [17, 3]; joints without a row are missing."""
    return in_order(rows, order_of(Node(names, where), partial=True))


# ------------------------------------------------------------------------------------------ readers
#
# parsed file -> every Person in it, in the file's order; a PoseError for one that is left out

def _seed(file: Node) -> Iterator[Person]:
    """{"nose": [row, col], ...} on 512 x 512: the row comes first, so y does."""
    rows = np.array([file[name].numbers(2) for name in JOINTS])
    joints = np.column_stack([rows[:, 1], rows[:, 0], np.ones(len(JOINTS))])
    yield Person(file, joints, size=(SEED_CANVAS, SEED_CANVAS))


def _ours(file: Node) -> Iterator[Person]:
    """{"nose": [x, y, visible], ...} or 17 rows [x, y, visible], in 0..1."""
    if isinstance(file.value, list) and len(file.value) == len(JOINTS):
        file = Node(dict(zip(JOINTS, file.value, strict=True)), file.where)
    names = [name for name in file.keys() if joint_of(name) is not None]
    order = order_of(Node(names, file.where), partial=True)
    if missing := [name for name, i in zip(JOINTS, order, strict=True) if i < 0]:
        raise file.refusal(f"lacks the joint {', '.join(missing)}; all 17 are needed")
    rows = np.array([file[name].numbers(3, gaps=True) for name in names])
    yield Person(file, in_order(file.xyc(rows[:, :2], rows[:, 2]), order))


def _coco(file: Node) -> Iterator[Person | PoseError]:
    """COCO annotations, without crowd regions and without people that have no labelled joint."""
    for _, person in _coco_people(file, _coco_images(file)):
        yield person


def _coco_images(file: Node) -> dict[str | float, Node]:
    images: dict[str | float, Node] = {}
    for image in file["images"].items():
        if not isinstance(name := image.get("file_name"), str):
            raise image.refusal("has no file_name")
        other = images.setdefault(image.id("id"), image).get("file_name")
        if other != name:
            raise image.refusal(f"has the id {SHORT.repr(image.id('id'))} and the file_name "
                                f"{name}, but this id is also that of {other}; an id may occur "
                                "once: keep merged files apart, one json each")
    return images


def _coco_people(file: Node, images: dict[str | float, Node]
                 ) -> Iterator[tuple[str | None, Person | PoseError]]:
    """The image, by its file name, and the person of each annotation with joints; the person is a
    PoseError where it cannot be used, the image None where it is not among the images."""
    orders: dict = {}
    names = {category.id("id"): category["keypoints"] for category in
             (file["categories"].items() if file.get("categories") else [])
             if category.get("keypoints")}
    for annotation in file["annotations"].items():
        picture = None
        try:
            if (annotation.get("iscrowd") in (1, "1")
                    or annotation.get("num_keypoints") in (0, "0")
                    or annotation.get("keypoints") in (None, [])):
                continue
            image = annotation.id("image_id")
            if image not in images:
                raise annotation.refusal(f"has image_id {SHORT.repr(image)}, which is not among "
                                         "the images")
            picture, size = images[image].get("file_name"), images[image].size()
            category = annotation.id("category_id", next(iter(names), None))
            rows, order = _coco_rows(annotation["keypoints"], names.get(category), category, orders)
            yield picture, Person(annotation, in_order(rows, order), picture, size)
        except PoseError as error:
            yield picture, error


def _coco_rows(points: Node, names: Node | None, category: str | float,
               orders: dict) -> tuple[np.ndarray, list[int]]:
    """The rows (x, y, v) of an annotation and our order in them, which `orders` remembers.

    Where a category has more names than an annotation has joints (Human-Art), or fewer, both must
    start with COCO's 17.
    """
    if names is None:
        rows = points.rows(*COCO_FIRST)
        return rows, ORDERS[len(rows)]
    nested = isinstance(points.values()[0], list)
    n, named = len(points.value) // (1 if nested else 3), len(names.values())
    if (category, n) not in orders:
        orders[category, n] = order_of(Node(names.value[:n], names.where))
    if n != named and orders[category, n] != ORDERS[17]:
        raise points.refusal(f"has {len(points.value)} values for {named} names; {3 * named} are "
                             "needed")
    return points.rows(n), orders[category, n]


def _people(file: Node) -> Iterator[Person]:
    """{"keypoints": ...}: of one person; of a list of people; or of a list of images, each of which
    is a list of people or has it as "instances". MMPose has that list as "instance_info" and the
    names of the joints in "meta_info"."""
    items, counts, order = [file], COCO_FIRST, None
    if not _has(file.value, "keypoints"):
        if isinstance(file.value, dict):
            if _has(file.get("meta_info"), "keypoint_id2name"):
                names = file["meta_info"]["keypoint_id2name"]
                if isinstance(names.value, dict):                   # {"0": "nose", "1": ...}
                    names = Node(list(names.value.values()), names.where)
                counts, order = (len(names.items()),), order_of(names)
            file = file["instance_info"]
        items = file.items()
    for i, item in enumerate(items):
        people = item["instances"] if _has(item.value, "instances") else item
        image = i + 1 if people is item and isinstance(item.value, list) else item.id(
            "image_id", item.id("frame_id", 1))
        if people.value == []:                              # the image counts, without people
            yield Person(item, np.zeros((len(JOINTS), 3)), image)
        alone = people is item and isinstance(item.value, dict)
        for person in [item] if alone else people.items():
            yield Person(person, _joints(person, counts, order), image)


def _joints(person: Node, counts: tuple[int, ...], order: list[int] | None) -> np.ndarray:
    """The joints [17, 3] of {"keypoints": ...}."""
    if person.get("keypoints") is None:
        raise person.refusal("has no keypoints: a box alone is not a pose; run a pose model on "
                             "these detections")
    scores = next((person[key] for key in SCORES if person.get(key) is not None), None)
    if isinstance(person.get("labels"), list):          # ViTPose: the numbers of the joints
        numbers = person["labels"].numbers(len(person.get("labels"))).tolist()
        counts = (len(numbers),)
        order = [numbers.index(j) if j in numbers else -1 for j in range(len(JOINTS))]
    rows = person["keypoints"].rows(*counts, scores=scores)
    return in_order(rows, order or ORDERS[len(rows)])


def _yolo(file: Node) -> Iterator[Person]:
    """A line per person: class, box (4), 17 x (x, y, v) and perhaps score and track; or no v."""
    for i, row in enumerate(file.items()):
        if row.value:
            line = Node(row.value, f"{file.where}line {i + 1}")
            numbers = line.numbers(39, 56, 57, 58, gaps=True)
            joints = numbers[5:56].reshape(17, -1)                              # [17, 3] or [17, 2]
            c = joints[:, 2] if len(numbers) > 39 else None
            yield Person(line, line.xyc(joints[:, :2], c))


def _openpose(file: Node) -> Iterator[Person]:
    """{"people": [{"pose_keypoints_2d": 18 or 25 x (x, y, c)}]}, or a list of these, one an image.

    ComfyUI and ControlNet add the size of the image; AlphaPose writes one file {image: {"people" or
    "bodies": ...}}; editors write {"width", "height", "keypoints": 18 [x, y] a person}.
    """
    if isinstance(file.value, list):
        frames = dict(enumerate(file.items(), 1))
    elif {"people", "bodies", "keypoints"} & set(file.keys()):
        frames = {1: file}
    else:
        frames = {name: file[name] for name in file.keys()}
    for picture, frame in frames.items():
        if frame.get("keypoints") is not None:
            for points in _editor_people(frame["keypoints"]):
                yield Person(frame, points.rows(18)[ORDERS[18]], picture, frame.size())
            continue
        for person in frame["bodies" if "bodies" in frame.value else "people"].items():
            key = next((key for key in ("pose_keypoints_2d", "pose_keypoints", "joints")
                        if person.get(key)), None)                  # else a face or hands only
            if key:
                rows = person[key].rows(18, 25)
                yield Person(person, rows[ORDERS[len(rows)]], picture, frame.size())
            elif person.get("pose_keypoints_3d"):
                raise person.refusal(f"has only pose_keypoints_3d: {NO_DEPTH}")


def _editor_people(points: Node) -> list[Node]:
    """The 18 points of each person: a list of them, or all in one list."""
    if len(_shape(points.value)) == 3:
        return points.items()
    return [Node(points.value[i:i + 18], points.where) for i in range(0, len(points.items()), 18)]


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
    """(x, y, c) of {x, y, score or visibility} or [x, y, z, visibility]; c may be absent.

    PoseNet has x and y under position.
    """
    if isinstance(p := point.value, list):
        xyc = p[:2] + p[3:4]
    else:
        at = point["position"] if point.get("position") else point
        c = point.get("score", point.get("visibility"))
        xyc = [at.get("x"), at.get("y"), *([] if c is None else [c])]
    xyc = Node(xyc, point.where).numbers(2, 3, gaps=True)
    return point.xyc(xyc[None, :2], xyc[2:] if len(xyc) > 2 else None)[0]


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
    """{name: {x, y}} or [{name or part, x, y, score}] -> [17, 3]."""
    if _has(person.value, "keypoints"):
        person = person["keypoints"]
    if isinstance(person.value, dict):
        names, points = person.keys(), [person[name] for name in person.value]
    else:
        points = person.items()
        names = [point.get("name", point.get("part")) for point in points]
    return by_name(names, [_point(point) for point in points], person.where)


def _labelme(file: Node) -> Iterator[Person]:
    """{"shapes": [{"label": name, "points": [[x, y]], "shape_type": "point", "group_id"}]}: a group
    is a person."""
    for i, frame in enumerate([file] if isinstance(file.value, dict) else file.items()):
        people: dict[object, list[Node]] = {}
        for shape in frame["shapes"].items():
            if shape.get("shape_type", "point") == "point":
                people.setdefault(shape.id("group_id"), []).append(shape)
        for shapes in people.values():
            names = [shape.get("label") for shape in shapes]
            joints = by_name(names, [shape["points"].rows(1)[0] for shape in shapes],
                             frame["shapes"].where)
            yield Person(frame, joints, frame.id("imagePath", i + 1), frame.size())


def _label_studio(file: Node) -> Iterator[Person]:
    """Tasks {"annotations": [{"result": points}]}, or JSON-MIN with the points in the task itself.

    A point is {"keypointlabels": [name], "x", "y"} in percent, perhaps under "value"; the points of
    one parent are a person.
    """
    for i, task in enumerate([file] if isinstance(file.value, dict) else file.items()):
        if task.get("annotations") is not None:                         # of several, the first
            done = [a for a in task["annotations"].items() if not a.get("was_cancelled")]
            points = done[0]["result"].items() if done else []
        else:
            points = [point for key in task.keys() if isinstance(task.get(key), list)
                      for point in task[key].items() if isinstance(point.value, dict)]
        people: dict[object, list[Node]] = {}
        for point in points:
            if _has(point.get("value", point.value), "keypointlabels"):
                people.setdefault(point.id("parentID"), []).append(point)
        told = task["data"] if task.get("data") else task
        texts = [value for value in map(told.get, told.keys()) if isinstance(value, str)]
        for points in people.values():
            at = [point["value"] if "value" in point.value else point for point in points]
            names = [name.value for point in at for name in point["keypointlabels"].items()[:1]]
            rows = [_point(point) / (100, 100, 1) for point in at]
            yield Person(task, by_name(names, rows, task.where), (texts or [i + 1])[0],
                         points[0].size())


# ------------------------------------------------------------------------------------------ formats

class Format(NamedTuple):
    about: str                                                  # its name in messages
    unit: str | None                                            # None: the numbers decide
    read: Callable[[Node], Iterator[Person]]


FORMATS = {
    "coco": Format("COCO annotations", None, _coco),
    "openpose": Format("OpenPose (or ComfyUI, ControlNet, AlphaPose)", None, _openpose),
    "mmpose": Format("MMPose predictions (or ViTPose)", None, _people),
    "ultralytics": Format("Ultralytics to_json", None, _people),
    "coco-results": Format("COCO results (or AlphaPose)", None, _people),
    "openpifpaf": Format("openpifpaf", None, _people),
    "labelme": Format("LabelMe points", None, _labelme),
    "label-studio": Format("Label Studio key points", "images", _label_studio),
    "tfjs": Format("named points (tfjs MoveNet, PoseNet)", None, _tfjs),
    "mediapipe": Format("MediaPipe landmarks", "images", _mediapipe),
    "blazepose": Format("BlazePose rows [x, y, z] (tfjs)", None, _mediapipe),
    "ours": Format("our own [x, y, visible]", "images", _ours),
    "seed": Format("the blog post's [row, col]", "pixels", _seed),
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
    inside, keypoints = next(iter(first.values()), None), first.get("keypoints")
    if "shapes" in first:
        return "labelme"
    if (_has(first, "annotations", "data") or _has(_first(first.get("annotations")), "result")
            or any(_has(_first(value), "keypointlabels") for value in first.values())):
        return "label-studio"
    if _has(data, "annotations"):
        return "coco"
    if ("people" in first or "bodies" in first or _has(inside, "people") or _has(inside, "bodies")
            or _has(first, "width", "height", "keypoints")):
        return "openpose"
    if ("instance_info" in first or "keypoint_scores" in first or _has(first, "keypoints", "scores")
            or _has(first, "frame_id", "instances")):
        return "mmpose"
    if (_has(keypoints, "x", "y") and isinstance(keypoints["x"], list)
            or _has(first, "class", "box")):
        return "ultralytics"
    by_joint = {name: value for name, value in first.items() if joint_of(name) is not None}
    if (_are_named([first]) or any(isinstance(value, dict) for value in by_joint.values())
            or isinstance(_first(keypoints), dict)):
        return "tfjs"
    if _has(first, "x", "y") or any("andmark" in key for key in first):
        return "mediapipe"
    if "image_id" in first:
        return "coco-results"
    if "keypoints" in first:
        return "openpifpaf"
    widths = [len(value) for value in by_joint.values() if isinstance(value, list)]
    if widths and max(widths) > 2:
        return "ours"
    return "seed" if widths and set(by_joint) <= set(JOINTS) else None


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

def _known(people: list[Person], min_confidence: float = MIN_CONFIDENCE) -> list[Person]:
    """The people with joints (x, y, visible), a missing one (0, 0, 0).

    Confidence alone decides: a missing joint may be (0, 0), (0, -3) or any filler. A joint is
    hidden where the file has COCO's levels 0, 1 and 2, or our own 0, HIDDEN and 1.
    """
    levels = {c for person in people for c in np.unique(person.joints[:, 2]).tolist()}
    top = max(levels, default=0)
    hidden = (HIDDEN if levels <= {0, HIDDEN, 1} else 1 if top == 2 and levels <= {0, 1, 2} else
              None)
    known = []
    for person in people:
        xy, c = person.joints[:, :2], person.joints[:, 2:]
        there = (c > 0) & ((c >= min_confidence) | (c == hidden))
        visible = there * np.where(c == hidden, HIDDEN, 1)
        known.append(person._replace(joints=np.hstack([np.where(there, xy, 0), visible])))
    return known


def _in_pixels(people: list[Person]) -> bool:
    """Where a format allows two units, the largest number in the file decides, as in the tools."""
    return max((np.abs(p.joints[:, :2]).max() for p in people), default=0) > PIXELS_ABOVE


def _place(person: Person, pixels: bool, canvas: tuple[float, float] | None = None) -> np.ndarray:
    """The pose [17, 3] of a person of `_known` in 0..1."""
    size = (person.size or canvas) if pixels else (1, 1)
    if size is None:
        raise SizeNeeded(f"{person.node.where} is in pixels, but its image has no width and height "
                         "in the file; give them, for example --canvas 768x512")
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
    read = list(kind.read(Node(data, f"{path}: ")))
    left_out = [p for p in read if isinstance(p, PoseError)]
    people = _known([p for p in read if isinstance(p, Person)], min_confidence)

    pixels = kind.unit == "pixels" or kind.unit is None and _in_pixels(people)
    images: dict[str | float, list[np.ndarray]] = {}
    for p in people:
        if p.joints[:, 2].any():
            try:
                images.setdefault(p.picture, []).append(_place(p, pixels, canvas))
            except PoseError as error:
                if format != "coco":
                    raise
                left_out.append(error)
    most = max(map(len, images.values()), default=0)
    if not most and left_out:
        raise left_out[0]
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
    if left_out:
        taken_for += f"; {_left_out(left_out, len(read))}"
    return Poses(poses=list(picked.values()), sizes=[sizes[name] for name in picked],
                 pictures=[_called(name) for name in picked],
                 frames=[_called(name) for name in sizes], format=format, taken_for=taken_for)


def _left_out(errors: list[PoseError], of: int) -> str:
    return f"{len(errors)} of {of} annotations cannot be used; the first: {errors[0]}"


def _called(name: str | float) -> str:
    """The name of an image in messages: the end of a path, where the file name is."""
    return "".join(c if c.isprintable() else "?" for c in str(name)[-60:])


def read_one(path: str | Path, size: Callable[[], tuple[float, float]]) -> Poses:
    """The content of the keypoint file of one image, of several people the largest: one pose.

    `size` gives (width, height) of the image, if the file needs it. The pose is float64, because
    the seed's cell ids are floors of these numbers: 175.99999999999997 must not become 176, and
    dividing by 512 is exact. (Datasets hold float32, so in training such a joint may fall into the
    next cell.)
    """
    try:
        found = load_poses(path)
    except SizeNeeded:
        found = load_poses(path, canvas=size())
    if len(found.frames) > 1:
        raise PoseError(f"{path}: {found.taken_for}; the keypoint file of an image must have one")
    return found


def read_coco(path: str | Path, content: object = None,
              size_of: Callable[[str], tuple | None] = lambda name: None
              ) -> tuple[dict[str, list[np.ndarray]], dict[str, str], dict[str, tuple | None]]:
    """COCO person keypoints: {file name: poses [17, 3] float64 in 0..1}, {file name: reason} of the
    images of which no person can be used, and {file name: (width, height) in the file or None}.

    `content` is the parsed file, if it is at hand; `size_of` gives the size of an image that has
    none in the file. Joints are in pixels, or in 0..1 if no number in the file is larger than
    PIXELS_ABOVE. Crowd regions and people without a labelled joint are left out, so a list may be
    empty. Prints how many annotations cannot be used.
    """
    file = Node(content or read_content(path), f"{path}: ")
    images = _coco_images(file)
    poses: dict[str, list] = {image.get("file_name"): [] for image in images.values()}
    found, sizes = list(_coco_people(file, images)), dict.fromkeys(poses)
    left_out = [(name, error) for name, error in found if isinstance(error, PoseError)]
    sound = [(name, person) for name, person in found if isinstance(person, Person)]
    people = _known([person for _, person in sound])
    pixels = _in_pixels(people)
    for (name, _), person in zip(sound, people, strict=True):
        sizes[name] = person.size
        try:
            unknown = pixels and person.size is None
            pose = _place(person, pixels, size_of(name) if unknown else None)
        except PoseError as error:
            left_out.append((name, error))
            continue
        if pose[:, 2].any():
            poses[name].append(pose)
    if left_out:
        errors = [error for _, error in left_out]
        print(f"warning: {_left_out(errors, len(found))}", file=sys.stderr)
    refused = {name: str(error) for name, error in reversed(left_out)       # the first of each
               if name and not poses[name]}
    return poses, refused, sizes


def fitted(found: Poses, i: int, fit_how: str) -> np.ndarray:
    """The i-th pose on a square image; an image of unknown size counts as square."""
    return fit(found.poses[i], found.sizes[i] or (1, 1), fit_how)


def name_of(picture: str, of: list, path: str | Path) -> str:
    """The name of a file, with that of the image if the file has several."""
    return Path(path).stem + (f" {picture}" if len(of) > 1 else "")
