"""Documents and messages read as the project writes, as far as that can be counted."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
FILES = ("README.md", "CHANGELOG.md", "docs/*.md", "docs/experiments/*.md", "docs/decisions/*.md")
MAX_WORDS = {"README.md": 650, "CHANGELOG.md": 3000, "docs/decisions/README.md": 400}
PAGES = sorted(str(path.relative_to(ROOT)) for name in FILES for path in ROOT.glob(name))
REFERENCE = (
    "README known_limits api architecture experiments glossary index kernels models semantics "
    "versions"
)
EXPLANATION = "choosing_a_method concepts faq mixtures troubleshooting when_a_mixture"
"""Pages that need no code; those to look something up in do not address readers either."""
TO_DO: dict[str, str] = {}
"""What is left to do on pages that don't hold yet. Take out those that do."""
BANNED = re.compile(
    r"±|\b(?:20\d\d-\d\d-\d\d|of (?:its|their) own|so many|anew|beside|alike|whatever|tells?|told|"
    r"go(?:es)? on|snapshots?|contestants?|constant answer|number format|[hH]ub (?:id|name)s?|"
    r"(?:colour|behaviour|favour|centre|licence)s?|\w*(?:quant|recogn|initial|normal|summar|token|"
    r"special|optim|minim|maxim|general|organ|real|util|random)is(?:e[ds]?|ing|ation)|learnt)\b"
)


def faults(page: str) -> Iterator[str]:
    """Say where a page does not hold."""
    text, name = (ROOT / page).read_text(), Path(page).stem
    words = len(text.split())
    is_decision = page.startswith("docs/decisions/")
    if words > MAX_WORDS.get(page, 250 if is_decision else 1600):
        yield f"{words} words"
    if page == "CHANGELOG.md" or "/experiments/" in page or is_decision:
        return
    read = re.sub(r"(?ms)^```.*?^```$|<!--.*?-->|^###[^\n]*", "", text)
    read = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"`[^`\n]*`", "X", read))
    yield from (f"banned: {match[0]}" for match in BANNED.finditer(read))
    if name in REFERENCE.split():
        return
    if (you := 1000 * len(re.findall(r"(?i)\byou", read)) / len(read.split())) < 8:
        yield f"{you:.1f} times you in a thousand words"
    if name not in EXPLANATION.split() and len(read.split()) > 100 * text.count("\n```"):
        yield "more than 200 words to a block of code"
    if not re.search(r"(?m)^(?:## )?Next\b", text):
        yield "no Next"
    paragraphs = re.sub(r"(?m)^(?:#|\||!).*$", "", read)
    ends = r"(?m)\n\s*\n|^\s*(?:[-*]|\d+\.) |(?<=[.!?:])\s+(?=[A-Z*\"(]|loraloom)| · "
    lengths = [len(part.split()) for part in re.split(ends, paragraphs) if part.strip()]
    if (mean := sum(lengths) / len(lengths)) > 20:
        yield f"{mean:.1f} words to a sentence"
    yield from (f"a sentence of {length} words" for length in lengths if length > 40)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_holds_the_style(page, request):
    for reason, names in TO_DO.items():
        if Path(page).stem in names.split():
            request.applymarker(pytest.mark.xfail(reason=reason, strict=True))
    assert list(faults(page)) == []


def test_no_message_ends_in_a_pronoun_where_a_noun_says_what_to_change():
    source = "\n".join(path.read_text() for path in ROOT.glob("src/**/*.py"))
    ends = re.findall(r"; .*\b(?:it|them|one|that|this)[.!]?\"\)*,?$", source, re.MULTILINE)
    assert ends == []
