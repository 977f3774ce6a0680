"""Quality and speed of draft training on one GPU, with SmolLM2-135M-Instruct as the target.

    python -m benchmarks.draft_quality --data DIR --state DIR --out benchmarks/results/draft_quality.json

`--data` holds gsm8k/, mbpp/, mtbench/ and selfinstruct/ (jsonl.gz). The target answers GSM8K's training prompts, the
self-instruct prompts, MBPP's training tasks, and prompts that it writes itself; drafts are trained on its answers, and
measured by replay on held-out GSM8K prompts and on the first turns of MT-bench, at temperature 0 and 1, beside n-grams
that fill the same K, and by the real loop on a few. The table of recipes is measured on training prompts that were kept
aside.

The work is cut into cases (`--list`), run in order unless `--cases` names some (`ablation-00` means its three seeds).
Each leaves a JSON file in `--state`, and all rows are merged into `--out`. A case that is there is not run again, and
the main training goes on from its last saved state, so that calls may be cut by `--deadline` (seconds) or by force.
`--tiny` proves all of it on a CPU: its figures mean nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.draft_bench import Benchmark, Deadline
from benchmarks.draft_cases import (
    Outcome,
    ablation,
    confidence,
    equal,
    fresh,
    further,
    lasting,
    main_training,
    more,
    ngrams,
    objective,
    optimizer,
    real_loop,
    reference,
    second,
    served,
    speculators,
    trajectories,
)
from benchmarks.draft_lines import (
    ABLATIONS,
    BY_DEFAULT,
    EQUAL,
    FURTHER,
    LASTING,
    MAINS,
    OBJECTIVES,
    OPTIMIZERS,
    SECOND,
    SEEDS,
    SPECULATORS_RATES,
    SPECULATORS_WIDE,
)
from benchmarks.draft_scale import full_scale, tiny_scale
from benchmarks.draft_store import Store


def cases() -> dict[str, Callable[[Benchmark], Outcome]]:
    """All cases by name, in the order of running."""
    table: dict[str, Callable[[Benchmark], Outcome]] = {
        "trajectories": trajectories,
        # Before the main training, whose recipe they choose.
        **{
            f"ablation-{line:02d}-seed{seed}": partial(ablation, line=line, seed=seed)
            for seed in SEEDS
            for line in range(len(ABLATIONS))
        },
        **{
            f"default-optimiser-{line:02d}-seed{seed}": partial(ablation, line=line, seed=seed, optimizer={})
            for seed in SEEDS
            for line in BY_DEFAULT
        },
        "more": more,
        **{
            f"optimizer-{name}-{rate:g}-{start}-{anchors}-{budget}": partial(optimizer, line=line)
            for line, (name, rate, start, anchors, times) in enumerate(OPTIMIZERS)
            for budget in [f"x{times}" if times else "main"]
        },
        **{name: partial(main_training, name=name) for name in MAINS},
        "real": real_loop, "served": served,
        "speculators": speculators, "reference": reference, "equal": equal, "ngrams": ngrams,
    }  # fmt: skip
    table |= {f"equal-{name}": partial(equal, name=name) for name in EQUAL}
    table |= {f"speculators-{rate:g}": partial(speculators, rate=rate) for rate in SPECULATORS_RATES}
    table |= {f"speculators-wide-{rate:g}": partial(speculators, rate=rate, wide=True) for rate in SPECULATORS_WIDE}
    table |= {f"lasting-{line:02d}-seed{seed}": partial(lasting, line=line, seed=seed)
              for seed in SEEDS for line in LASTING}  # fmt: skip
    table |= {f"objective-{name}-x{times}-seed{seed}": partial(objective, name=name, times=times, seed=seed)
              for times in (1, 3) for seed in SEEDS for name in OBJECTIVES}  # fmt: skip
    table["fresh"] = fresh
    table |= {f"further-{by}": partial(further, by=by) for by in FURTHER}
    table |= {f"confidence-{temperature:g}": partial(confidence, temperature=temperature) for temperature in (0.0, 1.0)}
    for stage in range(len(SECOND)):
        for seed in SEEDS:
            table[f"second-{stage}-seed{seed}"] = partial(second, stage=stage, seed=seed)
    return table


def main() -> None:
    """See the module's docstring."""
    table = cases()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--state", type=Path, required=True, help="folder that is kept from call to call")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/draft_quality.json"))
    parser.add_argument("--cases", nargs="+", default=[""], metavar="CASE", help="cases, or how their names begin")
    parser.add_argument("--deadline", type=float, default=float("inf"), help="seconds of this call")
    parser.add_argument("--list", action="store_true", help="print the cases and which are done")
    parser.add_argument("--main-seconds", type=float, help="of the main training (default: 240)")
    parser.add_argument("--device", help="of the cases that need no GPU, such as ngrams: cpu")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--no-compile", action="store_true", help="train without torch.compile")
    args = parser.parse_args()
    store = Store(args.state, args.out)
    chosen = [name for name in table if any(name == c or (c not in table and name.startswith(c)) for c in args.cases)]
    pending = [name for name in chosen if store.done(name) is None]
    if args.list:
        print("\n".join(f"{name}{'' if name in pending else '  done'}" for name in chosen))
        return
    store.merge()
    scale = tiny_scale() if args.tiny else full_scale()
    if args.device:
        scale = replace(scale, device=args.device)
    if args.main_seconds:
        scale = replace(scale, main_seconds=args.main_seconds)
    if args.no_compile:
        scale = replace(scale, config=replace(scale.config, compile=False))
    torch.set_float32_matmul_precision("high")
    # Batches are made by many small operations, which cost more the more threads they are handed to.
    torch.set_num_threads(min(4, torch.get_num_threads()))
    # Each objective compiles its own kernel; beyond the limit they would run uncompiled without a word.
    torch._dynamo.config.recompile_limit = 64
    bench = Benchmark(scale, args.data, store, args.deadline)
    for name in pending:
        try:
            bench.check_time()
            torch.manual_seed(0)
            store.finish(name, *table[name](bench))
            bench.forget_graphs()
        except Deadline:
            bench.log(f"out of time in '{name}'; the same command goes on from here")
            return


if __name__ == "__main__":
    main()
