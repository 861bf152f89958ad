"""Tests of the launch scripts without a cloud: linted, validated, and run with fake `gcloud`, `docker` and `srun`.

The JobSet is validated with `jobset_schema.json`. It has the fields of JobSet v1alpha2, Job and Pod that the manifest
uses, and related ones; every other field is an error, as with `kubectl apply --validate=strict`. The schema follows
kubernetes-sigs/jobset's jobset_types.go and the API reference of Kubernetes. It does not know rules that only the
cluster checks (quota, names in use, existence of the topology in the zone).
"""

import argparse
import copy
import json
import math
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

import jsonschema
import pytest
import yaml

from alignvlm_jax import cli
from alignvlm_jax.config import load_config
from alignvlm_jax.downloads import bucket_copy
from alignvlm_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "tools" / "launch"
SCRIPTS = ["tpu_pod.sh", "tpu_worker.sh", "gpu_cluster.sbatch"]


@pytest.fixture(autouse=True)
def no_bucket(monkeypatch):
    """The buckets of the examples do not exist, and looking for them takes a minute."""

    def fail(*args):
        raise UserError("no such bucket")

    monkeypatch.setattr(bucket_copy, "local_copy", fail)


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_finds_nothing(script):
    shellcheck = pathlib.Path(sys.executable).parent / "shellcheck"
    process = subprocess.run([shellcheck, LAUNCH / script], capture_output=True, text=True)
    assert process.returncode == 0, process.stdout
    assert os.access(LAUNCH / script, os.X_OK)


class Fakes:
    """Fake commands on the PATH that record their calls and give prepared answers.

    Each call of a fake prints the next of its answers, and repeats the last one. An answer is "CODE|TEXT" with the exit
    code.
    """

    def __init__(self, folder):
        self.folder = folder
        (folder / "bin").mkdir()

    def add(self, name, *answers):
        (self.folder / f"{name}.answers").write_text("\n".join(answers or ["0|"]) + "\n")
        self.write(
            name,
            f"""#!{sys.executable}
import json, pathlib, sys
folder = pathlib.Path({str(self.folder)!r})
with open(folder / "calls", "a") as calls:
    calls.write(json.dumps([{name!r}, *sys.argv[1:]]) + "\\n")
answers = folder / "{name}.answers"
first, *rest = answers.read_text().splitlines()
if rest:
    answers.write_text("\\n".join(rest) + "\\n")
code, _, text = first.partition("|")
print(text, file=sys.stderr if int(code) else sys.stdout)
raise SystemExit(int(code))
""",
        )

    def write(self, name, text):
        path = self.folder / "bin" / name
        path.write_text(text)
        path.chmod(0o755)

    def calls(self, name=None):
        file = self.folder / "calls"
        calls = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [call for call in calls if name is None or call[0] == name]

    def environment(self, **more):
        return {**os.environ, "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", **more}


@pytest.fixture
def fakes(tmp_path):
    return Fakes(tmp_path)


# A queued resource of Cloud TPU


TRAIN = ["train", "--config", "configs/nano.py", "--workdir", "gs://mine/a b", "--config.stages.0.trainable=x,y"]
POD = {
    "--name": "eight",
    "--project": "mine",
    "--zone": "us-west4-a",
    "--accelerator-type": "v5litepod-256",
    "--image": "registry.example/images/alignvlm:1",
    "--logs": "gs://mine/logs/",
}
SHARE = "10.0.0.2:/share"


def tpu_pod(fakes, *options, command=TRAIN, **changes):
    words = [word for pair in {**POD, **changes}.items() for word in pair if pair[1] is not None]
    return subprocess.run(
        [LAUNCH / "tpu_pod.sh", *words, *options, "--", *command],
        env=fakes.environment(ALIGNVLM_POLL_SECONDS="0"),
        capture_output=True,
        text=True,
        timeout=60,
    )


GCLOUD = """#!{python}
import json, pathlib, sys
folder, arguments = pathlib.Path({folder!r}), sys.argv[1:]
entry = ["gcloud", *arguments]
for word in arguments:
    if word.startswith("startup-script="):  # Record the content of the metadata files.
        files = dict(pair.split("=", 1) for pair in word.split(","))
        entry.append({{key: pathlib.Path(file).read_text() for key, file in files.items()}})
with open(folder / "calls", "a") as calls:
    calls.write(json.dumps(entry) + "\\n")
kind = "ssh" if "ssh" in arguments else arguments[3]
answers = folder / f"{{kind}}.answers"
if answers.exists():
    first, *rest = answers.read_text().splitlines()
    answers.write_text("\\n".join(rest or [first]) + "\\n")
    code, _, text = first.partition("|")
    print(text, file=sys.stderr if int(code) else sys.stdout)
    raise SystemExit(int(code))
"""

MISSING = "1|ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: Resource was not found"


def fake_gcloud(fakes, *, describe, ssh=(), create=()):
    """Installs a fake `gcloud` with successive states of the queued resource and of the first worker."""
    fakes.write("gcloud", GCLOUD.format(python=sys.executable, folder=str(fakes.folder)))
    for name, answers in (("describe", describe), ("ssh", ssh), ("create", create)):
        if answers:
            (fakes.folder / f"{name}.answers").write_text("\n".join(answers) + "\n")


def verbs(fakes):
    """Returns the calls of gcloud that change something."""
    calls = [call[4] if "queued-resources" in call else "ssh" for call in fakes.calls("gcloud")]
    return [verb for verb in calls if verb not in ("describe", "ssh")]


def test_a_pod_is_requested_monitored_and_released(fakes):
    fake_gcloud(
        fakes,
        describe=[MISSING, "0|WAITING_FOR_RESOURCES", "0|PROVISIONING", "0|ACTIVE"],
        ssh=["255|connection refused", "0|running (attempt 1)", "0|done"],
    )
    process = tpu_pod(fakes, "--spot")
    assert process.returncode == 0, process.stderr
    assert verbs(fakes) == ["create", "delete"]
    (create,) = [call for call in fakes.calls("gcloud") if "create" in call]
    metadata = create.pop()
    expected = "compute tpus queued-resources create eight --project mine --zone us-west4-a --quiet"
    expected += " --accelerator-type v5litepod-256 --runtime-version v2-alpha-tpuv5-lite --node-id eight --spot"
    assert create[1 : 1 + len(expected.split())] == expected.split()
    assert metadata["startup-script"] == (LAUNCH / "tpu_worker.sh").read_text()
    assert metadata["alignvlm-image"] == POD["--image"] and metadata["alignvlm-logs"] == "gs://mine/logs"
    assert "alignvlm-share" not in metadata
    assert shlex.split(metadata["alignvlm-command"]) == TRAIN


def test_the_workers_of_a_pod_without_a_bucket_get_the_share(fakes):
    fake_gcloud(fakes, describe=[MISSING, "0|ACTIVE"], ssh=["0|failed: alignvlm: error: no such file"])
    process = tpu_pod(fakes, **{"--logs": None, "--share": SHARE})
    assert process.returncode == 2 and f"(log: {SHARE}, logs/eight)" in process.stdout
    (create,) = [call for call in fakes.calls("gcloud") if "create" in call]
    assert create[-1]["alignvlm-share"] == SHARE and "alignvlm-logs" not in create[-1]


def test_after_a_preemption_the_chips_are_requested_again(fakes):
    fake_gcloud(
        fakes,
        describe=[MISSING, "0|ACTIVE", "0|SUSPENDING", "0|SUSPENDED", MISSING, "0|PROVISIONING", "0|ACTIVE"],
        ssh=["0|running (attempt 1)", "0|done"],
    )
    process = tpu_pod(fakes, "--spot")
    assert process.returncode == 0, process.stderr
    assert verbs(fakes) == ["create", "delete", "create", "delete"]
    assert "requesting them again" in process.stdout


def test_several_slices_are_one_queued_resource(fakes):
    fake_gcloud(fakes, describe=[MISSING, "0|ACTIVE"], ssh=["0|done"])
    process = tpu_pod(fakes, "--keep", "--num-slices", "2", **{"--accelerator-type": "v6e-64"})
    assert process.returncode == 0, process.stderr
    (create,) = [call for call in fakes.calls("gcloud") if "create" in call]
    joined = " ".join(map(str, create))
    assert "--runtime-version v2-alpha-tpuv6e --node-count 2 --node-prefix eight" in joined and "--spot" not in joined
    (ssh,) = [call for call in fakes.calls("gcloud") if "ssh" in call]
    assert "eight-0" in ssh
    assert verbs(fakes) == ["create"] and "the chips are kept" in process.stdout


def test_a_failed_command_releases_the_chips_and_reports_its_error(fakes):
    fake_gcloud(fakes, describe=["0|ACTIVE"], ssh=["0|failed: alignvlm: error: config.sed: no such key"])
    process = tpu_pod(fakes)
    assert process.returncode == 2 and "config.sed: no such key" in process.stdout
    assert verbs(fakes) == ["delete"]


@pytest.mark.parametrize(
    ("describe", "create"), [([MISSING], ["1|ERROR: quota exceeded"]), (["0|PROVISIONING", "0|FAILED"], [])]
)
def test_a_request_that_cannot_be_served_is_not_repeated(fakes, describe, create):
    fake_gcloud(fakes, describe=describe, create=create)
    assert tpu_pod(fakes).returncode == 1
    assert verbs(fakes).count("create") <= 1 and "delete" not in verbs(fakes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--name": None}, "usage: tpu_pod.sh"),
        ({"--logs": None}, "pass --logs gs://BUCKET/PATH or --share HOST:/PATH"),
        ({"--logs": "s3://bucket/logs"}, "expected gs://BUCKET/PATH, got s3://bucket/logs"),
        ({"--share": "bucket"}, "expected HOST:/PATH of an NFS export, got bucket"),
        ({"--num-slices": "0"}, "expected a positive integer, got 0"),
        ({"--accelerator-type": "v9-16"}, "no default --runtime-version for v9-16"),
        ({"--bogus": "1"}, "unknown option --bogus"),
    ],
)
def test_a_wrong_call_requests_nothing(fakes, changes, message):
    fake_gcloud(fakes, describe=[MISSING])
    process = tpu_pod(fakes, **changes)
    assert process.returncode == 2 and message in process.stderr
    assert not fakes.calls()


# The startup script of a worker


CURL = """#!{python}
import json, sys
metadata = json.loads({metadata!r})
key = sys.argv[-1].rpartition("/alignvlm-")[2]
if key not in metadata:
    raise SystemExit(22)  # as after "404 Not Found", with --fail
print(metadata[key], end="")
"""


def tpu_worker(fakes, *, docker, **place):
    """Runs the startup script of a worker; returns its process and its last status."""
    metadata = {"image": POD["--image"], "name": "eight", "command": shlex.join(TRAIN), **place}
    fakes.write("curl", CURL.format(python=sys.executable, metadata=json.dumps(metadata)))
    for name in ("mount", "mount.nfs", "gcloud"):
        fakes.add(name)
    fakes.add("mountpoint", "1|")
    fakes.add("hostname", "0|worker-3")
    fakes.add("docker", *docker)
    environment = fakes.environment(
        ALIGNVLM_STATUS_FOLDER=str(fakes.folder / "status"),
        ALIGNVLM_SHARE_FOLDER=str(fakes.folder / "share"),
        ALIGNVLM_RETRY_SECONDS="0",
    )
    process = subprocess.run([LAUNCH / "tpu_worker.sh"], env=environment, capture_output=True, text=True, timeout=60)
    return process, (fakes.folder / "status" / "status").read_text().strip()


def docker_run(fakes):
    """Returns the options of `docker run`, and the words after the image."""
    (run,) = [call for call in fakes.calls("docker") if call[1] == "run"]
    image = run.index(POD["--image"])
    return run[2:image], run[image + 1 :]


def test_a_worker_runs_the_command_and_copies_its_log_to_the_bucket(fakes):
    process, status = tpu_worker(fakes, docker=["0|", "0|step 1"], logs="gs://mine/logs")
    assert process.returncode == 0 and status == "done", process.stderr
    assert [call[1] for call in fakes.calls("docker")] == ["pull", "run"] and not fakes.calls("mount")
    options, words = docker_run(fakes)
    assert words == TRAIN
    assert {"--privileged", "--net=host"} <= set(options) and "--volume" not in options
    # The name by which a restarted command knows that its workdir was last written by itself.
    assert options[options.index("--env") + 1] == "ALIGNVLM_JOB=queued resource eight"
    (copy,) = [call for call in fakes.calls("gcloud") if "storage" in call]
    assert copy[1:4] == ["storage", "cp", "--quiet"] and copy[-1] == "gs://mine/logs/eight/"
    log = pathlib.Path(copy[-2])
    assert re.fullmatch(r"worker-3-\d{8}-\d{6}\.log", log.name) and log.read_text() == "step 1\n"


def test_a_failing_copy_of_the_log_does_not_end_the_run(fakes):
    fakes.add("gcloud", "1|no permission")
    process, status = tpu_worker(fakes, docker=["0|", "0|step 1"], logs="gs://mine/logs")
    assert process.returncode == 0 and status == "done", process.stderr


def test_a_worker_mounts_the_share_and_keeps_its_log_there(fakes):
    process, status = tpu_worker(fakes, docker=["0|", "0|step 1"], share=SHARE)
    assert process.returncode == 0 and status == "done", process.stderr
    (mount,) = fakes.calls("mount")
    assert mount[1:3] == ["-t", "nfs"] and mount[-2:] == [SHARE, str(fakes.folder / "share")]
    options, words = docker_run(fakes)
    assert words == TRAIN and options[options.index("--volume") + 1] == f"{fakes.folder / 'share'}:/share"
    assert (fakes.folder / "share" / "logs" / "eight" / "worker-3.log").read_text() == "step 1\n"
    assert not [call for call in fakes.calls("gcloud") if "storage" in call]


def test_a_worker_without_a_place_for_its_logs_runs_nothing(fakes):
    process, status = tpu_worker(fakes, docker=["0|"])
    assert process.returncode == 1 and status == "failed: the metadata names no place for the logs"
    assert not fakes.calls("docker")


@pytest.mark.parametrize("answer", ["1|a host is gone", "75|another run is writing to it"])
def test_a_worker_whose_peers_died_or_that_has_to_wait_runs_the_command_again(fakes, answer):
    _, status = tpu_worker(fakes, docker=["0|", answer, "0|", "0|step 2"], share=SHARE)
    assert status == "done"
    assert [call[1] for call in fakes.calls("docker")] == ["pull", "run", "rm", "run"]


def test_a_command_with_a_user_error_is_not_run_again(fakes):
    _, status = tpu_worker(fakes, docker=["0|", "2|alignvlm: error: no such file"], logs="gs://mine/logs")
    assert status == "failed: alignvlm: error: no such file"
    assert [call[1] for call in fakes.calls("docker")] == ["pull", "run"]


# GKE


@pytest.fixture(scope="module", params=["bucket", "share"])
def manifests(request):
    text = (LAUNCH / "jobset.yaml").read_text()
    return list(yaml.safe_load_all(text.replace("#SHARE ", "") if request.param == "share" else text))


@pytest.fixture(scope="module")
def validator():
    schema = json.loads((pathlib.Path(__file__).parent / "jobset_schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def job_of(jobset):
    (job,) = jobset["spec"]["replicatedJobs"]
    return job["template"]["spec"]


def test_the_jobset_is_valid(manifests, validator):
    validator.validate(manifests[-1])


def misspelled_field(jobset):
    jobset["spec"]["replicatedJob"] = jobset["spec"].pop("replicatedJobs")


def misplaced_field(jobset):
    job_of(jobset)["nodeSelector"] = job_of(jobset)["template"]["spec"].pop("nodeSelector")


def number_as_text(jobset):
    job_of(jobset)["parallelism"] = "64"


def rule_without_name(jobset):
    del jobset["spec"]["failurePolicy"]["rules"][0]["name"]


def always_restarted(jobset):
    job_of(jobset)["template"]["spec"]["restartPolicy"] = "Always"


def number_in_a_label(jobset):
    jobset["metadata"]["annotations"]["a"] = 1


@pytest.mark.parametrize(
    "change",
    [misspelled_field, misplaced_field, number_as_text, rule_without_name, always_restarted, number_in_a_label],
)
def test_the_schema_refuses_what_kubernetes_refuses(manifests, validator, change):
    jobset = copy.deepcopy(manifests[-1])
    change(jobset)
    assert not validator.is_valid(jobset)


def test_the_jobset_fills_its_slices(manifests):
    *claims, jobset = manifests
    job = job_of(jobset)
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    chips = math.prod(map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
    assert job["parallelism"] == job["completions"] == chips // container["resources"]["limits"]["google.com/tpu"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == "tpu-v5-lite-podslice"
    # A pod failure policy requires pods that Kubernetes does not restart. Its rule names the only container.
    assert pod["restartPolicy"] == "Never" and job["backoffLimit"] == 0
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
    # Variables are expanded in their order. JobSet gives its pods labels with its name and the number of restarts.
    names = [variable["name"] for variable in container["env"]]
    job_name = container["env"][names.index("ALIGNVLM_JOB")]["value"]
    assert set(re.findall(r"\$\((\w+)\)", job_name)) <= set(names[: names.index("ALIGNVLM_JOB")])
    paths = [variable["valueFrom"]["fieldRef"]["fieldPath"] for variable in container["env"] if "valueFrom" in variable]
    label = "metadata.labels['jobset.sigs.k8s.io/{}']".format
    assert paths == ["metadata.namespace", label("jobset-name"), label("restart-attempt")]
    assert [volumes["share"]["persistentVolumeClaim"]["claimName"] for _ in claims] == [
        claim["metadata"]["name"] for claim in claims
    ]
    assert [(claim["kind"], claim["spec"]["accessModes"]) for claim in claims] == [
        ("PersistentVolumeClaim", ["ReadWriteMany"]) for _ in claims
    ]


def test_the_command_of_the_jobset_is_valid(manifests):
    (container,) = job_of(manifests[-1])["template"]["spec"]["containers"]
    assert_trains(container["args"])


def assert_trains(words):
    """Asserts that alignvlm accepts these arguments, and the config their values."""
    arguments = cli.parse(words)
    assert arguments.command == "train"
    load_config(ROOT / arguments.config, arguments.overrides)


# Slurm


def sbatch_options():
    """Returns the options in the #SBATCH lines, up to the first command as for sbatch; unknown options are errors."""
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    for name in ("--job-name", "--time", "--output", "--signal", "--open-mode", "--mem"):
        parser.add_argument(name)
    for name in ("--nodes", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task"):
        parser.add_argument(name, type=int)
    for name in ("--exclusive", "--requeue"):
        parser.add_argument(name, action="store_true")
    words = []
    for line in (LAUNCH / "gpu_cluster.sbatch").read_text().splitlines():
        if line.startswith("#SBATCH "):
            words += shlex.split(line.removeprefix("#SBATCH "))
        elif line and not line.startswith("#"):
            break
    return parser.parse_args(words)


def test_sbatch_options_give_each_gpu_its_own_task():
    options = sbatch_options()
    assert options.nodes > 1 and options.ntasks_per_node == options.gpus_per_node == 8
    assert options.requeue and options.exclusive and options.open_mode == "append"
    assert re.fullmatch(r"\d+:\d\d:\d\d", options.time)
    # Only the script gets the signal, two minutes before the time limit.
    assert options.signal == "B:TERM@120"
    text = (LAUNCH / "gpu_cluster.sbatch").read_text()
    assert text.count("\n#SBATCH ") == sum(line.startswith("#SBATCH") for line in text.splitlines())


@pytest.fixture
def slurm(fakes):
    (fakes.folder / ".venv" / "bin").mkdir(parents=True)
    (fakes.folder / ".venv" / "bin" / "activate").write_text("export ACTIVATED=1\n")
    fakes.add("scontrol")
    return fakes.environment(SLURM_JOB_ID="77", SLURM_SUBMIT_DIR=str(fakes.folder))


@pytest.mark.parametrize("code", [0, 2])
def test_the_job_runs_the_command_in_every_task(fakes, slurm, code):
    fakes.add("srun", f"{code}|")
    process = subprocess.run([LAUNCH / "gpu_cluster.sbatch", *TRAIN], env=slurm, timeout=60)
    assert process.returncode == code
    (srun,) = fakes.calls("srun")
    assert srun[srun.index("alignvlm") + 1 :] == TRAIN
    assert not fakes.calls("scontrol")


def requeues(fakes):
    return [call for call in fakes.calls("scontrol") if call[1] == "requeue"]


def test_a_job_whose_folder_is_in_use_is_requeued(fakes, slurm):
    fakes.add("srun", "75|")
    process = subprocess.run([LAUNCH / "gpu_cluster.sbatch", *TRAIN], env=slurm, timeout=60)
    assert process.returncode == 0
    assert requeues(fakes) == [["scontrol", "requeue", "77"]]


def test_a_job_whose_tasks_were_cancelled_is_not_requeued(fakes, slurm):
    """`scancel` may signal only the tasks, which end with 75 (SchedMD, scancel.html: not sent to the batch step)."""
    fakes.add("srun", "75|")
    fakes.add("scontrol", "0|JobId=77 JobName=alignvlm JobState=CANCELLED Reason=None")
    process = subprocess.run([LAUNCH / "gpu_cluster.sbatch", *TRAIN], env=slurm, timeout=60)
    assert process.returncode == 75
    assert not requeues(fakes)


@pytest.mark.parametrize("state, is_requeued", [("RUNNING", True), ("COMPLETING", False), ("CANCELLED", False)])
def test_after_a_signal_the_run_is_saved_and_requeued_unless_it_was_cancelled(fakes, slurm, state, is_requeued):
    """A job that its user cancels must not come back: Lightning-AI/pytorch-lightning#20542, BSC-ES/autosubmit#2806."""
    saved, started = fakes.folder / "saved", fakes.folder / "started"
    fakes.add("scontrol", f"0|JobId=77 JobName=alignvlm JobState={state} Reason=None")
    fakes.write(
        "srun",
        f"#!/usr/bin/env bash\ntrap 'sleep 0.5; touch {saved}; exit 75' TERM\ntouch {started}\nsleep 30 &\nwait\n",
    )
    job = subprocess.Popen([LAUNCH / "gpu_cluster.sbatch", *TRAIN], env=slurm)
    deadline = time.monotonic() + 30
    while not started.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=30) == (0 if is_requeued else 75)
    assert saved.exists(), "the job waits until the tasks have saved"
    assert requeues(fakes) == [["scontrol", "requeue", "77"]] * is_requeued


# The documentation


def commands_in(text):
    """Returns the command lines in the fenced blocks of a page, with continued lines joined."""
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```", text, flags=re.MULTILINE | re.DOTALL)
    return [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


# The options of xpk 1.16.0 that the page uses.
XPK_OPTIONS = {
    "cluster create": {"cluster", "project", "zone", "tpu-type", "num-slices", "spot"},
    "workload create": {
        *("workload", "cluster", "project", "zone", "tpu-type", "num-slices", "docker-image", "max-restarts"),
        *("restart-on-exit-codes", "termination-grace-period-seconds", "env", "command"),
    },
}


def test_the_commands_in_the_documentation_are_valid(manifests):
    page = (ROOT / "docs" / "launch.md").read_text()
    commands = commands_in(page)
    train_arguments = [
        command.partition(" train ")[2] for command in commands if " train " in command and "xpk" not in command
    ]
    assert len(train_arguments) == 5
    for arguments in train_arguments:
        assert_trains(["train", *shlex.split(arguments)])
    for path in re.findall(r"(?:tools|configs|docs|tests|alignvlm_jax)/[\w/.]+\w", page):
        assert (ROOT / path).exists(), path
    pods = [command for command in commands if "tpu_pod.sh" in command]
    assert len(pods) == 2
    usage = subprocess.run([LAUNCH / "tpu_pod.sh", "--help"], capture_output=True, text=True).stderr
    for option in re.findall(r" (--[a-z-]+)", " ".join(pod.partition(" -- ")[0] for pod in pods)):
        assert option in usage
    xpk = [shlex.split(command) for command in commands if command.startswith("xpk ")]
    for words, (verb, options) in zip(xpk, XPK_OPTIONS.items(), strict=True):
        assert words[:3] == ["xpk", *verb.split()]
        assert {word[2:] for word in words if word.startswith("--")} == options
    # The run that xpk starts is the one of the JobSet.
    assert xpk[1][xpk[1].index("--restart-on-exit-codes") + 1] == "1,4,75"
    words = shlex.split(xpk[1][xpk[1].index("--command") + 1])
    assert words[:2] == ["exec", "alignvlm"]
    assert_trains(words[2:])
    (container,) = job_of(manifests[-1])["template"]["spec"]["containers"]
    assert " ".join(words[2:]) == " ".join(container["args"]).replace("--config=", "--config ").replace(
        "--workdir=", "--workdir "
    )
