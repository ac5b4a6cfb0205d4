"""Local tasks of every kind that lm-eval asks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from lm_eval.api.instance import Instance

from tests.generation.saved import write_rows

COLOURS = ("blue", "a deep green", "yes and no", "the red one")
ROWS = [
    {
        "question": f"What colour is the sky at {hour} o'clock" + " in town" * (hour % 4),
        "choices": list(COLOURS[: 2 + hour % 3]),
        "label": hour % 2,
        "text": f"The sky is {COLOURS[hour % 4]} at {hour}. " * (1 + hour % 5),
    }
    for hour in range(12)
]
_CHOICES: dict[str, Any] = {
    "output_type": "multiple_choice",
    "doc_to_text": "Question: {{question}}?\nAnswer:",
    "doc_to_target": "label",
    "metric_list": [
        {"metric": name, "aggregation": "mean", "higher_is_better": True}
        for name in ("acc", "acc_norm")
    ],
}
TASKS: dict[str, dict[str, Any]] = {
    "toy_choice": {**_CHOICES, "doc_to_choice": "choices"},
    "toy_letter": {**_CHOICES, "doc_to_choice": ["A", "B", "C"]},
    "toy_blank": {
        **_CHOICES,
        "doc_to_text": "",
        "doc_to_choice": ["blue sky", "a green sea"],
        "target_delimiter": "",
    },
    "toy_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [{"metric": "word_perplexity"}],
    },
    "toy_generate": {
        "output_type": "generate_until",
        "doc_to_text": "Question: {{question}}?\nAnswer:",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["e", "\n\n"], "max_gen_toks": 10, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}


def write_tasks(directory: Path) -> Path:
    """Write the rows, and a YAML file for each task; return the directory."""
    files = {name: write_rows(directory / f"{name}.jsonl", *ROWS) for name in ("train", "test")}
    for name, settings in TASKS.items():
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": files}}
        splits = {"training_split": "train", "test_split": "test"}
        config = {"task": name, **data, **splits, **settings}
        (directory / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return directory


def instances(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Instance]:
    """Make requests of one kind: loglikelihood, loglikelihood_rolling or generate_until."""
    return [
        Instance(request_type=kind, doc={}, arguments=args, idx=0, metadata=("toy", place, 1))
        for place, args in enumerate(arguments)
    ]
