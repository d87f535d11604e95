"""The peers of `train_step.py`: each a function from the specification to one that takes a step and returns the loss before it.

Each runs by its own interpreter, so what it needs is imported inside. All take the window of tokens [B, S + 1] in
`spec["weights"]/tokens.npy`; the last position of a row has no loss, since Levanter gives it none. transformers and Levanter start
from the weights beside it, MaxText from its own.
"""

# Most of what is imported here is in environments of the peers' own.
# pyright: reportMissingImports=false

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

Step = Callable[[], float]

ADAMW: dict[str, Any] = {"learning_rate": 1e-3, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "weight_decay": 0.1}
Z_LOSS_WEIGHT, MAX_GRAD_NORM = 1e-4, 1.0


def window(spec: dict[str, Any]) -> Any:
    """Tokens [B, S + 1], int32; a side learns to predict each from those before it."""
    import numpy as np

    return np.load(Path(spec["weights"]) / "tokens.npy")


def transformers_step(spec: dict[str, Any]) -> Step:
    """`transformers.LlamaForCausalLM` (sdpa) and torch's fused AdamW, float32."""
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(spec["weights"], attn_implementation="sdpa", dtype=torch.float32).train()
    groups: list[dict[str, Any]] = [{"params": [], "weight_decay": ADAMW["weight_decay"]}, {"params": [], "weight_decay": 0.0}]
    for name, parameter in model.named_parameters():
        groups[parameter.ndim != 2 or "embed" in name]["params"].append(parameter)
    rate, betas = ADAMW["learning_rate"], (ADAMW["beta1"], ADAMW["beta2"])
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=betas, eps=ADAMW["epsilon"], fused=True)
    window_BS = torch.from_numpy(window(spec)).long()
    tokens_BS, targets_N = window_BS[:, :-1].contiguous(), window_BS[:, 1:].flatten()
    weights_BS = torch.ones(tokens_BS.shape)
    weights_BS[:, -1] = 0
    weights_N = weights_BS.flatten()

    def take() -> float:
        optimizer.zero_grad(set_to_none=True)
        logits_NV = model(tokens_BS, use_cache=False).logits.flatten(0, 1)
        logsumexp_N = torch.logsumexp(logits_NV, dim=-1)
        target_logits_N = logits_NV.gather(-1, targets_N[:, None])[:, 0]
        losses_N = logsumexp_N - target_logits_N + Z_LOSS_WEIGHT * logsumexp_N**2
        loss = (losses_N * weights_N).sum() / weights_N.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        return loss.item()

    return take


def levanter_step(spec: dict[str, Any]) -> Step:
    """Levanter's LlamaLMHeadModel and its own loss, under optax; `spec["remat"]` is its `gradient_checkpointing`.

    The optimizer is its own too. Its loss shifts the tokens itself, so the last position has no target.
    """
    import equinox as eqx
    import haliax as hax
    import jax
    import jax.numpy as jnp
    import numpy as np
    from levanter.layers.attention import AttentionMask
    from levanter.models.llama import LlamaConfig, LlamaLMHeadModel
    from levanter.models.lm_model import LmExample
    from levanter.optim import AdamConfig
    from safetensors.numpy import load_file

    shape, tokens_BS = spec["shape"], window(spec)
    names = ("hidden_dim", "intermediate_dim", "num_layers", "num_heads", "num_kv_heads")
    config = LlamaConfig(max_seq_len=tokens_BS.shape[1] - 1, gradient_checkpointing=spec["remat"], **{name: shape[name] for name in names})
    vocab, batch = hax.Axis("vocab", shape["vocab_size"]), hax.Axis("batch", tokens_BS.shape[0])
    optimizer = AdamConfig(max_grad_norm=MAX_GRAD_NORM, lr_schedule="constant", warmup=0, **ADAMW).build(100)
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(1, 1), ("data", "model"))
    stack = contextlib.ExitStack()
    stack.enter_context(jax.set_mesh(mesh))
    stack.enter_context(hax.axis_mapping({"batch": "data"}))
    model = eqx.filter_jit(lambda key: LlamaLMHeadModel.init(vocab, config, key=key))(jax.random.key(0))
    model = hax.state_dict.from_torch_compatible_state_dict(model, load_file(Path(spec["weights"]) / "model.safetensors"))
    model = jax.tree.map(jnp.asarray, model)
    state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
    named = hax.named(jnp.asarray(tokens_BS[:, :-1]), (batch, config.max_Pos))
    example = LmExample(tokens=named, loss_weight=hax.ones((batch, config.max_Pos)), attn_mask=AttentionMask.causal())

    @eqx.filter_jit(donate="all")
    def step(model: Any, state: Any) -> tuple[Any, Any, Any]:
        def loss_of(model: Any) -> Any:
            loss = model.compute_next_token_loss(example, logsumexp_weight=Z_LOSS_WEIGHT)
            return loss.scalar() if hasattr(loss, "scalar") else loss

        loss, gradient = eqx.filter_value_and_grad(loss_of)(model)
        updates, state = optimizer.update(gradient, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state, loss

    def take() -> float:
        nonlocal model, state
        model, state, loss = step(model, state)
        jax.block_until_ready((model, state))
        return float(loss)

    return take


def maxtext_step(spec: dict[str, Any]) -> Step:
    """MaxText's own train step, set up by its own functions, float32 on the CPU, remat `full`, from its own initial weights."""
    os.environ["DECOUPLE_GCLOUD"] = "TRUE"
    import jax
    import maxtext
    import numpy as np
    from flax import nnx
    from flax.linen import logical_axis_rules
    from maxtext.trainers.pre_train import train
    from maxtext.utils import sharding, train_utils

    base = Path(str(maxtext.__file__)).parent / "configs" / "base.yml"
    config, recorder = train.initialize(["train", str(base), *_maxtext_options(spec)])
    _, _, shardings, _, mesh, _, _, loader, rampup, _, state = train_utils.setup_train_loop(config, recorder)
    graph, state = nnx.split(state)
    parameters, shardings = sharding.maybe_update_params_sharding_with_opt(config, shardings)
    step, _ = train_utils.jit_train_and_eval_step(
        config, graph, mesh, state, shardings, train.train_step, train.eval_step, None, parameters
    )
    window_BS, batch = window(spec), loader.load_next_batch(rampup_manager=rampup)
    counted_BS = np.ones_like(window_BS[:, 1:])
    counted_BS[:, -1] = 0
    ours = {"inputs": window_BS[:, :-1], "targets": window_BS[:, 1:], "targets_segmentation": counted_BS}
    batch |= {name: jax.device_put(x, batch[name].sharding) for name, x in ours.items()}
    stack = contextlib.ExitStack()
    stack.enter_context(jax.set_mesh(mesh))
    stack.enter_context(logical_axis_rules(config.logical_axis_rules))

    def take() -> float:
        nonlocal state
        state, metrics = step(state, dict(batch))
        jax.block_until_ready(state)
        return float(metrics["scalar"]["learning/loss"])

    return take


def _maxtext_options(spec: dict[str, Any]) -> list[str]:
    shape, window_BS = spec["shape"], window(spec)
    options = {
        "run_name": "compare",
        "base_output_directory": spec["weights"],
        "hardware": "cpu",
        "skip_jax_distributed_system": "true",
        "dataset_type": "synthetic",
        "enable_checkpointing": "false",
        "attention": "dot_product",
        "dtype": "float32",
        "weight_dtype": "float32",
        "decoder_block": "llama2",
        "mlp_activations": '["silu","linear"]',
        "base_emb_dim": shape["hidden_dim"],
        "base_mlp_dim": shape["intermediate_dim"],
        "base_num_decoder_layers": shape["num_layers"],
        "base_num_query_heads": shape["num_heads"],
        "base_num_kv_heads": shape["num_kv_heads"],
        "head_dim": shape["hidden_dim"] // shape["num_heads"],
        "vocab_size": shape["vocab_size"],
        "max_target_length": window_BS.shape[1] - 1,
        "per_device_batch_size": window_BS.shape[0],
        "remat_policy": "full",
        "z_loss_multiplier": Z_LOSS_WEIGHT,
        "gradient_clipping_threshold": MAX_GRAD_NORM,
        "learning_rate": ADAMW["learning_rate"],
        "learning_rate_final_fraction": 1.0,
        "warmup_steps_fraction": 0.0,
        "adam_b1": ADAMW["beta1"],
        "adam_b2": ADAMW["beta2"],
        "adam_eps": ADAMW["epsilon"],
        "adam_weight_decay": ADAMW["weight_decay"],
    }
    return [f"{name}={value}" for name, value in options.items()]
