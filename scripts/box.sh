#!/bin/bash
# box.sh: a throw-away machine with systemd as PID 1 (systemd-nspawn): system bus, polkitd, logind. For test-system.sh.
#   box.sh build              make the root that boxes start from, if there is none that is new enough (1-2 min once)
#   box.sh up NAME            boot one: its changes go with it; own network namespace
#   box.sh reboot NAME NETNS  power off and boot again, with the files as they are, in the network namespace of this path
#   box.sh run NAME CMD...    run CMD as root as a transient unit; input, output and exit status pass through
#   box.sh as NAME USER CMD   as a plain user, without a login session (polkit: "any")
#   box.sh leader NAME        process number of its PID 1
#   box.sh down NAME          power off and clean up
# Roots are kept in /var/tmp/proxyvpn-test (PROXYVPN_BOX_CACHE). Needs root and the packages systemd-container and mmdebstrap.
set -euo pipefail
# shellcheck source=scripts/common.sh
. "$(dirname "$0")/common.sh"
need_root
CACHE=${PROXYVPN_BOX_CACHE:-/var/tmp/proxyvpn-test}
RUN=/tmp/proxyvpn-box
include=systemd,systemd-sysv,libpam-systemd,dbus,polkitd,login,passwd,util-linux,procps,iproute2,nftables,kmod,udev,tar,curl,libmnl0,libnftnl11
# a package of its own since Debian 12
[ -z "$(apt-cache pkgnames systemd-resolved 2>/dev/null)" ] || include+=,systemd-resolved
# shellcheck source=/dev/null
suite=$(. /etc/os-release; echo "${VERSION_CODENAME:-}")
root=$CACHE/root-$suite-$(cksum <<<"$include" | cut -d' ' -f1)
cgroup=/sys/fs/cgroup; [ ! -d $cgroup/unified ] || cgroup=$cgroup/unified

leader() { cat "$RUN/$1/leader"; }
inside() { local name=$1; shift; nsenter -t "$(leader "$name")" -a "$@"; }
unit() { local name=$1; shift; inside "$name" timeout 180 systemd-run --quiet --pipe --wait --collect -E TERM=dumb "$@"; }

build() {
  # older than a month: made anew, with the distribution's updates
  if [ -e "$root/usr/bin/systemctl" ] && [ -z "$(find "$root" -maxdepth 0 -mtime +30)" ]; then return 0; fi
  command -v mmdebstrap >/dev/null || die "mmdebstrap is not installed: run 'sudo scripts/setup.sh'"
  local sources=() file
  for file in /etc/apt/sources.list.d/{debian,ubuntu}.sources /etc/apt/sources.list; do
    if [ -s "$file" ] && grep -qE '^(deb |URIs:)' "$file"; then sources+=("$file"); fi
  done
  [ "${#sources[@]}" -gt 0 ] || die "no package sources of Debian or Ubuntu found in /etc/apt"
  mkdir -p "$CACHE"; rm -rf "$CACHE"/root-*
  # shellcheck disable=SC2016  # $1 is mmdebstrap's
  mmdebstrap --mode=root --variant=minbase --quiet --format=directory \
    --aptopt='APT::Install-Recommends "false"' --aptopt='Acquire::Check-Valid-Until "false"' --aptopt='Acquire::Check-Date "false"' \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
    --include="$include" \
    --customize-hook='rm -rf "$1"/etc/apt/sources.list* "$1"/var/lib/apt/lists/* "$1"/var/log/journal; rm -f "$1"/etc/resolv.conf; : >"$1"/etc/machine-id; echo box >"$1"/etc/hostname; echo "127.0.0.1 localhost box" >"$1"/etc/hosts; : >"$1"/etc/default/locale' \
    --customize-hook='chroot "$1" systemctl --quiet disable systemd-resolved.service || true; rm -f "$1"/etc/resolv.conf' \
    --customize-hook='for user in alice bob; do chroot "$1" useradd -m -s /bin/bash $user; done' \
    "$suite" "$root.new" "${sources[@]}"
  mv "$root.new" "$root"; touch "$root"
}

up() { rm -rf "${RUN:?}/$1"; boot "$1" --private-network; }
reboot() { power_off "$1"; boot "$1" --network-namespace-path="$2"; }

boot() {
  local name=$1 network=$2 r=$RUN/$1 cg=$cgroup/proxyvpn-box-$1 nspawn='' pid=''
  mkdir -p "$r"/{upper,work,root}; mkdir -p "$cg"
  # Its own cgroup2 tree and /run/systemd, so that it works where PID 1 is not systemd and leaves a systemd that is alone.
  # shellcheck disable=SC2016  # expanded inside
  env -i PATH="$PATH" TERM=dumb CG="$cg" LAYERS="lowerdir=$root,upperdir=$r/upper,workdir=$r/work" BOX="$r/root" bash -c 'echo $$ >"$CG/cgroup.procs"; exec unshare --mount --propagation private bash -c "
      umount -R /sys/fs/cgroup; mount -t cgroup2 cgroup2 /sys/fs/cgroup; mkdir -p /run/systemd; mount -t tmpfs tmpfs /run/systemd
      mount -t overlay overlay -o \"\$LAYERS\" \"\$BOX\" || exit 1
      exec \"\$@\"" x "$@"' x \
    systemd-nspawn --quiet --directory="$r/root" --machine="$name" --hostname=box --register=no --keep-unit \
    "$network" --resolv-conf=off --timezone=off --link-journal=no \
    --capability=CAP_BPF,CAP_PERFMON,CAP_SYSLOG,CAP_NET_ADMIN --system-call-filter=bpf --console=pipe --boot \
    </dev/null >"$r/console" 2>&1 &
  nspawn=$!; echo "$nspawn" >"$r/nspawn"
  for _ in $(seq 600); do
    pid=$(head -n1 "$cg/payload/init.scope/cgroup.procs" 2>/dev/null || true)
    if [ -n "$pid" ] && [ -S "/proc/$pid/root/run/systemd/private" ]; then break; fi
    kill -0 "$nspawn" 2>/dev/null || { cat "$r/console" >&2; exit 1; }
    sleep 0.05
  done
  [ -n "$pid" ] || { cat "$r/console" >&2; die "the box did not boot"; }
  echo "$pid" >"$r/leader"
  # an own node, not a bind mount: a chmod inside must never reach the machine's device node
  inside "$name" sh -c 'mkdir -p /dev/net; [ -e /dev/net/tun ] || mknod -m 666 /dev/net/tun c 10 200'
  inside "$name" timeout 60 systemctl is-system-running --wait >/dev/null || inside "$name" systemctl --failed --no-legend
}

down() { power_off "$1"; rm -rf "${RUN:?}/$1"; rmdir "$RUN" 2>/dev/null || true; }

power_off() {
  local name=$1 cg=$cgroup/proxyvpn-box-$1 nspawn
  nspawn=$(cat "$RUN/$name/nspawn" 2>/dev/null) || return 0
  timeout 10 nsenter -t "$(leader "$name")" -a systemctl poweroff 2>/dev/null || true
  for _ in $(seq 100); do kill -0 "$nspawn" 2>/dev/null || break; sleep 0.05; done
  kill -9 "$nspawn" 2>/dev/null || true
  # a killed nspawn leaves its PID 1; the cgroup is ours alone
  [ ! -e "$cg/cgroup.kill" ] || echo 1 >"$cg/cgroup.kill"
  for _ in $(seq 40); do
    find "$cg" -depth -type d -exec rmdir {} \; 2>/dev/null || true
    [ -d "$cg" ] || break
    sleep 0.05
  done
}

verb=${1:-}; [ $# -eq 0 ] || shift
case $verb in
  build) build ;;
  up | down | leader) "$verb" "$1" ;;
  reboot) reboot "$1" "$2" ;;
  run) name=$1; shift; unit "$name" -- "$@" ;;
  as) name=$1 user=$2; shift 2; unit "$name" -p User="$user" -- "$@" ;;
  *) sed -n '2,/^# Roots/s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
