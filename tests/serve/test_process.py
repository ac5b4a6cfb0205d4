import signal

import pytest

from loraloom.errors import ConfigError
from loraloom.serve.process import KeyFiles, is_loopback, read_keys


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


def test_keys_change_at_sighup_unless_a_file_is_bad(tmp_path, caplog):
    api, admin = tmp_path / "api", tmp_path / "admin"
    api.write_text("first")
    admin.write_text("boss")
    before = signal.getsignal(signal.SIGHUP)
    try:
        KeyFiles(None, None).watch()
        assert signal.getsignal(signal.SIGHUP) is before
        files = KeyFiles(api, admin)
        files.watch()
        keys, admin_keys = files.keys
        api.write_text("second")
        signal.raise_signal(signal.SIGHUP)
        assert (keys, admin_keys) == (["second"], ["boss"])
        api.write_text("third")
        admin.write_text("# none")
        signal.raise_signal(signal.SIGHUP)
        assert (keys, admin_keys) == (["second"], ["boss"])
        assert "the API keys have not changed" in caplog.text
        assert "contains no API key" in caplog.text
    finally:
        signal.signal(signal.SIGHUP, before)
