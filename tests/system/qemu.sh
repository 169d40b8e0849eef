# shellcheck shell=bash
# Part of test-system.sh: systemd starts QEMU for who connects, without rights, and ends it with the connection.
# shellcheck disable=SC2016,SC2154,SC2317  # of test-system.sh; functions that `check` calls

copy_qemu() { # this machine's own, before the first look at the box's files: the box is the same distribution
  local files=(/usr/bin/qemu-system-x86_64 /usr/lib/*/qemu/accel-*.so) library
  while read -r library; do files+=("$library"); done < <(ldd "${files[@]}" 2>/dev/null | grep -o '/[^ :]* (' | tr -d ' (')
  tar -P --dereference -c "${files[@]}" /usr/share/qemu /usr/share/seabios | nsenter -t "$leader" -a tar -P -x --skip-old-files --no-same-owner
}
qemu_held=''
hold_qemu() { # [kvm]: starts one and keeps it; its replies are in $LOGS/qemu
  rm -f "$LOGS/qemu.hold"; mkfifo "$LOGS/qemu.hold"
  nsenter -t "$leader" -n python3 "$ROOT/tests/system/start_qemu.py" "/proc/$leader/root" "$@" <"$LOGS/qemu.hold" >"$LOGS/qemu" 2>&1 &
  qemu_held=$!
  exec {qemu_stdin}>"$LOGS/qemu.hold"; rm -f "$LOGS/qemu.hold"
  answered() { [ -s "$LOGS/qemu" ]; }
  wait_for 30 answered; cat "$LOGS/qemu"
}
end_qemu() { exec {qemu_stdin}>&-; wait "$qemu_held"; }
qemu_pid() { # in the box's process namespace
  nsenter -t "$leader" -a sh -c 'for unit in $(systemctl list-units --plain --no-legend "proxyvpn-qemu@*.service" | cut -d" " -f1); do
    pgrep -P "$(systemctl show -P MainPID "$unit")" || true; done'
}

socket_is_the_daemons() { [ "$(root stat -c '%a %U' /run/proxyvpn-qemu.sock </dev/null)" = "600 proxyvpn" ]; }
qemu_score() {
  local value; value=$(root systemd-analyze security --no-pager proxyvpn-qemu@test.service </dev/null | sed -n 's/.*Overall exposure level.*: \([0-9.]*\) .*/\1/p')
  echo "systemd-analyze security: $value"; [ -n "$value" ] && version_ge 0.5 "$value"
}
qemu_starts() {
  hold_qemu; grep -q '"started"' "$LOGS/qemu" || { root journalctl -u 'proxyvpn-qemu@*' -n 20 --no-pager; return 1; }
  said() { root journalctl -u 'proxyvpn-qemu@*' --no-pager </dev/null | grep 'guest: .*hello from the guest' >/dev/null; }
  wait_for 20 said || { root journalctl -u 'proxyvpn-qemu@*' -n 20 --no-pager; return 1; }
}
qemu_holds_nothing() {
  local pid; pid=$(qemu_pid); [ "${pid:-0}" -gt 1 ] || { echo "no QEMU runs"; return 1; }
  # from outside of the unit
  nsenter -t "$leader" -a sh -c "
    set -eu; grep -E '^(Uid|Cap|NoNewPrivs|Seccomp)' /proc/$pid/status; sed 1,2d /proc/$pid/net/dev; ls /proc/$pid/root/ /proc/$pid/root/run /proc/$pid/root/etc /proc/$pid/root/dev 2>&1 || true
    [ \"\$(stat -c %U /proc/$pid)\" = proxyvpn-qemu ]
    [ -z \"\$(grep '^Cap' /proc/$pid/status | grep -v 0000000000000000)\" ]
    grep -q '^NoNewPrivs:.1' /proc/$pid/status; grep -q '^Seccomp:.2' /proc/$pid/status
    [ \"\$(sed 1,2d /proc/$pid/net/dev | cut -d: -f1 | xargs)\" = lo ]
    for kind in net mnt user ipc; do [ \"\$(readlink /proc/$pid/ns/\$kind)\" != \"\$(readlink /proc/1/ns/\$kind)\" ]; done
    rest=\$(ls -d /proc/$pid/root/* /proc/$pid/root/etc/* | sed 's#/proc/$pid/root/##' | grep -vxE 'bin|dev|etc|etc/ld.so.cache|lib|lib32|lib64|proc|run|sbin|sys|usr' || true)
    echo \"beside programs: \$rest\"; [ -z \"\$rest\" ]; sockets=\$(find /proc/$pid/root/run /proc/$pid/root/dev ! -type d ! -type c ! -type l)
    echo \"files of services: \$sockets\"; [ -z \"\$sockets\" ]"
}
qemu_ends() {
  local pid; pid=$(qemu_pid); [ "${pid:-0}" -gt 1 ] || return 1
  end_qemu
  none() { [ -z "$(root systemctl list-units --plain --no-legend 'proxyvpn-qemu@*.service' </dev/null)" ] && ! root test -e "/proc/$pid" </dev/null; }
  wait_for 5 none
}
qemu_kvm() { # the node is the box's own
  nsenter -t "$leader" -a sh -c 'mknod -m 660 /dev/kvm c 10 232 && chgrp kvm /dev/kvm'
  hold_qemu kvm; end_qemu
  nsenter -t "$leader" -a rm /dev/kvm
  grep -q '"started"' "$LOGS/qemu"
}
no_kvm() { hold_qemu kvm; end_qemu; grep -q '"failed".*/dev/kvm cannot be opened' "$LOGS/qemu"; }
qemu_checks() {
  check "the launcher's socket is the daemon's alone" socket_is_the_daemons
  check "systemd-analyze security gives QEMU's unit 0.5 or better" qemu_score
  if [ -z "$(command -v qemu-system-x86_64)" ]; then skipped "QEMU in its unit" "qemu-system-x86_64 is not installed"; return; fi

  check "a connection starts QEMU, and the guest's console is in the journal" qemu_starts
  check "QEMU has no network, no right and no file of the machine" qemu_holds_nothing
  check "QEMU ends with the connection, and its unit goes" qemu_ends
  if [ -c /dev/kvm ]; then check "QEMU may use /dev/kvm" qemu_kvm; else skipped "QEMU may use /dev/kvm" "there is none"; fi
  check "without /dev/kvm the cause is told" no_kvm
}
