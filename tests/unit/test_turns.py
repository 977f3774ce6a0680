"""Requests that take turns in two halves."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest

from engines.turns import Turns


class ImaginedScheduler:
    """Schedules whoever is eligible, as vLLM's does; requests come and go."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.current_step = 0
        self.running: list[SimpleNamespace] = []

    def admit(self, count: int, *, prompt_steps: int = 0, grammar: bool = False) -> None:
        for _ in range(count):
            self.running.append(
                SimpleNamespace(
                    next_decode_eligible_step=0,
                    prompt_steps=prompt_steps,
                    is_prefill_chunk=True,
                    use_structured_output=grammar,
                    steps=[],
                )
            )

    def step(self, turns: Turns) -> tuple[list[SimpleNamespace], bool]:
        """Those that draft in the next step, and whether their proposals come later."""
        self.current_step += 1
        scheduled = [r for r in self.running if self.current_step >= r.next_decode_eligible_step]
        drafting = []
        for request in scheduled:
            request.prompt_steps -= 1
            request.is_prefill_chunk = request.prompt_steps >= 0
            if not request.is_prefill_chunk:
                request.steps.append(self.current_step)
                request.next_decode_eligible_step = self.current_step + 1
                drafting.append(request)
        return drafting, turns.give(self, drafting)


@pytest.mark.parametrize("seed", range(5))
def test_nobody_is_in_two_steps_running_and_nobody_waits_long(seed: int) -> None:
    scheduler, turns = ImaginedScheduler(seed), Turns(4)
    scheduler.admit(16)
    for _ in range(200):
        scheduler.step(turns)
        leaving = [r for r in scheduler.running if r.steps and scheduler.random.random() < 0.02]
        scheduler.running = [r for r in scheduler.running if r not in leaving]
        if scheduler.random.random() < 0.3:
            scheduler.admit(1, prompt_steps=scheduler.random.randint(0, 3))
        if len(scheduler.running) < 8:
            scheduler.admit(4)
    pauses = [b - a for r in scheduler.running for a, b in zip(r.steps, r.steps[1:], strict=False)]
    assert set(pauses) <= {1, 2, 3}
    assert pauses.count(2) > 0.9 * len(pauses)


@pytest.mark.parametrize("seed", range(5))
def test_what_comes_later_comes_in_time(seed: int) -> None:
    """Nobody whose proposals come later is in the next step."""
    scheduler, turns = ImaginedScheduler(seed), Turns(4)
    owed: list[SimpleNamespace] = []
    for _ in range(300):
        drafting, later = scheduler.step(turns)
        assert not [request for request in drafting if request in owed]
        owed = drafting if later else []
        scheduler.running = [r for r in scheduler.running if not r.steps or scheduler.random.random() > 0.05]
        scheduler.admit(scheduler.random.choice([0, 0, 0, 1, 12]), prompt_steps=scheduler.random.randint(0, 3))


def test_the_halves_become_even() -> None:
    scheduler, turns = ImaginedScheduler(0), Turns(2)
    scheduler.admit(9)
    # All at once, which is drafted for as ever, then half by half.
    steps = [(len(drafting), later) for drafting, later in (scheduler.step(turns) for _ in range(6))]
    assert steps == [(9, False), (4, True), (5, True), (4, True), (5, True), (4, True)]
    scheduler.admit(6)
    assert [len(scheduler.step(turns)[0]) for _ in range(7)] == [11, 7, 8, 7, 8, 7, 8]


def test_turns_go_on_until_a_quarter_has_left() -> None:
    scheduler, turns = ImaginedScheduler(0), Turns(8)
    scheduler.admit(7)
    assert not any(scheduler.step(turns)[1] for _ in range(3))
    scheduler.admit(1)
    assert any(scheduler.step(turns)[1] for _ in range(3))
    scheduler.running = scheduler.running[:6]
    scheduler.step(turns)  # the halves become even
    assert all(scheduler.step(turns)[1] for _ in range(4))
    scheduler.running = scheduler.running[:5]
    assert not any(scheduler.step(turns)[1] for _ in range(4))


def test_prompts_do_not_count() -> None:
    scheduler, turns = ImaginedScheduler(0), Turns(4)
    scheduler.admit(3)
    scheduler.admit(5, prompt_steps=4)
    assert not any(scheduler.step(turns)[1] for _ in range(4))


def test_nobody_waits_where_nobody_drafts() -> None:
    scheduler, turns = ImaginedScheduler(0), Turns(4)
    scheduler.admit(8)
    assert any(scheduler.step(turns)[1] for _ in range(2))
    turns.has_draft = False
    for _ in range(3):
        drafting, later = scheduler.step(turns)
        assert not later
    assert len(drafting) == 8
    turns.has_draft = True
    assert any(scheduler.step(turns)[1] for _ in range(2))


def test_few_requests_and_grammars_go_on_as_without() -> None:
    scheduler, turns = ImaginedScheduler(0), Turns(4)
    scheduler.admit(3)
    assert [(len(drafting), later) for drafting, later in (scheduler.step(turns) for _ in range(3))] == [(3, False)] * 3
    scheduler.admit(3)
    assert any(scheduler.step(turns)[1] for _ in range(2))
    scheduler.admit(1, grammar=True)
    for _ in range(3):
        drafting, later = scheduler.step(turns)
        assert not later
    assert len(drafting) == 7
    assert not ImaginedScheduler(0).step(Turns())[1]
