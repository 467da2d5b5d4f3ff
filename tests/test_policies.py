"""The rules of the house, enforced on the source, and for each a proof that it can fail."""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import trap2

ROOT = Path(trap2.__file__).parent
Tree = dict[str, str]
"""Sources by dotted module name; a package stands under its own name."""

CORE = (
    *(
        "errors",
        "registry",
        "files",
        "finite",
        "checkpoint",
        "naming",
        "adapters",
        "update",
        "scales",
        "statistics",
    ),
    *("schema", "suites", "taskspec", "recipes", "provenance", "progress", "signing"),
)
MAY_IMPORT = {
    "core": ("core",),
    "tasks": ("tasks", "core"),
    "attacks": ("attacks", "core"),
    "protecting": ("protecting", "tasks", "core"),
    "auditing": ("auditing", "attacks", "tasks", "core"),
    "reporting": ("reporting", "core"),
    "demo": ("demo", "auditing", "protecting", "reporting", "attacks", "tasks", "core"),
    "cli": ("cli", "demo", "auditing", "protecting", "reporting", "attacks", "tasks", "core", ""),
}
"""Layers a layer may import from; "" is the package itself, which holds the version."""

REPORTING_MAY_IMPORT = ("trap2.schema", "trap2.errors", "trap2.files")
"""Of core, what needs no torch."""

HOMES: dict[str, tuple[str, ...]] = {
    "peft": ("trap2.protecting", "trap2.adapters", "trap2.attacks.peft_combinations"),
    "transformers": ("trap2.protecting", "trap2.tasks.model", "trap2.adapters"),
    "datasets": ("trap2.tasks.data",),
    "huggingface_hub": ("trap2.tasks.model",),
    "matplotlib": ("trap2.reporting.plots",),
    "jinja2": ("trap2.reporting.html",),
    "sklearn": ("trap2.tasks.relabel", "trap2.tasks.probe"),
    "scipy": ("trap2.tasks.relabel", "trap2.auditing.combine", "trap2.attacks.matching"),
    "cma": ("trap2.auditing.evolution",),
    "model_signing": ("trap2.signing",),
    "lm_eval": ("trap2.tasks.harness",),
    "mergekit": ("trap2.attacks.mergekit_worker",),
    "trl": (),
    "pickle": (),
    "cloudpickle": (),
    "dill": (),
    "joblib": ("trap2.auditing.workers",),
    "ray": ("trap2.auditing.workers",),
}
"""The only modules or packages that import a library."""

LONGEST_FUNCTION, LONGEST_FILE = 60, 400
MAY_PRINT = (
    "trap2.cli.making",
    "trap2.cli.judging",
    "trap2.cli.publishing",
    "trap2.cli",
    "trap2.demo.run",
)
PUBLIC = ["Protector", "Trap2Config", "Update", "attack", "audit", "protect_trainer"]


def source_tree() -> Tree:
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = ("trap2", *path.relative_to(ROOT).with_suffix("").parts)
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = path.read_text(encoding="utf-8")
    return found


def imports(source: str, known: Tree) -> Iterator[str]:
    """Full names of what is imported anywhere in a module, functions included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in known else node.module


def layer(name: str) -> str:
    part = name.split(".")[1] if "." in name else ""
    return "core" if part in CORE else "cli" if part == "__main__" else part


def layers(tree: Tree) -> Iterator[str]:
    for name, source in tree.items():
        own = layer(name)
        if own == "":
            continue  # the package loads its names lazily, which has a test of its own
        if own not in MAY_IMPORT:
            yield f"{name} is in no layer"
            continue
        for target in imports(source, tree):
            if target.split(".")[0] != "trap2":
                continue
            if layer(target) not in MAY_IMPORT[own]:
                yield f"{name} imports {target}"
            of_core = own == "reporting" and layer(target) == "core"
            if of_core and target not in REPORTING_MAY_IMPORT:
                yield f"{name} imports {target}"


def cycles(tree: Tree) -> Iterator[str]:
    graph = {
        n: {t for t in imports(s, tree) if t in tree and t != "trap2"} for n, s in tree.items()
    }
    del graph["trap2"]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        yield " -> ".join(error.args[1])


def homes(tree: Tree) -> Iterator[str]:
    for name, source in tree.items():
        for target in imports(source, tree):
            allowed = HOMES.get(target.split(".")[0])
            if allowed is None or any(f"{name}.".startswith(f"{home}.") for home in allowed):
                continue
            yield f"{name} imports {target}"


def pickles(tree: Tree) -> Iterator[str]:
    for name, source in tree.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in (
                "torch.load",
                "torch.save",
            ):
                yield f"{name}:{node.lineno} uses {ast.unparse(node)}"
            if isinstance(node, ast.ImportFrom) and node.module == "torch":
                yield from (
                    f"{name} uses {a.name}" for a in node.names if a.name in ("load", "save")
                )


def relative_imports(tree: Tree) -> Iterator[str]:
    for name, source in tree.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.level:
                yield f"{name}:{node.lineno} imports relatively"


def docstrings(tree: Tree) -> Iterator[str]:
    yield from (name for name, source in tree.items() if not ast.get_docstring(ast.parse(source)))


def long_functions(tree: Tree) -> Iterator[str]:
    """Functions whose lines, their docstring not counted, are too many."""
    for name, source in tree.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                doc = node.body[0] if ast.get_docstring(node) is not None else None
                lines = node.end_lineno - node.lineno + 1
                lines -= doc.end_lineno - doc.lineno + 1 if doc else 0
                if lines > LONGEST_FUNCTION:
                    yield f"{name}.{node.name} has {lines} lines"


def long_files(tree: Tree) -> Iterator[str]:
    for name, source in tree.items():
        if len(source.splitlines()) > LONGEST_FILE:
            yield f"{name} has {len(source.splitlines())} lines"


def prints(tree: Tree) -> Iterator[str]:
    for name, source in tree.items():
        for node in ast.walk(ast.parse(source)):
            called = node.func if isinstance(node, ast.Call) else None
            if isinstance(called, ast.Name) and called.id == "print" and name not in MAY_PRINT:
                yield f"{name}:{node.lineno} prints"


def broad_excepts(tree: Tree) -> Iterator[str]:
    """Handlers of anything at all; one that cleans up and ends in a bare `raise` hides nothing."""
    for name, source in tree.items():
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.ExceptHandler):
                continue
            types = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            broad = any(
                t is None or ast.unparse(t) in ("Exception", "BaseException") for t in types
            )
            last = node.body[-1]
            if broad and not (isinstance(last, ast.Raise) and last.exc is None):
                yield f"{name}:{node.lineno} catches everything"


TRY = '"""x"""\ntry:\n    pass\nexcept {}:\n    {}\n'
CASES: list[tuple[Callable[[Tree], Iterator[str]], Tree]] = [
    (layers, {"trap2.errors": "from trap2.tasks import data"}),
    (layers, {"trap2.tasks.data": "import trap2.protecting.step"}),
    (layers, {"trap2.attacks.ties": "from trap2.protecting.step import trap_step"}),
    (layers, {"trap2.attacks.ties": "from trap2.tasks.data import load_rows"}),
    (layers, {"trap2.protecting.step": "from trap2.attacks import ties"}),
    (layers, {"trap2.protecting.step": "def f():\n    import trap2.auditing.audit"}),
    (layers, {"trap2.auditing.audit": "from trap2.protecting.config import Trap2Config"}),
    (layers, {"trap2.reporting.html": "from trap2.update import Update"}),
    (layers, {"trap2.reporting.html": "from trap2.auditing.audit import audit"}),
    (layers, {"trap2.errors": "from trap2.cli import main"}),
    (layers, {"trap2.tasks.data": "import trap2"}),
    (layers, {"trap2.brand_new": ""}),
    (cycles, {"trap2.files": "import trap2.errors", "trap2.errors": "import trap2.files"}),
    (homes, {"trap2.update": "import peft"}),
    (homes, {"trap2.reporting.html": "from matplotlib.figure import Figure"}),
    (homes, {"trap2.reporting.plots": "import jinja2"}),
    (homes, {"trap2.attacks.ties": "def f():\n    from mergekit.merge import run"}),
    (homes, {"trap2.tasks.evaluate": "import sklearn.metrics"}),
    (homes, {"trap2.attacks.slerp": "from scipy import optimize"}),
    (homes, {"trap2.checkpoint": "import pickle"}),
    (homes, {"trap2.files": "from model_signing import signing"}),
    (homes, {"trap2.protecting_more": "import peft"}),
    (pickles, {"trap2.checkpoint": "import torch\nx = torch.load('x')"}),
    (pickles, {"trap2.checkpoint": "from torch import load"}),
    (relative_imports, {"trap2.checkpoint": "from .errors import UserError"}),
    (docstrings, {"trap2.errors": "x = 1"}),
    (long_functions, {"trap2.errors": "def f():\n" + "    x = 1\n" * 60}),
    (long_files, {"trap2.errors": "x = 1\n" * 401}),
    (prints, {"trap2.errors": "def f():\n    print('x')"}),
    (broad_excepts, {"trap2.errors": TRY.format("Exception", "pass")}),
    (broad_excepts, {"trap2.errors": TRY.format("(OSError, BaseException)", "pass")}),
    (broad_excepts, {"trap2.errors": "try:\n    pass\nexcept:\n    raise ValueError"}),
]
POLICIES = list(dict.fromkeys(policy for policy, _ in CASES))


@pytest.fixture(scope="module")
def tree() -> Tree:
    return source_tree()


@pytest.mark.parametrize("policy", POLICIES)
def test_the_source_keeps_the_policy(tree, policy):
    assert list(policy(tree)) == []


@pytest.mark.parametrize(("policy", "bad"), CASES)
def test_the_policy_can_fail(tree, policy, bad):
    assert list(policy({**tree, **bad}))


GOOD = [
    (layers, {"trap2.auditing.more": "from trap2.attacks import ties\nimport trap2.tasks.data"}),
    (layers, {"trap2.reporting.more": "from trap2.schema import Report"}),
    (homes, {"trap2.protecting.more": "from peft import LoraConfig"}),
    (homes, {"trap2.tasks.probe": "import sklearn.linear_model"}),
    (long_functions, {"trap2.errors": 'def f():\n    """x\n' + "    x\n" * 80 + '    """\n'}),
    (prints, {"trap2.cli": "print('x')"}),
    (broad_excepts, {"trap2.errors": TRY.format("BaseException", "raise")}),
    (broad_excepts, {"trap2.errors": TRY.format("ValueError", "pass")}),
]


@pytest.mark.parametrize(("policy", "good"), GOOD)
def test_the_policy_refuses_no_more_than_it_says(tree, policy, good):
    assert list(policy({**tree, **good})) == []


def loaded_by(code: str) -> set[str]:
    """Top-level modules in a fresh interpreter that ran this."""
    probe = f"{code}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    return set(done.stdout.split("\n")[-2].split())


HEAVY = {"torch", "transformers", "peft", "datasets", "sklearn", "scipy", "pandas"}


def test_importing_the_package_loads_nothing_heavy():
    loaded = loaded_by("import trap2\nassert 'Protector' in dir(trap2)")
    assert "trap2" in loaded
    assert not loaded & (HEAVY | {"numpy", "pydantic", "matplotlib"})


def test_a_report_is_drawn_without_torch():
    loaded = loaded_by("from trap2.reporting import html, plots, text")
    assert {"matplotlib", "jinja2"} <= loaded
    assert not loaded & {"torch", "transformers", "peft", "datasets", "sklearn"}


def test_what_is_loaded_is_seen():
    assert "torch" in loaded_by("import trap2\ntrap2.Update")


def test_the_public_names_are_fixed_and_each_is_there():
    assert trap2.__all__ == PUBLIC
    assert sorted(trap2._HOMES) == PUBLIC
    for name in PUBLIC:
        assert callable(getattr(trap2, name))
        assert getattr(trap2, name).__module__ == trap2._HOMES[name]
    with pytest.raises(AttributeError, match="has no attribute 'audits'; it has Protector, "):
        trap2.audits  # noqa: B018
