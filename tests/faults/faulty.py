"""Jobs that go wrong: `python -m faulty FAULT NPROC LOG_DIR` launches one, as a user's training script would be."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from trainwright.launch.run import launch_local

CONFIG: dict[str, Any] = {"optimizer": {"lr": 1e-2}, "guard": {"disagree": 2.0}}


def _engine(stage: int = 2, **config: Any) -> Any:
    import torch

    import trainwright as tw
    from small import transformer

    torch.set_num_threads(1)
    return tw.initialize(model=transformer, config=CONFIG | {"zero": stage} | config)


def _step(engine: Any, number: int = 0) -> None:
    from small import batches, mean_loss

    tokens, labels = batches(1, rows=2, seed=number)[0]
    engine.backward(mean_loss(engine(tokens, labels=labels)))
    engine.step()


def save_on_rank_0(rank: int, folder: str) -> None:
    """Case 6."""
    engine = _engine()
    for number in range(4):
        _step(engine, number)
        if number == 2 and rank == 0:
            engine.save(f"{folder}/checkpoint")


def evaluate_on_rank_1(rank: int, folder: str) -> None:
    from small import batches

    engine = _engine()
    for number in range(4):
        _step(engine, number)
        if number == 2 and rank == 1:
            engine.evaluate([{"input_ids": batches(1, rows=2)[0][0], "labels": batches(1, rows=2)[0][1]}])


def fewer_batches(rank: int, folder: str) -> None:
    """Case 7: three batches on rank 0, two on the others."""
    engine = _engine()
    for number in range(3 if rank == 0 else 2):
        _step(engine, number)


def module_twice(rank: int, folder: str) -> None:
    """Case 5: rank 1 runs a block twice, at ZeRO stage 3."""
    import torch
    from torch import nn

    import trainwright as tw
    from small import Awkward

    class Branching(Awkward):
        def forward(self, input_ids: Any, labels: Any = None, skip: bool = False) -> Any:
            x = self.embedding(input_ids)
            for block in self.blocks:
                x = block(x)
                if rank == 1 and self.steps >= 2:
                    x = block(x)
            self.steps += 1
            return {"loss": nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())}

    torch.set_num_threads(1)
    model = Branching()
    model.steps = 0
    engine = tw.initialize(model=model, config=CONFIG | {"zero": 3})
    for number in range(4):
        _step(engine, number)


def other_config(rank: int, folder: str) -> None:
    """Rank 1 is configured for another number of micro-batches."""
    _engine(batch={"accumulation": 2 if rank == 0 else 3})


def other_branch(rank: int, folder: str) -> None:
    """A divergent graph that waits for nobody: rank 1 runs two blocks of one shape in the other order, at ZeRO stage 3."""
    import torch
    from torch import nn

    import trainwright as tw
    from small import Awkward

    class Swapping(Awkward):
        def forward(self, input_ids: Any, labels: Any = None, skip: bool = False) -> Any:
            x = self.embedding(input_ids)
            self.steps += 1
            for block in reversed(self.blocks) if rank == 1 and self.steps > 2 else self.blocks:
                x = block(x)
            return {"loss": nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())}

    torch.set_num_threads(1)
    model = Swapping(blocks=2)
    model.steps = 0
    engine = tw.initialize(model=model, config=CONFIG | {"zero": 3})
    for number in range(6):
        _step(engine, number)


def many_micro_batches(rank: int, folder: str) -> None:
    """Rank 1 runs one micro-batch more than a step has."""
    from small import batches, mean_loss

    engine = _engine(batch={"accumulation": 2})
    for _ in range(3):
        for number in range(2 + rank):
            tokens, labels = batches(1, rows=2, seed=number)[0]
            engine.backward(mean_loss(engine(tokens, labels=labels)))
        engine.step()


def busy_outside(rank: int, folder: str) -> None:
    """Rank 1 never comes back from something of its own."""
    engine = _engine(guard={"disagree": 1.0, "wait": 3.0, "first_wait": 9.0})
    for number in range(4):
        _step(engine, number)
        if number == 2 and rank == 1:
            write_a_thesis()


def write_a_thesis() -> None:
    time.sleep(600)


def killed(rank: int, folder: str) -> None:
    """Case 15: kill -9 in a forward."""
    engine = _engine(stage=3)
    for number in range(9):
        if number == 6 and rank == 1:
            engine.module.blocks[1].register_forward_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        _step(engine, number)


def raises(rank: int, folder: str) -> None:
    engine = _engine()
    for number in range(4):
        _step(engine, number)
        if number == 2 and rank == 1:
            raise RuntimeError("the embedding is on fire")


def slow_but_healthy(rank: int, folder: str) -> None:
    """Rank 1 takes long, wherever nobody waits for ever: nothing may be ended."""
    import torch

    import trainwright as tw
    from small import transformer

    def slowly(action: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            if rank == 1:
                time.sleep(2.5)
            return action(*args, **kwargs)

        return run

    torch.set_num_threads(1)
    optimizer = slowly(lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    engine = tw.initialize(model=transformer, config={"zero": 2, "guard": {"disagree": 1.0}}, optimizer=optimizer)
    teacher = tw.initialize(model=transformer, config={"zero": 2, "guard": {"disagree": 1.0}})
    for number in range(3):
        _step(engine, number)
        with torch.no_grad():
            teacher(torch.zeros(1, 4, dtype=torch.long))
    engine.optimizer.step = slowly(engine.optimizer.step)
    _step(engine)
    engine.save(f"{folder}/checkpoint")
    if rank == 1:
        time.sleep(2.5)
    _step(engine)
    if rank == 0:
        time.sleep(2.5)


def stopped_process(rank: int, folder: str) -> None:
    """Rank 1's process answers no more (SIGSTOP: as a machine that hangs)."""
    engine = _engine(guard={"disagree": 1.0, "wait": 3.0, "first_wait": 9.0})
    for number in range(4):
        _step(engine, number)
        if number == 2 and rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)


def segfault(rank: int, folder: str) -> None:
    engine = _engine()
    for number in range(4):
        _step(engine, number)
        if number == 2 and rank == 1:
            os.kill(os.getpid(), signal.SIGSEGV)


def main(arguments: list[str]) -> int:
    """One rank."""
    from trainwright import distributed

    fault, folder = arguments
    globals()[fault](int(os.environ["RANK"]), folder)
    distributed.shutdown()
    return 0


if __name__ == "__main__":
    fault, nproc, folder = sys.argv[1:]
    sys.exit(launch_local([fault, folder], int(nproc), f"{folder}/logs", entry="faulty:main"))
