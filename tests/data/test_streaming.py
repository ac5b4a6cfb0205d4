import json
from collections import Counter
from dataclasses import asdict

import datasets
import pytest

from loraloom.config.data import DataConfig
from loraloom.data.sources import HubSource, RowStream
from loraloom.data.training_set import StreamedSet, StreamPosition
from loraloom.errors import DataError
from tests.generation.saved import write_rows

ROWS = [{"text": f"row {number}"} for number in range(30)]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_rows(path, *ROWS)
    return path


def stream(tokenizer, *, max_length=64, seed=0, **data) -> StreamedSet:
    data = {"streaming": True, "shuffle_buffer": 8} | data
    if "dataset" in data:
        data = {"format": "text", **data, "dataset": str(data["dataset"])}
    return StreamedSet(DataConfig.model_validate(data), tokenizer, max_length, seed)


def texts(tokenizer, examples) -> list[str]:
    return [tokenizer.decode(example.input_ids).removesuffix("<eos>") for example in examples]


def test_rows_are_shuffled_within_the_buffer_by_the_seed(tiny_tokenizer, file):
    sets = [stream(tiny_tokenizer, dataset=file, seed=seed) for seed in (0, 0, 1)]
    first, again, other = (texts(tiny_tokenizer, made.take(made.start, 8)[0]) for made in sets)
    assert first == again != other
    assert set(first) == set(other) == {row["text"] for row in ROWS[:8]}
    made = stream(tiny_tokenizer, dataset=file, shuffle_buffer=None)
    assert "read 1000 rows at a time" in made.report[0]


def test_a_pass_has_every_row_once_and_the_next_one_another_order(tiny_tokenizer, file):
    made = stream(tiny_tokenizer, dataset=file, shuffle_buffer=30)
    first, position = made.take(made.start, 30)
    second, _ = made.take(position, 30)
    assert position.passes == 0  # the end shows when there is nothing more
    one, other = texts(tiny_tokenizer, first), texts(tiny_tokenizer, second)
    assert sorted(one) == sorted(other) == sorted(row["text"] for row in ROWS)
    assert one != other
    assert len({example.sample_id for example in first + second}) == 60


@pytest.mark.parametrize("taken", [3, 8, 29, 31])
def test_what_follows_a_position_is_the_same_in_another_process(tiny_tokenizer, file, taken):
    made = stream(tiny_tokenizer, dataset=file)
    _, position = made.take(made.start, taken)
    expected, _ = made.take(position, 40)
    stored = json.loads(json.dumps(asdict(position)))
    assert stream(tiny_tokenizer, dataset=file).take(StreamPosition.of(stored), 40)[0] == expected


def test_sources_of_a_mix_have_shares_by_their_weights(tiny_tokenizer, file, tmp_path):
    few = tmp_path / "few.txt"
    few.write_text("yes\nno\n")
    mix = [
        {"dataset": str(file), "format": "text", "weight": 3},
        {"dataset": str(few), "format": "text", "expert_group": 1},
    ]
    made = stream(tiny_tokenizer, mix=mix)
    block = made.block(made.start).examples
    assert Counter(example.expert_group for example in block) == {0: 6, 1: 2}
    assert made.report == (
        f"{file}: a stream, read 6 rows at a time",
        f"{few}: a stream, read 2 rows at a time",
    )


def test_rows_that_never_fit_are_an_error(tiny_tokenizer, tmp_path):
    path = tmp_path / "long.jsonl"
    row = {"instruction": "Say", "input": "", "output": "what color is the sky " * 20}
    write_rows(path, *[row] * 3)
    with pytest.raises(
        DataError, match="no row has an answer that fits max_length=16; raise max_length"
    ):
        stream(tiny_tokenizer, dataset=path, format="instruction", max_length=16)
    made = stream(tiny_tokenizer, dataset=path, format="instruction", max_length=512)
    assert len(made.take(made.start, 12)[0]) == 12
    write_rows(path, *[row, row | {"output": "blue"}] * 4)
    made = stream(tiny_tokenizer, dataset=path, format="instruction", max_length=16)
    assert "of the first, 4 dropped because their answers do not fit" in made.report[0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"body": "two"}', "line 11: the row has no field 'text'"),
        ("{torn", "line 11: the row must be JSON: key must"),
    ],
)
def test_a_bad_row_is_an_error_of_every_job_that_reads_it(tiny_tokenizer, file, line, message):
    file.write_text('{"text": "one"}\n' * 10 + f"{line}\n")
    made = stream(tiny_tokenizer, dataset=file)
    _, position = made.take(made.start, 8)
    for _ in range(2):
        with pytest.raises(DataError, match=rf"rows.jsonl, {message}"):
            made.take(position, 8)
    file.write_text(f'{{"text": "one"}}\n{line}\n{{"text": ""}}\n')  # fewer than a block has
    with pytest.raises(DataError, match=r"2 of 3 rows can't be used:\n  line 2: .*\n  line 3: "):
        stream(tiny_tokenizer, dataset=file)


def test_an_empty_stream_is_an_error(tiny_tokenizer, file):
    made = stream(tiny_tokenizer, dataset=file)
    _, position = made.take(made.start, 8)
    file.write_text("")
    with pytest.raises(DataError, match=r"rows.jsonl contains no rows"):
        made.take(position, 80)
    with pytest.raises(DataError, match=r"rows.jsonl contains no rows"):
        stream(tiny_tokenizer, dataset=file)


def test_the_digest_tells_of_another_size_and_another_beginning(tiny_tokenizer, tmp_path):
    path = tmp_path / "rows.txt"
    digests = set()
    for text in ("one\ntwo\n", "one\nsix\n", "one\ntwo\n" * 4, "one\ntwo\n" * 4 + "two\n"):
        path.write_text(text)
        digests.add(stream(tiny_tokenizer, dataset=path, shuffle_buffer=2).digest)
    assert len(digests) == 4


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".txt", ".parquet", ".jsonl.gz"])
def test_a_file_of_any_kind_is_read_on_from_a_row(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    table = datasets.Dataset.from_list(ROWS)
    match suffix:
        case ".txt":
            path.write_text("\n".join(row["text"] for row in ROWS))
        case ".csv":
            table.to_csv(path)
        case ".parquet":
            table.to_parquet(path)
        case _:
            table.to_json(path, compression="infer")
    rest = list(RowStream(path, "train").rows(start=11))
    assert [row["text"] for row in rest] == [row["text"] for row in ROWS[11:]]
    assert rest[0].origin.startswith(f"{path}, ")


def test_a_data_set_of_the_hub_is_read_on_from_a_row(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(ROWS))
    rest = list(RowStream(HubSource("owner/rows"), "train").rows(start=13))
    assert [row["text"] for row in rest] == [row["text"] for row in ROWS[13:]]
    assert rest[0].origin == "owner/rows, train, row 14"
