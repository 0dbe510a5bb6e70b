"""`flexport bench` and what its result says."""

from __future__ import annotations

import importlib.util
import json

import pytest

from flexport.bench import job, versus
from flexport.bench.checkpoint import shared_checkpoint
from flexport.bench.peers import PEERS, Peer
from flexport.bench.versus import _summary, _table
from flexport.bench.workload import Workload
from flexport.checkpoint.header import read_header
from flexport.cli.main import main
from flexport.errors import UsageError

MATRIX = {"flops_per_s": 1e9, "rows": 1, "shape": [1, 1], "packed": False}
CEILINGS = {
    "backend": "x",
    "dtype": "float32",
    "engine_read": {"values": [1e9]},
    "plain_read": None,
    "matrix": MATRIX,
    "memory_read_bytes_per_s": 1e10,
    "memory_copy_bytes_per_s": 1e10,
}


def bench(capsys, *options):
    arguments = ["--prompt-len", "5", "--gen-len", "3", "--num-prompts", "4", "--repeats", "2"]
    code = main(["bench", *arguments, *options])
    return code, capsys.readouterr().out


@pytest.fixture
def config(tmp_path):
    directory = tmp_path / "model"
    directory.mkdir()
    tiny = {
        "model_type": "opt", "vocab_size": 64, "hidden_size": 32, "ffn_dim": 64,
        "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32,
        "word_embed_proj_dim": 32,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(tiny))
    return directory


@pytest.fixture
def common(config, tmp_path):
    return ["--model", str(config), "--load-format", "dummy", "--offload-dir", str(tmp_path)]


def test_bench_prints_one_json_line_with_all_that_is_needed_to_get_it_again(
    capsys, common, tmp_path
):
    ceilings = tmp_path / "ceilings.json"
    ceilings.write_text(json.dumps(CEILINGS))

    code, out = bench(capsys, *common, "--json", "--ceilings", str(ceilings))

    (line,) = out.splitlines()
    found = json.loads(line)
    assert code == 0
    assert {
        "machine", "commit", "version", "model", "dtype", "policy", "repeats", "spread", "tok_s",
        "peak_bytes", "moved_bytes", "limit",
    } <= set(found)  # fmt: skip
    assert len(found["tok_s_each"]) == found["repeats"] == 2
    assert found["limit"]["share"] > 0


def test_bench_counts_what_a_run_streams_and_not_what_loading_reads(capsys, common):
    in_memory = json.loads(bench(capsys, *common, "--json", "--ceilings", "skip")[1])
    streamed = json.loads(
        bench(
            capsys, *common, "--json", "--ceilings", "skip", "--percent",
            "0", "0", "100", "0", "100", "0",
        )[1]
    )  # fmt: skip

    assert in_memory["moved_bytes"]["disk_to_host"] == 0
    assert streamed["moved_bytes"]["disk_to_host"] > 0


def test_bench_shows_people_a_table(capsys, common):
    code, out = bench(capsys, *common, "--ceilings", "skip")

    assert code == 0
    assert "tok/s" in out
    assert "share of the limit" not in out


@pytest.mark.parametrize(
    ("content", "words"),
    [("{", "not JSON"), ("[]", "holds no ceilings"), ('{"engine_read": {}}', "not the ceilings")],
)
def test_ceilings_that_are_none_are_refused_before_anything_runs(
    capsys, common, tmp_path, content, words
):
    path = tmp_path / "ceilings.json"
    path.write_text(content)

    code = main(["bench", *common, "--ceilings", str(path)])

    assert code == 2
    assert words in capsys.readouterr().err


def test_the_middle_run_s_figures_stand_beside_the_median(config):
    def report(tok_s):
        return {
            "throughput": {"generation_tok_s": tok_s},
            "seconds": {"prefill": 1.0, "decode": tok_s, "load": 0.0, "total": 2.0},
            "machine": {}, "model": "m", "backend": "b", "dtype": "float32", "policy": {},
            "plan": {"budgets": {}}, "busy_seconds": {}, "wait_seconds": {},
            "moved_bytes": {"disk_to_host": 0, "host_to_disk": 0}, "peak_bytes": {"device": 1},
            "comparison": {"ratio": tok_s}, "warnings": [],
        }  # fmt: skip

    from flexport.models import spec_of

    spec = spec_of(json.loads((config / "config.json").read_text()))
    work = Workload(num_prompts=1, prompt_len=2, gen_len=2)

    found = job.result(
        [report(3.0), report(9.0), report(4.0)],
        work, spec, device="d", peak_bytes=None, ceilings=None,
    )  # fmt: skip

    assert found["tok_s"] == 4.0
    assert found["seconds"]["decode"] == 4.0
    assert found["comparison"]["ratio"] == 4.0
    assert found["spread"] == pytest.approx(6 / 4)


def test_a_shared_checkpoint_is_written_once_and_has_every_tensor(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "flexport.bench.checkpoint.known_config",
        lambda _: {
            "model_type": "opt", "vocab_size": 64, "hidden_size": 32, "ffn_dim": 64,
            "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32,
        },
    )  # fmt: skip

    directory = shared_checkpoint("some/model", "bfloat16", tmp_path)
    weights = directory / "model.safetensors"
    written_ns = weights.stat().st_mtime_ns
    again = shared_checkpoint("some/model", "bfloat16", tmp_path)

    assert again == directory
    assert weights.stat().st_mtime_ns == written_ns
    names = set(read_header(weights))
    assert {f"model.decoder.layers.{i}.fc1.weight" for i in range(2)} <= names
    assert "model.decoder.embed_positions.weight" in names


def test_an_unknown_model_is_refused(tmp_path):
    with pytest.raises(UsageError, match="small-experts and what `flexport models` lists"):
        shared_checkpoint("no/such", "bfloat16", tmp_path)


# ---- beside the peers


def line(contestant, tok_s, **more):
    return {
        "contestant": contestant, "case": "capped", "ok": tok_s is not None, "tok_s": tok_s,
        "cap_bytes": None, "error": "not installed: peer", **more,
    }  # fmt: skip


def test_the_ratio_is_to_the_best_peer_at_its_best_batch():
    lines = [
        line("flexport", 30.0, limit={"share": 0.8}),
        line("one", 4.0, batch_size=4),
        line("one", 10.0, batch_size=8),
        line("two", 5.0, batch_size=4),
    ]

    found = _summary(lines)["capped"]

    assert found["ratio"] == pytest.approx(3.0)
    assert (found["best_peer"], found["best_peer_batch_size"]) == ("one", 8)


def test_a_peer_that_is_missing_is_said_so_and_stops_nothing():
    lines = [line("flexport", 30.0, limit={"share": 0.8}), line("absent", None)]

    assert "ratio" not in _summary(lines)["capped"]
    assert "not installed: peer" in _table(lines)


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_every_peer_is_a_script_that_can_be_found(peer: Peer):
    assert importlib.util.find_spec(peer.module) is not None


def test_the_case_of_a_card_is_refused_before_anything_is_written(tmp_path, capsys):
    for backend, complaint in (("cpu", "'cpu' uses the host's"), ("toaster", "not installed")):
        argv = ["--dir", str(tmp_path), "--case", "card", "--backend", backend]

        assert versus.main([*argv, "--model", "facebook/opt-125m"]) == 2

        assert complaint in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_in_the_case_of_a_card_all_get_the_same_memory(tmp_path, monkeypatch):
    commands: list[list[str]] = []

    def measured(setting, case, command):
        commands.append(list(command))
        return {"ok": False, "error": "not run", "cap_bytes": setting.cap_bytes(case)}

    monkeypatch.setattr(versus, "_measured", measured)
    # Whether a peer's package is there makes no difference to what it would be given.
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    argv = ["--dir", str(tmp_path), "--case", "card", "--card-memory", "2GiB"]
    setting = versus._Setting(
        args=versus._parser().parse_args(argv),
        checkpoint=tmp_path,
        ceilings_file=tmp_path / "ceilings.json",
    )

    lines = [versus._flexport(setting, "card")]
    for peer in PEERS:
        if peer.case == "card":
            lines += versus._peer(setting, "card", peer)

    assert len(commands) == 4
    for command in commands:
        assert command[command.index("--device-memory") + 1] == str(2 << 30)
    assert {line["cap_bytes"] for line in lines} == {None}
