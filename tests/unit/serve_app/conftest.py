"""A whole service in one process: the real application over a small deterministic backend."""

from __future__ import annotations

import asyncio
import hashlib
import socket
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from serve_app.admission import Admission
from serve_app.backend import BackendUnavailableError, ReplicaReport
from serve_app.ingress import create_app
from serve_app.service import Service
from serve_app.telemetry import Telemetry
from serve_app.tokenizer import ChatTokenizer
from unmask.errors import PromptError
from unmask.types import SamplingOptions, TokenDelta

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('the system message must come first') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
EOS = 2
MAX_MODEL_LEN = 4096
TEXTS = (
    "The answer is 42, and that is all.",
    "Za\u017c\u00f3\u0142\u0107 g\u0119\u015bl\u0105 ja\u017a\u0144 \u2014 "
    "na\u00efve caf\u00e9, \u6771\u4eac \u306f \u591c.",
    "Emoji \U0001f469\u200d\U0001f469\u200d\U0001f467 across \U0001f1ef\U0001f1f5 token \U0001f389\U0001f389 borders!",
    "One. Two. Three. Stop here. Four.",
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte a token: each character beyond ASCII is cut across tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate((*SPECIAL, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", clean_up_tokenization_spaces=False
    )
    fast.chat_template = TEMPLATE
    return fast


@dataclass
class ToyBackend:
    """Answers a prompt with one of `TEXTS`, a few tokens at a time; the same prompt and seed, the same answer."""

    tokenizer: PreTrainedTokenizerFast
    block: int = 3
    delay_s: float = 0.0
    running: set[str] = field(default_factory=set)
    cancelled: int = 0
    fails_after: int | None = None
    gate: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.gate.set()

    @property
    def active(self) -> int:
        """Responses under way."""
        return len(self.running)

    def answer(self, prompt_ids: list[int], options: SamplingOptions) -> list[int]:
        """The whole response, EOS included."""
        salt = options.seed if options.temperature and options.seed is not None else 0
        digest = hashlib.sha256(f"{prompt_ids} {salt}".encode()).digest()
        ids = self.tokenizer(TEXTS[digest[0] % len(TEXTS)], add_special_tokens=False).input_ids
        ids = [*ids, EOS] if not options.ignore_eos else ids * (1 + options.max_tokens // len(ids))
        return ids[: options.max_tokens]

    async def generate(
        self, request_id: str, prompt_ids: list[int], options: SamplingOptions
    ) -> AsyncGenerator[TokenDelta, None]:
        """Deltas of `block` tokens."""
        if options.json_schema is not None and "refused" in options.json_schema:
            raise PromptError("the schema cannot be compiled", field="response_format")
        ids = self.answer(prompt_ids, options)
        assert request_id not in self.running, "engines refuse an id that is in use"
        self.running.add(request_id)
        try:
            for start in range(0, len(ids), self.block):
                await self.gate.wait()
                await asyncio.sleep(self.delay_s)
                if self.fails_after is not None and start >= self.fails_after:
                    raise BackendUnavailableError("the toy was told to fail")
                part = ids[start : start + self.block]
                ended = start + self.block >= len(ids)
                reason = ("stop" if part[-1] == EOS else "length") if ended else None
                table = [{i: -0.25, (i + 1) % 256: -1.5} for i in part] if options.logprobs is not None else None
                forwards = 1 + start // self.block if ended else None
                yield TokenDelta(token_ids=part, finish_reason=reason, logprobs=table, num_forwards=forwards)
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled += 1
            raise
        finally:
            self.running.remove(request_id)

    async def reports(self) -> Sequence[ReplicaReport]:
        """One target, one draft."""
        stats = {"vllm:generation_tokens_total": 7.0, "vllm:spec_decode_num_accepted_tokens_per_pos_total": [5, 3, 1]}
        return [
            ReplicaReport(role="target", replica="t1", pids=(11, 12), stats={**stats, "unmask_speculation_enabled": 1}),
            ReplicaReport(role="draft", replica="d1", pids=(21,), stats={"unmask_draft_steps_total": 3}),
        ]


@pytest.fixture(scope="session")
def fast_tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture
def backend(fast_tokenizer: PreTrainedTokenizerFast) -> ToyBackend:
    return ToyBackend(fast_tokenizer)


@pytest.fixture
def service(backend: ToyBackend, fast_tokenizer: PreTrainedTokenizerFast) -> Service:
    admission = Admission(slots=8, queue=8)
    return Service(
        model="toy",
        max_model_len=MAX_MODEL_LEN,
        created=1,
        tokenizer=ChatTokenizer(fast_tokenizer),
        backend=backend,
        admission=admission,
        telemetry=Telemetry(admission),
        deadline_s=30.0,
    )


@pytest.fixture
def app(service: Service) -> FastAPI:
    return create_app(service)


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://toy") as client:
        yield client


@pytest.fixture
def server_url(app: FastAPI) -> Iterator[str]:
    """The application on a free loopback port, behind a real HTTP server."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join(10)
