"""`flexport quality`: how text is cut, what its figures are, and what it refuses."""

from __future__ import annotations

import io
import json
import math
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from flexport import demo
from flexport.apps.batch import Quiet
from flexport.apps.quality import (
    EXACT,
    Codecs,
    Measured,
    compare,
    cut,
    figures,
    text_prefix,
    windows,
)
from flexport.cli.main import main
from flexport.engine.scoring import Score
from flexport.errors import RunError, UsageError
from flexport.models import spec_of
from flexport.policy import Policy

PAIRS = [((9,), (1, 2)), ((9, 1, 2), (3,)), ((2, 3), (4,))]
INT4 = Codecs(weights="int4")
BOTH = Codecs(weights="int4", cache="int8")


# ---- windows


@given(st.integers(0, 60), st.integers(0, 3), st.integers(1, 20), st.integers(1, 20))
def test_windows_score_each_token_once_after_the_tokens_before_it(
    num_tokens, num_prefix, window, stride
):
    assume(stride + num_prefix < window)
    ids, prefix = list(range(100, 100 + num_tokens)), list(range(num_prefix))

    pairs = list(windows(ids, prefix=prefix, window=window, stride=stride))

    scored = [token_id for _, target in pairs for token_id in target]
    assert scored == ids[0 if prefix else 1 :]
    for context, target in pairs:
        assert context
        assert len(context) + len(target) <= window
        assert context[:num_prefix] == tuple(prefix)
        before = ids[: ids.index(target[0])]
        room = window - stride - num_prefix
        assert list(context[num_prefix:]) == before[max(0, len(before) - room) :]


@pytest.mark.parametrize(("window", "stride", "prefix"), [(8, 8, []), (8, 8, [1]), (4, 9, [])])
def test_a_window_without_room_for_a_context_is_refused(window, stride, prefix):
    with pytest.raises(UsageError, match="no room for a context"):
        list(windows([5, 6, 7], prefix=prefix, window=window, stride=stride))


@pytest.mark.parametrize("most", range(6))
def test_a_cut_leaves_the_first_tokens_to_be_scored(most):
    kept = cut(PAIRS, most)

    assert [token_id for _, target in kept for token_id in target] == [1, 2, 3, 4][:most]
    assert all(target for _, target in kept)
    assert [context for context, _ in kept] == [context for context, _ in PAIRS[: len(kept)]]


@pytest.mark.parametrize(
    ("before", "after"), [((), ()), ((2,), ()), ((1, 2), ()), ((), (3,)), ((2,), (3,))]
)
def test_the_tokens_before_every_text_are_told_from_those_after_it(before, after):
    tokenizer = SimpleNamespace(
        encode=lambda text: [*before, 70, *after], encode_continuation=lambda text: [70]
    )

    assert text_prefix(tokenizer) == before


# ---- figures


def measured(log_probs, best_ids, codecs=EXACT):
    return Measured(
        codecs=codecs,
        log_probs=tuple(log_probs),
        best_ids=tuple(best_ids),
        weight_bits=16.0,
        cache_bits=16.0,
        report={"seconds": {"prefill": 1.0, "decode": 3.0}},
    )


def test_perplexity_is_what_a_fair_guess_among_as_many_tokens_would_have():
    guess = measured([-math.log(7)] * 4, [1, 2, 3, 4])

    found = figures(guess, guess, PAIRS)

    assert found.perplexity == pytest.approx(7)
    assert (found.ratio, found.ratio_error) == (1, 0)
    assert (found.same_token, found.right_token) == (1, 1)
    assert guess.tok_s == 1.0


def test_figures_beside_those_without_codecs():
    exact = measured([-1.0, -2.0, -3.0, -2.0], [1, 2, 5, 4])
    worse = measured([-1.1, -2.3, -3.0, -2.4], [1, 6, 5, 5])

    found = figures(worse, exact, PAIRS)

    assert found.perplexity == pytest.approx(math.exp(8.8 / 4))
    assert found.ratio == pytest.approx(math.exp(0.8 / 4))
    # The losses 0.1, 0.3, 0 and 0.4 have a standard deviation of 0.1826.
    assert found.ratio_error == pytest.approx(math.exp(0.2) * 0.182574 / 2, rel=1e-4)
    assert found.same_token == 0.5
    assert found.right_token == 0.25


def test_a_perplexity_that_no_float_holds_is_infinite():
    hopeless = measured([-1e4] * 4, [1] * 4)

    assert figures(hopeless, hopeless, PAIRS).perplexity == math.inf


# ---- measuring and comparing


class FakeModel:
    """Scores every token alike, the last row first; worse if anything is packed."""

    tokenizer = None

    def __init__(self, codecs, *, log_prob=-2.0, num_weights_bytes=0):
        self.codecs = codecs
        self.engine = self
        self.is_open = True
        config = json.loads((demo.MODEL_DIR / "config.json").read_text())
        self.spec = spec_of(config)
        self._log_prob = log_prob - 0.5 * (codecs != EXACT)
        self.report = {
            "dtype": "bfloat16",
            "seconds": {"prefill": 1.0, "decode": 1.0},
            "placement": {"weights": {"device": {"bytes": num_weights_bytes}}},
        }

    def score(self, pairs, *, through_cache):
        assert self.is_open
        assert through_cache
        for index, (_, target) in reversed(list(enumerate(pairs))):
            log_probs = [self._log_prob - index] * len(target)
            yield index, Score.of(target, log_probs, [0, *target[1:]])

    def generate(self, requests):
        raise AssertionError("the demo job was not asked for")


class Factory:
    """Opens fakes, one at a time."""

    def __init__(self, **settings):
        self.opened = []
        self._settings = settings

    @contextmanager
    def __call__(self, codecs):
        assert not any(model.is_open for model in self.opened), "two models at once"
        model = FakeModel(codecs, **self._settings)
        self.opened.append(model)
        yield model
        model.is_open = False


def compared(factory, codecs):
    return list(compare(factory, codecs, PAIRS, Quiet(), with_demo=False))


def test_each_pair_of_codecs_has_a_model_of_its_own_and_none_comes_first():
    factory = Factory()

    found = compared(factory, [INT4, EXACT, BOTH, INT4])

    assert [model.codecs for model in factory.opened] == [EXACT, INT4, BOTH]
    assert [each.measured.codecs for each in found] == [EXACT, INT4, BOTH]
    assert [each.figures.ratio for each in found] == pytest.approx(
        [1, math.exp(0.5), math.exp(0.5)]
    )
    assert all(each.demo is None for each in found)


def test_scores_are_put_in_the_text_s_order_whichever_row_ends_first():
    (found,) = compared(Factory(), [])

    assert found.measured.log_probs == (-2.0, -2.0, -3.0, -4.0)
    assert found.measured.best_ids == (0, 2, 0, 0)
    assert found.figures.right_token == 0.25


@pytest.mark.parametrize("log_prob", [math.nan, -math.inf])
def test_a_probability_that_is_no_number_is_an_error_and_no_figure(log_prob):
    with pytest.raises(RunError, match="codecs none,none, 4 of 4 tokens"):
        compared(Factory(log_prob=log_prob), [])


def test_bits_are_those_the_report_tells_and_else_those_of_what_is_stored():
    factory = Factory(num_weights_bytes=2642432)
    (plain,) = compared(factory, [])
    report = factory.opened[0].report
    report["compression"] = {"weights": {"bits": 4.5}, "cache": {"bits": 9.0}}

    class Packed(Factory):
        @contextmanager
        def __call__(self, codecs):
            with super().__call__(codecs) as model:
                model.report = report
                yield model

    (packed,) = compared(Packed(), [])

    assert (plain.measured.weight_bits, plain.measured.cache_bits) == (16.0, 16.0)
    assert (packed.measured.weight_bits, packed.measured.cache_bits) == (4.5, 9.0)


# ---- the command


def test_a_pair_of_codecs_is_said_as_it_is_shown():
    assert Codecs.parse("int4,int8") == BOTH
    assert Codecs.parse(str(BOTH)) == BOTH
    assert BOTH.settings() == {"compress_weights": "int4", "compress_cache": "int8"}
    assert EXACT.settings() == {}
    assert Codecs.parse("int4:32,none").settings() == {"compress_weights": "int4:32"}


def test_few_values_are_said_beside_the_codecs():
    few = replace(BOTH, attn_sparsity=0.1)

    assert str(few) == "int4,int8, 0.1 of the values"
    assert few.settings() == {**BOTH.settings(), "attn_sparsity": 0.1}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--codecs", "int4"], "not a pair of codecs"),
        (["--codecs", "int4,int3"], "not a pair of codecs"),
        (["--codecs", "none,none,none"], "not a pair of codecs"),
        (["--compress-weights", "int4"], "takes codecs from --codecs"),
        (["--window", "0"], "not a whole number >= 1"),
        (["--stride", "x"], "not a whole number >= 1"),
        (["--model", "facebook/opt-125m"], "add --text FILE"),
        (["--text", "no/such/file"], "can't read --text no/such/file"),
        (["--json", "no/such/folder/file"], "there is no folder"),
        (["--trace", "trace.json"], "use `flexport run`"),
        (["--window", "257"], "longer than the 256 positions"),
        (["--window", "64", "--stride", "64"], "no room for a context"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_can_not_be_measured_is_refused_in_words(arguments, words, capsys):
    code = main(["quality", *arguments])

    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert words in err


@pytest.mark.parametrize(
    ("raw", "words"), [(b"", "is empty"), (b" \n", "is empty"), (b"caf\xe9", "is not UTF-8")]
)
def test_a_text_with_nothing_to_read_is_refused(raw, words, tmp_path, capsys, monkeypatch):
    path = tmp_path / "text"
    path.write_bytes(raw)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(raw)))

    codes = [main(["quality", "--text", name]) for name in (str(path), "-")]

    assert codes == [2, 2]
    assert capsys.readouterr().err.count(words) == 2


def test_a_policy_file_says_all_but_the_codecs(tmp_path, capsys):
    path = tmp_path / "policy.json"
    path.write_text(Policy(compress_weights="int4").to_json())

    code = main(["quality", "--policy", str(path)])

    assert code == 2
    assert "takes codecs from --codecs" in capsys.readouterr().err
