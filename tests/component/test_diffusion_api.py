"""A diffusion LM behind the HTTP application: real decoders and a real engine on its thread, without Ray."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from transformers import PreTrainedTokenizerFast

from serve_app.backend import BackendUnavailableError
from serve_app.diffusion_engine import StreamingEngine
from serve_app.ingress import create_app
from serve_app.service import Service
from tests.component.diffusion_service import DECODERS, LENGTH, MASK, library, network, service_of
from tests.unit.serve_app.conftest import byte_tokenizer
from unmask.decoding.engine import EngineConfig
from unmask.decoding.generate import generate
from unmask.decoding.library import DecoderLibrary
from unmask.decoding.request import DecodeRequest
from unmask.errors import ConfigError
from unmask.models.transformer import DiffusionLM
from unmask.types import SamplingOptions


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture
def services(tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[Service, Service]]:
    made = service_of("bidirectional", tokenizer), service_of("block_causal", tokenizer)
    yield made
    for service in made:
        service.backend.engine.stop()


@pytest.fixture
def engine(services: tuple[Service, Service]) -> StreamingEngine:
    """Of the bidirectional network."""
    return services[0].backend.engine


@pytest.fixture
async def client(services: tuple[Service, Service]) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(replace(services[0], beside=services[1:]))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://toy") as client:
        yield client


def model_of(name: str) -> str:
    return "block_causal" if name == "d2f" else "bidirectional"


def body(name: str = "threshold", **fields: Any) -> dict[str, Any]:
    return {
        "model": model_of(name),
        "prompt": "diffusion",
        "max_tokens": 24,
        "temperature": 0,
        "decoder": DECODERS[name],
        **fields,
    }


async def ask(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    response = await client.post("/v1/completions", json=fields)
    assert response.status_code == 200, response.text
    return response.json()


async def stream(client: httpx.AsyncClient, **fields: Any) -> list[dict[str, Any]]:
    request = {**fields, "stream": True, "stream_options": {"include_usage": True}}
    response = await client.post("/v1/completions", json=request)
    *lines, last = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert last == "[DONE]"
    return [json.loads(line) for line in lines]


def expected(name: str, tokenizer: PreTrainedTokenizerFast, prompt: str, **options: Any) -> tuple[str, int, str, int]:
    """Text, tokens, reason and forwards that the plain loop gives."""
    ids = tuple(tokenizer(prompt, add_special_tokens=False).input_ids)
    asked = DecodeRequest(request_id="x", prompt_ids=ids, options=SamplingOptions(max_tokens=24, **options))
    (done,) = generate(library(model_of(name)).get(DECODERS[name]), [asked])
    text = done.response_ids[:-1] if done.finish_reason == "stop" else done.response_ids
    return (
        tokenizer.decode(text, skip_special_tokens=True),
        len(done.response_ids),
        done.finish_reason,
        done.num_forwards,
    )


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("temperature", [0, 0.9])
async def test_the_answer_is_the_plain_loops(
    client: httpx.AsyncClient, tokenizer: PreTrainedTokenizerFast, name: str, temperature: float
):
    options = {"temperature": temperature, "seed": 5}
    text, tokens, reason, forwards = expected(name, tokenizer, "diffusion", **options)
    answer = await ask(client, **body(name, return_metrics=True, **options))
    [choice] = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == (text, reason)
    assert answer["usage"]["completion_tokens"] == tokens
    assert answer["metrics"]["num_forwards"] == forwards
    assert answer["metrics"]["tokens_per_forward"] == pytest.approx(tokens / forwards)
    assert answer["metrics"]["mean_acceptance_length"] is None
    *chunks, last = await stream(client, **body(name, **options))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text
    assert chunks[-1]["choices"][0]["finish_reason"] == reason
    assert last["usage"] == answer["usage"]


async def test_blocks_are_sent_as_they_are_finished(client: httpx.AsyncClient, engine: StreamingEngine):
    request = DecodeRequest(
        request_id="a", prompt_ids=(70, 71), options=SamplingOptions(max_tokens=24, ignore_eos=True)
    )
    sizes = [len(delta.token_ids) async for delta in engine.generate(request, DECODERS["one_token"])]
    assert sizes == [8, 8, 8]


async def test_requests_in_company_get_what_they_get_alone(client: httpx.AsyncClient):
    asked = [
        body(name, prompt="q" * (1 + index), max_tokens=9 + 3 * index, decoder={**DECODERS[name]})
        for index, name in enumerate([*DECODERS, *DECODERS])
    ]
    for fields in asked:
        fields["decoder"].pop("block_size", None)
        if fields["model"] == "block_causal":
            fields["decoder"]["block_size"] = 4
            fields["max_tokens"] = 28
    alone = [(await ask(client, **fields))["choices"] for fields in asked]
    company = await asyncio.gather(*(ask(client, **fields) for fields in asked[:10]))
    assert [answer["choices"] for answer in company] == alone[:10]


async def test_choices_stops_and_seeds(client: httpx.AsyncClient):
    sampled = body("threshold", n=3, temperature=1, seed=3, ignore_eos=True)
    answer = await ask(client, **sampled)
    texts = [choice["text"] for choice in answer["choices"]]
    assert len(set(texts)) == 3
    assert answer == {**await ask(client, **sampled), "id": answer["id"], "created": answer["created"]}
    whole = (await ask(client, **body("one_token", ignore_eos=True)))["choices"][0]["text"]
    stopped = await ask(client, **body("one_token", ignore_eos=True, stop=whole[3:5]))
    assert stopped["choices"][0] | {"index": 0} == {
        "index": 0,
        "text": whole[: whole.index(whole[3:5])],
        "logprobs": None,
        "finish_reason": "stop",
    }


async def test_the_default_decoder_and_its_knobs(client: httpx.AsyncClient):
    plain = {"model": "bidirectional", "prompt": "q", "temperature": 0, "max_tokens": 21, "ignore_eos": True}
    default = await ask(client, **plain)
    assert default["usage"]["completion_tokens"] == 21, "a default block that does not divide is cut short"
    named = await ask(client, **{**plain, "max_tokens": 24, "decoder": DECODERS["threshold"]})
    knob = await ask(client, **{**plain, "max_tokens": 24, "decoder": {"threshold": 0.3}})
    assert knob["choices"] == named["choices"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"decoder": {"name": "dparalel"}}, "decoder.name"),
        ({"decoder": {"name": ["d2f"]}}, "decoder.name"),
        ({"decoder": "threshold"}, "decoder"),
        ({"decoder": {"name": "threshold", "treshold": 0.4}}, "decoder.treshold"),
        ({"decoder": {"name": "threshold", "threshold": "high"}}, "decoder.threshold"),
        ({"decoder": {"name": "threshold", "threshold": 2}}, "decoder.threshold"),
        ({"decoder": {"name": "threshold", "block_size": 10}}, "decoder.block_size"),
        ({"decoder": {"name": "threshold", "block_size": 0}}, "decoder.block_size"),
        ({"decoder": {"name": "threshold", "block_size": 2**40}, "max_tokens": None}, "decoder"),
        ({"decoder": {"name": "d2f"}}, "decoder"),
        ({"decoder": {"name": "d2f", "block_size": 6}, "model": "block_causal"}, "decoder.block_size"),
        ({"decoder": {"name": "threshold"}, "model": "block_causal"}, "decoder"),
        ({"decoder": {"name": "threshold", "cache": "x" * 2000}}, "decoder"),
        ({"decoder": {str(i): i for i in range(17)}}, "decoder"),
        ({"threshold": 0.5}, "threshold"),
        ({"decoders": {}}, "decoders"),
        ({"prompt": [70, MASK]}, "prompt"),
        ({"prompt": [70, 100_000]}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": LENGTH}, "max_tokens"),
        ({"logprobs": 0}, "logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"top_k": 5}, "top_k"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"model": "other"}, "model"),
    ],
)
async def test_what_cannot_be_decoded_is_refused_before_it_is_queued(
    client: httpx.AsyncClient, engine: StreamingEngine, fields: dict[str, Any], param: str
):
    for flag in (False, True):
        response = await client.post("/v1/completions", json={**body(), "stream": flag, **fields})
        assert response.status_code == (404 if param == "model" else 400), response.text
        assert response.json()["error"]["param"] == param, response.text
    assert (engine.stats.num_steps, engine.stats.num_running) == (0, 0)


async def test_chat_options_are_refused_under_their_own_names(client: httpx.AsyncClient):
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}
    assert (await client.post("/v1/chat/completions", json=chat)).status_code == 200
    refused = await client.post("/v1/chat/completions", json={**chat, "logprobs": True})
    assert refused.json()["error"]["param"] == "logprobs"


async def test_both_models_are_listed_and_measured(client: httpx.AsyncClient):
    assert [card["id"] for card in (await client.get("/v1/models")).json()["data"]] == ["bidirectional", "block_causal"]
    assert (await client.get("/v1/models/block_causal")).json()["max_model_len"] == LENGTH
    assert (await client.get("/health")).status_code == 200
    await ask(client, **body())
    text = (await client.get("/metrics")).text
    assert re.search(r"^unmask_diffusion_finished_total{.*} 1.0$", text, re.MULTILINE)
    assert 'unmask_replicas{role="diffusion"} 1.0' in text


async def test_a_client_that_leaves_frees_its_row(engine: StreamingEngine):
    request = DecodeRequest(request_id="a", prompt_ids=(70,), options=SamplingOptions(max_tokens=100, ignore_eos=True))
    deltas = engine.generate(request, DECODERS["one_token"])
    await anext(deltas)
    assert engine.stats.num_running == 1
    await deltas.aclose()
    await engine.check()
    assert (engine.stats.num_running, engine.stats.num_aborted) == (0, 1)
    async for _ in engine.generate(request, DECODERS["one_token"]):
        pass
    assert engine.stats.num_finished == 1


async def test_an_engine_that_fails_tells_everyone_and_is_no_longer_healthy(
    client: httpx.AsyncClient, engine: StreamingEngine, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: Any) -> None:
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(DiffusionLM, "forward", fail)
    answers = await asyncio.gather(*(client.post("/v1/completions", json=body()) for _ in range(3)))
    assert [answer.status_code for answer in answers] == [503, 503, 503]
    assert not engine.alive
    with pytest.raises(BackendUnavailableError):
        await engine.check()
    assert (await client.get("/health")).status_code == 503


def test_what_cannot_be_built_is_raised_in_the_caller():
    with pytest.raises(ConfigError, match="block_causal"):
        StreamingEngine(lambda: DecoderLibrary(network("bidirectional"), {"name": "d2f"}), EngineConfig())


def test_a_decoder_is_built_once_for_equal_settings():
    made = library("bidirectional")
    spelled = {"name": "threshold", "threshold": 0.3, "block_size": 8, "cache": "none"}
    assert made.get(DECODERS["threshold"]) is made.get(spelled) is made.get(None)
    assert made.get({"threshold": 0.4}) is not made.get(None)
    assert made.get({"name": "dparallel"}) is made.get({"name": "dparallel"})
