#!/bin/bash
# install.sh: builds proxyvpn if needed and installs it for systemd, D-Bus and polkit; or takes it away again.
#
#   sudo scripts/install.sh [--prefix /usr] [--bin-dir DIR]     install
#   scripts/install.sh --destdir DIR [...]                      only lay the files out below DIR
#   sudo scripts/install.sh --uninstall [--purge]               stop it, undo its network, remove every file
#
#   --prefix DIR    where the programs go (default /usr); what D-Bus, polkit and systemd read stays where they look for it
#   --bin-dir DIR   take proxyvpnd, proxyctl and proxyvpn-qemu from here instead of building them
#   --torvm-image DIR   the TorVM's image (default: what build-torvm-image.sh has made, if it has; without one only that backend is missing)
#   --purge         with --uninstall: remove /etc/proxyvpn (your profiles) too
#   --quiet         print only errors
set -euo pipefail
# shellcheck source=scripts/common.sh
. "$(dirname "$0")/common.sh"

destdir='' prefix=/usr bin_dir='' image='' uninstall='' purge='' quiet=''
while [ $# -gt 0 ]; do case $1 in
  --destdir) destdir=${2:?--destdir needs a folder}; shift 2 ;;
  --prefix) prefix=${2:?--prefix needs a folder}; shift 2 ;;
  --bin-dir) bin_dir=${2:?--bin-dir needs a folder}; shift 2 ;;
  --torvm-image) image=${2:?--torvm-image needs a folder}; shift 2 ;;
  --uninstall) uninstall=1; shift ;;
  --purge) purge=1; shift ;;
  --quiet) quiet=1; shift ;;
  -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0" | sed '$d'; exit 0 ;;
  *) printf 'install.sh: unknown argument "%s" (see --help)\n' "$1" >&2; exit 2 ;;
esac; done
[[ $prefix = /* ]] || die "--prefix must be an absolute path"
prefix=${prefix%/}
info() { [ -n "$quiet" ] || say "$@"; }

libexec=$prefix/libexec/proxyvpn
unit_dir=/usr/lib/systemd/system
image_dir=/usr/lib/proxyvpn/torvm # where the daemon looks for it
doc_dir=$prefix/share/doc/proxyvpn
man_dir=$prefix/share/man
completions=("$prefix/share/bash-completion/completions/proxyctl" "$prefix/share/zsh/site-functions/_proxyctl"
  "$prefix/share/fish/vendor_completions.d/proxyctl.fish")

# Source file, mode and place of everything that is not built. Man pages: docs/man/NAME.SECTION.
files=(
  "systemd/proxyvpnd.service 644 $unit_dir/proxyvpnd.service"
  "systemd/proxyvpn-lock.service 644 $unit_dir/proxyvpn-lock.service"
  "systemd/proxyvpn-qemu.socket 644 $unit_dir/proxyvpn-qemu.socket"
  "systemd/proxyvpn-qemu@.service 644 $unit_dir/proxyvpn-qemu@.service"
  "systemd/proxyvpn.sysusers 644 /usr/lib/sysusers.d/proxyvpn.conf"
  "polkit/org.proxyvpn1.policy 644 /usr/share/polkit-1/actions/org.proxyvpn1.policy"
  "polkit/proxyvpn-lock.rules 644 /usr/share/polkit-1/rules.d/org.proxyvpn1.lock.rules"
  "polkit/proxyvpn-dns.rules 644 /usr/share/polkit-1/rules.d/org.proxyvpn1.dns.rules"
  "polkit/proxyvpn-group.rules 644 $doc_dir/examples/proxyvpn-group.rules"
  "dbus/org.proxyvpn1.conf 644 /usr/share/dbus-1/system.d/org.proxyvpn1.conf"
  "dbus/org.proxyvpn1.service 644 /usr/share/dbus-1/system-services/org.proxyvpn1.service"
)
for file in "$ROOT"/dbus/org.proxyvpn1*.xml; do
  [ ! -e "$file" ] || files+=("dbus/${file##*/} 644 /usr/share/dbus-1/interfaces/${file##*/}")
done
for file in "$ROOT"/docs/examples/*.toml; do
  [ ! -e "$file" ] || files+=("docs/examples/${file##*/} 644 $doc_dir/examples/${file##*/}")
done
for file in "$ROOT"/docs/man/*.[1-8]; do
  [ ! -e "$file" ] || files+=("docs/man/${file##*/} 644 $man_dir/man${file##*.}/${file##*/}")
done
files+=("LICENSE 644 $doc_dir/LICENSE")

systemd_runs() { [ -z "$destdir" ] && [ -d /run/systemd/system ]; }
reload() {
  if systemd_runs; then
    systemctl daemon-reload
    # the bus reads its policy and the names it can start anew
    busctl --quiet call org.freedesktop.DBus /org/freedesktop/DBus org.freedesktop.DBus ReloadConfig 2>/dev/null || true
  fi
}

install_image() {
  [ -n "$image" ] || { image=$(target_dir)/torvm-image; [ -e "$image/manifest.json" ] || image=''; }
  if [ -z "$image" ]; then info "no TorVM image: 'scripts/build-torvm-image.sh' makes one"; return; fi
  [ -e "$image/manifest.json" ] || die "$image holds no image of the TorVM (manifest.json)"
  # the manifest last: the daemon believes what it says
  local file
  for file in vmlinuz initramfs initramfs-transports manifest.json; do
    [ ! -e "$image/$file" ] || install -D -m 644 "$image/$file" "$destdir$image_dir/$file"
  done
}

do_install() {
  [ -n "$destdir" ] || need_root
  if [ -z "$bin_dir" ]; then
    if ! pkg-config --exists libnftnl libmnl 2>/dev/null; then die "libmnl and libnftnl (development files) are missing: run 'sudo scripts/setup.sh'"; fi
    info "building (release)"; build_release || die "the build failed"
    bin_dir=$(target_dir)/release
  fi
  local spec source mode place
  install -D -m 755 "$bin_dir/proxyctl" "$destdir$prefix/bin/proxyctl"
  install -D -m 755 "$bin_dir/proxyvpnd" "$destdir$libexec/proxyvpnd"
  install -D -m 755 "$bin_dir/proxyvpn-qemu" "$destdir$libexec/proxyvpn-qemu"
  for spec in "${files[@]}"; do
    read -r source mode place <<<"$spec"
    install -D -m "$mode" "$ROOT/$source" "$destdir$place"
  done
  if [ "$prefix" != /usr ]; then
    sed -i "s#/usr/libexec/proxyvpn#$libexec#g" "$destdir$unit_dir/proxyvpnd.service" "$destdir$unit_dir/proxyvpn-lock.service" \
      "$destdir$unit_dir/proxyvpn-qemu@.service" "$destdir/usr/share/dbus-1/system-services/org.proxyvpn1.service"
  fi
  install_image
  install -d -m 755 "$destdir/etc/proxyvpn" "$destdir/etc/proxyvpn/profiles.d"
  local shell place_of index=0
  for shell in bash zsh fish; do
    place_of=$destdir${completions[$index]}; index=$((index + 1))
    mkdir -p "${place_of%/*}"
    "$bin_dir/proxyctl" completions "$shell" >"$place_of" || { rm -f "$place_of"; die "proxyctl gave no completions for $shell"; }
    chmod 644 "$place_of"
  done
  if [ -z "$destdir" ]; then
    if command -v systemd-sysusers >/dev/null; then systemd-sysusers proxyvpn.conf
    else
      local user
      for user in proxyvpn proxyvpn-qemu; do
        getent passwd "$user" >/dev/null || useradd --system --user-group -M -d / -s /usr/sbin/nologin "$user"
      done
    fi
    reload
    # it does nothing until lockdown is turned on
    if systemd_runs; then systemctl enable --quiet proxyvpn-lock.service; fi
    if systemd_runs; then systemctl enable --quiet --now proxyvpn-qemu.socket; fi
    if systemd_runs && systemctl is-active --quiet proxyvpnd.service; then
      if "$prefix/bin/proxyctl" status --check >/dev/null 2>&1; then
        info "A connection is up: the old daemon goes on. 'systemctl restart proxyvpnd' starts the new one, which connects again behind the block."
      else systemctl restart proxyvpnd.service; fi
    fi
    info "Installed. Profiles go to /etc/proxyvpn/profiles.d ($doc_dir/examples shows one); connect with: proxyctl connect NAME"
    info "The daemon starts when it is called; 'systemctl enable --now proxyvpnd' starts it at boot."
  else info "installed below $destdir"; fi
}

removed() { info "removed $1"; }
remove_file() { if [ -e "$destdir$1" ] || [ -L "$destdir$1" ]; then rm -f "$destdir$1"; removed "$1"; fi; }
remove_empty() { # a folder of ours, or one that was made for our file: only when nothing is in it
  local dir=$1
  while [ "$dir" != / ] && [ "$dir" != "$prefix" ] && [ "$dir" != /usr ] && rmdir "$destdir$dir" 2>/dev/null; do dir=${dir%/*}; done
}
do_uninstall() {
  [ -n "$destdir" ] || need_root
  local failed_cleanup=''
  if [ -z "$destdir" ]; then
    if systemd_runs; then systemctl disable --quiet --now proxyvpnd.service proxyvpn-lock.service proxyvpn-qemu.socket 2>/dev/null || true; fi
    if systemd_runs; then systemctl stop 'proxyvpn-qemu@*.service' 2>/dev/null || true; fi
    # whatever is left of a crash: needs no daemon, no state
    if [ -x "$libexec/proxyvpnd" ]; then "$libexec/proxyvpnd" --cleanup >/dev/null || failed_cleanup=1; fi
  fi
  [ -z "$failed_cleanup" ] || die "'$libexec/proxyvpnd --cleanup' failed, so nothing was removed: the network may still be blocked. Run it by hand to see why."
  local spec place dirs=()
  remove_file "$prefix/bin/proxyctl"; remove_file "$libexec/proxyvpnd"; remove_file "$libexec/proxyvpn-qemu"; dirs+=("$libexec")
  for spec in "${files[@]}"; do read -r _ _ place <<<"$spec"; remove_file "$place"; dirs+=("${place%/*}"); done
  for place in "${completions[@]}"; do remove_file "$place"; dirs+=("${place%/*}"); done
  # what an older release may have installed in folders that are only ours
  for place in "$libexec" "$doc_dir" "$image_dir"; do if [ -d "$destdir$place" ]; then rm -rf "${destdir}${place:?}"; removed "$place"; fi; done
  dirs+=("${image_dir%/*}")
  for place in "${dirs[@]}"; do remove_empty "$place"; done
  for place in /var/lib/proxyvpn /run/proxyvpn; do if [ -e "$destdir$place" ]; then rm -rf "$destdir$place"; removed "$place"; fi; done
  if [ -n "$purge" ]; then
    if [ -e "$destdir/etc/proxyvpn" ]; then rm -rf "$destdir/etc/proxyvpn"; removed /etc/proxyvpn; fi
  else
    rmdir "$destdir/etc/proxyvpn/profiles.d" "$destdir/etc/proxyvpn" 2>/dev/null || true
    [ ! -e "$destdir/etc/proxyvpn" ] || info "kept /etc/proxyvpn (your profiles; --purge removes it)"
  fi
  if [ -z "$destdir" ]; then
    local user
    for user in proxyvpn proxyvpn-qemu; do
      if getent passwd "$user" >/dev/null; then userdel "$user" 2>/dev/null && removed "user $user"; fi
      # userdel leaves a group that others were put in
      if getent group "$user" >/dev/null; then groupdel "$user" && removed "group $user"; fi
    done
    reload
    if systemd_runs; then systemctl reset-failed proxyvpnd.service proxyvpn-lock.service proxyvpn-qemu.socket 2>/dev/null || true; fi
  fi
}

if [ -n "$uninstall" ]; then do_uninstall; else do_install; fi
