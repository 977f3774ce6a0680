"""Training steps of diffusion LMs: they learn, resume bit for bit, merge adapters exactly, and share out over ranks."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from unmask.config import AdaptConfig, LoraSettings, StudentConfig
from unmask.errors import ConfigError
from unmask.masking.attention import Full
from unmask.models import adapted
from unmask.models.transformer import DiffusionLM
from unmask.training.adaptation import AdaptationTrainer
from unmask.training.certainty import CertaintyForcingTrainer
from unmask.training.diffusion_batch import diffusion_batch, fitting
from unmask.training.diffusion_trainer import DiffusionTrainer
from unmask.training.forcing import DiscreteForcingTrainer
from unmask.training.lora import adapters_disabled, add_adapters, merged
from unmask.training.sequences import SequenceSet, TokenSequence
from unmask.training.training_state import resume_state, save_state

EOS, MASK, RESPONSE = 2, 3, 8
CONFIG = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 24, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True, "eos_token_id": EOS, "hidden_act": "silu",
}  # fmt: skip
COMMON = {"sequences_per_step": 4, "precision": "float32", "max_steps": 10, "learning_rate": 3e-3, "response_length": 8}


def network(seed: int = 0) -> DiffusionLM:
    return adapted.adapt(adapted.build(CONFIG, seed=seed, std=0.1), mask_id=MASK)


def texts(count: int = 16) -> list[TokenSequence]:
    """Prompts of 3-5 tokens whose response counts on from the last one."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for _ in range(count):
        length = int(torch.randint(3, 6, (1,), generator=generator))
        prompt = torch.randint(4, 12, (length,), generator=generator).tolist()
        rows.append(TokenSequence((*prompt, *(prompt[-1] + i for i in range(1, length)), EOS), length))
    return rows


def sequence_set(rank: int = 0, world_size: int = 1, batch_size: int = 4) -> SequenceSet:
    return SequenceSet(fitting(texts(), RESPONSE, EOS), batch_size=batch_size, seed=0, rank=rank, world_size=world_size)


def trainer(kind: str, lora: LoraSettings | None = None, **changes: object) -> DiffusionTrainer:
    net = network()
    settings = COMMON | changes
    if lora:
        add_adapters(net, lora)
    if kind == "adapt":
        return AdaptationTrainer(net, sequence_set(), AdaptConfig(**settings), response_length=RESPONSE)
    if kind == "causal":
        config = AdaptConfig(attention="causal", **settings)
        plain = adapted.build(CONFIG, seed=0, std=0.1)
        return AdaptationTrainer(plain, sequence_set(), config, response_length=RESPONSE)
    if kind == "block_causal":
        config = AdaptConfig(attention="block_causal", block_size=4, **settings)
        return AdaptationTrainer(net, sequence_set(), config, response_length=RESPONSE)
    config = StudentConfig(objective=kind, block_size=4, lora=lora, **settings)
    cls = CertaintyForcingTrainer if kind == "dparallel" else DiscreteForcingTrainer
    return cls(net, sequence_set(), config, response_length=RESPONSE)


KINDS = ("adapt", "block_causal", "causal", "dparallel", "d2f")
ADAPTERS = LoraSettings(rank=4, alpha=8)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_lower_the_loss(kind: str) -> None:
    run = trainer(kind, learning_rate=1e-2)
    losses = [run.step(0.1)["loss"] for _ in range(60)]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


@pytest.mark.parametrize(("kind", "lora"), [*((k, None) for k in KINDS), ("dparallel", ADAPTERS), ("d2f", ADAPTERS)])
def test_a_resumed_run_takes_the_steps_of_the_unbroken_one(
    kind: str, lora: LoraSettings | None, tmp_path: Path
) -> None:
    unbroken, broken = trainer(kind, lora, ema=0.9), trainer(kind, lora, ema=0.9)
    expected = [unbroken.step(0.1 * i) for i in range(6)]
    for i in range(3):
        broken.step(0.1 * i)
    save_state(tmp_path, broken, {"seconds_used": 1.5})
    resumed = trainer(kind, lora, ema=0.9)
    assert resume_state(tmp_path, resumed) == {"seconds_used": 1.5, "steps_done": 3}
    assert [resumed.step(0.1 * i) for i in range(3, 6)] == expected[3:]
    for left, right in zip(resumed.published().parameters(), unbroken.published().parameters(), strict=True):
        assert torch.equal(left, right)


def test_annealing_ends_at_full_attention() -> None:
    run = trainer("adapt", annealing_steps=3)
    reports = [run.step(0.1) for _ in range(5)]
    assert all(report["loss"] > 0 for report in reports)
    plain = trainer("adapt")
    plain.load_state_dict(run.state_dict())
    assert plain.step(0.1) == run.step(0.1)


def test_adapters_start_as_nothing_and_merge_exactly() -> None:
    net = network()
    ids = torch.randint(4, 24, (2, 9))
    positions = torch.arange(9).expand(2, -1)
    before = net(ids, positions, mask=Full())
    run = trainer("dparallel", LoraSettings(rank=4, alpha=8), learning_rate=1e-2)
    assert torch.equal(run.network(ids, positions, mask=Full()), before)
    for _ in range(5):
        run.step(0.1)
    run.network.eval()
    adapted_logits = run.network(ids, positions, mask=Full())
    assert not torch.allclose(adapted_logits, before)
    torch.testing.assert_close(run.published()(ids, positions, mask=Full()), adapted_logits, rtol=1e-5, atol=1e-5)
    assert run.published().state_dict().keys() == net.state_dict().keys()
    with adapters_disabled(run.network):
        assert torch.equal(run.network(ids, positions, mask=Full()), before)


def test_an_adapter_target_that_does_not_exist_is_named() -> None:
    with pytest.raises(ConfigError, match="att_proj"):
        add_adapters(network(), LoraSettings(targets=("att_proj",)))


def test_the_teacher_of_discrete_forcing_stays_what_it_was() -> None:
    for lora in (None, LoraSettings(rank=4)):
        run = trainer("d2f", lora)
        batch = diffusion_batch(sequence_set().sequences[:4], RESPONSE, EOS, run.num_columns)
        reference = network()
        for _ in range(3):
            run.step(0.1)
        noisy = batch.ids_BT.clone()
        noisy[:, -1] = MASK
        marked = noisy == MASK
        teacher = run.teacher if run.teacher is not None else merged_without(run)
        given = teacher(noisy, batch.positions_BT, mask=Full(batch.lengths_B), logits_at=marked)
        expected = reference(noisy, batch.positions_BT, mask=Full(batch.lengths_B), logits_at=marked)
        torch.testing.assert_close(given, expected)
        assert (run.published().attention, run.published().block_size) == ("block_causal", 4)


def merged_without(run: DiscreteForcingTrainer) -> DiffusionLM:
    """The network with its adapters set to nothing."""
    net = copy.deepcopy(run.network)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    return merged(net)


def test_shares_of_ranks_average_to_the_pooled_mean() -> None:
    run = trainer("dparallel")
    run.world_size = 3
    parts = [torch.rand(count) for count in (2, 5, 0)]
    total = torch.tensor(7.0)
    means = [part.sum() / max(len(part), 1) for part in parts]
    shares = [run.share(mean, torch.tensor(float(len(part))), total) for mean, part in zip(means, parts, strict=True)]
    torch.testing.assert_close(sum(shares) / 3, torch.cat(parts).mean())


def test_responses_are_ended_filled_up_and_dropped_where_too_long() -> None:
    rows = [TokenSequence((5, 6, 7), 1), TokenSequence((5, 6, EOS), 2), TokenSequence((5, *range(4, 13)), 1)]
    kept = fitting(rows, RESPONSE, EOS)
    assert [row.ids for row in kept] == [(5, 6, 7, EOS), (5, 6, EOS)]
    batch = diffusion_batch(kept, RESPONSE, EOS, 11)
    assert batch.ids_BT.tolist() == [[5, 6, 7, *[EOS] * 8], [5, 6, *[EOS] * 9]]
    assert batch.lengths_B.tolist() == [9, 10]
    assert batch.is_padding()[0].tolist() == [False] * 4 + [True] * 7
