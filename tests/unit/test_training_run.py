"""What a training's driver says while no node has room for it, and what SIGTERM does to it."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from actors import training_run
from actors.stop_request import StopRequest
from unmask.placement import Demand, NodeType

DEMAND = Demand(name="distill", resources={"CPU": 2}, labels={"role": "train"}, least=1, most=3)


def test_the_log_says_what_is_waited_for(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    room, lacking = (
        [NodeType(name="a", resources={"CPU": 2}, labels={"role": role})] for role in ("train", "generate")
    )
    looks = [room, lacking, lacking, lacking, lacking, room, lacking]
    over = threading.Event()

    def look() -> list[NodeType]:
        if len(looks) == 1:
            over.set()
        return looks.pop(0)

    monkeypatch.setattr(training_run, "live_nodes", look)
    monkeypatch.setattr(training_run, "_LOOK_S", 0.0)
    monkeypatch.setattr(training_run, "_LOOKS_TO_TELL", 3)
    with caplog.at_level("INFO", training_run.__name__):
        training_run._tell_shortage(DEMAND, over)
    waiting = "waiting for nodes: distill: no node is labelled role=train; SIGTERM ends it"
    assert caplog.messages == [waiting] * 3


def test_a_second_sigterm_interrupts(tmp_path: Path) -> None:
    request, before = StopRequest(tmp_path), signal.getsignal(signal.SIGTERM)
    with request.by_sigterm():
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.is_made()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
