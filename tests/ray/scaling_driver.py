"""Drivers that `test_autoscaling.py` runs on its fake cluster: `python -m tests.ray.scaling_driver STAGE FOLDER`.

They print one JSON object: when which node types came and went.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import threading
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import serve

from actors.cluster import connect
from engines.offline_engine import Completion
from pipelines.generate import generate
from serve_app.settings import AppConfig, draft_options, target_options
from tests.cluster_tools import wait_until
from unmask.config import ServeConfig
from unmask.recipe import load_recipe
from unmask.types import SamplingOptions

UP_S, GONE_S = 30, 60


class PatientEngine:
    """Answers every prompt after as many seconds as it may have tokens, and leaves a file that says that it did."""

    def __init__(self, arguments: dict[str, Any], *, on_gpu: bool = False, folder: Path) -> None:
        assert on_gpu
        self._file = folder / f"engine-{os.getpid()}"

    def submit(self, prompt_ids: tuple[int, ...], options: SamplingOptions) -> Future[Completion]:
        self._file.touch()
        future: Future[Completion] = Future()
        threading.Timer(options.max_tokens, lambda: future.set_result(Completion([prompt_ids[0]], "length"))).start()
        return future


class Nodes:
    """Counts live nodes by role, and remembers the most that there were of each."""

    def __init__(self) -> None:
        self.most: Counter[str] = Counter()
        threading.Thread(target=self._watch, daemon=True).start()

    def now(self) -> dict[str, int]:
        """Live nodes by role, the head left out."""
        labels = [node["Labels"].get("role") for node in ray.nodes() if node["Alive"]]
        return dict(Counter(role for role in labels if role))

    def wait(self, roles: dict[str, int], seconds: float) -> float:
        """Seconds until there are these nodes and no others."""
        start = time.monotonic()
        wait_until(lambda: self.now() == roles, seconds)
        return time.monotonic() - start

    def _watch(self) -> None:
        while True:
            self.most |= Counter(self.now())
            time.sleep(0.3)


def run_generation(folder: Path) -> dict[str, Any]:
    """A generation on a cluster that has no node for its actors."""
    nodes, up = Nodes(), threading.Event()
    came: list[float] = []
    recipe = load_recipe(folder / "recipe.yaml")

    def watch() -> None:
        came.append(nodes.wait({"generate": recipe.generate.min_actors}, 4 * UP_S))
        up.set()

    threading.Thread(target=watch, daemon=True).start()
    report = generate(recipe, Path(recipe.run_dir), engine_factory=partial(PatientEngine, folder=folder))
    assert up.wait(5), nodes.most
    engines = len(list(folder.glob("engine-*")))
    return {
        "rows": report.rows,
        "engines": engines,
        "up_s": came[0],
        "gone_s": nodes.wait({}, GONE_S),
        "most": dict(nodes.most),
    }


class StandIn:
    """A replica under the options of the real one; its load is what a file says."""

    def __init__(self, load: Path) -> None:
        self.load = load

    async def generate(self) -> None:
        """A request."""
        await asyncio.sleep(1)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve."""
        return {"busy": float(self.load.read_text()), "tokens_per_second": 0.0}


class Front:
    """Holds the handles, as the ingress does."""

    def __init__(self, target: Any, draft: Any) -> None:
        self.target, self.draft = target, draft

    async def ask(self, requests: int) -> None:
        """Requests at the same time."""
        await asyncio.gather(*(self.target.generate.remote() for _ in range(requests)))


def run_service(folder: Path) -> dict[str, Any]:
    """Target and draft deployments that come, grow and shrink apart, and go."""
    nodes, load = Nodes(), folder / "load"
    load.write_text("0.6")
    config = AppConfig(
        serve=ServeConfig(
            max_num_seqs=2,
            target_gpus=1,
            max_target_replicas=2,
            target_labels={"role": "serve-target"},
            draft_gpus=1,
            max_draft_replicas=2,
            draft_labels={"role": "serve-draft"},
            scale_up_after_s=1,
            scale_down_after_s=2,
        )
    )
    times: dict[str, float] = {}
    first = {"serve-target": 1, "serve-draft": 1}
    serve.start()
    coming = ThreadPoolExecutor().submit(nodes.wait, first, 4 * UP_S)
    target = serve.deployment(name="Target", **target_options(config))(StandIn).bind(load)
    draft = serve.deployment(name="Draft", **draft_options(config))(StandIn).bind(load)
    front = serve.run(serve.deployment(ray_actor_options={"num_cpus": 0})(Front).bind(target, draft), name="pairing")
    times["up_s"] = coming.result()

    loading = threading.Event()
    thread = threading.Thread(target=_keep_asking, args=(front, loading))
    thread.start()
    try:
        times["target_up_s"] = nodes.wait({"serve-target": 2, "serve-draft": 1}, UP_S)
    finally:
        loading.set()
        thread.join()
    times["target_gone_s"] = nodes.wait(first, GONE_S)

    load.write_text("0.95")
    times["draft_up_s"] = nodes.wait({"serve-target": 1, "serve-draft": 2}, UP_S)
    load.write_text("0.1")
    times["draft_gone_s"] = nodes.wait(first, GONE_S)

    serve.delete("pairing")
    times["gone_s"] = nodes.wait({}, GONE_S)
    return times | {"most": dict(nodes.most)}


def _keep_asking(front: Any, ended: threading.Event) -> None:
    while not ended.is_set():
        front.ask.remote(8).result()


def main() -> None:
    """Run one stage on the cluster that `RAY_ADDRESS` names."""
    logging.basicConfig(level=logging.INFO)
    connect()
    stages = {"generation": run_generation, "service": run_service}
    print(json.dumps(stages[sys.argv[1]](Path(sys.argv[2]))))  # noqa: T201


if __name__ == "__main__":
    main()
