"""A connection whose server can't keep us waiting for ever, and whose errors are told without addresses."""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Callable, Iterator
from typing import Any

import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

BROKEN = (
    requests.ConnectionError,
    requests.Timeout,
    requests.exceptions.ChunkedEncodingError,
    urllib3.exceptions.HTTPError,
    ConnectionError,
    TimeoutError,
)
"""What a later attempt may not meet again."""
FINAL = (
    requests.TooManyRedirects,
    requests.exceptions.InvalidHeader,
    urllib3.exceptions.InvalidHeader,
    ValueError,
)
"""What every later attempt meets too. All kinds of wrong addresses are a ValueError."""
REDIRECTS = 10


def new_session(asked: Callable[[socket.socket | None], None]) -> requests.Session:
    """A session that calls ``asked`` with its socket whenever it begins to wait for an answer."""
    session = requests.Session()
    session.max_redirects = REDIRECTS
    for scheme in ("http://", "https://"):
        session.mount(scheme, _Adapter(asked))
    return session


class _Adapter(HTTPAdapter):
    def __init__(self, asked: Callable[[socket.socket | None], None]) -> None:
        self.pools = _pools(asked)
        super().__init__()

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, **options)
        self.poolmanager.pool_classes_by_scheme = self.pools

    def proxy_manager_for(self, *args: Any, **options: Any) -> Any:
        manager = super().proxy_manager_for(*args, **options)
        manager.pool_classes_by_scheme = self.pools
        return manager


def _pools(asked: Callable[[socket.socket | None], None]) -> dict[str, type[HTTPConnectionPool]]:
    class Plain(HTTPConnection):
        def getresponse(self) -> Any:
            asked(self.sock)
            return super().getresponse()

    class Secure(HTTPSConnection):
        def getresponse(self) -> Any:
            asked(self.sock)
            return super().getresponse()

    class PlainPool(HTTPConnectionPool):
        ConnectionCls = Plain

    class SecurePool(HTTPSConnectionPool):
        ConnectionCls = Secure

    return {"http": PlainPool, "https": SecurePool}


def keep_headers(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """Keeps requests from putting a .netrc's password in the place of our own header."""
    if "Authorization" not in request.headers:
        login = requests.utils.get_netrc_auth(request.url or "")
        return requests.auth.HTTPBasicAuth(*login)(request) if login else request
    return request


# ---------------------------------------------------------------- errors in our own words


def explain_final(error: BaseException) -> str:
    """Why one of :data:`FINAL` will not pass."""
    if isinstance(error, requests.TooManyRedirects):
        return f"redirects without end (more than {REDIRECTS})"
    if isinstance(error, requests.exceptions.InvalidHeader | urllib3.exceptions.InvalidHeader):
        return "the server says two lengths at once"
    return f"the URL or the server's redirect is no address that can be fetched ({type(error).__name__})"


def is_certificate_error(error: BaseException) -> bool:
    """True where a certificate is wrong, which no later attempt mends."""
    return any(isinstance(item, ssl.SSLCertVerificationError) for item in _chain(error))


def explain(error: BaseException) -> str:
    """What happened. The errors' own texts are not used: they have whole addresses, with their signatures."""
    chain = list(_chain(error))
    for item in chain:
        if isinstance(item, ssl.SSLCertVerificationError):
            return f"the certificate is not trusted ({item.verify_message})"
        if isinstance(item, socket.gaierror):
            return "the host's name is not known (is there a network?)"
        if isinstance(item, urllib3.exceptions.ReadTimeoutError):
            return "nothing came any more"
        if isinstance(item, urllib3.exceptions.IncompleteRead):
            return "the connection ended before the file did"
        if isinstance(item, TimeoutError | requests.ConnectTimeout):
            return "no answer in time"
        if isinstance(item, OSError) and item.errno and not isinstance(item, requests.RequestException):
            return os.strerror(item.errno).lower()
    if isinstance(chain[0], requests.exceptions.ProxyError):
        return "the proxy refuses"
    return f"the connection broke ({type(chain[-1]).__name__})"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, and those that it is made of, outermost first."""
    seen: set[int] = set()
    waiting: list[Any] = [error]
    while waiting:
        item = waiting.pop(0)
        if isinstance(item, BaseException) and id(item) not in seen:
            seen.add(id(item))
            yield item
            waiting += [*item.args, getattr(item, "reason", None), item.__cause__, item.__context__]
