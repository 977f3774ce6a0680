"""What `pipelines.evaluate` does with a student: decoders and verdicts on held-out prompts, beside the teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from actors.cluster import connect, explain
from actors.placement import require_room
from unmask.config import Recipe, StudentConfig
from unmask.config.generate import DEFAULT_BLOCK
from unmask.errors import CheckpointError, ConfigError
from unmask.files import write_json
from unmask.placement import stage_demands
from unmask.targets import resolve_target
from unmask.teachers import with_teacher
from unmask.types import Prompt

_SHOWN_COLUMNS = 256
"""Response columns that the commit-order plot shows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentReport:
    """A finished evaluation: one row for each set, checkpoint and decoder; AUP by checkpoint; where the files are."""

    rows: list[dict[str, Any]]
    aup: dict[str, float]
    report: str
    plots: list[str]


@dataclass(frozen=True, slots=True)
class Setting:
    """One line of the table."""

    checkpoint: str
    decoder: dict[str, Any]

    @property
    def label(self) -> str:
        """For plots."""
        return f"{self.checkpoint}: {self.decoder['name']}"


def settings(recipe: Recipe, student: StudentConfig) -> list[Setting]:
    """The teacher one token a forward and by threshold; the student by `evaluate.decoders`, or by its own decoder."""
    block = {"block_size": student.block_size or DEFAULT_BLOCK}
    own = recipe.evaluate.decoders or ({"name": student.objective, **block},)
    teacher = ({"name": "one_token", **block}, {"name": "threshold", "threshold": 0.9, **block})
    return [Setting("teacher", knobs) for knobs in teacher] + [Setting("student", dict(knobs)) for knobs in own]


def evaluate_student(recipe: Recipe, run_dir: Path, sets: dict[str, list[Prompt]]) -> StudentReport:
    """Evaluate `<run_dir>/student/final` beside its teacher into `<run_dir>/evaluation`.

    Args:
        sets: held-out prompts by name.

    Raises:
        UserError: no student, no verifier, a decoder that a network was not made for, or rows without a reference.
        FaultError: a worker died.
    """
    student = recipe.student
    if student is None or recipe.generate.verifier is None:
        raise ConfigError("name one, or there is nothing to measure accuracy by", field="generate.verifier")
    table = settings(recipe, student)
    outcomes = _run(recipe, student, checkpoints(recipe, run_dir), table, sets)
    directory = run_dir / "evaluation"
    directory.mkdir(parents=True, exist_ok=True)
    return _report(table, sets, outcomes, directory)


def checkpoints(recipe: Recipe, run_dir: Path) -> dict[str, str]:
    """Directories of the student and of its teacher. Raises CheckpointError where one is missing."""
    path = run_dir / "student" / "final"
    if not path.is_dir():
        raise CheckpointError(f"no student at '{path}'; run `python -m pipelines.distill` first", field="student")
    target = with_teacher(recipe, run_dir).target
    return {"student": str(path), "teacher": str(resolve_target(target.model, target.revision))}


def _run(
    recipe: Recipe,
    student: StudentConfig,
    paths: dict[str, str],
    table: Sequence[Setting],
    sets: dict[str, list[Prompt]],
) -> dict[tuple[int, str], list[dict[str, Any]]]:
    """What the workers made of each setting (by its number) and set, one share a worker."""
    from engines.diffusion_engine import diffusion_arguments

    config = recipe.evaluate
    gpus = 1 if config.use_gpu else 0
    engine = diffusion_arguments(recipe.target, Path(paths["student"]), {}, dtype=recipe.generate.dtype)["config"]
    connect(num_cpus=config.num_workers * config.cpus_per_worker, num_gpus=config.num_workers * gpus)
    require_room(stage_demands(recipe)["evaluate"])
    import ray

    from actors.diffusion_evaluator import DiffusionEvaluator, DiffusionEvaluatorSpec

    spec = DiffusionEvaluatorSpec(
        checkpoints=paths,
        engine=engine,
        response_length=student.response_length,
        verifier=recipe.generate.verifier or "",
        reference=recipe.generate.reference,
        dtype=recipe.generate.dtype,
        threads=max(1, int(config.cpus_per_worker)),
    )
    actor: Any = ray.remote(num_cpus=config.cpus_per_worker, num_gpus=gpus)(DiffusionEvaluator)
    workers = [actor.options(label_selector=config.labels).remote(spec) for _ in range(config.num_workers)]
    outcomes = {}
    try:
        for number, setting in enumerate(table):
            for name, prompts in sets.items():
                shares = [prompts[rank :: len(workers)] for rank in range(len(workers))]
                outcomes[number, name] = ray.get(
                    [
                        worker.run.remote(
                            setting.checkpoint, setting.decoder, [list(p.ids) for p in share], [p.source for p in share]
                        )
                        for worker, share in zip(workers, shares, strict=True)
                        if share
                    ]
                )
    except ray.exceptions.RayError as error:
        raise explain(error) from error
    finally:
        for worker in workers:
            ray.kill(worker)
    return outcomes


def _report(
    table: Sequence[Setting],
    sets: dict[str, list[Prompt]],
    outcomes: dict[tuple[int, str], list[dict[str, Any]]],
    directory: Path,
) -> StudentReport:
    from unmask.decoding.request import Completion
    from unmask.evaluation.diffusion import accuracy_under_parallelism, commit_order, summarise
    from unmask.evaluation.diffusion_plots import plot_commit_order, plot_speed_accuracy

    rows, points, heats = [], {}, {}
    for (number, name), shares in outcomes.items():
        setting = table[number]
        done = [Completion(**values) for share in shares for values in share["completions"]]
        right = [verdict for share in shares for verdict in share["right"]]
        summary = summarise(done, lambda index, ids, right=right: right[index])
        seconds = max(share["seconds"] for share in shares)
        rate = sum(completion.num_text_tokens for completion in done) / max(seconds, 1e-9)
        rows.append(
            {"set": name, "checkpoint": setting.checkpoint, "decoder": setting.decoder, "tokens_per_second": rate}
            | asdict(summary)
        )
        if name == next(iter(sets)):
            points.setdefault(setting.checkpoint, []).append((summary.tpf, summary.accuracy))
            columns = min(max((len(c.response_ids) for c in done), default=1), _SHOWN_COLUMNS)
            heats[f"{number} {setting.label}"] = commit_order(done, columns)
    best = max(accuracy for of in points.values() for _, accuracy in of)
    aup = {name: accuracy_under_parallelism(of, best) for name, of in points.items()}
    report, plots = directory / "evaluation.json", [directory / "speed_accuracy.png", directory / "commit_order.png"]
    write_json(report, {"rows": rows, "aup": aup})
    plot_speed_accuracy(points, plots[0])
    plot_commit_order(heats, plots[1])
    return StudentReport(rows=rows, aup=aup, report=str(report), plots=[str(plot) for plot in plots])


def table_of(report: StudentReport) -> str:
    """The rows as lines to print."""
    lines = [
        f"{row['set']}: {row['checkpoint']} {row['decoder']['name']}: {row['accuracy']:.1f} % "
        f"[{row['ci95'][0]:.1f}, {row['ci95'][1]:.1f}], {row['nfe']:.1f} forwards, {row['tpf']:.2f} tokens a forward, "
        f"{row['tokens_per_second']:.1f} tokens/s"
        for row in report.rows
    ]
    return "\n".join([*lines, f"report in {report.report}, plots in {' and '.join(report.plots)}"])
