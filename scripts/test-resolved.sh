# shellcheck shell=bash
# Sourced by test-system.sh while the profile `lab` is connected, and leaves it so: a real systemd-resolved with its stub (127.0.0.53)
# and the uplink's own DNS server. Uses box, root, check and the lab of test-system.sh.
# shellcheck disable=SC2016,SC2154,SC2317  # expanded in the box; variables and functions of test-system.sh; called by `check`

DNS2=198.51.100.54 # answers what a test wants at the moment
inside() { nsenter -t "$leader" -a "$@"; }
as_alice() { box as "$BOX" alice "$@" </dev/null; }
dns2() { # dns2 ADDRESS: change.lab.test is ADDRESS from now on, for an hour
  dns2_end
  local options=() n
  # an answer that does not fit into a datagram
  for n in $(seq 20); do options+=("--txt-record=big.lab.test,$(printf "$n%.0s" $(seq 100))"); done
  lab_exec net setsid dnsmasq --keep-in-foreground --conf-file=/dev/null --no-resolv --no-hosts --addn-hosts="$LAB/hosts" --local=/test/ --user=root --pid-file= \
    --listen-address="$DNS2" --bind-interfaces --local-ttl=3600 --address="/change.lab.test/$1" "${options[@]}" >>"$LOGS/dns2.log" 2>&1 &
  DNS2_PID=$!
  answers() { lab_exec net ss -Hltn | grep "$DNS2:53 " >/dev/null; }
  wait_for 5 answers || { echo "the second DNS server does not listen"; tail -n 5 "$LOGS/dns2.log"; return 1; }
}
dns2_end() {
  [ -n "${DNS2_PID:-}" ] || return 0
  # the server is the child of nsenter's place, in a group of its own
  local pid; for pid in $(pgrep -f -- "--listen-address=$DNS2 "); do
    if tr '\0' '\n' <"/proc/$pid/environ" | grep -x "PVLAB_ID=$PVLAB_ID" >/dev/null; then kill "$pid"; fi
  done
  wait "$DNS2_PID" 2>/dev/null; DNS2_PID=
}
resolved_up() {
  lab_exec net ip addr add "$DNS2/32" dev lo; dns2 203.0.113.1 || return 1
  as_alice proxyctl disconnect || return 1
  # the link first: systemd-resolved takes servers of a plain file for its own
  inside sh -c 'mv /etc/resolv.conf /run/resolv.conf.before; ln -s ../run/systemd/resolve/stub-resolv.conf /etc/resolv.conf; systemctl start systemd-resolved'
  inside sh -c "resolvectl dns eth0 $DNS2; resolvectl domain eth0 '~.'"
  known() { inside grep -q "^nameserver $DNS2" /run/systemd/resolve/resolv.conf; }
  wait_for 5 known
}
resolved_state() {
  inside sh -c 'ls -l /etc/resolv.conf | sed "s/.*resolv.conf ->/->/"; cat /etc/resolv.conf /run/systemd/resolve/resolv.conf; for what in dns domain default-route llmnr mdns dnsovertls dnssec nta; do
    resolvectl $what | grep -v "(pvpn0)"; done; ls /run/systemd/resolve/netif; cat /run/systemd/resolve/netif/*'
}
# timed LIMIT CMD...: prints how long CMD took in the box; more than LIMIT milliseconds, or a failure, fails
timed() {
  local limit=$1 start end; shift
  start=$(date +%s%N); inside timeout 30 "$@" || { echo "$*: failed after $((($(date +%s%N) - start) / 1000000)) ms"; return 1; }
  end=$(date +%s%N)
  echo "$*: $(((end - start) / 1000000)) ms"
  [ $(((end - start) / 1000000)) -le "$limit" ] || { echo "more than $limit ms"; return 1; }
}
changed() { inside getent ahostsv4 change.lab.test | grep "^$1 " >/dev/null; }

check "systemd-resolved runs, with its stub in /etc/resolv.conf and the uplink's DNS server" resolved_up
resolved_state >"$LOGS/resolved.before" 2>&1
cached() { # the anti-test of the next: without a flush the old answer stays
  changed 203.0.113.1 || { inside getent ahostsv4 change.lab.test; return 1; }
  dns2 203.0.113.2 && changed 203.0.113.1
}
check "anti-test: an answer of before is in its cache" cached
check "connect with systemd-resolved" as_alice proxyctl connect lab
server_found() { as_alice proxyctl status --json | grep "\"$DNS2\"" >/dev/null && ! as_alice proxyctl status | grep -i 'dns server'; }
check "the server behind the stub is found and let through" server_found
check "its cache was flushed at connect: the new answer is there" changed 203.0.113.2
lookups() {
  local round
  inside resolvectl flush-caches
  for round in first second; do
    echo "$round:"
    timed 500 getent ahostsv4 web.lab.test && timed 500 getent ahostsv6 web6.lab.test && timed 500 resolvectl query --type=AAAA web6.lab.test && timed 500 getent ahosts web.lab.test || return 1
  done
}
check "look-ups do not stall while connected, A and AAAA, first and second" lookups
check "http by name through the proxy" through_proxy http://web.lab.test/
big() { inside resolvectl flush-caches; timed 1000 resolvectl query --type=TXT big.lab.test | tail -n 1; lab_wire "host $DNS2 and tcp port 53" | grep "$DNS2.53: Flags \[S\]" >/dev/null; }
check "an answer that does not fit into a datagram comes over TCP" big
nothing() { # NAME LIMIT: told within so many milliseconds that nobody has the name
  local start; start=$(date +%s%N)
  ! inside timeout 30 getent hosts "$1" || return 1
  echo "$1: not found after $((($(date +%s%N) - start) / 1000000)) ms"; [ $((($(date +%s%N) - start) / 1000000)) -lt "$2" ]
}
check "a name that is not there is told soon" nothing none.lab.test 500
# systemd-resolved looks for it by multicast, which is refused on the uplink; it would wait some 10 s for an answer
check "a name without a dot is told soon too" nothing none 3000
modes() { # what a link can be set to; the server has neither TLS nor signatures
  local tls dnssec
  for tls in no opportunistic; do for dnssec in no allow-downgrade; do
    inside sh -c "resolvectl dnsovertls eth0 $tls; resolvectl dnssec eth0 $dnssec; resolvectl reset-server-features; resolvectl flush-caches"
    echo "DNS over TLS $tls, DNSSEC $dnssec:"; timed 2000 getent ahosts web.lab.test && timed 500 getent ahosts web.lab.test || return 1
  done; done
  inside sh -c 'resolvectl dnsovertls eth0 ""; resolvectl dnssec eth0 ""'
}
check "look-ups do not stall with opportunistic DNS over TLS and DNSSEC" modes
another() { # the uplink's server changes: the new one is let through, without a reconnect
  inside sh -c "resolvectl dns eth0 $LAB_DNS; resolvectl flush-caches"
  answered() { inside timeout 2 getent ahostsv4 web.lab.test; }
  wait_for 5 answered && timed 500 getent ahosts web6.lab.test || return 1
  inside sh -c "resolvectl dns eth0 $DNS2; resolvectl flush-caches"
  wait_for 5 changed 203.0.113.2
}
check "another DNS server of the uplink is used soon" another
resolved_again() { inside systemctl restart systemd-resolved; timed 1000 getent ahosts web.lab.test; }
check "look-ups go on after a restart of systemd-resolved" resolved_again
same_state() { resolved_state >"$LOGS/resolved.after" 2>&1; diff "$LOGS/resolved.before" "$LOGS/resolved.after"; }
check "its settings and /etc/resolv.conf are untouched while connected" same_state
flushed_at_disconnect() {
  if ! changed 203.0.113.2 || ! dns2 203.0.113.3 || ! changed 203.0.113.2; then echo "the old answer is not in the cache"; return 1; fi
  as_alice proxyctl disconnect && changed 203.0.113.3
}
check "its cache is flushed at disconnect" flushed_at_disconnect
check "its settings and /etc/resolv.conf are what they were" same_state
flushed_at_stop() {
  if ! as_alice proxyctl connect lab || ! changed 203.0.113.3 || ! dns2 203.0.113.4 || ! changed 203.0.113.3; then
    echo "the old answer is not in the cache"; return 1
  fi
  root systemctl stop proxyvpnd.service && changed 203.0.113.4 && root systemctl start proxyvpnd.service
}
check "its cache is flushed by systemctl stop" flushed_at_stop
# ---- the DNS server of a tunnel's device, while nothing is connected
TAP_ANSWER=198.18.7.7 # of the router behind it
tap_up() { # a device with a router behind it that answers DNS, and the program that gives it its server as the daemon does
  local links=${PROXYVPN_BIN_DIR:-$(target_dir)/release}/examples/link-dns
  if [ -z "${PROXYVPN_BIN_DIR:-}" ]; then cargo_run build --release --locked --quiet -p proxyvpnd --example link-dns || return 1; fi
  nsenter -t "$leader" -a sh -c 'cat >/run/link-dns; chmod 755 /run/link-dns' <"$links"
  # an own node: nothing may reach the machine's
  rm -f "$LAB/tun"; mknod -m 600 "$LAB/tun" c 10 200
  coproc TAP { exec nsenter -t "$leader" -n python3 "$ROOT/scripts/lab-tap.py" torvm0 "$TAP_ANSWER" "$LAB/tun"; }
  local line; read -r -t 5 line <&"${TAP[0]}" && [ "$line" = ready ]
}
tap_down() { local input=${TAP[1]}; exec {input}>&-; gone() { ! inside ip link show torvm0 >/dev/null 2>&1; }; wait_for 5 gone; }
tap_asked() { # NAME: somebody asked there for it
  local line; while read -r -t 0.2 line <&"${TAP[0]}"; do [ "$line" != "$1" ] || return 0; done; return 1
}
link_dns() { box as "$BOX" "$1" /run/link-dns "${@:2}" </dev/null; }
wire_asked() { lab_wire "udp port 53" | grep "$1" >/dev/null; } # NAME: on the uplink
tap_state() { inside sh -c 'for what in dns domain default-route llmnr mdns dnsovertls dnssec; do resolvectl $what torvm0; done' | sed 's/^Link [0-9]* //'; }
check "a TAP device with a router that answers DNS" tap_up
tap_state >"$LOGS/tap.before"
around() { inside timeout 5 getent ahostsv4 before.tor.test; tap_asked before.tor.test && return 1; wire_asked before.tor.test; }
check "anti-test: without settings names go to the uplink's server" around
check "polkit refuses the settings to other users" status_of 1 link_dns alice torvm0 10.10.10.1
allowed_by_rule() { # polkitd notices a changed file by itself, and the rule is what allows it
  root sh -c 'mv /usr/share/polkit-1/rules.d/org.proxyvpn1.dns.rules /run/dns.rules'
  refused() { ! link_dns proxyvpn torvm0 10.10.10.1; }
  wait_for 10 refused || { echo "allowed without the rule"; return 1; }
  root sh -c 'mv /run/dns.rules /usr/share/polkit-1/rules.d/org.proxyvpn1.dns.rules'
  wait_for 10 link_dns proxyvpn torvm0 10.10.10.1
}
check "the daemon's user may set them, by our rule alone" allowed_by_rule
through_tap() {
  inside resolvectl flush-caches; inside timeout 5 getent ahostsv4 "$1.tor.test" | grep "^$TAP_ANSWER " || { tap_state; return 1; }
  tap_asked "$1.tor.test" || { echo "not asked at the device"; return 1; }
}
nowhere_else() { through_tap first && ! wire_asked first.tor.test; }
inside resolvectl domain eth0 '' # what says that the uplink's server has every name, too, would ask both
check "a name is asked at the device and nowhere else" nowhere_else
survives() { inside systemctl restart systemd-resolved; through_tap second && ! wire_asked second.tor.test; }
check "also after a restart of systemd-resolved" survives
reverted() {
  link_dns proxyvpn torvm0 || return 1
  tap_state | diff "$LOGS/tap.before" - && ! through_tap third && wire_asked third.tor.test
}
check "the settings are taken back" reverted
with_device() {
  link_dns proxyvpn torvm0 10.10.10.1 && through_tap fourth && tap_down || return 1
  ! inside resolvectl status | grep -e torvm0 -e 10.10.10.1 && ! inside timeout 5 getent ahostsv4 fifth.tor.test && wire_asked fifth.tor.test
}
check "they go with the device" with_device

resolved_down() {
  inside sh -c 'systemctl stop systemd-resolved; rm /etc/resolv.conf; mv /run/resolv.conf.before /etc/resolv.conf'
  dns2_end; lab_exec net ip addr del "$DNS2/32" dev lo
  as_alice proxyctl connect lab
}
check "connect without systemd-resolved" resolved_down
