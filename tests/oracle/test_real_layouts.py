"""Tiny models in real layouts with real vocabularies: import, four steps of training, export,
transformers' answers, and import of the export."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers as tf
from safetensors.torch import load_file

from neva import api
from neva.checkpoint.hf import Options
from neva.checkpoint.target import ExportOptions
from neva.data.sample import Sample, Turn
from neva.data.tokenizer import JsonTokenizer, SentencePieceTokenizer, load_tokenizer
from neva.infer.generate import Loaded, Sampling, generate, load
from tests.families import build, clip, llama
from tests.numerics.test_init import TINY
from tests.oracle.test_convert import original
from tests.oracle.test_nvlm import PINPOINTS
from tests.oracle.test_prompts import QUESTIONS, picture
from tests.oracle.test_sentencepiece import LLAMA2, MODELS, folder_of

torch.set_num_threads(1)
ADDED = {
    "chatml": ["<|im_start|>", "<|im_end|>"],
    "llama_3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
}
"""Special tokens that a chat format needs beside those of the vocabulary."""
OTHER = ("steps=", "data.template=", "data.system=")
SETTINGS = (*[text for text in TINY if not text.startswith(OTHER)], "steps=4", "optim.lr=1e-4")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NEVA_CACHE", str(tmp_path / "cache"))


def as_published(folder: Path, name: str, template: str) -> tuple[int, int]:
    """The tokenizer.json of a llava-hf folder, with `<image>` and `<pad>`; gives their ids."""
    tokenizer = load_tokenizer(folder_of(folder / "sp", MODELS[name], legacy=True))
    assert isinstance(tokenizer, SentencePieceTokenizer)
    model = tokenizers.Tokenizer.from_str(tokenizer.as_json()["tokenizer.json"].decode())
    shutil.rmtree(folder / "sp")
    made = tf.PreTrainedTokenizerFast(
        tokenizer_object=model,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    made.add_tokens(["<image>", "<pad>", *ADDED.get(template, [])], special_tokens=True)
    made.pad_token = "<pad>"
    made.save_pretrained(folder)
    return made.convert_tokens_to_ids("<image>"), made.convert_tokens_to_ids("<pad>")


def text_config(rows: int, **more: Any) -> tf.LlamaConfig:
    return llama(
        vocab_size=rows,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        **more,
    )


def vicuna(folder: Path, name: str, legacy: bool | None) -> list[Path]:
    """A decoder as vicuna-7b-v1.5 is published, and an encoder."""
    build(text_config(load_tokenizer(MODELS[name]).size), folder / "text")
    folder_of(folder / "text", MODELS[name], **({} if legacy is None else {"legacy": legacy}))
    build(clip(), folder / "seen")
    return [folder / "text", folder / "seen"]


def llavas_own(folder: Path, name: str) -> list[Path]:
    """LLaVA's own layout."""
    original(folder, max_position_embeddings=512, bos_token_id=1, eos_token_id=2)
    rows = load_tokenizer(MODELS[name]).size
    build(text_config(rows), folder / "rows")
    state = torch.load(folder / "llava" / "pytorch_model.bin")
    state |= load_file(folder / "rows" / "model.safetensors")
    torch.save(state, folder / "llava" / "pytorch_model.bin")
    config = json.loads((folder / "llava" / "config.json").read_text())
    (folder / "llava" / "config.json").write_text(json.dumps({**config, "vocab_size": rows}))
    (folder / "llava" / "tokenizer.json").unlink()
    folder_of(folder / "llava", MODELS[name], legacy=False)
    return [folder / "llava", folder / "clip"]


def hugging_face(folder: Path, name: str, template: str, *, following: bool) -> list[Path]:
    """llava-hf's layout: a LLaVA-1.5, or a LLaVA-NeXT."""
    folder.mkdir(exist_ok=True)
    image, pad = as_published(folder / "hf", name, template)
    rows = -(-(load_tokenizer(folder / "hf").size) // 64) * 64
    kind: Any = tf.LlavaNextConfig if following else tf.LlavaConfig
    settings = {"image_grid_pinpoints": PINPOINTS} if following else {}
    config = kind(
        text_config=text_config(rows, pad_token_id=pad),
        vision_config=clip(),
        image_token_index=image,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        **settings,
    )
    config.image_token_id = image
    torch.manual_seed(0)
    model = tf.AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder / "hf")
    size: dict[str, Any] = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    processors: Any = (tf.LlavaNextImageProcessorPil, tf.LlavaNextProcessor) if following else (tf.CLIPImageProcessorPil, tf.LlavaProcessor)
    images = processors[0](**size, **settings)
    processor = processors[1](
        images,
        tf.AutoTokenizer.from_pretrained(folder / "hf"),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(folder / "hf")
    return [folder / "hf"]


LAYOUTS: dict[str, tuple[Any, str]] = {
    "vicuna, legacy": (lambda folder, name: vicuna(folder, name, True), "v1"),
    "vicuna": (lambda folder, name: vicuna(folder, name, False), "v1"),
    "vicuna, not said": (lambda folder, name: vicuna(folder, name, None), "v1"),
    "llava-1.5 original": (llavas_own, "v1"),
    "llava-1.5": (lambda folder, name: hugging_face(folder, name, "v1", following=False), "v1"),
    "llava-next chatml": (
        lambda folder, name: hugging_face(folder, name, "chatml", following=True),
        "chatml",
    ),
    "llava-next llama-3": (lambda folder, name: hugging_face(folder, name, "llama_3", following=True), "llama_3"),
}
"""Name of a layout -> what makes its folders, and its chat format."""


def samples(images: int) -> list[Sample]:
    found = []
    for number, text in enumerate(QUESTIONS):
        turn = Turn(role="user", text="<image>\n" * images + text)
        shown = tuple([picture(number)] * images)
        found.append(Sample(source="t", id=str(number), turns=(turn,), images=shown))
    return found


def ours(loaded: Loaded, images: int) -> list[str]:
    return [answer.text for answer in generate(loaded, samples(images), Sampling(max_new_tokens=8))]


def theirs(folder: Path, images: int, *, batch: int) -> list[str]:
    """transformers' greedy answers from a folder."""
    kind: Any = tf.AutoModelForImageTextToText if images else tf.AutoModelForCausalLM
    asker: Any = (tf.AutoProcessor if images else tf.AutoTokenizer).from_pretrained(folder)
    model = kind.from_pretrained(folder).eval()
    answers = []
    for at in range(0, len(QUESTIONS), batch):
        talks = []
        for number, text in list(enumerate(QUESTIONS))[at : at + batch]:
            shown = [{"type": "image", "image": picture(number)}] * images
            content = [*shown, {"type": "text", "text": text}] if images else text
            talks.append([{"role": "user", "content": content}])
        given = asker.apply_chat_template(
            talks,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            padding=True,
        )
        whole = model.generate(**given, max_new_tokens=8, do_sample=False)
        said = whole[:, given["input_ids"].shape[1] :]
        answers += asker.batch_decode(said, skip_special_tokens=True)
    return [answer.strip() for answer in answers]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["mistral", LLAMA2])
def test_in_train_out_and_in_again(name, layout, tmp_path):
    make, template = LAYOUTS[layout]
    quiet = lambda text: None  # noqa: E731
    sources = make(tmp_path / "source", name)
    api.import_checkpoint(sources, tmp_path / "neva", options=Options(template=template), say=quiet)
    before = load(tmp_path / "neva")
    if layout.startswith("vicuna"):  # transformers' answers to prompts of equal ids
        model = tf.AutoModelForCausalLM.from_pretrained(sources[0])
        for sample, answer in zip(samples(0), ours(before, 0), strict=True):
            ids = before.encoder.encode(sample, labels=False).tokens[None]
            said = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :].tolist()
            assert before.encoder.tokenizer.decode([id for id in said if id != 2]).strip() == answer
    stage = [
        *SETTINGS,
        f"init={tmp_path / 'neva'}",
        f"data.template={template}",
        f"out={tmp_path / 'run'}",
    ]
    last = api.train("llava-tiny/finetune", stage, say=quiet)
    trained = load(last)
    api.export_checkpoint(last, tmp_path / "out", say=quiet)
    answers = ours(trained, 1)
    assert answers == theirs(tmp_path / "out", 1, batch=3) == theirs(tmp_path / "out", 1, batch=1)
    api.export_checkpoint(
        last,
        tmp_path / "decoder",
        options=ExportOptions(part="decoder"),
        say=quiet,
    )
    assert ours(trained, 0) == theirs(tmp_path / "decoder", 0, batch=3)
    api.import_checkpoint([tmp_path / "out"], tmp_path / "again", say=quiet)
    again = load(tmp_path / "again")
    assert isinstance(again.encoder.tokenizer, JsonTokenizer)
    for images in (0, 1):
        for sample in samples(images):
            prompts = [one.encoder.encode(sample, labels=False).tokens.tolist() for one in (trained, again)]
            assert prompts[0] == prompts[1]
    assert ours(again, 0) == ours(trained, 0) and ours(again, 1) == answers
    ends = trained.stop_ids | trained.encoder.stop_ids
    assert again.stop_ids | again.encoder.stop_ids == ends


@pytest.mark.parametrize("name", ["mistral", LLAMA2])
def test_where_transformers_differs_on_double_spaces(name, tmp_path):
    """The difference, shown: of the folder transformers joins two spaces to one token, of
    our export it does not."""
    folder = folder_of(tmp_path / "t", MODELS[name], legacy=False)
    shutil.copy(MODELS[name], tmp_path / "t" / "tokenizer.model")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    mine = load_tokenizer(folder)
    assert isinstance(mine, SentencePieceTokenizer)
    other = tf.AutoTokenizer.from_pretrained(folder)
    joined = other.convert_tokens_to_ids("▁▁")
    ids = other("two  spaces", add_special_tokens=False).input_ids
    assert joined in ids and joined not in mine.encode("two  spaces")
    assert JsonTokenizer(mine.as_json()).encode("two  spaces") == mine.encode("two  spaces")
