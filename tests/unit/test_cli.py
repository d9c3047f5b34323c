"""The command line: what reaches `neva.api`, what is printed, and which exit code comes back."""

import importlib
import inspect
import json
import os
import signal
import subprocess
import sys
import textwrap
import types
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from PIL import Image

import neva
from neva import cli, config, recipes
from neva.cli import main
from neva.infer.generate import Sampling

ROOT = Path(neva.__file__).parents[1]
REAL = importlib.import_module("neva.api")


class Stopped(Exception):
    def __init__(self, message: str, exit_code: int) -> None:
        self.message, self.exit_code = message, exit_code


class FakeApi(types.ModuleType):
    """Notes every call and answers what the test wants; refuses a call that
    `neva.api` would not take."""

    def __init__(self) -> None:
        super().__init__("neva.api")
        self.calls: list[tuple[str, tuple, dict]] = []
        self.answer: Any = None

    def __getattr__(self, name: str) -> Any:
        if name not in REAL.__all__:
            raise AttributeError(f"neva.api has no public function {name!r}")
        signature = inspect.signature(getattr(REAL, name))

        def call(*args: Any, **options: Any) -> Any:
            taken = signature.bind(*args, **options).arguments
            # `generate` takes the fields of Sampling, and options of `load`
            more = taken.get("options", {}) if name == "generate" else {}
            Sampling(**{key: value for key, value in more.items() if key not in REAL.LOADING})
            self.calls.append((name, args, options))
            if isinstance(self.answer, BaseException):
                raise self.answer
            return self.answer

        return call


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> FakeApi:
    fake, loop = FakeApi(), types.ModuleType("neva.training.loop")
    loop.Stopped = Stopped  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "neva.api", fake)
    monkeypatch.setattr(neva, "api", fake, raising=False)
    monkeypatch.setitem(sys.modules, "neva.training.loop", loop)
    return fake


def run(*args: str, **options: Any) -> Result:
    return CliRunner().invoke(main, args, prog_name="neva", **options)


def test_importing_the_command_line_imports_nothing_heavy() -> None:
    code = "import sys, neva.cli; print([m for m in ('torch', 'numpy', 'pydantic', 'yaml', 'transformers', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_names_every_command() -> None:
    result = run("--help")
    assert result.exit_code == 0 and all(word in result.output for word in ("train", "demo", "show", "recipes", "generate", "eval"))


def test_train_takes_overrides_and_options_in_any_order(api: FakeApi) -> None:
    assert run("train", "demo", "out=x", "--resume", "auto", "finetune:data.source=y").exit_code == 0
    assert run("train", "demo").exit_code == 0
    assert api.calls == [
        ("train", ("demo", ("out=x", "finetune:data.source=y")), {"resume": "auto"}),
        ("train", ("demo", ()), {"resume": None}),
    ]


def test_train_with_nproc_starts_that_many_ranks_of_the_same_command(api: FakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    monkeypatch.setattr("neva.launch.local", lambda argv, nproc: started.append((argv, nproc)) or 7)
    assert run("--traceback", "train", "demo", "--nproc", "2", "out=x", "--resume", "auto").exit_code == 7
    assert started == [(["--traceback", "train", "--resume", "auto", "--", "demo", "out=x"], 2)]
    assert api.calls == [("recipe", ("demo", ("out=x",)), {"resume": "auto"})]
    api.answer = ValueError("no field 'x'")
    assert run("train", "demo", "--nproc", "2", "x=1").exit_code == 1 and len(started) == 1


def test_demo_and_show_pass_what_they_are_given(api: FakeApi) -> None:
    api.answer = "name: a\n"
    assert run("demo", "out=there", "steps=3").exit_code == 0
    assert run("show", "demo", "steps=3").output == "name: a\n"
    assert api.calls == [("demo", (("out=there", "steps=3"),), {}), ("show", ("demo", ("steps=3",)), {})]


def test_recipes_lists_names_stages_and_descriptions(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"name": "demo", "stages": ["pretrain", "finetune"], "description": "A tiny model."}]
    monkeypatch.setattr(recipes, "listing", lambda: rows)
    assert json.loads(run("recipes", "--json").output) == rows
    assert run("recipes").output == "demo  A tiny model. [pretrain → finetune]\n"


def test_generate_passes_only_what_was_given(api: FakeApi, tmp_path: Path) -> None:
    api.answer = [{"id": "a", "text": "zwölf"}]
    (tmp_path / "a.png").touch()
    result = run("generate", "runs/x", "--prompt", "How many?", "--image", str(tmp_path / "a.png"), "--temperature", "0", "--stop", "\n")
    assert (result.exit_code, result.output) == (0, "zwölf\n")
    options = {"prompt": "How many?", "images": (str(tmp_path / "a.png"),), "temperature": 0.0, "stop": ("\n",)}
    assert api.calls == [("generate", ("runs/x",), options)]


def test_generate_prints_one_line_per_sample_of_a_file(api: FakeApi, tmp_path: Path) -> None:
    api.answer = [{"id": "a", "text": "zwölf"}, {"id": "b", "text": "two"}]
    data = tmp_path / "data.json"
    data.touch()
    assert run("generate", "x", "--data", str(data), "--image-folder", str(tmp_path)).output == "a: zwölf\nb: two\n"
    lines = run("generate", "x", "--data", str(data), "--batch-size", "4", "--json").output.splitlines()
    assert [json.loads(line) for line in lines] == api.answer
    given = api.calls[0][2]
    assert callable(given.pop("progress"))
    assert given == {"data": str(data), "image_folder": str(tmp_path)}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "give --prompt TEXT for one question, or --data FILE"),
        (["--prompt", "a", "--data", __file__], "give --prompt TEXT for one question, or --data FILE"),
        (["--data", __file__, "--image", __file__], "--image goes with --prompt"),
        (["--prompt", "a", "--image-folder", "."], "--image-folder goes with --data"),
        (["--prompt", "a", "--out", "a.jsonl"], "--out goes with --data"),
        (["--prompt", "a", "--image", "nowhere.png"], "nowhere.png"),
        (["--prompt", "a", "--top-p", "1.5"], "1.5 is not in the range"),
        (["--prompt", "a", "--max-new-tokens", "0"], "0 is not in the range"),
    ],
)
def test_a_wrong_use_of_generate_is_said_with_exit_code_2(api: FakeApi, args: list[str], message: str) -> None:
    result = run("generate", "runs/x", *args)
    assert result.exit_code == 2 and message in " ".join(result.output.split()) and not api.calls


def test_eval_prints_a_table_or_json(api: FakeApi) -> None:
    api.answer = SCORE
    assert json.loads(run("eval", "x", "--data", __file__, "--json").output) == api.answer
    table = run("eval", "x", "--data", __file__, "--image-folder", str(ROOT)).output
    rows = [line.split() for line in table.splitlines()]
    assert any("best answer without the image" in line for line in table.splitlines())
    shown = [[word for word in row if word != "│"] for row in rows]
    assert ["colour", "12", "87.5%", "50.0%"] in shown and ["all", "16", "78.1%", "56.2%"] in shown
    assert "16 questions" in table and "blanked" not in table
    name, args, given = api.calls[1]
    assert callable(given.pop("progress"))
    assert (name, args, given) == ("evaluate", ("x",), {"data": __file__, "image_folder": str(ROOT)})


def test_eval_tells_what_it_does_not_score(api: FakeApi) -> None:
    blank = {"colour": 0.25, "kind": 0.75}
    overall = {**SCORE["overall"], "blank_image": 0.375}
    errors = [f"sample 'b{n}' of 'x': gone" for n in range(12)]
    more = {"errors": errors, "without_truth": 2, "left_out": 3, "answered": 18}
    api.answer = {**SCORE, "blank_image": blank, "overall": overall, **more}
    result = run("eval", "x", "--data", __file__, "--blind", "--out", "a.jsonl")
    assert result.exit_code == 0, result.output
    assert "images blanked" in result.stdout and "37.5%" in result.stdout
    told = ("holds no answer: 2 questions", "Left out: 3 questions", "a.report.json")
    assert all(text in result.stdout for text in told)
    lines = [line for line in result.stderr.splitlines() if line.startswith("Not asked")]
    assert len(lines) == 11 and "'b9'" in lines[9] and lines[10].endswith(": 2 more")
    assert run("eval", "x", "--data", __file__, "--strict").exit_code == 1
    api.answer = {**SCORE, "overall": None, "n": 0, "answered": 0, "errors": errors}
    failed = run("eval", "x", "--data", __file__)
    assert failed.exit_code == 1 and "no question of the file could be asked" in failed.stderr
    assert json.loads(run("eval", "x", "--data", __file__, "--json").stdout) == api.answer


def test_generate_counts_what_it_could_not_ask(api: FakeApi, tmp_path: Path) -> None:
    bad = {"id": "b", "text": "", "finish": "error", "error": "sample 'b' of 'x': gone"}
    api.answer = [{"id": "a", "text": "one"}, bad]
    given = ("generate", "x", "--data", __file__)
    plain = run(*given)
    assert (plain.exit_code, plain.stdout) == (0, "a: one\n") and "sample 'b'" in plain.stderr
    strict = run(*given, "--strict")
    assert strict.exit_code == 1 and "1 of 2 questions could not be asked" in strict.stderr
    kept = run(*given, "--out", "a.jsonl")
    assert kept.stdout == "1 of 2 questions answered: a.jsonl\n" and "sample 'b'" in kept.stderr
    counts = json.loads(run(*given, "--out", "a.jsonl", "--json").stdout)
    assert counts == {"out": "a.jsonl", "answered": 1, "errors": [bad["error"]]}
    api.answer = [bad]
    assert run(*given).exit_code == 1 and run(*given, "--out", "a.jsonl").exit_code == 1


def test_progress_is_a_line_now_and_then_and_a_bar_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock = [100.0]
    monkeypatch.setattr("neva.cli.time.monotonic", lambda: clock[0])
    with cli._Progress(None) as progress:
        for done in (20, 21, 25, 30, 100):  # 20 were answered before
            progress(done, 100)
            clock[0] += 20
    lines = ["25 of 100 questions, about 10 min left", "100 of 100 questions, about 0 min left"]
    assert capsys.readouterr().err.splitlines() == lines
    with cli._Progress(None, quiet=True) as progress:
        progress(1, 2)
        clock[0] += 99
        progress(2, 2)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with cli._Progress(None) as progress:
        progress(1, 2)
        assert progress.bar.tasks[0].total == 2 and progress.bar.tasks[0].completed == 1
    with pytest.raises(KeyboardInterrupt), cli._Progress("kept.jsonl"):
        raise KeyboardInterrupt
    assert "kept.jsonl keeps what was answered" in capsys.readouterr().err


SCORE: dict[str, Any] = {
    "accuracy": {"colour": 0.875, "kind": 0.5},
    "baselines": {"colour": 0.5, "kind": 0.75},
    "counts": {"colour": 12, "kind": 4},
    "overall": {"accuracy": 0.78125, "baseline": 0.5625},
    "n": 16,
    "answered": 16,
    "without_truth": 0,
    "left_out": 0,
    "errors": [],
}


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("no field 'x'. Did you mean 'y'?"), 1, "error: no field 'x'. Did you mean 'y'?\n"),
        (FileNotFoundError(2, "No such file or directory", "a.json"), 1, "error: a.json: No such file or directory\n"),
        (OSError("disk on fire"), 1, "error: disk on fire\n"),
        (Stopped("stopped at step 3; go on with --resume auto", 143), 143, "stopped at step 3; go on with --resume auto\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_an_error_of_the_user_is_one_line_and_a_code(api: FakeApi, error: BaseException, code: int, message: str) -> None:
    api.answer = error
    result = run("train", "demo")
    assert (result.exit_code, result.stderr, result.stdout) == (code, message, "")


@pytest.mark.parametrize("error", [ValueError("x"), RuntimeError("x")])
def test_the_traceback_is_there_when_asked_for_and_for_our_own_faults(api: FakeApi, error: Exception) -> None:
    api.answer = error
    assert run("--traceback", "train", "demo").exception is error
    assert run("train", "demo", env={"NEVA_TRACEBACK": "1"}).exception is error
    assert (run("train", "demo").exception is error) == isinstance(error, RuntimeError)


def test_a_closed_pipe_ends_quietly() -> None:
    code = 'import neva.cli, sys, types; sys.modules["neva.api"] = neva.api = types.ModuleType("neva.api")\n'
    code += 'neva.api.show = lambda *a: "line\\n" * 100000\nneva.cli.main(["show", "demo"])'
    command = f"{sys.executable} -c '{code}' | head -1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("line\n", "")


NOT_RECIPES = {
    "runs/x": "runs/x is a run's folder. To go on with it: neva train runs/x/config.yaml --resume auto.",
    "runs/x/checkpoints/step_5": (
        "runs/x/checkpoints/step_5 is a checkpoint, and no recipe. To go on from it: neva train {run}/config.yaml --resume runs/x/checkpoints/step_5."
    ),
    "runs/x/checkpoints/step_5/neva.yaml": (
        "runs/x/checkpoints/step_5/neva.yaml describes a checkpoint, runs/x/checkpoints/step_5, which is a checkpoint"
    ),
    "imported": "imported is a checkpoint, and no recipe. To start from its weights: neva train RECIPE init=imported",
    "model": "model is a model of Hugging Face's, and no recipe. To start from its weights: neva train RECIPE init=model",
    "m.nemo": "m.nemo is a file of weights, and no recipe. To start from them: neva train RECIPE init=m.nemo",
    "empty": "empty is a folder, and no recipe",
}


@pytest.mark.parametrize("name", NOT_RECIPES)
def test_what_is_no_recipe_is_told_what_to_give(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = ("runs/x/config.yaml", "runs/x/checkpoints/step_5/manifest.json", "runs/x/checkpoints/step_5/neva.yaml")
    for path in map(Path, (*files, "imported/manifest.json", "model/config.json", "m.nemo", "empty/x.txt")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    with pytest.raises(ValueError) as raised:
        recipes.get(name)
    assert str(raised.value).startswith(NOT_RECIPES[name].format(run=tmp_path / "runs/x"))
    result = run("train", name)
    assert result.exit_code == 1 and result.stderr == f"error: {raised.value}\n"


def test_the_list_of_recipes_imports_none_of_them() -> None:
    code = "import sys; from neva.cli import main; main(['recipes'], standalone_mode=False)\n"
    code += "print([m for m in ('torch', 'pydantic', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]" and "nvlm-h-72b" in done.stdout


def test_what_the_list_says_of_a_recipe_is_true() -> None:
    for row in recipes.listing():
        stages = recipes.get(row["name"])
        assert row["stages"] == [stage.name for stage in stages]
        assert row["description"] == (recipes._function(row["name"]).__doc__ or "").strip().splitlines()[0]


def completed(*words: str) -> list[str]:
    """What a shell is offered for the last of these words."""
    line = " ".join(("neva", *words))
    environment = {**os.environ, "_NEVA_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(len(words))}
    done = subprocess.run([sys.executable, "-m", "neva"], cwd=ROOT, env=environment, capture_output=True, text=True)
    return [text.partition(",")[2] for text in done.stdout.splitlines()]


def test_a_shell_completes_recipes_stages_and_options() -> None:
    assert completed("train", "nvlm-x-") == ["nvlm-x-tiny", "nvlm-x-34b", "nvlm-x-72b"]
    assert completed("show", "demo/") == ["demo/pretrain", "demo/finetune"]
    assert "--dry-run" in completed("train", "demo", "--d") and "recipes" in completed("re")


@pytest.mark.parametrize(
    ("given", "spins"),
    [
        ({}, "10000"),
        ({"GOMP_SPINCOUNT": "5"}, "5"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, None),
    ],
)
def test_the_command_lets_threads_sleep_soon_unless_it_is_told(given: dict[str, str], spins: str | None) -> None:
    """Before torch is imported, and by the command alone."""
    environment = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    seen = "import os, sys\nimport neva, neva.api\nprint(os.environ.get('GOMP_SPINCOUNT'))\n"
    code = "import neva.__main__ as command\n"
    code += "command.main = lambda **_: print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)\n"
    told = [subprocess.run([sys.executable, "-c", text], cwd=ROOT, env=environment | given, capture_output=True, text=True).stdout.split()
        for text in (seen, f"import os, sys\n{code}command.run()")]  # fmt: skip
    assert told == [[str(given.get("GOMP_SPINCOUNT"))], [str(spins), "False"]]


def test_a_recipe_is_found_by_name_by_stage_and_as_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    stages = (types.SimpleNamespace(name="pretrain"), types.SimpleNamespace(name="finetune"))
    monkeypatch.setattr(recipes, "_function", lambda name: lambda: stages)
    assert recipes.get("demo") == stages and recipes.get("demo/finetune") == stages[1:]
    for name, message in (
        ("demoo", "no recipe 'demoo'. Did you mean 'demo'?"),
        ("demo/finetun", "no stage 'finetun' in recipe 'demo'. Did you mean 'finetune'?"),
        ("runs/none.yaml", "runs/none.yaml: No such file"),
    ):
        with pytest.raises(ValueError, match=message.replace("?", r"\?")):
            recipes.get(name)


@pytest.mark.parametrize("name", sorted(recipes.RECIPES))
def test_a_recipe_saved_and_loaded_is_the_same_recipe(name: str, tmp_path: Path) -> None:
    stages = recipes.get(name)
    config.save(stages, tmp_path / "config.yaml")
    assert recipes.get(str(tmp_path / "config.yaml")) == stages


def test_every_recipe_has_a_description() -> None:
    rows = recipes.listing()
    assert [row["name"] for row in rows] == list(recipes.RECIPES)
    assert all(row["description"] and len(set(row["stages"])) == len(row["stages"]) > 0 for row in rows)


def ranks(tmp_path: Path, program: str) -> subprocess.Popen:
    """`launch.local` of two ranks where `python -m neva` is `program`."""
    (tmp_path / "neva.py").write_text(textwrap.dedent(program))
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from neva.launch import local; sys.exit(local(['a', '--', 'b'], 2))"
    return subprocess.Popen([sys.executable, "-P", "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


@pytest.mark.multi
def test_ranks_share_the_cores_and_the_first_failure_gives_the_exit_code(tmp_path: Path) -> None:
    started = ranks(tmp_path, "import os, sys; os.write(1, f'{sys.argv[1:]} {os.environ[\"OMP_NUM_THREADS\"]}\\n'.encode()); sys.exit(3)")
    output, _ = started.communicate(timeout=100)
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // 2)))
    assert started.returncode == 3 and f"['a', '--', 'b'] {threads}" in output


@pytest.mark.multi
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_every_rank(tmp_path: Path, number: signal.Signals) -> None:
    program = """
        import os, signal, sys, time
        def stop(number, frame):
            os.write(1, f"saved {number}\\n".encode())
            sys.exit(128 + number)
        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
        os.write(1, b"ready\\n")
        time.sleep(100)
    """
    started = ranks(tmp_path, program)
    assert started.stdout is not None
    assert [started.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    started.send_signal(number)
    output, _ = started.communicate(timeout=100)
    assert started.returncode == 128 + number and output.count(f"saved {int(number)}") == 2


FIRST = ("import neva; neva.evaluate", "from neva.api import train", "import neva.evaluate.run", "from neva import evaluate")


@pytest.mark.parametrize("first", FIRST)
def test_the_functions_of_neva_are_functions_whatever_was_imported_first(first: str) -> None:
    asked = "print({type(getattr(neva, name)).__name__ for name in neva.__all__})"
    code = f"{first}\nimport neva, neva.api\n{asked}\nimport neva.evaluate.report\n{asked}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("{'function'}\n{'function'}\n", "")


@pytest.mark.parametrize(
    "call",
    [
        lambda api: api.trian("demo"),
        lambda api: api.train("demo", resumes="auto"),
        lambda api: api.evaluate("x"),
        lambda api: api.generate("x", prompt="a", temprature=1.0),
    ],
)
def test_the_stand_in_takes_no_call_that_neva_api_would_not_take(api: FakeApi, call: Any) -> None:
    with pytest.raises((AttributeError, TypeError)):
        call(api)
    assert not api.calls


def options_of(group: click.Group) -> set[str]:
    """The options of all commands under the first of their spellings, without those of
    `--help` and hidden ones."""
    found: set[str] = set()
    for command in group.commands.values():
        if isinstance(command, click.Group):
            found |= options_of(command)
        options = [option for option in command.params if isinstance(option, click.Option)]
        found |= {option.opts[0] for option in options if not option.hidden}
    return found


UNTOLD = {"--to"}
"""Options that reach no function of `neva.api`: there is one format to export to."""


def test_every_command_calls_neva_api_as_it_is(api: FakeApi, tmp_path: Path) -> None:
    """Each option of each command, so that the stand-in compares them all with the
    functions' signatures."""
    file = tmp_path / "a.png"
    Image.new("RGB", (4, 4)).save(file)
    sampling = [
        "--max-new-tokens",
        3,
        "--temperature",
        1,
        "--top-p",
        0.5,
        "--top-k",
        2,
        "--seed",
        1,
    ]
    loading = ["--trust-code", "--device", "cpu", "--precision", "bf16"]
    sampling += ["--stop", "x", "--batch-size", 2, *loading, "--json"]
    cut = ["--min-tiles", 1, "--max-tiles", 4, "--tile", 28, "--tags", "none", "--json"]
    composed = ["--decoder", "a", "--vision", "b", "--projector", "linear", "--seed", 3]
    kept = ["--out", tmp_path / "a.jsonl", "--image-folder", tmp_path]
    judged = [*kept, "--batch-size", 2, "--max-new-tokens", 3, *loading]
    written = [
        "--part",
        "decoder",
        "--keys",
        "vllm",
        "--dtype",
        "fp16",
        "--shard",
        9,
        "--no-parity",
    ]
    commands: list[tuple[Any, list[Any]]] = [
        (None, ["train", "demo", "--dry-run", "--nproc", 2, "--gpu-memory", 80, "--trust-code"]),
        (None, ["train", "demo", "out=x", "--resume", "auto", "--trust-code"]),
        (None, ["demo", "out=x"]),
        ("a: 1", ["show", "demo", "out=x", "--trust-code"]),
        (
            [{"id": "a", "text": "b"}],
            ["generate", "x", "--prompt", "a", "--image", file, *sampling],
        ),
        ([], ["generate", "x", "--data", __file__, *kept, *sampling]),
        ("x", ["import", "a", "k=1", "--out", "o", "--dtype", "bf16", "--template", "v1", "--no-parity"]),
        ("x", ["import", *composed]),
        ({"step": 1}, ["inspect", tmp_path, "--json"]),
        ("x", ["report", tmp_path]),
        (("text\n", []), ["convert-config", __file__, "--out", "y.yaml"]),
        ("x", ["export", "c", "--out", "o", *written]),
        ({"columns": 1, "rows": 1, "tiles": 1}, ["data", "tiles", file, "--out", tmp_path / "b.png", *cut]),
        (SCORE, ["eval", "x", "--data", __file__, *judged, "--blind", "--strict", "--json"]),
    ]
    for number, (answer, arguments) in enumerate(commands, 1):
        api.answer = answer
        result = run(*map(str, arguments))
        assert result.exit_code == 0, (arguments, result.output, result.exception)
        assert len(api.calls) == number
    used = {argument for _, arguments in commands for argument in arguments if str(argument).startswith("--")}
    assert used >= options_of(main) - UNTOLD
