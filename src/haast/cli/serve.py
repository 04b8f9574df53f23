"""`haast serve`: an OpenAI-compatible server. Owns the checks before loading; `haast.serving` owns the rest."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from haast.cli.loading import load_chosen
from haast.cli.settings import Choice, Drafting, Loading
from haast.serving.config import ServeConfig

if TYPE_CHECKING:
    from haast.api import Haast


def serve(loading: Loading, choice: Choice, drafting: Drafting, server: ServeConfig) -> None:
    """Serve an OpenAI-compatible API with drafting, whose answers equal vanilla decoding's, and a chat page.

    \b
    haast serve
    haast serve --model ./my-model --head ./my-head --port 9000
    haast serve --host 0.0.0.0 --api-key-file keys.txt
    """
    try:
        from haast.serving.run import serve as run
    except ImportError as error:
        install = "pip install 'haast[serve]'"
        raise ValueError(f"haast serve needs the package {error.name}, which is not installed: {install}") from error

    from haast.drafters.factory import needs_head, plan_drafter

    choice.check()
    loading.check()
    if needs_head(choice.drafter):
        drafting.check(loading.model, loading.device)
    head = None if drafting.head == "none" else drafting.head
    plan_drafter(choice.drafter, head, loading.model, choice.small_model is not None)

    def load() -> Haast:
        from haast.api import Haast
        from haast.engine.scheduler import Scheduler

        target, drafter = load_chosen(choice, loading, drafting)
        if server.kv_tokens is not None:
            target.use_pool(server.kv_tokens)
        target.scheduler = Scheduler(target, server.max_running, server.max_waiting)
        return Haast(target, drafter)

    run(load, server.served_name or Path(loading.model).name, server)
