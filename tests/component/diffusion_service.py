"""Services of tiny random diffusion LMs: real decoders, a real engine on its thread, no Ray."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

from serve_app.admission import Admission
from serve_app.backend import BackendUnavailableError, ReplicaReport
from serve_app.diffusion_engine import StreamingEngine
from serve_app.diffusion_rules import DiffusionRules
from serve_app.replica_stats import diffusion_metrics
from serve_app.service import Service
from serve_app.telemetry import Telemetry
from serve_app.tokenizer import ChatTokenizer
from tests.diffusion_tools import LLAMA
from tests.unit.serve_app.conftest import EOS
from unmask.decoding.engine import EngineConfig
from unmask.decoding.library import DecoderLibrary
from unmask.decoding.request import DecodeRequest
from unmask.models import adapted
from unmask.models.transformer import DiffusionLM
from unmask.types import SamplingOptions, TokenDelta

VOCAB, MASK, LENGTH = 264, 260, 128
DECODERS: dict[str, dict[str, Any]] = {
    "one_token": {"name": "one_token", "block_size": 8},
    "threshold": {"name": "threshold", "threshold": 0.3, "block_size": 8},
    "prefix": {"name": "threshold", "threshold": 0.3, "block_size": 8, "cache": "prefix"},
    "dual": {"name": "dparallel", "threshold": 3.0, "block_size": 4, "cache": "dual"},
    "dparallel": {"name": "dparallel", "threshold": 3.0, "block_size": 8},
    "apd": {"name": "apd", "kv_window": 4, "max_lookahead": 16},
    "d2f": {"name": "d2f", "block_size": 4, "tau_conf": 0.3},
}


def network(attention: str, seed: int = 0) -> DiffusionLM:
    section = {"attention": attention, "block_size": 4 if attention == "block_causal" else None}
    own = {} if attention == "causal" else {"unmask": {**section, "mask_token_id": MASK}}
    return adapted.build({**LLAMA, "vocab_size": VOCAB, "eos_token_id": EOS, **own}, seed=seed, std=0.3)


@dataclass
class Local:
    """The engine as a backend of this process."""

    engine: StreamingEngine

    def generate(
        self, request_id: str, prompt_ids: list[int], options: SamplingOptions
    ) -> AsyncGenerator[TokenDelta, None]:
        """One request."""
        request = DecodeRequest(request_id=request_id, prompt_ids=tuple(prompt_ids), options=options)
        return self.engine.generate(request, options.decoder)

    async def reports(self) -> Sequence[ReplicaReport]:
        """The engine's."""
        if not self.engine.alive:
            raise BackendUnavailableError("ended")
        stats = diffusion_metrics(self.engine.stats)
        return [ReplicaReport(role="diffusion", replica="r1", pids=(1,), stats=stats)]


def library(attention: str) -> DecoderLibrary:
    default = {"name": "d2f", "block_size": 4} if attention == "block_causal" else DECODERS["threshold"]
    return DecoderLibrary(network(attention), default, verifier=network("causal", seed=1))


def service_of(attention: str, tokenizer: PreTrainedTokenizerFast) -> Service:
    config = EngineConfig(max_rows=4, max_length=LENGTH, max_waiting=12)
    admission = Admission(slots=12, queue=8)
    return Service(
        model=attention,
        max_model_len=LENGTH,
        created=1,
        tokenizer=ChatTokenizer(tokenizer),
        backend=Local(StreamingEngine(lambda: library(attention), config)),
        admission=admission,
        telemetry=Telemetry(admission),
        deadline_s=60.0,
        diffusion=DiffusionRules(library(attention)),
    )
