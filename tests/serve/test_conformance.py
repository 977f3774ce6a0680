"""The application as its own description and the official API have it, over a backend without a model."""

from __future__ import annotations

from collections import Counter

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

from serve_app.admission import Admission
from serve_app.ingress import create_app
from serve_app.service import Service
from serve_app.telemetry import Telemetry
from serve_app.tokenizer import ChatTokenizer
from tests.unit.serve_app.conftest import MAX_MODEL_LEN, ToyBackend, byte_tokenizer

OFTEN_REFUSED = {"model", "decoder", "tools", "tool_choice", "top_logprobs", "max_tokens", "max_completion_tokens"}
"""Fields whose values fit the description and mostly not the model: left out of every other request."""

ERROR_FIELDS = {"message", "type", "param", "code"}


@pytest.fixture(scope="module")
def app() -> FastAPI:
    tokenizer = byte_tokenizer()
    admission = Admission(slots=8, queue=8)
    return create_app(
        Service(
            model="toy",
            max_model_len=MAX_MODEL_LEN,
            created=1,
            tokenizer=ChatTokenizer(tokenizer),
            backend=ToyBackend(tokenizer, block=512),
            admission=admission,
            telemetry=Telemetry(admission),
            deadline_s=30.0,
        )
    )


def check_operations(app: FastAPI, cases_each: int) -> Counter[int]:
    """Ask every operation for valid and invalid things; how often each status was the answer."""
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    statuses: Counter[int] = Counter()
    for result in schema.get_all_operations():
        operation = result.ok()
        # Without a body nothing can be asked in a wrong way: any text is a model's name.
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)[: 2 if operation.body else 1]:

            @given(case=operation.as_strategy(generation_mode=mode), plain=st.booleans())
            @settings(
                max_examples=cases_each,
                deadline=None,
                database=None,
                derandomize=True,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            def answers(case: schemathesis.Case, plain: bool) -> None:
                if plain and isinstance(case.body, dict):
                    case.body = {name: value for name, value in case.body.items() if name not in OFTEN_REFUSED}
                response = case.call()
                statuses[response.status_code] += 1
                assert response.status_code < 500, (case.as_curl_command(), response.text)
                assert response.headers["x-request-id"]
                if response.status_code >= 400:
                    assert set(response.json()["error"]) == ERROR_FIELDS, response.text

            answers()
    return statuses


def test_no_request_that_the_description_allows_or_forbids_is_a_fault(app: FastAPI):
    statuses = check_operations(app, 25)
    assert statuses.total() >= 200
    assert min(statuses[200], statuses[400]) > 15


@pytest.mark.slow
def test_two_thousand_requests_are_no_fault(app: FastAPI):
    statuses = check_operations(app, 250)
    assert statuses.total() >= 2000
