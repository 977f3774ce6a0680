"""F12: generation whose actors, driver, nodes or disk go; every row once, equal to the undisturbed run's."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.fault.job import Job, all_gone, exit_codes, finish, kill_driver, kill_one, start, stop_driver
from tests.fault.nodes import Nodes
from tests.fault.record import Finding, conclude, equal
from tests.fault.scenario import ours, wait_until
from tests.fault.small_disk import SAID, SmallDisk
from tests.fault.trial import Trial
from unmask.manifest import shard_sizes
from unmask.trajectories import read_quarantine, read_trajectories
from unmask.types import Trajectory

pytestmark = pytest.mark.timeout(600)

ROLE, ACTOR = "generate", "MapWorker"
ROWS_PER_SHARD = 10

Event = Callable[[Job], None]
Check = Callable[[Job], list[Finding]]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    nodes = Nodes(ROLE, 3, NULL_ENGINE_SECONDS="0.01")
    yield nodes
    nodes.shutdown()


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


def kill_node(nodes: Nodes, chance: random.Random) -> Event:
    """Event: SIGKILL of the raylet of a node that generates; another node comes."""
    return lambda _: nodes.replace_one(ours(ACTOR), chance)


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


@pytest.fixture(scope="module")
def undisturbed(
    nodes: Nodes, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> dict[int, Trajectory]:
    """Rows of an undisturbed run of as many rows as the test asks for."""
    job = generation(tmp_path_factory.mktemp("whole"), nodes.address, prompts(request.param))
    whole = Trial(events=[start, finish], checks=[exit_codes([0]), each_row_once(request.param)])
    assert all(finding.met for finding in whole.play(job))
    return {row.meta["index"]: row for row in read_trajectories(job.run_dir)}


VICTIMS = ("actor", "driver", "node")


QUICK = [(300, VICTIMS.index("driver"))]
RUNS = [*QUICK, *(pytest.param(2000, seed, marks=pytest.mark.slow) for seed in range(20))]


@pytest.mark.parametrize(("undisturbed", "seed"), RUNS, indirect=["undisturbed"])
def test_every_row_once_and_as_undisturbed(
    nodes: Nodes, undisturbed: dict[int, Trajectory], tmp_path: Path, seed: int
) -> None:
    chance, victim, rows = random.Random(seed), VICTIMS[seed % 3], len(undisturbed)
    shards = chance.randrange(1, rows // ROWS_PER_SHARD - 6)
    strike = {
        "actor": [kill_one(ACTOR, chance)],
        "driver": [kill_driver, all_gone(ACTOR), start],
        "node": [kill_node(nodes, chance)],
    }[victim]
    job = generation(tmp_path, nodes.address, prompts(rows))
    trial = Trial(
        events=[start, some_shards(shards), *strike, finish],
        checks=[exit_codes([-9, 0] if victim == "driver" else [0]), each_row_once(rows), rows_as(undisturbed)],
    )
    findings = trial.play(job)
    scale = f"after {job.noted['shards']} shards"
    conclude("F12", f"SIGKILL of the {victim}, run {seed} of {rows} rows", scale, findings)


def one_line_about_the_stop(job: Job) -> list[Finding]:
    """Check: the driver that was stopped says so once, and what to do."""
    lines = job.said(0).splitlines()
    said = [line for line in lines if "stopped; run the same command again" in line or "SIGTERM" in line]
    return [equal("lines about the stop", len(said), 1)]


def unfinished(rows: int) -> Check:
    """Check: it was stopped before its end."""
    return lambda job: [equal("unfinished", job.noted["shards"] < rows // ROWS_PER_SHARD, True)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["private", "joined"])
def test_sigterm_ends_in_order(nodes: Nodes, tmp_path: Path, kind: str) -> None:
    address, labels = (nodes.address, {"role": ROLE}) if kind == "joined" else ("", {})
    job = generation(tmp_path, address, prompts(200), labels=labels)
    again, codes, rows = [], [130], []
    if kind == "joined":
        again, codes, rows = [all_gone(ACTOR, 60), start, finish], [130, 0], [each_row_once(200)]
    trial = Trial(
        events=[start, some_shards(2), stop_driver, finish, note_shards, *again],
        checks=[exit_codes(codes), one_line_about_the_stop, unfinished(200), *rows],
    )
    findings = trial.play(job)
    scale = f"200 rows, {job.noted['shards']} shards finished"
    conclude("F12", f"SIGTERM to a driver with a {kind} cluster", scale, findings)


def quarantined(index: int, reason: str) -> Check:
    """Check: this row, and no other, is set aside for this reason."""

    def check(job: Job) -> list[Finding]:
        rows = [(row.meta["index"], row.error) for row in read_quarantine(job.run_dir)]
        return [equal("quarantined rows", rows, [(index, reason)])]

    return check


@pytest.mark.slow
def test_a_deadly_prompt_is_quarantined(nodes: Nodes, tmp_path: Path) -> None:
    deadly = "kill " * 70
    trial = Trial(
        events=[start, finish],
        checks=[exit_codes([0]), each_row_once(30), quarantined(30, "the engine died 2 times on this row")],
    )
    job = generation(tmp_path, nodes.address, [*prompts(30), deadly], max_attempts=2)
    conclude("F12", "a prompt ends the engine every time", "31 rows", trial.play(job))


def break_store(disk: SmallDisk, fault: str) -> Event:
    """Event: the store fails under the job."""
    return lambda _: disk.fail(fault)


def mend_store(disk: SmallDisk, fault: str) -> Event:
    """Event: the store is as before; the shards that are finished are noted."""

    def restore(job: Job) -> None:
        disk.mend(fault)
        shards = (job.run_dir / "trajectories" / "shards").glob("shard-*.parquet")
        job.noted["finished"] = {path: path.read_bytes() for path in shards}

    return restore


def finished_shards_are_kept(job: Job) -> list[Finding]:
    """Check: nothing of what was finished before the fault has been written again."""
    finished = job.noted["finished"]
    kept = sum(path.read_bytes() == content for path, content in finished.items())
    return [equal("finished shards kept", kept, len(finished))]


def last_line_names(fault: str) -> Check:
    """Check: the driver that gave up ends with one line, which names the fault."""

    def check(job: Job) -> list[Finding]:
        line = (job.said(0).strip().splitlines() or [""])[-1]
        return [
            equal("one line that names the fault", (line.startswith("error: ") and SAID[fault] in line) or line, True)
        ]

    return check


@pytest.mark.slow
@pytest.mark.parametrize("fault", list(SAID))
def test_a_store_that_fails_loses_nothing(nodes: Nodes, small_disk: SmallDisk, tmp_path: Path, fault: str) -> None:
    job = generation(tmp_path, nodes.address, prompts(300), small_disk.path / "run")
    strike = [break_store(small_disk, fault), finish, all_gone(ACTOR), mend_store(small_disk, fault)]
    trial = Trial(
        events=[start, some_shards(5), *strike, start, finish],
        checks=[exit_codes([3, 0]), last_line_names(fault), finished_shards_are_kept, each_row_once(300)],
    )
    findings = trial.play(job)
    scale = f"300 rows, {len(job.noted['finished'])} shards finished"
    conclude("F12", f"the output store is {fault}", scale, findings)


def test_nothing_of_a_test_is_left(nodes: Nodes) -> None:
    wait_until(lambda: not ours(ACTOR), 60)
    wait_until(lambda: not ours("null_generation"), 30)
