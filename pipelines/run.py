"""The whole line from one recipe: `python -m pipelines.run recipe.yaml [section.field=value ...]`.

A pairing: generate, distil, evaluate, publish, gate. A student: adapt (where the recipe asks for it), generate, distil,
evaluate, publish. A stage is skipped when it has finished and its inputs are unchanged; an
unfinished one is resumed; one whose inputs have changed starts over, and so do the stages after it. Where work is
placed is no input.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from actors.cluster import connect
from engines.engine_options import DIFFUSION_PLACEMENT, PLACEMENT, check_engine_options
from pipelines.cli import Invocation, run_pipeline
from pipelines.placement import placement
from unmask.config import DistillConfig, Recipe, TrainingConfig
from unmask.errors import ConfigError, UserError
from unmask.files import write_json
from unmask.placement import PLACING
from unmask.prompt_rows import check_source
from unmask.recipe import digest, to_tree

logger = logging.getLogger(__name__)

INPUTS = {
    "adapt": ("target", "adapt"),
    "generate": ("target", "prompts", "generate"),
    "distill": ("draft", "distill", "student"),
    "evaluate": ("evaluate",),
    "publish": ("publish",),
    "gate": ("serve",),
    "capture": ("serve", "on_policy"),
}
"""Sections of the recipe that each stage reads, in the order of the stages."""

_MADE = {
    "adapt": ("teacher",),
    "generate": ("trajectories",),
    "capture": ("trajectories",),
    "distill": ("draft", "student"),
}
"""Folders of the run whose contents a stage goes on with."""


@dataclass(slots=True)
class Line:
    """One run directory: which stages are complete, and for which inputs."""

    recipe: Recipe
    run_dir: Path
    upstream: str = ""

    def stage(self, name: str, work: Callable[[], Any]) -> dict[str, Any]:
        """Run a stage, or take its earlier report.

        Args:
            work: does it, going on with what is there, and returns a report dataclass.
        """
        inputs = digest(self.upstream, *(_deciding(self.recipe, section) for section in INPUTS[name]))
        self.upstream = inputs
        record = self.run_dir / "stages" / f"{name}.json"
        before = json.loads(record.read_text()) if record.is_file() else None
        if before is not None and before["inputs"] != inputs:
            self._clear(name)
        elif before is not None and before["report"] is not None:
            logger.info("%s: complete and unchanged, skipped", name)
            return before["report"]
        logger.info("%s: started", name)
        record.parent.mkdir(parents=True, exist_ok=True)
        # Said before anything is made: what a killed stage leaves belongs to these inputs, and is gone on with.
        write_json(record, {"inputs": inputs, "report": None})
        start = time.monotonic()
        report = asdict(work())
        seconds = time.monotonic() - start
        write_json(record, {"inputs": inputs, "report": report, "wall_seconds": seconds})
        logger.info("%s: done in %.0f s", name, seconds)
        return report

    def forget(self, name: str) -> None:
        """Have a stage done again next time."""
        (self.run_dir / "stages" / f"{name}.json").unlink(missing_ok=True)

    def _clear(self, name: str) -> None:
        """Delete what a stage has made of other inputs."""
        for folder in _MADE.get(name, ()):
            if (self.run_dir / folder).exists():
                shutil.rmtree(self.run_dir / folder)


def _deciding(recipe: Recipe, section: str) -> dict[str, Any] | None:
    """The fields of a section that decide a result: a run may go on elsewhere without doing finished work again."""
    config = getattr(recipe, section)
    if config is None:
        return None
    fields = {name: value for name, value in to_tree(config).items() if name not in PLACING.get(section, ())}
    if section == "target":
        placing = PLACEMENT | DIFFUSION_PLACEMENT
        fields["engine"] = {name: value for name, value in recipe.target.engine.items() if name not in placing}
    return fields


def run(recipe: Recipe, run_dir: Path, *, fresh: bool = False) -> dict[str, Any]:
    """Run all stages and write `<run_dir>/report.json`; the report.

    Raises:
        UserError: from any stage, or a pairing that fails the gate.
        FaultError: from any stage.
    """
    start = time.monotonic()
    for prompts in (recipe.prompts, recipe.evaluate.new_items, recipe.evaluate.new_templates):
        check_source(prompts)
    if recipe.generate.decoder is None:
        check_engine_options(recipe.target.engine)
    if recipe.student is not None and recipe.generate.verifier is None:
        raise ConfigError("a student is evaluated by one; name it, as in `verifier: number`", field="generate.verifier")
    if fresh:
        for record in (run_dir / "stages").glob("*.json"):
            record.unlink()
    connect(num_cpus=cpus(recipe), num_gpus=gpus(recipe))
    line = Line(recipe, run_dir)
    if recipe.student is not None:
        report = student_summary(_student_stages(line, fresh)) | {"seconds": time.monotonic() - start}
        write_json(run_dir / "report.json", report)
        return report
    from pipelines.gate_report import GateReport, check

    stages = _pairing_stages(line, fresh)
    report = summary(stages) | {"seconds": time.monotonic() - start}
    write_json(run_dir / "report.json", report)
    try:
        check(GateReport(**stages["gate"]))
    except UserError:
        # What was wrong may lie outside the recipe: a failed gate is asked again.
        line.forget("gate")
        raise
    return report


def _pairing_stages(line: Line, fresh: bool) -> dict[str, dict[str, Any]]:
    from pipelines.gate import gate

    recipe, run_dir = line.recipe, line.run_dir
    stages = _common_stages(line, fresh)
    stages["gate"] = line.stage("gate", lambda: gate(recipe, run_dir, Path(stages["publish"]["path"])))
    return stages


def _student_stages(line: Line, fresh: bool) -> dict[str, dict[str, Any]]:
    from pipelines.adapt import adapt

    recipe, run_dir = line.recipe, line.run_dir
    stages = {}
    if recipe.adapt is not None and recipe.student is not None and recipe.student.teacher is None:
        stages["adapt"] = line.stage("adapt", lambda: adapt(recipe, run_dir, fresh=fresh))
    return stages | _common_stages(line, fresh)


def _common_stages(line: Line, fresh: bool) -> dict[str, dict[str, Any]]:
    from pipelines.distill import distill
    from pipelines.evaluate import evaluate
    from pipelines.generate import generate
    from pipelines.publish import publish

    recipe, run_dir = line.recipe, line.run_dir
    return {
        "generate": line.stage("generate", lambda: generate(recipe, run_dir, fresh=fresh)),
        "distill": line.stage("distill", lambda: distill(recipe, run_dir, fresh=fresh)),
        "evaluate": line.stage("evaluate", lambda: evaluate(recipe, run_dir)),
        "publish": line.stage("publish", lambda: publish(recipe, run_dir)),
    }


def student_summary(stages: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The figures of a student's run that people and scripts look at first."""
    figures = ("accuracy", "nfe", "tpf", "tokens_per_second")
    trained = {name: stages[name] for name in ("adapt", "distill") if name in stages}
    return {
        **{n: {k: r[k] for k in ("steps", "loss_first", "loss_last", "seconds")} for n, r in trained.items()},
        "generate": {name: stages["generate"][name] for name in ("rows", "quarantined", "tokens_per_second")},
        "evaluate": {
            f"{row['set']}.{row['checkpoint']}.{row['decoder']['name']}.{name}": row[name]
            for row in stages["evaluate"]["rows"]
            for name in figures
        }
        | {f"aup.{name}": value for name, value in stages["evaluate"]["aup"].items()},
        "publish": stages["publish"],
    }


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
    serve, evaluate = recipe.serve, recipe.evaluate
    return max(
        recipe.generate.min_actors * recipe.generate.cpus_per_actor,
        *(training.num_workers * training.cpus_per_worker + 1 for training in _trainings(recipe)),
        evaluate.num_workers * evaluate.cpus_per_worker,
        serve.target_replicas * serve.target_cpus + serve.draft_replicas * serve.draft_cpus,
    )


def gpus(recipe: Recipe) -> float:
    """GPUs that the hungriest stage asks for at the same time."""
    serve = recipe.serve
    return max(
        recipe.generate.min_actors * recipe.generate.gpus_per_actor,
        *(training.num_workers if training.use_gpu else 0 for training in _trainings(recipe)),
        recipe.evaluate.num_workers if recipe.evaluate.use_gpu else 0,
        serve.target_replicas * serve.target_gpus + serve.draft_replicas * serve.draft_gpus,
    )


def _trainings(recipe: Recipe) -> list[DistillConfig | TrainingConfig]:
    if recipe.student is None:
        return [recipe.distill]
    return [recipe.student] if recipe.adapt is None else [recipe.adapt, recipe.student]


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


def main(invocation: Invocation) -> str:
    """Run the line; the table to print."""
    recipe = invocation.recipe
    report = run(recipe, Path(recipe.run_dir), fresh=invocation.fresh)
    return f"{table(report)}\nreport in {Path(recipe.run_dir) / 'report.json'}"


if __name__ == "__main__":
    sys.exit(run_pipeline(main, description=(__doc__ or "").splitlines()[0], plan=placement))
