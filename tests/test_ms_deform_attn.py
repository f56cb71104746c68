"""Multi-scale deformable attention: gradients, parity with ``transformers``, independent reference, properties."""

import logging
import math
import os
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ovdet2.errors import SetupError, UsageError
from ovdet2.layers import ms_deform_attn as module
from ovdet2.layers.ms_deform_attn import MultiScaleDeformableAttention, ms_deform_attn

SHAPES = [(9, 5), (4, 7), (1, 3), (2, 1)]
KERNELS = ["bag", "grid_sample"]


def example(shapes=SHAPES, batch=2, queries=6, heads=2, channels=3, points=2, dtype=torch.float64, spread=0.7, seed=0):
    """(value, locations, weights); with ``spread`` 0.7 a third of the locations lie outside [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(height * width for height, width in shapes)
    value = torch.randn(batch, tokens, heads, channels, generator=generator, dtype=torch.float64)
    lead = (batch, queries, heads, len(shapes), points)
    locations = 0.5 + spread * torch.randn(*lead, 2, generator=generator, dtype=torch.float64)
    weights = torch.randn(*lead, generator=generator, dtype=torch.float64)
    weights = weights.flatten(-2).softmax(-1).view(lead)
    return value.to(dtype), locations.to(dtype), weights.to(dtype)


def by_hand(value, shapes, locations, weights):
    """The sum in Python loops, pixel by pixel."""
    batch, queries, heads, _, points, _ = locations.shape
    output = torch.zeros(batch, queries, heads, value.shape[3], dtype=torch.float64)
    for b in range(batch):
        for q in range(queries):
            for h in range(heads):
                start = 0
                for level, (height, width) in enumerate(shapes):
                    for p in range(points):
                        x = float(locations[b, q, h, level, p, 0]) * width - 0.5
                        y = float(locations[b, q, h, level, p, 1]) * height - 0.5
                        for row in (math.floor(y), math.floor(y) + 1):
                            for column in (math.floor(x), math.floor(x) + 1):
                                if 0 <= row < height and 0 <= column < width:
                                    share = (1 - abs(x - column)) * (1 - abs(y - row))
                                    pixel = value[b, start + row * width + column, h].double()
                                    output[b, q, h] += share * weights[b, q, h, level, p] * pixel
                    start += height * width
    return output.flatten(2)


def published(value, shapes, locations, weights):
    from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention

    return MultiScaleDeformableAttention()(value, torch.tensor(shapes), shapes, None, locations, weights, 64)


def gradients(function, *inputs):
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    output = function(*inputs)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.autograd.grad(output, inputs, upstream.to(output.dtype))


@pytest.mark.parametrize("kernel", KERNELS)
def test_equals_the_sum_by_hand(kernel):
    value, locations, weights = example()
    wanted = by_hand(value, SHAPES, locations, weights)
    torch.testing.assert_close(ms_deform_attn(value, SHAPES, locations, weights, kernel), wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-10), (torch.float32, 5e-5)])
def test_output_and_gradients_equal_transformers(kernel, dtype, atol):
    shapes = [(13, 17), (7, 9), (4, 5), (2, 3)]
    inputs = example(shapes, queries=50, heads=4, channels=8, points=4, dtype=dtype)
    ours = ms_deform_attn(inputs[0], shapes, *inputs[1:], kernel)
    torch.testing.assert_close(ours, published(inputs[0], shapes, *inputs[1:]), atol=atol, rtol=0)
    got = gradients(lambda v, x, w: ms_deform_attn(v, shapes, x, w, kernel), *inputs)
    wanted = gradients(lambda v, x, w: published(v, shapes, x, w), *inputs)
    for mine, theirs in zip(got, wanted):
        torch.testing.assert_close(mine, theirs, atol=atol, rtol=atol)


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradcheck(kernel):
    inputs = [tensor.requires_grad_() for tensor in example(queries=3)]
    assert torch.autograd.gradcheck(lambda v, x, w: ms_deform_attn(v, SHAPES, x, w, kernel), inputs, atol=1e-6)


def test_registration_of_the_operators():
    inputs = [tensor.requires_grad_() for tensor in example(queries=3)]
    flat = [side for shape in SHAPES for side in shape]
    torch.library.opcheck(torch.ops.ovdet2.ms_deform_attn_bag, (inputs[0], flat, *inputs[1:]))


@given(
    shapes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4),
    batch=st.integers(1, 3),
    queries=st.integers(0, 4),
    heads=st.integers(1, 3),
    channels=st.integers(1, 5),
    points=st.integers(1, 3),
    spread=st.sampled_from([0.1, 1.0, 30.0]),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=60, deadline=None)
def test_kernels_agree(shapes, batch, queries, heads, channels, points, spread, seed):
    value, locations, weights = example(shapes, batch, queries, heads, channels, points, spread=spread, seed=seed)
    first, second = (ms_deform_attn(value, shapes, locations, weights, kernel) for kernel in KERNELS)
    assert first.shape == (batch, queries, heads * channels)
    torch.testing.assert_close(first, second, atol=1e-10, rtol=0)
    if queries:
        runs = [
            gradients(lambda v, x, w: ms_deform_attn(v, shapes, x, w, kernel), value, locations, weights)
            for kernel in KERNELS
        ]
        for mine, reference in zip(*runs):
            torch.testing.assert_close(mine, reference, atol=1e-9, rtol=0)


def test_no_queries_give_zero_gradients():
    inputs = example(queries=0)
    for gradient in gradients(lambda v, x, w: ms_deform_attn(v, SHAPES, x, w), *inputs):
        assert not gradient.any()


def test_points_on_and_beyond_the_border():
    value = torch.ones(1, 6, 1, 1, dtype=torch.float64)  # a map of ones, 2 x 3
    x = torch.tensor([-1.0, -1 / 6, 0.0, 1 / 6, 0.5, 1.0, 7 / 6, 2.0, 1e30, math.inf, -math.inf], dtype=torch.float64)
    locations = torch.stack([x, torch.full_like(x, 0.5)], dim=-1).view(1, -1, 1, 1, 1, 2)
    weights = torch.ones(1, len(x), 1, 1, 1, dtype=torch.float64)
    wanted = torch.tensor([0, 0, 0.5, 1, 1, 0.5, 0, 0, 0, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(ms_deform_attn(value, [(2, 3)], locations, weights).flatten(), wanted)


def test_locations_that_are_not_numbers_do_not_hide():
    value, locations, weights = example()
    locations[0, 2, 0, 0, 0, 0] = math.nan
    output = ms_deform_attn(value, SHAPES, locations, weights)
    assert output[0, 2].isnan().any() and output[1].isfinite().all()


def test_half_precision_is_computed_in_float32_under_autocast_too():
    value, locations, weights = example(dtype=torch.bfloat16)
    exact = ms_deform_attn(value.float(), SHAPES, locations.float(), weights.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = ms_deform_attn(value, SHAPES, locations, weights)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, exact.bfloat16())


def test_permuting_queries_permutes_the_output():
    value, locations, weights = example(queries=9)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(2))
    permuted = ms_deform_attn(value, SHAPES, locations[:, order], weights[:, order])
    assert torch.equal(permuted, ms_deform_attn(value, SHAPES, locations, weights)[:, order])


def test_a_batch_equals_its_images():
    value, locations, weights = example(batch=3)
    singles = [ms_deform_attn(value[i : i + 1], SHAPES, locations[i : i + 1], weights[i : i + 1]) for i in range(3)]
    batch = ms_deform_attn(value, SHAPES, locations, weights)
    torch.testing.assert_close(batch, torch.cat(singles), atol=1e-12, rtol=0)


def test_wrong_arguments_are_named():
    value, locations, weights = example()
    with pytest.raises(UsageError, match="78 tokens.*77"):
        ms_deform_attn(value[:, :-1], SHAPES, locations, weights)
    with pytest.raises(UsageError, match="kernel 'cuda'"):
        ms_deform_attn(value, SHAPES, locations, weights, "cuda")
    with pytest.raises(UsageError, match="10 channels"):
        MultiScaleDeformableAttention(10, heads=4)


def test_the_kernel_is_logged_once(caplog):
    module._announce.cache_clear()
    value, locations, weights = example()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            ms_deform_attn(value, SHAPES, locations, weights)
    assert [record.message for record in caplog.records] == [module.describe_kernel("cpu")]


def their_layer(ours):
    """``transformers``' layer with the weights of ours."""
    from transformers import DeformableDetrConfig
    from transformers.models.deformable_detr.modeling_deformable_detr import DeformableDetrMultiscaleDeformableAttention

    dim = ours.output_proj.out_features
    config = DeformableDetrConfig(d_model=dim, num_feature_levels=ours.levels)
    layer = DeformableDetrMultiscaleDeformableAttention(config, num_heads=ours.heads, n_points=ours.points)
    layer.to(ours.output_proj.weight.dtype)
    layer.load_state_dict(ours.state_dict())
    return layer


@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-10), (torch.float32, 5e-5)])
def test_layer_equals_transformers(coordinates, padded, dtype, atol):
    torch.manual_seed(0)
    ours = MultiScaleDeformableAttention(16, heads=4, points=3).to(dtype)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    tokens = torch.randn(2, sum(h * w for h, w in SHAPES), 16, dtype=dtype)
    queries = torch.randn(2, 5, 16, dtype=dtype)
    references = torch.rand(2, 5, 4, coordinates, dtype=dtype)
    mask = torch.rand(tokens.shape[:2]) < 0.3 if padded else torch.zeros(tokens.shape[:2], dtype=torch.bool)
    wanted, _ = their_layer(ours)(
        queries,
        attention_mask=~mask,
        encoder_hidden_states=tokens,
        reference_points=references,
        spatial_shapes=torch.tensor(SHAPES),
        spatial_shapes_list=SHAPES,
    )
    got = ours(queries, references, tokens, SHAPES, mask)
    torch.testing.assert_close(got, wanted, atol=atol, rtol=0)
    changed = tokens + 100 * mask[..., None]
    assert torch.equal(ours(queries, references, changed, SHAPES, mask), got)


def test_initial_points_form_a_square_around_the_reference():
    layer = MultiScaleDeformableAttention(16, heads=8, levels=1, points=3)
    references = torch.full((1, 1, 1, 2), 0.5)
    locations, weights = layer.sample(torch.randn(1, 1, 16), references, [(10, 20)])
    pixels = (locations[0, 0, :, 0] - 0.5) * torch.tensor([20.0, 10.0])  # [8, 3, 2]
    torch.testing.assert_close(pixels.abs().amax(-1), torch.tensor([1.0, 2.0, 3.0]).expand(8, 3))
    torch.testing.assert_close(pixels[[0, 2], 0], torch.tensor([[1.0, 0.0], [0.0, 1.0]]), atol=1e-5, rtol=0)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 3))


def test_layer_takes_autocast_and_rejects_three_coordinates():
    layer = MultiScaleDeformableAttention(16, heads=4)
    tokens = torch.randn(1, sum(h * w for h, w in SHAPES), 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        locations, weights = layer.sample(tokens[:, :2], torch.rand(1, 2, 4, 2), SHAPES)
        assert locations.dtype == weights.dtype == torch.float32
        layer(tokens[:, :2], torch.rand(1, 2, 4, 4), tokens, SHAPES).float().sum().backward()
    with pytest.raises(UsageError, match="2 or 4 coordinates, not 3"):
        layer(tokens[:, :2], torch.rand(1, 2, 4, 3), tokens, SHAPES)


def compare_triton(device, dtype, atol, shapes=((5, 3), (2, 4)), **sizes):
    """The fused kernel against grid_sample in float32 on the same, rounded values."""
    shapes = list(shapes)
    value, locations, weights = example(shapes, dtype=torch.float32, **sizes)
    value = value.to(dtype)
    inputs = [tensor.to(device) for tensor in (value, locations, weights)]
    got = ms_deform_attn(inputs[0], shapes, *inputs[1:], "triton")
    wanted = ms_deform_attn(inputs[0].float(), shapes, *inputs[1:], "grid_sample")
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), wanted, atol=atol, rtol=atol)
    upstream = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1)).to(device).to(dtype)
    runs = []
    for kernel, exact in (("triton", dtype), ("grid_sample", torch.float32)):
        leaves = [inputs[0].to(exact).detach().requires_grad_()] + [t.clone().requires_grad_() for t in inputs[1:]]
        output = ms_deform_attn(leaves[0], shapes, *leaves[1:], kernel)
        runs.append(torch.autograd.grad(output, leaves, upstream.to(exact)))
    for mine, reference in zip(*runs):
        torch.testing.assert_close(mine.float(), reference, atol=atol, rtol=atol)


TOLERANCES = [(torch.float32, 5e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)]


def test_triton_arithmetic_in_its_interpreter():
    """In a process of its own: the interpreter must be asked for before the kernels are defined."""
    pytest.importorskip("triton")
    code = (
        "from tests.test_ms_deform_attn import *\n"
        "for dtype, atol in TOLERANCES: compare_triton('cpu', dtype, atol, queries=3)\n"
        "compare_triton('cpu', torch.float32, 5e-5, shapes=[(1, 1)], queries=20, heads=3, channels=4, points=1)\n"
        "compare_triton('cpu', torch.float32, 5e-5, queries=0)\n"
        "v, x, w = example(dtype=torch.float32)\n"
        "x[0, 2, 0, 0, 0] = math.inf\n"
        "torch.testing.assert_close(ms_deform_attn(v, SHAPES, x, w, 'triton'), ms_deform_attn(v, SHAPES, x, w))\n"
        "x[0, 2, 0, 0, 0] = math.nan\n"
        "assert ms_deform_attn(v, SHAPES, x, w, 'triton')[1].isfinite().all()\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_triton_needs_a_gpu():
    value, locations, weights = example(dtype=torch.float32)
    with pytest.raises(SetupError, match="needs a CUDA device"):
        ms_deform_attn(value, SHAPES, locations, weights, "triton")
    assert module.select_kernel("cuda", torch.float64) == "grid_sample"


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("dtype", "atol"), TOLERANCES)
@pytest.mark.parametrize("channels", [32, 24])
def test_triton_equals_grid_sample_on_a_gpu(dtype, atol, channels):
    shapes = [(40, 52), (20, 26), (10, 13), (5, 7)]
    compare_triton(
        "cuda", dtype, 4 * atol, shapes=shapes, queries=700, heads=8, channels=channels, points=4, spread=0.4
    )


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_is_three_times_as_fast_on_a_gpu(dtype, capsys):
    """Forward and backward at the 22,223 tokens of an image of 800 x 1333, against grid_sample."""
    shapes = [(100, 167), (50, 84), (25, 42), (13, 21)]
    tokens = sum(height * width for height, width in shapes)
    value, locations, weights = (
        tensor.cuda() for tensor in example(shapes, 1, tokens, 8, 32, 4, dtype=torch.float32, spread=0.3)
    )
    leaves = [tensor.requires_grad_() for tensor in (value.to(dtype), locations, weights)]

    def step(kernel):
        torch.autograd.grad(ms_deform_attn(leaves[0], shapes, *leaves[1:], kernel).float().sum(), leaves)
        torch.cuda.synchronize()

    seconds = {kernel: [] for kernel in ("triton", "grid_sample")}
    for turn in range(13):
        for kernel, times in seconds.items():
            started = time.perf_counter()
            step(kernel)
            if turn >= 3:
                times.append(time.perf_counter() - started)
    fused, pure = (sorted(seconds[kernel])[5] for kernel in ("triton", "grid_sample"))
    with capsys.disabled():
        print(f"\n{dtype}: fused {1e3 * fused:.2f} ms, grid_sample {1e3 * pure:.2f} ms, ratio {pure / fused:.2f}")
    assert pure >= 3 * fused
