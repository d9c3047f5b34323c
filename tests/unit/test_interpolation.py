"""`${…}` as OmegaConf reads it: values worked out by its documentation; what nobody gives is unresolved, with the reason."""

from pathlib import Path

import pytest

from neva.recipes.interpolation import Unresolved, load, resolve

FILE = {
    "n": 2048, "text": "x", "nothing": None, "yes": True, "missing": "???", "q": "n",
    "a": {"b": "${n}", "list": [1, "${text}", {"k": "${n}"}], "next": "${.b}", "up": "${..text}", "d": {"e": "${...n}"}},
    "link": "${a}", "loss": "${elsewhere.deep}",
}  # fmt: skip
ENVIRONMENT = {"HOME_OF_DATA": "/data", "COUNT": "12", "EMPTY": ""}


@pytest.mark.parametrize(("raw", "expected"), [
    ("plain", "plain"), ("${n}", 2048), ("${a.b}", 2048), ("${a.next}", 2048), ("${a.up}", "x"), ("${a.d.e}", 2048), ("${nothing}", None),
    ("${a.list}", [1, "x", {"k": 2048}]), ("${a.list.1}", "x"), ("${a.list[2].k}", 2048), ("${a[b]}", 2048), ("${link.b}", 2048),
    ("${${q}}", 2048), ("${a.${oc.env:NO,b}}", 2048), ("${ n }", 2048), ("${yes}", True), ("is ${yes}", "is True"),
    ("${text}/${n}/y", "x/2048/y"), ("/${text}", "/x"), ("$5 {n}", "$5 {n}"), (r"\${n}", "${n}"), (r"\\${n}", r"\2048"), (r"a\${n}${text}", "a${n}x"),
    ("${oc.env:HOME_OF_DATA}/${text}", "/data/x"), ("${oc.env:COUNT}", "12"), ("${oc.env:EMPTY}", ""), ("${oc.env:NO,7}", "7"),
    ("${oc.env:NO,'a, b'}", "a, b"), ("${oc.env:NO,null}", None), ("${oc.env:NO,http://x:80/y}", "http://x:80/y"), ("${oc.env:NO,${text}}", "x"),
    ("${oc.env:NO,${oc.env:HOME_OF_DATA}/z}", "/data/z"), ("${oc.decode:${oc.env:COUNT}}", 12), ("${oc.select:no.such,5}", 5),
    ("${oc.select:n}", 2048),
    ("${multiply:2,4}", 8), ("${multiply: ${n}, 0.5}", 1024.0), ("${divide_ceil:7,2}", 4), ("${divide_floor:7,2}", 3),
    ("${multiply:${divide_floor:${n},3},2}", 1364), ("${training.a.b}", 2048), ("${fine_tuning.text}/x", "x/x"),
])  # fmt: skip
def test_resolved(raw, expected):
    found = resolve({**FILE, "value": raw}, ENVIRONMENT)[0]["value"]
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(("raw", "why"), [
    ("${no.such}", "no.such is not in the file"), ("/${no.such}/x", "no.such is not in the file"), ("${a.b.c}", "a.b.c is not in the file"),
    ("${a.list.9}", "a.list.9 is not in the file"), ("${loss}", "elsewhere.deep is not in the file"), ("${missing}", "must be given"),
    ("???", "must be given"), ("${oc.env:NO}", "the environment has no NO"), ("${hydra:run.dir}", "hydra is none of the functions"),
    ("${env:HOME}", "env is none of the functions"), ("${multiply:2}", "multiply cannot be computed"), ("${multiply:a,2}", "'a' is not a number"),
    ("${multiply:${oc.env:COUNT},2}", "'12' is not a number"), ("${divide_ceil:1,0}", "cannot be computed"), ("${n", "braces do not close"),
    ("${nothing}/x", "null cannot stand within text"), ("${a.list}/x", "cannot stand within text"), ("${.......n}", "is no key"),
    ("${}", "is no key"),
    ("${multiply:[1],2}", "a list or mapping"), ("${training.no}", "training.no is not in the file"),
])  # fmt: skip
def test_unresolved(raw, why):
    found = resolve({**FILE, "value": raw}, ENVIRONMENT)[0]["value"]
    assert isinstance(found, Unresolved) and found.raw == str(found) == raw and why in found.why


def test_what_is_referred_to():
    assert resolve({"a": "${b.c}/${oc.env:NO,${d}}", "b": {"c": 1, "e": 2}, "d": "${f}", "f": 3}, {})[1] == {"b.c", "d", "f"}


def test_a_list_with_one_lost_item_is_unresolved():
    found = resolve({"value": [1, "${no}"]}, {})[0]["value"]
    assert isinstance(found, Unresolved) and found.raw == "[1, '${no}']"


@pytest.mark.parametrize("root", [
    {"a": "${a}"}, {"a": "${b}", "b": "x${a}"}, {"a": {"b": "${a}"}}, {"a": "${oc.env:NO,${a}}"}, {"a": ["${a}"]}, {"a": "${b.c}", "b": "${a}"},
])  # fmt: skip
def test_a_value_that_refers_to_itself(root):
    with pytest.raises(ValueError, match="refers to itself: .* -> "):
        resolve(root, {})


def test_a_chain_without_end_is_refused():
    with pytest.raises(ValueError, match="without end"):
        resolve({f"k{n}": f"${{k{n + 1}}}" for n in range(5000)}, {})


def test_yaml_as_omegaconf_reads_it(tmp_path: Path):
    """1e-5 is a number, which YAML 1.1 takes for text; a date is text; merged keys are not twice."""
    file = tmp_path / "a.yaml"
    file.write_text("a: 1e-5\nb: 2020-01-01\nc: &x {k: 1, l: 2}\nd:\n  <<: *x\n  k: 3\ne: .5\nf: 1_000\ng: -1.5e3\nh: 1.\n")
    found = load(file)
    assert found == {"a": 1e-5, "b": "2020-01-01", "c": {"k": 1, "l": 2}, "d": {"k": 3, "l": 2}, "e": 0.5, "f": 1000, "g": -1500.0, "h": 1.0}
