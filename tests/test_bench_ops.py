"""`firstlm bench ops` measures every op, judges it by its bars, and writes what it printed."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch

from firstlm import bandwidth, bench_contests, bench_tables, cli, figures
from firstlm.native import read_all

OPS_WITH_BARS = {
    "router scoring",
    "router scoring, packed",
    "kv_append",
    "decode_attention",
    "gather_rows + scatter_rows_",
}
OTHER_OPS = {
    "plan_rows",
    "scatter_add_rows_",
    "router_pool_backward",
    "router_pool_packed_backward",
    "scatter_rows, gate",
    "gather_rows_backward",
}


def test_the_command_prints_and_writes_every_contest(tmp_path, monkeypatch, capsys):
    path = tmp_path / "ops.json"
    arguments = ["bench", "ops", "--quick", "--json", path, "--threads", 1, "--seed", 3]
    monkeypatch.setattr(sys, "argv", ["firstlm", *map(str, arguments)])
    before = torch.get_num_threads()
    with pytest.raises(SystemExit) as exit:
        cli.main()
    out = capsys.readouterr().out
    assert not exit.value.code, out
    assert torch.get_num_threads() == before
    found = figures.read(path)
    assert found["seed"] == 3 and found["threads"] == 1
    assert found["read_gb_per_s"]["median"] > 0
    assert {row["op"] for row in found["contests"]} == OPS_WITH_BARS | OTHER_OPS
    for row in found["contests"]:
        assert f"{row['op']}  {row['case']}" in out
        assert row["best_torch"] in row["us"] and row["best_torch"] != "firstlm"
        assert {"median", "p10", "p90", "n"} == row["us"]["firstlm"].keys()
        assert row["bytes"] > 0 and row["speedup"] > 0 and row["bandwidth_share"] > 0
        assert bool(row["bars"]) == (row["op"] in OPS_WITH_BARS)
        for bar in row["bars"]:
            good = bar["value"] >= bar["limit"] if bar["at_least"] else bar["value"] <= bar["limit"]
            assert bar["met"] == good
    table = bench_tables.tables(found)
    assert table.count("\n| ") >= len(found["contests"]) and found["isa"] in table


def close(actual, expected, dtype):
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "make",
    [
        lambda dtype, effort: bench_contests.router_contest(2, 9, 8, dtype, effort),
        lambda dtype, effort: bench_contests.packed_contest(3, 9, 8, dtype, effort),
        lambda dtype, effort: bench_contests.attention_contest(2, 4, 2, 11, 8, dtype, effort),
        lambda dtype, effort: bench_contests.pool_backward_contest(3, 9, 8, dtype),
        lambda dtype, effort: bench_contests.packed_backward_contest(3, 9, 8, dtype),
        lambda dtype, effort: bench_contests.blend_contest(4, 3),
        lambda dtype, effort: bench_contests.gather_backward_contest(4, 3),
    ],
    ids=["router", "packed", "attention", "backward", "packed backward", "blend", "gather back"],
)
def test_the_arms_of_a_contest_compute_the_same(make, dtype, monkeypatch):
    # One buffer, so that all arms read the same one.
    monkeypatch.setattr(bench_contests, "rotating", lambda make, *_: itertools.repeat(make()))
    contest = make(dtype, bench_contests.QUICK)
    results = {name: call() for name, call in contest.arms.items()}
    expected = results.pop("firstlm")
    for result in results.values():
        close(result.reshape(expected.shape), expected, dtype)


@pytest.mark.parametrize("T", [1, 5])
def test_the_arms_of_kv_append_write_the_same(T, monkeypatch):
    buffers = []

    def one(make, *_):
        buffers.append(make())
        return itertools.repeat(buffers[0])

    monkeypatch.setattr(bench_contests, "rotating", one)
    contest = bench_contests.kv_append_contest(2, T, torch.float32, bench_contests.QUICK)
    keys, values, new_keys, new_values, *_ = buffers[0]
    for name in ("firstlm", "slice assignment"):
        keys.zero_(), values.zero_()
        contest.arms[name]()
        assert keys.sum() == pytest.approx(new_keys.sum().item(), abs=1e-4)
        assert values.sum() == pytest.approx(new_values.sum().item(), abs=1e-4)
    contest.yardsticks["copying the bytes"]()
    assert torch.equal(buffers[0][4], new_keys)


def test_rotation_goes_through_all_the_bytes():
    made = itertools.count()
    values = bandwidth.rotating(lambda: next(made), nbytes=10, total_bytes=25)
    assert list(itertools.islice(values, 9)) == [0, 1, 2, 3] * 2 + [0]


def test_read_all_reads_everything():
    words = torch.arange(100_003, dtype=torch.int64)
    expected = 0
    for word in words.tolist():
        expected ^= word
    assert read_all(words) == expected
    assert read_all(words[:0]) == 0
    with pytest.raises(ValueError, match="contiguous"):
        read_all(words[::2])
    assert all(rate > 0 for rate in bandwidth.read_gb_per_s(2**16, repeats=2))
