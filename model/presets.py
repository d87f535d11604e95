"""Named model shapes."""

from __future__ import annotations

from model.config import LlamaConfig, RopeConfig

MODELS: dict[str, LlamaConfig] = {
    # A minute or two on a laptop: 3 million parameters with a vocabulary of 2,048.
    "debug": LlamaConfig(seq_len=256, hidden_dim=256, intermediate_dim=688, num_layers=3, num_heads=8, num_kv_heads=2),
    # Half an hour on a laptop: 5 million parameters.
    "tiny": LlamaConfig(seq_len=512, hidden_dim=256, intermediate_dim=688, num_layers=6, num_heads=8, num_kv_heads=2),
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
