"""Private names around torch's collectives: functional ones, their groups, and the ring of attention.

Each name: the versions it was checked on, why it is needed, and what to do when it goes.
"""

from __future__ import annotations

from typing import Any


def group_name_of(operator: Any, args: tuple[Any, ...], kwargs: Any) -> tuple[str, int]:
    """(name, ranks) of the process group that a collective operator was called with.

    Checked on 2.13: c10d operators take the group boxed as `process_group`, functional ones its name as `group_name`.
    When it changes: read the operators' schemas again.
    """
    import torch.distributed as dist
    from torch._C import _distributed_c10d as c10d

    for position, argument in enumerate(operator._schema.arguments):
        if argument.name not in ("process_group", "group_name", "group"):
            continue
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        if isinstance(value, str):
            value = c10d._resolve_process_group(value)  # type: ignore[arg-type]
        elif not isinstance(value, dist.ProcessGroup):
            value = dist.ProcessGroup.unbox(value)
        return str(value.group_name), int(value.size())
    raise AssertionError(f"{operator} has no process group among its arguments")


def all_to_all_chunks(x: Any, group: Any) -> Any:
    """`x`, whose first dimension is cut over the ranks of `group`: chunk j goes to rank j, chunk i comes from rank i.

    Checked on 2.13 (Gloo). The functional form, because its result is an operator's output, which selective
    recomputation can keep; torch.distributed's own writes into a buffer. When it goes: dist.all_to_all_single, and
    the exchange is then made again in a recomputed block.
    """
    from torch.distributed._functional_collectives import all_to_all_single, wait_tensor

    return wait_tensor(all_to_all_single(x, None, None, group))


def all_reduce_sum(x: Any, group: Any) -> Any:
    """The sum of all ranks' `x`, a new tensor. Not differentiable.

    This and the next two checked on 2.13 (Gloo). The operators of torch's functional collectives, for the same reason
    as above, and because the public in-place ones changed their names in 2.13. When they go: dist.all_reduce and kin.
    """
    import torch

    operators = torch.ops._c10d_functional
    return operators.wait_tensor(operators.all_reduce(x.contiguous(), "sum", group.group_name))


def all_gather_chunks(x: Any, group: Any) -> Any:
    """[S, ...] of each rank -> [N S, ...], in the order of the ranks."""
    import torch

    operators = torch.ops._c10d_functional
    return operators.wait_tensor(operators.all_gather_into_tensor(x.contiguous(), group.size(), group.group_name))


def reduce_scatter_sum(x: Any, group: Any) -> Any:
    """[N S, ...] -> [S, ...]: this rank's chunk of the sum of all ranks' `x`."""
    import torch

    operators = torch.ops._c10d_functional
    output = operators.reduce_scatter_tensor(x.contiguous(), "sum", group.size(), group.group_name)
    return operators.wait_tensor(output)


def _ring_of_contiguous_slices() -> Any:
    from torch.distributed.tensor.experimental import _attention

    module: Any = _attention  # one module up to 2.11
    if not hasattr(module, "_templated_ring_attention_backward"):
        from torch.distributed.tensor.experimental._context_parallel import _attention as newer

        module = newer
    # Off: torch's other layout gives a rank a piece from the sequence's head and one from its tail.
    module._cp_options.enable_load_balance = False
    return module


def ring_attention(group: Any, kernel: Any, query: Any, key: Any, value: Any) -> tuple[Any, ...]:
    """(output, log-sum-exp, what else `kernel` returned): causal attention of this rank's queries [B, H, T/N, E] to the
    keys and values of all ranks of `group`.

    Checked on 2.13 (Gloo, the CPU's kernel). torch offers it only behind a patched scaled_dot_product_attention that
    has to be active in backward too. When it goes: parallel.context_method=ulysses, which needs nothing private.
    """
    ring = _ring_of_contiguous_slices()
    return ring._templated_ring_attention(
        group, 2, kernel, query=query, key=key, value=value, is_causal=True, dropout_p=0.0, scale=None
    )


def ring_attention_backward(group: Any, kernel: Any, gradient: Any, saved: dict[str, Any]) -> tuple[Any, ...]:
    """Gradients of query, key and value. `saved`: those three, out, logsumexp and the kernel's other results, by the
    names that the backward `kernel` has for them. Checked and replaced as `ring_attention`."""
    ring = _ring_of_contiguous_slices()
    settings = {"is_causal": True, "dropout_p": 0.0, "scale": None}
    return ring._templated_ring_attention_backward(
        group, 2, kernel, grad_out=gradient, grad_out_name="grad_out", **saved, **settings
    )[:3]
