"""Named model shapes."""

from __future__ import annotations

from model.config import LlamaConfig, RopeConfig

MODELS: dict[str, LlamaConfig] = {
    # A few minutes on a laptop.
    "debug": LlamaConfig(seq_len=256, hidden_dim=128, intermediate_dim=384, num_layers=4, num_heads=4, num_kv_heads=2),
    # An hour or so on a laptop; with a 32k vocabulary about 15 million parameters.
    "tiny": LlamaConfig(seq_len=512, hidden_dim=192, intermediate_dim=512, num_layers=6, num_heads=6, num_kv_heads=2),
    # Llama 3.2 1B (Meta 2024).
    "3.2-1b": LlamaConfig(
        seq_len=8192,
        hidden_dim=2048,
        intermediate_dim=8192,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
        head_dim=64,
        tie_word_embeddings=True,
        rope=RopeConfig(type="llama3", theta=500_000.0, factor=32.0),
    ),
}
