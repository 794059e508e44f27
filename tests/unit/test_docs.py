"""The documentation: links lead somewhere, config words exist, the Chinese pages keep step."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from trainwright.config.schema import Config

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.md")]


def _without_code(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def _anchor(heading: str) -> str:
    """GitHub's: lower case, spaces to hyphens, signs left out."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", _without_code(page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if not file.exists():
            broken.append(target)
        elif anchor:
            headings = re.findall(r"^#+ (.*)$", _without_code(file.read_text()), re.MULTILINE)
            if anchor not in {_anchor(heading) for heading in headings}:
                broken.append(target)
    assert not broken


def test_the_chinese_concepts_keep_step() -> None:
    english, chinese = ((ROOT / "docs" / name).read_text() for name in ("concepts.md", "concepts.zh-CN.md"))
    for pattern in (r"^## ", r"^\| ", r"^- ", r"^```"):
        found = [len(re.findall(pattern, text, re.MULTILINE)) for text in (english, chinese)]
        assert found[0] == found[1], pattern
    blocks = [re.findall(r"```.*?```", text, re.DOTALL) for text in (english, chinese)]
    assert blocks[0] == blocks[1], "diagrams and examples are the same in both"


def _keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        for inner in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from _keys(inner, f"{prefix}{name}.")


@pytest.mark.parametrize("name", ["concepts.md", "launch.md", "numerics.md"])
def test_config_words_exist(name: str) -> None:
    keys = set(_keys(Config))
    sections = {key.partition(".")[0] for key in keys if "." in key}
    text = (ROOT / "docs" / name).read_text()
    used = {word for word in re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)[`:= ]", text) if word.partition(".")[0] in sections}
    assert not used - keys
