"""The folder of a training run: where it resumes, when it logs, evaluates, saves. Knows no model.

    config.json  log.jsonl  last.pt  best.pt  samples/STEP.png  curves.png
    step-STEP.pt with --keep-every

Log rows and pictures of a step are written before last.pt. What a kill leaves after the last
checkpoint, the resumed run writes again, with the same content.
"""
from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

import checkpoint
from engine.distributed import any_rank, rank, world

LOG_EVERY = 20                  # steps between lines of log.jsonl
SAVE_SECONDS = 120              # between checkpoints; an evaluation saves too
STATE_FILES = ("last.pt", "best.pt", "log.jsonl", "config.json", "curves.png")
STEP = "[0-9]" * 7              # a step in the name of a file
# What may differ from the run that is resumed. For stage 1 the hash of the weights is compared, not
# the path. With --accept-data the images may differ too.
MAY_DIFFER = {"minutes", "steps", "eval_every", "workers", "device", "compile", "out", "vq",
              "lpips", "keep_every", "micro_batch", "checkpointing", "patience"}
OF_DATA = {"data", "val", "images", "data_hash"}


def read_log(path: Path) -> list[dict]:
    """The rows of a log.jsonl; a line that a kill cut short is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def first_difference(old: dict, new: dict, ignored: set[str]) -> tuple[str, object, object] | None:
    """The first place where two plain configs differ, and both values: ("recipe.lr", a, b). A field
    that `old` lacks is newer than the run, and was off; a field that only `old` has is ignored."""
    for key, now in new.items():
        was = old.get(key, type(now)())
        if key in ignored or was == now:
            continue
        if not (isinstance(was, dict) and isinstance(now, dict)):
            return key, was, now
        if found := first_difference(was, now, set()):
            return f"{key}.{found[0]}", *found[1:]
    return None


def check_same_run(old: dict, new: dict, accept_data: bool) -> None:
    """ValueError where a command of config `new` may not resume the run of config `old`."""
    if found := first_difference(old, new, MAY_DIFFER | (OF_DATA if accept_data else set())):
        name, was, now = found
        if name == "vq_hash":
            raise ValueError(f"{new['out']} holds a run that used another autoencoder than "
                             f"{new['vq']}; give another --out, or --fresh")
        advice = ("--accept-data to resume with the images as they are now" if name in OF_DATA else
                  f"--labels {was or 'off'} to resume it" if name == "labels" else
                  "the old command to resume it")
        raise ValueError(f"{new['out']} holds a run with {name} = {was}, but this command has "
                         f"{name} = {now}; give {advice}, or another --out, or --fresh")


class RunDir:
    """One run in one folder; `start` is its first step, `resumed` the payload of last.pt."""

    def __init__(self, folder: str | Path, stage: str, fresh: bool = False, dry: bool = False):
        """`dry`: a run that only measures its speed and saves nothing."""
        self.dir, self.stage, self.fresh, self.dry = Path(folder), stage, fresh, dry
        self.title = "measuring the speed" if dry else stage            # for a progress bar
        self.last, self.best_path, self.log_path = (
            self.dir / name for name in ("last.pt", "best.pt", "log.jsonl"))
        self.resumed: dict | None = None
        if self.last.exists():
            self._resume()
        self.start = self.resumed["step"] if self.resumed else 0
        self.best = self.resumed["train"]["best"] if self.resumed else None     # score so far
        self.saved_step, self.saved_at = self.start, time.monotonic()
        self.stopped = False                    # by a signal
        self.timed_from: tuple[int, float] | None = None    # (step, time): only steps since then

    def _resume(self) -> None:
        try:
            found = checkpoint.load(self.last, self.stage, "give another --out")
        except checkpoint.WrongStage:
            raise
        except ValueError as e:
            if self.fresh:
                return
            raise ValueError(f"{e}; --fresh starts over") from None
        if not self.fresh:
            if "train" not in found:
                raise ValueError(f"{self.last} holds no training state (a copy of best.pt?) and "
                                 "cannot be resumed; --fresh starts over")
            self.resumed = found

    def begin(self, config: dict) -> None:
        """Call right before the first step: until then --fresh has deleted nothing."""
        self.config, self.steps = config, config["steps"]
        self.eval_every, self.keep_every = config["eval_every"], config["keep_every"]
        self.resumed = None                     # restored by now: gigabytes for a large model
        if rank() > 0:
            return
        (self.dir / "samples").mkdir(parents=True, exist_ok=True)
        names = [*STATE_FILES, f"step-{STEP}.pt"]
        patterns = [f"{name}.partial" for name in names]        # of a write that was killed
        if self.fresh:
            patterns += [*names, f"samples/{STEP}.png"]
        old = [path for pattern in patterns for path in self.dir.glob(pattern)]
        for path in old:
            path.unlink()
        kept = [row for row in read_log(self.log_path) if row["step"] < self.start]
        self._replace(self.log_path, "".join(json.dumps(row) + "\n" for row in kept))
        self._replace(self.dir / "config.json", json.dumps(config, indent=1))
        self.saved_at = time.monotonic()

    def _replace(self, path: Path, text: str) -> None:
        with self.writing(path), checkpoint.replacing(path) as f:
            f.write(text.encode())

    # -------------------------------------------------------------------------- cadence

    def log_due(self, step: int) -> bool:
        return step % LOG_EVERY == 0 or step + 1 == self.steps

    def eval_due(self, step: int) -> bool:
        """After every `eval_every` steps and at the end, but not twice within half of that."""
        left = self.steps - (step + 1)
        return left == 0 or ((step + 1) % self.eval_every == 0 and left >= self.eval_every / 2)

    def save_due(self, step: int) -> bool:
        late = not self.dry and time.monotonic() - self.saved_at >= SAVE_SECONDS
        return self.eval_due(step) or self._kept(step + 1) or late

    def _kept(self, step: int) -> bool:
        return self.keep_every is not None and step % self.keep_every == 0

    def stop_due(self, step: int, told: bool, device: torch.device) -> bool:
        """True in all ranks after the same step, once one was told to stop. On GPUs the ranks agree
        only where the log waits for them anyway."""
        if world() == 1:
            return told
        return (self.log_due(step) or device.type == "cpu") and any_rank(told, device)

    def bar(self) -> tqdm:
        """The steps that are left, with a progress bar."""
        return tqdm(range(self.start, self.steps), initial=self.start, total=self.steps,
                    desc=self.title, unit="step", dynamic_ncols=True, mininterval=1,
                    disable=rank() > 0, leave=not self.dry)

    # -------------------------------------------------------------------------- writing

    def picture(self, step: int) -> Path:
        return self.dir / "samples" / f"{step + 1:07d}.png"

    def images_per_second(self, step: int, batch_size: int) -> dict[str, float]:
        """Of training alone, since the last line of the log; {} after an evaluation or a save."""
        since, self.timed_from = self.timed_from, (step, time.monotonic())
        if since is None or step == since[0]:
            return {}
        return {"img_s": (step - since[0]) * batch_size / (time.monotonic() - since[1])}

    def log(self, step: int, **values: float) -> None:
        with self.writing(self.log_path), open(self.log_path, "a") as f:
            f.write(json.dumps({"step": step, **values}) + "\n")

    def save(self, step: int, payload: dict, score: float | None = None) -> None:
        """After step `step`: step-*.pt every `keep_every` steps, best.pt where `score` (higher is
        better) is the best so far, last.pt. The first two lack the training state. ValueError where
        the weights are not finite."""
        if self.dry:
            return
        self.timed_from = None
        if name := checkpoint.not_finite(payload):
            raise self.diverged(f"{name} is not finite after step {step}")
        better = (score is not None and math.isfinite(score)
                  and (self.best is None or score > self.best))
        self.best = score if better else self.best
        payload = payload | {"format": checkpoint.FORMAT, "step": step + 1, "config": self.config}
        payload["train"] = payload["train"] | {"best": self.best}
        model = {key: value for key, value in payload.items() if key != "train"}
        with self.writing(self.log_path), open(self.log_path, "a") as f:
            os.fsync(f.fileno())    # a power cut leaves no checkpoint whose steps were not logged
        kept = self.dir / f"step-{step + 1:07d}.pt"
        for path, due, content in ((kept, self._kept(step + 1), model),
                                   (self.best_path, better, model), (self.last, True, payload)):
            if due:
                with self.writing(path):
                    checkpoint.save(path, content)
        self.saved_step, self.saved_at = step + 1, time.monotonic()

    @contextmanager
    def writing(self, path: Path) -> Iterator[None]:
        """A full disk or a removed folder ends the run in one sentence."""
        try:
            yield
        except OSError as e:
            raise OSError(f"cannot write {path} ({e.strerror or e}), so the run stops; "
                          f"{self.what_is_saved()}; fix this, then rerun the same command to "
                          "resume") from None

    def what_is_saved(self) -> str:
        if not self.saved_step:
            return "there is no checkpoint yet"
        return f"{self.last} holds the checkpoint of step {self.saved_step}"

    def diverged(self, what: str) -> ValueError:
        return ValueError(f"{what}, so the run stops; {self.what_is_saved()}; start over, in "
                          "another --out or with --fresh, with a lower --lr or --amp off")
