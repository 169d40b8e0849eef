#!/bin/bash
# test.sh: all tests. 'sudo scripts/test.sh'; single parts: test-unit.sh, test-privileged.sh,
# test-leaks.sh, test-torvm.sh, test-system.sh.
set -uo pipefail
# shellcheck source=scripts/common.sh
. "$(dirname "$0")/common.sh"
need_root
"$ROOT/scripts/setup.sh" || exit 1
started=$SECONDS
for part in unit privileged leaks torvm system; do
  say "== test-$part"
  out=$(mktemp)
  begin=$SECONDS
  if [ "$part" = unit ]; then as_builder "$ROOT/scripts/test-unit.sh"; else "$ROOT/scripts/test-$part.sh"; fi 2>&1 | tee "$out"
  add_counts "$(tail -n1 "$out")" || failed "test-$part.sh gave no figures"
  rm -f "$out"
  say "   ($((SECONDS - begin)) s)"
done
say "== all ($((SECONDS - started)) s)"
summary
