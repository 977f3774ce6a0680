"""What each fault test required and measured, kept as JSON for `python -m tests.fault.report`."""

from __future__ import annotations

import json
import os
import platform
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

_OF_THE_MACHINE = ("s", "ms", "x", "%", "MB")
"""Units of figures that tell of the machine as much as of the code; counts do not."""

RECORDS = Path(__file__).parents[2] / ".unmask" / "reliability"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One figure of a test: what it had to be, what it was, and whether that will do.

    A `timed` figure is recorded and never asserted: it tells of the machine as much as of the code.
    """

    what: str
    required: str
    measured: str
    met: bool
    timed: bool = False
    reason: str = ""
    """Why a figure that is not met is not met."""


def equal(what: str, measured: object, required: object) -> Finding:
    """A figure that must be exactly what is required."""
    return Finding(what=what, required=str(required), measured=str(measured), met=measured == required)


def at_most(what: str, measured: float, limit: float, unit: str = "s", reason: str = "") -> Finding:
    """A time or size with an upper limit."""
    met = measured <= limit
    return Finding(
        what=what,
        required=f"<= {limit:g} {unit}",
        measured=f"{measured:.3g} {unit}",
        met=met,
        timed=unit in _OF_THE_MACHINE,
        reason="" if met else reason,
    )


def conclude(row: str, event: str, scale: str, findings: Sequence[Finding]) -> None:
    """Record a test's findings, then fail if one that is not timed is not met.

    Args:
        row: the failure's number, such as `F1`.
        event: what was done; another record of the same replaces this one.
        scale: how much of it, such as `8 clients x 100 requests`.
    """
    RECORDS.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", f"{row} {event}".lower()).strip("-")
    record = {
        "row": row,
        "event": event,
        "scale": scale,
        "findings": [asdict(finding) for finding in findings],
        "when": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, load {os.getloadavg()[0]:.1f}",
    }
    (RECORDS / f"{slug}.json").write_text(json.dumps(record, indent=2) + "\n")
    missed = [finding for finding in findings if not finding.met and not finding.timed]
    assert not missed, missed
