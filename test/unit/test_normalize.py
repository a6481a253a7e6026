"""Expected numbers are worked out by hand from the formulas of PI05_SPEC sections 10 and 11b."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pi05_ros.errors import ConfigError
from pi05_ros.schema import Conventions, FieldStats, NormStats
from pi05_ros.transforms.normalize import make_norm, normalize_step

STATS = FieldStats(mean=np.array([2.0, 0.0]), std=np.array([0.5, 0.0]),
                   q01=np.array([-1.0, 1.0]), q99=np.array([3.0, 1.0]))


def test_openpi_quantile_adds_1e_6_to_the_range():
    norm = make_norm("state", "quantile", "openpi", STATS, 2)
    # 1 / 4.000001 * 2 - 1 and, where the range is 0, 0.5 / 1e-6 * 2 - 1
    np.testing.assert_allclose(norm.apply(np.array([0.0, 1.5])), [-0.500000125, 999999.0], rtol=1e-9)
    np.testing.assert_allclose(norm.invert(np.array([0.0, 1.0])), [1.0000005, 1.000001], rtol=1e-12)


def test_lerobot_quantile_replaces_only_a_range_of_zero():
    norm = make_norm("state", "quantile", "lerobot", STATS, 2)
    out = norm.apply(np.array([0.0, 1.5]))
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, [-0.5, 1e8], rtol=1e-6)
    np.testing.assert_allclose(norm.invert(np.array([-0.5, 1.0])), [0.0, 1.0], atol=1e-7)


def test_openpi_zscore_adds_1e_6_both_ways():
    norm = make_norm("state", "zscore", "openpi", STATS, 2)
    np.testing.assert_allclose(norm.apply(np.array([3.0, 1.0])), [1 / 0.500001, 1e6], rtol=1e-12)
    np.testing.assert_allclose(norm.invert(np.array([2.0, 3.0])), [3.000002, 3e-6], rtol=1e-12)


def test_lerobot_zscore_adds_1e_8_going_in_only():
    norm = make_norm("state", "zscore", "lerobot", STATS, 2)
    np.testing.assert_allclose(norm.apply(np.array([3.0, 1.0])), [2.0, 1e8], rtol=1e-6)
    np.testing.assert_allclose(norm.invert(np.array([2.0, 3.0])), [3.0, 0.0], rtol=1e-7)


def test_openpi_statistics_are_cut_to_the_width_of_the_vector():
    norm = make_norm("actions", "quantile", "openpi", FieldStats(q01=np.zeros(32), q99=np.arange(1.0, 33.0)), 2)
    np.testing.assert_allclose(norm.apply(np.array([[0.5, 0.5]])), [[0.0, -0.5]], atol=2e-6)


def test_dimensions_beyond_quantile_statistics_leave_unchanged():
    norm = make_norm("actions", "quantile", "openpi", STATS, 2)
    out = norm.invert(np.full((5, 32), 0.25))
    assert out.shape == (5, 32)
    assert (out[:, 2:] == 0.25).all()
    np.testing.assert_allclose(out[:, 0], 1.5, atol=1e-6)


def test_dimensions_beyond_openpi_zscore_statistics_have_mean_0_and_std_1():
    out = make_norm("actions", "zscore", "openpi", STATS, 2).invert(np.full((1, 4), 3.0))
    np.testing.assert_allclose(out[0, 2:], 3.000003, rtol=1e-12)


def test_identity_changes_nothing_and_needs_no_statistics():
    norm = normalize_step(Conventions(state_norm="identity", action_norm="identity"), None, 3, 2)
    x = np.array([[1.0, -2.0]])
    assert norm.apply(x, x) is x and norm.invert(x, x) is x and norm.encode_state(x) is x


@pytest.mark.parametrize("mode, missing, key", [("quantile", "q01", "norm_stats.state.q01"),
                                                ("zscore", "std", "norm_stats.state.std")])
def test_a_missing_statistic_is_named(mode, missing, key):
    kept = {name: getattr(STATS, name) for name in ("mean", "std", "q01", "q99") if name != missing}
    with pytest.raises(ConfigError, match=key) as error:
        make_norm("state", mode, "openpi", FieldStats(**kept), 2)
    assert "there are: " in error.value.received and error.value.way_out


def test_a_missing_lerobot_statistic_is_named_by_its_key():
    with pytest.raises(ConfigError, match="safetensors: action.q01"):
        make_norm("actions", "quantile", "lerobot", FieldStats(mean=STATS.mean), 2)


def test_no_statistics_at_all_are_refused_unless_identity():
    stats = NormStats(state=STATS, actions=STATS)
    normalize_step(Conventions(), stats, 2, 2)
    with pytest.raises(ConfigError, match="no statistics at all"):
        normalize_step(Conventions(), None, 2, 2)
    with pytest.raises(ConfigError, match="norm_stats.actions"):
        normalize_step(Conventions(state_norm="identity"), None, 2, 2)


@pytest.mark.parametrize("trainer, width", [("openpi", 3), ("lerobot", 3), ("lerobot", 1)])
def test_statistics_of_the_wrong_width_are_refused(trainer, width):
    with pytest.raises(ConfigError, match=f"{width} numbers"):
        make_norm("state", "quantile", trainer, STATS, width)


def test_statistics_that_are_no_vector_are_refused():
    with pytest.raises(ConfigError, match="shape"):
        make_norm("state", "quantile", "openpi", FieldStats(q01=np.zeros((1, 1)), q99=np.ones((1, 1))), 1)


def test_an_unknown_mode_is_refused():
    with pytest.raises(ConfigError, match="minmax"):
        make_norm("state", "minmax", "openpi", STATS, 2)  # type: ignore[arg-type]


@given(x=hnp.arrays(np.float64, 4, elements=st.floats(-10, 10)),
       low=hnp.arrays(np.float64, 4, elements=st.floats(-5, 5)),
       span=hnp.arrays(np.float64, 4, elements=st.floats(0.01, 5)),
       mode=st.sampled_from(["quantile", "zscore"]))
def test_openpi_normalisation_inverts(x, low, span, mode):
    norm = make_norm("state", mode, "openpi", FieldStats(mean=low, std=span, q01=low, q99=low + span), 4)
    np.testing.assert_allclose(norm.invert(norm.apply(x)), x, atol=1e-9)
