from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mdm.core.errors import ConfigError
from megatron_mdm.inference.requests import Score
from megatron_mdm.inference.texts import add_up, cut_rolling_requests


@given(
    length=st.integers(1, 60),
    max_length=st.integers(2, 20),
    context=st.integers(0, 19),
    prefix=st.integers(0, 3),
)
def test_every_token_is_scored_once_after_the_tokens_before_it(length, max_length, context, prefix):
    context, prefix = min(context, max_length - 1), min(prefix, max_length - 1)
    text = list(range(100, 100 + length))
    start = [7] * prefix
    requests = cut_rolling_requests(text, max_length, prefix=start, context_tokens=context)
    assert [token for one in requests for token in one.continuation] == text
    seen = [*start, *text]
    for number, one in enumerate(requests):
        place = seen.index(one.continuation[0])
        assert one.length <= max_length
        assert list(one.context) == seen[place - len(one.context) : place]
        if number:
            assert len(one.context) == min(context, place - prefix)
    # No window could have taken a token more.
    assert all(one.length == max_length for one in requests[:-1])


@pytest.mark.parametrize(("prefix", "context"), [(4, 1), (0, 4), (0, -1)])
def test_a_context_that_fills_the_window_is_refused(prefix, context):
    with pytest.raises(ConfigError, match="leaves no room in windows of 4"):
        cut_rolling_requests([1, 2], 4, prefix=[0] * prefix, context_tokens=context)


def test_errors_of_windows_add_up_as_independent_ones():
    total = add_up([Score(-3.0, 0.3, None, 8), Score(-4.5, 0.4, None, 8)])
    assert (total.log_likelihood, total.num_passes) == (-7.5, 16)
    assert total.standard_error == pytest.approx(math.hypot(0.3, 0.4))
