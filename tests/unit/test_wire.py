from __future__ import annotations

import contextlib
import socket
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pairing_tools import BLOCK_SIZE, HIDDEN, LAYER_IDS, SECRET, SHAPE, VOCAB, row, tiny_draft
from unmask.errors import ConfigError, PairingError, WireError
from unmask.pairing import wire
from unmask.pairing.channel import Channel, parse_address
from unmask.pairing.handshake import authenticate_as_draft, authenticate_as_target, read_secret
from unmask.pairing.hello import NO_DIGEST, decode_hello, draft_version, encode_hello, hello_of, record_digest
from unmask.pairing.link_file import LinkConfig, read_link_file, write_link_file
from unmask.pairing.wire import Kind, Proposals, Step
from unmask.types import ProposalRow, TargetRecord

U64 = st.integers(0, 2**64 - 1)
ROWS = st.lists(
    st.builds(
        ProposalRow,
        request=U64,
        start=st.integers(0, 2**32 - 1),
        num_features=st.integers(0, 5),
        last_token=st.integers(-1, 2**31 - 1),
    ),
    max_size=6,
    unique_by=lambda r: r.request,
)


@st.composite
def steps(draw: st.DrawFn) -> Step:
    rows = draw(ROWS)
    width = draw(st.integers(0, 4))
    dtype = draw(st.sampled_from(wire.DTYPES))
    return Step(
        draft_version=draw(U64),
        epoch=draw(U64),
        number=draw(U64),
        num_speculative_tokens=draw(st.integers(1, 255)),
        rows=wire.pack_rows(rows),
        features=torch.randn(sum(r.num_features for r in rows), width).to(dtype),
        finished=np.array(draw(st.lists(U64, max_size=4)), dtype="<u8"),
    )


def joined(parts: list[wire.Buffer]) -> bytearray:
    return bytearray(b"".join(bytes(part) for part in parts))


@given(steps())
def test_a_step_survives_the_wire(step: Step) -> None:
    read = wire.decode_step(joined(wire.encode_step(step)))
    for name in ("draft_version", "epoch", "number", "num_speculative_tokens"):
        assert getattr(read, name) == getattr(step, name)
    np.testing.assert_array_equal(read.rows, step.rows)
    np.testing.assert_array_equal(read.finished, step.finished)
    assert read.features.dtype == step.features.dtype
    assert torch.equal(read.features, step.features)


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


def test_hello_carries_the_projection() -> None:
    draft = tiny_draft().to(torch.bfloat16)
    record = TargetRecord(
        revision="r", tokenizer_hash="t", chat_template_hash="c", vocab_size=VOCAB, hidden_size=HIDDEN, num_layers=6
    )
    payload = joined(encode_hello(hello_of(draft, draft_version(draft), record)))
    hello = decode_hello(payload)
    payload[:] = bytes(len(payload))
    assert len(payload) <= SHAPE.hello_bytes
    assert hello.layer_ids == LAYER_IDS
    assert hello.block_size == BLOCK_SIZE
    assert hello.target_digest == record_digest(record) != NO_DIGEST
    raw = torch.randn(3, len(LAYER_IDS) * HIDDEN)
    assert torch.equal(hello.projection(raw), draft.project_features(raw.to(torch.bfloat16)))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"vocab_size": VOCAB + 1}, "vocab_size"),
        ({"target_layer_ids": (1, 2)}, "target_layer_ids"),
        ({"hidden_size": 16}, "hidden_size"),
    ],
)
def test_a_draft_of_another_target_is_refused(changes: dict, name: str) -> None:
    draft = tiny_draft(**changes)
    with pytest.raises(PairingError, match=name):
        SHAPE.check(hello_of(draft, 1, None))


def test_versions_tell_weights_apart() -> None:
    assert draft_version(tiny_draft(0)) == draft_version(tiny_draft(0))
    assert len({draft_version(tiny_draft(0)), draft_version(tiny_draft(1)), draft_version(tiny_draft(0).half())}) == 3


def shake_hands(target_secret: bytes, draft_secret: bytes) -> list[WireError | OSError | None]:
    """Both sides' outcomes."""
    ours, theirs = socket.socketpair()
    outcomes: list[WireError | OSError | None] = [None, None]

    def run(index: int, side, channel: Channel, secret: bytes) -> None:
        try:
            side(channel, secret, time.monotonic() + 5)
        except (WireError, OSError) as error:
            outcomes[index] = error
        finally:
            channel.close()

    target = threading.Thread(target=run, args=(0, authenticate_as_target, Channel(ours), target_secret))
    target.start()
    run(1, authenticate_as_draft, Channel(theirs), draft_secret)
    target.join()
    return outcomes


def test_both_sides_prove_the_secret() -> None:
    assert shake_hands(SECRET, SECRET) == [None, None]


def test_a_target_without_the_secret_is_refused() -> None:
    outcomes = shake_hands(b"x" * 32, SECRET)
    assert isinstance(outcomes[1], WireError)
    assert outcomes[0] is not None


def test_a_draft_without_the_secret_is_refused() -> None:
    """A draft that takes any answer and sends the target's own proof back has proved nothing."""
    ours, theirs = socket.socketpair()

    def lie() -> None:
        channel = Channel(theirs)
        channel.send(Kind.CHALLENGE, [bytes(32)])
        _, answer = channel.receive([Kind.AUTHENTICATE], 64)
        channel.send(Kind.WELCOME, [bytes(answer[32:])])

    liar = threading.Thread(target=lie)
    liar.start()
    with pytest.raises(WireError, match="shared secret"):
        authenticate_as_target(Channel(ours), SECRET, time.monotonic() + 5)
    liar.join()


def test_a_frame_larger_than_the_socket_buffer_arrives_whole() -> None:
    ours, theirs = (Channel(s) for s in socket.socketpair())
    content = np.random.default_rng(0).bytes(5_000_000)
    sender = threading.Thread(target=ours.send, args=(Kind.STEP, [content[:10], b"", content[10:]]))
    sender.start()
    kind, payload = theirs.receive([Kind.STEP], len(content), time.monotonic() + 10)
    sender.join()
    assert kind is Kind.STEP
    assert payload == content
    assert not theirs.peer_has_closed()
    ours.close()
    assert theirs.peer_has_closed()


def test_a_deadline_covers_the_whole_frame() -> None:
    ours, theirs = (Channel(s) for s in socket.socketpair())
    ours.send(Kind.STEP, [b"abc"])
    started = time.monotonic()
    theirs.receive([Kind.STEP], 3, started + 0.1)
    with pytest.raises(TimeoutError):
        theirs.receive([Kind.STEP], 3, started + 0.1)
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("address", ["localhost", "host:", ":80", "host:70000", "host:8o"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="host:port"):
        parse_address(address)


def test_secrets_and_link_files_are_validated(tmp_path) -> None:
    short = tmp_path / "short"
    short.write_text("tiny\n")
    with pytest.raises(ConfigError, match="16 are needed"):
        read_secret(short)
    with pytest.raises(ConfigError, match="cannot read"):
        read_secret(tmp_path / "none")
    path = tmp_path / "link.json"
    config = LinkConfig(address="unix:/x", secret_file=str(short), num_speculative_tokens=3)
    write_link_file(path, config)
    assert read_link_file(path) == config
    for text, message in [
        ("{", "not valid JSON"),
        ("[]", "JSON object"),
        ('{"adress": 1}', "did you mean 'address'"),
        ('{"address": "a:1", "secret_file": "s", "retry_s": 0}', "retry_s: must be positive"),
        ('{"address": 5, "secret_file": "s"}', "link file"),
        ("{}", "link file"),
    ]:
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_link_file(path)
