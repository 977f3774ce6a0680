"""Decoders by name: how a recipe or a request asks for one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from unmask.decoding.apd import APD, APDConfig
from unmask.decoding.d2f import D2F, D2FConfig
from unmask.decoding.decoder import Decoder
from unmask.decoding.dparallel import DParallel, DParallelConfig
from unmask.decoding.one_token import OneToken, OneTokenConfig
from unmask.decoding.threshold import Threshold, ThresholdConfig
from unmask.denoiser import Denoiser
from unmask.errors import ConfigError, nearest
from unmask.recipe import parse

_CONFIGS: dict[str, type] = {
    "one_token": OneTokenConfig,
    "threshold": ThresholdConfig,
    "dparallel": DParallelConfig,
    "d2f": D2FConfig,
    "apd": APDConfig,
}
_DECODERS: dict[str, Callable[[Denoiser, Any], Decoder]] = {
    "one_token": OneToken,
    "threshold": Threshold,
    "dparallel": DParallel,
    "d2f": D2F,
}


def decoder_config(settings: Mapping[str, Any]) -> Any:
    """The configuration that settings such as `{"name": "dparallel", "threshold": 0.45}` stand for.

    Raises:
        ConfigError: no or an unknown name (the nearest one is named), unknown or impossible settings.
    """
    knobs = dict(settings)
    name = knobs.pop("name", None)
    if not isinstance(name, str) or name not in _CONFIGS:
        hint = nearest(str(name), _CONFIGS) or f"; choose one of {', '.join(_CONFIGS)}"
        raise ConfigError(f"unknown decoder {name!r}{hint}", field="decoder.name")
    return parse(_CONFIGS[name], knobs)


def build_decoder(settings: Mapping[str, Any], denoiser: Denoiser, *, verifier: Denoiser | None = None) -> Decoder:
    """A decoder from its settings.

    Raises:
        ConfigError: see `decoder_config`; also a network that the decoder was not made for, or APD without a verifier.
    """
    config = decoder_config(settings)
    if not isinstance(config, APDConfig):
        return _DECODERS[settings["name"]](denoiser, config)
    if verifier is None:
        raise ConfigError("apd needs a verifier: a causal LM with the same tokenizer", field="decoder.verifier")
    return APD(denoiser, verifier, config)
