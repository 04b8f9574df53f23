"""What is private in transformers, torch and other libraries is touched in `haast.compat` alone.

The rule, by syntax: an underscore name is read or written only where Haast itself defines it. On `self`, `cls` and
`super()` it may be defined anywhere in Haast, on other objects in the same file; and on those, or from another file, it
is none that the libraries' own objects have. Private modules and names are not imported, and no string spells one.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LogitsProcessor, PreTrainedModel, StoppingCriteria
from transformers.cache_utils import Cache, DynamicLayer

import haast

SOURCE = Path(haast.__file__).parent
FILES = sorted(path for path in SOURCE.rglob("*.py") if path.name != "compat.py")
OWN = {"self", "cls"}
STRINGS = {"_by_depth", "_by_length"}  # ends of words, which only look private


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def foreign_names() -> set[str]:
    """Private names of the objects that libraries hand to Haast."""
    config: Any = LlamaConfig()
    settings: Any = GenerationConfig()  # type: ignore[no-untyped-call]
    kinds: list[Any] = [nn.Module, PreTrainedModel, LlamaConfig, GenerationConfig, LogitsProcessor, StoppingCriteria]
    found = {name for kind in (*kinds, Cache, DynamicLayer) for name in dir(kind)}
    found |= {*vars(config), *vars(settings), *vars(nn.Module())}
    return {name for name in found if private(name)}


FOREIGN = foreign_names()


def defined(tree: ast.AST) -> set[str]:
    """Private names that a source defines: functions, classes, fields, and attributes that a method sets on `self`."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and on_itself(node):
            names.add(node.attr)
    return {name for name in names if private(name)}


def on_itself(node: ast.Attribute) -> bool:
    owner = node.value
    if isinstance(owner, ast.Call) and isinstance(owner.func, ast.Name):
        return owner.func.id == "super"
    return isinstance(owner, ast.Name) and owner.id in OWN


def strings(tree: ast.AST) -> Iterator[str]:
    """Strings that stand as arguments, keys or values, not as documentation or inside a longer text."""
    told = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    told |= {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in told:
            yield node.value


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names that are imported from other libraries."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module != "__future__":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def complaints(source: str, everywhere: set[str]) -> list[str]:
    """What of a source is private and not Haast's. `everywhere` are the names that Haast defines in all its files."""
    tree = ast.parse(source)
    here, wrong = defined(tree), []
    for name in imported(tree):
        if not name.startswith("haast.") and any(private(part) for part in name.split(".")):
            wrong.append(f"imports {name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and private(node.attr):
            known = here | (everywhere - FOREIGN) if on_itself(node) else here - FOREIGN
            if node.attr not in known:
                wrong.append(f"line {node.lineno}: .{node.attr}")
    wrong += [f"the string {text!r}" for text in strings(tree) if spelled(text) and text not in here]
    return wrong


def spelled(text: str) -> bool:
    return private(text) and text.isidentifier() and text not in STRINGS


@pytest.fixture(scope="module")
def everywhere() -> set[str]:
    """Private names that Haast defines, in all its files."""
    return set().union(*(defined(ast.parse(path.read_text(encoding="utf-8"))) for path in FILES))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_only_compat_touches_private_names(path: Path, everywhere: set[str]) -> None:
    assert complaints(path.read_text(encoding="utf-8"), everywhere) == [], "put it into haast/compat.py"


def test_private_uses_would_be_seen(everywhere: set[str]) -> None:
    """The rule finds every private name that the compat touch."""
    found = " ".join(complaints((SOURCE / "compat.py").read_text(encoding="utf-8"), everywhere))
    for name in (
        "_attn_implementation", "_supports_sdpa", "_is_stateful", "_pad_token_tensor", "_prefix_allowed_tokens_fn",
        "_extract_generation_mode_kwargs", "_getframe", "_hf_hook", "_parameters",
        "_forward_hooks", "_dynamo", "torch._inductor.",
    ):  # fmt: skip
        assert name in found


@pytest.mark.parametrize(
    "line",
    [
        "def f(config): return config._attn_implementation",
        "def f(config): config._attn_implementation = 'eager'",
        "def f(config): return getattr(config, '_attn_implementation', None)",
        "def f(model): return vars(model)['_modules']",
        "def f(model): return model._modules",
        "from transformers.masking_utils import _vmap_for_bhqkv",
        "import torch._dynamo.config",
        "from torch._inductor import config",
        "import torch\ndef f(): return torch._C",
        "from transformers.cache_utils import Cache\nclass Own(Cache):\n    def f(self): return self._layers_of_theirs",
        "class Own:\n    def __init__(self, other): self._modules = other._modules",
        "class Own:\n    def f(self): return super()._something_of_theirs()",
        "from operator import attrgetter\nask = attrgetter('_is_stateful')",
    ],
)
def test_a_private_name_is_seen(line: str, everywhere: set[str]) -> None:
    assert complaints(line, everywhere) != []


@pytest.mark.parametrize(
    "line",
    [
        "class Own:\n    def copy(self):\n        made = Own()\n        made._a = self._a = 1\n        return made._a",
        "def f():\n    '''_documentation'''\n    _ = 1",
        "from haast.target.kv_cache import KVCache",
        "def f(own): return own.__dict__",
    ],
)
def test_what_is_own_is_left_alone(line: str, everywhere: set[str]) -> None:
    assert complaints(line, everywhere) == []
