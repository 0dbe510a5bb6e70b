"""`flexport quality` measures what transformers would, wherever tensors live."""

from __future__ import annotations

import json
import math
import shutil
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file

import flexport
from flexport import demo
from flexport.apps.batch import Quiet
from flexport.apps.quality import Codecs, compare, text_prefix, windows
from flexport.cli.main import main
from flexport.policy import Policy, Split

TEXT = (
    "What a window leaves out, the next one reads: 1, 2, 3; and so on, as far as a text goes. " * 3
)


def quality(capsys, *arguments):
    code = main(["quality", "--json", "-", *arguments])
    assert code == 0
    return json.loads(capsys.readouterr().out)


def _expected(model, pairs):
    """Perplexity, and the share of right tokens, by a whole forward pass a window."""
    log_probs, num_right = [], 0
    for context, target in pairs:
        with torch.no_grad():
            logits_TV = model(torch.tensor([[*context, *target]])).logits[0, len(context) - 1 : -1]
        targets_T = torch.tensor(target)
        log_probs += logits_TV.log_softmax(-1).gather(-1, targets_T[:, None])[:, 0].tolist()
        num_right += int((logits_TV.argmax(-1) == targets_T).sum())
    return math.exp(-sum(log_probs) / len(log_probs)), num_right / len(log_probs)


@pytest.mark.parametrize(
    "options",
    [
        ["--percent", *["100", "0"] * 3],
        ["--percent", *["0"] * 6, "--batch-size", "2", "--prefill-tokens", "9"],
        ["--percent", *["20", "40"] * 3, "--num-batches", "2", "--sweep-tokens", "30"],
    ],
    ids=["in memory", "on disk", "mixed"],
)
def test_perplexity_is_that_of_transformers_window_by_window(
    options, reference, nothing_left, tmp_path, capsys
):
    found = reference()
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    with flexport.LLM(found.directory, device_memory="64MiB") as llm:
        assert llm.tokenizer is not None
        ids = llm.tokenizer.encode_continuation(TEXT)
        prefix = text_prefix(llm.tokenizer)
    pairs = list(windows(ids, prefix=prefix, window=40, stride=16))

    result = quality(
        capsys, "--model", str(found.directory), "--text", str(path), "--dtype", "float32",
        "--window", "40", "--stride", "16", "--codecs", "none,none", "--device-memory", "64MiB",
        "--offload-dir", str(nothing_left), *options,
    )  # fmt: skip

    perplexity, right_token = _expected(found.model, pairs)
    (line,) = result["codecs"]
    assert line["perplexity"] == pytest.approx(perplexity, rel=1e-4)
    assert line["right_token"] == right_token
    assert (line["ratio"], line["same_token"]) == (1, 1)
    assert (line["weight_bits"], line["cache_bits"]) == (pytest.approx(32, rel=0.01), 32)
    assert (result["num_tokens"], result["num_windows"]) == (len(ids), len(pairs))
    assert "demo" not in line


def test_a_policy_file_says_where_things_live(reference, nothing_left, tmp_path, capsys):
    text, path = tmp_path / "text.txt", tmp_path / "policy.json"
    text.write_text(TEXT)
    policy = Policy(weights=Split(device=0.0, disk=1.0), batch_size=3)
    path.write_text(policy.to_json())

    result = quality(
        capsys, "--model", str(reference().directory), "--text", str(text), "--policy", str(path),
        "--codecs", "none,none", "--max-tokens", "50", "--device-memory", "64MiB",
        "--offload-dir", str(nothing_left),
    )  # fmt: skip

    (line,) = result["codecs"]
    assert line["policy"] == policy.to_dict()
    assert line["moved_bytes"]["disk_to_host"] > 0
    assert result["num_tokens"] == 50


def test_weights_that_are_rounded_are_seen_to_be(reference, tmp_path):
    """A codec's stand-in: the same checkpoint with few bits a weight."""
    found = reference()
    rounded = shutil.copytree(found.directory, tmp_path / "rounded")
    for path in rounded.glob("*.safetensors"):
        save_file({name: _rounded(weight) for name, weight in load_file(path).items()}, path)
    codecs = Codecs(weights="int4")

    @contextmanager
    def opened(asked):
        directory = rounded if asked == codecs else found.directory
        with flexport.LLM(directory, dtype="float32", device_memory="64MiB") as llm:
            yield llm

    pairs = [
        (tuple(prompt), tuple(ids)) for prompt, ids in zip(found.prompts, found.greedy, strict=True)
    ]
    exact, packed = compare(opened, [codecs], pairs, Quiet(), with_demo=False)

    assert (exact.figures.same_token, exact.figures.right_token) == (1, 1)
    assert 0.5 < packed.figures.same_token < 1
    assert packed.figures.right_token == packed.figures.same_token
    assert packed.figures.ratio > 1.01


def _rounded(weight):
    """About eight bits of it: a random model is easily put off."""
    step = weight.abs().max() / 128
    return (weight / step).round() * step


def test_the_embedded_model_has_its_text_and_its_job(capsys, tmp_path):
    path = tmp_path / "quality.json"

    code = main(
        ["quality", "--codecs", "none,none", "--max-tokens", "1000", "--dtype", "float32",
         "--json", str(path)]
    )  # fmt: skip

    out, _ = capsys.readouterr()
    (line,) = json.loads(path.read_text())["codecs"]
    assert code == 0
    assert "perplexity" in out
    assert f"{line['demo']['num_exact']}/{line['demo']['num_rows']}" in out
    assert line["demo"]["num_exact"] >= 0.95 * line["demo"]["num_rows"] > 0
    assert line["demo"]["num_rows"] == len(demo.expected())
    # Words of the records are guesses, what stands in an answer is not.
    assert 2 < line["perplexity"] < 4
    assert line["right_token"] > 0.6
