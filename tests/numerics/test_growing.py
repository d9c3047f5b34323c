"""Tokens that were added to a tokenizer and not to the model: taken with a warning, refused in a
prompt, and trained with new rows."""

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
import torch

from neva import api
from neva.checkpoint import index
from neva.checkpoint.hf import Options
from neva.checkpoint.manifest import CheckpointError
from neva.data.tokenizer import load_tokenizer
from neva.infer.generate import load
from tests.families import build, llama
from tests.numerics.test_init import TINY
from tests.oracle.test_convert import add_text, whole

CASE = Path(__file__).parents[1] / "data" / "cases" / "added-tokens"
DATA = (
    "data.sources=[]",
    f"data.source={CASE / 'data.json'}",
    f"data.image_folder={CASE / 'images'}",
    "data.pool=2",
)
SETTINGS = (
    *[text for text in TINY if "sources" not in text],
    *DATA,
    "steps=1",
    "trainable=[projector.*]",
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NEVA_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_is_trained_with_tokens_that_it_did_not_have(tied, tmp_path):
    """The case's tokenizer has 200 tokens more. What the error says to set works, and the rows are
    the old ones and their mean."""
    whole(tmp_path / "hf", tie_word_embeddings=tied)
    api.import_checkpoint([tmp_path / "hf"], tmp_path / "neva", options=Options(template="v1"))
    stage = [
        *SETTINGS,
        f"init={tmp_path / 'neva'}",
        f"data.tokenizer={CASE / 'tok'}",
        f"out={tmp_path / 'run'}",
    ]
    with pytest.raises(
        ValueError,
        match=r"576 tokens but .*vocab=390; set (model\.decoder\.vocab=576);",
    ):
        api.train("llava-tiny/finetune", stage, say=lambda text: None)
    said: list[str] = []
    last = api.train("llava-tiny/finetune", [*stage, "model.decoder.vocab=576"], say=said.append)
    assert any("The vocabulary grows from 390 to 576" in line for line in said)
    names = ["decoder.embed.weight", *([] if tied else ["head.weight"])]
    for name in names:
        before = index.read(tmp_path / "neva" / "weights", name)
        after = index.read(last / "weights", name)
        assert torch.equal(after[:390], before)
        mean = before.double().mean(0)
        assert after.shape[0] == 576 and (after[390:].double() - mean).abs().max() < 1e-6
    loaded = load(last)
    (answer,) = api.generate(loaded, prompt="Where is <loc_1>?", max_new_tokens=3)
    assert answer["tokens"] <= 3
    api.export_checkpoint(tmp_path / "run", tmp_path / "out", say=lambda text: None)


def test_a_vocabulary_does_not_shrink(tmp_path):
    whole(tmp_path / "hf")
    api.import_checkpoint([tmp_path / "hf"], tmp_path / "neva", options=Options(template="v1"))
    stage = [
        *SETTINGS,
        f"init={tmp_path / 'neva'}",
        "model.decoder.vocab=380",
        f"out={tmp_path / 'run'}",
    ]
    with pytest.raises(ValueError, match="is of another model: decoder"):
        api.train("llava-tiny/finetune", stage, say=lambda text: None)


def with_added(folder: Path, kind: str, count: int, *, pad: bool) -> int:
    """A decoder whose tokenizer has so many tokens beyond the embedding; gives
    the embedding's rows."""
    names = ["<pad>", *(f"<extra_{n}>" for n in range(count - 1))]
    rows = 376 if kind == "json" else 32768
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    build(
        llama(
            vocab_size=rows,
            max_position_embeddings=512,
            bos_token_id=0,
            eos_token_id=1,
            **sizes,
        ),
        folder,
    )
    config = {"pad_token": "<pad>"} if pad else {}
    if kind == "json":
        add_text(folder, image=False, pad=False)
        model = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        model.add_special_tokens(names)
        model.save(str(folder / "tokenizer.json"))
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
        return rows
    shutil.copy(
        Path(__file__).parents[1] / "data" / "tokenizers" / "mistral" / "tokenizer.model",
        folder,
    )
    listed = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "legacy": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps({**listed, **config}))
    (folder / "added_tokens.json").write_text(
        json.dumps({name: rows + n for n, name in enumerate(names)}),
    )
    return rows


@pytest.mark.parametrize(("kind", "count"), [("json", 1), ("json", 3), ("sentencepiece", 1), ("sentencepiece", 4)])
def test_a_few_tokens_beyond_the_embedding_are_taken(kind, count, tmp_path, capsys):
    rows = with_added(tmp_path / "hf", kind, count, pad=True)
    api.import_checkpoint([tmp_path / "hf"], tmp_path / "neva", options=Options(template="v1"))
    assert f"{count} of its tokenizer's added tokens have no row in the embedding ({rows} rows)" in capsys.readouterr().out
    loaded = load(tmp_path / "neva")
    assert loaded.encoder.tokenizer.size == rows + count
    (answer,) = api.generate(loaded, prompt="Hi", max_new_tokens=2)
    assert answer["tokens"] <= 2
    with pytest.raises(
        ValueError,
        match=f"holds '<pad>', a token \\(number {rows}\\) that was added to the tokenizer",
    ):
        list(api.generate(loaded, prompt="Hi <pad>", max_new_tokens=2))
    api.export_checkpoint(tmp_path / "neva", tmp_path / "out")
    pad = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["pad_token"]
    assert pad == "</s>"  # <pad> has no row: a batch of unlike prompts would end with an error


@pytest.mark.parametrize("fault", ["too many", "not added later"])
def test_a_tokenizer_of_another_model_is_still_refused(fault, tmp_path):
    rows = with_added(tmp_path / "hf", "json", 65 if fault == "too many" else 1, pad=False)
    if fault == "not added later":
        file = tmp_path / "hf" / "tokenizer.json"
        written = json.loads(file.read_text())
        written["added_tokens"] = [token for token in written["added_tokens"] if token["id"] < rows]
        written["model"]["vocab"]["<own>"] = rows
        file.write_text(json.dumps(written))
    assert load_tokenizer(tmp_path / "hf").size > rows
    with pytest.raises(CheckpointError, match="they are not of one model"):
        api.import_checkpoint([tmp_path / "hf"], tmp_path / "neva")
