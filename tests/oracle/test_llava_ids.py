"""Our token ids and labels against LLaVA's own preprocessing (its `v1`, `v0`, `llama_2` and `plain`, run with its LlamaTokenizer).

`tests/data/llava_prompts.json` holds what does not depend on the tokenizer: LLaVA's prompts and the texts that it puts loss on.
The ids themselves need Llama-2's tokenizer, which we may not ship; they are compared where the shared data folder has it. Qwen's and GPT-2's
tokenizers are in `tests/data/tokenizers`.
"""

import gzip
import json
from itertools import groupby
from pathlib import Path

import pytest
import torch
from PIL import Image

from neva.batch import IGNORE, IMAGE, ImageLayout
from neva.data.encode import Encoder
from neva.data.sample import Sample, Turn
from neva.data.tokenizer import JsonTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer

torch.set_num_threads(1)
DATA = Path(__file__).parents[1] / "data"
SHARED = Path(__file__).parents[3] / "shared" / "data"
LAYOUT = ImageLayout(tile=8, tokens_per_tile=3)
needs_shared = pytest.mark.skipif(not (SHARED / "llava_preprocess").is_dir(), reason=f"needs LLaVA's ids and Llama-2's tokenizer in {SHARED}")


def as_sample(row: dict) -> Sample:
    roles = {"human": "user", "gpt": "assistant"}
    turns = tuple(Turn(role=roles[turn["from"]], text=turn["value"]) for turn in row["conversations"])
    images = (Image.new("RGB", (8, 8)),) if row.get("image") else ()
    return Sample(source="oracle", id=row["id"], turns=turns, images=images)


def collapsed(ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
    """An image as one placeholder, as LLaVA writes it."""
    kept = [i for i, id in enumerate(ids) if id != IMAGE or i == 0 or ids[i - 1] != IMAGE]
    return [ids[i] for i in kept], [labels[i] for i in kept]


@needs_shared
@pytest.mark.parametrize("template", ["v1", "plain", "llama_2", "v0"])
def test_ids_and_labels_equal_llavas(template: str) -> None:
    samples = {row["id"]: row for row in json.loads((SHARED / "llava_preprocess/samples.json").read_text())}
    expected = json.loads((SHARED / "llava_preprocess/expected.json").read_text())[template]
    encoder = Encoder(load_tokenizer(SHARED / "tokenizers/llama2/tokenizer.model"), template, None, LAYOUT)
    assert len(expected) >= 30
    for row in expected:
        encoded = encoder.encode(as_sample(samples[row["id"]]))
        ids, labels = collapsed(encoded.tokens.tolist(), encoded.labels.tolist())
        assert ids == row["input_ids"], row["id"]
        assert labels == row["labels"], row["id"]


def unpacked(folder: Path, name: str) -> Path:
    """The shipped tokenizer's files, which lie compressed in tests/data; gives the folder."""
    for packed in sorted((DATA / "tokenizers" / name).glob("*.gz")):
        (folder / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))
    return folder


def assert_equal_to_llama_cpps(tokenizer: Tokenizer, name: str) -> None:
    folder = DATA / "tokenizers" / "expected_ids"
    texts = (folder / f"{name}.inp").read_text().split("\n__ggml_vocab_test__\n")
    lines = (folder / f"{name}.out").read_text().splitlines()
    assert len(lines) >= 46
    for text, line in zip(texts, lines, strict=False):
        assert tokenizer.encode(text) == [int(id) for id in line.split()], text


@pytest.mark.parametrize(("name", "file"), [("qwen2", "qwen/qwen.tiktoken"), ("gpt-2", "gpt2/encoder.json")])
def test_ids_equal_llama_cpps(name: str, file: str, tmp_path: Path) -> None:
    """tiktoken's ranks and GPT-2's pair of files give the ids that llama.cpp expects of them."""
    folder, _, own = file.partition("/")
    assert_equal_to_llama_cpps(load_tokenizer(unpacked(tmp_path, folder) / own), name)


@needs_shared
@pytest.mark.parametrize(("name", "file"), [("llama-spm", "llama2"), ("llama-bpe", "llama3")])
def test_ids_of_llamas_own_tokenizers_equal_llama_cpps(name: str, file: str) -> None:
    assert_equal_to_llama_cpps(load_tokenizer(SHARED / "tokenizers" / file / "tokenizer.model"), name)


@needs_shared
def test_sentencepiece_as_json_keeps_the_ids() -> None:
    """The tokenizer.json that an export writes for a SentencePiece model gives the same ids, special tokens inside a text included."""
    tokenizer = load_tokenizer(SHARED / "tokenizers/llama2/tokenizer.model")
    assert isinstance(tokenizer, SentencePieceTokenizer)
    written = JsonTokenizer(tokenizer.as_json())
    listed = (DATA / "tokenizers/expected_ids/llama-spm.inp").read_text()
    texts = listed.split("\n__ggml_vocab_test__\n")
    texts += ["USER: <s>a</s>b ASSISTANT: yes</s>USER: no", "</s>\n\nx", " a  b ", "ä€😀\x00"]
    for text in texts:
        assert written.encode(text) == tokenizer.encode(text), text
    assert (written.bos, written.eos, written.size) == (tokenizer.bos, tokenizer.eos, tokenizer.size)


@needs_shared
def test_sentencepiece_ids_equal_the_reference() -> None:
    tokenizer = load_tokenizer(SHARED / "tokenizers/llama2/tokenizer.model")
    reference = [json.loads(line) for line in (SHARED / "tokenizers/reference_encodings.jsonl").read_text().splitlines()]
    plain = [row for row in reference if "s>" not in row["text"]]  # the reference does not split at special tokens
    assert len(plain) > 50
    for row in plain:
        assert tokenizer.encode(row["text"]) == row["llama2"]


def text_of(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The prompt that ids spell: images and end tokens written out, the text between decoded span by span."""
    spelled = {IMAGE: "<image>", tokenizer.eos: "</s>", tokenizer.bos: ""}
    text = ""
    for special, run in groupby(ids, key=lambda id: id if id in spelled else None):
        run = list(run)
        text += tokenizer.decode(run) if special is None else spelled[special] * len(run)
    return text


@pytest.mark.parametrize("template", ["v1", "plain"])
def test_prompts_and_labelled_texts_equal_llavas(template: str) -> None:
    tokenizer = load_tokenizer(DATA / "tiny.model")
    encoder = Encoder(tokenizer, template, None, LAYOUT)
    rows = [row for row in json.loads((DATA / "llava_prompts.json").read_text())["samples"] if template in row["expected"]]
    assert len(rows) >= 6
    for row in rows:
        encoded = encoder.encode(as_sample(row))
        ids, labels = collapsed(encoded.tokens.tolist(), encoded.labels.tolist())
        assert text_of(tokenizer, ids) == row["expected"][template]["prompt"]
        runs = [list(run) for learnt, run in groupby(labels, key=lambda label: label != IGNORE) if learnt]
        assert [text_of(tokenizer, run) for run in runs] == row["expected"][template]["labelled"]
