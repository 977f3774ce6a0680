"""How generation streams: synthetic rows through an engine that answers at once, so that only the line itself costs.

    python -m benchmarks.scale_rows 100000 1000000 --out benchmarks/results/scale_rows.json

Every row is staged, tokenised with the embedded target's chat template, answered with 32 tokens, written to a Parquet
shard and entered into the manifest, as with a real engine.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import threading
import time
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

from actors.cluster import connect
from benchmarks.demo import machine
from engines.offline_engine import Completion
from pipelines.generate import generate
from unmask.config import GenerateConfig, PromptsConfig, Recipe
from unmask.manifest import Manifest, ShardEntry
from unmask.types import SamplingOptions

RESPONSE_TOKENS = 32
SAMPLE_EVERY_S = 1.0


class NullEngine:
    """Answers every prompt at once with its first token, repeated."""

    def __init__(self, arguments: dict[str, Any], *, on_gpu: bool = False) -> None:
        self.arguments = arguments

    def submit(self, prompt_ids: tuple[int, ...], options: SamplingOptions) -> Future[Completion]:
        """See `actors.generator.Engine`."""
        future: Future[Completion] = Future()
        future.set_result(Completion([prompt_ids[0]] * RESPONSE_TOKENS, "length"))
        return future


class Watch:
    """Samples the driver's resident memory and the cluster's object store (MB each), and sees the first shard come."""

    def __init__(self, shards: Path) -> None:
        self.rss_mb: list[float] = []
        self.store_mb: list[float] = []
        self.first_shards: tuple[float, int] | None = None
        self._shards = shards
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._ended.wait(SAMPLE_EVERY_S):
            self.rss_mb.append(rss_mb())
            self.store_mb.append(store_mb())
            if self.first_shards is None and (done := len(list(self._shards.glob("*.parquet")))):
                self.first_shards = time.monotonic(), done


def rss_mb() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def store_mb() -> float:
    """Live objects in the object stores of all nodes."""
    import ray
    from ray._private.internal_api import node_stats

    nodes = [node_stats(node["NodeManagerAddress"], node["NodeManagerPort"]) for node in ray.nodes() if node["Alive"]]
    return sum(node.store_stats.object_store_bytes_used for node in nodes) / 1e6


def write_rows(path: Path, rows: int) -> None:
    """Prompts of the demo's kind, every one different."""
    with path.open("w") as file:
        for n in range(rows):
            prompt = f"A shop has {n} pens and sells {n % 97} of them. How many pens are left?"
            file.write(json.dumps({"prompt": prompt}) + "\n")


def measure(rows: int, folder: Path, base: Recipe) -> dict[str, Any]:
    """One generation from nothing; its figures."""
    source = folder / f"rows-{rows}.jsonl"
    write_rows(source, rows)
    recipe = replace(base, prompts=PromptsConfig(source=str(source)))
    run_dir = folder / f"run-{rows}"
    before = rss_mb()
    start = time.monotonic()
    with Watch(run_dir / "trajectories" / "shards") as watch:
        report = generate(recipe, run_dir, engine_factory=NullEngine)
    end = time.monotonic()
    assert report.rows == rows
    assert watch.first_shards is not None, "it ended before it could be watched; give more rows"
    first, done = watch.first_shards
    loading = time.monotonic()
    shards = len(Manifest.load(run_dir / "trajectories").entries)
    manifest_seconds = time.monotonic() - loading
    shutil.rmtree(run_dir)
    return {
        "rows": rows,
        "seconds": round(end - start, 1),
        "rows_per_second": round(rows / (end - start), 1),
        "startup_seconds": round(first - start, 1),
        "steady_rows_per_second": round((rows - done * base.generate.rows_per_shard) / (end - first), 1),
        "driver_rss_mb": round(max(watch.rss_mb), 1),
        "driver_rss_growth_mb": round(max(watch.rss_mb) - before, 1),
        "object_store_mb": round(max(watch.store_mb), 1),
        "shards": shards,
        "manifest_load_seconds": round(manifest_seconds, 3),
    }


def main() -> None:
    """Measure each size, smallest first, after a small warm-up run that pays for what is loaded once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=int, nargs="+")
    parser.add_argument("--rows-per-shard", type=int, default=1024)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    base = Recipe(
        generate=GenerateConfig(
            max_new_tokens=RESPONSE_TOKENS,
            rows_per_shard=arguments.rows_per_shard,
            min_actors=arguments.actors,
            max_actors=arguments.actors,
        )
    )
    connect(num_cpus=arguments.actors)
    with tempfile.TemporaryDirectory(prefix="scale-") as folder:
        measure(20 * arguments.rows_per_shard * arguments.actors, Path(folder), base)
        for rows in sorted(arguments.rows):
            figures = measure(rows, Path(folder), base) | {"rows_per_shard": arguments.rows_per_shard}
            print(json.dumps(figures), flush=True)
            if arguments.out:
                record(arguments.out, figures)
        manifest = million_shards(Path(folder))
        print(json.dumps(manifest))
        if arguments.out:
            record(arguments.out, None, manifest=manifest)


def million_shards(folder: Path) -> dict[str, float]:
    """What a manifest of a million shards costs."""
    manifest = Manifest(
        dict.fromkeys(
            range(1_000_000), ShardEntry(rows=1024, quarantined=0, tokens=1 << 18, size=1 << 20, sha256="ab" * 32)
        )
    )
    start = time.monotonic()
    manifest.save(folder)
    saved = time.monotonic()
    assert len(Manifest.load(folder).entries) == 1_000_000
    return {"save_seconds": round(saved - start, 1), "load_seconds": round(time.monotonic() - saved, 1)}


def record(path: Path, figures: dict[str, Any] | None, **more: Any) -> None:
    """Enter one size into the result file, replacing an earlier measurement of it."""
    tree = json.loads(path.read_text()) if path.is_file() else {"runs": []}
    runs = [run for run in tree["runs"] if figures is None or run["rows"] != figures["rows"]]
    runs += [] if figures is None else [figures]
    tree |= {"machine": machine(), "runs": sorted(runs, key=lambda run: run["rows"])} | more
    path.write_text(json.dumps(tree, indent=2) + "\n")


if __name__ == "__main__":
    main()
