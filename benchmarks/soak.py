"""`python -m benchmarks.soak [--minutes 30] [--share 0.7] [--out FILE]`: a service under steady load.

A tiny target with its draft is served on a private cluster. Its capacity is measured first; requests then arrive at
random at `share` of it, one in ten leaves after the first token. Each third of the time has the same arrivals, so that
latency can be compared between the first and the last: what remains is the service and the machine, whose speed a
probe measures meanwhile. Memory, threads, sockets and shared memory of every process that serves are counted too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
import psutil

from benchmarks.machine_probe import Probe, undisturbed
from tests.fault.load import Load, Reply, ask, percentile
from tests.fault.record import Finding, at_most, conclude, equal
from tests.fault.scenario import Stage, is_ours, wait_until
from tests.fault.tiny import save_tiny_draft, save_tiny_target, tiny_recipe
from tests.private_ray import start_private_ray

LOAD = Load(stream=True, fields={"max_tokens": 32})
SLOTS = 8
WARM_UP_S = 60
LEAVES = 0.1
"""Share of the clients that go away after the first token."""

REST_S = 5.0
"""Connections that clients left open are closed by then."""
GRPC_POOL = "event_engine"
"""Threads of gRPC in every process of Ray: some more under the first load, then as many for good."""
ENOUGH = 300
"""Answers of a third whose p99 says something."""


@dataclass(frozen=True, slots=True)
class Census:
    """What the serving processes hold."""

    resident_mb: float
    threads: int
    files: int
    sockets: int
    segments: int
    """Of shared memory, of the whole machine."""
    named: dict[str, int]
    """Threads by their process and their own name."""


def census() -> Census:
    """Count what the processes that this one has started through Ray hold."""
    resident = files = sockets = 0
    named: Counter[str] = Counter()
    for process in psutil.process_iter():
        try:
            if not is_ours(process) or not process.cmdline()[0].startswith(("ray::Serve", "ray::ProxyActor", "VLLM::")):
                continue
            resident += process.memory_info().rss
            # Ray shows what a replica is doing behind a dot.
            owner = process.cmdline()[0].partition(".")[0]
            named.update(f"{owner}: {name}" for name in thread_names(process.pid))
            files += process.num_fds()
            sockets += len(process.net_connections())
        except (psutil.NoSuchProcess, psutil.AccessDenied, IndexError):
            continue
    segments = len(list(Path("/dev/shm").iterdir()))  # noqa: S108
    return Census(resident / 2**20, named.total(), files, sockets, segments, dict(sorted(named.items())))


def thread_names(pid: int) -> list[str]:
    """Of a process's threads, as the kernel knows them."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # a thread that ends meanwhile
            found.append((task / "comm").read_text().strip())
    return found


def served_s() -> float:
    """Seconds of a core that Ray, the service and its engine have had so far."""
    seconds = 0.0
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if is_ours(process):
                times = process.cpu_times()
                seconds += times.user + times.system
    return seconds


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


def arrivals(rate: float, seconds: float) -> list[tuple[float, bool]]:
    """When requests are due, at random, `rate` a second on average, and whether their client leaves early."""
    chance, due, found = random.Random(0), 0.0, []
    while due < seconds:
        found.append((due, chance.random() < LEAVES))
        due += chance.expovariate(rate)
    return found


def soak(url: str, due: list[tuple[float, bool]]) -> list[Reply]:
    """Requests that begin when they are due; those whose client left are not in the list."""
    replies: list[Reply] = []
    limits = httpx.Limits(max_connections=200)
    with httpx.Client(base_url=url, timeout=60, limits=limits) as http, ThreadPoolExecutor(64) as pool:
        begun = time.monotonic()
        for number, (at, leaves) in enumerate(due):
            time.sleep(max(0.0, begun + at - time.monotonic()))
            if leaves:
                pool.submit(_leave, http, LOAD.prompt(0, number))
            else:
                pool.submit(lambda n=number: replies.append(ask(http, LOAD.prompt(0, n), LOAD)))
    return replies


def _leave(http: httpx.Client, prompt: str) -> None:
    body = {"prompt": prompt, "stream": True, "ignore_eos": True, **LOAD.fields}
    with http.stream("POST", "/v1/completions", json=body) as response:
        next(response.iter_raw())


def latency(replies: list[Reply]) -> dict[str, float]:
    """Seconds of whole answers."""
    seconds = [reply.total_s for reply in replies]
    return {f"p{share}": round(percentile(seconds, share / 100), 4) for share in (50, 90, 95, 99)}


@dataclass(frozen=True, slots=True)
class Third:
    """A third of the time: its replies, their latency, how fast the machine was, and what was held at its end."""

    replies: list[Reply]
    latency: dict[str, float]
    machine: dict[str, float]
    after: Census
    calm: list[Reply]
    """Replies that no other guest of the machine disturbed."""


def processor_ms(third: Third) -> float:
    """Of a core for an answer: what a service that ages would need more of, however fast the machine is."""
    return 1000 * third.machine["served_s"] / len(third.replies)


def findings(stage: Stage, before: Census, thirds: list[Third]) -> list[Finding]:
    """What drifted and what is left."""
    first, last = thirds[0], thirds[-1]
    after = last.after
    drift = 100 * (last.latency["p99"] / first.latency["p99"] - 1)
    memory = 100 * (after.resident_mb / before.resident_mb - 1)
    failed = sum(reply.failed for third in thirds for reply in third.replies)
    reason = "First and last third: " + " and ".join(
        f"{third.machine['work_ms_p50']} ms for a fixed piece of work (p90 {third.machine['work_ms_p90']}), "
        f"{100 * third.machine['stolen']:.1f} % of all cores stolen, {processor_ms(third):.0f} ms of one for an answer"
        for third in (first, last)
    )
    return [
        equal("requests that failed", failed, 0),
        equal("requests left running", stage.metric("unmask_requests_running"), 0.0),
        equal("requests left in the engine", stage.metric("vllm:num_requests_running"), 0.0),
        at_most("p99 of the last third over the first, drift", drift, 10, "%", reason=f"{reason}."),
        *_calm_drift(first, last),
        at_most("time of a core for an answer, drift", 100 * (processor_ms(last) / processor_ms(first) - 1), 10, "%"),
        at_most("memory drift", memory, 2, "%"),
        _threads("threads gained, gRPC's pools aside", before, after, of_pool=False),
        _threads("threads of gRPC's pools gained after the first third", first.after, last.after, of_pool=True),
        at_most("sockets gained", after.sockets - before.sockets, 0, "sockets"),
        at_most("open files gained", after.files - before.files, 0, "files"),
        at_most("shared memory segments gained", after.segments - before.segments, 0, "segments"),
    ]


def _calm_drift(first: Third, last: Third) -> list[Finding]:
    """The same of the answers that nobody disturbed, where there are enough."""
    counts = [len(third.calm) for third in (first, last)]
    if min(counts) < ENOUGH:
        return []
    p99 = [latency(third.calm)["p99"] for third in (first, last)]
    reason = f"{p99[0]} s of {counts[0]} answers, then {p99[1]} s of {counts[1]}."
    what = "the same of answers while nobody else had the cores"
    return [at_most(what, 100 * (p99[1] / p99[0] - 1), 10, "%", reason=reason)]


def _threads(what: str, before: Census, after: Census, *, of_pool: bool) -> Finding:
    """How many threads were gained, and whose they are."""
    gained = Counter(after.named)
    gained.subtract(before.named)
    counts = {name: n for name, n in gained.items() if n and name.endswith(GRPC_POOL) == of_pool}
    reason = ", ".join(f"{n:+d} {name}" for name, n in counts.items())
    return at_most(what, sum(counts.values()), 0, "threads", reason=f"{reason}.")


def measure_third(stage: Stage, due: list[tuple[float, bool]]) -> Third:
    """Run the arrivals beside the probe, and let the service come to rest."""
    probe = Probe(served_s)
    try:
        replies = soak(stage.service.url, due)
    finally:
        machine = probe.end()
    wait_until(lambda: stage.metric("unmask_requests_running") == 0, 30)
    time.sleep(REST_S)
    return Third(replies, latency(replies), machine, census(), undisturbed(replies, probe.disturbances))


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
        rate, seconds = arguments.share * most, 60 * arguments.minutes
        soak(url, arrivals(rate, WARM_UP_S))  # thread pools grow to what this rate needs
        time.sleep(REST_S)
        before = census()
        thirds = [measure_third(stage, arrivals(rate, seconds / 3)) for _ in range(3)]
        found = findings(stage, before, thirds)
        stage.service.shutdown()
    answers = sum(len(third.replies) for third in thirds)
    share = f"{100 * arguments.share:.0f} % of {most:.1f} requests/s"
    scale = f"{arguments.minutes:g} minutes at {share}, {answers} answers"
    figures = {
        "scale": scale,
        "held": [asdict(before), *(asdict(third.after) for third in thirds)],
        "latency": [third.latency for third in thirds],
        "machine": [third.machine for third in thirds],
        "calm": [{"answers": len(third.calm)} | (latency(third.calm) if third.calm else {}) for third in thirds],
        "findings": [asdict(f) for f in found],
    }
    print(json.dumps(figures, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=2) + "\n")
    conclude("O8", "steady load", scale, found)


if __name__ == "__main__":
    main()
