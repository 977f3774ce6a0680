from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from ray import serve
from ray.serve.schema import ServeDeploySchema

import serve_app
from serve_app.app import build
from serve_app.settings import (
    AppConfig,
    directory_options,
    draft_options,
    ingress_options,
    parse_args,
    target_options,
)
from unmask.config import ServeConfig
from unmask.errors import UserError


def test_the_shipped_config_file_is_valid_and_not_open_to_the_world():
    tree = yaml.safe_load((Path(serve_app.__file__).parent / "config.yaml").read_text())
    schema = ServeDeploySchema.model_validate(tree)
    assert schema.http_options.host == "127.0.0.1"
    [application] = schema.applications
    assert application.import_path == f"{build.__module__}:{build.__name__}"
    config = parse_args(application.args)
    assert config.serve.name == "unmask"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"drafts": "x"}, r"args\.drafts: unknown key \(did you mean 'draft'\?\)"),
        ({"target": {"modle": "x"}}, r"target\.modle: unknown key \(did you mean 'model'\?\)"),
        ({"port": "high"}, r"serve\.port"),
        ({"max_num_seqs": 0}, r"serve\.max_num_seqs: must be at least 1"),
        ({"target_replicas": 3, "max_target_replicas": 2}, r"serve\.max_target_replicas"),
        ({"target": {"model": "./nowhere"}}, r"target\.model"),
        ({"api_keys_file": "/nowhere"}, r"serve\.api_keys_file"),
    ],
)
def test_mistakes_are_one_line_that_names_the_field(args: dict, message: str):
    with pytest.raises(UserError, match=message) as mistake:
        build(args)
    assert "\n" not in str(mistake.value)


@pytest.mark.parametrize("most", [None, 4])
def test_serve_accepts_the_options(most: int | None):
    config = AppConfig(serve=ServeConfig(max_num_seqs=8, target_replicas=2, max_target_replicas=most, target_gpus=1))
    for options in (ingress_options(config), target_options(config), draft_options(config), directory_options(config)):
        deployment = serve.deployment(**options)(type("Nothing", (), {}))
        assert deployment.max_ongoing_requests >= 8
    assert config.slots == 8 * (most or 2)
    assert ingress_options(config)["max_ongoing_requests"] > config.slots + config.serve.max_queued
