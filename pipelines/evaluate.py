"""A draft or student on held-out prompts: `python -m pipelines.evaluate recipe.yaml [section.field=value ...]`.

A draft: the real speculative loop, greedy in float32; acceptance length and by position, identity with the target's
own text, speed beside target-only decoding, and the n-grams that a draft has to beat. A student: see
`pipelines.student_evaluation`.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.cluster import connect, explain
from actors.placement import require_room
from pipelines.cli import Invocation, run_pipeline
from pipelines.placement import placement
from pipelines.student_evaluation import StudentReport, checkpoints, evaluate_student, table_of
from unmask.config import PromptsConfig, Recipe, StudentConfig
from unmask.errors import CheckpointError, UserError
from unmask.files import write_json
from unmask.placement import stage_demands
from unmask.prompt_rows import check_source
from unmask.prompts import PromptBuilder, RejectedPrompt, stream_prompts
from unmask.targets import describe_target, resolve_target
from unmask.training.training_log import read_log
from unmask.types import Prompt

if TYPE_CHECKING:
    from unmask.evaluation.pairing import PromptOutcome, SetSummary

SETS = ("new_items", "new_templates")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateReport:
    """A finished evaluation: the two held-out sets by name, and where report and plot are."""

    sets: dict[str, SetSummary]
    num_speculative_tokens: int
    report: str
    plot: str


def evaluate(recipe: Recipe, run_dir: Path, draft: Path | None = None) -> EvaluateReport | StudentReport:
    """Evaluate what `distill` made (or another draft) into `<run_dir>/evaluation`.

    Raises:
        UserError: nothing to evaluate, a draft for another target, K above its block size - 1, or prompts that cannot
            be used.
        FaultError: a worker died.
    """
    if recipe.student is not None:
        return _evaluate_student(recipe, recipe.student, run_dir)
    from unmask.checkpoints import check_pairing
    from unmask.evaluation.pairing import summarise
    from unmask.evaluation.plots import plot_pairing

    draft = draft or run_dir / "draft" / "final"
    target_path = resolve_target(recipe.target.model, recipe.target.revision)
    config = check_pairing(draft, describe_target(target_path))
    num_tokens = recipe.evaluate.num_speculative_tokens or config.block_size - 1
    if num_tokens >= config.block_size:
        raise UserError(
            f"K = {num_tokens} exceeds the draft's block size - 1 = {config.block_size - 1}",
            field="evaluate.num_speculative_tokens",
        )
    held_out = _held_out(recipe, target_path, config.mask_token_id, recipe.evaluate.max_new_tokens)
    prompts = {name: [list(prompt.ids) for prompt in chosen] for name, chosen in held_out.items()}
    outcomes = _run(recipe, run_dir, draft, target_path, num_tokens, prompts)
    directory = run_dir / "evaluation"
    directory.mkdir(parents=True, exist_ok=True)
    sets = {name: summarise(of_set, num_tokens) for name, of_set in outcomes.items()}
    report, plot = directory / "evaluation.json", directory / "evaluation.png"
    write_json(report, {"sets": {n: asdict(s) for n, s in sets.items()}, "k": num_tokens, "draft": str(draft)})
    write_json(directory / "outcomes.json", {n: [asdict(o) for o in of_set] for n, of_set in outcomes.items()})
    log = run_dir / "draft" / "log.jsonl"
    plot_pairing(sets, read_log(log.parent) if log.is_file() else [], plot)
    return EvaluateReport(sets=sets, num_speculative_tokens=num_tokens, report=str(report), plot=str(plot))


def _evaluate_student(recipe: Recipe, student: StudentConfig, run_dir: Path) -> StudentReport:
    from unmask.models import families

    path = Path(checkpoints(recipe, run_dir)["student"])
    mask = families.read(path).mask_id
    if mask is None:
        raise CheckpointError(f"'{path}' has no mask token: it is no diffusion LM")
    return evaluate_student(recipe, run_dir, _held_out(recipe, path, mask, student.response_length))


def _held_out(recipe: Recipe, path: Path, mask_token_id: int, response_length: int) -> dict[str, list[Prompt]]:
    """The prompts of each set that has any, tokenised as the checkpoint at `path` reads them."""
    sets = {name: _prompts(recipe, name, path, mask_token_id, response_length) for name in SETS}
    return {name: chosen for name, chosen in sets.items() if chosen}


def _prompts(recipe: Recipe, name: str, path: Path, mask_token_id: int, response_length: int) -> list[Prompt]:
    from transformers import AutoTokenizer

    config: PromptsConfig = getattr(recipe.evaluate, name)
    count = recipe.evaluate.prompts if name == "new_items" else recipe.evaluate.prompts_new_templates
    check_source(config)
    builder = PromptBuilder(
        AutoTokenizer.from_pretrained(path, local_files_only=True),
        config,
        max_prompt_len=recipe.target.max_model_len - response_length,
        mask_token_id=mask_token_id,
    )
    chosen: list[Prompt] = []
    for prompt in itertools.islice(stream_prompts(config, builder), count):
        if isinstance(prompt, RejectedPrompt):
            raise UserError(f"row {prompt.row.index} cannot be used: {prompt.error}", field=f"evaluate.{name}")
        chosen.append(prompt)
    return chosen


def _run(
    recipe: Recipe, run_dir: Path, draft: Path, target_path: Path, num_tokens: int, prompts: dict[str, list[list[int]]]
) -> dict[str, list[PromptOutcome]]:
    config = recipe.evaluate
    gpus = 1 if config.use_gpu else 0
    connect(num_cpus=config.num_workers * config.cpus_per_worker, num_gpus=config.num_workers * gpus)
    require_room(stage_demands(recipe)["evaluate"])
    import ray
    from ray.util import ActorPool

    from actors.evaluator import Evaluator, EvaluatorSpec
    from unmask.evaluation.pairing import PromptOutcome

    spec = EvaluatorSpec(
        target_path=str(target_path),
        draft_path=str(draft),
        run_dir=str(run_dir),
        num_speculative_tokens=num_tokens,
        max_new_tokens=config.max_new_tokens,
        threads=max(1, int(config.cpus_per_worker)),
    )
    actor: Any = ray.remote(num_cpus=config.cpus_per_worker, num_gpus=gpus)(Evaluator)
    actor = actor.options(label_selector=config.labels)
    workers = [actor.remote(spec) for _ in range(config.num_workers)]
    names = [name for name, chosen in prompts.items() for _ in chosen]
    try:
        pool = ActorPool(workers)
        results = list(pool.map(lambda worker, ids: worker.run.remote(ids), [i for c in prompts.values() for i in c]))
    except ray.exceptions.RayError as error:
        raise explain(error) from error
    finally:
        for worker in workers:
            ray.kill(worker)
    outcomes: dict[str, list[PromptOutcome]] = {name: [] for name in prompts}
    for name, result in zip(names, results, strict=True):
        outcomes[name].append(PromptOutcome(**result))
    return outcomes


def main(invocation: Invocation) -> str:
    """Run the stage; the last lines to print."""
    report = evaluate(invocation.recipe, Path(invocation.recipe.run_dir))
    if isinstance(report, StudentReport):
        return table_of(report)
    lines = [
        f"{name}: acceptance length {s.acceptance_length:.2f} [{s.interval95[0]:.2f}, {s.interval95[1]:.2f}] "
        f"(n-grams {s.acceptance_length_ngram:.2f}), identical {s.identical}/{s.prompts}, "
        f"{s.tokens_per_second:.1f} tokens/s (target alone {s.tokens_per_second_target_only:.1f})"
        + (f", confidence off by {s.confidence_error:.3f}" if s.confidence_error is not None else "")
        for name, s in report.sets.items()
    ]
    return "\n".join([*lines, f"report in {report.report}, plot in {report.plot}"])


if __name__ == "__main__":
    sys.exit(
        run_pipeline(
            main, description=(__doc__ or "").splitlines()[0], plan=lambda recipe: placement(recipe, "evaluate")
        )
    )
