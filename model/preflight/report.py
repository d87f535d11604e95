"""A preflight for people: whether the job fits, what was chosen, what bounds it, hours and dollars, advice."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from model.preflight.plot import bar, terminal_roofline, unit_seconds
from model.preflight.result import Preflight

BAR_WIDTH = 40
# Of preflight's bound, what others have published: MaxText 53 to 57 % MFU (22B on v4-128), Levanter 42 to 54 % (1.4B to 13B on v3-256),
# where bounds are 0.82 to 0.88. This project has had no TPU to measure its own.
REACHED = (0.5, 0.65)


def print_report(found: Preflight, console: Console) -> None:
    """Prints everything: tables, bars, the roofline, advice, notes."""
    console.print(f"[bold]{headline(found)}[/bold]")
    console.print(_table(choice_rows(found)))
    if found.step_seconds is not None:
        console.print(_memory_bar(found), markup=False)
        console.print()
        for name, seconds in unit_seconds(found):
            console.print(f"{name:<13} {bar(seconds / _longest(found), BAR_WIDTH)} {seconds * 1e3:10,.1f} ms", markup=False)
        console.print(
            f"{'step':<13} {bar(found.step_seconds / _longest(found), BAR_WIDTH)} {found.step_seconds * 1e3:10,.1f} ms", markup=False
        )
        console.print()
        console.print(_table(figure_rows(found)))
        console.print(terminal_roofline(found), markup=False)
    if len(found.trials) > 1:
        console.print(_trials(found))
    for line in found.advice:
        console.print(f"advice: {line}", markup=False)
    for line in (*found.notes, *standing_notes(found)):
        console.print(f"note: {line}", markup=False)


def headline(found: Preflight) -> str:
    """One line: the job, where, and whether it fits."""
    slices = f"{found.num_slices} x " if found.num_slices > 1 else ""
    where = f"{slices}{found.accelerator} ({found.num_chips} chips, {found.num_hosts} hosts)"
    memory = (
        "HBM unknown"
        if found.hbm_gib_per_chip is None
        else f"{_at_least(found)}{found.hbm_gib_per_chip:.2f} of {found.hbm_usable_gib:.2f} GiB a chip"
    )
    return f"{found.job} on {where}: {'fits' if found.fits else 'does NOT fit'}, {memory}"


def summary_lines(found: Preflight) -> list[str]:
    """`name: value` lines for a plan: the headline's facts, the choice, the bound, hours and dollars, advice."""
    lines = [f"slice: {headline(found).partition(' on ')[2]}", f"setting: {_setting(found)}"]
    if found.step_seconds is not None:
        lines += [
            f"bound: {found.bound}, {found.step_seconds:.3g} s a step or more, MFU up to {found.mfu_bound_exposed:.2f} (causal attention)",
            f"cost: {_cost(found)}",
            f"expected: {_expected(found)}",
        ]
    return lines + [f"advice: {line}" for line in found.advice]


def choice_rows(found: Preflight) -> list[tuple[str, str]]:
    """What runs, and how."""
    return [
        ("batch", f"{found.train_batch_size} sequences of {found.seq_len} tokens, {found.num_train_steps:,} steps"),
        ("remat", found.remat),
        ("microbatches", str(found.microbatches)),
        ("mesh", _mesh(found)),
        ("compiler options", " ".join([found.flags, *(f"{name}={value}" for name, value in found.compiler_options.items())])),
        *([("attention", found.attention)] if found.attention else []),
    ]


def figure_rows(found: Preflight) -> list[tuple[str, str]]:
    """Work, traffic and bounds of a step, hours and dollars."""
    assert found.executed_flops_per_chip is not None
    assert found.model_flops_per_chip is not None
    ici, dcn = (found.ici_bytes_per_chip or 0.0) / 1e9, (found.dcn_bytes_per_chip or 0.0) / 1e9
    hidden, exposed, colors = found.mfu_bound_hidden, found.mfu_bound_exposed, found.mfu_bound_exposed_by_colors
    overlap = f"{found.ici_async_share:.0%} asynchronous, {found.all_gather_async_share:.0%} of the all-gathers"
    compiling = f"{found.compile_cpu_seconds:.0f} CPU-seconds, {found.lower_cpu_seconds:.1f} to trace and lower"
    return [
        ("model FLOPs", f"{found.model_flops_per_chip / 1e12:,.1f} TFLOP a chip and step"),
        ("executed FLOPs", f"{found.executed_flops_per_chip / 1e12:,.1f} TFLOP, {found.recomputation:.3f} of the model's"),
        ("HBM traffic", f"{(found.hbm_bytes_per_chip or 0) / 1e9:,.1f} GB"),
        ("ICI traffic", f"{ici:,.2f} GB sent, {overlap}"),
        *([("DCN traffic", f"{dcn:,.2f} GB sent")] if found.num_slices > 1 else []),
        ("bound by", f"{found.bound}"),
        ("MFU bound", f"{exposed:.3f} (causal attention at half), {found.mfu_bound_exposed_full_attention:.3f} (whole square)"),
        ("", f"{hidden:.3f} if all communication hid, {colors:.3f} at the rings that the compiler names"),
        ("throughput", f"at most {found.tokens_per_second_per_chip:,.0f} tokens/s a chip"),
        ("cost", _cost(found)),
        ("expected", _expected(found)),
        ("compile", f"{compiling}, {found.peak_rss_gib:.2f} GiB"),
    ]


def standing_notes(found: Preflight) -> list[str]:
    """What a reader must know of any preflight."""
    where = " and slices" if found.num_slices > 1 else ""
    notes = [
        f"gradients are summed over chips{where} in {found.gradient_sum_dtype} (train.gradient_sum_dtype), over microbatches in float32",
    ]
    if found.step_seconds is not None:
        notes += [
            "times, hours and dollars are bounds that no run beats, but for those that are called expected",
            f"prices are list prices as of {found.price['as_of']} ({found.price['source']})",
        ]
    return notes


def _at_least(found: Preflight) -> str:
    return "at least " if found.hbm_is_least else ""


def _cost(found: Preflight) -> str:
    pricing, rate = str(found.price["pricing"]).replace("_", "-"), found.price["dollars_per_chip_hour"]
    return (
        f"{found.hours:,.1f} hours, ${found.dollars:,.0f} or more at ${rate:.2f} per chip-hour "
        f"({pricing} list price in {found.price['region']} as of {found.price['as_of']})"
    )


def _expected(found: Preflight) -> str:
    """What a run will take rather than the bound."""
    assert found.mfu_bound_exposed is not None
    assert found.hours is not None
    assert found.dollars is not None
    low, high = REACHED
    return (
        f"MFU {found.mfu_bound_exposed * low:.2f} to {found.mfu_bound_exposed * high:.2f}, {found.hours / high:,.1f} to "
        f"{found.hours / low:,.1f} hours, ${found.dollars / high:,.0f} to ${found.dollars / low:,.0f}: published runs reach "
        f"{low:.0%} to {high:.0%} of such a bound"
    )


def _setting(found: Preflight) -> str:
    return f"remat {found.remat}, {found.microbatches} microbatch(es), mesh {_mesh(found)}, compiler options {found.flags}"


def _mesh(found: Preflight) -> str:
    return " x ".join(f"{name} {size}" for name, size in found.mesh.items() if size > 1) or "one device"


def _memory_bar(found: Preflight) -> str:
    assert found.hbm_gib_per_chip is not None
    share = found.hbm_gib_per_chip / found.hbm_usable_gib
    assigned = f", {found.hbm_assigned_gib_per_chip:.2f} laid out" if found.hbm_assigned_gib_per_chip is not None else ""
    return f"{'HBM a chip':<13} {bar(share, BAR_WIDTH)} {found.hbm_gib_per_chip:10.2f} of {found.hbm_usable_gib:.2f} GiB{assigned}"


def _longest(found: Preflight) -> float:
    return max(seconds for _, seconds in [*unit_seconds(found), ("step", found.step_seconds or 0.0)])


def _table(rows: list[tuple[str, str]]) -> Table:
    table = Table(show_edge=False, show_header=False, pad_edge=False, box=None)
    table.add_column()
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _trials(found: Preflight) -> Table:
    table = Table(show_edge=False, pad_edge=False)
    for column in ("compiled", "options", "GiB", "ms a step", ""):
        table.add_column(column, overflow="fold")
    for trial in found.trials:
        mesh = "".join(f", {name} {size}" for name, size in (("context", trial.context), ("tensor", trial.tensor)) if size > 1)
        table.add_row(
            f"remat {trial.remat}, microbatches {trial.microbatches}{mesh}",
            trial.flags,
            "" if trial.hbm_gib_per_chip is None else f"{trial.hbm_gib_per_chip:.2f}",
            "" if trial.step_seconds is None else f"{trial.step_seconds * 1e3:,.1f}",
            trial.failure or ("from disk" if trial.from_cache else ""),
        )
    return table
