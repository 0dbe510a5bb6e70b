from __future__ import annotations

from collections.abc import Iterator, Sequence

from hypothesis import given
from hypothesis import strategies as st

from flexport.intake.pack import pack
from flexport.records import Request, SamplingParams


def request(name: int | str, num_prompt: int, max_tokens: int = 1) -> Request:
    return Request(
        request_id=str(name),
        token_ids=(7,) * num_prompt,
        sampling=SamplingParams(max_tokens=max_tokens),
    )


def lengths(batch: Sequence[Request]) -> list[int]:
    return [len(one.token_ids) for one in batch]


shapes = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 9)), max_size=60)


@given(
    shapes=shapes, batch_size=st.integers(1, 9), window=st.integers(1, 30), room=st.integers(1, 200)
)
def test_nothing_is_lost_doubled_or_in_too_large_a_batch(
    shapes: list[tuple[int, int]], batch_size: int, window: int, room: int
) -> None:
    requests = [request(name, *shape) for name, shape in enumerate(shapes)]

    def fits(batch: Sequence[Request]) -> bool:
        return sum(one.num_tokens for one in batch) <= room

    batches = list(pack(requests, batch_size, window, fits))

    packed = sorted(int(one.request_id) for batch in batches for one in batch)
    assert packed == list(range(len(requests)))
    assert all(1 <= len(batch) <= batch_size for batch in batches)
    assert all(fits(batch) or len(batch) == 1 for batch in batches)


@given(shapes=shapes, batch_size=st.integers(1, 9), window=st.integers(1, 30))
def test_only_the_last_batch_is_partial(
    shapes: list[tuple[int, int]], batch_size: int, window: int
) -> None:
    requests = [request(name, *shape) for name, shape in enumerate(shapes)]

    batches = list(pack(requests, batch_size, window))

    assert all(len(batch) == batch_size for batch in batches[:-1])


@given(shapes=shapes, batch_size=st.integers(1, 9))
def test_within_a_window_no_row_is_longer_than_one_before_it(
    shapes: list[tuple[int, int]], batch_size: int
) -> None:
    requests = [request(name, *shape) for name, shape in enumerate(shapes)]

    batches = list(pack(requests, batch_size, window=100))

    order = [(len(one.token_ids), one.sampling.max_tokens) for batch in batches for one in batch]
    assert order == sorted(order, reverse=True)


def test_no_more_than_the_window_is_read_ahead() -> None:
    taken: list[int] = []

    def endless() -> Iterator[Request]:
        while True:
            taken.append(len(taken))
            yield request(len(taken), num_prompt=1 + len(taken) % 3)

    batches = pack(endless(), batch_size=2, window=6)

    first = next(batches)

    assert len(taken) == 6
    assert lengths(first) == [3, 3]


def test_a_request_that_does_not_fit_even_alone_comes_alone() -> None:
    requests = [request(name, num_prompt) for name, num_prompt in enumerate([1, 50, 2])]

    batches = list(pack(requests, 3, 3, fits=lambda batch: max(lengths(batch)) < 10))

    assert [lengths(batch) for batch in batches] == [[50], [2, 1]]
