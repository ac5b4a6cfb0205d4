import pytest

from loraloom.config.names import check_name
from loraloom.errors import ConfigError


@pytest.mark.parametrize("name", ["a", "arc-mixlora", "0.1_b", "mix@0", "x" * 100])
def test_a_safe_name_is_returned(name):
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../a", "a/b", "a\\b", "-a", ".hidden", "a b", "a\n", "ä", "x" * 101]
)
def test_an_unsafe_name_is_refused(name):
    with pytest.raises(ConfigError, match="name must be a safe file name") as error:
        check_name(name)
    assert repr(name) in str(error.value)
