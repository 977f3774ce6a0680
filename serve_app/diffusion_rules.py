"""What a request may ask of a diffusion LM, decided before anything is decoded or any replica is called."""

from __future__ import annotations

import json
from dataclasses import replace

from serve_app import errors
from serve_app.generation import ChoiceSpec
from serve_app.protocol import GenerationRequest
from unmask.decoding.library import DecoderLibrary
from unmask.decoding.request import DecodeRequest
from unmask.errors import PromptError, UserError

MAX_DECODER_CHARS = 1024


class DiffusionRules:
    """Checks requests against the network that will serve them.

    Args:
        library: decoders over the network's shape; its weights are not needed.
    """

    def __init__(self, library: DecoderLibrary) -> None:
        self._library = library

    def apply(self, body: GenerationRequest, specs: list[ChoiceSpec], prompt_param: str) -> list[ChoiceSpec]:
        """The choices with what the decoders know of, each checked as the engine will check it.

        Args:
            body: the request.
            specs: the choices that it asks for.
            prompt_param: name of the request's prompt field, for errors.

        Raises:
            ApiError: 400 that names the field at fault.
        """
        _refuse_unknown(body)
        settings = body.decoder
        if settings is not None and len(json.dumps(settings)) > MAX_DECODER_CHARS:
            raise errors.invalid(f"exceeds {MAX_DECODER_CHARS} characters", "decoder")
        newer = getattr(body, "max_completion_tokens", None)
        max_param = "max_tokens" if newer is None else "max_completion_tokens"
        if (newer or body.max_tokens) is not None:
            self._check_blocks(body, newer or body.max_tokens or 0)
        checked = [replace(spec, options=replace(spec.options, logprobs=None)) for spec in specs]
        for spec in checked:
            self._check(spec, prompt_param, max_param)
        return checked

    def _check(self, spec: ChoiceSpec, prompt_param: str, max_param: str) -> None:
        request = DecodeRequest(request_id="check", prompt_ids=tuple(spec.prompt_ids), options=spec.options)
        try:
            self._library.get(spec.options.decoder).admit(request, slot=-1)
        except PromptError as error:
            raise errors.invalid(error.args[0], prompt_param) from None
        except UserError as error:
            param = max_param if error.field == "max_tokens" else _decoder_param(error.field, spec.options.decoder)
            raise errors.invalid(error.args[0], param) from None

    def _check_blocks(self, body: GenerationRequest, max_tokens: int) -> None:
        """A client that gives both sizes is told where they do not fit; a default block may be cut short."""
        block = (body.decoder or {}).get("block_size")
        if isinstance(block, int) and block >= 1 and max_tokens % block:
            raise errors.invalid(f"{block} does not divide the {max_tokens} tokens asked for", "decoder.block_size")


def _decoder_param(field: str | None, settings: object) -> str | None:
    """The name of a decoder's setting as the request has it."""
    if field is None or field.startswith("decoder") or settings is None:
        return field
    return f"decoder.{field}"


def _refuse_unknown(body: GenerationRequest) -> None:
    """Refuse options that no diffusion decoder has; those that merely ask for nothing are let through."""
    logprobs = getattr(body, "logprobs", None)
    if logprobs is not None and logprobs is not False:
        raise errors.invalid("log-probabilities are not defined for a diffusion LM; leave this out", "logprobs")
    if body.response_format is not None and body.response_format.type != "text":
        raise errors.invalid("a diffusion LM cannot follow a grammar; leave this out", "response_format")
    if (body.top_k or 0) > 0:
        raise errors.invalid("is not supported by diffusion decoders; use top_p", "top_k")
    for name in ("presence_penalty", "frequency_penalty"):
        if getattr(body, name):
            raise errors.invalid("is not supported by diffusion decoders; leave it out", name)
