from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.pairing.policy import Acceptance, CostCurve, KController, non_decreasing
from unmask.pairing.step_clock import StepClock

MAX_K = 15


def verify_s(rows: int) -> float:
    """A GPU's: flat while memory-bound, then linear."""
    return max(7e-3, 2.4e-5 * rows)


def draft_s(rows: int) -> float:
    return 1.4e-3 + 4e-6 * rows


def tokens(rates: list[float], k: int) -> float:
    return 1 + sum(np.prod(rates[:j]) for j in range(1, k + 1))


def taught(rates: list[float], ks: range, steps: int = 400, batches: tuple[int, ...] = (1, 8, 32, 64)) -> KController:
    """A controller that has seen steps of every K at every load, with drafts accepted at `rates`."""
    controller, generator = KController(ks), np.random.default_rng(0)
    for step in range(steps):
        n, k = batches[step % len(batches)], ks[(step // len(batches)) % len(ks)]
        accepted = [int(np.cumprod(generator.random(k) < rates[:k]).sum()) for _ in range(n)]
        controller.observe_acceptance([k] * n, accepted)
        controller.observe_cost("verify", n * (k + 1), verify_s(n * (k + 1)))
        controller.observe_cost("draft", n * (k + 1), draft_s(n * (k + 1)))
    return controller


@pytest.mark.parametrize("rate", [0.4, 0.7, 0.86, 0.95])
@pytest.mark.parametrize("batch_size", [1, 8, 32, 64])
def test_the_choice_is_within_a_few_percent_of_the_best(rate: float, batch_size: int) -> None:
    rates = [rate] * MAX_K
    controller = taught(rates, range(MAX_K + 1))

    def true_rate(k: int) -> float:
        rows = batch_size * (k + 1)
        return tokens(rates, k) / (verify_s(rows) + draft_s(rows))

    for _ in range(100):
        k = controller.choose(batch_size)
    assert true_rate(k) > 0.95 * max(true_rate(k) for k in range(MAX_K + 1))


@settings(max_examples=100, deadline=None)
@given(
    base=st.lists(st.floats(1e-4, 1e-1), min_size=2, max_size=2),
    slope=st.lists(st.floats(1e-7, 1e-3), min_size=2, max_size=2),
    outcomes=st.lists(st.integers(0, 5), min_size=1, max_size=30),
    ks=st.sets(st.integers(0, 5), min_size=1),
    batch_size=st.integers(1, 40),
)
def test_without_hysteresis_the_choice_is_the_brute_force_optimum(
    base: list[float], slope: list[float], outcomes: list[int], ks: set[int], batch_size: int
) -> None:
    """Costs measured at exactly the rows in question; the optimum over the estimates by enumeration."""
    controller = KController(sorted(ks), margin=0, dwell=0)
    top = max(ks)
    for k in ks:
        for part, b, s in zip(("verify", "draft"), base, slope, strict=True):
            controller.observe_cost(part, batch_size * (k + 1), b + s * batch_size * (k + 1))
    controller.observe_acceptance([top] * len(outcomes), [min(length, top) for length in outcomes])
    rates = controller.acceptance.rates().tolist()

    def rate(k: int) -> float:
        cost = sum(b + s * batch_size * (k + 1) for b, s in zip(base, slope, strict=True))
        return tokens(rates, k) / cost

    chosen = controller.choose(batch_size)
    assert chosen in ks
    # Neighbouring row counts may share a bucket, which averages their costs.
    assert rate(chosen) >= 0.9 * max(rate(k) for k in ks)
    assert controller.table(batch_size)[batch_size] == controller.ks[controller.rates(batch_size).argmax()]


def test_k_falls_with_load_and_rises_with_acceptance() -> None:
    by_load = taught([0.86] * MAX_K, range(MAX_K + 1)).table(64)
    assert by_load[1] == MAX_K
    assert by_load[64] < by_load[1]
    assert taught([0.5] * MAX_K, range(MAX_K + 1)).table(64)[64] < by_load[64]


def test_a_draft_that_is_never_right_is_not_asked() -> None:
    controller = taught([0.0] * MAX_K, range(MAX_K + 1))
    assert [controller.choose(64) for _ in range(40)][-1] == 0
    for _ in range(400):
        controller.observe_acceptance([0] * 64, [0] * 64)
    # The evidence has faded: it is tried again, as is another draft.
    assert [controller.choose(1) for _ in range(40)][-1] > 0
    other = taught([0.0] * MAX_K, range(MAX_K + 1))
    other.forget_acceptance()
    assert [other.choose(1) for _ in range(40)][-1] > 0


def test_only_the_given_ks_are_chosen() -> None:
    controller = taught([0.86] * MAX_K, range(3, MAX_K + 1, 4))
    assert {controller.choose(n) for n in range(1, 65)} | set(controller.table(64)) <= {3, 7, 11, 15}


def test_a_k_is_kept_for_a_while_and_small_gains_are_ignored() -> None:
    controller = taught([0.86] * MAX_K, range(1, MAX_K + 1))
    loads = itertools.cycle([1, 64])
    chosen = [controller.choose(next(loads)) for _ in range(170)]
    changes = np.flatnonzero(np.diff(chosen))
    assert len(changes) > 1
    assert np.diff(changes).min() > 16
    stubborn = KController(range(1, 3), margin=0.5)
    for k in (1, 2):
        stubborn.observe_cost("verify", 8 * (k + 1), [1.0, 1.2][k - 1])
    stubborn.observe_acceptance([2] * 50, [1] * 50)
    assert stubborn.rates(8)[0] > stubborn.rates(8)[1]
    assert {stubborn.choose(8) for _ in range(100)} == {2}


def test_without_measurements_all_is_drafted() -> None:
    assert {KController(range(6)).choose(n) for n in range(1, 9)} == {5}
    with pytest.raises(ValueError, match="at least 0"):
        KController([])


def test_a_row_has_to_be_worth_its_time() -> None:
    """At R tokens a second, rows that take s seconds and are accepted with a chance below s R are in the way."""
    controller = KController([3])
    assert controller.min_chance(4) == 0
    for batch_size in [1, 2, 4, 8] * 40:
        for rows in (batch_size, 4 * batch_size):
            controller.observe_cost("verify", rows, 1e-3 + 1e-4 * rows)
        controller.observe_acceptance([3], [1])
    for batch_size in (1, 2, 4, 8):
        rate = batch_size * controller.acceptance.lengths()[3] / (1e-3 + 4e-4 * batch_size)
        assert controller.min_chance(batch_size) == pytest.approx(1e-4 * rate, rel=1e-2)
    # A machine that is bound by memory verifies further rows for nothing; one that is not does little else.
    free, dear = KController([3]), KController([3])
    for rows in (1, 4) * 50:
        free.observe_cost("verify", rows, 1e-2)
        dear.observe_cost("verify", rows, 1e-3 * rows)
    assert free.min_chance(1) == 0
    dear.observe_acceptance([3] * 50, [3] * 50)
    assert dear.min_chance(1) == 0.9
    assert KController([0]).min_chance(1) == 0


def test_costs_are_monotone_and_ignore_a_pause() -> None:
    curve = CostCurve()
    assert curve.seconds(np.array([4])) is None
    for rows in [1, 2, 4, 8, 16, 32, 64, 128] * 30:
        curve.observe(rows, verify_s(rows))
    curve.observe(16, 5.0)
    estimate = curve.seconds(np.arange(1, 400))
    assert estimate is not None
    assert (np.diff(estimate) >= 0).all()
    assert estimate[15] < 2 * verify_s(16)
    assert estimate[-1] > estimate[127]


def test_acceptance_without_evidence_is_that_of_the_position_before() -> None:
    acceptance = Acceptance(4)
    for _ in range(300):
        acceptance.observe([2, 2], [2, 0])
    rates = acceptance.rates()
    assert rates[0] == pytest.approx(0.5, abs=0.03)
    assert rates[1] == pytest.approx(1, abs=0.05)
    assert rates[2] == rates[3] == rates[1]
    assert acceptance.lengths() == pytest.approx(1 + np.cumsum([0, *np.cumprod(rates)]))


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(0.1, 3)), min_size=1, max_size=5))
def test_pooling_is_the_nearest_monotone_sequence(pairs: list[tuple[float, float]]) -> None:
    values, weights = np.array(pairs).T
    fitted = non_decreasing(values, weights)
    assert (np.diff(fitted) >= 0).all()
    # Optimal: no monotone sequence that shifts or blends towards other data is nearer.
    error = (weights * (fitted - values) ** 2).sum()
    generator = np.random.default_rng(0)
    for _ in range(50):
        other = np.sort(fitted + generator.normal(0, 0.5, len(fitted)))
        assert error <= (weights * (other - values) ** 2).sum() + 1e-9


def test_a_clock_tells_what_the_steps_took() -> None:
    now = iter([10.0, 10.5, 12.5, 13.0, 99.0, 99.1])
    clock = StepClock(KController(range(4)), clock=lambda: next(now))
    costs = clock.controller.costs
    assert clock.verified([1, 2], 7, [0, 0], [[5], [6]]) == 3
    clock.drafted(2, 3, answered=True)
    assert costs["draft"].seconds(np.array([8])) == pytest.approx([0.5])
    assert costs["verify"].seconds(np.array([8])) is None
    clock.verified([2, 3], 8, [3, 0], [[5, 6], []])
    assert costs["verify"].seconds(np.array([8])) == pytest.approx([2.0])
    assert clock.controller.acceptance.rates()[0] > clock.controller.acceptance.rates()[1]
    clock.drafted(1, 3, answered=False)
    clock.verified([9], 8, [0], [[5]])
    clock.drafted(1, 3, answered=True)
    assert costs["verify"].seconds(np.array([8])) == pytest.approx([2.0])
    assert costs["draft"].seconds(np.array([4])) == pytest.approx([0.1])


def test_a_pause_in_a_first_measurement_does_not_last() -> None:
    curve = CostCurve()
    for rows in [16, 32, 64, 128] * 30:
        curve.observe(rows, verify_s(rows))
    curve.observe(256, 5.0)
    for _ in range(9):
        curve.observe(256, verify_s(256))
    assert curve.evidence(256) == 10
    assert curve.evidence(512) == 0
    estimate = curve.seconds(np.array([256]))
    assert estimate is not None
    assert estimate[0] < 1.75 * verify_s(256)
