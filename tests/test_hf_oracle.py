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
from model.hf_config import from_hf
from model.llama import _ACTIVATIONS, forward, hidden_states, output_head
from model.losses import next_token_loss
from model.rope import attention_factor, rope_frequencies

pytestmark = pytest.mark.oracle
torch = pytest.importorskip("torch", reason="torch is not installed: pip install torch transformers")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'prefect-llama[hf]'")

SIZES = {"num_hidden_layers": 3, "hidden_size": 64, "head_dim": 16, "intermediate_size": 128, "vocab_size": 300}
CASES = [
    "gqa-untied",
    "gqa-tied-llama3",
    "mha-untied-linear",
    "llama-biases-gelu",
    "llama-yarn-gelu-new",
    "mistral-window-yarn-mscale",
    "qwen2-window",
    "qwen3-tied",
    "qwen3-window-bias",
]
LLAMA_3 = {"rope_type": "default", "rope_theta": 500_000.0}
LLAMA_3_1 = {**LLAMA_3, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA_3_1["original_max_position_embeddings"] = 8192
# Widths are divided by 16 and 8; heads keep their width, and all ratios, positions and tying are the published ones.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": {"hidden_size": 256, "intermediate_size": 688, "heads": (2, 2), "head_dim": 128, "context": 4096},
    "llama-2-70b": {"hidden_size": 1024, "intermediate_size": 3584, "heads": (8, 1), "head_dim": 128, "context": 4096},
    "llama-3-8b": {"hidden_size": 512, "intermediate_size": 1792, "heads": (4, 1), "head_dim": 128, "context": 8192, "rope": LLAMA_3},
    "llama-3.1-8b": {
        "hidden_size": 512,
        "intermediate_size": 1792,
        "heads": (4, 1),
        "head_dim": 128,
        "context": 131_072,
        "rope": LLAMA_3_1,
    },
    "llama-3.2-1b": {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "heads": (4, 1),
        "head_dim": 64,
        "context": 131_072,
        "rope": {**LLAMA_3_1, "factor": 32.0},
        "tie_word_embeddings": True,
    },
    "llama-3.2-3b": {
        "hidden_size": 384,
        "intermediate_size": 1024,
        "heads": (3, 1),
        "head_dim": 128,
        "context": 131_072,
        "rope": {**LLAMA_3_1, "factor": 32.0},
        "tie_word_embeddings": True,
    },
}


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def make_model(name: str) -> Any:
    golden = load_script("golden/hf_llama")
    if name in CASES:
        return golden.make_model(name, **SIZES)
    shape = dict(SHAPES[name])
    heads, kv_heads = shape.pop("heads")
    names = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "max_position_embeddings": shape.pop("context")}
    rope = shape.pop("rope", {"rope_type": "default", "rope_theta": 10_000.0})
    changes = {"num_hidden_layers": 2, "vocab_size": 300, **shape, **names, "rope_parameters": rope}
    return golden.make_model("gqa-untied", scale=0.04, **changes)


@pytest.fixture(params=[*CASES, *SHAPES])
def oracle(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path, dict[str, np.ndarray]]:
    """A model of transformers, the directory it was saved to, and its logits, loss and gradients."""
    golden = load_script("golden/hf_llama")
    theirs = make_model(request.param)
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
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        directory / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(loaded) is type(theirs)
    assert loaded.config.rope_parameters.items() >= theirs.config.rope_parameters.items()
    assert loaded.dtype == torch.float32
    with torch.no_grad():
        logits = loaded.eval()(torch.tensor(expected["tokens"])).logits.numpy()
    np.testing.assert_array_equal(logits, expected["logits"])
    again_config, again = load_hf(directory / "ours")
    assert again_config == config
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.parametrize(
    ("rope", "head_dim"),
    [
        ({"rope_type": "linear", "rope_theta": 10_000.0, "factor": 8.0}, 128),
        (LLAMA_3_1, 128),
        ({**LLAMA_3_1, "factor": 32.0}, 64),
        ({"rope_type": "yarn", "rope_theta": 1_000_000.0, "factor": 4.0, "original_max_position_embeddings": 32_768}, 128),
        ({"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 40.0, "original_max_position_embeddings": 4096, "truncate": False}, 64),
        ({"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 16.0, "original_max_position_embeddings": 8, "mscale": 0.7}, 64),
    ],
)
def test_frequencies_of_whole_contexts(rope: dict[str, Any], head_dim: int) -> None:
    config = {"hidden_size": 8 * head_dim, "num_attention_heads": 8, "max_position_embeddings": 131_072}
    theirs = transformers.LlamaConfig(**config, head_dim=head_dim, rope_parameters=dict(rope))
    frequencies, factor = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS[rope["rope_type"]](theirs, "cpu")
    ours = from_hf({**theirs.to_dict(), "model_type": "llama"}, "config.json")
    np.testing.assert_allclose(rope_frequencies(ours), frequencies.numpy(), rtol=2e-6)
    assert attention_factor(ours.rope) == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_new", "quick_gelu", "relu", "tanh"])
def test_activations(name: str) -> None:
    x = np.linspace(-6, 6, 1001, dtype=np.float32)
    theirs = transformers.activations.ACT2FN[name](torch.tensor(x)).numpy()
    np.testing.assert_allclose(_ACTIVATIONS[name](jnp.asarray(x)), theirs, atol=1e-6)


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
