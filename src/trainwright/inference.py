"""A trained run (or one checkpoint of it) opened for evaluation, generation and export: weights alone, no optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainwright import distributed
from trainwright.checkpoint.load import load, load_weights
from trainwright.config import Resolved, load_config
from trainwright.data.loader import eval_batches
from trainwright.data.mix import open_dataset
from trainwright.data.plan import plan_batches
from trainwright.data.shards import TokenDataset
from trainwright.data.tokenize import TextTokenizer
from trainwright.errors import CheckpointError, DataError
from trainwright.evaluate import Evaluation, evaluate
from trainwright.generate import GenerationSettings, continue_prompts
from trainwright.mesh import Mesh, build_mesh
from trainwright.model_source import model_for
from trainwright.parallel.parallel_model import ParallelModel
from trainwright.run_checkpoints import newest
from trainwright.run_folder import find_run
from trainwright.startup import UserParts, build_model
from trainwright.train import bits_per_byte

# How a run was cut up is a matter of its training; a forward takes any number of ranks, sharded as ZeRO does.
_FORWARD_ONLY = (
    *(f"parallel.{axis}=1" for axis in ("tensor", "context", "pipeline", "replicate")),
    "parallel.sequence=true",
    "parallel.context_method=ulysses",
    "parallel.pipeline_schedule=1f1b",
    "parallel.virtual_stages=null",
    "recompute=none",
)


@dataclass(frozen=True)
class OpenRun:
    """A run's model, ready for a forward."""

    run_dir: Path
    checkpoint: Path
    resolved: Resolved
    model: ParallelModel
    mesh: Mesh
    dataset: TokenDataset

    @property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer of the data that the run was trained on."""
        return self.dataset.load_tokenizer()


def open_run(run: str | Path, overrides: Sequence[str] = ()) -> OpenRun:
    """Opens a run folder (its best, or newest, checkpoint) or a checkpoint folder inside one. Collective.

    Raises CheckpointError where there is no run, ConfigError for bad overrides.
    """
    path = Path(run)
    run_dir = find_run(path)
    resolved = load_config(run_dir / "config.yaml", [*_FORWARD_ONLY, *overrides])
    world = distributed.start(resolved.config.parallel.backend)
    checkpoint = path if path != run_dir else newest(run_dir, resolved.config.checkpoint.store)
    if checkpoint is None:
        raise CheckpointError(
            f"{run_dir} has no whole checkpoint",
            "a run has one after its first save",
            "let the run save: checkpoint.every=100",
        )
    config = resolved.config
    assert config.model is not None, "a run that `trainwright train` wrote names its model"
    dataset = open_dataset(config.data)
    mesh = build_mesh(config.parallel, config.zero.stage, world.device)
    model, fill = model_for(config.model, dataset.vocab_size)
    parallel_model = build_model(model, resolved, UserParts(load_weights=fill), mesh).model
    manifest = load_weights(checkpoint, {f"model.{name}": tensor for name, tensor in parallel_model.state()})
    # Where the run kept an average of its weights, its evaluations are those of the average.
    averages = {key: t for name, t in parallel_model.state() if (key := f"ema.{name}") in manifest.tensors}
    if averages:
        load(checkpoint, averages, strict=False, verified=True)
    parallel_model.module.eval()
    return OpenRun(run_dir, checkpoint, resolved, parallel_model, mesh, dataset)


@dataclass(frozen=True)
class DataEvaluation:
    """An evaluation on a data set's split."""

    result: Evaluation
    bits_per_byte: float | None
    split: str


def evaluate_on(run: OpenRun, data: str | Path | None, split: str) -> DataEvaluation:
    """Loss over a whole split of a token data set (default: the run's own). Collective.

    Raises DataError for a data set of another tokenizer.
    """
    dataset = run.dataset if data is None else TokenDataset.open(data)
    if dataset.manifest.tokenizer.sha256 != run.dataset.manifest.tokenizer.sha256:
        raise DataError(
            f"{dataset.path} was prepared with another tokenizer than {run.dataset.path}",
            "a model reads the tokens that it was trained on",
            f"trainwright prepare SOURCE --out DIR --tokenizer {run.dataset.tokenizer_path}",
        )
    config = run.resolved.config
    part = dataset.split(split)  # type: ignore[arg-type]
    batch = config.batch
    if batch.micro_size is not None and (batch.global_size or batch.global_tokens):
        batch = batch.model_copy(update={"accumulation": None})  # it depends on the number of ranks
    plan = plan_batches(batch, config.data.sequence_length, run.mesh.data_parallel_size)
    batches = eval_batches(
        part, config.data.sequence_length, plan,
        replica=run.mesh.data_parallel_rank, replicas=run.mesh.data_parallel_size,
        document_mask=config.data.document_mask,
    )  # fmt: skip
    result = evaluate(run.model, (m for b in batches for m in b.split(plan.micro_size)), run.mesh)
    return DataEvaluation(result, bits_per_byte(result, part), split)


def generate_text(run: OpenRun, prompts: Sequence[str], settings: GenerationSettings) -> list[str]:
    """Each prompt's continuation. Collective."""
    tokenizer = run.tokenizer
    ids = [tokenizer.encode(prompt) or [run.dataset.eos_id] for prompt in prompts]
    output = continue_prompts(run.model.module, ids, settings, run.mesh.device, distributed.from_main)
    return [tokenizer.decode(row) for row in output]
