"""The config's sections about a run, not about what it computes: evaluation, the guard, the profile, checkpoints. As in
schema.py, nothing here imports torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from trainwright.config.section import Count, Duration, Section


class EvaluateConfig(Section):
    """Evaluation on the held-out split during training."""

    every: Count = Field(0, ge=0, description="Steps between evaluations; 0 = only after the last step.")
    batches: Count = Field(20, ge=0, description="Global batches an evaluation; 0 = the whole held-out split.")
    final_batches: Count = Field(200, ge=0, description="The same for the evaluation after the last step.")
    keep_best: bool = Field(False, description="Keep the checkpoint with the lowest val_loss as checkpoints/best.")


class GuardConfig(Section):
    """What notices ranks that wait for each other in vain, and says who keeps whom waiting. docs/faults.md"""

    watch: bool = Field(True, description="Watch over several ranks; one thread each.")
    disagree: Duration = Field(
        5.0, gt=0, description="Standstill after which ranks compare where they are; different calls end the run."
    )
    wait: Duration | None = Field(
        None,
        gt=0,
        description="Standstill that ends the run whatever the reason; default 10 x the slowest step, at least 10m.",
    )
    first_wait: Duration = Field(
        1800.0,
        gt=0,
        description="The same before the second step is done, in calls that save or load, and for ranks outside the engine.",
    )
    non_finite: Literal["skip", "stop"] = Field(
        "skip",
        description="A gradient that is not finite: skip the step, or stop; either way the first module, the ranks and the "
        "samples are named. What fp16's loss scale is too large for is always skipped.",
    )
    spike: float = Field(
        10.0,
        ge=0,
        description="A loss so many deviations above the median of the last 64 is noted in run_dir/incidents and can be "
        "replayed; 0 = never.",
    )
    on_spike: Literal["note", "stop"] = Field("note", description="stop: save nothing more, end before the next step.")
    replicas_every: Count = Field(
        500, ge=0, description="Steps between comparisons of replicated parameters, bit by bit; 0 = never."
    )


class ProfileConfig(Section):
    """A trace of some steps, and where their time and memory go: run_dir/profile/."""

    steps: Count = Field(0, ge=0, description="Steps to trace; 0 = none.")
    after: Count = Field(5, ge=0, description="Steps of this launch before the first traced one.")


class CheckpointConfig(Section):
    """Checkpoints of the run, under run_dir/checkpoints."""

    every: Count = Field(0, ge=0, description="Steps between checkpoints; 0 = only at the end and on a stop.")
    keep: Count = Field(2, ge=0, description="Newest checkpoints kept; 0 keeps all.")
    keep_every: Count = Field(0, ge=0, description="Those at multiples of this step are kept for ever; 0 = none.")
    resume: Literal["auto", "must", "never"] = Field(
        "auto", description="auto: from the newest whole one if any; must: or fail; never: refuse a run that has some."
    )
    asynchronous: bool = Field(True, description="Write in the background, on a process group of its own.")
    at_end: bool = Field(True, description="Save after the last step.")
    store: str | None = Field(
        None,
        description="An object store's prefix, such as `s3://bucket/my-run` (any fsspec URL): each checkpoint is copied "
        "there when it is whole, and a resume takes the newest of both places. Needed where machines share no folder.",
    )
