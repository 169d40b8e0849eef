#!/bin/bash
# bench.sh: how fast proxyvpn is, against what is possible on this machine and against others: 'sudo scripts/bench.sh'
#
#   --quick        two to three minutes instead of twenty, with less certain figures
#   --json FILE    write everything that was measured, too
#   --only A,B     only these of: direct connect tuns proxyvpn redsocks tun2proxy
#   --with-peers   fetch redsocks (Debian's package, unpacked, not installed) and tun2proxy (cargo install, takes minutes) if they are not
#                  here; they are kept in target/peers
#
# All traffic stays between network namespaces of its own. Ends with a table of figures, one of goals, and 'bench: ok'. That a goal is not
# reached is no failure; wrong bytes, a lost connection or a process of an earlier run stops it.
set -euo pipefail
# shellcheck source=scripts/common.sh
. "$(dirname "$0")/common.sh"

quick=() only=() json='' with_peers=''
while [ $# -gt 0 ]; do case $1 in
  --quick) quick=(--quick); shift ;;
  --json) json=$(readlink -f "${2:?--json needs a file}") || die "no folder for '$2'"; shift 2 ;;
  --only) only=(--only "${2:?--only needs names}"); shift 2 ;;
  --with-peers) with_peers=1; shift ;;
  -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0" | sed '$d'; exit 0 ;;
  *) die "unknown argument '$1' (see --help)" ;;
esac; done
need_root
exec 9>/run/lock/proxyvpn-bench.lock
flock -n 9 || die "another bench.sh runs; two at once would measure each other"

"$ROOT/scripts/setup.sh" >/dev/null
build_release || die "the build failed"

work=$(mktemp -d /tmp/proxyvpn-bench.XXXXXX)
chmod 755 "$work"
trap 'rm -rf "$work"' EXIT
compile() { # compile NAME SOURCE...
  local name=$1; shift
  cc -std=gnu11 -O2 -Wall -Wextra -Werror -pthread -o "$work/$name" "${@/#/$ROOT/bench/}" || die "bench/$name does not compile"
}
compile load load.c client.c common.c
compile server server.c common.c
compile relay relay.c common.c
compile tunpair tunpair.c common.c
"$ROOT/scripts/install.sh" --quiet --bin-dir "$(target_dir)/release" --destdir "$work/stage"

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

# in the background, so that a signal reaches it at once: it has a lab to take down
python3 "$ROOT/bench/run.py" --bin "$work" --stage "$work/stage" "${quick[@]}" "${only[@]}" ${json:+--json "$json"} "${peers[@]}" 9>&- &
run=$! status=0
trap 'kill -TERM "$run" 2>/dev/null || true' INT TERM
wait "$run" || status=$?
while kill -0 "$run" 2>/dev/null; do status=0; wait "$run" || status=$?; done
exit "$status"
