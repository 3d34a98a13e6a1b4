#!/usr/bin/env bash
# Finds words that make a sentence hard to read for people whose first language is not English: see CONTRIBUTING.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly IN_SOURCE='beside|whoever|nobody|mend|mends|mended|a freezing|bytes a row|numbers a row|are told|as a rule|as ever|lest|hitherto|thereof|whereof'
IN_DOCS="$IN_SOURCE|whatever|whichever|somebody|freezings|scorings|rows a batch|knows|asks|tell|tells|told|stands|vouch|vouches"
IN_DOCS="$IN_DOCS|afresh|alike|all the same|anew|at hand|besides|kin|likewise|meanwhile|nor|passed over|say so|unseen|without a word"
readonly IN_DOCS
if grep -nwiE "$IN_DOCS" ./*.md docs/*.md ||
  grep -rnwiE "$IN_SOURCE" csrc safe_kernels python bench --include='*.[hp]*' --exclude-dir=__pycache__; then
  printf 'make lint: write these sentences with the subject first and the usual words (docs/glossary.md).\n' >&2
  exit 1
fi
