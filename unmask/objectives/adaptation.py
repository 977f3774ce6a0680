"""From a causal LM to a masked-diffusion LM (DiffuLLaMA, arXiv 2410.17891; loss of LLaDA, arXiv 2502.09992).

Dimension letters: B rows, T columns, N masked positions, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from unmask.masking.attention import Dense


def annealing_probability(step: int, warmup_steps: int) -> float:
    """Probability that a column ahead is already visible: min(1, step / warmup); 1 where there is no warm-up."""
    return min(1.0, step / warmup_steps) if warmup_steps > 0 else 1.0


def annealed_mask(
    shape: tuple[int, int], probability: float, generator: torch.Generator, device: torch.device | str = "cpu"
) -> Dense:
    """Causal attention with each entry above the diagonal opened with the given probability, for [B, T] inputs."""
    num_rows, num_columns = shape
    causal = torch.ones(num_columns, num_columns, dtype=torch.bool, device=device).tril()
    opened = torch.rand(num_rows, num_columns, num_columns, generator=generator, device=device) < probability
    return Dense(causal | opened)


def padding_weights(
    prompt_lens_B: torch.Tensor, text_lens_B: torch.Tensor, num_columns: int, *, full: int = 16, rest: float = 0.05
) -> torch.Tensor:
    """Loss weights, float32 [B, T], of rows that are padded with EOS to a fixed length.

    Padding must be learned, since a decoder faces a fixed number of masks, but in short-answer tasks it would take
    most of the loss. Text weighs 1, and so do its EOS and the `full` paddings after it; the others weigh `rest` and
    the prompt 0.

    Args:
        prompt_lens_B: int64, tokens of the prompt.
        text_lens_B: int64, tokens of prompt + response, the first EOS included.
        num_columns: T.
    """
    column_T = torch.arange(num_columns, device=prompt_lens_B.device)
    weights_BT = torch.where(column_T < (text_lens_B + full)[:, None], 1.0, rest)
    return weights_BT * (column_T >= prompt_lens_B[:, None])


def adaptation_loss(
    logits_NV: torch.Tensor, labels_N: torch.Tensor, noise_N: torch.Tensor, share_N: torch.Tensor
) -> torch.Tensor:
    """L = sum over masked positions of share_i * CE_i / p_i: an unbiased bound on -log p(response | prompt).

    Args:
        logits_NV: predictions of the masked positions of all rows.
        labels_N: int64, the tokens there.
        noise_N: the masking probability that each position was drawn with.
        share_N: `loss_shares` at the positions.

    An empty N gives 0 with a gradient graph.
    """
    cross_entropy_N = F.cross_entropy(logits_NV.float(), labels_N, reduction="none")
    return (share_N * cross_entropy_N / noise_N).sum()


def loss_shares(weights_BT: torch.Tensor) -> torch.Tensor:
    """Each position's weight over its row's total weight, and over B: rows count alike whatever their length."""
    return weights_BT / weights_BT.sum(1, keepdim=True).clamp(min=1e-6) / weights_BT.shape[0]
