"""Contradictions in how a run is sharded, parallelised and fused: got, rule, and a value that works."""

from __future__ import annotations

from collections.abc import Callable, Set

from trainwright.config.schema import Config
from trainwright.errors import ConfigError, ContradictionError


def _zero(config: Config, given: Set[str]) -> None:
    if config.zero.stage not in (0, 1, 2, 3):
        nearest = min(3, max(0, config.zero.stage))
        raise ConfigError(
            f"zero.stage={config.zero.stage}",
            "ZeRO has stages 0 (nothing sharded), 1 (optimizer states), 2 (and gradients), 3 (and parameters)",
            f"zero.stage={nearest}",
        )
    if config.offload.parameters != "none" and config.zero.stage != 3:
        raise ContradictionError(
            f"offload.parameters={config.offload.parameters} at zero.stage={config.zero.stage}",
            "parameters can leave the device between uses only where they are sharded, at stage 3",
            f"zero.stage=3, or offload.optimizer={config.offload.parameters} alone",
        )


def _parallel(config: Config, given: Set[str]) -> None:
    parallel, stage = config.parallel, config.zero.stage
    if not parallel.sequence and parallel.tensor == 1:
        raise ContradictionError(
            "parallel.sequence=false with parallel.tensor=1",
            "sequence parallelism is a part of tensor parallelism",
            "parallel.tensor=2, or remove parallel.sequence",
        )
    if parallel.context_method == "ring" and parallel.context == 1:
        raise ContradictionError(
            "parallel.context_method=ring with parallel.context=1",
            "ring attention acts where ranks share a sequence",
            "parallel.context=2, or remove parallel.context_method",
        )
    if parallel.context_method == "ring" and config.precision.dtype not in ("bf16", "fp16"):
        raise ContradictionError(
            f"parallel.context_method=ring with precision.dtype={config.precision.dtype}",
            "torch's ring attention stands on flash attention, which takes 16-bit formats",
            "parallel.context_method=ulysses, or precision.dtype=bf16",
        )
    interleaved = parallel.pipeline_schedule in ("interleaved_1f1b", "zero_bubble", "zbv")
    if parallel.pipeline == 1:
        for key in ("pipeline_schedule", "virtual_stages"):
            if f"parallel.{key}" in given and getattr(parallel, key) not in (None, "1f1b", 1):
                raise ContradictionError(
                    f"parallel.{key}={getattr(parallel, key)} with parallel.pipeline=1",
                    "a pipeline schedule acts where ranks share the layers",
                    f"parallel.pipeline=2, or remove parallel.{key}",
                )
        return
    if stage == 3 and parallel.pipeline_schedule in ("zero_bubble", "zbv"):
        raise ContradictionError(
            f"zero.stage=3 with parallel.pipeline_schedule={parallel.pipeline_schedule}",
            "zero-bubble schedules part a block's backward in two, and resharded parameters are gone by the second "
            "(torch gives wrong gradients there)",
            "parallel.pipeline_schedule=1f1b (or interleaved_1f1b), or zero.stage=2",
        )
    stages = parallel.virtual_stages
    if (stages is not None and (stages > 1) != interleaved) or (
        parallel.pipeline_schedule == "zbv" and stages not in (None, 2)
    ):
        works = "2" if interleaved else "1"
        raise ContradictionError(
            f"parallel.virtual_stages={stages} with parallel.pipeline_schedule={parallel.pipeline_schedule}",
            "gpipe and 1f1b have one part of the model a rank, interleaved schedules two or more, zbv two",
            f"parallel.virtual_stages={works}, or leave it out",
        )
    if config.batch.accumulation is not None and config.batch.accumulation < parallel.pipeline:
        raise ContradictionError(
            f"batch.accumulation={config.batch.accumulation} with parallel.pipeline={parallel.pipeline}",
            "the micro-batches of a step fill the pipeline: as many as it has ranks, better four times as many",
            f"batch.accumulation={4 * parallel.pipeline}",
        )


def _fused(config: Config, given: Set[str]) -> None:
    fused, off = config.fused, "fused.optimizer_in_backward=false"
    if fused.cuda_graphs:
        _cuda_graphs(config)
    if not fused.optimizer_in_backward:
        if fused.clipping is not None:
            raise ContradictionError(
                f"fused.clipping={fused.clipping} without fused.optimizer_in_backward",
                "gradient_clipping is by the global norm of the step itself where weights wait for it",
                "remove fused.clipping, or fused.optimizer_in_backward=true",
            )
        return
    if config.precision.dtype == "fp16":
        raise ContradictionError(
            "precision.dtype=fp16 with fused.optimizer_in_backward",
            "a step that overflows is skipped whole, and half of it would have landed",
            f"precision=bf16, or {off}",
        )
    if config.gradient_clipping is not None and fused.clipping is None:
        raise ContradictionError(
            f"gradient_clipping={config.gradient_clipping} with fused.optimizer_in_backward",
            "the global norm is known only after the last gradient, when the first weights have been updated",
            f"fused.clipping=per_parameter (each parameter's norm), fused.clipping=late (the norm of the step before), or {off}",
        )
    if fused.clipping is not None and config.gradient_clipping is None:
        raise ContradictionError(
            f"fused.clipping={fused.clipping} without gradient_clipping",
            "it says what gradient_clipping means",
            "gradient_clipping=1.0, or remove fused.clipping",
        )
    if config.parallel.pipeline > 1 or (config.batch.accumulation or 1) > 1:
        what = f"parallel.pipeline={config.parallel.pipeline}" if config.parallel.pipeline > 1 else ""
        raise ContradictionError(
            f"{what or f'batch.accumulation={config.batch.accumulation}'} with fused.optimizer_in_backward",
            "a gradient is complete when its backward ends: one micro-batch a step",
            f"batch.accumulation=1 and parallel.pipeline=1 (recompute=full for the memory), or {off}",
        )
    if config.optimizer.name.lower() == "muon":
        raise ContradictionError(
            "optimizer.name=muon with fused.optimizer_in_backward",
            "Muon needs whole matrices, gathered from all ranks at once",
            f"optimizer.name=adamw, or {off}",
        )


def _cuda_graphs(config: Config) -> None:
    parallel, off = config.parallel, "fused.cuda_graphs=false"
    host_led = {
        "fused.optimizer_in_backward=true": config.fused.optimizer_in_backward,
        "zero.stage=3": config.zero.stage == 3,
        f"offload.parameters={config.offload.parameters}": config.offload.parameters != "none",
        f"parallel.tensor={parallel.tensor}": parallel.tensor > 1,
        f"parallel.pipeline={parallel.pipeline}": parallel.pipeline > 1,
        f"parallel.context={parallel.context}": parallel.context > 1,
    }
    for setting, given in host_led.items():
        if given:
            raise ContradictionError(
                f"{setting} with fused.cuda_graphs=true",
                "what is captured runs without the host: no updates, gathers or transfers that it starts",
                f"{off}, or leave {setting.partition('=')[0]} out",
            )


def _float8(config: Config, given: Set[str]) -> None:
    float8, precision = config.precision.float8, config.precision
    if float8 == "none":
        return
    if precision.dtype != "bf16":
        raise ContradictionError(
            f"precision.float8={float8} with precision.dtype={precision.dtype}",
            "what is not a product of a block's linear layer is bf16",
            f"precision={{dtype: bf16, float8: {float8}}}",
        )
    if config.parallel.tensor > 1:
        raise ContradictionError(
            f"precision.float8={float8} with parallel.tensor={config.parallel.tensor}",
            "scales would have to be those of whole matrices, which no tensor rank has",
            "parallel.tensor=1 with zero.stage=3 (or context, pipeline), or precision.float8=none",
        )


def _offload(config: Config, given: Set[str]) -> None:
    offload = config.offload
    if offload.masters == "disk" and (offload.optimizer != "disk" or config.precision.dtype != "bf16"):
        raise ContradictionError(
            f"offload.masters=disk with offload.optimizer={offload.optimizer}, precision.dtype={config.precision.dtype}",
            "masters lie beside the moments, and memory keeps what forward and backward take: bf16",
            "offload={optimizer: disk, masters: disk} with precision=bf16",
        )
    if offload.optimizer != "disk":
        if offload.path is not None and offload.parameters != "disk":
            raise ContradictionError(
                f"offload.path={offload.path} with offload.optimizer={offload.optimizer}",
                "it is where files of offload.optimizer=disk and offload.parameters=disk lie",
                "offload.optimizer=disk, or remove offload.path",
            )
        return
    narrow = config.precision.master != "fp32" or config.optimizer.moments in ("bf16", "8bit")
    if config.optimizer.name.lower() not in ("adamw", "adam") or narrow or config.precision.dtype == "fp64":
        raise ContradictionError(
            f"offload.optimizer=disk with optimizer.name={config.optimizer.name}, precision.dtype={config.precision.dtype}, "
            f"precision.master={config.precision.master}, optimizer.moments={config.optimizer.moments}",
            "what is streamed from files is adamw's or adam's state in fp32",
            "optimizer.name=adamw with masters and moments in fp32, or offload.optimizer=cpu",
        )
    if offload.masters == "disk":
        for key, value in (
            ("ema", config.ema),
            ("keep_fp32", config.keep_fp32),
            ("offload.parameters", offload.parameters if offload.parameters == "cpu" else None),
        ):
            if value not in (None, (), "none"):
                raise ContradictionError(
                    f"{key}={value} with offload.masters=disk",
                    "memory holds the bf16 weights alone",
                    f"remove {key}, or offload.masters=none" + (", or offload.parameters=disk" if "." in key else ""),
                )


def _recompute(config: Config, given: Set[str]) -> None:
    if config.recompute.every > 1 and config.recompute.mode == "none":
        raise ContradictionError(
            f"recompute.every={config.recompute.every} with recompute.mode=none",
            "every k-th block is recomputed where blocks are",
            f"recompute={{mode: full, every: {config.recompute.every}}}",
        )


STRATEGY_RULES: tuple[Callable[[Config, Set[str]], None], ...] = (
    _zero,
    _parallel,
    _float8,
    _fused,
    _offload,
    _recompute,
)
