#!/usr/bin/env bash
# Copies this tree, as git sees it with changes and new files, into the folder that is named. Files that are gone here go
# there too; what was built or installed there stays.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

mkdir -p "$1"
[[ ! -f $1/.copied ]] || (cd "$1" && xargs -0 rm -f <.copied)
git ls-files -z --cached --others --exclude-standard --deduplicate >"$1/.copied"
tar --create --null --files-from="$1/.copied" --ignore-failed-read 2>/dev/null | tar --extract --directory="$1"
