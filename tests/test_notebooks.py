"""The notebooks: each runs from top to bottom, and what is committed is the outcome of a run."""
import ast
import base64
import io
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import PIL.Image
import pytest
from IPython.core.inputtransformer2 import TransformerManager

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ROOMS = "dataset", "engine", "extras", "formats", "metrics"
OURS = [*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).glob("*.py"))]
MOST_BYTES, MOST_LINES, MOST_WIDTH = 500_000, 15, 1000
IMAGES = {"image/png", "image/jpeg"}
TIMEOUT = 1200                  # seconds for one cell or for a kernel to start, before it has hung

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def classes(tree: ast.AST) -> set[str]:
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


def files_around() -> set[Path]:
    """What lies where a careless notebook would write."""
    folders = ROOT, ROOT / "notebooks", ROOT / "examples"
    return {path for folder in folders for path in folder.iterdir()}


@each
def test_outputs_are_committed_and_of_one_run(path):
    assert path.stat().st_size < MOST_BYTES, f"{path.stat().st_size:,} bytes"
    nbformat.validate(read(path))
    cells = code(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert any(IMAGES & output.get("data", {}).keys() for output in outputs)


@each
def test_it_repeats_no_class_of_our_files(path):
    to_python = TransformerManager().transform_cell                 # lines of magic too
    theirs = set().union(*(classes(ast.parse(file.read_text())) for file in OURS))
    assert not theirs & set().union(*(classes(ast.parse(to_python(cell.source)))
                                      for cell in code(path)))


@each
def test_the_first_cell_finds_our_files_from_the_root_too(path):
    """Jupyter starts a notebook in its own folder, an editor often in the project's."""
    first = (f"{code(path)[0].source}\nimport importlib.util, os\n"
             "print(os.getcwd(), importlib.util.find_spec('keypoints').origin, sep='\\n')")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run([sys.executable, "-c", first], cwd=ROOT, capture_output=True, text=True,
                         env=env)
    assert run.returncode == 0, run.stderr
    assert [*map(Path, run.stdout.splitlines())] == [ROOT, ROOT / "keypoints.py"]


@each
def test_cells_are_short_and_images_fit_a_page(path):
    for cell in code(path):
        lines = [line for line in cell.source.splitlines() if line.strip()]
        assert len(lines) <= MOST_LINES, f"{cell.id} has {len(lines)} lines"
        for output in cell.outputs:
            for kind in IMAGES & output.get("data", {}).keys():
                shown = io.BytesIO(base64.b64decode(output["data"][kind]))
                width = PIL.Image.open(shown).width
                assert width <= MOST_WIDTH, f"{cell.id} shows an image {width} wide"


@each
def test_exercises_have_three_solutions_that_run(path):
    text = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    assert text.count("<details><summary>Solution") == text.count("</details>") == 3
    solutions = [cell for cell in code(path) if "solution" in cell.metadata.get("tags", ())]
    assert len(solutions) == 3
    assert all(cell.metadata.jupyter.source_hidden for cell in solutions)


@each
def test_links_lead_somewhere(path):
    links = [link for cell in read(path).cells if cell.cell_type == "markdown"
             for link in re.findall(r"\]\(([^)#]+)", cell.source)]
    assert links[0].endswith(f"/blob/main/notebooks/{path.name}"), "opens another one in Colab"
    for link in links[1:]:
        assert link.startswith("https://") or (path.parent / link).exists(), link


def test_the_hundred_lines_are_a_hundred_and_the_first_half_is_its_own():
    path = NOTEBOOKS[0]
    core = "\n".join(cell.source for cell in code(path) if "core" in cell.metadata.get("tags", ()))
    assert 90 <= sum(bool(line.strip()) for line in core.splitlines()) <= 110
    cells = read(path).cells
    part1 = cells[:[cell.id for cell in cells].index("part2")]
    trees = [ast.parse(cell.source) for cell in part1 if cell.cell_type == "code"]
    imported = {name.split(".")[0] for tree in trees for node in ast.walk(tree)
                if isinstance(node, ast.Import | ast.ImportFrom)
                for name in ([node.module] if isinstance(node, ast.ImportFrom)
                             else [alias.name for alias in node.names])}
    assert imported == {"os", "sys", "pathlib", "math", "matplotlib", "torch"}


RUN = """
import sys, nbformat
from nbconvert.preprocessors import ExecutePreprocessor
notebook = nbformat.read(sys.argv[1], as_version=4)
timeout = int(sys.argv[3])
run = ExecutePreprocessor(timeout=timeout, startup_timeout=timeout)
run.preprocess(notebook, {"metadata": {"path": sys.argv[2]}})
assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
"""


@pytest.fixture(scope="module")
def runs(request):
    """The notebooks that are tested, run two at a time, the longest first: outcomes by path."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env["OMP_NUM_THREADS"] = "1"                # two notebooks at a time, each on a core of its own
    wanted = {item.callspec.params["path"] for item in request.session.items
              if "runs" in item.fixturenames}

    def run(path: Path) -> subprocess.CompletedProcess:
        words = [sys.executable, "-c", RUN, str(path), str(path.parent), str(TIMEOUT)]
        return subprocess.run(words, capture_output=True, text=True, env=env)
    before = files_around()
    with ThreadPoolExecutor(2) as pool:
        yield {path: pool.submit(run, path) for path in sorted(wanted)}
    left = files_around() - before - {ROOT / "__pycache__", ROOT / ".pytest_cache"}
    assert not left, f"they left {sorted(left)}"


@pytest.mark.slow
@each
def test_it_runs_from_top_to_bottom(path, runs):
    run = runs[path].result()
    assert run.returncode == 0, run.stderr[-3000:]
