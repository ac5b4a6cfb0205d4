"""Choice tasks: one row, two ways to ask and to score it.

`label`: the question with its lettered choices, the answer is a label. The prompts are those of the
paper's own code. `text`: the question alone, the answer is the choice's own text. Prompts,
delimiters and normalisation are those of the lm-eval task.

Source: Li et al. 2024, MixLoRA, arXiv:2404.15159, with MoE-PEFT `moe_peft/tasks/qa_tasks.py`;
lm-eval 0.4.13 `lm_eval/tasks/`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loraloom.config.data import Scoring
from loraloom.data.examples import ChoiceQuestion
from loraloom.data.files import read_file
from loraloom.data.locations import HubSource, SplitFiles, find_named, read_hub
from loraloom.data.rows import Row
from loraloom.errors import DataError, shown

Generator = Callable[[str], list[dict[str, Any]]]
"""Makes the rows of a split."""


@dataclass(frozen=True)
class ChoiceForm:
    """A row as one scoring asks it: an entry for each choice, and which one is right.

    A continuation includes its leading delimiter; a normalizer divides its log-likelihood.
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    normalizers: tuple[float, ...]
    labels: tuple[str, ...]
    gold: int
    group: str | None = None


@dataclass(frozen=True)
class ChoiceTask:
    """A data set of choice questions and how its rows are asked.

    `name` is the task's name and that of its directory, `evaluation_split` the split that is
    reported, `source` the copy on the hub, local files, or the function that generates the rows
    (None: a path must be given); `by_label` and `by_text` put a row into words, `scoring` says
    which of them does so by default.
    """

    name: str
    evaluation_split: str
    source: HubSource | SplitFiles | Generator | None
    by_label: Callable[[Row], ChoiceForm]
    by_text: Callable[[Row], ChoiceForm]
    scoring: Scoring = "label"

    def load_rows(self, split: str, path: str | Path | None = None) -> list[Row]:
        """The rows of a split, from a local copy where a path is given, else from the source."""
        data = self.find_data(split, path)
        if isinstance(data, Path):
            return read_file(data)
        if isinstance(data, HubSource):
            return read_hub(data, split)
        return [
            Row(fields, f"{self.name}, {split}, row {number}")
            for number, fields in enumerate(data(split), start=1)
        ]

    def find_data(self, split: str, path: str | Path | None = None) -> Path | HubSource | Generator:
        """Where the rows of a split come from: a file, the hub, or a function."""
        source = self.source
        if path is not None and callable(source):
            raise DataError(f"{self.name} is generated and takes no path, got {path}; leave it out")
        if path is not None:
            return find_named(Path(path), self.name, split)
        if source is None:
            raise DataError(f"{self.name} has no data of its own; give its path")
        return source.find(split) if isinstance(source, SplitFiles) else source

    def question(self, row: Row, index: int, scoring: Scoring) -> ChoiceQuestion:
        """The row as a question."""
        return ChoiceQuestion(task=self.name, index=index, **vars(self._form(row, scoring)))

    def training_text(self, row: Row, scoring: Scoring) -> tuple[str, str]:
        """The row as prompt and completion, those of the right answer."""
        form = self._form(row, scoring)
        return form.contexts[form.gold], form.continuations[form.gold]

    def preference_texts(
        self, row: Row, index: int, scoring: Scoring
    ) -> tuple[tuple[str, str], tuple[str, str]]:
        """The row as two prompts and completions: those of the right answer and of a wrong one.

        Which of the wrong ones goes round with the row's place in the split.
        """
        form = self._form(row, scoring)
        wrong = [choice for choice in range(len(form.contexts)) if choice != form.gold]
        if not wrong:
            row.reject("a preference needs a wrong choice beside the right one, got one choice")
        chosen, rejected = form.gold, wrong[index % len(wrong)]
        return (
            (form.contexts[chosen], form.continuations[chosen]),
            (form.contexts[rejected], form.continuations[rejected]),
        )

    def _form(self, row: Row, scoring: Scoring) -> ChoiceForm:
        return self.by_text(row) if scoring == "text" else self.by_label(row)


def choose_label(
    prompt: str, labels: Sequence[str], gold: int, group: str | None = None
) -> ChoiceForm:
    """Ask for a label after a prompt that ends with the answer's cue."""
    return choose_text(prompt, labels, labels, gold, group)


def choose_text(
    prompt: str,
    answers: Sequence[str],
    labels: Sequence[str],
    gold: int,
    group: str | None = None,
) -> ChoiceForm:
    """Compare the answers by log-likelihood: lm-eval's `acc`."""
    return ChoiceForm(
        contexts=(prompt,) * len(answers),
        continuations=tuple(f" {answer}" for answer in answers),
        normalizers=(1.0,) * len(answers),
        labels=tuple(labels),
        gold=gold,
        group=group,
    )


def choose_text_per_character(
    prompt: str,
    answers: Sequence[str],
    labels: Sequence[str],
    gold: int,
    group: str | None = None,
) -> ChoiceForm:
    """Compare the answers by log-likelihood per character: lm-eval's `acc_norm`.

    The delimiter does not count as a character.
    """
    lengths = tuple(float(max(len(answer), 1)) for answer in answers)
    return replace(choose_text(prompt, answers, labels, gold, group), normalizers=lengths)


def lettered_lines(answers: Sequence[str]) -> str:
    """The choices as lines `(A) first`, `(B) second` ..., each after a line break."""
    return "".join(
        f"\n({label}) {answer}"
        for label, answer in zip(letters(len(answers)), answers, strict=True)
    )


def letters(count: int) -> tuple[str, ...]:
    """The labels A, B, C ..."""
    return tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"[:count])


def published(row: Row, field: str, gold: int, num_choices: int) -> int:
    """The index of the right choice, as it came."""
    if not 0 <= gold < num_choices:
        row.reject(
            f"field {field!r} must name one of {num_choices} choices, got {shown(row[field])}; "
            "a split without published labels can't be used"
        )
    return gold
