#!/usr/bin/env bash
# The Python standard library's own sources, from files to a small model that writes Python. Echoes the commands it runs;
# about four minutes on two cores. What follows on the line goes to `trainwright train`:
#   bash examples/code.sh duration=10m model.preset=llama-10m
set -euo pipefail
cd "$(dirname "$0")/.."
DATA=${DATA:-data/stdlib}
RUN=${RUN:-runs/code}
VOCAB=${VOCAB:-4096}
STDLIB=$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
# By name: a glob over the whole library would take the test suite and site-packages with it.
PACKAGES=${PACKAGES:-asyncio collections concurrent ctypes email html http importlib json logging multiprocessing re sqlite3 unittest urllib xml}
MODULES=${MODULES:-$STDLIB/*.py}

run() {
    printf '\n\033[1m$%s\033[0m\n' "$(printf ' %q' "$@")"
    "$@"
}

sources=("$MODULES")
for package in $PACKAGES; do sources+=("package:$package/**/*.py"); done
run trainwright prepare "${sources[@]}" --out "$DATA" --vocab-size "$VOCAB" --held-out 0.05

# The same script again goes on from the run's newest checkpoint; another run_dir starts anew.
run trainwright train model.preset=llama-5m data.path="$DATA" data.sequence_length=256 batch.global_size=8 batch.micro_size=4 \
    duration=2m precision=bf16 zero=2 optimizer.name=muon optimizer.lr=0.01 optimizer.adamw_lr=0.01 \
    lr_schedule.name=linear lr_schedule.warmup_steps=20 gradient_clipping=1.0 evaluate.batches=0 run_dir="$RUN" "$@" --nproc 2

run trainwright generate "$RUN" --prompt $'def read(self, size):\n    """' --max-tokens 80
