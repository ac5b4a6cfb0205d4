"""The choice tasks of `loraloom eval`: scored, kept, compared and written down."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from loraloom.data.questions import QuestionSet
from loraloom.errors import ConfigError
from loraloom.eval.answers import answers_of
from loraloom.eval.cache import ScoreCache, default_cache_directory
from loraloom.eval.comparison import Pair, compare_all, summarise_seeds
from loraloom.eval.encoding import encode_choices
from loraloom.eval.moe_peft import encode_last_tokens
from loraloom.eval.progress import Progress, TaskProgress, show_progress
from loraloom.eval.protocol import score_questions
from loraloom.eval.provenance import describe_evaluation
from loraloom.eval.results import TaskScores, check_finite, write_questions
from loraloom.eval.routing import RoutingTally, summarise_routing
from loraloom.eval.tables import all_tables, write_outputs
from loraloom.models.host import Host


@dataclass(frozen=True)
class ChoiceRun:
    """What to score and where to put it.

    Args:
        asked: Questions of each task.
        names: Adapters to score; None is the base model.
        adapters: Directory or hub id of each adapter by name.
        pairs: Whom to compare.
        compat: Whose way of scoring to repeat; None for loraloom's.
        batch_tokens: Tokens of a batch; None for the device's default.
        cache: Directory of kept scores; None for the default one.
        no_cache: Keep none.
        outputs: Files of results.
        per_question: File with a line for each question.
        command: What started it.
    """

    asked: Sequence[QuestionSet]
    names: Sequence[str | None]
    adapters: Mapping[str, str]
    pairs: Sequence[Pair]
    compat: str | None
    batch_tokens: int | None
    cache: Path | None
    no_cache: bool
    outputs: Sequence[Path]
    per_question: Path | None
    command: str


def score_choices(run: ChoiceRun, host: Host, tokenizer: PreTrainedTokenizerBase) -> None:
    """Score choice tasks, write the results and print them.

    Raises:
        ConfigError: If scores can't be kept, or a file can't be written.
        DataError, AdapterError: As in `score_questions` and `check_finite`.
        KeyboardInterrupt: After Ctrl-C, when the user has been told what is kept.
    """
    messages = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    cache = None if run.no_cache else _open_cache(run, host, messages)
    tally = RoutingTally(host, run.names)
    with _kept(cache, messages), show_progress(messages) as progress:
        scored = [
            _score(run, host, tokenizer, asked, cache, progress, tally) for asked in run.asked
        ]
    answers = [answers_of(task) for task in scored]
    seeds, comparisons = summarise_seeds(answers), compare_all(answers, run.pairs)
    if run.per_question is not None:
        write_questions(run.per_question, scored)
    num_questions = {asked.task: len(asked.questions) for asked in run.asked}
    routing = summarise_routing(tally, tokenizer, num_questions)
    for name, of_adapter in routing.items():
        for warning in of_adapter["warnings"]:
            messages.print(f"warning: adapter {name}: {warning}")
    beside = {
        "routing": routing,
        **describe_evaluation(host, run.adapters, run.asked, run.command),
        "compat": run.compat,
        "num_cached_scores": 0 if cache is None else cache.num_found,
    }
    write_outputs(run.outputs, scored, seeds, comparisons, beside)
    console = Console(markup=False, highlight=False)
    for number, table in enumerate(all_tables(scored, seeds, comparisons)):
        console.print(*([""] if number else []), table, sep="\n")


def _score(
    run: ChoiceRun,
    host: Host,
    tokenizer: PreTrainedTokenizerBase,
    asked: QuestionSet,
    cache: ScoreCache | None,
    progress: Progress,
    tally: RoutingTally,
) -> TaskScores:
    task = TaskProgress(asked.task, asked.questions)
    progress.start(task)

    def advance(places: Sequence[int]) -> None:
        task.add(places)
        progress.update(task)

    scores = score_questions(
        host,
        tokenizer,
        asked.questions,
        run.names,
        run.batch_tokens,
        advance,
        encode_choices if run.compat is None else encode_last_tokens,
        cache,
        tally.of(asked.task),
    )
    scored = TaskScores(asked.task, asked.split, scores)
    check_finite(scored)
    return scored


def _open_cache(run: ChoiceRun, host: Host, messages: Console) -> ScoreCache | None:
    """Open the cache; where the default directory can't be used, say so and go on without."""
    try:
        return ScoreCache(run.cache or default_cache_directory(), host, run.names)
    except ConfigError as error:
        if run.cache is not None:
            raise
        messages.print(f"warning: {error}")
        return None


@contextmanager
def _kept(cache: ScoreCache | None, messages: Console) -> Iterator[None]:
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
    finally:
        if cache is not None:
            cache.sync()
    if cache is not None and cache.num_found:
        total = cache.num_found + cache.num_added
        messages.print(f"{cache.num_found} of {total} scores were kept in {cache.directory}")
