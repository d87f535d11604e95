"""Sophia-G (Liu et al. 2023): curvature by the Gauss-Newton-Bartlett estimator.

Legend: B sequences, S tokens in a sequence, D width, V vocabulary with its padding.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from model.optimizer_config import SophiaConfig
from model.partitioning import constrain

POSITIONS_AT_ONCE = 32  # logits of so many positions of every sequence exist at a time


def scale_by_sophia_g(sophia: SophiaConfig) -> optax.GradientTransformationExtraArgs:
    """The average of gradients over gamma * curvature, clipped. `update` takes `sampled_gradient`, called when curvature is due.

    It returns the mean gradient on targets drawn from the model, and the number of targets n: their curvature is n * gradient^2,
    whose expectation is the diagonal of the Gauss-Newton matrix. No second derivative is taken, so fused kernels need none.
    """
    sophia_descent = optax.contrib.sophia(
        1.0,
        weight_decay=0.0,
        b1=sophia.beta1,
        b2=sophia.beta2,
        eps=sophia.epsilon,
        gamma=sophia.gamma,
        clip_threshold=sophia.clip_threshold,
        update_interval=sophia.update_interval,
        hessian_diagonal_fn=optax.GradientTransformationExtraArgs(optax.init_empty_state, _gauss_newton_bartlett),
    )
    return optax.chain(sophia_descent, optax.scale(-1.0))


def _gauss_newton_bartlett(updates: Any, state: optax.OptState, params: Any = None, **extra: Any) -> tuple[Any, optax.OptState]:
    gradient, num_targets = extra["sampled_gradient"]()
    return jax.tree.map(lambda g: num_targets * g * g, gradient), state


def with_sampling_seeds(batch: dict[str, jax.Array], seed: int, step: jax.Array) -> dict[str, jax.Array]:
    """The batch with a seed for every token's target (uint32 [B, S]): draws depend neither on the mesh nor on microbatches."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return {**batch, "sampling_seeds": jax.random.bits(key, batch["tokens"].shape)}


def sampled_targets(
    hidden_BSD: jax.Array,
    head_DV: jax.Array,
    seeds_BS: jax.Array,
    *,
    vocab_size: int | None,
    logit_soft_cap: float | None,
    mesh: Mesh | None,
) -> jax.Array:
    """Targets int32 [B, S] drawn from the model's own distribution (Gumbel's trick), a few positions at a time."""
    vocab_size = head_DV.shape[1] if vocab_size is None else vocab_size
    # Gathered here, once: left to the compiler it is gathered again for every few positions.
    head_DV = constrain(jax.lax.stop_gradient(head_DV).astype(hidden_BSD.dtype), (None, "vocab"), mesh)

    def draw(position: tuple[jax.Array, jax.Array]) -> jax.Array:
        hidden_BD, seeds_B = position
        logits_BV = jnp.dot(hidden_BD, head_DV, preferred_element_type=jnp.float32)
        if logit_soft_cap is not None:
            logits_BV = logit_soft_cap * jnp.tanh(logits_BV / logit_soft_cap)
        noise_BV = jax.vmap(lambda seed: jax.random.gumbel(jax.random.key(seed), head_DV.shape[1:]))(seeds_B)
        known_V = jnp.arange(head_DV.shape[1]) < vocab_size  # the rest is padding
        return jnp.argmax(jnp.where(known_V, logits_BV + noise_BV, -jnp.inf), axis=-1).astype(jnp.int32)

    hidden_SBD = jax.lax.stop_gradient(hidden_BSD).swapaxes(0, 1)
    return jax.lax.map(draw, (hidden_SBD, seeds_BS.swapaxes(0, 1)), batch_size=POSITIONS_AT_ONCE).swapaxes(0, 1)
