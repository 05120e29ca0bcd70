"""What each command meets before its work: old versions, terminals and pipes."""
import ast
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from matplotlib import font_manager
from test_data import folder

import plots
from engine import startup

ROOT = Path(__file__).parent.parent
COMMANDS = "train", "sample", "evaluate", "data", "checkpoint"
NAME = "\u624b"                     # a Chinese character, which cp1252 and ASCII lack


# ----------------------------------------------------------------------------------------- output

def lines(out: Path) -> dict[str, tuple[list[str], Path]]:
    """A small command of each kind, whose names no terminal of cp1252 can print, and what it
    writes."""
    pose, mine = out / f"{NAME}.json", folder(out / f"mine{NAME}", 20)
    pose.write_bytes((ROOT / "examples/poses/waving.json").read_bytes())
    toy, names = str(ROOT / "assets/toy.pt"), {name: out / f"{name}{NAME}" for name in COMMANDS}
    return {
        "sample": ([str(pose), "-n", "1", "--steps", "2", "--ckpt", toy, "--out",
                    f"{names['sample']}.png"], Path(f"{names['sample']}.png")),
        "train": (["--stage", "vq", "--data", "figures:8", "--val", str(mine), "--steps", "1",
                   "--batch-size", "1", "--device", "cpu", "--out", str(names["train"])],
                  names["train"] / "last.pt"),
        "evaluate": (["recon", "--vq", toy, "--data", str(mine), "--limit", "2", "--device", "cpu",
                      "--out", str(names["evaluate"])], names["evaluate"] / "recon.json"),
        "data": ([str(mine), "--workers", "1", "--out", str(names["data"])],
                 names["data"] / "report.json"),
        "checkpoint": ([toy, f"{names['checkpoint']}.pt"], Path(f"{names['checkpoint']}.pt")),
    }


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["cp1252", "ascii", None])
@pytest.mark.parametrize("name", COMMANDS)
def test_no_output_fails_the_work(tmp_path, name, encoding):
    """In an encoding without the character of its names, each command escapes it; with None, the
    pipe of its output and errors is closed, and each line is written at once."""
    words, written = lines(tmp_path)[name]
    env = os.environ | ({"PYTHONIOENCODING": encoding} if encoding else {"PYTHONUNBUFFERED": "1"})
    reading, writing = os.pipe()
    if not encoding:
        os.close(reading)
    done = subprocess.run([sys.executable, "-W", "error::UserWarning:plots", str(ROOT / f"{name}.py"), *words],
                          env=env, cwd=tmp_path, stderr=subprocess.STDOUT,
                          stdout=subprocess.PIPE if encoding else writing)
    os.close(writing)
    assert done.returncode == 0, (done.stdout or b"").decode()
    assert written.exists()
    if encoding:
        os.close(reading)
        assert r"\u624b" in done.stdout.decode("ascii")


@pytest.mark.slow
def test_closed_streams_do_not_fail_the_work(tmp_path):
    words, written = lines(tmp_path)["data"]
    command = [sys.executable, str(ROOT / "data.py"), *words]
    done = subprocess.run(["sh", "-c", '"$@" >&- 2>&-', "sh", *command], cwd=tmp_path)
    assert done.returncode == 0 and written.exists()


# --------------------------------------------------------------------------------------- versions

OLD = {
    "Python": "import sys; sys.version_info = (3, 8, 5); sys.version = '3.8.5 (default)'",
    "torch": "import torch; torch.__version__ = '2.5.1+cpu'",
    "no torch": "import sys; sys.modules['torch'] = None",
}


@pytest.mark.parametrize("old, found", [("Python", "Python 3.8.5"), ("torch", "torch 2.5.1+cpu"),
                                        ("no torch", "torch cannot be imported")])
@pytest.mark.parametrize("name", COMMANDS)
def test_an_old_version_is_told_in_one_sentence(tmp_path, name, old, found):
    script = f"{OLD[old]}\nimport runpy, sys\nsys.argv = ['{name}.py']\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    least = "Python {}.{} and torch {}.{} or newer".format(*startup.LEAST_PYTHON, *startup.LEAST_TORCH)
    assert found in done.stderr and least in done.stderr
    assert least in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_parses_with_python_3_8_and_imports_startup_first(name):
    body = ast.parse((ROOT / f"{name}.py").read_text(), feature_version=(3, 8)).body
    first = [ast.unparse(node) for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert [line for line in first if "__future__" not in line][0] == "from engine import startup"
    ast.parse((ROOT / "engine/startup.py").read_text(), feature_version=(3, 7))


# ------------------------------------------------------------------------------------------ fonts

DEJAVU = font_manager.findfont("DejaVu Sans")           # matplotlib brings it


@pytest.fixture(autouse=True)
def forget_fonts():
    yield
    plots.font_file.cache_clear()


def pages(text: str) -> bytes:
    """A grid and a page of panels with a text everywhere."""
    tile = np.zeros((32, 32, 3), np.uint8)
    grid = plots.save_grid(None, [[tile]], [text], [text], [[text]], text)
    return grid.tobytes() + plots.panels_page(text, {text: lambda ax: ax.plot([0, 1])}).tobytes()


def test_what_no_font_has_is_drawn_as_a_question_mark_without_a_warning(monkeypatch):
    fonts = [font for font in font_manager.fontManager.ttflist
             if font.fname == DEJAVU or font.name.startswith("Last Resort")]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", fonts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn, wanted, other = map(pages, ("\u03c0\u624b\udcff", "\u03c0??", "\u03c4??"))
    assert drawn == wanted != other


def test_the_font_of_this_machine_with_the_most_glyphs_is_taken():
    """STIXGeneral of matplotlib stands for a font with CJK: it has letters that DejaVu lacks."""
    assert Path(plots.font_file("a\u03c0")).name == "DejaVuSans.ttf"
    chosen = plots.font_file("a\u1d84")
    assert plots.drawable("a\u1d84", chosen) == "a\u1d84" != plots.drawable("a\u1d84", DEJAVU)
