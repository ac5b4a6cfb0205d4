"""OpenAI's HTTP API in front of the engine; needs the extra `serve`."""

from importlib.util import find_spec

from loraloom.errors import ConfigError

for _package in ("fastapi", "llguidance", "openai", "prometheus_client", "uvicorn"):
    if find_spec(_package) is None:
        raise ConfigError(
            f"serving needs the package {_package}, which is not installed; "
            'run: pip install "loraloom[serve]"'
        )
