"""vLLM engine options: what a recipe may pass through, and what the recipe's own fields decide."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unmask.config import TargetConfig
from unmask.errors import ConfigError, nearest
from unmask.hardware import multiplies_bfloat16

_DECIDED_ELSEWHERE = {
    "model": "target.model",
    "revision": "target.revision",
    "max_model_len": "target.max_model_len",
    "dtype": "the dtype of the section that runs the engine",
    "tokenizer": "target.model",
    "load_format": "Unmask, which reads safetensors only",
    "trust_remote_code": "Unmask, which never runs code from a model repository",
    "disable_log_stats": "Unmask",
    "per_request_spec_decode_metrics": "Unmask, which counts what is accepted of every request",
}

PLACEMENT = frozenset(
    {
        "cpu_offload_gb",
        "distributed_executor_backend",
        "enable_chunked_prefill",
        "enable_prefix_caching",
        "enforce_eager",
        "gpu_memory_utilization",
        "kv_cache_memory_bytes",
        "max_num_batched_tokens",
        "max_num_seqs",
        "pipeline_parallel_size",
        "swap_space",
        "tensor_parallel_size",
    }
)
"""Options that say where and how fast the engine runs; its distribution does not depend on them."""

DIFFUSION_PLACEMENT = frozenset(
    {"cuda_graphs", "max_fed_columns", "max_graphs", "max_logits_mb", "max_rows", "max_waiting", "shape_multiple"}
)
"""The same of a diffusion LM's engine (`unmask.decoding.engine.EngineConfig`)."""

_CPU_KV_CACHE_BYTES = 1 << 30
"""Without a bound vLLM takes most of a CPU host's memory."""


def check_engine_options(options: Mapping[str, Any]) -> None:
    """Refuse engine options that Unmask decides, or that the installed vLLM (if any) does not know.

    Raises:
        ConfigError: naming the option and the nearest known one.
    """
    for name in options:
        if name in _DECIDED_ELSEWHERE:
            raise ConfigError(f"is decided by {_DECIDED_ELSEWHERE[name]}; remove it", field=f"target.engine.{name}")
    known = _known_options()
    for name in options:
        if known and name not in known:
            raise ConfigError(f"vLLM has no such engine option{nearest(name, known)}", field=f"target.engine.{name}")


def _known_options() -> set[str]:
    """Fields of vLLM's `EngineArgs`, read from its source: importing it takes seconds that a typo should not cost."""
    vllm = importlib.util.find_spec("vllm")
    if vllm is None or vllm.origin is None:
        return set()
    tree = ast.parse((Path(vllm.origin).parent / "engine" / "arg_utils.py").read_text())
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "EngineArgs")
    return {node.target.id for node in body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)}


def engine_arguments(target: TargetConfig, path: Path, *, dtype: str, on_gpu: bool) -> dict[str, Any]:
    """Arguments of vLLM's `EngineArgs` for a target; the recipe's `target.engine` wins over the defaults here.

    Args:
        path: the target's directory (see `unmask.targets.resolve_target`).
        dtype: compute type of the engine, or `auto`: the checkpoint's, and float32 on a CPU without bfloat16.
        on_gpu: False adds the defaults that a CPU host needs.

    Raises:
        ConfigError: see `check_engine_options`.
    """
    check_engine_options(target.engine)
    if dtype == "auto" and not on_gpu and not multiplies_bfloat16("cpu"):
        dtype = "float32"
    cpu = {"enforce_eager": True, "kv_cache_memory_bytes": _CPU_KV_CACHE_BYTES}
    return {
        **({} if on_gpu else cpu),
        **target.engine,
        "model": str(path),
        "dtype": dtype,
        "max_model_len": target.max_model_len,
        "load_format": "safetensors",
        "disable_log_stats": True,
    }
