"""Ray Serve config files (`serve deploy`, `serveConfigV2`)."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from pipelines.lint.document import Document, config_error
from unmask.errors import ConfigError
from unmask.placement import serve_demands

BUILDER = "serve_app.app:build"


def read_serve_file(tree: dict[str, Any]) -> Document:
    """A Serve file and what its application asks for.

    Raises:
        ConfigError: Serve's schema or the application's own arguments are broken.
    """
    # Imported here: Serve takes a second to import, which a recipe's check should not cost.
    from ray.serve.schema import ServeDeploySchema

    from serve_app.settings import parse_args

    try:
        schema = ServeDeploySchema.model_validate(tree)
    except ValidationError as error:
        raise config_error(error) from None
    demands = {}
    for application in schema.applications:
        if application.import_path != BUILDER:
            raise ConfigError(f"is '{application.import_path}'; this project builds '{BUILDER}'", field="import_path")
        serve = parse_args(application.args).serve
        demands[f"application '{application.name}'"] = serve_demands(serve, has_draft=serve.draft is not None)
    return Document(kind="Serve config", demands=demands)
