"""The reference: one process, the whole global batch, plain autograd, a plain optimizer. No sharding, no engine.

The loss is Σ token losses / Σ valid tokens of the global batch, taken from the model's logits by
`torch.nn.functional.cross_entropy`; a model without logits gives its own mean.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainwright.config import Config
from trainwright.config.schema import LossConfig
from trainwright.data.batch import IGNORE_INDEX, Batch
from trainwright.models.build import is_ours
from trainwright.models.documents import document_inputs
from trainwright.models.dropout import dropout_context
from trainwright.models.pretrained import PreShiftedCausalLM, shifts_labels
from trainwright.optim.catalogue import constructor_arguments, optimizer_class
from trainwright.optim.lion import Lion
from trainwright.optim.muon import Muon
from trainwright.parallel.apply import tied_names
from trainwright.verification.lift import Float64

_LOGITS_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class ReferenceStep:
    """One step of the reference, before its update."""

    loss: float
    norm: float
    gradients: dict[str, Tensor]
    """Whole gradients by parameter name, on the CPU."""


class Reference:
    """The reference's run. Steps are made once, in order; `result(k)` of an earlier step is kept where `keep` says so."""

    def __init__(
        self,
        build: Callable[[], nn.Module],
        config: Config,
        schedule: Callable[[float], float],
        batches: Callable[[int], Batch],
        keep: bool = False,
    ) -> None:
        self._build, self._config, self._schedule, self._batches = build, config, schedule, batches
        self._keep = keep
        self._kept: dict[int, ReferenceStep] = {}
        self._values: dict[str, Tensor] | None = None
        self._module: nn.Module | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._step = 0
        self._has_gradients = False
        self._start: dict[str, Tensor] | None = None
        self._ties: dict[str, str] | None = None
        self._last_norm: Tensor | None = None

    @property
    def start(self) -> dict[str, Tensor]:
        """The first weights, on the CPU."""
        if self._start is None:
            _ = self.module
        assert self._start is not None, "set where the module is built"
        return self._start

    @property
    def ties(self) -> dict[str, str]:
        """Tied weights: other name -> first name."""
        if self._ties is None:
            _ = self.module
        assert self._ties is not None, "set where the module is built"
        return self._ties

    def start_from(self, weights: dict[str, Tensor]) -> None:
        """Takes the first weights from outside (the config's `init_from`)."""
        self._start, self._module = weights, None

    @property
    def gradients_only(self) -> bool:
        """Whether the optimizer's update magnifies rounding beyond bounds: it takes signs of gradients (Lion, Rprop), or of
        singular values (Muon). Its reference starts each step from the strategy's own weights."""
        return optimizer_class(self._config.optimizer.name) in (Lion, Muon, torch.optim.Rprop)

    @property
    def module(self) -> nn.Module:
        """The unsharded model, at the values before the step that comes next."""
        if self._module is None:
            self._module = self._build()
            self._optimizer = None if self.gradients_only else build_optimizer(self._module, self._config)
            self._step, self._has_gradients, self._last_norm = 0, False, None
            self._ties = tied_names(self._module)
            if self._start is None:
                self._start = {name: p.detach().cpu().clone() for name, p in self._module.named_parameters()}
            else:
                self._copy(self._start)
        return self._module

    def result(self, step: int) -> ReferenceStep:
        """Loss and gradients of a step, of the weights before it."""
        if step in self._kept:
            return self._kept[step]
        self._go_to(step)
        found = self._forward_backward(step)
        if self._keep:
            self._kept[step] = found
        return found

    def at(self, step: int) -> nn.Module:
        """The module with the weights before `step`, for a closer look at that step."""
        self._go_to(step)
        return self.module

    def _go_to(self, step: int) -> None:
        if self._step > step:
            assert not self.gradients_only, "its weights of an earlier step are gone"
            self._module = None
        _ = self.module
        while self._step < step:
            if not self._has_gradients:
                self._forward_backward(self._step)
            self._advance()

    def load(self, step: int, weights: dict[str, Tensor]) -> None:
        """The strategy's own weights, as they are before `step`."""
        _ = self.module
        self._copy(weights)
        self._step, self._has_gradients = step, False

    @torch.no_grad()
    def _copy(self, weights: dict[str, Tensor]) -> None:
        assert self._module is not None, "built"
        for name, parameter in self._module.named_parameters():
            parameter.copy_(weights[name])

    def final(self, steps: int) -> dict[str, Tensor]:
        """Parameters after `steps` steps, on the CPU. Kept likewise."""
        if self._values is None:
            self._go_to(steps)
            values = {name: p.detach().cpu().clone() for name, p in self.module.named_parameters()}
            if not self._keep:
                return values
            self._values = values
            self._module = self._optimizer = None
        return self._values

    def _forward_backward(self, step: int) -> ReferenceStep:
        module, batch = self.module, self._batches(step)
        module.zero_grad()
        valid = max(1, int(batch.valid_tokens()))
        total = 0.0
        for part in batch.split(rows_at_once(module, batch)):
            loss = token_loss_sum(module, part, self._config, step) / valid
            loss.backward()
            total += loss.item()
        trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        gradients = {name: (torch.zeros_like(p) if p.grad is None else p.grad).cpu().clone() for name, p in trained}
        norm = self._clip([p for _, p in trained])
        self._has_gradients = True
        return ReferenceStep(total, norm, gradients)

    def _clip(self, parameters: list[torch.nn.Parameter]) -> float:
        """Clips as the config says; the global norm before."""
        maximum, how = self._config.gradient_clipping, self._config.fused.clipping
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if maximum is not None and how is None:
            torch.nn.utils.clip_grads_with_norm_(parameters, maximum, norm)
        elif maximum is not None and how == "per_parameter":
            for parameter in parameters:
                torch.nn.utils.clip_grad_norm_([parameter], maximum)
        elif maximum is not None and self._last_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, maximum, self._last_norm)
        self._last_norm = norm
        return norm.item()

    def _advance(self) -> None:
        assert self._optimizer is not None, "weights come from the strategy"
        for group in self._optimizer.param_groups:
            group["lr"] = self._config.optimizer.lr * group["lr_scale"] * self._schedule(self._step)
        self._optimizer.step()
        self._step, self._has_gradients = self._step + 1, False


def lifted(module: nn.Module, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Inside, a float64 model of someone else's computes in float64 throughout."""
    return Float64() if dtype == torch.float64 and not is_ours(module) else nullcontext()


def rows_at_once(module: nn.Module, batch: Batch) -> int:
    """Rows of a forward whose logits fit in memory; a divisor of the batch."""
    sizes = (getattr(owner, "vocab_size", None) for owner in (module, getattr(module, "config", None)))
    vocabulary = next((size for size in sizes if isinstance(size, int)), 1 << 15)
    most = max(1, _LOGITS_AT_ONCE // (batch.sequence_length * vocabulary))
    return max(rows for rows in range(1, batch.size + 1) if batch.size % rows == 0 and (rows <= most or rows == 1))


def token_loss_sum(module: nn.Module, batch: Batch, config: Config, step: int) -> Tensor:
    """Σ token losses of some rows of a global batch, 0-dim, with gradients; dropout is that of the samples."""
    device = next(module.parameters()).device
    ids, labels = batch.input_ids.to(device), batch.labels.to(device)
    dtype = next(module.parameters()).dtype
    with lifted(module, dtype), dropout_context(config.seed, step, batch.sample_ids):
        if is_ours(module) or isinstance(module, PreShiftedCausalLM) or shifts_labels(module):
            documents = document_inputs(module, batch.to(device))
            output = module(input_ids=ids, **documents)  # labels are shifted already: each position's own target
        else:
            output = module(input_ids=ids, labels=labels)
        logits = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
        if logits is not None:
            return _cross_entropy(logits.flatten(0, -2), labels.flatten(), config.loss)
        count = (labels != IGNORE_INDEX).sum()
        loss: Tensor = output["loss"] if isinstance(output, dict) else getattr(output, "loss", output)
        return loss * count if count else loss.nan_to_num() * 0.0


def _cross_entropy(logits: Tensor, labels: Tensor, terms: LossConfig) -> Tensor:
    """Σ over the valid labels, from whole logits: written apart from `fused/`, which it is to prove."""
    found = F.cross_entropy(
        logits, labels, ignore_index=IGNORE_INDEX, reduction="sum", label_smoothing=terms.label_smoothing
    )
    if terms.z_loss:
        found = found + terms.z_loss * logits[labels != IGNORE_INDEX].logsumexp(dim=1).square().sum()
    return found


def build_optimizer(module: nn.Module, config: Config) -> torch.optim.Optimizer:
    """The config's optimizer over whole parameters: matrices decay, vectors do not, the first matching pattern rules."""
    target = optimizer_class(config.optimizer.name)
    groups: list[dict[str, Any]] = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = parameter.ndim >= 2 or config.optimizer.decay_norms_and_biases
        decay, scale = config.optimizer.weight_decay if decays else 0.0, 1.0
        for group in config.optimizer.groups:
            if fnmatchcase(name, group.pattern):
                scale = group.lr_scale
                decay = decay if group.weight_decay is None else group.weight_decay
                break
        groups.append({"params": [parameter], "weight_decay": decay, "lr_scale": scale})
    return target(groups, **constructor_arguments(target, config.optimizer))
