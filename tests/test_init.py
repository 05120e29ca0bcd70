# ruff: noqa: F811    (pytest hands fixtures in by the names under which they are imported)
"""Runs that start from the weights of another: what is taken, what is new, and exact resume."""
from pathlib import Path

import pytest
import torch
from test_data import folder
from test_labels import COMMA, JAPANESE, labelled
from test_train import (  # noqa: F401
    PLAIN,
    Killed,
    command,
    die_after,
    micro,
    one_sentence,
    same,
    trained,
    untimed,
)

import checkpoint
import evaluate
import train
from vq import VectorQuantizer, VQModel


def of(stage: str, out: Path, trained: Path, *flags: str, **how: str) -> list[str]:
    first = ["--init", str(trained / stage / "last.pt")]
    return command(stage, out, "--steps", "4", "--eval-every", "2", *first, *flags, **how)


@pytest.mark.parametrize("stage", ["vq", "ldm"])
def test_a_run_from_other_weights_resumes_bit_for_bit(trained, tmp_path, monkeypatch, capsys, stage):
    assert train.main(of(stage, tmp_path / "whole", trained)) == 0
    assert "all weights fit" in capsys.readouterr().out
    with monkeypatch.context() as m, pytest.raises(Killed):
        die_after(m, 2)
        train.main(of(stage, tmp_path / "cut", trained))
    capsys.readouterr()
    assert train.main(of(stage, tmp_path / "cut", trained)) == 0
    assert "Starting from" not in capsys.readouterr().out
    same(*(checkpoint.load(tmp_path / run / "last.pt", stage) for run in ("whole", "cut")))
    assert untimed(tmp_path / "whole/log.jsonl") == untimed(tmp_path / "cut/log.jsonl")
    one_sentence(capsys, train.main(of(stage, trained / stage, trained)), "in the run folder itself")
    assert train.main(command(stage, tmp_path / "cut", "--steps", "4", "--eval-every", "2")) == 2


def test_the_weights_codes_and_latents_are_those_of_the_first_run(trained, tmp_path, monkeypatch):
    def not_redrawn(*args):
        raise AssertionError("the codes are drawn anew")
    monkeypatch.setattr(VectorQuantizer, "init_codes", not_redrawn)
    still = ["--lr", "1e-9", "--data", "figures:20"]
    assert train.main(of("vq", tmp_path / "vq", trained, *still)) == 0
    assert train.main(of("ldm", tmp_path / "ldm", trained, *still)) == 0
    old, new = (checkpoint.load(root / "ldm/last.pt", "ldm") for root in (trained, tmp_path))
    for name, tensor in old["unet"].items():
        assert torch.allclose(tensor, new["unet"][name], atol=1e-6), name
    same({k: old[k] for k in ("vq", "mean", "std")}, {k: new[k] for k in ("vq", "mean", "std")})


def test_what_cannot_fit_starts_fresh_in_one_line(trained, tmp_path, capsys):
    flags = of("ldm", tmp_path / "maps", trained, "--condition", "maps", "--steps", "2")
    assert train.main(flags) == 0
    line, = (line for line in capsys.readouterr().out.splitlines() if "Starting from" in line)
    assert "all weights" in line
    flags = of("ldm", tmp_path / "tokens", trained, "--condition", "tokens", "--steps", "2")
    assert train.main(flags) == 0
    line, = (line for line in capsys.readouterr().out.splitlines() if "Starting from" in line)
    assert "; fresh: unet.input_blocks.0.0.weight (there [32, 20, 3, 3], here [32, 3, 3, 3])." in line
    flags = command("vq", tmp_path / "no", "--init", str(trained / "nowhere.pt"))
    one_sentence(capsys, train.main(flags), "there is no checkpoint")


def test_labels_are_taken_by_name(trained, tmp_path, capsys):
    first = ["--data", str(labelled(tmp_path / "two", 40, [COMMA, JAPANESE])), "--lr", "1e-9"]
    assert train.main(of("ldm", tmp_path / "a/ldm", trained, *first)) == 0
    assert f"; fresh: label {COMMA}, label {JAPANESE}." in capsys.readouterr().out
    more = ["--data", str(labelled(tmp_path / "three", 40, ["Archer", JAPANESE, COMMA])), "--lr",
            "1e-9"]
    assert train.main(of("ldm", tmp_path / "b/ldm", tmp_path / "a", *more)) == 0
    assert "; fresh: label Archer." in capsys.readouterr().out
    two, three = (checkpoint.load(tmp_path / run / "ldm/last.pt", "ldm") for run in "ab")
    rows = [payload["unet"]["label_emb.weight"] for payload in (two, three)]
    assert torch.allclose(rows[0], rows[1][1:], atol=1e-6) and len(rows[1]) == 3


def test_stage_one_starts_from_a_published_autoencoder_and_trains_without_poses(tmp_path, capsys):
    vq = VQModel(PLAIN)
    torch.save({"state_dict": vq.state_dict(), "global_step": 7}, tmp_path / "vq.ckpt")
    images = folder(tmp_path / "set", 30, (32, 32)) / "images"
    flags = command("vq", tmp_path / "run", "--steps", "2", "--lr", "1e-9", "--data", str(images),
                    "--init", str(tmp_path / "vq.ckpt"), preset="micro_plain")
    for path in (tmp_path / "set/keypoints").iterdir():
        path.unlink()
    (tmp_path / "set/keypoints").rmdir()
    assert train.main(flags) == 0
    out = capsys.readouterr().out
    assert "CompVis" in out and "all weights fit" in out
    payload = checkpoint.load(tmp_path / "run/last.pt", "vq")
    for name, tensor in vq.state_dict().items():
        assert torch.allclose(tensor, payload["vq"][name], atol=1e-6), name
    assert evaluate.main(["recon", "--vq", str(tmp_path / "run/last.pt")]) == 0
    assert "held out of" in capsys.readouterr().out


def test_what_is_taken_and_what_is_not(tmp_path):
    big, small = torch.nn.Linear(3, 2), torch.nn.Linear(2, 2)
    assert checkpoint.take(small, big.state_dict(), "a.pt") == ["weight (there [2, 3], here [2, 2])"]
    assert torch.equal(small.bias, big.bias)
    with pytest.raises(ValueError, match="nothing in a.pt fits"):
        checkpoint.take(small, {"x": torch.ones(1)}, "a.pt")
    with pytest.raises(ValueError, match="not finite"):
        checkpoint.take(small, {"bias": torch.tensor([1, float("nan")])}, "a.pt")


def test_a_run_begun_before_there_were_labels_and_init_goes_on(trained, tmp_path, monkeypatch):
    flags = command("ldm", tmp_path / "old", "--steps", "4", "--vq", str(trained / "vq/last.pt"))
    with monkeypatch.context() as m, pytest.raises(Killed):
        die_after(m, 2)
        train.main(flags)
    payload = checkpoint.load(path := tmp_path / "old/last.pt", "ldm")
    for name in ("labels", "label_names", "init"):
        del payload["config"][name]
    del payload["unet_config"]["num_classes"], payload["config"]["unet_config"]["num_classes"]
    del payload["cond_config"]["hidden"], payload["config"]["cond_config"]["hidden"]
    checkpoint.save(path, payload)
    assert train.main(flags) == 0
    same(*(checkpoint.load(root / "last.pt", "ldm")["unet"] for root in
           (trained / "ldm", tmp_path / "old")))
