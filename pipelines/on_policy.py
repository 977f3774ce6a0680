"""Distillation on what the served pairing does: `python -m pipelines.on_policy recipe.yaml [section.field=value ...]`.

Generate, distil, evaluate and publish a first draft (of `draft.go_on_from`, if that is given, which is served until
then); then rounds of: swap the draft into the running service, capture its requests, distil it further on them with
blocks that begin where drafts were rejected, evaluate and publish. The last draft is swapped in and measured too.
"""

from __future__ import annotations

import http
import itertools
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from actors.cluster import FaultError, connect
from pipelines.chat_client import ChatClient, Messages, messages_of
from pipelines.cli import Invocation, run_pipeline
from pipelines.gate import Question, compare, explained, is_served_as_evaluated, questions_of
from pipelines.gate_report import check
from pipelines.placement import placement
from pipelines.run import Line, cpus, gpus
from unmask.capture import ACCEPTED, REJECTED, captured, collect, read_captured
from unmask.config import OnPolicyConfig, Recipe
from unmask.errors import ConfigError
from unmask.evaluation.metrics import acceptance_length
from unmask.files import write_json
from unmask.prompt_rows import check_source, prompt_rows
from unmask.trajectories import read_trajectories, row_seed

if TYPE_CHECKING:
    from serve_app.handle import ServeHandle

logger = logging.getLogger(__name__)

_OUTCOMES = ("unmask_captured_requests_total", "unmask_capture_dropped_total", "unmask_capture_failures_total")
_WRITTEN_WITHIN_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureReport:
    """What was captured of a draft while it was served."""

    requests: int
    refused: int
    """Prompts that the service refused, such as too long ones."""
    rejections: int
    """Blocks that were not accepted whole."""
    acceptance_length: float
    """Of the round's prompts, at `generate.temperature`."""
    acceptance_length_held_out: float
    """Of the prompts that every draft is evaluated with, at `generate.temperature` with the same seeds for each."""


def on_policy(recipe: Recipe, run_dir: Path, *, fresh: bool = False) -> list[dict[str, Any]]:
    """Run all rounds and write `<run_dir>/on_policy.json`: an entry for each draft, in order.

    Raises:
        UserError: from any stage.
        FaultError: from any stage, or requests that the service did not answer or keep.
    """
    if recipe.student is not None:
        raise ConfigError("only drafts are trained on policy; remove the section", field="student")
    check_source(recipe.prompts)
    connect(num_cpus=cpus(recipe) + _serving(recipe, "cpus"), num_gpus=gpus(recipe) + _serving(recipe, "gpus"))
    if fresh:
        for record in run_dir.glob("**/stages/*.json"):
            record.unlink()
    rounds = (recipe.on_policy or OnPolicyConfig()).rounds
    line = Line(recipe, run_dir)
    _generate(line, fresh)
    drafts = [_train(line, fresh)]
    with _Service(recipe, run_dir / "captured") as service:
        for number in range(1, rounds + 2):
            evaluated_in, line = line.run_dir, _next_line(line, run_dir, number)
            published = Path(drafts[-1]["path"])
            work = partial(service.capture, published, evaluated_in, line.run_dir, number)
            drafts[-1] |= {"served": line.stage("capture", work)}
            if number <= rounds:
                drafts.append(_train(line, fresh))
    write_json(run_dir / "on_policy.json", drafts)
    return drafts


def _generate(line: Line, fresh: bool) -> None:
    from pipelines.generate import generate

    line.stage("generate", lambda: generate(line.recipe, line.run_dir, fresh=fresh))


def _train(line: Line, fresh: bool) -> dict[str, Any]:
    """A draft from the line's trajectories, evaluated and published; its figures."""
    from pipelines.distill import distill
    from pipelines.evaluate import evaluate
    from pipelines.publish import publish

    recipe, run_dir = line.recipe, line.run_dir
    trained = line.stage("distill", lambda: distill(recipe, run_dir, fresh=fresh))
    evaluated = line.stage("evaluate", lambda: evaluate(recipe, run_dir))
    published = line.stage("publish", lambda: publish(recipe, run_dir))
    return {
        **published,
        **{name: trained[name] for name in ("sequences", "steps", "loss_last")},
        "evaluated": {name: of_set["acceptance_length"] for name, of_set in evaluated["sets"].items()},
    }


def _next_line(before: Line, run_dir: Path, number: int) -> Line:
    """The run of a round: its trajectories are captured ones, and its draft goes on from the one before."""
    recipe, folder = before.recipe, run_dir / f"round-{number}"
    recipe = replace(
        recipe,
        run_dir=str(folder),
        generate=replace(recipe.generate, verifier=None),
        draft=replace(recipe.draft, go_on_from=str(before.run_dir / "draft" / "final")),
        publish=replace(recipe.publish, directory=recipe.publish.directory or str(run_dir / "published")),
    )
    return Line(recipe, folder, before.upstream)


class _Service:
    """The running pairing, started when it is first needed."""

    def __init__(self, recipe: Recipe, captured_in: Path) -> None:
        self.recipe, self.root = recipe, captured_in
        self.settings = recipe.on_policy or OnPolicyConfig()
        self.handle: ServeHandle | None = None
        self.draft = ""

    def __enter__(self) -> _Service:
        return self

    def __exit__(self, *_: object) -> None:
        if self.handle is not None:
            self.handle.shutdown()

    def capture(self, draft: Path, evaluated_in: Path, run_dir: Path, number: int) -> CaptureReport:
        """Serve a draft, let it through the gate, ask a round's prompts, and make `<run_dir>/trajectories` of them.

        Raises:
            UserError: the draft does not serve what was evaluated in `evaluated_in`; the service is ended.
            FaultError: the service did not answer, or did not write what it was asked.
        """
        questions, num_tokens = questions_of(self.recipe, evaluated_in)
        handle = self._serving(draft, num_tokens)
        self._gate(handle, draft, questions)
        held_out = [question.messages for question in questions]
        before, _ = self._written(handle, partial(self._ask, handle.url, enumerate(held_out), 0))
        accepted = [count for row in read_captured(self.root, without=before) for count in row.meta[ACCEPTED]]
        before, refused = self._written(handle, partial(self._ask, handle.url, self._prompts(number), number))
        collect(self.root, run_dir, without=before)
        meta = [row.meta for row in read_trajectories(run_dir)]
        return CaptureReport(
            requests=len(meta),
            refused=refused,
            rejections=sum(len(one[REJECTED]) for one in meta),
            acceptance_length=acceptance_length([count for one in meta for count in one[ACCEPTED]]),
            acceptance_length_held_out=acceptance_length(accepted),
        )

    def _gate(self, handle: ServeHandle, draft: Path, questions: list[Question]) -> None:
        report, served = compare(self.recipe, handle, questions, self.root)
        if not is_served_as_evaluated(report, questions, served):
            handle.shutdown()
            self.handle = None
            report = explained(report, self.recipe, draft, questions, served)
        check(report)

    def _written(self, handle: ServeHandle, ask: Callable[[], tuple[int, int]]) -> tuple[frozenset[Path], int]:
        """Ask, and wait until it is written: the shards that were there before, and the requests that were refused."""
        before, kept = frozenset(captured(self.root)), _kept(handle)
        asked, refused = ask()
        end = time.monotonic() + _WRITTEN_WITHIN_S
        while _kept(handle) - kept < asked - refused:
            if time.monotonic() > end:
                raise FaultError(f"the service did not write its requests into '{self.root}'; its logs say why")
            time.sleep(0.5)
        return before, refused

    def _serving(self, draft: Path, num_tokens: int) -> ServeHandle:
        """The service with a draft live: started with the first one there is, and swapped from then on."""
        from serve_app.handle import serve_pairing

        if self.handle is None:
            first = self.recipe.draft.go_on_from or str(draft)
            # Whole blocks, so that it is seen where each is rejected, and as many as are evaluated.
            options = replace(
                self.recipe.serve,
                draft=first,
                num_speculative_tokens=num_tokens,
                adaptive_k=False,
                capture=str(self.root),
                capture_flush_s=1.0,
            )
            self.handle, self.draft = serve_pairing(replace(self.recipe, serve=options)), first
        if self.draft != str(draft):
            self.handle.swap_draft(draft)
            self.draft = str(draft)
            logger.info("'%s' is live", draft.name)
        return self.handle

    def _prompts(self, number: int) -> Iterator[tuple[int, Messages]]:
        """The chats of a round, by their number in it."""
        count = self.settings.requests
        rows = itertools.cycle(row for row in prompt_rows(self.recipe.prompts) if row.error is None)
        chosen = itertools.islice(rows, (number - 1) * count, number * count)
        return enumerate(messages_of(row.values, self.recipe.prompts) for row in chosen)

    def _ask(self, url: str, chats: Iterable[tuple[int, Messages]], number: int) -> tuple[int, int]:
        """How many chats were sent, each with a seed of its own and the round's, and how many of them refused."""
        generate = self.recipe.generate
        client = ChatClient(
            url, clients=self.settings.clients, model=self.recipe.serve.name, max_tokens=generate.max_new_tokens,
            temperature=generate.temperature, top_p=generate.top_p,
        )  # fmt: skip

        def ask(index: int, messages: Messages) -> bool:
            """Whether the request was taken."""
            try:
                client.answer(messages, seed=row_seed(generate.seed, index, number) % 2**31)
            except httpx.HTTPStatusError as error:
                if error.response.status_code == http.HTTPStatus.BAD_REQUEST:
                    return False
                raise FaultError(f"the service answered {error.response.status_code}") from None
            except httpx.HTTPError as error:
                raise FaultError(f"the service did not answer: {type(error).__name__}") from None
            return True

        with ThreadPoolExecutor(self.settings.clients) as pool:
            asked = [pool.submit(ask, index, messages) for index, messages in chats]
            taken = [future.result() for future in asked]
        return len(taken), taken.count(False)


def _kept(handle: ServeHandle) -> float:
    """Requests that target replicas have dealt with, kept or not."""
    reports = handle.reports("target")
    return sum(report.stats.get(name, 0) for report in reports for name in _OUTCOMES)


def _serving(recipe: Recipe, kind: str) -> float:
    """CPUs or GPUs that the service holds beside the training."""
    serve = recipe.serve
    of_target, of_draft = getattr(serve, f"target_{kind}"), getattr(serve, f"draft_{kind}")
    return serve.target_replicas * of_target + serve.draft_replicas * of_draft


def plan(recipe: Recipe) -> str:
    """What `--plan` says of the rounds."""
    return placement(recipe) + "# from the first round on the service runs beside distill and evaluate\n"


def _line(draft: dict[str, Any], temperature: float) -> str:
    served = draft["served"]
    evaluated = ", ".join(f"{value:.3f} on {name}" for name, value in draft["evaluated"].items())
    return (
        f"{Path(draft['path']).name}: {draft['sequences']} sequences, {draft['steps']} steps, "
        f"loss {draft['loss_last']:.3f}; acceptance length {evaluated} (T = 0), "
        f"{served['acceptance_length_held_out']:.3f} served (T = {temperature:g}); "
        f"captured: {served['requests']} requests, {served['rejections']} rejected blocks"
    )


def main(invocation: Invocation) -> str:
    """Run the rounds; the lines to print."""
    recipe = invocation.recipe
    drafts = on_policy(recipe, Path(recipe.run_dir), fresh=invocation.fresh)
    lines = [_line(draft, recipe.generate.temperature) for draft in drafts]
    return "\n".join([*lines, f"report in {Path(recipe.run_dir) / 'on_policy.json'}"])


if __name__ == "__main__":
    sys.exit(run_pipeline(main, description=(__doc__ or "").splitlines()[0], plan=plan))
