"""`flexport quality` measures what transformers would, wherever tensors live."""

from __future__ import annotations

import json
import math

import pytest
import torch

import flexport
from flexport import demo
from flexport.apps.quality import text_prefix, windows
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


def test_a_policy_file_says_where_things_live(
    reference, nothing_left, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("FLEXPORT_CACHE", str(tmp_path / "cache"))
    text, path = tmp_path / "text.txt", tmp_path / "policy.json"
    text.write_text(TEXT)
    policy = Policy(weights=Split(device=0.0, disk=1.0), batch_size=3)
    path.write_text(policy.to_json())

    result = quality(
        capsys, "--model", str(reference().directory), "--text", str(text), "--policy", str(path),
        "--codecs", "int8,none", "--max-tokens", "50", "--device-memory", "64MiB",
        "--offload-dir", str(nothing_left),
    )  # fmt: skip

    exact, packed = result["codecs"]
    assert exact["policy"] == policy.to_dict()
    assert packed["policy"] == {**policy.to_dict(), "compress_weights": "int8"}
    assert 0 < packed["moved_bytes"]["disk_to_host"] < exact["moved_bytes"]["disk_to_host"]
    assert result["num_tokens"] == 50


@pytest.mark.parametrize("how", ["option", "policy"])
def test_few_values_are_measured_beside_all_of_them(how, reference, tmp_path, capsys):
    text, path = tmp_path / "text.txt", tmp_path / "policy.json"
    text.write_text(TEXT)
    path.write_text(Policy(attn_sparsity=0.1).to_json())
    asked = {"option": ["--attn-sparsity", "0.1"], "policy": ["--policy", str(path)]}[how]

    result = quality(
        capsys, "--model", str(reference().directory), "--text", str(text), *asked,
        "--max-tokens", "50", "--device-memory", "64MiB", "--dtype", "float32",
    )  # fmt: skip

    exact, few = result["codecs"]
    assert (exact["attn_sparsity"], exact["policy"]["attn_sparsity"]) == (1, 1)
    assert (few["attn_sparsity"], few["policy"]["attn_sparsity"]) == (0.1, 0.1)
    assert (few["weights"], few["cache"]) == ("none", "none")
    assert few["perplexity"] != exact["perplexity"]


def test_the_embedded_model_has_its_text_and_its_job(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("FLEXPORT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "quality.json"

    code = main(
        ["quality", "--codecs", "int4,none", "--max-tokens", "1000", "--dtype", "float32",
         "--json", str(path)]
    )  # fmt: skip

    out, _ = capsys.readouterr()
    exact, packed = json.loads(path.read_text())["codecs"]
    assert code == 0
    for line in (exact, packed):
        assert f"{line['perplexity']:.4f}" in out
        assert f"{line['demo']['num_exact']}/{line['demo']['num_rows']}" in out
        assert line["demo"]["num_exact"] >= 0.95 * line["demo"]["num_rows"] > 0
        assert line["demo"]["num_rows"] == len(demo.expected())
    # Words of the records are guesses, what stands in an answer is not.
    assert 2 < exact["perplexity"] < 4
    assert exact["right_token"] > 0.6
    assert (exact["weights"], exact["weight_bits"]) == ("none", 16)
    assert (packed["weights"], packed["weight_bits"]) == ("int4", 4.5)
    assert packed["compression"]["weights"]["codec"] == "int4"
    assert packed["perplexity"] == pytest.approx(packed["ratio"] * exact["perplexity"])
    assert packed["ratio"] != 1
    assert packed["ratio"] == pytest.approx(1, abs=0.02)
    assert 0.8 < packed["same_token"] < 1
