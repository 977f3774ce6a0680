"""Low-rank adapters (LoRA, arXiv 2106.09685) on a diffusion LM, through peft."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from unmask.config import LoraSettings
from unmask.errors import ConfigError
from unmask.models.transformer import DiffusionLM


def add_adapters(network: DiffusionLM, settings: LoraSettings, seed: int = 0) -> None:
    """Freeze the network and put trainable adapters beside its projections, in place; at first they add nothing.

    Raises:
        ConfigError: a target that no module is named.
    """
    names = {name.rpartition(".")[2] for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    unknown = [target for target in settings.targets if target not in names]
    if unknown:
        raise ConfigError(
            f"no projection is named '{unknown[0]}'; this network has {', '.join(sorted(names))}",
            field="student.lora.targets",
        )
    network.requires_grad_(False)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.targets),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, network)


def merged(network: DiffusionLM) -> DiffusionLM:
    """A copy with the adapters folded into the weights: W + (alpha / r) B A, under the original names."""
    network = copy.deepcopy(network)
    for name, module in list(network.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, module.get_base_layer())
    return network.requires_grad_(True)


@contextmanager
def adapters_disabled(network: DiffusionLM) -> Iterator[None]:
    """The network as it was before training."""
    layers = [module for module in network.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
