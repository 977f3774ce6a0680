"""One target worker with several drafts, and one draft with several workers, over real sockets."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.pairing_tools import (
    BLOCK_SIZE,
    SECRET,
    SHAPE,
    eventually,
    raw_features,
    reference_block,
    row,
    tiny_draft,
    tiny_vocabulary,
)
from unmask.pairing.fleet import DraftFleet
from unmask.pairing.link_file import LinkConfig, read_link_file, write_link_file
from unmask.pairing.server import DraftServer

K = BLOCK_SIZE - 1


@pytest.fixture(scope="module")
def vocabulary():
    return tiny_vocabulary()


@pytest.fixture
def serve(vocabulary) -> Iterator[Callable[[], DraftServer]]:
    servers: list[DraftServer] = []

    def start() -> DraftServer:
        servers.append(DraftServer(tiny_draft(), vocabulary, vocabulary, SECRET))
        servers[-1].start()
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def fleet_of(tmp_path) -> Iterator[Callable[..., DraftFleet]]:
    fleets: list[DraftFleet] = []

    def connect(*servers: DraftServer) -> DraftFleet:
        write(tmp_path, *servers)
        fleets.append(DraftFleet(tmp_path / "link.json", SHAPE, K))
        fleets[-1].start()
        assert fleets[-1].wait_until_ready(10)
        return fleets[-1]

    yield connect
    for fleet in fleets:
        fleet.close()


def write(folder, first: DraftServer, *others: DraftServer, **options: Any) -> None:
    (folder / "secret").write_bytes(SECRET)
    config = LinkConfig(
        address=first.address,
        further_addresses=tuple(server.address for server in others),
        secret_file=str(folder / "secret"),
        timeout_ms=5000,
        retry_s=0.1,
        **options,
    )
    write_link_file(folder / "link.json", config)
    assert read_link_file(folder / "link.json") == config


def expected(raw: torch.Tensor, vocabulary: torch.Tensor, positions: torch.Tensor | None = None) -> list[int]:
    return reference_block(tiny_draft(), vocabulary, raw, 1, K, positions=positions)


def test_requests_are_spread_and_stay(serve, fleet_of, vocabulary) -> None:
    servers = [serve(), serve(), serve()]
    fleet = fleet_of(*servers)
    raws = [raw_features(8 + i, seed=i) for i in range(6)]
    rows = [row(i, 0, 6 + i) for i in range(6)]
    blocks = fleet.propose(rows, torch.cat([raw[:-2] for raw in raws]))
    assert blocks == [expected(raw[:-2], vocabulary) for raw in raws]
    assert [server.stats().resident_requests for server in servers] == [2, 2, 2]
    # Their next rows find their context, in another order.
    order = [4, 1, 5, 0, 3, 2]
    rows = [row(i, 6 + i, 2) for i in order]
    assert fleet.propose(rows, torch.cat([raws[i][-2:] for i in order])) == [
        expected(raws[i], vocabulary) for i in order
    ]
    assert fleet.propose([], raws[0][:0], finished=[0, 3, 1]) == []
    assert [server.stats().resident_requests for server in servers] == [0, 1, 2]
    # New ones go where there is room.
    fleet.propose([row(9, 0, 6), row(10, 0, 6)], torch.cat([raws[0][:6]] * 2))
    assert [server.stats().resident_requests for server in servers] == [2, 1, 2]
    assert fleet.status["drafts_connected"] == 3
    assert fleet.status["proposals"] == 14
    assert fleet.status["failures"] == 0


def test_requests_move_on_when_their_draft_goes(serve, fleet_of, vocabulary, tmp_path) -> None:
    servers = [serve(), serve()]
    fleet = fleet_of(*servers)
    raws = [raw_features(9, seed=i) for i in range(4)]
    fleet.propose([row(i, 0, 6) for i in range(4)], torch.cat([raw[:6] for raw in raws]))
    servers[0].stop()
    eventually(lambda: fleet.links[0].num_speculative_tokens == 0)
    blocks = fleet.propose([row(i, 6, 2) for i in range(4)], torch.cat([raw[6:8] for raw in raws]))
    moved = [expected(raw[6:8], vocabulary, torch.tensor([6, 7])) for raw in raws]
    stayed = [expected(raw[:8], vocabulary) for raw in raws]
    assert blocks == [moved[0], stayed[1], moved[2], stayed[3]]
    assert servers[1].stats().resident_requests == 4
    # Another draft in its place takes new requests; the moved ones stay where their context is.
    servers.append(serve())
    write(tmp_path, servers[2], servers[1])
    assert fleet.wait_until_ready(10)
    rows = [*(row(i, 8, 1) for i in range(4)), row(8, 0, 6)]
    fleet.propose(rows, torch.cat([*(raw[8:] for raw in raws), raws[0][:6]]))
    assert [server.stats().resident_requests for server in servers[1:]] == [4, 1]
    assert fleet.status["epoch"] == 3


def test_one_draft_of_several_serves_mailboxes_again_when_it_is_the_only_one(serve, fleet_of, tmp_path) -> None:
    servers = [serve(), serve()]
    fleet = fleet_of(*servers)
    write(tmp_path, servers[0], mailbox_folder="/boxes")
    eventually(lambda: fleet.mailbox_folder == "/boxes")
    write(tmp_path, *servers, mailbox_folder="/boxes")
    eventually(lambda: fleet.mailbox_folder is None)


def test_a_shared_prefix_is_asked_for_where_it_is(serve, fleet_of, vocabulary) -> None:
    servers = [serve(), serve()]
    fleet = fleet_of(*servers)
    raw, own = raw_features(16, seed=1), raw_features(2, seed=2)
    fleet.propose([replace(row(1, 0, 16), page_hashes=(7,))], raw)
    fleet.propose([row(2, 0, 1), row(3, 0, 1)], raw_features(2, seed=3), finished=[1])
    assert [server.stats().resident_requests for server in servers] == [1, 1]
    fleet.propose([row(4, 0, 1)], raw_features(1, seed=3))
    shared = fleet.propose([replace(row(5, 16, 2), page_hashes=(7,))], own)
    assert shared == [expected(torch.cat([raw, own]), vocabulary)]


def test_a_fleet_without_a_draft_proposes_nothing(serve, fleet_of) -> None:
    server = serve()
    fleet = fleet_of(server)
    server.stop()
    eventually(lambda: fleet.num_speculative_tokens == 0)
    assert fleet.propose([row(1, 0, 3), row(2, 0, 3)], raw_features(6, seed=0), finished=[5]) == [[], []]
    assert not fleet.wait_until_ready(0.05)


def test_a_draft_is_replaced_while_two_workers_ask(serve, fleet_of, vocabulary) -> None:
    """Every block is a block of one of the two versions, from the first to the last, and the new one is reached."""
    server, stop = serve(), threading.Event()
    fleets = [fleet_of(server), fleet_of(server)]
    raw = raw_features(8, seed=1)
    new = tiny_draft(seed=5)
    old_blocks, new_blocks = ([reference_block(d, vocabulary, raw, 1, K)] for d in (tiny_draft(), new))
    assert old_blocks != new_blocks
    seen: dict[int, list] = {0: [], 1: []}

    def drive(worker: int) -> None:
        request = 0
        while not stop.is_set():
            request += 1
            seen[worker].append(fleets[worker].propose([row(request, 0, 8)], raw, finished=[request - 1]))

    threads = [threading.Thread(target=drive, args=(worker,)) for worker in seen]
    for thread in threads:
        thread.start()
    eventually(lambda: all(old_blocks in blocks for blocks in seen.values()))
    version = server.swap(new)
    eventually(lambda: all(new_blocks in blocks for blocks in seen.values()))
    stop.set()
    for thread in threads:
        thread.join()
    for worker, blocks in seen.items():
        assert [block for block in blocks if block not in (old_blocks, new_blocks, [[]])] == []
        assert blocks.index(new_blocks) > max(i for i, block in enumerate(blocks) if block == old_blocks)
        assert fleets[worker].status["draft_version"] == version % 2**53
        assert fleets[worker].status["failures"] == 0
    assert server.stats().swaps == 1


def test_epochs_that_no_greeting_tells_of_are_counted(tmp_path) -> None:
    write_link_file(tmp_path / "link", LinkConfig(address=None, secret_file=str(tmp_path / "secret")))
    fleet = DraftFleet(tmp_path / "link", SHAPE, K)
    fleet.begin_epoch(before=4.0)
    fleet.start()
    eventually(lambda: fleet.status["epoch"] == 5)
    fleet.begin_epoch()
    assert fleet.status["epoch"] == 6
    fleet.close()


def test_a_draft_that_is_left_forgets_its_requests(serve, fleet_of, vocabulary) -> None:
    """As when a sidecar hands its mailbox to a draft beside it: what runs on is not named again over the wire."""
    servers = [serve(), serve()]
    fleet = fleet_of(*servers)
    raws = [raw_features(6, seed=i) for i in range(4)]
    fleet.propose([row(i, 0, 6) for i in range(4)], torch.cat(raws))
    assert [server.stats().resident_requests for server in servers] == [2, 2]
    fleet.leave()
    assert [server.stats().resident_requests for server in servers] == [0, 0]
    fleet.propose([row(0, 6, 2)], raw_features(2, seed=9))
    assert [server.stats().resident_requests for server in servers] == [1, 0]
    assert fleet.status["failures"] == 0
    assert fleet.status["drafts_connected"] == 2


def test_a_draft_that_cannot_be_asked_for_now_forgets_who_moved_on(serve, fleet_of, monkeypatch) -> None:
    """It is still connected, such as one that has another version than the rows were made for."""
    servers = [serve(), serve()]
    fleet = fleet_of(*servers)
    version = servers[1].stats().draft_version
    raws = [raw_features(6, seed=i) for i in range(4)]
    fleet.propose([row(i, 0, 6) for i in range(4)], torch.cat(raws))
    monkeypatch.setattr("unmask.pairing.fleet._version", lambda link: version + (link is fleet.links[0]))
    projected = fleet.hello.projection(torch.cat([raw_features(1, seed=i) for i in range(4)]))
    fleet.propose([row(i, 6, 1) for i in range(4)], projected, version=version)
    assert [server.stats().resident_requests for server in servers] == [0, 4]
    assert fleet.status["failures"] == 0
