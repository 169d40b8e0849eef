# shellcheck shell=bash disable=SC2016,SC2154,SC2317  # for scripts/test-system.sh; expanded in the box; functions that `check` calls
# The torvm backend on a real systemd: QEMU in its unit, Tor of a private network, and what becomes of both when the daemon ends.

tor_profile() {
  python3 - "$LAB/tor/network.json" <<'PYTHON' | root sh -c 'umask 022; cat >/etc/proxyvpn/profiles.d/tor.toml'
import json, sys
print('backend = "torvm"\n[torvm]\nmemory-mib = 128\naccel = "tcg"\ntesting = true\ndirectory-authorities =', json.dumps(json.load(open(sys.argv[1]))["authorities"]))
PYTHON
  tor_listed() { box as "$BOX" alice proxyctl profile list </dev/null | grep -w tor; }
  wait_for 5 tor_listed
}
tor_connects() { box as "$BOX" alice proxyctl connect tor --timeout 120 </dev/null && is_state connected; }
by_exit() { # the server sees an exit, and on the wire are relays only
  local exits before; exits=$(python3 -c 'import json,sys; print("|".join(json.load(open(sys.argv[1]))["exits"]).replace(".", "[.]"))' "$LAB/tor/network.json")
  before=$(direct_syns)
  fetch "$1" | grep -E "you are (::ffff:)?($exits)" || { echo "no exit was seen"; return 1; }
  [ "$(direct_syns)" = "$before" ] || { echo "packets went around Tor"; return 1; }
}
same_vm() { # ACTION...: the virtual machine outlives it, and carries on
  local before after; before=$(qemu_pid); [ "${before:-0}" -gt 1 ] || { echo "no QEMU runs"; return 1; }
  "$@" || return 1
  back || return 1
  after=$(qemu_pid); [ "$after" = "$before" ] || { echo "QEMU was $before and is ${after:-none}"; return 1; }
  # Tor finds out with the next packet that its connections are gone
  reached() { by_exit http://web.lab.test/; }
  wait_for 30 reached
}
kill_qemu() {
  local pid; pid=$(qemu_pid); [ "${pid:-0}" -gt 1 ] || { echo "no QEMU runs"; return 1; }
  root kill -KILL "$pid" </dev/null
  blocked() { [ "$(state_of)" != connected ]; }
  wait_for 5 blocked || { echo "its end was not noticed"; return 1; }
  again() { [ "$(state_of)" = connected ]; }
  wait_for 120 again || is_state connected
}
no_qemu() { [ -z "$(qemu_pid)" ] && [ -z "$(root systemctl list-units --plain --no-legend 'proxyvpn-qemu@*.service' </dev/null)" ]; }
disk_clean() { # nothing of its journal is left to be written back
  nsenter -t "$leader" -m cat /var/lib/proxyvpn/state.img >"$LOGS/state.img"
  local said; said=$(e2fsck -fn "$LOGS/state.img" 2>&1); local clean=$?
  rm -f "$LOGS/state.img"; echo "$said"; [ "$clean" = 0 ] && ! grep -q recovery <<<"$said"
}
stopped_for_good() {
  root systemctl stop proxyvpnd.service </dev/null
  wait_for 10 no_qemu || { echo "QEMU runs on"; return 1; }
  disk_clean || return 1
  network >"$LOGS/network.after"; diff "$LOGS/network.before" "$LOGS/network.after"
}
orderly() { # the guest powers off, and its disk is clean
  box as "$BOX" alice proxyctl disconnect </dev/null || return 1
  wait_for 5 no_qemu || { echo "QEMU runs on"; return 1; }
  disk_clean
}
tor_checks() {
  box as "$BOX" alice proxyctl disconnect </dev/null >/dev/null
  await_tor; tor_profile || return 1
  check "a member of the group connects through Tor" tor_connects || { root journalctl -u proxyvpnd -u 'proxyvpn-qemu@*' -n 60 --no-pager </dev/null; return 1; }
  check "the server sees an exit, by address and by name" eval 'by_exit http://$LAB_WEB/ && by_exit http://web.lab.test/'
  check "the QEMU that runs Tor has no network, no right and no file of the machine" qemu_holds_nothing
  check "kill -9 of the daemon: the virtual machine carries on, and no datagram of a stream gets out" in_stream same_vm kill_main KILL
  check "systemctl restart: the virtual machine carries on, and no datagram of a stream gets out" in_stream same_vm root systemctl restart proxyvpnd.service
  check "kill -9 of QEMU: another one comes, and no datagram of a stream gets out" in_stream kill_qemu
  check "disconnect: the virtual machine powers off with a clean disk" orderly
  check "it connects again" tor_connects
  check "systemctl stop: the virtual machine powers off with a clean disk, and the network is as it was" stopped_for_good
  root systemctl start proxyvpnd.service </dev/null; connect_again
}
