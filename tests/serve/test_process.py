import pytest

from loraloom.errors import ConfigError
from loraloom.serve.process import is_loopback, read_keys


def test_loopback_is_known():
    assert all(map(is_loopback, ("127.0.0.1", "localhost", "::1", "127.1.2.3")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "example.org", "10.0.0.1")))


def test_keys_are_read_from_a_file(tmp_path):
    path = tmp_path / "keys"
    path.write_text("\ufeff# ours\n\nfirst\n second \n", encoding="utf-8")  # some editors begin so
    assert read_keys(path) == ["first", "second"]
    path.write_text("# none\n")
    with pytest.raises(ConfigError, match="contains no API key"):
        read_keys(path)
    with pytest.raises(ConfigError, match="can't be read"):
        read_keys(tmp_path / "missing")
