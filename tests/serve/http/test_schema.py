"""Whatever requests the OpenAPI document allows, and many that it doesn't, get a proper answer."""

from collections import Counter

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode

from loraloom.serve.http.app import ApiOptions
from tests.serve.http.in_process import serving

few = settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def schema(host, tokenizer):
    with serving(host, tokenizer, options=ApiOptions(allow_loading=True)) as (address, _):
        yield schemathesis.openapi.from_url(f"{address}/openapi.json")


# the server's thread may draw random numbers while a strategy does
@pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")
@pytest.mark.parametrize("mode", list(GenerationMode))
def test_no_request_is_too_much_for_the_server(schema, mode):
    statuses = Counter()
    for found in schema.get_all_operations():
        operation = found.ok()
        if mode == GenerationMode.NEGATIVE and not operation.body:
            continue  # nothing can be wrong in it

        @few
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case):
            if isinstance(case.body, dict) and {"messages", "prompt"} & case.body.keys():
                case.body["model"] = "lora"
            response = case.call(timeout=60)
            statuses[response.status_code] += 1
            assert response.status_code < 500, response.text

        ask()
    assert statuses.total() > 20
    assert statuses[200 if mode == GenerationMode.POSITIVE else 400]
