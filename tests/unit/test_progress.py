"""Progress counts what is new, and speaks also while nothing finishes."""

from __future__ import annotations

import logging
import time

import pytest

from pipelines.progress import GenerationProgress


def test_lines_come_while_no_shard_finishes(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with GenerationProgress(100, 40, every_s=0.05):
        time.sleep(0.3)
    assert len(caplog.messages) >= 3
    assert caplog.messages[0] == "generate: 40/100 rows, 0.0 rows/s, 0 tokens/s, unknown time left"


def test_rates_are_of_this_process_alone(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with GenerationProgress(100, 40, every_s=60) as progress:
        time.sleep(0.1)
        progress.add(30, 900)
        progress.add(30, 900)
        seconds = progress.seconds
        assert progress.tokens_per_second == pytest.approx(1800 / seconds, rel=0.2)
    assert caplog.messages[-1].startswith("generate: 100/100 rows, ")
    assert caplog.messages[-1].endswith(" 0 s left")
