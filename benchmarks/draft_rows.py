"""What a draft loses when the target's features travel to it in eight bits (`serve.eight_bit_rows`).

    python -m benchmarks.draft_rows --state DIR --draft equal --out benchmarks/results/draft_rows.json

`--state` is that of `benchmarks.draft_quality`: its responses of SmolLM2-135M-Instruct to held-out prompts, and a draft
that it has kept. Acceptance by replay along the same texts, in float32, with rows as the projection makes them and with
rows that went through float8 (e4m3); the interval is that of the ratio, over texts. Any machine.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.draft_store import Store
from unmask.evaluation.metrics import acceptance_length
from unmask.evaluation.replay import replay_draft
from unmask.models.target import TargetModel
from unmask.pairing.wire import EIGHT_BIT, as_rows
from unmask.targets import resolve_target
from unmask.training.sequences import TokenSequence

SETS = ("gsm8k@0", "mtbench@0")
DRAWS = 300


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--draft", default="equal", help="name of a kept draft")
    parser.add_argument("--prompts", type=int, default=80, help="of each set")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    store = Store(args.state, args.state / "unused.json")
    draft = store.draft(args.draft)
    path = resolve_target("embedded:smollm2-135m-instruct")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    target = TargetModel.load(path, draft.config.target_layer_ids, torch.float32).to(device)
    draft.to(device)
    rows = []
    for name in SETS:
        responses = store.responses(name)[: args.prompts]
        texts = [TokenSequence(r.prompt + r.tokens + r.beyond, len(r.prompt)) for r in responses]
        lengths = [len(r.tokens) for r in responses]
        whole = replay_draft(target, draft, texts, lengths, rows=4)
        hook = draft.hidden_norm.register_forward_hook(through_eight_bits)
        narrow = replay_draft(target, draft, texts, lengths, rows=4)
        hook.remove()
        machine = torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} cores"
        rows.append({"eval_set": name, "prompts": len(texts), "machine": machine, **compared(whole, narrow)})
        print(json.dumps(rows[-1]), flush=True)
        args.out.write_text(json.dumps(rows, indent=1) + "\n")


def through_eight_bits(module: nn.Module, inputs: tuple[Tensor, ...], context: Tensor) -> Tensor:
    """A forward hook: context rows as they arrive."""
    return as_rows(context, EIGHT_BIT).to(context.dtype)


def compared(whole: list[list[int]], narrow: list[list[int]]) -> dict[str, object]:
    """Acceptance lengths, and their ratio with a 95 % interval by drawing texts again."""

    def ratio(chosen: list[int]) -> float:
        of_whole, of_narrow = ([n for i in chosen for n in accepted[i]] for accepted in (whole, narrow))
        return acceptance_length(of_narrow) / acceptance_length(of_whole)

    everything, generator = list(range(len(whole))), random.Random(0)
    drawn = sorted(ratio(generator.choices(everything, k=len(everything))) for _ in range(DRAWS))
    return {
        "acceptance_length": acceptance_length([n for accepted in whole for n in accepted]),
        "acceptance_length_eight_bits": acceptance_length([n for accepted in narrow for n in accepted]),
        "ratio": ratio(everything),
        "interval95": [drawn[int(0.025 * DRAWS)], drawn[int(0.975 * DRAWS)]],
    }


if __name__ == "__main__":
    main()
