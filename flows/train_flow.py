"""The flow train-llama: raw text -> tokenizer -> tokens -> mixture -> checkpoints -> Hugging Face directory, one task each."""

from __future__ import annotations

import flows.prefect_settings  # noqa: F401  (before Prefect reads its settings)

# isort: split

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Annotated, Any

from prefect import flow, get_run_logger
from prefect.futures import PrefectFuture
from prefect.runtime import flow_run
from prefect.task_runners import ThreadPoolTaskRunner
from pydantic import Field

from flows.run_work import check_hub, owed_work_of
from model.config import LlamaConfig
from model.trackers import TrackerName
from model.train_config import SimpleTrainConfig
from tasks.artifacts import Artifact
from tasks.children import ChildStopped, allow_children, stop_children
from tasks.config import EvalHarnessConfig, ExportConfig
from tasks.datasets import Mixture
from tasks.download import download
from tasks.experiment import resolve_run, root_place
from tasks.export import export_hf
from tasks.mixture import mix
from tasks.owed_work import OwedWork
from tasks.pipeline import StepsFailed, label
from tasks.planning import Plan, plan_run
from tasks.pool_doctor import check_pool
from tasks.preflight import check_accelerator
from tasks.presets import Preset
from tasks.run_report import publish_evaluations, publish_plan, publish_record, publish_report, publish_summary
from tasks.steps import Step
from tasks.tokenization import tokenize as tokenize_dataset
from tasks.tokenize_config import TokenizeConfig
from tasks.training import train as train_model
from tasks.vocabulary import train_vocabulary

TASKS = {
    "raw": download,
    "tokenizers": train_vocabulary,
    "tokens": tokenize_dataset,
    "mixtures": mix,
    "checkpoints": train_model,
    "hf": export_hf,
}


LOOK_SECONDS = 2.0  # between two looks for checkpoints to export or evaluate

# Independent steps, such as tokenizing two datasets, run side by side. (Prefect's own annotation is invariant.)
_TASK_RUNNER: Any = ThreadPoolTaskRunner(max_workers=4)


def _flow_run_name() -> str:
    parameters = flow_run.parameters
    return f"train-llama-{parameters.get('name') or parameters['preset']}"


@flow(name="train-llama", flow_run_name=_flow_run_name, task_runner=_TASK_RUNNER)
def train_llama(
    preset: Preset = Preset.DEBUG,
    name: Annotated[str | None, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}$")] = None,
    num_train_steps: Annotated[int | None, Field(ge=1)] = None,
    train_batch_size: Annotated[int | None, Field(ge=1)] = None,
    learning_rate: Annotated[float | None, Field(gt=0)] = None,
    seed: Annotated[int | None, Field(ge=0, lt=2**31)] = None,
    model: LlamaConfig | None = None,
    train: SimpleTrainConfig | None = None,
    data: Mixture | None = None,
    tokenize: TokenizeConfig | None = None,
    export: ExportConfig | None = None,
    eval_harness: EvalHarnessConfig | None = None,
    track: list[TrackerName] | None = None,
    tags: list[str] | None = None,
    description: str | None = None,
    pool: str | None = None,
    root: str | None = None,
    only: str | None = None,
    force: list[str] | None = None,
) -> list[Artifact]:
    """Pretrains a Llama from raw text and returns the artifacts of its steps, inputs first.

    Args:
        preset: The run to start from; everything below changes it.
        name: Name of the run: directories and trackers use it. Unset: the preset's.
        num_train_steps: Optimizer steps. Unset: the preset's.
        train_batch_size: Sequences in one optimizer step, over all devices. Unset: the preset's.
        learning_rate: Peak learning rate. Unset: the preset's.
        seed: Seed of the weights and of the data order. Unset: the preset's.
        model: The whole model, instead of the preset's.
        train: The whole training configuration, instead of the preset's.
        data: The whole data mixture, instead of the preset's.
        tokenize: Where and how wide tokenization runs. Unset: on threads of this machine.
        export: How the Hugging Face directory is made, instead of the preset's way.
        eval_harness: Tasks of lm-eval that checkpoints are evaluated by, beside the run.
        track: Trackers besides metrics.jsonl; offline without an account.
        tags: Tags for the trackers and the flow run.
        description: What the experiment is for, for its record.
        pool: Work pool that trains, for example one of type tpu. Unset, or inline: this run itself.
        root: Where artifacts lie: a directory, or gs://bucket/prefix. Unset: PREFECT_LLAMA_ROOT, else ./artifacts.
        only: Regular expression: just the steps (kind/name) that it finds, and what they need.
        force: Regular expressions: run the steps (kind/name) that they find although they are there.
    """
    config = resolve_run(
        preset,
        name=name,
        num_train_steps=num_train_steps,
        train_batch_size=train_batch_size,
        learning_rate=learning_rate,
        seed=seed,
        model=model,
        train=train,
        data=data,
        tokenize=tokenize,
        export=export,
        eval_harness=eval_harness,
        track=track,
        tags=tags,
        pool=pool,
    )
    plan = plan_run(config, root_place(root), only=only, force=tuple(force or ()))
    found = None
    if plan.has_training:
        found = check_accelerator(config.name, plan.model, plan.own_train, tell=get_run_logger().info, pool=config.pool)
    if config.pool is not None and plan.trains:
        check_pool(config.pool, plan.root, config.train, tell=get_run_logger().info)
    check_hub(plan)
    publish_plan(plan)
    publish_record(plan, description or "", found)
    return run_and_tell(plan)


def run_and_tell(plan: Plan) -> list[Artifact]:
    """Runs a plan and what it owes besides: exports, evaluations, a push. The outcome is kept in the UI and as the run's page.

    Raises:
        ObligationsLeft: everything is done but some of these, which failed.
    """
    owed = owed_work_of(plan)
    artifacts = run_plan(plan, owed)
    publish_summary(plan, artifacts)
    try:
        if owed is not None:
            publish_evaluations(plan, owed.at_the_end())
    finally:
        publish_report(artifacts)
    return artifacts


def run_plan(plan: Plan, owed: OwedWork | None = None) -> list[Artifact]:
    """Submits every step with its inputs; independent ones run at once, and go on where others fail.

    Whatever ends this call stops the children first. Meanwhile checkpoints are exported and evaluated, where that is asked for.

    Raises:
        StepsFailed: which steps failed, and which were left because of them.
        ChildStopped: a step was stopped on request.
    """
    allow_children()
    futures: dict[str, PrefectFuture[Artifact]] = {}
    try:
        for step in plan.wanted:
            futures[step.fingerprint] = submit(step, plan, futures)
        if owed is not None:
            look_while_running(futures.values(), owed.while_training)
        return artifacts_of({label(step): futures[step.fingerprint] for step in plan.wanted})
    except StepsFailed:  # all have ended; children that are there belong to other runs of this process
        raise
    except BaseException as stop:
        stop_children()
        for future in futures.values():
            future.wait()
        if isinstance(stop, KeyboardInterrupt) and (said := _what_stopped(futures.values())) is not None:
            raise KeyboardInterrupt(str(said)) from said
        raise


def _what_stopped(futures: Iterable[PrefectFuture[Artifact]]) -> ChildStopped | None:
    """What the step says that was stopped, such as where it saved."""
    results = (future.result(raise_on_failure=False) for future in futures if future.state.is_failed() or future.state.is_crashed())
    return next((result for result in results if isinstance(result, ChildStopped)), None)


def artifacts_of(futures: Mapping[str, PrefectFuture[Artifact]]) -> list[Artifact]:
    """The artifacts of the steps, by label, when all have ended. Raises as `run_plan` does."""
    artifacts: list[Artifact] = []
    failed: dict[str, Exception] = {}
    left: list[str] = []
    for name, future in futures.items():
        future.wait()
        if future.state.is_pending():  # an input is not there
            left.append(name)
            continue
        try:
            artifacts.append(future.result())
        except ChildStopped:
            raise
        except Exception as error:
            failed[name] = error
    if failed:
        raise StepsFailed(failed, left) from next(iter(failed.values()))
    return artifacts


def look_while_running(futures: Collection[PrefectFuture[Artifact]], look: Callable[[], None]) -> None:
    """Calls `look` every few seconds until all futures have ended."""
    running = list(futures)
    for future in futures:
        future.add_done_callback(running.remove)
    while left := list(running):
        look()
        left[0].wait(timeout=LOOK_SECONDS)


def submit(step: Step, plan: Plan, futures: dict[str, PrefectFuture[Artifact]]) -> PrefectFuture[Artifact]:
    """Hands one step to its task, with the futures of its inputs."""
    inputs: Any = [futures[upstream.fingerprint] for upstream in step.upstream]
    task = TASKS[step.kind]
    if step.fingerprint in plan.forced:
        task = task.forced()
    return task.submit(step, str(plan.root), inputs)
