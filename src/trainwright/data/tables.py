"""Records of parquet files and Hugging Face data sets (extra `hf`), row by row."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from trainwright import storage
from trainwright.data.sources import SourceFile
from trainwright.errors import DataError

__all__ = ["huggingface_records", "parquet_records"]

_ROWS_AT_ONCE = 64


class _State(Protocol):
    text_key: str
    read_bytes: int

    def count(self, problem: str, name: str, number: int = 1) -> None: ...


def _missing(package: str) -> DataError:
    return DataError(
        f"the package {package} is not installed",
        "parquet files and Hugging Face data sets need the extra `hf`",
        "pip install 'trainwright[hf]'",
    )


def parquet_records(file: SourceFile, state: _State) -> Iterator[dict[str, Any]]:
    """Rows of a parquet file as {column: str or None}, reading one row group at a time."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise _missing("pyarrow") from None
    from trainwright.data.readers import decode

    try:
        with storage.open_read(file.path) as stream, pyarrow.parquet.ParquetFile(stream) as table:
            names = _columns(table.schema_arrow.names, file.name, state.text_key)
            rows = max(1, table.metadata.num_rows)
            for batch in table.iter_batches(batch_size=_ROWS_AT_ONCE, columns=names, use_threads=False):
                state.read_bytes += file.size_bytes * batch.num_rows // rows
                columns = [_bytes_column(pyarrow, batch.column(name)) for name in names]
                for values in zip(*columns, strict=True):
                    yield {
                        name: decode(value, file.name, state)[0] if isinstance(value, bytes) else value  # type: ignore[arg-type]
                        for name, value in zip(names, values, strict=True)
                    }
    except pyarrow.ArrowException as error:
        raise DataError(
            f"{file.name} is not a whole parquet file: {str(error).splitlines()[0]}",
            "a .parquet source is a parquet file",
            "fetch or write the file again",
        ) from error


def _bytes_column(pyarrow: Any, column: Any) -> list[Any]:
    # Strings as bytes: pyarrow would raise at the first broken character of a column; we replace and count it.
    if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
        column = column.cast(pyarrow.large_binary())
    return list(column.to_pylist())


def _columns(names: list[str], source: str, text_key: str) -> list[str]:
    if "prompt" in names and "completion" in names:
        return ["prompt", "completion"]
    if text_key in names:
        return [text_key]
    raise DataError(
        f"{source} has the columns {', '.join(names) or '(none)'}",
        f"a table has a column {text_key!r}, or `prompt` and `completion`",
        f"name the text column: --text-key {names[0] if names else 'text'}",
    )


def huggingface_records(file: SourceFile, state: _State) -> Iterator[dict[str, Any]]:
    """Rows of a Hugging Face data set: streamed by name, or memory-mapped from a folder of `save_to_disk`."""
    dataset, name = _open_huggingface(file), file.name
    columns = dataset.column_names
    if columns is not None:
        dataset = dataset.select_columns(_columns(list(columns), name, state.text_key))
    for row in dataset:
        yield dict(row)


def _open_huggingface(file: SourceFile) -> Any:
    try:
        import datasets
    except ImportError:
        raise _missing("datasets") from None
    name, _, split = file.path.partition(":")
    if Path(file.path).is_dir():
        name, split = file.path, ""
    try:
        if (Path(name) / "state.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
            found = datasets.load_from_disk(name)
            if not isinstance(found, datasets.DatasetDict):
                return found
            split = split or "train"
            if split in found:
                return found[split]
            raise DataError(
                f"{file.name} has the splits {', '.join(found)}",
                "one split is prepared at a time",
                f"hf:{name}:{next(iter(found), 'train')}",
            )
        name, _, config = name.partition("@")
        return datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{file.name}: {error}",
            "hf:NAME[@CONFIG][:SPLIT] names a data set of the hub or a folder written by save_to_disk",
            "check the name, the split and the network",
        ) from error
