"""Pictures at web addresses: fetched only from hosts that are allowed, and never from a network that is not public.

A host's name is looked up once, every address it has must be public, and the connection goes to one of those addresses:
an answer of the name server that changes in between changes nothing.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from fnmatch import fnmatch
from urllib.parse import urljoin

import httpx

from beavertails_v.references import short
from guard.server.content import RequestError
from guard.server.settings import ServeSettings

# Translated addresses carry a private one inside: 6to4, NAT64, Teredo.
_CARRIERS = [ipaddress.ip_network(n) for n in ("2002::/16", "64:ff9b::/96", "64:ff9b:1::/48", "2001::/32")]


class Fetcher:
    """Fetches the bytes of pictures. transport: of httpx, in place of the network."""

    def __init__(self, settings: ServeSettings, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self.remote, self.most = settings.remote_pictures, settings.picture.limits().max_bytes
        self._client = httpx.AsyncClient(
            transport=transport, follow_redirects=False, trust_env=False, timeout=self.remote.timeout_s
        )

    async def __call__(self, url: str) -> bytes:
        """The picture's bytes. Raises RequestError."""
        if not self.remote.allow:
            raise RequestError(
                "pictures at web addresses are not fetched here; send the picture as data:image/png;base64,...",
                code="remote_pictures_off",
            )
        try:
            return await asyncio.wait_for(self._follow(url), self.remote.timeout_s)
        except (httpx.HTTPError, TimeoutError, OSError, httpx.InvalidURL) as error:
            raise _refused(url, f"could not be fetched ({type(error).__name__})") from None

    async def close(self) -> None:
        await self._client.aclose()

    async def _follow(self, url: str) -> bytes:
        for _ in range(self.remote.max_redirects + 1):
            answer = await self._get(url)
            if isinstance(answer, bytes):
                return answer
            url = urljoin(url, answer)
        raise _refused(url, f"leads on more than {self.remote.max_redirects} times")

    async def _get(self, url: str) -> bytes | str:
        """The bytes, or the address that it leads on to."""
        parsed = httpx.URL(url)
        host = parsed.host.lower().rstrip(".")
        if parsed.scheme != "https" or parsed.userinfo or not host:
            raise _refused(url, "is no plain https address")
        if not any(fnmatch(host, pattern.lower()) for pattern in self.remote.allow):
            raise _refused(url, "is of a host that is not allowed here")
        address = await self.address(host, parsed.port or 443)
        pinned = parsed.copy_with(host=address)
        headers = {"host": parsed.netloc.decode(), "accept": "image/*", "accept-encoding": "identity"}
        extensions = {"sni_hostname": host}
        async with self._client.stream("GET", pinned, headers=headers, extensions=extensions) as answer:
            if answer.is_redirect:
                return answer.headers.get("location", "")
            if answer.status_code != 200:
                raise _refused(url, f"answered {answer.status_code}")
            if answer.headers.get("content-encoding", "identity") != "identity":
                raise _refused(url, "comes compressed, though that was not asked for")
            data = b""
            async for chunk in answer.aiter_bytes():
                data += chunk
                if len(data) > self.most:
                    raise _refused(url, f"has more than {self.most:,} bytes")
            return data

    async def address(self, host: str, port: int) -> str:
        """One address of the host, all of which are public. Raises RequestError."""
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = [entry[4][0] for entry in found]
        if not addresses or not all(is_public(str(a)) for a in addresses):
            raise _refused(host, "lies in a network that is not public")
        return str(addresses[0])


def is_public(address: str) -> bool:
    """Whether an address is of the public internet: not private, local, shared, reserved, nor carrying such a one."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return False
        if any(ip in network for network in _CARRIERS):
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def _refused(url: str, why: str) -> RequestError:
    return RequestError(f"the picture at {short(str(url))!r} {why}", code="remote_picture_refused")
