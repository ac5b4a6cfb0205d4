"""The shell scripts, where they can be tried without installing anything."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAMES = ["setup", "test", "demo", "check", "lowest", "release"]
# hatchling is in the environments of builds alone.
METADATA = f"""
import sys
from types import SimpleNamespace

interface = SimpleNamespace(MetadataHookInterface=object)
sys.modules["hatchling.metadata.plugin.interface"] = interface
from hatch_build import RepositoryMetadata

hook, metadata = RepositoryMetadata(), {{"version": "1"}}
hook.root = {str(ROOT)!r}
hook.update(metadata)
print(metadata["urls"].get("Repository"))
"""
SCRIPTS = [*(f"scripts/{name}" for name in NAMES), ".ci/run"]


@pytest.fixture
def checkout(tmp_path):
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    return tmp_path


def run(script, *args, **environment):
    return subprocess.run(
        [script, *args],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


def fake_python(path):
    """A Python that fails every check of its version and makes no virtual environment."""
    path.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.6\nexit 1\n')
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_is_executable_bash_without_syntax_errors(script):
    assert os.access(ROOT / script, os.X_OK)
    subprocess.run(["bash", "-n", ROOT / script], check=True)


@pytest.mark.parametrize("script", ["setup", "test", "demo", "check"])
def test_old_python_is_refused_before_anything_is_made(checkout, script):
    result = run(checkout / "scripts" / script, PYTHON=fake_python(checkout / "python"))
    assert result.returncode == 1
    assert "needs Python 3.11 or later, got Python 3.9.6; set PYTHON=" in result.stderr
    assert not (checkout / ".venv").exists()


def test_missing_python_is_named(checkout):
    result = run(checkout / "scripts" / "setup", PYTHON="no-such-python")
    assert result.returncode == 1
    assert "no-such-python was not found; install Python 3.11 or later" in result.stderr


def test_unknown_option_is_refused(checkout):
    result = run(checkout / "scripts" / "setup", "--prod")
    assert result.returncode == 1
    assert "takes --dev or nothing, got --prod" in result.stderr


def test_arguments_of_test_go_to_pytest_behind_its_own(checkout):
    (checkout / "scripts/setup").write_text("#!/bin/sh\n")
    python = checkout / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho threads $OMP_NUM_THREADS\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    said = run(checkout / "scripts/test", "-n", "0", "-k", "a or b", OMP_NUM_THREADS="")
    own = "-m pytest -n 3 --dist loadscope --no-loadscope-reorder".split()
    assert said.stdout.splitlines() == ["threads 1", *own, "-n", "0", "-k", "a or b"]


def test_a_release_requires_the_address_of_the_repository(checkout):
    result = run(checkout / "scripts" / "release", LORALOOM_REPOSITORY="")
    assert result.returncode == 1
    assert "LORALOOM_REPOSITORY=https://HOST/OWNER/NAME scripts/release" in result.stderr
    assert not (checkout / "build").exists()


@pytest.mark.parametrize("address", ["", "https://host/owner/name", "github.com/owner"])
def test_metadata_has_links_where_the_repository_is_named(address):
    result = run(sys.executable, "-c", METADATA, LORALOOM_REPOSITORY=address, PYTHONPATH=str(ROOT))
    if address.startswith("github"):
        assert "LORALOOM_REPOSITORY must be https://HOST/OWNER/NAME" in result.stderr
    else:
        assert result.stdout.strip() == (address or "None"), result.stderr
