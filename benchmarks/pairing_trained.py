"""A target alone, with vLLM's colocated draft, and with a remote one: a trained pair on GSM8K's test questions.

    python -m benchmarks.pairing_trained --draft DRAFT --data DATA --out benchmarks/results/pairing_trained.json
    python -m benchmarks.pairing_trained --tiny --draft DRAFT --data DATA --out /tmp/trained.json    (any machine)

The target is SmolLM2-135M-Instruct, the draft a directory with weights of its own, such as `benchmarks.draft_quality`
keeps in `STATE/drafts/equal`. Acceptance is the draft's own, greedy and up to each answer's end, the same K for both
ways of drafting. With two GPUs the draft has the second. `--tiny`: float32, a few short answers, vLLM's V1 runner.

The last two rows are of 16 questions behind the same 2,000 tokens, with vLLM's prefix caching on: `cached` is whether
they share what it holds, or each has a salt of its own, so that nothing is found.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from transformers import AutoTokenizer

from benchmarks.draft_prompts import Prompts
from benchmarks.pairing import await_draft, await_link, draft_process, engine_environment
from benchmarks.pairing_rows import counters_of, machine_of
from engines.draft_arguments import RemoteDraftOptions, graphs_of, with_remote_draft
from unmask.checkpoints import read_config
from unmask.config import EMBEDDED_TARGET
from unmask.models.dflash import DFlashConfig
from unmask.targets import eos_ids, resolve_target

MODES = ("target", "native", "remote")
ROLES = (*MODES, "prefix")
SHARED_TOKENS = 2000
SHARING = 16
LONGEST = 256
"""Of an answer, in tokens."""
ROUNDS = 3


def main() -> None:
    """An engine after another, each a process of its own beside the same draft."""
    arguments = _parse()
    if arguments.role is not None:
        run_engine(arguments)
        return
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    # Pages of files outside shared memory cannot be pinned everywhere.
    with tempfile.TemporaryDirectory(dir=None if arguments.tiny else "/dev/shm") as folder:  # noqa: S108
        arguments.folder = Path(folder)
        pair = ("--pair", str(resolve_target(EMBEDDED_TARGET)), str(arguments.draft))
        with draft_process(arguments, *pair) as draft:
            await_link(arguments, draft)
            for mode in arguments.modes:
                command = [sys.executable, "-m", "benchmarks.pairing_trained", *sys.argv[1:]]
                command += [f"--folder={folder}", f"--role={mode}"]
                environment = os.environ | engine_environment(arguments, 0)
                ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
                rows += [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
                arguments.out.write_text(json.dumps(rows, indent=1) + "\n")
    for row in rows:
        print(json.dumps(row))


def run_engine(arguments: argparse.Namespace) -> None:
    """Print the rows of one engine."""
    from vllm import LLM

    target, (draft, _) = resolve_target(EMBEDDED_TARGET), read_config(arguments.draft)
    llm = LLM(**engine_options(arguments, target, draft))
    if arguments.role in ("remote", "prefix"):
        await_draft(llm, arguments)
    if arguments.role == "prefix":
        run_prefix(llm, arguments, target, draft)
        return
    prompts = Prompts(arguments.data, AutoTokenizer.from_pretrained(target), 400).gsm8k()
    for concurrency in arguments.concurrency:
        asked = prompts[: max(concurrency, 2 if arguments.tiny else 16)]
        # Batches are recorded and kernels are chosen at the first of a kind.
        answer(llm, arguments, asked, concurrency)
        before = counters_of(llm)
        rates = [answer(llm, arguments, asked, concurrency) for _ in range(ROUNDS)]
        after = counters_of(llm)
        drafts, accepted = (after.get(name, 0) - before.get(name, 0) for name in ("drafts", "accepted"))
        row = {
            "mode": arguments.role,
            "shape": "smollm2-135m",
            "draft": "trained",
            "concurrency": concurrency,
            "prompts": len(asked),
            "k": 0 if arguments.role == "target" else draft.block_size - 1,
            "acceptance_length": round(1 + accepted / drafts, 3) if drafts else 1.0,
            "output_tokens_per_second": round(median(rates), 1),
            "gpus": 0 if arguments.tiny else (arguments.gpus if arguments.role == "remote" else 1),
            "machine": machine_of(arguments),
        }
        print(json.dumps(row), flush=True)


def engine_options(arguments: argparse.Namespace, target: Path, draft: DFlashConfig) -> dict[str, Any]:
    """vLLM's arguments for a mode."""
    most, k, shares = max(arguments.concurrency), draft.block_size - 1, arguments.role == "prefix"
    options: dict[str, Any] = {
        "model": str(target),
        "skip_tokenizer_init": True,
        "dtype": "float32" if arguments.tiny else "bfloat16",
        "max_model_len": 3072 if shares else 1024,
        "max_num_seqs": SHARING if shares else most,
        "enable_prefix_caching": shares,
        "disable_log_stats": False,
    }
    if arguments.tiny:
        options |= {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 28}
    else:
        ks = {0} if arguments.role == "target" else {k}
        options |= {"gpu_memory_utilization": 0.3, "compilation_config": graphs_of(most, ks)}
    if arguments.role == "target":
        return options
    if arguments.role == "native":
        speculation = {"method": "dflash", "model": str(arguments.draft), "num_speculative_tokens": k}
        return options | {"speculative_config": speculation}
    remote = RemoteDraftOptions(
        link_file=arguments.folder / "link", layer_ids=draft.target_layer_ids, num_speculative_tokens=k
    )
    return with_remote_draft(options, remote, "v1" if arguments.tiny else "v2")


def run_prefix(llm: Any, arguments: argparse.Namespace, target: Path, draft: DFlashConfig) -> None:
    """Print what is accepted behind a shared prompt, found in the target's cache or computed anew."""
    source = Prompts(arguments.data, AutoTokenizer.from_pretrained(target), 400)
    shared = source.examples(SHARED_TOKENS)
    asked = [shared + prompt for prompt in source.gsm8k()[: 4 if arguments.tiny else SHARING]]
    # What is shared is there when they come.
    generate(llm, arguments, asked[:1], ["shared"], 1)
    for is_cached in (True, False):
        salts = ["shared" if is_cached else f"own {i}" for i in range(len(asked))]
        before = counters_of(llm)
        generate(llm, arguments, asked, salts)
        after = counters_of(llm)
        drafts, accepted, found = (after[n] - before.get(n, 0) for n in ("drafts", "accepted", "cached_tokens"))
        row = {
            "mode": "remote",
            "shape": "smollm2-135m",
            "draft": "trained",
            "concurrency": len(asked),
            "prompt_tokens": sum(map(len, asked)),
            "cached": is_cached,
            "cached_tokens": found,
            "k": draft.block_size - 1,
            "acceptance_length": round(1 + accepted / drafts, 3),
            "gpus": 0 if arguments.tiny else arguments.gpus,
            "machine": machine_of(arguments),
        }
        print(json.dumps(row), flush=True)


def answer(llm: Any, arguments: argparse.Namespace, asked: list[list[int]], concurrency: int) -> float:
    """Tokens a second of answers to all prompts, so many at a time."""
    tokens, began = 0, time.perf_counter()
    for start in range(0, len(asked), concurrency):
        batch = asked[start : start + concurrency]
        tokens += generate(llm, arguments, batch, [""] * len(batch))
    return tokens / (time.perf_counter() - began)


def generate(
    llm: Any, arguments: argparse.Namespace, asked: list[list[int]], salts: list[str], longest: int = LONGEST
) -> int:
    """Greedy answers up to their ends; the number of their tokens.

    Args:
        salts: requests of one salt share what vLLM caches; of an empty one any do.
    """
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0.0, max_tokens=min(16, longest) if arguments.tiny else longest, detokenize=False,
        stop_token_ids=sorted(eos_ids(resolve_target(EMBEDDED_TARGET))),
    )  # fmt: skip
    batch: list[dict[str, Any]] = [
        {"prompt_token_ids": prompt} | ({"cache_salt": salt} if salt else {})
        for prompt, salt in zip(asked, salts, strict=True)
    ]
    return sum(len(o.outputs[0].token_ids) for o in llm.generate(batch, params, use_tqdm=False))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draft", type=Path, required=True, help="a draft's directory")
    parser.add_argument("--data", type=Path, required=True, help="folder that holds gsm8k/")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gpus", type=int, choices=(1, 2), default=2, help="1 puts target and draft on one")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tiny", action="store_true", help="few short answers on the CPU: shows that it runs")
    parser.add_argument("--modes", nargs="+", choices=ROLES, default=ROLES, help="default: all")
    parser.add_argument("--role", choices=ROLES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.concurrency = [1, 2]
    return arguments


if __name__ == "__main__":
    main()
