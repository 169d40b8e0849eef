#!/bin/bash
# instructions.sh: counts the instructions of the engine's hot path with callgrind, scenario by scenario (engine/benches), and holds
# them within 5 % of the stored figures, both ways: what became cheaper is to be stored too.
#   --update   stores the figures of this compiler
# Figures depend on the compiler, the C library and the vector instructions; those of another one are shown and not judged.
set -uo pipefail
# shellcheck source=scripts/common.sh
. "$(dirname "$0")/common.sh"
use_cargo
stored=$ROOT/engine/benches/instructions.toml
update=
case ${1:-} in
  --update) update=1 ;;
  '') ;;
  *) die "unknown argument '$1' (only --update is known)" ;;
esac
if ! command -v valgrind >/dev/null; then
  skipped "instruction counts" "valgrind is not installed"; say "0 passed, 0 failed, 1 skipped"; exit 0
fi

mkdir -p "$LOGS"
log=$LOGS/instructions.log
program=$(cargo_run bench -p proxyvpn-engine --bench instructions --features harness --locked --no-run --message-format=json 2>"$log" |
  sed -n 's/.*"executable":"\([^"]*\/instructions-[^"]*\)".*/\1/p')
[ -x "$program" ] || { failed "building the instruction counts"; tail -n 40 "$log"; summary; exit 1; }

vectors=$(grep -qw avx2 /proc/cpuinfo && echo avx2 || echo plain)
compiler=$(as_builder env PATH="$PATH" rustc --version | cut -d' ' -f1,2)
key="$compiler $(uname -m) $vectors $(getconf GNU_LIBC_VERSION)"

count() { # of one scenario; a copy by 'rep movsb' would count each byte and hide the rest
  GLIBC_TUNABLES=glibc.cpu.x86_rep_movsb_threshold=1000000000:glibc.cpu.x86_rep_stosb_threshold=1000000000 \
    valgrind --tool=callgrind --toggle-collect='*counted_instructions*' --callgrind-out-file=/dev/null "$program" "$1" 2>&1 | tee -a "$log" |
    sed -n 's/^==[0-9]*== Collected : \([0-9]*\).*/\1/p'
}
figure() { # the stored one
  awk -v section="[\"$key\"]" -v name="$1" '/^\[/ { inside = $0 == section } inside && $1 == name { print $3 }' "$stored" 2>/dev/null
}
known=$(grep -Fx "[\"$key\"]" "$stored" 2>/dev/null)
lines=
for scenario in $("$program"); do
  got=$(count "$scenario")
  if ! [ "${got:-0}" -gt 0 ]; then failed "instructions of $scenario: callgrind counted nothing"; tail -n 10 "$log"; continue; fi
  lines+="$scenario = $got"$'\n'
  want=$(figure "$scenario")
  if [ -n "$update" ]; then say "$scenario: $got${want:+ (was $want)}"
  elif [ -z "$known" ]; then say "         $scenario: $got"
  elif [ -z "$want" ]; then failed "instructions of $scenario: $got, no stored figure; scripts/instructions.sh --update stores it"
  else
    change=$(awk -v got="$got" -v want="$want" 'BEGIN { printf "%+.1f %%", (got / want - 1) * 100 }')
    if [ $((got * 100)) -gt $((want * 105)) ]; then failed "instructions of $scenario: $got, $change of $want"
    elif [ $((got * 100)) -lt $((want * 95)) ]; then failed "instructions of $scenario: $got, $change of $want: better; scripts/instructions.sh --update stores it"
    else passed "instructions of $scenario: $got, $change"; fi
  fi
done
if [ -n "$update" ]; then
  [ "$FAILED" = 0 ] || { summary; exit 1; }
  {
    say "# Instructions in user space of the scenarios of instructions.rs, by compiler, machine and C library."
    say "# scripts/instructions.sh --update writes this file."
    # the others' figures stay
    awk -v section="[\"$key\"]" '/^\[/ { inside = 1; ours = $0 == section } inside && !ours' "$stored" 2>/dev/null
    say "[\"$key\"]"; printf '%s' "$lines"
  } >"$stored.new" && mv "$stored.new" "$stored"
  exit 0
fi
if [ -z "$known" ] && [ "$FAILED" = 0 ]; then
  skipped "instruction counts" "no stored figures for $key"; say "$PASSED passed, $FAILED failed, $SKIPPED skipped"; exit 0
fi
summary
