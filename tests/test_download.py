"""Downloads from a host on this machine: every way to fail has a stated outcome, and none leaves a half-written file."""

import json
import socket

import pytest

from ovdet2.errors import DataError
from ovdet2.io import download as module
from ovdet2.io.download import DownloadError, Patience, download
from tests.file_host import Host, serving

CONTENT = bytes(range(256)) * 40
QUICK = Patience(seconds=0.5, bytes_per_second=1000, attempts=3)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def host():
    host = Host(CONTENT)
    with serving(host) as address:
        host.url = f"{address}/weights.pth"
        yield host


@pytest.fixture
def target(tmp_path):
    return tmp_path / "zoo" / "weights.pth"


def names(target):
    return sorted(path.name for path in target.parent.iterdir())


def keep_part(host, target, length):
    """Make a part of ``length`` bytes, by a host that sends no more."""
    host.cut_after, host.cuts = length, 99
    host.ranges, ranges = False, host.ranges
    with pytest.raises(DownloadError):
        download(host.url, target, patience=QUICK)
    host.cuts, host.ranges = 0, ranges
    host.requests.clear()
    assert names(target) == ["weights.pth.part", "weights.pth.part.json"]
    assert (target.parent / "weights.pth.part").read_bytes() == host.content[:length]


def test_a_file_is_downloaded_and_nothing_else_is_left(host, target):
    assert download(host.url, target, num_bytes=len(CONTENT)) == target
    assert target.read_bytes() == CONTENT and names(target) == ["weights.pth"]
    assert "Range" not in host.requests[0]


def test_connections_that_end_early_are_continued(host, target):
    host.cut_after, host.cuts = 3000, 3
    download(host.url, target, patience=QUICK)
    assert target.read_bytes() == CONTENT and names(target) == ["weights.pth"]
    assert [request.get("Range") for request in host.requests] == [None, "bytes=3000-", "bytes=6000-", "bytes=9000-"]


def test_a_later_call_goes_on(host, target):
    keep_part(host, target, 1234)
    download(host.url, target, patience=QUICK)
    assert target.read_bytes() == CONTENT and names(target) == ["weights.pth"]
    assert [request["Range"] for request in host.requests] == ["bytes=1234-"]


def test_a_host_that_brings_nothing_more_is_given_up(host, target):
    host.cut_after, host.cuts = 0, 99
    with pytest.raises(
        DownloadError, match="3 further connections brought no more .*run the same command later"
    ) as error:
        download(host.url, target, patience=QUICK)
    assert error.value.exit_code == 4 and len(host.requests) == 3
    assert not target.exists()


def test_a_complete_part_is_only_renamed(host, target):
    keep_part(host, target, 1234)
    (target.parent / "weights.pth.part").write_bytes(CONTENT)
    download(host.url, target)
    assert target.read_bytes() == CONTENT and host.requests == [] and names(target) == ["weights.pth"]


@pytest.mark.parametrize("change", ["content", "length", "no ranges", "another address", "notes"])
def test_parts_that_cannot_be_continued_start_over(change, host, target, capsys):
    keep_part(host, target, 1234)
    capsys.readouterr()
    url, notes = host.url, target.parent / "weights.pth.part.json"
    if change == "content":
        host.content, host.etag = CONTENT[::-1], '"2"'
    elif change == "length":  # a host that states the same ETag for a file of another length
        host.content = CONTENT[::-1] + b"more"
    elif change == "no ranges":
        host.ranges = False
    elif change == "another address":
        url += "?other"
    else:
        notes.write_text(json.dumps({"url": url}))
    download(url, target, patience=QUICK)
    assert target.read_bytes() == host.content and names(target) == ["weights.pth"]
    assert ("starting over" in capsys.readouterr().out) == (change in ("content", "no ranges"))


def test_a_part_that_is_longer_than_the_file_starts_over(host, target):
    keep_part(host, target, 1234)
    host.content = CONTENT[:1000]
    host.answer, answer = lambda handler: refuse_range(host, handler, answer), host.answer
    download(host.url, target, patience=QUICK)
    assert target.read_bytes() == CONTENT[:1000]


def refuse_range(host, handler, answer):
    host.status = 416 if handler.headers.get("Range") else 200
    answer(handler)


def test_without_an_etag_a_part_is_not_continued(host, target):
    host.etag, host.cut_after, host.cuts = None, 5000, 1
    download(host.url, target, patience=QUICK)
    assert target.read_bytes() == CONTENT
    assert [request.get("Range") for request in host.requests] == [None, None]


def test_a_wrong_length_is_refused_before_the_download(host, target):
    with pytest.raises(DataError, match=r"10,240 bytes, but 99 are expected: the host's file has changed"):
        download(host.url, target, num_bytes=99)
    assert names(target) == []


def test_a_host_that_states_too_much_is_given_up(host, target):
    host.stated = len(CONTENT) + 5
    host.ranges = False
    with pytest.raises(DownloadError, match="ended after 10,240 bytes"):
        download(host.url, target, patience=QUICK)
    assert not target.exists()


@pytest.mark.parametrize("stated", ["", "many", "-5"])
def test_a_length_must_be_stated(stated, host, target):
    host.stated = stated
    with pytest.raises(DataError, match="does not state the length"):
        download(host.url, target)
    assert names(target) == []
    download(host.url, target, num_bytes=len(CONTENT))
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize("place", ["file:///etc/hostname", "ftp://127.0.0.1/x", "http://example.org/x"])
def test_redirects_to_another_scheme_are_refused(place, host, target):
    host.status, host.location = 302, place
    with pytest.raises(DownloadError, match=f"redirects to {place}: only https addresses are opened"):
        download(host.url, target)
    assert names(target) == []


def test_redirects_to_what_is_no_address_are_refused(host, target):
    host.status, host.location = 302, "https://[::1/x"
    with pytest.raises(DownloadError, match=r"redirects to 'https://\[::1/x', which is no address"):
        download(host.url, target)


def test_redirects_on_this_machine_are_followed(host, target):
    first = Host(b"")
    with serving(first) as address:
        first.status, first.location = 302, host.url
        download(f"{address}/a", target)
    assert target.read_bytes() == CONTENT
    with pytest.raises(DownloadError, match="only https"):  # never from https to http
        module._require_scheme(host.url, "https://example.org")


@pytest.mark.parametrize("url", ["http://example.org/a", "file:///etc/hostname", "ftp://example.org/a", "weights.pth"])
def test_addresses_without_https_are_refused(url, target):
    with pytest.raises(DownloadError, match="only https addresses are opened"):
        download(url, target)


def test_files_that_are_not_there(host, target):
    host.status = 404
    with pytest.raises(DownloadError, match=f"{host.url}: the host answers 404 Not Found"):
        download(host.url, target)
    assert names(target) == []


def test_a_slow_host_is_given_up_and_continued_later(host, target):
    host.drip = 0.02  # 50 bytes per second, which never times out
    with pytest.raises(DownloadError, match=r"brings \d\d bytes per second: the part of \d\d bytes is kept"):
        download(host.url, target, patience=QUICK)
    assert names(target) == ["weights.pth.part", "weights.pth.part.json"]
    host.drip = 0
    host.requests.clear()
    download(host.url, target, patience=QUICK)
    assert target.read_bytes() == CONTENT and host.requests[0]["Range"].startswith("bytes=")


def test_no_host(target):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        with pytest.raises(DownloadError, match=f"http://127.0.0.1:{port}/a cannot be reached"):
            download(f"http://127.0.0.1:{port}/a", target, patience=QUICK)
    assert names(target) == []


def test_a_full_disk(host, target, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10})())
    with pytest.raises(module.SetupError, match="GB are free .*OVDET2_HOME"):
        download(host.url, target)
    assert not target.exists()
