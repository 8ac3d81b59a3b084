"""What is read out of TorchServe's logs, from lines that 0.12.0 wrote."""

from __future__ import annotations

from pathlib import Path

import pytest

from marten.serverlog import last_words, load_failure, start_failure

MODELS = {"vgg": "vgg.mar", "my_cnn": "base_cnn.mar"}
DIED = (
    "2024-05-06T07:08:09,313 [WARN ] W-9001-{}_1.0 org.pytorch.serve.wlm.BatchAggregator - "
    "Load model failed: {}, error: Worker died.\n"
)


def worker(model: str, *said: str) -> str:
    return "".join(f"2024-05-06T07:08:09,301 [INFO ] W-9001-{model}_1.0-stdout MODEL_LOG - {text}\n" for text in said)


def write(logs: Path, ts_log: str = "", model_log: str = "", server_log: str = "") -> Path:
    for name, text in (("ts_log", ts_log), ("model_log", model_log), ("server", server_log)):
        (logs / f"{name}.log").write_text(text)
    return logs


def test_nothing_failed_while_all_is_well(tmp_path: Path) -> None:
    assert load_failure(tmp_path, MODELS) is None
    grumble = worker("vgg", "Traceback (most recent call last):", '  File "h.py", line 1', "ValueError: a bad picture")
    assert load_failure(write(tmp_path, model_log=grumble), MODELS) is None


def test_the_worker_s_exception_is_told_with_its_indented_lines(tmp_path: Path) -> None:
    said = worker(
        "my_cnn",
        "Backend worker process died.",
        "Traceback (most recent call last):",
        '  File "handler.py", line 5, in initialize',
        "RuntimeError: Error(s) in loading state_dict for BaseCNN:",
        '\tMissing key(s) in state_dict: "fc.weight".',
        "model_name: my_cnn, batchSize: 1",
    )
    logs = write(tmp_path, DIED.format("my_cnn", "my_cnn"), said + worker("vgg", "Torch worker started."))
    told = 'RuntimeError: Error(s) in loading state_dict for BaseCNN: Missing key(s) in state_dict: "fc.weight".'
    assert load_failure(logs, MODELS) == f"my_cnn: {told}"
    assert last_words(logs, "vgg") is None


@pytest.mark.parametrize(
    ("module", "package"), [("captum", "captum"), ("yaml", "pyyaml"), ("skimage.io", "scikit-image")]
)
def test_a_missing_package_is_told_and_not_the_search_after_it(tmp_path: Path, module: str, package: str) -> None:
    said = worker(
        "vgg",
        "Traceback (most recent call last):",
        '  File "image_classifier.py", line 1, in <module>',
        f"ModuleNotFoundError: No module named '{module}'",
        "During handling of the above exception, another exception occurred:",
        "Traceback (most recent call last):",
        '  File "model_loader.py", line 159, in _load_default_handler',
        "ModuleNotFoundError: No module named 'ts.torch_handler.image_classifier'",
    )
    told = load_failure(write(tmp_path, DIED.format("vgg", "vgg"), said), MODELS)
    assert told is not None
    assert told.startswith(f"vgg: ModuleNotFoundError: No module named '{module}'")
    assert f"the Python package {package} is missing here; pip install" in told


def test_a_worker_killed_without_a_word(tmp_path: Path) -> None:
    assert load_failure(write(tmp_path, DIED.format("vgg", "vgg")), MODELS) == "vgg: Worker died."


def test_an_archive_that_java_cannot_read(tmp_path: Path) -> None:
    line = "2024-05-06T07:08:09,505 [WARN ] main org.pytorch.serve.ModelServer - Failed to load model: base_cnn.mar\n"
    logs = write(tmp_path, line + "java.util.zip.ZipException: unexpected EOF\n\tat java.util.zip...\n")
    assert load_failure(logs, MODELS) == (
        "my_cnn: TorchServe cannot read base_cnn.mar: java.util.zip.ZipException: unexpected EOF"
    )


@pytest.mark.parametrize(
    ("printed", "told"),
    [
        ("Unrecognized VM option 'Foo'\nError: Could not create", "Unrecognized VM option 'Foo'"),
        ("Invalid configuration: bad port\n", "Invalid configuration: bad port"),
        ("java not found, please make sure JAVA_HOME is set properly.\n", "java not found, please make sure"),
        (
            "Warning: -XX:+ExitOnOutOfMemoryError\njava.lang.OutOfMemoryError: Java heap space\n",
            "java.lang.OutOfMemory",
        ),
        ("something\n  else\n", "something"),
    ],
)
def test_why_java_did_not_come_up(tmp_path: Path, printed: str, told: str) -> None:
    assert (start_failure(write(tmp_path, server_log=printed)) or "").startswith(told)


def test_silence_is_no_reason(tmp_path: Path) -> None:
    assert start_failure(tmp_path) is None
