"""Which attention a model uses, and in blocks of how many tokens. No JAX here, so that a plan gives the answer of the step itself."""

from __future__ import annotations

import functools
import math

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
        ValueError: `config.attn_backend` asks for splash or flash, which do not take this length, or for splash where no TPU is.
    """
    wanted = config.attn_backend if config.use_flash_attention else "plain"
    fits = {"splash": seq_len % SPLASH_MIN_BLOCK == 0, "flash": flash_block_size(seq_len) is not None, "plain": True}
    if wanted != "auto":
        if wanted == "splash" and platform != "tpu":
            raise ValueError(
                f"model.attn_backend='splash' is a kernel for TPUs, and devices here are of kind {platform}: use model.attn_backend='auto'"
            )
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


def attention_window(config: LlamaConfig, seq_len: int) -> int | None:
    """Latest tokens that a token of a sequence of `seq_len` attends to, itself among them; None where that is all of them."""
    window = config.sliding_window
    return None if window is None or window >= seq_len else window


def attention_block_size(config: LlamaConfig, backend: AttentionBackend, tokens: int, context: int = 1) -> int:
    """Tokens in a block where each of the `context` devices of a sequence has `tokens` of it.

    All of them for the plain form, or where no block divides them.
    """
    wanted = config.flash_attention_block_size
    if backend == "splash":
        return splash_block_size(tokens, config.head_size, wanted, context) or tokens
    return (flash_block_size(tokens * context, wanted) if backend == "flash" else None) or tokens


@functools.lru_cache(maxsize=4096)  # advice asks the same of thousands of settings
def computed_share(seq_len: int, block_size: int, context: int = 1, window: int | None = None) -> float:
    """What the busiest of `context` devices computes of its rows of the square of scores, in whole blocks from the window to the diagonal.

    Devices have the tokens that `model.context_parallel` gives them. Without a window, where blocks divide the pieces, it is
    (n + 1) / 2n on each device, for n = seq_len / block_size: 0.5 to 1. A block with tokens of two pieces computes what each of them
    needs, which without a window is what the later one needs; so a device whose tokens are one such block computes whole rows of the
    square if it has the last piece.

    Args:
        block_size: a divisor of seq_len / context.
        window: latest tokens that a token attends to; None for all.
    """
    piece, rows = seq_len / (2 * context), seq_len // (context * block_size)

    def key_blocks(row: int, device: int) -> int:
        """Blocks of keys that a block of a device's queries needs: those of its tokens in the early piece, and in the late one."""
        needed: list[range] = []
        for half, place in enumerate((device, 2 * context - 1 - device)):
            start, end = max(row * block_size, half * piece), min((row + 1) * block_size, (half + 1) * piece)
            if start < end:
                moved = (place - half) * piece
                first = 0.0 if window is None else max(start + moved - (window - 1), 0.0)
                needed.append(range(int(first // block_size), math.ceil((end + moved) / block_size)))
        early, late = needed[0], needed[-1]
        return len(late) if len(needed) == 1 else len(early) + len(late) - max(early.stop - late.start, 0)

    def blocks(device: int) -> int:
        return sum(key_blocks(row, device) for row in range(rows))

    return max(map(blocks, range(context))) * block_size / seq_len / rows


def flash_block_size(seq_len: int, wanted: int | None = None) -> int | None:
    """Tokens in a block of `model.flash_attention`: `wanted`, else 256 from 2048 tokens on and 128 below; None where no block divides."""
    table = (256, FLASH_MIN_BLOCK) if seq_len >= 2048 else (FLASH_MIN_BLOCK,)
    return next((size for size in (wanted, *table) if size and seq_len % size == 0), None)


def splash_block_size(tokens: int, head_size: int, wanted: int | None = None, context: int = 1) -> int | None:
    """Tokens in a block of the TPU kernel for a chip's `tokens` of a sequence that `context` chips share; None where no block divides them.

    `wanted` or the table's, or the next smaller that divides each of the two pieces that the chip then has, so that no block has
    tokens of both: such a block computes as much as the later piece needs. Where none does, the smallest.
    """
    if tokens % SPLASH_MIN_BLOCK:
        return None
    whole = tokens if context == 1 else tokens // 2
    first = wanted or _SPLASH_BLOCKS.get(head_size, _OTHER_SPLASH_BLOCK)
    return next((size for size in (first, 512, 256) if size <= first and whole % size == 0), SPLASH_MIN_BLOCK)
