"""Tokens per second of the diffusion engine beside a plain loop that mirrors the released codes, on random weights.

    python -m benchmarks.diffusion_throughput --out benchmarks/results/diffusion_throughput.json

Random weights are never certain: no threshold is ever met, and every forward commits the one token that it must. The
work for a token is thus the same in engine and loop, and only the system differs. (D2F's blocks overlap by a token or
two; `tokens_per_forward` says by how much.) Rows have the released settings' sizes: a response of 256 columns in
blocks of 32, after a prompt of 128.

`plain_loop` is batch 1, feeds the whole row, computes the logits of every column in float64, and tests each open
column on the host, as the authors' loops do. `gpu_busy` is the time in which kernels ran over the wall time, in steady
state: kernels are counted by the profiler over `PROFILED` steps in the middle, the wall time is that of an undisturbed
run. Decoders that feed whole rows decode only the end of the response, since each of their forwards costs the same.
`--tiny` proves the script on a CPU; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from unmask.decoding.engine import DiffusionEngine, EngineConfig
from unmask.decoding.registry import build_decoder
from unmask.decoding.request import DecodeRequest
from unmask.masking.attention import Full
from unmask.models import llada
from unmask.models.transformer import DiffusionLM
from unmask.types import SamplingOptions

_COMMON = {"model_type": "llada", "eos_token_id": 1, "mask_token_id": 0, "max_sequence_length": 1024}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"d_model": 64, "n_layers": 2, "n_heads": 4, "mlp_hidden_size": 128, "vocab_size": 128},
    "135m": {
        "d_model": 576, "n_layers": 30, "n_heads": 9, "n_kv_heads": 3, "mlp_hidden_size": 1536, "vocab_size": 49152,
        "weight_tying": True,
    },
    "8b": {"d_model": 4096, "n_layers": 32, "n_heads": 32, "mlp_hidden_size": 12288, "vocab_size": 126464},
}  # fmt: skip
BLOCK = 32
PROFILED = BLOCK
"""A block: decoders that refresh their cache do so once in it."""


@dataclass(frozen=True, slots=True)
class Case:
    """One decoder at one batch size."""

    decoder: str
    settings: dict[str, Any]
    batch: int
    decoded: int | None = None
    """Tokens at the end of the response that are decoded; None decodes all."""


@dataclass(frozen=True, slots=True)
class Load:
    """The columns of a row."""

    prompt: int = 128
    response: int = 256

    def requests(self, case: Case, vocab_size: int, tag: str) -> list[DecodeRequest]:
        """Rows of equal length, so that all of them run from the first forward to the last."""
        generator = torch.Generator().manual_seed(0)
        known = self.response - (case.decoded or self.response)
        ids = torch.randint(2, vocab_size, (case.batch, self.prompt + known), generator=generator).tolist()
        options = SamplingOptions(max_tokens=self.response, ignore_eos=True)
        return [
            DecodeRequest(
                request_id=f"{tag}{index}",
                prompt_ids=tuple(row[: self.prompt]),
                prefix=tuple(row[self.prompt :]),
                options=options,
            )
            for index, row in enumerate(ids)
        ]


@dataclass(frozen=True, slots=True)
class Figures:
    """What one measurement found."""

    tokens_per_second: float
    gpu_busy: float | None
    tokens_per_forward: float
    step_ms: float


def cases(shape: str) -> list[Case]:
    """The most telling first: what is left when the time is up is named."""
    block = {"block_size": BLOCK}
    cached = {
        "d2f": {"name": "d2f", **block},
        "dparallel_dual": {"name": "dparallel", "cache": "dual", **block},
        "threshold_dual": {"name": "threshold", "cache": "dual", **block},
    }
    whole = {"dparallel": {"name": "dparallel", **block}}
    # Few columns a step, all of them new: what batches best.
    cached["d2f_16"] = {"name": "d2f", "block_size": 16, "tau_add": 1.0}
    table = [Case(name, settings, batch) for name, settings in cached.items() for batch in (1, 32)]
    table += [Case(name, s, batch, BLOCK if batch == 1 else 8) for name, s in whole.items() for batch in (1, 32)]
    if shape == "8b":
        # A whole row of 32 requests is far past the ridge of the roofline: it says nothing of the engine.
        table = [
            case
            for case in table
            if case.decoder != "threshold_dual" and (case.batch == 1 or case.decoder != "dparallel")
        ]
    else:
        table += [Case(name, settings, 64) for name, settings in cached.items()]
        table += [Case(name, settings, 64, 8) for name, settings in whole.items()]
    return table


def random_network(shape: str, device: str) -> DiffusionLM:
    """Weights drawn on the device."""
    torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
    with torch.device(device):
        network = DiffusionLM(llada.parse({**_COMMON, **SHAPES[shape]}))
    torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=0.02)
    # Tables that do not come from the device, such as those of the rotary embedding, lie on the host.
    return network.to(device).requires_grad_(False).eval()


def engine_figures(network: DiffusionLM, case: Case, load: Load) -> Figures:
    """The engine's; its graphs are captured by a run before."""
    block_causal = case.settings["name"] == "d2f"
    network.config = dataclasses.replace(
        network.config,
        attention="block_causal" if block_causal else "bidirectional",
        block_size=case.settings["block_size"] if block_causal else None,
    )
    decoder = build_decoder(case.settings, network)
    length = load.prompt + load.response
    config = EngineConfig(
        max_rows=case.batch,
        max_length=length,
        max_fed_columns=case.batch * length,
        max_logits_mb=4096,
        cuda_graphs=network.device.type == "cuda",
    )
    engine = DiffusionEngine(decoder.cached_models, config)

    def submit(tag: str) -> list[str]:
        requests = load.requests(case, network.vocab_size, tag)
        for request in requests:
            engine.submit(request, decoder)
        return [request.request_id for request in requests]

    def finish() -> int:
        before = engine.num_steps
        while engine.has_work:
            engine.step()
        return engine.num_steps - before

    submit("warm")
    finish()
    submit("timed")
    seconds, steps = timed(network, finish)
    names = submit("profiled")
    for _ in range(min(steps // 2, steps - 1)):
        engine.step()
    span = min(PROFILED, steps - steps // 2)
    kernels = kernel_seconds(network, lambda: [engine.step() for _ in range(span)])
    for name in names:
        engine.abort(name)
    tokens = case.batch * (case.decoded or load.response)
    busy = None if kernels is None else min(1.0, kernels / span / (seconds / steps))
    return Figures(tokens / seconds, busy, tokens / case.batch / steps, 1e3 * seconds / steps)


@torch.inference_mode()
def plain_loop(network: DiffusionLM, request: DecodeRequest, threshold: float = 0.5) -> None:
    """dParallel's decoder as released: whole rows, all logits, one host test a token."""
    known = [*request.prompt_ids, *request.prefix]
    ids = torch.full((1, request.length), network.mask_id or 0, device=network.device)
    ids[0, : len(known)] = torch.tensor(known, device=network.device)
    positions = torch.arange(request.length, device=network.device)[None]
    for start in range(len(request.prompt_ids), request.length, BLOCK):
        stop = min(start + BLOCK, request.length)
        while (ids[:, start:stop] == network.mask_id).any():
            logits = network(ids, positions, mask=Full())
            masked = ids == network.mask_id
            masked[:, stop:] = False
            probabilities = logits.to(torch.float64).softmax(-1)
            entropy = -(probabilities * (probabilities + 1e-12).log()).sum(-1)
            entropy = entropy.masked_fill(~masked, torch.inf)
            chosen = logits[..., 1:].argmax(-1) + 1  # any token but the mask, which has id 0
            order = entropy[0].argsort()[: int(masked.sum())]
            for rank, column in enumerate(order):
                if rank and entropy[0, column] > threshold:
                    break
                ids[0, column] = chosen[0, column]


def plain_figures(network: DiffusionLM, load: Load) -> Figures:
    """The plain loop's."""
    case = Case("dparallel", {}, 1, BLOCK)
    (request,) = load.requests(case, network.vocab_size, "plain")
    plain_loop(network, request)
    seconds, _ = timed(network, lambda: plain_loop(network, request))
    kernels = kernel_seconds(network, lambda: plain_loop(network, request))
    busy = None if kernels is None else min(1.0, kernels / seconds)
    return Figures(BLOCK / seconds, busy, 1.0, 1e3 * seconds / BLOCK)


def timed(network: DiffusionLM, work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that some work takes, and its result."""
    synchronise(network)
    start = time.perf_counter()
    result = work()
    synchronise(network)
    return time.perf_counter() - start, result


def kernel_seconds(network: DiffusionLM, work: Callable[[], Any]) -> float | None:
    """Time that kernels ran (one stream: they never overlap), by the profiler; None on a CPU."""
    if network.device.type != "cuda":
        work()
        return None
    synchronise(network)
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        work()
        synchronise(network)
    return sum(event.self_device_time_total for event in profiler.key_averages()) / 1e6


def synchronise(network: DiffusionLM) -> None:
    """Wait for the device."""
    if network.device.type == "cuda":
        torch.cuda.synchronize()


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """How batch 32 compares with batch 1, and batch 1 with the plain loop."""
    speed = {(row["shape"], row["engine"], row["decoder"], row["batch"]): row["tokens_per_second"] for row in rows}
    lines = []
    for (shape, engine, decoder, batch), figure in speed.items():
        if engine == "ours" and batch == 1:
            loop = speed.get((shape, "plain_loop", "dparallel", 1))
            many = speed.get((shape, engine, decoder, 32))
            against = "" if loop is None else f"{figure / loop:5.2f} x the plain loop"
            grown = "" if many is None else f"batch 32: {many / figure:5.1f} x batch 1"
            lines.append(f"{shape:>5} {decoder:<15} {against}  {grown}")
    return lines


def main() -> None:
    """Measure every shape, decoder and batch; rows are written as they come."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the rows")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["135m", "8b"])
    parser.add_argument(
        "--seconds", type=float, default=165, help="of each shape: begin no measurement after this time"
    )
    parser.add_argument("--tiny", action="store_true", help="a small network on a CPU")
    options = parser.parse_args()
    device = "cpu" if options.tiny else "cuda"
    load = Load(prompt=16, response=64) if options.tiny else Load()
    gpu = "cpu" if options.tiny else torch.cuda.get_device_name()
    rows: list[dict[str, Any]] = json.loads(options.out.read_text()) if options.out.is_file() else []

    def add(shape: str, engine: str, decoder: str, batch: int, figures: Figures) -> None:
        rows.append({"engine": engine, "decoder": decoder, "shape": shape, "batch": batch, **asdict(figures),
                     **asdict(load), "gpu": gpu})  # fmt: skip
        busy = "  -  " if figures.gpu_busy is None else f"{figures.gpu_busy:5.2f}"
        line = f"{shape:>5} {engine:<10} {decoder:<15} batch {batch:<3} {figures.tokens_per_second:9.1f} tokens/s"
        print(f"{line}  step {figures.step_ms:8.2f} ms  busy {busy}", flush=True)
        options.out.write_text(json.dumps(rows, indent=1) + "\n")

    for shape in ["tiny"] if options.tiny else options.shapes:
        begun = time.monotonic()
        rows[:] = [row for row in rows if row["shape"] != shape]
        network = random_network(shape, device)
        add(shape, "plain_loop", "dparallel", 1, plain_figures(network, load))
        table = cases(shape)
        for case in itertools.islice(table, 4) if options.tiny else table:
            if time.monotonic() - begun > options.seconds:
                print(f"{shape:>5} {case.decoder} batch {case.batch}: left out, the time is up", flush=True)
                continue
            add(shape, "ours", case.decoder, case.batch, engine_figures(network, case, load))
            if device == "cuda":
                torch.cuda.empty_cache()
        del network
    print("\n".join(summary(rows)))


if __name__ == "__main__":
    main()
