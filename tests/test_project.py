"""The project as a whole: who imports whom, and every command of the README."""
import ast
import re
import shlex
import subprocess
from pathlib import Path

import pytest

import checkpoint
import data
import evaluate
import sample
import train

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "keypoints": set(), "vq": set(), "unet": set(), "diffusion": set(),
    "data": {"keypoints"},
    "checkpoint": {"vq", "unet", "keypoints"},
    "sample": {"data", "diffusion", "keypoints", "vq", "unet", "checkpoint"},
    "evaluate": {"data", "diffusion", "keypoints", "vq", "unet", "checkpoint", "sample"},
    "train": {"data", "diffusion", "keypoints", "vq", "unet", "checkpoint", "evaluate"},
}


def imports(path: Path) -> set[str]:
    """The modules of ours that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found & set(MAY_IMPORT)


def test_there_is_one_file_a_component():
    assert {path.stem for path in ROOT.glob("*.py")} == set(MAY_IMPORT)


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_imports_follow_the_design(name):
    assert imports(ROOT / f"{name}.py") <= MAY_IMPORT[name]


def blocks(section: str | None = None) -> list[str]:
    """The bash blocks of the README, or of one of its sections."""
    text = (ROOT / "README.md").read_text()
    if section:
        text = re.search(rf"^## {section}$(.*?)(?=^## |\Z)", text, re.S | re.M)[1]
    return re.findall(r"^```bash\n(.*?)^```", text, re.S | re.M)


def commands() -> list[str]:
    lines = "\n".join(blocks()).replace("\\\n", " ").splitlines()
    return [line.split("#")[0].strip() for line in lines
            if re.match(r"(\S*python\S* |torchrun \S+ \S+ )?(train|sample|evaluate|data|checkpoint)\.py ", line)]


def test_the_readme_has_commands_of_every_kind():
    assert {re.search(r"(\w+)\.py", line)[1] for line in commands()} == {
        "train", "sample", "evaluate", "data", "checkpoint"}


@pytest.mark.parametrize("line", commands())
def test_every_readme_command_parses(line):
    words = shlex.split(line)
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    module = {"train.py": train, "sample.py": sample, "evaluate.py": evaluate, "data.py": data,
              "checkpoint.py": checkpoint}[words[script]]
    args = module.parse_args(words[script + 1:])
    if module is train and not args.dry_run:
        train.make_config(args)
    for word in words[script + 1:]:
        if word.startswith("examples/"):
            assert list(ROOT.glob(word)), word


def test_the_readme_is_finished():
    text = (ROOT / "README.md").read_text()
    assert "RESULTS_TABLE" not in text
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_start_has_the_two_commands_and_ci_runs_the_second():
    start = blocks("Start")
    assert len(start) == 2 and all("pip install -r requirements.txt" in block for block in start)
    assert "train.py --stage vq" in start[0] and "sample.py" in start[0] and "pytest" in start[1]
    script = (ROOT / ".ci/run").read_text().split("[ -n")[0] + 'printf "%s\\n" "$command"'
    taken = subprocess.run(["bash", "-c", script, str(ROOT / ".ci/run")], capture_output=True, text=True, check=True)
    assert taken.stdout == start[1]
