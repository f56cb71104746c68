"""What is sent to a server besides the question: its address, the key, the proxy. All are checked before the first request.

No message holds a key: what a server echoes is cleaned, and addresses are shown without their secrets.
"""

from __future__ import annotations

import re
import urllib.parse
import urllib.request

from ovdet2.errors import UsageError

_HIDDEN = "[key]"


def checked_url(url: str) -> urllib.parse.SplitResult:
    """The parts of the address of a server.

    Raises:
        UsageError: not an http or https address, a malformed host or port, or a name and password in it.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
        if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
            raise ValueError
    except ValueError:
        raise UsageError(
            f"--url {shown(url)!r} is no http or https address, such as http://localhost:8000/v1."
        ) from None
    if "@" in parts.netloc:
        raise UsageError(
            f"--url {shown(url)!r} holds a name or password: leave it out, and give the key with --api-key-env."
        )
    odd = _odd_character(url)
    if odd:
        raise UsageError(
            f"--url {shown(url)!r} has {odd}, which no address holds: correct it, or write it in percent encoding."
        )
    return parts


def checked_key(key: str | None) -> str | None:
    """The key, if it can be sent in a header.

    Raises:
        UsageError: it has a line break, space or other character that no header holds; the key is not in the message.
    """
    odd = _odd_character(key or "")
    if odd:
        raise UsageError(f"the key has {odd}, which cannot be sent: set the variable of --api-key-env to the key only.")
    return key or None


def checked_proxy(parts: urllib.parse.SplitResult) -> tuple[str | None, str]:
    """(address of the proxy of the environment for a server or None, how messages name it or "").

    Raises:
        UsageError: the environment names a proxy that cannot be used, such as one of SOCKS.
    """
    proxy = urllib.request.getproxies().get(parts.scheme)
    if not proxy or (parts.hostname and urllib.request.proxy_bypass(parts.hostname)):
        return None, ""
    variable = f"{parts.scheme}_proxy"
    try:
        split = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        if split.scheme not in ("http", "https") or not split.hostname or split.port == 0 or _odd_character(proxy):
            raise ValueError
    except ValueError:
        raise UsageError(
            f"the proxy {shown(proxy)!r} of the environment variable {variable} is no http address, such as "
            "http://proxy.example:3128: correct or unset it, or add the server to no_proxy."
        ) from None
    return proxy, f"{shown(urllib.parse.urlunsplit(split))} ({variable})"


def shown(url: str) -> str:
    """An address without name, password and the values of its query, for messages."""
    url = re.sub(r"(?s)^(\w+://)?.*@", r"\1", url)
    return re.sub(r"(?s)([?&][^=&#]*=)[^&#]*", rf"\1{_HIDDEN}", url)


def without_key(text: str, key: str | None) -> str:
    """A text in which the key is replaced, as it is or in percent encoding."""
    for form in {key, urllib.parse.quote(key, safe="")} if key else ():
        text = text.replace(form, _HIDDEN)
    return text


def _odd_character(text):
    """ "a line break at position 3" for the first character that is not printable ASCII; otherwise ""."""
    match = re.search(r"[^\x21-\x7e]", text)
    if match is None:
        return ""
    names = {"\n": "a line break", "\r": "a line break", " ": "a space", "\t": "a tab"}
    return f"{names.get(match[0], f'the character U+{ord(match[0]):04X}')} at position {match.start() + 1}"
