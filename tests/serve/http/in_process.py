"""A server in a thread of the test's own process."""

import copy
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from loraloom.generation.engine import Engine
from loraloom.generation.scheduler import EngineLimits
from loraloom.host.host import Host
from loraloom.serve.adapter_cache import ServedAdapters
from loraloom.serve.http.app import ApiOptions, create_app
from loraloom.serve.http.server import Server, listen

BASE = "some/base"


@contextmanager
def serving(
    host: Host,
    tokenizer: Any,
    directory: Any = None,
    options: ApiOptions | None = None,
    base: str = BASE,
    max_adapters: int = 8,
    base_aliases: Sequence[str] = (),
    **limits: Any,
) -> Iterator[tuple[str, Engine]]:
    """Serve a host in this process; gives the address, and the engine."""
    settings = {"max_rows": 8, "cache_tokens": 4096, "prefill_tokens": 64}
    engine = Engine(host, copy.deepcopy(tokenizer), EngineLimits(**settings | limits))
    shelf = ServedAdapters(
        host, base, directory, max_adapters, engine.forget, base_aliases=base_aliases
    )
    app = create_app(engine, tokenizer, shelf, options or ApiOptions())
    with listen("127.0.0.1", 0) as sock:
        server = Server(app, engine)
        thread = threading.Thread(target=server.run, args=([sock],))
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield f"http://127.0.0.1:{sock.getsockname()[1]}", engine
        finally:
            server.should_exit = True
            thread.join()
