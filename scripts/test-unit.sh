#!/bin/bash
# test-unit.sh: everything that needs no root: format, lints, unit tests, scripts, licences.
set -uo pipefail
# shellcheck source=scripts/common.sh
. "$(dirname "$0")/common.sh"
use_cargo
cd "$ROOT" || exit 1

has_component() { as_builder env PATH="$PATH" cargo "$1" --version >/dev/null 2>&1; }
if has_component fmt; then check "cargo fmt --check" cargo_run fmt --check; else skipped "cargo fmt --check" "rustfmt is not installed"; fi
if has_component clippy; then
  check "cargo clippy (warnings are errors)" cargo_run clippy --workspace --all-targets --all-features --locked --quiet -- -D warnings
else skipped "cargo clippy" "clippy is not installed"; fi

log=$LOGS/cargo-test.log; mkdir -p "$LOGS"
if cargo_run test --workspace --locked --no-fail-fast >"$log" 2>&1; then cargo_counts "$log"; say "ok       cargo test"
else
  before=$FAILED; cargo_counts "$log"; say "FAILED   cargo test"
  # a build that fails counts too
  [ "$FAILED" -gt "$before" ] || FAILED=$((FAILED + 1))
  grep -E '^(error|warning: unused|failures:|    [a-z_:]+$|test .*FAILED|thread .* panicked)|panicked at' "$log" | tail -n 40; tail -n 25 "$log"; say "  (whole log: $log)"
fi

# the packet core: fuzz targets on their seeds and what follows from them, and the price of the hot path
for part in fuzz instructions; do
  out=$LOGS/$part.out
  scripts/$part.sh >"$out" 2>&1
  sed '$d' "$out"
  add_counts "$(tail -n 1 "$out")" || { failed "scripts/$part.sh gave no figures"; cat "$out"; }
done

if command -v shellcheck >/dev/null; then check "shellcheck" shellcheck -x -P . scripts/*.sh torvm/image/*.sh .ci/run
else skipped "shellcheck" "shellcheck is not installed"; fi
python_files() { python3 - scripts/*.py tests/e2e/*.py tests/leaks/*.py tests/system/*.py bench/*.py <<'PY'
import ast, sys
for name in sys.argv[1:]:
    ast.parse(open(name, encoding="utf-8").read(), name)
PY
}
check "python files parse" python_files
check "the leak tests' oracle" python3 tests/leaks/test_wire.py
check "the leak tests' matrix" python3 tests/leaks/test_matrix.py
c_compiles() { local file; for file in bench/*.c tests/e2e/*.c; do cc -std=gnu11 -O2 -Wall -Wextra -Werror -fsyntax-only "$file" || return 1; done; }
check "C files compile without warnings" c_compiles
bench_tests() {
  local dir status; dir=$(mktemp -d); chmod 755 "$dir"
  # shellcheck source=scripts/bench-common.sh
  (. scripts/bench-common.sh && work=$dir compile_bench && python3 bench/test_bench.py "$dir"); status=$?
  rm -rf "$dir"; return "$status"
}
check "the bench's own tests" bench_tests
if ! unshare --net true 2>/dev/null && ! unshare --map-root-user --net true 2>/dev/null; then skipped "the bench's programs" "no network namespace can be made here"; fi
licences() { cargo_run metadata --format-version 1 --locked | python3 scripts/licences.py deny.toml; }
check "licences and sources of dependencies" licences
if as_builder env PATH="$PATH" cargo deny --version >/dev/null 2>&1; then check "cargo deny" cargo_run deny --offline check bans sources
else skipped "cargo deny" "cargo-deny is not installed (licences and sources are checked above)"; fi
if command -v systemd-analyze >/dev/null; then
  unit_syntax() { # only what is wrong with the file itself: the program is not installed here
    local dir unit units=(); dir=$(mktemp -d)
    for unit in systemd/*.service systemd/*.socket; do
      unit=${unit##*/}; sed 's#/usr/libexec/proxyvpn/proxyvpn[a-z-]*#/bin/true#' "systemd/$unit" >"$dir/$unit"; units+=("$dir/${unit/@/@test}")
    done
    systemd-analyze verify --man=no "${units[@]}" 2>"$dir/log"; cat "$dir/log"; ! grep -q 'proxyvpn[^ ]*:' "$dir/log"
    local status=$?; rm -rf "$dir"; return $status
  }
  check "systemd units" unit_syntax
else skipped "systemd units" "systemd-analyze is not installed"; fi
summary
