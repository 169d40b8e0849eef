#!/bin/bash
# lab.sh: a small network in namespaces of its own, for the demo and the tests. Nothing of the machine's own network changes.
#
#   app  the machine under test: eth0, a resolver, a private system bus with the real polkitd, users alice (polkit lets her) and
#        mallory (polkit refuses her), sshd
#   net  everything else: router, squid with a password (3128), tinyproxy without (8888), web servers (80, 443), dnsmasq (53), sshd
#        (22), an echo server (7) and a sniffer on the wire between the two
#
#   lab.sh up [--stage DIR] [--tor] start it (about 2 s); DIR is a tree made by `install.sh --destdir`; --tor: with a private Tor network
#                                     in net (tests/torvm/tornet.py), which takes 10 s more
#   lab.sh exec app|net[:USER] CMD  run a command in it
#   lab.sh daemon [--root] [ARG...] start proxyvpnd in app as its own user with nothing but CAP_NET_ADMIN (or as root); waits for READY
#                                     --no-capability: without even that; --again: as after a crash, with what it left: the runtime
#                                     directory, and the descriptors that it stored (scripts/lab-hold.py); --under 'CMD...': run by CMD, as root
#   lab.sh cleanup                  proxyvpnd --cleanup, as its own user, and let go of what it stored
#   lab.sh daemon-stop [SIGNAL]     end it: TERM (the default) for good, others as a crash, which keeps what it stored
#   lab.sh service stop|start NAME  kill and restart a server of net: squid, tinyproxy, web, dnsmasq, sshd
#   lab.sh wire FILTER              print what the sniffer saw and FILTER (pcap-filter(7)) matches
#   lab.sh state                    rules, routes, nft, links, addresses, sysctls of app as text
#   lab.sh down                     end it and leave nothing
#
# PVLAB_ID names the lab (default: main); several can be up at once. Its folder is /tmp/pvlab-ID. Sourced, it gives the functions lab_*.
# shellcheck source=scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

export PVLAB_ID=${PVLAB_ID:-main} # the machines inside need it too
LAB=/tmp/pvlab-$PVLAB_ID
LAB_TOR_CACHE=${PROXYVPN_TOR_CACHE:-/var/cache/proxyvpn-test/tornet} # its keys, which are made once
LAB_PYTHON=/usr/bin/python3; [ -x "$LAB_PYTHON" ] || LAB_PYTHON=$(command -v python3)
# Addresses: documentation ranges (RFC 5737, RFC 3849).
# shellcheck disable=SC2034  # some are for those who source this
{
  LAB_APP4=192.0.2.2 LAB_GW4=192.0.2.1 LAB_APP6=2001:db8:1::2 LAB_GW6=2001:db8:1::1
  LAB_PROXY=198.51.100.10 LAB_PROXY6=2001:db8:2::10 LAB_DNS=198.51.100.53
  LAB_WEB=203.0.113.80 LAB_WEB6=2001:db8:3::80 LAB_SSH=203.0.113.22
  LAB_PROXY_USER=tester LAB_PROXY_PASSWORD='s3cret:with space'
}

lab_pid() { cat "$LAB/$1.pid" 2>/dev/null || die "no lab '$PVLAB_ID' is up"; }

# lab_exec app|net[:USER] CMD...
lab_exec() {
  local where=$1 machine=${1%%:*} user=''; shift
  [ "$where" = "$machine" ] || user=${where#*:}
  local pid; pid=$(lab_pid "$machine") || exit 1
  local enter=(nsenter -t "$pid" -m -n -p --)
  if [ -n "$user" ]; then
    # by name inside: the user exists only there
    enter+=(setpriv --reuid "$user" --regid "$user" --init-groups env -i "HOME=$LAB/home/$user" "USER=$user" TERM=dumb)
  else
    enter+=(env -i HOME=/root USER=root TERM=dumb)
  fi
  "${enter[@]}" PATH="$LAB/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin" LAB="$LAB" PVLAB_ID="$PVLAB_ID" LC_ALL=C.UTF-8 \
    CURL_CA_BUNDLE="$LAB/ca.pem" SSL_CERT_FILE="$LAB/ca.pem" GIT_SSL_CAINFO="$LAB/ca.pem" "$@"
}

# inner_pid OUTER: the process that is number 1 in the new PID namespace below OUTER
inner_pid() {
  local pid=$1 child
  for _ in 1 2 3 4; do
    child=$(pgrep -P "$pid" | head -n1) || return 1
    [ -n "$child" ] || return 1
    if [ "$(awk '/^NSpid:/ {print $NF}' "/proc/$child/status" 2>/dev/null)" = 1 ]; then echo "$child"; return 0; fi
    pid=$child
  done
  return 1
}
wait_for() { # wait_for SECONDS CMD...
  local end=$((SECONDS + $1)); shift
  until "$@"; do [ "$SECONDS" -lt "$end" ] || return 1; sleep 0.02; done
}

# start_machine NAME CMD...: CMD makes the namespaces; its PID 1 inside is written to NAME.pid
start_machine() {
  local name=$1 outer; shift
  setsid "$@" </dev/null >"$LAB/$name.log" 2>&1 &
  outer=$!
  disown # no 'Killed' on the terminal when it is ended
  echo "$outer" >"$LAB/$name.outer"
  found() { inner_pid "$outer" >"$LAB/$name.pid.new" || ! kill -0 "$outer" 2>/dev/null; }
  wait_for 10 found || die "machine $name did not start: $(cat "$LAB/$name.log")"
  [ -s "$LAB/$name.pid.new" ] || die "machine $name ended at once: $(cat "$LAB/$name.log")"
  mv "$LAB/$name.pid.new" "$LAB/$name.pid"
}
ready() { [ -e "$LAB/$1.ready" ]; }
await_ready() {
  local name=$1
  over() { ready "$name" || [ -e "$LAB/$name.failed" ] || ! kill -0 "$(cat "$LAB/$name.outer")" 2>/dev/null; }
  wait_for 20 over || true
  ready "$name" || die "machine $name did not get ready: $(tail -n 30 "$LAB/$name.log")"
}

make_secrets() {
  local key=$LAB/ca.key
  {
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout "$key" -out "$LAB/ca.pem" -days 30 -subj '/CN=lab CA'
    openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout "$LAB/web.key" -out "$LAB/web.csr" -subj '/CN=web.lab.test'
    printf 'subjectAltName=DNS:web.lab.test,DNS:*.lab.test,IP:%s,IP:%s\n' "$LAB_WEB" "$LAB_WEB6" >"$LAB/web.ext"
    openssl x509 -req -in "$LAB/web.csr" -CA "$LAB/ca.pem" -CAkey "$key" -CAcreateserial -days 30 -extfile "$LAB/web.ext" -out "$LAB/web.pem"
    ssh-keygen -q -t ed25519 -N '' -f "$LAB/ssh_host"
    ssh-keygen -q -t ed25519 -N '' -C lab -f "$LAB/ssh_user"
  } >"$LAB/secrets.log" 2>&1 || die "no keys: $(cat "$LAB/secrets.log")"
  printf '%s:%s\n' "$LAB_PROXY_USER" "$(openssl passwd -apr1 "$LAB_PROXY_PASSWORD")" >"$LAB/squid.passwd"
  printf '%s' "$LAB_PROXY_PASSWORD" >"$LAB/password"
  { printf 'ssh.lab.test,%s,[192.0.2.2]:22,%s ' "$LAB_SSH" "$LAB_APP4"; cut -d' ' -f1,2 "$LAB/ssh_host.pub"; } >"$LAB/known_hosts"
  chmod 644 "$LAB/ca.pem" "$LAB/known_hosts" "$LAB/password" "$LAB/squid.passwd"
}

lab_up() {
  local stage='' tor=''
  while [ $# -gt 0 ]; do case $1 in
    --stage) stage=$(readlink -f "$2"); shift 2 ;;
    --tor) tor=1; shift ;;
    *) die "up: unknown argument '$1'" ;;
  esac; done
  need_root
  lab_folder
  if [ -z "$stage" ]; then # enough for the bus to start
    stage=$LAB/stage; mkdir -p "$stage"/usr/{share/dbus-1,share/polkit-1,libexec}
  elif [ -x "$stage/usr/bin/proxyctl" ]; then cp "$stage/usr/bin/proxyctl" "$LAB/bin/"; fi
  echo "$stage" >"$LAB/stage.path"
  [ -z "$tor" ] || mkdir "$LAB/tor"
  # the machines outlive a lab.sh that is only a command; whoever sources this has a trap
  start_net
  start_machine app "$ROOT/scripts/private-bus.sh" --user alice --user mallory "$stage" "$ROOT/scripts/lab.sh" inside-app
  nsenter -t "$(lab_pid net)" -n ip link add wan0 type veth peer name eth0 netns "$(lab_pid app)" || die "no veth pair"
  : >"$LAB/wired"
  await_ready net; await_ready app
  # made when the wire has carrier; it must not come between two state texts
  link_local() { [ -n "$(nsenter -t "$(lab_pid app)" -n ip -6 addr show dev eth0 scope link)" ]; }
  wait_for 5 link_local || die "eth0 has no link-local address"
  [ -z "$tor" ] || await_tor
}
await_tor() {
  over() { [ -e "$LAB/tor/network.json" ] || ! lab_exec net kill -0 "$(cat "$LAB/services/tornet.pid")" 2>/dev/null; }
  wait_for 120 over || true
  [ -e "$LAB/tor/network.json" ] || die "no Tor network: $(tail -n 5 "$LAB/logs/tornet.log")"
}
lab_folder() {
  [ ! -e "$LAB/net.outer" ] || lab_down
  rm -rf "$LAB"; mkdir -p "$LAB"/{bin,home,logs,services,stage}; chmod 755 "$LAB"
  make_secrets
}
start_net() {
  start_machine net unshare --mount --net --pid --fork --kill-child --mount-proc --propagation private "$ROOT/scripts/lab.sh" inside-net
}
# lab_net_up [--tor]: only net; the caller brings the wire (wan0 in net), says so by the file 'wired', and awaits readiness
lab_net_up() { lab_folder; [ "${1:-}" != --tor ] || mkdir "$LAB/tor"; start_net; }

# ---- inside net ----
as_daemon() { # as_daemon NAME CMD...: in the background of this machine, output to a log; 'lab.sh service' can end and start it
  local name=$1; shift
  printf '%q ' "$@" >"$LAB/services/$name"
  setsid "$@" </dev/null >>"$LAB/logs/$name.log" 2>&1 &
  echo $! >"$LAB/services/$name.pid"
}
stay() { sleep infinity & while :; do wait; done; } # number 1 of the machine: takes in what others leave behind
own_run_and_etc() {
  mount -t tmpfs -o mode=755 tmpfs /run
  mkdir -p /run/pvlab/{upper,work} /run/sshd
  mount -t overlay overlay -o lowerdir=/etc,upperdir=/run/pvlab/upper,workdir=/run/pvlab/work /etc
}
unlocked_root() { sed -i 's/^root:[^:]*:/root:*:/' /etc/shadow; } # a key may log in; sshd refuses a locked account
sshd_config() {
  cat >"$LAB/sshd_$1.conf" <<CONF
Port 22
HostKey $LAB/ssh_host
AuthorizedKeysFile $LAB/ssh_user.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
UseDNS no
Subsystem sftp internal-sftp
CONF
}
listening() { # listening PORT...: does every one of these TCP ports have a listener here?
  local port all; all=$(ss -Htln)
  for port in "$@"; do grep -q ":$port " <<<"$all" || return 1; done
}

inside_net() {
  own_run_and_etc; unlocked_root
  ip link set lo up
  local address
  for address in "$LAB_PROXY" "$LAB_DNS" "$LAB_WEB" "$LAB_SSH"; do ip addr add "$address/32" dev lo; done
  for address in "$LAB_PROXY6" "$LAB_WEB6"; do ip -6 addr add "$address/128" dev lo nodad; done
  # example.com: what 'proxyctl doctor' looks up
  printf '%s web.lab.test example.com\n%s web6.lab.test\n%s ssh.lab.test\n%s proxy.lab.test\n' "$LAB_WEB" "$LAB_WEB6" "$LAB_SSH" "$LAB_PROXY" >"$LAB/hosts"
  sysctl -qw net.ipv4.ip_forward=0
  wired() { [ -e "$LAB/wired" ]; }
  wait_for 20 wired || exit 1
  ip addr add "$LAB_GW4/24" dev wan0; ip -6 addr add "$LAB_GW6/64" dev wan0 nodad; ip link set wan0 up

  # --immediate-mode and -U: what was on the wire is in the file at once
  as_daemon tcpdump tcpdump -i wan0 -n -U --immediate-mode -s 128 -w "$LAB/wire.pcap" -Z root
  local helper=/usr/lib/squid/basic_ncsa_auth; [ -x "$helper" ] || helper=/usr/libexec/squid/basic_ncsa_auth
  cat >"$LAB/squid.conf" <<CONF
http_port $LAB_PROXY:3128
http_port [$LAB_PROXY6]:3128
auth_param basic program $helper $LAB/squid.passwd
auth_param basic children 5 startup=1
auth_param basic credentialsttl 1 hour
acl refused port 8081
http_access deny refused
acl known proxy_auth REQUIRED
http_access allow known
http_access deny all
cache deny all
cache_mem 8 MB
dns_nameservers $LAB_DNS
hosts_file $LAB/hosts
pid_filename none
cache_log $LAB/logs/squid/cache.log
access_log stdio:$LAB/logs/squid/access.log
logfile_rotate 0
pinger_enable off
shutdown_lifetime 0 seconds
max_filedescriptors 8192
visible_hostname proxy.lab.test
coredump_dir /tmp
CONF
  # squid leaves root and writes its logs as its own user
  mkdir -p "$LAB/logs/squid"; chmod 777 "$LAB/logs/squid"
  as_daemon squid squid -N -f "$LAB/squid.conf"
  cat >"$LAB/tinyproxy.conf" <<CONF
Port 8888
Listen $LAB_PROXY
Timeout 600
MaxClients 500
LogLevel Connect
LogFile "$LAB/logs/tinyproxy-access.log"
Allow 0.0.0.0/0
CONF
  as_daemon tinyproxy tinyproxy -d -c "$LAB/tinyproxy.conf"
  as_daemon dnsmasq dnsmasq --keep-in-foreground --conf-file=/dev/null --no-resolv --no-hosts --addn-hosts="$LAB/hosts" \
    --listen-address="$LAB_DNS" --bind-interfaces --user=root --log-queries --log-facility=- --local=/test/ --pid-file=
  sshd_config net; as_daemon sshd "$(command -v sshd)" -D -e -f "$LAB/sshd_net.conf"
  as_daemon web "$LAB_PYTHON" "$ROOT/scripts/lab-web.py" "$LAB/web.pem" "$LAB/web.key" "$LAB/www"
  [ ! -d "$LAB/tor" ] || as_daemon tornet "$LAB_PYTHON" -B "$ROOT/tests/torvm/tornet.py" "$LAB_TOR_CACHE" "$LAB/tor" "$LAB/logs" "$LAB_WEB" "$LAB_DNS"
  up() { listening 22 53 80 443 3128 8888 7 && [ -s "$LAB/wire.pcap" ]; }
  wait_for 15 up || { echo "not all servers listen:"; ss -Htln; tail -n 5 "$LAB"/logs/*.log; : >"$LAB/net.failed"; exit 1; }
  : >"$LAB/net.ready"
  stay
}

# ---- inside app (on the private bus) ----
inside_app() {
  wired() { [ -e "$LAB/wired" ] && ip link show eth0 >/dev/null 2>&1; }
  wait_for 20 wired || exit 1
  sysctl -qw net.ipv6.conf.eth0.accept_dad=0 # no address may be 'tentative' in one state text and not in the next
  ip addr add "$LAB_APP4/24" dev eth0; ip -6 addr add "$LAB_APP6/64" dev eth0 nodad; ip link set eth0 up
  ip route add default via "$LAB_GW4"; ip -6 route add default via "$LAB_GW6"
  rm -f /etc/resolv.conf; printf 'nameserver %s\n' "$LAB_DNS" >/etc/resolv.conf
  # An own device node: a chmod here must never reach the machine's.
  mkdir -p /run/pvlab-net; mount -t tmpfs -o mode=755 tmpfs /dev/net; mknod -m 666 /dev/net/tun c 10 200
  local user
  for user in alice mallory; do
    mkdir -p "$LAB/home/$user"; chown "$user:" "$LAB/home/$user"; chmod 700 "$LAB/home/$user"
  done
  rm -f /usr/share/dbus-1/system-services/org.proxyvpn1.service # no activation here: a test says when the daemon runs
  install -d -m 755 /etc/polkit-1/rules.d
  cat >/etc/polkit-1/rules.d/40-lab.rules <<'RULES'
// alice may do everything with proxyvpn; nobody else gets more than the installed policy gives
polkit.addRule(function(action, subject) {
  if (action.id.indexOf("org.proxyvpn1.") === 0 && subject.user === "alice") { return polkit.Result.YES; }
});
RULES
  chmod 755 /etc/polkit-1/rules.d; chmod 644 /etc/polkit-1/rules.d/40-lab.rules
  install -d -m 755 /etc/proxyvpn /etc/proxyvpn/profiles.d
  install -d -m 750 -o proxyvpn -g proxyvpn /run/proxyvpn
  install -d -m 700 -o proxyvpn -g proxyvpn "$LAB/lib"
  install -m 600 -o alice "$LAB/ssh_user" "$LAB/home/alice/key"
  install -m 600 -o alice "$LAB/password" "$LAB/home/alice/password"
  if [ -x "$(lab_bin -qemu)" ]; then # as the socket unit does it
    getent passwd proxyvpn-qemu >/dev/null || useradd --system --no-create-home --shell /usr/sbin/nologin proxyvpn-qemu
    as_daemon qemu "$(lab_bin -qemu)" --listen /run/proxyvpn-qemu.sock --owner proxyvpn --user proxyvpn-qemu
  fi
  mkdir -p /run/sshd; unlocked_root; sshd_config app; as_daemon sshd-app "$(command -v sshd)" -D -e -f "$LAB/sshd_app.conf"
  up() { listening 22; }
  wait_for 10 up || { : >"$LAB/app.failed"; exit 1; }
  : >"$LAB/app.ready"
  stay
}

# lab_service stop|start NAME [PORT]: a server of net; with PORT waits until it listens
lab_service() {
  local verb=$1 name=$2 port=${3:-}
  case $verb in
    stop) lab_exec net "$ROOT/scripts/lab.sh" inside-stop "$name" ;;
    start) lab_exec net setsid "$ROOT/scripts/lab.sh" inside-start "$name" "$port" ;;
    *) die "service: unknown verb '$verb'" ;;
  esac
}
inside_stop() {
  local pid; pid=$(cat "$LAB/services/$1.pid")
  kill -KILL -- "-$pid" 2>/dev/null || kill -KILL "$pid" 2>/dev/null || true
  gone() { ! kill -0 "$pid" 2>/dev/null; }
  wait_for 5 gone
}
inside_start() {
  local port command=(); eval "command=($(cat "$LAB/services/$1"))"
  as_daemon "$1" "${command[@]}"
  if [ -n "${2:-}" ]; then port=$2; up() { listening "$port"; }; wait_for 15 up; fi
}

# ---- the daemon ----
# lab_as_proxyvpn: setpriv and its arguments for the daemon's user, into the array AS
lab_as_proxyvpn() {
  local only=$1
  AS=(setpriv --reuid proxyvpn --regid proxyvpn --clear-groups --no-new-privs --inh-caps="$only" --ambient-caps="$only" --bounding-set="$only")
}
lab_bin() { echo "$(cat "$LAB/stage.path")/usr/libexec/proxyvpn/proxyvpn${1:-d}"; } # of the stage: proxyvpnd, or another program
lab_daemon() {
  local owner=proxyvpn again='' under=()
  lab_as_proxyvpn "-all,+net_admin"
  while [ $# -gt 0 ]; do case $1 in
    --root) AS=() owner=root; shift ;;
    --no-capability) lab_as_proxyvpn "-all"; shift ;;
    --again) again=1; shift ;;
    --under) read -ra under <<<"$2"; shift 2 ;;
    *) break ;;
  esac; done
  local bin; bin=$(lab_bin)
  [ -x "$bin" ] || die "no daemon in the lab's stage ($bin)"
  if [ -z "$again" ]; then
    lab_forget
    # shellcheck disable=SC2016  # expanded inside
    lab_exec app bash -c 'rm -rf /run/proxyvpn/* "$LAB"/lib/*'
    lab_exec app chown -R "$owner:" /run/proxyvpn "$LAB/lib"
  fi
  lab_exec app "$LAB_PYTHON" "$ROOT/scripts/lab-hold.py" start "$LAB/notify" "$LAB/logs/proxyvpnd.log" 15 \
    "${under[@]}" env RUST_BACKTRACE=1 "${AS[@]}" "$bin" --state-dir "$LAB/lib" --imported "$LAB/lib/profiles.d" --runtime-dir /run/proxyvpn "$@" >"$LAB/daemon.pid" \
    || die "proxyvpnd did not start: $(tail -n 20 "$LAB/logs/proxyvpnd.log")"
}
# what systemd does when a service is stopped for good
lab_forget() { lab_exec app "$LAB_PYTHON" "$ROOT/scripts/lab-hold.py" end "$LAB/notify"; }
# proxyvpnd --cleanup, as the unit runs it after a stop
lab_cleanup() {
  local status=0
  lab_as_proxyvpn "-all,+net_admin"
  lab_exec app SERVICE_RESULT=success "${AS[@]}" "$(lab_bin)" --cleanup --stop-post --state-dir "$LAB/lib" --runtime-dir /run/proxyvpn || status=$?
  lab_forget
  return "$status"
}
# the daemon's number inside app; empty when it does not run
lab_daemon_pid() {
  local pid; pid=$(cat "$LAB/daemon.pid" 2>/dev/null) || return 1
  lab_exec app kill -0 "$pid" 2>/dev/null && echo "$pid"
}
lab_daemon_stop() {
  local pid signal=${1:-TERM} status=0
  if pid=$(lab_daemon_pid); then
    lab_exec app kill "-$signal" "$pid"
    gone() { ! lab_exec app kill -0 "$pid" 2>/dev/null; }
    wait_for 15 gone || { lab_exec app kill -KILL "$pid"; say "proxyvpnd did not end within 15 s of SIG$signal" >&2; status=1; }
    rm -f "$LAB/daemon.pid"
  fi
  [ "$signal" != TERM ] || lab_forget
  return "$status"
}

# ---- looking ----
lab_wire() { # copies first: the writer goes on
  cp "$LAB/wire.pcap" "$LAB/wire.copy"; tcpdump -n -r "$LAB/wire.copy" "$@" 2>/dev/null
}
lab_state() { lab_exec app "$ROOT/scripts/lab.sh" state-inside; }
state_inside() {
  local family tool
  for family in -4 -6; do echo "# rules $family"; ip "$family" rule show; done
  for family in -4 -6; do
    # counters and ages of routes that the kernel learns by itself say nothing about us
    echo "# routes $family"; ip "$family" route show table all | sed -E 's/ (expires|age) [0-9]+sec//g' | sort
  done
  echo "# links"; ip -o link show | sed -E 's/^[0-9]+: //; s/ qlen [0-9]+//'
  echo "# addresses"; ip -o addr show | sed -E 's/^[0-9]+: //; s/ (valid|preferred)_lft [a-z0-9]+//g'
  echo "# nft"; nft list ruleset
  echo "# iptables"; for tool in iptables-legacy-save ip6tables-legacy-save; do
    if command -v "$tool" >/dev/null; then "$tool" 2>/dev/null | grep -v '^#' || true; fi
  done
  # without secrets, counters and what any traffic changes
  echo "# sysctls"; { grep -rs '' /proc/sys/net/ipv4 /proc/sys/net/ipv6 || true; } | grep -vE 'secret|fastopen_key|/flush:|_count:|/route/|local_reserved' | sort
  echo "# resolv.conf"; cat /etc/resolv.conf
}

lab_down() {
  local name outer pid
  for name in app net; do
    [ -e "$LAB/$name.outer" ] || continue
    outer=$(cat "$LAB/$name.outer"); pid=$(cat "$LAB/$name.pid" 2>/dev/null || true)
    # a number may have been given to another process: only what holds our folder in its command line is ours
    if [ -n "$pid" ] && grep -qa -e "lab.sh" -e "sleep" "/proc/$pid/cmdline" 2>/dev/null && kill -0 "$pid" 2>/dev/null; then
      [ "$(awk '/^NSpid:/ {print $NF}' "/proc/$pid/status" 2>/dev/null)" != 1 ] || kill -KILL "$pid" 2>/dev/null || true
    fi
    if grep -qa 'lab.sh' "/proc/$outer/cmdline" 2>/dev/null; then kill -KILL "$outer" 2>/dev/null || true; fi
    ended() { ! kill -0 "$outer" 2>/dev/null || [ "$(awk '/^State:/ {print $2}' "/proc/$outer/status" 2>/dev/null)" = Z ]; }
    wait_for 5 ended || say "lab: process $outer did not end" >&2
  done
  rm -rf "$LAB"
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
  set -euo pipefail
  verb=${1:-}; [ $# -eq 0 ] || shift
  case $verb in
    up) lab_up "$@"; say "lab: ready ($LAB)" ;;
    exec) lab_exec "$@" ;;
    daemon) lab_daemon "$@" ;;
    cleanup) lab_cleanup ;;
    daemon-stop) lab_daemon_stop "$@" ;;
    wire) lab_wire "$@" ;;
    state) lab_state ;;
    down) lab_down ;;
    service) lab_service "$@" ;;
    inside-stop) inside_stop "$@" ;;
    inside-start) inside_start "$@" ;;
    inside-net) inside_net ;;
    inside-app) inside_app ;;
    state-inside) state_inside ;;
    *) sed -n '2,/^# PVLAB_ID/s/^# \{0,1\}//p' "$0"; exit 2 ;;
  esac
fi
