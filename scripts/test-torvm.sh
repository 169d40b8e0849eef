#!/bin/bash
# test-torvm.sh: the TorVM backend against a private Tor network: the real image in QEMU, everything in network namespaces of its own; the
# machine's own network is not touched.
#   --only TEXT    tests whose name holds TEXT, without the leak probes
#   --list         the tests
#   --bin-dir DIR  test these programs instead of building them
#   --image DIR    boot this image instead of building one
set -uo pipefail
# shellcheck source=scripts/common.sh
. "$(dirname "$0")/common.sh"
only='' bin='' image=''
while [ $# -gt 0 ]; do case $1 in
  --bin-dir) bin=$(readlink -e "${2:-}") || die "--bin-dir needs a folder"; shift 2 ;;
  --image) image=$(readlink -e "${2:-}") || die "--image needs a folder"; shift 2 ;;
  --only) only=${2:-}; shift 2 || die "--only needs a text" ;;
  --list) for runner in boot run; do /usr/bin/python3 "$ROOT/tests/torvm/$runner.py" --list; done; exit ;;
  *) sed -n '2,/^set/{s/^# \{0,1\}//p}' "$0"; exit 2 ;;
esac; done
need_root
for tool in qemu-system-x86_64 tor tor-gencert obfs4proxy busybox zstd tcpdump squid dnsmasq dig debugfs; do
  command -v "$tool" >/dev/null || { skipped "torvm" "$tool is not installed (scripts/setup.sh)"; summary; exit 0; }
done
mkdir -p "$LOGS"
if [ -z "$bin" ]; then
  if ! build_release >"$LOGS/release-build.log" 2>&1; then failed "release build"; tail -n 40 "$LOGS/release-build.log"; summary; exit 1; fi
  bin=$(target_dir)/release
fi
if [ -z "$image" ]; then
  image=$(target_dir)/torvm-image
  if ! as_builder "$ROOT/scripts/build-torvm-image.sh" --transports --out "$image" >"$LOGS/torvm-image.log" 2>&1; then failed "image"; tail -n 40 "$LOGS/torvm-image.log"; summary; exit 1; fi
fi
# The guest alone, then all of it, then what leaks: probes in the states and under the faults of this backend.
for runner in boot run leaks; do
  [ "$runner" != leaks ] || [ -z "$only" ] || continue
  python=(/usr/bin/python3 "$ROOT/tests/torvm/$runner.py" --only "$only")
  [ -n "$("${python[@]}" --list)" ] || continue
  python+=(--image "$image")
  [ "$runner" = boot ] || python+=(--logs "$LOGS/torvm-$runner" --bin-dir "$bin")
  out=$(mktemp)
  "${python[@]}" 2>&1 | tee "$out"
  add_counts "$(tail -n1 "$out")" || failed "$runner.py gave no figures"
  rm -f "$out"
done
summary
