"""Imports point one way (docs/architecture.md); Haast and its commands import neither torch nor transformers."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import haast

SOURCE = Path(haast.__file__).parent

# A part is a module or a package directly under haast; it may import parts of smaller rank, and itself.
RANKS = [
    {
        "compat",
        "device",
        "errors",
        "interrupt",
        "jsonl_log",
        "native",
        "progress",
        "prompts",
        "stats",
        "text",
        "tree",
    },
    {"core", "files", "path_tree"},
    {"generation", "sampling"},
    {"target"},
    {"heads", "tuning"},
    {"formats"},
    {"drafters"},
    {"engine"},
    {"integrations"},
    {"api"},
    {"session"},
    {"training", "checking"},
    {"bench"},
    {"serving"},
    {"cli"},
    {"__main__"},
]
RANK = {part: number for number, parts in enumerate(RANKS) for part in parts}

# Parts and modules that may know less than their rank would allow: all that they import of Haast outside their part.
ONLY = {
    "core": {"haast.stats"}, "stats": set(), "tree": set(), "errors": set(), "compat": set(), "text": set(),
    "prompts": set(), "progress": set(), "device": set(), "native": set(),
    "jsonl_log": set(),
    "sampling": {"haast.core", "haast.device", "haast.errors"},
    "target": {"haast.compat", "haast.device", "haast.errors", "haast.native", "haast.tree"},
    # The engine knows drafters and targets by their contract only.
    "engine": {
        "haast.core", "haast.device", "haast.drafters.base", "haast.errors", "haast.interrupt", "haast.native",
        "haast.path_tree", "haast.sampling",
        "haast.stats",
        "haast.target.kv_pool", "haast.target.ranks", "haast.target.target", "haast.tree",
    },
    "engine.verify": {"haast.core", "haast.native", "haast.sampling", "haast.tree"},
    "engine.rules": {"haast.core", "haast.device", "haast.sampling", "haast.tree"},
}  # fmt: skip


def modules() -> list[str]:
    """Dotted names of all modules under haast, the root itself left out: it only names what the parts hold."""
    names = []
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if parts:
            names.append(".".join(("haast", *parts)))
    return names


MODULES = modules()


def read(module: str) -> str:
    path = SOURCE.joinpath(*module.split(".")[1:])
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return file.read_text(encoding="utf-8")


def imports(source: str, known: list[str]) -> Iterator[str]:
    """The Haast modules that a source imports, wherever it does: in functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("haast."))
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            if node.module and node.module.split(".")[0] == "haast":
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    if whole in known or node.module != "haast":
                        yield whole if whole in known else node.module


def complaints(module: str, source: str, known: list[str]) -> list[str]:
    """What is wrong with one module's imports."""
    part = module.split(".")[1]
    wrong = []
    for imported in imports(source, known):
        other = imported.split(".")[1]
        if other == part:
            continue
        if RANK[other] >= RANK[part]:
            wrong.append(f"{module} imports {imported}, which stands above it or at its level")
        for place in (part, module.removeprefix("haast.")):
            if place in ONLY and not any(imported == each or imported.startswith(f"{each}.") for each in ONLY[place]):
                wrong.append(f"{module} imports {imported}; {place} may import only {sorted(ONLY[place])}")
    return wrong


def test_every_part_has_a_rank() -> None:
    assert {module.split(".")[1] for module in MODULES} <= set(RANK), "give the new part a rank in this test"


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module: str) -> None:
    assert complaints(module, read(module), MODULES) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("haast.drafters.eagle", "from haast.engine.engine import Engine"),
        ("haast.drafters.eagle", "from haast import engine"),
        ("haast.drafters.eagle", "def f():\n    import haast.engine.engine"),
        ("haast.engine.engine", "from haast.drafters.eagle import EagleDrafter"),
        ("haast.engine.engine", "from haast.drafters import vanilla"),
        ("haast.engine.scheduler", "from haast.drafters.eagle import EagleDrafter"),
        ("haast.engine.scheduler", "from haast.target.hf import ModuleForward"),
        ("haast.tuning.latency", "from haast.drafters.eagle import EagleDrafter"),
        ("haast.engine.verify", "from haast.target.target import Target"),
        ("haast.engine.verify", "from haast.target.kv_cache import KVCache"),
        ("haast.tree", "from haast.sampling import Sampler"),
        ("haast.heads.checkpoint", "from haast.training import config"),
        ("haast.engine.engine", "if True:\n    from haast.api import Haast"),
        ("haast.target.target", "from haast.heads.checkpoint import Head"),
    ],
)
def test_a_wrong_import_is_seen(module: str, line: str) -> None:
    assert module in MODULES
    assert complaints(module, f"{read(module)}\n{line}\n", MODULES) != []


def asks_for_packed(source: str) -> list[int]:
    """Lines that ask by `isinstance` whether something is a PackedLinear, by itself or among other classes."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance"
        if any(getattr(part, "id", getattr(part, "attr", "")) == "PackedLinear" for part in ast.walk(node.args[1]))
    ]


@pytest.mark.parametrize("module", [each for each in MODULES if not each.startswith("haast.target.")])
def test_only_targets_know_how_linears_are_packed(module: str) -> None:
    assert asks_for_packed(read(module)) == [], "ask haast.target.packing: is_packed, is_linear, linear_sizes"


@pytest.mark.parametrize(
    "line",
    ["isinstance(x, PackedLinear)", "isinstance(x, nn.Linear | PackedLinear)", "isinstance(x, packing.PackedLinear)"],
)
def test_asking_for_packed_linears_is_seen(line: str) -> None:
    source = read("haast.drafters.medusa")
    assert asks_for_packed(f"{source}\nif True:\n    assert not {line}\n") == [len(source.splitlines()) + 3]


def packages(source: str) -> set[str]:
    """The packages that a source imports, Haast among them."""
    nodes = list(ast.walk(ast.parse(source)))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("folder", ["benchmarks", "tests", "examples"])
def test_no_script_has_the_name_of_a_package(folder: str) -> None:
    scripts = {path.stem for path in (Path(__file__).parents[2] / folder).rglob("*.py")}
    assert scripts & set().union(*(packages(read(module)) for module in MODULES)) == set(), "Haast would import it"


def test_a_package_is_seen() -> None:
    assert packages("import a.b\nfrom c.d import e\n") == {"a", "c"}


@pytest.mark.parametrize("module", ["haast", "haast.cli"])
def test_importing_is_light(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[]", "")


def test_the_front_door_names_what_it_has() -> None:
    for name in haast.__all__:
        assert getattr(haast, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Haste'"):
        haast.Haste  # noqa: B018
