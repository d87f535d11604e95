"""One optimizer step: sums of loss and gradient over microbatches, divided by the tokens that counted, then AdamW.

Legend: B sequences in the batch, M microbatches, S tokens in a sequence, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from model import llama, partitioning
from model.config import LlamaConfig
from model.context_parallel import context_size, spread_order
from model.linear import Precision
from model.losses import LossSums, next_token_loss
from model.optimizer import make_optimizer
from model.parameters import init_params, param_shapes
from model.train_config import SimpleTrainConfig

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
    """All that a step changes; a checkpoint holds exactly this."""

    step: Any  # int32 scalar: optimizer steps done
    params: Any
    opt_state: Any


def init_state(config: LlamaConfig, train: SimpleTrainConfig, mesh: Mesh) -> TrainState:
    """Fresh weights from `train.seed`, created where they will live."""

    def create() -> TrainState:
        params = init_params(config, jax.random.key(train.seed))
        return TrainState(jnp.zeros((), jnp.int32), params, make_optimizer(train).init(params))

    return jax.jit(create, out_shardings=state_shardings(config, train, mesh))()


def state_shardings(config: LlamaConfig, train: SimpleTrainConfig, mesh: Mesh) -> Any:
    """A TrainState of shardings: where each part of the state lives: the moments beside their weights, everything scalar replicated."""
    params = partitioning.param_shardings(config, mesh)
    replicated = NamedSharding(mesh, PartitionSpec())
    optimizer = make_optimizer(train)
    opt_state = jax.eval_shape(optimizer.init, param_shapes(config))
    placed = optax.tree.map_params(optimizer, lambda _, sharding: sharding, opt_state, params, transform_non_params=lambda _: replicated)
    return TrainState(replicated, params, placed)


def abstract_state(config: LlamaConfig, train: SimpleTrainConfig, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, without making it: what a restore needs."""
    shapes = jax.eval_shape(
        lambda params: TrainState(jnp.zeros((), jnp.int32), params, make_optimizer(train).init(params)), param_shapes(config)
    )
    return jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        shapes,
        state_shardings(config, train, mesh),
    )


def abstract_batch(shape: tuple[int, int], mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of a batch [B, S], as `model.assembly` makes it."""
    dtypes = {"tokens": jnp.int32, "targets": jnp.int32, "loss_weights": jnp.float32, "segment_ids": jnp.int32, "positions": jnp.int32}
    sharding = partitioning.batch_sharding(mesh)
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, dtype in dtypes.items()}


def loss_sums(params: Any, batch: Batch, config: LlamaConfig, train: SimpleTrainConfig, mesh: Mesh | None) -> LossSums:
    """Loss of one batch as sums over its tokens (float32 scalars), with the tokens' total weight beside them; no mesh is one device."""
    precision = Precision(
        jnp.dtype(train.compute_dtype), jnp.dtype(train.gradient_sum_dtype or train.compute_dtype), train.quantized_matmul
    )
    batch = {name: spread_order(x, context_size(mesh), axis=1) for name, x in batch.items()}
    hidden_BSD = llama.hidden_states(
        params,
        batch["tokens"],
        config,
        segment_ids=batch["segment_ids"],
        positions=batch["positions"],
        precision=precision,
        mesh=mesh,
    )
    return next_token_loss(
        hidden_BSD,
        llama.output_head(params),
        batch["targets"],
        batch["loss_weights"],
        z_loss_weight=train.z_loss_weight,
        chunk_size=config.cross_entropy_block_size,
        vocab_size=config.vocab_size,
        logit_soft_cap=config.logit_soft_cap,
        gradient_dtype=precision.gradient,
        mesh=mesh,
    )


def make_train_step(config: LlamaConfig, train: SimpleTrainConfig, mesh: Mesh, num_microbatches: int) -> jax.stages.Wrapped:
    """The jitted step `(state, batch) -> (state, metrics)`; the state is donated.

    A step whose loss or gradient is not finite leaves weights and moments as they were and says so in `metrics["finite"]`.
    """
    optimizer = make_optimizer(train)

    def loss_and_sums(params: Any, batch: Batch) -> tuple[jax.Array, LossSums]:
        sums = loss_sums(params, batch, config, train, mesh)
        return sums.loss, sums

    gradient = jax.grad(loss_and_sums, has_aux=True)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        grads, sums = sum_over_microbatches(gradient, state.params, batch, num_microbatches, mesh)
        grads = jax.tree.map(lambda g: g / sums.weight, grads)
        grad_norm = optax.global_norm(grads)
        finite = jnp.isfinite(sums.loss) & jnp.isfinite(grad_norm)

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        updated = TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state)
        state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, state)

        metrics = {
            "train/loss": sums.loss / sums.weight,
            "train/cross_entropy": sums.cross_entropy / sums.weight,
            "train/z_loss": sums.z_loss / sums.weight,
            "train/tokens": sums.weight,
            "grad/norm/total": grad_norm,
            "finite": finite,
        }
        return state, metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(state_shardings(config, train, mesh), None))


def compile_train_step(
    config: LlamaConfig, train: SimpleTrainConfig, mesh: Mesh, num_microbatches: int, *, tell: Callable[[str], None]
) -> jax.stages.Compiled:
    """The step of `make_train_step`, compiled with `train.compiler_options`, or, after telling why, without them where they are refused."""
    batch = abstract_batch((train.train_batch_size, train.seq_len_for(config)), mesh)
    lowered = make_train_step(config, train, mesh, num_microbatches).lower(abstract_state(config, train, mesh), batch)
    if not train.compiler_options:
        return lowered.compile()
    try:
        return lowered.compile(compiler_options={**train.compiler_options})
    except jax.errors.JaxRuntimeError as error:
        tell(f"the compiler refuses train.compiler_options, so the step is compiled without them: {error}")
        return lowered.compile()


def sum_over_microbatches(
    gradient: Callable[[Any, Batch], tuple[Any, LossSums]], params: Any, batch: Batch, count: int, mesh: Mesh
) -> tuple[Any, LossSums]:
    """Gradient and loss sums of the whole batch, computed `count` parts at a time.

    Sums, not means, are added, so parts with few counted tokens do not weigh more than they should.
    """
    if count == 1:
        return gradient(params, batch)

    def split(x_BS: jax.Array) -> jax.Array:
        # Row i goes to part i % M, so that every device keeps working on rows that it already holds.
        x_MBS = x_BS.reshape(x_BS.shape[0] // count, count, *x_BS.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(x_MBS, NamedSharding(mesh, PartitionSpec(None, *partitioning.batch_sharding(mesh).spec)))

    def add(total: Any, part: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(params, part)), None

    parts = {name: split(x) for name, x in batch.items()}
    zero = jax.tree.map(jnp.zeros_like, params), LossSums(*[jnp.zeros((), jnp.float32)] * len(LossSums._fields))
    return jax.lax.scan(add, zero, parts)[0]
