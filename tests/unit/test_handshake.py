from __future__ import annotations

import socket
import threading
import time
from contextlib import closing

import numpy as np
import pytest
import torch

from tests.pairing_tools import BLOCK_SIZE, HIDDEN, LAYER_IDS, SECRET, SHAPE, VOCAB, tiny_draft
from unmask.errors import ConfigError, PairingError, WireError
from unmask.pairing.channel import Channel, listen, parse_address
from unmask.pairing.handshake import authenticate_as_draft, authenticate_as_target, read_secret
from unmask.pairing.hello import NO_DIGEST, decode_hello, draft_version, encode_hello, hello_of, record_digest
from unmask.pairing.link_file import LinkConfig, read_link_file, write_link_file
from unmask.pairing.wire import Kind
from unmask.types import TargetRecord


def test_hello_carries_the_projection() -> None:
    draft = tiny_draft().to(torch.bfloat16)
    record = TargetRecord(
        revision="r", tokenizer_hash="t", chat_template_hash="c", vocab_size=VOCAB, hidden_size=HIDDEN, num_layers=6
    )
    payload = bytearray(b"".join(bytes(part) for part in encode_hello(hello_of(draft, draft_version(draft), record))))
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


def test_a_peer_whose_host_has_vanished_is_given_up() -> None:
    """Nothing else would end a read that waits for it: its thread, mailbox and sessions would stay."""
    listener = listen("127.0.0.1", 0)
    with closing(listener):
        ours = Channel.connect(f"127.0.0.1:{listener.getsockname()[1]}", time.monotonic() + 5)
        sock, _ = listener.accept()
        with closing(ours), closing(Channel(sock)) as theirs:
            for channel in (ours, theirs):
                told = {
                    name: channel._socket.getsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{name}"))
                    for name in ("KEEPIDLE", "KEEPINTVL", "KEEPCNT", "USER_TIMEOUT")
                }
                assert channel._socket.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
                silent_s = told["KEEPIDLE"] + told["KEEPCNT"] * told["KEEPINTVL"]
                assert silent_s <= 30
                assert told["USER_TIMEOUT"] == 1000 * silent_s
