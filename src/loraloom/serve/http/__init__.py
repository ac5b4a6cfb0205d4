"""OpenAI's HTTP API in front of the engine; needs the extra `serve`."""

from loraloom.errors import ConfigError

try:
    import fastapi  # noqa: F401
    import llguidance  # noqa: F401
    import openai  # noqa: F401
    import prometheus_client  # noqa: F401
    import uvicorn  # noqa: F401
except ImportError as error:
    raise ConfigError(
        f"serving needs the package {error.name}, which is not installed; "
        'run: pip install "loraloom[serve]"'
    ) from error
