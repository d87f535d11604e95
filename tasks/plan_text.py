"""A plan in words and tables: of the steps that take part, and of what the training amounts to where it is among them."""

from __future__ import annotations

from tasks.formatting import duration, flops, number, size
from tasks.pipeline import label
from tasks.planning import Plan


def plan_lines(plan: Plan) -> list[str]:
    """The plan's numbers as `name: value` lines are made from these pairs joined by a colon."""
    train, model = plan.config.train, plan.model
    batch = str(plan.batch) if plan.batch else f"{train.batch_schedule} sequences, divided over the devices where the training runs"
    if plan.batch and not isinstance(train.train_batch_size, int):
        batch = f"up to {batch}"
    mesh = (
        f"data {plan.batch.data} x fsdp {plan.batch.fsdp} x tensor {plan.batch.tensor}" if plan.batch else "decided where the training runs"
    )
    fetch = [f"fetch: {size(plan.fetch_bytes)} of source files"] if plan.fetch_bytes else []
    warnings = [f"warning: {warning}" for warning in plan.warnings]
    if not plan.has_training:
        return fetch + warnings
    return [
        f"model: {number(plan.num_parameters)} parameters: {model.num_layers} layers, width {model.hidden_dim}, "
        f"mlp {model.intermediate_dim}, {model.num_heads} heads, {model.num_kv_heads} kv heads, vocabulary {model.vocab_size}",
        f"tokens: {number(plan.total_tokens)} = {_steps_and_tokens(plan)}",
        *fetch,
        f"compute: {flops(plan.total_flops)} of model work, causal attention at half",
        f"batch: {batch}",
        f"mesh: {mesh}, {train.compute_dtype} arithmetic, float32 weights",
        f"time: about {duration(plan.seconds)} of training on this machine" if plan.seconds else "time: depends on the accelerator",
        f"disk: up to {size(plan.checkpoint_bytes)} of checkpoints and exports, {size(plan.fetch_bytes)} of source files and about "
        f"{size(plan.token_bytes)} of tokens, below {plan.root}",
        *warnings,
    ]


def _steps_and_tokens(plan: Plan) -> str:
    """`240 steps x 16.4 thousand (64 sequences of 256)`; of a batch that changes, the steps of each size."""
    train, seq_len = plan.own_train, plan.config.seq_len
    stages = train.batch_schedule.stages
    ends = [*(stage.start for stage in stages[1:]), train.num_train_steps]
    parts = [
        f"{end - stage.start} steps x {number(stage.value * seq_len)} ({stage.value} sequences of {seq_len})"
        for stage, end in zip(stages, ends, strict=True)
    ]
    before = plan.origin.step
    return " + ".join(parts) + (f", after step {before} of a run that saw {number(plan.origin.tokens)}" if before else "")


def component_rows(plan: Plan) -> list[tuple[str, str, str, str]]:
    """`(dataset, share of the run, tokens read, epochs of it)` of every dataset that is trained on, for a table."""
    if not plan.has_training:
        return []
    total = sum(component.tokens for component in plan.components) or 1.0
    rows: list[tuple[str, str, str, str]] = []
    for component in plan.components:
        about = "" if component.measured else "about "
        epochs = "not known yet" if component.epochs is None else f"{about}{component.epochs:.3g} of {number(component.available or 0)}"
        rows.append((component.name, f"{100 * component.tokens / total:.4g} %", number(component.tokens), epochs))
    return rows


def plan_rows(plan: Plan) -> list[tuple[str, str, str]]:
    """`(step, action, why)` of every step that takes part, for a table."""
    return [(label(planned.step), planned.action, planned.why) for planned in plan.steps if planned.action != "leave"]
