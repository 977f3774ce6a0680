"""`python -m benchmarks.service_overhead [--requests 200] [--out FILE]`: what the service adds to the engine's time.

The same tiny target runs twice: behind the service and as a bare engine in this process. Each prompt is asked of both
in turn, so that whatever else the machine does falls on both alike: of the ingress replica's own port (direct ingress),
whole and streamed, and whole through Serve's proxy as well.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx

from engines.target_engine import TargetEngine
from tests.fault.load import percentile
from tests.fault.record import Finding, at_most, conclude
from tests.fault.tiny import VOCAB, save_tiny_target, tiny_recipe
from tests.private_ray import start_private_ray, use_direct_ingress
from unmask.config import Recipe
from unmask.types import SamplingOptions

MAX_TOKENS = 32
PROMPT_LEN = 16
WARM_UP = 20
PROXY_REASON = (
    "Serve's proxy takes some 20 ms of a request (both ways, and a call back for its body); direct ingress leaves it "
    "out."
)
WHOLE_REASON = "Presumed, not measured apart: the engine shares two cores with what answers."
STREAM_REASON = "All that a token passes on its way shares these cores with the engine, and slows the next one."
RESULTS = Path(__file__).parent / "results" / "service_overhead.json"


@dataclass(slots=True)
class Timing:
    """One request: when its parts came, in seconds from its start."""

    times: list[float] = field(default_factory=list)
    total_s: float = 0.0

    @property
    def gaps(self) -> list[float]:
        """Between one part and the next."""
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


async def ask_engine(engine: TargetEngine, prompt_ids: list[int], request_id: str) -> Timing:
    """One request to the bare engine."""
    timing, begun = Timing(), time.perf_counter()
    options = SamplingOptions(max_tokens=MAX_TOKENS, ignore_eos=True)
    async for _ in engine.generate(request_id, prompt_ids, options):
        timing.times.append(time.perf_counter() - begun)
    timing.total_s = time.perf_counter() - begun
    return timing


async def ask_service(http: httpx.AsyncClient, prompt_ids: list[int], *, stream: bool) -> Timing:
    """The same request to the service."""
    timing, begun = Timing(), time.perf_counter()
    body = {"prompt": prompt_ids, "max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True, "stream": stream}
    async with http.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for part in response.aiter_raw():
            timing.times += [time.perf_counter() - begun] * part.count(b'"text"')
    timing.total_s = time.perf_counter() - begun
    return timing


async def compare(engine: TargetEngine, url: str, proxy_url: str, requests: int) -> dict[str, list[Timing]]:
    """Timings of `requests` prompts, each asked in every way, in an order that changes."""
    order, found = random.Random(0), {"engine": [], "streamed": [], "whole": [], "proxied": []}
    async with (
        httpx.AsyncClient(base_url=url, timeout=60) as http,
        httpx.AsyncClient(base_url=proxy_url, timeout=60) as proxy,
    ):
        for number in range(WARM_UP + requests):
            prompt_ids = [order.randrange(100, VOCAB) for _ in range(PROMPT_LEN)]
            ways = list(found)
            order.shuffle(ways)
            for way in ways:
                if way == "engine":
                    timing = await ask_engine(engine, prompt_ids, f"bare-{number}")
                else:
                    client = proxy if way == "proxied" else http
                    timing = await ask_service(client, prompt_ids, stream=way == "streamed")
                if number >= WARM_UP:
                    found[way].append(timing)
    return found


def findings(found: dict[str, list[Timing]]) -> list[Finding]:
    """Row O9: the service's time minus the engine's, of each pair; and how much longer a reader waits for a token.

    The engine's own time varies by more than the service adds, so that the differences of pairs say little of slow
    requests: there it is the percentiles that are compared.
    """
    reasons = {"whole": WHOLE_REASON, "streamed": STREAM_REASON, "proxied": PROXY_REASON}
    names = {"whole": "whole answer", "streamed": "streamed answer", "proxied": "whole answer through Serve's proxy"}
    checks = []
    for way, reason in reasons.items():
        added = percentile(_added_ms(found[way], found["engine"]), 0.5)
        checks.append(at_most(f"added to a {names[way]}, p50", added, 15, "ms", reason=reason))
        slow = 1e3 * (_p95_s(found[way]) - _p95_s(found["engine"]))
        checks.append(at_most(f"a {names[way]}'s p95 over the engine's", slow, 25, "ms", reason=reason))
    waits = zip(found["streamed"], found["engine"], strict=True)
    first = percentile([1e3 * (one.times[0] - bare.times[0]) for one, bare in waits], 0.5)
    checks.append(at_most("added to the first token of a stream, p50", first, 15, "ms", reason=STREAM_REASON))
    stall = _p95_gap_ms(found["streamed"]) - _p95_gap_ms(found["engine"])
    return [*checks, at_most("added between tokens, p95", stall, 5, "ms", reason=STREAM_REASON)]


def summary(found: dict[str, list[Timing]]) -> dict[str, dict[str, float]]:
    """Percentiles in milliseconds, by the way of asking."""
    return {
        way: {
            "total_p50_ms": 1e3 * percentile([t.total_s for t in timings], 0.5),
            "total_p95_ms": 1e3 * percentile([t.total_s for t in timings], 0.95),
            "first_p50_ms": 1e3 * percentile([t.times[0] for t in timings], 0.5),
            "gap_p50_ms": 1e3 * percentile([gap for t in timings for gap in t.gaps] or [0.0], 0.5),
            "gap_p95_ms": _p95_gap_ms(timings),
        }
        for way, timings in found.items()
    }


def _added_ms(service: Sequence[Timing], engine: Sequence[Timing]) -> list[float]:
    return [1e3 * (one.total_s - bare.total_s) for one, bare in zip(service, engine, strict=True)]


def _p95_s(timings: Sequence[Timing]) -> float:
    return percentile([timing.total_s for timing in timings], 0.95)


def _p95_gap_ms(timings: Sequence[Timing]) -> float:
    return 1e3 * percentile([gap for timing in timings for gap in timing.gaps] or [0.0], 0.95)


def served_recipe(folder: Path) -> Recipe:
    """A tiny target alone: a draft would make the engine's own time vary."""
    target = save_tiny_target(folder / "target")
    recipe = tiny_recipe(target, target, target_replicas=1)
    return replace(recipe, serve=replace(recipe.serve, draft=None))


async def measure(recipe: Recipe, url: str, proxy_url: str, requests: int) -> dict[str, list[Timing]]:
    """Start the bare engine and compare."""
    engine = TargetEngine(recipe.target, dtype=recipe.serve.dtype, max_num_seqs=recipe.serve.max_num_seqs)
    await engine.start()
    try:
        return await compare(engine, url, proxy_url, requests)
    finally:
        await engine.stop()


def main() -> None:
    """Measure and record row O9."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.service_overhead", description=__doc__)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the bare engine too
    from serve_app.handle import serve_pairing

    direct_url = use_direct_ingress()
    start_private_ray()
    with tempfile.TemporaryDirectory(prefix="u") as folder:
        recipe = served_recipe(Path(folder))
        handle = serve_pairing(recipe)
        found = asyncio.run(measure(recipe, direct_url, handle.url, arguments.requests))
        handle.shutdown()
    checks = findings(found)
    figures = {
        "scale": f"{arguments.requests} requests of {MAX_TOKENS} tokens, one at a time, on {os.cpu_count()} cores",
        "load": round(os.getloadavg()[0], 1),
        "ways": summary(found),
        "findings": [{"what": c.what, "required": c.required, "measured": c.measured, "met": c.met} for c in checks],
    }
    print(json.dumps(figures, indent=2))
    arguments.out.write_text(json.dumps(figures, indent=2) + "\n")
    conclude("O9", "the service's own time, direct ingress", figures["scale"], checks)


if __name__ == "__main__":
    main()
