"""Tests of the adapters for lmms-eval and VLMEvalKit, with fakes of both packages, which are not installed here.

The fakes have the signatures of lmms-eval 0.7.3's `lmms_eval.api.model.lmms` and `api.instance.Instance.args`, and of
VLMEvalKit's `vlmeval.vlm.base.BaseModel`. docs/benchmarks.md lists what was tried with the real packages.
"""

import abc
import importlib
import io
import pathlib
import sys
import types

import PIL.Image
import pytest

from alignvlm_jax.backbones import NANO_MODEL
from alignvlm_jax.data.synthetic.records import draw_records
from alignvlm_jax.interop.export import export_alignvlm
from alignvlm_jax.interop.import_pytorch import import_alignvlm

TOOLS = pathlib.Path(__file__).parents[2] / "tools"


class Lmms(abc.ABC):
    """Fake of lmms-eval's `lmms_eval.api.model.lmms`."""

    def __init__(self):
        self._rank, self._world_size, self.task_dict = 0, 1, {}
        self.cache_hook = types.SimpleNamespace(add_partial=lambda attribute, request, result: None)

    @property
    def rank(self):
        return self._rank

    @abc.abstractmethod
    def loglikelihood(self, requests): ...

    @abc.abstractmethod
    def generate_until(self, requests): ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests): ...


class BaseModel:
    """Fake of VLMEvalKit's `vlmeval.vlm.base.BaseModel`, which calls `generate` and saves images via the data set."""

    allowed_types = ["text", "image", "video"]

    def __init__(self):
        self.dump_image_func = None

    def set_dump_image(self, function):
        self.dump_image_func = function

    def dump_image(self, line, dataset):
        return self.dump_image_func(line)

    def generate(self, message, dataset=None):
        assert all(item["type"] in self.allowed_types for item in message)
        return self.generate_inner(message, dataset)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nano")
    import_alignvlm(NANO_MODEL, folder / "checkpoint", dtype="float32")
    export_alignvlm(folder / "checkpoint", folder / "exported")
    return folder / "exported"


@pytest.fixture(scope="module")
def rows():
    """Questions with pages and answers; the shipped model answers most of them correctly (`test_trained_nano`)."""
    rows = []
    for record in draw_records(0, "heldout", 0, 2):
        data = record["image"].getvalue() if isinstance(record["image"], io.BytesIO) else record["image"]
        for question, answer in zip(record["questions"], record["answers"], strict=True):
            rows.append(
                {"image": PIL.Image.open(io.BytesIO(data)).convert("RGB"), "question": question, "answer": answer}
            )
    return rows[:5]


def load_tool(monkeypatch, name: str, **fakes: object):
    """Imports a tool with fake modules, given as attributes by module name with __ for each dot."""
    for module, content in fakes.items():
        parts = module.split("__")
        for i in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
        vars(sys.modules[".".join(parts)]).update(content)
    monkeypatch.syspath_prepend(str(TOOLS))
    monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module(name)


def test_lmms_eval_gets_answers(monkeypatch, exported, rows):
    tool = load_tool(monkeypatch, "lmms_eval_alignvlm", lmms_eval__api__model={"lmms": Lmms})
    model = tool.AlignVLM(pretrained=str(exported), device="cpu", batch_size="4", bare_questions="True")
    model.task_dict = {"drawn": {"test": rows}}
    options = {"max_new_tokens": 24, "until": ["\n\n"], "temperature": 0}
    requests = [
        types.SimpleNamespace(
            args=(f"{row['question']}\nBe brief.", options, lambda doc: [doc["image"]], i, "drawn", "test")
        )
        for i, row in enumerate(rows)
    ]
    answers = model.generate_until(requests)
    right = [answer == row["answer"] for answer, row in zip(answers, rows, strict=True)]
    assert sum(right) >= 0.6 * len(right)
    assert model.generate_until(requests[2:3]) == answers[2:3], "independent of the batch"
    assert tool._truncate("12.50\n\nBecause", ("\n\n",)) == "12.50"
    with pytest.raises(NotImplementedError, match="likelihoods"):
        model.loglikelihood(requests)
    with pytest.raises(ValueError, match="unknown color"):
        tool.AlignVLM(pretrained=str(exported), color="red")


def test_vlmevalkit_gets_answers(monkeypatch, exported, rows, tmp_path):
    tool = load_tool(monkeypatch, "vlmeval_alignvlm", vlmeval__vlm__base={"BaseModel": BaseModel})
    model = tool.AlignVLM(str(exported), device="cpu", max_new_tokens=24, bare_questions=True)
    row = rows[1]
    row["image"].save(tmp_path / "page.png")
    model.set_dump_image(lambda line: [str(tmp_path / "page.png")])
    assert model.use_custom_prompt("DocVQA_VAL") and not model.use_custom_prompt("MMMU_DEV_VAL")
    message = model.build_prompt(row, "DocVQA_VAL")
    assert message == [
        {"type": "image", "value": str(tmp_path / "page.png")},
        {"type": "text", "value": row["question"]},
    ]
    assert model.generate(message, "DocVQA_VAL") == row["answer"]
