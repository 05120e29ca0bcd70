"""Faults in a person's data: broken images are left out and named; too many of them end a run."""
from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from torch.utils.data import DataLoader
from tqdm import tqdm

if TYPE_CHECKING:
    from data import ImageDataset

WORKER_DIED = ("a process that loads images died, usually because memory or /dev/shm ran out; "
               "rerun the same command with fewer --workers, or 0, to resume")


class DataError(ValueError):
    """A fault in a person's data: one sentence that names the file and says what to do."""


def note_broken(ds: ImageDataset, broken: dict[str, str]) -> None:
    """Adds the broken images {file: reason} to ds.broken and prints those that are new; DataError
    once there are more than ds.most_broken."""
    new = {file: reason for file, reason in broken.items() if file not in ds.broken}
    ds.broken.update(new)
    if len(ds.broken) > ds.most_broken:
        most = math.floor(ds.most_broken)
        raise DataError(f"{len(ds.broken)} images cannot be used, and at most {most} may be "
                        f"broken; the first is {next(iter(ds.broken.values()))}")
    for reason in new.values():
        tqdm.write(f"left out: {reason}", file=sys.stderr)


@contextmanager
def naming_broken(path: str | Path, *datasets: ImageDataset) -> Iterator[None]:
    """Writes the broken images to `path` when the block ends, also after an error."""
    path, how = Path(path), {"encoding": "utf-8", "errors": "surrogateescape"}  # names of any bytes
    try:
        yield
    finally:
        lines = path.read_text(**how).splitlines() if path.exists() else []
        lines += [f"{file}\t{reason}" for ds in datasets for file, reason in ds.broken.items()]
        if lines := dict.fromkeys(lines):
            path.write_text("".join(f"{line}\n" for line in lines), **how)
            print(f"{len(lines)} broken images were left out; {path} names them", file=sys.stderr)


def worker_died(error: BaseException) -> bool:
    """Whether an error says that a process of a DataLoader is gone. torch raises it wherever the
    main process is, most often in the middle of a training step."""
    return isinstance(error, (ConnectionError, EOFError)) or str(error).startswith(
        ("DataLoader worker", "Pin memory thread"))


def fetch(loader: DataLoader) -> Iterator:
    """The loader's items; DataError if one of its processes dies."""
    try:
        yield from loader
    except (RuntimeError, ConnectionError, EOFError) as error:
        if worker_died(error):
            raise DataError(WORKER_DIED) from error
        raise
