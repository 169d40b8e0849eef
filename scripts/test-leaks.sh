#!/bin/bash
# test-leaks.sh: nothing leaks. Fires probes (tests/leaks/probes.py) in every state and under every fault (tests/leaks/scenarios.py), and
# compares what arrives at the far end of each uplink with what may leave. Prints the matrix; each probe must also be seen there with the
# protection off, or its row fails. Everything happens in network namespaces; the machine's own network is not touched.
#   --full         every fault as often as it takes to be sure: kill -9 and SIGSEGV 200 times each
#   --only TEXT    columns whose name holds TEXT, and the anti-tests
#   --list         probes and columns
#   --json FILE    the results as JSON, too
#   --logs DIR     where packets that leaked are kept (default: leaks in the tests' folder)
#   --bin-dir DIR  test these programs instead of building them
set -uo pipefail
# shellcheck source=scripts/common.sh
. "$(dirname "$0")/common.sh"
arguments=("$@") bin=
while [ $# -gt 0 ]; do case $1 in
  --bin-dir) bin=${2:-}; shift 2 || die "--bin-dir needs a folder" ;;
  --only | --json | --logs) shift 2 || die "$1 needs a value" ;;
  --list) exec /usr/bin/python3 "$ROOT/tests/leaks/run.py" --list ;;
  --full) shift ;;
  *) sed -n '2,/^set/{s/^# \{0,1\}//p}' "$0"; exit 2 ;;
esac; done
need_root
mkdir -p "$LOGS"
if [ -z "$bin" ]; then
  if ! build_release >"$LOGS/release-build.log" 2>&1; then failed "release build"; tail -n 40 "$LOGS/release-build.log"; summary; exit 1; fi
fi
exec /usr/bin/python3 "$ROOT/tests/leaks/run.py" --logs "$LOGS/leaks" "${arguments[@]}"
