"""A download host on this machine, which can misbehave in one stated way."""

import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Host:
    """Serves ``content`` under every path.

    Attributes:
        content: bytes of the file.
        etag: what identifies it; None: the host sends none.
        cut_after: bytes of a body after which a connection is closed, of the first ``cuts`` connections.
        status, location: answer with this status, and this redirect.
        stated: the Content-Length that is stated; None: the right one; "": none.
        ranges: whether the host continues parts.
        drip: seconds between bytes.
        requests: the headers of every request.
    """

    def __init__(self, content):
        self.content, self.etag = content, '"1"'
        self.cut_after, self.cuts = None, 0
        self.status, self.location = 200, None
        self.stated, self.ranges, self.drip = None, True, 0.0
        self.requests = []

    def answer(self, handler):
        self.requests.append(dict(handler.headers))
        if self.status != 200:
            handler.send_response(self.status)
            if self.location:
                handler.send_header("Location", self.location)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        start = self._start(handler.headers)
        body = self.content[start:]
        handler.send_response(206 if start else 200)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}")
        if self.etag:
            handler.send_header("ETag", self.etag)
        if self.stated != "":
            handler.send_header("Content-Length", str(len(body) if self.stated is None else self.stated))
        handler.end_headers()
        if self.cuts:
            self.cuts -= 1
            body = body[: self.cut_after]
        if self.drip:
            for byte in body:
                handler.wfile.write(bytes([byte]))
                handler.wfile.flush()
                time.sleep(self.drip)
        else:
            handler.wfile.write(body)

    def _start(self, headers):
        wanted = headers.get("Range")
        if not wanted or not self.ranges or headers.get("If-Range") != self.etag:
            return 0
        return int(wanted.removeprefix("bytes=").split("-")[0])


@contextmanager
def serving(host):
    """The address of a running :class:`Host`, such as "http://127.0.0.1:40000"."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            try:
                host.answer(self)
            except (BrokenPipeError, ConnectionResetError):
                pass  # the client has given up

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
