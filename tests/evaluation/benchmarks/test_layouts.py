"""Tests of folders as publishers' archives unpack, one row for each line of the table in docs/benchmarks.md.

Sources: rrc.cvc.uab.es (spdocvqa_qas.zip, spdocvqa_images.tar.gz, infographicsvqa_qas.zip, ...), the repositories
vis-nlp/ChartQA, AoiDragon/POPE, yuweihao/MM-Vet and AILab-CVC/SEED-Bench, textvqa.org, cs.stanford.edu, and the file
lists of the data sets of lmms-lab, HuggingFaceM4, MMMU, terryoo and vcr-org on the Hub.
"""

import pathlib
import re

import pytest

from alignvlm_jax.errors import UserError
from alignvlm_jax.evaluation.benchmarks.files import image_exists
from alignvlm_jax.evaluation.benchmarks.mmmu import SUBJECTS
from alignvlm_jax.evaluation.benchmarks.reading import read_questions
from alignvlm_jax.evaluation.benchmarks.table import BENCHMARKS
from tests.evaluation.benchmarks.stub import cell, write_image, write_json, write_lines, write_parquet

DOCS = pathlib.Path(__file__).parents[3] / "docs" / "benchmarks.md"
SNAPSHOT = "datasets--lmms-lab--DocVQA/snapshots/0123456789abcdef0123456789abcdef01234567"

DOC = {"questionId": 1, "question": "q", "answers": ["a"]}
RRC = {"data": [{**DOC, "image": "documents/a.png"}]}
INFO_RRC = {"data": [{**DOC, "image_local_name": "a.png"}]}
TEXT = {"question_id": 1, "question": "q", "answers": ["a"] * 10}
CHOICES = {"question": "q", "answer": "A", "choice_a": "a", "choice_b": "b", "choice_c": "c", "choice_d": "d"}
SEED = {**CHOICES, "question_id": "1", "question_type_id": 5, "data_type": "image", "data_id": "a.png"}
POPE = {"question_id": 1, "image": "a.png", "text": "q", "label": "yes"}
POPE_ROW = {"question_id": "1", "question": "q", "answer": "yes", "image": cell(1)}
MMMU = {"question": "q", "options": "['a', 'b']", "answer": "A", "question_type": "multiple-choice", "image_1": cell(1)}
PICTURE = {"image": cell(1)}


def mmmu(subject: str) -> list[dict]:
    return [{"id": f"validation_{subject}_1", **MMMU}]


def downstream(dataset: str, split: str = "test") -> dict:
    messages = [{"role": "user", "content": "<|image|>q"}, {"role": "assistant", "content": "a"}]
    record = {"image": ["./imgs/a.png"], "messages": messages, "dataset_name": dataset}
    name = "val.jsonl" if split == "val" else f"{split}/{dataset}_{split}.jsonl"
    return {f"DocDownstream-1.0/{name}": [record], "DocDownstream-1.0/imgs/a.png": 1}


# Name of the row -> files, by path: rows of JSON lines and Parquet, a JSON value, or the number of an image.
LAYOUTS = {
    "docvqa-rrc": {"spdocvqa_qas/val_v1.0_withQT.json": RRC, "spdocvqa_images/a.png": 1, "spdocvqa_ocr/a.json": {}},
    "docvqa-rrc-nested": {"docvqa/qas/val_v1.0_withQT.json": RRC, "docvqa/spdocvqa_images/documents/a.png": 1},
    "docvqa-rrc-early": {"val/val_v1.0.json": RRC, "val/documents/a.png": 1},
    "docvqa-parquet": {
        "DocVQA/validation-00000-of-00001.parquet": [{**DOC, **PICTURE}],
        "InfographicVQA/validation-00000-of-00001.parquet": [{**DOC, "question": "wrong", **PICTURE}],
    },
    "docvqa-hub": {f"{SNAPSHOT}/DocVQA/validation-00000-of-00001.parquet": [{**DOC, **PICTURE}]},
    "docvqa-docdownstream": downstream("DocVQA", "val"),
    "infovqa-rrc": {"infographicsvqa_qas/infographicsVQA_val_v1.0_withQT.json": INFO_RRC,
                    "infographicsvqa_images/a.png": 1},
    "infovqa-parquet": {
        "DocVQA/InfographicVQA/validation-00000-of-00001.parquet": [{**DOC, **PICTURE}],
        "DocVQA/DocVQA/validation-00000-of-00001.parquet": [{**DOC, "question": "wrong", **PICTURE}],
    },
    "infovqa-docdownstream": downstream("InfographicsVQA", "val"),
    "deepform-docdownstream": downstream("DeepForm"),
    "klc-docdownstream": downstream("KleisterCharity"),
    "wtq-docdownstream": downstream("WikiTableQuestions"),
    "tabfact-docdownstream": downstream("TabFact"),
    "chartqa-docdownstream": downstream("ChartQA"),
    "chartqa-authors": {
        **{f"ChartQA-main/ChartQA Dataset/test/test_{half}.json": [{"imgname": "a.png", "query": "q", "label": "1"}]
           for half in ("human", "augmented")},
        "ChartQA-main/ChartQA Dataset/test/png/a.png": 1,
    },
    "chartqa-parquet": {
        "ChartQA/data/test-00000-of-00001-e2cd0b7a0f9eb20d.parquet":
            [{"query": "q", "label": ["1"], "human_or_machine": 0, **PICTURE}],
    },
    "textvqa-docdownstream": {
        **downstream("TextVQA", "val"),
        "DocDownstream-1.0/meta/TextVQA/TextVQA_0.5.1_val.json": {"data": [{**TEXT, "image_id": "a"}]},
    },
    "textvqa-authors": {"TextVQA_0.5.1_val.json": {"data": [{**TEXT, "image_id": "a"}]},
                        "train_val_images/train_images/a.jpg": 1},
    "textvqa-parquet": {"textvqa/data/validation-00000-of-00001.parquet": [{**TEXT, **PICTURE}]},
    "tablevqa-parquet": {
        f"TableVQA-Bench/data/{part}-00000-of-00001-c337fe9eb7a70460.parquet":
            [{"qa_id": "1", "question": "q", "gt": "1", **PICTURE}]
        for part in ("vwtq", "vwtq_syn", "vtabfact", "fintabnetqa")
    },
    **{
        f"vcr_{language}_{difficulty}-parquet": {
            f"VCR-wiki-{one}-{other}-test/data/test-00000-of-00001.parquet":
                [{"question_id": "1", "crossed_text": [f"{one}-{other}"], "stacked_image": cell(1)}]
            for one in ("en", "zh") for other in ("easy", "hard")
        }
        for language in ("en", "zh") for difficulty in ("easy", "hard")
    },
    "mmmu-parquet": {f"MMMU/{subject}/validation-00000-of-00001.parquet": mmmu(subject) for subject in SUBJECTS},
    "mmmu-parquet-one": {"MMMU/data/validation-00000-of-00001.parquet": mmmu("Art"),
                         "MMMU/data/dev-00000-of-00001.parquet": mmmu("wrong")},
    "seed-authors": {"SEED-Bench/SEED-Bench.json": {"questions": [SEED]}, "SEED-Bench/SEED-Bench-image/a.png": 1},
    "seed-parquet": {"SEED-Bench/data/test-00000-of-00001.parquet": [{**SEED, "image": [cell(1)]}]},
    "mmvet-authors": {"mm-vet/mm-vet.json": {"v1_0": {"imagename": "a.png", "question": "q"}},
                      "mm-vet/images/a.png": 1},
    "mmvet-parquet": {"MMVet/data/test-00000-of-00001.parquet": [{"question_id": "0", "question": "q", **PICTURE}]},
    "pope-authors": {
        **{f"POPE-main/output/coco/coco_pope_{part}.json": [POPE] for part in ("random", "popular", "adversarial")},
        "val2014/a.png": 1,
    },
    "pope-parquet": {"POPE/data/test-00000-of-00001.parquet": [{**POPE_ROW, "category": "random"}]},
    "pope-parquet-full": {
        f"POPE/Full/{part}-00000-of-00001.parquet": [{**POPE_ROW, "category": part}]
        for part in ("random", "popular", "adversarial")
    },
    "gqa-authors": {
        "questions1.2/testdev_balanced_questions.json": {"1": {"imageId": "a", "question": "q", "answer": "no"}},
        "images/a.jpg": 1,
    },
    "gqa-parquet": {
        "GQA/testdev_balanced_instructions/testdev-00000-of-00001.parquet":
            [{"id": "1", "imageId": "a", "question": "q", "answer": "no"}],
        "GQA/testdev_balanced_images/testdev-00000-of-00001.parquet": [{"id": "a", **PICTURE}],
    },
}  # fmt: skip


def write(folder: pathlib.Path, files: dict) -> None:
    """Writes the files of a layout."""
    for name, content in files.items():
        path = folder / name
        if isinstance(content, int):
            write_image(path, content)
        elif name.endswith(".parquet"):
            write_parquet(path, content, ("image", "image_1", "stacked_image"))
        elif isinstance(content, list) and "ChartQA Dataset" not in name:
            write_lines(path, content)
        else:
            write_json(path, content)


def read(name: str, data: pathlib.Path, **options):
    benchmark = BENCHMARKS[name.partition("-")[0]]
    return read_questions(benchmark, data, benchmark.split, **options)


@pytest.mark.parametrize("name", LAYOUTS)
def test_archives_are_found_as_they_unpack(name, tmp_path):
    write(tmp_path / "data", LAYOUTS[name])
    question_set = read(name, tmp_path / "data")
    assert not question_set.missing
    for question in question_set.questions:
        assert not question.problem and len(question.images) == 1
        assert all(image_exists(image) for image in question.images)
        assert question.text == ("" if name.startswith("vcr") else "q")
    if name.startswith("vcr"):
        assert question_set.questions[0].references == ("-".join(name.partition("-")[0].split("_")[1:]),)


def test_the_docs_list_every_layout():
    rows = re.findall(r"\| `([a-z_0-9]+-[a-z_-]+)` \|$", DOCS.read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(name for name in LAYOUTS if not name.startswith("vcr_") or "vcr_en_easy" in name)


def test_several_benchmarks_in_one_folder(tmp_path):
    """lmms-eval keeps the data sets of lmms-lab side by side; most of their files are called test-* alike."""
    names = [f"{name}-parquet" for name in ("docvqa", "chartqa", "pope", "mmvet", "textvqa")] + ["mmmu-parquet-one"]
    for name in names:
        folder = tmp_path / "lmms-lab" / "DocVQA" if name == "docvqa-parquet" else tmp_path / "lmms-lab"
        write(folder, LAYOUTS[name])
    for name in (*names, "infovqa-parquet"):
        (question,) = read(name, tmp_path / "lmms-lab").questions
        assert question.text == ("wrong" if name == "infovqa-parquet" else "q"), name
    with pytest.raises(UserError, match="no files of SEED-Bench"):
        read("seed", tmp_path / "lmms-lab")


@pytest.mark.parametrize("benchmark", ["docvqa", "infovqa"])
def test_files_of_another_benchmark_are_not_read(benchmark, tmp_path):
    other, title = {"docvqa": ("InfographicVQA", "InfoVQA"), "infovqa": ("DocVQA", "DocVQA")}[benchmark]
    write_parquet(tmp_path / other / "validation-00000-of-00001.parquet", [{**DOC, **PICTURE}])
    for data in (tmp_path, tmp_path / other):
        with pytest.raises(UserError, match="no files of"):
            read(benchmark, data)
    with pytest.raises(UserError, match=f"The folder is named after {title}"):
        read(benchmark, tmp_path / other)


def test_what_is_missing_is_named(tmp_path):
    """NielsRogge/Transformers-Tutorials#18: where is val_v1.0.json? RRC has one archive for it, and one for images."""
    write_image(tmp_path / "a" / "spdocvqa_images" / "a.png", 1)
    with pytest.raises(UserError) as error:
        read("docvqa", tmp_path / "a")
    message = str(error.value)
    assert f"Its images are there ({tmp_path}/a/spdocvqa_images), but not its questions" in message
    assert "val_v1.0_withQT.json" in message and "DIR/DocVQA/validation-*.parquet" in message and "val.jsonl" in message

    write_json(tmp_path / "b" / "spdocvqa_qas" / "val_v1.0_withQT.json", RRC)
    (tmp_path / "b" / "spdocvqa_images.tar.gz").touch()
    with pytest.raises(UserError, match="none of the 1 images.*Unpack spdocvqa_images.tar.gz.*DIR/spdocvqa_images/"):
        read("docvqa", tmp_path / "b")

    write_parquet(tmp_path / "c" / "DocVQA" / "test-00000-of-00001.parquet", [{**DOC, **PICTURE}])
    with pytest.raises(UserError, match="There are files of its split test .--split test."):
        read("docvqa", tmp_path / "c")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "infographicsvqa_qas.zip").touch()
    with pytest.raises(UserError, match="Unpack infographicsvqa_qas.zip there. It has infographicsvqa_qas.zip"):
        read("infovqa", tmp_path / "d")


def test_two_copies_of_a_benchmark(tmp_path):
    """The Hub's cache keeps a folder for each revision that was downloaded."""
    for revision in ("a" * 40, "b" * 40):
        file = tmp_path / "snapshots" / revision / "DocVQA" / "validation-00000-of-00001.parquet"
        write_parquet(file, [{**DOC, **PICTURE}])
    with pytest.raises(UserError, match="DocVQA was found in 2 folders: .*aaa/DocVQA and .*bbb/DocVQA. Give one"):
        read("docvqa", tmp_path)
    assert read("docvqa", tmp_path / "snapshots" / ("a" * 40)).questions


def test_other_names_of_splits(tmp_path):
    """open-compass/VLMEvalKit#198: MMMU's dev questions must not be part of its validation score."""
    write_parquet(tmp_path / "validation-00000-of-00001.parquet", [{**DOC, **PICTURE}])
    assert read_questions(BENCHMARKS["docvqa"], tmp_path, "validation").questions
    # MMMU has a split dev besides its validation split.
    write(tmp_path / "mmmu", {"data/dev-00000-of-00001.parquet": mmmu("Art")})
    with pytest.raises(UserError, match="no files of MMMU, split val"):
        read("mmmu", tmp_path / "mmmu")
    assert read_questions(BENCHMARKS["mmmu"], tmp_path / "mmmu", "dev").questions


@pytest.mark.parametrize("ending", ["/0000.parquet", ".parquet"])
@pytest.mark.parametrize("name", ["docvqa", "mmmu", "pope", "gqa", "tablevqa"])
def test_other_names_of_parquet_files(name, ending, tmp_path):
    """huggingface/dataset-viewer#1463: the Hub's own conversion has a folder for each configuration and split."""
    content = LAYOUTS[f"{name}-parquet-full" if name == "pope" else f"{name}-parquet"]
    for file, rows in content.items():
        write(tmp_path, {re.sub(r"-00000-of-00001[^/]*", ending, file): rows})
    assert all(question.text == "q" for question in read(name, tmp_path).questions)


def test_missing_file_of_the_hubs_conversion(tmp_path):
    """The files of refs/convert/parquet do not state their number, but a gap shows."""
    write(tmp_path, {f"validation/{number}.parquet": [{**DOC, **PICTURE}] for number in ("0000", "0002")})
    with pytest.raises(UserError, match="leave out 0001.parquet"):
        read("docvqa", tmp_path)


def test_the_folder_of_one_subject(tmp_path):
    """MMMU-Benchmark/MMMU: a score of Accounting is no score of MMMU."""
    write(tmp_path, {"Art/validation-00000-of-00001.parquet": mmmu("Art")})
    with pytest.raises(UserError, match="29 of MMMU's subjects are missing"):
        read("mmmu", tmp_path / "Art")


@pytest.mark.parametrize("answers", [None, [], [""] * 10])
def test_withheld_answers(answers, tmp_path):
    """facebookresearch/mmf#110: the test split has no answers. As empty texts, they made an empty answer right."""
    columns = {"question_id": "1", "question": "q", "answers": answers, **PICTURE}
    write(tmp_path, {"data/test-00000-of-00001.parquet": [columns]})
    (question,) = read_questions(BENCHMARKS["textvqa"], tmp_path, "test").questions
    assert question.references is None and not question.problem


def test_files_that_are_near(tmp_path):
    """open-compass/VLMEvalKit: benchmarks as TSV files. GQA's images are also published as allImages/images."""
    questions = {"testdev_balanced_questions.json": {"1": {"imageId": "a", "question": "q", "answer": "no"}}}
    write(tmp_path, {**questions, "allImages/images/A.JPG": 1})
    with pytest.raises(UserError, match="There is .*/allImages/images/A.JPG: rename"):
        read("gqa", tmp_path)
    (tmp_path / "DocVQA_VAL.tsv").touch()
    with pytest.raises(UserError, match="TSV files of VLMEvalKit are not read"):
        read("docvqa", tmp_path)


def test_messages_about_content_fit_the_command(tmp_path):
    """`alignvlm eval` has no --format."""
    (tmp_path / "val_v1.0.json").write_bytes(b"PAR1" + bytes(100))
    with pytest.raises(UserError, match="It is a Parquet file$"):
        read("docvqa", tmp_path)
