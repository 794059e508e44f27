"""YAML as a config takes it: no key twice, no aliases, no other nesting or size than a config has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from trainwright.errors import ConfigError

_MAX_BYTES = 1 << 20
_MAX_DEPTH = 20


class StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice (YAML would silently keep the last) and aliases (bombs)."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise ConfigError("a YAML alias (*name)", "each value is written out", "write the value itself")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise ConfigError(
                    f"key {key!r} in line {key_node.start_mark.line + 1}", "keys are words", "see docs/config.md"
                )
            if key in seen:
                raise ConfigError(
                    f"key {key!r} twice, again in line {key_node.start_mark.line + 1}",
                    "a key is given once",
                    "remove one",
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def plain(tree: Any, depth: int = 0) -> Any:
    """`tree` as plain dicts and lists with string keys. Raises ConfigError for keys of other types or deep nesting."""
    if depth > _MAX_DEPTH:
        raise ConfigError(
            f"a config nested over {_MAX_DEPTH} deep", "sections nest at most three deep", "see docs/config.md"
        )
    if isinstance(tree, BaseModel):
        tree = tree.model_dump(mode="python", exclude_unset=True)
    if isinstance(tree, Mapping):
        for key in tree:
            if not isinstance(key, str):
                raise ConfigError(f"key {key!r} of type {type(key).__name__}", "keys are strings", "see docs/config.md")
        return {key: plain(value, depth + 1) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [plain(value, depth + 1) for value in tree]
    return tree


def parse_value(text: str, key: str) -> Any:
    """The value of an override, read as YAML; what is no YAML is text."""
    try:
        return plain(yaml.load(text, Loader=StrictLoader)) if text.strip() else None
    except yaml.YAMLError:
        if text.lstrip()[:1] in "[{":
            raise ConfigError(f"{key}={text}", "lists and mappings are written as in YAML", f"{key}=[a, b]") from None
        return text


def read_file(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError for anything else."""
    if not path.is_file():
        near = sorted(str(p) for p in path.parent.glob("*.y*ml"))[:5] if path.parent.is_dir() else []
        raise ConfigError(
            f"no config file {str(path)!r}",
            "a config is a YAML file",
            f"one of: {', '.join(near)}"
            if near
            else "give key=value pairs alone, such as model.preset=llama-10m data.path=D",
        )
    if path.stat().st_size > _MAX_BYTES:
        raise ConfigError(f"{path} holds {path.stat().st_size} bytes", f"at most {_MAX_BYTES}", "is it a config file?")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=StrictLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{path} is not YAML: {' '.join(str(error).split())[:300]}", "a config is YAML", "see docs/config.md"
        ) from None
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds a {type(tree).__name__}", "a config is a mapping of keys", "key: value lines")
    return dict(plain(tree))
