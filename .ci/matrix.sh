#!/usr/bin/env bash
# Runs the tests with the oldest, the newest and some releases between of what pyproject.toml allows. Each corner has a
# copy of this tree and a virtual environment of its own under build/matrix, which a later run uses again.
# Arguments: names of corners; all if there are none. Environment: ARGS goes to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# name | Python | torch | other releases | its own tests, instead of all others; the other releases are installed
readonly CORNERS="
oldest | 3.11 | torch==2.11.0 | peft==0.18.0 transformers==4.57.1 torchao==0.13.0
image  | 3.12 | torch==2.11.0 | peft==0.20.0 transformers==5.17.0 torchao==0.17.0 triton==3.6.0
middle | 3.13 | torch==2.12.1 | peft==0.19.1 transformers==5.17.0 torchao==0.16.0
newest | 3.11 | torch==2.13.0 |
adapterhub | 3.11 | torch==2.13.0 | transformers==4.57.6 adapters==1.3.0 | tests/adapterhub
"

trim() { echo "$1" | xargs; }

pythons() { # version: what may be the interpreter's name; setup.sh takes the first that works
  echo "python$1" "$(compgen -G "$HOME/.pyenv/versions/$1.*/bin/python" | sort -V | tail -n 1 || true)"
}

run_corner() { # name, Python, torch, other releases, tests
  local folder=build/matrix/$1
  bash .ci/copy_tree.sh "$folder"
  tr ' ' '\n' <<<"$3 $4" >"$folder/constraints.txt"
  (
    cd "$folder"
    export PIP_CONSTRAINT=$PWD/constraints.txt PYTHON TORCH=$3
    PYTHON=$(pythons "$2")
    bash .ci/setup.sh dev
    .venv/bin/python -c 'if True:
      import sys, torch, peft, transformers
      print("Python", sys.version.split()[0], "torch", torch.__version__, "peft", peft.__version__,
            "transformers", transformers.__version__)'
    # shellcheck disable=SC2086  # several arguments are several words
    [[ -z $5 ]] || .venv/bin/python -m pip --disable-pip-version-check install --quiet $4
    # shellcheck disable=SC2086
    HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 .venv/bin/pytest -q --numprocesses auto --dist loadfile $5 ${ARGS:-}
  ) >"$folder.log" 2>&1
}

failed=0
names=" $* "
while IFS='|' read -r name python torch others tests; do
  name=$(trim "$name")
  if [[ -z $name || ($# -gt 0 && $names != *" $name "*) ]]; then continue; fi
  result=passed
  mkdir -p build/matrix
  run_corner "$name" "$(trim "$python")" "$(trim "$torch")" "$(trim "$others")" "$(trim "$tests")" </dev/null ||
    { result=FAILED && failed=1; }
  printf '%-10s %-7s %s\n%19s%s (build/matrix/%s.log)\n' "$name" "$result" \
    "$(grep -m 1 '^Python ' "build/matrix/$name.log" || echo 'not set up')" "" \
    "$(tail -n 1 "build/matrix/$name.log")" "$name"
done <<<"$CORNERS"
exit "$failed"
