"""The cases of `benchmarks.draft_quality`: each trains or measures something, and returns rows and notes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

from benchmarks.batched_generation import Response
from benchmarks.draft_bench import FIRST, FRESH, Benchmark
from benchmarks.draft_lines import (
    ABLATIONS,
    ADAMW,
    FURTHER,
    MAINS,
    NO_CERTAINTY,
    OBJECTIVES,
    OPTIMIZERS,
    PUBLISHED,
    PUBLISHED_RATE,
    SECOND,
)
from benchmarks.speculators_dflash import SpeculatorsTrainer, unavailable
from unmask.capture import rejected_anchors
from unmask.config import DistillConfig
from unmask.decoding.ngram import NgramProposer, replay
from unmask.evaluation.replay import replay_draft
from unmask.files import write_json
from unmask.models.dflash import DFlashDraft
from unmask.objectives.confidence import ConfidenceHead
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
    """A recipe of `MAINS` for the whole time, over as many calls as it takes."""
    config = _config_of(bench, name)
    trainer = bench.trainer(config, bench.features(), bench.new_draft(config.seed))
    run = bench.run(trainer, seconds=bench.scale.main_seconds, state=bench.store.folder / f"{name}_state")
    bench.store.keep_draft(name, trainer.average)
    return _on_all_sets(bench, trainer.average, _recipe(name, config), config, run), {"run": run}


def _config_of(bench: Benchmark, name: str) -> DistillConfig:
    config = replace(bench.scale.config, **MAINS[name])
    return replace(config, anchors_per_step=2 * config.anchors_per_step) if name.startswith("wide") else config


def _recipe(name: str, config: DistillConfig) -> str:
    certainty = f", beta {config.beta:g} {config.gate}" if config.beta else ""
    return f"{name}: {config.weighting} x {config.loss}{certainty}, {config.anchors_per_step} anchors"


def _on_all_sets(
    bench: Benchmark, draft: DFlashDraft, recipe: str, config: DistillConfig, run: dict[str, float],
    trainer: str = "ours",
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows on the test prompts, and on those by which recipes are chosen."""
    return [
        row
        for to_choose in (False, True)
        for row in bench.measure(draft, trainer, recipe, config, run, to_choose=to_choose)
    ]


def _of_main(bench: Benchmark) -> dict[str, Any]:
    """What rows of the main draft have in common, however it is measured."""
    trained = bench.store.done("main")
    if trained is None:
        raise FileNotFoundError("case 'main' has not been run")
    return {k: v for k, v in trained["rows"][0].items() if k not in ("prompts", "interval95")}


def real_loop(bench: Benchmark) -> Outcome:
    """The main draft in the real loop, on a few prompts, in float32."""
    shared = _of_main(bench)
    return bench.real(bench.store.draft("main").to(bench.scale.device).eval(), shared), {}


def served(bench: Benchmark) -> Outcome:
    """The main draft in vLLM's own loop, on all held-out prompts."""
    shared = _of_main(bench)
    prompts = {name: [list(r.prompt) for r in bench.sets[f"{name}@0"]] for name in ("gsm8k", "mtbench")}
    asked, told = (bench.store.folder / f"served_{name}.json" for name in ("prompts", "rows"))
    write_json(asked, prompts)
    draft = bench.store.folder / "drafts" / "main"
    command = [sys.executable, "-m", "benchmarks.draft_served", f"--draft={draft}", f"--prompts={asked}"]
    command += ["--tiny"] * (bench.scale.device == "cpu")
    # What this process keeps is no use to it meanwhile, and the engine wants its share.
    bench.forget_features()
    subprocess.run([*command, f"--out={told}"], check=True)
    rows = [shared | {"loop": "vLLM, bfloat16"} | row for row in json.loads(told.read_text())]
    return rows, {}


def confidence(bench: Benchmark, temperature: float) -> Outcome:
    """A confidence head, trained beside the main draft on text of one temperature; how far off it is on text of other
    prompts."""
    config = replace(bench.scale.config.further(), confidence_weight=1.0)
    # Of the training responses the first to each prompt is greedy.
    first = {r.prompt: r for r in reversed(bench.store.responses(FIRST))}
    chosen = bench.store.responses(FRESH) if temperature else list(first.values())
    features = bench.features_of(
        f"T = {temperature:g}", lambda: [TokenSequence(r.prompt + r.tokens, len(r.prompt)) for r in chosen]
    )
    draft = bench.store.draft("main").to(bench.scale.device)
    head = ConfidenceHead(draft.config.hidden_size, bench.k, temperature).to(bench.scale.device)
    trainer = bench.trainer(config, features, draft, head)
    run = bench.run(trainer, steps=bench.scale.second_steps)
    name = f"main, then a confidence head at T = {temperature:g}"
    average = trainer.average_confidence
    return bench.measure(trainer.average, "ours", name, config, run, confidence=average), {"run": run}


def speculators(bench: Benchmark, rate: float = PUBLISHED_RATE, *, wide: bool = False) -> Outcome:
    """Speculators' DFlash on the same rows of tokens, anchors and number of steps as `equal` or `equal-wide`; on the
    prompts by which recipes are chosen too."""
    reason = unavailable()
    if reason is not None:
        bench.log(f"speculators: not run: {reason}")
        return [], {"not run": reason}
    # Theirs: Muon, linear decay after 1 % of warm-up, no average.
    config = replace(
        bench.scale.config, ema=0.0, optimizer="muon", learning_rate=rate, schedule="constant_then_linear",
        warmup_fraction=0.01, decay_fraction=1.0, anchors_per_step=(1 + wide) * bench.scale.config.anchors_per_step,
    )  # fmt: skip
    theirs = SpeculatorsTrainer(bench.sizes, bench.features(), config)
    run = bench.run(theirs, steps=bench.scale.comparison_steps)
    recipe = "d_pace x ce, random start, Muon" + (f" at {rate:g}" if rate != PUBLISHED_RATE else "")
    recipe += f", {config.anchors_per_step} anchors" if wide else ""
    return _on_all_sets(bench, theirs.draft(), recipe, config, run, "speculators"), {"run": run}


def reference(bench: Benchmark) -> Outcome:
    """The published recipe as a plain loop: random start, fixed decay, cosine, only attention compiled, no average."""
    config = replace(
        bench.scale.config, ema=0.0, optimizer="adamw", learning_rate=6e-4, schedule="cosine", compile=False,
        cuda_graph=False, **PUBLISHED,
    )  # fmt: skip
    trainer = bench.trainer(config, bench.features(), bench.new_draft(config.seed, "random"))
    run = bench.run(trainer, steps=bench.scale.comparison_steps)
    return bench.measure(trainer.average, "reference", "decay x ce, random start", config, run), {"run": run}


def equal(bench: Benchmark, name: str = "main") -> Outcome:
    """A recipe of `MAINS` for the steps of `speculators`, on the same tokens; its draft is kept."""
    config = _config_of(bench, name)
    trainer = bench.trainer(config, bench.features(), bench.new_draft(config.seed))
    run = bench.run(trainer, steps=bench.scale.comparison_steps)
    bench.store.keep_draft("equal" if name == "main" else f"equal-{name}", trainer.average)
    recipe = f"{_recipe(name, config)}, steps of speculators"
    return _on_all_sets(bench, trainer.average, recipe, config, run), {"run": run}


def optimizer(bench: Benchmark, line: int) -> Outcome:
    """The main recipe without its certainty term by another optimiser, at another rate, from another start or with more
    anchors a step."""
    name, rate, start, anchors, times = OPTIMIZERS[line]
    changes: dict[str, Any] = {"optimizer": name, "learning_rate": rate, "anchors_per_step": anchors}
    config = replace(bench.scale.config, **(NO_CERTAINTY | changes))
    trainer = bench.trainer(config, bench.features(), bench.new_draft(config.seed, start))
    budget = f"{bench.scale.main_seconds:g} s"
    if times is None:
        run = bench.run(trainer, seconds=bench.scale.main_seconds)
    else:
        steps = times * bench.scale.comparison_steps
        run, budget = bench.run(trainer, steps=steps), f"{steps} steps"
    recipe = f"no-certainty by {name} at {rate:g}, {budget}" + (f", {start} start" if start == "random" else "")
    recipe += "" if anchors == bench.scale.config.anchors_per_step else f", {anchors} anchors"
    return _on_all_sets(bench, trainer.average, recipe, config, run), {"run": run}


def ablation(bench: Benchmark, line: int, seed: int, optimizer: dict[str, Any] = ADAMW) -> Outcome:
    """A line of the table, on half of the texts, which its steps visit little more than once."""
    name, change = ABLATIONS[line]
    name += "" if optimizer else ", default optimiser"
    config = replace(bench.scale.config, seed=seed, **(optimizer | PUBLISHED | change))
    steps, features = bench.scale.ablation_steps, bench.features(to_choose=True)
    trainer = bench.trainer(config, features, bench.new_draft(config.seed))
    run = bench.run(trainer, steps=steps)
    return bench.measure(trainer.average, "ours", name, config, run, to_choose=True), {"run": run}


def lasting(bench: Benchmark, line: int, seed: int) -> Outcome:
    """A line of the table by the default optimiser for three times the steps of `equal`, on every other text of the
    main training."""
    name, change = ABLATIONS[line]
    config = replace(bench.scale.config, seed=seed, **(PUBLISHED | change))
    return _on_every_other(bench, f"{name}, default optimiser", config, 3)


def objective(bench: Benchmark, name: str, times: int, seed: int) -> Outcome:
    """An objective by the default optimiser, for a multiple of the steps of `equal`, on the texts of `lasting`."""
    config = replace(bench.scale.config, seed=seed, **OBJECTIVES[name])
    return _on_every_other(bench, f"objective {name}", config, times)


def _on_every_other(bench: Benchmark, recipe: str, config: DistillConfig, times: int) -> Outcome:
    """A new draft on every other text of the main training, for a multiple of the steps of `equal`."""
    steps = times * bench.scale.comparison_steps
    trainer = bench.trainer(config, bench.features(every=2), bench.new_draft(config.seed))
    run = bench.run(trainer, steps=steps)
    return _on_all_sets(bench, trainer.average, f"{recipe}, {steps} steps", config, run), {"run": run}


def further(bench: Benchmark, by: str) -> Outcome:
    """By what a second stage is best trained: half of one, on text drawn anew."""
    config = replace(bench.scale.config, **FURTHER[by])
    return _from_main(bench, f"second stage by {by}", config, 1, bench.scale.second_steps // 2)


def second(bench: Benchmark, stage: int, seed: int) -> Outcome:
    """A second stage from the main draft."""
    config = replace(bench.scale.config.further(), seed=seed)
    return _from_main(bench, f"second stage: {SECOND[stage]}", config, stage, bench.scale.second_steps)


def _from_main(bench: Benchmark, recipe: str, config: DistillConfig, stage: int, steps: int) -> Outcome:
    """The main draft, trained on what a stage of `SECOND` sees."""
    draft = bench.store.draft("main").to(bench.scale.device)
    if stage > 0:
        drawn = bench.store.responses(FRESH)
        features = bench.features_of(SECOND[stage], lambda: _texts(bench, draft, drawn, rejected=stage == 2))
    else:
        features = bench.features(every=2)  # its steps visit no more
    trainer = bench.trainer(config, features, draft)
    run = bench.run(trainer, steps=steps)
    return _on_all_sets(bench, trainer.average, recipe, config, run), {"run": run}


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
