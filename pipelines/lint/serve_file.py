"""Ray Serve config files (`serve deploy`, `serveConfigV2`)."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from pipelines.lint.document import Document, config_error
from unmask.errors import ConfigError
from unmask.placement import Demand, serve_demands

if TYPE_CHECKING:
    from ray.serve.schema import ServeApplicationSchema

BUILDER = "serve_app.app:build"

_PLACING = frozenset(
    {"num_replicas", "autoscaling_config", "ray_actor_options", "max_replicas_per_node", "gang_scheduling_config"}
    | {"placement_group_bundles", "placement_group_strategy", "placement_group_bundle_label_selector"}
    | {"deployment_actors"}
)
"""Options of a deployment that say how many replicas there are and what each takes: the arguments say so already."""


def read_serve_file(tree: dict[str, Any]) -> Document:
    """A Serve file and what its applications ask for, all at the same time.

    Raises:
        ConfigError: Serve's schema or the application's own arguments are broken.
    """
    # Imported here: Serve takes a second to import, which a recipe's check should not cost.
    from ray.serve.schema import ServeDeploySchema

    try:
        schema = ServeDeploySchema.model_validate(tree)
    except ValidationError as error:
        raise config_error(error) from None
    applications = schema.applications
    together = [
        demand for application in applications for demand in _demands(application, alone=len(applications) == 1)
    ]
    names = ", ".join(f"'{application.name}'" for application in applications)
    return Document(kind="Serve config", demands={f"application {names}": together} if applications else {})


def _demands(application: ServeApplicationSchema, *, alone: bool) -> list[Demand]:
    from serve_app.settings import parse_args

    if application.import_path != BUILDER:
        raise ConfigError(f"is '{application.import_path}'; this project builds '{BUILDER}'", field="import_path")
    for deployment in application.deployments:
        if placing := sorted(deployment.model_fields_set & _PLACING):
            raise ConfigError(
                "replaces what the application's args say; give it there instead, as in max_target_replicas, "
                "target_gpus or target_labels",
                field=f"applications.{application.name}.deployments.{deployment.name}.{placing[0]}",
            )
    serve = parse_args(application.args).serve
    demands = serve_demands(serve, has_draft=serve.draft is not None)
    return demands if alone else [dataclasses.replace(d, name=f"{application.name}'s {d.name}") for d in demands]
