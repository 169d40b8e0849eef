#!/bin/bash
# build-torvm-image.sh: makes the TorVM's image (kernel, initramfs, manifest) from packages of this Debian or Ubuntu. Needs no root.
#
#   scripts/build-torvm-image.sh [--out DIR] [--transports]
#
#   --out DIR      where it goes (default target/torvm-image)
#   --transports   a second initramfs as well, with pluggable transports (obfs4, meek_lite, snowflake where there is a package of it)
#
# The same packages, sources and compiler give the same bytes. Packages are fetched and verified by apt, and kept for the next time.
set -euo pipefail
# shellcheck source=scripts/common.sh
. "$(dirname "$0")/common.sh"
# shellcheck source=torvm/image/assemble.sh
. "$ROOT/torvm/image/assemble.sh"

out='' transports=''
while [ $# -gt 0 ]; do case $1 in
  --out) out=${2:?--out needs a folder}; shift 2 ;;
  --transports) transports=1; shift ;;
  -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0" | sed '$d'; exit 0 ;;
  *) printf 'build-torvm-image.sh: unknown argument "%s" (see --help)\n' "$1" >&2; exit 2 ;;
esac; done

need_tools apt-get apt-cache dpkg-deb
[ "$(dpkg --print-architecture)" = amd64 ] || die "the image is made for x86-64 only"
out=${out:-$(target_dir)/torvm-image}
cache=$(target_dir)/torvm-packages
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$cache" "$work/tree"

field() { sed -n "s/^$2: //p" <<<"$1" | head -n1; }
# show NAME: what apt knows of the version that would be installed; fails when there is none.
show() { apt-cache show --no-all-versions "$1" 2>/dev/null; }
# depends RECORD: of what a package needs, the names of libraries and of the parts of a kernel; of alternatives the first that there is.
depends() {
  local group name
  { field "$1" Pre-Depends; field "$1" Depends; } | tr ',' '\n' | while IFS= read -r group; do
    for name in $(tr '|' '\n' <<<"$group" | sed 's/[(:].*//'); do
      [[ $name =~ ^(lib|zlib|linux-image-[0-9]|linux-modules-[0-9]) ]] || continue
      if show "$name" >/dev/null; then echo "$name"; break; fi
    done
  done
}
# fetch NAME RECORD: into the cache unless it is there. Prints the file.
fetch() {
  local sha version file
  sha=$(field "$2" SHA256); version=$(field "$2" Version)
  [[ $sha =~ ^[0-9a-f]{64}$ ]] || die "apt knows no SHA-256 of $1"
  file=$cache/$sha.deb
  if ! sha256sum --status -c - <<<"$sha  $file" 2>/dev/null; then
    (cd "$work" && apt-get -qq -o APT::Sandbox::User=root download "$1=$version") >&2 || die "apt-get could not download $1 $version"
    mv "$work/$1"_*.deb "$file"
    sha256sum --status -c - <<<"$sha  $file" || die "$file is not what apt's index promises"
  fi
  echo "$file"
}

kernel=
for name in linux-image-cloud-amd64 linux-image-virtual linux-image-amd64; do
  if show "$name" >/dev/null; then kernel=$name; break; fi
done
[ -n "$kernel" ] || die "apt knows no kernel package (apt-get update?)"
queue=("$kernel" tor tor-geoipdb nftables e2fsprogs xz-utils)
if [ -n "$transports" ]; then
  queue+=(obfs4proxy ca-certificates)
  if show snowflake-client >/dev/null; then queue+=(snowflake-client); else say "apt knows no snowflake-client: the image will not have it"; fi
fi
declare -A seen=()
while [ "${#queue[@]}" -gt 0 ]; do
  name=${queue[0]}; queue=("${queue[@]:1}")
  [ -z "${seen[$name]:-}" ] || continue
  seen[$name]=1
  record=$(show "$name") || die "apt knows no package $name (apt-get update?)"
  file=$(fetch "$name" "$record")
  dpkg-deb -x "$file" "$work/tree"
  printf '%s\t%s\t%s\n' "$name" "$(field "$record" Version)" "$(field "$record" SHA256)" >>"$work/packages"
  mapfile -t more < <(depends "$record")
  queue+=("${more[@]}")
done

image=$(find "$work/tree/boot" -name 'vmlinuz-*' | sort -V | tail -n1)
[ -n "$image" ] || die "no kernel in the packages"
assemble "$work/tree" "$image" "${image##*/vmlinuz-}" "$work/packages" "$out" "$transports"
say "image: $out ($(du -h --apparent-size "$out/vmlinuz" | cut -f1) kernel, $(du -h --apparent-size "$out/initramfs" | cut -f1) initramfs)"
