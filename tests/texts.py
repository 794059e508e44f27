"""Text to prepare small data sets from: words that a tokenizer can learn, another row in each file."""

from __future__ import annotations


def words(index: int, count: int) -> str:
    """`count` words of file `index`."""
    return " ".join(f"word{(i * i + 3 * index) % 89}" for i in range(count))
