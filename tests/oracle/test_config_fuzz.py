"""A config.json with any one field changed is imported or refused in a line: no
traceback, and no hang."""

import copy
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers as tf

from neva import api
from neva.checkpoint.hf import Options, compose, plan, read_source
from tests.families import DECODERS, ENCODERS, IMAGE_ID, VLMS, build, clip, llama
from tests.oracle.test_convert import whole
from tests.oracle.test_nvlm import nvlm

VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 3, 1.5, 10**18, -(10**18), 1e308, float("nan"), "abc", "", "7", [], [1, 2], {}, {"a": 1},
)  # fmt: skip
"""What a field is set to; it is also left out."""
SECONDS = 10


def next_config() -> tf.PreTrainedConfig:
    return tf.LlavaNextConfig(
        vision_config=clip(), text_config=llama(), image_token_index=IMAGE_ID, vision_feature_layer=-2,
        vision_feature_select_strategy="default", image_grid_pinpoints=[[28, 56], [56, 28]],
    )  # fmt: skip


FOLDERS = {
    "llama3 scaling": DECODERS["llama3 scaling"], "mixtral": DECODERS["mixtral"], "nemotron": DECODERS["nemotron"],
    "qwen2": DECODERS["qwen2"], "mistral window": DECODERS["mistral window"], "clip": ENCODERS["clip"],
    "siglip": ENCODERS["siglip"], "internvit": ENCODERS["internvit 6b kind"], "llava": VLMS["llava"],
    "llava next": next_config,
}  # fmt: skip


def mutations(config: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every config with one field changed, those of sections too, and what was changed."""
    places = [(name,) for name in config]
    places += [(name, inner) for name, value in config.items() if isinstance(value, dict) for inner in value]
    for place in places:
        for value in (*VALUES, KeyError):
            changed = copy.deepcopy(config)
            section = changed if len(place) == 1 else changed[place[0]]
            if value is KeyError:
                del section[place[-1]]
            else:
                section[place[-1]] = value
            yield f"{'.'.join(place)}={'nothing' if value is KeyError else value!r}", changed


def faults(folder: Path, take: Any) -> tuple[int, list[str]]:
    """How many mutations there are of the folder's config.json, and those that end
    otherwise than they may."""
    config = json.loads((folder / "config.json").read_text())
    count, found = 0, []
    for name, changed in mutations(config):
        count += 1
        (folder / "config.json").write_text(json.dumps(changed))
        started = time.monotonic()
        try:
            take(folder)
        except ValueError as error:
            if len(str(error).splitlines()) != 1 or len(str(error)) > 3000:
                found.append(f"{name}: {len(str(error))} characters")
        except Exception as error:
            found.append(f"{name}: {type(error).__name__}: {str(error)[:200]}")
        if time.monotonic() - started > SECONDS:
            found.append(f"{name}: {time.monotonic() - started:.0f} seconds")
    (folder / "config.json").write_text(json.dumps(config))
    return count, found


def read(folder: Path) -> None:
    plan([read_source(folder)], Options())


SLOW = ("llava", "mixtral", "mistral window", "qwen2")
"""Families of which others like them are tried in the fast tests."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW else []) for name in FOLDERS],
)
def test_one_field_changed(name: str, tmp_path: Path) -> None:
    build(FOLDERS[name](), tmp_path / "hf")
    count, found = faults(tmp_path / "hf", read)
    assert count > 250 and found == []


def test_one_field_of_the_original_layout_changed(tmp_path: Path) -> None:
    """A LLaVA as its own repository writes it: the decoder's fields and those
    of vision in one list."""
    build(llama(), tmp_path / "hf")
    build(clip(), tmp_path / "eyes")
    path = tmp_path / "hf" / "config.json"
    more = {
        "model_type": "llava", "mm_vision_tower": "eyes", "mm_hidden_size": 32, "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch", "mm_projector_type": "mlp2x_gelu", "image_aspect_ratio": "pad",
        "mm_use_im_start_end": False, "mm_use_im_patch_token": False,
    }  # fmt: skip
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))

    def compose_both(folder: Path) -> None:
        compose([read_source(folder), read_source(tmp_path / "eyes")], Options())

    compose_both(tmp_path / "hf")
    count, found = faults(tmp_path / "hf", compose_both)
    assert count > 500 and found == []


@pytest.mark.slow
def test_one_field_of_an_nvlm_changed(tmp_path: Path) -> None:
    """NVLM-D's, which names its parts otherwise; heads of zeros are seen in its weights."""
    nvlm(tmp_path / "hf", padded=1)
    count, found = faults(tmp_path / "hf", read)
    assert count > 250 and found == []


LONG = ("llama3 scaling", "mixtral", "llava with its text")


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("image_token_index", -1, r"config\.json: the image token is -1"),
        ("vision_feature_layer", 0, "transformers cannot load and run"),
    ],
)
def test_what_transformers_cannot_run_is_refused_in_a_line(field: str, value: int, says: str, tmp_path: Path) -> None:
    whole(tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(ValueError, match=says) as error:
        api.import_checkpoint([tmp_path / "hf"], tmp_path / "out", say=str)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("clip", marks=pytest.mark.slow),
        *(pytest.param(name, marks=pytest.mark.soak) for name in LONG),
    ],
)
def test_one_field_changed_and_all_compared(name: str, tmp_path: Path) -> None:
    """The same through the whole import, with transformers' reading of the folder."""
    if name in FOLDERS:
        build(FOLDERS[name](), tmp_path / "hf")
    else:
        whole(tmp_path / "hf")

    def take(folder: Path) -> None:
        try:
            api.import_checkpoint([folder], tmp_path / "out", say=str)
        finally:
            shutil.rmtree(tmp_path / "out", ignore_errors=True)

    count, found = faults(tmp_path / "hf", take)
    assert count > 250 and found == []
