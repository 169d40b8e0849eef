#!/bin/bash
# demo.sh: proxyvpn's main job on this machine, in namespaces of its own: 'sudo scripts/demo.sh'. Installs what it needs, builds, and
# shows step by step, each one checked, that a user without root puts a whole machine behind a real proxy. Nothing of this machine's
# own network changes. Run again it takes seconds.
#   --torvm   instead: that she puts it behind Tor in a virtual machine, with a private Tor network (scripts/demo-torvm.sh)
set -euo pipefail
cd "$(dirname "$0")/.."
torvm=
case ${1:-} in
  '') ;;
  --torvm) torvm=1 ;;
  *) sed -n '2,/^set /s/^# \{0,1\}//p' "$0" | sed '$d'; exit 2 ;;
esac
PVLAB_ID=demo-$$
# shellcheck source=scripts/lab.sh
. scripts/lab.sh
need_root

step=0
ok() { step=$((step + 1)); printf '%2d. %s\n' "$step" "$*"; }
fail() {
  printf 'demo: FAILED: %s\n' "$*" >&2
  if [ -s "$LAB/logs/proxyvpnd.log" ]; then echo "-- proxyvpnd's log:" >&2; tail -n 25 "$LAB/logs/proxyvpnd.log" >&2; fi
  exit 1
}
stage=/tmp/proxyvpn-demo-stage.$$
# shellcheck disable=SC2317  # the trap calls it
finish() { lab_down || true; rm -rf "$stage"; }
trap finish EXIT
trap 'exit 130' INT TERM
# run NAME CMD...: output in $OUT; fails the demo with that output
run() {
  local what=$1; shift
  OUT=$("$@" 2>&1) || fail "$what: $OUT"
}
app() { lab_exec app "$@"; }
alice() { lab_exec app:alice "$@"; }
mallory() { lab_exec app:mallory "$@"; }
status_is() { [ "$(alice proxyctl status --json | python3 -c 'import json,sys; print(json.load(sys.stdin)["state"])')" = "$1" ]; }
# packets of the machine to the web server's own addresses: what is tunnelled shows the proxy's address on the wire instead
direct_packets() { lab_wire "src host ($LAB_APP4 or $LAB_APP6) and dst host ($LAB_WEB or $LAB_WEB6)" | wc -l; }

say "    (the first run installs packages and builds, which takes some minutes)"
scripts/setup.sh >/dev/null
ok "this machine has what building and testing need (scripts/setup.sh)"
build_release || fail "the build failed"
if [ -n "$torvm" ]; then
  # shellcheck source=scripts/demo-torvm.sh
  . scripts/demo-torvm.sh
  exit
fi
scripts/install.sh --quiet --bin-dir "$(target_dir)/release" --destdir "$stage" || fail "install.sh"
ok "proxyvpnd and proxyctl are built"

lab_up --stage "$stage"
ok "namespaces: a machine with its own system bus and polkitd; beyond a wire squid with a password, web servers, DNS, a sniffer"
app pkaction --action-id org.proxyvpn1.connect >/dev/null || fail "polkitd does not know the actions"
lab_daemon
pid=$(lab_daemon_pid) || fail "proxyvpnd ended"
caps=$(app sed -n 's/^CapEff:[[:space:]]*//p' "/proc/$pid/status") uid=$(app stat -c %U "/proc/$pid")
[ "$uid $caps" = "proxyvpn 0000000000001000" ] || fail "proxyvpnd runs as $uid with capabilities $caps"
ok "proxyvpnd runs as user proxyvpn, its only capability is CAP_NET_ADMIN"

# The detector first: without protection it must see the packets.
run "direct fetch" alice curl -sS --max-time 10 http://web.lab.test/
grep -q "you are .*$LAB_APP4" <<<"$OUT" || fail "unexpected answer: $OUT"
[ "$(direct_packets)" -gt 0 ] || fail "the sniffer does not see direct packets"
before=$(lab_state)
ok "before: alice's curl reaches the web server directly, and the sniffer on the wire sees it"

run "connect" alice proxyctl connect --proxy-url "http://$LAB_PROXY_USER@proxy.lab.test:3128" --password-file "$LAB/home/alice/password"
status_is connected || fail "status is not connected: $(alice proxyctl status)"
ok "alice, who is not root, connects: proxyctl connect --proxy-url http://$LAB_PROXY_USER@proxy.lab.test:3128 --password-file …"
seen=$(direct_packets)

run "http through the proxy" alice curl -sS --max-time 20 http://web.lab.test/
grep -q "you are .*$LAB_WEB" <<<"$OUT" || fail "the web server saw another client than the proxy: $OUT"
ok "http:  $OUT"
run "https through the proxy" alice curl -sS --max-time 20 https://web.lab.test/
grep -q "you are .*$LAB_WEB" <<<"$OUT" || fail "the web server saw another client than the proxy: $OUT"
ok "https: $OUT (certificate checked end to end)"
logged() { line=$(grep "CONNECT $LAB_WEB:443 $LAB_PROXY_USER" "$LAB/logs/squid/access.log" | tail -n1) && [ -n "$line" ]; }
wait_for 5 logged || fail "the proxy's log has no line of the fetch: $(tail -n5 "$LAB/logs/squid/access.log")"
ok "squid's log: $line"
[ "$(direct_packets)" = "$seen" ] || fail "packets went around the proxy: $(lab_wire "dst host $LAB_WEB" | tail -n3)"
ok "the sniffer saw no packet go around the proxy"

status=0; OUT=$(mallory proxyctl disconnect 2>&1) || status=$?
refusal=${OUT%%$'\n'*}
[ "$status" = 4 ] || fail "mallory's disconnect ended with $status instead of 4: $refusal"
status_is connected || fail "mallory's call changed the state"
ok "polkit refuses mallory (exit code 4): $refusal"

lab_service stop squid
if OUT=$(alice curl -sS --max-time 5 http://web.lab.test/ 2>&1); then fail "a fetch worked without the proxy: $OUT"; fi
if OUT6=$(alice curl -sS --max-time 5 https://web6.lab.test/ 2>&1); then fail "a fetch over IPv6 worked without the proxy: $OUT6"; fi
if alice timeout 5 bash -c "echo x >/dev/udp/$LAB_WEB/9" 2>/dev/null; then sleep 0.2; fi
[ "$(direct_packets)" = "$seen" ] || fail "packets left directly: $(lab_wire "dst host $LAB_WEB" | tail -n3)"
ok "the proxy is stopped: direct connections are blocked, nothing reached the wire (${OUT#curl: })"

run "disconnect" alice proxyctl disconnect
status_is disconnected || fail "status is not disconnected: $(alice proxyctl status)"
after=$(lab_state)
[ "$before" = "$after" ] || fail "the network is not as before: $(diff <(echo "$before") <(echo "$after"))"
ok "alice disconnects: rules, routes, nft, links, addresses and sysctls equal those before ($(wc -l <<<"$after") lines compared)"
run "direct fetch after" alice curl -sS --max-time 10 http://web.lab.test/
[ "$(direct_packets)" -gt "$seen" ] || fail "the sniffer does not see the direct fetch"
ok "the web server is reached directly again"
lab_daemon_stop || fail "proxyvpnd did not end"
[ "$(lab_state)" = "$before" ] || fail "the daemon left something: $(diff <(echo "$before") <(lab_state))"
say "demo: ok"
