"""The benchmarks run, whatever they measure: each row of each is there, and counted every call. The times are not looked at."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCHES = ROOT / "benches" / "python"


def bench(name: str, *words: str) -> str:
    command = [sys.executable, str(BENCHES / name), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def are_times(values: object) -> bool:
    return isinstance(values, dict) and all(isinstance(each, float) and math.isfinite(each) and each > 0 for each in values.values())


def test_the_costs_of_filters_and_captures_are_measured() -> None:
    figures = json.loads(bench("bench_capture.py", "--hits", "300", "--turns", "1", "--json"))["nanoseconds"]
    ways = ["filtered by a number", "filtered by three conditions", "filtered by a string", "captured: 4 numbers"]
    ways += ["captured: 3 numbers, 1 string", "captured: 4 numbers, to Parquet", "counted, with the journal of events"]
    assert list(figures) == ["counted only", *ways]
    assert are_times(figures)


def test_a_hit_is_measured_beside_plain_unicorn() -> None:
    figures = json.loads(bench("bench_dance.py", "--hits", "400", "--turns", "1", "--json"))
    ours, theirs = ["vmitap, no handler", "vmitap, Python handler"], ["unicorn, two instances", "unicorn, byte swapped"]
    assert list(figures["microseconds"]) == ours + theirs
    assert {way: list(ratios) for way, ratios in figures["ratios"].items()} == dict.fromkeys(ours, theirs)
    assert all(map(are_times, (figures["microseconds"], *figures["ratios"].values())))


def test_what_a_handler_costs_is_measured_alone_and_beside_a_busy_thread() -> None:
    figures = json.loads(bench("bench_dispatch.py", "--hits", "2000", "--turns", "1", "--json"))
    assert list(figures) == ["alone", "beside a busy thread", "beside it, setswitchinterval(0.0001)"]
    ways = ["counted", "counted, as an event", "filtered out", "4 columns captured", "handler, hits in a crowd", "handler, hits one by one"]
    for costs in figures.values():
        assert list(costs) == ways
        assert all(list(cost) == ["busy", "call", "held_p50", "held_p99"] for cost in costs.values())
        assert all(cost["busy"] > 0 and cost["call"] > 0 for cost in costs.values())


@pytest.mark.parametrize("name", ["bench_capture.py", "bench_dance.py", "bench_dispatch.py", "bench_table.py"])
def test_what_a_person_reads_is_printed_too(name: str) -> None:
    words = ("--calls", "50") if name == "bench_table.py" else ("--hits", "1000")
    text = bench(name, *words, "--turns", "1")
    assert re.search(r"\d+\.\d+|\d{2,}", text)
    assert bool(re.search(r"\b(met|MISSED)\b", text)) == (name != "bench_table.py")


PEERS = {
    "Frida, a counter in C": "frida",
    "Frida, a function in JavaScript": "frida",
    "Qiling, hook_address": "qiling",
    "python-ptrace, breakpoint": "ptrace",
    "Frida, Python function waited for": "frida",
}


def test_the_table_has_a_row_for_each_way_and_says_which_peers_are_missing() -> None:
    text = bench("bench_table.py", "--turns", "1", "--calls", "100", "--markdown")
    head, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert head == ["", "us a hit", "hits/s", "x vmitap", "code sees it"]
    names = ["**counted or recorded, no Python**", "vmitap, counted", "vmitap, filtered out", "vmitap, 4 columns captured"]
    names += ["Frida, a counter in C", "Frida, a function in JavaScript", "**a Python function looks at a register**", "vmitap, handler"]
    names += ["unicorn, code hook", "unicorn, two instances", "unicorn, byte swapped", "Qiling, hook_address", "python-ptrace, breakpoint"]
    assert [line[0] for line in lines] == [*names, "gdb, Python breakpoint", "Frida, Python function waited for"]
    for name, cost, *rest in lines:
        is_there = shutil.which("gdb") if name.startswith("gdb") else importlib.util.find_spec(PEERS.get(name, "vmitap"))
        if name.startswith("**"):
            assert (cost, rest) == ("", ["", "", ""])
        elif is_there:
            assert float(cost) > 0, name
            assert rest[2] == ("yes" if name.startswith(("Frida", "python-ptrace", "gdb")) else "no"), name
        else:
            assert cost.startswith("not installed: "), name


def test_make_runs_every_benchmark_of_the_parts() -> None:
    words = ["make", "--no-print-directory", "-n", "bench-parts"]
    commands = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True, cwd=ROOT).stdout
    told = re.search(r"cargo bench (.*)", commands)
    assert told
    # cargo leaves out what needs a feature that is not named, without a word.
    manifest = tomllib.loads((ROOT / "Cargo.toml").read_text())
    features = {*manifest["features"]["default"], *re.findall(r"--features (\S+)", told[1])}
    targets = {each["name"]: each.get("required-features", []) for each in manifest["bench"]}
    assert {path.stem for path in (ROOT / "benches").glob("*.rs")} == set(targets)
    assert {name for name, required in targets.items() if not features.issuperset(required)} == set()
    assert not re.search(r"--bench (?!'\*')", told[1])
    scripts = {path.name for path in BENCHES.glob("bench_*.py")} - {"bench_table.py"}
    assert scripts == set(re.findall(r"benches/python/(\S+)", commands))


def test_make_bench_measures_one_after_the_other_and_its_words_are_for_the_table(tmp_path: Path) -> None:
    log = tmp_path / "log"
    tools = tmp_path / "venv" / "bin"
    tools.mkdir(parents=True)
    for tool in (tools / "python", tools / "cargo"):
        tool.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exit\necho "begins ${{0##*/}} $*" >> "{log}"\nsleep 0.1\necho ends >> "{log}"\n')
        tool.chmod(0o755)
    # Made in this order, so that nothing is left to set up.
    for stamp in (".build", ".dev", ".built"):
        (tmp_path / "venv" / stamp).touch()
    words = ["make", "-j2", "bench", "ARGS=--markdown", f"VENV={tmp_path / 'venv'}"]
    subprocess.run(
        words, env={**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}, check=True, capture_output=True, timeout=60, cwd=ROOT
    )
    lines = log.read_text().splitlines()
    begun = lines[::2]
    assert lines[1::2] == ["ends"] * len(begun), "none begins before the one before it has ended"
    assert begun[0] == "begins python benches/python/bench_table.py --markdown"
    assert begun[1].startswith("begins cargo bench")
    assert [line for line in begun[1:] if "--markdown" in line] == []
    assert len(begun) == 6
