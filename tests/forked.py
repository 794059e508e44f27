"""What ranks need, imported once: tests/ranks.py forks them from a process that has imported this module."""

import contextlib
import gc

import pytest  # noqa: F401
import torch.distributed.pipelining
import torch.distributed.tensor.parallel  # noqa: F401

import trainwright.startup
import trainwright.training_run
import trainwright.verification.cases  # noqa: F401

with contextlib.suppress(ImportError):
    import transformers.models.bert.modeling_bert
    import transformers.models.gpt2.modeling_gpt2
    import transformers.models.llama.modeling_llama
    import transformers.models.t5.modeling_t5  # noqa: F401

gc.freeze()  # pages that the ranks' collectors leave alone stay shared
