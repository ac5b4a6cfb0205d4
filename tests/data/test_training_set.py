from collections import Counter

import pytest

from loraloom.config.data import DataConfig
from loraloom.data.tokens import NO_LOSS
from loraloom.data.training_set import load_training_set
from loraloom.errors import DataError
from tests.generation.saved import write_rows

TURN = {"role": "user", "content": "sky?"}
GOOD, BAD = ({"role": "assistant", "content": color} for color in ("blue", "green"))
TEMPLATE = "{% for m in messages %}{{ m.content }};{% endfor %}"


@pytest.fixture
def alpaca(tmp_path):
    """A source of 40 instructions, all different."""
    rows = [{"instruction": f"Say {n}.", "input": "", "output": f"{n}"} for n in range(40)]
    path = write_rows(tmp_path / "alpaca.jsonl", *rows)
    return {"dataset": path, "format": "instruction", "template": "plain"}


@pytest.fixture
def quiz(tmp_path):
    """A source of ten PIQA rows for training and four for validation."""
    directory = tmp_path / "piqa"
    directory.mkdir()
    for split, count in (("train", 10), ("validation", 4)):
        rows = [
            {"goal": f"{split} goal {n}", "sol1": "yes", "sol2": "no", "label": n % 2}
            for n in range(count)
        ]
        write_rows(directory / f"{split}.jsonl", *rows)
    return {"task": "piqa", "path": str(tmp_path)}


def load(tokenizer, *, max_length=256, seed=0, as_pairs=False, **data):
    config = DataConfig.model_validate(data)
    return load_training_set(config, tokenizer, max_length, seed, as_pairs=as_pairs)


def answer(tokenizer, example):
    return tokenizer.decode([label for label in example.labels if label != NO_LOSS])


def test_rows_of_all_formats_become_examples(tiny_tokenizer, tmp_path, alpaca):
    tiny_tokenizer.chat_template = TEMPLATE
    chat = write_rows(tmp_path / "chat.jsonl", {"turns": [TURN, GOOD]})
    text = write_rows(tmp_path / "text.jsonl", {"body": "The sky"})
    loaded = load(
        tiny_tokenizer,
        mix=[
            {"dataset": chat, "format": "chat", "fields": {"messages": "turns"}},
            {"dataset": text, "format": "text", "fields": {"text": "body"}, "expert_group": 1},
            alpaca,
        ],
    )
    assert [example.expert_group for example in loaded.examples[:3]] == [0, 1, 0]
    answers = [answer(tiny_tokenizer, example) for example in loaded.examples[:3]]
    assert answers == ["blue;", "The sky<eos>", "\n0<eos>"]
    assert tiny_tokenizer.decode(loaded.examples[9].input_ids) == "Say 7.\n7<eos>"
    assert [example.sample_id for example in loaded.examples] == list(range(42))
    assert loaded.validation == []


def test_the_report_tells_what_was_cut_and_dropped(tiny_tokenizer, tmp_path):
    rows = [
        {"instruction": "short", "output": "yes"},
        {"instruction": "what color is the sky " * 10, "output": "yes"},
        {"instruction": "short", "output": "what color is the sky " * 10},
    ]
    path = write_rows(tmp_path / "a.jsonl", *rows)
    settings = {"dataset": path, "format": "instruction", "template": "plain"}
    loaded = load(tiny_tokenizer, max_length=20, **settings)
    tokens = sum(len(example.input_ids) for example in loaded.examples)
    assert loaded.report == (
        f"{path}: 3 rows, 2 examples, {tokens} tokens, 0 held out; 1 cut or divided to fit "
        "max_length=20; 1 dropped because their answers do not fit",
    )
    tiny_tokenizer.unk_token = token = tiny_tokenizer.convert_ids_to_tokens(
        loaded.examples[0].labels[-2]
    )
    (report,) = load(tiny_tokenizer, max_length=20, **settings).report
    assert f"; 2 tokens in the loss are {token}; 1 cut or divided" in report
    with pytest.raises(DataError, match="none of the 3 rows has an answer that fits max_length=2;"):
        load(tiny_tokenizer, max_length=2, **settings)


def test_an_epoch_has_every_example_once_in_an_order_by_epoch_and_seed(tiny_tokenizer, alpaca):
    loaded, other = (load(tiny_tokenizer, seed=seed, **alpaca) for seed in (0, 1))
    orders = [loaded.epoch_order(epoch) for epoch in range(3)]
    assert loaded.epoch_length == 40
    for order in orders:
        assert sorted(order) == list(range(40))
    assert orders[0] != orders[1] != orders[2]
    assert loaded.epoch_order(1) == orders[1] != other.epoch_order(1)
    assert loaded.examples == other.examples


def test_weights_say_how_often_a_source_is_drawn(tiny_tokenizer, alpaca, quiz):
    loaded = load(tiny_tokenizer, mix=[{**alpaca, "weight": 0.25}, {**quiz, "weight": 2.5}])
    counts = [Counter(loaded.epoch_order(epoch)) for epoch in (0, 1)]
    for drawn in counts:
        assert sum(drawn[index] for index in range(40)) == 10
        assert max(drawn[index] for index in range(40)) == 1
        assert sorted(drawn[index] for index in range(40, 50)) == [2] * 5 + [3] * 5
    assert loaded.epoch_length == 35
    assert set(counts[0]) != set(counts[1])


def test_a_fraction_is_held_out_for_good(tiny_tokenizer, alpaca):
    data = {**alpaca, "validation_fraction": 0.25}
    loaded = load(tiny_tokenizer, **data)
    assert (len(loaded.examples), len(loaded.validation)) == (30, 10)
    ids = [example.sample_id for example in [*loaded.examples, *loaded.validation]]
    assert sorted(ids) == list(range(40))
    assert load(tiny_tokenizer, **data).validation == loaded.validation
    assert load(tiny_tokenizer, seed=1, **data).validation != loaded.validation


def test_equal_rows_are_held_out_together(tiny_tokenizer, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", *({"text": f"row {n % 8}"} for n in range(80)))
    loaded = load(tiny_tokenizer, dataset=path, format="text", validation_fraction=0.3)
    learnt, measured = (
        {example.input_ids for example in examples}
        for examples in (loaded.examples, loaded.validation)
    )
    assert learnt
    assert measured
    assert not learnt & measured
    write_rows(tmp_path / "a.jsonl", *({"text": f"row {min(n, 40)}"} for n in range(100)))
    for seed in range(3):  # sixty equal rows
        part = load(tiny_tokenizer, seed=seed, dataset=path, format="text", validation_fraction=0.1)
        assert len(part.validation) == 10
    write_rows(tmp_path / "a.jsonl", {"text": "one"})
    with pytest.raises(DataError, match=r"validation_fraction=0.3 of 1 rows leaves nothing"):
        load(tiny_tokenizer, dataset=path, format="text", validation_fraction=0.3)


@pytest.mark.parametrize(
    ("scoring", "answers"), [("label", [" A<eos>", " B<eos>"]), ("text", [" yes<eos>", " no<eos>"])]
)
def test_a_task_is_learnt_in_either_scoring_and_as_the_right_answer_over_a_wrong_one(
    tiny_tokenizer, quiz, scoring, answers
):
    loaded = load(tiny_tokenizer, **quiz, scoring=scoring)
    assert [answer(tiny_tokenizer, example) for example in loaded.examples[:2]] == answers
    loaded = load(tiny_tokenizer, as_pairs=True, **quiz, scoring=scoring)
    pairs = [[answer(tiny_tokenizer, row) for row in pair.rows] for pair in loaded.examples[:2]]
    assert pairs == [answers, answers[::-1]]
    assert [row.sample_id for pair in loaded.examples for row in pair.rows] == list(range(20))
    assert "10 rows, 10 pairs, " in loaded.report[0]
    loaded = load(tiny_tokenizer, as_pairs=True, **quiz, validation_fraction=0.2)
    assert (len(loaded.examples), len(loaded.validation)) == (8, 2)


def test_a_validation_source_is_read_from_its_validation_split(tiny_tokenizer, quiz):
    loaded = load(tiny_tokenizer, **quiz, validation={**quiz, "scoring": "text"})
    assert (len(loaded.examples), len(loaded.validation)) == (10, 4)
    text = tiny_tokenizer.decode(loaded.validation[0].input_ids)
    assert text.startswith("Question: validation goal 0\nAnswer:")
    assert loaded.epoch_length == 10
    assert len(loaded.report) == 2


SAID = {"from": "human", "value": "sky?"}
GOOD_AND_EMPTY = [
    ("instruction", [{"instruction": "Say", "output": output} for output in ("a", " ")]),
    ("text", [{"text": "a"}, {"text": None}]),
    ("preference", [{"prompt": "sky?", "chosen": one, "rejected": "no"} for one in ("a", "")]),
    ("preference", [{"prompt": [TURN], "chosen": [GOOD], "rejected": one} for one in ([BAD], [])]),
    ("chat", [{"messages": [TURN, {**BAD, "content": text}]} for text in ("green", "")]),
    ("chat", [{"messages": [TURN, {**BAD, "content": text}]} for text in ("green", None)]),
    ("chat", [{"messages": [SAID, {"from": "gpt", "value": text}]} for text in ("blue", None)]),
]


@pytest.mark.parametrize(("kind", "rows"), GOOD_AND_EMPTY)
def test_an_empty_answer_is_an_error_unless_it_is_skipped(tiny_tokenizer, tmp_path, kind, rows):
    tiny_tokenizer.chat_template = TEMPLATE
    path = write_rows(tmp_path / "no\u202fbreak a.jsonl", *rows)
    data = {"dataset": path, "format": kind, "as_pairs": kind == "preference"}
    advice = "fill it in, remove the row, or set on_empty: skip"
    with pytest.raises(DataError, match=rf"a\.jsonl, line 2.* is empty.*; {advice}"):
        load(tiny_tokenizer, **data)
    loaded = load(tiny_tokenizer, **data, on_empty="skip")
    assert len(loaded.examples) == 1
    assert loaded.report[0].endswith("; 1 skipped because of empty answers")


def test_pairs_of_texts_may_begin_with_an_empty_one_and_count_once(tiny_tokenizer, tmp_path):
    rows = [{"prompt": "sky?", "chosen": chosen, "rejected": "no"} for chosen in (None, "a")]
    pairs = {"dataset": write_rows(tmp_path / "a.jsonl", *rows), "format": "preference"}
    pairs |= {"on_empty": "skip"}
    loaded = load(tiny_tokenizer, **pairs, as_pairs=True)
    assert loaded.report[0].endswith("; 1 skipped because of empty answers")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"format": "instruction"},
            "no field 'output', the output of format instruction; .* {ou.* 'instruction', 'reply ",
        ),
        ({"format": "text"}, "no field 'text', the text of format text; .* {text: COLUMN}"),
        (
            {"format": "chat", "chat_template": TEMPLATE, "fields": {"tools": "function"}},
            "the row has no field 'function'",
        ),
    ],
)
def test_a_missing_column_is_named_with_its_setting(tiny_tokenizer, tmp_path, settings, message):
    row = {"instruction": "Say", "reply ": "a", "messages": [TURN, GOOD], "functions": None}
    path = write_rows(tmp_path / "a.jsonl", *[row] * 3)
    with pytest.raises(DataError, match=message):
        load(tiny_tokenizer, dataset=path, **settings)
    if "fields" in settings:  # what the column holds may be absent
        assert load(tiny_tokenizer, dataset=path, **settings | {"fields": {"tools": "functions"}})


def test_a_chat_template_of_ones_own_is_taken_for_pairs_too(tiny_tokenizer, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", {"chosen": [TURN, GOOD], "rejected": [TURN, BAD]})
    data = {"dataset": path, "format": "preference", "chat_template": TEMPLATE}
    loaded = load(tiny_tokenizer, as_pairs=True, **data)
    assert tiny_tokenizer.decode(loaded.examples[0].rejected.input_ids) == "sky?;green;"
    write_rows(tmp_path / "a.jsonl", {"chosen": [TURN, BAD], "rejected": [TURN, BAD]})
    with pytest.raises(DataError, match="line 1: chosen and rejected are the same"):
        load(tiny_tokenizer, as_pairs=True, **data)
