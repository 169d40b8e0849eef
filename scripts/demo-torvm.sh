# shellcheck shell=bash
# demo.sh --torvm, from the built programs on. Sourced by demo.sh, whose functions and $stage it uses.

stage=${stage:?}
image=$(target_dir)/torvm-image
OUT=$(build_torvm_image 2>&1) || fail "the image was not built: $OUT"
packages=$(grep -c '"name"' "$image/manifest.json")
scripts/install.sh --quiet --bin-dir "$(target_dir)/release" --torvm-image "$image" --destdir "$stage" || fail "install.sh"
ok "proxyvpnd, proxyctl and the virtual machine's image are built, the image from $packages packages of this distribution"

lab_up --stage "$stage" --tor
network() { python3 -c 'import json, sys; v = json.load(open(sys.argv[1]))[sys.argv[2]]; print(v if isinstance(v, str) else " ".join(v))' "$LAB/tor/network.json" "$1"; }
read -ra exits <<<"$(network exits)"; read -ra relays <<<"$(network relays)"
onion=$(network onion)
ok "namespaces: a machine with its own system bus and polkitd; beyond a wire a private Tor network (exits ${exits[*]}, relays ${relays[*]}),
    web servers, an onion service, DNS, a sniffer"

# What may leave is TCP to relays, and what every machine says to its link (ARP, neighbour discovery).
relay=$(printf 'dst host %s or ' "${exits[@]}" "${relays[@]}"); relay=${relay% or }
mine="(src host $LAB_APP4 or src host $LAB_APP6 or src net 10.10.0.0/16)"
around="$mine and not (src host $LAB_APP4 and tcp and ($relay)) and not arp and not icmp6 and not dst net 224.0.0.0/4 and not dst net ff00::/8"
packets() { lab_wire "$1" | wc -l; }
only_relays() { [ "$(packets "$around")" = "$seen" ] || fail "packets went around Tor: $(lab_wire "$around" | tail -n3)"; }
# by_exit URL: in $OUT the page of a server that saw one of the exits
by_exit() {
  local address
  run "$1" alice curl -sS --max-time 60 "$1"
  address=$(sed -n 's/.*you are \(::ffff:\)\{0,1\}//p' <<<"$OUT")
  case " ${exits[*]} " in *" ${address:-none} "*) ;; *) fail "$1: the web server saw another client than an exit: $OUT" ;; esac
}
reason() { alice proxyctl status --json | python3 -c 'import json, sys; r = json.load(sys.stdin)["reason"]; print(r["text"], "(" + r["code"] + ")")'; }
vm() { app pgrep -f '^(/[^ ]*/)?qemu-system-'; }
{
  printf 'backend = "torvm"\n[upstream]\nurl = "direct://"\n[torvm]\nmemory-mib = 128\ntesting = true\n'
  python3 -c 'import json, sys; print("directory-authorities =", json.dumps(json.load(open(sys.argv[1]))["authorities"]))' "$LAB/tor/network.json"
} | app tee /etc/proxyvpn/profiles.d/tor.toml >/dev/null

lab_daemon --torvm-image "$stage/usr/lib/proxyvpn/torvm"
pid=$(lab_daemon_pid) || fail "proxyvpnd ended"
caps=$(app sed -n 's/^CapEff:[[:space:]]*//p' "/proc/$pid/status") uid=$(app stat -c %U "/proc/$pid")
[ "$uid $caps" = "proxyvpn 0000000000001000" ] || fail "proxyvpnd runs as $uid with capabilities $caps"
ok "proxyvpnd runs as user proxyvpn, its only capability is CAP_NET_ADMIN"

# The detector first: without protection it must see the packets.
run "direct fetch" alice curl -sS --max-time 10 http://web.lab.test/
grep -q "you are .*$LAB_APP4" <<<"$OUT" || fail "unexpected answer: $OUT"
for leak in "tcp and dst host $LAB_WEB" "udp and dst host $LAB_DNS and dst port 53"; do
  [ "$(packets "($around) and $leak")" -gt 0 ] || fail "the sniffer does not see what goes direct: $leak"
done
before=$(lab_state)
ok "before: alice's curl looks the name up and reaches the web server directly, and the sniffer on the wire sees both"

seen=$(packets "$around") begin=$SECONDS
run "connect" alice proxyctl connect tor
status_is connected || fail "status is not connected: $(alice proxyctl status)"
[[ $OUT == *"Tor 100%"* ]] || fail "connect does not show how far Tor is: $OUT"
ok "alice, who is not root, connects in $((SECONDS - begin)) s: proxyctl connect tor"
grep -E '^Tor ' <<<"$OUT" | sed 's/^/      /'
qemu=$(vm) || fail "QEMU does not run"
caps=$(app sed -n 's/^CapBnd:[[:space:]]*//p' "/proc/$qemu/status") uid=$(app stat -c %U "/proc/$qemu")
links=$(app nsenter -t "$qemu" -n ip -o link | cut -d: -f2 | tr -d ' ')
[ "$uid $caps $links" = "proxyvpn-qemu 0000000000000000 lo" ] || fail "QEMU runs as $uid with capabilities $caps and the devices $links"
ok "QEMU runs as user proxyvpn-qemu, without a capability, in a network namespace without a device"

by_exit "http://$LAB_WEB/"
ok "http by address: $OUT, which is an exit"
by_exit https://web.lab.test/
ok "https by name:   $OUT (certificate checked end to end)"
# The periods of this network are two minutes, not a day: who asks at the change of one gets nothing, and has to forget that; a new identity is to be had every 10 s.
onion_page() { OUT=$(alice curl -sS --max-time 30 "http://$onion/" 2>&1) || { alice proxyctl torvm new-identity >/dev/null; sleep 11; false; }; }
wait_for 150 onion_page || fail "the onion service: $OUT"
[[ $OUT == *"hello from"* ]] || fail "unexpected answer: $OUT"
ok "onion service:   http://${onion:0:12}…onion/ answers to a curl that knows nothing of Tor"
run "DNS" alice dig +short +time=15 +tries=1 @9.9.9.9 web.lab.test A
[ "$OUT" = "$LAB_WEB" ] || fail "unexpected answer: $OUT"
ok "DNS:             whatever resolver is asked, here 9.9.9.9, Tor answers: web.lab.test is $OUT"
udp="import socket, time
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(5); s.connect(('$LAB_WEB', 443)); begin = time.monotonic()
try: s.send(b'x'); s.recv(1); print('answered')
except TimeoutError: print('timed out')
except OSError as error: print('refused after', round(1000 * (time.monotonic() - begin)), 'ms:', error.strerror) if time.monotonic() - begin < 1 else print('slow')"
run "UDP" alice "$LAB_PYTHON" -c "$udp"
[[ $OUT == refused* ]] || fail "UDP is not refused at once: $OUT"
ok "UDP, as of QUIC: $OUT; programs fall back to TCP"

run "circuits" alice proxyctl torvm circuits
grep -q 'exit[123]' <<<"$OUT" || fail "no circuit ends at an exit: $OUT"
ok "proxyctl torvm circuits:"
head -n 4 <<<"$OUT" | sed 's/^/      /'
run "new identity" alice proxyctl torvm new-identity
ok "proxyctl torvm new-identity: $OUT"
by_exit http://web.lab.test/
status=0; OUT=$(mallory proxyctl torvm new-identity 2>&1) || status=$?
[ "$status" = 4 ] || fail "mallory's new-identity ended with $status instead of 4: $OUT"
ok "polkit refuses mallory (exit code 4): ${OUT%%$'\n'*}"

only_relays
carried=$(lab_wire "$mine and tcp and ($relay)" | sed -E 's/.* > ([0-9.]+)\.[0-9]+: .*/\1/' | sort | uniq -c | awk '{printf "%s%s (%s)", sep, $2, $1; sep = ", "}')
[ -n "$carried" ] || fail "the sniffer saw no relay"
ok "all that left the machine since it connected, by packets: $carried: relays"

app kill -KILL "$qemu"
blocked() { ! status_is connected; }
wait_for 5 blocked || fail "QEMU is killed and the state is connected"
told() { cause=$(reason); [[ $cause == *vm-failed* ]]; }
wait_for 5 told || fail "the cause is not told: $(alice proxyctl status)"
if OUT=$(alice curl -sS --max-time 2 "http://$LAB_WEB/" 2>&1); then fail "a fetch worked without the virtual machine: $OUT"; fi
if alice timeout 2 bash -c "echo x >/dev/udp/$LAB_WEB/9" 2>/dev/null; then sleep 0.2; fi
only_relays
ok "kill -9 of QEMU: blocked, nothing left the machine. ${cause}"
begin=$SECONDS
back() { status_is connected; }
wait_for 90 back || fail "it does not come back: $(alice proxyctl status)"
by_exit http://web.lab.test/
only_relays
ok "$((SECONDS - begin)) s later it is back by itself: $OUT; meanwhile too nothing went around Tor"

run "disconnect" alice proxyctl disconnect
status_is disconnected || fail "status is not disconnected: $(alice proxyctl status)"
after=$(lab_state)
[ "$before" = "$after" ] || fail "the network is not as before: $(diff <(echo "$before") <(echo "$after"))"
ok "alice disconnects: rules, routes, nft, links, addresses and sysctls equal those before ($(wc -l <<<"$after") lines compared)"
off() { ! vm >/dev/null; }
wait_for 10 off || fail "QEMU is left"
e2fsck -fn "$LAB/lib/state.img" >/dev/null 2>&1 || fail "the disk of the virtual machine is not clean"
ok "the virtual machine has powered down, its disk is clean"
run "direct fetch after" alice curl -sS --max-time 10 http://web.lab.test/
[ "$(packets "$around")" -gt "$seen" ] || fail "the sniffer does not see the direct fetch"
ok "the web server is reached directly again"
lab_daemon_stop || fail "proxyvpnd did not end"
[ "$(lab_state)" = "$before" ] || fail "the daemon left something: $(diff <(echo "$before") <(lab_state))"
say "demo: ok"
