"""One optimizer step: ours beside transformers with torch, Levanter and MaxText, float32 on the CPU, on the same batch.

AdamW with decay on the Linear weights, global-norm clip 1, z-loss 1e-4. transformers and Levanter start from our weights, and
their losses of the first and the last step must agree with ours, else they did not compute the same and there is no result.
MaxText starts from its own (its query weights hold the scale of the scores), so of it only a falling loss is asked.
"""

from __future__ import annotations

import importlib.util
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from corpus import Missing
from environments import LEVANTER, MAXTEXT, environment, run_child
from measure import OURS, PEER, bar, child, compare, main, peak_rss_mib, since_spawn, units
from train_step_peers import ADAMW, MAX_GRAD_NORM, Z_LOSS_WEIGHT, Step, levanter_step, maxtext_step, transformers_step, window

BATCH_SIZE, WARM_UP_STEPS, SEED = 8, 2, 0
CASES = {"debug": (10, 3), "larger": (4, 0)}  # measured steps, and with --quick; 0 leaves the case out
PEAK_RSS_MIB = 1.6 * 1024


class Side(NamedTuple):
    """One program that takes the step, and how its process is started."""

    label: str
    remat: bool = True
    packages: tuple[str, tuple[str, ...]] | None = None  # of its own environment
    variables: tuple[tuple[str, str], ...] = ()  # of its process
    of: str = OURS  # what it is compared with


SPINNING = "OMP_WAIT_POLICY"
NO_REMAT = f"{OURS}, no remat"
SIDES = {
    OURS: Side("ours"),
    NO_REMAT: Side("ours, nothing recomputed", remat=False),
    "torch": Side("transformers and torch, OpenMP's threads wait passively", variables=((SPINNING, "passive"), ("GOMP_SPINCOUNT", "0"))),
    "torch, spinning": Side("transformers and torch, OpenMP at its defaults", variables=((SPINNING, ""),)),
    "levanter": Side("Levanter, remat on as by default", packages=LEVANTER),
    "levanter, no remat": Side("Levanter, remat off, ours off too", remat=False, packages=LEVANTER, of=NO_REMAT),
    "maxtext": Side("MaxText, remat full", packages=MAXTEXT),
}
# What our CPU-seconds over the peer's may be at most, in the larger case.
BARS = {"torch": 0.55, "levanter": 0.85, "maxtext": 0.9}


def run(rounds: int, quick: bool) -> dict[str, Any]:
    """Measures each model by turns. Raises RuntimeError where the losses differ."""
    result = {"what": "model.train_step (ours) beside its peers, float32", "packages": ["jax", "torch", "transformers"]}
    if missing := [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]:
        return result | {"skipped": f"{' and '.join(missing)} not installed; `make oracle` installs what is missing"}
    cases, bars = [], []
    for name, (steps, quick_steps) in CASES.items():
        if quick and not quick_steps:
            continue
        measured, what, left_out = _measure(name, rounds, quick_steps if quick else steps, full=name != "debug")
        check_losses(name, measured)
        cases += _cases(measured, what, rounds, left_out)
        if name == "larger":
            bars += bars_of(measured)
    return result | {"cases": cases, "bars": bars}


def _measure(case: str, rounds: int, steps: int, *, full: bool) -> tuple[dict[str, list[dict[str, Any]]], str, str]:
    """Rows by side, what was measured, and what was left out and why; the sides take turns, backwards in every other round."""
    pythons: dict[str, Path | str] = {OURS: sys.executable, "torch": sys.executable}
    left_out = []
    for name, side in SIDES.items() if full else ():
        try:
            pythons[name] = environment(*side.packages) if side.packages else sys.executable
        except Missing as missing:
            left_out.append(f"{name}: {missing}")
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in pythons}
    with tempfile.TemporaryDirectory() as weights:
        spec = {"case": case, "weights": weights, "steps": steps}
        made = child(__file__, side="weights", **spec)
        for number in range(rounds):
            for name in list(pythons) if number % 2 == 0 else reversed(pythons):
                order = {**spec, "side": name, "remat": SIDES[name].remat, "shape": made["shape"], "spawned": time.monotonic()}
                measured[name].append(run_child(pythons[name], __file__, order, **dict(SIDES[name].variables)))
    return measured, made["what"], "; ".join(left_out)


def check_losses(case: str, measured: dict[str, list[dict[str, Any]]]) -> None:
    """Raises RuntimeError where a side's losses are not ours, and for MaxText, which has its own weights, where they do not fall."""
    for name, rows in measured.items():
        if name == "maxtext":
            if not rows[0]["last_loss"] < rows[0]["first_loss"]:
                raise RuntimeError(f"{case}: MaxText's loss does not fall, {rows[0]}")
            continue
        for key in ("first_loss", "last_loss"):
            if not math.isclose(rows[0][key], measured[OURS][0][key], rel_tol=1e-4):
                raise RuntimeError(f"{case}: {key} is {rows[0][key]} for {name}, {measured[OURS][0][key]} for us: not the same computation")


def _cases(measured: dict[str, list[dict[str, Any]]], what: str, rounds: int, left_out: str) -> list[dict[str, Any]]:
    """One for each peer, ours beside it."""
    cases = []
    for name in measured:
        if name == OURS:
            continue
        pair = {OURS: measured[SIDES[name].of], PEER: measured[name]}
        losses = {key: {side: rows[0][key] for side, rows in pair.items()} for key in ("first_loss", "last_loss")}
        notes = {key.replace("_", " "): " and ".join(f"{loss:.6f}" for loss in found.values()) for key, found in losses.items()}
        if left_out:
            notes["left out"] = left_out
        metrics = compare(pair, units("step", "step"))
        cases.append({"case": f"{what}; {SIDES[name].label}", "rounds": rounds, "notes": notes, "losses": losses, "metrics": metrics})
    return cases


def bars_of(measured: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Our CPU-seconds over those of the peers that were measured, and our memory, beside what they may be."""
    bars = []
    for name, most in BARS.items():
        if name in measured:
            ratio = compare({OURS: measured[OURS], PEER: measured[name]}, {"cpu_s": ""})["cpu_s"]["ratio"]
            bars.append(bar(f"CPU-seconds over those of {SIDES[name].label}", ratio, at_most=most))
    peak = compare({OURS: measured[OURS], PEER: measured[OURS]}, {"peak_rss_mib": ""})["peak_rss_mib"][OURS]["median"]
    return [*bars, bar("peak RSS, MiB", peak, at_most=PEAK_RSS_MIB)]


def shape(case: str) -> Any:
    """The LlamaConfig of a case."""
    from model.config import LlamaConfig
    from model.presets import MODELS

    if case in MODELS:
        return MODELS[case].with_vocab(2048)
    return LlamaConfig(seq_len=512, hidden_dim=256, intermediate_dim=1024, num_layers=8, num_heads=8, num_kv_heads=8, vocab_size=32000)


def side(spec: dict[str, Any]) -> dict[str, Any]:
    """One child process: weights and tokens are written, or one side takes its steps."""
    if spec["side"] == "weights":
        return write_weights(spec)
    makers = {"ours": our_step, "torch": transformers_step, "levanter": levanter_step, "maxtext": maxtext_step}
    step = makers[spec["side"].partition(",")[0]](spec)
    losses = [step()]
    first = since_spawn(spec)
    losses += [step() for _ in range(WARM_UP_STEPS - 1)]
    cpu, wall, steps = time.process_time(), time.perf_counter(), spec["steps"]
    losses += [step() for _ in range(steps)]
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    losses_found = {"first_loss": losses[0], "last_loss": losses[-1]}
    return {**first, "cpu_s": cpu / steps, "wall_s": wall / steps, **losses_found, "peak_rss_mib": peak_rss_mib()}


def write_weights(spec: dict[str, Any]) -> dict[str, Any]:
    """Our initial weights as a Hugging Face directory and the tokens beside them, for the sides to load."""
    import jax
    import numpy as np

    from model.flops import num_parameters
    from model.hf import save_hf
    from model.parameters import init_params

    config = shape(spec["case"])
    save_hf(spec["weights"], config, init_params(config, jax.random.key(SEED)))
    # Any tokens will do, the arithmetic is the same.
    tokens_BS = np.random.default_rng(SEED).integers(0, config.vocab_size, (BATCH_SIZE, config.seq_len + 1), dtype=np.int32)
    np.save(Path(spec["weights"]) / "tokens.npy", tokens_BS)
    size = f"{num_parameters(config) / 1e6:.1f} million parameters, sequences of {config.seq_len}, batch {BATCH_SIZE}"
    return {"what": f"{spec['case']} ({size})", "shape": config.model_dump(mode="json")}


def our_step(spec: dict[str, Any]) -> Step:
    """A function that takes one step and returns the loss before it."""
    import jax
    import numpy as np

    from model.feed import place
    from model.partitioning import batch_sharding, make_mesh
    from model.train_config import SimpleTrainConfig
    from model.train_step import init_state, make_train_step

    config, mesh = shape(spec["case"]).model_copy(update={"gradient_checkpointing": spec["remat"]}), make_mesh()
    fixed: dict[str, Any] = {"warmup": 0, "lr_schedule": "constant", "compute_dtype": "float32", "max_grad_norm": MAX_GRAD_NORM}
    fixed |= {"train_batch_size": BATCH_SIZE, "num_train_steps": 100, "seed": SEED, "z_loss_weight": Z_LOSS_WEIGHT}
    train = SimpleTrainConfig(**fixed, **ADAMW)
    state, step = init_state(config, train, mesh), make_train_step(config, train, mesh, 1)
    window_BS = window(spec)
    tokens_BS, targets_BS = window_BS[:, :-1], window_BS[:, 1:]
    ones_BS, positions_BS = np.ones_like(tokens_BS), np.broadcast_to(np.arange(config.seq_len, dtype=np.int32), tokens_BS.shape)
    loss_weights_BS = ones_BS.astype(np.float32)
    loss_weights_BS[:, -1] = 0
    arrays = {"tokens": tokens_BS, "targets": targets_BS, "segment_ids": ones_BS, "positions": positions_BS}
    placed = place(arrays | {"loss_weights": loss_weights_BS}, batch_sharding(mesh))

    def take() -> float:
        nonlocal state
        state, metrics = step(state, placed)
        jax.block_until_ready(state)
        return float(metrics["train/loss"])

    return take


if __name__ == "__main__":
    sys.exit(main({"train_step": run}, side))
