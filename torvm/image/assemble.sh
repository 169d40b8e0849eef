# shellcheck shell=bash
# From a folder of unpacked packages to the TorVM's image. Sourced by the recipes of the distributions, after scripts/common.sh.

# In this order, with what they need before them. What the kernel has built in is passed over.
MODULES=(virtio_pci virtio_console virtio_blk virtio_net virtio-rng qemu_fw_cfg ext4 button evdev
  nf_tables nft_ct nft_chain_nat nft_redir nft_reject_inet)
# Only for processors that have the instructions, and none of ours needs them.
SKIPPED_MODULES=' crc32c-intel crc32c_intel '
PROGRAMS=(tor nft mke2fs e2fsck xz)

need_tools() {
  local tool missing=()
  for tool in "$@" python3 zstd lz4 xz depmod modprobe readelf sha256sum; do command -v "$tool" >/dev/null || missing+=("$tool"); done
  [ "${#missing[@]}" = 0 ] || die "these programs are missing: ${missing[*]} (sudo scripts/setup.sh installs them)"
}

# build_init: the guest's PID 1, static and without a path of this machine in it. Prints where it is.
build_init() {
  local target home
  use_cargo
  # named, so that the flags are not for programs that run while it is built
  target=$(as_builder rustc -vV | sed -n 's/^host: //p')
  home=${CARGO_HOME:-$(as_builder printenv HOME)/.cargo}
  RUSTFLAGS="-C target-feature=+crt-static --remap-path-prefix=$(target_dir)=/target --remap-path-prefix=$ROOT=/proxyvpn"
  RUSTFLAGS+=" --remap-path-prefix=$home=/cargo --remap-path-prefix=$(as_builder rustc --print sysroot)=/rust"
  export RUSTFLAGS
  cargo_run build --release --locked --quiet -p torvm-init --target "$target" >&2 || die "torvm-init was not built"
  echo "$(target_dir)/$target/release/torvm-init"
}

# find_in TREE NAME FOLDER...: the first file of that name in those folders of the tree.
find_in() {
  local tree=$1 name=$2 folder; shift 2
  for folder in "$@"; do
    if [ -e "$tree/$folder/$name" ]; then echo "$tree/$folder/$name"; return 0; fi
  done
  die "no $name in the packages"
}

# add_program TREE IMAGE NAME: the program into usr/bin, with its libraries and its loader.
add_program() {
  local tree=$1 image=$2 name=$3 path loader
  path=$(find_in "$tree" "$name" usr/bin usr/sbin bin sbin) || exit 1
  install -D -m 755 "$path" "$image/usr/bin/$name"
  loader=$(readelf -lW "$path" | sed -n 's/.*program interpreter: \(.*\)\]/\1/p')
  if [ -n "$loader" ] && [ ! -e "$image$loader" ]; then
    install -D -m 755 "$(find_in "$tree" "${loader##*/}" "${loader%/*}" lib/x86_64-linux-gnu usr/lib/x86_64-linux-gnu usr/lib64 usr/lib lib)" "$image$loader"
  fi
  add_libraries "$tree" "$image" "$path"
}
add_libraries() {
  local tree=$1 image=$2 library path
  while read -r library; do
    [[ ! -e $image/usr/lib/$library && $library != ld-* && $library != libc.musl-* ]] || continue
    path=$(find_in "$tree" "$library" lib/x86_64-linux-gnu usr/lib/x86_64-linux-gnu lib usr/lib lib64 usr/lib64) || exit 1
    install -D -m 644 "$path" "$image/usr/lib/$library"
    add_libraries "$tree" "$image" "$path"
  done < <(readelf -dW "$3" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p')
}

# add_roots TREE IMAGE: the authorities by which transports check a front's certificate, in the one file where Go looks first.
add_roots() {
  local tree=$1 image=$2 roots
  mapfile -d '' -t roots < <(find "$tree/usr/share/ca-certificates/mozilla" -name '*.crt' -print0 | LC_ALL=C sort -z)
  [ "${#roots[@]}" -gt 0 ] || die "no certificate authorities in the packages"
  # unlike cat it ends every line
  awk 1 "${roots[@]}" | install -D -m 644 /dev/stdin "$image/etc/ssl/certs/ca-certificates.crt"
}

# add_modules TREE IMAGE RELEASE: numbered in the order of loading; signatures stay.
add_modules() {
  local tree=$1 image=$2 release=$3 module line kind path name number=0
  [ -e "$tree/lib" ] || ln -s usr/lib "$tree/lib"
  depmod -b "$tree" "$release" || die "depmod failed"
  mkdir -p "$image/modules" "$tree/no-modprobe.d"
  for module in "${MODULES[@]}"; do
    # -C: this machine's own settings of modules stay out
    line=$(modprobe -C "$tree/no-modprobe.d" -d "$tree" -S "$release" --show-depends "$module") || die "the kernel $release has no module $module"
    while read -r kind path _; do
      [ "$kind" = insmod ] || continue
      name=${path##*/}; name=${name%%.ko*}
      [[ $SKIPPED_MODULES != *" $name "* ]] || continue
      if compgen -G "$image/modules/*-$name.ko" >/dev/null; then continue; fi
      name=$(printf '%s/modules/%02d-%s.ko' "$image" "$number" "$name"); number=$((number + 1))
      case $path in
        *.xz) xz -dc "$path" >"$name" ;;
        *.zst) zstd -qdc "$path" >"$name" ;;
        *.gz) gzip -dc "$path" >"$name" ;;
        *) cp "$path" "$name" ;;
      esac
      chmod 644 "$name"
    done <<<"$line"
  done
}

# pack FOLDER: the folder as a compressed archive, to stdout. A larger window than -19's the kernel does not take.
pack() { python3 "$ROOT/torvm/image/cpio.py" "$1" | zstd -q -19 -T1 -c; }
# pack_fast FOLDER: the same, a third larger, but unpacked in a tenth of the time. The kernel's format of LZ4 has no end of its own: the
# zeros are it.
pack_fast() { python3 "$ROOT/torvm/image/cpio.py" "$1" | lz4 -q -l -12 -c && head -c 4 /dev/zero; }

# assemble TREE KERNEL RELEASE PACKAGES OUT [transports]: PACKAGES: a file with lines 'name<TAB>version<TAB>sha256'.
assemble() {
  local tree=$1 kernel=$2 release=$3 packages=$4 out=$5 transports=${6:-} work init name geoip
  work=$(mktemp -d)
  # shellcheck disable=SC2064 # its value is needed now
  trap "rm -rf '$work'" RETURN
  init=$(build_init) || exit 1
  install -D -m 755 "$init" "$work/image/init"
  mkdir -p "$work/image"/{dev,proc,run,state,sys}
  for name in "${PROGRAMS[@]}"; do add_program "$tree" "$work/image" "$name"; done
  add_modules "$tree" "$work/image" "$release"
  # Packed once more: a third of all that would be unpacked at every start, and few need it.
  geoip=$(find_in "$tree" geoip usr/share/tor) || exit 1
  xz -6 -T1 -c "$geoip" | install -D -m 644 /dev/stdin "$work/image/usr/share/torvm/geoip.xz"
  # Names are looked up in /etc/hosts alone.
  install -D -m 644 /dev/stdin "$work/image/etc/nsswitch.conf" <<<'hosts: files'
  mkdir -p "$work/out" "$out"
  install -m 644 "$kernel" "$work/out/vmlinuz"
  if [ -n "$transports" ]; then
    # Made beside what the image has, so that no library stands in it twice.
    cp -a "$work/image" "$work/transports"
    add_program "$tree" "$work/transports" obfs4proxy
    if [ -e "$tree/usr/bin/snowflake-client" ]; then add_program "$tree" "$work/transports" snowflake-client; fi
    add_roots "$tree" "$work/transports"
    (cd "$work/image" && find . -type f -printf '%P\0') | (cd "$work/transports" && xargs -0 rm -f)
    find "$work/transports" -mindepth 1 -type d -empty -delete
    # Unpacked when the bridges need it: while the kernel unpacks the image, 128 MiB hold the whole of it twice.
    xz -6 -T1 "$work/transports/usr/bin"/*
  fi
  # Every start waits until this is unpacked, which is long without KVM. Tor's two largest files stay small all the same: that keeps the
  # whole below 12 MB. The kernel unpacks one archive after the other.
  mkdir -p "$work/tor/usr"/{bin,lib}
  mv "$work/image/usr/bin/tor" "$work/tor/usr/bin"
  mv "$work/image/usr/lib"/libcrypto.so.* "$work/tor/usr/lib"
  { pack "$work/tor"; pack_fast "$work/image"; } >"$work/out/initramfs"
  [ -z "$transports" ] || { cat "$work/out/initramfs"; pack "$work/transports"; } >"$work/out/initramfs-transports"
  printf 'torvm-init\t%s, %s\t%s\n' "$(sed -n 's/^version = "\(.*\)"/\1/p' "$ROOT/Cargo.toml" | head -n1)" \
    "$(as_builder rustc --version | cut -d' ' -f1,2)" "$(sha256sum <"$init" | cut -d' ' -f1)" | cat "$packages" - >"$work/packages"
  python3 - "$work/out" "$work/packages" <<'PYTHON'
import hashlib, json, os, sys
out, packages = sys.argv[1:]
def part(name):
    with open(os.path.join(out, name), "rb") as file:
        data = file.read()
    return {"file": name, "sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
manifest = {"version": 1, "kernel": part("vmlinuz"), "initramfs": part("initramfs")}
if os.path.exists(os.path.join(out, "initramfs-transports")):
    manifest["transports"] = part("initramfs-transports")
with open(packages) as file:
    rows = sorted(line.rstrip("\n").split("\t") for line in file)
manifest["packages"] = [dict(zip(("name", "version", "sha256"), row)) for row in rows]
with open(os.path.join(out, "manifest.json"), "w") as file:
    json.dump(manifest, file, indent=1)
    file.write("\n")
PYTHON
  # What is there stays whole until all is made; without a manifest nobody takes it.
  rm -f "$out/manifest.json" "$out/initramfs-transports"
  for name in "$work/out"/[!m]* "$work/out/manifest.json"; do install -m 644 "$name" "$out"; done
}
