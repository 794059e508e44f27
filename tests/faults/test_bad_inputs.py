"""Bad configs and bad inputs, each answered with what was got, the rule and a remedy, before any rank is started."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from trainwright.cli import main
from trainwright.launch import run as launcher

LSTM = "model={lstm: {layers: 1}}"
DISK = "offload.optimizer=disk"
IN_BACKWARD = "fused.optimizer_in_backward=true"

CONFIGS = """
gradient_clipp1ng=1 | bf16_=true | ofload.optimizer=disk | zer0=1 | model.presett=llama-1m | batch.globalsize=8
optimzer.lr=1 | optimizer.learning_rate=1 | lr=1e-3 | learning_rate=1 | train_batch_size=8 | train_micro_batch_size_per_gpu=4
fp16.enabled=true | zero_optimization.stage=2 | gradient_accumulation_steps=2 | per_device_train_batch_size=1 | max_steps=5
num_train_epochs=1 | warmup_steps=5 | scheduler.type=cosine | fsdp=full_shard | max_grad_norm=1 | tensor_parallel_degree=2
guard.wach=true | data.pth=x | checkpoint.evry=5 | evaluate.batchs=1 | parallel.tensr=2 | lr_schedule.warmup=5
optimizer.beta=0.9 | profile.step=1 | track.wandb=true | steps=0 | steps=-5 | steps=ten | steps=1.5 | steps=[1]
steps={a: 1} | tokens=-1 | epochs=0 | epochs=-1 | epochs=nan | duration=3x | duration=-3m | duration=0 | stop_after=soon
stop_after=-1 | batch.global_size=0 | batch.global_size=-8 | batch.micro_size=0 | batch.micro_size=two | batch.accumulation=0
batch.micro_size=16 | batch.accumulation=9 | batch.global_tokens=100 | batch={global_size: 8, micro_size: 3, accumulation: 2}
batch.global_tokens=1024 | data.sequence_length=0 | data.sequence_length=-4 | data.sequence_length=long | data.workers=-1
data.shuffle=perhaps | data.document_mask=7 | precision=bf61 | precision=fp8 | precision=int8 | precision.dtype=float
precision.loss_scale=1024 | precision={dtype: fp16, loss_scale: -1} | precision={dtype: fp16, loss_scale: 0}
precision={dtype: fp16, loss_scale: {initial: -1}} | precision.reduce_dtype=fp64
precision={dtype: fp64, reduce_dtype: fp32} | precision.master=bf16 | precision.master=bf16_kahan
precision={dtype: bf16, master: bf16_kahan} optimizer.name=sgd | precision={dtype: bf16, master: bf16_kahan} ema=0.9
precision={dtype: bf16, master: bf16_kahan} keep_fp32=['x'] | precision.float8=tensorwise | precision.float8=tensor
precision={dtype: bf16, float8: rowwise} parallel.tensor=2 | precision.max_skipped_steps=0 | zero=4 | zero=-1 | zero=two
zero.stage=5 | zero=[1] | offload.optimizer=disc | offload.optimizer=gpu | offload.parameters=cpu | offload.parameters=disk
offload.masters=disk | offload.path=/tmp | DISK optimizer.name=lion | DISK precision={dtype: bf16, master: bf16_kahan}
DISK precision=fp64 | DISK offload.masters=disk | parallel.tensor=0 | parallel.tensor=-2 | parallel.context=half
parallel.sequence=false | parallel.context_method=ring | parallel.context_method=star
parallel={context: 2, context_method: ring} | parallel.pipeline_schedule=zbv | parallel.pipeline_schedule=2f2b
parallel.virtual_stages=2 | parallel={pipeline: 2, virtual_stages: 2}
parallel={pipeline: 2, pipeline_schedule: zbv, virtual_stages: 3} | parallel={pipeline: 2, pipeline_schedule: zbv} zero=3
parallel.pipeline=4 batch.accumulation=2 | parallel.replicate=0 | parallel.backend=mpi | parallel.backend=3 | strategy=best
strategy=best | optimizer=adamm | optimizer.lr=0 | optimizer.lr=-1 | optimizer.lr=fast | optimizer.lr=inf
optimizer.betas=[0.9] | optimizer.betas=[0.9,1.1] | optimizer.betas=0.9 | optimizer.eps=0 | optimizer.weight_decay=-1
optimizer.momentum=1.5 | optimizer={name: adamw, momentum: 0.9} | optimizer={name: sgd, betas: [0.9, 0.9]}
optimizer={name: lion, eps: 1e-8} | optimizer={name: adamw, options: {a: 1}} | optimizer={name: adamw, adamw_lr: 1e-3}
optimizer={name: sgd, moments: bf16} | optimizer.moments=fp8 | optimizer.groups=[{lr_scale: 2}]
optimizer.groups=[{pattern: a, lr: 1}] | lr_schedule=cosin | lr_schedule.warmup_steps=10 | lr_schedule.warmup_steps=-1
lr_schedule.warmup_fraction=1.5 | lr_schedule={name: cosine, decay_fraction: 0.3} | lr_schedule={name: cosine, power: 2}
lr_schedule.final_fraction=0.1 | lr_schedule={name: cosine, final_fraction: 2} | lr_schedule={name: wsd, decay_fraction: 0}
gradient_clipping=0 | gradient_clipping=-1 | gradient_clipping=off | recompute=half | recompute.every=2 | recompute.every=0
compile=maybe | evaluate.every=-1 | evaluate.keep_best=true | evaluate.every=often | freeze=5 | keep_fp32=['norm'] | ema=1
ema=-0.5 | ema=2 | checkpoint.every=-1 | checkpoint.keep=-1 | checkpoint.resume=yes | checkpoint.resume=always
track=[tensorbord] | track=mlflow | seed=-1 | seed=lucky | fused.clipping=late | IN_BACKWARD precision=fp16
IN_BACKWARD gradient_clipping=1 | IN_BACKWARD optimizer=muon | IN_BACKWARD batch.accumulation=4
IN_BACKWARD parallel.pipeline=2 | IN_BACKWARD fused.clipping=late | fused.clipping=global | loss.label_smoothing=1
loss.label_smoothing=-0.1 | loss.z_loss=-1 | profile.steps=-1 | profile.after=x | guard.wait=-1 | guard.disagree=0
guard.non_finite=ignore | guard.spike=-2 | guard.on_spike=panic | guard.replicas_every=-1 | guard=on | model.preset=lama-1m
model.preset=gpt5 | LSTM model.preset=llama-1m | model={transformer: {layers: 2, dim: 30, heads: 4}}
model.weights=pretrained | model={transformer: {layers: 0}} | model={transformer: {layers: 2, dim: 0}}
model={lstm: {layers: -1}} | model={transformer: {dropout: 1.5}} | model=[1] | model.transformer.heads=none | init_from=5
steps=5 tokens=100 | steps=5 epochs=1 | data.path=/nowhere/at/all | data.path=/etc | data.path=5 | run_dir=[1] | =5 | novalue
steps | a.b.c.d=1 | .=1 | steps=5=6 | steps={ | batch={global_size:8} | data.sequence_length=1e99 | steps=1e400
optimizer.lr=1e-999999 x=
"""


def _cases() -> list[str]:
    words = {"LSTM": LSTM, "DISK": DISK, "IN_BACKWARD": IN_BACKWARD}
    cases = [case.strip() for line in CONFIGS.strip().splitlines() for case in line.split(" | ")]
    found = []
    for case in cases:
        for word, meaning in words.items():
            case = case.replace(word, meaning)
        found.append(case)
    return found


def _overrides(case: str) -> list[str]:
    """Split at blanks outside of brackets."""
    found, depth = [""], 0
    for letter in case:
        depth += (letter in "[{") - (letter in "]}")
        if letter == " " and depth <= 0:
            found.append("")
        else:
            found[-1] += letter
    return [part for part in found if part]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from trainwright.data import PrepareSettings, prepare

    folder = tmp_path_factory.mktemp("text")
    for index in range(3):
        (folder / f"{index}.txt").write_text(" ".join(f"word{(i * i + index) % 97}" for i in range(300)))
    prepare([str(folder / "*.txt")], folder / "tokens", PrepareSettings(vocab_size=300, held_out=0.3), progress=False)
    return folder / "tokens"


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*_: object, **__: object) -> None:
        raise AssertionError("ranks were started")

    monkeypatch.setattr(launcher, "launch_local", started)


def _train(data: Path, overrides: list[str], run_dir: Path) -> int:
    given = {o.split("=", 1)[0].split(".")[0] for o in overrides}
    base = {
        "model": "model.preset=llama-1m", "data": f"data.path={data}", "steps": "steps=10",
        "batch": "batch={global_size: 8, micro_size: 2}",
    }  # fmt: skip
    arguments = [
        text
        for key, text in base.items()
        if key not in given or (key in ("batch", "data") and any("." in o for o in overrides))
    ]
    return main(["train", *arguments, "data.sequence_length=64", f"run_dir={run_dir}", *overrides, "--nproc", "2"])


@pytest.mark.parametrize("case", _cases())
def test_a_bad_config_is_told_with_rule_and_remedy(
    case: str, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code = _train(data, _overrides(case), tmp_path / "run")
    said = capfd.readouterr().err
    assert code == 2, said
    assert said.startswith("error: ")
    assert "\n  rule: " in said
    assert "\n  remedy: " in said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_there_are_150_of_them() -> None:
    assert len(set(_cases())) >= 190


def _broken_yaml(folder: Path, data: Path) -> list[str]:
    (folder / "run.yaml").write_text("steps: [1, 2\nmodel: {")
    return ["train", str(folder / "run.yaml")]


def _twice(folder: Path, data: Path) -> list[str]:
    (folder / "run.yaml").write_text("steps: 5\nsteps: 6\n")
    return ["train", str(folder / "run.yaml")]


def _python_tag(folder: Path, data: Path) -> list[str]:
    (folder / "run.yaml").write_text("steps: !!python/object/apply:os.system ['touch /tmp/owned']\n")
    return ["train", str(folder / "run.yaml")]


def _deep(folder: Path, data: Path) -> list[str]:
    (folder / "run.yaml").write_text("steps: " + "[" * 5000 + "]" * 5000)
    return ["train", str(folder / "run.yaml")]


def _bomb(folder: Path, data: Path) -> list[str]:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"] + [
        f"b{i}: &b{i} [{', '.join(['*' + ('a' if i == 0 else f'b{i - 1}')] * 9)}]" for i in range(9)
    ]
    (folder / "run.yaml").write_text("\n".join(lines))
    return ["train", str(folder / "run.yaml")]


def _binary(folder: Path, data: Path) -> list[str]:
    (folder / "run.yaml").write_bytes(bytes(range(256)))
    return ["train", str(folder / "run.yaml")]


def _truncated_tokens(folder: Path, data: Path) -> list[str]:
    copy = Path(shutil.copytree(data, folder / "copy"))
    (copy / "tokens-00000.bin").write_bytes(b"12")
    return ["data", "show", str(copy)]


def _flipped_tokens(folder: Path, data: Path) -> list[str]:
    copy = Path(shutil.copytree(data, folder / "copy"))
    content = bytearray((copy / "tokens-00000.bin").read_bytes())
    content[11] ^= 4
    (copy / "tokens-00000.bin").write_bytes(content)
    return ["data", "check", str(copy)]


def _changed_manifest(folder: Path, data: Path) -> list[str]:
    copy = Path(shutil.copytree(data, folder / "copy"))
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["vocab_size"] += 1
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return ["data", "show", str(copy)]


def _escaping_manifest(folder: Path, data: Path) -> list[str]:
    copy = Path(shutil.copytree(data, folder / "copy"))
    text = (copy / "manifest.json").read_text().replace("tokens-00000.bin", "../../../etc/passwd")
    (copy / "manifest.json").write_text(text)
    return ["data", "check", str(copy)]


def _wrong_tokenizer(folder: Path, data: Path) -> list[str]:
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "Nothing"}}')
    (folder / "a.txt").write_text("some text")
    return [
        "prepare",
        str(folder / "a.txt"),
        "--out",
        str(folder / "out"),
        "--tokenizer",
        str(folder / "tokenizer.json"),
    ]


INPUTS: dict[str, Callable[[Path, Path], list[str]]] = {
    "YAML that does not end": _broken_yaml,
    "a key twice": _twice,
    "a Python object in YAML": _python_tag,
    "deep nesting": _deep,
    "YAML bomb": _bomb,
    "binary as YAML": _binary,
    "no config file": lambda folder, data: ["train", str(folder / "absent.yaml")],
    "a folder as config": lambda folder, data: ["train", str(folder)],
    "two config files": lambda folder, data: ["train", "a.yaml", "b.yaml"],
    "no sources": lambda folder, data: ["prepare", str(folder / "absent"), "--out", str(folder / "out")],
    "an empty glob": lambda folder, data: ["prepare", str(folder / "*.txt"), "--out", str(folder / "out")],
    "no such package": lambda folder, data: ["prepare", "package:no_such_package/x", "--out", str(folder / "out")],
    "a vocabulary of nothing": lambda folder, data: [
        "prepare",
        str(data),
        "--out",
        str(folder / "out"),
        "--vocab-size",
        "3",
    ],
    "all held out": lambda folder, data: ["prepare", __file__, "--out", str(folder / "out"), "--held-out", "1.5"],
    "a broken tokenizer": _wrong_tokenizer,
    "no data set": lambda folder, data: ["data", "show", str(folder)],
    "truncated tokens": _truncated_tokens,
    "flipped tokens": _flipped_tokens,
    "changed manifest": _changed_manifest,
    "manifest that leaves its folder": _escaping_manifest,
    "no run to evaluate": lambda folder, data: ["eval", str(folder / "run")],
    "no run to sample from": lambda folder, data: ["generate", str(folder), "--prompt", "x"],
    "no run to export": lambda folder, data: ["export", str(folder), str(folder / "out")],
    "no run to replay": lambda folder, data: ["replay", str(folder), "--step", "3"],
    "no run whose data was seen": lambda folder, data: ["data", "seen", str(folder)],
    "steps backwards": lambda folder, data: ["data", "seen", str(folder), "--steps", "9:3"],
    "hardware of nothing": lambda folder, data: [
        "plan",
        "model.preset=llama-1m",
        "--dry-run",
        "--world-size",
        "3",
        "--rank",
        "7",
    ],
}


@pytest.mark.parametrize("name", INPUTS)
def test_a_bad_input_is_told_with_rule_and_remedy(
    name: str, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code = main(INPUTS[name](tmp_path, data))
    said = capfd.readouterr().err
    assert code == 2, said
    assert "error: " in said
    assert "\n  rule: " in said
    assert "\n  remedy: " in said
    assert "Traceback" not in said
    assert not Path("/tmp/owned").exists()
