#!/bin/bash
# setup.sh: installs what building and testing proxyvpn need on Debian or Ubuntu; a second run only looks and takes a second.
#   --build   only what building needs
set -euo pipefail
# shellcheck source=scripts/common.sh
. "$(dirname "$0")/common.sh"

build=(gcc binutils libc6-dev pkg-config libmnl-dev libnftnl-dev ca-certificates git kmod python3 xz-utils zstd lz4)
# a|b: any of them will do, the first that can be had is installed
run=(util-linux iproute2 "nftables" iptables procps "dbus" "polkitd|policykit-1")
test=("squid|squid-openssl" tinyproxy-bin dnsmasq-base conntrack openssh-server openssh-client curl wget netcat-openbsd "iputils-ping|inetutils-ping" tcpdump openssl python3
  rsync iperf3 "nginx|nginx-core" ethtool g++ valgrind shellcheck systemd-container mmdebstrap "passwd" "libpam-runtime" qemu-system-x86 tor obfs4proxy e2fsprogs "bind9-dnsutils|dnsutils" busybox-static)
# not in every distribution; the tests that need them say so
optional=(golang-go golang-snowflake-dev snowflake-client snowflake-proxy)
wanted=("${build[@]}" "${run[@]}" "${test[@]}")
case ${1:-} in
  --build) wanted=("${build[@]}") optional=() ;;
  '') ;;
  *) die "unknown argument '$1' (only --build is known)" ;;
esac

if ! command -v apt-get >/dev/null || ! command -v dpkg-query >/dev/null; then
  die "this script knows Debian and Ubuntu only. Install by hand what these Debian packages hold: ${wanted[*]}; and Rust >= $(rust_needed) (https://rustup.rs)"
fi

installed() { # of the names given, those that are installed
  { dpkg-query -W -f '${Package} ${db:Status-Status}\n' "$@" 2>/dev/null || true; } | sed -n 's/ installed$//p' | sort -u
}
missing_of() {
  local have entry name found names=()
  for entry in "$@"; do IFS='|' read -r -a alt <<<"$entry"; names+=("${alt[@]}"); done
  have=" $(installed "${names[@]}" | tr '\n' ' ') "
  for entry in "$@"; do
    found=
    IFS='|' read -r -a alt <<<"$entry"
    for name in "${alt[@]}"; do [[ $have != *" $name "* ]] || found=1; done
    [ -n "$found" ] || echo "$entry"
  done
}

policy=
restore_policy() { [ -z "$policy" ] || rm -f "$policy"; }
trap restore_policy EXIT
apt_ready=
apt_prepare() {
  [ -z "$apt_ready" ] || return 0
  [ "$(id -u)" = 0 ] || die "needs root to install packages (missing: $*): run 'sudo $0'"
  apt-get update -qq >/dev/null || die "apt-get update failed: look at the machine's package sources and its way to them"
  # no service may start only because a package of the tests brings one
  if [ ! -e /usr/sbin/policy-rc.d ]; then
    policy=/usr/sbin/policy-rc.d; printf '#!/bin/sh\nexit 101\n' >"$policy"; chmod 755 "$policy"
  fi
  apt_ready=1
}
candidate() { apt-cache policy "$1" 2>/dev/null | sed -n 's/^ *Candidate: *//p' | grep -v '(none)' || true; }
apt_install() {
  local log; log=$(mktemp)
  if ! DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" </dev/null >"$log" 2>&1; then
    tail -n 30 "$log" >&2; rm -f "$log"; die "apt-get could not install: $*"
  fi
  rm -f "$log"
}
# What a new package would start at the next boot stays off: the tests start their own.
quiet_services() {
  local unit
  command -v systemctl >/dev/null || return 0
  for unit in "$@"; do systemctl disable --quiet "$unit" >/dev/null 2>&1 || true; done
}

mapfile -t missing < <(missing_of "${wanted[@]}")
mapfile -t lacking < <([ "${#optional[@]}" = 0 ] || missing_of "${optional[@]}")
# Which packages there are shows only in fresh lists.
if [ "${#lacking[@]}" -gt 0 ] && { [ "${#missing[@]}" -gt 0 ] || ! compgen -G '/var/lib/apt/lists/*_Packages*' >/dev/null; }; then
  apt_prepare "${missing[*]} ${lacking[*]}"
fi
for name in "${lacking[@]}"; do
  if [ -n "$(candidate "$name")" ]; then missing+=("$name"); else say "setup: this distribution has no package $name: tests that need it will be skipped"; fi
done
if [ "${#missing[@]}" -gt 0 ]; then
  apt_prepare "${missing[*]}"
  install=() disable=()
  for entry in "${missing[@]}"; do
    IFS='|' read -r -a alt <<<"$entry"; pick=
    for name in "${alt[@]}"; do if [ -n "$(candidate "$name")" ]; then pick=$name; break; fi; done
    [ -n "$pick" ] || die "no package for '$entry' in the machine's package sources (on Ubuntu enable 'universe')"
    install+=("$pick")
    case $pick in
      squid | squid-openssl) disable+=(squid.service) ;;
      openssh-server) disable+=(ssh.service ssh.socket) ;;
      tor) disable+=(tor.service) ;;
      rsync | iperf3) disable+=("$pick.service") ;;
      nginx | nginx-core) disable+=(nginx.service) ;;
      snowflake-proxy) disable+=(snowflake-proxy.service) ;; # it would be a volunteer in the Internet
    esac
  done
  say "setup: installing ${install[*]}"
  apt_install "${install[@]}"
  quiet_services "${disable[@]}"
  mapfile -t missing < <(missing_of "${wanted[@]}")
  [ "${#missing[@]}" = 0 ] || die "still missing after installation: ${missing[*]}"
fi

# Rust: what is there, else the distribution's newest packages.
if ! cargo_dir=$(find_cargo); then
  need=$(rust_needed)
  apt_prepare "a Rust toolchain >= $need"
  pick=()
  if version_ge "$(candidate rustc | sed 's/+.*//; s/-.*//')" "$need" && [ -n "$(candidate cargo)" ]; then pick=(rustc cargo)
  elif version_ge "$(candidate rustc-web | sed 's/+.*//; s/-.*//')" "$need"; then pick=(rustc-web cargo-web) # Debian stable
  else # Ubuntu: rustc-1.NN beside cargo-1.NN
    for name in $(apt-cache search --names-only '^rustc-1\.[0-9]+$' | cut -d' ' -f1 | sort -Vr); do
      if version_ge "${name#rustc-}" "$need" && [ -n "$(candidate "cargo-${name#rustc-}")" ]; then pick=("$name" "cargo-${name#rustc-}"); break; fi
    done
  fi
  [ "${#pick[@]}" -gt 0 ] || die "Rust >= $need is needed and this distribution has none that is new enough: install it from https://rustup.rs (as the user who builds) and run this again"
  say "setup: installing ${pick[*]}"
  apt_install "${pick[@]}"
  cargo_dir=$(find_cargo) || die "the packages ${pick[*]} are installed, but no cargo >= $need was found"
fi
# rustfmt and clippy come apart from the compiler in Debian's and Ubuntu's packages
if [ "${1:-}" != --build ] && [[ $cargo_dir = /usr/bin || $cargo_dir = /usr/lib/rust-* ]]; then
  extra=()
  for tool in rustfmt clippy; do
    bin=$tool; [ "$tool" = rustfmt ] || bin=cargo-clippy
    [ ! -x "$cargo_dir/$bin" ] || continue
    if [[ $cargo_dir = /usr/lib/rust-* ]]; then suffix=-${cargo_dir#/usr/lib/rust-}; suffix=${suffix%/bin}
    elif [ -n "$(installed rustc-web)" ]; then suffix=-web; else suffix=; fi
    apt_prepare "$tool"
    name=rustfmt$suffix; [ "$tool" = rustfmt ] || name=rust$suffix-clippy
    [ -z "$(candidate "$name")" ] || extra+=("$name")
  done
  if [ "${#extra[@]}" -gt 0 ]; then say "setup: installing ${extra[*]}"; apt_install "${extra[@]}"; fi
fi
say "setup: ready ($(as_builder "$cargo_dir/rustc" --version | cut -d' ' -f1,2), $cargo_dir)"
