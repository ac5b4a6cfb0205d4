"""The command line in a process of its own, which tells when it trains."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from multiprocessing.synchronize import Event
from unittest.mock import patch

import torch

from loraloom.cli.main import main
from loraloom.training.engine import Engine


def resume(run_file: str, begun: Event) -> None:
    """Do what `loraloom train RUN_FILE --resume` does, and end the process with its code."""
    torch.set_num_threads(1)
    step = Engine.step

    def first_step(engine: Engine) -> None:
        begun.set()
        step(engine)

    with patch.object(Engine, "step", first_step), redirect_stdout(io.StringIO()):
        raise SystemExit(main(["train", run_file, "--resume"]))
