import pytest
from pydantic import ValidationError

from loraloom.adapters import LoraConfig


@pytest.mark.parametrize("targets", ["q_proj", 3, None, [5]])
def test_target_modules_that_are_neither_are_refused(targets):
    with pytest.raises(
        ValidationError, match=r"must be all-linear, .*, moe, a list of module"
    ) as e:
        LoraConfig(target_modules=targets)
    assert e.value.error_count() == 1


@pytest.mark.parametrize("pattern", [r".*\.(q_proj", r"q{1,9}.*", r"(?=a).*"])
def test_patterns_of_target_modules_are_regular_expressions_of_linear_time(pattern):
    with pytest.raises(ValidationError, match="is not a regular expression") as caught:
        LoraConfig(target_modules=pattern)
    assert caught.value.error_count() == 1
