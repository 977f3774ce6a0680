"""A diffusion LM inside this process, shared by many callers: the teacher of `pipelines.generate`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from engines.engine_thread import Completion, EngineThread
from unmask.config import TargetConfig
from unmask.decoding.engine import DiffusionEngine, EngineConfig
from unmask.decoding.registry import build_decoder
from unmask.decoding.request import DecodeRequest
from unmask.errors import ConfigError
from unmask.models import families
from unmask.recipe import parse
from unmask.types import SamplingOptions


def diffusion_arguments(target: TargetConfig, path: Path, decoder: Mapping[str, Any], *, dtype: str) -> dict[str, Any]:
    """Arguments of `OfflineDiffusionEngine`; `target.engine` holds fields of `EngineConfig` but `max_length`.

    Raises:
        ConfigError: an unknown option, or an impossible value.
    """
    if "max_length" in target.engine:
        raise ConfigError("is decided by target.max_model_len; remove it", field="target.engine.max_length")
    try:
        config = parse(EngineConfig, {**target.engine, "max_length": target.max_model_len})
    except ConfigError as error:
        raise ConfigError(str(error), field="target.engine") from None
    return {"path": str(path), "decoder": dict(decoder), "dtype": dtype, "config": config}


class OfflineDiffusionEngine(EngineThread["_Decoding"]):
    """Generates with a diffusion LM in this process.

    Args:
        arguments: from `diffusion_arguments`.
        on_gpu: put the network on the GPU.

    Raises:
        CheckpointError: the directory holds no diffusion LM.
        ConfigError: a decoder that the network was not made for.
    """

    def __init__(self, arguments: dict[str, Any], *, on_gpu: bool = False) -> None:
        super().__init__(lambda: _Decoding(device="cuda" if on_gpu else "cpu", **arguments), "diffusion")


class _Decoding:
    """Network, decoder and engine as the thread drives them."""

    def __init__(self, *, path: str, decoder: dict[str, Any], dtype: str, config: EngineConfig, device: str) -> None:
        import torch

        network = families.load(path, dtype=None if dtype == "auto" else getattr(torch, dtype), device=device)
        if config.max_length > network.max_length:
            raise ConfigError(f"the network's positions end at {network.max_length}", field="target.max_model_len")
        self._decoder = build_decoder(decoder, network)
        self._engine = DiffusionEngine(self._decoder.cached_models, config)

    @property
    def has_room(self) -> bool:
        """As many wait as run: a row that ends is followed at once, and no queue overflows."""
        config = self._engine.config
        return self._engine.num_waiting < min(config.max_rows, config.max_waiting)

    def add(self, name: str, prompt_ids: Sequence[int], options: SamplingOptions) -> None:
        """See SteppedEngine."""
        request = DecodeRequest(request_id=name, prompt_ids=tuple(prompt_ids), options=options)
        self._engine.submit(request, self._decoder)

    def step(self) -> Iterable[tuple[str, Completion]]:
        """See SteppedEngine."""
        for output in self._engine.step():
            if done := output.completion:
                yield (
                    done.request_id,
                    Completion(done.response_ids, done.finish_reason, done.num_forwards, done.commit_step),
                )
