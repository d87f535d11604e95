"""What a person sees of a whole run: the plan before it, the summary after it; in the terminal and in the Prefect UI."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect.artifacts import create_image_artifact, create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext, get_run_context
from prefect.logging import get_run_logger
from prefect.utilities.urls import url_for

from tasks.artifacts import Artifact
from tasks.experiment_record import launch_record, record_markdown
from tasks.plan_text import component_rows, plan_lines, plan_rows
from tasks.planning import Plan
from tasks.prefect_artifacts import image_url, keep
from tasks.run_page import write_run_page
from tasks.summary import RunSummary

if TYPE_CHECKING:
    from model.preflight.result import Preflight


def publish_plan(plan: Plan) -> None:
    """Keeps the plan, what is reused and what runs and why, as an artifact of the flow run; each task logs its own part."""
    actions = [action for _, action, _ in plan_rows(plan)]
    get_run_logger().info("%d step(s) reused, %d to run, artifacts below %s", actions.count("reuse"), actions.count("run"), plan.root)
    rows = "\n".join(f"| {name} | {action} | {why} |" for name, action, why in plan_rows(plan))
    numbers = "\n".join(f"- {line}" for line in plan_lines(plan))
    keep(lambda: _tag_flow_run(["train-llama", f"run:{plan.config.name}", *plan.config.tags]))
    data = "\n".join("| " + " | ".join(row) + " |" for row in component_rows(plan))
    tables = f"| dataset | share | tokens | epochs |\n|---|---|---|---|\n{data}\n\n| step | action | why |\n|---|---|---|\n{rows}"
    keep(lambda: create_markdown_artifact(f"{numbers}\n\n{tables}", key="plan", description="Plan"))


def publish_record(plan: Plan, description: str, found: Preflight | None = None) -> None:
    """Writes the record of the experiment, and keeps it as an artifact of the flow run; nothing where the plan trains nothing.

    `found`: what preflight says of the slice, where the run asks for one.

    Raises:
        StorageError: the root cannot be written.
    """
    written = launch_record(plan, description, _this_flow_run(), found)
    if written is None:
        return
    place, record = written
    get_run_logger().info("the experiment's record is %s", place)
    keep(lambda: create_markdown_artifact(record_markdown(place, record), key="experiment-record", description="Experiment record"))


def _this_flow_run() -> dict[str, str]:
    """`id`, `name` and, where a UI shows it, `url` of the flow run."""
    run = get_run_context()
    if not isinstance(run, FlowRunContext) or run.flow_run is None:
        return {}
    url = url_for("flow-run", obj_id=run.flow_run.id)
    return {"id": str(run.flow_run.id), "name": run.flow_run.name, **({"url": url} if url else {})}


def publish_summary(plan: Plan, artifacts: list[Artifact]) -> None:
    """Keeps the outcome as artifacts of the flow run, trained now or reused: metrics, curve, samples, places, summary."""
    summary = RunSummary.of(artifacts)
    if summary is None:
        return
    get_run_logger().info(summary.headline())
    name, rows = plan.config.name, summary.rows()
    table = [{key: row.get(key, "") for key in ("step", "train/loss", "eval/loss", "eval/bpb")} for row in rows]
    samples = "\n\n".join(f"**{sample['prompt']}**\n\n```\n{sample['text']}\n```" for sample in summary.samples) or "no samples"
    image = image_url(summary.directory / "loss.png")
    place = summary.place
    link = place.as_uri() if isinstance(place, Path) else place.console_url
    keep(lambda: create_table_artifact(_thin(table), key="train-metrics", description=f"Metrics of {name}"))
    keep(lambda: create_image_artifact(image, key="loss-curve", description=f"Loss of {name}"))
    keep(lambda: create_markdown_artifact(samples, key="samples", description=f"Samples of {name}"))
    keep(lambda: create_link_artifact(link, link_text=str(place), key="checkpoint", description="Checkpoint"))
    keep(lambda: create_markdown_artifact(summary.markdown(), key="run-summary", description=f"Summary of {name}"))


def publish_evaluations(plan: Plan, rows: list[dict[str, Any]]) -> None:
    """Keeps the numbers of lm-eval as a table of the flow run; nothing where there are none."""
    if not rows:
        return
    for name, value in rows[-1].items():
        get_run_logger().info("%s %s", name, value)
    keep(lambda: create_table_artifact(rows, key="evaluations", description=f"lm-eval on {plan.config.name}"))


def publish_report(artifacts: list[Artifact]) -> None:
    """Writes the page of the run that is among the artifacts, beside it; nothing where none is. A page that fails is told."""
    summary = RunSummary.of(artifacts)
    if summary is None:
        return
    try:
        page = write_run_page(summary.place)
    except (ValueError, OSError) as error:
        get_run_logger().warning("the run's report was not written: %s", error)
        return
    get_run_logger().info("the run's report is %s", page)


def _thin(rows: list[dict[str, Any]], most: int = 200) -> list[dict[str, Any]]:
    """At most about `most` rows: evenly spread ones, every row with an evaluation, and the last."""
    stride = max(1, -(-len(rows) // most))
    return [row for i, row in enumerate(rows) if i % stride == 0 or row["eval/loss"] != "" or i == len(rows) - 1]


def _tag_flow_run(tags: list[str]) -> None:
    """Adds tags to the flow run. Tasks get none: for every tag of a task Prefect asks the server for a concurrency slot."""
    run = get_run_context()
    if isinstance(run, FlowRunContext) and run.flow_run is not None:
        with get_client(sync_client=True) as client:
            client.update_flow_run(run.flow_run.id, tags=sorted({*run.flow_run.tags, *tags}))
