from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pairing_tools import HIDDEN, VOCAB, row
from unmask.errors import WireError
from unmask.pairing import wire
from unmask.pairing.announcement import (
    Announcement,
    check_rows,
    check_tokens,
    decode_announcement,
    decode_tokens,
    encode_announcement,
    encode_tokens,
    num_feature_rows,
)
from unmask.pairing.coming_rows import ComingRows
from unmask.pairing.hello import decode_hello
from unmask.pairing.mailbox_words import signed
from unmask.pairing.wire import Kind, Proposals, Step
from unmask.types import ProposalRow

U64 = st.integers(0, 2**64 - 1)
ROWS = st.lists(
    st.builds(
        ProposalRow,
        request=U64,
        start=st.integers(0, 2**32 - 1),
        num_features=st.integers(0, 5),
        last_token=st.integers(-1, 2**31 - 1),
        page_hashes=st.lists(U64, max_size=3).map(tuple),
    ),
    max_size=6,
    unique_by=lambda r: r.request,
)


@st.composite
def steps(draw: st.DrawFn) -> Step:
    rows = draw(ROWS)
    width = draw(st.integers(0, 4))
    dtype = draw(st.sampled_from(wire.ROW_DTYPES))
    return Step(
        draft_version=draw(U64),
        epoch=draw(U64),
        number=draw(U64),
        num_speculative_tokens=draw(st.integers(1, 255)),
        rows=wire.pack_rows(rows),
        features=torch.randn(sum(r.num_features for r in rows), width).to(dtype),
        finished=np.array(draw(st.lists(U64, max_size=4)), dtype="<u8"),
        page_hashes=wire.pack_hashes(rows),
        min_chance=draw(st.integers(0, 65535)) / 65535,
    )


def joined(parts: list[wire.Buffer]) -> bytearray:
    return bytearray(b"".join(bytes(part) for part in parts))


@given(steps())
def test_a_step_survives_the_wire(step: Step) -> None:
    read = wire.decode_step(joined(wire.encode_step(step)))
    for name in ("draft_version", "epoch", "number", "num_speculative_tokens", "min_chance"):
        assert getattr(read, name) == getattr(step, name)
    np.testing.assert_array_equal(read.rows, step.rows)
    np.testing.assert_array_equal(read.finished, step.finished)
    np.testing.assert_array_equal(read.page_hashes, step.page_hashes)
    assert read.features.dtype == step.features.dtype
    assert torch.equal(read.features.float(), step.features.float())


@given(steps(), st.data())
def test_proposals_survive_the_wire(step: Step, data: st.DataObject) -> None:
    shape = (len(step.rows), step.num_speculative_tokens)
    tokens = np.random.default_rng(0).integers(0, VOCAB, shape).astype(np.int32)
    counts = data.draw(st.lists(st.integers(0, shape[1]), min_size=shape[0], max_size=shape[0]))
    sent = Proposals(
        draft_version=step.draft_version,
        epoch=step.epoch,
        number=step.number,
        counts=np.array(counts, dtype=np.uint8),
        tokens=tokens,
    )
    read = wire.decode_proposals(joined(wire.encode_proposals(sent)), step, VOCAB)
    np.testing.assert_array_equal(read.counts, sent.counts)
    np.testing.assert_array_equal(read.tokens, sent.tokens)


def decoders(step: Step) -> list:
    return [
        wire.decode_step,
        lambda payload: wire.decode_proposals(payload, step, VOCAB),
        decode_hello,
        lambda payload: wire.decode_frame(payload, list(Kind), 2**20),
    ]


@settings(max_examples=300)
@given(st.binary(max_size=300), steps(), st.integers(0, 3))
def test_any_bytes_are_read_or_refused(payload: bytes, step: Step, which: int) -> None:
    with contextlib.suppress(WireError):
        decoders(step)[which](bytearray(payload))


@settings(max_examples=300)
@given(steps(), st.data())
def test_a_damaged_step_is_read_or_refused(step: Step, data: st.DataObject) -> None:
    payload = joined(wire.encode_step(step))
    payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(payload)))
    for damaged in (payload, payload[:cut]):
        try:
            read = wire.decode_step(damaged)
        except WireError:
            continue
        assert int(read.rows["num_features"].sum()) == len(read.features)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"number": 8}, "another version, session or step"),
        ({"epoch": 3}, "another version, session or step"),
        ({"draft_version": 2}, "another version, session or step"),
        ({"counts": np.array([3, 0], np.uint8)}, "outside the vocabulary"),
        ({"tokens": np.array([[0, VOCAB], [0, 0]], np.int32)}, "outside the vocabulary"),
        ({"tokens": np.array([[0, -1], [0, 0]], np.int32)}, "outside the vocabulary"),
        ({"tokens": np.zeros((2, 1), np.int32)}, "proposals for"),
    ],
)
def test_a_reply_that_does_not_answer_is_refused(change: dict, message: str) -> None:
    step = Step(
        draft_version=1,
        epoch=2,
        number=7,
        num_speculative_tokens=2,
        rows=wire.pack_rows([row(1, 0, 0), row(2, 0, 0)]),
        features=torch.empty(0, HIDDEN),
        finished=np.array([], dtype="<u8"),
    )
    fields = {
        "draft_version": 1,
        "epoch": 2,
        "number": 7,
        "counts": np.array([2, 0], np.uint8),
        "tokens": np.zeros((2, 2), np.int32),
    }
    wire.decode_proposals(joined(wire.encode_proposals(Proposals(**fields))), step, VOCAB)
    with pytest.raises(WireError, match=message):
        wire.decode_proposals(joined(wire.encode_proposals(Proposals(**(fields | change)))), step, VOCAB)


def test_a_step_that_names_a_request_twice_is_refused() -> None:
    step = Step(
        draft_version=0,
        epoch=0,
        number=0,
        num_speculative_tokens=1,
        rows=wire.pack_rows([row(1, 0, 0), row(1, 0, 0)]),
        features=torch.empty(0, HIDDEN),
        finished=np.array([], dtype="<u8"),
    )
    with pytest.raises(WireError, match="twice"):
        wire.decode_step(joined(wire.encode_step(step)))


@pytest.mark.parametrize("bad", [row(-1, 0, 0), row(1, 2**32, 0), row(1, 0, 0, 2**31)])
def test_a_row_out_of_range_is_refused(bad: ProposalRow) -> None:
    with pytest.raises(WireError, match="does not fit"):
        wire.pack_rows([bad])


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"HTTP" + bytes(8), "does not speak"),
        (b"UNMK" + bytes([9, 5, 0, 0]) + bytes(4), "protocol version 9"),
        (wire.encode_frame(Kind.STEP, 5), "where HELLO is due"),
        (wire.encode_frame(Kind.HELLO, 101), "exceeds the limit of 100"),
    ],
)
def test_a_frame_that_is_not_due_is_refused(header: bytes, message: str) -> None:
    with pytest.raises(WireError, match=message):
        wire.decode_frame(header, [Kind.HELLO], 100)


@st.composite
def announcements(draw: st.DrawFn) -> Announcement:
    most = draw(st.integers(1, 50))
    requests = draw(st.lists(U64, max_size=most, unique=True))
    places = st.tuples(st.integers(0, 40), st.integers(-1, 2**31 - 1))
    coming = np.array([draw(places) for _ in requests], dtype=np.int64).reshape(-1, 2)
    return Announcement(
        number=draw(st.integers(0, 2**32 - 1)),
        draft_version=draw(U64),
        num_speculative_tokens=draw(st.integers(1, 255)),
        requests=np.array(requests, dtype=np.uint64),
        finished=np.array(draw(st.lists(U64, max_size=4)), dtype=np.uint64),
        coming=ComingRows(coming[:, 0], coming[:, 1]),
        max_requests=most,
        max_rows=draw(st.integers(40 * 50, 2**32 - 1)),
        dtype=draw(st.sampled_from(wire.ROW_DTYPES)),
    )


@given(announcements())
def test_an_announcement_survives_the_wire(announcement: Announcement) -> None:
    read = decode_announcement(joined(encode_announcement(announcement)))
    for name in set(Announcement.__dataclass_fields__) - {"coming"}:
        np.testing.assert_array_equal(getattr(read, name), getattr(announcement, name))
    for name in ComingRows.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(read.coming, name), getattr(announcement.coming, name))


def test_rows_in_eight_bits_are_bounded_and_close() -> None:
    rows = torch.tensor([[1.0, -0.06, 3.3, 1e4, -1e4, 0.0]])
    narrow = wire.as_rows(rows, wire.EIGHT_BIT)
    assert narrow.dtype is wire.EIGHT_BIT
    assert narrow.float().tolist() == [[1.0, pytest.approx(-0.06, rel=0.0625), 3.25, 448.0, -448.0, 0.0]]
    assert wire.as_rows(narrow, wire.EIGHT_BIT) is narrow
    assert wire.as_rows(rows, torch.float32) is rows


def test_weights_do_not_come_in_eight_bits() -> None:
    code = wire.ROW_DTYPES.index(wire.EIGHT_BIT)
    assert wire.dtype_of(code) is wire.EIGHT_BIT
    with pytest.raises(WireError, match="element type"):
        wire.dtype_of(code, wire.DTYPES)


@given(announcements(), st.data())
def test_a_damaged_announcement_is_refused_or_says_something_else(announcement: Announcement, data) -> None:
    payload = joined(encode_announcement(announcement))
    cut = data.draw(st.integers(0, len(payload) - 1))
    with pytest.raises(WireError):
        decode_announcement(payload[:cut])
    payload[data.draw(st.integers(0, len(payload) - 1))] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(WireError):
        decode_announcement(payload)


@pytest.mark.parametrize("number", [0, 1, 2**31 - 1, 2**31, 2**32 - 1])
def test_valid_tokens_bear_the_number_of_their_step_and_no_others(number: int) -> None:
    tokens, valid = np.array([[1, 2, 0], [5, 0, 3]]), np.array([[1, 1, 0], [1, 0, 0]], dtype=bool)
    payload = encode_tokens(tokens, valid, number)
    words = np.frombuffer(payload, dtype="<i8").reshape(2, 3)
    assert ((words >> 32 == signed(number)) == valid).all()
    ids, counts = decode_tokens(payload, 2, number)
    assert counts.tolist() == [2, 1]
    assert ids[valid].tolist() == [1, 2, 5]
    assert decode_tokens(payload, 2, number ^ 1)[1].tolist() == [0, 0]


def test_what_follows_a_gap_is_not_valid() -> None:
    payload = encode_tokens(np.array([[1, 2, 3]]), np.array([[True, False, True]]), 7)
    assert decode_tokens(payload, 1, 7)[1].tolist() == [1]


def test_tokens_outside_the_vocabulary_or_of_another_size_are_refused() -> None:
    payload = encode_tokens(np.array([[1, 2], [6, 0]]), np.ones((2, 2), dtype=bool), 7)
    check_tokens(payload, 2, 2, 7)
    check_tokens(b"", 2, 0, 7)
    with pytest.raises(WireError, match="outside the vocabulary"):
        check_tokens(payload, 2, 2, 6)
    with pytest.raises(WireError, match="for 2 x 3 tokens"):
        check_tokens(payload, 2, 3, 7)


@pytest.mark.parametrize("num_bytes", [31, 32 + 7, 32 - 8])
def test_a_message_of_rows_that_cannot_be_cut_is_refused(num_bytes: int) -> None:
    assert num_feature_rows(32 + 3 * 8, 2, 8) == 3
    with pytest.raises(WireError, match="2 requests"):
        num_feature_rows(num_bytes, 2, 8)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((0, 4, 5), None),
        ((0, 4, -1), None),
        ((0, 3, 5), "add up"),
        ((0, -1, 5), "add up"),
        ((-1, 4, 5), "outside"),
        ((0, 4, 10), "outside"),
    ],
)
def test_rows_are_what_was_announced(row: tuple[int, int, int], message: str | None) -> None:
    number = 2**32 - 7
    rows = np.array([[3, 2, 9, -7], [*row, -7]], dtype=np.int32)
    if message is not None:
        with pytest.raises(WireError, match=message):
            check_rows(rows.data.cast("B"), 6, of_two_requests(number, most=4), vocab_size=10)
        return
    check_rows(rows.data.cast("B"), 6, of_two_requests(number, most=4), vocab_size=10)
    with pytest.raises(WireError, match="more than were announced"):
        check_rows(rows.data.cast("B"), 6, of_two_requests(number, most=3), vocab_size=10)
    with pytest.raises(WireError, match="of another step"):
        check_rows(rows.data.cast("B"), 6, of_two_requests(number + 1, most=4), vocab_size=10)


def of_two_requests(number: int, most: int) -> Announcement:
    return Announcement(
        number=number,
        draft_version=1,
        num_speculative_tokens=3,
        requests=np.array([1, 2], dtype=np.uint64),
        finished=np.empty(0, dtype=np.uint64),
        coming=ComingRows.following([most, most]),
        max_requests=2,
        max_rows=8,
        dtype=torch.float32,
    )


@pytest.mark.parametrize(
    "changes", [{"max_requests": 0}, {"max_rows": 0}, {"coming": [9]}, {"num_speculative_tokens": 0}]
)
def test_an_announcement_of_the_impossible_is_refused(changes: dict) -> None:
    sizes = {"num_speculative_tokens": 3, "coming": [8], "max_requests": 1, "max_rows": 8} | changes
    announcement = Announcement(
        number=1,
        draft_version=1,
        requests=np.array([7], dtype=np.uint64),
        finished=np.empty(0, dtype=np.uint64),
        dtype=torch.float32,
        **(sizes | {"coming": ComingRows.following(sizes["coming"])}),
    )
    with pytest.raises(WireError, match="an ANNOUNCE message of"):
        decode_announcement(joined(encode_announcement(announcement)))
