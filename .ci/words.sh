#!/usr/bin/env bash
# Finds words that make a sentence hard to read for people whose first language is not English: see CONTRIBUTING.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

IN_SOURCE='beside|whoever|nobody|mend|mends|mended|a freezing|bytes a row|numbers a row|as a rule|as ever|lest|hitherto|thereof|whereof'
IN_SOURCE="$IN_SOURCE|whatever|whichever|somebody|knows|asks|tell|tells|told|vouch|vouches|afresh|alike|all the same|anew|at hand"
IN_SOURCE="$IN_SOURCE|besides|likewise|meanwhile|made again|make again|makes again|passed over|without a word"
IN_DOCS="$IN_SOURCE|freezings|scorings|rows a batch|stands|kin|nor|say so|unseen"
readonly IN_SOURCE IN_DOCS
if grep -nwiE "$IN_DOCS" ./*.md docs/*.md ||
  grep -rnwiE "$IN_SOURCE" csrc safe_kernels python bench --include='*.py' --include='*.h' --include='*.cpp'; then
  printf 'make lint: write these sentences with the subject first and the usual words (docs/glossary.md).\n' >&2
  exit 1
fi
