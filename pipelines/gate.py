"""The gate before a roll-out: `python -m pipelines.gate recipe.yaml serve.draft=DIRECTORY`.

The published pairing is served for a moment and asked, over HTTP, the prompts that `evaluate` decoded with the plain
loop; where the engine caches prompts, twice. The acceptance length must be within 3 % each time, the draft must have
answered in nearly every step, and in float32 text must be identical: a draft that trains well and serves badly shows
here, and `unmask.evaluation.diagnosis` names the likely cause. Then the draft is killed under traffic, and must come
back.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.cluster import FaultError, connect, explain
from actors.placement import require_room
from pipelines.chat_client import ChatClient, Messages, messages_of
from pipelines.cli import Invocation, run_pipeline
from pipelines.gate_report import RETURN_S, GateReport, acceptance_lengths, check, difference
from pipelines.placement import placement
from unmask.capture import ACCEPTED, CACHED, captured, read_captured
from unmask.config import Recipe
from unmask.errors import UserError
from unmask.evaluation.diagnosis import TOLERANCE, Evaluated, Served, likely_cause
from unmask.placement import stage_demands
from unmask.prompt_rows import prompt_rows
from unmask.targets import resolve_target

if TYPE_CHECKING:
    from serve_app.handle import ServeHandle

CONCURRENCY = 4
_REPLAYED = 8
"""Prompts that are decoded again to see whether layer ids are shifted."""
_SETS = ("new_items", "new_templates")
_REPORT_S = 2.5
"""After which what replicas say of themselves is of now: they report once a second."""
_GREETINGS = 10
_DRAFTS, _CAPTURED = "vllm:spec_decode_num_drafts_total", "unmask_captured_requests_total"


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A prompt that was evaluated, as a chat, and the target's own answer to it."""

    messages: Messages
    answer: str
    evaluated: Evaluated


def gate(recipe: Recipe, run_dir: Path, draft: Path) -> GateReport:
    """Serve a published draft and compare it with its evaluation.

    Raises:
        UserError: no evaluation there, or a draft for another target, tokenizer or chat template (named).
        FaultError: the service did not do its work.
    """
    questions, num_tokens = questions_of(recipe, run_dir)
    serve = recipe.serve
    [diagnosis] = stage_demands(recipe)["evaluate"]
    connect(
        num_cpus=max(
            serve.target_replicas * serve.target_cpus + serve.draft_replicas * serve.draft_cpus,
            diagnosis.resources.get("CPU", 0),
        ),
        num_gpus=serve.target_replicas * serve.target_gpus + serve.draft_replicas * serve.draft_gpus,
    )
    from serve_app.handle import serve_pairing

    seen = run_dir / "gate"
    shutil.rmtree(seen, ignore_errors=True)
    # The acceptance length is compared at the K that was evaluated.
    options = replace(
        serve,
        draft=str(draft),
        num_speculative_tokens=num_tokens,
        adaptive_k=False,
        capture=str(seen),
        capture_flush_s=0.5,
    )
    handle = serve_pairing(replace(recipe, serve=options))
    try:
        report, served = compare(recipe, handle, questions, seen)
        victim, *_ = handle.reports("draft")
        client = _client(recipe, handle)
        killed = _ask_and_kill(client, questions, handle.killer(victim))
        # By its name: on another node, or in another container, its successor may have its process id.
        returned = _wait(
            lambda: (
                victim.replica not in {report.replica for report in handle.reports("draft")}
                and _speculates(handle, client, questions)
            ),
            RETURN_S,
        )
        target_pid, *_ = handle.target_pids()
    finally:
        handle.shutdown()
    report = replace(
        report,
        target_pid=target_pid,
        draft_pid=victim.pids[0],
        draft_killed_requests=len(questions),
        draft_killed_identical=_identical(questions, killed),
        draft_returned=returned,
    )
    return explained(report, recipe, draft, questions, served)


def compare(
    recipe: Recipe, handle: ServeHandle, questions: list[Question], captured_in: Path
) -> tuple[GateReport, list[Served]]:
    """Ask a service what was evaluated; what it did, and every request as its engines saw it.

    The service drafts as many tokens as were evaluated, and captures its requests.

    Raises:
        FaultError: no draft is there, or the requests were not captured.
    """
    if not _wait(lambda: _stat(handle, "unmask_speculation_enabled") >= recipe.serve.target_replicas, 60):
        raise FaultError("the targets found no draft within 60 s; the draft replica's log says why")
    client, messages = _client(recipe, handle), [question.messages for question in questions]
    written, asked = _stat(handle, _CAPTURED), 0
    # A draft that was swapped in is greeted by a target's next step, and what that step told the old one is lost to it.
    while asked <= _GREETINGS * CONCURRENCY and not _greeted(handle):
        asked += len(client.answers(messages[:CONCURRENCY]))
        time.sleep(_REPORT_S)
    _await_written(handle, written + asked, captured_in)
    before = frozenset(captured(captured_in))
    start = time.monotonic()
    answers = client.answers(messages)
    seconds = time.monotonic() - start
    # Caches are filled by the first round and read by the second.
    if recipe.target.engine.get("enable_prefix_caching"):
        answers += client.answers(messages)
    _await_written(handle, written + asked + len(answers), captured_in)
    rows = list(read_captured(captured_in, without=before))
    served = [
        Served(
            prompt_ids=row.prompt_ids,
            accepted=row.meta[ACCEPTED],
            cached_tokens=row.meta[CACHED],
            undrafted=row.num_forwards - 1 - len(row.meta[ACCEPTED]),
        )
        for row in rows
    ]
    length, wanted = acceptance_lengths([question.evaluated for question in questions], served)
    undrafted, rounds = sum(one.undrafted for one in served), len(answers) // len(questions)
    report = GateReport(
        requests=len(answers),
        identical=_identical(questions * rounds, answers),
        acceptance_length=length,
        acceptance_length_evaluated=wanted,
        tokens_per_second=sum(len(row.response_ids) for row in rows) / rounds / seconds,
        undrafted=undrafted / max(1, undrafted + sum(len(one.accepted) for one in served)),
        exact=recipe.serve.dtype == "float32",
    )
    return report, served


def explained(
    report: GateReport, recipe: Recipe, draft: Path, questions: list[Question], served: list[Served]
) -> GateReport:
    """The report with the likely cause, if the service did not do what was evaluated. It needs room on the cluster."""
    if is_served_as_evaluated(report, questions, served):
        return report
    return replace(report, cause=_cause(recipe, draft, [question.evaluated for question in questions], served))


def is_served_as_evaluated(report: GateReport, questions: list[Question], served: list[Served]) -> bool:
    """Whether the same prompts were served, with the same acceptance length up to the tolerance."""
    known = [question.evaluated.prompt_ids for question in questions]
    return all(one.prompt_ids in known for one in served) and difference(report) <= TOLERANCE


def _greeted(handle: ServeHandle) -> bool:
    """Whether every target is linked to a draft of the version that drafts serve."""
    served = {report.stats["unmask_draft_version"] for report in handle.reports("draft")}
    return {report.stats.get("unmask_link_draft_version") for report in handle.reports("target")} == served


def _await_written(handle: ServeHandle, count: float, folder: Path) -> None:
    if not _wait(lambda: _stat(handle, _CAPTURED) >= count, 60):
        raise FaultError(f"the service did not write what it was asked into '{folder}'; its logs say why")


def _client(recipe: Recipe, handle: ServeHandle) -> ChatClient:
    tokens = recipe.evaluate.max_new_tokens
    return ChatClient(handle.url, clients=CONCURRENCY, model=recipe.serve.name, temperature=0, max_tokens=tokens)


def _cause(recipe: Recipe, draft_path: Path, evaluated: list[Evaluated], served: list[Served]) -> str:
    """The diagnosis, with a few prompts decoded again where `evaluate` decoded them: the driver may be a small node."""
    import ray
    from transformers import AutoTokenizer

    from actors.evaluator import accepted_by_shift

    path = resolve_target(recipe.target.model, recipe.target.revision)
    tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True)
    [demand] = stage_demands(recipe)["evaluate"]
    demand = replace(demand, least=1)
    require_room([demand])
    prompts = [one.prompt_ids for one in evaluated[:_REPLAYED]]
    cpus, gpus = demand.resources.get("CPU", 0), demand.resources.get("GPU", 0)
    worker: Any = ray.remote(num_cpus=cpus, num_gpus=gpus)(accepted_by_shift)
    try:
        shifted = ray.get(worker.options(label_selector=dict(demand.labels)).remote(recipe, path, draft_path, prompts))
    except ray.exceptions.RayError as error:
        raise explain(error) from error
    return likely_cause(evaluated, served, decode=tokenizer.decode, shifted=shifted)


def _ask_and_kill(client: ChatClient, questions: list[Question], kill: Callable[[], None]) -> list[str]:
    """All questions again; the draft is killed when the first answer is there, so that others are in mid-stream."""
    with ThreadPoolExecutor(CONCURRENCY) as pool:
        pending = [pool.submit(client.answer, question.messages) for question in questions]
        pending[0].result()
        kill()
        return [future.result() for future in pending]


def _speculates(handle: ServeHandle, client: ChatClient, questions: list[Question]) -> bool:
    """Whether a request makes the drafts counter move: the returned draft is used again."""
    before = _stat(handle, _DRAFTS)
    client.answer(questions[0].messages)
    time.sleep(_REPORT_S)
    return _stat(handle, _DRAFTS) > before


def questions_of(recipe: Recipe, run_dir: Path) -> tuple[list[Question], int]:
    """The evaluated prompts as chat messages, with the target's own answers and what was accepted of the draft; K."""
    from transformers import AutoTokenizer

    path = run_dir / "evaluation" / "outcomes.json"
    if not path.is_file():
        raise UserError(f"'{path}' is missing; run `python -m pipelines.evaluate` first", field="run_dir")
    outcomes = json.loads(path.read_text())
    tokenizer: Any = AutoTokenizer.from_pretrained(resolve_target(recipe.target.model, recipe.target.revision))
    questions = []
    for name in (name for name in _SETS if name in outcomes):
        config = getattr(recipe.evaluate, name)
        for row, outcome in zip(islice(prompt_rows(config), len(outcomes[name])), outcomes[name], strict=True):
            messages = messages_of(row.values, config)
            answer = tokenizer.decode(outcome["response_ids"], skip_special_tokens=True)
            evaluated = Evaluated(
                text=messages[-1]["content"], prompt_ids=outcome["prompt_ids"], accepted=outcome["accepted"]
            )
            questions.append(Question(messages=messages, answer=answer, evaluated=evaluated))
    return questions, json.loads(path.with_name("evaluation.json").read_text())["k"]


def _identical(questions: list[Question], answers: list[str]) -> int:
    return sum(question.answer == answer for question, answer in zip(questions, answers, strict=True))


def _stat(handle: ServeHandle, name: str) -> float:
    return sum(report.stats.get(name, 0) for report in handle.reports("target"))


def _wait(condition: Any, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.5)
    return False


def main(invocation: Invocation) -> str:
    """Run the gate on `serve.draft`; the last line to print."""
    recipe = invocation.recipe
    if recipe.serve.draft is None:
        raise UserError("name the published draft directory", field="serve.draft")
    report = gate(recipe, Path(recipe.run_dir), Path(recipe.serve.draft))
    check(report)
    return (
        f"passed: {report.identical}/{report.requests} identical, acceptance length {report.acceptance_length:.2f} "
        f"served, {report.acceptance_length_evaluated:.2f} evaluated; draft killed: "
        f"{report.draft_killed_identical}/{report.draft_killed_requests} identical"
    )


if __name__ == "__main__":
    sys.exit(
        run_pipeline(
            main,
            description=(__doc__ or "").splitlines()[0],
            plan=lambda recipe: placement(recipe, "serve", "evaluate"),
        )
    )
