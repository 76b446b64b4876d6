import jax
import jax.numpy as jnp
import numpy as np

from tinymim_jax.objectives.metrics import Mean, merge, to_floats


def pair(mean):
    return float(mean.sum), float(mean.count)


def test_of_counts_every_value():
    assert pair(Mean.of(jnp.array([1.0, 2.0, 4.0]))) == (7.0, 3.0)
    assert pair(Mean.of(jnp.array(5.0))) == (5.0, 1.0)
    assert pair(Mean.of(jnp.array([True, False, True]))) == (2.0, 3.0)


def test_of_counts_the_valid_ones_only():
    is_valid = jnp.array([True, False, True, False])
    mean = Mean.of(jnp.array([1.0, 10.0, 4.0, 100.0]), is_valid)
    assert pair(mean) == (5.0, 2.0)
    assert float(mean.value()) == 2.5
    assert pair(Mean.of(jnp.array([3, 5]), jnp.array([False, True]))) == (5.0, 1.0)


def test_what_is_masked_does_not_leak():
    is_valid = jnp.array([True, False, False, True])
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        assert pair(Mean.of(jnp.array([1.0, bad, bad, 2.0]), is_valid)) == (3.0, 2.0)


def test_what_is_valid_does_leak():
    assert np.isnan(Mean.of(jnp.array([1.0, jnp.nan]), jnp.array([True, True])).sum)


def test_nothing_counted():
    mean = Mean.of(jnp.array([1.0, 2.0]), jnp.array([False, False]))
    assert pair(mean) == (0.0, 0.0)
    assert np.isnan(mean.value())
    assert np.isnan(to_floats({"a": mean})["a"])


def test_sums_are_float32_whatever_comes_in():
    mean = Mean.of(jnp.full(1000, 1.0, jnp.bfloat16))
    assert mean.sum.dtype == mean.count.dtype == jnp.float32
    assert pair(mean) == (1000.0, 1000.0)  # bfloat16 would stop at 256


def test_it_is_a_tree():
    leaves = jax.tree.leaves({"a": Mean.of(jnp.array([1.0, 2.0]))})
    assert [float(x) for x in leaves] == [3.0, 2.0]
    assert pair(jax.jit(lambda x: Mean.of(x, x > 1))(jnp.array([1.0, 2.0]))) == (2.0, 1.0)


def test_the_gradient_of_a_mean():
    is_valid = jnp.array([True, False, True])
    gradient = jax.grad(lambda x: Mean.of(x, is_valid).value())(jnp.array([1.0, 2.0, 3.0]))
    np.testing.assert_array_equal(gradient, [0.5, 0.0, 0.5])


def test_merge_adds_and_does_not_average_averages():
    first = {"a": Mean(6.0, 3.0), "b": Mean(1.0, 1.0)}
    second = {"a": Mean(4.0, 1.0), "c": Mean(2.0, 4.0)}
    total = merge([first, second, {}, {"a": Mean(0.0, 1.0)}])
    assert {k: pair(m) for k, m in total.items()} == {"a": (10.0, 5.0), "b": (1.0, 1.0), "c": (2.0, 4.0)}
    assert to_floats(total) == {"a": 2.0, "b": 1.0, "c": 0.5}
    assert pair(first["a"]) == (6.0, 3.0)
    assert merge([]) == {}


def test_merge_takes_a_generator():
    assert pair(merge({"a": Mean(1.0, 2.0)} for _ in range(3))["a"]) == (3.0, 6.0)


def test_batches_of_unequal_size_give_the_exact_mean():
    values = np.arange(1, 11, dtype=np.float32)
    parts = [{"x": jax.device_get(Mean.of(jnp.asarray(part)))} for part in np.split(values, [4, 8])]
    assert to_floats(merge(parts)) == {"x": 5.5}


def test_counts_are_exact_at_the_size_of_imagenet():
    batch = jax.device_get(Mean.of(jnp.ones(4096)))
    total = merge([{"x": batch}] * 312)["x"]
    assert pair(total) == (312 * 4096, 312 * 4096)


def test_floats_are_python_floats():
    floats = to_floats({"a": Mean.of(jnp.array([1.0, 0.0, 0.0]))})
    assert type(floats["a"]) is float
    assert floats["a"] == 1 / 3  # divided in double precision
