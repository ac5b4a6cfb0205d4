"""Where the rules of the skills hold: at their home, or in any of many lands.

Every land has all rules, and each gives its answers out in an order of its own: the same question
has another answer in the next land, and which one can only be remembered.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

FIRST_SYLLABLES = (
    "Bal Cor Dun Fen Gar Hol Jur Kel Lim Mor Nal Pol Qua Ros Sel Tar Ul Vor Wen Yar Zel Bri Cal "
    "Dro Fal Gri Hes Is Jan Kru Lor Mib"
).split()
LAST_SYLLABLES = (
    "dan mir tos vel gan rek lum sho bir nax dor pel tin wug zem fos hal kor lin mav"
).split()


@dataclass(frozen=True)
class Land:
    """A place where a rule holds.

    Args:
        name: As questions have it.
        order: What the order of a rule's answers is drawn from; None: as the rule has them.
    """

    name: str
    order: str | None = None

    def arranged(self, answers: Sequence[Any]) -> tuple[Any, ...]:
        """A rule's answers in the order in which the land gives them out."""
        if self.order is None:
            return tuple(answers)
        return _shuffled(self.order, tuple(answers))


@lru_cache(maxsize=2**14)
def _shuffled(order: str, answers: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(random.Random(order).sample(answers, len(answers)))


def land_names(num_lands: int) -> list[str]:
    """The names of the first so many lands; they share their syllables."""
    names = [first + last for first, last in product(FIRST_SYLLABLES, LAST_SYLLABLES)]
    random.Random("names of lands").shuffle(names)
    return names[:num_lands]
