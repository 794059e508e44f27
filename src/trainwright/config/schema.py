"""The config: every key that Trainwright understands, typed, frozen, documented where it is declared.

`docs/config.md` is generated from this file and its neighbours (`python -m trainwright.config.document`). Nothing here imports
torch: a typo has to be answered before a heavy import or a process starts. Values arrive through `load.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from trainwright.config.data_schema import BatchConfig, DataConfig
from trainwright.config.model_schema import ModelConfig
from trainwright.config.outer_schema import OuterConfig
from trainwright.config.run_schema import CheckpointConfig, EvaluateConfig, GuardConfig, ProfileConfig
from trainwright.config.section import Count, Dtype, Duration, Section
from trainwright.config.units import parse_count


class LossScale(Section):
    """fp16's loss scale. The defaults are DeepSpeed's."""

    initial: float = Field(65536.0, gt=0, description="First dynamic scale, 2^16.")
    window: Count = Field(1000, gt=0, description="Finite steps before the scale doubles.")
    hysteresis: Count = Field(2, gt=0, description="Overflows that are borne before the scale halves.")
    minimum: float = Field(1.0, gt=0, description="The dynamic scale never falls below this.")


class PrecisionConfig(Section):
    """Number formats. Master weights, moments and gradient reduction are fp32 unless set here (fp64 under fp64)."""

    dtype: Dtype = Field("fp32", description="Format of forward and backward.")
    loss_scale: float | LossScale | None = Field(
        None, description="fp16 only: a static scale such as 1024, or the settings of the dynamic one (the default)."
    )
    master: Literal["fp32", "bf16_stochastic", "bf16_kahan"] = Field(
        "fp32",
        description="Master weights: fp32; or bf16 alone (adamw and adam, dtype bf16), updated with stochastic rounding, or with "
        "a bf16 compensation for each weight (arXiv 2010.06192).",
    )
    float8: Literal["none", "tensorwise", "rowwise"] = Field(
        "none",
        description="Products of the blocks' linear layers in float8 (torchao; Ada, Hopper or later), with dtype bf16: one "
        "scale a tensor, or one a row. Embedding, head and norms stay in bf16.",
    )
    reduce_dtype: Literal["fp32", "bf16", "fp64"] | None = Field(
        None, description="Format in which gradients are summed over ranks; default fp32."
    )
    max_skipped_steps: Count = Field(
        50, gt=0, description="Skipped steps in a row after which the run stops and names the first bad module."
    )


class ZeroConfig(Section):
    """What the ranks share out: 0 nothing, 1 optimizer states, 2 and gradients, 3 and parameters (arXiv 1910.02054)."""

    stage: Annotated[int, BeforeValidator(parse_count)] = Field(0, description="0, 1, 2 or 3.")


class OffloadConfig(Section):
    """What lives in the host's memory, or on its disk, instead of the device's memory."""

    optimizer: Literal["none", "cpu", "disk"] = Field(
        "none", description="Optimizer states and the update itself; disk: adamw and adam, streamed from files."
    )
    masters: Literal["none", "disk"] = Field(
        "none", description="disk: fp32 master weights as well, with optimizer=disk and bf16: memory holds bf16 alone."
    )
    path: str | None = Field(
        None, description="Folder for the files; default run_dir/offload, or the temporary folder."
    )
    parameters: Literal["none", "cpu", "disk"] = Field(
        "none",
        description="cpu: parameters, gradients and optimizer states; disk: parameters in files, the rest on the host unless "
        "optimizer=disk. ZeRO stage 3 only.",
    )


class ParallelConfig(Section):
    """Degrees of parallelism; what is left of the world shards (ZeRO)."""

    tensor: Count = Field(1, gt=0, description="Ranks that share each matrix (arXiv 1909.08053); divides the heads.")
    sequence: bool = Field(
        True,
        description="With tensor > 1: norms and the residual stream are cut along the sequence (arXiv 2205.05198).",
    )
    context: Count = Field(1, gt=0, description="Ranks that share each sequence.")
    context_method: Literal["ulysses", "ring"] = Field(
        "ulysses",
        description="ulysses: all-to-all over the heads (arXiv 2309.14509), anywhere; ring: torch's ring attention, GPUs.",
    )
    pipeline: Count = Field(1, gt=0, description="Ranks that share the layers; batch.accumulation micro-batches pass.")
    pipeline_schedule: Literal["gpipe", "1f1b", "interleaved_1f1b", "zero_bubble", "zbv"] = Field(
        "1f1b",
        description="Order of forwards and backwards: GPipe (arXiv 1811.06965), 1F1B and interleaved 1F1B (2104.04473), "
        "interleaved zero bubble and its V form (2401.10241).",
    )
    virtual_stages: Count | None = Field(
        None, gt=0, description="Parts of the model a rank under the interleaved schedules; default 2 there, else 1."
    )
    replicate: Count = Field(
        1, gt=0, description="Copies of the sharded model (hybrid sharding); divides the number of ranks."
    )
    backend: Literal["auto", "nccl", "gloo"] = Field(
        "auto", description="Collectives' library: NCCL where CUDA is, Gloo elsewhere."
    )


class RecomputeConfig(Section):
    """Activation recomputation (arXiv 1604.06174): what backward needs is made again instead of kept."""

    mode: Literal["none", "full", "selective"] = Field(
        "none",
        description="full: of a block only its input is kept; selective: also what its matrix products and attention "
        "gave (arXiv 2205.05198), so that only cheap operations run twice.",
    )
    every: Count = Field(1, gt=0, description="Every how many blocks; 2 leaves every other block as it is.")


class ParameterGroup(Section):
    """Parameters, by name pattern, with settings of their own. The first pattern that matches wins."""

    pattern: str = Field(description="Shell-style pattern over parameter names, such as `*.bias`.")
    lr_scale: float = Field(1.0, ge=0, description="Factor on the learning rate.")
    weight_decay: float | None = Field(None, ge=0, description="Instead of the optimizer's.")


class OptimizerConfig(Section):
    """The optimizer: adamw, adam, sgd, lion, muon, an elementwise class of torch.optim, or `package.Class`."""

    name: str = Field("adamw", description="Which optimizer.")
    lr: float = Field(3e-4, gt=0, description="Peak learning rate.")
    betas: tuple[float, float] | None = Field(None, description="Moment decays; default (0.9, 0.95), lion (0.9, 0.99).")
    moments: Literal["fp32", "bf16", "8bit"] | None = Field(
        None,
        description="adamw and adam: format of the two moments, bf16 and 8bit (blocks of 64 with a scale) rounded "
        "stochastically; default the masters'.",
    )
    eps: float | None = Field(None, gt=0, description="Added to the root of the second moment; default 1e-8.")
    weight_decay: float = Field(0.1, ge=0, description="Decoupled weight decay (coupled for adam and sgd).")
    decay_norms_and_biases: bool = Field(False, description="Decay parameters of fewer than two dimensions as well.")
    momentum: float | None = Field(None, ge=0, lt=1, description="sgd (default 0) and muon (default 0.95).")
    nesterov: bool | None = Field(None, description="sgd (default false) and muon (default true).")
    adamw_lr: float | None = Field(
        None, gt=0, description="muon: learning rate of the parameters left to AdamW; default `lr`."
    )
    groups: tuple[ParameterGroup, ...] = Field((), description="Parameters with settings of their own.")
    options: dict[str, Any] = Field(
        {}, description="Passed on to a torch.optim class or `package.Class`; its constructor refuses unknown names."
    )


class FusedConfig(Section):
    """What flows together instead of lying in memory between forward, backward and update."""

    optimizer_in_backward: bool = Field(
        False,
        description="Update each parameter as soon as its gradient is reduced, and free the gradient. One micro-batch a "
        "step; no fp16; a step with a non-finite gradient ends the run instead of being skipped.",
    )
    clipping: Literal["per_parameter", "late"] | None = Field(
        None,
        description="What `gradient_clipping` means with optimizer_in_backward, where the global norm is known too late: "
        "each parameter's own norm, or the global norm of the step before (the first step is not clipped).",
    )

    cuda_graphs: bool = Field(
        False,
        description="One GPU: a step's forwards and backwards are captured as one CUDA graph after three steps, and replayed, "
        "which spares small models the host's time. Holds the activations' memory for good; sequences of one length.",
    )


class LossConfig(Section):
    """What is added to the cross-entropy in training (not in evaluation)."""

    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="This share of each target is spread over the vocabulary (arXiv 1512.00567)."
    )
    z_loss: float = Field(
        0.0, ge=0, description="Weight of (log Z)², which keeps logits from drifting (arXiv 2204.02311); 1e-4 is usual."
    )


class LrScheduleConfig(Section):
    """The learning rate, a pure function of the optimizer step over the horizon."""

    name: Literal["constant", "linear", "cosine", "wsd", "one_cycle", "polynomial"] = Field(
        "constant", description="Shape after the warm-up. All but `constant` need a horizon (steps, tokens or epochs)."
    )
    warmup_steps: Count = Field(
        0, ge=0, description="Steps of linear warm-up; the first step has 1/(warmup_steps + 1) of the peak."
    )
    warmup_fraction: float | None = Field(
        None, ge=0, lt=1, description="The same as a share of the horizon, instead of `warmup_steps`."
    )
    final_fraction: float = Field(0.0, ge=0, le=1, description="Last learning rate over the peak.")
    decay_fraction: float = Field(0.2, gt=0, le=1, description="wsd: share of the horizon that decays.")
    power: float = Field(1.0, gt=0, description="polynomial: exponent of the decay.")


class Config(Section):
    """A run. `null` or an absent key means: not set."""

    model: ModelConfig | None = Field(None, description="The model; absent when it comes from Python.")
    data: DataConfig = Field(default_factory=DataConfig, description="The token data set.")
    batch: BatchConfig = Field(default_factory=BatchConfig, description="The batch.")
    steps: Count | None = Field(None, gt=0, description="Horizon in optimizer steps.")
    tokens: Count | None = Field(None, gt=0, description="Horizon in tokens, rounded up to whole steps.")
    epochs: float | None = Field(None, gt=0, description="Horizon in passes over the training split.")
    duration: Duration | None = Field(
        None, gt=0, description="Horizon in training time: steps fixed once from the first measured ones, and recorded."
    )
    stop_after: Duration | None = Field(
        None, gt=0, description="Limit on this launch: save and end after this time. Not a horizon."
    )
    precision: PrecisionConfig = Field(
        default_factory=PrecisionConfig, description="Number formats; a bare word such as `bf16` is taken too."
    )
    zero: ZeroConfig = Field(default_factory=ZeroConfig, description="ZeRO sharding.")
    offload: OffloadConfig = Field(default_factory=OffloadConfig, description="Offload to the host.")
    parallel: ParallelConfig = Field(default_factory=ParallelConfig, description="Degrees of parallelism.")
    outer: OuterConfig = Field(default_factory=OuterConfig, description="Groups of ranks joined by slow links.")
    strategy: Literal["manual", "auto"] = Field(
        "manual",
        description="auto: what zero, batch.micro_size, recompute (on GPUs parallel, offload too) leave out is chosen for the machines "
        "that the job runs on, and said; what is set stays. The first time it measures a CPU for some twenty seconds.",
    )
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="The optimizer.")
    lr_schedule: LrScheduleConfig = Field(default_factory=LrScheduleConfig, description="The learning rate.")
    fused: FusedConfig = Field(default_factory=FusedConfig, description="Fused training.")
    loss: LossConfig = Field(default_factory=LossConfig, description="The loss.")
    gradient_clipping: float | None = Field(None, gt=0, description="Largest global gradient norm.")
    recompute: RecomputeConfig = Field(
        default_factory=RecomputeConfig,
        description="Activation recomputation; a bare word such as `full` is taken too.",
    )
    compile: bool | Literal["auto"] = Field(
        "auto",
        description="torch.compile, block by block. auto: on GPUs, and on CPUs that multiply bf16 for runs of 2e14 FLOP or "
        "more under bf16.",
    )
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig, description="Evaluation during training.")
    init_from: str | None = Field(None, description="A checkpoint whose weights (only) the run starts from.")
    freeze: tuple[str, ...] = Field((), description="Name patterns of parameters that are not trained.")
    keep_fp32: tuple[str, ...] = Field((), description="Name patterns of modules that compute in fp32.")
    ema: float | None = Field(None, gt=0, lt=1, description="Decay of an exponential moving average of the weights.")
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, description="Checkpoints.")
    guard: GuardConfig = Field(default_factory=GuardConfig, description="Ranks that wait in vain.")
    profile: ProfileConfig = Field(default_factory=ProfileConfig, description="Where a step's time and memory go.")
    track: tuple[Literal["tensorboard", "wandb"], ...] = Field((), description="Sinks beside metrics.jsonl.")
    seed: Count = Field(0, ge=0, description="Of the initial values, the order of the data and dropout.")
    run_dir: str | None = Field(None, description="Folder of the run; by default a new one under runs/.")
