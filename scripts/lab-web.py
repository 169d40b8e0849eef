"""Web servers of the lab: lab-web.py CERT KEY ROOT; http on 80, https on 443, echo on 7, IPv4 and IPv6.

GET /            a line
GET /bytes/N     N bytes, the same every time
GET /slow/N      N bytes, one KiB every 50 ms
GET /git/…       files below ROOT/git (git's dumb protocol)
PUT, POST        answers with the SHA-256 of what was sent
"""

import hashlib
import http.server
import os
import random
import socket
import socketserver
import ssl
import sys
import threading
import time
import urllib.parse

CERT, KEY, ROOT = sys.argv[1:4]
BLOCK = random.Random(20240229).randbytes(1 << 20)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format, *args):  # noqa: A002 (name of the base class)
        sys.stderr.write(f"{self.client_address[0]} {format % args}\n")

    def reply(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def stream(self, length, chunk, pause):
        self.send_response(200)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        sent = 0
        while sent < length:
            # every piece starts with its place, so that none can stand for another
            piece = (sent.to_bytes(8, "big") + BLOCK[8:chunk])[: length - sent]
            self.wfile.write(piece)
            sent += len(piece)
            if pause:
                time.sleep(pause)

    def do_GET(self):
        path = urllib.parse.urlsplit(self.path).path
        if path == "/":
            return self.reply(200, f"hello from {self.server.name}, you are {self.client_address[0]}\n".encode())
        if path.startswith("/bytes/"):
            return self.stream(int(path[7:]), len(BLOCK), 0)
        if path.startswith("/slow/"):
            return self.stream(int(path[6:]), 1024, 0.05)
        if path.startswith("/git/"):
            file = os.path.realpath(os.path.join(ROOT, path[1:]))
            if file.startswith(os.path.realpath(ROOT) + "/") and os.path.isfile(file):
                with open(file, "rb") as content:
                    return self.reply(200, content.read())
        return self.reply(404, b"not found\n")

    def do_PUT(self):
        if self.headers.get("Expect") == "100-continue":
            pass  # the base class has answered it
        left, digest = int(self.headers.get("Content-Length", "0")), hashlib.sha256()
        while left:
            data = self.rfile.read(min(left, 1 << 20))
            if not data:
                return
            digest.update(data)
            left -= len(data)
        self.reply(200, digest.hexdigest().encode() + b"\n")

    do_POST = do_PUT


class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6
    request_queue_size = 512
    daemon_threads = True

    def __init__(self, port, name, context=None):
        self.name, self.context = name, context
        super().__init__(("::", port), Handler)

    def server_bind(self):
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        # a test's server may have one of the addresses for itself
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "web.lab.test", self.server_address[1]

    def finish_request(self, request, client_address):
        if self.context:  # in the connection's own thread: a slow handshake holds nobody up
            request = self.context.wrap_socket(request, server_side=True)
        super().finish_request(request, client_address)

    def handle_error(self, request, client_address):
        sys.stderr.write(f"{client_address[0]} {sys.exc_info()[1]!r}\n")


class Echo(socketserver.ThreadingTCPServer):
    address_family = socket.AF_INET6
    allow_reuse_address = True
    daemon_threads = True

    class RequestHandlerClass(socketserver.BaseRequestHandler):
        def handle(self):
            """Returns everything only after the other side has finished sending: a half-close is needed."""
            data = b""
            while piece := self.request.recv(65536):
                data += piece
            self.request.sendall(data + f"[{len(data)} bytes]".encode())


tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
tls.load_cert_chain(CERT, KEY)
for server in Server(80, "http"), Server(443, "https", tls), Echo(("::", 7), Echo.RequestHandlerClass):
    threading.Thread(target=server.serve_forever, daemon=True).start()
threading.Event().wait()
