"""How a vLLM engine is told of a draft in another process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmask.errors import ConfigError

REMOTE_DRAFT = "engines.remote_draft.RemoteDraft"

LINK_FILE_VARIABLE = "VLLM_UNMASK_DRAFT"
"""Names the link file (`unmask.pairing.link_file`); vLLM hands variables of its prefix to all of its workers."""

AUX_LAYERS_KEY = "eagle_aux_hidden_state_layer_ids"
"""The layers that the target reports. vLLM's id m is the residual stream before block m: one more than a draft's id."""

_REQUIRED = {"speculative_config": None, "async_scheduling": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteDraftOptions:
    """A draft that is reached over the wire."""

    link_file: Path
    """See `unmask.pairing.link_file`; it may name no draft yet."""
    layer_ids: tuple[int, ...]
    """The draft's `target_layer_ids`."""
    num_speculative_tokens: int
    """K: the most that is ever asked for; at most the draft's block size - 1."""


def with_remote_draft(arguments: dict[str, Any], draft: RemoteDraftOptions) -> dict[str, Any]:
    """Engine arguments with a remote draft added.

    Prefix caching is off unless it is asked for. With it the draft keeps the context of cached prefixes too, by hash.

    Raises:
        ConfigError: an argument contradicts the draft.
    """
    for name, required in _REQUIRED.items():
        if arguments.get(name, required) != required:
            raise ConfigError(f"must be {required} with a remote draft; remove it", field=f"target.engine.{name}")
    overrides: dict[str, Any] = arguments.get("hf_overrides", {})
    return arguments | {
        "speculative_config": {
            "method": "custom_class",
            "model": REMOTE_DRAFT,
            "num_speculative_tokens": draft.num_speculative_tokens,
        },
        "hf_overrides": overrides | {AUX_LAYERS_KEY: [layer + 1 for layer in draft.layer_ids]},
        "enable_prefix_caching": arguments.get("enable_prefix_caching", False),
        "async_scheduling": False,
    }
