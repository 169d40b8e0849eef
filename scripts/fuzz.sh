#!/bin/bash
# fuzz.sh: builds the engine's fuzz targets (fuzz/) with coverage and libFuzzer, and runs each for a bounded time.
#   fuzz.sh [--seconds N] [--jobs N] [TARGET...]   all targets, 10 s each, one process each
#   fuzz.sh --replay FILE TARGET                   one input, such as one that crashed
# Inputs that crash stay in target/fuzz-crashes, what was found on the way in target/fuzz-corpus. Needs a C++ compiler.
set -uo pipefail
# shellcheck source=scripts/common.sh
. "$(dirname "$0")/common.sh"
use_cargo
all=(parse answer frames link turns)
seconds=10 jobs=1 replay='' targets=()
while [ $# -gt 0 ]; do
  case $1 in
    --seconds) seconds=${2:?how many seconds}; shift ;;
    --jobs) jobs=${2:?how many processes}; shift ;;
    --replay) replay=$(realpath "${2:?which file}"); shift ;;
    -*) die "unknown argument '$1'" ;;
    *) [[ " ${all[*]} " = *" $1 "* ]] || die "no target '$1'; there are: ${all[*]}"; targets+=("$1") ;;
  esac
  shift
done
[ "${#targets[@]}" -gt 0 ] || targets=("${all[@]}")

host=$(as_builder env PATH="$PATH" rustc -vV | sed -n 's/^host: //p')
build=$(target_dir)/fuzz
# Stable flags of rustc's; with --target they are for the targets and what they need, not for build scripts.
instrument="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters
  -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares"
build_targets() {
  (cd "$ROOT/fuzz" && CARGO_TARGET_DIR=$build RUSTFLAGS="${instrument//$'\n'/ }" \
    as_builder env PATH="$PATH" cargo build --release --locked --quiet --target "$host")
}

mkdir -p "$LOGS"
log=$LOGS/fuzz-build.log
if ! command -v c++ >/dev/null; then skipped "fuzz targets" "there is no C++ compiler"; say "0 passed, 0 failed, 1 skipped"; exit 0; fi
if ! build_targets >"$log" 2>&1; then
  # A rustc whose LLVM was built without the pass.
  if why=$(grep -m1 -iE 'unknown (pass|command line argument)' "$log"); then
    skipped "fuzz targets" "this rustc cannot measure coverage: $why"
    say "0 passed, 0 failed, 1 skipped"; exit 0
  fi
  failed "building the fuzz targets"; tail -n 40 "$log"; summary; exit 1
fi
programs=$build/$host/release
if [ -n "$replay" ]; then exec "$programs/${targets[0]}" "$replay"; fi

work=$(target_dir)
run_target() { # only what is short is tried: a long input shows nothing that two short ones do not
  local target=$1
  as_builder mkdir -p "$work/fuzz-corpus/$target" "$work/fuzz-crashes"
  as_builder "$programs/$target" -max_total_time="$seconds" -timeout=20 -rss_limit_mb=2048 -max_len=4096 -print_final_stats=1 \
    -fork="$((jobs > 1 ? jobs : 0))" -artifact_prefix="$work/fuzz-crashes/$target-" "$work/fuzz-corpus/$target" "$ROOT/fuzz/corpus/$target"
}
for target in "${targets[@]}"; do
  log=$LOGS/fuzz-$target.log
  if run_target "$target" >"$log" 2>&1 </dev/null; then
    passed "fuzz $target: $(sed -n 's/^stat::number_of_executed_units: *//p' "$log") inputs, $(sed -n 's/.* cov: \([0-9]*\) .*/\1/p' "$log" | tail -n 1) edges"
  else
    failed "fuzz $target"; grep -aE 'panicked|ERROR|Test unit written' -A 3 "$log" | tail -n 20; say "  (again: scripts/fuzz.sh --replay FILE $target; whole log: $log)"
  fi
done
summary
