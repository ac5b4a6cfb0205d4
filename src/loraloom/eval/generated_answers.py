r"""Generated answers, compared with a data set's reference answers.

data: {dataset: support_test.jsonl, format: chat}    # as in a run file
metric: exact_match                                  # or contains
sampling: {max_new_tokens: 64, stop: ["\n"]}
"""

import re
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from typing_extensions import override

from loraloom.config.data import SourceConfig, is_data_file, is_task_file, task_name
from loraloom.config.fields import StrictModel, check_name, checked
from loraloom.config.text import read_settings
from loraloom.data import sources
from loraloom.data.chat import read_conversation
from loraloom.data.encoding import given_form
from loraloom.data.templates import read_input
from loraloom.errors import DataError
from loraloom.eval.results import BASE
from loraloom.eval.score import Scorer, Scores
from loraloom.eval.statistics import share_fields
from loraloom.generation.generate import complete, make_requests
from loraloom.generation.prompts import Prompt
from loraloom.generation.request import GenerationRequest
from loraloom.generation.sampling import SamplingConfig, end_tokens
from loraloom.terminal import show_progress

# Answers that are generated at once where no number of tokens is given.
BATCH_SIZE = 16

# A prompt with its place in the split, and the answer to compare with.
AnswerRow = tuple[int, Prompt, str]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
# 5 is not in 15, but words of scripts after Latin, Greek and Cyrillic may have no such borders.
_OF_WORD = r"[^\W\u0530-\u1dff\u2e80-\U0010ffff]"
# Signs that numbers and code need; all other ASCII punctuation is left out.
_KEPT = r"""
    (?<![\w.)])-(?=\$?\.?\d)             # the sign of -5
    | (?<![^\W\d_])(?<!\.)\.(?=\d)        # the point of 1.5 and .5
    | (?<=\d),(?!\d{3}(?!\d))(?=\d)      # 1,5, but not 1,000
    | (?<=\d)[^\w\s,](?=\d)              # 1/2, 12:30
    | (?<=\w)[+\#]+                       # C++, C#
    | (?<=[\w)])\s*[<=>^]+\s*(?=[\w(.-])  # x<=y
"""
_PUNCTUATION = re.compile(rf"({_KEPT})|[{re.escape(string.punctuation)}]", re.VERBOSE)
# Of what is kept, marks inside a number, and signs at the end of a word.
_OF_NUMBER = f"[{re.escape(re.sub('[+#<=>^]', '', string.punctuation))}]"
_BEFORE = rf"(?<!{_OF_WORD})(?<!{_OF_NUMBER})"
_AFTER = rf"(?!{_OF_WORD}|[+#]+(?!\w)|{_OF_NUMBER}\d)"
_OPERATOR = r"[-+/%<=>!&|^~]"


class AnswerTaskConfig(StrictModel):
    """A task of generated answers."""

    data: SourceConfig
    """Prompts with reference answers, as under `data` of a run file: instructions or chats."""
    metric: Literal["exact_match", "contains"] = "exact_match"
    """Whether an answer must equal the reference, or contain it."""
    sampling: SamplingConfig = SamplingConfig()
    """How answers are generated; greedily by default."""

    @override
    def contradictions(self) -> Iterator[str]:
        if self.data.format not in ("instruction", "chat"):
            yield "data must be a dataset of format instruction or chat"


@dataclass(frozen=True)
class AnswerSet:
    """Prompts of a task's split."""

    task: str
    config: AnswerTaskConfig
    details: dict[str, Any]
    rows: Sequence[AnswerRow]


def load_answer_set(
    task: str, split: str | None = None, limit: int | None = None
) -> AnswerSet | None:
    """Load the task of a YAML file with a `metric`; None for a choice task."""
    settings = read_settings(task, "a task's file") if is_task_file(task) else {}
    if "metric" not in settings:
        return None
    config = checked(AnswerTaskConfig, settings, origin=f"{task}:\n  ")
    name = check_name(task_name(task))
    source = config.data
    split = None if is_data_file(source.dataset) else split or source.split or "validation"
    location = sources.find_location(source.dataset or "", split or "", source.config)
    data_rows = sources.read_rows(location, split or "", limit)
    rows: list[AnswerRow] = []
    for index, row in enumerate(data_rows):
        try:
            rows.append((index, *_read_row(row, source)))
        except sources.EmptyAnswerError:
            if source.on_empty != "skip":
                raise
    if not rows:
        raise DataError(f"{task}: no row has a reference answer. Fill in the answers.")
    details = config.model_dump(mode="json", exclude_none=True)
    details |= {"split": split, "source": sources.describe(location), "num_questions": len(rows)}
    return AnswerSet(name, config, details, rows)


def _read_row(row: sources.Row, source: SourceConfig) -> tuple[Prompt, str]:
    if source.format == "chat":
        chat = read_conversation(row, source.fields)
        messages = chat.messages
        first = max(chat.num_prompt_messages, 1)
        last = len(messages) - 1
        while last >= first and messages[last]["role"] != "assistant":
            last -= 1
        if last < first:
            row.reject("the conversation has no assistant's turn after a user's. Add one.")
        answer = messages[last]["content"]
        if not answer.strip():
            row.reject_empty("the last answer is a call of a tool, which has no text to compare")
        return Prompt(tuple(messages[:last]), None, row.origin, chat.tools), answer
    columns = source.columns
    fields = {**row, "input": read_input(row, columns)}
    prompt = Prompt(row.text(columns["instruction"]), None, row.origin, None, fields)
    return prompt, row.answer(columns["output"])


def normalize_answer(text: str, *, keeps_articles: bool = False, keeps_case: bool = False) -> str:
    """Lower the case, and leave out punctuation, articles and repeated spaces.

    Source: SQuAD, `evaluate-v1.1.py` (Rajpurkar et al. 2016). A text of nothing else is kept, and
    so are signs that numbers and code need: -5, 1.5, C++.
    """
    plain = text if keeps_case else text.lower()
    plain = _PUNCTUATION.sub(lambda match: match[1] or "", plain)
    if not keeps_articles:
        plain = _ARTICLES.sub(" ", plain)
    return " ".join(plain.split()) or text.lower().strip()


def is_right(metric: str, answer: str, reference: str) -> bool:
    if not any(map(str.isalnum, reference)):  # + or <=, which no normalized answer has
        answer, reference = answer.strip(), reference.strip()
        before, after = f"(?<!{_OPERATOR})", f"(?!{_OPERATOR})"
    else:
        plain_reference = normalize_answer(reference, keeps_articles=True)
        is_article = _ARTICLES.fullmatch(plain_reference) is not None
        # answers contain a label, as A, in its own case
        normalize = partial(
            normalize_answer,
            keeps_articles=is_article,
            keeps_case=is_article and metric == "contains",
        )
        answer, reference = normalize(answer), normalize(reference)
        before, after = _BEFORE, _AFTER
    if metric == "exact_match":
        return answer == reference
    return re.search(f"{before}{re.escape(reference)}{after}", answer) is not None


def score_answers(data: AnswerSet, scorer: Scorer) -> Scores:
    scores = Scores(data.task, data.details)
    sizes = [1] * len(data.rows) * len(scorer.adapters)
    with show_progress(scorer.console, data.task, sizes) as advance:
        for adapter in scorer.adapters:
            texts = _generate_answers(scorer, data, adapter, advance)
            _add_scores(scores, data, adapter or BASE, texts)
    return scores


def _generate_answers(
    scorer: Scorer,
    data: AnswerSet,
    adapter: str | None,
    on_progress: Callable[[Sequence[int]], object],
) -> list[str]:
    """Let an adapter answer every prompt; answers are kept as scores are."""
    host = scorer.host
    tokenizer = scorer.tokenizer
    sampling = data.config.sampling
    source = data.config.data
    form = given_form(tokenizer, source.template, source.chat_template)
    prompts = [replace(prompt, adapter=adapter) for _, prompt, _ in data.rows]
    requests = make_requests(host, tokenizer, prompts, sampling, prompt_form=form)
    settings = [sampling.model_dump_json(), end_tokens(host, tokenizer)]
    keys = [
        (adapter, [*settings, request.prompt_ids, request.place, request.turn_end])
        for request in requests
    ]
    longest = max(len(request.prompt_ids) for request in requests) + sampling.max_new_tokens
    max_tokens = scorer.max_tokens_per_batch or BATCH_SIZE * longest
    batch_size = max(1, max_tokens // longest)

    def compute(batch: Sequence[GenerationRequest]) -> list[tuple[str]]:
        completions = complete(host, tokenizer, batch, batch_size=batch_size)
        return [(completion.text,) for completion in completions]

    texts: list[str] = []
    for start in range(0, len(requests), batch_size):
        batch = slice(start, start + batch_size)
        for (text,) in scorer.remember(keys[batch], requests[batch], compute):
            texts.append(text)
        on_progress(range(start, len(texts)))
    return texts


def _add_scores(scores: Scores, data: AnswerSet, adapter: str, texts: Sequence[str]) -> None:
    split = data.details["split"]
    correct = []
    for (index, prompt, reference), text in zip(data.rows, texts, strict=True):
        correct.append(is_right(data.config.metric, text, reference))
        line = {
            "task": data.task,
            "split": split,
            "index": index,
            "adapter": adapter,
            "question": _question_text(prompt),
            "reference": reference,
            "answer": text,
            "correct": correct[-1],
        }
        scores.lines.append(line)
    scores.values[adapter] = correct
    scores.results[adapter] = share_fields(correct)
    scores.results[adapter] |= {"metric": data.config.metric, "split": split}


def _question_text(prompt: Prompt) -> str:
    if isinstance(prompt.content, str):
        texts = [prompt.content, prompt.fields.get("input")]
    else:
        texts = [f"{message['role']}: {message['content']}" for message in prompt.content]
    return "\n\n".join(filter(None, texts))
