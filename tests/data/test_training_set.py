from __future__ import annotations

import json
from collections import Counter

import pytest

from loraloom.config.data import DataConfig
from loraloom.data.tasks import find_task
from loraloom.data.tokens import NO_LOSS
from loraloom.data.training_set import load_training_set
from loraloom.errors import DataError

BAD = {"role": "assistant", "content": "green"}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def alpaca(tmp_path):
    """A file of 40 instructions, all different."""
    rows = [{"instruction": f"Say {n}.", "input": "", "output": f"{n}"} for n in range(40)]
    return write_rows(tmp_path / "alpaca.jsonl", rows)


@pytest.fixture
def quiz(tmp_path):
    """A directory with ten PIQA rows for training and four for validation."""
    directory = tmp_path / "piqa"
    directory.mkdir()
    for split, count in (("train", 10), ("validation", 4)):
        rows = [
            {"goal": f"{split} goal {n}", "sol1": "yes", "sol2": "no", "label": n % 2}
            for n in range(count)
        ]
        write_rows(directory / f"{split}.jsonl", rows)
    return str(tmp_path)


def load(tokenizer, *, max_length=64, seed=0, as_pairs=False, **data):
    config = DataConfig.model_validate(data)
    return load_training_set(config, tokenizer, max_length, seed, as_pairs=as_pairs)


def answer(tokenizer, example):
    return tokenizer.decode([label for label in example.labels if label != NO_LOSS])


def test_instructions_become_examples(tiny_tokenizer, alpaca):
    loaded = load(tiny_tokenizer, dataset=alpaca, format="instruction", template="plain")
    text = tiny_tokenizer.decode(loaded.examples[7].input_ids)
    assert text == "Say 7.\n7<eos>"
    assert answer(tiny_tokenizer, loaded.examples[7]) == "\n7<eos>"
    assert [example.sample_id for example in loaded.examples] == list(range(40))
    assert loaded.validation == []


def test_text_and_chat_become_examples(tiny_tokenizer, tmp_path):
    tiny_tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    turns = [{"role": "user", "content": "sky?"}, {"role": "assistant", "content": "blue"}]
    chat = write_rows(tmp_path / "chat.jsonl", [{"turns": turns}])
    text = write_rows(tmp_path / "text.jsonl", [{"body": "The sky"}])
    loaded = load(
        tiny_tokenizer,
        mix=[
            {"dataset": chat, "format": "chat", "fields": {"messages": "turns"}},
            {"dataset": text, "format": "text", "fields": {"text": "body"}, "expert_group": 1},
        ],
    )
    assert [example.expert_group for example in loaded.examples] == [0, 1]
    assert answer(tiny_tokenizer, loaded.examples[0]) == "blue<eos>"
    assert answer(tiny_tokenizer, loaded.examples[1]) == "The sky<eos>"
    assert [example.sample_id for example in loaded.examples] == [0, 1]


@pytest.mark.parametrize(("scoring", "completion"), [("label", " B<eos>"), ("text", " no<eos>")])
def test_a_choice_task_is_learnt_in_either_scoring(tiny_tokenizer, quiz, scoring, completion):
    loaded = load(tiny_tokenizer, max_length=256, task="piqa", path=quiz, scoring=scoring)
    assert answer(tiny_tokenizer, loaded.examples[1]) == completion


def test_the_report_tells_what_was_cut_and_dropped(tiny_tokenizer, tmp_path):
    rows = [
        {"instruction": "short", "output": "yes"},
        {"instruction": "what color is the sky " * 10, "output": "yes"},
        {"instruction": "short", "output": "what color is the sky " * 10},
    ]
    path = write_rows(tmp_path / "a.jsonl", rows)
    loaded = load(
        tiny_tokenizer, max_length=20, dataset=path, format="instruction", template="plain"
    )
    tokens = sum(len(example.input_ids) for example in loaded.examples)
    assert len(loaded.examples) == 2
    assert loaded.report == (
        f"{path}: 3 rows, 2 examples, {tokens} tokens, 0 held out; 1 cut or divided to fit "
        "max_length=20; 1 dropped, their answer does not fit",
    )


def test_a_source_of_which_nothing_fits_is_refused(tiny_tokenizer, alpaca):
    with pytest.raises(DataError, match="none of the 40 rows has an answer that fits max_length=2"):
        load(tiny_tokenizer, max_length=2, dataset=alpaca, format="instruction")


def test_a_row_without_its_field_names_file_and_line(tiny_tokenizer, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"text": "one"}, {"body": "two"}])
    with pytest.raises(DataError, match=r"a.jsonl, line 2: the row has no field 'text'"):
        load(tiny_tokenizer, dataset=path, format="text")


def test_an_epoch_has_every_example_once_in_an_order_of_its_own(tiny_tokenizer, alpaca):
    loaded = load(tiny_tokenizer, dataset=alpaca, format="instruction", max_length=256)
    orders = [loaded.epoch_order(epoch) for epoch in range(3)]
    assert loaded.epoch_length == 40
    for order in orders:
        assert sorted(order) == list(range(40))
    assert orders[0] != orders[1] != orders[2]
    assert loaded.epoch_order(1) == orders[1]


def test_another_seed_gives_another_order(tiny_tokenizer, alpaca):
    one, other = (
        load(tiny_tokenizer, seed=seed, dataset=alpaca, format="instruction", max_length=256)
        for seed in (0, 1)
    )
    assert one.epoch_order(0) != other.epoch_order(0)
    assert one.examples == other.examples


def test_weights_say_how_often_a_source_is_drawn(tiny_tokenizer, alpaca, quiz):
    loaded = load(
        tiny_tokenizer,
        max_length=256,
        mix=[
            {"dataset": alpaca, "format": "instruction", "weight": 0.25},
            {"task": "piqa", "path": quiz, "weight": 2.5},
        ],
    )
    counts = [Counter(loaded.epoch_order(epoch)) for epoch in (0, 1)]
    for drawn in counts:
        assert sum(drawn[index] for index in range(40)) == 10
        assert max(drawn[index] for index in range(40)) == 1
        assert sorted(drawn[index] for index in range(40, 50)) == [2] * 5 + [3] * 5
    assert loaded.epoch_length == 35
    assert set(counts[0]) != set(counts[1])


def test_a_fraction_is_held_out_for_good(tiny_tokenizer, alpaca):
    data = {"dataset": alpaca, "format": "instruction", "validation_fraction": 0.25}
    loaded = load(tiny_tokenizer, max_length=256, **data)
    assert (len(loaded.examples), len(loaded.validation)) == (30, 10)
    ids = [example.sample_id for example in [*loaded.examples, *loaded.validation]]
    assert sorted(ids) == list(range(40))
    assert loaded.epoch_length == 30
    assert load(tiny_tokenizer, max_length=256, **data).validation == loaded.validation
    assert load(tiny_tokenizer, max_length=256, seed=1, **data).validation != loaded.validation


def test_equal_rows_stay_on_one_side(tiny_tokenizer, tmp_path):
    rows = [{"text": f"row {n % 8}"} for n in range(80)]
    path = write_rows(tmp_path / "a.jsonl", rows)
    loaded = load(tiny_tokenizer, dataset=path, format="text", validation_fraction=0.3)
    learnt = {example.input_ids for example in loaded.examples}
    measured = {example.input_ids for example in loaded.validation}
    assert learnt
    assert measured
    assert not learnt & measured


def test_too_few_rows_to_hold_any_out_are_refused(tiny_tokenizer, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"text": "one"}])
    with pytest.raises(DataError, match=r"validation_fraction=0.5 of 1 rows leaves nothing"):
        load(tiny_tokenizer, dataset=path, format="text", validation_fraction=0.5)


@pytest.mark.parametrize(
    ("scoring", "answers"), [("label", [" A<eos>", " B<eos>"]), ("text", [" yes<eos>", " no<eos>"])]
)
def test_a_task_gives_preferences_of_the_right_answer_over_a_wrong_one(
    tiny_tokenizer, quiz, scoring, answers
):
    data = {"task": "piqa", "path": quiz, "scoring": scoring}
    loaded = load(tiny_tokenizer, max_length=256, as_pairs=True, **data)
    pairs = [[answer(tiny_tokenizer, row) for row in pair.rows] for pair in loaded.examples[:2]]
    assert pairs == [answers, answers[::-1]]
    ids = [row.sample_id for pair in loaded.examples for row in pair.rows]
    assert ids == list(range(20))
    assert "10 rows, 10 pairs, " in loaded.report[0]


def test_wrong_answers_take_turns():
    task = find_task("skills")
    rows = task.load_rows("train")[:12]
    questions = [task.question(row, 0, "text") for row in rows]
    for index, (row, question) in enumerate(zip(rows, questions, strict=True)):
        right, wrong = task.preference_texts(row, index, "text")
        choices = list(zip(question.contexts, question.continuations, strict=True))
        assert right == choices.pop(question.gold)
        assert wrong == choices[index % len(choices)]


def test_preferences_are_held_out_as_pairs(tiny_tokenizer, tmp_path):
    rows = [{"prompt": f"{n}?", "chosen": " yes", "rejected": " no"} for n in range(8)]
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    data = {"dataset": path, "format": "preference", "validation_fraction": 0.25}
    loaded = load(tiny_tokenizer, as_pairs=True, **data)
    assert (len(loaded.examples), len(loaded.validation)) == (6, 2)
    assert all(len(pair.rows) == 2 for pair in [*loaded.examples, *loaded.validation])


def test_a_validation_source_is_read_from_its_validation_split(tiny_tokenizer, quiz):
    loaded = load(
        tiny_tokenizer,
        max_length=256,
        task="piqa",
        path=quiz,
        validation={"task": "piqa", "path": quiz, "scoring": "text"},
    )
    assert (len(loaded.examples), len(loaded.validation)) == (10, 4)
    text = tiny_tokenizer.decode(loaded.validation[0].input_ids)
    assert text.startswith("Question: validation goal 0\nAnswer:")
    assert loaded.epoch_length == 10
    assert len(loaded.report) == 2


def test_real_data_sets_load(tiny_tokenizer, shared_dir):
    directory = str(shared_dir / "data" / "dolly_3k")
    loaded = load(tiny_tokenizer, max_length=512, dataset=directory, format="instruction")
    assert loaded.report[0].startswith(f"{directory}: 2996 rows, ")
    assert max(len(example.input_ids) for example in loaded.examples) <= 512
    end = tiny_tokenizer.eos_token_id
    assert all(example.labels[-1] == end for example in loaded.examples)


def test_a_validation_file_that_is_the_training_file_is_told(tiny_tokenizer, alpaca):
    source = {"dataset": alpaca, "format": "instruction"}
    loaded = load(tiny_tokenizer, max_length=128, **source, validation=source)
    assert loaded.warnings == (
        "warning: 40 of 40 held-out examples are learnt too; eval/loss shows how well they are "
        "remembered",
    )


def test_other_validation_rows_are_told_of_in_no_warning(tiny_tokenizer, alpaca):
    loaded = load(
        tiny_tokenizer,
        max_length=128,
        dataset=alpaca,
        format="instruction",
        validation_fraction=0.2,
    )
    assert loaded.warnings == ()


TURN = {"role": "user", "content": "sky?"}
GOOD_AND_EMPTY = {
    "instruction": [{"instruction": "Say", "output": output} for output in ("a", " ")],
    "text": [{"text": "a"}, {"text": None}],
    "preference": [{"prompt": "sky?", "chosen": chosen, "rejected": "no"} for chosen in ("a", "")],
    "chat": [{"messages": [TURN, {**BAD, "content": text}]} for text in ("green", "")],
}


@pytest.mark.parametrize("data_format", GOOD_AND_EMPTY)
def test_an_empty_answer_is_an_error_unless_it_is_skipped(tiny_tokenizer, tmp_path, data_format):
    tiny_tokenizer.chat_template = "{% for m in messages %}{{ m.content }};{% endfor %}"
    path = write_rows(tmp_path / "a.jsonl", GOOD_AND_EMPTY[data_format])
    data = {"dataset": path, "format": data_format, "as_pairs": data_format == "preference"}
    advice = "fill it in, remove the row, or set on_empty: skip"
    with pytest.raises(DataError, match=rf"a\.jsonl, line 2.* is empty.*; {advice}"):
        load(tiny_tokenizer, **data)
    loaded = load(tiny_tokenizer, **data, on_empty="skip")
    assert len(loaded.examples) == 1
    assert loaded.report[0].endswith("; 1 skipped, their answer is empty")


def test_all_faulty_rows_are_in_one_message(tiny_tokenizer, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("instruction,output\nSay 1,\nSay 2,b\nSay 3\nSay 4,\nSay 5,e,f\n")
    with pytest.raises(DataError) as error:
        load(tiny_tokenizer, dataset=str(path), format="instruction")
    head, *lines = str(error.value).splitlines()
    assert head == f"{path}: 4 of 5 rows can't be used:"
    assert [line.partition(":")[0] for line in lines] == ["  lines 2, 5", "  line 4", "  line 6"]


def test_a_column_that_a_format_needs_is_named_with_its_setting(tiny_tokenizer, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"instruction": "Say", "reply": "a"}] * 3)
    message = "no field 'output', the output of format instruction; .* fields: {output: COLUMN}"
    with pytest.raises(DataError, match=message):
        load(tiny_tokenizer, dataset=path, format="instruction")


def test_a_chat_template_of_ones_own_is_taken(tiny_tokenizer, tmp_path):
    turns = [{"role": "user", "content": "sky?"}, {"role": "assistant", "content": "blue"}]
    chats = write_rows(tmp_path / "chat.jsonl", [{"messages": turns}])
    pairs = write_rows(tmp_path / "pairs.jsonl", [{"chosen": turns, "rejected": [turns[0], BAD]}])
    template = "{% for m in messages %}{{ m.content }};{% endfor %}"
    source = {"chat_template": template}
    (example,) = load(tiny_tokenizer, dataset=chats, format="chat", **source).examples
    assert tiny_tokenizer.decode(example.input_ids) == "sky?;blue;"
    loaded = load(tiny_tokenizer, dataset=pairs, format="preference", as_pairs=True, **source)
    assert tiny_tokenizer.decode(loaded.examples[0].rejected.input_ids) == "sky?;green;"


def test_a_column_of_fields_must_be_there_though_what_it_holds_may_be_absent(
    tiny_tokenizer, tmp_path
):
    turns = [{"role": "user", "content": "sky?"}, {"role": "assistant", "content": "blue"}]
    chats = write_rows(tmp_path / "chat.jsonl", [{"messages": turns, "functions": None}])
    settings = {
        "format": "chat",
        "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
    }
    load(tiny_tokenizer, dataset=chats, fields={"tools": "functions"}, **settings)
    with pytest.raises(DataError, match="the row has no field 'function'"):
        load(tiny_tokenizer, dataset=chats, fields={"tools": "function"}, **settings)


def test_answers_of_a_pair_that_are_one_another_are_refused(tiny_tokenizer, tmp_path):
    turns = [{"role": "user", "content": "sky?"}, BAD]
    pairs = write_rows(tmp_path / "pairs.jsonl", [{"chosen": turns, "rejected": turns}])
    tiny_tokenizer.chat_template = "{% for m in messages %}{{ m.content }};{% endfor %}"
    with pytest.raises(
        DataError, match="line 1: the conversation has no assistant's turn to learn"
    ):
        load(tiny_tokenizer, dataset=pairs, format="preference", as_pairs=True)
