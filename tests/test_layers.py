"""The architecture of the code, read from its syntax trees: layers, signatures and light start."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import program_help
import pytest
from program_help import helps, run_help

ROOT = Path(__file__).resolve().parents[1]
# Each stage may import those before it, which excludes cycles. Packages of one stage do not import
# each other, except in BASE, the first one, where a module may import those to its left.
BASE = "errors cli io seeding progress precision signals distributed checkpoints".split()
STAGES = [
    ["audio", "scoring"],
    ["models", "reports"],
    ["data"],
    ["training", "decoding"],
    ["evaluation", "longform"],
    ["streaming"],
    ["serving"],
    ["vllm"],
    ["api"],
    ["__init__"],  # the Python API
]
RANKS = {name: (0, i) for i, name in enumerate(BASE)}
RANKS |= {name: (1 + i, 0) for i, names in enumerate(STAGES) for name in names}
SCRIPTS = {f.stem for folder in ("src", "local") for f in (ROOT / folder).glob("[!_]*.py")}
TAKE_NAMESPACE = ("config.py", "cli.py")
MAX_PARAMETERS = 8


class Source:
    """A Python file of the project, parsed."""

    def __init__(self, path: Path, root: Path = ROOT, text: str | None = None):
        self.path = path.relative_to(root)
        self.tree = ast.parse(path.read_text() if text is None else text)

    @property
    def top(self) -> str:
        """First part below speechllm: src/speechllm/models/llm.py -> models."""
        return self.path.with_suffix("").parts[2]

    def at(self, node: ast.AST, message: str) -> str:
        return f"{self.path}:{node.lineno}: {message}"

    def imports(self) -> Iterator[tuple[ast.stmt, str]]:
        """Yield each import statement with the dotted name of each module it may import."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from ((node, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    package = self.path.parent.parts[1:]
                    package = package[: len(package) - node.level + 1]
                    base = ".".join([*package, *filter(None, [base])])
                yield from ((node, f"{base}.{alias.name}") for alias in node.names)


# ---- the checks: each returns sentences with file and line


def layer_violations(source: Source) -> list[str]:
    """Imports within speechllm that go against the order of the layers."""
    if source.top not in RANKS:
        return [f"{source.path}:1: {source.top} is in no layer of tests/test_layers.py"]
    found = {}
    for node, name in source.imports():
        top, imported, *_ = [*name.split("."), "", ""]
        if top in SCRIPTS:
            found[source.at(node, f"the library imports the script {top}")] = None
        if top == "vllm" != source.top:
            found[source.at(node, f"{source.top} must not import vllm")] = None
        if top != "speechllm" or imported == source.top or imported not in RANKS:
            continue
        own, other = RANKS[source.top], RANKS[imported]
        if other[0] > own[0] or (other[0] == own[0] and (own[0] > 0 or other[1] > own[1])):
            found[source.at(node, f"{source.top} must not import {imported}")] = None
    return list(found)


def script_violations(source: Source) -> list[str]:
    """Scripts imported by a script, except the base of a *_mose.py."""
    others = SCRIPTS - {source.path.stem.removesuffix("_mose")}
    found = [
        source.at(node, f"a script imports the script {name.partition('.')[0]}")
        for node, name in source.imports()
        if name.partition(".")[0] in others
    ]
    return list(dict.fromkeys(found))


def namespace_violations(source: Source) -> list[str]:
    """Functions with a parameter that is an argparse namespace."""
    if source.path.name in TAKE_NAMESPACE:
        return []
    return [
        source.at(function, f"{function.name} takes the namespace {parameter.arg}")
        for _, function in _functions(source.tree)
        if not function.name.startswith("__torch_")  # args are those of a torch operation
        for parameter in _parameters(function)
        if parameter.arg == "args"
        or (parameter.annotation and "Namespace" in ast.unparse(parameter.annotation))
    ]


def parameter_violations(source: Source) -> list[str]:
    """Functions with too many parameters, except neural network layers."""
    found = []
    for owner, function in _functions(source.tree):
        parameters = [p.arg for p in _parameters(function) if p.arg not in ("self", "cls")]
        if owner and function.name in ("__init__", "forward"):
            if any("Module" in ast.unparse(base) for base in owner.bases):
                continue
        if len(parameters) > MAX_PARAMETERS:
            message = f"{function.name} has {len(parameters)} parameters"
            found.append(source.at(function, message))
    return found


def _functions(
    tree: ast.AST, owner: ast.ClassDef | None = None
) -> Iterator[tuple[ast.ClassDef | None, ast.FunctionDef]]:
    """Yield each function with the class it is a method of."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield owner, node
            yield from _functions(node)
        else:
            yield from _functions(node, node if isinstance(node, ast.ClassDef) else owner)


def _parameters(function: ast.FunctionDef) -> list[ast.arg]:
    arguments = function.args
    return [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]


# ---- the project

LIBRARY = [Source(path) for path in sorted((ROOT / "src/speechllm").rglob("*.py"))]
PROGRAMS = [
    Source(p) for folder in ("src", "local") for p in sorted((ROOT / folder).glob("[!_]*.py"))
]


def fail_if(violations: list[str]) -> None:
    if violations:
        pytest.fail("\n".join(violations), pytrace=False)


@pytest.mark.parametrize("check", [layer_violations, namespace_violations, parameter_violations])
def test_the_library_keeps_its_rules(check):
    fail_if([violation for source in LIBRARY for violation in check(source)])


def test_scripts_import_no_scripts():
    fail_if([violation for source in PROGRAMS for violation in script_violations(source)])


def test_help_imports_no_heavy_library():
    assert {program: shown["heavy"] for program, shown in helps().items() if shown["heavy"]} == {}


# ---- the checks find what they are for


NINE = "a, b, c, d, *, e, f, g, h, i"


@pytest.mark.parametrize(
    "check, path, text, expected",
    [
        (layer_violations, "models/x.py", "def f():\n from ..data import x\nfrom . import llm",
         [":2: models must not import data"]),
        (layer_violations, "io.py", "import speechllm.signals", [":1: io must not import signals"]),
        (layer_violations, "signals.py", "from speechllm import io", []),
        (layer_violations, "wrong/x.py", "", [":1: wrong is in no layer of tests/test_layers.py"]),
        (layer_violations, "audio/x.py", "import train, vllm",
         [":1: the library imports the script train", ":1: audio must not import vllm"]),
        (script_violations, "../decode.py", "def main():\n from train import f",
         [":2: a script imports the script train"]),
        (script_violations, "../train_mose.py", "import train", []),
        (namespace_violations, "io.py", "def f(args, x: argparse.Namespace, *rest): ...",
         [":1: f takes the namespace args", ":1: f takes the namespace x"]),
        (namespace_violations, "data/config.py", "def f(args): ...", []),
        (parameter_violations, "io.py",
         f"class L(nn.Module):\n def __init__(self, {NINE}): ...\n def g(self, {NINE}): ...",
         [":3: g has 9 parameters"]),
    ],
)  # fmt: skip
def test_violations_are_found(check, path, text, expected):
    found = check(Source(ROOT / "src/speechllm" / path, text=text))
    assert [sentence[sentence.index(":") :] for sentence in found] == expected


def test_heavy_imports_of_programs_are_found(tmp_path, monkeypatch):
    (tmp_path / "heavy_library.py").touch()
    (tmp_path / "light.py").write_text("def main():\n    import heavy_library")
    (tmp_path / "heavy.py").write_text("import heavy_library\nprint('--flag')")
    monkeypatch.setattr(program_help, "HEAVY", {"heavy_library"})
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.syspath_prepend(tmp_path)
    assert run_help(tmp_path / "light.py") == {"help": "", "heavy": []}
    assert run_help(tmp_path / "heavy.py") == {"help": "--flag\n", "heavy": ["heavy_library"]}
