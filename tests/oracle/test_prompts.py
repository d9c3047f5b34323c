"""What an exported folder answers through transformers' own tokenizer and processor: ids, stops and pixels as `neva generate` has them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from PIL import Image

from neva import api
from neva.batch import IMAGE
from neva.checkpoint import prompts
from neva.checkpoint.hf import Options
from neva.checkpoint.manifest import CheckpointError
from neva.checkpoint.tokens import _chat
from neva.data.sample import Sample, Turn
from neva.data.templates import TEMPLATES
from neva.data.tokenizer import load_tokenizer
from neva.infer.generate import Loaded, Sampling, generate, generate_encoded, load
from neva.models.vlm import Output
from tests.families import build, clip, llama
from tests.oracle.test_convert import SIZE, add_text, whole

torch.set_num_threads(1)
ROOT = Path(__file__).parents[2]
QWEN = (
    "{% for message in messages %}{% if loop.first and messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def text_model(folder: Path, *, template: str = "", ends: tuple[str, ...] = (), **changes: Any) -> Path:
    """A tiny Llama with the demo's tokenizer, a chat template of its own, and special tokens that end its answers."""
    build(llama(vocab_size=SIZE + 14, max_position_embeddings=512, bos_token_id=0, eos_token_id=1, **changes), folder)
    add_text(folder, image=False, pad=False)
    made = tf.AutoTokenizer.from_pretrained(folder)
    made.add_tokens(list(ends), special_tokens=True)
    made.chat_template = template or None
    made.save_pretrained(folder)
    return folder


def picture(number: int) -> Image.Image:
    pixels = torch.randint(0, 256, (33 + 9 * number, 50, 3), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def ours(loaded: Loaded, text: str, images: int = 0) -> list[int]:
    turns = (Turn(role="user", text="<image>\n" * images + text),)
    sample = Sample(source="t", id="0", turns=turns, images=tuple(map(picture, range(images))))
    return loaded.encoder.encode(sample, labels=False).tokens.tolist()


def with_processor(folder: Path, text: str, images: int) -> tuple[list[int], list[int]]:
    """ids of `processor.apply_chat_template`, in one step and in two, with -200 at image features."""
    processor = tf.AutoProcessor.from_pretrained(folder)
    shown = [picture(number) for number in range(images)]
    messages = [{"role": "user", "content": [*({"type": "image", "image": image} for image in shown), {"type": "text", "text": text}]}]
    one = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
    two = processor(text=processor.apply_chat_template(messages, add_generation_prompt=True), images=shown or None)["input_ids"]
    first, second = (torch.tensor(ids).flatten().tolist() for ids in (one, two))
    return tuple([IMAGE if id == processor.image_token_id else id for id in ids] for ids in (first, second))  # type: ignore[return-value]


@pytest.mark.parametrize("template", TEMPLATES)
def test_prompts_of_an_exported_vlm(template, tmp_path):
    """With no, one and two images, in one step and in two (which doubles a start token that a template writes, if one is not careful)."""
    whole(tmp_path / "hf")
    api.import_checkpoint([tmp_path / "hf"], tmp_path / "neva", options=Options(template=template))
    api.export_checkpoint(tmp_path / "neva", tmp_path / "out")
    loaded = load(tmp_path / "neva")
    for images in (1, 2) if TEMPLATES[template].caption else (0, 1, 2):
        wanted = ours(loaded, "What is  it?", images)
        assert with_processor(tmp_path / "out", "What is  it?", images) == (wanted, wanted)


@pytest.mark.parametrize("template", [name for name in TEMPLATES if name != "plain"])
def test_prompts_of_an_exported_decoder(template, tmp_path):
    text_model(tmp_path / "hf")
    api.import_checkpoint([tmp_path / "hf"], tmp_path / "neva", options=Options(template=template))
    api.export_checkpoint(tmp_path / "neva", tmp_path / "out")
    theirs = tf.AutoTokenizer.from_pretrained(tmp_path / "out")
    given = theirs.apply_chat_template([{"role": "user", "content": "Hi there"}], add_generation_prompt=True)["input_ids"]
    assert given == ours(load(tmp_path / "neva"), "Hi there")


@pytest.mark.parametrize("template", [QWEN, ZEPHYR])
def test_a_tokenizers_own_template(template, tmp_path):
    """Of a decoder: no start token that the template does not write. Composed to a VLM: the export takes lists of texts and images."""
    text_model(tmp_path / "hf", template=template, ends=("<|im_start|>", "<|im_end|>"))
    build(clip(), tmp_path / "clip")
    api.import_checkpoint([tmp_path / "hf"], tmp_path / "decoder")
    theirs = tf.AutoTokenizer.from_pretrained(tmp_path / "hf")
    given = theirs.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)["input_ids"]
    assert ours(load(tmp_path / "decoder"), "Hi") == given
    api.import_checkpoint([tmp_path / "hf", tmp_path / "clip"], tmp_path / "neva")
    api.export_checkpoint(tmp_path / "neva", tmp_path / "out")
    for images in (0, 1, 2):
        wanted = ours(load(tmp_path / "neva"), "Hi", images)
        assert with_processor(tmp_path / "out", "Hi", images) == (wanted, wanted)


def test_a_system_message_is_written_as_it_is(tmp_path):
    """Whatever it says: the template's own words are no part of it."""
    whole(tmp_path / "hf")
    api.import_checkpoint([tmp_path / "hf"], tmp_path / "neva", options=Options(template="v1"))
    system = 'An IMAGE, and a "MARKER".'
    files = _chat(replace(load(tmp_path / "neva").encoder, system=system), {})
    assert json.dumps(system) in files["chat_template.jinja"].decode()


def test_a_gate_that_compares_nothing_refuses(tmp_path, monkeypatch):
    """A folder of which no prompt could be asked is not called equal."""
    text_model(tmp_path / "hf")
    api.import_checkpoint([tmp_path / "hf"], tmp_path / "neva")
    monkeypatch.setattr(prompts, "TALKS", {"an image": ((1, "user", "What?"),)})
    with pytest.raises(CheckpointError, match="takes none of an image"):
        api.export_checkpoint(tmp_path / "neva", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_base_model_goes_on_with_the_text(tmp_path):
    """Without a chat template a decoder is asked nothing but the text itself."""
    text_model(tmp_path / "hf")
    api.import_checkpoint([tmp_path / "hf"], tmp_path / "neva")
    loaded = load(tmp_path / "neva")
    theirs = tf.AutoTokenizer.from_pretrained(tmp_path / "hf")("Once upon").input_ids
    assert loaded.encoder.template == "text" and ours(loaded, "Once upon") == theirs
    (answer,) = api.generate(loaded, prompt="Once upon", max_new_tokens=5)
    assert answer["tokens"] <= 5


def test_a_caption_model_wants_an_image(tmp_path):
    whole(tmp_path / "hf")
    api.import_checkpoint([tmp_path / "hf"], tmp_path / "neva", options=Options(template="plain"))
    with pytest.raises(ValueError, match="asks with an image alone"):
        list(api.generate(tmp_path / "neva", prompt="Hi"))


@pytest.mark.parametrize(("template", "end"), [("chatml", "<|im_end|>"), ("llama_3", "<|eot_id|>"), ("gemma", "<end_of_turn>"), ("", "<|im_end|>")])
def test_a_special_token_ends_an_answer(template, end, tmp_path, monkeypatch):
    """Special tokens decode to nothing: a stop text that is one must be seen as an id. A tokenizer's own template says how an answer ends."""
    text_model(tmp_path / "hf", template="" if template else QWEN, ends=(end,))
    api.import_checkpoint([tmp_path / "hf"], tmp_path / "neva", options=Options(template=template))
    loaded = load(tmp_path / "neva")
    stop = loaded.encoder.tokenizer.encode(end)
    assert len(stop) == 1
    spoken = loaded.encoder.tokenizer.encode("cat")
    said = [*spoken, *stop, *spoken]

    def forward(batch: Any, **_: Any) -> Output:
        logits = torch.zeros(1, SIZE + 14)
        logits[0, said.pop(0)] = 1
        return Output(logits=logits)

    monkeypatch.setattr(loaded.model, "forward", forward)
    sample = loaded.encoder.encode(Sample(source="t", id="0", turns=(Turn(role="user", text="Hi"),), images=()), labels=False)
    (answer,) = generate_encoded(loaded, [sample], Sampling())
    assert (answer.text, answer.finish, list(answer.tokens)) == ("cat", "stop", spoken)


def test_end_tokens_of_the_source_and_of_the_template(tmp_path):
    """All that generation_config.json lists end an answer, and export adds what the template ends with."""
    text_model(tmp_path / "hf", ends=("<|im_end|>",))
    (tmp_path / "hf" / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 5], "top_p": 0.9}))
    api.import_checkpoint([tmp_path / "hf"], tmp_path / "neva", options=Options(template="chatml"))
    loaded = load(tmp_path / "neva")
    assert loaded.stop_ids == {1, 5}
    api.export_checkpoint(tmp_path / "neva", tmp_path / "out")
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written["eos_token_id"] == [1, 5, *loaded.encoder.tokenizer.encode("<|im_end|>")] and written["top_p"] == 0.9


@pytest.mark.parametrize("place", ["top", "text_config"])
def test_end_tokens_of_config_json(place, tmp_path):
    """config.json's list counts where there is no generation_config.json, as for transformers."""
    if place == "top":
        text_model(tmp_path / "hf")
    else:
        whole(tmp_path / "hf")
    (tmp_path / "hf" / "generation_config.json").unlink()
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    config.pop("eos_token_id", None)
    (config if place == "top" else config["text_config"])["eos_token_id"] = [1, 7]
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    api.import_checkpoint([tmp_path / "hf"], tmp_path / "neva", options=Options(template="v1"))
    loaded = load(tmp_path / "neva")
    assert loaded.stop_ids == {1, 7}
    assert set(model_ends(tmp_path / "hf")) == {1, 7}
    api.export_checkpoint(tmp_path / "neva", tmp_path / "out")
    assert set(model_ends(tmp_path / "out")) == {1, 7}


def model_ends(folder: Path) -> list[int]:
    """The ids at which transformers stops: what its model of the folder is loaded with."""
    config = tf.AutoConfig.from_pretrained(folder)
    kinds = {"llava": tf.LlavaForConditionalGeneration, "llama": tf.LlamaForCausalLM}
    ends = kinds[config.model_type].from_pretrained(folder).generation_config.eos_token_id
    return ends if isinstance(ends, list) else [ends]


@pytest.mark.parametrize("parts", ["decoder", "composed"])
def test_end_tokens_of_an_imported_decoder_reach_the_export(parts, tmp_path):
    text_model(tmp_path / "hf")
    build(clip(), tmp_path / "clip")
    (tmp_path / "hf" / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 9]}))
    sources = [tmp_path / "hf", *([tmp_path / "clip"] if parts == "composed" else [])]
    api.import_checkpoint(sources, tmp_path / "neva", options=Options(template="v1"))
    api.export_checkpoint(tmp_path / "neva", tmp_path / "out")
    assert set(model_ends(tmp_path / "out")) == load(tmp_path / "neva").stop_ids == {1, 9}


def saying(loaded: Loaded, ids: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the model say these ids, whatever it is asked."""
    left = list(ids)

    def forward(batch: Any, **_: Any) -> Output:
        logits = torch.zeros(1, loaded.model.config.decoder.vocab)
        logits[0, left.pop(0)] = 1
        return Output(logits=logits)

    monkeypatch.setattr(loaded.model, "forward", forward)


@pytest.mark.parametrize(
    ("stop", "said", "text"),
    [
        ("<|im_end|>", ["cat", "<|im_end|>", "dog"], "cat"),
        ("<|eot_id|>", ["a", "dog", "<|eot_id|>", "b"], "adog"),
        ("<|im_end|>", ["cat", "<|eot_id|>", "dog", "<|im_end|>"], "catdog"),
        ("dog", ["cat", "dog", "<|im_end|>"], "cat"),
    ],
)
def test_a_stop_of_the_callers(stop, said, text, tmp_path, monkeypatch):
    """A special token that the template does not end with stops too, though
    it decodes to nothing."""
    text_model(tmp_path / "hf", ends=("<|im_end|>", "<|eot_id|>"))
    api.import_checkpoint([tmp_path / "hf"], tmp_path / "neva", options=Options(template="v1"))
    loaded = load(tmp_path / "neva")
    spelled = [loaded.encoder.tokenizer.encode(word, first=False) for word in said]
    saying(loaded, [id for ids in spelled for id in ids] + [5] * 20, monkeypatch)
    turn = Turn(role="user", text="Hi")
    sample = Sample(source="t", id="0", turns=(turn,), images=())
    prompt = loaded.encoder.encode(sample, labels=False)
    (answer,) = generate_encoded(loaded, [prompt], Sampling(stop=(stop,)))
    assert (answer.text, answer.finish) == (text, "stop")


QUESTIONS = ("Hi", "What is the colour of the large square, and why?", "a b c d e f")


def transformers_answers(folder: Path, images: int, *, batch: int) -> list[str]:
    """Greedy answers of transformers to QUESTIONS from a folder, so many in a batch."""
    if images:
        asker: Any = tf.AutoProcessor.from_pretrained(folder)
        model: Any = tf.LlavaForConditionalGeneration.from_pretrained(folder)
    else:
        asker = tf.AutoTokenizer.from_pretrained(folder)
        model = tf.AutoModelForCausalLM.from_pretrained(folder)
    talks = []
    for number, text in enumerate(QUESTIONS):
        shown = [{"type": "image", "image": picture(number)}] * images
        content = [*shown, {"type": "text", "text": text}] if images else text
        talks.append([{"role": "user", "content": content}])
    answers = []
    for at in range(0, len(talks), batch):
        given = asker.apply_chat_template(
            talks[at : at + batch],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            padding=True,
        )
        whole = model.generate(**given, max_new_tokens=12, do_sample=False)
        answers += asker.batch_decode(
            whole[:, given["input_ids"].shape[1] :],
            skip_special_tokens=True,
        )
    return [answer.strip() for answer in answers]


@pytest.mark.parametrize("images", [0, 1])
def test_a_batch_of_unlike_prompts_by_transformers(images, tmp_path):
    """The export fills up in front, also where the source said otherwise: each answer is the one to
    the prompt alone, and ours."""
    if images:
        whole(tmp_path / "hf")
    else:
        text_model(tmp_path / "hf")
    file = tmp_path / "hf" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "padding_side": "right"}))
    api.import_checkpoint([tmp_path / "hf"], tmp_path / "neva", options=Options(template="v1"))
    api.export_checkpoint(tmp_path / "neva", tmp_path / "out")
    loaded = load(tmp_path / "neva")
    samples = []
    for number, text in enumerate(QUESTIONS):
        turn = Turn(role="user", text="<image>\n" * images + text)
        shown = tuple([picture(number)] * images)
        samples.append(Sample(source="t", id=str(number), turns=(turn,), images=shown))
    ours = [answer.text for answer in generate(loaded, samples, Sampling(max_new_tokens=12))]
    alone = transformers_answers(tmp_path / "out", images, batch=1)
    together = transformers_answers(tmp_path / "out", images, batch=3)
    assert ours == alone == together
    assert len(set(ours)) == 3


@pytest.mark.parametrize("fault", ["processor_config.json", "preprocessor_config.json"])
def test_processor_files_are_written_where_the_source_lacks_one(fault, tmp_path):
    whole(tmp_path / "hf")
    (tmp_path / "hf" / fault).unlink(missing_ok=True)
    api.import_checkpoint(
        [tmp_path / "hf"], tmp_path / "neva", options=Options(overrides=("vision.feature=cls_patch", "image.prefix=<i>", "image.suffix=</i>"))
    )
    api.export_checkpoint(tmp_path / "neva", tmp_path / "out")
    wanted = ours(load(tmp_path / "neva"), "What?", 1)
    assert with_processor(tmp_path / "out", "What?", 1) == (wanted, wanted)


def test_a_tokenizer_without_a_post_processor_gets_its_start_token(tmp_path):
    """As the demo's: neva puts the start token itself, transformers must be told in the file."""
    text_model(tmp_path / "hf")
    shutil.copy(ROOT / "neva" / "recipes" / "tokenizer" / "tokenizer.json", tmp_path / "hf" / "tokenizer.json")
    (tmp_path / "hf" / "tokenizer_config.json").unlink()
    build(clip(), tmp_path / "clip")
    api.import_checkpoint([tmp_path / "hf", tmp_path / "clip"], tmp_path / "neva")
    api.export_checkpoint(tmp_path / "neva", tmp_path / "out")
    wanted = ours(load(tmp_path / "neva"), "Hi", 1)
    assert wanted[0] == 0 and with_processor(tmp_path / "out", "Hi", 1) == (wanted, wanted)


def sentencepiece(folder: Path, **config: Any) -> Path:
    folder.mkdir()
    shutil.copy(ROOT / "tests" / "data" / "tiny.model", folder / "tokenizer.model")
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**names, **config}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


ADDED = {
    str(512 + n): {"content": text, "special": True, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    for n, text in enumerate(("<|im_start|>", "<|im_end|>"))
}


@pytest.mark.parametrize("legacy", [True, False])
def test_tokens_added_to_a_sentencepiece_model(legacy, tmp_path):
    folder = sentencepiece(tmp_path / "sp", added_tokens_decoder=ADDED, legacy=legacy, eos_token="<|im_end|>")
    mine, theirs = load_tokenizer(folder), tf.AutoTokenizer.from_pretrained(folder)
    text = "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant"
    assert mine.encode(text) == theirs(text, add_special_tokens=False).input_ids
    assert (mine.eos, mine.size, mine.bos) == (513, 514, 1)
    behind = text.removeprefix("<|im_start|>")
    assert mine.encode(behind, first=False) == mine.encode(text)[1:]
    assert mine.decode(mine.encode(text)).strip() == theirs.decode(theirs(text).input_ids, skip_special_tokens=True).strip()


def test_added_tokens_json_and_a_gap(tmp_path):
    folder = sentencepiece(tmp_path / "sp")
    (folder / "added_tokens.json").write_text(json.dumps({"<image>": 512, "<pad>": 513}))
    assert load_tokenizer(folder).encode("a<image>")[-1] == 512
    (folder / "added_tokens.json").write_text(json.dumps({"<image>": 600}))
    with pytest.raises(ValueError, match="'<image>' has id 600, which leaves a gap"):
        load_tokenizer(folder)


def test_a_sentencepiece_model_without_a_start_token_and_ids_beyond_it(tmp_path):
    tokenizer = load_tokenizer(sentencepiece(tmp_path / "sp", add_bos_token=False))
    assert tokenizer.bos is None and tokenizer.start == 1
    assert tokenizer.decode([*tokenizer.encode("Hi"), 512, 9999]).strip() == "Hi"


def test_generate_still_answers_alike(tmp_path):
    """A batch through the changed stops equals one by one."""
    text_model(tmp_path / "hf")
    api.import_checkpoint([tmp_path / "hf"], tmp_path / "neva")
    loaded = load(tmp_path / "neva")
    samples = [Sample(source="t", id=str(n), turns=(Turn(role="user", text="Hi " * (n + 1)),), images=()) for n in range(3)]
    together = generate(loaded, samples, Sampling(max_new_tokens=6))
    assert together == [generate(loaded, [sample], Sampling(max_new_tokens=6))[0] for sample in samples]
