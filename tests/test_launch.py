"""The launchers of launch/, as far as they can be tried without a cloud."""

import os
import runpy
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from helpers.places import ROOT

LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
JOB = """
trap 'echo "stopped $JAX_PROCESS_ID"; exit 130' INT
echo "started $JAX_PROCESS_ID of $JAX_NUM_PROCESSES at $JAX_COORDINATOR_ADDRESS with <$1>"
for _ in $(seq "$2"); do sleep 0.05; done
exit $((JAX_PROCESS_ID * 3))
"""


def stub(folder: Path, name: str, body: str) -> None:
    """A program that writes down how it was called."""
    file = folder / name
    file.write_text(
        f'#!/usr/bin/env bash\nprintf "%s" {name} >> {folder}/calls\nprintf " <%s>" "$@" >> {folder}/calls\n'
    )
    with file.open("a") as f:
        f.write(f"echo >> {folder}/calls\n{body}\n")
    file.chmod(0o755)


def run(folder: Path, script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", **variables}
    return subprocess.run(
        ["bash", str(LAUNCH / script), *arguments], env=env, cwd=folder, capture_output=True, text=True, timeout=60
    )


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_valid(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert script.read_text().startswith("#!/usr/bin/env bash\n")


# ssh.sh


def ssh(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    (folder / "hosts").write_text("# the two hosts\nuser@first\n\nsecond\n")
    (folder / "job.sh").write_text(JOB)
    env = {**os.environ, "SSH": f"bash {ROOT / 'tests' / 'helpers' / 'local_ssh.sh'}", "PORT": "4321"}
    # what starts the tests may ignore Ctrl-C, which a shell cannot take back
    command = ["env", "--default-signal=INT", "bash", str(LAUNCH / "ssh.sh"), "hosts", "bash", "job.sh", *arguments]
    return subprocess.Popen(command, env=env, cwd=folder, stdout=subprocess.PIPE, text=True)


needs_script = pytest.mark.skipif(shutil.which("script") is None, reason="needs script, of util-linux")


@needs_script
def test_ssh_starts_the_command_on_every_host(tmp_path):
    with ssh(tmp_path, "two 'words'", "1") as process:
        output, _ = process.communicate(timeout=60)
    for i in range(2):
        assert f"started {i} of 2 at first:4321 with <two 'words'>" in output
    assert process.returncode == 3  # of the second


@needs_script
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_ssh_waits_until_all_hosts_have_ended(tmp_path, number):
    with ssh(tmp_path, "", "1200") as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(2)]
        assert all(line.startswith("started") for line in lines)
        time.sleep(0.5)
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    assert "stopped 0" in output
    assert "stopped 1" in output
    assert process.returncode == 130


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give a file with one host a line, and a command"),
        (("hosts",), "give a file with one host a line, and a command"),
        (("nothing", "true"), "nothing cannot be read"),
        (("empty", "true"), "names no host"),
    ],
)
def test_ssh_refuses(tmp_path, arguments, message):
    (tmp_path / "empty").write_text("# none\n")
    result = run(tmp_path, "ssh.sh", *arguments)
    assert result.returncode == 2
    assert message in result.stderr


# Clouds


def test_slurm_queues_a_stopped_run_again(tmp_path):
    stub(tmp_path, "srun", "exit ${STATUS}")
    stub(tmp_path, "scontrol", "")
    for status, again in [("130", True), ("0", False), ("2", False)]:
        (tmp_path / "calls").unlink(missing_ok=True)
        result = run(tmp_path, "slurm.sbatch", "--config=stage3", STATUS=status, SLURM_JOB_ID="17", VIRST_ENV="")
        assert result.returncode == int(status)
        first, *rest = calls(tmp_path)
        assert first.endswith("<virst> <train> <--config.distributed=True> <--config=stage3>")
        assert rest == (["scontrol <requeue> <17>"] if again else [])


def test_queued_resources(tmp_path):
    stub(tmp_path, "gcloud", "echo ACTIVE")
    slice_ = {"NAME": "mine", "ZONE": "here", "TPU": "v5litepod-16", "RUNTIME": "some"}
    for arguments in (
        ("create", "--spot"),
        ("wait",),
        ("install", "a.whl"),
        ("train", "--config=a b"),
        ("stop",),
        ("delete",),
    ):
        result = run(tmp_path, "queued_resource.sh", *arguments, **slice_)
        assert result.returncode == 0, result.stderr
    create, wait, copy, install, train, stop, delete = calls(tmp_path)
    assert create.endswith("<--accelerator-type> <v5litepod-16> <--runtime-version> <some> <--spot>")
    assert "<describe> <mine>" in wait
    assert "<scp> <a.whl> <mine:>" in copy
    assert "a.whl[all,buckets,tpu]" in install
    assert "virst train --config.distributed=True --config=a\\ b" in train
    assert "pkill -TERM" in stop
    assert "<delete> <mine>" in delete
    assert run(tmp_path, "queued_resource.sh", "other", **slice_).returncode == 2
    missing = run(tmp_path, "queued_resource.sh", "wait", NAME="mine")
    assert missing.returncode != 0
    assert "ZONE" in missing.stderr


def test_xpk(tmp_path):
    stub(tmp_path, "xpk", "")
    cluster = {"CLUSTER": "c", "TPU": "v5litepod-16", "IMAGE": "i", "ZONE": "here"}
    result = run(tmp_path, "xpk.sh", "run", "--config=stage3", "--workdir=/shared/a b", **cluster)
    assert result.returncode == 0, result.stderr
    (call,) = calls(tmp_path)
    assert "<--workload> <run> <--cluster> <c> <--tpu-type> <v5litepod-16>" in call
    assert "<--zone> <here>" in call
    assert "<virst train --config.distributed=True --config=stage3 --workdir=/shared/a\\ b>" in call
    missing = run(tmp_path, "xpk.sh", "run", "--config=stage3", CLUSTER="c")
    assert missing.returncode == 2
    assert "TPU is not set" in missing.stderr


def test_jobset():
    (job,) = yaml.safe_load_all((LAUNCH / "gke_jobset.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = job["spec"]["replicatedJobs"]
    template = replicated["template"]["spec"]
    assert template["parallelism"] == template["completions"]
    pod = template["template"]["spec"]
    (container,) = pod["containers"]
    # a policy by exit status is refused for pods that restart by themselves
    assert pod["restartPolicy"] == "Never"
    (rule,) = template["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2]}
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    limits = container["resources"]["limits"]
    assert limits == container["resources"]["requests"]
    assert rows * columns == template["completions"] * limits["google.com/tpu"]
    assert container["args"][0] == "train"
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_skypilot(tmp_path):
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert task["num_nodes"] > 1
    home = tmp_path / "virst" / "bin"
    home.mkdir(parents=True)
    stub(home, "virst", 'echo "$JAX_COORDINATOR_ADDRESS $JAX_NUM_PROCESSES $JAX_PROCESS_ID" >> "$(dirname "$0")/calls"')
    nodes = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    env = {**os.environ, **task["envs"], **nodes, "HOME": str(tmp_path)}
    subprocess.run(["bash", "-c", task["run"]], env=env, check=True)
    call, variables = calls(home)
    assert call == "virst <train> <--config=stage3> <--workdir=/shared/runs/stage3> <--config.distributed=True>"
    assert variables == "10.0.0.1:1234 2 1"


def test_ray(monkeypatch):
    module = runpy.run_path(str(LAUNCH / "ray_train.py"))
    given = ["--topology", "4x4", "--accelerator", "TPU-V5E", "--workers", "4", "--", "--config=stage3", "--workdir=a"]
    assert module["options"](given).arguments == ["--config=stage3", "--workdir=a"]
    with pytest.raises(RuntimeError, match="status 2"):
        module["work"]({"arguments": ["--config=nothing"]})
