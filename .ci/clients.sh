#!/usr/bin/env bash
# Runs the recipes of docs/recipes.md inside the libraries they are for. A copy of this tree has a virtual environment of
# its own under build/clients, which a later run uses again: nothing of it gets into .venv.
# Arguments: files of tests/clients; all if there are none. Environment: ARGS goes to pytest; what setup.sh reads.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly FOLDER=build/clients
bash .ci/copy_tree.sh "$FOLDER"
cd "$FOLDER"
# No client may bring another torch, or another version of what another client needs.
export PIP_CONSTRAINT=$PWD/tests/clients/requirements.txt VENV=.venv
bash .ci/setup.sh dev
readonly STAMP=.venv/.clients
wanted=$(cksum <"$PIP_CONSTRAINT")
if [[ ! -f $STAMP || $(<"$STAMP") != "$wanted" ]]; then
  echo "==> installing the clients" >&2
  .venv/bin/python -m pip --disable-pip-version-check --no-input install --requirement "$PIP_CONSTRAINT" \
    >build/clients.log 2>&1 || { tail -n 5 build/clients.log >&2 && exit 1; }
  echo "$wanted" >"$STAMP"
fi
# shellcheck disable=SC2086  # several arguments are several words
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 .venv/bin/pytest --quiet "${@:-tests/clients}" ${ARGS:-}
