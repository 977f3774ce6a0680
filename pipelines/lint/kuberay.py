"""KubeRay objects (`ray.io/v1`, as of KubeRay 1.7): RayCluster, RayJob and RayService."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator

from pipelines.lint.commands import commands_of
from pipelines.lint.document import Cluster, Document, config_error, require_mapping
from pipelines.lint.kubernetes import Count, DisruptionBudget, Labels, Metadata, Name, NetworkPolicy, Shape
from pipelines.lint.pods import ContainerSecurity, EnvVar, Mounts, PodTemplate, PullPolicy, Resources
from pipelines.lint.ray_groups import HeadGroup, WorkerGroup
from pipelines.lint.serve_file import read_serve_file
from unmask.errors import ConfigError, nearest
from unmask.placement import Demand, NodeType
from unmask.strict_yaml import parse_yaml


class AutoscalerOptions(Shape):
    """AutoscalerOptions; version 1 ignores labels."""

    version: Literal["v2"]
    upscalingMode: Literal["Default", "Aggressive", "Conservative"] = "Default"
    idleTimeoutSeconds: Count = 60
    resources: Resources | None = None
    image: str | None = None
    imagePullPolicy: PullPolicy | None = None
    command: list[str] = Field(default_factory=list)
    args: list[str] = Field(default_factory=list)
    env: list[EnvVar] = Field(default_factory=list)
    envFrom: list[dict[str, Any]] = Field(default_factory=list)
    volumeMounts: Mounts = Field(default_factory=list)
    securityContext: ContainerSecurity | None = None

    @model_validator(mode="after")
    def _is_confined(self) -> AutoscalerOptions:
        if self.securityContext is None:
            raise ValueError("needs the securityContext of the containers: KubeRay adds the autoscaler's without one")
        return self


class AuthOptions(Shape):
    """AuthOptions; without the token anybody who reaches a pod runs code in it."""

    mode: Literal["token"]
    secretName: Name | None = None
    enableK8sTokenAuth: bool = False


class ClusterSpec(Shape):
    """RayClusterSpec."""

    rayVersion: str
    enableInTreeAutoscaling: Literal[True]
    authOptions: AuthOptions
    autoscalerOptions: AutoscalerOptions
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup] = Field(min_length=1)
    gcsFaultToleranceOptions: dict[str, Any] | None = None
    headServiceAnnotations: Labels = Field(default_factory=dict)
    historyServerOptions: dict[str, Any] | None = None
    managedBy: str | None = None
    networkPolicy: dict[str, Any] | None = None
    suspend: bool = False
    tlsOptions: dict[str, Any] | None = None
    upgradeStrategy: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _names_differ(self) -> ClusterSpec:
        names = [group.groupName for group in self.workerGroupSpecs]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two groups are named '{twice[0]}'")
        return self

    @model_validator(mode="after")
    def _autoscaler_mounts_volumes_of_the_head(self) -> ClusterSpec:
        self.headGroupSpec.template.spec.require_volumes(self.autoscalerOptions.volumeMounts)
        return self

    def nodes(self) -> list[NodeType]:
        """What head and groups offer to Ray."""
        return [group.node() for group in (self.headGroupSpec, *self.workerGroupSpecs)]


class RayCluster(Shape):
    """RayCluster."""

    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayCluster"]
    metadata: Metadata
    spec: ClusterSpec


class SubmitterConfig(Shape):
    """SubmitterConfig."""

    backoffLimit: Count = 2


Deletion = Literal["DeleteCluster", "DeleteWorkers", "DeleteSelf", "DeleteNone"]


class DeletionPolicy(Shape):
    """DeletionPolicy."""

    policy: Deletion


class DeletionCondition(Shape):
    """DeletionCondition."""

    jobStatus: Literal["SUCCEEDED", "FAILED"] | None = None
    jobDeploymentStatus: Literal["Failed"] | None = None
    ttlSeconds: Count = 0


class DeletionRule(DeletionPolicy):
    """DeletionRule."""

    condition: DeletionCondition


class DeletionStrategy(Shape):
    """DeletionStrategy."""

    onSuccess: DeletionPolicy | None = None
    onFailure: DeletionPolicy | None = None
    deletionRules: list[DeletionRule] = Field(default_factory=list)


class RayJobSpec(Shape):
    """RayJobSpec."""

    entrypoint: str
    entrypointNumCpus: Annotated[float, Field(ge=0)] = 0
    entrypointNumGpus: Annotated[float, Field(ge=0)] = 0
    entrypointResources: str = "{}"
    runtimeEnvYAML: str | None = None
    jobId: str | None = None
    metadata: Labels = Field(default_factory=dict)
    submissionMode: Literal["K8sJobMode", "HTTPMode", "SidecarMode"] = "K8sJobMode"
    submitterPodTemplate: PodTemplate | None = None
    submitterConfig: SubmitterConfig | None = None
    shutdownAfterJobFinishes: bool = False
    ttlSecondsAfterFinished: Count = 0
    deletionStrategy: DeletionStrategy | None = None
    activeDeadlineSeconds: Annotated[int, Field(gt=0)] | None = None
    preRunningDeadlineSeconds: Count | None = None
    backoffLimit: Count = 0
    managedBy: str | None = None
    suspend: bool = False
    clusterSelector: Labels | None = None
    rayClusterSpec: ClusterSpec | None = None

    @model_validator(mode="after")
    def _has_one_cluster(self) -> RayJobSpec:
        if (self.rayClusterSpec is None) == (self.clusterSelector is None):
            raise ValueError("needs either rayClusterSpec or clusterSelector")
        return self

    @model_validator(mode="after")
    def _submitter_ends(self) -> RayJobSpec:
        if self.submitterPodTemplate and self.submitterPodTemplate.spec.restartPolicy not in ("Never", "OnFailure"):
            raise ValueError(
                "submitterPodTemplate.spec.restartPolicy must be Never or OnFailure: pods of a Kubernetes Job may not "
                "restart for ever"
            )
        return self

    @model_validator(mode="after")
    def _is_deleted_in_one_way(self) -> RayJobSpec:
        if self.shutdownAfterJobFinishes and self.deletionStrategy and self.deletionStrategy.deletionRules:
            raise ValueError("KubeRay takes either deletionRules or shutdownAfterJobFinishes")
        return self

    def driver(self) -> Demand:
        """What the job's driver reserves, beside all that it starts."""
        resources = json.loads(self.entrypointResources)
        resources |= {"CPU": self.entrypointNumCpus, "GPU": self.entrypointNumGpus}
        return Demand(name="entrypoint", resources={name: taken for name, taken in resources.items() if taken})


class RayJob(Shape):
    """RayJob."""

    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: RayJobSpec


class RayServiceSpec(Shape):
    """RayServiceSpec."""

    serveConfigV2: str
    serveService: dict[str, Any] | None = None
    excludeHeadPodFromServeSvc: bool = False
    rayClusterDeletionDelaySeconds: Count | None = None
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
            return _read_job(checked.spec)
        case RayService():
            served = read_serve_file(_mapping_in(checked.spec.serveConfigV2, "spec.serveConfigV2"))
            cluster = Cluster(nodes=checked.spec.rayClusterConfig.nodes(), dedicated=True)
            return Document(kind=kind, cluster=cluster, demands=served.demands)
    return Document(kind=kind)


def _read_job(job: RayJobSpec) -> Document:
    _check_runtime_env(job.runtimeEnvYAML)
    nodes = job.rayClusterSpec.nodes() if job.rayClusterSpec else None
    return Document(
        kind="RayJob",
        cluster=Cluster(nodes=nodes, dedicated=True) if nodes else None,
        commands=commands_of(job.entrypoint),
        beside=[job.driver()],
    )


def _check_runtime_env(text: str | None) -> None:
    """Ray only warns of a field that it does not know."""
    if text is None:
        return
    from ray.runtime_env import RuntimeEnv

    where = "spec.runtimeEnvYAML"
    tree = _mapping_in(text, where)
    known = {name for name in RuntimeEnv.known_fields if not name.startswith("_")}
    for name in tree:
        if name not in known:
            raise ConfigError(f"unknown key{nearest(str(name), known)}", field=f"{where}.{name}")


def _mapping_in(text: str, field: str) -> dict[str, Any]:
    trees = parse_yaml(text, field)
    if len(trees) != 1:
        raise ConfigError("must hold one YAML document", field=field)
    return require_mapping(trees[0], field)
