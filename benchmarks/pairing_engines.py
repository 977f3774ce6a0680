"""vLLM's arguments for the engines of `benchmarks.pairing`."""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.pairing_shapes import SHAPES, K
from engines.draft_arguments import (
    AUX_LAYERS_KEY,
    REMOTE_DRAFT,
    RemoteDraftOptions,
    first_spans,
    graphs_of,
    with_remote_draft,
)

RATE = 0.86
SYNTHETIC = {
    "rejection_sample_method": "synthetic",
    "synthetic_acceptance_rates": [RATE**i for i in range(1, K + 1)],
}
"""Acceptance at each position, whatever is drafted."""
MEMORY_BYTES = 48e9
"""Of an engine: 0.6 of an 80 GB card, so that what the cache holds compares from card to card."""
POLICY = ((1, 16, 15), (17, 4096, 7))
"""K by batch size, the best of vLLM's dynamic ones: its draft does not get cheaper with K."""


def engine_options(arguments: argparse.Namespace, modes: tuple[str, ...]) -> dict[str, Any]:
    """vLLM's arguments."""
    folder, shape, most = arguments.folder, SHAPES[arguments.shape], max(arguments.concurrency)
    options: dict[str, Any] = {
        "model": str(folder / "target"),
        "load_format": "auto" if arguments.tiny else "dummy",
        "skip_tokenizer_init": True,
        "dtype": "float32" if arguments.tiny else "bfloat16",
        "max_model_len": arguments.max_model_len or (512 if arguments.tiny else 2048),
        "max_num_seqs": most,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
    }
    if arguments.tiny:
        options |= {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 28, "max_num_batched_tokens": 512}
    else:
        spans = first_spans(K, most) if modes == ("production",) else POLICY
        ks = {0} if modes == ("target",) else {k for *_, k in spans}
        options |= {
            "gpu_memory_utilization": _share(1.0 if arguments.gpus > 1 else 0.7),
            "max_num_batched_tokens": 8192,
            "compilation_config": graphs_of(most, ks),
        }
    if modes == ("target",):
        return options
    if modes == ("production",):
        remote = RemoteDraftOptions(
            link_file=folder / "link",
            layer_ids=shape.layer_ids,
            num_speculative_tokens=K,
            k_by_batch_size=spans,
        )
        options = with_remote_draft(options, remote, "v2")
        return options | {"speculative_config": options["speculative_config"] | SYNTHETIC}
    speculation: dict[str, Any] = {
        "method": "dflash",
        "model": str(folder / "draft"),
        "num_speculative_tokens": K,
    }
    if not arguments.tiny:
        speculation |= SYNTHETIC
        options["worker_extension_cls"] = "engines.native_switch.SwitchableWorker"
        speculation["num_speculative_tokens_per_batch_size"] = [list(span) for span in POLICY]
    elif modes == ("remote",):
        speculation |= {"method": "custom_class", "model": REMOTE_DRAFT}
        options["hf_overrides"] = {AUX_LAYERS_KEY: [layer + 1 for layer in shape.layer_ids]}
        options["async_scheduling"] = False
    return options | {"speculative_config": speculation}


def k_by_batch_size(batch_size: int) -> int:
    """By `POLICY`."""
    return next(k for first, last, k in POLICY if first <= batch_size <= last)


def _share(part: float) -> float:
    """Of the card, for a part of `MEMORY_BYTES`."""
    from vllm.platforms import current_platform

    return min(0.9, part * MEMORY_BYTES / current_platform.get_device_total_memory())
