"""The gate before a roll-out: `python -m pipelines.gate recipe.yaml serve.draft=DIRECTORY`.

The published pairing is served for a moment and asked, over HTTP, the prompts that `evaluate` decoded with the plain
loop. Text must be identical and the acceptance length within 3 %: a draft that trains well and serves badly (shifted
layer ids, another chat template, RoPE layout, prefix caching) shows here. Then the draft is killed under traffic.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from actors.cluster import connect
from pipelines.cli import Invocation, run_pipeline
from unmask.config import Recipe
from unmask.errors import UserError
from unmask.evaluation.metrics import acceptance_length
from unmask.prompt_rows import prompt_rows
from unmask.targets import resolve_target

TOLERANCE = 0.03
CONCURRENCY = 4
_SETS = ("new_items", "new_templates")


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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Question:
    messages: list[dict[str, str]]
    answer: str


def gate(recipe: Recipe, run_dir: Path, draft: Path) -> GateReport:
    """Serve a published draft and compare it with its evaluation.

    Raises:
        UserError: no evaluation there, or a pairing that fails the gate (named: text or acceptance length).
    """
    questions, evaluated = _questions(recipe, run_dir)
    serve = recipe.serve
    connect(
        num_cpus=serve.target_replicas * serve.target_cpus + serve.draft_replicas * serve.draft_cpus,
        num_gpus=serve.target_replicas * serve.target_gpus + serve.draft_replicas * serve.draft_gpus,
    )
    from serve_app.handle import serve_pairing

    # The acceptance length is compared at the K that was evaluated.
    handle = serve_pairing(replace(recipe, serve=replace(serve, draft=str(draft), adaptive_k=False)))
    try:
        client = _Client(handle.url, serve.name, recipe.evaluate.max_new_tokens)
        _wait(lambda: _stat(handle, "unmask_speculation_enabled") == 1, 60)
        before = _counters(handle)
        start = time.monotonic()
        answers = client.ask(questions)
        seconds = time.monotonic() - start
        time.sleep(2.5)  # replicas report once a second
        drafts, accepted, tokens = (after - first for first, after in zip(before, _counters(handle), strict=True))
        target_pid, draft_pid = handle.target_pids()[0], handle.draft_pids()[0]
        killed = _ask_and_kill(client, questions, draft_pid)
        returned = _wait(lambda: draft_pid not in handle.draft_pids() and _speculates(handle, client, questions), 90)
    finally:
        handle.shutdown()
    report = GateReport(
        requests=len(questions),
        identical=_identical(questions, answers),
        acceptance_length=1 + accepted / max(drafts, 1),
        acceptance_length_evaluated=evaluated,
        target_pid=target_pid,
        draft_pid=draft_pid,
        draft_killed_requests=len(questions),
        draft_killed_identical=_identical(questions, killed),
        draft_returned=returned,
        tokens_per_second=tokens / seconds,
    )
    return report


def check(report: GateReport) -> None:
    """Refuse the roll-out of a pairing that does not serve what was evaluated. Raises UserError."""
    if report.identical < report.requests or report.draft_killed_identical < report.draft_killed_requests:
        raise UserError(
            f"served text differs from the target's own in {report.requests - report.identical} of {report.requests} "
            f"requests, {report.draft_killed_requests - report.draft_killed_identical} with the draft killed; "
            "is the service in another precision than float32, or the target another one?",
            field="gate.identical",
        )
    difference = abs(report.acceptance_length / report.acceptance_length_evaluated - 1)
    if difference > TOLERANCE:
        raise UserError(
            f"served {report.acceptance_length:.3f}, evaluated {report.acceptance_length_evaluated:.3f} "
            f"({difference:.1%} apart, {TOLERANCE:.0%} allowed); likely causes: layer ids off by one, another chat "
            "template, another RoPE layout, prefix caching",
            field="gate.acceptance_length",
        )


class _Client:
    """Chat completions, a few at a time."""

    def __init__(self, url: str, model: str, max_tokens: int) -> None:
        import httpx

        self.http = httpx.Client(base_url=url, timeout=600)
        self.body = {"model": model, "temperature": 0, "max_tokens": max_tokens}

    def ask_one(self, question: _Question) -> str:
        response = self.http.post("/v1/chat/completions", json=self.body | {"messages": question.messages})
        response.raise_for_status()
        return response.json()["choices"][0]["message"]["content"]

    def ask(self, questions: list[_Question]) -> list[str]:
        with ThreadPoolExecutor(CONCURRENCY) as pool:
            return list(pool.map(self.ask_one, questions))


def _ask_and_kill(client: _Client, questions: list[_Question], draft_pid: int) -> list[str]:
    """All questions again; the draft is killed when the first answer is there, so that others are in mid-stream."""
    with ThreadPoolExecutor(CONCURRENCY) as pool:
        pending = [pool.submit(client.ask_one, question) for question in questions]
        pending[0].result()
        os.kill(draft_pid, signal.SIGKILL)
        return [future.result() for future in pending]


def _speculates(handle: Any, client: _Client, questions: list[_Question]) -> bool:
    """Whether a request makes the drafts counter move: the returned draft is used again."""
    before = _counters(handle)[0]
    client.ask(questions[:1])
    time.sleep(2.5)
    return _counters(handle)[0] > before


def _questions(recipe: Recipe, run_dir: Path) -> tuple[list[_Question], float]:
    """The evaluated prompts as chat messages with the target's own answers, and their acceptance length."""
    from transformers import AutoTokenizer

    path = run_dir / "evaluation" / "outcomes.json"
    if not path.is_file():
        raise UserError(f"'{path}' is missing; run `python -m pipelines.evaluate` first", field="run_dir")
    outcomes = json.loads(path.read_text())
    tokenizer: Any = AutoTokenizer.from_pretrained(resolve_target(recipe.target.model, recipe.target.revision))
    questions, accepted = [], []
    for name in (name for name in _SETS if name in outcomes):
        config = getattr(recipe.evaluate, name)
        for row, outcome in zip(islice(prompt_rows(config), len(outcomes[name])), outcomes[name], strict=True):
            value = row.values[config.field]
            system = [{"role": "system", "content": config.system}] if config.system else []
            messages = value if isinstance(value, list) else [*system, {"role": "user", "content": value}]
            answer = tokenizer.decode(outcome["response_ids"], skip_special_tokens=True)
            questions.append(_Question(messages=messages, answer=answer))
            accepted.extend(outcome["accepted"])
    return questions, acceptance_length(accepted)


def _identical(questions: list[_Question], answers: list[str]) -> int:
    return sum(question.answer == answer for question, answer in zip(questions, answers, strict=True))


def _stat(handle: Any, name: str) -> float:
    return sum(report.stats.get(name, 0) for report in handle.reports() if report.role == "target")


def _counters(handle: Any) -> tuple[float, float, float]:
    names = ("spec_decode_num_drafts", "spec_decode_num_accepted_tokens", "generation_tokens")
    drafts, accepted, tokens = (_stat(handle, f"vllm:{name}_total") for name in names)
    return drafts, accepted, tokens


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
