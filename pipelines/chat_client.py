"""A client of the service that is being tested or learned from: chats over HTTP, a few at a time."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from unmask.config import PromptsConfig

Messages = list[dict[str, str]]


class ChatClient:
    """Chat completions.

    Args:
        url: of the service, without `/v1`.
        clients: requests under way at the same time.
        body: what all requests have in common, `model` among it.
    """

    def __init__(self, url: str, *, clients: int, **body: Any) -> None:
        self.http = httpx.Client(base_url=url, timeout=600)
        self.clients, self.body = clients, body

    def answer(self, messages: Messages, **options: Any) -> str:
        """One answer. Raises httpx.HTTPError."""
        response = self.http.post("/v1/chat/completions", json=self.body | options | {"messages": messages})
        response.raise_for_status()
        return response.json()["choices"][0]["message"]["content"]

    def answers(self, chats: Sequence[Messages]) -> list[str]:
        """All answers, in order. Raises httpx.HTTPError."""
        with ThreadPoolExecutor(self.clients) as pool:
            return list(pool.map(self.answer, chats))


def messages_of(values: dict[str, Any], config: PromptsConfig) -> Messages:
    """A row of a source as the chat that `unmask.prompts.PromptBuilder` makes of it."""
    value = values[config.field]
    if isinstance(value, list):
        return value
    system = [{"role": "system", "content": config.system}] if config.system else []
    return [*system, {"role": "user", "content": value}]
