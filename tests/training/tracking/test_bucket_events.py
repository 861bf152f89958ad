"""TensorBoard's files in a bucket: each flush uploads all events, and a bucket that does not answer ends no curve."""

import struct
from pathlib import Path

from tensorboardX.proto import event_pb2

from alignvlm_jax.locations import open_location
from alignvlm_jax.training.tracking import bucket_events
from alignvlm_jax.training.tracking.tensorboard import open_writer


def _events(file):
    data, events = file.read_bytes(), []
    while data:
        (size,) = struct.unpack("Q", data[:8])
        events.append(event_pb2.Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    return events


def test_no_event_is_lost_when_a_run_ends(gcs_bucket, tmp_path, monkeypatch):
    """tensorpack/tensorpack#1317: the events of a run in gs:// were in the local folder gs:."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bucket_events, "MAX_BYTES", 500)
    folder = open_location(gcs_bucket) / "run" / "tensorboard"
    for first in (0, 30):
        writer = open_writer(folder, first)
        for step in range(first, first + 40):
            writer.add_scalar("loss", step, step)
            if step % 20 == 19:
                writer.flush()
        writer.close()
    files = [_events(file) for file in sorted(folder.iterdir())]
    assert len(files) >= 2 and all(events[0].file_version == "brain.Event:2" for events in files)
    points = [(event.step, value.simple_value) for events in files for event in events for value in event.summary.value]
    assert points == [(step, float(step)) for step in (*range(40), *range(30, 70))]
    assert not list(tmp_path.iterdir())


def test_an_upload_that_fails_is_repeated_by_the_next_flush(gcs_bucket, monkeypatch, capsys):
    """tensorboardX's own writer for gs:// raises the error in its thread, which ends."""
    path = f"{gcs_bucket}/events"
    file = bucket_events.BucketEvents(path)
    header = struct.pack("Q", 0) + bytes(8)
    file.write(header)
    attempts = []
    with monkeypatch.context() as patch:

        def refuse(*_, **__):
            attempts.append(1)
            raise ConnectionError("no route to host")

        patch.setattr("etils.epath.gpath._GPath.write_bytes", refuse)
        file.flush()
        file.flush()
        assert len(attempts) == 1, "the same events are not uploaded again at once"
        file.write(b"a")
        file.flush()
    assert len(attempts) == 2
    assert capsys.readouterr().err.count(f"warning: TensorBoard's file is not up to date: {path}") == 1
    assert not open_location(path).exists()
    file.write(b"b")
    file.flush()
    assert open_location(path).read_bytes() == header + b"ab"
    monkeypatch.setattr(bucket_events, "MAX_BYTES", 19)
    file.write(b"c")
    file.flush()
    file.flush()
    file.write(b"d")
    file.close()
    assert open_location(path).read_bytes() == header + b"abc"
    assert open_location(f"{path}.000001").read_bytes() == header + b"d" and not Path("gs:").exists()
