"""Generation by an engine of no model, for a `Trial`: what is finished, and whether it is as without a fault."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import yaml

from tests.fault.job import Job
from tests.fault.record import Finding, equal
from unmask.manifest import shard_sizes
from unmask.trajectories import read_trajectories
from unmask.types import Trajectory

ROLE, ACTOR = "generate", "MapWorker"
ROWS_PER_SHARD = 10

Event = Callable[[Job], None]
Check = Callable[[Job], list[Finding]]


def prompts(count: int) -> list[str]:
    return [f"Name {n} animals." for n in range(count)]


def generation(folder: Path, address: str, prompts: list[str], run_dir: Path | None = None, **generate: object) -> Job:
    """A generation that has not begun."""
    folder.mkdir(parents=True, exist_ok=True)
    source, recipe = folder / "prompts.jsonl", folder / "recipe.yaml"
    source.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    options = {
        "max_new_tokens": 8,
        "temperature": 0.8,
        "rows_per_shard": ROWS_PER_SHARD,
        "min_actors": 2,
        "max_actors": 2,
        "labels": {"role": ROLE},
        **generate,
    }
    run_dir = run_dir or folder / "run"
    tree = {
        "run_dir": str(run_dir),
        "target": {"max_model_len": 128, "engine": {"max_num_seqs": 4}},
        "prompts": {"source": str(source)},
        "generate": options,
    }
    recipe.write_text(yaml.safe_dump(tree))
    return Job(module="tests.fault.null_generation", recipe=recipe, run_dir=run_dir, address=address)


def finished_shards(job: Job) -> int:
    return len(shard_sizes(job.run_dir / "trajectories"))


def note_shards(job: Job) -> None:
    """Event: how many shards are finished is noted."""
    job.noted["shards"] = finished_shards(job)


def some_shards(count: int) -> Event:
    """Event: so many shards are finished, and others are not."""

    def reach(job: Job) -> None:
        job.wait_for(lambda: finished_shards(job) >= count, 120)
        note_shards(job)

    return reach


def each_row_once(count: int) -> Check:
    """Check: the rows of every prompt are there, each exactly once."""

    def check(job: Job) -> list[Finding]:
        rows = list(read_trajectories(job.run_dir))
        ids = {row.sample_id for row in rows}
        return [
            equal("ids, each once", len(rows) if len(rows) == len(ids) else f"{len(rows)} rows of {len(ids)}", count),
            equal(f"rows 0 to {count - 1}", sorted(row.meta["index"] for row in rows) == list(range(count)), True),
        ]

    return check


def rows_as(undisturbed: dict[int, Trajectory]) -> Check:
    """Check: each row is the undisturbed run's."""

    def check(job: Job) -> list[Finding]:
        differing = sum(row != undisturbed[row.meta["index"]] for row in read_trajectories(job.run_dir))
        return [equal("rows that differ from the undisturbed run", differing, 0)]

    return check


def unfinished(rows: int) -> Check:
    """Check: it was struck or stopped before its end."""
    return lambda job: [equal("unfinished", job.noted["shards"] < rows // ROWS_PER_SHARD, True)]
