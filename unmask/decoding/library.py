"""The decoders of one network, for callers that name a decoder with each request."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from unmask.decoding.decoder import Decoder
from unmask.decoding.registry import build_decoder, decoder_config
from unmask.denoiser import Denoiser

MOST_DECODERS = 64
"""Kept at the same time; those in use stay alive beyond it."""


class DecoderLibrary:
    """Builds each decoder once: rows of one decoder object share forwards.

    Args:
        denoiser: the network of all decoders.
        default: settings of the decoder for requests that name none.
        verifier: APD's causal LM, or None to refuse APD.

    Raises:
        ConfigError: the default does not exist or does not fit the network.
    """

    def __init__(self, denoiser: Denoiser, default: Mapping[str, Any], *, verifier: Denoiser | None = None) -> None:
        self.denoiser = denoiser
        self.verifier = verifier
        self._default = dict(default)
        self._built: OrderedDict[Any, Decoder] = OrderedDict()
        self.get(None)

    @property
    def models(self) -> list[Denoiser]:
        """The networks that decoders may need a cache for."""
        return [model for model in (self.denoiser, self.verifier) if model is not None]

    def settings(self, asked: Mapping[str, Any] | None) -> dict[str, Any]:
        """The settings that a request stands for; knobs without a name are the default decoder's."""
        if asked is None or "name" not in asked:
            return {**self._default, **(asked or {})}
        return dict(asked)

    def get(self, asked: Mapping[str, Any] | None) -> Decoder:
        """The decoder that a request asks for.

        Raises:
            ConfigError: see `build_decoder`.
        """
        settings = self.settings(asked)
        config = decoder_config(settings)
        if config not in self._built:
            self._built[config] = build_decoder(settings, self.denoiser, verifier=self.verifier)
            if len(self._built) > MOST_DECODERS:
                self._built.popitem(last=False)
        self._built.move_to_end(config)
        return self._built[config]
