"""Two servers behind nginx, with the files of docs/deployment.md."""

import os
import re
import shutil
import subprocess
from contextlib import ExitStack
from pathlib import Path

import httpx2
import pytest
import torch

from loraloom.serve.http.server import listen
from tests.generation.conftest import SIZES
from tests.serve.http.in_process import BASE, serving
from tests.tiny import tiny_host

NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
PAGE = (Path(__file__).parents[3] / "docs/deployment.md").read_text()
BODY = {"model": BASE, "prompt": "one", "max_tokens": 1}
MAIN = "daemon off; master_process off; pid pid; events {{}} http {{ access_log off; {} }}"
"""What a system's nginx.conf has around the page's file; its one process is the tester's."""


def proxy_file(port: int, replicas: list[str]) -> str:
    """Write the page's file with the upstream of several replicas and ports of this machine."""
    one, several = re.findall(r"^upstream .*?^}", PAGE, re.MULTILINE | re.DOTALL)
    (site,) = re.findall(r"```text\n(# /etc/nginx/conf.d/.*?)```", PAGE, re.DOTALL)
    for number, address in enumerate(replicas, start=1):
        several = several.replace(f"10.0.0.{number}:8000", address.removeprefix("http://"))
    site = site.replace(one, several).replace("listen 443 ssl", f"listen 127.0.0.1:{port}")
    stores = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    files = "".join(f"{store}_temp_path {store}; " for store in stores)
    return MAIN.format(files + re.sub("ssl_certificate.*", "", site))


def statuses(client: httpx2.Client) -> list[int]:
    """Ask with eight keys, which nginx spreads over the replicas."""
    keys = [{"Authorization": f"Bearer {number}"} for number in range(8)]
    return [client.post("/v1/completions", json=BODY, headers=key).status_code for key in keys]


@pytest.mark.skipif(NGINX is None, reason="needs nginx")
def test_clients_of_a_replica_that_ends_are_answered_by_the_other(host, tokenizer, tmp_path):
    with ExitStack() as stack, ExitStack() as ending:
        places = (stack, host), (ending, tiny_host(dtype=torch.float32, **SIZES))
        replicas = [kept.enter_context(serving(one, tokenizer)) for kept, one in places]
        with listen("127.0.0.1", 0) as sock:
            port = sock.getsockname()[1]
        config = tmp_path / "nginx.conf"
        config.write_text(proxy_file(port, [address for address, _ in replicas]))
        command = [str(NGINX), "-p", str(tmp_path), "-c", str(config), "-e", "stderr"]
        stack.callback(stack.enter_context(subprocess.Popen(command)).terminate)
        transport = httpx2.HTTPTransport(retries=5)  # until nginx listens
        client = httpx2.Client(base_url=f"http://127.0.0.1:{port}/llm", transport=transport)
        assert statuses(stack.enter_context(client)) == [200] * 8
        assert all(engine.counts for _, engine in replicas)
        assert client.get("/metrics").status_code == 403
        ending.close()
        assert statuses(client) == [200] * 8
