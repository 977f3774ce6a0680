"""A draft whose weights are replaced, that is stopped, goes on, is killed and started anew, while its target serves.

    python -m benchmarks.pairing_faults --out benchmarks/results/pairing_faults.json              (two GPUs)
    python -m benchmarks.pairing_faults --gpus 1 --out /tmp/faults.json                           (one GPU for both)
    python -m benchmarks.pairing_faults --tiny --out /tmp/faults.json                             (any machine)

A constant number of requests runs at the production limits: a new one begins as one ends, and nothing is disturbed
before the engine has chosen its K. `pause_ms` is the longest step; `back_s` says how long after the draft's return the
first second begins in which the target emits at least 95 % of the tokens that it emitted before anything happened.
Random weights; on GPUs acceptance is synthetic, as in `benchmarks.pairing`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from benchmarks.pairing import await_draft, await_link, draft_process, engine_environment
from benchmarks.pairing_engines import engine_options
from benchmarks.pairing_load import SETTLED_STEPS, Load, Steps, keep_up, pauses_ms
from benchmarks.pairing_rows import machine_of
from benchmarks.pairing_shapes import SHAPES, shape_folder
from engines.draft_arguments import WATCHDOG_VARIABLE
from unmask.config.serve import ServeConfig
from unmask.pairing.link_file import read_link_file, write_link_file

STOPPED_S = 3.0
WITHIN = 0.95


def main() -> None:
    """Disturb the draft and write what the target's steps show."""
    arguments = _parse()
    if arguments.role == "engine":
        run_engine(arguments)
        return
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with shape_folder(arguments.shape, arguments.tiny) as arguments.folder:
        rows = disturbed(arguments)
    for row in rows:
        print(json.dumps(row))
    arguments.out.write_text(json.dumps(rows, indent=1) + "\n")


def disturbed(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row each for the draft whose weights were replaced, that was stopped, and that was killed."""
    folder, rest_s = arguments.folder, arguments.seconds
    with draft_process(arguments, "--shape", arguments.shape) as draft:
        await_link(arguments, draft)
        set_limits(arguments)
        command = [sys.executable, "-m", "benchmarks.pairing_faults", *sys.argv[1:], f"--folder={folder}"]
        environment = os.environ | engine_environment(arguments, 0)
        environment[WATCHDOG_VARIABLE] = str(1.25 * limit_ms(arguments))
        engine = subprocess.Popen([*command, "--role=engine"], stdout=subprocess.PIPE, text=True, env=environment)
        try:
            wait_for(lambda: (folder / "running").exists(), engine)
            time.sleep(rest_s)
            swapped = time.time()
            draft.stdin.write(b"swap\n")
            draft.stdin.flush()
            wait_for((folder / "swapped").exists, engine, draft)
            time.sleep(rest_s)
            stopped = time.time()
            draft.send_signal(signal.SIGSTOP)
            time.sleep(STOPPED_S)
            draft.send_signal(signal.SIGCONT)
            continued = time.time()
            time.sleep(rest_s)
            killed = time.time()
            draft.kill()
            draft.wait()
            (folder / "address").unlink()
            with draft_process(arguments, "--shape", arguments.shape) as another:
                await_link(arguments, another)
                set_limits(arguments)
                restarted = time.time()
                time.sleep(rest_s)
                (folder / "enough").touch()
                output, _ = engine.communicate()
        finally:
            # Each would outlive a failure of the other.
            draft.send_signal(signal.SIGCONT)
            engine.kill()
    if engine.returncode:
        raise RuntimeError("the engine has failed")
    report = json.loads(next(line for line in reversed(output.splitlines()) if line.startswith("{")))
    common = {"shape": arguments.shape, "concurrency": arguments.concurrency[0], "gpus": arguments.gpus}
    common |= {"limit_ms": limit_ms(arguments), "requests": report["requests"], "failed": report["failed"]}
    undisturbed = rate(report["steps"], swapped - 2, swapped)
    common |= {"machine": machine_of(arguments), "tokens_per_second_before": round(undisturbed, 1)}
    spans = (("stopped", stopped, continued), ("killed", killed, restarted))
    return [
        {"draft": "swapped", **common, **swap(report["steps"], swapped, folder / "swapped")},
        *(
            {"draft": name, **common, **back(report["steps"], undisturbed, began, ended, ended + rest_s)}
            for name, began, ended in spans
        ),
    ]


def swap(steps: Steps, began: float, told: Path) -> dict[str, Any]:
    """Pauses between steps, in ms, before and around a replacement that `told` tells of."""
    ended, (before, after) = told.stat().st_mtime, told.read_text().split()
    pauses = pauses_ms(steps)
    calm = [pause for at, pause in pauses if began - 3 <= at < began]
    around = [pause for at, pause in pauses if began <= at <= ended + 2]
    return {
        "swap_seconds": round(ended - began, 2),
        "version_changed": before != after,
        **{f"pause_ms_{name}_before": figure for name, figure in _figures(calm).items()},
        **{f"pause_ms_{name}_around": figure for name, figure in _figures(around).items()},
        "tokens_per_second_around": round(rate(steps, began, ended + 2), 1),
    }


def _figures(pauses: list[float]) -> dict[str, float]:
    return {
        "median": round(median(pauses), 2),
        "p99": round(quantiles(pauses, n=100, method="inclusive")[98], 2),
        "max": round(max(pauses), 2),
    }


def rate(steps: Steps, start: float, end: float) -> float:
    """Tokens a second between two times."""
    return sum(tokens for at, tokens in steps if start <= at < end) / (end - start)


def back(steps: Steps, undisturbed: float, began: float, ended: float, last: float) -> dict[str, Any]:
    """What the steps show of a draft that was away from `began` to `ended`, up to `last`.

    Args:
        undisturbed: tokens a second before anything happened.
    """
    tenths = (i / 10 for i in range(int(10 * (last - 1 - ended))))
    soonest = (after for after in tenths if rate(steps, ended + after, ended + after + 1) >= WITHIN * undisturbed)
    pauses = [pause for at, pause in pauses_ms(steps) if began <= at + pause / 1000 and at <= last]
    return {
        "away_s": round(ended - began, 2),
        "tokens_per_second_without": round(rate(steps, began + 1, ended), 1),
        "tokens_per_second_after": round(rate(steps, last - 2, last), 1),
        "pause_ms": round(max(pauses), 1),
        "back_s": next(soonest, None),
    }


def limit_ms(arguments: argparse.Namespace) -> float:
    """How long a step waits for its draft in production."""
    return ServeConfig(target_gpus=0 if arguments.tiny else 1).draft_limit_ms


def set_limits(arguments: argparse.Namespace) -> None:
    """Production limits in place of the patient ones of the other benchmarks."""
    link, defaults = arguments.folder / "link", ServeConfig()
    limits = {"timeout_ms": limit_ms(arguments), "retry_s": defaults.draft_retry_s}
    write_link_file(link, replace(read_link_file(link), **limits))


def wait_for(condition: Callable[[], bool], *processes: subprocess.Popen) -> None:
    """Return when it holds. Raises RuntimeError when a process has ended that it needs."""
    while not condition():
        if any(process.poll() is not None for process in processes):
            raise RuntimeError("the engine or its draft has ended")
        time.sleep(0.05)


def run_engine(arguments: argparse.Namespace) -> None:
    """Keep requests running until `enough` is there; print the steps."""
    from vllm import LLM

    llm = LLM(**engine_options(arguments, ("remote",) if arguments.tiny else ("production",)))
    await_draft(llm, arguments)
    settled = 100 if arguments.tiny else SETTLED_STEPS

    def is_enough(load: Load) -> bool:
        if len(load.steps) == settled:
            (arguments.folder / "running").touch()
        return (arguments.folder / "enough").exists()

    lengths = (16, 64) if arguments.tiny else (256, 768)
    load = keep_up(llm, arguments.shape, arguments.concurrency[0], lengths, is_enough)
    print(json.dumps({"steps": load.steps, "requests": load.requests, "failed": load.failed}))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-8b")
    parser.add_argument("--gpus", type=int, choices=(1, 2), default=2, help="1 puts target and draft on one")
    parser.add_argument("--concurrency", type=int, default=32, help="requests that run at once")
    parser.add_argument("--seconds", type=float, default=8.0, help="without a disturbance, before and after each")
    parser.add_argument("--tiny", action="store_true", help="small networks on the CPU: shows that it runs")
    parser.add_argument("--role", choices=("run", "engine"), default="run", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.shape, arguments.concurrency, arguments.gpus = "tiny", 4, 1
    arguments.concurrency, arguments.max_model_len = [arguments.concurrency], None
    return arguments


if __name__ == "__main__":
    main()
