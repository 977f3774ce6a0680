"""Quality and speed of draft training on one GPU, with SmolLM2-135M-Instruct as the target.

    python -m benchmarks.draft_quality --data DIR --out benchmarks/results/draft_quality.json --minutes 8

`--data` holds gsm8k/, mtbench/ and selfinstruct/ (jsonl.gz). The target answers GSM8K's training prompts and the
self-instruct prompts; drafts are trained on its answers, and measured by replay on held-out GSM8K prompts and on the
first turns of MT-bench, at temperature 0 and 1, beside n-grams that fill the same K. The real loop runs on a few
prompts to check the replay. Then speculators' DFlash on the same trajectories, and ablations at equal tokens. Rows are
written as they come, each stage ends at its share of `--minutes`. `--tiny` proves the script on a CPU: its figures
mean nothing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.batched_generation import Response
from benchmarks.draft_bench import Benchmark, Scale
from benchmarks.speculators_dflash import SpeculatorsTrainer, unavailable
from unmask.config import DistillConfig, DraftConfig
from unmask.decoding.ngram import NgramProposer, replay
from unmask.training.feature_cache import FeatureCache


def full_scale(minutes: float) -> Scale:
    """One H100 for `minutes`."""
    config = DistillConfig(
        max_steps=None, max_seconds=600, tokens_per_step=16384, anchors_per_step=2048, learning_rate=1.5e-3,
        schedule="cosine", warmup_fraction=0.04, ema=0.998, head_negatives=None, precision="bfloat16", compile=True,
        feature_cache_gb=42.0, feature_cache_device="training", weighting="decay",
    )  # fmt: skip
    return Scale(
        "cuda", DraftConfig(num_layers=5, block_size=8), config, rows=1024, prompt_columns=256, max_new_tokens=256,
        eval_prompts=256, real_prompts=8, generate=0.2 * minutes, main=0.3 * minutes, comparison=0.16 * minutes,
        ablation=0.24 * minutes,
    )  # fmt: skip


def tiny_scale() -> Scale:
    """A CPU for a minute or two."""
    config = DistillConfig(
        max_steps=None, max_seconds=600, tokens_per_step=256, anchors_per_step=128, head_negatives=None,
        precision="float32", feature_cache_gb=1.0,
    )  # fmt: skip
    return Scale(
        "cpu", DraftConfig(num_layers=1, block_size=4), config, rows=2, prompt_columns=80, max_new_tokens=6,
        eval_prompts=2, real_prompts=1, generate=0.01, main=0.01, comparison=0.01, ablation=0.01,
    )  # fmt: skip


def ngram_rows(train: list[tuple[int, ...]], sets: dict[str, list[Response]], k: int) -> dict[str, list[list[int]]]:
    """Accepted n-gram drafts of every response of every set (runs in a process of its own)."""
    torch.set_num_threads(1)
    proposer = NgramProposer(train)
    return {
        name: [
            replay(proposer, r.prompt, [*r.tokens, *r.beyond], k, until=len(r.tokens)) for r in responses
        ]
        for name, responses in sets.items()
    }  # fmt: skip


def ablations(base: DistillConfig) -> list[tuple[str, DistillConfig]]:
    """The table, most telling lines first; base itself runs in every seed."""
    lines: list[tuple[str, dict[str, Any]]] = [
        ("decay x ce", {}),
        ("d_pace x ce", {"weighting": "d_pace"}),
        ("first_miss x ce", {"weighting": "first_miss"}),
        ("decay x lk_hybrid", {"loss": "lk_hybrid"}),
        ("beta .5 target_relative T .5 late", {"beta": 0.5, "gate": "target_relative", "certainty_start": 0.3}),
        ("beta .5 right T .5 late", {"beta": 0.5, "gate": "right", "certainty_start": 0.3}),
        ("beta 2 right T .5", {"beta": 2.0, "gate": "right"}),
        ("decay x kl", {"loss": "kl"}),
        ("beta .5 prefix_right T .5 late", {"beta": 0.5, "gate": "prefix_right", "certainty_start": 0.3}),
        ("beta .5 target_relative T 1 late",
         {"beta": 0.5, "gate": "target_relative", "certainty_start": 0.3, "entropy_temperature": 1.0}),
        ("beta .1 target_relative T .5 late", {"beta": 0.1, "gate": "target_relative", "certainty_start": 0.3}),
        ("d_pace x lk_hybrid", {"weighting": "d_pace", "loss": "lk_hybrid"}),
        ("decay x tv", {"loss": "tv"}),
    ]  # fmt: skip
    return [(name, replace(base, seed=seed, **change)) for seed in range(3) for name, change in lines]


def run_stage(bench: Benchmark, minutes: float, stage: Callable[[float], None]) -> None:
    """Run a stage with its budget in seconds."""
    torch.manual_seed(0)
    stage(60 * minutes)
    bench.save()


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/draft_quality.json"))
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--ablation-steps", type=int, default=600)
    parser.add_argument("--no-compile", action="store_true", help="train without torch.compile")
    args = parser.parse_args()
    scale = tiny_scale() if args.tiny else full_scale(args.minutes)
    if args.no_compile:
        scale = replace(scale, config=replace(scale.config, compile=False))
    torch.set_float32_matmul_precision("high")
    bench = Benchmark(scale, args.data, args.out)
    bench.log("target loaded")
    bench.generate()
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        ngrams = pool.submit(ngram_rows, [r.tokens for r in bench.train], bench.sets, bench.k)
        features = bench.features(scale.config, final=True)
        run_stage(bench, scale.main, lambda seconds: train_main(bench, features, seconds))
        run_stage(bench, scale.comparison, lambda seconds: compare(bench, features, seconds))
        run_stage(bench, scale.ablation, lambda seconds: ablate(bench, features, args.ablation_steps, seconds))
        add_ngrams(bench, ngrams)
    bench.save()


def train_main(bench: Benchmark, features: FeatureCache, seconds: float) -> None:
    """The best recipe for its share of the time."""
    config = bench.scale.config
    trainer = bench.trainer(config, features)
    run = bench.run(trainer, seconds=seconds)
    bench.measure(trainer.average, "ours", "main", config, run)
    bench.real(trainer.average)


def compare(bench: Benchmark, features: FeatureCache, seconds: float) -> None:
    """Speculators' DFlash and ours on the same rows of tokens, anchors and number of steps."""
    reason = unavailable()
    if reason is not None:
        bench.notes["speculators"] = f"not run: {reason}"
        bench.log(bench.notes["speculators"])
        return
    config = replace(bench.scale.config, ema=0.0, learning_rate=6e-4)
    theirs = SpeculatorsTrainer(bench.sizes, features, config)
    steps = _steps_within(bench, theirs, seconds / 2)
    theirs = SpeculatorsTrainer(bench.sizes, features, config)
    run = bench.run(theirs, steps=steps)
    bench.measure(theirs.draft(), "speculators", "d_pace x ce, random start, AdamW", config, run)
    ours = bench.trainer(bench.scale.config, features)
    run = bench.run(ours, steps=steps)
    bench.measure(ours.average, "ours", "main, steps of speculators", bench.scale.config, run)


def _steps_within(bench: Benchmark, trainer: Any, seconds: float) -> int:
    """How many steps fit a time, from a few of them."""
    count = 2 if bench.scale.device == "cpu" else 30
    timed = bench.run(trainer, steps=count)
    return max(count, int(seconds / timed["step_seconds"]))


def ablate(bench: Benchmark, features: FeatureCache, steps: int, seconds: float) -> None:
    """Lines of the table at equal tokens while time lasts."""
    if bench.scale.device == "cpu":
        steps = 2
    start = time.monotonic()
    for name, config in ablations(bench.scale.config):
        if time.monotonic() - start > seconds:
            bench.log("ablations: out of time")
            return
        trainer = bench.trainer(config, features)
        run = bench.run(trainer, steps=steps)
        bench.measure(trainer.average, "ours", name, config, run)


def add_ngrams(bench: Benchmark, ngrams: Future[dict[str, list[list[int]]]]) -> None:
    """The baseline's rows."""
    for name, accepted in ngrams.result().items():
        bench.add({"trainer": "n-grams", "recipe": "lookup, else table", "seed": 0, "loop": "replay"}, name,
                  bench.sets[name], accepted)  # fmt: skip


if __name__ == "__main__":
    main()
