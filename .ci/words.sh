#!/usr/bin/env bash
# Finds words that make a sentence hard to read for people whose first language is not English: see CONTRIBUTING.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly IN_SOURCE='beside|whoever|nobody|mend|mends|mended|a freezing|bytes a row|numbers a row'
readonly IN_DOCS="$IN_SOURCE|whatever|freezings|scorings"
if grep -nwiE "$IN_DOCS" ./*.md docs/*.md || grep -rnwiE "$IN_SOURCE" csrc safe_kernels python bench --include='*.[hp]*'; then
  printf 'make lint: write these sentences with the subject first and the usual words (docs/glossary.md).\n' >&2
  exit 1
fi
