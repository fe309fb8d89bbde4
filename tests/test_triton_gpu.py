"""The Triton kernels on a device, at sizes that the interpreter is too slow for.

Run with the cases of test_triton_kernels.py by `make test-gpu`.
"""

import pytest
import torch
from triton_problems import assert_pursuit, problem

from mpsae.kernels import triton_pursuit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]
METHODS = ["gram", "chunked", "stream"]


def free_bytes():
    return torch.cuda.mem_get_info()[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("B", "d", "n", "k"),
    [
        (1, 48, 1000, 300), (37, 64, 4099, 32), (37, 576, 9001, 64), (300, 768, 16001, 32),
        (64, 2304, 20011, 85), (3072, 768, 3001, 16),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("method", METHODS)
def test_pursuit_is_exact(method, B, d, n, k, dtype):
    x, dictionary = problem(B, d, n, dtype, device="cuda")
    answer = triton_pursuit.pursuit(x, dictionary, k=k, method=method)
    assert_pursuit(x, dictionary, answer)


@pytest.mark.parametrize("options", [{}, {"residual_threshold": 20.0}], ids=str)
def test_registers_and_chunks_agree(options):
    x, dictionary = problem(200, 1024, 32000, torch.bfloat16, device="cuda")
    gram = triton_pursuit.build_gram(dictionary)
    answers = [
        triton_pursuit.pursuit(x, dictionary, None, None, gram, k=64, method=method, **options)
        for method in ("gram", "chunked")
    ]
    for answer in answers:
        assert_pursuit(x, dictionary, answer, **options)


def test_gram_offsets_beyond_32_bits():
    n = 49152  # n^2 > 2^31
    if free_bytes() < 16 << 30:
        pytest.skip("needs 16 GiB of device memory")
    x, dictionary = problem(64, 64, n, torch.bfloat16, device="cuda")
    answer = triton_pursuit.pursuit(x, dictionary, k=8, method="gram")
    assert answer[0].max() > 2**31 // n
    assert_pursuit(x, dictionary, answer)


@pytest.mark.parametrize("method", METHODS)
def test_row_offsets_beyond_32_bits(method):
    B, d = 2**20 + 5, 2049
    if free_bytes() < 40 << 30:
        pytest.skip("needs 40 GiB of device memory")
    tail, dictionary = problem(5, d, 64, torch.bfloat16, device="cuda")
    x = torch.zeros(B, d, dtype=torch.bfloat16, device="cuda")
    x[-5:] = tail
    answer = triton_pursuit.pursuit(x, dictionary, k=2, method=method)
    assert not answer[3][:-5].any()
    assert_pursuit(tail, dictionary, [part[-5:] for part in answer])


@pytest.mark.parametrize("method", METHODS)
def test_nothing_waits_for_the_device(method):
    x, dictionary = problem(37, 64, 1000, device="cuda")
    gram = triton_pursuit.build_gram(dictionary)
    options = {"k": 8, "method": method, "residual_threshold": 1.0, "allow_repeats": False}
    triton_pursuit.pursuit(x, dictionary, None, None, gram, **options)  # compiled here
    torch.cuda.set_sync_debug_mode("error")
    try:
        gram = triton_pursuit.build_gram(dictionary)
        triton_pursuit.pursuit(x, dictionary, None, None, gram, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("method", METHODS)
def test_pursuit_in_a_cuda_graph(method):
    x, dictionary = problem(37, 64, 1000, device="cuda")
    gram = triton_pursuit.build_gram(dictionary)

    def run():
        return triton_pursuit.pursuit(x, dictionary, None, None, gram, k=8, method=method)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        answer = run()
    x.copy_(problem(37, 64, 1, seed=1, device="cuda")[0])
    graph.replay()
    for one, other in zip(answer, run(), strict=True):
        assert torch.equal(one, other)


def test_results_repeat_bit_by_bit():
    x, dictionary = problem(300, 256, 5000, torch.bfloat16, device="cuda")
    for method in METHODS:
        first, second = (
            triton_pursuit.pursuit(x, dictionary, k=32, method=method) for _ in range(2)
        )
        for one, other in zip(first, second, strict=True):
            assert torch.equal(one, other)
