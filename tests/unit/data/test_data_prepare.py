"""preparation.py: text in, a versioned data set out; killed, resumed, fed with broken text."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import documents_of, make_text, quick_prepare, stream, write_jsonl, write_texts

from trainwright.data import PrepareSettings, TokenDataset, check, describe, prepare
from trainwright.data import readers as readers_module
from trainwright.data.readers import Cursor, ReadState, Resume, iterate_pieces
from trainwright.data.sampling import held_out_documents
from trainwright.data.sources import resolve_sources
from trainwright.errors import DataError


def test_what_goes_in_can_be_read_back(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts", 40)
    (texts / "z.txt").write_bytes("naïve ☃ 你好\r\n\ttabs\n".encode())
    result = quick_prepare(texts, tmp_path / "tokens", shard_tokens=1000, vocab_size=400)
    expected = [(texts / name).read_bytes().decode() for name in sorted(os.listdir(texts))]
    assert documents_of(tmp_path / "tokens") == expected
    dataset = TokenDataset.open(tmp_path / "tokens")
    train, held_out = dataset.split("train"), dataset.split("held_out")
    assert (train.num_documents, held_out.num_documents) == (39, 2)
    assert train.num_bytes == sum(len(text.encode()) for text in expected[:39])
    assert held_out.num_bytes == sum(len(text.encode()) for text in expected[39:])
    assert train.num_counted == train.num_tokens
    assert held_out.read(0, 1)[2].tolist() == [39]
    assert result.version == check(tmp_path / "tokens").version == dataset.version
    assert dataset.vocab_size <= 400
    assert describe(tmp_path / "tokens")["splits"]["train"]["documents"] == 39
    assert {path.name for path in (tmp_path / "tokens").iterdir()} == {
        "manifest.json",
        *(entry.file for entry in dataset.manifest.files()),
    }


def test_the_version_is_that_of_the_content(tmp_path: Path) -> None:
    one = quick_prepare(write_texts(tmp_path / "a", 20), tmp_path / "one")
    two = quick_prepare(write_texts(tmp_path / "elsewhere" / "b", 20), tmp_path / "two")
    assert one.version == two.version
    (tmp_path / "a" / "text-003.txt").write_text("changed", "utf-8")
    assert quick_prepare(tmp_path / "a", tmp_path / "three").version != one.version
    assert quick_prepare(tmp_path / "elsewhere" / "b", tmp_path / "four", held_out=0.2).version != one.version


def test_the_tokenizer_is_not_trained_on_held_out_text(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts", 19)
    (texts / "z.txt").write_text("xylophone " * 400, "utf-8")
    quick_prepare(texts, tmp_path / "tokens", vocab_size=2000)
    assert "xylophone" not in str(TokenDataset.open(tmp_path / "tokens").load_tokenizer().tokenizer.get_vocab())
    quick_prepare(texts, tmp_path / "all", vocab_size=2000, held_out=0.0)
    assert "xylophone" in str(TokenDataset.open(tmp_path / "all").load_tokenizer().tokenizer.get_vocab())


def test_a_sample_bounds_what_the_tokenizer_is_trained_on(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts", 30)
    small = quick_prepare(texts, tmp_path / "small", vocab_size=5000, sample_bytes=1500)
    whole = quick_prepare(texts, tmp_path / "whole", vocab_size=5000)
    assert small.manifest.vocab_size < whole.manifest.vocab_size < 5000
    assert any("of the 5,000 asked for" in note for note in small.notes)
    assert documents_of(tmp_path / "small") == documents_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("documents", "share", "held_out"),
    [(38, 0.05, 2), (1, 0.05, 0), (2, 0.05, 1), (100, 0, 0), (3, 0.99, 2), (1000, 0.05, 50)],
)
def test_how_many_documents_are_held_out(documents: int, share: float, held_out: int) -> None:
    assert held_out_documents(documents, share) == held_out


# A prepare that kills itself at the n-th shard: before the shard is in the journal, or right behind.
KILLED = """
import os, signal, sys
from pathlib import Path
from data_helpers import quick_prepare
from trainwright.data.writer import Journal
real, left = Journal.append, [int(sys.argv[3])]
def append(self, shard, progress):
    left[0] -= 1
    if left[0] == 0 and sys.argv[4] == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    real(self, shard, progress)
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
Journal.append = append
quick_prepare(Path(sys.argv[1]), Path(sys.argv[2]), shard_tokens=2000)
"""


def run_killed(source: Path, out: Path, shards: int, when: str) -> None:
    arguments = [sys.executable, "-c", KILLED, str(source), str(out), str(shards), when]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_killed_twice_and_resumed_it_is_the_same_data_set(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts", 12, words=400)
    (texts / "b-long.txt").write_text(make_text(99, words=9000), "utf-8")  # spans shards
    (texts / "c-empty.txt").write_text("", "utf-8")
    (texts / "d-broken.txt").write_bytes(b"bro\xffken " * 300)
    write_jsonl(texts / "e.jsonl", [{"text": make_text(n)} for n in range(20)] + [{"no": 1}])
    whole = quick_prepare(texts, tmp_path / "whole", shard_tokens=2000)
    assert len(whole.manifest.shards) > 8
    out = tmp_path / "tokens"
    run_killed(texts, out, 2, "after")
    with pytest.raises(DataError, match="unfinished"):
        TokenDataset.open(out)
    run_killed(texts, out, 3, "before")
    (out / "tokens-00099.bin.part").write_bytes(b"left over")
    result = quick_prepare(texts, out, shard_tokens=2000)
    assert result.resumed_tokens == sum(shard.num_tokens for shard in whole.manifest.shards[:4])
    assert result.version == whole.version
    assert result.manifest.problems == whole.manifest.problems == {"broken_utf8": 300, "empty": 1, "bad_records": 1}
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in (tmp_path / "whole").iterdir())


def interrupted(texts: Path, out: Path, monkeypatch: pytest.MonkeyPatch, shards: int = 3) -> None:
    """A prepare that was interrupted behind `shards` shards, in this process."""
    from trainwright.data.writer import Journal

    real, left = Journal.append, [shards]

    def append(self: Journal, *arguments: Any) -> None:
        real(self, *arguments)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", append)
        with pytest.raises(KeyboardInterrupt):
            quick_prepare(texts, out, shard_tokens=500)


def test_a_damaged_shard_is_made_again_on_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, out = write_texts(tmp_path / "texts", 20), tmp_path / "tokens"
    whole = quick_prepare(texts, tmp_path / "whole", shard_tokens=500)
    interrupted(texts, out, monkeypatch)
    with open(out / "tokens-00001.bin", "r+b") as file:
        file.write(b"\xff\xff")
    with open(out / "journal.jsonl", "ab") as file:
        file.write(b'{"shard": {"tok')  # the line that the kill cut off
    result = quick_prepare(texts, out, shard_tokens=500)
    assert result.resumed_tokens == whole.manifest.shards[0].num_tokens
    assert result.version == whole.version


def test_other_settings_or_sources_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, out = write_texts(tmp_path / "texts", 20), tmp_path / "tokens"
    interrupted(texts, out, monkeypatch)
    with pytest.raises(DataError, match="vocab_size: 300 there, 310 here"):
        quick_prepare(texts, out, shard_tokens=500, vocab_size=310)
    (texts / "more.txt").write_text("more", "utf-8")
    with pytest.raises(DataError, match="source_files: 20 there, 21 here"):
        quick_prepare(texts, out, shard_tokens=500)
    (texts / "more.txt").unlink()
    finished = quick_prepare(texts, out, shard_tokens=500)
    again = quick_prepare(texts, out, shard_tokens=500)
    assert again.version == finished.version
    assert again.notes == ["prepared already: nothing to do"]
    with pytest.raises(DataError, match=r"a finished data set.*vocab_size"):
        quick_prepare(texts, out, shard_tokens=500, vocab_size=310)
    settings = PrepareSettings(vocab_size=310, shard_tokens=700)
    assert prepare(str(texts), out, settings, progress=False, overwrite=True).version != finished.version
    check(out)


def test_a_folder_of_other_things_or_in_use_is_left_alone(tmp_path: Path) -> None:
    import fcntl

    texts = write_texts(tmp_path / "texts", 2)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.doc").write_text("precious", "utf-8")
    with pytest.raises(DataError, match=r"thesis\.doc"):
        quick_prepare(texts, tmp_path / "mine")
    (tmp_path / "killed").mkdir()
    for name in ("tokenizer.json", ".tokenizer.json.0a1b.tmp", ".journal.jsonl.0a1b.tmp"):
        (tmp_path / "killed" / name).write_text("{}", "utf-8")
    assert "manifest.json" in os.listdir(quick_prepare(texts, tmp_path / "killed").path)
    assert not list((tmp_path / "killed").glob(".*"))
    (tmp_path / "busy").mkdir()
    descriptor = os.open(tmp_path / "busy", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(DataError, match="another process"):
        quick_prepare(texts, tmp_path / "busy")
    os.close(descriptor)
    (tmp_path / "a file").write_text("", "utf-8")
    with pytest.raises(DataError, match="cannot be written"):
        quick_prepare(texts, tmp_path / "a file")


def test_broken_texts_are_counted_named_and_survived(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts", 3)
    (texts / "broken.txt").write_bytes(b"caf\xe9 and \xff\xfe more")
    (texts / "cut.txt").write_bytes("the end is cut: é".encode()[:-1])
    (texts / "empty.txt").write_bytes(b"")
    (texts / "blank.txt").write_bytes(b" \n\n\t")
    (texts / "image.txt").write_bytes(b"\x89PNG\0\0\0")
    (texts / "bom.txt").write_bytes(b"\xef\xbb\xbfwith a mark")
    records = ['{"text": "good"}', "{broken", '{"text": 5}', "[1]", '{"text": ""}', '{"text": "half \\ud800 pair"}', ""]
    (texts / "records.jsonl").write_text("\n".join(records), "utf-8")
    (texts / "packed.txt.gz").write_bytes(gzip.compress(b"packed text"))
    (texts / "photo.jpg").write_bytes(b"not even looked at")
    (texts / ".hidden").write_text("hidden", "utf-8")
    result = quick_prepare(texts, tmp_path / "tokens", held_out=0.0)
    assert result.manifest.problems == {"broken_utf8": 5, "empty": 3, "binary": 1, "bad_records": 3}
    assert any("image.txt" in note for note in result.notes)
    assert documents_of(tmp_path / "tokens")[:5] == [
        "with a mark",
        "caf\ufffd and \ufffd\ufffd more",
        "the end is cut: \ufffd",
        "packed text",
        "good",
    ]


def test_no_text_at_all_is_an_error_that_says_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    with pytest.raises(DataError, match="holds no file"):
        quick_prepare(tmp_path / "texts", tmp_path / "tokens")
    (tmp_path / "texts" / "a.txt").write_text("", "utf-8")
    for tokenizer in (None, "trained"):
        settings: dict[str, Any] = {}
        if tokenizer:
            other = quick_prepare(write_texts(tmp_path / "other", 2), tmp_path / "other-tokens")
            settings = {"tokenizer": str(other.path)}
        with pytest.raises(DataError, match="1 documents without text"):
            quick_prepare(tmp_path / "texts", tmp_path / "tokens", **settings)
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"body": "x"}])
    with pytest.raises(DataError, match="--text-key"):
        quick_prepare(bad, tmp_path / "bad")
    assert quick_prepare(bad, tmp_path / "good", text_key="body").manifest.splits.train.num_documents == 1


def test_a_document_larger_than_what_is_read_at_once_gives_the_same_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut anywhere a pre-tokenizer would cut, pieces have the tokens of the whole; the document stays one."""
    text = make_text(5, 3000) + "x" * 900 + " end. … é\n\n\n  indented" * 40
    (tmp_path / "one.txt").write_text(text, "utf-8")
    whole = quick_prepare(tmp_path / "one.txt", tmp_path / "whole", vocab_size=400)
    settings = {"tokenizer": str(whole.path), "shard_tokens": 300}
    monkeypatch.setattr(readers_module, "PIECE_CHARACTERS", 50)
    monkeypatch.setattr(readers_module, "_CHUNK_BYTES", 33)
    quick_prepare(tmp_path / "one.txt", tmp_path / "cut", **settings)
    dataset = TokenDataset.open(tmp_path / "cut")
    assert len(dataset.manifest.shards) > 3
    assert dataset.split("train").num_documents == 1
    assert documents_of(tmp_path / "cut") == [text]
    expected = stream(tmp_path / "whole")
    found = stream(tmp_path / "cut")
    # Only inside the run of 900 letters, which has no boundary, may tokens differ.
    start = next(i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b)
    assert "xxx" in dataset.load_tokenizer().decode(expected[start - 3 : start + 3])
    assert expected[-100:] == found[-100:]


def test_an_oversized_record_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers_module, "MAX_RECORD_BYTES", 100)
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "x" * 5000}, {"text": "two"}])
    result = quick_prepare(source, tmp_path / "tokens", held_out=0.0)
    assert documents_of(tmp_path / "tokens") == ["one", "two"]
    assert result.manifest.problems == {"oversized": 1}


def test_a_resumed_reader_goes_on_behind_any_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers_module, "PIECE_CHARACTERS", 200)
    texts = write_texts(tmp_path / "texts", 3)
    (texts / "broken.txt").write_bytes(b"a \xff b " * 200)
    write_jsonl(texts / "r.jsonl", [{"prompt": "p" * 300, "completion": "c"}, {}, {"text": make_text(1)}])
    files = resolve_sources([str(texts)])
    state = ReadState()
    pieces = list(iterate_pieces(files, state))
    assert len(pieces) > 20
    for place, piece in enumerate(pieces):
        again = ReadState()
        assert list(iterate_pieces(files, again, Resume(piece.cursor, piece.problems))) == pieces[place + 1 :]
        assert again.problems == state.problems
    with pytest.raises(DataError, match="not what it was"):
        list(iterate_pieces(files, ReadState(), Resume(Cursor(1, 0, 99), {})))


def test_text_cannot_forge_a_separator(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one <|endoftext|> two", "utf-8")
    quick_prepare(tmp_path / "a.txt", tmp_path / "tokens")
    assert documents_of(tmp_path / "tokens") == ["one <|endoftext|> two"]


def test_big_vocabularies_take_four_bytes_a_token(tmp_path: Path) -> None:
    from trainwright.data import load_tokenizer

    texts = write_texts(tmp_path / "texts", 3)
    base = quick_prepare(texts, tmp_path / "small")
    tokenizer = load_tokenizer(base.path)
    tokenizer.tokenizer.add_tokens([f"<extra{n}>" for n in range(66_000)])
    (tmp_path / "big.json").write_bytes(tokenizer.to_json())
    big = quick_prepare(texts, tmp_path / "big", tokenizer=str(tmp_path / "big.json"))
    assert (base.manifest.dtype, big.manifest.dtype) == ("uint16", "uint32")
    assert stream(base.path) == stream(big.path)
    assert np.fromfile(big.path / "tokens-00000.bin", dtype="<u4").tolist() == stream(big.path)


def test_contradicting_settings_are_refused() -> None:
    with pytest.raises(DataError, match="leave out --vocab-size"):
        PrepareSettings(tokenizer="x", vocab_size=5)
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(DataError, match="held_out"):
            PrepareSettings(held_out=share)
    with pytest.raises(DataError):
        PrepareSettings(shard_tokens=0)


def test_no_progress_is_silent_and_lines_are_plain(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    texts = write_texts(tmp_path / "texts", 3)
    quick_prepare(texts, tmp_path / "a")
    assert capfd.readouterr() == ("", "")
    prepare(str(texts), tmp_path / "b", PrepareSettings(vocab_size=300))
    out, err = capfd.readouterr()
    assert out == ""
    assert "training a byte-level BPE of 300 entries" in err
    assert json.loads((tmp_path / "b" / "manifest.json").read_text("utf-8"))["format_version"] == 1
