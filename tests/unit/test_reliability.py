"""The table of reliability, from records that are kept and those of tests that have run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.fault.report import document, load, unmet


def record(event: str, when: str, met: bool, reason: str = "") -> dict[str, Any]:
    finding = {"what": "failures", "required": "0", "measured": when, "met": met, "timed": False, "reason": reason}
    machine = "2 cores, x86_64, load 1.0"
    return {"row": "F1", "event": event, "scale": "8 clients", "findings": [finding], "when": when, "machine": machine}


def test_the_latest_record_of_each_event_counts(tmp_path: Path) -> None:
    results = tmp_path / "kept.json"
    results.write_text(json.dumps([record("a", "2026-01-02 10:00", False), record("b", "2026-01-02 10:00", True)]))
    here = tmp_path / "records"
    here.mkdir()
    (here / "a.json").write_text(json.dumps(record("a", "2026-01-03 09:00", True)))
    (here / "b.json").write_text(json.dumps(record("b", "2026-01-01 09:00", True)))
    found = load(here, results)
    assert [(r["event"], r["when"]) for r in found] == [("a", "2026-01-03 09:00"), ("b", "2026-01-02 10:00")]
    assert not unmet(found)
    assert "last on 2026-01-03 09:00" in document(found)


def test_what_is_not_met_wants_a_reason(tmp_path: Path) -> None:
    records = [record("a", "2026-01-02 10:00", False), record("b", "2026-01-02 10:00", False, "Slow disk.")]
    assert unmet(records) == ["F1 a: failures is 2026-01-02 10:00, not 0"]
    assert "1. F1, b: failures: Slow disk." in document(records)
    assert load(tmp_path, tmp_path / "none.json") == []
