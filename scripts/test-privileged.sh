#!/bin/bash
# test-privileged.sh: what needs root: the crates' privileged tests, each program in namespaces of its own, and the end-to-end tests
# (tests/e2e) against real proxies and servers. The machine's own network is not touched.
set -uo pipefail
# shellcheck source=scripts/common.sh
. "$(dirname "$0")/common.sh"
need_root
use_cargo
cd "$ROOT" || exit 1
mkdir -p "$LOGS"

build_log=$LOGS/privileged-build.log
list=$LOGS/privileged-programs
if ! cargo_run test --workspace --all-features --locked --no-run --message-format=json 2>"$build_log" >"$LOGS/privileged-build.json"; then
  failed "building the privileged tests"; tail -n 40 "$build_log"; summary; exit 1
fi
python3 - "$LOGS/privileged-build.json" >"$list" <<'PY'
import json, os, sys
for line in open(sys.argv[1], encoding="utf-8"):
    message = json.loads(line) if line.startswith("{") else {}
    if message.get("executable") and message.get("profile", {}).get("test"):
        print(os.path.dirname(message["manifest_path"]), message["executable"], message["target"]["name"], sep="\t")
PY
while IFS=$'\t' read -r dir program name; do
  # shellcheck disable=SC2016
  tests=$("$program" --list --ignored 2>/dev/null | grep -c ': test$')
  [ "$tests" -gt 0 ] || continue
  case ${dir##*/}/$name in
    daemon/tor) command -v tor >/dev/null || { skipped "control port of a real Tor" "tor is not installed (scripts/setup.sh)"; continue; } ;;
    daemon/vm)
      command -v qemu-system-x86_64 >/dev/null || { skipped "a real virtual machine" "QEMU is not installed (scripts/setup.sh)"; continue; }
      PROXYVPN_TORVM_IMAGE=$(realpath "$(target_dir)")/torvm-image; export PROXYVPN_TORVM_IMAGE
      if ! "$ROOT/scripts/build-torvm-image.sh" --transports --out "$PROXYVPN_TORVM_IMAGE" >"$LOGS/torvm-image.log" 2>&1 </dev/null; then
        failed "image of the virtual machine"; tail -n 40 "$LOGS/torvm-image.log"; continue
      fi ;;
  esac
  log=$LOGS/privileged-${dir##*/}-$name.log
  # an own /dev/net/tun: a chmod must never reach the machine's; own /run and /etc against what a test may write
  if (cd "$dir" && PROXYVPN_PRIVILEGED_TESTS=1 timeout 900 unshare --mount --net --pid --fork --kill-child --mount-proc --propagation private \
    bash -c 'mount -t tmpfs -o mode=755 tmpfs /dev/net && mknod -m 666 /dev/net/tun c 10 200 && ip link set lo up && exec "$@"' - \
    "$program" --ignored --test-threads=1) >"$log" 2>&1 </dev/null; then say "ok       privileged tests of ${dir##*/} ($name)"; cargo_counts "$log"
  else
    before=$FAILED; cargo_counts "$log"; [ "$FAILED" -gt "$before" ] || FAILED=$((FAILED + 1))
    say "FAILED   privileged tests of ${dir##*/} ($name)"; tail -n 60 "$log" | sed 's/^/  | /'; say "  (whole log: $log)"
  fi
done <"$list"

say "-- end to end"
if build_release >"$LOGS/release-build.log" 2>&1; then
  /usr/bin/python3 tests/e2e/run.py --logs "$LOGS/e2e" 2>&1 | tee "$LOGS/e2e.out"
  add_counts "$(tail -n1 "$LOGS/e2e.out")" || { failed "end-to-end tests gave no figures"; }
else failed "release build"; tail -n 40 "$LOGS/release-build.log"; fi
summary
