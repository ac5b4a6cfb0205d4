r"""A choice task of one's own: what its YAML file says.

data: {files: {train: train.jsonl, test: test.jsonl}}
template: "Question: {{ question }}\nAnswer:"
choices: options
answer: answer
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator
from typing_extensions import override

from loraloom.config.data import Scoring
from loraloom.config.fields import StrictModel, checked
from loraloom.config.text import read_settings
from loraloom.errors import ConfigError

Text = Annotated[str, Field(min_length=1, coerce_numbers_to_str=True)]
Texts = Text | Annotated[tuple[Text, ...], Field(min_length=2)]


class TaskDataConfig(StrictModel):
    """Where a task's rows are: local files, or a data set on the hub."""

    files: dict[str, str] | None = Field(default=None, min_length=1)
    """The file of each split: .json, .jsonl, .csv or .parquet, all of them also gzipped.

    A relative path starts at the task's file."""
    hub: Text | None = None
    """Id of a data set on the Hugging Face hub."""
    config: Text | None = None
    """Hub: name of the configuration."""
    revision: Text | None = None
    """Hub: commit, tag or branch; a commit makes results repeatable."""

    @override
    def contradictions(self) -> Iterator[str]:
        if (self.hub is None) == (self.files is None):
            yield "a task must set either hub or files"


# A task's settings that one scoring overrides.
Overrides = dict[
    Literal["choices", "labels", "answer", "answer_is", "continuation", "normalization"], Any
]


class TaskConfig(StrictModel):
    """A choice task: its data, and how a row becomes a question.

    Templates are Jinja and see the row's fields, `choice_texts` and `choice_labels`. A field's name
    may lead into another field: `choices.text`.
    """

    data: TaskDataConfig | None = None
    """Location of the rows; null if they always come from --data or path."""
    evaluation_split: Text = "test"
    """Split to score."""
    scoring: Scoring = "text"
    """Default scoring: by the choice's label or by its text."""
    template: dict[Scoring, Text]
    """The prompt: {label: ..., text: ...}, or a string, which is that of the default `scoring`."""
    choices: Texts
    """The choices' texts: the field that lists them, or a list of templates, one a choice."""
    labels: Texts | None = None
    """The choices' labels: the field that lists them, or a list; null for A, B, C, ..."""
    answer: Text
    """The right choice: a field, or a template."""
    answer_is: Literal["label", "index", "text"] = "label"
    """Whether the answer is the choice's label, its index from 0, or its text."""
    continuation: Text | None = None
    """Template of the text to score instead of the choice. The prompt is then rendered per choice,
    with the variable `choice`."""
    delimiter: str = " "
    """String between prompt and answer."""
    normalization: Literal["characters", "none"] = "characters"
    """Scoring text: compare log-likelihoods per character (lm-eval's acc_norm), or sums (acc)."""
    group: Text | None = None
    """Field to group results by, for example a topic."""
    label: Overrides = Field(default_factory=dict)
    """Settings that differ if labels are scored."""
    text: Overrides = Field(default_factory=dict)
    """Settings that differ if texts are scored."""

    def asked_by(self, scoring: Scoring, origin: str = "") -> TaskConfig:
        differing = self.label if scoring == "label" else self.text
        return checked(TaskConfig, self.model_dump() | differing, origin=origin)

    @field_validator("template", mode="before")
    @classmethod
    def _name_scoring(cls, template: Any, info: Any) -> Any:
        is_text = isinstance(template, str) and template != ""
        return {info.data.get("scoring", "text"): template} if is_text else template

    @override
    def contradictions(self) -> Iterator[str]:
        if self.scoring not in self.template:
            yield f"template must have a text for scoring {self.scoring}"


def load_task_config(path: str | Path) -> TaskConfig:
    settings = read_settings(path, "a task's file")
    if "metric" in settings:
        raise ConfigError(f"{path} is for evaluation only. Name a choice task.")
    return checked(TaskConfig, settings, origin=f"{path}:\n  ")
