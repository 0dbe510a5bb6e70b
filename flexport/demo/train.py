"""Makes the embedded demo from nothing: tokenizer, model and job files, all from fixed seeds.

    python -m flexport.demo.train OUT_DIR

writes OUT_DIR/model (a Hugging Face directory that OPTForCausalLM and AutoTokenizer load),
OUT_DIR/input.jsonl and OUT_DIR/expected.jsonl, and prints the accuracy on the demo job after the
weights are rounded to bfloat16, computed in float32 and in bfloat16.

Dimension key: B rows of a batch, L positions of the longest row, V vocabulary.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from flexport.demo import Accuracy, accuracy
from flexport.demo.data import DEMO_SEED, TRAIN_SEED, Record, make_records

NUM_DEMO_ROWS = 256
VOCAB_SIZE = 768
MAX_POSITIONS = 256
MAX_ANSWER_TOKENS = 80

# The ids that OPT's own tokenizer has; a sequence begins and ends with </s>.
BOS_TOKEN, PAD_TOKEN, EOS_TOKEN, UNKNOWN_TOKEN = "<s>", "<pad>", "</s>", "<unk>"
PAD_ID, EOS_ID = 1, 2

IGNORED = -100
"""The label that cross_entropy skips."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The training run; the defaults are the one that made the committed model."""

    hidden_size: int = 128
    num_layers: int = 6
    num_heads: int = 4
    num_steps: int = 5000
    batch_tokens: int = 4096
    peak_learning_rate: float = 2e-3
    warmup_steps: int = 300
    weight_decay: float = 0.05
    prompt_loss_weight: float = 0.1
    num_threads: int = 2
    seed: int = 1


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE that cuts numbers into digits, so that a number is copied digit by digit."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS_TOKEN, PAD_TOKEN, EOS_TOKEN, UNKNOWN_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    records = itertools.islice(make_records(TRAIN_SEED, subset="train"), 20_000)
    tokenizer.train_from_iterator((r.prompt + r.answer for r in records), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{EOS_TOKEN} $A", special_tokens=[(EOS_TOKEN, EOS_ID)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=EOS_TOKEN,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        unk_token=UNKNOWN_TOKEN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, model_dir: Path) -> None:
    """Write the tokenizer's files so that every transformers from 4.53 on loads them."""
    tokenizer.save_pretrained(model_dir)
    # From version 5 on transformers writes a class name that older ones lack, and leaves out the
    # map of special tokens; new ones read the old forms too.
    settings_path = model_dir / "tokenizer_config.json"
    settings = json.loads(settings_path.read_text(encoding="utf-8"))
    settings.pop("backend", None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    _write_json(settings_path, settings)
    _write_json(model_dir / "special_tokens_map.json", dict(tokenizer.special_tokens_map))


def _write_json(path: Path, value: dict[str, object]) -> None:
    text = json.dumps(value, indent=2, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8", newline="\n")


def build_model(recipe: Recipe) -> OPTForCausalLM:
    """An untrained OPT in float32."""
    config = OPTConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=recipe.hidden_size,
        word_embed_proj_dim=recipe.hidden_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        ffn_dim=4 * recipe.hidden_size,
        max_position_embeddings=MAX_POSITIONS,
        do_layer_norm_before=True,
        enable_bias=True,
        activation_function="relu",
        dropout=0.0,
        attention_dropout=0.0,
        layerdrop=0.0,
        bos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
        eos_token_id=EOS_ID,
        init_std=0.02,
    )
    # The batches are short and many: plain products train twice as fast here as the fused kernel.
    config._attn_implementation = "eager"
    model = OPTForCausalLM(config)
    with torch.no_grad():
        positions = model.model.decoder.embed_positions.weight
        positions.copy_(0.05 * _sinusoids(*positions.shape))
    return model


def _sinusoids(num_positions: int, size: int) -> torch.Tensor:
    """Sines and cosines of many wavelengths.

    A shift by one position is a rotation of these, the same everywhere, so that "the token before
    this one", on which all copying rests, is linear from the first step.
    """
    wavelengths = torch.exp(torch.linspace(math.log(4.0), math.log(1000.0), size // 2))
    angles = torch.arange(num_positions)[:, None] * (2 * math.pi / wavelengths)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """Token ids of one training row, and where its answer starts."""

    ids: list[int]
    answer_start: int


def _examples(tokenizer: PreTrainedTokenizerFast, records: Sequence[Record]) -> list[Example]:
    # Prompt and answer are encoded apart, as they are at generation.
    prompts = tokenizer([record.prompt for record in records])["input_ids"]
    answers = tokenizer([record.answer for record in records], add_special_tokens=False)[
        "input_ids"
    ]
    return [
        Example(ids=[*prompt, *answer, EOS_ID], answer_start=len(prompt))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def training_batches(
    tokenizer: PreTrainedTokenizerFast, recipe: Recipe
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Endless (ids_BL, labels_BL, weights_BL) of rows of like length, never a row twice."""
    records = make_records(TRAIN_SEED, subset="train")
    generator = torch.Generator().manual_seed(recipe.seed)
    while True:
        examples = _examples(tokenizer, list(itertools.islice(records, 8192)))
        examples.sort(key=lambda example: len(example.ids))
        batches: list[list[Example]] = [[]]
        for example in examples:
            # Rows come in order of length, so this row's length is the batch's width.
            if (len(batches[-1]) + 1) * len(example.ids) > recipe.batch_tokens:
                batches.append([])
            batches[-1].append(example)
        for index in torch.randperm(len(batches), generator=generator).tolist():
            yield _collate(batches[index], recipe.prompt_loss_weight)


def _collate(
    batch: Sequence[Example], prompt_loss_weight: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # Right padding: under a causal mask no real token sees it, so no mask is needed.
    width = max(len(example.ids) for example in batch)
    ids_BL = torch.full((len(batch), width), PAD_ID)
    labels_BL = torch.full((len(batch), width), IGNORED)
    weights_BL = torch.zeros(len(batch), width)
    for row, example in enumerate(batch):
        length = len(example.ids)
        ids_BL[row, :length] = torch.tensor(example.ids)
        labels_BL[row, : length - 1] = torch.tensor(example.ids[1:])
        weights_BL[row, : length - 1] = prompt_loss_weight
        weights_BL[row, example.answer_start - 1 : length - 1] = 1.0
    return ids_BL, labels_BL, weights_BL


def _learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    warm = min(1.0, (step + 1) / recipe.warmup_steps)
    return recipe.peak_learning_rate * warm * (1 + math.cos(math.pi * step / recipe.num_steps)) / 2


def train(model: OPTForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> None:
    """Train in place; matrix products in bfloat16, everything else in float32."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": recipe.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=recipe.peak_learning_rate,
        betas=(0.9, 0.98),
        fused=True,
    )
    model.train()
    start_s = time.monotonic()
    batches = itertools.islice(training_batches(tokenizer, recipe), recipe.num_steps)
    for step, (ids_BL, labels_BL, weights_BL) in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step, recipe)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits_BLV = model(input_ids=ids_BL, use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(
            logits_BLV.float().flatten(0, 1),
            labels_BL.flatten(),
            ignore_index=IGNORED,
            reduction="none",
        )
        loss = (losses * weights_BL.flatten()).sum() / weights_BL.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 99:
            answers = losses[weights_BL.flatten() == 1.0].mean().item()
            elapsed_s = time.monotonic() - start_s
            print(
                f"step {step + 1}/{recipe.num_steps}: loss {loss.item():.4f}, "
                f"answers only {answers:.4f}, {elapsed_s:.0f} s",
                flush=True,
            )
    model.eval()


def evaluate(
    model: OPTForCausalLM, tokenizer: PreTrainedTokenizerFast, records: Sequence[Record]
) -> Accuracy:
    """Exact matches of greedy answers, with transformers' own generate."""
    rows = []
    for first in range(0, len(records), 64):
        batch = tokenizer(
            [record.prompt for record in records[first : first + 64]],
            padding=True,
            return_tensors="pt",
        )
        with torch.inference_mode():
            ids_BL = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=MAX_ANSWER_TOKENS,
                do_sample=False,
            )
        answers_BL = ids_BL[:, batch["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(answers_BL, skip_special_tokens=True)
        rows += [{"id": _row_id(first + at), "text": text} for at, text in enumerate(texts)]
    answers = {_row_id(at): record.answer for at, record in enumerate(records)}
    return accuracy(rows, answers)


def _row_id(index: int) -> str:
    return f"demo-{index:03d}"


def demo_records() -> list[Record]:
    """The records of the demo job."""
    return list(itertools.islice(make_records(DEMO_SEED, subset="demo"), NUM_DEMO_ROWS))


def write_job(out_dir: Path) -> None:
    """Write input.jsonl and expected.jsonl."""
    records = demo_records()
    with (out_dir / "input.jsonl").open("w", encoding="utf-8", newline="\n") as file:
        for index, record in enumerate(records):
            row = {
                "id": _row_id(index),
                "prompt": record.prompt,
                "max_tokens": MAX_ANSWER_TOKENS,
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    with (out_dir / "expected.jsonl").open("w", encoding="utf-8", newline="\n") as file:
        for index, record in enumerate(records):
            row = {"id": _row_id(index), "text": record.answer}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def main() -> None:
    """Make the demo in the directory that the command line names."""
    recipe = Recipe()
    parser = argparse.ArgumentParser(description="Make the embedded demo model and its job.")
    parser.add_argument("out_dir", type=Path, help="directory to write, made if it is missing")
    parser.add_argument(
        "--num-steps",
        type=int,
        default=recipe.num_steps,
        help="optimizer steps (default %(default)s; fewer give a worse model sooner)",
    )
    arguments = parser.parse_args()
    recipe = Recipe(num_steps=arguments.num_steps)
    model_dir = arguments.out_dir / "model"
    model_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    torch.set_num_threads(recipe.num_threads)

    start_s = time.monotonic()
    tokenizer = train_tokenizer()
    model = build_model(recipe)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{num_parameters} parameters, {recipe.num_steps} steps", flush=True)
    train(model, tokenizer, recipe)

    narrow = model.to(torch.bfloat16)
    narrow.generation_config = GenerationConfig(
        bos_token_id=EOS_ID, eos_token_id=EOS_ID, pad_token_id=PAD_ID
    )
    narrow.save_pretrained(model_dir)
    # Weights are written readable by their owner only, which an installed package must not be.
    for path in model_dir.glob("*.safetensors"):
        path.chmod(0o644)
    save_tokenizer(tokenizer, model_dir)
    write_job(arguments.out_dir)
    print(f"trained and written in {time.monotonic() - start_s:.0f} s", flush=True)

    records = demo_records()
    for dtype in (torch.float32, torch.bfloat16):
        loaded = OPTForCausalLM.from_pretrained(model_dir, dtype=dtype)
        result = evaluate(loaded, tokenizer, records)
        print(f"{dtype}: {result.num_exact} of {result.num_rows} rows exact", flush=True)


if __name__ == "__main__":
    main()
