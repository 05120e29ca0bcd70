"""What test files share: the golden numbers of the reference, and its weights by formula."""
import json
import signal
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

GOLDEN = Path(__file__).parent / "golden"
# A script's background ignores Ctrl-C and nohup a hang-up; tests send both to runs.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def golden_weights(prefix: str, model: nn.Module) -> nn.Module:
    """`model` in eval mode, its parameters filled by the formula of golden/README.md.

    `prefix` is what the reference's full names start with, as "model.diffusion_model.".
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            name, shape = prefix + name, tuple(parameter.shape)
            a = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
            if len(shape) == 1:
                a = 1 + 0.1 * a if name.endswith("weight") else 0.1 * a
            elif name.endswith("embedding.weight"):
                a = 0.5 * a
            elif ".lin" in name:
                a = np.abs(a) / np.sqrt(np.prod(shape[1:]))
            else:
                a = a / np.sqrt(np.prod(shape[1:]))
            parameter.copy_(torch.from_numpy(np.asarray(a, dtype=np.float32)))
    return model.eval()


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference over the largest wanted value: random networks amplify."""
    assert got.shape == wanted.shape, f"{list(got.shape)} against {list(wanted.shape)}"
    return ((got.double() - wanted.double()).abs().max() / wanted.double().abs().max()).item()


@pytest.fixture(scope="session")
def golden() -> dict[str, torch.Tensor]:
    """golden/tiny_f4/tensors.npz as tensors, by their keys."""
    with np.load(GOLDEN / "tiny_f4" / "tensors.npz") as arrays:
        return {key: torch.from_numpy(np.asarray(arrays[key])) for key in arrays.files}


@pytest.fixture(scope="session")
def golden_config() -> dict:
    return json.loads((GOLDEN / "tiny_f4" / "config.json").read_text())
