"""The planner: a strategy's memory and speed, reckoned without running it.

`hardware` (what a device and its links can do, with sources) · `workload` (model, strategy) -> `step_time`, `memory`
-> `published` (the measured runs of others that it is held against), `search` -> `explain`, `show` (what to take and why).
`from_config` alone knows the config and our models; the others import no torch.
"""

from trainwright.planner.published import predict

__all__ = ["predict"]
