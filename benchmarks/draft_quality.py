"""Quality and speed of draft training on one GPU, with SmolLM2-135M-Instruct as the target.

    python -m benchmarks.draft_quality --data DIR --state DIR --out benchmarks/results/draft_quality.json

`--data` holds gsm8k/, mbpp/, mtbench/ and selfinstruct/ (jsonl.gz). The target answers GSM8K's training prompts, the
self-instruct prompts, MBPP's training tasks, and prompts that it writes itself; drafts are trained on its answers, and
measured by replay on held-out GSM8K prompts and on the first turns of MT-bench, at temperature 0 and 1, beside n-grams
that fill the same K, and by the real loop on a few. The table of recipes is measured on training prompts that were kept
aside.

The work is cut into cases (`--list`), run in order unless `--cases` names some (`ablation-00` means its three seeds).
Each leaves a JSON file in `--state`, and all rows are merged into `--out`. A case that is there is not run again, and
the main training goes on from its last saved state, so that calls may be cut by `--deadline` (seconds) or by force.
`--tiny` proves all of it on a CPU: its figures mean nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.batched_generation import Response
from benchmarks.draft_bench import FRESH, Benchmark, Deadline
from benchmarks.draft_lines import ABLATIONS, ADAMW, BY_DEFAULT, OPTIMIZERS, PUBLISHED, SECOND, SEEDS
from benchmarks.draft_scale import full_scale, tiny_scale
from benchmarks.draft_store import Store
from benchmarks.speculators_dflash import SpeculatorsTrainer, unavailable
from unmask.capture import rejected_anchors
from unmask.config import DistillConfig
from unmask.decoding.ngram import NgramProposer, replay
from unmask.evaluation.replay import replay_draft
from unmask.training.sequences import TokenSequence
from unmask.types import ServedRequest

Outcome = tuple[list[dict[str, Any]], dict[str, Any]]
"""Rows, and notes that are no rows."""


def trajectories(bench: Benchmark) -> Outcome:
    """What the target answers; everything else begins with it."""
    return [], bench.generate()


def more(bench: Benchmark) -> Outcome:
    """What it answers to more prompts of its own."""
    return [], bench.generate_more()


def fresh(bench: Benchmark) -> Outcome:
    """What a second stage sees: drawn anew, as service would."""
    return [], bench.generate_again()


def ngrams(bench: Benchmark) -> Outcome:
    """The baseline: prompt lookup, else a table of at most 4-grams of the same training responses."""
    proposer = NgramProposer([r.tokens for r in bench.train])
    shared = {
        "trainer": "n-grams", "recipe": "lookup, else table", "seed": 0, "gpu_minutes": 0.0, "loop": "replay",
        "tokens_seen": sum(len(r.tokens) for r in bench.train), "samples_per_second": None, "mfu": None,
    }  # fmt: skip
    rows = []
    for name, responses in bench.sets.items():
        accepted = [replay(proposer, r.prompt, [*r.tokens, *r.beyond], bench.k, until=len(r.tokens)) for r in responses]
        rows += bench.rows(shared, name, responses, accepted)
    return rows, {}


def main_training(bench: Benchmark, name: str = "main") -> Outcome:
    """The best recipe for its time, over as many calls as it takes; or the published weights and loss in its place."""
    config = bench.scale.config if name == "main" else replace(bench.scale.config, **PUBLISHED)
    trainer = bench.trainer(config, bench.features(), bench.new_draft(config.seed))
    run = bench.run(trainer, seconds=bench.scale.main_seconds, state=bench.store.folder / f"{name}_state")
    bench.store.keep_draft(name, trainer.average)
    return bench.measure(trainer.average, "ours", _recipe(name, config), config, run), {"run": run}


def _recipe(name: str, config: DistillConfig) -> str:
    return f"{name}: {config.weighting} x {config.loss}"


def real_loop(bench: Benchmark) -> Outcome:
    """The main draft in the real loop, on a few prompts, in float32."""
    trained = bench.store.done("main")
    if trained is None:
        raise FileNotFoundError("case 'main' has not been run")
    shared = {k: v for k, v in trained["rows"][0].items() if k not in ("prompts", "interval95")}
    return bench.real(bench.store.draft("main").to(bench.scale.device).eval(), shared), {}


def speculators(bench: Benchmark) -> Outcome:
    """Speculators' DFlash on the same rows of tokens, anchors and number of steps as `equal`."""
    reason = unavailable()
    if reason is not None:
        bench.log(f"speculators: not run: {reason}")
        return [], {"not run": reason}
    # Theirs: Muon, linear decay after 1 % of warm-up, no average.
    config = replace(
        bench.scale.config, ema=0.0, optimizer="muon", learning_rate=1e-3, schedule="constant_then_linear",
        warmup_fraction=0.01, decay_fraction=1.0,
    )  # fmt: skip
    theirs = SpeculatorsTrainer(bench.sizes, bench.features(), config)
    run = bench.run(theirs, steps=bench.scale.comparison_steps)
    rows = bench.measure(theirs.draft(), "speculators", "d_pace x ce, random start, Muon", config, run)
    return rows, {"run": run}


def reference(bench: Benchmark) -> Outcome:
    """The published recipe as a plain loop: random start, fixed decay, cosine, only attention compiled, no average."""
    config = replace(
        bench.scale.config, ema=0.0, optimizer="adamw", learning_rate=6e-4, schedule="cosine", compile=False,
        cuda_graph=False, **PUBLISHED,
    )  # fmt: skip
    trainer = bench.trainer(config, bench.features(), bench.new_draft(config.seed, "random"))
    run = bench.run(trainer, steps=bench.scale.comparison_steps)
    return bench.measure(trainer.average, "reference", "decay x ce, random start", config, run), {"run": run}


def equal(bench: Benchmark) -> Outcome:
    """Ours for the steps of `speculators`; its draft is kept."""
    config = bench.scale.config
    trainer = bench.trainer(config, bench.features(), bench.new_draft(config.seed))
    run = bench.run(trainer, steps=bench.scale.comparison_steps)
    bench.store.keep_draft("equal", trainer.average)
    return bench.measure(trainer.average, "ours", "main, steps of speculators", config, run), {"run": run}


def optimizer(bench: Benchmark, line: int) -> Outcome:
    """The main recipe by another optimiser, at another rate, from another start or with more anchors a step."""
    name, rate, start, anchors, times = OPTIMIZERS[line]
    config = replace(bench.scale.config, optimizer=name, learning_rate=rate, anchors_per_step=anchors)
    trainer = bench.trainer(config, bench.features(), bench.new_draft(config.seed, start))
    budget = f"{bench.scale.main_seconds:g} s"
    if times is None:
        run = bench.run(trainer, seconds=bench.scale.main_seconds)
    else:
        steps = times * bench.scale.comparison_steps
        run, budget = bench.run(trainer, steps=steps), f"{steps} steps"
    recipe = f"main by {name} at {rate:g}, {budget}" + (f", {start} start" if start == "random" else "")
    recipe += "" if anchors == bench.scale.config.anchors_per_step else f", {anchors} anchors"
    rows = [
        row
        for to_choose in (True, False)
        for row in bench.measure(trainer.average, "ours", recipe, config, run, to_choose=to_choose)
    ]
    return rows, {"run": run}


def ablation(bench: Benchmark, line: int, seed: int, optimizer: dict[str, Any] = ADAMW) -> Outcome:
    """A line of the table, on half of the texts, which its steps visit little more than once."""
    name, change = ABLATIONS[line]
    name += "" if optimizer else ", default optimiser"
    config = replace(bench.scale.config, seed=seed, **(optimizer | PUBLISHED | change))
    steps, features = bench.scale.ablation_steps, bench.features(to_choose=True)
    trainer = bench.trainer(config, features, bench.new_draft(config.seed))
    run = bench.run(trainer, steps=steps)
    return bench.measure(trainer.average, "ours", name, config, run, to_choose=True), {"run": run}


def second(bench: Benchmark, stage: int, seed: int) -> Outcome:
    """A second stage from the main draft."""
    config = replace(bench.scale.config, seed=seed, **(ADAMW | {"learning_rate": 5e-4}))
    draft = bench.store.draft("main").to(bench.scale.device)
    if stage > 0:
        drawn = bench.store.responses(FRESH)
        features = bench.features_of(SECOND[stage], lambda: _texts(bench, draft, drawn, rejected=stage == 2))
    else:
        features = bench.features(every=2)  # its steps visit no more
    trainer = bench.trainer(config, features, draft)
    run = bench.run(trainer, steps=bench.scale.second_steps)
    return bench.measure(trainer.average, "ours", f"second stage: {SECOND[stage]}", config, run), {"run": run}


def _texts(bench: Benchmark, draft: Any, responses: list[Response], *, rejected: bool) -> list[TokenSequence]:
    """Responses as training texts, with the anchors at which a served draft would be rejected."""
    texts = [TokenSequence(r.prompt + r.tokens + r.beyond, len(r.prompt)) for r in responses]
    usable = [(r, t) for r, t in zip(responses, texts, strict=True) if len(r.tokens) > 1]
    if not rejected:
        return [TokenSequence(r.prompt + r.tokens, len(r.prompt)) for r, _ in usable]
    accepted = replay_draft(bench.target, draft, [t for _, t in usable], [len(r.tokens) for r, _ in usable])
    found = []
    for (response, _), counts in zip(usable, accepted, strict=True):
        request = ServedRequest(
            prompt_ids=list(response.prompt), response_ids=list(response.tokens), finish_reason="stop",
            num_forwards=len(counts) + 1, accepted=counts, drafted=[bench.k] * len(counts),
        )  # fmt: skip
        anchors = tuple(len(response.prompt) + anchor for anchor in rejected_anchors(request))
        found.append(TokenSequence(response.prompt + response.tokens, len(response.prompt), anchors))
    return found


def cases() -> dict[str, Callable[[Benchmark], Outcome]]:
    """All cases by name, in the order of running."""
    table: dict[str, Callable[[Benchmark], Outcome]] = {
        "trajectories": trajectories,
        # Before the main training, whose recipe they choose.
        **{
            f"ablation-{line:02d}-seed{seed}": partial(ablation, line=line, seed=seed)
            for seed in SEEDS
            for line in range(len(ABLATIONS))
        },
        **{
            f"default-optimiser-{line:02d}-seed{seed}": partial(ablation, line=line, seed=seed, optimizer={})
            for seed in SEEDS
            for line in BY_DEFAULT
        },
        "more": more,
        **{
            f"optimizer-{name}-{rate:g}-{start}-{anchors}-{budget}": partial(optimizer, line=line)
            for line, (name, rate, start, anchors, times) in enumerate(OPTIMIZERS)
            for budget in [f"x{times}" if times else "main"]
        },
        "main": main_training, "real": real_loop, "published": partial(main_training, name="published"),
        "speculators": speculators, "reference": reference, "equal": equal, "ngrams": ngrams,
    }  # fmt: skip
    table["fresh"] = fresh
    for seed in SEEDS:
        for stage in range(len(SECOND)):
            table[f"second-{stage}-seed{seed}"] = partial(second, stage=stage, seed=seed)
    return table


def main() -> None:
    """See the module's docstring."""
    table = cases()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--state", type=Path, required=True, help="folder that is kept from call to call")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/draft_quality.json"))
    parser.add_argument("--cases", nargs="+", default=[""], metavar="PREFIX", help="cases whose names begin so")
    parser.add_argument("--deadline", type=float, default=float("inf"), help="seconds of this call")
    parser.add_argument("--list", action="store_true", help="print the cases and which are done")
    parser.add_argument("--main-seconds", type=float, help="of the main training (default: 240)")
    parser.add_argument("--device", help="of the cases that need no GPU, such as ngrams: cpu")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--no-compile", action="store_true", help="train without torch.compile")
    args = parser.parse_args()
    store = Store(args.state, args.out)
    chosen = [name for name in table if any(name.startswith(prefix) for prefix in args.cases)]
    pending = [name for name in chosen if store.done(name) is None]
    if args.list:
        print("\n".join(f"{name}{'' if name in pending else '  done'}" for name in chosen))
        return
    store.merge()
    scale = tiny_scale() if args.tiny else full_scale()
    if args.device:
        scale = replace(scale, device=args.device)
    if args.main_seconds:
        scale = replace(scale, main_seconds=args.main_seconds)
    if args.no_compile:
        scale = replace(scale, config=replace(scale.config, compile=False))
    torch.set_float32_matmul_precision("high")
    # Batches are made by many small operations, which cost more the more threads they are handed to.
    torch.set_num_threads(min(4, torch.get_num_threads()))
    # Each objective compiles its own kernel; beyond the limit they would run uncompiled without a word.
    torch._dynamo.config.recompile_limit = 64
    bench = Benchmark(scale, args.data, store, args.deadline)
    for name in pending:
        try:
            bench.check_time()
            torch.manual_seed(0)
            store.finish(name, *table[name](bench))
            bench.forget_graphs()
        except Deadline:
            bench.log(f"out of time in '{name}'; the same command goes on from here")
            return


if __name__ == "__main__":
    main()
