"""A draft server as a plain process: load, serve, write the link file, wait for the end."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from pathlib import Path

import torch

from unmask.checkpoints import load_confidence, load_draft, read_config
from unmask.errors import UserError
from unmask.pairing.handshake import read_secret
from unmask.pairing.link_file import LinkConfig, write_link_file
from unmask.pairing.server import DraftServer
from unmask.pairing.vocabulary import load_vocabulary

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(argv: list[str] | None = None) -> None:
    """Run until SIGTERM, SIGINT or the end of standard input; a user's mistake ends it in one line."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    arguments = _parse(argv)
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    try:
        server = _build(arguments)
    except UserError as error:
        sys.exit(f"error: {error}")
    server.start()
    secret_file = str(arguments.secret_file.absolute())
    write_link_file(arguments.address_file, LinkConfig(address=server.address, secret_file=secret_file))
    threading.Thread(target=_wait_for_end_of_input, args=(ended,), daemon=True).start()
    ended.wait()
    server.stop()


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m unmask.pairing.server", description=main.__doc__)
    parser.add_argument("--draft", type=Path, required=True, help="draft directory")
    parser.add_argument("--target", type=Path, required=True, help="target directory, for embedding and head")
    parser.add_argument("--secret-file", type=Path, required=True)
    parser.add_argument("--address-file", type=Path, required=True, help="link file, written when the server listens")
    parser.add_argument("--host", default="127.0.0.1", help="interface, or unix:/path")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--memory-mb", type=float, default=256)
    parser.add_argument("--dtype", choices=sorted(_DTYPES), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--mailbox-folder", type=Path, help="serve the mailboxes of targets on this host too")
    return parser.parse_args(argv)


def _build(arguments: argparse.Namespace) -> DraftServer:
    dtype = _DTYPES[arguments.dtype]
    embedding, lm_head = load_vocabulary(arguments.target, dtype)
    _, record = read_config(arguments.draft)
    return DraftServer(
        load_draft(arguments.draft, dtype).to(arguments.device),
        embedding,
        lm_head,
        read_secret(arguments.secret_file),
        host=arguments.host,
        port=arguments.port,
        memory_mb=arguments.memory_mb,
        record=record,
        confidence=load_confidence(arguments.draft),
        mailbox_folder=arguments.mailbox_folder,
    )


def _wait_for_end_of_input(ended: threading.Event) -> None:
    descriptor = sys.stdin.fileno()
    while os.read(descriptor, 4096):
        continue
    ended.set()
