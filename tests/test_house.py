"""The rules of the house, read from the syntax trees: who may import whom, and how long a thing may get.

Nothing of the package is imported. Every rule is a function from a file to complaints, and is shown to fire.
"""

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
Function = ast.FunctionDef | ast.AsyncFunctionDef

ORDER = (
    {"config"},
    {"batch"},
    {"models", "data"},
    {"parallel"},
    {"job"},
    {"plan", "checkpoint"},
    {"training", "infer"},
    {"evaluate"},
    {"recipes"},
    {"api"},
    {"launch"},
    {"cli"},
)
"""Each room imports only rooms before its own; rooms of one set are blind to each other."""
FLOOR = {room: number for number, rooms in enumerate(ORDER) for room in rooms}
FRONT = {"__init__", "__main__"}
"""The package's own two files: they open the door to api and cli."""
ENCODE_PATH = {"sample", "image", "template", "tokenizer", "encode", "pack"}
FROM_DATA = {"infer": ENCODE_PATH, "evaluate": ENCODE_PATH | {"source"}}
"""What these rooms may take from `data`."""
ENVIRONMENT_ROOMS = {"api", "launch", "cli"}
MESHLESS_ROOMS = {"models", "data"}
BAD_NAMES = re.compile(r"(utils?|common|helpers?|core|misc|base|base_.*)")
MODULE_STATE = re.compile(r"(mesh|rank|world|world_size|local_rank|dtype|device)", re.IGNORECASE)
ASSERTING = {"pytest.raises", "pytest.warns", "torch.testing.assert_close"}
"""Calls of libraries that fail a test."""
SKIPS = {f"pytest.{word}" for word in ("skip", "xfail", "mark.skip", "mark.xfail", "import" + "orskip")}
LENGTH_EXEMPT = {"presets.py"}
FILE_LINES, FUNCTION_LINES, ARGUMENTS = 650, 80, 8


@dataclass(frozen=True)
class File:
    """One Python file of the package: its path within the repository, and its text."""

    path: Path
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def room(self) -> str:
        """`models` of neva/models/vit.py, `job` of neva/job.py."""
        return self.path.parts[1].removesuffix(".py")

    @cached_property
    def imports(self) -> list[str]:
        """Dotted names that the file imports anywhere, relative ones made absolute."""
        names = []
        here = self.path.with_suffix("").parts
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                names += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = list(here[: len(here) - node.level]) if node.level else []
                module = ".".join([*base, *([node.module] if node.module else [])])
                names += [module, *(f"{module}.{alias.name}" for alias in node.names)]
        return names

    @cached_property
    def functions(self) -> list[Function]:
        return [node for node in ast.walk(self.tree) if isinstance(node, Function)]


def knows_its_room(file: File) -> Iterator[str]:
    if file.room not in FLOOR.keys() | FRONT:
        yield f"the room '{file.room}' is not in the plan; add it to ORDER and to docs/tour.md, or move the file"


def imports_in_order(file: File) -> Iterator[str]:
    for name in file.imports:
        parts = name.split(".")
        room = parts[1] if parts[0] == "neva" and len(parts) > 1 else file.room
        if file.room in FLOOR and room in FLOOR and room != file.room and FLOOR[room] >= FLOOR[file.room]:
            yield f"{file.room} imports {name}, which is not before it in the import order"


def takes_only_the_encode_path(file: File) -> Iterator[str]:
    modules = {path.stem for path in (ROOT / "neva" / "data").glob("*.py")}
    for name in file.imports:
        parts = name.split(".")
        takes = parts[2] if file.room in FROM_DATA and parts[:2] == ["neva", "data"] and len(parts) > 2 else ""
        if takes in (modules | ENCODE_PATH) - FROM_DATA.get(file.room, set()):
            yield f"{file.room} imports {name}; of data it may use {', '.join(sorted(FROM_DATA[file.room]))}"


def keeps_the_mesh_out(file: File) -> Iterator[str]:
    if file.room not in MESHLESS_ROOMS:
        return
    for name in file.imports:
        if name == "torch.distributed" or name.startswith("torch.distributed."):
            yield f"{file.room} imports {name}; what knows ranks lives in parallel"
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.distributed", "dist.group"):
            yield f"line {node.lineno}: torch.distributed used in {file.room}"


def reads_no_environment(file: File) -> Iterator[str]:
    if file.room in ENVIRONMENT_ROOMS:
        return
    for node in ast.walk(file.tree):
        read = isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv", "os.environb")
        if read or (isinstance(node, ast.ImportFrom) and node.module == "os" and any(a.name in ("environ", "getenv") for a in node.names)):
            yield f"line {node.lineno}: environment read outside {', '.join(sorted(ENVIRONMENT_ROOMS))}"


def keeps_no_global_state(file: File) -> Iterator[str]:
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Global) and any(MODULE_STATE.fullmatch(name.strip("_")) for name in node.names):
            yield f"line {node.lineno}: global {', '.join(node.names)}"
        calls = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if calls.startswith("torch.set_default_"):
            yield f"line {node.lineno}: {calls} changes the dtype or device of everything"
    for node in file.tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        for target in targets:
            if isinstance(target, ast.Name) and MODULE_STATE.fullmatch(target.id.strip("_")):
                yield f"line {node.lineno}: a global '{target.id}'"


def is_named_for_what_it_holds(file: File) -> Iterator[str]:
    for part in file.path.parts:
        if BAD_NAMES.fullmatch(part.removesuffix(".py")):
            yield f"'{part}' says nothing about what it holds"


def is_short(file: File) -> Iterator[str]:
    lines = len(file.text.splitlines())
    if lines > FILE_LINES and file.path.name not in LENGTH_EXEMPT:
        yield f"{lines} lines; at most {FILE_LINES}"
    for function in file.functions:
        length = (function.end_lineno or function.lineno) - function.lineno + 1
        if length > FUNCTION_LINES:
            yield f"line {function.lineno}: {function.name} has {length} lines; at most {FUNCTION_LINES}"


def takes_few_arguments(file: File) -> Iterator[str]:
    for function in file.functions:
        args = [a.arg for a in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
        count = len(args) - (args[:1] in (["self"], ["cls"]))
        if count > ARGUMENTS:
            yield f"line {function.lineno}: {function.name} takes {count} arguments; at most {ARGUMENTS}"


def is_finished(file: File) -> Iterator[str]:
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Raise) and "NotImplementedError" in ast.unparse(node):
            yield f"line {node.lineno}: NotImplementedError; build it or leave it out"
    for number, line in enumerate(file.text.splitlines(), 1):
        if re.search(r"\b(TODO|FIXME|XXX|HACK)\b", line):
            yield f"line {number}: left for later"


def swallows_no_error(file: File) -> Iterator[str]:
    for node in ast.walk(file.tree):
        if isinstance(node, ast.ExceptHandler):
            broad = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
            if broad and all(isinstance(inner, ast.Pass | ast.Continue) for inner in node.body):
                yield f"line {node.lineno}: an error is swallowed; catch the one that is meant"


def keeps_annotations_real(file: File) -> Iterator[str]:
    if "__future__.annotations" in file.imports and any(name.split(".")[0] == "jaxtyping" for name in file.imports):
        yield "`from __future__ import annotations` turns shapes into text that nobody checks"


def trusts_no_remote_code(file: File) -> Iterator[str]:
    """transformers runs Python files of a model's folder unless each of these calls forbids it."""
    for node in ast.walk(file.tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        forbidden = any(ast.unparse(keyword) == "trust_remote_code=False" for keyword in node.keywords)
        if node.func.attr in ("from_pretrained", "from_config", "pipeline") and not forbidden:
            yield f"line {node.lineno}: {node.func.attr} without trust_remote_code=False"


def config_is_frozen(file: File) -> Iterator[str]:
    for node in ast.walk(file.tree):
        if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
            decorators = " ".join(ast.unparse(d) for d in node.decorator_list)
            if "frozen=True" not in decorators or "kw_only=True" not in decorators:
                yield f"line {node.lineno}: {node.name} is not a dataclass(frozen=True, kw_only=True)"


def asserts_something(file: File) -> Iterator[str]:
    """A test must be able to fail: see `can_fail`. Words in comments, strings
    and names do not count."""
    known = known_asserters(file)
    for function in file.functions:
        if function.name.startswith("test_") and not can_fail(function, known):
            yield f"line {function.lineno}: {function.name} asserts nothing"


def can_fail(function: Function, known: set[str]) -> bool:
    """Does the function assert, or expect an error, or call or hand over one that does
    (`known`)?"""
    inner = {node.name for node in own_nodes(function) if isinstance(node, Function)}
    nested = [node for node in own_nodes(function) if isinstance(node, Function)]
    known = (known - inner) | {node.name for node in nested if can_fail(node, known)}
    for node in own_nodes(function):
        if isinstance(node, ast.Assert) and not is_always_true(node.test):
            return True
        if isinstance(node, ast.Call):
            handed = [node.func, *node.args, *(keyword.value for keyword in node.keywords)]
            names = {ast.unparse(part) for part in handed}
            if ast.unparse(node.func) in ASSERTING or names & known:
                return True
    return False


def own_nodes(function: Function) -> Iterator[ast.AST]:
    """The nodes of a function's body without those of the functions within, which may never run."""
    waiting: list[ast.AST] = list(function.body)
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, Function | ast.ClassDef):
            waiting.extend(ast.iter_child_nodes(node))


def is_always_true(test: ast.expr) -> bool:
    """`assert True`, `assert 1 < 2`, and `assert (value, "message")`, which is a tuple."""
    reads = (ast.Name, ast.Call)
    depends = any(isinstance(node, reads) for node in ast.walk(test))
    return not depends or (isinstance(test, ast.Tuple) and bool(test.elts))


@cache
def known_asserters(file: File) -> set[str]:
    """Names, as the file spells them, of the tests' functions that can fail a test."""
    known: set[str] = set()
    for node in ast.walk(file.tree):
        imported = isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tests.")
        if isinstance(node, ast.ImportFrom) and imported and (other := of_module(node.module or "")):
            theirs = known_asserters(other)
            known |= {alias.asname or alias.name for alias in node.names if alias.name in theirs}
    before = None
    while before != known:  # until functions that call each other are all found
        before = set(known)
        for node in file.tree.body:
            if isinstance(node, Function) and can_fail(node, known):
                known.add(node.name)
    return known


def of_module(name: str) -> File | None:
    """The file of `tests.runs`."""
    path = Path(*name.split(".")).with_suffix(".py")
    return File(path, (ROOT / path).read_text(encoding="utf-8")) if (ROOT / path).is_file() else None


def skips_nothing(file: File) -> Iterator[str]:
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in SKIPS:
            yield f"line {node.lineno}: {ast.unparse(node)}; mark what needs a device `gpu`, and let the rest run"
        conditional = isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark." + "skipif"
        if conditional and not any(keyword.arg == "reason" for keyword in node.keywords):
            yield f"line {node.lineno}: skipped under a condition without a reason"


RULES: tuple[Callable[[File], Iterator[str]], ...] = (
    knows_its_room,
    imports_in_order,
    takes_only_the_encode_path,
    keeps_the_mesh_out,
    reads_no_environment,
    keeps_no_global_state,
    is_named_for_what_it_holds,
    is_short,
    takes_few_arguments,
    is_finished,
    swallows_no_error,
    keeps_annotations_real,
    trusts_no_remote_code,
    config_is_frozen,
)
TEST_RULES: tuple[Callable[[File], Iterator[str]], ...] = (asserts_something, skips_nothing)


def files_of(folder: str, pattern: str) -> list[File]:
    return [File(path.relative_to(ROOT), path.read_text(encoding="utf-8")) for path in sorted((ROOT / folder).rglob(pattern))]


def complaints_of(rule: Callable[[File], Iterator[str]], files: list[File]) -> str:
    return "\n".join(f"{file.path}: {complaint}" for file in files for complaint in rule(file))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_is_in_order(rule: Callable[[File], Iterator[str]]) -> None:
    files = files_of("neva", "*.py")
    assert files and complaints_of(rule, files) == ""


@pytest.mark.parametrize("rule", TEST_RULES, ids=lambda rule: rule.__name__)
def test_the_tests_are_in_order(rule: Callable[[File], Iterator[str]]) -> None:
    files = files_of("tests", "test_*.py")
    assert files and complaints_of(rule, files) == ""


LATER = "TO" + "DO"
BAD = (
    ("knows_its_room", "neva/serving/x.py", ""),
    ("imports_in_order", "neva/config.py", "from neva.batch import Batch"),
    ("imports_in_order", "neva/data/loader.py", "from neva import models"),
    ("imports_in_order", "neva/data/loader.py", "def f():\n    import neva.models.vit"),
    ("imports_in_order", "neva/data/loader.py", "from ..models import vit"),
    ("imports_in_order", "neva/models/vit.py", "from neva.job import TrainConfig"),
    ("imports_in_order", "neva/training/loop.py", "from neva.infer.generate import generate"),
    ("imports_in_order", "neva/training/loop.py", "from neva.evaluate import score"),
    ("imports_in_order", "neva/api.py", "from neva import cli"),
    ("takes_only_the_encode_path", "neva/infer/engine.py", "from neva.data.source import open_source"),
    ("takes_only_the_encode_path", "neva/evaluate/run.py", "from neva.data import loader, source"),
    ("keeps_the_mesh_out", "neva/models/vit.py", "import torch.distributed as dist"),
    ("keeps_the_mesh_out", "neva/models/vit.py", "from torch import distributed"),
    ("keeps_the_mesh_out", "neva/data/loader.py", "from torch.distributed.tensor import DTensor"),
    ("keeps_the_mesh_out", "neva/data/loader.py", "import torch\ntorch.distributed.get_rank()"),
    ("reads_no_environment", "neva/training/loop.py", "import os\nos.environ['RANK']"),
    ("reads_no_environment", "neva/parallel/mesh.py", "import os\nos.getenv('RANK')"),
    ("reads_no_environment", "neva/parallel/mesh.py", "from os import environ"),
    ("keeps_no_global_state", "neva/parallel/mesh.py", "_MESH = None"),
    ("keeps_no_global_state", "neva/parallel/mesh.py", "rank: int = 0"),
    ("keeps_no_global_state", "neva/parallel/mesh.py", "def f():\n    global _rank\n    _rank = 1"),
    ("keeps_no_global_state", "neva/models/vit.py", "import torch\ntorch.set_default_dtype(torch.bfloat16)"),
    ("is_named_for_what_it_holds", "neva/models/utils.py", ""),
    ("is_named_for_what_it_holds", "neva/core/x.py", ""),
    ("is_named_for_what_it_holds", "neva/data/base_source.py", ""),
    ("is_short", "neva/models/vit.py", "x = 1\n" * 651),
    ("is_short", "neva/models/vit.py", "def f():\n" + "    x = 1\n" * 80),
    ("takes_few_arguments", "neva/models/vit.py", "def f(a, b, c, d, *, e, f, g, h, i): ..."),
    ("takes_few_arguments", "neva/models/vit.py", "class A:\n    def f(self, a, b, c, d, e, f, g, h, i): ..."),
    ("is_finished", "neva/models/vit.py", "def f():\n    raise NotImplementedError"),
    ("is_finished", "neva/models/vit.py", f"x = 1  # {LATER}: later"),
    ("swallows_no_error", "neva/models/vit.py", "try:\n    f()\nexcept Exception:\n    pass"),
    ("swallows_no_error", "neva/models/vit.py", "for x in y:\n    try:\n        f()\n    except:\n        continue"),
    ("keeps_annotations_real", "neva/models/vit.py", "from __future__ import annotations\nfrom jaxtyping import Float"),
    ("trusts_no_remote_code", "neva/models/vit.py", "AutoModel.from_pretrained(folder)"),
    ("trusts_no_remote_code", "neva/models/vit.py", "getattr(t, k).from_config(c, trust_remote_code=None)"),
    ("config_is_frozen", "neva/job.py", "@dataclass(frozen=True)\nclass AConfig: ..."),
    ("asserts_something", "tests/unit/test_x.py", "def test_x():\n    f()"),
    ("asserts_something", "tests/unit/test_x.py", "def test_x():\n    'assert'  # assert raises"),
    ("asserts_something", "tests/unit/test_x.py", "def test_x():\n    check_all(expect_raises)"),
    ("asserts_something", "tests/unit/test_x.py", "def test_x():\n    assert True"),
    ("asserts_something", "tests/unit/test_x.py", "def test_x():\n    assert 1 < 2, f()"),
    ("asserts_something", "tests/unit/test_x.py", "def test_x():\n    assert (x == 1, 'x')"),
    ("asserts_something", "tests/unit/test_x.py", "def g():\n    f()\ndef test_x():\n    g()"),
    ("asserts_something", "tests/unit/test_x.py", "def test_x():\n    def g():\n        assert f()"),
    ("asserts_something", "tests/unit/test_x.py", "from tests.runs import start\ndef test_x():\n    start()"),
    ("skips_nothing", "tests/unit/test_x.py", "import pytest\n@pytest" + ".mark.skip(reason='x')\ndef test_x():\n    assert f()"),
    ("skips_nothing", "tests/unit/test_x.py", "import pytest\n@pytest" + ".mark.skipif(True)\ndef test_x():\n    assert f()"),
)
GOOD = (
    ("imports_in_order", "neva/cli.py", "from neva import launch, api"),
    ("imports_in_order", "neva/training/loop.py", "from neva.checkpoint import store\nfrom neva.training import loss\nfrom . import metrics"),
    ("takes_only_the_encode_path", "neva/infer/engine.py", "from neva.data.encode import encode\nfrom neva.data import pack"),
    ("keeps_the_mesh_out", "neva/parallel/mesh.py", "import torch.distributed as dist"),
    ("reads_no_environment", "neva/launch.py", "import os\nos.environ['RANK']"),
    ("keeps_no_global_state", "neva/models/vit.py", "def f(rank, dtype):\n    mesh = rank\n    return mesh"),
    ("is_short", "neva/models/presets.py", "x = 1\n" * 651),
    ("takes_few_arguments", "neva/models/vit.py", "class A:\n    def f(self, a, b, c, d, e, f, g, h): ..."),
    ("swallows_no_error", "neva/models/vit.py", "try:\n    f()\nexcept KeyError:\n    pass"),
    ("trusts_no_remote_code", "neva/models/vit.py", "A.from_config(c, trust_remote_code=False)"),
    ("config_is_frozen", "neva/job.py", "@dataclass(frozen=True, kw_only=True)\nclass AConfig: ..."),
    ("asserts_something", "tests/unit/test_x.py", "def test_x():\n    assert f() == 1"),
    ("asserts_something", "tests/unit/test_x.py", "def test_x():\n    with pytest.raises(E):\n        f()"),
    ("asserts_something", "tests/unit/test_x.py", "def test_x():\n    def g():\n        assert f()\n    g()"),
    ("asserts_something", "tests/unit/test_x.py", "def g():\n    assert f()\ndef test_x():\n    spawn(g)"),
    ("asserts_something", "tests/unit/test_x.py", "from tests.runs import run\ndef test_x():\n    run('x')"),
)


def complaints(rule: str, path: str, text: str) -> list[str]:
    return list({r.__name__: r for r in RULES + TEST_RULES}[rule](File(Path(path), text)))


@pytest.mark.parametrize(("rule", "path", "text"), BAD)
def test_a_rule_fires_on_what_it_forbids(rule: str, path: str, text: str) -> None:
    assert complaints(rule, path, text)


@pytest.mark.parametrize(("rule", "path", "text"), GOOD)
def test_a_rule_leaves_alone_what_is_meant(rule: str, path: str, text: str) -> None:
    assert not complaints(rule, path, text)


def test_every_rule_is_shown_to_fire() -> None:
    assert {rule.__name__ for rule in RULES + TEST_RULES} == {rule for rule, _, _ in BAD}


CASES = {
    "date-template",
    "eval-crash",
    "eval-long",
    "eval-plain",
    "generate-one-bad",
    "questions-only",
    "small-set-epoch",
    "system-dropped",
    "template-always-header",
    "template-drops-user",
    "template-no-generation-prompt",
    "template-stop-outside",
}
"""Inputs under tests/data/cases on which neva once gave a wrong result."""


def test_every_case_is_an_input_of_a_test() -> None:
    """Named in a test's code, as a path or a part of one."""
    named: set[str] = set()
    for file in files_of("tests", "test_*.py"):
        for node in ast.walk(file.tree):
            text = node.value if isinstance(node, ast.Constant) else None
            if isinstance(text, str) and file.path.name != "test_house.py":
                named |= {*text.split("/")}
    folders = {path.name for path in (ROOT / "tests" / "data" / "cases").iterdir()}
    assert folders >= CASES and named >= folders


def test_the_doors_that_the_readme_names_exist() -> None:
    readme, ci = (ROOT / "README.md").read_text(encoding="utf-8"), (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "make demo" in readme and "make test" in readme and "make test" in ci
