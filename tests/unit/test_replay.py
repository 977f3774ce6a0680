"""Replaying a draft along known text counts what the real loop counts; the batched sampler says what the model says."""

from __future__ import annotations

import torch

from benchmarks.batched_generation import BatchedLlama
from tests.draft_tools import VOCAB, tiny_llama, tiny_pair
from unmask.decoding.speculative import speculative_decode
from unmask.evaluation.replay import replay_confidence, replay_draft
from unmask.objectives.confidence import ConfidenceHead
from unmask.training.sequences import TokenSequence
from unmask.types import SamplingOptions

K = 3


def test_replay_counts_what_the_loop_accepts() -> None:
    target, draft = tiny_pair(init="target")
    head = ConfidenceHead(draft.config.hidden_size, K).requires_grad_(False)
    for parameter in head.parameters():
        parameter.normal_(generator=torch.Generator().manual_seed(5))
    texts, lengths, accepted, judged = [], [], [], []
    for start in range(4):
        prompt = [3 + start, 9, 5][: 2 + start % 2]
        length = 9 + start
        beyond = SamplingOptions(max_tokens=length + K, ignore_eos=True)
        options = SamplingOptions(max_tokens=length, ignore_eos=True)
        plain = speculative_decode(target, None, prompt, beyond, num_speculative_tokens=K, eos_ids=frozenset())
        paired = speculative_decode(
            target, draft, prompt, options, num_speculative_tokens=K, eos_ids=frozenset(), confidence=head
        )
        texts.append(TokenSequence((*prompt, *plain.token_ids), len(prompt)))
        lengths.append(length)
        accepted.append(paired.accepted)
        judged += paired.judged
    assert replay_draft(target, draft, texts, lengths, rows=3) == accepted
    assert sum(map(sum, accepted)) > 0
    replayed = replay_confidence(target, draft, head, texts, lengths, rows=3)
    assert [right for _, right in replayed] == [right for _, right in judged]
    torch.testing.assert_close(*(torch.tensor([chance for chance, _ in rows]) for rows in (replayed, judged)))
    assert len({round(chance, 3) for chance, _ in judged}) > 10


def test_batched_greedy_text_is_the_models_own() -> None:
    model = tiny_llama().requires_grad_(False)
    sampler = BatchedLlama(model, rows=4, prompt_columns=6, max_new_tokens=10, beyond=2, eos_id=VOCAB - 1)
    prompts = [[3, 9], [4, 9, 11, 12, 13], [5]]
    for _ in range(2):  # the buffers are used again
        for prompt, response in zip(prompts, sampler.generate(prompts, 0.0), strict=True):
            ids = list(prompt)
            for _ in range(12):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            told = [*response.tokens, *response.beyond]
            assert told == ids[len(prompt) : len(prompt) + len(told)]
            assert len(response.tokens) == 10 or response.tokens[-1] == VOCAB - 1


def test_batched_sampling_follows_the_models_distribution() -> None:
    torch.manual_seed(0)
    model = tiny_llama().requires_grad_(False)
    sampler = BatchedLlama(model, rows=500, prompt_columns=3, max_new_tokens=2, beyond=0, eos_id=VOCAB)
    first = torch.tensor([r.tokens[0] for _ in range(8) for r in sampler.generate([[3, 9]] * 500, 1.0)])
    wanted = model(torch.tensor([[3, 9]])).logits[0, -1].softmax(-1)
    seen = torch.bincount(first, minlength=VOCAB) / len(first)
    assert (seen - wanted).abs().max() < 5 * (0.25 / len(first)) ** 0.5
