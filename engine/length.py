"""How long a run is: the steps of --minutes, the length that a resumed run keeps, and its end."""
from __future__ import annotations

import math
from collections.abc import Callable

from checkpoint import plural
from engine.distributed import print0
from engine.run import RunDir, read_log

EVAL_SHARE, MAX_EVALS = 0.05, 100       # evaluations: share of a run's time, and number
FEW_STEPS = 100                         # a --minutes run of fewer gets a warning


def fix_length(minutes: float | None, steps: int | None, eval_every: int | None, spent: float,
               step_s: float, eval_s: float) -> dict:
    """The length of a run. What is None follows from the seconds of a step and of an evaluation,
    and those `spent` on preparation; evaluations get EVAL_SHARE of the time."""
    if steps is None:
        with_evals = step_s / (1 - EVAL_SHARE)
        if eval_every:
            with_evals = step_s + eval_s / eval_every
        steps = max(1, int((60 * minutes - spent - eval_s) / with_evals))
        print0(f"{plural(minutes, 'minute')} minus {spent:.0f} s of preparation allow "
               f"{plural(steps, 'step')} of {step_s:.2g} s, evaluations of {eval_s:.2g} s")
        if steps < FEW_STEPS:
            print0(f"{plural(steps, 'step')} are too few to train a useful model; give more "
                   "--minutes, or --steps")
    pays = EVAL_SHARE * steps * step_s / eval_s             # evaluations, the measured one included
    evals = min(MAX_EVALS, max(1, int(pays) - 1))
    return {"steps": steps, "eval_every": eval_every or math.ceil(steps / evals)}


def resumed_length(old: dict, new: dict) -> dict:
    """The length of the run of config `old`, which a command of config `new` resumes."""
    steps, minutes = old["steps"], old["minutes"]
    if (new["steps"] or steps) != steps or new["minutes"] not in (None, minutes):
        print0(f"{new['out']} keeps its length of {steps} steps; to go on after them, give "
               f"--init {new['out']}/last.pt and another --out")
    return {"steps": steps, "minutes": minutes,
            "eval_every": new["eval_every"] or old["eval_every"]}


def is_complete(run: RunDir, step: int, steps: int | None, patience: int | None,
                overfitting: Callable[[list[dict], int], str | None]) -> bool:
    """True if nothing is left to train after `step` of the `steps`, or if the log up to there ends
    a run with --patience; prints why."""
    if step and step == steps:
        print0(f"{run.dir} is complete at step {step}; see {run.dir}/curves.png and "
               f"{run.dir}/samples/. --fresh starts over.")
        return True
    rows = [row for row in read_log(run.log_path) if row["step"] < step]
    warning = overfitting(rows, patience) if patience and step else None
    if warning:
        print0(f"{run.dir} is out of patience at step {step} of {steps}: {warning} Use "
               f"{run.best_path}, or rerun without --patience {patience} to train to the end.")
    return bool(warning)
