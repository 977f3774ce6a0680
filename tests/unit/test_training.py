"""Training: data order, schedules, caches, exact resume, and a draft that learns."""

import dataclasses
import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.draft_tools import VOCAB, tiny_pair
from tests.training_tools import CONFIG, packed_config, responses, trainer
from unmask.config import DraftConfig
from unmask.errors import CheckpointError, UserError
from unmask.models.draft_start import draft_sizes, new_draft
from unmask.objectives.drafting import choose_anchors
from unmask.training.budget import Budget
from unmask.training.drafting_forward import DraftingForward, training_blocks
from unmask.training.feature_cache import FeatureCache
from unmask.training.head import TrainingHead
from unmask.training.rates import rate_share
from unmask.training.sequences import SequenceSet, TokenSequence
from unmask.training.step_report import StepReport
from unmask.training.training_state import resume_state, save_state


def test_a_distance_to_the_target_needs_its_final_states():
    with pytest.raises(ValueError, match="final=True"):
        trainer(dataclasses.replace(CONFIG, loss="kl"), final=False)


@settings(deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.integers(3, 60), min_size=4, max_size=30),
    rows=st.integers(1, 4),
    packed=st.booleans(),
    seed=st.integers(0, 5),
)
def test_any_number_of_ranks_takes_the_same_steps(lengths, rows, packed, seed):
    texts = [TokenSequence((i, *range(length)), 1) for i, length in enumerate(lengths)]
    options = {"batch_size": rows, "seed": seed, "tokens_per_step": 128 if packed else None}
    visited = []
    for world in range(1, rows + 1):
        ranks = [SequenceSet(texts, rank=rank, world_size=world, **options) for rank in range(world)]
        assert sorted(s.ids[0] for ours in ranks for s in ours.sequences) == list(range(len(texts)))
        steps = []
        for step in range(2 * -(-len(texts) // rows)):
            rows_of_step = {}
            for ours in ranks:
                chosen = [tuple(ours.sequences[i].ids[0] for i in row) for row in ours.rows(step)]
                rows_of_step |= zip(ours.row_numbers, chosen, strict=True)
            steps.append([rows_of_step[number] for number in range(rows)])
        visited.append(steps)
    assert all(steps == visited[0] for steps in visited)
    for number in range(rows):
        own = range(number, len(texts), rows)
        of_row = [i for step in visited[0] for i in step[number]]
        assert all(sorted(of_row[at : at + len(own)]) == list(own) for at in (0, len(own)))


def test_more_workers_than_rows_are_refused():
    texts = [TokenSequence((i, i, i), 1) for i in range(8)]
    for rows, world in ((9, 1), (2, 3)):
        with pytest.raises(UserError, match=r"^distill\.sequences_per_step: only 8 sequences"):
            SequenceSet(texts, batch_size=rows, seed=0, world_size=world)
    with pytest.raises(UserError, match=r"^distill\.rows_per_step"):
        SequenceSet(texts, batch_size=2, seed=0, world_size=3, tokens_per_step=128)


def test_padding_and_response_flags():
    sequences = SequenceSet([TokenSequence((5, 6, 7), 1), TokenSequence((8, 9, 8, 9, 8), 2)], batch_size=1, seed=0)
    batch = sequences.padded([0, 1])
    assert batch.ids_BT.tolist() == [[5, 6, 7, 0, 0], [8, 9, 8, 9, 8]]
    assert batch.response_BT.long().tolist() == [[0, 1, 1, 0, 0], [0, 0, 1, 1, 1]]


def test_cached_and_recomputed_features_are_equal():
    whole, nothing = trainer().features, trainer(cache_bytes=0).features
    assert whole.warm_up() == 8
    assert nothing.warm_up() == 0
    torch.testing.assert_close(
        *(cache.get(cache.sequences.padded((1, 5))) for cache in (whole, nothing)), atol=1e-5, rtol=0
    )
    half = trainer(cache_bytes=whole.bytes // 2).features
    assert 0 < half.warm_up() < 8
    assert half.bytes <= whole.bytes // 2


def test_no_forward_of_the_target_is_longer_than_asked_or_for_nothing():
    target, _ = tiny_pair()
    texts = [TokenSequence(tuple(range(2, 2 + length)), 1) for length in (20, 4, 5, 4, 20, 6, 20, 4)]
    sequences = SequenceSet(texts, batch_size=1, seed=0, tokens_per_step=128)
    asked: list[list[int]] = []

    class Watched(FeatureCache):
        def _compute(self, indices):
            asked.append([len(texts[i].ids) for i in indices])
            return super()._compute(indices)

    room = Watched(target, sequences, 10**8)._compute([0])[0][0].nbytes * 24
    cache = Watched(target, sequences, room, batch_tokens=16)
    asked.clear()
    assert cache.warm_up() == 5
    assert asked == [[4, 4, 4], [5, 6], [20]]
    asked.clear()
    cache.get(sequences.batch([tuple(range(8))]))
    assert asked == [[20], [20], [20]]


@settings(deadline=None, max_examples=25)
@given(lengths=st.lists(st.integers(3, 40), min_size=4, max_size=30), seed=st.integers(0, 5))
def test_packed_rows_hold_every_sequence_once_an_epoch(lengths, seed):
    texts = [TokenSequence(tuple(range(2, 2 + length)), 1) for length in lengths]
    sequences = SequenceSet(texts, batch_size=1, seed=seed, tokens_per_step=128)
    visited, step = [], 0
    while len(visited) < len(texts):
        batch = sequences.batch(sequences.rows(step))
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
    texts = responses(count=3)
    forward = DraftingForward(draft)
    states = []
    for tokens in (None, 128):
        sequences = SequenceSet(texts, batch_size=1, seed=0, tokens_per_step=tokens)
        batch = sequences.batch([(0,), (1,), (2,)] if tokens is None else [(0, 1, 2)])
        features = FeatureCache(target, sequences, 10**8).get(batch)
        offsets = [0, 0, 0] if tokens is None else [0, len(texts[0].ids), len(texts[0].ids) + len(texts[1].ids)]
        anchors = torch.tensor([[2 + o, 7 + o] for o in offsets])
        anchors = anchors if tokens is None else anchors.view(1, -1)
        blocks = training_blocks(batch, anchors, draft.config.block_size, draft.config.mask_token_id)
        with torch.no_grad():
            hidden, _ = forward(blocks, features, target.embedding, packed=tokens is not None)
        states.append(hidden.flatten(0, 1))
    torch.testing.assert_close(states[0], states[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize("tokens", [None, 128])
def test_features_that_are_kept_are_those_that_are_computed(tokens, final):
    """All kept, some, or none; beside the target or apart from it."""
    target, _ = tiny_pair()
    sequences = SequenceSet(responses(count=6), batch_size=1, seed=0, tokens_per_step=tokens)
    batch = sequences.batch([(4, 1, 5)] if tokens else [(4,)])
    fresh = FeatureCache(target, sequences, 0, final=final)
    expected = fresh.get(batch)
    assert fresh.warm_up() == 0
    for count in (6, 3):
        size = expected.shape[-1] * expected.element_size()
        room = size * sum(sorted(len(sequence.ids) for sequence in sequences.sequences)[:count])
        cache = FeatureCache(target, sequences, room, final=final)
        assert cache.warm_up() == count
        assert cache.bytes <= room
        torch.testing.assert_close(cache.get(batch), expected, atol=1e-6, rtol=1e-5)


def test_a_packed_step_learns():
    learner = trainer(packed_config(learning_rate=1e-2))
    losses = [learner.step(step / 12)["loss"] for step in range(12)]
    assert losses[-1] < 0.6 * losses[0]


def test_a_report_reads_the_device_once():
    report = StepReport({"loss": torch.tensor(2.0), "norm": torch.tensor(3.0)}, {"rate": 0.5})
    assert dict(report) == {"loss": 2.0, "norm": 3.0, "rate": 0.5}


def test_a_step_with_a_head_of_all_ids_is_that_of_the_whole_head():
    whole, sampled = trainer(), trainer(dataclasses.replace(CONFIG, head_negatives=10))
    sampled.head = TrainingHead(sampled.features.target.lm_head, range(VOCAB), 10)
    for step in range(3):
        assert sampled.step(step / 40)["loss"] == whole.step(step / 40)["loss"]


def test_weight_decay_reaches_every_optimiser():
    def after(**changes):
        learner = trainer(dataclasses.replace(CONFIG, **changes))
        learner.step(0.0)
        return {name: p.detach().clone() for name, p in learner.draft.named_parameters()}

    for optimizer, constants in (("muon", (0.1, 0.01)), ("adamw", (0.01, 0.01))):
        default, zero, one = (after(optimizer=optimizer, weight_decay=decay) for decay in (None, 0.0, 1.0))
        for name in default:
            of_one = one[name] - zero[name]
            assert of_one.abs().max() > 0
            constant = constants[default[name].ndim == 1]
            torch.testing.assert_close(default[name] - zero[name], constant * of_one, rtol=0.05, atol=1e-6)


def test_states_are_laid_out_where_they_are_asked_for():
    sequences = SequenceSet(responses(count=3), batch_size=1, seed=0, tokens_per_step=128)
    batch = sequences.batch([(2, 0)])
    states = [torch.randn(length, 5) for length in batch.lengths]
    laid = batch.lay_out(states, torch.device("cpu"))
    first, second = batch.lengths
    assert torch.equal(laid[0, : first + second], torch.cat(states))
    assert not laid[0, first + second :].any()
    assert batch.lay_out(states, torch.device("meta")).device.type == "meta"


def test_rates_follow_the_schedule():
    flat = dataclasses.replace(CONFIG, warmup_fraction=0.1, decay_fraction=0.5)
    assert [rate_share(flat, p) for p in (0.05, 0.1, 0.5, 0.75, 1.0)] == pytest.approx([0.5, 1, 1, 0.5, 0])
    cosine = dataclasses.replace(CONFIG, schedule="cosine")
    assert [rate_share(cosine, p) for p in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0])


def test_budget_ends_at_the_first_limit():
    assert Budget(10, None).progress(5) == 0.5
    assert Budget(10, 4.0, seconds_used=3.0).progress(5) == 0.75
    assert Budget(None, 4.0, seconds_used=9.0).progress(0) == 1.0


def test_a_draft_learns_its_targets_text(trained_pair):
    assert trained_pair.losses[-1] < 0.2 * trained_pair.losses[0]
    for prompt in trained_pair.prompts:
        own, paired = trained_pair.decode(prompt, None), trained_pair.decode(prompt, trained_pair.draft)
        assert paired.token_ids == own.token_ids
        assert paired.acceptance_length > 2.5


def test_the_certainty_term_sharpens_what_is_right():
    config = dataclasses.replace(CONFIG, learning_rate=1e-2, gate="right", certainty_start=0.0)
    plain = trainer(dataclasses.replace(config, beta=1e-6))
    forced = trainer(dataclasses.replace(config, beta=2.0))
    for step in range(25):
        of_plain, of_forced = plain.step(step / 25), forced.step(step / 25)
    assert of_forced["entropy"] < of_plain["entropy"]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_is_bit_identical(tmp_path, optimizer):
    config = dataclasses.replace(
        CONFIG, confidence_weight=0.5, beta=0.5, certainty_start=0.1, optimizer=optimizer, loss="kl"
    )
    unbroken = trainer(config)
    reports = [unbroken.step(step / 40) for step in range(6)]
    # The term comes in on the way.
    assert [report["beta"] for report in reports] == [0, 0, 0, 0, 0.5, 0.5]
    losses = [report["loss"] for report in reports]
    broken = trainer(config)
    for step in range(3):
        assert broken.step(step / 40)["loss"] == losses[step]
    save_state(tmp_path, broken, {"seconds_used": 3.5})
    resumed = trainer(config)
    assert resume_state(tmp_path, resumed) == {"seconds_used": 3.5, "steps_done": 3}
    assert [resumed.step(step / 40)["loss"] for step in range(3, 6)] == losses[3:]
    for name in ("average", "average_confidence"):
        pairs = zip(getattr(resumed, name).parameters(), getattr(unbroken, name).parameters(), strict=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_what_is_published_is_averaged_the_confidence_head_too():
    learner = trainer(dataclasses.replace(CONFIG, confidence_weight=0.5, ema=0.8))
    expected = [p.detach().clone() for p in learner.confidence.parameters()]
    for step in range(60):
        learner.step(step / 60)
        decay = min(0.8, (step + 1) / (step + 11))
        trained = zip(expected, learner.confidence.parameters(), strict=True)
        expected = [decay * e + (1 - decay) * p.detach() for e, p in trained]
    pairs = list(zip(learner.average_confidence.parameters(), expected, strict=True))
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs)
    assert not any(torch.equal(p, e) for p, (_, e) in zip(learner.confidence.parameters(), pairs, strict=True))


@pytest.mark.parametrize("tokens_per_step", [None, 64], ids=["padded", "packed"])
def test_the_targets_state_of_a_row_predicts_its_label(tokens_per_step):
    """What losses against the target's distribution are taken from, on text that is the target's own."""
    target, draft = tiny_pair()
    texts = responses()
    sequences = SequenceSet(texts, batch_size=2, seed=0, tokens_per_step=tokens_per_step)
    features = FeatureCache(target, sequences, 10**8, final=True)
    batch = sequences.batch(sequences.rows(0))
    anchors = choose_anchors(batch.response_BT, 6, torch.Generator().manual_seed(0))
    blocks = training_blocks(batch, anchors, draft.config.block_size, draft.config.mask_token_id)
    final = features.get(batch)[..., target.embedding.shape[1] * len(target.layer_ids) :]
    rows = torch.arange(len(final))[:, None, None]
    likeliest = (final[rows, blocks.before_BMK] @ target.lm_head.T).argmax(-1)
    assert blocks.valid_BMK.sum() > 20
    assert torch.equal(likeliest[blocks.valid_BMK], blocks.labels_BMK[blocks.valid_BMK])


def test_a_start_from_blocks_of_other_weights_is_refused():
    from transformers import Phi3Config, Phi3ForCausalLM

    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 7}
    fused = Phi3ForCausalLM(Phi3Config(**sizes, num_attention_heads=4, num_key_value_heads=4, pad_token_id=0))
    shape = draft_sizes(fused.config, DraftConfig(num_layers=2, block_size=4, num_target_features=3), 39)
    new_draft(shape, fused, "random", seed=0)
    message = r"^draft\.init: blocks of a Phi3DecoderLayer have no 'self_attn\.\w_proj\.weight'.*draft\.init=random$"
    with pytest.raises(CheckpointError, match=message):
        new_draft(shape, fused, "target", seed=0)


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


def test_damaged_checkpoints_do_not_push_out_a_sound_one(tmp_path):
    learner = trainer()
    for _ in range(3):
        learner.step(0.0)
        save_state(tmp_path, learner, {})
    for weights in tmp_path.glob("*/state.safetensors"):
        weights.write_bytes(b"")
    begun_again = trainer()
    assert resume_state(tmp_path, begun_again) is None
    begun_again.step(0.0)
    save_state(tmp_path, begun_again, {})
    assert resume_state(tmp_path, trainer()) == {"steps_done": 1}


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
