"""From a job's settings to an adapter with its data, and what jobs are measured on."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from loraloom.adapters.contract import Adapter, AdapterConfig
from loraloom.adapters.extra_modules import own_parts
from loraloom.base.loading import load_tokenizer
from loraloom.config.data import PromptForm
from loraloom.data.encoding import prompt_form
from loraloom.data.tasks import ChoiceQuestion, load_question_set, questions_digest
from loraloom.data.tokens import pad_token
from loraloom.data.training_set import StreamedSet, TrainingSet, load_training_set
from loraloom.errors import ConfigError, DataError, LoraloomError, shown
from loraloom.eval.cache import adapter_digest
from loraloom.eval.score import score_accuracy
from loraloom.formats.files import fit_to_base, read_stored
from loraloom.formats.layouts import StoredAdapter
from loraloom.generation.scoring import label_log_probs
from loraloom.host.host import Host
from loraloom.training.job import Job
from loraloom.training.learner import Learner
from loraloom.training.settings import EvaluationConfig, JobConfig, RunConfig
from loraloom.training.step import objectives
from loraloom.training.step.batch import rows_of

KEPT_TRAINING_SETS = 8
Base = tuple[Host, PreTrainedTokenizerBase]


class JobData:
    """Reads the data of jobs; those that would get equal sets share one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._sets: dict[str, tuple[TrainingSet | StreamedSet, PromptForm]] = {}
        self.questions = cache(_load_questions)

    def training_set(self, config: JobConfig) -> tuple[TrainingSet | StreamedSet, PromptForm]:
        """Return a job's training set, and the form in which its data writes prompts."""
        data = config.data
        length = config.train.max_length
        as_pairs = config.train.objective.learns_from_pairs
        stream_batch_size = config.train.batch_size if data.streaming else None
        key = repr((data, length, config.seed, as_pairs, stream_batch_size))
        if key not in self._sets:
            load = StreamedSet if data.streaming else load_training_set
            training_set = load(data, self._tokenizer, length, config.seed, as_pairs=as_pairs)
            self._sets[key] = (training_set, prompt_form(data, self._tokenizer))
            if len(self._sets) > KEPT_TRAINING_SETS:
                self._sets.pop(next(iter(self._sets)))  # the oldest
        return self._sets[key]

    def forget(self) -> None:
        self._sets.clear()
        self.questions.cache_clear()


def _load_questions(config: EvaluationConfig) -> list[ChoiceQuestion]:
    question_set = load_question_set(
        config.task, config.scoring, config.split, config.path, config.limit
    )
    return question_set.questions


def check_data(run: RunConfig) -> None:
    """Read the data of a run's first jobs without a base model, to find faults in it."""
    data = JobData(load_tokenizer(run.base_model))
    for config in run.first_jobs:
        with naming(config):
            data.training_set(config)
            for evaluation in config.eval:
                data.questions(evaluation)


@contextmanager
def naming(config: JobConfig) -> Iterator[None]:
    try:
        yield
    except LoraloomError as error:
        raise type(error)(f"job {config.name}: {error}") from error


class JobBuilder:
    """Builds jobs on one host and measures them."""

    def __init__(self, host: Host, tokenizer: PreTrainedTokenizerBase):
        self.pad_id = pad_token(tokenizer)
        self._host = host
        self._tokenizer = tokenizer
        self._data = JobData(tokenizer)

    def build(self, config: JobConfig, *, reread: bool = True) -> Job:
        """Build a job; without `reread`, data that another job has read is taken as it was then."""
        if reread:
            self._data.forget()
        host = self._host
        before = set(host.adapters)
        try:
            with naming(config):
                if config.train.packing:
                    host.packing.check()
                adapter = host.add(config.name, config.adapter, config.seed)
                start = None
                if config.start_from is not None:
                    start = load_start(host, adapter, config.start_from)
                reference = objectives.load_reference(host, config.train.objective)
                training_set, form = self._data.training_set(config)
                adapter.prompt = form
                _check_lengths(config, training_set, host.config.max_position_embeddings)
                questions = {task: self._data.questions(task) for task in config.eval}
                learner = Learner(adapter, config.train, host.dtype)
                warnings = list(_form_warnings(start, form))
                inputs = {"examples": training_set.digest}
                if questions:
                    inputs["questions"] = " ".join(map(questions_digest, questions.values()))
                if reference is not None and reference.adapter_name is not None:
                    inputs["reference"] = adapter_digest(host.adapter(reference.adapter_name))
                return Job(config, learner, training_set, reference, questions, inputs, warnings)
        except BaseException:
            for name in host.adapters.keys() - before:
                host.remove(name)
            raise

    def measure(self, jobs: Sequence[Job]) -> dict[str, dict[str, float]]:
        """Measure jobs: `eval/loss` as a step would compute it, and `eval/<task>/accuracy`."""
        metrics: dict[str, dict[str, float]] = {job.name: {} for job in jobs}
        self._measure_held_out([job for job in jobs if job.training_set.validation], metrics)
        groups: dict[tuple[EvaluationConfig, int], list[Job]] = {}
        for job in jobs:
            for config, questions in job.questions.items():
                groups.setdefault((config, id(questions)), []).append(job)
        for (config, _), group in groups.items():
            names = [job.name for job in group]
            questions = group[0].questions[config]
            accuracies = score_accuracy(self._host, self._tokenizer, questions, names)
            for name in names:
                metrics[name][config.metric] = accuracies[name]
        return metrics

    def _measure_held_out(
        self, jobs: Sequence[Job], metrics: Mapping[str, dict[str, float]]
    ) -> None:
        rows = {job.name: rows_of(job.training_set.validation) for job in jobs}
        objectives.score_references(self._host, [(job.reference, rows[job.name]) for job in jobs])
        requests = []
        for name, rows_of_job in rows.items():
            requests += [(name, row) for row in rows_of_job]
        log_probs = iter(label_log_probs(self._host, requests))
        for job in jobs:
            of_job = torch.cat([next(log_probs) for _ in rows[job.name]])
            scored = objectives.scored_samples(of_job, rows[job.name], job.reference)
            totals = objectives.count_totals(job.training_set.validation)
            loss, metrics_of_job = job.objective(scored, totals)
            # What isn't finite is left out, as in a step's line, but for these two.
            always_told = ("eval/loss", job.selection.metric)
            others = {name: value for name, value in metrics_of_job.items() if name != "loss"}
            for name, value in {"loss": loss, **others}.items():
                if f"eval/{name}" in always_told or math.isfinite(value):
                    metrics[job.name][f"eval/{name}"] = float(value)

    def measure_apart(self, jobs: Sequence[Job]) -> list[dict[str, float] | Exception]:
        """Measure jobs together; if that fails, each alone, to find whose fault it is."""
        try:
            measured = self.measure(jobs)
        except Exception as error:
            if len(jobs) == 1:
                return [error]
            return [outcome for job in jobs for outcome in self.measure_apart([job])]
        return [measured[job.name] for job in jobs]


def _check_lengths(
    config: JobConfig, training_set: TrainingSet | StreamedSet, max_positions: int
) -> None:
    longest = training_set.longest
    if not longest or (config.data.has_validation and not training_set.validation):
        purpose = "measure eval/loss on" if longest else "learn from"
        raise DataError(
            f"data must have examples to {purpose}, got none ({'; '.join(training_set.report)}); "
            "add rows, or raise max_length"
        )
    held_out = [len(row.input_ids) for row in rows_of(training_set.validation)]
    num_tokens = max([longest, *held_out])
    if num_tokens > max_positions:
        has = "one may have" if isinstance(training_set, StreamedSet) else "the longest has"
        raise DataError(
            f"examples must fit the model's {max_positions} positions, {has} {num_tokens} tokens; "
            f"set train.max_length, {config.train.max_length}, to {max_positions} or less"
        )


def _form_warnings(start: StoredAdapter | None, form: PromptForm) -> Iterator[str]:
    if start is None or start.prompt is None:
        return
    learned = start.prompt
    if "text" in (learned.format, form.format):  # no prompts
        return
    is_equal = learned == form.model_copy(update={"system": learned.system})
    if is_equal or (learned.is_text and form.is_text):
        return
    before = shown(learned.model_dump(exclude_none=True))
    now = shown(form.model_dump(exclude_none=True))
    yield (
        f"start_from {start.source} learned prompts of form {before}, but this job's have "
        f"{now}; training continues, far from what that adapter learned; write the data in "
        "its form (data.template, data.chat_template)"
    )


def load_start(host: Host, adapter: Adapter, path_or_hub_id: str) -> StoredAdapter:
    """Load the weights of an adapter, and return what was read."""
    source = read_stored(path_or_hub_id)
    stored_config, tensors = fit_to_base(source, host.base)
    job = _compatible_settings(adapter.config, host)
    stored = _compatible_settings(stored_config, host)
    differences = []
    for name, value in job.items():
        if stored.get(name) != value:
            differences.append(f"{name} is {value!r} and that adapter's {stored.get(name)!r}")
    if differences:
        reason = "; ".join(differences)
        raise ConfigError(f"start_from {path_or_hub_id} differs from the job: {reason}")
    adapter.load_tensors(tensors)
    return source


def _compatible_settings(config: AdapterConfig, host: Host) -> dict[str, Any]:
    """Return what decides how weights are used, and most of what decides their shapes."""
    return {**config.summary(), "tokens": own_parts(config, host.base).tokens}
