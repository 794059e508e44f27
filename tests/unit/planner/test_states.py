"""States to the byte: the planner's count against the dry run, which builds the rank."""

from __future__ import annotations

from typing import Any

import pytest

from trainwright.config import load_config
from trainwright.dry_run.run import dry_run
from trainwright.planner.from_config import shape_of
from trainwright.planner.states import rank_states
from trainwright.planner.workload import Plan

ODD = {"vocab_size": 515, "dim": 60, "layers": 3, "heads": 6, "kv_heads": 3, "ffn_dim": 90}
EVEN = {
    "vocab_size": 515,
    "dim": 64,
    "layers": 5,
    "heads": 4,
    "kv_heads": 2,
    "ffn_dim": 96,
    "tied": False,
    "qk_norm": True,
}

CASES: dict[str, tuple[dict[str, Any], dict[str, Any], int, int]] = {
    "zero 0": (EVEN, {"zero": 0}, 4, 1),
    "zero 1, padded": (ODD, {"zero": 1}, 7, 6),
    "zero 3, padded": (ODD, {"zero": 3}, 64, 63),
    "hybrid": (EVEN, {"zero": 2, "replicate": 2}, 8, 5),
    "tensor, an uneven vocabulary": (EVEN, {"zero": 3, "tensor": 2}, 8, 7),
    "pipeline": (EVEN, {"zero": 1, "pipeline": 2}, 4, 0),
    "pipeline, its end, tied": (ODD, {"zero": 1, "pipeline": 3}, 3, 2),
    "tensor and pipeline": (EVEN, {"zero": 2, "tensor": 2, "pipeline": 2}, 8, 6),
    "zbv, its ends together": (EVEN, {"zero": 1, "pipeline": 2, "schedule": "zbv"}, 4, 0),
    "context": (EVEN, {"zero": 3, "context": 2}, 8, 3),
    "8 bits, some of it": (EVEN | {"dim": 128}, {"zero": 1, "tensor": 2, "moments": "8bit"}, 4, 1),
    "bf16 moments": (ODD, {"zero": 3, "moments": "bf16"}, 7, 6),
    "bf16 masters with a compensation": (ODD, {"zero": 2, "masters": "bf16_kahan", "moments": "bf16"}, 7, 0),
}


@pytest.mark.parametrize("case", CASES)
def test_they_are_the_dry_runs_to_the_byte(case: str) -> None:
    model, degrees, ranks, rank = CASES[case]
    schedule = degrees.get("schedule")
    formats = {k: degrees[k] for k in ("masters", "moments") if k in degrees}
    parallel = {k: v for k, v in degrees.items() if k not in ("zero", "schedule", *formats)}
    words: dict[str, Any] = {"parallel": parallel} if parallel or schedule else {}
    if schedule is not None:
        words["parallel"]["pipeline_schedule"] = schedule
    resolved = load_config(
        {
            "model": {"transformer": model},
            "batch": {"micro_size": 2, "accumulation": 4},
            "data": {"sequence_length": 32},
            "precision": {"dtype": "bf16", "master": formats.get("masters", "fp32")},
            "optimizer": {"moments": formats.get("moments")},
            "zero": degrees["zero"],
            **words,
        }
    )
    real = dry_run(resolved, ranks, rank)
    tensor, pipeline = degrees.get("tensor", 1), degrees.get("pipeline", 1)
    context, replicate = degrees.get("context", 1), degrees.get("replicate", 1)
    plan = Plan(
        zero=degrees["zero"],
        data=ranks // (tensor * pipeline * context),
        tensor=tensor,
        pipeline=pipeline,
        context=context,
        replicate=replicate,
        schedule=schedule,
        interleave=2 if schedule == "zbv" else 1,
        sharded_masters=True,
        **formats,
    )
    place = real.coordinates
    found = rank_states(
        shape_of(resolved),
        plan,
        stage=place["pipeline"],
        shard=place["shard"] * context + place["context"],
        tensor=place["tensor"],
    )
    rows = {row.kind: row.between_steps_bytes for row in real.memory}
    assert (found.parameters, found.moments) == (rows["parameters"], rows["optimizer"])
