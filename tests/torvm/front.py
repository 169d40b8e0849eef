"""What the pluggable transports meek and snowflake meet in the Internet: a front, which carries requests for other hosts by their `Host`,
and a STUN server. Behind the front are a meek server and snowflake's broker.

    front.py CERT KEY FRONT STUN BROKER BRIDGE FINGERPRINT

FRONT is the front's address (443), STUN that of the STUN server (UDP 3478); on BROKER (address:port) volunteers ask the broker by plain
HTTP. Meek's streams go to BRIDGE (address:port), whose FINGERPRINT the broker's clients must name.
"""

import contextlib
import http.server
import json
import queue
import select
import socket
import ssl
import struct
import sys
import threading

CERT, KEY, FRONT, STUN, BROKER, BRIDGE, FINGERPRINT = sys.argv[1:8]
MEEK_HOST, BROKER_HOST = "meek.lab.test", "broker.lab.test"
# of a body of meek, in both directions
PAYLOAD = 0x10000
# how long a volunteer is kept waiting for a client, and a client for a volunteer's answer
POLL_SECONDS, ANSWER_SECONDS = 10, 14


def address_of(text):
    host, port = text.split(":")
    return host, int(port)


class Meek:
    """Each session is a connection to the bridge: what is posted is sent, and answered with what came."""

    def __init__(self):
        self.sessions = {}

    def post(self, session, body):
        with contextlib.suppress(OSError):
            if session not in self.sessions:
                self.sessions[session] = socket.create_connection(address_of(BRIDGE))
            bridge = self.sessions[session]
            bridge.sendall(body)
            return bridge.recv(PAYLOAD) if select.select([bridge], [], [], 0.05)[0] else b""
        return b""


class Meeting:
    """A client with its offer, and its volunteer's answer."""

    def __init__(self, request):
        self.request, self.answer, self.over = request, queue.Queue(), False


class Broker:
    """Gives each client's offer to one volunteer that asks, and its answer back. Knows one bridge."""

    def __init__(self):
        self.waiting, self.met = queue.Queue(), {}

    def client(self, body):
        version, _, text = body.partition(b"\n")
        meeting = Meeting(json.loads(text))
        if version != b"1.0" or meeting.request.get("fingerprint") != FINGERPRINT:
            return {"error": "no such bridge"}
        self.waiting.put(meeting)
        try:
            return {"answer": meeting.answer.get(timeout=ANSWER_SECONDS)}
        except queue.Empty:
            meeting.over = True
            return {"error": "no volunteer answered"}

    def proxy(self, body):
        with contextlib.suppress(queue.Empty):
            while (meeting := self.waiting.get(timeout=POLL_SECONDS)).over:
                pass
            self.met[json.loads(body)["Sid"]] = meeting
            return {"Status": "client match", "Offer": meeting.request["offer"], "NAT": meeting.request["nat"]}
        return {"Status": "no match"}

    def answer(self, body):
        said = json.loads(body)
        meeting = self.met.pop(said["Sid"])
        meeting.answer.put(said["Answer"])
        return {"Status": "client gone" if meeting.over else "success"}


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, form, *args):
        sys.stderr.write(f"{self.client_address[0]} {form % args}\n")

    def do_POST(self):
        body = self.rfile.read(min(int(self.headers.get("Content-Length", "0")), PAYLOAD))
        host = self.headers.get("Host")
        if self.server.context and host == MEEK_HOST and (session := self.headers.get("X-Session-Id")):
            return self.reply(200, self.server.meek.post(session, body))
        asked = {"/client": self.server.broker.client} if self.server.context else {"/proxy": self.server.broker.proxy, "/answer": self.server.broker.answer}
        if self.path in asked and (host == BROKER_HOST or not self.server.context):
            return self.reply(200, json.dumps(asked[self.path](body)).encode())
        return self.reply(404, b"")

    def reply(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class Server(http.server.ThreadingHTTPServer):
    """`context`: of the front; without, for volunteers."""

    daemon_threads = True

    def __init__(self, address, broker, meek=None, context=None):
        self.broker, self.meek, self.context = broker, meek, context
        super().__init__(address, Handler, bind_and_activate=False)
        # the lab's web server has this port, on all addresses
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self.server_bind()
        self.server_activate()

    def finish_request(self, request, client_address):
        if self.context:
            request = self.context.wrap_socket(request, server_side=True)
        super().finish_request(request, client_address)

    def handle_error(self, request, client_address):
        sys.stderr.write(f"{client_address[0]} {sys.exc_info()[1]!r}\n")


def stun():
    """Tells who asks by which address and port it is seen (RFC 8489)."""
    cookie = 0x2112A442
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind((STUN, 3478))
        while True:
            asked, (host, port) = server.recvfrom(2048)
            if len(asked) < 20 or struct.unpack_from(">H2xI", asked) != (1, cookie):
                continue
            seen = struct.unpack(">I", socket.inet_aton(host))[0]
            mapped = struct.pack(">HHBBHI", 0x0020, 8, 0, 1, port ^ cookie >> 16, seen ^ cookie)
            server.sendto(struct.pack(">HHI", 0x0101, len(mapped), cookie) + asked[8:20] + mapped, (host, port))


def main():
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERT, KEY)
    broker = Broker()
    for server in Server((FRONT, 443), broker, Meek(), context), Server(address_of(BROKER), broker):
        threading.Thread(target=server.serve_forever, daemon=True).start()
    stun()


if __name__ == "__main__":
    main()
