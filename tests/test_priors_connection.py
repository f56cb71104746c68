"""Keys, addresses and proxies are checked before the first request, and no message holds a secret."""

import json
import traceback

import pytest

from ovdet2.errors import DataError, OVDetError, SetupError, UsageError
from ovdet2.priors.chat_server import ChatServer
from ovdet2.priors.connection import checked_key, shown
from ovdet2.programs import build_concept_priors
from tests.chat_cases import client, run, says, serving, write_pictures

KEY = "sk-Secret/0123+4567=89"
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def serve():
    with serving() as start:
        yield start


@pytest.mark.parametrize(
    "odd, what",
    [
        ("\n", "a line break"),
        ("\r\n", "a line break"),
        (" ", "a space"),
        ("\u201c", "U+201C"),
        ("\u00e9", "U+00E9"),
        ("\0", "U+0000"),
    ],
)
@pytest.mark.parametrize("place", [0, 5, len(KEY)])
def test_keys_that_cannot_be_sent(odd, what, place):
    key = KEY[:place] + odd + KEY[place:]
    with pytest.raises(UsageError) as raised:
        ChatServer("http://localhost:9/v1", "m", key)
    assert f"the key has {what}" in str(raised.value).replace("the character ", "") and "--api-key-env" in str(
        raised.value
    )
    assert f"at position {place + 1}" in str(raised.value)
    everything = "".join(traceback.format_exception(raised.value))
    assert KEY[:place] not in everything.replace("sk-", "") or place == 0
    assert "Secret" not in everything and "0123" not in everything


@pytest.mark.parametrize("name", ["api_key", "Api-Key", "Authorization", "headers"])
def test_a_request_that_is_stored_holds_no_key(name):
    with pytest.raises(UsageError, match=f"--request holds '{name}', but it is written to the prior") as raised:
        ChatServer("http://localhost:9/v1", "m", extra={name: "Secret", "max_tokens": 3})
    assert "Secret" not in str(raised.value)


def test_keys_that_can():
    assert checked_key(KEY) == KEY and checked_key(None) is None and checked_key("") is None


@pytest.mark.parametrize(
    "url, message",
    [
        ("file:///etc/passwd", "no http or https address"),
        ("localhost:8000", "no http or https address"),
        ("http://", "no http or https address"),
        ("http://[::1", "no http or https address"),
        ("http://host:port/v1", "no http or https address"),
        ("http://host:99999/v1", "no http or https address"),
        ("http://host:0/v1", "no http or https address"),
        ("http://user:Secret@host/v1", "holds a name or password"),
        ("http://user:Sec/ret@host/v1", "no http or https address"),
        ("user:Secret@host", "no http or https address"),
        ("http://host/v1 ?key=Secret", "has a space at position 15"),
        ("http://host/v1\u201d?key=Secret", r"has the character U\+201D"),
    ],
)
def test_addresses(url, message):
    with pytest.raises(UsageError, match=message) as raised:
        ChatServer(url, "m")
    assert "Sec" not in "".join(traceback.format_exception(raised.value))


def test_shown_addresses():
    assert shown("http://host:1/v1?api-version=2&key=a#x") == "http://host:1/v1?api-version=[key]&key=[key]#x"
    assert shown("http://a:b@c@host/v1") == "http://host/v1" and shown("http://host/v1") == "http://host/v1"


REPLIES = {
    "401": (401, {}, f"Incorrect key: {KEY}".encode()),
    "400": (400, {}, json.dumps({"error": {"message": f"Bearer {KEY}"}}).encode()),
    "503": (503, {}, (" " * 190 + KEY).encode()),  # cut after 200 characters
    "429": (429, {"Retry-After": "4000"}, KEY.encode()),
    "no json": (200, {}, KEY.encode()),
    "no choices": {"choices": [], "key": KEY},
    "error": {"error": {"message": KEY}},
    "quoted": {"error": {"message": KEY.replace("/", "%2F").replace("+", "%2B").replace("=", "%3D")}},
    "answer": says(f"your key is {KEY}"),
    "content": says([{"type": "text", "text": {"key": KEY}}]),
}


@pytest.mark.parametrize("kind", REPLIES)
def test_no_message_holds_the_key(kind, serve, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    server = serve(lambda question, times: REPLIES[kind])
    texts = []
    try:
        _, _, texts = run(client(server, key=KEY), tmp_path / "answers", write_pictures(tmp_path)[:1], words=("cat",))
    except OVDetError as error:
        texts.append("".join(traceback.format_exception(error)))
    assert texts and server.headers[0][1]["Authorization"] == f"Bearer {KEY}"
    assert not any(part in text for text in texts for part in ("Secret", "0123", "4567"))


def test_the_name_of_a_variable_may_be_the_key(tmp_path, monkeypatch):
    options = ["--backend", "mllm", "--dataset", "x", "--output", "y", "--url", "http://localhost:9", "--model", "m"]
    for name, printed in (("MY_KEY", True), ("sk-Secret", False), ("Secret0123", False)):
        args = build_concept_priors.parse_args([*options, "--api-key-env", name])
        with pytest.raises(UsageError, match="is not set.*takes the name of the variable, not the key") as raised:
            build_concept_priors.mllm_backend(args, ["cat"])
        assert (name in str(raised.value)) == printed


@pytest.mark.parametrize(
    "proxy", ["socks5://user:Secret@host:1", "http://user:Secret@host:port", "http://user:Secret@/", "http://a b"]
)
def test_proxies_that_cannot_be_used(proxy, monkeypatch):
    monkeypatch.setenv("http_proxy", proxy)
    with pytest.raises(UsageError, match="of the environment variable http_proxy is no http address") as raised:
        ChatServer("http://server.example/v1", "m")
    assert "Secret" not in "".join(traceback.format_exception(raised.value))
    monkeypatch.setenv("no_proxy", "server.example")
    assert ChatServer("http://server.example/v1", "m").proxy == ""
    assert ChatServer("https://other.example/v1", "m").proxy == ""  # that is https_proxy


def test_the_proxy_in_use_is_named(serve, tmp_path, monkeypatch):
    """The server of the test acts as a proxy: it answers whatever host is in the request."""
    server = serve(lambda question, times: says("yes"))
    address = server.url.removeprefix("http://").removesuffix("/v1")
    monkeypatch.setenv("http_proxy", f"http://user:Secret@{address}")
    model = client(server, url="http://far.example/v1")
    assert model.proxy == f"http://{address} (http_proxy)"
    _, found, _ = run(model, tmp_path / "answers", write_pictures(tmp_path)[:1], words=("cat",))
    assert found == {10: {0: 1.0}} and server.headers[0][0] == "http://far.example/v1/chat/completions"
    refusing = serve(lambda question, times: (407, {}, b"who are you"))
    address = refusing.url.removeprefix("http://").removesuffix("/v1")
    monkeypatch.setenv("http_proxy", address)
    with pytest.raises(
        SetupError, match=rf"far.example/v1/chat/completions through the proxy http://{address} \(http_proxy\)"
    ):
        run(
            client(refusing, url="http://far.example/v1"),
            tmp_path / "more",
            write_pictures(tmp_path)[:1],
            words=("cat",),
        )
    monkeypatch.setenv("no_proxy", "*")
    assert client(refusing).proxy == "" and client(refusing).address == f"{refusing.url}/chat/completions"


def test_a_refused_key_stays_hidden_in_data_errors(serve, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    server = serve(lambda question, times: REPLIES["400"])
    picture = client(server).prepare(write_pictures(tmp_path)[0]["file_name"])
    with pytest.raises(DataError, match=r"Bearer \[key\]"):
        client(server, key=KEY).ask(picture, ["cat"], ["?"])
