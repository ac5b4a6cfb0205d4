"""What the tests of several verbs share."""

import pytest

from loraloom.base import loading
from tests.generation.saved import save_tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny base model, and two adapters."""
    return save_tiny(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def refused(monkeypatch, capsys):
    """Run a command that is one error before weights of the base model are read; give the error."""

    def refused(run, words, **options):
        monkeypatch.setattr(loading, "_read_model", lambda *_, **__: pytest.fail("loaded"))
        assert run(*words.split(), **options) in (2, None)
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        return error

    return refused
