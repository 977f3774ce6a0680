"""The draft engine on a GPU: the paged kernel against the reference, graphs against eager passes, swaps in place."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.paged_tools import SHAPES, paged_case
from tests.pairing_tools import BLOCK_SIZE, raw_features, reference_block, row, tiny_draft, tiny_vocabulary
from unmask.pairing import block_ops
from unmask.pairing.draft_engine import DraftEngine
from unmask.pairing.paged_attention import gathered_attention
from unmask.pairing.side_copies import copied_beside, move_beside
from unmask.pairing.wire import Step, pack_hashes, pack_rows

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

K = BLOCK_SIZE - 1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_kernel_equals_the_reference(shape: str, dtype: torch.dtype, tolerance: float) -> None:
    from unmask.pairing.paged_attention_triton import paged_attention

    for seed in range(2):
        case = paged_case(shape, dtype, "cuda", seed)
        expected = gathered_attention(**{n: v.float() if n in FLOATS else v for n, v in case.items()})
        torch.testing.assert_close(paged_attention(**case).float(), expected, atol=tolerance, rtol=tolerance)


FLOATS = ("queries", "block_keys", "block_values", "keys", "values")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize(
    "sizes", [(3, 5, 4, 2, 8, 32, 48), (1, 6, 9, 3, 64, 576, 1536), (5, 16, 32, 8, 128, 4096, 12288)]
)
def test_operations_between_products_equal_their_references(dtype: torch.dtype, tolerance: float, sizes: tuple) -> None:
    from unmask.pairing import block_ops_triton

    batch, rows, heads, kv_heads, head_dim, width, wide = sizes
    generator = torch.Generator("cuda").manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda").to(dtype)

    weight, norms = drawn(width), (drawn(head_dim), drawn(head_dim))
    last = torch.arange(3, 3 + batch, dtype=torch.int32, device="cuda")
    rotary = (drawn(64, 1, head_dim), drawn(64, 1, head_dim))
    qkv = drawn(batch * rows, (heads + 2 * kv_heads) * head_dim)
    for name, arguments in (
        ("embed_blocks", (drawn(97, width), last, 96, rows, weight, 1e-6)),
        ("split_heads", (qkv, *norms, 1e-6, rotary, last, rows, kv_heads)),
        ("add_norm", (drawn(batch * rows, width), drawn(batch * rows, width), weight, 1e-6)),
        ("silu_mul", (drawn(batch * rows, 2 * wide),)),
    ):
        found, expected = getattr(block_ops_triton, name)(*arguments), getattr(block_ops, name)(*arguments)
        torch.testing.assert_close(found, expected, atol=2 * tolerance, rtol=2 * tolerance)


@pytest.mark.parametrize("k", [1, 3, K])
def test_blocks_of_a_batch_are_those_of_the_reference(k: int) -> None:
    draft, vocabulary = tiny_draft(), tiny_vocabulary()
    engine = DraftEngine(tiny_draft().cuda(), vocabulary.cuda(), vocabulary.cuda(), memory_mb=8)
    lengths = [1, 4, 7, 40, 90, 16, 17, 33, 2]
    raws = [raw_features(length, seed=i) for i, length in enumerate(lengths)]
    for first, last in ((0, 3), (1, 2), (0, 9)):
        rows = [row(10 * last + i, 0, lengths[i], 5) for i in range(first, last)]
        assert proposals(engine, rows, raws[first:last], k) == [
            reference_block(draft, vocabulary, raw, 5, k) for raw in raws[first:last]
        ]
    # Rows that lie in pinned memory, as a mailbox's do, and more than one graph holds.
    many = [raw_features(300, seed=50 + i) for i in range(7)]
    expected = [reference_block(draft, vocabulary, raw, 5, k) for raw in many]
    assert proposals(engine, [row(80 + i, 0, 300, 5) for i in range(7)], many, k, pinned=True) == expected
    # A gap, then the next position.
    late = raw_features(3, seed=99)
    with_gap = reference_block(
        draft, vocabulary, torch.cat([raws[0], late]), 5, k, positions=torch.tensor([0, 20, 21, 22])
    )
    assert proposals(engine, [row(90, 20, 3, 5)], [late], k) == [with_gap]


def test_a_swap_in_place_is_seen_by_the_graphs() -> None:
    vocabulary, raw = tiny_vocabulary(), raw_features(20, seed=1)
    engine = DraftEngine(tiny_draft().cuda(), vocabulary.cuda(), vocabulary.cuda(), memory_mb=8)
    for seed, device in ((0, "cuda"), (5, "cpu"), (0, "cpu")):
        engine.swap(tiny_draft(seed=seed).to(device))
        assert proposals(engine, [row(1, 0, 20, 5)], [raw], K) == [
            reference_block(tiny_draft(seed=seed), vocabulary, raw, 5, K)
        ]


def test_a_copy_beside_is_whole_while_the_default_stream_is_busy() -> None:
    source = torch.randn(3, 5_000_000).to(torch.bfloat16)  # several pieces, the last one short
    device = torch.device("cuda")
    torch.cuda._sleep(2 * 10**9)
    busy = torch.cuda.Event()
    busy.record()
    with torch.cuda.stream(torch.cuda.Stream()):
        copy = copied_beside(source, device)
        assert not busy.query()
    assert torch.equal(copy.cpu(), source)
    module = tiny_draft()
    expected = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    move_beside(module, device)
    assert {tensor.device.type for tensor in [*module.parameters(), *module.buffers()]} == {"cuda"}
    assert all(torch.equal(module.state_dict()[name].cpu(), tensor) for name, tensor in expected.items())


def proposals(engine: DraftEngine, rows: list, raws: list, k: int, *, pinned: bool = False) -> list[list[int]]:
    """Blocks of one step."""
    projection = engine.hello.projection.to(torch.device("cuda"))
    features = projection(torch.cat(raws).cuda()).cpu()
    step = Step(
        draft_version=engine.version,
        epoch=1,
        number=1,
        num_speculative_tokens=k,
        rows=pack_rows(rows),
        features=features.pin_memory() if pinned else features,
        finished=np.empty(0, "<u8"),
        page_hashes=pack_hashes(rows),
    )
    engine.check(step)
    (reply,) = engine.step([(0, step)])
    assert reply is not None
    return [t[:n] for t, n in zip(reply.tokens.tolist(), reply.counts.tolist(), strict=True)]
