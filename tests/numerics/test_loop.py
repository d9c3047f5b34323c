"""The training loop against a plain one, and what each of its settings does. In process, on one rank."""

import fcntl
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from neva import api
from neva.checkpoint import store
from neva.data.source import LlavaSource
from neva.data.tokenizer import load_tokenizer
from neva.job import OptimConfig, TrainConfig
from neva.models.vlm import VLM, build, fresh
from neva.parallel import mesh as ranks
from neva.recipes.resolve import resolve
from neva.training import loop, stage
from neva.training.metrics import Work, _document_lengths, cut_back
from neva.training.optim import learning_rate
from tests import runs
from tests.packed import Item, pack

STEPS = 5
ONE = (
    "model.decoder.layers=1", "model.vision.layers=2", "batch.seq_length=128", "batch.micro_rows=2", "data.pool=16", "data.system=Be brief.",
    "log.tensorboard=false", f"steps={STEPS}", "precision=fp32", "checkpoint.every=0",
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.colour_data(tmp_path_factory.mktemp("data"))


def plan(name: str, data: Path, out: Path, *overrides: str) -> tuple[TrainConfig, ...]:
    """Resolved stages of a recipe on the colour data."""
    source = (f"data.source={data}", f"data.image_folder={data.parent / 'images'}", f"out={out}")
    return resolve(api.recipe(name, [*ONE, *source, *overrides]))


def asked(data: Path) -> tuple[str, str]:
    return f"evaluate.source={data}", f"evaluate.image_folder={data.parent / 'images'}"


def train(name: str, data: Path, out: Path, *overrides: str, **options: Any) -> Path:
    return loop.train(plan(name, data, out, *overrides), say=lambda text: None, **options)


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in runs.metrics(out)]


def weights(folder: Path, config: TrainConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        model = VLM(config.model)
    into = {name: torch.empty(p.shape) for name, p in model.named_parameters()}
    store.load_weights(store.find(folder), into=into)
    return into


@pytest.fixture
def ranked() -> Iterator[torch.device]:
    """A process group of this process alone, as the loop makes it."""
    yield ranks.start()
    ranks.stop()


def prepared(config: TrainConfig, device: torch.device, **options: Any) -> stage.Stage:
    return stage.prepare(config, mesh=ranks.make(config.parallel, device), device=device, say=lambda text: None, **options)


# Against a plain loop


def order(config: TrainConfig) -> list[list[tuple[str, str]]]:
    """Which samples each step holds."""
    ranks.start()
    loader = stage.make_loader(config, load_tokenizer(config.data.tokenizer))
    return [[key for batch in next(loader) for key in batch.keys] for _ in range(config.steps)]


def plain_loop(config: TrainConfig, rates: list[float]) -> Iterator[tuple[float, float, dict[str, float], VLM]]:
    """One sample at a time, nothing packed: loss, gradient norm, loss per kind, and the model after each step."""
    model = build(config.model, seed=config.seed)
    named = list(model.named_parameters())
    small = [p for name, p in named if name.endswith("bias") or "norm" in name or name == "vision.class_token"]
    groups = [
        {"params": [p for _, p in named if p not in set(small)], "weight_decay": config.optim.weight_decay},
        {"params": small, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=config.optim.betas, eps=config.optim.eps, foreach=False)
    source = LlavaSource(config.data.source, config.data.image_folder)
    samples = {source[i].id: source[i] for i in range(len(source))}
    encoder = stage.make_loader(config, load_tokenizer(config.data.tokenizer)).encoder
    for keys, rate in zip(order(config), rates, strict=True):
        encoded = [encoder.encode(samples[id]) for _, id in keys]
        count = sum(int((e.labels[1:] != -100).sum()) for e in encoded)
        kinds: dict[str, list[float]] = {}
        total = 0.0
        for e in encoded:
            item = Item(tokens=e.tokens.tolist(), labels=e.labels.tolist(), tiles=list(e.tiles))
            batch = pack(config.model.layout, [[item]], len(e.tokens))
            logits = model(batch, logits_at=torch.arange(len(e.tokens))).logits
            loss = F.cross_entropy(logits[:-1], e.labels[1:], ignore_index=-100, reduction="sum")
            (loss / count).backward()
            total += loss.item()
            entry = kinds.setdefault(e.group, [0.0, 0.0])
            entry[0], entry[1] = entry[0] + loss.item(), entry[1] + int((e.labels[1:] != -100).sum())
        norm = torch.cat([p.grad.flatten() for _, p in named if p.grad is not None]).norm().item()
        for _, p in named:
            if p.grad is not None and norm > config.optim.clip > 0:
                p.grad.mul_(config.optim.clip / norm)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        yield total / count, norm, {kind: a / b for kind, (a, b) in kinds.items()}, model


@pytest.mark.parametrize("clip", [0.5, 0.0])
def test_losses_norms_and_weights_are_those_of_a_plain_loop(data: Path, tmp_path: Path, ranked: torch.device, clip: float) -> None:
    options = (
        "trainable=[*]", "batch.rows=4", "optim.lr=1e-2", "optim.weight_decay=0.3", f"optim.clip={clip}", "optim.warmup=2", "optim.min_lr=1e-3",
    )  # fmt: skip
    (config,) = plan("llava-tiny/finetune", data, tmp_path / "run", *options)
    last = train("llava-tiny/finetune", data, tmp_path / "run", *options)
    rates = [0.005, 0.01, *(0.001 + 0.009 * 0.5 * (1 + math.cos(math.pi * n / 3)) for n in (1, 2, 3))]
    lines, seen = runs.metrics(tmp_path / "run"), set()
    for line, (loss, norm, kinds, after) in zip(lines, plain_loop(config, rates), strict=True):
        model = after
        assert line["loss"] == pytest.approx(loss, rel=1e-5)
        assert line["losses"] == pytest.approx(kinds, rel=1e-5)
        seen |= set(kinds)
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert [line["lr"] for line in lines] == pytest.approx(rates) and seen == {"colour", "copy"}
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0] - 0.5
    ours = weights(last, config)
    # A key's bias changes no attention: its gradient is rounding noise, which Adam blows up.
    off = {name: (ours[name] - p).abs().max().item() for name, p in model.named_parameters() if not name.endswith("attention.k.bias")}
    print(max(off.values()))
    assert max(off.values()) < 1e-4, off


def test_micro_batches_change_no_loss(data: Path, tmp_path: Path) -> None:
    found = []
    for micro in (1, 2, 4):
        train("llava-tiny/finetune", data, tmp_path / str(micro), "trainable=[*]", "batch.rows=4", f"batch.micro_rows={micro}")
        found.append(losses(tmp_path / str(micro)))
    assert found[1] == pytest.approx(found[0], rel=1e-6) and found[2] == pytest.approx(found[0], rel=1e-6)
    assert len(set(found[0])) == STEPS


@pytest.mark.parametrize(
    ("options", "steps", "rates"),
    [
        ({"schedule": "constant", "warmup": 0.0}, 3, [1.0, 1.0, 1.0]),
        ({"schedule": "constant", "warmup": 2.0}, 4, [0.5, 1.0, 1.0, 1.0]),
        ({"schedule": "linear", "warmup": 0.0}, 4, [0.75, 0.5, 0.25, 0.0]),
        ({"schedule": "linear", "warmup": 0.25, "min_lr": 0.1}, 4, [1.0, 0.7, 0.4, 0.1]),
        ({"schedule": "cosine", "warmup": 1.0}, 5, [1.0, 0.5 + 0.25 * 2**0.5, 0.5, 0.5 - 0.25 * 2**0.5, 0.0]),
        ({"schedule": "cosine", "warmup": 0.3, "min_lr": 0.2}, 5, [0.5, 1.0, 0.8, 0.4, 0.2]),  # a share is rounded up: 2 of 5
        ({"schedule": "cosine", "warmup": 9.0}, 3, [1 / 9, 2 / 9, 3 / 9]),
    ],
)
def test_learning_rates(options: dict[str, Any], steps: int, rates: list[float]) -> None:
    config = OptimConfig(lr=1.0, **options)
    assert [learning_rate(config, step, steps) for step in range(1, steps + 1)] == pytest.approx(rates, abs=1e-12)


# What trains


def test_frozen_tensors_keep_every_byte(data: Path, tmp_path: Path) -> None:
    options = ("trainable=[decoder.*, '!decoder.embed.*', projector.2.bias]",)
    (config,) = plan("llava-tiny/finetune", data, tmp_path / "run", *options)
    after = weights(train("llava-tiny/finetune", data, tmp_path / "run", *options), config)
    for name, value in after.items():
        trained = (name.startswith("decoder.") and name != "decoder.embed.weight") or name == "projector.2.bias"
        assert torch.equal(value, fresh(name, value.shape, config.seed)) != trained, name


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ("[projektor.*]", "trainable='projektor.*' matches no parameter. Patterns are wildcards over names such as decoder.*, head.*"),
        ("['*', '!vission.*']", "trainable='!vission.*' matches no parameter"),
        ("['*', '!*']", "leaves nothing to train"),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error_before_anything_runs(data: Path, tmp_path: Path, patterns: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("*", r"\*").replace("[", r"\[")):
        train("llava-tiny", data, tmp_path / "run", f"finetune:trainable={patterns}")  # the second stage's, found before the first
    assert not (tmp_path / "run").exists()


def test_bf16_keeps_fp32_masters_and_stores_what_is_frozen_whole_in_bf16(data: Path, tmp_path: Path, ranked: torch.device) -> None:
    (config,) = plan("llava-tiny/finetune", data, tmp_path / "run", "precision=bf16", "trainable=[projector.*, decoder.blocks.0.mlp.*]")
    made = prepared(config, ranked)
    kept = {name: p.dtype for name, p in made.model.named_parameters()}
    half = {name for name, dtype in kept.items() if dtype == torch.bfloat16}
    assert set(kept.values()) == {torch.bfloat16, torch.float32}
    # A block with one trained part is one shard group, so all of it stays in fp32.
    assert half == {name for name in kept if name.startswith(("vision.", "head.", "decoder.embed."))}
    before = {name: p.detach().to_local().clone() for name, p in made.model.named_parameters()}
    stage.train_step(made, next(made.loader))
    moved = {name for name, p in made.model.named_parameters() if not torch.equal(before[name], p.detach().to_local())}
    assert moved == {name for name in kept if name.startswith(("projector.", "decoder.blocks.0.mlp."))}


def test_bf16_follows_fp32(data: Path, tmp_path: Path) -> None:
    for precision in ("fp32", "bf16"):
        train("llava-tiny/finetune", data, tmp_path / precision, f"precision={precision}", "optim.lr=1e-2", "optim.warmup=0")
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "fp32"), rel=0.02)
    assert losses(tmp_path / "bf16") != losses(tmp_path / "fp32")


# What goes wrong on the way


def poisoned(data: Path, folder: Path) -> tuple[Path, set[str]]:
    """The colour data with a letter in some samples that no other has, and those samples' names."""
    rows = json.loads(data.read_text())
    for row in rows[::7]:
        row["conversations"][0]["value"] += " ~"
    path = folder / "poisoned.json"
    path.write_text(json.dumps(rows))
    return path, {f"poisoned/{row['id']}" for row in rows[::7]}


def with_nan(config: TrainConfig, device: torch.device) -> stage.Stage:
    """A stage whose embedding of "~" is NaN."""
    made = prepared(config, device)
    (token,) = set(made.tokenizer.encode(" ~")) - set(made.tokenizer.encode(" "))
    with torch.no_grad():
        made.model.decoder.embed.weight.to_local()[token] = math.nan
    return made


def test_a_loss_that_is_not_finite_names_its_samples_and_stops(data: Path, tmp_path: Path, ranked: torch.device) -> None:
    path, bad = poisoned(data, tmp_path)
    (config,) = plan("llava-tiny/finetune", data, tmp_path / "run", f"data.source={path}", "batch.rows=2")
    made = with_nan(config, ranked)
    step = next(batches for batches in made.loader if {"/".join(key) for b in batches for key in b.keys} & bad)
    expected = {"/".join(key) for b in step for key in b.keys} & bad
    with pytest.raises(ValueError, match="Step 1 of stage finetune: the loss is not finite; samples: ") as raised:
        stage.train_step(made, step)
    message = str(raised.value)
    assert set(message.split("samples: ")[1].split(".")[0].split(", ")) == expected
    assert "optim.lr" in message and "log.on_nonfinite=skip" in message


def test_skipped_steps_are_counted_and_change_no_weight(data: Path, tmp_path: Path, ranked: torch.device) -> None:
    path, bad = poisoned(data, tmp_path)
    (config,) = plan(
        "llava-tiny/finetune",
        data,
        tmp_path / "run",
        f"data.source={path}",
        "batch.rows=2",
        "log.on_nonfinite=skip",
        "steps=9",
    )
    made, skipped = with_nan(config, ranked), 0
    for batches in (next(made.loader) for _ in range(8)):
        before = {name: p.detach().to_local().clone() for name, p in made.model.named_parameters()}
        report = stage.train_step(made, batches)
        poison = bool({"/".join(key) for b in batches for key in b.keys} & bad)
        skipped += poison
        same = all(torch.equal(before[n].nan_to_num(7), p.detach().to_local().nan_to_num(7)) for n, p in made.model.named_parameters())
        assert same == poison == (report.loss is None) == (report.grad_norm is None) == (report.losses == {})
        assert report.skipped_steps == skipped
    assert 0 < skipped < 8


def test_a_run_that_diverges_keeps_its_last_checkpoint(data: Path, tmp_path: Path) -> None:
    wild = ("optim.lr=1e30", "optim.warmup=0", "optim.schedule=constant", "checkpoint.every=1")
    with pytest.raises(ValueError, match="not finite"):
        train("llava-tiny/finetune", data, tmp_path / "stop", *wild)
    done = len(runs.metrics(tmp_path / "stop"))
    assert runs.steps_kept(tmp_path / "stop")[-1] == done >= 1
    store.verify(store.find(tmp_path / "stop"))
    last = train("llava-tiny/finetune", data, tmp_path / "skip", *wild, "log.on_nonfinite=skip", "checkpoint.keep_last=0")
    lines = runs.metrics(tmp_path / "skip")
    assert [line["skipped_steps"] for line in lines] == [max(0, n - done) for n in range(1, STEPS + 1)]
    assert all(line["loss"] is None for line in lines[done:]) and done < STEPS
    assert runs.digests(last)["weights/__0_0.distcp"] == runs.digests(last.with_name(f"step_{done}"))["weights/__0_0.distcp"]


def test_a_step_whose_samples_all_fail_to_decode_is_left_out(data: Path, tmp_path: Path) -> None:
    rows = []
    for n in range(60):  # more than two steps hold: a source of which nothing decodes is an error
        Image.effect_noise((60, 60), 90).convert("RGB").save(tmp_path / f"{n}.png")
        content = (tmp_path / f"{n}.png").read_bytes()
        (tmp_path / f"{n}.png").write_bytes(content[: len(content) // 2])  # the header is whole: found when the step is made
        rows.append(runs.row(str(n), "<image>\nWhat?", "noise", image=f"{n}.png"))
    (tmp_path / "bad.json").write_text(json.dumps(rows))
    overrides = (
        "data.on_error=skip",
        f"data.source={tmp_path / 'bad.json'}",
        f"data.image_folder={tmp_path}",
        "batch.rows=2",
        "steps=2",
        "checkpoint.every=1",
    )
    train("llava-tiny/finetune", data, tmp_path / "run", *overrides)
    lines = runs.metrics(tmp_path / "run")
    assert [(line["loss"], line["labels"], line["skipped_steps"]) for line in lines] == [(None, 0, 1), (None, 0, 2)]
    assert lines[-1]["skipped_samples"] > 0
    step_2 = tmp_path / "run" / "checkpoints" / "step_2"
    step_2.rename(step_2.with_name("away"))
    train("llava-tiny/finetune", data, tmp_path / "run", *overrides, resume="auto")
    # the one before the resume is counted on
    assert runs.learned(tmp_path / "run")[-1]["skipped_steps"] == 2


def test_a_loss_that_is_not_finite_stops_also_where_nothing_learns_from_it(
    data: Path,
    tmp_path: Path,
    ranked: torch.device,
) -> None:
    """Text alone where only the projector is trained: the loss is NaN, the gradient's norm is 0."""
    rows = [runs.row(f"t{n}", "Write ~.", "red " * (n + 1)) for n in range(8)]
    (tmp_path / "text.json").write_text(json.dumps(rows))
    settings = (f"data.source={tmp_path / 'text.json'}", "trainable=[projector.*]")
    (config,) = plan("llava-tiny/finetune", data, tmp_path / "run", *settings)
    made = with_nan(config, ranked)
    with pytest.raises(ValueError, match="the loss is not finite; samples: text/t"):
        stage.train_step(made, next(made.loader))


def test_a_gradient_that_is_not_finite_stops_where_every_loss_is(
    data: Path,
    tmp_path: Path,
    ranked: torch.device,
) -> None:
    (config,) = plan("llava-tiny/finetune", data, tmp_path / "run")
    made = prepared(config, ranked)

    def explode(module: object, given: object, out: Tensor) -> None:
        out.register_hook(lambda gradient: gradient * math.inf)

    made.model.projector[0].register_forward_hook(explode)
    weight = made.model.projector[2].weight
    before = weight.to_local().clone()
    with pytest.raises(ValueError, match="the gradient norm is not finite though every loss is"):
        stage.train_step(made, next(made.loader))
    assert torch.equal(weight.to_local(), before)


def test_steps_without_an_image_pass_where_only_vision_could_learn(data: Path, tmp_path: Path) -> None:
    """A micro-batch whose loss depends on no trained parameter; here whole steps, in the projector's stage."""
    rows = [runs.row(f"t{n}", "Write red.", "red " * (n + 1)) for n in range(8)]
    (tmp_path / "text.json").write_text(json.dumps(rows))
    last = train("llava-tiny/finetune", data, tmp_path / "run", f"data.source={tmp_path / 'text.json'}", "trainable=[projector.*]", "steps=2")
    (config,) = plan("llava-tiny/finetune", data, tmp_path / "run")
    lines = runs.metrics(tmp_path / "run")
    assert all(line["loss"] > 0 and line["grad_norm"] == 0 for line in lines)
    assert all(torch.equal(value, fresh(name, value.shape, config.seed)) for name, value in weights(last, config).items())


def test_rows_that_do_not_divide_are_an_error_with_near_values(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch.rows is 5, not a multiple of 1 data ranks x 2 batch.micro_rows: set it to 4 or 6"):
        train("llava-tiny", data, tmp_path / "run", "finetune:batch.rows=5")
    assert not (tmp_path / "run").exists()


# Ways to compute the same


@pytest.mark.parametrize("override", ["recompute=block", "data.workers=1"])
def test_other_ways_to_compute_change_no_bit(data: Path, tmp_path: Path, override: str) -> None:
    name = "llava-tiny/finetune"
    train(name, data, tmp_path / "a", "steps=3")
    last = train(name, data, tmp_path / "b", "steps=3", override)
    assert runs.learned(tmp_path / "b") == runs.learned(tmp_path / "a")
    assert runs.digests(last) == runs.digests(store.find(tmp_path / "a"))


@pytest.mark.slow
def test_compiled_blocks_give_the_same_losses_and_names(data: Path, tmp_path: Path) -> None:
    """In processes of their own: compilation cannot look into the type checks of tests."""
    source = (f"data.source={data}", f"data.image_folder={data.parent / 'images'}", "steps=3")
    for name, override in (("plain", "compile=false"), ("compiled", "compile=true"), ("both", "recompute=block")):
        more = ("compile=true",) if name == "both" else ()
        runs.run("train", "llava-tiny/finetune", *ONE, *source, override, *more, f"out={tmp_path / name}")
    (config,) = plan("llava-tiny/finetune", data, tmp_path / "plain")
    names = weights(tmp_path / "plain", config).keys()
    for name in ("compiled", "both"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
        assert weights(tmp_path / name, config).keys() == names


ODD = ("model.decoder.width=36", "model.decoder.heads=2", "model.decoder.ffn=51")
"""Sizes that are no multiple of 8."""


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "sizes"), [("fp32", ()), ("fp32", ODD), ("bf16", ODD)])
def test_compiled_experts_train(
    data: Path,
    tmp_path: Path,
    precision: str,
    sizes: tuple[str, ...],
) -> None:
    """A mixture of experts trains with compile=true as without, in either precision."""
    given = (*EXPERTS, *sizes, "steps=2", f"precision={precision}")
    train("llava-tiny/finetune", data, tmp_path / "plain", *given)
    source = (f"data.source={data}", f"data.image_folder={data.parent / 'images'}")
    out = ("compile=true", f"out={tmp_path / 'compiled'}")
    runs.run("train", "llava-tiny/finetune", *ONE, *source, *given, *out)
    tolerance = 1e-5 if precision == "fp32" else 1e-2
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=tolerance)


# Reports


def test_every_step_has_a_flushed_line_whatever_is_printed(data: Path, tmp_path: Path) -> None:
    out, said, seen = tmp_path / "run", [], []

    def look(config: TrainConfig, folder: Path) -> dict[str, float]:
        seen.append((config.name, folder.name, [line["step"] for line in runs.metrics(out)]))
        return {"colour": len(seen) / 10}

    stages = plan("llava-tiny", data, out, "steps=2", "log.every=0", "evaluate.every=1", *asked(data))
    loop.train(stages, say=said.append, on_evaluate=look)
    assert seen == [(name, f"step_{n}", list(range(1, n + 1))) for name, n in (("pretrain", 1), ("pretrain", 2), ("finetune", 3), ("finetune", 4))]
    assert [text.split()[0] for text in said if "loss" in text] == ["Done:"]
    evaluations = [json.loads(line) for line in (out / "evaluations.jsonl").read_text().splitlines()]
    assert evaluations[2] == {"stage": "finetune", "step": 3, "colour": 0.3} and len(evaluations) == 4
    lines = runs.metrics(out)
    assert [(line["stage"], line["step"]) for line in lines] == [("pretrain", 1), ("pretrain", 2), ("finetune", 3), ("finetune", 4)]
    for line in lines:
        assert set(line) == {
            "stage", "step", "loss", "losses", "balance", "grad_norm", "lr", "tokens", "labels", "padding", "tokens_per_s", "tiles_per_s",
            "flops_per_s", "mfu", "memory_gib", "seconds", "samples", "epochs", "skipped_samples",
            "reduced_samples", "skipped_steps",
        }  # fmt: skip
        assert line["tokens"] == round((1 - line["padding"]) * 128 * 4) and 0 < line["labels"] < line["tokens"]
        assert line["tokens_per_s"] == pytest.approx(line["tokens"] / line["seconds"]) and line["memory_gib"] > 0 < line["flops_per_s"]


def test_work_is_counted_without_padding(data: Path, tmp_path: Path, ranked: torch.device) -> None:
    """By documents, whose lengths are those of their samples encoded alone."""
    (config,) = plan("llava-tiny/finetune", data, tmp_path / "run")
    source = LlavaSource(config.data.source, config.data.image_folder)
    samples = {source[i].id: source[i] for i in range(len(source))}
    loader = stage.make_loader(config, load_tokenizer(config.data.tokenizer))
    for batch in next(loader):
        lengths = [len(loader.encoder.encode(samples[id]).tokens) for _, id in batch.keys]
        work = Work.of([batch], config, frozenset({"decoder"}))
        assert work.tokens == sum(lengths) < work.slots == batch.tokens.numel()
        assert _document_lengths(batch) == lengths


def test_lines_of_steps_that_are_done_again_are_dropped(tmp_path: Path) -> None:
    """So are those that a kill tore; the others keep every byte."""
    path = tmp_path / "metrics.jsonl"
    kept = [b'{"step": 1, "loss": 2.5}', b'{"loss": null,  "step": 2}']
    torn = [b'{"step": 2, "lo', b"[2]", b"null", b'{"stage": "a"}', b'{"step": "\xff']
    path.write_bytes(b"\n".join([kept[0], *torn, kept[1], b'{"step": 3}', b'{"step": 2']))
    cut_back(path, 2)
    assert path.read_bytes() == b"\n".join([*kept, b""])
    cut_back(tmp_path / "evaluations.jsonl", 2)
    assert list(tmp_path.iterdir()) == [path]


def test_going_back_forgets_what_was_done_after(data: Path, tmp_path: Path) -> None:
    """Lines, scores and checkpoints of later steps."""
    options = ("steps=4", "checkpoint.every=1", "checkpoint.keep_last=0", "evaluate.every=1")
    settings = (*options, *asked(data))
    out = tmp_path / "run"
    score = lambda config, folder: {"colour": 0.5}  # noqa: E731
    last = train("llava-tiny/finetune", data, out, *settings, on_evaluate=score)
    before = runs.learned(out)
    back = str(last.with_name("step_2"))
    train("llava-tiny/finetune", data, out, *settings, on_evaluate=score, resume=back)
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        lines = (out / name).read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    assert runs.learned(out) == before
    aside = sorted(path.name for path in (out / "checkpoints").glob("*.replaced"))
    assert aside == ["step_3.replaced", "step_4.replaced"]


def test_the_run_folder_is_locked_while_it_trains(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    found = []

    def look(config: TrainConfig, folder: Path) -> dict[str, float]:
        with (out / ".lock").open("w") as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        found.append(folder)
        return {}

    settings = ("steps=1", "evaluate.every=1", *asked(data))
    train("llava-tiny/finetune", data, out, *settings, on_evaluate=look)
    assert len(found) == 1
    with (out / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_printed_lines_follow_log_every(data: Path, tmp_path: Path) -> None:
    said: list[str] = []
    loop.train(plan("llava-tiny/finetune", data, tmp_path / "run", "log.every=2"), say=said.append)
    *shown, ending = [text for text in said if " loss " in text]
    assert ending.startswith("Done: step 5 after 0m ")
    assert [text.split()[1] for text in shown] == ["2/5", "4/5", "5/5"]
    words = ("colour", "copy", "grad", "lr", "tok/s", "padding", "tiles/s", "GiB", "ETA")
    assert all(word in shown[1] for word in words) and "FLOP/s" not in shown[1]
    losses = [line["loss"] for line in runs.metrics(tmp_path / "run")]
    told = [float(text.split()[3]) for text in shown]
    means = [sum(losses[0:2]) / 2, sum(losses[2:4]) / 2, losses[4]]
    assert told == pytest.approx(means, abs=6e-5)
    assert said[0].startswith("1 rank on ") and said[0].endswith("; precision fp32") and "GiB" in said[0]
    (table,) = [text for text in said if "trained" in text]
    assert "Stage finetune (fp32), 5 steps" in table and "vision" in table


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_holds_the_curves(data: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train("llava-tiny/finetune", data, tmp_path / "run", "log.tensorboard=true", "steps=3")
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    for tag, name in (("train/loss", "loss"), ("train/lr", "lr"), ("train/grad_norm", "grad_norm")):
        curve = [(event.step, event.value) for event in board.Scalars(tag)]
        lines = runs.metrics(tmp_path / "run")
        assert [step for step, _ in curve] == [1, 2, 3] and [value for _, value in curve] == pytest.approx([line[name] for line in lines], rel=1e-6)
    assert {"loss/colour", "loss/copy"} <= set(board.Tags()["scalars"])


def test_held_out_accuracy_is_what_eval_says_of_that_checkpoint(data: Path, tmp_path: Path) -> None:
    overrides = ("evaluate.every=3", *asked(data), "steps=6", "optim.lr=1e-2")
    stages = plan("llava-tiny/finetune", data, tmp_path / "run", *overrides, "checkpoint.keep_last=0")
    last = api.train(stages, say=lambda text: None)
    evaluations = [json.loads(line) for line in (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in evaluations] == [3, 6] and set(evaluations[0]) == {"stage", "step", "colour", "copy"}
    for line in evaluations:
        truth = api.evaluate(last.with_name(f"step_{line['step']}"), data=data, image_folder=data.parent / "images")
        assert truth["accuracy"] == {kind: line[kind] for kind in ("colour", "copy")} and truth["n"] == 24


# Where weights come from


def same(name: str) -> bool:
    return not name.startswith("projector.")


def test_init_takes_a_checkpoint_and_draws_what_is_to_be_fresh(data: Path, tmp_path: Path, ranked: torch.device) -> None:
    name = "llava-tiny/finetune"
    (config,) = plan(name, data, tmp_path / "a", "trainable=[*]", "steps=2", "seed=5", "optim.warmup=0")
    source = weights(loop.train((config,), say=lambda text: None), config)
    checks: dict[str, Callable[[str], bool]] = {
        f"init={tmp_path / 'a'}": lambda name: True,
        f"init.model={tmp_path / 'a' / 'checkpoints' / 'step_2'}": lambda name: True,
        f"init={{model: {tmp_path / 'a'}, projector: fresh}}": lambda name: not name.startswith("projector."),
        f"init={{model: {tmp_path / 'a'}, decoder: fresh}}": lambda name: not name.startswith(("decoder.", "head.")),
        f"init={{model: {tmp_path / 'a'}, vision: fresh}}": lambda name: not name.startswith("vision."),
    }
    ranks.start()  # the training above left its group
    for override, taken in checks.items():
        (other,) = plan(name, data, tmp_path / "b", override, "seed=9")
        got = {n: p.detach().full_tensor() for n, p in prepared(other, ranked).model.named_parameters()}
        for n, value in got.items():
            assert torch.equal(value, source[n] if taken(n) else fresh(n, value.shape, 9)), (override, n)


def test_a_stage_starts_where_the_one_before_ended(data: Path, tmp_path: Path) -> None:
    chain = ("steps=3", "optim.lr=1e-2", "optim.warmup=0", "checkpoint.keep_last=0")
    last = train("llava-tiny", data, tmp_path / "both", *chain)
    train("llava-tiny/finetune", data, tmp_path / "second", *chain, f"init={last.with_name('step_3')}")
    assert losses(tmp_path / "both")[3:] == losses(tmp_path / "second")
    train("llava-tiny/finetune", data, tmp_path / "alone", *chain)
    assert losses(tmp_path / "alone") != losses(tmp_path / "second")
    # init=PATH for all stages is the run's start; for the second alone it is that stage's.
    train("llava-tiny", data, tmp_path / "all", *chain, f"init={last}")
    train("llava-tiny", data, tmp_path / "late", *chain, f"finetune:init={last}")
    assert losses(tmp_path / "late")[:3] == losses(tmp_path / "both")[:3] != losses(tmp_path / "all")[:3]
    assert losses(tmp_path / "late")[3:] != losses(tmp_path / "all")[3:]


def test_resume_does_not_draw_a_fresh_part_again(data: Path, tmp_path: Path) -> None:
    chain = ("steps=4", "optim.lr=1e-2", "checkpoint.every=2", "checkpoint.keep_last=0", "finetune:init.projector=fresh")
    last = train("llava-tiny", data, tmp_path / "run", *chain)
    whole = runs.learned(tmp_path / "run")
    kept = runs.digests(last)
    last.rename(last.with_name("away"))
    assert train("llava-tiny", data, tmp_path / "run", *chain, resume="auto") == last
    assert runs.learned(tmp_path / "run") == whole and runs.digests(last) == kept
    after_first, after_second = (weights(last.with_name(f"step_{n}"), plan("llava-tiny", data, tmp_path / "run")[0]) for n in (4, 8))
    assert not torch.equal(after_first["projector.0.weight"], after_second["projector.0.weight"])


def test_dropout_goes_on_as_if_nothing_had_stopped_it(data: Path, tmp_path: Path) -> None:
    """It is drawn from the run's seed and, behind a resume, from the state that was saved."""
    rate = ("model.decoder.hidden_dropout=0.3", "trainable=[*]", "steps=4")
    chain = (*rate, "checkpoint.every=2", "checkpoint.keep_last=0")
    last = train("llava-tiny/finetune", data, tmp_path / "run", *chain)
    whole = runs.learned(tmp_path / "run")
    kept = runs.digests(last)
    torch.rand(7)  # others draw in this process too
    train("llava-tiny/finetune", data, tmp_path / "twin", *chain)
    assert runs.learned(tmp_path / "twin") == whole
    last.rename(last.with_name("away"))
    train("llava-tiny/finetune", data, tmp_path / "run", *chain, resume="auto")
    assert runs.learned(tmp_path / "run") == whole and runs.digests(last) == kept
    train("llava-tiny/finetune", data, tmp_path / "other", *chain, "model.decoder.hidden_dropout=0")
    assert runs.learned(tmp_path / "other") != whole


def test_a_run_that_has_more_steps_than_are_asked_for_now_has_nothing_left_to_do(
    data: Path,
    tmp_path: Path,
) -> None:
    last = train("llava-tiny/finetune", data, tmp_path / "run", "steps=3")
    for steps in (3, 2):
        said: list[str] = []
        asked_for = plan("llava-tiny/finetune", data, tmp_path / "run", f"steps={steps}")
        assert loop.train(asked_for, resume="auto", say=said.append) == last
        assert any("Nothing left to do" in line for line in said)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("pretrain:steps=3",), "was saved after 4 steps of earlier stages, which now have 3: put their steps back"),
        (("finetune:name=tune",), "is of stage 'finetune', which this run does not have: its stages are pretrain, tune"),
        (("seed=3",), "the saved data state has seed 0 but this run has 3"),
    ],
)
def test_a_resume_that_cannot_be_the_same_run_is_refused(data: Path, tmp_path: Path, overrides: tuple[str, ...], message: str) -> None:
    chain = ("steps=4", "checkpoint.every=2", "checkpoint.keep_last=0")
    last = train("llava-tiny", data, tmp_path / "run", *chain)
    with pytest.raises(ValueError, match=message):
        train("llava-tiny", data, tmp_path / "run", *chain, *overrides, resume=str(last.with_name("step_6")))
    assert replace(plan("llava-tiny", data, tmp_path / "run", *chain)[0]).steps == 4


def test_stopped_is_raised_after_saving(data: Path, tmp_path: Path) -> None:
    import signal

    def interrupt(config: TrainConfig, folder: Path) -> dict[str, float]:
        signal.raise_signal(signal.SIGTERM)
        return {}

    overrides = ("evaluate.every=2", *asked(data))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(loop.Stopped, match="Stopped at step 3 of 5") as stopped:
        train("llava-tiny/finetune", data, tmp_path / "run", *overrides, on_evaluate=interrupt)
    assert stopped.value.exit_code == 143 and runs.steps_kept(tmp_path / "run") == [2, 3]
    assert signal.getsignal(signal.SIGTERM) == before


EXPERTS = ("model.decoder.experts=4", "model.decoder.active_experts=2", "model.decoder.balance=0.5", "batch.rows=4", "trainable=[*]")


def test_the_experts_balance_is_the_steps(data: Path, tmp_path: Path) -> None:
    """The balance loss is a mean over the step's rows, however they are cut into micro-batches; its weight changes what is learnt."""
    found, ends = [], []
    for rows in (1, 2, 4):
        out = tmp_path / str(rows)
        last = train("llava-tiny/finetune", data, out, *EXPERTS, f"batch.micro_rows={rows}", "optim.lr=1e-3")
        found.append([line["balance"] for line in runs.metrics(out)])
        ends.append(weights(last, plan("llava-tiny/finetune", data, out, *EXPERTS)[0]))
    assert all(abs(a - b) < 1e-6 for other in found[1:] for a, b in zip(found[0], other, strict=True)) and found[0][0] > 0.5 * 2 * 0.9
    # Softmax does not see a key's bias: its gradient is rounding, which Adam makes as large as any.
    names = [name for name in ends[0] if not name.endswith(".k.bias")]
    assert all((ends[0][n] - other[n]).abs().max() < 1e-5 for other in ends[1:] for n in names)
    out = tmp_path / "without"
    last = train("llava-tiny/finetune", data, out, *EXPERTS, "batch.micro_rows=2", "optim.lr=1e-3", "model.decoder.balance=0.0")
    assert {line["balance"] for line in runs.metrics(out)} == {None}
    router = weights(last, plan("llava-tiny/finetune", data, out, *EXPERTS)[0])["decoder.blocks.0.mlp.router.weight"]
    assert (router - ends[0]["decoder.blocks.0.mlp.router.weight"]).abs().max() > 1e-4
