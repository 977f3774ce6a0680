"""What is refused before a replica of a diffusion LM is asked for."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from serve_app.__main__ import plan
from serve_app.app import build_application
from serve_app.diffusion_library import engine_config, library_shape, load_library, warm_up_request
from serve_app.settings import AppConfig, diffusion_options, parse_args
from tests.diffusion_tools import tiny
from unmask.config import Recipe, ServeConfig
from unmask.decoding.generate import generate
from unmask.errors import UserError
from unmask.models import families
from unmask.placement import serve_demands


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("networks")
    made = {
        "full": tiny("llada"),
        "blocks": tiny("adapted", attention="block_causal", block_size=6),
        "causal": tiny("causal"),
    }
    for name, network in made.items():
        families.save(network, folder / name)
    return {name: str(folder / name) for name in made}


def config(networks: dict[str, str], diffusion: str, **options: Any) -> ServeConfig:
    options = {"diffusion_length": 64, "dtype": "float32", **options}
    return ServeConfig(diffusion=networks.get(diffusion, diffusion), **options)


@pytest.mark.parametrize(("name", "decoder"), [("full", "Threshold"), ("blocks", "D2F")])
def test_a_network_has_a_decoder_without_being_told(networks: dict[str, str], name: str, decoder: str):
    serve = config(networks, name)
    shape, loaded = library_shape(serve), load_library(serve)
    assert type(shape.get(None)).__name__ == type(loaded.get(None)).__name__ == decoder
    assert shape.denoiser.device.type == "meta"
    (done,) = generate(loaded.get(None), [warm_up_request(shape.denoiser)])
    assert len(done.response_ids) == 1
    assert engine_config(serve).max_length == 64


@pytest.mark.parametrize(
    ("name", "options", "field"),
    [
        ("full", {"decoder": {"name": "d2f"}}, "serve.decoder"),
        ("full", {"decoder": {"name": "apd"}}, "serve.decoder"),
        ("full", {"decoder": {"name": "threshold", "treshold": 1}}, "serve.decoder"),
        ("blocks", {"decoder": {"name": "d2f", "block_size": 8}}, "serve.decoder"),
        ("full", {"diffusion_length": 257}, "serve.diffusion_length"),
        ("causal", {}, "serve.diffusion"),
        ("/nowhere", {}, "serve.diffusion"),
        ("full", {"verifier": "full"}, "serve.verifier"),
    ],
)
def test_what_cannot_be_served_is_named(networks: dict[str, str], name: str, options: dict[str, Any], field: str):
    if "verifier" in options:
        options = {"verifier": networks[options["verifier"]]}
    with pytest.raises(UserError) as refused:
        build_application(AppConfig(serve=config(networks, name, **options)))
    assert refused.value.field == field


def test_a_network_without_a_tokenizer_is_refused(networks: dict[str, str]):
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        build_application(AppConfig(serve=config(networks, "full")))


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"decoder": {"name": "d2f"}}, "serve.decoder"),
        ({"verifier": "v"}, "serve.verifier"),
        ({"diffusion_name": "blocks"}, "serve.diffusion_name"),
        ({"diffusion": "d", "diffusion_name": "unmask"}, "serve.diffusion_name"),
        ({"diffusion": "d", "draft": "x"}, "serve.diffusion_name"),
        ({"diffusion": "d", "diffusion_rows": 0}, "serve.diffusion_rows"),
        ({"diffusion": "d", "diffusion_replicas": 0}, "serve.diffusion_replicas"),
        ({"diffusion": "d", "diffusion_length": 1}, "serve.diffusion_length"),
        ({"diffusion": "d", "diffusion_gpus": -1}, "serve.diffusion_gpus"),
    ],
)
def test_settings_that_do_not_go_together(options: dict[str, Any], field: str):
    with pytest.raises(UserError) as refused:
        ServeConfig(**options)
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("options", "roles"),
    [
        ({}, {"serve.target"}),
        ({"diffusion": "d"}, {"serve.diffusion"}),
        ({"diffusion": "d", "diffusion_name": "blocks"}, {"serve.target", "serve.diffusion"}),
    ],
)
def test_a_diffusion_lm_takes_the_targets_place_unless_it_has_a_name(options: dict[str, Any], roles: set[str]):
    serve = ServeConfig(**options)
    assert {demand.name for demand in serve_demands(serve, has_draft=False)} == roles | {"serve.ingress"}
    shown = plan(Recipe(serve=serve))
    assert ("# serve.target:" in shown, "# serve.diffusion:" in shown) == (
        "serve.target" in roles,
        "serve.diffusion" in roles,
    )
    again = parse_args(asdict(serve))
    assert again.serve == serve
    assert diffusion_options(again)["max_ongoing_requests"] == 32
