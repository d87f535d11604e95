"""Mesh, rules and shardings on 8 virtual devices, and the sharded model against the model on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from model.config import LlamaConfig
from model.llama import init_params
from model.partitioning import MESH_AXES, batch_sharding, constrain, gathered, make_mesh, param_shardings, spec
from model.train_config import SimpleTrainConfig
from model.train_step import loss_sums

CONFIG = LlamaConfig(
    seq_len=24, hidden_dim=32, intermediate_dim=48, num_layers=3, num_heads=4, num_kv_heads=2, vocab_size=64, cross_entropy_block_size=10
)

TRAIN = SimpleTrainConfig(train_batch_size=8, num_train_steps=1, learning_rate=1e-3, z_loss_weight=1e-2, compute_dtype="float32")


def batch(rows: int = 8) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    lengths = (9, 1, 14)
    return {
        "tokens": jnp.asarray(rng.integers(0, 64, (rows, 24)), jnp.int32),
        "targets": jnp.asarray(rng.integers(0, 64, (rows, 24)), jnp.int32),
        "loss_weights": jnp.asarray(rng.random((rows, 24)) > 0.2, jnp.float32),
        "segment_ids": jnp.asarray(np.tile(np.repeat([1, 2, 3], lengths), (rows, 1)), jnp.int32),
        "positions": jnp.asarray(np.tile(np.concatenate([np.arange(n) for n in lengths]), (rows, 1)), jnp.int32),
    }


def mean_loss(params: dict, batch: dict[str, jax.Array], config: LlamaConfig, mesh: jax.sharding.Mesh | None) -> jax.Array:
    sums = loss_sums(params, batch, config, TRAIN, mesh)
    return sums.loss / sums.weight


def assert_same_arrays(actual: dict, expected: dict) -> None:
    """Two parameter trees, bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


loss_and_gradients = jax.value_and_grad(mean_loss)


@functools.cache
def on_one_device(tied: bool, variant: bool = False) -> tuple[LlamaConfig, dict, jax.Array, dict]:
    """Configuration, weights, loss and gradients without a mesh. variant: with all that a plain Llama has not."""
    norms = {"qk_norm": True, "hybrid_norm": True, "input_embedding_norm": True}
    more = {**norms, "attention_bias": True, "mlp_bias": True, "sliding_window": 5} if variant else {}
    config = CONFIG.model_copy(update={"tie_word_embeddings": tied, **more})
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(7))
    if variant:  # no norm all ones, no bias zero
        params = jax.tree.map(lambda x: x + 0.1 * jnp.sin(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape), params)
    return config, params, *jax.jit(loss_and_gradients, static_argnums=(2, 3))(params, batch(), config, None)


@pytest.mark.parametrize(
    ("sizes", "tied", "variant"),
    [
        pytest.param({}, False, False, marks=pytest.mark.slow),
        ({"fsdp_ring": 2}, False, False),
        ({"data": 2, "tensor": 2}, False, False),
        ({"context": 2, "tensor": 2}, False, False),
        ({"fsdp_ring": 2, "tensor": 2}, True, False),
        pytest.param({"context": 2, "tensor": 2}, False, True, marks=pytest.mark.slow),
    ],
)
def test_sharded_loss_and_gradients_equal_one_device(sizes: dict[str, int], tied: bool, variant: bool) -> None:
    config, params, loss, gradients = on_one_device(tied, variant)
    mesh = make_mesh(**sizes)
    shardings = param_shardings(config, mesh)
    step = jax.jit(loss_and_gradients, static_argnums=(2, 3), out_shardings=(None, shardings))
    sharded_loss, sharded_gradients = step(jax.device_put(params, shardings), jax.device_put(batch(), batch_sharding(mesh)), config, mesh)

    np.testing.assert_allclose(sharded_loss, loss, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, atol=5e-6 * float(jnp.abs(a).max())), gradients, sharded_gradients)


def test_initial_weights_do_not_depend_on_the_mesh() -> None:
    _, alone, _, _ = on_one_device(tied=False)
    shardings = param_shardings(CONFIG, make_mesh(data=2, tensor=2))
    sharded = jax.jit(init_params, static_argnums=0, out_shardings=shardings)(CONFIG, jax.random.key(7))
    assert_same_arrays(alone, sharded)


def test_fsdp_takes_the_devices_that_are_left() -> None:
    assert MESH_AXES == ("data", "fsdp", "fsdp_ring", "context", "tensor")
    assert dict(make_mesh().shape) == dict(zip(MESH_AXES, (1, 8, 1, 1, 1), strict=True))
    assert dict(make_mesh(data=2, tensor=2).shape) == dict(zip(MESH_AXES, (2, 2, 1, 1, 2), strict=True))
    assert dict(make_mesh(context=2, fsdp_ring=2).shape) == dict(zip(MESH_AXES, (1, 2, 2, 2, 1), strict=True))
    with pytest.raises(ValueError, match="fsdp_ring=3 does not divide the 8 devices"):
        make_mesh(fsdp_ring=3)
    assert make_mesh(tensor=2, devices=jax.devices()[:2]).devices.size == 2


@pytest.mark.parametrize("sizes", [{"tensor": 3}, {"data": 16}, {"data": 4, "tensor": 4}, {"data": 0}])
def test_mesh_that_devices_do_not_fill_is_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"train.data_parallel_size=.* train.tensor_parallel_size=.* 8 devices"):
        make_mesh(**sizes)


def test_specs_follow_the_rules() -> None:
    mesh = make_mesh(data=2, tensor=2)
    assert spec(("batch", None, "heads"), mesh) == P(("data", "fsdp"), None, "tensor")
    assert spec(("layers", "embed", "mlp"), mesh) == P(None, "fsdp", "tensor")
    assert spec(("batch", "vocab"), make_mesh()) == P("fsdp", None)
    assert spec(("embed", "vocab"), mesh, (33, 64)) == P(None, "tensor")
    assert spec(("mlp_fsdp", None), mesh, (64, 3)) == P(("tensor", "fsdp"), None)
    assert spec(("mlp_fsdp", None), mesh, (6, 3)) == P("tensor", None), "the axes before the one that does not divide are kept"
    assert gathered(P(("tensor", "fsdp", "fsdp_ring"), None)) == P("tensor", None)
    assert gathered(P(("fsdp", "fsdp_ring"), "tensor"), keep=("fsdp",)) == P("fsdp", "tensor")
    with pytest.raises(ValueError, match="logical axis 'expert' has no rule"):
        spec(("expert",), mesh)


def test_every_matrix_is_split_over_the_whole_mesh() -> None:
    mesh = make_mesh(tensor=2)
    params = jax.device_put(init_params(CONFIG, jax.random.key(0)), param_shardings(CONFIG, mesh))
    matrices = [params["embed"], params["head"], *(x for x in params["layers"].values() if x.ndim == 3)]
    assert len(matrices) == 9
    for matrix in matrices:
        assert matrix.addressable_shards[0].data.size * 8 == matrix.size


def test_width_that_fsdp_does_not_divide_stays_whole() -> None:
    config = CONFIG.model_copy(update={"hidden_dim": 36})
    shardings = param_shardings(config, make_mesh())
    assert shardings["embed"].is_fully_replicated
    assert shardings["layers"]["wq"].is_fully_replicated


@pytest.mark.parametrize(("field", "value"), [("num_heads", 6), ("num_kv_heads", 2), ("intermediate_dim", 50), ("vocab_size", 65)])
def test_dimension_that_tensor_does_not_divide_is_named(field: str, value: int) -> None:
    config = CONFIG.model_copy(update={"num_heads": 8, "num_kv_heads": 4, "head_dim": 8, **{field: value}})
    with pytest.raises(ValueError, match=rf"model.{field}={value} .* tensor=4.*train.tensor_parallel_size"):
        param_shardings(config, make_mesh(tensor=4))


def test_batch_rows_go_to_data_and_fsdp() -> None:
    rows = jax.device_put(jnp.zeros((8, 3)), batch_sharding(make_mesh(data=2, tensor=2)))
    assert rows.addressable_shards[0].data.shape == (2, 3)


def test_constrain_without_a_mesh_changes_nothing() -> None:
    x = jnp.ones((3, 2))
    assert constrain(x, ("batch", None), None) is x
    assert constrain(x, ("batch", None), make_mesh()).sharding.is_fully_replicated
