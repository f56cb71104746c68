"""Client of a server with OpenAI's chat-completions API (vLLM, llama.cpp, Ollama, hosted services)."""

import base64
import email.utils
import http.client
import io
import json
import math
import random
import re
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
from ovdet2.priors.answers import Answer, is_blind, parse_answer, yes_probability
from ovdet2.priors.connection import checked_key, checked_proxy, checked_url, shown, without_key
from ovdet2.priors.deadline import handlers, within

_TEMPORARY = (408, 429, 500, 502, 503, 504)  # HTTP status codes after which the request is repeated
_OF_THE_QUESTION = (400, 413, 415, 422)  # HTTP status codes that refuse this request, but maybe not others
# Errors in a reply of status 200 that may pass.
_PASSING = re.compile(r"overload|rate.?limit|too many requests|try again|time.?d? ?out|unavailable|busy|capacity", re.I)
_SECRETS = ("key", "api_key", "apikey", "token", "access_token", "authorization", "password", "secret", "headers")
_LONGEST_REPLY = 4_000_000  # bytes
_LONGEST_TEXT = 2000  # characters of an answer that are stored
_LONGEST_WAIT = 60.0  # seconds of back-off between two tries
_LONGEST_RETRY_AFTER = 600.0  # seconds; a longer Retry-After ends the run
_ALTERNATIVES = 5  # likeliest tokens requested per position; some servers refuse more


class ChatServer:
    """A vision-language model behind a URL; one question per call, several concurrent calls.

    After a temporary failure (no connection, time-out, status 408, 429 or 5xx, a malformed reply) the call is repeated.
    It waits for Retry-After, or a random part of 1, 2, 4, ... times ``first_wait`` seconds. Images are sent inline.
    Redirects are not followed, since they would send the key to another server. The proxy of the environment is used.

    Attributes:
        url: of the requests; :attr:`address` is how messages name it.
        proxy: how messages name the proxy in use; "" for none.
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
            UsageError: not an http or https URL, a secret in ``extra``, or a key or a proxy of the environment that cannot be used.
        """
        parts = checked_url(url)
        self._key = checked_key(key)
        proxy, self.proxy = checked_proxy(parts)
        path = parts.path.rstrip("/")
        path = path if path.endswith("/chat/completions") else path + "/chat/completions"
        self.url = urllib.parse.urlunsplit(parts._replace(path=path))
        self.address = without_key(shown(self.url), self._key) + (
            f" through the proxy {self.proxy}" if self.proxy else ""
        )
        self.model, self.workers, self.timeout, self.tries = model, workers, timeout, tries
        self.first_wait, self.extra = first_wait, extra or {}
        secret = next((name for name in self.extra if name.lower().replace("-", "_") in _SECRETS), None)
        if secret is not None:
            raise UsageError(
                f"--request holds {secret!r}, but it is written to the prior: give the key with --api-key-env."
            )
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        proxies = urllib.request.ProxyHandler({parts.scheme: proxy} if proxy else {})
        self._opener = urllib.request.build_opener(proxies, _NoRedirect, *handlers())
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
            except DataError as error:
                raise DataError(f"{what}: {error}") from None
            except _TemporaryFailure as error:
                last = error
            if attempt + 1 < self.tries:
                self._wait(last, attempt)
            if self._stopped.is_set():
                break
        kind = DataError if last.malformed else SetupError
        raise kind(
            f"{what}: {last} ({attempt + 1} tries at {self.address}). Answers are stored; run the same command to continue."
        )

    def _wait(self, error, attempt):
        seconds = error.retry_after
        if seconds is None:
            seconds = random.uniform(0.5, 1.0) * min(_LONGEST_WAIT, self.first_wait * 2**attempt)
        if seconds > _LONGEST_RETRY_AFTER:
            raise SetupError(
                f"{self.address} requests a wait of {seconds:.0f} s ({error}): run the same command later."
            )
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
        text = without_key(data.decode("utf-8", "replace"), self._key)
        try:
            reply = json.loads(text)
        except (ValueError, RecursionError):
            raise _TemporaryFailure(f"the reply is not JSON: {_start(text)}", malformed=True) from None
        if isinstance(reply, dict) and reply.get("error") and "choices" not in reply:
            raise self._error_of(reply["error"])
        return reply

    def _failure(self, error):
        """The exception to raise for an HTTP error."""
        with error:
            try:
                body = _start(without_key(error.read(2000).decode("utf-8", "replace"), self._key))
            except (OSError, http.client.HTTPException):
                body = "''"
        return self._of_status(error.code, f"status {error.code}, {body}", error.headers.get("Retry-After"))

    def _error_of(self, error):
        """The exception to raise for an error in a reply of status 200: repeated only if the error may pass."""
        fields = error if isinstance(error, dict) else {"message": error}
        message = f"the reply is an error: {_start(json.dumps(error, ensure_ascii=False))}"
        code = str(fields.get("code") or fields.get("status") or "")
        if code.isdecimal() and 400 <= int(code) < 600:
            return self._of_status(int(code), message)
        if _PASSING.search(f"{code} {fields.get('type')} {fields.get('message')}"):
            return _TemporaryFailure(message, malformed=True)
        return DataError(f"{self.address} refuses the request for model {self.model!r}: {message}. See --request.")

    def _of_status(self, code, message, retry_after=None):
        if code in _TEMPORARY:
            return _TemporaryFailure(message, retry_after=_seconds(retry_after))
        if code in _OF_THE_QUESTION:
            return DataError(f"{self.address} refuses the request for model {self.model!r}: {message}. See --request.")
        return SetupError(f"{self.address} cannot be used: {message}. Check --url, --model and the key.")


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
    """The :class:`Answer` in a chat completion.

    It is neither yes nor no for a refusal, what a content filter withheld, an answer that was cut before it began, and the
    answer of a model that received no image.

    Raises:
        DataError: the message has a content, but no text.
    """
    try:
        choice = reply["choices"][0]
        message, ended = choice.get("message") or {}, choice.get("finish_reason")
        content, refusal = message.get("content"), message.get("refusal")
        if "message" not in choice or not isinstance(refusal or "", str):
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
        what = f"the reply is no chat completion: {_start(json.dumps(reply))}"
        raise _TemporaryFailure(what, malformed=True) from None
    text = (_text_of(content) or "")[:_LONGEST_TEXT]
    if refusal or ended == "content_filter":
        return Answer(None, refusal[:_LONGEST_TEXT] if refusal else f"{text} [withheld by a content filter]")
    yes = None if is_blind(text) else yes_probability(positions)
    yes = parse_answer(text) if yes is None else yes
    return Answer(yes, f"{text} [cut: finish_reason length]" if yes is None and ended == "length" else text)


def _text_of(content):
    """The text of a message, which some servers send as a list of parts; parts of thinking are skipped.

    Raises:
        DataError: the content is something else, which another try would not change.
    """
    if content is None or isinstance(content, str):
        return content
    parts = (
        [part if isinstance(part, dict) else {"text": part} for part in content] if isinstance(content, list) else [{}]
    )
    texts = [part.get("text") for part in parts if part.get("type", "text") in ("text", "output_text")]
    written = [text for text in texts if isinstance(text, str)]
    if len(written) < len(texts):
        raise DataError(f"the reply has a content that is no text: {_start(json.dumps(content))}. See --request.")
    return "".join(written)


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
