"""sources.py, tables.py and tokenize.py: what can be read, and with which tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data_helpers import documents_of, make_text, quick_prepare, stream, write_jsonl, write_texts

from trainwright.data import load_tokenizer
from trainwright.data.sources import resolve_sources
from trainwright.data.tokenize import END_OF_TEXT, train_byte_level_bpe
from trainwright.errors import DataError


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("sources") / "texts", 6)


@pytest.fixture(scope="module")
def trained(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quick_prepare(texts, tmp_path_factory.mktemp("trained") / "tokens").path


def names(*specs: str) -> list[str]:
    return [file.name for file in resolve_sources(specs)]


def test_folders_globs_and_files_in_a_fixed_order(tmp_path: Path) -> None:
    for name in (
        "b/two.md",
        "b/deep/one.md",
        "a.txt",
        "b/two.py",
        ".git/x.md",
        "b/__pycache__/y.md",
        "z.png",
        "[x].md",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text", "utf-8")
    root = str(tmp_path)
    assert names(root) == ["[x].md", "a.txt", "b/deep/one.md", "b/two.md", "b/two.py"]
    assert names(f"{root}/**/*.md") == ["[x].md", "b/deep/one.md", "b/two.md"]
    assert names(f"{root}/b/*.md", f"{root}/a.txt", f"{root}/b/two.md") == ["two.md", "a.txt"]
    assert names(f"{root}/[x].md") == ["[x].md"]
    with pytest.raises(DataError, match=r"did you mean .*a\.txt"):
        names(f"{root}/aa.txt")
    with pytest.raises(DataError, match="holds no file"):
        names(f"{root}/**/*.rst")
    with pytest.raises(DataError, match="no source"):
        names()


def test_packages_are_found_and_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "tw_test_package"
    (package / "plays").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')", "utf-8")
    (package / "plays" / "one.md").write_text("one", "utf-8")
    (package / "plays" / "two.txt").write_text("two", "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert names("package:tw_test_package") == ["__init__.py", "plays/one.md", "plays/two.txt"]
    assert names("package:tw_test_package/plays") == ["one.md", "two.txt"]
    assert names("package:tw_test_package/**/*.md") == ["plays/one.md"]
    with pytest.raises(DataError, match="pip install tw_no_such"):
        names("package:tw_no_such/plays")
    with pytest.raises(DataError, match="has no 'songs'"):
        names("package:tw_test_package/songs")
    for bad in ("package:tw_test_package/../../etc", "package:", "package:a.b"):
        with pytest.raises(DataError):
            names(bad)


def test_jsonl_parquet_and_hugging_face_tables_are_the_same_text(tmp_path: Path, texts: Path, trained: Path) -> None:
    datasets = pytest.importorskip("datasets")
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows: list[dict[str, Any]] = [{"text": make_text(n), "id": n} for n in range(6)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=2)
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(rows), "test": datasets.Dataset.from_list(rows[:1])}
    ).save_to_disk(str(tmp_path / "splits"))
    expected = stream(trained)
    for number, source in enumerate(
        ("rows.jsonl", "rows.parquet", "saved", "hf:{}/saved", "hf:{}/splits:train", "splits", str(texts))
    ):
        spec = source.format(tmp_path) if source.startswith("hf:") else str(tmp_path / source)
        result = quick_prepare(spec, tmp_path / f"out-{number}", tokenizer=str(trained))
        assert stream(result.path) == expected, source
    with pytest.raises(DataError, match=r"splits train, test"):
        quick_prepare(f"hf:{tmp_path}/splits:validation", tmp_path / "x1")
    with pytest.raises(DataError, match="--text-key text"):
        quick_prepare(tmp_path / "rows.parquet", tmp_path / "x2", text_key="body")


def test_broken_tables_are_named_or_survived(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    broken = pyarrow.array([b"fine", b"caf\xe9", None]).cast(pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": broken}), tmp_path / "a.parquet")
    result = quick_prepare(tmp_path / "a.parquet", tmp_path / "tokens", held_out=0.0)
    assert documents_of(result.path) == ["fine", "caf\ufffd"]
    assert result.manifest.problems == {"broken_utf8": 1, "bad_records": 1}
    (tmp_path / "b.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(DataError, match=r"b\.parquet is not a whole parquet file"):
        quick_prepare(tmp_path / "b.parquet", tmp_path / "x")
    (tmp_path / "c.txt.gz").write_bytes(b"not gzip")
    with pytest.raises(DataError, match=r"c\.txt\.gz cannot be read"):
        quick_prepare(tmp_path / "c.txt.gz", tmp_path / "y")


def test_a_bpe_encodes_anything_and_gives_it_back() -> None:
    tokenizer = train_byte_level_bpe([make_text(n) for n in range(5)], 400)
    for text in ("", " ", "\n\n  x", "the question", "\u0000☃ 你好 🎉", make_text(3), "<|endoftext|>"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.eos_id not in tokenizer.encode(text)
    batch = tokenizer.encode_batch(["to be", "", "or not"])
    assert [ids.tolist() for ids in batch] == [tokenizer.encode(text) for text in ("to be", "", "or not")]
    for size in (256, 0, -1, 1 << 25):
        with pytest.raises(DataError, match="257"):
            train_byte_level_bpe(["x"], size)


def test_existing_tokenizers_in_every_form(tmp_path: Path, trained: Path) -> None:
    own = load_tokenizer(trained)
    text = make_text(77)
    own.tokenizer.enable_truncation(4)  # as fine-tuned models' files often have it
    own.tokenizer.enable_padding(length=500)
    own.tokenizer.save(str(tmp_path / "tokenizer.json"))
    own.tokenizer.no_truncation()
    own.tokenizer.no_padding()
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert load_tokenizer(path).encode(text) == own.encode(text)
    gpt2 = tmp_path / "gpt2"
    gpt2.mkdir()
    model = json.loads(own.to_json())["model"]
    (gpt2 / "vocab.json").write_text(json.dumps(model["vocab"]), "utf-8")
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    (gpt2 / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", "utf-8")
    for path in (gpt2, gpt2 / "vocab.json", gpt2 / "merges.txt"):
        loaded = load_tokenizer(path)
        assert loaded.encode(text) == own.encode(text)
        assert (loaded.eos_token, loaded.eos_id) == (END_OF_TEXT, own.eos_id)


def test_the_separator_is_the_tokenizers_own(tmp_path: Path, trained: Path) -> None:
    tokenizer = load_tokenizer(trained)
    tokenizer.tokenizer.add_special_tokens(["<stop>", "</s>"])
    (tmp_path / "tokenizer.json").write_bytes(tokenizer.to_json())
    assert load_tokenizer(tmp_path).eos_token == END_OF_TEXT
    assert load_tokenizer(tmp_path, "<stop>").eos_token == "<stop>"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}), "utf-8")
    assert load_tokenizer(tmp_path).eos_token == "</s>"
    with pytest.raises(DataError, match="--eos-token"):
        load_tokenizer(tmp_path, "<none>")


def test_tokenizers_that_are_none_say_so(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    with pytest.raises(DataError, match="no tokenizer at"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}", "utf-8")
    with pytest.raises(DataError, match="cannot be read"):
        load_tokenizer(tmp_path)
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="no end-of-text token"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_sentencepiece_models_give_sentencepieces_tokens(tmp_path: Path, kind: str) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    text = "\n".join(make_text(n) for n in range(40))
    (tmp_path / "text.txt").write_text(text, "utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=330,
        model_type=kind,
        byte_fallback=kind == "bpe",
        minloglevel=2,
        num_threads=1,
        hard_vocab_limit=False,
    )
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    ours = load_tokenizer(tmp_path)
    assert (ours.eos_token, ours.eos_id) == ("</s>", theirs.eos_id())
    for line in [*text.splitlines()[:60], "  two  spaces ", "outrageous slings", "" if kind == "bpe" else "to be"]:
        assert ours.encode(line) == theirs.encode(line), line
        if theirs.unk_id() not in theirs.encode(line):  # which has no text of its own
            assert ours.decode(ours.encode(line)) == theirs.decode(theirs.encode(line))
    assert not any((ids == ours.eos_id).any() for ids in ours.encode_batch(["forged </s> end", "</s>"]))
    result = quick_prepare(tmp_path / "text.txt", tmp_path / "tokens", tokenizer=str(tmp_path / "tokenizer.model"))
    assert stream(result.path).count(ours.eos_id) == 1


def test_a_url_is_a_source(texts: Path, tmp_path: Path) -> None:
    import fsspec

    with fsspec.open("memory://sources/one.txt", "wb") as file:
        file.write((texts / "text-000.txt").read_bytes())
    result = quick_prepare("memory://sources/one.txt", tmp_path / "tokens")
    assert documents_of(result.path) == [make_text(0)]
