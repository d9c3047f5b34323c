"""The gate's other half: a folder's tokenizer and processors, asked through transformers, give the ids and pixels of `neva generate`."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from PIL import Image

from neva.batch import IMAGE, NEWLINE
from neva.checkpoint.manifest import CheckpointError
from neva.checkpoint.parity import loading
from neva.data.encode import Encoder
from neva.data.image import to_tiles
from neva.data.sample import MARKER, Sample, Turn
from neva.data.templates import find_template
from neva.data.tokenizer import SentencePieceTokenizer, Tokenizer
from neva.data.vocabularies import WITHOUT_PREFIX
from neva.models.vit import VisionConfig, normalise

TEXTS = ("What is this?", "Two  spaces,\ttabs\nand breaks: naïve café 日本 🙂 1234567", "It's 3.14, isn't it? [INST] {x} <b>")
"""None begins with a space: versions of transformers differ on those of a SentencePiece model."""
PLAIN = (
    TEXTS[0],
    "Tabs,\tbreaks\nand more: naïve café 日本 🙂 1234567",
    "It's 3.14, isn't it? {x} <b>",
)
"""Texts that transformers must split as SentencePiece does."""
SPACED = ("Two  spaces", "x   y    z", " one before", "   three before", "and one behind ")
"""Texts on which transformers 5 differs: it joins spaces by their place in the
vocabulary, not by their score."""
TALKS: dict[str, tuple[tuple[int, str, str], ...]] = {
    "a question": ((0, "user", TEXTS[1]),),
    "three turns": ((0, "user", TEXTS[0]), (0, "assistant", "A cat."), (0, "user", TEXTS[2])),
    "a system message": ((0, "system", "Be brief."), (0, "user", TEXTS[0])),
    "an image": ((1, "user", TEXTS[0]),),
    "an image and three turns": ((1, "user", TEXTS[0]), (0, "assistant", "A cat."), (0, "user", TEXTS[2])),
    "two images": ((2, "user", TEXTS[0]),),
}
"""Name of a conversation -> (images, role, text) of each turn."""
PIXELS = 1e-5
"""Largest difference of normalised pixels: both round differently."""

REBUILT = "its class there does not follow tokenizer.json, which is what counts here"
"""Why a tokenizer.json gives other ids in transformers 5: some model types build their own from its vocabulary."""


def compare_prompts(folder: Path, encoder: Encoder, vision: VisionConfig | None) -> str:
    """A line on how many prompts have equal ids, and how far pixels are apart. CheckpointError for the first prompt that is another there."""
    import transformers

    images = encoder.layout.images
    rebuilt = ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind = transformers.AutoProcessor if images else transformers.AutoTokenizer
        with loading(folder):
            theirs: Any = kind.from_pretrained(folder, trust_remote_code=False)
        if not images:
            plain = transformers.PreTrainedTokenizerFast.from_pretrained(
                folder,
                trust_remote_code=False,
            )
            if any(theirs(text).input_ids != plain(text).input_ids for text in TEXTS):
                # see REBUILT
                rebuilt = type(theirs).__name__
                theirs = plain
    equal, apart, caption = 0, 0.0, find_template(encoder.template, encoder.tokenizer).caption
    for name, talk in TALKS.items():
        pictures = tuple(_picture(number) for number in range(sum(count for count, _, _ in talk)))
        if (pictures and not images) or (caption and len(talk) > 1):
            continue
        turns = tuple(Turn(role=role, text=f"{MARKER}\n" * count + text) for count, role, text in talk)  # type: ignore[arg-type]
        sample = Sample(source="prompt", id=name, turns=turns, images=pictures)
        try:
            mine = encoder.encode(sample, labels=False)
        except ValueError:  # the template takes no such conversation
            continue
        given = _theirs(theirs, talk, pictures, images)
        wanted = theirs.image_token_id if images else -1
        ids = torch.where((mine.tokens == IMAGE) | (mine.tokens == NEWLINE), wanted, mine.tokens).tolist()
        if given["input_ids"] != ids:
            raise CheckpointError(_otherwise(name, ids, given["input_ids"], folder))
        if pictures and vision is not None:
            tiles = torch.cat([to_tiles(picture, encoder.layout) for picture in pictures])
            apart = max(apart, float((normalise(tiles, vision.mean, vision.std) - given["pixel_values"][: len(tiles)]).abs().max()))
        equal += 1
    if not equal:
        raise CheckpointError(f"{folder}: its template takes none of {', '.join(TALKS)}, so no prompt can be compared (--no-parity publishes it).")
    if apart > PIXELS:
        raise CheckpointError(f"{folder}: transformers' image processor gives pixels that differ by {apart:.2e} from those that the model is fed.")
    line = f"Prompts: {equal} of {equal} have transformers' token ids"
    if images:
        line += f"; largest difference of pixels {apart:.1e}"
    if isinstance(encoder.tokenizer, SentencePieceTokenizer):
        plain = theirs.tokenizer if images else theirs
        odd = _beside_sentencepiece(folder, encoder.tokenizer, plain)
        line += f"\nTokenizer: {odd}" if odd else ""
    if rebuilt:
        line += (
            f"\nwarning: AutoTokenizer reads {folder} as {rebuilt}, which splits texts otherwise: "
            f"{REBUILT}. Read it with PreTrainedTokenizerFast.from_pretrained."
        )
    return line


def compare_texts(folder: Path, tokenizer: Tokenizer) -> str:
    """A line for an import: our tokenizer gives transformers' ids. CheckpointError for a text that it splits otherwise."""
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            theirs = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # code beside the weights, or a library that is not installed
            return f"Tokenizer: NOT COMPARED, transformers cannot read it ({str(error).splitlines()[0][:100]})"
    if isinstance(tokenizer, SentencePieceTokenizer):
        odd = _beside_sentencepiece(folder, tokenizer, theirs)
        return f"Tokenizer: {odd or 'ids of texts are those of SentencePiece and transformers'}"
    for text in TEXTS:
        mine, ids = tokenizer.encode(text), theirs(text, add_special_tokens=False).input_ids
        if mine != ids and (folder / "tokenizer.json").is_file():
            return f"warning: {_otherwise(repr(text), mine, ids, folder, advice=REBUILT)}"
        if mine != ids:
            raise CheckpointError(_otherwise(repr(text), mine, ids, folder))
    return f"Tokenizer: {len(TEXTS)} of {len(TEXTS)} texts have transformers' token ids"


def _beside_sentencepiece(folder: Path, tokenizer: SentencePieceTokenizer, theirs: Any) -> str:
    """What to say of a SentencePiece model that transformers reads otherwise than
    SentencePiece; empty if it does not.

    Ours must give SentencePiece's ids of every text. Theirs may differ on spaces, on the space
    before a text where the file wants none, and behind a special token where the folder does not
    say which way: CheckpointError for all else.
    """
    own = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_proto)
    inner = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_proto + WITHOUT_PREFIX)
    prefixed = own.encode("a") != inner.encode("a")
    kinds: list[str] = []
    for text in (*PLAIN, *SPACED):
        mine = tokenizer.encode(text)
        if mine != own.encode(text):
            raise CheckpointError(
                _otherwise(repr(text), mine, own.encode(text), folder, whose="SentencePiece"),
            )
        ids = theirs(text, add_special_tokens=False).input_ids
        if ids == mine:
            continue
        single = re.sub(" +", " ", text).strip(" ")
        read = theirs(single, add_special_tokens=False).input_ids
        if read not in (inner.encode(" " + single), inner.encode(single)):
            raise CheckpointError(_otherwise(repr(text), mine, ids, folder))
        spaced = read == inner.encode(" " + single)
        kinds.append(SPACES if spaced == prefixed else NO_FIRST if prefixed else FIRST_SPACE)
    name = own.id_to_piece(own.eos_id())
    behind = f"a{name}b"
    mine = tokenizer.encode(behind)
    ids = theirs(behind, add_special_tokens=False).input_ids
    if mine != ids and NO_FIRST not in kinds and FIRST_SPACE not in kinds:
        if tokenizer.says_legacy or ids != [*own.encode("a"), own.eos_id(), *inner.encode("b")]:
            raise CheckpointError(_otherwise(repr(behind), mine, ids, folder))
        kinds.append(BEHIND)
    if not kinds:
        return ""
    listed = ", ".join(dict.fromkeys(kinds))
    return f"transformers reads otherwise: {listed}; neva follows SentencePiece"


SPACES = "several spaces together and spaces at the ends of a text"
FIRST_SPACE = "the start of a text (this file wants no space before it)"
NO_FIRST = "the start of a text (there it puts no space before it)"
BEHIND = "the text behind a special token (tokenizer_config.json does not say `legacy`)"
"""Where transformers 5 may differ from SentencePiece and from LLaVA."""


def _theirs(theirs: Any, talk: tuple[tuple[int, str, str], ...], pictures: tuple[Image.Image, ...], images: bool) -> dict[str, Any]:
    """What transformers makes of a conversation: ids, and pixels if there are pictures."""
    left = list(pictures)
    messages = []
    for count, role, text in talk:
        shown: list[dict[str, Any]] = [{"type": "image", "image": left.pop(0)} for _ in range(count)]
        messages.append({"role": role, "content": [*shown, {"type": "text", "text": text}] if images else text})
    made = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    ids = made["input_ids"]
    ids = ids.tolist() if isinstance(ids, torch.Tensor) else ids
    found: dict[str, Any] = {"input_ids": ids[0] if ids and isinstance(ids[0], list) else ids}
    if pictures:
        pixels = made["pixel_values"]
        pixels = pixels if isinstance(pixels, list) else [pixels]
        found["pixel_values"] = torch.cat([torch.as_tensor(part).reshape(-1, *torch.as_tensor(part).shape[-3:]) for part in pixels])
    return found


def _picture(number: int) -> Image.Image:
    """A picture that is no square, so that padding and cropping show."""
    generator = torch.Generator().manual_seed(number)
    pixels = torch.randint(0, 256, (30 + 7 * number, 45, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def _otherwise(
    name: str,
    mine: list[int],
    theirs: list[int],
    folder: Path,
    *,
    advice: str = "--no-parity publishes it all the same",
    whose: str = "transformers",
) -> str:
    at = next((n for n, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), min(len(mine), len(theirs)))
    near = slice(max(0, at - 2), at + 6)
    shown = f"ours has {json.dumps(mine[near])}, {whose} {json.dumps(theirs[near])}"
    differ = f"its tokenizer gives other ids in {whose} for {name}, from token {at} on"
    return f"{folder}: {differ}: {shown} ({advice})."
