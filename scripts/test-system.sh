#!/bin/bash
# test-system.sh: on a real systemd, in a throw-away machine (scripts/box.sh): install, D-Bus activation, polkit rules by group, restart
# after kill -9, the units' hardening, QEMU's start, lockdown with reboots, uninstall. Says 'skipped' where such a machine cannot run.
# shellcheck disable=SC2016,SC2317  # expanded in the box; functions that `check` calls
set -uo pipefail
export PVLAB_ID=system-$$
# shellcheck source=scripts/lab.sh
. "$(dirname "$0")/lab.sh"
need_root
BOX=system-$$
box() { "$ROOT/scripts/box.sh" "$@"; }
root() { box run "$BOX" "$@"; }
mkdir -p "$LOGS"

finish() { box down "$BOX" >/dev/null 2>&1 || true; lab_down >/dev/null 2>&1 || true; }
trap finish EXIT
trap 'exit 130' INT TERM

why=
for tool in systemd-nspawn mmdebstrap nsenter; do command -v "$tool" >/dev/null || why="$tool is not installed"; done
[ -z "$why" ] || { skipped "everything on a real systemd" "$why"; say "0 passed, 0 failed, 1 skipped"; exit 0; }
if ! box build >"$LOGS/box-build.log" 2>&1; then
  skipped "everything on a real systemd" "no root for it could be made: $(tail -n 1 "$LOGS/box-build.log")"; say "0 passed, 0 failed, 1 skipped"; exit 0
fi
[ -n "${PROXYVPN_BIN_DIR:-}" ] || build_release >"$LOGS/release-build.log" 2>&1 || { failed "release build"; tail -n 40 "$LOGS/release-build.log"; summary; exit 1; }
bin=${PROXYVPN_BIN_DIR:-$(target_dir)/release}
if ! box up "$BOX" >"$LOGS/box-up.log" 2>&1; then
  skipped "everything on a real systemd" "systemd-nspawn does not boot here: $(tail -n 1 "$LOGS/box-up.log")"; say "0 passed, 0 failed, 1 skipped"; exit 0
fi

# ---- the network: the lab's far end, and a wire into the box
image=${PROXYVPN_TORVM_IMAGE:-$(target_dir)/torvm-image} no_tor=
for tool in qemu-system-x86_64 tor; do command -v "$tool" >/dev/null || no_tor="$tool is not installed"; done
[ -e "$image/manifest.json" ] || no_tor="there is no image (scripts/build-torvm-image.sh)"
if [ -z "$no_tor" ]; then with_tor=--tor; else with_tor=; fi

lab_net_up $with_tor || { failed "the lab's far end"; summary; exit 1; }
leader=$(box leader "$BOX")
nsenter -t "$(lab_pid net)" -n ip link add wan0 type veth peer name eth0 netns "$leader" && : >"$LAB/wired"
await_ready net
root sh -c "sysctl -qw net.ipv6.conf.eth0.accept_dad=0; ip addr add $LAB_APP4/24 dev eth0; ip -6 addr add $LAB_APP6/64 dev eth0 nodad; ip link set eth0 up; ip link set lo up
  ip route add default via $LAB_GW4; ip -6 route add default via $LAB_GW6; rm -f /etc/resolv.conf; echo nameserver $LAB_DNS >/etc/resolv.conf" </dev/null
nsenter -t "$leader" -m sh -c 'cat >/etc/lab-ca.pem' <"$LAB/ca.pem"

fetch() { root curl -sS --max-time 15 --cacert /etc/lab-ca.pem "$1" </dev/null; }
through_proxy() { fetch "$1" | grep "you are .*$LAB_WEB"; }
direct_syns() { lab_wire "(src host $LAB_APP4 or src host $LAB_APP6) and (dst host $LAB_WEB or dst host $LAB_WEB6)" | wc -l; }
network() {
  nsenter -t "$leader" -a sh -c 'for f in -4 -6; do ip $f rule; ip $f route show table all | sed -E "s/ expires [0-9]+sec//" | sort; done; ip -o link | cut -d: -f2-
    nft list ruleset; { grep -rs "" /proc/sys/net/ipv4/conf /proc/sys/net/ipv6/conf || true; } | grep -v secret | sort'
}
files() { # what an installation could leave; not what a running system writes by itself
  nsenter -t "$leader" -a sh -c 'find /etc /usr /var/lib /opt /run/systemd/system /run/proxyvpn /home -xdev \( -path /etc/lab-ca.pem -o -name "*.cache" -o -path "/etc/*-" \
    -o -path /var/lib/systemd/random-seed -o -path "/var/lib/systemd/timers*" -o -path "/var/lib/systemd/catalog*" -o -path "/var/lib/private*" \) -prune -o ! -type d -print 2>/dev/null | sort
    find /etc /usr /var/lib -xdev -type d -name "*proxyvpn*" | sort
    cat /etc/passwd /etc/group; systemctl list-unit-files --no-legend --no-pager | awk "{print \$1, \$2}" | grep -v "^session-\|^run-"'
}
state_of() { box as "$BOX" alice proxyctl status --json </dev/null | python3 -c 'import json,sys; print(json.load(sys.stdin)["state"])'; }
is_state() { local got; got=$(state_of); [ "$got" = "$1" ] || { echo "state is '$got', not '$1'"; box as "$BOX" alice proxyctl status </dev/null; root journalctl -u proxyvpnd -n 20 --no-pager; return 1; }; }
status_of() { local want=$1 got=0; shift; "$@" </dev/null || got=$?; [ "$got" = "$want" ] || { echo "exit code $got, not $want"; return 1; }; }
# kill_main SIGNAL: never with an empty or zero number, which would mean somebody else
kill_main() { local pid; pid=$(main_pid); [ "${pid:-0}" -gt 1 ] || { echo "the daemon does not run"; return 1; }; root kill "-$1" "$pid" </dev/null; }
main_pid() { root systemctl show -P MainPID proxyvpnd.service </dev/null; }

# shellcheck source=tests/system/qemu.sh
. "$ROOT/tests/system/qemu.sh"

# udev gives the wire a MAC address of its own, and the kernel one that follows from it; neither may come between two state texts
root udevadm settle --timeout 10 </dev/null
link_local() { [ -n "$(root ip -6 addr show dev eth0 scope link </dev/null)" ]; }
wait_for 5 link_local || failed "eth0 has no link-local address"
if command -v qemu-system-x86_64 >/dev/null; then copy_qemu >"$LOGS/box-qemu.log" 2>&1 || failed "QEMU in the box"; fi
files >"$LOGS/files.before"; network >"$LOGS/network.before"

# ---- install
copy_in() {
  tar -C "$ROOT" --exclude=./target --exclude=./.git -c . | nsenter -t "$leader" -a sh -c 'mkdir -p /run/src && tar -x -C /run/src --no-same-owner'
  tar -C "$bin" -c proxyvpnd proxyctl proxyvpn-qemu | nsenter -t "$leader" -a sh -c 'mkdir -p /run/src/bin && tar -x -C /run/src/bin --no-same-owner'
  [ -n "$no_tor" ] || tar -C "$image" -c . | nsenter -t "$leader" -a sh -c 'mkdir -p /run/src/image && tar -x -C /run/src/image --no-same-owner'
}
check "the sources are in the box" copy_in
if ! check "install.sh" root /run/src/scripts/install.sh --bin-dir /run/src/bin ${with_tor:+--torvm-image /run/src/image}; then summary; exit 1; fi
check "install.sh again changes nothing and succeeds" root /run/src/scripts/install.sh --quiet --bin-dir /run/src/bin ${with_tor:+--torvm-image /run/src/image}
user_made() { root sh -c 'id proxyvpn && id proxyvpn-qemu && [ "$(stat -c "%a %U" /etc/proxyvpn/profiles.d)" = "755 root" ]'; }
check "its users and folder are there" user_made

# ---- activation
not_running() { [ "$(root systemctl is-active proxyvpnd.service </dev/null)" = inactive ]; }
check "the daemon does not run before it is called" not_running
check "a user who is not root starts it by calling (D-Bus activation)" box as "$BOX" alice proxyctl status
running() { root systemctl is-active proxyvpnd.service; }
check "systemd started it" running
own_user() {
  local pid; pid=$(main_pid)
  root grep -E '^(Uid|CapEff|CapBnd|NoNewPrivs)' "/proc/$pid/status"
  [ "$(root stat -c %U "/proc/$pid" </dev/null)" = proxyvpn ] && root grep -q '^CapEff:.*0000000000001000$' "/proc/$pid/status" </dev/null
}
check "it runs as its own user with CAP_NET_ADMIN and no other capability" own_user
score() {
  local value; value=$(root systemd-analyze security --no-pager proxyvpnd.service </dev/null | sed -n 's/.*Overall exposure level.*: \([0-9.]*\) .*/\1/p')
  echo "systemd-analyze security: $value"; [ -n "$value" ] && version_ge 2.0 "$value"
}
check "systemd-analyze security gives 2.0 or better" score
check "systemctl enable --now" root systemctl enable --now proxyvpnd.service

# ---- QEMU's unit
qemu_checks

# ---- polkit rules by group
profiles() {
  root sh -c "umask 077; printf '%s' '$LAB_PROXY_PASSWORD' >/etc/proxyvpn/password; chown root:proxyvpn /etc/proxyvpn/password; chmod 640 /etc/proxyvpn/password
    umask 022; printf 'backend = \"proxy\"\n[upstream]\nurl = \"http://$LAB_PROXY_USER@proxy.lab.test:3128\"\npassword-file = \"/etc/proxyvpn/password\"\n' >/etc/proxyvpn/profiles.d/lab.toml"
  listed() { box as "$BOX" alice proxyctl profile list </dev/null | grep -w lab; }
  wait_for 5 listed
}
check "a profile that the administrator writes is listed" profiles
check "polkit refuses a user without a rule (exit code 4)" status_of 4 box as "$BOX" alice proxyctl connect lab
group_rule() {
  root sh -c 'install -D -m 644 /usr/share/doc/proxyvpn/examples/proxyvpn-group.rules /etc/polkit-1/rules.d/50-proxyvpn-group.rules; chmod 755 /etc/polkit-1/rules.d
    group=$(sed -n "s/.*isInGroup(\"\([^\"]*\)\").*/\1/p" /etc/polkit-1/rules.d/50-proxyvpn-group.rules); getent group "$group" >/dev/null || groupadd "$group"
    usermod -aG "$group" alice'
  # systemd-run makes $ of $$
  allowed() { box as "$BOX" alice sh -c 'pkcheck --action-id org.proxyvpn1.connect --process $$$$' </dev/null; }
  wait_for 20 allowed
}
check "the sample rule for a group" group_rule
check "a member of the group connects" box as "$BOX" alice proxyctl connect lab
check "connected" is_state connected
no_secret() { ! box as "$BOX" alice cat /etc/proxyvpn/password </dev/null; }
check "a member of the group cannot read the proxy's password" no_secret
check "a user who is not in the group is refused (exit code 4)" status_of 4 box as "$BOX" bob proxyctl disconnect
check "http through the proxy" through_proxy http://web.lab.test/
check "https through the proxy" through_proxy https://web.lab.test/

# ---- systemd-resolved
if nsenter -t "$leader" -a sh -c 'command -v resolvectl' >/dev/null; then
  # shellcheck source=scripts/test-resolved.sh
  . "$ROOT/scripts/test-resolved.sh"
else skipped "systemd-resolved" "the distribution has no such package"; fi

# ---- what kills it
replaced_by() { # ACTION...: it replaces the daemon while programs connect all the time, and none of their packets goes around
  local pid new before; before=$(direct_syns); pid=$(main_pid)
  nsenter -t "$leader" -a sh -c 'for i in $(seq 60); do curl -s --max-time 0.2 http://203.0.113.80/ >/dev/null; done' &
  local load=$!
  "$@" </dev/null || { kill "$load"; return 1; }
  restarted() { new=$(main_pid); [ "$new" != 0 ] && [ "$new" != "$pid" ]; }
  wait_for 10 restarted || { echo "not restarted"; return 1; }
  wait "$load"
  [ "$(direct_syns)" = "$before" ] || { echo "packets went around the tunnel:"; lab_wire "dst host $LAB_WEB" | tail -n 5; return 1; }
}
check "kill -9: systemd starts it again, and nothing goes around the tunnel meanwhile" replaced_by kill_main KILL
back() { connected() { [ "$(state_of)" = connected ]; }; wait_for 20 connected || is_state connected; }
check "it goes on with the connection" back
check "http through the proxy after kill -9" through_proxy http://web.lab.test/
kills=${PROXYVPN_KILLS:-20}
stream_seen() { lab_wire "src host $LAB_APP4 and udp dst port 9000" | wc -l; }
stream() { # until /run/stream is gone: some thousand datagrams each second, one socket each
  nsenter -t "$leader" -a timeout 600 bash -c ": >/run/stream; while [ -e /run/stream ]; do echo probe >/dev/udp/$LAB_WEB/9000; done" 2>/dev/null
}
end_stream() { root rm -f /run/stream </dev/null; wait "$1"; }
killed_in_a_stream() { # each kill at another moment of the daemon's start
  local before sent i pid load signal; before=$(stream_seen)
  stream & load=$!
  for ((i = 0; i < kills; i++)); do
    pid=$(main_pid); signal=$( ((i % 2)) && echo SEGV || echo KILL)
    started() { [ "$(main_pid)" != "$pid" ] && [ "$(main_pid)" != 0 ]; }
    # Rust's handler takes the first SIGSEGV that comes from outside for a fault that will come again
    if ! kill_main "$signal" || { [ "$signal" = SEGV ] && sleep 0.05 && ! root kill -SEGV "$pid" </dev/null; } || ! wait_for 10 started; then end_stream "$load"; echo "kill $i: not started again"; return 1; fi
    sleep "0.$((RANDOM % 6))"
  done
  root nft list table inet proxyvpn </dev/null | grep owner >/dev/null || { end_stream "$load"; echo "the firewall's table has no owner"; return 1; }
  root nft flush ruleset </dev/null; sleep 0.2
  end_stream "$load"
  sent=$(($(stream_seen) - before))
  echo "$kills kills, $sent datagrams got out"
  [ "$sent" = 0 ]
}
stream_is_seen() {
  stream & local load=$!
  sleep 1; end_stream "$load"
  [ "$(stream_seen)" -gt 100 ] || { echo "the sniffer saw only $(stream_seen) datagrams"; return 1; }
}
check "kill -9 and SIGSEGV $kills times and a flush of all rules, in a stream of datagrams: none gets out" killed_in_a_stream
check "it goes on with the connection after all of them" back
check "systemctl restart: nothing goes around the tunnel meanwhile" replaced_by root systemctl restart proxyvpnd.service
check "it goes on with the connection after a restart" back
watchdog() {
  [ "$(root systemctl show -P WatchdogUSec proxyvpnd.service </dev/null)" = 30s ] || { echo "WatchdogSec is not 30"; return 1; }
  root sh -c 'mkdir -p /run/systemd/system/proxyvpnd.service.d; printf "[Service]\nWatchdogSec=3\n" >/run/systemd/system/proxyvpnd.service.d/test.conf; systemctl daemon-reload; systemctl restart proxyvpnd.service' </dev/null
  local pid new; pid=$(main_pid); sleep 5
  [ "$(main_pid)" = "$pid" ] || { echo "a daemon that lives was killed by its watchdog"; return 1; }
  kill_main STOP || return 1
  replaced() { new=$(main_pid); [ "$new" != 0 ] && [ "$new" != "$pid" ]; }
  wait_for 25 replaced || { echo "a daemon that hangs was not replaced"; return 1; }
  root sh -c 'rm -r /run/systemd/system/proxyvpnd.service.d; systemctl daemon-reload; systemctl restart proxyvpnd.service' </dev/null
}
check "the watchdog replaces a daemon that hangs, and leaves one that lives alone" watchdog
check "it goes on with the connection after that and after systemctl restart" back

# ---- lockdown
# shellcheck source=tests/system/lockdown.sh
. "$ROOT/tests/system/lockdown.sh"

# ---- Tor in a virtual machine
# shellcheck source=tests/system/torvm.sh
. "$ROOT/tests/system/torvm.sh"
if [ -z "$no_tor" ]; then tor_checks; else skipped "Tor in a virtual machine" "$no_tor"; fi

# ---- the end
stop() { root systemctl stop proxyvpnd.service </dev/null; network >"$LOGS/network.after"; diff "$LOGS/network.before" "$LOGS/network.after"; }
check "systemctl stop while connected leaves the network as it was" stop
check "anti-test: without a connection the stream is seen" stream_is_seen
stop_killed() { # stopped although it does not react: systemd kills it, ExecStopPost cleans up
  root systemctl start proxyvpnd.service </dev/null; box as "$BOX" alice proxyctl connect lab </dev/null || return 1
  root sh -c 'mkdir -p /run/systemd/system/proxyvpnd.service.d; printf "[Service]\nTimeoutStopSec=2\n" >/run/systemd/system/proxyvpnd.service.d/test.conf; systemctl daemon-reload' </dev/null
  kill_main STOP || return 1
  root systemctl stop proxyvpnd.service </dev/null
  root sh -c 'rm -r /run/systemd/system/proxyvpnd.service.d; systemctl daemon-reload' </dev/null
  network >"$LOGS/network.after"; diff "$LOGS/network.before" "$LOGS/network.after"
}
check "systemctl stop of a daemon that hangs does so too" stop_killed
rounds=${PROXYVPN_ROUNDS:-4}
again_and_again() { # ACTION: PROXYVPN_ROUNDS times, each time leaving the network as it was
  local round
  for ((round = 1; round <= rounds; round++)); do
    if ! "$@" "$round"; then echo "round $round of $rounds"; return 1; fi
    network >"$LOGS/network.after"
    if ! diff "$LOGS/network.before" "$LOGS/network.after"; then echo "after round $round of $rounds"; return 1; fi
  done
}
stopped() { # every second time just after kill -9, before the next daemon has gone on
  root systemctl start proxyvpnd.service </dev/null && box as "$BOX" alice proxyctl connect lab </dev/null || return 1
  (($1 % 2)) || kill_main KILL || return 1
  root systemctl stop proxyvpnd.service </dev/null
}
check "$rounds times systemctl stop while connected, half of them after kill -9" again_and_again stopped
removed() {
  root systemctl start proxyvpnd.service </dev/null && box as "$BOX" alice proxyctl connect lab </dev/null || return 1
  (($1 % 2)) || kill_main KILL || return 1
  root /run/src/scripts/install.sh --quiet --uninstall </dev/null || return 1
  network >"$LOGS/network.removed"; diff "$LOGS/network.before" "$LOGS/network.removed" || return 1
  root /run/src/scripts/install.sh --quiet --bin-dir /run/src/bin </dev/null
}
check "$rounds times removed while connected, half of them after kill -9, and installed again" again_and_again removed
uninstall_connected() {
  root systemctl start proxyvpnd.service </dev/null; box as "$BOX" alice proxyctl connect lab </dev/null || return 1
  root proxyctl lockdown on </dev/null || return 1
  root /run/src/scripts/install.sh --uninstall --purge </dev/null || return 1
  network >"$LOGS/network.after"; diff "$LOGS/network.before" "$LOGS/network.after"
}
check "uninstall while connected and under lockdown: the network is as it was" uninstall_connected
no_trace() {
  root sh -c 'rm -f /etc/polkit-1/rules.d/50-proxyvpn-group.rules; groupdel proxyvpn-users' </dev/null # the administrator's own
  files >"$LOGS/files.after"; diff "$LOGS/files.before" "$LOGS/files.after"
}
check "uninstall leaves no file, user, group or unit" no_trace
summary
