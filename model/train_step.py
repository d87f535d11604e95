"""One optimizer step: sums of loss and gradient over microbatches, divided by the tokens that counted, then the optimizer.

Legend: B sequences in the batch, M microbatches, S tokens in a sequence, D width, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from model import llama, partitioning
from model.bad_steps import RecentSteps, judge_step, no_steps
from model.config import LlamaConfig
from model.context_parallel import context_size, spread_order
from model.linear import Precision
from model.losses import LossSums, next_token_loss
from model.norms import watched_norms
from model.optimizer import make_optimizer
from model.outliers import clip_metrics
from model.parameters import init_params, param_shapes
from model.sophia import sampled_targets, with_sampling_seeds
from model.train_config import SimpleTrainConfig

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
    """All that a step changes; a checkpoint holds exactly this."""

    step: Any  # int32 scalar: optimizer steps done
    params: Any
    opt_state: Any
    ema_params: Any = None  # moving average of params; None where train.ema_beta is unset
    recent: RecentSteps | None = None  # None where train.skip_bad_steps is off

    @property
    def eval_params(self) -> Any:
        """The weights to evaluate, sample from and export: the moving average where there is one."""
        return self.params if self.ema_params is None else self.ema_params


def init_state(config: LlamaConfig, train: SimpleTrainConfig, mesh: Mesh) -> TrainState:
    """Fresh weights from `train.seed`, created where they will live."""

    def create() -> TrainState:
        return first_state(train, init_params(config, jax.random.key(train.seed)))

    return jax.jit(create, out_shardings=state_shardings(config, train, mesh))()


def first_state(train: SimpleTrainConfig, params: Any) -> TrainState:
    """The state before the first step with these weights."""
    ema_params = None if train.ema_beta is None else jax.tree.map(jnp.copy, params)
    recent = no_steps(train.bad_step_window) if train.skip_bad_steps else None
    return TrainState(jnp.zeros((), jnp.int32), params, make_optimizer(train).init(params), ema_params, recent)


def state_shardings(config: LlamaConfig, train: SimpleTrainConfig, mesh: Mesh) -> Any:
    """A TrainState of shardings: where each part of the state lives.

    Averages lie beside their weights. Everything smaller than a weight is replicated: scalars, what steps are judged by, and the
    means over rows and columns that Adafactor keeps instead of a matrix.
    """
    params = partitioning.param_shardings(config, mesh)
    replicated = NamedSharding(mesh, PartitionSpec())
    shapes = jax.eval_shape(functools.partial(first_state, train), param_shapes(config))

    def beside(part: Any, sharding: NamedSharding, weight: jax.ShapeDtypeStruct) -> NamedSharding | optax.MaskedNode:
        if isinstance(part, optax.MaskedNode):
            return part  # weights of another optimizer's
        return sharding if part.shape == weight.shape else replicated

    opt_state = optax.tree.map_params(
        make_optimizer(train),
        beside,
        shapes.opt_state,
        params,
        shapes.params,
        transform_non_params=lambda _: replicated,
        is_leaf=lambda part: isinstance(part, optax.MaskedNode),
    )
    ema_params = None if shapes.ema_params is None else params
    return TrainState(replicated, params, opt_state, ema_params, jax.tree.map(lambda _: replicated, shapes.recent))


def abstract_state(config: LlamaConfig, train: SimpleTrainConfig, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, without making it: what a restore needs."""
    return jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        jax.eval_shape(functools.partial(first_state, train), param_shapes(config)),
        state_shardings(config, train, mesh),
    )


def abstract_batch(shape: tuple[int, int], mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of a batch [B, S], as `model.assembly` makes it."""
    dtypes = {"tokens": jnp.int32, "targets": jnp.int32, "loss_weights": jnp.float32, "segment_ids": jnp.int32, "positions": jnp.int32}
    sharding = partitioning.batch_sharding(mesh)
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, dtype in dtypes.items()}


def loss_sums(params: Any, batch: Batch, config: LlamaConfig, train: SimpleTrainConfig, mesh: Mesh | None) -> LossSums:
    """Loss of one batch as sums over its tokens (float32 scalars), with the tokens' total weight beside them; no mesh is one device.

    A batch with `sampling_seeds` is scored on targets drawn from the model itself, without z-loss.
    """
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
    head_DV, targets_BS, sampled = llama.output_head(params), batch["targets"], "sampling_seeds" in batch
    if sampled:
        targets_BS = sampled_targets(
            hidden_BSD,
            head_DV,
            batch["sampling_seeds"],
            vocab_size=config.vocab_size,
            logit_soft_cap=config.logit_soft_cap,
            mesh=mesh,
        )
    return next_token_loss(
        hidden_BSD,
        head_DV,
        targets_BS,
        batch["loss_weights"],
        z_loss_weight=0.0 if sampled else train.z_loss_weight,
        chunk_size=config.cross_entropy_block_size,
        vocab_size=config.vocab_size,
        logit_soft_cap=config.logit_soft_cap,
        gradient_dtype=precision.gradient,
        mesh=mesh,
    )


def make_eval_step(config: LlamaConfig, train: SimpleTrainConfig, mesh: Mesh) -> jax.stages.Wrapped:
    """The jitted `(params, batch) -> LossSums` of held-out text, over the whole batch on every device."""
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.jit(lambda params, batch: loss_sums(params, batch, config, train, mesh), out_shardings=whole)


def make_train_step(config: LlamaConfig, train: SimpleTrainConfig, mesh: Mesh, num_microbatches: int) -> jax.stages.Wrapped:
    """The jitted step `(state, batch) -> (state, metrics)`; the state is donated.

    A step that `judge_step` finds bad leaves weights and averages as they were. With `train.skip_bad_steps` the run goes on with
    the next batch and `metrics["optim/skipped_step"]` is 1; else nothing at all changes and `metrics["finite"]` is false.
    """
    optimizer = make_optimizer(train, partitioning.param_shardings(config, mesh))

    def loss_and_sums(params: Any, batch: Batch) -> tuple[jax.Array, LossSums]:
        sums = loss_sums(params, batch, config, train, mesh)
        return sums.loss, sums

    def mean_gradient(params: Any, batch: Batch) -> tuple[Any, LossSums]:
        grads, sums = sum_over_microbatches(jax.grad(loss_and_sums, has_aux=True), params, batch, num_microbatches, mesh)
        return jax.tree.map(lambda g: g / sums.weight, grads), sums

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        grads, sums = mean_gradient(state.params, batch)
        grad_norm = optax.global_norm(grads)
        good, recent = judge_step(state.recent, sums.loss / sums.weight, grad_norm, train.bad_step_window)

        def sampled_gradient() -> tuple[Any, jax.Array]:
            gradient, sampled = mean_gradient(state.params, with_sampling_seeds(batch, train.seed, state.step))
            return gradient, sampled.weight

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, step=state.step, sampled_gradient=sampled_gradient)
        params = optax.apply_updates(state.params, updates)
        ema_params = None if train.ema_beta is None else optax.incremental_update(params, state.ema_params, 1 - train.ema_beta)
        updated = TrainState(state.step + 1, params, opt_state, ema_params, state.recent)
        after = jax.tree.map(lambda new, old: jnp.where(good, new, old), updated, state)

        metrics = {
            "train/loss": sums.loss / sums.weight,
            "train/cross_entropy": sums.cross_entropy / sums.weight,
            "train/z_loss": sums.z_loss / sums.weight,
            "train/tokens": sums.weight,
            "finite": good | train.skip_bad_steps,
            **clip_metrics(opt_state),
            **(watched_norms(grads, params) if train.watch_norms else {}),
            "grad/norm/total": grad_norm,
        }
        if recent is not None:
            after = after._replace(step=state.step + 1, recent=recent)
            metrics |= {"optim/skipped_step": ~good, "optim/skipped_steps_in_a_row": recent.skipped}
        return after, metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(state_shardings(config, train, mesh), None))


def compile_train_step(
    config: LlamaConfig,
    train: SimpleTrainConfig,
    mesh: Mesh,
    num_microbatches: int,
    *,
    tell: Callable[[str], None],
    batch_size: int | None = None,
) -> jax.stages.Compiled:
    """The step of `make_train_step`, compiled with `train.compiler_options`, or, after telling why, without them where they are refused.

    batch_size: sequences in the batch; unset: the most that any step of the run has.
    """
    batch = abstract_batch((batch_size or train.batch_schedule.largest, train.seq_len_for(config)), mesh)
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
