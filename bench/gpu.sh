#!/usr/bin/env bash
# Builds the extension, checks the kernels on a GPU, times them and whole training steps, and writes one JSON; a short
# table comes last. One GPU, under ten minutes, no network. On a machine without a GPU, --dry-run goes through all of it
# on the CPU, at sizes that say nothing.
#   bench/gpu.sh [--dry-run] [--out FILE]
# Environment: PYTHON (default: .venv's, else python3), MAX_JOBS.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

dry="" out=""
while (($#)); do
  case $1 in
    --dry-run) dry=--dry-run ;;
    --out) out=$2 && shift ;;
    *) echo "bench/gpu.sh: unknown argument $1; known: --dry-run, --out FILE" >&2 && exit 2 ;;
  esac
  shift
done

python=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || command -v python3)}
export PYTHONPATH="$PWD:$PWD/python:$PWD/bench/gpu:$PWD/tests/kernels${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
parts=$(mktemp -d)
trap 'rm -rf "$parts"' EXIT
out=${out:-$([[ -n $dry ]] && echo "$parts/dry-run.json" || echo bench/results/gpu.json)}
say() { printf '==> %s (%d s)\n' "$*" "$SECONDS" >&2; }

if [[ -z $dry ]]; then
  "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    { echo "bench/gpu.sh: torch finds no GPU; --dry-run goes through the motions without one" >&2 && exit 1; }
fi
if [[ -z $dry || ! $(compgen -G "safe_kernels/_C*.so") ]]; then
  say "building the extension"
  MAX_JOBS=${MAX_JOBS:-$(getconf _NPROCESSORS_ONLN)} "$python" setup.py build_ext --inplace >"$parts/build.log" 2>&1 ||
    { tail -n 20 "$parts/build.log" >&2 && exit 1; }
fi

say "checking results"
"$python" bench/gpu/check.py $dry --out "$parts/check.json"
sanitizer=$(command -v compute-sanitizer || true)
if [[ -z $dry && -n $sanitizer ]]; then
  for tool in memcheck racecheck; do
    say "compute-sanitizer $tool"
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 150 "$sanitizer" --tool "$tool" --error-exitcode 9 \
      "$python" bench/gpu/check.py --small --out "$parts/sanitized.json" >"$parts/$tool.log" 2>&1 &&
      echo "$tool: clean" >>"$parts/sanitizer.txt" ||
      { echo "$tool: exit status $?" >>"$parts/sanitizer.txt" && tail -n 5 "$parts/$tool.log" >&2; }
  done
else
  echo "not run" >"$parts/sanitizer.txt"
fi

say "timing kernels"
"$python" bench/gpu/kernels.py $dry --out "$parts/kernels.json"
say "timing training steps"
"$python" bench/gpu/steps.py $dry --out "$parts/steps.json"
if ((SECONDS < 420)); then
  say "checking results and timing kernels, with tiles by measurement"
  timeout 60 "$python" bench/gpu/check.py $dry --small --autotune --out "$parts/check-tuned.json" || say "wrong, or slow"
  timeout 120 "$python" bench/gpu/kernels.py $dry --autotune --out "$parts/tuned.json" || say "no time for it"
fi
"$python" bench/gpu/summary.py $dry --parts "$parts" --out "$out"
say "done"
