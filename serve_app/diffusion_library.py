"""The decoders of the served diffusion LM: over its weights in a replica, over its shape alone elsewhere."""

from __future__ import annotations

from typing import Any

import torch

from unmask.config import ServeConfig
from unmask.decoding.engine import EngineConfig
from unmask.decoding.library import DecoderLibrary
from unmask.decoding.request import DecodeRequest
from unmask.denoiser import Denoiser
from unmask.errors import CheckpointError, ConfigError
from unmask.models import families
from unmask.models.transformer import DiffusionLM
from unmask.types import SamplingOptions

_USUAL_BLOCK = 32
_FED_COLUMNS = 16384
"""Of one forward, so that prefills of long prompts do not make other rows wait."""


def load_library(serve: ServeConfig) -> DecoderLibrary:
    """Load the networks onto the device of the replica. Raises CheckpointError; ConfigError as `library_shape` does."""
    on_gpu = serve.diffusion_gpus > 0
    name = serve.dtype if serve.dtype != "auto" else ("bfloat16" if on_gpu else "float32")

    def load(directory: str) -> DiffusionLM:
        return families.load(directory, dtype=getattr(torch, name), device="cuda" if on_gpu else "cpu")

    verifier = None if serve.verifier is None else load(serve.verifier)
    return _library(serve, load(serve.diffusion or ""), verifier)


def library_shape(serve: ServeConfig) -> DecoderLibrary:
    """The same decoders without weights: enough to check requests.

    Raises:
        CheckpointError: no network of a known family in a directory, or one whose attention does not fit its role.
        ConfigError: `serve.decoder` does not fit the network, or `serve.diffusion_length` exceeds its positions.
    """

    def shape(directory: str, field: str) -> DiffusionLM:
        try:
            config = families.read(directory)
        except CheckpointError as error:
            raise CheckpointError(str(error), field=field) from None
        if (config.attention == "causal") != (field == "serve.verifier"):
            wanted = "a causal LM" if field == "serve.verifier" else "a diffusion LM"
            raise CheckpointError(f"'{directory}' is {config.attention}; name {wanted}", field=field)
        with torch.device("meta"):
            return DiffusionLM(config)

    network = shape(serve.diffusion or "", "serve.diffusion")
    if serve.diffusion_length > network.max_length:
        raise ConfigError(f"the network's positions end at {network.max_length}", field="serve.diffusion_length")
    verifier = None if serve.verifier is None else shape(serve.verifier, "serve.verifier")
    try:
        return _library(serve, network, verifier)
    except ConfigError as error:
        raise ConfigError(str(error), field="serve.decoder") from None


def engine_config(serve: ServeConfig) -> EngineConfig:
    """The bounds of a replica's engine. Requests wait in the ingress, where they can be refused."""
    length = serve.diffusion_length
    return EngineConfig(
        max_rows=serve.diffusion_rows,
        max_length=length,
        max_waiting=serve.diffusion_rows,
        max_fed_columns=max(length, _FED_COLUMNS),
        cuda_graphs=serve.diffusion_gpus > 0,
    )


def warm_up_request(denoiser: Denoiser) -> DecodeRequest:
    """A short request that any decoder of the network can run."""
    token = next(token for token in range(denoiser.vocab_size) if token != denoiser.mask_id)
    return DecodeRequest(
        request_id="warm-up", prompt_ids=(token,), options=SamplingOptions(max_tokens=1, ignore_eos=True)
    )


def _library(serve: ServeConfig, network: DiffusionLM, verifier: DiffusionLM | None) -> DecoderLibrary:
    return DecoderLibrary(network, serve.decoder or _decoder_for(network), verifier=verifier)


def _decoder_for(network: DiffusionLM) -> dict[str, Any]:
    trained = network.block_size
    if trained is None:
        return {"name": "threshold", "block_size": _USUAL_BLOCK}
    return {"name": "d2f", "block_size": trained * max(1, _USUAL_BLOCK // trained)}
