#!/bin/bash
# alpine.sh: the TorVM's image as scripts/build-torvm-image.sh makes it, from Alpine's packages. Runs on Alpine, and needs no root.
#
#   torvm/image/alpine.sh [--out DIR] [--transports]
#
# UNTESTED: it was written from Alpine's documentation and never run. Known questions: whether its Tor has libseccomp (the configuration says
# 'Sandbox 1'), and whether its kernel has all modules of assemble.sh under these names; either makes the build or the guest's start fail.
# It needs: apk add bash binutils cargo coreutils findutils kmod lz4 python3 rust tar xz zstd
set -euo pipefail
# shellcheck source=scripts/common.sh
. "$(dirname "$0")/../../scripts/common.sh"
# shellcheck source=torvm/image/assemble.sh
. "$ROOT/torvm/image/assemble.sh"

out='' names=(linux-virt musl tor nftables e2fsprogs xz) transports=''
while [ $# -gt 0 ]; do case $1 in
  --out) out=${2:?--out needs a folder}; shift 2 ;;
  --transports) transports=1 names+=(ca-certificates obfs4proxy snowflake-client); shift ;;
  -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0" | sed '$d'; exit 0 ;;
  *) printf 'alpine.sh: unknown argument "%s" (see --help)\n' "$1" >&2; exit 2 ;;
esac; done

need_tools apk tar
[ "$(apk --print-arch)" = x86_64 ] || die "the image is made for x86-64 only"
out=${out:-$(target_dir)/torvm-image}
cache=$(target_dir)/torvm-packages
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$cache" "$work/tree"

# Only what would be installed today: other versions may lie in the cache.
mapfile -t files < <(apk fetch --recursive --simulate --output "$cache" "${names[@]}" | sed -n 's/^Downloading \(.*\)$/\1.apk/p')
[ "${#files[@]}" -gt 0 ] || die "apk knows no package (apk update?)"
apk fetch --quiet --recursive --output "$cache" "${names[@]}" || die "apk could not download the packages"
for file in "${files[@]}"; do
  apk verify --quiet "$cache/$file" || die "$cache/$file is not what Alpine signed"
  # signature, control and data are three archives in a row
  tar -xzf "$cache/$file" -C "$work/tree" --warning=no-unknown-keyword
  printf '%s\t%s\t%s\n' "$(sed -n 's/^pkgname = //p' "$work/tree/.PKGINFO")" "$(sed -n 's/^pkgver = //p' "$work/tree/.PKGINFO")" \
    "$(sha256sum <"$cache/$file" | cut -d' ' -f1)" >>"$work/packages"
done

release=$(find "$work/tree/lib/modules" -mindepth 1 -maxdepth 1 -name '*-virt' -printf '%f\n' | sort -V | tail -n1)
[ -n "$release" ] || die "no kernel in the packages"
assemble "$work/tree" "$work/tree/boot/vmlinuz-virt" "$release" "$work/packages" "$out" "$transports"
say "image: $out"
