"""The whole line from one recipe: `python -m pipelines.run recipe.yaml [section.field=value ...]`.

generate, distil, evaluate, publish, gate. A stage is skipped when it has finished and its inputs are unchanged; an
unfinished one is resumed; one whose inputs have changed starts over, and so do the stages after it.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from actors.cluster import connect
from engines.engine_options import check_engine_options
from pipelines.cli import Invocation, run_pipeline
from unmask.config import Recipe
from unmask.files import write_json
from unmask.prompt_rows import check_source
from unmask.recipe import digest

logger = logging.getLogger(__name__)

INPUTS = {
    "generate": ("target", "prompts", "generate"),
    "distill": ("draft", "distill"),
    "evaluate": ("evaluate",),
    "publish": ("publish",),
    "gate": ("serve",),
}
"""Sections of the recipe that each stage reads, in the order of the stages."""


@dataclass(slots=True)
class Line:
    """One run directory: which stages are complete, and for which inputs."""

    recipe: Recipe
    run_dir: Path
    upstream: str = ""

    def stage(self, name: str, work: Callable[[bool], Any]) -> dict[str, Any]:
        """Run a stage, or take its earlier report.

        Args:
            work: does it and returns a report dataclass; told whether to start over.
        """
        inputs = digest(self.upstream, *(getattr(self.recipe, section) for section in INPUTS[name]))
        self.upstream = inputs
        record = self.run_dir / "stages" / f"{name}.json"
        before = json.loads(record.read_text()) if record.is_file() else None
        if before and before["inputs"] == inputs:
            logger.info("%s: complete and unchanged, skipped", name)
            return before["report"]
        logger.info("%s: started", name)
        start = time.monotonic()
        report = asdict(work(before is not None))
        record.parent.mkdir(parents=True, exist_ok=True)
        seconds = time.monotonic() - start
        write_json(record, {"inputs": inputs, "report": report, "wall_seconds": seconds})
        logger.info("%s: done in %.0f s", name, seconds)
        return report


def run(recipe: Recipe, run_dir: Path, *, fresh: bool = False) -> dict[str, Any]:
    """Run all stages and write `<run_dir>/report.json`; the report.

    Raises:
        UserError: from any stage, or a pairing that fails the gate.
        FaultError: from any stage.
    """
    from pipelines.distill import distill
    from pipelines.evaluate import evaluate
    from pipelines.gate import GateReport, check, gate
    from pipelines.generate import generate
    from pipelines.publish import publish

    start = time.monotonic()
    for prompts in (recipe.prompts, recipe.evaluate.new_items, recipe.evaluate.new_templates):
        check_source(prompts)
    check_engine_options(recipe.target.engine)
    if fresh:
        for record in (run_dir / "stages").glob("*.json"):
            record.unlink()
    connect(num_cpus=cpus(recipe), num_gpus=gpus(recipe))
    line = Line(recipe, run_dir)
    stages = {
        "generate": line.stage("generate", lambda again: generate(recipe, run_dir, fresh=fresh or again)),
        "distill": line.stage("distill", lambda again: distill(recipe, run_dir, fresh=fresh or again)),
        "evaluate": line.stage("evaluate", lambda again: evaluate(recipe, run_dir)),
        "publish": line.stage("publish", lambda again: publish(recipe, run_dir)),
    }
    stages["gate"] = line.stage("gate", lambda again: gate(recipe, run_dir, Path(stages["publish"]["path"])))
    report = summary(stages) | {"seconds": time.monotonic() - start}
    write_json(run_dir / "report.json", report)
    check(GateReport(**stages["gate"]))
    return report


def summary(stages: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The figures of a run that people and scripts look at first."""
    generated, trained, served = stages["generate"], stages["distill"], stages["gate"]
    sets = stages["evaluate"]["sets"]
    items, templates = sets["new_items"], sets.get("new_templates")
    prompts = sum(s["prompts"] for s in sets.values())
    return {
        "generate": {name: generated[name] for name in ("rows", "quarantined", "tokens_per_second")},
        "distill": {name: trained[name] for name in ("steps", "loss_first", "loss_last", "seconds")},
        "evaluate": {
            "prompts": prompts,
            "acceptance_length": items["acceptance_length"],
            "acceptance_length_interval95": items["interval95"],
            "acceptance_length_ngram": items["acceptance_length_ngram"],
            "acceptance_length_new_templates": templates["acceptance_length"] if templates else None,
            "acceptance_length_ngram_new_templates": templates["acceptance_length_ngram"] if templates else None,
            "acceptance_by_position": items["acceptance_by_position"],
            "identical": sum(s["identical"] for s in sets.values()),
            "tokens_per_second": items["tokens_per_second"],
            "tokens_per_second_target_only": items["tokens_per_second_target_only"],
            "plot": stages["evaluate"]["plot"],
        },
        "publish": stages["publish"],
        "serve": served,
    }


def cpus(recipe: Recipe) -> float:
    """CPUs that the hungriest stage asks for at the same time."""
    serve, distill, evaluate = recipe.serve, recipe.distill, recipe.evaluate
    return max(
        recipe.generate.min_actors * recipe.generate.cpus_per_actor,
        distill.num_workers * distill.cpus_per_worker + 1,
        evaluate.num_workers * evaluate.cpus_per_worker,
        serve.target_replicas * serve.target_cpus + serve.draft_replicas * serve.draft_cpus,
    )


def gpus(recipe: Recipe) -> float:
    """GPUs that the hungriest stage asks for at the same time."""
    serve = recipe.serve
    return max(
        recipe.generate.min_actors * recipe.generate.gpus_per_actor,
        recipe.distill.num_workers if recipe.distill.use_gpu else 0,
        recipe.evaluate.num_workers if recipe.evaluate.use_gpu else 0,
        serve.target_replicas * serve.target_gpus + serve.draft_replicas * serve.draft_gpus,
    )


def table(report: dict[str, Any]) -> str:
    """The report as one table."""
    rows = [
        (f"{section}.{name}" if isinstance(values, dict) else section, value)
        for section, values in report.items()
        for name, value in (values.items() if isinstance(values, dict) else [("", values)])
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {_cell(value)}" for name, value in rows)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, list):
        return " ".join(_cell(item) for item in value)
    return str(value)


def placement(recipe: Recipe) -> str:
    """What `--plan` says of the whole line."""
    from pipelines import distill, generate

    serve = recipe.serve
    return (
        generate.placement(recipe)
        + distill.placement(recipe)
        + f"# serve: {serve.target_replicas} x target ({serve.target_cpus:g} CPUs, {serve.target_gpus:g} GPUs), "
        f"{serve.draft_replicas} x draft ({serve.draft_cpus:g} CPUs, {serve.draft_gpus:g} GPUs)\n"
    )


def main(invocation: Invocation) -> str:
    """Run the line; the table to print."""
    recipe = invocation.recipe
    report = run(recipe, Path(recipe.run_dir), fresh=invocation.fresh)
    return f"{table(report)}\nreport in {Path(recipe.run_dir) / 'report.json'}"


if __name__ == "__main__":
    sys.exit(run_pipeline(main, description=(__doc__ or "").splitlines()[0], plan=placement))
