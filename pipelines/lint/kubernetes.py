"""Shapes that Kubernetes objects share, and the policies and budgets in `deploy/kuberay`.

Field names are Kubernetes' own. An unknown field is refused: the API server drops it, and what it was to do with it.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

from pipelines.lint.document import is_everywhere

_QUANTITY = r"^\d+(\.\d+)?([num]|[kMGTPE]|[KMGTPE]i|[eE]\d+)?$"

Quantity = Annotated[str, StringConstraints(pattern=_QUANTITY)]
"""Where KubeRay takes strings only."""
QuantityOrInt = Annotated[Quantity, BeforeValidator(lambda value: str(value) if type(value) is int else value)]
"""Where Kubernetes takes whole numbers, too."""
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$")]
Count = Annotated[int, Field(ge=0)]
Labels = dict[str, str]


class Shape(BaseModel):
    """An object whose fields are all known."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Metadata(Shape):
    """ObjectMeta, of an object that has a name."""

    name: Name
    namespace: Name | None = None
    labels: Labels = Field(default_factory=dict)
    annotations: Labels = Field(default_factory=dict)


class Selector(Shape):
    """LabelSelector."""

    matchLabels: Labels = Field(default_factory=dict)
    matchExpressions: list[dict[str, Any]] = Field(default_factory=list)


class IPBlock(Shape):
    """IPBlock."""

    cidr: str
    excluded: list[str] = Field(alias="except", default_factory=list)

    @model_validator(mode="after")
    def _is_of_somebody(self) -> IPBlock:
        if is_everywhere(self.cidr):
            raise ValueError(f"{self.cidr} is everybody; name the addresses that are meant")
        return self


class Peer(Shape):
    """NetworkPolicyPeer."""

    podSelector: Selector | None = None
    namespaceSelector: Selector | None = None
    ipBlock: IPBlock | None = None

    @model_validator(mode="after")
    def _names_somebody(self) -> Peer:
        if not self.model_fields_set:
            raise ValueError("an empty peer names nobody; Kubernetes refuses it")
        namespaces = self.namespaceSelector
        if namespaces is not None and not namespaces.matchLabels and not namespaces.matchExpressions:
            raise ValueError("an empty namespaceSelector admits every namespace; name its labels")
        return self


class Port(Shape):
    """NetworkPolicyPort."""

    protocol: Literal["TCP", "UDP", "SCTP"] = "TCP"
    port: int | str
    endPort: int | None = None


class Ingress(Shape):
    """NetworkPolicyIngressRule; one without peers would admit everybody."""

    peers: list[Peer] = Field(alias="from", min_length=1)
    ports: list[Port] = Field(default_factory=list)


class Egress(Shape):
    """NetworkPolicyEgressRule; one without peers would reach everybody."""

    to: list[Peer] = Field(min_length=1)
    ports: list[Port] = Field(default_factory=list)


class NetworkPolicySpec(Shape):
    """NetworkPolicySpec."""

    podSelector: Selector
    policyTypes: list[Literal["Ingress", "Egress"]] = Field(min_length=1)
    ingress: list[Ingress] = Field(default_factory=list)
    egress: list[Egress] = Field(default_factory=list)

    @model_validator(mode="after")
    def _rules_are_used(self) -> NetworkPolicySpec:
        for kind, rules in (("Ingress", self.ingress), ("Egress", self.egress)):
            if rules and kind not in self.policyTypes:
                raise ValueError(f"has {kind.lower()} rules, which do nothing: add {kind} to policyTypes")
        return self


class NetworkPolicy(Shape):
    """NetworkPolicy."""

    apiVersion: Literal["networking.k8s.io/v1"]
    kind: Literal["NetworkPolicy"]
    metadata: Metadata
    spec: NetworkPolicySpec


class DisruptionBudgetSpec(Shape):
    """PodDisruptionBudgetSpec."""

    selector: Selector
    minAvailable: Count | str | None = None
    maxUnavailable: Count | str | None = None

    @model_validator(mode="after")
    def _one_bound(self) -> DisruptionBudgetSpec:
        if (self.minAvailable is None) == (self.maxUnavailable is None):
            raise ValueError("needs either minAvailable or maxUnavailable")
        # The owner of the pods is a RayCluster, which has no scale subresource to take a share of.
        if not isinstance(self.minAvailable, int):
            raise ValueError("minAvailable must be a count: else Kubernetes lets no pod of a RayCluster go")
        return self


class DisruptionBudget(Shape):
    """PodDisruptionBudget."""

    apiVersion: Literal["policy/v1"]
    kind: Literal["PodDisruptionBudget"]
    metadata: Metadata
    spec: DisruptionBudgetSpec


_UNITS = {"n": 1e-9, "u": 1e-6, "m": 1e-3, "": 1.0, "k": 1e3} | {
    f"{letter}{binary}": (1024.0 if binary else 1000.0) ** power
    for power, letter in enumerate("KMGTPE", start=1)
    for binary in ("", "i")
}


def amount(quantity: str) -> float:
    """A Kubernetes quantity as a number."""
    if re.search(r"[eE]\d", quantity):
        return float(quantity)
    digits = quantity.rstrip("numkKMGTPEi")
    return float(digits) * _UNITS[quantity[len(digits) :]]
