"""Poses: 17 body joints in and out of files, and the two doors by which they enter the UNet.

A pose is a float array [17, 3] = (x, y, visible): x right, y down, normalised to the image, so that [0, 1] is
inside; values outside are kept, not clamped; visible is 0 or 1 and a missing joint is (0, 0, 0). "Left" is the
person's own left. Door 1 is cross-attention: `PoseEncoder` turns a pose into 17 context tokens. Door 2 is
concatenation: `heatmaps` turns it into 17 Gaussian maps beside the noisy latent. `PoseCondition` holds both.
`PoseDensity` tells how usual a pose is among those that a model was trained on.

Letters in shape comments: B batch, J = 17 joints, D token width, h, w height and width of a map.
"""
from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

JOINTS = ("nose", "eye_left", "eye_right", "ear_left", "ear_right", "shoulder_left", "shoulder_right",
          "elbow_left", "elbow_right", "wrist_left", "wrist_right", "hip_left", "hip_right",
          "knee_left", "knee_right", "ankle_left", "ankle_right")
MIRROR = [JOINTS.index(name.replace("left", "LEFT").replace("right", "left").replace("LEFT", "right"))
          for name in JOINTS]                               # MIRROR[j] is the joint that j becomes in a mirror
LIMBS = ((0, 1), (0, 2), (1, 3), (2, 4), (5, 6), (5, 7), (7, 9), (6, 8), (8, 10),
         (5, 11), (6, 12), (11, 12), (11, 13), (13, 15), (12, 14), (14, 16))
# How far annotators scatter around each joint, as a fraction of the person's size: COCO's published constants
# (cocoapi, pycocotools/cocoeval.py), the kappa of OKS.
SIGMAS = np.array([.26, .25, .25, .35, .35, .79, .79, .72, .72, .62, .62, 1.07, 1.07, .87, .87, .89, .89]) / 10
SEED_CANVAS = 512                                           # the seed's files are [row, col] on 512 x 512
LEFT_COLOR, RIGHT_COLOR, MIDDLE_COLOR = (255, 138, 60), (64, 150, 255), (120, 210, 120)


class PoseError(ValueError):
    """A pose file that cannot be used; the message names the file, the place and what to do."""


class NobodyFound(PoseError):
    """A pose file in order, but of a picture in which there is nobody."""


# ---------------------------------------------------------------------------------------------- reading files
#
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


def read_coco(path: str | Path) -> tuple[dict[str, list[np.ndarray]], dict[str, str]]:
    """COCO person keypoints: file name -> poses [17, 3] float64, normalised by that image's width and height; and
    file name -> reason, of the images with a person that cannot be used.

    Crowd regions and persons without any labelled joint are left out (an image may keep an empty list).
    """
    data, where = read_json(path, limit=None), f"{path}: "      # a whole dataset: COCO's own file has 238 MB
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


# ----------------------------------------------------------------------------------------- moving and drawing

def flip(pose: np.ndarray | Tensor) -> np.ndarray | Tensor:
    """The pose [..., 17, 3] of the mirrored picture: x -> 1 - x, and left and right change names."""
    out = pose[..., MIRROR, :]                                                          # a copy, not a view
    out[..., 0] = (1 - out[..., 0]) * out[..., 2]                                       # missing stays (0, 0, 0)
    return out


def crop(pose: np.ndarray | Tensor, box: Sequence[float]) -> np.ndarray | Tensor:
    """The pose [..., 17, 3] seen from the part `box` = (x0, y0, x1, y1), in 0..1, of its picture."""
    x0, y0, x1, y1 = box
    out = pose + 0
    out[..., 0] = (out[..., 0] - x0) / (x1 - x0) * out[..., 2]
    out[..., 1] = (out[..., 1] - y0) / (y1 - y0) * out[..., 2]
    return out


def fit(pose: np.ndarray, size: tuple[float, float], how: str) -> np.ndarray:
    """The pose [17, 3] of a picture of this (width, height), on a square and undistorted.

    "letterbox" lays the whole picture into the square; "crop" cuts the square of the short side out of it, its middle
    as near to the person's as the picture allows, and joints beyond the cut are then outside 0..1.
    """
    span = {"letterbox": max, "crop": min}[how](size) / np.array(size)                  # of the square, in pictures
    start, seen = (1 - span) / 2, pose[pose[:, 2] > 0, :2]
    if how == "crop" and len(seen):
        start = np.clip((seen.min(axis=0) + seen.max(axis=0) - span) / 2, 0, 1 - span)
    return crop(pose, (*start, *(start + span)))


def side_colors() -> np.ndarray:
    """[17, 3] uint8: the person's left warm, the right cool, so that a swap of sides is seen at a glance."""
    return np.array([LEFT_COLOR if name.endswith("left") else RIGHT_COLOR if name.endswith("right") else MIDDLE_COLOR
                     for name in JOINTS], dtype=np.uint8)


def draw(pose: np.ndarray | Tensor, size: int, image: np.ndarray | None = None,
         colors: np.ndarray | None = None) -> np.ndarray:
    """The skeleton as a picture, uint8 [size, size, 3], on dark ground or over `image` (uint8 [H, W, 3]).

    Limbs are capsules drawn by distance to the segment, so they are smooth at 64 pixels and mirror exactly.
    """
    pose = np.asarray(pose, dtype=np.float64)
    colors = side_colors() if colors is None else colors
    if image is None:
        canvas = np.full((size, size, 3), (24.0, 26.0, 34.0))
    else:
        canvas = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC), dtype=np.float64)
    xy, seen = pose[:, :2] * size, pose[:, 2] > 0
    thick = max(size / 90, 0.7)                                                         # half width of a limb
    for layer, radius in ((LIMBS, thick), ([(j, j) for j in range(len(JOINTS))], 1.5 * thick)):
        # Within a layer colours mix by coverage, so that the order of the limbs (left before right) leaves no trace.
        paint, weight, bare = np.zeros((size, size, 3)), np.zeros((size, size, 1)), np.ones((size, size, 1))
        for a, b in layer:
            if seen[a] and seen[b]:
                window, alpha = _capsule(size, xy[a], xy[b], radius)
                paint[window] += alpha * (colors[a].astype(np.float64) + colors[b]) / 2
                weight[window] += alpha
                bare[window] *= 1 - alpha
        canvas = canvas * bare + paint / np.maximum(weight, 1e-9) * (1 - bare)
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8)


def _capsule(size: int, a: np.ndarray, b: np.ndarray, radius: float) -> tuple[tuple[slice, slice], np.ndarray]:
    """Where a capsule around the segment a-b (pixels) lies in a size x size picture: the window of rows and
    columns it touches and its coverage [h, w, 1] there, antialiased over one pixel."""
    x0, y0 = np.clip(np.floor(np.minimum(a, b) - radius - 1), 0, size).astype(int)
    x1, y1 = np.clip(np.ceil(np.maximum(a, b) + radius + 1), 0, size).astype(int)
    p = np.stack(np.meshgrid(np.arange(x0, x1) + 0.5, np.arange(y0, y1) + 0.5), axis=-1)        # pixel centres
    along = np.clip(((p - a) @ (b - a)) / max(float((b - a) @ (b - a)), 1e-9), 0, 1)[..., None]
    distance = np.linalg.norm(p - a - along * (b - a), axis=-1, keepdims=True)
    return (slice(y0, y1), slice(x0, x1)), np.clip(radius + 0.5 - distance, 0, 1)


# ------------------------------------------------------------------------------------------ the seed's tokens

def tokenize(pose: np.ndarray | Tensor, dim: int) -> Tensor:
    """Cell ids [..., 17] int64 of poses [..., 17, 3] on a dim x dim grid: col + row * dim, as in the seed.

    The seed floors onto the grid (x // (512 / dim)) except at dim 512, where it rounds to the pixel, half to
    even; coordinates outside are clamped into the border cells. A missing joint gets the id of its (0, 0).
    """
    xy = torch.as_tensor(pose)[..., :2] * SEED_CANVAS
    cell = xy.round() if dim == SEED_CANVAS else torch.div(xy, SEED_CANVAS / dim, rounding_mode="floor")
    col, row = cell.clamp(0, dim - 1).long().unbind(-1)
    return col + row * dim


def detokenize(ids: Tensor, dim: int) -> Tensor:
    """Cell centres [..., 2] = (x, y) in 0..1 of ids [...]; at dim 512 the cells are centred on whole pixels."""
    cell = torch.stack([ids % dim, ids // dim], dim=-1).double()
    return cell / dim if dim == SEED_CANVAS else (cell + 0.5) / dim


def seed_context(poses: np.ndarray | Tensor, dim: int = 32) -> Tensor:
    """The seed's condition, float32 [B, 1, 17]: one token made of 17 raw ids, the row taken for x.

    Its code reads kps[name][0], which is the row, as x, so an id is row + col * dim. Published checkpoints were
    trained that way. One token means softmax over one key: the same vector is added at every pixel.
    """
    poses = torch.as_tensor(poses)
    return tokenize(poses[..., [1, 0, 2]], dim).float()[:, None, :]                     # [B, 1, J]


# -------------------------------------------------------------------------------------- the two doors, learned

class PoseEncoder(nn.Module):
    """Pose [B, 17, 3] -> context [B, 17, D]: one token a joint, joint embedding + position.

    The position enters as Fourier features (sin and cos of 2^k pi x, k < n_freqs), which keep a hundredth of the
    picture apart. A missing joint has a learned vector in place of its position; where `drop` is true the whole
    pose is replaced by 17 learned null tokens (classifier-free guidance, arXiv:2207.12598).
    """

    def __init__(self, dim: int, n_freqs: int = 8):
        super().__init__()
        self.register_buffer("freqs", math.pi * 2.0 ** torch.arange(n_freqs), persistent=False)
        self.joint = nn.Parameter(torch.randn(len(JOINTS), dim))
        self.missing = nn.Parameter(torch.randn(dim))
        self.null = nn.Parameter(torch.randn(len(JOINTS), dim))
        self.position = nn.Sequential(nn.Linear(4 * n_freqs, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, pose: Tensor, drop: Tensor | None = None) -> Tensor:
        # The slowest wave has period 2: where a joint is further out than half a picture, x and x + 2 would look alike.
        angle = pose[..., :2, None].clamp(-0.49, 1.49) * self.freqs                     # [B, J, 2, F]
        features = torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(2)             # [B, J, 4F]
        visible = pose[..., 2:] > 0
        tokens = self.joint + torch.where(visible, self.position(features), self.missing)       # [B, J, D]
        return tokens if drop is None else torch.where(drop[:, None, None], self.null, tokens)


def heatmaps(pose: Tensor, size: int | tuple[int, int], sigma: float = 0.04) -> Tensor:
    """17 Gaussian maps [B, 17, h, w] of poses [B, 17, 3]; sigma in units of the picture, a missing joint is 0.

    The value at a cell is that of the Gaussian at the cell's centre, so the joint's place within a cell is kept.
    """
    h, w = (size, size) if isinstance(size, int) else size
    xs = (torch.arange(w, device=pose.device, dtype=pose.dtype) + 0.5) / w
    ys = (torch.arange(h, device=pose.device, dtype=pose.dtype) + 0.5) / h
    gx = torch.exp(-((xs - pose[..., :1]) ** 2) / (2 * sigma ** 2))                     # [B, J, w]
    gy = torch.exp(-((ys - pose[..., 1:2]) ** 2) / (2 * sigma ** 2))                    # [B, J, h]
    return gy[..., :, None] * gx[..., None, :] * (pose[..., 2:, None] > 0)              # [B, J, h, w]


@dataclass(frozen=True)
class ConditionConfig:
    """By which doors the pose reaches the UNet. A wrong value is a ValueError."""

    doors: tuple[str, ...] = ("tokens", "maps")     # any of: tokens, maps; or ("seed",) alone, the faithful one
    dim: int = 64                                   # width D of a context token
    sigma: float = 0.04                             # of a Gaussian map, in pictures
    seed_dim: int = 32                              # cells a side of the seed's grid

    def __post_init__(self) -> None:
        object.__setattr__(self, "doors", tuple(self.doors))                            # JSON knows no tuples
        if min(self.dim, self.seed_dim) < 1 or not self.sigma > 0:
            raise ValueError(f"condition dim is {self.dim}, seed_dim {self.seed_dim}, sigma {self.sigma}; dims must be "
                             "at least 1, and sigma above 0")
        if self.doors != ("seed",) and (not self.doors or not set(self.doors) <= {"tokens", "maps"}):
            raise ValueError(f"condition doors {self.doors}: the pose would reach nothing; "
                             'allowed are "tokens", "maps", both, or "seed" alone')

    @property
    def context_dim(self) -> int | None:
        """Width of the context the UNet sees, None where nothing comes by cross-attention."""
        return len(JOINTS) if self.doors == ("seed",) else self.dim if "tokens" in self.doors else None

    @property
    def map_channels(self) -> int:
        """Channels beside the noisy latent."""
        return len(JOINTS) if "maps" in self.doors else 0


class PoseCondition(nn.Module):
    """Pose [B, 17, 3] -> (context [B, N, D] or None, maps [B, 17, h, w] or None): what the UNet is given."""

    def __init__(self, config: ConditionConfig):
        super().__init__()
        self.config = config
        self.encoder = PoseEncoder(config.dim) if "tokens" in config.doors else None

    def forward(self, pose: Tensor, size: tuple[int, int],
                drop: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        """`size` is that of the latent, `drop` [B] bool marks the samples that get the null condition."""
        c, context, maps = self.config, None, None
        if c.doors == ("seed",):
            context = seed_context(pose, c.seed_dim)
            if drop is not None:                                                        # all zeros: no pose
                context = context * ~drop[:, None, None]
        if self.encoder is not None:
            context = self.encoder(pose.float(), drop)
        if "maps" in c.doors:
            maps = heatmaps(pose.float(), size, c.sigma)
            if drop is not None:
                maps = maps * ~drop[:, None, None, None]
        return context, maps


# ------------------------------------------------------------------------------------------------ measuring

def _box(pose: np.ndarray) -> tuple[float, float]:
    """Width and height of the box around the visible joints of one pose [17, 3]."""
    xy = pose[pose[:, 2] > 0, :2]
    return tuple(np.ptp(xy, axis=0)) if len(xy) else (0.0, 0.0)


def on_canvas(pose: np.ndarray | Tensor) -> np.ndarray | Tensor:
    """bool [..., 17] of poses [..., 17, 3]: visible and inside the picture, so that somebody can find it there."""
    return (pose[..., 2] > 0) & (pose[..., :2] >= 0).all(-1) & (pose[..., :2] <= 1).all(-1)


def pck(predicted: np.ndarray, true: np.ndarray, fraction: float = 0.1,
        counted: np.ndarray | None = None) -> np.ndarray:
    """Per-joint share of correct keypoints, [17]: within `fraction` of the true person's box diagonal.

    Both are [B, 17, 3]; the joints `counted`, bool [B, 17], count (None: those visible in `true`), a joint not visible
    in `predicted` is wrong, and a joint that never counts gives NaN. A person of one joint has no size to measure by
    and does not count. Percentage of correct keypoints after Yang and Ramanan (2013), box normalised.
    """
    diagonal = np.array([np.hypot(*_box(p)) for p in true])[:, None]
    distance = np.linalg.norm(predicted[..., :2] - true[..., :2], axis=-1)              # [B, J]
    right = (distance <= fraction * diagonal) & (predicted[..., 2] > 0)
    counted = (true[..., 2] > 0 if counted is None else counted) & (diagonal > 0)
    with np.errstate(invalid="ignore"):
        return (right & counted).sum(0) / np.where(counted.sum(0), counted.sum(0), np.nan)


def oks(predicted: np.ndarray, true: np.ndarray, counted: np.ndarray | None = None) -> np.ndarray:
    """Object keypoint similarity [B] of poses [B, 17, 3]: mean of exp(-d^2 / (2 s^2 k^2)) over the joints `counted`
    (as in pck), k = 2 SIGMAS and s^2 the area of the box around the joints (cocodataset.org/#keypoints-eval); NaN where
    none counts or that box has no area."""
    out = np.full(len(true), np.nan)
    for b, (p, t) in enumerate(zip(predicted, true, strict=True)):
        seen = t[:, 2] > 0 if counted is None else counted[b]
        area = float(np.prod(_box(t)))
        if seen.any() and area > 0:
            d2 = ((p[:, :2] - t[:, :2]) ** 2).sum(-1)
            similarity = np.exp(-d2 / (2 * area * (2 * SIGMAS) ** 2)) * (p[:, 2] > 0)
            out[b] = similarity[seen].mean()
    return out


# ------------------------------------------------------------------------------------------- how common a pose is
#
# Two poses are compared by the joints that both have, each time moved and scaled so that these joints have their centre
# at 0 and centroid size 1, which is their RMS distance to the centre (Kendall 1984). Nothing is turned: lying is not
# standing. The centre and size of a whole pose would not do: the nearest to half a person would be those who crouch.

NEIGHBOURS = 8                  # the last of them tells the density: fewer follow chance, more hide what is rare
ONE_SIDED = 0.7                 # body sizes that a joint of only one pose counts; two random figures are 0.7 apart
POINT = 0.01                    # body sizes; joints nearer together are a point without shape, annotators scatter more
SHIFTS = 5                      # steps of mean shift; measured, further ones change nothing
TINY = 1e-9                     # instead of a size of 0, where it divides
ROWS = 64                       # poses compared with all others at a time: what a core's cache holds


def _shapes(poses: np.ndarray) -> np.ndarray:
    """Poses [..., 17, 3] with the centre of their visible joints at 0 and centroid size 1; missing joints are zeros."""
    seen = (poses[..., 2:] > 0).astype(np.float64)
    centre, size = _frame(poses, seen)
    return np.concatenate([(poses[..., :2] - centre) / np.maximum(size, TINY) * seen, seen], axis=-1)


def _frame(poses: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centre [..., 1, 2] and centroid size [..., 1, 1] of the joints that are `seen`, 0 or 1 [..., 17, 1]."""
    count = np.maximum(seen.sum(axis=-2, keepdims=True), 1)
    centre = (poses[..., :2] * seen).sum(axis=-2, keepdims=True) / count
    square = (((poses[..., :2] - centre) * seen) ** 2).sum(axis=(-2, -1), keepdims=True) / count
    return centre, np.sqrt(square)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Distances [A, B], in body sizes, of the shapes [A, 17, 3] and [B, 17, 3]: all pairs by products of matrices."""
    seen_a, seen_b, xy_a, xy_b = a[..., 2], b[..., 2], a[..., :2], b[..., :2]
    shared, joints = seen_a @ seen_b.T, seen_a.sum(-1)[:, None] + seen_b.sum(-1)        # in both; of both [A, B]
    # Over the shared joints: sums of coordinates, then squares and products about the centre.
    ax, ay = (xy_a[..., i] @ seen_b.T for i in (0, 1))
    bx, by = (seen_a @ xy_b[..., i].T for i in (0, 1))
    per = 1 / shared.clamp(min=1)
    square_a = (xy_a.square().sum(-1) @ seen_b.T - (ax * ax + ay * ay) * per).clamp_(min=0) + POINT ** 2
    square_b = (seen_a @ xy_b.square().sum(-1).T - (bx * bx + by * by) * per).clamp_(min=0) + POINT ** 2
    product = xy_a.flatten(1) @ xy_b.flatten(1).T - (ax * bx + ay * by) * per + POINT ** 2
    alike = product * (square_a * square_b).rsqrt_()                                    # 1: the same, -1: upside down
    one_sided = joints - 2 * shared
    squares = 2 * shared * (1 - alike) + ONE_SIDED ** 2 * one_sided
    return (squares.clamp_(min=0) / (shared + one_sided).clamp_(min=1)).sqrt_()


class PoseDensity:
    """Where poses lie densely, by the distance to the k-th nearest: how usual is one, which are the most common?

    Each pose counts with its mirror image, as in training. All distances are in body sizes. For N = 4096 it takes a
    second of one core.
    """

    def __init__(
        self,
        poses: np.ndarray,              # [N, 17, 3] (x, y, visible); those without a visible joint are left out
        k: int = NEIGHBOURS,            # at most, where there are fewer poses
    ):
        poses = np.asarray(poses, dtype=np.float64)
        if poses.shape[1:] != (len(JOINTS), 3) or not np.isfinite(poses).all() or not (poses[..., 2] > 0).any():
            raise ValueError(f"poses {list(poses.shape)} have no density: [N, 17, 3] finite numbers with a visible "
                             "joint are needed")
        self.poses = poses[(poses[..., 2] > 0).any(axis=1)]
        n = len(self.poses)
        self.k = max(1, min(k, 2 * (n - 1)))
        self.shapes = _shapes(np.concatenate([self.poses, flip(self.poses)]))           # [2N, J, 3]
        self._fast = torch.from_numpy(self.shapes).float()
        self.own = np.zeros(n)          # [N] the distance of each, to the others and their mirror images
        for i in range(0, n if n > 1 else 0, ROWS):
            d = _distances(self._fast[i:min(i + ROWS, n)], self._fast)
            row = torch.arange(len(d))
            d[row, i + row] = d[row, n + i + row] = torch.inf
            self.own[i:i + len(d)] = d.topk(self.k, largest=False).values[:, -1].numpy()

    def _nearest(self, poses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Distances [B, k], ascending, of poses [B, 17, 3] to their neighbours, and these as rows of `shapes`."""
        near = [_distances(some, self._fast).topk(self.k, largest=False)
                for some in torch.from_numpy(_shapes(poses)).float().split(ROWS)]
        return torch.cat([n.values for n in near]).double().numpy(), torch.cat([n.indices for n in near]).numpy()

    def distance(self, poses: np.ndarray) -> np.ndarray:
        """[B] to the k-th nearest training pose, of poses [B, 17, 3]."""
        return self._nearest(poses)[0][:, -1]

    def unusual(self, poses: np.ndarray) -> np.ndarray:
        """[B] in 0..1: the share of the training poses that have their neighbours nearer than poses [B, 17, 3] do."""
        return np.searchsorted(np.sort(self.own), self.distance(poses)) / len(self.own)

    def common(self, n: int) -> np.ndarray:
        """The rows [n] of `poses` that are the most common kinds of pose, the densest first.

        Density peaks (Rodriguez and Laio 2014): where the next denser pose is many times as far as the neighbours are.
        A pose and its mirror image are one kind. ValueError where there are fewer than n poses.
        """
        count = len(self.poses)
        if not 1 <= n <= count:
            raise ValueError(f"{n} common poses are asked for; the model knows 1 to {count}")
        order = np.argsort(self.own, kind="stable")                                     # the densest first
        ranked = self._fast.unflatten(0, (2, count))[:, order]                          # [2, N, J, 3]
        away = np.zeros(count)          # from the nearest denser pose or its mirror image
        for i in range(0, count, ROWS):
            end = min(i + ROWS, count)
            d = _distances(ranked[0, i:end], ranked[:, :end].flatten(0, 1)).unflatten(1, (2, end)).amin(dim=1)
            not_denser = torch.arange(end) >= torch.arange(i, end)[:, None]
            away[i:end] = d.masked_fill_(not_denser, torch.inf).amin(dim=1).numpy()
        away[0] = np.inf                                                                # the densest of all is a peak
        peaks = np.argsort(-away / np.maximum(self.own[order], POINT), kind="stable")[:n]
        return order[np.sort(peaks)]

    def typical(self, poses: np.ndarray, amount: float) -> np.ndarray:
        """Poses [B, 17, 3] pulled toward their neighbourhood: `amount` 0 leaves them as they are, 1 is its middle.

        The middle is found by mean shift (Fukunaga and Hostetler 1975) among the k nearest. Centre and size of each
        pose, and which joints are visible, stay; a joint that no neighbour has keeps its place beside the others.
        """
        if not 0 <= amount <= 1:
            raise ValueError(f"amount is {amount}; it must be between 0 and 1")
        return np.stack([self._pulled(pose, amount) for pose in poses])

    def _pulled(self, pose: np.ndarray, amount: float) -> np.ndarray:
        if amount == 0:
            return pose.copy()
        given = middle = _shapes(pose)
        for _ in range(SHIFTS):
            middle = self._shifted(middle)
        between = given + amount * (middle - given)
        centre, size = _frame(pose, given[:, 2:])
        xy = _shapes(between)[:, :2] * size + centre            # shapes anew: the mean of two is smaller than they are
        return np.concatenate([xy * given[:, 2:], pose[:, 2:]], axis=1)

    def _shifted(self, shape: np.ndarray) -> np.ndarray:
        """One step of mean shift: the mean of the neighbours, each laid onto `shape` [17, 3] by their shared joints."""
        (d,), (rows,) = self._nearest(shape[None])
        near = self.shapes[rows]
        shared = near[..., 2:] * shape[:, 2:]                                           # [k, J, 1]
        (centre, size), (centre_here, size_here) = _frame(near, shared), _frame(shape, shared)
        laid = (near[..., :2] - centre) / np.maximum(size, TINY) * size_here + centre_here
        weight = shared * np.exp(-(d / max(d[-1], POINT)) ** 2 / 2)[:, None, None]
        total = weight.sum(axis=0)
        mean = np.where(total > 0, (weight * laid).sum(axis=0) / np.where(total > 0, total, 1), shape[:, :2])
        return _shapes(np.concatenate([mean, shape[:, 2:]], axis=1))
