"""SentencePiece models as LLaVA reads them, against the library itself and the rules of
transformers' slow LlamaTokenizer.

The vocabularies are real: Mistral's, which is in tests/data, and Llama-2's where the
shared data folder has it.
"""

import io
import json
import random
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
import transformers as tf
from sentencepiece import sentencepiece_model_pb2 as pb

from neva import api
from neva.batch import IMAGE
from neva.checkpoint.hf import Options
from neva.checkpoint.manifest import CheckpointError
from neva.data.encode import Encoder
from neva.data.sample import Sample, Turn
from neva.data.tokenizer import JsonTokenizer, SentencePieceTokenizer, load_tokenizer
from neva.data.vocabularies import from_sentencepiece, read_proto
from neva.infer.generate import load
from tests.families import build, clip, llama
from tests.oracle.test_llava_ids import LAYOUT, as_sample, collapsed

torch.set_num_threads(1)
DATA = Path(__file__).parents[1] / "data"
SHARED = Path(__file__).parents[3] / "shared" / "data" / "tokenizers"
MODELS = {
    "mistral": DATA / "tokenizers" / "mistral" / "tokenizer.model",
    "llama2": SHARED / "llama2" / "tokenizer.model",
    "tiny": DATA / "tiny.model",
}
VICUNA = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": None,
    "add_bos_token": True,
    "add_eos_token": False,
    "clean_up_tokenization_spaces": False,
    "model_max_length": 4096,
    "padding_side": "right",
    "sp_model_kwargs": {},
}
"""What vicuna-7b-v1.5 publishes in tokenizer_config.json, but for `legacy`."""


needs_llama2 = pytest.mark.skipif(
    not MODELS["llama2"].is_file(),
    reason="needs Llama-2's tokenizer, which may not be copied",
)
LLAMA2 = pytest.param("llama2", marks=needs_llama2)
NAMES = ["mistral", "tiny", LLAMA2]


def folder_of(folder: Path, model: Path | bytes, **config: Any) -> Path:
    """A folder with a tokenizer.model as Vicuna has one."""
    folder.mkdir(parents=True, exist_ok=True)
    content = model if isinstance(model, bytes) else model.read_bytes()
    (folder / "tokenizer.model").write_bytes(content)
    (folder / "tokenizer_config.json").write_text(json.dumps({**VICUNA, **config}))
    return folder


class Slow:
    """transformers 4.37's slow LlamaTokenizer, from its rules: what LLaVA was trained with."""

    def __init__(self, model: Path, *, legacy: bool, added: Sequence[str] = ()):
        self.model = sentencepiece.SentencePieceProcessor(model_file=str(model))
        proto = sentencepiece_proto(model)
        proto.normalizer_spec.add_dummy_prefix = False
        content = proto.SerializeToString()
        self.bare = sentencepiece.SentencePieceProcessor(model_proto=content)
        self.legacy = legacy
        self.special = ["<unk>", "<s>", "</s>", *added]

    def pieces(self, text: str) -> list[str]:
        if self.legacy or not text:
            return self.split(text)
        found = self.split("▁" + text.replace("▁", " "))
        return found[1:] if len(found) > 1 and found[0] == "▁" and found[1] in self.special else found

    def split(self, text: str) -> list[str]:
        found: list[str] = []
        for part in re.split("(" + "|".join(map(re.escape, self.special)) + ")", text):
            found += [part] if part in self.special else self.part(part)
        return found

    def part(self, text: str) -> list[str]:
        if self.legacy:
            return self.model.encode(text, out_type=str)
        if not text.startswith(("▁", " ")):
            return self.bare.encode(text, out_type=str)
        unknown = len(self.bare.encode("<unk>", out_type=str))
        return self.bare.encode("<unk>" + text, out_type=str)[unknown:]

    def ids(self, text: str) -> list[int]:
        return [self.model.piece_to_id(piece) for piece in self.pieces(text)]


def sentencepiece_proto(model: Path) -> Any:
    return pb.ModelProto.FromString(model.read_bytes())


TEXTS = (
    "What is this?", "", " ", "  ", "one two", " one", "   three", "two  spaces   three", "ends ", "a\n\n b\t\tc", "Größe ☃ 猫 🙂🙂",
    "a</s>b", "a</s> b", "a </s>b", "a </s> b", "</s>", "</s></s>a", "<s>USER: hi</s>USER: <unk> x", "<s> x", " <s>x", "x<s>",
    "▁x ▁", "1234567.89", "İ ﬁ Ⅻ ½", "\x00\x1f", "<0x0A>", "https://a.b/c?d=e&f", "x" * 40,
)  # fmt: skip


def random_texts(seed: int, count: int = 150) -> list[str]:
    chance = random.Random(seed)
    words = [
        "a",
        "the",
        "Hello",
        " ",
        "  ",
        "\n",
        "</s>",
        "<s>",
        "<unk>",
        "é",
        "猫",
        "🙂",
        ".",
        "USER:",
        "12",
        "\t",
        "▁",
        "[",
        "INST",
    ]
    return ["".join(chance.choices(words, k=chance.randint(1, 12))) for _ in range(count)]


@pytest.mark.parametrize("legacy", [True, False, None])
@pytest.mark.parametrize("name", NAMES)
def test_ids_are_those_of_llavas_tokenizer(name, legacy, tmp_path):
    model = MODELS[name]
    folder = folder_of(tmp_path / "t", model, **({} if legacy is None else {"legacy": legacy}))
    mine, slow = load_tokenizer(folder), Slow(model, legacy=legacy is not False)
    for text in (*TEXTS, *random_texts(len(name))):
        assert mine.encode(text) == slow.ids(text), text


@pytest.mark.parametrize("legacy", [True, False])
def test_added_tokens_are_split_out_as_by_llavas_tokenizer(legacy, tmp_path):
    """Longest first; white space beside one is kept unless the token takes it; also tokens that
    name a piece of the model."""
    model = MODELS["mistral"]
    size = 32768
    tokens = ["<pad>", "<image>", "<image>s", "[TOOL]"]
    added = {str(size + n): {"content": text, "special": n < 2} for n, text in enumerate(tokens)}
    added |= {
        "3": {"content": "[INST]", "special": True},
        "4": {"content": "[/INST]", "special": True},
    }
    folder = folder_of(tmp_path / "t", model, legacy=legacy, added_tokens_decoder=added)
    mine = load_tokenizer(folder)
    slow = Slow(
        model,
        legacy=legacy,
        added=[*sorted(tokens, key=len, reverse=True), "[INST]", "[/INST]"],
    )
    known = {text: size + n for n, text in enumerate(tokens)}
    for text in ("[INST] Hi [/INST]ok</s>", "a<image>b <image>s c", "<pad><image>\nx", "x [TOOL]  y", "a<image>"):
        wanted = [known.get(piece, slow.model.piece_to_id(piece)) for piece in slow.pieces(text)]
        assert mine.encode(text) == wanted, text
    assert mine.size == size + 4
    text = "see [TOOL] and [TOOL]"
    assert mine.decode([1, *mine.encode("<pad>" + text), 2]) == text


def test_an_added_token_may_take_the_white_space_beside_it(tmp_path):
    added = {"512": {"content": "<l>", "lstrip": True}, "513": {"content": "<r>", "rstrip": True}}
    tokenizer = load_tokenizer(
        folder_of(tmp_path / "t", MODELS["tiny"], added_tokens_decoder=added),
    )
    assert tokenizer.encode("a  <l> b") == [*tokenizer.encode("a"), 512, *tokenizer.encode(" b")]
    assert tokenizer.encode("a <r>  b") == [*tokenizer.encode("a "), 513, *tokenizer.encode("b")]


def test_every_control_piece_is_a_special_token():
    """Mistral's `[INST]` is one; the library itself would spell it letter by letter."""
    tokenizer = load_tokenizer(MODELS["mistral"])
    text = "[INST] What? [/INST] This.</s>"
    ids = tokenizer.encode(text)
    assert (ids[0], ids.count(3), ids.count(4), ids[-1]) == (3, 1, 1, 2)
    assert tokenizer.decode(ids).split() == ["What?", "This."]
    assert tokenizer.special("[INST]") == 3 and tokenizer.special("What") is None


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_as_tokenizer_json(name, legacy, tmp_path):
    """The tokenizer.json of an export gives the same ids by the library that reads it; a first
    space is the one exception."""
    tokenizer = load_tokenizer(folder_of(tmp_path / "t", MODELS[name], legacy=legacy))
    assert isinstance(tokenizer, SentencePieceTokenizer)
    written = JsonTokenizer(tokenizer.as_json())
    for text in (*TEXTS, *random_texts(7)):
        if "▁" in text or (not legacy and text.startswith(" ")):
            continue
        assert written.encode(text) == tokenizer.encode(text), text
    for text in ("USER", " b", "\n"):
        assert tokenizer.encode(tokenizer.gap + text, first=False) == tokenizer.encode(text)
    assert (written.bos, written.eos, written.size) == (tokenizer.bos, tokenizer.eos, tokenizer.size)


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("template", ["v1", "plain"])
@pytest.mark.parametrize("name", ["mistral", LLAMA2])
def test_prompts_are_tokenised_as_by_llava(name, template, legacy, tmp_path):
    """LLaVA splits a prompt at its images and hands each part to its tokenizer, which sees
    a new text each time."""
    model = MODELS[name]
    slow = Slow(model, legacy=legacy)
    tokenizer = load_tokenizer(folder_of(tmp_path / "t", model, legacy=legacy))
    encoder = Encoder(tokenizer, template, None, LAYOUT)
    rows = json.loads((DATA / "llava_prompts.json").read_text())["samples"]
    rows = [row for row in rows if template in row["expected"]]
    assert len(rows) >= 6
    for row in rows:
        wanted = [1]
        for number, part in enumerate(row["expected"][template]["prompt"].split("<image>")):
            wanted += [IMAGE] * (number > 0) + slow.ids(part)
        encoded = encoder.encode(as_sample(row))
        assert collapsed(encoded.tokens.tolist(), encoded.labels.tolist())[0] == wanted, row["id"]


@pytest.mark.parametrize("name", ["mistral", "tiny"])
def test_a_start_token_that_a_named_format_writes_is_no_gap(name, tmp_path):
    """LLaVA's llama_2 cuts the first `<s>` off its prompt: what follows is
    the beginning of a text."""
    model = MODELS[name]
    tokenizer = load_tokenizer(folder_of(tmp_path / "t", model, legacy=False))
    slow = Slow(model, legacy=False)
    turns = (
        Turn(role="user", text="Hi"),
        Turn(role="assistant", text="Yes."),
        Turn(role="user", text="No?"),
    )
    encoder = Encoder(tokenizer, "llama_2", "", LAYOUT)
    sample = Sample(source="t", id="0", turns=turns, images=())
    prompt = "[" + "INST] Hi [" + "/INST] Yes. </s><s>[" + "INST] No? [" + "/INST]"
    if name == "mistral":
        slow.special += ["[INST]", "[/INST]"]
    assert encoder.encode(sample, labels=False).tokens.tolist() == [1, *slow.ids(prompt)]


# A model that wants no space before a text (Yi's).


def train(**options: Any) -> bytes:
    """A SentencePiece model of a kind that SentencePiece itself makes."""
    written = io.BytesIO()
    sentences = [
        "the quick brown fox jumps over the lazy dog",
        "a cat, a dog and  two birds in 2 trees",
        "USER: what? ASSISTANT: that.",
    ]
    settings = {
        "model_type": "bpe",
        "vocab_size": 330,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "bos_piece": "<|startoftext|>",
        "eos_piece": "<|endoftext|>",
        **options,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences * 20),
        model_writer=written,
        minloglevel=2,
        **settings,
    )
    return written.getvalue()


YI = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "add_bos_token": False}


def no_prefix(kind: str, folder: Path, **config: Any) -> Path:
    """A folder whose text begins without a space: as the model says, or as
    tokenizer_config.json does."""
    if kind == "model":
        return folder_of(folder, train(add_dummy_prefix=False), **YI, **config)
    return folder_of(folder, train(), **YI, add_prefix_space=False, **config)


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("kind", ["model", "config"])
def test_no_space_is_put_before_a_text_that_wants_none(kind, legacy, tmp_path):
    tokenizer = load_tokenizer(no_prefix(kind, tmp_path / "t", legacy=legacy))
    assert isinstance(tokenizer, SentencePieceTokenizer)
    proto = sentencepiece_proto(tmp_path / "t" / "tokenizer.model")
    proto.normalizer_spec.add_dummy_prefix = False
    bare = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    end = bare.eos_id()
    written = JsonTokenizer(tokenizer.as_json())
    for text in ("the dog", " the dog", "two  birds", "\n"):
        assert tokenizer.encode(text) == bare.encode(text) == written.encode(text)
        assert tokenizer.encode("<|endoftext|>" + text) == [end, *bare.encode(text)]
        assert written.encode("<|endoftext|>" + text) == [end, *bare.encode(text)]
        assert tokenizer.decode(tokenizer.encode(text)) == text == written.decode(written.encode(text))
    assert (tokenizer.bos, tokenizer.start, tokenizer.gap) == (None, 1, "")
    assert not read_proto(tokenizer.model_proto).prefix


def test_settings_are_read_from_the_file():
    """Against protobuf's own reading."""
    for content in (
        MODELS["mistral"].read_bytes(),
        train(),
        train(add_dummy_prefix=False, user_defined_symbols=["<n>", "<t>"]),
        train(model_type="unigram", vocab_size=300),
    ):
        theirs = pb.ModelProto.FromString(content)
        mine = read_proto(content)
        assert mine.prefix == theirs.normalizer_spec.add_dummy_prefix
        assert mine.bpe == (theirs.trainer_spec.model_type == 2)
        assert mine.user_defined == {id for id, piece in enumerate(theirs.pieces) if piece.type == 4}


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram", "vocab_size": 300},
        {"normalization_rule_name": "nmt_nfkc"},
        {"byte_fallback": False, "vocab_size": 150},
    ],
)
def test_a_model_that_has_no_form_as_tokenizer_json_is_refused(options):
    with pytest.raises(ValueError, match=r"Llama's kind"):
        from_sentencepiece(train(**options))


# Import and export.


def model(folder: Path, tokens: Path, *, vocab: int, **config: Any) -> Path:
    """A tiny Llama with a tokenizer.model and no tokenizer.json."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    build(llama(vocab_size=vocab, max_position_embeddings=512, **sizes), folder)
    return folder_of(folder, tokens, **config)


SPACES = "transformers reads otherwise: several spaces together and spaces at the ends of a text"
CASES = [("mistral", template) for template in ("v1", "llama_2", "text")]


@pytest.mark.parametrize("legacy", [True, False, None])
@pytest.mark.parametrize(("name", "template"), [*CASES, pytest.param("llama2", "v1", marks=needs_llama2)])
def test_a_decoder_with_a_real_tokenizer_model(name, template, legacy, tmp_path, capsys):
    """Imported and exported: transformers' ids of the export are SentencePiece's, where those
    of the folder were not."""
    config = {} if legacy is None else {"legacy": legacy}
    size = load_tokenizer(MODELS[name]).size
    model(tmp_path / "hf", MODELS[name], vocab=size, **config)
    api.import_checkpoint([tmp_path / "hf"], tmp_path / "neva", options=Options(template=template))
    said = capsys.readouterr().out
    assert SPACES in said
    assert ("does not say `legacy`" in said) == (legacy is None)
    api.export_checkpoint(tmp_path / "neva", tmp_path / "out")
    assert ("transformers reads otherwise" in capsys.readouterr().out) == (legacy is False)
    text = "Two  spaces,   three."
    own = sentencepiece.SentencePieceProcessor(model_file=str(MODELS[name])).encode(text)
    before, after = (tf.AutoTokenizer.from_pretrained(tmp_path / part) for part in ("hf", "out"))
    assert before(text, add_special_tokens=False).input_ids != own
    assert after(text, add_special_tokens=False).input_ids == own
    encoder = load(tmp_path / "neva").encoder
    for question in ("Hi  there", " spaces before"):
        turns = (Turn(role="user", text=question),)
        sample = Sample(source="t", id="0", turns=turns, images=())
        talk = [{"role": "user", "content": question}]
        theirs = after.apply_chat_template(talk, add_generation_prompt=True)["input_ids"]
        assert encoder.encode(sample, labels=False).tokens.tolist() == theirs


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("template", ["v1", "plain", "llama_2"])
def test_an_exported_llava_with_a_real_tokenizer_model(template, legacy, tmp_path):
    """The text behind an image begins with a space, as LLaVA reads it, also where the text
    behind `</s>` does not."""
    model(tmp_path / "hf", MODELS["mistral"], vocab=32768, legacy=legacy)
    build(clip(), tmp_path / "clip")
    api.import_checkpoint(
        [tmp_path / "hf", tmp_path / "clip"],
        tmp_path / "neva",
        options=Options(template=template),
    )
    loaded = load(tmp_path / "neva")
    if template == "v1":
        sample = as_sample(
            {
                "id": "0",
                "image": "x",
                "conversations": [{"from": "human", "value": "<image>\nWhat?"}],
            }
        )
        ids = loaded.encoder.encode(sample, labels=False).tokens.tolist()
        behind = ids[len(ids) - ids[::-1].index(IMAGE) :]
        assert behind == Slow(MODELS["mistral"], legacy=legacy).ids("\nWhat? ASSISTANT:")
    api.export_checkpoint(tmp_path / "neva", tmp_path / "out")  # which compares prompts with images


CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ 'QUERY ' + m.content + ' REPLY' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
"""A chat template that writes the start token itself, as Llama-2's."""


@pytest.mark.parametrize("legacy", [True, False])
def test_an_exported_llava_whose_own_template_writes_the_start_token(legacy, tmp_path):
    """With `legacy: false` the text behind the start token begins with no space, in transformers of the decoder as of the export."""
    model(tmp_path / "hf", MODELS["mistral"], vocab=32768, legacy=legacy, chat_template=CHAT)
    build(clip(), tmp_path / "clip")
    api.import_checkpoint([tmp_path / "hf", tmp_path / "clip"], tmp_path / "neva")
    sample = Sample(source="t", id="0", turns=(Turn(role="user", text="What?"),), images=())
    ids = load(tmp_path / "neva").encoder.encode(sample, labels=False).tokens.tolist()
    assert ids == Slow(MODELS["mistral"], legacy=legacy).ids("<s>QUERY What? REPLY")
    api.export_checkpoint(tmp_path / "neva", tmp_path / "out")  # which compares prompts with images
    processor = tf.AutoProcessor.from_pretrained(tmp_path / "out")
    talk = [{"role": "user", "content": [{"type": "text", "text": "What?"}]}]
    theirs = processor.apply_chat_template(talk, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert torch.tensor(theirs["input_ids"]).flatten().tolist() == ids


@pytest.mark.parametrize("kind", ["model", "config"])
def test_a_decoder_that_wants_no_space_before_a_text(kind, tmp_path, capsys):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    build(llama(vocab_size=330, max_position_embeddings=512, **sizes), tmp_path / "hf")
    no_prefix(kind, tmp_path / "hf", legacy=True)
    api.import_checkpoint([tmp_path / "hf"], tmp_path / "neva", options=Options(template="v1"))
    assert ("this file wants no space before it" in capsys.readouterr().out) == (kind == "model")
    api.export_checkpoint(tmp_path / "neva", tmp_path / "out")
    theirs = tf.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.decode(theirs("the dog").input_ids) == "the dog"
    assert theirs("the dog").input_ids == load_tokenizer(tmp_path / "hf").encode("the dog")


class Other:
    """transformers' tokenizer of a folder, but for what `change` does to its ids."""

    def __init__(self, folder: Path, change: Any):
        self.tokenizer = tf.AutoTokenizer.from_pretrained(folder)
        self.change = change

    def __call__(self, text: str, **how: Any) -> Any:
        found = self.tokenizer(text, **how)
        found["input_ids"] = self.change(text, found["input_ids"])
        return found


FAULTS = {
    "another id": lambda text, ids: [ids[0] + 1, *ids[1:]],
    "another id on spaces, and on the same text without": lambda text, ids: ids[:-1] if "spaces" in text else ids,
    "an end token": lambda text, ids: [*ids, 2],
    "behind a special token": lambda text, ids: [*ids[:-1], 5] if "</s>" in text else ids,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_no_other_difference_to_transformers_is_accepted(fault, tmp_path, monkeypatch):
    model(tmp_path / "hf", MODELS["mistral"], vocab=32768)
    other = Other(tmp_path / "hf", FAULTS[fault])
    monkeypatch.setattr(tf.AutoTokenizer, "from_pretrained", lambda *_, **__: other)
    with pytest.raises(CheckpointError, match="gives other ids in transformers"):
        api.import_checkpoint([tmp_path / "hf"], tmp_path / "neva", options=Options(template="v1"))
    assert not list(tmp_path.glob("neva*"))


def test_ids_that_are_not_sentencepieces_are_refused(tmp_path, monkeypatch):
    model(tmp_path / "hf", MODELS["mistral"], vocab=32768)
    honest = SentencePieceTokenizer.encode
    monkeypatch.setattr(
        SentencePieceTokenizer,
        "encode",
        lambda self, text, first=True: honest(self, text)[::-1],
    )
    with pytest.raises(
        CheckpointError,
        match="gives other ids in SentencePiece for 'What is this\\?'",
    ):
        api.import_checkpoint([tmp_path / "hf"], tmp_path / "neva", options=Options(template="v1"))
    assert not list(tmp_path.glob("neva*"))


def test_a_saved_tokenizer_keeps_what_stood_beside_it(tmp_path):
    """Through a checkpoint: added tokens, `legacy` and the end token."""
    added = {"32768": {"content": "<|im_end|>", "special": True}}
    folder = folder_of(
        tmp_path / "t",
        MODELS["mistral"],
        legacy=False,
        eos_token="<|im_end|>",
        added_tokens_decoder=added,
    )
    before = load_tokenizer(folder)
    before.save(tmp_path / "saved")
    shutil.rmtree(folder)
    after = load_tokenizer(tmp_path / "saved")
    assert (after.eos, after.size, after.gap) == (before.eos, before.size, before.gap) == (32768, 32769, " ")
    assert after.encode("a<|im_end|>b") == before.encode("a<|im_end|>b")
    assert isinstance(after, SentencePieceTokenizer)
    assert JsonTokenizer(after.as_json()).eos == 32768
