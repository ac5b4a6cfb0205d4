from __future__ import annotations

from importlib.metadata import version

import loraloom


def test_every_exported_name_exists_and_is_listed_once():
    assert sorted(set(loraloom.__all__)) == sorted(loraloom.__all__)
    assert all(name in vars(loraloom) for name in loraloom.__all__)


def test_public_names_are_exactly_those_exported():
    modules = {name for name, value in vars(loraloom).items() if type(value) is type(loraloom)}
    public = {name for name in vars(loraloom) if not name.startswith("_")} - modules
    assert public == set(loraloom.__all__)


def test_version_is_that_of_the_package():
    assert loraloom.__version__ == version("loraloom")
