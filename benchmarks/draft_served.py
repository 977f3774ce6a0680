"""vLLM's own loop with a draft, on many prompts: acceptance as vLLM counts it, at temperature 0 and 1.

    python -m benchmarks.draft_served --draft DIR --prompts FILE --out FILE            (one GPU)
    python -m benchmarks.draft_served --tiny --draft DIR --prompts FILE --out FILE     (any machine)

`--prompts` is a JSON object of sets, each a list of token ids of prompts; `benchmarks.draft_quality` writes it (case
`served`). The target is SmolLM2-135M-Instruct with vLLM's native DFlash, K the draft's block size - 1. Responses that
fall into repetition are counted with the others, and left out in a second pass with the same seeds.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from benchmarks.batched_generation import repetitive
from unmask.checkpoints import read_config
from unmask.config import EMBEDDED_TARGET
from unmask.files import write_json
from unmask.targets import eos_ids, resolve_target

LONGEST = 256
"""Of a response, in tokens."""
_ACCEPTED = "vllm:spec_decode_num_accepted_tokens"
_DRAFTS = "vllm:spec_decode_num_drafts"


def main() -> None:
    """Answer all prompts and write a row for each set, temperature and choice of responses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draft", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="float32 and short answers on the CPU: shows that it runs")
    arguments = parser.parse_args()
    os.environ |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind"} if arguments.tiny else {"VLLM_USE_V2_MODEL_RUNNER": "1"}
    sets: dict[str, list[list[int]]] = json.loads(arguments.prompts.read_text())
    llm = _engine(arguments.draft, tiny=arguments.tiny)
    longest = 8 if arguments.tiny else LONGEST
    rows = []
    for name, prompts in sets.items():
        for temperature in (0.0, 1.0):
            row, responses = _answer(llm, prompts, temperature, list(range(len(prompts))), longest)
            rows.append({"eval_set": name, "temperature": temperature, **row})
            calm = [i for i, tokens in enumerate(responses) if not repetitive(tokens)]
            row, _ = _answer(llm, [prompts[i] for i in calm], temperature, calm, longest)
            rows.append({"eval_set": f"{name} without repetitive", "temperature": temperature, **row})
            print(json.dumps(rows[-2:]), flush=True)
    write_json(arguments.out, rows)


def _engine(draft: Path, *, tiny: bool) -> Any:
    from vllm import LLM

    k = read_config(draft)[0].block_size - 1
    # Told, not measured: other work may be on the GPU.
    size: dict[str, Any] = {"gpu_memory_utilization": 0.2, "kv_cache_memory_bytes": 4 << 30}
    if tiny:
        size = {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 28}
    return LLM(
        model=str(resolve_target(EMBEDDED_TARGET)),
        skip_tokenizer_init=True,
        dtype="float32" if tiny else "bfloat16",
        max_model_len=1024,
        max_num_seqs=8 if tiny else 128,
        enable_prefix_caching=False,
        disable_log_stats=False,
        speculative_config={"method": "dflash", "model": str(draft), "num_speculative_tokens": k},
        **size,
    )


def _answer(
    llm: Any, prompts: list[list[int]], temperature: float, seeds: list[int], longest: int
) -> tuple[dict[str, Any], list[tuple[int, ...]]]:
    """What was accepted, and the responses."""
    from vllm import SamplingParams

    stops = sorted(eos_ids(resolve_target(EMBEDDED_TARGET)))
    params = [
        SamplingParams(
            temperature=temperature,
            seed=seed if temperature else None,
            max_tokens=longest,
            stop_token_ids=stops,
            detokenize=False,
        )
        for seed in seeds
    ]
    before = _counters(llm)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    after = _counters(llm)
    drafts, *accepted = (b - a for a, b in zip(before, after, strict=True))
    row = {
        "prompts": len(prompts),
        "acceptance_length": 1 + sum(accepted) / drafts if drafts else None,
        "acceptance_by_position": [count / drafts for count in accepted] if drafts else [],
        "verifications": drafts,
    }
    return row, [tuple(output.outputs[0].token_ids) for output in outputs]


def _counters(llm: Any) -> list[int]:
    """Drafts that were verified, and how many of them were accepted at each position."""
    metrics = {metric.name: metric for metric in llm.get_metrics()}
    return [metrics[_DRAFTS].value, *metrics[f"{_ACCEPTED}_per_pos"].values]


if __name__ == "__main__":
    main()
