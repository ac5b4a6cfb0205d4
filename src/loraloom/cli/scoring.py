"""What evaluations of `loraloom eval` share: scores are kept, results are written and shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from loraloom.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from loraloom.cli.eval import EvalRun
    from loraloom.eval.cache import ScoreCache
    from loraloom.eval.evaluation import Evaluation
    from loraloom.eval.loss import LossEvaluation
    from loraloom.models.host import Host

Part = TypeVar("Part")


def score_parts(
    run: EvalRun, score: Callable[[EvalRun, Console], Part], messages: Console
) -> list[Part]:
    """Score all adapters here, or with --ray some of them on each worker of a cluster."""
    if run.ray is None:
        return [score(run, messages)]
    from loraloom.eval.spread import spread

    work = partial(_score_in_worker, run, score)
    try:
        return spread(work, run.names, run.ray, run.ray_workers, run.device, messages.print)
    except KeyboardInterrupt:
        messages.print("stopped; the same command goes on from any scores that are kept")
        raise


def _score_in_worker(
    run: EvalRun, score: Callable[[EvalRun, Console], Part], names: Sequence[str | None]
) -> Part:
    from loraloom.terminal import make_console

    return score(run.only(names), make_console(quiet=True))


def present(run: EvalRun, evaluation: Evaluation | LossEvaluation, messages: Console) -> None:
    """Tell what collapsed, print the tables, and write the files that were asked for."""
    from loraloom.terminal import make_console, print_tables

    for name, routing in evaluation.details["routing"].items():
        for warning in routing["warnings"]:
            messages.print(f"warning: adapter {name}: {warning}")
    print_tables(make_console(), evaluation.tables())
    for path in run.outputs:
        evaluation.write(path)


def open_cache(run: EvalRun, host: Host, messages: Console) -> ScoreCache | None:
    """Open the cache; where the default directory can't be used, say so and go on without."""
    from loraloom.eval.cache import ScoreCache, default_cache_directory

    if run.no_cache:
        return None
    try:
        return ScoreCache(run.cache or default_cache_directory(), host, run.names)
    except ConfigError as error:
        if run.cache is not None:
            raise
        messages.print(f"warning: {error}")
        return None


@contextmanager
def tell_kept(cache: ScoreCache | None, messages: Console) -> Iterator[None]:
    """Say what the cache had, and what it keeps of an evaluation that is interrupted."""
    try:
        yield
    except KeyboardInterrupt:
        if cache is None:
            messages.print("stopped; no scores are kept")
        else:
            messages.print(
                f"stopped; {cache.num_found + cache.num_added} scores are kept in "
                f"{cache.directory}, the same command goes on from there"
            )
        raise
    if cache is not None and cache.fault is not None:
        messages.print(f"warning: some scores are not kept: {cache.fault}")
    if cache is not None and cache.num_found:
        total = cache.num_found + cache.num_added
        messages.print(
            f"{cache.num_found} of {total} answers were scored before; their scores are kept in "
            f"{cache.directory}"
        )
