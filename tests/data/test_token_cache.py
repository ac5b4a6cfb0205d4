import multiprocessing
import os

import datasets
import pytest

from loraloom.config.data import DataConfig, SourceConfig
from loraloom.data import token_cache
from loraloom.data.encoding import SourceEncoder
from loraloom.data.training_set import StreamedSet, load_training_set
from loraloom.errors import DataError
from tests.generation.saved import write_rows

ASKED = {"role": "user", "content": "sky?"}
ANSWERS = [[{"role": "assistant", "content": color}] for color in ("blue", "green")]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}"
INSTRUCTIONS = [{"instruction": f"Say {n}.", "output": f"{n} " * n} for n in range(1, 9)]


@pytest.fixture(autouse=True)
def directory(monkeypatch, tmp_path):
    """The cache of this test, for sources of any size."""
    monkeypatch.setattr(token_cache, "MIN_CHARACTERS", 1)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "loraloom"


@pytest.fixture
def encodings(monkeypatch, tmp_path):
    """A file with a line for each time that rows are encoded, in any process."""
    encode = SourceEncoder._encode_rows
    log = tmp_path / "encodings.txt"
    log.touch()

    def encode_and_log(encoder, rows):
        with log.open("a") as file:
            file.write(f"{len(rows)} rows\n")
        return encode(encoder, rows)

    monkeypatch.setattr(SourceEncoder, "_encode_rows", encode_and_log)
    return log


@pytest.fixture
def source(tmp_path):
    """Instructions, with a prompt template in a file."""
    (tmp_path / "prompt.jinja").write_text("{{ instruction }}\n")
    dataset = write_rows(tmp_path / "rows.jsonl", *INSTRUCTIONS)
    template = str(tmp_path / "prompt.jinja")
    return {"dataset": dataset, "format": "instruction", "template": template}


def load(tokenizer, source, *, max_length=24, as_pairs=False):
    config = SourceConfig.model_validate(source)
    return SourceEncoder(config, tokenizer, max_length, as_pairs).load("train")


def count_lines(log):
    return len(log.read_text().splitlines())


ROWS = {
    "instruction": [*INSTRUCTIONS, {"instruction": "Say.", "output": ""}],
    "text": [{"text": "word " * n} for n in range(1, 30, 7)],
    "chat": [{"messages": [ASKED, *answer, ASKED, *answer]} for answer in ANSWERS],
    "preference": [{"prompt": [ASKED], "chosen": ANSWERS[0], "rejected": ANSWERS[1]}],
}


@pytest.mark.parametrize("data_format", ROWS)
def test_a_second_start_reads_the_tokens_that_it_would_encode(
    tiny_tokenizer, monkeypatch, tmp_path, encodings, data_format
):
    tiny_tokenizer.chat_template = TEMPLATE
    path = write_rows(tmp_path / "rows.jsonl", *ROWS[data_format])
    source = {"dataset": path, "format": data_format, "on_empty": "skip"}
    written, read = (load(tiny_tokenizer, source, max_length=100) for _ in range(2))
    assert count_lines(encodings) == 1
    monkeypatch.setattr(token_cache, "MIN_CHARACTERS", 1_000_000)
    assert written == read == load(tiny_tokenizer, source, max_length=100)
    assert count_lines(encodings) == 2


def test_tasks_are_encoded_once_for_each_objective(tiny_tokenizer, tmp_path, encodings):
    rows = [{"goal": f"goal {n}", "sol1": "a", "sol2": "b", "label": n % 2} for n in range(4)]
    (tmp_path / "piqa").mkdir()
    write_rows(tmp_path / "piqa/train.jsonl", *rows)
    source = {"task": "piqa", "path": str(tmp_path)}
    for as_pairs in (False, True):
        written, read = (
            load(tiny_tokenizer, source, max_length=256, as_pairs=as_pairs) for _ in range(2)
        )
        assert written == read
        assert read[0].is_pair == as_pairs
    assert count_lines(encodings) == 2


def test_whatever_changes_tokens_encodes_again(tiny_tokenizer, tmp_path, encodings, source):
    def add_row():
        write_rows(tmp_path / "rows.jsonl", *INSTRUCTIONS, {"instruction": "?", "output": "!"})

    changes = {
        "a row": add_row,
        "the template's file": lambda: (tmp_path / "prompt.jinja").write_text("{{ instruction }}"),
        "the tokenizer": lambda: tiny_tokenizer.add_tokens(["Say"]),
        "the tokenizer's special tokens": lambda: tiny_tokenizer.add_special_tokens(
            {"eos_token": "."}
        ),
        "columns": lambda: source.update(fields={"instruction": "output"}),
        "on_empty": lambda: source.update(on_empty="skip"),
    }
    load(tiny_tokenizer, source)
    for number, (name, change) in enumerate(changes.items(), start=2):
        change()
        load(tiny_tokenizer, source)
        assert count_lines(encodings) == number, name
    load(tiny_tokenizer, source, max_length=20)
    load(tiny_tokenizer, source, max_length=20)
    assert count_lines(encodings) == number + 1


def test_a_chat_template_is_decisive(tiny_tokenizer, tmp_path, encodings):
    dataset = write_rows(tmp_path / "rows.jsonl", *ROWS["chat"])
    source = {"dataset": dataset, "format": "chat"}
    for template in (TEMPLATE, TEMPLATE.replace(";", "!")):
        tiny_tokenizer.chat_template = template
        load(tiny_tokenizer, source)
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    source["chat_template"] = str(tmp_path / "chat.jinja")
    load(tiny_tokenizer, source)
    (tmp_path / "chat.jinja").write_text(TEMPLATE.replace(";", "?"))
    load(tiny_tokenizer, source)
    assert count_lines(encodings) == 4


def test_shares_of_a_mix_and_seeds_leave_tokens_as_they_are(tiny_tokenizer, encodings, source):
    for weight, seed in ((1, 0), (2, 1)):
        config = DataConfig.model_validate({"mix": [{**source, "weight": weight}]})
        load_training_set(config, tiny_tokenizer, 24, seed)
    assert count_lines(encodings) == 1


def test_a_killed_process_leaves_nothing_that_is_read(tiny_tokenizer, encodings, source):
    def die_after_three(row, write=token_cache._as_record):
        if row.pieces[0].input_ids == expected[3].pieces[0].input_ids:
            os._exit(9)
        return write(row)

    def start():
        token_cache._as_record = die_after_three
        load(tiny_tokenizer, source)

    expected = SourceEncoder(SourceConfig.model_validate(source), tiny_tokenizer, 24).read("train")
    expected = expected[1]
    process = multiprocessing.get_context("fork").Process(target=start)
    process.start()
    process.join()
    assert process.exitcode == 9
    assert load(tiny_tokenizer, source) == load(tiny_tokenizer, source) == expected
    assert count_lines(encodings) == 3


def test_processes_that_start_together_encode_once(tiny_tokenizer, encodings, source):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [
        context.Process(target=lambda: results.put(load(tiny_tokenizer, source))) for _ in range(3)
    ]
    for process in processes:
        process.start()
    first, *others = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert others == [first, first]
    assert count_lines(encodings) == 1


def test_a_row_at_fault_is_named_at_each_start(tiny_tokenizer, tmp_path, directory, source):
    write_rows(tmp_path / "rows.jsonl", *INSTRUCTIONS, {"instruction": "Say 9.", "output": ""})
    for _ in range(2):
        with pytest.raises(DataError, match=r"rows.jsonl, line 9: field 'output' is empty"):
            load(tiny_tokenizer, source)
    assert not [*directory.rglob("*.arrow")]


def test_a_cache_that_cannot_be_written_or_read_is_a_warning(
    tiny_tokenizer, tmp_path, directory, encodings, source, caplog
):
    expected = load(tiny_tokenizer, source)
    (entry,) = directory.rglob("*.arrow")
    whole = entry.read_bytes()
    for size in (0, len(whole) // 2):
        entry.write_bytes(whole[:size])
        assert load(tiny_tokenizer, source) == expected
    datasets.config.HF_DATASETS_CACHE = tmp_path / "rows.jsonl"
    assert load(tiny_tokenizer, source) == expected
    assert count_lines(encodings) == 4
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 3
    assert messages[2].startswith(f"The tokens of 8 rows can't be kept in {tmp_path}/rows.jsonl/")


def test_streams_and_tokenizers_in_python_have_no_entry(
    tiny_tokenizer, monkeypatch, directory, source
):
    StreamedSet(DataConfig.model_validate({**source, "streaming": True}), tiny_tokenizer, 24, 0)
    monkeypatch.setattr(type(tiny_tokenizer), "is_fast", False)
    load(tiny_tokenizer, source)
    assert not directory.exists()
