"""The evaluation worker of diffusion LMs: one process that decodes its share of the prompts and judges the text."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from unmask.decoding.engine import DiffusionEngine, EngineConfig
from unmask.decoding.registry import build_decoder
from unmask.decoding.request import DecodeRequest
from unmask.models import families
from unmask.models.transformer import DiffusionLM
from unmask.types import SamplingOptions
from unmask.verification import Judge, build_verifier


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffusionEvaluatorSpec:
    """What a worker is told."""

    checkpoints: dict[str, str]
    """Directories by name; all have one tokenizer."""
    engine: EngineConfig
    response_length: int
    verifier: str
    reference: str
    """The column to compare with."""
    dtype: str
    threads: int


class DiffusionEvaluator:
    """Decodes rows with any decoder of any of the checkpoints."""

    def __init__(self, spec: DiffusionEvaluatorSpec) -> None:
        torch.set_num_threads(spec.threads)
        self.spec = spec
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        tokenizer = AutoTokenizer.from_pretrained(next(iter(spec.checkpoints.values())), local_files_only=True)
        self.judge = Judge(tokenizer, build_verifier(spec.verifier), spec.reference)
        self.networks: dict[str, DiffusionLM] = {}

    def run(
        self, checkpoint: str, decoder: dict[str, Any], prompts: list[list[int]], rows: list[Any]
    ) -> dict[str, Any]:
        """Completions as plain values in order, whether each is right, and the seconds of decoding."""
        references = [self.judge.reference(row) for row in rows]
        requests = [
            DecodeRequest(
                request_id=str(index),
                prompt_ids=tuple(ids),
                options=SamplingOptions(max_tokens=self.spec.response_length),
            )
            for index, ids in enumerate(prompts)
        ]
        built = build_decoder(decoder, self._network(checkpoint))
        engine = DiffusionEngine(built.cached_models, self.spec.engine)
        start = time.monotonic()
        done = {completion.request_id: completion for completion in engine.run(requests, built)}
        seconds = time.monotonic() - start
        completions = [done[request.request_id] for request in requests]
        right = [self.judge.is_right(c.response_ids, r) for c, r in zip(completions, references, strict=True)]
        return {"completions": [asdict(c) for c in completions], "right": right, "seconds": seconds}

    def _network(self, name: str) -> DiffusionLM:
        if name not in self.networks:
            dtype = None if self.spec.dtype == "auto" else getattr(torch, self.spec.dtype)
            self.networks[name] = families.load(Path(self.spec.checkpoints[name]), dtype=dtype, device=self.device)
        return self.networks[name]
