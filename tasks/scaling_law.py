"""Scaling laws fitted to finished runs: L(N, D) = E + A/N^alpha + B/D^beta, or with too few runs L(C) = E + A/C^alpha.

Approach 3 of Hoffmann et al. 2022 (arXiv 2203.15556): a Huber loss on the logarithm of the loss, L-BFGS from many starts.
N parameters, D tokens, C model FLOPs; L held-out loss in nats per token.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Vector = NDArray[np.float64]

LawName = Literal["auto", "parameters-and-tokens", "compute"]
HUBER = 1e-3  # of Hoffmann et al.: residuals beyond a thousandth count linearly
MOST_TOGETHER = 0.99  # correlation of log N and log D above which their terms cannot be told apart
_EXPONENTS, _FLOORS, _BEST_STARTS = (0.1, 0.25, 0.5, 1.0), (0.2, 0.6, 0.95), 12
_SMALLEST_EXPONENT, _LARGEST_EXPONENT = 1e-3, 5.0
_LEAST_SLOPE = 1e-4  # of the logarithm of any loss over the logarithm of a coefficient: below that the runs say nothing of it


@dataclass(frozen=True)
class LawPoint:
    """One run: parameters, tokens, model FLOPs, held-out loss."""

    name: str
    parameters: float
    tokens: float
    flops: float
    loss: float


@dataclass(frozen=True)
class Coefficient:
    """A fitted number with its 95 % interval; None where the runs do not say how uncertain it is."""

    name: str
    value: float
    interval: tuple[float, float] | None

    def __str__(self) -> str:
        if self.interval is None:
            return f"{self.name} = {self.value:.4g} (uncertainty unknown)"
        return f"{self.name} = {self.value:.4g} ({self.interval[0]:.3g} to {self.interval[1]:.3g})"


@dataclass(frozen=True)
class ScalingLaw:
    """A fitted law. `error` is the root mean square of the relative error on the runs it was fitted to."""

    name: Literal["parameters-and-tokens", "compute"]
    coefficients: tuple[Coefficient, ...]
    error: float
    points: tuple[LawPoint, ...]

    def __getitem__(self, name: str) -> float:
        return next(each.value for each in self.coefficients if each.name == name)

    def loss(self, *scale: float) -> float:
        """At `(parameters, tokens)`, or `(FLOPs,)`."""
        amplitudes = zip(("A", "B"), ("alpha", "beta"), scale, strict=False)
        return self["E"] + sum(self[amplitude] * size ** -self[exponent] for amplitude, exponent, size in amplitudes)

    @property
    def formula(self) -> str:
        """With its numbers."""
        first = f"L = {self['E']:.4g} + {self['A']:.4g}/"
        if self.name == "compute":
            return f"{first}C^{self['alpha']:.3g}"
        return f"{first}N^{self['alpha']:.3g} + {self['B']:.4g}/D^{self['beta']:.3g}"

    def optimum(self, flops: float) -> tuple[float, float]:
        """Parameters and tokens of the lowest loss for so many FLOPs, at 6 a parameter and token."""
        a, b = self["alpha"], self["beta"]
        parameters = (a * self["A"] / (b * self["B"])) ** (1 / (a + b)) * (flops / 6) ** (b / (a + b))
        return parameters, flops / 6 / parameters

    def lines(self) -> list[str]:
        """What a person reads."""
        unknown = any(each.interval is None for each in self.coefficients)
        said = [
            f"law: {self.formula}",
            *(f"  {each}" for each in self.coefficients),
            f"fit: {len(self.points)} runs, {len(self.coefficients)} coefficients, root mean square error {100 * self.error:.2g} %",
        ]
        if unknown:
            said.append("no more runs than coefficients: how far off they are cannot be said; add runs")
        if self.name == "parameters-and-tokens":
            flops = 10 * max(point.flops for point in self.points)
            parameters, tokens = self.optimum(flops)
            said.append(
                f"best use of {flops:.3g} FLOPs: {parameters:.3g} parameters on {tokens:.3g} tokens, {self.loss(parameters, tokens):.4g}"
            )
        return said


def fit_law(points: Sequence[LawPoint], law: LawName = "auto") -> ScalingLaw:
    """The law that fits the runs best; `auto` takes parameters and tokens where the runs tell them apart, else compute.

    Raises:
        ValueError: fewer runs than coefficients, or runs that do not differ in what the law is of.
    """
    import numpy as np

    if law == "auto":
        law = "parameters-and-tokens" if len(points) > 5 and _why_not_apart(points) is None else "compute"
    both = law == "parameters-and-tokens"
    _refuse_too_few(points, 5 if both else 3, both)
    sizes = [[p.parameters for p in points], [p.tokens for p in points]] if both else [[p.flops for p in points]]
    x, y = np.log(np.array(sizes)), np.log(np.array([p.loss for p in points]))
    middle = x.mean(axis=1)
    theta = _best(x - middle[:, None], y)
    predicted, slopes = _predicted(theta, x - middle[:, None])
    return ScalingLaw(
        name="parameters-and-tokens" if both else "compute",
        coefficients=_coefficients(theta, slopes, predicted - y, middle),
        error=float(np.sqrt(np.mean(np.expm1(predicted - y) ** 2))),
        points=tuple(points),
    )


def _refuse_too_few(points: Sequence[LawPoint], needed: int, both: bool) -> None:
    if len(points) < needed:
        law = "E, A, B, alpha and beta" if both else "E, A and alpha"
        raise ValueError(
            f"{len(points)} finished run(s) with a held-out loss do not decide {law}: at least {needed} are needed, better twice that"
        )
    if both and (why := _why_not_apart(points)) is not None:
        raise ValueError(f"{why}: train some runs on more or fewer tokens a parameter, or fit the law of compute")
    if not both and len({point.flops for point in points}) < needed:
        raise ValueError(f"the runs have {len({p.flops for p in points})} different amounts of compute, at least {needed} are needed")


def _why_not_apart(points: Sequence[LawPoint]) -> str | None:
    """Why parameters and tokens cannot be told apart."""
    import numpy as np

    for what, values in (("numbers of parameters", {p.parameters for p in points}), ("numbers of tokens", {p.tokens for p in points})):
        if len(values) < 3:
            return f"the runs have {len(values)} different {what}, at least 3 are needed"
    together = np.corrcoef(np.log([p.parameters for p in points]), np.log([p.tokens for p in points]))[0, 1]
    return "parameters and tokens rise together" if abs(together) > MOST_TOGETHER else None


def _predicted(theta: Vector, x: Vector) -> tuple[Vector, Vector]:
    """log L [runs] and its slope by each of theta [runs, 2k+1]; theta is log amplitudes [k], exponents [k], log E; x [k, runs] logs."""
    import numpy as np

    k = len(x)
    terms = np.vstack([theta[:k, None] - theta[k : 2 * k, None] * x, np.full((1, x.shape[1]), theta[-1])])
    top = terms.max(axis=0)
    total = np.exp(terms - top).sum(axis=0)
    shares = np.exp(terms - top) / total
    return top + np.log(total), np.concatenate([shares[:k], -shares[:k] * x, shares[k:]]).T


def _best(x: Vector, y: Vector) -> Vector:
    import numpy as np
    from scipy.optimize import minimize

    def objective(theta: Vector) -> tuple[float, Vector]:
        predicted, slopes = _predicted(theta, x)
        residual = (predicted - y) / HUBER
        size = np.abs(residual)
        value = np.where(size <= 1, residual**2 / 2, size - 0.5).sum()
        return float(value), slopes.T @ np.clip(residual, -1, 1) / HUBER

    starts = sorted(_starts(x, y), key=lambda start: objective(start)[0])[:_BEST_STARTS]
    k = len(x)
    bounds = [(None, None)] * k + [(_SMALLEST_EXPONENT, _LARGEST_EXPONENT)] * k + [(None, None)]
    options: Any = {"maxiter": 5000, "maxfun": 20_000, "ftol": 1e-14, "gtol": 1e-9}
    ends = [minimize(objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options) for start in starts]
    return min(ends, key=lambda end: end.fun).x


def _starts(x: Vector, y: Vector) -> list[Vector]:
    """For some exponents and floors the amplitudes of least squares."""
    import numpy as np
    from scipy.optimize import nnls

    loss, found = np.exp(y), []
    for *exponents, floor in itertools.product(*[_EXPONENTS] * len(x), _FLOORS):
        lowest = floor * loss.min()
        powers = np.exp(-np.array(exponents)[:, None] * x).T
        amplitudes, _ = nnls(powers / loss[:, None], (loss - lowest) / loss)
        found.append(np.concatenate([np.log(np.maximum(amplitudes, 1e-6)), exponents, [math.log(lowest)]]))
    return found


def _at_bound(value: float, index: int, k: int) -> bool:
    """Whether a parameter is an exponent that was held by its bound."""
    return k <= index < 2 * k and not _SMALLEST_EXPONENT * 1.001 < value < _LARGEST_EXPONENT * 0.999


def _coefficients(theta: Vector, slopes: Vector, residual: Vector, middle: Vector) -> tuple[Coefficient, ...]:
    """With 95 % intervals of Student's t, by the slopes at the optimum (Gauss-Newton)."""
    import numpy as np
    from scipy.stats import t as student

    k, spare = len(middle), len(residual) - len(theta)
    back = np.eye(len(theta))  # from the middle of the runs, where terms are nearly independent, to N = D = 1
    back[range(k), range(k, 2 * k)] = middle
    plain = back @ theta
    half = None
    if spare > 0:
        covariance = back @ np.linalg.pinv(slopes.T @ slopes, rcond=1e-14) @ back.T * (residual @ residual) / spare
        half = student.ppf(0.975, spare) * np.sqrt(np.maximum(np.diag(covariance), 0.0))

    def one(name: str, index: int, *, logarithm: bool) -> Coefficient:
        # far beyond what a float holds an interval says nothing more
        show = (lambda value: math.exp(min(max(value, -700.0), 700.0))) if logarithm else float
        value = float(plain[index])
        # at a bound, or without weight in any prediction, slopes say nothing of it: an interval would have no width
        told = half is not None and abs(slopes[:, index]).max() > _LEAST_SLOPE and not _at_bound(theta[index], index, k)
        interval = None if half is None or not told else (show(value - half[index]), show(value + half[index]))
        return Coefficient(name, show(value), interval)

    amplitudes = [one(name, i, logarithm=True) for i, name in enumerate(("A", "B")[:k])]
    exponents = [one(name, k + i, logarithm=False) for i, name in enumerate(("alpha", "beta")[:k])]
    return (one("E", 2 * k, logarithm=True), *amplitudes, *exponents)
