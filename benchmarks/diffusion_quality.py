"""Decoders of diffusion LMs, measured against one another on one GPU: accuracy, forwards, tokens per second.

    python -m benchmarks.diffusion_quality --work /tmp/quality --out benchmarks/results/diffusion_quality.json

From SmolLM2-135M-Instruct it makes the networks of `diffusion_models.py` (word problems of several steps, templates
held out), then decodes 1,024 test problems with every decoder and setting. `--work` keeps networks and `--out` rows, so
an interrupted run goes on. `--parts` and `--checkpoints` cut the work, so that several GPUs can share it, each with an
`--out` of its own; a last call with `--parts` empty and `--add-rows` makes one table. `--tiny` proves the script on
a CPU: its figures mean nothing. The part `autoregressive` (the fine-tuned causal LM in vLLM) wants a process of its
own; `gsm8k` needs `--gsm8k`, the test file.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.diffusion_claims import claims
from benchmarks.diffusion_models import Scale, Task, Workshop, decode, engine_config, requests_of
from benchmarks.diffusion_settings import Setting, settings
from unmask.decoding.engine import DiffusionEngine
from unmask.decoding.registry import build_decoder
from unmask.decoding.request import Completion
from unmask.evaluation.diffusion import accuracy_under_parallelism, commit_order, summarise
from unmask.evaluation.diffusion_plots import plot_commit_order, plot_speed_accuracy
from unmask.models import adapted
from unmask.models.transformer import DiffusionLM
from unmask.targets import resolve_target
from unmask.word_problems import word_problem_rows

TINY = Scale(
    rows=64, trajectories=8, response_length=128, batch=4, device="cpu", keep_wrong=True,
    seconds={"fine_tuned": 1, "teacher": 1, "dparallel": 1, "d2f": 1, "dparallel_d2f": 1},
)  # fmt: skip
TINY_SHAPE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16,
}  # fmt: skip


PARTS = ("train", "accuracy", "speed", "gsm8k", "autoregressive")
NETWORKS = ("fine_tuned", "teacher", "dparallel", "d2f", "dparallel_d2f")


class Table:
    """Rows as they come, written to disk after each; those that are there are not measured again."""

    def __init__(self, out: Path, gpu: str, workshop: Workshop, others: Sequence[Path] = ()) -> None:
        self.out, self.gpu, self.workshop = out, gpu, workshop
        self.rows: list[dict[str, Any]] = []
        self.heats: dict[str, list[list[float]]] = {}
        for path in (out, *others):
            if path.is_file():
                self._take(path)

    def _take(self, path: Path) -> None:
        """Rows of an earlier call, and what it noted. Raises ValueError for a setting that was measured twice."""
        for row in json.loads(path.read_text()):
            setting = Setting(row["checkpoint"], row["decoder"], row["settings"])
            if self.has(setting, row["task"], row["batch"]):
                raise ValueError(f"'{path}' measures {setting} again; leave one of the files out")
            self.rows.append(row)
        notes = path.with_suffix(".run.json")
        if notes.is_file():
            found = json.loads(notes.read_text())
            self.heats |= found["commit_order"]
            self.workshop.log = found["training"] | self.workshop.log

    def has(self, setting: Setting, task: str, batch: int) -> bool:
        """Whether a row is there."""
        wanted = setting.checkpoint, setting.decoder, setting.knobs, task, batch
        names = ("checkpoint", "decoder", "settings", "task", "batch")
        return any(tuple(row[name] for name in names) == wanted for row in self.rows)

    def add(self, setting: Setting, task: str, batch: int, speed: float, figures: dict[str, Any]) -> None:
        """One row of the published file."""
        row = {
            "decoder": setting.decoder, "checkpoint": setting.checkpoint, "settings": setting.knobs, "task": task,
            **figures, "tokens_per_second": speed, "batch": batch, "gpu": self.gpu,
        }  # fmt: skip
        self.rows.append(row)
        short = {k: round(v, 2) if isinstance(v, float) else v for k, v in figures.items() if k != "ci95"}
        name = f"{setting.checkpoint:>14} {setting.decoder:<10} {setting.knobs}"
        print(f"{name} b{batch} {speed:.0f} tok/s {short}", flush=True)
        self.save()

    def save(self) -> None:
        """All rows; beside them what was trained, and the area under accuracy over parallelism of each system."""
        self.out.write_text(json.dumps(self.rows, indent=1) + "\n")
        curves = self.curves()
        best = max((y for points in curves.values() for _, y in points), default=None)
        # All systems begin where the teacher does at one token a forward, so that all are cut at the same accuracy.
        anchor = curves.get("teacher, one_token", [])
        aup = {name: accuracy_under_parallelism([*{*anchor, *points}], best) for name, points in curves.items()}
        notes = {"training": self.workshop.log, "aup": aup, "claims": claims(self.rows), "commit_order": self.heats}
        self.out.with_suffix(".run.json").write_text(json.dumps(notes) + "\n")

    def curves(self) -> dict[str, list[tuple[float, float]]]:
        """(TPF, accuracy) of every setting of a system on the test split; a step of APD costs two forwards, as its
        verifier is as large as its drafter."""
        curves: dict[str, list[tuple[float, float]]] = {}
        for row in self.rows:
            # The causal network is the baseline of the table, not a system of this comparison.
            if row["task"] == "word_problems" and row["decoder"] != "autoregressive":
                cache = row["settings"].get("cache")
                name = f"{row['checkpoint']}, {row['decoder']}{f' {cache} cache' if cache else ''}"
                forwards = 2 if row["decoder"] == "apd" else 1
                curves.setdefault(name, []).append((row["tpf"] / forwards, row["accuracy"]))
        return curves

    def plot(self) -> None:
        """Speed-accuracy curves and commitment orders, beside the rows."""
        plot_speed_accuracy(self.curves(), self.out.with_suffix(".png"))
        if self.heats:
            plot_commit_order(
                {n: np.asarray(heat) for n, heat in self.heats.items()}, self.out.with_suffix(".order.png")
            )


def evaluate(
    table: Table,
    task: Task,
    networks: Callable[[str], DiffusionLM],
    scale: Scale,
    count: int,
    checkpoints: Sequence[str],
) -> None:
    """Accuracy and forwards of every setting on the test split."""
    rows = list(itertools.islice(word_problem_rows("test"), count))
    prompts = task.prompts([row["prompt"] for row in rows])
    for setting in [s for s in settings() if s.checkpoint in checkpoints]:
        if table.has(setting, "word_problems", min(256, count)):
            continue
        network = networks(setting.checkpoint)
        verifier = networks("fine_tuned") if setting.decoder == "apd" else None
        start = time.monotonic()
        done = decode(network, setting.settings, prompts, scale, verifier=verifier)
        speed = rate(done, time.monotonic() - start)
        summary = summarise(done, lambda index, ids: task.is_right(rows[index], ids))
        table.add(setting, "word_problems", min(256, count), speed, asdict(summary))
        if setting.timed and "cache" not in setting.knobs:
            heat = commit_order(done, scale.response_length).round(4).tolist()
            table.heats[f"{setting.checkpoint}, {setting.decoder}"] = heat


def measure_speed(table: Table, task: Task, networks: Callable[[str], DiffusionLM], scale: Scale) -> None:
    """Tokens per second at batch 1 and 32 with CUDA graphs: the median of three passes of an engine that is warm."""
    rows = list(itertools.islice(word_problem_rows("test"), 96 if scale.device == "cuda" else 2))
    prompts = task.prompts([row["prompt"] for row in rows])
    for batch, setting in itertools.product((1, 32), [s for s in settings() if s.timed]):
        if table.has(setting, "word_problems_speed", batch):
            continue
        requests = requests_of(prompts[: 8 if batch == 1 else len(prompts)], scale)
        decoder = build_decoder(setting.settings, networks(setting.checkpoint))
        engine = DiffusionEngine(decoder.cached_models, engine_config(requests, batch, scale.device == "cuda"))
        done = list(engine.run(requests, decoder))  # graphs are captured here
        speeds = []
        for _ in range(3):
            start = time.monotonic()
            done = list(engine.run(requests, decoder))
            speeds.append(rate(done, time.monotonic() - start))
        summary = summarise(done, lambda index, ids: True)
        figures = {"n": summary.n, "accuracy": None, "ci95": None, "nfe": summary.nfe, "tpf": summary.tpf}
        table.add(setting, "word_problems_speed", batch, median(speeds), figures)


def evaluate_gsm8k(table: Table, task: Task, networks: Callable[[str], DiffusionLM], scale: Scale, path: Path) -> None:
    """GSM8K test, which nothing here was trained for: exact match of the last number."""
    with gzip.open(path, "rt") as file:
        rows = [json.loads(line) for line in itertools.islice(file, 256 if scale.device == "cuda" else 2)]
    prompts = task.prompts([row["question"] for row in rows])
    answers = [row["answer"].rpartition("#### ")[2].replace(",", "") for row in rows]

    def is_right(index: int, ids: list[int]) -> bool:
        numbers = re.findall(r"-?\d[\d,]*", task.tokenizer.decode(ids, skip_special_tokens=True))
        return bool(numbers) and numbers[-1].replace(",", "") == answers[index]

    first = {(s.checkpoint, s.decoder): s for s in reversed(settings()) if s.decoder != "apd"}
    for setting in first.values():
        if table.has(setting, "gsm8k_test", min(128, len(rows))):
            continue
        start = time.monotonic()
        done = decode(networks(setting.checkpoint), setting.settings, prompts, scale, max_rows=128)
        figures = asdict(summarise(done, is_right))
        table.add(setting, "gsm8k_test", min(128, len(rows)), rate(done, time.monotonic() - start), figures)


def measure_ar(table: Table, task: Task, path: Path, count: int) -> None:
    """The fine-tuned causal LM in vLLM, all test problems at once and one by one."""
    from vllm import LLM, SamplingParams

    rows = list(itertools.islice(word_problem_rows("test"), count))
    prompts = [{"prompt_token_ids": ids} for ids in task.prompts([row["prompt"] for row in rows])]
    llm = LLM(str(path), max_model_len=512, gpu_memory_utilization=0.3, enable_prefix_caching=False)
    eos = llm.get_tokenizer().eos_token_id
    for batch, chosen in ((1, [[p] for p in prompts[:16]]), (count, [prompts])):
        llm.generate(chosen[0], SamplingParams(temperature=0, max_tokens=128))
        start = time.monotonic()
        done = [o for c in chosen for o in llm.generate(c, SamplingParams(temperature=0, max_tokens=128))]
        seconds = time.monotonic() - start
        ids = [list(o.outputs[0].token_ids) for o in done]
        completions = [
            Completion(
                request_id=str(i), response_ids=tokens, finish_reason="stop", num_forwards=len(tokens),
                forwards_at_eos=len(tokens), commit_step=list(range(1, len(tokens) + 1)),
                num_text_tokens=len(tokens) - int(tokens[-1:] == [eos]),
            )
            for i, tokens in enumerate(ids)
        ]  # fmt: skip
        summary = summarise(completions, lambda index, response: task.is_right(rows[index], response))
        setting = Setting("fine_tuned", "autoregressive", {"engine": "vllm"})
        table.add(setting, "word_problems", batch, rate(completions, seconds), asdict(summary))


def rate(done: list[Completion], seconds: float) -> float:
    """Response tokens before the stop id, a second."""
    return sum(c.num_text_tokens for c in done) / seconds


def loader(workshop: Workshop) -> Callable[[str], DiffusionLM]:
    """Networks by name, each loaded once."""
    makers: dict[str, Callable[[], DiffusionLM]] = {
        "fine_tuned": workshop.fine_tuned,
        "teacher": workshop.teacher,
        "dparallel": workshop.dparallel,
        "d2f": workshop.d2f,
        "dparallel_d2f": lambda: workshop.d2f("dparallel"),
    }
    made: dict[str, DiffusionLM] = {}

    def load(name: str) -> DiffusionLM:
        if name not in made:
            made[name] = makers[name]()
        return made[name]

    return load


def tiny_base(base: Path, path: Path) -> Path:
    """A causal LM of the same vocabulary with small random weights."""
    from transformers import AutoTokenizer

    config = json.loads((base / "config.json").read_text()) | TINY_SHAPE
    adapted.save(adapted.build(config), path)
    AutoTokenizer.from_pretrained(base, local_files_only=True).save_pretrained(path)
    return path


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of the networks")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the rows")
    parser.add_argument("--tiny", action="store_true", help="a few steps on a CPU")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS[:3], help="default: the first three")
    parser.add_argument(
        "--checkpoints", nargs="+", choices=NETWORKS, default=NETWORKS, help="of `accuracy` and `train`"
    )
    parser.add_argument("--add-rows", type=Path, nargs="+", default=[], metavar="OUT", help="of other calls")
    parser.add_argument("--gsm8k", type=Path, help="GSM8K test set (.jsonl.gz)")
    parser.add_argument("--seconds", type=int, nargs=5, default=(60, 240, 90, 90, 110), metavar="S",
                        help=f"training budgets: {' '.join(NETWORKS)}")  # fmt: skip
    options = parser.parse_args()
    if "gsm8k" in options.parts and options.gsm8k is None:
        parser.error("the part gsm8k needs --gsm8k")
    return options


def main() -> None:
    """Train what is missing, then measure everything."""
    from transformers import AutoTokenizer

    options = arguments()
    torch.set_float32_matmul_precision("high")
    scale = TINY if options.tiny else Scale(
        rows=120_000, trajectories=24_000, response_length=128, batch=128, device="cuda",
        seconds=dict(zip(NETWORKS, options.seconds, strict=True)),
    )  # fmt: skip
    options.work.mkdir(parents=True, exist_ok=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    base = resolve_target("embedded:smollm2-135m-instruct", None)
    if options.tiny:
        base = tiny_base(base, options.work / "base")
    task = Task(AutoTokenizer.from_pretrained(base, local_files_only=True), scale.response_length)
    workshop = Workshop(base, options.work, task, scale)
    networks = loader(workshop)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    table = Table(options.out, gpu, workshop, options.add_rows)
    for step in measurements(table, task, networks, scale, options):
        step()
    table.save()
    if table.rows:
        table.plot()


def measurements(
    table: Table, task: Task, networks: Callable[[str], DiffusionLM], scale: Scale, options: argparse.Namespace
) -> Iterator[Callable[[], None]]:
    """What the command line asks for, in order."""
    count = 2 if options.tiny else 1024
    if "train" in options.parts:
        for name in options.checkpoints:
            yield lambda name=name: networks(name)
    if "accuracy" in options.parts:
        yield lambda: evaluate(table, task, networks, scale, count, options.checkpoints)
    if "speed" in options.parts:
        yield lambda: measure_speed(table, task, networks, scale)
    if "gsm8k" in options.parts:
        yield lambda: evaluate_gsm8k(table, task, networks, scale, options.gsm8k)
    if "autoregressive" in options.parts:
        yield lambda: measure_ar(table, task, options.work / "fine_tuned", count)


if __name__ == "__main__":
    main()
