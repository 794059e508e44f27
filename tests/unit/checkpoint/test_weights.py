"""Initial values by name and pretrained ones from safetensors, in one process (tests/dist has the shards)."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from trainwright.checkpoint.safetensors_folder import write_safetensors_folder
from trainwright.checkpoint.weights import build_on_meta, initialise, load_pretrained
from trainwright.errors import ModelError


class Net(nn.Module):
    base_model_prefix = "body"

    def __init__(self, width=4):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(width, 6), nn.BatchNorm1d(6))
        self.head = nn.Linear(6, width, bias=False)
        self.tail = nn.Linear(6, width, bias=False)
        self.tail.weight = self.head.weight
        self.register_buffer("scale", torch.tensor(2.0), persistent=False)


def folder_of(tensors, path):
    path.mkdir(exist_ok=True)
    save_file(tensors, path / "model.safetensors")
    return path


def state(module, **renamed):
    own = {name: t.clone() for name, t in module.state_dict().items() if not name.startswith("tail.")}
    return {renamed.get(name, name): t for name, t in own.items()}


def assert_same(a, b):
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, b.state_dict()[name]), name


def fresh(dtype=torch.float32):
    module = build_on_meta(Net)
    buffers = {name: b.clone() for name, b in module.named_buffers()}
    module.to_empty(device="cpu")
    module.tail.weight = module.head.weight
    for name, buffer in buffers.items():
        module.get_buffer(name).copy_(buffer)
    return module.to(dtype)


def test_initial_values_depend_on_the_seed_alone():
    first, second, third = fresh(), fresh(), fresh()
    torch.manual_seed(1)
    initialise(first, seed=0)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    initialise(second, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    initialise(third, seed=1)
    assert_same(first, second)
    assert not torch.equal(first.body[0].weight, third.body[0].weight)
    assert first.body[0].weight.abs().max() <= 0.5
    assert first.body[1].weight.eq(1).all()
    assert first.scale.item() == 2.0


def test_all_formats_start_from_the_same_values():
    single, double = fresh(), fresh(torch.float64)
    initialise(single, seed=3)
    initialise(double, seed=3)
    assert double.head.weight.dtype == torch.float64
    assert torch.equal(double.head.weight, single.head.weight.double())


def test_skipped_names_keep_their_values():
    module = fresh()
    with torch.no_grad():
        module.head.weight.fill_(9)
    initialise(module, seed=0, skip=["head.weight"])
    assert module.head.weight.eq(9).all()


def test_a_module_without_recipes_is_refused():
    with torch.device("meta"):
        module = Net()
    module.to_empty(device="cpu")
    with pytest.raises(ModelError, match="pass the callable"):
        initialise(module, seed=0)


def test_a_whole_folder_is_read(tmp_path):
    source, target = Net(), fresh()
    source.body[1].running_mean.fill_(0.25)
    report = load_pretrained(target, folder_of(state(source), tmp_path))
    assert_same(source, target)
    assert report.missing == report.unexpected == ()


def test_shards_and_an_index_are_read_and_converted(tmp_path):
    source, target = Net().bfloat16(), fresh()
    files = write_safetensors_folder(state(source).items(), tmp_path, max_shard_bytes=80)
    assert len(files) > 2
    load_pretrained(target, tmp_path)
    assert torch.equal(target.head.weight, source.head.weight.float())
    (tmp_path / files[1]).unlink()
    with pytest.raises(ModelError, match=files[1]):
        load_pretrained(target, tmp_path)


@pytest.mark.parametrize("alias", ["head.weight", "tail.weight"])
def test_a_tied_parameter_is_found_under_any_name(tmp_path, alias):
    source, target = Net(), fresh()
    load_pretrained(target, folder_of(state(source, **{"head.weight": alias}), tmp_path))
    assert_same(source, target)
    assert target.tail.weight is target.head.weight


def test_both_names_of_a_tied_parameter_are_expected(tmp_path):
    source, target = Net(), fresh()
    tensors = {**state(source), "tail.weight": source.head.weight.detach().clone()}
    assert load_pretrained(target, folder_of(tensors, tmp_path)).unexpected == ()


def test_a_base_models_prefix_is_bridged(tmp_path):
    source, target = Net(), fresh()
    tensors = {name.removeprefix("body."): tensor for name, tensor in state(source).items()}
    load_pretrained(target, folder_of(tensors, tmp_path))
    assert_same(source, target)


def test_names_are_translated(tmp_path):
    source, target = Net(), fresh()
    tensors = {f"x.{name}": tensor for name, tensor in state(source).items()}
    load_pretrained(target, folder_of(tensors, tmp_path), rename=lambda name: f"x.{name}")
    assert_same(source, target)


def test_what_is_missing_or_unexpected_is_named(tmp_path):
    source, target = Net(), fresh()
    tensors = {**state(source), "extra.bias": torch.zeros(2)}
    del tensors["body.0.bias"]
    folder = folder_of(tensors, tmp_path)
    with pytest.raises(ModelError, match=r"missing body\.0\.bias; unexpected extra\.bias"):
        load_pretrained(target, folder)
    initialise(target, seed=0)
    before = target.body[0].bias.clone()
    report = load_pretrained(target, folder, allow_missing=["*.bias"], allow_unexpected=["extra.*"])
    assert (report.missing, report.unexpected) == (("body.0.bias",), ("extra.bias",))
    assert torch.equal(target.body[0].bias, before)
    assert torch.equal(target.head.weight, source.head.weight)


def test_another_shape_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"body\.0\.weight has shape \(6, 4\).*\(6, 5\)"):
        load_pretrained(fresh(), folder_of(state(Net(width=5)), tmp_path))


def test_pickled_files_are_refused(tmp_path):
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="nothing is unpickled"):
        load_pretrained(fresh(), tmp_path)


def test_an_empty_folder_and_a_broken_file_are_refused(tmp_path):
    with pytest.raises(ModelError, match="no safetensors file"):
        load_pretrained(fresh(), tmp_path)
    folder = folder_of(state(Net()), tmp_path)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match="cannot be read"):
        load_pretrained(fresh(), folder)


def test_an_index_lists_every_tensor(tmp_path):
    write_safetensors_folder(state(Net()).items(), tmp_path, max_shard_bytes=80)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(state(Net()))
    assert not list(tmp_path.glob("*.tmp"))
