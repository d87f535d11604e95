"""One optimizer step: ours beside transformers' LlamaForCausalLM with torch's AdamW, from the same weights on the same batch.

Float32 on the CPU, global-norm clip 1, decay on the Linear weights. The losses of the first and the last step must agree, else the
two did not compute the same and there is no result. Both sides run at their defaults: ours recomputes activations in the backward
pass (`gradient_checkpointing`) and masks attention by segment, the peer does neither. Its AdamW is the fused one.
"""

from __future__ import annotations

import importlib.util
import math
import sys
import tempfile
import time
from typing import Any

from measure import OURS, child, compare, interleave, main, peak_rss_mib, since_spawn, units

BATCH_SIZE, WARM_UP_STEPS, SEED = 8, 2, 0
ADAMW: dict[str, Any] = {"learning_rate": 1e-3, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "weight_decay": 0.1}
CASES = {"debug": (10, 3), "larger": (4, 0)}  # measured steps, and with --quick; 0 leaves the case out


def run(rounds: int, quick: bool) -> dict[str, Any]:
    """Measures each model by turns. Raises RuntimeError where the losses differ."""
    result = {"what": "model.train_step (ours) beside transformers and torch, float32", "packages": ["jax", "torch", "transformers"]}
    if missing := [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]:
        return result | {"skipped": f"{' and '.join(missing)} not installed; `make oracle` installs what is missing"}
    cases = []
    for name, (steps, quick_steps) in CASES.items():
        if quick and not quick_steps:
            continue
        with tempfile.TemporaryDirectory() as weights:
            spec = {"case": name, "weights": weights, "steps": quick_steps if quick else steps}
            what = child(__file__, side="weights", **spec)["what"]
            measured = interleave(__file__, rounds, **spec)
        losses = {key: {side: rows[0][key] for side, rows in measured.items()} for key in ("first_loss", "last_loss")}
        for key, pair in losses.items():
            if not math.isclose(*pair.values(), rel_tol=1e-4):
                raise RuntimeError(f"{name}: {key} differs, {pair}: not the same computation")
        notes = {key.replace("_", " "): " and ".join(f"{loss:.6f}" for loss in pair.values()) for key, pair in losses.items()}
        metrics = compare(measured, units("step", "step"))
        cases.append({"case": what, "rounds": rounds, "notes": notes, "losses": losses, "metrics": metrics})
    return result | {"cases": cases}


def shape(case: str) -> Any:
    """The LlamaConfig of a case."""
    from model.config import LlamaConfig
    from model.presets import MODELS

    if case in MODELS:
        return MODELS[case].with_vocab(2048)
    return LlamaConfig(seq_len=512, hidden_dim=256, intermediate_dim=1024, num_layers=8, num_heads=8, num_kv_heads=8, vocab_size=32000)


def side(spec: dict[str, Any]) -> dict[str, Any]:
    """One child process: the weights are written, or one side takes its steps."""
    if spec["side"] == "weights":
        return write_weights(spec)
    step = (our_step if spec["side"] == OURS else their_step)(spec)
    losses = [step()]
    first = since_spawn(spec)
    losses += [step() for _ in range(WARM_UP_STEPS - 1)]
    cpu, wall, steps = time.process_time(), time.perf_counter(), spec["steps"]
    losses += [step() for _ in range(steps)]
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    losses_found = {"first_loss": losses[0], "last_loss": losses[-1]}
    return {**first, "cpu_s": cpu / steps, "wall_s": wall / steps, **losses_found, "peak_rss_mib": peak_rss_mib()}


def write_weights(spec: dict[str, Any]) -> dict[str, Any]:
    """Our initial weights as a Hugging Face directory, for the peer to load."""
    import jax

    from model.flops import num_parameters
    from model.hf import save_hf
    from model.parameters import init_params

    config = shape(spec["case"])
    save_hf(spec["weights"], config, init_params(config, jax.random.key(SEED)))
    return {
        "what": f"{spec['case']} ({num_parameters(config) / 1e6:.1f} million parameters, sequences of {config.seq_len}, batch {BATCH_SIZE})"
    }


def batch(config: Any) -> tuple[Any, Any]:
    """Tokens and targets [B, S], int64: any will do, the arithmetic is the same."""
    import numpy as np

    window = np.random.default_rng(SEED).integers(0, config.vocab_size, (BATCH_SIZE, config.seq_len + 1))
    return window[:, :-1], window[:, 1:]


def our_step(spec: dict[str, Any]) -> Any:
    """A function that takes one step and returns the loss before it."""
    import jax
    import numpy as np

    from model.feed import place
    from model.partitioning import batch_sharding, make_mesh
    from model.train_config import SimpleTrainConfig
    from model.train_step import init_state, make_train_step

    config, mesh = shape(spec["case"]), make_mesh()
    fixed: dict[str, Any] = {"warmup": 0, "lr_schedule": "constant", "compute_dtype": "float32", "max_grad_norm": 1.0}
    train = SimpleTrainConfig(train_batch_size=BATCH_SIZE, num_train_steps=100, seed=SEED, **fixed, **ADAMW)
    state, step = init_state(config, train, mesh), make_train_step(config, train, mesh, 1)
    tokens_BS, targets_BS = (x_BS.astype(np.int32) for x_BS in batch(config))
    ones_BS, positions_BS = np.ones_like(tokens_BS), np.broadcast_to(np.arange(config.seq_len, dtype=np.int32), tokens_BS.shape)
    arrays = {"tokens": tokens_BS, "targets": targets_BS, "segment_ids": ones_BS, "positions": positions_BS}
    placed = place(arrays | {"loss_weights": ones_BS.astype(np.float32)}, batch_sharding(mesh))

    def take() -> float:
        nonlocal state
        state, metrics = step(state, placed)
        jax.block_until_ready(state)
        return float(metrics["train/loss"])

    return take


def their_step(spec: dict[str, Any]) -> Any:
    """The same function of transformers and torch."""
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(spec["weights"], attn_implementation="sdpa", dtype=torch.float32).train()
    groups: list[dict[str, Any]] = [{"params": [], "weight_decay": ADAMW["weight_decay"]}, {"params": [], "weight_decay": 0.0}]
    for name, parameter in model.named_parameters():
        groups[parameter.ndim != 2 or "embed" in name]["params"].append(parameter)
    rate, betas = ADAMW["learning_rate"], (ADAMW["beta1"], ADAMW["beta2"])
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=betas, eps=ADAMW["epsilon"], fused=True)
    tokens_BS, targets_BS = (torch.from_numpy(x_BS.copy()) for x_BS in batch(shape(spec["case"])))

    def take() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = model(tokens_BS, labels=targets_BS, shift_labels=targets_BS, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return take


if __name__ == "__main__":
    sys.exit(main({"train_step": run}, side))
