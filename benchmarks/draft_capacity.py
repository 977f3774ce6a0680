"""How many targets one draft can feed: synthetic target-side traffic of N targets against one draft server.

    python -m benchmarks.draft_capacity --out benchmarks/results/draft_capacity.json     (one GPU)
    python -m benchmarks.draft_capacity --tiny --out /tmp/capacity.json                  (any machine)

A target is a process that sleeps for a target's forward and then asks for the proposals of all its requests over a
Unix socket, as a target worker does; drafts are accepted at random with r_k = rate^k. The draft has the shape of
Qwen3-8B's (5 layers, random weights). What a target waits is measured; its forward's time is given, by default as
measured on an H100 with 32 requests and K = 15, and so is the step of a replica that drafts for itself, to compare
N + 1 of those with N targets and one draft.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import queue
import tempfile
import time
from dataclasses import asdict, dataclass
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.demo import machine
from unmask.models.dflash import DFlashConfig, DFlashDraft, spread_layer_ids
from unmask.pairing.channel import Channel
from unmask.pairing.draft_engine import DraftEngine
from unmask.pairing.graphed_blocks import LADDER, ROW_LADDER, GraphedBlocks
from unmask.pairing.handshake import authenticate_as_target
from unmask.pairing.hello import decode_hello
from unmask.pairing.server import DraftServer
from unmask.pairing.wire import MAX_MESSAGE_BYTES, Kind, Step, decode_proposals, encode_step, pack_rows
from unmask.types import ProposalRow

SECRET = b"a benchmark of one machine, 0123"
SHAPES = {
    "qwen3-8b": {"hidden": 4096, "intermediate": 12288, "layers": 5, "heads": 32, "kv_heads": 8, "vocab": 151936},
    "tiny": {"hidden": 64, "intermediate": 128, "layers": 2, "heads": 4, "kv_heads": 2, "vocab": 500},
}
HEAD_DIMS = {"qwen3-8b": 128, "tiny": 16}
WARM_UP_SHARE = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """One target's requests."""

    requests: int
    k: int
    rate: float
    verify_ms: float
    prompt_tokens: int
    response_tokens: int
    seconds: float


class Requests:
    """Positions of a target's requests from step to step; one that is done is followed by a new one."""

    def __init__(self, traffic: Traffic, seed: int) -> None:
        self.traffic = traffic
        self.generator = np.random.default_rng(seed)
        self.next_number = 0
        self.rows: list[ProposalRow] = []
        self.left = np.zeros(traffic.requests, dtype=np.int64)
        self.emitted = 0

    def step(self) -> tuple[list[ProposalRow], list[int]]:
        """Rows of the next step, and the requests that ended with the last one."""
        finished = [row.request for row, left in zip(self.rows, self.left, strict=False) if left <= 0]
        rows = []
        for i in range(self.traffic.requests):
            if not self.rows or self.left[i] <= 0:
                rows.append(self._new(i))
                continue
            hits = self.generator.random(self.traffic.k) < self.traffic.rate
            gained = 1 + int(np.cumprod(hits).sum())
            self.left[i] -= gained
            self.emitted += gained
            before = self.rows[i]
            rows.append(
                ProposalRow(
                    request=before.request,
                    start=before.start + before.num_features,
                    num_features=gained,
                    last_token=1,
                )
            )
        self.rows = rows
        return rows, finished

    def _new(self, i: int) -> ProposalRow:
        # The first responses are cut short, so that requests do not end all at once.
        share = self.generator.random() if not self.rows else 1.0
        self.left[i] = max(1, int(self.traffic.response_tokens * share))
        self.next_number += 1
        return ProposalRow(request=self.next_number, start=0, num_features=self.traffic.prompt_tokens, last_token=1)


def run_target(address: str, traffic: Traffic, seed: int, begin: Event, results: multiprocessing.Queue) -> None:
    """One target: forward, ask, and so on; reports each exchange's milliseconds and the tokens a second."""
    torch.set_num_threads(1)
    channel = Channel.connect(address, time.monotonic() + 60)
    authenticate_as_target(channel, SECRET, time.monotonic() + 60)
    hello = decode_hello(channel.receive([Kind.HELLO], MAX_MESSAGE_BYTES)[1])
    weight = hello.projection.fc
    rows = traffic.requests * max(traffic.prompt_tokens, traffic.k + 1)
    features = torch.randn(rows, weight.shape[0], generator=torch.Generator().manual_seed(seed)).to(weight.dtype)
    requests, waits, tokens = Requests(traffic, seed), [], 0
    results.put("ready")
    begin.wait()
    started = time.monotonic()
    warm, end = started + WARM_UP_SHARE * traffic.seconds, started + traffic.seconds
    asked, number = started, 0
    while asked < end:
        before, number = requests.emitted, number + 1
        proposal_rows, finished = requests.step()
        step = Step(
            draft_version=hello.draft_version,
            epoch=seed,
            number=number,
            num_speculative_tokens=traffic.k,
            rows=pack_rows(proposal_rows),
            features=features[: sum(row.num_features for row in proposal_rows)],
            finished=np.array(finished, dtype="<u8"),
        )
        # The forward's time, less what it took to make up the next rows.
        time.sleep(max(0.0, asked + traffic.verify_ms / 1000 - time.monotonic()))
        asked = time.monotonic()
        channel.send(Kind.STEP, encode_step(step), end + 60)
        payload = channel.receive([Kind.PROPOSALS], MAX_MESSAGE_BYTES, end + 60)[1]
        counts = decode_proposals(payload, step, hello.vocab_size).counts
        answered = time.monotonic()
        assert (counts == traffic.k).all()
        if asked > warm:
            waits.append(1000 * (answered - asked))
            tokens += requests.emitted - before
        asked = answered
    results.put((waits, tokens / (end - warm)))


def measure(server: DraftServer, num_targets: int, traffic: Traffic) -> dict[str, Any]:
    """Let N targets run for a while."""
    context = multiprocessing.get_context("spawn")
    begin, results = context.Event(), context.Queue()
    arguments = [(server.address, traffic, 1 + i, begin, results) for i in range(num_targets)]
    targets = [context.Process(target=run_target, args=a, daemon=True) for a in arguments]
    for process in targets:
        process.start()
    for _ in targets:
        _next(results, targets)
    before = server.stats()
    began = time.monotonic()
    begin.set()
    reports = [_next(results, targets) for _ in targets]
    seconds, after = time.monotonic() - began, server.stats()
    for process in targets:
        process.join()
    while server.stats().connections:
        time.sleep(0.01)
    waits = np.concatenate([waits for waits, _ in reports])
    steps = after.steps - before.steps
    return {
        "targets": num_targets,
        "wait_ms": round(float(np.median(waits)), 3),
        "wait_ms_mean": round(float(waits.mean()), 3),
        "wait_ms_p99": round(float(np.quantile(waits, 0.99)), 3),
        "draft_busy_share": round((after.busy_s - before.busy_s) / seconds, 3),
        "draft_step_ms": round(1000 * (after.busy_s - before.busy_s) / max(steps, 1), 3),
        "targets_per_draft_step": round((after.messages - before.messages) / max(steps, 1), 2),
        "tokens_per_second": round(sum(rate for _, rate in reports), 1),
    }


def parts(server: DraftServer, hidden: int, k: int) -> list[dict[str, Any]]:
    """What a draft step takes without any transport, by requests: in all, and on the GPU alone."""
    engine, rows = server._engine, []
    for requests in (1, 32, 64, 128):
        features = torch.randn(requests * 7, hidden).to(engine.weights.dtype)
        seconds, gpu = [], []
        for number in range(25):
            step = Step(
                draft_version=engine.version,
                epoch=0,
                number=number,
                num_speculative_tokens=k,
                rows=pack_rows(
                    [ProposalRow(request=i, start=7 * number, num_features=7, last_token=1) for i in range(requests)]
                ),
                features=features,
                finished=np.empty(0, "<u8"),
            )
            began = time.perf_counter()
            engine.step([(-1, step)])
            seconds.append(time.perf_counter() - began)
            gpu.append(_replay_ms(engine, requests, k))
        engine.close_session(-1)
        row = {"requests": requests, "step_ms": round(1000 * float(np.median(seconds[5:])), 3)}
        rows.append(row | {name: round(float(np.median([g[name] for g in gpu])), 3) for name in gpu[0]})
    return rows


def _replay_ms(engine: DraftEngine, requests: int, k: int) -> dict[str, float]:
    """Milliseconds of the graphs that a step of these requests replays; nothing without graphs."""
    blocks = engine._blocks
    if not isinstance(blocks, GraphedBlocks):
        return {}
    batch, rows = next(b for b in LADDER if b >= requests), next(r for r in ROW_LADDER if r >= 7 * requests)
    graphs = {"append_graph_ms": blocks._append_graphs[rows], "block_graph_ms": blocks._graphs[batch, k][0]}
    found = {}
    for name, graph in graphs.items():
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        found[name] = begin.elapsed_time(end)
    return found


def _next(results: multiprocessing.Queue, processes: list) -> Any:
    """The next report; RuntimeError if a target has died."""
    while True:
        try:
            return results.get(timeout=1)
        except queue.Empty:
            if any(process.exitcode for process in processes):
                raise RuntimeError("a target process has died") from None


def new_server(shape: str, device: str, memory_mb: float, address: str, k: int) -> DraftServer:
    """A draft of a shape with random weights."""
    sizes, dtype = SHAPES[shape], torch.bfloat16 if device == "cuda" else torch.float32
    config = DFlashConfig(
        hidden_size=sizes["hidden"],
        intermediate_size=sizes["intermediate"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["kv_heads"],
        head_dim=HEAD_DIMS[shape],
        vocab_size=sizes["vocab"],
        max_position_embeddings=4096,
        block_size=16,
        mask_token_id=sizes["vocab"] - 1,
        num_target_layers=36,
        target_layer_ids=spread_layer_ids(36, 5),
    )
    with torch.device(device):
        draft = DFlashDraft(config).to(dtype).requires_grad_(False)
        tables = [torch.randn(sizes["vocab"], sizes["hidden"], dtype=dtype) for _ in range(2)]
    server = DraftServer(draft, *tables, SECRET, host=address, memory_mb=memory_mb, graph_ks=[k])
    server.start()
    return server


def main() -> None:
    """Measure, and write the rows beside what they depend on."""
    arguments = _parse()
    shape = "tiny" if arguments.tiny else "qwen3-8b"
    device = "cuda" if torch.cuda.is_available() and not arguments.tiny else "cpu"
    traffic = Traffic(
        requests=4 if arguments.tiny else arguments.requests,
        k=arguments.k,
        rate=arguments.rate,
        verify_ms=arguments.verify_ms,
        prompt_tokens=128,
        response_tokens=512,
        seconds=arguments.seconds,
    )
    native = _tokens_a_step(traffic) * 1000 / arguments.native_step_ms
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        server = new_server(shape, device, arguments.memory_mb, f"unix:{folder}/draft", traffic.k)
        by_part = parts(server, SHAPES[shape]["hidden"], traffic.k)
        print(json.dumps(by_part), flush=True)
        for num_targets in arguments.targets:
            row = measure(server, num_targets, traffic)
            period = traffic.verify_ms + (rows[0] if rows else row)["wait_ms_mean"]
            row["added_wait_ms"] = round(row["wait_ms_mean"] + traffic.verify_ms - period, 3)
            row["added_wait_share_of_step"] = round(row["added_wait_ms"] / period, 4)
            row["tokens_per_second_per_gpu"] = round(row["tokens_per_second"] / (num_targets + 1), 1)
            row["tokens_per_second_per_gpu_drafting_for_itself"] = round(native, 1)
            rows.append(row)
            print(json.dumps(row), flush=True)
        server.stop()
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    tree = {
        "command": "python -m benchmarks.draft_capacity" + (" --tiny" if arguments.tiny else ""),
        "machine": {**machine(), "gpu": gpu, "torch": torch.__version__, "host": platform.machine()},
        "shape": shape,
        "traffic": asdict(traffic),
        "native_step_ms": arguments.native_step_ms,
        "draft_step": by_part,
        "rows": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(tree, indent=2) + "\n")


def _tokens_a_step(traffic: Traffic) -> float:
    return traffic.requests * sum(traffic.rate**k for k in range(traffic.k + 1))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small draft on the CPU: shows that it runs")
    parser.add_argument("--targets", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--requests", type=int, default=32, help="of each target")
    parser.add_argument("--k", type=int, default=15)
    parser.add_argument("--rate", type=float, default=0.86, help="chance that a draft is accepted, given those before")
    parser.add_argument("--verify-ms", type=float, default=12.54, help="a target's forward")
    parser.add_argument("--native-step-ms", type=float, default=15.26, help="a step of a replica with its own draft")
    parser.add_argument("--seconds", type=float, default=6.0, help="for each number of targets")
    parser.add_argument("--memory-mb", type=float, default=8192)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
