"""Collectives over Gloo as direct exchanges between the ranks: the same result as Gloo's own, in a half to a quarter of the
time (docs/benchmarks.md).

Gloo passes a message around a ring in many small segments, and its reduce-scatter is an all-reduce of which parts are thrown
away. Here each rank sends every other rank what that one needs, all at once, and adds up what it gets in the order of the
ranks: the bytes on the wire are a ring's, the waits are one instead of N - 1, and sums do not depend on who came first. Other
backends keep their own collectives. The transport is torch.distributed's throughout. Gloo's own thread moves the bytes: what
need not be waited for at once (`async_op`) goes on behind the caller's computation. Sends are asked for before receives: what the other
one sends would otherwise come in while this one's send holds the connection.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainwright.other_machines import planned_for

# Renamed in torch 2.13; one of the two is there.
_ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
_REDUCE_SCATTER = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
_SEGMENT_BYTES = 1 << 20
"""Of a message: what has come in is added up while it is in the cache."""
_PIECE = 1 << 17
"""Numbers that are added up while they are in the cache."""
_GATHER, _REDUCE = 1, 2
_SMALL_BYTES = 1 << 14
_FEW_RANKS = 16


def is_direct(tensor: Tensor, group: dist.ProcessGroup) -> bool:
    """Whether `tensor` goes from rank to rank directly."""
    return tensor.device.type == "cpu" and dist.get_backend(group) == "gloo"


def hides(device: torch.device, group: dist.ProcessGroup) -> bool:
    """Whether an exchange of what lies on `device` that is not waited for goes on behind what the caller computes. Of a dry
    run's ranks, which send nothing, the memory is to be the same, where they stand for such as these."""
    backend = dist.get_backend(group)
    return device.type == "cpu" and (backend == "gloo" or (backend == "fake" and not planned_for()))


def all_gather(output: Tensor, input: Tensor, group: dist.ProcessGroup, async_op: bool = False) -> Any:
    """output [N S]: each rank's `input` [S], in the order of the ranks. `input` may be its own place in `output`.

    async_op: returns at once, with what is to be waited for.
    """
    if not is_direct(output, group):
        return getattr(dist, _ALL_GATHER)(output, input, group=group, async_op=async_op)
    rank, parts = group.rank(), output.chunk(group.size())
    if parts[rank].data_ptr() != input.data_ptr():
        parts[rank].copy_(input)
    others = [i for i in range(len(parts)) if i != rank]
    tag = _tag(_GATHER, input)
    messages = [group.send([parts[rank]], i, tag) for i in others]
    messages += [group.recv([parts[i]], i, tag) for i in others]
    if async_op:
        return UnderWay(messages, (output, input))
    _wait(messages)
    return None


class UnderWay(dist.Work):
    """Messages on their way. Holds what they are read from and written to."""

    def __init__(self, messages: list[Any], memory: tuple[Tensor, ...]) -> None:
        super().__init__()
        self._messages = messages
        self._memory = memory

    def wait(self, *_: Any) -> bool:
        """Until all have arrived here and gone out."""
        _wait(self._messages)
        self._messages, self._memory = [], ()
        return True


class _Reduction(UnderWay):
    """Takes a second place for what comes in, (N - 1) / N of `input`; `wait` fills `output`."""

    def __init__(self, output: Tensor, input: Tensor, group: dist.ProcessGroup) -> None:
        rank, parts = group.rank(), input.chunk(group.size())
        others = [i for i in range(len(parts)) if i != rank]
        room, tag = _room(output, input, group), _tag(_REDUCE, parts[rank])
        messages = [group.send([parts[i]], i, tag) for i in others]
        messages += [group.recv([room[j]], i, tag) for j, i in enumerate(others)]
        super().__init__(messages, (input,))
        self._output, self._got = output, [*room[:rank], parts[rank], *room[rank:]]

    def wait(self, *_: Any) -> bool:
        """Until the others' parts have come; adds them up. Once."""
        super().wait()
        _sum_into(self._output, self._got)
        self._got = []
        return True


def _tag(kind: int, part: Tensor) -> int:
    """Of messages with `part`. Those of one tag arrive in the order in which they were sent; ranks that do not call the same
    wait for each other, and are found by the watch, where Gloo would end the process over a message of another size."""
    return kind << 28 | part.nbytes % (1 << 28)


def _room(output: Tensor, input: Tensor, group: dist.ProcessGroup) -> Tensor:
    """For the others' parts of `output`, as they are sent."""
    return input.new_empty(group.size() - 1, output.numel())


def reduce_scatter(output: Tensor, input: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False) -> Any:
    """output [S]: this rank's part of the sum of all ranks' `input` [N S]. 16-bit formats are added up in fp32 and rounded
    once, or not at all where `output` is fp32 (between direct exchanges).

    async_op: returns at once, with what is to be waited for; until then `output` is not filled and `input` not to be changed.
    """
    if op != dist.ReduceOp.SUM or not is_direct(input, group):
        work = getattr(dist, _REDUCE_SCATTER)(output=output, input=input, group=group, op=op, async_op=async_op)
        return (
            UnderWay([work], (input, _room(output, input, group))) if async_op and hides(input.device, group) else work
        )
    if async_op:
        return _Reduction(output, input, group)
    rank, parts = group.rank(), input.chunk(group.size())
    others = [i for i in range(len(parts)) if i != rank]
    step = max(1, _SEGMENT_BYTES // input.itemsize)
    starts = range(0, output.numel(), step)
    segments = [[part[start : start + step] for part in parts] for start in starts]
    tags = [_tag(_REDUCE, segment[rank]) for segment in segments]
    sends = [group.send([segment[i]], i, tags[s]) for s, segment in enumerate(segments) for i in others]
    rooms = torch.empty(min(2, len(segments)), len(others), min(step, output.numel()), dtype=input.dtype)

    def receive(s: int) -> list[Any]:
        return [group.recv([rooms[s % 2, j, : segments[s][i].numel()]], i, tags[s]) for j, i in enumerate(others)]

    coming = receive(0)
    for s, (start, segment) in enumerate(zip(starts, segments, strict=True)):
        _wait(coming)
        coming = receive(s + 1) if s + 1 < len(segments) else []  # on its way while this one is added up
        got = list(rooms[s % 2, :, : segment[rank].numel()])
        got.insert(rank, segment[rank])
        _sum_into(output[start : start + step], got)
    _wait(sends)
    return None


def all_reduce(tensor: Tensor, group: dist.ProcessGroup) -> None:
    """`tensor` summed in place over the ranks; the same bits on each of them."""
    ranks = group.size()
    if tensor.nbytes > _SMALL_BYTES or ranks > _FEW_RANKS or not is_direct(tensor, group):
        dist.all_reduce(tensor, group=group)
        return
    rank, all_of_them = group.rank(), tensor.new_empty(ranks, tensor.numel())
    all_of_them[rank] = tensor.flatten()
    all_gather(all_of_them.flatten(), all_of_them[rank], group)
    _sum_into(tensor, list(all_of_them))


def _wait(messages: list[Any]) -> None:
    for message in messages:
        message.wait()


def _sum_into(output: Tensor, parts: list[Tensor]) -> None:
    first, *others = (part.view(output.shape) for part in parts)
    if output.dtype == first.dtype and output.itemsize >= 4 and len(others) == 1:
        torch.add(first, others[0], out=output)
        return
    direct = output.itemsize >= 4 and output.is_contiguous()
    wide = output.dtype if output.itemsize >= 4 else torch.float32
    total = output if direct else torch.empty(output.shape, dtype=wide)
    pieces = [part.reshape(-1).split(_PIECE) for part in (total, first, *others)]
    for piece, of_first, *of_others in zip(*pieces, strict=True):
        piece.copy_(of_first)
        for part in of_others:
            piece += part
    if total is not output:
        output.copy_(total)
