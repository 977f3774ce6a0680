"""The target's tokenizer and chat template, as the service uses them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from serve_app import errors
from serve_app.messages import Message
from unmask.errors import CheckpointError


class ChatTokenizer:
    """Text to ids and back. Long texts are encoded off the event loop, which the tokenizer leaves free meanwhile."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.hf = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self.vocab_size = len(tokenizer)

    @classmethod
    def load(cls, path: Path) -> ChatTokenizer:
        """Read a local HF directory; no remote code. Raises CheckpointError."""
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise CheckpointError(f"'{path}' has no fast tokenizer (tokenizer.json)", field="target.model")
        return cls(tokenizer)

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text."""
        encoding = await asyncio.to_thread(self._backend.encode, text, add_special_tokens=add_special_tokens)
        return encoding.ids

    async def encode_chat(self, messages: Sequence[Message], tools: list[Any] | None = None) -> list[int]:
        """Ids of a chat, up to where the assistant's answer begins.

        Args:
            messages: the chat.
            tools: what may be called, each as in the API's `tools`.

        Raises:
            ApiError: the target has no chat template, or its template refuses the messages.
        """
        if self.hf.chat_template is None:
            raise errors.invalid("the served model has no chat template; use /v1/completions", "messages")
        try:
            text = await asyncio.to_thread(
                self.hf.apply_chat_template,
                [message.for_template() for message in messages],
                tools=tools,
                tokenize=False,
                add_generation_prompt=True,
            )
        # A template that meets arguments of a form that it does not expect fails as Python does.
        except (TemplateError, TypeError, ValueError) as error:
            raise errors.invalid(f"the chat template refuses the messages: {error}", "messages") from None
        return await self.encode(str(text), add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""
        return self._backend.decode(ids)

    def decode_all(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens by their names."""
        return self._backend.decode(ids, skip_special_tokens=False)

    def decode_token(self, token_id: int) -> str:
        """Text of one id; a special token's own name."""
        return self.decode_all([token_id])

    def check_ids(self, ids: Sequence[int], param: str) -> None:
        """Refuse ids outside the vocabulary. Raises ApiError naming `param`."""
        if any(not 0 <= token_id < self.vocab_size for token_id in ids):
            raise errors.invalid(f"token ids must be between 0 and {self.vocab_size - 1}", param)
