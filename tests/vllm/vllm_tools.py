"""vLLM in this process, and a draft that looks like its target, for tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from unmask.checkpoints import save_draft
from unmask.models.dflash import DFlashConfig, DFlashDraft, spread_layer_ids
from unmask.types import TargetRecord

K = 5
BLOCK_SIZE = K + 3
LAYER_IDS = spread_layer_ids(30, 3)
TOKEN_BUDGET = 64
MAX_MODEL_LEN = 256


def make_draft(target: Path, path: Path, seed: int = 0, record: TargetRecord | None = None) -> Path:
    """A draft for the embedded target: blocks taken from it, `fc` random, so that proposals vary with the context."""
    config = DFlashConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        vocab_size=49152,
        max_position_embeddings=4096,
        block_size=BLOCK_SIZE,
        mask_token_id=16,
        num_target_layers=30,
        target_layer_ids=LAYER_IDS,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    )
    draft = DFlashDraft(config)
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).get_decoder()
    with torch.no_grad():
        draft.norm.load_state_dict(model.norm.state_dict())
        for own, block in zip(draft.layers, model.layers[-2:], strict=True):
            own.load_state_dict(block.state_dict(), strict=False)
        fc = draft.fc.weight
        fc.copy_(torch.randn(fc.shape, generator=torch.Generator().manual_seed(seed)) * fc.shape[1] ** -0.5)
    save_draft(draft, path, record, dtype=torch.float32)
    return path


@contextmanager
def engine(target: Path, **options: Any) -> Iterator[Any]:
    """A vLLM engine in this process, one at a time."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    torch.set_num_threads(1)
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
    from vllm.platforms import current_platform

    defaults = {
        "model": str(target),
        "dtype": "float32",
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": 8,
        "max_num_batched_tokens": TOKEN_BUDGET,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": 1 << 28,
    }
    llm = LLM(**(defaults | options))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        # A pool of CUDA graphs cannot be opened again once the last of them is gone.
        type(current_platform)._global_graph_pool = None
        os.environ.pop("VLLM_ENABLE_V1_MULTIPROCESSING")


def runner_of(llm: Any) -> Any:
    """The model runner of an engine in this process."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def greedy(llm: Any, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    """Greedy responses of `num_tokens` ids."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def run_counted_core(*args: Any, **kwargs: Any) -> None:
    """The engine core of a vLLM that does not tell how requests were verified."""
    from engines import core_process

    core_process.told_by_vllm = lambda: False
    core_process._run_tied(*args, **kwargs)
