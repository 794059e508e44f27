"""A folder of safetensors files as Hugging Face writes it: one file, or several with an index. Reads slices."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from trainwright.errors import ModelError

_INDEX = "model.safetensors.index.json"
_CHUNK_BYTES = 16 << 20


class SafetensorsFolder:
    """The tensors of a folder, by name.

    Errors: ModelError when there is no safetensors file, or only files that would have to be unpickled.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._files = self._find_files()
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._paths: dict[str, Path] = {}
        for path in self._files:
            with _open(path) as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    self._shapes[name] = tuple(file.get_slice(name).get_shape())
                    self._paths[name] = path

    @property
    def names(self) -> Iterable[str]:
        return self._paths.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read_into(self, name: str, box: tuple[slice, ...], out: Tensor) -> None:
        """Copies the part `box` of a tensor into `out`, converting dtype and device, a few rows at a time."""
        # Opened anew: pages of the mapping that were read count as this process's memory until it is closed.
        with _open(self._paths[name]) as file:
            if not box:
                out.copy_(file.get_tensor(name))
                return
            part = file.get_slice(name)
            row_bytes = max(1, out[0].numel() * out.element_size())
            step = max(1, _CHUNK_BYTES // row_bytes)
            for start in range(box[0].start, box[0].stop, step):
                stop = min(start + step, box[0].stop)
                out[start - box[0].start : stop - box[0].start].copy_(part[(slice(start, stop), *box[1:])])

    def _find_files(self) -> list[Path]:
        index = self.folder / _INDEX
        if index.is_file():
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = [self.folder / name for name in sorted(set(weight_map.values()))]
        else:
            files = sorted(self.folder.glob("*.safetensors"))
        absent = [path.name for path in files if not path.is_file()]
        if absent:
            raise ModelError(
                f"{self.folder} lacks {', '.join(absent[:3])}, named by {_INDEX}",
                "every file of the index is there",
                "fetch the folder again",
            )
        if files:
            return files
        pickled = sorted(path.name for path in [*self.folder.glob("*.bin"), *self.folder.glob("*.pt")])
        raise ModelError(
            f"{self.folder} has {', '.join(pickled[:3])}, no safetensors file"
            if pickled
            else f"{self.folder} has no safetensors file",
            "weights are read from safetensors; nothing is unpickled",
            "convert them where you trust them: AutoModel.from_pretrained(folder).save_pretrained(other_folder)",
        )


def _open(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path} cannot be read ({error})", "a whole safetensors file", "fetch or write it again"
        ) from error


def write_safetensors_folder(
    tensors: Iterable[tuple[str, Tensor]], folder: Path, max_shard_bytes: int = 5 * 10**9
) -> list[str]:
    """Writes tensors, taken one at a time, as Hugging Face's files (`model.safetensors`, or shards and an index).

    At most one shard of `max_shard_bytes` is held in memory. Returns the names of the files.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, int]] = []
    for number, shard in enumerate(_shards(tensors, max_shard_bytes)):
        save_file(shard, folder / f"part-{number}.safetensors.tmp", metadata={"format": "pt"})
        shards.append({name: tensor.numel() * tensor.element_size() for name, tensor in shard.items()})
    count = len(shards)
    names = (
        ["model.safetensors"] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    )
    for number, name in enumerate(names):
        (folder / f"part-{number}.safetensors.tmp").replace(folder / name)
    if count > 1:
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        total = sum(sum(shard.values()) for shard in shards)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return names


def _shards(tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        tensor_bytes = tensor.numel() * tensor.element_size()
        if shard and size + tensor_bytes > max_shard_bytes:
            yield shard
            shard, size = {}, 0
        assert tensor.device.type == "cpu", f"{name} is on {tensor.device}"
        shard[name] = tensor.detach().contiguous()
        size += tensor_bytes
    yield shard
