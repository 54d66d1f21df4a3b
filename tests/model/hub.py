"""A model hub in a folder, on the loopback: enough of the Hugging Face hub for one model to be fetched from it."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

NAME = "some-one/tiny"
COMMIT = "a" * 40
FAULTS = {"some-one/gated": (403, "GatedRepo"), "some-one/nothing": (404, "RepoNotFound")}


@contextmanager
def serve(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve a folder as the model `NAME` with the branches main and second; give the address and what was fetched."""
    fetched: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Stay silent."""

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            path = self.path.partition("?")[0]
            for name, (status, code) in FAULTS.items():
                if name in path:
                    return self.reply(status, b"{}", body, {"X-Error-Code": code})
            if path.startswith(f"/api/models/{NAME}/revision/"):
                if path.rsplit("/", 1)[1] not in ("main", "second", COMMIT):
                    return self.reply(404, b"{}", body, {"X-Error-Code": "RevisionNotFound"})
                return self.reply(200, json.dumps({"id": NAME, "sha": COMMIT, "siblings": []}).encode(), body)
            files = [one for one in sorted(folder.rglob("*")) if one.is_file()]
            if path.startswith(f"/api/models/{NAME}/tree/"):
                listed = [
                    {"type": "file", "path": str(one.relative_to(folder)), "size": one.stat().st_size, "oid": one.name}
                    for one in files
                ]
                return self.reply(200, json.dumps(listed).encode(), body)
            requested = path.partition(f"/{NAME}/resolve/{COMMIT}/")[2]
            if requested and (folder / requested).is_file():
                if body:
                    fetched.append(requested)
                return self.reply(200, (folder / requested).read_bytes(), body, {"ETag": f'"{requested}"'})
            return self.reply(404, b"{}", body, {"X-Error-Code": "EntryNotFound"})

        def reply(self, status: int, content: bytes, body: bool, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for key, value in (
                {"X-Repo-Commit": COMMIT, "Content-Length": str(len(content))} | (headers or {})
            ).items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", fetched
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
