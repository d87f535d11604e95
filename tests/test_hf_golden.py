"""Logits, loss and gradients against values computed by transformers and kept in tests/golden (see golden/hf_llama.py)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from model.hf import load_hf, save_hf
from model.llama import forward, hidden_states, output_head
from model.losses import next_token_loss

GOLDEN = Path(__file__).parent / "golden"
# Their gradients are those of what other cases have: the ordinary tests compare the logits alone.
COVERED = ("llama-biases-gelu", "llama-yarn-gelu-new", "qwen2-window", "qwen3-tied")
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))


def test_all_cases_are_there() -> None:
    assert CASES == [
        "gqa-tied-llama3",
        "gqa-untied",
        "llama-biases-gelu",
        "llama-yarn-gelu-new",
        "mha-untied-linear",
        "mistral-window-yarn-mscale",
        "qwen2-window",
        "qwen3-tied",
        "qwen3-window-bias",
    ]


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str) -> None:
    config, params = load_hf(GOLDEN / case)
    expected = load_file(GOLDEN / case / "expected.safetensors")
    with jax.default_matmul_precision("highest"):
        logits = forward(params, jnp.asarray(expected["tokens"]), config)
    assert np.abs(expected["logits"]).max() > 0.5
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.slow) if case in COVERED else case for case in CASES])
def test_loss_and_gradients_equal_transformers(case: str, tmp_path: Path) -> None:
    config, params = load_hf(GOLDEN / case)
    expected = load_file(GOLDEN / case / "expected.safetensors")

    def mean_loss(params: dict) -> jax.Array:
        hidden = hidden_states(params, jnp.asarray(expected["tokens"]), config)
        targets, weights = jnp.asarray(expected["targets"]), jnp.ones(expected["targets"].shape)
        sums = next_token_loss(hidden, output_head(params), targets, weights, z_loss_weight=0.0, chunk_size=32)
        return sums.loss / sums.weight

    with jax.default_matmul_precision("highest"):
        loss, gradients = jax.jit(jax.value_and_grad(mean_loss))(params)
    np.testing.assert_allclose(loss, expected["loss"], rtol=1e-6)

    # The export gives the gradients transformers' names and orientation.
    save_hf(tmp_path, config, gradients)
    ours = load_file(tmp_path / "model.safetensors")
    theirs = {name.removeprefix("grad."): array for name, array in expected.items() if name.startswith("grad.")}
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        np.testing.assert_allclose(ours[name], gradient, rtol=0, atol=1e-5 * np.abs(gradient).max(), err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_export_holds_the_very_tensors_that_transformers_saved(case: str, tmp_path: Path) -> None:
    config, params = load_hf(GOLDEN / case)
    save_hf(tmp_path, config, params)
    ours, theirs = load_file(tmp_path / "model.safetensors"), load_file(GOLDEN / case / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array)
