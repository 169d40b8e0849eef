"""A proxy that does what it is told: proxy.py ADDRESS PORT MODE [LOG].

tunnel   a CONNECT proxy that passes half-closes on (squid and tinyproxy close both ways)
silent   takes connections and answers nothing
refuse   403 to every CONNECT
names    a CONNECT proxy that refuses addresses; every name is the web server
sleepy   answers the first CONNECT (the probe), later ones never
garbage  answers with something that is not HTTP
huge     a response header without an end
"""

import ipaddress
import socket
import sys
import threading
import time

address, port, mode = sys.argv[1], int(sys.argv[2]), sys.argv[3]
seen = [0]
WEB = "203.0.113.80"


def read_header(client):
    data = b""
    while b"\r\n\r\n" not in data:
        piece = client.recv(4096)
        if not piece:
            return None
        data += piece
        if len(data) > 65536:
            return None
    return data


def is_address(host):
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def pump(source, sink):
    try:
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        for end in source, sink:
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass


def serve(client):
    with client:
        header = read_header(client)
        if header is None:
            return
        seen[0] += 1
        if mode == "silent" or (mode == "sleepy" and seen[0] > 1):
            time.sleep(3600)
        elif mode == "garbage":
            client.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
            time.sleep(1)
        elif mode == "huge":
            client.sendall(b"HTTP/1.1 200 OK\r\n")
            try:
                while True:
                    client.sendall(b"X-Filler: " + b"a" * 1000 + b"\r\n")
            except OSError:
                return
        elif mode == "refuse":
            client.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
        else:
            host, _, target = header.split(b" ")[1].decode().rpartition(":")
            if mode == "names":
                if is_address(host.strip("[]")):
                    client.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
                    return
                host = WEB
            try:
                upstream = socket.create_connection((host.strip("[]"), int(target)), 10)
            except OSError:
                client.sendall(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")
                return
            upstream.settimeout(None)
            client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            if mode == "sleepy":
                return
            with upstream:
                other = threading.Thread(target=pump, args=(client, upstream), daemon=True)
                other.start()
                pump(upstream, client)
                other.join()


with socket.create_server((address, port), backlog=256) as listener:
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=serve, args=(connection,), daemon=True).start()
