"""A diffusion LM through Ray Serve's proxy: two replicas with random weights, then the same beside a target."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.diffusion_tools import LLAMA
from tests.fault.record import at_most, conclude
from tests.serve.test_service import alive, metric, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

VOCAB, MASK, END, LENGTH = 49152, 16, 2, 256
DECODERS: dict[str, dict[str, Any]] = {
    "one_token": {"name": "one_token", "block_size": 16},
    "threshold": {"name": "threshold", "threshold": 0.2, "block_size": 16},
    "dual": {"name": "threshold", "threshold": 0.2, "block_size": 16, "cache": "dual"},
    "dparallel": {"name": "dparallel", "threshold": 6.0, "block_size": 16},
    "apd": {"name": "apd", "kv_window": 8, "max_lookahead": 16},
}
BODY = {
    "messages": [{"role": "user", "content": "Write one sentence about the sea."}],
    "temperature": 0,
    "max_tokens": 64,
}
RAW = {**BODY, "ignore_eos": True}
"""The same for a client that adds no fields of its own."""


def save(path: Path, attention: str, seed: int) -> str:
    """A random network of SmolLM2's vocabulary, with its tokenizer."""
    from transformers import AutoTokenizer

    from unmask.config import EMBEDDED_TARGET
    from unmask.models import adapted, families
    from unmask.targets import resolve_target

    config = {**LLAMA, "vocab_size": VOCAB, "eos_token_id": END, "max_position_embeddings": 2048}
    if attention != "causal":
        block = 8 if attention == "block_causal" else None
        config["unmask"] = {"attention": attention, "block_size": block, "mask_token_id": MASK}
    families.save(adapted.build(config, seed=seed, std=0.3), path)
    AutoTokenizer.from_pretrained(resolve_target(EMBEDDED_TARGET)).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("diffusion")
    return {
        kind: save(folder / kind, kind, seed) for seed, kind in enumerate(("bidirectional", "block_causal", "causal"))
    }


def serve(**options: Any):
    from serve_app.handle import serve_pairing
    from unmask.config import GenerateConfig, Recipe, ServeConfig, TargetConfig

    return serve_pairing(
        Recipe(
            target=TargetConfig(max_model_len=LENGTH),
            generate=GenerateConfig(max_new_tokens=64),
            serve=ServeConfig(
                port=0, dtype="float32", diffusion_length=LENGTH, diffusion_rows=8, diffusion_cpus=0.5, **options
            ),
        )
    )


@pytest.fixture(scope="module")
def service(ray_cluster: None, networks: dict[str, str]):
    handle = serve(
        diffusion=networks["bidirectional"],
        verifier=networks["causal"],
        decoder=DECODERS["threshold"],
        name="sea",
        diffusion_replicas=2,
    )
    yield handle
    handle.shutdown()


@pytest.fixture(scope="module")
def client(service) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service.url, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def official(service) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0, timeout=120)


def ask(official: openai.OpenAI, extra: dict[str, Any], **fields: Any) -> Any:
    extra = {"ignore_eos": True, **extra}
    return official.chat.completions.create(model="sea", extra_body=extra, **BODY, **fields)


def streamed(client: httpx.Client, on_chunk: Callable[[], None] = lambda: None, **fields: Any) -> str:
    """Text of a stream that came to its proper end."""
    text, lines = "", []
    with client.stream("POST", "/v1/chat/completions", json={**RAW, "stream": True, **fields}) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if line:
                lines.append(line.removeprefix("data: "))
                on_chunk()
    assert lines.pop() == "[DONE]", lines[-1:]
    for chunk in map(json.loads, lines):
        assert "error" not in chunk, chunk
        text += "".join(choice["delta"].get("content", "") for choice in chunk["choices"])
    return text


@pytest.mark.parametrize("name", DECODERS)
def test_every_decoder_streams_what_it_answers(official: openai.OpenAI, name: str):
    extra = {"decoder": DECODERS[name], "return_metrics": True}
    whole = ask(official, extra)
    [choice] = whole.choices
    assert (choice.finish_reason, whole.usage.completion_tokens) == ("length", 64)
    assert whole.model_extra["metrics"]["num_forwards"] >= 1
    chunks = list(ask(official, extra, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == choice.message.content
    assert next(chunk.usage for chunk in chunks if chunk.usage) == whole.usage


def test_the_model_is_listed_and_ready(official: openai.OpenAI, client: httpx.Client, service):
    [card] = official.models.list().data
    assert (card.id, card.model_extra["max_model_len"]) == ("sea", LENGTH)
    assert client.get("/health").status_code == 200
    assert len(service.diffusion_pids()) == 2


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"decoder": {"name": "d2f"}}, "decoder"),
        ({"decoder": {"name": "thresold"}}, "decoder.name"),
        ({"decoder": {"name": "threshold", "path": "/etc/passwd"}}, "decoder.path"),
        ({"decoder": {"name": "threshold", "block_size": 24}}, "decoder.block_size"),
        ({"logprobs": True}, "logprobs"),
        ({"max_tokens": LENGTH}, "max_tokens"),
    ],
)
def test_bad_requests_name_their_field(official: openai.OpenAI, extra: dict[str, Any], param: str):
    with pytest.raises(openai.BadRequestError) as refused:
        ask(official, extra)
    assert refused.value.param == param


def test_in_company_as_alone(client: httpx.Client):
    fields = [{"max_tokens": 8 + 4 * i, "messages": [{"role": "user", "content": f"Say {i}."}]} for i in range(12)]
    alone = [streamed(client, **each) for each in fields]
    with ThreadPoolExecutor(12) as pool:
        company = list(pool.map(lambda each: streamed(client, **each), fields))
    assert company == alone


def test_a_client_that_goes_away_frees_its_row(client: httpx.Client):
    for _ in range(3):
        with client.stream(
            "POST", "/v1/chat/completions", json={**RAW, "stream": True, "decoder": DECODERS["one_token"]}
        ) as response:
            next(response.iter_lines())
    wait_until(lambda: metric(client, "unmask_requests_running") == 0, 10)
    wait_until(lambda: metric(client, "unmask_diffusion_requests_running") == 0, 10)


@pytest.mark.parametrize(("name", "temperature"), [("one_token", 0), ("apd", 0), ("threshold", 1)])
def test_a_killed_replica_loses_no_token(client: httpx.Client, service, name: str, temperature: int):
    wait_until(lambda: len(service.diffusion_pids()) == 2, 60)
    fields = {"decoder": DECODERS[name], "temperature": temperature, "seed": 11, "max_tokens": 192}
    whole = streamed(client, **fields)
    resumed = metric(client, "unmask_requests_resumed_total")
    victim = service.diffusion_pids()[0]
    begun = threading.Semaphore(0)
    with ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(streamed, client, begun.release, **fields) for _ in range(6)]
        for _ in range(8):
            assert begun.acquire(timeout=60)
        os.kill(victim, signal.SIGKILL)
        assert [answer.result() for answer in answers] == [whole] * 6
    assert metric(client, "unmask_requests_resumed_total") > resumed
    wait_until(lambda: not alive(victim), 20)


def test_a_killed_replica_is_back_soon(service):
    wait_until(lambda: len(service.diffusion_pids()) == 2, 60)
    before = set(service.diffusion_pids())
    begun = time.monotonic()
    os.kill(min(before), signal.SIGKILL)
    wait_until(lambda: set(service.diffusion_pids()) - before, 120)
    imports = "Presumed, not measured apart: a process of two slow cores imports torch, Serve and the decoders."
    back = at_most("ready again after", time.monotonic() - begun, 10, reason=imports)
    conclude("F4", "SIGKILL one of two replicas of a diffusion LM", "no load", [back])


def test_shutdown_finishes_what_has_begun(client: httpx.Client, service):
    wait_until(lambda: len(service.diffusion_pids()) == 2, 60)
    whole, pids = streamed(client, decoder=DECODERS["one_token"]), service.diffusion_pids()
    begun = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(streamed, client, begun.set, decoder=DECODERS["one_token"])
        assert begun.wait(30)
        service.shutdown()
        assert answer.result() == whole
    wait_until(lambda: not any(alive(pid) for pid in pids), 20)


def test_beside_a_target(ray_cluster: None, networks: dict[str, str]):
    handle = serve(diffusion=networks["block_causal"], diffusion_name="blocks", max_num_seqs=2)
    try:
        official = openai.OpenAI(base_url=f"{handle.url}/v1", api_key="none", max_retries=0, timeout=120)
        assert [card.id for card in official.models.list().data] == ["unmask", "blocks"]
        short = {**BODY, "max_tokens": 16}
        assert official.chat.completions.create(model="unmask", **short).usage.completion_tokens > 0
        extra = {"decoder": {"name": "d2f", "block_size": 8}, "return_metrics": True}
        blocks = {**short, "extra_body": extra}
        answer = official.chat.completions.create(model="blocks", **blocks)
        assert answer.model_extra["metrics"]["tokens_per_forward"] > 0
        with pytest.raises(openai.BadRequestError) as refused:
            official.chat.completions.create(model="unmask", **blocks)
        assert refused.value.param == "decoder"
        with pytest.raises(openai.NotFoundError):
            official.chat.completions.create(model="other", **short)
    finally:
        handle.shutdown()
