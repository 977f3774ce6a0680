"""`python -m tests.fault.null_generation recipe.yaml`: generation without a language model.

The engine answers with ids that follow from the prompt and the row's seed, after `NULL_ENGINE_SECONDS` a row. A prompt
that says so ends its process. The engine that finds the file `NULL_ENGINE_DIES` takes it away and dies, as one whose
core has died in a process that lives: nothing that it has in hand, or gets, is answered any more.
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from engines.engine_thread import Completion, EngineDiedError
from pipelines.cli import Invocation, run_pipeline
from pipelines.generate import generate
from unmask.types import SamplingOptions

DEADLY_LENGTH = 60
"""Prompts of at least this many tokens end the engine."""


class NullEngine:
    """Made-up responses, one at a time."""

    def __init__(self, arguments: dict[str, Any], *, on_gpu: bool = False) -> None:
        self._seconds = float(os.environ.get("NULL_ENGINE_SECONDS", "0"))
        self._death = Path(os.environ.get("NULL_ENGINE_DIES", "/nowhere"))
        self._dead = False
        self._pool = ThreadPoolExecutor(1)

    def submit(self, prompt_ids: tuple[int, ...], options: SamplingOptions) -> Future[Completion]:
        if len(prompt_ids) >= DEADLY_LENGTH:
            os._exit(9)
        return self._pool.submit(self._answer, prompt_ids, options)

    def _answer(self, prompt_ids: tuple[int, ...], options: SamplingOptions) -> Completion:
        time.sleep(self._seconds)
        if self._death.exists():
            with contextlib.suppress(FileNotFoundError):  # another engine may have been quicker
                self._death.unlink()
                self._dead = True
        if self._dead:
            raise EngineDiedError("the engine stopped: it was told to")
        chance = random.Random(f"{prompt_ids} {options.seed}")
        return Completion([chance.randrange(49152) for _ in range(options.max_tokens)], "length")


def main(invocation: Invocation) -> str:
    """Run the stage; the last line to print."""
    recipe = invocation.recipe
    return str(generate(recipe, Path(recipe.run_dir), fresh=invocation.fresh, engine_factory=NullEngine))


if __name__ == "__main__":
    # By its importable name: actors load the engine's class from there.
    from tests.fault import null_generation

    sys.exit(run_pipeline(partial(null_generation.main)))
