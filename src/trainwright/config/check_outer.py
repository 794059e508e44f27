"""Contradictions in how groups of ranks work together: got, rule, and a value that works."""

from __future__ import annotations

from collections.abc import Set

from trainwright.config.schema import Config
from trainwright.errors import ContradictionError


def check_outer(config: Config, given: Set[str]) -> None:
    """Raises ContradictionError for what cannot hold in `outer`, or beside it."""
    outer = config.outer
    if outer.groups == 1:
        for key in sorted(given):
            name = key.removeprefix("outer.")
            field = type(outer).model_fields.get(name)
            if name not in ("groups", "group", key) and field is not None and getattr(outer, name) != field.default:
                raise ContradictionError(
                    f"{key} with outer.groups=1", "outer steps act between groups", f"outer.groups=2, or remove {key}"
                )
    if outer.group is not None and outer.group >= outer.groups:
        raise ContradictionError(
            f"outer.group={outer.group} with outer.groups={outer.groups}",
            "groups are counted from 0",
            f"outer.group={outer.groups - 1}, or outer.groups={outer.group + 1}",
        )
    if outer.groups == 1:
        return
    if outer.min_groups > outer.groups:
        raise ContradictionError(
            f"outer.min_groups={outer.min_groups} with outer.groups={outer.groups}",
            "there are at most as many groups as outer.groups",
            "outer.min_groups=1",
        )
    if outer.group is not None and outer.lighthouse is None:
        raise ContradictionError(
            f"outer.group={outer.group} without outer.lighthouse",
            "a group that is started by itself has to know where the groups meet",
            "outer.lighthouse=host:29510 of a running `trainwright lighthouse`, or leave outer.group out to start all here",
        )
    _schedule(config, given)
    _beside(config)


def _schedule(config: Config, given: Set[str]) -> None:
    outer = config.outer
    if outer.fragments > outer.every:
        raise ContradictionError(
            f"outer.fragments={outer.fragments} with outer.every={outer.every}",
            "a step sends one fragment at most",
            f"outer.fragments={outer.every}",
        )
    if not outer.overlap:
        correction = None if outer.correction == "shift" else outer.correction
        for key, value in (("delay", outer.delay), ("mixing", outer.mixing), ("correction", correction)):
            if value is not None:
                raise ContradictionError(
                    f"outer.{key}={value} with outer.overlap=false",
                    "without overlap an outer step is applied at once",
                    f"outer.overlap=true, or remove outer.{key}",
                )
    elif outer.steps_late >= outer.spacing:
        raise ContradictionError(
            f"outer.delay={outer.steps_late} with outer.every={outer.every} and outer.fragments={outer.fragments}",
            f"one outer step is under way at a time: delay is less than every / fragments, {outer.spacing}",
            f"outer.delay={outer.spacing - 1}" if outer.spacing > 1 else "outer.overlap=false, or a larger outer.every",
        )
    if outer.mixing is not None and outer.correction != "mix":
        raise ContradictionError(
            f"outer.mixing={outer.mixing} with outer.correction={outer.correction}",
            "a share of the own weights acts where weights are mixed",
            "outer.correction=mix, or remove outer.mixing",
        )


def _beside(config: Config) -> None:
    outer, batch = config.outer, config.batch
    sequences = batch.global_size or (
        batch.global_tokens // config.data.sequence_length if batch.global_tokens is not None else None
    )
    if sequences is not None and sequences % outer.groups:
        raise ContradictionError(
            f"a global batch of {sequences} sequences with outer.groups={outer.groups}",
            "groups weigh equally, so their shares of the global batch are equal",
            f"batch.global_size={max(1, round(sequences / outer.groups)) * outer.groups}",
        )
    for got, rule, remedy in (
        (
            f"duration={config.duration}" if config.duration is not None else None,
            "each group would measure another horizon",
            "steps, tokens or epochs",
        ),
        (
            f"precision.master={config.precision.master}" if config.precision.master != "fp32" else None,
            "an outer step changes fp32 masters that lie in the model",
            "precision.master=fp32",
        ),
        (
            f"precision.dtype={config.precision.dtype}" if config.precision.dtype == "fp64" else None,
            "outer steps are made in fp32",
            "precision.dtype=fp32 or bf16",
        ),
        (
            f"offload.optimizer={config.offload.optimizer}" if config.offload.optimizer == "disk" else None,
            "an outer step changes fp32 masters that lie in the model",
            "offload.optimizer=cpu or none",
        ),
    ):
        if got is not None:
            raise ContradictionError(f"{got} with outer.groups={outer.groups}", rule, remedy)
