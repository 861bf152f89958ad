"""Generated pages in DocDownstream's layout: a third as ChartQA test, the others as DocVQA validation."""

import pathlib

from alignvlm_jax.data import store
from alignvlm_jax.data.synthetic.corpus import build_corpus
from tests.evaluation.benchmarks.stub import write_lines


def write_docdownstream(folder: pathlib.Path, scratch: pathlib.Path, pages: int) -> None:
    """Writes generated pages to `folder`, and their corpus to `scratch`."""
    build_corpus(scratch / "documents", seed=0, sizes={"heldout": pages}, progress=False)
    lines = {"DocVQA": [], "ChartQA": []}
    (folder / "imgs").mkdir(parents=True)
    records = store.open_dataset(scratch / "documents", "heldout")
    for i in range(pages):
        record = records[i]
        name, dataset = f"./imgs/{record['id']}.png", "ChartQA" if i % 3 == 0 else "DocVQA"
        (folder / name).write_bytes(record["image"])
        for question, answer in zip(record["questions"], record["answers"], strict=True):
            user_message = {"role": "user", "content": f"<|image|>{question}"}
            messages = [user_message, {"role": "assistant", "content": answer}]
            lines[dataset].append(
                {"image": [name], "messages": messages, "task_name": "qa_sft", "dataset_name": dataset}
            )
    write_lines(folder / "val.jsonl", lines["DocVQA"])
    write_lines(folder / "test" / "ChartQA_test.jsonl", lines["ChartQA"])
