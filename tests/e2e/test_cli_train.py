"""The command line from text to an exported model: two ranks, a stop, resumes, evaluation, generation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from texts import words
from trainwright.cli import main
from trainwright.monitor.metrics import read_metrics

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
STEPS = 20


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "trainwright.cli", *arguments]


def _cli(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(_command(*arguments), capture_output=True, text=True, env=ENVIRONMENT, timeout=240)
    assert done.returncode == code, f"{done.args}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data set and a finished run on two ranks."""
    root = tmp_path_factory.mktemp("cli")
    for index in range(6):
        text = words(index, 400)
        (root / f"{index}.txt").write_text(text)
    _cli("prepare", str(root / "*.txt"), "--out", str(root / "data"), "--vocab-size", "300", "--held-out", "0.2")
    _cli("train", *_settings(root, "whole", 2), "profile.steps=2", "--nproc", "2")
    return root


def _settings(root: Path, run: str, stage: int) -> list[str]:
    return [
        "model.transformer={dim: 32, layers: 2, heads: 2, dropout: 0.1}", f"data.path={root / 'data'}",
        "data.sequence_length=16", "batch.global_size=12", "batch.micro_size=3", f"steps={STEPS}", f"zero={stage}",
        "lr_schedule=cosine", "optimizer.lr=1e-2", f"run_dir={root / run}", "evaluate.every=10", "checkpoint.every=8",
    ]  # fmt: skip


def _weights(run: Path) -> dict[str, torch.Tensor]:
    return {
        f"{path.name}/{name}": tensor
        for path in sorted((run / "checkpoints" / f"step-{STEPS:08d}").glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def _losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run).steps]


def _stop_at(root: Path, run: str, step: int, nproc: int) -> None:
    """A run of which one rank gets SIGTERM right after `step`."""
    command = [
        sys.executable,
        "-m",
        "stopping",
        str(step),
        str(nproc),
        str(root / run / "logs"),
        *_settings(root, run, 2),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert read_metrics(root / run).steps[-1]["step"] == step


def test_a_stopped_run_resumes_bitwise(folder: Path) -> None:
    _stop_at(folder, "stopped", 7, nproc=2)
    done = _cli("train", *_settings(folder, "stopped", 2), "--nproc", "2")
    assert "resumed from" in done.stdout
    expected, found = _weights(folder / "whole"), _weights(folder / "stopped")
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert _losses(folder / "stopped") == _losses(folder / "whole")


def test_a_resume_on_another_number_of_ranks_and_stage_goes_on_alike(folder: Path) -> None:
    _stop_at(folder, "elastic", 5, nproc=2)
    done = _cli("train", *_settings(folder, "elastic", 3), "--nproc", "3")
    assert "written on 2 rank(s) at ZeRO 2" in done.stdout
    for step, (found, expected) in enumerate(zip(_losses(folder / "elastic"), _losses(folder / "whole"), strict=True)):
        assert abs(found - expected) < 1e-5 * expected, step
    samples = [[r["samples"] for r in read_metrics(folder / run).steps] for run in ("elastic", "whole")]
    assert samples[0] == samples[1]


def test_evaluate_generate_export_and_show(folder: Path, tmp_path: Path) -> None:
    run = str(folder / "whole")
    facts = json.loads(_cli("eval", run, "--json").stdout)
    assert facts["bits_per_byte"] > 0
    last = read_metrics(folder / "whole").evaluations[-1]
    assert facts["loss"] == pytest.approx(last["val_loss"], rel=1e-6)
    sharded = json.loads(_cli("eval", run, "--json", "--nproc", "2").stdout)
    assert sharded["loss"] == pytest.approx(facts["loss"], rel=1e-6)
    text = _cli("generate", run, "--prompt", "word1 word2", "--max-tokens", "8", "--temperature", "0").stdout
    assert text.startswith("word1 word2")
    _cli("export", run, str(tmp_path / "hf"))
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    from trainwright.inference import open_run

    opened = open_run(run)
    tokens = torch.arange(32).view(2, 16)
    with torch.no_grad():
        ours = opened.model.module(tokens, return_logits=True).logits
        theirs = model(tokens).logits
    assert (ours - theirs).abs().max() < 1e-5
    shown = json.loads(_cli("data", "show", str(folder / "data"), "--json").stdout)
    assert shown["splits"]["held_out"]["documents"] == 1
    _cli("data", "check", str(folder / "data"))


def test_the_run_folder_holds_what_is_promised(folder: Path) -> None:
    run = folder / "whole"
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "report.html",
        "summary.json",
        "logs/rank-1.log",
        "profile/trace-rank1.json.gz",
    ):
        assert (run / name).stat().st_size > 0, name
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["step-00000016", "step-00000020"]
    assert "# override" in (run / "config.yaml").read_text()
    steps = read_metrics(run).steps
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
    for key in ("tokens", "loss", "lr", "grad_norm", "loss_scale", "skipped", "step_time_s", "tokens_per_s", "mfu"):
        assert key in steps[-1], key
    parts = {part["name"]: part["ms"] for part in json.loads((run / "profile" / "profile.json").read_text())["parts"]}
    assert parts["backward: compute"] > 0
    assert parts["communication, exposed"] > 0
    assert "Where a step's time goes" in (run / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.preset=llama-10m"], "data.path is not set"),
        (["model.preset=llama-1om", "data.path={data}", "steps=5", "batch.global_size=4"], "model.preset"),
        (["model.preset=llama-1m", "data.path={data}", "batch.global_size=4"], "a run without an end"),
        (["model.preset=llama-1m", "data.path=nowhere", "steps=5"], "manifest.json"),
        (["missing.yaml"], "no config file"),
        (["a.yaml", "b.yaml"], "one config file"),
        (["model.preset=llama-1m", "data.path={data}", "steps=5", "checkpoint.resume=must", "run_dir={root}/none"], "no whole checkpoint"),
    ],
)  # fmt: skip
def test_bad_input_is_answered(
    folder: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    filled = [a.format(data=folder / "data", root=folder) if "{data}" in a or "{root}" in a else a for a in arguments]
    assert main(["train", *filled]) == 2
    error = capfd.readouterr().err
    assert message in error
    assert "remedy:" in error


def test_the_config_is_printed_on_request(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "zero.stage=2", "--print-config"]) == 0
    assert "stage: 2  # override" in capfd.readouterr().out


def test_a_run_whose_batch_left_its_size_to_the_ranks_keeps_it(folder: Path) -> None:
    """micro_size and accumulation alone: 2 ranks make 12 sequences a step, and 12 they stay on 3; with an average and copies."""
    settings = [
        "model.transformer={dim: 32, layers: 2, heads: 2}", f"data.path={folder / 'data'}", "data.sequence_length=16",
        "batch.micro_size=3", "batch.accumulation=2", "zero=1", "ema=0.9", f"run_dir={folder / 'left'}", "optimizer=sgd",
    ]  # fmt: skip
    _cli("train", *settings, "steps=2", "parallel.replicate=2", "--nproc", "2")
    _cli("train", *settings, "steps=4", "--nproc", "3")
    assert [r["samples"] for r in read_metrics(folder / "left").steps] == [12, 24, 36, 48]
    facts = json.loads(_cli("eval", str(folder / "left"), "--json").stdout)
    last = read_metrics(folder / "left").evaluations[-1]
    assert facts["loss"] == pytest.approx(last["val_loss"], rel=1e-5)  # both of the averaged weights


def test_nproc_inside_another_launcher_is_refused(folder: Path) -> None:
    inside = {**ENVIRONMENT, "RANK": "0", "WORLD_SIZE": "1"}
    command = _command("train", *_settings(folder, "inside", 0), "--nproc", "4")
    done = subprocess.run(command, capture_output=True, text=True, env=inside, timeout=60)
    assert done.returncode == 2
    assert "the launcher starts the ranks" in done.stderr
