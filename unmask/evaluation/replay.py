"""A draft's acceptance along texts that are known, without running the loop.

The target's own text is what a lossless pairing emits, whatever is drafted: greedy text at temperature 0, and at any
temperature the text that was sampled, because a drafted token is accepted exactly when it equals the target's sample.
So every block that the loop could ask for is drafted at once, and the rounds are walked afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from unmask.decoding.speculative import longest_match
from unmask.models.dflash import DFlashDraft
from unmask.models.target import TargetModel
from unmask.objectives.confidence import ConfidenceHead, judged_rows
from unmask.training.drafting_forward import DraftingForward, training_blocks
from unmask.training.sequences import SequenceSet, TokenSequence

Block = tuple[list[int], list[float]]
"""The K ids that are drafted at an anchor, and the chances that a confidence head gives them, if there is one."""


def replay_draft(
    target: TargetModel, draft: DFlashDraft, texts: Sequence[TokenSequence], lengths: Sequence[int], *, rows: int = 8
) -> list[list[int]]:
    """Accepted drafts of each verification, text by text.

    Args:
        texts: prompts with responses, and K tokens of what the target would say next, so that the last verification
            counts like one in a served pairing.
        lengths: of the responses themselves.
        rows: texts in one batch.

    Raises:
        ValueError: a text with nothing to verify.
    """
    drafted = _drafted(target, draft, None, texts, lengths, rows)
    return [
        [accepted for accepted, _, _ in _rounds(blocks, text, length)]
        for blocks, text, length in zip(drafted, texts, lengths, strict=True)
    ]


def replay_confidence(
    target: TargetModel,
    draft: DFlashDraft,
    confidence: ConfidenceHead,
    texts: Sequence[TokenSequence],
    lengths: Sequence[int],
    *,
    rows: int = 8,
) -> list[tuple[float, bool]]:
    """What a confidence head says of every row that is judged, and whether it is accepted (see `replay_draft`)."""
    drafted = _drafted(target, draft, confidence, texts, lengths, rows)
    return [
        judged
        for blocks, text, length in zip(drafted, texts, lengths, strict=True)
        for accepted, done, chances in _rounds(blocks, text, length)
        for judged in judged_rows(chances, accepted, length - done)
    ]


@torch.no_grad()
def _drafted(
    target: TargetModel,
    draft: DFlashDraft,
    confidence: ConfidenceHead | None,
    texts: Sequence[TokenSequence],
    lengths: Sequence[int],
    rows: int,
) -> Iterator[list[Block]]:
    """The blocks of each text, one for every token of its response."""
    sequences = SequenceSet(texts, batch_size=1, seed=0)
    if len(sequences) < len(texts):
        raise ValueError("a text needs two tokens after its prompt")
    forward = DraftingForward(draft, confidence)
    for start in range(0, len(texts), rows):
        batch = sequences.padded(range(start, min(start + rows, len(texts))))
        part = texts[start : start + rows]
        most = max(lengths[start : start + rows])
        anchors = torch.full((len(part), most), -1)
        for row, (text, length) in enumerate(zip(part, lengths[start:], strict=False)):
            anchors[row, :length] = torch.arange(text.prompt_length, text.prompt_length + length)
        blocks = training_blocks(batch, anchors, draft.config.block_size, draft.config.mask_token_id)
        mask = torch.arange(batch.ids_BT.shape[1]) < torch.tensor(batch.lengths)[:, None]
        features = target.features(batch.ids_BT.to(target.device), mask.long().to(target.device))
        with torch.autocast(target.device.type, torch.bfloat16, enabled=features.dtype == torch.bfloat16):
            hidden, logits = forward(blocks.to(target.device), features, target.embedding, packed=False)
        proposals = torch.stack([(h @ target.lm_head.to(h.dtype).T).argmax(-1) for h in hidden]).tolist()
        chances = logits.sigmoid().tolist() if logits is not None else [[[]] * most] * len(part)
        for proposed, told in zip(proposals, chances, strict=True):
            yield list(zip(proposed, told, strict=True))


def _rounds(blocks: Sequence[Block], text: TokenSequence, length: int) -> Iterator[tuple[int, int, list[float]]]:
    """Of each verification the accepted rows, the tokens of the response before it, and the chances of its block."""
    continued = list(text.ids[text.prompt_length :])
    done = 1  # The first token comes from the prefill and takes no verification.
    while done < length:
        proposal, chances = blocks[done - 1]
        accepted = longest_match(proposal, continued[done:])
        yield accepted, done, chances
        done += accepted + 1
