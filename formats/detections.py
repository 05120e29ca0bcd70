"""Images for another keypoint detector, and the poses that it found in them.

write_images makes a folder with images/000000.png and so on, and poses.json, the poses asked for
as COCO annotations. read_found takes what a detector found in these images: a folder with a pose
file of any format per image, named like the image, or one file that names its images.

Letters: N images, J = 17 joints, S side in pixels.
"""
from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
from PIL import Image

from checkpoint import replacing
from formats.pose_files import NobodyFound, load_poses
from keypoints import JOINTS

IMAGES, POSES = "images", "poses.json"
NAME_IMAGES = "coco", "coco-results", "labelme", "label-studio"     # their files name images


def earlier_images(out: Path) -> list[Path]:
    """The images in `out`; ValueError if it was not `write_images` that wrote them."""
    found = sorted((out / IMAGES).glob("[0-9]" * 6 + ".png"))
    if found and not (out / POSES).exists():
        raise ValueError(f"--out {out} has other images in {out / IMAGES}; give another folder")
    return found


def write_images(out: Path, asked: np.ndarray, images: np.ndarray, about: dict) -> None:
    """Writes images uint8 [N, S, S, 3]; `asked` [M, J, 3] are the poses of the first M, next M, ...

    The images come last: after an interruption some are missing, and `read_images` says so.
    """
    for path in earlier_images(out):
        path.unlink()
    (out / IMAGES).mkdir(exist_ok=True)
    side, files, annotations = images.shape[1], [], []
    for i in range(len(images)):
        pose = asked[i % len(asked)]
        seen = pose[pose[:, 2] > 0, :2] * side
        box = [*seen.min(0), *np.ptp(seen, axis=0)] if len(seen) else [0.0, 0.0, 0.0, 0.0]
        flat = [v for x, y, visible in pose for v in (x * side, y * side, round(2 * visible))]
        files.append({"id": i, "file_name": f"{i:06d}.png", "width": side, "height": side})
        annotations.append({"id": i, "image_id": i, "category_id": 1, "keypoints": flat,
                            "num_keypoints": len(seen), "bbox": box, "area": box[2] * box[3],
                            "iscrowd": 0})
    categories = [{"id": 1, "name": "person", "keypoints": list(JOINTS)}]
    with replacing(out / POSES) as file:
        file.write(json.dumps({"info": about | {"poses": len(asked)}, "images": files,
                               "annotations": annotations, "categories": categories}).encode())
    for told, pixels in zip(files, images, strict=True):
        Image.fromarray(pixels).save(out / IMAGES / told["file_name"])


def read_images(out: Path) -> tuple[np.ndarray, np.ndarray, dict]:
    """(asked, images, about) of `write_images`; ValueError if they are not complete."""
    try:
        told = json.loads((out / POSES).read_text())
        images = np.stack([np.asarray(Image.open(out / IMAGES / image["file_name"]).convert("RGB"))
                           for image in told["images"]])
        about, annotations = told["info"], told["annotations"]
        asked = np.array([person["keypoints"] for person in annotations[:about.pop("poses")]])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"--out {out} has no complete images for --detected ({e}); first run the "
                         "command without --detected, then a detector on "
                         f"{out / IMAGES}") from None
    side = images.shape[1]
    return asked.reshape(-1, len(JOINTS), 3) / [side, side, 2], images, about


def read_found(path: str, n: int, side: int) -> dict[int, np.ndarray]:
    """The pose [J, 3] that a detector found in each of n images, by number, 000000 to n - 1.

    In an image of its answer in which nobody was found, no joint is visible.
    """
    folder, found = Path(path).is_dir(), {}
    files = sorted(Path(path).iterdir()) if folder else [path]
    for file in (file for file in files if not folder or file.suffix in (".json", ".txt")):
        try:
            poses = load_poses(file, canvas=(side, side))
        except NobodyFound:
            found[last_number(file)] = np.zeros((len(JOINTS), 3))
            continue
        if not folder and poses.format not in NAME_IMAGES:
            raise ValueError(f"--detected {path} is {poses.taken_for}, which does not name its "
                             "images; give a folder with a file per image, named like the image")
        names = [file] if folder else poses.pictures
        found |= dict(zip(map(last_number, names), poses.poses, strict=False))
    found = {i: pose for i, pose in found.items() if i is not None and i < n}
    if not found:
        raise ValueError(f"--detected {path} has no pose of an image 000000 to {n - 1:06d}")
    return found


def last_number(path: str | Path) -> int | None:
    """000012_keypoints.json -> 12"""
    digits = re.findall(r"\d+", Path(path).stem)
    return int(digits[-1]) if digits else None
