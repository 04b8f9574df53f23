"""`haast serve` on the tests' tiny model, in a process of its own: python tests/serve_tiny.py '{"port": 0}'."""

from __future__ import annotations

import json
import sys

import torch
from serving import NAME, tiny_haast

from haast.serving.config import ServeConfig
from haast.serving.run import serve


def main() -> None:
    torch.set_num_threads(1)
    config = ServeConfig(**json.loads(sys.argv[1]))
    serve(lambda: tiny_haast(config), NAME, config)


if __name__ == "__main__":
    main()
