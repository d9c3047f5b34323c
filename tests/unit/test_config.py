"""Configs from YAML and overrides: what is read, what is refused, and with which words."""

import re
from dataclasses import dataclass, field, replace
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neva.config import from_dict, load, override, save, to_dict


@dataclass(frozen=True, kw_only=True)
class Decoder:
    layers: int = 2
    width: int = 64
    heads: int = 4
    dropout: float | None = None
    layer_norm: Literal["rms", "layernorm"] = "rms"

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")


@dataclass(frozen=True, kw_only=True)
class Model:
    decoder: Decoder = field(default_factory=Decoder)


@dataclass(frozen=True, kw_only=True)
class Optim:
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


@dataclass(frozen=True, kw_only=True)
class Mock:
    samples: int = 10


@dataclass(frozen=True, kw_only=True)
class Source:
    path: str = ""
    weight: float | None = None
    mock: Mock | None = None


@dataclass(frozen=True, kw_only=True)
class Init:
    path: str = ""


@dataclass(frozen=True, kw_only=True)
class Stage:
    name: str
    model: Model = field(default_factory=Model)
    optim: Optim = field(default_factory=Optim)
    sources: tuple[Source, ...] = ()
    init: Init = field(default_factory=Init)
    trainable: tuple[str, ...] = ("*",)
    shuffle: bool = True
    steps: int = 10
    warmup: int | Literal["auto"] = "auto"
    system: str | None = None
    extra: dict[str, int] = field(default_factory=dict)
    out: str = "runs/run"


NAMED = {Optim: {"adamw": Optim(), "slow": Optim(lr=1e-5)}, Decoder: {"big": Decoder(layers=32, width=128)}, Init: lambda word: Init(path=word)}
STAGES = (Stage(name="pretrain"), Stage(name="finetune", sources=(Source(path="a.json"), Source(path="b.json"))))


def change(*overrides: str) -> Stage:
    return override(STAGES, overrides, named=NAMED)[1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("steps=3", replace(STAGES[1], steps=3)),
        ("optim.lr=1e-3", replace(STAGES[1], optim=Optim(lr=1e-3))),
        ("optim.lr=2", replace(STAGES[1], optim=Optim(lr=2.0))),
        ("optim.betas=[0.9, 0.95]", replace(STAGES[1], optim=Optim(betas=(0.9, 0.95)))),
        ("optim=slow", replace(STAGES[1], optim=Optim(lr=1e-5))),
        ("optim={lr: 1e-4}", replace(STAGES[1], optim=Optim(lr=1e-4))),
        ("model={decoder: big}", replace(STAGES[1], model=Model(decoder=Decoder(layers=32, width=128)))),
        ("init=runs/a b", replace(STAGES[1], init=Init(path="runs/a b"))),
        ("shuffle=false", replace(STAGES[1], shuffle=False)),
        ("warmup=5", replace(STAGES[1], warmup=5)),
        ("warmup=auto", STAGES[1]),
        ("system=", replace(STAGES[1], system="")),
        ("system=null", STAGES[1]),
        ("system='null'", replace(STAGES[1], system="null")),
        ("system=A chat: be kind #1", replace(STAGES[1], system="A chat: be kind #1")),
        ("name=007", replace(STAGES[1], name="007")),
        ("name=1e3", replace(STAGES[1], name="1e3")),
        ("out=2024-01-01", replace(STAGES[1], out="2024-01-01")),
        ("out=a=b", replace(STAGES[1], out="a=b")),
        ("out=yes", replace(STAGES[1], out="yes")),
        ("trainable=[*, !vision.*, projector.*]", replace(STAGES[1], trainable=("*", "!vision.*", "projector.*"))),
        ("trainable=[]", replace(STAGES[1], trainable=())),
        ("model.decoder.dropout=0.5", replace(STAGES[1], model=Model(decoder=Decoder(dropout=0.5)))),
        ("extra.a=3", replace(STAGES[1], extra={"a": 3})),
        ("sources=[{path: c.json, weight: 2}]", replace(STAGES[1], sources=(Source(path="c.json", weight=2.0),))),
    ],
)
def test_an_override_sets_the_field(text: str, expected: Stage) -> None:
    key = "" if text.startswith("name=") else "finetune:"
    stages = STAGES[1:] if text.startswith("name=") else STAGES
    assert override(stages, [key + text], named=NAMED)[-1] == expected


def test_values_have_the_annotated_types_exactly() -> None:
    stage = change("optim.lr=1", "finetune:name=x", "trainable=[a]", "optim.betas=[0, 1]")
    assert type(stage.optim.lr) is float and type(stage.name) is str and type(stage.trainable[0]) is str
    assert [type(b) for b in stage.optim.betas] == [float, float]


def test_an_element_of_a_tuple_has_an_address() -> None:
    stage = change("finetune:sources.0.weight=2", "finetune:sources.1.mock.samples=5")
    assert stage.sources == (Source(path="a.json", weight=2.0), Source(path="b.json", mock=Mock(samples=5)))
    assert change("optim.betas.1=0.5").optim.betas == (0.9, 0.5)


def test_overrides_apply_from_left_to_right_and_only_the_result_is_validated() -> None:
    assert change("optim=slow", "optim.eps=1e-6").optim == Optim(lr=1e-5, eps=1e-6)
    assert change("optim.eps=1e-6", "optim=slow").optim == Optim(lr=1e-5)
    assert change("model.decoder=big", "model.decoder.layers=1").model.decoder == Decoder(layers=1, width=128)
    assert change("model.decoder.heads=5", "model.decoder.width=65").model.decoder.width == 65


def test_a_stage_prefix_reaches_one_stage() -> None:
    both = override(STAGES, ["steps=7"], named=NAMED)
    one = override(STAGES, ["finetune:steps=7"], named=NAMED)
    assert [s.steps for s in both] == [7, 7] and [s.steps for s in one] == [10, 7]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model.decoder.layerz=3", "no field 'layerz' in model.decoder. Did you mean 'layers'?"),
        ("modle.decoder.layers=3", "no field 'modle'. Did you mean 'model'?"),
        ("init.zzz=3", "no field 'zzz' in init. Known: path."),
        ("model={decoder: {layerz: 3}}", "no field 'layerz' in model.decoder. Did you mean 'layers'?"),
        ("optim.lr=fast", "optim.lr: 'fast' is not a float"),
        ("optim.lr=true", "optim.lr: 'true' is not a float"),
        ("optim.lr=[1]", "optim.lr: ['1'] is not a float"),
        ("optim.lr=null", "optim.lr: null is not a float"),
        ("optim.lr.x=1", "optim.lr is a float and has no field 'x'"),
        ("steps=2.5", "steps: 2.5 is not an int"),
        ("steps=true", "steps: 'true' is not an int"),
        ("steps=", "steps: '' is not an int"),
        ("shuffle=yes", "shuffle: 'yes' is not a bool"),
        ("shuffle=1", "shuffle: 1 is not a bool"),
        ("out=null", "out: null is not a str"),
        ("out=[a]", "out: ['a'] is not a str"),
        ("optim.betas=[0.9]", "optim.betas: ['0.9'] is not a list of 2 (each a float)"),
        ("optim.betas=[0.9, x]", "optim.betas.1: 'x' is not a float"),
        ("trainable=*", "trainable: '*' is not a list (each a str); write [*]"),
        ("model.decoder.layer_norm=rmz", "model.decoder.layer_norm: 'rmz' is not one of 'rms', 'layernorm'. Did you mean 'rms'?"),
        ("warmup=soon", "warmup: 'soon' is not an int or 'auto'"),
        ("model.decoder.dropout=x", "model.decoder.dropout: 'x' is not a float"),
        ("optim=adamv", "optim: no preset 'adamv'. Did you mean 'adamw'?"),
        ("model=big", "model: 'big' is not a mapping of Model's fields"),
        ("model.decoder.heads=5", "model.decoder: width 64 is not a multiple of heads 5"),
        ("extra.a=x", "extra: {'a': 'x'} is not a dict"),
        ("sources.2.weight=1", "sources: no element '2' in a list of 2; set the whole list with sources=[…]"),
        ("sources.x.weight=1", "sources: no element 'x' in a list of 2"),
        ("sources.0.mock=x", "sources.0.mock: 'x' is not a mapping of Mock's fields"),
        ("trainable=[a", "override 'finetune:trainable=[a': the value is not valid YAML"),
    ],
)
def test_a_wrong_override_names_the_key_the_value_and_the_type(text: str, message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        override(STAGES, ["finetune:" + text], named=NAMED)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps", "override 'steps' is not of the form key=value or STAGE:key=value"),
        ("=3", "override '=3' is not of the form key=value"),
        ("pretrian:steps=3", "override 'pretrian:steps': no stage 'pretrian'. Did you mean 'pretrain'?"),
        ("name=same", "two stages are named 'same'; rename one with STAGE:name=OTHER"),
    ],
)
def test_an_override_of_the_wrong_form_says_the_form(text: str, message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        override(STAGES, [text], named=NAMED)


def test_python_data_is_read_as_strictly_as_text() -> None:
    assert from_dict(Stage, {"name": 7, "optim": {"lr": "1e-3", "betas": [0, 1]}}) == Stage(name="7", optim=Optim(betas=(0.0, 1.0)))
    assert from_dict(Stage, {"name": "a", "optim": "slow"}, named=NAMED).optim.lr == 1e-5
    for bad, message in (
        ({"name": True}, "name: True is not a str"),
        ({"name": "a", "steps": True}, "steps: True is not an int"),
        ({"name": "a", "optim": {"lr": False}}, "optim.lr: False is not a float"),
        ({"name": "a", "shuffle": 1}, "shuffle: 1 is not a bool"),
        ({}, "name: no value, and it has no default"),
        ([], "the config: [] is not a mapping of Stage's fields"),
    ):
        with pytest.raises(ValueError, match="^" + re.escape(message)):
            from_dict(Stage, bad)


def test_saved_stages_load_equal(tmp_path) -> None:
    stages = override(STAGES, ["optim.eps=1e-08", "finetune:system=ünï: 'quoted' #x", "extra={a: 1}", "trainable=[*, !a]"], named=NAMED)
    save(stages, tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text(encoding="utf-8")
    assert load(tmp_path / "config.yaml", Stage, named=NAMED) == stages
    assert "ünï" in text and "eps: 1.0e-08" in text and [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


@settings(deadline=None)  # which a busy machine misses
@given(name=st.text(), lr=st.floats(allow_nan=False), words=st.lists(st.text(), max_size=4), system=st.none() | st.text())
def test_any_text_and_number_survives_a_file(tmp_path_factory, name: str, lr: float, words: list[str], system: str | None) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    stage = Stage(name=name, optim=Optim(lr=lr), trainable=tuple(words), system=system)
    save([stage], path)
    assert load(path, Stage) == (stage,)
    assert from_dict(Stage, to_dict(stage)) == stage


def test_one_mapping_is_a_list_of_one_stage_and_presets_are_read(tmp_path) -> None:
    path = tmp_path / "one.yaml"
    path.write_text("name: 12\noptim: slow\nmodel:\n  decoder: big\ntrainable: [*, !x.*]\nsystem:\n")
    expected = Stage(name="12", optim=Optim(lr=1e-5), model=Model(decoder=NAMED[Decoder]["big"]), trainable=("*", "!x.*"))
    assert load(path, Stage, named=NAMED) == (expected,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\noptim: {lr: 1\nsteps: 3\n", r"bad\.yaml:3: "),
        ("name: a\nname: b\n", r"bad\.yaml:2: key 'name' stands twice"),
        ("name: a\nstepz: 3\n", r"bad\.yaml: no field 'stepz'\. Did you mean 'steps'\?"),
        ("", r"bad\.yaml: the config: null is not a mapping"),
        ("- name: a\n- name: a\n", r"bad\.yaml: two stages are named 'a'"),
        ("a: \x01\n", r"bad\.yaml: "),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load(path, Stage)


def test_a_missing_file_is_named(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.yaml: No such file or directory"):
        load(tmp_path / "nowhere.yaml", Stage)
