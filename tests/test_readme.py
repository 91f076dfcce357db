"""Both READMEs: what they quote, name and link exists, and they say the same."""

import re

import pytest
from conftest import ROOT, SEVEN

READMES = ("README.md", "README.zh.md")


def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


def sources():
    """The code's own words: Makefile and helpers, with strings that are split over lines joined again."""
    files = [ROOT / "Makefile", *(ROOT / "helpers").rglob("*.py")]
    return "\n".join(re.sub(r'"\s*\n\s*f?"', "", file.read_text(encoding="utf-8")) for file in files)


def messages(readme):
    """The quoted messages: the first column of the only table whose rows start with a whole line of code."""
    return re.findall(r"^\| `(.{30,})` \| [^|]+ \| [^|]+ \|$", readme, re.MULTILINE)


# What differs from case to case in a message: left out, quoted, with a digit, in capitals, or one of WORDS.
WORDS = "NVIDIA|python3|bf16|cuda|missing|str|int|a CPU build|nothing was run"
VARYING = re.compile(rf"\.\.\.|'[^']*'|\b[\w.+-]*\d[\w.+-]*\b|\b[A-Z_]{{4,}}\b|\b(?:{WORDS})\b")


def fixed_parts(message):
    """The pieces of a message that must stand in the code as they are."""
    parts = [part.strip(" :.") for part in VARYING.split(message)]
    return [part for part in parts if len(part) > 10]


@pytest.mark.parametrize("name", READMES)
def test_every_quoted_message_is_one_that_the_code_gives(name):
    found, code = messages(text_of(name)), sources()
    assert len(found) == 20
    for message in found:
        parts = fixed_parts(message)
        assert parts and all(part in code for part in parts), (message, [p for p in parts if p not in code])


@pytest.mark.parametrize("name", READMES)
def test_every_link_into_the_repository_leads_somewhere(name):
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", text_of(name))
    assert {f"notebooks/{one}.ipynb" for one in SEVEN} <= set(links)
    assert [link for link in links if not (ROOT / link).is_file()] == []


def test_both_languages_have_the_same_code_links_and_tables():
    english, chinese = map(text_of, READMES)
    for pattern in (r"^#+ ", r"^\|", r"^```(?:.|\n)*?^```", r"^\d\. ", r"^- "):
        count = [len(re.findall(pattern, text, re.MULTILINE)) for text in (english, chinese)]
        assert count[0] == count[1] > 0, (pattern, count)
    blocks = [re.findall(r"^```(?:.|\n)*?^```", text, re.MULTILINE) for text in (english, chinese)]
    assert blocks[0] == blocks[1]
    assert messages(english) == messages(chinese)
