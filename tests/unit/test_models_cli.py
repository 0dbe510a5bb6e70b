"""`flexport models` lists families and known models, or shows one model; quickly."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file

from flexport.cli.main import main
from flexport.models import (
    families,
    known_config,
    known_names,
    num_active_parameters,
    spec_of,
    summary,
)
from flexport.testing.checkpoints import tiny_opt


def shown(capsys, *arguments):
    """The exit code, and the JSON object that is printed."""
    code = main(["models", *arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_the_json_list_has_every_family_and_every_known_model_with_its_size(capsys):
    code, data = shown(capsys)

    assert code == 0
    assert [row["family"] for row in data["families"]] == [f.model_type for f in families()]
    assert all(row["about"] and row["from"] == "flexport" for row in data["families"])
    assert [row["model"] for row in data["models"]] == list(known_names())
    (row,) = (row for row in data["models"] if row["model"] == "facebook/opt-1.3b")
    assert row["parameters"] == row["active_parameters"] == 1_315_758_080
    assert row["kv_bytes_per_token"] == 196_608


def test_the_table_names_every_family_and_every_known_model(capsys):
    code = main(["models"])

    out = capsys.readouterr().out
    assert code == 0
    assert all(name in out for name in known_names())
    assert all(f"\n{family.model_type} " in out for family in families())
    assert "174.60 B" in out


@pytest.mark.parametrize("arguments", [[], ["gpt-oss-20b"]], ids=" ".join)
def test_neither_list_nor_model_needs_torch(arguments):
    probe = "import sys; from flexport.cli import main; "
    probe += f"code = main.main({['models', *arguments]!r}); "
    probe += "assert 'torch' not in sys.modules; sys.exit(code)"

    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, check=False)

    assert done.returncode == 0, done.stderr.decode()


def test_a_directory_is_looked_at_without_torch(tmp_path):
    tiny_opt(tmp_path / "model")
    probe = "import sys; from flexport.cli import main; "
    probe += f"code = main.main(['models', {str(tmp_path / 'model')!r}]); "
    probe += "assert 'torch' not in sys.modules; sys.exit(code)"

    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, check=False)

    assert done.returncode == 0, done.stderr.decode()


def test_the_layers_of_a_model_with_windows_are_told_apart(capsys):
    code, data = shown(capsys, "gemma-2-2b")

    assert code == 0
    assert [(kind["layers"], kind["attention"]["window_tokens"]) for kind in data["kinds"]] == [
        (13, 4096),
        (13, None),
    ]
    assert data["kinds"][0]["attention"]["heads"] == 8
    assert data["kinds"][0]["attention"]["kv_heads"] == 4
    # 2 for keys and values, 4 heads of 256 features, 2 bytes each
    assert [kind["kv_bytes_per_token"] for kind in data["kinds"]] == [2 * 4 * 256 * 2] * 2
    assert data["kv_bytes_per_token"] == 26 * 2 * 4 * 256 * 2


def test_layers_that_only_turn_differently_are_one_kind():
    spec = spec_of({"model_type": "smollm3", "num_hidden_layers": 8, "no_rope_layer_interval": 4})

    kinds = summary(spec)["kinds"]

    assert len(set(spec.layers)) == 2
    assert [kind["layers"] for kind in kinds] == [8]


def test_windows_are_said_to_cap_the_cache_they_are_for(capsys):
    main(["models", "gemma-2-2b"])

    out = capsys.readouterr().out
    assert "104.00 KiB a token in 16 bits, 52.00 KiB of it for the last 4096 tokens only" in out
    assert "13 ×" in out


def test_of_experts_a_token_meets_those_that_it_passes(capsys):
    _, data = shown(capsys, "Mixtral-8x7B-v0.1")

    one = 3 * 4096 * 14336
    assert data["parameters"] - data["active_parameters"] == 32 * 6 * one
    assert data["kinds"][0]["mlp"]["experts"] == 8
    assert data["kinds"][0]["mlp"]["experts_per_token"] == 2


@pytest.mark.parametrize(
    ("name", "billions"),
    [("Qwen3-30B-A3B", 3.3), ("Qwen3-235B-A22B", 22), ("gpt-oss-120b", 5.7), ("DeepSeek-V3", 37)],
)
def test_as_many_parameters_are_active_as_the_makers_say(name, billions):
    config = known_config(name)
    assert config is not None

    active = num_active_parameters(spec_of(config))

    assert active / 1e9 == pytest.approx(billions, rel=0.02)


def test_a_compressed_cache_is_called_so(capsys):
    main(["models", "deepseek-ai/DeepSeek-V3"])

    out = capsys.readouterr().out
    assert "128 heads on one compressed vector of 576 features" in out
    assert "8 of 256 experts of 2048" in out
    assert "one of 2048 for all" in out


def test_a_directory_says_what_its_checkpoint_holds(capsys, tmp_path):
    directory = tiny_opt(tmp_path / "model", dtype="bfloat16")

    code, data = shown(capsys, str(directory))

    assert code == 0
    assert data["checkpoint"] == {
        "complete": True,
        "num_bytes": 2 * data["parameters"],
        "dtype": "bfloat16",
        "packing": None,
    }


def test_a_checkpoint_that_lacks_a_tensor_is_told_with_its_name(capsys, tmp_path):
    directory = tiny_opt(tmp_path / "model")
    (file,) = directory.glob("*.safetensors")
    state = load_file(file)
    del state["model.decoder.layers.1.fc1.bias"]
    save_file(state, file)

    code, data = shown(capsys, str(directory))
    text_code = main(["models", str(directory)])

    out = capsys.readouterr().out
    assert code == text_code == 2
    assert data["layers"] == 3
    assert data["checkpoint"]["complete"] is False
    assert "model.decoder.layers.1.fc1.bias" in data["checkpoint"]["reason"]
    assert "can't be run: " in out
    assert "model.decoder.layers.1.fc1.bias" in out


def test_a_config_that_can_not_be_run_is_refused_by_its_field(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "opt", "num_hidden_layers": 0}))

    code = main(["models", str(tmp_path)])

    assert code == 2
    assert "num_hidden_layers is 0" in capsys.readouterr().err


def test_an_unknown_name_is_wrong_usage_and_close_ones_are_told(capsys):
    code = main(["models", "meta-llama/Llama-3.1-7B"])

    assert code == 2
    err = capsys.readouterr().err
    assert "no directory and none of the" in err
    assert "meta-llama/Llama-3.1-70B" in err
