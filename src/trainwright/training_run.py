"""From a resolved config to a finished run folder: the steps before and after the loop of `train.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from trainwright import distributed
from trainwright.callbacks import Callback
from trainwright.checkpoint.resume import ResumePoint
from trainwright.config import Config, Resolved
from trainwright.data.batch import BatchPlan
from trainwright.data.loader import TokenLoader
from trainwright.data.plan import plan_batches, share_of_group
from trainwright.data.shards import TokenDataset
from trainwright.engine import Engine
from trainwright.errors import ConfigError, ContradictionError
from trainwright.guard.same_machines import check_same_data
from trainwright.guard.spikes import SpikeDetector
from trainwright.guard.together import together
from trainwright.horizon import measure_steps, planned_steps, recorded_steps
from trainwright.launch.signals import StopSignal
from trainwright.ledger import here
from trainwright.mesh import resolve_degrees
from trainwright.monitor.console import Console
from trainwright.monitor.profile import StepProfiler
from trainwright.monitor.report import write_report
from trainwright.monitor.sinks import open_sinks
from trainwright.planner.at_start import PlanCheck, Planned
from trainwright.preflight import look_ahead, run_folder, run_sites
from trainwright.run_checkpoints import RunCheckpoints
from trainwright.run_incidents import RunIncidents
from trainwright.run_lock import only_run
from trainwright.run_model import RunModel, peak_flops_of_all_ranks
from trainwright.run_summary import introduce, sample_texts, summarise
from trainwright.snapshot import restore
from trainwright.train import TrainingLoop, open_data, write_config

if TYPE_CHECKING:
    from trainwright.outer.training import OuterTraining


@dataclass(frozen=True)
class RunResult:
    """How a run ended."""

    run_dir: Path
    status: str
    """"finished" or "stopped"."""
    report: Path | None
    loop: TrainingLoop


def run_training(resolved: Resolved, *, quiet: bool = False, callbacks: Sequence[Callback] = ()) -> RunResult:
    """Trains the model that `resolved` describes on its data set. Collective: every rank of the launch calls it.

    Resumes as checkpoint.resume says. Ctrl-C and SIGTERM (on any rank) save and end in order.
    """
    planned = Planned(resolved)  # on rank 0 alone, before the ranks meet
    distributed.start(resolved.config.parallel.backend)
    clocks = look_ahead(resolved.config)
    check = PlanCheck.begin(planned.agreed())
    resolved, config = check.plan.resolved, check.plan.resolved.config
    run_dir = run_folder(config)
    sites = run_sites(config, run_dir)
    with only_run(run_dir), Console(dist.get_rank(), run_dir, quiet=quiet) as console:
        if clocks is not None:
            console.say(clocks, warning=True)
        in_background = config.checkpoint.asynchronous and "disk" not in (
            config.offload.optimizer,
            config.offload.parameters,
        )
        settings = config.checkpoint.model_copy(update={"asynchronous": in_background})
        checkpoints = RunCheckpoints(run_dir, settings, sites, lambda text: console.say(text, warning=True))
        try:
            point = checkpoints.resume_point()
            for told in (*check.plan.said, *check.plan.warnings):
                console.say(told, warning=told in check.plan.warnings)
            loop = _prepare(resolved, run_dir, console, checkpoints, point, (check, *callbacks))
            with StopSignal() as stop:
                status = loop.run(stop)
            report = _finish(loop, status, check)
            loop.loader.close()
            loop.engine.close()
        finally:
            checkpoints.close()
    return RunResult(run_dir, status, report, loop)


def _prepare(
    resolved: Resolved,
    run_dir: Path,
    console: Console,
    checkpoints: RunCheckpoints,
    point: ResumePoint | None,
    callbacks: Sequence[Callback],
) -> TrainingLoop:
    config = resolved.config
    dataset, held_out = together(lambda: open_data(config.data), "opening of the data set")
    check_same_data(dataset.version)
    world_size = dist.get_world_size()
    degrees = resolve_degrees(config.parallel, config.zero.stage, world_size)
    replicas = degrees.replicate * degrees.shard
    plan = _plan(config, replicas, point)
    epoch = dataset.split("train").num_sequences(config.data.sequence_length)
    if held_out is None and (config.evaluate.every or config.evaluate.keep_best):
        raise ConfigError(
            f"evaluate.every={config.evaluate.every} on {dataset.path}, which has no held-out split",
            "an evaluation needs held-out documents",
            "prepare the data with --held-out 0.05 and several documents, or leave `evaluate` out",
        )
    model = RunModel(resolved, dataset.vocab_size, plan.accumulation, resumed=point is not None)
    steps = planned_steps(config, plan, epoch)
    if config.duration is not None:
        steps = recorded_steps(run_dir, config.duration) if point is not None else None
        steps = steps or _measured_steps(config, run_dir, dataset, plan, console, model.build)
    engine = model.build(steps)
    loader = loader_for(config, dataset, plan, engine)
    _say_waste(plan, replicas, console)
    header = {
        "data_version": dataset.version,
        "world_size": world_size,
        "zero_stage": config.zero.stage,
        "global_size": plan.global_size,
        "sequence_length": config.data.sequence_length,
        "steps": steps,
        "seed": config.seed,
        "shuffle": config.data.shuffle,
        "plan": next(c.plan.to_json() for c in callbacks if isinstance(c, PlanCheck)),
        **({"group": config.outer.group, "groups": config.outer.groups} if config.outer.groups > 1 else {}),
    }
    outer = _outer(config, engine, steps, run_dir)
    resume_step = int(_scalars(point)["step"]) if point is not None else 0
    loop = TrainingLoop(
        resolved, run_dir, engine, loader, held_out, plan, steps, console, None, checkpoints,
        parameters=model.facts.parameters,
        flops_per_token=model.facts.flops_per_token,
        peak_flops=peak_flops_of_all_ranks(config, engine.device),
        incidents=RunIncidents(run_dir, checkpoints, loader, dataset),
        spikes=SpikeDetector(config.guard.spike),
        profiler=StepProfiler(config.profile, run_dir, dist.get_rank(), engine.parts.model.units, engine.device),
        callbacks=(*callbacks, *([outer] if outer is not None else [])),
    )  # fmt: skip
    introduce(loop, dataset)
    if point is not None:
        _resume(loop, point, checkpoints)
    if outer is not None:
        resume_step = outer.join(loop)
    # Only now, when nothing can be refused any more, is the run folder written to.
    write_config(run_dir, resolved)
    if distributed.is_main():
        settings = config.model_dump(mode="json")
        loop.sinks = open_sinks(run_dir, config.track, header=header, config=settings, resume_step=resume_step)
    return loop


def _outer(config: Config, engine: Engine, steps: int | None, run_dir: Path) -> OuterTraining | None:
    """Outer steps with other groups, where there are some. Collective over this group."""
    if config.outer.groups == 1:
        return None
    from trainwright.outer import check_installed

    check_installed()
    from trainwright.outer.training import OuterTraining

    return OuterTraining(config, engine, steps, run_dir)


def _say_waste(plan: BatchPlan, replicas: int, console: Console) -> None:
    waste = plan.padded_rows(replicas)
    if waste:
        console.say(
            f"{plan.global_size} sequences a step on {replicas} ranks: {plan.rows} rows each, "
            f"{waste} of {plan.rows * replicas} padded and masked ({waste / (plan.rows * replicas):.0%} of the work)",
            warning=True,
        )


def _plan(config: Config, replicas: int, point: ResumePoint | None) -> BatchPlan:
    """The batch plan; a resumed run keeps its global batch where the config leaves it to the number of ranks."""
    recorded = None if point is None else _scalars(point)["state"].get("global_size")
    plan = plan_for(config, replicas, recorded)
    if recorded is not None and recorded != plan.global_size:
        raise ContradictionError(
            f"{plan.global_size} sequences a step, resuming a run of {recorded}",
            "a run keeps its global batch: the order of the data and the schedule stand on it",
            f"batch.global_size={recorded}, or a new run_dir with init_from={point.path if point else ''}",
        )
    return plan


def plan_for(config: Config, replicas: int, recorded: int | None) -> BatchPlan:
    """The batch plan of a run whose global batch is `recorded`, if it has begun."""
    batch = share_of_group(config.batch, config.data.sequence_length, config.outer.groups)
    if recorded is not None and batch.global_size is None and batch.global_tokens is None:
        batch = batch.model_copy(update={"global_size": int(recorded), "accumulation": None})
    plan = plan_batches(batch, config.data.sequence_length, replicas)
    return replace(plan, group=config.outer.group or 0, groups=config.outer.groups)


def _measured_steps(
    config: Config,
    run_dir: Path,
    dataset: TokenDataset,
    plan: BatchPlan,
    console: Console,
    build_for: Callable[[int | None], Engine],
) -> int:
    assert config.duration is not None
    console.say(f"measuring a few steps to see how many fit in {config.duration:g} s ...")
    loaders: list[TokenLoader] = []

    def build() -> Engine:
        engine = build_for(10**9)
        loaders.append(loader_for(config, dataset, plan, engine))
        return engine

    evaluation = 0
    held_out = dataset.split("held_out")
    if held_out.num_tokens >= 2:
        whole = -(-(held_out.num_tokens - 1) // config.data.sequence_length // plan.global_size)
        evaluation = (min(config.evaluate.batches, whole) if config.evaluate.batches else whole) * plan.accumulation
    steps = measure_steps(build, lambda: next(loaders[0]), config, run_dir, evaluation)
    loaders[0].close()
    console.say(f"{steps} steps fit; recorded in {run_dir / 'horizon.json'}, and reused when the run is resumed")
    return steps


def loader_for(config: Config, dataset: TokenDataset, plan: BatchPlan, engine: Engine) -> TokenLoader:
    """This rank's batches of a run."""
    mesh = engine.parts.mesh
    return TokenLoader(
        dataset.split("train"),
        config.data.sequence_length,
        plan,
        seed=config.seed,
        shuffle=config.data.shuffle,
        replica=mesh.data_parallel_rank,
        replicas=mesh.data_parallel_size,
        prefetch=2 * config.data.workers,
        document_mask=config.data.document_mask,
    )


def _resume(loop: TrainingLoop, point: ResumePoint, checkpoints: RunCheckpoints) -> None:
    for problem in point.passed_over:
        loop.console.say(f"passed over: {problem}", warning=True)
    with here.call("load"):
        state = restore(loop.engine, point.path)
    loop.load_state(state)
    for callback in loop.callbacks:
        callback.on_resume(loop, point.path, state.get("callbacks", {}).get(callback.name, {}))
    checkpoints.resumed_at(loop.engine.global_step)
    saved = _scalars(point)
    changes = [
        f"{key} {old} -> {new}"
        for key, (old, new) in _differences(saved["config"], loop.resolved.config.model_dump(mode="json")).items()
    ]
    loop.console.say(
        f"resumed from {point.path} at step {loop.engine.global_step}"
        + (f" (written on {saved['world_size']} rank(s) at ZeRO {saved['zero_stage']})")
        + (f"; changed since: {', '.join(changes)}" if changes else "")
    )


def _scalars(point: ResumePoint) -> dict[str, Any]:
    return dict(point.manifest.scalars)


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    found: dict[str, tuple[Any, Any]] = {}
    for key in new:
        a, b = old.get(key), new[key]
        if isinstance(a, dict) and isinstance(b, dict):
            found |= _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found[prefix + key] = (a, b)
    return found


def _finish(loop: TrainingLoop, status: str, check: PlanCheck) -> Path | None:
    """Samples, summary and report; on rank 0 the report's path. Collective."""
    samples = sample_texts(loop) if status == "finished" else []
    if loop.sinks is None:
        return None
    loop.sinks.close()
    summarise(loop, status, samples, check.to_json())
    return write_report(loop.run_dir)
