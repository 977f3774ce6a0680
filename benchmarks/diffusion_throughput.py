"""Tokens per second of the diffusion engine beside a plain loop that mirrors the released codes, on random weights.

    python -m benchmarks.diffusion_throughput --out benchmarks/results/diffusion_throughput.json

Random weights are never certain, so every forward commits exactly one token a row in every decoder: engine and loop do
the same work for a token, and only the system differs. `plain_loop` is batch 1, feeds the whole row, computes the
logits of every column, and tests each open column's entropy on the host, as the authors' loops do. `gpu_busy` is the
share of wall time in which a kernel ran. `--tiny` proves the script on a CPU.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
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
DECODERS: dict[str, dict[str, Any]] = {
    "dparallel": {"name": "dparallel", "block_size": BLOCK},
    "dparallel_dual": {"name": "dparallel", "block_size": BLOCK, "cache": "dual"},
    "d2f": {"name": "d2f", "block_size": BLOCK},
}


@dataclass(frozen=True, slots=True)
class Load:
    """Rows of one measurement."""

    prompt: int
    response: int

    def requests(self, batch: int, vocab_size: int, tag: str) -> list[DecodeRequest]:
        """Rows of equal length, so that all of them run from the first forward to the last."""
        generator = torch.Generator().manual_seed(0)
        options = SamplingOptions(max_tokens=self.response, ignore_eos=True)
        ids = torch.randint(2, vocab_size, (batch, self.prompt), generator=generator).tolist()
        return [
            DecodeRequest(request_id=f"{tag}{i}", prompt_ids=tuple(row), options=options) for i, row in enumerate(ids)
        ]


LOADS = {"tiny": Load(16, 64), "135m": Load(64, 128), "8b": Load(64, 64)}


def random_network(shape: str, device: str, attention: str = "bidirectional") -> DiffusionLM:
    """Weights drawn on the device; a block-causal network for D2F."""
    section = {"attention": attention, "block_size": BLOCK if attention == "block_causal" else None}
    config = llada.parse({**_COMMON, **SHAPES[shape], "unmask": section})
    torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
    with torch.device(device):
        network = DiffusionLM(config)
    torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=0.02)
    return network.to(device).requires_grad_(False).eval()


def engine_speed(network: DiffusionLM, decoder_name: str, batch: int, load: Load) -> tuple[float, float]:
    """(tokens per second, GPU busy share) of the engine, its graphs captured by an earlier pass."""
    on_gpu = network.device.type == "cuda"
    decoder = build_decoder(DECODERS[decoder_name], network)
    length = load.prompt + load.response
    config = EngineConfig(
        max_rows=batch, max_length=length, max_fed_columns=batch * length, max_logits_mb=4096, cuda_graphs=on_gpu
    )
    engine = DiffusionEngine(decoder.cached_models, config)
    list(engine.run(load.requests(batch, network.vocab_size, "warm"), decoder))
    requests = load.requests(batch, network.vocab_size, "run")
    return measured(lambda: list(engine.run(requests, decoder)), batch * load.response, on_gpu)


@torch.inference_mode()
def plain_loop(network: DiffusionLM, prompt: Sequence[int], response: int, threshold: float = 0.5) -> list[int]:
    """dParallel's decoder at batch 1 as released: whole rows, all logits, one host test a token."""
    device = network.device
    ids = torch.full((1, len(prompt) + response), network.mask_id or 0, device=device)
    ids[0, : len(prompt)] = torch.tensor(prompt, device=device)
    positions = torch.arange(ids.shape[1], device=device)[None]
    for start in range(len(prompt), ids.shape[1], BLOCK):
        stop = min(start + BLOCK, ids.shape[1])
        while (ids[:, start:stop] == network.mask_id).any():
            logits = network(ids, positions, mask=Full())
            logits[..., network.mask_id] = -torch.inf
            masked = ids == network.mask_id
            masked[:, stop:] = False
            probabilities = logits.to(torch.float64).softmax(-1)
            entropy = torch.special.entr(probabilities).sum(-1).masked_fill(~masked, torch.inf)
            chosen = logits.argmax(-1)
            order = entropy[0].argsort()[: int(masked.sum())]
            for rank, column in enumerate(order.tolist()):
                if rank and entropy[0, column] > threshold:
                    break
                ids[0, column] = chosen[0, column]
    return ids[0, len(prompt) :].tolist()


def plain_speed(network: DiffusionLM, load: Load) -> tuple[float, float]:
    """(tokens per second, GPU busy share) of the plain loop."""
    request = load.requests(1, network.vocab_size, "plain")[0]
    plain_loop(network, request.prompt_ids, min(BLOCK, load.response))
    on_gpu = network.device.type == "cuda"
    return measured(lambda: plain_loop(network, request.prompt_ids, load.response), load.response, on_gpu)


def measured(work: Callable[[], object], tokens: int, on_gpu: bool) -> tuple[float, float]:
    """Time one pass, then profile a second one for the time in kernels (profiling slows the host)."""
    synchronise = torch.cuda.synchronize if on_gpu else lambda: None
    synchronise()
    start = time.monotonic()
    work()
    synchronise()
    seconds = time.monotonic() - start
    if not on_gpu:
        return tokens / seconds, 0.0
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        work()
        synchronise()
    busy = sum(event.self_device_time_total for event in profiler.key_averages()) / 1e6
    return tokens / seconds, min(busy / seconds, 1.0)


def main() -> None:
    """Measure every shape, decoder and batch; rows are written as they come."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the rows")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["135m", "8b"])
    parser.add_argument("--tiny", action="store_true", help="a small network on a CPU")
    options = parser.parse_args()
    device = "cpu" if options.tiny else "cuda"
    gpu = "cpu" if options.tiny else torch.cuda.get_device_name()
    rows: list[dict[str, Any]] = []

    def add(shape: str, engine: str, decoder: str, batch: int, figures: tuple[float, float]) -> None:
        speed, busy = figures
        rows.append({
            "engine": engine, "decoder": decoder, "shape": shape, "batch": batch, "tokens_per_second": speed,
            "gpu_busy": busy, **asdict(LOADS[shape]), "gpu": gpu,
        })  # fmt: skip
        print(
            f"{shape:>5} {engine:<10} {decoder:<15} batch {batch:<3} {speed:9.1f} tokens/s  busy {busy:.2f}", flush=True
        )
        options.out.write_text(json.dumps(rows, indent=1) + "\n")

    for shape in ["tiny"] if options.tiny else options.shapes:
        load = LOADS[shape]
        for attention, names in (("bidirectional", ("dparallel", "dparallel_dual")), ("block_causal", ("d2f",))):
            network = random_network(shape, device, attention)
            if attention == "bidirectional":
                add(shape, "plain_loop", "dparallel", 1, plain_speed(network, load))
            for decoder in names:
                for batch in (1, 32):
                    add(shape, "ours", decoder, batch, engine_speed(network, decoder, batch, load))
            del network
            if device == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
