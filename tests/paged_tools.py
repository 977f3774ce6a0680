"""Random paged contexts, for tests of attention that reads pages."""

from __future__ import annotations

from typing import Any

import torch

NUM_PAGES = 300

SHAPES = {
    # requests, block rows, query heads, key heads, head size, page-table columns, page size
    "small": (3, 4, 4, 2, 8, 3, 4),
    "smollm2": (5, 8, 9, 3, 64, 9, 16),
    "qwen3": (4, 16, 32, 8, 128, 70, 16),
    "one long": (1, 16, 32, 8, 128, 256, 16),
    "many": (40, 2, 8, 8, 16, 5, 16),
}


def paged_case(shape: str, dtype: torch.dtype, device: str, seed: int = 0) -> dict[str, Any]:
    """Arguments of `gathered_attention`: every second request has a gap, the first no context or none but a gap."""
    batch, rows, heads, kv_heads, head_dim, columns, page_size = SHAPES[shape]
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator).to(device, dtype)

    lengths = torch.randint(1, columns * page_size + 1, (batch,), generator=generator)
    begin = (torch.rand(batch, generator=generator) * lengths).long()
    end = begin + (torch.rand(batch, generator=generator) * (lengths - begin + 1)).long()
    gaps = torch.stack([begin, end], dim=1) * (torch.arange(batch) % 2 == 0)[:, None]
    if batch > 1:
        lengths[0] *= seed % 2
        gaps[0] = torch.tensor([0, int(lengths[0])])
    pages = torch.randint(0, NUM_PAGES, (batch, columns), generator=generator)
    tables = {"pages": pages, "lengths": lengths, "gaps": gaps}
    return {
        "queries": normal(batch, rows, heads, head_dim),
        "block_keys": normal(batch, rows, kv_heads, head_dim),
        "block_values": normal(batch, rows, kv_heads, head_dim),
        "keys": normal(NUM_PAGES * page_size, kv_heads, head_dim),
        "values": normal(NUM_PAGES * page_size, kv_heads, head_dim),
        **{name: table.int().to(device) for name, table in tables.items()},
        "page_size": page_size,
    }
