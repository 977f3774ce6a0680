"""How a vLLM engine is told of a draft in another process."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.versions import Runner
from unmask.errors import CheckpointError, ConfigError
from unmask.files import write_json

REMOTE_DRAFT = "engines.remote_draft.RemoteDraft"

LINK_FILE_VARIABLE = "VLLM_UNMASK_DRAFT"
"""Names the link file (`unmask.pairing.link_file`); vLLM hands variables of its prefix to all of its workers."""

MAILBOX_FOLDER_VARIABLE = "VLLM_UNMASK_MAILBOXES"
"""Names the folder that a draft on this host serves (`unmask.pairing.mailbox_folder`), in the place of a link file."""

WATCHDOG_VARIABLE = "VLLM_UNMASK_WATCHDOG_MS"
"""Longest wait of a GPU for its draft, in milliseconds."""

EIGHT_BIT_VARIABLE = "VLLM_UNMASK_EIGHT_BIT_ROWS"
"""Set to 1: feature rows lie in the mailbox, and travel, as float8 (e4m3)."""

TURNS_VARIABLE = "VLLM_UNMASK_TURNS_FROM"
"""Running requests from which they take turns (`engines.turns`)."""

WORKER_EXTENSION = "engines.worker_extension.RemoteDraftWorker"

AUX_LAYERS_KEY = "eagle_aux_hidden_state_layer_ids"
"""The layers that the target reports. vLLM's id m is the residual stream before block m: one more than a draft's id."""

_SHAPE = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size", "max_position_embeddings")
_OPTIONAL_SHAPE = ("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "rope_parameters", "torch_dtype")

_FEW, _MANY = 16, 128
_LADDER = (1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256)
"""Batch sizes with graphs of their own."""
_WITH_PROMPTS = (96, 128, 192, 256, 384, 512)
"""Tokens of steps with prompts that have graphs, where those of decoding steps do not reach as far."""
_PROMPTS_BESIDE = (64, 128, 256, 512)
"""Tokens of prompts that a full batch of decoding requests takes beside it within a graph."""

_REQUIRED = {"speculative_config": None, "async_scheduling": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteDraftOptions:
    """A draft that is reached over the wire."""

    link_file: Path
    """See `unmask.pairing.link_file`; it may name no draft yet."""
    layer_ids: tuple[int, ...]
    """The draft's `target_layer_ids`."""
    num_speculative_tokens: int
    """K: the most that is ever asked for; at most the draft's block size - 1."""
    mailbox_folder: Path | None = None
    """On a GPU: the folder that a draft on this host serves. None reaches the link file's drafts through a sidecar."""
    timeout_ms: float | None = None
    """How long a step waits for its draft; on a GPU its watchdog lets it go a little later. None is its own limit."""
    eight_bit_rows: bool = False
    """On a GPU: see `EIGHT_BIT_VARIABLE`."""
    turns_from: int | None = None
    """On a GPU: see `TURNS_VARIABLE`; None is never."""
    k_by_batch_size: tuple[tuple[int, int, int], ...] = ()
    """On a GPU: (first, last batch size, K), ascending from 1; graphs are made for each of these K. The scheduler and
    the draft both go by it until `LoadWatch` has measured what these K are worth. Empty is `num_speculative_tokens`
    throughout."""


def with_remote_draft(arguments: dict[str, Any], draft: RemoteDraftOptions, runner: Runner = "v1") -> dict[str, Any]:
    """Engine arguments with a remote draft added.

    Prefix caching is off unless it is asked for. The draft keeps the context of cached prefixes too, by hash; with the
    V2 runner, whose host does not know generated tokens in time, that of prompts and of what precedes a preemption.

    Raises:
        ConfigError: an argument contradicts the draft.
        CheckpointError: with the V2 runner, the target's configuration cannot be read.
    """
    if runner == "v2":
        return _with_speculator(arguments, draft)
    for name, required in _REQUIRED.items():
        if arguments.get(name, required) != required:
            raise ConfigError(f"must be {required} with a remote draft; remove it", field=f"target.engine.{name}")
    overrides: dict[str, Any] = arguments.get("hf_overrides", {})
    return arguments | {
        "speculative_config": {
            "method": "custom_class",
            "model": REMOTE_DRAFT,
            "num_speculative_tokens": draft.num_speculative_tokens,
        },
        "hf_overrides": overrides | {AUX_LAYERS_KEY: [layer + 1 for layer in draft.layer_ids]},
        "enable_prefix_caching": arguments.get("enable_prefix_caching", False),
        "async_scheduling": False,
    }


def _with_speculator(arguments: dict[str, Any], draft: RemoteDraftOptions) -> dict[str, Any]:
    """The same for the V2 runner, which is told of a draft of vLLM's own kind and never loads it."""
    for name in ("speculative_config", "worker_extension_cls"):
        if name in arguments:
            raise ConfigError("must not be set with a remote draft; remove it", field=f"target.engine.{name}")
    if draft.turns_from is not None:
        _check_turns(arguments, draft.turns_from)
    folder = draft.link_file.absolute().parent / f"{draft.link_file.stem}_shape"
    write_draft_shape(folder, Path(arguments["model"]), draft.layer_ids)
    speculation: dict[str, Any] = {
        "method": "dflash",
        "model": str(folder),
        "num_speculative_tokens": draft.num_speculative_tokens,
    }
    if "compilation_config" not in arguments and not arguments.get("enforce_eager") and "max_num_seqs" in arguments:
        ks = {k for *_, k in draft.k_by_batch_size} or {draft.num_speculative_tokens}
        arguments = arguments | {"compilation_config": graphs_of(arguments["max_num_seqs"], ks)}
    if draft.k_by_batch_size:
        speculation["num_speculative_tokens_per_batch_size"] = [list(span) for span in draft.k_by_batch_size]
    return arguments | {
        "speculative_config": speculation,
        "worker_extension_cls": WORKER_EXTENSION,
        "enable_prefix_caching": arguments.get("enable_prefix_caching", False),
    }


def _check_turns(arguments: dict[str, Any], turns_from: int) -> None:
    world_size = arguments.get("tensor_parallel_size", 1) * arguments.get("pipeline_parallel_size", 1)
    # Elsewhere the scheduler is in another process than the one that knows the draft.
    is_one_process = world_size == 1 and arguments.get("distributed_executor_backend", "uni") == "uni"
    if not is_one_process or not arguments.get("async_scheduling", True):
        reason = "needs asynchronous scheduling and a target of one process; leave it out"
        raise ConfigError(reason, field="serve.turns_from")
    most = arguments.get("max_num_seqs", turns_from)
    if turns_from > most:
        raise ConfigError(f"must be at most {most}, the requests that run at once", field="serve.turns_from")


def first_spans(k: int, max_num_seqs: int) -> tuple[tuple[int, int, int], ...]:
    """K by batch size before anything has been measured: less of it for larger batches.

    A full batch gets the least, be it ever so small: a K that no span names has no graphs and can never be chosen.
    """
    few = max(min(_FEW, max_num_seqs - 2), 1)
    many = max(min(_MANY, max_num_seqs - 1), few)
    spans = ((1, few, k), (few + 1, many, max(k // 2, 1)), (many + 1, max_num_seqs, max(k // 4, 1)))
    return tuple((first, last, k) for first, last, k in spans if first <= last)


def graphs_of(max_num_seqs: int, ks: Collection[int]) -> dict[str, Any]:
    """vLLM's `compilation_config` with a CUDA graph for every step of up to `max_num_seqs` requests that verifies one
    of these K, and graphs between attention calls for steps that hold prompts beside them: launched one by one, the
    kernels of these steps would take longer than they run. vLLM by itself makes none beyond 512 tokens."""
    batches = [n for n in _LADDER if n < max_num_seqs] + [max_num_seqs]
    decoding = sorted({n * (k + 1) for n in batches for k in ks})
    mixed = {*_WITH_PROMPTS, *(decoding[-1] + tokens for tokens in _PROMPTS_BESIDE)}
    sizes = decoding + sorted(size for size in mixed if size > decoding[-1])
    # Without a largest one: vLLM drops those that no step of the engine can reach, and refuses one that was among them.
    return {"cudagraph_mode": "FULL_AND_PIECEWISE", "cudagraph_capture_sizes": sizes}


def write_draft_shape(folder: Path, target: Path, layer_ids: tuple[int, ...]) -> None:
    """A configuration from which vLLM learns which layers a target reports. No weights: none are loaded.

    Raises:
        CheckpointError: the target has no readable configuration.
    """
    try:
        tree: dict[str, Any] = json.loads((target / "config.json").read_text())
        shape = {name: tree[name] for name in _SHAPE}
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"cannot read '{target}/config.json': {error}", field="target.model") from None
    shape |= {name: tree[name] for name in _OPTIONAL_SHAPE if name in tree}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(
        folder / "config.json",
        shape
        | {
            "architectures": ["DFlashDraftModel"],
            "model_type": "qwen3",
            "num_hidden_layers": 1,
            "dflash_config": {"target_layer_ids": list(layer_ids), "mask_token_id": 0},
        },
    )
