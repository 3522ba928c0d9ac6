"""That the host emulation of CUDA finds what it is there to find."""

from __future__ import annotations

import pytest
import torch

import emulated_ops

THREADS = 64
# In the order of the enum in emulation/wrong_kernels.cu.
BUGS = {
    "missing barrier": "reads element .* of a shared array of 64 before it is written",
    "reuse without a barrier": "element .* of a shared array of 64 without a barrier after another",
    "barrier for some threads": "wait for ever: 32 at a barrier, 0 at a shuffle, 32 have returned",
    "unwritten shared element": "reads element .* of a shared array of 64 before it is written",
    "read beyond the end": r"thread \(63, 0, 0\) .* reads elements \[64, 65\) of 64",
    "write beyond the end": r"thread \(63, 0, 0\) .* writes elements \[64, 65\) of 64",
    "misaligned pack": "reads 16 bytes at an address that is not a multiple of that",
    "unwritten output": "element 7 of an output of 64 was not written",
    "output written twice": "writes element 9, which has been written",
    "another thread's element": "element .*, which another thread (reads|writes)",
    "shuffle for some lanes": "wait for ever: 0 at a barrier, 32 at a shuffle, 32 have returned",
}


@pytest.fixture(params=[False, True], ids=["forward", "backward"])
def library(request):
    library = emulated_ops.library()
    library.set_backward(request.param)
    return library


def test_a_right_kernel_passes(library):
    values, reversed_values = torch.randn(THREADS), torch.empty(THREADS)
    library.reverse(values, reversed_values, 0)
    assert torch.equal(reversed_values, values.flip(0))


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_is_found(library, bug):
    to = torch.zeros(THREADS)
    with pytest.raises(RuntimeError, match=BUGS[bug]):
        library.reverse(torch.randn(THREADS), to, 1 + list(BUGS).index(bug))
    # The next launch is not disturbed.
    library.reverse(torch.ones(THREADS), to, 0)
    assert to.all()


def test_the_order_of_threads_shows_a_missing_barrier():
    values, results = torch.randn(THREADS), []
    for backward in (False, True):
        library = emulated_ops.library()
        library.set_backward(backward)
        results.append(torch.empty(THREADS))
        library.reverse_unwatched(values, results[-1])
    assert not torch.equal(*results)
