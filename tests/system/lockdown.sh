# shellcheck shell=bash disable=SC2016,SC2154,SC2317  # for scripts/test-system.sh, while connected; expanded in the box; functions that `check` calls
# Lockdown with its unit: nothing leaves without a connection, whatever becomes of the daemon, and not after a reboot either.

LOCK=proxyvpn-lock.service
lock_is() { [ "$(root systemctl is-active $LOCK </dev/null)" = "$1" ] || { root systemctl status $LOCK --no-pager </dev/null; return 1; }; }
way_out() { # what the sniffer saw of the box meanwhile, but for the proxy, name resolution and neighbours
  lab_wire "(src host $LAB_APP4 or src host $LAB_APP6) and (dst host $LAB_WEB or dst host $LAB_WEB6)"
}
attempts() {
  nsenter -t "$leader" -a bash -c "for i in 1 2 3; do
    for to in $LAB_WEB $LAB_WEB6; do echo probe >/dev/udp/\$to/9001; timeout 0.3 bash -c \"echo >/dev/tcp/\$to/80\"; done; sleep 0.05
  done" 2>/dev/null
  sleep 0.1
}
closed() {
  local before; before=$(way_out | wc -l); attempts
  [ "$(way_out | wc -l)" = "$before" ] || { echo "packets went out:"; way_out | tail -n +"$((before + 1))" | head -n 5; return 1; }
}
open() { local before; before=$(way_out | wc -l); attempts; [ "$(way_out | wc -l)" -gt $((before + 10)) ] || { echo "nothing goes out"; return 1; }; }
no_lock() { ! root nft list table inet proxyvpn-lock </dev/null 2>/dev/null; }

lock_on() {
  root proxyctl lockdown on || return 1
  if ! lock_is active || ! root nft list table inet proxyvpn-lock </dev/null | grep owner >/dev/null; then
    echo "no lock that belongs to its unit"; root systemctl status $LOCK --no-pager </dev/null; return 1
  fi
  [ "$(root systemctl show -P MainPID $LOCK </dev/null)" = 0 ] || { echo "the lock has a process"; return 1; }
  ! root proxyctl status </dev/null | grep lockdown-
}
check "a member of the group may not turn lockdown on (exit code 4)" status_of 4 box as "$BOX" alice proxyctl lockdown on
check "lockdown on: a unit without a process owns the lock" lock_on
check "connected under lockdown: http and https through the proxy" eval 'through_proxy http://web.lab.test/ && through_proxy https://web.lab.test/'
check "connected under lockdown: nothing goes around the tunnel" closed

not_removable() {
  root sh -c 'nft flush ruleset; ! nft delete table inet proxyvpn-lock 2>/dev/null; ! nft flush table inet proxyvpn-lock 2>/dev/null' </dev/null && closed
}
check "a flush of all rules passes over the lock, and root cannot delete it" not_removable
in_stream() { # ACTION...: with a stream of datagrams that begins before and ends after it, none of which gets out
  local before load status=0; before=$(stream_seen)
  stream & load=$!
  sleep 0.3; "$@" || status=1; sleep 0.5
  end_stream "$load"
  [ "$(stream_seen)" = "$before" ] || { echo "$(($(stream_seen) - before)) datagrams got out"; return 1; }
  return "$status"
}
stop_and_start() { root systemctl stop proxyvpnd.service </dev/null && sleep 0.5 && closed && root systemctl start proxyvpnd.service </dev/null; }
check "systemctl stop, a while, and start: no datagram of a stream gets out" in_stream stop_and_start
connect_again() { box as "$BOX" alice proxyctl connect lab </dev/null && is_state connected && through_proxy http://web.lab.test/; }
check "a stopped daemon forgets the connection, not lockdown; it connects again" eval 'box as "$BOX" alice proxyctl lockdown </dev/null | grep "is on" && connect_again'
killed() { kill_main KILL && sleep 1 && back; }
check "kill -9: no datagram of a stream gets out" in_stream killed
fails() { # the daemon cannot start any more, and systemd gives up
  root sh -c 'mkdir -p /run/systemd/system/proxyvpnd.service.d; printf "[Unit]\nStartLimitIntervalSec=60\nStartLimitBurst=2\n[Service]\nExecStart=\nExecStart=/bin/false\n" >/run/systemd/system/proxyvpnd.service.d/test.conf; systemctl daemon-reload' </dev/null
  kill_main KILL || return 1
  failed_for_good() { [ "$(root systemctl is-active proxyvpnd.service </dev/null)" = failed ]; }
  wait_for 10 failed_for_good && closed
}
check "a daemon that fails for good: no datagram of a stream gets out" in_stream fails
check "it works again" eval 'root sh -c "rm -r /run/systemd/system/proxyvpnd.service.d; systemctl daemon-reload; systemctl reset-failed proxyvpnd.service; systemctl start proxyvpnd.service" </dev/null && { back || connect_again; }'

disconnect() { box as "$BOX" alice proxyctl disconnect </dev/null | grep "lockdown is on" && closed; }
check "disconnected under lockdown: nothing leaves" disconnect

# ---- what the daemon's user may ask of systemd
systemd_says() { box as "$BOX" proxyvpn busctl call org.freedesktop.systemd1 /org/freedesktop/systemd1 org.freedesktop.systemd1.Manager "$@" </dev/null 2>&1; }
start_and_stop_only() {
  systemd_says StartUnit ss $LOCK replace | grep job >/dev/null || { echo "it may not start the lock"; return 1; }
  local call
  while read -r call; do
    # shellcheck disable=SC2086
    if systemd_says $call | grep -v "authoriz\|authentic\|denied\|already loaded\|not permitted" >/dev/null; then echo "allowed: $call: $(systemd_says $call)"; return 1; fi
  done <<END
RestartUnit ss $LOCK replace
ReloadOrRestartUnit ss $LOCK replace
StartUnit ss proxyvpnd.service replace
StopUnit ss dbus.service replace
StartUnit ss proxyvpn-lock@x.service replace
KillUnit ssi $LOCK all 9
SetUnitProperties sba(sv) $LOCK true 0
DisableUnitFiles asb 1 $LOCK false
MaskUnitFiles asbb 1 $LOCK false true
StartTransientUnit ssa(sv)a(sa(sv)) $LOCK replace 1 ExecStart a(sasb) 1 /bin/touch 2 /bin/touch /run/owned false 0
StartTransientUnit ssa(sv)a(sa(sv)) proxyvpn-lock2.service replace 1 ExecStart a(sasb) 1 /bin/touch 2 /bin/touch /run/owned false 0
END
  if root test -e /run/owned </dev/null; then echo "a unit of its own ran as root"; return 1; fi
}
check "the daemon's user may start and stop that unit, and nothing else" start_and_stop_only

# ---- reboot
sender() { # sends from the moment on at which network services may start, until they are stopped
  root sh -c 'cat >/etc/systemd/system/test-sender.service && systemctl daemon-reload && systemctl enable --quiet test-sender.service' <<END
[Unit]
DefaultDependencies=no
After=network-pre.target
Conflicts=shutdown.target
Before=shutdown.target
[Service]
ExecStart=/bin/bash -c 'while sleep 0.02; do echo probe >/dev/udp/$LAB_WEB/9000; done'
StandardError=null
[Install]
WantedBy=sysinit.target
END
}
reboot_box() { # the wire stays; tables that a reboot would take are taken
  nsenter -t "$leader" -n sleep 300 & local holder=$!
  sleep 0.2
  root systemctl disable --quiet proxyvpnd.service </dev/null
  box reboot "$BOX" "/proc/$holder/ns/net" || { kill "$holder"; return 1; }
  leader=$(box leader "$BOX"); kill "$holder"
}
in_time() { # the lock was there before anything that waits for the network
  local lock pre; lock=$(root systemctl show -P ActiveEnterTimestampMonotonic $LOCK </dev/null); pre=$(root systemctl show -P ActiveEnterTimestampMonotonic network-pre.target </dev/null)
  echo "lock at $lock us, network-pre.target at $pre us"; [ "$lock" -gt 0 ] && [ "$lock" -le "$pre" ]
}
boot_locked() {
  local before; before=$(stream_seen)
  if ! sender || ! reboot_box || ! lock_is active || ! in_time; then root systemctl status $LOCK --no-pager </dev/null; return 1; fi
  [ "$(root systemctl is-active proxyvpnd.service </dev/null)" = inactive ] || { echo "the daemon runs: not what is to be shown"; return 1; }
  [ "$(root systemctl is-active test-sender.service </dev/null)" = active ] || { echo "nothing was sent"; return 1; }
  closed || return 1
  [ "$(stream_seen)" = "$before" ] || { echo "$(($(stream_seen) - before)) datagrams got out"; return 1; }
}
check "systemd finds no fault with the unit" root systemd-analyze verify --man=no $LOCK
check "a reboot: closed before network services start, without the daemon" boot_locked
check "it connects after the reboot" connect_again
autoconnect() {
  local before; before=$(stream_seen)
  root sh -c 'sed -i "1i autoconnect = true" /etc/proxyvpn/profiles.d/lab.toml; systemctl enable --quiet proxyvpnd.service' </dev/null
  nsenter -t "$leader" -n sleep 300 & local holder=$!
  sleep 0.2
  box reboot "$BOX" "/proc/$holder/ns/net"; leader=$(box leader "$BOX"); kill "$holder"
  back && through_proxy http://web.lab.test/ && lock_is active || return 1
  [ "$(stream_seen)" = "$before" ] || { echo "$(($(stream_seen) - before)) datagrams got out"; return 1; }
  root sed -i 1d /etc/proxyvpn/profiles.d/lab.toml </dev/null
}
check "a reboot with autoconnect: connected, and no datagram gets out before" autoconnect
unlocked() {
  root proxyctl lockdown off && no_lock && lock_is inactive && ! root test -e /var/lib/proxyvpn/lockdown </dev/null || return 1
  box as "$BOX" alice proxyctl disconnect </dev/null; open
}
check "lockdown off and disconnected: the network is open, and nothing of the lock is left" unlocked
boot_open() {
  local before; before=$(stream_seen)
  reboot_box && lock_is inactive && no_lock || return 1
  [ "$(stream_seen)" -gt $((before + 10)) ] || { echo "the sniffer does not see the sender"; return 1; }
  root sh -c 'systemctl disable --quiet --now test-sender.service; rm /etc/systemd/system/test-sender.service; systemctl daemon-reload' </dev/null
}
check "anti-test: a reboot without lockdown, and the sender is seen" boot_open
rescued() {
  root proxyctl lockdown on </dev/null && closed || return 1
  root proxyctl rescue </dev/null | grep "lockdown was on and is off now" || return 1
  no_lock && lock_is inactive && ! root test -e /var/lib/proxyvpn/lockdown </dev/null && open
}
check "rescue turns lockdown off, and says so" rescued
check "after rescue it connects as before" eval 'copy_in && root systemctl enable --quiet --now proxyvpnd.service </dev/null && connect_again'
