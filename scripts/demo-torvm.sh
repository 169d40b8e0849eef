# shellcheck shell=bash
# The part of demo.sh that shows the TorVM backend. Sourced by it.
# shellcheck disable=SC2154  # demo.sh sets what is used here

image=$(target_dir)/torvm-image
scripts/build-torvm-image.sh --transports --out "$image" >/dev/null || fail "the image was not built"
ok "the virtual machine's image is built from the distribution's packages: $(du -h "$image/initramfs" | cut -f1) initramfs"

lab_up --stage "$stage" --tor
network() { python3 -c 'import json, sys; print(*json.load(open(sys.argv[1]))[sys.argv[2]])' "$LAB/tor/network.json" "$1"; }
read -ra exits <<<"$(network exits)"; read -ra relays <<<"$(network relays)"
onion=$(python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["onion"])' "$LAB/tor/network.json")
ok "namespaces: a machine with its own system bus and polkitd; beyond a wire a private Tor network: ${#exits[@]} exits, ${#relays[@]} relays, a bridge, an onion service"

# packets of the machine on the wire, but TCP to relays, ARP and neighbour discovery
allowed=$(printf 'dst host %s or ' "${exits[@]}" "${relays[@]}"); allowed=${allowed% or }
around() { lab_wire "src host ($LAB_APP4 or $LAB_APP6) and not (tcp and ($allowed)) and not arp and not icmp6 and not dst net 224.0.0.0/4 and not dst net ff00::/8" | wc -l; }
by_exit() { # by_exit URL: the page, if the server saw an exit
  OUT=$(alice curl -sS --max-time 60 "$1" 2>&1) || fail "$1: $OUT"
  local address
  for address in "${exits[@]}"; do [[ $OUT != *"$address"* ]] || return 0; done
  fail "the web server saw another client than an exit: $OUT"
}
{
  printf 'backend = "torvm"\n[upstream]\nurl = "direct://"\n[torvm]\nmemory-mib = 128\naccel = "tcg"\ntesting = true\n'
  python3 -c 'import json, sys; print("directory-authorities =", json.dumps(json.load(open(sys.argv[1]))["authorities"]))' "$LAB/tor/network.json"
} | app tee /etc/proxyvpn/profiles.d/tor.toml >/dev/null
lab_daemon --torvm-image "$image"
pid=$(lab_daemon_pid) || fail "proxyvpnd ended"
caps=$(app sed -n 's/^CapEff:[[:space:]]*//p' "/proc/$pid/status") uid=$(app stat -c %U "/proc/$pid")
[ "$uid $caps" = "proxyvpn 0000000000001000" ] || fail "proxyvpnd runs as $uid with capabilities $caps"
ok "proxyvpnd runs as user proxyvpn, its only capability is CAP_NET_ADMIN; a profile with backend = \"torvm\""

# The detector first: without protection it must see the packets.
run "direct fetch" alice curl -sS --max-time 10 http://web.lab.test/
grep -q "you are .*$LAB_APP4" <<<"$OUT" || fail "unexpected answer: $OUT"
[ "$(around)" -gt 0 ] || fail "the sniffer does not see direct packets"
before=$(lab_state)
ok "before: alice's curl reaches the web server directly, and the sniffer on the wire sees it"

seen=$(around) begin=$SECONDS
run "connect" alice proxyctl connect tor
status_is connected || fail "status is not connected: $(alice proxyctl status)"
ok "alice, who is not root, connects: proxyctl connect tor ($((SECONDS - begin)) s): $(tail -n1 <<<"$OUT")"
by_exit http://web.lab.test/
ok "http:   $OUT, which is an exit"
by_exit https://web.lab.test/
ok "https:  $OUT (certificate checked end to end)"
# the periods of this network are two minutes, not a day: who asks at the change of one gets nothing, and has to forget that
onion_page() {
  OUT=$(alice curl -sS --max-time 20 "http://$onion/" 2>&1) || true
  [[ $OUT = *"hello from"* ]] || { alice proxyctl torvm new-identity >/dev/null 2>&1; return 1; }
}
wait_for 70 onion_page || fail "the onion service does not answer: $OUT"
ok "onion:  http://${onion:0:16}….onion/ by a curl that knows nothing of Tor"
run "dns" alice dig +short +time=15 +tries=1 @9.9.9.9 web.lab.test
[ "$OUT" = "$LAB_WEB" ] || fail "unexpected answer: $OUT"
ok "dns:    whichever resolver is asked, Tor answers: $OUT"
[ "$(around)" = "$seen" ] || fail "packets went around Tor: $(lab_wire "src host $LAB_APP4 and not (tcp and ($allowed))" | tail -n3)"
ok "the sniffer saw TCP to relays and nothing else"

app pkill -KILL -f '^(/[^ ]*/)?qemu-system-' || fail "QEMU does not run"
blocked() { ! status_is connected; }
wait_for 5 blocked || fail "QEMU is killed and the state is connected"
if OUT=$(alice curl -sS --max-time 2 http://web.lab.test/ 2>&1); then fail "a fetch worked without the virtual machine: $OUT"; fi
ok "QEMU is killed: blocked (${OUT#curl: })"
back() { status_is connected; }
wait_for 90 back || fail "it does not come back: $(alice proxyctl status)"
by_exit http://web.lab.test/
[ "$(around)" = "$seen" ] || fail "packets went around Tor: $(lab_wire "src host $LAB_APP4 and not (tcp and ($allowed))" | tail -n3)"
ok "it comes back by itself, and meanwhile nothing went around Tor"

run "disconnect" alice proxyctl disconnect
status_is disconnected || fail "status is not disconnected: $(alice proxyctl status)"
after=$(lab_state)
[ "$before" = "$after" ] || fail "the network is not as before: $(diff <(echo "$before") <(echo "$after"))"
ok "alice disconnects: rules, routes, nft, links, addresses and sysctls equal those before ($(wc -l <<<"$after") lines compared)"
off() { ! app pgrep -f '^(/[^ ]*/)?qemu-system-' >/dev/null; }
wait_for 8 off || fail "QEMU is left"
e2fsck -fn "$LAB/lib/state.img" >/dev/null 2>&1 || fail "the state disk is not clean"
ok "the virtual machine has powered down, its disk is clean"
lab_daemon_stop || fail "proxyvpnd did not end"
[ "$(lab_state)" = "$before" ] || fail "the daemon left something: $(diff <(echo "$before") <(lab_state))"
say "demo: ok"
