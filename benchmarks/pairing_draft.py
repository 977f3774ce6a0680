"""The draft process of `benchmarks.pairing` and `pairing_cases`: random weights, served until standard input closes.

A line on standard input swaps in other weights; `swapped` then holds the versions before and after.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

from benchmarks.pairing_shapes import SHAPES, K
from unmask.models.dflash import DFlashDraft
from unmask.pairing.link_file import LinkConfig, write_link_file
from unmask.pairing.server import DraftServer


def main() -> None:
    """Serve mailboxes in `boxes`, and a TCP address that is written to `address`."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--device", required=True)
    arguments = parser.parse_args()
    shape, on_gpu = SHAPES[arguments.shape], arguments.device == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    torch.set_num_threads(1)

    def new_draft() -> DFlashDraft:
        with torch.device(arguments.device):
            return DFlashDraft(shape.draft()).to(dtype).requires_grad_(False)

    # As a draft whose files have been read.
    other = new_draft().cpu()
    draft = new_draft()
    with torch.device(arguments.device):
        tables = [torch.randn(shape.vocab_size, shape.hidden, dtype=dtype) for _ in range(1 if shape.tied else 2)]
    secret = arguments.folder / "secret"
    server = DraftServer(
        draft,
        tables[0],
        tables[-1],
        secret.read_bytes(),
        memory_mb=8192 if on_gpu else 64,
        graph_ks=[K, K // 2],
        mailbox_folder=arguments.folder / "boxes",
    )
    server.start()
    write_link_file(arguments.folder / "address", LinkConfig(address=server.address, secret_file=str(secret)))
    if os.read(sys.stdin.fileno(), 4096):
        before = server.stats().draft_version
        after = server.swap(other)
        (arguments.folder / "swapped").write_text(f"{before} {after}")
        os.read(sys.stdin.fileno(), 4096)
    server.stop()


if __name__ == "__main__":
    main()
