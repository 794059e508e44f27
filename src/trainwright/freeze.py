"""Freezing by name pattern."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from trainwright.errors import ConfigError


def freeze(module: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Turns off gradients of the parameters whose names match; returns their names.

    Raises ConfigError for a pattern that matches nothing, and where nothing is left to train.
    """
    frozen: list[str] = []
    names = [name for name, _ in module.named_parameters()]
    for pattern in patterns:
        matches = [name for name in names if fnmatchcase(name, pattern)]
        if not matches:
            raise ConfigError(
                f"freeze pattern {pattern!r} matches no parameter",
                "a pattern is matched against parameter names, * stands for anything",
                f"one of: {', '.join(names[:6])}, ...",
            )
        frozen.extend(matches)
    for name, parameter in module.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    if patterns and not any(p.requires_grad for p in module.parameters()):
        raise ConfigError(
            f"freeze={list(patterns)} freezes everything", "something is left to train", "a narrower pattern"
        )
    return frozen
