"""The cluster files run the whole way: under a real HTCondor, and with stand-ins for sbatch and qsub."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from marten.files import ROOT

STEPS = ["sample", "check", "train", "split", "profile", "aggregate", "normalize", "evaluate"]


@pytest.fixture
def project(tiny):
    params = {"conv_blocks": 2, "feature_dim": 16, "learning_rate": 0.01, "batch_size": 8}
    tiny.config(**{"train.model.params": params, "train.model.epochs": 2, "profile.checkpoint": "none_such.hdf5"})
    return tiny


def finished(tiny) -> dict:
    assert len(list((tiny.root / "outputs/results/features").rglob("*.npz"))) == 12
    assert (tiny.root / "outputs/results/evaluation/report.html").is_file()
    return json.loads((tiny.root / "outputs/results/evaluation/metrics.json").read_text())


def test_the_dag_has_every_step_once_and_in_order():
    text = (ROOT / "deployment/htcondor/cells.dag").read_text()
    assert re.findall(r"^JOB +(\w+)", text, re.MULTILINE) == STEPS
    edges = re.findall(r"^PARENT (.+?) +CHILD (.+)$", text, re.MULTILINE)
    before = {child: set() for child in STEPS}
    for parents, children in edges:
        for child in children.split():
            before[child] |= set(parents.split())
    assert before == {
        "sample": set(),
        "check": {"sample"},
        "train": {"check"},
        "split": {"check"},
        "profile": {"train", "split"},
        "aggregate": {"profile"},
        "normalize": {"aggregate"},
        "evaluate": {"normalize"},
    }
    parts = re.search(r'split --parts (\d+)"', text)[1]
    assert f'parts="{parts}"' in text


def test_every_step_of_the_files_is_a_command_that_parses():
    text = (ROOT / "deployment/htcondor/cells.dag").read_text()
    steps = re.findall(r'step="([^"]+)"', text)
    assert len(steps) == len(STEPS) + 1
    for step in steps:
        words = [word.replace("$(Process)", "0") for word in step.split()]
        told = subprocess.run(
            [sys.executable, ROOT / "scripts/cells", *words, "--help"], capture_output=True, check=False
        )
        assert told.returncode == 0, words


def test_a_step_says_what_it_lacks():
    told = subprocess.run(
        [ROOT / "deployment/cells-step.sh", "check"],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": os.environ["PATH"]},
    )
    assert told.returncode != 0
    assert "MARTEN_HOME: is not set" in told.stderr


STAND_IN = r"""#!/usr/bin/env bash
# runs a submitted script at once, once per element of its array; refuses to start before what it waits for
set -euo pipefail
state={state}
count=$(cat "$state/count" 2>/dev/null || echo 100)
echo $((count + 1)) > "$state/count"
first=0 last=0 array=
previous=
for word in "$@"; do
    case $word in
        --array=*) array=${{word#--array=}} ;;
        --dependency=afterok:* | depend=afterok:*)
            for job in $(echo "${{word#*afterok:}}" | tr : ' '); do [[ -e $state/done-$job ]] || exit 9; done ;;
    esac
    [[ $previous != -J ]] || array=$word
    previous=$word
done
[[ -z $array ]] || {{ first=${{array%-*}} last=${{array#*-}}; }}
script=$(cat)
for index in $(seq "$first" "$last"); do
    SLURM_ARRAY_TASK_ID=$index PBS_ARRAY_INDEX=$index bash -c "$script" >> "$state/log" 2>&1
done
touch "$state/done-$count"
echo "$count"
"""


@pytest.mark.parametrize(("script", "submit"), [("slurm/cells.sh", "sbatch"), ("pbs/cells.sh", "qsub")])
def test_jobs_are_submitted_in_order_and_do_it_all(project, tmp_path, script, submit):
    state = tmp_path / "state"
    state.mkdir()
    stand_in = state / submit
    stand_in.write_text(STAND_IN.format(state=state))
    stand_in.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{state}:{os.environ['PATH']}",
        "MARTEN_HOME": str(ROOT),
        "CELLS_ROOT": str(project.root),
        "MARTEN_PYTHON": sys.executable,
        "CELLS_GPU": "",
    }
    told = subprocess.run(
        [ROOT / "deployment" / script, "3"], env=environment, capture_output=True, text=True, check=False, cwd=tmp_path
    )
    log = (state / "log").read_text()
    assert told.returncode == 0, told.stderr + log
    assert finished(project)["profiles"] == 6
    assert [line.split()[2] for line in log.splitlines() if re.match(r"\S+: cells ", line)] == [
        *STEPS[:4],
        *["profile"] * 3,
        *STEPS[5:],
    ]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("condor_submit_dag") is None, reason="there is no HTCondor on PATH")
def test_htcondors_dagman_runs_it_all_and_training_returns_to_the_queue(project, tmp_path):
    project.config(**{"train.model.epochs": 200, "profile.checkpoint": "best"})
    run = tmp_path / "run"
    shutil.copytree(ROOT / "deployment/htcondor", run)
    text = (run / "cells.sub").read_text()
    for name, value in (("marten_home", ROOT), ("cells_root", project.root), ("cells_python", sys.executable)):
        text = re.sub(rf"^{name} .*$", f"{name} = {value}", text, flags=re.MULTILINE)
    (run / "cells.sub").write_text(text.replace("8GB", "1GB"))
    dag = (run / "cells.dag").read_text()
    dag = re.sub(r'processors="\d"', 'processors="1"', dag).replace(' gpus="1"', "").replace("4h", "4s")
    (run / "cells.dag").write_text(dag)
    if os.geteuid() == 0:  # HTCondor refuses root's jobs
        subprocess.run(["chown", "-R", "tester", tmp_path], check=True)
        for folder in (tmp_path, *tmp_path.parents):
            if folder.stat().st_mode & 0o077 == 0:  # pytest's own, closed to others
                folder.chmod(0o711)
    submitted = subprocess.run(["condor_submit_dag", "cells.dag"], cwd=run, check=False, capture_output=True, text=True)
    assert submitted.returncode == 0, submitted.stderr + submitted.stdout
    deadline = time.monotonic() + 300
    told = ""
    while "EXITING WITH STATUS" not in told and time.monotonic() < deadline:
        time.sleep(2)
        told = (run / "cells.dag.dagman.out").read_text() if (run / "cells.dag.dagman.out").exists() else ""
    assert "EXITING WITH STATUS 0" in told, "".join(Path(p).read_text() for p in sorted(run.glob("*.err")))
    assert finished(project)["profiles"] == 6
    starts = len(re.findall(r"^001 ", (run / "cells.log").read_text(), re.MULTILINE))
    assert starts > len(STEPS) - 1 + 4, "the training was not stopped and started again"
    assert "Resuming from" in (run / "cells-train-0.out").read_text()
