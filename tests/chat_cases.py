"""A chat-completions server on loopback, its clients, and three images to ask about."""

import contextlib
import json
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image

from ovdet2.priors.chat_server import ChatServer
from ovdet2.priors.mllm import MllmBackend

WORDS = ("cat", "dog", "Red_Mug")


def says(text, logprobs=None, **message):
    """A chat completion; ``logprobs`` is [(token, [(alternative, log probability), ...]), ...]."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": "stop"}
    if logprobs is not None:
        places = [
            {
                "token": token,
                "logprob": others[0][1],
                "top_logprobs": [{"token": other, "logprob": value} for other, value in others],
            }
            for token, others in logprobs
        ]
        choice["logprobs"] = {"content": places}
    return {"id": "x", "object": "chat.completion", "choices": [choice]}


def of_probability(yes):
    """A reply whose next-token probabilities give ``yes`` after the rest is renormalised away."""
    others = [("Yes", math.log(0.8 * yes)), ("No", math.log(0.8 * (1 - yes))), ("Maybe", math.log(0.2))]
    return says("Yes" if yes > 0.5 else "No", [("Yes" if yes > 0.5 else "No", others)])


class Server:
    """Speaks chat completions. ``reply(question, times)`` gives a dict (status 200), (status, headers, bytes), or a
    number of seconds to be silent for; ``times`` counts how often the same image and question came before."""

    def __init__(self, reply):
        self.reply, self.requests, self.headers = reply, [], []
        self.busy = self.most_busy = 0
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                outer.handle(self)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()

    def handle(self, handler):
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        image, question = (part for part in body["messages"][0]["content"])
        with self.lock:
            times = sum(seen == body for seen in self.requests)
            self.requests.append(body)
            self.headers.append((handler.path, dict(handler.headers)))
            self.busy += 1
            self.most_busy = max(self.most_busy, self.busy)
        try:
            answer = self.reply(question["text"], times)
            if isinstance(answer, float):
                time.sleep(answer)
                return
            status, headers, data = (200, {}, json.dumps(answer).encode()) if isinstance(answer, dict) else answer
            handler.send_response(status)
            for name, value in headers.items():
                handler.send_header(name, value)
            handler.end_headers()
            handler.wfile.write(data)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the other side was killed, or did not wait
        finally:
            with self.lock:
                self.busy -= 1

    def questions(self):
        return [body["messages"][0]["content"][1]["text"] for body in self.requests]


@contextlib.contextmanager
def serving():
    """Gives a callable that starts a :class:`Server`; all are stopped at the end."""
    servers = []

    def start(reply):
        servers.append(Server(reply))
        return servers[-1]

    try:
        yield start
    finally:
        for server in servers:
            server.http.shutdown()
            server.http.server_close()


def client(server, **options):
    defaults = {"model": "test-model", "workers": 1, "timeout": 5.0, "tries": 3, "first_wait": 0.01}
    return ChatServer(**({"url": server.url} | defaults | options))


def write_pictures(folder):
    """Records of three images."""
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return [{"image_id": 10 + i, "file_name": str(folder / f"{i}.png")} for i in range(3)]


def run(model, folder, records, words=WORDS, **options):
    """(backend, {image id: {word index: score}}, messages of skipped images)."""
    backend, skipped = MllmBackend(model, folder, words, **options), []
    found = {i: dict(zip(w.tolist(), s.tolist())) for i, w, s in backend.lists(records, skipped.append)}
    return backend, found, skipped


def never(question, times):
    raise AssertionError("asked again")
