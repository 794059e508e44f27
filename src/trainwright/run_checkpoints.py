"""The checkpoints of a run: when one is written, how (in the background or not), where, which are kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from trainwright import distributed
from trainwright.checkpoint.agreement import Ranks
from trainwright.checkpoint.async_save import AsyncSaver
from trainwright.checkpoint.fetch import fetch
from trainwright.checkpoint.folder import look
from trainwright.checkpoint.resume import Remote, ResumePoint, resolve
from trainwright.checkpoint.retention import CheckpointFolder
from trainwright.checkpoint.save import OnCommit, Writer, save, write_planned
from trainwright.checkpoint.store import BEST, CheckpointStore
from trainwright.checkpoint.to_store import StoreWriter, clean_staging
from trainwright.config.run_schema import CheckpointConfig
from trainwright.engine import Engine
from trainwright.errors import CheckpointError
from trainwright.guard.shared_folder import Sites
from trainwright.ledger import here
from trainwright.snapshot import content_of


class RunCheckpoints:
    """Saves of one run. Every method is collective.

    sites: which ranks share `run_dir`. tell: says something that does not stop the run, on every rank.
    """

    def __init__(
        self,
        run_dir: Path,
        config: CheckpointConfig,
        sites: Sites | None = None,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.folder = CheckpointFolder(run_dir / "checkpoints", config.keep, config.keep_every)
        self._resume = config.resume
        self._tell = tell
        self._remote: Remote | None = None
        self._to_store: StoreWriter | None = None
        if config.store is not None:
            sites = sites or Sites.alone()
            store = CheckpointStore(config.store, config.keep, config.keep_every)
            self._remote = Remote(store, sites)
            self._to_store = StoreWriter(store, sites.shared)
        self._writer: Writer = self._to_store or write_planned
        self._saver = AsyncSaver(writer=self._writer) if config.asynchronous else None
        self._last_step: int | None = None
        self._told = ""

    def resume_point(self) -> ResumePoint | None:
        """Where `checkpoint.resume` says to go on from; None for a fresh start."""
        with here.call("load"):
            if self._remote is not None and not self._remote.sites.shared:
                clean_staging(self.folder.folder)
            return resolve(self.folder, self._resume, remote=self._remote)

    def resumed_at(self, step: int) -> None:
        """A resume has just loaded this step's checkpoint."""
        self._last_step = step
        if self._to_store is not None:
            self._to_store.resumed_from(self.folder.path_of(step), Ranks())

    def protect(self, names: frozenset[str]) -> None:
        """Has checkpoints of these names stay whatever `keep` says."""
        self.folder.protected = names
        if self._remote is not None:
            self._remote.store.protected = names

    def save(
        self,
        engine: Engine,
        state: Callable[[], dict[str, Any]],
        tensors: Callable[[], Mapping[str, Tensor]] = dict,
        best: bool = False,
    ) -> Path | None:
        """Writes the checkpoint of this step, with the loop's `state` and `tensors`; None where this step has one already."""
        path = self.folder.path_of(engine.global_step)
        if engine.global_step == self._last_step and not best:
            return None
        self._last_step = engine.global_step
        with here.call("save", engine.global_step):
            content = content_of(engine, state(), tensors())
            if self._saver is not None:
                self._saver.wait()
            if self._to_store is not None:
                self._say_problem()
                self._to_store.as_best = best
            if self._saver is not None:
                self._saver.save(path, content, self._on_commit(best))
            else:
                save(path, content, on_commit=self._on_commit(best), writer=self._writer)
        return path

    def _on_commit(self, best: bool) -> OnCommit | None:
        """What is done in the run's folder after a save; None where that holds no whole checkpoints."""
        if self._to_store is not None and not self._to_store.shared:
            return None

        def commit(path: Path) -> None:
            if best:
                self.folder.keep_as_best(path)
            self.folder.prune()

        return commit

    def _say_problem(self) -> None:
        assert self._to_store is not None, "only a store has such problems"
        missing, problem = self._to_store.missing, self._to_store.problem
        if missing is not None and problem and problem != self._told:
            self._told = problem
            self._tell(f"{missing.name} is whole in {missing.parent}, but not on the store yet: {problem}")

    def wait(self) -> None:
        """Returns when the save in flight is whole, on the store too; raises its error."""
        with here.call("save"):
            if self._saver is not None:
                self._saver.wait()
            if self._to_store is None or self._to_store.missing is None:
                return
            self._say_problem()
            path = self._to_store.missing
            try:
                self._to_store.make_up(Ranks())
            except CheckpointError as error:
                raise CheckpointError(
                    f"{path.name} is whole in {path.parent}, but could not be uploaded: {error.got}",
                    error.rule,
                    "the same command again uploads it, once the store can be reached",
                ) from None

    def close(self) -> None:
        """Ends the background writer."""
        if self._saver is not None:
            self._saver.close()
            self._saver = None


def newest(run_dir: Path, store_url: str | None = None) -> Path | None:
    """The best (if kept) or else the newest whole checkpoint of a run, the same on all ranks.

    store_url: the run's object store, which it is brought from where `run_dir` has none. Collective.
    """
    folder = CheckpointFolder(run_dir / "checkpoints")
    found = None
    if distributed.is_main():
        found = folder.best if folder.best.is_dir() and look(folder.best).whole else folder.newest_whole()
    found = distributed.from_main(found)
    if found is not None or store_url is None:
        return found
    ranks = Ranks()
    store = CheckpointStore(store_url)
    name = ranks.on_first(lambda: _name_on(store))
    if name is None:
        return None
    path = folder.folder / name
    brought = fetch(store, name, path, ranks, Sites.alone(ranks.size))
    if isinstance(brought, str):
        raise CheckpointError(brought, "every object is what its manifest says", "take a step's checkpoint by its path")
    return path


def _name_on(store: CheckpointStore) -> str | None:
    if store.look(BEST).problem is None:
        return BEST
    whole = [stored.name for stored in store.list() if stored.problem is None]
    return whole[-1] if whole else None
