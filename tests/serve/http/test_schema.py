"""Whatever requests the OpenAPI document allows, and many that it doesn't, get a proper answer."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error

from loraloom.serve.http.app import ApiOptions
from tests.serve.http.in_process import serving

EXAMPLES = 12


@pytest.fixture(scope="module")
def schema(host, tokenizer):
    with serving(host, tokenizer, options=ApiOptions(allow_loading=True)) as (address, _):
        yield schemathesis.openapi.from_url(f"{address}/openapi.json")


lazy = schemathesis.pytest.from_fixture("schema")


@lazy.parametrize()
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_no_request_is_too_much_for_the_server(case):
    case.call_and_validate(checks=[not_a_server_error], timeout=30)
