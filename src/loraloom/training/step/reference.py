"""Reference policies: what a job is held at, be it the base model or an adapter beside it.

No second model is loaded: the reference's rows go through the same base model. What it gives a
sample never changes, so each sample is asked for once, when it is first needed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from loraloom.config.objective import BASE_REFERENCE, CpoConfig, DpoConfig, SftConfig
from loraloom.data.examples import Example, TrainingExample
from loraloom.infer.scoring import label_log_probs
from loraloom.models.host import Host


@dataclass
class Reference:
    """A job's reference policy.

    Args:
        adapter_name: On the host; None is the base model.
        log_probs: What it gave each sample so far, summed over the sample's labels, by sample id.
    """

    adapter_name: str | None = None
    log_probs: dict[int, float] = field(default_factory=dict)

    def of(self, examples: Sequence[Example]) -> list[float]:
        """Return what it gave these samples."""
        return [self.log_probs[example.sample_id] for example in examples]

    def forget(self, examples: Iterable[TrainingExample]) -> None:
        """Drop what it gave the rows of examples."""
        for row in (row for example in examples for row in example.rows):
            self.log_probs.pop(row.sample_id, None)


def load_reference(host: Host, config: SftConfig | DpoConfig | CpoConfig) -> Reference | None:
    """Make the reference of an objective; an adapter is loaded once, however many jobs name it."""
    if not isinstance(config, DpoConfig):
        return None
    if config.reference == BASE_REFERENCE:
        return Reference()
    name = f"reference-{hashlib.sha256(config.reference.encode()).hexdigest()[:16]}"
    if name not in host.adapters:
        host.load(name, config.reference)
    return Reference(name)


def drop_reference(
    host: Host, reference: Reference | None, others: Iterable[Reference | None]
) -> None:
    """Take a reference's adapter off the host, unless another job is held at it."""
    name = None if reference is None else reference.adapter_name
    needed = {other.adapter_name for other in others if other is not None}
    if name in host.adapters and name not in needed:
        host.remove(name)


def ask_references(
    host: Host, wanted: Iterable[tuple[Reference | None, Sequence[Example]]]
) -> None:
    """Let references score the samples that they haven't seen, all in the same forwards."""
    missing = [
        (reference, example)
        for reference, examples in wanted
        if reference is not None
        for example in examples
        if example.sample_id not in reference.log_probs
    ]
    if not missing:
        return
    examples = [(reference.adapter_name, example) for reference, example in missing]
    log_probs = label_log_probs(host, examples)
    for (reference, example), values in zip(missing, log_probs, strict=True):
        reference.log_probs[example.sample_id] = float(values.sum())
