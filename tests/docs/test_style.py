"""Documents and messages read as the project writes, as far as that can be counted."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
FILES = ("README.md", "CHANGELOG.md", "docs/*.md", "docs/experiments/*.md")
PAGES = sorted(str(path.relative_to(ROOT)) for name in FILES for path in ROOT.glob(name))
MAX_WORDS = {"README.md": 650, "CHANGELOG.md": 1500}
REFERENCE = {"README", "api", "architecture", "experiments", "glossary", "index", "kernels"}
REFERENCE |= {"models", "semantics", "versions"}
"""Pages to look something up in: they neither address readers nor need code."""
EXPLANATION = {"choosing_a_method", "concepts", "faq", "mixtures", "troubleshooting"}
EXPLANATION |= {"when_a_mixture"}
"""Pages that need no code."""
TO_DO = {"docs/data.md": "long sentences"}
"""Pages that don't hold yet, with what is left to do. Take out those that do."""
BANNED = re.compile(
    r"\b(?:of (?:its|their) own|so many|anew|beside|alike|whatever|tells?|told|go(?:es)? on|learnt|"
    r"snapshots?|contestants?|constant answer|number format|[hH]ub (?:ids?|names?)|colours?|"
    r"behaviours?|favours?|centres?|licences?|\w*(?:quant|recogn|initial|normal|summar|token|"
    r"special|optim|minim|maxim|general|organ|real|util|random)is(?:e[ds]?|ing|ation))\b"
)
PRONOUNS_LEFT = 34
"""Messages in src that end in a pronoun, where a noun would say what to change."""


def faults(page: str) -> Iterator[str]:
    """Say where a page does not hold."""
    text, name = (ROOT / page).read_text(), Path(page).stem
    if (words := len(text.split())) > MAX_WORDS.get(page, 1600):
        yield f"{words} words"
    if page == "CHANGELOG.md" or "/experiments/" in page:
        return
    read = re.sub(r"(?ms)^```.*?^```$|<!--.*?-->|^###[^\n]*", "", text)
    read = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"`[^`\n]*`", "X", read))
    yield from (f"banned: {match[0]}" for match in BANNED.finditer(read))
    yield from (f"a date or ±: {match}" for match in re.findall(r"\b20\d\d-\d\d-\d\d\b|±", read))
    if name in REFERENCE:
        return
    if (you := 1000 * len(re.findall(r"(?i)\byou", read)) / len(read.split())) < 8:
        yield f"{you:.1f} times you in a thousand words"
    if name not in EXPLANATION and words > 200 * (text.count("\n```") // 2):
        yield "more than 200 words to a block of code"
    if not re.search(r"(?m)^(?:## )?Next\b", text):
        yield "no Next"
    paragraphs = re.sub(r"(?m)^(?:#|\||!).*$", "", read)
    ends = r"(?m)\n\s*\n|^\s*(?:[-*]|\d+\.) |(?<=[.!?:])\s+(?=[A-Z*\"(])| · "
    lengths = [len(part.split()) for part in re.split(ends, paragraphs) if part.strip()]
    if (mean := sum(lengths) / len(lengths)) > 20:
        yield f"{mean:.1f} words to a sentence"
    yield from (f"a sentence of {length} words" for length in lengths if length > 40)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_holds_the_style(page, request):
    if page in TO_DO:
        request.applymarker(pytest.mark.xfail(reason=TO_DO[page], strict=True))
    assert list(faults(page)) == []


def test_few_messages_end_in_a_pronoun():
    source = "\n".join(path.read_text() for path in ROOT.glob("src/**/*.py"))
    ends = re.findall(r"; .*\b(?:it|them|one|that|this)[.!]?\"\)*,?$", source, re.MULTILINE)
    assert len(ends) <= PRONOUNS_LEFT, ends
