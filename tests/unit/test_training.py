"""Training: data order, schedules, caches, exact resume, and a draft that learns."""

import dataclasses
import json
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.draft_tools import VOCAB, tiny_pair
from unmask.config import DistillConfig
from unmask.decoding.speculative import speculative_decode
from unmask.errors import UserError
from unmask.training.budget import Budget
from unmask.training.draft_trainer import DraftTrainer
from unmask.training.drafting_forward import DraftingForward, training_blocks
from unmask.training.feature_cache import FeatureCache
from unmask.training.head import TrainingHead
from unmask.training.rates import learning_rate
from unmask.training.sequences import SequenceSet, TokenSequence
from unmask.training.step_report import StepReport
from unmask.training.training_state import resume_state, save_state
from unmask.types import SamplingOptions

CONFIG = DistillConfig(max_steps=40, max_seconds=None, precision="float32", anchors_per_sequence=4, head_negatives=None)


def responses(target, count=8, length=14):
    sequences = []
    for start in range(count):
        prompt = [3 + start, 9]
        options = SamplingOptions(max_tokens=length, ignore_eos=True)
        result = speculative_decode(target, None, prompt, options, num_speculative_tokens=1, eos_ids=frozenset())
        sequences.append(TokenSequence((*prompt, *result.token_ids), len(prompt)))
    return sequences


def trainer(config=CONFIG, cache_bytes=10**8, **kwargs):
    target, draft = tiny_pair()
    torch.manual_seed(0)
    sequences = SequenceSet(
        responses(target),
        batch_size=config.sequences_per_step,
        seed=config.seed,
        tokens_per_step=config.tokens_per_step,
    )
    features = FeatureCache(target, sequences, cache_bytes)
    occurring = {t for s in sequences.sequences for t in s.ids}
    head = TrainingHead(target.lm_head, occurring, config.head_negatives)
    return DraftTrainer(draft.train().requires_grad_(True), features, head, config, **kwargs)


@given(count=st.integers(4, 40), world=st.integers(1, 3), batch=st.integers(1, 3), seed=st.integers(0, 5))
def test_an_epoch_visits_every_sequence_once(count, world, batch, seed):
    sequences = [TokenSequence((i, i, i), 1) for i in range(count)]
    if count < world * batch:
        with pytest.raises(UserError, match="sequences_per_step"):
            SequenceSet(sequences, batch_size=batch, seed=seed, rank=0, world_size=world)
        return
    owned = []
    for rank in range(world):
        ours = SequenceSet(sequences, batch_size=batch, seed=seed, rank=rank, world_size=world)
        steps = len(ours) // batch
        visited = [i for step in range(steps) for i in ours.indices(step)]
        assert len(visited) == len(set(visited)) == steps * batch
        assert visited == [i for step in range(steps) for i in ours.indices(step)]
        owned += [s.ids[0] for s in ours.sequences]
    assert len(owned) == len(set(owned)) == count - count % world


def test_padding_and_response_flags():
    sequences = SequenceSet([TokenSequence((5, 6, 7), 1), TokenSequence((8, 9, 8, 9, 8), 2)], batch_size=1, seed=0)
    batch = sequences.batch([0, 1])
    assert batch.ids_BT.tolist() == [[5, 6, 7, 0, 0], [8, 9, 8, 9, 8]]
    assert batch.response_BT.long().tolist() == [[0, 1, 1, 0, 0], [0, 0, 1, 1, 1]]


def test_cached_and_recomputed_features_are_equal():
    whole, nothing = trainer().features, trainer(cache_bytes=0).features
    assert whole.warm_up() == 8
    assert nothing.warm_up() == 0
    torch.testing.assert_close(whole.get((1, 5)), nothing.get((1, 5)), atol=1e-5, rtol=0)
    half = trainer(cache_bytes=whole.bytes // 2).features
    assert 0 < half.warm_up() < 8
    assert half.bytes <= whole.bytes // 2


@given(lengths=st.lists(st.integers(3, 40), min_size=4, max_size=30), seed=st.integers(0, 5))
def test_packed_rows_hold_every_sequence_once_an_epoch(lengths, seed):
    texts = [TokenSequence(tuple(range(2, 2 + length)), 1) for length in lengths]
    sequences = SequenceSet(texts, batch_size=1, seed=seed, tokens_per_step=128)
    visited, step = [], 0
    while len(visited) < len(texts):
        batch = sequences.batch(sequences.indices(step))
        assert sum(batch.lengths) <= 128 == batch.ids_BT.shape[1]
        start = 0
        for index, length in zip(batch.indices, batch.lengths, strict=True):
            assert batch.ids_BT[0, start : start + length].tolist() == list(texts[index].ids)
            assert batch.response_BT[0, start : start + length].tolist() == [False] + [True] * (length - 1)
            assert (batch.starts_BT[0, start : start + length] == start).all()
            start += length
        assert not batch.response_BT[0, start:].any()
        visited += batch.indices
        step += 1
    assert sorted(visited) == list(range(len(texts)))


def test_packed_and_padded_blocks_are_the_same():
    """Hidden states of every anchor, several sequences in one row or each in its own."""
    target, draft = tiny_pair()
    texts = responses(target, count=3)
    forward = DraftingForward(draft)
    states = []
    for tokens in (None, 128):
        sequences = SequenceSet(texts, batch_size=1, seed=0, tokens_per_step=tokens)
        batch = sequences.batch((0, 1, 2))
        features = FeatureCache(target, sequences, 10**8).get((0, 1, 2))
        offsets = [0, 0, 0] if tokens is None else [0, len(texts[0].ids), len(texts[0].ids) + len(texts[1].ids)]
        anchors = torch.tensor([[2 + o, 7 + o] for o in offsets])
        anchors = anchors if tokens is None else anchors.view(1, -1)
        blocks = training_blocks(batch, anchors, draft.config.block_size, draft.config.mask_token_id)
        with torch.no_grad():
            hidden, _ = forward(blocks, features, target.embedding, packed=tokens is not None)
        states.append(hidden.flatten(0, 1))
    torch.testing.assert_close(states[0], states[1], atol=1e-5, rtol=0)


def test_a_packed_step_learns():
    config = dataclasses.replace(CONFIG, tokens_per_step=128, anchors_per_step=128, learning_rate=1e-2)
    learner = trainer(config)
    losses = [learner.step(step / 30)["loss"] for step in range(30)]
    assert losses[-1] < 0.6 * losses[0]


def test_a_report_reads_the_device_once():
    report = StepReport({"loss": torch.tensor(2.0), "norm": torch.tensor(3.0)}, {"rate": 0.5})
    assert dict(report) == {"loss": 2.0, "norm": 3.0, "rate": 0.5}


def test_sampled_head_keeps_labels_and_rows_together():
    weights = torch.randn(VOCAB, 8)
    head = TrainingHead(weights, [4, 9, 30], 6)
    rows = head.rows(torch.Generator().manual_seed(0))
    assert rows.shape == (9, 8)
    labels = head.labels(torch.tensor([30, 4, 9]))
    assert torch.equal(rows[labels], weights[[30, 4, 9]])
    negatives = rows[3:]
    assert not any(torch.equal(row, weights[i]) for row in negatives for i in (4, 9, 30))


def test_rates_follow_the_schedule():
    flat = dataclasses.replace(CONFIG, warmup_fraction=0.1, decay_fraction=0.5)
    rates = [learning_rate(flat, p) / flat.learning_rate for p in (0.05, 0.1, 0.5, 0.75, 1.0)]
    assert rates == pytest.approx([0.5, 1, 1, 0.5, 0])
    cosine = dataclasses.replace(CONFIG, schedule="cosine")
    assert [learning_rate(cosine, p) / cosine.learning_rate for p in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0])


def test_budget_ends_at_the_first_limit():
    assert Budget(10, None).progress(5) == 0.5
    assert Budget(10, 4.0, seconds_used=3.0).progress(5) == 0.75
    assert Budget(None, 4.0, seconds_used=9.0).progress(0) == 1.0


def test_a_draft_learns_its_targets_text():
    learner = trainer(dataclasses.replace(CONFIG, learning_rate=1e-2, max_steps=150))
    first = learner.step(0.0)["loss"]
    for step in range(1, 150):
        last = learner.step(step / 150)
    assert last["loss"] < 0.2 * first
    sequence = learner.sequences.sequences[0]
    prompt = list(sequence.ids[: sequence.prompt_length])
    options = SamplingOptions(max_tokens=14, ignore_eos=True)
    result = speculative_decode(
        learner.features.target, learner.average.eval(), prompt, options, num_speculative_tokens=3, eos_ids=frozenset()
    )
    assert result.token_ids == list(sequence.ids[sequence.prompt_length :])
    assert result.acceptance_length > 2.5


def test_the_certainty_term_sharpens_what_is_right():
    plain = trainer(dataclasses.replace(CONFIG, learning_rate=1e-2, beta=1e-6))
    forced = trainer(dataclasses.replace(CONFIG, learning_rate=1e-2, beta=2.0))
    for step in range(60):
        of_plain, of_forced = plain.step(step / 60), forced.step(step / 60)
    assert of_forced["entropy"] < of_plain["entropy"]


def test_a_resumed_run_is_bit_identical(tmp_path):
    config = dataclasses.replace(CONFIG, head_negatives=10)
    unbroken = trainer(config)
    losses = [unbroken.step(step / 40)["loss"] for step in range(12)]
    broken = trainer(config)
    for step in range(6):
        assert broken.step(step / 40)["loss"] == losses[step]
    save_state(tmp_path, broken, {"seconds_used": 3.5})
    resumed = trainer(config)
    assert resume_state(tmp_path, resumed) == {"seconds_used": 3.5, "steps_done": 6}
    assert [resumed.step(step / 40)["loss"] for step in range(6, 12)] == losses[6:]
    for ours, theirs in zip(resumed.average.parameters(), unbroken.average.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_only_sound_checkpoints_are_resumed(tmp_path):
    learner = trainer()
    assert resume_state(tmp_path, learner) is None
    for _ in range(3):
        learner.step(0.0)
        save_state(tmp_path, learner, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    newest = tmp_path / "step-00000003" / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    assert resume_state(tmp_path, trainer()) == {"steps_done": 2}
    shutil.rmtree(tmp_path / "step-00000002")
    assert resume_state(tmp_path, trainer()) is None


def test_two_ranks_take_the_step_of_one_with_the_whole_batch():
    """Gradients averaged over ranks, with global denominators, equal one rank's on all rows."""
    target, _ = tiny_pair()
    sequences = responses(target, count=4)
    config = dataclasses.replace(CONFIG, sequences_per_step=1)

    def grads(rank, world, reduce=lambda x: x):
        _, draft = tiny_pair()
        ours = SequenceSet(sequences, batch_size=config.sequences_per_step, seed=0, rank=rank, world_size=world)
        features = FeatureCache(target, ours, 10**8)
        learner = DraftTrainer(
            draft.train().requires_grad_(True), features, TrainingHead(target.lm_head, [], None), config,
            reduce=reduce, world_size=world,
        )  # fmt: skip
        learner.optimizer = torch.optim.SGD(draft.parameters(), lr=0.0)
        collected = {}
        reported = learner.step(0.0)
        for name, parameter in draft.named_parameters():
            collected[name] = parameter.grad.clone()
        return collected, reported, features, ours

    totals = []
    for rank in range(2):
        grads(rank, 2, lambda x: totals.append(x.clone()) or x)
    whole = totals[0] + totals[1]
    first, report, *_ = grads(0, 2, lambda x: whole)
    second, *_ = grads(1, 2, lambda x: whole)
    weight, cross_entropy = float(whole[0]), float(whole[3])
    assert report["cross_entropy"] == pytest.approx(cross_entropy / weight)
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_log_lines_are_json(tmp_path):
    from unmask.training.training_log import TrainingLog, read_log

    log = TrainingLog(tmp_path)
    log.record(1, {"loss": 2.5})
    log.close()
    again = TrainingLog(tmp_path)
    again.record(2, {"loss": 1.5})
    again.close()
    assert read_log(tmp_path) == [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 1.5}]
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])["loss"] == 2.5
