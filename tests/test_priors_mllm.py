"""Concept priors by a vision-language model behind a server: what is sent, what comes back, what fails."""

import base64
import os
import threading
import time

import numpy as np
import pytest
from PIL import Image

from ovdet2.errors import DataError, SetupError, UsageError
from ovdet2.priors.answers import Answer
from ovdet2.priors.chat_server import ChatServer, image_bytes
from tests.chat_cases import client, never, of_probability, run, says, serving, write_pictures

COMPLETION = "/v1/chat/completions"


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with serving() as start:
        yield start


@pytest.fixture
def records(tmp_path):
    return write_pictures(tmp_path)


def only(record, server, tmp_path, **options):
    """The score of one question."""
    _, found, skipped = run(client(server, **options), tmp_path / "answers", [record], words=("cat",))
    return found.get(record["image_id"]), skipped


def test_probabilities_of_tokens(serve, records, tmp_path):
    chances = {"cat": 0.9, "dog": 0.125, "red mug": 0.5}
    server = serve(lambda question, times: of_probability(chances[question.split("Does ")[1].split(" exist")[0]]))
    backend, found, skipped = run(client(server), tmp_path / "answers", records)
    assert not skipped and (backend.asked, backend.known, backend.unparsable) == (9, 0, 0)
    for record in records:
        assert found[record["image_id"]] == pytest.approx({0: 0.9, 1: 0.125, 2: 0.5}, abs=1e-6)
    assert server.questions()[2] == "Question: Does red mug exist in the image? Answer:"


def test_what_is_sent(serve, records, tmp_path):
    server = serve(lambda question, times: says("Yes"))
    only(records[0], server, tmp_path, key="secret", extra={"max_tokens": None, "max_completion_tokens": 4})
    (body,), ((path, headers),) = server.requests, server.headers
    kind, data = body["messages"][0]["content"][0]["image_url"]["url"].split(";base64,")
    assert path == COMPLETION and headers["Authorization"] == "Bearer secret"
    assert kind == "data:image/png" and base64.b64decode(data) == open(records[0]["file_name"], "rb").read()
    assert body["model"] == "test-model" and body["logprobs"] is True and body["temperature"] == 0
    assert body["max_completion_tokens"] == 4 and "max_tokens" not in body
    again = serve(lambda question, times: says("No"))
    only(records[1], again, tmp_path, url=again.url + "/chat/completions/")
    assert again.headers[0][0] == COMPLETION and "Authorization" not in again.headers[0][1]


def test_answers_in_words_and_refusals(serve, records, tmp_path):
    texts = {"cat": says("Yes, there is one."), "dog": says(" no."), "red mug": says(None, refusal="I cannot help.")}
    server = serve(lambda question, times: texts[question.split("Does ")[1].split(" exist")[0]])
    backend, found, _ = run(client(server), tmp_path / "answers", records[:1])
    assert found == {10: {0: 1.0, 1: 0.0}} and backend.unparsable == 1
    again = serve(lambda question, times: says(None, refusal="I cannot help."))  # only the refusal is asked again
    backend, found, _ = run(client(again), tmp_path / "answers", records[:1])
    assert again.questions() == ["Question: Does red mug exist in the image? Answer:"]
    assert found == {10: {0: 1.0, 1: 0.0}} and (backend.asked, backend.known, backend.unparsable) == (1, 2, 1)
    healed = serve(lambda question, times: says("Yes"))
    backend, found, _ = run(client(healed), tmp_path / "answers", records[:1])
    assert found == {10: {0: 1.0, 1: 0.0, 2: 1.0}} and (backend.asked, backend.known, backend.unparsable) == (1, 2, 0)
    backend, found, _ = run(client(serve(never)), tmp_path / "answers", records[:1])
    assert found == {10: {0: 1.0, 1: 0.0, 2: 1.0}} and (backend.asked, backend.known) == (0, 3)


PASSING = {
    "silence": 1.0,
    "429": (429, {"Retry-After": "0.3"}, b"slow down"),
    "500": (500, {}, b"<html>oops"),
    "503": (503, {}, b""),
    "no json": (200, {}, b'{"choices": [{"mess'),
    "cut short": (200, {"Content-Length": "900"}, b'{"choices": '),
    "no choices": {"choices": []},
    "error inside": {"error": {"message": "overloaded"}},
    "broken logprobs": says("Yes", [("Yes", [("Yes", "high")])]),
    "nested": (200, {}, b"[" * 100_000),
}


@pytest.mark.parametrize("first", PASSING)
def test_passing_failures_are_tried_again(serve, records, tmp_path, first):
    server = serve(lambda question, times: PASSING[first] if times == 0 else of_probability(0.75))
    start = time.monotonic()
    assert only(records[0], server, tmp_path, timeout=0.4) == ({0: pytest.approx(0.75)}, [])
    assert len(server.requests) == 2 and (first != "429" or time.monotonic() - start >= 0.3)


@pytest.mark.parametrize("kind", ["no json", "no choices", "error inside", "broken logprobs", "nested"])
def test_replies_that_stay_malformed_name_image_and_word(serve, records, tmp_path, kind):
    server = serve(lambda question, times: PASSING[kind] if "dog" in question else says("yes"))
    words = ("cat", "Red_Mug", "dog")  # after a failure an image is asked no more
    backend, found, skipped = run(client(server, workers=2), tmp_path / "answers", records[:2], words=words)
    assert found == {} and len(skipped) == 2  # without an answer for one word there is no list
    assert any(f"{records[0]['file_name']}, word 'dog': the reply" in message for message in skipped)
    assert all("(3 tries at" in message for message in skipped)
    healed = serve(lambda question, times: says("no"))
    backend, found, skipped = run(client(healed), tmp_path / "answers", records[:2], words=words)
    assert healed.questions() == ["Question: Does dog exist in the image? Answer:"] * 2  # the others were kept
    assert found == {10: {0: 1.0, 1: 1.0, 2: 0.0}, 11: {0: 1.0, 1: 1.0, 2: 0.0}} and not skipped


@pytest.mark.parametrize(
    "reply, tries, message",
    [
        (1.0, 3, r"0.png, word 'cat': no reply \(.*imed? ?out"),
        ((503, {}, b"busy"), 3, "status 503, 'busy'"),
        ((401, {}, b"who are you"), 1, "status 401, 'who are you'. Check --url, --model and the key"),
        ((404, {}, b""), 1, "status 404"),
        ((302, {"Location": "http://127.0.0.1:9/"}, b""), 1, "status 302"),
        ((429, {"Retry-After": "4000"}, b""), 1, "requests a wait of 4000 s"),
    ],
)
def test_a_server_that_cannot_be_used_stops_the_run(serve, records, tmp_path, reply, tries, message):
    server = serve(lambda question, times: reply)
    with pytest.raises(SetupError, match=message) as raised:
        only(records[0], server, tmp_path, timeout=0.3, key="secret")
    assert len(server.requests) == tries and "secret" not in str(raised.value)


def test_no_server(serve, records, tmp_path):
    server = serve(never)
    server.http.server_close()
    with pytest.raises(SetupError, match="no reply .*efused"):
        only(records[0], server, tmp_path)
    for url in ("file:///etc/passwd", "localhost:8000", "http://"):
        with pytest.raises(UsageError, match="no http or https address"):
            ChatServer(url, "m")


def test_a_refused_request_is_of_its_image(serve, records, tmp_path):
    server = serve(lambda question, times: (400, {}, b"too long"))
    found, skipped = only(records[0], server, tmp_path)
    assert found is None and len(skipped) == 1 and "status 400, 'too long'. See --request" in skipped[0]
    assert len(server.requests) == 1


class RefusesOne:
    """A model that answers yes to what it is asked, except about one image."""

    identity, words_per_call = {"model": "made up"}, 3

    def __init__(self, refused, workers):
        self.refused, self.workers, self.asked = refused, workers, []

    def prepare(self, path):
        return path

    def ask(self, path, words, questions):
        self.asked.append((path, len(words)))
        if path == self.refused:
            raise DataError(f"{path} is refused.")
        return [Answer(1.0, "")] * len(words)

    def stop(self):
        """Nothing is waited for."""


@pytest.mark.parametrize("workers", [1, 3])
def test_an_image_that_failed_is_asked_no_more_words(records, tmp_path, workers):
    """At most what was handed in ahead is asked, so that the budget is left for the other images."""
    words = [f"word {i}" for i in range(60)]
    model = RefusesOne(records[1]["file_name"], workers)
    ahead = 2 * workers
    backend, found, skipped = run(model, tmp_path, records, words=words, max_queries=120 + 3 * ahead)
    assert {i: len(scores) for i, scores in found.items()} == {10: 60, 12: 60}
    assert len(skipped) == 1 and "1.png is refused" in skipped[0]
    calls = [count for path, count in model.asked if path == model.refused]
    assert 1 <= len(calls) <= ahead and backend.asked == 120 + sum(calls)


def test_retry_after_by_date(serve, records, tmp_path):
    later = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 4000))
    server = serve(lambda question, times: (429, {"Retry-After": later}, b""))
    with pytest.raises(SetupError, match=r"requests a wait of (3999|4000|399\d) s"):
        only(records[0], server, tmp_path)
    server = serve(lambda question, times: (429, {"Retry-After": "soon"}, b"") if times == 0 else says("yes"))
    assert only(records[0], server, tmp_path) == ({0: 1.0}, [])


def test_two_workers_ask_at_once(serve, records, tmp_path):
    """Each question waits until another one is there, or half a second."""
    meet = threading.Barrier(2)

    def reply(question, times):
        try:
            meet.wait(timeout=5)
        except threading.BrokenBarrierError:
            pass
        return says("yes")

    server = serve(reply)
    _, found, _ = run(client(server, workers=2), tmp_path / "answers", records[:2], words=("cat", "dog"))
    assert server.most_busy == 2 and found == {10: {0: 1.0, 1: 1.0}, 11: {0: 1.0, 1: 1.0}}


def test_unreadable_images_are_left_out_and_not_asked_about(serve, records, tmp_path):
    open(records[0]["file_name"], "wb").write(b"\x89PNG torn")
    os.remove(records[1]["file_name"])
    server = serve(lambda question, times: says("yes"))
    _, found, skipped = run(client(server), tmp_path / "answers", records)
    assert list(found) == [12] and len(server.requests) == 3
    assert sorted("0.png" in message for message in skipped) == [False, True]


@pytest.mark.parametrize("name", ["cmyk.jpg", "turned.jpg", "deep.png", "alpha.png", "palette.gif"])
def test_images_that_readers_differ_about_are_sent_as_decoded(tmp_path, name):
    from ovdet2.io.images import read_image

    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (40, 48, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    images = {
        "cmyk.jpg": image.convert("CMYK"),
        "turned.jpg": image,
        "deep.png": Image.fromarray(rng.integers(0, 65535, (40, 48)).astype(np.uint16)),
        "alpha.png": image.convert("RGBA"),
        "palette.gif": image.convert("P"),
    }
    images[name].save(tmp_path / name, **({"exif": exif} if name == "turned.jpg" else {}))
    kind, data = image_bytes(tmp_path / name)
    (tmp_path / "sent.png").write_bytes(data)
    assert kind == "png" and np.array_equal(np.asarray(Image.open(tmp_path / "sent.png")), read_image(tmp_path / name))
    image.save(tmp_path / "plain.jpg")
    assert image_bytes(tmp_path / "plain.jpg") == ("jpeg", (tmp_path / "plain.jpg").read_bytes())
