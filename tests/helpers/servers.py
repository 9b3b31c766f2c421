"""A server on this machine with files at addresses, as on the web or on Hugging Face's hub."""

import hashlib
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "a" * 40


class Answers(BaseHTTPRequestHandler):
    """Answers with the server's files, or with its errors."""

    def do_GET(self):
        self.answer(has_body=True)

    def do_HEAD(self):
        self.answer(has_body=False)

    def answer(self, *, has_body):
        path = self.path.partition("?")[0]
        self.server.requests.append(f"{self.command} {path}")
        content = self.server.files.get(path)
        error = next((e for start, e in self.server.errors.items() if path.startswith(start)), None)
        if content is None or error:
            code, name = error or (404, "EntryNotFound")
            self.send_response(code)
            self.send_header("X-Error-Code", name)
        else:
            self.send_response(200)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        body = content if content is not None and not error else b""
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if has_body:
            self.wfile.write(body[: self.server.sent])

    def log_message(self, *_):
        """Print nothing."""


@contextmanager
def served(files, errors=None, sent=None):
    """Serve files.

    Args:
        files: path of an address -> content.
        errors: beginning of a path -> (code, the hub's name of the error).
        sent: bytes of a file before the connection breaks; None is all.

    Yields:
        The address, without a slash at the end, and the list of requests.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.files, server.errors, server.sent, server.requests = files, errors or {}, sent, []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server.requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
