"""Groups of a KubeRay cluster, and what each of their pods offers to Ray."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, model_validator

from pipelines.lint.kubernetes import Count, Labels, Quantity, Shape, amount
from pipelines.lint.pods import PodTemplate
from unmask.placement import NodeType

ISOLATED = {"app.kubernetes.io/part-of": "unmask"}
"""Labels by which `networkpolicy.yaml` selects pods: whoever has none of them is reached by everybody."""

_PARAMETERS = {"num-cpus": "CPU", "num-gpus": "GPU", "memory": "memory"}
_OPEN = ("LoadBalancer", "NodePort")


class Group(Shape):
    """What HeadGroupSpec and WorkerGroupSpec have in common."""

    labels: Labels = Field(default_factory=dict)
    resources: dict[str, Quantity] = Field(default_factory=dict)
    rayStartParams: Labels = Field(default_factory=dict)
    template: PodTemplate

    @model_validator(mode="after")
    def _resources_are_said_once(self) -> Group:
        """KubeRay refuses resources that are given twice."""
        twice = {*_PARAMETERS, "resources"} & self.rayStartParams.keys()
        if self.resources and twice:
            raise ValueError(f"gives 'resources' and rayStartParams '{min(twice)}'; KubeRay takes one of them")
        return self

    @model_validator(mode="after")
    def _offers_what_its_container_has(self) -> Group:
        """KubeRay tells Ray what the group says; what its container has not got is missing at run time."""
        has = self._container()
        for name, given in self._given().items():
            if given > has.get(name, math.inf):
                raise ValueError(
                    f"offers {given:g} {name} to Ray, more than the {has[name]:g} of its container: raise the limits "
                    "of the container or offer less"
                )
        return self

    @model_validator(mode="after")
    def _is_isolated(self) -> Group:
        labels = self.template.metadata.labels | self.labels
        for name, value in ISOLATED.items():
            if labels.get(name) != value:
                raise ValueError(
                    f"its pods need the label {name}: {value} in template.metadata.labels, by which "
                    "networkpolicy.yaml selects them"
                )
        return self

    def offered(self) -> dict[str, float]:
        """Resources as KubeRay tells them to Ray: the group's, its start parameters', or its container's."""
        has = self._container()
        return {"CPU": has.get("CPU", 0.0), "GPU": has["GPU"]} | self._given()

    def _given(self) -> dict[str, float]:
        parameters = {_PARAMETERS[name]: value for name, value in self.rayStartParams.items() if name in _PARAMETERS}
        return {
            **{name: float(value) for name, value in parameters.items()},
            **{_ray_name(name): amount(value) for name, value in self.resources.items()},
        }

    def _container(self) -> dict[str, float]:
        """What Ray's container has, of what its resources say."""
        resources = self.template.spec.containers[0].resources
        limits = resources.limits
        has = {"GPU": sum(amount(value) for name, value in limits.items() if name.endswith("gpu"))}
        if cpus := limits.get("cpu") or resources.requests.get("cpu"):
            has["CPU"] = float(math.ceil(amount(cpus)))
        if memory := limits.get("memory"):
            has["memory"] = amount(memory)
        return has


def _ray_name(name: str) -> str:
    """Ray's name of a resource, whose case KubeRay does not mind."""
    if name.lower().endswith("gpu"):
        return "GPU"
    return {"cpu": "CPU", "memory": "memory"}.get(name.lower(), name)


class HeadGroup(Group):
    """HeadGroupSpec."""

    serviceType: Literal["ClusterIP"] = "ClusterIP"
    headService: dict[str, Any] | None = None
    # The ingress would lead to the dashboard.
    enableIngress: Literal[False] = False
    ingressOptions: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _service_is_inside(self) -> HeadGroup:
        kind = ((self.headService or {}).get("spec") or {}).get("type")
        if kind in _OPEN:
            raise ValueError(f"headService of type {kind} opens the head to others; use ClusterIP")
        return self

    def node(self) -> NodeType:
        """The one node that the head is."""
        return NodeType(name="head", resources=self.offered(), labels=self.labels)


class ScaleStrategy(Shape):
    """ScaleStrategy."""

    workersToDelete: list[str] = Field(default_factory=list)


class WorkerGroup(Group):
    """WorkerGroupSpec."""

    groupName: str
    replicas: Count = 0
    minReplicas: Count = 0
    maxReplicas: Count
    numOfHosts: int = Field(default=1, ge=1)
    idleTimeoutSeconds: Count | None = None
    priority: int = 0
    suspend: bool = False
    scaleStrategy: ScaleStrategy | None = None

    @model_validator(mode="after")
    def _is_not_restarted(self) -> WorkerGroup:
        if self.template.spec.restartPolicy not in (None, "Never"):
            raise ValueError(f"group '{self.groupName}': the autoscaler needs restartPolicy Never")
        return self

    @model_validator(mode="after")
    def _counts_agree(self) -> WorkerGroup:
        if not self.minReplicas <= self.replicas <= self.maxReplicas:
            raise ValueError(
                f"group '{self.groupName}': minReplicas = {self.minReplicas}, replicas = {self.replicas} and "
                f"maxReplicas = {self.maxReplicas} are not in order"
            )
        return self

    def node(self) -> NodeType:
        """Its pods as a type of node."""
        most = 0 if self.suspend else self.maxReplicas * self.numOfHosts
        return NodeType(name=self.groupName, resources=self.offered(), labels=self.labels, most=most)
