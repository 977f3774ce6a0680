"""The generation actor: one engine, and the shards of trajectories that it writes."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np

from actors.gate import Gate
from actors.heartbeat import Heartbeat
from actors.suspects import Suspects, forget
from engines.engine_options import DIFFUSION_PLACEMENT, PLACEMENT, engine_arguments
from engines.engine_thread import Completion, EngineDiedError
from engines.offline_engine import OfflineEngine
from unmask.attempts import Attempts
from unmask.config import Recipe
from unmask.errors import CheckpointError, PromptError
from unmask.manifest import ShardEntry
from unmask.prompt_rows import PromptRow
from unmask.prompts import PromptBuilder
from unmask.recipe import digest
from unmask.staged_prompts import read_staged
from unmask.targets import describe_target, resolve_target, unused_special_token
from unmask.trajectories import inspect_shard, row_seed, sample_id, write_shard
from unmask.types import SamplingOptions, TargetRecord, Trajectory
from unmask.verification import Judge, build_verifier

logger = logging.getLogger(__name__)


class Engine(Protocol):
    """What generation needs of an engine."""

    def submit(self, prompt_ids: tuple[int, ...], options: SamplingOptions) -> Future[Completion]:
        """Queue one request; the future may raise PromptError or EngineDiedError."""
        ...


@dataclass(frozen=True, slots=True)
class Sample:
    """One response to draw: a row of the source and the number of the sample of it."""

    row: PromptRow
    number: int


class Generator:
    """Turns shard numbers into shard files; Ray Data calls one instance per actor (`map_batches`).

    A shard is written whole by this actor, and only a summary goes back. Several shards are in flight in one
    engine. If the engine dies the process ends with it: Ray starts the actor anew and hands it the same shards. One
    that was in flight too often when an engine died gets the engine alone, until the deadly row is found.

    Args:
        recipe: the resolved recipe.
        directory: the run's `trajectories` folder, on storage that all nodes share.
        record: the target as the driver found it; another one on this node is refused.
        run_id: of the run; shards of another one in the folder are done anew.
        beat_every_s: least seconds between two signs of life.
        engine_factory: builds the engine from its arguments; None takes vLLM, or a diffusion engine where the recipe
            names a decoder.

    Raises:
        CheckpointError: this node resolves the target to something else.
        ConfigError: this node cannot run the engine or the verifier.
    """

    def __init__(
        self,
        recipe: Recipe,
        directory: str,
        record: TargetRecord,
        run_id: str,
        beat_every_s: float,
        engine_factory: Callable[..., Engine] | None = None,
    ) -> None:
        from transformers import AutoTokenizer

        self._recipe = recipe
        self._directory = Path(directory)
        self._record = record
        self._run_id = run_id
        self._heartbeat = Heartbeat(self._directory, beat_every_s)
        self._decode_config = decode_digest(recipe)
        path = resolve_target(recipe.target.model, recipe.target.revision)
        if describe_target(path) != record:
            raise CheckpointError(
                f"'{recipe.target.model}' is another model on this node than on the driver", field="target.model"
            )
        tokenizer = AutoTokenizer.from_pretrained(path)
        self._builder = PromptBuilder(
            tokenizer,
            recipe.prompts,
            max_prompt_len=recipe.target.max_model_len - recipe.generate.max_new_tokens,
            mask_token_id=_mask_token(recipe, path, tokenizer),
        )
        self._judge = None
        if recipe.generate.verifier is not None:
            self._judge = Judge(tokenizer, build_verifier(recipe.generate.verifier), recipe.generate.reference)
        # Confined code takes a core while it runs.
        self._judging = ThreadPoolExecutor(max(1, int(recipe.generate.cpus_per_actor)), "judge")
        self._gate = Gate()
        self._engine = _build_engine(recipe, path, engine_factory)

    async def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Finish the shards of column `shard`; one summary row each: the manifest entry and the seconds taken."""
        summaries = await asyncio.gather(*(self._finish(int(shard)) for shard in batch["shard"]))
        return {name: np.array([summary[name] for summary in summaries]) for name in summaries[0]}

    async def _finish(self, shard: int) -> dict[str, Any]:
        start = time.monotonic()
        attempts = Attempts.load(self._directory, shard)
        entry = inspect_shard(self._directory, shard, self._run_id) or await self._work(shard, attempts)
        attempts.clear()
        if attempts.shard >= self._recipe.generate.max_attempts:
            forget(attempts, self._run_id)
        return {"shard": shard, **asdict(entry), "seconds": time.monotonic() - start}

    async def _work(self, shard: int, attempts: Attempts) -> ShardEntry:
        rows = read_staged(self._directory / "prompts", shard)
        samples = [Sample(row, n) for row in rows for n in range(self._recipe.generate.samples_per_prompt)]
        if attempts.shard < self._recipe.generate.max_attempts:
            async with self._gate.together():
                attempts.begin()
                self._heartbeat.beat()
                done = list(await asyncio.gather(*map(self._draw, samples)))
        else:
            logger.warning("shard %d was there %d times when an engine died; it runs alone", shard, attempts.shard)
            async with self._gate.alone():
                done = await self._find_deadly(samples, Suspects(self._directory, self._run_id, attempts, len(samples)))
        good, bad = [t for t in done if t.error is None], [t for t in done if t.error is not None]
        return write_shard(self._directory, shard, good, bad, self._run_id)

    async def _find_deadly(self, samples: list[Sample], suspects: Suspects) -> list[Trajectory]:
        """All rows of a shard, tried in groups that get smaller with each engine that dies."""

        async def draw(position: int) -> None:
            suspects.keep(position, await self._draw(samples[position]))

        while group := suspects.next_group():
            if len(group) == 1 and (deaths := suspects.deaths_alone(group[0])) >= self._recipe.generate.max_attempts:
                error = f"the engine died {deaths} times on this row"
                suspects.keep(group[0], self._trajectory(samples[group[0]], (), None, error))
                continue
            suspects.begin(group)
            self._heartbeat.beat()
            await asyncio.gather(*map(draw, group))
        return [suspects.done[position] for position in range(len(samples))]

    async def _draw(self, sample: Sample) -> Trajectory:
        """The response of one sample with its verdict, or its quarantined row."""
        ids: tuple[int, ...] = ()
        try:
            ids = self._builder.build(sample.row).ids
            reference = self._judge.reference(sample.row.values) if self._judge else None
            completion = await asyncio.wrap_future(self._engine.submit(ids, self._options(sample)))
        except PromptError as error:
            return self._trajectory(sample, ids, None, str(error))
        except EngineDiedError as error:
            # Here and at once: while the error went up, a shard that waits could begin, and be blamed for this death.
            _end_process(error)
        self._heartbeat.beat()
        if completion.finish_reason not in ("stop", "length"):
            # Cut off in the middle, it would be learned as if the teacher had meant it.
            return self._trajectory(sample, ids, completion, f"the engine ended it with '{completion.finish_reason}'")
        return self._trajectory(sample, ids, completion, None, await self._verdict(completion, reference))

    async def _verdict(self, completion: Completion, reference: Any) -> bool | None:
        if self._judge is None:
            return None
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._judging, self._judge.is_right, completion.token_ids, reference)

    def _options(self, sample: Sample) -> SamplingOptions:
        config = self._recipe.generate
        return SamplingOptions(
            max_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            seed=row_seed(config.seed, sample.row.index, sample.number),
        )

    def _trajectory(
        self,
        sample: Sample,
        ids: tuple[int, ...],
        completion: Completion | None,
        error: str | None,
        verdict: bool | None = None,
    ) -> Trajectory:
        seed = row_seed(self._recipe.generate.seed, sample.row.index, sample.number)
        response = completion.token_ids if completion else []
        forwards = completion.num_forwards if completion else None
        return Trajectory(
            sample_id=sample_id(ids, self._record.revision, self._decode_config, seed),
            prompt_ids=list(ids),
            response_ids=response,
            finish_reason=completion.finish_reason if completion else "error",
            num_forwards=len(response) if forwards is None else forwards,
            teacher=self._recipe.target.model,
            teacher_revision=self._record.revision,
            decode_config=self._decode_config,
            commit_step=completion.commit_step if completion else None,
            verdict=verdict,
            error=error,
            meta={"index": sample.row.index, "sample": sample.number, "source": sample.row.values},
        )


def decode_digest(recipe: Recipe) -> str:
    """Hash of everything besides prompt, teacher and seed that a response depends on."""
    g = recipe.generate
    placement = PLACEMENT if g.decoder is None else DIFFUSION_PLACEMENT
    options = {name: value for name, value in recipe.target.engine.items() if name not in placement}
    common = g.max_new_tokens, g.temperature, g.top_p, g.top_k, g.dtype, options
    if g.decoder is None:
        return digest(*common)
    # Drivers import this module: torch comes in where a diffusion LM needs it.
    from unmask.decoding.registry import decoder_config

    return digest(*common, decoder_config(g.decoder), g.decoder["name"])


def _mask_token(recipe: Recipe, path: Path, tokenizer: Any) -> int:
    """The id that no prompt may hold: a diffusion teacher's own, or the draft's to be."""
    if recipe.generate.decoder is not None:
        from unmask.models import families

        if (mask := families.read(path).mask_id) is not None:
            return mask
    mask = recipe.draft.mask_token_id
    return unused_special_token(tokenizer) if mask is None else mask


def _build_engine(recipe: Recipe, path: Path, factory: Callable[..., Engine] | None) -> Engine:
    config = recipe.generate
    on_gpu = config.gpus_per_actor > 0
    if config.decoder is None:
        arguments = engine_arguments(recipe.target, path, dtype=config.dtype, on_gpu=on_gpu)
        return (factory or OfflineEngine)(arguments, on_gpu=on_gpu)
    from engines.diffusion_engine import OfflineDiffusionEngine, diffusion_arguments

    arguments = diffusion_arguments(recipe.target, path, config.decoder, dtype=config.dtype)
    return (factory or OfflineDiffusionEngine)(arguments, on_gpu=on_gpu)


def _end_process(error: EngineDiedError) -> NoReturn:
    """Ray restarts an actor whose process ends, but not one that raises; an engine that failed cannot go on."""
    logger.error("%s; this actor ends and is started anew", error, exc_info=error.__cause__)
    logging.shutdown()
    os._exit(1)
