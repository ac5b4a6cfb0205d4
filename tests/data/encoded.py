from loraloom.config.data import SourceConfig
from loraloom.data.encoding import SourceEncoder


def encode(tokenizer, rows, max_length, **settings):
    """Encode the rows of a data set, or raise the error of those that can't be used."""
    config = SourceConfig.model_validate({"dataset": "rows.jsonl", **settings})
    encoder = SourceEncoder(config, tokenizer, max_length)
    encoded = encoder.encode(rows, rows[0])
    encoder.check(rows, encoded)
    return encoded
