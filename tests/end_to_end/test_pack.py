"""Weights that flexport packs: what the files stand for is what was packed, whatever happens.

Tiny models with matrices as they are, transposed ones (GPT-2), and all experts' in one tensor
(Granite, gpt-oss, whose are transposed as well).

Dimension key: R rows (features out), D features in.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexport.checkpoint import packed
from flexport.checkpoint.digests import Digests
from flexport.checkpoint.packed import PackedCache
from flexport.cli.main import main
from flexport.codecs.compressed import Compressed, compressed
from flexport.codecs.published import formats_of
from flexport.engine import pack_rows
from flexport.engine.packing import Quiet, pack_into, packed_files, prepared
from flexport.engine.source import Source, open_source
from flexport.engine.stored import packed_layout, packed_name
from flexport.engine.to_pack import Packing, plan_packing
from flexport.errors import CheckpointError, DiskFull, DoesNotFit, PolicyError, StorageError
from flexport.models.tensors import owned_tensors
from flexport.testing.checkpoints import tiny_opt
from flexport.testing.families.tiny import Variant, make

_SIZES = {"vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LLAMA_LIKE = {
    **_SIZES,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
}
GPT2 = Variant(
    "gpt2", "packed", {**_SIZES, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 64}
)
STACKED = Variant("granitemoe", "packed", _LLAMA_LIKE)
STACKED_AND_TURNED = Variant("gpt_oss", "packed", {**_LLAMA_LIKE, "head_dim": 16})
CODECS = ("int8", "int4", "int4:32")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """checkpoints(name): made when first asked for."""
    made = {}

    def get(name):
        if name not in made:
            directory = tmp_path_factory.mktemp(name)
            if name == "opt":
                tiny_opt(
                    directory, shards=3, dtype="bfloat16", hidden_size=128, num_hidden_layers=2
                )
            else:
                kinds = {"gpt2": GPT2, "stacked": STACKED, "stacked and turned": STACKED_AND_TURNED}
                make(kinds[name], directory)
            made[name] = directory
        return made[name]

    return get


NAMES = ("opt", "gpt2", "stacked", "stacked and turned")


@pytest.fixture
def opt(checkpoints):
    return open_source(str(checkpoints("opt")), None, "auto")


@pytest.fixture
def cache(tmp_path):
    return PackedCache(tmp_path / "cache")


def form_of(codec: str) -> Compressed:
    form = compressed(codec)
    assert form is not None, codec
    return form


def plan_of(source: Source, codec: str) -> Packing:
    assert source.files is not None
    return plan_packing(source, source.files, form_of(codec))


def values_of(source, tensor):
    """A tensor of the checkpoint as safetensors' own library reads it, (features out, in)."""
    name = next(name for name in tensor.names if name in source.files)
    whole = load_file(source.files[name].path)[name]
    own = whole if tensor.slice_of is None else whole[tensor.slice_of[0]]
    return own.T.contiguous() if tensor.transposed else own


def bytes_of(directory):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.iterdir()
        if path.suffix == ".safetensors"
    }


def pack(source, codec, cache, **settings):
    packing = plan_of(source, codec)
    with prepared(source, packing, cache, settings.pop("progress", Quiet()), **settings) as packed:
        return packed


# ---- what the files hold


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("name", NAMES)
def test_the_files_hold_what_the_form_makes_of_each_matrix(checkpoints, cache, name, codec):
    source, form = open_source(str(checkpoints(name)), None, "auto"), form_of(codec)

    assert source.files is not None
    with packed_files(source, source.files, form, cache) as found:
        pass

    num_matrices = 0
    for layer in range(1, source.spec.num_layers + 1):
        for tensor in owned_tensors(source.spec, layer):
            layout = packed_layout(tensor, form)
            if layout is None:
                continue
            num_matrices += 1
            expected_RD = values_of(source, tensor)
            rows, size = tensor.shape[::-1] if tensor.transposed else tensor.shape
            assert layout == form.layout(packed_name(tensor), (rows, size))
            parts = [load_file(found[part.name].path)[part.name] for part in layout.parts]
            for part, own, its in zip(layout.parts, parts, form.encode(expected_RD), strict=True):
                assert torch.equal(own, its)
                assert found[part.name].shape == part.shape
            out_RD = torch.empty(expected_RD.shape)
            decoded_RD = form.decode(parts, out_RD, 0)
            assert (decoded_RD - expected_RD).abs().max() < 0.25 * expected_RD.abs().max()
    assert len(found) == 2 * num_matrices
    of_attention = 4 if codec == "int8" else 2  # keys' and values' have 32 rows
    assert num_matrices == {"opt": 12, "gpt2": 8}.get(name, 2 * (of_attention + 3 * 2))


@pytest.mark.parametrize("codec", ["int8", "int4"])
@pytest.mark.parametrize("name", NAMES)
def test_how_rows_are_cut_into_chunks_changes_no_bit(
    checkpoints, tmp_path, monkeypatch, name, codec
):
    source, read = open_source(str(checkpoints(name)), None, "auto"), []
    whole = pack(source, codec, PackedCache(tmp_path / "whole"))
    monkeypatch.setattr(pack_rows, "CHUNK_BYTES", 3000)
    rows_of = pack_rows._chunks

    def counted(*of):
        for each in rows_of(*of):
            read.append(each)
            yield each

    monkeypatch.setattr(pack_rows, "_chunks", counted)

    cut = pack(source, codec, PackedCache(tmp_path / "cut"))

    assert len(read) > 1.5 * len(list(cut.packing.matrices))
    assert bytes_of(cut.entry.directory) == bytes_of(whole.entry.directory)


def test_only_the_decoder_layers_matrices_are_packed(opt, cache):
    packing = plan_of(opt, "int4")

    names = [matrix.name for matrix in packing.matrices]

    assert all(".layers." in name and name.endswith(".weight") for name in names)
    assert not any("norm" in name for name in names)
    assert sum(matrix.stored.tensor.num_values for matrix in packing.matrices) == packing.num_values


def test_routers_and_matrices_with_little_to_gain_stay_as_they_are(checkpoints):
    source = open_source(str(checkpoints("stacked")), None, "auto")

    packing = plan_of(source, "int4")
    names = [matrix.name for matrix in packing.matrices]

    assert {matrix.stored.tensor.kind for matrix in packing.matrices} == {"matrix"}
    assert not any("router" in name for name in names)
    assert any("q_proj" in name for name in names)
    assert not any("k_proj" in name for name in names)  # 32 rows would be half of a tile


def test_whole_pages_come_first_so_that_they_start_on_one(opt, cache):
    with packed_files(opt, opt.files, form_of("int4"), cache) as found:
        tensors = found.values()

    for tensor in tensors:
        if tensor.num_bytes % 4096 == 0:
            assert tensor.offset_bytes % 4096 == 0


def test_files_are_as_large_as_was_said_beforehand(opt, cache):
    done = pack(opt, "int4", cache)

    sizes = {new.name: new.num_bytes for new in done.packing.files}
    assert sizes == {
        name: (done.entry.directory / name).stat().st_size
        for name in bytes_of(done.entry.directory)
    }
    assert done.packing.num_bytes == done.manifest.num_bytes


def test_alike_layers_of_made_up_weights_are_packed_once(tmp_path):
    source = open_source("facebook/opt-125m", None, "dummy")
    files = source.make_up(tmp_path, "bfloat16", 0)

    found = pack_into(tmp_path, source, files, form_of("int4"))

    assert [path.name for path in tmp_path.glob("layer-*")] == ["layer-00001.safetensors"]
    assert len(found) == 12 * 6 * 2
    assert {tensor.path.name for tensor in found.values()} == {"layer-00001.safetensors"}
    first, last = (f"model.decoder.layers.{i}.fc1.weight.int4" for i in (0, 11))
    assert found[first] == found[last]


def test_a_checkpoint_that_came_packed_is_refused(opt):
    packed = replace(opt, packings=formats_of({"quantization_config": {"quant_method": "mxfp4"}}))

    with pytest.raises(
        PolicyError, match=r"packed already, as mxfp4.*leave --compress-weights out"
    ):
        plan_of(packed, "int4")


def test_a_model_with_nothing_to_pack_is_refused(tmp_path):
    source = open_source(
        str(tiny_opt(tmp_path, hidden_size=32, word_embed_proj_dim=32, ffn_dim=48)), None, "auto"
    )

    with pytest.raises(PolicyError, match="no matrix that is large enough"):
        plan_of(source, "int4")


# ---- found again


def refuse_to_work(monkeypatch):
    def fail(*_):
        raise AssertionError("work was done again")

    monkeypatch.setattr(pack_rows, "packed_rows", fail)
    monkeypatch.setattr(Digests, "read", fail)


def test_a_second_start_reads_and_packs_nothing(opt, cache, monkeypatch):
    with packed_files(opt, opt.files, form_of("int4"), cache) as found:
        first = found
    refuse_to_work(monkeypatch)

    with packed_files(opt, opt.files, form_of("int4"), PackedCache(cache.directory)) as found:
        again = found

    assert again == first


def test_a_copy_of_the_model_finds_its_entry(opt, cache, tmp_path):
    first = pack(opt, "int4", cache)
    shutil.copytree(opt.directory, tmp_path / "copy")
    copy = open_source(str(tmp_path / "copy"), None, "auto")

    again = pack(copy, "int4", cache)

    assert again.entry.key == first.entry.key
    assert (first.packed_bytes, again.packed_bytes) == (first.packing.source_bytes, 0)


def test_a_fine_tune_has_an_entry_of_its_own(opt, cache, tmp_path):
    first = pack(opt, "int4", cache)
    shutil.copytree(opt.directory, tmp_path / "tuned")
    file = opt.files["model.decoder.layers.1.fc1.weight"]
    with (tmp_path / "tuned" / file.path.name).open("r+b") as out:
        out.seek(file.offset_bytes + 8)
        out.write(b"\0\0")
    tuned = open_source(str(tmp_path / "tuned"), None, "auto")

    second = pack(tuned, "int4", cache)

    assert second.entry.key != first.entry.key
    assert bytes_of(second.entry.directory) != bytes_of(first.entry.directory)


def test_each_form_has_an_entry_of_its_own(opt, cache):
    assert len({pack(opt, codec, cache).entry.key for codec in CODECS}) == 3


def at_hub(checkpoint, root):
    """The checkpoint as the hub's cache has it."""
    blobs, snapshot = root / "models--x" / "blobs", root / "models--x" / "snapshots" / ("ab" * 20)
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in checkpoint.iterdir():
        data = path.read_bytes()
        name = hashlib.sha256(data).hexdigest() if path.suffix == ".safetensors" else path.name
        (blobs / name).write_bytes(data)
        (snapshot / path.name).symlink_to(Path("../../blobs") / name)
    return snapshot


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_a_model_of_the_hubs_cache_is_found_without_reading_it(opt, cache, tmp_path, monkeypatch):
    first = pack(opt, "int4", cache)
    source = open_source(str(at_hub(opt.directory, tmp_path)), None, "auto")
    refuse_to_work(monkeypatch)

    again = pack(source, "int4", PackedCache(cache.directory))

    assert again.entry.key == first.entry.key


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_a_damaged_file_of_the_hubs_cache_is_not_packed(opt, cache, tmp_path):
    snapshot = at_hub(opt.directory, tmp_path)
    file = opt.files["model.decoder.layers.1.fc1.weight"]
    with (snapshot / file.path.name).open("r+b") as out:
        out.seek(file.offset_bytes + 8)
        out.write(b"\0\0")
    source = open_source(str(snapshot), None, "auto")

    with pytest.raises(CheckpointError, match="is not what it should be"):
        pack(source, "int4", cache)

    assert all(entry.manifest() is None for entry in cache.entries())


# ---- faults


@dataclass
class Hooked:
    """A form that calls somebody before it encodes."""

    hook: Callable[[int], object]
    form: Compressed = field(default_factory=lambda: form_of("int4"))
    num_calls: int = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.form, name)

    def encode(self, values_RD):
        self.num_calls += 1
        self.hook(self.num_calls)
        return self.form.encode(values_RD)


def prepare_with(source, hook, cache, progress=None):
    form = Hooked(hook)
    packing = plan_packing(source, source.files, form)
    with prepared(source, packing, cache, progress or Quiet()) as done:
        pass
    return form, done


def test_values_that_are_not_finite_are_told_with_their_tensor_and_file(tmp_path, cache):
    tiny_opt(tmp_path / "m", hidden_size=128)
    path = tmp_path / "m" / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if name.endswith("layers.1.fc1.weight"))
    weights[name][3, 5] = torch.inf
    save_file(weights, path)
    source = open_source(str(tmp_path / "m"), None, "auto")

    with pytest.raises(CheckpointError, match=r"layers\.1\.fc1\.weight in .*m/model\.safetensors"):
        pack(source, "int4", cache)


def test_what_was_finished_before_a_full_disk_is_used_again(opt, cache, monkeypatch):
    whole = pack(opt, "int4", PackedCache(cache.directory / "other"))
    num_calls = 0
    fsync = os.fsync

    def full(fd):
        nonlocal num_calls
        num_calls += 1
        if num_calls > 4:  # two for a file and its name, and for the manifest
            raise OSError(28, "No space left on device")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFull, match="goes on where it stopped") as error:
        pack(opt, "int4", cache)
    monkeypatch.undo()
    (entry,) = cache.entries()
    left = sorted(path.name for path in entry.directory.iterdir())

    form, done = prepare_with(opt, lambda _: None, cache)

    assert "layer-00002.safetensors" in str(error.value)
    assert left == ["layer-00001.safetensors", "lock", "unfinished.json"]
    assert form.num_calls == 6  # of the second layer
    assert done.packed_bytes == done.packing.files[1].source_bytes
    assert bytes_of(done.entry.directory) == bytes_of(whole.entry.directory)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(opt, cache, monkeypatch):
    class Usage:
        free = 1000

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage())

    with pytest.raises(DoesNotFit, match=r"1000 B left.*FLEXPORT_CACHE.*--compress-weights none"):
        pack(opt, "int4", cache)

    (entry,) = cache.entries()
    assert [path.name for path in entry.directory.iterdir()] == ["lock"]


def test_a_file_that_becomes_shorter_while_it_is_packed_is_told(tmp_path, cache):
    tiny_opt(tmp_path / "m", hidden_size=128)
    source = open_source(str(tmp_path / "m"), None, "auto")

    def cut(call):
        if call == 2:
            os.truncate(tmp_path / "m" / "model.safetensors", 20_000)

    with pytest.raises(StorageError, match=r"model\.safetensors: the file has become shorter"):
        prepare_with(source, cut, cache)

    assert all(entry.unfinished() is None for entry in cache.entries())


def test_nothing_is_kept_of_a_file_that_was_changed_while_it_was_packed(tmp_path, cache):
    tiny_opt(tmp_path / "m", hidden_size=128)
    source = open_source(str(tmp_path / "m"), None, "auto")

    def touch(call):
        if call == 8:  # in the second layer
            os.utime(tmp_path / "m" / "model.safetensors")

    with pytest.raises(CheckpointError, match="changed while it was packed"):
        prepare_with(source, touch, cache)

    (entry,) = cache.entries()
    assert set(entry.unfinished().files) == {"layer-00001.safetensors"}


def test_a_finished_file_that_was_damaged_before_the_next_try_is_packed_again(opt, cache):
    def stop(call):
        if call == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_with(opt, stop, cache)
    (entry,) = cache.entries()
    path = entry.directory / "layer-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)

    form, done = prepare_with(opt, lambda _: None, cache)

    assert form.num_calls == 12
    assert bytes_of(done.entry.directory) == bytes_of(
        pack(opt, "int4", PackedCache(cache.directory / "other")).entry.directory
    )


def test_of_two_packers_one_packs_and_the_other_waits_and_uses_that(opt, cache, monkeypatch):
    monkeypatch.setattr(packed, "_POLL_S", 0.001)
    begun, go_on, told, results = threading.Event(), threading.Event(), threading.Event(), {}

    class Told(Quiet):
        def say(self, text):
            assert "another process packs" in text
            told.set()

    def hold(call):
        begun.set()
        assert go_on.wait(60)

    def first():
        results["first"] = prepare_with(opt, hold, PackedCache(cache.directory))

    def second():
        results["second"] = prepare_with(opt, hold, PackedCache(cache.directory), Told())

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    assert begun.wait(60)
    threads[1].start()
    assert told.wait(60)
    go_on.set()
    for thread in threads:
        thread.join(60)

    assert [results[name][0].num_calls for name in ("first", "second")] == [12, 0]
    assert results["first"][1].tensors == results["second"][1].tensors


_KILL = """
import hashlib, json, os, signal, sys
from pathlib import Path
import torch
from flexport.checkpoint import digests
from flexport.checkpoint.packed import PackedCache
from flexport.codecs.compressed import Compressed, compressed
from flexport.engine import pack_rows
from flexport.engine.packing import packed_files
from flexport.engine.source import open_source

model, root = sys.argv[1:]
torch.set_num_threads(1)
source = open_source(model, None, "auto")
form = compressed("int4")


def events(call):
    # Wherever something is written, named, removed or made safe: call(), then do it. What is safe
    # from a loss of power makes no difference to a process that is killed, and takes long.
    fsync = os.fsync
    for owner, name in (
        (os, "fsync"), (Path, "replace"), (Path, "unlink"), (Path, "mkdir"), (Path, "write_text"),
        (pack_rows, "_chunks"), (digests, "digest_of"),
    ):
        def hooked(*args, _plain=getattr(owner, name), **settings):
            call()
            return None if _plain is fsync else _plain(*args, **settings)
        setattr(owner, name, hooked)


def in_child(cache, kill_at):
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    count = 0
    def call():
        nonlocal count
        count += 1
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
    if kill_at:
        events(call)
    with packed_files(source, source.files, form, PackedCache(Path(cache))):
        os._exit(0)


# What is imported or set up on first use, before the forks.
with packed_files(source, source.files, form, PackedCache(Path(root, "first"))):
    pass
kills = []
at = 0
while True:
    at += 1
    cache = f"{root}/{at}"
    status = in_child(cache, at)
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL, status
    for entry in PackedCache(Path(cache)).entries():
        manifest = entry.manifest()
        if manifest is not None:
            entry.check(manifest, ())
    assert in_child(cache, 0) == 0
    kills.append(at)
    assert os.listdir(f"{root}/{at}/packed") and not list(Path(cache).glob("packed/*/*.part*")), at
print(json.dumps(kills))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="each try is a fork")
def test_killed_at_any_moment_the_next_run_gives_the_same_bytes(opt, cache, tmp_path):
    whole = pack(opt, "int4", cache)
    expected = bytes_of(whole.entry.directory)

    done = subprocess.run(
        [sys.executable, "-c", _KILL, str(opt.directory), str(tmp_path / "kills")],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    kills = json.loads(done.stdout.splitlines()[-1])
    assert len(kills) > 30
    for kill in kills:
        entry = PackedCache(tmp_path / "kills" / str(kill)).entry(whole.entry.key)
        assert bytes_of(entry.directory) == expected, kill
        assert entry.unfinished() is None, kill


# ---- the command


@pytest.fixture
def command(cache, monkeypatch, capsys):
    """command(*arguments): the exit code, what was printed, and what was said."""
    monkeypatch.setenv("FLEXPORT_CACHE", str(cache.directory))

    def run(*arguments):
        code = main(["pack", *arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def test_the_command_packs_lists_verifies_and_removes(opt, command, cache):
    what = ("--model", str(opt.directory), "--compress-weights", "int4")
    code, out, said = command(*what, "--json")
    facts = json.loads(out)
    key = facts["key"]
    listed = json.loads(command("--list", "--json")[1])["entries"]
    verified = command("--verify")
    removed = command("--remove", key[:6])

    assert code == 0
    assert "packing" in said and str(cache.directory) in said
    assert facts["packed_now_bytes"] == facts["source_bytes"]
    assert facts["weights"] == 12 * 128 * 128
    assert 4.5 <= facts["bits_per_weight"] < 5.2
    assert sum(kind["tensors"] for kind in facts["left_as_they_are"]) == len(opt.files) - 12
    assert [(each["key"], each["codec"], each["complete"]) for each in listed] == [
        (key, "int4-64-1", True)
    ]
    assert listed[0]["model"] == str(opt.directory.resolve())
    assert verified[:2] == (0, f"{key}  whole\n")
    assert removed[0] == 0 and removed[1].startswith(key)
    assert json.loads(command("--list", "--json")[1])["entries"] == []


_RUN = """
import sys
import flexport
model, offload_dir = sys.argv[1:]
with flexport.LLM(
    model, backend="cpu", dtype="float32", compress_weights="int4", offload_dir=offload_dir
) as llm:
    llm.generate([[5, 6, 7]], flexport.SamplingParams(max_tokens=1, ignore_eos=True))
    print("running", flush=True)
    sys.stdin.readline()
"""


def test_what_a_run_streams_from_is_removed_only_when_the_run_is_gone(
    opt, command, cache, tmp_path
):
    other = pack(opt, "int8", cache).entry
    refused, keys = [], []
    with subprocess.Popen(
        [sys.executable, "-c", _RUN, str(opt.directory), str(tmp_path / "offload")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().split() == [b"running"]
        (used,) = (entry for entry in cache.entries() if entry.key != other.key)
        for what in (used.key, "all"):
            refused.append(command("--remove", what))
            keys.append([entry.key for entry in cache.entries()])
        process.kill()
    code, _, _ = command("--remove", used.key)

    for answer, _, said in refused:
        assert answer != 0
        assert f"{used.key} can't be removed while a run streams from it" in said
    assert keys == [sorted([used.key, other.key]), [used.key]]
    assert code == 0
    assert cache.entries() == []


def test_the_command_says_for_people_what_it_did_and_what_is_there(opt, command):
    what = ("--model", str(opt.directory), "--compress-weights", "int8")
    first, again = command(*what)[1], command(*what)[1]
    table = command("--list")[1].splitlines()

    assert "now, in" in first
    assert "not packed" in first and "norms and biases" in first
    assert "it was there already" in again
    assert table[0].split() == ["KEY", "MODEL", "CODEC", "COMPLETE", "LAST", "USED", "SIZE"]
    assert table[1].split()[2:4] == ["int8-1", "yes"]


def test_a_dry_run_writes_and_reads_nothing(opt, command, cache, monkeypatch):
    refuse_to_work(monkeypatch)
    what = ("--model", str(opt.directory), "--compress-weights", "int4", "--dry-run")

    code, out, _ = command(*what, "--json")

    assert code == 0
    assert json.loads(out)["key"] is None
    assert json.loads(out)["packed"] is False
    assert not cache.directory.exists()
    monkeypatch.undo()


def test_a_dry_run_knows_what_was_packed(opt, command, cache):
    done = pack(opt, "int4", cache)
    what = ("--model", str(opt.directory), "--compress-weights", "int4", "--dry-run", "--json")

    facts = json.loads(command(*what)[1])

    assert (facts["key"], facts["packed"]) == (done.entry.key, True)


def test_damage_is_found_told_and_mended(opt, command, cache):
    what = ("--model", str(opt.directory), "--compress-weights", "int4")
    done = pack(opt, "int4", cache)
    path = done.entry.directory / "layer-00002.safetensors"
    before, facts = path.read_bytes(), path.stat()
    path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))

    used = command(*what)
    verified = command("--verify", done.entry.key)
    mended = command(*what, "--overwrite")

    assert used[0] == 2 and str(path) in used[2] and "--overwrite" in used[2]
    assert verified[0] == 1 and verified[1] == f"{done.entry.key}  damaged\n"
    assert str(path) in verified[2]
    assert mended[0] == 0
    assert path.read_bytes() == before
    assert command("--verify")[0] == 0


def test_an_entry_that_is_not_whole_is_listed_as_that(opt, command, cache):
    def stop(call):
        if call == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_with(opt, stop, cache)

    (listed,) = json.loads(command("--list", "--json")[1])["entries"]
    verified = command("--verify")

    assert not listed["complete"]
    assert "interrupted" in listed["problem"]
    assert listed["bytes"] > 8192
    assert verified[0] == 0 and verified[1].endswith("unfinished\n")
    assert command("--remove", "all")[0] == 0
    assert cache.entries() == []


def test_a_manifest_of_a_later_version_is_listed_and_never_used(opt, command, cache):
    done = pack(opt, "int4", cache)
    path = done.entry.directory / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 9}))

    (listed,) = json.loads(command("--list", "--json")[1])["entries"]
    used = command("--model", str(opt.directory), "--compress-weights", "int4")

    assert not listed["complete"] and "can't be used" in listed["problem"]
    assert used[0] == 2 and "version 9" in used[2]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "takes a --model and --compress-weights"),
        (("--model", "x"), "takes a --model and --compress-weights"),
        (("--list", "--overwrite"), "--overwrite, which is about what to pack"),
        (("--verify", "--model", "x", "--dry-run"), "--model, --dry-run"),
        (("--remove", "0"), "no entries"),
        (("--model", "x", "--compress-weights", "none"), "invalid choice: 'none'"),
        (("--model", "x", "--compress-weights", "int3"), "int3"),
        (("--list", "--verify"), "not allowed with"),
    ],
)
def test_what_cant_be_meant_is_refused(command, arguments, told):
    code, out, said = command(*arguments)

    assert code == 2
    assert told in said
    assert out == ""
