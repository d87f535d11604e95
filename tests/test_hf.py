"""Export and import: exact round trips, crash safety, the configuration in both dialects, and what is refused."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import model.hf
from model.config import LlamaConfig, RopeConfig
from model.hf import load_hf, save_hf
from model.hf_architectures import not_exportable
from model.hf_config import from_hf
from model.llama import forward
from model.parameters import init_params

CONFIG = LlamaConfig(seq_len=64, hidden_dim=16, intermediate_dim=24, num_layers=2, num_heads=4, num_kv_heads=2, vocab_size=40)
LLAMA3 = RopeConfig(
    type="llama3", theta=500_000.0, factor=8.0, low_freq_factor=2.0, high_freq_factor=4.0, original_max_position_embeddings=32
)
CONFIGS = {
    "plain": CONFIG,
    "tied": CONFIG.model_copy(update={"tie_word_embeddings": True}),
    "llama3": CONFIG.model_copy(update={"rope": LLAMA3}),
    "linear, own head width": CONFIG.model_copy(update={"rope": RopeConfig(type="linear", factor=4.0), "head_dim": 6}),
    "biases, gelu": CONFIG.model_copy(update={"attention_bias": True, "mlp_bias": True, "activation_function": "gelu"}),
    "window, yarn": CONFIG.model_copy(update={"sliding_window": 7, "rope": RopeConfig(type="yarn", factor=4.0, attention_factor=1.3)}),
    "qkv biases, window": CONFIG.model_copy(update={"attention_bias": "qkv", "sliding_window": 7}),
    "qk_norm, biases": CONFIG.model_copy(update={"qk_norm": True, "attention_bias": True}),
    "qk_norm, window": CONFIG.model_copy(update={"qk_norm": True, "sliding_window": 7}),
    "epsilon, range": CONFIG.model_copy(update={"layer_norm_epsilon": 3e-6, "initializer_range": 0.01, "num_kv_heads": 1}),
}


@pytest.fixture(scope="module")
def params() -> dict:
    return init_params(CONFIG, jax.random.key(0))


@pytest.fixture
def export(params: dict, tmp_path: Path) -> Path:
    save_hf(tmp_path / "hf", CONFIG, params)
    return tmp_path / "hf"


def assert_same_arrays(actual: dict, expected: dict) -> None:
    """Two parameter trees, bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(export: Path, change: Any) -> None:
    tensors = load_file(export / "model.safetensors")
    change(tensors)
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, export / "model.safetensors")


@pytest.mark.parametrize("name", CONFIGS)
def test_import_gives_back_the_configuration_and_the_very_bits(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    params = init_params(config, jax.random.key(1))
    save_hf(tmp_path, config, params)
    loaded_config, loaded = load_hf(tmp_path)
    assert loaded_config == config
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    assert_same_arrays(loaded, params)
    assert all(array.dtype == np.float32 for array in jax.tree.leaves(loaded))


def test_shards_hold_the_same_tensors_and_list_them(params: dict, tmp_path: Path) -> None:
    save_hf(tmp_path, CONFIG, params, max_shard_bytes=4000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    assert [shard.name for shard in shards] == [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for shard in shards:
        tensors = load_file(shard)
        assert {name for name, file in index["weight_map"].items() if file == shard.name} == set(tensors)
        assert sum(array.nbytes for array in tensors.values()) <= 4000
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in jax.tree.leaves(params))
    assert_same_arrays(load_hf(tmp_path)[1], params)


def test_a_later_export_replaces_an_earlier_one(params: dict, tmp_path: Path) -> None:
    other = jax.tree.map(lambda x: x + 1, params)
    for max_shard_bytes, weights in ((10**9, params), (4000, other), (10**9, params)):
        save_hf(tmp_path, CONFIG, weights, max_shard_bytes=max_shard_bytes)
        assert_same_arrays(load_hf(tmp_path)[1], weights)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_reduced_precision_rounds_to_nearest(params: dict, tmp_path: Path, dtype: Any) -> None:
    save_hf(tmp_path, CONFIG, params, dtype=dtype)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == dtype
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(dtype).astype(np.float32)), load_hf(tmp_path)[1], params)


def test_an_export_that_died_is_not_taken_for_a_whole_one(params: dict, export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def die_on_the_second(tensors: dict, metadata: dict) -> bytes:
        calls.append(tensors)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return b"first shard"

    monkeypatch.setattr(model.hf, "save", die_on_the_second)
    with pytest.raises(OSError, match="No space left"):
        save_hf(export, CONFIG, params, max_shard_bytes=4000)
    with pytest.raises(ValueError, match="not a finished export"):
        load_hf(export)
    monkeypatch.undo()
    (export / ".model.safetensors.1-ab.tmp").write_bytes(b"left by a killed writer")
    save_hf(export, CONFIG, params)
    assert_same_arrays(load_hf(export)[1], params)
    assert not list(export.glob(".*"))


def test_config_json_speaks_both_dialects(tmp_path: Path) -> None:
    config = CONFIGS["llama3"]
    save_hf(tmp_path, config, init_params(config, jax.random.key(0)))
    written = json.loads((tmp_path / "config.json").read_text())
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 2.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    assert written["rope_theta"] == 500_000.0
    assert written["rope_scaling"] == scaling
    assert written["rope_parameters"] == {"rope_theta": 500_000.0, **scaling}
    for only in ({"rope_parameters": None}, {"rope_theta": None, "rope_scaling": None}):
        edit_json(tmp_path / "config.json", **written | only)
        assert load_hf(tmp_path)[0] == config


def test_keys_that_transformers_lets_be_absent(export: Path) -> None:
    written = json.loads((export / "config.json").read_text())
    kept = (
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    )
    (export / "config.json").write_text(json.dumps({key: written[key] for key in kept}))
    config, _ = load_hf(export)
    assert (config.seq_len, config.layer_norm_epsilon, config.tie_word_embeddings, config.rope) == (2048, 1e-6, False, RopeConfig())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_bias": True}, r"missing tensor model.layers.0.self_attn.k_proj.bias \(8 in all\)"),
        ({"mlp_bias": True}, r"missing tensor model.layers.0.mlp.down_proj.bias \(6 in all\)"),
        ({"model_type": "gemma3"}, "model_type='gemma3' is not supported: only llama, mistral, qwen2, qwen3 can be imported"),
        ({"model_type": "mistral"}, "only MistralForCausalLM"),
        (
            {"model_type": "qwen3", "architectures": None, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            "sliding_window=8 in some layers only",
        ),
        ({"architectures": ["LlamaForSequenceClassification"]}, "only LlamaForCausalLM"),
        ({"hidden_act": "mish"}, "hidden_act='mish'"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_type='longrope' is not supported"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type='yarn' needs factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "needs low_freq_factor, high_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"quantization_config": {"bits": 4}}, "save the model unquantized"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"vocab_size": 41}, r"(lm_head|model.embed_tokens).weight is F32 \(40, 16\), and floating point \(41, 16\) is needed"),
        ({"num_hidden_layers": 3}, r"missing tensor model.layers.2.input_layernorm.weight \(9 in all\)"),
        ({"num_hidden_layers": 1}, "unexpected tensor model.layers.1"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=true but lm_head.weight is stored"),
        ({"num_key_value_heads": 3}, "num_heads=4 is not a multiple of num_kv_heads=3"),
    ],
)
def test_foreign_or_contradicting_configurations_are_refused(export: Path, change: dict, message: str) -> None:
    edit_json(export / "config.json", **change)
    with pytest.raises(ValueError, match=message):
        load_hf(export)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "missing tensor model.norm.weight"),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(16, np.float32)}), "unexpected tensor .*q_proj.bias"),
        (lambda t: t.update({"model.norm.weight": np.zeros(16, np.int8)}), "model.norm.weight is I8"),
        (lambda t: t.update({"lm_head.weight": np.zeros((40, 15), np.float32)}), r"lm_head.weight is F32 \(40, 15\)"),
    ],
)
def test_wrong_tensors_are_named(export: Path, change: Any, message: str) -> None:
    edit_weights(export, change)
    with pytest.raises(ValueError, match=message):
        load_hf(export)


def test_stored_rotary_frequencies_are_ignored(export: Path, params: dict) -> None:
    edit_weights(export, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(2, np.float32)}))
    assert_same_arrays(load_hf(export)[1], params)


def test_damaged_files_are_named(export: Path, params: dict) -> None:
    weights = export / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged"):
        load_hf(export)
    (export / "config.json").write_bytes(b"\xff{")
    with pytest.raises(ValueError, match=r"config.json is not JSON"):
        load_hf(export)
    with pytest.raises(ValueError, match="not a finished export"):
        load_hf(export / "nowhere")

    save_hf(export, CONFIG, params, max_shard_bytes=4000)
    next(export.glob("model-00002-of-*")).unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-.* does not exist although"):
        load_hf(export)


def test_an_index_cannot_point_outside_the_export(export: Path) -> None:
    (export / "model.safetensors").rename(export.parent / "outside.safetensors")
    (export / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": "../outside.safetensors"}}))
    with pytest.raises(ValueError, match="files beside it"):
        load_hf(export)


@pytest.mark.parametrize(
    ("model_type", "changes", "window"),
    [
        ("mistral", {}, 4096),
        ("mistral", {"sliding_window": None}, None),
        ("qwen2", {"sliding_window": 9}, None),  # Qwen does not heed it unless use_sliding_window
        ("qwen2", {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 0}, 9),
        ("qwen3", {"sliding_window": 9, "use_sliding_window": True}, None),  # from layer 28 on, of 2
        ("qwen3", {"sliding_window": 9, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 2}, 9),
    ],
)
def test_which_window_transformers_would_use(model_type: str, changes: dict[str, Any], window: int | None) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 8}
    config = from_hf({"model_type": model_type, "vocab_size": 40, **sizes, **changes}, "config.json")
    assert config.sliding_window == window
    assert (config.qk_norm, config.attention_bias) == (model_type == "qwen3", "qkv" if model_type == "qwen2" else False)


def test_norms_without_weights_are_exported_with_ones(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"use_layer_norm_weight": False, "qk_norm": True})
    params = init_params(config, jax.random.key(2))
    save_hf(tmp_path, config, params)
    loaded_config, loaded = load_hf(tmp_path)
    assert loaded_config == config.model_copy(update={"use_layer_norm_weight": True})
    for norm in (loaded["norm"], loaded["layers"]["attn_norm"], loaded["layers"]["q_norm"]):
        np.testing.assert_array_equal(norm, 1.0)
    tokens = np.arange(16)[None]
    np.testing.assert_array_equal(forward(loaded, tokens, loaded_config), forward(params, tokens, config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hybrid_norm": True}, r"model.hybrid_norm=True has no place .* leave it off"),
        ({"input_embedding_norm": True}, r"model.input_embedding_norm=True has no place"),
        (
            {"qk_norm": True, "mlp_bias": True},
            r"no Hugging Face model has model.qk_norm=True, .*model.mlp_bias=True.*leave one of them off",
        ),
        ({"sliding_window": 4, "attention_bias": True}, r"model.sliding_window=4 together"),
        ({"qk_norm": True, "attention_bias": "qkv"}, r"model.attention_bias=qkv"),
    ],
)
def test_what_no_architecture_can_say_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update=changes)
    assert re.search(message, not_exportable(config) or "")
    with pytest.raises(ValueError, match=message):
        save_hf(tmp_path / "hf", config, init_params(config, jax.random.key(0)))
    assert not (tmp_path / "hf").exists()


def test_export_refuses_what_does_not_fit(params: dict, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"params\['head'\] has shape \(16, 40\), the configuration asks for None"):
        save_hf(tmp_path / "hf", CONFIGS["tied"], params)
    with pytest.raises(ValueError, match="dtype='int8'"):
        save_hf(tmp_path / "hf", CONFIG, params, dtype="int8")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="max_shard_bytes=0"):
        save_hf(tmp_path / "hf", CONFIG, params, max_shard_bytes=0)
    with pytest.raises(ValueError, match=r"model.logit_soft_cap=2.5 has no place in a Hugging Face LlamaForCausalLM.*leave it unset"):
        save_hf(tmp_path / "hf", CONFIG.model_copy(update={"logit_soft_cap": 2.5}), params)
    assert not (tmp_path / "hf").exists()
