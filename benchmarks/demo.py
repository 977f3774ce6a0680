"""The figures of the README's first table: the demo's report with the machine it ran on.

make demo && .venv/bin/python benchmarks/demo.py .unmask/demo/report.json benchmarks/results/demo_cpu.json
"""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path


def machine() -> dict[str, object]:
    """What the figures depend on."""
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name")), "unknown")
    memory_kb = int(Path("/proc/meminfo").read_text().split()[1])
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gb": round(memory_kb / 2**20),
        "python": platform.python_version(),
    }


def main(report: Path, result: Path) -> None:
    """Put machine and command beside a report."""
    figures = json.loads(report.read_text())
    for section, name in (("evaluate", "plot"), ("publish", "path")):
        figures[section].pop(name)  # folders of that machine
    tree = {"command": "make demo", "machine": machine(), "report": figures}
    result.write_text(json.dumps(tree, indent=2) + "\n")
    print(result)


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:3]))
