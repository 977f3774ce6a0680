"""The in-process engine: one batch for all callers, seeds a row, refusals, closing and dying."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from engines.engine_options import engine_arguments
from engines.offline_engine import Completion, EngineDiedError, OfflineEngine
from unmask.config import EMBEDDED_TARGET, TargetConfig
from unmask.errors import ConfigError, PromptError
from unmask.targets import resolve_target
from unmask.types import SamplingOptions

PROMPT = [1, 4093, 198, 520, 2, 198, 1, 520, 9531, 198]
GREEDY = SamplingOptions(max_tokens=6)


def _arguments(**options: Any) -> dict[str, Any]:
    target = TargetConfig(max_model_len=64, engine={"max_num_seqs": 8, **options})
    return engine_arguments(target, resolve_target(EMBEDDED_TARGET), dtype="float32", on_gpu=False)


@pytest.fixture(scope="module")
def engine() -> Iterator[OfflineEngine]:
    engine = OfflineEngine(_arguments())
    yield engine
    engine.close()


def _answers(engine: OfflineEngine, prompts: list[list[int]], options: list[SamplingOptions]) -> list[Completion]:
    futures = [engine.submit(ids, option) for ids, option in zip(prompts, options, strict=True)]
    return [future.result(timeout=60) for future in futures]


def test_answers_do_not_depend_on_the_batch(engine: OfflineEngine) -> None:
    prompts = [PROMPT[:n] for n in range(2, 10)]
    options = [SamplingOptions(max_tokens=6, temperature=0.9, seed=n) for n in range(8)]
    together = _answers(engine, prompts, options)
    assert together == [_answers(engine, [ids], [option])[0] for ids, option in zip(prompts, options, strict=True)]
    assert len({tuple(answer.token_ids) for answer in _answers(engine, [PROMPT] * 8, options)}) > 1


def test_response_ends_with_the_end_of_text_token_or_at_its_length(engine: OfflineEngine) -> None:
    answers = _answers(engine, [PROMPT] * 2, [GREEDY, SamplingOptions(max_tokens=40)])
    assert (len(answers[0].token_ids), answers[0].finish_reason) == (6, "length")
    assert answers[1].token_ids[:6] == answers[0].token_ids
    assert (answers[1].token_ids[-1] == 2) == (answers[1].finish_reason == "stop")


@pytest.mark.parametrize("ids", [[], [1] * 64, [49152]])
def test_refused_prompts_harm_nobody_else(engine: OfflineEngine, ids: list[int]) -> None:
    bad, good = engine.submit(ids, GREEDY), engine.submit(PROMPT, GREEDY)
    with pytest.raises(PromptError, match="the engine refuses the prompt"):
        bad.result(timeout=60)
    assert len(good.result(timeout=60).token_ids) == 6


def test_refused_options_are_the_users_error() -> None:
    with pytest.raises(ConfigError, match=r"^target\.engine: vLLM refuses the engine options"):
        OfflineEngine(_arguments(max_num_seqs=-1))


def test_closing_finishes_what_runs_and_dying_tells_everybody() -> None:
    engine = OfflineEngine(_arguments())
    futures = [engine.submit(PROMPT, GREEDY) for _ in range(3)]
    engine.close()
    assert [len(future.result(timeout=0).token_ids) for future in futures] == [6] * 3
    with pytest.raises(EngineDiedError, match="it was closed"):
        engine.submit(PROMPT, GREEDY).result(timeout=5)


def test_a_failed_step_ends_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = OfflineEngine(_arguments())

    def fail() -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(engine._engine, "step", fail)
    futures: list[Future[Completion]] = [engine.submit(PROMPT, GREEDY) for _ in range(3)]
    for future in (*futures, engine.submit(PROMPT, GREEDY)):
        with pytest.raises(EngineDiedError, match="illegal memory access") as error:
            future.result(timeout=5)
        assert isinstance(error.value.__cause__, RuntimeError)
    engine._engine.shutdown()
