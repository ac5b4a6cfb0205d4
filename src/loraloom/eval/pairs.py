"""Held-out preference pairs: whether adapters rank the chosen answer above the rejected one.

A margin is log p(chosen) - log p(rejected), each summed over its tokens. A reward margin is β × the
adapter's margin less the base model's, as in DPO, and the loss is DPO's, the mean of
-log σ(reward margin).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
from rich.table import Table

from loraloom.eval.comparison import members_of
from loraloom.eval.held_out import HeldOutSet
from loraloom.eval.statistics import (
    PairedComparison,
    compare_paired,
    ratio_intervals,
    ratio_stderr,
    wilson_interval,
)
from loraloom.terminal import make_table


def is_of_pairs(data: HeldOutSet) -> bool:
    """Whether rows are the two answers of pairs in turn."""
    return data.details["format"] == "preference"


@dataclass(frozen=True)
class PairLosses:
    """What adapters make of the pairs of a data set.

    Args:
        data: The pairs.
        losses: -log p of each answer in turn, by adapter.
        reference: The same of the base model.
    """

    data: HeldOutSet
    losses: Mapping[str, Sequence[float]]
    reference: Sequence[float]

    def loss(self, name: str) -> float:
        """The mean of DPO's loss over pairs."""
        return float(np.logaddexp(0, -self._reward_margins(name)).mean())

    def compare(self, first: str, second: str) -> PairedComparison:
        """Compare two contestants by the pairs that they rank right, as accuracies are."""
        return compare_paired(self._shares_right(first), self._shares_right(second))

    def summarise(self) -> dict[str, dict[str, Any]]:
        """Results by adapter, as in the JSON file."""
        return {name: self._summarise(name) for name in self.losses}

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yield a line for each adapter and pair."""
        for name, losses in self.losses.items():
            answers = zip(losses[0::2], losses[1::2], self._reward_margins(name), strict=True)
            for place, (chosen, rejected, margin) in zip(
                self.data.places[0::2], answers, strict=True
            ):
                yield {
                    "dataset": self.data.name,
                    "adapter": name,
                    "index": place,
                    "correct": chosen < rejected,
                    "chosen_log_prob": -chosen,
                    "rejected_log_prob": -rejected,
                    "reward_margin": margin,
                }

    def _summarise(self, name: str) -> dict[str, Any]:
        margins = self._reward_margins(name)
        count = len(margins)
        right = fmean(_margins(self.losses[name]) > 0)
        values = np.column_stack([np.logaddexp(0, -margins), margins])
        ones = np.ones(count)
        loss, margin = (
            {"stderr": ratio_stderr(column, ones), "interval": list(interval)}
            for column, interval in zip(values.T, ratio_intervals(values, ones), strict=True)
        )
        return {
            "loss": self.loss(name),
            **loss,
            "accuracy": right,
            "accuracy_interval": list(wilson_interval(right, count)),
            "reward_accuracy": fmean(margins > 0),
            "reward_margin": fmean(margins),
            **{f"reward_margin_{key}": value for key, value in margin.items()},
            "num_examples": count,
            "num_tokens": sum(self.data.num_tokens),
            "split": self.data.details["split"],
        }

    def _reward_margins(self, name: str) -> np.ndarray:
        difference = _margins(self.losses[name]) - _margins(self.reference)
        return self.data.details["beta"] * difference

    def _shares_right(self, name: str) -> list[float]:
        members = members_of(name, list(self.losses))
        return np.mean([_margins(self.losses[one]) > 0 for one in members], axis=0).tolist()


def pairs_table(results: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> Table:
    """Make the table of data sets of pairs, by adapter."""
    figures = ("accuracy %", "reward accuracy %", "reward margin", "loss")
    titles = [f"{name}\n{figure}" for name in names for figure in figures]
    table = make_table("adapter", values=titles, title="Preference pairs, with 95 % intervals")
    for adapter, by_name in results.items():
        table.add_row(adapter, *(cell for name in names for cell in _cells(by_name[name])))
    return table


def _cells(result: Mapping[str, Any]) -> tuple[str, ...]:
    low, high = (100 * bound for bound in result["accuracy_interval"])
    margin_low, margin_high = result["reward_margin_interval"]
    return (
        f"{100 * result['accuracy']:.1f} ({low:.1f}–{high:.1f})",
        f"{100 * result['reward_accuracy']:.1f}",
        f"{result['reward_margin']:.4f} ({margin_low:.4f}–{margin_high:.4f})",
        "{:.4f} ({:.4f}–{:.4f})".format(result["loss"], *result["interval"]),
    )


def _margins(losses: Sequence[float]) -> np.ndarray:
    """Subtract log p(rejected) from log p(chosen) of each pair."""
    log_probs = -np.asarray(losses, dtype=np.float64)
    return log_probs[0::2] - log_probs[1::2]
