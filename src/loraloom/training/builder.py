"""From a job's settings to an adapter with its data, and what jobs are measured on."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from loraloom.adapters.contract import Adapter
from loraloom.adapters.extra_modules import own_parts, refuse_own_parts
from loraloom.adapters.tensor_names import TensorKey
from loraloom.adapters.weighted_sum import check_is_lora, concatenate
from loraloom.base.loading import load_tokenizer
from loraloom.config.data import PromptForm, SourceConfig
from loraloom.data.encoding import prompt_form
from loraloom.data.sources import find_location
from loraloom.data.tasks import ChoiceQuestion, find_task, load_question_set, questions_digest
from loraloom.data.tokens import pad_token
from loraloom.data.training_set import StreamedSet, TrainingSet, load_training_set
from loraloom.errors import ConfigError, DataError, LoraloomError, shown
from loraloom.eval.cache import adapter_digest
from loraloom.eval.score import score_accuracy
from loraloom.formats.files import fit_to_base, read_stored
from loraloom.formats.layouts import StoredAdapter
from loraloom.formats.raw_files import find_adapter
from loraloom.generation.scoring import label_log_probs
from loraloom.host.host import Host
from loraloom.training.job import Job
from loraloom.training.settings import EvaluationConfig, JobConfig, RunConfig
from loraloom.training.step import objectives, optimizers

KEPT_TRAINING_SETS = 8
Base = tuple[Host, PreTrainedTokenizerBase]


class JobData:
    """Reads the data of jobs; those with the same data and seed (and pace, in streams) share it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._sets: dict[str, tuple[TrainingSet | StreamedSet, PromptForm]] = {}
        self._questions: dict[str, list[ChoiceQuestion]] = {}

    def training_set(self, config: JobConfig) -> tuple[TrainingSet | StreamedSet, PromptForm]:
        """Return what a job learns from, and how that writes prompts."""
        data, length = config.data, config.train.max_length
        as_pairs = config.train.objective.learns_from_pairs
        files = [state for source in data.sources for state in _file_states(source, "train")]
        if data.validation is not None:
            files += _file_states(data.validation, "validation")
        pace = data.streaming and config.train.batch_size
        key = repr((data, length, config.seed, as_pairs, files, pace))
        if key not in self._sets:
            load = StreamedSet if data.streaming else load_training_set
            training_set = load(data, self._tokenizer, length, config.seed, as_pairs=as_pairs)
            read = training_set, prompt_form(data, self._tokenizer)
            self._sets = dict([*self._sets.items()][1 - KEPT_TRAINING_SETS :]) | {key: read}
        return self._sets[key]

    def questions(self, config: EvaluationConfig) -> list[ChoiceQuestion]:
        key = repr((config, _file_states(config, config.split)))
        if key not in self._questions:
            how = (config.task, config.scoring, config.split, config.path, config.limit)
            self._questions[key] = load_question_set(*how).questions
        return self._questions[key]


def _file_states(
    source: SourceConfig | EvaluationConfig, split: str
) -> list[tuple[Path, int, int]]:
    """Name the files on the disk that a source is read from, with their sizes and times."""
    split, files = source.split or split, list[object]()
    if source.task is not None:
        task = find_task(source.task)
        files += [task.path, task.find_data(split, source.path)]
    if isinstance(source, SourceConfig):
        if source.dataset is not None:
            files.append(find_location(source.dataset, split, source.config))
        texts = (source.template, source.chat_template)
        files += [Path(os.path.expanduser(text)) for text in texts if text]
    found = [(one, os.stat(one)) for one in files if isinstance(one, Path) and os.path.isfile(one)]
    return [(file, state.st_size, state.st_mtime_ns) for file, state in found]


def check_data(run: RunConfig) -> None:
    """Read the data of a run's first jobs without a base model, to find faults in it."""
    data = JobData(load_tokenizer(run.base_model))
    for config in run.first_jobs:
        with naming(config):
            data.training_set(config)
            for one in config.eval:
                data.questions(one)


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

    def build(self, config: JobConfig) -> Job:
        host, before = self._host, set(self._host.adapters)
        try:
            with naming(config):
                if config.train.packing:
                    host.check_packing()
                adapter = host.add(config.name, config.adapter, config.seed)
                starts = list[StoredAdapter]()
                if config.start_from is not None:
                    starts = load_start(host, adapter, config.start_from)
                reference = objectives.load_reference(host, config.train.objective)
                training_set, form = self._data.training_set(config)
                adapter.prompt = form
                _check_lengths(config, training_set, host.config.max_position_embeddings)
                questions = {one: self._data.questions(one) for one in config.eval}
                scale = optimizers.make_loss_scale(host)
                warnings = list(_form_warnings(starts, form))
                return Job(config, adapter, training_set, reference, scale, questions, warnings)
        except BaseException:
            for name in host.adapters.keys() - before:
                host.remove(name)
            raise

    def input_digests(self, job: Job) -> dict[str, str]:
        digests = {"examples": job.training_set.digest}
        if job.config.eval:
            digests["questions"] = " ".join(map(questions_digest, job.questions.values()))
        if job.reference is not None and job.reference.adapter_name is not None:
            digests["reference"] = adapter_digest(self._host.adapter(job.reference.adapter_name))
        return digests

    def measure(self, jobs: Sequence[Job]) -> dict[str, dict[str, float]]:
        """Measure jobs: `eval/loss` as a step would compute it, and `eval/<task>/accuracy`."""
        metrics: dict[str, dict[str, float]] = {job.name: {} for job in jobs}
        held_out = [job for job in jobs if job.training_set.validation]
        rows = {
            job.name: [r for e in job.training_set.validation for r in e.rows] for job in held_out
        }
        objectives.ask_references(self._host, [(job.reference, rows[job.name]) for job in held_out])
        scores = iter(label_log_probs(self._host, [(name, r) for name in rows for r in rows[name]]))
        for job in held_out:
            log_probs = [next(scores) for _ in rows[job.name]]
            references = None
            if job.reference is not None:
                references = torch.tensor(job.reference.of(rows[job.name]), dtype=torch.float64)
            scored = objectives.ScoredSamples(
                torch.cat(log_probs), list(map(len, log_probs)), references
            )
            terms = job.objective(scored, objectives.count_totals(job.training_set.validation))
            values = [("loss", terms.loss), *terms.metrics.items(), ("loss", terms.loss)]
            found = {f"eval/{name}": float(value) for name, value in values}
            # others that are not finite are left out, as in a step's line
            needed = ("eval/loss", job.selection.metric)
            metrics[job.name] |= {k: v for k, v in found.items() if k in needed or math.isfinite(v)}
        asked: dict[tuple[EvaluationConfig, int], list[Job]] = {}
        for job in jobs:
            for config, questions in job.questions.items():
                asked.setdefault((config, id(questions)), []).append(job)
        for (config, _), group in asked.items():
            names, questions = [job.name for job in group], group[0].questions[config]
            accuracies = score_accuracy(self._host, self._tokenizer, questions, names)
            for name in names:
                metrics[name][config.metric] = accuracies[name]
        return metrics

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
    config: JobConfig, training_set: TrainingSet | StreamedSet, positions: int
) -> None:
    longest = training_set.longest
    missing = "measure eval/loss on" if longest else "learn from"
    if not longest or (config.data.has_validation and not training_set.validation):
        raise DataError(
            f"data must have examples to {missing}, got none ({'; '.join(training_set.report)}); "
            "add rows, or raise max_length"
        )
    held_out = (len(row.input_ids) for one in training_set.validation for row in one.rows)
    most = max([longest, *held_out])
    if most > positions:
        has = "one may have" if isinstance(training_set, StreamedSet) else "the longest has"
        raise DataError(
            f"examples must fit the model's {positions} positions, {has} {most} tokens; set "
            f"train.max_length, {config.train.max_length}, to {positions} or less"
        )


def _form_warnings(starts: Sequence[StoredAdapter], form: PromptForm) -> Iterator[str]:
    for start in starts:
        learned = start.prompt
        if learned is None or "text" in (learned.format, form.format):  # no prompts
            continue
        is_equal = learned == form.model_copy(update={"system": learned.system})
        if not (is_equal or (learned.is_text and form.is_text)):
            forms = [shown(each.model_dump(exclude_none=True)) for each in (learned, form)]
            yield (
                f"start_from {start.source} learned prompts of form {forms[0]}, but this job's "
                f"have {forms[1]}; training continues, far from what that adapter learned; write "
                "the data in its form (data.template, data.chat_template)"
            )


def load_start(
    host: Host, adapter: Adapter, start: str | Mapping[str, float]
) -> list[StoredAdapter]:
    """Load the weights of an adapter, or of a sum, and return what was read."""
    paths = [start] if isinstance(start, str) else [*start]
    stored = [read_stored(find_adapter(path)) for path in paths]
    if isinstance(start, str):
        _load_whole(host, adapter, stored[0], start)
        return stored
    sources = [fit_to_base(source, host.base) for source in stored]
    (config, tensors), wanted = concatenate(sources, list(start.values())), adapter.config
    given = ", ".join(start)
    check_is_lora(wanted, f"a sum to start_from, {given}, needs a job with method: lora")
    refuse_own_parts(wanted, "a job", "start from a sum")
    shapes = {name: tensor.shape for name, tensor in adapter.tensors().items()}
    if shapes != {name: tensor.shape for name, tensor in tensors.items()}:
        needed = config.model_dump(include={"rank_pattern"}, exclude_defaults=True)
        needed = {"rank": config.rank, **needed}
        raise ConfigError(
            f"start_from a sum requires a job with the adapters' projections and {needed}, got "
            f"rank {wanted.rank} for {given}"
        )
    for name, tensor in tensors.items():
        key = TensorKey.parse(name)
        if key is not None and key.part == "lora_B":
            tensor /= wanted.scaling_of(replace(key, part=""))
    adapter.load_tensors(tensors)
    return stored


def _load_whole(host: Host, adapter: Adapter, source: StoredAdapter, path_or_hub_id: str) -> None:
    config, tensors = fit_to_base(source, host.base)
    # What decides how weights are used, and most of what decides their shapes.
    wanted, stored = (
        {**one.summary(), "tokens": own_parts(one, host.base).tokens}
        for one in (adapter.config, config)
    )
    differences = (name for name, value in wanted.items() if stored.get(name) != value)
    if changed := [
        f"{name} is {wanted[name]!r} and that adapter's {stored.get(name)!r}"
        for name in differences
    ]:
        raise ConfigError(f"start_from {path_or_hub_id} differs from the job: {'; '.join(changed)}")
    adapter.load_tensors(tensors)
