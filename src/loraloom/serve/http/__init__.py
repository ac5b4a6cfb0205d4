"""OpenAI's HTTP API in front of the engine; needs the extra `serve`."""
