#!/usr/bin/env bash
# Makes the virtual environment, installs what pyproject.toml asks for and builds the extension. Does nothing when all
# of that is done and nothing it depends on has changed; leaves nothing half-made when it fails.
# Argument: `dev` installs the tools of `make test` too, which the demo does not need.
# Environment: PYTHON, TORCH (a pip requirement for another torch), VENV, VENV_ARGS, CXX, MAX_JOBS, and pip's own.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly VENV=${VENV:-.venv} DEFAULT_TORCH="torch==2.13.0"
LOG=build/setup.log
readonly PIP=("$VENV/bin/python" -m pip --disable-pip-version-check --no-input)
readonly DEPENDENCIES="$VENV/.dependencies" EXTENSION="$VENV/.extension" # stamps: what was installed, what was built
readonly TOOLS="$VENV/.tools"
readonly PYTHONS=${PYTHON:-python3 python3.13 python3.12 python3.11 python} COMPILERS=${CXX:-c++ g++ clang++}
half_made="" installing="" built=""

say() { if [[ -t 2 ]]; then printf '\033[1m==>\033[0m %s\n' "$*" >&2; else printf '==> %s\n' "$*" >&2; fi; }
die() {
  printf 'make setup: %s\n' "$*" >&2
  exit 1
}
trap '[[ -z $installing ]] || wait "$installing" || true; [[ -z $half_made ]] || rm -rf "$half_made"' EXIT
trap 'exit 130' INT TERM HUP

# What each stage depends on, by content: a checkout that only touches files sets nothing up again.
dependencies_key() {
  pwd -P # a virtual environment does not survive being moved
  # shellcheck disable=SC2086  # pip takes several files, or addresses, separated by spaces
  { echo "${TORCH:-$DEFAULT_TORCH}" && cat pyproject.toml && { cat ${PIP_CONSTRAINT:-/dev/null} 2>/dev/null || true; }; } | cksum
}
extension_key() {
  { cat "$DEPENDENCIES" setup.py && find csrc -type f -print0 | LC_ALL=C sort -z | xargs -0 cksum; } | cksum
}
is_current() { [[ -f $1 && $(<"$1") == "$2" ]]; }
venv_works() {
  [[ -f $DEPENDENCIES && $(head -n 1 "$DEPENDENCIES") == "$(pwd -P)" ]] && "$VENV/bin/python" -c "" 2>/dev/null
}

find_python() {
  local name
  for name in $PYTHONS; do
    if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$name"
      return
    fi
  done
  die "no Python >= 3.11 found (tried: $PYTHONS); install one, or say where it is: make setup PYTHON=/path/to/python3"
}

check_compiler() {
  local name
  for name in $COMPILERS; do
    if command -v "$name" >/dev/null; then return; fi
  done
  die "no C++ compiler found (tried: $COMPILERS); install one (Debian, Ubuntu: apt-get install g++)," \
    "or say where it is: make setup CXX=/path/to/g++"
}

check_headers() {
  local header
  header=$("$1" -c 'import sysconfig; print(sysconfig.get_path("include") + "/Python.h")')
  [[ -f $header ]] ||
    die "$1 lacks $header, which the extension needs; install it (Debian, Ubuntu: apt-get install python3-dev)."
}

check_disk() { # megabytes
  local free
  free=$(df -Pk . | awk 'NR == 2 { print int($4 / 1024) }')
  ((free >= $1)) || die "the set-up needs $1 MB of disk and only $free MB are free here; free some space and try again."
}

# Runs pip with its output in the log, and turns a failure into one sentence. Python compiles what it imports, when it
# first does: most files never are.
pip_install() { # what, arguments of pip install...
  local what=$1
  shift
  if "${PIP[@]}" install --no-compile "$@" >"$LOG" 2>&1; then return; fi
  if grep -qE "No space left on device|Errno 28|Disk quota exceeded" "$LOG"; then
    die "$what could not be installed because the disk is full; free some space and try again ($LOG)."
  elif grep -q "DO NOT MATCH THE HASHES" "$LOG"; then
    die "$what could not be installed because a download has a wrong hash and was thrown away; try again ($LOG)."
  elif grep -qiE "connection broken|ConnectionError|ProxyError|SSLError|timed out|name resolution" "$LOG"; then
    die "$what could not be installed because the package registry cannot be reached; check the network ($LOG)."
  fi
  die "$what could not be installed: $(grep -E '^ERROR' "$LOG" | tail -n 1 || true) ($LOG)."
}

make_venv() {
  local python
  python=$(find_python)
  check_headers "$python"
  check_disk 3000
  rm -rf "$VENV"
  half_made=$VENV
  say "making $VENV with $("$python" --version)"
  # shellcheck disable=SC2086  # several options are several words
  "$python" -m venv ${VENV_ARGS:-} "$VENV" >"$LOG" 2>&1 ||
    die "$python cannot make a virtual environment; install its venv (Debian: apt-get install python3-venv), see $LOG."
}

# The version pip would choose. On some machines that is a CPU build (2.13.0+cpu), elsewhere the registry's own.
torch_version() {
  local read='import json, sys; print(json.load(sys.stdin)["install"][0]["metadata"]["version"])'
  "${PIP[@]}" install --quiet --dry-run --no-deps --ignore-installed --report - "$1" 2>/dev/null |
    "$VENV/bin/python" -c "$read" 2>/dev/null
}

install_torch() {
  if [[ -z ${TORCH:-} ]] && "$VENV/bin/python" -c "import torch" 2>/dev/null; then return; fi
  local wanted=${TORCH:-$DEFAULT_TORCH} version note=""
  version=$(torch_version "$wanted") || version=""
  if [[ $(uname -sm) == "Linux x86_64" && -n $version && $version != *+cpu ]]; then
    check_disk 12000
    note=" with several GB of CUDA libraries (make setup TORCH=... chooses another build)"
  fi
  say "installing torch ${version:-($wanted)}$note"
  pip_install torch "$wanted"
}

# What pyproject.toml asks for, with these extras; torch, installed before, satisfies it and is not replaced.
requirements() { # extras...
  "$VENV/bin/python" - "$@" <<'PYTHON'
import sys
import tomllib

with open("pyproject.toml", "rb") as file:
    settings = tomllib.load(file)
project = settings["project"]
names = settings["build-system"]["requires"] + project["dependencies"]
print(*names, *(name for extra in sys.argv[1:] for name in project["optional-dependencies"][extra]), sep="\n")
PYTHON
}

install_dependencies() {
  check_compiler # before anything is downloaded in vain
  venv_works || make_venv
  install_torch
  say "installing the dependencies"
  requirements cli report >"$VENV/requirements.txt"
  pip_install "a dependency" --requirement "$VENV/requirements.txt"
  # The packages themselves, in place; the extension follows by itself, so that later builds compile what changed only.
  SAFE_KERNELS_SKIP_EXTENSION=1 pip_install safe_kernels --no-build-isolation --no-deps --editable .
  dependencies_key >"$DEPENDENCIES"
  half_made=""
}

install_tools() { # beside the extension, which takes longer
  trap - INT # that a shell ignores in what it does beside
  LOG=build/tools.log
  say "installing the tools of the tests"
  requirements cli report dev >"$VENV/requirements.txt"
  pip_install "a tool" --requirement "$VENV/requirements.txt"
  cat "$DEPENDENCIES" >"$TOOLS"
}

build_extension() {
  check_compiler
  say "building the extension"
  rm -f "$EXTENSION"
  export MAX_JOBS=${MAX_JOBS:-$(getconf _NPROCESSORS_ONLN)}
  if ! "$VENV/bin/python" setup.py build_ext --inplace >"$LOG" 2>&1; then
    grep -E "error:|No space left on device" "$LOG" | head -n 5 >&2 || true
    die "the extension could not be built; all the compiler said is in $LOG."
  fi
  "$VENV/bin/python" -c "import torch, safe_kernels._C" 2>"$LOG" ||
    die "the extension was built but cannot be loaded: $(tail -n 1 "$LOG")"
  extension_key >"$EXTENSION"
}

mkdir -p build
if command -v flock >/dev/null; then # of two runs at once the second waits, and then finds everything done
  exec 9>build/.setup.lock
  if ! flock --nonblock 9; then
    say "waiting for another set-up of this tree to end"
    flock 9
  fi
fi
if ! venv_works || ! is_current "$DEPENDENCIES" "$(dependencies_key)"; then install_dependencies; fi
if [[ ${1:-} == dev ]] && ! is_current "$TOOLS" "$(<"$DEPENDENCIES")"; then
  install_tools &
  installing=$!
fi
is_built() { compgen -G "safe_kernels/_C*.so" >/dev/null && is_current "$EXTENSION" "$(extension_key)"; }
if ! is_built; then
  build_extension
  built=1
fi
[[ -z $installing ]] || wait "$installing"
[[ -z $installing$built ]] || say "ready: $VENV"
