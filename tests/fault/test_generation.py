"""F12: generation whose actors, driver, nodes or disk go; every row once, equal to the undisturbed run's."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fault.generation_job import (
    ACTOR,
    ROLE,
    ROWS_PER_SHARD,
    Check,
    Event,
    each_row_once,
    generation,
    note_shards,
    prompts,
    rows_as,
    some_shards,
    unfinished,
)
from tests.fault.job import (
    Job,
    all_gone,
    exit_codes,
    finish,
    kill_driver,
    kill_one,
    note_processes,
    one_gone,
    start,
    stop_driver,
)
from tests.fault.nodes import Nodes
from tests.fault.record import Finding, conclude, equal
from tests.fault.scenario import ours, wait_until
from tests.fault.small_disk import SAID, SmallDisk
from tests.fault.trial import Trial
from unmask.trajectories import read_quarantine, read_trajectories
from unmask.types import Trajectory

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def death(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that one engine dies of when it comes."""
    return tmp_path_factory.mktemp("engines") / "die"


@pytest.fixture(scope="module")
def nodes(death: Path) -> Iterator[Nodes]:
    nodes = Nodes(ROLE, 3, NULL_ENGINE_SECONDS="0.01", NULL_ENGINE_DIES=str(death))
    yield nodes
    nodes.shutdown()


def kill_node(nodes: Nodes, chance: random.Random) -> Event:
    """Event: SIGKILL of the raylet of a node that generates; another node comes. What is finished then is noted."""

    def strike(job: Job) -> None:
        actors = ours(ACTOR)
        note_shards(job)
        nodes.replace_one(actors, chance)

    return strike


def kill_engine(death: Path) -> Event:
    """Event: an engine dies, in an actor that lives."""

    def strike(_: Job) -> None:
        death.touch()
        wait_until(lambda: not death.exists(), 30, every_s=0.02)

    return strike


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
    # A quarter is left: what is finished grows while it is looked at.
    shards = chance.randrange(1, 3 * rows // ROWS_PER_SHARD // 4)
    strike = {
        "actor": [kill_one(ACTOR, chance), note_shards],
        "driver": [kill_driver, note_shards, all_gone(ACTOR), start],
        "node": [kill_node(nodes, chance)],
    }[victim]
    job = generation(tmp_path, nodes.address, prompts(rows))
    codes = exit_codes([-9, 0] if victim == "driver" else [0])
    trial = Trial(
        events=[start, some_shards(shards), *strike, finish],
        checks=[codes, unfinished(rows), each_row_once(rows), rows_as(undisturbed)],
    )
    findings = trial.play(job)
    scale = f"after {job.noted['shards']} shards"
    conclude("F12", f"SIGKILL of the {victim}, run {seed} of {rows} rows", scale, findings)


@pytest.mark.slow
@pytest.mark.parametrize("undisturbed", [300], indirect=True)
def test_an_engine_dies_and_its_actor_lives(
    nodes: Nodes, death: Path, undisturbed: dict[int, Trajectory], tmp_path: Path
) -> None:
    strike = [note_processes(ACTOR), kill_engine(death), note_shards, one_gone(ACTOR)]
    trial = Trial(
        events=[start, some_shards(5), *strike, finish],
        checks=[exit_codes([0]), unfinished(300), each_row_once(300), rows_as(undisturbed)],
    )
    job = generation(tmp_path, nodes.address, prompts(300))
    findings = trial.play(job)
    conclude("F12", "the engine dies, its actor lives", f"300 rows, after {job.noted['shards']} shards", findings)


def one_line_about_the_stop(job: Job) -> list[Finding]:
    """Check: the driver that was stopped says so once, and what to do."""
    lines = job.said(0).splitlines()
    said = [line for line in lines if "stopped; run the same command again" in line or "SIGTERM" in line]
    return [equal("lines about the stop", len(said), 1)]


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
@pytest.mark.parametrize("undisturbed", [39], indirect=True)
def test_a_deadly_prompt_is_quarantined(nodes: Nodes, undisturbed: dict[int, Trajectory], tmp_path: Path) -> None:
    deadly = "kill " * 70
    of_good = [each_row_once(39), rows_as(undisturbed)]
    trial = Trial(
        events=[start, finish],
        checks=[exit_codes([0]), *of_good, quarantined(39, "the engine died 2 times on this row")],
    )
    job = generation(tmp_path, nodes.address, [*prompts(39), deadly], max_attempts=2)
    conclude("F12", "a prompt ends the engine every time", "40 rows", trial.play(job))


def test_a_job_is_ended_though_an_event_fails(tmp_path: Path) -> None:
    script = tmp_path / "sleep.py"
    script.write_text("import time; time.sleep(600)")
    job = Job(module="cProfile", recipe=script, run_dir=tmp_path, address="")
    started = []

    def fail(job: Job) -> None:
        started.append(job.driver)
        raise AssertionError("on purpose")

    with pytest.raises(AssertionError, match="on purpose"):
        Trial(events=[start, fail], checks=[]).play(job)
    assert started[0].poll() == -9


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
