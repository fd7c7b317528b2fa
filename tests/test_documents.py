"""The documents: every relative link leads somewhere, and so does every page that code names."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
README_LINES = 130


def prose(page: Path) -> str:
    """The page without its code blocks, in which # is no heading and [x](y) no link."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def links(page: Path) -> list[str]:
    """Targets of all links and pictures; inline code is no link."""
    text = re.sub(r"`[^`\n]*`", "", prose(page))
    return re.findall(r"\]\(([^()\s]+)\)", text)


def slugs(page: Path) -> set[str]:
    """Anchors of the page's headings, as GitHub makes them.

    Lower case, letters, digits, ``_``, ``-`` and spaces alone, spaces as hyphens; a heading that
    was there before gets a number.
    """
    found: Counter[str] = Counter()
    anchors = set()
    for heading in re.findall(r"^#{1,6} +(.*?) *#*$", prose(page), flags=re.M):
        text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)  # of a link, its text
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        anchors.add(f"{slug}-{found[slug]}" if found[slug] else slug)
        found[slug] += 1
    return anchors


def broken(page: Path) -> Iterator[str]:
    """Links of ``page`` that lead nowhere: those to other sites are not looked at."""
    for link in links(page):
        if re.match(r"[a-z][a-z+.-]*:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.is_relative_to(ROOT) or not target.exists():
            yield f"{link}: there is no such file"
        elif anchor and (target.suffix != ".md" or anchor not in slugs(target)):
            yield f"{link}: there is no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    assert list(broken(page)) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_rows_of_tables_have_a_head(page: Path) -> None:
    """After an empty line within a table, Markdown shows the rest as lines of text."""
    blocks = re.findall(r"(?:^\|.*\n?)+", prose(page), flags=re.M)
    headless = [b.partition("\n")[0] for b in blocks if not re.match(r".*\n\| ?:?-", b)]
    assert headless == []


def test_links_are_found_and_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "b.md").write_text("# One `code`, two_three: (four)\n\n## Same\n\n## Same\n")
    page = tmp_path / "a.md"
    page.write_text(
        "# Here\n[1](b.md) [2](b.md#one-code-two_three-four) [3](b.md#same-1) [4](#here)\n"
        "[5](https://example.org/x) ![6](b.md) `[7](none.md)`\n"
        "```\n# There\n[8](none.md)\n```\n"
    )
    assert list(broken(page)) == []
    page.write_text("# Here\n[1](none.md) [2](b.md#same-2) [3](#there) [4](../outside.md)\n")
    assert [line.partition(":")[0] for line in broken(page)] == [
        *("none.md", "b.md#same-2", "#there", "../outside.md")
    ]


def test_pages_that_code_names_exist() -> None:
    tracked = subprocess.run(
        ["git", "grep", "-ohE", r"\bdocs/[A-Za-z0-9_/.-]+\.(md|png)\b", "--", ":!*.md",
         ":!tests/test_documents.py"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    named = set(tracked.stdout.split())
    assert "docs/users/families.md" in named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_pages_name_exist(page: Path) -> None:
    if page.name == "hopper-kernel-lab-book.md":
        return  # each entry stands as it was written on its day
    found = re.findall(
        r"`((?:quantize|vllm_nvfp4_moe|tests|benchmarks|examples)/[\w/.-]+\.(?:py|cuh?))`",
        page.read_text(encoding="utf-8"),
    )
    named = [name for name in found if "NAME" not in name]  # that is for the reader to choose
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < README_LINES
