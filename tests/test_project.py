"""The project as a whole: who imports whom, and every command and link of the documentation."""
import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

import checkpoint
import dataset.check
import evaluate
import sample
import train

ROOT = Path(__file__).parent.parent
LEAVES = "diffusion", "unet", "vq", "keypoints"
ROOMS = {
    "engine": {"run", "length", "distributed", "process", "cpu", "gpu", "muon", "startup"},
    "dataset": {"figures", "latents", "check", "folder", "bars", "images"},
    "formats": {"pose_files", "compvis", "lpips", "detections"},
    "metrics": {"images", "codebook", "condition", "overfit", "keypoint_detector", "lpips", "pose"},
    "extras": {"density", "editing", "output", "plan", "proportions"},
    "studio": {"__main__", "server", "label", "propose", "draw"},
}
# What a file, or each file of a room, may import of ours; a room stands for all that is in it.
MAY_IMPORT = {
    **dict.fromkeys(LEAVES, ()),
    "ldm": ("unet", "vq", "keypoints"),
    "data": ("engine.startup", "keypoints", "dataset.images"),
    "checkpoint": ("engine.startup", "ldm", "vq", "unet", "keypoints"),
    "plots": ("keypoints", "metrics.overfit"),         # for the bins of timesteps in its heat maps
    "train": (*LEAVES, "ldm", "data", "checkpoint", "dataset.images", "dataset.latents", "engine",
              "metrics", "plots"),
    "sample": ("engine.startup", "engine.cpu", *LEAVES, "ldm", "data", "checkpoint", "formats", "extras", "plots"),
    "evaluate": (*LEAVES, *(room for room in ROOMS if room != "studio"), "ldm", "data", "checkpoint", "sample", "plots"),
    "engine": ("checkpoint", "engine"),
    "dataset": ("keypoints", "data", "dataset", "formats", "plots"),
    "formats": ("keypoints", "unet", "vq", "checkpoint", "formats", "metrics.lpips"),
    "metrics": ("keypoints", "metrics"),
    "extras": ("keypoints", "diffusion", "ldm", "data", "dataset.images", "checkpoint", "formats",
               "extras", "plots"),
    "studio": (*LEAVES, "ldm", "data", "sample", "checkpoint", "dataset", "formats", "metrics",
               "extras", "engine", "plots", "studio"),           # nobody imports studio
}
# The same within functions, for what only some who use a file ever need.
LAZILY = {"data": ("dataset", "formats"), "checkpoint": ("formats",), "train": ("formats",)}


def modules() -> dict[str, Path]:
    """Every module of ours, by its dotted name."""
    files = [*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files}
    return {name: path for name, path in names.items() if not name.endswith(".__init__")}


def imported(nodes: Iterable[ast.AST]) -> set[str]:
    """The modules of ours that import statements among these nodes name."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" if node.module in ROOMS else node.module
                      for alias in node.names}
    return {name for name in found if name.split(".")[0] in MAY_IMPORT}


def imports(path: Path) -> tuple[set[str], set[str]]:
    """The modules of ours that a file imports: as it is read, and within functions."""
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body         # imports for annotations alone never run
                 if not isinstance(node, ast.If) or ast.unparse(node.test) != "TYPE_CHECKING"]
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    inside = {node for function in functions for node in ast.walk(function)}
    return imported(set(ast.walk(tree)) - inside), imported(inside)


def test_the_tree_is_that_of_the_design():
    assert {path.stem for path in ROOT.glob("*.py")} == MAY_IMPORT.keys() - ROOMS.keys()
    for room, files in ROOMS.items():
        assert {path.stem for path in (ROOT / room).glob("*.py")} == files | {"__init__"}
        assert not (ROOT / room / "__init__.py").read_text()


@pytest.mark.parametrize("name", modules())
def test_imports_follow_the_design(name):
    rule = name if name in MAY_IMPORT else name.split(".")[0]
    at_once, lazily = imports(modules()[name])
    for found, allowed in ((at_once, MAY_IMPORT[rule]),
                           (lazily, MAY_IMPORT[rule] + LAZILY.get(rule, ()))):
        assert not {m for m in found if m not in allowed and m.split(".")[0] not in allowed}


def test_nobody_imports_train():
    assert not [name for name, path in modules().items() if "train" in set.union(*imports(path))]


PAGES = [ROOT / "README.md", ROOT / "assets/README.md", *(ROOT / "docs").glob("*.md")]


def blocks(text: str) -> list[str]:
    """The bash blocks of a page."""
    return re.findall(r"^```bash\n(.*?)^```", text, re.S | re.M)


def commands() -> list[str]:
    lines = "\n".join(block for page in PAGES for block in blocks(page.read_text()))
    return sorted({line.split("#")[0].strip() for line in lines.replace("\\\n", " ").splitlines()
                   if re.match(r"(\S*python\S* |torchrun \S+ \S+ )?"
                               r"(train|sample|evaluate|data|checkpoint)\.py ", line)})


def test_the_documentation_has_commands_of_every_kind():
    assert {re.search(r"(\w+)\.py", line)[1] for line in commands()} == {
        "train", "sample", "evaluate", "data", "checkpoint"}


@pytest.mark.parametrize("line", commands())
def test_every_command_of_the_documentation_parses(line):
    words = shlex.split(line)
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    module = {"train.py": train, "sample.py": sample, "evaluate.py": evaluate,
              "data.py": dataset.check, "checkpoint.py": checkpoint}[words[script]]
    args = module.parse_args(words[script + 1:])
    if module is train and not args.dry_run:
        train.make_config(args)
    for word in words[script + 1:]:
        if word.startswith("examples/"):
            assert list(ROOT.glob(word)), word


@pytest.mark.parametrize("command", [
    "train", "sample", "data", *(f"evaluate {name}" for name in evaluate.COMMANDS)])
def test_every_flag_has_a_help_of_one_line(command, capsys, monkeypatch):
    script, *more = command.split()
    module = {"train": train, "sample": sample, "data": dataset.check, "evaluate": evaluate}[script]
    monkeypatch.setenv("COLUMNS", "112")
    with pytest.raises(SystemExit):
        module.parse_args([*more, "--help"])
    flags = re.split(r"\n  (?=\S)", capsys.readouterr().out.split("\noptions:\n")[1])
    for flag in flags:
        said = re.split(r"\n\n", flag)[0]
        name, _, text = re.sub(r"^(\S+( \S+)*)\n {20,}", r"\1  ", said).strip().partition("  ")
        assert text.strip() and "\n" not in text.strip(), flag


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
            for heading in re.findall(r"^#+ (.*)", page.read_text(), re.M)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_links_of_a_page_lead_somewhere(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)]+)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text):
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            file = page.parent / path if path else page
            assert file.exists(), target
            assert not anchor or anchor in anchors(file), target


def test_the_tables_of_the_pages_are_those_of_the_runs():
    tables = subprocess.run([sys.executable, ROOT / "benchmarks/tables.py", "--check"], check=False)
    assert tables.returncode == 0, "run python benchmarks/tables.py"


def test_the_book_has_the_lines_that_the_readme_says():
    told = re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", (ROOT / "README.md").read_text(), re.M)
    assert len(told) == 8
    for name, lines in told:
        there = len((ROOT / name).read_text().splitlines())
        assert abs(there - int(lines)) <= 0.1 * there, f"{name} has {there} lines"


def test_start_has_the_two_commands_and_ci_runs_the_second():
    readme = (ROOT / "README.md").read_text()
    start = blocks(re.search(r"^## Start$(.*?)(?=^## |\Z)", readme, re.S | re.M)[1])
    assert len(start) == 2 and all("pip install -r requirements.txt" in block for block in start)
    assert "train.py --stage vq" in start[0] and "sample.py" in start[0] and "pytest" in start[1]
    script = (ROOT / ".ci/run").read_text().split("[ -n")[0] + 'printf "%s\\n" "$command"'
    taken = subprocess.run(["bash", "-c", script, str(ROOT / ".ci/run")], capture_output=True,
                           text=True, check=True)
    assert taken.stdout == start[1]
