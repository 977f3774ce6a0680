from __future__ import annotations

from serve_app.backend import ReplicaReport
from serve_app.directory import EXPIRY_S, MAX_CONTEXTS, SECRET_AFTER_S, DraftEndpoint, LinkState, Registry

FIRST = "/drafts/first"


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def note_draft(registry: Registry, name: str) -> None:
    registry.note_draft(
        ReplicaReport(role="draft", replica=name, pids=(1,)), DraftEndpoint(address=f"{name}:1", version=1, pid=1)
    )


def note_target(registry: Registry, name: str, address: str | None = None, *, connected: bool = False) -> str | None:
    """The address that the target is given as its own."""
    return next(iter(note_sharing(registry, name, address, connected=connected)), None)


def note_sharing(registry: Registry, name: str, address: str | None = None, *, connected: bool = False) -> list[str]:
    """All addresses that the target is given."""
    report = ReplicaReport(role="target", replica=name, pids=(2,))
    endpoints = registry.note_target(report, LinkState(address=address, connected=connected))
    return [endpoint.address for endpoint in endpoints]


def test_there_may_be_no_draft():
    assert note_target(Registry(), "t") is None


def test_targets_spread_over_the_drafts():
    registry = Registry()
    for name in "abc":
        note_draft(registry, name)
    given = [note_target(registry, f"t{i}") for i in range(6)]
    assert sorted(given) == ["a:1", "a:1", "b:1", "b:1", "c:1", "c:1"]


def test_drafts_that_are_nobodys_own_are_shared_out():
    clock = Clock()
    registry = Registry(clock)
    for name in "abcde":
        note_draft(registry, name)
    # It may have been restarted: others may own them.
    assert note_sharing(registry, "t") == ["a:1"]
    clock.now = EXPIRY_S
    for name in "abcde":
        note_draft(registry, name)
    assert note_sharing(registry, "t", "a:1", connected=True) == ["a:1", "b:1", "c:1", "d:1", "e:1"]
    # Of a second target one is its own, and it has its share of the rest.
    for _ in range(2):
        given = {
            "t": note_sharing(registry, "t", "a:1", connected=True),
            "u": note_sharing(registry, "u", "b:1", connected=True),
        }
    assert given == {"t": ["a:1", "c:1", "e:1"], "u": ["b:1", "d:1"]}


def test_a_target_keeps_a_draft_that_works():
    registry = Registry()
    note_draft(registry, "a")
    assert note_target(registry, "t", "a:1", connected=True) == "a:1"
    note_draft(registry, "b")
    assert note_target(registry, "u", "b:1", connected=True) == "b:1"
    for _ in range(3):
        assert note_target(registry, "t", "a:1", connected=True) == "a:1"


def test_an_added_draft_takes_over_its_share_of_the_targets_and_then_nothing_moves():
    registry = Registry()
    note_draft(registry, "a")
    given = {f"t{i}": "a:1" for i in range(6)}
    for name, address in given.items():
        note_target(registry, name, address, connected=True)
    note_draft(registry, "b")
    for _ in range(3):
        given = {name: note_target(registry, name, address, connected=True) for name, address in given.items()}
    assert sorted(given.values()) == ["a:1"] * 3 + ["b:1"] * 3
    assert given == {name: note_target(registry, name, address, connected=True) for name, address in given.items()}


def test_a_target_does_not_leave_a_draft_that_works_for_one_that_it_could_not_reach():
    registry = Registry()
    note_draft(registry, "a")
    note_draft(registry, "b")
    assert note_target(registry, "u", "a:1", connected=True) == "a:1"
    assert note_target(registry, "t", "b:1") == "a:1"
    assert note_target(registry, "t", "a:1", connected=True) == "a:1"


def test_a_target_that_cannot_reach_its_draft_is_given_another_if_there_is_one():
    registry = Registry()
    note_draft(registry, "a")
    assert note_target(registry, "t", "a:1") == "a:1"
    note_draft(registry, "b")
    assert note_target(registry, "t", "a:1") == "b:1"


def test_the_wanted_draft_outlives_the_directory():
    registry = Registry()
    assert registry.agree_on_draft(FIRST, None) is None
    registry.want_draft("/drafts/2")
    assert registry.agree_on_draft(FIRST, None) == registry.agree_on_draft(FIRST, "/drafts/1") == "/drafts/2"
    restarted = Registry()
    assert restarted.agree_on_draft(FIRST, "/drafts/2") == "/drafts/2", "a replica that has swapped it in says so"
    assert restarted.agree_on_draft(FIRST, None) == "/drafts/2"


def test_a_refused_draft_gives_way_to_the_last_good_one():
    registry = Registry()
    registry.agree_on_draft(FIRST, None)
    registry.want_draft("/drafts/2")
    registry.agree_on_draft(FIRST, "/drafts/2")
    registry.want_draft("/drafts/bad")
    assert registry.agree_on_draft(FIRST, "/drafts/2") == "/drafts/bad"
    registry.refuse_draft("/drafts/bad")
    assert registry.agree_on_draft(FIRST, None) == "/drafts/2", "a restarted replica serves what the others serve"
    registry.refuse_draft("/drafts/other")
    assert registry.agree_on_draft(FIRST, None) == "/drafts/2"


def test_a_new_deployment_serves_its_own_draft():
    registry = Registry()
    registry.agree_on_draft(FIRST, None)
    registry.want_draft("/drafts/2")
    registry.agree_on_draft(FIRST, "/drafts/2")
    assert registry.agree_on_draft("/drafts/new", None) is None
    assert registry.agree_on_draft(FIRST, "/drafts/2") == "/drafts/2", "old replicas go on until they are gone"
    assert registry.agree_on_draft("/drafts/new", None) is None


def test_trace_contexts_are_bounded_and_the_newest_kept():
    registry = Registry()
    registry.note_contexts({number: f"c{number}" for number in range(MAX_CONTEXTS)})
    registry.note_contexts({MAX_CONTEXTS: "newest"})
    assert registry.contexts_of([0, 1, MAX_CONTEXTS, 10**9]) == {1: "c1", MAX_CONTEXTS: "newest"}


def test_silent_replicas_are_forgotten():
    clock = Clock()
    registry = Registry(clock)
    note_draft(registry, "a")
    note_target(registry, "t")
    clock.now = EXPIRY_S - 1
    note_draft(registry, "b")
    assert {report.replica for report in registry.reports()} == {"a", "t", "b"}
    clock.now = EXPIRY_S + 1
    assert {report.replica for report in registry.reports()} == {"b"}
    assert note_target(registry, "t", "a:1", connected=True) == "b:1"


def test_a_restarted_directory_takes_the_secret_of_the_first_replica_that_speaks():
    clock = Clock()
    first = Registry(clock)
    assert first.agree_on_secret(None) is None, "somebody may have one"
    clock.now = SECRET_AFTER_S
    secret = first.agree_on_secret(None)
    assert len(secret) == 64
    assert first.agree_on_secret(None) == secret
    assert first.agree_on_secret("another") == secret
    assert Registry().agree_on_secret(secret) == secret
