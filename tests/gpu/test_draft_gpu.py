"""The draft on a GPU gives what it gives on a CPU: serving logits, and the losses of training steps."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch

from benchmarks.draft_step import check_kernels
from tests.draft_tools import VOCAB, tiny_pair
from tests.training_tools import packed_config
from unmask.config import DistillConfig
from unmask.decoding.speculative import DraftState, speculative_decode
from unmask.objectives.drafting import Gate
from unmask.objectives.row_losses import LossName, RowObjective
from unmask.training.chunked_head import chunked_rows, eager_rows
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


@pytest.fixture(autouse=True)
def compiled_anew() -> None:
    """Beyond a limit of recompilations, which all tests count towards, a compiled function runs as it is."""
    torch._dynamo.reset()


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
        head = TrainingHead(target.lm_head, range(VOCAB // 2), negatives)
        trainer = DraftTrainer(draft, features, head, config)
        losses.append([trainer.step(step / 10)["loss"] for step in range(8)])
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


def test_a_recorded_step_trains_like_one_that_is_launched() -> None:
    """Weights in bfloat16 products and sums in another order: losses agree to a few per mille."""
    generator = torch.Generator().manual_seed(1)
    sequences = [
        TokenSequence(tuple(torch.randint(2, VOCAB, (60,), generator=generator).tolist()), 4) for _ in range(40)
    ]
    shared = {"beta": 0.5, "certainty_ramp": 0.5, "use_gpu": True}
    losses = []
    for recorded in (False, True):
        # The block-sparse kernel knows no heads below 16.
        target, draft = tiny_pair(num_heads=2)
        target.to("cuda")
        draft = copy.deepcopy(draft).to("cuda").train().requires_grad_(True)
        config = packed_config(CONFIG, tokens_per_step=256, **shared, cuda_graph=recorded)
        features = FeatureCache(
            target, SequenceSet(sequences, batch_size=1, seed=0, tokens_per_step=256), 10**8, device="cuda"
        )
        features.warm_up()
        trainer = DraftTrainer(draft, features, TrainingHead(target.lm_head, [], None), config)
        reports = [trainer.step(step / 20) for step in range(20)]
        losses.append([report["loss"] for report in reports])
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("loss", ["ce", "kl", "tv", "lk_hybrid"])
def test_compiled_rows_in_bfloat16_are_those_of_the_reference_in_float32(loss: LossName, relative: bool) -> None:
    """Drafted tokens stand out, so that rounding changes few of them."""
    generator = torch.Generator("cuda").manual_seed(0)
    head = torch.randn(1000, 64, generator=generator, device="cuda") / 8
    drafted, labels = torch.randint(0, 1000, (2, 384), generator=generator, device="cuda")
    labels = torch.where(torch.arange(384, device="cuda") % 2 == 0, drafted, labels)
    hidden, noise = torch.randn(2, 384, 64, generator=generator, device="cuda")
    hidden = (hidden + 6 * head[drafted]).bfloat16()
    target = (hidden + noise + 4 * head[labels]).bfloat16()
    upstream = torch.rand(2, 384, generator=generator, device="cuda")
    objective = RowObjective(loss, entropy=True, relative=relative, target_temperature=0.5 if relative else 1.0)
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        leaf = hidden.detach().to(dtype).requires_grad_()
        inputs = leaf, head.bfloat16(), labels, target if objective.needs_target else None, objective
        # Three chunks of one size.
        compiled = dtype == torch.bfloat16
        rows = chunked_rows(*inputs, compiled=True, chunk_elements=128 * 1000) if compiled else eager_rows(*inputs)
        ((rows.loss * upstream[0]).sum() + (rows.entropy * upstream[1]).sum()).backward()
        results.append((rows, leaf.grad.float()))
    (rows, gradient), (reference, of_reference) = results
    # A row whose entropy is the target's to within rounding has the hinge's gradient in one of the two alone.
    alike = (rows.entropy > 0) == (reference.entropy > 0)
    assert alike.float().mean() > 0.95
    assert (gradient - of_reference)[alike].norm() < 0.03 * of_reference.norm()
    for name in ("loss", "entropy", "confidence"):
        torch.testing.assert_close(getattr(rows, name), getattr(reference, name), atol=0.05, rtol=0.03)
    same = (rows.right == reference.right) & (rows.agrees == reference.agrees)
    assert same.float().mean() > 0.97
    torch.testing.assert_close(rows.acceptance[same], reference.acceptance[same], atol=0.05, rtol=0)


def packed_trainer(config: DistillConfig, cache_bytes: int = 10**8) -> DraftTrainer:
    """As a job builds one: a bfloat16 target, features kept where the recipe says."""
    generator = torch.Generator().manual_seed(1)
    sequences = [
        TokenSequence(tuple(torch.randint(2, VOCAB, (60,), generator=generator).tolist()), 4) for _ in range(40)
    ]
    # The block-sparse kernel knows no heads below 16.
    target, draft = tiny_pair(num_heads=2, init="target")
    target.model.to("cuda", torch.bfloat16)
    features = FeatureCache(
        target,
        SequenceSet(sequences, batch_size=1, seed=0, tokens_per_step=256),
        cache_bytes,
        final=True,
        device="cuda" if config.feature_cache_device == "training" else "cpu",
    )
    features.warm_up()
    head = TrainingHead(target.lm_head, range(VOCAB // 2), config.head_negatives)
    return DraftTrainer(draft.to("cuda").train().requires_grad_(True), features, head, config)


DEFAULT = DistillConfig(
    max_steps=12, max_seconds=None, use_gpu=True, tokens_per_step=256, anchors_per_step=128, head_negatives=None
)


@pytest.mark.parametrize("gate", [DEFAULT.gate, "target_relative"])
def test_the_default_recipe_recorded_and_compiled_trains_like_the_plain_one(gate: Gate) -> None:
    """KL by Muon in bfloat16, with the certainty term from the first step on: one that came in later would raise the
    loss."""
    config = dataclasses.replace(DEFAULT, gate=gate, certainty_start=0.0, learning_rate=2e-3, optimizer="muon")
    losses = []
    for fast in (False, True):
        trainer = packed_trainer(dataclasses.replace(config, compile=fast, cuda_graph=fast))
        losses.append([trainer.step(step / 12)["loss"] for step in range(12)])
    assert losses[0] == pytest.approx(losses[1], rel=3e-2)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("negatives", [None, 8])
@pytest.mark.parametrize("where", ["cpu", "training"])
def test_a_step_whose_features_are_kept_waits_for_nothing(where: str, negatives: int | None) -> None:
    config = dataclasses.replace(DEFAULT, feature_cache_device=where, head_negatives=negatives)
    trainer = packed_trainer(config)
    assert len(trainer.features.kept) == 40
    assert where == "training" or all(kept.is_pinned() for kept in trainer.features.kept.values())
    # Kernels are compiled and moments made before.
    reports = [trainer.step(0.0) for _ in range(2)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        reports += [trainer.step(0.1) for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(math.isfinite(report["loss"]) for report in reports)


def test_features_half_of_which_are_kept_on_the_host_are_those_computed() -> None:
    fresh = packed_trainer(DEFAULT, cache_bytes=0).features
    whole = packed_trainer(DEFAULT).features
    half = packed_trainer(DEFAULT, cache_bytes=whole.bytes // 2).features
    assert (len(fresh.kept), len(half.kept), len(whole.kept)) == (0, 20, 40)
    for step in range(6):
        batch = fresh.sequences.batch(fresh.sequences.rows(step))
        expected, *others = (features.get(batch) for features in (fresh, half, whole))
        assert all(features.is_cuda for features in (expected, *others))
        for features in others:
            torch.testing.assert_close(features, expected, atol=0.05, rtol=0.05)
