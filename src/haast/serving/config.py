"""Server options: one frozen dataclass, checked before anything loads. `haast serve` derives its flags from it."""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass, field
from typing import Any

from haast.errors import check_at_least, expanded


def _option(default: Any, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True)
class ServeConfig:
    """Address, access, limits and logging of a server. Raises ValueError for values that are not allowed."""

    host: str = _option("127.0.0.1", "Address to listen on.")
    port: int = _option(8000, "Port; 0 picks a free one.")
    served_name: str | None = _option(None, "The model's name for clients; default: the name of its folder.")
    api_key: str | None = _option(None, "Key that clients must send. --api-key-file keeps it out of `ps`.")
    api_key_file: str | None = _option(None, "File with one key per line.")
    auth: bool = _option(True, "--no-auth serves other machines without a key.")
    allow_origin: str = _option(
        "", "Origins of web pages that may send requests, comma-separated: https://example.org."
    )
    allow_host: str = _option("", "Host names that a proxy on this machine sends, comma-separated.")
    max_running: int = _option(64, "Answers that are generated at the same time.")
    max_waiting: int = _option(256, "Answers that may wait; further requests get 429.")
    max_body: int = _option(4_000_000, "Maximum size of a request body, in bytes.")
    max_choices: int = _option(16, "Maximum answers per request (n times the number of prompts).")
    timeout: float | None = _option(600.0, "Maximum seconds per answer.")
    body_timeout: float = _option(30.0, "Maximum seconds to receive a request body.")
    send_timeout: float = _option(30.0, "Maximum seconds for a client to read one piece of a stream.")
    keep_alive: float = _option(15.0, "Seconds without output after which a stream sends a ping.")
    grace: float = _option(30.0, "Seconds that running answers may take at a shutdown.")
    requests_per_minute: int | None = _option(None, "Maximum requests per minute and key.")
    tokens_per_minute: int | None = _option(None, "Maximum new tokens per minute and key.")
    kv_tokens: int | None = _option(None, "Size of the KV pool in tokens; default: a quarter of memory.")
    log_prompts: bool = _option(False, "Log prompts and answers.")

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ValueError(f"port={self.port} is not allowed: give 1 to 65535, or 0 for a free one")
        for name in ("max_running", "max_body", "max_choices"):
            check_at_least(name, getattr(self, name))
        check_at_least("max_waiting", self.max_waiting, 0, " (no queue)")
        for name in ("timeout", "keep_alive", "grace", "body_timeout", "send_timeout"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}={value} is not allowed: give seconds above 0")
        for name in ("requests_per_minute", "tokens_per_minute"):
            if getattr(self, name) is not None:
                check_at_least(name, getattr(self, name))
        if not self.keys and not self.local and self.auth:
            raise ValueError(
                f"host={self.host!r} can be reached from other machines: give --api-key-file, --api-key or --no-auth"
            )

    @property
    def local(self) -> bool:
        """Whether `host` is a loopback address."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False

    @property
    def origins(self) -> tuple[str, ...]:
        """Origins of web pages that may send requests."""
        return _split(self.allow_origin)

    @property
    def hosts(self) -> tuple[str, ...]:
        """Accepted Host header names, in addition to this machine's own."""
        return _split(self.allow_host)

    @property
    def keys(self) -> tuple[str, ...]:
        """All valid keys; empty if no key is needed. Raises ValueError for a bad key file or an invalid key."""
        keys = [] if self.api_key is None else [self.api_key]
        if self.api_key_file is not None:
            path = expanded(self.api_key_file, "no key file at")
            try:
                lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f"the key file {path} can't be read: {error}") from error
            keys += [line for line in lines if line and not line.startswith("#")]
            if not keys:
                raise ValueError(f"the key file {path} holds no key: write one key per line")
        for key in keys:
            if not key or not key.isascii() or any(letter.isspace() for letter in key):
                raise ValueError(
                    "an API key is empty, or has blanks or characters that no header can carry: give another"
                )
        return tuple(keys)


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip().rstrip("/") for part in text.split(",") if part.strip())
