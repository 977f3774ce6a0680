"""The gate's diagnosis: faults that are put into a served pairing are refused by name.

The plain loop stands for the served pairing: it reads a real checkpoint of a draft that was trained.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from actors.cluster import FaultError
from pipelines.gate_report import GateReport, acceptance_lengths, check
from tests.draft_tools import VOCAB, record
from unmask.checkpoints import load_draft, save_draft
from unmask.config import PromptsConfig
from unmask.errors import UserError
from unmask.evaluation.diagnosis import Evaluated, Served, accepted_with_shift, likely_cause
from unmask.evaluation.metrics import acceptance_length
from unmask.models.dflash import DFlashDraft
from unmask.prompt_rows import PromptRow
from unmask.prompts import PromptBuilder

TEXTS = ("abc", "dea", "cab", "bed")
TEMPLATE = "{% for message in messages %}{{ message['content'] }}={% endfor %}"
REPORT = GateReport(
    requests=4, identical=4, acceptance_length=2.0, acceptance_length_evaluated=2.0, target_pid=1, draft_pid=2,
    draft_killed_requests=4, draft_killed_identical=4, draft_returned=True, tokens_per_second=1.0,
)  # fmt: skip


def tokenizer(template: str = TEMPLATE, shift: int = 0) -> PreTrainedTokenizerFast:
    """One token a character; `shift` gives every character another's id."""
    characters = "=>abcdefgh"
    ids = {"<unk>": 2} | {c: 3 + (i + shift) % len(characters) for i, c in enumerate(characters)}
    words = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", chat_template=template)
    return made


def prompts(of: PreTrainedTokenizerFast) -> list[list[int]]:
    builder = PromptBuilder(of, PromptsConfig(field="text"), max_prompt_len=VOCAB, mask_token_id=1)
    return [list(builder.build(PromptRow(index=0, values={"text": text})).ids) for text in TEXTS]


def decode(ids) -> str:
    return "".join(tokenizer().convert_ids_to_tokens(ids))


@pytest.fixture(scope="module")
def draft(trained_pair, tmp_path_factory: pytest.TempPathFactory) -> DFlashDraft:
    return reloaded(trained_pair.draft, tmp_path_factory.mktemp("d") / "draft")


def reloaded(draft: DFlashDraft, path: Path) -> DFlashDraft:
    save_draft(draft, path, record(), dtype=draft.fc.weight.dtype)
    return load_draft(path)


@pytest.fixture(scope="module")
def by_shift(trained_pair, draft: DFlashDraft) -> dict[int, list[list[int]]]:
    return {shift: replay(trained_pair, draft, shift) for shift in (0, 1, -1)}


def replay(pair, draft: DFlashDraft, shift: int) -> list[list[int]]:
    options = {"num_speculative_tokens": 3, "max_new_tokens": 14, "eos_ids": frozenset[int]()}
    return accepted_with_shift(pair.target, draft, pair.prompts, shift, **options)


def evaluated_as(prompts_ids, accepted) -> list[Evaluated]:
    return [Evaluated(text=t, prompt_ids=p, accepted=a) for t, p, a in zip(TEXTS, prompts_ids, accepted, strict=True)]


def served_as(prompts_ids, accepted) -> list[Served]:
    return [Served(prompt_ids=p, accepted=a) for p, a in zip(prompts_ids, accepted, strict=True)]


@pytest.mark.parametrize("shift", [1, -1])
@pytest.mark.parametrize("where", ["engine", "checkpoint"])
def test_layer_ids_off_by_one(
    trained_pair, draft: DFlashDraft, by_shift, tmp_path: Path, shift: int, where: str
) -> None:
    evaluated = by_shift[0]
    if where == "engine":
        served, replays = by_shift[shift], by_shift
    else:
        ids = tuple(layer + shift for layer in draft.config.target_layer_ids)
        wrong = DFlashDraft(dataclasses.replace(draft.config, target_layer_ids=ids))
        wrong.load_state_dict(draft.state_dict())
        wrong = reloaded(wrong, tmp_path / "wrong")
        served = replay(trained_pair, wrong, 0)
        replays = {0: served, -shift: replay(trained_pair, wrong, -shift)}
    taus = [acceptance_length([a for of_one in accepted for a in of_one]) for accepted in (evaluated, served)]
    assert taus[0] > 1.2 * taus[1]
    cause = likely_cause(
        evaluated_as(trained_pair.prompts, evaluated),
        served_as(trained_pair.prompts, served),
        decode=decode,
        shifted=replays,
    )
    assert cause.startswith("layer ids: ")
    assert f"{shift:+d} from" in cause
    report = dataclasses.replace(REPORT, acceptance_length=taus[1], acceptance_length_evaluated=taus[0], cause=cause)
    with pytest.raises(UserError, match=r"apart, 3% allowed\); likely cause: layer ids: "):
        check(report)


@pytest.mark.parametrize(
    ("used", "cause"),
    [
        (tokenizer(template=">" + TEMPLATE), "chat template"),
        (tokenizer(template=TEMPLATE.replace("=", "")), "chat template"),
        (tokenizer(shift=3), "tokenizer"),
    ],
    ids=["prefix", "no suffix", "shuffled"],
)
def test_other_prompts_than_evaluated(used: PreTrainedTokenizerFast, cause: str) -> None:
    accepted = [[3, 2]] * len(TEXTS)
    evaluated, served = evaluated_as(prompts(tokenizer()), accepted), served_as(prompts(used), accepted)
    found = likely_cause(evaluated, served, decode=decode, shifted={})
    assert found.startswith(f"{cause}: ")
    with pytest.raises(UserError, match=f"likely cause: {cause}"):
        check(dataclasses.replace(REPORT, cause=found))


def figures(accepted: list[int], evaluated: list[int], cached: int = 0) -> tuple[Evaluated, Served]:
    prompt = [len(accepted), cached, *accepted]
    served = Served(prompt_ids=prompt, accepted=accepted, cached_tokens=cached)
    return Evaluated(text="", prompt_ids=prompt, accepted=evaluated), served


@pytest.mark.parametrize(
    ("requests", "cause"),
    [
        ([figures([2, 3], [2, 3]), figures([1, 0, 1], [3, 2], cached=16)], "prefix cache"),
        ([figures([3, 3, 2, 1], [3, 3, 3, 3])], "RoPE"),
        ([figures([2, 2, 2, 2], [3, 3, 3, 3])], "other weights"),
    ],
)
def test_other_causes(requests: list[tuple[Evaluated, Served]], cause: str) -> None:
    evaluated, served = (list(side) for side in zip(*requests, strict=True))
    as_evaluated = [one.accepted for one in evaluated]
    found = likely_cause(evaluated, served, decode=decode, shifted={0: as_evaluated, 1: [[0, 0]]})
    assert found.startswith(cause)


def test_a_sound_pairing_passes() -> None:
    check(REPORT)
    check(dataclasses.replace(REPORT, acceptance_length=2.0 * 1.029))
    with pytest.raises(UserError, match=r"^gate\.identical: "):
        check(dataclasses.replace(REPORT, identical=3))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"undrafted": 0.4}, "the draft proposed nothing in 40% of the steps"),
        ({"draft_returned": False}, "the draft was killed and not used again within"),
    ],
)
def test_a_draft_that_is_mostly_absent_is_refused(fields, message) -> None:
    check(dataclasses.replace(REPORT, undrafted=0.05))
    with pytest.raises(FaultError, match=message):
        check(dataclasses.replace(REPORT, **fields))


def test_cached_prompts_are_compared_by_themselves() -> None:
    """Otherwise as many new prompts would halve what is lost with the cache."""
    evaluated = [Evaluated(text="", prompt_ids=[number], accepted=[3, 3]) for number in (1, 2)]
    new = [Served(prompt_ids=[number], accepted=[3, 3]) for number in (1, 2)]
    cached = [Served(prompt_ids=[number], accepted=[0, 0, 3], cached_tokens=16) for number in (1, 2)]
    assert acceptance_lengths(evaluated, new) == (4.0, 4.0)
    assert acceptance_lengths(evaluated, new + cached) == (2.0, 4.0)
    assert likely_cause(evaluated, new + cached, decode=str, shifted={}).startswith("prefix cache: ")
