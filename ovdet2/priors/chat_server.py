"""Client of a server with OpenAI's chat-completions API (vLLM, llama.cpp, Ollama, hosted services)."""

import base64
import email.utils
import http.client
import io
import json
import math
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from typing import Any, NamedTuple

from PIL import ExifTags, Image

from ovdet2.errors import DataError, SetupError, UsageError
from ovdet2.io.images import open_image, read_image
from ovdet2.priors.answers import Answer, parse_answer, yes_probability
from ovdet2.priors.deadline import handlers, within

_TEMPORARY = (408, 429, 500, 502, 503, 504)  # HTTP status codes after which the request is repeated
_OF_THE_QUESTION = (400, 413, 415, 422)  # HTTP status codes that refuse this request, but maybe not others
_LONGEST_REPLY = 4_000_000  # bytes
_LONGEST_TEXT = 2000  # characters of an answer that are stored
_LONGEST_WAIT = 60.0  # seconds of back-off between two tries
_LONGEST_RETRY_AFTER = 600.0  # seconds; a longer Retry-After ends the run
_ALTERNATIVES = 5  # likeliest tokens requested per position; some servers refuse more


class ChatServer:
    """A vision-language model behind a URL; one question per call, several concurrent calls.

    After a temporary failure (no connection, time-out, status 408, 429 or 5xx, a malformed reply) the call is repeated.
    It waits for Retry-After, or a random part of 1, 2, 4, ... times ``first_wait`` seconds. Images are sent inline.
    Redirects are not followed, since they would send the key to another server.
    """

    words_per_call = 1

    def __init__(
        self,
        url: str,
        model: str,
        key: str | None = None,
        workers: int = 4,
        timeout: float = 120.0,
        tries: int = 6,
        first_wait: float = 1.0,
        extra: dict[str, Any] | None = None,
    ) -> None:
        """
        Args:
            url: such as http://localhost:8000/v1; "/chat/completions" is added if missing.
            model: name of the model on the server.
            key: sent as a bearer token, None for none; it is not stored.
            workers: concurrent calls.
            timeout: seconds after which a call without a complete reply has failed.
            tries: of one question.
            first_wait: seconds, see above.
            extra: dict merged into each request; a value None removes a key. For servers that do not support
                "logprobs", or need "max_completion_tokens" instead of "max_tokens".

        Raises:
            UsageError: not an http or https URL.
        """
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"--url {url!r} is no http or https address, such as http://localhost:8000/v1.")
        path = parts.path.rstrip("/")
        path = path if path.endswith("/chat/completions") else path + "/chat/completions"
        self.url = urllib.parse.urlunsplit(parts._replace(path=path))
        self.model, self.workers, self.timeout, self.tries = model, workers, timeout, tries
        self.first_wait, self.extra = first_wait, extra or {}
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._opener = urllib.request.build_opener(_NoRedirect, *handlers())
        self._stopped = threading.Event()

    @property
    def identity(self) -> dict[str, Any]:
        """The model's name and ``extra``, for the manifest; without the address, which may be private."""
        return {"model": self.model} | ({"request": self.extra} if self.extra else {})

    def stop(self) -> None:
        """End all waits for another try."""
        self._stopped.set()

    def prepare(self, path: str) -> "Picture":
        """The image as a data URL: :class:`Picture`. Raises DataError for an unreadable file."""
        kind, data = image_bytes(path)
        return Picture(path, f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}")

    def ask(self, picture: "Picture", words: Sequence[str], questions: Sequence[str]) -> list[Answer]:
        """One :class:`Answer` per question.

        Raises:
            DataError: the server refuses a question, or every reply is malformed; the message names image and word.
            SetupError: the server cannot be reached or used, after all tries.
        """
        return [
            self._answer(self._body(picture, question), f"{picture.path}, word {word!r}")
            for word, question in zip(words, questions)
        ]

    def _body(self, picture, question):
        content = [
            {"type": "image_url", "image_url": {"url": picture.data_url}},
            {"type": "text", "text": question},
        ]
        request = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": 8,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": _ALTERNATIVES,
        } | self.extra
        return json.dumps({key: value for key, value in request.items() if value is not None}).encode()

    def _answer(self, body, what):
        last, attempt = _TemporaryFailure("no try"), 0
        for attempt in range(self.tries):
            try:
                return answer_of(self._post(body))
            except _TemporaryFailure as error:
                last = error
            if attempt + 1 < self.tries:
                self._wait(last, attempt)
            if self._stopped.is_set():
                break
        kind = DataError if last.malformed else SetupError
        raise kind(
            f"{what}: {last} ({attempt + 1} tries at {self.url}). Answers are stored; run the same command to continue."
        )

    def _wait(self, error, attempt):
        seconds = error.retry_after
        if seconds is None:
            seconds = random.uniform(0.5, 1.0) * min(_LONGEST_WAIT, self.first_wait * 2**attempt)
        if seconds > _LONGEST_RETRY_AFTER:
            raise SetupError(f"{self.url} requests a wait of {seconds:.0f} s ({error}): run the same command later.")
        self._stopped.wait(seconds)

    def _post(self, body):
        """The reply as parsed JSON."""
        request = urllib.request.Request(self.url, body, self._headers)
        try:
            with within(self.timeout):
                try:
                    with self._opener.open(request, timeout=self.timeout) as reply:
                        data = reply.read(_LONGEST_REPLY)
                except urllib.error.HTTPError as error:
                    raise self._failure(error) from None
        except (OSError, http.client.HTTPException) as error:  # URLError and time-outs are OSErrors
            reason = getattr(error, "reason", error)
            raise _TemporaryFailure(f"no reply ({reason!r})") from None
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            raise _TemporaryFailure(f"the reply is not JSON: {_start(data)}", malformed=True) from None

    def _failure(self, error):
        """The exception to raise for an HTTP error."""
        with error:
            try:
                body = _start(error.read(2000))
            except (OSError, http.client.HTTPException):
                body = "''"
        message = f"status {error.code}, {body}"
        if error.code in _TEMPORARY:
            return _TemporaryFailure(message, retry_after=_seconds(error.headers.get("Retry-After")))
        if error.code in _OF_THE_QUESTION:
            return DataError(f"{self.url} refuses the request for model {self.model!r}: {message}. See --request.")
        return SetupError(f"{self.url} cannot be used: {message}. Check --url, --model and the key.")


class Picture(NamedTuple):
    """An image as it is sent.

    Attributes:
        path: of the file.
        data_url: the encoded image.
    """

    path: str
    data_url: str


class _TemporaryFailure(Exception):
    """A failure after which the call is repeated."""

    def __init__(self, message, retry_after=None, malformed=False):
        super().__init__(message)
        self.retry_after, self.malformed = retry_after, malformed


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req, fp, code, msg, headers, newurl):
        return None


def image_bytes(path: str) -> tuple[str, bytes]:
    """(format, bytes) to send of an image: the file itself if all decoders agree on its pixels, otherwise a PNG.

    Files that are rotated by EXIF, animated, of 16 bits, CMYK, with a palette or transparency, or in a rarer format are
    decoded by :func:`~ovdet2.io.images.read_image` and encoded losslessly.

    Raises:
        DataError: the file cannot be read.
    """
    pixels = read_image(path, "RGB")
    with open_image(path) as image:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        plain = image.format in ("JPEG", "PNG") and image.mode in ("RGB", "L") and not turned
        plain = plain and getattr(image, "n_frames", 1) == 1 and "transparency" not in image.info
        kind = (image.format or "").lower()
    if plain:
        with open(path, "rb") as handle:
            return kind, handle.read()
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "PNG")
    return "png", encoded.getvalue()


def answer_of(reply: dict[str, Any]) -> Answer:
    """The :class:`Answer` in a chat completion; a refusal is an answer that is neither yes nor no."""
    try:
        choice = reply["choices"][0]
        message = choice["message"]
        text = message.get("content") or message.get("refusal") or ""
        if not isinstance(text, str):
            raise TypeError
        written = (choice.get("logprobs") or {}).get("content") or ()
        positions = [
            (
                place["token"],
                [(other["token"], float(other["logprob"])) for other in place.get("top_logprobs") or [place]],
            )
            for place in written
        ]
        alternatives = [pair for _, pairs in positions for pair in pairs]
        if not all(isinstance(token, str) and not math.isnan(value) for token, value in alternatives):
            raise TypeError
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        message = f"the reply is no chat completion: {_start(json.dumps(reply))}"
        raise _TemporaryFailure(message, malformed=True) from None
    yes = yes_probability(positions)
    return Answer(parse_answer(text) if yes is None else yes, text[:_LONGEST_TEXT])


def _seconds(retry_after):
    """Retry-After in seconds, from a number or a date; None if it is neither."""
    if retry_after is None:
        return None
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def _start(text):
    text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
    return repr(text[:200])
