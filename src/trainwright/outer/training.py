"""Outer steps in the training loop: sent and applied at fixed inner steps, so that every group acts alike.

The loop calls `join` before its first step (meet the other groups, or catch up with them), `on_step_end` after each
step and `on_last_step` at the end; everything else happens on the link's own thread.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainwright import distributed, exchange
from trainwright.callbacks import Callback
from trainwright.config import Config
from trainwright.engine import Engine
from trainwright.ledger import here
from trainwright.optim.outer import encode_with_feedback
from trainwright.outer.addresses import own_address
from trainwright.outer.catch_up import Missed
from trainwright.outer.diary import Diary, as_text
from trainwright.outer.fragments import Fragment, fragments_of, weights_crc
from trainwright.outer.header import SETTINGS, Header
from trainwright.outer.link import Meeting, Offer, Outcome, OuterLink, Place
from trainwright.outer.schedule import Schedule
from trainwright.outer.state import Landed, OuterState
from trainwright.train import TrainingLoop

if TYPE_CHECKING:
    from trainwright.monitor.metrics import StepRecord

_LOOK_AGAIN_S = 0.5


class OuterTraining(Callback):
    """The outer steps of one rank."""

    name = "outer"

    def __init__(self, config: Config, engine: Engine, steps: int | None, run_dir: Path) -> None:
        """Collective over the group. Raises LaunchError where there is no lighthouse."""
        assert config.outer.group is not None, "a launch of one group knows its number"
        self._settings, self._engine, self._steps = config.outer, engine, steps
        self._group: int = config.outer.group
        mesh = engine.parts.mesh.parameter_mesh
        axis = (mesh.mesh_dim_names or ()).index("replicate")
        self._copies = mesh.get_group("replicate")
        fragments = fragments_of(
            engine.parts.update.optimizer.parameters,
            config.outer.fragments,
            slices=mesh.size(axis),
            index=int(mesh.get_local_rank("replicate")),
        )
        self._state = OuterState(config.outer, fragments, self._whole)
        self._schedule = Schedule(config.outer.every, config.outer.fragments, config.outer.steps_late)
        self._layout = 0
        for fragment in fragments:
            self._layout = fragment.fingerprint(self._layout)
        chosen = {key: getattr(config.outer, key) for key in (*SETTINGS, "groups")} | {"steps": steps}
        self._agreed = zlib.crc32(repr(sorted(chosen.items())).encode())
        self._diary = Diary(run_dir if distributed.is_main() else None)
        self._future: Future[Outcome | Meeting] | None = None
        self._landed: Landed | None = None
        self._behind: Outcome | None = None
        self._finished = False
        self._ended_after: int | None = None
        self._sent_after = 0
        self._store, address = _own_store(own_address(config.outer))
        place = Place(self._group, dist.get_rank(), dist.get_world_size())
        sizes = [fragment.slice_size for fragment in fragments]
        self._link = OuterLink(config.outer, place, address, sizes, lambda: self._state.snapshot(self._landed))
        distributed.at_shutdown(self.close)

    # --- before the first step -------------------------------------------------------------------------------------

    def join(self, loop: TrainingLoop) -> int:
        """Meets the other groups. The last inner step that this group's records hold for: where it had to catch up, that
        of its last outer step that the others saw. Collective."""
        self._diary.line("start", group=self._group, step=loop.engine.global_step, rounds=self._link.rounds)
        self._say(loop, f"group {self._group} of {self._settings.groups}: waiting for the others")
        until_s = time.monotonic() + self._settings.start_wait
        while True:
            found = self._wait(self._link.submit(Offer(self._header())))
            if isinstance(found, Outcome) or found.download is not None:
                return self._catch_up(loop, found)
            if distributed.from_main(len(found.groups) == self._settings.groups or time.monotonic() > until_s):
                self._say(loop, f"groups {', '.join(map(str, found.groups))} begin")
                return loop.engine.global_step
            time.sleep(_LOOK_AGAIN_S)

    # --- the loop's points -----------------------------------------------------------------------------------------

    def on_step_end(self, loop: TrainingLoop, record: StepRecord) -> None:
        """Applies what is due and sends what is due."""
        if self._under_way and record.step >= self._schedule.applied_after(self._sent_after):
            self._apply(loop)
            if loop.engine.global_step != record.step:  # it was behind, and has caught up
                return
        fragment = self._schedule.fragment_sent_after(record.step)
        if fragment is not None:
            self._send(fragment, record.step, loop.loader.position)
            if self._schedule.delay == 0:
                self._apply(loop)

    def on_last_step(self, loop: TrainingLoop) -> None:
        """What is under way is applied, and every fragment averaged once more: all groups end with the same weights.
        Nothing where that was done before: the same command again, after the end."""
        step = loop.engine.global_step
        if self._ended_after == step:
            return
        if self._under_way:
            self._apply(loop)
        self._ended_after = step
        if self._sent_after == step and self._schedule.fragments == 1 and self._schedule.delay == 0:
            return
        for fragment in range(self._schedule.fragments):
            if not self._finished:  # it has heard the others' last ones out
                self._send(fragment, step, loop.loader.position)
                self._apply(loop, keep_own_steps=False)

    def on_end(self, loop: TrainingLoop, status: str) -> None:
        """Leaves."""
        self.close()

    def close(self) -> None:
        """Leaves; twice is fine."""
        link, self._link = getattr(self, "_link", None), None  # type: ignore[assignment]
        if link is not None:
            link.close()

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def tensors(self) -> Mapping[str, Tensor]:
        """Waits for what is under way, without applying it: a checkpoint changes nothing."""
        self._land()
        return self._state.tensors(self._landed)

    def state(self) -> dict[str, Any]:
        """Beside `tensors`."""
        self._land()
        rounds = 0 if self._behind is not None else self._link.rounds  # 0: to catch up after a resume
        return {
            "rounds": rounds,
            "sent_after": self._sent_after,
            "ended_after": self._ended_after,
            **self._state.scalars(self._landed),
        }

    def on_resume(self, loop: TrainingLoop, path: Path, state: dict[str, Any]) -> None:
        """From a checkpoint; the weights alone where it is of a run without outer steps."""
        self._state = OuterState(self._settings, self._state.fragments, self._whole)
        if state:
            self._landed = self._state.load(path, state)
            self._link.rounds, self._sent_after = int(state["rounds"]), int(state["sent_after"])
            self._ended_after = state.get("ended_after")

    # --- an outer step ---------------------------------------------------------------------------------------------

    @property
    def _under_way(self) -> bool:
        return self._future is not None or self._landed is not None or self._behind is not None

    def _send(self, fragment: int, step: int, position: int) -> None:
        gradient = self._state.outer_gradient(fragment)
        payload = encode_with_feedback(gradient, self._state.residual[fragment], self._settings.dtype)
        self._future = self._link.submit(Offer(self._header(fragment, step, position), payload))
        self._sent_after = step

    def _header(self, fragment: int = -1, step: int = -1, position: int = -1) -> Header:
        takes_part = fragment >= 0
        weights = -1
        if takes_part:
            weights = weights_crc(self._state.fragments[fragment].own_slice(self._state.weights[fragment]))
        size = dist.get_world_size()
        return Header(self._group, takes_part, fragment, step, position, weights, size, self._layout, self._agreed)

    def _wait(self, future: Future[Outcome | Meeting]) -> Outcome | Meeting:
        with here.call("outer step"):
            return future.result()

    def _land(self) -> None:
        """Waits for the step that is under way, if there is one."""
        if self._future is None:
            return
        start_s = time.monotonic()
        found = self._wait(self._future)
        self._future = None
        assert isinstance(found, Outcome), "a group that takes part is never at a meeting"
        if found.download is not None:
            self._behind = found
            return
        fragment = self._state.fragments[found.fragment]
        self._landed = Landed(found.fragment, found.step, self._whole(fragment, found.mean))
        self._state.cursors |= found.cursors
        self._diary.line(
            "step",
            round=self._link.rounds,
            fragment=found.fragment,
            step=found.step,
            cursors=as_text(found.cursors),
            sent_bytes=found.sent_bytes,
            time_s=round(found.time_s, 4),
            waited_s=round(time.monotonic() - start_s, 4),
        )

    def _apply(self, loop: TrainingLoop, keep_own_steps: bool = True) -> None:
        self._land()
        if self._behind is not None:
            self._catch_up(loop, self._behind)
            return
        assert self._landed is not None, "nothing is under way"
        self._state.apply(self._landed, keep_own_steps)
        self._landed = None
        self._engine.parts.update.optimizer.weights_loaded()

    # --- catching up -----------------------------------------------------------------------------------------------

    def _catch_up(self, loop: TrainingLoop, found: Outcome | Meeting) -> int:
        """Takes the others' weights and makes up the outer steps that were made in the meantime, without holding them up:
        this group listens to each. The last inner step of its own that has gone into them. Collective."""
        self._say(loop, f"group {self._group} catches up from another group")
        start_s = time.monotonic()
        missed = Missed(self._steps)
        while not missed.add(found):
            if missed.failed:  # the group that it came from is gone: ask the others, from the beginning
                self._link.rounds = 0
            if isinstance(found, Meeting):
                time.sleep(_LOOK_AGAIN_S)
            found = self._wait(self._link.submit(Offer(self._header())))
        if self._landed is not None:  # resumed with it; the others have applied it. A snapshot replaces both
            self._state.step(self._landed.fragment, self._landed.mean)
        missed.make_up(self._state)
        self._state.write_all()
        self._landed = self._future = self._behind = None
        self._engine.parts.update.optimizer.weights_loaded()
        own_step, position = self._state.cursors.get(self._group, (0, 0))
        reached = max((step for step, _ in self._state.cursors.values()), default=0)
        self._sent_after = reached
        step = reached + self._schedule.delay
        if self._steps is not None and step >= self._steps:
            step, self._finished = self._steps, reached >= self._steps
        self._engine.resume_at(step, self._engine.tokens_seen, self._engine.nominal_tokens)
        loop.loader.set_position(position)
        took_s = time.monotonic() - start_s
        self._diary.line("catch_up", step=step, after=own_step, position=position, time_s=round(took_s, 3))
        self._say(loop, f"group {self._group} has caught up: step {step}, from sample {position:,} on ({took_s:.1f} s)")
        return own_step

    # --- small things ----------------------------------------------------------------------------------------------

    def _whole(self, fragment: Fragment, own_slice: Tensor) -> Tensor:
        """The flat vector that the ranks with the same shards hold slices of. Collective where there are several."""
        if fragment.slices == 1:
            return own_slice.clone()
        flat = torch.empty(fragment.size, dtype=own_slice.dtype)
        here.collective(b"all_gather(outer step)")
        exchange.all_gather(flat, own_slice.contiguous(), self._copies)
        return flat

    def _say(self, loop: TrainingLoop, text: str) -> None:
        loop.console.say(text)


def _own_store(address: str) -> tuple[Any, tuple[str, int]]:
    """The store through which process groups of the link are formed, on rank 0, where other groups reach it."""
    store = None
    if distributed.is_main():
        store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    port: int = distributed.from_main(store.port if store is not None else 0)
    host: str = distributed.from_main(address)
    return store, (host, port)
