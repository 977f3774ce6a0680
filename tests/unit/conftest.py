"""What several unit tests start from, made once a process."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.draft_tools import tiny_pair
from unmask.config import EMBEDDED_TARGET, DistillConfig
from unmask.decoding.speculative import SpeculativeResult, speculative_decode
from unmask.models.dflash import DFlashDraft
from unmask.models.target import TargetModel
from unmask.targets import resolve_target
from unmask.training.draft_trainer import DraftTrainer
from unmask.training.feature_cache import FeatureCache
from unmask.training.head import TrainingHead
from unmask.training.sequences import SequenceSet, TokenSequence
from unmask.types import SamplingOptions


@pytest.fixture(scope="session")
def embedded() -> Path:
    """Directory of the embedded target."""
    return resolve_target(EMBEDDED_TARGET)


@pytest.fixture(scope="session")
def light_target(embedded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded target's config and tokenizer with a few bytes for weights: quick to copy and to take digests of."""
    path = tmp_path_factory.mktemp("light") / "target"
    path.mkdir()
    for file in embedded.iterdir():
        if file.suffix in (".json", ".jinja"):
            shutil.copy(file, path)
    save_file({"weight": torch.zeros(2)}, path / "model.safetensors")
    return path


@dataclass(frozen=True)
class TrainedPair:
    """A tiny pairing whose draft knows the target's text of a few prompts."""

    target: TargetModel
    draft: DFlashDraft
    prompts: list[list[int]]
    losses: list[float]

    def decode(self, prompt: list[int], draft: DFlashDraft | None) -> SpeculativeResult:
        """By the greedy loop."""
        options = SamplingOptions(max_tokens=14, ignore_eos=True)
        return speculative_decode(self.target, draft, prompt, options, num_speculative_tokens=3, eos_ids=frozenset())


@pytest.fixture(scope="session")
def trained_pair() -> TrainedPair:
    """40 steps on the greedy text of four prompts, all anchors, one feature: it is lost without the right layer."""
    torch.manual_seed(0)
    target, draft = tiny_pair(num_layers=1, num_features=1)
    prompts = [[3 + start, 9] for start in range(4)]
    options = SamplingOptions(max_tokens=14, ignore_eos=True)
    own = [speculative_decode(target, None, p, options, num_speculative_tokens=1, eos_ids=frozenset()) for p in prompts]
    texts = [TokenSequence((*p, *result.token_ids), len(p)) for p, result in zip(prompts, own, strict=True)]
    config = DistillConfig(
        max_steps=40, precision="float32", sequences_per_step=4, anchors_per_sequence=14, head_negatives=None,
        learning_rate=2e-2, loss="ce", weighting="decay",
    )  # fmt: skip
    features = FeatureCache(target, SequenceSet(texts, batch_size=4, seed=0), 10**8)
    learner = DraftTrainer(draft.train().requires_grad_(True), features, TrainingHead(target.lm_head, [], None), config)
    losses = [learner.step(step / 40)["loss"] for step in range(40)]
    return TrainedPair(target, learner.average.eval(), prompts, losses)
