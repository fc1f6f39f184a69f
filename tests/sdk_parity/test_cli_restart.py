"""The official CLI and an emulator that is switched off and on again."""

from __future__ import annotations

from cli_stage import LAUNCHER, Stage, environment_of, scenario, until
from datasphere_emulator import Emulator
from harness.sdk_venv import Cli, SdkVenv


@scenario
def test_execute_outlives_a_restart_of_the_emulator(stage: Stage) -> None:
    with Emulator(state_dir=stage.folder / "state") as emulator:
        cli = Cli([SdkVenv().python, LAUNCHER], stage.folder / "commands", environment_of(emulator))
        stage = Stage(emulator, cli, stage.folder, emulator.project_id)
        stage.write({
            "config.yaml": f"""\
                cmd: echo before; while [ ! -e {stage.go} ]; do sleep 0.05; done; echo after; echo made > out.txt
                outputs: [out.txt]
            """,
        })  # fmt: skip
        command = stage.start("project", "job", "execute", "-p", stage.project_id, "-c", "config.yaml")
        command.until("before")
        job_id = stage.only_job()
        emulator.kill()
        emulator.start()
        # The CLI comes back to the log some seconds after it broke off; what it doesn't see by the job's end is lost.
        until(lambda: emulator.journal.count("ReadLogs", job_id=job_id) == 2)
        stage.go.touch()
        command.end()
        assert "read logs stream interrupted" in command.log("log.txt")
        assert command.log("stdout.txt") == "before\nafter\n"
        assert stage.read("out.txt") == "made\n"
        assert emulator.executions(job_id) == 1
