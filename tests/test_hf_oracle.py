"""Live against transformers and torch: logits, gradients, the export loaded with `from_pretrained`, the tokenizer."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from model.config import LlamaConfig
from model.hf import load_hf, save_hf
from model.llama import forward, hidden_states, output_head
from model.losses import next_token_loss

pytestmark = pytest.mark.oracle
torch = pytest.importorskip("torch", reason="torch is not installed: pip install torch transformers")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'prefect-llama[hf]'")

SIZES = {"num_hidden_layers": 3, "hidden_size": 64, "head_dim": 16, "intermediate_size": 128, "vocab_size": 300}
CASES = ["gqa-untied", "gqa-tied-llama3", "mha-untied-linear"]


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


@pytest.fixture(params=CASES)
def oracle(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path, dict[str, np.ndarray]]:
    """A model of transformers, the directory it was saved to, and its logits, loss and gradients."""
    golden = load_script("golden/hf_llama")
    theirs = golden.make_model(request.param, **SIZES)
    theirs.save_pretrained(tmp_path / "theirs")
    tokens, targets = np.random.default_rng(0).integers(0, 300, (2, 2, 48))
    return theirs, tmp_path, {"tokens": tokens, "targets": targets, **golden.reference(theirs, tokens, targets)}


def test_logits_and_gradients(oracle: tuple) -> None:
    _, directory, expected = oracle
    config, params = load_hf(directory / "theirs")

    def mean_loss(params: dict, config: LlamaConfig) -> jax.Array:
        hidden = hidden_states(params, jnp.asarray(expected["tokens"]), config)
        targets, weights = jnp.asarray(expected["targets"]), jnp.ones(expected["targets"].shape)
        sums = next_token_loss(hidden, output_head(params), targets, weights, z_loss_weight=0.0, chunk_size=40)
        return sums.loss / sums.weight

    with jax.default_matmul_precision("highest"):
        logits = forward(params, jnp.asarray(expected["tokens"]), config)
        loss, gradients = jax.jit(jax.value_and_grad(mean_loss), static_argnums=1)(params, config)
    assert np.abs(expected["logits"]).max() > 1.0
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=2e-5)
    np.testing.assert_allclose(loss, expected["loss"], rtol=1e-6)
    save_hf(directory / "gradients", config, gradients)
    for name, gradient in load_file(directory / "gradients" / "model.safetensors").items():
        target = expected[f"grad.{name}"]
        np.testing.assert_allclose(gradient, target, rtol=0, atol=1e-5 * np.abs(target).max(), err_msg=name)


@pytest.mark.parametrize("max_shard_bytes", [10**9, 60_000])
def test_export_loads_with_from_pretrained(oracle: tuple, max_shard_bytes: int) -> None:
    theirs, directory, expected = oracle
    config, params = load_hf(directory / "theirs")
    save_hf(directory / "ours", config, params, max_shard_bytes=max_shard_bytes)
    loaded, report = transformers.LlamaForCausalLM.from_pretrained(
        directory / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.rope_parameters == theirs.config.rope_parameters
    assert loaded.dtype == torch.float32
    with torch.no_grad():
        logits = loaded.eval()(torch.tensor(expected["tokens"])).logits.numpy()
    np.testing.assert_array_equal(logits, expected["logits"])
    again_config, again = load_hf(directory / "ours")
    assert again_config == config
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.parametrize("kind", range(4))
def test_exported_tokenizer_encodes_as_sentencepiece(kind: int, tmp_path: Path) -> None:
    shared = load_script("test_hf_tokenizer")
    path = shared.train(tmp_path, *shared.KINDS[kind])
    ours = shared.sentencepiece.SentencePieceProcessor(model_file=str(path))
    config = LlamaConfig(seq_len=64, hidden_dim=16, intermediate_dim=16, num_layers=1, num_heads=2, num_kv_heads=2, vocab_size=400)
    save_hf(tmp_path / "hf", config, shared.init_params(config, jax.random.key(0)), tokenizer=path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in shared.texts():
        assert theirs.encode(text) == [ours.bos_id(), *ours.encode(text)], repr(text)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id) == (1, 2, 0)
    assert theirs.decode(theirs.encode("the quick fox"), skip_special_tokens=True) == "the quick fox"
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "hf")
    assert (generation.bos_token_id, generation.eos_token_id) == (1, 2)
