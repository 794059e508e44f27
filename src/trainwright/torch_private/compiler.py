"""Names that torch keeps private, of its compiler. Nothing here imports it before it is used (two seconds)."""

from __future__ import annotations


def compile_errors() -> type[Exception]:
    """What torch.compile raises where it cannot compile. Checked on 2.13; when it goes: Exception, and run again."""
    from torch._dynamo.exc import TorchDynamoException

    return TorchDynamoException


def compiled_graphs() -> int:
    """Graphs compiled in this process so far. Checked on 2.13; when it goes: torch.compiler's own statistics."""
    import sys

    utils = sys.modules.get("torch._dynamo.utils")  # never imported: nothing compiled
    return 0 if utils is None else int(utils.counters["stats"]["unique_graphs"])


def share_graphs_between_layers() -> None:
    """A number that a block knows itself by (its layer) becomes an input of the graph, instead of a graph for each, of
    which there may be eight. Checked on 2.13; when it goes: pass the number as an argument of the forward."""
    import torch._dynamo.config as config

    config.allow_unspec_int_on_nn_module = True


def quiet_about_gradients() -> None:
    """The compiler looks for a gradient at every input, and is told that a copy of a parameter has none. Checked on 2.13; when
    it goes: nothing."""
    import warnings

    message = r"The \.grad attribute of a Tensor that is not a leaf Tensor is being accessed"
    warnings.filterwarnings("ignore", message=message, category=UserWarning, module=r"torch\._")


def keep_saved_tensors() -> None:
    """What a compiled forward kept for backward is not given to the backward to write over. Checked on 2.13; when it goes:
    backward passes in two halves (zero-bubble schedules), and retain_graph, are refused with compiled attention."""
    import torch._functorch.config as config

    config.donated_buffer = False


def widen_again_in_backward() -> None:
    """A compiled backward makes the fp32 of narrow values anew instead of having it kept by the forward, which the
    partitioner prefers where a matrix product needs it. Checked on 2.13; when it goes: twice the memory of a compiled
    block's activations on CPUs without fast bf16."""
    import torch._functorch.config as config

    config.ban_recompute_materialized_backward = False
