"""How the command line prints facts."""

from __future__ import annotations

import json
from typing import Any


def print_facts(facts: dict[str, Any], as_json: bool) -> None:
    """One fact a line, or JSON."""
    if as_json:
        print(json.dumps(facts))
        return
    for key, value in facts.items():
        print(
            f"{key.replace('_', ' '):>14}  {value:.4f}"
            if isinstance(value, float)
            else f"{key.replace('_', ' '):>14}  {value}"
        )


def print_data(facts: dict[str, Any]) -> None:
    """A token data set, as `data.describe` gives it."""
    print(
        f"{facts['path']}: version {facts['version'][:12]}, vocabulary {facts['vocab_size']:,}, {facts['shards']} shard(s)"
    )
    for name, split in facts["splits"].items():
        density = f", {split['bytes_per_token']} bytes a token" if split["bytes_per_token"] else ""
        print(
            f"  {name:<9} {split['documents']:>9,} documents {split['tokens']:>14,} tokens {split['text_bytes']:>14,} bytes{density}"
        )
    for problem, count in facts["problems"].items():
        print(f"  note: {problem}: {count}")
