"""`neva import`: read, plan, write, prove equal, publish."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from neva.checkpoint import gate, index, parity, stream
from neva.checkpoint import hf as folders
from neva.checkpoint.chat import chat_format
from neva.checkpoint.foreign import is_foreign
from neva.checkpoint.hf import Options, Plan, Source
from neva.checkpoint.manifest import CheckpointError
from neva.checkpoint.nemo import is_nemo, is_neva, read_nemo
from neva.checkpoint.pixels import compare_images
from neva.checkpoint.prompts import compare_texts
from neva.checkpoint.shards import lfs_pointer, read_json
from neva.data.encode import check_tags
from neva.data.templates import OWN, find_template
from neva.data.tokenizer import FILES, Tokenizer, load_tokenizer

MOST_BEYOND = 64
"""Most tokens that a tokenizer may have beyond the embedding, if all of them were added to it later
(CodeLlama-34b, Llama-2 with `<pad>`)."""
NEMO = ("nemo", "nemo-neva")
"""Formats that transformers does not read."""
MOST_PADDING = 2048
"""Most rows that an embedding may have beyond the tokenizer: it is padded to round sizes, and has places for tokens added later."""


def import_model(sources: Sequence[Path], out: Path, options: Options, *, check: bool = True, say: Callable[[str], None] = print) -> Path:
    """Make a neva checkpoint `out` of one or two Hugging Face folders, and give its path.

    ValueError, and nothing half-written left, for sources that cannot be imported or that our model does not compute equally;
    `check=False` leaves out the latter. An import that is killed goes on when it is started again.
    """
    temporary = stream.staging(out)
    scratch = stream.staging(out, ".unpacked")
    if check:
        gate.need_transformers()
    if any(is_nemo(source) and source.is_file() for source in map(Path, sources)):
        stream.begin(scratch, "unpacked archives")
    with stream.removed_if_refused(scratch):
        read = [_open(Path(source), scratch / str(number)) for number, source in enumerate(sources)]
        chosen = folders.plan(read, options)
        for warning in chosen.warnings:
            say(f"warning: {warning}")
        tokenizer = _tokenizer(chosen, say)
        template = _template(chosen, options, tokenizer, say)
        for name in chosen.new:
            say(f"new, drawn from seed {options.seed}: {name} {list(chosen.tensors[name].shape)}")
        described = folders.describe(chosen, options, template)
        with stream.removed_if_refused(temporary):
            write = tokenizer.save if tokenizer else None
            folders.write(chosen, temporary, described=described, write_tokenizer=write, tick=lambda size: None)
            described["source"]["parity"] = _compare(chosen, temporary / "weights", out, say) if check else None
            for line in compare_images(chosen.sources) if check else []:
                say(line)
            if check and tokenizer is not None and (source := _text_source(chosen)).format not in NEMO:
                say(compare_texts(source.folder, tokenizer))
    if not check:
        say("NOT COMPARED with transformers (--no-parity): nothing shows that this checkpoint computes what its source does")
    folders.write_config(temporary, described)
    published = folders.publish(temporary, out)
    stream.remove(scratch)
    return published


def _compare(chosen: Plan, weights: Path, out: Path, say: Callable[[str], None]) -> dict[str, float]:
    """Part -> its difference to transformers. CheckpointError if one is too large."""
    differences = gate.compare(chosen.sources, chosen.model, chosen.vision, partial(index.read, weights), cast=chosen.cast)
    say(parity.show(differences) if differences else "NOT COMPARED: transformers has no model of this format to compare with")
    parity.check(differences, str(out))
    return {d.part: d.largest for d in differences}


def lacks_encoder(path: Path) -> bool:
    """Is this a LLaVA or a NeVA to import, whose encoder is a checkpoint of its own?"""
    if is_nemo(path):
        return is_neva(path)
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
    return tokenizer


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
