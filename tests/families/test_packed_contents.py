"""What a packed checkpoint may have in it, and what is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from packed_models import DEEPSEEK, LLAMA, Case, pack
from packers import PACKERS, Packed, Packer
from safetensors.torch import load_file, save_file
from tiny_families import LLAMA_SIZES
from torch import Tensor
from transformers import AutoModelForCausalLM

import flexport
from flexport.cli.main import main
from flexport.engine.shards import place_weights
from flexport.engine.source import open_source
from flexport.errors import CheckpointError, UnsupportedModel
from flexport.policy import Split
from flexport.testing.families.mixes import MIXES, reference_from, run
from flexport.testing.families.tiny import Variant, make


def packed_once(case: Case, directory: Path) -> Path:
    pack(case, directory / "whole", directory / "packed")
    return directory / "packed"


def rewrite(directory: Path, **fields: object) -> None:
    """Change fields of a config's quantization_config."""
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"].update(fields)
    (directory / "config.json").write_text(json.dumps(config))


def restate(directory: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change a checkpoint's tensors."""
    state = load_file(directory / "model.safetensors")
    change(state)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})


GPTQ_LLAMA = Case(LLAMA, PACKERS["gptq int4:16"])


def test_a_look_at_a_model_says_how_it_is_packed(capsys, tmp_path):
    directory = packed_once(GPTQ_LLAMA, tmp_path)

    code = main(["models", str(directory), "--json"])
    found = json.loads(capsys.readouterr().out)["checkpoint"]
    main(["models", str(directory)])

    assert code == 0
    # Groups of 16 share a scale of 16 bits and a zero of 4.
    assert found["packing"] == {"forms": ["gptq int4"], "bits_per_weight": 4 + 20 / 16}
    assert "matrices packed as gptq int4, 5.25 bits a weight" in capsys.readouterr().out


def test_a_checkpoint_with_two_config_groups_has_matrices_of_both(tmp_path):
    four, eight = PACKERS["packed int4:16 symmetric"], PACKERS["packed int8:-1 symmetric"]
    both = {
        **four.config,
        "config_groups": {
            "group_0": four.config["config_groups"]["group_0"],
            "group_1": eight.config["config_groups"]["group_0"],
        },
    }

    def either(name: str, values_FD: Tensor) -> Packed:
        return (eight if "down_proj" in name else four).pack(name, values_FD)

    pack(Case(LLAMA, Packer("both", both, either)), tmp_path / "whole", tmp_path / "packed")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32).eval()
    reference = reference_from(model, tmp_path / "packed")

    tokens, _ = run(reference, MIXES["all three tiers"], tmp_path)

    assert tokens == reference.continuations


def test_a_packed_head_is_no_copy_of_the_token_table_whatever_the_config_says(tmp_path):
    tied = Variant("llama", "tied", {**LLAMA_SIZES, "tie_word_embeddings": True, "vocab_size": 96})
    directory = packed_once(Case(tied, PACKERS["gptq int4:16"]), tmp_path)
    head_FD = torch.randn(96, 32, generator=torch.Generator().manual_seed(1))
    own = PACKERS["gptq int4:16"].pack("lm_head.weight", head_FD)
    restate(directory, lambda state: state.update(own.tensors))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32).eval()
    model.lm_head.weight = torch.nn.Parameter(own.plain_FD)
    reference = reference_from(model, directory)

    tokens, _ = run(reference, MIXES["device and disk, paced"], tmp_path)

    assert tokens == reference.continuations


def test_a_bias_that_the_model_has_not_may_be_there_if_it_is_zero(tmp_path):
    directory = packed_once(GPTQ_LLAMA, tmp_path)
    bias = torch.zeros(32)
    bias[31] = 1e-3
    restate(directory, lambda state: state.update({"model.layers.0.mlp.down_proj.bias": bias}))

    with pytest.raises(CheckpointError, match=r"down_proj\.bias: should be all 0"):
        flexport.LLM(directory, backend="cpu")


def test_act_order_that_the_config_does_not_tell_of_is_refused(tmp_path):
    directory = packed_once(Case(LLAMA, PACKERS["gptq int4:16 in act order"]), tmp_path)
    rewrite(directory, desc_act=False)

    with pytest.raises(CheckpointError, match=r"q_proj\.g_idx.*desc_act should be true"):
        flexport.LLM(directory, backend="cpu")


def test_a_group_size_that_is_not_the_files_is_refused(tmp_path):
    directory = packed_once(GPTQ_LLAMA, tmp_path)
    rewrite(directory, group_size=32)

    with pytest.raises(CheckpointError, match=r"has shape \(2, 32\), should have \(1, 32\)"):
        flexport.LLM(directory, backend="cpu")


def test_a_tensor_that_no_form_has_is_refused(tmp_path):
    directory = packed_once(GPTQ_LLAMA, tmp_path)
    extra = {"model.layers.0.mlp.down_proj.lora_a": torch.zeros(4, 32)}
    restate(directory, lambda state: state.update(extra))

    with pytest.raises(UnsupportedModel, match=r"down_proj\.lora_a"):
        flexport.LLM(directory, backend="cpu")


def test_a_matrix_that_is_there_twice_is_refused(tmp_path):
    directory = packed_once(GPTQ_LLAMA, tmp_path)
    plain = {"model.layers.0.mlp.down_proj.weight": torch.zeros(32, 48)}
    restate(directory, lambda state: state.update(plain))

    with pytest.raises(UnsupportedModel, match=r"down_proj\.weight"):
        flexport.LLM(directory, backend="cpu")


def test_other_numbers_of_eight_bits_are_refused_by_name(tmp_path):
    directory = packed_once(Case(LLAMA, PACKERS["fp8 by rows"]), tmp_path)

    def other(state: dict[str, Tensor]) -> None:
        for name, tensor in state.items():
            if tensor.dtype == torch.float8_e4m3fn:
                state[name] = tensor.to(torch.float8_e5m2)

    restate(directory, other)

    with pytest.raises(CheckpointError, match=r"stored as float8_e5m2, should be .*float8_e4m3fn"):
        flexport.LLM(directory, backend="cpu")


GROUPS = PACKERS["packed int4:16 symmetric"].config
WEIGHTS = GROUPS["config_groups"]["group_0"]["weights"]


def with_weights(**fields: object) -> dict[str, object]:
    return {**GROUPS, "config_groups": {"group_0": {"weights": {**WEIGHTS, **fields}}}}


@pytest.mark.parametrize(
    ("quantised", "told"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method is 'bitsandbytes'.*dequantize"),
        ({"quant_method": "hqq"}, "quant_method is 'hqq'.*published"),
        ({"quant_method": "new"}, "quant_method is 'new'; flexport can run plain weights"),
        ({"quant_method": "gptq", "bits": 3}, "bits is 3; .*2, 4 and 8"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "is 'marlin'; .*gptq"),
        ({"quant_method": "gptq", "bits": 4, "is_marlin_format": True}, "is 'marlin'; .*gptq"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "group_size is 0"),
        (
            {"quant_method": "gptq", "bits": 4, "dynamic": {"+:.*down.*": {"bits": 8}}},
            "down.*bits is 8; .*the same",
        ),
        ({"quant_method": "awq", "version": "gemv"}, "version is 'gemv'; .*gemm"),
        ({"quant_method": "awq", "bits": 8}, "bits is 8; .*4"),
        ({"quant_method": "awq", "zero_point": False}, "zero_point is False"),
        (with_weights(num_bits=3), "group_0 is '3-bit int'; .*2, 4 or 8"),
        (with_weights(strategy="tensor", group_size=None), "strategy is 'tensor'"),
        ({**GROUPS, "format": "marlin-24"}, "format is 'marlin-24'; .*pack-quantized"),
        ({**GROUPS, "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24.*dense"),
        ({**GROUPS, "transform_config": {"config_groups": {"u": {}}}}, "transform_config"),
        ({**GROUPS, "config_groups": {"W4A16": ["Linear"]}}, "W4A16.*written out"),
    ],
    ids=lambda each: "" if isinstance(each, str) else str(each["quant_method"]),
)
def test_what_can_not_be_unpacked_is_refused_by_name(quantised, told, tmp_path):
    make(LLAMA, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": quantised}))

    with pytest.raises(UnsupportedModel, match=told):
        flexport.LLM(tmp_path, backend="cpu")


def test_a_matrix_that_is_needed_whole_comes_together_from_all_tiers(tmp_path):
    directory = packed_once(Case(DEEPSEEK, PACKERS["gptq int4:8"]), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32).eval()
    reference = reference_from(model, directory)
    source = open_source(str(directory), None, "auto")
    assert source.files is not None
    files = source.files

    def pieces(percent: int) -> int:
        split = Split(device=percent / 100, host=0.0, disk=1 - percent / 100)
        layers = place_weights(source.spec, lambda tensor: source.stored(tensor, files), split)
        return max(sum(s.slot == "kv_up.weight" for s in shards) for shards in layers)

    percent = next(percent for percent in range(1, 100) if pieces(percent) == 2)
    mix = {**MIXES["in memory"], "percent": [percent, 0, 100, 0, 100, 0]}
    tokens, _ = run(reference, mix, tmp_path)

    assert tokens == reference.continuations
