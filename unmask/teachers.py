"""Teachers: the model that writes a recipe's trajectories, and what a diffusion LM must be to do so."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from unmask.config import Recipe
from unmask.errors import CheckpointError, ConfigError
from unmask.targets import validate_directory
from unmask.types import TargetRecord

ADAPTED = Path("teacher") / "final"
"""In a run directory: what `pipelines.adapt` makes."""
WRITER = "teacher.json"
"""In a folder of trajectories: the record of the model that writes them."""


def check_writer(trajectories: Path, record: TargetRecord) -> None:
    """Refuse a model that is to add to, or learn from, what another one wrote: the same name may stand for other
    weights by now. A folder without a record may be anybody's.

    Raises:
        ConfigError: naming the first field in which the two differ.
    """
    path, now = trajectories / WRITER, asdict(record)
    wrote = json.loads(path.read_text()) if path.is_file() else {}
    if differing := next((name for name in wrote if wrote[name] != now.get(name)), None):
        raise ConfigError(
            f"is not the model that wrote '{trajectories}' (another {differing}); "
            "name that one, use another run_dir, or generate anew with --fresh",
            field="target.model",
        )


def with_teacher(recipe: Recipe, run_dir: Path) -> Recipe:
    """The recipe with its teacher in the target's place: `student.teacher`, else what `adapt` made, else the target.

    Raises:
        CheckpointError: `adapt` is asked for and has not finished.
    """
    if recipe.generate.decoder is None:
        return recipe
    if recipe.student is not None and recipe.student.teacher is not None:
        return _with_model(recipe, recipe.student.teacher)
    if recipe.adapt is None:
        return recipe
    path = run_dir / ADAPTED
    if not path.is_dir():
        raise CheckpointError(
            f"no teacher at '{path}'; run `python -m pipelines.adapt` with this run_dir first", field="adapt"
        )
    return _with_model(recipe, str(path.absolute()))


def check_teacher(path: Path, decoder: Mapping[str, Any] | None) -> None:
    """Refuse a teacher that cannot be decoded as the recipe asks, without loading its weights.

    Args:
        decoder: `generate.decoder`.

    Raises:
        ConfigError: a diffusion LM without a decoder, or a decoder that the network was not made for.
        CheckpointError: a decoder, and a network of no known family.
    """
    if decoder is None:
        config = validate_directory(path)
        if "mask_token_id" in config or "unmask" in config:
            raise ConfigError(
                "the target is a diffusion LM; say how it decodes, as in {name: one_token, block_size: 32}",
                field="generate.decoder",
            )
        return
    import torch

    from unmask.decoding.registry import build_decoder
    from unmask.models import families
    from unmask.models.transformer import DiffusionLM

    network = families.read(path)
    if network.attention == "causal":
        raise ConfigError(
            "the target is a causal LM; make a diffusion LM of it with an `adapt` section, or leave this out",
            field="generate.decoder",
        )
    with torch.device("meta"):
        build_decoder(decoder, DiffusionLM(network))


def _with_model(recipe: Recipe, model: str) -> Recipe:
    return replace(recipe, target=replace(recipe.target, model=model, revision=None))
