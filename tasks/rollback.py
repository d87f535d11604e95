"""Takes a run back to one of its checkpoints and past the data that followed it: what people do about a spike of the loss.

PaLM (Chowdhery et al. 2022, section 5.1) went back some 100 steps before each spike and left out 200 to 500 batches from there on.
"""

from __future__ import annotations

import time
from pathlib import Path

from model.batches import BatchLoader
from model.checkpoint_files import checkpoint_damage, steps_in
from model.job import TrainingJob
from model.jumps import read_skipped_data, skip_data
from model.mixture_store import MixtureStore
from tasks.bucket_runs import STEP_EXPORT
from tasks.lease_store import KEY_PREFIX, Owner, newest
from tasks.manifests import manifest_path
from tasks.obligations import Ledger
from tasks.records import StepLeases
from tasks.trainer_child import JOB_FILE, copy_curves
from tasks.training import read_job

SILENCE_SECONDS = 100.0  # more than after which a lease is taken over


def roll_back(run: Path, *, to_step: int, skip_steps: int) -> str:
    """Lets the run go on from `to_step` without the data of the `skip_steps` steps after it; says what was done.

    Later checkpoints are renamed, not deleted. A kill in between leaves a run that stands at one of its checkpoints.

    Raises:
        ValueError: it is no run's directory, the run goes or is finished, or `to_step` is no checkpoint of it that verifies.
    """
    # as the training itself names it: a link in the root is followed, one below it is not
    run = run.expanduser().absolute()
    run = run.parent.parent.resolve() / run.parent.name / run.name
    if not (run / JOB_FILE).is_file() or not (run / "checkpoints").is_dir():
        raise ValueError(f"{run} is no training run: give its directory, artifacts/checkpoints/NAME-...")
    if manifest_path(run).exists():
        raise ValueError(
            f"{run} is finished: start another run from one of its checkpoints (train.initialize_from_checkpoint_path), or train it "
            f"again (--force checkpoints/NAME)"
        )
    job = read_job(run)
    key, leases = f"{KEY_PREFIX}{run}@{job.fingerprint}", StepLeases()
    if not leases.acquire_lock(key, "rollback", acquire_timeout=_patience(key)):
        raise ValueError(f"{run} is being trained at this moment: stop it first (Ctrl-C), it saves before it ends")
    try:
        return _roll_back(run, job, to_step, skip_steps)
    finally:
        leases.release_lock(key, "rollback")


def _patience(key: str) -> float:
    """Seconds to wait for a lease: whether a process of this machine lives is known at once, of another one after its silence."""
    lease, here = newest(key), Owner.current(0)
    if lease is None or lease.owner is None or (lease.owner.host, lease.owner.boot) == (here.host, here.boot):
        return 0.0
    return SILENCE_SECONDS


def _roll_back(run: Path, job: TrainingJob, to_step: int, skip_steps: int) -> str:
    train = job.train
    checkpoints = run / "checkpoints"
    steps = steps_in(checkpoints)
    if skip_steps < 1:
        raise ValueError(f"--skip={skip_steps}: without data left out the same would follow; 200 to 500 steps are usual")
    if to_step not in steps:
        raise ValueError(
            f"--to={to_step} is no checkpoint of {run.name}: it has those of the steps {', '.join(map(str, steps[::-1])) or 'none'}"
        )
    if (damage := checkpoint_damage(checkpoints / str(to_step))) is not None:
        raise ValueError(f"--to={to_step} cannot be used: {damage}. Choose an earlier one")
    if later := [jump for jump in read_skipped_data(run) if jump.step > to_step]:
        raise ValueError(
            f"--to={to_step} is before step {later[0].step}, where data was left out already: going back there would leave out other data "
            f"than what was bad. Choose a checkpoint from step {max(jump.step for jump in later)} on"
        )
    rows = train.batch_schedule.rows_before(to_step + skip_steps) - train.batch_schedule.rows_before(to_step)
    _check_data_left(job, rows)
    # The curve goes back first, and with it its copy, which would bring back the one that is given up.
    copy_curves(run, to_step)
    _forget_obligations(run, to_step)
    aside = [step for step in steps if step > to_step]
    for step in aside:  # the newest first: whatever happens, the run stands at the newest that is left
        (checkpoints / str(step)).rename(checkpoints / f"rolled-back-{step}-{time.time_ns()}")
    skip_data(run, to_step, rows, f"rolled back over {skip_steps} steps", asked_for=True)
    kept = f"; set aside as checkpoints/rolled-back-*: {', '.join(map(str, aside))}" if aside else ""
    return f"{run.name} goes on from step {to_step} and over the next {rows:,} rows when it is run again{kept}"


def _forget_obligations(run: Path, to_step: int) -> None:
    """What was exported and evaluated of later steps is of weights that are given up: the new ones owe it again."""
    Ledger(run).forget_after(to_step)
    for export in run.glob(f"{STEP_EXPORT}*"):
        if int(export.name.removeprefix(STEP_EXPORT)) > to_step:
            export.rename(run / f"rolled-back-{export.name}-{time.time_ns()}")


def _check_data_left(job: TrainingJob, rows: int) -> None:
    """Raises ValueError where the data would end before the run."""
    skipped = rows + sum(jump.rows for jump in read_skipped_data(job.directory))
    needed = job.train.batch_schedule.rows_before(job.train.num_train_steps) + skipped
    try:
        loader = BatchLoader(
            MixtureStore.open(job.mixture),
            seq_len=job.train.seq_len_for(job.model),
            global_batch_size=job.train.train_batch_size,
            seed=job.train.loader_seed,
        )
        loader.check_rows(needed)
    except ValueError as error:
        raise ValueError(f"--skip leaves out {rows:,} rows, and then {error}") from None
