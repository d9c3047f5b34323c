"""Reference generation: a batch of prompts prefilled as one packed row, then one token a request and step with a cache.

Shapes: r requests, m slots of a cache row, v vocabulary.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from neva.batch import Batch
from neva.checkpoint import store
from neva.checkpoint.tokens import imported_ends
from neva.data.encode import Encoder
from neva.data.pack import Budget, collate, next_runs, run_sizes
from neva.data.sample import Encoded, Sample, SampleError
from neva.data.tokenizer import Tokenizer, load_tokenizer
from neva.models.attention import Cache
from neva.models.decoder import DecoderConfig
from neva.models.vit import VisionConfig
from neva.models.vlm import VLM, ImageConfig, VLMConfig


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen, and when to stop."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    """Keep the likeliest tokens whose probabilities add up to this."""
    top_k: int = 0
    """Keep this many of the likeliest tokens; 0 keeps all."""
    stop: tuple[str, ...] = ()
    """Texts or special tokens that end an answer, left out of it; besides the template's own."""
    seed: int = 0
    """Seed of the sampling. A sample's answer depends on it, the sample's source and id, and the
    prompt, not on its place in a batch: for several answers to one question take several seeds."""

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1.")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            given = f"temperature={self.temperature}"
            raise ValueError(f"{given} must be a finite number of at least 0.")
        if not 0 < self.top_p <= 1 or self.top_k < 0:
            given = f"top_p={self.top_p}, top_k={self.top_k}"
            raise ValueError(f"{given}: need more than 0 and up to 1, and at least 0.")
        if "" in self.stop:
            raise ValueError("an empty stop text would end every answer at once; leave it out.")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What was generated for one request."""

    text: str
    tokens: tuple[int, ...]
    """Generated ids, the end token left out."""
    finish: str
    """`stop` at the end token or a stop text, `length` where tokens or positions ran out, `error`
    for a question that was not asked."""
    error: str = ""
    """Why it was not asked."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Loaded:
    """A checkpoint ready to answer."""

    model: VLM
    encoder: Encoder
    device: torch.device
    folder: Path
    stop_ids: frozenset[int] = frozenset()
    """Ids that end an answer, besides the encoder's."""


def load(
    path: str | Path,
    *,
    device: str | None = None,
    precision: str = "auto",
    trust_code: bool = False,
) -> Loaded:
    """Load a checkpoint (a `step_N` folder or a run folder) for inference.

    `device` is cpu, cuda, or one of several GPUs as cuda:1; by default a GPU where there is one.
    `precision` is fp32, bf16, or auto: bf16 on CUDA, fp32 on the CPU.
    `trust_code` lets the function run that the checkpoint names in `image.process`.
    Raises ValueError for a broken or missing checkpoint, for one with such a function that is
    not trusted, and for a device that is not there.
    """
    where = _device(device)
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16, "auto": torch.bfloat16 if where.type == "cuda" else torch.float32}
    if precision not in kinds:
        raise ValueError(f"precision={precision!r} is none of {', '.join(kinds)}.")
    checkpoint = store.open_checkpoint(Path(path))
    config = store.model_of(checkpoint.folder, checkpoint.config)
    if not isinstance(config, VLMConfig):
        held = "an encoder" if isinstance(config, VisionConfig) else "a projector"
        raise ValueError(f"{checkpoint.folder} holds {held} alone, which cannot answer: compose a model with neva import --decoder X --vision Y.")
    if not store.tokenizer_folder(checkpoint.folder).is_dir():
        raise ValueError(f"{checkpoint.folder} holds no tokenizer: import it again with the tokenizer's files beside the weights.")
    if config.image.process and not trust_code:
        raise ValueError(f"{checkpoint.folder} {untrusted(config.image)}")
    with torch.device("meta"):
        model = VLM(config)
    model = model.to(kinds[precision]).to_empty(device=where).eval().requires_grad_(False)
    store.load_weights(checkpoint.folder, into=dict(model.named_parameters()))
    lay_out_for_decoding(model)
    tokenizer = load_tokenizer(store.tokenizer_folder(checkpoint.folder))
    encoder = Encoder(
        tokenizer=tokenizer,
        template=checkpoint.config.get("template") or "",
        system=checkpoint.config.get("system"),
        layout=config.layout,
        date=checkpoint.config.get("date") or "",
    )
    ends = frozenset(imported_ends(checkpoint.folder))
    return Loaded(
        model=model,
        encoder=encoder,
        device=where,
        folder=checkpoint.folder,
        stop_ids=ends,
    )


def _device(name: str | None) -> torch.device:
    """The device of that name, by default the GPU where there is one. ValueError if it is not
    there."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not name:
        return torch.device("cuda" if gpus else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device={name!r} is no device: give cpu, cuda or cuda:1") from None
    there = {"cpu": True, "cuda": (device.index or 0) < gpus}
    if device.type == "mps":
        there["mps"] = torch.backends.mps.is_available()
    if not there.get(device.type):
        has = f"PyTorch finds {gpus} CUDA device{'' if gpus == 1 else 's'} here"
        raise ValueError(f"device={name!r} cannot be used: {has}; leave it out for the default")
    return device


def untrusted(image: ImageConfig) -> str:
    """What is wrong with settings of a checkpoint that name a function, and what to do."""
    return (
        f"names a function that would be run on images, image.process={image.process}: "
        "if you trust whoever made it, give --trust-code (in Python trust_code=True)"
    )


def lay_out_for_decoding(model: VLM) -> None:
    """Store the vocabulary's matrix by columns where one token is then multiplied faster; its shape and values stay.

    In fp32 on a CPU that reads it at three times the rate: 1.0 ms in place of 3.6 for 32,000 x 256 with two threads of an AMD EPYC.
    """
    weight = model.decoder.embed.weight if model.head.weight is None else model.head.weight
    if weight.device.type == "cpu" and weight.dtype == torch.float32:
        weight.data = weight.data.T.contiguous().T


def unanswerable(decoder: DecoderConfig, tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """What is wrong with a prompt that leaves the model no position, or has a token that it does
    not know; empty for others."""
    highest = max(tokens, default=0)
    if highest >= decoder.vocab:
        token = tokenizer.spell(highest)
        has = f"its prompt holds {token!r}, a token (number {highest}) that was added"
        where = f"to the tokenizer and not to the model's {decoder.vocab}"
        fix = "leave it out, or train the model with it"
        return f"{has} {where}: {fix}"
    if len(tokens) < decoder.reach:
        return ""
    has = f"its prompt has {len(tokens)} tokens"
    return f"{has} but the model's positions end at {decoder.reach}: shorten it"


def generate(loaded: Loaded, samples: Sequence[Sample], sampling: Sampling | None = None) -> list[Answer]:
    """Answer each sample's last question, all in one batch. Raises ValueError (named by sample) for what cannot be encoded."""
    return generate_encoded(loaded, [loaded.encoder.encode(sample, labels=False) for sample in samples], sampling or Sampling())


@torch.inference_mode()
def generate_encoded(loaded: Loaded, prompts: Sequence[Encoded], sampling: Sampling) -> list[Answer]:
    """`generate` for prompts that are encoded already."""
    if not prompts:
        return []
    decoder = loaded.model.config.decoder
    for prompt in prompts:
        tokens = prompt.tokens.tolist()
        if error := unanswerable(decoder, loaded.encoder.tokenizer, tokens):
            raise SampleError(*prompt.key, error)
    limit = decoder.reach
    requests = [_Request(loaded, sampling, prompt) for prompt in prompts]
    lengths = torch.tensor([len(p.tokens) for p in prompts])
    batch = _prefill_batch(loaded, prompts)
    slots = max(len(p.tokens) for p in prompts) + min(sampling.max_new_tokens, limit)
    cache = _empty_cache(loaded, batch, lengths, slots)
    last = torch.cumsum(lengths, 0) - 1
    logits = loaded.model(batch, logits_at=last.to(loaded.device), cache=cache).logits
    chosen = [request.take(row) for request, row in zip(requests, _scores(logits, sampling), strict=True)]
    one = _step_batch(batch, prompts, loaded)
    rows, every = torch.arange(len(prompts)), torch.arange(len(prompts), device=loaded.device)
    while any(not request.finish for request in requests):
        # A finished request stands still: behind its last token there may be no position.
        lengths = lengths + torch.tensor([not request.finish for request in requests])
        tokens = torch.tensor(chosen)[:, None]
        positions = (lengths - 1)[:, None]
        step = replace(one, tokens=tokens.to(loaded.device), positions=positions.to(loaded.device))
        cache = replace(
            cache, slots=(rows * slots + lengths - 1).to(loaded.device), lengths=lengths.to(loaded.device), decoding=True, span=int(lengths.max())
        )
        logits = loaded.model(step, logits_at=every, cache=cache).logits
        chosen = [request.take(row) for request, row in zip(requests, _scores(logits, sampling), strict=True)]
    return [request.answer() for request in requests]


def _prefill_batch(loaded: Loaded, prompts: Sequence[Encoded]) -> Batch:
    """The prompts as one packed row on the model's device."""
    total, tiles = sum(len(p.tokens) for p in prompts), sum(len(p.tiles) for p in prompts)
    budget = Budget(seq_length=total, rows=1, micro_rows=1, max_tiles=max(1, tiles))
    names = tuple(dict.fromkeys(p.group for p in prompts))
    return collate([prompts], budget, layout=loaded.encoder.layout, group_names=names, any_tiles=tiles > 0).to(loaded.device)


def _step_batch(batch: Batch, prompts: Sequence[Encoded], loaded: Loaded) -> Batch:
    """A decode step's batch [r, 1] without its tokens and positions, which change from step to step. Its memory is in the cache."""
    ones = torch.ones(len(prompts), 1, dtype=torch.int64, device=batch.tokens.device)
    runs = next_runs(prompts, loaded.encoder.layout)
    gone = {name: getattr(batch, name)[:0] for name in ("tiles", "inline", "slots", "memory", "memory_tags", "memory_tokens", "memory_positions")}
    return replace(
        batch, tokens=ones, labels=ones, positions=ones, segments=ones, groups=ones, sees=torch.zeros_like(ones)[..., None].expand(-1, -1, 2),
        runs=runs.to(loaded.device), run_sizes=run_sizes(runs), any_tiles=False, keys=(), **gone,
    )  # fmt: skip


def _empty_cache(loaded: Loaded, batch: Batch, lengths: Int64[Tensor, " r"], slots: int) -> Cache:
    c = loaded.model.config.decoder
    shape = (c.layers, len(lengths), slots, c.kv_heads, c.head)
    keys, values = (torch.zeros(shape, dtype=loaded.model.decoder.embed.weight.dtype, device=loaded.device) for _ in range(2))
    flat = ((batch.segments - 1) * slots + batch.positions).flatten()
    return Cache(
        keys=keys, values=values, slots=flat, lengths=lengths.to(loaded.device), decoding=False, span=int(lengths.max()),
        ragged=len(set(lengths.tolist())) > 1,
    )  # fmt: skip


def _scores(logits: Float[Tensor, "r v"], sampling: Sampling) -> list:
    """What each request chooses from: for greedy decoding one id, computed for all at once, else its row of logits on the CPU."""
    return logits.argmax(-1).tolist() if sampling.temperature == 0 else list(logits.float().cpu())


class _Request:
    """One request's tokens so far, and when it ends."""

    def __init__(self, loaded: Loaded, sampling: Sampling, prompt: Encoded):
        self.tokenizer, self.sampling = loaded.encoder.tokenizer, sampling
        self.stops = (*sampling.stop, *loaded.encoder.stops)
        asked = {self.tokenizer.special(stop) for stop in sampling.stop} - {None}
        self.ends = loaded.encoder.stop_ids | loaded.stop_ids | asked
        room = loaded.model.config.decoder.reach - len(prompt.tokens)
        self.room = min(room, sampling.max_new_tokens)
        self.generator = _stream(sampling.seed, prompt)
        self.tokens: list[int] = []
        self.finish = ""
        self.text = ""

    def take(self, scores: int | Tensor) -> int:
        """Choose the next token and note it; a finished request repeats its last."""
        if self.finish:
            return self.tokens[-1] if self.tokens else self.tokenizer.eos
        token = scores if isinstance(scores, int) else draw(scores, self.sampling, self.generator)
        if token in self.ends:
            self.finish = "stop"
            self.text = self.tokenizer.decode(self.tokens)
            return token
        self.tokens.append(token)
        if self.stops or len(self.tokens) == self.room:
            self.text = self.tokenizer.decode(self.tokens)
        found = [at for at in (self.text.find(stop) for stop in self.stops) if at >= 0]
        if found:
            self.text, self.finish = self.text[: min(found)], "stop"
        elif len(self.tokens) == self.room:
            self.finish = "length"
        return token

    def answer(self) -> Answer:
        """The finished request's answer, without the space that a template puts before it."""
        return Answer(text=self.text.strip(), tokens=tuple(self.tokens), finish=self.finish)


def _stream(seed: int, prompt: Encoded) -> torch.Generator:
    """Random numbers for one prompt. The tokens tell apart the questions of one sample."""
    said = repr((seed, prompt.key, prompt.tokens.tolist()))
    digest = hashlib.sha256(said.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))


def draw(logits: Float[Tensor, " v"], sampling: Sampling, generator: torch.Generator) -> int:
    """A token from the tempered distribution, cut to its `top_k` likeliest, then to those that make up `top_p` of the mass."""
    # Differences in double precision: the quotient of a tiny temperature stays a number.
    logits = logits.double()
    values, ids = ((logits - logits.max()) / sampling.temperature).sort(descending=True)
    if sampling.top_k:
        values, ids = values[: sampling.top_k], ids[: sampling.top_k]
    mass = values.softmax(-1)
    before = mass.cumsum(-1) - mass
    mass = mass.masked_fill(before >= sampling.top_p, 0)  # the first token always stays
    return int(ids[torch.multinomial(mass, 1, generator=generator)])
