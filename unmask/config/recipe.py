"""One run: every section of a recipe, and what must fit together between sections."""

from __future__ import annotations

from dataclasses import dataclass, field

from unmask.config.checks import require
from unmask.config.diffusion import AdaptConfig, StudentConfig
from unmask.config.distill import DistillConfig, DraftConfig
from unmask.config.evaluate import EvaluateConfig
from unmask.config.generate import GenerateConfig
from unmask.config.on_policy import OnPolicyConfig
from unmask.config.prompts import PromptsConfig
from unmask.config.publish import PublishConfig
from unmask.config.serve import ServeConfig
from unmask.config.target import TargetConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One run: from prompts to a served pairing, or, with a `student`, to a faster diffusion LM."""

    run_dir: str = ".unmask/run"
    target: TargetConfig = field(default_factory=TargetConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    adapt: AdaptConfig | None = None
    """Turn the target into a diffusion LM, which is then the teacher."""
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    draft: DraftConfig = field(default_factory=DraftConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    student: StudentConfig | None = None
    """Distil a diffusion LM, not a draft: the teacher is also the student's beginning."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    publish: PublishConfig = field(default_factory=PublishConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    on_policy: OnPolicyConfig | None = None
    """Rounds of `pipelines.on_policy`; None is one round."""

    def __post_init__(self) -> None:
        largest = self.draft.block_size - 1
        for section, k in (
            ("evaluate", self.evaluate.num_speculative_tokens),
            ("serve", self.serve.num_speculative_tokens),
        ):
            require(
                k is None or k <= largest,
                f"{section}.num_speculative_tokens",
                f"K = {k} exceeds block size - 1 = {largest}; lower it or raise draft.block_size",
            )
        require(
            self.generate.max_new_tokens < self.target.max_model_len,
            "generate.max_new_tokens",
            f"must leave room for a prompt inside target.max_model_len = {self.target.max_model_len}",
        )
        if self.student is not None:
            self._check_student(self.student)

    def _check_student(self, student: StudentConfig) -> None:
        require(
            self.generate.decoder is not None,
            "generate.decoder",
            "a student learns from a diffusion LM; say how that decodes, as in {name: one_token, block_size: 32}",
        )
        require(
            self.generate.max_new_tokens <= student.response_length,
            "student.response_length",
            f"must be at least generate.max_new_tokens = {self.generate.max_new_tokens}",
        )
        require(
            student.response_length < self.target.max_model_len,
            "student.response_length",
            f"must leave room for a prompt inside target.max_model_len = {self.target.max_model_len}",
        )
        require(
            self.adapt is None or self.adapt.attention == "bidirectional" or student.teacher is not None,
            "adapt.attention",
            "a student's teacher is bidirectional",
        )
