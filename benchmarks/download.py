"""A download with its hash verified: ours against curl and against the hub's client, from a local server.

python -m benchmarks.download [--mb 500] [--repeats 5]
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.support.measure import Cost, child, interleaved, sized_parser, table

SERVER = """
import os, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *args): pass
    def do_HEAD(self): self.reply(False)
    def do_GET(self): self.reply(True)
    def reply(self, body):
        with open(sys.argv[1], "rb") as file:
            size = os.fstat(file.fileno()).st_size
            self.send_response(200)
            etag = '"' + "a" * 64 + '"'
            headers = {"Content-Length": size, "ETag": etag, "X-Repo-Commit": "b" * 40}
            for name, value in headers.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.flush()
            sent = 0
            while body and sent < size:
                sent += os.sendfile(self.connection.fileno(), file.fileno(), sent, size - sent)
server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_address[1], flush=True)
server.serve_forever()
"""

OURS = """
import sys
from pathlib import Path
from workflow_scripts.acquire.download import fetch
from workflow_scripts.acquire.verified import Wanted
fetch(Wanted("f", (sys.argv[1],), int(sys.argv[3]), sys.argv[4]), Path(sys.argv[2]))
"""
HUB = """
import sys
from huggingface_hub import hf_hub_download
hf_hub_download("owner/name", "file", local_dir=sys.argv[1])
"""


def fresh(folder: Path) -> Path:
    """An empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table."""
    options = sized_parser(__doc__, argv, mb=(500, 3), repeats=(5, 1)).parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        block = random.Random(0).randbytes(1 << 20)
        (folder / "file").write_bytes(block * options.mb)
        sha = hashlib.sha256(block * options.mb).hexdigest()
        server = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(folder / "file")], stdout=subprocess.PIPE, text=True
        )
        try:
            assert server.stdout is not None
            url = f"http://127.0.0.1:{int(server.stdout.readline())}"
            measure(folder, url, str(options.mb << 20), sha, options)
        finally:
            server.kill()


def measure(folder: Path, url: str, size: str, sha: str, options: argparse.Namespace) -> None:
    """Runs all ways in turns."""
    out = folder / "out"

    def ours() -> Cost:
        return child([sys.executable, "-c", OURS, url, str(fresh(out) / "f"), size, sha])

    def hub() -> Cost:
        environment = {"HF_ENDPOINT": url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(folder / "hf")}
        return child([sys.executable, "-c", HUB, str(fresh(out))], **environment)

    ways = {"this download, sha256 verified": ours, "hf_hub_download, only the size is compared": hub}
    if shutil.which("curl"):
        fetch = f"curl -sf -o {out}/f {url}"
        ways["curl, nothing verified"] = lambda: child(["sh", "-c", f"rm -rf {out}; mkdir {out}; {fetch}"])
        check = f"echo {sha}  {out}/f | sha256sum -c"
        ways["curl, then sha256sum"] = lambda: child(
            ["sh", "-c", f"rm -rf {out}; mkdir {out}; {fetch} && {check}"]
        )
    costs = interleaved(ways, options.repeats)
    base = costs.get("curl, then sha256sum", costs["this download, sha256 verified"])
    rows = [
        (
            name,
            f"{c.cpu / options.mb * 1000:.2f}",
            f"{c.cpu / base.cpu:.2f}",
            f"{options.mb / c.wall:.0f}",
            f"{c.peak_mb:.0f}",
        )
        for name, c in costs.items()
    ]
    print(table(("way", "CPU s a GB", "x curl and sha256sum", "MB/s", "peak MB"), rows))
    os.sync()


if __name__ == "__main__":
    main()
