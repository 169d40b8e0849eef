# shellcheck shell=bash
# Shared by the scripts: messages, the toolchain, counting of results. Source it; it changes nothing by itself.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# where a distribution puts ip, nft and squid: not in every user's PATH
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
export LC_ALL=C.UTF-8

say() { printf '%s\n' "$*"; }
die() { printf '%s: %s\n' "${0##*/}" "$*" >&2; exit 1; }
need_root() { [ "$(id -u)" = 0 ] || die "needs root: run 'sudo $0'"; }

# The user who owns the sources' build: the one behind sudo, so that target/ is never root's by accident.
builder() { if [ "$(id -u)" = 0 ] && [ -n "${SUDO_USER:-}" ] && [ "$SUDO_USER" != root ]; then echo "$SUDO_USER"; fi; }
home_of() { getent passwd "$1" | cut -d: -f6; }

# version_ge A B: is A >= B (dotted numbers)?
version_ge() { [ "$(printf '%s\n%s\n' "$1" "$2" | sort -V | head -n1)" = "$2" ]; }
rust_needed() { sed -n 's/^rust-version *= *"\(.*\)"/\1/p' "$ROOT/Cargo.toml"; }

# as_builder CMD...: run as the user behind sudo, else as we are.
as_builder() {
  local user; user=$(builder)
  if [ -z "$user" ]; then "$@"; return; fi
  local keep=() name
  for name in CARGO_TARGET_DIR CARGO_HOME RUSTUP_HOME RUSTUP_TOOLCHAIN CARGO_NET_OFFLINE RUSTFLAGS RUSTC http_proxy https_proxy no_proxy; do
    [ -z "${!name:-}" ] || keep+=("$name=${!name}")
  done
  runuser -u "$user" -- env HOME="$(home_of "$user")" "${keep[@]}" "$@"
}

# find_cargo: prints the folder of the first cargo whose rustc is new enough; fails when there is none.
find_cargo() {
  local need dir user version
  need=$(rust_needed); user=$(builder)
  local dirs=()
  [ -z "$user" ] || dirs+=("$(home_of "$user")/.cargo/bin")
  IFS=: read -r -a path <<<"$PATH"
  dirs+=("${path[@]}" "${HOME:-/root}/.cargo/bin")
  for dir in /usr/lib/rust-*/bin; do dirs+=("$dir"); done
  for dir in "${dirs[@]}"; do
    if ! [ -x "$dir/cargo" ] || ! [ -x "$dir/rustc" ]; then continue; fi
    version=$(cd "$ROOT" && as_builder "$dir/rustc" --version 2>/dev/null | cut -d' ' -f2) || continue
    if [ -n "$version" ] && version_ge "${version%%-*}" "$need"; then echo "$dir"; return 0; fi
  done
  return 1
}

# use_cargo: puts it first in PATH, or says what to do.
use_cargo() {
  local dir
  dir=$(find_cargo) || die "no Rust toolchain >= $(rust_needed) found: run 'sudo scripts/setup.sh', or install one from https://rustup.rs"
  case :$PATH: in ":$dir:"*) ;; *) PATH=$dir:$PATH ;; esac
  export PATH
}
cargo_run() { (cd "$ROOT" && as_builder env PATH="$PATH" cargo "$@"); }
target_dir() { echo "${CARGO_TARGET_DIR:-$ROOT/target}"; }

# build_release: the programs, as the user behind sudo.
build_release() {
  use_cargo
  cargo_run build --release --locked --quiet -p proxyvpnd -p proxyctl -p proxyvpn-qemu
}
# build_torvm_image: into target/torvm-image, as the user behind sudo; nothing if what it is made from has not changed since.
build_torvm_image() {
  local made; made=$(target_dir)/torvm-image/manifest.json
  if [ -e "$made" ] && [ -z "$(find "$ROOT"/torvm "$ROOT/scripts/build-torvm-image.sh" "$ROOT/Cargo.lock" -newer "$made" -print -quit)" ]; then return 0; fi
  as_builder "$ROOT/scripts/build-torvm-image.sh"
}

# Results of a test script. check NAME CMD... runs one check, keeps its log and shows it only when it fails.
PASSED=0 FAILED=0 SKIPPED=0
LOGS=${PROXYVPN_TEST_LOGS:-/tmp/proxyvpn-test-$(id -u)}
passed() { PASSED=$((PASSED + 1)); say "ok       $1"; }
failed() { FAILED=$((FAILED + 1)); say "FAILED   $1"; }
skipped() { SKIPPED=$((SKIPPED + 1)); say "skipped  $1: $2"; }
check() {
  local name=$1 log; shift
  mkdir -p "$LOGS"; log=$LOGS/$(tr -c 'A-Za-z0-9.\n' '-' <<<"$name").log
  if "$@" >"$log" 2>&1 </dev/null; then passed "$name"; return 0; fi
  failed "$name"; sed 's/^/  | /' "$log" | tail -n "${PROXYVPN_LOG_LINES:-60}"; say "  (whole log: $log)"
  return 1
}
# add_counts: adds the figures of a line 'N passed, N failed, N skipped'.
add_counts() {
  local p f s
  [[ $1 =~ ([0-9]+)\ passed,\ ([0-9]+)\ failed,\ ([0-9]+)\ skipped ]] || return 1
  p=${BASH_REMATCH[1]} f=${BASH_REMATCH[2]} s=${BASH_REMATCH[3]}
  PASSED=$((PASSED + p)) FAILED=$((FAILED + f)) SKIPPED=$((SKIPPED + s))
}
# cargo_counts LOG: adds what `cargo test` counted; ignored tests are counted where they run.
cargo_counts() {
  local p f
  while read -r p f; do PASSED=$((PASSED + p)) FAILED=$((FAILED + f)); done \
    < <(sed -n 's/^test result: [A-Za-z]*\. \([0-9]*\) passed; \([0-9]*\) failed;.*/\1 \2/p' "$1")
}
# summary: the last line of a test script, and its exit status.
summary() { say "$PASSED passed, $FAILED failed, $SKIPPED skipped"; [ "$FAILED" = 0 ] && [ "$PASSED" -gt 0 ]; }
