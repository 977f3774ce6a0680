from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ahead_tools import CountingEngine
from tests.pairing_tools import (
    BLOCK_SIZE,
    HIDDEN,
    VOCAB,
    raw_features,
    reference_block,
    reference_states,
    row,
    tiny_draft,
    tiny_vocabulary,
)
from unmask.errors import PairingError, WireError
from unmask.objectives.confidence import ConfidenceHead
from unmask.pairing import block_drafter
from unmask.pairing.draft_engine import DraftEngine
from unmask.pairing.projection import Projection
from unmask.pairing.wire import Proposals, Step, pack_hashes, pack_rows
from unmask.types import ProposalRow

K = BLOCK_SIZE - 1
NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def draft():
    return tiny_draft()


@pytest.fixture(scope="module")
def vocabulary():
    return tiny_vocabulary()


@pytest.fixture
def engine(draft, vocabulary) -> DraftEngine:
    return DraftEngine(draft, vocabulary, vocabulary, memory_mb=4, page_size=4)


def make_step(
    engine: DraftEngine, rows: list[ProposalRow], raw: list[Tensor], k: int = K, finished: tuple[int, ...] = ()
) -> Step:
    projection = engine.hello.projection
    return Step(
        draft_version=engine.version,
        epoch=9,
        number=next(NUMBERS),
        num_speculative_tokens=k,
        rows=pack_rows(rows),
        features=projection(torch.cat(raw)) if raw else torch.empty(0, HIDDEN),
        finished=np.array(finished, dtype="<u8"),
        page_hashes=pack_hashes(rows),
    )


def ids(proposals: Proposals | None) -> list[list[int]]:
    assert proposals is not None
    return [t[:n] for t, n in zip(proposals.tokens.tolist(), proposals.counts.tolist(), strict=True)]


def run(engine: DraftEngine, step: Step, session: int = 0) -> list[list[int]]:
    engine.check(step)
    (reply,) = engine.step([(session, step)])
    assert reply is not None
    assert (reply.epoch, reply.number) == (step.epoch, step.number)
    return ids(reply)


@pytest.mark.parametrize("k", [1, 3, K])
@pytest.mark.parametrize("length", [1, 4, 7, 40])
def test_a_block_equals_the_concatenating_reference(draft, vocabulary, engine, k: int, length: int) -> None:
    raw = raw_features(length, seed=length)
    proposed = run(engine, make_step(engine, [row(1, 0, length, 5)], [raw], k))
    assert proposed == [reference_block(draft, vocabulary, raw, 5, k)]


@settings(max_examples=25, deadline=None)
@given(
    weight=st.floats(-3, 3),
    bias=st.lists(st.floats(-3, 3), min_size=K, max_size=K),
    min_chances=st.lists(st.integers(0, 65535).map(lambda n: n / 65535), min_size=2, max_size=2),
    lengths=st.lists(st.integers(1, 12), min_size=2, max_size=4),
    k=st.integers(1, K),
)
def test_a_block_ends_where_its_rows_are_not_worth_verifying(
    weight: float, bias: list[float], min_chances: list[float], lengths: list[int], k: int
) -> None:
    """Two targets that ask for different chances, against the head applied to each request's block alone."""
    draft, vocabulary = tiny_draft(), tiny_vocabulary()
    head = ConfidenceHead(HIDDEN, K).requires_grad_(False)
    head.weight[0], head.bias[:] = weight, torch.tensor(bias)
    engine = DraftEngine(draft, vocabulary, vocabulary, memory_mb=4, page_size=4, confidence=head)
    raws = [raw_features(length, seed=i) for i, length in enumerate(lengths)]
    rows = [row(i, 0, length, 5) for i, length in enumerate(lengths)]
    steps = [replace(make_step(engine, rows, raws, k), min_chance=chance) for chance in min_chances]
    for step, chance, reply in zip(steps, min_chances, engine.step(list(enumerate(steps))), strict=True):
        for raw, proposed in zip(raws, ids(reply), strict=True):
            chances = head.chances(reference_states(draft, vocabulary, raw, 5, k)[None])[0]
            sure = int((chances >= chance + 1e-5).sum())
            allowed = range(max(sure, 1), max(int((chances >= chance - 1e-5).sum()), 1) + 1)
            assert len(proposed) in allowed
            assert proposed == reference_block(draft, vocabulary, raw, 5, k)[: len(proposed)]
        assert step.min_chance or all(len(proposed) == k for proposed in ids(reply))


@pytest.mark.parametrize("sizes", [(HIDDEN + 1, K), (HIDDEN, K - 1)])
def test_the_head_of_another_draft_is_refused(draft, vocabulary, engine, sizes: tuple[int, int]) -> None:
    version = engine.version
    with pytest.raises(PairingError, match="publish them together"):
        engine.swap(tiny_draft(seed=4), confidence=ConfidenceHead(*sizes))
    assert engine.version == version
    with pytest.raises(PairingError, match="publish them together"):
        DraftEngine(draft, vocabulary, vocabulary, confidence=ConfidenceHead(*sizes))


def test_a_head_for_sampled_text_is_not_used(draft, vocabulary, caplog) -> None:
    """Bounds come with greedy steps; a head for greedy text, or one that does not say, is used for them."""
    block_drafter.warn_once.cache_clear()
    raw = raw_features(4, seed=1)
    for temperature, length in ((None, 1), (0.0, 1), (0.7, K)):
        head = ConfidenceHead(HIDDEN, K, temperature).requires_grad_(False)
        engine = DraftEngine(draft, vocabulary, vocabulary, memory_mb=4, page_size=4, confidence=head)
        for _ in range(2):
            step = replace(make_step(engine, [row(1, 0, 4, 5)], [raw]), min_chance=0.9)
            assert run(engine, step) == [reference_block(draft, vocabulary, raw, 5, K)[:length]]
            engine.swap(tiny_draft(), confidence=head)
    (warning,) = caplog.records
    assert "trained on text of temperature 0.7" in warning.message


def test_a_draft_on_a_gpu_says_that_it_does_without_its_head(draft, vocabulary, caplog) -> None:
    """The graphs' passes, run eagerly."""
    block_drafter.warn_once.cache_clear()
    sizes = {"memory_mb": 4, "page_size": 4}
    CountingEngine(draft, vocabulary, vocabulary, **sizes).swap(tiny_draft(seed=4))
    assert not caplog.records
    engine = CountingEngine(draft, vocabulary, vocabulary, confidence=ConfidenceHead(HIDDEN, K), **sizes)
    engine.swap(tiny_draft(seed=4), confidence=ConfidenceHead(HIDDEN, K))
    (warning,) = caplog.records
    assert "is not used on a GPU" in warning.message
    with pytest.raises(PairingError, match="publish them together"):
        engine.swap(tiny_draft(), confidence=ConfidenceHead(HIDDEN, K - 1))


def test_chunks_and_truncation_equal_one_append(draft, vocabulary, engine) -> None:
    raw = raw_features(23, seed=3)
    assert run(engine, make_step(engine, [row(1, 0, 9, -1)], [raw[:9]])) == [[]]
    assert run(engine, make_step(engine, [row(1, 9, 8, -1)], [raw_features(8, seed=99)])) == [[]]
    expected = [reference_block(draft, vocabulary, raw, 5, K)]
    assert run(engine, make_step(engine, [row(1, 9, 14, 5)], [raw[9:]])) == expected
    assert run(engine, make_step(engine, [row(1, 23, 0, 5)], [])) == expected


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    ks=st.lists(st.integers(1, K), min_size=3, max_size=3),
    data=st.data(),
)
def test_a_request_does_not_see_its_batch(lengths: list[int], ks: list[int], data: st.DataObject) -> None:
    """Requests of three sessions, spread over two steps, against each request alone."""
    draft, vocabulary = tiny_draft(), tiny_vocabulary()
    engine = DraftEngine(draft, vocabulary, vocabulary, memory_mb=4, page_size=4)
    raws = [raw_features(length, seed=i) for i, length in enumerate(lengths)]
    sessions = [data.draw(st.integers(0, 2)) for _ in lengths]
    cuts = [data.draw(st.integers(0, length)) for length in lengths]

    def batch(second: bool) -> list[tuple[int, Step]]:
        steps = []
        for session in range(3):
            mine = [i for i, s in enumerate(sessions) if s == session]
            parts = [raws[i][cuts[i] :] if second else raws[i][: cuts[i]] for i in mine]
            starts = [cuts[i] if second else 0 for i in mine]
            anchor = 7 if second else -1
            rows = [row(i, s, len(p), anchor) for i, s, p in zip(mine, starts, parts, strict=True)]
            steps.append((session, make_step(engine, rows, parts, ks[session])))
        return steps

    engine.step(batch(second=False))
    replies = engine.step(batch(second=True))
    for session, reply in enumerate(replies):
        mine = [i for i, s in enumerate(sessions) if s == session]
        assert ids(reply) == [reference_block(draft, vocabulary, raws[i], 7, ks[session]) for i in mine]


def test_a_gap_is_not_attended_to_and_harms_nobody(draft, vocabulary, engine) -> None:
    raw, late = raw_features(8, seed=1), raw_features(3, seed=2)
    rows = [row(1, 2, 3), row(2, 0, 8), row(3, 5, 0)]
    whole = reference_block(draft, vocabulary, raw, 1, K)
    masked = reference_block(draft, vocabulary, late, 1, K, positions=torch.arange(2, 5))
    assert run(engine, make_step(engine, rows, [late, raw])) == [masked, whole, []]
    assert engine.proposals_with_gap == 1
    more = raw_features(2, seed=3)
    positions = torch.tensor([*range(8), 11, 12])
    expected = reference_block(draft, vocabulary, torch.cat([raw, more]), 1, K, positions=positions)
    assert run(engine, make_step(engine, [row(2, 11, 2)], [more])) == [expected]


def test_a_shared_prefix_is_drafted_from_as_if_it_had_been_sent(draft, vocabulary, engine) -> None:
    """Request 2 has 8 positions in common with request 1, which has ended; request 3 shares them only by position."""
    raw, own = raw_features(12, seed=1), raw_features(3, seed=2)
    first = replace(row(1, 0, 12), page_hashes=(21, 22, 23))
    run(engine, make_step(engine, [first], [raw]))
    run(engine, make_step(engine, [], [], finished=(1,)))
    assert (engine.resident_pages, engine.idle_pages) == (0, 3)
    rows = [replace(row(2, 8, 3), page_hashes=(21, 22)), replace(row(3, 8, 3), page_hashes=(21, 32))]
    whole = reference_block(draft, vocabulary, torch.cat([raw[:8], own]), 1, K)
    gap = torch.tensor([0, 1, 2, 3, 8, 9, 10])
    masked = reference_block(draft, vocabulary, torch.cat([raw[:4], own]), 1, K, positions=gap)
    assert run(engine, make_step(engine, rows, [own, own])) == [whole, masked]


def test_finished_requests_and_closed_sessions_are_forgotten(engine) -> None:
    raw = raw_features(8, seed=1)
    run(engine, make_step(engine, [row(1, 0, 4), row(2, 0, 4)], [raw]))
    run(engine, make_step(engine, [row(1, 0, 8)], [raw]), session=1)
    assert engine.resident_requests == 3
    assert run(engine, make_step(engine, [row(2, 4, 0)], [], finished=(1, 77))) != [[]]
    assert engine.resident_requests == 2
    engine.close_session(1)
    assert (engine.resident_requests, engine.resident_pages) == (1, 1)


def test_a_block_past_the_last_position_is_not_drafted(draft, vocabulary) -> None:
    short = tiny_draft(max_position_embeddings=16)
    engine = DraftEngine(short, vocabulary, vocabulary, memory_mb=4)
    length = 16 - K
    raw = raw_features(length, seed=4)
    assert run(engine, make_step(engine, [row(1, 0, length)], [raw])) == [[]]
    assert len(run(engine, make_step(engine, [row(1, 0, length - 1)], [raw[:-1]]))[0]) == K


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_speculative_tokens": BLOCK_SIZE}, "block size - 1"),
        ({"features": torch.empty(0, HIDDEN + 1)}, "width"),
        ({"features": torch.empty(0, HIDDEN, dtype=torch.bfloat16)}, "bfloat16"),
        ({"rows": pack_rows([row(1, 0, 0, VOCAB)])}, "vocabulary"),
        ({"rows": pack_rows([replace(row(1, 3, 0), page_hashes=(1,))])}, "full pages"),
    ],
)
def test_a_step_that_does_not_fit_is_refused(engine, changes: dict, message: str) -> None:
    fields = {name: getattr(make_step(engine, [], []), name) for name in Step.__slots__}
    with pytest.raises(WireError, match=message):
        engine.check(Step(**(fields | changes)))


def test_swapped_weights_refuse_the_old_version(vocabulary, engine) -> None:
    raw = raw_features(8, seed=1)
    old = make_step(engine, [row(1, 0, 8)], [raw])
    before = run(engine, old)
    other = tiny_draft(seed=5)
    engine.swap(other)
    assert engine.step([(0, old)]) == [None]
    assert torch.equal(engine.hello.projection.fc, Projection.of(other).fc)
    new = make_step(engine, [row(1, 0, 8), row(2, 8, 0)], [raw])
    mixed = engine.step([(0, old), (1, new)])
    expected = reference_block(other, vocabulary, raw, 1, K)
    assert mixed[0] is None
    assert ids(mixed[1]) == [expected, []]
    assert before != [expected]
    assert engine.swaps == 1


def test_a_swap_forgets_the_context_of_the_old_version(vocabulary, engine) -> None:
    raw = raw_features(9, seed=1)
    run(engine, make_step(engine, [replace(row(1, 0, 8), page_hashes=(21, 22))], [raw[:8]]))
    other = tiny_draft(seed=5)
    assert engine.swap(other) == engine.version
    assert (engine.resident_requests, engine.resident_pages, engine.idle_pages) == (0, 0, 0)
    # The request that was under way, and one that shares its prefix.
    rows = [row(1, 8, 1), replace(row(2, 8, 1), page_hashes=(21, 22))]
    expected = reference_block(other, vocabulary, raw[8:], 1, K, positions=torch.tensor([8]))
    assert run(engine, make_step(engine, rows, [raw[8:], raw[8:]])) == [expected, expected]


def test_a_draft_that_reads_other_layers_is_refused(engine) -> None:
    with pytest.raises(PairingError, match="target_layer_ids"):
        engine.swap(tiny_draft(target_layer_ids=(0, 2)))


def test_a_draft_of_another_vocabulary_is_refused(vocabulary, engine) -> None:
    with pytest.raises(PairingError, match="vocab_size"):
        engine.swap(tiny_draft(vocab_size=VOCAB - 1))
    with pytest.raises(PairingError, match="vocab_size"):
        DraftEngine(tiny_draft(), vocabulary[:-1], vocabulary[:-1])
