"""vLLM's V2 runner with a remote draft on a GPU: the words of a real stream, identical text, and drafts that go away.

In float32 without TF32. The draft is a process of its own on the same GPU; with two of them, run it with
`CUDA_VISIBLE_DEVICES=0,1` and `UNMASK_DRAFT_GPU=1`.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ahead_tools import Pair, RelayedPair
from tests.mailbox_tools import LAYOUT, ImaginedTarget, answers, watchdog
from tests.pairing_tools import eventually
from unmask.pairing.mailbox import Mailbox, take_tokens
from unmask.pairing.mailbox_words import BEGUN, DOORBELL, REPLY, is_reached, signed
from unmask.pairing.packed_rows import StepTensors, pack_rows
from unmask.pairing.unpacked_rows import LENGTH, MOST, PAGES, Destination, answer_rows, unpack_rows
from unmask.pairing.wire import EIGHT_BIT, as_rows

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

SECRET = b"not for production: 0123456789ab"
NUM_FUZZED = 2000
LIMIT_MS = "200"
WAYS = ("same host", "sidecar")


@pytest.fixture(scope="module")
def shared() -> Iterator[Path]:
    """A folder of shared memory: pages of other files cannot be pinned everywhere."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def on_gpu(step: StepTensors) -> StepTensors:
    return StepTensors(**{name: getattr(step, name).cuda() for name in StepTensors.__dataclass_fields__})


ROWS = pytest.mark.parametrize("rows", [torch.float32, EIGHT_BIT], ids=["whole rows", "rows in eight bits"])


@ROWS
def test_the_kernel_stores_what_the_reference_does(rows: torch.dtype, shared: Path) -> None:
    from unmask.pairing.packed_rows_triton import pack_rows_on_gpu
    from unmask.pairing.stream_words import PinnedMailbox

    layout = replace(LAYOUT, dtype=rows)
    expected, found = (Mailbox.create(shared / f"{name} {rows}", layout) for name in ("expected", "found"))
    words = PinnedMailbox(found)
    imagined = ImaginedTarget(seed=1)
    for number in (1, 2, 7, 16, 2**31, 2**32 - 1, 0):
        step = imagined.step()
        features = as_rows(step.states[0][: len(step.tensors.positions)], rows)
        pack_rows(expected, step.tensors, features, number)
        pack_rows_on_gpu(found, words.address, on_gpu(step.tensors), features.cuda(), number, step.coming.longest)
        torch.cuda.synchronize()
        assert (found.rows == expected.rows).all()
        assert torch.equal(found.features.float(), expected.features.float())
        imagined.end()
    words.close()


@ROWS
def test_the_kernels_take_and_answer_what_the_references_do(rows: torch.dtype, shared: Path) -> None:
    from unmask.pairing.stream_words import PinnedMailbox
    from unmask.pairing.unpacked_rows_triton import answer_rows_on_gpu, unpack_rows_on_gpu

    generator = random.Random(7)
    layout = replace(LAYOUT, dtype=rows)
    expected, found = (Mailbox.create(shared / f"{name} {rows}", layout) for name in ("taken", "taken by a kernel"))
    words = PinnedMailbox(found)
    for number in (1, 7, 2**31, 2**32 - 1, 0) * 8:
        requests, longest, k = generator.randint(1, 8), generator.randint(1, 6), generator.randint(1, LAYOUT.max_k)
        inputs = torch.randint(1, 9, (PAGES + 8, 16), dtype=torch.int32)
        for i in range(requests):
            inputs[LENGTH, i] = start = generator.randint(0, 20)
            inputs[MOST, i] = most = generator.randint(1, longest)
            count = generator.choice([0, most + 1] + 8 * [generator.randint(1, most)])
            tag = signed(number) if generator.random() < 0.9 else 3
            expected.rows[i] = start + (generator.random() < 0.1), count, generator.choice([-1, 0, 5, 90]), tag
        expected.features[:] = as_rows(torch.randn(LAYOUT.max_rows, LAYOUT.width), rows)
        for word, value in ((BEGUN, number), (REPLY, number - 1)):
            expected.set_word(word, value)
        found.memory[:] = expected.memory
        into = Destination(
            inputs=inputs,
            rows=torch.zeros(64, LAYOUT.width),
            places=torch.zeros(2, 64, dtype=torch.int64),
            page_size=4,
            spare_slot=999,
            num_positions=22,
        )
        on_device = replace(into, **{name: getattr(into, name).cuda() for name in ("inputs", "rows", "places")})
        seen = torch.zeros(9, 4, dtype=torch.int32)
        seen_by_kernel = torch.zeros(9, 4, dtype=torch.int32, pin_memory=True)
        plan = torch.zeros(9, 4, dtype=torch.int32, device="cuda")
        ids = torch.randint(0, 90, (16, k))
        unpack_rows(expected, number, requests, longest, into, seen)
        answer_rows(expected, number, requests, ids, into, seen[-1])
        unpack_rows_on_gpu(found, words.address, number, requests, longest, on_device, seen_by_kernel, plan)
        answer_rows_on_gpu(found, words.address, number, requests, ids.cuda(), on_device, seen_by_kernel[-1])
        torch.cuda.synchronize()
        assert torch.equal(seen_by_kernel, seen)
        assert torch.equal(on_device.inputs[:, :requests].cpu(), into.inputs[:, :requests])
        assert torch.equal(on_device.places.cpu(), into.places)
        used = into.places[1] != into.spare_slot
        assert torch.equal(on_device.rows.cpu()[used], into.rows[used])
        assert (found.tokens == expected.tokens).all()
    words.close()


@ROWS
@pytest.mark.parametrize("kind", [Pair, RelayedPair])
def test_steps_are_drafted_behind_their_doorbells_as_after_them(
    kind: type[Pair], rows: torch.dtype, shared: Path
) -> None:
    folder = shared / f"{kind.__name__} {rows}"
    folder.mkdir()
    with kind(folder, "cuda", rows=rows) as pair:
        imagined = ImaginedTarget(seed=11)
        for _ in range(300):
            step, k = imagined.step(), imagined.random.randint(1, LAYOUT.max_k)
            assert pair.ask(step, k) == pair.ask_twin(step, k)
            pair.finish(imagined.end())
        assert pair.engine.ahead_steps == 300


def test_a_stream_waits_for_the_reply_and_the_cpu_does_not(shared: Path) -> None:
    from unmask.pairing.stream_words import PinnedMailbox

    mailbox = Mailbox.create(shared / "box", LAYOUT)
    words = PinnedMailbox(mailbox)
    start = 2**32 - 3
    for word in (BEGUN, DOORBELL, REPLY):
        mailbox.set_word(word, start)
    # Of another step: one of those below has the number 0, which new pages bear.
    mailbox.tokens[:] = 99 << 32
    taken: list[torch.Tensor] = []
    # CUDA loads a kernel at its first launch, which waits for the stream: here for the answer that comes after it.
    take_tokens(torch.from_numpy(mailbox.tokens).cuda(), 0, 1000, -1)
    # Whatever fails here must not leave the stream waiting for ever.
    with watchdog(mailbox, 5000):
        for ahead in range(1, 7):
            number = (start + ahead) % 2**32
            words.write(BEGUN, number)
            words.write(DOORBELL, number)
            words.wait(REPLY, number)
            found = torch.from_numpy(mailbox.tokens).to("cuda", non_blocking=True, copy=True)
            taken.append(take_tokens(found, number, 1000, -1))
            assert not is_reached(mailbox.word(REPLY), number)
            eventually(lambda number=number: mailbox.word(DOORBELL) == number)
            assert mailbox.is_waiting
            assert mailbox.answer(number, *answers([ahead] * LAYOUT.max_k))
            torch.cuda.synchronize()
            assert taken[-1][0].tolist() == [ahead] * LAYOUT.max_k
            assert (taken[-1][1:] == -1).all()
    words.write(BEGUN, start + 8)
    words.write(DOORBELL, start + 8)
    words.wait(REPLY, start + 8)
    with watchdog(mailbox, 100):
        torch.cuda.synchronize()
    words.close()


def serve(target: str, draft: str, folder: str, pipe: Connection) -> None:
    """The draft process; answers `stats` until it is told to end."""
    from tests.vllm.vllm_tools import K
    from unmask.checkpoints import load_draft
    from unmask.pairing.link_file import LinkConfig, write_link_file
    from unmask.pairing.server import DraftServer
    from unmask.pairing.vocabulary import load_vocabulary

    server = DraftServer(
        load_draft(Path(draft)).cuda(),
        *load_vocabulary(target, torch.float32),
        SECRET,
        # Recording a graph takes longer than a target would wait.
        graph_ks=[K],
        mailbox_folder=Path(folder) / "boxes",
    )
    server.start()
    secret = Path(folder) / "secret"
    secret.write_bytes(SECRET)
    link = LinkConfig(address=server.address, secret_file=str(secret), timeout_ms=30_000, retry_s=0.1)
    write_link_file(Path(folder) / "link.json", link)
    pipe.send("ready")
    while pipe.recv() == "stats":
        pipe.send(server.stats())
    server.stop()


class Draft:
    """The draft process, which can be stopped, killed and started again."""

    def __init__(self, target: Path, draft: Path, folder: Path) -> None:
        self.folder = folder
        self._arguments = (str(target), str(draft), str(folder))
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        before = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("UNMASK_DRAFT_GPU", "0")
        self.process = context.Process(target=serve, args=(*self._arguments, theirs), daemon=True)
        self.process.start()
        if before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
        assert self.pipe.poll(180)
        assert self.pipe.recv() == "ready"

    def stats(self) -> Any:
        self.pipe.send("stats")
        return self.pipe.recv()

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    def stop(self) -> None:
        if self.process.is_alive():
            self.pipe.send("end")
        self.process.join(30)


@pytest.fixture(scope="module")
def target() -> Path:
    pytest.importorskip("vllm")
    from unmask.config import EMBEDDED_TARGET
    from unmask.errors import UserError
    from unmask.targets import resolve_target

    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        return resolve_target(EMBEDDED_TARGET)
    except (UserError, ImportError) as error:
        pytest.skip(f"no embedded target: {error}")


@pytest.fixture(scope="module")
def draft(target: Path, shared: Path, tmp_path_factory) -> Iterator[Draft]:
    from tests.vllm.vllm_tools import make_draft

    process = Draft(target, make_draft(target, tmp_path_factory.mktemp("d") / "draft"), shared)
    yield process
    process.stop()


@contextmanager
def v2_engine(target: Path, way: str | None, draft: Draft | None = None, **options: Any) -> Iterator[Any]:
    """An engine of the V2 runner with CUDA graphs; without a way, the target alone."""
    from engines.draft_arguments import (
        LINK_FILE_VARIABLE,
        MAILBOX_FOLDER_VARIABLE,
        WATCHDOG_VARIABLE,
        RemoteDraftOptions,
        with_remote_draft,
    )
    from tests.vllm.vllm_tools import LAYER_IDS, K, engine

    variables = {"VLLM_USE_V2_MODEL_RUNNER": "1", WATCHDOG_VARIABLE: LIMIT_MS}
    arguments = {"model": str(target), "enforce_eager": False, "max_num_seqs": 32, "max_num_batched_tokens": 512}
    # Little is needed: other work may be on the GPU.
    arguments |= {"gpu_memory_utilization": 0.2, "disable_log_stats": False, **options}
    if way is not None:
        link_file = draft.folder / "link.json"
        variables[LINK_FILE_VARIABLE] = str(link_file)
        if way == "same host":
            variables[MAILBOX_FOLDER_VARIABLE] = str(draft.folder / "boxes")
        remote = RemoteDraftOptions(link_file=link_file, layer_ids=LAYER_IDS, num_speculative_tokens=K)
        arguments = with_remote_draft(arguments, remote, "v2")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        if way != "same host":
            patch.delenv(MAILBOX_FOLDER_VARIABLE, raising=False)
        del arguments["model"]
        with engine(target, **arguments) as llm:
            if way is not None:
                eventually(lambda: counters(llm)["is_ready"], 60)
            yield llm


@contextmanager
def taking_turns(llm: Any, least: int | None) -> Iterator[None]:
    """Requests take turns in two halves, from so many on."""
    llm.collective_rpc("take_turns_from", args=(least,))
    try:
        yield
    finally:
        llm.collective_rpc("take_turns_from", args=(None,))


def counters(llm: Any) -> dict[str, int]:
    return llm.collective_rpc("draft_counters")[0]


def accepted(llm: Any) -> float:
    """Drafted tokens that were accepted so far."""
    return sum(m.value for m in llm.get_metrics() if m.name == "vllm:spec_decode_num_accepted_tokens")


def prompts(count: int, seed: int, longest: int = 120) -> list[list[int]]:
    generator = random.Random(seed)
    return [[generator.randrange(100, 49000) for _ in range(generator.randint(1, longest))] for _ in range(count)]


def sharing_prompts() -> list[list[int]]:
    """One by itself, then 16 with the same beginning."""
    generator = random.Random(6)
    shared = [generator.randrange(100, 49000) for _ in range(150)]
    return [[*shared, *prompt] for prompt in prompts(16, seed=7, longest=40)]


def fresh_greedy(llm: Any, asked: list[list[int]], length: int) -> list[list[int]]:
    """With nothing left in the prefix cache: chunks of other sizes round differently."""
    from tests.vllm.vllm_tools import greedy

    llm.reset_prefix_cache()
    return greedy(llm, asked, length)


@dataclass(frozen=True)
class Fuzz:
    """Requests of random lengths, of which some are greedy and some are given up."""

    asked: list[list[int]]
    lengths: list[int]
    greedy: list[int]
    doomed: dict[int, int]

    @classmethod
    def drawn(cls) -> Fuzz:
        generator, asked = random.Random(8), prompts(NUM_FUZZED, seed=9)
        return cls(
            asked,
            [generator.randint(1, 60) for _ in asked],
            [i for i in range(NUM_FUZZED) if generator.random() < 0.7],
            {i: generator.randint(1, 40) for i in range(NUM_FUZZED) if generator.random() < 0.1},
        )


@dataclass(frozen=True)
class Plain:
    """What the target says by itself."""

    greedy: list[list[int]]
    sharing: list[list[int]]
    long: list[list[int]]
    fuzzed: dict[int, list[int]]


@pytest.fixture(scope="module")
def plain(target: Path) -> Plain:
    """All of it from one engine: they take a minute to start."""
    from tests.vllm.vllm_tools import greedy

    fuzz = Fuzz.drawn()
    with v2_engine(target, None, enable_prefix_caching=True) as llm:
        sharing = [*fresh_greedy(llm, sharing_prompts()[:1], 24), *greedy(llm, sharing_prompts(), 24)]
        fuzzed = fresh_greedy(llm, [fuzz.asked[i] for i in fuzz.greedy], 60)
        return Plain(
            fresh_greedy(llm, prompts(24, seed=4), 64),
            sharing,
            fresh_greedy(llm, prompts(16, seed=5, longest=40), 180),
            dict(zip(fuzz.greedy, fuzzed, strict=True)),
        )


@pytest.fixture(scope="module", params=WAYS)
def llm(request, target: Path, draft: Draft, plain: Plain) -> Iterator[Any]:
    with v2_engine(target, request.param, draft, enable_prefix_caching=True) as llm:
        yield llm
    # A draft without targets holds nothing.
    eventually(lambda: draft.stats().resident_requests == 0, 10)
    assert draft.stats().resident_pages == 0


def test_greedy_text_is_the_targets_own(llm: Any, plain: Plain) -> None:
    before = counters(llm)
    assert fresh_greedy(llm, prompts(24, seed=4), 64) == plain.greedy
    # The last steps may be under way when the last token is out.
    eventually(lambda: counters(llm)["asked"] == counters(llm)["answered"])
    found = counters(llm)
    assert found["asked"] - before["asked"] > 30
    assert found["released"] == found["late"] == 0


def test_requests_that_take_turns_say_the_same(llm: Any, plain: Plain) -> None:
    counts = []
    for least in (None, 2):
        before = accepted(llm), counters(llm)
        with taking_turns(llm, least):
            assert fresh_greedy(llm, prompts(24, seed=4), 64) == plain.greedy
        eventually(lambda: counters(llm)["asked"] == counters(llm)["answered"])
        counts.append((accepted(llm) - before[0], counters(llm)["asked"] - before[1]["asked"]))
    (at_once, steps), (in_turns, more_steps) = counts
    assert more_steps > 1.5 * steps
    assert in_turns >= 0.97 * at_once


def test_a_shared_prompt_is_no_gap_with_prefix_caching(llm: Any, draft: Draft, plain: Plain) -> None:
    from tests.vllm.vllm_tools import greedy

    before = draft.stats()
    assert [*fresh_greedy(llm, sharing_prompts()[:1], 24), *greedy(llm, sharing_prompts(), 24)] == plain.sharing
    eventually(lambda: counters(llm)["asked"] == counters(llm)["answered"])
    after = draft.stats()
    assert after.proposals > before.proposals
    assert after.proposals_with_gap == before.proposals_with_gap


@pytest.mark.parametrize("least", [None, 2], ids=["at once", "in turns"])
def test_thousands_of_requests_leave_nothing_behind(llm: Any, draft: Draft, plain: Plain, least: int | None) -> None:
    """Random lengths, aborts, sampling settings and concurrency; no token of a greedy request differs."""
    from tests.vllm.vllm_tools import greedy

    with taking_turns(llm, least):
        fuzz, texts = Fuzz.drawn(), run_fuzz(llm, Fuzz.drawn(), plain)
    for i, text in plain.fuzzed.items():
        seen = texts.get(i, [])
        assert seen == text[: len(seen)]
        assert i in fuzz.doomed or len(seen) == fuzz.lengths[i]
    assert counters(llm)["released"] == 0
    # The next requests tell the draft of those that ended with the last step.
    greedy(llm, [[1, 2, 3]], 2)
    greedy(llm, [[1, 2, 3]], 2)
    assert draft.stats().resident_requests <= 1
    usage = {metric.name: metric for metric in llm.get_metrics()}.get("vllm:kv_cache_usage_perc")
    assert usage is None or usage.value == 0


def run_fuzz(llm: Any, fuzz: Fuzz, plain: Plain) -> dict[int, list[int]]:
    """Tokens of every request, as many as it lived to say."""
    from vllm import SamplingParams

    llm.reset_prefix_cache()
    generator, engine = random.Random(10), llm.llm_engine
    waiting, running, texts = list(range(NUM_FUZZED)), {}, {}
    while waiting or running:
        for _ in range(generator.randint(0, 6)):
            if waiting and len(running) < 48:
                i = waiting.pop()
                sampled = {"temperature": generator.uniform(0.2, 1.5), "top_p": generator.uniform(0.5, 1.0)}
                params = SamplingParams(
                    max_tokens=fuzz.lengths[i],
                    ignore_eos=True,
                    detokenize=False,
                    **({"temperature": 0.0} if i in plain.fuzzed else sampled),
                )
                engine.add_request(f"{i}", {"prompt_token_ids": fuzz.asked[i]}, params)
                running[i] = 0
        for output in engine.step():
            i = int(output.request_id)
            texts[i] = list(output.outputs[0].token_ids)
            if output.finished:
                running.pop(i, None)
        for i in list(running):
            running[i] += 1
            if running[i] == fuzz.doomed.get(i):
                engine.abort_request([f"{i}"])
                del running[i]
    return texts


def test_a_draft_that_stops_dies_and_comes_back_changes_no_token(llm: Any, draft: Draft, plain: Plain) -> None:
    asked = prompts(16, seed=5, longest=40)
    assert fresh_greedy(llm, asked, 180) == plain.long

    def disturb(number: signal.Signals) -> None:
        time.sleep(0.3)
        draft.signal(number)

    for number in (signal.SIGSTOP, signal.SIGKILL):
        answered = counters(llm)["answered"]
        thread = threading.Thread(target=disturb, args=(number,))
        thread.start()
        for _ in range(4):
            assert fresh_greedy(llm, asked, 180) == plain.long
        thread.join()
        assert counters(llm)["answered"] >= answered
        if number == signal.SIGSTOP:
            draft.signal(signal.SIGCONT)
        else:
            draft.process.join(10)
            draft.start()
        eventually(lambda: counters(llm)["is_ready"], 10)
        before = counters(llm)
        assert fresh_greedy(llm, asked, 180) == plain.long
        after = counters(llm)
        assert after["answered"] > before["answered"]
        assert after["released"] == before["released"]
