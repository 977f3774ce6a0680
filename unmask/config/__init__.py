"""What a run is made of: one frozen dataclass per concept, presets as functions.

Plain dataclasses, so that the library imports without a validation framework; `unmask.recipe` reads
YAML and dotted overrides into them and turns every mistake into a one-line `ConfigError`.
Combinations that cannot work are refused in `__post_init__`, before any model is loaded.
"""

from unmask.config.diffusion import AdaptConfig, LoraSettings, StudentConfig
from unmask.config.distill import DistillConfig, DraftConfig, published
from unmask.config.evaluate import EvaluateConfig
from unmask.config.generate import GenerateConfig
from unmask.config.on_policy import OnPolicyConfig
from unmask.config.prompts import PromptsConfig
from unmask.config.publish import PublishConfig
from unmask.config.recipe import Recipe
from unmask.config.serve import ServeConfig
from unmask.config.target import EMBEDDED_TARGET, TOY_TARGET, TargetConfig
from unmask.config.training import TrainingConfig

__all__ = [
    "EMBEDDED_TARGET",
    "TOY_TARGET",
    "AdaptConfig",
    "DistillConfig",
    "DraftConfig",
    "EvaluateConfig",
    "GenerateConfig",
    "LoraSettings",
    "OnPolicyConfig",
    "PromptsConfig",
    "PublishConfig",
    "Recipe",
    "ServeConfig",
    "StudentConfig",
    "TargetConfig",
    "TrainingConfig",
    "published",
]
