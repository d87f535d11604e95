"""Which attention a model uses, and in blocks of how many tokens. No JAX here, so that a plan gives the answer of the step itself."""

from __future__ import annotations

from model.config import AttentionBackend, LlamaConfig

FLASH_MIN_BLOCK = 128  # tokens: smaller blocks cost more in turns of the loop than they save above the diagonal
FLASH_MIN_SEQ_LEN = 512  # below it the plain form is as fast on CPU and its S x S scores are small
SPLASH_MIN_BLOCK = 128  # lanes of a vector register: the smallest block of the TPU kernel
# Tokens in a block by head width. Blocks of 512 compute 10/16 of the square at 2048 tokens, of 256 9/16 and of 1024 12/16, and
# read keys and values half as often as 256. A wider head takes as much fast memory in smaller blocks.
_SPLASH_BLOCKS = {64: 512, 128: 512, 256: 256}
_OTHER_SPLASH_BLOCK = 256


def choose_backend(config: LlamaConfig, seq_len: int, platform: str) -> AttentionBackend:
    """The form that `model.attention` uses for sequences of `seq_len` tokens on `platform`: "tpu", "cpu" or "gpu".

    Raises:
        ValueError: `config.attn_backend` asks for splash or flash, which do not take this length.
    """
    wanted = config.attn_backend if config.use_flash_attention else "plain"
    fits = {"splash": seq_len % SPLASH_MIN_BLOCK == 0, "flash": flash_block_size(seq_len) is not None, "plain": True}
    if wanted != "auto":
        if not fits[wanted]:
            unit = SPLASH_MIN_BLOCK if wanted == "splash" else FLASH_MIN_BLOCK
            raise ValueError(
                f"model.attn_backend={wanted!r} takes sequences in multiples of {unit} tokens, not {seq_len}: "
                f"change the length or use model.attn_backend='auto'"
            )
        return wanted
    if platform == "tpu" and fits["splash"]:
        return "splash"
    return "flash" if seq_len >= FLASH_MIN_SEQ_LEN and fits["flash"] else "plain"


def attention_block_size(config: LlamaConfig, backend: AttentionBackend, tokens: int) -> int:
    """Tokens in a block where a device has `tokens` of a sequence; all of them for the plain form, or where no block divides them."""
    if backend == "plain":
        return tokens
    wanted = config.flash_attention_block_size
    return (splash_block_size(tokens, config.head_size, wanted) if backend == "splash" else flash_block_size(tokens, wanted)) or tokens


def flash_block_size(seq_len: int, wanted: int | None = None) -> int | None:
    """Tokens in a block of `model.flash_attention`: `wanted`, else 256 from 2048 tokens on and 128 below; None where no block divides."""
    table = (256, FLASH_MIN_BLOCK) if seq_len >= 2048 else (FLASH_MIN_BLOCK,)
    return next((size for size in (wanted, *table) if size and seq_len % size == 0), None)


def splash_block_size(tokens: int, head_size: int, wanted: int | None = None) -> int | None:
    """Tokens in a block of the TPU kernel for a chip's `tokens` of a sequence: `wanted` or the table's, or the next that divides them.

    None where no block does.
    """
    first = wanted or _SPLASH_BLOCKS.get(head_size, _OTHER_SPLASH_BLOCK)
    return next((size for size in (first, 512, 256, SPLASH_MIN_BLOCK) if size <= tokens and tokens % size == 0), None)
