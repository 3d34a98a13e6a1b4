#!/usr/bin/env bash
# Builds the extension, runs the tests in tests/gpu on a GPU, and times the kernels and whole training steps. It needs
# one GPU, no network, and at most BUDGET seconds. The most important parts run first. Each part may use the time that is
# left. The results are written to one JSON after every case. If a part fails, the others still run. At the end, the
# script prints a short table; the exit status is 1 if any part failed.
# On a machine without a GPU, --dry-run runs all parts on the CPU, at sizes whose times mean nothing.
#   bench/gpu.sh [--dry-run] [--out FILE]
# Environment: BUDGET (default 580), PYTHON (default: .venv's, else python3), MAX_JOBS, SKIP_BUILD=1 (the extension
# is built already), ONLY="memcheck racecheck" (only these parts; their results are added to an earlier file).
set -uo pipefail
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
budget=${BUDGET:-580}
export PYTHONPATH="$PWD:$PWD/python:$PWD/tests/support${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
if [[ -z $dry ]]; then
  "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    { echo "bench/gpu.sh: torch finds no GPU; pass --dry-run to run all parts on the CPU" >&2 && exit 1; }
fi

scratch=$(mktemp -d) child="" failed=0
export SAFE_KERNELS_CACHE="$scratch/tuning"
out=${out:-$([[ -n $dry ]] && echo "$scratch/dry-run.json" || echo bench/results/gpu.json)}
say() { printf '==> %s (%d s)\n' "$*" "$SECONDS" >&2; }
note() { "$python" -m bench.gpu.results "$out" "$@"; }
module() { part "$2" "$3" "$python" -m "bench.gpu.$1" $dry --out "$out" --part "$2" "${@:4}"; }
checks=("$python" -m pytest --quiet -p no:cacheprovider -p bench.gpu.checks $dry --out "$out")
small=(tests/gpu --ignore tests/gpu/test_large.py) large=(tests/gpu/test_large.py)
[[ -z $dry ]] || { export SAFE_KERNELS_TEST_DEVICE=cpu && large+=(-k 1000x); }

finish() {
  local status=$?
  trap - EXIT TERM INT HUP
  [[ -n $child ]] && kill "$child" 2>/dev/null && wait "$child"
  "$python" -m bench.gpu.summary "$out"
  rm -rf "$scratch"
  say "done"
  exit $((status ? status : failed))
}
trap finish EXIT
trap 'exit 143' TERM INT HUP

# part NAME SECONDS COMMAND...: run a command for at most so many of the seconds that are left
part() {
  local name=$1 limit=$2 start=$SECONDS left=$((budget - SECONDS - 10)) code=0 status=ok
  shift 2
  [[ " ${ONLY:-$name} " == *" $name "* ]] || return 0
  ((left < limit)) && limit=$left
  ((limit < 15)) && note "$name" "status=${GOES_ON:-not run}: no time left" && return
  say "$name, at most $limit s"
  note "$name" status=running
  # In the background: bash handles signals while it waits, but not while a command runs in the foreground.
  DEADLINE=$(($(date +%s) + limit - 5)) timeout -k 5 "$limit" "$@" &
  child=$!
  wait "$child" || code=$?
  child=""
  if ((code == 75)); then # after a fault the process has lost the GPU; a new process continues
    GOES_ON="stopped by a fault" part "$name" $((limit - (SECONDS - start))) "$@"
    return
  fi
  case $code in
    0) ;;
    124 | 137) status="stopped after $limit s" ;;
    *) status="failed with exit status $code" failed=1 ;;
  esac
  note "$name" "status=$status" "seconds=$((SECONDS - start))"
}

sanitizer() {
  local tool=$1 found
  found=$(PATH="$PATH:/usr/local/cuda/bin" command -v compute-sanitizer)
  [[ -n $dry || -z $found ]] && note "$tool" "status=not run: no compute-sanitizer, or a dry run" && return
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 part "$tool" 120 "$found" --tool "$tool" --error-exitcode 9 \
    "${checks[@]}" --part "$tool" "${small[@]}"
}

[[ -n ${ONLY:-} ]] || rm -f "$out"
note run "dry_run=$([[ -n $dry ]] && echo true || echo false)" "budget_s=$budget" || exit 1
if [[ -n ${SKIP_BUILD:-} || (-n $dry && -n $(compgen -G "safe_kernels/_C*.so")) ]]; then
  note build "status=not run: it was there"
else
  MAX_JOBS=${MAX_JOBS:-$(getconf _NPROCESSORS_ONLN)} part build 300 "$python" setup.py --quiet build_ext --inplace
fi
module warm warm 90
part check 90 "${checks[@]}" --part check "${small[@]}"
module ops ops 150
module steps steps 210
part check_large 40 "${checks[@]}" --part check_large "${large[@]}"
part check_tuned 40 "${checks[@]}" --part check_tuned "${small[@]}" --autotune
module ops ops_tuned 60 --autotune
sanitizer memcheck
sanitizer racecheck
