"""Builds a model without its memory, and remembers how each parameter would have been initialised.

`build_on_meta(build)` runs the user's constructor unchanged. Every parameter goes to the meta device the moment it is
registered; buffers stay real, so that tables computed in a constructor are right. Each operation on a parameter
(`normal_`, `weight[pad].zero_()`, a scaled second pass, ...) is written on a tape. From the tape each parameter gets
a `Recipe`, by which any rows of its initial value can be made later, on any rank (`checkpoint/weights.py`).
Nothing in a recipe refers to a rank: values depend on the seed and the parameter's name alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from trainwright.errors import ModelError

RECIPES_ATTRIBUTE = "trainwright_recipes"
