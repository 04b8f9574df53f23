"""Whether the Hugging Face hub can be reached, asked once before transformers loads a model from there."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

_NO_ROUTE = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN)


def check_reachable(model: str) -> None:
    """Raise OSError at once if the hub's cache lacks the model and there is no connection to the hub.

    The hub's client would try again for half a minute. A slow connection is no error here, nor is any other refusal:
    loading meets it again, waits as long as it takes, and says what is wrong.

    Args:
        model: a hub id.
    """
    try:
        if try_to_load_from_cache(model, "config.json") is None:
            get_hf_file_metadata(hf_hub_url(model, "config.json"))
    except Exception as error:  # the HTTP client's own kinds, which differ between versions of huggingface_hub
        if any(_is_disconnected(each) for each in _causes(error)):
            raise OSError(
                f"the hub ({constants.ENDPOINT}) can't be reached, and its cache does not hold this model."
            ) from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, then the one that it was raised from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_disconnected(error: BaseException) -> bool:
    """Whether a name has no address, a port is closed or there is no route. Waiting for an answer is none of these."""
    refused = isinstance(error, socket.gaierror | ConnectionRefusedError)
    return refused or (isinstance(error, OSError) and error.errno in _NO_ROUTE)
