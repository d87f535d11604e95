"""Parameter and FLOP counts against figures worked out apart."""

from __future__ import annotations

import pytest

from model.config import LlamaConfig
from model.flops import num_parameters, train_flops_per_token
from model.parameters import num_params
from model.presets import MODELS

R1 = LlamaConfig(seq_len=2048, hidden_dim=2048, intermediate_dim=8192, num_heads=16, num_kv_heads=16, num_layers=24, vocab_size=128_256)
SEVEN_B = LlamaConfig(seq_len=2048, hidden_dim=4096, intermediate_dim=11008, num_layers=32, vocab_size=128_256)


@pytest.mark.parametrize(("config", "parameters"), [(R1, 2.136e9), (SEVEN_B, 7.527e9)])
def test_parameters_of_the_reference_models(config: LlamaConfig, parameters: float) -> None:
    assert num_parameters(config) == pytest.approx(parameters, rel=5e-4)


def test_parameters_of_llama_3_2_1b() -> None:
    assert num_parameters(MODELS["3.2-1b"].with_vocab(128_256)) == 1_235_814_400


@pytest.mark.parametrize("tied", [False, True])
def test_equals_the_parameter_table(tied: bool) -> None:
    config = LlamaConfig(
        hidden_dim=32, intermediate_dim=80, num_layers=3, num_heads=4, num_kv_heads=2, vocab_size=100, tie_word_embeddings=tied
    )
    assert num_parameters(config) == num_params(config)


def test_flops_of_the_reference_job() -> None:
    # 97.0 TFLOP for each of 64 chips and step of 256 sequences with causal attention at half; 102.0 with the whole square
    tokens = 256 * 2048 / 64
    assert train_flops_per_token(R1, 2048) * tokens == pytest.approx(97.0e12, rel=2e-3)
    assert train_flops_per_token(R1, 2048, full_attention=True) * tokens == pytest.approx(102.0e12, rel=2e-3)


def test_an_open_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model.vocab_size is unset"):
        num_parameters(LlamaConfig())
