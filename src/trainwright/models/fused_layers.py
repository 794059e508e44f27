"""Others' RMSNorms and SwiGLU feed-forwards on our fused passes, their code unchanged.

A class is taken by what it computes, not by its name alone: a small instance of it is run beside ours, and where the two
differ (Gemma's norm scales by 1 + weight) the model keeps its own.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainwright.fused.elementwise import rms_norm, swiglu

_WIDTH = 8
_PROJECTIONS = {"gate_proj", "up_proj", "down_proj"}


def fuse_layers(model: nn.Module) -> int:
    """Replaces the forward of each such module in place; parameter names stay. Returns their number."""
    count = 0
    for module in model.modules():
        kind = type(module)
        if not kind.__module__.startswith("transformers.") or "forward" in vars(module):
            continue
        names = {name for name, _ in module.named_children()} | {
            name for name, _ in module.named_parameters(recurse=False)
        }
        if kind.__name__.endswith("RMSNorm") and names == {"weight"} and _known(_is_rms_norm, kind):
            module.forward = functools.partial(_rms_norm_forward, module)
            count += 1
        elif names >= _PROJECTIONS and _is_silu(getattr(module, "act_fn", None)) and _known(_is_swiglu, kind):
            module.forward = functools.partial(_swiglu_forward, module)
            count += 1
    return count


_found: dict[tuple[str, type[nn.Module]], bool] = {}


def _known(test: Callable[[type[nn.Module]], bool], kind: type[nn.Module]) -> bool:
    """What `test` says of `kind`, asked once."""
    key = (test.__name__, kind)
    if key not in _found:
        _found[key] = test(kind)
    return _found[key]


def _rms_norm_forward(module: Any, hidden_states: Tensor) -> Tensor:
    return rms_norm(hidden_states, module.weight, module.variance_epsilon)


def _swiglu_forward(module: Any, x: Tensor) -> Tensor:
    out: Tensor = module.down_proj(swiglu(module.gate_proj(x), module.up_proj(x)))
    return out


def _is_rms_norm(kind: type[nn.Module]) -> bool:
    """Whether `kind` computes weight * x / sqrt(mean(x²) + variance_epsilon), and nothing beside it."""
    small = _bare(kind, variance_epsilon=1e-5)
    small.weight = nn.Parameter(torch.linspace(0.5, 2.0, _WIDTH))
    x = torch.linspace(-1.0, 3.0, 2 * _WIDTH).view(2, _WIDTH)
    return _agree(small, x, lambda: _rms_norm_forward(small, x))


def _is_swiglu(kind: type[nn.Module]) -> bool:
    """Whether `kind` computes down_proj(act_fn(gate_proj(x)) * up_proj(x)), and nothing beside it."""
    small = _bare(kind, act_fn=F.silu, config=types.SimpleNamespace(pretraining_tp=1))
    for number, name in enumerate(sorted(_PROJECTIONS)):
        layer = nn.Linear(_WIDTH, _WIDTH, bias=False)
        layer.weight = nn.Parameter(torch.linspace(-1.0, 1.0 + number, _WIDTH * _WIDTH).view(_WIDTH, _WIDTH).sin())
        small.add_module(name, layer)
    x = torch.linspace(-1.0, 3.0, 2 * _WIDTH).view(2, _WIDTH)
    return _agree(small, x, lambda: _swiglu_forward(small, x))


def _bare(kind: Any, **attributes: Any) -> Any:
    """An instance without its constructor's work."""
    small: Any = kind.__new__(kind)
    nn.Module.__init__(small)
    for name, value in attributes.items():
        setattr(small, name, value)
    return small


def _agree(small: nn.Module, x: Tensor, ours: Any) -> bool:
    try:
        with torch.no_grad(), torch.device("cpu"):
            return torch.allclose(small(x), ours(), rtol=1e-5, atol=1e-6)
    except Exception:  # it wants what a bare instance has not: not the plain layer
        return False


def _is_silu(function: Any) -> bool:
    if function is None:
        return False
    x = torch.linspace(-3.0, 3.0, 16)
    try:
        return torch.allclose(function(x), F.silu(x), rtol=1e-6, atol=1e-6)
    except Exception:
        return False
