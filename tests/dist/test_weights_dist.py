"""Weights onto shards: initial values, pretrained slices and generation do not depend on the layout."""

from __future__ import annotations

import hashlib
import itertools

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ranks import run_ranks
from trainwright.checkpoint.export import export_huggingface, huggingface_name
from trainwright.checkpoint.weights import build_on_meta, initialise, load_pretrained, local_part
from trainwright.generate import GenerationSettings, continue_prompts
from trainwright.models.lstm import LstmLanguageModel, LstmSettings
from trainwright.models.transformer import Transformer, TransformerSettings
from trainwright.torch_private import quiet_known_warnings

# 301 rows over 3 ranks, 4 over 3 (the norms of queries and keys): neither divides, and the last shard may be empty.
SETTINGS = TransformerSettings(301, 8, 2, 2, 1, 20, 4, qk_norm=True, tied=True)


class Mixture(nn.Module):
    """Values of every kind: whole-matrix draws, kept draws, copies, a shard that is empty on some rank."""

    def __init__(self):
        super().__init__()
        self.rows = nn.Parameter(torch.empty(2, 5))
        self.orthogonal = nn.Parameter(torch.empty(7, 7))
        self.drawn = nn.Parameter(torch.randn(5))
        self.wide = nn.Parameter(torch.empty(3, 40, 1000))
        nn.init.normal_(self.rows)
        nn.init.orthogonal_(self.orthogonal)
        nn.init.trunc_normal_(self.wide, std=0.1)
        self.first, self.second = nn.Linear(4, 9), nn.Linear(4, 9)
        self.second.load_state_dict(self.first.state_dict())


BUILDS = {
    "transformer": lambda: Transformer(SETTINGS),
    "lstm": lambda: LstmLanguageModel(LstmSettings(101, 8, 10, 2)),
    "mixture": Mixture,
}


def sharded(build, mesh, policy=None):
    module = build_on_meta(build)
    options = {"mesh": mesh, "mp_policy": policy or MixedPrecisionPolicy()}
    for block in getattr(module, "blocks", ()):
        fully_shard(block, **options)
    fully_shard(module, **options)
    return module.to_empty(device="cpu")


def digest(module):
    """Name -> hash of the whole values."""
    result = {}
    for name, parameter in module.named_parameters():
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        result[name] = hashlib.sha256(whole.detach().contiguous().numpy().tobytes()).hexdigest()
    return result


def whole(build):
    module = build_on_meta(build).to_empty(device="cpu")
    if isinstance(module, Transformer):  # to_empty unties
        module.head.weight = module.embedding.weight
    initialise(module, seed=11)
    return module


def on_a_rank(rank, shape, folder):
    quiet_known_warnings()
    names = ("replicate", "shard")[-len(shape) :]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    digests = {}
    for kind, build in BUILDS.items():
        module = sharded(build, mesh)
        initialise(module, seed=11)
        digests[kind] = digest(module)
    pretrained = sharded(BUILDS["transformer"], mesh)
    assert pretrained.head.weight is pretrained.embedding.weight
    load_pretrained(pretrained, folder, rename=huggingface_name)
    digests["pretrained"] = digest(pretrained)
    local, box = local_part(pretrained.embedding.weight)
    assert local.shape[0] == box[0].stop - box[0].start < 301
    texts = continue_prompts(pretrained, [[1, 2, 3], [4]], GenerationSettings(max_new_tokens=5, seed=2))
    assert isinstance(pretrained, FSDPModule)
    return digests, texts, [(box[0].start, box[0].stop)]


@pytest.mark.parametrize("shape", [(3,), (2, 2)], ids=["3 shards", "2 x 2"])
def test_values_and_tokens_do_not_depend_on_the_layout(shape, tmp_path):
    expected = {kind: digest(whole(build)) for kind, build in BUILDS.items()}
    model = whole(BUILDS["transformer"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    export_huggingface(model, [(n, p.detach()) for n, p in model.named_parameters()], tmp_path)
    expected["pretrained"] = digest(model)
    texts = continue_prompts(model, [[1, 2, 3], [4]], GenerationSettings(max_new_tokens=5, seed=2))
    ranks = run_ranks(on_a_rank, torch.Size(shape).numel(), shape, str(tmp_path))
    for digests, rank_texts, _ in ranks:
        assert digests == expected
        assert rank_texts == texts
    rows = sorted({row for _, _, held in ranks for row in held})
    assert rows[0][0] == 0
    assert rows[-1][1] == 301
    assert all(a[1] == b[0] for a, b in itertools.pairwise(rows))
