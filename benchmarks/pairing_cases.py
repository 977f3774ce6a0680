"""What a pairing must bear, beside its speed and `benchmarks.pairing_faults`: a shared draft, and long prompts.

    python -m benchmarks.pairing_cases --out benchmarks/results/pairing_cases.json              (two GPUs)
    python -m benchmarks.pairing_cases --tiny --out /tmp/cases.json                             (any machine)

share   two targets with one draft, against one target with its own: tokens a second
long    16,000-token prompts: time to the first token, against the target alone

Random weights; on GPUs acceptance is synthetic, as in `benchmarks.pairing`. With two GPUs the second target of `share`
lies beside the draft.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.pairing import await_draft, await_link, draft_process, engine_environment
from benchmarks.pairing_engines import engine_options
from benchmarks.pairing_rows import LEARNING, machine_of
from benchmarks.pairing_shapes import SHAPES, shape_folder

CASES = ("share", "long")


def main() -> None:
    """Run the cases; each is written as soon as it is measured."""
    arguments = _parse()
    if arguments.role is not None:
        print(json.dumps({"alone": _role, "share": _rate, "long": _first_token}[arguments.role](arguments)))
        return
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for case in arguments.cases:
        arguments.shape = shape_of(case, arguments.tiny)
        with (
            shape_folder(arguments.shape, arguments.tiny) as arguments.folder,
            draft_process(arguments, "--shape", arguments.shape) as draft,
        ):
            if arguments.tiny:
                # Through the link file; a GPU's engines find the mailboxes of a draft that comes later.
                await_link(arguments, draft)
            found = {"share": share, "long": long}[case](arguments)
        rows.append(
            {"case": case, "shape": arguments.shape, "gpus": arguments.gpus, "machine": machine_of(arguments), **found}
        )
        print(json.dumps(rows[-1]), flush=True)
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n")


def shape_of(case: str, tiny: bool) -> str:
    """Sizes that show what a case is about."""
    if case == "long":
        return "tiny-1k" if tiny else "qwen3-8b-20k"
    return "tiny" if tiny else "smollm2-135m"


def share(arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of one target, then of two at the same time."""
    single = _finish(_start(arguments, "share"))["rate"]
    (arguments.folder / "together").touch()
    both = [_start(arguments, "share", index) for index in (0, 0 if arguments.tiny else arguments.gpus - 1)]
    rates = [_finish(engine)["rate"] for engine in both]
    return {"one_target": single, "two_targets": rates, "ratio": round(sum(rates) / single, 3)}


def long(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds to the first token of a long prompt."""
    alone, paired = (_finish(_start(arguments, role))["seconds"] for role in ("alone", "long"))
    return {"target_alone_s": alone, "paired_s": paired, "ratio": round(paired / alone, 4)}


def _start(arguments: argparse.Namespace, role: str, index: int = 0) -> subprocess.Popen:
    import os

    command = [sys.executable, "-m", "benchmarks.pairing_cases", f"--role={role}", f"--folder={arguments.folder}"]
    command += [f"--shape={arguments.shape}", f"--out={arguments.out}", f"--gpus={arguments.gpus}"]
    command += ["--tiny"] * arguments.tiny
    environment = os.environ | engine_environment(arguments, index)
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def _finish(engine: subprocess.Popen) -> dict[str, Any]:
    output, _ = engine.communicate()
    if engine.returncode:
        raise RuntimeError("an engine has failed")
    # vLLM may say something more when it ends.
    return json.loads(next(line for line in reversed(output.splitlines()) if line.startswith("{")))


def _engine(arguments: argparse.Namespace, batch: int, *, paired: bool = True) -> Any:
    from vllm import LLM

    arguments.concurrency, arguments.max_model_len = [batch], SHAPES[arguments.shape].max_positions - 64
    if not paired:
        modes: tuple[str, ...] = ("target",)
    else:
        modes = ("remote",) if arguments.tiny else ("production",)
    llm = LLM(**engine_options(arguments, modes))
    if paired:
        await_draft(llm, arguments)
    return llm


def _prompts(arguments: argparse.Namespace, count: int, length: int) -> list[dict[str, list[int]]]:
    import random

    generator, vocab_size = random.Random(0), SHAPES[arguments.shape].vocab_size
    return [
        {"prompt_token_ids": [generator.randrange(1000, vocab_size - 1000) for _ in range(length)]}
        for _ in range(count)
    ]


def _generate(llm: Any, prompts: list[dict[str, list[int]]], tokens: int) -> list[int]:
    """Lengths of the responses."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    return [len(o.outputs[0].token_ids) for o in llm.generate(prompts, params, use_tqdm=False)]


def _rate(arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of a round, the median; where two run together, for as long as both do."""
    batch, tokens = (4, 32) if arguments.tiny else (32, 512)
    llm = _engine(arguments, batch)
    prompts = _prompts(arguments, batch, 64)
    for _ in range(1 if arguments.tiny else LEARNING):
        # The engine chooses its K meanwhile.
        _generate(llm, prompts, tokens)
    if (arguments.folder / "together").exists():
        (arguments.folder / f"ready-{time.time_ns()}").touch()
        while len(list(arguments.folder.glob("ready-*"))) < 2:
            time.sleep(0.01)
    rounds = []
    end = time.perf_counter() + (8 if arguments.tiny else 15)
    while not rounds or time.perf_counter() < end:
        began = time.perf_counter()
        _generate(llm, prompts, tokens)
        rounds.append(batch * tokens / (time.perf_counter() - began))
    # The last round may run after the other target has ended.
    return {"rate": round(median(rounds[:-1] or rounds), 1)}


def _role(arguments: argparse.Namespace) -> dict[str, Any]:
    return _seconds(_engine(arguments, 2, paired=False), arguments)


def _first_token(arguments: argparse.Namespace) -> dict[str, Any]:
    return _seconds(_engine(arguments, 2), arguments)


def _seconds(llm: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Median seconds to the first token of a prompt that takes several chunks."""
    prompts = _prompts(arguments, 8, 900 if arguments.tiny else 16000)
    seconds = []
    for prompt in prompts:
        began = time.perf_counter()
        _generate(llm, [prompt], 1)
        seconds.append(time.perf_counter() - began)
    return {"seconds": round(median(seconds[1:]), 4)}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--gpus", type=int, choices=(1, 2), default=2, help="1 puts targets and draft on one")
    parser.add_argument("--tiny", action="store_true", help="small networks on the CPU: shows that it runs")
    parser.add_argument("--role", choices=("alone", *CASES), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--shape", choices=sorted(SHAPES), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
