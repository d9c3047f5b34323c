"""The chat format is the model's: what an import takes, what an export gives back, and what a stage
that starts from it trains with."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers as tf
import yaml
from PIL import Image

from neva import api
from neva.batch import IMAGE, NEWLINE
from neva.checkpoint.hf import Options
from neva.checkpoint.target import ExportOptions
from neva.data.sample import Sample, Turn
from neva.data.templates import TEMPLATES
from neva.infer.generate import Loaded, load
from tests.oracle.test_convert import whole
from tests.oracle.test_nvlm import following
from tests.published import PUBLISHED

torch.set_num_threads(1)
ENDS = ("<|im_start|>", "<|im_end|>", "<|eot_id|>")
TALKS = {
    "a question": ((0, "user", "What is  it?"),),
    "an image": ((1, "user", "What is  it?"),),
    "a system message": ((0, "system", "Be brief."), (1, "user", "Why?")),
    "three turns": ((1, "user", "What?"), (0, "assistant", "A cat."), (0, "user", "Why?")),
    "two images": ((2, "user", "Which?"),),
}
LATER = ("three turns",)


def folder_with(
    folder: Path,
    template: str,
    *,
    place: str = "chat_template.json",
    anyres: bool = False,
    eos: str = "",
) -> Path:
    """A tiny LLaVA or LLaVA-NeXT whose chat template stands in one of the files
    that published ones use."""
    (following if anyres else whole)(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    file = folder / "tokenizer.json"
    model = tokenizers.Tokenizer.from_file(str(file))
    model.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in ENDS])
    model.save(str(file))
    if place == "chat_template.jinja":
        (folder / place).write_text(template)
    else:
        settings = json.loads((folder / place).read_text()) if (folder / place).is_file() else {}
        (folder / place).write_text(json.dumps({**settings, "chat_template": template}))
    if eos:
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": eos}))
    return folder


def picture(number: int) -> Image.Image:
    generator = torch.Generator().manual_seed(number)
    pixels = torch.randint(0, 256, (33, 40 + 9 * number, 3), generator=generator)
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def ours(loaded: Loaded, talk: tuple[tuple[int, str, str], ...]) -> list[int]:
    turns = tuple(Turn(role=role, text="<image>\n" * count + text) for count, role, text in talk)
    pictures = tuple(picture(number) for number in range(sum(count for count, _, _ in talk)))
    encoded = loaded.encoder.encode(
        Sample(source="t", id="0", turns=turns, images=pictures),
        labels=False,
    )
    return [IMAGE if id in (IMAGE, NEWLINE) else id for id in encoded.tokens.tolist()]


def theirs(processor: Any, talk: tuple[tuple[int, str, str], ...]) -> list[int]:
    number, messages = 0, []
    for count, role, text in talk:
        shown = [{"type": "image", "image": picture(number + n)} for n in range(count)]
        number += count
        messages.append({"role": role, "content": [*shown, {"type": "text", "text": text}]})
    made = processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
    )
    ids = torch.tensor(made["input_ids"]).flatten().tolist()
    return [IMAGE if id == processor.image_token_id else id for id in ids]


def greedy(folder: Path, kind: Any) -> str:
    """transformers' answer to a question about an image."""
    processor = tf.AutoProcessor.from_pretrained(folder)
    content = [{"type": "image", "image": picture(0)}, {"type": "text", "text": "What is it?"}]
    given = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    out = kind.from_pretrained(folder).generate(**given, max_new_tokens=12, do_sample=False)
    return processor.decode(out[0, given["input_ids"].shape[1] :], skip_special_tokens=True).strip()


KINDS: dict[str, dict[str, Any]] = {
    "llava-1.5": {"place": "chat_template.json"},
    "llava-v1.6-mistral": {"place": "processor_config.json", "anyres": True},
    "llava-v1.6-34b": {"place": "chat_template.jinja", "anyres": True, "eos": "<|im_end|>"},
    "llama3-llava-next": {"place": "chat_template.json", "anyres": True, "eos": "<|eot_id|>"},
    "llava-interleave-qwen": {"place": "chat_template.json"},
    "either": {"place": "chat_template.jinja"},
}


@pytest.mark.parametrize("name", KINDS)
def test_a_folders_own_format(name: str, tmp_path: Path) -> None:
    """Import, export and import again: prompts and greedy text are transformers', before and after;
    export gives back what came, with an end where it had none."""
    source = folder_with(tmp_path / "hf", PUBLISHED[name], **KINDS[name])
    kind = tf.LlavaNextForConditionalGeneration if KINDS[name].get("anyres") else tf.LlavaForConditionalGeneration
    said: list[str] = []
    api.import_checkpoint([source], tmp_path / "neva", say=said.append)
    assert any("chat format: the folder's own template" in line for line in said)
    mended = name == "llava-1.5"
    assert any("ends no answer" in line for line in said) == mended
    loaded = load(tmp_path / "neva")
    processor = tf.AutoProcessor.from_pretrained(source)
    for title, talk in TALKS.items():
        if not (mended and title in LATER):  # whose history ends where transformers' does not
            assert ours(loaded, talk) == theirs(processor, talk), title
    (answer,) = api.generate(loaded, prompt="What is it?", images=[picture(0)], max_new_tokens=12)
    assert answer["text"] == greedy(source, kind)
    api.export_checkpoint(tmp_path / "neva", tmp_path / "out")
    written = (tmp_path / "out" / "chat_template.jinja").read_text()
    assert (written == PUBLISHED[name]) == (not mended) and written.endswith(PUBLISHED[name])
    assert answer["text"] == greedy(tmp_path / "out", kind)
    processor = tf.AutoProcessor.from_pretrained(tmp_path / "out")
    api.import_checkpoint([tmp_path / "out"], tmp_path / "again")
    again = load(tmp_path / "again")
    for title, talk in TALKS.items():
        assert theirs(processor, talk) == ours(loaded, talk) == ours(again, talk), title
    assert again.encoder.stop_ids | again.stop_ids == loaded.encoder.stop_ids | loaded.stop_ids
    if mended:
        assert loaded.encoder.tokenizer.eos in ours(again, TALKS["three turns"])


@pytest.mark.parametrize("name", ["llava-1.5", "llava-v1.6-mistral", "llama3-llava-next", "qwen2.5"])
def test_the_decoder_of_a_model_with_its_own_format(name: str, tmp_path: Path) -> None:
    """Questions without images have the ids that they have in the whole model: in transformers, which hands texts
    to the decoder's template and puts no start token before what it writes, and in an import of the decoder."""
    kinds = {**KINDS, "qwen2.5": {"place": "tokenizer_config.json"}}
    source = folder_with(tmp_path / "hf", PUBLISHED[name], **kinds[name])
    api.import_checkpoint([source], tmp_path / "neva")
    loaded = load(tmp_path / "neva")
    only = ExportOptions(part="decoder")
    api.export_checkpoint(tmp_path / "neva", tmp_path / "text", options=only)
    tokenizer = tf.AutoTokenizer.from_pretrained(tmp_path / "text")
    api.import_checkpoint([tmp_path / "text"], tmp_path / "again")
    again = load(tmp_path / "again")
    assert again.encoder.stop_ids | again.stop_ids == loaded.encoder.stop_ids | loaded.stop_ids
    for talk in (((0, "user", "What is  it?"),), ((0, "user", "Hi."), (0, "assistant", "A cat."), (0, "user", "Why?"))):
        asked = [{"role": role, "content": text} for _, role, text in talk]
        written = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(written, add_special_tokens=False).input_ids
        assert ids == ours(loaded, talk) == ours(again, talk)
        assert ids[0] == loaded.encoder.tokenizer.bos


def test_a_template_of_texts_beside_the_tokenizer(tmp_path: Path) -> None:
    """As xtuner publishes its LLaVA: the tokenizer's own, of texts. The export's takes lists too,
    for transformers' processor."""
    source = folder_with(tmp_path / "hf", PUBLISHED["qwen2.5"], place="tokenizer_config.json")
    api.import_checkpoint([source], tmp_path / "neva")
    loaded = load(tmp_path / "neva")
    tokenizer = tf.AutoTokenizer.from_pretrained(source)
    asked = [{"role": "user", "content": "What is  it?"}]
    text = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    assert ours(loaded, TALKS["a question"]) == tokenizer(text).input_ids
    api.export_checkpoint(tmp_path / "neva", tmp_path / "out")
    processor = tf.AutoProcessor.from_pretrained(tmp_path / "out")
    for title, talk in TALKS.items():
        assert theirs(processor, talk) == ours(loaded, talk), title


@pytest.mark.parametrize("name", ["v1", "v0", "plain", "mistral"])
def test_our_own_format_is_known_again(name: str, tmp_path: Path) -> None:
    """An export's template writes a format of ours: where no proof fits it, or it is what such a
    model has, it keeps its name."""
    whole(tmp_path / "hf")
    api.import_checkpoint([tmp_path / "hf"], tmp_path / "neva", options=Options(template=name))
    api.export_checkpoint(tmp_path / "neva", tmp_path / "out")
    api.import_checkpoint([tmp_path / "out"], tmp_path / "again")
    one, again = load(tmp_path / "neva"), load(tmp_path / "again")
    assert again.encoder.template == (name if name != "mistral" else "")
    for title, talk in TALKS.items():
        if not TEMPLATES[name].caption or title == "an image":
            assert ours(again, talk) == ours(one, talk), title
    assert again.encoder.stop_ids == one.encoder.stop_ids


def test_a_template_that_loses_something_is_not_taken(tmp_path: Path) -> None:
    """Said, and LLaVA's own in its place; a decoder keeps its template, and says so too."""
    broken = PUBLISHED["llava-1.5"].replace("<image>\n", "")
    source = folder_with(tmp_path / "hf", broken)
    said: list[str] = []
    api.import_checkpoint([source], tmp_path / "neva", say=said.append)
    assert any("warning" in line and "loses an image" in line and "v1 is taken in its place" in line for line in said)
    assert load(tmp_path / "neva").encoder.template == "v1"


TINY = (
    "data.sources=[{mock: {samples: 60, words: [4, 20]}}]",
    "batch.seq_length=256",
    "batch.rows=2",
    "data.workers=0",
    "steps=4",
    "precision=fp32",
    "log.tensorboard=false",
)


def test_a_stage_trains_in_the_format_of_its_model(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By default, in place of the recipe's, and said in a line; another by name is said too; `own`
    asks for the model's."""
    monkeypatch.setenv("NEVA_CACHE", str(tmp_path / "cache"))
    source = folder_with(tmp_path / "hf", PUBLISHED["llava-1.5"])
    asked = [*TINY, f"init={source}", f"out={tmp_path / 'run'}"]
    said: list[str] = []
    last = api.train("llava-tiny/finetune", asked, say=said.append)
    assert sum("init.model brings its chat format, a template of its own (the recipe has v1" in line for line in said) == 1
    assert sum("ends no answer: the tokenizer's end token is put behind each and learnt" in line for line in said) == 1
    assert yaml.safe_load((last / "neva.yaml").read_text())["template"] == ""
    api.export_checkpoint(last, tmp_path / "out", say=said.append)
    assert (tmp_path / "out" / "chat_template.jinja").read_text().endswith(PUBLISHED["llava-1.5"])
    loaded, processor = load(last), tf.AutoProcessor.from_pretrained(tmp_path / "out")
    for title, talk in TALKS.items():
        assert theirs(processor, talk) == ours(loaded, talk), title
    del said[:]
    (stage,) = api.recipe("llava-tiny/finetune", [*asked, "data.template=chatml"], say=said.append)
    assert stage.data.template == "chatml"
    assert [line for line in said if "chat format" in line] == [
        "Stage finetune trains in the chat format chatml and not in its model's, a template of its own: data.template=own takes that"
    ]
    chatml = api.train(
        "llava-tiny/finetune",
        [*asked[:-1], "data.template=chatml", "data.system=Hi.", f"out={tmp_path / 'chatml'}"],
        say=said.append,
    )
    (stage,) = api.recipe("llava-tiny/finetune", [*TINY, f"init={chatml}"])
    assert (stage.data.template, stage.data.system) == ("chatml", "Hi.")
    del said[:]
    first, second = api.recipe("llava-tiny", [*TINY, f"pretrain:init={chatml}"], say=said.append)
    # Captions are the stage's own; the stage that goes on from it asks as the model does.
    assert (first.data.template, second.data.template) == ("plain", "chatml")
    assert any("Stage pretrain trains in the chat format plain and not in its model's, chatml" in line for line in said)
    assert any("Stage finetune: init.model brings its chat format, chatml" in line for line in said)
    first, second = api.recipe("llava-tiny", [*TINY, f"pretrain:init={chatml}", "data.template=own"])
    assert (first.data.template, second.data.template) == ("chatml", "chatml")


def test_a_model_of_captions_alone_brings_no_chat_format(tmp_path: Path) -> None:
    """LLaVA's second stage, started from a run of the first, asks its questions."""
    aligned = api.train("llava-tiny/pretrain", [*TINY, f"out={tmp_path / 'run'}"], say=lambda line: None)
    assert yaml.safe_load((aligned / "neva.yaml").read_text())["template"] == "plain"
    said: list[str] = []
    (stage,) = api.recipe("llava-tiny/finetune", [*TINY, f"init={aligned}"], say=said.append)
    assert stage.data.template == "v1"
    assert not [line for line in said if "chat format" in line]


def test_a_dry_run_names_what_a_template_loses(tmp_path: Path) -> None:
    """Before a step, and before a weight is made."""
    cases = Path(__file__).parents[1] / "data" / "cases"
    for name, lost in {
        "template-drops-user/first.jinja": "loses the question",
        "template-no-generation-prompt/marked.jinja": "loses the generation prompt",
        "template-always-header/always2.jinja": "add_generation_prompt",
        "system-dropped/nosystem.jinja": "row 0 of 'data': .*loses the system message",
    }.items():
        folder = cases / Path(name).parent
        data = [f"data.source={folder / 'data.json'}", f"data.image_folder={folder / 'images'}"]
        with pytest.raises(ValueError, match=f"stage finetune: .*{lost}"):
            api.dry_run(
                "llava-tiny/finetune",
                [*TINY, *data, f"data.template={cases / name}", f"out={tmp_path}"],
            )
