"""A target alone, with vLLM's colocated draft, and with a remote one: speed at equal acceptance, in one run.

    python -m benchmarks.pairing --out benchmarks/results/pairing_speed.json            (two GPUs: target and draft)
    python -m benchmarks.pairing --gpus 1 --shape smollm2-135m --out /tmp/one.json      (one GPU for both)
    python -m benchmarks.pairing --tiny --out /tmp/tiny.json                            (any machine)

Weights are random and acceptance is vLLM's `synthetic` one with r_k = 0.86^k whatever is drafted: only the system
differs. On GPUs native and remote drafting are switched at run time in one engine (`engines.native_switch`), so that
graphs and KV cache are the same; the draft of the remote ones is a process of its own. A last engine is as it is in
production, without vLLM's draft in it: `kv_cache_tokens` says what that frees. `--tiny` uses vLLM's V1 runner on a CPU,
which knows no synthetic acceptance, with an engine for each mode. A row is printed and written as soon as it is
measured.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.demo import machine
from benchmarks.pairing_engines import engine_options, k_by_batch_size
from benchmarks.pairing_shapes import SHAPES, K, shape_folder
from engines.draft_arguments import LINK_FILE_VARIABLE, MAILBOX_FOLDER_VARIABLE, WATCHDOG_VARIABLE
from unmask.pairing.link_file import LinkConfig, read_link_file, write_link_file
from unmask.pairing.status import read_status

SECRET = b"a benchmark of one machine, 0123"
PROMPT_TOKENS = 128
LEAST_IN_TURNS = 64
"""Concurrency from which requests that take turns in two halves are measured too."""
LEARNING = 4
"""Batches before one is measured whose K the engine chooses by itself: it does so every 128 steps."""
STARTS = 5
"""How often the start of a batch is measured."""
REMOTE = {"remote": "shared memory", "tcp": "sidecar over TCP", "production": "shared memory"}
"""Modes whose draft is in another process, and how it is reached."""
MODES = ("target", "native", *REMOTE)


def main() -> None:
    """Measure every mode, and write the rows."""
    arguments = _parse()
    if arguments.role == "engine":
        run_engine(arguments)
        return
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    with shape_folder(arguments.shape, arguments.tiny) as arguments.folder:
        switched = (("native",), ("remote",)) if arguments.tiny else (("native", "remote", "tcp"), ("production",))
        engines = [[mode for mode in modes if mode in arguments.modes] for modes in (("target",), *switched)]
        with draft_process(arguments, "--shape", arguments.shape):
            for modes in filter(None, engines):
                for row in engine_rows(arguments, modes):
                    rows.append(row)
                    print(json.dumps(row), flush=True)
                    arguments.out.write_text(json.dumps(rows, indent=1) + "\n")


@contextmanager
def draft_process(arguments: argparse.Namespace, *draft: str) -> Iterator[subprocess.Popen]:
    """The draft, on the last GPU; it serves mailboxes and its link file.

    Args:
        draft: what `benchmarks.pairing_draft` is to serve.
    """
    folder = arguments.folder
    (folder / "secret").write_bytes(SECRET)
    device = "cpu" if arguments.tiny else "cuda"
    command = [sys.executable, "-m", "benchmarks.pairing_draft", *draft, f"--folder={folder}"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": gpu(arguments.gpus - 1)}
    process = subprocess.Popen([*command, f"--device={device}"], stdin=subprocess.PIPE, env=environment)
    try:
        while not (folder / "address").exists():
            if process.poll() is not None:
                raise RuntimeError("the draft process has died")
            time.sleep(0.1)
        found = read_link_file(folder / "address")
        options = {"timeout_ms": 30_000.0, "status_file": str(folder / "status")}
        write_link_file(folder / "link", LinkConfig(address=found.address, secret_file=found.secret_file, **options))
        yield process
    finally:
        process.stdin.close()
        process.wait(30)


def gpu(index: int) -> str:
    """A GPU of those that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[index] if visible else str(index)


def engine_rows(arguments: argparse.Namespace, modes: list[str]) -> Iterator[dict[str, Any]]:
    """Rows of one engine, a process of its own on the first GPU."""
    command = [sys.executable, "-m", "benchmarks.pairing", "--role=engine", *sys.argv[1:]]
    command += [f"--folder={arguments.folder}", "--modes", *modes]
    environment = os.environ | engine_environment(arguments, 0)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        for line in process.stdout:
            if line.startswith("{"):
                yield json.loads(line)
            else:
                print(line, end="", file=sys.stderr)
    if process.returncode:
        raise RuntimeError(f"the engine of {', '.join(modes)} has failed")


def engine_environment(arguments: argparse.Namespace, index: int) -> dict[str, str]:
    """Variables of an engine's process, on a GPU of those that this process may use."""
    common = {
        "CUDA_VISIBLE_DEVICES": gpu(index),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        LINK_FILE_VARIABLE: str(arguments.folder / "link"),
        WATCHDOG_VARIABLE: "3000",
    }
    if arguments.tiny:
        return common | {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    return common | {
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        MAILBOX_FOLDER_VARIABLE: str(arguments.folder / "boxes"),
    }


def run_engine(arguments: argparse.Namespace) -> None:
    """Print the rows of one engine."""
    from vllm import LLM

    modes = tuple(arguments.modes)
    llm = LLM(**engine_options(arguments, modes))
    has_table = not arguments.tiny and modes != ("target",)
    for mode in modes:
        if has_table and mode != "production":
            llm.collective_rpc("choose_draft", args=(mode,))
        if mode in REMOTE:
            await_draft(llm, arguments)
        for case in cases(mode, arguments.concurrency, has_table):
            if has_table:
                least = max(2, 3 * case.concurrency // 4) if case.halves == 2 else None
                llm.collective_rpc("take_turns_from", args=(least,))
            if has_table and case.k is not None:
                llm.collective_rpc("set_speculation", args=([case.k] * (max(arguments.concurrency) + 1),))
            print(json.dumps(measure(llm, arguments, case)), flush=True)


class Case(NamedTuple):
    """What one row is of; `k` None is left to the engine, `halves` 2 is requests that take turns."""

    mode: str
    concurrency: int
    policy: str
    k: int | None
    halves: int = 1


def cases(mode: str, concurrencies: Sequence[int], has_table: bool) -> Iterator[Case]:
    """What is measured in one mode. `has_table`: the engine knows a K by batch size."""
    if mode == "production" and has_table:
        # Before any other: a K that was set stays.
        for concurrency in concurrencies:
            yield Case(mode, concurrency, "by load", None)
    for concurrency in concurrencies:
        can_take_turns = has_table and mode in REMOTE and concurrency >= LEAST_IN_TURNS
        for halves in (1, 2) if can_take_turns else (1,):
            yield Case(mode, concurrency, "static", 0 if mode == "target" else K, halves)
            k = k_by_batch_size(concurrency // halves)
            if has_table and k != K:
                yield Case(mode, concurrency, "by batch size", k, halves)


def measure(llm: Any, arguments: argparse.Namespace, case: Case) -> dict[str, Any]:
    """One row; where requests take turns, the parts are those of one half's step."""
    mode, concurrency, policy, k, halves = case
    timed = not arguments.tiny and mode != "target"
    length = arguments.tokens * (1 if concurrency > 1 else 2)
    # Acceptance is drawn, and a start may be held up: some hundred steps of few requests would leave it to chance.
    rounds = 1 if arguments.tiny or mode == "target" else max(1, min(8, 32 // concurrency))
    for warm_up in [max(length // 8, K)] if k is not None else [length] * LEARNING:
        _generate(llm, arguments, concurrency, warm_up)
    before, counted = counters_of(llm), _asked(llm, arguments, mode)
    if timed:
        llm.collective_rpc("measure_steps", args=(concurrency // halves,))
    seconds = sum(_generate(llm, arguments, concurrency, length) for _ in range(rounds))
    times = llm.collective_rpc("step_times")[0] if timed else {}
    after, asked = counters_of(llm), _asked(llm, arguments, mode)
    found = {name: after[name] - before.get(name, 0) for name in after}
    drafts = found.get("drafts", 0)
    tau = 1 + found["accepted"] / drafts if drafts else 1.0
    period = halves * times.get("period", 1000 * seconds * tau / length / rounds / halves)
    return {
        "mode": "remote" if mode in REMOTE else mode,
        "shape": arguments.shape,
        "concurrency": concurrency,
        "acceptance_length": round(tau, 3),
        "k": round(found["drafted"] / drafts, 2) if k is None else k,
        "output_tokens_per_second": round(concurrency * length * rounds / seconds, 1),
        "step_ms": _parts(mode, period, times, counted, asked),
        "gpus": 0 if arguments.tiny else (1 if mode in ("target", "native") else arguments.gpus),
        "machine": machine_of(arguments),
        "period_ms": round(period, 3),
        "late_wait_ms": round(times["late_wait"], 3) if "late_wait" in times else None,
        "start_ms": round(_start_ms(llm, arguments, concurrency), 3),
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


def _generate(llm: Any, arguments: argparse.Namespace, concurrency: int, length: int) -> float:
    """Seconds for a batch of random prompts."""
    from vllm import SamplingParams

    generator, vocab_size = random.Random(concurrency), SHAPES[arguments.shape].vocab_size
    prompts = [
        {"prompt_token_ids": [generator.randrange(1000, vocab_size - 1000) for _ in range(PROMPT_TOKENS)]}
        for _ in range(concurrency)
    ]
    params = SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True, detokenize=False)
    began = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert all(len(output.outputs[0].token_ids) == length for output in outputs)
    return time.perf_counter() - began


def _start_ms(llm: Any, arguments: argparse.Namespace, concurrency: int) -> float:
    """Of a batch until its second tokens: the prompts, their first drafts, and the verification of these."""
    seconds = sorted(_generate(llm, arguments, concurrency, 2) for _ in range(STARTS))
    return 1000 * seconds[STARTS // 2]


def _kv_cache_tokens(llm: Any) -> int:
    """What the target's KV cache holds."""
    cache = llm.llm_engine.vllm_config.cache_config
    return cache.num_gpu_blocks * cache.block_size


def counters_of(llm: Any) -> dict[str, float]:
    """Drafts that were verified so far, their tokens, and those of them that were accepted."""
    names = {
        "vllm:spec_decode_num_drafts": "drafts",
        "vllm:spec_decode_num_draft_tokens": "drafted",
        "vllm:spec_decode_num_accepted_tokens": "accepted",
    }
    return {names[metric.name]: metric.value for metric in llm.get_metrics() if metric.name in names}


def _asked(llm: Any, arguments: argparse.Namespace, mode: str) -> dict[str, float]:
    """What the remote draft was asked, by its mailbox or, on a CPU, its link."""
    if mode not in REMOTE:
        return {}
    if not arguments.tiny:
        return llm.collective_rpc("draft_counters")[0]
    status = read_status(arguments.folder / "status") or {}
    answered = status["round_trip_ms_count"]
    return {"answered": answered, "draft_us": 1000 * status["round_trip_ms_sum"], "passed": 0, "released": 0}


def await_draft(llm: Any, arguments: argparse.Namespace) -> None:
    """Wait until the engine's draft can be asked."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if arguments.tiny:
            ready = (read_status(arguments.folder / "status") or {}).get("speculation_enabled")
        else:
            ready = llm.collective_rpc("draft_counters")[0]["is_ready"]
        if ready:
            return
        time.sleep(0.2)
    raise queue.Empty("no draft within two minutes")


def machine_of(arguments: argparse.Namespace) -> str:
    """What the figures are of."""
    found = machine()
    if arguments.tiny:
        return f"{found['cpu']}, {found['cores']} cores"
    import torch

    return f"{torch.cuda.get_device_name()}, {found['cores']} cores"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-8b")
    parser.add_argument("--gpus", type=int, choices=(1, 2), default=2, help="1 puts target and draft on one")
    parser.add_argument("--tiny", action="store_true", help="a small target and draft on the CPU: shows that it runs")
    parser.add_argument("--concurrency", type=int, nargs="+", default=None)
    parser.add_argument("--tokens", type=int, default=None, help="of each response")
    parser.add_argument("--max-model-len", type=int, default=None)
    parser.add_argument("--role", choices=("run", "engine"), default="run", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="default: all")
    arguments = parser.parse_args()
    if arguments.tiny and not {"target", "native", "remote"} & set(arguments.modes):
        parser.error("--tiny runs the modes target, native and remote; name one of them in --modes")
    arguments.shape = "tiny" if arguments.tiny else arguments.shape
    arguments.concurrency = arguments.concurrency or ([1, 2] if arguments.tiny else [1, 8, 32, 64, 128])
    arguments.tokens = arguments.tokens or (32 if arguments.tiny else 512)
    return arguments


if __name__ == "__main__":
    main()
