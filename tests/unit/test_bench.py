"""The benches' harness: no speed while a check is red, contenders take turns, results say where they are from."""

import json
import subprocess
import sys
from pathlib import Path

import all as everything
import harness
import knn
import pytest
import summary
import torch

BENCH = Path(__file__).resolve().parents[1] / "bench"
CPU = torch.device("cpu")


def report_of(name: str = "loss", **settings) -> harness.Report:
    report = harness.Report(name, CPU, commit="abc1234", **settings)
    report.gate("loss", 1e-7, 1e-5)
    report.add("small", "plain", seconds=[3.0, 1.0, 2.0])
    report.add("small", "ours", seconds=[0.5], baseline="plain", goal=5, images_per_second=12345.6)
    report.missing("small", "peer", "not installed")
    report.ratio("small", "memory", 12.0, goal=10)
    return report


@pytest.mark.parametrize("error", [2e-5, float("nan"), float("inf")])
def test_red_check_ends_the_bench_without_a_speed(error, tmp_path, capsys):
    report = report_of()
    capsys.readouterr()
    with pytest.raises(SystemExit, match=r"gradient is wrong.*allowed 1e-05; no speed is printed") as ended:
        report.gate("gradient", error, 1e-5)
    assert isinstance(ended.value.code, str)  # Python prints it and exits with 1
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())


def test_contenders_take_turns():
    calls = []
    contenders = {name: lambda name=name: calls.append(name) for name in "AB"}
    seconds = harness.alternate(contenders, repeats=3, warmup=1, device=CPU)
    assert calls == list("ABABABAB")
    assert set(seconds) == {"A", "B"} and all(len(times) == 3 and min(times) >= 0 for times in seconds.values())


def test_result_tells_ratio_device_and_commit(tmp_path, capsys):
    path = report_of().finish(tmp_path)
    result = json.loads(path.read_text())
    assert path.name.startswith("loss-") and path.name.endswith("-abc1234.json") and " " not in path.name
    assert result["rows"][0]["seconds"] == {"first_quartile": 1.5, "median": 2.0, "third_quartile": 2.5}
    assert result["rows"][1]["ratio"] == 4.0  # 2.0 s of the baseline / 0.5 s
    assert [(ratio["value"], ratio["goal"]) for ratio in result["ratios"]] == [(4.0, 5), (12.0, 10)]
    assert result["kind"] == "cpu" and result["torch"] == torch.__version__ and result["gates"][0]["error"] == 1e-7
    out = capsys.readouterr().out
    assert "12,346" in out and "not measured: not installed" in out and "memory: 12.00 (goal 10)" in out


def test_goal_needs_its_baseline():
    with pytest.raises(ValueError, match="without a baseline"):
        report_of().add("small", "other", seconds=1.0, goal=2)


def test_command_in_the_result_names_no_folder_of_the_machine(monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["/some/where/tests/bench/loss.py", "--upstream", "/home/me/code", "--repeats", "3"]
    )
    assert harness.command_line() == "python tests/bench/loss.py --upstream ../code --repeats 3"


def prepare_memory(mebibytes: int):
    before = torch.ones(2**20 * 32)  # 128 MiB of input, not counted
    return lambda: (torch.ones(mebibytes * 2**18), before)


def prepare_failure():
    return lambda: 1 // 0


def test_peak_memory_is_that_of_the_call():
    assert 95 <= harness.peak_memory(prepare_memory, 96, device=CPU) <= 112


def test_peak_memory_of_a_call_that_fails():
    with pytest.raises(RuntimeError, match=r"prepare_failure\(\): exit code 1"):
        harness.peak_memory(prepare_failure, device=CPU)


def test_summary_takes_the_newest_and_says_what_is_missing(tmp_path):
    results = ("2026-01-01", "a-old", 3.0), ("2026-01-02", "new", 7.0), ("2026-01-01", "z-old", 5.0)  # by file name
    for date, commit, value in results:
        report = report_of()
        report.facts |= {"date": date, "commit": commit}
        report.ratio("large", "memory", value)
        report.finish(tmp_path)
    page, figure = summary.write_summary(tmp_path, tmp_path / "figure" / "bench.png")
    text = page.read_text()
    assert "commit new" in text and "-old" not in text and "| large | memory | 7.00 |  |" in text
    assert "GPU: not measured." in text and "CPU: not measured." not in text
    assert "| small | peer | not measured: not installed |" in text
    assert figure.read_bytes()[:4] == b"\x89PNG"


def test_summary_names_a_file_that_is_no_result(tmp_path):
    (tmp_path / "broken.json").write_text('{"bench": "loss"}')
    with pytest.raises(ValueError, match=r"broken\.json is no result"):
        summary.write_summary(tmp_path)


def test_one_bench_that_fails_or_hangs_does_not_stop_the_others(tmp_path, monkeypatch):
    scripts = {"fails": "raise SystemExit(3)", "hangs": "import time; time.sleep(60)"}
    scripts["works"] = f"import sys; open({str(tmp_path / 'done')!r}, 'w').write(' '.join(sys.argv[1:]))"
    for name, code in scripts.items():
        (tmp_path / f"{name}.py").write_text(f'if __name__ == "__main__":\n    {code}\n')
    monkeypatch.setattr(everything, "FOLDER", tmp_path)
    monkeypatch.setattr(everything, "CLOSING", 0)
    assert everything.find_benches() == ["fails", "hangs", "works"]
    failures = everything.run_all(["fails", "hangs", "works"], ["--repeats", "1"], minutes=6 / 60)
    assert set(failures) == {"fails", "hangs"}
    assert "exit code 3" in failures["fails"] and "longer than" in failures["hangs"]
    assert (tmp_path / "done").read_text() == "--repeats 1"


def test_loader_bench_runs_where_only_our_loader_is(tmp_path):
    small = {"pictures": 16, "batch": 4, "timed": 4, "workers": 0, "repeats": 1, "device": "cpu"}
    options = [text for name, value in small.items() for text in (f"--{name}", str(value))]
    hide = "import sys; sys.modules.update(dict.fromkeys(['nvidia.dali', 'webdataset', 'pandas', 'tyro', 'open_clip']))"
    code = f"{hide}; import loader; loader.main()"
    command = [sys.executable, "-c", code, *options, "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=BENCH, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("loader-*.json")
    result = json.loads(path.read_text())
    measured = {row["contender"]: row["figures"]["images_per_second"] for row in result["rows"] if "figures" in row}
    assert set(measured) == {"ours, torch"} and measured["ours, torch"] > 0
    assert {row["contender"] for row in result["rows"] if "missing" in row} == {"ours, DALI", "plain DALI", "open_clip"}


@pytest.mark.parametrize(
    "arguments, names, options",
    [
        ("--device cpu", None, ["--device", "cpu"]),
        ("loss wkv6 --repeats 3 --minutes 2", ["loss", "wkv6"], ["--repeats", "3"]),
    ],
)
def test_words_behind_options_are_no_names(monkeypatch, arguments, names, options):
    seen = []
    monkeypatch.setattr(everything, "run_all", lambda *given: seen.append(given) or {})
    monkeypatch.setattr(everything, "write_summary", list)
    monkeypatch.setattr("sys.argv", ["all.py", *arguments.split()])
    assert everything.main() == 0
    assert seen[0][:2] == (names or list(everything.USUAL), options) and set(everything.USUAL) < set(
        everything.find_benches()
    )


def test_queries_not_timed_lie_on_the_line_through_the_least_disturbed_samples():
    taken = {10: [(1.5, 1.2), (1.0, 1.1)], 110: [(2.0, 2.1), (9.0, 2.2)]}
    assert knn.extrapolate(taken, 1010).tolist() == pytest.approx([11.0, 11.1])
    assert knn.extrapolate(taken, 110).tolist() == pytest.approx([2.0, 2.1])
    with pytest.raises(SystemExit, match=r"took no longer than 10.*more --queries"):  # and never a negative time
        knn.extrapolate({10: [(1.0, 1.0)], 110: [(2.0, 1.0)]}, 1010)
