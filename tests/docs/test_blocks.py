"""Every block of code in the documents runs, or is at least read by what would run it.

Python runs as it stands, in the order of the document. YAML is a run file, a task's file or a
section of one. JSON is read. Of console blocks, `loraloom` runs where it is quick, and else its
options are read; scripts must exist and know their options.
"""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser

from loraloom.cli import main as cli
from loraloom.config.fields import checked
from loraloom.config.model import BaseModelConfig
from loraloom.config.task import load_task_config
from loraloom.config.text import parse_yaml
from loraloom.eval.generated_answers import AnswerTaskConfig
from loraloom.generation.loading import load_host
from loraloom.serve.http.app import ApiOptions
from loraloom.training.settings import JobConfig, RunConfig, load_run_config
from tests.serve.http.in_process import serving

ROOT = Path(__file__).parent.parent.parent
DOCUMENTS = sorted(
    path.relative_to(ROOT)
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/*.md", "recipes/**/*.md")
    for path in ROOT.glob(pattern)
    if path.name != "CHANGELOG.md"
)
RUN = {*"init train eval report generate inspect config data export convert".split()}
"""Verbs that run in README.md and docs/; `quickstart` takes long."""
SERVER = "http://127.0.0.1:8000"
"""Where documents have a server."""
LAUNCHERS = {"torchrun", "accelerate"}
"""Programs that start `python -m loraloom` in several processes; here it runs in this one."""
NOT_OURS = {*"git cd for sed done vllm sudo openssl ln mv cat".split()}
"""Programs whose options are not checked."""
SETS_VARIABLE = re.compile(r"[A-Z_]+=")
"""A word before a command that sets a variable for it."""
ENDLESS = {"--watch": ["--watch-exit-when-idle"]}
"""Options that wait for ever, and what ends it."""


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator")
@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_blocks_run(document, world, monkeypatch):
    if document.parts[0] in ("benchmarks", "recipes"):
        monkeypatch.setattr("tests.docs.test_blocks.RUN", set())
    monkeypatch.setattr("lm_eval.evaluator.TaskManager", without_defaults)
    with served_copy(ROOT / document, world) as copy:
        for block in SYBIL.parse(copy).examples():
            try:
                block.evaluate()
            except Exception as error:
                raise AssertionError(f"{document}:{block.line}: {error}") from error


def without_defaults(**options: Any) -> Any:
    """lm-eval without its own tasks, which are thousands of files."""
    from lm_eval.tasks import TaskManager

    return TaskManager(**options, include_defaults=False)


@contextmanager
def served_copy(document: Path, world: Path) -> Iterator[Path]:
    """A document whose clients ask a server of this process, where it has any."""
    text = document.read_text()
    if SERVER not in text:
        yield document
        return
    host, tokenizer = load_host(
        BaseModelConfig(base_model="smollm2-135m", dtype="float32", device="cpu"), {}
    )
    served = re.search(r"--adapter-dir (\S+)", text)
    directory = world / (served[1] if served else "runs")
    loads = ApiOptions(allow_loading=True, adapter_root=world / "runs")
    with serving(host, tokenizer, directory, loads, "smollm2-135m") as (address, _):
        copy = world / document.name
        copy.write_text(text.replace(SERVER, address))
        yield copy


def test_documents_have_no_blocks_in_other_languages():
    known = {"python", "yaml", "json", "sh", "text"}
    for document in DOCUMENTS:
        fences = re.findall(r"^```(\S*)$", (ROOT / document).read_text(), re.MULTILINE)
        assert set(fences[::2]) <= known, document


def check_yaml(block: Example) -> None:
    """Read settings; those that begin with `# name.yaml` are written there for later commands,
    which train for a few steps."""
    named = re.match(r"# (\S+\.yaml)\n", block.parsed)
    path = Path(named[1] if named else "block.yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(re.sub(r"max_steps: \d{3,}", "max_steps: 2", block.parsed))
    settings = parse_yaml(block.parsed, str(path))
    if isinstance(settings, dict) and "choices" in settings:
        load_task_config(path)
    elif isinstance(settings, dict) and {"metric", "scores"} & settings.keys():
        checked(AnswerTaskConfig, settings)
    elif isinstance(settings, dict) and "dataset_path" in settings:
        return  # a task of lm-eval
    elif isinstance(settings, dict) and "base_model" in settings:
        load_run_config(path)
    else:
        RunConfig.model_validate(completed(settings))


def completed(section: dict[str, Any]) -> dict[str, Any]:
    """Make a run file around a section of one: settings of the run, of a job, or several jobs."""
    of_job = {key: value for key, value in section.items() if key in JobConfig.model_fields}
    of_run = {key: value for key, value in section.items() if key not in of_job}
    jobs = [completed_job(place, job) for place, job in enumerate(of_run.pop("jobs", [of_job]))]
    return {"base_model": "smollm2-135m", "output_dir": "runs/block", **of_run, "jobs": jobs}


def completed_job(place: int, section: dict[str, Any]) -> dict[str, Any]:
    """Make a job of the settings that a section of one has."""
    train = {"learning_rate": 1e-4, **section.get("train", {})}
    if not {"num_epochs", "max_steps"} & set(train):
        train["max_steps"] = 10
    data = {"dataset": "rows.jsonl", "format": "instruction"}
    names = {"name": f"job-{place}", "adapter": {"method": "lora"}, "data": data}
    return {**names, **section, "train": train}


def check_json(block: Example) -> None:
    """Read one value, or one a line."""
    try:
        json.loads(block.parsed)
    except json.JSONDecodeError:
        for line in block.parsed.splitlines():
            json.loads(line)


def run_commands(block: Example) -> None:
    """Run or check the commands of a console block."""
    for words in commands(block.parsed):
        program, *arguments = words
        if program == "loraloom":
            run_verb(arguments)
        elif program in LAUNCHERS:
            run_verb(arguments[arguments.index("loraloom") + 1 :])
        elif Path(program).name in ("python", "python3"):
            check_script(arguments)
        elif Path(program).name == "pip":
            check_extras(arguments)
        elif program == "curl":
            subprocess.run([*words, "--silent", "--show-error", "--fail"], check=True)
        elif "/" in program:
            assert os.access(ROOT / program, os.X_OK), f"{program} must be a script"
        else:
            assert program in NOT_OURS, f"{program} is not known"


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a console block, as words, without comments and `NAME=value` before them."""
    for line in text.replace("\\\n", " ").splitlines():
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word != "&&":
                if words or not SETS_VARIABLE.match(word):
                    words.append(word)
            elif words:
                yield words
                words = []


def run_verb(arguments: list[str]) -> None:
    """Run a verb, or let the command line read its options."""
    for option, ending in ENDLESS.items():
        arguments = [*arguments, *ending] if option in arguments else arguments
    runs = arguments[0] in RUN and not {"--harness", "--ray"} & set(arguments)
    with pytest.MonkeyPatch.context() as patch:
        if not runs:
            for name, (place, summary) in cli.VERBS.items():
                module, _, function = str(place).partition(":")
                verb = getattr(importlib.import_module(f"loraloom.cli.{module}"), function)
                patch.setitem(cli.VERBS, name, (reads_only(verb), summary))
        assert cli.main(arguments) == 0, f"loraloom {shlex.join(arguments)}"


def reads_only(verb: Callable[..., None]) -> Callable[..., None]:
    """A verb with the same options that does nothing."""

    @wraps(verb)
    def nothing(*_: Any, **__: Any) -> None:
        return None

    return nothing


STUDY = ROOT / "recipes/mixture/run.py"
PASS_ON = {STUDY.with_name("maps.py"), ROOT / "recipes/methods/run.py"}
"""Scripts that give options that they don't know to `STUDY`."""


def check_script(arguments: list[str]) -> None:
    """Check that a script or module is there, and that it names the options."""
    if arguments[0] == "-m":
        module = importlib.util.find_spec(arguments[1])
        assert module is not None, f"{arguments[1]} must be a module"
        if module.submodule_search_locations or arguments[1] == "venv":
            return
        script, options = Path(str(module.origin)), arguments[2:]
    else:
        script, options = ROOT / arguments[0], arguments[1:]
    source = script.read_text()
    if script in PASS_ON:
        source += STUDY.read_text()
    if "add_options(" in source:  # of fields of the benchmarks' settings
        source += (ROOT / "benchmarks/cases.py").read_text()
    for option in options:
        if option.startswith("--"):
            name = option.partition("=")[0]
            field = f"{name[2:].replace('-', '_')}: "
            assert f'"{name}"' in source or field in source, f"{script.name} must know {option}"


def check_extras(arguments: list[str]) -> None:
    """Check that extras of loraloom exist."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for word in arguments:
        for names in re.findall(r"loraloom\[(.*)\]", word):
            assert set(names.split(",")) <= set(extras)


SYBIL = Sybil(
    parsers=[
        PythonCodeBlockParser(),
        CodeBlockParser("yaml", check_yaml),
        CodeBlockParser("json", check_json),
        CodeBlockParser("sh", run_commands),
    ]
)
