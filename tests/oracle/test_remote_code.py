"""A model's folder may bring Python files that transformers would run: neva never lets it, whatever
is typed at the prompt."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import transformers as tf

from tests.families import build, llama, siglip
from tests.oracle.test_convert import SIZE, add_text
from tests.runs import ENVIRONMENT, ROOT, neva

CODE = """
from pathlib import Path
Path({canary!r}).write_text("this ran")
from transformers import LlamaConfig as Config, LlamaForCausalLM as Model, PreTrainedTokenizerFast as Tokenizer
"""


def with_code(folder: Path, canary: Path, file: str, described: dict) -> Path:
    """The folder with a module beside its weights, which `file` names for transformers to run."""
    (folder / "theirs.py").write_text(CODE.format(canary=str(canary)))
    path = folder / file
    fields = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**fields, **described}))
    return folder


def answer_yes(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command, by a user who would answer each question with y."""
    return subprocess.run(
        neva(*arguments),
        input="y\n" * 20,
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=100,
    )


@pytest.fixture
def decoder(tmp_path: Path) -> Path:
    """A tiny Llama with the demo's tokenizer."""
    build(
        llama(vocab_size=SIZE + 14, max_position_embeddings=512, bos_token_id=0, eos_token_id=1),
        tmp_path / "hf",
    )
    add_text(tmp_path / "hf", image=False, pad=False)
    return tmp_path / "hf"


TOKENIZER = {
    "tokenizer_class": "Mine",
    "auto_map": {"AutoTokenizer": ["theirs.Tokenizer", "theirs.Tokenizer"]},
}
MODEL = {
    "auto_map": {
        "AutoConfig": "theirs.Config",
        "AutoModelForCausalLM": "theirs.Model",
        "AutoModel": "theirs.Model",
    }
}


def test_the_canary_would_sing(decoder: Path, tmp_path: Path) -> None:
    """What the other tests rule out does happen where transformers is asked to trust the folder."""
    with_code(decoder, tmp_path / "canary", "tokenizer_config.json", TOKENIZER)
    trusting = f"import transformers as t; t.AutoTokenizer.from_pretrained({str(decoder)!r}, trust_remote_code=True)"
    subprocess.run(
        [sys.executable, "-c", trusting],
        env=ENVIRONMENT | {"HF_HOME": str(tmp_path / "cache")},
        check=True,
        timeout=100,
    )
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize(("file", "described"), [("tokenizer_config.json", TOKENIZER), ("config.json", MODEL)], ids=["tokenizer", "model"])
def test_import_runs_no_file_of_the_folder(
    decoder: Path,
    tmp_path: Path,
    file: str,
    described: dict,
) -> None:
    with_code(decoder, tmp_path / "canary", file, described)
    done = answer_yes("import", decoder, "--out", tmp_path / "neva")
    assert done.returncode == 0, done.stderr
    assert "[y/N]" not in done.stdout + done.stderr
    assert not (tmp_path / "canary").exists()


def test_an_encoder_of_transformers_runs_no_file_of_the_folder(tmp_path: Path) -> None:
    """One that neva does not compute itself is built by transformers, from its config.json."""
    config = tf.Dinov2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    build(config, tmp_path / "hf")
    processor = {
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "size": {"height": 28, "width": 28},
        "do_center_crop": False,
    }
    (tmp_path / "hf" / "preprocessor_config.json").write_text(json.dumps(processor))
    with_code(tmp_path / "hf", tmp_path / "canary", "config.json", MODEL)
    done = answer_yes("import", tmp_path / "hf", "--out", tmp_path / "neva")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "canary").exists()


def test_a_model_type_of_the_folders_own_is_refused(tmp_path: Path) -> None:
    build(siglip(), tmp_path / "hf")
    with_code(tmp_path / "hf", tmp_path / "canary", "config.json", {"model_type": "mine", **MODEL})
    done = answer_yes("import", tmp_path / "hf", "--out", tmp_path / "neva")
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "mine" in done.stderr
    assert not (tmp_path / "canary").exists() and not (tmp_path / "neva").exists()
