# shellcheck shell=bash
# Shared by bench.sh and soak.sh: builds what they run, and runs it so that a signal reaches its clean-up. Source it after common.sh.

# only_one NAME: no second run of this script beside ours.
only_one() {
  exec 9>"/run/lock/proxyvpn-$1.lock"
  flock -n 9 || die "another $1.sh runs; two at once would measure each other"
}

# expect_congestion NAME: can it be the congestion control of a network namespace?
expect_congestion() {
  local all=/proc/sys/net/ipv4/tcp_allowed_congestion_control
  # shellcheck disable=SC2016  # expanded inside
  if [[ $1 =~ ^[a-z0-9_-]+$ ]] && unshare --net sh -c 'echo "$1" >/proc/sys/net/ipv4/tcp_congestion_control' - "$1" 2>/dev/null; then return; fi
  die "--congestion $1: not possible in a network namespace; this machine allows there: $(cat $all) (net.ipv4.tcp_allowed_congestion_control)"
}

# build_all NAME: the daemon, its stage and the bench's programs; they are in $work, which ends with this script.
build_all() {
  "$ROOT/scripts/setup.sh" >/dev/null
  build_release || die "the build failed"
  work=$(mktemp -d "/tmp/proxyvpn-$1.XXXXXX")
  chmod 755 "$work"
  trap 'rm -rf "$work"' EXIT
  compile_bench
  "$ROOT/scripts/install.sh" --quiet --bin-dir "$(target_dir)/release" --destdir "$work/stage"
}
compile_bench() {
  compile load load.c client.c common.c
  compile server server.c common.c
  compile relay relay.c common.c
  compile tunpair tunpair.c common.c
}
compile_guest() { # static: nothing else of it is in the TorVM
  local flags=(-std=gnu11 -O2 -Wall -Wextra -Werror -pthread) object=$work/guest-server.o
  cc "${flags[@]}" -Dmain=server -c -o "$object" "$ROOT/bench/server.c" || die "bench/server.c does not compile"
  cc "${flags[@]}" -static -o "$work/guest" "$ROOT/bench/guest.c" "$object" "$ROOT/bench/common.c" || die "bench/guest.c does not compile"
}
compile() { # compile NAME SOURCE...
  local name=$1; shift
  cc -std=gnu11 -O2 -Wall -Wextra -Werror -pthread -o "$work/$name" "${@/#/$ROOT/bench/}" || die "bench/$name does not compile"
}

# run_python ARG...: in the background, so that a signal reaches it at once: it has a lab to take down. Ends this script.
run_python() {
  local run status=0
  python3 "$@" 9>&- &
  run=$!
  trap 'kill -TERM "$run" 2>/dev/null || true' INT TERM HUP
  wait "$run" || status=$?
  while kill -0 "$run" 2>/dev/null; do status=0; wait "$run" || status=$?; done
  exit "$status"
}
