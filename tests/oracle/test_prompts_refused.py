"""What the gate of prompts refuses: a folder whose ids or pixels are other in transformers than
`neva generate` has them.

Each case changes one thing in a folder that was found equal, so that nothing else can be the
reason.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
import torch

from neva import api
from neva.checkpoint.hf import Options
from neva.checkpoint.manifest import CheckpointError
from neva.checkpoint.prompts import compare_prompts
from neva.data.tokenizer import load_tokenizer
from neva.infer.generate import Loaded, load
from tests.families import build, llama
from tests.oracle.test_convert import whole

torch.set_num_threads(1)
DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Loaded]:
    """A LLaVA as it was exported, and the checkpoint that it is of."""
    place = tmp_path_factory.mktemp("exported")
    whole(place / "hf")
    api.import_checkpoint(
        [place / "hf"],
        place / "neva",
        options=Options(template="chatml"),
        say=lambda line: None,
    )
    api.export_checkpoint(place / "neva", place / "out", say=lambda line: None)
    return place / "out", load(place / "neva")


def compare(folder: Path, loaded: Loaded) -> str:
    return compare_prompts(folder, loaded.encoder, loaded.model.config.vision)


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def settings(folder: Path, **values: object) -> None:
    """Fields of the image processor, wherever the folder has them."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            held = json.loads((folder / name).read_text())
            held.get("image_processor", held).update(values)
            (folder / name).write_text(json.dumps(held))


def test_the_folder_itself_is_equal(exported: tuple[Path, Loaded]) -> None:
    said = compare(*exported)
    assert "6 of 6" in said and "pixels" in said


def swapped_tokens(folder: Path) -> None:
    """Two ordinary tokens of the vocabulary have each other's ids."""
    held = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    words = held["model"]["vocab"]
    first, second = words["h"], words["s"]
    words.update(h=second, s=first)
    (folder / "tokenizer.json").write_text(json.dumps(held), encoding="utf-8")


def start_token_twice(folder: Path) -> None:
    """The template writes two; one alone takes the place of the tokenizer's in transformers."""
    text = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    (folder / "chat_template.jinja").write_text(
        "{{ bos_token }}{{ bos_token }}" + text,
        encoding="utf-8",
    )


def more_image_tokens(folder: Path) -> None:
    change(folder / "processor_config.json", '"patch_size": 14', '"patch_size": 7')


IDS: dict[str, tuple[Callable[[Path], None], str]] = {
    "vocabulary": (swapped_tokens, "a question"),
    "start token": (start_token_twice, "a question"),
    "a space": (
        lambda folder: change(folder / "chat_template.jinja", "<|im_end|>", " <|im_end|>"),
        "a question",
    ),
    "image tokens": (more_image_tokens, "an image"),
}


@pytest.mark.parametrize("fault", IDS)
def test_other_ids_are_refused(fault: str, exported: tuple[Path, Loaded], tmp_path: Path) -> None:
    """The first conversation with other ids is named, and the place where they part."""
    folder = shutil.copytree(exported[0], tmp_path / "out")
    spoil, talk = IDS[fault]
    spoil(folder)
    with pytest.raises(
        CheckpointError,
        match=f"other ids in transformers for {talk}, from token \\d+ on",
    ):
        compare(folder, exported[1])


PIXELS = {
    "mean": {"image_mean": [0.48, 0.46, 0.41]},
    "deviation": {"image_std": [0.27, 0.26, 0.28]},
    "resampling": {"resample": 0},
    "scale": {"rescale_factor": 1 / 256},
    "no crop": {"do_center_crop": False, "size": {"height": 28, "width": 28}},
    "no normalisation": {"do_normalize": False},
}


@pytest.mark.parametrize("fault", PIXELS)
def test_other_pixels_are_refused(
    fault: str,
    exported: tuple[Path, Loaded],
    tmp_path: Path,
) -> None:
    folder = shutil.copytree(exported[0], tmp_path / "out")
    settings(folder, **PIXELS[fault])
    with pytest.raises(CheckpointError, match="pixels that differ by"):
        compare(folder, exported[1])


def sentencepiece_model(folder: Path, *, legacy: bool) -> Path:
    """A decoder whose only tokenizer file is a SentencePiece model."""
    build(
        llama(vocab_size=512, max_position_embeddings=512, bos_token_id=1, eos_token_id=2),
        folder,
    )
    shutil.copy(DATA / "tiny.model", folder / "tokenizer.model")
    names = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "tokenizer_class": "LlamaTokenizer",
        "legacy": legacy,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


def reversed_ids(honest: Callable[..., list[int]]) -> Callable[..., list[int]]:
    return lambda self, text, *args, **options: honest(self, text, *args, **options)[::-1]


@pytest.mark.parametrize("legacy", [True, False])
def test_a_tokenizer_that_transformers_reads_otherwise_is_refused(
    legacy: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The folder is sound: with the honest reading it is imported, with another one it is not, and
    the ids are the reason."""
    folder = sentencepiece_model(tmp_path / "hf", legacy=legacy)
    api.import_checkpoint([folder], tmp_path / "sound")
    kind = type(load_tokenizer(folder))
    monkeypatch.setattr(kind, "encode", reversed_ids(kind.encode))
    with pytest.raises(CheckpointError, match="other ids"):
        api.import_checkpoint([folder], tmp_path / "neva")
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["hf", "sound"]


def test_an_export_that_transformers_reads_otherwise_is_refused(
    exported: tuple[Path, Loaded], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Export asks the folder that it has written, and publishes nothing."""
    wrong = tokenizers.processors.TemplateProcessing(
        single="<s> <s> $A",
        special_tokens=[("<s>", 0)],
    )
    written = Path.write_bytes

    def spoiled(path: Path, content: bytes) -> int:
        if path.name == "tokenizer.json":
            made = tokenizers.Tokenizer.from_str(content.decode())
            made.post_processor = wrong
            content = made.to_str().encode()
        return written(path, content)

    monkeypatch.setattr(Path, "write_bytes", spoiled)
    with pytest.raises(CheckpointError, match="other ids in transformers"):
        api.export_checkpoint(exported[0].parent / "neva", tmp_path / "out")
    assert not list(tmp_path.iterdir())
