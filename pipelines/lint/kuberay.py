"""KubeRay objects (`ray.io/v1`, as of KubeRay 1.7): RayCluster, RayJob and RayService."""

from __future__ import annotations

import math
import shlex
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from pipelines.lint.document import Cluster, Document, config_error, require_mapping
from pipelines.lint.kubernetes import (
    DisruptionBudget,
    Labels,
    Metadata,
    NetworkPolicy,
    PodTemplate,
    Quantity,
    Resources,
    Shape,
    amount,
)
from pipelines.lint.serve_file import read_serve_file
from unmask.errors import ConfigError, nearest
from unmask.placement import NodeType

_GPU = "nvidia.com/gpu"

Count = Annotated[int, Field(ge=0)]


def _require_one_source(group: HeadGroup | WorkerGroup) -> None:
    """KubeRay refuses resources that are given twice."""
    twice = {"num-cpus", "num-gpus", "memory", "resources"} & group.rayStartParams.keys()
    if group.resources and twice:
        raise ValueError(f"gives 'resources' and rayStartParams '{min(twice)}'; KubeRay takes one of them")


class AutoscalerOptions(Shape):
    """AutoscalerOptions; version 1 ignores labels."""

    version: Literal["v2"]
    upscalingMode: Literal["Default", "Aggressive", "Conservative"] = "Default"
    idleTimeoutSeconds: Count = 60
    resources: Resources | None = None
    env: list[dict[str, Any]] = Field(default_factory=list)


class AuthOptions(Shape):
    """AuthOptions; without the token anybody who reaches a pod runs code in it."""

    mode: Literal["token"]


class HeadGroup(Shape):
    """HeadGroupSpec."""

    labels: Labels = Field(default_factory=dict)
    resources: dict[str, Quantity] = Field(default_factory=dict)
    rayStartParams: Labels = Field(default_factory=dict)
    serviceType: Literal["ClusterIP"] = "ClusterIP"
    template: PodTemplate

    @model_validator(mode="after")
    def _said_once(self) -> HeadGroup:
        _require_one_source(self)
        return self


class WorkerGroup(Shape):
    """WorkerGroupSpec."""

    groupName: str
    replicas: Count = 0
    minReplicas: Count
    maxReplicas: Count
    idleTimeoutSeconds: Count | None = None
    labels: Labels = Field(default_factory=dict)
    resources: dict[str, Quantity] = Field(default_factory=dict)
    rayStartParams: Labels = Field(default_factory=dict)
    template: PodTemplate

    @model_validator(mode="after")
    def _said_once(self) -> WorkerGroup:
        _require_one_source(self)
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


class ClusterSpec(Shape):
    """RayClusterSpec."""

    rayVersion: str
    enableInTreeAutoscaling: Literal[True]
    authOptions: AuthOptions
    autoscalerOptions: AutoscalerOptions
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup] = Field(min_length=1)
    gcsFaultToleranceOptions: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _names_differ(self) -> ClusterSpec:
        names = [group.groupName for group in self.workerGroupSpecs]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two groups are named '{twice[0]}'")
        return self

    def nodes(self) -> list[NodeType]:
        """What head and groups offer to Ray."""
        head = self.headGroupSpec
        return [
            NodeType(name="head", resources=_offered(head), labels=head.labels),
            *(
                NodeType(name=group.groupName, resources=_offered(group), labels=group.labels, most=group.maxReplicas)
                for group in self.workerGroupSpecs
            ),
        ]


class RayCluster(Shape):
    """RayCluster."""

    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayCluster"]
    metadata: Metadata
    spec: ClusterSpec


class RayJobSpec(Shape):
    """RayJobSpec."""

    entrypoint: str
    runtimeEnvYAML: str | None = None
    submissionMode: Literal["K8sJobMode", "HTTPMode", "SidecarMode"] = "K8sJobMode"
    submitterPodTemplate: PodTemplate | None = None
    shutdownAfterJobFinishes: bool = False
    ttlSecondsAfterFinished: Count = 0
    activeDeadlineSeconds: Annotated[int, Field(gt=0)] | None = None
    backoffLimit: Count = 0
    entrypointNumCpus: float = 0
    rayClusterSpec: ClusterSpec


class RayJob(Shape):
    """RayJob."""

    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: RayJobSpec


class RayServiceSpec(Shape):
    """RayServiceSpec."""

    serveConfigV2: str
    excludeHeadPodFromServeSvc: bool = False
    upgradeStrategy: dict[str, Any] | None = None
    rayClusterConfig: ClusterSpec


class RayService(Shape):
    """RayService."""

    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayService"]
    metadata: Metadata
    spec: RayServiceSpec


_KINDS: dict[str, type[BaseModel]] = {
    "NetworkPolicy": NetworkPolicy,
    "PodDisruptionBudget": DisruptionBudget,
    "RayCluster": RayCluster,
    "RayJob": RayJob,
    "RayService": RayService,
}


def read_kubernetes(tree: dict[str, Any]) -> Document:
    """One Kubernetes object: the nodes of its cluster, and what its job or service asks for.

    Raises:
        ConfigError: an object that is not of the shape, or of a kind that we do not use.
    """
    kind = str(tree.get("kind"))
    if kind not in _KINDS:
        raise ConfigError(f"'{kind}' is none of {', '.join(sorted(_KINDS))}{nearest(kind, _KINDS)}", field="kind")
    try:
        checked = _KINDS[kind].model_validate(tree)
    except ValidationError as error:
        raise config_error(error) from None
    match checked:
        case RayCluster():
            return Document(kind=kind, cluster=Cluster(nodes=checked.spec.nodes()))
        case RayJob():
            cluster = Cluster(nodes=checked.spec.rayClusterSpec.nodes(), dedicated=True)
            return Document(kind=kind, cluster=cluster, recipes=[_command(checked.spec.entrypoint)])
        case RayService():
            served = read_serve_file(require_mapping(yaml.safe_load(checked.spec.serveConfigV2), "spec.serveConfigV2"))
            cluster = Cluster(nodes=checked.spec.rayClusterConfig.nodes(), dedicated=True)
            return Document(kind=kind, cluster=cluster, demands=served.demands)
    return Document(kind=kind)


def _command(entrypoint: str) -> str:
    """The recipe that a job's command runs, and its overrides behind it."""
    words = shlex.split(entrypoint)
    recipes = [word for word in words if word.endswith((".yaml", ".yml")) and "=" not in word]
    if not recipes:
        raise ConfigError("names no recipe", field="spec.entrypoint")
    return shlex.join([recipes[0], *(word for word in words[words.index(recipes[0]) + 1 :] if "=" in word)])


def _offered(group: HeadGroup | WorkerGroup) -> dict[str, float]:
    """Resources as KubeRay tells them to Ray: the group's list, its start parameters, or its container's limits."""
    limits = group.template.spec.containers[0].resources.limits
    offered = {"CPU": float(math.ceil(amount(limits.get("cpu", "0")))), "GPU": amount(limits.get(_GPU, "0"))}
    for parameter, name in (("num-cpus", "CPU"), ("num-gpus", "GPU")):
        if parameter in group.rayStartParams:
            offered[name] = float(group.rayStartParams[parameter])
    return offered | {name: amount(value) for name, value in group.resources.items()}
