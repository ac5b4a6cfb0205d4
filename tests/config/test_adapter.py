import pytest
from pydantic import ValidationError

from loraloom.adapters import LoraConfig


@pytest.mark.parametrize("targets", ["q_proj", 3, None])
def test_target_modules_that_are_neither_are_refused(targets):
    with pytest.raises(ValidationError, match=r"must be all-linear, .*, moe or a list of"):
        LoraConfig(target_modules=targets)
