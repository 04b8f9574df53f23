"""How a server is set up: one frozen dataclass, checked before anything loads; the command's flags follow from it."""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass, field
from typing import Any

from haast.errors import check_at_least, expanded


def _option(default: Any, words: str) -> Any:
    return field(default=default, metadata={"help": words})


@dataclass(frozen=True)
class ServeConfig:
    """Where a server listens, whom it serves, and what it takes at most."""

    host: str = _option("127.0.0.1", "Address to listen on.")
    port: int = _option(8000, "Port; 0 takes a free one.")
    served_name: str | None = _option(None, "The model's name for clients; its own name if absent.")
    api_key: str | None = _option(None, "Key that clients must send; --api-key-file keeps it out of `ps`.")
    api_key_file: str | None = _option(None, "File with one key a line.")
    auth: bool = _option(True, "--no-auth serves other machines without a key.")
    allow_origin: str = _option("", "Origins of pages that may ask, https://example.org, by commas.")
    allow_host: str = _option("", "Host names by which a proxy asks on loopback, by commas.")
    max_running: int = _option(64, "Answers that are written at once.")
    max_waiting: int = _option(256, "Answers that may wait; more are told to come again (429).")
    max_body: int = _option(4_000_000, "Bytes of a request's body at most.")
    max_choices: int = _option(16, "Answers to one request at most (n, or several prompts).")
    timeout: float | None = _option(600.0, "Seconds that an answer may take.")
    body_timeout: float = _option(30.0, "Seconds within which a request's body has to come.")
    send_timeout: float = _option(30.0, "Seconds that a client may take to read a piece of a stream.")
    keep_alive: float = _option(15.0, "Seconds of silence after which a stream says that it lives.")
    grace: float = _option(30.0, "Seconds that running answers have to end at a shutdown.")
    requests_per_minute: int | None = _option(None, "Requests of one key a minute at most.")
    tokens_per_minute: int | None = _option(None, "New tokens of one key a minute at most.")
    kv_tokens: int | None = _option(None, "Positions of all requests together; by a quarter of memory.")
    log_prompts: bool = _option(False, "Write prompts and answers into the log.")

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ValueError(f"port={self.port} is not allowed: give 1 to 65535, or 0 for a free one")
        for name in ("max_running", "max_body", "max_choices"):
            check_at_least(name, getattr(self, name))
        check_at_least("max_waiting", self.max_waiting, 0, " (nobody waits)")
        for name in ("timeout", "keep_alive", "grace", "body_timeout", "send_timeout"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}={value} is not allowed: give seconds above 0")
        for name in ("requests_per_minute", "tokens_per_minute"):
            if getattr(self, name) is not None:
                check_at_least(name, getattr(self, name))
        if not self.keys and not self.local and self.auth:
            raise ValueError(
                f"host={self.host!r} can be reached from other machines: give --api-key-file (or --api-key), or say "
                f"--no-auth"
            )

    @property
    def local(self) -> bool:
        """Whether only this machine reaches it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False

    @property
    def origins(self) -> tuple[str, ...]:
        """Origins of pages that may ask."""
        return _listed(self.allow_origin)

    @property
    def hosts(self) -> tuple[str, ...]:
        """Host names that may stand in a request beside this machine's own."""
        return _listed(self.allow_host)

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys that open it; none where it is open. Raises ValueError for a file without any."""
        given = [] if self.api_key is None else [self.api_key]
        if self.api_key_file is not None:
            path = expanded(self.api_key_file, "no key file at")
            try:
                read = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f"the key file {path} can't be read: {error}") from error
            given += [line for line in read if line and not line.startswith("#")]
            if not given:
                raise ValueError(f"the key file {path} holds no key: write one a line")
        for key in given:
            if not key or not key.isascii() or any(letter.isspace() for letter in key):
                raise ValueError(
                    "an API key is empty or holds blanks or letters that no header can carry: give another"
                )
        return tuple(given)


def _listed(words: str) -> tuple[str, ...]:
    return tuple(word.strip().rstrip("/") for word in words.split(",") if word.strip())
