"""A draft's acceptance along texts that are known, without running the loop.

The target's own text is what a lossless pairing emits, whatever is drafted: greedy text at temperature 0, and at any
temperature the text that was sampled, because a drafted token is accepted exactly when it equals the target's sample.
So every block that the loop could ask for is drafted at once, and the rounds are walked afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from unmask.decoding.speculative import longest_match
from unmask.models.dflash import DFlashDraft
from unmask.models.target import TargetModel
from unmask.training.drafting_forward import DraftingForward, training_blocks
from unmask.training.sequences import SequenceSet, TokenSequence


@torch.no_grad()
def replay_draft(
    target: TargetModel, draft: DFlashDraft, texts: Sequence[TokenSequence], lengths: Sequence[int], *, rows: int = 8
) -> list[list[int]]:
    """Accepted drafts of each verification, text by text.

    Args:
        texts: prompts with responses, and K tokens of what the target would say next, so that the last verification
            counts like one in a served pairing.
        lengths: of the responses themselves.
        rows: texts in one batch.
    """
    accepted: list[list[int]] = []
    sequences = SequenceSet(texts, batch_size=1, seed=0)
    if len(sequences) < len(texts):
        raise ValueError("a text needs two tokens after its prompt")
    forward = DraftingForward(draft)
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
            hidden, _ = forward(blocks.to(target.device), features, target.embedding, packed=False)
        proposals = torch.stack([(h @ target.lm_head.to(h.dtype).T).argmax(-1) for h in hidden]).tolist()
        for text, length, proposed in zip(part, lengths[start:], proposals, strict=False):
            accepted.append(_walk(proposed, text.ids[text.prompt_length :], length))
    return accepted


def _walk(proposals: Sequence[Sequence[int]], continued: Sequence[int], length: int) -> list[int]:
    accepted: list[int] = []
    done = 1  # The first token comes from the prefill and takes no verification.
    while done < length:
        accepted.append(longest_match(list(proposals[done - 1]), list(continued[done:])))
        done += accepted[-1] + 1
    return accepted
