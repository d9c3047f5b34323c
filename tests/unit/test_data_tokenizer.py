"""Tokenizers of both kinds behind one interface: special tokens, saving, pickling, and what damaged files are told."""

import json
import pickle
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from neva.data.tokenizer import JsonTokenizer, Tokenizer, load_tokenizer

TINY = Path(__file__).parents[1] / "data" / "tiny.model"
TEXTS = ["", " ", "what is the color?", "  two  spaces ", "line\nbreak\n", "Größe ☃ 猫", "a</s>b", "<s>x", "<unk>", "<0x0A>", "▁"]


def byte_level(path: Path, *special: str, start: str | None = None) -> Path:
    """A small byte-level BPE `tokenizer.json`, with a post-processor that puts `start` before a text."""
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator(["USER: what is the color? ASSISTANT: red"] * 20, trainer)
    if start:
        model.post_processor = processors.TemplateProcessing(single=f"{start} $A", special_tokens=[(start, model.token_to_id(start))])
    path.mkdir(exist_ok=True)
    model.save(str(path / "tokenizer.json"))
    return path


def configured(path: Path, **config: object) -> Tokenizer:
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(path)


@pytest.fixture(params=["sentencepiece", "json"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    return load_tokenizer(TINY if request.param == "sentencepiece" else byte_level(tmp_path / "source", "<s>", "</s>", "<unk>"))


def test_ids_are_within_the_size_and_decode_back(tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert all(0 <= id < tokenizer.size for id in ids)
        if "s>" not in text and "unk" not in text and text != "▁":
            assert tokenizer.decode(ids) == text
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""


def test_special_tokens_in_a_text_become_their_ids_and_none_is_added(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("a</s>b") == [*tokenizer.encode("a"), tokenizer.eos, *tokenizer.encode("b")]
    assert tokenizer.bos is not None and tokenizer.bos not in tokenizer.encode("a")
    assert tokenizer.decode([tokenizer.bos, *tokenizer.encode("red"), tokenizer.eos, -200, -201]) == "red"


def test_a_saved_or_pickled_tokenizer_is_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "deep" / "saved")
    again = load_tokenizer(tmp_path / "deep" / "saved")
    for other in (again, pickle.loads(pickle.dumps(tokenizer))):
        assert type(other) is type(tokenizer) and other.files == tokenizer.files
        assert (other.bos, other.eos, other.pad, other.size) == (tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.size)
        assert [other.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


def test_sentencepiece_special_ids() -> None:
    tokenizer = load_tokenizer(TINY)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.size) == (1, 2, 0, 512)


def test_start_and_end_tokens_of_json_files(tmp_path: Path) -> None:
    """The config decides; without one, common names; and what the file itself puts before a text is what its models want."""
    llama = byte_level(tmp_path / "llama", "<unk>", "<s>", "</s>", start="<s>")
    gpt2 = byte_level(tmp_path / "gpt2", "<|endoftext|>")
    assert load_tokenizer(llama).bos == 1 and load_tokenizer(llama).eos == 2 and load_tokenizer(llama).pad == 0
    assert load_tokenizer(gpt2).bos is None and load_tokenizer(gpt2).eos == load_tokenizer(gpt2).pad == 0
    assert configured(llama, bos_token="<s>", eos_token={"content": "<unk>"}, pad_token="</s>").eos == 0
    assert load_tokenizer(llama).pad == 2 and load_tokenizer(llama).bos == 1
    assert configured(llama, add_bos_token=False).bos is None
    assert configured(gpt2, bos_token="<|endoftext|>", add_bos_token=True).bos == 0
    assert configured(gpt2, bos_token=None).bos is None
    assert isinstance(load_tokenizer(gpt2 / "tokenizer.json"), JsonTokenizer)


def test_a_folder_with_both_kinds_is_read_as_json(tmp_path: Path) -> None:
    folder = byte_level(tmp_path / "both", "<s>", "</s>")
    (folder / "tokenizer.model").write_bytes(TINY.read_bytes())
    assert isinstance(load_tokenizer(folder), JsonTokenizer)


def test_bad_tokenizers_are_told(tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    for name in ("x.model", "y.json", "empty.model", "broken/tokenizer.json"):
        (tmp_path / name).write_bytes(b"" if name.startswith("empty") else b"nonsense")
    for path in (tmp_path / "x.model", tmp_path / "y.json", tmp_path / "empty.model", tmp_path / "broken"):
        with pytest.raises(ValueError, match="cannot be read"):
            load_tokenizer(path)
    with pytest.raises(ValueError, match="is missing: give"):
        load_tokenizer(tmp_path / "nowhere.model")
    with pytest.raises(ValueError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="no end token"):
        load_tokenizer(byte_level(tmp_path / "endless", "<s>"))
    folder = byte_level(tmp_path / "config", "</s>")
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        load_tokenizer(folder)
