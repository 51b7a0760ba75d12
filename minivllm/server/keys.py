"""API keys: where they come from, whose they are, and what keeps their owners apart.

Only digests of keys are kept. All of them are compared, in constant time, so that the time of an answer tells neither how much
of a guess was right nor which key it was. Each key belongs to a tenant: a name for limits and logs, and a part of the prefix
cache to itself (``Salts``). Who has to show one says ``auth.py``.
"""

import hmac
import ipaddress
import logging
import re
import secrets
import socket
import stat
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Final

from minivllm.config import ServerConfig
from minivllm.errors import InvalidOption

TENANT: Final = "tenant"  # key in scope["state"]: who asks; "" where there are no keys
_KEY: Final = re.compile(r"[!-+\--~]{1,512}")  # what an HTTP header can carry, without a space or a comma
_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
logger = logging.getLogger("minivllm.server")


class Keys:
    """Which keys open the server, as digests with their tenants. Never changed after it is made."""

    def __init__(self, named: Sequence[tuple[str, str]]) -> None:
        self._digests = tuple((sha256(key.encode()).digest(), name) for name, key in named)

    def __bool__(self) -> bool:
        """True when there are any: then each request needs one."""
        return bool(self._digests)

    @property
    def tenants(self) -> frozenset[str]:
        """Whom the keys belong to."""
        return frozenset(name for _, name in self._digests)

    def tenant(self, given: bytes) -> str | None:
        """Whose key this is; None: nobody's."""
        digest, found = sha256(given).digest(), None
        for known, name in self._digests:
            found = name if hmac.compare_digest(known, digest) else found
        return found


def read_keys(config: ServerConfig) -> Keys:
    """The keys that the options give. Raises ``InvalidOption``, which never repeats one."""
    given = [part.strip() for text in config.api_key for part in text.split(",")]
    named = [(f"key-{i}", key) for i, key in enumerate(given, 1)]
    if config.api_key_file is not None:
        named += _of_file(Path(config.api_key_file).expanduser())
        if not named:
            raise InvalidOption("--api-key-file holds no key; write a name and a key on a line, or leave the option out.")
    for name, key in named:
        if not _KEY.fullmatch(key) or not _NAME.fullmatch(name):
            raise InvalidOption(
                "An API key is 1 to 512 visible ASCII characters without a comma, and a tenant's name 1 to 64 letters, digits, "
                "dots, dashes or underscores; change the one given by --api-key or --api-key-file that is not."
            )
    if len({key for _, key in named}) < len(named):
        raise InvalidOption("An API key is given twice; give each once.")
    return Keys(named)


def _of_file(path: Path) -> Iterator[tuple[str, str]]:
    """Tenant and key of each line: ``name key`` or ``name:key``; ``#`` begins a comment."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text in UTF-8"
        raise InvalidOption(f"The file of --api-key-file cannot be read: {reason}; check its path and mode.") from None
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].replace(":", " ", 1).split()
        if len(words) not in (0, 2):
            raise InvalidOption(f"Line {number} of --api-key-file is not a name and a key; write `name key`.")
        if words:
            yield words[0], words[1]


def check_exposure(config: ServerConfig) -> None:
    """Raise ``InvalidOption`` for keys that cannot be used, and where strangers could reach a server that asks for none."""
    if not read_keys(config) and not _is_local(config.host):
        raise InvalidOption(
            f"--host {config.host or repr('')} can be reached from other machines, so it needs a key: give --api-key or "
            "--api-key-file, or listen on 127.0.0.1."
        )
    if config.api_key_file is not None and Path(config.api_key_file).expanduser().stat().st_mode & stat.S_IROTH:
        logger.warning("Everybody on this machine can read the file of --api-key-file; `chmod 600` it")


def _is_local(host: str) -> bool:
    """True when every address of ``host`` is this machine's own."""
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)} if host else set()
        return bool(found) and all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in found)
    except (OSError, UnicodeError, ValueError):
        return False


class Salts:
    """What keeps tenants apart in the prefix cache: the same prompt has other keys for each, which nobody outside this process
    can compute. Whether somebody else's prompt is cached could otherwise be measured (CVE-2025-46570). Never changed."""

    def __init__(self, keys: Keys) -> None:
        self._secret = secrets.token_bytes(32) if len(keys.tenants) > 1 else b""

    def salt(self, tenant: str, wanted: str) -> str:
        """The salt for a tenant's request that gave ``wanted`` itself. With one tenant or none it is that."""
        if not self._secret:
            return wanted
        return hmac.new(self._secret, f"{len(tenant)}:{tenant}{wanted}".encode(), sha256).hexdigest()
