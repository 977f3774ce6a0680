"""How many workers a training is given by the nodes that there are, and what ends its waiting for them."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray
from ray import cloudpickle
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import _AutoscalingCoordinatorActor
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, FixedScalingPolicy, NoopDecision
from ray.train.v2.api.config import ScalingConfig
from ray.train.v2.torch.torch_trainer import TorchTrainer

import actors.worker_policy
from actors.cluster_trainer import ClusterTrainer
from actors.stop_request import StoppedError, StopRequest
from actors.worker_policy import ElasticWorkers, FixedWorkers, worker_policy
from unmask.errors import ConfigError
from unmask.placement import Demand

DEMAND = Demand(name="distill", resources={"CPU": 2}, labels={"role": "train"}, least=1, most=3)


def node(role: str, cpus: int, *, alive: bool = True) -> dict:
    name = f"{role}-{cpus}"
    return {
        "NodeID": name,
        "NodeManagerAddress": name,
        "Alive": alive,
        "Resources": {"CPU": cpus},
        "Labels": {"role": role},
    }


def elastic(demand: Demand = DEMAND) -> ElasticScalingPolicy:
    return ElasticScalingPolicy(
        ScalingConfig(
            num_workers=(demand.least, demand.most),
            resources_per_worker=dict(demand.resources),
            label_selector=dict(demand.labels) or None,
        )
    )


def reserved(policy: ElasticScalingPolicy) -> dict:
    """What Ray reserves for a policy's workers on the nodes that there are."""
    coordinator = _AutoscalingCoordinatorActor(
        send_resources_request=lambda *_, **__: None, get_cluster_nodes=lambda: ray.nodes()
    )
    count = policy.scaling_config.max_workers
    coordinator.request_resources(
        "train",
        [policy.scaling_config.resources_per_worker] * count,
        180,
        label_selectors=policy.scaling_config._label_selector_per_worker(count),
    )
    return coordinator.get_reserved_resources("train")


@pytest.mark.parametrize(
    ("nodes", "room", "by_rays_own"),
    [
        ([node("train", 2), node("generate", 9)], 1, 3),
        ([node("generate", 9)], 0, 3),
        ([node("train", 2, alive=False), node("train", 5), node("generate", 1)], 2, 2),
        ([node("train", 99)], 3, 3),
    ],
)
def test_only_nodes_with_the_labels_count(
    nodes: list[dict], room: int, by_rays_own: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    given = elastic()
    assert given._count_possible_workers(reserved(given)) == by_rays_own
    policy = worker_policy(given, DEMAND, StopRequest(tmp_path))
    assert policy._count_possible_workers(reserved(given)) == room


def test_without_labels_rays_count_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: [node("any", 2), node("other", 3)])
    demand = Demand(name="distill", resources={"CPU": 2}, least=1, most=3)
    policy = worker_policy(elastic(demand), demand, StopRequest(tmp_path))
    assert policy._count_possible_workers({"any-2": {"CPU": 2}}) == 1


def test_a_decision_is_made_by_the_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []
    monkeypatch.setattr(actors.worker_policy.time, "sleep", waited.append)
    monkeypatch.setattr(ray, "nodes", lambda: [node("generate", 9)])
    policy = worker_policy(elastic(), DEMAND, StopRequest(tmp_path))
    monkeypatch.setattr(policy, "_maybe_send_resource_request", lambda: None)
    monkeypatch.setattr(policy, "_get_reserved_resources", lambda: {"generate-9": {"CPU": 6}})
    assert isinstance(policy.make_decision_for_non_running_worker_group(), NoopDecision)
    assert len(waited) == 1
    monkeypatch.setattr(ray, "nodes", lambda: [node("generate", 9), node("train", 4)])
    assert policy.make_decision_for_non_running_worker_group().num_workers == 2
    assert len(waited) == 1


@pytest.mark.parametrize("given", [elastic(), FixedScalingPolicy(ScalingConfig(num_workers=2))])
def test_a_stop_ends_the_waiting_for_workers(given: FixedScalingPolicy | ElasticScalingPolicy, tmp_path: Path) -> None:
    # The policy works in another process.
    policy = cloudpickle.loads(cloudpickle.dumps(worker_policy(given, DEMAND, StopRequest(tmp_path))))
    assert isinstance(policy, (FixedWorkers, ElasticWorkers))
    StopRequest(tmp_path).make()
    with pytest.raises(StoppedError):
        policy.make_decision_for_non_running_worker_group()


def test_another_ray_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = rf"Ray {ray.__version__} cannot train here: its '{{}}' .*install 'ray==2.60"
    monkeypatch.setattr(ElasticScalingPolicy, "_count_possible_workers", lambda self, nodes: 1)
    with pytest.raises(ConfigError, match=refused.format("ElasticScalingPolicy._count_possible_workers")):
        worker_policy(elastic(), DEMAND, StopRequest(tmp_path))
    monkeypatch.undo()

    class AnotherPolicy(ElasticScalingPolicy):
        pass

    with pytest.raises(ConfigError, match=refused.format("AnotherPolicy")):
        worker_policy(AnotherPolicy(elastic().scaling_config), DEMAND, StopRequest(tmp_path))
    monkeypatch.delattr("ray.train.v2.api.data_parallel_trainer.DataParallelTrainer._register_sigint_handler")
    with pytest.raises(ConfigError, match=refused.format("TorchTrainer._register_sigint_handler")):
        ClusterTrainer(print, demand=DEMAND, request=StopRequest(tmp_path))


def test_the_trainer_puts_the_policy_in_place_of_rays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = {}
    trainer = ClusterTrainer(
        print, demand=DEMAND, request=StopRequest(tmp_path), scaling_config=elastic().scaling_config
    )
    monkeypatch.setattr(
        TorchTrainer, "_initialize_and_run_controller", lambda self, **controller: started.update(controller)
    )
    trainer._initialize_and_run_controller(scaling_policy=elastic(), callbacks=[])
    assert type(started["scaling_policy"]) is ElasticWorkers
    assert started["callbacks"] == []
    trainer.abort()  # of a run that has not begun
