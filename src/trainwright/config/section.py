"""What every part of the config is made of."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict

from trainwright.config.units import parse_count, parse_duration_s

Count = Annotated[int, BeforeValidator(parse_count)]
"""A whole number; strings such as "8", "1e9" or "10_000" are taken too."""
Duration = Annotated[float, BeforeValidator(parse_duration_s)]
"""Seconds; strings such as "90s", "3m" or "3h50m" are taken too."""
Dtype = Literal["fp32", "bf16", "fp16", "fp64"]


class Section(BaseModel):
    """A part of the config: unknown keys are refused, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())
