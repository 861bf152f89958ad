"""The conversion of `prepare.py` as an Apache Beam pipeline, for Dataflow, Flink or Spark (extra `beam`).

The elements are the slices of the plan. Converting a slice writes its shard and its note, as on one machine, so the
data set is identical byte for byte. If a runner converts a slice twice, it writes the same files twice. Refused records
are counted when the pipeline is done. OUT and the input must be reachable by all workers: in a bucket, or on a shared
disk.
"""

from collections.abc import Iterator, Sequence

from alignvlm_jax.data.prepare import Converter, Job, Task, convert_slice
from alignvlm_jax.data.prepare_notes import Summary
from alignvlm_jax.errors import UserError


def in_beam(arguments: Sequence[str]) -> Converter:
    """Returns a converter that runs a pipeline with these Beam arguments: `["--runner=DirectRunner", ...]`."""
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise UserError("--runner needs Apache Beam: pip install 'alignvlm-jax[beam]'") from error

    class ConvertSlice(beam.DoFn):
        """Converts the slice with a given number.

        Each worker reads the plan itself, because the plan is too large for a job description.
        """

        def __init__(self, job: Job):
            self._job = job

        def setup(self):
            _, self._slices = self._job.notes.read_plan()

        def process(self, index: int):
            convert_slice(self._job, (index, self._slices[index]))

    def convert(job: Job, tasks: Sequence[Task]) -> Iterator[Summary]:
        numbers = [index for index, _ in tasks]
        with beam.Pipeline(options=PipelineOptions(list(arguments))) as pipeline:
            # Reshuffle distributes the slices; without it, a runner may fuse the steps and convert all in one worker.
            _ = pipeline | beam.Create(numbers) | beam.Reshuffle() | beam.ParDo(ConvertSlice(job))
        for index in numbers:
            yield job.notes.summary(index)

    return convert
