"""The page's server without a browser: labels, proposals, sampling, and who may ask."""
import base64
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_checkpoint import ckpt, networks, tiny_preset  # noqa: F401  (fixtures)

import checkpoint
import data
import keypoints
import sample
from data import PoseFolder
from dataset.figures import Figures
from dataset.images import DataError
from extras.density import PoseDensity, percent
from extras.proportions import retarget
from studio import __main__ as command
from studio import propose
from studio.draw import Draw
from studio.label import Label
from studio.server import BODY_MOST, Studio

ROOT = Path(__file__).parent.parent
TOY = str(ROOT / "assets/toy.pt")


@contextmanager
def served(*parts):
    """ask(path, body, headers) of a server with the calls of these parts; gives the parsed JSON."""
    calls = {name: call for part in parts for name, call in part.calls().items()}
    server = Studio(calls)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()

    def ask(path, body=None, headers=(), url=server.url):
        if isinstance(body, dict):
            body, headers = json.dumps(body).encode(), {"Content-Type": "application/json",
                                                        **dict(headers)}
        request = urllib.request.Request(url + path, body, dict(headers))
        with urllib.request.urlopen(request, timeout=60) as answer:
            content = answer.read()
        if answer.headers["Content-Type"] != "application/json":
            return content
        lines = [json.loads(line) for line in content.splitlines()]
        return lines[0] if len(lines) == 1 else lines

    ask.server = server
    try:
        yield ask
    finally:
        server.shutdown()
        server.server_close()
        for part in parts:
            getattr(part, "end", int)()


def refusal(ask, *args, **how):
    """(status, sentence) of a call that is refused."""
    with pytest.raises(urllib.error.HTTPError) as caught:
        ask(*args, **how)
    return caught.value.code, json.loads(caught.value.read())["error"]


def figures(folder: Path, n: int, size: int = 48) -> np.ndarray:
    """n images in a folder; their poses [n, 17, 3]."""
    folder.mkdir(parents=True, exist_ok=True)
    ds = Figures(n, size, 3)
    for i in range(n):
        Image.fromarray(ds[i][0]).save(folder / f"人物 {i:02d}.png")
    return np.stack([ds[i][1] for i in range(n)]).astype(float)


@pytest.fixture
def mine(tmp_path):
    """A bare folder of six images, and their poses."""
    return tmp_path / "mine", figures(tmp_path / "mine", 6)


def accept(ask, i, pose, state="done"):
    told = ask(f"api/pose/{i}")
    return ask(f"api/pose/{i}", {"pose": pose.tolist(), "state": state, "version": told["version"]})


# ------------------------------------------------------------------------------------------ safety

def test_only_the_page_itself_may_ask(mine):
    with served(Label(mine[0])) as ask:
        assert b"<title>" in ask("") and b"export class Editor" in ask("skeleton.js")
        port, token = ask.server.server_port, ask.server.token
        assert ask.server.server_address[0] == "127.0.0.1"
        for wrong in ("x", "%C3%A9", token[:-1], token + "x"):
            url = f"http://127.0.0.1:{port}/{wrong}/"
            assert refusal(ask, "api/images", url=url)[0] == 403
        here = {"Origin": f"http://localhost:{port}", "Host": f"localhost:{port}"}
        assert ask("api/images", headers=here)["images"]
        for headers in ({"Host": f"evil.example:{port}"}, {"Origin": "http://evil.example"},
                        {"Origin": "null"}, {"Origin": f"http://127.0.0.1:{port + 1}"},
                        {"Host": f"evil.example:{port}", "Origin": f"http://127.0.0.1:{port}"}):
            assert refusal(ask, "api/images", headers=headers)[0] == 403
            assert refusal(ask, "api/pose/0", {}, headers=headers)[0] == 403


def test_files_are_numbers_and_bodies_are_limited(mine):
    with served(Label(mine[0])) as ask:
        for path in ("../../etc/passwd", "..%2f..%2fetc%2fpasswd", "page/index.html", "label.py",
                     "api/image/..", "api/image/-1", "api/image/6", "api/image//etc/passwd", "api"):
            assert refusal(ask, path)[0] == 404
        status, why = refusal(ask, "api/pose/0", b"", {"Content-Length": str(BODY_MOST + 1)})
        assert status == 413 and "34 MB; at most 34 MB" in why
        for body in (b"{", b"[]", b"7"):
            assert refusal(ask, "api/pose/0", body, {"Content-Type": "application/json"})[0] == 400


# ------------------------------------------------------------------------------------------ labels

def test_a_label_is_saved_with_hidden_and_missing_joints_and_counts_once_it_is_done(mine):
    root, poses = mine
    label, pose = Label(root), poses[2].copy()
    pose[3:6, 2], pose[9] = keypoints.HIDDEN, 0
    with served(label) as ask:
        assert [state for _, state, _, _ in ask("api/images")["images"]] == ["todo"] * 6
        accept(ask, 2, pose, "corrected")
        label.place.mkdir()                             # as the lock makes it
        with pytest.raises(DataError, match="no image with a pose"):
            PoseFolder(root, 16)
        accept(ask, 2, pose)
        assert np.array_equal(ask("api/pose/2")["pose"], pose)
    ds = PoseFolder(root, 16)
    assert [Path(path).name for path in ds.paths] == ["人物 02.png"] and len(ds.skipped) == 5
    assert np.array_equal(ds.pose(0), pose)


def test_a_person_in_no_image_is_a_label_too(mine):
    label = Label(mine[0])
    with served(label) as ask:
        accept(ask, 0, data.NO_POSE)
        accept(ask, 1, mine[1][1])
        told = ask("api/pose/0")
        assert told["state"] == "done" and not np.any(told["pose"]) and not told["problem"]
    label.place.mkdir()
    assert len(PoseFolder(mine[0], 16)) == 1 and not PoseFolder(mine[0], 16).broken


def test_labels_of_other_tools_are_read_and_kept(tmp_path):
    poses = figures(tmp_path / "set/images", 4)
    doc = {"images": [{"id": i, "file_name": f"人物 {i:02d}.png", "width": 48, "height": 48}
                      for i in range(3)],
           "annotations": [{"id": i, "image_id": i, "category_id": 1, "keypoints":
                            (poses[i] * (48, 48, 2)).ravel().tolist()} for i in range(3)]}
    coco = tmp_path / "set/coco.json"
    coco.write_text(json.dumps(doc))
    (tmp_path / "set/keypoints").mkdir()
    (tmp_path / "set/.studio").mkdir()
    other = tmp_path / "set/keypoints/人物 03.json"
    other.write_text(openpose := json.dumps({"people": [{"pose_keypoints_2d": [10, 20, 1] * 18}]}))
    with served(Label(tmp_path / "set")) as ask:
        assert [state for _, state, _, _ in ask("api/images")["images"]] == ["done"] * 4
        assert np.allclose(ask("api/pose/1")["pose"], poses[1])
        assert np.allclose(ask("api/pose/3")["pose"], [10 / 48, 20 / 48, 1])
        assert os.listdir(tmp_path / "set/keypoints") == [other.name]       # nothing was written
        accept(ask, 1, moved := poses[1] * (1, 0.5, 1))
        accept(ask, 3, poses[3])
    ds = PoseFolder(tmp_path / "set", 16)
    assert np.allclose([ds.pose(i) for i in range(4)], [poses[0], moved, poses[2], poses[3]])
    assert (tmp_path / "set/.studio/replaced" / other.name).read_text() == openpose
    assert coco.read_text() == json.dumps(doc)


def test_labels_of_yolo_are_read_beside_new_ones(tmp_path):
    poses = figures(tmp_path / "set/images", 3)
    (tmp_path / "set/labels").mkdir()
    row = " ".join(f"{x} {y} {2 * visible:g}" for x, y, visible in poses[0])
    (tmp_path / "set/labels/人物 00.txt").write_text(f"0 0.5 0.5 1 1 {row}")
    with served(Label(tmp_path / "set")) as ask:
        accept(ask, 2, poses[2])
    ds = PoseFolder(tmp_path / "set", 16)
    assert np.allclose([ds.pose(0), ds.pose(1)], poses[[0, 2]])


def test_two_tabs_do_not_overwrite_each_other(mine):
    with served(Label(mine[0])) as ask:
        first, second = ask("api/pose/0"), ask("api/pose/0")
        body = {"pose": mine[1][0].tolist(), "state": "corrected", "version": first["version"]}
        version = ask("api/pose/0", body)["version"]
        status, why = refusal(ask, "api/pose/0", body | {"pose": mine[1][1].tolist(),
                                                         "version": second["version"]})
        assert status == 409 and "changed elsewhere" in why
        assert ask("api/pose/0")["pose"] == mine[1][0].tolist()
        ask("api/pose/0", body | {"version": version, "state": "done"})


def test_what_goes_wrong_is_one_sentence_and_loses_nothing(mine, monkeypatch):
    root, poses = mine
    with served(Label(root)) as ask:
        accept(ask, 0, poses[0])
        accept(ask, 2, poses[2])
        (root / "人物 01.png").write_bytes(b"no image")
        (root / "人物 02.png").unlink()
        assert "not a readable image" in refusal(ask, "api/image/1")[1]
        assert "no such file" in ask("api/pose/2")["problem"]
        kept = (root / "keypoints/人物 02.json").read_text()
        body = {"pose": data.NO_POSE.tolist(), "state": "done"}
        body["version"] = ask("api/pose/2")["version"]
        assert "no such file" in refusal(ask, "api/pose/2", body)[1]
        assert (root / "keypoints/人物 02.json").read_text() == kept
        for pose in ([], [[0, 0]] * 17, [[0, 0, 2]] * 17, [["x", 0, 1]] * 17, [[1e999, 0, 1]] * 17):
            assert refusal(ask, "api/pose/3", body | {"pose": pose})[0] == 400
        told = ask("api/pose/0")
        monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space")))
        body = {"pose": poses[1].tolist(), "state": "done", "version": told["version"]}
        assert "No space; nothing was changed" in refusal(ask, "api/pose/0", body)[1]
        assert ask("api/pose/0") == told


def test_images_of_every_kind_are_shown(tmp_path):
    wide = Image.fromarray(np.tile(np.uint8([[[255, 0, 0]] * 20 + [[0, 0, 255]] * 20]), (20, 1, 1)))
    exif = Image.Exif()
    exif[0x0112] = 6                                    # turn it by 90 degrees to the right
    wide.save(tmp_path / "a turned.jpg", exif=exif)
    wide.save(tmp_path / "b moving.gif", save_all=True, append_images=[wide.rotate(180)])
    Image.new("RGBA", (20, 40), (0, 0, 0, 0)).save(tmp_path / "c clear.png")
    Image.new("L", (5000, 3000), 99).save(tmp_path / "d large.png")
    with served(Label(tmp_path)) as ask:
        shown = [Image.open(io.BytesIO(ask(f"api/image/{i}"))) for i in range(4)]
        sizes = [ask(f"api/pose/{i}")["size"] for i in range(4)]
        assert [image.size for image in shown] == [(20, 40), (40, 20), (20, 40), (2048, 1229)]
        assert sizes == [[20, 40], [40, 20], [20, 40], [5000, 3000]]
        assert shown[0].convert("RGB").getpixel((10, 5))[0] > 200
        assert shown[2].convert("RGB").getpixel((0, 0)) == (255, 255, 255)
        assert max(Image.open(io.BytesIO(ask("api/thumb/3"))).size) == 112


def test_suspects_are_those_of_the_dataset_check(mine):
    label = Label(mine[0])
    with served(label) as ask:
        assert ask("api/suspects") == {"suspects": {}}
        for i, pose in enumerate(mine[1]):
            accept(ask, i, pose * (1, 1, 1) if i else np.array([[0.5, 0.5, 1]] * 17))
        assert "all joints lie within" in ask("api/suspects")["suspects"]["0"]


@contextmanager
def command_of(*flags):
    """(process, ask) of `python -m studio`."""
    process = subprocess.Popen([sys.executable, "-m", "studio", *flags, "--no-browser"], cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    url = process.stdout.readline().strip()

    def ask(path, body=None):
        request = urllib.request.Request(f"{url}api/{path}", body and json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        return urllib.request.urlopen(request, timeout=60)

    try:
        yield process, ask
    finally:
        process.kill()
        process.wait()


def ctrl_c(process):
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(15) == 0 and time.monotonic() - began < 5
    assert process.stderr.read() == "studio: stopped; everything is saved\n"


def test_a_second_server_on_the_folder_is_refused_and_ctrl_c_while_it_learns_loses_nothing(tmp_path):
    root, poses = tmp_path / "mine", figures(tmp_path / "mine", propose.LEAST + 1)
    label = Label(root)
    for i in range(propose.LEAST):
        label.write(i, poses[i], "done", 1.0)
    with command_of(str(root)) as (process, ask):
        assert command.main([str(root), "--no-browser"]) == 2
        ask("propose", {"stop": False})
        while not (share := json.load(ask("progress")).get("share")):
            time.sleep(0.1)
        ctrl_c(process)
    saved = checkpoint.read(label.place / "detector.pt")
    assert share * propose.STEPS <= saved["step"] < propose.STEPS
    assert [state for state, _ in Label(root).states] == ["done"] * propose.LEAST + ["todo"]


def test_ctrl_c_while_it_draws_ends_at_once():
    with command_of("--ckpt", TOY) as (process, ask), ask("draw", SETTINGS | {"steps": 900}) as lines:
        assert json.loads(lines.readline()) == {"step": 1, "of": 900}
        ctrl_c(process)
        assert b"pictures" not in lines.read()


# --------------------------------------------------------------------------------------- proposals

def test_augmentation_moves_the_joints_with_the_pixels():
    S, rng = propose.SIDE, torch.Generator().manual_seed(0)
    pose = torch.zeros(8, 17, 3)
    pose[:, 5] = torch.tensor([0.4, 0.6, 1.0])          # the left shoulder
    x = torch.full((8, 3, S, S), -1.0)
    x[..., round(0.6 * S - 2):round(0.6 * S + 2), round(0.4 * S - 2):round(0.4 * S + 2)] = 1
    y, moved = propose.augmented(x, pose, rng)
    assert 0 < (moved[:, 6, 2] == 1).sum() < 8          # the mirrored ones show a right shoulder
    for image, joints in zip(y, moved, strict=True):
        (joint,) = joints[joints[:, 2] == 1]
        spot = (image[0] - image[0].median()).abs()
        spot = spot * (spot > 0.5 * spot.max())
        centre = torch.stack([spot.sum(0) @ (torch.arange(S) + 0.5),
                              spot.sum(1) @ (torch.arange(S) + 0.5)]) / spot.sum() / S
        assert (centre - joint[:2]).abs().max() < 0.012
    wide = np.random.default_rng(0).random((17, 3)).round(1)
    wide[:, 2] = 1
    back = propose.from_square(keypoints.fit(wide, (300, 200), "letterbox"), (300, 200))
    assert np.allclose(back, wide)


def test_what_is_asked_first_is_spread_over_the_folder(tmp_path):
    label = Label.__new__(Label)
    label.images, label.states = [""] * 200, [("todo", 0.0)] * 200
    first = np.argsort(label.ranks())[:20]
    assert np.diff(np.sort(first)).max() <= 16          # of 200; a random 20 leave larger gaps
    sure = np.linspace(0.2, 1, 200).round(3)            # the least certain are all in one place
    label.states = [("proposed", c) for c in sure]
    first = np.argsort(label.ranks())
    assert first[0] == 0 and (first[:50] == np.arange(0, 200, 4)).all()
    assert (first[50:100] == np.arange(1, 200, 4)).all()
    label.states = [("done", 1.0)] * 170 + [("proposed", 1 - c) for c in sure[:30]]
    assert list(np.argsort(np.array(label.ranks())[170:])) == list(range(29, -1, -1))


def test_training_resumes_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(propose, "STEPS", 4)
    monkeypatch.setattr(propose, "BATCH", 4)
    images, poses = (np.stack(part) for part in zip(*(Figures(4, propose.SIDE)[i] for i in range(4)), strict=True))
    whole = propose.Learner(tmp_path / "whole.pt")
    assert list(whole.learn(images, poses)) == [0.25, 0.5, 0.75, 1]
    asked = iter([False, False, True])
    assert list(propose.Learner(tmp_path / "half.pt").learn(images, poses, lambda: next(asked))) == [0.25, 0.5]
    rest = propose.Learner(tmp_path / "half.pt")
    assert list(rest.learn(images, poses)) == [0.75, 1]
    again = propose.Learner(tmp_path / "half.pt")       # more images: from here, for a new round
    assert again.step == 0
    assert len({checkpoint.hash_of(learner.detector.state_dict()) for learner in (whole, rest, again)}) == 1


def test_proposals_are_marked_and_no_training_data_until_accepted(tmp_path, monkeypatch):
    monkeypatch.setattr(propose, "STEPS", 2)
    monkeypatch.setattr(propose, "BATCH", 4)
    root, poses = tmp_path / "mine", figures(tmp_path / "mine", propose.LEAST + 5)
    label, really = Label(root), propose.propose
    label.place.mkdir()

    def meanwhile(*args):                               # a person works on one of them
        label.save(24, {"pose": poses[24].tolist(), "state": "corrected", "version": ""})
        return really(*args)

    monkeypatch.setattr(propose, "propose", meanwhile)

    def wait(ask):
        for _ in range(600):
            if not ask("api/progress")["training"]:
                return ask("api/progress")
            time.sleep(0.05)

    with served(label) as ask:
        for i in range(propose.LEAST - 1):
            accept(ask, i, poses[i])
        assert "learns from 20, so label 1 more" in refusal(ask, "api/propose", {})[1]
        accept(ask, propose.LEAST - 1, poses[propose.LEAST - 1])
        accept(ask, propose.LEAST, poses[propose.LEAST], "corrected")
        ask("api/propose", {})
        assert wait(ask)["text"] == "3 proposals, the least certain first"
        states = [state for _, state, _, _ in ask("api/images")["images"]]
        assert states == ["done"] * 20 + ["corrected"] + ["proposed"] * 3 + ["corrected"]
        for i in (20, 24):                              # no one's work is replaced
            assert np.array_equal(ask(f"api/pose/{i}")["pose"], poses[i])
        told = ask("api/pose/21")
        text = (root / "keypoints/人物 21.json").read_text()
        assert text.startswith('{"state": "proposed", "confidence": 0.')
        assert len(PoseFolder(root, 16)) == 20
        ask("api/pose/21", {"pose": told["pose"], "state": "done", "version": told["version"]})
        assert len(PoseFolder(root, 16)) == 21
        assert np.array_equal(PoseFolder(root, 16).pose(20), told["pose"])
    assert [state for state, _ in Label(root).states] == [*states[:21], "done", *states[22:]]


# ------------------------------------------------------------------------------------------ drawing

@pytest.fixture(scope="module")
def toy():
    return Draw(TOY)


WAVING = np.array(list(json.loads((ROOT / "examples/poses/waving.json").read_text()).values()))
SETTINGS = {"pose": WAVING.tolist(), "n": 2, "seed": 7, "steps": 3, "guidance": 2.0}


def test_a_picture_is_that_of_its_command(toy, tmp_path, monkeypatch):
    with served(toy) as ask:
        *steps, last = ask("api/draw", SETTINGS)
    assert steps == [{"step": i, "of": 3} for i in (1, 2, 3)]
    url, line = last["pictures"][1]
    picture = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    assert picture.text["command"] == line and "--seed 8" in line
    monkeypatch.chdir(tmp_path)
    Path("pose.json").write_text(picture.text["pose.json"])
    assert sample.main([*shlex.split(line)[2:], "--separate", "each"]) == 0
    (file,) = Path("each").iterdir()
    drawn = Image.open(file)
    assert drawn.text["checkpoint"] == picture.text["checkpoint"]
    assert np.abs(np.asarray(drawn).astype(int) - np.asarray(picture)).max() <= 1


def test_a_published_checkpoint_draws_with_its_preset(ckpt):  # noqa: F811
    with served(Draw(str(ckpt), "tiny")) as ask:
        *_, last = ask("api/draw", SETTINGS | {"steps": 4, "guidance": 1})
        assert "--preset tiny" in last["pictures"][0][1]
        assert "without dropping poses" in refusal(ask, "api/draw", SETTINGS)[1]


def test_a_newer_request_ends_the_one_before(toy):
    lines = toy.draw(0, SETTINGS | {"steps": 50})
    assert next(lines) == {"step": 1, "of": 50}
    number = toy.newest
    with served(toy) as ask:
        answers = []
        thread = threading.Thread(target=lambda: answers.extend(ask("api/draw", SETTINGS)))
        thread.start()
        while toy.newest == number:                     # until the second one has come
            time.sleep(0.01)
        assert len(list(lines)) == 0
        thread.join(30)
        assert len(answers[-1]["pictures"]) == 2


def test_poses_come_from_examples_training_and_dropped_files(toy):
    with served(toy) as ask:
        poses = dict(ask("api/model")["poses"])
        wanted = retarget(WAVING[None], toy.trained)[0]
        assert np.allclose(poses["waving"], wanted) and "common 8" in poses
        wide = {"canvas_width": 200, "canvas_height": 100, "people": [
            {"pose_keypoints_2d": [100, 50, 1] * 18}]}
        found = ask("api/read", json.dumps(wide).encode())
        assert np.allclose(found["poses"][0][1], [0.5, 0.5, 1]) and "OpenPose" in found["text"]
        pixels = {"people": [{"pose_keypoints_2d": [v for j in range(18) for v in (9 * j + 5, 50, 1)]}]}
        found = ask("api/read", json.dumps(pixels).encode())
        x, y = np.array(found["poses"][0][1])[:, :2].T
        size = max(np.ptp(x), np.ptp(y))
        assert np.allclose([x.min() + x.max(), y.min() + y.max(), size], [1, 1, 0.8])
        assert "middle" in found["text"]
        assert refusal(ask, "api/read", b"hello")[1].startswith("the dropped file is not a known")
        text = ask("api/unusual", {"pose": WAVING.tolist()})["text"]
        trained = checkpoint.training_poses(checkpoint.load(TOY, "ldm"), TOY)
        assert f"; {percent(PoseDensity(trained).unusual(WAVING[None])[0])} of" in text


def test_settings_out_of_bounds_are_refused_with_the_bounds(toy):
    with served(toy) as ask:
        for change, why in (({"n": 17}, "n: 17 is given, but it must be from 1 to 16"),
                            ({"steps": 0}, "steps: 0 is given"), ({"seed": "x"}, "seed: "),
                            ({"guidance": None}, "guidance: "), ({"label": "Mage"}, "without labels"),
                            ({"pose": [[0, 0, 1]]}, "a pose is 17 joints")):
            assert why in refusal(ask, "api/draw", SETTINGS | change)[1]
