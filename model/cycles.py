"""The cycles of a learning-rate schedule: which steps warm up, stay at the peak and decay. Arithmetic only."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from model.train_config import SimpleTrainConfig

MAX_CYCLES = 1000  # every cycle is a few operations in the compiled step


class Cycle(NamedTuple):
    """Steps of one cycle, in this order; `start` is its first."""

    start: int
    warmup: int
    flat: int
    decay: int

    @property
    def end(self) -> int:
        """The step after its last."""
        return self.start + self.warmup + self.flat + self.decay


def steps_of(value: float, whole: int) -> int:
    """A number of steps: `value` itself above 1, else that fraction of `whole`."""
    return round(value if value > 1 else value * whole)


def cycles_of(train: SimpleTrainConfig) -> list[Cycle]:
    """The cycles of a run, the last of which ends with it.

    Raises:
        ValueError: more steps are asked for than there are; names the field, its value and what would do.
    """
    ends = _ends(train)
    if len(ends) > MAX_CYCLES:
        raise ValueError(f"train.cycle_length={train.cycle_length!r} makes {len(ends)} cycles: choose one that makes at most {MAX_CYCLES}")
    cycles: list[Cycle] = []
    for start, end in zip([0, *ends], ends, strict=False):
        field, value = ("rewarmup", train.rewarmup) if cycles else ("warmup", train.warmup)
        length, warmup = end - start, steps_of(value, end - start)
        if warmup > length:
            raise ValueError(f"train.{field}={value:g} steps is more than {_whole(train, len(ends), length, len(cycles))}: use fewer")
        decay = length - warmup if train.decay is None else steps_of(train.decay, length)
        if value <= 1 and train.decay is not None and train.decay <= 1 and value + train.decay <= 1:
            decay = min(decay, length - warmup)  # both were rounded up
        if warmup + decay > length:
            raise ValueError(
                f"train.{field}={value:g} and train.decay={train.decay:g} are {warmup} + {decay} steps, more than "
                f"{_whole(train, len(ends), length, len(cycles))}: lower one, or leave train.decay out to decay over all that is left"
            )
        cycles.append(Cycle(start, warmup, length - warmup - decay, decay))
    return cycles


def _ends(train: SimpleTrainConfig) -> list[int]:
    """The step after each cycle's last."""
    total = train.num_train_steps
    if isinstance(train.cycle_length, tuple):
        ends = [sum(train.cycle_length[: index + 1]) for index in range(len(train.cycle_length))]
        if ends[-1] > total:
            raise ValueError(
                f"train.cycle_length={list(train.cycle_length)} is {ends[-1]} steps, more than train.num_train_steps={total}: "
                "shorten the cycles, or train longer"
            )
        return ends if ends[-1] == total else [*ends, total]
    if train.cycles is not None:
        length = total / train.cycles
    elif train.cycle_length is not None:
        length = train.cycle_length if train.cycle_length > 1 else train.cycle_length * total
    else:
        length = float(total)
    if not 1 <= length <= total:
        field, value = ("cycles", train.cycles) if train.cycles is not None else ("cycle_length", train.cycle_length)
        raise ValueError(
            f"train.{field}={value} makes cycles of {length:g} steps: use 1 to train.num_train_steps={total} steps, "
            "a fraction of the run, or leave it out for one cycle"
        )
    # the last cycle takes what a whole number of steps leaves over, never a sliver of rounding
    count = max(round(total / length - 1e-9) if abs(total / length - round(total / length)) < 1e-6 else int(total / length) + 1, 1)
    return [*(round(length * (index + 1)) for index in range(count - 1)), total]


def _whole(train: SimpleTrainConfig, count: int, length: int, index: int) -> str:
    return f"train.num_train_steps={train.num_train_steps}" if count == 1 else f"the {length} steps of cycle {index + 1} of {count}"
