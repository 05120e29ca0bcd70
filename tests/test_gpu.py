"""benchmarks/gpu.py, rehearsed on the CPU with networks that take no time."""
import json
import os
import signal
import subprocess
import sys

import pytest
from test_train import ROOT, as_micro

import sample
import train
from benchmarks import gpu

AS_MICRO = ("import sys\n"
            f"sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
            "import pytest, train, test_train\n"
            "test_train.as_micro(pytest.MonkeyPatch())\n"
            "sys.exit(train.main(sys.argv[1:]))")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_the_rehearsal_trains_kills_resumes_and_samples(tmp_path, monkeypatch):
    as_micro(monkeypatch)
    killed, popen = [], subprocess.Popen

    def run_here(argv: list[str], **how) -> subprocess.CompletedProcess:
        main = {"train.py": train.main, "sample.py": sample.main}[os.path.basename(argv[1])]
        return subprocess.CompletedProcess(argv, main(argv[2:]), "", "")

    def start(argv: list[str], **how) -> subprocess.Popen:
        killed.append(popen([sys.executable, "-c", AS_MICRO, *argv[2:]], **how))
        return killed[-1]

    monkeypatch.setattr(gpu.subprocess, "run", run_here)
    monkeypatch.setattr(gpu.subprocess, "Popen", start)
    gpu.main(["--out", str(tmp_path / "out"), "--device", "cpu", "--presets", "micro",
              "--data", "figures:12", "--steps", "24"])
    report = json.loads((tmp_path / "out/gpu.json").read_text())
    assert [(row["stage"], row["mode"]) for row in report["rows"]] == [
        ("vq", "float32"), ("vq", "bf16"), ("ldm", "float32"), ("ldm", "bf16")]
    assert all(row["off_float32"] < 0.02 for row in report["rows"])
    assert killed[0].returncode == -signal.SIGKILL                  # before it was through
    assert report["resume"]["killed and resumed, last loss off by"] == 0
    assert (tmp_path / "out/sample.png").exists()
