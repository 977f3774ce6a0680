"""F14 with more drafts than targets: each target spreads its requests over its drafts, and one of them is killed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from serve_app.handle import serve_pairing
from tests.fault.load import Load, start
from tests.fault.record import conclude
from tests.fault.scenario import Scenario, Stage, kill, no_failures, nothing_left, play, recovers, same_text, wait_until
from tests.fault.tiny import tiny_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

DRAFTS = 3
LOAD = Load(requests=20, stream=True)


def asked(stage: Stage) -> int:
    """Drafts that have proposed something."""
    drafts = [report for report in stage.service.reports() if report.role == "draft"]
    return sum(report.stats["unmask_draft_proposals_total"] > 0 for report in drafts)


def test_targets_share_the_drafts_and_miss_none_that_is_killed(
    stage: Stage, expected: dict[str, tuple[str, int]], target_dir: Path, draft_dir: Path
) -> None:
    usual = tiny_recipe(target_dir, draft_dir, port=urlsplit(stage.service.url).port or 0)
    serve_pairing(replace(usual, serve=replace(usual.serve, draft_replicas=DRAFTS)))
    shared = replace(stage, drafts=DRAFTS)
    try:
        wait_until(shared.is_whole, 120)
        start(stage.service.url, LOAD).wait()
        wait_until(lambda: asked(shared) == DRAFTS, 10)
        findings = play(
            shared,
            Scenario(
                load=LOAD,
                events=[kill("draft")],
                checks=[no_failures, same_text(expected), recovers(60), nothing_left],
            ),
        )
    finally:
        serve_pairing(usual)
        wait_until(stage.is_whole, 120)
    conclude("F14", "SIGKILL one of three drafts of two targets", "8 clients x 20 streams", findings)
