"""A training step of a draft against its floor (model FLOPs / 800 TFLOP/s) on one GPU, features given.

    python -m benchmarks.draft_step --out benchmarks/results/draft_step.json

Shapes of the drafts of Qwen3-8B and SmolLM2-135M-Instruct, random weights; trained as the papers do (cross-entropy by
AdamW), by KL to the target's distribution and Muon, whose floor has the target's logits and Muon's products in it, and
by the default recipe, which has a certainty term beside these. `--profile` prints the kernels that take most time;
`--tiny` proves the script on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from unmask.config import DistillConfig
from unmask.masking.anchored import block_sparse_mask, dense_mask
from unmask.models.attend import compiled_flex
from unmask.models.dflash import DFlashConfig, DFlashDraft, spread_layer_ids
from unmask.training.draft_trainer import DraftingForward, DraftTrainer
from unmask.training.flops import step_flops
from unmask.training.head import TrainingHead
from unmask.training.sequences import Batch, SequenceSet, TokenSequence

RECIPES: dict[str, dict[str, Any]] = {
    "adamw-ce": {"loss": "ce", "optimizer": "adamw", "beta": 0.0},
    "muon-kl": {"beta": 0.0},
    "default": {},
}
"""What differs from the default configuration."""
PEAK_FLOPS = 800e12
"""bfloat16 products measured on an H100."""
_KINDS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
SHAPES: dict[str, tuple[dict[str, int], int, int, int]] = {
    # widths, target layers, block size, length of a sequence
    "qwen3-8b": (dict(zip(_KINDS, (4096, 12288, 32, 8, 128, 151936), strict=True)), 36, 16, 1024),
    "smollm2-135m": (dict(zip(_KINDS, (576, 1536, 9, 3, 64, 49152), strict=True)), 30, 8, 320),
    "tiny": (dict(zip(_KINDS, (32, 48, 4, 2, 8, 96), strict=True)), 8, 4, 32),
}


@dataclass(frozen=True, slots=True)
class GivenTarget:
    """What a trainer reads of a target."""

    embedding: Tensor
    layer_ids: tuple[int, ...]

    @property
    def lm_head(self) -> Tensor:
        """The head is tied here."""
        return self.embedding

    @property
    def device(self) -> torch.device:
        """Of its weights."""
        return self.embedding.device


@dataclass(frozen=True, slots=True)
class GivenFeatures:
    """Features that are there already, the same every step; the target's final states beside them if `final`."""

    target: GivenTarget
    sequences: SequenceSet
    features_1TF: Tensor
    final: bool

    def get(self, batch: Batch) -> Tensor:
        """See FeatureCache."""
        return self.features_1TF.expand(len(batch.ids_BT), -1, -1)


def build(
    name: str, device: str, config: DistillConfig, *, rank: int = 0, world_size: int = 1
) -> tuple[DraftTrainer, DFlashConfig]:
    """A trainer on random sequences of one shape; with several ranks, one of them, its process group initialised."""
    torch.manual_seed(0)
    widths, layers, block_size, length = SHAPES[name]
    ids = spread_layer_ids(layers, 5 if layers > 8 else 2)
    sizes = DFlashConfig(
        **widths, num_hidden_layers=5 if layers > 8 else 1, max_position_embeddings=8192, block_size=block_size,
        mask_token_id=1, num_target_layers=layers, target_layer_ids=ids,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip
    tokens = config.tokens_per_step or 0
    generator = torch.Generator().manual_seed(0)
    texts = [
        TokenSequence(tuple(torch.randint(2, widths["vocab_size"], (length,), generator=generator).tolist()), 16)
        for _ in range(4 * config.rows_per_step * tokens // length)
    ]
    sequences = SequenceSet(
        texts, batch_size=config.rows_per_step, seed=0, rank=rank, world_size=world_size, tokens_per_step=tokens
    )  # fmt: skip
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    embedding = 0.02 * torch.randn(widths["vocab_size"], widths["hidden_size"], dtype=dtype, device=device)
    final = config.loss != "ce"
    features = torch.randn(1, tokens, (len(ids) + final) * widths["hidden_size"], dtype=dtype, device=device)
    target = GivenTarget(embedding, ids)
    given: Any = GivenFeatures(target, sequences, features, final)
    draft = DFlashDraft(sizes).to(device)
    module: nn.Module = DraftingForward(draft, compiled=config.compile)
    if world_size > 1 and not config.cuda_graph:
        module = DistributedDataParallel(module, device_ids=[rank] if device == "cuda" else None)

    def total(values: Tensor) -> Tensor:
        if world_size > 1:
            dist.all_reduce(values)
        return values

    head = TrainingHead(embedding, [], None)
    trainer = DraftTrainer(
        draft, given, head, config, module=module, reduce=total, world_size=world_size,
        averages_gradients=config.cuda_graph and world_size > 1,
    )  # fmt: skip
    return trainer, sizes


def attended_pairs(trainer: DraftTrainer, sizes: DFlashConfig) -> int:
    """Pairs that the mask of a step allows, from the lengths of the sequences: anchors lie half-way on average."""
    length = len(trainer.sequences.sequences[0].ids)
    return trainer.config.anchors_per_step * sizes.block_size * (length // 2 + sizes.block_size)


def floor_flops(trainer: DraftTrainer, sizes: DFlashConfig) -> int:
    """FLOPs of a step of the recipe that is trained."""
    config = trainer.config
    flops = step_flops(
        sizes, context_rows=config.tokens_per_step or 0, blocks=config.anchors_per_step,
        attended_pairs=attended_pairs(trainer, sizes),
    )  # fmt: skip
    if trainer.objective.needs_target:
        # The target's logits, by one product that has no gradient.
        flops += 2 * config.anchors_per_step * (sizes.block_size - 1) * sizes.hidden_size * sizes.vocab_size
    if config.chosen_optimizer == "muon":
        shapes = [sorted(p.shape) for p in trainer.draft.parameters() if p.ndim == 2]
        # Five rounds of X X^T, its square, and the product with X (`unmask.training.muon.orthogonal`).
        flops += sum(5 * 2 * (2 * short * short * long + short**3) for short, long in shapes)
    return flops


def time_steps(trainer: DraftTrainer, warm: int, count: int) -> float:
    """Seconds of a step."""
    synchronise = torch.cuda.synchronize if trainer.device.type == "cuda" else lambda: None
    for _ in range(warm):
        trainer.step(0.5)
    synchronise()
    start = time.perf_counter()
    for _ in range(count):
        trainer.step(0.5)
    synchronise()
    return (time.perf_counter() - start) / count


def check_kernels() -> dict[str, float]:
    """Block-sparse attention and its gradients against the dense mask, SmolLM2's heads, largest relative errors."""
    generator = torch.Generator("cuda").manual_seed(0)
    anchors = torch.randint(0, 1000, (1, 64), generator=generator, device="cuda").sort(dim=1).values
    starts = (anchors // 300) * 300
    heads = [9, 3, 3]
    rows = [512, 1024 + 512, 1024 + 512]
    inputs = [
        torch.randn(1, h, r, 64, generator=generator, device="cuda", dtype=torch.float32, requires_grad=True)
        for h, r in zip(heads, rows, strict=True)
    ]
    upstream = torch.randn(1, 9, 512, 64, generator=generator, device="cuda")
    sparse = compiled_flex()(*inputs, block_mask=block_sparse_mask(anchors, 8, 1024, starts), enable_gqa=True)
    of_sparse = torch.autograd.grad(sparse, inputs, upstream)
    dense = torch.nn.functional.scaled_dot_product_attention(
        *inputs, attn_mask=dense_mask(anchors, 8, 1024, starts), enable_gqa=True
    )
    of_dense = torch.autograd.grad(dense, inputs, upstream)
    pairs = zip(("output", "queries", "keys", "values"), (sparse, *of_sparse), (dense, *of_dense), strict=True)
    return {name: float((a - b).abs().max() / b.abs().max()) for name, a, b in pairs}


def profile(trainer: DraftTrainer) -> str:
    """The kernels of three steps by time."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with record(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
        for _ in range(3):
            trainer.step(0.5)
        torch.cuda.synchronize()
    return recorded.key_averages().table(sort_by="self_cuda_time_total", row_limit=22, max_name_column_width=70)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/draft_step.json"))
    parser.add_argument("--shapes", nargs="+", default=["smollm2-135m", "qwen3-8b"])
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--no-compile", action="store_true", help="train without torch.compile")
    parser.add_argument("--no-graph", action="store_true", help="launch every kernel of a step from the host")
    args = parser.parse_args()
    device = "cpu" if args.tiny else "cuda"
    torch.set_float32_matmul_precision("high")
    rows = []
    if device == "cuda":
        rows.append({"kernels": check_kernels(), "gpu": torch.cuda.get_device_name()})
        print(rows[-1], flush=True)
    shapes = ["tiny"] if args.tiny else args.shapes
    for name, recipe in itertools.product(shapes, args.recipes):
        large = name == "qwen3-8b"
        config = DistillConfig(
            max_steps=100, tokens_per_step=256 if args.tiny else 8192 if large else 16384,
            anchors_per_step=128 if args.tiny else 512 if large else 2048, head_negatives=None,
            precision="float32" if args.tiny else "bfloat16", compile=not (args.tiny or args.no_compile),
            use_gpu=device == "cuda", cuda_graph=device == "cuda" and not args.no_graph, **RECIPES[recipe],
        )  # fmt: skip
        trainer, sizes = build(name, device, config)
        start = time.perf_counter()
        first = time_steps(trainer, 0, 1)
        seconds = time_steps(trainer, 4, args.steps)
        flops = floor_flops(trainer, sizes)
        rows.append({
            "shape": name, "recipe": recipe, "loss": config.loss, "optimizer": config.chosen_optimizer,
            "block_size": sizes.block_size, "anchors": config.anchors_per_step,
            "context_rows": config.tokens_per_step, "step_ms": 1000 * seconds, "floor_ms": 1000 * flops / PEAK_FLOPS,
            "mfu": flops / PEAK_FLOPS / seconds, "first_step_s": first, "wall_s": time.perf_counter() - start,
            "memory_gb": torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None,
        })  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(rows, indent=1) + "\n")
        if args.profile and device == "cuda":
            print(profile(trainer), flush=True)
        # A recording is part of a cycle, and holds on to memory.
        del trainer
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main()
