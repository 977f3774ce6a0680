"""Training of a draft on two GPUs beside one: equal losses, and how much faster.

    python -m benchmarks.draft_ranks --out benchmarks/results/draft_ranks.json

One GPU takes steps of as many packed rows as two take together: losses in float32, launched (DistributedDataParallel)
and recorded, speed in bfloat16, compiled, each step one CUDA graph, at a small and a large batch. Features are given,
so that only the step is compared. `--tiny` proves it on a CPU with gloo.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import socket
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.draft_step import build, time_steps
from unmask.config import DistillConfig

LOSS_STEPS = 10
EQUAL = {"loss": 1e-5, "grad_norm": 1e-4}
"""What has to be equal, and up to what share of it: sums are added in another order."""


def cases(tiny: bool) -> dict[str, tuple[str, DistillConfig]]:
    """Shape and training section of each comparison; `rows_per_step` counts the rows of all ranks."""
    if tiny:
        small = DistillConfig(
            max_steps=100, loss="ce", beta=0.0, optimizer="adamw", tokens_per_step=256, anchors_per_step=128,
            head_negatives=None, precision="float32", rows_per_step=2,
        )  # fmt: skip
        by_muon = replace(small, optimizer="muon")
        return {"losses": ("tiny", small), "losses, muon": ("tiny", by_muon), "tiny, 2 rows": ("tiny", small)}
    plain = DistillConfig(
        max_steps=100, loss="ce", beta=0.0, optimizer="adamw", tokens_per_step=4096, anchors_per_step=512,
        head_negatives=None, precision="float32", rows_per_step=2,
    )  # fmt: skip
    recorded = replace(plain, use_gpu=True, cuda_graph=True)
    fast = replace(recorded, tokens_per_step=16384, anchors_per_step=2048, precision="bfloat16", compile=True)
    large = replace(fast, tokens_per_step=8192, anchors_per_step=512)
    return {
        "losses": ("smollm2-135m", plain),
        "losses, recorded": ("smollm2-135m", recorded),
        "smollm2-135m, 2 rows": ("smollm2-135m", fast),
        "smollm2-135m, 16 rows": ("smollm2-135m", replace(fast, rows_per_step=16)),
        "smollm2-135m, 16 rows, muon": ("smollm2-135m", replace(fast, rows_per_step=16, optimizer="muon")),
        "qwen3-8b, 8 rows": ("qwen3-8b", replace(large, rows_per_step=8)),
        "qwen3-8b, 8 rows, muon": ("qwen3-8b", replace(large, rows_per_step=8, optimizer="muon")),
    }


def work(rank: int, together: bool, port: int, tiny: bool, steps: int, folder: str) -> None:
    """One of two ranks, which train together, or take every other case each by itself."""
    device = "cpu" if tiny else "cuda"
    if not tiny:
        torch.cuda.set_device(rank)
    torch.set_float32_matmul_precision("highest")
    # Batches are made by many small operations, which cost more the more threads they are handed to.
    torch.set_num_threads(min(4, torch.get_num_threads()))
    named = list(cases(tiny).items())
    if together:
        address = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("gloo" if tiny else "nccl", address, rank=rank, world_size=2)
    for name, (shape, config) in named if together else named[rank::2]:
        trainer, _ = build(shape, device, config, rank=rank if together else 0, world_size=2 if together else 1)
        if name.startswith("losses"):
            # An optimiser that divides by a gradient's size does not see one of the wrong scale.
            reports = [trainer.step(0.5) for _ in range(LOSS_STEPS)]
            found: Any = [{name: float(report[name]) for name in EQUAL} for report in reports]
        else:
            found = config.rows_per_step / time_steps(trainer, 4, steps)
        # A recording is part of a cycle, and holds on to memory and communicator.
        del trainer
        gc.collect()
        torch.cuda.empty_cache()
        if rank == 0 or not together:
            print(f"{'two GPUs' if together else 'one GPU'}, {name}: {found}", flush=True)
            Path(folder, f"{name} {1 + together}.json").write_text(json.dumps(found))
    if together:
        dist.destroy_process_group()


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/draft_ranks.json"))
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        for together in (False, True):
            mp.spawn(work, (together, port, args.tiny, args.steps, folder), nprocs=2)
        one, two = (
            {name: json.loads(Path(folder, f"{name} {gpus}.json").read_text()) for name in cases(args.tiny)}
            for gpus in (1, 2)
        )
    losses = [name for name in one if name.startswith("losses")]
    differences = {
        name: max(abs(a[name] / b[name] - 1) for case in losses for a, b in zip(one[case], two[case], strict=True))
        for name in EQUAL
    }
    figures = {
        "machine": f"{os.cpu_count()} cores" if args.tiny else f"2 x {torch.cuda.get_device_name()}",
        "losses": {name: {"1": one[name], "2": two[name]} for name in losses},
        "largest_relative_difference": differences,
        "rows_per_second": {name: {"1": one[name], "2": two[name]} for name in one if name not in losses},
        "speedup": {name: two[name] / one[name] for name in one if name not in losses},
    }
    print(json.dumps(figures, indent=1))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(figures, indent=1) + "\n")
    if any(differences[name] > limit for name, limit in EQUAL.items()):
        raise SystemExit(f"error: one GPU and two differ: {differences}")


if __name__ == "__main__":
    main()
