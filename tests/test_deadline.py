"""Chat servers that never finish: the deadline of a call holds in every phase of a reply."""

import itertools
import json
import socket
import threading
import time

import pytest

from ovdet2.errors import SetupError
from ovdet2.priors.chat_server import Picture, _TemporaryFailure, answer_of
from tests.chat_cases import client, says, serving

SLOW = 0.05  # seconds between two pieces
OK = b"HTTP/1.1 200 OK\r\n"
ENDLESS = {
    "silence": itertools.repeat(b""),
    "the status line": itertools.chain([b"HTTP/1.1 200 "], itertools.repeat(b"K")),
    "100 Continue": itertools.repeat(b"HTTP/1.1 100 Continue\r\n\r\n"),
    "headers": itertools.chain([OK], (b"X-%d: 1\r\n" % n for n in itertools.count())),
    "one header": itertools.chain([OK + b"X: "], itertools.repeat(b"a")),
    "the body": itertools.chain([OK + b"Content-Length: 100000\r\n\r\n"], itertools.repeat(b" ")),
    "chunks": itertools.chain([OK + b"Transfer-Encoding: chunked\r\n\r\n"], itertools.repeat(b"1\r\n \r\n")),
    "a chunk extension": itertools.chain([OK + b"Transfer-Encoding: chunked\r\n\r\n1;"], itertools.repeat(b"a")),
    "the body of an error": itertools.chain(
        [b"HTTP/1.1 503 No\r\nContent-Length: 9999\r\n\r\n"], itertools.repeat(b"x")
    ),
}


class Trickle:
    """Sends pieces of a reply for ever, slowly, to each connection."""

    def __init__(self, pieces):
        self.pieces, self.listener = pieces, socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/v1"
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self.trickle, args=(connection,), daemon=True).start()

    def trickle(self, connection):
        try:
            for piece in self.pieces:
                connection.sendall(piece)
                time.sleep(SLOW)
        except OSError:
            connection.close()


@pytest.mark.parametrize("phase", ENDLESS)
def test_a_server_that_never_finishes(phase):
    server = Trickle(ENDLESS[phase])
    began = time.monotonic()
    with pytest.raises(SetupError, match="0.png, word 'cat'"):
        client(server, timeout=0.5, tries=1).ask(Picture("0.png", "data:"), ["cat"], ["a cat?"])
    assert time.monotonic() - began < 10  # one byte each 0.05 s would go on for ever
    server.listener.close()


def test_the_message_states_the_limit():
    server = Trickle(ENDLESS["the body"])
    with pytest.raises(SetupError, match=r"no complete reply within 0.4 s"):
        client(server, timeout=0.4, tries=1).ask(Picture("0.png", "data:"), ["cat"], ["a cat?"])
    server.listener.close()


def test_a_call_in_time_leaves_no_timer():
    with serving() as start:
        server = start(lambda question, times: says("Yes"))
        before = threading.active_count()
        [answer] = client(server, timeout=60).ask(Picture("0.png", "data:"), ["cat"], ["a cat?"])
        assert answer.text == "Yes"
        end = time.monotonic() + 10
        while threading.active_count() > before and time.monotonic() < end:
            time.sleep(0.02)
        assert threading.active_count() <= before


@pytest.mark.parametrize("change", [
    {"token": 5}, {"token": None}, {"token": ["Yes"]}, {"logprob": "nan"}, {"logprob": None}, {"logprob": {}},
])  # fmt: skip
def test_answers_of_wrong_types(change):
    reply = says("Yes", [("Yes", [("Yes", -0.1)])])
    reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"][0] |= change
    with pytest.raises(_TemporaryFailure, match="no chat completion") as caught:
        answer_of(json.loads(json.dumps(reply)))
    assert caught.value.malformed  # after all tries a DataError


def test_long_texts_are_cut():
    assert len(answer_of(says("Yes. " + "a" * 100_000)).text) == 2000
