"""`prepare`: sources -> a versioned token data set, in bounded memory, on all cores, resumable after a kill.

Two batches of pieces are always with the tokenizers library, which encodes on all cores without Python's lock, while
this thread reads the next one and writes the last one.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainwright import storage
from trainwright.data.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    FileEntry,
    Manifest,
    Shard,
    Splits,
    cut_splits,
    read_manifest,
    write_manifest,
)
from trainwright.data.progress import ProgressReport
from trainwright.data.readers import Piece, ReadState, iterate_pieces
from trainwright.data.sampling import batches, held_out_documents, sample_texts
from trainwright.data.settings import DEFAULT_VOCAB_SIZE, PrepareSettings, content_settings, identity
from trainwright.data.sources import SourceFile, resolve_sources
from trainwright.data.tokenize import Ids, TextTokenizer, load_tokenizer, train_byte_level_bpe
from trainwright.data.writer import JOURNAL, MOST_FILES, Journal, ShardWriter
from trainwright.errors import DataError

__all__ = ["PrepareResult", "PrepareSettings", "prepare"]

TOKENIZER = "tokenizer.json"
_BATCHES_IN_FLIGHT = 3


@dataclass(frozen=True)
class PrepareResult:
    """What `prepare` made: the folder, its manifest, remarks for people, and whether work was kept or nothing to do."""

    path: Path
    manifest: Manifest
    notes: list[str]
    resumed_tokens: int
    elapsed_s: float

    @property
    def version(self) -> str:
        """The data set's version."""
        return self.manifest.version


def prepare(
    sources: str | Sequence[str],
    out: str | Path,
    settings: PrepareSettings | None = None,
    *,
    progress: bool | None = None,
    overwrite: bool = False,
) -> PrepareResult:
    """Turns text into the token data set `out`. Run again after a kill it goes on; run again when done, it is done.

    `progress`: None shows a bar on a terminal and lines elsewhere, False nothing. `overwrite` replaces a data set of
    other settings. Raises DataError: no text, other settings than those in `out`, a full disk, a folder in use.
    """
    start_s = time.monotonic()
    settings = settings or PrepareSettings()
    specs = [sources] if isinstance(sources, str) else list(sources)
    files = resolve_sources(specs)
    folder = Path(out).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with storage.locked_folder(folder):
            job = _Job(specs, files, folder, settings, progress)
            finished = job.finished(overwrite)
            if finished is not None:
                return PrepareResult(folder, finished, ["prepared already: nothing to do"], 0, 0.0)
            manifest, resumed_tokens = job.run()
            return PrepareResult(folder, manifest, job.notes, resumed_tokens, time.monotonic() - start_s)
    except BlockingIOError:
        raise DataError(
            f"another process is preparing {folder}", "one prepare writes a folder", "wait, or another --out"
        ) from None
    except OSError as error:
        raise DataError(
            f"{folder} cannot be written: {error} ({storage.free_bytes(folder) / 1e9:.1f} GB free)",
            "a token data set takes 2 to 4 bytes a token, about half the size of its text",
            "choose an --out with room and rights to write, then run the same command again: it continues",
        ) from error


class _Job:
    def __init__(
        self, specs: list[str], files: list[SourceFile], folder: Path, settings: PrepareSettings, shown: bool | None
    ) -> None:
        self.specs, self.files, self.folder, self.settings, self.shown = specs, files, folder, settings, shown
        self.journal = Journal(folder)
        self.total_bytes = sum(file.size_bytes for file in files)
        self.existing = load_tokenizer(settings.tokenizer, settings.eos_token) if settings.tokenizer else None
        self.identity = identity(specs, files, settings, self.existing.sha256 if self.existing else None)
        self.notes: list[str] = []

    def finished(self, overwrite: bool) -> Manifest | None:
        """The data set that is there already, if it is this one; clears the folder if it may be overwritten."""
        manifest_path, header = self.folder / MANIFEST, self.journal.read_header()
        if overwrite:
            manifest_path.unlink(missing_ok=True)
            self.journal.path.unlink(missing_ok=True)
            self.journal.remove_strays(set())
        elif manifest_path.exists():
            manifest = read_manifest(self.folder)
            self._same(manifest.provenance.get("identity"), "a finished data set")
            self.journal.path.unlink(missing_ok=True)
            return manifest
        elif header is not None:
            self._same(header.get("identity"), "an unfinished data set")
        elif strangers := [path.name for path in self.folder.iterdir() if not _left_by_a_kill(path.name)]:
            raise DataError(
                f"{self.folder} holds other files ({', '.join(sorted(strangers)[:3])})",
                "a token data set has a folder of its own",
                f"--out {self.folder / 'tokens'}; or --overwrite if they are what is left of a data set",
            )
        return None

    def _same(self, found: Any, what: str) -> None:
        found = found if isinstance(found, dict) else {}
        differing = [key for key, value in self.identity.items() if found.get(key) != value]
        if differing:
            lines = "; ".join(f"{key}: {found.get(key)!r} there, {self.identity[key]!r} here" for key in differing)
            raise DataError(
                f"{self.folder} holds {what} of other settings or sources: {lines}",
                "a prepare goes on with the settings and files that it began with",
                "another --out, or --overwrite to begin again",
            )

    def run(self) -> tuple[Manifest, int]:
        tokenizer = self._tokenizer()
        writer = ShardWriter(self.journal, tokenizer.vocab_size, tokenizer.eos_id, self.settings.shard_tokens)
        resumed_tokens = writer.progress.tokens
        state = ReadState(self.settings.text_key)
        try:
            self._encode(tokenizer, writer, state)
        except BaseException:
            writer.abort()
            raise
        shards = writer.close()
        if not shards:
            raise self._no_text(state)
        splits = self._splits(shards)
        self.notes += state.notes()
        counts = writer.progress.documents_of_files
        files = [[self.files[number].name, count] for number, count in counts] if len(counts) <= MOST_FILES else []
        return self._commit(tokenizer, shards, splits, state, files), resumed_tokens

    def _no_text(self, state: ReadState) -> DataError:
        return DataError(
            f"no text in {', '.join(self.specs)}: " + ("; ".join(state.notes()) or "no document was found"),
            "a data set needs at least one document with text",
            "check the sources; records need a text column (--text-key names it)",
        )

    def _tokenizer(self) -> TextTokenizer:
        """The given tokenizer, the one that the interrupted run trained, or a new one; and the journal's first line."""
        path, header = self.folder / TOKENIZER, self.journal.read_header()
        if header is not None:
            eos_token = str(header.get("eos_token"))
            tokenizer = load_tokenizer(path, eos_token)
            if tokenizer.sha256 == header.get("tokenizer_sha256"):
                return tokenizer
            raise DataError(f"{path} was changed", "a prepare goes on with its tokenizer", "--overwrite")
        tokenizer = self.existing or self._train()
        storage.atomic_write_bytes(path, tokenizer.to_json())
        header = {"identity": self.identity, "tokenizer_sha256": tokenizer.sha256, "eos_token": tokenizer.eos_token}
        self.journal.start(header)
        return tokenizer

    def _train(self) -> TextTokenizer:
        asked = self.settings.vocab_size or DEFAULT_VOCAB_SIZE
        with ProgressReport("sampling", self.total_bytes, self.shown) as report:
            texts, state = sample_texts(
                self.files, self.settings.text_key, self.settings.sample_bytes, self.settings.held_out, report
            )
            report.say(f"training a byte-level BPE of {asked:,} entries on {sum(map(len, texts)) / 1e6:,.1f} MB")
        if not texts:
            raise self._no_text(state)
        tokenizer = train_byte_level_bpe(texts, asked)
        if tokenizer.vocab_size < asked:
            self.notes.append(f"the text gives a vocabulary of {tokenizer.vocab_size:,} of the {asked:,} asked for")
        return tokenizer

    def _encode(self, tokenizer: TextTokenizer, writer: ShardWriter, state: ReadState) -> None:
        after = writer.progress.resume()
        flying: deque[tuple[list[Piece], Future[list[Ids]]]] = deque()

        def write_oldest() -> None:
            batch, future = flying.popleft()
            for piece, ids in zip(batch, future.result(), strict=True):
                writer.add(piece, ids)

        with (
            ThreadPoolExecutor(max_workers=2, thread_name_prefix="tokenize") as pool,
            ProgressReport("tokenizing", self.total_bytes, self.shown) as report,
        ):
            if after is not None:
                report.say(f"going on behind {writer.progress.tokens:,} tokens of {len(writer.shards)} shards")
            for batch in batches(iterate_pieces(self.files, state, after)):
                flying.append((batch, pool.submit(tokenizer.encode_batch, [piece.text for piece in batch])))
                if len(flying) >= _BATCHES_IN_FLIGHT:
                    write_oldest()
                report.update(state.read_bytes)
            while flying:
                write_oldest()

    def _splits(self, shards: list[Shard]) -> Splits:
        total = sum(shard.num_documents for shard in shards)
        held_out = held_out_documents(total, self.settings.held_out)
        if self.settings.held_out and held_out == 0:
            self.notes.append(
                "one document: nothing is held out, so there is nothing to evaluate on (give the text as several "
                "files or records)"
            )
        elif held_out > 2 * self.settings.held_out * total:
            self.notes.append(f"few documents: {held_out} of {total} held out")
        return cut_splits(self.folder, shards, total - held_out)

    def _commit(
        self, tokenizer: TextTokenizer, shards: list[Shard], splits: Splits, state: ReadState, files: list[list[Any]]
    ) -> Manifest:
        import tokenizers

        manifest = Manifest(
            format_version=FORMAT_VERSION,
            version="",
            dtype="uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32",
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            eos_token=tokenizer.eos_token,
            tokenizer=FileEntry.of(self.folder, TOKENIZER),
            settings=content_settings(self.settings),
            problems=state.problems,
            shards=tuple(shards),
            splits=splits,
            provenance={"identity": self.identity, "tokenizers": tokenizers.__version__, "files": files},
        )
        manifest = manifest.model_copy(update={"version": manifest.content_version()})
        write_manifest(self.folder, manifest)
        self.journal.path.unlink(missing_ok=True)
        return manifest


def _left_by_a_kill(name: str) -> bool:
    """What a prepare that was killed before its journal began may have left."""
    temporary = name.endswith(".tmp") and name.startswith((f".{TOKENIZER}.", f".{JOURNAL}."))
    return temporary or name == TOKENIZER
