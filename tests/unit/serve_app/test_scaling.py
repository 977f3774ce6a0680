"""Scaling decisions: within bounds, enough for the load, and still while the load is."""

from __future__ import annotations

from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st
from ray.serve.config import AutoscalingPolicy

from serve_app.scaling import HIGH, LOW, DraftPolicy, Rate, TargetPolicy, decide

counts = st.integers(1, 64)
loads = st.floats(0, 200)


@given(current=counts, load=loads, least=counts, span=st.integers(0, 64))
def test_decisions_stay_within_the_bounds(current: int, load: float, least: int, span: int) -> None:
    assert least <= decide(current, load, least, least + span) <= least + span


@given(current=counts, load=loads)
def test_replicas_suffice_for_the_load(current: int, load: float) -> None:
    decided = decide(current, load, 1, 1000)
    assert load <= HIGH * decided + 1e-9


@given(current=counts, load=loads)
def test_a_decision_stands_while_the_load_does(current: int, load: float) -> None:
    decided = decide(current, load, 1, 1000)
    assert decide(decided, load, 1, 1000) == decided


@given(current=st.integers(2, 64), wobble=st.lists(st.floats(0, 1), min_size=2, max_size=20))
def test_load_that_moves_between_the_bounds_changes_nothing(current: int, wobble: list[float]) -> None:
    # Fewer replicas would be above LOW, these are below HIGH.
    low, high = LOW * (current - 1) + 1e-6, HIGH * current - 1e-6
    for share in wobble:
        assert decide(current, low + share * (high - low) if low < high else high, 1, 1000) == current


@given(current=counts, smaller=loads, larger=loads)
def test_more_load_never_asks_for_fewer(current: int, smaller: float, larger: float) -> None:
    smaller, larger = sorted((smaller, larger))
    assert decide(current, smaller, 1, 1000) <= decide(current, larger, 1, 1000)


def _context(replicas: int, *, requests: float = 0, most: int = 8, **metrics: list[float]) -> SimpleNamespace:
    """Serve's view, as far as the policies look at it."""
    return SimpleNamespace(
        target_num_replicas=replicas,
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=most,
        total_num_requests=requests,
        aggregated_metrics={name: dict(enumerate(values)) for name, values in metrics.items()},
    )


def test_the_target_grows_by_requests_and_by_tokens() -> None:
    policy = TargetPolicy(requests=10, tokens_per_second=1000)
    assert policy(_context(1, requests=7))[0] == 1
    assert policy(_context(1, requests=24))[0] == 3
    assert policy(_context(2, requests=2, tokens_per_second=[1000, 950]))[0] == 3
    assert TargetPolicy(requests=10)(_context(2, requests=9, tokens_per_second=[1e6, 1e6]))[0] == 2
    assert policy(_context(3, requests=0))[0] == 1


def test_the_draft_grows_by_the_time_that_it_computes() -> None:
    policy = DraftPolicy()
    assert policy(_context(1, requests=500, busy=[0.7]))[0] == 1
    assert policy(_context(1, busy=[0.95]))[0] == 2
    assert policy(_context(2, busy=[0.95, 0.0]))[0] == 2
    assert policy(_context(4, busy=[0.2, 0.2, 0.1, 0.1]))[0] == 2
    assert policy(_context(2, most=2, busy=[1.0, 1.0]))[0] == 2
    assert policy(_context(1))[0] == 1


def test_rates_are_those_between_two_looks() -> None:
    times = iter([10.0, 12.0, 12.0, 16.0])
    rate = Rate(clock=lambda: next(times))
    assert [rate.of(count) for count in (5.0, 9.0, 9.0, 11.0)] == [0.0, 2.0, 0.0, 0.5]


def test_serve_can_load_the_policies_by_value() -> None:
    policy = AutoscalingPolicy(policy_function=TargetPolicy, policy_kwargs={"requests": 4, "tokens_per_second": None})
    assert policy.get_policy()(**policy.policy_kwargs)(_context(1, requests=8))[0] == 3
