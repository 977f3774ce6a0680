"""F8: a rolling update to another target under load. It leaves the new version served: nothing may come after it."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

import pytest

from serve_app.handle import serve_pairing
from tests.fault.load import Load, Reply, undisturbed
from tests.fault.record import Finding, conclude, equal
from tests.fault.scenario import Scenario, Stage, no_failures, nothing_left, pause, play, slowest_answer
from tests.fault.tiny import save_tiny_draft, save_tiny_target, tiny_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_every_answer_is_of_one_version(stage: Stage, expected: dict[str, tuple[str, int]], tmp_path: Path) -> None:
    target = save_tiny_target(tmp_path / "target", seed=1)
    draft = save_tiny_draft(target, tmp_path / "draft", seed=1)
    newer: dict[str, tuple[str, int]] = {}

    def update(stage: Stage) -> None:
        serve_pairing(tiny_recipe(target, draft, port=urlsplit(stage.service.url).port or 0))

    def of_one_version(stage: Stage, replies: list[Reply]) -> list[Finding]:
        newer.update(undisturbed(stage.service.url, Load()))
        old = sum((reply.text, reply.tokens) == expected[reply.prompt] for reply in replies)
        new = sum((reply.text, reply.tokens) == newer[reply.prompt] for reply in replies)
        return [
            equal("answers of neither version", len(replies) - old - new, 0),
            Finding(
                what="answers of the old and the new one",
                required="both",
                measured=f"{old} and {new}",
                met=old > 0 and new > 0,
            ),
        ]

    findings = play(
        stage,
        Scenario(
            load=Load(requests=100_000),
            events=[update, pause(3)],
            until_events_end=True,
            checks=[no_failures, of_one_version, slowest_answer(30), nothing_left],
        ),
    )
    conclude("F8", "update to another target", "8 clients, two replicas", findings)
