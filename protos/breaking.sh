#!/bin/sh
# Compare the contract with the one on main. Says so when there is nothing to compare with.
set -eu
buf=$1
for base in origin/main main; do
    if git rev-parse --quiet --verify "$base^{commit}" >/dev/null && git cat-file -e "$base:buf.yaml" 2>/dev/null; then
        scratch=$(mktemp -d)
        trap 'rm -rf "$scratch"' EXIT
        git archive "$base" buf.yaml protos | tar -x -C "$scratch"
        "$buf" breaking --against "$scratch"
        echo "buf breaking: compared with $base"
        exit 0
    fi
done
echo "buf breaking: no main branch to compare with, skipped"
