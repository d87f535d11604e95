"""The roofline of a step: what each unit needs of it in the terminal, and arithmetic intensity against FLOP/s as PNG."""

from __future__ import annotations

import os
from pathlib import Path

from model.flops import CHIPS, Chip
from model.preflight.result import Preflight
from model.slices import slice_named

_FULL, _PART = "\u2588", " \u258f\u258e\u258d\u258c\u258b\u258a\u2589"


def bar(share: float, width: int) -> str:
    """A horizontal bar that fills `share` of `width` characters."""
    eighths = round(min(max(share, 0.0), 1.0) * width * 8)
    return (_FULL * (eighths // 8) + _PART[eighths % 8].strip()).ljust(width)


def terminal_roofline(found: Preflight, *, width: int = 72, height: int = 16) -> str:
    """The roofline drawn with characters, without colour codes: FLOP/s over FLOP per byte of HBM, both logarithmic."""
    import plotext

    chip = CHIPS[slice_named(found.accelerator).generation]
    intensities, roof = _roof(chip)
    intensity, reached = _point(found)
    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plot_size(width, height)
    plotext.title(f"{chip.name}: TFLOP/s of one chip over FLOP per byte of HBM")
    plotext.xscale("log")
    plotext.yscale("log")
    plotext.plot(intensities, [flops / 1e12 for flops in roof], marker="braille", label="roof: HBM, then bf16 peak")
    plotext.scatter([intensity], [reached / 1e12], marker="x", label=f"this step, bound by {found.bound}")
    return plotext.uncolorize(plotext.build())


def write_png(found: Preflight, path: Path) -> None:
    """The same as a picture, with the times of each unit beside it.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    chip = CHIPS[slice_named(found.accelerator).generation]
    figure = Figure(figsize=(11, 4.5), dpi=110, layout="constrained")
    axes, times = figure.subplots(1, 2, width_ratios=(3, 2))
    axes.loglog(*_roof(chip), color="tab:blue", label=f"{chip.name}: HBM {chip.hbm_bytes_per_second / 1e12:.3g} TB/s, bf16 peak")
    axes.loglog(*_point(found), "o", color="tab:orange", markersize=9, label="this step, at its bound")
    axes.set(
        title=f"{found.job} on {found.num_slices} x {found.accelerator}", xlabel="executed FLOP per byte of HBM", ylabel="FLOP/s per chip"
    )
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    rows = unit_seconds(found)
    times.barh([name for name, _ in rows], [seconds * 1e3 for _, seconds in rows], color="tab:blue")
    times.axvline((found.step_seconds or 0.0) * 1e3, color="tab:orange", linestyle="--", label="step")
    times.invert_yaxis()
    times.set(title="each unit at its peak", xlabel="milliseconds of a step")
    times.legend()
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png")
    os.replace(temporary, path)


def unit_seconds(found: Preflight) -> list[tuple[str, float]]:
    """Seconds that each unit needs at its peak, by name."""
    rows = [
        ("compute", found.compute_seconds),
        ("HBM", found.hbm_seconds),
        ("loop by loop", found.on_chip_seconds),
        ("ICI", found.ici_seconds),
        ("ICI, exposed", found.exposed_ici_seconds),
        *([("DCN", found.dcn_seconds)] if found.num_slices > 1 else []),
    ]
    return [(name, seconds) for name, seconds in rows if seconds is not None]


def _roof(chip: Chip) -> tuple[list[float], list[float]]:
    """Attainable FLOP/s over arithmetic intensity (Williams et al. 2009)."""
    ridge = chip.bf16_flops / chip.hbm_bytes_per_second
    intensities = [ridge * 10 ** (step / 20) for step in range(-30, 31)]
    return intensities, [min(chip.bf16_flops, one * chip.hbm_bytes_per_second) for one in intensities]


def _point(found: Preflight) -> tuple[float, float]:
    """Arithmetic intensity of the step, and the executed FLOP/s of its bound."""
    assert found.executed_flops_per_chip is not None
    assert found.hbm_bytes_per_chip is not None
    assert found.step_seconds is not None
    return found.executed_flops_per_chip / found.hbm_bytes_per_chip, found.executed_flops_per_chip / found.step_seconds
