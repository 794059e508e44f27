"""From a YAML file, a dict and dotted overrides to one frozen `Config`, with the source of every value.

Nothing here imports torch. An unknown key anywhere is answered with the nearest valid name, or with our word for
another framework's, before any process starts.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from trainwright.config.check import check
from trainwright.config.foreign import ours
from trainwright.config.schema import Config
from trainwright.config.section import Section
from trainwright.config.yaml_reader import parse_value, plain, read_file
from trainwright.errors import ConfigError, UnknownKeyError

# A bare word where a section is expected means this key of it.
_BARE: dict[str, str] = {
    "model": "preset",
    "precision": "dtype",
    "zero": "stage",
    "optimizer": "name",
    "lr_schedule": "name",
    "data": "path",
    "recompute": "mode",
}


@dataclass(frozen=True)
class Resolved:
    """A config and, by dotted key, where each value came from: default, a file's name, python, or override."""

    config: Config
    sources: Mapping[str, str]

    def was_set(self, key: str) -> bool:
        """Whether `key` (dotted) was given by anybody."""
        return self.sources.get(key, "default") != "default"

    def to_yaml(self) -> str:
        """The resolved config as YAML that loads again, each value's source as a comment."""
        lines = ["# The resolved config of this run: every key, its value, and where the value came from."]
        _write_section(lines, self.config, "", 0, self.sources)
        return "\n".join(lines) + "\n"

    def replace(self, source: str, **values: Any) -> Resolved:
        """With dotted keys (dots as `__`) set anew; validated again."""
        tree = self.config.model_dump(mode="python")
        sources = dict(self.sources)
        for key, value in values.items():
            dotted = key.replace("__", ".")
            _set(tree, dotted, value)
            sources[dotted] = source
        config = _validate(tree)
        check(config, {k for k, s in sources.items() if s != "default"})
        return Resolved(config, sources)


def load_config(
    source: str | Path | Mapping[str, Any] | Config | Resolved | None, overrides: Sequence[str] = ()
) -> Resolved:
    """The config of a YAML file (path), a dict, a `Config`, or defaults alone (None), under `key.path=value` overrides.

    An override of one key leaves its section's others as they are; `section={...}` takes the whole section's place.

    Raises UnknownKeyError, ContradictionError or ConfigError; never anything else for a bad config.
    """
    if isinstance(source, Resolved) and not overrides:
        return source
    tree, origin = _read(source)
    sources: dict[str, str] = dict(source.sources) if isinstance(source, Resolved) else {}
    tree = _expand_bare(tree)
    _refuse_unknown(tree, Config, "", origin)
    if not isinstance(source, Resolved):
        for key in _leaves(tree):
            sources[key] = origin
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip().lstrip("-")
        if not equals:
            raise ConfigError(
                f"{override!r} on the command line",
                "an override is key.path=value",
                f"{key}=... , such as zero.stage=2",
            )
        part: dict[str, Any] = {}
        value = parse_value(text, key)
        _set(part, key, value)
        part = _expand_bare(part)
        _refuse_unknown(part, Config, "", "override")
        if isinstance(value, dict):  # key={...} is the whole section; key.part=value a part of it
            _set(tree, key, {})
            sources = {k: v for k, v in sources.items() if not k.startswith(f"{key}.")}
        for leaf in _leaves(part):
            sources[leaf] = "override"
        tree = _merge(tree, part)
    config = _validate(tree)
    check(config, {k for k, s in sources.items() if s != "default"})
    for key in _leaves(config.model_dump(mode="python")):
        sources.setdefault(key, "default")
    return Resolved(config, sources)


def _read(source: str | Path | Mapping[str, Any] | Config | Resolved | None) -> tuple[dict[str, Any], str]:
    if source is None:
        return {}, "default"
    if isinstance(source, Resolved):
        return source.config.model_dump(mode="python"), "python"
    if isinstance(source, Config):
        return source.model_dump(mode="python", exclude_unset=True), "python"
    if isinstance(source, Mapping):
        return plain(source), "python"
    path = Path(source)
    return read_file(path), path.name


def _expand_bare(tree: dict[str, Any]) -> dict[str, Any]:
    return {
        key: {_BARE[key]: value} if key in _BARE and value is not None and not isinstance(value, dict | list) else value
        for key, value in tree.items()
    }


def _set(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *path, last = dotted.split(".")
    for part in path:
        nested = tree.setdefault(part, {})
        if not isinstance(nested, dict):
            nested = tree[part] = {}
        tree = nested
    tree[last] = value


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> list[str]:
    found: list[str] = []
    for key, value in tree.items():
        if isinstance(value, Mapping) and value and key != "options":
            found.extend(_leaves(value, f"{prefix}{key}."))
        else:
            found.append(prefix + key)
    return found


def section_of(annotation: Any) -> type[Section] | None:
    """The Section inside a field's annotation (`Section`, `Section | None`, `float | Section | None`), if any."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return next((s for a in typing.get_args(annotation) if (s := section_of(a)) is not None), None)
    if typing.get_origin(annotation) is typing.Annotated:
        return section_of(typing.get_args(annotation)[0])
    return None


def _refuse_unknown(tree: Mapping[str, Any], section: type[Section], prefix: str, origin: str) -> None:
    for key, value in tree.items():
        field = section.model_fields.get(key)
        if field is None:
            raise UnknownKeyError(
                f"unknown key {prefix}{key} ({origin})",
                "every key is one of the schema's",
                _nearest(key, prefix, section),
            )
        inner = section_of(field.annotation)
        if inner is not None and isinstance(value, Mapping):
            _refuse_unknown(value, inner, f"{prefix}{key}.", origin)


def _nearest(key: str, prefix: str, section: type[Section]) -> str:
    if ":" in key:  # YAML's {name:adamw} is one key
        return f"a space after the colon: {key.replace(':', ': ', 1)}"
    our_word = ours(key) or _near_foreign(key)
    if our_word is not None:
        return f"here: {our_word}"
    everywhere = all_keys(Config)
    same = [name for name in everywhere if name.rsplit(".", 1)[-1] == key]
    if same:  # the same word in another section
        return f"did you mean {same[0]}?"
    here = difflib.get_close_matches(key, list(section.model_fields), n=1, cutoff=0.6)
    if here:
        return f"did you mean {prefix}{here[0]}?"
    by_last = {name.rsplit(".", 1)[-1]: name for name in reversed(everywhere)}
    near = difflib.get_close_matches(key, list(by_last), n=1, cutoff=0.75)
    if near:
        return f"did you mean {by_last[near[0]]}?"
    return f"keys here: {', '.join(section.model_fields)}"


def _near_foreign(key: str) -> str | None:
    """A slip in another framework's word (`bf16_`), where no word of ours is as near."""
    stripped = key.strip("_-").lower()
    return ours(stripped) if stripped != key else None


def all_keys(section: type[Section], prefix: str = "") -> list[str]:
    """Every dotted key of the schema."""
    keys: list[str] = []
    for name, field in section.model_fields.items():
        inner = section_of(field.annotation)
        keys.append(prefix + name)
        if inner is not None:
            keys.extend(all_keys(inner, f"{prefix}{name}."))
    return keys


def _validate(tree: dict[str, Any]) -> Config:
    try:
        return Config.model_validate(_without_nulls(tree, Config))
    except ValidationError as error:
        first = error.errors()[0]
        path = [str(part) for part in first["loc"]]
        name, field = _describe(path)
        message = first["msg"].removeprefix("Value error, ")
        message = message[0].lower() + message[1:]
        raise ConfigError(f"{name}={_short(first['input'])}", message, _remedy(name, field)) from None


def _without_nulls(tree: Mapping[str, Any], section: type[Section]) -> dict[str, Any]:
    """null means: not set. A key whose default is a value gets that."""
    found = {}
    for key, value in tree.items():
        field = section.model_fields.get(key)
        inner = section_of(field.annotation) if field is not None else None
        if value is None and field is not None and type(None) not in typing.get_args(field.annotation):
            continue
        found[key] = _without_nulls(value, inner) if inner is not None and isinstance(value, Mapping) else value
    return found


def _describe(path: list[str]) -> tuple[str, FieldInfo | None]:
    section: type[Section] | None = Config
    names: list[str] = []
    field: FieldInfo | None = None
    for part in path:
        if section is not None and part in section.model_fields:
            field = section.model_fields[part]
            names.append(part)
            section = section_of(field.annotation)
        elif part.isdigit():
            names.append(part)
    return ".".join(names), field


# A value that works, where the default is "not set".
_EXAMPLES = {
    "steps": "1000", "tokens": "1e9", "epochs": "1", "duration": "3m", "stop_after": "3h50m", "gradient_clipping": "1.0",
    "ema": "0.999", "batch.global_size": "64", "batch.micro_size": "8", "batch.accumulation": "4",
    "optimizer.betas": "[0.9, 0.95]", "model.preset": "llama-10m", "data.path": "data/plays",
}  # fmt: skip


def _remedy(name: str, field: FieldInfo | None) -> str:
    if field is None:
        return "see docs/config.md"
    example = _EXAMPLES.get(name)
    if example is None and isinstance(field.default, str | int | float | bool):
        example = str(field.default).lower() if isinstance(field.default, bool) else str(field.default)
    return f"{name}={example} ({field.description})" if example is not None else f"{name}: {field.description}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


def _write_section(lines: list[str], section: Section, prefix: str, indent: int, sources: Mapping[str, str]) -> None:
    for name in type(section).model_fields:
        value = getattr(section, name)
        pad = "  " * indent
        if isinstance(value, Section):
            lines.append(f"{pad}{name}:")
            _write_section(lines, value, f"{prefix}{name}.", indent + 1, sources)
            continue
        plain = [v.model_dump() if isinstance(v, Section) else v for v in value] if isinstance(value, tuple) else value
        text = (
            yaml.safe_dump(plain, default_flow_style=True, width=10_000, sort_keys=False)
            .strip()
            .removesuffix("...")
            .strip()
        )
        lines.append(f"{pad}{name}: {text}  # {sources.get(prefix + name, 'default')}")
