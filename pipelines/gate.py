"""The gate before a roll-out: `python -m pipelines.gate recipe.yaml serve.draft=DIRECTORY`.

The published pairing is served for a moment and asked, over HTTP, the prompts that `evaluate` decoded with the plain
loop. The acceptance length must be within 3 %, and in float32 text must be identical: a draft that trains well and
serves badly shows here, and `unmask.evaluation.diagnosis` names the likely cause. Then the draft is killed under
traffic.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from actors.cluster import FaultError, connect
from pipelines.chat_client import ChatClient, Messages, messages_of
from pipelines.cli import Invocation, run_pipeline
from unmask.capture import ACCEPTED, CACHED, read_captured
from unmask.config import Recipe
from unmask.errors import UserError
from unmask.evaluation.diagnosis import TOLERANCE, Evaluated, Served, accepted_with_shift, likely_cause
from unmask.evaluation.metrics import acceptance_length
from unmask.prompt_rows import prompt_rows
from unmask.targets import resolve_target

CONCURRENCY = 4
_REPLAYED = 8
"""Prompts that are decoded again to see whether layer ids are shifted."""
_SETS = ("new_items", "new_templates")
_DRAFTS = "vllm:spec_decode_num_drafts_total"


@dataclass(frozen=True, slots=True, kw_only=True)
class GateReport:
    """What the served pairing did. `acceptance_length_evaluated` is the plain loop's on the same prompts."""

    requests: int
    identical: int
    acceptance_length: float
    acceptance_length_evaluated: float
    target_pid: int
    draft_pid: int
    draft_killed_requests: int
    draft_killed_identical: int
    draft_returned: bool
    tokens_per_second: float
    exact: bool = True
    """Whether text must be identical: rounding decides near ties in another precision than float32."""
    cause: str = ""
    """Likely cause of another acceptance length or of other prompts than evaluated; empty where there are none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Question:
    messages: Messages
    answer: str
    evaluated: Evaluated


def gate(recipe: Recipe, run_dir: Path, draft: Path) -> GateReport:
    """Serve a published draft and compare it with its evaluation.

    Raises:
        UserError: no evaluation there, or a draft for another target, tokenizer or chat template (named).
        FaultError: the service did not do its work.
    """
    questions = _questions(recipe, run_dir)
    evaluated = acceptance_length([count for question in questions for count in question.evaluated.accepted])
    serve = recipe.serve
    connect(
        num_cpus=serve.target_replicas * serve.target_cpus + serve.draft_replicas * serve.draft_cpus,
        num_gpus=serve.target_replicas * serve.target_gpus + serve.draft_replicas * serve.draft_gpus,
    )
    from serve_app.handle import serve_pairing

    seen = run_dir / "gate"
    shutil.rmtree(seen, ignore_errors=True)
    # The acceptance length is compared at the K that was evaluated.
    options = replace(serve, draft=str(draft), adaptive_k=False, capture=str(seen), capture_flush_s=0.5)
    handle = serve_pairing(replace(recipe, serve=options))
    try:
        client = ChatClient(
            handle.url,
            clients=CONCURRENCY,
            model=serve.name,
            temperature=0,
            max_tokens=recipe.evaluate.max_new_tokens,
        )
        _wait(lambda: _stat(handle, "unmask_speculation_enabled") == 1, 60)
        start = time.monotonic()
        answers = client.answers([question.messages for question in questions])
        seconds = time.monotonic() - start
        served, tokens = _captured(handle, seen, len(questions))
        target_pid, draft_pid = handle.target_pids()[0], handle.draft_pids()[0]
        killed = _ask_and_kill(client, questions, draft_pid)
        returned = _wait(lambda: draft_pid not in handle.draft_pids() and _speculates(handle, client, questions), 90)
    finally:
        handle.shutdown()
    report = GateReport(
        requests=len(questions),
        identical=_identical(questions, answers),
        acceptance_length=acceptance_length([count for one in served for count in one.accepted]),
        acceptance_length_evaluated=evaluated,
        target_pid=target_pid,
        draft_pid=draft_pid,
        draft_killed_requests=len(questions),
        draft_killed_identical=_identical(questions, killed),
        draft_returned=returned,
        tokens_per_second=tokens / seconds,
        exact=recipe.serve.dtype == "float32",
    )
    same_prompts = all(one.prompt_ids in [q.evaluated.prompt_ids for q in questions] for one in served)
    if same_prompts and _difference(report) <= TOLERANCE:
        return report
    return replace(report, cause=_cause(recipe, draft, [question.evaluated for question in questions], served))


def check(report: GateReport) -> None:
    """Refuse the roll-out of a pairing that does not serve what was evaluated. Raises UserError."""
    if report.cause:
        raise UserError(
            f"served {report.acceptance_length:.3f}, evaluated {report.acceptance_length_evaluated:.3f} "
            f"({_difference(report):.1%} apart, {TOLERANCE:.0%} allowed); likely cause: {report.cause}",
            field="gate.acceptance_length",
        )
    differing = report.requests - report.identical + report.draft_killed_requests - report.draft_killed_identical
    if report.exact and differing:
        raise UserError(
            f"served text differs from the target's own in {report.requests - report.identical} of {report.requests} "
            f"requests, {report.draft_killed_requests - report.draft_killed_identical} with the draft killed; "
            "is the target another one?",
            field="gate.identical",
        )


def _difference(report: GateReport) -> float:
    return abs(report.acceptance_length / report.acceptance_length_evaluated - 1)


def _cause(recipe: Recipe, draft_path: Path, evaluated: list[Evaluated], served: list[Served]) -> str:
    """The diagnosis, with a few prompts decoded again from shifted layers."""
    import torch
    from transformers import AutoTokenizer

    from actors.evaluator import eos_ids
    from unmask.checkpoints import load_draft
    from unmask.models.target import TargetModel

    path = resolve_target(recipe.target.model, recipe.target.revision)
    tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True)
    draft = load_draft(draft_path)
    layers = draft.config.target_layer_ids
    target = TargetModel.load(path, layers, torch.float32)
    shifted = {
        shift: accepted_with_shift(
            target,
            draft,
            [one.prompt_ids for one in evaluated[:_REPLAYED]],
            shift,
            num_speculative_tokens=recipe.evaluate.num_speculative_tokens or draft.config.block_size - 1,
            max_new_tokens=recipe.evaluate.max_new_tokens,
            eos_ids=eos_ids(str(path)),
        )
        for shift in (0, 1, -1)
        if min(layers) + shift >= 0 and max(layers) + shift < len(target.blocks)
    }
    return likely_cause(evaluated, served, decode=tokenizer.decode, shifted=shifted)


def _captured(handle: Any, directory: Path, count: int) -> tuple[list[Served], int]:
    """What the engine saw of the first requests, and their response tokens. Raises FaultError."""
    if not _wait(lambda: _stat(handle, "unmask_captured_requests_total") >= count, 60):
        raise FaultError(f"the service did not write what it was asked into '{directory}'; its logs say why")
    rows = list(read_captured(directory))
    served = [
        Served(prompt_ids=row.prompt_ids, accepted=row.meta[ACCEPTED], cached_tokens=row.meta[CACHED]) for row in rows
    ]
    return served, sum(len(row.response_ids) for row in rows)


def _ask_and_kill(client: ChatClient, questions: list[_Question], draft_pid: int) -> list[str]:
    """All questions again; the draft is killed when the first answer is there, so that others are in mid-stream."""
    with ThreadPoolExecutor(CONCURRENCY) as pool:
        pending = [pool.submit(client.answer, question.messages) for question in questions]
        pending[0].result()
        os.kill(draft_pid, signal.SIGKILL)
        return [future.result() for future in pending]


def _speculates(handle: Any, client: ChatClient, questions: list[_Question]) -> bool:
    """Whether a request makes the drafts counter move: the returned draft is used again."""
    before = _stat(handle, _DRAFTS)
    client.answer(questions[0].messages)
    time.sleep(2.5)  # replicas report once a second
    return _stat(handle, _DRAFTS) > before


def _questions(recipe: Recipe, run_dir: Path) -> list[_Question]:
    """The evaluated prompts as chat messages, with the target's own answers and what was accepted of the draft."""
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
            questions.append(_Question(messages=messages, answer=answer, evaluated=evaluated))
    return questions


def _identical(questions: list[_Question], answers: list[str]) -> int:
    return sum(question.answer == answer for question, answer in zip(questions, answers, strict=True))


def _stat(handle: Any, name: str) -> float:
    return sum(report.stats.get(name, 0) for report in handle.reports() if report.role == "target")


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
    sys.exit(run_pipeline(main, description=(__doc__ or "").splitlines()[0]))
