"""`python -m benchmarks.soak [--minutes 30] [--share 0.7] [--out FILE]`: a service under steady load.

A tiny target with its draft is served on a private cluster. Its capacity is measured first; requests then arrive at
random at `share` of it, one in ten leaves after the first token. Latency is compared between the beginning and the end,
and so are memory, threads, sockets and shared memory of every process that serves.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
import psutil

from tests.fault.load import Load, Reply, ask, percentile
from tests.fault.record import Finding, at_most, conclude, equal
from tests.fault.scenario import Stage, is_ours, wait_until
from tests.fault.tiny import save_tiny_draft, save_tiny_target, tiny_recipe
from tests.private_ray import start_private_ray

LOAD = Load(stream=True, fields={"max_tokens": 32})
SLOTS = 8
WARM_UP_S = 60
DRIFT = (
    "Presumed, not measured apart: nothing that is counted grew, and at this load p99 follows the speed of the "
    "machine, which others share."
)
LEAVES = 0.1
"""Share of the clients that go away after the first token."""


@dataclass(frozen=True, slots=True)
class Census:
    """What the serving processes hold."""

    resident_mb: float
    threads: int
    files: int
    sockets: int
    segments: int
    """Of shared memory, of the whole machine."""


def census() -> Census:
    """Count what the processes that this one has started through Ray hold."""
    resident = threads = files = sockets = 0
    for process in psutil.process_iter():
        try:
            if not is_ours(process) or not process.cmdline()[0].startswith(("ray::Serve", "ray::ProxyActor", "VLLM::")):
                continue
            resident += process.memory_info().rss
            threads += process.num_threads()
            files += process.num_fds()
            sockets += len(process.net_connections())
        except (psutil.NoSuchProcess, psutil.AccessDenied, IndexError):
            continue
    return Census(resident / 2**20, threads, files, sockets, len(list(Path("/dev/shm").iterdir())))  # noqa: S108


def serve(folder: Path) -> Stage:
    """The service under test."""
    from serve_app.handle import serve_pairing

    start_private_ray()
    target = save_tiny_target(folder / "target")
    draft = save_tiny_draft(target, folder / "draft")
    handle = serve_pairing(tiny_recipe(target, draft, target_replicas=1))
    return Stage(service=handle, draft=draft, targets=1)


def capacity(url: str, seconds: float) -> float:
    """Requests per second that as many clients as there are slots get answered."""

    def run(client: int) -> int:
        with httpx.Client(base_url=url, timeout=60) as http:
            end, done = time.monotonic() + seconds, 0
            while time.monotonic() < end:
                done += not ask(http, LOAD.prompt(client, done), LOAD).failed
        return done

    with ThreadPoolExecutor(SLOTS) as pool:
        return sum(pool.map(run, range(SLOTS))) / seconds


def soak(url: str, rate: float, seconds: float) -> list[Reply]:
    """Requests that begin at random times, `rate` a second on average; those that left are not in the list."""
    chance, replies = random.Random(0), []
    limits = httpx.Limits(max_connections=200)
    with httpx.Client(base_url=url, timeout=60, limits=limits) as http, ThreadPoolExecutor(64) as pool:
        begun = due = time.monotonic()
        number = 0
        while due < begun + seconds:
            time.sleep(max(0.0, due - time.monotonic()))
            if chance.random() < LEAVES:
                pool.submit(_leave, http, LOAD.prompt(0, number))
            else:
                pool.submit(lambda n=number: replies.append(ask(http, LOAD.prompt(0, n), LOAD)))
            due += chance.expovariate(rate)
            number += 1
    return replies


def _leave(http: httpx.Client, prompt: str) -> None:
    body = {"prompt": prompt, "stream": True, "ignore_eos": True, **LOAD.fields}
    with http.stream("POST", "/v1/completions", json=body) as response:
        next(response.iter_raw())


def latency_of_thirds(replies: list[Reply]) -> list[dict[str, float]]:
    """Seconds of a whole answer in the first, the second and the last third."""
    ordered = sorted(replies, key=lambda reply: reply.begun)
    third = len(ordered) // 3
    parts = [[reply.total_s for reply in ordered[i * third : (i + 1) * third]] for i in range(3)]
    return [{f"p{share}": round(percentile(part, share / 100), 4) for share in (50, 90, 95, 99)} for part in parts]


def findings(stage: Stage, replies: list[Reply], before: Census, after: Census) -> list[Finding]:
    """What drifted and what is left."""
    ordered = sorted(replies, key=lambda reply: reply.begun)
    third = len(ordered) // 3
    first, last = (percentile([r.total_s for r in part], 0.99) for part in (ordered[:third], ordered[-third:]))
    memory = 100 * (after.resident_mb / before.resident_mb - 1)
    return [
        equal("requests that failed", sum(reply.failed for reply in replies), 0),
        equal("requests left running", stage.metric("unmask_requests_running"), 0.0),
        equal("requests left in the engine", stage.metric("vllm:num_requests_running"), 0.0),
        at_most("p99 of the last third over the first, drift", 100 * (last / first - 1), 10, "%", reason=DRIFT),
        at_most("memory drift", memory, 2, "%"),
        at_most("threads gained", after.threads - before.threads, 0, "threads"),
        at_most("sockets gained", after.sockets - before.sockets, 0, "sockets"),
        at_most("open files gained", after.files - before.files, 0, "files"),
        at_most("shared memory segments gained", after.segments - before.segments, 0, "segments"),
    ]


def main() -> None:
    """Run the soak and record it as row O8."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--share", type=float, default=0.7, help="of the capacity")
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="u") as folder:
        stage = serve(Path(folder))
        url = stage.service.url
        wait_until(stage.is_whole, 120)
        capacity(url, 10)  # warms every path
        most = capacity(url, 20)
        soak(url, arguments.share * most, WARM_UP_S)  # thread pools grow to what this rate needs
        before = census()
        replies = soak(url, arguments.share * most, 60 * arguments.minutes)
        wait_until(lambda: stage.metric("unmask_requests_running") == 0, 30)
        time.sleep(5)  # connections that clients left open are closed by then
        after = census()
        found = findings(stage, replies, before, after)
        stage.service.shutdown()
    share = f"{100 * arguments.share:.0f} % of {most:.1f} requests/s"
    scale = f"{arguments.minutes:g} minutes at {share}, {len(replies)} answers"
    figures = {
        "scale": scale,
        "before": asdict(before),
        "after": asdict(after),
        "latency": latency_of_thirds(replies),
        "findings": [asdict(f) for f in found],
    }
    print(json.dumps(figures, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=2) + "\n")
    conclude("O8", "steady load", scale, found)


if __name__ == "__main__":
    main()
