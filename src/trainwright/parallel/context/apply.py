"""Context parallelism: ranks share each sequence, every one computes a contiguous slice of its tokens.

Outside attention nothing is exchanged; attention reaches beyond the slice by Ulysses (`ulysses.py`) or torch's ring
(`ring.py`). What a rank is given, and what comes back from a forward: `sequence_split.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from trainwright.config.schema import ParallelConfig
from trainwright.errors import ConfigError, ModelError
from trainwright.mesh import Mesh
from trainwright.models.lstm import LstmLanguageModel
from trainwright.models.pretrained import PreShiftedCausalLM, shifts_labels
from trainwright.models.sequence import Attend
from trainwright.models.transformer import Transformer
from trainwright.parallel.context.huggingface import prepare_huggingface
from trainwright.parallel.context.ring import Ring
from trainwright.parallel.context.sequence_split import SequenceSplit
from trainwright.parallel.context.ulysses import Ulysses


def apply_context(module: nn.Module, mesh: Mesh, settings: ParallelConfig) -> SequenceSplit:
    """How this rank's sequences are cut; makes the module's attention ready for it.

    Raises ModelError for a module whose attention cannot reach beyond its slice, or whose heads do not divide.
    """
    if mesh.degrees.context == 1:
        return SequenceSplit()
    ranks, group = mesh.degrees.context, mesh.group("context")
    ring = settings.context_method == "ring"
    if ring:
        _check_ring(module, mesh)
    attention: Callable[[Attend], Attend] = Ring(group) if ring else Ulysses(group)
    config: Any = getattr(module, "config", None)
    if isinstance(module, Transformer):
        heads = {"heads": module.settings.heads}
    elif isinstance(module, LstmLanguageModel):
        raise ModelError(
            f"parallel.context={ranks} with {type(module).__name__}",
            "a recurrent layer computes a token after the one before it: ranks would wait for each other",
            "parallel.context=1; a longer sequence in the same memory: a smaller batch.micro_size, recompute=full",
        )
    else:
        heads = prepare_huggingface(module, ranks)
    if not ring:
        _check_heads(module, heads, ranks, mesh.degrees.tensor)
    return SequenceSplit(
        ranks,
        mesh.coordinate("context"),
        group,
        attention,
        shifts=shifts_labels(module),
        sums_itself=isinstance(module, Transformer | PreShiftedCausalLM),
        packs_by_position=not isinstance(module, Transformer),
        caches=not isinstance(module, PreShiftedCausalLM) and getattr(config, "use_cache", False),
    )


def _check_heads(module: nn.Module, heads: Mapping[str, int], ranks: int, tensor: int) -> None:
    for name, count in heads.items():
        if count % (ranks * tensor) == 0:
            continue
        works = max(n for n in range(1, ranks + 1) if count % (n * tensor) == 0 or n == 1)
        by = f" after parallel.tensor={tensor}" if tensor > 1 else ""
        raise ModelError(
            f"parallel.context={ranks} with {type(module).__name__}, whose attention has {name}={count}{by}",
            "Ulysses gives each context rank an equal share of the query heads",
            f"parallel.context={works}",
        )


def _check_ring(module: nn.Module, mesh: Mesh) -> None:
    if mesh.device.type != "cuda":
        raise ConfigError(
            f"parallel.context_method=ring on {mesh.device.type}",
            "torch's ring attention is made for GPUs",
            "parallel.context_method=ulysses, which runs anywhere",
        )
    if not isinstance(module, Transformer):
        raise ModelError(
            f"parallel.context_method=ring with {type(module).__name__}",
            "torch's ring attention is causal, with the usual scale: that of our Transformer",
            "parallel.context_method=ulysses",
        )
    width = module.settings.head_dim
    if width % 8:
        raise ModelError(
            f"parallel.context_method=ring with head_dim {width}",
            "torch's flash attention kernel takes head widths that 8 divides",
            f"head_dim: {-(-width // 8) * 8}, or parallel.context_method=ulysses",
        )
