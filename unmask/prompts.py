"""Prompts: rows of a source turned into what the teacher sees, or refused with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from unmask.config import PromptsConfig
from unmask.errors import PromptError
from unmask.prompt_rows import PromptRow, prompt_rows
from unmask.types import Prompt

_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True, kw_only=True)
class RejectedPrompt:
    """A row that gives no prompt, with the reason; it goes to quarantine."""

    row: PromptRow
    error: str


class PromptBuilder:
    """Tokenises rows with the target's chat template.

    Args:
        tokenizer: the target's Hugging Face tokenizer.
        config: names the field and the system message.
        max_prompt_len: longest prompt in tokens, the chat template's own included.
        mask_token_id: the draft's mask token, which no prompt may hold.
    """

    def __init__(self, tokenizer: Any, config: PromptsConfig, *, max_prompt_len: int, mask_token_id: int) -> None:
        self._tokenizer = tokenizer
        self._config = config
        self._max_prompt_len = max_prompt_len
        self._control = {i: t.content for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        self._control[mask_token_id] = tokenizer.convert_ids_to_tokens(mask_token_id)
        self._marks = _marks(tokenizer, self._control)

    def build(self, row: PromptRow) -> Prompt:
        """The prompt of a row.

        Raises:
            PromptError: wrong type, empty, a control token inside the text, or too long.
        """
        if row.error is not None:
            raise PromptError(row.error)
        ids = self._encode(self._messages(row.values))
        if len(ids) > self._max_prompt_len:
            raise PromptError(
                f"the prompt has {len(ids)} tokens; target.max_model_len - generate.max_new_tokens "
                f"leaves {self._max_prompt_len}",
                field=self._config.field,
            )
        return Prompt(index=row.index, ids=tuple(ids), source=row.values)

    def _messages(self, values: dict[str, Any]) -> list[dict[str, str]]:
        if self._config.field not in values:
            raise PromptError("the row lacks this field", field=self._config.field)
        value = values[self._config.field]
        if isinstance(value, str):
            system = [{"role": "system", "content": self._config.system}] if self._config.system else []
            messages = [*system, {"role": "user", "content": value}]
        elif isinstance(value, list) and value:
            messages = [self._message(item) for item in value]
        else:
            raise PromptError(
                f"must be text or a list of chat messages, not {type(value).__name__}", field=self._config.field
            )
        for message in messages:
            self.check_text(message["content"])
        return messages

    def _message(self, item: Any) -> dict[str, str]:
        if not isinstance(item, dict) or item.get("role") not in _ROLES or not isinstance(item.get("content"), str):
            raise PromptError(
                f"each message must hold a role ({', '.join(_ROLES)}) and a content text", field=self._config.field
            )
        return {"role": item["role"], "content": item["content"]}

    def check_text(self, text: str) -> None:
        """Refuse text that the tokenizer would turn into control tokens: it could forge turns of the chat."""
        if not text.strip():
            raise PromptError("must not be empty", field=self._config.field)
        try:
            text.encode()
        except UnicodeEncodeError:
            raise PromptError("is not valid Unicode text (lone surrogate)", field=self._config.field) from None
        if self._marks is not None and not any(mark in text for mark in self._marks):
            return
        for token_id in self._tokenizer(text, add_special_tokens=False)["input_ids"]:
            if token_id in self._control:
                raise PromptError(
                    f"holds the control token '{self._control[token_id]}'; remove it", field=self._config.field
                )

    def _encode(self, messages: list[dict[str, str]]) -> list[int]:
        if not self._tokenizer.chat_template:
            if len(messages) > 1:
                raise PromptError("the target has no chat template; give plain text", field=self._config.field)
            return self._tokenizer(messages[0]["content"])["input_ids"]
        from jinja2 import TemplateError

        try:
            text = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except TemplateError as error:
            raise PromptError(f"the chat template refuses the messages: {error}", field=self._config.field) from None
        # The wrapper around the tokenizer takes as long as the tokenizer, and would only repeat what is known here.
        return self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def _marks(tokenizer: Any, control: dict[int, str]) -> set[str] | None:
    """First characters of the control tokens: text without any of them needs no tokenising to be found harmless.

    None if a control token may stand for text that looks otherwise: a piece of the vocabulary, or a normalised token.
    """
    added = tokenizer.added_tokens_decoder
    if any(token_id not in added or added[token_id].normalized for token_id in control):
        return None
    return {content[0] for content in control.values()}


def stream_prompts(config: PromptsConfig, builder: PromptBuilder) -> Iterator[Prompt | RejectedPrompt]:
    """Prompts of a source in order, one at a time, refused rows among them.

    Raises:
        UserError: the source itself cannot be read (see `unmask.prompt_rows`).
    """
    for row in prompt_rows(config):
        try:
            yield builder.build(row)
        except PromptError as error:
            yield RejectedPrompt(row=row, error=str(error))
