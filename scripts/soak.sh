#!/bin/bash
# soak.sh: short connections through proxyvpnd for long, to see what it keeps or loses: 'sudo scripts/soak.sh'
#
#   --connections N          so many, 32 at once (default: 10,000,000: about twenty minutes)
#   --quick                  --connections 200000
#   --rate R [--seconds S]   instead: R new connections per second, for S seconds (default: 300)
#   --kernel-ports           the kernel's own range of local ports (32768-60999, no reuse of TIME-WAIT) instead of a wide one. All
#                            connections go to one address of one proxy, so there is a port for about 470 per second
#   --every S                seconds between two samples (default: 10)
#   --csv FILE               every sample with every counter of the daemon
#   --congestion NAME        as in bench.sh
#
# Prints the daemon's memory, descriptors and flows, and the machine's connection tracking entries and TIME-WAIT sockets. Fails if a
# connection is lost, if flows stay, or if after all of them the daemon holds clearly more memory or descriptors than after the first 2 %, both
# times at rest. With --kernel-ports connections may be refused, if the daemon's health says why. The lab is bench.sh's.
set -euo pipefail
# shellcheck source=scripts/common.sh
. "$(dirname "$0")/common.sh"
# shellcheck source=scripts/bench-common.sh
. "$(dirname "$0")/bench-common.sh"

args=() congestion=reno
while [ $# -gt 0 ]; do case $1 in
  --connections | --rate | --seconds | --every) [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || die "$1 needs a number"; args+=("$1" "$2"); shift 2 ;;
  --quick) args+=(--connections 200000); shift ;;
  --kernel-ports) args+=("$1"); shift ;;
  --csv) args+=(--csv "$(readlink -f "${2:?--csv needs a file}")") || die "no folder for '$2'"; shift 2 ;;
  --congestion) congestion=${2:?--congestion needs a name}; shift 2 ;;
  -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0" | sed '$d'; exit 0 ;;
  *) die "unknown argument '$1' (see --help)" ;;
esac; done
need_root
only_one soak
expect_congestion "$congestion"
build_all soak
run_python "$ROOT/bench/soak.py" --bin "$work" --stage "$work/stage" --congestion "$congestion" "${args[@]}"
