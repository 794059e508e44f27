"""Which number format each thing has: parameters, compute, reduction, moments."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trainwright.config.schema import PrecisionConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Policy:
    """`master`: sharded parameters and moments; `compute`: forward and backward; `reduce`: sums over ranks."""

    master: torch.dtype
    compute: torch.dtype
    reduce: torch.dtype

    def table(
        self,
        keep_fp32: tuple[str, ...] = (),
        moments: str | None = None,
        float8: str = "none",
        masters_on_disk: bool = False,
    ) -> list[tuple[str, str]]:
        """(what, format) rows that are printed at the start of a run. moments: where they are not the masters'.
        masters_on_disk: with moments, in fp32; `master` is then what memory holds."""
        rows = [
            ("master weights", "fp32, on the disk" if masters_on_disk else NAMES[self.master]),
            ("optimizer moments", "fp32, on the disk" if masters_on_disk else moments or NAMES[self.master]),
            ("forward and backward", NAMES[self.compute]),
            ("gradient reduction", NAMES[self.reduce]),
            ("accumulated gradients", NAMES[self.master]),
            ("loss", NAMES[torch.float64 if self.compute == torch.float64 else torch.float32]),
        ]
        if float8 != "none":
            rows.append((f"products of the blocks' linear layers ({float8})", "float8"))
        if keep_fp32:
            rows.append((f"modules {', '.join(keep_fp32)}", "fp32"))
        return rows


def build_policy(config: PrecisionConfig, masters_on_disk: bool = False) -> Policy:
    """The policy of a config: fp32 masters, moments and reduction unless the run is float64 throughout.

    masters_on_disk: the model's own parameters are then narrow.
    """
    compute = DTYPES[config.dtype]
    wide = torch.float64 if compute == torch.float64 else torch.float32
    master = wide if config.master == "fp32" and not masters_on_disk else torch.bfloat16
    return Policy(master, compute, DTYPES[config.reduce_dtype] if config.reduce_dtype else wide)
