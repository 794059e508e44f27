"""Every example runs, in a small form (the quickstart's own acceptance is `make quickstart`)."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from texts import words
from trainwright.monitor.metrics import read_metrics

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def _run(*command: str, **environment: str) -> str:
    # The scripts call `trainwright` and `python`: those of this environment.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": path, **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=settings, timeout=240)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert "Warning" not in done.stderr, done.stderr
    return done.stdout


def _torchrun(*command: str, ranks: int = 2) -> str:
    return _run(
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *command
    )  # fmt: skip


def _example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_three_calls_change_five_lines_and_no_loss() -> None:
    example = _example("three_calls")
    assert example.changed_lines(example.plain_loop, example.engine_loop) <= 5
    data = example.Bytes((EXAMPLES / "three_calls.py").read_bytes(), 6 * example.BATCH_SIZE)
    losses = []
    for loop in (example.plain_loop, example.engine_loop):
        torch.manual_seed(0)
        losses.append(loop(example.ByteModel(), data, {"zero": 3}))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[0][-1] < losses[0][0]


def test_the_count_of_changed_lines_sees_changes() -> None:
    example = _example("three_calls")
    assert example.changed_lines(example.plain_loop, example.plain_loop) == 0
    assert example.changed_lines(example.plain_loop, example.over_ranks) > 5


def test_three_calls_on_two_ranks() -> None:
    out = _torchrun(str(EXAMPLES / "three_calls.py"), "--steps", "6")
    losses = re.findall(r"plain (\S+)  engine on 2 rank\(s\) (\S+)", out)
    assert len(losses) == 6
    for plain, sharded in losses:
        assert float(sharded) == pytest.approx(float(plain), rel=1e-5)
    assert "changed lines: 5" in out


@pytest.fixture
def tiny_llama(tmp_path: Path) -> tuple[Path, Path]:
    """(a random Hugging Face Llama's folder with its tokenizer, token data prepared with that tokenizer)."""
    transformers = pytest.importorskip("transformers")
    from trainwright.data import PrepareSettings, prepare

    texts = tmp_path / "texts"
    texts.mkdir()
    for index in range(5):
        (texts / f"{index}.txt").write_text(words(index, 400))
    own = prepare(str(texts), tmp_path / "own", PrepareSettings(vocab_size=300))
    folder = tmp_path / "model"
    config = transformers.LlamaConfig(
        vocab_size=own.manifest.vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    (tmp_path / "own" / "tokenizer.json").rename(folder / "tokenizer.json")
    prepare(str(texts), tmp_path / "data", PrepareSettings(tokenizer=str(folder), held_out=0.2))
    return folder, tmp_path / "data"


def test_fine_tuning_a_huggingface_model(tiny_llama: tuple[Path, Path], tmp_path: Path) -> None:
    model, data = tiny_llama
    arguments = ["--model", str(model), "--data", str(data), "--out", str(tmp_path / "out")]
    arguments += ["--steps", "6", "--sequence-length", "16", "--lr", "1e-2"]
    out = _torchrun(str(EXAMPLES / "finetune_hf.py"), *arguments)
    before, after = (float(re.search(rf"held-out loss {when}: +(\S+)", out)[1]) for when in ("before", "after"))  # type: ignore[index]
    assert after < before
    assert len(re.findall(r"step +\d+  loss", out)) == 6
    difference = re.search(r"largest difference: (\S+)", out)
    assert difference is not None
    assert float(difference[1]) < 1e-4
    exported = tmp_path / "out" / "huggingface"
    pretrained, trained = load_file(model / "model.safetensors"), load_file(exported / "model.safetensors")
    assert pretrained.keys() == trained.keys()
    changes = [(trained[name] - tensor).abs().max().item() for name, tensor in pretrained.items()]
    assert 0 < max(changes) < 0.1, "trained from the pretrained weights, not from others"
    assert (exported / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()


def test_a_model_of_code(tmp_path: Path) -> None:
    overrides = [
        "duration=null",
        "steps=6",
        "model.transformer={dim: 32, layers: 2, heads: 2}",
        "data.sequence_length=32",
    ]
    overrides += ["lr_schedule.warmup_steps=2", "--quiet"]
    folders = {"DATA": str(tmp_path / "data"), "RUN": str(tmp_path / "run")}
    small = {"MODULES": str(Path(json.__file__)), "PACKAGES": "json concurrent", "VOCAB": "300"}
    out = _run("bash", str(EXAMPLES / "code.sh"), *overrides, **folders, **small)
    losses = [record["loss"] for record in read_metrics(tmp_path / "run").steps]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    assert "bits per byte" in out
    assert "\ndef read(self, size):\n" in out


def test_loading_stays_under_its_bound() -> None:
    out = _run(sys.executable, str(ROOT / "benchmarks" / "loading.py"), "--small", "--ranks", "2", "--no-peer")
    assert "x bound holds" in out
    assert re.findall(r"^slices +(\d)", out, re.MULTILINE) == ["0", "1"]
