"""Muon: momentum whose update is orthogonalised by a Newton-Schulz iteration, for the hidden matrices of a network.

Sources: K. Jordan, "Muon: an optimizer for hidden layers in neural networks" (2024); arXiv 2502.16982 (scale of the
update, weight decay); arXiv 2505.16932 (coefficients as greedy minimax polynomials; those below were computed with
that method). Everything else (embeddings, output head, norms, biases) is left to AdamW, inside the same optimizer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trainwright.errors import ConfigError
from trainwright.optim.whole_matrices import MatrixLayout, apply_to_whole
from trainwright.torch_private import cpu_bf16_is_fast

# Odd quintics a x + b x^3 + c x^5 that bring singular values in [l, 1] near 1; one tuple per iteration. Greedy
# minimax on [l, 1] with l = 0.01 for 3, 0.003 for 4 and 0.001 for 5 iterations, a safety factor of 1.01 and the
# interval's lower end held above 0.024 of the upper one, so that rounding in bf16 cannot throw a value out.
COEFFICIENTS: Mapping[int, tuple[tuple[float, float, float], ...]] = {
    3: ((7.9108, -22.0832, 15.8729), (3.6073, -2.6466, 0.511), (2.6712, -1.9853, 0.4535)),
    4: (
        (8.1383, -22.7182, 16.3293),
        (3.9655, -2.837, 0.5226),
        (3.4886, -2.5621, 0.5016),
        (2.5114, -1.8524, 0.4388),
    ),
    5: (
        (8.2057, -22.9065, 16.4647),
        (4.0667, -2.8617, 0.5185),
        (3.9098, -2.8239, 0.5252),
        (3.2854, -2.4152, 0.4853),
        (2.3005, -1.6688, 0.4188),
    ),
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
# RMS of an AdamW update, about 0.2: the same learning rates then suit both (arXiv 2502.16982, section 2.2).
UPDATE_RMS = 0.2
_NOT_HIDDEN = re.compile(
    r"(^|[._])(embed\w*|embedding\w*|tok_embeddings|wte|wpe|shared|lm_head|head|output|unembed\w*|classifier|score|"
    r"cls|decoder)(\.(weight|decoder\.weight))?$"
)


def is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether the name and shape are those of a hidden matrix: two dimensions, no embedding, no output head."""
    return parameter.ndim == 2 and min(parameter.shape) > 1 and not _NOT_HIDDEN.search(name)


def hidden_matrices(model: nn.Module) -> frozenset[str]:
    """Names of `model`'s hidden matrices: by name as above, and by the modules that hold them.

    Left out are the weights of every nn.Embedding, whatever is tied to one, and linear layers whose outputs are as
    many as the largest embedding's entries (the output head).
    """
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    vocabulary = max((module.num_embeddings for module in embeddings), default=0)
    excluded = {id(module.weight) for module in embeddings}
    excluded |= {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Linear) and module.out_features == vocabulary
    }
    return frozenset(
        name
        for name, parameter in model.named_parameters()
        if id(parameter) not in excluded and is_hidden_matrix(name, parameter)
    )


def newton_schulz(matrix: Tensor, steps: int = 4) -> Tensor:
    """The nearest (semi-)orthogonal matrix to `matrix` [..., R, C], roughly: singular values end in about 0.8-1.2.

    Small singular values (under 0.003 of the largest) end lower; a zero matrix stays zero. Computes in the dtype
    that it is given.
    """
    transposed = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if transposed else matrix
    tiny = torch.finfo(x.dtype).tiny ** 0.5
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(tiny)
    gram = x @ x.mT
    # The largest singular value is at most (sum of their 4th powers)^(1/4) = sqrt(norm of the Gram matrix): closer
    # than the Frobenius norm and free, as the first iteration needs the Gram matrix anyway.
    scale = gram.norm(dim=(-2, -1), keepdim=True).sqrt().clamp_min(tiny)
    x, gram = x / scale, gram / scale.square()
    for index, (a, b, c) in enumerate(COEFFICIENTS[steps]):
        if index:
            gram = x @ x.mT
        polynomial = _product_plus(gram, gram, gram, beta=b, alpha=c)
        x = _product_plus(x, polynomial, x, beta=a, alpha=1.0)
    return x.mT if transposed else x


def _product_plus(base: Tensor, left: Tensor, right: Tensor, *, beta: float, alpha: float) -> Tensor:
    """beta * base + alpha * left @ right, in one kernel."""
    operation = torch.addmm if base.ndim == 2 else torch.baddbmm
    return operation(base, left, right, beta=beta, alpha=alpha)


def orthogonalise(matrices: list[Tensor], steps: int) -> list[Tensor]:
    """`newton_schulz` of each; on accelerators, matrices of equal shape in one batch (on a CPU that is slower)."""
    if matrices[0].device.type == "cpu":
        return [newton_schulz(matrix, steps) for matrix in matrices]
    by_shape: dict[torch.Size, list[int]] = {}
    for index, matrix in enumerate(matrices):
        by_shape.setdefault(matrix.shape, []).append(index)
    results = list(matrices)
    for indices in by_shape.values():
        batch = newton_schulz(torch.stack([matrices[i] for i in indices]), steps)
        for index, result in zip(indices, batch, strict=True):
            results[index] = result
    return results


def default_ns_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """bf16 where its matrix products are fast (CUDA; CPUs with AMX, AMD's with AVX512-BF16), else fp32; fp64 for fp64."""
    if dtype == torch.float64:
        return dtype
    if device.type == "cpu":
        return torch.bfloat16 if cpu_bf16_is_fast() else torch.float32
    return torch.bfloat16


class Muon(torch.optim.Optimizer):
    """Muon on the groups with `muon: True` (two-dimensional parameters), AdamW on the others.

    For a hidden matrix W [R, C] with gradient G and momentum buffer M:
        M <- momentum M + (1 - momentum) G;  U = momentum M + (1 - momentum) G with Nesterov, else U = M
        W <- (1 - lr weight_decay) W - lr 0.2 sqrt(max(R, C)) newton_schulz(U)
    The factor gives the update the RMS of an AdamW update, so `lr` means the same at every shape. The buffer is
    elementwise, so it lies in shards like W; only U is gathered, each matrix to the rank that owns it, in the
    dtype of the iteration. A step is collective: a parameter has a gradient on all ranks of its mesh or on none,
    which FSDP2's reduce-scatter asks for as well.

    Args:
        params: tensors, or groups with hyperparameters of their own; a group without the key `muon` is AdamW's.
        lr: learning rate.
        momentum, nesterov: of Muon.
        weight_decay: decoupled, of both.
        betas, eps: of AdamW.
        ns_steps: Newton-Schulz iterations, 3, 4 or 5.
        ns_dtype: bf16, fp32, fp64 or auto (see `default_ns_dtype`).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 3e-4,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        ns_steps: int = 4,
        ns_dtype: str = "auto",
    ) -> None:
        if ns_steps not in COEFFICIENTS:
            raise ConfigError(f"muon: ns_steps={ns_steps!r}", f"one of {sorted(COEFFICIENTS)}", "ns_steps: 4")
        if ns_dtype not in ("auto", *DTYPES):
            raise ConfigError(f"muon: ns_dtype={ns_dtype!r}", f"one of {['auto', *DTYPES]}", "ns_dtype: auto")
        self._layouts: dict[Tensor, MatrixLayout] = {}
        self._ns = (ns_steps, ns_dtype)
        defaults = {"lr": lr, "weight_decay": weight_decay, "muon": False, "momentum": momentum, "nesterov": nesterov}
        super().__init__(params, defaults)
        for group in self.param_groups:
            if group["muon"] and any(p.ndim != 2 for p in group["params"]):
                raise ConfigError(
                    "muon: a group with muon: True holds a parameter that is not a matrix",
                    "Muon takes parameters of two dimensions",
                    "leave the others in a group without `muon`: AdamW's",
                )
        adamw_groups = [group for group in self.param_groups if not group["muon"]]
        self._adamw: torch.optim.AdamW | None = None
        if adamw_groups:
            devices = {p.device.type for group in adamw_groups for p in group["params"]}
            # Fills its own defaults into the same group dicts, so both optimizers see one set of hyperparameters.
            self._adamw = torch.optim.AdamW(
                adamw_groups, lr, betas, eps, weight_decay, fused=devices <= {"cpu", "cuda"}
            )

    def set_layouts(self, layouts: Mapping[Tensor, MatrixLayout]) -> None:
        """Says which parameters are shards of a matrix, and how it is cut; a parameter left out is whole."""
        self._layouts = dict(layouts)

    def init_state(self) -> None:
        """Creates the momentum buffers (zeros) that are not there yet; the first step does so as well."""
        for group in self.param_groups:
            for parameter in group["params"] if group["muon"] else ():
                if not self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update. Collective over the ranks that share a matrix; parameters without a gradient are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.init_state()
        parameters: list[Tensor] = []
        updates: list[Tensor] = []
        for group in self.param_groups:
            present = [p for p in group["params"] if p.grad is not None] if group["muon"] else []
            if present:
                parameters += present
                updates += self._momentum_updates(present, group)
        if parameters:
            self._apply(parameters, updates)
        if self._adamw is not None:
            # load_state_dict replaces these objects; AdamW must see the current ones.
            self._adamw.param_groups = [group for group in self.param_groups if not group["muon"]]
            self._adamw.state = self.state
            self._adamw.step()
        return loss

    def _momentum_updates(self, parameters: list[Tensor], group: Mapping[str, Any]) -> list[Tensor]:
        """Moves the buffers and returns U of each; decays the weights."""
        momentum = group["momentum"]
        grads = [p.grad for p in parameters if p.grad is not None]
        buffers = [self.state[p]["momentum_buffer"] for p in parameters]
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        torch._foreach_mul_(parameters, 1 - float(group["lr"]) * group["weight_decay"])
        return list(torch._foreach_lerp(grads, buffers, momentum)) if group["nesterov"] else buffers

    def _apply(self, parameters: list[Tensor], updates: list[Tensor]) -> None:
        steps, dtype_name = self._ns
        lr = {p: float(group["lr"]) for group in self.param_groups for p in group["params"]}
        first = parameters[0]
        dtype = default_ns_dtype(first.device, first.dtype) if dtype_name == "auto" else DTYPES[dtype_name]
        layouts = [self._layouts.get(p) or MatrixLayout(*p.shape) for p in parameters]
        directions = apply_to_whole(
            [update.to(dtype) for update in updates], layouts, lambda matrices: orthogonalise(matrices, steps)
        )
        for parameter, direction, layout in zip(parameters, directions, layouts, strict=True):
            scale = UPDATE_RMS * max(layout.rows, layout.columns) ** 0.5
            parameter.add_(direction.to(parameter.dtype), alpha=-lr[parameter] * scale)
