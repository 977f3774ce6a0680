"""`python -m tests.fault.report`: write docs/reliability.md and its raw figures from what fault tests have recorded.

A test that has run here takes the place of its last record; the others stay as they are kept in
benchmarks/results/reliability.json. With `--check` nothing is written, and the exit code is 1 when a figure is not met
and no reason is on record.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tests.fault.record import RECORDS

_ROOT = Path(__file__).parents[2]
DOCUMENT = _ROOT / "docs" / "reliability.md"
RESULTS = _ROOT / "benchmarks" / "results" / "reliability.json"

ROWS = {
    "F1": "A target replica dies under requests that are not streamed",
    "F1, F2": "A target replica dies under requests of both kinds",
    "F2": "A target replica dies in the middle of streams",
    "F3": "A target replica dies in the middle of streams that cannot be continued",
    "F4": "A target replica comes back",
    "F5": "Serve's controller dies",
    "F6": "The HTTP proxy dies",
    "F7": "A target replica hangs",
    "F8": "Rolling update",
    "F9": "SIGTERM during load",
    "F10": "Training: worker or driver dies, or it is told to stop",
    "F11": "A training checkpoint is cut, damaged, or meets a full disk",
    "F12": "Generation: actor, driver, node or disk goes; a poisoned row",
    "F13": "Elastic training, 2 to 1 to 2 workers",
    "F14": "The draft dies, comes back broken, or talks nonsense",
    "O1": "Ten times the load that can be served",
    "O2": "Clients go away",
    "O3": "A client reads slowly",
    "O4": "A request takes too long",
    "O5": "Bodies that are no requests",
    "O8": "Soak",
    "O9": "The service's own time",
}

HEADER = """# Reliability

What is done to the service and the pipelines by `tests/fault`, and what came of it. The table is written by
`python -m tests.fault.report` from what the tests measured ([raw figures](../benchmarks/results/reliability.json)); the
quick tests run in `make test`, all of them in `make test-all`. Replicas are real vLLM engines on CPU; unless the row
says otherwise the target is a random network of six layers, so that a test costs seconds. Its greedy text depends on
every token before, so a lost or doubled token would change all that follows.

A figure in seconds, megabytes, per cent or multiples of another is recorded, not asserted: it tells of the machine as
much as of the code. All others fail the test. Where a figure is not met the reason stands below. "Whole again after" is
the time from the signal until every replica is ready and every target has its draft, under load; F4 is without load.

"""


def load(directory: Path = RECORDS, results: Path = RESULTS) -> list[dict[str, Any]]:
    """The latest record of each event, in the order of the rows."""
    kept = json.loads(results.read_text()) if results.is_file() else []
    fresh = [json.loads(path.read_text()) for path in directory.glob("*.json")]
    by_time = sorted([*kept, *fresh], key=lambda record: record["when"])
    latest = {(record["row"], record["event"]): record for record in by_time}
    order = list(ROWS)
    return sorted(latest.values(), key=lambda record: (order.index(record["row"]), record["event"]))


def unmet(records: list[dict[str, Any]]) -> list[str]:
    """Figures that are not met and for which there is no reason."""
    return [
        f"{record['row']} {record['event']}: {finding['what']} is {finding['measured']}, not {finding['required']}"
        for record in records
        for finding in record["findings"]
        if not finding["met"] and not finding["reason"]
    ]


def document(records: list[dict[str, Any]]) -> str:
    """The whole document."""
    lines = [HEADER, "| | event | figure | required | measured | |", "|---|---|---|---|---|---|"]
    notes: list[str] = []
    for record in records:
        head = (record["row"], f"{record['event']}; {record['scale']}")
        for finding in record["findings"]:
            verdict = "met" if finding["met"] else "**not met**"
            if not finding["met"] and finding["reason"]:
                notes.append(f"{record['row']}, {record['event']}: {finding['what']}: {finding['reason']}")
                verdict += f" ({len(notes)})"
            lines.append(
                "| " + " | ".join([*head, finding["what"], finding["required"], finding["measured"], verdict]) + " |"
            )
            head = ("", "")
    measured = {row for record in records for row in record["row"].split(", ")}
    missing = [f"- {row} {text}." for row, text in ROWS.items() if not _seen(row, measured)]
    if notes:
        lines += ["", "## Figures that are not met", "", *(f"{n}. {note}" for n, note in enumerate(notes, 1))]
    if missing:
        lines += ["", "## Rows without a measurement", "", *missing]
    machines = sorted({record["machine"].rpartition(",")[0] for record in records})
    lines += ["", "Measured on " + "; ".join(machines) + ", other work running beside, last on " + _last(records) + "."]
    return "\n".join(lines) + "\n"


def _seen(row: str, measured: set[str]) -> bool:
    return measured.issuperset(row.split(", "))


def _last(records: list[dict[str, Any]]) -> str:
    return max(record["when"] for record in records)


def main() -> int:
    """Run the command line; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.fault.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether every figure is met or explained")
    arguments = parser.parse_args()
    records = load()
    problems = unmet(records)
    if problems:
        sys.stderr.write("".join(f"{problem}\n" for problem in problems))
    if arguments.check:
        return 1 if problems else 0
    RESULTS.write_text(json.dumps(records, indent=1) + "\n")
    DOCUMENT.write_text(document(records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
