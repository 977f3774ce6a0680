"""The draft on a GPU gives what it gives on a CPU: serving logits, and the losses of training steps."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from benchmarks.draft_step import check_kernels
from tests.draft_tools import VOCAB, tiny_pair
from unmask.config import DistillConfig
from unmask.decoding.speculative import DraftState, speculative_decode
from unmask.training.draft_trainer import DraftTrainer
from unmask.training.feature_cache import FeatureCache
from unmask.training.head import TrainingHead
from unmask.training.sequences import SequenceSet, TokenSequence
from unmask.types import SamplingOptions

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

CONFIG = DistillConfig(
    max_steps=10, max_seconds=None, precision="float32", anchors_per_sequence=4, head_negatives=None, loss="ce",
    weighting="decay", optimizer="adamw",
)  # fmt: skip


def test_block_logits_are_those_of_the_cpu() -> None:
    target, draft = tiny_pair()
    ids = torch.randint(2, VOCAB, (1, 20), generator=torch.Generator().manual_seed(0))
    logits = []
    for device in ("cpu", "cuda"):
        target.to(device)
        draft.to(device)
        state = DraftState(draft, target.embedding, target.lm_head)
        with torch.no_grad():
            state.append(target.features(ids.to(device))[0])
            logits.append(state.block_logits(5, 3).cpu())
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=1e-4)


def test_greedy_pairing_says_what_the_target_says() -> None:
    target, draft = tiny_pair()
    target.to("cuda")
    draft.to("cuda")
    options = SamplingOptions(max_tokens=40, ignore_eos=True)
    for start in range(6):
        texts = [
            speculative_decode(target, d, [3 + start, 8], options, num_speculative_tokens=3, eos_ids=frozenset())
            for d in (None, draft)
        ]
        assert texts[0].token_ids == texts[1].token_ids


def test_block_sparse_attention_is_the_dense_masks() -> None:
    """Outputs and gradients of the compiled kernel; products run in TF32 at most."""
    assert max(check_kernels().values()) < 5e-3


@pytest.mark.parametrize("negatives", [None, 12])
def test_training_losses_are_those_of_the_cpu(negatives: int | None) -> None:
    generator = torch.Generator().manual_seed(1)
    sequences = [
        TokenSequence(tuple(torch.randint(2, VOCAB, (18,), generator=generator).tolist()), 4) for _ in range(8)
    ]
    config = dataclasses.replace(CONFIG, head_negatives=negatives)
    losses = []
    for device in ("cpu", "cuda"):
        target, draft = tiny_pair()
        target.to(device)
        draft = copy.deepcopy(draft).to(device).train().requires_grad_(True)
        features = FeatureCache(target, SequenceSet(sequences, batch_size=2, seed=0), 10**8)
        # Every id occurs, so that no negative is drawn: generators differ between devices.
        head = TrainingHead(target.lm_head, range(VOCAB - 1 if negatives else 0), negatives)
        trainer = DraftTrainer(draft, features, head, config)
        losses.append([trainer.step(step / 10)["loss"] for step in range(8)])
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


def test_a_recorded_step_trains_like_one_that_is_launched() -> None:
    """Weights in bfloat16 products and sums in another order: losses agree to a few per mille."""
    generator = torch.Generator().manual_seed(1)
    sequences = [
        TokenSequence(tuple(torch.randint(2, VOCAB, (60,), generator=generator).tolist()), 4) for _ in range(40)
    ]
    shared = {"tokens_per_step": 256, "anchors_per_step": 128, "beta": 0.5, "certainty_ramp": 0.5, "use_gpu": True}
    losses = []
    for recorded in (False, True):
        # The block-sparse kernel knows no heads below 16.
        target, draft = tiny_pair(num_heads=2)
        target.to("cuda")
        draft = copy.deepcopy(draft).to("cuda").train().requires_grad_(True)
        config = dataclasses.replace(CONFIG, **shared, cuda_graph=recorded)
        features = FeatureCache(
            target, SequenceSet(sequences, batch_size=1, seed=0, tokens_per_step=256), 10**8, device="cuda"
        )
        features.warm_up()
        trainer = DraftTrainer(draft, features, TrainingHead(target.lm_head, [], None), config)
        reports = [trainer.step(step / 20) for step in range(20)]
        losses.append([report["loss"] for report in reports])
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    assert losses[0][-1] < losses[0][0]
