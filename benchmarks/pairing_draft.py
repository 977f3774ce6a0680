"""The draft process of the pairing benchmarks: random weights or a trained draft, served until standard input closes.

A line on standard input swaps random weights for others; `swapped` then holds the versions before and after.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.pairing_shapes import SHAPES, Shape
from unmask.checkpoints import load_draft
from unmask.files import atomic_path
from unmask.models.dflash import DFlashDraft
from unmask.pairing.link_file import LinkConfig, write_link_file
from unmask.pairing.server import DraftServer
from unmask.pairing.vocabulary import load_vocabulary

STATS = "draft_stats"
"""File of the folder that holds the draft's own counters."""
_REPORT_S = 0.1


def random_weights(shape: Shape, device: str, dtype: torch.dtype) -> tuple[DFlashDraft, DFlashDraft, Tensor, Tensor]:
    """A draft, another in the host's memory as if its files had been read, the embedding and the head."""
    with torch.device(device):
        draft, other = (DFlashDraft(shape.draft()).to(dtype).requires_grad_(False) for _ in range(2))
        tables = [torch.randn(shape.vocab_size, shape.hidden, dtype=dtype) for _ in range(1 if shape.tied else 2)]
    return draft, other.cpu(), tables[0], tables[-1]


def main() -> None:
    """Serve mailboxes in `boxes`, and a TCP address that is written to `address`."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--shape", choices=sorted(SHAPES))
    kind.add_argument("--pair", nargs=2, type=Path, metavar=("TARGET", "DRAFT"), help="directories with weights")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--device", required=True)
    arguments = parser.parse_args()
    on_gpu = arguments.device == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    torch.set_num_threads(1)
    if arguments.pair:
        target, path = arguments.pair
        draft, other = load_draft(path, dtype).to(arguments.device).requires_grad_(False), None
        embedding, head = (table.to(arguments.device) for table in load_vocabulary(target, dtype))
    else:
        draft, other, embedding, head = random_weights(SHAPES[arguments.shape], arguments.device, dtype)
    secret = arguments.folder / "secret"
    server = DraftServer(
        draft,
        embedding,
        head,
        secret.read_bytes(),
        memory_mb=8192 if on_gpu else 64,
        mailbox_folder=arguments.folder / "boxes",
    )
    server.start()
    write_link_file(arguments.folder / "address", LinkConfig(address=server.address, secret_file=str(secret)))
    threading.Thread(target=_report, args=(server, arguments.folder / STATS), daemon=True).start()
    if os.read(sys.stdin.fileno(), 4096) and other is not None:
        before = server.stats().draft_version
        after = server.swap(other)
        (arguments.folder / "swapped").write_text(f"{before} {after}")
        os.read(sys.stdin.fileno(), 4096)
    server.stop()


def _report(server: DraftServer, path: Path) -> None:
    """Keep the counters of the draft where the other processes of a benchmark can read them."""
    while True:
        stats = server.stats()
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps({"steps": stats.steps, "busy_us": 1e6 * stats.busy_s}))
        time.sleep(_REPORT_S)


if __name__ == "__main__":
    main()
