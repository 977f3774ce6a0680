"""Diffusion LMs: how a causal LM becomes one, and how one is distilled into a faster one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from unmask.config.checks import require
from unmask.config.prompts import PromptsConfig
from unmask.config.training import TrainingConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptConfig(TrainingConfig):
    """From a causal LM to a masked-diffusion LM (DiffuLLaMA, arXiv 2410.17891): full parameters, shift kept."""

    section: ClassVar[str] = "adapt"

    data: PromptsConfig = field(default_factory=lambda: PromptsConfig(source="word_problems"))
    """Rows with a prompt and a response."""
    response_field: str = "response"
    """The column that holds the response's text."""
    attention: Literal["bidirectional", "block_causal", "causal"] = "bidirectional"
    """`bidirectional` is a teacher; `block_causal` trains on [noisy ; clean] (BD3-LM, arXiv 2503.09573); `causal`
    leaves the model what it is and fine-tunes it: APD's verifier, and the baseline that a diffusion LM has to beat."""
    block_size: int | None = None
    """Of block_causal attention."""
    mask_token_id: int | None = None
    """None picks the first unused special id of the tokenizer."""
    response_length: int = 128
    """Tokens of every response: shorter ones are filled up with EOS, which is learned, longer ones are dropped."""
    full_padding: int = 16
    """EOS paddings a row that count fully in the loss."""
    padding_weight: float = 0.05
    """Loss weight of the other paddings."""
    annealing_steps: int = 0
    """Steps over which attention opens from causal to full."""

    def __post_init__(self) -> None:
        TrainingConfig.__post_init__(self)
        blocks = self.attention == "block_causal"
        self.check(blocks == (self.block_size is not None), "block_size", "belongs to block_causal attention")
        self.check(self.block_size is None or self.block_size >= 1, "block_size", "must be at least 1")
        self.check(self.response_length >= 2, "response_length", "must be at least 2 tokens")
        self.check(self.full_padding >= 0, "full_padding", "must not be negative")
        self.check(0 <= self.padding_weight <= 1, "padding_weight", "must be in [0, 1]")
        self.check(self.annealing_steps >= 0, "annealing_steps", "must not be negative")
        anneals = self.annealing_steps > 0
        self.check(
            not anneals or self.attention == "bidirectional", "annealing_steps", "is for bidirectional attention"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """Low-rank adapters (LoRA, arXiv 2106.09685), merged into the weights when a checkpoint is published."""

    rank: int = 32
    alpha: int = 32
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

    def __post_init__(self) -> None:
        require(self.rank >= 1, "student.lora.rank", "must be at least 1")
        require(self.alpha > 0, "student.lora.alpha", "must be positive")
        require(0 <= self.dropout < 1, "student.lora.dropout", "must be in [0, 1)")
        require(bool(self.targets), "student.lora.targets", "name at least one projection")


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentConfig(TrainingConfig):
    """Distillation of a diffusion LM on its own verified trajectories."""

    section: ClassVar[str] = "student"

    objective: Literal["dparallel", "d2f"] = "dparallel"
    """`dparallel` is certainty forcing (arXiv 2509.26488), `d2f` discrete diffusion forcing (arXiv 2508.09192)."""
    teacher: str | None = None
    """The diffusion LM to start from; None is what `adapt` made."""
    lora: LoraSettings | None = None
    """None trains all weights."""
    response_length: int = 128
    """Tokens of every response, filled up with EOS; what decoders are asked for later."""
    block_size: int | None = 32
    """dparallel: length of the active segment, None makes the whole response active. d2f: the student's block."""
    beta: float = 2.0
    """dparallel: weight of the certainty term."""
    entropy_temperature: float = 0.5
    """dparallel: T of the certainty term."""
    mask_ratio: float = 0.5
    """dparallel: share of the active segment that the first view hides."""
    mask_ratio_top: float | None = None
    """dparallel: draw that share for each row between `mask_ratio` and this; None is the one share, as published."""
    text_segments: bool = False
    """dparallel: let only segments that hold text be active; False is all of the response, as published."""
    noise_low: float = 0.2
    """d2f: the first block's noise is uniform in [noise_low, noise_high]."""
    noise_high: float = 0.7
    noise_top: float = 0.7
    """d2f: bound of the last block's noise; decoding starts blocks at 1, the paper trains up to 0.7."""
    divergence: Literal["forward", "reverse"] = "forward"
    """d2f: KL(teacher || student), as the authors' code, or the other way round, as their text."""
    certainty: float = 0.0
    """d2f: weight of the certainty term added to the divergence; 0 is the published objective."""

    def __post_init__(self) -> None:
        TrainingConfig.__post_init__(self)
        self.check(self.response_length >= 2, "response_length", "must be at least 2 tokens")
        self.check(self.block_size is None or self.block_size >= 1, "block_size", "must be at least 1")
        self.check(self.objective != "d2f" or self.block_size is not None, "block_size", "d2f needs one")
        self.check(self.beta >= 0, "beta", "must not be negative")
        self.check(self.certainty >= 0, "certainty", "must not be negative")
        self.check(self.entropy_temperature > 0, "entropy_temperature", "must be positive")
        self.check(0 < self.mask_ratio < 1, "mask_ratio", "must be in (0, 1)")
        top = self.mask_ratio_top
        self.check(top is None or self.mask_ratio <= top <= 1, "mask_ratio_top", "must be in [mask_ratio, 1]")
        self.check(
            0 < self.noise_low <= self.noise_high <= self.noise_top <= 1,
            "noise_low",
            "0 < noise_low <= noise_high <= noise_top <= 1 must hold",
        )
