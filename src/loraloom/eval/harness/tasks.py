"""lm-eval's tasks by name, with local files in place of the hub's where there are some."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from loraloom.config.fields import suggestion
from loraloom.data.sources import find_splits
from loraloom.errors import ConfigError, DataError

_SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
# What a task says otherwise where the data set's own files differ from the copy that it reads.
_LOCAL_FORMS: dict[str, dict[str, str]] = {
    # the task reads SuperGLUE's copy: titles stand in its passages, labels are numbers
    "boolq": {
        "doc_to_text": "{% if title is defined %}{{title}} -- {% endif %}"
        "{{passage}}\nQuestion: {{question}}?\nAnswer:",
        "doc_to_target": "{{label if label is defined else answer | int}}",
    }
}


def load_tasks(
    names: Sequence[str], include: Path | None = None, data: Path | None = None
) -> list[Task | Group]:
    """Load tasks, groups of tasks and tags with their data."""
    manager = _find_manager(names, include)
    tasks = dict.fromkeys(match for name in names for match in _match(manager, name))
    loaded: list[Task | Group] = []
    with TemporaryDirectory() as scratch:
        for name in tasks:
            files = {} if data is None else find_splits(data, name, alone=len(tasks) == 1)
            loaded += _load(manager, name, _redirect(manager, name, files, Path(scratch)))
    try:
        manager.load(loaded)
    except ValueError as error:
        raise ConfigError(f"--harness must ask each task once; {error}") from None
    return loaded


def check_asks_text(loaded: Sequence[Task | Group]) -> None:
    """Refuse tasks that lm-eval wouldn't ask, before the model is there."""
    groups = [one.get_all_tasks() if isinstance(one, Group) else [one] for one in loaded]
    for mark, what in (("UNSAFE_CODE", "run code of the model's"), ("MULTIMODAL", "need images")):
        found = [task.task_name for group in groups for task in group if getattr(task, mark, False)]
        if found:
            raise ConfigError(f"--harness must leave out tasks that {what}: {', '.join(found)}")


def _find_manager(names: Sequence[str], include: Path | None) -> TaskManager:
    """Index tasks; lm-eval's own, which takes seconds, only where they are needed."""
    if include is None:
        return TaskManager()
    if not include.is_dir():
        raise ConfigError(f"--harness-include must be a directory of YAML files, got {include}")
    manager = TaskManager(include_path=str(include), include_defaults=False)
    has_all = set(names) <= set(manager.all_subtasks)
    return manager if has_all else TaskManager(include_path=str(include))


def _match(manager: TaskManager, name: str) -> list[str]:
    if name.endswith(".yaml") and Path(name).is_file():
        return [name]
    matches = manager.match_tasks([name])
    if not matches:
        raise ConfigError(
            f"{suggestion(name, manager.all_tasks)}task must be one of lm-eval's "
            f"(`lm-eval ls tasks` lists them) or of --harness-include, got {name!r}"
        )
    return list(matches)


def _load(manager: TaskManager, name: str, spec: str) -> list[Task | Group]:
    try:
        loaded = manager.load([spec])
    except Exception as error:  # of datasets, jinja2, yaml and the tasks' own code
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise DataError(
            f"task {name}: it could not be loaded: {reason}; where there is no network, put its "
            "files into the --data directory or into a task of --harness-include"
        ) from error
    groups, tasks = loaded.get("groups", {}), loaded["tasks"]
    return [groups[name]] if name in groups else list(tasks.values())


def _redirect(manager: TaskManager, name: str, files: Mapping[str, Path], scratch: Path) -> str:
    """Write the task anew to read local files, and return the path; its name without files."""
    entry = manager.task_index.get(name)
    if entry is None or entry.yaml_path is None or entry.cfg is None:
        return name
    config: Mapping[str, Any] = entry.cfg
    known = {"train", "validation", "test", *(config.get(key) for key in _SPLITS)}
    files = {split: path for split, path in files.items() if split in known}
    if not files:
        return name
    got = ", ".join(map(str, files.values()))
    split = config.get("test_split") or config.get("validation_split")
    if split not in files:
        raise DataError(
            f"task {name}: its split {split!r} must be among the local files, got {got}"
        )
    suffixes = (Path(path.name.removesuffix(".gz")).suffix for path in files.values())
    builders = {_BUILDERS.get(suffix) for suffix in suffixes}
    if len(builders) > 1 or None in builders:
        types = ", ".join(_BUILDERS)
        raise DataError(f"task {name}: local files must all be of one type of {types}, got {got}")
    changes = {
        "include": str(entry.yaml_path),
        "task": name,
        "dataset_path": builders.pop(),
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {s: str(path.resolve()) for s, path in files.items()}},
        **{key: None for key in _SPLITS if config.get(key) not in (None, *files)},
        **_LOCAL_FORMS.get(name, {}),
    }
    path = scratch / f"{name}.yaml"
    path.write_text(yaml.safe_dump(changes))
    return str(path)
