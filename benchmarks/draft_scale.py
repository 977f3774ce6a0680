"""How large a run of the draft benchmark is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from unmask.config import DistillConfig, DraftConfig
from unmask.recipe import load_recipe

_RECIPE = Path(__file__).parents[1] / "recipes" / "one_gpu.yaml"


@dataclass(frozen=True, slots=True)
class Scale:
    """Sizes and budgets of a run."""

    device: str
    shape: DraftConfig
    config: DistillConfig
    rows: int
    prompt_columns: int
    max_new_tokens: int
    train_prompts: int | None
    """Of each kind; None takes all."""
    own_prompts: int
    """That the target writes itself."""
    more_prompts: int
    """That it writes beside them, for the main training."""
    broad_repeats: int
    """Responses at temperature 1 to each of the few broad prompts."""
    eval_prompts: int
    real_prompts: int
    main_seconds: float
    comparison_steps: int
    ablation_steps: int
    second_steps: int


def full_scale() -> Scale:
    """One H100 or better: four minutes for a main training, half a minute for most others, hours for all cases."""
    memory_gb = torch.cuda.get_device_properties(0).total_memory / 1e9 if torch.cuda.is_available() else 80.0
    recipe = load_recipe(_RECIPE)
    config = replace(recipe.distill, feature_cache_gb=0.6 * memory_gb)
    return Scale(
        "cuda", recipe.draft, config, rows=1024, prompt_columns=408, max_new_tokens=256,
        train_prompts=None, own_prompts=4096, more_prompts=12288, broad_repeats=6, eval_prompts=128, real_prompts=8,
        main_seconds=240, comparison_steps=600, ablation_steps=300, second_steps=800,
    )  # fmt: skip


def tiny_scale() -> Scale:
    """A CPU for a few minutes."""
    config = DistillConfig(
        max_steps=None, max_seconds=600, tokens_per_step=256, anchors_per_step=128, head_negatives=None,
        precision="float32", feature_cache_gb=1.0,
    )  # fmt: skip
    return Scale(
        "cpu", DraftConfig(num_layers=1, block_size=4), config, rows=2, prompt_columns=80, max_new_tokens=6,
        train_prompts=4, own_prompts=2, more_prompts=2, broad_repeats=2, eval_prompts=2, real_prompts=1, main_seconds=3,
        comparison_steps=2, ablation_steps=2, second_steps=2,
    )  # fmt: skip
