"""A target alone, with vLLM's colocated draft, and with a remote one: speed at equal acceptance, in one run.

    python -m benchmarks.pairing --out benchmarks/results/pairing_speed.json            (two GPUs: target and draft)
    python -m benchmarks.pairing --gpus 1 --shape smollm2-135m --out /tmp/one.json      (one GPU for both)
    python -m benchmarks.pairing --tiny --out /tmp/tiny.json                            (any machine)

Weights are random and acceptance is vLLM's `synthetic` one with r_k = 0.86^k whatever is drafted: only the system
differs. On GPUs native and remote drafting are switched at run time in one engine (`engines.native_switch`), so that
graphs and KV cache are the same; the draft of the remote ones is a process of its own. An engine before it is as it is
in production, without vLLM's draft in it: `kv_cache_tokens` says what that frees. `--tiny` uses vLLM's V1 runner on a
CPU, which knows no synthetic acceptance, with an engine for each mode. A row is printed and written as soon as it is
measured; `benchmarks.pairing_rows` says what it holds.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.pairing_engines import engine_options, k_by_batch_size
from benchmarks.pairing_rows import REMOTE, cases, measure
from benchmarks.pairing_shapes import SHAPES, shape_folder
from engines.draft_arguments import LINK_FILE_VARIABLE, MAILBOX_FOLDER_VARIABLE, WATCHDOG_VARIABLE
from unmask.pairing.link_file import LinkConfig, read_link_file, write_link_file
from unmask.pairing.status import read_status

SECRET = b"a benchmark of one machine, 0123"
MODES = ("target", "native", *REMOTE)


def main() -> None:
    """Measure every mode, and write the rows."""
    arguments = _parse()
    if arguments.role == "engine":
        run_engine(arguments)
        return
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    with shape_folder(arguments.shape, arguments.tiny) as arguments.folder:
        switched = (("native",), ("remote",)) if arguments.tiny else (("production",), ("native", "remote", "tcp"))
        engines = [[mode for mode in modes if mode in arguments.modes] for modes in (("target",), *switched)]
        with draft_process(arguments, "--shape", arguments.shape) as draft:
            for modes in filter(None, engines):
                if modes != ["target"]:
                    await_link(arguments, draft)
                for row in engine_rows(arguments, modes):
                    rows.append(row)
                    print(json.dumps(row), flush=True)
                    arguments.out.write_text(json.dumps(rows, indent=1) + "\n")


@contextmanager
def draft_process(arguments: argparse.Namespace, *draft: str) -> Iterator[subprocess.Popen]:
    """The draft, on the last GPU; it serves mailboxes and, once `await_link` has seen it, a link file. Engines may
    start beside it, for both take their time.

    Args:
        draft: what `benchmarks.pairing_draft` is to serve.
    """
    folder = arguments.folder
    (folder / "secret").write_bytes(SECRET)
    device = "cpu" if arguments.tiny else "cuda"
    command = [sys.executable, "-m", "benchmarks.pairing_draft", *draft, f"--folder={folder}"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": gpu(arguments.gpus - 1)}
    process = subprocess.Popen([*command, f"--device={device}"], stdin=subprocess.PIPE, env=environment)
    try:
        yield process
    finally:
        process.stdin.close()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            # An engine has failed while the draft was still loading, which does not listen then.
            process.kill()
            process.wait()


def await_link(arguments: argparse.Namespace, draft: subprocess.Popen) -> None:
    """Return when a draft can be asked, by the link file that is written here."""
    folder = arguments.folder
    while not (folder / "address").exists():
        if draft.poll() is not None:
            raise RuntimeError("the draft process has died")
        time.sleep(0.1)
    found = read_link_file(folder / "address")
    options = {"timeout_ms": 30_000.0, "status_file": str(folder / "status")}
    write_link_file(folder / "link", LinkConfig(address=found.address, secret_file=found.secret_file, **options))


def gpu(index: int) -> str:
    """A GPU of those that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[index] if visible else str(index)


def engine_rows(arguments: argparse.Namespace, modes: list[str]) -> Iterator[dict[str, Any]]:
    """Rows of one engine, a process of its own on the first GPU."""
    command = [sys.executable, "-m", "benchmarks.pairing", "--role=engine", *sys.argv[1:]]
    command += [f"--folder={arguments.folder}", "--modes", *modes]
    environment = os.environ | engine_environment(arguments, 0)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        for line in process.stdout:
            if line.startswith("{"):
                yield json.loads(line)
            else:
                print(line, end="", file=sys.stderr)
    if process.returncode:
        raise RuntimeError(f"the engine of {', '.join(modes)} has failed")


def engine_environment(arguments: argparse.Namespace, index: int) -> dict[str, str]:
    """Variables of an engine's process, on a GPU of those that this process may use."""
    common = {
        "CUDA_VISIBLE_DEVICES": gpu(index),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        LINK_FILE_VARIABLE: str(arguments.folder / "link"),
        WATCHDOG_VARIABLE: "3000",
    }
    if arguments.tiny:
        return common | {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    return common | {
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        MAILBOX_FOLDER_VARIABLE: str(arguments.folder / "boxes"),
    }


def run_engine(arguments: argparse.Namespace) -> None:
    """Print the rows of one engine."""
    from vllm import LLM

    modes = tuple(arguments.modes)
    llm = LLM(**engine_options(arguments, modes))
    has_table = not arguments.tiny and modes != ("target",)
    for mode in modes:
        if has_table and mode != "production":
            llm.collective_rpc("choose_draft", args=(mode,))
        if mode in REMOTE:
            await_draft(llm, arguments)
        for case in cases(mode, arguments.concurrency, has_table):
            if has_table:
                least = max(2, 3 * case.concurrency // 4) if case.halves == 2 else None
                llm.collective_rpc("take_turns_from", args=(least,))
            if has_table and case.k is not None:
                sizes = range(max(arguments.concurrency) + 1)
                # vLLM's own table of K holds when a batch runs empty, too.
                ks = [k_by_batch_size(max(n, 1)) if case.policy == "by batch size" else case.k for n in sizes]
                llm.collective_rpc("set_speculation", args=(ks,))
            print(json.dumps(measure(llm, arguments, case)), flush=True)


def await_draft(llm: Any, arguments: argparse.Namespace) -> None:
    """Wait until the engine's draft can be asked."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if arguments.tiny:
            ready = (read_status(arguments.folder / "status") or {}).get("speculation_enabled")
        else:
            ready = llm.collective_rpc("draft_counters")[0]["is_ready"]
        if ready:
            return
        time.sleep(0.2)
    raise queue.Empty("no draft within two minutes")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-8b")
    parser.add_argument("--gpus", type=int, choices=(1, 2), default=2, help="1 puts target and draft on one")
    parser.add_argument("--tiny", action="store_true", help="a small target and draft on the CPU: shows that it runs")
    parser.add_argument("--concurrency", type=int, nargs="+", default=None)
    parser.add_argument("--tokens", type=int, default=None, help="of each response")
    parser.add_argument("--max-model-len", type=int, default=None)
    parser.add_argument("--role", choices=("run", "engine"), default="run", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="default: all")
    arguments = parser.parse_args()
    if arguments.tiny and not {"target", "native", "remote"} & set(arguments.modes):
        parser.error("--tiny runs the modes target, native and remote; name one of them in --modes")
    arguments.shape = "tiny" if arguments.tiny else arguments.shape
    arguments.concurrency = arguments.concurrency or ([1, 2] if arguments.tiny else [1, 8, 32, 64, 128])
    arguments.tokens = arguments.tokens or (32 if arguments.tiny else 512)
    return arguments


if __name__ == "__main__":
    main()
