"""Tool calls through the application: vLLM's parser over a backend whose answers are known."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from engines.tool_calls import ToolParsers
from serve_app.admission import Admission
from serve_app.ingress import create_app
from serve_app.service import Service
from serve_app.telemetry import Telemetry
from serve_app.tokenizer import ChatTokenizer
from tests.unit.serve_app.conftest import EOS, MAX_MODEL_LEN, ToyBackend, byte_tokenizer
from unmask.errors import ConfigError
from unmask.types import SamplingOptions

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": CITY}} for name in ("weather", "time")]
CALLS = (("weather", {"city": "Łódź \U0001f327"}), ("time", {"city": "Oslo"}))
TEXT = "Let me see." + "".join(
    f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}\n</tool_call>"
    for name, arguments in CALLS
)


class Scripted(ToyBackend):
    """Answers everything with one text, and remembers what it was asked for."""

    text = TEXT
    asked: SamplingOptions
    prompt: str

    def answer(self, prompt_ids: list[int], options: SamplingOptions) -> list[int]:
        self.asked = options
        self.prompt = self.tokenizer.decode(prompt_ids)
        return [*self.tokenizer(self.text, add_special_tokens=False).input_ids, EOS][: options.max_tokens]


@pytest.fixture
def backend() -> Scripted:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages | tojson }}\n{{ tools | tojson if tools else '' }}"
    return Scripted(tokenizer)


@pytest.fixture
def client(backend: Scripted) -> httpx.AsyncClient:
    admission = Admission(slots=8, queue=8)
    service = Service(
        model="toy",
        max_model_len=MAX_MODEL_LEN,
        created=1,
        tokenizer=ChatTokenizer(backend.tokenizer),
        backend=backend,
        admission=admission,
        telemetry=Telemetry(admission),
        deadline_s=60.0,
        tools=ToolParsers("hermes", backend.tokenizer),
    )
    return httpx.AsyncClient(transport=httpx.ASGITransport(create_app(service)), base_url="http://toy")


async def ask(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": "?"}], "tools": TOOLS, **fields}
    response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


async def stream(client: httpx.AsyncClient, **fields: Any) -> tuple[str, list[dict[str, Any]], str | None]:
    """Content, calls and finish reason of a stream."""
    body = {"messages": [{"role": "user", "content": "?"}], "tools": TOOLS, "stream": True, **fields}
    response = await client.post("/v1/chat/completions", json=body)
    events = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert events.pop() == "[DONE]"
    content, calls, reason = "", [], None
    for event in events:
        choice = json.loads(event)["choices"][0]
        assert reason is None, "nothing comes after the finish reason"
        reason = choice["finish_reason"]
        content += choice["delta"].get("content") or ""
        for part in choice["delta"].get("tool_calls", ()):
            if part["index"] == len(calls):
                calls.append({"id": part["id"], "name": part["function"]["name"], "arguments": ""})
            calls[part["index"]]["arguments"] += part["function"]["arguments"]
    return content, calls, reason


async def test_calls_are_told_from_the_text(client: httpx.AsyncClient, backend: Scripted):
    answer = await ask(client)
    message = answer["message"]
    assert (message["role"], message["content"], answer["finish_reason"]) == ("assistant", "Let me see.", "tool_calls")
    found = [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in message["tool_calls"]]
    assert tuple(found) == CALLS
    assert all(call["type"] == "function" and call["id"] for call in message["tool_calls"])
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    assert '"name": "weather"' in backend.prompt
    assert backend.asked.structural_tag is backend.asked.json_schema is None, "the model chooses freely"


@pytest.mark.parametrize("block", [1, 3, 50, 1000])
async def test_a_stream_of_any_granularity_adds_up_to_the_same_calls(
    client: httpx.AsyncClient, backend: Scripted, block: int
):
    backend.block = block
    content, calls, reason = await stream(client)
    assert (content, reason) == ("Let me see.", "tool_calls")
    assert tuple((call["name"], json.loads(call["arguments"])) for call in calls) == CALLS


async def test_an_answer_without_a_call_is_plain_text(client: httpx.AsyncClient, backend: Scripted):
    backend.text = "No tool < needed <tool."
    answer = await ask(client)
    assert answer["message"] == {"role": "assistant", "content": backend.text}
    assert answer["finish_reason"] == "stop"
    assert await stream(client) == (backend.text, [], "stop")


async def test_no_tool_may_be_called_where_the_choice_is_none(client: httpx.AsyncClient, backend: Scripted):
    answer = await ask(client, tool_choice="none")
    assert answer["message"]["content"] == TEXT
    assert "weather" not in backend.prompt


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "time"}}])
async def test_a_forced_call_gives_the_sampler_a_grammar(client: httpx.AsyncClient, backend: Scripted, choice: Any):
    await ask(client, tool_choice=choice)
    grammar = backend.asked.structural_tag or backend.asked.json_schema or ""
    assert "time" in grammar
    assert ("weather" in grammar) == (choice == "required")


async def test_calls_and_their_results_are_history(client: httpx.AsyncClient, backend: Scripted):
    call = {"id": "c1", "type": "function", "function": {"name": "time", "arguments": '{"city": "Oslo"}'}}
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "noon"},
    ]
    await ask(client, messages=messages)
    history = json.loads(backend.prompt.partition("\n")[0])
    said, result = history[1:]
    assert said["tool_calls"][0]["function"] == {"name": "time", "arguments": {"city": "Oslo"}}
    assert (result["role"], result["tool_call_id"], result["content"]) == ("tool", "c1", "noon")


def test_an_unknown_parser_is_refused_by_name():
    with pytest.raises(ConfigError, match="hermes"):
        ToolParsers("herms", byte_tokenizer())
