"""A dataset on disk: a path in, its image files and their labels out. No image is opened.

A label is the path of a keypoint file that formats/pose_files.py reads, or a pose [17, 3] from a
COCO json.
"""

import csv
import json
import os
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath, PureWindowsPath
from unicodedata import normalize

import numpy as np

import keypoints
from data import SUFFIXES, DataError
from formats import pose_files

PARTS = "train", "valid", "val", "test"         # folders of Roboflow's exports
SHORT_FILE = 300                                # bytes; a json file with a person is longer

# An image file, its label or None, and why it has none; "" where nobody is in the image.
Labelled = tuple[str, str | np.ndarray | None, str]


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
        return root, list(pair(find_images(root / "images")))
    if coco := find_coco(root):
        return read_coco(*coco)
    if (root / "labels").is_dir():
        return root, list(pair(find_images(root / "images")))
    if has_labels_beside(root):
        return root, list(pair(find_images(root)))
    if poseless:
        return root, list(pair(find_images(root)))
    if parts := [str(root / name) for name in PARTS
                 if (root / name).is_dir() and has_keypoints(root / name)]:
        raise DataError(f"{root}: not a dataset but a folder of {len(parts)}; give "
                        f"{' or '.join(parts)}")
    raise DataError(f"{root}: no keypoints in it; put images into {root}/images and their poses "
                    f"into {root}/keypoints (or YOLO's into {root}/labels), or one COCO json into "
                    f"{root}")


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
    lines = [line.strip() for line in lines]
    files = [(line, on_disk(path.parent, line)) for line in lines if line]
    return [file for line, file in files if not line.startswith("#") or os.path.isfile(file)]


def pair(images: list[str]) -> Iterator[Labelled]:
    """Each image with its keypoint file."""
    for image in images:
        label = keypoint_file(image)
        if label is None:
            yield image, None, "not below a folder called images, so it has no keypoint file"
        elif os.path.isfile(label):
            yield image, None if has_nobody(label) else label, ""
        elif label.endswith(".txt"):                # YOLO writes no file where nobody is
            yield image, None, ""
        else:
            yield image, None, f"its keypoints {label} are missing"


def keypoint_file(image: str) -> str | None:
    """Of a/images/b/c.png a/keypoints/b/c.json, by the last folder called images; or OpenPose's
    c_keypoints.json, where it exists; or YOLO's a/labels/b/c.txt, where a/keypoints does not."""
    *folders, name = Path(image).parts
    if "images" not in folders:
        return None
    i, stem = len(folders) - 1 - folders[::-1].index("images"), os.path.splitext(name)[0]
    root = os.path.join("", *folders[:i])
    yolo = (os.path.isdir(os.path.join(root, "labels"))
            and not os.path.isdir(os.path.join(root, "keypoints")))
    start = os.path.join(root, "labels" if yolo else "keypoints", *folders[i + 1:], stem)
    if yolo:
        return on_disk("", start + ".txt")
    openpose = on_disk("", start + "_keypoints.json")
    return openpose if os.path.isfile(openpose) else on_disk("", start + ".json")


def has_labels_beside(root: Path) -> bool:
    """Whether `root` is YOLO's images/train, or another part of images/, and has labels."""
    label = keypoint_file(str(root / "image"))
    return label is not None and os.path.isdir(os.path.dirname(label))


def has_nobody(label: str) -> bool:
    """Whether a keypoint file says that nobody is in its image. Long json files are not opened."""
    if label.endswith(".json") and os.path.getsize(label) > SHORT_FILE:
        return False
    try:
        pose_files.load_poses(label, canvas=(1, 1))
    except pose_files.NobodyFound:
        return True
    except keypoints.PoseError:                     # reading it says why
        pass
    return False


# ------------------------------------------------------------------------- one COCO json for all

def find_coco(root: Path) -> tuple[Path, dict] | None:
    """The COCO json of a folder and its content, or None. A json is COCO if it has images and
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
    if len(found) > 1:
        raise DataError(f"{root}: {len(found)} COCO files, {found[0][0].name}, "
                        f"{found[1][0].name}, ...; name one of them")
    return found[0] if found else None


def has_keypoints(root: str | Path) -> bool:
    """Whether `root` is a dataset with poses, not a folder of nothing but images."""
    root = Path(root)
    return (not root.is_dir() or (root / "keypoints").is_dir() or (root / "labels").is_dir()
            or has_labels_beside(root) or find_coco(root) is not None)


def read_coco(path: Path, content: object) -> tuple[Path, list[Labelled]]:
    """Each image of a COCO json with its largest person; see `find`. The images are in one of the
    usual places near the json."""
    people, refused = pose_files.read_coco(path, content)
    for name in people:
        if (PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor
                or ".." in re.split(r"[/\\]", name)):
            raise DataError(f"{path}: file_name '{name}' leads out of the dataset; use plain names")
    part = path.stem.split("_")[-1]                     # person_keypoints_val2017.json: val2017/
    folders = [at / sub for at in (path.parent, path.parent.parent)
               for sub in ("images", part, f"images/{part}", ".")]
    folder = next((at for at in folders
                   if any(os.path.isfile(on_disk(at, name)) for name in people)), None)
    if folder is None:
        raise DataError(f"{path}: none of its images is in {folders[0]} or beside it")
    return folder.parent if folder.name == "images" else folder, [
        (on_disk(folder, name), None if name in refused else pose_files.largest(people[name]),
         refused.get(name, "")) for name in sorted(people)]


# --------------------------------------------------------------------------------------- groups

def find_groups(root: Path, names: list[str]) -> list[str]:
    """The clip of each image: metadata.csv's, else the name without its frame number."""
    told = read_groups(root / "metadata.csv")
    stems = [PurePosixPath(name.rpartition("images/")[2]).with_suffix("").as_posix()
             for name in names]
    return [told.get(name) or re.sub(r"[-_ ./]*\d+$", "", stem) or stem
            for name, stem in zip(names, stems, strict=True)]


def read_groups(path: Path) -> dict[str, str]:
    """metadata.csv -> {file: group}; empty if there is no such file or no such column."""
    if not path.is_file():
        return {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            names = rows.fieldnames or ()
            column = next((c for c in ("group", "animation", "clip", "video") if c in names), None)
            return {row["file"]: row[column] for row in rows if column and "file" in names}
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a csv table ({error}); fix it or take it out") from error
