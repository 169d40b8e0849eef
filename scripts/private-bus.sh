#!/bin/bash
# private-bus.sh: run a command on a system bus of its own, with the real polkitd and this project's bus and polkit files, in
# mount, PID and network namespaces of its own. Nothing on the machine changes; it takes about half a second.
#
#   private-bus.sh [--user NAME[:GROUP]]... STAGE CMD...
#     STAGE    a tree made by `install.sh --destdir`, or "-" for the files of this source tree
#     --user   a user that exists only in there, in GROUP too
#     CMD      runs as root; /run is empty, the only link is lo, the user and group "proxyvpn" exist
#
# Needs root and the packages dbus-daemon, polkitd, util-linux, iproute2 (scripts/setup.sh). There is no logind, so polkit takes
# every caller as neither local nor active (allow_any).
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin
if [ -z "${PRIVATE_BUS_INSIDE:-}" ]; then
  [ "$(id -u)" = 0 ] || { echo "private-bus.sh: run it as root (sudo)" >&2; exit 1; }
  exec env PRIVATE_BUS_INSIDE=1 unshare --mount --net --pid --fork --kill-child --mount-proc --propagation private "$0" "$@"
fi
unset PRIVATE_BUS_INSIDE

users=()
while [ "${1:-}" = --user ]; do users+=("$2"); shift 2; done
[ $# -ge 2 ] || { echo "private-bus.sh: usage: private-bus.sh [--user NAME[:GROUP]]... STAGE CMD..." >&2; exit 2; }
stage=$1; shift
root=$(cd "$(dirname "$0")/.." && pwd)

ip link set lo up
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/dbus /run/private-bus
if [ "$stage" = - ]; then
  stage=/run/private-bus/stage
  install -D -m 644 -t $stage/usr/share/dbus-1/system.d "$root/dbus/org.proxyvpn1.conf"
  install -D -m 644 -t $stage/usr/share/dbus-1/system-services "$root/dbus/org.proxyvpn1.service"
  install -D -m 644 -t $stage/usr/share/polkit-1/actions "$root/polkit/org.proxyvpn1.policy"
fi

# overlay DIR [LOWER]: changes to DIR stay in here, LOWER's files lie over it
overlay() {
  local layer=/run/private-bus/layers$1
  mkdir -p "$layer/upper" "$layer/work" "$1"
  mount -t overlay overlay -o "lowerdir=${2:+$2:}$1,upperdir=$layer/upper,workdir=$layer/work" "$1"
}
overlay /etc
for dir in /usr/share/polkit-1 /usr/share/dbus-1 /usr/libexec; do
  if [ -d "$stage$dir" ]; then overlay "$dir" "$stage$dir"; fi
done
if [ -d "$stage/etc" ]; then cp -a "$stage/etc/." /etc/; fi

getent group proxyvpn >/dev/null || groupadd --system proxyvpn
getent passwd proxyvpn >/dev/null || useradd --system -g proxyvpn -M -d /nonexistent -s /usr/sbin/nologin proxyvpn
for user in "${users[@]}"; do
  name=${user%%:*}
  getent passwd "$name" >/dev/null || useradd -M -s /bin/bash "$name"
  if [ "$name" != "$user" ]; then
    groupadd -f "${user#*:}"
    usermod -a -G "${user#*:}" "$name"
  fi
done

# Without systemd the bus starts services itself, through its setuid helper.
for file in /usr/share/dbus-1/system-services/org.proxyvpn1.service /usr/share/dbus-1/system-services/org.freedesktop.PolicyKit1.service; do
  if [ -e "$file" ]; then sed -i '/^SystemdService=/d' "$file"; fi
done
dbus-daemon --system --fork --nopidfile --nosyslog
"$@"
