"""A trainer of a tiny draft, for tests."""

import dataclasses
import functools

import torch

from tests.draft_tools import tiny_pair
from unmask.config import DistillConfig
from unmask.decoding.speculative import speculative_decode
from unmask.objectives.confidence import ConfidenceHead
from unmask.training.draft_trainer import DraftTrainer, row_objective
from unmask.training.feature_cache import FeatureCache
from unmask.training.head import TrainingHead
from unmask.training.sequences import SequenceSet, TokenSequence
from unmask.types import SamplingOptions

CONFIG = DistillConfig(
    max_steps=40, max_seconds=None, precision="float32", anchors_per_sequence=4, head_negatives=None, loss="ce",
    weighting="decay",
)  # fmt: skip


@functools.cache
def responses(count=8, length=14):
    """Prompts with what the tiny target says."""
    target, _ = tiny_pair()
    sequences = []
    for start in range(count):
        prompt = [3 + start, 9]
        options = SamplingOptions(max_tokens=length, ignore_eos=True)
        result = speculative_decode(target, None, prompt, options, num_speculative_tokens=1, eos_ids=frozenset())
        sequences.append(TokenSequence((*prompt, *result.token_ids), len(prompt)))
    return sequences


def packed_config(config=CONFIG, **changes):
    """The same in packed rows."""
    given = {"tokens_per_step": 128, "anchors_per_step": 128, "anchors_per_sequence": 16, "sequences_per_step": 2}
    return dataclasses.replace(config, **(given | changes))


def trainer(config=CONFIG, cache_bytes=10**8, rank=0, final=None, **kwargs):
    target, draft = tiny_pair()
    torch.manual_seed(0)
    texts = responses()
    sequences = SequenceSet(
        texts,
        batch_size=config.sequences_per_step if config.tokens_per_step is None else config.rows_per_step,
        seed=config.seed,
        rank=rank,
        world_size=kwargs.get("world_size", 1),
        tokens_per_step=config.tokens_per_step,
    )
    features = FeatureCache(
        target, sequences, cache_bytes, final=row_objective(config).needs_target if final is None else final
    )
    head = TrainingHead(target.lm_head, {t for s in texts for t in s.ids}, config.head_negatives)
    confidence = ConfidenceHead(draft.config.hidden_size, draft.config.block_size - 1)
    kwargs |= {"confidence": confidence} if config.confidence_weight else {}
    return DraftTrainer(draft.train().requires_grad_(True), features, head, config, **kwargs)
