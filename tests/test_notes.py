"""scripts/bench/NOTES.md: every heading is a question that its contents list, and links to its sections resolve.

CONTRIBUTING.md: what it links to is there.
"""

from __future__ import annotations

import re

import pytest
from conftest import REPOSITORY

NOTES = REPOSITORY / "scripts" / "bench" / "NOTES.md"
FOLDERS = ("docs", "dynlora_cli", "scripts")  # whose files may link to the notes
ABOUT = ("Contents", "How to read these notes")  # sections that answer no question
HEADING = re.compile(r"^(#+) (.+)$", re.MULTILINE)
LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])+)\]\(#([^)]+)\)")
DAY = re.compile(r"\*(\d{4}-\d\d-\d\d)")


def anchor(heading: str) -> str:
    """How GitHub names a heading in links."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.fixture(scope="module")
def text() -> str:
    return NOTES.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def anchors(text: str) -> list[str]:
    return [anchor(heading) for _, heading in HEADING.findall(text)]


def sections(text: str) -> dict[str, str]:
    """Title to text of every section that answers a question."""
    parts = (part.partition("\n") for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:])
    return {title: body for title, _, body in parts if title not in ABOUT}


def test_the_contents_list_every_section_in_its_order(text: str):
    contents = text.partition("## Contents\n")[2].partition("\n## ")[0]
    listed = LINK.findall(contents)
    titles = [title for level, title in HEADING.findall(text) if level == "##" and title != "Contents"]
    assert [title for title, _ in listed] == titles
    assert [to for _, to in listed] == [anchor(title) for title in titles]


def test_every_section_is_a_question_with_dated_answers(text: str):
    for title, body in sections(text).items():
        assert title.endswith("?"), title
        days = DAY.findall(body)
        assert days, f"{title}: no answer says when it was found"
        assert days == sorted(days, reverse=True), f"{title}: the newest answer comes first"


def test_the_contents_group_the_newest_first(text: str):
    contents = text.partition("## Contents\n")[2].partition("\n## ")[0]
    newest = {title: DAY.findall(body)[0] for title, body in sections(text).items()}
    for group in contents.split("\n**")[1:]:
        shown = re.findall(r"\((\d{4}-\d\d-\d\d)\)$", group, flags=re.MULTILINE)
        assert shown == [newest[title] for title, _ in LINK.findall(group)]
        assert shown == sorted(shown, reverse=True), group.splitlines()[0]


def test_links_within_the_notes_resolve(text: str, anchors: list[str]):
    assert len(set(anchors)) == len(anchors), "two headings share an anchor"
    assert [to for _, to in LINK.findall(text) if to not in anchors] == []


def test_links_to_the_notes_resolve(anchors: list[str]):
    pages = [*REPOSITORY.glob("*.md"), *(path for top in FOLDERS for path in (REPOSITORY / top).rglob("*.*"))]
    for page in pages:
        if page.suffix in (".md", ".py"):
            links = re.findall(r"NOTES\.md#([\w-]+)", page.read_text(encoding="utf-8"))
            assert [link for link in links if link not in anchors] == [], page


def test_what_contributing_links_to_is_there():
    links = re.findall(r"\]\(([^)#]+)", (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert "docs/architecture.md" in links
    assert [link for link in links if not (REPOSITORY / link).exists()] == []
