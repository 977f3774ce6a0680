from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.impostor_draft import Impostor, altered
from tests.pairing_tools import (
    BLOCK_SIZE,
    SECRET,
    SHAPE,
    assert_proposes,
    eventually,
    raw_features,
    reference_block,
    row,
    tiny_draft,
    tiny_vocabulary,
)
from unmask.pairing.announcement import Announcement
from unmask.pairing.client import DraftLink
from unmask.pairing.coming_rows import ComingRows
from unmask.pairing.hello import draft_version, hello_of
from unmask.pairing.link_file import LinkConfig, write_link_file
from unmask.pairing.mailbox import Control
from unmask.pairing.server import DraftServer
from unmask.pairing.status import LinkStatus, read_status
from unmask.pairing.wire import Kind

K = BLOCK_SIZE - 1
TIMEOUT_MS = 300.0


@pytest.fixture(scope="module")
def vocabulary():
    return tiny_vocabulary()


@pytest.fixture
def serve(vocabulary) -> Iterator[Callable[..., DraftServer]]:
    servers = []

    def start(**options) -> DraftServer:
        server = DraftServer(options.pop("draft", tiny_draft()), vocabulary, vocabulary, SECRET, memory_mb=2, **options)
        server.start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def connect(tmp_path: Path) -> Iterator[Callable[..., DraftLink]]:
    links = []
    (tmp_path / "secret").write_bytes(SECRET + b"\n")

    def start(address: str | None, **options) -> DraftLink:
        write_link(tmp_path, address, **options)
        link = DraftLink(tmp_path / "link.json", SHAPE, K, status=LinkStatus(tmp_path / "status"))
        link.start()
        links.append(link)
        return link

    yield start
    for link in links:
        link.close()


def write_link(directory: Path, address: str | None, **options) -> None:
    defaults = {"secret_file": str(directory / "secret"), "timeout_ms": TIMEOUT_MS, "retry_s": 0.05}
    write_link_file(directory / "link.json", LinkConfig(address=address, **(defaults | options)))


def test_proposals_equal_the_reference(serve, connect, vocabulary, tmp_path) -> None:
    server = serve()
    link = connect(server.address)
    assert link.wait_until_ready(10)
    raw = raw_features(20, seed=0)
    assert link.propose([row(1, 0, 12, -1), row(2, 0, 8)], raw) == [
        [],
        reference_block(tiny_draft(), vocabulary, raw[12:], 1, K),
    ]
    raw_1 = torch.cat([raw[:12], raw_features(3, seed=5)])
    assert link.propose([row(1, 12, 3)], raw_1[12:], finished=[2]) == [
        reference_block(tiny_draft(), vocabulary, raw_1, 1, K)
    ]
    stats = server.stats()
    assert (stats.resident_requests, stats.proposals, stats.proposed_tokens, stats.connections) == (1, 2, 2 * K, 1)
    status = read_status(tmp_path / "status")
    assert status == link.status.as_dict()
    assert status["draft_version"] == draft_version(tiny_draft()) % 2**53
    assert [status[name] for name in ("connected", "speculation_enabled", "breaker_open")] == [1, 1, 0]
    assert [status[name] for name in ("steps", "proposals", "proposed_tokens", "failures")] == [2, 2, 2 * K, 0]
    assert status["round_trip_ms_sum"] > 0
    assert status["bytes_sent"] > 23 * 32 * 4


def test_a_unix_socket_serves_too(serve, connect, vocabulary, tmp_path) -> None:
    address = f"unix:{tmp_path}/s"
    link = connect(serve(host=address).address)
    assert link.wait_until_ready(10)
    assert_proposes(link, vocabulary)


def test_sessions_do_not_share_requests(serve, connect, vocabulary, tmp_path) -> None:
    """Two target workers use the same request number at the same time."""
    server = serve()
    one, two = connect(server.address), connect(server.address)
    assert one.wait_until_ready(10)
    assert two.wait_until_ready(10)
    raws = {one: raw_features(5, seed=1), two: raw_features(11, seed=2)}
    results: dict[DraftLink, list] = {one: [], two: []}

    def drive(link: DraftLink) -> None:
        raw = raws[link]
        for length in range(1, len(raw) + 1):
            results[link] += link.propose([row(1, length - 1, 1)], raw[length - 1 : length])

    threads = [threading.Thread(target=drive, args=(link,)) for link in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for link, raw in raws.items():
        lengths = range(1, len(raw) + 1)
        assert results[link] == [reference_block(tiny_draft(), vocabulary, raw[:n], 1, K) for n in lengths]
    one.close()
    eventually(lambda: server.stats().resident_requests == 1)
    assert server.stats().connections == 1


def test_a_killed_draft_costs_proposals_until_it_is_back(serve, connect, vocabulary, tmp_path) -> None:
    server = serve()
    link = connect(server.address)
    assert link.wait_until_ready(10)
    assert_proposes(link, vocabulary, request=1)
    server.stop()
    assert link.propose([row(1, 9, 1)], raw_features(1, seed=0)) == [[]]
    assert link.propose([row(1, 10, 1)], raw_features(1, seed=0)) == [[]]
    status = link.status.as_dict()
    assert [status[n] for n in ("connected", "speculation_enabled", "breaker_open", "failures")] == [0, 0, 1, 1]
    write_link(tmp_path, serve().address)
    assert link.wait_until_ready(10)
    # The draft that came back knows nothing of request 1: its past is a gap.
    masked = reference_block(tiny_draft(), vocabulary, raw_features(1, seed=0), 1, K, positions=torch.tensor([11]))
    assert link.propose([row(1, 11, 1)], raw_features(1, seed=0)) == [masked]
    assert_proposes(link, vocabulary, request=2)
    assert_proposes(link, vocabulary, request=1)
    assert link.status["failures"] == 1
    assert link.status["breaker_open"] == 0


def test_a_draft_that_goes_while_nobody_asks_is_noticed(serve, connect) -> None:
    server = serve()
    link = connect(server.address)
    assert link.wait_until_ready(10)
    server.stop()
    eventually(lambda: link.status["connected"] == 0 and link.status["connect_failures"] > 0)
    assert link.num_speculative_tokens == 0


def test_a_link_moves_when_its_file_does(serve, connect, vocabulary, tmp_path) -> None:
    first, second = serve(), serve(draft=tiny_draft(seed=3))
    link = connect(first.address)
    assert link.wait_until_ready(10)
    write_link(tmp_path, second.address)
    eventually(lambda: link.status["draft_version"] == draft_version(tiny_draft(seed=3)) % 2**53)
    assert_proposes(link, vocabulary, draft=tiny_draft(seed=3))
    assert link.status["failures"] == 0
    write_link(tmp_path, second.address, num_speculative_tokens=2)
    eventually(lambda: link.num_speculative_tokens == 2)
    assert_proposes(link, vocabulary, draft=tiny_draft(seed=3), k=2)
    write_link(tmp_path, second.address, num_speculative_tokens=0)
    eventually(lambda: link.status["speculation_enabled"] == 0)
    assert link.propose([row(9, 0, 1)], raw_features(1, seed=0)) == [[]]
    assert link.status["connected"] == 1
    write_link(tmp_path, None)
    eventually(lambda: link.status["connected"] == 0)


def test_swapped_weights_are_greeted_anew(serve, connect, vocabulary) -> None:
    server = serve()
    link = connect(server.address)
    assert link.wait_until_ready(10)
    assert_proposes(link, vocabulary, request=1)
    new = tiny_draft(seed=4)
    assert server.swap(new) == draft_version(new) == server.stats().draft_version
    assert link.propose([row(1, 9, 1)], raw_features(1, seed=0)) == [[]]
    assert link.wait_until_ready(10)
    masked = reference_block(new, vocabulary, raw_features(1, seed=0), 1, K, positions=torch.tensor([10]))
    assert link.propose([row(1, 10, 1)], raw_features(1, seed=0)) == [masked]
    assert_proposes(link, vocabulary, draft=new, request=2)
    status = link.status.as_dict()
    assert [status[n] for n in ("failures", "connect_failures", "breaker_open", "epoch")] == [0, 0, 0, 2]
    assert status["draft_version"] == draft_version(new) % 2**53


def test_a_step_may_ask_for_less(serve, connect, vocabulary) -> None:
    link = connect(serve().address)
    assert link.wait_until_ready(10)
    raw = raw_features(9, seed=1)
    assert link.propose([row(1, 0, 8)], raw[:8], k=0) == [[]]
    assert link.propose([row(1, 8, 1)], raw[8:], k=2) == [reference_block(tiny_draft(), vocabulary, raw, 1, 2)]
    # A draft without a confidence head cannot tell what is not worth it.
    assert link.propose([row(1, 9, 0)], raw[:0], k=99, min_chance=0.9) == [
        reference_block(tiny_draft(), vocabulary, raw, 1, K)
    ]


def test_a_wrong_secret_is_refused_and_then_mended(serve, connect, vocabulary, tmp_path) -> None:
    server = serve()
    (tmp_path / "wrong").write_bytes(b"w" * 32)
    link = connect(server.address, secret_file=str(tmp_path / "wrong"))
    eventually(lambda: server.stats().refused > 1)
    assert link.propose([row(1, 0, 1)], raw_features(1, seed=0)) == [[]]
    assert link.status["connected"] == 0
    write_link(tmp_path, server.address)
    assert link.wait_until_ready(10)
    assert_proposes(link, vocabulary)


def test_a_stranger_is_turned_away(serve) -> None:
    server = serve()
    host, port = server.address.split(":")
    with socket.create_connection((host, int(port))) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: draft\r\n\r\n")
        sock.settimeout(5)
        received = b""
        while chunk := sock.recv(4096):
            received += chunk
    assert server.stats().refused == 1
    assert SECRET not in received


MISBEHAVIOUR = {
    "stalls": lambda channel, reply: time.sleep(3 * TIMEOUT_MS / 1000),
    "dribbles": lambda channel, reply: [channel.send(Kind.STEP, [b"x"]) or time.sleep(0.05) for _ in range(20)],
    "hangs up": lambda channel, reply: channel.shutdown(),
    "sends noise": lambda channel, reply: channel._socket.sendall(os.urandom(4096)),
    "sends a huge frame": lambda channel, reply: channel._socket.sendall(b"UNMK\x01\x06\x00\x00\xff\xff\xff\xff"),
    "is of another version": altered(draft_version=5),
    "answers another step": altered(number=0),
    "answers another epoch": altered(epoch=0),
    "proposes what is no token": altered(tokens=np.full((1, K), 10**6, np.int32)),
    "answers for too few": altered(tokens=np.ones((0, K), np.int32), counts=np.ones(0, np.uint8)),
}


@pytest.mark.parametrize("name", MISBEHAVIOUR)
def test_a_draft_that_misbehaves_costs_one_deadline(name: str, serve, connect, vocabulary, tmp_path) -> None:
    impostor = Impostor(MISBEHAVIOUR[name])
    link = connect(impostor.address, retry_s=30.0)
    assert link.wait_until_ready(10)
    started = time.monotonic()
    for step in range(50):
        assert link.propose([row(1, step, 1)], raw_features(1, seed=0)) == [[]]
    assert time.monotonic() - started < 3 * TIMEOUT_MS / 1000
    assert link.status["failures"] == 1
    assert link.status["breaker_open"] == 1
    impostor.stop()
    write_link(tmp_path, serve().address)
    assert link.wait_until_ready(10)
    assert_proposes(link, vocabulary, request=2)


def test_repeated_lost_steps_are_spaced_out(connect) -> None:
    impostor = Impostor(MISBEHAVIOUR["hangs up"])
    link = connect(impostor.address, retry_s=0.05)
    waits = []
    for _ in range(4):
        assert link.wait_until_ready(10)
        assert link.propose([row(1, 0, 1)], raw_features(1, seed=0)) == [[]]
        lost = time.monotonic()
        assert link.wait_until_ready(10)
        waits.append(time.monotonic() - lost)
    impostor.stop()
    assert waits[3] > 0.35 > waits[0]


@pytest.mark.parametrize("changes", [{"target_layer_ids": (0, 2)}, {"vocab_size": 60, "mask_token_id": 59}])
def test_a_draft_of_another_target_is_never_asked(changes: dict, connect) -> None:
    impostor = Impostor(altered(), hello_of(tiny_draft(**changes), 1, None))
    link = connect(impostor.address)
    eventually(lambda: link.status["connect_failures"] > 1)
    assert not link.wait_until_ready(0.1)
    impostor.stop()


def test_nobody_there_and_no_file_are_no_error(connect, tmp_path) -> None:
    link = connect("127.0.0.1:1")
    (tmp_path / "link.json").unlink()
    for _ in range(3):
        assert link.propose([row(1, 0, 1)], raw_features(1, seed=0)) == [[]]
    eventually(lambda: link.status["connect_failures"] > 0)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_dies_hangs_up_on_everybody(serve, connect, vocabulary, monkeypatch) -> None:
    server = serve()
    link = connect(server.address)
    assert link.wait_until_ready(10)
    assert server.alive

    def die(_batch: list) -> list:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(server._engine, "step", die)
    assert link.propose([row(1, 0, 1)], raw_features(1, seed=0)) == [[]]
    assert link.status["round_trip_ms_count"] == 0
    eventually(lambda: not server.alive)
    eventually(lambda: link.status["connect_failures"] > 0)


def announced(server: DraftServer, num_rows: int) -> tuple[Control, Announcement]:
    """A step of one request that begins, as a target knows it before its GPU has run it."""
    requests, none = np.array([7], dtype=np.uint64), np.empty(0, dtype=np.uint64)
    shared = {
        "draft_version": server.stats().draft_version,
        "num_speculative_tokens": K,
        "requests": requests,
        "finished": none,
        "coming": ComingRows(np.array([num_rows]), np.array([0])),
    }
    control = Control(number=3, **shared)
    return control, Announcement(number=3, max_requests=2, max_rows=num_rows, dtype=torch.float32, **shared)


def parts_of(num_rows: int) -> list[memoryview]:
    """Its rows, and features that lie anywhere."""
    rows = np.array([[0, num_rows, 5, 3]], dtype=np.int32)
    return [rows.data.cast("B"), np.zeros((num_rows, SHAPE.hidden_size), dtype=np.float32).data.cast("B")]


def relaying(serve, connect) -> tuple[DraftServer, DraftLink]:
    """A draft that takes announcements, and a link to it."""
    server = serve()
    server._relays = True
    link = connect(server.address, timeout_ms=20_000)
    assert link.wait_until_ready(10)
    return server, link


def test_rows_go_only_where_they_were_announced(serve, connect) -> None:
    server, link = relaying(serve, connect)
    control, announcement = announced(server, 4)
    assert link.announce(announcement) == K
    before = link._connection
    link.hang_up()
    eventually(lambda: link._connection not in (None, before))
    delivered: list[memoryview] = []
    # The draft that is connected now knows nothing of the step, and would hang up.
    assert not link.ask_announced(control, K, parts_of(4), delivered.append)
    assert link.announce(announcement) == K
    assert link.ask_announced(control, K, parts_of(4), delivered.append)
    assert [words.nbytes for words in delivered] == [8 * K]
    assert link.status["failures"] == 0


def test_a_draft_that_was_replaced_says_so_however_much_is_sent(serve, connect) -> None:
    server, link = relaying(serve, connect)
    control, announcement = announced(server, 300_000)
    assert link.announce(announcement) == K
    version = server.swap(tiny_draft(seed=5))
    assert not link.ask_announced(control, K, parts_of(300_000), lambda words: pytest.fail("of another draft"))
    eventually(lambda: link.hello is not None and link.hello.draft_version == version)
    assert link.status["failures"] == 0
    assert server.stats().refused == 0
