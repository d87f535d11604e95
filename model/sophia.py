"""Sophia-G (Liu et al. 2023): curvature by the Gauss-Newton-Bartlett estimator.

Legend: B sequences, S tokens in a sequence, C chips that a sequence is split over, D width, V vocabulary with its padding.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from model.context_parallel import context_size
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

    def noise(seed: jax.Array) -> jax.Array:
        return jax.random.gumbel(jax.random.key(seed), head_DV.shape[1:])

    def draw(position: tuple[jax.Array, jax.Array]) -> jax.Array:
        hidden_BCD, seeds_BC = position
        logits_BCV = jnp.dot(hidden_BCD, head_DV, preferred_element_type=jnp.float32)
        if logit_soft_cap is not None:
            logits_BCV = logit_soft_cap * jnp.tanh(logits_BCV / logit_soft_cap)
        known_V = jnp.arange(head_DV.shape[1]) < vocab_size  # the rest is padding
        noise_BCV = jax.vmap(jax.vmap(noise))(seeds_BC)
        return jnp.argmax(jnp.where(known_V, logits_BCV + noise_BCV, -jnp.inf), axis=-1).astype(jnp.int32)

    def by_position(x_BS: jax.Array) -> jax.Array:
        """[S / C, B, C, ...]: each of the chips of a sequence works on its own tokens."""
        chips = context_size(mesh)
        return jnp.moveaxis(x_BS.reshape(x_BS.shape[0], chips, -1, *x_BS.shape[2:]), 2, 0)

    positions = by_position(jax.lax.stop_gradient(hidden_BSD)), by_position(seeds_BS)
    targets = jax.lax.map(draw, positions, batch_size=POSITIONS_AT_ONCE)
    return jnp.moveaxis(targets, 0, 2).reshape(seeds_BS.shape)
