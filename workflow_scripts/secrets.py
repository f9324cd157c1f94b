"""Secrets: a configuration names them as ``${NAME}``, a request has their value, nothing said or kept has it.

A signature in a URL is therefore in no log, manifest, message, list of processes or file of Snakemake.
"""

from __future__ import annotations

import os
import re
from urllib.parse import quote, quote_plus, urlsplit

REFERENCE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
PARAMETERS = frozenset(
    [
        "access_token",
        "accesskey",
        "api_key",
        "apikey",
        "auth",
        "authkey",
        "awsaccesskeyid",
        "client_secret",
        "credential",
        "hdnea",
        "hdnts",
        "hmac",
        "jwt",
        "key",
        "key-pair-id",
        "password",
        "passwd",
        "policy",
        "rlkey",
        "secret",
        "sig",
        "signature",
        "token",
        "x-amz-credential",
        "x-amz-security-token",
        "x-amz-signature",
        "x-goog-credential",
        "x-goog-signature",
        "x-oss-signature",
    ]
)
"""Names under which stores of files expect signatures and keys."""
_TOKEN = re.compile(r"[\w+/=~-]{20,}")
SHORTEST = 4
"""Shorter values are not struck out: `1` as a secret would leave no message readable."""
_LOGIN = re.compile(r"(?<=://)[^/\s@'\"]+@")
_URL_QUERY = re.compile(r"(https?://[^\s'\"<>?#]*)[?#][^\s'\"<>]*")
_PATH_QUERY = re.compile(r"(/[^\s'\"<>?#]*)\?[\w.~%$-]+=[^\s'\"<>]*")

_struck: dict[str, str] = {}


class MissingSecret(Exception):
    """An environment variable that the configuration names is not set; the message says which."""


def expand(text: str) -> str:
    """``text`` with the environment's values in the place of ``${NAME}``, which :func:`redact` knows from now
    on.

    Raises :class:`MissingSecret` where a variable is not set.
    """

    def value(match: re.Match[str]) -> str:
        found = os.environ.get(match[1])
        if not found:
            raise MissingSecret(
                f"{public(text)}: the environment variable {match[1]} is not set; export it, run the same"
                " command again"
            )
        hide(found, match[0])
        return found

    return REFERENCE.sub(value, text)


def is_secret(parameter: str, value: str) -> bool:
    """True where a parameter of a URL is, or looks like, a signature or a key, and is no reference to one."""
    if REFERENCE.search(value) or not value:
        return False
    return parameter.lower() in PARAMETERS or (
        _TOKEN.fullmatch(value) is not None
        and any(item.isdigit() for item in value)
        and any(item.isalpha() for item in value)
    )


def hide(value: str, shown: str = "(secret)") -> None:
    """Strikes ``value`` out of everything that :func:`redact` sees, in the spellings that a URL gives it."""
    if len(value) >= SHORTEST:
        spellings = (value, quote(value, safe=""), quote(value), quote_plus(value))
        _struck.update(dict.fromkeys(spellings, shown))


def redact(text: str) -> str:
    """``text`` without known secrets, and URLs without logins and what stands behind their question mark."""
    for value in sorted(_struck, key=len, reverse=True):
        text = text.replace(value, _struck[value])
    text = _LOGIN.sub("", text)
    return _PATH_QUERY.sub(r"\1?...", _URL_QUERY.sub(r"\1?...", text))


def public(url: str) -> str:
    """A URL without login, query and fragment, as messages and manifests have it."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "(an address that can't be read)"
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
