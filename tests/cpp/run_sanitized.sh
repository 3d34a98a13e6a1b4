#!/usr/bin/env bash
# Builds the extension with AddressSanitizer and UBSan in a temporary folder and drives it there.
# Arguments go to each drive_*.py (number of shapes). PYTHON and CXX choose the interpreter and the compiler.
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-python}
compiler=${CXX:-c++}
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT

cd "$repo"
if ! SAFE_KERNELS_SANITIZE=1 "$python" setup.py -q build --build-base "$build" --build-lib "$build/lib" \
  >"$build/log" 2>&1; then
  cat "$build/log" >&2
  echo "run_sanitized.sh: the extension could not be built with sanitizers (see above)." >&2
  exit 1
fi

# The interpreter is not instrumented: the sanitizers' runtime has to come first, and libstdc++ with it, so that
# exceptions thrown by the extension are intercepted. Leaks are looked for by a test on RSS: an interpreter leaks at exit.
drive() { # driver, arguments for it...
  local log=$build/${1##*/}.log code=0
  LD_PRELOAD="$libraries" ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 \
    UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 PYTHONPATH="$build/lib:$repo/tests/support:$repo/tests/triton" \
    "$python" "$@" >"$log" 2>&1 || code=$?
  printf '%s\n%s\n' "${1##*/}" "$(<"$log")" # in one piece: other drivers print too
  return "$code"
}
export -f drive
libraries="$("$compiler" -print-file-name=libasan.so) $("$compiler" -print-file-name=libstdc++.so)"
export build libraries python repo

cd "$build"
# One driver on each core. xargs fails if one of them does, whichever it is.
# shellcheck disable=SC2016  # the inner shell expands its own arguments
printf '%s\0' "$repo"/tests/cpp/drive_*.py |
  xargs -0 -n 1 -P "$(getconf _NPROCESSORS_ONLN)" bash -c 'drive "${!#}" "${@:1:$#-1}"' bash "$@"
