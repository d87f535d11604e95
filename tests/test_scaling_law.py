"""Fits of scaling laws: known coefficients come back, intervals cover them under noise, and too few runs are refused."""

from __future__ import annotations

import random

import pytest

from tasks.comparison import law_plot
from tasks.scaling_law import LawPoint, fit_law

E, A, B, ALPHA, BETA = 1.69, 406.4, 410.7, 0.34, 0.28  # of Hoffmann et al. 2022


def ladder(noise: float = 0.0, seed: int = 0, ratios: tuple[float, ...] = (5, 20, 80)) -> list[LawPoint]:
    chance, found = random.Random(seed), []
    for parameters in (1e7, 3e7, 1e8, 3e8, 1e9):
        for ratio in ratios:
            tokens = parameters * ratio
            loss = (E + A / parameters**ALPHA + B / tokens**BETA) * (1 + chance.gauss(0, noise))
            found.append(LawPoint(f"{parameters:g}-{ratio}", parameters, tokens, 6 * parameters * tokens, loss))
    return found


def test_known_coefficients_come_back() -> None:
    law = fit_law(ladder())
    assert law.name == "parameters-and-tokens"
    for name, value in {"E": E, "A": A, "B": B, "alpha": ALPHA, "beta": BETA}.items():
        assert law[name] == pytest.approx(value, rel=1e-3), name
    assert law.error < 1e-6
    # Equation 4 of the paper: N_opt = G (C/6)^(beta/(alpha+beta)), which is where more of either term would lose.
    parameters, tokens = law.optimum(1e21)
    assert parameters * tokens * 6 == pytest.approx(1e21)
    assert law.loss(parameters, tokens) < min(law.loss(parameters * factor, tokens / factor) for factor in (0.9, 1.1))


def test_it_says_how_uncertain_it_is() -> None:
    covered, widths = [], []
    for seed in range(6):
        law = fit_law(ladder(noise=0.003, seed=seed))
        for each in law.coefficients:
            assert each.interval is not None
            low, high = each.interval
            assert low < each.value < high
            covered.append(low <= {"E": E, "A": A, "B": B, "alpha": ALPHA, "beta": BETA}[each.name] <= high)
            widths.append(high - low)
        assert law.error == pytest.approx(0.003, rel=0.7)
    assert sum(covered) / len(covered) > 0.8
    quieter = fit_law(ladder(noise=0.0003))
    assert next(e.interval[1] - e.interval[0] for e in quieter.coefficients if e.interval) < widths[0]
    assert "E = 1." in "\n".join(law.lines())
    assert "best use of" in law.lines()[-1]


def test_what_no_run_tells_of_has_no_interval() -> None:
    """Losses that fall with a power of the FLOPs alone: the floor is zero, of which slopes say nothing."""
    points = [LawPoint(str(n), 1e7 * n, 2e8, 1.2e16 * n, 50 * (1.2e16 * n) ** -0.06) for n in (1, 2, 4, 8)]
    floor = next(each for each in fit_law(points, law="compute").coefficients if each.name == "E")
    assert floor.value < 1e-3
    assert floor.interval is None
    assert "uncertainty unknown" in str(floor)


def test_an_outlier_moves_it_little() -> None:
    points = ladder()
    broken = points[7]
    points[7] = LawPoint(broken.name, broken.parameters, broken.tokens, broken.flops, broken.loss * 1.2)
    assert fit_law(points)["E"] == pytest.approx(E, rel=0.02)


def test_of_few_runs_the_law_of_compute() -> None:
    points = [LawPoint(f"{c}", c**0.5, c**0.5, c, 2 + 30 * c**-0.1) for c in (1e15, 1e16, 1e17, 1e18)]
    law = fit_law(points)
    assert law.name == "compute"
    assert [law[name] for name in ("E", "A", "alpha")] == pytest.approx([2, 30, 0.1], rel=1e-2)
    assert all(each.interval for each in law.coefficients)
    as_many = fit_law(points[:3])
    assert all(each.interval is None for each in as_many.coefficients)
    assert "how far off they are cannot be said" in as_many.lines()[-1]
    plot = law_plot(law)
    assert plot.lines[0].loss[0] == pytest.approx(points[0].loss, rel=1e-6)
    assert plot.lines[0].x[-1] == pytest.approx(3e18)


def test_what_does_not_decide_a_law_is_refused() -> None:
    with pytest.raises(ValueError, match=r"2 finished run\(s\) .* do not decide E, A and alpha: at least 3 are needed"):
        fit_law(ladder()[:2])
    with pytest.raises(ValueError, match=r"4 finished run\(s\) .* do not decide E, A, B, alpha and beta: at least 5"):
        fit_law(ladder()[:4], "parameters-and-tokens")
    with pytest.raises(ValueError, match=r"parameters and tokens rise together: train some runs on more or fewer tokens"):
        fit_law(ladder(ratios=(20,)), "parameters-and-tokens")
    assert fit_law(ladder(ratios=(20,))).name == "compute"
    with pytest.raises(ValueError, match=r"2 different numbers of parameters, at least 3"):
        fit_law(ladder()[:6], "parameters-and-tokens")
    same = [LawPoint("a", 1e6, 1e6, 6e12, 3.0)] * 4
    with pytest.raises(ValueError, match="1 different amounts of compute"):
        fit_law(same)
