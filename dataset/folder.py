"""A dataset on disk: a path in, its image files and their labels out.

A label is the path of a keypoint file that formats/pose_files.py reads, or a pose [17, 3] from a
COCO json. No image is opened, but for its size where a COCO json has none.
"""

import csv
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple
from unicodedata import normalize

import numpy as np

import keypoints
from dataset.images import SUFFIXES, DataError, upright_size
from formats import pose_files

PARTS = "train", "valid", "val", "test"         # folders of Roboflow's exports
SHORT_FILE = 300                                # bytes; a json file with a person is longer
STUDIO = ".studio"                              # beside keypoints/, where studio/ was used
# What studio/ writes first into a keypoint file; of other tools' files every one is done.
STATE = re.compile(rb'\{"state": "(\w+)", "confidence": ([\d.]+),')
# Columns of metadata.csv; the first that is there counts.
FILE_COLUMNS = ("file", "file_name", "filename", "image", "image_name", "path", "name")
GROUP_COLUMNS = ("group", "animation", "clip", "video")
LABEL_COLUMN = "label"                          # read without being asked for


class Labelled(NamedTuple):
    """An image file, its label or None, and why it has none; "" where nobody is in the image."""
    path: str
    label: str | np.ndarray | None
    why: str = ""
    size: tuple[float, float] | None = None     # (width, height) of the image, as a COCO json says


def find(root: Path, poseless: bool) -> tuple[Path, list[Labelled]]:
    """(the folder that names of images are relative to, the images) of what PoseFolder takes."""
    names_in.cache_clear()                      # files may have come since the last call
    if not root.exists():
        raise DataError(f"{root}: there is no such file or folder")
    if root.is_file() and root.suffix.lower() == ".json":
        return read_coco(root, pose_files.read_content(root))
    if root.is_file():
        return root.parent, list(pair(read_list(root)))
    if (root / "keypoints").is_dir():
        return root, completed(list(pair(find_images(images_of(root)))), root)
    if coco := find_coco(root):
        parts = [read_coco(*each) for each in coco]
        return parts[0] if len(parts) == 1 else (root, merge(parts))
    if (root / "labels").is_dir():
        return root, list(pair(find_images(root / "images")))
    if poseless or has_labels_beside(root):
        return root, list(pair(find_images(root)))
    if parts := [str(root / name) for name in PARTS
                 if (root / name).is_dir() and has_keypoints(root / name)]:
        raise DataError(f"{root}: not a dataset; give {' or '.join(parts)}")
    raise DataError(f"{root}: there are no keypoints; label the images with python -m studio "
                    f"{root}, or put poses into {root}/keypoints (YOLO's into {root}/labels), or "
                    f"one COCO json with images and annotations into {root}")


def images_of(root: Path) -> Path:
    """The folder of a dataset's images: images/ in it, or itself."""
    return root / "images" if (root / "images").is_dir() else root


def completed(found: list[Labelled], root: Path) -> list[Labelled]:
    """The images of keypoints/; those without a file there get their label of a COCO json, as where
    studio/ has changed some labels of a COCO dataset."""
    without = {i for i, one in enumerate(found) if one.label is None
               and not os.path.isfile(keypoint_file(one.path) or "")}
    told = {os.path.normpath(one.path): one for coco in (find_coco(root) if without else ())
            for one in read_coco(*coco)[1]}
    return [told.get(os.path.normpath(one.path), one) if i in without else one
            for i, one in enumerate(found)]


# --------------------------------------------------------------------------------- names of files

def on_disk(folder: str | Path, name: str) -> str:
    """The path of a file that is named with \\ for /, or with its accents encoded in the other of
    Unicode's two forms (macOS: e and an accent are two characters). As it is, if there is none."""
    path = os.path.join(folder, name)
    return path if os.path.exists(path) else _on_disk(os.path.join(folder, name.replace("\\", "/")))


def _on_disk(path: str) -> str:
    head, name = os.path.split(path)
    if not name or os.path.exists(path):
        return path
    head = _on_disk(head)
    return os.path.join(head, names_in(head).get(normalize("NFC", name), name))


@lru_cache(maxsize=1000)
def names_in(folder: str) -> dict[str, str]:
    """{composed form: name} of all that is in a folder."""
    names = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
    return {normalize("NFC", name): name for name in names}


# ------------------------------------------------------------------------ a keypoint file an image

def find_images(folder: Path) -> list[str]:
    """The image files in a folder and below it, by name. Links to folders are followed, but no
    folder is taken twice, and none that contains this one."""
    tops, seen, found, own = [str(folder)], set(), [], Path(os.path.realpath(folder))
    for top in tops:                                    # grows by the links found
        for at, below, names in os.walk(top):           # which os.walk itself does not follow
            real = os.path.realpath(at)
            if real in seen or seen and own.is_relative_to(real):
                below.clear()
                continue
            seen.add(real)
            tops += filter(os.path.islink, (os.path.join(at, name) for name in sorted(below)))
            found += [os.path.join(at, name) for name in names if not name.startswith(".")
                      and os.path.splitext(name)[1].lower() in SUFFIXES]
    if not found:
        raise DataError(f"{folder}: no images in it ({' '.join(sorted(SUFFIXES))})")
    return sorted(found)


def read_list(path: Path) -> list[str]:
    """The images that a text file lists, relative to it. A line that starts with # is a comment,
    unless it names a file."""
    raw = path.read_bytes()
    try:
        lines = raw.decode(json.detect_encoding(raw)).splitlines()  # a Windows shell writes UTF-16
    except UnicodeDecodeError:
        raise DataError(f"{path}: not a text file in UTF-8 or UTF-16; give a folder, a list of "
                        "images or a COCO json") from None
    files = [(line, on_disk(path.parent, line)) for line in map(str.strip, lines) if line]
    files = [(line, file) for line, file in files
             if not line.startswith("#") or os.path.isfile(file)]
    if files and not any(os.path.isfile(file) for _, file in files):
        raise DataError(f"{path}: '{files[0][0]}' is not the name of a file, nor is any other "
                        "line; give a folder, a list of images or a COCO json")
    for line, _ in files:
        if not os.path.isabs(line) and leaves(line):
            raise DataError(f"{path}: '{line}' leads out of the list's folder; write it whole")
    return [file for _, file in files]


def pair(images: list[str]) -> Iterator[Labelled]:
    """Each image with its keypoint file."""
    for image in images:
        label = keypoint_file(image)
        if label is None:
            yield Labelled(image, None, "not below a folder called images, so it has no keypoint "
                           "file")
        elif os.path.isfile(label):
            yield Labelled(image, None if has_nobody(label) else label)
        elif label.endswith(".txt") or os.path.isdir(os.path.join(base_of(image)[0], STUDIO)):
            yield Labelled(image, None)             # YOLO writes no file where nobody is; to do
        else:
            yield Labelled(image, None, f"its keypoints {label} are missing")


def base_of(image: str) -> tuple[str, str] | None:
    """(a, b/c) of a/images/b/c.png, by the last folder called images; also of a/b/c.png, where a
    has keypoints/, the nearest such folder. None for an image that neither is true of."""
    *folders, name = Path(image).parts
    for i in range(len(folders), -1, -1):
        rest = os.path.join(*folders[i:], os.path.splitext(name)[0])
        if i and folders[i - 1] == "images":
            return os.path.join("", *folders[:i - 1]), rest
        if os.path.isdir(os.path.join("", *folders[:i], "keypoints")):
            return os.path.join("", *folders[:i]), rest
    return None


def keypoint_file(image: str) -> str | None:
    """Of a/images/b/c.png a/keypoints/b/c.json; where it does not exist, OpenPose's
    c_keypoints.json, then YOLO's a/labels/b/c.txt, if there is a/labels. See base_of."""
    found = base_of(image)
    if found is None:
        return None
    base, rest = found
    plain = on_disk("", os.path.join(base, "keypoints", rest + ".json"))
    openpose = plain if os.path.isfile(plain) else on_disk(
        "", os.path.join(base, "keypoints", rest + "_keypoints.json"))
    if os.path.isfile(openpose):
        return openpose
    yolo = os.path.isdir(os.path.join(base, "labels"))
    return on_disk("", os.path.join(base, "labels", rest + ".txt")) if yolo else plain


def has_labels_beside(root: Path) -> bool:
    """Whether `root` is YOLO's images/train, or another part of images/, and has labels."""
    label = keypoint_file(str(root / "image"))
    return label is not None and os.path.isdir(os.path.dirname(label))


def state_of(label: str) -> tuple[str, float]:
    """The state of a keypoint file and the confidence of a proposal: "proposed" by a detector, or
    "corrected" or "todo", which nobody has accepted yet; else ("done", 1)."""
    with open(label, "rb") as file:
        found = STATE.match(file.read(100))
    return (found[1].decode(), float(found[2])) if found else ("done", 1.0)


def has_nobody(label: str) -> bool:
    """Whether a keypoint file says that nobody is in its image, or is not accepted yet. Long json
    files are not parsed."""
    if label.endswith(".json") and os.path.getsize(label) > SHORT_FILE:
        return state_of(label)[0] != "done"
    try:
        pose_files.load_poses(label, canvas=(1, 1))
    except pose_files.NobodyFound:
        return True
    except keypoints.PoseError:                     # reading it says why
        pass
    return False


# ------------------------------------------------------------------------ a COCO json for many

def find_coco(root: Path) -> list[tuple[Path, dict]]:
    """The COCO json files of a folder and their content. A json is COCO if it has images and
    annotations. Where a file is called person_keypoints*.json, as COCO's own, no other counts."""
    files = sorted(path for at in (root, root / "annotations", root / "coco")
                   for path in at.glob("*.json"))
    files = [path for path in files if "person_keypoints" in path.name] or files
    found = []
    for path in files:
        text = path.read_bytes()
        if b'"images"' in text and b'"annotations"' in text:        # else it need not be parsed
            content = pose_files.read_content(path)
            if isinstance(content, dict) and {"images", "annotations"} <= content.keys():
                found.append((path, content))
    return found


def has_keypoints(root: str | Path) -> bool:
    """Whether `root` is a dataset with poses, not a folder of nothing but images."""
    root = Path(root)
    return (not root.is_dir() or (root / "keypoints").is_dir() or (root / "labels").is_dir()
            or has_labels_beside(root) or bool(find_coco(root)))


def read_coco(path: Path, content: object) -> tuple[Path, list[Labelled]]:
    """Each image of a COCO json with its largest person; see `find`. The images are in one of the
    usual places near the json."""
    part = path.stem.split("_")[-1]                     # person_keypoints_val2017.json: val2017/
    folders = [at / sub for at in (path.parent, path.parent.parent)
               for sub in ("images", part, f"images/{part}", "data", ".")]

    def size_of(name: str) -> tuple[int, int] | None:
        found = [] if leaves(name) else [on_disk(at, name) for at in folders]
        try:
            return next((upright_size(file) for file in found if os.path.isfile(file)), None)
        except DataError as error:                      # one broken image
            raise keypoints.PoseError(str(error)) from error

    people, refused, sizes = pose_files.read_coco(path, content, size_of)
    for name in filter(leaves, people):
        raise DataError(f"{path}: file_name '{name}' leads out of the dataset; use plain names")
    folder = next((at for at in folders
                   if any(os.path.isfile(on_disk(at, name)) for name in people)), None)
    if folder is None:
        raise DataError(f"{path}: none of its images, such as '{next(iter(people), '')}', is in "
                        f"{folders[0]} or beside it; put them there")
    return folder.parent if folder.name == "images" else folder, [
        Labelled(on_disk(folder, name),
                 None if name in refused else pose_files.largest(people[name]),
                 refused.get(name, ""), sizes[name]) for name in sorted(people)]


def leaves(name: str) -> bool:
    """Whether a file name is absolute or climbs, on any system."""
    return (PurePosixPath(name).is_absolute() or bool(PureWindowsPath(name).anchor)
            or ".." in re.split(r"[/\\]", name))


def merge(parts: list[tuple[Path, list[Labelled]]]) -> list[Labelled]:
    """The images of several COCO json files; an image in two of them has the largest person."""
    images: dict[str, Labelled] = {}
    for one in (one for _, part in parts for one in part):
        other = images.get(one.path)
        if other is None or other.label is None:
            images[one.path] = one
        elif one.label is not None and pose_files.largest([other.label, one.label]) is one.label:
            images[one.path] = one
    return [images[path] for path in sorted(images)]


# ----------------------------------------------------------------- metadata.csv: groups and labels

class Table(NamedTuple):
    """metadata.csv: what it says of image i, a value for each column."""
    columns: list[str]
    rows: dict[int, dict[str, str]]         # of the images that have a row
    matched: str                            # one sentence with counts


def read_table(root: Path, names: list[str]) -> Table | None:
    """The metadata.csv of a dataset, whose columns commas, semicolons or tabs separate."""
    path = next((path for path in (root / "metadata.csv", root / "images/metadata.csv")
                 if path.is_file()), None)
    if path is None:
        return None
    raw = path.read_bytes()
    try:
        text = raw.decode(json.detect_encoding(raw))
    except UnicodeDecodeError:
        text = raw.decode("latin-1")            # what Excel writes, unless it is asked for UTF-8
    try:
        lines = [line for line in text.splitlines() if line.strip()]
        separator = max(",;\t", key=lines[0].count) if lines else ","
        columns, *rows = list(csv.reader(lines, delimiter=separator)) or [[]]
    except csv.Error as error:
        raise DataError(f"{path}: not a csv table ({error}); fix or remove it") from error
    columns = [column.strip().lower() for column in columns]
    blank = dict.fromkeys(columns, "")
    rows = [blank | dict(zip(columns, map(str.strip, row), strict=False)) for row in rows]
    file = next((column for column in FILE_COLUMNS if column in columns), None)
    if file is None:
        return Table(columns, {}, f"metadata.csv is not used: it has the columns "
                                  f"{', '.join(columns)}, and none of {', '.join(FILE_COLUMNS)}")
    of = match_rows([row[file] for row in rows], names)
    return Table(columns, {i: rows[row] for i, row in of.items()},
                 f"{len(of)} of {len(rows)} rows of metadata.csv match an image, "
                 f"{len(names) - len(of)} of {len(names)} images have no row")


def match_rows(rows: list[str], names: list[str]) -> dict[int, int]:
    """{image: row} by file name: the longest common end of both paths that one image and one row
    alone have. Capitals, separators and the suffix of an image do not matter."""
    of_row: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        for end in ends_of(row):
            of_row.setdefault(end, []).append(i)
    count = Counter(end for name in names for end in ends_of(name))
    found = {}
    for i, name in enumerate(names):
        for end in ends_of(name):
            if count[end] == 1 and len(of_row.get(end, ())) == 1:
                found[i] = of_row[end][0]
                break
    return found


def ends_of(name: str) -> list[str]:
    """images\\A\\b.PNG -> images/a/b, a/b, b."""
    name = normalize("NFC", name).casefold().replace("\\", "/")
    stem, suffix = os.path.splitext(name)
    parts = [part for part in (stem if suffix in SUFFIXES else name).split("/")
             if part not in ("", ".")]
    return ["/".join(parts[i:]) for i in range(len(parts))]


def find_groups(names: list[str], table: Table | None) -> tuple[list[str], str]:
    """The clip of each image: the table's, else the name without its frame number; and what the
    table had to do with it, "" without one."""
    stems = [PurePosixPath(name.rpartition("images/")[2]).with_suffix("").as_posix()
             for name in names]
    groups = [re.sub(r"[-_ ./]*\d+$", "", stem) or stem for stem in stems]
    if table is None:
        return groups, ""
    column = next((column for column in GROUP_COLUMNS if column in table.columns), None)
    if table.rows and not column:
        return groups, (f"{table.matched}; it has no column for groups "
                        f"({', '.join(GROUP_COLUMNS)})")
    for i, row in table.rows.items():
        groups[i] = row[column] or groups[i]
    return groups, table.matched


def find_labels(root: Path, names: list[str], table: Table | None,
                by: str | None) -> tuple[str | None, list[str]]:
    """(what labels the images, the label of each or "") by --labels: "folders", a column, "off", or
    None for the column label where there is one. DataError where what was asked for labels no
    image."""
    column, found, why = (by or LABEL_COLUMN).strip().lower(), {}, ""
    if by == "folders":
        parts = [name.rpartition("images/")[2].split("/") for name in names]
        found = {i: first for i, (first, *rest) in enumerate(parts) if rest}
        why = f"all {len(names)} images lie directly in it, not in sub-folders of images/"
    elif by != "off" and table and column in table.columns:
        found = {i: row[column] for i, row in table.rows.items() if row[column]}
        why = f"{table.matched}, and no row that matches has a {column}"
    elif by not in (None, "off"):
        why = (f"metadata.csv has the columns {', '.join(table.columns)}" if table else
               "there is no metadata.csv")
    if why and not found:
        if by:
            raise DataError(f"{root}: --labels {by} labels no image: {why}; name another column, "
                            "or folders, or leave --labels out")
        print(f"warning: {root}: no image gets a label: {why}", file=sys.stderr)
    return (column if found else None,
            [normalize("NFC", found.get(i, "")) for i in range(len(names))])
