"""The page in a real Chromium: labelling by mouse and by keyboard, proposals, drawing."""
import json
import shutil
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import keypoints
from dataset.figures import Figures
from studio import __main__ as command
from studio import propose
from studio.draw import Draw
from studio.label import Label
from studio.server import Studio

webdriver = pytest.importorskip(
    "selenium.webdriver", reason="selenium is missing; install it with: pip install selenium")
from selenium.common.exceptions import WebDriverException  # noqa: E402
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="chromium is missing; on Debian: apt install chromium "
    "chromium-driver")]
ROOT = Path(__file__).parent.parent
SIZE, N, MARGIN = 64, 22, 24


@pytest.fixture(scope="module")
def chromium():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                 "--window-size=1280,800"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


class Page:
    """What a person does on the page."""

    def __init__(self, driver, url):
        self.driver, self.canvas = driver, "image"
        driver.get(url)

    def find(self, css):
        return self.driver.find_element("css selector", css)

    def text(self, css):
        return self.find(css).text

    def until(self, happened):
        for _ in range(400):
            with suppress(WebDriverException):          # an element that is not there yet
                if found := happened():
                    return found
            time.sleep(0.05)
        raise AssertionError(f"in vain; the page says: {self.text('#message')}")

    def act(self):
        return ActionChains(self.driver, duration=0)

    def press(self, *keys):
        for key in keys:
            self.act().send_keys(key).perform()

    def with_ctrl(self, key):
        self.act().key_down(Keys.CONTROL).send_keys(key).key_up(Keys.CONTROL).perform()

    def at(self, x, y, size=SIZE):
        """Pixels from the middle of the canvas of a place in 0..1 of a square image."""
        canvas = self.find(f"#{self.canvas}")
        scale = min(canvas.size["width"], canvas.size["height"]) - 2 * MARGIN
        return canvas, round((x - 0.5) * scale), round((y - 0.5) * scale)

    def click(self, x, y):
        self.act().move_to_element_with_offset(*self.at(x, y)).click().perform()

    def drag(self, start, end, key=None):
        actions = self.act().move_to_element_with_offset(*self.at(*start)).click_and_hold()
        if key:
            actions.key_down(key)
        actions.move_to_element_with_offset(*self.at(*end)).release()
        if key:
            actions.key_up(key)
        actions.perform()


@contextmanager
def opened(driver, label=None, draw=None):
    server = Studio(command.calls_of(label, draw))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    driver.get_log("browser")
    try:
        yield Page(driver, server.url)
        errors = [line for line in driver.get_log("browser") if "400" not in line["message"]
                  and "409" not in line["message"]]
        assert not errors
    finally:
        server.shutdown()
        server.server_close()
        for part in filter(None, (label, draw)):
            part.end()


@pytest.fixture
def mine(tmp_path):
    root, ds = tmp_path / "mine", Figures(N, SIZE, 5)
    root.mkdir()
    (root / ".studio").mkdir()
    for i in range(N):
        Image.fromarray(ds[i][0]).save(root / f"{i:02d}.png")
    return root, np.stack([ds[i][1] for i in range(N)]).astype(float)


def saved(root, i):
    """(state, pose) of image i on the disk."""
    file = root / f"keypoints/{i:02d}.json"
    if not file.exists():
        return "todo", None
    found = json.loads(file.read_text())
    return found["state"], np.array([found[name] for name in keypoints.JOINTS])


def test_label_with_the_mouse(chromium, mine):
    root, _ = mine
    places = {"nose": (0.5, 0.2), "left eye": (0.55, 0.15), "right eye": (0.45, 0.15)}
    with opened(chromium, Label(root)) as page:
        for title, place in places.items():             # the page asks for the joints
            page.until(lambda title=title: f"Click the person's {title}." in page.text("#hint"))
            page.click(*place)
        page.press(Keys.ESCAPE)
        page.until(lambda: saved(root, 0)[0] == "corrected" and saved(root, 0)[1][2, 2])
        assert np.abs(saved(root, 0)[1][:3, :2] - list(places.values())).max() < 0.004
        page.drag((0.5, 0.2), (0.6, 0.4))
        page.until(lambda: abs(saved(root, 0)[1][0, 1] - 0.4) < 0.004)
        page.with_ctrl("z")
        page.until(lambda: abs(saved(root, 0)[1][0, 1] - 0.2) < 0.004)
        page.with_ctrl("y")
        page.until(lambda: abs(saved(root, 0)[1][0, 1] - 0.4) < 0.004)
        page.find("[data-key=h]").click()               # the nose is selected
        page.until(lambda: saved(root, 0)[1][0, 2] == keypoints.HIDDEN)
        page.find("[data-key=Enter]").click()
        page.until(lambda: page.text("#name") == "16.png")      # far away in the folder
        assert saved(root, 0)[0] == "done"
        page.find("#filter").send_keys("Done")
        page.until(lambda: page.text("#name") == "00.png")


def test_label_with_the_keyboard_alone_and_undo_without_end(chromium, mine):
    root, poses = mine
    with opened(chromium, Label(root)) as page:
        page.until(lambda: page.text("#hint"))
        page.press(Keys.ESCAPE, Keys.TAB, Keys.ARROW_RIGHT)     # the nose, one pixel from the middle
        page.until(lambda: saved(root, 0)[0] == "corrected")
        assert np.allclose(saved(root, 0)[1][0], [0.5 + 1 / SIZE, 0.5, 1], atol=1e-6)
        page.press(*[Keys.ARROW_DOWN] * 30)
        page.until(lambda: np.isclose(saved(root, 0)[1][0, 1], 0.5 + 30 / SIZE, atol=1e-5))
        page.press(Keys.TAB, Keys.ARROW_LEFT)                   # the left eye
        page.press("m")
        page.until(lambda: saved(root, 0)[1][2, 2] == 1)
        assert not saved(root, 0)[1][1].any()
        page.with_ctrl("z")
        page.press("h", Keys.DELETE)
        page.until(lambda: not saved(root, 0)[1][1].any())
        for _ in range(34):
            page.with_ctrl("z")
        page.until(lambda: not saved(root, 0)[1].any())
        for _ in range(32):
            page.with_ctrl("y")
        page.until(lambda: saved(root, 0)[1][1, 2] == 1)
        page.press(Keys.ENTER)
        page.until(lambda: page.text("#name") == "16.png")
        page.press("f", Keys.ENTER)                             # the pose of the image before
        page.until(lambda: page.text("#name") == "08.png")
        assert np.array_equal(saved(root, 16)[1], saved(root, 0)[1])
        page.press(Keys.PAGE_DOWN)
        page.until(lambda: page.text("#name") == "04.png")


def test_a_change_elsewhere_is_told_and_r_loads_it(chromium, mine):
    root, poses = mine
    label = Label(root)
    with opened(chromium, label) as page:
        page.until(lambda: page.text("#hint"))
        label.save(0, {"pose": poses[0].tolist(), "state": "done", "version": ""})
        page.click(0.5, 0.5)
        page.until(lambda: "00.json was changed elsewhere" in page.text("#message"))
        assert np.array_equal(saved(root, 0)[1], poses[0])
        page.press("r")
        page.until(lambda: page.text("#about").endswith("Done."))
        shoulder, elbow, wrist = poses[0, [5, 7, 9], :2]
        page.drag(elbow, 2 * shoulder - elbow + (0.01, 0), Keys.SHIFT)      # half a turn
        page.until(lambda: not np.array_equal(saved(root, 0)[1], poses[0]))
        state, pose = saved(root, 0)
        assert state == "done" and np.abs(pose[7, :2] - (2 * shoulder - elbow)).max() < 0.02
        for a, b in ((5, 7), (7, 9)):                                       # its limbs are as long
            before, after = (np.linalg.norm(p[a, :2] - p[b, :2]) for p in (poses[0], pose))
            assert abs(before - after) < 1e-5
        assert np.array_equal(np.delete(pose, (7, 9), 0), np.delete(poses[0], (7, 9), 0))


def test_propose_accept_and_restart(chromium, mine, monkeypatch):
    monkeypatch.setattr(propose, "STEPS", 3)
    monkeypatch.setattr(propose, "BATCH", 4)
    root, poses = mine
    label = Label(root)
    for i in range(propose.LEAST):
        label.save(i, {"pose": poses[i].tolist(), "state": "done", "version": ""})
    with opened(chromium, Label(root)) as page:
        page.until(lambda: page.text("#filter option:checked") == "To do 2")
        page.find("#propose").click()
        page.until(lambda: page.text("#progress") == "2 proposals, the least certain first")
        page.until(lambda: page.text("#filter option:checked") == "Proposed 2")
        first = int(page.until(lambda: page.text("#name"))[:2])
        assert saved(root, first)[0] == "proposed" and "confidence" in page.text("#about")
    sure = {i: Label(root).states[i][1] for i in (20, 21)}
    with opened(chromium, Label(root)) as page:                 # after a restart
        page.until(lambda: page.text("#filter option:checked") == "Proposed 2")
        page.until(lambda: "confidence" in page.text("#about"))
        assert page.text("#name") == f"{min(sure, key=sure.get)}.png"
        page.find("#image").click()
        page.press(Keys.ENTER)
        page.until(lambda: page.text("#name") == f"{max(sure, key=sure.get)}.png")
        assert saved(root, min(sure, key=sure.get))[0] == "done"


def test_draw_and_live(chromium, mine):
    drop = """const files = new DataTransfer();
        files.items.add(new File([arguments[0]], "p.json"));
        document.dispatchEvent(new DragEvent("drop", {bubbles: true, dataTransfer: files}));"""
    draw = Draw(str(ROOT / "assets/toy.pt"))
    with opened(chromium, None, draw) as page:
        page.canvas = "canvas"
        page.until(lambda: "% of the training poses" in page.text("#unusual"))
        before = page.text("#unusual")
        for name, value in (("n", 2), ("steps", 2)):
            page.driver.execute_script(f"document.querySelector('[name={name}]').value = {value}")
        page.find("#sample").click()
        page.until(lambda: len(page.driver.find_elements("css selector", "#pictures img")) == 2)
        page.find("#live").click()

        def shown():
            images = page.driver.find_elements("css selector", "#pictures img")
            return images[0].get_attribute("src") if len(images) == 1 else None

        first = page.until(shown)
        opens_with = dict(zip(keypoints.JOINTS, draw.about()["poses"][0][1], strict=True))
        elbow, wrist = (np.array(opens_with[name][:2]) for name in ("elbow_left", "wrist_left"))
        page.drag(wrist, wrist + (0.1, 0.2), Keys.SHIFT)
        second = page.until(lambda: shown() != first and shown())
        page.until(lambda: page.text("#unusual") != before)
        page.press("x")
        page.until(lambda: shown() not in (first, second))
        page.driver.execute_script(drop, json.dumps({name: [0.5, 0.5, 1] for name in keypoints.JOINTS}))
        page.until(lambda: page.text("#message").startswith("our own [x, y, visible]"))
        page.driver.execute_script(drop, "nothing")
        page.until(lambda: "is not a known pose file" in page.text("#message"))
        assert "--seed 0 --steps 2" in page.find("#pictures button").get_attribute("title")
