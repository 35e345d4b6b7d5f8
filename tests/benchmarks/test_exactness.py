"""The page of make soak."""

from benchmarks import exactness


def test_every_line_is_on_the_page():
    files = ["tests/test_devices.py", "tests/generate/test_decode.py", "tests/data/test_new.py"]
    lines = [{"test": f"{file}::test_it[a::b]", "what": f"of {file} |x|", "value": f"{k}e-06", "bar": "1e-05",
              "minutes": k, "commit": f"c{k % 2}"} for k, file in enumerate(files)]  # fmt: skip
    page = exactness.page(lines + lines[:1])
    rows = [line for line in page.splitlines() if line.startswith("| of ")]
    assert rows[0] == rows[1] == r"| of tests/test_devices.py \|x\| | 0e-06 | 1e-05 | 0.0 |" and len(rows) == 4
    assert "ran 3 tests in 3 minutes, commit c0 and c1" in page
    assert [line for line in page.splitlines() if line.startswith("## ")] == [
        "## Eight forced devices, and one", "## Cached decoding, and prompts in a batch", "## test_new"]  # fmt: skip
