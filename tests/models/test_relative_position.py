"""A learnt bias of attention for each distance between two patches, as BEiT has it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import reference
from tests.models.test_vit import TINY, pictures
from tinymim_jax.experiment.config import Mae
from tinymim_jax.models import attention, posembed
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.weights import resize
from tinymim_jax.weights.handoff import Init, match, transfer

RELATIVE = dataclasses.replace(TINY, relative_position=True)


def test_rows_of_the_table_by_distance():
    index = posembed.relative_index(3)
    assert index.shape == (10, 10)
    by_distance = {}
    for a in range(9):
        for b in range(9):
            by_distance.setdefault((a // 3 - b // 3, a % 3 - b % 3), set()).add(index[1 + a, 1 + b])
    assert all(len(rows) == 1 for rows in by_distance.values())  # one row for each distance
    assert [min(by_distance[d]) for d in sorted(by_distance)] == list(range(25))
    assert set(index[0, 1:]) == {25} and set(index[1:, 0]) == {26} and index[0, 0] == 27


def test_rows_of_a_second_token_stand_before_those_of_cls():
    """TinyMIM*: from the token to others, from others to it, itself; then CLS's, which also hold between the two."""
    index, plain = posembed.relative_index(3, front=2), posembed.relative_index(3)
    np.testing.assert_array_equal(index[2:, 2:], plain[1:, 1:])
    assert set(index[1, 2:]) == {25} and set(index[2:, 1]) == {26} and index[1, 1] == 27
    assert set(index[0, 1:]) == {28} and set(index[1:, 0]) == {29} and index[0, 0] == 30


def test_a_second_token_has_its_own_rows():
    model = dataclasses.replace(RELATIVE, dist_token=True)
    model.check("m")
    params = reference.random_params(model.build().init, pictures())
    table = params["block2"]["attn"]["relative_position"]["kernel"]
    assert table.shape == (49 + 6, 3)
    trace = model.build().apply({"params": params}, pictures(), capture=(2,)).trace[2]
    q, k, v = (reference.f64(x).swapaxes(1, 2) for x in (trace.q, trace.k, trace.v))
    bias = reference.f64(table)[posembed.relative_index(4, 2)].transpose(2, 0, 1)
    out = (reference.softmax(q @ k.swapaxes(2, 3) / 8**0.5 + bias) @ v).swapaxes(1, 2).reshape(2, 18, 24)
    reference.close(trace.attn_out, reference.linear(params["block2"]["attn"]["proj"], out))


@pytest.mark.parametrize("route", [attention.attention, attention._by_xla])
def test_a_bias_and_its_gradient_against_torch(route):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=s).astype(np.float32) for s in [(2, 3, 7, 4)] * 3 + [(3, 7, 7), (2, 3, 7, 4)]]
    found, pull = jax.vjp(route, *map(jnp.asarray, arrays[:4]))
    tensors = [torch.tensor(x.astype(np.float64), requires_grad=True) for x in arrays]
    q, k, v, bias, cotangent = tensors
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])
    expected.backward(cotangent.detach())
    reference.close(found, expected.detach().numpy(), 1e-5)
    for gradient, tensor in zip(pull(jnp.asarray(arrays[4])), tensors, strict=False):
        reference.close(gradient, tensor.grad.numpy(), 1e-5)


@pytest.mark.slow
def test_a_block_adds_its_table_to_its_logits():
    """Tables of zeros change nothing; others, what is attended to."""
    params = reference.random_params(RELATIVE.build().init, pictures())
    assert params["block3"]["attn"]["relative_position"]["kernel"].shape == (49 + 3, 6)
    fresh = RELATIVE.build().init(jax.random.key(0), pictures())["params"]
    assert not any(np.any(fresh[f"block{i}"]["attn"]["relative_position"]["kernel"]) for i in (1, 2, 3))
    trace = RELATIVE.build().apply({"params": params}, pictures(), capture=(2,)).trace[2]
    bias = params["block2"]["attn"]["relative_position"]["kernel"][posembed.relative_index(4)].transpose(2, 0, 1)
    q, k, v = (reference.f64(x).swapaxes(1, 2) for x in (trace.q, trace.k, trace.v))
    out = reference.softmax(q @ k.swapaxes(2, 3) / 8**0.5 + bias) @ v
    proj = params["block2"]["attn"]["proj"]
    out = out.swapaxes(1, 2).reshape(2, 17, 24) @ reference.f64(proj["kernel"]) + proj["bias"]
    reference.close(trace.attn_out, out, 1e-5)
    tables = [params[f"block{i}"]["attn"].pop("relative_position") for i in (1, 2, 3)]
    plain = TINY.build().apply({"params": params}, pictures()).tokens
    for i, table in enumerate(tables, 1):
        params[f"block{i}"]["attn"]["relative_position"] = {"kernel": 0 * table["kernel"]}
    np.testing.assert_allclose(
        RELATIVE.build().apply({"params": params}, pictures()).tokens, plain, rtol=1e-4, atol=1e-5
    )


def test_what_has_no_relative_positions():
    with pytest.raises(InputError, match="m: relative_position needs attention 'xla'; set attention=xla"):
        dataclasses.replace(RELATIVE, attention="cudnn", dtype="bfloat16").check("m")
    with pytest.raises(InputError, match="task: model.relative_position needs whole images"):
        Mae().check("task", RELATIVE)
    assert set(RELATIVE.export_formats) < set(TINY.export_formats)


# Another grid


def test_the_series_of_distances_is_beits():
    """224 to 512 px: the ratio 1.134918 and where the distances of 14 x 14 patches come to lie."""
    tables = np.zeros((27 * 27 + 3, 27), np.float32)
    tables[:-3] = np.eye(27, dtype=np.float32)[np.arange(27 * 27) // 27]  # head h: 1 in row h of distances
    found = resize.resize_relative(tables, 32)
    assert found.shape == (63 * 63 + 3, 27)
    rows = found[:-3].reshape(63, 63, 27)[:, 31]
    np.testing.assert_allclose(rows.sum(axis=1), 1, atol=1e-5)
    for near in (-1, 0, 1):  # these keep their places, and the farthest come to lie at the ends
        np.testing.assert_allclose(rows[31 + near], np.eye(27)[13 + near], atol=1e-5)
    for end in (0, -1):
        np.testing.assert_allclose(rows[end], np.eye(27)[end], atol=1e-5)
    # A spline through distances takes a function of distance to itself.
    places = np.concatenate([-np.cumsum(1.134918 ** np.arange(13))[::-1], [0], np.cumsum(1.134918 ** np.arange(13))])
    np.testing.assert_allclose(rows @ places, np.arange(-31, 32), atol=1e-3)


@pytest.mark.parametrize(("old", "new"), [(4, 7), (7, 4), (2, 3), (4, 4)])
def test_a_linear_table_stays_in_order(old, new):
    span = 2 * old - 1
    table = np.concatenate([np.repeat(np.arange(span), span), [90, 91, 92]])[:, None].astype(np.float32)
    found = resize.resize_relative(table, new)
    assert resize.relative_side(len(found)) == new and list(found[-3:, 0]) == [90, 91, 92]
    rows = found[:-3].reshape(2 * new - 1, 2 * new - 1)
    assert np.all(np.diff(rows, axis=0) > 0) and np.ptp(rows, axis=1).max() < 1e-3
    assert (rows[0, 0], rows[new - 1, 0], rows[-1, 0]) == pytest.approx((0, old - 1, span - 1), abs=1e-4)


@pytest.mark.parametrize("side", [1, 2, 14, 32, 64])
def test_a_table_tells_its_grid_and_its_tokens(side):
    for front in (1, 2):
        rows = (2 * side - 1) ** 2 + 3 * front
        assert (resize.relative_side(rows), resize.relative_front(rows)) == (side, front)


def test_rows_of_both_tokens_are_kept():
    table = np.random.default_rng(0).normal(size=(49 + 6, 3)).astype(np.float32)
    found = resize.resize_relative(table, 6)
    assert found.shape == (121 + 6, 3)
    np.testing.assert_array_equal(found[-6:], table[-6:])
    np.testing.assert_array_equal(found[:-6], resize.resize_relative(table[:-3], 6)[:-3])
    with pytest.raises(InputError, match="the two models differ in size"):
        name = "encoder/block1/attn/relative_position/kernel"
        match({name: (121 + 3, 3)}, {name: table.shape}, Init("s", resize_posembed=True))


def test_handed_over_to_another_grid_only_if_asked():
    source = {"encoder": RELATIVE.build().init(jax.random.key(0), pictures())["params"]}
    wide = dataclasses.replace(RELATIVE, image_size=24)
    target = {"encoder": wide.build().init(jax.random.key(1), pictures(size=24))["params"]}
    from tinymim_jax.weights.parameters import shapes_of

    with pytest.raises(InputError, match=r"is for 4 x 4 patches in the source and 6 x 6 here.*resize_posembed=True"):
        match(shapes_of(target), shapes_of(source), Init("s"))
    report = match(shapes_of(target), shapes_of(source), Init("s", resize_posembed=True))
    assert report.resized["encoder/block2/attn/relative_position/kernel"] == (4, 6)
    filled = transfer(target, source, report)
    assert filled["encoder"]["block2"]["attn"]["relative_position"]["kernel"].shape == (11 * 11 + 3, 3)
