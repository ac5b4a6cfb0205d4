"""lm-eval's tasks by name, and those of a directory of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from loraloom.config.fields import suggestion
from loraloom.errors import ConfigError, DataError


def load_tasks(names: Sequence[str], include: Path | None = None) -> list[Task | Group]:
    """Load tasks, groups of tasks and tags with their data."""
    manager = _find_manager(names, include)
    tasks = dict.fromkeys(match for name in names for match in _match(manager, name))
    loaded = [task for name in tasks for task in _load(manager, name)]
    try:
        manager.load(loaded)
    except ValueError as error:
        raise ConfigError(f"--harness must name each task once; {error}") from None
    return loaded


def check_asks_text(loaded: Sequence[Task | Group]) -> None:
    """Refuse tasks that lm-eval wouldn't ask, before the model is there."""
    groups = [one.get_all_tasks() if isinstance(one, Group) else [one] for one in loaded]
    for mark, what in (("UNSAFE_CODE", "run code of the model's"), ("MULTIMODAL", "need images")):
        found = [task.task_name for group in groups for task in group if getattr(task, mark, False)]
        if found:
            raise ConfigError(f"--harness does not support tasks that {what}: {', '.join(found)}")


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
    if matches := manager.match_tasks([name]):
        return list(matches)
    raise ConfigError(
        f"{suggestion(name, manager.all_tasks)}task must be one of lm-eval's "
        f"(`lm-eval ls tasks` lists them) or of --harness-include, got {name!r}"
    )


def _load(manager: TaskManager, name: str) -> list[Task | Group]:
    try:
        loaded = manager.load([name])
    except Exception as error:  # of datasets, jinja2, yaml and the tasks' own code
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise DataError(
            f"task {name} could not be loaded: {reason}; without a network, list its files in a "
            "task of --harness-include (dataset_path: json, dataset_kwargs: data_files)"
        ) from error
    groups, tasks = loaded.get("groups", {}), loaded["tasks"]
    return [groups[name]] if name in groups else list(tasks.values())
