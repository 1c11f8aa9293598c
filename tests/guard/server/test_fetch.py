"""Pictures at web addresses: off, or from allowed hosts in public networks, pinned, checked again at every redirect."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from guard.server.content import RequestError
from guard.server.fetch import Fetcher, is_public
from guard.server.settings import ServeSettings
from tests.guard.server.fakes import png

PRIVATE = [
    "127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
    "255.255.255.255", "192.0.2.1", "240.0.0.1", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "ff02::1",
    "::ffff:127.0.0.1", "::ffff:8.8.8.8", "2002:7f00:1::", "2002:808:808::", "64:ff9b::7f00:1", "64:ff9b:1::1",
    "2001::1", "2001:db8::1",
]  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE)
def test_addresses_that_are_not_of_the_public_internet(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.216.34", "2606:4700:4700::1111"])
def test_addresses_that_are(address: str) -> None:
    assert is_public(address)


class Web:
    """Hosts with addresses, pages behind them, and what was asked for."""

    def __init__(self, hosts: dict[str, list[str]], pages: dict[str, httpx.Response]) -> None:
        self.hosts, self.pages, self.asked = hosts, pages, []  # type: ignore[var-annotated]

    def handle(self, request: httpx.Request) -> httpx.Response:
        self.asked.append((request.url.host, request.headers["host"], request.extensions.get("sni_hostname")))
        return self.pages[f"{request.headers['host']}{request.url.path}"]

    def fetch(self, url: str, max_mb: float = 20.0, **remote: Any) -> bytes:
        settings = ServeSettings(
            remote_pictures={"allow": ("ok.example", "*.pics.example")} | remote, picture={"max_mb": max_mb}
        )
        fetcher = Fetcher(settings, httpx.MockTransport(self.handle))

        async def lookup(host: str, port: int, **kwargs: Any) -> list[Any]:
            if host not in self.hosts:
                raise OSError("no such host")
            return [(0, 0, 0, "", (address, port)) for address in self.hosts[host]]

        async def run() -> bytes:
            asyncio.get_running_loop().getaddrinfo = lookup  # type: ignore[method-assign]
            return await fetcher(url)

        return asyncio.run(run())


def test_a_picture_is_fetched_from_the_address_that_was_checked() -> None:
    web = Web({"ok.example": ["93.184.216.34"]}, {"ok.example/a.png": httpx.Response(200, content=png())})
    assert web.fetch("https://ok.example/a.png") == png()
    assert web.asked == [("93.184.216.34", "ok.example", "ok.example")]


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("https://other.example/a.png", "not allowed"),
        ("https://ok.example.evil.example/a.png", "not allowed"),
        ("http://ok.example/a.png", "no plain https"),
        ("https://user@ok.example/a.png", "no plain https"),
        ("https://127.0.0.1/a.png", "not allowed"),
        ("https://inner.pics.example/a.png", "not public"),
        ("https://half.pics.example/a.png", "not public"),
        ("https://ok.example/missing", "answered 404"),
        ("https://ok.example/large", "more than"),
        ("https://ok.example/packed", "comes compressed"),
        ("https://ok.example/inside", "not allowed"),
        ("https://ok.example/plain", "no plain https"),
        ("https://ok.example/round", "leads on more than"),
        ("https://none.pics.example/a.png", "could not be fetched"),
    ],
)
def test_what_is_not_fetched(url: str, said: str) -> None:
    web = Web(
        {"ok.example": ["93.184.216.34"], "inner.pics.example": ["10.0.0.1"],
         "half.pics.example": ["93.184.216.34", "127.0.0.1"]},
        {
            "ok.example/missing": httpx.Response(404),
            "ok.example/packed": httpx.Response(200, content=b"x", headers={"content-encoding": "br"}),
            "ok.example/large": httpx.Response(200, content=b"x" * 100),
            "ok.example/inside": httpx.Response(302, headers={"location": "https://169.254.169.254/latest"}),
            "ok.example/plain": httpx.Response(302, headers={"location": "http://ok.example/a.png"}),
            "ok.example/round": httpx.Response(302, headers={"location": "/round"}),
        },
    )  # fmt: skip

    with pytest.raises(RequestError) as caught:
        web.fetch(url, max_mb=1e-5)
    assert said in str(caught.value)


def test_off_unless_hosts_are_allowed() -> None:
    with pytest.raises(RequestError, match="not fetched here"):
        Web({}, {}).fetch("https://ok.example/a.png", allow=())
