"""The draft's shape and its training."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import ClassVar, Literal

from unmask.config.checks import require, require_labels, require_workers

_RATES = {"adamw": 1.5e-3, "muon": 1.2e-2}
_DECAYS = {"adamw": 0.01, "muon": 0.1}
_CERTAINTY_START = 0.3
_FURTHER_RATE = 1e-4
"""Of AdamW, for a draft that is trained already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftConfig:
    """Shape of a DFlash draft (its width, heads and vocabulary are the target's)."""

    num_layers: int = 2
    block_size: int = 8
    """B: the anchor and B - 1 masks."""
    num_target_features: int = 5
    """D: sampled target layers, evenly spaced from block 1 to block N - 3."""
    mask_token_id: int | None = None
    """None picks the first unused special id of the tokenizer."""
    init: Literal["target", "random"] = "target"
    """`target` starts each block from a target block and `fc` from the last feature; `random` is N(0, 0.02)."""
    go_on_from: str | None = None
    """A draft of this shape for this target whose weights training starts from, in place of `init`
    (`DistillConfig.further`)."""

    def __post_init__(self) -> None:
        require(self.num_layers >= 1, "draft.num_layers", "must be at least 1")
        require(self.block_size >= 2, "draft.block_size", "must be at least 2 (the anchor and one mask)")
        require(self.num_target_features >= 1, "draft.num_target_features", "must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillConfig:
    """Training of the draft. Defaults suit a few CPU minutes; loss, weighting and certainty term are the best of
    `benchmarks.draft_quality`, and `published()` is the paper's recipe."""

    section: ClassVar[str] = "distill"
    """See TrainingConfig."""
    max_steps: int | None = None
    max_seconds: float | None = 300.0
    """Budget of optimiser time (loading and features not counted); the first limit reached ends the run."""
    sequences_per_step: int = 2
    """Of all workers together."""
    anchors_per_sequence: int = 16
    tokens_per_step: int | None = None
    """Pack sequences into rows of this many tokens, attended block-sparsely (on GPUs); None pads `sequences_per_step`
    sequences."""
    rows_per_step: int = 1
    """Packed rows of a step, of all workers together."""
    anchors_per_step: int = 1024
    """Anchors of a packed row."""
    loss: Literal["ce", "kl", "tv", "lk_hybrid"] = "kl"
    """Of a row: cross-entropy with the target's token, or a distance to its distribution."""
    target_temperature: float = 1.0
    """Of the target's distribution that `loss` compares with: the lower, the more its most likely token is all that
    counts."""
    weighting: Literal["decay", "d_pace", "first_miss", "d_pace_first_miss"] = "first_miss"
    """How rows of a block are weighed: fixed decay, D-PACE, up to the first wrong row, or D-PACE up to that row."""
    pace_smoothing: float = 0.5
    """How far D-PACE takes the draft's confidences towards 1: at 1 a row weighs as many tokens as it can begin."""
    decay_gamma: float | None = None
    """Position decay; None takes 7 / 5 / 4 for B = 16 / 10 / 8 and B / 2 otherwise."""
    beta: float = 0.5
    """Weight of the certainty-forcing term; 0 switches it off."""
    gate: Literal["right", "prefix_right", "target_relative"] = "prefix_right"
    """Rows that are forced: right ones, right ones behind right ones, or (`target_relative`) those whose argmax is that
    of the target's distribution, by the probability that a verification reaches them, and never below the target's own
    entropy."""
    gate_temperature: float = 1.0
    """Temperature at which the draft will be verified, for `target_relative`: a drafted token before the row is
    accepted with the target's probability of it, at 0 if it is the target's most likely one."""
    certainty_start: float = _CERTAINTY_START
    """Share of the budget before which beta is 0: a draft should not be sure of what it has not learned yet. It then
    rises linearly over `certainty_ramp`."""
    certainty_ramp: float = 0.0
    """Share of the budget, after `certainty_start` and within it, over which beta rises."""
    entropy_temperature: float = 0.5
    confidence_weight: float = 0.0
    """Weight of the confidence head's loss (it never reaches the draft); 0 trains none. It takes the whole LM head
    (`head_negatives: null`)."""
    optimizer: Literal["adamw", "muon"] | None = None
    """Muon makes the updates of matrices orthogonal, and leaves the rest to AdamW. None is Muon on GPUs and AdamW on
    CPUs, where that costs more than the rest of a step."""
    learning_rate: float | None = None
    """The highest. None is 1.2e-2 for Muon, which with twice of it learns as well, and 1.5e-3 for AdamW, which suits
    steps of a few hundred tokens; in steps of 16,384 it learns more at 6e-3 (`benchmarks.draft_quality`)."""
    schedule: Literal["constant_then_linear", "cosine"] = "constant_then_linear"
    warmup_fraction: float = 0.0
    decay_fraction: float = 0.4
    """Share of the budget over which the rate falls linearly to 0 (constant_then_linear)."""
    weight_decay: float | None = None
    """Decoupled. None is 0.1 for the matrices that Muon takes and 0.01 for what AdamW takes; a value holds for both."""
    grad_clip: float = 1.0
    ema: float = 0.99
    """Decay of the averaged weights that are published; 0 switches averaging off."""
    head_negatives: int | None = 1024
    """Train the head on the ids of the trajectories and this many random others; None uses the whole vocabulary."""
    precision: Literal["bfloat16", "float32"] | None = None
    """Of target and products; master weights and optimiser are float32. None is bfloat16 on GPUs and on CPUs that have
    instructions for it, else float32."""
    num_workers: int = 1
    min_workers: int | None = None
    """Go on with as few workers when nodes are lost, and with more as they come back; None waits for all of them."""
    cpus_per_worker: float = 1.0
    use_gpu: bool = False
    labels: dict[str, str] = field(default_factory=dict)
    """Workers run on nodes with these labels only."""
    threads_per_worker: int | None = None
    compile: bool = False
    """Compile the draft's layers and the loss with torch.compile (GPUs)."""
    cuda_graph: bool = False
    """Record a step as one CUDA graph, for GPUs and packed sequences: the host has next to nothing to do between two
    steps. Several workers then exchange gradients after the backward pass, not behind it."""
    feature_cache_gb: float = 4.0
    """Target features are kept in memory up to this size and recomputed beyond it."""
    feature_cache_device: Literal["cpu", "training"] = "cpu"
    """Where they are kept: host memory (pinned, of a GPU's features), or the memory of the training device."""
    checkpoint_every_s: float = 60.0
    log_every_steps: int = 50
    max_failures: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        require(
            self.max_steps is not None or self.max_seconds is not None,
            "distill.max_steps",
            "give max_steps, max_seconds or both: the run has no end",
        )
        require(self.max_steps is None or self.max_steps > 0, "distill.max_steps", "must be positive")
        require(self.max_seconds is None or self.max_seconds > 0, "distill.max_seconds", "must be positive")
        for name in ("sequences_per_step", "rows_per_step", "anchors_per_sequence", "num_workers", "log_every_steps"):
            require(getattr(self, name) >= 1, f"distill.{name}", "must be at least 1")
        rows = "sequences_per_step" if self.tokens_per_step is None else "rows_per_step"
        require_workers("distill", rows, getattr(self, rows), self.num_workers, self.min_workers)
        require(
            self.tokens_per_step is None or (self.tokens_per_step > 0 and self.tokens_per_step % 128 == 0),
            "distill.tokens_per_step",
            "must be a positive multiple of 128",
        )
        require(
            self.anchors_per_step > 0 and self.anchors_per_step % 128 == 0,
            "distill.anchors_per_step",
            "must be a positive multiple of 128",
        )
        require(
            not self.cuda_graph or (self.use_gpu and self.tokens_per_step is not None and self.head_negatives is None),
            "distill.cuda_graph",
            "needs use_gpu, tokens_per_step, and the whole head (head_negatives: null)",
        )
        for name in ("certainty_start", "certainty_ramp"):
            require(0 <= getattr(self, name) <= 1, f"distill.{name}", "must be in [0, 1]")
        require(
            self.certainty_start < 1,
            "distill.certainty_start",
            "must be below 1: the run is over before beta rises; lower it, or set beta to 0",
        )
        require(
            # Decimal shares that add up to 1 may exceed it by a rounding.
            self.certainty_start + self.certainty_ramp <= 1 + 1e-9,
            "distill.certainty_ramp",
            f"certainty_start + certainty_ramp = {self.certainty_start + self.certainty_ramp:g} exceeds 1: the run is "
            "over before beta is reached; lower one of them",
        )
        for name in ("beta", "gate_temperature", "feature_cache_gb", "max_failures", "confidence_weight"):
            require(getattr(self, name) >= 0, f"distill.{name}", "must not be negative")
        require(self.weight_decay is None or self.weight_decay >= 0, "distill.weight_decay", "must not be negative")
        for name in ("entropy_temperature", "target_temperature", "grad_clip", "checkpoint_every_s", "cpus_per_worker"):
            require(getattr(self, name) > 0, f"distill.{name}", "must be positive")
        require(self.learning_rate is None or self.learning_rate > 0, "distill.learning_rate", "must be positive")
        require(
            self.learning_rate is None or self.optimizer is not None or not self.use_gpu,
            "distill.optimizer",
            "name it beside learning_rate: on GPUs it is muon otherwise, whose rate is eight times adamw's",
        )
        require_labels(self.labels, "distill.labels")
        require(0 <= self.pace_smoothing <= 1, "distill.pace_smoothing", "must be in [0, 1]")
        require(0 <= self.ema < 1, "distill.ema", "must be in [0, 1)")
        require(0 <= self.warmup_fraction < 1, "distill.warmup_fraction", "must be in [0, 1)")
        require(0 <= self.decay_fraction <= 1, "distill.decay_fraction", "must be in [0, 1]")
        require(self.decay_gamma is None or self.decay_gamma > 0, "distill.decay_gamma", "must be positive")
        require(
            self.head_negatives is None or self.head_negatives >= 0, "distill.head_negatives", "must not be negative"
        )
        require(
            self.confidence_weight == 0 or self.head_negatives is None,
            "distill.head_negatives",
            "must be null with a confidence head: among few tokens a draft seems to be right more often than it is",
        )
        self._require_use()

    def _require_use(self) -> None:
        """Refuse what would be given in vain. Raises ConfigError."""
        packed = self.tokens_per_step is not None
        given = {
            "target_temperature": (self.loss != "ce", "with loss: ce the text's token is compared with alone"),
            "decay_gamma": (self.weighting == "decay", "it is of weighting: decay"),
            "pace_smoothing": (self.weighting.startswith("d_pace"), "it is of weighting: d_pace"),
            "gate_temperature": (self.gate == "target_relative", "it is of gate: target_relative"),
            "rows_per_step": (packed, "it is of packed rows; give tokens_per_step, or sequences_per_step in its place"),
            "anchors_per_step": (packed, "it is of packed rows; give tokens_per_step, or anchors_per_sequence"),
            "anchors_per_sequence": (not packed, "packed rows (tokens_per_step) take anchors_per_step"),
            "sequences_per_step": (not packed, "packed rows (tokens_per_step) take rows_per_step"),
        }
        defaults = {field.name: field.default for field in fields(self)}
        for name, (used, reason) in given.items():
            require(used or getattr(self, name) == defaults[name], f"distill.{name}", f"has no effect: {reason}")

    @property
    def chosen_optimizer(self) -> Literal["adamw", "muon"]:
        """`optimizer`, or what None stands for."""
        return self.optimizer or ("muon" if self.use_gpu else "adamw")

    def decay_of(self, optimizer: Literal["adamw", "muon"]) -> float:
        """`weight_decay` of the parameters that an optimiser takes, or what None stands for."""
        return _DECAYS[optimizer] if self.weight_decay is None else self.weight_decay

    @property
    def highest_rate(self) -> float:
        """`learning_rate`, or what None stands for."""
        return self.learning_rate or _RATES[self.chosen_optimizer]

    def further(self) -> DistillConfig:
        """This section as it trains a draft that is trained already (`draft.go_on_from`).

        On GPUs an optimiser that is left open is AdamW at 1e-4 then, and a certainty term that comes in when it does by
        default is there from the first step: at a third of a first stage's rate a draft already loses more than new
        text gives it (`benchmarks.draft_quality`, cases `further`). Another `optimizer` or `certainty_start` is kept.
        """
        if not self.use_gpu or self.optimizer is not None:
            return self
        start = 0.0 if self.certainty_start == _CERTAINTY_START else self.certainty_start
        return replace(self, optimizer="adamw", learning_rate=_FURTHER_RATE, certainty_start=start)


def published() -> DistillConfig:
    """The training recipe of the DFlash paper (arXiv 2602.06036): 512 anchors, AdamW 6e-4, cosine, whole head."""
    return DistillConfig(
        anchors_per_sequence=512,
        loss="ce",
        weighting="decay",
        beta=0.0,
        optimizer="adamw",
        learning_rate=6e-4,
        schedule="cosine",
        warmup_fraction=0.04,
        ema=0.0,
        head_negatives=None,
        max_seconds=None,
        max_steps=100_000,
    )
