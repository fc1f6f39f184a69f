"""Ten thousand deferred jobs in one triggerer: what they cost, by the way they speak to the service.

    python benchmarks/triggerer.py --jobs 10000 --policy shared --policy nothing

Airflow's own trigger runner is measured, in a process of its own, with each policy one after the other; so is the
service, which costs next to nothing. All jobs run when the triggerer starts, as after its restart:

- ``shared``: ``DataSphereJobTrigger``, as the triggerer runs it;
- ``list per project``: one List of the running jobs per poll interval for all waits, and a poll for those that have
  left it; no logs;
- ``channel per trigger``: each wait opens a channel, polls and reads the log on it, and closes it at the end;
- ``channel per poll``: each poll opens a channel and closes it; no logs;
- ``thread per call``: polls with the synchronous stub on one channel, in the loop's thread pool; no logs;
- ``nothing``: a trigger that waits for nothing, to tell Airflow's own cost.

First the triggerer takes all jobs on, then comes a window of steady state, then all jobs end at once.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from measuring import Machine, save, table
from triggerer_runner import OURS, run
from triggerer_service import serve

POLICIES = {
    "shared": OURS,
    "list per project": "triggerer_policies.ListPerProject",
    "channel per trigger": "triggerer_policies.ChannelPerTrigger",
    "channel per poll": "triggerer_policies.ChannelPerPoll",
    "thread per call": "triggerer_policies.ThreadPerCall",
    "nothing": "triggerer_policies.Nothing",
}
#: A service that computes more than this share of a core slows down whom it serves.
BUSY_SERVICE = 0.7
GIVE_UP_SECONDS = 300.0


@dataclass
class Load:
    """What each policy gets to do. Times in seconds.

    :param window: how long the steady state is measured.
    :param lines: log lines of each job while it is; 0: the triggers don't read logs.
    :param ends: whether the jobs end, and all triggers fire.
    """

    jobs: int
    poll_interval: float
    window: float
    lines: int
    ends: bool


@dataclass
class Figures:
    """What one policy cost. Memory per job in KB, times in seconds."""

    policy: str
    jobs: int
    logs: bool
    taken_on_seconds: float = 0.0
    taken_on_cpu_seconds: float = 0.0
    block_taking_on: float = 0.0
    block_taking_on_cpu: float = 0.0
    memory_per_job: float = 0.0
    connections: int = 0
    threads: int = 0
    connection_reads: int = 0
    core_share: float = 0.0
    calls: int = 0
    cpu_per_call: float = 0.0
    block: float = 0.0
    block_cpu: float = 0.0
    collector: float = 0.0
    done: int = 0
    failed: int = 0
    noticed_p50: float = 0.0
    noticed_max: float = 0.0
    log_lines: int = 0
    cancels: int = 0
    service_share: float = 0.0
    others: float = 0.0


class _Process:
    """Another process, and a pipe to it."""

    def __init__(self, target: Callable[..., None], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=target, args=(theirs, *arguments), daemon=True)
        self._process.start()
        theirs.close()  # so that its death is an EOFError here
        self.first: Any = self._pipe.recv()

    def ask(self, order: Any) -> Any:
        self._pipe.send(order)
        return self._pipe.recv()

    def end(self, order: Any) -> None:
        self._pipe.send(order)
        self._process.join(10)
        self._process.kill()


def measure(policy: str, load: Load, service: _Process) -> Figures:
    """The figures of one policy, on jobs of its own."""
    machine = Machine()
    stream_logs = load.lines > 0 and policy in ("shared", "channel per trigger")
    found = Figures(policy, load.jobs, stream_logs)
    runner = _Process(run, POLICIES[policy], service.first, load.poll_interval, stream_logs)
    before = runner.ask(service.ask(("jobs", load.jobs, load.lines, load.window)))
    handed_over = time.time()
    runner.ask("start")
    if policy == "nothing":
        time.sleep(10)
    state = _wait(lambda: service.ask(("state",)), lambda state: policy == "nothing" or state["polled"] == load.jobs)
    taken = runner.ask("mark")
    found.taken_on_seconds = max(0.0, state["last_first_poll"] - handed_over)
    found.taken_on_cpu_seconds = taken["cpu_seconds"]
    found.block_taking_on, found.block_taking_on_cpu = taken["block_seconds"], taken["block_cpu_seconds"]
    begun = service.ask(("state",))
    time.sleep(load.window)
    steady, after = runner.ask("mark"), service.ask(("state",))
    found.memory_per_job = (steady["rss"] - before["rss"]) / load.jobs / 1000
    found.connections, found.threads = steady["connections"], steady["threads"]
    found.connection_reads = steady["connection_reads"]
    found.core_share = steady["cpu_seconds"] / steady["seconds"]
    found.calls = sum(after["calls"].values()) - sum(begun["calls"].values())
    found.cpu_per_call = steady["cpu_seconds"] / max(1, found.calls)
    found.block, found.block_cpu = steady["block_seconds"], steady["block_cpu_seconds"]
    found.collector = max(taken["collector_seconds"], steady["collector_seconds"])
    found.service_share = (after["cpu"] - begun["cpu"]) / steady["seconds"]
    found.log_lines = steady["log_lines"]
    if load.ends and policy != "nothing":
        service.ask(("finish",))
        ended = _wait(lambda: runner.ask("mark"), lambda seen: len(seen["ended"]) + seen["failed"] >= load.jobs)
        ends = service.ask(("state", "ends"))["ends"]
        noticed = sorted(moment - ends[job_id] for job_id, moment in ended["ended"].items()) or [0.0]
        found.done, found.failed, found.log_lines = len(ended["ended"]), ended["failed"], ended["log_lines"]
        found.noticed_p50, found.noticed_max = noticed[len(noticed) // 2], noticed[-1]
    found.cancels = service.ask(("state",))["calls"].get("Cancel", 0)
    runner.end("end")
    found.others = machine.others()
    return found


def _wait(ask: Callable[[], Any], enough: Callable[[Any], bool]) -> Any:
    until = time.monotonic() + GIVE_UP_SECONDS
    while not enough(answer := ask()):
        if time.monotonic() > until:
            raise SystemExit(f"Not within {GIVE_UP_SECONDS:.0f} s: {answer}")
        time.sleep(0.5)
    return answer


ROWS: list[tuple[str, Callable[[Figures], str]]] = [
    ("jobs", lambda f: str(f.jobs)),
    ("reads the logs", lambda f: "yes" if f.logs else "no"),
    ("taken on within, s", lambda f: f"{f.taken_on_seconds:.1f}"),
    ("CPU of that, s", lambda f: f"{f.taken_on_cpu_seconds:.1f}"),
    ("longest loop block meanwhile, s", lambda f: f"{f.block_taking_on:.3f}"),
    ("of that, its own computing, s", lambda f: f"{f.block_taking_on_cpu:.3f}"),
    ("steady state: share of one core", lambda f: f"{f.core_share:.0%}"),
    ("longest loop block, s", lambda f: f"{f.block:.3f}"),
    ("of that, its own computing, s", lambda f: f"{f.block_cpu:.3f}"),
    ("calls", lambda f: str(f.calls)),
    ("CPU per call, ms", lambda f: f"{1000 * f.cpu_per_call:.2f}" if f.calls else "-"),
    ("memory per job, KB", lambda f: f"{f.memory_per_job:.1f}"),
    ("TCP connections", lambda f: str(f.connections)),
    ("threads", lambda f: str(f.threads)),
    ("reads of the Airflow connection", lambda f: str(f.connection_reads)),
    ("longest pause of the garbage collector, s", lambda f: f"{f.collector:.3f}"),
    ("jobs seen to end (lost)", lambda f: f"{f.done} ({f.failed})"),
    ("end noticed after, median, s", lambda f: f"{f.noticed_p50:.1f}"),
    ("end noticed after, longest, s", lambda f: f"{f.noticed_max:.1f}"),
    ("log lines", lambda f: str(f.log_lines)),
    ("Cancel calls", lambda f: str(f.cancels)),
    ("the service's share of a core", lambda f: f"{f.service_share:.0%}{' BUSY' * (f.service_share > BUSY_SERVICE)}"),
    ("other processes' share of the machine", lambda f: f"{f.others:.0%}"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, action="append", help="default: 1000; may be given several times")
    parser.add_argument("--poll-interval", type=float, default=30.0, help="seconds")
    parser.add_argument("--window", type=float, default=30.0, help="seconds of steady state that are measured")
    parser.add_argument("--lines", type=int, default=0, help="log lines of each job in that time; 0: no logs are read")
    parser.add_argument("--no-ends", action="store_true", help="leave out the end of the jobs")
    parser.add_argument("--policy", action="append", choices=POLICIES, help="default: all")
    parser.add_argument("--json", metavar="FILE", help="write the figures there; -: to the output")
    options = parser.parse_args()
    service = _Process(serve)
    found = []
    for jobs in options.jobs or [1000]:
        load = Load(jobs, options.poll_interval, options.window, options.lines, not options.no_ends)
        for policy in options.policy or POLICIES:
            found.append(measure(policy, load, service))
    service.end(("end",))
    print(f"Poll interval {options.poll_interval:g} s. A service or other processes that are busy slow the triggerer.")
    print(table([["", *(one.policy for one in found)], *([name, *map(show, found)] for name, show in ROWS)]))
    save(options.json, {"benchmark": "triggerer", "figures": [asdict(one) for one in found]})


if __name__ == "__main__":
    main()
