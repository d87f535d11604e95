"""How a batch size is written as a flag: `--train.train-batch-size 64`, or in stages, `--train.train-batch-size 0:32 1000:64`.

tyro.cli(Arguments, ..., registry=batch_size_flags())
"""

from __future__ import annotations

from typing import Any

from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from model.batch_schedule import BatchSize, BatchSizeStep


def batch_size_flags() -> ConstructorRegistry:
    """Tyro's rules, with one for `BatchSize`: of itself tyro knows no flag for a tuple of configurations."""
    registry = ConstructorRegistry()
    registry.primitive_rule(_rule)
    return registry


def _rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    if info.type != BatchSize:
        return None
    return PrimitiveConstructorSpec(
        nargs="*", metavar="SIZE|STEP:SIZE ...", instance_from_str=parse_batch_size, is_instance=_is_batch_size, str_from_instance=_words
    )


def parse_batch_size(words: list[str]) -> BatchSize:
    """One number, or `STEP:SIZE` for each stage. Raises ValueError for anything else."""
    try:
        if len(words) <= 1 and ":" not in "".join(words):
            return int("".join(words))
        pairs = [word.split(":") for word in words]
        return tuple(BatchSizeStep(start=int(start), value=int(value)) for start, value in pairs)
    except ValueError as error:
        raise ValueError(
            f"{' '.join(words)!r} is no batch size: give a number, or STEP:SIZE for each stage, such as 0:32 1000:64"
        ) from error


def _is_batch_size(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, tuple) and all(isinstance(stage, BatchSizeStep) for stage in value))


def _words(value: BatchSize) -> list[str]:
    return [str(value)] if isinstance(value, int) else [f"{stage.start}:{stage.value}" for stage in value]
