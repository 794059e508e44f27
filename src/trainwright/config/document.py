"""docs/config.md out of the schema: `python -m trainwright.config.document > docs/config.md`."""

from __future__ import annotations

import re
import types
import typing
from typing import Any

from trainwright.config.load import section_of
from trainwright.config.schema import Config
from trainwright.config.section import Section

_HEAD = """# The config

Generated from `src/trainwright/config/` (schema.py and its neighbours) by `make docs`; a test keeps it in step.

A config is a YAML file, a dict in Python, or `key.path=value` on the command line (which goes before the file). A bare word
where a section stands means its main key: `precision: bf16`, `zero: 2`, `optimizer: muon`, `lr_schedule: cosine`,
`model: llama-10m`, `data: FOLDER`. On the command line `section.key=value` changes one key and `section={...}` takes the
whole section's place. Counts may be written `1e9` or `10_000`, times `90s`, `3m`, `3h50m`. `null` or absent means: not set.
An unknown key is refused with the nearest one; a word of DeepSpeed, Hugging Face or torchtitan is answered with ours.
`trainwright train CONFIG --print-config` shows every value and where it came from.

"""


def document() -> str:
    """The whole page."""
    lines: list[str] = []
    top = [(n, f) for n, f in Config.model_fields.items() if section_of(f.annotation) is None]
    lines += ["## The run", "", *_table("", top)]
    for name, field in Config.model_fields.items():
        section = section_of(field.annotation)
        if section is not None:
            lines += _section(name, section)
    return _HEAD + "\n".join(lines).rstrip() + "\n"


def _section(prefix: str, section: type[Section]) -> list[str]:
    lines = ["", f"## {prefix}", "", " ".join((section.__doc__ or "").split()), ""]
    lines += _table(prefix + ".", list(section.model_fields.items()))
    for name, field in section.model_fields.items():
        inner = section_of(field.annotation)
        if inner is not None:
            lines += _section(f"{prefix}.{name}", inner)
    return lines


def _table(prefix: str, fields: list[tuple[str, Any]]) -> list[str]:
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in fields:
        default = "" if field.is_required() else _value(field)
        lines.append(f"| `{prefix}{name}` | {_type(field.annotation, name)} | {default} | {field.description} |")
    return lines


def _value(field: Any) -> str:
    value = field.default if field.default_factory is None else "(section)"
    if value is None:
        return "not set"
    if value == "(section)":
        return "below"
    text = str(value).lower() if isinstance(value, bool) else str(list(value) if isinstance(value, tuple) else value)
    return f"`{text}`"


def _type(annotation: Any, name: str) -> str:
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return "time" if name in ("duration", "stop_after") else _type(typing.get_args(annotation)[0], name)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(a, name) for a in typing.get_args(annotation) if a is not type(None))
    if origin is typing.Literal:
        return ", ".join(f"`{a}`" for a in typing.get_args(annotation))
    if origin is tuple:
        return "list of " + _type(typing.get_args(annotation)[0], name)
    if origin is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        words = re.sub(r"(?<!^)(?=[A-Z])", " ", annotation.__name__).lower()
        return f"section ({words})"
    return {"int": "count", "float": "number", "str": "text", "bool": "yes/no"}.get(
        annotation.__name__, annotation.__name__
    )


if __name__ == "__main__":
    print(document(), end="")
