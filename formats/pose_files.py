"""Pose files of thirteen tools in, poses [17, 3] = (x, y, visible) on 0..1 of their own picture out.

What a file is, its content tells, not its name. PoseError, one sentence that names file and place, for what cannot be
read or has no place on a picture.
"""
from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from keypoints import JOINTS, SEED_CANVAS, PoseError, fit


class NobodyFound(PoseError):
    """A pose file in order, but of a picture in which there is nobody."""


# content -> what it looks like (FORMATS, at the end) -> its reader yields every Person in the file's own unit
#         -> confidence, unit, canvas (_place) -> one pose a picture (load_poses)

MAX_BYTES = 32 << 20            # of a pose file: thousands of frames with face and hands
MAX_PEOPLE = 100_000            # in it, an hour of video: the shortest in text take 70 times its bytes in memory
MIN_CONFIDENCE = 0.3            # below it a joint counts as missing
PIXELS_ABOVE = 2.0              # where one schema has two units: no person in pixels fits into two of them
FAR = 10.0                      # pictures away from the corner: no joint lies there, so the unit was another one
ORDERS = {                      # where our 17 joints stand in lists of 17 (COCO), 18, 25 (OpenPose) and 33 (MediaPipe)
    17: list(range(17)),
    18: [0, 15, 14, 17, 16, 5, 2, 6, 3, 7, 4, 11, 8, 12, 9, 13, 10],
    25: [0, 16, 15, 18, 17, 5, 2, 6, 3, 7, 4, 12, 9, 13, 10, 14, 11],
    33: [0, 2, 5, 7, 8, 11, 12, 13, 14, 15, 16, 23, 24, 25, 26, 27, 28],
}
JOINT_OF_WORDS = {frozenset(name.split("_")): j for j, name in enumerate(JOINTS)}
MAX_SIDE = 1_000_000            # of a picture, in pixels
AT_ORIGIN = 0.01                # metres: the world landmarks of MediaPipe start between the hips
NO_DEPTH = "3-D coordinates have no place on a picture; export the 2-D ones"
NO_METRES = "world landmarks are metres and have no place on a picture; export pose_landmarks"
LANDMARKS = ("pose_landmarks", "poseLandmarks", "landmarks", "landmark")        # MediaPipe's, on the picture
SHORT = reprlib.Repr()                                                          # of values in messages
SHORT.maxlevel = 1


class Person(NamedTuple):
    """Somebody as a file has them, before confidence, unit and canvas are settled."""
    where: str                                  # file and place, for messages
    joints: np.ndarray                          # [17, 3] (x, y, confidence) in the file's own unit
    picture: str | int = 1                      # which picture or frame of the file
    size: tuple[float, float] | None = None     # (width, height) of that picture, where the file says it


@dataclass(frozen=True)
class Poses:
    """What a file held: one pose for each of its pictures or frames in which somebody was picked."""
    poses: list[np.ndarray]                     # [17, 3] float64 (x, y, visible), normalised to its own picture
    sizes: list[tuple[float, float] | None]     # (width, height) of that picture; None: not known
    pictures: list[str]                         # what the file calls it: a file name, an id, a frame's number
    frames: list[str]                           # the same of all, also those in which nobody was picked, where it says
    format: str                                 # one of FORMATS
    taken_for: str                              # the format, the unit and how many people


def read_text(path: str | Path, limit: int | None = MAX_BYTES) -> str:
    """A file's text, UTF-8 or the UTF-16 that a Windows shell writes; else a PoseError with one sentence saying why."""
    try:
        if not Path(path).is_file():                            # a pipe would hang, a folder has no text
            raise PoseError(f"pose file {path} " + ("is a folder; name the files in it" if Path(path).is_dir() else
                                                       "is not a file" if Path(path).exists() else "does not exist"))
        if limit and (size := Path(path).stat().st_size) > limit:
            raise PoseError(f"pose file {path} has {size / 2 ** 20:.0f} MiB, at most {limit >> 20} are read; split it")
        raw = Path(path).read_bytes()
        return raw.decode(json.detect_encoding(raw))
    except UnicodeDecodeError:
        raise PoseError(f"{path} is no text, so no pose file; a picture, perhaps? Poses are .json files") from None
    except OSError as e:
        raise PoseError(f"pose file {path} cannot be read: {e}") from None


def read_json(path: str | Path, limit: int | None = MAX_BYTES) -> object:
    """The parsed file, or a PoseError with one sentence saying why there is none."""
    return _parse_json(read_text(path, limit), path)


def _parse_json(text: str, path: str | Path) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:                   # also an integer of 5,000 digits
        raise PoseError(f"pose file {path} is not valid JSON ({e}); export it again") from None


def read_content(path: str | Path) -> object:
    """The parsed file, whatever its name: JSON, MediaPipe's protobuf text, or lines of numbers (YOLO)."""
    text = read_text(path)
    if text.lstrip()[:1] in ("{", "["):
        return _parse_json(text, path)
    if "landmark" in text:
        return _parse_landmarks(text, path)
    return [_parse_numbers(line.split(), f"{path}: line {i + 1}") for i, line in enumerate(text.splitlines())]


def _parse_numbers(words: list[str], where: str) -> list[float]:
    try:
        return [float(word) for word in words]
    except ValueError:
        raise PoseError(f"{where} is {SHORT.repr(' '.join(words))}; a pose file is JSON, lines of numbers (YOLO) or "
                        "landmarks with numbers (MediaPipe)") from None


def _parse_landmarks(text: str, path: str | Path) -> dict[str, list]:
    """`landmarks { landmark { x: .5 y: .4 visibility: .9 } ... }` -> {"landmarks": [[{"x": .5, ...}, ...]]}."""
    found: dict[str, list] = {"landmarks": [], "world_landmarks": []}
    group, (_, *pieces) = "landmarks", re.split(r"\b(landmark|landmarks|world_landmarks)\s*\{", text)
    for tag, body in zip(pieces[::2], pieces[1::2], strict=True):
        group = group if tag == "landmark" else tag
        if tag != "landmark" or not found[group]:
            found[group].append([])
        if tag == "landmark":
            fields = dict(re.findall(r"\b(x|y|z|visibility)\s*:\s*([^\s{}]+)", body))
            numbers = _parse_numbers(list(fields.values()), f"{path}: landmark {len(found[group][-1])} of {group}")
            found[group][-1].append(dict(zip(fields, numbers, strict=True)))
    return {key: people for key, people in found.items() if people}


# What the readers share. A refusal names the place, as in "p.json: people[0] has ..."; the whole file is "p.json: ".

def _refused(where: str, why: str) -> PoseError:
    return PoseError(f"{where.rstrip()} {why}")


def _at(where: str, key: str) -> str:
    """The place one key further in."""
    return f"{where}{'' if where.endswith(': ') else '.'}{key}"


def _items(value: object, where: str) -> Iterator[tuple[str, object]]:
    """The items of a list, each with its place."""
    if not isinstance(value, list):
        raise _refused(where, f"is {SHORT.repr(value)}; a list is needed")
    return ((f"{where}[{i}]", item) for i, item in enumerate(value))


def _objects(value: object, where: str) -> Iterator[tuple[str, dict]]:
    """The same, where every item has to be an object."""
    for at, item in _items(value, where):
        if not isinstance(item, dict):
            raise _refused(at, f"is {SHORT.repr(item)}; an object is needed")
        yield at, item


def _numbers(value: object, lengths: tuple[int, ...], where: str) -> list[float]:
    """`value` as finite floats, their count being one of `lengths`."""
    wanted = " or ".join(str(n) for n in lengths)
    if isinstance(value, list) and len(value) not in lengths:
        raise _refused(where, f"has {len(value)} values; {wanted} numbers are needed")
    if not isinstance(value, list) or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in value):
        raise _refused(where, f"is {SHORT.repr(value)}; {wanted} numbers are needed")
    try:
        floats = [float(v) for v in value]                      # an int of 400 digits does not fit a float
    except OverflowError:
        floats = [math.inf]
    if not all(math.isfinite(v) for v in floats):
        raise _refused(where, f"is {SHORT.repr(value)}; NaN and infinity are not coordinates, mend or remove it")
    return floats


def _id(value: object, where: str) -> int | str:
    if not isinstance(value, int | str):
        raise _refused(where, f"is {SHORT.repr(value)}; a number or a string is needed")
    return value


def _size(holder: dict, prefix: str, where: str) -> tuple[float, float] | None:
    """(width, height) in pixels, None where the file gives neither."""
    sides = [holder.get(f"{prefix}width"), holder.get(f"{prefix}height")]
    if sides == [None, None]:
        return None
    w, h = _numbers(sides, (2,), _at(where, f"[{prefix}width, {prefix}height]"))
    if not (1 <= w <= MAX_SIDE and 1 <= h <= MAX_SIDE):
        raise _refused(where, f"has width {w:g} and height {h:g}; they must be positive, 1 to {MAX_SIDE:,} pixels")
    return w, h


def _flat(value: object, n: int, where: str) -> np.ndarray:
    """[x, y, c, x, y, c, ...] of a tool with n joints -> our [17, 3]."""
    return np.array(_numbers(value, (3 * n,), where)).reshape(n, 3)[ORDERS[n]]


def _joint(name: object) -> int | None:
    """Our number of left_eye, eye_left, leftEye or LEFT_EYE; None for a joint that COCO does not have."""
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+|\d+", name) if isinstance(name, str) else ()
    return JOINT_OF_WORDS.get(frozenset(word.lower() for word in words))


def _order(names: object, where: str) -> list[int]:
    """Where our 17 joints stand in a tool's own list of names."""
    ours = [_joint(name) for _, name in _items(names, where)]
    _check_names({j for j in ours if j is not None}, [n for n, j in zip(names, ours, strict=True) if j is None], where)
    return [ours.index(j) for j in range(len(JOINTS))]


def _check_names(known: set[int], strangers: list, where: str) -> None:
    """17 joints need not be COCO's: PoseTrack18 has a head instead of eyes, Human3.6M another skeleton throughout."""
    if lacking := [name for j, name in enumerate(JOINTS) if j not in known]:
        raise _refused(where, f"names other joints than COCO's 17: no {', '.join(lacking)}, but "
                       f"{SHORT.repr(strangers)}; a pose of another skeleton cannot be placed here")


# The readers: parsed file -> every Person in it, in the file's order.

def _rows_by_name(joints: object, n: int, where: str) -> list[list[float]]:
    """{"nose": [n numbers], ...} -> 17 rows."""
    if not isinstance(joints, dict):
        raise _refused(where, f'is {SHORT.repr(joints)}; {{"nose": [{n} numbers], ...}} is needed')
    if missing := [name for name in JOINTS if name not in joints]:
        raise _refused(where, f"lacks the joint {', '.join(missing)}; all 17 are needed")
    return [_numbers(joints[name], (n,), _at(where, name)) for name in JOINTS]


def _seed(data: object, where: str) -> Iterator[Person]:
    """{"nose": [row, col], ...} on 512 x 512: the row comes first, so y does."""
    rows = _rows_by_name(data, 2, where)
    yield Person(where, np.array([(col, row, 1.0) for row, col in rows]), size=(SEED_CANVAS, SEED_CANVAS))


def _ours(data: object, where: str) -> Iterator[Person]:
    """{"nose": [x, y, visible], ...} or 17 rows [x, y, visible], on 0..1."""
    if isinstance(data, list) and len(data) == len(JOINTS):
        data = dict(zip(JOINTS, data, strict=True))
    yield Person(where, np.array(_rows_by_name(data, 3, where)))


def _coco(data: object, where: str) -> Iterator[Person]:
    """COCO annotations. Crowd regions and persons without a labelled joint are left out."""
    images, orders = _coco_images(data, where), _coco_orders(data, where)
    for at, told, image in _coco_people(data, images, where):
        yield _coco_person(at, told, image, orders)


def _coco_people(data: dict, images: dict, where: str) -> Iterator[tuple[str, dict, tuple]]:
    """Each annotation that has joints: its place, itself and its image's (file name, size)."""
    for at, told in _objects(data["annotations"], _at(where, "annotations")):
        if told.get("iscrowd") or not told.get("num_keypoints", 1) or "keypoints" not in told:
            continue
        image = _id(told.get("image_id"), _at(at, "image_id"))
        if image not in images:
            raise _refused(at, f"has image_id {SHORT.repr(image)}, which is not among the images")
        yield at, told, images[image]


def _coco_person(at: str, told: dict, image: tuple, orders: dict) -> Person:
    n, order = orders.get(_id(told.get("category_id", 0), _at(at, "category_id")), (17, ORDERS[17]))
    flat = _numbers(told["keypoints"], (3 * n,), _at(at, "keypoints"))
    return Person(at, np.array(flat).reshape(n, 3)[order], *image)


def _coco_images(data: object, where: str) -> dict[int | str, tuple[str, tuple[float, float] | None]]:
    """id -> (file name, size)."""
    if not isinstance(data, dict) or not all(isinstance(data.get(k), list) for k in ("images", "annotations")):
        raise _refused(where, 'is not a COCO annotation file: it needs the lists "images" and "annotations"')
    images = {}
    for at, image in _objects(data["images"], _at(where, "images")):
        if not isinstance(image.get("file_name"), str):
            raise _refused(at, "has no file_name")
        images[_id(image.get("id"), _at(at, "id"))] = image["file_name"], _size(image, "", at)
    return images


def _coco_orders(data: dict, where: str) -> dict[int | str, tuple[int, list[int]]]:
    """Category id -> (how many joints, where ours stand among them), for the categories that name their joints."""
    return {_id(category.get("id"), _at(at, "id")): (len(names), _order(names, _at(at, "keypoints")))
            for at, category in _objects(data.get("categories") or [], _at(where, "categories"))
            if isinstance(names := category.get("keypoints"), list)}


def _detections(data: object, where: str) -> Iterator[Person]:
    """[{"keypoints": 17 x (x, y, c), "image_id": ..., ...}, ...]: COCO results, AlphaPose, openpifpaf (one picture)."""
    for at, person in _objects(data, where):
        if "keypoints" not in person:
            raise _refused(at, "has no keypoints: a box alone is not a pose; run a pose model on these detections")
        joints = _flat(person["keypoints"], 17, _at(at, "keypoints"))
        yield Person(at, joints, _id(person.get("image_id", 1), _at(at, "image_id")))


def _yolo(data: object, where: str) -> Iterator[Person]:
    """A line a person: class, box (4), then 17 x (x, y, v) and perhaps a score and a track, or just 17 x (x, y)."""
    for i, (_, row) in enumerate(_items(data, where)):
        if row:
            at = f"{where}line {i + 1}"
            numbers = np.array(_numbers(row, (56, 57, 58, 39), at))
            xy = numbers[5:39].reshape(17, 2)
            yield Person(at, np.column_stack([xy, xy.any(axis=1)]) if len(row) == 39 else numbers[5:56].reshape(17, 3))


def _openpose(data: object, where: str, n: int) -> Iterator[Person]:
    """{"people": [{"pose_keypoints_2d": n x (x, y, c)}], ...}, or a list of those, one a picture (ComfyUI)."""
    for f, (at, frame) in enumerate([(where, data)] if isinstance(data, dict) else _objects(data, where)):
        size = _size(frame, "canvas_", at)
        for spot, person in _objects(frame.get("people"), _at(at, "people")):
            key = next((key for key in ("pose_keypoints_2d", "pose_keypoints") if person.get(key)), None)
            if key:                                             # else null or []: only a face or hands were found
                yield Person(spot, _flat(person[key], n, _at(spot, key)), f + 1, size)
            elif person.get("pose_keypoints_3d"):
                raise _refused(spot, f"has only pose_keypoints_3d: {NO_DEPTH}")


def _mmpose(data: object, where: str) -> Iterator[Person]:
    """A list of instances or of frames {"frame_id", "instances"}, or {"meta_info": ..., "instance_info": that list}."""
    n, order = 17, ORDERS[17]
    if isinstance(data, dict):
        if isinstance(meta := data.get("meta_info"), dict) and (names := meta.get("keypoint_id2name")) is not None:
            named = [names.get(str(i)) for i in range(len(names))] if isinstance(names, dict) else names
            order = _order(named, _at(where, "meta_info.keypoint_id2name"))
            n = len(named)
        data, where = data.get("instance_info"), _at(where, "instance_info")
    for at, item in _objects(data, where):
        frame = _id(item.get("frame_id", 1), _at(at, "frame_id"))
        if item.get("instances") == []:                         # nobody, but the frame counts
            yield Person(at, np.zeros((len(JOINTS), 3)), frame)
        for spot, person in _objects(item["instances"], _at(at, "instances")) if "instances" in item else [(at, item)]:
            yield Person(spot, _mmpose_joints(person, n, spot)[order], frame)


def _mmpose_joints(person: dict, n: int, where: str) -> np.ndarray:
    """{"keypoints": n x [x, y], "keypoint_scores": n x c} -> [n, 3]. Its box, nested or not, is not needed."""
    at_joints, at_scores = _at(where, "keypoints"), _at(where, "keypoint_scores")
    rows = [_numbers(row, (2, 3), at) for at, row in _items(person.get("keypoints"), at_joints)]
    if any(len(row) == 3 for row in rows):
        raise _refused(at_joints, f"has [x, y, z]: {NO_DEPTH}")
    if len(rows) != n:
        raise _refused(at_joints, f"has {len(rows)} joints; {n} are needed")
    return np.column_stack([rows, _numbers(person.get("keypoint_scores", [1] * n), (n,), at_scores)])


def _mediapipe(data: object, where: str, picture: int | None = None) -> Iterator[Person]:
    """33 landmarks {x, y, z, visibility} or [x, y, z]: alone, in a list of frames, or a list of persons under a key."""
    if isinstance(data, dict):
        key = next((key for key in LANDMARKS if key in data), None)
        if key is None:
            raise _refused(where, f"has no pose landmarks, only {SHORT.repr(list(data))}: {NO_METRES}")
        yield from _mediapipe(data[key], _at(where, key), picture or 1)
    elif isinstance(data, list) and data and ("x" in data[0] if isinstance(data[0], dict) else _are_numbers(data[0])):
        yield Person(where, _landmarks(data, where), picture or 1)
    else:
        for i, (at, item) in enumerate(_items(data, where)):
            yield from _mediapipe(item, at, picture or i + 1)


def _landmarks(points: list, where: str) -> np.ndarray:
    """33 points -> [17, 3]; fewer are refused, and so are metres, whose origin is between the hips."""
    if len(points) != 33:
        raise _refused(where, f"has {len(points)} landmarks; all 33 are needed, a landmark's place in the list is its "
                       "name: export the hidden ones too")
    rows = [[p.get("x"), p.get("y"), p.get("visibility", 1)] if isinstance(p, dict) else
            [*p[:2], *(p[3:4] or [1])] if isinstance(p, list) else p for p in points]
    joints = np.array([_numbers(row, (3,), f"{where}[{i}]") for i, row in enumerate(rows)])[ORDERS[33]]
    hips = joints[[JOINTS.index("hip_left"), JOINTS.index("hip_right")], :2]
    if np.abs(hips.mean(axis=0)).max() < AT_ORIGIN:
        raise _refused(where, f"has its origin between the hips: {NO_METRES}")
    return joints


def _tfjs(data: object, where: str) -> Iterator[Person]:
    """Named points: of one person, or a list of persons ({"keypoints": ...}), or a list of frames of one or several."""
    alone = isinstance(data, dict) or isinstance(data, list) and bool(data) and _is_point(data[0])
    for f, (at, frame) in enumerate([(where, data)] if alone else _items(data, where)):
        several = isinstance(frame, list) and bool(frame) and not _is_point(frame[0])
        is_person = isinstance(frame, dict) and "keypoints" in frame    # then the list is one of persons, not of frames
        for spot, person in _items(frame, at) if several else [(at, frame)]:
            yield Person(spot, _named_points(person, spot), 1 if is_person else f + 1)


def _named_points(person: object, where: str) -> np.ndarray:
    """{name: {x, y}} or [{name, x, y, score}] (PoseNet: part, position) -> [17, 3]; joints not named are missing."""
    if isinstance(person, dict):
        person = person["keypoints"] if "keypoints" in person else [
            {"name": name, **point} if isinstance(point, dict) else point for name, point in person.items()]
    joints, strangers = {}, []
    for at, point in _objects(person, where):
        name = point.get("name", point.get("part"))
        xy = point["position"] if isinstance(point.get("position"), dict) else point
        row = [xy.get("x"), xy.get("y"), point.get("score", 1)]
        if (j := _joint(name)) is None:
            strangers.append(name)
        else:
            joints[j] = _numbers(row, (3,), f"{at} ({JOINTS[j]})")
    if strangers:                                               # BlazePose names 33, and all of ours are among them
        _check_names(set(joints), strangers, where)
    return np.array([joints.get(j, (0, 0, 0)) for j in range(len(JOINTS))], dtype=np.float64)


# What tells the formats apart: `data` is the parsed file, `first` the first thing in it that is neither list nor null.

def _first(data: object) -> object:
    while isinstance(data, list):
        data = next((item for item in data if item not in ([], None)), None)
    return data


def _has(value: object, *keys: str) -> bool:
    return isinstance(value, dict) and all(key in value for key in keys)


def _is_point(value: object) -> bool:
    return _has(value, "name") or _has(value, "part")


def _are_numbers(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, int | float) for v in value)


def _are_rows(data: object, widths: tuple[int, ...], height: int | None = None) -> bool:
    """Is it a list (of that length) of rows of numbers, so many in the first row that has any?"""
    row = next((row for row in data if row != []), None) if isinstance(data, list) else None
    return _are_numbers(row) and len(row) in widths and height in (None, len(data))


def _by_joint(data: object, kind: type, n: int = 0) -> bool:
    """Is it an object whose keys are joints and whose values are of this kind, some of them with n members or more?"""
    return isinstance(data, dict) and any(
        isinstance(value, kind) and len(value) >= n for name, value in data.items() if _joint(name) is not None)


def _has_body(first: object, n: int) -> bool:
    """Is there a body of n joints in {"people": [...]}?"""
    people = first["people"] if _has(first, "people") and isinstance(first["people"], list) else []
    return any(isinstance(flat, list) and len(flat) == 3 * n for person in people if isinstance(person, dict)
               for flat in (person.get("pose_keypoints_2d"), person.get("pose_keypoints")))


class Format(NamedTuple):
    about: str                                                  # what a person is told
    unit: str | None                                            # pixels or pictures (0..1); None: the numbers tell
    read: Callable[[object, str], Iterator[Person]]
    looks: Callable[[object, object], bool]                     # (data, first); the first format to say yes is taken


FORMATS = {
    "coco": Format("COCO annotations", "pixels", _coco, lambda data, first: _has(data, "annotations")),
    "openpose-25": Format("OpenPose BODY_25", None, partial(_openpose, n=25), lambda data, first: _has_body(first, 25)),
    "comfyui": Format("ComfyUI POSE_KEYPOINT, 18 joints", None, partial(_openpose, n=18),
                      lambda data, first: isinstance(data, list) and _has(first, "people")),
    "controlnet": Format("ControlNet's OpenPose, 18 joints", None, partial(_openpose, n=18),
                         lambda data, first: _has(data, "people", "canvas_width")),
    "openpose-18": Format("OpenPose COCO-18", None, partial(_openpose, n=18), lambda data, first: _has(data, "people")),
    "mmpose": Format("MMPose predictions", "pixels", _mmpose,
                     lambda data, first: _has(data, "instance_info") or _has(first, "keypoint_scores")
                     or _has(first, "frame_id", "instances")),
    "tfjs": Format("named points (tfjs MoveNet, PoseNet)", None, _tfjs,
                   lambda data, first: _by_joint(first, dict) or _is_point(first)
                   or _has(first, "keypoints") and isinstance(_first(first["keypoints"]), dict)),
    "mediapipe": Format("MediaPipe landmarks", "pictures", _mediapipe,
                        lambda data, first: _has(first, "x", "y") or isinstance(first, dict)
                        and any("andmark" in key for key in first)),
    "alphapose": Format("AlphaPose", "pixels", _detections,
                        lambda data, first: _has(first, "keypoints") and isinstance(first.get("image_id"), str)),
    "coco-results": Format("COCO results", "pixels", _detections, lambda data, first: _has(first, "image_id")),
    "openpifpaf": Format("openpifpaf", "pixels", _detections, lambda data, first: _has(first, "keypoints")),
    "ours": Format("our own [x, y, visible]", "pictures", _ours,
                   lambda data, first: _by_joint(data, list, 3) or _are_rows(data, (3,), height=17)),
    "seed": Format("the seed's [row, col]", "pixels", _seed, lambda data, first: _by_joint(data, list)),
    "blazepose": Format("BlazePose rows [x, y, z] (tfjs)", None, _mediapipe, lambda data, first: any(
        _are_rows(rows, (3, 4), height=33) for rows in (data, data[0] if isinstance(data, list) and data else None))),
    "yolo": Format("YOLO-pose lines", "pictures", _yolo, lambda data, first: _are_rows(data, (39, 56, 57, 58))),
}


def guess_format(data: object) -> str | None:
    """The name in FORMATS of what a parsed file looks like, by its content alone."""
    first = _first(data)
    return next((name for name, format in FORMATS.items() if format.looks(data, first)), None)


def _visible(person: Person, min_confidence: float) -> np.ndarray:
    """[17] bool. Confidence decides, never the coordinates: a missing joint may be (0, 0), (0, -3) or any filler."""
    return (person.joints[:, 2] > 0) & (person.joints[:, 2] >= min_confidence)


def _in_pixels(people: list[Person], unit: str | None, min_confidence: float) -> bool:
    """Where one schema has two units, the numbers of the whole file decide, as they do in the tools themselves."""
    reach = max((np.abs(p.joints[_visible(p, min_confidence), :2]).max(initial=0) for p in people), default=0)
    return unit == "pixels" or unit is None and reach > PIXELS_ABOVE


def _place(person: Person, pixels: bool, canvas: tuple[float, float] | None = None,
           min_confidence: float = MIN_CONFIDENCE) -> np.ndarray:
    """The pose [17, 3] of a person: missing joints are (0, 0, 0), the others go to 0..1."""
    size = person.size or canvas
    if pixels and size is None:
        raise _refused(person.where, "is in pixels and the file does not say of what picture; give its size, as in "
                       "--canvas 768x512")
    visible = _visible(person, min_confidence)
    xy = np.where(visible[:, None], person.joints[:, :2], 0.0) / (size if pixels else 1.0)
    if (far := np.abs(xy).max(axis=1) > FAR).any():
        j, (w, h) = int(far.argmax()), size if pixels else (1, 1)
        x, y, _ = person.joints[j]
        raise _refused(person.where, f"has {JOINTS[j]} at ({x:g}, {y:g}), far outside a picture of {w:g} x {h:g}; is "
                       "that another unit, or another picture's size?")
    return np.column_stack([xy, visible])


def largest(poses: list[np.ndarray]) -> np.ndarray | None:
    """The pose whose seen joints span the largest box, joints counting where boxes tie; None without a seen joint."""
    def span(pose):
        seen = pose[pose[:, 2] > 0, :2]
        return float(np.prod(np.ptp(seen, axis=0))), len(seen)
    return max((p for p in poses if (p[:, 2] > 0).any()), key=span, default=None)


def load_poses(
    path: str | Path,
    format: str | None = None,                      # a name in FORMATS; None: told by the content
    person: int | None = None,                      # the k-th of each picture, from 1; None: its largest
    canvas: tuple[float, float] | None = None,      # (width, height) of the picture, where the file does not say
    min_confidence: float = MIN_CONFIDENCE,         # below it a joint is missing
) -> Poses:
    """The poses in a file of any format in FORMATS: one for each of its pictures or frames that shows somebody.

    Persons are counted in the file's order, those without a joint left out. PoseError, one sentence naming file and
    place, for what cannot be read or has no place on a picture.
    """
    data = read_content(path)
    if data == []:                              # what detectors leave for a picture without people
        raise NobodyFound(f"{path}: nobody was found in this picture, the file is empty")
    format = format or guess_format(data)
    kind = FORMATS.get(format)
    if kind is None:
        raise PoseError(f"{path} is no pose file known here; known formats are {', '.join(FORMATS)}")
    try:
        people = list(islice(kind.read(data, f"{path}: "), MAX_PEOPLE + 1))
    except RecursionError:
        raise PoseError(f"{path}: nested too deeply for a pose file; export it again") from None
    if len(people) > MAX_PEOPLE:
        raise PoseError(f"{path}: {kind.about} of more than {MAX_PEOPLE:,} people, which is the most; split it")
    pixels = _in_pixels(people, kind.unit, min_confidence)
    pictures: dict[int | str, list[np.ndarray]] = {}
    for p in people:
        if _visible(p, min_confidence).any():
            pictures.setdefault(p.picture, []).append(_place(p, pixels, canvas, min_confidence))
    most = max(map(len, pictures.values()), default=0)
    if not most:
        raise NobodyFound(f"{path}: {kind.about}, but nobody with a joint of confidence {min_confidence:g} or more")
    if person is not None and not 1 <= person <= most:
        raise PoseError(f"{path}: {kind.about} with at most {most} in a picture; there is no person {person}")
    picked = {picture: largest(poses) if person is None else poses[person - 1]
              for picture, poses in pictures.items() if person is None or person <= len(poses)}
    sizes, n, m = {p.picture: p.size or canvas for p in people}, sum(map(len, pictures.values())), len(pictures)
    about = f"{kind.about} in {'pixels' if pixels else '0..1'}, {n} {'person' if n == 1 else 'people'}"
    return Poses(poses=list(picked.values()), sizes=[sizes[picture] for picture in picked],
                 pictures=[_called(picture) for picture in picked], frames=[_called(picture) for picture in sizes],
                 format=format, taken_for=about + (f" in {m} pictures" if m > 1 else ""))


def _called(picture: str | int) -> str:
    """What a picture is called in messages: of a path the end, where its name is."""
    return "".join(c if c.isprintable() else "?" for c in str(picture)[-60:])


def read_seed(path: str | Path) -> np.ndarray:
    """The pose [17, 3] float64 of a file in the seed's layout, {"nose": [row, col], ...} on a 512 canvas.

    float64, because the seed's cell ids are floors of these numbers: 175.99999999999997 must not become 176, and
    dividing by 512 is exact. (Datasets hold float32, so in training such a joint may fall one cell further.)
    """
    (person,) = _seed(read_json(path), f"{path}: ")
    return _place(person, pixels=True)


def read_coco(path: str | Path, content: object = None) -> tuple[dict[str, list[np.ndarray]], dict[str, str]]:
    """COCO person keypoints: file name -> poses [17, 3] float64, normalised by that image's width and height; and
    file name -> reason, of the images with a person that cannot be used.

    Crowd regions and persons without any labelled joint are left out (an image may keep an empty list).
    """
    where = f"{path}: "
    data = content or read_json(path, limit=None)               # a whole dataset: COCO's own file has 238 MB
    images, orders, refused = _coco_images(data, where), _coco_orders(data, where), {}
    poses: dict[str, list] = {name: [] for name, _ in images.values()}
    place = {image["file_name"]: at for at, image in _objects(data["images"], _at(where, "images"))}
    for at, told, (name, size) in _coco_people(data, images, where):
        try:
            if size is None:
                raise _refused(place[name], "has no width and height; a dataset needs them")
            pose = _place(_coco_person(at, told, (name, size), orders), pixels=True)
        except PoseError as error:
            refused.setdefault(name, str(error))
            continue
        if pose[:, 2].any():
            poses[name].append(pose)
    return poses, refused


def fitted(found: Poses, i: int, fit_how: str) -> np.ndarray:
    """The i-th pose on the square picture."""
    return fit(found.poses[i], found.sizes[i] or (1, 1), fit_how)       # nothing said, nothing to correct


def name_of(picture: str, of: list, path: str | Path) -> str:
    """The file's, and where it has several pictures that of this one of them."""
    return Path(path).stem + (f" {picture}" if len(of) > 1 else "")
