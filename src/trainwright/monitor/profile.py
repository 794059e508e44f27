"""`profile.steps`: a trace of some steps, where their time went, and where memory was at its peak, by module.

Written to run_dir/profile/: trace-rankR.json.gz (chrome://tracing, ui.perfetto.dev), and rank 0's profile.json, which the
report shows. Tracing slows its steps down a little, on CPUs with small operators more.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainwright.config.run_schema import ProfileConfig
from trainwright.monitor.breakdown import Breakdown, Event, break_down
from trainwright.monitor.profile_file import FOLDER, write_profile
from trainwright.phases import STEP, phase

_OPERATORS = 12
_PLACES = 6
_RANKS_WITH_TRACES = 8


class StepProfiler:
    """Traces the steps that the config asks for. One a run and rank."""

    def __init__(
        self,
        settings: ProfileConfig,
        run_dir: Path,
        rank: int,
        units: Sequence[tuple[str, nn.Module]],
        device: torch.device,
    ) -> None:
        self._settings, self._folder, self._rank, self._device = settings, run_dir / FOLDER, rank, device
        self._memory = MemoryPlaces(units, device)
        self._seen = 0
        self._profile: torch.profiler.profile | None = None
        self.result: Breakdown | None = None
        """Once the last traced step is done."""
        self.places: list[tuple[str, int]] = []
        """(where, bytes), the largest first."""

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around a step, its wait for data included."""
        number, first = self._seen, self._settings.after
        self._seen += 1
        if not self._settings.steps or not first <= number < first + self._settings.steps:
            yield
            return
        if number == first:
            self._start()
        with phase(STEP):
            yield
        if number == first + self._settings.steps - 1:
            self._stop()

    def finish(self) -> str | None:
        """After the last step: ends a trace that is still open; what there is to say of one that fell short."""
        asked = self._settings.steps
        if not asked or (self.result is not None and self._profile is None):
            return None
        if self._profile is None:
            after = self._settings.after
            return f"profile.steps={asked}: no step traced, the launch ended before step {after + 1} (profile.after={after})"
        self._stop()
        assert self.result is not None, "a trace has ended"
        return f"{self.result.steps} of profile.steps={asked} steps traced: the launch ended"

    def _start(self) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's tracer tells its own stages otherwise
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            torch.cuda.synchronize(self._device)
        self._profile = torch.profiler.profile(activities=activities)
        self._memory.start()
        self._profile.__enter__()

    def _stop(self) -> None:
        assert self._profile is not None, "a trace was begun"
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._profile.__exit__(None, None, None)
        self._memory.stop()
        self.places = self._memory.largest(_PLACES)
        self.result = break_down(_events(self._profile), _operators(self._profile))
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._rank < _RANKS_WITH_TRACES:
            self._profile.export_chrome_trace(str(self._folder / f"trace-rank{self._rank}.json.gz"))
        if self._rank == 0:
            memory = [{"where": where, "bytes": held} for where, held in self.places]
            told = {**self.result.as_dict(), "memory": memory, "device": self._device.type}
            write_profile(self._folder, told)
        self._profile = None


def _events(profile: torch.profiler.profile) -> list[Event]:
    return [
        Event(e.name, e.time_range.start, e.time_range.end, e.device_type.name.lower()) for e in profile.events() or ()
    ]


def _operators(profile: torch.profiler.profile) -> list[tuple[str, float, int]]:
    rows = []
    for found in profile.key_averages():
        own = getattr(found, "self_device_time_total", 0.0) or found.self_cpu_time_total
        if not found.key.startswith("trainwright."):
            rows.append((str(found.key), float(own), int(found.count)))
    return sorted(rows, key=lambda row: -row[1])[:_OPERATORS]


class MemoryPlaces:
    """Memory at the borders of the model's units: the allocator's peak since the border before on CUDA, else the resident
    memory of the process there."""

    def __init__(self, units: Sequence[tuple[str, nn.Module]], device: torch.device) -> None:
        self._units, self._device = units, device
        self._handles: list[Any] = []
        self._places: dict[str, int] = {}
        self._now = "before the first unit"

    def start(self) -> None:
        """Puts hooks on the units."""
        for name, unit in self._units:
            self._handles.append(
                unit.register_forward_pre_hook(lambda *_, name=name: self._enter(f"forward of {name}"))
            )
            self._handles.append(
                unit.register_forward_hook(lambda module, inputs, output, name=name: self._leave(output, name))
            )
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def stop(self) -> None:
        """Takes them off."""
        self._enter("after the step")
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def largest(self, count: int) -> list[tuple[str, int]]:
        """(where, bytes), the largest first."""
        return sorted(self._places.items(), key=lambda place: -place[1])[:count]

    def _enter(self, place: str) -> None:
        self._places[self._now] = max(self._places.get(self._now, 0), self._bytes())
        self._now = place

    def _leave(self, output: Any, name: str) -> None:
        self._enter(f"after forward of {name}")
        tensor = (
            output if isinstance(output, Tensor) else next((o for o in _items(output) if isinstance(o, Tensor)), None)
        )
        if tensor is not None and tensor.requires_grad:
            tensor.register_hook(lambda _: self._enter(f"backward of {name}"))

    def _bytes(self) -> int:
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            return int(peak)
        try:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
        except (OSError, IndexError, ValueError):
            return 0
        import resource

        return pages * resource.getpagesize()


def _items(output: Any) -> Sequence[Any]:
    if isinstance(output, dict):
        return list(output.values())
    return output if isinstance(output, tuple | list) else ()
