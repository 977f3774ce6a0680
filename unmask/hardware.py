"""What this machine's processors are good at."""

from __future__ import annotations


def multiplies_bfloat16(device_type: str) -> bool:
    """Whether products in bfloat16 are the faster ones on `cuda` or on this machine's `cpu`.

    A CPU without AVX-512 has no instructions for them: SmolLM2's matrices take forty times as long as in float32.
    """
    import torch  # drivers that train nothing do without it

    return device_type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def is_half(precision: str | None, device_type: str) -> bool:
    """Whether training at this `distill.precision` multiplies in bfloat16."""
    return multiplies_bfloat16(device_type) if precision is None else precision == "bfloat16"
