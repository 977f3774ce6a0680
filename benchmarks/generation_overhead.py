"""What the line costs: tokens per second of generation through Ray Data, and of the same vLLM engine in one plain loop.

    python -m benchmarks.generation_overhead --model DIR --pairs 3 --out benchmarks/results/generation_overhead.json

Both get the same prompts, tokenise them and draw greedily; both are timed from their first request to their last
token: loading and warm-up are left out, all else (tokenising, scheduling, files, the drain at the end) is not.
Runs alternate, each in a process of its own. `--gpus 2` runs the line alone. `--dummy qwen3-8b` makes a network of that
shape with random weights, in `--work`. `--tiny` proves the script on a CPU: its figures mean little.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.demo import machine
from benchmarks.dummy_target import make_dummy
from engines.engine_options import engine_arguments
from engines.offline_engine import Completion, OfflineEngine
from unmask.config import GenerateConfig, PromptsConfig, Recipe, TargetConfig
from unmask.prompt_rows import prompt_rows
from unmask.prompts import PromptBuilder
from unmask.targets import resolve_target, unused_special_token
from unmask.types import SamplingOptions

ENGINES = ("bare", "line")

Timed = tuple[int, float]
"""Tokens and seconds."""

WARM_UP = [list(range(100, 140 + n)) for n in range(8)]
"""Prompts drawn before the clock starts: kernels are compiled at their first use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What both engines are given. `gpus` 0 is the CPU."""

    model: str
    gpus: int
    rows: int
    max_new_tokens: int
    max_num_seqs: int
    rows_per_shard: int

    def recipe(self, source: Path) -> Recipe:
        """The recipe of the line; the loop takes its prompts and engine options from it, too."""
        return Recipe(
            target=TargetConfig(
                model=self.model,
                max_model_len=self.max_new_tokens + 128,
                engine={"max_num_seqs": self.max_num_seqs},
            ),
            prompts=PromptsConfig(source=str(source)),
            generate=GenerateConfig(
                max_new_tokens=self.max_new_tokens,
                rows_per_shard=self.rows_per_shard,
                min_actors=max(1, self.gpus),
                max_actors=max(1, self.gpus),
                gpus_per_actor=1 if self.gpus else 0,
                dtype="bfloat16",
            ),
        )


class TimedEngine(OfflineEngine):
    """Notes in a file when its first request came and its last one ended, and the tokens between.

    It is ready when all `engines` are: the first would run alone while the others load.
    """

    def __init__(self, arguments: dict[str, Any], *, on_gpu: bool = False, notes: str, engines: int) -> None:
        super().__init__(arguments, on_gpu=on_gpu)
        for future in [OfflineEngine.submit(self, ids, SamplingOptions(max_tokens=4)) for ids in WARM_UP]:
            future.result()
        descriptor, self._notes = tempfile.mkstemp(dir=notes)
        open(descriptor).close()  # noqa: PTH123 - a descriptor, not a path
        while len(list(Path(notes).iterdir())) < engines:
            time.sleep(0.05)
        self._lock = threading.Lock()
        self._first: float | None = None
        self._tokens = self._pending = 0

    def submit(self, prompt_ids: Any, options: SamplingOptions) -> Future[Completion]:
        """See `OfflineEngine.submit`."""
        with self._lock:
            self._first = self._first or time.time()
            self._pending += 1
        future = super().submit(prompt_ids, options)
        future.add_done_callback(self._note)
        return future

    def _note(self, future: Future[Completion]) -> None:
        with self._lock:
            self._tokens += len(future.result().token_ids)
            self._pending -= 1
            is_idle = not self._pending
        if is_idle:
            # The file is small, and a batch seldom runs empty.
            Path(self._notes).write_text(json.dumps([self._first, time.time(), self._tokens]))


def run_line(workload: Workload, folder: Path) -> Timed:
    """Through `pipelines.generate`."""
    from functools import partial

    from pipelines.generate import generate

    notes = folder / "notes"
    notes.mkdir()
    recipe = workload.recipe(folder / "prompts.jsonl")
    factory = partial(TimedEngine, notes=str(notes), engines=max(1, workload.gpus))
    report = generate(recipe, folder / "run", engine_factory=factory)
    assert report.rows == workload.rows
    seen = [json.loads(path.read_text()) for path in notes.iterdir()]
    first, last = min(note[0] for note in seen), max(note[1] for note in seen)
    tokens = sum(note[2] for note in seen)
    assert tokens == report.tokens
    return tokens, last - first


def run_bare(workload: Workload, folder: Path) -> Timed:
    """Of vLLM's engine, fed and stepped by one loop."""
    from transformers import AutoTokenizer

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1" if workload.gpus else "0"
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    from vllm import EngineArgs, SamplingParams
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.llm_engine import LLMEngine

    from engines.core_process import tie_engine_cores

    tie_engine_cores()
    recipe = workload.recipe(folder / "prompts.jsonl")
    path = resolve_target(recipe.target.model)
    tokenizer = AutoTokenizer.from_pretrained(path)
    builder = PromptBuilder(
        tokenizer, recipe.prompts, max_prompt_len=128, mask_token_id=unused_special_token(tokenizer)
    )
    arguments = engine_arguments(recipe.target, path, dtype=recipe.generate.dtype, on_gpu=workload.gpus > 0)
    engine = LLMEngine.from_engine_args(EngineArgs(**arguments))
    params = SamplingParams(
        temperature=0, max_tokens=workload.max_new_tokens, output_kind=RequestOutputKind.FINAL_ONLY, detokenize=False
    )
    for number, ids in enumerate(WARM_UP):
        prompt = {"type": "token", "prompt_token_ids": ids}
        engine.add_request(f"warm-up-{number}", prompt, SamplingParams(max_tokens=4, temperature=0, detokenize=False))
    while engine.has_unfinished_requests():
        engine.step()
    start, tokens, running = time.time(), 0, 0
    rows = prompt_rows(recipe.prompts)
    while True:
        # Twice what runs: tokenising then never keeps the engine waiting.
        for row in itertools.islice(rows, 2 * workload.max_num_seqs - running):
            prompt = {"type": "token", "prompt_token_ids": list(builder.build(row).ids)}
            engine.add_request(str(row.index), prompt, params.clone())
            running += 1
        if not running:
            seconds = time.time() - start
            engine.engine_core.shutdown()
            return tokens, seconds
        ended = [output.outputs[0] for output in engine.step() if output.finished]
        running -= len(ended)
        tokens += sum(len(output.token_ids) for output in ended)


def write_prompts(path: Path, rows: int) -> None:
    """Different prompts of about 40 tokens."""
    with path.open("w") as file:
        for n in range(rows):
            text = (
                f"A shop has {n + 100} pens, sells {n % 97} of them and buys {n % 31} more. Tell the story of the day."
            )
            file.write(json.dumps({"prompt": text}) + "\n")


def measure(engine: str, workload: Workload) -> dict[str, Any]:
    """One run in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.generation_overhead", "--run", engine, json.dumps(asdict(workload))]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    *log, timed = ended.stdout.splitlines()
    print(*log, sep="\n", file=sys.stderr)
    tokens, seconds = json.loads(timed)
    figures = {
        "engine": engine, "model": Path(workload.model).name, "gpus": workload.gpus,
        "tokens_per_second": round(tokens / seconds, 1), "tokens": tokens, "seconds": round(seconds, 2),
    }  # fmt: skip
    print(json.dumps(figures), flush=True)
    return figures


def run_one(engine: str, workload: Workload) -> None:
    """The body of such a process: prints tokens and seconds on its last line."""
    with tempfile.TemporaryDirectory(prefix="overhead-") as folder:
        write_prompts(Path(folder) / "prompts.jsonl", workload.rows)
        timed = {"bare": run_bare, "line": run_line}[engine](workload, Path(folder))
    print(json.dumps(timed), flush=True)


def record(path: Path, earlier: list[dict[str, Any]], workload: Workload, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Write earlier runs and these ones into the result file; their summary."""
    tree: dict[str, Any] = {
        "runs": earlier + [run | {"workload": asdict(workload) | {"model": run["model"]}} for run in runs]
    }
    tree |= {"machine": machine() | {"gpu": _gpu()}, "summary": _summary(tree["runs"])}
    path.write_text(json.dumps(tree, indent=2) + "\n")
    return tree["summary"]


def earlier_runs(path: Path, workload: Workload, keep_all: bool) -> list[dict[str, Any]]:
    """What the result file holds, without runs of the same model and GPUs unless all are to be kept."""
    runs = json.loads(path.read_text())["runs"] if path.is_file() else []
    key = (Path(workload.model).name, workload.gpus)
    return [run for run in runs if keep_all or (run["model"], run["gpus"]) != key]


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Median rates, the median of the line's shares of the bare loop's in pairs, and what more GPUs bring."""
    rates = {
        key: [run["tokens_per_second"] for run in group]
        for key, group in itertools.groupby(sorted(runs, key=_key), key=_key)
    }
    summary: dict[str, Any] = {}
    for (model, gpus, engine), found in rates.items():
        entry = summary.setdefault(f"{model}, {gpus} GPUs", {})
        entry[engine] = median(found)
        if engine == "line" and (bare := rates.get((model, gpus, "bare"))):
            entry["line_over_bare"] = round(median(a / b for a, b in zip(found, bare, strict=True)), 4)
        if engine == "line" and gpus > 1 and (single := rates.get((model, 1, "line"))):
            entry["over_one_gpu"] = round(median(found) / median(single), 4)
    return summary


def _key(run: dict[str, Any]) -> tuple[str, int, str]:
    return run["model"], run["gpus"], run["engine"]


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def main() -> None:
    """Measure pairs of runs, or (for the processes that this one starts) one run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=TargetConfig().model)
    parser.add_argument("--dummy", choices=["qwen3-8b"])
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--rows-per-shard", type=int, default=128)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--add", action="store_true", help="to runs of the same model and GPUs in the result file")
    parser.add_argument("--run", nargs=2, metavar=("ENGINE", "WORKLOAD"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        engine, workload = arguments.run
        run_one(engine, Workload(**json.loads(workload)))
        return
    workload = Workload(
        model=str(make_dummy(arguments.work)) if arguments.dummy else arguments.model,
        gpus=arguments.gpus,
        rows=arguments.rows,
        max_new_tokens=arguments.max_new_tokens,
        max_num_seqs=arguments.max_num_seqs,
        rows_per_shard=arguments.rows_per_shard,
    )
    if arguments.tiny:
        workload = replace(workload, gpus=0, rows=16, max_new_tokens=8, max_num_seqs=4, rows_per_shard=2)
    # An embedded model is unpacked here: vLLM forks its engine, which would inherit the threads of that.
    resolve_target(workload.model)
    earlier = earlier_runs(arguments.out, workload, arguments.add) if arguments.out else []
    runs: list[dict[str, Any]] = []
    summary: dict[str, Any] = {}
    for number in range(arguments.pairs):
        # The line alone on several GPUs; else both, and which is first changes from pair to pair.
        engines = ["line"] if workload.gpus > 1 else ENGINES[:: -1 if number % 2 else 1]
        runs += [measure(engine, workload) for engine in engines]
        summary = record(arguments.out, earlier, workload, runs) if arguments.out else _summary(runs)
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
