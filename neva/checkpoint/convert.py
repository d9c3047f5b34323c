"""`neva import`: read, plan, write, prove equal, publish."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from neva.checkpoint import gate, index, parity, stream
from neva.checkpoint import hf as folders
from neva.checkpoint.chat import chat_format
from neva.checkpoint.foreign import is_foreign, is_projector
from neva.checkpoint.hf import Options, Plan, Source
from neva.checkpoint.manifest import CheckpointError
from neva.checkpoint.nemo import is_nemo, is_neva, read_nemo
from neva.checkpoint.pixels import compare_images
from neva.checkpoint.prompts import compare_texts
from neva.checkpoint.shards import lfs_pointer, read_json
from neva.data.encode import check_tags
from neva.data.sample import MARKER
from neva.data.templates import OWN, find_template
from neva.data.tokenizer import FILES, Tokenizer, load_tokenizer

MOST_BEYOND = 64
"""Most tokens that a tokenizer may have beyond the embedding, if all of them were added to it later
(CodeLlama-34b, Llama-2 with `<pad>`)."""
USUAL_IMAGE = 32000
"""The image token of a LLaVA whose config.json names none."""
NEMO = ("nemo", "nemo-neva")
"""Formats that transformers does not read."""
MOST_PADDING = 2048
"""Most rows that an embedding may have beyond the tokenizer: it is padded to round sizes, and has places for tokens added later."""


def import_model(sources: Sequence[Path], out: Path, options: Options, *, check: bool = True, say: Callable[[str], None] = print) -> Path:
    """Make a neva checkpoint `out` of one or two Hugging Face folders, and give its path.

    ValueError, and nothing half-written left, for sources that cannot be imported or that our model does not compute equally;
    `check=False` leaves out the latter. An import that is killed goes on when it is started again.
    """
    with stream.Staging(out, ".unpacked") as scratch, stream.Staging(out) as staging, _by_archive(scratch.folder, sources) as named:
        tell = say
        say = lambda text: tell(named(text))  # noqa: E731
        archives = [source for source in sources if is_nemo(source) and source.is_file()]
        if archives or scratch.folder.exists():  # left by an import that was killed
            scratch.begin("unpacked archives")
        for archive in archives:
            say(f"Unpacking {archive}")
        read = [_open(source, scratch.folder / str(number)) for number, source in enumerate(sources)]
        chosen = folders.plan(read, options)
        for warning in chosen.warnings:
            say(f"warning: {warning}")
        tokenizer = _tokenizer(chosen, say)
        template = _template(chosen, options, tokenizer, say)
        for name in chosen.new:
            say(f"new, drawn from seed {options.seed}: {name} {list(chosen.tensors[name].shape)}")
        described = folders.describe(chosen, options, template)
        for part, source in zip(described["source"]["parts"], sources, strict=True):
            part["path"] = str(source)
        write = tokenizer.save if tokenizer else None
        folders.write(chosen, staging, described=described, write_tokenizer=write, say=say)
        described["source"]["parity"] = None
        if check:
            weights = staging.folder / "weights"
            described["source"]["parity"] = _compare(chosen, weights, out, say)
            for line in compare_images(chosen.sources):
                say(line)
            if tokenizer is not None and (source := _text_source(chosen)).format not in NEMO:
                say(compare_texts(source.folder, tokenizer))
        else:
            say("NOT COMPARED with transformers (--no-parity): nothing shows that this checkpoint computes what its source does")
        folders.write_config(staging.folder, described)
        published = folders.publish(staging)
        scratch.remove()
        return published


@contextmanager
def _by_archive(scratch: Path, sources: Sequence[Path]) -> Iterator[Callable[[str], str]]:
    """Gives a function that names the archive in a text, not the folder that it was unpacked to; so
    do errors within."""

    def named(text: str) -> str:
        for number, source in enumerate(sources):
            place = str(scratch / str(number))
            text = text.replace(f"{place}/", f"{source}: ").replace(place, str(source))
        return text

    try:
        yield named
    except ValueError as error:
        if (text := named(str(error))) != str(error):
            raise CheckpointError(text) from None
        raise


def _compare(chosen: Plan, weights: Path, out: Path, say: Callable[[str], None]) -> dict[str, float]:
    """Part -> its difference to transformers. CheckpointError if one is too large."""
    say("Comparing with transformers")
    read = index.Tensors(weights).read
    differences = gate.compare(chosen.sources, chosen.model, chosen.vision, read, cast=chosen.cast)
    say(parity.show(differences) if differences else "NOT COMPARED: transformers has no model of this format to compare with")
    parity.check(differences, str(out))
    return {d.part: d.largest for d in differences}


def lacks_encoder(path: Path) -> bool:
    """Is this a LLaVA or a NeVA to import, whose encoder is a checkpoint of its own?"""
    if is_nemo(path):
        return is_neva(path)
    if is_projector(path):
        return False
    return is_foreign(path) and (path / "config.json").is_file() and "mm_vision_tower" in read_json(path / "config.json")


def _open(path: Path, scratch: Path) -> Source:
    return read_nemo(path, scratch) if is_nemo(path) else folders.read_source(path)


def _tokenizer(chosen: Plan, say: Callable[[str], None]) -> Tokenizer | None:
    if chosen.model is None:
        return None
    source = _text_source(chosen)
    try:
        tokenizer = load_tokenizer(source.tokenizer)
    except ValueError as error:
        if source.has_tokenizer:
            pointers = [pointer for name in FILES if (pointer := lfs_pointer(source.folder / name))]
            raise CheckpointError(pointers[0] if pointers else str(error)) from None
        say(f"warning: {source.folder} holds no tokenizer: set data.tokenizer when you train, and it cannot generate before that")
        return None
    vocab = chosen.model.decoder.vocab
    beyond = tokenizer.size - vocab
    if 0 < beyond <= MOST_BEYOND and tokenizer.own_size <= vocab:
        rows = -(-tokenizer.size // 64) * 64
        where = f"no row in the embedding ({vocab} rows)"
        lack = f"{beyond} of its tokenizer's added tokens have {where}"
        fix = f"to train with them, set model.decoder.vocab={rows}"
        say(f"warning: {source.folder}: {lack}: a prompt that uses one is refused; {fix}")
    elif not vocab - MOST_PADDING <= tokenizer.size <= vocab:
        raise CheckpointError(f"{source.folder}: its tokenizer has {tokenizer.size} tokens, its embedding {vocab}; they are not of one model.")
    check_tags(tokenizer, chosen.model.layout)
    if note := _about_image_token(source, tokenizer):
        say(note)
    return tokenizer


def _about_image_token(source: Source, tokenizer: Tokenizer) -> str:
    """A warning where a LLaVA's config and its tokenizer mean another token by an image."""
    if source.format not in gate.LLAVAS:
        return ""
    said = source.config.get("image_token_index", source.config.get("image_token_id", USUAL_IMAGE))
    own = tokenizer.special(MARKER)
    if own is None or said == own:
        return ""
    differs = f"config.json says image_token_index={said}, but {MARKER} is token {own} of its tokenizer"
    return f"warning: {source.folder}: {differs}: neva goes by {MARKER}, and an export says {own}"


def _text_source(chosen: Plan) -> Source:
    """The folder whose tokenizer is taken."""
    return next(source for source in chosen.sources if source.kind != "vision")


def _template(
    chosen: Plan,
    options: Options,
    tokenizer: Tokenizer | None,
    say: Callable[[str], None],
) -> str:
    """The chat format asked for, else the model's."""
    if options.template not in ("", OWN):
        find_template(options.template, tokenizer)
        return options.template
    found = chat_format(chosen.sources, tokenizer, images=chosen.vision is not None)
    if found.note:
        say(found.note)
    return found.template
