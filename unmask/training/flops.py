"""Floating-point operations that a draft's training step needs: the numerator of model-FLOPs utilisation.

Products only, two operations a multiply-add; nothing that is recomputed counts. A trained weight costs three products
(forward, and gradients of input and weight); the LM head is frozen and costs two, `fc` reads frozen features and
costs two.
"""

from __future__ import annotations

from unmask.models.dflash import DFlashConfig


def step_flops(
    config: DFlashConfig, *, context_rows: int, blocks: int, attended_pairs: int, head_rows: int | None = None
) -> int:
    """FLOPs of one step without a certainty term, whose gradient takes another product of the LM head.

    Args:
        context_rows: feature rows.
        blocks: blocks of B rows.
        attended_pairs: (query, key) pairs that the mask allows, of one head.
        head_rows: rows of the LM head that are scored; None is the vocabulary.
    """
    hidden, width = config.hidden_size, config.head_dim
    keys = config.num_key_value_heads * width
    queries = config.num_attention_heads * width
    rows = blocks * config.block_size
    features = 2 * 2 * context_rows * len(config.target_layer_ids) * hidden * hidden
    context = 3 * 2 * context_rows * hidden * 2 * keys
    layer = 3 * 2 * rows * hidden * (2 * queries + 2 * keys + 3 * config.intermediate_size)
    attention = 3 * 2 * 2 * attended_pairs * queries
    head = 2 * 2 * blocks * (config.block_size - 1) * hidden * (head_rows or config.vocab_size)
    return features + config.num_hidden_layers * (context + layer + attention) + head
