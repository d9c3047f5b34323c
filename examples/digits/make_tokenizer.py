"""Make the demo's tokenizer: byte-level BPE with 512 tokens, learned from the demo's own texts.

Every byte is a token, so that any text can be written with it. Usage: python examples/digits/make_tokenizer.py FOLDER
(FOLDER is the demo's data folder; the result goes to neva/recipes/tokenizer/tokenizer.json).
"""

import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers


def main(folder: Path, target: Path) -> None:
    """Learn from the texts of train.json in `folder`; write to `target`."""
    rows = json.loads((folder / "train.json").read_text())
    texts = [f"USER: {turn['value'].replace('<image>', '')} ASSISTANT: {turn['value']}" for row in rows for turn in row["conversations"]]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    target.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(target))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(__file__).resolve().parents[2] / "neva" / "recipes" / "tokenizer" / "tokenizer.json")
