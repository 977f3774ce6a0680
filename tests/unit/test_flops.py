"""The counted floating-point operations are those that a step takes."""

from __future__ import annotations

from torch.utils.flop_counter import FlopCounterMode

from tests.draft_tools import tiny_pair
from unmask.config import DistillConfig
from unmask.training.draft_trainer import DraftTrainer
from unmask.training.feature_cache import FeatureCache
from unmask.training.flops import step_flops
from unmask.training.head import TrainingHead
from unmask.training.sequences import SequenceSet, TokenSequence


def test_matrix_products_of_a_step_are_the_counted_ones() -> None:
    target, draft = tiny_pair()
    texts = [TokenSequence(tuple(range(3, 23)), 2) for _ in range(8)]
    config = DistillConfig(
        max_steps=4, precision="float32", head_negatives=None, loss="ce", beta=0.0, tokens_per_step=128,
        anchors_per_step=128,
    )  # fmt: skip
    features = FeatureCache(target, SequenceSet(texts, batch_size=1, seed=0, tokens_per_step=128), 10**8)
    features.warm_up()
    trainer = DraftTrainer(draft.train().requires_grad_(True), features, TrainingHead(target.lm_head, [], None), config)
    with FlopCounterMode(display=False) as counter:
        trainer.step(0.5)
    attention = ("scaled_dot_product", "flash", "bmm")
    counted = sum(
        flops for operator, flops in counter.get_flop_counts()["Global"].items()
        if not any(name in str(operator) for name in attention)
    )  # fmt: skip
    assert counted == step_flops(draft.config, context_rows=128, blocks=128, attended_pairs=0)
