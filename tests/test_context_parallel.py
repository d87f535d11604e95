"""The order of tokens over chips: nothing is lost, and every chip has the same attention to compute."""

import jax.numpy as jnp
import numpy as np
import pytest

from model.context_parallel import restore_order, spread_order


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_restoring_undoes_spreading(count: int) -> None:
    tokens = np.arange(2 * 48 * 3).reshape(2, 48, 3)
    spread = spread_order(tokens, count, axis=1)
    np.testing.assert_array_equal(restore_order(spread, count, axis=1), tokens)
    np.testing.assert_array_equal(spread_order(jnp.asarray(tokens), count, axis=1), spread)
    assert sorted(spread.ravel().tolist()) == sorted(tokens.ravel().tolist())


def test_every_chip_attends_to_equally_many_tokens() -> None:
    chips = spread_order(np.arange(64), 4, axis=0).reshape(4, 16)
    np.testing.assert_array_equal(chips[1], [*range(8, 16), *range(48, 56)])
    seen = [sum(position + 1 for position in chip) for chip in chips.tolist()]
    assert len(set(seen)) == 1


def test_sequence_that_does_not_divide_is_named() -> None:
    with pytest.raises(ValueError, match=r"sequence of 20 tokens .* 8 pieces of train.context_parallel_size=4"):
        spread_order(np.arange(20), 4, axis=0)
