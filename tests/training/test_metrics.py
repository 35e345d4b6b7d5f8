"""metrics.jsonl: what is written, and what a resumed run keeps of it."""

import errno
import os
import time

import jax.numpy as jnp
import pytest

from gpt4v_jax import config
from gpt4v_jax.training import goodput, metrics


def test_lines(tmp_path):
    log = metrics.Log(tmp_path, 0)
    log.write(1, {"loss": jnp.float32(2.5)})
    assert log.flush() is None
    log.later(2, {"loss": jnp.float32(1.5)})
    assert len(metrics.read(tmp_path)) == 1 and log.flush() == {"step": 2, "loss": 1.5}
    log.later(3, {"loss": jnp.float32(0.5)})
    assert metrics.read(tmp_path) == [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 1.5}]
    log.close()
    assert metrics.read(tmp_path)[2:] == [{"step": 3, "loss": 0.5}]
    assert list(tmp_path.glob("events.*"))


def test_a_line_waits_for_one_step_and_no_longer(tmp_path, capsys):
    with metrics.Report(tmp_path, 0, 9, 2, 32, goodput.Clock(tmp_path, 0, time.time())) as report:
        for step in range(1, 6):
            report.step(step, {"loss": jnp.float32(step), "accuracy": jnp.float32(0)}, 0)
            assert [line["step"] for line in metrics.read(tmp_path)] == [[], [1], [1], [1, 2], [1, 2], [1, 2, 4]][step]
    said = capsys.readouterr().out
    assert "step 2/9  loss 2.0000" in said and "step 4/9  loss 4.0000" in said


@pytest.mark.parametrize("half", ["", '{"step": 4, "lo', "{", '{"loss": 1.0}'])
def test_a_resumed_run_drops_what_it_will_do_again(tmp_path, half):
    lines = "".join(f'{{"step": {step}, "loss": {step}.0}}\n' for step in (1, 2, 3, 4))
    (tmp_path / "metrics.jsonl").write_text(lines + half)
    log = metrics.Log(tmp_path, 2)
    log.write(3, {"loss": 30.0})
    log.close()
    assert metrics.read(tmp_path) == [{"step": s, "loss": x} for s, x in ((1, 1.0), (2, 2.0), (3, 30.0))]


def test_a_half_written_line_does_not_stop_a_reader(tmp_path):
    """A report on a run that was killed reads what is whole."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert metrics.read(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_no_file_no_lines(tmp_path):
    assert metrics.read(tmp_path) == []


def test_a_full_disk_is_said(tmp_path, monkeypatch):
    """TensorBoard's file, too: it must not wait for a disk that has no room."""
    def full(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    log = metrics.Log(tmp_path, 0)
    monkeypatch.setattr(metrics.RecordWriter, "write", full)
    with pytest.raises(config.InputError, match="metrics.jsonl cannot be written: No space left on device"):
        log.write(1, {"loss": 1.0})


def test_tensorboard_reads_what_is_written(tmp_path):
    """Its records: a version, where a run goes on, and the values."""
    for start in (0, 7):
        (tmp_path / str(start)).mkdir()
        log = metrics.Log(tmp_path / str(start), start)
        log.write(start + 1, {"loss": 0.5, "questions/accuracy": 0.25})
        log.close()
        (path,) = (tmp_path / str(start)).glob("events.*")
        data, events = path.read_bytes(), []
        while data:  # TFRecord: length (8 bytes), its checksum (4), the record, its checksum (4)
            length = int.from_bytes(data[:8], "little")
            events.append(metrics.event_pb2.Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
        first, *resumed, last = events
        assert first.file_version == "brain.Event:2"
        assert [(event.step, event.session_log.status) for event in resumed] == ([(8, 1)] if start else [])
        assert last.step == start + 1
        assert {v.tag: v.simple_value for v in last.summary.value} == {"loss": 0.5, "questions/accuracy": 0.25}
