"""The config's `outer` section: groups of ranks joined by slow links. As in schema.py, nothing here imports torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from trainwright.config.section import Count, Duration, Section


class OuterConfig(Section):
    """Groups of ranks that train by themselves and average now and then: DiLoCo (arXiv 2311.08105), overlapped and by
    fragments (arXiv 2501.18512). Each group is a launch of its own; docs/slow_links.md"""

    groups: Count = Field(1, gt=0, description="Groups that share the global batch; 1: no outer steps.")
    group: Count | None = Field(
        None,
        ge=0,
        description="Which of them this launch is, from 0 (also TRAINWRIGHT_GROUP); default: all are started here.",
    )
    lighthouse: str | None = Field(
        None, description="host:port of `trainwright lighthouse`, where groups meet; default: one is started here."
    )
    address: str | None = Field(
        None, description="This host's address for other groups; default: that of the interface towards the lighthouse."
    )
    every: Count = Field(50, gt=0, description="Inner steps between two outer steps of the same weights, H.")
    fragments: Count = Field(
        1, gt=0, description="Parts of the model that are averaged in turn, every H / fragments steps one of them."
    )
    lr: float = Field(0.7, gt=0, description="Learning rate of the outer step.")
    momentum: float = Field(0.9, ge=0, lt=1, description="Nesterov momentum of the outer step; 0: none.")
    dtype: Literal["fp32", "bf16", "int8", "int4"] = Field(
        "int8",
        description="Format on the link. What bf16, int8 and int4 (a scale every 256 values) round off is kept and sent with "
        "the next outer step (error feedback).",
    )
    overlap: bool = Field(
        True,
        description="Average in the background while inner steps go on, and apply the outer step `delay` steps late.",
    )
    delay: Count | None = Field(
        None,
        gt=0,
        description="With overlap: inner steps between sending and applying; default half of the most there are.",
    )
    correction: Literal["shift", "mix"] = Field(
        "shift",
        description="With overlap: what becomes of the steps made since sending. shift: they are made again from the new "
        "weights, as they were; mix: new and own weights are mixed (arXiv 2501.18512).",
    )
    mixing: float | None = Field(
        None, ge=0, le=1, description="correction=mix: share of the group's own weights; default 0.5."
    )
    min_groups: Count = Field(1, gt=0, description="Fewest groups that go on; below it they wait.")
    start_wait: Duration = Field(
        600.0, ge=0, description="How long the first groups wait at the start for all to come."
    )
    patience: Duration = Field(
        600.0,
        gt=0,
        description="How long an outer step waits for a group that lives and is late, before going on without it.",
    )
    timeout: Duration = Field(60.0, gt=0, description="Silence on the link, within an outer step, that breaks it off.")
    heartbeat_timeout: Duration = Field(
        3.0, gt=0, description="Silence after which the lighthouse (one that is started here) holds a group for dead."
    )

    @property
    def spacing(self) -> int:
        """Fewest inner steps between two outer steps, whatever the fragment."""
        return self.every // self.fragments

    @property
    def steps_late(self) -> int:
        """Inner steps between sending and applying; 0 without overlap."""
        if not self.overlap:
            return 0
        return self.delay if self.delay is not None else max(1, (self.spacing - 1) // 2)

    @property
    def own_share(self) -> float:
        """Of a group's own weights in a mix."""
        return 0.5 if self.mixing is None else self.mixing
