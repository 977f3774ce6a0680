"""What `benchmarks.pairing` measures, and how one of its rows comes about.

A load is either *one batch*, whose requests begin together, so that its tokens a second contain the prompts and the
end, when the slowest few run alone; or *sustained*, where a request that ends is followed by the next one, as a service
has it, and what counts is the time in which all places are taken.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from benchmarks.demo import machine
from benchmarks.pairing_draft import STATS
from benchmarks.pairing_engines import k_by_batch_size
from benchmarks.pairing_load import delta_params
from benchmarks.pairing_shapes import SHAPES, K
from unmask.pairing.status import read_status

PROMPT_TOKENS = 128
LEAST_IN_TURNS = 64
"""Concurrency from which requests that take turns in two halves are measured too."""
LEARNING = 6
"""Batches before one is measured whose K the engine chooses by itself: it does so every 128 steps."""
LEAST_ROUNDS = 4
"""Batches of a row: acceptance is drawn, and the slowest request decides when a batch ends."""
STARTS = 5
"""How often the start of a batch is measured."""
ROUNDS = 3
"""Whole requests for each place of a sustained load; those before them are of various lengths."""
REMOTE = {"remote": "shared memory", "tcp": "sidecar over TCP", "production": "shared memory"}
"""Modes whose draft is in another process, and how it is reached."""


class Case(NamedTuple):
    """What one row is of; `k` None is left to the engine, `halves` 2 is requests that take turns."""

    mode: str
    concurrency: int
    policy: str
    k: int | None
    halves: int = 1
    load: str = "one batch"


def cases(mode: str, concurrencies: Sequence[int], has_table: bool) -> Iterator[Case]:
    """What is measured in one mode. `has_table`: the engine knows a K by batch size."""
    if mode == "production" and has_table:
        for concurrency in concurrencies:
            yield from _both_loads(Case(mode, concurrency, "by load", None))
        return
    # Native and remote in one engine are for the periods of their steps, which a sustained load leaves as they are.
    loads = _both_loads if mode in ("target", "native") or not has_table else _one_batch
    # Over TCP the same is asked; what the wire adds shows where most is sent.
    has_variants = has_table and mode != "tcp"
    for concurrency in concurrencies:
        can_take_turns = has_variants and mode in REMOTE and concurrency >= LEAST_IN_TURNS
        for halves in (1, 2) if can_take_turns else (1,):
            yield from loads(Case(mode, concurrency, "static", 0 if mode == "target" else K, halves))
            k = k_by_batch_size(concurrency // halves)
            if has_variants and k != K:
                yield from loads(Case(mode, concurrency, "by batch size", k, halves))


def _one_batch(case: Case) -> Iterator[Case]:
    yield case


def _both_loads(case: Case) -> Iterator[Case]:
    """One request at a time is a sustained load already."""
    yield case
    if case.concurrency > 1:
        yield case._replace(load="sustained")


def measure(llm: Any, arguments: argparse.Namespace, case: Case) -> dict[str, Any]:
    """One row; where requests take turns, the parts are those of one half's step."""
    mode, concurrency, policy, k, halves, load = case
    timed = not arguments.tiny and mode != "target"
    length = arguments.tokens * (1 if concurrency > 1 else 2)
    for warm_up in [max(length // 8, K)] if k is not None else [length] * LEARNING:
        _generate(llm, arguments, concurrency, warm_up)
    before, counted = counters_of(llm), _asked(llm, arguments, mode)
    if timed:
        llm.collective_rpc("measure_steps", args=(concurrency // halves,))
    rate = (_sustained_rate if load == "sustained" else _batch_rate)(llm, arguments, mode, concurrency, length)
    times = llm.collective_rpc("step_times")[0] if timed else {}
    after, asked = counters_of(llm), _asked(llm, arguments, mode)
    start_ms = _start_ms(llm, arguments, concurrency) if load == "one batch" else None
    found = {name: after[name] - before.get(name, 0) for name in after}
    drafts = found.get("drafts", 0)
    tau = 1 + found["accepted"] / drafts if drafts else 1.0
    if "period" in times:
        period = halves * times["period"]
    elif mode == "target" and start_ms is not None:
        # Steps of a batch, all alike, without its prompts.
        period = (1000 * concurrency * length / rate - start_ms) / (length - 2)
    else:
        period = 1000 * concurrency * tau / rate
    return {
        "mode": "remote" if mode in REMOTE else mode,
        "shape": arguments.shape,
        "concurrency": concurrency,
        "acceptance_length": round(tau, 3),
        "k": round(found["drafted"] / drafts, 2) if k is None else k,
        "output_tokens_per_second": round(rate, 1),
        "step_ms": _parts(mode, period, times, counted, asked),
        "gpus": 0 if arguments.tiny else (1 if mode in ("target", "native") else arguments.gpus),
        "machine": machine_of(arguments),
        "load": load,
        "period_ms": round(period, 3),
        "late_wait_ms": round(times["late_wait"], 3) if "late_wait" in times else None,
        "start_ms": round(start_ms, 3) if start_ms is not None else None,
        "policy": policy + (", in turns" if halves == 2 else ""),
        "transport": ("socket" if arguments.tiny else REMOTE[mode]) if mode in REMOTE else None,
        "engine": "of its own" if arguments.tiny or mode in ("target", "production") else "shared by native and remote",
        "kv_cache_tokens": _kv_cache_tokens(llm),
        "without_proposals": (asked["passed"] + asked["released"] - counted["passed"] - counted["released"])
        if asked
        else None,
    }


def _parts(
    mode: str, period: float, times: dict[str, float], counted: dict[str, float], asked: dict[str, float]
) -> dict[str, float | None]:
    """Milliseconds of a step's parts, from its times and what the draft had been asked before and after."""
    draft_ms, wait = times.get("draft"), times.get("wait")
    if asked:
        steps = asked["answered"] - counted["answered"]
        draft_ms = (asked["draft_us"] - counted["draft_us"]) / max(steps, 1) / 1000
    parts = {
        "verify": times.get("verify", period if mode == "target" else None),
        "features": times.get("features"),
        # The draft's time is a mean over all steps, the others are medians of full ones: they need not add up.
        "transport": wait - draft_ms if wait is not None and draft_ms is not None else None,
        "draft": draft_ms,
        "reply": times.get("reply"),
    }
    return {name: round(value, 3) if value is not None else None for name, value in parts.items()}


def _batch_rate(llm: Any, arguments: argparse.Namespace, mode: str, concurrency: int, length: int) -> float:
    """Tokens a second of batches, one after another, from their prompts to the end of their last requests."""
    rounds = 1 if arguments.tiny or mode == "target" else max(LEAST_ROUNDS, min(8, 64 // concurrency))
    seconds = sum(_generate(llm, arguments, concurrency, length) for _ in range(rounds))
    return concurrency * length * rounds / seconds


def _sustained_rate(llm: Any, arguments: argparse.Namespace, mode: str, concurrency: int, length: int) -> float:
    """Tokens a second while `concurrency` requests run at any time.

    The first ones are of evenly spread lengths, so that the later ones do not all begin and end together. The time runs
    from the end of the last of these to the beginning of the last whole one.
    """
    engine, prompts = llm.llm_engine, itertools.cycle(_prompts(arguments, concurrency))
    lengths = itertools.chain(
        (max(1, length * place // concurrency) for place in range(1, concurrency + 1)), itertools.repeat(length)
    )
    begun = ended = tokens = counted = 0
    since = until = None
    while until is None or engine.has_unfinished_requests():
        while begun - ended < concurrency and begun < (1 + ROUNDS) * concurrency:
            engine.add_request(f"{mode}-{begun}", next(prompts), delta_params(next(lengths)))
            begun += 1
        now = time.perf_counter()
        if since is None and ended >= concurrency:
            since, tokens = now, 0
        if until is None and begun == (1 + ROUNDS) * concurrency:
            until, counted = now, tokens
        for output in engine.step():
            tokens += len(output.outputs[0].token_ids)
            ended += output.finished
    return counted / (until - since)


def _generate(llm: Any, arguments: argparse.Namespace, concurrency: int, length: int) -> float:
    """Seconds for a batch of random prompts."""
    prompts = _prompts(arguments, concurrency)
    began = time.perf_counter()
    outputs = llm.generate(prompts, _params(length), use_tqdm=False)
    assert all(len(output.outputs[0].token_ids) == length for output in outputs)
    return time.perf_counter() - began


def _prompts(arguments: argparse.Namespace, number: int) -> list[dict[str, list[int]]]:
    """The same random ones whenever as many are wanted."""
    generator, vocab_size = random.Random(number), SHAPES[arguments.shape].vocab_size
    return [
        {"prompt_token_ids": [generator.randrange(1000, vocab_size - 1000) for _ in range(PROMPT_TOKENS)]}
        for _ in range(number)
    ]


def _params(length: int) -> Any:
    """Greedy, of exactly `length` tokens."""
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True, detokenize=False)


def _start_ms(llm: Any, arguments: argparse.Namespace, concurrency: int) -> float:
    """Of a batch until its second tokens: the prompts, their first drafts, and the verification of these."""
    seconds = sorted(_generate(llm, arguments, concurrency, 2) for _ in range(STARTS))
    return 1000 * seconds[STARTS // 2]


def _kv_cache_tokens(llm: Any) -> int:
    """What the target's KV cache holds."""
    cache = llm.llm_engine.vllm_config.cache_config
    return cache.num_gpu_blocks * cache.block_size


def counters_of(llm: Any) -> dict[str, float]:
    """Drafts that were verified so far, their tokens, those of them that were accepted, and prompt tokens that were
    found in the target's cache."""
    names = {
        "vllm:spec_decode_num_drafts": "drafts",
        "vllm:spec_decode_num_draft_tokens": "drafted",
        "vllm:spec_decode_num_accepted_tokens": "accepted",
        "vllm:prefix_cache_hits": "cached_tokens",
    }
    return {names[metric.name]: metric.value for metric in llm.get_metrics() if metric.name in names}


def _asked(llm: Any, arguments: argparse.Namespace, mode: str) -> dict[str, float]:
    """What the remote draft was asked, by its mailbox or, on a CPU, its link."""
    if mode not in REMOTE:
        return {}
    if not arguments.tiny:
        counters = llm.collective_rpc("draft_counters")[0]
        if mode == "tcp":
            # The mailbox knows what the sidecar has waited for; what the draft has worked it says itself.
            own = json.loads((arguments.folder / STATS).read_text())
            counters |= {"answered": own["steps"], "draft_us": own["busy_us"]}
        return counters
    status = read_status(arguments.folder / "status") or {}
    answered = status["round_trip_ms_count"]
    return {"answered": answered, "draft_us": 1000 * status["round_trip_ms_sum"], "passed": 0, "released": 0}


def machine_of(arguments: argparse.Namespace) -> str:
    """What the figures are of."""
    found = machine()
    if arguments.tiny:
        return f"{found['cpu']}, {found['cores']} cores"
    import torch

    return f"{torch.cuda.get_device_name()}, {found['cores']} cores"
