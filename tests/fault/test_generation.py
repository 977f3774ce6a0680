"""F12: generation whose actors, driver, nodes or disk go; every row once, equal to the undisturbed run's."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from tests.fault.record import conclude, equal
from tests.fault.scenario import wait_until
from tests.private_ray import MARK
from unmask.manifest import shard_sizes
from unmask.trajectories import read_quarantine, read_trajectories
from unmask.types import Trajectory

pytestmark = pytest.mark.timeout(600)

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
ROWS_PER_SHARD = 10


class TestCluster:
    """Nodes of a Ray cluster on this machine, each with its own raylet."""

    __test__ = False

    def __init__(self) -> None:
        os.environ.update(ENVIRONMENT, NULL_ENGINE_SECONDS="0.01")
        os.environ[MARK] = str(os.getpid())
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        self.address = self._cluster.address
        self._nodes = [self._add() for _ in range(2)]

    def _add(self):
        return self._cluster.add_node(num_cpus=3, labels={"role": "generate"})

    def actors(self) -> list[psutil.Process]:
        """Generation actors that run."""
        return [process for process in marked() if "MapWorker" in _name(process)]

    def kill_node(self, chance: random.Random) -> None:
        """SIGKILL the raylet of a node that has actors, and put another in its place."""
        raylets = {node.all_processes["raylet"][0].process.pid: node for node in self._nodes}
        busy = [actor.ppid() for actor in self.actors()]
        pid = chance.choice([pid for pid in busy if pid in raylets])
        os.kill(pid, signal.SIGKILL)
        self._cluster.remove_node(raylets[pid], allow_graceful=False)
        self._nodes.remove(raylets[pid])
        self._nodes.append(self._add())

    def shutdown(self) -> None:
        self._cluster.shutdown()


def marked() -> list[psutil.Process]:
    """Processes that this test has started, directly or through Ray."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == str(os.getpid()):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def _name(process: psutil.Process) -> str:
    try:
        return "".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


@pytest.fixture(scope="module")
def cluster() -> Iterator[TestCluster]:
    cluster = TestCluster()
    yield cluster
    cluster.shutdown()


def write_recipe(folder: Path, prompts: list[str], run_dir: Path | None = None, **generate: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "prompts.jsonl"
    source.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    options = {
        "max_new_tokens": 8,
        "temperature": 0.8,
        "rows_per_shard": ROWS_PER_SHARD,
        "min_actors": 2,
        "max_actors": 2,
        "labels": {"role": "generate"},
        **generate,
    }
    tree = {
        "run_dir": str(run_dir or folder / "run"),
        "target": {"max_model_len": 128, "engine": {"max_num_seqs": 4}},
        "prompts": {"source": str(source)},
        "generate": options,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def start(recipe: Path, address: str) -> subprocess.Popen[str]:
    """Start the driver of a generation."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.fault.null_generation", str(recipe)],
        env=os.environ | {"RAY_ADDRESS": address},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def finish(driver: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and last line of standard error."""
    _, errors = driver.communicate(timeout=240)
    return driver.returncode, (errors.strip().splitlines() or [""])[-1]


def rows_of(recipe: Path) -> dict[int, Trajectory]:
    """The trajectories by the number of their source row, each exactly once."""
    rows = list(read_trajectories(recipe.parent / "run"))
    by_row = {row.meta["index"]: row for row in rows}
    assert len(rows) == len(by_row) == len({row.sample_id for row in rows})
    return by_row


@pytest.fixture(scope="module")
def undisturbed(
    cluster: TestCluster, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> dict[int, Trajectory]:
    """Rows of an undisturbed run of as many rows as the test asks for."""
    recipe = write_recipe(tmp_path_factory.mktemp("whole"), [f"Name {n} animals." for n in range(request.param)])
    driver = start(recipe, cluster.address)
    assert finish(driver)[0] == 0
    rows = rows_of(recipe)
    assert sorted(rows) == list(range(request.param))
    return rows


def disturb(cluster: TestCluster, driver: subprocess.Popen[str], victim: str, chance: random.Random) -> None:
    """SIGKILL one of the parts that make the run."""
    if victim == "driver":
        driver.kill()
        driver.wait()
        wait_until(lambda: not cluster.actors(), 120)
    elif victim == "node":
        cluster.kill_node(chance)
    else:
        chance.choice(cluster.actors()).kill()


VICTIMS = ("actor", "driver", "node")


QUICK = [(300, VICTIMS.index("driver"))]
RUNS = [*QUICK, *(pytest.param(2000, seed, marks=pytest.mark.slow) for seed in range(20))]


@pytest.mark.parametrize(("undisturbed", "seed"), RUNS, indirect=["undisturbed"])
def test_every_row_once_and_as_undisturbed(
    cluster: TestCluster, undisturbed: dict[int, Trajectory], tmp_path: Path, seed: int
) -> None:
    chance, victim, rows = random.Random(seed), VICTIMS[seed % 3], len(undisturbed)
    recipe = write_recipe(tmp_path, [f"Name {n} animals." for n in range(rows)])
    directory = tmp_path / "run" / "trajectories"
    some_shards = chance.randrange(1, rows // ROWS_PER_SHARD - 6)
    driver = start(recipe, cluster.address)
    wait_until(lambda: len(shard_sizes(directory)) >= some_shards or driver.poll() is not None, 120)
    assert driver.poll() is None, "it ended before anything happened"
    before = len(shard_sizes(directory))
    disturb(cluster, driver, victim, chance)
    if victim == "driver":
        driver = start(recipe, cluster.address)
    code, line = finish(driver)
    assert code == 0, line
    found = rows_of(recipe)
    differing = sum(found[row] != undisturbed[row] for row in found)
    findings = [
        equal("ids, each once", len(found), rows),
        equal("rows that differ from the undisturbed run", differing, 0),
    ]
    conclude("F12", f"SIGKILL of the {victim}, run {seed} of {rows} rows", f"after {before} shards", findings)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["private", "joined"])
def test_sigterm_ends_in_order(cluster: TestCluster, tmp_path: Path, kind: str) -> None:
    address, labels = (cluster.address, {"role": "generate"}) if kind == "joined" else ("", {})
    recipe = write_recipe(tmp_path, [f"Name {n} animals." for n in range(200)], labels=labels)
    directory = tmp_path / "run" / "trajectories"
    driver = start(recipe, address)
    wait_until(lambda: len(shard_sizes(directory)) >= 2 or driver.poll() is not None, 120)
    assert driver.poll() is None, "it ended before anything happened"
    driver.send_signal(signal.SIGTERM)
    _, errors = driver.communicate(timeout=120)
    said = [line for line in errors.splitlines() if "stopped; run the same command again" in line or "SIGTERM" in line]
    finished = len(shard_sizes(directory))
    findings = [
        equal("exit code", driver.returncode, 130),
        equal("lines about the stop", len(said), 1),
        equal("unfinished", finished < 200 // ROWS_PER_SHARD, True),
    ]
    if kind == "joined":
        wait_until(lambda: not cluster.actors(), 60)
        code, line = finish(start(recipe, address))
        assert code == 0, line
        findings += [equal("rows 0 to 199 after the resume", sorted(rows_of(recipe)) == list(range(200)), True)]
    conclude("F12", f"SIGTERM to a driver with a {kind} cluster", f"200 rows, {finished} shards finished", findings)


@pytest.mark.slow
def test_a_deadly_prompt_is_quarantined(cluster: TestCluster, tmp_path: Path) -> None:
    deadly = "kill " * 70
    recipe = write_recipe(tmp_path, [*(f"Name {n} animals." for n in range(30)), deadly], max_attempts=2)
    code, line = finish(start(recipe, cluster.address))
    assert code == 0, line
    [row] = read_quarantine(tmp_path / "run")
    findings = [
        equal("rows", sorted(rows_of(recipe)), list(range(30))),
        equal("quarantined row", row.meta["index"], 30),
        equal("reason", row.error, "the engine died 2 times on this row"),
    ]
    conclude("F12", "a prompt ends the engine every time", "31 rows", findings)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte, and where it is mounted for a run."""
    store, path = tmp_path / "store", tmp_path / "disk"
    store.mkdir()
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(store)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a file system takes root")
    _mount(store, path)
    yield path
    for mount in (path, store):
        subprocess.run(["umount", "--lazy", str(mount)], check=True)


def fill(path: Path) -> None:
    """Write a file until the disk is full."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(512)):
            pass
    assert os.statvfs(path.parent).f_bfree == 0


def _mount(store: Path, path: Path) -> None:
    subprocess.run(["mount", "--bind", str(store), str(path)], check=True)


def _remount(path: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(path)], check=True)


def fail(disk: Path, fault: str) -> None:
    """Nothing can be written any more, or nothing of the store is there."""
    if fault == "full":
        fill(disk / "ballast")
    elif fault == "read-only":
        _remount(disk, "ro")
    else:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def mend(disk: Path, fault: str) -> None:
    """The store is as before."""
    if fault == "full":
        (disk / "ballast").unlink()
    elif fault == "read-only":
        _remount(disk, "rw")
    else:
        _mount(disk.parent / "store", disk)


SAID = {
    "full": "No space left on device",
    "read-only": "Read-only file system",
    "unreachable": "No such file or directory",
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", list(SAID))
def test_a_store_that_fails_loses_nothing(cluster: TestCluster, small_disk: Path, tmp_path: Path, fault: str) -> None:
    run_dir = small_disk / "run"
    recipe = write_recipe(tmp_path, [f"Name {n} animals." for n in range(300)], run_dir)
    directory = run_dir / "trajectories"
    driver = start(recipe, cluster.address)
    wait_until(lambda: len(shard_sizes(directory)) >= 5 or driver.poll() is not None, 120)
    fail(small_disk, fault)
    code, line = finish(driver)
    wait_until(lambda: not cluster.actors(), 120)
    mend(small_disk, fault)
    finished = {path.name: path.read_bytes() for path in (directory / "shards").glob("shard-*.parquet")}
    again, last = finish(start(recipe, cluster.address))
    assert again == 0, last
    by_row = {row.meta["index"]: row for row in read_trajectories(run_dir)}
    kept = sum((directory / "shards" / name).read_bytes() == content for name, content in finished.items())
    findings = [
        equal("exit code", code, 3),
        equal("one line that names the fault", (line.startswith("error: ") and SAID[fault] in line) or line, True),
        equal("finished shards kept", kept, len(finished)),
        equal("rows 0 to 299 after the resume", sorted(by_row) == list(range(300)), True),
    ]
    conclude("F12", f"the output store is {fault}", f"300 rows, {len(finished)} shards finished", findings)


def test_nothing_of_a_test_is_left(cluster: TestCluster) -> None:
    wait_until(lambda: not cluster.actors(), 60)
    deadline = time.monotonic() + 30
    while any("null_generation" in _name(process) for process in marked()):
        assert time.monotonic() < deadline, "a driver is left"
        time.sleep(0.5)
