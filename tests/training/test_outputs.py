from __future__ import annotations

import pytest

from loraloom.errors import ConfigError
from loraloom.training.store import Checkpoint, JobRecord, RunDirectory


def test_a_new_or_empty_directory_is_fine_and_stays_as_it_is(tmp_path):
    RunDirectory(tmp_path).check(resume=False, overwrite=False)
    RunDirectory(tmp_path / "new/deep").check(resume=False, overwrite=False)
    assert list(tmp_path.iterdir()) == []


def test_results_are_not_overwritten_unasked(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(ConfigError, match=r"must be new or empty.*has a.*--overwrite"):
        RunDirectory(tmp_path).check(resume=False, overwrite=False)
    RunDirectory(tmp_path).check(resume=False, overwrite=True)


def test_resume_needs_checkpoints_where_there_are_results(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.check(resume=True, overwrite=False)
    (tmp_path / "a").mkdir()
    with pytest.raises(ConfigError, match="--resume needs checkpoints"):
        directory.check(resume=True, overwrite=False)
    directory.checkpoints.write(Checkpoint(0, 0.0, {}, {"a": JobRecord({})}), {})
    directory.check(resume=True, overwrite=False)


def test_checkpoints_alone_are_results_too(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.checkpoints.write(Checkpoint(0, 0.0, {}), {})
    with pytest.raises(ConfigError, match="must be new or empty"):
        directory.check(resume=False, overwrite=False)


def test_resume_and_overwrite_exclude_each_other(tmp_path):
    with pytest.raises(ConfigError, match="exclude each other"):
        RunDirectory(tmp_path).check(resume=True, overwrite=True)


def test_a_file_in_the_way_is_an_error(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(ConfigError, match="no directory that can be written to"):
        RunDirectory(tmp_path / "out").check(resume=False, overwrite=True)
    with pytest.raises(ConfigError, match="no directory that can be written to"):
        RunDirectory(tmp_path / "out/deeper").check(resume=False, overwrite=False)


def test_overwriting_takes_this_runs_files_and_leaves_others(tmp_path):
    directory = RunDirectory(tmp_path)
    for job in ("a", "other"):
        directory.best(job).mkdir(parents=True)
        for name in ("metrics.jsonl", "result.json", "notes.txt", "adapter_config.json"):
            (directory.job(job) / name).write_text("{}")
    directory.prepare(["a"])
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["notes.txt"]
    assert len(list((tmp_path / "other").iterdir())) == 5


def test_a_system_that_refuses_to_write_is_told_as_a_setting(tmp_path):
    (tmp_path / "a").write_text("a file where the job's directory goes")
    directory = RunDirectory(tmp_path)
    with pytest.raises(ConfigError, match=r"output_dir must be where files can be written, got "):
        directory.prepare(["a"])
    with pytest.raises(ConfigError, match=r"output_dir must be where files can be written, got "):
        directory.prepare_job("a")
    with pytest.raises(ConfigError, match=r"output_dir must be where files can be written, got "):
        RunDirectory(tmp_path / ("x" * 300)).check(resume=False, overwrite=False)


def test_one_run_at_a_time(tmp_path):
    with (
        RunDirectory(tmp_path / "out").lock(),
        pytest.raises(ConfigError, match=r"no other run writes to.*is in use"),
        RunDirectory(tmp_path / "out").lock(),
    ):
        pass
    with RunDirectory(tmp_path / "out").lock():
        RunDirectory(tmp_path / "out").check(resume=False, overwrite=False)


@pytest.mark.parametrize("file", ["result.json", "adapter_config.json", "adapter_model.bin"])
def test_a_job_that_joins_replaces_no_adapter_unasked(tmp_path, file):
    directory = RunDirectory(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / file).write_text("mine")
    with pytest.raises(ConfigError, match=rf"job a must be new in .*there is .*{file}; take"):
        directory.prepare_job("a")
    assert (tmp_path / "a" / file).read_text() == "mine"
    directory.prepare_job("a", overwrite=True)
    assert not (tmp_path / "a" / file).exists()


def test_links_in_the_way_are_deleted_and_what_they_point_to_stays(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "a.txt").write_text("")
    (tmp_path / "out/a").mkdir(parents=True)
    (tmp_path / "out/a/checkpoints").symlink_to(mine)
    (tmp_path / "out/a/metrics.jsonl").symlink_to(mine / "a.txt")
    RunDirectory(tmp_path / "out").prepare(["a"])
    assert list((tmp_path / "out/a").iterdir()) == []
    assert (mine / "a.txt").exists()


def test_what_a_killed_run_left_on_its_way_is_deleted(tmp_path):
    for place in ("out", "out/.checkpoints"):
        (tmp_path / place).mkdir()
        (tmp_path / place / ".0123456789abcdef.writing").write_text("half")
    with RunDirectory(tmp_path / "out").lock():
        pass
    assert [path.name for path in (tmp_path / "out").rglob("*")] == [".checkpoints", ".lock"]
