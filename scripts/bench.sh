#!/bin/bash
# bench.sh: how fast proxyvpn is, against what is possible on this machine and against others: 'sudo scripts/bench.sh'
#
#   --quick        four minutes instead of twenty, with less certain figures
#   --congestion NAME
#                  TCP's congestion control in both machines, for every program (default: reno). reno is the same on every machine, a network
#                  namespace may always use it, and it sets no timers. bbr paces: its timers take more CPU than what is measured, and not
#                  the same share of each program's. On a wire without loss cubic does what reno does, but not every kernel allows it here
#   --json FILE    write everything that was measured, too
#   --only A,B     only these of: direct connect tuns proxyvpn redsocks tun2proxy
#   --torvm        instead: the TorVM's start, throughput, memory and CPU, in a private Tor network (only with --quick and --json)
#   --with-peers   fetch redsocks (Debian's package, unpacked, not installed) and tun2proxy (cargo install, takes minutes) if they are not
#                  here; they are kept in target/peers
#
# All traffic stays between network namespaces of its own. Ends with a table of figures, one of goals, and 'bench: ok'. That a goal is not
# reached is no failure; wrong bytes, a lost connection or a process of an earlier run stops it.
set -euo pipefail
# shellcheck source=scripts/common.sh
. "$(dirname "$0")/common.sh"
# shellcheck source=scripts/bench-common.sh
. "$(dirname "$0")/bench-common.sh"

quick=() only=() json='' with_peers='' torvm='' congestion=reno
while [ $# -gt 0 ]; do case $1 in
  --quick) quick=(--quick); shift ;;
  --congestion) congestion=${2:?--congestion needs a name}; shift 2 ;;
  --json) json=$(readlink -f "${2:?--json needs a file}") || die "no folder for '$2'"; shift 2 ;;
  --only) only=(--only "${2:?--only needs names}"); shift 2 ;;
  --torvm) torvm=1; shift ;;
  --with-peers) with_peers=1; shift ;;
  -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0" | sed '$d'; exit 0 ;;
  *) die "unknown argument '$1' (see --help)" ;;
esac; done
need_root
only_one bench
expect_congestion "$congestion"
build_all bench
if [ -n "$torvm" ]; then
  build_torvm_image || die "the TorVM's image was not built"
  compile_guest
  run_python "$ROOT/bench/torvm.py" --bin "$work" --stage "$work/stage" --image "$(target_dir)/torvm-image" "${quick[@]}" ${json:+--json "$json"}
fi

peers=() kept=$(target_dir)/peers
peer() { # peer NAME PROGRAM...: the first that is there
  local name=$1 program; shift
  for program in "$@"; do
    if program=$(command -v "$program"); then peers+=(--peer "$name=$program"); return 0; fi
  done
  return 1
}
skip() { peers+=(--skip "$1=$2"); }
fetch_redsocks() { # its service would start with the machine, so it is not installed
  as_builder mkdir -p "$kept" && (cd "$work" && apt-get download -qq redsocks >/dev/null 2>&1 && dpkg -x redsocks_*.deb "$work/redsocks") \
    && install -m 755 "$work/redsocks/usr/sbin/redsocks" "$kept/redsocks" && [[ $(ldd "$kept/redsocks") != *'not found'* ]]
}
fetch_tun2proxy() { cargo_run install --quiet --locked --root "$kept/tun2proxy" tun2proxy; }
if ! peer redsocks redsocks "$kept/redsocks"; then
  if [ -z "$with_peers" ]; then skip redsocks "not installed (--with-peers fetches it)"
  elif ! fetch_redsocks || ! peer redsocks "$kept/redsocks"; then skip redsocks "its package cannot be fetched, or a library that it needs is not installed"; fi
fi
if ! peer tun2proxy tun2proxy-bin "$kept/tun2proxy/bin/tun2proxy-bin"; then
  if [ -z "$with_peers" ]; then skip tun2proxy "not installed (--with-peers builds it)"
  elif ! fetch_tun2proxy || ! peer tun2proxy "$kept/tun2proxy/bin/tun2proxy-bin"; then skip tun2proxy "cargo install failed"; fi
fi
skip hev-socks5-tunnel "neither Debian nor crates.io has it"

run_python "$ROOT/bench/run.py" --bin "$work" --stage "$work/stage" --congestion "$congestion" "${quick[@]}" "${only[@]}" ${json:+--json "$json"} "${peers[@]}"
