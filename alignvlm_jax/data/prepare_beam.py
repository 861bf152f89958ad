"""The conversion of `prepare.py` as an Apache Beam pipeline, for Dataflow, Flink or Spark (extra `beam`).

The elements are the slices of the plan; converting one writes its shard and its note, as a process on one machine
does, so the data set is the same, byte for byte. A slice that a runner does twice is written twice, the same each time.
Refused records are counted when the pipeline is done. OUT and the input must be where all workers reach them: in a
bucket, or on a disk that they share.
"""

from collections.abc import Iterator, Sequence

from alignvlm_jax.data.prepare import Converter, Job, Task, convert_slice
from alignvlm_jax.data.prepare_notes import Summary
from alignvlm_jax.errors import UserError


def in_beam(arguments: Sequence[str]) -> Converter:
    """Converts in a pipeline with these Beam arguments: `["--runner=DirectRunner", ...]`."""
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise UserError("--runner needs Apache Beam: pip install 'alignvlm-jax[beam]'") from error

    class ConvertSlice(beam.DoFn):
        """Converts the slice of a number; the plan is read by each worker, since no job description could hold it."""

        def __init__(self, job: Job):
            self._job = job

        def setup(self):
            _, self._slices = self._job.notes.read_plan()

        def process(self, index: int):
            convert_slice(self._job, (index, self._slices[index]))

    def convert(job: Job, tasks: Sequence[Task]) -> Iterator[Summary]:
        numbers = [index for index, _ in tasks]
        with beam.Pipeline(options=PipelineOptions(list(arguments))) as pipeline:
            _ = pipeline | beam.Create(numbers) | beam.Reshuffle() | beam.ParDo(ConvertSlice(job))
        for index in numbers:
            yield job.notes.summary(index)

    return convert
