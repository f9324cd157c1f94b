"""Real HTTP servers with faults: one for plain files, one that speaks the hub's protocol to the real
client.
"""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

HTML = b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head><body>Please sign in</body></html>"


@dataclass
class Fault:
    """What one request gets instead of the plain answer."""

    # status, cut, reset, stall, html, flip, redirect, slow, drip, raw, drip_headers, wrong_range, hang
    kind: str
    value: object = None
    after: int = 0
    headers: dict = field(default_factory=dict)


@dataclass
class Resource:
    data: bytes
    etag: str | None = '"v1"'
    last_modified: str | None = None
    ranges: bool = True
    honours_if_range: bool = True
    says_length: bool = True
    faults: list = field(default_factory=list)
    """Consumed one a GET; when it is empty the server behaves."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.handle_request(head=True)

    def do_GET(self):
        self.handle_request(head=False)

    def do_POST(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.handle_request(head=False)

    def handle_request(self, head):
        server = self.server.owner
        with server.lock:
            server.requests.append((self.command, self.path, dict(self.headers)))
            server.active += 1
            server.most_active = max(server.most_active, server.active)
        try:
            server.answer(self, head)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            with server.lock:
                server.active -= 1

    def send(self, status, body=b"", head=False, **headers):
        self.send_response(status)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name.replace("_", "-"), str(value))
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if not head:
            self.wfile.write(body)

    def send_json(self, value, status=200, **headers):
        self.send(status, json.dumps(value).encode(), Content_Type="application/json", **headers)

    def reset(self):
        """Closes with RST, as a crashing server does."""
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True


class QuietServer(ThreadingHTTPServer):
    """Clients that hang up are part of the tests."""

    def handle_error(self, request, client_address):
        pass


class Server:
    """Serves ``resources`` by path; keeps a log of requests."""

    def __init__(self, host="127.0.0.1"):
        self.resources, self.requests = {}, []
        self.lock, self.active, self.most_active = threading.Lock(), 0, 0
        self.http = QuietServer((host, 0), Handler)
        self.http.daemon_threads = True
        self.http.owner = self
        self.host = host

    @property
    def url(self):
        return f"http://{self.host}:{self.http.server_address[1]}"

    def add(self, path, data, **options):
        self.resources[path] = Resource(data, **options)
        return self.url + path

    def gets(self, path):
        return [
            headers for method, at, headers in self.requests if method == "GET" and urlsplit(at).path == path
        ]

    @contextmanager
    def running(self):
        thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.http.shutdown()
            self.http.server_close()

    def answer(self, request, head):
        resource = self.resources.get(urlsplit(request.path).path)
        if resource is None:
            request.send(404, b"not here")
            return
        serve(request, resource, head)


def serve(request, resource, head=False, **extra):
    """Answers one request for a resource, with ranges, or with the next fault."""
    fault = None if head or not resource.faults else resource.faults.pop(0)
    if fault and fault.kind == "status":
        return request.send(fault.value, b"busy", **fault.headers)
    if fault and fault.kind == "html":
        return request.send(200, HTML, Content_Type="text/html")
    if fault and fault.kind == "redirect":
        return request.send(302, b"", Location=fault.value)
    if fault and fault.kind in ("raw", "drip_headers"):
        return send_raw(request, fault)
    if fault and fault.kind == "hang":
        time.sleep(fault.value)
    if fault and fault.kind == "change":
        resource.data, resource.etag = fault.value
    data, begin, status = resource.data, 0, 200
    asked = request.headers.get("Range")
    condition = request.headers.get("If-Range")
    same = (
        condition is None
        or not resource.honours_if_range
        or condition in (resource.etag, resource.last_modified)
    )
    headers = {"ETag": resource.etag, "Last_Modified": resource.last_modified, **extra}
    if asked and resource.ranges and same:
        begin = int(asked.removeprefix("bytes=").split("-")[0])
        if begin >= len(data):
            return request.send(416, b"", Content_Range=f"bytes */{len(data)}")
        status, headers["Content_Range"] = 206, f"bytes {begin}-{len(data) - 1}/{len(data)}"
    if fault and fault.kind == "wrong_range":
        status, headers["Content_Range"] = 206, f"bytes {begin + 7}-{len(data) - 1}/{len(data)}"
    body = data[begin:]
    if fault and fault.kind == "flip":
        body = bytes([body[0] ^ 1]) + body[1:]
    if not resource.says_length:
        headers |= {"Transfer_Encoding": "chunked", "Content_Length": None}
    else:
        headers["Content_Length"] = len(body)
    request.send(status, b"", head, **headers)
    if not head:
        send_body(request, body, fault, chunked=not resource.says_length)
    return None


def send_raw(request, fault):
    """Bytes as they are (``value``) instead of an answer, or one after the other, ``after`` milliseconds
    apart.
    """
    pieces = [fault.value] if fault.kind == "raw" else [bytes([item]) for item in fault.value]
    for piece in pieces:
        request.wfile.write(piece)
        request.wfile.flush()
        time.sleep(fault.after / 1000)
    request.close_connection = True
    request.connection.shutdown(socket.SHUT_RDWR)


def send_body(request, body, fault, chunked):
    if chunked:
        body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    if fault is None or fault.kind in ("flip", "change", "wrong_range", "hang"):
        request.wfile.write(body)
        return
    if fault.kind == "drip":
        for at in range(len(body)):
            request.wfile.write(body[at : at + 1])
            request.wfile.flush()
            time.sleep(fault.value)
        return
    if fault.kind == "slow":
        for at in range(0, len(body), 65536):
            time.sleep(
                fault.value
            )  # before, not after: the client that has everything is not active any more
            request.wfile.write(body[at : at + 65536])
            request.wfile.flush()
        return
    request.wfile.write(body[: fault.after])
    request.wfile.flush()
    if fault.kind == "reset":
        time.sleep(0.5)  # until the client has taken what came
        request.reset()
        return
    if fault.kind == "stall":
        time.sleep(fault.value)
    request.close_connection = True
    request.connection.shutdown(socket.SHUT_RDWR)


class HubServer(Server):
    """As much of the hub as the real client and the workflow ask for."""

    def __init__(self, repo="owner/data", repo_type="dataset", host="127.0.0.1"):
        super().__init__(host)
        self.repo, self.repo_type = repo, repo_type
        self.commit = hashlib.sha1(b"first", usedforsecurity=False).hexdigest()
        self.files, self.tags, self.token, self.api_faults = {}, {"main"}, None, []
        self.lfs = {}
        self.cdn = None
        self.former = {}

    def put(self, path, data, lfs=True, **options):
        self.files[path] = Resource(data, **options)
        self.lfs[path] = lfs

    def move(self, files):
        """The branch has a new commit, with other content of these files; the former one can still be had."""
        self.former[self.commit] = dict(self.files)
        self.commit = hashlib.sha1(self.commit.encode(), usedforsecurity=False).hexdigest()
        for path, data in files.items():
            self.put(path, data)

    def at(self, revision):
        """The files of a revision."""
        return self.former.get(revision, self.files)

    @property
    def api_root(self):
        return f"/api/{self.repo_type}s/{self.repo}"

    @property
    def resolve_root(self):
        kind = "" if self.repo_type == "model" else f"{self.repo_type}s/"
        return f"/{kind}{self.repo}/resolve/"

    def entry(self, path, revision="main"):
        data = self.at(revision)[path].data
        git = hashlib.sha1(f"blob {len(data)}\0".encode() + data, usedforsecurity=False).hexdigest()
        entry = {"type": "file", "path": path, "size": len(data), "oid": git}
        if self.lfs[path]:
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return entry

    def knows(self, revision):
        return revision in self.tags or revision == self.commit or revision in self.former

    def answer(self, request, head):
        path = unquote(urlsplit(request.path).path)
        if path.startswith("/api/") and self.api_faults:
            fault = self.api_faults.pop(0)
            if fault.kind == "hang":
                time.sleep(fault.value)
            request.send(fault.value if fault.kind == "status" else 500, b"busy", **fault.headers)
        elif self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            request.send(401, b"", X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        elif path.startswith(self.api_root):
            self.api(request, path.removeprefix(self.api_root).strip("/").split("/"))
        elif path.startswith(self.resolve_root):
            revision, name = path.removeprefix(self.resolve_root).split("/", 1)
            self.resolve(request, revision, name, head)
        else:
            request.send(404, b"", X_Error_Code="RepoNotFound")

    def api(self, request, parts):
        revision = parts[1] if len(parts) > 1 else "main"
        if parts[0] != "commits" and not self.knows(revision):
            request.send(404, b"", X_Error_Code="RevisionNotFound")
        elif parts[0] == "revision":
            siblings = [{"rfilename": path} for path in self.files]
            request.send_json({"id": self.repo, "sha": self.commit, "siblings": siblings})
        elif parts[0] == "tree":
            request.send_json([self.entry(path, revision) for path in self.at(revision)])
        elif parts[0] == "paths-info":
            form = parse_qs(request.body.decode())
            asked = form.get("paths") or json.loads(request.body)["paths"]
            request.send_json([self.entry(path, revision) for path in asked if path in self.at(revision)])
        elif parts[0] == "commits":
            item = {
                "id": self.commit,
                "authors": [],
                "date": "2024-01-01T00:00:00.000Z",
                "title": "x",
                "message": "",
            }
            request.send_json([item])

    def resolve(self, request, revision, name, head):
        if not self.knows(revision):
            request.send(404, b"", X_Error_Code="RevisionNotFound")
        elif name not in self.at(revision):
            request.send(404, b"", X_Error_Code="EntryNotFound")
        elif self.cdn is not None and self.lfs[name]:
            entry = self.entry(name, revision)
            request.send(
                302,
                b"",
                head,
                Location=self.cdn + "/" + name,
                X_Linked_Size=entry["size"],
                X_Linked_Etag=f'"{entry["lfs"]["oid"]}"',
                X_Repo_Commit=self.commit,
            )
        else:
            resource = self.at(revision)[name]
            entry = self.entry(name, revision)
            resource.etag = f'"{entry["lfs"]["oid"] if self.lfs[name] else entry["oid"]}"'
            serve(request, resource, head, X_Repo_Commit=self.commit)
