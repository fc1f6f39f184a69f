"""The official CLI lists, shows and downloads what the emulator has, and signs in to it."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

from yandex.cloud.datasphere.v2.jobs import jobs_pb2

from cli_stage import Stage, scenario


@scenario
def test_projects(stage: Stage) -> None:
    project = {"id": stage.project_id, "name": "test_projects", "community_id": stage.emulator.community_id}
    assert stage.ask("project", "get", "--id", stage.project_id) == project
    listed = stage.ask("project", "list", "-c", stage.emulator.community_id)
    assert project in listed
    table = stage.run("project", "get", "--id", stage.project_id).stdout
    assert "Community ID" in table
    assert stage.project_id in table
    strangers = stage.emulator.add_project("of others")
    assert strangers not in [other["id"] for other in listed]
    refused = stage.run("project", "get", "--id", strangers, code=1)
    assert "StatusCode.PERMISSION_DENIED" in refused.stderr


@scenario
def test_jobs_are_listed_over_pages(stage: Stage) -> None:
    names = [f"job {number}" for number in range(55)]
    ids = [stage.emulator.create_job("true", name=name, project_id=stage.project_id) for name in names]
    listed = stage.ask("project", "job", "list", "-p", stage.project_id)
    assert {(job["id"], job["name"]) for job in listed} == set(zip(ids, names, strict=True))
    assert len(listed) == 55
    calls = [call.request or {} for call in stage.emulator.journal.calls("List")]
    asked = [call for call in calls if call["project_id"] == stage.project_id]
    assert [bool(call.get("page_token")) for call in asked] == [False, True]


@scenario
def test_a_job_and_its_data_ttl(stage: Stage) -> None:
    job_id = stage.emulator.create_job("exit 4", name="n", desc="d", execute=True, project_id=stage.project_id)
    job = stage.emulator.wait_job(job_id, "ERROR")
    entity = stage.ask("project", "job", "get", "--id", job_id)
    assert {**entity, "data_expired_at": ""} == {
        "id": job_id,
        "name": "n",
        "desc": "d",
        "created_at": job.created_at.ToDatetime().isoformat(),
        "finished_at": job.finished_at.ToDatetime().isoformat(),
        "status": "ERROR",
        "created_by": job.created_by_id,
        "data_cleared": False,
        "data_expired_at": "",
    }
    assert "data ttl updated" in stage.run("project", "job", "set-data-ttl", "--id", job_id, "--days", "30").stdout
    expires = stage.emulator.job(job_id).data_expires_at.ToDatetime(timezone.utc)
    left = expires - datetime.now(timezone.utc)
    assert timedelta(days=29, hours=23) < left <= timedelta(days=30)
    stage.run("project", "job", "set-data-ttl", "--id", job_id, "--days", "infinity")
    assert not stage.emulator.job(job_id).HasField("data_expires_at")
    assert stage.ask("project", "job", "get", "--id", job_id)["data_expired_at"] == "Never"
    wrong = stage.run("project", "job", "set-data-ttl", "--id", job_id, "--days", "0", code=1)
    assert "TTL days should be positive" in wrong.stderr
    assert stage.emulator.journal.count("SetDataTtl", job_id=job_id) == 2


@scenario
def test_download_of_all_files(stage: Stage) -> None:
    job_id = stage.emulator.create_job(
        "mkdir -p d/e deep; echo 1 > d/e/1; echo 2 > d/2; echo x | tee deep/x.txt > same.txt; echo out; echo err >&2",
        outputs=[("d", "FOLDER"), "deep/x.txt", "same.txt"],
        execute=True,
        project_id=stage.project_id,
    )
    stage.emulator.wait_job(job_id)
    plain = stage.run("project", "job", "download-files", "--id", job_id)
    assert "downloading 3 files" in plain.stdout
    assert [stage.read(name) for name in ("d/e/1", "d/2", "deep/x.txt", "same.txt")] == ["1\n", "2\n", "x\n", "x\n"]
    assert not (stage.folder / "stdout.txt").exists()

    place = stage.folder / "all of it"
    stage.run(
        *("project", "job", "download-files", "--id", job_id),
        *("--with-logs", "--with-diagnostics", "--output-dir", place),
    )
    # With a folder given, the CLI drops the folders of the files' own paths.
    found = {path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()}
    logs = {"stdout.txt", "stderr.txt", "system.log", "docker_stats.tsv"}
    assert found == {"d/e/1", "d/2", "x.txt", "same.txt"} | logs
    assert [(place / name).read_text() for name in ("stdout.txt", "stderr.txt")] == ["out\n", "err\n"]
    assert "Program started." in (place / "system.log").read_text()


@scenario
def test_download_without_outputs_is_refused(stage: Stage) -> None:
    job_id = stage.emulator.create_job("true", execute=True, project_id=stage.project_id)
    assert stage.emulator.wait_job(job_id).status == jobs_pb2.SUCCESS
    refused = stage.run("project", "job", "download-files", "--id", job_id, code=1)
    assert "StatusCode.INVALID_ARGUMENT" in refused.stderr


@scenario
def test_ways_to_sign_in(stage: Stage) -> None:
    emulator = stage.emulator
    user = emulator.iam.add_user("a person")
    emulator.iam.set_role(user, stage.project_id, "viewer")
    job_id = emulator.create_job("true", project_id=stage.project_id)
    arguments = ("project", "job", "get", "--id", job_id)

    oauth = emulator.iam.add_oauth_token(user)
    stage.run("-t", oauth, *arguments, environment={"YC_IAM_TOKEN": None})
    stage.run(*arguments, environment={"YC_IAM_TOKEN": None, "YC_METADATA_ADDR": emulator.metadata_address})
    revoked = emulator.iam.issue_token(user)
    emulator.iam.revoke(revoked)
    refused = stage.run(*arguments, code=1, environment={"YC_IAM_TOKEN": revoked})
    assert "StatusCode.UNAUTHENTICATED" in refused.stderr
    nobody = {"YC_IAM_TOKEN": None, "YC_AUTH": "oauth"}
    assert "None of authorization methods" in stage.run(*arguments, code=1, environment=nobody).stderr

    gets = emulator.journal.calls("Get", job_id=job_id)
    assert [call.subject for call in gets] == [user, emulator.service_account_id, None]
    assert emulator.journal.count("IamToken.Create") == 1
