"""What holds for every op: torch's own checks, every instruction set, CUDA graphs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import test_attention_ops
import test_cuda_build
import test_kv_ops
import test_router_ops
import test_rows_ops
from firstlm import ops
from op_cases import to_gpu

FILES = [test_router_ops, test_rows_ops, test_kv_ops, test_attention_ops]
SAMPLES = [sample for file in FILES for sample in file.op_samples()]
every_sample = pytest.mark.parametrize(
    "op, args", [pytest.param(*sample[1:], id=sample[0]) for sample in SAMPLES]
)


def test_every_op_has_samples():
    assert {op._schema.name for _, op, _ in SAMPLES} == set(test_cuda_build.OPS)


def copies(args, move=lambda tensor: tensor) -> list:
    return [move(a.detach().clone()) if isinstance(a, Tensor) else a for a in args]


def assert_same(found, args, expected, expected_args) -> None:
    """Results, and what the ops have written to their arguments."""

    def tensors(values) -> list[Tensor]:
        return [v for v in torch.utils._pytree.tree_leaves(values) if isinstance(v, Tensor)]

    torch.testing.assert_close(tensors((found, args)), tensors((expected, expected_args)))


@every_sample
def test_an_op_gives_the_same_again(op, args):
    first, second = copies(args), copies(args)
    assert_same(op(*first), first, op(*second), second)


@every_sample
def test_opcheck(op, args):
    torch.library.opcheck(op, args)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graphs_capture_every_op():
    """None synchronises, or takes memory that is not the graph's."""
    for _, op, args in SAMPLES:
        eager, captured = (copies(args, lambda tensor: to_gpu(tensor, {})) for _ in range(2))
        expected, graph = op(*eager), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = op(*captured)
        graph.replay()
        torch.cuda.synchronize()
        assert_same(found, captured, expected, eager)


# --- Instruction sets -----------------------------------------------------------------------------


def run_with_isa(isa: str, *command: str) -> subprocess.CompletedProcess[str]:
    """On two threads, whatever this process has."""
    return subprocess.run(
        [sys.executable, *command],
        env=os.environ | {"FIRSTLM_ISA": isa, "OMP_NUM_THREADS": "2"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )


PRINT = ("-c", "from firstlm import ops; print(ops.isa())")


def test_firstlm_isa_forces_a_level():
    assert ops.isa_levels()[0] == "portable"
    assert run_with_isa("portable", *PRINT).stdout == "portable\n"


def test_firstlm_isa_of_another_machine_is_an_error_that_lists_ours():
    answer = run_with_isa("vax", *PRINT)
    assert answer.returncode == 1
    levels = ", ".join(ops.isa_levels())
    assert f"FIRSTLM_ISA is 'vax'; this machine and build have {levels}" in answer.stderr


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.__name__)
def test_the_levels_of_this_machine_agree_with_the_references(file):
    """The drawn cases again, on two threads, in a process for each level."""
    if "FIRSTLM_ISA" in os.environ:
        pytest.skip("a level is forced already")
    for isa in ops.isa_levels():
        command = "-m", "pytest", "-q", "-k", "reference and cpu", file.__file__
        answer = run_with_isa(isa, *command)
        assert answer.returncode == 0, answer.stdout
