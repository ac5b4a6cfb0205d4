"""Building jobs: from a job's settings to an adapter on the host with its data, ready to train."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from loraloom.adapters.base import BaseInfo
from loraloom.adapters.method import Adapter, AdapterConfig
from loraloom.adapters.own import own_parts
from loraloom.config.data import DataConfig, is_task_file
from loraloom.config.text import local_path
from loraloom.data.encoding import prompt_form
from loraloom.data.sources import SplitFiles
from loraloom.data.streaming import StreamedSet
from loraloom.data.tasks import find_task
from loraloom.data.training_set import TrainingSet, load_training_set
from loraloom.errors import ConfigError, DataError, LoraloomError
from loraloom.formats.files import read_adapter
from loraloom.models.host import Host
from loraloom.models.layout import check_takes_packed_rows
from loraloom.training.evaluation import Evaluation
from loraloom.training.job import Job
from loraloom.training.settings import JobConfig
from loraloom.training.step.objectives import load_reference
from loraloom.training.step.optimizers import make_loss_scale

KEPT_TRAINING_SETS = 8


class JobBuilder:
    """Builds jobs on one host; jobs with the same data and seed share what was read."""

    def __init__(self, host: Host, tokenizer: PreTrainedTokenizerBase, evaluation: Evaluation):
        self._host = host
        self._tokenizer = tokenizer
        self._evaluation = evaluation
        self._sets: dict[Hashable, TrainingSet | StreamedSet] = {}

    def build(self, config: JobConfig) -> Job:
        """Put a job's adapter on the host, and read its data and what it is measured on."""
        before = set(self._host.adapters)
        try:
            return self._build(config)
        except BaseException as error:
            for name in self._host.adapters.keys() - before:
                self._host.remove(name)
            if isinstance(error, LoraloomError):
                raise type(error)(f"job {config.name}: {error}") from error
            raise

    def _build(self, config: JobConfig) -> Job:
        if config.train.packing:
            check_takes_packed_rows(self._host.config)
        adapter = self._host.add(config.name, config.adapter, config.seed)
        if config.start_from is not None:
            load_start(self._host, adapter, config.start_from)
        reference = load_reference(self._host, config.train.objective)
        training_set = self._training_set(config)
        adapter.prompt = prompt_form(config.data, self._tokenizer)
        _check_enough(config, training_set)
        _check_positions(config, training_set, self._host.config.max_position_embeddings)
        job = Job(config, adapter, training_set, reference, make_loss_scale(self._host))
        self._evaluation.read(config)
        return job

    def _training_set(self, config: JobConfig) -> TrainingSet | StreamedSet:
        data, train, files = config.data, config.train, tuple(_file_versions(config.data))
        as_pairs = train.learns_from_pairs
        key = (data.model_dump_json(), train.max_length, config.seed, as_pairs, files)
        if key not in self._sets:
            if len(self._sets) == KEPT_TRAINING_SETS:
                del self._sets[next(iter(self._sets))]
            common = data, self._tokenizer, train.max_length, config.seed
            self._sets[key] = (
                StreamedSet(*common, as_pairs=as_pairs)
                if data.streaming
                else load_training_set(*common, as_pairs=as_pairs)
            )
        return self._sets[key]


def _file_versions(data: DataConfig) -> Iterator[tuple[str, int, int]]:
    """Tell the local files that data comes from, with time and size: they may change meanwhile."""
    for source in (*data.sources, *([data.validation] if data.validation else [])):
        names = [source.task, source.dataset, source.path, source.template, source.chat_template]
        if source.task is not None and is_task_file(source.task) and source.path is None:
            origin = find_task(source.task).source
            names += map(str, origin.files.values()) if isinstance(origin, SplitFiles) else ()
        for name in names:
            for file in _files_of(name):
                status = file.stat()
                yield str(file), status.st_mtime_ns, status.st_size


def _files_of(name: str | None) -> list[Path]:
    if name is None or "{" in name or "\n" in name:  # a template's text
        return []
    path = local_path(name, "data", DataError)
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    return [path] if path.is_file() else []


def _check_enough(config: JobConfig, training_set: TrainingSet | StreamedSet) -> None:
    has_examples = bool(training_set.longest(1))
    missing = "measure eval/loss on" if has_examples else "learn from"
    if not has_examples or (config.data.has_validation and not training_set.validation):
        raise DataError(
            f"data must have examples to {missing}, got none ({'; '.join(training_set.report)}); "
            "give more rows, or raise max_length"
        )


def _check_positions(
    config: JobConfig, training_set: TrainingSet | StreamedSet, positions: int
) -> None:
    held_out = (len(row.input_ids) for one in training_set.validation for row in one.rows)
    longest = max([*training_set.longest(1)[0], *held_out])
    if longest > positions:
        has = "one may have" if isinstance(training_set, StreamedSet) else "the longest has"
        raise DataError(
            f"examples must fit the model's {positions} positions, {has} {longest} tokens; set "
            f"train.max_length, {config.train.max_length}, to {positions} or less"
        )


def load_start(host: Host, adapter: Adapter, path_or_hub_id: str) -> None:
    """Give a new adapter the weights of another one of the same kind and size."""
    config, tensors = read_adapter(path_or_hub_id, host.base)
    wanted, stored = (_formula(one, host.base) for one in (adapter.config, config))
    changed = [
        f"{name} is {value!r} and that adapter's {stored.get(name)!r}"
        for name, value in wanted.items()
        if stored.get(name) != value
    ]
    if changed:
        raise ConfigError(
            f"start_from needs an adapter with the job's own settings, got {path_or_hub_id}: "
            f"{'; '.join(changed)}"
        )
    adapter.load_tensors(tensors)


def _formula(config: AdapterConfig, base: BaseInfo) -> dict[str, object]:
    """Return what decides how weights are used, and most of what decides their shapes."""
    own = own_parts(config, base)
    tokens = {"trainable_token_indices": own.tokens} if own.tokens else {}
    return {"method": config.method, **config.summary(), **tokens}
